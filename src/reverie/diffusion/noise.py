"""Random numbers: a stream per picture, so that a picture depends on its own seeds alone."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

Rng = Literal["cpu", "philox", "device"]
"""Whose random numbers: PyTorch's on the CPU, CUDA's computed anywhere, or those of the device itself."""

Stream = Callable[[Sequence[int]], Tensor]
"""`(shape) -> standard normal float32`; each call goes on where the last one ended."""

Words = NDArray[np.uint64]

# Philox4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3): multipliers, key steps.
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF

NEARLY_EQUAL = 0.9995  # above this cosine two noises are mixed along a line (AUTOMATIC1111's slerp)
TREE_DIGITS = 6  # to which torchsde's BrownianTree rounds its times (its tolerance of 1e-6)


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10 of many counters under one key: `(4, n)` words of 32 bits -> `(4, n)` random words of 32 bits."""
    low, high = np.uint64(WORD), np.uint64(32)
    c0, c1, c2, c3 = counter
    for i in range(ROUNDS):
        k0, k1 = (np.uint64((k + i * step) & WORD) for k, step in zip(key, KEY_STEPS, strict=True))
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (second >> high) ^ c1 ^ k0, second & low, (first >> high) ^ c3 ^ k1, first & low
    return np.stack([c0, c1, c2, c3])


def box_muller(x: Words, y: Words) -> NDArray[np.float32]:
    """Standard normal numbers of two rows of random words, the sine branch, in float32 as cuRAND computes it.

    `u = x 2⁻³² + 2⁻³³` and the angle likewise are fused multiply-adds there: rounded once, which float64 does.
    """
    turn = float(np.float32(2 * np.pi) * np.float32(2.0**-32))
    u = (x.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32)
    angle = (y.astype(np.float32).astype(np.float64) * turn + turn / 2).astype(np.float32)
    normal: NDArray[np.float32] = np.sqrt(np.float32(-2) * np.log(u)) * np.sin(angle)
    return normal


class Philox:
    """What `torch.randn(..., device="cuda")` draws, on any device: AUTOMATIC1111's random number source "NV".

    Number i of call c comes from the counter `(c, 0, i, 0)` under the seed. Equal to a GPU's up to its approximate
    sine, near 1e-6, as long as the GPU has a thread for each number (36,864 on a small one, 270,336 on an H200);
    beyond that one GPU differs from another.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.key = (seed & WORD, (seed >> 32) & WORD)
        self.device = torch.device(device)
        self.calls = 0

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """The next `shape` float32."""
        count = int(np.prod(shape))
        counter = np.zeros((4, count), dtype=np.uint64)
        counter[0], counter[2] = self.calls, np.arange(count)
        self.calls += 1
        words = philox4x32(counter, self.key)
        return torch.from_numpy(box_muller(words[0], words[1])).reshape(tuple(shape)).to(self.device)


def stream(seed: int, rng: Rng = "cpu", device: torch.device | str = "cpu") -> Stream:
    """A stream of standard normal noise that ends up on `device`."""
    if rng == "philox":
        return Philox(seed, device)
    home = torch.device(device if rng == "device" else "cpu")
    generator = torch.Generator(home).manual_seed(seed)
    return lambda shape: torch.randn(tuple(shape), generator=generator, device=home, dtype=torch.float32).to(device)


def picture_seeds(seed: int, variation_seed: int, strength: float, count: int) -> tuple[list[int], list[int]]:
    """Seeds and variation seeds of `count` pictures, by AUTOMATIC1111's rule.

    Picture i has the variation seed + i, and the seed + i too unless the variation has any strength: then the seed
    stays, and the pictures are variations of one.
    """
    step = 1 if strength == 0 else 0
    return [seed + i * step for i in range(count)], [variation_seed + i for i in range(count)]


def slerp(strength: float, start: Tensor, end: Tensor) -> Tensor:
    """Between two noises `(C, h, w)` along great circles: `start` at 0, `end` at 1.

    The angle is taken along the height, for each channel and column by itself (AUTOMATIC1111).
    """
    directions = (t / torch.linalg.vector_norm(t, dim=1, keepdim=True) for t in (start, end))
    cosine = torch.mul(*directions).sum(1, keepdim=True)
    if float(cosine.mean()) > NEARLY_EQUAL:
        return torch.lerp(start, end, strength)
    angle = torch.acos(cosine)
    return (torch.sin((1 - strength) * angle) * start + torch.sin(strength * angle) * end) / torch.sin(angle)


def centred(noise: Tensor, onto: Tensor) -> Tensor:
    """`onto` `(C, h, w)` with `noise` `(C, h', w')` in its middle, cut where it is larger."""
    places = [_overlap(new, old) for new, old in zip(onto.shape[1:], noise.shape[1:], strict=True)]
    result = onto.clone()
    result[(slice(None), *(to for to, _ in places))] = noise[(slice(None), *(come for _, come in places))]
    return result


def _overlap(new: int, old: int) -> tuple[slice, slice]:
    """Where `old` points lie in `new` ones, and which of them (rounded as AUTOMATIC1111 does)."""
    shift = (new - old) // 2
    width = old + 2 * min(shift, 0)
    to, come = max(shift, 0), max(-shift, 0)
    return slice(to, to + width), slice(come, come + width)


class SeededNoise:
    """Standard normal noise for a batch, row i from a stream of its own seeded with `seeds[i]`.

    The first call draws the noise that a picture starts from, the following ones the noise on the way. Row i is the
    same for any batch size or order, and unless `rng` is `device` on any device. With the defaults the stream
    equals that of a list of CPU generators in diffusers.

    Args:
        seeds: one per picture.
        shape: `(C, h, w)` of one picture's latent.
        rng: whose random numbers.
        eta_noise_delta: where it is not 0, the noise on the way comes from new streams seeded `seed + delta`
            (AUTOMATIC1111's ENSD).
        variation_seeds: one per picture; `variation_strength` of their first noise is mixed in.
        seed_size: `(h', w')`: the first noise is that of a latent of this size, in the middle of new noise.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        rng: Rng = "cpu",
        eta_noise_delta: int = 0,
        variation_seeds: Sequence[int] = (),
        variation_strength: float = 0.0,
        seed_size: tuple[int, int] | None = None,
    ) -> None:
        self.shape = tuple(shape)
        self.device = torch.device(device)
        self.rng = rng
        self._seeds = list(seeds)
        self._delta = eta_noise_delta
        self._variations = list(variation_seeds) if variation_strength else []
        self._strength = variation_strength
        self._first_shape = (self.shape[0], *seed_size) if seed_size else self.shape
        self._streams = [self._stream(seed) for seed in self._seeds]
        self._started = False

    def before(self, shape: Sequence[int] | None = None) -> Tensor:
        """A draw ahead of the first one: diffusers samples a picture's latents with the generator of its noise.

        Args:
            shape: of one row; that of a latent if None.
        """
        return torch.stack([draw(self.shape if shape is None else shape) for draw in self._streams])

    def __call__(self) -> Tensor:
        """The next `(B, *shape)` float32."""
        if self._started:
            return torch.stack([draw(self.shape) for draw in self._streams])
        self._started = True
        rows = [self._first(i) for i in range(len(self._seeds))]
        if self._delta:
            self._streams = [self._stream(seed + self._delta) for seed in self._seeds]
        return torch.stack(rows)

    def _stream(self, seed: int) -> Stream:
        return stream(seed, self.rng, self.device)

    def _first(self, i: int) -> Tensor:
        """The noise that picture i starts from."""
        resized = self._first_shape != self.shape
        draw = self._stream(self._seeds[i]) if resized else self._streams[i]
        noise = draw(self._first_shape)
        if self._variations:
            noise = slerp(self._strength, noise, self._stream(self._variations[i])(self._first_shape))
        return centred(noise, self._streams[i](self.shape)) if resized else noise


class BrownianNoise:
    """Noise for SDE samplers: normalised increments of one Brownian path per picture, over sigma.

    The paths are those of torchsde's BrownianTree, as k-diffusion seeds and asks them: on the CPU its pictures, and
    AUTOMATIC1111's, come out bit for bit. A path does not depend on which increments are asked for, nor in which
    order, so that more steps refine the same picture.

    Args:
        seeds: one per picture.
        shape: `(C, h, w)` of one picture's latent.
        sigma_min, sigma_max: the ends of the path: the lowest sigma above 0 and the highest.
        rng: whose random numbers build the path.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str,
        sigma_min: float,
        sigma_max: float,
        *,
        rng: Rng = "cpu",
    ) -> None:
        import torchsde

        self.device = torch.device(device)
        self.rng = rng
        start = torch.zeros(tuple(shape), dtype=torch.float32, device=self.device if rng == "device" else "cpu")
        low, high = _float32(sigma_min), _float32(sigma_max)
        self._ends = round(low, TREE_DIGITS), round(high, TREE_DIGITS)
        with self._drawing():
            self._trees = [torchsde.BrownianTree(low, start, high, entropy=seed) for seed in seeds]

    def __call__(self, sigma: float, sigma_next: float) -> Tensor:
        """`(W(sigma_next) - W(sigma)) / sqrt(|sigma_next - sigma|)`, `(B, *shape)` float32; 0 where they are equal."""
        sigma, sigma_next = _float32(sigma), _float32(sigma_next)
        # a tree warns of times outside its rounded ends, and then does the same
        low, high = (min(max(t, self._ends[0]), self._ends[1]) for t in sorted((sigma, sigma_next)))
        with self._drawing():
            path = torch.stack([tree(low, high) for tree in self._trees]).to(self.device)
        length = torch.tensor(sigma_next, dtype=torch.float32) - torch.tensor(sigma, dtype=torch.float32)
        return path if length == 0 else path * (1 if length > 0 else -1) / length.abs().sqrt()

    def _drawing(self) -> AbstractContextManager[object]:
        return _PhiloxMode() if self.rng == "philox" else nullcontext()


def _float32(value: float) -> float:
    return float(np.float32(value))


class _PhiloxMode(TorchFunctionMode):
    """Within it, `torch.randn` with a fresh generator draws from `Philox` with that generator's seed.

    torchsde makes a generator for every node of its tree and lets nobody choose another kind. A mode holds for the
    thread that entered it.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn:
            return Philox(kwargs["generator"].initial_seed())(*args).to(kwargs["dtype"])
        return func(*args, **kwargs)
