"""8-bit floats with a scale: one tensor each, and no strange names."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from reverie.checkpoint.quantised import QuantisedTensor
from reverie.checkpoint.source import WeightFile, open_weights
from reverie.errors import CheckpointError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def opened(tensors: dict[str, Tensor], folder: Path) -> WeightFile:
    save_file(tensors, folder / "a.safetensors")
    return open_weights(folder / "a.safetensors")


def weight(dtype: torch.dtype = E4M3, shape: tuple[int, ...] = (4, 6)) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(shape).to(dtype)


def comfy(kind: str) -> Tensor:
    return torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (4, 1)], ids=str)
def test_scaled_weights(dtype: torch.dtype, scale: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    numbers = torch.rand(shape) + 0.1
    tensors = {
        "net.a.weight": weight(dtype), f"net.a.{scale}": numbers, "net.a.scale_input": torch.tensor(2.0),
        "net.a.bias": torch.ones(4), "scaled_fp8": torch.zeros(2, dtype=dtype), "net.b.weight": weight(dtype),
    }  # fmt: skip
    file = opened(tensors, tmp_path)
    assert file.tensors.keys() == {"net.a.weight", "net.a.bias", "net.b.weight"}
    expected = weight(dtype).float() * (numbers if numbers.numel() == 1 else numbers.reshape(4, 1))
    assert torch.equal(file.tensor("net.a.weight"), expected)
    assert file.tensors["net.a.weight"].dtype == torch.float32
    assert torch.equal(file.tensor("net.a.weight", torch.float16), expected.half())
    assert file.tensor("net.b.weight").dtype == dtype, "without a scale it stays what it is"
    raw = file.raw("net.a.weight")
    assert isinstance(raw, QuantisedTensor)
    assert raw.nbytes == 24


def test_newer_files_name_the_format_of_each_layer(tmp_path: Path) -> None:
    tensors = {
        "a.weight": weight(), "a.weight_scale": torch.tensor(0.5), "a.input_scale": torch.tensor(1.0),
        "a.comfy_quant": comfy("float8_e4m3fn"), "model.scaled_fp8": torch.empty(0, dtype=E4M3),
    }  # fmt: skip
    file = opened(tensors, tmp_path)
    assert file.tensors.keys() == {"a.weight"}
    assert torch.equal(file.tensor("a.weight"), weight().float() * 0.5)


def test_a_torch_file_may_be_scaled_too(tmp_path: Path) -> None:
    turned = weight(shape=(6, 4)).T
    torch.save({"a.weight": turned, "a.scale_weight": torch.tensor(0.5)}, tmp_path / "a.pt")
    file = open_weights(tmp_path / "a.pt")
    assert file.tensors.keys() == {"a.weight"}
    assert torch.equal(file.tensor("a.weight"), turned.float() * 0.5)


def test_files_without_scales_are_left_alone(tmp_path: Path) -> None:
    tensors = {
        "a.weight": weight(),
        "b.weight": torch.ones(2),
        "b.weight_scale": torch.ones(1),
        "weight_scale": torch.ones(1),
    }
    assert opened(tensors, tmp_path).tensors.keys() == tensors.keys()


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a.weight": weight(), "a.scale_weight": torch.ones(6)}, r"'a.scale_weight' of shape \[6\] does not fit"),
        ({"a.weight": weight(), "a.weight_scale": torch.ones(2, 3)}, "does not fit"),
        ({"a.weight": weight(), "a.weight_scale": torch.ones(0)}, "does not fit"),
        ({"a.weight": weight(), "a.weight_scale": torch.ones(1).int()}, "does not fit"),
        ({"a.weight": torch.zeros(2, 3).char(), "a.comfy_quant": comfy("int8_tensorwise")}, "'int8_tensorwise'"),
        ({"a.comfy_quant": torch.zeros(3, dtype=torch.uint8)}, "is quantised as 'None'"),
        ({"a.comfy_quant": torch.zeros(20_000, dtype=torch.uint8)}, "is quantised as 'None'"),
        ({"a.comfy_quant": torch.tensor(list(b"[" * 9000), dtype=torch.uint8)}, "is quantised as 'None'"),
        ({"a.comfy_quant": torch.zeros(3)}, "is quantised as 'None'"),
    ],
)
def test_what_does_not_fit_is_refused(tensors: dict[str, Tensor], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        opened(tensors, tmp_path)
    assert str(caught.value).isprintable()
