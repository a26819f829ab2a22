"""`reverie inspect`: what a checkpoint is, and why."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from reverie.checkpoint.save import write_weights
from tests.apps import models
from tests.apps.commandline import CommandLine

PARTS = ("text_encoder", "unet", "vae")


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def report(cli: CommandLine, *words: object) -> dict[str, Any]:
    ran = cli("inspect", *words, "--json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert isinstance(found, dict)
    return found


def count(path: Path) -> int:
    """Numbers in a file, by the reference library."""
    with safe_open(path, "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118


def test_a_folder(cli: CommandLine, folder: Path) -> None:
    found = report(cli, folder)
    assert found["path"] == str(folder)
    assert (found["family"], found["layout"], found["prediction"]) == ("sd1", "diffusers folder", "epsilon")
    claims = dict(found["evidence"])
    assert "StableDiffusionPipeline" in claims["family sd1"]
    assert "scheduler_config.json" in claims["prediction epsilon"]
    assert tuple(found["parts"]) == PARTS
    for part in found["parts"].values():
        (file,) = map(Path, part["files"])
        assert part["parameters"] == count(file)
        assert part["precision"] == "float32"
    asked = {"sampler": "ddim", "spacing": "leading", "steps": 2, "guidance_scale": 3.0, "width": 32, "height": 32}
    assert asked.items() <= found["defaults"].items()


def test_the_hash_of_a_folder_is_that_of_its_files_hashes(cli: CommandLine, folder: Path) -> None:
    found = report(cli, folder)
    files = sorted(Path(file) for part in found["parts"].values() for file in part["files"])
    together = b"".join(bytes.fromhex(sha(file)) for file in files)
    assert found["sha256"] == hashlib.sha256(together).hexdigest()


def test_a_single_file(cli: CommandLine, single: Path) -> None:
    found = report(cli, single)
    assert (found["family"], found["layout"], found["prediction"]) == ("sd1", "single file (LDM)", "epsilon")
    assert "no sign of v-prediction" in dict(found["evidence"])["prediction epsilon"]
    assert found["sha256"] == sha(single)
    assert sum(part["parameters"] for part in found["parts"].values()) == count(single)
    assert {part["precision"] for part in found["parts"].values()} == {"float16"}
    assert (found["defaults"]["sampler"], found["defaults"]["spacing"]) == ("pndm", "leading")
    assert (found["defaults"]["steps"], found["defaults"]["width"]) == (50, 64 * models.FACTOR)


@pytest.mark.parametrize(
    ("metadata", "extra", "evidence"),
    [
        ({"modelspec.prediction_type": "v"}, False, "metadata modelspec.prediction_type = 'v'"),
        ({}, True, "tensor v_pred"),
    ],
)
def test_v_prediction_is_seen(
    cli: CommandLine, single: Path, tmp_path: Path, metadata: dict[str, str], extra: bool, evidence: str
) -> None:
    tensors = load_file(single)
    if extra:
        tensors["v_pred"] = tensors[next(iter(tensors))].flatten()[:1].clone()
    save_file(tensors, tmp_path / "v.safetensors", metadata)
    found = report(cli, tmp_path / "v.safetensors")
    assert found["prediction"] == "v_prediction"
    assert dict(found["evidence"])["prediction v_prediction"] == evidence


def test_precisions_are_told_apart(cli: CommandLine, single: Path, tmp_path: Path) -> None:
    tensors = {n: t.float() if n.startswith("first_stage_model.decoder") else t for n, t in load_file(single).items()}
    save_file(tensors, tmp_path / "mixed.safetensors")
    parts = report(cli, tmp_path / "mixed.safetensors")["parts"]
    assert parts["unet"]["precision"] == "float16"
    assert set(parts["vae"]["precision"].split(" and ")) == {"float16", "float32"}


def test_the_ending_does_not_matter(cli: CommandLine, single: Path, tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(single.read_bytes())
    assert report(cli, tmp_path / "model.ckpt")["family"] == "sd1"


def test_a_folder_in_shards(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    path = models.folder(tmp_path / "tiny")
    whole = path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    files = {name: f"diffusion_pytorch_model-0000{1 + (i > 9)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        write_weights(path / "unet" / file, {n: tensors[n] for n in names if files[n] == file})
    index = path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}), encoding="utf-8")
    found, plain = report(cli, path)["parts"]["unet"], report(cli, folder)["parts"]["unet"]
    assert found["parameters"] == plain["parameters"]
    assert len(found["files"]) == 2


def test_a_variant(cli: CommandLine, tmp_path: Path) -> None:
    path = models.folder(tmp_path / "tiny")
    for file in path.rglob("*.safetensors"):
        write_weights(file.with_suffix(".fp16.safetensors"), {n: t.half() for n, t in load_file(file).items()})
    assert {part["precision"] for part in report(cli, path)["parts"].values()} == {"float32"}
    halves = report(cli, path, "--variant", "fp16")["parts"]
    assert {part["precision"] for part in halves.values()} == {"float16"}
    assert all(".fp16." in file for part in halves.values() for file in part["files"])
    assert "bf16.safetensors" in cli.refused("inspect", path, "--variant", "bf16")


def test_the_table_says_the_same(cli: CommandLine, folder: Path) -> None:
    found = report(cli, folder)
    ran = cli("inspect", folder)
    assert (ran.code, ran.err) == (0, "")
    rows = dict(line.split(maxsplit=1) for line in ran.out.splitlines() if not line.startswith("because"))
    assert {key: rows[key] for key in ("path", "family", "layout", "prediction", "sha256")} == {
        key: found[key] for key in ("path", "family", "layout", "prediction", "sha256")
    }
    assert rows["unet"] == f"{found['parts']['unet']['parameters']:,} parameters, float32"
    assert ran.out.count("because") == len(found["evidence"])
    assert found["sha256"][:10] in ran.out.replace(found["sha256"], "")


def test_odd_paths_are_printed_as_they_are(cli: CommandLine, single: Path, tmp_path: Path) -> None:
    path = tmp_path / "[red]a b[/bold]" / ("long" * 30) / "[].safetensors"
    path.parent.mkdir(parents=True)
    path.symlink_to(single)
    ran = cli("inspect", path)
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[0].endswith(f"  {path}")


def test_samplers(cli: CommandLine) -> None:
    listed = json.loads(cli("samplers", "--json").out)
    names = [row["name"] for row in listed["samplers"]]
    assert {"euler", "ddim", "dpmpp_2m"} <= set(names)
    table = cli("samplers")
    assert table.code == 0
    for name in [*names, *(row["name"] for row in listed["spacings"])]:
        assert name in table.out
