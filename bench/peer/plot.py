"""Bars of the figures, in the peers' environment, which has matplotlib: `plot.py RESULTS.json PICTURE.svg`."""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from peer.variants import MEASURES, VARIANTS


def plot(figures: dict[str, Any], out: str) -> None:
    """One row of bars for each thing that was measured; the whiskers are the least and the most."""
    pyplot = import_module("matplotlib.pyplot")
    names = [name for name in MEASURES if any("seconds" in own for own in figures.get(name, {}).values())]
    figure, axes = pyplot.subplots(len(names), 1, figsize=(8, 2.6 * len(names)), squeeze=False)
    for name, axis in zip(names, axes[:, 0], strict=True):
        found = {v: figures[name][v]["seconds"] for v in VARIANTS if "seconds" in figures[name].get(v, {})}
        medians = [own["median"] for own in found.values()]
        spread = [
            [own["median"] - own["min"] for own in found.values()],
            [own["max"] - own["median"] for own in found.values()],
        ]
        colours = ["tab:red" if variant.startswith("reverie") else "tab:gray" for variant in found]
        axis.barh(list(found), medians, xerr=spread, color=colours, capsize=2)
        axis.invert_yaxis()
        axis.set_title(MEASURES[name].title, fontsize=9, loc="left")
        axis.set_xlabel("seconds; less is better", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["figures"], sys.argv[2])
