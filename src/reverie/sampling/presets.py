"""What AUTOMATIC1111, ComfyUI and diffusers do where they differ: one table, and the arithmetic that it names.

Sources: AUTOMATIC1111 1.10 (modules/sd_samplers_*.py, sd_schedulers.py, rng.py), ComfyUI 0.3 (comfy/samplers.py,
k_diffusion/sampling.py, sample.py), diffusers 0.42 (schedulers, pipelines of Stable Diffusion). With no preset, Reverie
does as diffusers does.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from reverie.diffusion.process import AnyProcess, EdmProcess
from reverie.diffusion.spacing import SPACINGS, TIMESTEP_SPACINGS, SpacingRules, space
from reverie.errors import RequestError
from reverie.registry import Registry
from reverie.sampling.registry import Sampler, load_all

Policy = Literal["diffusers", "a1111", "a1111_fixed", "comfy"]
MOST_STRENGTH = 0.999  # AUTOMATIC1111 and ComfyUI treat more as this, or as all


@dataclass(frozen=True)
class Preset:
    """How a program draws.

    Attributes:
        strength_steps: how strength and steps go together (`img2img_sigmas`).
        hires_steps: the same in the second pass of a hires fix.
        rng: whose random numbers; `philox` are CUDA's.
        seeds: `picture`, one generator a picture with seed + i; `batch`, one generator draws the whole batch.
        step_noise: noise on the way: `continued` by the generator that drew the first, or by a `restarted` one of the
            same seed on the model's device (on the CPU with seed + 1).
        eta_noise_delta: added to the seed for noise on the way.
        start: the first sample: `sigma`, sigma times noise; `full`, sqrt(1 + sigma²) times noise from the model's
            largest sigma and sigma times noise from a smaller one; `class`, as diffusers' class of the sampler.
        from_model: ranges span the trained sigmas, and no scheduler config is read.
        timesteps: how a timestep is rounded before the network is told: `exact`, `whole`, or as the `class` does.
        means: by the public name of a spacing, the one whose rule the program has under that name.
        automatic: spacing of a sampler where none is asked for; for others `Sampler.spacing`, else `uniform`.
        ends: samplers that do not end at 0: at the last level `visited`, or at the `smallest` trained.
        options: settings of samplers that are not our defaults.
    """

    name: str
    strength_steps: Policy
    hires_steps: Policy
    rng: Literal["cpu", "philox", "device"]
    seeds: Literal["picture", "batch"]
    step_noise: Literal["continued", "restarted"]
    start: Literal["sigma", "full", "class"]
    from_model: bool
    timesteps: Literal["exact", "whole", "class"]
    eta_noise_delta: int = 0
    means: Mapping[str, str] = field(default_factory=dict)
    automatic: Mapping[str, str] = field(default_factory=dict)
    ends: Mapping[str, Literal["visited", "smallest"]] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


PRESETS = Registry[Preset]("preset")
PRESETS.add(
    "a1111",
    Preset(
        "a1111", strength_steps="a1111", hires_steps="a1111_fixed", rng="philox", seeds="picture",
        step_noise="continued", start="sigma", from_model=True, timesteps="exact",
        means={"kl_optimal": "kl_optimal_to_minimum", "ays": "align_your_steps", "linspace": "uniform",
               "trailing": "simple", "leading": "ddim_uniform"},
        automatic={"ddim": "ddim_uniform", "ddim_cfg_pp": "ddim_uniform", "pndm": "ddim_uniform",
                   "unipc": "sgm_uniform", "lcm": "lcm_uniform"},
        ends={"ddim": "visited", "ddim_cfg_pp": "visited", "pndm": "visited", "unipc": "smallest"},
        options={"unipc": {"variant": "bh1", "order": 3}, "lcm": {"timestep_scaling": 10.0},
                 "dpmpp_2m": {"lower_order_final": False}, "dpm_fast": {"eta": 1.0}, "dpm_adaptive": {"eta": 1.0}},
    ),
    ("automatic1111", "forge"),
)  # fmt: skip
PRESETS.add(
    "comfy",
    Preset(
        "comfy", strength_steps="comfy", hires_steps="comfy", rng="cpu", seeds="batch", step_noise="restarted",
        start="full", from_model=True, timesteps="whole",
        means={"beta": "beta_timesteps", "align_your_steps": "ays", "align_your_steps_gits": "gits",
               "linspace": "uniform", "trailing": "simple", "leading": "ddim_uniform"},
        options={"unipc": {"variant": "bh1", "order": 3}, "deis": {"order": 3},
                 "dpmpp_2m": {"lower_order_final": False, "log_sigma": True}, "lms": {"denoise_final": True},
                 "sa_solver": {"predictor_order": 3, "corrector_order": 4, "simplified": False},
                 "sa_solver_pece": {"predictor_order": 3, "corrector_order": 4, "simplified": False}},
    ),
    ("comfyui",),
)  # fmt: skip
PRESETS.add(
    "diffusers",
    Preset(
        "diffusers", strength_steps="diffusers", hires_steps="diffusers", rng="cpu", seeds="batch",
        step_noise="continued", start="class", from_model=False, timesteps="class",
        means={"align_your_steps": "ays", "simple": "trailing", "ddim_uniform": "leading", "uniform": "linspace"},
        options={"lcm": {"timestep_scaling": 10.0}},
    ),
)  # fmt: skip


def chosen_spacing(preset: Preset, sampler: str, spacing: str | None) -> str:
    """The spacing that a program takes under that name, or by itself where none is asked for.

    Raises:
        RequestError: unknown sampler or spacing.
    """
    entry = load_all()[sampler]
    if spacing is None:
        return preset.automatic.get(entry.name, entry.spacing or "uniform")
    name = SPACINGS.name(spacing)
    return preset.means.get(name, name)


def visited(
    preset: Preset,
    sampler: str,
    spacing: str,
    n: int,
    process: AnyProcess,
    rules: SpacingRules,
    **options: object,
) -> Tensor:
    """The sigmas that a program visits in `n` steps; `space` by its rules.

    Args:
        spacing: from `chosen_spacing`.
        rules: the model's own, of which the others take `tables` alone; where `discard_penultimate` is set, it stays.
        options: settings of the spacing.

    Returns:
        `(m + 1,)` float64, descending; m is n, or a step fewer where the program ends at the last level visited.

    Raises:
        RequestError: see `space`.
    """
    entry = load_all()[sampler]
    discard = rules.discard_penultimate or preset.name in entry.discards
    if preset.from_model:
        rules = SpacingRules(base="model", tables=rules.tables)
    else:
        extra = entry.extra_point and spacing in TIMESTEP_SPACINGS
        rules = replace(rules, extra_point=extra, whole_timesteps=entry.whole_timesteps)
    rules = replace(rules, discard_penultimate=discard)
    end = preset.ends.get(entry.name)
    if end == "smallest":
        # AUTOMATIC1111's UniPC spaces as many steps as DDIM visits levels, from the largest sigma to the smallest.
        n = len(space("ddim_uniform", n, process)) - 1
        return space(spacing, n, process, replace(rules, final_sigma=process.sigma_min), **options)
    sigmas = space(spacing, n, process, rules, **options)
    return sigmas[:-1] if end == "visited" and len(sigmas) > 2 else sigmas


def img2img_sigmas(policy: Policy, n: int, strength: float, make: Callable[[int], Tensor]) -> Tensor:
    """The sigmas that are visited when a picture is drawn over; noise is added up to the first of them.

    - diffusers: of n steps, the last `int(n * strength)`.
    - a1111: of n steps, the last `int(n * min(strength, 0.999)) + 1`: one more.
    - a1111_fixed (its option "do exactly the amount of steps", and every hires pass): the last n of
      `int(n / min(strength, 0.999))`.
    - comfy: the last n of `int(n / strength)`.

    Args:
        n: the steps of the request.
        strength: from 0 (nothing is drawn over) to 1 (everything).
        make: `(steps) -> sigmas` of a whole path.

    Returns:
        The end of `make(...)`; its last sigma alone where nothing is to be done.

    Raises:
        RequestError: the whole path would need more steps than the model allows.
    """
    if strength <= 0 and policy != "a1111":
        return make(n)[-1:]
    share = min(strength, MOST_STRENGTH)
    if policy == "diffusers":
        return make(n)[n - min(int(n * strength), n) :]
    if policy == "a1111":
        return make(n)[n - int(share * n) - 1 :]
    if policy == "comfy":
        return make(n) if strength > 0.9999 else _stretched(make, n, strength)[1][-(n + 1) :]
    whole, sigmas = _stretched(make, n, share)
    return sigmas[whole - n :]


def _stretched(make: Callable[[int], Tensor], n: int, strength: float) -> tuple[int, Tensor]:
    """The path whose end is n steps at a strength, and of how many steps it is."""
    whole = int(min(n / strength, 1e9))  # of a tiny strength it would be infinite
    try:
        return whole, make(whole)
    except RequestError as error:
        raise RequestError(f"{n} steps at strength {strength:g} are the end of {whole} steps, but {error}") from None


def told_timestep(preset: Preset, sampler: Sampler, spacing: str, process: AnyProcess) -> Callable[[float], float]:
    """How a timestep is rounded before the network is told."""
    if preset.timesteps == "whole":
        return round if process.discrete else float
    if preset.timesteps == "exact" or not sampler.whole_timesteps or isinstance(process, EdmProcess):
        return float
    # DPMSolverMultistep, UniPC, DEIS and SASolver cast to integers; of Karras' and Lu's they round before.
    if sampler.extra_point and spacing in CAST:
        return CAST[spacing]
    return round if process.discrete else float


def _below(timestep: float) -> float:
    """Cast to an integer where a float32 has come out an ulp too small: T-1 becomes T-2."""
    return max(math.floor(timestep - 1e-6), 0)


def _at(timestep: float) -> float:
    """Cast to an integer where a whole number has come out as one."""
    return math.floor(timestep + 1e-6)


CAST = {"exponential": _below, "beta": _below, "flow_sigmas": _at, "flow_sigmas_unipc": _at}
