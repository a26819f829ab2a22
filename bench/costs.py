"""Does cost grow as it should: with the batch, the size, the steps, LoRAs and ControlNets?

`python bench/costs.py [--tiny] [--rounds 3] [--threads 2] [--precision bfloat16]`. Work is counted, not assumed
(`engine/forecast.py`); time is measured, rows of a table in turn, and told over the work: where the last column stays,
time grows with the work alone.

One evaluation of a U-Net of SD 1.5's shape with random weights by the execution plan, beside LoRAs' branches and
ControlNets; pictures of the bundled model for the steps. `--tiny` takes a small U-Net, to see that it runs.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import in_turn, into_document, machine, machine_words, write
from torch import Tensor, nn

import reverie
from adapters import add_precision, filled, loras, precision_of
from reverie.adapters.attach import changed
from reverie.engine.budget import planned
from reverie.engine.forecast import counted, to_meta, twin
from reverie.engine.generate import prepared
from reverie.engine.request import Request
from reverie.engine.resolve import resolve
from reverie.engine.speed import MOST_COUNTED, Speed
from reverie.nets.controlnet import ControlNet
from reverie.nets.unet import UNet, UNetConfig
from reverie.types import Taps

HEADING = "## How cost grows"
TINY = UNetConfig(block_out_channels=(32, 64), attention=(1, 0), heads=(4, 4), layers_per_block=1, context_width=64)
RANK = 16
PREPARING = 2  # evaluations that the plan measures and packs in
Row = tuple[float, float]  # TFLOP, seconds


@dataclass(frozen=True)
class Case:
    """One evaluation with guidance.

    Attributes:
        batch: pictures; the network sees twice as many rows.
        size: pixels.
        loras, nets: LoRAs as branches, ControlNets.
    """

    batch: int = 1
    size: int = 512
    loras: int = 0
    nets: int = 0


def tables(tiny: bool) -> dict[str, list[Case]]:
    """What is varied, by name."""
    size = 64 if tiny else 512
    batches, sizes = ((1, 2), (64, 96)) if tiny else ((1, 2, 4, 8), (256, 384, 512, 768, 1024))
    counts, nets = ((0, 2), (0, 1)) if tiny else ((0, 1, 2, 4, 8), (0, 1, 2))
    return {
        "batch": [Case(batch=n, size=size) for n in batches],
        "size": [Case(size=n) for n in sizes],
        "LoRAs": [Case(size=size, loras=n) for n in counts],
        "ControlNets": [Case(size=size, nets=n) for n in nets],
    }


class Subject:
    """The networks, and one evaluation of them."""

    def __init__(self, config: UNetConfig, precision: torch.dtype) -> None:
        unet = filled(UNet(config))
        assert isinstance(unet, UNet)
        self.net = filled(ControlNet.from_unet(unet)).to(precision)
        self.unet = unet.to(precision)
        self.width, self.precision = config.context_width, precision

    def run(
        self, case: Case, unet: nn.Module, net: nn.Module, like: Callable[[Tensor], Tensor]
    ) -> Callable[[], Tensor]:
        """One evaluation, of the networks or of their twins."""
        rows, side = 2 * case.batch, case.size // 8
        given = [like(torch.ones(shape)) for shape in ((rows, 4, side, side), (rows,), (rows, 77, self.width))]
        assert isinstance(net, ControlNet)
        hint = net.hint([like(torch.ones(1, 3, case.size, case.size))]) if case.nets else None
        form = changed(unet, loras(unet, RANK, case.loras), "branch") if case.loras else unet

        def evaluate() -> Tensor:
            if hint is None:
                result: Tensor = form(*given)
                return result
            answers = [net(*given, hint) for _ in range(case.nets)]
            places = [*(f"skips.{i}" for i in range(net.maps - 1)), "mid_block"]
            added = {
                place: torch.stack(one).sum(0) for place, one in zip(places, zip(*answers, strict=True), strict=True)
            }
            found: Tensor = form(*given, Taps(added=added))
            return found

        return evaluate

    def work(self, case: Case) -> float:
        """TFLOP."""
        with torch.device("meta"):
            compute = self.run(case, twin(self.unet, torch.float32), twin(self.net, torch.float32), to_meta)
        return counted(compute)[1].total / 1e12

    @torch.no_grad()
    def seconds(self, case: Case, plan: Speed) -> Callable[[], float]:
        """What measures one evaluation by a plan."""
        unet, net = (plan.form(network, MOST_COUNTED) for network in (self.unet, self.net))
        return partial(timed, self.run(case, unet, net, lambda t: t.to(self.precision)))


@torch.no_grad()
def timed(compute: Callable[[], object]) -> float:
    started = time.perf_counter()
    compute()
    return time.perf_counter() - started


def grown(subject: Subject, cases: list[Case], name: str, rounds: int) -> dict[str, Row]:
    """Work and median seconds of every row of a table."""
    fields = {"batch": "batch", "size": "size", "LoRAs": "loras", "ControlNets": "nets"}
    rows = {str(getattr(case, fields[name])): case for case in cases}
    plan = Speed(torch.device("cpu"), subject.precision)  # weights that another table packed are gone
    runs = {key: subject.seconds(case, plan) for key, case in rows.items()}
    in_turn(runs, PREPARING)
    found = in_turn(runs, rounds)
    return {key: (subject.work(case), found[key]["median"]) for key, case in rows.items()}


def steps(tiny: bool, rounds: int) -> dict[str, Row]:
    """Whole pictures of the bundled model."""
    model = reverie.load(device="cpu", precision="float32")
    asked = {
        n: resolve(model, Request.of(prompt="a red apple", seed=1, steps=n))
        for n in ((1, 2) if tiny else (1, 5, 10, 20, 50))
    }
    runs = {str(n): partial(timed, partial(model.draw, request)) for n, request in asked.items()}
    in_turn(runs, 1)
    found = in_turn(runs, rounds)
    work = {n: sum(planned(model, request, prepared).flops.values()) / 1e12 for n, request in asked.items()}
    return {str(n): (work[n], found[str(n)]["median"]) for n in asked}


def table(name: str, rows: Mapping[str, Row]) -> str:
    """Markdown; the last column is seconds over TFLOP, in units of the first row's."""
    first = next(iter(rows.values()))
    lines = [f"| {name} | TFLOP | seconds | time over work |", "|---|---|---|---|"]
    for key, (work, seconds) in rows.items():
        lines.append(f"| {key} | {work:.4g} | {seconds:.3g} | {(seconds / work) / (first[1] / first[0]):.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a small network and few rows; nothing is written")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_precision(parser)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    precision = precision_of(given)
    subject = Subject(TINY if given.tiny else UNetConfig(), precision)
    figures: dict[str, Any] = {
        name: grown(subject, cases, name, given.rounds) for name, cases in tables(given.tiny).items()
    }
    figures["steps"] = steps(given.tiny, given.rounds)
    text = "\n\n".join(table(name, rows) for name, rows in figures.items())
    print(text)
    if not given.tiny:
        computed = str(precision).removeprefix("torch.")
        write("costs", {"threads": given.threads, "precision": computed, **figures})
        note = (
            f"`python bench/costs.py`: {computed} (steps: the bundled model, float32), {given.threads} threads, "
            f"medians of {given.rounds} rounds in turn. {machine_words(machine())}."
        )
        into_document(HEADING, f"{text}\n\n{note}")


if __name__ == "__main__":
    main()
