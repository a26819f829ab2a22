"""What every family hands over: sizes, parts, and the network as `predict`."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reverie.errors import RequestError
from reverie.families.base import Sizes, preconditioned
from reverie.text.embed import Encoding, Tokens
from reverie.types import Cond
from tests.families.models import file_of, folder_of, loaded


def test_sizes_of_the_negative_prompt() -> None:
    """As for the prompt where nothing else is said; the score is its own."""
    sizes = Sizes(64, 48, original=(100, 90), crop=(3, 5), target=(80, 70), aesthetic_score=7.0)
    same = sizes.negative()
    assert (same.original, same.crop, same.target, same.aesthetic_score) == ((100, 90), (3, 5), (80, 70), 2.5)
    other = replace(sizes, negative_original=(1, 2), negative_crop=(0, 0), negative_target=(3, 4)).negative()
    assert (other.original, other.crop, other.target) == ((1, 2), (0, 0), (3, 4))
    assert Sizes(64, 48).negative() == Sizes(64, 48, aesthetic_score=2.5)


def test_the_first_text_encoder_and_its_tokenizer(root: Path) -> None:
    parts = loaded(file_of(root, "sdxl"))
    assert parts.text_encoder is parts.towers[0].module
    assert parts.tokenizer is parts.towers[0].tokenizer
    assert list(parts.modules()) == ["text_encoder", "text_encoder_2", "unet", "vae"]
    refiner = loaded(file_of(root, "refiner"))
    assert list(refiner.modules()) == ["text_encoder_2", "unet", "vae"]
    assert refiner.text_encoder is refiner.towers[0].module
    assert list(loaded(file_of(root, "sd3")).modules()) == [
        "text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae",
    ]  # fmt: skip


def test_what_an_absent_negative_prompt_is(root: Path) -> None:
    """`force_zeros_for_empty_prompt` of the published folders, and the same for their single files."""
    for kind, zero in (("sdxl", True), ("refiner", False), ("sd1", False), ("sd3", False)):
        for path in (folder_of(root, kind), file_of(root, kind)):
            assert loaded(path).zero_empty == zero


def test_a_network_that_is_told_the_guidance_scale(root: Path) -> None:
    """The condition's vector and taps, and the guidance scale, reach the network where they are there."""
    parts = loaded(folder_of(root, "lcm"))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond = Cond(torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1)))
    answers = []
    for guidance in (1.0, 8.0):
        predict = preconditioned(parts.unet, parts.process, parts.parameterisation, torch.float32, guidance=guidance)
        answers.append(predict(x, 3.0, cond))
    assert (answers[0] - answers[1]).abs().max() > 1e-4
    untold = preconditioned(parts.unet, parts.process, parts.parameterisation, torch.float32)
    with pytest.raises(RequestError, match="told the guidance scale, and was told none"):
        untold(x, 3.0, cond)


@pytest.mark.parametrize(("kind", "width"), [("sdxl", 72), ("unclip", 24), ("x4-upscaler", 1)])
def test_a_vector_that_is_missing_or_of_another_width(root: Path, kind: str, width: int) -> None:
    parts = loaded(file_of(root, kind))
    channels, context = parts.unet.config.in_channels, parts.unet.config.context_width
    x, timesteps, cond = torch.zeros(1, channels, 8, 8), torch.zeros(1), torch.zeros(1, 7, context)
    for vector in (None, torch.zeros(1, width + 1), torch.zeros(2, width)):
        with pytest.raises(RequestError, match=f"a vector of {width} numbers for each picture, and was given"):
            parts.unet(x, timesteps, cond, vector=vector)
    assert parts.unet(x, timesteps, cond, vector=torch.zeros(1, width)).shape == (1, 4, 8, 8)


def test_t5_takes_no_vectors_and_no_mask(root: Path) -> None:
    tower = loaded(file_of(root, "sd3")).towers[2]
    ids = torch.tensor([tower.tokenizer("a red apple").ids])
    assert tower.encode(tower.module, Tokens(ids), 0).hidden.shape == (1, 256, 112)
    for tokens in (Tokens(ids, ((0, 1, torch.zeros(1, 112)),)), Tokens(ids, mask=torch.ones(1, 256, dtype=torch.bool))):
        with pytest.raises(RequestError, match="neither textual inversions nor masked words"):
            tower.encode(tower.module, tokens, 0)


@pytest.mark.parametrize(("kind", "most"), [("sd1", 3), ("sdxl", 2)])
def test_more_layers_left_out_than_there_are(root: Path, kind: str, most: int) -> None:
    tower = loaded(file_of(root, kind)).towers[0]
    tokens = Tokens(torch.tensor([tower.tokenizer("a red apple").ids]))
    tower.encode(tower.module, tokens, most)
    with pytest.raises(RequestError, match="the text encoder has 3"):
        tower.encode(tower.module, tokens, most + 1)


def test_contexts_of_different_lengths_are_refused(root: Path) -> None:
    parts = loaded(file_of(root, "sdxl"))
    encodings = [Encoding(torch.zeros(1, 77, 32)), Encoding(torch.zeros(1, 154, 64), torch.zeros(1, 24))]
    with pytest.raises(RequestError, match="77 and 154 tokens"):
        parts.condition(encodings, Sizes(64, 64))
