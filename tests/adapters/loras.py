"""One random LoRA in every dialect, written down here once more from what other programs write.

Nothing here calls Reverie's own tables of names.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reverie.families.base import Parts
from reverie.families.detect import load_parts
from tests import tiny

UNET_LAYERS = re.compile(
    r"(attn\d\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)|proj_in|proj_out|conv1|conv2|conv_shortcut|time_emb_proj"
    r"|samplers\.0\.conv|conv_in|conv_out|linear_1)$"
)
ATTENTION = re.compile(r"attn\d\.(to_[qkv]|to_out\.0)$")
SD3_LAYERS = re.compile(
    r"transformer_blocks\.\d+\.(attn2?\.(to_|add_)\w+(\.0)?|ff(_context)?\.net\.(0\.proj|2))$|proj$"
)
TEXT_LAYERS = re.compile(r"(self_attn\.\w+|mlp\.fc\d|SelfAttention\.[qkvo]|wi_0)$")
TEXT_ATTENTION = re.compile(r"self_attn\.\w+$")


@dataclass(frozen=True)
class Factors:
    """A LoRA of one layer: `alpha / rank * up @ down`."""

    down: Tensor
    up: Tensor
    alpha: float | None = None

    def product(self) -> Tensor:
        """In float64, flat."""
        rank = self.down.shape[0]
        return (self.alpha or rank) / rank * self.up.double().flatten(1) @ self.down.double().flatten(1)


Layers = dict[tuple[str, str], Factors]


@dataclass(frozen=True)
class Written:
    """A file, and what it says."""

    tensors: Mapping[str, Tensor]
    layers: Layers
    metadata: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> Path:
        save_file({name: t.contiguous() for name, t in self.tensors.items()}, path, dict(self.metadata) or None)
        return path


def parts_of(root: Path, kind: str) -> Parts:
    folder = tiny.sd3_model(root, kind) if kind in tiny.SD3_KINDS else tiny.model(root, kind)
    return load_parts(folder)


def factors(weight: Tensor, rank: int, alpha: float | None, seed: int) -> Factors:
    random = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *weight.shape[1:], generator=random)
    up = torch.randn(len(weight), rank, *(1 for _ in weight.shape[2:]), generator=random)
    return Factors(down, up, alpha)


def layers_of(
    parts: Parts,
    unet: re.Pattern[str] | None = UNET_LAYERS,
    text: re.Pattern[str] | None = TEXT_LAYERS,
    *,
    alpha: float | None = 2.0,
    rank: int = 4,
) -> Layers:
    """Random factors of all layers whose paths match; ranks differ, so that a mixture is always tested."""
    found: Layers = {}
    for part, network in parts.modules().items():
        wanted = text if part.startswith("text_encoder") else unet
        if part == "vae" or wanted is None:
            continue
        for path, module in network.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and wanted.search(path):
                n = len(found)
                found[part, path] = factors(module.weight, rank + n % 2, alpha, n)
    return found


def flat(name: str) -> str:
    return name.replace(".", "_")


def entries(module: str, f: Factors, down: str, up: str) -> dict[str, Tensor]:
    alpha = {} if f.alpha is None else {f"{module}.alpha": torch.tensor(f.alpha)}
    return {f"{module}{down}": f.down, f"{module}{up}": f.up, **alpha}


def kohya_entries(module: str, f: Factors) -> dict[str, Tensor]:
    return entries(module, f, ".lora_down.weight", ".lora_up.weight")


def written(
    layers: Layers, name: Callable[[str, str], str], write: Callable[[str, Factors], dict[str, Tensor]]
) -> Written:
    tensors: dict[str, Tensor] = {}
    for (part, path), f in layers.items():
        tensors |= write(name(part, path), f)
    return Written(tensors, layers)


def te(part: str, *, several: bool) -> str:
    return (
        "lora_te" + {"text_encoder": "1", "text_encoder_2": "2", "text_encoder_3": "3"}[part] if several else "lora_te"
    )


def kohya(parts: Parts) -> Written:
    """sd-scripts, Stable Diffusion 1 and 2; SDXL as other trainers write it."""
    several = len(parts.towers) > 1

    def name(part: str, path: str) -> str:
        start = "lora_unet" if part == "unet" else te(part, several=several)
        return flat(f"{start}.{path}")

    return written(layers_of(parts), name, kohya_entries)


def original_path(parts: Parts, path: str) -> str:
    return tiny.ldm_unet_name(f"{path}.weight", parts.unet.state_dict()).removesuffix(".weight")


def kohya_xl(parts: Parts) -> Written:
    """sd-scripts, SDXL: the names of the original file with underscores."""

    def name(part: str, path: str) -> str:
        if part == "unet":
            return flat(f"lora_unet.{original_path(parts, path)}")
        return flat(f"{te(part, several=True)}.{path}")

    return written(layers_of(parts), name, kohya_entries)


def comfy(parts: Parts) -> Written:
    """ComfyUI's own: the original names with dots."""

    def name(part: str, path: str) -> str:
        if part == "unet":
            return f"diffusion_model.{original_path(parts, path)}"
        which = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}[part]
        return f"text_encoders.{which}.transformer.{path}"

    text = TEXT_LAYERS if len(parts.towers) > 1 else None
    return written(layers_of(parts, text=text), name, kohya_entries)


def whole_original(parts: Parts) -> Written:
    """As a single file has them, the place in front."""
    return written(
        layers_of(parts, text=None),
        lambda part, path: f"model.diffusion_model.{original_path(parts, path)}",
        lambda module, f: entries(module, f, ".lora_A.weight", ".lora_B.weight"),
    )


def one_trainer(parts: Parts) -> Written:
    """OneTrainer's: prefixes of the common names, dots."""
    prefixes = {"unet": "unet", "text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    return written(layers_of(parts), lambda part, path: f"{prefixes[part]}.{path}", kohya_entries)


def one_trainer_raw(parts: Parts) -> Written:
    several = len(parts.towers) > 1

    def name(part: str, path: str) -> str:
        return f"{'lora_unet' if part == 'unet' else te(part, several=several)}.{path}"

    return written(layers_of(parts), name, kohya_entries)


def lycoris(parts: Parts) -> Written:
    return written(layers_of(parts, text=None), lambda part, path: flat(f"lycoris.{path}"), kohya_entries)


def peft_entries(module: str, f: Factors) -> dict[str, Tensor]:
    return {f"{module}.lora_A.weight": f.down, f"{module}.lora_B.weight": f.up}


def diffusers_peft(parts: Parts) -> Written:
    """`save_lora_weights` today: the config of peft in the metadata."""
    made = written(layers_of(parts, alpha=3.0), lambda part, path: f"{part}.{path}", peft_entries)
    config: dict[str, object] = {}
    for part in {part for part, _ in made.layers}:
        own = {path: f for p, path in made.layers if p == part for f in [made.layers[part, path]]}
        first, named = next(iter(own)), {path.removeprefix("text_model."): len(f.down) for path, f in own.items()}
        alphas = {next(iter(named)): 7.0}
        patterns = {"rank_pattern": {path: rank for path, rank in named.items() if rank != 4}, "alpha_pattern": alphas}
        every = {"r": 4, "lora_alpha": 3.0, "target_modules": list(named), **patterns}
        config |= {f"{part}.{key}": value for key, value in every.items()}
        made.layers[part, first] = Factors(own[first].down, own[first].up, 7.0)
    return Written(made.tensors, made.layers, {"lora_adapter_metadata": json.dumps(config)})


def diffusers_plain(parts: Parts) -> Written:
    """Without metadata: the scale is 1."""
    return written(layers_of(parts, alpha=None), lambda part, path: f"{part}.{path}", peft_entries)


def adapter_named(parts: Parts) -> Written:
    """A state dict of peft as it is in memory: the adapter's name in every key."""
    return written(
        layers_of(parts, alpha=None),
        lambda part, path: f"base_model.model.{part}.{path}",
        lambda module, f: {f"{module}.lora_A.default.weight": f.down, f"{module}.lora_B.default.weight": f.up},
    )


def diffusers_lora(parts: Parts) -> Written:
    """`lora.up` and `lora.down`, and `lora_linear_layer` in the text encoder (diffusers 0.17 to 0.21)."""

    def write(module: str, f: Factors) -> dict[str, Tensor]:
        middle = ".lora_linear_layer" if ".mlp." in module else ".lora"
        return entries(module, f, f"{middle}.down.weight", f"{middle}.up.weight")

    return written(layers_of(parts), lambda part, path: f"{part}.{path}", write)


def _processor(path: str) -> str:
    path = re.sub(r"\.(attn\d)\.(to_\w+)(\.0)?$", r".\1.processor.\2", path)
    path = re.sub(r"\.self_attn\.([qkv])_proj$", r".self_attn.to_\1", path)
    return re.sub(r"\.self_attn\.out_proj$", ".self_attn.to_out", path)


def processors(parts: Parts) -> Written:
    """diffusers' attention processors: `attn1.processor.to_q_lora.down.weight`."""
    layers = layers_of(parts, ATTENTION, TEXT_ATTENTION, alpha=None)

    def write(module: str, f: Factors) -> dict[str, Tensor]:
        return entries(module, f, "_lora.down.weight", "_lora.up.weight")

    return written(layers, lambda part, path: f"{part}.{_processor(path)}", write)


def bare_processors(parts: Parts) -> Written:
    """The oldest of diffusers: the U-Net's alone, no prefix."""
    made = processors(parts)
    tensors = {n.removeprefix("unet."): t for n, t in made.tensors.items() if n.startswith("unet.")}
    return Written(tensors, {key: f for key, f in made.layers.items() if key[0] == "unet"})


def new_transformers(parts: Parts) -> Written:
    """Text encoders of transformers 5 have no level `text_model`."""
    return written(
        layers_of(parts, alpha=None), lambda part, path: f"{part}.{path.removeprefix('text_model.')}", peft_entries
    )


def open_clip(parts: Parts) -> Written:
    """OpenCLIP's names: queries, keys and values in one, rows after rows."""
    part, place = {
        1: ("text_encoder", "cond_stage_model.model"),
        2: ("text_encoder_2", "conditioner.embedders.1.model"),
    }[len(parts.towers)]
    outside = {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}
    network, layers, tensors = parts.modules()[part], Layers(), dict[str, Tensor]()
    for n, layer in enumerate(network.get_submodule("text_model.encoder.layers").children()):
        ours, theirs = f"text_model.encoder.layers.{n}", f"{place}.transformer.resblocks.{n}"
        for a, b in outside.items():
            weight = layer.get_submodule(a).weight
            assert isinstance(weight, Tensor)
            layers[part, f"{ours}.{a}"] = factors(weight, 3, 2.0, n)
            tensors |= kohya_entries(f"{theirs}.{b}", layers[part, f"{ours}.{a}"])
        q = layer.get_submodule("self_attn.q_proj").weight
        assert isinstance(q, Tensor)
        fused = factors(q.repeat(3, 1), 4, 2.0, 100 + n)
        tensors |= kohya_entries(f"{theirs}.attn.in_proj", fused)
        for i, letter in enumerate("qkv"):
            up = fused.up.chunk(3)[i]
            layers[part, f"{ours}.self_attn.{letter}_proj"] = Factors(fused.down, up, 2.0)
    return Written(tensors, layers)


def sd3_diffusers(parts: Parts) -> Written:
    return written(layers_of(parts, SD3_LAYERS, alpha=None), lambda part, path: f"{part}.{path}", peft_entries)


def sd3_one_trainer(parts: Parts) -> Written:
    def name(part: str, path: str) -> str:
        return flat(f"{'lora_transformer' if part == 'transformer' else te(part, several=True)}.{path}")

    return written(layers_of(parts, SD3_LAYERS), name, kohya_entries)


FUSED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
SINGLE = {"x_block.attn.proj": "attn.to_out.0", "x_block.mlp.fc1": "ff.net.0.proj"}


def sd3_kohya(parts: Parts) -> Written:
    """sd-scripts, Stable Diffusion 3: the original names, queries, keys and values in one; shift and scale swapped."""
    network, layers, tensors = parts.unet, Layers(), dict[str, Tensor]()
    blocks = len(network.get_submodule("transformer_blocks"))  # type: ignore[arg-type]
    for i in range(blocks):
        ours, theirs = f"transformer_blocks.{i}", f"lora_unet_joint_blocks_{i}"
        for module, paths in FUSED.items():
            weight = network.get_submodule(f"{ours}.{paths[0]}").weight
            assert isinstance(weight, Tensor)
            fused = factors(weight.repeat(3, 1), 4, 2.0, i)
            tensors |= kohya_entries(f"{theirs}_{flat(module)}", fused)
            for path, up in zip(paths, fused.up.chunk(3), strict=True):
                layers["transformer", f"{ours}.{path}"] = Factors(fused.down, up, 2.0)
        for module, path in SINGLE.items():
            weight = network.get_submodule(f"{ours}.{path}").weight
            assert isinstance(weight, Tensor)
            layers["transformer", f"{ours}.{path}"] = own = factors(weight, 5, 2.0, 50 + i)
            tensors |= kohya_entries(f"{theirs}_{flat(module)}", own)
    last = network.get_submodule("norm_out.linear").weight
    assert isinstance(last, Tensor)
    own = factors(last, 4, 2.0, 99)
    tensors |= kohya_entries("lora_unet_final_layer_adaLN_modulation_1", own)
    layers["transformer", "norm_out.linear"] = Factors(own.down, torch.cat(own.up.chunk(2)[::-1]), 2.0)
    return Written(tensors, layers)


Writers = dict[str, Callable[[Parts], Written]]
SD1: Writers = {
    "kohya": kohya, "OneTrainer": one_trainer, "OneTrainer raw": one_trainer_raw, "LyCORIS": lycoris,
    "ComfyUI": comfy, "original": whole_original, "diffusers with metadata": diffusers_peft,
    "diffusers": diffusers_plain, "peft in memory": adapter_named, "diffusers lora": diffusers_lora,
    "processors": processors, "bare processors": bare_processors, "transformers 5": new_transformers,
}  # fmt: skip
SDXL: Writers = {
    "kohya": kohya_xl, "kohya with diffusers names": kohya, "OneTrainer": one_trainer, "ComfyUI": comfy,
    "diffusers with metadata": diffusers_peft, "diffusers lora": diffusers_lora, "OpenCLIP": open_clip,
}  # fmt: skip
SD3: Writers = {"diffusers": sd3_diffusers, "OneTrainer": sd3_one_trainer, "kohya": sd3_kohya}
DIALECTS: dict[str, Writers] = {
    "sd1": SD1,
    "bk-sdm-small": {"kohya": kohya, "original": whole_original},
    "sd2": {"kohya": kohya, "diffusers": diffusers_plain, "OpenCLIP": open_clip},
    "sdxl": SDXL,
    "ssd-1b": {"kohya": kohya_xl, "diffusers": diffusers_plain},
    "refiner": {"kohya with diffusers names": kohya},
    "sd35-medium": SD3,
}
CASES = [(kind, dialect) for kind, dialects in DIALECTS.items() for dialect in dialects]
