"""What a spacing is: a named rule with options, of one of four kinds. The rules themselves are in `spacing.py`."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from reverie.diffusion.process import AnyProcess
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
        base: what bounds karras, exponential and other ranges: the ends of a timestep spacing, or `model`, the
            smallest and largest trained sigma. They differ for leading and trailing, and for shifted flow.
        discard_penultimate: space `n + 1` sigmas and drop the last above the final one (A1111, ComfyUI; for samplers
            that evaluate between two sigmas).
        tables: the family whose published noise levels are meant: sd1 (for sd2 too), sdxl, svd.
    """

    steps_offset: int = 0
    extra_point: bool = False
    whole_timesteps: bool = False
    final_sigma: float = 0.0
    base: str = "linspace"
    discard_penultimate: bool = False
    tables: str = "sd1"


@dataclass(frozen=True)
class Option:
    """A number that a request may set.

    Attributes:
        default: None where the model decides.
        low, high: the range that is accepted, both ends included.
        whole: only whole numbers.
    """

    default: float | None
    low: float
    high: float
    about: str
    whole: bool = False

    def checked(self, owner: str, name: str, value: object) -> float:
        """The value as a number.

        Raises:
            RequestError: not a number, not whole, out of range.
        """
        fits = type(value) is int or (type(value) is float and not self.whole)
        if fits and self.low <= cast(float, value) <= self.high:
            return cast(float, value)
        kind = "a whole number" if self.whole else "a number"
        raise RequestError(
            f"option {name} of spacing {owner} is {value!r}; expected {kind} from {self.low:g} to {self.high:g}"
        )


Levels = Callable[..., Tensor]
"""`(n, process, rules, **options) -> (m,)` float64, descending; m is n but where a spacing is not `exact`."""


@dataclass(frozen=True)
class Spacing:
    """A spacing and what one needs to know to use it.

    Attributes:
        levels: the rule.
        source: paper, or the program whose rule it is.
        label: the schedule type that AUTOMATIC1111 (or Forge) prints; None where it has none.
        options: what a request may set, by name.
        exact: whether it always takes as many steps as were asked for.
        to_minimum: ends at the range's smallest sigma, whatever `SpacingRules.final_sigma` says.
    """

    name: str
    levels: Levels
    source: str
    label: str | None = None
    options: Mapping[str, Option] = field(default_factory=dict)
    exact: bool = True
    to_minimum: bool = False

    def settings(self, given: Mapping[str, object]) -> dict[str, float | None]:
        """Every option: as given, or by default.

        Raises:
            RequestError: an option that it has not, or a value that cannot be.
        """
        for name in given:
            if name not in self.options:
                near = difflib.get_close_matches(name, self.options, n=1)
                hint = f"did you mean {near[0]}? " if near else ""
                known = f"it has {', '.join(self.options)}" if self.options else "it has none"
                raise RequestError(f"spacing {self.name} has no option {name!r}; {hint}{known}")
        return {
            name: option.checked(self.name, name, given[name]) if name in given else option.default
            for name, option in self.options.items()
        }


SPACINGS = Registry[Spacing]("spacing")

RANGE = {
    "sigma_min": Option(None, 1e-6, 1e5, "smallest sigma, instead of the model's"),
    "sigma_max": Option(None, 1e-6, 1e5, "largest sigma, instead of the model's"),
}


@dataclass(frozen=True)
class Kind:
    """What the rules of a kind are given and what they choose.

    Attributes:
        adapted: turns such a rule into `Levels`.
        options: options that all rules of the kind have.
    """

    adapted: Callable[[Callable[..., Tensor]], Levels]
    options: Mapping[str, Option] = field(default_factory=dict)


def spacing(
    name: str,
    *aliases: str,
    kind: Kind,
    source: str,
    label: str | None = None,
    exact: bool = True,
    to_minimum: bool = False,
    **options: Option,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a rule as the spacing `name`; see `Spacing` for the facts. The label is an alias too."""

    def register(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
        entry = Spacing(name, kind.adapted(rule), source, label, {**kind.options, **options}, exact, to_minimum)
        SPACINGS.add(name, entry, (*aliases, *([label] if label else [])))
        return rule

    return register


def each(sigma: Callable[[float], float], points: Tensor) -> Tensor:
    """`sigma` of every point, float64."""
    return torch.tensor([sigma(point) for point in points.tolist()], dtype=torch.float64)


def bounds(
    n: int, process: AnyProcess, rules: SpacingRules, sigma_min: float | None = None, sigma_max: float | None = None
) -> tuple[float, float]:
    """Lowest and highest sigma of a range: as given, else by `rules.base`.

    Raises:
        RequestError: the lowest is not below the highest.
    """
    if rules.base == "model":
        low, high = process.sigma_min, process.sigma_max
    elif rules.base == "linspace":
        low, high = process.sigma(process.ends[1]), process.sigma(process.ends[0])
    else:
        visited = SPACINGS[rules.base].levels(n, process, rules)
        low, high = float(visited[-1]), float(visited[0])
    low, high = low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max
    if low > high or (low == high and n > 1):
        raise RequestError(f"sigma_min is {low:g} and sigma_max {high:g}; sigma_max must be the larger")
    return low, high


def _by_place(rule: Callable[..., Tensor]) -> Levels:
    def levels(n: int, process: AnyProcess, rules: SpacingRules, **options: float) -> Tensor:
        return each(process.at, rule(n, process.steps, rules, **options))

    return levels


def _by_timestep(rule: Callable[..., Tensor]) -> Levels:
    def levels(
        n: int,
        process: AnyProcess,
        rules: SpacingRules,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
    ) -> Tensor:
        start, end = process.ends
        start = start if sigma_max is None else process.timestep(sigma_max)
        end = end if sigma_min is None else process.timestep(sigma_min)
        t = rule(n, start, end, rules)
        return each(process.sigma, t.round() if rules.whole_timesteps and process.discrete else t)

    return levels


def _by_range(rule: Callable[..., Tensor]) -> Levels:
    def levels(
        n: int,
        process: AnyProcess,
        rules: SpacingRules,
        sigma_min: float | None,
        sigma_max: float | None,
        **options: float,
    ) -> Tensor:
        return rule(n, *bounds(n, process, rules, sigma_min, sigma_max), **options)

    return levels


BY_PLACE = Kind(_by_place)
"""Rules `(n, total, rules, **options) -> places` in the table of `total` sigmas, the largest of which is last."""
BY_TIMESTEP = Kind(_by_timestep, RANGE)
"""Rules `(n, start, end, rules) -> timesteps` of the network, from that of the largest sigma to the smallest's."""
BY_RANGE = Kind(_by_range, RANGE)
"""Rules `(n, low, high, **options) -> sigmas`."""
FREELY = Kind(lambda rule: rule)
"""Rules `(n, process, rules, **options) -> sigmas`."""
