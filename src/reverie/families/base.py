"""What every family hands to the engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from reverie.diffusion.parameterisation import Parameterisation
from reverie.diffusion.process import AnyProcess, Process
from reverie.diffusion.spacing import SPACINGS, SpacingRules
from reverie.errors import CheckpointError, RequestError
from reverie.nets.autoencoder import Autoencoder
from reverie.nets.clip_text import ClipText
from reverie.nets.clip_vision import ClipVision
from reverie.nets.mmdit import MMDiT
from reverie.nets.t5 import T5Encoder
from reverie.nets.unet import UNet
from reverie.sampling.registry import load_all
from reverie.text.embed import Encoding, Tokens
from reverie.text.t5_tokenizer import T5Tokenizer
from reverie.text.tokenizer import ClipTokenizer
from reverie.types import Cond, Predict


@dataclass(frozen=True)
class Defaults:
    """What a model draws with where a request does not say.

    Attributes:
        rules: rounding and ends of the spacing, from the model's scheduler config.
        upscaler: a named post-step, or None.
        options: settings of the sampler.
        spacing_options: settings of the spacing.
    """

    sampler: str = "pndm"
    spacing: str = "leading"
    rules: SpacingRules = field(default_factory=SpacingRules)
    steps: int = 50
    guidance_scale: float = 7.5
    width: int = 512
    height: int = 512
    upscaler: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    spacing_options: Mapping[str, float] = field(default_factory=dict)


OWN_DEFAULTS: dict[str, tuple[type, ...]] = {
    "sampler": (str,), "spacing": (str,), "steps": (int,), "guidance_scale": (int, float),
    "width": (int,), "height": (int,), "upscaler": (str,),
}  # fmt: skip


def own_defaults(defaults: Defaults, own: object) -> Defaults:
    """The defaults with those that a model brings in its `reverie.json`.

    Raises:
        CheckpointError: a key that is none, a value of a wrong type, an unknown sampler or spacing.
    """
    if not isinstance(own, dict):
        raise CheckpointError(f"reverie.json: defaults is {own!r}; expected an object")
    for key, value in own.items():
        if key not in OWN_DEFAULTS or type(value) not in OWN_DEFAULTS[key]:
            raise CheckpointError(f"reverie.json: defaults has {key!r}: {value!r}; known are {', '.join(OWN_DEFAULTS)}")
    try:
        load_all().name(own.get("sampler", defaults.sampler))
        SPACINGS.name(own.get("spacing", defaults.spacing))
    except RequestError as error:
        raise CheckpointError(f"reverie.json: {error}") from None
    return replace(defaults, **own)


@dataclass(frozen=True)
class Identity:
    """What a checkpoint is, and the evidence.

    Attributes:
        evidence: pairs of a claim and what in the file supports it.
        files: the weight files, by part.
        variant: what the network wants beside noise and prompt: `inpaint`, `pix2pix`, `depth`, `x4-upscaler`,
            `unclip`; `refiner` of SDXL, which wants a picture to refine; empty where nothing.
    """

    family: str
    layout: str
    prediction: str
    evidence: tuple[tuple[str, str], ...]
    files: dict[str, tuple[Path, ...]] = field(hash=False)
    variant: str = ""


@dataclass(frozen=True)
class Augmentation:
    """Noise on a picture that the denoising network is shown, and whose level it is told.

    Attributes:
        process: how it enters.
        level: the timestep where a request does not say.
        most: the largest that the network knows.
    """

    process: Process
    level: int
    most: int


@dataclass(frozen=True, eq=False)
class ImageEncoder:
    """What makes of a picture the vector that unCLIP's network is told (Ramesh et al. 2022).

    Attributes:
        mean, std: `(1, D)`, of embeddings, by which they are standardised while noise is added.
    """

    module: ClipVision
    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class Sizes:
    """What SDXL is told of a picture's sizes (Podell et al. 2023, section 2.2); the defaults are those of diffusers.

    Pixels; sizes are `(width, height)`, corners `(left, top)`.

    Attributes:
        width, height: of the picture that is drawn.
        original: of the picture before it was scaled for training; that of the picture if None.
        crop: what was cut off on the left and above.
        target: after scaling and cutting; that of the picture if None.
        aesthetic_score: what the refiner is told instead of `target`.
        negative_original, negative_crop, negative_target, negative_aesthetic_score: the same for the negative prompt;
            as for the prompt if None.
    """

    width: int
    height: int
    original: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target: tuple[int, int] | None = None
    aesthetic_score: float = 6.0
    negative_original: tuple[int, int] | None = None
    negative_crop: tuple[int, int] | None = None
    negative_target: tuple[int, int] | None = None
    negative_aesthetic_score: float = 2.5

    def negative(self) -> "Sizes":
        """What the negative prompt is told."""
        return replace(
            self,
            original=self.negative_original or self.original,
            crop=self.crop if self.negative_crop is None else self.negative_crop,
            target=self.negative_target or self.target,
            aesthetic_score=self.negative_aesthetic_score,
        )


EncodeRule: TypeAlias = Callable[[nn.Module, Tokens, int], Encoding]
"""`(text encoder, tokens, layers to leave out) -> what the family takes of it`."""

Join: TypeAlias = Callable[[Sequence[Encoding], Sizes], Cond]
"""What the text encoders said, in their order, and sizes -> what the denoising network is told."""


@dataclass(frozen=True, eq=False)
class Tower:
    """A text encoder and how the family uses it.

    Attributes:
        name: of its folder: `text_encoder`, `text_encoder_2` or `text_encoder_3`.
        encode: `encode(module, tokens, skip)`, skip as "clip skip" less one.
    """

    name: str
    tokenizer: ClipTokenizer | T5Tokenizer
    module: ClipText | T5Encoder
    encode: EncodeRule


@dataclass(frozen=True)
class Parts:
    """The networks of a latent diffusion model, mapped, in the precision of their files.

    Attributes:
        towers: the text encoders.
        unet: the denoising network, a transformer in Stable Diffusion 3.
        join: the family's rule for `condition`.
        zero_empty: an absent negative prompt is zeros, not the encoded empty text (diffusers'
            `force_zeros_for_empty_prompt`).
        sizes: which sizes the network is told, by the fields of a request.
        augmentation: noise on a picture that the network is shown.
        image_encoder: of models that are told what a picture shows (unCLIP).
    """

    identity: Identity
    towers: tuple[Tower, ...]
    unet: UNet | MMDiT
    vae: Autoencoder
    process: AnyProcess
    parameterisation: Parameterisation
    defaults: Defaults
    join: Join
    zero_empty: bool = False
    sizes: tuple[str, ...] = ()
    augmentation: Augmentation | None = None
    image_encoder: ImageEncoder | None = None

    @property
    def text_encoder(self) -> ClipText:
        """The first text encoder; it is CLIP's in every family."""
        module = self.towers[0].module
        assert isinstance(module, ClipText)
        return module

    @property
    def tokenizer(self) -> ClipTokenizer:
        """That of the first text encoder."""
        tokenizer = self.towers[0].tokenizer
        assert isinstance(tokenizer, ClipTokenizer)
        return tokenizer

    @property
    def network(self) -> str:
        """The name of the denoising network's folder."""
        return "unet" if isinstance(self.unet, UNet) else "transformer"

    @property
    def guidance_told(self) -> bool:
        """Whether the denoising network is told the guidance scale instead of being guided (LCM)."""
        return isinstance(self.unet, UNet) and self.unet.config.guidance_width > 0

    def condition(self, encodings: Sequence[Encoding], sizes: Sizes) -> Cond:
        """What the denoising network is told.

        Args:
            encodings: what each of `towers` said of the same prompt, in their order.
            sizes: of the picture; `sizes.negative()` for the negative prompt.

        Raises:
            RequestError: contexts of different lengths.
        """
        return self.join(encodings, sizes)

    def modules(self) -> dict[str, nn.Module]:
        """The networks by the names of their folders."""
        return {tower.name: tower.module for tower in self.towers} | {self.network: self.unet, "vae": self.vae}

    def with_prediction(self, parameterisation: Parameterisation) -> "Parts":
        """The same parts, read another way.

        Raises:
            RequestError: the model's noise process leaves no choice.
        """
        if not isinstance(self.process, Process) or parameterisation.name == "flow_prediction":
            raise RequestError(
                f"this {self.identity.family} model predicts {self.parameterisation.name} and cannot be read as "
                f"{parameterisation.name}; leave the prediction type out"
            )
        identity = replace(
            self.identity,
            prediction=parameterisation.name,
            evidence=(*self.identity.evidence, (f"prediction {parameterisation.name}", "asked for")),
        )
        return replace(self, identity=identity, parameterisation=parameterisation)


def preconditioned(
    unet: Callable[..., Tensor],
    process: AnyProcess,
    parameterisation: Parameterisation,
    dtype: torch.dtype,
    *,
    told: Callable[[float], float] = float,
    guidance: float | None = None,
) -> Predict:
    """The network as `predict(x, sigma, cond) -> x0` (EDM, equation 7). x stays float32, the network has `dtype`.

    Args:
        unet: `(x, timesteps, context)`, and by name `vector` and `taps` where the condition has them. A condition's
            channels are concatenated to `x` after it is scaled.
        told: how a timestep is rounded before the network is told.
        guidance: the guidance scale that a distilled network is told (`Parts.guidance_told`).
    """

    def predict(x: Tensor, sigma: float, cond: Cond) -> Tensor:
        k = parameterisation.at(sigma)
        t = told(process.timestep(sigma))
        timesteps = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        seen = k.into * x if cond.channels is None else torch.cat([k.into * x, cond.channels], dim=1)
        scales = None if guidance is None else torch.full((len(x),), guidance, device=x.device)
        named = {"vector": cond.vector, "taps": cond.taps, "guidance": scales}
        present = {name: value for name, value in named.items() if value is not None}
        answer = unet(seen.to(dtype), timesteps, cond.context, **present)
        return k.skip * x + k.out * answer.float()

    return predict
