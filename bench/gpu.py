"""What does one denoising step take on a CUDA card, as it is, compiled, in 8 bits, and in diffusers?

`python bench/gpu.py [--only NAME ...] [--rounds 20] [--device cuda] [--tiny]`

Random weights at true size, bfloat16, guidance as one batch: Stable Diffusion 1.5 at 512 pixels with batches of 2 and
8, SDXL at 1024 pixels with a batch of 2. Subjects in turn in one process, medians of rounds, each round long enough for
the clock. The card's peak in bfloat16 is measured in the same run, and the work is counted, so that every figure is
also a share of the peak. `first` is the first evaluation, compilation with it, in a process of its own: cold with an
empty cache of compiled code, warm with the one that this has left. `--tiny --device cpu` only shows that it runs.
"""

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from common import into_document, machine, spread, versions, write
from speed import SDXL
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from reverie.checkpoint.quantising import quantise
from reverie.engine.compiling import Compiler, compiled
from reverie.nets.unet import UNet, UNetConfig
from reverie.types import Taps

HEADING = "## CUDA"
SMALL = UNetConfig(block_out_channels=(32, 64), attention=(1, 1), heads=(2, 2), layers_per_block=1, context_width=64)
SETTINGS: dict[str, tuple[UNetConfig, int, int]] = {  # config, side of the latents, batch
    "SD 1.5, 512, batch 2": (UNetConfig(), 64, 2),
    "SD 1.5, 512, batch 8": (UNetConfig(), 64, 8),
    "SDXL, 1024, batch 2": (SDXL, 128, 2),
}
TINY = {"tiny": (SMALL, 8, 2)}
SUBJECTS = ("plain", "compiled", "recorded", "fp8", "int8", "diffusers", "diffusers compiled")
LONG = 0.2  # seconds of a round
Step = Callable[[], object]


def network(config: UNetConfig, device: torch.device) -> UNet:
    """Random weights, the same for every subject."""
    torch.manual_seed(0)
    with torch.device(device):
        made = UNet(config).eval().requires_grad_(False)
    return made.to(torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def inputs(config: UNetConfig, side: int, batch: int, device: torch.device | str) -> dict[str, Tensor]:
    """Latents that come once for each condition, as guidance has them."""
    conditions: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    x = torch.randn(batch // 2, 4, side, side, **conditions).repeat(2, 1, 1, 1)
    found = {
        "x": x.contiguous(memory_format=torch.channels_last),
        "timesteps": torch.full((batch,), 500.0, device=device),
        "context": torch.randn(batch, 77, config.context_width, **conditions),
    }
    if config.vector:
        found["vector"] = torch.randn(batch, config.vector_width, **conditions)
    return found


def peers(config: UNetConfig, own: UNet) -> Any:
    """diffusers' network of the same shape and weights."""
    kind: Any = import_module("diffusers").UNet2DConditionModel
    depths = [config.attention[level] for level in range(len(config.block_out_channels))]
    names = ["CrossAttn" if depth else "" for depth in depths]
    more: dict[str, Any] = {}
    if config.vector:
        more = {"addition_embed_type": "text_time", "addition_time_embed_dim": config.size_width,
                "projection_class_embeddings_input_dim": config.vector_width}  # fmt: skip
    with torch.device("meta"):
        made = kind(
            block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block,
            down_block_types=[f"{name}DownBlock2D" for name in names],
            up_block_types=[f"{name}UpBlock2D" for name in reversed(names)],
            cross_attention_dim=config.context_width, attention_head_dim=list(config.heads),
            transformer_layers_per_block=[depth or 1 for depth in depths],
            use_linear_projection=config.linear_projection, **more,
        )  # fmt: skip
    made.load_state_dict(own.state_dict(), assign=True)
    return made.eval()


def step_of(name: str, config: UNetConfig, given: dict[str, Tensor], device: torch.device) -> Step:
    """One evaluation by a subject.

    Raises:
        RuntimeError: the card cannot do it.
    """
    own = network(config, device)
    if name.startswith("diffusers"):
        other = peers(config, own)
        if name.endswith("compiled"):
            other = torch.compile(other, mode="reduce-overhead", fullgraph=True)
        more: dict[str, Any] = {}
        if config.vector:  # the pooled prompt and six numbers, which diffusers embeds itself
            pooled = given["vector"][:, : -6 * config.size_width]
            more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": pooled[:, :6]}}
        return lambda: other(given["x"], given["timesteps"], given["context"], **more)
    taps = Taps(copies=1 if config.vector else 2)
    run: Any = own
    if name in {"fp8", "int8"}:
        quantise(own, name, device, torch.bfloat16)  # type: ignore[arg-type]
    elif name == "compiled":
        run = compiled(own, Compiler("on", device))
    if name in {"recorded", "fp8", "int8"}:
        run = Compiler("on", device).runner(own)
    return lambda: run(**given, taps=taps)


def finished(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(step: Step, times: int, device: torch.device) -> float:
    finished(device)
    start = time.perf_counter()
    for _ in range(times):
        step()
    finished(device)
    return (time.perf_counter() - start) / times


def peak(device: torch.device, side: int) -> float:
    """FLOP/s of the best of some bfloat16 matrix products."""
    best = 0.0
    for size in (side, side // 2):
        a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        seconds(lambda a=a: a @ a, 3, device)  # type: ignore[misc]
        best = max(best, *(2 * size**3 / seconds(lambda a=a: a @ a, 10, device) for _ in range(3)))  # type: ignore[misc]
    return best


def work(config: UNetConfig, side: int, batch: int) -> int:
    """FLOP of one evaluation, counted without numbers."""
    with torch.device("meta"):
        empty: nn.Module = UNet(config).to(torch.bfloat16)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        empty(**inputs(config, side, batch, "meta"))
    return int(counter.get_total_flops())


@torch.no_grad()
def measured(setting: str, subjects: list[str], rounds: int, device: torch.device, tiny: bool) -> dict[str, Any]:
    """Medians, least and most of every subject; one that fails is its reason in one line."""
    config, side, batch = (TINY if tiny else SETTINGS)[setting]
    given = inputs(config, side, batch, device)
    found: dict[str, Any] = {}
    steps: dict[str, Step] = {}
    for name in subjects:
        try:
            steps[name] = step_of(name, config, given, device)
            for _ in range(4):
                steps[name]()
            finished(device)
        except Exception as error:  # what a card or a version of torch cannot do is a row of the table
            steps.pop(name, None)
            found[name] = {"failed": str(error).strip().splitlines()[0][:200] or type(error).__name__}
    values: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times = max(1, min(100, round(LONG / max(seconds(step, 1, device), 1e-6))))
            values[name].append(seconds(step, times, device))
    for name, own in values.items():
        found[name] = spread(own)
    del steps
    gc.collect()
    return found | {"flop": work(config, side, batch)}


def first(setting: str, name: str, device: torch.device, tiny: bool) -> dict[str, float]:
    """Seconds of the first evaluation in a new process: with an empty cache of compiled code, then with a full one."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
        for state in ("cold", "warm"):
            command = [sys.executable, __file__, "--child", name, "--only", setting, "--device", device.type]
            asked = subprocess.run(
                [*command, *(["--tiny"] if tiny else [])], env=environment, capture_output=True, text=True, check=False
            )
            if asked.returncode == 0:
                found[state] = float(asked.stdout.split()[-1])
    return found


@torch.no_grad()
def child(name: str, setting: str, device: torch.device, tiny: bool) -> None:
    config, side, batch = (TINY if tiny else SETTINGS)[setting]
    step = step_of(name, config, inputs(config, side, batch, device), device)
    print(seconds(step, 1, device))


def table(figures: dict[str, Any], place: dict[str, Any]) -> str:
    """The figures in Markdown."""
    lines = ["| | subject | ms a step | against diffusers compiled | share of the peak |", "|---|---|---:|---:|---:|"]
    for setting, found in figures["steps"].items():
        usual = found.get("diffusers compiled", {}).get("median")
        for name in SUBJECTS:
            own = found.get(name)
            if own is None:
                continue
            if "failed" in own:
                lines.append(f"| {setting} | {name} | {own['failed']} | | |")
                continue
            ratio = f"{usual / own['median']:.2f}" if usual else ""
            share = found["flop"] / own["median"] / figures["peak"]
            lines.append(f"| {setting} | {name} | {1000 * own['median']:.2f} | {ratio} | {100 * share:.0f} % |")
    return "\n".join(lines) + (
        f"\n\n`python bench/gpu.py` on {figures['device']}, {figures['peak'] / 1e12:.0f} TFLOP/s in bfloat16 measured "
        f"in the same run; {versions(place['packages'])}; commit {place['commit']}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="settings to measure")
    parser.add_argument("--subjects", nargs="*", default=list(SUBJECTS), choices=SUBJECTS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    device = torch.device(asked.device)
    settings = asked.only or list(TINY if asked.tiny else SETTINGS)
    if asked.child:
        child(asked.child, settings[0], device, asked.tiny)
        return
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else machine()["cpu"],
        "peak": peak(device, 256 if asked.tiny else 8192),
        "steps": {name: measured(name, asked.subjects, asked.rounds, device, asked.tiny) for name in settings},
    }
    compilable = [name for name in asked.subjects if name in {"recorded", "diffusers compiled"}]
    figures["first"] = {s: {name: first(s, name, device, asked.tiny) for name in compilable} for s in settings}
    if asked.tiny:
        print(table(figures, machine()))
        return
    write("gpu", figures)
    into_document(HEADING, table(figures, machine()))


if __name__ == "__main__":
    main()
