"""Putting the networks of a checkpoint together, for every family alike."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from reverie.errors import CheckpointError
from reverie.families.base import Augmentation, Defaults, Identity, ImageEncoder, Join, Parts, Tower, own_defaults
from reverie.families.distilled import distilled
from reverie.families.encoders import MakeRule
from reverie.families.family import Evidence, Family, Opened
from reverie.families.json_config import Json
from reverie.families.pieces import Piece
from reverie.families.scheduler import read_scheduler
from reverie.nets.autoencoder import Autoencoder
from reverie.nets.clip_text import ClipText
from reverie.nets.mmdit import MMDiT
from reverie.nets.t5 import T5Encoder
from reverie.nets.unet import UNet, UNetConfig
from reverie.text.t5_tokenizer import T5Tokenizer
from reverie.text.tokenizer import EOS, ClipTokenizer

ARGUMENT = {"unet": "unet", "transformer": "unet", "vae": "vae"}  # how a part is given; else as text_encoder
# What a U-Net takes beside the latents: by the channels that it has more than they have.
BESIDE_LATENTS = {0: "", 1: "depth", 3: "x4-upscaler"}


@dataclass(frozen=True)
class Use:
    """How a family uses one text encoder.

    Attributes:
        pad: the token that the published tokenizer pads with.
    """

    part: str
    rule: MakeRule
    pad: str = EOS


@dataclass(frozen=True)
class Plan:
    """How the networks go together; see `Parts`.

    Attributes:
        scheduler: diffusers' config.
        scale: of the VAE's latents, where its config does not say; see `AutoencoderConfig`.
        size: rows and columns of latents, where no config says so.
        tables: whose published noise levels are meant; the family's own if empty.
        network: of the denoising network's config, what neither shapes nor JSON say.
    """

    uses: tuple[Use, ...]
    join: Join
    scheduler: Json
    evidence: tuple[Evidence, ...]
    scale: dict[str, Any]
    size: int
    steps: int
    guidance_scale: float
    variant: str = ""
    zero_empty: bool = False
    sizes: tuple[str, ...] = ()
    augmentation: Augmentation | None = None
    image_encoder: Callable[[], ImageEncoder | None] | None = None
    tables: str = ""
    network: dict[str, Any] = field(default_factory=dict)


def require(opened: Opened, family: Family, parts: tuple[str, ...]) -> None:
    """Refuse a checkpoint in which a part is missing.

    Raises:
        CheckpointError: naming what is there, what is missing and how to give it.
    """
    missing = [part for part in parts if part not in opened.pieces]
    if missing:
        ways = dict.fromkeys(f"{ARGUMENT.get(part, 'text_encoder')}=" for part in missing)
        raise CheckpointError(
            f"{opened.path} holds {' and '.join(opened.pieces)} of {family.title} but no {' and no '.join(missing)}; "
            f"give what is missing with {' and '.join(ways)}"
        )


def with_unet(
    opened: Opened, family: Family, plan: Callable[[Opened], Plan], texts: tuple[str, ...] = ("text_encoder",)
) -> Parts:
    """The networks of a model with a U-Net, put together.

    Args:
        texts: the text encoders that it needs.

    Raises:
        CheckpointError: see `require`, `check_vae` and `assemble`.
    """
    require(opened, family, (*texts, "unet", "vae"))
    check_vae(opened, family)
    return assemble(opened, family, plan(opened))


def assemble(opened: Opened, family: Family, plan: Plan) -> Parts:
    """Build every network and check that they fit one another.

    Raises:
        CheckpointError: they do not, or a tensor is missing, too many or of another shape.
    """
    plan = in_few_steps(opened, plan)
    vae = _vae(opened.pieces["vae"], plan.scale)
    network = opened.pieces[family.network].changed(**plan.network).build()
    assert isinstance(network, UNet | MMDiT)
    schedule = read_scheduler(plan.scheduler)
    rows, columns = opened.size or (plan.size, plan.size)
    defaults = Defaults(
        sampler=schedule.sampler, spacing=schedule.spacing,
        rules=replace(schedule.rules, tables=plan.tables or family.name), options=schedule.sampler_options,
        spacing_options=schedule.spacing_options, steps=plan.steps, guidance_scale=plan.guidance_scale,
        width=columns * vae.config.factor, height=rows * vae.config.factor,
    )  # fmt: skip
    files = {part: opened.pieces[part].files for part in (*(use.part for use in plan.uses), family.network, "vae")}
    return Parts(
        identity=Identity(
            family.name, opened.layout, schedule.parameterisation.name, opened.evidence + plan.evidence, files,
            plan.variant,
        ),
        towers=tuple(_tower(opened, use) for use in plan.uses),
        unet=network, vae=vae, process=schedule.process, parameterisation=schedule.parameterisation,
        defaults=own_defaults(defaults, opened.own.get("defaults", {})), join=plan.join, zero_empty=plan.zero_empty,
        sizes=plan.sizes, augmentation=plan.augmentation, image_encoder=plan.image_encoder and plan.image_encoder(),
    )  # fmt: skip


TOLD_SCALE = 8.0  # of networks that are told the guidance scale: the model card of LCM_Dreamshaper_v7


def in_few_steps(opened: Opened, plan: Plan) -> Plan:
    """The plan of a model that was distilled, where it is one; its folder's own scheduler stays."""
    found = distilled(opened)
    if found is None:
        return plan
    evidence, scheduler = list(plan.evidence), dict(plan.scheduler)
    alone = opened.scheduler is None or opened.file is not None
    if alone and "beta_start" in scheduler:  # those of rectified flow are drawn as their family is
        scheduler |= found.scheduler
    if scheduler.get("prediction_type") != plan.scheduler.get("prediction_type"):
        evidence = [pair for pair in evidence if not pair[0].startswith("prediction ")]
        evidence.append((f"prediction {scheduler['prediction_type']}", found.why))
    network = opened.pieces[next(part for part in ("unet", "transformer") if part in opened.pieces)].config
    told = getattr(network, "guidance_width", 0) > 0
    how = "told the guidance scale" if told else "without guidance"
    evidence.append((f"distilled: {found.way.title}, {found.steps} steps, {how}", found.why))
    return replace(
        plan, scheduler=scheduler, evidence=tuple(evidence), steps=found.steps, size=found.way.size or plan.size,
        guidance_scale=TOLD_SCALE if told else 1.0,
    )  # fmt: skip


def _vae(piece: Piece, scale: dict[str, Any]) -> Autoencoder:
    vae = (piece.changed(**scale) if piece.by_shape else piece).build()
    assert isinstance(vae, Autoencoder)
    return vae


def _tower(opened: Opened, use: Use) -> Tower:
    module = opened.pieces[use.part].build()
    folder = opened.tokenizers.get(use.part)
    if isinstance(module, T5Encoder):
        t5 = T5Tokenizer.published() if folder is None else T5Tokenizer.read(folder)
        _check_ids(t5.vocab_size, module.config.vocab_size)
        return Tower(use.part, t5, module, use.rule(t5.eos))
    assert isinstance(module, ClipText)
    length = module.config.positions
    if folder is None:
        clip = ClipTokenizer.published(pad=use.pad, max_length=length)
    else:
        clip = ClipTokenizer.from_folder(folder, max_length=length)
    _check_ids(clip.vocab_size, module.config.vocab_size)
    return Tower(use.part, clip, module, use.rule(clip.eos))


def _check_ids(ids: int, rows: int) -> None:
    if ids > rows:
        raise CheckpointError(f"the tokenizer has {ids} ids, the text encoder only {rows}")


def check_widths(what: str, found: int, expected: int) -> None:
    """Refuse text encoders that do not fit the denoising network.

    Raises:
        CheckpointError: with both widths.
    """
    if found != expected:
        raise CheckpointError(f"{what} is {found} wide but the denoising network expects {expected}")


def check_vae(opened: Opened, family: Family) -> None:
    """Refuse a VAE that does not fit a U-Net.

    Raises:
        CheckpointError: other latents, or latents that are shifted, which no model with a U-Net has.
    """
    vae, unet = opened.pieces["vae"].config, opened.pieces["unet"].config
    if vae.latent_channels != unet.out_channels:
        raise CheckpointError(
            f"the U-Net draws {unet.out_channels} channels of latents, the VAE has {vae.latent_channels}; "
            "they are of different families"
        )
    if vae.shift_factor:
        raise CheckpointError(f"the VAE has shift_factor {vae.shift_factor}; {family.title} does not shift its latents")


def variant_of(unet: UNetConfig, latents: int) -> tuple[str, tuple[Evidence, ...]]:
    """What a U-Net wants beside noise and prompt, and the evidence.

    Raises:
        CheckpointError: a number of channels that no published model has.
    """
    if unet.vector == "class_embedding":
        return "unclip", (("variant unclip", f"the U-Net is conditioned on a picture of {unet.vector_width} numbers"),)
    more = unet.in_channels - latents
    known = BESIDE_LATENTS | {latents: "pix2pix", latents + 1: "inpaint"}
    if more not in known:
        raise CheckpointError(
            f"the U-Net takes {unet.in_channels} channels for latents of {latents}; known are {latents}, "
            f"{latents + 1} (depth), {latents + 3} (x4 upscaler), {2 * latents} (instruct-pix2pix) and "
            f"{2 * latents + 1} (inpainting)"
        )
    if not known[more]:
        return "", ()
    return known[more], ((f"variant {known[more]}", f"the U-Net takes {unet.in_channels} channels"),)
