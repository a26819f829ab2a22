"""What does a LoRA cost at the size of SD 1.5: to attach, and in every evaluation, merged and as side branches?

`python bench/adapters.py [--threads 2] [--rounds 3] [--side 512] [--rank 88] [--precision bfloat16]`. Random weights in
the machine's own precision, computed by the execution plan; a LoRA in float16 over attention, feed-forward and text
encoder (rank 88: 100 MB). One process, everything in turn, medians; seconds by the clock and, since machines are
shared, seconds that the processors worked for it.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from common import in_turn, write
from torch import nn

from reverie.adapters.attach import Change, Way, changed
from reverie.adapters.deltas import LoRA
from reverie.engine.bundle import DTYPES
from reverie.engine.speed import MOST_COUNTED, Speed, automatic_precision
from reverie.nets.clip_text import ClipText, ClipTextConfig
from reverie.nets.unet import UNet, UNetConfig

COUNTS = (0, 1, 2, 4, 8)
LAYERS = ("attentions", "self_attn", "mlp")  # in the paths of what is changed
WAYS: tuple[Way, ...] = ("merge", "branch")


def add_precision(parser: argparse.ArgumentParser) -> None:
    """`--precision`; see `precision_of`."""
    parser.add_argument("--precision", choices=DTYPES, help="the machine's own if absent")


def precision_of(given: argparse.Namespace) -> torch.dtype:
    """What was asked for, else what the machine's processor computes large networks in."""
    return DTYPES[given.precision] if given.precision else automatic_precision(torch.device("cpu"), large=True)


def filled(network: nn.Module) -> nn.Module:
    """Weights of a size that keeps numbers near 1."""
    network.requires_grad_(False)
    for p in network.parameters():
        p.data = torch.randn(p.shape) * (0.5 / p[0].numel() ** 0.5) if p.ndim > 1 else torch.ones(p.shape)
    return network.eval()


def loras(network: nn.Module, rank: int, count: int) -> dict[str, list[Change]]:
    """As many LoRAs at each layer."""
    found: dict[str, list[Change]] = {}
    for path, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and any(word in path for word in LAYERS):
            fresh = LoRA.fresh(layer.weight.shape, rank, rank / 2).mapped(lambda t: t.half())
            found[path] = [(fresh, 0.5)] * count
    return found


def measured(subjects: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Medians and spread of seconds by the clock and of all processors, after one round to warm up."""
    worked: dict[str, list[float]] = {name: [] for name in subjects}

    def timed(name: str) -> float:
        clock, processors = time.perf_counter(), time.process_time()
        subjects[name]()
        worked[name].append(time.process_time() - processors)
        return time.perf_counter() - clock

    in_turn({name: partial(timed, name) for name in subjects}, 1)
    seconds = in_turn({name: partial(timed, name) for name in subjects}, rounds)
    return {
        name: {"seconds": seconds[name], "processor seconds": round(median(worked[name][1:]), 3)} for name in subjects
    }


def attaching(networks: list[nn.Module], rank: int, rounds: int) -> dict[str, Any]:
    """One LoRA to both networks, warm."""
    changes = [loras(network, rank, 1) for network in networks]
    size = sum(t.nbytes for own in changes for [(delta, _)] in own.values() for t in delta.tensors().values())

    def attach(way: Way) -> None:
        for network, own in zip(networks, changes, strict=True):
            changed(network, own, way)

    found = measured({way: partial(attach, way) for way in WAYS}, rounds)
    return found | {"megabytes": round(size / 1e6, 1), "layers": sum(map(len, changes))}


def evaluating(network: nn.Module, rank: int, side: int, rounds: int) -> dict[str, Any]:
    """One evaluation of the U-Net with both rows of guidance, over the number of LoRAs."""
    precision = next(network.parameters()).dtype
    unet = Speed(torch.device("cpu"), precision).form(network, MOST_COUNTED)
    x, context = (torch.randn(shape).to(precision) for shape in ((2, 4, side // 8, side // 8), (2, 77, 768)))
    forms = {"merged": changed(unet, loras(unet, rank, 1), "merge")}
    forms |= {f"{count} branches": changed(unet, loras(unet, rank, count), "branch") for count in COUNTS}
    timesteps = torch.full((2,), 500.0)
    for form in forms.values():  # measures ways and packs, at the first evaluation and the second
        form(x, timesteps, context)
    found = measured({name: partial(form, x, timesteps, context) for name, form in forms.items()}, rounds)
    plain = found["0 branches"]["processor seconds"]
    for figures in found.values():
        figures["ratio to none"] = round(figures["processor seconds"] / plain, 3)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for flag, default in (("--threads", 2), ("--rounds", 3), ("--side", 512), ("--rank", 88)):
        parser.add_argument(flag, type=int, default=default)
    add_precision(parser)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    precision = precision_of(given)
    with torch.inference_mode():
        pair = [filled(network).to(precision) for network in (UNet(UNetConfig()), ClipText(ClipTextConfig()))]
        results = {
            "settings": vars(given) | {"precision": str(precision).removeprefix("torch.")},
            "attaching": attaching(pair, given.rank, given.rounds),
            "one evaluation": evaluating(pair[0], given.rank, given.side, given.rounds),
        }  # fmt: skip
    write("adapters", results)
