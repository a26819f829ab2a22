"""Write the bundled model's card and its sheet of pictures: every number in it was measured.

    reverie evaluate scenes --judge runs/emoji-judge/export --config recipes/emoji/scenes_further.toml \\
        --inception inception.safetensors --out evaluation
    python -m recipes.emoji.card --evaluation evaluation --autoencoder recipes/emoji/scenes_autoencoder.toml \\
        --diffusion recipes/emoji/scenes_{diffusion,further,pairs,composed}.toml \\
        --on "two CPU cores, float32"
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from recipes.emoji.styles import STYLES

from reverie.checkpoint.save import write_atomically
from reverie.checkpoint.source import open_weights
from reverie.engine.bundle import bundled_path
from reverie.engine.grid import captioned
from reverie.engine.image import save_image
from reverie.engine.sources import read_picture, to_tensor
from reverie.engine.upscale import Upscaler, open_upscaler
from reverie.evaluate.drawing import place
from reverie.evaluate.report import TITLES, markdown, table
from reverie.evaluate.scenes import DRAWN, VERDICTS
from reverie.train.config import AutoencoderRun, DataConfig, DiffusionRun, LoopConfig, read_config
from reverie.train.data import as_images
from reverie.train.scenes.config import ScenesConfig

COLUMNS, ROWS, HEADING, SHOWN = 8, 2, 34, 128  # of the sheet; pixels of a heading and of a picture
LATEST = 100  # steps of training that a loss is averaged over
OFTEN, NAMED = 5, 8  # asked for at least so often to be among the so many best and worst drawn things
TEXT = Path(__file__).with_name("card.md")


@dataclass(frozen=True)
class Verdict:
    """What one picture of an evaluation shows.

    Attributes:
        things: names of what was asked for.
        seen: what the judge sees, in words.
        found: whether each thing was found.
        right: whether everything was right.
    """

    group: str
    number: int
    caption: str
    things: tuple[str, ...]
    seen: str
    found: tuple[bool, ...]
    right: bool


def verdicts(evaluation: Path, groups: Sequence[str]) -> list[Verdict]:
    """Every verdict of an evaluation."""
    return [_verdict(group, line) for group in groups for line in _lines(evaluation / group / VERDICTS)]


def _verdict(group: str, line: dict[str, Any]) -> Verdict:
    given, things = line["answers"], tuple(thing["concept"] for thing in line["things"])
    found = tuple(given["object"])
    return Verdict(group, line["number"], line["caption"], things, line["seen"], found, all(given["all"]))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def sheet(evaluation: Path, given: Sequence[Verdict]) -> Image.Image:
    """The first pictures of every group, nothing picked, and of those that the judge finds wrong as many, evenly."""
    groups = list(dict.fromkeys(one.group for one in given))
    parts = [(TITLES[group], [one for one in given if one.group == group]) for group in groups]
    wrong = [one for one in given if not one.right]
    failed = wrong[:: max(len(wrong) // (COLUMNS * ROWS), 1)]
    parts.append(("failed, and what the judge sees", failed))
    return _stacked([(title, _row(evaluation, some, told=some is failed)) for title, some in parts if some])


def _row(evaluation: Path, given: Sequence[Verdict], *, told: bool) -> Image.Image:
    chosen = list(given)[: COLUMNS * ROWS]
    names = [f"{one.caption}. Seen: {one.seen}" if told else one.caption for one in chosen]
    return captioned([_enlarged(place(evaluation / one.group / DRAWN, one.number)) for one in chosen], names, COLUMNS)


def _enlarged(path: Path) -> Image.Image:
    """A picture as `reverie generate` gives it, at half its size."""
    large = _upscaler().enlarge(to_tensor(read_picture(str(path), "picture").convert("RGB")))
    return as_images(large * 2 - 1)[0].resize((SHOWN, SHOWN), Image.Resampling.LANCZOS)


@cache
def _upscaler() -> Upscaler:
    return open_upscaler("realesr-animevideov3-x4")


def _stacked(parts: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Sheets under one another, each below its title."""
    width, height = max(part.width for _, part in parts), sum(part.height + HEADING for _, part in parts)
    page, y = Image.new("RGB", (width, height), "white"), 0
    draw = ImageDraw.Draw(page)
    for title, part in parts:
        draw.text((12, y + 8), title, "black", ImageFont.load_default(20))
        page.paste(part, (0, y + HEADING))
        y += HEADING + part.height
    return page


def extremes(given: Sequence[Verdict]) -> tuple[str, str]:
    """The things that are found most and least often, in words."""
    asked: Counter[str] = Counter(thing for one in given for thing in one.things)
    found = Counter(thing for one in given for thing, right in zip(one.things, one.found, strict=True) if right)
    often = sorted((thing for thing in asked if asked[thing] >= OFTEN), key=lambda thing: found[thing] / asked[thing])
    words = [f"{thing} ({100 * found[thing] / asked[thing]:.0f} % of {asked[thing]})" for thing in often]
    return ", ".join(words[: -NAMED - 1 : -1]), ", ".join(words[:NAMED])


def weak(scores: dict[str, Any]) -> str:
    """The kinds of scenes whose question is answered rightly less than half of the time, in words."""
    questions = {"seen": "all", "word": "object"}
    shares = {group: (questions.get(group, group), scores[group]["drawn"]) for group in scores}
    rows = [(TITLES[group], name, drawn[name]["share"]) for group, (name, drawn) in shares.items()]
    return ", ".join(f"{title} ({name} {100 * share:.0f} %)" for title, name, share in rows if share < 0.5) or "nothing"


def architecture(model: Path) -> str:
    """What the model consists of, from its files."""
    rows = []
    for part in ("text_encoder", "unet", "vae"):
        config = json.loads((model / part / "config.json").read_text(encoding="utf-8"))
        file = next((model / part).glob("*.safetensors"))
        tensors = open_weights(file).tensors.values()
        count = sum(tensor.count for tensor in tensors)
        rows.append([f"`{part}`", f"{count / 1e6:.1f} M", f"{file.stat().st_size / 1e6:.1f} MB", _shape(part, config)])
    return table(["part", "parameters", "file", "shape"], rows)


def _shape(part: str, config: dict[str, Any]) -> str:
    if part == "text_encoder":
        return (
            f"CLIP text transformer: {config['num_hidden_layers']} layers, {config['hidden_size']} wide, "
            f"{config['max_position_embeddings']} positions, vocabulary of {config['vocab_size']:,}"
        )
    channels = ", ".join(map(str, config["block_out_channels"]))
    if part == "unet":
        attended = ["CrossAttn" in name for name in config["down_block_types"]]
        levels = ", ".join(str(n + 1) for n, there in enumerate(attended) if there)
        return f"U-Net: {channels} channels, cross-attention at level {levels}"
    return f"KL autoencoder: {channels} channels, {config['latent_channels']} in the latents"


def licences(autoencoders: Sequence[AutoencoderRun], diffusions: Sequence[DiffusionRun]) -> str:
    """Whose drawings were learned from, on what terms, and by which part of the model."""
    parts = {"autoencoder": [run.data for run in autoencoders]}
    parts["text encoder and U-Net"] = [run.data for run in diffusions]
    rows = []
    for style in STYLES:
        taught = [part for part, sets in parts.items() if any(_shows(one, style.key) for one in sets)]
        if taught:
            rows.append([style.key, style.set_name, style.authors, style.licence, ", ".join(taught)])
    return table(["style", "set", "authors", "licence", "learned by"], rows)


def _shows(data: DataConfig | ScenesConfig, style: str) -> bool:
    return isinstance(data, ScenesConfig) and (style in data.styles or not data.styles)


def first(diffusions: Sequence[DiffusionRun]) -> str:
    """What is to be said of schedules that learned from other pictures than composed ones; nothing without any."""
    single = sum(isinstance(run.data, DataConfig) for run in diffusions)
    if not single:
        return ""
    return f" The first {single} schedules of text encoder and U-Net learned from single drawings on white."


def costs(autoencoders: Sequence[AutoencoderRun], diffusions: Sequence[DiffusionRun], device: str) -> str:
    """What training took, from the runs' own logs."""
    loops = [("autoencoder", run.loop) for run in autoencoders]
    loops += [("text encoder and U-Net", run.loop) for run in diffusions]
    head = ["trained", "steps", "samples", "seconds", f"loss of the last {LATEST} steps", "on"]
    return table(head, [_cost(what, loop, device) for what, loop in loops])


def _cost(what: str, loop: LoopConfig, device: str) -> list[str]:
    log = list(_lines(loop.out / "log.jsonl"))
    last = log[-LATEST:]
    end = f"{sum(line['loss'] for line in last) / len(last):.4f}"
    if "psnr" in last[0]:
        end += f" ({sum(line['psnr'] for line in last) / len(last):.1f} dB PSNR)"
    samples = len(log) * loop.batch * loop.accumulate
    return [what, f"{len(log):,}", f"{samples:,}", f"{sum(line['seconds'] for line in log):,.0f}", end, device]


def card(report: dict[str, Any], given: Sequence[Verdict], model: Path, training: dict[str, str], picture: str) -> str:
    """The whole card, from `card.md` and what was measured.

    Args:
        training: `training`, what it cost, `licences`, of what was learned from, and `first`, what came before.
        picture: the line that shows the sheet, or says where it is.
    """
    data = ScenesConfig.model_validate({**report["data"], "path": model})
    request, (best, worst) = report["request"], extremes(given)
    drawing = f"{request['steps']} steps of {request['sampler']}, guidance scale {request['guidance_scale']:g}"
    things = data.concepts if isinstance(data.concepts, list) else [f"the {data.concepts} best known things"]
    facts = {
        "architecture": architecture(model), **training, "weak": weak(report["scores"]), "scores": markdown(report),
        "best": best, "worst": worst, "things": ", ".join(things), "styles": ", ".join(data.styles), "picture": picture,
        "count": str(report["scenes_a_group"]), "drawing": drawing, "hash": report["model"]["hash"][:12],
        "judge": report["judge"][:12],
    }  # fmt: skip
    text = TEXT.read_text(encoding="utf-8")
    for name, fact in facts.items():
        text = text.replace("{" + name + "}", fact.rstrip())
    return text


def main() -> None:
    """Draw the sheet and write both cards."""
    parser = argparse.ArgumentParser(description="Write the bundled model's card and its sheet of pictures.")
    parser.add_argument("--evaluation", type=Path, required=True, help="folder that `reverie evaluate scenes` filled")
    parser.add_argument("--autoencoder", type=Path, nargs="*", default=[], help="configurations it was trained by")
    parser.add_argument("--diffusion", type=Path, nargs="+", required=True, help="configurations it was trained by")
    parser.add_argument("--on", required=True, help="what it was trained on, in words")
    parser.add_argument("--model", type=Path, default=bundled_path(), help="the model's folder")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    wanted = parser.parse_args()
    report = json.loads((wanted.evaluation / "report.json").read_text(encoding="utf-8"))
    given = verdicts(wanted.evaluation, list(report["scores"]))
    save_image(sheet(wanted.evaluation, given), wanted.docs / "model-card.png")
    autoencoders = [read_config(AutoencoderRun, path) for path in wanted.autoencoder]
    diffusions = [read_config(DiffusionRun, path) for path in wanted.diffusion]
    runs = autoencoders, diffusions
    training = {"training": costs(*runs, wanted.on), "licences": licences(*runs), "first": first(diffusions)}
    for path, picture in (
        (wanted.docs / "model-card.md", "![Seen, held-out and failed prompts](model-card.png)"),
        (
            wanted.model / "README.md",
            "A sheet of its pictures is in the project's documentation, `docs/model-card.png`.",
        ),
    ):
        text = card(report, given, wanted.model, training, picture)
        write_atomically(path, partial(_write, text))
        print(path)


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
