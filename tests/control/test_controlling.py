"""What `reverie control` does with files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reverie.apps.controlling import parsed, run_control, run_list
from reverie.control.registry import Job, load_all
from reverie.errors import OutputError, RequestError
from tests.control.pictures import scene

HOW: dict[str, Any] = {"resolution": None, "mask": None, "weights": None, "device": "cpu"}


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "scene.png"
    Image.fromarray(scene()).save(path)
    return str(path)


def read(path: Path) -> Any:
    return np.asarray(Image.open(path))


def test_the_file_holds_what_the_preprocessor_gives(
    picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "edges.png"
    run_control("CannyDetector", picture, out, ["low=50", "high = 120"], HOW | {"resolution": 128})
    expected = load_all()["canny"].run(scene(), {"low": 50, "high": 120}, resolution=128)
    assert np.array_equal(read(out), expected)
    assert capsys.readouterr().out == f"{out}  canny  96x72\n"


@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16", "1", "P", "LA", "CMYK"])
def test_pictures_of_every_kind(mode: str, tmp_path: Path) -> None:
    path, out = tmp_path / ("deep.tiff" if mode == "CMYK" else "deep.png"), tmp_path / "out.png"
    if mode == "I;16":
        Image.fromarray(scene()[:, :, 0].astype(np.uint16) * 257).save(path)
    else:
        Image.fromarray(scene()).convert(mode).save(path)
    run_control("lineart", str(path), out, [], HOW)
    assert read(out).shape == (72, 96, 3)


def test_a_hole_is_written_as_transparency(picture: str, tmp_path: Path) -> None:
    mask = np.zeros((72, 96), dtype=np.uint8)
    mask[10:30, 20:50] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    out = tmp_path / "hole.png"
    run_control("inpaint", picture, out, [], HOW | {"mask": str(tmp_path / "mask.png")})
    assert np.array_equal(read(out), load_all()["inpaint"].run(scene(), job=Job(mask=mask)))
    with pytest.raises(RequestError, match=r"cannot hold the hole .* name a \.png or \.webp"):
        run_control("inpaint", picture, tmp_path / "hole.jpg", [], HOW | {"mask": str(tmp_path / "mask.png")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "kanny"}, "unknown preprocessor 'kanny'; did you mean 'canny'"),
        ({"source": "absent.png"}, "image absent.png is not there"),
        ({"out": "edges.xyz"}, "no picture ending"),
        ({"options": ["low"]}, "expected name=value"),
        ({"options": ["low=1", "low=2"]}, "each name once"),
        ({"options": ["low=0"]}, "option low is '0'; expected a whole number from 1 to 255"),
        ({"options": ["sigma=2"]}, "no option 'sigma'"),
        ({"how": HOW | {"resolution": 7}}, "resolution is 7"),
        ({"how": HOW | {"mask": "absent.png"}}, "mask absent.png is not there"),
    ],
)
def test_refusals(change: dict[str, Any], message: str, picture: str, tmp_path: Path) -> None:
    given = {"name": "canny", "source": picture, "out": "edges.png", "options": [], "how": HOW} | change
    with pytest.raises(RequestError, match=message):
        run_control(given["name"], given["source"], tmp_path / given["out"], given["options"], given["how"])
    assert [path.name for path in tmp_path.iterdir()] == ["scene.png"]


def test_a_mask_of_another_size(picture: str, tmp_path: Path) -> None:
    Image.new("L", (5, 5)).save(tmp_path / "mask.png")
    with pytest.raises(RequestError, match="the mask is 5x5, the picture 96x72"):
        run_control("inpaint", picture, tmp_path / "o.png", [], HOW | {"mask": str(tmp_path / "mask.png")})


def test_a_place_that_cannot_be_written(picture: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        run_control("none", picture, tmp_path / "absent" / "o.png", [], HOW)


def test_broken_pictures(tmp_path: Path) -> None:
    cut = tmp_path / "cut.png"
    Image.fromarray(scene()).save(cut)
    cut.write_bytes(cut.read_bytes()[:900])
    (tmp_path / "empty.png").write_bytes(b"")
    for name, message in (("cut.png", "cannot be read"), ("empty.png", "is empty")):
        with pytest.raises(RequestError, match=message):
            run_control("canny", str(tmp_path / name), tmp_path / "o.png", [], HOW)


def test_options_are_split_at_the_first_equals_sign() -> None:
    assert parsed(["a=b=c", " low =5"]) == {"a": "b=c", "low": "5"}


@pytest.mark.usefixtures("nothing")
def test_the_list_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    run_list(as_json=False)
    text = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{text}" for name in load_all())
    assert "hed.safetensors is missing, fetch it with `python recipes/control/fetch.py hed`" in text
    assert "low=100: gradients below it are no edge (a whole number from 1 to 255)" in text


def test_the_list_as_json(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_list(as_json=True)
    facts = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert list(facts) == list(load_all())
    assert facts["softedge"]["weights"] == str(weights / "hed.safetensors")
    assert facts["canny"]["weights"] is None
    assert "HEDdetector" in facts["softedge"]["aliases"]
    assert [option["name"] for option in facts["canny"]["options"]] == ["low", "high"]
