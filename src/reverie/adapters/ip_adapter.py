"""IP-Adapters (Ye et al. 2023): pictures as prompts.

A picture becomes a few tokens; every cross-attention layer looks at them with keys and values of their own, and adds
what it sees to what it sees of the prompt: `attention(q, k, v) + weight * attention(q, k', v')`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from reverie.adapters.ip_adapter_file import IpAdapter, encoder_name, fits
from reverie.adapters.taps import beneath
from reverie.checkpoint.source import open_weights
from reverie.errors import CheckpointError, RequestError
from reverie.families.vision import PART, vision_of
from reverie.nets.attention import attention
from reverie.nets.clip_vision import ClipVision, clip_pixels
from reverie.nets.image_tokens import KeysValues, TokensConfig
from reverie.registry import Registry
from reverie.sampling.guidance import Clock
from reverie.sampling.tapping import AttentionLayer, chosen, grid
from reverie.types import AttentionTap, Cond, Predict

Side = Literal["down_blocks", "mid_block", "up_blocks"]
Curve = Callable[[float, Side], float]
"""`(share of the network's transformers that ran before, where it is) -> factor`."""

WEAK, LEAST = 0.2, 0.05  # what ComfyUI_IPAdapter_plus has for the weight types of these names
WEIGHT_TYPES: Registry[Curve] = Registry("weight type")
WEIGHT_TYPES.add("linear", lambda share, side: 1.0)
WEIGHT_TYPES.add("ease in", lambda share, side: LEAST + (1 - LEAST) * (1 - share))
WEIGHT_TYPES.add("ease out", lambda share, side: LEAST + (1 - LEAST) * share)
WEIGHT_TYPES.add("ease in-out", lambda share, side: LEAST + (1 - LEAST) * (1 - abs(2 * share - 1)))
WEIGHT_TYPES.add("reverse in-out", lambda share, side: LEAST + (1 - LEAST) * abs(2 * share - 1))
WEIGHT_TYPES.add("weak input", lambda share, side: WEAK if side == "down_blocks" else 1.0)
WEIGHT_TYPES.add("weak middle", lambda share, side: WEAK if side == "mid_block" else 1.0)
WEIGHT_TYPES.add("weak output", lambda share, side: WEAK if side == "up_blocks" else 1.0)
WEIGHT_TYPES.add("strong middle", lambda share, side: 1.0 if side == "mid_block" else WEAK)

# SDXL's blocks of style and of layout (InstantStyle, Wang et al. 2024), as values for `ImagePrompt.blocks`.
STYLE, LAYOUT = {"up.0.1": 1.0}, {"down.2.1": 1.0}


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """Pictures as a prompt, all of them through one adapter.

    Attributes:
        positive, negative: `(1, T, D)`, the tokens of the pictures, and those of none: what rows of `Cond.images` are.
        weight: how strongly the pictures act.
        start, end: fractions of the steps between which they do.
        mask: `(n, H, W)`, 1 where they act: one for all pictures, or one for each; everywhere where it is None.
        blocks: factors of `weight` for blocks by their short names (`up.0.1`), 0 for all others; of all 1 if empty.
        weight_type: how the weight changes from block to block; a name of `WEIGHT_TYPES`.
    """

    adapter: IpAdapter
    positive: Tensor
    negative: Tensor
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mask: Tensor | None = None
    blocks: Mapping[str, float] = field(default_factory=dict)
    weight_type: str = "linear"

    def weights(self) -> dict[str, float]:
        """The weight at each cross-attention layer, by its path.

        Raises:
            RequestError: an unknown weight type, or a block that the network has not.
        """
        curve, layers = WEIGHT_TYPES[self.weight_type], self.adapter.running
        named: dict[str, float] = {}
        for name, factor in self.blocks.items():
            named |= dict.fromkeys(chosen(name, layers, "cross-attention layer"), factor)
        transformers = list(dict.fromkeys(_transformer(path) for path in layers))
        return {
            path: self.weight
            * curve(transformers.index(_transformer(path)) / len(transformers), cast(Side, path.split(".")[0]))
            * (named.get(path, 0.0) if self.blocks else 1.0)
            for path in layers
        }


def _transformer(path: str) -> str:
    return path.partition(".transformer_blocks.")[0]


def tokens(
    adapter: IpAdapter,
    vision: ClipVision | None,
    pictures: Sequence[Image.Image] = (),
    faces: Tensor | None = None,
    *,
    average: bool = False,
) -> tuple[Tensor, Tensor]:
    """The tokens of pictures.

    Args:
        vision: the image encoder; None where the adapter looks at faces alone.
        faces: `(P, face)`, embeddings of the faces in the pictures, where the adapter wants them; see `read_faces`.
        average: whether several pictures become the tokens of their mean, not each its own, one after the other.

    Returns:
        Tokens `(1, T, D)` of the pictures, and those that the negative prompt sees: of an embedding of zeros or, where
        the adapter reads states, of a grey picture (zeros after normalisation), as diffusers has it.

    Raises:
        RequestError: no picture, no faces or as many of them, an image encoder that the adapter was not made for.
    """
    config = adapter.config
    seen, unseen = (None, None) if config.kind == "face" else _seen(adapter, vision, pictures)
    known = _known(adapter, faces, len(pictures)) if config.wants_faces else None
    if average:
        seen, unseen, known = (None if t is None else t.mean(0, keepdim=True) for t in (seen, unseen, known))
    with torch.no_grad():
        positive = adapter.network(_like(seen, adapter), _like(known, adapter))
        none = None if known is None else torch.zeros_like(known)
        negative = adapter.network(_like(unseen, adapter), _like(none, adapter))
    return positive.flatten(0, 1)[None], negative.flatten(0, 1)[None]


def _seen(adapter: IpAdapter, vision: ClipVision | None, pictures: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
    """What the image encoder says of the pictures, and of none."""
    name = adapter.path.name
    if vision is None or not pictures:
        raise RequestError(
            f"{name} needs a picture and an image encoder ({encoder_name(adapter.config)}) to see it with"
        )
    if not fits(adapter.config, vision.config):
        found = vision.config.width if adapter.config.wants_states else vision.config.projection_width
        what = "states" if adapter.config.wants_states else "embeddings"
        raise RequestError(
            f"{name} was made for {what} of {adapter.config.source} channels, the image encoder's have {found}; "
            f"give it {encoder_name(adapter.config)} with encoder=FILE"
        )
    pixels = torch.cat([clip_pixels(picture, vision.config.image_size) for picture in pictures])
    pixels = pixels.to(vision.vision_model.pre_layrnorm.weight.device)
    with torch.no_grad():
        if adapter.config.wants_states:
            return vision.states(pixels, 1), vision.states(torch.zeros_like(pixels), 1)
        embeddings = vision(pixels)
    return embeddings, torch.zeros_like(embeddings)


def _known(adapter: IpAdapter, faces: Tensor | None, pictures: int) -> Tensor:
    config, name = adapter.config, adapter.path.name
    if faces is None:
        raise RequestError(
            f"{name} is told who is in the picture by an embedding of the face ({config.face} numbers, ArcFace); "
            "Reverie does not compute it: give a file of it with faces=FILE"
        )
    if faces.ndim != 2 or faces.shape[1] != config.face or (config.wants_states and len(faces) != pictures):
        wanted = f"{pictures} x {config.face}" if config.wants_states else f"any number x {config.face}"
        raise RequestError(f"embeddings of faces of shape {list(faces.shape)}; {name} takes {wanted}")
    return faces


def _like(tensor: Tensor | None, adapter: IpAdapter) -> Tensor | None:
    return None if tensor is None else tensor.to(next(adapter.network.parameters()))


def read_faces(path: Path) -> Tensor:
    """Embeddings of faces `(P, 512)` from a file with one tensor of `(512,)`, `(P, 512)` or `(P, 1, 512)`.

    Raises:
        CheckpointError: no such file.
    """
    file = open_weights(path)
    found = [name for name, info in file.tensors.items() if info.dtype.is_floating_point]
    if len(file.tensors) != 1 or not found or not 1 <= len(file.tensors[found[0]].shape) <= 3:
        raise CheckpointError(f"{path} holds {len(file.tensors)} tensors; expected one, the embeddings of faces")
    faces = file.tensor(found[0]).float()
    return faces.reshape(-1, faces.shape[-1])


def image_encoder_for(adapter: Path, config: TokensConfig, places: Sequence[Path] = ()) -> Path:
    """An image encoder that an adapter was made for.

    Args:
        adapter: its file.
        config: how it makes tokens of a picture.
        places: folders and files to look at besides the folders `image_encoder` beside the adapter's file and beside
            its folder, where published adapters have them.

    Raises:
        RequestError: none fits; the message says which one to give.
    """
    around = adapter.resolve().parent
    folders = [around / PART, around.parent / PART, *sorted(around.parent.glob(f"*/{PART}"))]
    inside = [path for place in places if place.is_dir() for path in sorted(place.iterdir())]
    for path in (*folders, *places, *inside):
        if not path.exists():
            continue
        try:
            if fits(config, vision_of(path).config):
                return path
        except CheckpointError:
            continue
    raise RequestError(f"no image encoder for {adapter.name} here; give {encoder_name(config)} with encoder=FILE")


def area(mask: Image.Image, width: int, height: int) -> Tensor:
    """A mask for `ImagePrompt.mask`: `(1, height, width)` of the picture that is drawn, 1 where it is light."""
    resized = mask.convert("L").resize((width, height), Image.Resampling.LANCZOS)
    return (torch.from_numpy(np.array(resized)).float() >= 127.5).float()[None]


def image_prompted(predict: Predict, prompts: Sequence[ImagePrompt], clock: Clock) -> Predict:
    """`predict` with a network that sees pictures beside the prompt.

    Conditions carry the tokens: `Cond.images[i]` are those of `prompts[i]`, `positive` or `negative` row by row.

    Args:
        clock: of the run.

    Raises:
        RequestError: see `ImagePrompt.weights`.
    """
    weights = [prompt.weights() for prompt in prompts]

    def prompted(x: Tensor, sigma: float, cond: Cond) -> Tensor:
        at = {
            path: [
                _Look(prompt, prompt.adapter.layer(path), weight[path], images)
                for prompt, weight, images in zip(prompts, weights, cond.images, strict=True)
                if weight.get(path) and clock.within(sigma, prompt.start, prompt.end)
            ]
            for path in dict.fromkeys(path for weight in weights for path in weight)
        }
        taps = {path: _tap(looks, x.shape[-2], x.shape[-1]) for path, looks in at.items() if looks}
        return predict(x, sigma, beneath(cond, taps) if taps else cond)

    return prompted


@dataclass(frozen=True, eq=False)
class _Look:
    """What one layer sees of one prompt."""

    prompt: ImagePrompt
    layer: KeysValues
    weight: float
    images: Tensor

    def added(self, attending: AttentionLayer, q: Tensor, height: int, width: int) -> Tensor:
        """What is added to the heads `(B, heads, N, d)` of a layer with queries `q`."""
        mask = self.prompt.mask
        pictures = (self.images,) if mask is None or len(mask) == 1 else self.images.chunk(len(mask), dim=1)
        total = torch.zeros_like(q)
        for i, images in enumerate(pictures):
            k, v = (attending.split(project(images.to(q))) for project in (self.layer.to_k_ip, self.layer.to_v_ip))
            seen = self.weight * attention(q, k, v)
            total = total + (seen if mask is None else seen * _small(mask[i], q.shape[2], height, width).to(q))
        return total


def _tap(looks: Sequence[_Look], height: int, width: int) -> AttentionTap:
    def tap(module: nn.Module, x: Tensor, context: Tensor | None, usual: Callable[[], Tensor]) -> Tensor:
        layer = cast(AttentionLayer, module)
        source = x if context is None else context
        q = layer.split(layer.to_q(x))
        heads = attention(q, layer.split(layer.to_k(source)), layer.split(layer.to_v(source)))
        for look in looks:
            heads = heads + look.added(layer, q, height, width)
        return layer.merged(heads)

    return tap


def _small(mask: Tensor, tokens: int, height: int, width: int) -> Tensor:
    """A mask `(H, W)` for the tokens of a feature map `(1, 1, tokens, 1)`; latents have `height x width`."""
    rows, columns = grid(tokens, height, width)
    return F.interpolate(mask[None, None], size=(rows, columns), mode="bicubic").reshape(1, 1, -1, 1)
