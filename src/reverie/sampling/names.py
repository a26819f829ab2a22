"""The names that other programs have for a sampler with its spacing, in both directions.

Samplers and spacings know their own aliases. Here is what is left: labels that name both at once ("DPM++ 2M Karras",
`euler_k`), systematic spellings (`k_`, `_ancestral`, `_gpu`, `++`), and what AUTOMATIC1111 prints.
"""

import re
from collections.abc import Iterator

from reverie.diffusion.spacing import SPACINGS
from reverie.errors import RequestError
from reverie.registry import normalise
from reverie.sampling.registry import SAMPLERS, load_all

Named = tuple[str, str | None]
"""A sampler and a spacing by their canonical names; None where the label leaves the spacing open."""

# Spellings that no rule below brings to a registered name.
OTHER_NAMES: dict[str, Named] = {
    # diffusers classes that a sampler here covers together with another class
    "DPMSolverSDEScheduler": ("dpmpp_sde", None),
    "KDPM2DiscreteScheduler": ("dpm_2", None),
    "KDPM2AncestralDiscreteScheduler": ("dpm_2_a", None),
    "EDMEulerScheduler": ("euler", None),
    "EDMDPMSolverMultistepScheduler": ("dpmpp_2m", None),
    "FlowMatchEulerDiscreteScheduler": ("euler", None),
    "FlowMatchHeunDiscreteScheduler": ("heun", None),
    "FlowMatchLCMScheduler": ("lcm", None),
    "DDIMParallelScheduler": ("ddim", None),
    "DDPMParallelScheduler": ("ddpm", None),
    # Stability's generative-models (sgm)
    "EulerEDMSampler": ("euler", None),
    "HeunEDMSampler": ("heun", None),
    "EulerAncestralSampler": ("euler_a", None),
    "DPMPP2SAncestralSampler": ("dpmpp_2s_a", None),
    "DPMPP2MSampler": ("dpmpp_2m", None),
    "LinearMultistepSampler": ("lms", None),
    # ComfyUI's other names for one function with other settings
    "exp_heun_2_x0": ("seeds_2", None),
    "exp_heun_2_x0_sde": ("seeds_2", None),
    # NovelAI, refiners
    "ddim_v3": ("ddim", None),
    "DPM": ("dpmpp_2m", None),
}

# Settings that a label means beside the sampler.
LABEL_OPTIONS: dict[str, dict[str, float | str]] = {
    "uni_pc": {"variant": "bh1"},
    "uni_pc_bh2": {"variant": "bh2"},
    "exp_heun_2_x0": {"eta": 0.0, "r": 1.0, "solver_type": "phi_2"},
    "exp_heun_2_x0_sde": {"eta": 1.0, "r": 1.0, "solver_type": "phi_2"},
}

# Names of programs that are left out on purpose, and why.
LEFT_OUT = {
    "Euler A Substep": "the substeps of Draw Things are not here; use euler_a",
    "DPM++ SDE Substep": "the substeps of Draw Things are not here; use dpmpp_sde",
    "nai_smea": "NovelAI has not published SMEA; use euler_a",
    "nai_smea_dyn": "NovelAI has not published SMEA; use euler_a",
    "dpm++2mv2": "a variant of DPM++ 2M without a published derivation; use dpmpp_2m",
    "res_2s": "the single-step form of RES is not here; use res_multistep or seeds_2",
    "cfgpp_ud10_ab": "it has no published derivation",
    "Franken": "refiners wraps schedulers of diffusers in it; name the scheduler",
    "DDIMInverseScheduler": "it goes from a picture to noise",
    "DPMSolverMultistepInverseScheduler": "it goes from a picture to noise",
    "RePaintScheduler": "it is a method of inpainting, not a sampler",
    "CMStochasticIterativeScheduler": "it is for consistency models of pixels",
    "ScoreSdeVeScheduler": "it is for variance-exploding models of pixels",
    "AmusedScheduler": "it is for token models",
}

SHORT_SPACINGS = {"k": "karras", "ka": "karras"}  # InvokeAI's euler_k, A1111's k_lms_ka
FLAGS = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas",
         "lu_lambdas": "use_lu_lambdas", "flow_sigmas": "use_flow_sigmas"}  # fmt: skip
# diffusers' DPMSolverMultistepScheduler by algorithm_type, solver_order, solver_type
DPM_SOLVERS = {
    ("dpmsolver++", "2", "midpoint"): "dpmpp_2m",
    ("dpmsolver++", "3", "midpoint"): "dpmpp_3m",
    ("sde-dpmsolver++", "2", "midpoint"): "dpmpp_2m_sde",
    ("sde-dpmsolver++", "2", "heun"): "dpmpp_2m_sde_heun",
    ("sde-dpmsolver++", "3", "midpoint"): "dpmpp_3m_sde",
    ("dpmsolver", "2", "midpoint"): "dpm_solver",
}
# What AUTOMATIC1111 calls the nearest of its schedule types, for spacings that it has not.
NEAREST_LABELS = {"linspace": "Uniform", "trailing": "Simple", "leading": "DDIM", "beta_timesteps": "Beta",
                  "kl_optimal_to_minimum": "KL Optimal", "ays": "Align Your Steps", "lu_lambdas": "Exponential",
                  "sd_turbo": "Turbo", "gits": "Align Your Steps GITS"}  # fmt: skip


def resolve(label: str) -> Named:
    """The sampler and, where the label says it, the spacing.

    Raises:
        RequestError: no such sampler, or one that is left out on purpose; the message says why, or names the nearest.
    """
    load_all()
    key = normalise(label)
    for name, reason in LEFT_OUT.items():
        if key == normalise(name):
            raise RequestError(f"sampler {label!r} is not available: {reason}")
    found = _of_class(label) or _whole(key) or _split(key)
    return found or (SAMPLERS.name(label), None)  # which raises, with a hint


def label_options(label: str) -> dict[str, float | str]:
    """Options of the sampler that the label means, where it means more than a sampler and a spacing."""
    return dict(LABEL_OPTIONS.get(normalise(label), {}))


def a1111_labels(sampler: str, spacing: str | None) -> tuple[str, str]:
    """What AUTOMATIC1111 writes for `Sampler` and `Schedule type`; our own name where it has none."""
    chosen = load_all()[sampler]
    if spacing is None:
        return chosen.label or chosen.name, "Automatic"
    name = SPACINGS.name(spacing)
    return chosen.label or chosen.name, SPACINGS[name].label or NEAREST_LABELS.get(name, name)


def _whole(key: str) -> Named | None:
    """A label that names a sampler alone."""
    for name, named in OTHER_NAMES.items():
        if key in {normalise(name), normalise(name.removesuffix("Sampler"))}:
            return named
    return next(((SAMPLERS.name(spelling), None) for spelling in _spellings(key) if spelling in SAMPLERS), None)


def _spellings(key: str) -> Iterator[str]:
    """The label, and what it becomes by each rule after the other."""
    yield key
    for pattern, instead in (
        (r"^(sample|k)_", ""),  # k-diffusion's functions and what was named after them
        (r"_(gpu|bt)$", ""),  # where ComfyUI and stable-diffusion.cpp draw the noise
        (r"cfg\+\+|cfgpp", "cfg_pp"),
        (r"dpm\+\+_?|dpmpp_?(?=\d)", "dpmpp_"),
        (r"^k?dpm_?2", "dpm_2"),
        (r"ancestral", "a"),
    ):
        key = re.sub(pattern, instead, key)
        yield key


def _split(key: str) -> Named | None:
    """A label whose tail is a spacing; the longest tail counts."""
    words = key.split("_")
    for cut in range(1, len(words)):
        tail, sampler = "_".join(words[cut:]), _whole("_".join(words[:cut]))
        if sampler and sampler[1] is None and (tail == "automatic" or tail in SHORT_SPACINGS or tail in SPACINGS):
            tail = SHORT_SPACINGS.get(tail, tail)
            return sampler[0], None if tail == "automatic" else SPACINGS.name(tail)
    return None


def _of_class(label: str) -> Named | None:
    """`DPMSolverMultistepScheduler(algorithm_type=sde-dpmsolver++, use_karras_sigmas=True)`, in any brackets."""
    match = re.fullmatch(r"\s*(\w+Scheduler)\s*[(\[{](.*)[)\]}]\s*", label)
    sampler = _whole(normalise(match[1])) if match else None
    if match is None or sampler is None:
        return None
    pairs = (part.partition("=") for part in match[2].split(",") if "=" in part)
    settings = {key.strip(): value.strip().strip("'\"") for key, _, value in pairs}
    spacing = next((name for name, flag in FLAGS.items() if settings.get(flag) == "True"), None)
    spacing = spacing or settings.get("timestep_spacing")
    solver = (
        settings.get("algorithm_type", "dpmsolver++"),
        settings.get("solver_order", "2"),
        settings.get("solver_type", "midpoint"),
    )
    name = DPM_SOLVERS.get(solver, sampler[0]) if sampler[0] == "dpmpp_2m" else sampler[0]
    return name, SPACINGS.name(spacing) if spacing else None
