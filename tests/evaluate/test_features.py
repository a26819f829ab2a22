"""Inception v3 and the features of folders. Numbers against the published TorchScript: 1.9e-6, once (docs/log.md)."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from reverie.errors import CheckpointError, RequestError
from reverie.evaluate.features import features_of, open_inception, pictures_in
from reverie.nets.inception import BRANCHES, KINDS, LEAVES, STEM, Inception, from_tensorflow


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Random ones, under pytorch-fid's names."""
    torch.manual_seed(0)
    state = Inception().state_dict()
    return {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}


def under_tensorflow(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under the names of TensorFlow's graph."""
    leaves = {ours: theirs for theirs, ours in LEAVES.items()}
    blocks = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
    found = {}
    for name, tensor in weights.items():
        path, leaf = next((name.removesuffix(f".{end}"), theirs) for end, theirs in (*leaves.items(), ("bn.weight", ""))
                          if name.endswith(f".{end}"))  # fmt: skip
        if not leaf:
            continue
        if path.startswith("Mixed"):
            block, branch = path.removeprefix("Mixed_").split(".", 1)
            place = blocks.index(block)
            inner = next(theirs for theirs, ours in BRANCHES[KINDS[place]].items() if ours == branch)
            stem = f"mixed_{place}" if place else "mixed"
            found[f"net.layers.{stem}.{inner}.{leaf}"] = tensor
        else:
            found[f"net.layers.{next(t for t, ours in STEM.items() if ours == path)}.{leaf}"] = tensor
    return found


def test_names_of_tensorflow(weights: dict[str, Tensor]) -> None:
    found = from_tensorflow(under_tensorflow(weights))
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], t) for name, t in weights.items() if not name.endswith("bn.weight"))


@pytest.mark.parametrize("tensorflow", [False, True])
def test_features_of_a_folder(tmp_path: Path, weights: dict[str, Tensor], tensorflow: bool) -> None:
    file = tmp_path / "inception.safetensors"
    save_file({n: t.contiguous() for n, t in (under_tensorflow(weights) if tensorflow else weights).items()}, file)
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(folder / "a.png")
    Image.new("L", (20, 20), 90).save(folder / "below" / "b.webp")
    paths = pictures_in(folder)
    network = open_inception(file)
    found = features_of(paths, network, torch.device("cpu"), batch=2)
    assert found.shape == (2, 2048)
    red = torch.tensor([1.0, 0.0, 0.0])[None, :, None, None].expand(1, 3, 299, 299)
    with torch.no_grad():
        torch.testing.assert_close(found[:1], network.features(2 * red - 1), rtol=1e-4, atol=1e-5)


def test_what_is_none(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is not a folder"):
        pictures_in(tmp_path / "nowhere")
    with pytest.raises(RequestError, match="has no pictures"):
        pictures_in(tmp_path)
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="does not fit"):
        open_inception(tmp_path / "other.safetensors")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "x.png").write_bytes(b"no picture")
    with pytest.raises(RequestError, match="not a picture"):
        features_of(pictures_in(tmp_path / "p"), Inception().eval(), torch.device("cpu"))
