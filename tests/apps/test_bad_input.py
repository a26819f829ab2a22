"""What people get wrong, and what they are told: one line, exit code 2, nothing written.

A failure of the mathematics exits 1, an interrupted run 130.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from reverie.checkpoint.save import write_weights
from tests.apps.commandline import CommandLine, environment, one_line, run_apart

WEIGHTS = "diffusion_pytorch_model.safetensors"
Change = Callable[[dict[str, Tensor]], object]
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where the picture would go; checks that nothing went there."""
    folder = tmp_path / "out"
    folder.mkdir()
    yield folder / "a.png"
    assert list(folder.iterdir()) == []


@pytest.fixture
def mine(folder: Path, tmp_path: Path) -> Path:
    """A copy of the model to spoil."""
    return Path(shutil.copytree(folder, tmp_path / "mine"))


def spoil_tensors(file: Path, change: Change) -> None:
    tensors = {name: t.clone() for name, t in load_file(file).items()}
    change(tensors)
    write_weights(file, tensors)


def spoil_json(file: Path, edit: Edit) -> None:
    value = json.loads(file.read_text(encoding="utf-8"))
    edit(value)
    file.write_text(json.dumps(value), encoding="utf-8")


# The model is not one


def sound() -> bytes:
    import safetensors.torch

    return bytes(safetensors.torch.save({"a.weight": torch.ones(8)}))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, ["no model", "no such path, and none of that name", "reverie models"]),
        (b"", ["empty (0 bytes)"]),
        (sound()[:30], ["cut short inside its header", "download it again"]),
        (sound()[:-9], ["cut short", "32 bytes of data", "23", "download it again"]),
        (b"these are the weights, honestly", ["not a safetensors file", "text", "'these are the weights,"]),
        (b"<html>404", ["web page"]),
        (b"PK\3\4" + b"\0" * 60, ["zip archive", ".ckpt"]),
        (sound(), ["no family", "1 tensors, the first are a.weight"]),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "inspect"])
def test_files_that_are_no_model(
    cli: CommandLine, verb: str, content: bytes | None, said: list[str], tmp_path: Path, out: Path
) -> None:
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    elif verb == "inspect":
        said = ["no such file"]
    words = ["generate", "apple", "--out", out, "--model", path] if verb == "generate" else ["inspect", path]
    line = cli.refused(*words)
    assert str(path) in line
    for word in said:
        assert word in line


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model.diffusion_model.input_blocks.0.0.weight", "conditioner.embedders.1.model.ln"], "Stable Diffusion XL"),
        (["conditioner.embedders.0.model.ln"], "the Stable Diffusion XL refiner"),
        (["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.model.ln"], "Stable Diffusion 2"),
        (["model.diffusion_model.joint_blocks.0.x"], "Stable Diffusion 3"),
        (["double_blocks.0.img_attn.qkv.weight"], "Flux"),
        (["lora_unet_down_blocks_0.lora_up.weight"], "a LoRA, not a checkpoint"),
        (["unet.down_blocks.0.attn.lora_A.weight"], "a LoRA, not a checkpoint"),
        (["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.x"], "a ControlNet, not a checkpoint"),
        (["control_model.input_hint_block.0.weight"], "a ControlNet, not a checkpoint"),
        (["down_blocks.0.resnets.0.conv1.weight"], "one part of a diffusers folder"),
        (["x.weight", "y.weight", "z.weight", "w.weight"], "4 tensors, the first are"),
    ],
)
def test_other_kinds_of_model_are_named(
    cli: CommandLine, names: list[str], said: str, tmp_path: Path, out: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(1) for name in names}, path)
    assert said in cli.refused("generate", "apple", "--model", path, "--out", out)


# A folder that is not whole


def test_a_folder_without_index(cli: CommandLine, tmp_path: Path) -> None:
    assert "no model_index.json; found nothing" in cli.refused("inspect", _made(tmp_path / "a"))
    (tmp_path / "a" / "notes.txt").touch()
    assert "found notes.txt" in cli.refused("inspect", tmp_path / "a")


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def test_another_pipeline(cli: CommandLine, mine: Path) -> None:
    spoil_json(mine / "model_index.json", lambda index: index.update(_class_name="StableDiffusionXLPipeline"))
    line = cli.refused("inspect", mine)
    assert "StableDiffusionXLPipeline" in line
    assert "opens StableDiffusionPipeline" in line


CONFIGS = ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
           "scheduler/scheduler_config.json", "tokenizer/vocab.json", "reverie.json"]  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[" * 100_000], ids=repr)
def test_broken_json(cli: CommandLine, mine: Path, name: str, content: bytes) -> None:
    (mine / name).write_bytes(content)
    assert Path(name).name in cli.refused("inspect", mine)


def test_merges_that_do_not_belong(cli: CommandLine, mine: Path, out: Path) -> None:
    """They are put together at the first prompt, and refused there."""
    (mine / "tokenizer" / "merges.txt").write_text("#version: 0.2\nqq zz\n", encoding="utf-8")
    line = cli.refused("generate", "apple", "--model", mine, "--out", out)
    assert f"The merges of {mine / 'tokenizer'} do not belong" in line


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in {"model_index.json", "reverie.json"}])
def test_a_file_of_the_folder_is_missing(cli: CommandLine, mine: Path, name: str) -> None:
    (mine / name).unlink()
    line = cli.refused("inspect", mine)
    assert Path(name).name in line
    assert "missing" in line


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_weights_are_missing(cli: CommandLine, mine: Path, part: str) -> None:
    (mine / part / WEIGHTS).rename(mine / part / "weights.safetensors")
    line = cli.refused("inspect", mine)
    assert f"no {WEIGHTS} in {mine / part}" in line
    assert "found config.json, weights.safetensors" in line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("conv_in.bias"), ["1 tensor (conv_in.bias) missing"]),
        (lambda t: t.update(extra=torch.zeros(1)), ["1 tensor (extra) not expected"]),
        (lambda t: t.update({"conv_in.bias": torch.zeros(3)}), ["conv_in.bias", "[3] found, [32] expected"]),
        (lambda t: t.update({"conv_in.bias": torch.zeros(32, dtype=torch.int8)}), ["conv_in.bias", "int8"]),
    ],
)
def test_tensors_that_do_not_fit(cli: CommandLine, mine: Path, out: Path, change: Change, said: list[str]) -> None:
    spoil_tensors(mine / "unet" / WEIGHTS, change)
    line = cli.refused("generate", "apple", "--model", mine, "--out", out)
    assert str(mine / "unet") in line
    for word in said:
        assert word in line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.diffusion_model.out.2.weight"), "out.2.weight is missing"),
        (lambda t: t.pop("model.diffusion_model.time_embed.0.bias"), "time_embedding.linear_1.bias) missing"),
        (lambda t: t.update({"model.diffusion_model.label_emb.0.0.weight": torch.zeros(1)}), "label_emb.0.0.weight"),
        (lambda t: t.update({"first_stage_model.quant_conv.bias": torch.zeros(3)}), "[3] found, [8] expected"),
    ],
)
def test_a_single_file_that_does_not_fit(
    cli: CommandLine, single: Path, tmp_path: Path, change: Change, said: str
) -> None:
    path = tmp_path / "ldm.safetensors"
    shutil.copyfile(single, path)
    spoil_tensors(path, change)
    assert said in cli.refused("inspect", path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("file", "name"),
    [
        (f"unet/{WEIGHTS}", "mid_block.resnets.0.conv1.weight"),
        (f"vae/{WEIGHTS}", "decoder.conv_out.bias"),
        ("text_encoder/model.safetensors", "text_model.final_layer_norm.weight"),
    ],
)
def test_weights_that_are_not_numbers(
    cli: CommandLine, mine: Path, out: Path, file: str, name: str, bad: float
) -> None:
    spoil_tensors(mine / file, lambda t: t[name].view(-1)[-1:].fill_(bad))
    line = cli.refused("generate", "apple", "--model", mine, "--out", out)
    assert name in line
    assert "NaN or infinite" in line


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lambda c: c.update(_class_name="AmusedScheduler"),
            "AmusedScheduler is not known; known: ",
        ),
        (lambda c: c.update(clip_sample=True), "clip_sample is true"),
        (lambda c: c.pop("clip_sample"), "clip_sample is true (or absent"),
        (lambda c: c.update(thresholding=True), "thresholding = True is not supported"),
        (lambda c: c.update(beta_schedule="sigmoid"), "beta_schedule 'sigmoid' is not one of"),
        (lambda c: c.update(prediction_type="score"), "prediction_type 'score' is not one of"),
        (lambda c: c.update(timestep_spacing="random"), "timestep_spacing is 'random'"),
    ],
)
def test_schedulers_that_are_not_known(cli: CommandLine, mine: Path, edit: Edit, said: str) -> None:
    spoil_json(mine / "scheduler" / "scheduler_config.json", edit)
    assert said in cli.refused("inspect", mine)


@pytest.mark.parametrize(
    ("part", "edit", "said"),
    [
        ("unet", lambda c: c.update(act_fn="gelu"), "act_fn is 'gelu'; Stable Diffusion has 'silu'"),
        ("unet", lambda c: c.update(addition_embed_type="text_time"), "addition_embed_type"),
        ("unet", lambda c: c.update(down_block_types=["DownBlock2D", "AttnDownBlock2D"]), "AttnDownBlock2D"),
        ("unet", lambda c: c.update(in_channels=9), "[32, 9, 3, 3] expected"),
        ("vae", lambda c: c.update(shift_factor=0.1), "shift_factor"),
        ("text_encoder", lambda c: c.update(hidden_act="relu"), "hidden_act has 'relu'"),
    ],
)
def test_networks_that_are_not_known(cli: CommandLine, mine: Path, part: str, edit: Edit, said: str) -> None:
    spoil_json(mine / part / "config.json", edit)
    assert said in cli.refused("inspect", mine)


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("unet", "in_channels"),
        ("unet", "cross_attention_dim"),
        ("vae", "layers_per_block"),
        ("text_encoder", "hidden_size"),
    ],
)
@pytest.mark.parametrize("value", ["abc", -3, 1.5, [], {}], ids=repr)
def test_configs_with_impossible_values(cli: CommandLine, mine: Path, part: str, key: str, value: object) -> None:
    spoil_json(mine / part / "config.json", lambda c: c.update({key: value}))
    cli.refused("inspect", mine)


def test_a_config_that_divides_by_zero(cli: CommandLine, mine: Path) -> None:
    spoil_json(mine / "unet" / "config.json", lambda c: c.update(norm_num_groups=0))
    assert "norm_num_groups" in cli.refused("inspect", mine)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("unet/config.json", "block_out_channels"),
        ("unet/config.json", "down_block_types"),
        ("vae/config.json", "up_block_types"),
        ("scheduler/scheduler_config.json", "beta_start"),
        ("scheduler/scheduler_config.json", "steps_offset"),
        ("reverie.json", "defaults"),
    ],
)
def test_configs_with_values_of_a_wrong_type(cli: CommandLine, mine: Path, name: str, key: str) -> None:
    spoil_json(mine / name, lambda c: c.update({key: None}))
    assert key in cli.refused("inspect", mine)


@pytest.mark.parametrize("defaults", [{"steps": "many"}, {"stepz": 3}, {"sampler": "none of ours"}], ids=repr)
def test_defaults_that_cannot_be(cli: CommandLine, mine: Path, defaults: dict[str, Any]) -> None:
    spoil_json(mine / "reverie.json", lambda c: c.update(defaults=defaults))
    assert "reverie.json" in cli.refused("inspect", mine)


def test_nan_in_eight_bits(cli: CommandLine, mine: Path, out: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["conv_in.bias"][0] = float("nan")
        tensors.update({name: t.to(torch.float8_e4m3fn) for name, t in tensors.items()})

    spoil_tensors(mine / "unet" / WEIGHTS, change)
    assert "conv_in.bias" in cli.refused("generate", "apple", "--model", mine, "--out", out)


# The request


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["apple", "--width", "100"], ["width is 100", "multiple of 8", "nearest is 96"]),
        (["apple", "--height", "20"], ["height is 20", "multiple of 8"]),
        (["apple", "--width", "0"], ["width is 0"]),
        (["apple", "--height", "-8"], ["height is -8"]),
        (["apple", "--steps", "0"], ["steps is 0", "greater than or equal to 1"]),
        (["apple", "--steps", "1001"], ["steps is 1001"]),
        (["apple", "--steps", "abc"], ["--steps", "abc", "integer"]),
        (["apple", "--steps", "2.5"], ["--steps", "2.5"]),
        (["apple", "--guidance-scale", "nan"], ["guidance_scale is nan"]),
        (["apple", "--guidance-scale", "inf"], ["guidance_scale is inf"]),
        (["apple", "--guidance-scale", "-1"], ["guidance_scale is -1"]),
        (["apple", "--seed", "-1"], ["seed is -1", "greater than or equal to 0"]),
        (["apple", "--seed", str(2**63)], ["seed is"]),
        (["apple", "--count", "0"], ["count is 0"]),
        (["apple", "--batch-size", "0"], ["batch_size is 0"]),
        (["apple", "--clip-skip", "3"], ["clip_skip is 3", "has 2 layers"]),
        (["apple", "--sampler", "eular"], ["unknown sampler 'eular'", "did you mean 'euler'"]),
        (["apple", "--spacing", "karass"], ["unknown spacing 'karass'", "did you mean 'karras'"]),
        (["apple", "--upscaler", "esrgan"], ["no upscaler 'esrgan'", "realesr"]),
        (["apple", "--sampler", "heun", "--eta", "0.5"], ["heun has no option 'eta'"]),
        (["apple", "--eta", "2"], ["eta is 2"]),
        (["apple", "--device", "tpu9"], ["device 'tpu9'", "use cpu or auto"]),
        (["apple", "--device", "cuda:77"], ["device 'cuda:77'"]),
        (["apple", "--precision", "float8"], ["--precision", "float8", "bfloat16"]),
        (["apple", "--prediction", "score"], ["unknown prediction type 'score'"]),
        (["apple", "--variant", "fp16"], ["no model.fp16.safetensors", "found model.safetensors"]),
        (["apple", "--sampel", "euler"], ["--sampel"]),
        (["apple", "pear"], ["pear"]),
        (["apple", "--steps"], ["--steps"]),
        ([""], ["no prompt"]),
        ([], ["no prompt"]),
    ],
    ids=" ".join,
)
def test_requests_that_cannot_be(cli: CommandLine, folder: Path, out: Path, words: list[str], said: list[str]) -> None:
    line = cli.refused("generate", *words, "--model", folder, "--out", out)
    for word in said:
        assert word in line


def test_an_unknown_verb(cli: CommandLine) -> None:
    assert "draw" in cli.refused("draw", "apple")


# Where the picture goes


def test_an_ending_that_no_picture_has_is_refused_before_any_work(cli: CommandLine, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for name in ("a.xyz", "a.safetensors", "a.pdfx", "a.txt"):
        line = cli.refused("generate", "apple", "--model", tmp_path / "none", "--out", folder / name)
        assert name in line
        assert "use .png, .jpg or .webp" in line
    assert not folder.exists()


def test_the_folder_is_a_file(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for target in ("file", "file/a.png", "file/deeper/a.png"):
        line = cli.refused("generate", "apple", "--model", folder, "--out", tmp_path / target)
        assert f"cannot write to {tmp_path / 'file'}" in line
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_the_file_is_a_folder(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a-2.png").mkdir()
    line = cli.refused("generate", "apple", "--count", 2, "--model", folder, "--out", tmp_path / "a.png")
    assert "a-2.png: it is a folder" in line
    assert {p.name for p in tmp_path.iterdir()} == {"a-2.png"}


def test_a_place_that_may_not_be_written(cli: CommandLine, folder: Path) -> None:
    line = cli.refused("generate", "apple", "--model", folder, "--out", "/proc/reverie/a.png")
    assert "cannot write to /proc/reverie" in line


def test_no_space_left(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a file system here")
    try:
        (disk / "a.png").write_text("old", encoding="utf-8")
        size = ["--width", 64, "--height", 64, "--steps", 1]
        line = cli.refused("generate", "apple", *size, "--model", folder, "--out", disk / "a.png")
        assert f"cannot write {disk / 'a.png'}: No space left on device" in line
        assert {p.name: p.read_text(encoding="utf-8") for p in disk.iterdir()} == {"a.png": "old"}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --from


def drawn_by(path: Path, text: object) -> Path:
    """A PNG with some text where the request belongs."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("reverie", text if isinstance(text, str) else json.dumps(text))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_from_what_is_no_picture(cli: CommandLine, tmp_path: Path, out: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture", encoding="utf-8")
    (tmp_path / "empty.png").touch()
    Image.new("RGB", (64, 64)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:20])
    for name in ("text.png", "empty.png", "cut.png"):
        assert f"{name} is not a picture that can be read" in cli.refused(
            "generate", "--from", tmp_path / name, "--out", out
        )
    assert "no such picture" in cli.refused("generate", "--from", tmp_path / "none.png", "--out", out)
    assert "is not a file" in cli.refused("generate", "--from", tmp_path, "--out", out)


@pytest.mark.timeout(20)
@pytest.mark.skipif(sys.platform == "win32", reason="no pipes in the file system")
def test_from_a_pipe(cli: CommandLine, tmp_path: Path, out: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert "is not a file" in cli.refused("generate", "--from", tmp_path / "pipe.png", "--out", out)


def test_from_a_picture_of_someone_else(cli: CommandLine, tmp_path: Path, out: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    line = cli.refused("generate", "--from", tmp_path / "a.png", "--out", out)
    assert "does not carry a request of Reverie" in line


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "null", {}, {"request": {}}, {"request": 3, "model": {}}, {"request": {}, "model": 3},
     {"request": {}, "model": ["a"]}, "[" * 100_000],
    ids=lambda text: str(text)[:30],
)  # fmt: skip
def test_from_a_broken_request(cli: CommandLine, tmp_path: Path, out: Path, text: object) -> None:
    line = cli.refused("generate", "--from", drawn_by(tmp_path / "a.png", text), "--out", out)
    assert "does not carry a request of Reverie" in line


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"prompt": "a", "stepz": 3}, "unknown field 'stepz'; did you mean steps?"),
        ({"prompt": "a", "cls": 3}, "unknown field 'cls'"),
        ({"prompt": "a", "steps": "many"}, "steps is 'many'"),
        ({"prompt": ["a"]}, "prompt is ['a']"),
        ({"prompt": None}, "prompt is None"),
        ({"prompt": "a", "sampler": "none of ours"}, "unknown sampler"),
    ],
)
def test_from_a_request_that_cannot_be(
    cli: CommandLine, folder: Path, tmp_path: Path, out: Path, request_: dict[str, Any], said: str
) -> None:
    picture = drawn_by(tmp_path / "a.png", {"request": request_, "model": {}})
    assert said in cli.refused("generate", "--from", picture, "--model", folder, "--out", out)


@pytest.mark.parametrize("source", ["gone", 3, ["a"], "/dev/zero"])
def test_from_a_picture_whose_model_is_gone(cli: CommandLine, tmp_path: Path, out: Path, source: object) -> None:
    made_by = {"name": "mine", "source": source, "hash": "0"}
    picture = drawn_by(tmp_path / "a.png", {"request": {"prompt": "a"}, "model": made_by})
    assert str(source) in cli.refused("generate", "--from", picture, "--out", out)


# In a process of its own


@pytest.mark.parametrize(
    "words", [["generate", "apple", "--steps", "0"], ["inspect", "/none/model.safetensors"], ["nothing"]]
)
def test_the_entry_itself_prints_one_line(words: list[str], tmp_path: Path) -> None:
    one_line(run_apart(*words, *(["--out", tmp_path / "a.png"] if words[0] == "generate" else [])), 2)


def test_debug_shows_where(cli: CommandLine, tmp_path: Path) -> None:
    ran = cli("inspect", tmp_path / "none", "--debug")
    assert ran.code == 2
    assert "Traceback" in ran.err
    assert ran.err.splitlines()[-1].startswith("error: no such file")


# Failures and interruptions


def test_overflow_in_the_network_exits_1(cli: CommandLine, mine: Path, out: Path) -> None:
    spoil_tensors(mine / "unet" / WEIGHTS, lambda t: t["conv_out.weight"].fill_(3e38))
    line = one_line(cli("generate", "apple", "--model", mine, "--out", out), 1)
    assert "is not finite" in line
    assert "precision" in line


def test_overflow_in_the_autoencoder_exits_1(cli: CommandLine, mine: Path, out: Path) -> None:
    spoil_tensors(mine / "vae" / WEIGHTS, lambda t: t["post_quant_conv.weight"].fill_(3e38))
    line = one_line(cli("generate", "apple", "--model", mine, "--out", out), 1)
    assert "decoded picture is not finite" in line


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for another process")
def test_interrupted_it_stops_within_a_step_and_leaves_nothing(folder: Path, out: Path) -> None:
    ready = out.parent.parent / "ready"
    # The file tells this test that drawing has begun; the run itself is the command as it is.
    code = f"""
import pathlib, signal, sys
from reverie.apps.cli import main
from reverie.engine.bundle import Model
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit "ignore"
network = Model.network
def tell(*args, **given):
    pathlib.Path({str(ready)!r}).touch()
    return network(*args, **given)
Model.network = tell
sys.argv = ["reverie", "generate", "apple", "--steps", "900", "--count", "1000", "--batch-size", "4",
            "--model", {str(folder)!r}, "--out", {str(out.with_suffix(".jpg"))!r}]
main()
"""
    run = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    try:
        deadline = time.monotonic() + 60
        while not ready.exists() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        assert run.poll() is None, run.stderr.read() if run.stderr else ""
        started = time.monotonic()
        run.send_signal(signal.SIGINT)
        stdout, stderr = run.communicate(timeout=30)
        assert time.monotonic() - started < 20  # a step is milliseconds; the rest is a busy machine
    finally:
        run.kill()
    assert run.returncode == 130
    assert stdout == ""
    assert stderr == "interrupted\n"
