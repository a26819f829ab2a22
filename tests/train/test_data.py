"""The data: batches that are a function of the step, and refusals that say what is wrong."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reverie.errors import ConfigError
from reverie.train.config import DataConfig
from reverie.train.data import PictureSet, generator, indices
from tests.train import toy


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5), st.integers(0, 9))
def test_an_epoch_is_a_permutation(total: int, batch: int, epoch: int, seed: int) -> None:
    """Batches laid end to end are permutations laid end to end: no row is left out between epochs."""
    first, last = epoch * total // batch, (epoch + 1) * total // batch
    rows = [row for step in range(first, last + 1) for row in indices(total, batch, step, seed)]
    start = epoch * total - first * batch
    assert sorted(rows[start : start + total]) == list(range(total))


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 1000), st.integers(0, 9))
def test_a_batch_depends_on_its_step_alone(total: int, batch: int, step: int, seed: int) -> None:
    once = indices(total, batch, step, seed)
    indices(total, batch, step + 1, seed + 1)
    torch.rand(3)
    assert indices(total, batch, step, seed) == once


def test_epochs_and_seeds_have_other_orders() -> None:
    orders = {tuple(indices(50, 50, epoch, seed)) for epoch in range(4) for seed in range(4)}
    assert len(orders) == 16


def test_generator_depends_on_every_number() -> None:
    keys = list(itertools.product(range(4), range(2), range(4)))  # seed, purpose, step: as the trainer calls it
    draws = {float(torch.rand((), generator=generator(*key), dtype=torch.float64)) for key in keys}
    assert len(draws) == len(keys)
    assert torch.equal(torch.rand(3, generator=generator(5, 6)), torch.rand(3, generator=generator(5, 6)))


def test_pixels_and_captions(tmp_path: Path) -> None:
    data = PictureSet(DataConfig(folder=toy.data(tmp_path)))
    pixels = data.pixels([0, 7])
    assert pixels.shape == (2, 3, 16, 16)
    assert pixels.dtype == torch.float32
    assert float(pixels.max()) == 1  # white is 255
    assert float(pixels[0, 0, 8, 8]) == pytest.approx(220 / 127.5 - 1)  # the red of the red square
    assert {data.caption(0, generator(0, i)) for i in range(20)} == {"a red square", "square, red"}


def test_only_keeps_matching_rows(tmp_path: Path) -> None:
    data = PictureSet(DataConfig(folder=toy.data(tmp_path), only={"shape": ["disc"]}))
    assert len(data) == 4
    assert all("disc" in caption for captions in data.captions for caption in captions)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*captions.jsonl: No such file.*; build the data set first"):
        PictureSet(DataConfig(folder=tmp_path / "nowhere"))


def test_nothing_matches(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no picture in .* matches only"):
        PictureSet(DataConfig(folder=toy.data(tmp_path), only={"shape": ["star"]}))


def test_counts_differ(tmp_path: Path) -> None:
    toy.data(tmp_path)
    np.save(tmp_path / "pictures.npy", np.zeros((3, 8, 8, 3), np.uint8))
    with pytest.raises(ConfigError, match="3 pictures but 8 lines of captions"):
        PictureSet(DataConfig(folder=tmp_path))


@pytest.mark.parametrize("line", ["{", "[]", json.dumps({"captions": []}), json.dumps({"caption": "x"})])
def test_broken_captions(tmp_path: Path, line: str) -> None:
    toy.data(tmp_path)
    (tmp_path / "captions.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match=r"captions\.jsonl") as caught:
        PictureSet(DataConfig(folder=tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("array", [np.zeros((8, 8, 8, 3), np.float32), np.zeros((8, 8, 8), np.uint8)])
def test_wrong_pictures(tmp_path: Path, array: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> None:
    toy.data(tmp_path)
    np.save(tmp_path / "pictures.npy", array)
    with pytest.raises(ConfigError, match=r"expected uint8 \(N, H, W, 3\)"):
        PictureSet(DataConfig(folder=tmp_path))


def test_pickled_pictures_are_not_executed(tmp_path: Path) -> None:
    toy.data(tmp_path)
    np.save(tmp_path / "pictures.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError, match="allow_pickle=False"):
        PictureSet(DataConfig(folder=tmp_path))
