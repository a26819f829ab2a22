"""Writing LoRA files that other programs read, with the metadata that they look for."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reverie.adapters.deltas import Delta, DoRA, LoRA
from reverie.adapters.lora import PEFT_METADATA
from reverie.adapters.lora_names import written_names
from reverie.checkpoint.save import write_weights
from reverie.errors import RequestError
from reverie.families.base import Parts
from reverie.nets.unet import UNet
from reverie.registry import Registry

# By the width of the prompt: what sd-scripts writes as `ss_base_model_version` and `modelspec.architecture`
# (library/train_util.py, library/sai_model_spec.py).
BASES: Mapping[int, tuple[str, str]] = {
    768: ("sd_v1", "stable-diffusion-v1"),
    1024: ("sd_v2", "stable-diffusion-v2-512"),
    2048: ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    1280: ("sdxl_refiner_v1-0", "stable-diffusion-xl-v1-refiner"),
    4096: ("sd3-m", "stable-diffusion-3"),
}
V = {"sd_v2": ("sd_v2_v", "stable-diffusion-v2-768-v")}  # where the network predicts v
SPEC = "1.0.0"  # of modelspec, github.com/Stability-AI/ModelSpec
LEGACY = slice(0x100000, 0x110000)  # bytes of the data that A1111's old extension hashed


def save_lora(
    deltas: Mapping[str, Mapping[str, Delta]],
    path: Path,
    parts: Parts,
    *,
    dialect: str = "kohya",
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write changes of a model's layers as one safetensors file, atomically.

    Args:
        deltas: part -> path of the module -> change, as in `Adapter.deltas`.
        parts: the model that they were made for.
        dialect: `kohya`, which A1111, ComfyUI and all others read and which has names for every algorithm, or
            `diffusers`, for LoRA and DoRA; there the scale is multiplied into the weights, as many readers know none.
        metadata: goes before what is written by itself.
        dtype: of the tensors; as they are if None.

    Raises:
        RequestError: an unknown dialect or layer, or an algorithm that it has no names for.
        OutputError: it cannot be written.
    """
    dialect = DIALECTS.name(dialect)
    names = written_names(parts, dialect)
    tensors: dict[str, Tensor] = {}
    for part, own in deltas.items():
        for module, delta in own.items():
            if (part, module) not in names:
                raise RequestError(f"the model has no layer {module!r} in {part!r}")
            found = DIALECTS[dialect](delta, f"{part}.{module}")
            tensors |= {f"{names[part, module]}.{ending}": t.detach() for ending, t in found.items()}
    if not tensors:
        raise RequestError("there is no change to be saved")
    if dtype is not None:
        tensors = {name: t.to(dtype) for name, t in tensors.items()}
    # The writer puts larger numbers first; in that order the hash is that of the data in the file.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    config = {PEFT_METADATA: json.dumps(_peft(deltas), sort_keys=True)} if dialect == "diffusers" else {}
    told = config | _told(deltas, path, parts) | _hashes(ordered) | dict(metadata or {})
    write_weights(path, ordered, told)


def _kohya(delta: Delta, where: str) -> dict[str, Tensor]:
    del where
    alpha = _alpha(delta)
    return delta.tensors() | ({} if alpha is None else {"alpha": torch.tensor(alpha)})


def _diffusers(delta: Delta, where: str) -> dict[str, Tensor]:
    inner = delta.inner if isinstance(delta, DoRA) else delta
    if not isinstance(inner, LoRA) or inner.mid is not None:
        raise RequestError(f"{where} is changed by {type(inner).__name__}, for which diffusers has no names; use kohya")
    scaled = (inner.up.float() * inner.scale).to(inner.up.dtype) if inner.scale != 1 else inner.up
    found = {"lora_A.weight": inner.down, "lora_B.weight": scaled}
    if inner.bias is not None:
        found["lora_B.bias"] = inner.bias * inner.scale
    if isinstance(delta, DoRA):
        conv = delta.magnitude.ndim == 4  # peft keeps the magnitudes of a convolution as (1, out, 1, 1)
        if delta.magnitude.shape[0] == 1 < inner.up.shape[0]:
            raise RequestError(f"{where} has magnitudes of its inputs, for which diffusers has no names; use kohya")
        found["lora_magnitude_vector"] = delta.magnitude.reshape(1, -1, 1, 1) if conv else delta.magnitude.flatten()
    return found


DIALECTS: Registry[Callable[[Delta, str], dict[str, Tensor]]] = Registry("LoRA dialect")
DIALECTS.add("kohya", _kohya, ("a1111", "comfy", "sd-scripts"))
DIALECTS.add("diffusers", _diffusers, ("peft",))


def _alpha(delta: Delta) -> float | None:
    """The numerator of the scale, the rank where none is said; None for what has no scale."""
    if hasattr(delta, "alpha"):
        return delta.rank if delta.alpha is None else float(delta.alpha)
    inside = [getattr(delta, "inner", None), *getattr(delta, "parts", ())]
    return next((a for part in inside if isinstance(part, Delta) and (a := _alpha(part)) is not None), None)


def _peft(deltas: Mapping[str, Mapping[str, Delta]]) -> dict[str, Any]:
    """The configs of peft, by part, in diffusers' flat form: every layer's rank, its alpha the same.

    Layers are named without the level `text_model.`, which transformers 5 has not; peft compares the ends of names.
    """
    flat: dict[str, Any] = {}
    for part, own in deltas.items():
        ranks = {module.removeprefix("text_model."): delta.rank or 1 for module, delta in own.items()}
        common = Counter(ranks.values()).most_common(1)[0][0]
        others = {module: rank for module, rank in ranks.items() if rank != common}
        config = {
            "r": common, "lora_alpha": common, "rank_pattern": others, "alpha_pattern": others,
            "target_modules": sorted(ranks), "use_dora": any(isinstance(delta, DoRA) for delta in own.values()),
            "lora_bias": any(getattr(delta, "bias", None) is not None for delta in own.values()),
        }  # fmt: skip
        flat |= {f"{part}.{key}": value for key, value in config.items()}
    return flat


def _told(deltas: Mapping[str, Mapping[str, Delta]], path: Path, parts: Parts) -> dict[str, str]:
    """What other programs look for: sd-scripts' `ss_*` and Stability's `modelspec.*`."""
    every = [delta for own in deltas.values() for delta in own.values()]
    plain = all(isinstance(inner, LoRA) for delta in every for inner in [getattr(delta, "inner", delta)])
    ranks = Counter(delta.rank for delta in every if delta.rank is not None)
    v = parts.identity.prediction == "v_prediction"
    told = {
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_output_name": path.stem,
        "modelspec.sai_model_spec": SPEC,
        "modelspec.title": path.stem,
        "modelspec.implementation": "reverie",
        "modelspec.prediction_type": "v" if v else "epsilon",
        "modelspec.resolution": f"{parts.defaults.width}x{parts.defaults.height}",
    }
    if ranks:
        rank = ranks.most_common(1)[0][0]
        alpha = next(_alpha(delta) for delta in every if delta.rank == rank) or rank
        told |= {"ss_network_dim": str(rank), "ss_network_alpha": f"{alpha:g}"}
    base = BASES.get(parts.unet.config.context_width)
    if base:
        version, architecture = V.get(base[0], base) if v else base
        told |= {"ss_base_model_version": version, "modelspec.architecture": f"{architecture}/lora"}
        told["ss_v2"] = str(version.startswith("sd_v2"))
    if not isinstance(parts.unet, UNet):
        del told["modelspec.prediction_type"]  # the specification knows epsilon and v alone
    return told


def _hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """sd-scripts' hashes of the data behind the header: all of it, and 64 KiB of it."""
    whole = hashlib.sha256()
    start = bytearray()
    for tensor in tensors.values():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes() if tensor.numel() else b""
        whole.update(raw)
        start += raw[: max(LEGACY.stop - len(start), 0)]
    legacy = hashlib.sha256(bytes(start[LEGACY])).hexdigest()[:8]
    return {"sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": legacy}
