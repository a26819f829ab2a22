"""Evaluations that cost less: deep features kept from one to the next, tokens merged. Wrappers of `Predict`.

Both reach into the network through `Taps` and keep what they know in themselves: one for each run of a sampler and each
window, so that nothing is left when the picture is done. What the conditions of a batch are called (`Cond.asked`) keeps
prompt, negative prompt and what guides ask besides apart.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reverie.engine.plan import Pass
from reverie.engine.request import Request
from reverie.engine.thrift import Cache, Merging
from reverie.errors import RequestError
from reverie.nets.mmdit import MMDiT
from reverie.nets.token_merging import TokenMerging
from reverie.nets.unet import UNet
from reverie.sampling.guidance import Clock, Guidance, tapped
from reverie.sampling.tapping import Layout, grid
from reverie.types import BeyondTap, Cond, MergeTap, Predict, Taps

RISE = 1e-6  # relative; a noise level that is higher by more belongs to another stretch of the run


def saving(predict: Predict, run: Pass, request: Request, clock: Clock, guidance: Guidance) -> Predict:
    """`predict` with the switches of a resolved request; make one for each run of a sampler and each window.

    Raises:
        RequestError: guidance that looks at what is not run on every evaluation.
    """
    network = run.model.parts.unet
    if request.token_merging is not None and isinstance(network, UNet):
        predict = merging(predict, network, request.token_merging)
    if request.cache is None or not _saves(network, request.cache):
        return predict
    if guidance.record:
        raise RequestError(
            "guidance by attention maps (sag) wants the whole network at every step: leave out sag or cache"
        )
    return cached(predict, network, request.cache, run.evaluations, acting(request, clock))


def acting(request: Request, clock: Clock) -> Callable[[float], Hashable]:
    """Which adapters of a request act at a noise level, by either rule: begun and not ended, or whole steps alone."""
    limited = (*request.loras, *request.controls, *request.image_prompts)

    def at(sigma: float) -> Hashable:
        after = (clock.index(sigma) + 1) / clock.steps
        return tuple((clock.within(sigma, one.start, one.end), after <= one.end) for one in limited)

    return at


# When the whole network is run


@dataclass(frozen=True)
class Schedule:
    """Which evaluations are whole.

    Attributes:
        whole: their numbers, rising from 0.
        interval: beyond the last, one in so many.
    """

    whole: tuple[int, ...]
    interval: int

    def latest(self, number: int) -> int:
        """The whole evaluation whose features serve this one: itself, where it is whole."""
        last = self.whole[-1]
        if number > last:
            return last + (number - last) // self.interval * self.interval
        return self.whole[bisect_right(self.whole, number) - 1]


def schedule(cache: Cache, evaluations: int) -> Schedule:
    """The schedule of a resolved request's settings for a run of about so many evaluations."""
    interval = cache.interval or 1
    if cache.schedule != "quadratic" or interval == 1:
        return Schedule((0,), interval)
    return Schedule(spread(evaluations, interval, cache.centre * evaluations, cache.power), interval)


def spread(evaluations: int, interval: int, centre: float, power: float) -> tuple[int, ...]:
    """`ceil(evaluations / interval)` evaluations, denser away from `centre` (DeepCache, section 3.3).

    `l` evenly from `(-c)^(1/p)` up to, not including, `(T - c)^(1/p)`; the evaluations are `int(l^p + c)`, each once.
    Roots and powers keep the sign.
    """
    count = math.ceil(evaluations / interval)
    low, high = _signed(-centre, 1 / power), _signed(evaluations - centre, 1 / power)
    places = (_signed(low + (high - low) * k / count, power) + centre for k in range(count))
    return tuple(sorted({0, *(int(place + 1e-9) for place in places)}))


def _signed(x: float, power: float) -> float:
    return math.copysign(abs(x) ** power, x)


# What is kept


@dataclass(frozen=True, eq=False)
class Kept:
    """What was found beyond a place of the network for one condition.

    Attributes:
        number, sigma: of the evaluation.
        told: context, vector and tokens of pictures.
        acting: what acted on the network besides.
        found: features `(B, C, h, w)` of a U-Net; what a transformer's other blocks add to the tokens `(B, N, C)`.
        first: what a transformer's first block added.
    """

    number: int
    sigma: float
    told: tuple[Tensor, ...]
    acting: Hashable
    found: Tensor
    first: Tensor | None = None

    def serves(self, sigma: float, told: tuple[Tensor, ...], acting: Hashable) -> bool:
        """Whether the network would be asked the same, at this noise level or a lower one."""
        same = len(told) == len(self.told) and all(map(torch.equal, told, self.told))
        return same and acting == self.acting and sigma <= self.sigma * (1 + RISE)


@dataclass(frozen=True, eq=False)
class Question:
    """One evaluation, and what is known of its conditions.

    Attributes:
        kept: by condition of the batch, in their order; None unless all of them have something that serves.
    """

    memory: dict[Hashable, Kept]
    number: int
    names: Sequence[Hashable]
    sigma: float
    told: Sequence[tuple[Tensor, ...]]
    acting: Hashable
    kept: tuple[Kept, ...] | None

    @classmethod
    def of(cls, memory: dict[Hashable, Kept], sigma: float, cond: Cond, acting: Hashable) -> "Question | None":
        """None where nothing is to be kept."""
        asked = cond.asked
        if asked is None or None in asked.names:
            return None
        given = [t for t in (cond.context, cond.vector, *cond.images) if t is not None]
        told = list(zip(*(t.chunk(len(asked.names)) for t in given), strict=True))
        there = [memory[name] for name in asked.names if name in memory]
        usable = len(there) == len(told) and all(
            one.serves(sigma, own, acting) for one, own in zip(there, told, strict=True)
        )
        return cls(memory, asked.number, asked.names, sigma, told, acting, tuple(there) if usable else None)

    def keep(self, found: Tensor, first: Tensor | None = None) -> None:
        """Remember what was found for each condition."""
        firsts: Sequence[Tensor | None] = [None] * len(self.names) if first is None else first.chunk(len(self.names))
        for name, told, own, head in zip(self.names, self.told, found.chunk(len(self.names)), firsts, strict=True):
            self.memory[name] = Kept(self.number, self.sigma, told, self.acting, own, head)


def cached(
    predict: Predict,
    network: UNet | MMDiT,
    cache: Cache,
    evaluations: int,
    acting: Callable[[float], Hashable] = lambda sigma: None,
) -> Predict:
    """`predict` that keeps what lies deep in the network. Make one for each run, and for each window of it.

    Features serve the same condition alone, at noise levels that are no higher, and no longer than the schedule says.
    They are found anew where prompt, vector or what acts on the network is no longer the same.

    Args:
        network: what `predict` runs, or one of its shape.
        cache: of a resolved request.
        evaluations: about how many there will be.
        acting: at a noise level, what acts besides (LoRAs, control nets): anything that compares.
    """
    memory: dict[Hashable, Kept] = {}
    plan = schedule(cache, evaluations)

    def keeping(x: Tensor, sigma: float, cond: Cond) -> Tensor:
        question = Question.of(memory, sigma, cond, acting(sigma))
        if question is None:
            return predict(x, sigma, cond)
        if isinstance(network, UNet):
            place, tap = f"skips.{cache.branch or 0}", _deep(question, plan)
        else:
            place, tap = "transformer_blocks.0", _others(question, cache.threshold or 0.0)
        return predict(x, sigma, tapped(cond, Taps(beyond={place: tap})))

    return keeping if _saves(network, cache) else predict


def _saves(network: UNet | MMDiT, cache: Cache) -> bool:
    return (cache.interval or 1) > 1 if isinstance(network, UNet) else bool(cache.threshold)


def _deep(question: Question, plan: Schedule) -> BeyondTap:
    """The features of a U-Net from the latest whole evaluation (DeepCache, equations 4 and 5)."""
    latest = plan.latest(question.number)

    def tap(before: Tensor, seen: Tensor, usual: Callable[[], Tensor]) -> Tensor:
        kept = question.kept
        if kept is not None and question.number != latest and all(one.number >= latest for one in kept):
            return torch.cat([one.found for one in kept])
        found = usual()
        question.keep(found)
        return found

    return tap


def _others(question: Question, threshold: float) -> BeyondTap:
    """What the blocks behind the first add to the tokens, from when the first block last said something else.

    It said the same where the mean of `|r - r'|` is below `threshold` times that of `|r'|`, `r` being what it adds to
    the tokens of all conditions of a picture. Each picture of a batch is judged by itself.
    """

    def tap(before: Tensor, seen: Tensor, usual: Callable[[], Tensor]) -> Tensor:
        first, kept, parts = seen - before, question.kept, len(question.names)
        if kept is None:
            found = usual()
            question.keep(found - seen, first)
            return found
        heads, rests = torch.cat([_head(one) for one in kept]), torch.cat([one.found for one in kept])
        change, size = (_by_picture(t, parts) for t in (first - heads, heads))
        same = (change < threshold * size).repeat(parts)[:, None, None]
        if bool(same.all()):
            return seen + rests
        found = usual()
        rest = torch.where(same, rests, found - seen)
        question.keep(rest, torch.where(same, heads, first))
        return torch.where(same, seen + rests, found)

    return tap


def _head(kept: Kept) -> Tensor:
    assert kept.first is not None
    return kept.first


def _by_picture(tokens: Tensor, parts: int) -> Tensor:
    """Mean size of tokens `(parts * B, N, C)` over all conditions of a picture: `(B,)`."""
    return tokens.float().abs().mean((1, 2)).view(parts, -1).mean(0)


# Tokens


def merging(predict: Predict, network: UNet, settings: Merging) -> Predict:
    """`predict` whose self-attention sees fewer tokens on the levels with the largest maps."""
    paths = merged_blocks(network, settings.levels)

    def with_fewer(x: Tensor, sigma: float, cond: Cond) -> Tensor:
        number = cond.asked.number if cond.asked else 0
        tap = _merged(settings, x.shape[-2], x.shape[-1], number if settings.random else None)
        return predict(x, sigma, tapped(cond, Taps(merging=dict.fromkeys(paths, tap))))

    return with_fewer if settings.ratio else predict


def merged_blocks(network: UNet, levels: int) -> tuple[str, ...]:
    """The paths of the transformer blocks on so many levels that have attention."""
    count = len(network.config.block_out_channels)
    attended = [level for level in range(count) if any(network.config.down_depths(level))]
    starts = tuple(f"{side}_blocks.{level if side == 'down' else count - 1 - level}."
                   for level in attended[:levels] for side in ("down", "up"))  # fmt: skip
    return tuple(path for path in Layout.of(network).blocks if path.startswith(starts))


def _merged(settings: Merging, height: int, width: int, seed: int | None) -> MergeTap:
    """For latents of `height x width`; with a seed, targets are chosen by it, the same in every block and row."""

    def tap(tokens: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        rows, columns = grid(tokens.shape[1], height, width)
        random = None if seed is None else torch.Generator().manual_seed(seed)
        found = TokenMerging(tokens, rows, columns, settings.ratio, settings.stride, random)
        return found.merge, found.unmerge

    return tap
