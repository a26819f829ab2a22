"""A single weight file: what its header shows, and the networks in it.

The original (LDM) layout holds a whole model under prefixes; files with one network alone often lack the prefix, or
have the names of a diffusers folder.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from reverie.checkpoint.source import WeightFile
from reverie.errors import CheckpointError
from reverie.families import ldm, shapes
from reverie.families.pairs import refuse_strangers
from reverie.families.pieces import CLIP, UNET, VAE, Kind, Parts, Piece, Pieces, tidied_clip, tidied_vae
from reverie.families.shapes import Header, shapes_of
from reverie.nets.unet import VectorKind

# What training leaves in a file and no picture needs: averaged copies, the noise schedule, old buffers, and signs of
# what the network predicts, which are read apart.
IGNORED = (
    "model_ema.", "betas", "alphas_cumprod", "sqrt_", "log_one_minus", "posterior_", "logvar", "lvlb_weights",
    "first_stage_model.loss.", "first_stage_model.model_ema.", "cond_stage_model.logit_scale", "scale_factor",
    "global_step", "denoiser.", "v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.",
)  # fmt: skip
IGNORED_ENDS = (".position_ids", ".logit_scale", ".attn_mask")
# Networks beside the denoising one that some variants come with.
BESIDE = {"depth_model.": "a depth estimator"}
# What shows some variants a picture, and which folder of diffusers holds the same; those variants read it themselves.
SHOWING = {
    "embedder.": "image_encoder", "noise_augmentor.": "image_normalizer", "low_scale_model.": "low_res_scheduler"
}  # fmt: skip
TEXT_ROOTS = ("cond_stage_model.", "conditioner.", "text_encoders.")  # of LDM, of Stability's sgm, of ComfyUI
# Of a U-Net under the names of a diffusers folder.
NATIVE = {"conv_in.weight", "time_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight", "conv_out.weight"}
JOINT = "joint_blocks."  # of the transformer of Stable Diffusion 3


@dataclass(frozen=True)
class TextPlace:
    """Where a text encoder is in a file.

    Attributes:
        open_clip: its names are OpenCLIP's, not those of transformers.
    """

    prefix: str
    open_clip: bool = False


@dataclass(frozen=True)
class TextRule:
    """How a family uses a text encoder.

    Attributes:
        part: the name of its folder.
        places: where it may be in a single file.
        activation: of one of CLIP's with the names of transformers; OpenCLIP's is `gelu`.
        projected: whether the family uses the projection of the pooled output; it is left out where it does not.
        most_layers: layers that the family uses; a file may hold one more, which is left out.
        t5: it is T5's.
        reader: reads it, as `text_piece` does for those of CLIP.
    """

    part: str
    places: tuple[TextPlace, ...]
    activation: str = "quick_gelu"
    projected: bool = False
    most_layers: int = shapes.MOST_LAYERS
    t5: bool = False
    reader: "Callable[[WeightFile, TextPlace, TextRule], Piece] | None" = None

    def read(self, file: WeightFile, place: TextPlace) -> Piece:
        """The text encoder at a place in a file."""
        return (self.reader or text_piece)(file, place, self)


@dataclass(frozen=True)
class Sight:
    """What a header shows of the denoising network.

    Attributes:
        header: all tensors of the file.
        network: `unet`, `transformer`, or empty.
        prefix: before its names.
        native: its names are ours, those of a diffusers folder.
    """

    header: Header
    network: str = ""
    prefix: str = ""
    native: bool = False

    @cached_property
    def context_width(self) -> int:
        """Channels of the prompt that a U-Net attends to; 0 where it does not."""
        names = (n for n in self.header if n.startswith(self.prefix) and n.endswith("attn2.to_k.weight"))
        shape = next((self.header[name].shape for name in names), ())
        return shape[1] if len(shape) == 2 else 0

    @property
    def vector(self) -> str:
        """The sign of a vector beside the prompt, as a U-Net's names have it; empty without."""
        signs = ("label_emb.0.0.weight", "label_emb.weight", "add_embedding.linear_1.weight",
                 "class_embedding.linear_1.weight", "class_embedding.weight")  # fmt: skip
        return next((sign for sign in signs if self.prefix + sign in self.header), "")

    @property
    def has_text(self) -> bool:
        """Whether there is any text encoder."""
        return self.has(*TEXT_ROOTS)

    def has(self, *prefixes: str) -> bool:
        """Whether any name begins with one of these."""
        return any(name.startswith(prefixes) for name in self.header)


def look(header: Header) -> Sight:
    """What a header shows."""
    for prefix in (ldm.UNET, ""):
        if any(name.startswith(prefix + JOINT) for name in header):
            return Sight(header, "transformer", prefix)
        # A ControlNet has the same beginning, and no end.
        if f"{prefix}input_blocks.0.0.weight" in header and (prefix or "out.2.weight" in header):
            return Sight(header, "unet", prefix)
    if header.keys() >= NATIVE:
        return Sight(header, "unet", "", native=True)
    return Sight(header)


def ignored(name: str) -> bool:
    """Whether a tensor is none of a network that draws."""
    return name.startswith((*IGNORED, *BESIDE, *SHOWING)) or name.endswith(IGNORED_ENDS)


def beside(header: Iterable[str]) -> list[str]:
    """What a file holds beside the networks that draw."""
    names = list(header)
    return [what for prefix, what in BESIDE.items() if any(name.startswith(prefix) for name in names)]


def model_pieces(
    file: WeightFile, rules: tuple[TextRule, ...], *, vector: VectorKind, title: str, ema: bool = False
) -> Pieces:
    """The networks of a file that holds a U-Net, any of them.

    Args:
        rules: the text encoders that the family has.
        vector: what `label_emb.0` is in this family.
        title: the family, for messages.
        ema: take the averaged copy of the U-Net (`model_ema.*`).

    Raises:
        CheckpointError: a tensor of no part, or of an impossible shape; no averaged copy.
    """
    sight = look(file.tensors)
    pieces, prefixes = [unet_piece(file, sight, vector, ema=ema)], [sight.prefix]
    places = (
        [(rule, place) for rule in rules for place in rule.places if under(file, place.prefix)] if sight.prefix else []
    )
    for rule, place in places:
        pieces.append(rule.read(file, place))
        prefixes.append(place.prefix)
    for prefix in ldm.VAES if sight.prefix else ():
        if under(file, prefix):
            pieces.append(vae_piece(file, prefix))
            prefixes.append(prefix)
    strangers = [name for name in file.tensors if not ignored(name) and not name.startswith(tuple(prefixes))]
    if strangers:
        raise CheckpointError(f"it has {len(strangers)} tensors that {title} has not: {strangers[0]}, ...")
    return {piece.part: piece for piece in pieces}


def unet_piece(file: WeightFile, sight: Sight, vector: VectorKind, *, ema: bool = False) -> Piece:
    """The U-Net of a file; see `model_pieces`."""
    names = under(file, sight.prefix)
    if ema:
        names = _averaged(file, sight.prefix, names)
    found = shapes_of(file.tensors, sight.prefix)
    if sight.native:
        return piece_of(file, "unet", UNET, shapes.unet_config(found), names, dict)
    config = ldm.unet_config({name: found[name] for name in names}, vector)
    return piece_of(file, "unet", UNET, config, names, lambda tensors: ldm.unet_from_file(tensors, config))


def _averaged(file: WeightFile, prefix: str, names: Mapping[str, str]) -> dict[str, str]:
    """The averaged copies, whose names have no dots after the first."""
    found = {name: "model_ema." + f"diffusion_model.{name}".replace(".", "") for name in names}
    missing = [name for name, copy in found.items() if copy not in file.tensors]
    if missing:
        raise CheckpointError(
            f"it has no averaged copy (model_ema.*) of {len(missing)} tensors of the U-Net, "
            f"{prefix}{missing[0]} first; load it without ema"
        )
    return found


def vae_piece(file: WeightFile, prefix: str) -> Piece:
    """The autoencoder of a file, under either layout's names."""
    names, found = under(file, prefix), shapes_of(file.tensors, prefix)
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in names:
        return piece_of(file, "vae", VAE, shapes.vae_config(found), names, tidied_vae)
    config = ldm.vae_config(found)
    return piece_of(file, "vae", VAE, config, names, lambda tensors: ldm.vae_from_file(tensors, config))


def text_piece(file: WeightFile, place: TextPlace, rule: TextRule) -> Piece:
    """A CLIP text encoder of a file, as the family uses it."""
    unused = [f"{stack}.{rule.most_layers}." for stack in ("resblocks", "encoder.layers")]
    unused += [] if rule.projected else ["text_projection"]
    names = {n: source for n, source in under(file, place.prefix).items() if not any(sign in n for sign in unused)}
    found = {name: tuple(file.tensors[source].shape) for name, source in names.items()}
    if not place.open_clip:
        clip = shapes.clip_config(tidied_clip(found), rule.activation)
        return piece_of(file, rule.part, CLIP, clip, names, tidied_clip)
    config = ldm.open_clip_config(found)
    return piece_of(file, rule.part, CLIP, config, names, lambda t: ldm.open_clip_from_file(t, config))


def under(file: WeightFile, prefix: str) -> dict[str, str]:
    """The names under a prefix without it, and in the file."""
    return {name.removeprefix(prefix): name for name in file.tensors if name.startswith(prefix) and not ignored(name)}


def piece_of(
    file: WeightFile,
    part: str,
    kind: Kind,
    config: object,
    names: Mapping[str, str],
    ours: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> Piece:
    """A network of a file.

    Args:
        names: of its tensors, without and with their prefix.
        ours: brings the tensors under our names.
    """

    def tensors() -> dict[str, Tensor]:
        return ours({name: file.weight(source) for name, source in names.items()})

    return Piece(part, kind, config, tensors, (file.path,), f"the {kind.title} in {file.path}")


def joined(parts: Parts, rules: tuple[TextRule, ...]) -> dict[str, Tensor]:
    """The networks of a model with a U-Net, under their names in a single file: what `model_pieces` takes apart.

    Args:
        parts: config and tensors, by the names of their folders.
        rules: the text encoders of the family; each is written to the first of its places.

    Raises:
        CheckpointError: a part that such files do not have, or a tensor too many or too few.
    """
    places = {rule.part: rule.places[0] for rule in rules}
    refuse_strangers(parts, ("unet", "vae", *places), "such a file", "part")
    found: dict[str, Tensor] = {}
    for part, (config, tensors) in parts.items():
        if part == "unet":
            prefix, theirs = ldm.UNET, ldm.unet_to_file(tensors, config)
        elif part == "vae":
            prefix, theirs = ldm.VAE, ldm.vae_to_file(tensors, config)
        else:
            prefix = places[part].prefix
            theirs = ldm.open_clip_to_file(tensors, config) if places[part].open_clip else dict(tensors)
        found |= {prefix + name: t for name, t in theirs.items()}
    return found
