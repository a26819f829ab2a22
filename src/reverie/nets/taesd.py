"""The tiny autoencoder (TAESD, Bohan 2023): distilled from a Stable Diffusion VAE, for previews and quick decoding.

Parameter names are those of diffusers' `AutoencoderTiny`. The original files hold one half each, numbered as
`nn.Sequential` numbers its modules: `renumbered` and `numbered` are the table between the two.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reverie.errors import CheckpointError

T = TypeVar("T")
Half = Literal["encoder", "decoder"]

# The first module of the original decoder is its clamp, which diffusers has outside the list.
FIRST = {"encoder": 0, "decoder": 1}


@dataclass(frozen=True)
class TinyAutoencoderConfig:
    """The shape of a tiny autoencoder. The defaults are taesd and taesdxl; taesd3 has 16 latent channels.

    Attributes:
        encoder_blocks: residual blocks at each resolution, from the picture down.
        decoder_blocks: the same from the latents up.
        magnitude: latents are squashed to this range before they are decoded (`latent_magnitude`).
    """

    in_channels: int = 3
    latent_channels: int = 4
    width: int = 64
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    magnitude: float = 3.0

    @property
    def factor(self) -> int:
        """Pixels a latent, along each side."""
        return int(2 ** (len(self.decoder_blocks) - 1))


TAESD = TinyAutoencoderConfig()
TAESD3 = TinyAutoencoderConfig(latent_channels=16)


class Block(nn.Module):
    """Three convolutions with ReLU, plus the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, width, h, w)` -> `(B, width, h, w)`."""
        return F.relu(self.conv(x) + x)


class TinyEncoder(nn.Module):
    """Picture -> latents."""

    def __init__(self, config: TinyAutoencoderConfig) -> None:
        super().__init__()
        width, (first, *others) = config.width, config.encoder_blocks
        layers = [_conv(config.in_channels, width), *_blocks(width, first)]
        for count in others:
            layers += [nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False), *_blocks(width, count)]
        self.layers = nn.Sequential(*layers, _conv(width, config.latent_channels))

    def forward(self, pictures: Tensor) -> Tensor:
        """See `TinyAutoencoder.encode`."""
        result: Tensor = self.layers((pictures + 1) / 2)
        return result


class TinyDecoder(nn.Module):
    """Latents -> picture."""

    def __init__(self, config: TinyAutoencoderConfig) -> None:
        super().__init__()
        self.magnitude = config.magnitude
        width, (first, *others) = config.width, config.decoder_blocks
        layers = [_conv(config.latent_channels, width), nn.ReLU(), *_blocks(width, first)]
        for count in others:
            enlarged = nn.Conv2d(width, width, 3, padding=1, bias=False)
            layers += [nn.Upsample(scale_factor=2), enlarged, *_blocks(width, count)]
        self.layers = nn.Sequential(*layers, _conv(width, config.in_channels))

    def forward(self, latents: Tensor) -> Tensor:
        """See `TinyAutoencoder.decode`."""
        squashed = torch.tanh(latents / self.magnitude) * self.magnitude
        result: Tensor = self.layers(squashed) * 2 - 1
        return result


class TinyAutoencoder(nn.Module):
    """Both halves. Latents are those that the denoising network sees.

    So nothing is scaled between the two: where the VAE's latents are `z`, these are `(z - shift) * scale` with the
    VAE's factors (0.18215 for SD 1 and 2, 0.13025 for SDXL; 1.5305 and shift 0.0609 for SD 3). They stay within
    about -3 to 3, so that `latents / 6 + 0.5` fits [0, 1] (diffusers' `latent_magnitude` 3, `latent_shift` 0.5).
    """

    def __init__(self, config: TinyAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TinyEncoder(config)
        self.decoder = TinyDecoder(config)

    def encode(self, pictures: Tensor) -> Tensor:
        """`(B, 3, H, W)` in [-1, 1] -> latents `(B, latent_channels, H/8, W/8)`, scaled; there is no variance."""
        result: Tensor = self.encoder(pictures)
        return result

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `(B, latent_channels, h, w)`, scaled -> `(B, 3, 8h, 8w)` in about [-1, 1]."""
        result: Tensor = self.decoder(latents)
        return result

    def forward(self, pictures: Tensor) -> Tensor:
        """There and back."""
        return self.decode(self.encode(pictures))


def renumbered(tensors: Mapping[str, T], half: Half) -> dict[str, T]:
    """The tensors of an original file under the names of `TinyEncoder` or `TinyDecoder`.

    Args:
        tensors: `taesd_encoder.safetensors` or `taesd_decoder.safetensors` by its names (`1.weight`,
            `3.conv.0.bias`), with or without the file's stem before them (`taesd_decoder.1.weight`).

    Raises:
        CheckpointError: a name of another layout.
    """
    found = {}
    for name, tensor in tensors.items():
        number, _, rest = name.removeprefix(f"taesd_{half}.").partition(".")
        if not number.isdecimal() or int(number) < FIRST[half] or not rest:
            raise CheckpointError(f"tensor {name} is none of a tiny {half}; the file taesd_{half} numbers its tensors")
        found[f"layers.{int(number) - FIRST[half]}.{rest}"] = tensor
    return found


def numbered(tensors: Mapping[str, T], half: Half) -> dict[str, T]:
    """The tensors of a `TinyEncoder` or `TinyDecoder` under the names of the original file."""
    found = {}
    for name, tensor in tensors.items():
        _, number, rest = name.split(".", 2)
        found[f"{int(number) + FIRST[half]}.{rest}"] = tensor
    return found


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], half: Half) -> TinyAutoencoderConfig:
    """The config of a published file, by its width and latent channels.

    Args:
        shapes: by the names of `TinyEncoder` or `TinyDecoder`.

    Raises:
        CheckpointError: shapes of something else.
    """
    last = sum(TAESD.encoder_blocks) + len(TAESD.encoder_blocks)
    place, at = ("layers.0.weight", 1) if half == "decoder" else (f"layers.{last}.weight", 0)
    width, latents = shapes.get("layers.0.weight", ()), shapes.get(place, ())
    if len(width) != 4 or len(latents) != 4:
        raise CheckpointError(f"no convolution {place}; a tiny {half} has it")
    return TinyAutoencoderConfig(latent_channels=latents[at], width=width[0])


def _conv(source: int, width: int) -> nn.Module:
    return nn.Conv2d(source, width, 3, padding=1)


def _blocks(width: int, count: int) -> list[nn.Module]:
    return [Block(width) for _ in range(count)]
