"""How long does a model take to open, and how much memory, beside diffusers and transformers?

`python bench/open_models.py [--rounds 3] [sd15 sdxl sd35]` writes random checkpoints of the true size in float16, as a
single file and as a diffusers folder (up to 15 GB at a time in the temporary folder; they are deleted), and opens them.
Every measurement is a process of its own, the openers in turn, the files in the system's cache. `open` is the call
that gives the model, `open and read` also reads every weight; ours checks each for NaN meanwhile and brings it to the
precision it computes in (`Model.ready`), for theirs each is summed. Memory is counted from the end of the imports:
what is this process's own (anonymous), and with the mapped pages of the files that it has touched (total).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import cell, into_document, machine, machine_words, spread, write

ORACLES = ("diffusers", "transformers", "accelerate")
MODELS = {"sd15": "SD 1.5", "sdxl": "SDXL", "sd35": "SD 3.5 medium without T5"}
HEADING = "## Opening a model"
Open = Callable[[], Iterable[Any]]
"""Opens a model and gives its networks."""


# Checkpoints


def checkpoint(model: str, folder: Path) -> tuple[Path, Path]:
    """A random model as a single file and as a folder of diffusers, numbers of float16."""
    noise = (import_module("torch").randn(1 << 20) * 0.02).half()
    family, networks = parts(model)
    file, made = folder / f"{model}.safetensors", folder / model
    write_checkpoint(family, networks, file, made, lambda name, shape: repeated(noise, shape))
    return file, made


def write_checkpoint(
    family: Any, networks: dict[str, tuple[Any, Any]], file: Path, folder: Path, numbers: Callable[..., Any]
) -> None:
    """Write a single file and a diffusers folder.

    Args:
        networks: class and config of each.
        numbers: `(name, shape) -> tensor of float16`, each asked for when it is written.
    """
    torch, engine = import_module("torch"), import_module("reverie.engine.convert")
    deferred, save = import_module("reverie.engine.deferred"), import_module("reverie.checkpoint.save")
    tensors: dict[str, tuple[Any, dict[str, Any]]] = {}
    for part, (make, config) in networks.items():
        with torch.device("meta"):
            state = make(config).state_dict()
        random = {
            name: deferred.Deferred.of(t.shape, torch.float16, lambda name=name, t=t: numbers(name, t.shape))
            for name, t in state.items()
        }
        tensors[part] = config, random
    entries = [
        save.Entry(name, t.dtype, tuple(t.shape), lambda t=t: deferred.now(t))
        for name, t in family.join_file(tensors).items()
    ]
    save.write_entries(file, entries)
    engine.convert(file, folder)


def repeated(noise: Any, shape: tuple[int, ...]) -> Any:
    """The same random numbers over and over."""
    count = 1
    for n in shape:
        count *= n
    return noise.repeat(-(-count // len(noise)))[:count].reshape(shape)


def parts(model: str) -> tuple[Any, dict[str, tuple[Any, Any]]]:
    """The family of a published model, and class and config of each of its networks."""
    unet, mmdit = import_module("reverie.nets.unet"), import_module("reverie.nets.mmdit")
    vae, clip = import_module("reverie.nets.autoencoder"), import_module("reverie.nets.clip_text")
    family = import_module(f"reverie.families.{ {'sd15': 'sd1', 'sdxl': 'sdxl', 'sd35': 'sd3'}[model] }.family").FAMILY
    small = clip.ClipTextConfig(projection_width=768 if model == "sd35" else 0)
    large = clip.ClipTextConfig(
        width=1280, inner_width=5120, layers=32, heads=20, activation="gelu", projection_width=1280
    )
    found = {"vae": (vae.Autoencoder, vae.SD3_AUTOENCODER if model == "sd35" else vae.AutoencoderConfig())}
    found["text_encoder"] = (clip.ClipText, small)
    if model == "sd15":
        return family, found | {"unet": (unet.UNet, unet.UNetConfig())}
    found["text_encoder_2"] = (clip.ClipText, large)
    if model == "sd35":
        return family, found | {"transformer": (mmdit.MMDiT, mmdit.SD35_MEDIUM)}
    config = unet.UNetConfig(
        block_out_channels=(320, 640, 1280), attention=(0, 2, 10), mid_attention=10, heads=(5, 10, 20),
        context_width=2048, linear_projection=True, vector="add_embedding", vector_width=2816,
    )  # fmt: skip
    return family, found | {"unet": (unet.UNet, config)}


# Openers: each imports what it needs and gives the function that is measured


def reverie(path: Path, precision: str) -> Open:
    """Ours, every weight left where it is."""
    load = import_module("reverie.engine.bundle").load
    for imported in ("reverie.families.family", "reverie.sampling.registry"):
        import_module(imported).load_all()

    def open_() -> Iterable[Any]:
        model = load(path, device="cpu", precision=precision)
        for name, module in model.parts.modules().items():
            yield lambda name=name, module=module: model.ready(name, module)

    return open_


def diffusers(path: Path, precision: str) -> Open:
    """The pipeline's `from_pretrained` or `from_single_file`."""
    library, torch = import_module("diffusers"), import_module("torch")
    settings: dict[str, Any] = {"torch_dtype": getattr(torch, precision), "local_files_only": True}
    folder = path.with_suffix("")
    index = json.loads((folder / "model_index.json").read_text())
    if "SD3" in index["transformer" if "transformer" in index else "unet"][1]:
        settings |= {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = getattr(library, index["_class_name"])
    if path.is_dir():
        return lambda: networks(pipeline.from_pretrained(path, **settings).components.values())
    return lambda: networks(pipeline.from_single_file(str(path), config=str(folder), **settings).components.values())


def networks(components: Iterable[Any]) -> Iterable[Any]:
    """Those of a pipeline, each as what reads its weights."""
    for network in components:
        if hasattr(network, "parameters"):
            yield lambda network=network: [float(p.sum()) for p in network.parameters()]


def reverie_text(path: Path, precision: str) -> Open:
    """Our text encoder from its folder."""
    folder, pieces = import_module("reverie.families.folder"), import_module("reverie.families.pieces")
    placing, torch = import_module("reverie.engine.placing"), import_module("torch")

    def read(module: Any) -> None:
        placing.check_numbers(module, path, path.name)
        placing.place(module, torch.device("cpu"), getattr(torch, precision))

    def open_() -> Iterable[Any]:
        module = folder.open_part(path, path.name, pieces.CLIP).build()
        yield lambda: read(module)

    return open_


def transformers(path: Path, precision: str) -> Open:
    """`CLIPTextModel.from_pretrained`, or the class with projection."""
    library, torch = import_module("transformers"), import_module("torch")
    name = json.loads((path / "config.json").read_text())["architectures"][0]
    make = getattr(library, name).from_pretrained
    return lambda: networks([make(path, dtype=getattr(torch, precision), local_files_only=True)])


OPENERS = {
    "reverie": reverie, "diffusers": diffusers, "reverie text encoder": reverie_text, "transformers": transformers
}  # fmt: skip


# Measuring


class Memory:
    """The most that this process holds, in bytes, from here on; its own is asked every 5 ms."""

    def __init__(self) -> None:
        self.base, self.own = status("VmRSS"), status("RssAnon")
        self.most_own, self.done = self.own, threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()

    def watch(self) -> None:
        """Ask until `figures` ends it."""
        while not self.done.wait(0.005):
            self.most_own = max(self.most_own, status("RssAnon"))

    def figures(self) -> dict[str, float]:
        """The most of each kind, in GB of 10^9 bytes."""
        self.done.set()
        self.watcher.join()
        own, total = max(self.most_own, status("RssAnon")) - self.own, status("VmHWM") - self.base
        return {"own GB": own / 1e9, "total GB": total / 1e9}


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def child(opener: str, path: Path, precision: str) -> dict[str, float]:
    """What one process measures: twice in a row, the second time warm."""
    open_ = OPENERS[opener](path, precision)
    memory = Memory()
    figures = timed(open_) | memory.figures()
    return figures | {f"second {what}": value for what, value in timed(open_).items()}


def timed(open_: Open) -> dict[str, float]:
    """Seconds of the clock, and of all threads on processors: these do not know what else the machine does."""
    start, work = time.perf_counter(), time.process_time()
    reads = list(open_())
    found = {"open s": time.perf_counter() - start, "open work s": time.process_time() - work}
    for read in reads:
        read()
    return found | {
        "open and read s": time.perf_counter() - start,
        "open and read work s": time.process_time() - work,
    }


def measure(opener: str, path: Path, precision: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", opener, str(path), precision]
    with tempfile.TemporaryDirectory() as cache:  # nothing is known of the files yet
        environment = os.environ | {"XDG_CACHE_HOME": cache}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def subjects(model: str, folder: Path) -> Iterable[tuple[str, str, Path, str]]:
    """`(what is opened, opener, path, precision)`."""
    file, made = checkpoint(model, folder)
    for precision in ("float16", "float32") if model == "sd15" else ("float16",):
        for layout, path in (("folder", made), ("single file", file)):
            for opener in ("reverie", "diffusers"):
                yield f"{MODELS[model]}, {layout}, {precision}", opener, path, precision
    for part in ("text_encoder", "text_encoder_2"):
        if (made / part).exists() and model != "sd35":
            for opener in ("reverie text encoder", "transformers"):
                yield f"{MODELS[model]}, {part}, float16", opener, made / part, "float16"


def of_model(model: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Median and spread of every figure of every subject of a model."""
    with tempfile.TemporaryDirectory() as folder:
        todo = list(subjects(model, Path(folder)))
        runs: list[list[dict[str, float]]] = [[] for _ in todo]
        for _ in range(rounds):
            for (_, opener, path, precision), found in zip(todo, runs, strict=True):
                found.append(measure(opener, path, precision))
    return {
        f"{what}: {opener}": {key: spread([run[key] for run in found]) for key in found[0]}
        for (what, opener, _, _), found in zip(todo, runs, strict=True)
    }


# The table


def table(figures: dict[str, Any], place: dict[str, Any]) -> str:
    """The figures in Markdown."""
    columns = (
        "open s", "open work s", "open and read s", "open and read work s", "second open and read s",
        "second open and read work s", "own GB", "total GB",
    )  # fmt: skip
    lines = [f"| what | by | {' | '.join(columns)} |", f"|---|---|{'---:|' * len(columns)}"]
    for name, found in figures.items():
        what, _, by = name.rpartition(": ")
        cells = [cell(found[c]) for c in columns]
        lines.append(f"| {what} | {by.replace(' text encoder', '')} | {' | '.join(cells)} |")
    note = (
        f"`python bench/open_models.py`: medians of processes of their own (least to most), files in the system's "
        f"cache. {machine_words(place)}. `open` is the call that gives the model; `read` "
        "also reads every weight: ours checks each for NaN and brings it to the precision it computes in, theirs "
        "are summed. `second` is the same once more: what is known to be sound is not read again before it is used. "
        "`work` is the time of all threads on processors. `own` is the memory of the process alone "
        "beyond the imports, `total` with the pages of the mapped file, which the system takes back when it needs "
        "them."
    )
    return "\n".join([*lines, "", note])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=3)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given.child[0], Path(given.child[1]), given.child[2])))
    else:
        measured = {name: found for model in given.models for name, found in of_model(model, given.rounds).items()}
        where = machine()
        where["packages"] |= {name: version(name) for name in ORACLES}
        write("open_models", measured)
        into_document(HEADING, table(measured, where))
