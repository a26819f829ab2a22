"""From the words of pictures to what the network is told at every step."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from reverie.adapters.attach import Attachment
from reverie.engine.equipment import Equipment
from reverie.engine.plan import Pass
from reverie.engine.request import Request
from reverie.families.base import Sizes, Tower
from reverie.sampling.guidance import Conditions, Parts, cat
from reverie.text.embed import Embedder, Encoding, Tokens
from reverie.text.networks import show_network
from reverie.text.pieces import Network, Prompt, Stage
from reverie.text.prompt import DIALECTS, parse
from reverie.text.wildcards import resolve
from reverie.types import Cond

if TYPE_CHECKING:
    from reverie.engine.bundle import Model

DYNAMIC = {"a1111", "comfy"}  # dialects of programs that resolve {a|b} and __name__


@dataclass(frozen=True)
class Words:
    """What one picture is told, with its wildcards decided."""

    prompt: str
    negative: str


def words_of(request: Request, seed: int, *, second: bool = False) -> Words:
    """The words of the picture with this seed, in the first pass or in the second of a hires fix.

    Raises:
        RequestError: an unknown wildcard.
    """
    texts = [request.prompt, request.negative_prompt]
    if second and request.hires:
        own = (request.hires.prompt, request.hires.negative_prompt)
        texts = [text if instead is None else instead for text, instead in zip(texts, own, strict=True)]
    dynamic = request.dynamic_prompts
    if dynamic is None:
        dynamic = DIALECTS.name(request.dialect) in DYNAMIC
    if dynamic:
        texts = [resolve(text, seed=seed, folder=request.wildcards) for text in texts]
    return Words(*texts)


def networks_of(request: Request, text: str) -> tuple[Network, ...]:
    """The LoRAs that a prompt names, in the dialects that name them."""
    prompt = parse(text, dialect=request.dialect, steps=1, emphasis=request.emphasis != "none")
    return prompt.networks


class Script:
    """What one picture is told in one pass, step by step.

    Args:
        words: of the picture.
        first_steps: of the first pass, which a prompt's schedule counts where this is the second.
    """

    def __init__(self, encoder: "Encoder", words: Words, run: Pass, first_steps: int) -> None:
        self._encoder = encoder
        self._second = run.second
        self._sizes = encoder.sizes(run)
        self._silent = not words.negative
        self._prompts = tuple(
            encoder.read(
                text,
                first_steps if run.second else run.whole_steps,
                run.whole_steps if run.second else None,
                negative=bool(i),
            )
            for i, text in enumerate((words.prompt, words.negative))
        )

    @property
    def weights(self) -> tuple[tuple[float, ...], ...]:
        """Of the parts of the prompt and of the negative prompt: pictures of one batch must agree."""
        return tuple(tuple(part.weight for part in prompt.parts) for prompt in self._prompts)

    def at(self, index: int) -> tuple[Parts, Parts]:
        """The weighted conditions of a step, of the prompt and of the negative prompt; batches of one."""
        positive, negative = (
            tuple((part.weight, part.at(index + 1, second=self._second)) for part in prompt.parts)
            for prompt in self._prompts
        )
        told = tuple((weight, self._encoder(stage, self._sizes)) for weight, stage in positive)
        other = self._sizes.negative()
        if self._silent:
            return told, ((1.0, self._encoder(None, other)),)
        return told, tuple((weight, self._encoder(stage, other)) for weight, stage in negative)

    def empty(self) -> Cond:
        """The condition of no prompt at all."""
        return self._encoder(None, self._sizes.negative())


class Encoder:
    """Prompts -> conditions, each text once.

    Args:
        equipment: the adapters of the request.
        attachments: those that act on the text encoders.
    """

    def __init__(
        self, model: "Model", request: Request, equipment: Equipment, attachments: Sequence[Attachment] = ()
    ) -> None:
        self._model, self._request, self._equipment, self._attachments = model, request, equipment, attachments
        dialect = DIALECTS[request.dialect]
        own = dialect.weighting == "original" and request.emphasis != "none"  # the modes are AUTOMATIC1111's
        self._skip = request.clip_skip - 1
        self._embedders = [
            Embedder(
                tower.tokenizer,
                partial(self._encode, tower),
                request.emphasis if own else dialect.weighting,
                dialect.split,
                request.comma_backtrack,
                equipment.vectors(tower.name, attachments),
            )
            for tower in model.parts.towers
        ]
        self._known: dict[Stage, list[Encoding]] = {}
        self._told: dict[tuple[Stage | None, Sizes], Cond] = {}
        self._warned: set[str] = set()

    def sizes(self, run: Pass) -> Sizes:
        """What the network is told of the sizes of pictures, as far as it is."""
        told = self._request.sizes
        given = {} if told is None else told.model_dump(exclude_none=True)
        return Sizes(run.width, run.height, **{name.removesuffix("_size"): size for name, size in given.items()})

    def read(self, text: str, steps: int, second: int | None, *, negative: bool) -> Prompt:
        """Parse a prompt; what may not have been meant is a warning, once.

        LoRAs that it names are attached elsewhere; see `networks_of`.
        """
        prompt = parse(
            text, dialect=self._request.dialect, steps=max(steps, 1), second_pass=second and max(second, 1),
            emphasis=self._request.emphasis != "none", negative=negative,
        )  # fmt: skip
        misplaced = {f"{show_network(network)} stands in the negative prompt and is left out; put it into the prompt"
                     for network in prompt.networks if negative}  # fmt: skip
        for warning in (misplaced | set(prompt.warnings)) - self._warned:
            warnings.warn(warning, stacklevel=2)
            self._warned.add(warning)
        return prompt

    def __call__(self, stage: Stage | None, sizes: Sizes) -> Cond:
        """A batch of one. None is a prompt that is not there, which some models were trained to see as zeros."""
        if (stage, sizes) not in self._told:
            encodings = self._encodings(stage or Stage())
            if stage is None and self._model.parts.zero_empty:
                encodings = [_zeros(encoding) for encoding in encodings]
            self._told[stage, sizes] = self._model.parts.condition(encodings, sizes)
        return self._told[stage, sizes]

    @torch.no_grad()
    def _encodings(self, stage: Stage) -> list[Encoding]:
        """What every text encoder says."""
        if stage not in self._known:
            self._known[stage] = [embedder(stage) for embedder in self._embedders]
        return self._known[stage]

    def _encode(self, tower: Tower, tokens: Tokens) -> Encoding:
        """One text encoder, with as many layers left out as the request says."""
        model = self._model
        module = self._equipment.form(tower.name, model.ready(tower.name, tower.module), self._attachments)
        mask = None if tokens.mask is None else tokens.mask.to(model.device)
        return tower.encode(module, replace(tokens, ids=tokens.ids.to(model.device), mask=mask), self._skip)


def _zeros(encoding: Encoding) -> Encoding:
    pooled = None if encoding.pooled is None else torch.zeros_like(encoding.pooled)
    return Encoding(torch.zeros_like(encoding.hidden), pooled)


def script_conditions(each: Sequence[tuple[Parts, Parts]]) -> Conditions:
    """The conditions of a batch: those of its pictures, joined.

    Args:
        each: what `Script.at` a step says of every picture.
    """
    positive, negative = (
        tuple(
            (parts[0][0], joined([cond for _, cond in parts]))
            for parts in zip(*(picture[side] for picture in each), strict=True)
        )
        for side in (0, 1)
    )
    return Conditions(positive, negative)


def joined(conds: Sequence[Cond]) -> Cond:
    """Conditions of several pictures as one. Shorter ones are repeated: attention to a repeated context is the same."""
    longest = math.lcm(*(cond.context.shape[1] for cond in conds))
    return cat([replace(c, context=c.context.repeat(1, longest // c.context.shape[1], 1)) for c in conds])


def between(start: Cond, end: Cond, share: float) -> Cond:
    """On the way from one condition to another: contexts and vectors mixed linearly, 0 is `start`."""
    a, b = joined([start, end]).context.chunk(2)
    return replace(
        start,
        context=torch.lerp(a, b, share),
        vector=None if start.vector is None or end.vector is None else torch.lerp(start.vector, end.vector, share),
    )
