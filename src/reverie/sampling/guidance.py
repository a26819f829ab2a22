"""Guidance: what a network says about one point under several conditions becomes one `denoise`.

    Answers    what the network says about one x at one sigma: asked when needed, once each, in few batches
    Guide      Answers -> x0. A guide wraps another: it changes the answers on the way in, or x0 on the way out
    Guidance   a guide and what it needs of every evaluation
    Guided     the `denoise` of one run

The guides themselves are in `sampling/guides`, one a file.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from reverie.diffusion.parameterisation import Parameterisation
from reverie.errors import RequestError
from reverie.sampling.curves import numbers, scheduled
from reverie.sampling.tapping import recording
from reverie.types import Asked, Cond, Predict, Taps

CLOSE = 1e-6  # relative; sigmas that differ less are one: float32's rounding is 6e-8, neighbours differ by 1e-3

CONTEXTS = 16  # joined contexts that a run keeps; prompts that change at every step make new ones

Parts = tuple[tuple[float, Cond], ...]
Role = Literal["positive", "negative", "empty", "image_negative"]


@dataclass(frozen=True)
class Clock:
    """Which step of a run a noise level belongs to; levels between two steps belong to the earlier one.

    Attributes:
        sigmas: the levels of the plan in falling order, the last is where it ends: one more than there are steps.
    """

    sigmas: tuple[float, ...]

    @classmethod
    def of(cls, sigmas: Tensor) -> "Clock":
        """The clock of a sampler's `sigmas (steps + 1,)`."""
        return cls(tuple(sigmas.tolist()))

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.sigmas) - 1

    def index(self, sigma: float) -> int:
        """The step, from 0."""
        return max(sum(level >= sigma * (1 - CLOSE) for level in self.sigmas[:-1]) - 1, 0)

    def progress(self, sigma: float) -> float:
        """Share of the steps that came before this one, in [0, 1)."""
        return self.index(sigma) / self.steps

    def following(self, sigma: float) -> float:
        """The level at which this step ends."""
        return self.sigmas[self.index(sigma) + 1]

    def within(self, sigma: float, start: float, end: float) -> bool:
        """Whether this step is among those from `start` up to `end`, fractions of all steps."""
        return during(self.progress(sigma), start, end)


def during(progress: float, start: float, end: float) -> bool:
    """Whether a step is among those from `start` up to `end`, fractions of all steps.

    Args:
        progress: share of the steps that came before it.
    """
    return start - CLOSE <= progress < end - CLOSE


@dataclass(frozen=True)
class Weight:
    """The guidance scale over a run.

    Attributes:
        scale: `x0 = negative + scale * (positive - negative)`; 1 is no guidance.
        curve: how it changes over the steps, see `sampling/curves.py`; numbers stand for the scales themselves.
        floor: the scale where a curve is 0.
        start, end: fractions of the steps between which there is guidance.
        sigma_low, sigma_high: noise levels between which there is guidance (Kynkäänniemi et al. 2024).

    Raises:
        RequestError: an unknown curve, or an interval that ends before it begins.
    """

    scale: float = 7.5
    curve: str = "constant"
    floor: float = 1.0
    start: float = 0.0
    end: float = 1.0
    sigma_low: float = 0.0
    sigma_high: float = math.inf

    def __post_init__(self) -> None:
        numbers(self.curve)
        for kind, low, high in (("", self.start, self.end), ("sigma ", self.sigma_low, self.sigma_high)):
            if low > high:
                raise RequestError(f"the {kind}interval of guidance starts at {low:g} and ends before, at {high:g}")

    def active(self, clock: Clock, sigma: float) -> bool:
        """Whether there is guidance at all."""
        return clock.within(sigma, self.start, self.end) and self.sigma_low < sigma <= self.sigma_high

    def at(self, clock: Clock, sigma: float) -> float:
        """The guidance scale, 1 outside the interval."""
        if not self.active(clock, sigma):
            return 1.0
        return scheduled(self.curve, self.scale, clock.index(sigma), clock.steps, floor=self.floor)


@dataclass(frozen=True, eq=False)
class Conditions:
    """What the network is conditioned on at one step.

    Attributes:
        positive: the prompt, or the parts that `AND` joins, each with its weight.
        negative: the negative prompt or prompts with their weights.
        empty: the empty prompt; needed by several negative prompts, by weights, and by `perp_neg`.
        image_negative: for instruct-pix2pix: the negative prompt, with zeros for the picture's channels.
    """

    positive: Parts
    negative: Parts
    empty: Cond | None = None
    image_negative: Cond | None = None

    def parts(self, role: Role) -> Parts:
        """The conditions behind one answer.

        Raises:
            RequestError: there are none.
        """
        if role in {"positive", "negative"}:
            return self.positive if role == "positive" else self.negative
        cond = self.empty if role == "empty" else self.image_negative
        if cond is None:
            what = "the empty prompt" if role == "empty" else "a model that is shown a picture"
            raise RequestError(f"this guidance needs {what}, which there is not here")
        return ((1.0, cond),)

    def each(self) -> Iterator[tuple[tuple[Hashable, ...], Cond]]:
        """Every condition, and what it is: role and place among those of its role."""
        for role, parts in (("positive", self.positive), ("negative", self.negative)):
            for i, (_, cond) in enumerate(parts):
                yield (role, i), cond
        for role, one in (("empty", self.empty), ("image_negative", self.image_negative)):
            if one is not None:
                yield (role,), one


BASES: dict[Role, Role] = {"positive": "negative", "negative": "empty"}
"""From which answer the weighted parts of another are measured."""


OPTIONAL = ("vector", "channels", "control")


def cat(conds: Sequence[Cond], context: Tensor | None = None) -> Cond:
    """Conditions as one batch: every field joined on the batch axis. They fit together, as `alike` says.

    Args:
        context: their contexts, where they are joined already.
    """
    first = conds[0]
    if len(conds) == 1:
        return first
    context = torch.cat([cond.context for cond in conds]) if context is None else context
    vector, channels, control = (_joined([getattr(cond, name) for cond in conds]) for name in OPTIONAL)
    images = tuple(torch.cat(tokens) for tokens in zip(*(cond.images for cond in conds), strict=True))
    return Cond(context, vector, channels, first.taps, images, control)


def _joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [t for t in tensors if t is not None]
    return torch.cat(present) if present else None


def alike(a: Cond, b: Cond) -> bool:
    """Whether two conditions can go through the network as one batch."""
    return a.taps is b.taps and _shapes(a) == _shapes(b)


def _shapes(cond: Cond) -> list[torch.Size | None]:
    tensors = (cond.context, *cond.images, *(getattr(cond, name) for name in OPTIONAL))
    return [None if t is None else t.shape for t in tensors]


def tapped(cond: Cond, taps: Taps) -> Cond:
    """The same condition with `taps` added to its own."""
    return replace(cond, taps=cond.taps.with_(taps) if cond.taps else taps)


@dataclass(frozen=True, eq=False)
class Guidance:
    """A guide and what it needs of every evaluation of the network. Stateless: many runs can share one.

    Attributes:
        guide: turns answers into x0; classifier-free guidance alone if none is given.
        weight: the guidance scale over the run.
        taps: what every evaluation is tapped by.
        record: paths of attention layers whose maps are kept.
        needs: which answers beside positive and negative `guide` asks for, and `Conditions` must have.
    """

    guide: "Guide" = field(default_factory=lambda: classifier_free)
    weight: Weight = field(default_factory=Weight)
    taps: Taps = field(default_factory=Taps)
    record: frozenset[str] = frozenset()
    needs: frozenset[Role] = frozenset()


@dataclass(frozen=True, eq=False)
class _Run:
    """What stays the same over one run, and its memory."""

    predict: Predict
    guidance: Guidance
    clock: Clock
    parameterisation: Parameterisation
    memory: dict[Hashable, Tensor] = field(default_factory=dict)
    contexts: dict[tuple[int, ...], tuple[list[Tensor], Tensor]] = field(default_factory=dict)

    def joined(self, conds: Sequence[Cond]) -> Cond:
        """`cat`; the same contexts give the same tensor every time, by which the network knows them again."""
        if len(conds) == 1:
            return conds[0]
        parts = [cond.context for cond in conds]
        key = tuple(map(id, parts))
        if key not in self.contexts:
            if len(self.contexts) == CONTEXTS:
                del self.contexts[next(iter(self.contexts))]
            self.contexts[key] = parts, torch.cat(parts)  # the parts are kept, or another could get the same id
        return cat(conds, self.contexts[key][1])


class Answers:
    """What the network says about one `x` at one sigma.

    Nothing is evaluated before it is asked for, and nothing twice. Conditions that share taps and shapes go through
    the network as one batch with those that are `want`ed already.

    Attributes:
        x: `(B, C, h, w)`, in units of sigma.
        sigma, following: the noise level, and the one at which this step ends.
        index, steps, progress: the step, from 0; of how many; and the share of them that came before.
        conds: the conditions of this step.
        scale: the guidance scale here; 1 where there is no guidance.
        active: whether this point is inside the interval of guidance.
        memory: what guides keep from step to step, one for each run.
    """

    def __init__(
        self, run: _Run, x: Tensor, sigma: float, conds: Conditions, number: int, place: tuple[Hashable, ...] = ()
    ) -> None:
        clock, weight = run.clock, run.guidance.weight
        self.x, self.sigma, self.conds = x, sigma, conds
        self.index, self.steps, self.progress = clock.index(sigma), clock.steps, clock.progress(sigma)
        self.following = clock.following(sigma)
        self.scale, self.active = weight.at(clock, sigma), weight.active(clock, sigma)
        self.memory = run.memory
        self._run, self._number, self._place = run, number, place
        self._elsewhere = itertools.count()
        self._given: dict[Role, Tensor] = {}
        self._mixed: dict[Role, Tensor] = {}
        self._known: dict[Cond, Tensor] = {}
        self._wanted: dict[Cond, None] = {}
        self._maps: dict[Cond, dict[str, Tensor]] = {}
        self._names: dict[Cond, Hashable] = {}
        for role, cond in conds.each():
            self._names.setdefault(cond, (*place, *role))

    @property
    def positive(self) -> Tensor:
        """x0 of the prompt; of several parts, `negative + sum of w_i (x0_i - negative)` (Liu et al. 2022)."""
        return self.of("positive")

    @property
    def negative(self) -> Tensor:
        """x0 of the negative prompt; of several, `empty + sum of w_i (x0_i - empty)`."""
        return self.of("negative")

    @property
    def empty(self) -> Tensor:
        """x0 of the empty prompt."""
        return self.of("empty")

    @property
    def image_negative(self) -> Tensor:
        """x0 without prompt and without picture (instruct-pix2pix)."""
        return self.of("image_negative")

    def of(self, role: Role) -> Tensor:
        """The answer of that name `(B, C, h, w)`, as changed by the guides outside this one."""
        return self._given[role] if role in self._given else self._plain(role)

    def _plain(self, role: Role) -> Tensor:
        if role not in self._mixed:
            self.want(role)
            parts = self.conds.parts(role)
            if _single(parts):
                self._mixed[role] = self.ask(parts[0][1])
            else:
                base = self._plain(BASES[role])
                terms = (weight * (self.ask(cond) - base) for weight, cond in parts)
                self._mixed[role] = base + sum(terms, torch.zeros_like(base))
        return self._mixed[role]

    @property
    def plain(self) -> "Answers":
        """These answers as the network gave them, without what guides made of them."""
        return self._view({})

    def replaced(self, *, positive: Tensor, negative: Tensor | None = None) -> "Answers":
        """These answers with others in the place of some, for the guide inside."""
        new: dict[Role, Tensor] = {"positive": positive}
        if negative is not None:
            new["negative"] = negative
        return self._view({**self._given, **new})

    def _view(self, given: dict[Role, Tensor]) -> "Answers":
        view = copy(self)  # what is known is shared
        view._given = given
        return view

    def within(self, start: float, end: float) -> bool:
        """Whether this step is among those from `start` up to `end`, fractions of all steps."""
        return self._run.clock.within(self.sigma, start, end)

    def at(self, x: Tensor) -> "Answers":
        """What the network says about another `x` at the same sigma."""
        place = (*self._place, next(self._elsewhere))
        return Answers(self._run, x, self.sigma, self.conds, self._number, place)

    def want(self, *roles: Role) -> None:
        """Announce answers that will be asked for, so that they go through the network together, in this order."""
        for role in roles:
            if role in self._given:
                continue
            parts = self.conds.parts(role)
            if not _single(parts):
                self.want(BASES[role])
            self._wanted |= dict.fromkeys(cond for _, cond in parts)

    def ask(self, cond: Cond, x: Tensor | None = None) -> Tensor:
        """x0 under any condition, here or at another `x`."""
        if x is not None:
            return self.at(x).ask(cond)
        if cond not in self._known:
            waiting = [c for c in self._wanted | {cond: None} if c not in self._known]
            self._evaluate([c for c in waiting if alike(c, cond)])
        return self._known[cond]

    def perturbed(self, taps: Taps, who: Hashable) -> Tensor:
        """`positive - x0 under the same conditions with taps`: where the network goes without what is tapped.

        Args:
            who: asks; at every step the same.
        """
        parts = self.conds.parts("positive")
        if _single(parts):
            return self._plain("positive") - self.ask(self._tapped(parts[0][1], taps, who))
        terms = [weight * (self.ask(cond) - self.ask(self._tapped(cond, taps, who))) for weight, cond in parts]
        return sum(terms, torch.zeros_like(self.x))

    def _tapped(self, cond: Cond, taps: Taps, who: Hashable) -> Cond:
        found = tapped(cond, taps)
        self._names[found] = (self._names[cond], who)
        return found

    def attention(self, role: Role, path: str) -> Tensor:
        """What a recorded layer looked at, `(B, N, M)`: mean over its heads, and over the parts of the condition.

        Raises:
            RequestError: the network did not say.
        """
        self._plain(role)
        maps = [self._maps[cond].get(path) for _, cond in self.conds.parts(role)]
        present = [each for each in maps if each is not None]
        if len(present) < len(maps):
            raise RequestError(f"this network does not show the attention of {path}")
        return torch.stack(present).mean(0)

    def output(self, x0: Tensor, parameterisation: Parameterisation | None = None) -> Tensor:
        """x0 as the network says it (noise, v...), or as another parameterisation would."""
        k = (parameterisation or self._run.parameterisation).at(self.sigma)
        return (x0 - k.skip * self.x) / k.out

    def from_output(self, output: Tensor, parameterisation: Parameterisation | None = None) -> Tensor:
        """The inverse of `output`."""
        k = (parameterisation or self._run.parameterisation).at(self.sigma)
        return k.skip * self.x + k.out * output

    def _evaluate(self, conds: list[Cond]) -> None:
        """Ask the network about `conds`, which are alike, as one batch."""
        guidance, together = self._run.guidance, self._run.joined(conds)
        maps: dict[str, Tensor] = {}
        taps = recording(guidance.record, maps).with_(guidance.taps).with_(together.taps or Taps())
        tapping = bool(taps.attention or taps.bypass or taps.skips or taps.added or taps.features)
        x = torch.cat([self.x] * len(conds)) if len(conds) > 1 else self.x
        asked = Asked(self._number, tuple(self._names.get(cond) for cond in conds))
        answers = self._run.predict(x, self.sigma, replace(together, taps=taps if tapping else None, asked=asked))
        for i, (cond, answer) in enumerate(zip(conds, answers.chunk(len(conds)), strict=True)):
            self._known[cond] = answer
            self._maps[cond] = {path: found.chunk(len(conds))[i] for path, found in maps.items()}


Guide = Callable[[Answers], Tensor]


def _single(parts: Parts) -> bool:
    """One part of weight 1: the answer is the network's own."""
    return len(parts) == 1 and parts[0][0] == 1


def classifier_free(answers: Answers) -> Tensor:
    """`x0 = negative + scale * (positive - negative)` (Ho & Salimans 2022, equation 6).

    Both go through the network as one batch. Scale 1 is the positive alone.
    """
    if answers.scale == 1:
        return answers.positive
    answers.want("negative", "positive")
    return answers.negative + answers.scale * (answers.positive - answers.negative)


class Guided:
    """The `denoise` of one run. It has the run's memory: make one for each batch of pictures."""

    def __init__(self, run: _Run, conditions: Callable[[int], Conditions]) -> None:
        self._run = run
        self._conditions = conditions
        self._count = itertools.count()
        self._last: Answers | None = None

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """`x (B, C, h, w)` in units of sigma -> the guided x0."""
        self._last = self._answers(x, sigma)
        return self._run.guidance.guide(self._last)

    def unconditional(self, x: Tensor, sigma: float) -> Tensor:
        """The negative answer where `self` was last asked, evaluated now if guidance did without it (CFG++).

        `x` and `sigma` say where, if that was at another sigma or nowhere.
        """
        if self._last is None or self._last.sigma != sigma:
            self._last = self._answers(x, sigma)
        return self._last.negative

    def _answers(self, x: Tensor, sigma: float) -> Answers:
        return Answers(self._run, x, sigma, self._conditions(self._run.clock.index(sigma)), next(self._count))


def guided(
    predict: Predict,
    conditions: Callable[[int], Conditions],
    guidance: Guidance,
    clock: Clock,
    parameterisation: Parameterisation,
) -> Guided:
    """A prediction, its conditions and guidance as the `denoise` of one run.

    Args:
        conditions: of each step, by its index from 0: prompts may change on the way.
        guidance: what `reverie.sampling.guides.build` makes.
        parameterisation: what the network predicts: some guides work on its output rather than on x0.
    """
    return Guided(_Run(predict, guidance, clock, parameterisation), conditions)
