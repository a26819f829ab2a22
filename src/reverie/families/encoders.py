"""What families take of their text encoders: rules for `Tower.encode` and `Parts.join` that more than one has."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from reverie.errors import RequestError
from reverie.families.base import EncodeRule, Sizes
from reverie.nets.clip_text import ClipText
from reverie.nets.t5 import T5Encoder
from reverie.text.embed import Encoding, Tokens
from reverie.types import Cond

MakeRule: TypeAlias = Callable[[int], EncodeRule]
"""`end-of-text id -> rule`."""


def last_layer(eos: int) -> EncodeRule:
    """The last layer that is not left out, after the final norm; nothing pooled (Stable Diffusion 1 and 2)."""
    del eos

    def encode(module: nn.Module, tokens: Tokens, skip: int) -> Encoding:
        clip = _clip(module, skip)
        ids, mask = _placed(clip, tokens)
        return Encoding(clip(ids, skip, vectors=tokens.vectors, mask=mask))

    return encode


def penultimate_layer(eos: int) -> EncodeRule:
    """The layer before the last that is not left out, without the final norm, and the pooled output of the last.

    Source: Podell et al. 2023, section 2.1; Stability's sgm `FrozenOpenCLIPEmbedder2`, `layer="penultimate"`.
    """

    def encode(module: nn.Module, tokens: Tokens, skip: int) -> Encoding:
        clip = _clip(module, skip + 1)
        ids, mask = _placed(clip, tokens)
        return Encoding(*clip.encode(ids, skip + 1, eos=eos, vectors=tokens.vectors, mask=mask, final_norm=False))

    return encode


def t5_states(eos: int) -> EncodeRule:
    """T5's last states; it has no layers to leave out, and padding is read as the model was trained."""
    del eos

    def encode(module: nn.Module, tokens: Tokens, skip: int) -> Encoding:
        del skip
        assert isinstance(module, T5Encoder)
        if tokens.vectors or tokens.mask is not None:
            raise RequestError("T5 takes neither textual inversions nor masked words; use emphasis original")
        return Encoding(module(tokens.ids.to(module.shared.weight.device)))

    return encode


def context_alone(encodings: Sequence[Encoding], sizes: Sizes) -> Cond:
    """What the one text encoder said; sizes are not told (Stable Diffusion 1 and 2)."""
    del sizes
    return Cond(encodings[0].hidden)


def on_channels(encodings: Sequence[Encoding]) -> Tensor:
    """The contexts of several text encoders side by side: `(B, L, D1 + D2)`.

    Raises:
        RequestError: they have different lengths.
    """
    lengths = [encoding.hidden.shape[1] for encoding in encodings]
    if len(set(lengths)) > 1:
        raise RequestError(
            f"the prompt takes {' and '.join(map(str, lengths))} tokens in the text encoders; expected as many in each"
        )
    return torch.cat([encoding.hidden for encoding in encodings], dim=-1)


def _clip(module: nn.Module, skip: int) -> ClipText:
    assert isinstance(module, ClipText)
    if not 0 <= skip <= module.config.layers:
        raise RequestError(f"clip_skip leaves out {skip} layers; the text encoder has {module.config.layers}")
    return module


def _placed(clip: ClipText, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
    device = clip.text_model.embeddings.position_embedding.weight.device
    return tokens.ids.to(device), None if tokens.mask is None else tokens.mask.to(device)
