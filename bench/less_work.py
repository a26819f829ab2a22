"""What does each way to do less work give, and what does it cost?

`python bench/less_work.py [--model sd15|bundled] [--size 64] [--steps 10] [--rounds 3]`

Speed: seconds inside the denoising network for one picture with guidance, switches in turn with the exact picture in
one process, on random weights of Stable Diffusion 1.5 (or on the bundled model, to see that it runs). Each round gives
a ratio; the table has their median, least and most. Decoding is measured apart, the model's own against a tiny one's.

Likeness: the bundled model, whose weights are not random, against its own exact pictures.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import cell, into_document, machine, machine_words, spread, write
from open_models import checkpoint
from safetensors.torch import save_file

import reverie
from reverie.engine import tiny
from reverie.engine.bundle import Model
from reverie.engine.levels import LEVELS
from reverie.engine.request import Request
from reverie.engine.tuning import Trial, switches_of
from reverie.nets.taesd import TAESD, TinyDecoder, numbered

HEADING = "## Less work"
PROMPTS = ("a red apple", "a sun", "a cat", "a rocket", "an owl", "a christmas tree", "a blue car", "a pizza")
Figures = dict[str, Any]


def subjects(model: Model) -> dict[str, dict[str, Any]]:
    """Every switch and every level, by name."""
    levels: dict[str, dict[str, Any]] = {f"--fast {level}": {"fast": level} for level in LEVELS if level != "0"}
    return {"exact": {}} | switches_of(model) | levels


@contextmanager
def clocked(model: Model) -> Iterator[Callable[[], float]]:
    """Seconds inside the denoising network so far."""
    total, begun = 0.0, 0.0

    def before(*_: object) -> None:
        nonlocal begun
        begun = time.perf_counter()

    def after(*_: object) -> None:
        nonlocal total
        total += time.perf_counter() - begun

    network = model.parts.unet
    handles = [network.register_forward_pre_hook(before), network.register_forward_hook(after)]
    try:
        yield lambda: total
    finally:
        for handle in handles:
            handle.remove()


def speeds(model: Model, size: int, steps: int, rounds: int) -> Figures:
    """How many times faster than exact each switch is, by rounds in turn."""
    side = size * model.parts.vae.config.factor
    common = {"prompt": "a red apple", "seed": 7, "steps": steps, "guidance_scale": 7.5, "upscaler": "none",
              "width": side, "height": side, "vae_tile": 0}  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in subjects(model)}
    with clocked(model) as seconds, undecoded(model):
        for number in range(rounds + 1):  # the first only warms
            for name, fields in subjects(model).items():
                start = seconds()
                model.draw(Request.of(**common, **fields))
                if number:
                    found[name].append(seconds() - start)
    exact = found["exact"]
    ratios = {name: [usual / own for usual, own in zip(exact, values, strict=True)] for name, values in found.items()}
    return {name: spread(values) | {"seconds": median(found[name])} for name, values in ratios.items()}


@contextmanager
def undecoded(model: Model) -> Iterator[None]:
    """Decode one latent in place of all: what is measured is the network that draws."""
    decode = model.decode

    def little(latents: torch.Tensor, request: Request) -> torch.Tensor:
        return decode(latents[..., :1, :1], request)

    model.decode = little  # type: ignore[method-assign]
    try:
        yield
    finally:
        model.decode = decode  # type: ignore[method-assign]


def decoding(model: Model, size: int, rounds: int) -> Figures:
    """A tiny decoder, with random weights, against the model's own."""
    channels = model.parts.vae.config.latent_channels
    latents = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(0))
    if model.parts.vae.config.factor != tiny.FACTOR:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "taesd_decoder.safetensors"
        save_file(numbered(TinyDecoder(TAESD).layers.state_dict(prefix="layers."), "decoder"), path)
        ratios = []
        for number in range(rounds + 1):
            own, small = (
                timed(lambda name=name: tiny.decode(model, latents, Request.of(decoder=name, vae_tile=0)))  # type: ignore[misc]
                for name in ("full", str(path))
            )
            ratios += [own / small] if number else []
    return {"tiny decoder, decoding alone": spread(ratios)}


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def likeness(steps: int | None) -> Figures:
    """PSNR, SSIM and the error of latents of the bundled model's pictures against its exact ones."""
    model = reverie.load(device="cpu", precision="float32")
    trial = Trial(PROMPTS, {} if steps is None else {"steps": steps})
    switches = {name: fields for name, fields in subjects(model).items() if name != "exact"}
    found = trial.measured(model, trial.exact(model, lambda: None), switches, lambda: None)
    return {one.name: {"psnr": one.psnr, "ssim": one.ssim, "latents": one.latents} for one in found}


def table(figures: Figures, place: Mapping[str, Any], what: str) -> str:
    """The figures in Markdown."""
    lines = ["| switch | times as fast | PSNR | SSIM | error of latents |", "|---|---:|---:|---:|---:|"]
    for name, found in figures["speed"].items():
        like = figures["likeness"].get(name)
        cells = [f"{like['psnr']:.1f} dB", f"{like['ssim']:.4f}", f"{like['latents']:.1e}"] if like else ["", "", ""]
        lines.append(f"| {name} | {cell(found)} | {' | '.join(cells)} |")
    note = (
        f"`python bench/less_work.py`: speed on {what}, seconds inside the denoising network with guidance, in turn "
        "with the exact picture, median (least to most); likeness to the exact pictures on the bundled model, mean "
        f"over {len(PROMPTS)} prompts. {machine_words(place)}."
    )
    return "\n".join([*lines, "", note])


def opened(name: str, folder: Path) -> Model:
    """Random weights of SD 1.5's size, or the bundled model, in the precision that the machine gives them."""
    path = None if name == "bundled" else checkpoint("sd15", folder)[0]
    return reverie.load(path, device="cpu")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=("sd15", "bundled"), default="sd15")
    parser.add_argument("--size", type=int, default=64, help="latents a side")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--likeness-steps", type=int, default=None, help="of the bundled model; its own if absent")
    parser.add_argument("--print", action="store_true", help="print alone, write nothing")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        subject = opened(given.model, Path(temporary))
        precision = str(subject.speed.dtype).removeprefix("torch.")
        measured = speeds(subject, given.size, given.steps, given.rounds) | decoding(subject, given.size, given.rounds)
    figures = {"speed": measured, "likeness": likeness(given.likeness_steps)}
    sized = f"random weights of SD 1.5 at {given.size}x{given.size} latents, {given.steps} steps, {precision}"
    where = machine()
    text = table(figures, where, sized if given.model == "sd15" else "the bundled model")
    if given.print:
        print(text)
    else:
        write("less_work", figures)
        into_document(HEADING, text)
