"""Textual inversions against diffusers: what text encoders say of prompts with learned words.

Tolerance 1e-5 of the largest number, as in test_nets.
"""

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from reverie.adapters.embedding import Embedding, open_embedding, vectors_for
from reverie.families.base import Parts
from reverie.text.embed import Embedder
from reverie.text.prompt import parse
from tests.adapters.loras import parts_of

RELATIVE = 1e-5
PROMPTS = [
    "a photo of <cat-toy> on a table", "<cat-toy>", "a <cat-toy> and a <cat-toy> in the style of <neg> art",
    "no word of them at all", "blurry <neg> bad anatomy",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def random(count: int, width: int, seed: int) -> Tensor:
    return 0.3 * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def pipeline(root: Path, kind: str, name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module("diffusers"), name).from_pretrained(root / kind)


@torch.no_grad()
def ours(parts: Parts, tower: int, embeddings: list[Embedding], text: str, skip: int = 0) -> Tensor:
    chosen = parts.towers[tower]
    vectors = vectors_for(chosen.name, embeddings, "diffusers")
    embedder = Embedder(chosen.tokenizer, lambda tokens: chosen.encode(chosen.module, tokens, skip), vectors=vectors)
    return embedder(parse(text, dialect="diffusers", steps=1).parts[0].at(1)).hidden


def agree(found: Tensor, want: Tensor) -> None:
    assert found.shape == want.shape
    assert (found - want).abs().max() < RELATIVE * want.abs().max()


def test_one_text_encoder(root: Path, tmp_path: Path) -> None:
    """Several vectors a word, several words, in the prompt and in the negative prompt; A1111's and diffusers' files."""
    parts = parts_of(root, "sd1")
    save_file({"<cat-toy>": random(3, 32, 1)}, tmp_path / "cat.safetensors")
    torch.save({"string_to_param": {"*": random(2, 32, 2)}, "name": "<neg>"}, tmp_path / "neg.pt")
    pipe = pipeline(root, "sd1", "StableDiffusionPipeline")
    pipe.load_textual_inversion(str(tmp_path / "cat.safetensors"))
    pipe.load_textual_inversion(str(tmp_path / "neg.pt"), token="<neg>")
    cat, neg = (open_embedding(tmp_path / name, parts) for name in ("cat.safetensors", "neg.pt"))
    both = [cat, Embedding("<neg>", neg.vectors, neg.path, neg.digest)]
    for prompt in PROMPTS:
        with torch.no_grad():
            want, negative = pipe.encode_prompt(prompt, "cpu", 1, True, negative_prompt=PROMPTS[-1])
        agree(ours(parts, 0, both, prompt), want)
        agree(ours(parts, 0, both, PROMPTS[-1]), negative)
    plain = ours(parts, 0, [], PROMPTS[0])
    assert (plain - ours(parts, 0, both, PROMPTS[0])).abs().max() > 0.01


def test_two_text_encoders(root: Path, tmp_path: Path) -> None:
    """SDXL: a pair, each half loaded into its own text encoder, as diffusers' documentation has it."""
    parts = parts_of(root, "sdxl")
    pair = {"clip_l": random(2, 32, 3), "clip_g": random(2, 64, 4)}
    save_file(pair, tmp_path / "<cat-toy>.safetensors")
    pipe = pipeline(root, "sdxl", "StableDiffusionXLPipeline")
    for key, encoder, tokenizer in (
        ("clip_l", pipe.text_encoder, pipe.tokenizer), ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2),
    ):  # fmt: skip
        pipe.load_textual_inversion(pair[key], token="<cat-toy>", text_encoder=encoder, tokenizer=tokenizer)
    embedding = open_embedding(tmp_path / "<cat-toy>.safetensors", parts)
    for prompt in PROMPTS[:2]:
        with torch.no_grad():
            want = pipe.encode_prompt(prompt, device="cpu")[0]
        found = torch.cat([ours(parts, tower, [embedding], prompt) for tower in (0, 1)], dim=-1)
        agree(found, want)
