"""Reverie beside the other programs that draw with Stable Diffusion, on this machine.

    python bench/peers.py                                    everything, three rounds; hours on a slow machine
    python bench/peers.py --rounds 1 --only step32           one measurement; the results of the others stay
    python bench/peers.py --peers reverie "diffusers" openvino
    python bench/peers.py --tiny                             tiny networks: does everything run? Results are shown only

The programs are installed into an environment of their own in the cache (`--folder`), with Reverie on the same torch.
They open the same random checkpoints. Every measurement is a process of its own, the programs in turn. What cannot be
installed or fails is a row with the reason. Results go to `bench/results/peers.json`, a table to docs/performance.md
and bars to docs/peers.svg.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import DOCUMENT, RESULTS, into_document, machine, spread, write
from peer.child import Job
from peer.environment import Environment, last_line
from peer.load import Jiffies, foreign
from peer.report import report
from peer.variants import MEASURES, REFERENCE, VARIANTS, chosen

HEADING = "## Beside other programs"
PLOT = DOCUMENT.parent / "peers.svg"
Found = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where and how processes are run.

    Attributes:
        device: `cpu` or `cuda`.
        tiny: networks of a few channels, pictures of two steps.
        limit: seconds for one process.
    """

    environment: Environment
    device: str
    tiny: bool
    limit: int

    @property
    def folder(self) -> Path:
        """Of checkpoints and latents."""
        return self.environment.folder / ("tiny" if self.tiny else "true-size")

    def run(self, job: Job) -> Found:
        """What a process found; `{"failed": reason}` where it did not end well. With who else used the machine."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [str(self.environment.python), "-m", "peer.child", replace(job, tiny=self.tiny).text()]
        before, started, used = Jiffies.now(), time.time(), _children()
        try:
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=self.limit, cwd=self.folder,
                env=self.environment.variables(),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"failed": f"not done within {self.limit} s"}
        if done.returncode:
            return {"failed": last_line(done.stderr)}
        found: Found = json.loads(done.stdout.splitlines()[-1])
        if "failed" in found:
            return found
        load = foreign(before, Jiffies.now(), _children() - used, time.time() - started)
        if job.kind == "picture":
            found |= {"seconds": found.pop("ended") - started, "first": found.pop("first ended") - started}
        return found if load is None else found | {"foreign": load}

    def measure(self, name: str, variant: str) -> Found:
        """One program once."""
        measure, own = MEASURES[name], VARIANTS[variant]
        steps = 2 if self.tiny and measure.kind == "picture" else measure.steps
        job = Job(
            measure.kind, own.runner, own.options, str(self.folder / measure.model), measure.model, self.device,
            measure.size, steps, measure.repeats, out=str(self.latents(name, variant)),
        )  # fmt: skip
        return self.run(job)

    def latents(self, name: str, variant: str) -> Path:
        """Where a picture leaves its last latents, without the ending."""
        return self.folder / f"{name}-{variant.replace(' ', '-').replace(',', '')}"


def _children() -> float:
    """Seconds of processors that the processes took which have ended."""
    times = os.times()
    return times.children_user + times.children_system


def rounds(
    bench: Bench, measures: list[str], variants: dict[str, str], count: int
) -> dict[str, dict[str, list[Found]]]:
    """All measurements, the programs in turn.

    Args:
        variants: with the reason why one cannot be run; empty where it can.
    """
    runs: dict[str, dict[str, list[Found]]] = {name: {} for name in measures}
    for turn in range(count):
        for name in measures:
            for variant, why in variants.items():
                had = runs[name].setdefault(variant, [])
                if had and "failed" in had[-1]:
                    continue
                had.append({"failed": why} if why else bench.measure(name, variant))
                print(f"{turn + 1}/{count} {name}, {variant}: {_told(had[-1])}", file=sys.stderr, flush=True)
    return runs


def _told(found: Found) -> str:
    return str(found["failed"]) if "failed" in found else f"{found['seconds']:.3f} s"


def summary(runs: list[Found], stamp: str) -> Found:
    """Median and spread of every figure; the reason, where the program failed."""
    if "failed" in runs[-1]:
        return {"failed": runs[-1]["failed"], "run": stamp}
    kept: Found = {"note": runs[-1]["note"], "run": stamp}
    if "foreign" in runs[0]:
        kept["foreign"] = max(run["foreign"] for run in runs)
    for key in (key for key, value in runs[0].items() if isinstance(value, float) and key != "foreign"):
        kept[key] = spread([run[key] for run in runs])
    return kept


def error(bench: Bench, name: str, variant: str) -> float | None:
    """Of the last latents against the reference's: root mean square over its own. None where one is not there."""
    import numpy as np

    own, reference = (Path(f"{bench.latents(name, one)}.npy") for one in (variant, REFERENCE))
    if not own.exists() or not reference.exists():
        return None
    a, b = np.load(own), np.load(reference)
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


def prepared(bench: Bench, measures: list[str], variants: list[str]) -> dict[str, str]:
    """Install programs and write checkpoints; for each program why it cannot be run, empty where it can."""
    groups = dict.fromkeys(["torch", *(VARIANTS[variant].group for variant in variants)])
    failed = bench.environment.install(list(groups))
    if "torch" in failed:
        raise SystemExit(f"torch and diffusers: {failed['torch']}")
    for model in dict.fromkeys(MEASURES[name].model for name in measures):
        require(bench.run(Job("models", model=model, folder=str(bench.folder))), f"checkpoint {model}")
        if "openvino" in groups and "openvino" not in failed:
            converted = bench.run(Job("openvino", folder=str(bench.folder / model)))
            if "failed" in converted:
                failed["openvino"] = f"not converted: {converted['failed']}"
    elsewhere = {
        v: f"runs on {VARIANTS[v].device} alone" for v in variants if VARIANTS[v].device not in ("", bench.device)
    }
    return {variant: elsewhere.get(variant) or failed.get(VARIANTS[variant].group, "") for variant in variants}


def require(found: Found, what: str) -> Found:
    """What a process found.

    Raises:
        SystemExit: it failed.
    """
    if "failed" in found:
        raise SystemExit(f"{what}: {found['failed']}")
    return found


def merged(old: Found, new: Found, here: Found) -> Found:
    """Earlier results with the new ones in their place; those of another machine or device are left out."""
    same = all(old.get("machine", {}).get(key) == here[key] for key in ("cpu", "instructions", "cores"))
    kept = old.get("figures", {}) if same and old.get("figures", {}).get("device") == new["device"] else {}
    found = dict(kept)
    for key, value in new.items():
        found[key] = kept.get(key, {}) | value if isinstance(value, dict) else value
    return found


def measured(bench: Bench, measures: list[str], variants: list[str], count: int) -> Found:
    """Everything that was asked for."""
    able = prepared(bench, measures, variants)
    top = require(bench.run(Job("peak", device=bench.device)), "peak")
    stamp = time.strftime("%Y-%m-%d %H:%M")
    figures: Found = {
        "device": bench.device,
        "packages": _plain(require(bench.run(Job("versions")), "versions")),
        "runs": {stamp: {"peak": _plain(top), "commit": machine()["commit"]}},
        "work": _plain(require(bench.run(Job("work", options=dict.fromkeys(measures))), "work")),
    }
    for name, of_variants in rounds(bench, measures, able, count).items():
        figures[name] = {variant: summary(runs, stamp) for variant, runs in of_variants.items()}
        for variant, found in figures[name].items():
            if MEASURES[name].kind == "picture" and "failed" not in found:
                found["error"] = error(bench, name, variant)
    return figures


def _plain(found: Found) -> Found:
    return {key: value for key, value in found.items() if key != "foreign"}


def keep(bench: Bench, figures: Found) -> None:
    """Results, table and plot into their places."""
    path, here = RESULTS / "peers.json", machine()
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    figures = merged(old, figures, here)
    write("peers", figures)
    subprocess.run(
        [str(bench.environment.python), "-m", "peer.plot", str(path), str(PLOT)], check=True,
        env=bench.environment.variables(),
    )  # fmt: skip
    bars = "![Seconds of each program, for each thing that was measured](peers.svg)"
    into_document(HEADING, f"{bars}\n\n{report(figures, here)}")


def arguments(words: Iterable[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], metavar="MEASURE", help=", ".join(MEASURES))
    parser.add_argument(
        "--peers", nargs="+", default=[], metavar="PEER", help=f"or its first words: {', '.join(VARIANTS)}"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", "--quick", action="store_true", help="tiny networks, one round; nothing is kept")
    parser.add_argument("--limit", type=int, default=3600, help="seconds for one process")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    parser.add_argument(
        "--folder", type=Path, default=cache / "reverie-peers", help="environment and checkpoints (up to 25 GB)"
    )
    parser.add_argument("--python", type=Path, help="of an environment that has the programs; nothing is installed")
    return parser.parse_args(None if words is None else list(words))


if __name__ == "__main__":
    given = arguments()
    names = chosen(given.only, MEASURES, "measurement"), chosen(given.peers, VARIANTS, "peer")
    place = Bench(Environment(given.folder.resolve(), given.python), given.device, given.tiny, given.limit)
    results = measured(place, *names, 1 if given.tiny else given.rounds)
    if given.tiny:
        print(report(results, machine()))
    else:
        keep(place, results)
