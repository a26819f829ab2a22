"""How well a model draws what it is asked for: composed scenes, seen and held out, against their true pictures."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from reverie.checkpoint.save import write_atomically
from reverie.engine.bundle import Model
from reverie.engine.image import save_image
from reverie.engine.request import Request
from reverie.engine.sources import read_picture, to_tensor
from reverie.evaluate.asking import SEEN, World, moved_on, nearest_captions
from reverie.evaluate.copying import nearness
from reverie.evaluate.distances import fid, kid
from reverie.evaluate.drawing import Progress, draw_missing, place
from reverie.evaluate.features import features_of
from reverie.evaluate.scores import Answers, Question, Share, answers, shares
from reverie.nets.inception import Inception
from reverie.nets.judge import Detection, Judge
from reverie.train.data import as_pixels
from reverie.train.judging import said
from reverie.train.scenes import Scene
from reverie.train.scenes.colours import Bytes

DRAWN, TRUE, VERDICTS = "drawn", "true", "verdicts.jsonl"
JUDGED = 64  # pictures at once
POOL = 4000  # training scenes that baselines choose from, and that copies are looked for among


@dataclass(frozen=True)
class Scored:
    """A group of scenes, answered in four ways.

    Attributes:
        drawn: by the model.
        true: the true pictures: what the judge itself gets wrong.
        shuffled: what the model drew for other captions of the group: what chance gets right.
        retrieved: the training picture whose caption has most words in common.
    """

    drawn: dict[Question, Share]
    true: dict[Question, Share]
    shuffled: dict[Question, Share]
    retrieved: dict[Question, Share]


class Evaluation:
    """One run in a folder: `GROUP/drawn`, `GROUP/true` and `GROUP/verdicts.jsonl`; what is there is not drawn again.

    Args:
        count: scenes of each group.
    """

    def __init__(self, world: World, out: Path, count: int) -> None:
        self.world, self.out, self.count = world, out, count
        self.asked: dict[str, list[Scene]] = {group: world.asked(group, count) for group in world.groups}
        self._pool = [world.taught.scene(number) for number in range(POOL)]

    def draw(self, model: Model, request: Request, progress: Progress | None = None) -> int:
        """Draw what is missing; returns how many pictures that were."""
        total, before, drawn = self.count * len(self.asked), 0, 0
        for group, scenes in self.asked.items():

            def shown(done: int, of: int, before: int = before) -> None:
                if progress:
                    progress(before + done, total)

            prompts = [scene.caption for scene in scenes]
            drawn += draw_missing(model, request, prompts, self.out / group / DRAWN, shown)
            self.keep_true(group)
            before += self.count
        return drawn

    def keep_true(self, group: str) -> None:
        """The true pictures, as files beside the drawn ones."""
        folder = self.out / group / TRUE
        folder.mkdir(parents=True, exist_ok=True)
        for number, scene in enumerate(self.asked[group]):
            if not place(folder, number).exists():
                save_image(Image.fromarray(self.world.drawn([scene])[0]), place(folder, number))

    def score(self, group: str) -> Scored:
        """Judge the pictures of a group, and note each verdict."""
        world, scenes = self.world, self.asked[group]
        drawn = seen(world.judge, self._pixels(group, DRAWN))
        true = seen(world.judge, self._pixels(group, TRUE))
        instead = nearest_captions([scene.caption for scene in scenes], [scene.caption for scene in self._pool])
        pool = sorted(set(instead))
        chosen = dict(zip(pool, self._judged(pool), strict=True))
        verdicts = self._answers(scenes, drawn)
        self._note(group, drawn, verdicts)
        return Scored(
            drawn=shares(verdicts),
            true=shares(self._answers(scenes, true)),
            shuffled=shares(self._answers(scenes, [drawn[n] for n in moved_on(len(drawn))])),
            retrieved=shares(self._answers(scenes, [chosen[n] for n in instead])),
        )

    def _answers(self, scenes: Sequence[Scene], found: Sequence[list[Detection]]) -> list[Answers]:
        return [answers(scene, one, self.world.truth) for scene, one in zip(scenes, found, strict=True)]

    def _judged(self, numbers: Sequence[int]) -> list[list[Detection]]:
        """What the judge sees in scenes of the pool."""
        return seen(self.world.judge, _as_tensor(self.world.drawn([self._pool[n] for n in numbers])))

    def _note(self, group: str, found: Sequence[list[Detection]], verdicts: Sequence[Answers]) -> None:
        lines = [
            {"number": n, "caption": scene.caption, "kind": scene.kind, "things": [asdict(t) for t in scene.things],
             "relation": scene.relation, "seen": said(self.world.judge.config, one), "answers": verdict}
            for n, (scene, one, verdict) in enumerate(zip(self.asked[group], found, verdicts, strict=True))
        ]  # fmt: skip
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(self.out / group / VERDICTS, lambda path: path.write_text(text, encoding="utf-8"))

    def copies(self, group: str) -> dict[str, dict[str, float]]:
        """How near the pictures of a group are to training pictures: in the judge's features, and in pixels."""
        pictures = (self._pixels(group, DRAWN), self._pixels(group, TRUE), self._pool_pixels)
        features = (*(looks(self.world.judge, pixels) for pixels in pictures[:2]), self._pool_looks)
        by = {"pixels": tuple(pixels.flatten(1) for pixels in pictures), "features": features}
        return {name: nearness(*three).json() for name, three in by.items()}

    @cached_property
    def _pool_pixels(self) -> Tensor:
        return _as_tensor(self.world.drawn(self._pool))

    @cached_property
    def _pool_looks(self) -> Tensor:
        return looks(self.world.judge, self._pool_pixels)

    def distances(self, network: Inception, device: torch.device, progress: Progress | None = None) -> dict[str, Any]:
        """FID and KID of drawn against true pictures: of seen scenes, of as many held-out ones, and the gap."""
        held = [group for group in self.asked if group != SEEN]
        chosen = {SEEN: [(SEEN, n) for n in range(self.count)]}
        if held:
            chosen["held out"] = [(held[n % len(held)], n // len(held)) for n in range(self.count)]
        found: dict[str, Any] = {}
        for name, numbers in chosen.items():
            true, drawn = (
                features_of([place(self.out / g / kind, n) for g, n in numbers], network, device, progress=progress)
                for kind in (TRUE, DRAWN)
            )
            between = kid(true, drawn)
            found[name] = {"fid": fid(true, drawn), "kid": between.mean, "kid_deviation": between.deviation,
                           "pictures": len(numbers)}  # fmt: skip
        if held:
            found["gap"] = {key: found["held out"][key] - found[SEEN][key] for key in ("fid", "kid")}
        return found

    def _pixels(self, group: str, kind: str) -> Tensor:
        """The pictures of a group at the size that the judge knows: `(N, 3, size, size)` in [-1, 1]."""
        size, folder = self.world.judge.config.size, self.out / group / kind
        pictures = (read_picture(str(place(folder, n)), "picture").convert("RGB") for n in range(self.count))
        return torch.cat([to_tensor(_sized(picture, size)) for picture in pictures]) * 2 - 1


@torch.no_grad()
def seen(judge: Judge, pixels: Tensor) -> list[list[Detection]]:
    """What a judge sees in pictures `(N, 3, H, W)` in [-1, 1]."""
    parts = (pixels[start : start + JUDGED] for start in range(0, len(pixels), JUDGED))
    return [found for part in parts for found in judge(part)]


@torch.no_grad()
def looks(judge: Judge, pixels: Tensor) -> Tensor:
    """The judge's features of pictures `(N, 3, H, W)` in [-1, 1]: `(N, D)`."""
    return torch.cat([judge.features(pixels[start : start + JUDGED]) for start in range(0, len(pixels), JUDGED)])


def _sized(picture: Image.Image, size: int) -> Image.Image:
    return picture if picture.size == (size, size) else picture.resize((size, size), Image.Resampling.LANCZOS)


def _as_tensor(pictures: Bytes) -> Tensor:
    return as_pixels(torch.from_numpy(pictures))
