"""Watch a picture come about: wrap `denoise` and keep the model's answer at every step."""

import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import reverie
from reverie.engine import generate as engine
from reverie.engine.request import Request


def main(out: Path) -> None:
    model = reverie.load()
    answers: list[Tensor] = []
    todo = engine.plan(model, engine.resolve(model, Request(prompt="a smiling sun", seed=1, steps=8)))
    conditions = engine.encode(model, ["a smiling sun", ""], clip_skip=1)
    engine.sample(model, todo, conditions, [1], lambda sigma, x0: answers.append(x0))
    pictures = engine.finish(model, torch.cat(answers), upscaler=None)
    strip = torch.cat(list(pictures), dim=1)
    Image.fromarray((strip * 255).byte().numpy()).save(out)
    print(out)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "watch.png"))
