"""What the doctor says of healthy, broken, hostile and other files."""

import argparse
import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reverie.apps.doctoring import run_doctor
from reverie.checkpoint.save import write_weights
from reverie.engine.doctor import examine
from tests import tiny
from tests.apps import models
from tests.checkpoint import torch_bytes as tb
from tests.engine import tiny_families


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "families"


FITS = {"sd1": (64, "64"), "sd2": (64, "64"), "sdxl": (128, "64 and 64"), "sd3": (160, "64 and 64")}


@pytest.mark.parametrize("family", list(tiny_families.FOLDERS))
def test_a_healthy_model(family: str, folders: Path) -> None:
    single = tiny_families.made_single(family, folders)
    reports = [examine(path) for path in (tiny_families.made(family, folders), single)]
    for report in reports:
        assert (report.kind, report.family, report.problems, report.exit_code) == ("checkpoint", family, (), 0)
        assert report.prediction == ("flow_prediction" if family == "sd3" else "epsilon")
        assert report.pruned and not report.averaged and not report.non_finite and not report.code
        numbers = sum(part.parameters for part in report.parts)
        assert report.memory == {"float32": 4 * numbers, "bfloat16": 2 * numbers, "float16": 2 * numbers}
        assert all(part.types.keys() == {"float32"} for part in report.parts)
        assert f"family {family}" in dict(report.evidence)
        width, words = FITS[family]
        assert report.fits[0].endswith(f"whose prompt is {width} wide") and report.fits[1] == f"embeddings {words} wide"
    parts = [{part.name: part.parameters for part in report.parts} for report in reports]
    assert parts[0] == parts[1] and reports[1].on_disk == single.stat().st_size


def test_nan_and_infinity_are_found_by_name(tmp_path: Path) -> None:
    tensors = {name: t.half() for name, t in models.ldm_tensors().items()}
    names = [n for n in tensors if n.startswith("model.diffusion_model.")][:2]
    tensors[names[0]].view(-1)[1] = float("nan")
    tensors[names[1]].view(-1)[-1] = float("inf")
    tensors[names[1]].view(-1)[0] = float("nan")
    write_weights(tmp_path / "bad.safetensors", tensors)
    steps: list[tuple[int, int]] = []
    report = examine(tmp_path / "bad.safetensors", progress=lambda done, total: steps.append((done, total)))
    assert report.non_finite == {names[0]: "NaN", names[1]: "NaN and Inf"} and report.exit_code == 1
    assert steps[-1][0] == steps[-1][1] == sum(t.nbytes for t in tensors.values())


def test_numbers_in_eight_bits_are_read(tmp_path: Path) -> None:
    bad = torch.ones(4, 4).to(torch.float8_e4m3fn)
    bad.view(torch.uint8)[0, 0] = 0x7F  # NaN, of which there is no other way to write it
    write_weights(tmp_path / "bad.safetensors", {"a.weight": bad, "b.weight": torch.ones(2)})
    assert examine(tmp_path / "bad.safetensors").non_finite == {"a.weight": "NaN"}


def test_missing_and_strange_tensors_are_named(tmp_path: Path) -> None:
    tensors = models.ldm_tensors()
    gone = "model.diffusion_model.out.0.weight"
    del tensors[gone]
    write_weights(tmp_path / "bad.safetensors", tensors)
    report = examine(tmp_path / "bad.safetensors")
    unet = next(part for part in report.parts if part.name == "unet")
    assert unet.missing == ("conv_norm_out.weight",) and unet.unexpected == ()
    assert any("1 tensors missing, the first is 'conv_norm_out.weight'" in p for p in report.problems)
    assert report.family == "sd1" and report.exit_code == 1
    write_weights(tmp_path / "more.safetensors", models.ldm_tensors() | {"first_stage_model.strange": torch.ones(2)})
    assert any("strange" in problem for problem in examine(tmp_path / "more.safetensors").problems)


def test_a_part_that_is_missing_is_a_problem(tmp_path: Path) -> None:
    tensors = {n: t for n, t in models.ldm_tensors().items() if not n.startswith("first_stage_model.")}
    write_weights(tmp_path / "no-vae.safetensors", tensors)
    report = examine(tmp_path / "no-vae.safetensors")
    assert report.family == "sd1" and any("no vae" in problem for problem in report.problems)
    folder = models.folder(tmp_path / "folder")
    shutil.rmtree(folder / "vae")
    assert any("vae" in problem for problem in examine(folder).problems)


def test_averaged_copies_and_leftovers_are_counted_apart(tmp_path: Path) -> None:
    tensors = models.ldm_tensors()
    copies = {f"model_ema.{i}": torch.ones(3) for i in range(4)}
    write_weights(tmp_path / "full.safetensors", {**tensors, **copies, "alphas_cumprod": torch.ones(9)})
    report = examine(tmp_path / "full.safetensors")
    assert report.averaged and not report.pruned and report.problems == ()
    assert report.notes == ("1 tensors that no picture needs",)
    assert report.memory["float32"] == 4 * sum(t.numel() for t in tensors.values())


def test_code_in_a_pickle_is_told_and_not_executed(tmp_path: Path) -> None:
    torch.save({"emb_params": torch.ones(2, 768), "args": argparse.Namespace(path="x")}, tmp_path / "odd.pt")
    report = examine(tmp_path / "odd.pt")
    assert report.format == "torch" and any("argparse.Namespace" in call for call in report.code)
    assert report.kind == "embedding (textual inversion)" and report.exit_code == 0


def test_a_hostile_pickle_is_refused_and_named(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    evil = tb.call("os.system", tb.text(f"touch {ran}"))
    (tmp_path / "evil.ckpt").write_bytes(tb.archive(tb.table(("a.weight", tb.tensor()), ("b", evil))))
    report = examine(tmp_path / "evil.ckpt")
    assert report.kind == "refused" and report.exit_code == 2 and "calls os.system" in report.problems[0]
    assert not ran.exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG....", b"<html>", bytes(100), (9 << 40).to_bytes(8, "little") + b"{}"]
)
def test_a_refused_file_is_a_report(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.safetensors").write_bytes(content)
    report = examine(tmp_path / "bad.safetensors")
    assert report.kind == "refused" and report.exit_code == 2 and len(report.problems) == 1
    assert report.on_disk == len(content) and "\n" not in report.problems[0]


def test_what_is_not_there_is_a_report(tmp_path: Path) -> None:
    assert examine(tmp_path / "none").exit_code == 2
    (tmp_path / "empty").mkdir()
    assert "holds no weight files; found nothing" in examine(tmp_path / "empty").problems[0]


def lora(width: int, **names: str) -> dict[str, Tensor]:
    end = names.get("end", "lora_down.weight")
    return {
        f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.{end}": torch.ones(8, width),
        "lora_te_text_model_encoder_layers_0_self_attn_k_proj.lora_up.weight": torch.ones(3, 8),
    }


OTHERS: list[tuple[str, dict[str, Tensor], tuple[str, ...], str]] = [
    ("LoRA", lora(768), ("Stable Diffusion 1",), "rank 8"),
    ("LoRA", lora(1024), ("Stable Diffusion 2",), "trained: denoising network and text encoder"),
    ("LoRA", lora(2048), ("Stable Diffusion XL",), "algorithm LoRA"),
    ("LoRA", lora(2048, end="hada_w1_b"), ("Stable Diffusion XL",), "algorithm LoHa"),
    ("LoRA", {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.lora_A.weight": torch.ones(4, 768)},
     ("Stable Diffusion 1",), "rank 4"),
    ("LoRA", {"transformer.transformer_blocks.3.attn.add_k_proj.lora_A.weight": torch.ones(4, 64)},
     ("Stable Diffusion 3 (at least 4 blocks)",), "rank 4"),
    ("LoRA", {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(4, 64)}, ("Flux",), "rank 4"),
    ("LoRA", lora(999), ("a model whose prompt is 999 wide",), "rank 8"),
    ("ControlNet", {"controlnet_cond_embedding.conv_in.weight": torch.ones(1, 3, 3, 3),
                    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.ones(2, 768)},
     ("Stable Diffusion 1",), ""),
    ("ControlNet", {"control_model.input_hint_block.0.weight": torch.ones(1, 3, 3, 3),
                    "control_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.ones(2, 1024)},
     ("Stable Diffusion 2",), ""),
    ("IP-Adapter", {"image_proj.proj.weight": torch.ones(2, 2), "ip_adapter.1.to_k_ip.weight": torch.ones(3, 768)},
     ("Stable Diffusion 1",), ""),
    ("T2I-Adapter", {"adapter.body.0.in_conv.weight": torch.ones(1)}, (), ""),
    ("embedding (textual inversion)", {"emb_params": torch.ones(3, 768)}, ("Stable Diffusion 1",), "3 vectors"),
    ("embedding (textual inversion)", {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)},
     ("Stable Diffusion XL",), "1 vector, 768 and 1280 wide"),
    ("embedding (textual inversion)", {"<cat>": torch.ones(1024)}, ("Stable Diffusion 2",), "1 vector"),
    ("upscaler", {"model.1.sub.0.RDB1.conv1.0.weight": torch.ones(1)}, (), "architecture ESRGAN"),
    ("upscaler", {f"body.{i}.{leaf}": torch.ones(1) for i in range(3) for leaf in ("weight", "bias")}, (),
     "architecture compact (SRVGG)"),
    ("TAESD, a small VAE", {"decoder.layers.0.weight": torch.ones(1)}, (), ""),
    ("image encoder", {"vision_model.embeddings.class_embedding": torch.ones(1)}, (), ""),
    ("motion module (AnimateDiff)", {"down_blocks.0.motion_modules.0.norm.weight": torch.ones(1)}, (), ""),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "tensors", "fits", "fact"), OTHERS)
def test_files_that_are_no_checkpoint(
    kind: str, tensors: dict[str, Tensor], fits: tuple[str, ...], fact: str, tmp_path: Path
) -> None:
    write_weights(tmp_path / "other.safetensors", tensors)
    report = examine(tmp_path / "other.safetensors")
    assert (report.kind, report.fits, report.exit_code, report.problems) == (kind, fits, 0, ())
    assert any(fact in note for note in report.notes) or not fact


def test_parts_alone_are_told_apart(folders: Path) -> None:
    folder = tiny_families.made("sd1", folders)
    assert examine(folder / "vae/diffusion_pytorch_model.safetensors").kind == "VAE"
    assert examine(folder / "text_encoder/model.safetensors").kind == "text encoder"


def test_a_published_embedding_of_torch(tmp_path: Path) -> None:
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 768)}, "name": "x"},
               tmp_path / "x.pt")  # fmt: skip
    report = examine(tmp_path / "x.pt")
    assert (report.kind, report.fits) == ("embedding (textual inversion)", ("Stable Diffusion 1",))


def test_what_peft_and_diffusers_write_is_a_lora(tmp_path: Path) -> None:
    peft: Any = import_module("peft")
    unet = tiny.unet(cross_attention_dim=768)
    unet.add_adapter(peft.LoraConfig(r=4, target_modules=["to_k", "to_v"]))
    layers = peft.get_peft_model_state_dict(unet)
    tiny_families.diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    report = examine(tmp_path / "pytorch_lora_weights.safetensors")
    assert (report.kind, report.fits) == ("LoRA", ("Stable Diffusion 1",)) and "rank 4" in report.notes


def test_the_command_prints_lines_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = models.folder(tmp_path / "folder")
    assert run_doctor(folder, None, as_json=False) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:14].strip(): line[14:] for line in lines}
    assert rows["family"] == "sd1" and rows["verdict"] == "nothing wrong was found"
    assert run_doctor(folder, None, as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["family"] == "sd1" and {part["name"] for part in report["parts"]} == {"text_encoder", "unet", "vae"}
    assert run_doctor(tmp_path / "none", None, as_json=True) == 2
    assert json.loads(capsys.readouterr().out)["kind"] == "refused"
