"""What the names in LoRA files mean: the dialects of their writers as tables, resolved against a model's own modules.

A name is a module and a tensor of it, `lora_unet_mid_block_attentions_0_proj_in.lora_down.weight`. Modules are written
with the names of diffusers and transformers or with those of the original single files, with dots or underscores,
behind one of a few prefixes. Since underscores cannot be told from dots, every module that the opened model really has
is written in every dialect once and looked up; a name that two modules would have means neither.

Sources of the dialects: kohya-ss/sd-scripts `networks/lora.py`, `oft.py`; KohakuBlueleaf/LyCORIS `wrapper.py`;
diffusers `loaders`; peft `utils/save_and_load.py`; Nerogar/OneTrainer `modules/util/convert/lora`; ComfyUI `lora.py`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from reverie.adapters.deltas import ENDINGS
from reverie.families.base import Parts
from reverie.families.family import FAMILIES, load_all

# Endings of names, and the tensor that each means under the name that sd-scripts and LyCORIS give it.
ADAPTER = r"(?:\.[\w-]+)?"  # peft puts the name of the adapter before the last word, or behind all
SPELLINGS: tuple[tuple[str, str], ...] = (
    (rf"\.lora_A{ADAPTER}\.weight", "lora_down.weight"),
    (rf"\.lora_B{ADAPTER}\.weight", "lora_up.weight"),
    (rf"\.lora_B{ADAPTER}\.bias", "lora_up.bias"),
    (rf"\.lora_magnitude_vector{ADAPTER}(?:\.weight)?", "lora_magnitude_vector"),
    (r"(?:\.lora_linear_layer|[._]lora)\.down\.weight", "lora_down.weight"),
    (r"(?:\.lora_linear_layer|[._]lora)\.up\.weight", "lora_up.weight"),
    *((r"\." + re.escape(ending), ending) for ending in sorted(ENDINGS, key=len, reverse=True)),
)
PATTERNS = tuple((re.compile(spelling + r"\Z"), ending) for spelling, ending in SPELLINGS)

# Where a single file keeps a network: `model.diffusion_model.`, `conditioner.embedders.1.model.`, ...
PLACE = re.compile(
    r"model\.diffusion_model|cond_stage_model\.(?:transformer|model)|conditioner\.embedders\.\d\.(?:transformer|model)"
    r"|text_encoders\.\w+\.transformer"
)
DENOISER = "denoiser"  # stands for the denoising network, whose folder is `unet` or `transformer`
FIRST = "first"  # stands for the model's first text encoder
EVERY = "every"  # stands for all parts: the module alone decides
PREFIXES: Mapping[str, tuple[str, ...]] = {
    DENOISER: ("lora_unet", "lora_transformer", "oft_unet", "unet", "transformer", "diffusion_model"),
    FIRST: ("lora_te",),
    "text_encoder": ("lora_te1", "text_encoder", "clip_l", "text_encoders.clip_l.transformer"),
    "text_encoder_2": ("lora_te2", "text_encoder_2", "clip_g", "text_encoders.clip_g.transformer"),
    "text_encoder_3": ("lora_te3", "text_encoder_3", "t5", "text_encoders.t5xxl.transformer"),
    EVERY: ("lycoris", ""),
}
WRAPPED = ("base_model.model.", "module.")  # what peft and torch's DistributedDataParallel put before all

# Modules under older names: diffusers' attention processors before peft, transformers 5, which drops a level.
OLDER: tuple[tuple[str, str], ...] = (
    (r"\.(attn\d?)\.(to_\w+|add_\w+)(?:\.0)?\Z", r".\1.processor.\2"),
    (r"\.(attn\d?)\.to_out\.0\Z", r".\1.to_out"),
    (r"\.self_attn\.([qkv])_proj\Z", r".self_attn.to_\1"),
    (r"\.self_attn\.out_proj\Z", r".self_attn.to_out"),
    (r"\Atext_model\.", ""),
)


@dataclass(frozen=True)
class Target:
    """The weight of a model that a name means.

    Attributes:
        part: the folder of the network.
        paths: of the module; of queries, keys and values where the file has the three in one, rows after rows.
        swapped: the halves of its rows change places (shift and scale).
    """

    part: str
    paths: tuple[str, ...]
    swapped: bool = False


Table: TypeAlias = dict[str, Target | None]


@dataclass(frozen=True)
class Names:
    """Every module of a model in every dialect; see `names_of`.

    Attributes:
        table: with underscores for dots; None where two modules share a name.
    """

    table: Mapping[str, Target | None]

    def find(self, module: str) -> Target | None:
        """The weight that a module's name means, None if the model has none such."""
        for start in WRAPPED:
            module = module.removeprefix(start)
        return self.table.get(_underscored(module))


def parted(name: str) -> tuple[str, str] | None:
    """The module that a tensor changes, as the file writes it, and which of `ENDINGS` it is; None if none."""
    for pattern, ending in PATTERNS:
        match = pattern.search(name)
        if match and match.start():
            return name[: match.start()], ending
    return None


def names_of(parts: Parts) -> Names:
    """The table of a model: each of its modules with a weight, in every dialect."""
    table: Table = {}
    own = {part: dict(_spellings(part, module)) for part, module in networks(parts).items()}
    prefixes = {part: [*PREFIXES.get(part, ()), *PREFIXES[EVERY]] for part in own}
    prefixes[parts.network] += PREFIXES[DENOISER]
    prefixes[parts.towers[0].name] += PREFIXES[FIRST]
    for place, module, target in _originals(parts):
        own[target.part].setdefault(module, target)
        prefixes[target.part] += [place] if place not in prefixes[target.part] else []
    for part, spelled in own.items():
        for prefix in prefixes[part]:
            for module, target in spelled.items():
                _enter(table, f"{prefix}.{module}" if prefix else module, target)
    return Names(table)


def networks(parts: Parts) -> dict[str, nn.Module]:
    """The networks that LoRAs are made for, the denoising one first: all but the VAE."""
    modules = parts.modules()
    return {parts.network: modules[parts.network]} | {tower.name: tower.module for tower in parts.towers}


def shapes_of(parts: Parts) -> dict[tuple[str, str], torch.Size]:
    """The shapes of all weights, by part and path of the module."""
    return {(part, path): w.shape for part, network in networks(parts).items() for path, w in weighted(network)}


def weighted(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a network, with the paths of their modules."""
    for path, module in network.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            yield path, weight


def _spellings(part: str, network: nn.Module) -> Iterator[tuple[str, Target]]:
    paths = [path for path, _ in weighted(network)]
    yield from ((path, Target(part, (path,))) for path in paths)
    for pattern, older in OLDER:
        for path in paths:
            other = re.sub(pattern, older, path)
            if other != path:
                yield other, Target(part, (path,))


def _originals(parts: Parts) -> Iterator[tuple[str, str, Target]]:
    """Every weight of the original single file: its place, its module there, and ours.

    The family is asked to write a file of marked rows instead of weights, and what has become of them is read from the
    marks: so that every family that can write its file can read LoRAs for it.
    """
    marks: list[tuple[str, str]] = []
    load_all()
    written = FAMILIES[parts.identity.family].join_file(
        {part: (network.config, _marked(part, network, marks)) for part, network in networks(parts).items()}
    )
    for name, rows in written.items():
        match = PLACE.match(name)
        module = re.fullmatch(r"\.(.+)[._]weight", name[match.end() :]) if match else None
        if match and module and rows.shape[1] == 1:  # a transposed one is no module there
            numbers = rows.flatten().tolist()
            firsts = [min(pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]
            found = [marks[first // 2] for first in firsts]
            paths = tuple(path.removesuffix(".weight") for _, path in found)
            yield match[0], module[1], Target(found[0][0], paths, swapped=numbers[0] > numbers[1])


def _marked(part: str, network: nn.Module, marks: list[tuple[str, str]]) -> dict[str, Tensor]:
    tensors = {}
    for name in network.state_dict():
        tensors[name] = torch.tensor([[2 * len(marks)], [2 * len(marks) + 1]])
        marks.append((part, name))
    return tensors


def _enter(table: Table, name: str, target: Target) -> None:
    key = _underscored(name)
    if table.setdefault(key, target) != target:
        table[key] = None


def _underscored(name: str) -> str:
    return name.replace(".", "_")


# The other way, for writing


def written_names(parts: Parts, dialect: str) -> dict[tuple[str, str], str]:
    """How a dialect writes the modules of a model: by part and path.

    Args:
        dialect: `kohya` or `diffusers`.
    """
    several = len(parts.towers) > 1
    original = {target.paths: module for _, module, target in _originals(parts) if target.part == parts.network}
    found = {}
    for part, network in networks(parts).items():
        for path, _ in weighted(network):
            if dialect == "diffusers":
                found[part, path] = f"{part}.{path}"
                continue
            te = f"lora_te{part.removeprefix('text_encoder').removeprefix('_') or 1}" if several else "lora_te"
            start = {"unet": "lora_unet", "transformer": "lora_transformer"}.get(part, te)
            # sd-scripts trains Stable Diffusion XL under the names of the original file, 1 and 2 under diffusers'.
            named = original.get((path,), path) if several and part == "unet" else path
            found[part, path] = _underscored(f"{start}.{named}")
    return found
