"""The checkpoints that every program opens: random weights, true sizes or tiny ones, numbers of float16."""

import math
import shutil
import zlib
from importlib import import_module
from pathlib import Path
from typing import Any

from open_models import parts, write_checkpoint

BLOCK = 1_048_573  # random numbers that are repeated: a prime, so that no two rows of a weight are the same


def write(model: str, folder: Path, *, tiny: bool) -> None:
    """A single file (not of SDXL, which would take the space twice) and a diffusers folder, if they are not there."""
    made, file = folder / model, folder / f"{model}.safetensors"
    if (made / "model_index.json").exists():
        return
    shutil.rmtree(made, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    torch = import_module("torch")
    noise = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    family, networks = parts(model)
    if tiny:
        networks = {part: (make, small(part, config)) for part, (make, config) in networks.items()}
    write_checkpoint(family, networks, file, made, lambda name, shape: numbers(noise, name, shape))
    if model != "sd15":
        file.unlink()


def numbers(noise: Any, name: str, shape: tuple[int, ...]) -> Any:
    """Weights that keep activations near 1, so that rounding weighs as much as in a trained network.

    A weight has the standard deviation 1/sqrt(inputs), the scale of a norm is near 1, a bias near 0. No two weights
    are the same, which OpenVINO would keep once.
    """
    count, inputs = math.prod(shape), math.prod(shape[1:])
    start = zlib.crc32(name.encode()) % len(noise)
    flat = noise.repeat(-(-(start + count) // len(noise)))[start : start + count].reshape(shape)
    if len(shape) > 1:
        return (flat * (0.02 if name.endswith("embedding.weight") else inputs**-0.5)).half()
    return (flat * 0.02 + float("norm" in name and name.endswith("weight"))).half()


def small(part: str, config: Any) -> Any:
    """The same kind of network, tiny: as many levels, some channels each."""
    replace = import_module("dataclasses").replace
    if part.startswith("text_encoder"):
        projection = {"projection_width": 64} if config.projection_width else {}
        return replace(config, width=64, inner_width=64, layers=2, heads=1, **projection)
    if part == "vae":
        return replace(config, block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    levels = len(config.block_out_channels)
    wide = bool(config.vector)
    own: dict[str, Any] = {"vector_width": 64 + 6 * 256, "context_width": 128} if wide else {"context_width": 64}
    if wide:
        own |= {"attention": (0, 1, 2), "mid_attention": 2, "heads": (1,) * levels}
    return replace(config, block_out_channels=(64,) * levels, layers_per_block=1, **own)


def work(size: int, model: str, *, tiny: bool) -> dict[str, float]:
    """TFLOP of one step with guidance (batch 2) and of decoding one picture of `size`, counted on the meta device."""
    torch = import_module("torch")
    counter = import_module("torch.utils.flop_counter").FlopCounterMode
    _, networks = parts(model)
    if tiny:
        networks = {part: (make, small(part, config)) for part, (make, config) in networks.items()}
    (make_unet, unet), (make_vae, vae) = networks["unet"], networks["vae"]
    side = size // vae.factor
    with torch.device("meta"), torch.no_grad():
        given = [torch.empty(2, unet.in_channels, side, side), torch.empty(2), torch.empty(2, 77, unet.context_width)]
        told = {"vector": torch.empty(2, unet.vector_width)} if unet.vector else {}
        with counter(display=False) as step:
            make_unet(unet).eval()(*given, **told)
        with counter(display=False) as decode:
            make_vae(vae).eval().decode(torch.empty(1, vae.latent_channels, side, side))
    return {"step": step.get_total_flops() / 1e12, "decode": decode.get_total_flops() / 1e12}
