"""Watch a picture come about: keep the model's answer at every step and decode them all."""

import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import reverie
from reverie.engine.request import Request


def main(out: Path) -> None:
    model = reverie.load()
    answers: list[Tensor] = []
    request = Request(prompt="a sun", seed=1, steps=8)
    model.draw(request, watch=lambda done, total, x0: answers.append(x0))
    pixels = model.decode(torch.cat(answers), request)
    strip = torch.cat(list(pixels), dim=2).permute(1, 2, 0)
    Image.fromarray((strip * 255).byte().numpy()).save(out)
    print(out, len(answers), "answers")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "watch.png"))
