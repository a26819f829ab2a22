"""What some networks are shown or told beside noise and words: a depth map, a small picture."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from reverie.engine.canvas import Canvas, resized
from reverie.engine.noises import Noises
from reverie.engine.plan import Pass
from reverie.engine.request import Request
from reverie.engine.sources import read_picture, to_tensor
from reverie.errors import RequestError
from reverie.nets.blocks import timestep_embedding
from reverie.nets.clip_vision import clip_pixels

if TYPE_CHECKING:
    from reverie.engine.bundle import Model

SHOWN = {"x4-upscaler", "unclip"}  # variants that are shown `image`; the others draw it over


def shown(run: Pass, request: Request, canvas: Canvas | None, noise: Noises) -> Tensor | None:
    """What the network of a pass sees beside `x`: `(1 or B, C', h, w)`; None of most.

    Args:
        noise: is drawn from by models that see a picture under noise, ahead of the first sample.

    Raises:
        RequestError: a picture that cannot be read, or a depth map without depth.
    """
    factor = run.model.parts.vae.config.factor
    size = (run.width // factor, run.height // factor)
    if run.model.parts.identity.variant == "depth":
        return depth_map(request, canvas, size).to(run.model.device)
    if run.model.parts.identity.variant == "x4-upscaler":
        return small_picture(run, request, size, noise)
    return None


def told(run: Pass, request: Request, noise: Noises) -> tuple[Tensor, Tensor] | None:
    """What the network is told beside the prompt, and beside the negative prompt, `(1 or B, V)`; None of most.

    Raises:
        RequestError: a picture that cannot be read.
    """
    if run.model.parts.identity.variant == "x4-upscaler":
        assert request.noise_level is not None
        level = torch.tensor([[float(request.noise_level)]], device=run.model.device)
        return level, level
    if run.model.parts.identity.variant == "unclip":
        vector = embedded(run.model, request, noise)
        return vector, torch.zeros_like(vector)
    return None


def depth_map(request: Request, canvas: Canvas | None, size: tuple[int, int]) -> Tensor:
    """The depth of what is drawn, from -1 (far) to 1 (near): `(1, 1, h, w)` at the size `(w, h)`.

    Source: diffusers' StableDiffusionDepth2ImgPipeline (bicubic, stretched to the whole range).
    """
    assert request.depth is not None
    depth = to_tensor(read_picture(request.depth, "depth").convert("L"))
    if canvas is not None:
        depth = canvas.placed(depth)
    small = F.interpolate(depth, size[::-1], mode="bicubic", align_corners=False)
    low, high = small.min(), small.max()
    if low == high:
        raise RequestError(f"depth {request.depth[:100]} is of one grey where the picture is drawn; it shows no depth")
    return 2 * (small - low) / (high - low) - 1


def small_picture(run: Pass, request: Request, size: tuple[int, int], noise: Noises) -> Tensor:
    """The picture that is to be enlarged, a pixel a latent, under noise: `(B, 3, h, w)`.

    Source: Ho et al. 2022, Cascaded Diffusion Models, section 4.2; diffusers' StableDiffusionUpscalePipeline.
    """
    augmentation = run.model.parts.augmentation
    assert augmentation is not None
    assert request.image is not None
    assert request.noise_level is not None
    picture = 2 * resized(to_tensor(read_picture(request.image).convert("RGB")), size) - 1
    sigma = float(augmentation.process.sigmas[request.noise_level])
    process, fresh = augmentation.process, noise.before(picture.shape[1:])
    return process.noised(picture.to(fresh), fresh, fresh.new_tensor(sigma)) / process.scale(sigma)


@torch.no_grad()
def embedded(model: "Model", request: Request, noise: Noises) -> Tensor:
    """What a picture shows, under noise, and how much: `(B, 2 D)`.

    Source: Ramesh et al. 2022, section 2; Stability's CLIPEmbeddingNoiseAugmentation.
    """
    encoder, augmentation = model.parts.image_encoder, model.parts.augmentation
    assert encoder is not None
    assert augmentation is not None
    assert request.image is not None
    assert request.noise_level is not None
    module = model.ready("image_encoder", encoder.module)
    pixels = clip_pixels(read_picture(request.image), module.config.image_size)
    mean, std = encoder.mean.to(model.device), encoder.std.to(model.device)
    standard = (module(pixels.to(model.device)).float() - mean) / std
    process, fresh = augmentation.process, noise.before(standard.shape[1:])
    sigma = float(process.sigmas[request.noise_level])
    noised = process.noised(standard, fresh, fresh.new_tensor(sigma)) / process.scale(sigma)
    level = torch.full((len(noised),), float(request.noise_level), device=model.device)
    return torch.cat([noised * std + mean, timestep_embedding(level, mean.shape[1])], dim=1)
