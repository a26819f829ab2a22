"""Layouts and precisions, both ways, for every family."""

import json
import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reverie.apps.converting import run_convert
from reverie.checkpoint.save import write_weights
from reverie.checkpoint.source import open_weights
from reverie.engine.bundle import load
from reverie.engine.convert import convert
from reverie.errors import CheckpointError, OutputError, RequestError
from reverie.families.detect import open_checkpoint
from reverie.nets.autoencoder import Autoencoder, AutoencoderConfig
from reverie.nets.clip_text import ClipText, ClipTextConfig
from reverie.nets.unet import UNet, UNetConfig
from tests import tiny
from tests.apps import models
from tests.engine import tiny_families

diffusers: Any = import_module("diffusers")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "families"


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models share their text encoders and words, which are made once."""
    return tmp_path_factory.mktemp("variants")


@pytest.fixture(scope="module")
def single(folders: Path) -> Path:
    """A single file of Stable Diffusion 1."""
    return tiny_families.made_single("sd1", folders)


def of_file(path: Path) -> dict[str, Tensor]:
    file = open_weights(path)
    return {name: file.tensor(name) for name in file.tensors}


def of_model(path: Path) -> dict[str, Tensor]:
    pieces = open_checkpoint(path)[1].pieces
    return {f"{part}/{name}": t for part, piece in pieces.items() for name, t in piece.tensors().items()}


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    """The same bits under the same names."""
    assert one.keys() == two.keys()
    for name, t in one.items():
        assert t.dtype == two[name].dtype and torch.equal(t, two[name]), name


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("family", list(tiny_families.FOLDERS))
def test_round_trips_lose_no_bit(family: str, folders: Path, tmp_path: Path) -> None:
    source, one = tiny_families.made(family, folders), tiny_families.made_single(family, folders)
    back, two = tmp_path / "back", tmp_path / "two.safetensors"
    convert(one, back)
    assert_equal(of_model(source), of_model(back))
    made = convert(back, two)
    assert_equal(of_file(one), of_file(two))
    assert (made.family, made.layout, made.bytes) == (family, "single", sum(t.nbytes for t in of_file(two).values()))
    assert left_in(tmp_path) == ["back", "two.safetensors"]
    check_diffusers_opens(back, source)


@pytest.mark.parametrize("kind", ["sd3", "refiner", "playground", "sdxl-inpaint", "sd1-pix2pix"])
def test_variants_lose_no_bit(kind: str, variants: Path, tmp_path: Path) -> None:
    """From the folder: T5's encoder and words, the refiner's one text encoder, EDM's noise and shifted latents."""
    source = tiny.sd3_model(variants, kind) if kind == "sd3" else tiny.model(variants, kind)
    one, back, two = tmp_path / "one.safetensors", tmp_path / "back", tmp_path / "two.safetensors"
    convert(source, one)
    convert(one, back)
    assert_equal(of_model(source), of_model(back))
    convert(back, two)
    assert_equal(of_file(one), of_file(two))
    check_diffusers_opens(back, source)


def check_diffusers_opens(folder: Path, source: Path) -> None:
    """diffusers reads the same networks, words and noise from a folder as from the one that it wrote itself."""
    absent = {"text_encoder_3": None, "tokenizer_3": None} if "sd3" in source.parts else {}
    ours, theirs = (diffusers.DiffusionPipeline.from_pretrained(path, **absent) for path in (folder, source))
    assert type(ours) is type(theirs)
    for name, part in theirs.components.items():
        other = getattr(ours, name)
        if isinstance(part, torch.nn.Module):
            assert type(other) is type(part)
            assert_equal(part.state_dict(), other.state_dict())
        elif name.startswith("tokenizer") and part is not None:
            facts = [dict(t("a photo, déjà vu", padding="max_length", max_length=77)) for t in (part, other)]
            assert facts[0] == facts[1]
    schedulers = (ours.scheduler, theirs.scheduler)
    noise = [s.alphas_cumprod if hasattr(s, "alphas_cumprod") else s.sigmas for s in schedulers]
    assert torch.equal(*noise)


def test_v_prediction_and_zero_snr_survive(tmp_path: Path) -> None:
    source = tiny_families.sd1(
        tmp_path / "v", prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    one, back = tmp_path / "one.safetensors", tmp_path / "back"
    convert(source, one)
    assert {"v_pred", "ztsnr"} <= open_weights(one).tensors.keys()
    convert(one, back)
    scheduler = json.loads((back / "scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction" and scheduler["rescale_betas_zero_snr"]
    convert(one, tmp_path / "pruned.safetensors", prune=True)
    assert {"v_pred", "ztsnr"} <= open_weights(tmp_path / "pruned.safetensors").tensors.keys()


@pytest.mark.parametrize(("name", "to"), [("float16", "folder"), ("bfloat16", "copy.safetensors")])
def test_numbers_are_rounded_once(single: Path, tmp_path: Path, name: Any, to: str) -> None:
    convert(single, tmp_path / to, dtype=name)
    read = of_model if to == "folder" else of_file
    dtype = getattr(torch, name)
    assert_equal({key: t.to(dtype) for key, t in read(single).items()}, read(tmp_path / to))


@pytest.mark.parametrize("prune", [False, True])
def test_eight_bits_have_a_scale_for_each_matrix(single: Path, tmp_path: Path, prune: bool) -> None:
    out = tmp_path / "small.safetensors"
    convert(single, out, dtype="fp8", prune=prune)
    file, exact = open_weights(out), of_file(single)
    assert file.tensors.keys() == exact.keys()
    for name, t in exact.items():
        matrix = name.startswith("model.diffusion_model.") and name.endswith(".weight") and t.ndim == 2
        assert (file.tensors[name].packing == "F8_E4M3") == matrix
        if matrix:  # three bits behind the point: half of 1/8, beside half of the smallest step
            bound = t.abs() / 16 + t.abs().max() / 448 * 2**-10
            assert ((file.tensor(name) - t).abs() <= bound).all()
        else:
            assert torch.equal(file.tensor(name), t.half())
    assert load(out, device="cpu").parts.identity.family == "sd1"


def test_a_checkpoint_of_torch_is_a_source(single: Path, tmp_path: Path) -> None:
    legacy = tmp_path / "old.ckpt"
    torch.save({"state_dict": of_file(single), "global_step": 7}, legacy)
    convert(legacy, tmp_path / "new.safetensors")
    assert_equal(of_file(single), of_file(tmp_path / "new.safetensors"))
    assert open_weights(tmp_path / "new.safetensors").metadata["global_step"] == "7"
    convert(legacy, tmp_path / "folder")
    assert_equal(of_model(single), of_model(tmp_path / "folder"))


def test_gguf_is_a_source(tmp_path: Path) -> None:
    gguf: Any = import_module("gguf")
    tensors = {"a.weight": torch.randn(4, 64), "b.bias": torch.randn(8)}
    writer = gguf.GGUFWriter(tmp_path / "packed.gguf", "sd1")
    kind = gguf.GGMLQuantizationType.Q8_0
    packed = gguf.quantize(tensors["a.weight"].numpy(), kind)
    writer.add_tensor("a.weight", packed, raw_dtype=kind)
    writer.add_tensor("b.bias", tensors["b.bias"].numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    convert(tmp_path / "packed.gguf", tmp_path / "plain.safetensors", dtype="float16")
    found = of_file(tmp_path / "plain.safetensors")
    expected = {"a.weight": torch.from_numpy(gguf.dequantize(packed, kind)), "b.bias": tensors["b.bias"]}
    assert_equal({name: t.half() for name, t in expected.items()}, found)


def test_the_averaged_copy_is_taken(single: Path, tmp_path: Path) -> None:
    tensors = of_file(single)
    network = {n: t for n, t in tensors.items() if n.startswith("model.diffusion_model.")}
    copies = {"model_ema." + n.removeprefix("model.").replace(".", ""): t + 1 for n, t in network.items()}
    write_weights(tmp_path / "both.safetensors", {**tensors, **copies, "model_ema.decay": torch.tensor(0.9)})
    made = convert(tmp_path / "both.safetensors", tmp_path / "ema.safetensors", ema=True)
    expected = {**tensors, **{n: t + 1 for n, t in network.items()}}
    assert_equal(expected, of_file(tmp_path / "ema.safetensors"))
    assert made.notes == (f"{len(copies) + 1} tensors of both.safetensors that no picture needs were left out",)
    convert(tmp_path / "both.safetensors", tmp_path / "pruned.safetensors", prune=True)
    assert_equal(tensors, of_file(tmp_path / "pruned.safetensors"))
    with pytest.raises(CheckpointError, match=r"no averaged copy"):
        convert(single, tmp_path / "none.safetensors", ema=True)


def test_metadata_stays_and_says_where_it_came_from(single: Path, tmp_path: Path) -> None:
    given = {"modelspec.title": "Mine", "modelspec.hash_sha256": "0xold", "ss_steps": "9"}
    write_weights(tmp_path / "given.safetensors", of_file(single), given)
    for out in ("copy.safetensors", "folder", "pruned.safetensors"):
        made = convert(tmp_path / "given.safetensors", tmp_path / out, prune=out.startswith("pruned"))
        file = tmp_path / out
        file = file / "unet/diffusion_pytorch_model.safetensors" if file.is_dir() else file
        kept = {"modelspec.title": "Mine", "ss_steps": "9", "reverie.source_sha256": made.source_sha256}
        assert {k: v for k, v in open_weights(file).metadata.items() if k != "format"} == kept


def test_folders_are_cut_into_shards(single: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    convert(single, tmp_path / "folder", shard=2_000_000, progress=lambda done, total: steps.append((done, total)))
    assert len(list((tmp_path / "folder/unet").glob("*-of-*.safetensors"))) > 2
    assert (tmp_path / "folder/unet/diffusion_pytorch_model.safetensors.index.json").exists()
    assert_equal(of_model(single), of_model(tmp_path / "folder"))
    assert steps[-1][0] == steps[-1][1] and steps == sorted(steps)


def test_a_folder_changes_its_precision_and_keeps_its_files(folders: Path, tmp_path: Path) -> None:
    source = tiny_families.made("sd1", folders)
    convert(source, tmp_path / "half", dtype="float16")
    assert_equal({name: t.half() for name, t in of_model(source).items()}, of_model(tmp_path / "half"))
    for name in ("unet/config.json", "tokenizer/vocab.json", "model_index.json"):
        if (source / name).exists():
            assert (source / name).read_bytes() == (tmp_path / "half" / name).read_bytes()


def test_the_command_says_what_it_wrote(single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_convert(single, tmp_path / "half.safetensors", {"dtype": "float16"}, as_json=False)
    assert re.search(r"half.safetensors: file, 508 tensors, [\d.]+ MB\n", capsys.readouterr().out)
    run_convert(single, tmp_path / "vae", {"parts": ["vae"]}, as_json=True)
    made = json.loads(capsys.readouterr().out)
    assert (made["family"], made["layout"], made["path"]) == ("sd1", "diffusers", str(tmp_path / "vae"))


def test_one_part_alone(single: Path, tmp_path: Path) -> None:
    convert(single, tmp_path / "folder", parts=("vae",))
    assert left_in(tmp_path / "folder") == ["vae"]
    convert(single, tmp_path / "vae.safetensors", parts=("vae",))
    assert all(name.startswith("first_stage_model.") for name in open_weights(tmp_path / "vae.safetensors").tensors)
    with pytest.raises(RequestError, match=r"has no text_encoder_2; it has unet, text_encoder, vae"):
        convert(single, tmp_path / "none", parts=("text_encoder_2",))


def test_a_file_that_is_no_checkpoint_keeps_its_names(tmp_path: Path) -> None:
    write_weights(
        tmp_path / "lora.safetensors", {"lora_unet_x.lora_down.weight": torch.ones(2, 3), "n": torch.arange(3)}
    )
    made = convert(tmp_path / "lora.safetensors", tmp_path / "half.safetensors", dtype="float16")
    expected = {"lora_unet_x.lora_down.weight": torch.ones(2, 3).half(), "n": torch.arange(3)}
    assert_equal(expected, of_file(tmp_path / "half.safetensors"))
    assert made.family == ""
    with pytest.raises(RequestError, match="has no denoising network"):
        convert(tmp_path / "lora.safetensors", tmp_path / "small.safetensors", dtype="fp8")


def test_what_a_layout_cannot_hold_is_refused(folders: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_families.made("sd1", folders), source)
    config = source / "vae/config.json"
    config.write_text(config.read_text().replace("0.18215", "0.5"))
    with pytest.raises(CheckpointError, match=r"scaling_factor of vae would be read as 0.18215, not 0.5"):
        convert(source, tmp_path / "one.safetensors")
    assert left_in(tmp_path) == ["source"]
    with pytest.raises(CheckpointError, match=r"cannot hold this model: the tokenizer has 49408 ids"):
        convert(models.folder(tmp_path / "letters"), tmp_path / "one.safetensors")


@pytest.mark.parametrize(
    ("out", "options", "expected"),
    [
        ("there.safetensors", {}, "is there already"),
        ("there", {}, "is there already"),
        ("new.safetensors", {"layout": "diffusers"}, "cannot be of the layout diffusers"),
        ("new", {"layout": "single"}, "cannot be of the layout single"),
        ("new", {"layout": "none"}, "unknown layout 'none'"),
        ("new", {"dtype": "int8"}, "unknown type 'int8'; known: float32, float16, bfloat16, fp8"),
        ("new", {"dtype": "fp8"}, "fp8 with scales is a layout of single files"),
    ],
)
def test_requests_that_cannot_be_met(
    single: Path, tmp_path: Path, out: str, options: dict[str, Any], expected: str
) -> None:
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    (tmp_path / "there").mkdir()
    with pytest.raises((OutputError, RequestError), match=re.escape(expected)):
        convert(single, tmp_path / out, **options)
    assert left_in(tmp_path) == ["there", "there.safetensors"]
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("out", ["new.safetensors", "new"])
def test_nothing_is_left_of_a_failure(single: Path, tmp_path: Path, out: str) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(single, tmp_path / out, progress=stop)
    assert left_in(tmp_path) == []
    with pytest.raises(OutputError, match="cannot write"):
        convert(single, tmp_path / "gone" / out)


def anonymous() -> int:
    """Bytes of this process that are in memory and no file's."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    """More than fifty megabytes are written; a part that is held in memory would show."""
    unet = UNet(UNetConfig(block_out_channels=(128, 192, 192), attention=(True, True, False), heads=(8, 8, 8),
                           layers_per_block=2, context_width=64)).half()  # fmt: skip
    text = ClipText(ClipTextConfig(width=64, inner_width=64, layers=2, heads=1)).half()
    vae = Autoencoder(AutoencoderConfig(block_out_channels=(32, 32, 32, 32), layers_per_block=1)).half()
    configs = {"unet": unet, "text_encoder": text, "vae": vae}
    family = open_checkpoint(models.folder(tmp_path / "known"))[0]
    source = tmp_path / "big.safetensors"
    write_weights(source, family.join_file({part: (m.config, m.state_dict()) for part, m in configs.items()}))
    del unet, text, vae, configs
    convert(source, tmp_path / "warm", parts=("vae",))
    before, most = anonymous(), 0

    def watch(done: int, total: int) -> None:
        nonlocal most
        most = max(most, anonymous() - before)

    made = convert(source, tmp_path / "folder", dtype="float32", progress=watch)
    largest = max(t.nbytes for t in of_model(tmp_path / "folder").values())
    assert made.bytes > 50_000_000 and most < largest + 8_000_000, (made.bytes, most, largest)
