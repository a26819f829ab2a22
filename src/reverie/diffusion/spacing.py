"""Which noise levels a sampler visits: functions that return a descending tensor ending in the final sigma.

The first three choose training timesteps (Lin et al. 2023, table 2), the others choose sigmas directly between
the ends of the range. diffusers, AUTOMATIC1111 and ComfyUI names for the same idea are registered as aliases.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reverie.diffusion.process import Process
from reverie.errors import RequestError
from reverie.registry import Registry


@dataclass(frozen=True)
class SpacingRules:
    """How an implementation rounds and ends a spacing; the defaults are those of diffusers' Euler scheduler.

    Attributes:
        steps_offset: added to every `leading` timestep (1 in the Stable Diffusion configs).
        extra_point: space `n + 1` points and drop the last (diffusers' DPMSolverMultistep).
        whole_timesteps: round timesteps to whole numbers, in the spacing and when the network is told its timestep.
        final_sigma: where the last step ends: 0, or the smallest trained sigma.
        base: the timestep spacing whose ends bound karras and exponential.
    """

    steps_offset: int = 0
    extra_point: bool = False
    whole_timesteps: bool = False
    final_sigma: float = 0.0
    base: str = "linspace"


TimestepRule = Callable[[int, int, SpacingRules], Tensor]
SigmaRule = Callable[[int, float, float], Tensor]


def linspace(n: int, total: int, rules: SpacingRules) -> Tensor:
    """`n` timesteps from T-1 to 0, both ends included. Returns `(n,)` float64, descending."""
    points = n + rules.extra_point
    # k * step as NumPy has it, not torch.linspace: 499.5 must not come out as 499.49999 where it is rounded next
    t = torch.arange(points, dtype=torch.float64) * ((total - 1) / max(points - 1, 1))
    t = t.clamp(max=total - 1).flip(0)[:n]
    return t.round() if rules.whole_timesteps else t


def leading(n: int, total: int, rules: SpacingRules) -> Tensor:
    """Every `T // n`-th timestep from the start, plus the offset: never reaches T-1. `(n,)` float64, descending."""
    points = n + rules.extra_point
    t = torch.arange(points, dtype=torch.float64) * (total // points)
    return t.flip(0)[:n] + rules.steps_offset


def trailing(n: int, total: int, rules: SpacingRules) -> Tensor:
    """Every `T / n`-th timestep from the end: always starts at T-1. `(n,)` float64, descending."""
    del rules
    return (total - torch.arange(n, dtype=torch.float64) * (total / n)).round() - 1


def karras(n: int, low: float, high: float, rho: float = 7.0) -> Tensor:
    """`sigma^(1/rho)` equally spaced (Karras et al. 2022, equation 5). `(n,)` float64 from `high` to `low`."""
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    roots: Tensor = high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))
    return roots.pow(rho)


def exponential(n: int, low: float, high: float) -> Tensor:
    """`log sigma` equally spaced (k-diffusion). `(n,)` float64 from `high` to `low`."""
    ends = torch.tensor([high, low], dtype=torch.float64).log()
    return torch.linspace(float(ends[0]), float(ends[1]), n, dtype=torch.float64).exp()


TIMESTEP_SPACINGS: dict[str, TimestepRule] = {"linspace": linspace, "leading": leading, "trailing": trailing}
SIGMA_SPACINGS: dict[str, SigmaRule] = {"karras": karras, "exponential": exponential}

SPACINGS = Registry[TimestepRule | SigmaRule]("spacing")
SPACINGS.add("leading", leading, ("ddim_uniform",))
SPACINGS.add("trailing", trailing, ("simple",))
SPACINGS.add("linspace", linspace, ("normal", "uniform"))
SPACINGS.add("karras", karras)
SPACINGS.add("exponential", exponential)


def space(name: str, n: int, process: Process, rules: SpacingRules | None = None) -> Tensor:
    """The sigmas that `n` steps visit.

    Args:
        name: a registered spacing or alias.
        n: number of steps, at least 1 and at most the training timesteps.
        process: the model's noise process.
        rules: rounding and ends.

    Returns:
        `(n + 1,)` float64, descending, ending in `rules.final_sigma`.

    Raises:
        RequestError: unknown spacing, or more steps than training timesteps.
    """
    rules = rules or SpacingRules()
    name = SPACINGS.name(name)
    if not 1 <= n <= process.steps:
        raise RequestError(f"steps is {n}; this model allows 1 to {process.steps}")
    if name in TIMESTEP_SPACINGS:
        sigmas = _at_timesteps(TIMESTEP_SPACINGS[name](n, process.steps, rules), process)
    else:
        bounds = _bounds(n, process, rules)
        sigmas = SIGMA_SPACINGS[name](n, *bounds)
    return torch.cat([sigmas, torch.tensor([rules.final_sigma], dtype=torch.float64)])


def _at_timesteps(timesteps: Tensor, process: Process) -> Tensor:
    return torch.tensor([process.sigma(t) for t in timesteps.tolist()], dtype=torch.float64)


def _bounds(n: int, process: Process, rules: SpacingRules) -> tuple[float, float]:
    """Lowest and highest sigma of the base spacing."""
    if rules.base == "linspace":
        return process.sigma_min, process.sigma_max
    ends = _at_timesteps(TIMESTEP_SPACINGS[rules.base](n, process.steps, rules), process)
    return float(ends[-1]), float(ends[0])
