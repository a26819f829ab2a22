"""Prompts against transformers and diffusers: the same contexts where these have words for the prompt."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reverie.nets.clip_text import ClipText, ClipTextConfig
from reverie.text.embed import Embedder, Encoding, Tokens
from reverie.text.prompt import DIALECTS, parse
from reverie.text.tokenizer import ClipTokenizer
from tests import tiny

TOLERANCE = 2e-5  # float32 through three layers, in another order of operations
PROMPTS = [
    "a photo of an astronaut riding a horse on mars, 8k",
    "a (red:1.4) cat++ (in the rain)0.5, [old], dog-",
    "a very long prompt, " * 30 + "(the end:0.7) (fin)0.7",
    '("a cat (grey)0.3", "a dog").blend(0.7, 0.3)',
]


@cache
def encoders() -> tuple[Any, ClipText]:
    """transformers' text encoder, and ours with its weights."""
    torch.manual_seed(0)
    theirs = tiny.text_encoder().requires_grad_(False)
    ours = ClipText(ClipTextConfig(width=64, inner_width=96, layers=3, heads=1)).requires_grad_(False)
    tensors = {"text_model." + name.removeprefix("text_model."): t for name, t in theirs.state_dict().items()}
    ours.load_state_dict({name: t for name, t in tensors.items() if "position_ids" not in name})
    return theirs, ours


def theirs(tokens: Tokens) -> Encoding:
    mask = None if tokens.mask is None else tokens.mask.long()
    return Encoding(encoders()[0](tokens.ids, attention_mask=mask).last_hidden_state)


def ours(tokens: Tokens) -> Encoding:
    return Encoding(encoders()[1](tokens.ids, vectors=tokens.vectors, mask=tokens.mask))


def context(text: str, dialect: str, encode: Any) -> Tensor:
    chosen = DIALECTS[dialect]
    embedder = Embedder(ClipTokenizer.published(), encode, chosen.weighting, chosen.split)
    return embedder(parse(text, dialect=dialect, steps=1).parts[0].stages[0][1]).hidden


@pytest.mark.parametrize("dialect", list(DIALECTS))
@pytest.mark.parametrize("text", PROMPTS)
def test_with_either_encoder_a_prompt_has_one_context(text: str, dialect: str) -> None:
    torch.testing.assert_close(
        context(text, dialect, ours), context(text, dialect, theirs), rtol=TOLERANCE, atol=TOLERANCE
    )


@pytest.mark.parametrize("text", ["", "a cat", PROMPTS[0], "Dalí's hot-dog, 7 cafés!"])
def test_plain_prompts_are_encoded_as_by_diffusers(text: str, tmp_path: Path) -> None:
    scheduler = tiny.scheduler_of({"_class_name": "EulerDiscreteScheduler", **tiny.SCHEDULER})
    pipe = tiny.assembled(tmp_path, scheduler, (encoders()[0], tiny.unet(), tiny.vae()))
    expected, _ = pipe.encode_prompt(text, "cpu", 1, False)
    for dialect in DIALECTS:
        torch.testing.assert_close(context(text, dialect, ours), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_textual_inversion_is_that_of_diffusers(tmp_path: Path) -> None:
    # diffusers adds a token for each vector and reads `<toy> <toy>_1 <toy>_2`.
    torch.manual_seed(0)
    encoder = tiny.text_encoder().requires_grad_(False)
    scheduler = tiny.scheduler_of({"_class_name": "EulerDiscreteScheduler", **tiny.SCHEDULER})
    pipe = tiny.assembled(tmp_path, scheduler, (encoder, tiny.unet(), tiny.vae()))
    vectors = torch.randn(3, 64)
    pipe.load_textual_inversion({"<toy>": vectors}, token="<toy>")
    text = "a photo of <toy> in the rain"
    expected, _ = pipe.encode_prompt(text, "cpu", 1, False)
    embedder = Embedder(ClipTokenizer.published(), ours, vectors={"<toy>": vectors})
    found = embedder(parse(text, steps=1).parts[0].stages[0][1]).hidden
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
