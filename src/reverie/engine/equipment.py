"""The adapters of a request, found and opened for a model: forms of its networks, and words of its prompts."""

import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from reverie.adapters.attach import Attachment, acting, formed
from reverie.adapters.embedding import Embedding, open_embedding, vectors_for
from reverie.adapters.hints import hint_for
from reverie.adapters.lora import Adapter, open_adapter
from reverie.checkpoint.source import open_weights
from reverie.engine.extras import Lora
from reverie.engine.library import Library
from reverie.engine.request import Request
from reverie.errors import RequestError
from reverie.sampling.guidance import Clock
from reverie.text.pieces import Network
from reverie.text.prompt import parse
from reverie.text.wildcards import resolve
from reverie.types import Cond, Predict

if TYPE_CHECKING:
    from torch import Tensor

    from reverie.engine.bundle import Model

M = TypeVar("M", bound=nn.Module)
BLOCKS = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}


class Equipment:
    """What a request adds to one model.

    Args:
        evaluations: about how often the denoising network will be asked.

    Raises:
        RequestError: no such file, or several of one name.
        CheckpointError: a file that is broken, or made for another model.
    """

    def __init__(self, model: "Model", request: Request, evaluations: int | None = None) -> None:
        self._model, self._request, self._evaluations = model, request, evaluations
        self._named: dict[tuple[Network, ...], tuple[Attachment, ...]] = {}
        self.loras = tuple(self._attachment(lora) for lora in request.loras)

    def attachments(self, networks: Sequence[Network] = ()) -> tuple[Attachment, ...]:
        """The LoRAs of the request and those that a prompt names; the same objects for the same names.

        Raises:
            RequestError: a hypernetwork, which is not opened.
        """
        wanted = tuple(networks)
        if wanted not in self._named:
            self._named[wanted] = (*self.loras, *(self._by_prompt(network) for network in wanted))
        return self._named[wanted]

    def form(self, part: str, network: M, attachments: Sequence[Attachment]) -> M:
        """The form of a network with LoRAs in it. The model keeps the last one of each part."""
        if not attachments:
            return network
        key = (network, tuple(map(_made_of, sorted(attachments, key=Attachment.order))), self._evaluations)
        forms = self._model.forms
        if part not in forms or forms[part][0] != key:
            forms.pop(part, None)  # the memory of the last one first
            own = self._evaluations if part == self._model.parts.network else None
            forms[part] = (key, formed(network, part, attachments, evaluations=own))
        form = forms[part][1]
        assert isinstance(form, type(network))
        return form

    def predicting(
        self, network: nn.Module, attachments: Sequence[Attachment], clock: Clock, make: Callable[[nn.Module], Predict]
    ) -> Predict:
        """`make` of the network's form; where LoRAs act on some of the steps only, of the form of each step."""
        part = self._model.parts.network
        if all(attachment.start == 0 and attachment.end == 1 for attachment in attachments):
            return make(self.form(part, network, attachments))
        known: dict[tuple[Attachment, ...], Predict] = {}

        def predict(x: "Tensor", sigma: float, cond: Cond) -> "Tensor":
            now = acting(attachments, clock.progress(sigma))
            if now not in known:
                known[now] = make(formed(network, part, now, "branch"))
            return known[now](x, sigma, cond)

        return predict

    def vectors(self, tower: str, attachments: Sequence[Attachment]) -> "dict[str, Tensor]":
        """The textual inversions that one text encoder knows, by their words.

        Raises:
            RequestError: two of one word.
        """
        inside = (embedding for attachment in attachments for embedding in attachment.adapter.embeddings)
        return vectors_for(tower, (*self.embeddings, *inside), self._request.dialect)

    def used(self, attachments: Sequence[Attachment]) -> dict[str, str]:
        """SHA-256 of what is used, by kind and name; of LoRAs their short hash and what of them found its place."""
        found: dict[str, str] = {}
        for adapter in (attachment.adapter for attachment in attachments):
            found |= {
                f"lora: {adapter.name}": adapter.digest,
                f"lora short: {adapter.name}": adapter.short,
                f"lora coverage: {adapter.name}": adapter.coverage.line(),
            }
        return found | {f"embedding: {embedding.name}": embedding.digest for embedding in self.embeddings}

    @cached_property
    def embeddings(self) -> tuple[Embedding, ...]:
        """Those of the request, and those of the library whose names stand in a prompt."""
        named = tuple(self._embedding(written) for written in self._request.embeddings)
        taken = {embedding.path.resolve() for embedding in named}
        text = " ".join(_texts(self._request)).lower()
        paths = (path for path in self.library.adapters("embedding", self._model.source) if path.stem.lower() in text)
        found = [path for path in paths if path.resolve() not in taken and _stands_in(path.stem, text)]
        return (*named, *(self._model.opened.get("embedding", path, self._open_embedding) for path in found))

    # Finding and opening

    @cached_property
    def library(self) -> Library:
        """Where files are looked for by name."""
        return Library.of_environment()

    def _find(self, name: str, kind: str) -> Path:
        return self.library.adapter(name, kind, self._model.source)

    def _adapter(self, name: str) -> Adapter:
        adapter = self._model.opened.get("LoRA", self._find(name, "LoRA"), self._open_adapter)
        if not adapter.coverage.whole:
            warnings.warn(f"{adapter.name}: {adapter.coverage.line()}", stacklevel=2)
        return adapter

    def _open_adapter(self, path: Path) -> Adapter:
        return open_adapter(path, self._model.parts)

    def _open_embedding(self, path: Path) -> Embedding:
        return open_embedding(path, self._model.parts)

    def _attachment(self, lora: Lora) -> Attachment:
        return attached(self._adapter(lora.path), lora)

    def _by_prompt(self, network: Network) -> Attachment:
        if network.kind != "lora":
            raise RequestError(f"the prompt asks for the {network.kind} {network.name!r}; only LoRAs are opened")
        adapter = self._adapter(network.name)
        if network.rank is not None:
            adapter = adapter.cut(network.rank)
        return Attachment(adapter, network.unet, network.text)

    def _embedding(self, written: str) -> Embedding:
        word, equals, name = written.partition("=")
        path = self._find(name if equals else written, "embedding")
        embedding = self._model.opened.get("embedding", path, self._open_embedding)
        return replace(embedding, name=word, token="") if equals else embedding


def attached(adapter: Adapter, lora: Lora) -> Attachment:
    """An adapter that acts as a request says."""
    text = lora.strength if lora.text_strength is None else lora.text_strength
    blocks = {_block(name): _factor(name, value) for name, value in lora.blocks.items()}
    return Attachment(adapter, lora.strength, text, blocks, lora.start, lora.end, lora.way)


def hinted(model: "Model", request: Request) -> Request:
    """The request with what distilled LoRAs (LCM, Turbo, Lightning...) want to be drawn with, where it does not say.

    Raises:
        RequestError: no such file, or several of one name.
    """
    prompt = parse(request.prompt, dialect=request.dialect, steps=1)
    names = [*(lora.path for lora in request.loras), *(n.name for n in prompt.networks if n.kind == "lora")]
    if not names:
        return request
    library = Library.of_environment()
    for name in names:
        path = library.adapter(name, "LoRA", model.source)
        hint = hint_for(path, open_weights(path).metadata)
        if hint is not None:
            wanted = {"sampler": hint.sampler, "spacing": hint.spacing, "steps": hint.steps,
                      "guidance_scale": hint.guidance_scale}  # fmt: skip
            left_open = {field: value for field, value in wanted.items() if getattr(request, field) is None}
            if "sampler" in left_open and not request.sampler_options:
                left_open["sampler_options"] = dict(hint.options)
            return request.model_copy(update=left_open)
    return request


def _made_of(attachment: Attachment) -> tuple[object, ...]:
    """What a form with it depends on: its file as it was opened, at that rank; how strongly; merged or beside."""
    return (attachment.adapter, attachment.way, *attachment.order())


def _block(name: str) -> str:
    """`down.1` -> `down_blocks.1`; other names are the network's own, or those of LoRA Block Weight."""
    first, dot, rest = name.partition(".")
    return f"{BLOCKS.get(first, first)}{dot}{rest}"


def _factor(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"the factor of block {name} is {value!r}; expected a number")
    return float(value)


def _texts(request: Request) -> Iterable[str]:
    """Every prompt of a request, and what they may be once wildcards are decided."""
    groups = (request, request.hires, request.travel)
    texts = [text for group in groups if group for text in (group.prompt, group.negative_prompt) if text]
    yield from texts
    if request.dynamic_prompts is False:
        return
    for text, place in itertools.product(texts, range(request.count)):
        with suppress(RequestError):  # a dialect without wildcards
            yield resolve(text, seed=(request.seed or 0) + place, folder=request.wildcards)


def _stands_in(word: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word.lower())}(?!\w)", text) is not None
