"""The table of samplers. A sampler is one function in one file, found because it is registered here."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from reverie.registry import Registry

SamplerFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class Sampler:
    """A sampler and what one needs to know to use it.

    Attributes:
        function: `(denoise, x, sigmas, *, noise, process, **options) -> x`.
        order: order of convergence on the probability-flow ODE; 0 for stochastic samplers.
        evaluations: how often `denoise` is called for n steps (the most, where a sampler chooses its own steps).
        source: paper and equation.
        options: keyword options that a request may set.
        label: the name that AUTOMATIC1111 prints; None where it has no such sampler.
        spacing: the spacing that AUTOMATIC1111 takes for it by itself ("automatic").
        diffusers: the class of diffusers that does the same, with its settings in brackets where they decide.
        brownian: `noise` is called as `noise(sigma, sigma_next)`.
        unconditional: takes the option `unconditional`, a `Denoise` that answers for the negative prompt alone at the
            point where `denoise` was last asked (the CFG++ forms).
        discards: presets (`a1111`, `comfy`) that leave out the last sigma above zero for it.
        flow: it holds for rectified flow too.
        adaptive: it chooses its own steps between the ends of `sigmas`, for the batch as a whole: so that a picture
            does not depend on its neighbours it is to be drawn alone.
        whole_timesteps, extra_point: how diffusers' class spaces its steps (see `SpacingRules`).
        unit_start: that class starts from `sqrt(1 + sigma²) noise` for every spacing, not from `sigma noise`.
        fixed_stride: that class lands at `t - T // n`, wherever the next step begins.
    """

    name: str
    function: SamplerFunction
    order: int
    source: str
    diffusers: str | None = None
    evaluations: Callable[[int], int] = lambda n: n
    options: tuple[str, ...] = ()
    label: str | None = None
    spacing: str | None = None
    brownian: bool = False
    unconditional: bool = False
    discards: tuple[str, ...] = ()
    flow: bool = False
    adaptive: bool = False
    whole_timesteps: bool = False
    extra_point: bool = False
    unit_start: bool = False
    fixed_stride: bool = False

    @property
    def stochastic(self) -> bool:
        """Whether noise is added on the way."""
        return self.order == 0


SAMPLERS = Registry[Sampler]("sampler")


def sampler(
    name: str, *aliases: str, order: int, source: str, **facts: Any
) -> Callable[[SamplerFunction], SamplerFunction]:
    """Register a function as the sampler `name`; see `Sampler` for the facts. Label and class are aliases too."""

    def register(function: SamplerFunction) -> SamplerFunction:
        entry = Sampler(name, function, order, source, **facts)
        names = (*aliases, *(n for n in (entry.label, entry.diffusers) if n))
        SAMPLERS.add(name, entry, names)
        return function

    return register


def load_all() -> Registry[Sampler]:
    """The full table: imports every file of `sampling/samplers`."""
    for file in sorted((Path(__file__).parent / "samplers").glob("[a-z]*.py")):
        import_module(f"reverie.sampling.samplers.{file.stem}")
    return SAMPLERS
