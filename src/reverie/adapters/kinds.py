"""Files that are no checkpoint, told apart by the names of their tensors: LoRA, ControlNet, VAE, embedding, upscaler.

Names: kohya-ss/sd-scripts, LyCORIS, peft and diffusers (LoRA); lllyasviel/ControlNet and diffusers (ControlNet);
tencent-ailab/IP-Adapter; TencentARC/T2I-Adapter; AUTOMATIC1111 (embeddings, hypernetworks); xinntao's ESRGAN;
guoyww/AnimateDiff. What a file goes with follows from the width of the prompt that it was made for.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from reverie.checkpoint.weightfile import WeightFile
from reverie.families.lone import text_places, vae_prefix

MODELS = {
    768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL",
    1280: "the Stable Diffusion XL refiner",
}  # fmt: skip
# Endings of a tensor of each algorithm; LyCORIS `lycoris/modules`, peft `tuners/lora`.
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "LoRA": (".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight",
             "_lora.down.weight"),
    "LoHa": (".hada_w1_b",),
    "LoKr": (".lokr_w1", ".lokr_w1_a"),
    "OFT": (".oft_blocks", ".oft_diag"),
    "GLoRA": (".a1.weight",),
    "IA3": (".on_input",),
    "full differences": (".diff",),
}  # fmt: skip
RANKED = (*ALGORITHMS["LoRA"], *ALGORITHMS["LoHa"])  # their shapes are (rank, channels)
TO_PROMPT = re.compile(r"attn2[._](processor[._])?to_[kv]")  # what reads the prompt
SD3 = "Stable Diffusion 3"
# Families known by a name that no other has; the first that occurs decides.
NAMED: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), title)
    for pattern, title in (
        (r"lllite_", "ControlNet-LLLite, which is no LoRA"),
        (r"lora_controlnet", "Control-LoRA, which is a ControlNet"),
        (r"motion_modules", "AnimateDiff"),
        (r"double_blocks|single_transformer_blocks|single_blocks", "Flux"),
        (r"transformer_blocks[._]\d+[._](img_mlp|img_mod|txt_mlp)", "Qwen-Image"),
        (r"blocks[._]\d+[._](cross_attn|self_attn)[._][qkvo]\b", "Wan"),
        (r"noise_refiner|context_refiner", "Lumina 2 or Z-Image"),
        (r"lora_prior_", "Stable Cascade"),
        (r"adaln_single|caption_projection", "PixArt or LTX"),
        (r"joint_blocks|add_k_proj", SD3),
    )
)  # fmt: skip
# What trainers write of the model that they trained for.
BASES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), title)
    for pattern, title in (
        (r"xl.*refiner", MODELS[1280]), (r"sdxl|diffusion-xl|^pony|^illustrious|^noob", MODELS[2048]),
        (r"^sd_?v?2|diffusion-v2|^sd 2", MODELS[1024]), (r"^sd_?v?1|diffusion-v1|^sd 1", MODELS[768]),
        (r"^sd_?3|diffusion-(v)?3|^sd 3", SD3), (r"flux", "Flux"),
    )
)  # fmt: skip
TRAINED = {
    "lora_unet_": "denoising network", "lycoris_": "denoising network", "unet.": "denoising network",
    "lora_transformer_": "denoising network", "transformer.": "denoising network",
    "lora_te": "text encoder", "text_encoder": "text encoder",
}  # fmt: skip
HINTS = ("controlnet_cond_embedding.", "input_hint_block.", "controlnet_blocks.", "zero_convs.0.")
TOLD = ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name", "sd version", "baseModel")


@dataclass(frozen=True)
class Described:
    """What a file is that is no checkpoint.

    Attributes:
        kind: in a word or two.
        why: what in its header shows it.
        facts: more about it, one line each.
        fits: what it goes with.
    """

    kind: str
    why: str
    facts: tuple[str, ...] = ()
    fits: tuple[str, ...] = ()


def describe_addon(file: WeightFile) -> Described | None:
    """What a file is, if it is no checkpoint but something that people have."""
    describers: tuple[Callable[[WeightFile], Described | None], ...] = (
        _lora, _controlnet, _by_prefix, _embedding, _upscaler, _lone,
    )  # fmt: skip
    return next((found for describe in describers if (found := describe(file))), None)


def _lora(file: WeightFile) -> Described | None:
    for algorithm, endings in ALGORITHMS.items():
        sign = next((name for name in file.tensors if name.endswith(endings)), None)
        if sign is not None:
            trained = {what for name in file.tensors for start, what in TRAINED.items() if name.startswith(start)}
            ranks = {info.shape[0] for name, info in file.tensors.items() if name.endswith(RANKED) and info.shape}
            facts = [f"algorithm {algorithm}"]
            facts += [f"rank {' and '.join(map(str, sorted(ranks)))}"] if ranks else []
            facts += [f"trained: {' and '.join(sorted(trained))}"] if trained else []
            return Described("LoRA", f"tensor {sign}", (*facts, *_told(file)), _fits(file, RANKED))
    return None


def _controlnet(file: WeightFile) -> Described | None:
    sign = next((name for name in file.tensors for hint in HINTS if hint in name), None)
    if sign is None:
        return None
    return Described("ControlNet", f"tensor {sign}", _told(file), _fits(file, ("weight",)))


def _by_prefix(file: WeightFile) -> Described | None:
    kinds = {
        "image_proj.": "IP-Adapter", "ip_adapter.": "IP-Adapter", "adapter.body.": "T2I-Adapter",
        "adapter.conv_in.": "T2I-Adapter", "body.0.in_conv.": "T2I-Adapter", "body.0.block1.": "T2I-Adapter",
        "style_embedding": "T2I-Adapter for style", "vision_model.": "image encoder", "visual.conv1.": "image encoder",
        "taesd_": "TAESD, a small VAE", "encoder.layers.0.weight": "TAESD, a small VAE",
        "decoder.layers.0.weight": "TAESD, a small VAE",
    }  # fmt: skip
    for prefix, kind in kinds.items():
        sign = next((name for name in file.tensors if name.startswith(prefix)), None)
        if sign is not None:
            fits = _fits(file, ("to_k_ip.weight", "to_v_ip.weight")) if kind == "IP-Adapter" else ()
            return Described(kind, f"tensor {sign}", _told(file), fits)
    motion = next((name for name in file.tensors if "motion_modules." in name), None)
    if motion is not None and not any(name.startswith("model.diffusion_model.input_blocks.") for name in file.tensors):
        return Described("motion module (AnimateDiff)", f"tensor {motion}", _told(file))
    return None


def _embedding(file: WeightFile) -> Described | None:
    """One table of vectors, or two for the two text encoders of SDXL, and nothing else to speak of."""
    tables = {n: t.shape for n, t in file.tensors.items() if t.dtype.is_floating_point and len(t.shape) in {1, 2}}
    if len(file.tensors) > 3 or not tables or len(tables) != len(file.tensors):
        return None
    widths = {name: shape[-1] for name, shape in tables.items()}
    known = set(tables) <= {"emb_params", "clip_l", "clip_g", "t5xxl"} or any("string_to_param" in n for n in tables)
    wrapped = "string_to_param" in file.metadata.get("wrapper", "") or "*" in tables
    learned = len(tables) == 1 and next(iter(widths.values())) in {*MODELS, 4096}
    if not (known or wrapped or learned):
        return None
    vectors = max(shape[0] if len(shape) == 2 else 1 for shape in tables.values())
    facts = (f"{vectors} vector{'s' if vectors > 1 else ''}, {' and '.join(map(str, widths.values()))} wide",)
    both = {"clip_l", "clip_g"} <= set(tables)
    fits = (MODELS[2048],) if both else tuple(dict.fromkeys(MODELS[w] for w in widths.values() if w in MODELS))
    return Described("embedding (textual inversion)", f"tensors {', '.join(tables)}", (*facts, *_told(file)), fits)


def _upscaler(file: WeightFile) -> Described | None:
    signs = {
        "RDB1.conv1.": "ESRGAN", "rdb1.conv1.": "ESRGAN", "residual_group.blocks.0": "SwinIR",
        "relative_position_bias_table": "a transformer",
    }  # fmt: skip
    for sign, what in signs.items():
        name = next((name for name in file.tensors if sign in name), None)
        if name is not None:
            return Described("upscaler", f"tensor {name}", (f"architecture {what}",))
    bodies = [name for name in file.tensors if re.fullmatch(r"body\.\d+\.(weight|bias)", name)]
    if len(bodies) == len(file.tensors) > 3:
        return Described("upscaler", "tensors body.*", ("architecture compact (SRVGG)",))
    return None


def _lone(file: WeightFile) -> Described | None:
    """A VAE or a text encoder, and no denoising network."""
    names = file.tensors
    if any("input_blocks." in n or "joint_blocks." in n or "double_blocks." in n or "attn2." in n for n in names):
        return None
    prefix = vae_prefix(names)
    if prefix is not None:
        signs = ("decoder.conv_in.weight",)
        channels = next((t.shape[1] for n, t in names.items() if n.endswith(signs) and len(t.shape) == 4), 0)
        fits = {4: (f"{MODELS[768]}, {MODELS[1024]} or {MODELS[2048]}",), 16: ("Stable Diffusion 3 or Flux",)}
        return Described("VAE", f"{prefix}decoder.*", (f"{channels} channels of latents",), fits.get(channels, ()))
    places = text_places(names)
    if places:
        return Described("text encoder", f"{places[0][0].prefix or 'text_model'}*", _told(file))
    return None


def _told(file: WeightFile) -> tuple[str, ...]:
    return tuple(f"{key}: {file.metadata[key][:80]}" for key in TOLD if file.metadata.get(key))


def _fits(file: WeightFile, endings: tuple[str, ...]) -> tuple[str, ...]:
    """The models whose names these are, or whose prompt is as wide as what reads the prompt here."""
    names = list(file.tensors)
    named = next((title for sign, title in NAMED if any(sign.search(name) for name in names)), "")
    if named == SD3:
        blocks = _count(names, r"(?:joint_blocks|transformer_blocks)[._](\d+)")
        return (f"{SD3} (at least {blocks} blocks)",)
    if named:
        return (named,)
    reads = re.compile(r"to_[kv]_ip") if any("to_k_ip" in name for name in names) else TO_PROMPT
    shapes = (info.shape for name, info in file.tensors.items() if name.endswith(endings) and reads.search(name))
    return tuple(map(by_width, sorted({shape[1] for shape in shapes if len(shape) >= 2})))


def shown_models(file: WeightFile) -> tuple[str, ...]:
    """The models that a LoRA was made for, by its names and widths; empty where they do not tell."""
    return _fits(file, RANKED)


def told_models(file: WeightFile) -> tuple[str, ...]:
    """The same, by what its trainer wrote."""
    told = [file.metadata.get(key, "") for key in TOLD]
    return tuple(title for text in told for sign, title in BASES if sign.search(text))[:1]


def by_width(width: int) -> str:
    """The model whose prompt is so wide."""
    return MODELS.get(width, f"a model whose prompt is {width} wide")


def _count(names: Iterable[str], pattern: str) -> int:
    return 1 + max((int(match[1]) for name in names if (match := re.search(pattern, name))), default=-1)
