"""`reverie evaluate`: how good pictures are."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from reverie import __version__
from reverie.apps import console
from reverie.apps.generating import opened
from reverie.apps.progress import steps_progress
from reverie.checkpoint.save import write_atomically, write_json
from reverie.control.weights import WEIGHTS
from reverie.engine.bundle import Model, pick_device
from reverie.engine.hashes import hash_paths
from reverie.engine.image import fingerprint
from reverie.engine.metadata.read import read_metadata
from reverie.engine.request import Request
from reverie.engine.sources import read_picture
from reverie.evaluate.asking import open_world
from reverie.evaluate.clip_score import clip_scores, open_clip
from reverie.evaluate.distances import fid, kid, precision_recall
from reverie.evaluate.drawing import claim, request_for
from reverie.evaluate.features import features_of, open_inception, pictures_in
from reverie.evaluate.report import markdown, scores_json
from reverie.evaluate.scenes import Evaluation
from reverie.train.judging import JUDGE, open_judge


def run_pictures(true: Path, drawn: Path, inception: Path | None, device: str, as_json: bool) -> None:
    """Print FID, KID, precision and recall of the pictures in `drawn` against those in `true`."""
    folders = [pictures_in(folder) for folder in (true, drawn)]
    network, where = open_inception(WEIGHTS["inception"].find(inception)), pick_device(device)
    found = []
    for name, pictures in zip(("true pictures", "drawn pictures"), folders, strict=True):
        with steps_progress(name) as progress:
            found.append(features_of(pictures, network, where, progress=progress))
    a, b = found
    discrepancy, both = kid(a, b), precision_recall(a, b)
    _print_numbers({
        "fid": fid(a, b), "kid": discrepancy.mean, "kid_deviation": discrepancy.deviation,
        "precision": both.precision, "recall": both.recall,
        "true": len(folders[0]), "drawn": len(folders[1]),
    }, as_json)  # fmt: skip


def run_prompts(pictures: Path, clip: Path, device: str, as_json: bool) -> None:
    """Print the CLIP score of the pictures in a folder with the prompts that they carry."""
    paths = pictures_in(pictures)
    prompts = [read_metadata(path).request.prompt for path in paths]
    towers = open_clip(clip, pick_device(device))
    files = [partial(read_picture, str(path), "picture") for path in paths]
    with steps_progress("pictures") as progress:
        scores = clip_scores(towers, files, prompts, progress)
    deviation = float(scores.std()) if len(scores) > 1 else 0.0
    numbers: dict[str, Any] = {
        "clip_score": float(scores.mean()), "deviation": deviation,
        "standard_error": deviation / len(scores) ** 0.5, "pictures": len(scores),
    }  # fmt: skip
    if as_json:
        each = zip(paths, prompts, scores.tolist(), strict=True)
        numbers["each"] = [{"file": str(path), "prompt": prompt, "clip_score": s} for path, prompt, s in each]
    _print_numbers(numbers, as_json)


def _print_numbers(numbers: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        console.print_json(numbers)
        return
    for name, value in numbers.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
        console.out.print(f"{name.replace('_', ' '):<16}{shown}", markup=False)


@dataclass(frozen=True)
class Wanted:
    """What `reverie evaluate scenes` is told.

    Attributes:
        model: path, name or hash; the bundled one if None.
        judge: its folder.
        sprites, config: what was taught; see `reverie.evaluate.asking.open_world`.
        inception: Inception's weights; no FID without them.
        count: scenes of each group.
        batch: pictures that are drawn at once.
    """

    model: str | None
    judge: Path
    sprites: Path | None
    config: Path | None
    inception: Path | None
    count: int
    out: Path
    batch: int
    steps: int | None
    guidance_scale: float | None
    seed: int
    device: str


def run_scenes(wanted: Wanted, as_json: bool) -> None:
    """Draw, judge, and print the report, which is also written to `report.json` and `report.md` in `out`."""
    network = open_inception(wanted.inception) if wanted.inception else None
    world = open_world(open_judge(wanted.judge), wanted.sprites, wanted.config, wanted.seed)
    model = opened(wanted.model, {"device": wanted.device})
    request = request_for(model, wanted.batch, steps=wanted.steps, guidance_scale=wanted.guidance_scale)
    data = world.taught.config.model_dump(mode="json", exclude={"path"})
    shown = hash_paths([world.taught.config.path / "index.json"])
    claim(wanted.out, model, request, {"data": data, "sprites": shown, "seed": wanted.seed})
    evaluation = Evaluation(world, wanted.out, wanted.count)
    report: dict[str, Any] = {
        "model": fingerprint(model), "judge": hash_paths([wanted.judge / JUDGE]), "version": __version__,
        "request": request.model_dump(mode="json", exclude_none=True, exclude={"prompt", "seed"}),
        "data": data, "sprites": shown, "seed": wanted.seed, "scenes_a_group": wanted.count,
        "drawing": _drawn(evaluation, model, request),
    }  # fmt: skip
    with console.busy("judging"):
        scored = {group: evaluation.score(group) for group in evaluation.asked}
        report["scores"] = scores_json(scored)
        report["copies"] = {group: evaluation.copies(group) for group in evaluation.asked}
    if network is not None:
        with steps_progress("features") as progress:
            report["distances"] = evaluation.distances(network, pick_device(wanted.device), progress)
    write_json(wanted.out / "report.json", report)
    text = markdown(report)
    write_atomically(wanted.out / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
    if as_json:
        console.print_json(report)
    else:
        console.out.print(text, markup=False)


def _drawn(evaluation: Evaluation, model: Model, request: Request) -> dict[str, float]:
    """Draw what is missing; how many pictures that were, and how long it took."""
    started, total = time.perf_counter(), evaluation.count * len(evaluation.asked)
    try:
        with steps_progress("drawing") as progress:
            drawn = evaluation.draw(model, request, progress)
    except KeyboardInterrupt:
        there = sum(1 for _ in evaluation.out.glob("*/drawn/*.png"))
        console.note(f"{there} of {total} pictures are drawn; the same command goes on from here")
        raise
    return {"pictures": drawn, "seconds": round(time.perf_counter() - started, 2)}
