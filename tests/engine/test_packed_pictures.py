"""Models whose weights stay packed draw the pictures of the unpacked ones, bit for bit, and take less memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import reverie
from reverie.checkpoint.packed import PackedTensor, is_packed
from reverie.checkpoint.source import open_weights
from reverie.engine.bundle import Model
from reverie.engine.convert import convert
from reverie.errors import RequestError
from reverie.nets.unet import UNet, UNetConfig
from tests import tiny
from tests.apps.commandline import environment


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def source(root: Path, family: str) -> Path:
    return tiny.sd3_file(root, "sd35-medium") if family == "sd3" else tiny.model_file(root, family)


def packed_file(root: Path, family: str, kind: str) -> Path:
    """A single file of a family with packed weights."""
    path = root / f"{family}-{kind}.safetensors"
    if kind.startswith("Q"):
        gguf = path.with_suffix(".gguf")
        return gguf if gguf.exists() else tiny.gguf_file(gguf, load_file(source(root, family)), kind)
    if kind == "scaled":
        convert(source(root, family), path, dtype="fp8")
        return path
    tensors = load_file(source(root, family))
    small = {n: t.to(getattr(torch, kind)) if t.ndim > 1 and "pos_embed" not in n else t for n, t in tensors.items()}
    save_file(small, path)
    return path


def drawn(model: Model, **fields: Any) -> Tensor:
    return model.generate("a red apple", steps=2, seed=3, width=32, height=32, sampler="euler", **fields).pixels


@pytest.mark.parametrize(
    ("family", "kind", "precision"),
    [
        ("sd1", "Q4_0", "float32"), ("sd1", "scaled", "bfloat16"), ("sd1", "float8_e5m2", "float32"),
        ("sdxl", "Q8_0", "bfloat16"), ("sd3", "Q5_1", "float32"),
    ],
)  # fmt: skip
def test_the_same_picture(root: Path, family: str, kind: str, precision: Any) -> None:
    path = packed_file(root, family, kind)
    models = {how: reverie.load(path, device="cpu", precision=precision, weights=how) for how in ("packed", "full")}
    pixels = {how: drawn(model) for how, model in models.items()}
    networks = {how: model.network("unet") for how, model in models.items()}
    assert is_packed(networks["packed"]) and not is_packed(networks["full"])
    assert torch.equal(pixels["packed"], pixels["full"])
    assert pixels["full"].std() > 0.01


def test_a_seamless_picture(root: Path) -> None:
    path = packed_file(root, "sd1", "Q8_0")
    packed, full = (
        drawn(reverie.load(path, device="cpu", precision="float32", weights=how), seamless="both")
        for how in ("packed", "full")
    )
    assert torch.equal(packed, full)


def test_queries_keys_and_values_of_one_tensor_stay_packed(root: Path) -> None:
    model = reverie.load(packed_file(root, "sd3", "Q5_1"), device="cpu", weights="packed")
    unet = model.ready("transformer", model.parts.unet)
    names = {name for name, p in unet.named_parameters() if isinstance(p, PackedTensor)}
    assert {f"transformer_blocks.0.attn.{part}.weight" for part in ("to_q", "to_k", "to_v", "add_k_proj")} <= names


def test_small_weights_are_kept_where_memory_is_ample(root: Path) -> None:
    model = reverie.load(packed_file(root, "sd1", "Q4_0"), device="cpu")
    assert not model.packed and not is_packed(model.network("unet"))
    with pytest.raises(RequestError, match="unknown way to keep weights 'half'; known: auto, packed, full"):
        reverie.load(device="cpu", weights="half")  # type: ignore[arg-type]


def test_an_unpacked_network_is_the_dequantised_file(root: Path) -> None:
    path = packed_file(root, "sd1", "Q4_0")
    model, file = reverie.load(path, device="cpu", precision="float32", weights="full"), open_weights(path)
    unet = model.network("unet")
    assert isinstance(unet, UNet)
    assert torch.equal(unet.conv_in.weight, file.tensor("model.diffusion_model.input_blocks.0.0.weight"))


MEASURE = """
import json, sys, torch
from pathlib import Path
from reverie.engine.placing import check_numbers, place
from reverie.families.detect import open_checkpoint
def own():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))
torch.randn(512, 512) @ torch.randn(512, 512)  # what the first product takes besides
unet = open_checkpoint(Path(sys.argv[1]))[1].pieces["unet"].build()
before = own()
check_numbers(unet, Path(sys.argv[1]), "unet")
place(unet, torch.device("cpu"), torch.float32, packed=sys.argv[2] == "packed")
with torch.no_grad():
    unet(torch.zeros(1, 4, 8, 8), torch.ones(1), torch.zeros(1, 77, 768))
print(json.dumps(own() - before))
"""


def true_size(path: Path, kind: str) -> None:
    """The U-Net of SD 1.5 alone, in a single file."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in UNet(UNetConfig()).state_dict().items()}
    noise = torch.randn(1 << 22) * 0.02
    tensors = {
        tiny.ldm_unet_name(name, shapes): noise.repeat(-(-n.numel() // len(noise)))[: n.numel()].reshape(n).half()
        for name, n in shapes.items()
    }
    if kind != "scaled":
        blocks = gguf.quants.quantize(noise.numpy().reshape(-1, 32), gguf.GGMLQuantizationType[kind])

        def quantise(numbers: Any, kind: Any) -> Any:
            """The blocks of the noise over and over, which takes seconds; the library would take minutes."""
            count = numbers.size // 32
            chosen = np.resize(blocks, (count, blocks.shape[1]))
            return chosen.reshape(*numbers.shape[:-1], -1)

        tiny.gguf_file(path, tensors, kind, quantise)
        return
    small = {name: t.to(torch.float8_e4m3fn) if t.ndim > 1 else t for name, t in tensors.items()}
    scales = {name.replace(".weight", ".scale_weight"): torch.ones(1) for name, t in small.items() if t.ndim > 1}
    save_file({**small, **scales, "scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}, path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "scaled"])
def test_memory_at_true_size(kind: str, tmp_path: Path) -> None:
    """The U-Net of SD 1.5 after one evaluation, beyond the mapped file; unpacked it has 3.4 GB. Needs 6 GB of memory.

    Packed it holds what is no matrix, and one layer at a time: the largest has 118 MB.
    """
    path = tmp_path / f"packed{'.safetensors' if kind == 'scaled' else '.gguf'}"
    true_size(path, kind)
    own = {}
    for weights in ("packed", "full"):
        command = [sys.executable, "-c", MEASURE, str(path), weights]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
        own[weights] = json.loads(done.stdout)
    assert own["full"] > 3.2e9 and own["packed"] < 0.4e9, own
