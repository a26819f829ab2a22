"""Where weights are looked for, what is said when they are missing, and every published layout."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reverie.checkpoint.save import write_weights
from reverie.control import weights as layouts
from reverie.control.registry import Job, load_all
from reverie.control.weights import CAFFE_MEAN, FOLDER, WEIGHTS, folded, folder
from reverie.errors import CheckpointError, RequestError
from reverie.nets.hed import Hed
from reverie.nets.mlsd import Mlsd
from tests.control.pictures import scene

TABLE = load_all()
LEARNED = [name for name in TABLE if TABLE[name].learned]


@pytest.mark.parametrize("name", LEARNED)
def test_one_line_says_what_is_missing_where_and_what_fetches_it(name: str, nothing: Path) -> None:
    with pytest.raises(RequestError) as caught:
        TABLE[name].run(scene())
    text, weights = str(caught.value), WEIGHTS[TABLE[name].learned or ""]
    assert weights.file in text
    assert str(nothing / "annotators") in text
    assert FOLDER in text
    assert "--weights FILE" in text
    assert (f"python recipes/control/fetch.py {weights.name}`" in text) == weights.recipe
    assert ("reverie models pull " in text) == (weights.hub is not None)
    assert "\n" not in text


def test_every_file_can_be_fetched_somehow() -> None:
    assert all(weights.recipe or weights.hub for weights in WEIGHTS.values())


def test_the_folder_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert folder() == Path("/somewhere/reverie/annotators")
    monkeypatch.setenv(FOLDER, "~/weights")
    assert folder() == Path.home() / "weights"


def test_what_was_pulled_from_the_hub_is_found(nothing: Path) -> None:
    repository = nothing / "hub" / "models--lllyasviel--Annotators"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (snapshot / "ControlNetHED.pth").write_bytes(b"weights")
    assert WEIGHTS["hed"].find() == snapshot / "ControlNetHED.pth"
    own = nothing / "annotators" / "hed.safetensors"
    own.parent.mkdir()
    own.write_bytes(b"weights")
    assert WEIGHTS["hed"].find() == own
    assert WEIGHTS["hed"].find(snapshot / "ControlNetHED.pth").name == "ControlNetHED.pth"
    with pytest.raises(RequestError, match="no such file of weights"):
        WEIGHTS["hed"].find(nothing / "absent.pth")


@pytest.mark.parametrize("name", LEARNED)
def test_weights_of_something_else_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    write_weights(path, {"conv.weight": torch.zeros(3, 3)})
    with pytest.raises(CheckpointError, match=r"other\.safetensors"):
        TABLE[name].run(scene(), job=Job(weights=path))
    path.write_bytes(b"no weights at all")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        TABLE[name].run(scene(), job=Job(weights=path))


@pytest.mark.usefixtures("weights")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(RequestError, match="device 'abacus' cannot be used"):
        TABLE["softedge"].run(scene(), job=Job(device="abacus"))


# Layouts


def randomised(module: nn.Module) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {name: torch.rand(value.shape, generator=random) * 0.1 for name, value in module.state_dict().items()}


@pytest.mark.parametrize("bias", [True, False])
def test_folding_changes_nothing(bias: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    state = {k: v for k, v in net.state_dict().items() if v.is_floating_point()}
    for name, value in state.items():
        value.copy_(torch.rand(value.shape, generator=torch.Generator().manual_seed(len(name))) + 0.2)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.ReLU(), nn.Conv2d(4, 2, 1))
    plain.load_state_dict(folded(state))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(plain(x), net(x))


@pytest.mark.parametrize("gone", ["0.weight", "1.bias"])
def test_a_norm_without_its_convolution(gone: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    state = {k: v for k, v in net.state_dict().items() if v.is_floating_point() and k != gone}
    with pytest.raises(CheckpointError, match=f"cannot be folded: '{gone}' is not in the file"):
        folded(state)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(n == m and torch.equal(x, y) for (n, x), (m, y) in pairs)


def test_hed_of_controlnet_is_ours_with_a_mean_at_its_end() -> None:
    ours = randomised(Hed())
    theirs = {name: value for name, value in ours.items() if not name.startswith("fuse")}
    ours |= {"fuse.weight": torch.full((1, 5, 1, 1), 0.2), "fuse.bias": torch.zeros(1)}
    assert same(layouts.hed(theirs, Path("ControlNetHED.pth")), layouts.hed(ours, Path("hed.safetensors")))


def test_hed_of_caffe_is_ours_for_bgr() -> None:
    """`network-bsds500.pth`: poolings stand at place 0 of every stage but the first."""
    ours = randomised(Hed()) | {"norm": torch.tensor(CAFFE_MEAN).view(1, 3, 1, 1)}
    words = ("One", "Two", "Thr", "Fou", "Fiv")
    theirs: dict[str, Tensor] = {}
    for name, value in ours.items():
        parts = name.split(".")
        if parts[0] == "fuse":
            theirs[f"moduleCombine.0.{parts[1]}"] = value
        elif parts[0] != "norm":
            word, first = words[int(parts[0][-1]) - 1], parts[0] == "block1"
            place = "" if parts[1] == "projection" else f".{2 * int(parts[2]) + (0 if first else 1)}"
            kind = "Score" if parts[1] == "projection" else "Vgg"
            theirs[f"module{kind}{word}{place}.{parts[-1]}"] = value
    theirs["moduleVggOne.0.weight"] = theirs["moduleVggOne.0.weight"][:, [2, 1, 0]]
    assert same(layouts.hed(theirs, Path("network-bsds500.pth")), layouts.hed(ours, Path("hed.safetensors")))


def test_mlsd_with_norms_is_the_one_that_was_trained_anew() -> None:
    ours = randomised(Mlsd())
    net = layouts.mlsd(ours, Path("mlsd.safetensors"))
    assert isinstance(net, Mlsd)
    assert not net.block17.anew
    theirs = dict(ours)
    for name in ours:
        conv, _, kind = name.rpartition(".")
        parent, _, place = conv.rpartition(".")
        # What is followed by a norm stands in a Sequential: every convolution but the last.
        if kind == "weight" and conv != "block23.conv3":
            norm, count = f"{parent}.{int(place) + 1}", len(ours[name])
            theirs[f"{norm}.weight"] = torch.full((count,), 2.0)
            theirs |= {f"{norm}.{part}": torch.zeros(count) for part in ("bias", "running_mean")}
            theirs[f"{norm}.running_var"] = torch.ones(count)
    found = layouts.mlsd(theirs, Path("mlsd_large_512_fp32.pth"))
    assert isinstance(found, Mlsd)
    assert found.block17.anew
    expected = ours["block22.conv1.0.weight"] * 2 / np.sqrt(1 + 1e-5)
    torch.testing.assert_close(found.state_dict()["block22.conv1.0.weight"], expected)
    torch.testing.assert_close(found.state_dict()["block23.conv3.weight"], ours["block23.conv3.weight"])
