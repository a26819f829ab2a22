"""CLIP's image encoder (Radford et al. 2021): what picture prompts, unCLIP and style adapters are told of a picture."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from reverie.errors import RequestError
from reverie.nets.clip_text import ClipTextConfig, LayerStack

# Of the pictures that CLIP was trained on, red, green, blue: openai/CLIP `clip.py: _transform`.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
LONGEST = 100  # times its shorter side; of such a strip nothing is left in the square that CLIP sees


@dataclass(frozen=True)
class ClipVisionConfig:
    """The shape of an image encoder. The defaults are CLIP ViT-L/14.

    Attributes:
        image_size, patch: pixels of a side of the picture, and of each patch that is one token.
        activation: `quick_gelu` (OpenAI's) or `gelu` (OpenCLIP's).
        projection_width: channels of the embedding that text is compared with; 0 without projection.
    """

    width: int = 1024
    inner_width: int = 4096
    layers: int = 24
    heads: int = 16
    image_size: int = 224
    patch: int = 14
    activation: str = "quick_gelu"
    eps: float = 1e-5
    projection_width: int = 768

    @property
    def positions(self) -> int:
        """Number of tokens: one for the whole picture, then one a patch, row by row."""
        return 1 + (self.image_size // self.patch) ** 2

    @property
    def layer(self) -> ClipTextConfig:
        """The shape of its layers, which are the text encoder's."""
        return ClipTextConfig(
            width=self.width,
            inner_width=self.inner_width,
            layers=self.layers,
            heads=self.heads,
            activation=self.activation,
            eps=self.eps,
        )


class PatchEmbeddings(nn.Module):
    """A learnt token for the whole picture, patches through one linear map; plus position."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(config.width))
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch, stride=config.patch, bias=False)
        self.position_embedding = nn.Embedding(config.positions, config.width)

    def forward(self, pixels: Tensor) -> Tensor:
        """`(B, 3, size, size)` -> `(B, positions, width)`."""
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        whole = self.class_embedding.expand(len(patches), 1, -1)
        result: Tensor = torch.cat([whole, patches], dim=1) + self.position_embedding.weight
        return result


class VisionTransformer(nn.Module):
    """Embeddings, norm, layers, norm of the first token. (`pre_layrnorm` is spelled as in the published files.)"""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.width, eps=config.eps)
        self.encoder = LayerStack(config.layer, causal=False)
        self.post_layernorm = nn.LayerNorm(config.width, eps=config.eps)


class ClipVision(nn.Module):
    """`pixels -> embedding`; parameter names as in the files of transformers' `CLIPVisionModelWithProjection`."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTransformer(config)
        projected = config.projection_width
        self.visual_projection = nn.Linear(config.width, projected, bias=False) if projected else None

    def forward(self, pixels: Tensor) -> Tensor:
        """The embedding of pictures that text is compared with.

        Args:
            pixels: `(B, 3, image_size, image_size)`, as `clip_pixels` makes them.

        Returns:
            `(B, projection_width)`, or `(B, width)` without projection.

        Raises:
            RequestError: pixels of another size.
        """
        pooled: Tensor = self.vision_model.post_layernorm(self.states(pixels)[:, 0])
        return pooled if self.visual_projection is None else self.visual_projection(pooled)

    def states(self, pixels: Tensor, skip: int = 0) -> Tensor:
        """What the layers say of each token, before the last norm.

        Args:
            pixels: `(B, 3, image_size, image_size)`.
            skip: how many of the last layers to leave out; IP-Adapter Plus leaves out one.

        Returns:
            `(B, positions, width)`, the token of the whole picture first.

        Raises:
            RequestError: pixels of another size.
        """
        size, network = self.config.image_size, self.vision_model
        if pixels.shape[1:] != (3, size, size):
            found = " x ".join(map(str, pixels.shape[1:]))
            raise RequestError(f"the image encoder takes pictures of 3 x {size} x {size} and was given {found}")
        x = network.pre_layrnorm(network.embeddings(pixels.to(network.embeddings.patch_embedding.weight)))
        for layer in network.encoder.layers[: self.config.layers - skip]:
            x = layer(x)
        result: Tensor = x
        return result


def clip_pixels(picture: Image.Image, size: int = 224) -> Tensor:
    """A picture as CLIP's image encoders want it: its middle, as a square, normalised.

    The shorter side is brought to `size` by Pillow's antialiased bicubic filter, rounded to 8 bits as CLIP's own
    preprocessing has it (openai/CLIP `clip.py: _transform`); what is cut off is cut off on both sides alike.

    Returns:
        `(1, 3, size, size)` float32, about -2 to 2.

    Raises:
        RequestError: a picture without pixels, or a strip of which nothing would be left.
    """
    width, height = picture.size
    short, long = sorted(picture.size)
    if short == 0 or long > LONGEST * short:
        raise RequestError(f"a picture of {width} x {height} pixels; image encoders look at the square in its middle")
    new = tuple(size if side == short else size * side // short for side in (width, height))
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    resized = picture.convert("RGB").resize((new[0], new[1]), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(resized.crop((left, top, left + size, top + size)))).float() / 255
    normalised = (pixels - torch.tensor(MEAN)) / torch.tensor(STD)
    return normalised.permute(2, 0, 1)[None].contiguous()
