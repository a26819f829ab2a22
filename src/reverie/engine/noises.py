"""The noise of a batch of pictures, by the rules of a request and its preset."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from reverie.diffusion.noise import BrownianNoise, SeededNoise, stream
from reverie.engine.plan import Pass
from reverie.engine.request import Request
from reverie.sampling.presets import Preset


class Noises(Protocol):
    """What the engine draws from: each call the next standard normal `(B, C, h, w)`."""

    def before(self, shape: Sequence[int] | None = None) -> Tensor:
        """A draw ahead of the first: diffusers samples a picture's latents with the same generator.

        Args:
            shape: of one picture's; that of its latents if None.
        """

    def __call__(self) -> Tensor:
        """The next; the first is what the picture starts from."""


class SharedNoise:
    """One generator draws for all pictures of a request at once, as ComfyUI and diffusers do by default.

    Args:
        seed: of the request.
        count: pictures of the request; `rows` are those of this batch.
        restarted: noise on the way comes from a generator of its own: the same seed on the model's device, seed + 1
            on the CPU (ComfyUI, so that it is not the first noise again).
    """

    def __init__(
        self, seed: int, count: int, rows: Sequence[int], shape: Sequence[int], device: torch.device, *,
        rng: str, restarted: bool,
    ) -> None:  # fmt: skip
        self._shape, self._rows, self._count = (count, *shape), list(rows), count
        self._draw = stream(seed, rng, device)  # type: ignore[arg-type]
        self._restart = (seed + (device.type == "cpu"), device) if restarted else None

    def before(self, shape: Sequence[int] | None = None) -> Tensor:
        """The next, whatever comes after."""
        return self._draw(self._shape if shape is None else (self._count, *shape))[self._rows]

    def __call__(self) -> Tensor:
        """The next `(B, C, h, w)`."""
        noise = self.before()
        if self._restart:
            self._draw, self._restart = stream(self._restart[0], "device", self._restart[1]), None
        return noise


def noises(
    request: Request, preset: Preset, own: Sequence[Request], rows: Sequence[int], shape: Sequence[int],
    device: torch.device, factor: int,
) -> Noises:  # fmt: skip
    """The noise of a batch.

    Args:
        own: of each picture the request that draws it alone.
        rows: the places of the pictures in the request.
        shape: `(C, h, w)` of one picture's latents.
        factor: pixels a latent.
    """
    rng = request.rng or "cpu"
    if preset.seeds == "batch":
        restarted = preset.step_noise == "restarted"
        return SharedNoise(request.seed or 0, request.count, rows, shape, device, rng=rng, restarted=restarted)
    size = None
    if request.seed_width and request.seed_height:
        size = (request.seed_height // factor, request.seed_width // factor)
    return SeededNoise(
        [r.seed or 0 for r in own], shape, device, rng=rng,
        eta_noise_delta=request.eta_noise_delta or preset.eta_noise_delta,
        variation_seeds=[r.variation_seed or 0 for r in own], variation_strength=own[0].variation_strength,
        seed_size=size,
    )  # fmt: skip


def brownian(
    request: Request, preset: Preset, own: Sequence[Request], rows: Sequence[int], shape: Sequence[int],
    device: torch.device, run: Pass,
) -> Callable[[float, float], Tensor]:  # fmt: skip
    """Brownian noise for the SDE samplers, between the ends of the pass."""
    levels = [sigma for sigma in run.path.tolist() if sigma > 0]
    rng = request.rng or "cpu"
    if preset.seeds == "batch":
        whole = BrownianNoise([request.seed or 0], (request.count, *shape), device, levels[-1], levels[0], rng=rng)
        chosen = list(rows)
        return lambda sigma, following: whole(sigma, following)[0, chosen]
    return BrownianNoise([r.seed or 0 for r in own], shape, device, levels[-1], levels[0], rng=rng)
