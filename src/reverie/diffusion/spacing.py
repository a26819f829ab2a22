"""Which noise levels a sampler visits.

Every entry of `SPACINGS` is a named rule that gives n descending sigmas; `space` appends where the last step ends.
One name is one rule: where programs give different rules the same name, each rule has a name of its own here, and
`sampling/presets.py` says which of them a program means.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from reverie.diffusion import tables
from reverie.diffusion.distributions import beta_quantile
from reverie.diffusion.process import AnyProcess
from reverie.diffusion.spacing_kinds import (
    BY_PLACE,
    BY_RANGE,
    BY_TIMESTEP,
    FREELY,
    SPACINGS,
    Option,
    Spacing,
    SpacingRules,
    bounds,
    each,
    spacing,
)
from reverie.errors import RequestError

__all__ = ["SPACINGS", "TIMESTEP_SPACINGS", "Option", "Spacing", "SpacingRules", "manual", "space"]

TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")  # diffusers' timestep_spacing (Lin et al. 2023, table 2)
ALPHA = Option(0.6, 0.1, 10, "first parameter of the beta distribution")
BETA = Option(0.6, 0.1, 10, "second parameter of the beta distribution")
ORIGINAL_STEPS = Option(50, 1, 1000, "steps of the schedule that the model was distilled with", whole=True)
AYS = "Sabour et al. 2024, Align Your Steps"


def space(name: str, n: int, process: AnyProcess, rules: SpacingRules | None = None, **options: object) -> Tensor:
    """The sigmas that `n` steps visit.

    Args:
        name: a registered spacing or alias.
        n: number of steps, at least 1 and at most the training timesteps.
        process: the model's noise process.
        rules: rounding and ends.
        options: settings of the spacing (`SPACINGS[name].options`).

    Returns:
        `(m + 1,)` float64, descending, ending in `rules.final_sigma`. m is n, but for spacings that are not `exact`.

    Raises:
        RequestError: unknown spacing or option, more steps than training timesteps, levels that repeat.
    """
    rules = rules or SpacingRules()
    entry = SPACINGS[name]
    settings = entry.settings(options)
    most = process.steps - rules.discard_penultimate
    if not 1 <= n <= most:
        raise RequestError(f"steps is {n}; this model allows 1 to {most}")
    sigmas = entry.levels(n + rules.discard_penultimate, process, rules, **settings)
    sigmas = sigmas[: len(sigmas) - rules.discard_penultimate]
    if math.isclose(sigmas[0], process.limit, rel_tol=1e-9):
        sigmas[0] = process.limit  # a rule's rounding must not leave a trace of signal in pure noise
    final = bounds(n, process, rules, settings["sigma_min"])[0] if entry.to_minimum else rules.final_sigma
    _check(entry.name, n, sigmas, final, process)
    return torch.cat([sigmas, torch.tensor([final], dtype=torch.float64)])


def _check(name: str, n: int, sigmas: Tensor, final: float, process: AnyProcess) -> None:
    if sigmas[0] > process.limit:
        top = float(sigmas[0])
        raise RequestError(f"spacing {name} starts at sigma {top:g}; this model has no sigma above {process.limit:g}")
    if not bool(torch.isfinite(sigmas).all() and (sigmas.diff() < 0).all()):
        raise RequestError(f"spacing {name} has not {n} different noise levels here; ask for fewer steps")
    if not (sigmas[-1] > 0 and sigmas[-1] >= final):
        low = float(sigmas[-1])
        raise RequestError(f"spacing {name} goes down to sigma {low:g}, below the end of the last step, {final:g}")


def manual(values: Sequence[float], process: AnyProcess) -> Tensor:
    """Noise levels as a request gives them, both ends included.

    Returns:
        `(len(values),)` float64.

    Raises:
        RequestError: fewer than two, not finite, negative, not descending, above what the model knows.
    """
    if len(values) < 2:
        raise RequestError(f"sigmas has {len(values)}; at least two are needed: where to begin and where to end")
    for i, value in enumerate(values):
        if not math.isfinite(value) or value < 0:
            raise RequestError(f"sigmas[{i}] is {value!r}; expected a number of at least 0")
        if i and value >= values[i - 1]:
            raise RequestError(f"sigmas[{i}] is {value!r} after {values[i - 1]!r}; each must be below the one before")
    if values[0] > process.limit:
        raise RequestError(f"sigmas[0] is {values[0]!r}; this model has no sigma above {process.limit:g}")
    return torch.tensor(values, dtype=torch.float64)


# By place in the table of sigmas


@spacing("leading", kind=BY_PLACE, source="Lin et al. 2023, table 2; diffusers")
def leading(n: int, total: int, rules: SpacingRules) -> Tensor:
    """Every `T // n`-th place from the start, plus the offset: never reaches T-1."""
    points = n + rules.extra_point
    t = torch.arange(points, dtype=torch.float64) * (total // points)
    return t.flip(0)[:n] + rules.steps_offset


@spacing("trailing", kind=BY_PLACE, source="Lin et al. 2023, table 2; diffusers")
def trailing(n: int, total: int, rules: SpacingRules) -> Tensor:
    """Every `T / n`-th place from the end: always starts at T-1."""
    del rules
    return (total - torch.arange(n, dtype=torch.float64) * (total / n)).round() - 1


@spacing("simple", kind=BY_PLACE, source="ComfyUI simple_scheduler; A1111", label="Simple")
def simple(n: int, total: int, rules: SpacingRules) -> Tensor:
    """Every `T / n`-th place from the end, rounded up where `trailing` rounds to the nearest: 999, 949, ... for 20."""
    del rules
    return total - 1 - (torch.arange(n, dtype=torch.float64) * (total / n)).floor()


@spacing("ddim_uniform", "ddim", kind=BY_PLACE, source="ComfyUI ddim_scheduler; A1111", label="DDIM", exact=False)
def ddim_uniform(n: int, total: int, rules: SpacingRules) -> Tensor:
    """Places 1, 1 + T // n, ... to the end of the table: 951, ..., 51, 1 for 20; 31 of them for n = 30."""
    del rules
    return torch.arange(min(1, total - 1), total, total // n, dtype=torch.float64).flip(0)


@spacing("turbo", kind=BY_PLACE, source="Forge turbo_scheduler, for SD-Turbo", label="Turbo")
def turbo(n: int, total: int, rules: SpacingRules) -> Tensor:
    """`trailing`, but rounded after 1 is subtracted: where it is a half, another place is the even one."""
    del rules
    t = torch.arange(n, 0, -1, dtype=torch.float32) * (total / n) - 1  # float32 as there: it decides some halves
    return t.round().clamp(0, total - 1).double()


@spacing("sd_turbo", "SDTurboScheduler", kind=BY_PLACE, source="ComfyUI SDTurboScheduler node")
def sd_turbo(n: int, total: int, rules: SpacingRules) -> Tensor:
    """The first n of ten equal steps: SD-Turbo was trained on their places alone."""
    del rules
    if n > 10:
        raise RequestError(f"steps is {n}; spacing sd_turbo allows 1 to 10")
    return torch.arange(10, 10 - n, -1, dtype=torch.float64) * (total // 10) - 1


@spacing("lcm", kind=BY_PLACE, source="Luo et al. 2023, Latent Consistency Models; diffusers LCMScheduler",
         original_steps=ORIGINAL_STEPS)  # fmt: skip
def lcm(n: int, total: int, rules: SpacingRules, original_steps: int) -> Tensor:
    """n of the places that the model was distilled on, which lie `T // original_steps` apart."""
    del rules
    if not n <= original_steps <= total:
        raise RequestError(f"steps is {n}; spacing lcm allows 1 to original_steps, which is {original_steps}")
    chosen = (torch.arange(n, dtype=torch.float64) * (original_steps / n)).floor()
    return (original_steps - chosen) * (total // original_steps) - 1


@spacing("smoothstep", kind=BY_PLACE, source="stable-diffusion.cpp SmoothStepScheduler", exact=False)
def smoothstep(n: int, total: int, rules: SpacingRules) -> Tensor:
    """Places along `3u² - 2u³`, dense at both ends; repeated places are visited once."""
    del rules
    u = 1 - torch.arange(n, dtype=torch.float64) / n
    return _distinct((u * u * (3 - 2 * u) * (total - 1)).round())


@spacing("beta57", kind=BY_PLACE, source="RES4LYF: beta_timesteps with 0.5 and 0.7", exact=False,
         alpha=Option(0.5, 0.1, 10, ALPHA.about), beta=Option(0.7, 0.1, 10, BETA.about))  # fmt: skip
@spacing("beta_timesteps", kind=BY_PLACE, source="Lee et al. 2024; ComfyUI beta_scheduler", exact=False,
         alpha=ALPHA, beta=BETA)  # fmt: skip
def beta_timesteps(n: int, total: int, rules: SpacingRules, alpha: float, beta: float) -> Tensor:
    """Places at the quantiles of a beta distribution, dense at both ends; repeated places are visited once."""
    del rules
    quantiles = beta_quantile(1 - torch.arange(n, dtype=torch.float64) / n, alpha, beta)
    return _distinct((quantiles * (total - 1)).round())


# By timestep of the network


@spacing("linspace", kind=BY_TIMESTEP, source="Lin et al. 2023, table 2; diffusers")
def linspace(n: int, start: float, end: float, rules: SpacingRules) -> Tensor:
    """n equally spaced timesteps, both ends included. One alone is the end, as NumPy has it."""
    points = n + rules.extra_point
    # k * step as NumPy has it, not torch.linspace: 499.5 must not come out as 499.49999 where it is rounded next
    t = end + torch.arange(points, dtype=torch.float64) * ((start - end) / max(points - 1, 1))
    return t.flip(0)[:n]


@spacing("uniform", "normal", "discrete", kind=BY_TIMESTEP, source="k-diffusion get_sigmas; A1111, ComfyUI",
         label="Uniform")  # fmt: skip
def uniform(n: int, start: float, end: float, rules: SpacingRules) -> Tensor:
    """n equally spaced timesteps, both ends included. One alone is the start."""
    del rules
    return torch.linspace(start, end, n, dtype=torch.float64)


@spacing("sgm_uniform", "SGMUniform", kind=BY_TIMESTEP, source="Stability's generative-models; ComfyUI, A1111",
         label="SGM Uniform")  # fmt: skip
def sgm_uniform(n: int, start: float, end: float, rules: SpacingRules) -> Tensor:
    """n + 1 equally spaced timesteps without the last; they may fall between whole ones."""
    return uniform(n + 1, start, end, rules)[:n]


# By sigma, between the ends of a range


@spacing("karras", "use_karras_sigmas", kind=BY_RANGE, source="Karras et al. 2022, equation 5", label="Karras",
         rho=Option(7.0, 0.1, 100, "curvature; large values crowd the small sigmas"))  # fmt: skip
def karras(n: int, low: float, high: float, rho: float = 7.0) -> Tensor:
    """`sigma^(1/rho)` equally spaced."""
    roots: Tensor = high ** (1 / rho) + _ramp(n) * (low ** (1 / rho) - high ** (1 / rho))
    return roots.pow(rho)


# diffusers rounds the timesteps of lu_lambdas and truncates those of exponential; the sigmas are the same.
@spacing("lu_lambdas", "lu", "use_lu_lambdas", kind=BY_RANGE, source="Lu et al. 2022, DPM-Solver, section 3.4")
@spacing("exponential", "use_exponential_sigmas", kind=BY_RANGE, source="k-diffusion get_sigmas_exponential",
         label="Exponential")  # fmt: skip
def exponential(n: int, low: float, high: float) -> Tensor:
    """`log sigma` equally spaced."""
    return torch.linspace(math.log(high), math.log(low), n, dtype=torch.float64).exp()


@spacing("polyexponential", kind=BY_RANGE, source="k-diffusion get_sigmas_polyexponential", label="Polyexponential",
         rho=Option(1.0, 0.1, 100, "curvature; 1 is exponential"))  # fmt: skip
def polyexponential(n: int, low: float, high: float, rho: float) -> Tensor:
    """`log sigma` along the power `rho` of a straight line."""
    return ((1 - _ramp(n)) ** rho * math.log(high / low) + math.log(low)).exp()


@spacing("beta", "use_beta_sigmas", kind=BY_RANGE, source="Lee et al. 2024; A1111, diffusers", label="Beta",
         alpha=ALPHA, beta=BETA)  # fmt: skip
def beta(n: int, low: float, high: float, alpha: float, beta: float) -> Tensor:
    """Quantiles of a beta distribution, stretched to the range of sigma (not of timesteps, as in the paper)."""
    return low + beta_quantile(1 - _ramp(n), alpha, beta) * (high - low)


@spacing("kl_optimal", kind=BY_RANGE, source=f"{AYS}, theorem 3.1; ComfyUI", label="KL Optimal")
def kl_optimal(n: int, low: float, high: float) -> Tensor:
    """`arctan sigma` equally spaced."""
    return torch.linspace(math.atan(high), math.atan(low), n, dtype=torch.float64).tan()


@spacing("kl_optimal_to_minimum", kind=BY_RANGE, source=f"{AYS}, theorem 3.1; A1111", to_minimum=True)
def kl_optimal_to_minimum(n: int, low: float, high: float) -> Tensor:
    """`arctan sigma` equally spaced, n + 1 sigmas of which the last is the end: a little noise stays."""
    return kl_optimal(n + 1, low, high)[:n]


@spacing("laplace", kind=BY_RANGE, source="Hang et al. 2024, Improved Noise Schedule; ComfyUI", exact=False,
         mu=Option(0.0, -10, 10, "mean of log sigma"), beta=Option(0.5, 0.01, 10, "its width"))  # fmt: skip
def laplace(n: int, low: float, high: float, mu: float, beta: float) -> Tensor:
    """Quantiles of a Laplace distribution of log sigma, clamped to the range; repeated sigmas are visited once."""
    x = 0.5 - _ramp(n)
    log_sigma = mu - beta * torch.sign(x) * torch.log(1 - 2 * x.abs() + 1e-5)  # 1e-5 as there, against log 0
    return _distinct(log_sigma.exp().clamp(low, high))


def _ramp(n: int) -> Tensor:
    return torch.linspace(0, 1, n, dtype=torch.float64)


def _distinct(values: Tensor) -> Tensor:
    """Without those that stand there twice in a row: steps of no length."""
    kept: Tensor = torch.unique_consecutive(values)
    return kept


# Freely


@spacing("vp", "VPScheduler", kind=FREELY, source="Song et al. 2021, VP-SDE; k-diffusion get_sigmas_vp",
         beta_d=Option(19.9, 0, 5000, "growth of beta"), beta_min=Option(0.1, 0, 5000, "beta at the start"),
         eps_s=Option(1e-3, 1e-6, 1, "smallest time"))  # fmt: skip
def vp(n: int, process: AnyProcess, rules: SpacingRules, beta_d: float, beta_min: float, eps_s: float) -> Tensor:
    """Equal steps of time, from 1 to `eps_s`, in the continuous variance-preserving process; it starts near 150."""
    del process, rules
    t = torch.linspace(1, eps_s, n, dtype=torch.float64)
    return torch.expm1(beta_d * t**2 / 2 + beta_min * t).sqrt()


@spacing("linear_quadratic", kind=FREELY, source="Polyak et al. 2024, Movie Gen; ComfyUI linear_quadratic_schedule",
         threshold_noise=Option(0.025, 1e-4, 0.5, "share of the noise that the linear steps remove"),
         linear_steps=Option(None, 1, 1000, "how many of the steps; half if absent", whole=True))  # fmt: skip
def linear_quadratic(
    n: int, process: AnyProcess, rules: SpacingRules, threshold_noise: float, linear_steps: int | None
) -> Tensor:
    """Small equal steps first, then steps that grow evenly, joined with one slope."""
    del rules
    if n == 1:
        return torch.tensor([process.sigma_max], dtype=torch.float64)
    few = linear_steps or n // 2
    if few >= n:
        raise RequestError(f"linear_steps is {few}; of {n} steps at most {n - 1} can be linear")
    i = torch.arange(n, dtype=torch.float64)
    slope, rest = threshold_noise / few, n - few
    curve = (1 - threshold_noise - slope * rest) / rest**2  # so that all noise is gone after n steps
    removed = slope * i + curve * (i - few).clamp(min=0) ** 2
    return process.sigma_max * (1 - removed)


@spacing("flow_sigmas", "flow", "use_flow_sigmas", kind=FREELY, source="diffusers DPMSolverMultistepScheduler")
def flow_sigmas(n: int, process: AnyProcess, rules: SpacingRules) -> Tensor:
    """Equal steps of unshifted time, from one timestep below the noisiest to 0, without the last."""
    del rules
    _only_flow("flow_sigmas", process)
    return each(process.sigma, torch.arange(n, 0, -1, dtype=torch.float64) * ((process.steps - 1) / n))


@spacing("flow_sigmas_unipc", kind=FREELY, source="diffusers UniPCMultistepScheduler with use_flow_sigmas")
def flow_sigmas_unipc(n: int, process: AnyProcess, rules: SpacingRules) -> Tensor:
    """Equal steps of unshifted time, from the noisiest timestep to 1, without the last.

    The first sigma is a millionth below 1, where the log-SNR is finite.
    """
    del rules
    _only_flow("flow_sigmas_unipc", process)
    t = torch.linspace(process.steps, 1, n + 1, dtype=torch.float64)[:n]
    return each(process.sigma, t).clamp(max=1 - 1e-6)


def _only_flow(name: str, process: AnyProcess) -> None:
    if process.limit > 1:
        raise RequestError(f"spacing {name} is for flow models (Stable Diffusion 3), which this model is not")


# Published lists


def interpolated(levels: Sequence[float], n: int) -> Tensor:
    """n points of a list, both ends included; log sigma is linear between entries. One alone is the first."""
    places = np.linspace(0, len(levels) - 1, n)
    return torch.from_numpy(np.exp(np.interp(places, np.arange(len(levels)), np.log(levels))))


@spacing("lcm_uniform", kind=FREELY, source="A1111's LCM sampler", original_steps=ORIGINAL_STEPS)
def lcm_uniform(n: int, process: AnyProcess, rules: SpacingRules, original_steps: int) -> Tensor:
    """n points of the levels that the model was distilled on, both ends included."""
    del rules
    every = max(process.steps // original_steps, 1)
    return interpolated(process.sigmas.flip(0)[::every][:original_steps].tolist(), n)


def _of_family(name: str, known: Mapping[str, Sequence[float]], rules: SpacingRules) -> Sequence[float]:
    if rules.tables not in known:
        raise RequestError(f"spacing {name} is published for {', '.join(known)}; this model is {rules.tables}")
    return known[rules.tables]


@spacing("align_your_steps", "align_your_steps_11", kind=FREELY, source=f"{AYS}; A1111", label="Align Your Steps")
def align_your_steps(n: int, process: AnyProcess, rules: SpacingRules) -> Tensor:
    """n points of the list for 10 steps, its last level included: 11 steps use it as it is."""
    del process
    return interpolated(_of_family("align_your_steps", tables.ALIGN_YOUR_STEPS, rules), n)


@spacing("ays", "AlignYourStepsScheduler", kind=FREELY, source=f"{AYS}; ComfyUI, stable-diffusion.cpp")
def ays(n: int, process: AnyProcess, rules: SpacingRules) -> Tensor:
    """n + 1 points of the list for 10 steps without the last: 10 steps use it as it is."""
    del process
    return interpolated(_of_family("ays", tables.ALIGN_YOUR_STEPS_LONG, rules), n + 1)[:n]


@spacing("align_your_steps_32", kind=FREELY, source=f"{AYS}; Forge", label="Align Your Steps 32")
def align_your_steps_32(n: int, process: AnyProcess, rules: SpacingRules) -> Tensor:
    """n points of a list of 32."""
    del process
    return interpolated(_of_family("align_your_steps_32", tables.ALIGN_YOUR_STEPS_32, rules), n)


@spacing("align_your_steps_gits", kind=FREELY, source="Chen et al. 2024, GITS; Forge", label="Align Your Steps GITS")
def align_your_steps_gits(n: int, process: AnyProcess, rules: SpacingRules) -> Tensor:
    """n points of a list of 11."""
    del process
    return interpolated(_of_family("align_your_steps_gits", tables.GITS_11, rules), n)


@spacing("gits", "GITSScheduler", kind=FREELY, source="Chen et al. 2024, GITS; ComfyUI with coefficient 1.20")
def gits(n: int, process: AnyProcess, rules: SpacingRules) -> Tensor:
    """The list for n steps without its last level; for more than 20 steps the longest is stretched."""
    del process
    lists = {len(levels) - 1: levels for levels in tables.GITS_120}
    longest = max(lists)
    _of_family("gits", {"sd1": lists[longest]}, rules)
    return interpolated(lists.get(max(n, 2), lists[longest]), max(n, 2) + 1)[:n]
