"""Adapters on the command line: drawn with, written down, drawn again; and what is no adapter is one clear line."""

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reverie.adapters.control_files import save_control
from reverie.families.detect import load_parts
from reverie.nets.controlnet import ControlNet
from reverie.nets.unet import UNet
from tests.adapters import loras
from tests.apps.commandline import CommandLine
from tests.checkpoint.hostile_pickles import Hostile

SMALL = ("--steps", 1, "--width", 32, "--height", 32, "--seed", 3)


@pytest.fixture(scope="module")
def kept(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters for the tiny model; read only."""
    place, parts = tmp_path_factory.mktemp("adapters"), load_parts(folder)
    written = loras.kohya(parts)
    weak = {name: 0.2 * t if name.endswith("lora_up.weight") else t for name, t in written.tensors.items()}
    loras.Written(weak, written.layers).save(place / "style.safetensors")
    save_file({"emb_params": torch.randn(2, 64, generator=torch.Generator().manual_seed(1))}, place / "toy.safetensors")
    assert isinstance(parts.unet, UNet)
    torch.manual_seed(0)
    network = ControlNet.from_unet(parts.unet, widths=(16, 16, 16, 16))
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    save_control(place / "net", network, torch.float32)
    Image.effect_noise((50, 30), 60).convert("RGB").save(place / "picture.png")
    return place


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where the picture would go; checks that nothing went there."""
    (folder := tmp_path / "out").mkdir()
    yield folder / "a.png"
    assert list(folder.iterdir()) == []


def pixels(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    with Image.open(path) as image:
        return np.asarray(image)


def test_drawn_and_drawn_again(cli: CommandLine, folder: Path, kept: Path, tmp_path: Path) -> None:
    """With a LoRA, a textual inversion and a ControlNet; the picture alone says how."""
    asked = {
        "--lora": f"{kept / 'style.safetensors'}:0.8",
        "--embedding": f"toy={kept / 'toy.safetensors'}",
        "--control": f"canny:{kept / 'picture.png'}:0.9:0:0.5:net={kept / 'net'},preprocessor=none",
    }
    found = {}
    for left_out in (None, *asked):
        flags = [word for flag, value in asked.items() if flag != left_out for word in (flag, value)]
        path = tmp_path / f"{left_out}.png"
        ran = cli("generate", "a toy", *SMALL, "--steps", 2, *flags, "--model", folder, "--out", path)
        assert (ran.code, ran.err) == (0, ran.err) and "warning" not in ran.err, ran.err
        found[left_out] = path
    whole = pixels(found[None])
    assert [flag for flag in asked if np.array_equal(pixels(found[flag]), whole)] == []
    with Image.open(found[None]) as image:
        info = image.text  # type: ignore[attr-defined]
    assert 'Lora hashes: "style: ' in info["parameters"] and 'TI hashes: "toy: ' in info["parameters"]
    assert cli("generate", "--from", found[None], "--out", tmp_path / "again.png").code == 0
    assert np.array_equal(pixels(tmp_path / "again.png"), whole)


def test_an_adapter_that_has_changed_since_is_named(cli: CommandLine, folder: Path, kept: Path, tmp_path: Path) -> None:
    path = edited(kept, tmp_path / "mine.safetensors", lambda tensors: None)
    picture, again = tmp_path / "a.png", ("--out", tmp_path / "b.png")
    assert cli("generate", "a toy", *SMALL, "--lora", path, "--model", folder, "--out", picture).code == 0
    assert "changed since" not in cli("generate", "--from", picture, *again).err
    edited(kept, path, lambda tensors: next(iter(tensors.values())).mul_(2))
    assert "lora: mine: the file has changed since" in cli("generate", "--from", picture, *again).err


def test_named_in_the_prompt(
    cli: CommandLine, folder: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REVERIE_MODELS", str(kept))
    words = ("--model", folder, *SMALL)
    assert cli("generate", "a<lora:style:0.8>", *words, "--out", tmp_path / "a.png").code == 0
    assert cli("generate", "a", "--lora", "style:0.8", *words, "--out", tmp_path / "b.png").code == 0
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


# Files


def edited(kept: Path, path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = {name: t.clone() for name, t in load_file(kept / "style.safetensors").items()}
    change(tensors)
    save_file(tensors, path)
    return path


def truncated(kept: Path, path: Path) -> None:
    path.write_bytes((kept / "style.safetensors").read_bytes()[:-100])


def not_a_number(kept: Path, path: Path) -> None:
    edited(kept, path, lambda tensors: next(iter(tensors.values())).fill_(torch.nan))


def pickled(kept: Path, path: Path) -> None:
    path.write_bytes(pickle.dumps({"lora_unet_x.lora_up.weight": Hostile(path.with_name("mark"))}, protocol=2))


def absurd(kept: Path, path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        module = next(name for name in tensors if "attn2_to_k" in name).partition(".")[0]
        down, up = (tensors[f"{module}.lora_{side}.weight"] for side in ("down", "up"))
        tensors.clear()
        tensors[f"{module}.lora_down.weight"] = torch.zeros(100_000, down.shape[1])
        tensors[f"{module}.lora_up.weight"] = torch.zeros(up.shape[0], 100_000)

    edited(kept, path, change)


def of_another_family(kept: Path, path: Path) -> None:
    module = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    save_file(
        {f"{module}.lora_down.weight": torch.ones(4, 2048), f"{module}.lora_up.weight": torch.ones(640, 4),
         "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 1280),
         "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(5120, 4)}, path,
    )  # fmt: skip


def no_lora(kept: Path, path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(3)}, path)


def empty(kept: Path, path: Path) -> None:
    path.touch()


@pytest.mark.parametrize(
    ("spoil", "ending", "said"),
    [
        (truncated, "safetensors", ["cut short", "download it again"]),
        (not_a_number, "safetensors", ["NaN"]),
        (pickled, "pt", ["system"]),
        (absurd, "safetensors", ["rank 100000", "attn2"]),
        (of_another_family, "safetensors", ["is a LoRA for Stable Diffusion XL", "this model is Stable Diffusion 1"]),
        (no_lora, "safetensors", ["is no LoRA", "2 tensors", "'a', 'b'"]),
        (empty, "safetensors", ["empty (0 bytes)"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_files_that_are_no_lora_for_it(
    cli: CommandLine, folder: Path, kept: Path, out: Path, tmp_path: Path, ending: str, said: list[str],
    spoil: Callable[[Path, Path], None],
) -> None:  # fmt: skip
    path = tmp_path / f"x.{ending}"
    spoil(kept, path)
    line = cli.refused("generate", "a", *SMALL, "--lora", path, "--model", folder, "--out", out)
    assert str(path) in line
    for word in said:
        assert word in line
    assert not path.with_name("mark").exists()


@pytest.mark.filterwarnings("default")
def test_a_part_of_a_lora_is_a_warning(cli: CommandLine, folder: Path, kept: Path, tmp_path: Path) -> None:
    more = {
        "lora_unet_elsewhere.lora_up.weight": torch.ones(8, 4),
        "lora_unet_elsewhere.lora_down.weight": torch.ones(4, 8),
    }
    path = edited(kept, tmp_path / "x.safetensors", lambda tensors: tensors.update(more))
    ran = cli("generate", "a", *SMALL, "--lora", path, "--model", folder, "--out", tmp_path / "a.png")
    assert ran.code == 0
    assert "2 of " in ran.err and "tensors unmatched" in ran.err


def test_two_of_one_name_and_none(
    cli: CommandLine, folder: Path, kept: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of LoRAs and of textual inversions."""
    for kind, name in (("loras", "style"), ("embeddings", "toy")):
        for below in ("one", "two"):
            (place := tmp_path / kind / below).mkdir(parents=True)
            (place / f"{name}.safetensors").write_bytes((kept / f"{name}.safetensors").read_bytes())
    monkeypatch.setenv("REVERIE_MODELS", str(tmp_path))
    common = (*SMALL, "--model", folder, "--out", out)
    for words in (["a", "--lora", "style"], ["a <lora:style:1>"]):
        line = cli.refused("generate", *words, *common)
        assert "2 files are called 'style'" in line and "one/style.safetensors" in line and "rename one" in line
    assert "2 files are called 'toy'" in cli.refused("generate", "a", "--embedding", "toy", *common)
    assert "two embeddings are called 'toy'" in cli.refused("generate", "a toy", *common)
    line = cli.refused("generate", "a", "--lora", "stile", *common)
    assert "no LoRA 'stile'" in line and "did you mean style" in line
    assert "no embedding 'toi'" in cli.refused("generate", "a", "--embedding", "toi", *common)
    assert "only LoRAs are opened" in cli.refused("generate", "a <hypernet:x:1>", *common)


def test_embeddings_that_do_not_fit(cli: CommandLine, folder: Path, out: Path, tmp_path: Path) -> None:
    for name, tensors, said in (
        ("wide", {"emb_params": torch.ones(2, 768)}, ["768 wide", "64 wide"]),
        ("pair", {"clip_l": torch.ones(2, 64), "clip_g": torch.ones(2, 1280)}, ["Stable Diffusion XL"]),
        ("damaged", {"emb_params": torch.full((2, 64), torch.nan)}, ["NaN"]),
        ("none", {f"layer.{i}.weight": torch.ones(2, 2, 2) for i in range(9)}, ["is no embedding"]),
    ):
        save_file(tensors, path := tmp_path / f"{name}.safetensors")
        line = cli.refused("generate", "a", *SMALL, "--embedding", path, "--model", folder, "--out", out)
        assert str(path) in line
        for word in said:
            assert word in line


def test_a_control_net_of_another_family(cli: CommandLine, folder: Path, kept: Path, out: Path, tmp_path: Path) -> None:
    """Its cross-attention is as wide as SDXL's prompt, and it is told of sizes."""
    tensors = load_file(next((kept / "net").glob("*.safetensors")))
    for name in [name for name in tensors if ".attn2.to_k." in name or ".attn2.to_v." in name]:
        tensors[name] = torch.zeros(len(tensors[name]), 2048)
    tensors |= {
        "add_embedding.linear_1.weight": torch.zeros(128, 2816),
        "add_embedding.linear_1.bias": torch.zeros(128),
    }
    save_file(tensors, path := tmp_path / "xl.safetensors")
    control = f"canny:{kept / 'picture.png'}:net={path},preprocessor=none"
    line = cli.refused("generate", "a", *SMALL, "--control", control, "--model", folder, "--out", out)
    assert str(path) in line and "Stable Diffusion XL" in line


# What is written


@pytest.mark.parametrize(
    ("flag", "text", "said"),
    [
        ("lora", "{style}:0.8:foo=1", ["unknown field 'loras.0.foo'", "fields of loras are", "strength"]),
        ("lora", "{style}:0.8:strenth=1", ["unknown field 'loras.0.strenth'", "did you mean strength?"]),
        ("lora", "{style}:0.8:way=sideways", ["loras.0.way is 'sideways'"]),
        ("lora", "{style}:11", ["loras.0.strength is '11'", "less than or equal to 10"]),
        ("lora", "{style}:strong", ["ends in 'strong'", "expected numbers (strength, text_strength)"]),
        ("lora", "{style}:strength=strong", ["loras.0.strength is 'strong'", "number"]),
        ("lora", "{style}:strength=nan", ["loras.0.strength is 'nan'"]),
        ("lora", "{style}:1:1:1", ["3 numbers", "strength, text_strength"]),
        ("lora", "{style}:start=0.8,end=0.2", ["starts at 0.8 and ends before, at 0.2"]),
        ("lora", "{style}:start=0.5,end=0.5", ["acts from 0.5 to 0.5"]),
        ("lora", "{style}:blocks.nowhere=0.5", ["no block 'nowhere'"]),
        ("lora", "{style}:blocks.down=much", ["the factor of block down is 'much'"]),
        ("control", "canny:{picture}:1:0.8:0.2:net={net}", ["starts at 0.8 and ends before, at 0.2"]),
        ("control", "canny:{picture}:1:0:2:net={net}", ["controls.0.end is '2'"]),
        ("control", "canny:{picture}:1:0:1:1:net={net}", ["4 numbers", "strength, start, end"]),
        ("control", "canny:{picture}:nett={net}", ["unknown field 'controls.0.nett'", "did you mean net?"]),
        ("control", "canny:{picture}", ["no control net 'canny'", "none are known", "net=FILE"]),
        ("control", "canny:{style}:net={net}", ["style.safetensors is not a picture that can be read"]),
        ("control", "canny:nowhere.png:net={net}", ["nowhere.png is not there"]),
        ("control", "canny", ["controls.0.picture is ''"]),
        ("control", "canny:{picture}:net={style}", ["style.safetensors", "LoRA"]),
        ("control", "canny:{picture}:net={net},preprocessor=cany", ["cany", "did you mean"]),
        ("control", "canny:{picture}:net={net},preprocessor=none,mode=strict", ["controls.0.mode is 'strict'"]),
        ("control", "inpaint:{picture}:net={net}", ["mask"]),
        ("image-prompt", "{picture}:0.6", ["0 IP-Adapters are known", "adapter=FILE"]),
        ("image-prompt", "{picture}:0.6:adapter={style}", ["style.safetensors is not an IP-Adapter"]),
        ("image-prompt", "{picture}:adaptor=x", ["unknown field 'image_prompts.0.adaptor'", "did you mean adapter?"]),
        ("embedding", "toy={picture}", ["picture.png"]),
        ("embedding", "toy=", ["no embedding ''"]),
    ],
)  # fmt: skip
def test_requests_that_cannot_be(
    cli: CommandLine, folder: Path, kept: Path, out: Path, flag: str, text: str, said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("REVERIE_MODELS", raising=False)
    written = text.format(style=kept / "style.safetensors", picture=kept / "picture.png", net=kept / "net")
    line = cli.refused("generate", "a toy", *SMALL, f"--{flag}", written, "--model", folder, "--out", out)
    for word in said:
        assert word in line
