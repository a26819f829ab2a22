"""Pictures as files."""

import base64
import hashlib
import io
import json
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features

from reverie.engine.hashes import hash_paths
from reverie.engine.image import Picture, picture_format, save_image, to_images
from reverie.engine.metadata.read import read_metadata
from reverie.engine.request import Hires, Request
from reverie.errors import OutputError, RequestError
from tests.engine.metadata.samples import sd_parsers_of

MODEL = {"name": "tiny", "source": "bundled", "family": "sd1", "hash": "ab" * 32}
BASE = Request(
    prompt="ein Apfel 🍎", steps=2, sampler="ddim", spacing="leading", guidance_scale=3.0, width=16, height=8
)
CARRYING = ["png", "jpg", "jpeg", "webp", *(["avif"] if features.check("avif") else []), "gif"]


def drawn(**changes: Any) -> Image.Image:
    """One picture of noise."""
    pixels = torch.rand(1, 8, 16, 3, generator=torch.Generator().manual_seed(0))
    return to_images(pixels, [BASE.model_copy(update=changes)], MODEL)[0]


def test_rounding() -> None:
    levels = torch.tensor([-1.0, 0.0, 0.499 / 255, 0.501 / 255, 0.5, 1.0, 2.0])
    image = to_images(levels.reshape(1, 1, 7, 1).expand(-1, -1, -1, 3), [BASE], MODEL)[0]
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 0, 1, 128, 255, 255]


def test_each_picture_has_its_own_request(tmp_path: Path) -> None:
    requests = [BASE.model_copy(update={"seed": seed, "prompt": f"cat {seed}"}) for seed in (7, 9)]
    images = to_images(torch.zeros(2, 8, 16, 3), requests, MODEL)
    for image, request in zip(images, requests, strict=True):
        save_image(image, tmp_path / "a.png")
        assert read_metadata(tmp_path / "a.png").request == request
    with pytest.raises(ValueError, match="shorter"):
        to_images(torch.zeros(2, 8, 16, 3), requests[:1], MODEL)


@pytest.mark.parametrize("ending", CARRYING)
def test_every_format_carries_the_request(ending: str, tmp_path: Path) -> None:
    image = drawn(seed=7, hires=Hires(scale=1.5), rng="cpu")
    save_image(image, tmp_path / f"a.{ending}")
    found = read_metadata(tmp_path / f"a.{ending}")
    assert found.own
    assert found.request == BASE.model_copy(update={"seed": 7, "hires": Hires(scale=1.5), "rng": "cpu"})
    if ending != "gif":  # which has a place for the parameters alone
        assert found.model == MODEL
        assert found.text == image.info["reverie"]


@pytest.mark.parametrize("ending", CARRYING)
def test_without_metadata(ending: str, tmp_path: Path) -> None:
    save_image(drawn(seed=7), tmp_path / f"a.{ending}", metadata=False)
    with Image.open(tmp_path / f"a.{ending}") as image:
        assert "Apfel" not in str(image.info)
        assert not dict(image.getexif())
    with pytest.raises(RequestError, match="does not carry a request"):
        read_metadata(tmp_path / f"a.{ending}")


@pytest.mark.parametrize("ending", ["bmp", "tiff", "ppm"])
def test_formats_that_carry_nothing_are_written(ending: str, tmp_path: Path) -> None:
    save_image(drawn(seed=7), tmp_path / f"a.{ending}")
    with Image.open(tmp_path / f"a.{ending}") as image:
        assert np.array_equal(np.asarray(image), np.asarray(drawn()))


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_other_programs_read_our_parameters(ending: str, tmp_path: Path) -> None:
    save_image(drawn(seed=7, negative_prompt="rain"), tmp_path / f"a.{ending}")
    theirs = sd_parsers_of(tmp_path / f"a.{ending}").samplers[0]
    assert [prompt.value for prompt in theirs.prompts + theirs.negative_prompts] == [BASE.prompt, "rain"]
    assert (theirs.name, theirs.parameters["seed"], theirs.model.hash) == ("DDIM", "7", MODEL["hash"][:10])


def test_the_same_picture_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_image(drawn(seed=7), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("place", ["path", "text", "file", "buffer"])
def test_saved_by_hand_it_carries_its_request_too(place: str, tmp_path: Path) -> None:
    path, buffer = tmp_path / "a.jpg", io.BytesIO()
    if place == "file":
        with path.open("wb") as file:
            drawn(seed=7).save(file)
    elif place == "buffer":
        drawn(seed=7).save(buffer, "jpeg")
    else:
        drawn(seed=7).save(path if place == "path" else str(path), quality=90)
    assert read_metadata(buffer if place == "buffer" else path).request.seed == 7


def test_what_the_caller_writes_down_wins(tmp_path: Path) -> None:
    drawn().save(tmp_path / "a.png", pnginfo=None)
    drawn().save(tmp_path / "a.jpg", exif=b"")
    for name in ("a.png", "a.jpg"):
        with pytest.raises(RequestError):
            read_metadata(tmp_path / name)


def test_copies_and_pickles_carry_it_and_changed_pictures_do_not(tmp_path: Path) -> None:
    for image in (drawn(seed=7).copy(), pickle.loads(pickle.dumps(drawn(seed=7)))):
        assert isinstance(image, Picture)
        image.save(tmp_path / "a.png")
        assert read_metadata(tmp_path / "a.png").request.seed == 7
    drawn(seed=7).convert("L").save(tmp_path / "b.png")
    with pytest.raises(RequestError):
        read_metadata(tmp_path / "b.png")


def test_pictures_that_it_began_with(tmp_path: Path) -> None:
    data = b"\x89PNG and more" * 1000
    (tmp_path / "mask.png").write_bytes(b"mask")
    image = drawn(image="data:image/png;base64," + base64.b64encode(data).decode(), mask=str(tmp_path / "mask.png"))
    record = json.loads(image.info["reverie"])
    digest, mask = hashlib.sha256(data).hexdigest(), hashlib.sha256(b"mask").hexdigest()
    assert record["pictures"] == {"image": digest, "mask": mask}
    assert record["request"]["image"] == f"sha256:{digest}"
    assert record["request"]["mask"] == str(tmp_path / "mask.png")
    assert f"Init image hash: {digest[:10]}, " in image.info["parameters"]
    gone = json.loads(drawn(image=str(tmp_path / "gone.png")).info["reverie"])
    assert "pictures" not in gone


def test_hashes_are_those_of_the_files_as_they_are_now(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"one")
    other.write_bytes(b"other")
    first, second = hashlib.sha256(b"one"), hashlib.sha256(b"other")
    assert hash_paths([one]) == first.hexdigest()
    assert hash_paths([one, other]) == hashlib.sha256(first.digest() + second.digest()).hexdigest()
    one.write_bytes(b"another")
    assert hash_paths([one]) == hashlib.sha256(b"another").hexdigest()


def test_endings(tmp_path: Path) -> None:
    assert picture_format(Path("a.JPG")) == "JPEG"
    for name in ("a", "a.xyz", "a.fli"):
        with pytest.raises(RequestError, match="no picture ending that can be written"):
            save_image(drawn(), tmp_path / name)
    with pytest.raises(OutputError, match="cannot write"):
        save_image(drawn(), tmp_path / "no" / "folder" / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_describing_a_picture_is_quick() -> None:
    drawn()
    started = time.process_time()
    for _ in range(10):
        drawn(seed=7)
    assert (time.process_time() - started) / 10 < 0.1  # a picture takes seconds to draw
