"""Files of T2I-Adapters: folders of diffusers, and single files under its names or TencentARC's.

TencentARC numbers the residual blocks of all levels in one row, `body.5.block1`; diffusers has
`adapter.body.2.resnets.1.block1`. Style adapters have TencentARC's names alone.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from reverie.adapters.t2i_adapter import places
from reverie.checkpoint.load import build
from reverie.checkpoint.source import open_weights
from reverie.errors import CheckpointError
from reverie.families.base import Parts
from reverie.families.folder import open_part
from reverie.families.json_config import Json, JsonConfig
from reverie.families.ldm import open_clip_layer
from reverie.families.pairs import Pair, from_file
from reverie.families.pieces import Kind, about
from reverie.families.shapes import Shapes, count, need, shapes_of
from reverie.nets.t2i_adapter import Kind as AdapterKind
from reverie.nets.t2i_adapter import StyleAdapter, StyleAdapterConfig, T2IAdapter, T2IAdapterConfig
from reverie.nets.unet import UNet

T = TypeVar("T")

PREFIX, LEVELS = "adapter.", 4  # TencentARC's have four levels
ROW = re.compile(r"body\.(\d+)\.(block[12]|in_conv)\.(weight|bias)")
KINDS: tuple[AdapterKind, ...] = ("full_adapter", "full_adapter_xl", "light_adapter")


def open_t2i_adapter(path: Path, parts: Parts) -> T2IAdapter | StyleAdapter:
    """A T2I-Adapter for a model, or a style adapter, its weights mapped from the file.

    Args:
        path: a diffusers folder or a file.

    Raises:
        CheckpointError: no T2I-Adapter, or one for another model.
    """
    if not isinstance(parts.unet, UNet):
        raise CheckpointError(f"{path}: a T2I-Adapter for U-Nets; this model has a diffusion transformer")
    if path.is_dir():
        network = open_part(path, "t2i_adapter", T2I_ADAPTER).build()
        assert isinstance(network, T2IAdapter)
    else:
        file = open_weights(path)
        tensors = tidied({name: file.tensor(name) for name in file.tensors})
        if "style_embedding" in tensors:
            return _style(path, tensors, parts)
        with about(f"{path}: "):
            config = config_of_shapes(shapes_of(tensors), parts.vae.config.factor)
        network = build(lambda: T2IAdapter(config), tensors, f"the T2I-Adapter in {path}")
    _check(path, network.config, parts)
    return network


def _check(path: Path, config: T2IAdapterConfig, parts: Parts) -> None:
    """Whether every feature map is as wide and as large as the place of the U-Net that takes it."""
    assert isinstance(parts.unet, UNet)
    halvings = [sum(config.halved(n) for n in range(level + 1)) for level in range(len(config.widths))]
    made = [(width, config.factor * 2**n) for width, n in zip(config.widths, halvings, strict=True)]
    taken = [(p.width, parts.vae.config.factor * 2**p.halvings) for p in places(parts.unet.config)]
    middle = parts.unet.config.mid_attention is None  # what is meant for a middle is left over without one
    if made[: len(taken)] != taken[: len(made)] or len(made) > len(taken) + middle:
        title = "Stable Diffusion XL" if config.kind == "full_adapter_xl" else "Stable Diffusion 1"
        raise CheckpointError(
            f"{path} is a T2I-Adapter for {title} (maps of {_listed(made)}); this {parts.identity.family} model takes "
            f"{_listed(taken)}"
        )


def _listed(maps: list[tuple[int, int]]) -> str:
    return ", ".join(f"{width} channels at 1/{scale}" for width, scale in maps)


# Names and shapes


def tidied(tensors: Mapping[str, T]) -> dict[str, T]:
    """Under our names: without `adapter.`, and residual blocks by level."""
    bare = {name.removeprefix(PREFIX): t for name, t in tensors.items()}
    bare = {re.sub(r"^body\.(\d+)\.body\.", r"body.\1.resnets.", name): t for name, t in bare.items()}
    if "body.0.block1.weight" not in bare:
        return bare
    blocks = count(bare, "body.{}.block1.weight")
    wider = (n for n in range(1, blocks) if f"body.{n}.in_conv.weight" in bare)
    layers = max(next(wider, blocks // LEVELS), 1)
    return {_by_level(name, layers): t for name, t in bare.items()}


def _by_level(name: str, layers: int) -> str:
    match = ROW.fullmatch(name)
    if match is None:
        return name
    level, layer = divmod(int(match[1]), layers)
    inside = match[2] if match[2] == "in_conv" else f"resnets.{layer}.{match[2]}"
    return f"body.{level}.{inside}.{match[3]}"


def config_of_shapes(shapes: Shapes, factor: int) -> T2IAdapterConfig:
    """The shape of a T2I-Adapter from its header, under our names.

    Args:
        factor: pixels a latent; SDXL's adapters begin with twice as many a place, the others with as many.

    Raises:
        CheckpointError: no T2I-Adapter.
    """
    light = "body.0.out_conv.weight" in shapes
    levels, layers = count(shapes, "body.{}.resnets.0.block1.weight"), count(shapes, "body.0.resnets.{}.block1.weight")
    if not levels:
        first = ", ".join(list(shapes)[:3])
        raise CheckpointError(f"this is no T2I-Adapter; the first of its tensors are {first}")
    width = "body.{}.out_conv.weight" if light else "body.{}.resnets.0.block1.weight"
    source = need(shapes, "body.0.in_conv.weight" if light else "conv_in.weight", 4)[1]
    known = {c * (factor * more) ** 2: (c, more) for c in (1, 3) for more in (1, 2)}
    if source not in known:
        raise CheckpointError(
            f"it takes {source} numbers a place; expected one of {', '.join(map(str, sorted(known)))}"
        )
    channels, more = known[source]
    return T2IAdapterConfig(
        kind="light_adapter" if light else "full_adapter_xl" if more == 2 else "full_adapter",
        channels=channels,
        widths=tuple(need(shapes, width.format(n), 4)[0] for n in range(levels)),
        layers=layers,
        factor=factor * more,
    )


def t2i_config(json: Json) -> T2IAdapterConfig:
    """From a folder's `config.json` (class T2IAdapter).

    Raises:
        CheckpointError: of another class.
    """
    c = JsonConfig(json, "config.json of the T2I-Adapter")
    c.require(_class_name="T2IAdapter")
    kind = c.one_of("adapter_type", "full_adapter", KINDS)
    widths = c.counts("channels", (320, 640, 1280, 1280))
    return T2IAdapterConfig(
        kind=next(each for each in KINDS if each == kind),
        channels=c.count("in_channels", 3),
        widths=(*widths, widths[-1]) if kind == "light_adapter" else widths,
        layers=c.few("num_res_blocks", 2),
        factor=c.count("downscale_factor", 8),
    )


def t2i_json(config: T2IAdapterConfig) -> dict[str, Any]:
    """What diffusers' T2IAdapter reads."""
    light = config.kind == "light_adapter"
    return {
        "_class_name": "T2IAdapter",
        "adapter_type": config.kind,
        "channels": list(config.widths[:-1] if light else config.widths),
        "downscale_factor": config.factor,
        "in_channels": config.channels,
        "num_res_blocks": config.layers,
    }


T2I_ADAPTER = Kind("T2I-Adapter", T2IAdapter, lambda json, names: t2i_config(json), t2i_json, tidied)


# Style


def _style(path: Path, tensors: Mapping[str, Any], parts: Parts) -> StyleAdapter:
    shapes = shapes_of(tensors)
    (_, tokens, source), width = need(shapes, "style_embedding", 3), need(shapes, "proj", 2)[1]
    layers = count(shapes, "transformer_layes.{}.ln_1.weight")  # spelled so
    config = StyleAdapterConfig(source=source, width=width, tokens=tokens, layers=layers)
    assert isinstance(parts.unet, UNet)
    if width != parts.unet.config.context_width:
        raise CheckpointError(
            f"{path} is a style adapter for prompts {width} wide; this model's are {parts.unet.config.context_width}"
        )
    with about(f"{path}: "):
        found = from_file(_style_table(config), tensors, "such a style adapter")
    return build(lambda: StyleAdapter(config), found, f"the style adapter in {path}")


def _style_table(config: StyleAdapterConfig) -> list[Pair]:
    plain = ["style_embedding", *(f"{norm}.{leaf}" for norm in ("ln_pre", "ln_post") for leaf in ("weight", "bias"))]
    table = [Pair(name, (name,)) for name in plain]
    table.append(Pair("proj", ("proj.weight",), "transposed"))
    for n in range(config.layers):
        table += open_clip_layer(f"transformer_layes.{n}", f"layers.{n}")
    return table
