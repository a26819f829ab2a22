"""The autoencoder in tiles: big pictures in little memory, without seams.

Two things make tiles visible: convolutions that see the tile's edge, and group norms that see the tile alone. Each
tile is therefore computed with a margin that is cut away, and the norms of all tiles share the statistics of the whole
picture: they are gathered in passes of their own, each under the statistics that the pass before it found.

The middle block, whose attention sees everything, runs whole: it is small, 1/64 of the pixels.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from reverie.nets.autoencoder import Autoencoder, Decoder, Encoder
from reverie.nets.blocks import activated

MARGIN = 12  # latents around a tile; 13 is as far as the decoder of Stable Diffusion sees beyond its middle block
GATHERING_MARGIN = 3  # while statistics are gathered, which average over everything
PASSES = 4  # of gathering; each makes one more norm exact, and the error of the rest about three times smaller


@dataclass
class _Statistics:
    """What the norms of a picture share.

    Attributes:
        found: `(mean, variance)` of each norm, `(B, groups)`, from the pass before.
        sums: what this pass has added up: pixels, sum, sum of squares.
        inner: the part of the present tile that is its own, as fractions of its height and width.
    """

    found: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    sums: dict[str, tuple[int, Tensor, Tensor]] = field(default_factory=dict)
    inner: tuple[float, float, float, float] = (0.0, 1.0, 0.0, 1.0)

    def add(self, name: str, x: Tensor, groups: int) -> None:
        """Count the present tile's own part of the input of a norm."""
        height, width = x.shape[-2:]
        top, bottom, left, right = self.inner
        own = x[..., round(top * height) : round(bottom * height), round(left * width) : round(right * width)].float()
        own = own.reshape(len(own), groups, -1)
        count, total, squares = self.sums.get(name, (0, torch.zeros(()), torch.zeros(())))
        total = total.to(own) + own.sum(-1)
        self.sums[name] = (count + own.shape[-1], total, squares.to(own) + own.square().sum(-1))

    def next_pass(self) -> None:
        """What was added up becomes what is applied."""
        for name, (count, total, squares) in self.sums.items():
            mean = total / count
            self.found[name] = (mean, (squares / count - mean.square()).clamp(min=0))
        self.sums = {}


class _SharedNorm(nn.GroupNorm):
    """A group norm that knows the whole picture's statistics and adds to them."""

    name: str
    statistics: _Statistics

    def forward(self, x: Tensor) -> Tensor:
        shared = self.statistics
        shared.add(self.name, x, self.num_groups)
        if self.name not in shared.found:
            return super().forward(x)
        mean, variance = shared.found[self.name]
        scale = (variance + self.eps).rsqrt().repeat_interleave(x.shape[1] // self.num_groups, 1) * self.weight.float()
        shift = self.bias.float() - mean.repeat_interleave(x.shape[1] // self.num_groups, 1) * scale
        return (x * scale[..., None, None] + shift[..., None, None]).to(x.dtype)


@dataclass(frozen=True)
class _Tile:
    """A rectangle of its own and the larger one that is computed, in pixels of the input."""

    own: tuple[slice, slice]
    seen: tuple[slice, slice]


def _tiles(height: int, width: int, size: int, margin: int) -> Iterator[_Tile]:
    for top in range(0, height, size):
        for left in range(0, width, size):
            own = (slice(top, min(top + size, height)), slice(left, min(left + size, width)))
            seen = tuple(
                slice(max(s.start - margin, 0), min(s.stop + margin, most))
                for s, most in zip(own, (height, width), strict=True)
            )
            yield _Tile(own, (seen[0], seen[1]))


def _run(part: Callable[[Tensor], Tensor], x: Tensor, shared: _Statistics, sizes: tuple[int, int, float]) -> Tensor:
    """One pass of `part` over all tiles of `x`; `sizes`: tile, margin, and pixels out for one pixel in."""
    size, margin, ratio = sizes
    out: Tensor | None = None
    for tile in _tiles(x.shape[-2], x.shape[-1], size, margin):
        rows, columns = tile.seen
        shared.inner = tuple(
            (edge - seen.start) / (seen.stop - seen.start)
            for own, seen in zip(tile.own, tile.seen, strict=True)
            for edge in (own.start, own.stop)
        )
        answer = part(x[..., rows, columns])
        if out is None:
            out = answer.new_empty(*answer.shape[:2], int(x.shape[-2] * ratio), int(x.shape[-1] * ratio))
        top, bottom, left, right = shared.inner
        height, width = answer.shape[-2:]
        place = [slice(int(own.start * ratio), int(own.stop * ratio)) for own in tile.own]
        own = answer[..., round(top * height) : round(bottom * height), round(left * width) : round(right * width)]
        out[..., place[0], place[1]] = own
    assert out is not None
    return out


def _shared(module: nn.Module, shared: _Statistics) -> nn.Module:
    """A copy of `module` with the same weights, whose norms share `shared`."""
    weights: dict[int, object] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    copied = copy.deepcopy(module, weights)
    for name, norm in copied.named_modules():
        if isinstance(norm, nn.GroupNorm):
            norm.__class__ = _SharedNorm
            norm.name, norm.statistics = name, shared  # type: ignore[assignment]
    return copied


def _everywhere(
    part: Callable[[Tensor], Tensor], x: Tensor, shared: _Statistics, tile: int, unit: int, ratio: float
) -> Tensor:
    """`part` over all of `x`, whose tiles are `tile` latents of `unit` pixels."""
    for _ in range(PASSES):
        _run(part, x, shared, (tile * unit, GATHERING_MARGIN * unit, ratio))
        shared.next_pass()
    return _run(part, x, shared, (tile * unit, MARGIN * unit, ratio))


def decode_tiled(vae: Autoencoder, z: Tensor, tile: int) -> Tensor:
    """As `vae.decode`, in tiles of `tile` latents: `z (B, C, h, w)` -> `(B, 3, h*f, w*f)`."""
    shared = _Statistics()
    decoder = _shared(vae.decoder, shared)
    assert isinstance(decoder, Decoder)
    middle = vae.decoder.mid_block(vae.decoder.conv_in(vae.post_quant_conv(z)))

    def rest(x: Tensor) -> Tensor:
        for block in decoder.up_blocks:
            x = block(x)
        result: Tensor = decoder.conv_out(activated(decoder.conv_norm_out, x))
        return result

    return _everywhere(rest, middle, shared, tile, 1, float(vae.config.factor))


def encode_tiled(vae: Autoencoder, pictures: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """As `vae.encode`, in tiles of `tile` latents: `(B, 3, H, W)` -> mean and log-variance."""
    shared = _Statistics()
    encoder, factor = _shared(vae.encoder, shared), vae.config.factor
    assert isinstance(encoder, Encoder)

    def first(x: Tensor) -> Tensor:
        x = encoder.conv_in(x)
        for block in encoder.down_blocks:
            x = block(x)
        return x

    x = _everywhere(first, pictures, shared, tile, factor, 1 / factor)
    x = vae.encoder.mid_block(x)
    x = vae.encoder.conv_out(activated(vae.encoder.conv_norm_out, x))
    mean, log_variance = vae.quant_conv(x).chunk(2, dim=1)
    return mean, log_variance.clamp(-30.0, 20.0)
