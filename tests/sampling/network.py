"""A U-Net with random weights, small enough to be asked a few hundred times a second, and conditions for it."""

from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from reverie.diffusion.parameterisation import PARAMETERISATIONS
from reverie.diffusion.process import Process
from reverie.families.base import preconditioned
from reverie.nets.unet import UNet, UNetConfig
from reverie.sampling.guidance import Clock, Conditions, Guidance, Guided, Weight, guided
from reverie.sampling.guides import Context, build
from reverie.sampling.tapping import Layout
from reverie.types import Cond, Predict

PROCESS = Process.named()
CONFIG = UNetConfig(
    in_channels=8, block_out_channels=(16, 32), attention=(True, False), heads=(2, 2), layers_per_block=1,
    context_width=12, groups=8,
)  # fmt: skip
SIZE = 8  # latents
SCALE_4 = Weight(4.0)


@cache
def unet() -> UNet:
    """Weights as torch draws them, but for attention that looks somewhere in particular."""
    torch.manual_seed(3)
    network = UNet(CONFIG).eval().requires_grad_(False)
    for name, weight in network.named_parameters():
        if ".attn1.to_q" in name or ".attn1.to_k" in name:
            weight.mul_(4)
    return network


def predict(prediction: str = "epsilon") -> Predict:
    return preconditioned(unet(), PROCESS, PARAMETERISATIONS[prediction], torch.float32)


def context() -> Context:
    return Context(Layout.of(unet()), PROCESS)


def draw(*shape: int, seed: int) -> Tensor:
    """Noise that does not depend on the size of the batch."""
    rows = [torch.randn(shape[1:], generator=torch.Generator().manual_seed(seed + 100 * i)) for i in range(shape[0])]
    return torch.stack(rows)


def cond(seed: int, batch: int = 2, *, picture: bool = True) -> Cond:
    words = draw(1, 5, CONFIG.context_width, seed=seed).expand(batch, -1, -1)
    channels = draw(batch, 4, SIZE, SIZE, seed=1000)
    return Cond(2 * words, channels=channels if picture else torch.zeros_like(channels))


def conditions(batch: int = 2) -> Conditions:
    """Two weighted parts of a prompt, two negative prompts."""
    return Conditions(
        positive=((1.0, cond(1, batch)), (0.5, cond(2, batch))),
        negative=((1.0, cond(3, batch)), (0.4, cond(4, batch))),
        empty=cond(5, batch),
        image_negative=cond(3, batch, picture=False),
    )


def simple(batch: int = 2) -> Conditions:
    """One prompt, one negative prompt."""
    return Conditions(((1.0, cond(1, batch)),), ((1.0, cond(3, batch)),), cond(5, batch), cond(3, batch, picture=False))


def noise(batch: int = 2) -> Tensor:
    return draw(batch, 4, SIZE, SIZE, seed=50)


def sigmas(steps: int) -> list[float]:
    """Levels of a DDIM run: every (1000 / steps)th timestep, then 0."""
    return [*(PROCESS.sigma(t) for t in range(1000 - 1000 // steps + 1, 0, -(1000 // steps))), 0.0]


def steer(
    *wanted: tuple[str, dict[str, Any]],
    given: Conditions | None = None,
    weight: Weight = SCALE_4,
    steps: int = 2,
    prediction: str = "epsilon",
) -> Guided:
    """The `denoise` of one run with these guides."""
    return run_of(build(wanted, context(), weight), given or simple(), steps, prediction)


def run_of(guidance: Guidance, given: Conditions, steps: int = 2, prediction: str = "epsilon") -> Guided:
    clock = Clock(tuple(sigmas(steps)))
    return guided(predict(prediction), lambda index: given, guidance, clock, PARAMETERISATIONS[prediction])


def drawn(denoise: Guided, steps: int = 2, batch: int = 2) -> Tensor:
    """The whole way down with Euler's steps."""
    levels = sigmas(steps)
    x = levels[0] * noise(batch)
    for sigma, down in pairwise(levels):
        x0 = denoise(x, sigma)
        x = x0 + (down / sigma) * (x - x0)
    return x
