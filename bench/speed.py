"""How fast is each way to compute the layers of SD 1.5 and SDXL here, and what does the execution plan make of a step?

`python bench/speed.py [--precision bfloat16] [--threads 2] [--rounds 5] [--sides 32 64] [--tiny]`

Layers: every distinct shape of the U-Nets at batch 2, by every way of `nets/ways.py` and `nets/attention.py`, in
GFLOP/s beside the best matrix product of this run. Steps: a whole U-Net of SD 1.5's size with random weights, plain and
by the plan in turn, and the error of both against plain float32; the ratio of each round counts. `--tiny` shows that it
runs.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import cell, into_document, machine, machine_words, spread, write
from torch import Tensor, nn

from adapters import add_precision, filled, precision_of
from reverie.engine.calibration import Calibration, Trial, timed
from reverie.engine.remembered import Remembered
from reverie.engine.speed import MOST_COUNTED, Speed
from reverie.nets.attention import ATTENTION, Layer, attention, gated
from reverie.nets.unet import UNet, UNetConfig
from reverie.nets.ways import CONVOLUTION, GATED, LINEAR, chosen

HEADING = "## Layers and steps on a processor"
SDXL = UNetConfig(
    block_out_channels=(320, 640, 1280), attention=(0, 2, 10), mid_attention=10, heads=(5, 10, 20),
    context_width=2048, linear_projection=True, vector="add_embedding", vector_width=2816,
)  # fmt: skip
SMALL = UNetConfig(block_out_channels=(64, 128), attention=(1, 0), heads=(4, 4), layers_per_block=1, context_width=64)
TOKENS, BATCH = 77, 2
SHOWN = 12  # shapes of a model in the document, those with the most work; all are in the results
Figures = dict[str, Any]


# The shapes of a network


@dataclass
class Shapes:
    """Notes every layer that a network on the meta device computes, and how often (`nets.ways.Chooser`).

    Attributes:
        trials: by a name of kind and shape: the ways with random numbers, made when they are asked for.
    """

    dtype: torch.dtype
    count: dict[str, int] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)
    trials: dict[str, Callable[[], dict[str, Trial]]] = field(default_factory=dict)

    def note(self, name: str, flop: float, trials: Callable[[], dict[str, Trial]]) -> None:
        """One more layer of a shape."""
        self.count[name] = self.count.get(name, 0) + 1
        self.work[name], self.trials[name] = flop, trials

    def _product(self, kind: str, ways: Any, layer: nn.Linear, x: Tensor) -> None:
        rows, source, width = x.numel() // x.shape[-1], layer.in_features, layer.out_features
        make = partial(layer_trials, ways, partial(nn.Linear, source, width), (1, rows, source), self.dtype)
        self.note(f"{kind} {rows} x {source} -> {width}", 2.0 * rows * source * width, make)

    def linear(self, layer: nn.Linear, x: Tensor, to: Tensor | None = None) -> Tensor:
        """As the layer."""
        self._product("linear", LINEAR, layer, x)
        y = nn.functional.linear(x, layer.weight, layer.bias)
        return y if to is None else to + y

    def gated(self, layer: Layer, x: Tensor) -> Tensor:
        """As it is; its projection is noted with its own work."""
        assert isinstance(layer, nn.Linear)
        self._product("gated", GATED, layer, x)
        return gated(partial(nn.functional.linear, weight=layer.weight, bias=layer.bias), x)

    def convolution(self, layer: nn.Conv2d, x: Tensor, to: Tensor | None = None) -> Tensor:
        """As the layer."""
        y = nn.functional.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)
        (kernel, _), (stride, _) = layer.kernel_size, layer.stride
        of = partial(nn.Conv2d, layer.in_channels, layer.out_channels, kernel, stride, kernel // 2)
        name = f"{kernel}x{kernel} {layer.in_channels} -> {layer.out_channels} at {x.shape[-2]}x{x.shape[-1]}"
        flop = 2.0 * y.numel() * layer.in_channels * kernel**2
        self.note(f"{name}, stride {stride}", flop, partial(layer_trials, CONVOLUTION, of, tuple(x.shape), self.dtype))
        return y if to is None else to + y

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As attention."""
        queries, keys = tuple(q.shape), tuple(k.shape)
        name = f"attention {queries[2]} x {keys[2]}, {queries[1]} heads of {queries[3]}"
        self.note(name, 4.0 * q.numel() * keys[2], partial(attention_trials, queries, keys, self.dtype))
        return attention(q, k, v)


def layer_trials(ways: Any, make: Callable[[], Any], shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Trial]:
    """Every way that this machine has to compute a layer, with random weights.

    Images are in channels-last order, but for plain layers in float32: as networks that are computed so have them.
    """
    layer, x = make().to(dtype).requires_grad_(False), torch.randn(shape).to(dtype)
    last = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
    x = x if dtype == torch.float32 else last

    def of(way: Any) -> Trial:
        own = x if way.name == "plain" else last
        return Trial(
            lambda weight: way.run(layer, own, weight),
            lambda: layer.weight if way.prepare is None else way.prepare(layer, layer.weight, own),
        )

    return {way.name: of(way) for way in ways if way.usable(layer, x)}


def attention_trials(queries: tuple[int, ...], keys: tuple[int, ...], dtype: torch.dtype) -> dict[str, Trial]:
    q, k, v = (torch.randn(shape).to(dtype) for shape in (queries, keys, keys))
    return {
        name: Trial(lambda _, way=way: way(q, k, v), lambda: q)  # type: ignore[misc]
        for name, way in ATTENTION.items()
    }


def shapes_of(config: UNetConfig, side: int, dtype: torch.dtype) -> Shapes:
    """The layers of one evaluation with both rows of guidance."""
    with torch.device("meta"):
        unet = UNet(config).requires_grad_(False)
        found = Shapes(dtype)
        x, context = (
            torch.empty(BATCH, config.in_channels, side, side),
            torch.empty(BATCH, TOKENS, config.context_width),
        )
        vector = torch.empty(BATCH, config.vector_width) if config.vector else None
        chosen(unet, found)(x, torch.empty(BATCH), context, vector=vector)
    return found


# Measuring


def peak(dtype: torch.dtype, size: int) -> float:
    """GFLOP/s of the best way to multiply square matrices."""
    costs = timed(layer_trials(LINEAR, partial(nn.Linear, size, size), (1, size, size), dtype))
    return 2 * size**3 / min(cost.call for cost in costs.values()) / 1e9


def layers(config: UNetConfig, side: int, dtype: torch.dtype) -> Figures:
    """GFLOP/s of each way at each shape, how many layers have it, their work, and seconds of packing one."""
    found = shapes_of(config, side, dtype)
    figures: Figures = {}
    for name, flop in sorted(found.work.items(), key=lambda item: -item[1] * found.count[item[0]]):
        costs = timed(found.trials[name]())
        print(name, file=sys.stderr, flush=True)
        rates = {way: round(flop / cost.call / 1e9, 1) for way, cost in costs.items()}
        once = {way: round(cost.once, 4) for way, cost in costs.items() if way == "packed"}
        figures[name] = {"layers": found.count[name], "GFLOP": round(found.count[name] * flop / 1e9, 2),
                         "GFLOP/s": rates, "seconds to pack": once.get("packed")}  # fmt: skip
    return figures


def steps(config: UNetConfig, sides: list[int], dtype: torch.dtype, rounds: int) -> Iterator[tuple[str, Figures]]:
    """Seconds of a step, plain and by the plan, in turn."""
    unet = filled(UNet(config))
    exact = {side: unet(*given_at(side, config)) for side in sides}
    unet.to(dtype)
    with TemporaryDirectory() as folder:
        calibration = Calibration(Remembered(Path(folder) / "speed.json"), "bench")
        plan = Speed(torch.device("cpu"), dtype, calibration=calibration)
        form = plan.form(unet, MOST_COUNTED)
        for side in sides:
            given = [x.to(dtype) for x in given_at(side, config)]
            usual, _ = evaluated(unet, given)
            _, first = evaluated(form, given)
            own, second = evaluated(form, given)  # packs the rest
            pairs = [(evaluated(unet, given)[1], evaluated(form, given)[1]) for _ in range(rounds)]
            print(f"{side}x{side}: plain and plan {pairs}", file=sys.stderr, flush=True)
            yield f"{side}x{side}", {
                "plain": spread([a for a, _ in pairs]), "plan": spread([b for _, b in pairs]),
                "times as fast": spread([a / b for a, b in pairs]), "first two, measured and packed": first + second,
                "packed GB": plan.packs.size / 1e9, "weights GB": sum(p.nbytes for p in unet.parameters()) / 1e9,
                "error": {"plain": error(usual, exact[side]), "plan": error(own, exact[side])},
            }  # fmt: skip


def given_at(side: int, config: UNetConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and prompts, the same at every call."""
    random = torch.Generator().manual_seed(side)
    x = torch.randn(BATCH, 4, side, side, generator=random)
    return x, torch.full((BATCH,), 500.0), torch.randn(BATCH, TOKENS, config.context_width, generator=random)


def error(own: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference over that of the exact numbers."""
    return float((own.float() - exact).norm() / exact.norm())


def evaluated(network: nn.Module, given: Sequence[Tensor]) -> tuple[Tensor, float]:
    start = time.perf_counter()
    answer: Tensor = network(*given)
    return answer, time.perf_counter() - start


# The tables


def tables(figures: Figures, place: Figures) -> str:
    """The figures in Markdown."""
    best = figures["peak GFLOP/s"]
    names = ("step of SD 1.5, batch 2", "plain, s", "plan, s", "times as fast", "first two, s", "packed, GB",
             "error, plain", "plan")  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|---" + "|---:" * (len(names) - 1) + "|"]
    for side, own in figures["steps"].items():
        cells = [cell(own[name]) for name in ("plain", "plan", "times as fast")]
        cells += [f"{own['first two, measured and packed']:.1f}", f"{own['packed GB']:.2f}"]
        cells += [f"{own['error'][name]:.1e}" for name in ("plain", "plan")]
        lines.append(f"| {side} | {' | '.join(cells)} |")
    for model, own in figures["layers"].items():
        lines += ["", f"| {model} | layers | GFLOP | GFLOP/s by way | of the peak |", "|---|---:|---:|---|---:|"]
        for name, row in list(own.items())[:SHOWN]:
            rates = ", ".join(f"{way} {rate:.0f}" for way, rate in row["GFLOP/s"].items())
            share = f"{max(row['GFLOP/s'].values()) / best:.0%}"
            lines.append(f"| {name} | {row['layers']} | {row['GFLOP']:.1f} | {rates} | {share} |")
    note = (
        f"`python bench/speed.py`, {figures['precision']}, {figures['threads']} threads: steps as medians of rounds in "
        "turn (least to most), ratios round by round, errors against plain float32 (root mean square); layers as the "
        f"least of their calls, the {SHOWN} shapes with the most work. The best square matrix product of the same run "
        f"is {best:.0f} GFLOP/s. {machine_words(place)}."
    )
    return "\n".join([*lines, "", note])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_precision(parser)
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 64])
    for flag, default in (("--threads", torch.get_num_threads()), ("--rounds", 5)):
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--tiny", action="store_true", help="a small network, nothing written into the document")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    kind = precision_of(asked)
    models = {"tiny": SMALL} if asked.tiny else {"SD 1.5": UNetConfig(), "SDXL": SDXL}
    wide = [16] if asked.tiny else asked.sides
    if asked.tiny:
        from reverie.engine import speed

        speed.LARGE = 1
    with torch.inference_mode():
        results: Figures = {
            "precision": str(kind).removeprefix("torch."), "threads": asked.threads,
            "peak GFLOP/s": peak(kind, 256 if asked.tiny else 2048),
            "steps": dict(steps(next(iter(models.values())), wide, kind, asked.rounds)),
            "layers": {f"{name}, {max(wide)}x{max(wide)}": layers(config, max(wide), kind)
                       for name, config in models.items()},
        }  # fmt: skip
    if asked.tiny:
        print(tables(results, machine()))
    else:
        write("speed", results)
        into_document(HEADING, tables(results, machine()))
