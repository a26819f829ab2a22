"""What every family hands to the engine."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from reverie.diffusion.parameterisation import Parameterisation
from reverie.diffusion.process import Process
from reverie.diffusion.spacing import SPACINGS, SpacingRules
from reverie.errors import CheckpointError, RequestError
from reverie.nets.autoencoder import Autoencoder
from reverie.nets.clip_text import ClipText
from reverie.nets.unet import UNet
from reverie.sampling.registry import load_all
from reverie.text.tokenizer import ClipTokenizer
from reverie.types import Cond, Predict


@dataclass(frozen=True)
class Defaults:
    """What a model draws with where a request does not say.

    Attributes:
        rules: rounding and ends of the spacing, from the model's scheduler config.
        upscaler: a named post-step, or None.
    """

    sampler: str = "pndm"
    spacing: str = "leading"
    rules: SpacingRules = field(default_factory=SpacingRules)
    steps: int = 50
    guidance_scale: float = 7.5
    width: int = 512
    height: int = 512
    upscaler: str | None = None


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
    """

    family: str
    layout: str
    prediction: str
    evidence: tuple[tuple[str, str], ...]
    files: dict[str, tuple[Path, ...]] = field(hash=False)


@dataclass(frozen=True)
class Parts:
    """The networks of a latent diffusion model, mapped, in the precision of their files."""

    identity: Identity
    tokenizer: ClipTokenizer
    text_encoder: ClipText
    unet: UNet
    vae: Autoencoder
    process: Process
    parameterisation: Parameterisation
    defaults: Defaults

    def modules(self) -> dict[str, nn.Module]:
        """The networks by the names of their folders."""
        return {"text_encoder": self.text_encoder, "unet": self.unet, "vae": self.vae}

    def with_prediction(self, parameterisation: Parameterisation) -> "Parts":
        """The same parts, read another way."""
        identity = replace(
            self.identity,
            prediction=parameterisation.name,
            evidence=(*self.identity.evidence, (f"prediction {parameterisation.name}", "asked for")),
        )
        return replace(self, identity=identity, parameterisation=parameterisation)


def preconditioned(
    unet: Callable[[Tensor, Tensor, Tensor], Tensor],
    process: Process,
    parameterisation: Parameterisation,
    dtype: torch.dtype,
    *,
    told: Callable[[float], float] = float,
) -> Predict:
    """The network as `predict(x, sigma, cond) -> x0` (EDM, equation 7). x stays float32, the network has `dtype`.

    Args:
        told: how a timestep is rounded before the network is told.
    """

    def predict(x: Tensor, sigma: float, cond: Cond) -> Tensor:
        k = parameterisation.at(sigma)
        t = told(process.timestep(sigma))
        timesteps = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        answer = unet((k.into * x).to(dtype), timesteps, cond.context)
        return k.skip * x + k.out * answer.float()

    return predict
