"""Decoding by a tiny autoencoder (TAESD) instead of the model's own: found in the library, or named."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from reverie.engine.hashes import hash_paths
from reverie.engine.library import Library
from reverie.engine.preview import TinyPreview
from reverie.engine.request import Request
from reverie.errors import RequestError
from reverie.nets.seamless import seamless

if TYPE_CHECKING:
    from reverie.engine.bundle import Model

# madebyollin's names, by family: SD 2 has the latents of SD 1.
NAMES = {"sd1": "taesd", "sd2": "taesd", "sdxl": "taesdxl", "sd3": "taesd3"}
FACTOR = 8  # pixels a latent, of all that are published
WEIGHTS = "diffusion_pytorch_model.safetensors"


def decode(model: "Model", latents: Tensor, request: Request) -> Tensor:
    """Scaled latents -> pixels `(B, 3, H, W)` in [0, 1], by the decoder that a resolved request names.

    Raises:
        RequestError: no such decoder, or one for other latents.
        CheckpointError: not a tiny decoder, or broken.
    """
    if request.decoder == "full":
        return model.decode(latents, request)
    path, channels = path_of(model, request.decoder), model.parts.vae.config.latent_channels
    decoder = model.opened.get("tiny decoder", path, lambda p: TinyPreview(p, channels, model.device))
    if request.seamless == "none":
        return decoder(latents)
    wrapping = copy.copy(decoder)
    wrapping.decoder = seamless(decoder.decoder, request.seamless)
    return wrapping(latents)


def used(model: "Model", request: Request) -> dict[str, str]:
    """SHA-256 of the tiny decoder that a resolved request names, if any, by kind and name."""
    if request.decoder == "full":
        return {}
    path = path_of(model, request.decoder)
    return {f"decoder: {path.stem if path.name != WEIGHTS else path.parent.name}": hash_paths([path])}


def path_of(model: "Model", name: str) -> Path:
    """The file of a tiny decoder: `tiny` is the one of the model's family in the library.

    Raises:
        RequestError: there is none.
    """
    if model.parts.vae.config.factor != FACTOR:
        raise RequestError(
            f"decoder is {name!r}, but tiny decoders make {FACTOR} pixels of a latent and this model's latents have "
            f"{model.parts.vae.config.factor}; leave it out"
        )
    path = found(model) if name == "tiny" else Path(name).expanduser()
    if path is None:
        family = NAMES.get(model.parts.identity.family, "taesd")
        raise RequestError(
            f"no {family}_decoder.safetensors in a folder vae_approx of the library or around the model; put it there, "
            f"pull madebyollin/{family} from the hub, or give its file: decoder=FILE"
        )
    if not path.is_file():
        raise RequestError(f"decoder is {name!r}: expected full, tiny, or the file of a tiny decoder")
    return path


def found(model: "Model") -> Path | None:
    """The tiny decoder of the model's family, if it is at hand."""
    name = NAMES.get(model.parts.identity.family)
    if name is None or model.parts.vae.config.factor != FACTOR:
        return None
    library = Library.of_environment()
    inside = library.named_for("tiny decoder", model.source)
    files = (folder / f"{name}_decoder{ending}" for folder in inside for ending in (".safetensors", ".pth"))
    snapshots = sorted(library.hub.glob(f"models--madebyollin--{name}/snapshots/*/{WEIGHTS}"))
    return next((path for path in (*files, *snapshots) if path.is_file()), None)
