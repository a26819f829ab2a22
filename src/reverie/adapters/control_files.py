"""Opening and writing ControlNets: a file or a folder becomes a network that fits the model at hand."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from reverie.adapters import control_names as names
from reverie.checkpoint.load import build
from reverie.checkpoint.save import write_json, write_weights
from reverie.checkpoint.source import WeightFile, open_weights
from reverie.checkpoint.weightfile import shown
from reverie.errors import CheckpointError
from reverie.families import ldm
from reverie.families.base import Parts
from reverie.families.folder import weight_files
from reverie.families.json_config import Json, read_json
from reverie.families.pieces import about
from reverie.nets.autoencoder import AutoencoderConfig
from reverie.nets.controlnet import ControlNet, ControlNetConfig
from reverie.nets.controlnet_sd3 import SD3ControlNet, SD3ControlNetConfig
from reverie.nets.mmdit import MMDiT
from reverie.nets.unet import UNet, UNetConfig

Network: TypeAlias = ControlNet | SD3ControlNet
Config: TypeAlias = ControlNetConfig | SD3ControlNetConfig
Tensors: TypeAlias = Mapping[str, Tensor]
STEMS = ("diffusion_pytorch_model", "diffusion_pytorch_model")
FAMILIES = {
    768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "the Stable Diffusion XL refiner",
    2048: "Stable Diffusion XL", 4096: "Stable Diffusion 3",
}  # fmt: skip
TITLES = {"sd1": FAMILIES[768], "sd2": FAMILIES[1024], "sdxl": FAMILIES[2048], "sd3": FAMILIES[4096]}
XL_VECTOR = 2816  # of pooled prompt and sizes
# Shuffle's answers are pooled; a file of the original layout shows it by its name alone (A1111 and ComfyUI ask that).
POOLED_NAME = "shuffle"
# Of a U-Net and not of a ControlNet.
NOT_COPIED = ("up_blocks.", "conv_norm_out.", "conv_out.", "time_embedding.cond_proj.")


@dataclass(frozen=True, eq=False)
class ControlFile:
    """A ControlNet opened for a model. Its tensors are views of the mapped file where nothing had to be computed.

    Attributes:
        kind: `controlnet`, `union`, `control-lora` or `sd3`.
        layout: `diffusers`, `original` or `stability`.
        vae: of the model, whose latents a ControlNet of Stable Diffusion 3 is shown.
        evidence: pairs of a claim and what supports it.
        base_layers: blocks of the transformer, over which those of a ControlNet of Stable Diffusion 3 are spread.
        canny: it was trained with black as 0.5 and white as 128 (Stability's for edges).
    """

    path: Path
    kind: Literal["controlnet", "union", "control-lora", "sd3"]
    layout: Literal["diffusers", "original", "stability"]
    network: Network
    vae: AutoencoderConfig
    files: tuple[Path, ...]
    evidence: tuple[tuple[str, str], ...] = ()
    base_layers: int = 0
    canny: bool = False

    @property
    def name(self) -> str:
        """What people call it: the file's name, or the folder's."""
        return self.path.name if self.path.is_dir() else self.path.stem

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights, in hexadecimal; of several files that of their digests."""
        digests = []
        for path in self.files:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256"))
        return (
            digests[0].hexdigest()
            if len(digests) == 1
            else hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()
        )

    @property
    def factor(self) -> int:
        """Pixels of the control picture along the side of a latent."""
        network = self.network
        return network.control.factor if isinstance(network, ControlNet) else self.vae.factor


def open_control(path: Path, parts: Parts) -> ControlFile:
    """Open a ControlNet for a model.

    Args:
        path: a weight file of any layout (safetensors, torch), or a folder as diffusers writes it.
        parts: of the model that it is to go with. A Control-LoRA or a difference is completed with its weights.

    Raises:
        CheckpointError: broken or hostile, no ControlNet, for a model of another family, or with NaN in it.
    """
    if path.is_dir():
        files = weight_files(path, STEMS)
        json = read_json(path / "config.json")
        return _opened(path, files, json, parts)
    return _opened(path, [open_weights(path)], None, parts)


def _opened(path: Path, files: list[WeightFile], json: Json | None, parts: Parts) -> ControlFile:
    header = names.without_prefix({name: (file, name) for file in files for name in file.tensors})
    opened = _Opened(path, tuple(file.path for file in files), header, json, parts)
    with about(f"{path}: "):
        if names.LORA in header:
            return opened.control_lora()
        if names.SD3_SIGN in header and "controlnet_blocks.0.weight" in header:
            return opened.sd3()
        if names.ORIGINAL in header and "zero_convs.0.0.weight" in header:
            return opened.original()
        if names.OURS in header and "controlnet_mid_block.weight" in header:
            return opened.diffusers()
        raise CheckpointError(f"no ControlNet for Stable Diffusion but {names.what_else(header)}")


@dataclass(frozen=True, eq=False)
class _Opened:
    """A file whose names are known, on its way to a network."""

    path: Path
    files: tuple[Path, ...]
    header: Mapping[str, tuple[WeightFile, str]]
    json: Json | None
    parts: Parts

    def diffusers(self) -> ControlFile:
        unet = self._unet()
        if self.json is None:
            config = names.control_config(self._shapes(), unet.config)
        else:
            config = names.json_config(self.json)
        return self._for_unet("diffusers", names.OURS, config, dict)

    def original(self) -> ControlFile:
        unet, shapes = self._unet(), self._shapes()
        table = names.original_table(shapes)
        config = names.control_config(names.renamed(shapes, table), unet.config)
        pooled = POOLED_NAME in self.path.stem.lower()
        difference = names.DIFFERENCE in self.header

        def ours(tensors: Tensors) -> Tensors:
            found = names.renamed(tensors, table)
            return _added_to(unet, found) if difference else found

        opened = self._for_unet("original", names.ORIGINAL, replace(config, pooled=pooled), ours)
        said = [("difference", f"tensor {names.DIFFERENCE}: the model's own weights were added")] if difference else []
        said += [("pooled", f"the file is called {self.path.name}")] if pooled else []
        return replace(opened, evidence=(*opened.evidence, *said))

    def control_lora(self) -> ControlFile:
        unet, shapes = self._unet(), self._shapes()
        table = ldm.inverse(ldm.unet_table(unet.config)) | names.hint_table(shapes)
        renamed = names.renamed(shapes, table)
        latents = unet.config.out_channels
        shape = replace(unet.config, in_channels=latents, up_attention=None, guidance_width=0)
        if names.OURS not in renamed:
            raise CheckpointError(f"a Control-LoRA without {names.ORIGINAL}; it is incomplete")
        config = ControlNetConfig(shape, renamed[names.OURS][1], names.hint_widths(renamed))
        opened = self._for_unet("original", names.LORA, config, lambda t: _completed(unet, names.renamed(t, table)))
        return replace(opened, kind="control-lora")

    def sd3(self) -> ControlFile:
        base = self.parts.unet
        if not isinstance(base, MMDiT):
            raise self._other_family(FAMILIES[4096])
        stability = names.SD3_STABILITY in self.header
        shapes = self._shapes()
        if self.json is not None:
            config = names.sd3_json_config(self.json, base.config)
        else:
            config = names.sd3_config(names.stability_shapes(shapes) if stability else shapes, base.config)
        own, theirs = config.transformer, base.config
        if (own.width, own.patch_size, own.in_channels) != (theirs.width, theirs.patch_size, theirs.in_channels):
            raise CheckpointError(
                f"a ControlNet for a transformer {own.width} wide; that of this model is {theirs.width} wide"
            )

        def ours(tensors: Tensors) -> Tensors:
            found = names.stability_tensors(tensors) if stability else tensors
            # diffusers' `_get_pos_embed_from_transformer`
            return found if config.own_positions else dict(found) | _under(base, "pos_embed.")

        tensors = self._tensors(ours)
        network = build(lambda: SD3ControlNet(config), tensors, f"the ControlNet in {self.path}")
        return ControlFile(
            self.path, "sd3", "stability" if stability else "diffusers", network, self.parts.vae.config, self.files,
            (("kind sd3", f"tensor {names.SD3_SIGN}"),), theirs.layers, self._canny(),
        )  # fmt: skip

    def _canny(self) -> bool:
        file, name = self.header.get(names.CONTROL_TYPE, (None, ""))
        return file is not None and file.tensor(name).flatten().tolist() == [names.CANNY]

    def _for_unet(
        self,
        layout: Literal["diffusers", "original"],
        sign: str,
        config: ControlNetConfig,
        ours: Callable[[Tensors], Tensors],
    ) -> ControlFile:
        self._check_fit(config)
        network = build(lambda: ControlNet(config), self._tensors(ours), f"the ControlNet in {self.path}")
        kind: Literal["controlnet", "union"] = "controlnet" if config.union is None else "union"
        evidence = ((f"kind {kind}", f"tensor {sign if config.union is None else names.UNION}"),)
        return ControlFile(self.path, kind, layout, network, self.parts.vae.config, self.files, evidence)

    def _unet(self) -> UNet:
        if not isinstance(self.parts.unet, UNet):
            raise self._other_family("a model with a U-Net (Stable Diffusion 1, 2 or XL)")
        return self.parts.unet

    def _other_family(self, made_for: str) -> CheckpointError:
        here = TITLES.get(self.parts.identity.family, self.parts.identity.family)
        return CheckpointError(f"a ControlNet for {made_for}, and this model is {here}; take one made for it")

    def _check_fit(self, config: ControlNetConfig) -> None:
        """Refuse a ControlNet whose answers, prompt, vector or picture are not of this model's sizes."""
        base = self._unet().config
        if _signature(config.unet) != _signature(base) or config.unet.vector_width not in {0, base.vector_width}:
            if family(config.unet) not in {"", family(base)}:
                raise self._other_family(family(config.unet))
            raise CheckpointError(
                f"a ControlNet for {_described(config.unet)}, and this model has {_described(base)}; "
                "take one made for it"
            )
        factor = self.parts.vae.config.factor
        if config.factor != factor:
            raise CheckpointError(
                f"a ControlNet that is shown {config.factor} pixels for each latent; this model's VAE has {factor}"
            )

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {n: tuple(file.tensors[there].shape) for n, (file, there) in self.header.items() if n not in names.MARKS}

    def _tensors(self, ours: Callable[[Tensors], Tensors]) -> dict[str, Tensor]:
        """The tensors under our names, without marks.

        Raises:
            CheckpointError: NaN or infinity in one of them.
        """
        theirs = {n: file.tensor(there) for n, (file, there) in self.header.items() if n not in names.MARKS}
        for name, tensor in theirs.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise CheckpointError(f"tensor {shown(name)} holds NaN or infinity; the file is damaged")
        return dict(ours(theirs))


def family(config: UNetConfig) -> str:
    """The family of a U-Net or ControlNet, by the width of its vector or prompt; empty where neither says."""
    return FAMILIES[2048] if config.vector_width == XL_VECTOR else FAMILIES.get(config.context_width, "")


def _signature(config: UNetConfig) -> tuple[object, ...]:
    return config.block_out_channels, config.layers_per_block, config.context_width


def _described(config: UNetConfig) -> str:
    widths = ", ".join(map(str, config.block_out_channels))
    vector = f" and a vector of {config.vector_width}" if config.vector else ""
    return (
        f"a U-Net of widths {widths} with {config.layers_per_block} residual blocks a level, a prompt "
        f"{config.context_width} wide{vector}"
    )


def _under(network: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {name: t for name, t in network.state_dict().items() if name.startswith(prefix)}


def _base_tensor(unet: UNet, name: str) -> Tensor | None:
    """A tensor of the U-Net's by its name; None where it has none. Packed weights are unpacked."""
    path, _, leaf = name.rpartition(".")
    try:
        found = getattr(unet.get_submodule(path), leaf, None)
    except AttributeError:
        return None
    if not isinstance(found, Tensor):
        return None
    return found[:, : unet.config.out_channels] if name == "conv_in.weight" else found


def _added_to(unet: UNet, tensors: Tensors) -> dict[str, Tensor]:
    """Differences on top of the U-Net's weights; what it does not have stays as it is.

    Raises:
        CheckpointError: a difference of another shape than the weight.
    """
    found = {}
    for name, difference in tensors.items():
        base = _base_tensor(unet, name)
        if base is not None and base.shape != difference.shape:
            raise _misfit(name, difference.shape, base.shape)
        found[name] = difference if base is None else (difference.float() + base.float()).to(difference.dtype)
    return found


def _completed(unet: UNet, tensors: Tensors) -> dict[str, Tensor]:
    """A Control-LoRA with the U-Net's weights: `W + up down` where there are both, what is there in full, else `W`.

    Source: stability-ai/control-lora; the factors have no scale.

    Raises:
        CheckpointError: one factor without the other, or factors that do not fit the weight.
    """
    own = (name for name in unet.state_dict() if not name.startswith(NOT_COPIED))
    found = {name: base for name in own if (base := _base_tensor(unet, name)) is not None}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "up":
            found[f"{path}.weight"] = _summed(found, path, tensor, tensors.get(f"{path}.down"))
        elif leaf != "down":
            found[name] = tensor
        elif f"{path}.up" not in tensors:
            raise CheckpointError(
                f"tensor {shown(name)} without its {shown(path + '.up')}; the Control-LoRA is incomplete"
            )
    return found


def _summed(base: Tensors, path: str, up: Tensor, down: Tensor | None) -> Tensor:
    weight = base.get(f"{path}.weight")
    if down is None or weight is None:
        what = "its factor `down`" if down is None else "a weight of this model's U-Net"
        raise CheckpointError(f"tensor {shown(path + '.up')} without {what}; the Control-LoRA does not fit")
    if min(up.ndim, down.ndim) < 2:
        raise _misfit(path, up.shape, weight.shape)
    rows, columns = up.flatten(1), down.flatten(1)
    made = (len(rows), columns.shape[1])
    if rows.shape[1] != len(columns) or made != (weight.shape[0], weight[0].numel()):
        raise _misfit(path, torch.Size(made), weight.shape)
    return (weight.float() + (rows.float() @ columns.float()).view(weight.shape)).to(weight.dtype)


def _misfit(name: str, found: torch.Size, expected: torch.Size) -> CheckpointError:
    return CheckpointError(
        f"tensor {shown(name)} changes a weight of shape {list(found)}; this model's is {list(expected)}: it was made "
        "for another"
    )


def save_control(folder: Path, network: Network, dtype: torch.dtype = torch.float16) -> None:
    """Write a ControlNet as diffusers does: `config.json` and the weights.

    Raises:
        OutputError: cannot be written there.
    """
    config = network.control if isinstance(network, ControlNet) else network.config
    tensors = network.state_dict()
    if isinstance(config, SD3ControlNetConfig) and not config.own_positions:
        tensors = {name: t for name, t in tensors.items() if not name.startswith("pos_embed.")}
    folder.mkdir(parents=True, exist_ok=True)
    json = names.to_json(config) if isinstance(config, ControlNetConfig) else names.sd3_to_json(config)
    write_json(folder / "config.json", json)
    write_weights(folder / f"{STEMS[0]}.safetensors", {n: t.detach().to("cpu", dtype) for n, t in tensors.items()})
