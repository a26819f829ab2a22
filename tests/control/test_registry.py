"""What holds for every preprocessor, and how options and sizes are checked."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reverie
from reverie.control.pixels import detection_size, hint, resized
from reverie.control.registry import Job, Option, load_all
from reverie.control.weights import WEIGHTS
from reverie.errors import RequestError
from tests.control.pictures import scene

TABLE = load_all()
LEARNED = [name for name in TABLE if TABLE[name].learned]
PLAIN = [name for name in TABLE if not TABLE[name].learned]
MASK = np.zeros((72, 96), dtype=np.uint8)
MASK[20:40, 30:60] = 255


SMALL = {"openpose": {"height": 128}}  # options that keep networks quick


def job_for(name: str, size: tuple[int, int] = (72, 96)) -> Job:
    return Job(mask=resized(MASK, size, sharp=True) if name == "inpaint" else None)


@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize("name", list(TABLE))
def test_a_picture_of_the_same_size_twice_the_same(name: str) -> None:
    picture = scene()
    before = picture.copy()
    options = SMALL.get(name)
    first = TABLE[name].run(picture, options, job=job_for(name))
    assert first.dtype == np.uint8
    assert first.shape == (72, 96, 4 if name == "inpaint" else 3)
    assert np.array_equal(first, TABLE[name].run(picture, options, job=job_for(name)))
    assert np.array_equal(picture, before)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 3)], ids=str)
def test_the_smallest_pictures(name: str, size: tuple[int, int]) -> None:
    picture = np.full((*size, 3), 90, dtype=np.uint8)
    assert TABLE[name].run(picture, job=job_for(name, size)).shape[:2] == size


@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize("name", LEARNED)
def test_networks_take_a_single_pixel(name: str) -> None:
    assert TABLE[name].run(np.full((1, 1, 3), 90, dtype=np.uint8), SMALL.get(name)).shape == (1, 1, 3)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("resolution", [64, 256])
def test_at_another_resolution_the_result_has_the_pictures_size(name: str, resolution: int) -> None:
    found = TABLE[name].run(scene(50, 70), job=job_for(name, (50, 70)), resolution=resolution)
    assert found.shape[:2] == (50, 70)
    if name in {"canny", "scribble", "scribble_xdog"}:
        assert set(np.unique(found)) <= {0, 255}, "resizing must not mix black and white into grey"


@pytest.mark.parametrize(
    ("size", "resolution", "most", "expected"),
    [
        ((480, 640), None, None, (480, 640)),
        ((480, 640), 512, None, (512, 704)),  # 682.67 is nearest to 704
        ((1, 1), 64, None, (64, 64)),
        ((3000, 4000), None, 2048, (1536, 2048)),
        ((1, 10_000), None, 2048, (1, 2048)),
    ],
)
def test_detection_sizes(
    size: tuple[int, int], resolution: int | None, most: int | None, expected: tuple[int, int]
) -> None:
    assert detection_size(size, resolution, most) == expected


@pytest.mark.parametrize("resolution", [0, 63, 8193, -512])
def test_impossible_resolutions(resolution: int) -> None:
    with pytest.raises(RequestError, match="expected 64 to 8192"):
        TABLE["canny"].run(scene(), resolution=resolution)


def test_a_stripe_is_not_blown_up() -> None:
    with pytest.raises(RequestError, match="at most"):
        TABLE["canny"].run(np.zeros((1, 4000, 3), dtype=np.uint8), resolution=512)


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((8, 8), dtype=np.uint8),
        np.zeros((8, 8, 4), dtype=np.uint8),
        np.zeros((8, 8, 3), dtype=np.uint16),
        np.zeros((8, 8, 3), dtype=np.float32),
        np.zeros((0, 8, 3), dtype=np.uint8),
        np.zeros((8, 0, 3), dtype=np.uint8),
        np.broadcast_to(np.zeros(3, dtype=np.uint8), (20_000, 20_000, 3)),
    ],
    ids=["gray", "rgba", "16-bit", "float", "no-rows", "no-columns", "huge"],
)
@pytest.mark.parametrize("name", ["canny", "softedge", "none"])
def test_what_is_no_picture(name: str, picture: Any) -> None:
    with pytest.raises(RequestError, match=r"the picture is|this picture is"):
        TABLE[name].run(picture)


def test_names_of_other_programs() -> None:
    expected = {
        "CannyDetector": "canny", "softedge_hed": "softedge", "HEDdetector": "softedge", "scribble_xdog":
        "scribble_xdog", "lineart_standard": "lineart", "openpose": "openpose", "OpenposeDetector": "openpose",
        "mlsd": "mlsd", "MLSDdetector": "mlsd", "depth_midas": "depth", "normal_bae": "normal", "tile_resample": "tile",
        "t2ia_color_grid": "colour", "shuffle": "shuffle", "ContentShuffleDetector": "shuffle",
        "inpaint_only": "inpaint", "seg_ofade20k": "segmentation", "reference_only": "none",
    }  # fmt: skip
    assert {alias: TABLE.name(alias) for alias in expected} == expected
    with pytest.raises(RequestError, match="did you mean 'canny'"):
        TABLE["cany"]


@pytest.mark.parametrize("name", list(TABLE))
def test_options_are_described_and_their_defaults_in_range(name: str) -> None:
    entry = TABLE[name]
    assert entry.summary
    assert entry.source
    assert (entry.function.__doc__ or "").strip()
    assert entry.learned is None or entry.learned in WEIGHTS
    for option in entry.options:
        assert option.help
        assert option.parse(option.default) == option.default
        assert option.parse(str(option.default)) == option.default
    assert entry.settings({}) == {option.name: option.default for option in entry.options}


@pytest.mark.parametrize(
    ("option", "text", "expected"),
    [
        (Option("n", 5, "", 1, 9), "7", 7),
        (Option("n", 5, "", 1, 9), 7.0, 7),
        (Option("n", 0.5, "", 0, 1), "0.25", 0.25),
        (Option("n", False, ""), "Yes", True),
        (Option("n", True, ""), False, False),
        (Option("n", "a", "", choices=("a", "b")), "b", "b"),
    ],
)
def test_values_that_options_take(option: Option, text: object, expected: object) -> None:
    found = option.parse(text)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("option", "text"),
    [
        (Option("n", 5, "", 1, 9), "10"),
        (Option("n", 5, "", 1, 9), "5.5"),
        (Option("n", 5, "", 1, 9), "nan"),
        (Option("n", 5, ""), "inf"),
        (Option("n", 5, "", 1, 9), "five"),
        (Option("n", 0.5, "", 0, 1), "nan"),
        (Option("n", False, ""), "2"),
        (Option("n", "a", "", choices=("a", "b")), "c"),
    ],
)
def test_values_that_they_do_not(option: Option, text: str) -> None:
    with pytest.raises(RequestError, match=f"option n is '{text}'; expected "):
        option.parse(text)


def test_an_option_that_is_not_there() -> None:
    with pytest.raises(RequestError, match="canny has no option 'sigma'; its options: low, high"):
        TABLE["canny"].run(scene(), {"sigma": 1})


def test_listing_imports_neither_torch_nor_opencv() -> None:
    code = "import sys, reverie.control.registry as r; r.load_all(); print({'torch', 'cv2'} & {*sys.modules})"
    source = str(Path(reverie.__file__).parent.parent)
    ran = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": source}, capture_output=True,
                         text=True, check=True)  # fmt: skip
    assert ran.stdout.strip() == "set()"


def test_without_opencv_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(RequestError, match="pip install opencv-python-headless"):
        TABLE["canny"].run(scene())


def test_the_hint_is_the_picture_in_zero_to_one() -> None:
    picture = scene()
    found = hint(picture)
    assert found.shape == (1, 3, 72, 96)
    assert torch.equal((found[0] * 255).round().byte(), torch.from_numpy(picture).permute(2, 0, 1))


def test_the_hint_of_inpainting_is_minus_one_in_the_hole() -> None:
    picture = scene()
    found = hint(TABLE["inpaint"].run(picture, job=Job(mask=MASK)))
    hole = torch.from_numpy(MASK > 127)
    assert (found[:, :, hole] == -1).all()
    assert torch.equal(found[:, :, ~hole], hint(picture)[:, :, ~hole])
