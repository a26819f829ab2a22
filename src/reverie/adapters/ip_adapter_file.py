"""Files of IP-Adapters: the original layout, nested or flat, and diffusers'.

image_proj.*                      how a picture becomes tokens; `nets/image_tokens.py` has the same names
ip_adapter.N.to_k_ip.weight       of the N-th attention layer: way down, way up, middle; only odd ones look at
                                  the prompt
ip_adapter.N.to_q_lora.down...    FaceID: a LoRA of all attention layers beside it
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reverie.adapters.deltas.lowrank import LoRA
from reverie.adapters.kinds import MODELS
from reverie.adapters.lora import Adapter, Coverage
from reverie.checkpoint.load import build
from reverie.checkpoint.source import WeightFile, open_weights
from reverie.errors import CheckpointError
from reverie.families.base import Parts
from reverie.families.shapes import Shapes, count, need, shapes_of
from reverie.nets.clip_vision import ClipVisionConfig
from reverie.nets.image_tokens import HEAD_WIDTH, ImagePromptNetwork, KeysValues, TokensConfig
from reverie.nets.unet import UNet

PROJECTION, LAYERS = "image_proj.", "ip_adapter."
LORA_NAME = re.compile(r"ip_adapter\.(\d+)\.(to_[qkv]|to_out)_lora\.(down|up)\.weight")
SIDES = ("down_blocks", "up_blocks", "mid_block")  # the order in which diffusers counts attention layers
V2 = re.compile(r"plus[-_]?v2", re.IGNORECASE)  # FaceID plus v2 differs from v1 by its name alone
# CLIP's encoders by the channels of their states and of their embeddings.
STATES = {1024: "L/14", 1280: "H/14", 1664: "bigG/14"}
EMBEDDINGS = {768: "L/14", 1024: "H/14", 1280: "bigG/14"}

# diffusers' names (`encoder_hid_proj`, attention processors) and what they are in the original layout.
DIFFUSERS_PROJECTION = re.compile(r"(?:unet\.)?encoder_hid_proj\.image_projection_layers\.(\d+)\.(.+)")
DIFFUSERS_LAYER = re.compile(r"(?:unet\.)?(.+)\.processor\.(to_[kv]_ip)\.(\d+)\.weight")
RENAMED = (
    (r"^image_embeds\.", "proj."),
    (r"^(?:ff|proj)\.net\.0\.proj\.", "proj.0."),
    (r"^(?:ff|proj)\.net\.2\.", "proj.2."),
    (r"^layers\.(\d+)\.ln0\.", r"layers.\1.0.norm1."),
    (r"^layers\.(\d+)\.ln1\.", r"layers.\1.0.norm2."),
    (r"^layers\.(\d+)\.attn\.to_out\.0\.", r"layers.\1.0.to_out."),
    (r"^layers\.(\d+)\.attn\.", r"layers.\1.0."),
    (r"^layers\.(\d+)\.ff\.0\.", r"layers.\1.1.0."),
    (r"^layers\.(\d+)\.ff\.1\.net\.0\.proj\.", r"layers.\1.1.1."),
    (r"^layers\.(\d+)\.ff\.1\.net\.2\.", r"layers.\1.1.3."),
)


@dataclass(frozen=True, eq=False)
class IpAdapter:
    """An IP-Adapter opened for a model.

    Attributes:
        numbers: of the model's cross-attention layers in the file, by their paths.
        running: those paths in the order in which they run.
        lora: of FaceID: changes of the model's linear layers; to be attached at strength 1.
    """

    path: Path
    network: ImagePromptNetwork
    numbers: Mapping[str, str]
    running: tuple[str, ...]
    lora: Adapter | None = None

    @property
    def config(self) -> TokensConfig:
        """How it makes tokens of a picture."""
        return self.network.config

    def layer(self, path: str) -> KeysValues:
        """Keys and values for a cross-attention layer of the model."""
        found = self.network.ip_adapter[self.numbers[path]]
        assert isinstance(found, KeysValues)
        return found


def fits(config: TokensConfig, encoder: ClipVisionConfig) -> bool:
    """Whether an image encoder says what an adapter reads."""
    return config.source == (encoder.width if config.wants_states else encoder.projection_width)


def encoder_name(config: TokensConfig) -> str:
    """The image encoder that an adapter was made for, in words."""
    known = (STATES if config.wants_states else EMBEDDINGS).get(config.source)
    return f"CLIP ViT-{known}" if known else f"an encoder of {config.source} channels"


def open_ip_adapter(path: Path, parts: Parts) -> IpAdapter:
    """An IP-Adapter for a model, its weights mapped from the file.

    Raises:
        CheckpointError: no IP-Adapter, or one for another model.
    """
    if not isinstance(parts.unet, UNet):
        raise CheckpointError(f"{path}: an IP-Adapter for U-Nets; this model has a diffusion transformer")
    order = attention_order(parts.unet)
    tensors = _tensors(open_weights(path), order)
    config = tokens_config(shapes_of(tensors, PROJECTION), path)
    width = parts.unet.config.context_width
    if config.width != width:
        made, here = (MODELS.get(w, f"prompts {w} wide") for w in (config.width, width))
        raise CheckpointError(f"{path} is an IP-Adapter for {made}; this model is for {here}")
    modules: dict[str, Any] = dict(parts.unet.named_modules())
    numbers = {layer: str(n) for n, layer in enumerate(order) if layer.endswith(".attn2")}
    widths = {number: int(modules[layer].to_q.in_features) for layer, number in numbers.items()}
    kept = {name: t for name, t in tensors.items() if not LORA_NAME.fullmatch(name)}
    network = build(lambda: ImagePromptNetwork(config, widths), kept, f"the IP-Adapter in {path}")
    running = tuple(p for p in modules if p in numbers)
    return IpAdapter(path, network, numbers, running, _beside(path, _lora(tensors, order, modules)))


def attention_order(unet: UNet) -> list[str]:
    """The paths of the attention layers of transformers, in the order in which files number them from 0."""
    paths = [path for path, _ in unet.named_modules() if path.endswith((".attn1", ".attn2"))]
    return sorted(paths, key=lambda path: SIDES.index(path.split(".")[0]))


def tokens_config(shapes: Shapes, path: Path) -> TokensConfig:
    """How pictures become tokens, from the shapes of what stands under `image_proj.`.

    Raises:
        CheckpointError: in no way that we know.
    """
    if "proj.weight" in shapes:
        (rows, source), width = need(shapes, "proj.weight", 2), need(shapes, "norm.weight", 1)[0]
        return TokensConfig("embedding", source, width, tokens=_times(rows, width, path))
    if "proj.3.weight" in shapes:
        width, source = need(shapes, "proj.2.weight", 2)
        return TokensConfig("states", source, width)
    if "perceiver_resampler.proj_in.weight" in shapes:
        width, source = need(shapes, "perceiver_resampler.proj_in.weight", 2)
        of_picture = _of_picture(TokensConfig("face_resampler", source, width), shapes, "perceiver_resampler.layers")
        return replace(_of_face(of_picture, shapes, path), shortcut=bool(V2.search(path.name)))
    if "latents" in shapes:
        (_, tokens, inner), source = need(shapes, "latents", 3), need(shapes, "proj_in.weight", 2)[1]
        width = need(shapes, "proj_out.weight", 2)[0]
        found = TokensConfig("resampler", source, width, tokens=tokens, inner=inner)
        return _of_picture(found, shapes, "layers")
    if "proj.2.weight" in shapes:
        return _of_face(TokensConfig("face", 0, need(shapes, "norm.weight", 1)[0]), shapes, path)
    first = ", ".join(list(shapes)[:3]) or "nothing"
    raise CheckpointError(f"{path} makes tokens of pictures in a way that is not known: {first} under image_proj")


def _of_face(config: TokensConfig, shapes: Shapes, path: Path) -> TokensConfig:
    inner, face = need(shapes, "proj.0.weight", 2)
    rows = need(shapes, "proj.2.weight", 2)[0]
    return replace(config, tokens=_times(rows, config.width, path), inner=inner, face=face)


def _of_picture(config: TokensConfig, shapes: Shapes, layers: str) -> TokensConfig:
    return replace(
        config,
        feed=need(shapes, f"{layers}.0.1.1.weight", 2)[0],
        layers=count(shapes, f"{layers}.{{}}.0.to_q.weight"),
        heads=max(need(shapes, f"{layers}.0.0.to_q.weight", 2)[0] // HEAD_WIDTH, 1),
    )


def _times(rows: int, width: int, path: Path) -> int:
    """How many tokens a layer of so many rows makes."""
    if not width or rows % width or not rows:
        raise CheckpointError(f"{path}: {rows} numbers are no tokens of {width} channels")
    return rows // width


def _beside(path: Path, changes: Mapping[str, LoRA]) -> Adapter | None:
    if not changes:
        return None
    coverage = Coverage(2 * len(changes), {"unet": len(changes)}, algorithms={"LoRA": len(changes)})
    return Adapter(path, path.stem, {}, {"unet": changes}, coverage)


def _lora(tensors: Mapping[str, Tensor], order: list[str], modules: Mapping[str, nn.Module]) -> dict[str, LoRA]:
    """The LoRA beside a FaceID adapter, by the paths of the layers that it changes."""
    found: dict[str, LoRA] = {}
    for name, down in tensors.items():
        match = LORA_NAME.fullmatch(name)
        if match is None or match[3] == "up":
            continue
        up = tensors.get(name.replace("_lora.down.", "_lora.up."))
        if up is None or int(match[1]) >= len(order):
            raise CheckpointError(f"tensor {name} belongs to no layer of this model, or its half is missing")
        path = f"{order[int(match[1])]}.{'to_out.0' if match[2] == 'to_out' else match[2]}"
        layer: Any = modules[path]
        halves = {"lora_down.weight": down, "lora_up.weight": up}
        found[path] = LoRA.build(halves, None, (layer.out_features, layer.in_features))
    return found


# diffusers' names


def _tensors(file: WeightFile, order: list[str]) -> dict[str, Tensor]:
    """The tensors of a file under the original names.

    Raises:
        CheckpointError: no IP-Adapter.
    """
    tensors = {name: file.tensor(name) for name in file.tensors}
    if any(DIFFUSERS_PROJECTION.fullmatch(name) for name in tensors):
        tensors = _from_diffusers(tensors, order, file.path)
    strangers = [name for name in tensors if not name.startswith((PROJECTION, LAYERS))]
    if strangers or not any(name.startswith(PROJECTION) for name in tensors):
        raise CheckpointError(f"{file.path} is not an IP-Adapter: the first of its tensors is {next(iter(tensors))}")
    return tensors


def _from_diffusers(tensors: Mapping[str, Tensor], order: list[str], path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    projection: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := DIFFUSERS_PROJECTION.fullmatch(name):
            number, projection[match[2]] = match[1], tensor
        elif (match := DIFFUSERS_LAYER.fullmatch(name)) and match[1] in order:
            number = match[3]
            found[f"{LAYERS}{order.index(match[1])}.{match[2]}.weight"] = tensor
        else:
            raise CheckpointError(f"{path}: tensor {name} is not one of an IP-Adapter for this model")
        if number != "0":
            raise CheckpointError(f"{path} holds several IP-Adapters; give each in a file of its own")
    return found | {f"{PROJECTION}{name}": t for name, t in _original(projection).items()}


def _original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layers that make tokens, under their original names; keys and values of resamplers are one tensor there."""
    keys = {name: t for name, t in tensors.items() if name.endswith("attn.to_k.weight")}
    values = {_value(name) for name in keys}
    joined = {name.replace("to_k", "to_kv"): torch.cat([t, tensors[_value(name)]]) for name, t in keys.items()}
    found = {_renamed(name): t for name, t in ({**tensors, **joined}).items() if name not in {*keys, *values}}
    if "proj.2.weight" in found and "proj_in.weight" in found:  # FaceID plus has its resampler one level below
        own = ("proj.", "norm.")
        return {name if name.startswith(own) else f"perceiver_resampler.{name}": t for name, t in found.items()}
    if "proj.2.weight" in found and found["proj.2.weight"].shape[0] == found["norm.weight"].shape[0]:
        return {name.replace("norm.", "proj.3."): t for name, t in found.items()}  # one token a state: full face
    return found


def _value(key: str) -> str:
    return key.replace("to_k", "to_v")


def _renamed(name: str) -> str:
    for theirs, ours in RENAMED:
        name = re.sub(theirs, ours, name)
    return name
