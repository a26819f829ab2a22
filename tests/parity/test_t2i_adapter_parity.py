"""T2I-Adapters against diffusers: same folder or file, same picture, same latents.

Tolerance 1e-3 on latents of up to 30 after four guided steps, 1e-5 of
the largest number for the network alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from reverie.adapters.t2i_adapter import FeatureControl, adapted, features
from reverie.adapters.t2i_adapter_file import open_t2i_adapter
from reverie.families.base import Parts
from reverie.nets.t2i_adapter import T2IAdapter
from reverie.nets.unet import UNet
from tests import tiny
from tests.adapters import driving, sketched
from tests.parity.test_nets import RELATIVE, difference

TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("t2i")


def opened(root: Path, family: str, adapter: Any) -> tuple[Any, Parts]:
    folder = tiny.model(root, family, merges_kept=500)
    pipeline = "StableDiffusionXLAdapterPipeline" if family == "ssd-1b" else "StableDiffusionAdapterPipeline"
    return driving.oracle(folder, pipeline, adapter=adapter), driving.parts_of(folder)


def picture(channels: int, seed: int = 0) -> Tensor:
    return torch.rand(1, channels, 48, 32, generator=torch.Generator().manual_seed(seed))


def ours(
    root: Path, adapter: Any, parts: Parts, seen: Tensor, name: str = "adapter", **settings: Any
) -> FeatureControl:
    """Our features of a picture, from the folder that diffusers writes."""
    adapter.save_pretrained(root / name)
    network = open_t2i_adapter(root / name, parts)
    assert isinstance(network, T2IAdapter)
    assert isinstance(parts.unet, UNet)
    return FeatureControl(features(network, seen, parts.unet.config), **settings)


def same(parts: Parts, controls: Sequence[FeatureControl], want: Tensor) -> bool:
    """Equal, and not because the adapter does nothing."""
    conditions = driving.embeddings(parts)[1]
    without = driving.ours(parts, conditions)
    assert (without - want).abs().max() > 100 * TOLERANCE
    got = driving.ours(parts, conditions, lambda predict, clock: adapted(predict, controls, clock))
    return bool((got - want).abs().max() < TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "channels", "family", "widths"),
    [
        ("full_adapter", 3, "sd1", [32, 64]),  # its last level has no attention
        ("full_adapter", 1, "tiny-sd", None),
        ("light_adapter", 3, "tiny-sd", None),
        ("full_adapter_xl", 3, "ssd-1b", None),  # its first level has no attention; the last map is the middle's
    ],
)
def test_picture(root: Path, kind: str, channels: int, family: str, widths: list[int] | None) -> None:
    adapter = sketched.adapter(kind, channels, widths=widths)
    pipe, parts = opened(root, family, adapter)
    given, _ = driving.embeddings(parts)
    want = driving.reference(pipe, given, image=picture(channels), adapter_conditioning_scale=0.8)
    control = ours(root, adapter, parts, picture(channels), f"{kind} {family}", weight=0.8)
    assert same(parts, [control], want)


def test_half_of_the_steps(root: Path) -> None:
    adapter = sketched.adapter("full_adapter_xl")
    pipe, parts = opened(root, "ssd-1b", adapter)
    given, _ = driving.embeddings(parts)
    want = driving.reference(pipe, given, image=picture(3), adapter_conditioning_factor=0.5)
    assert same(parts, [ours(root, adapter, parts, picture(3), "half", end=0.5)], want)


def test_two_at_once(root: Path) -> None:
    adapters = [sketched.adapter("full_adapter", seed=1), sketched.adapter("light_adapter", seed=2)]
    pipe, parts = opened(root, "tiny-sd", tiny.diffusers.MultiAdapter(adapters))
    seen, weights = [picture(3, 1), picture(3, 2)], [0.5, 0.9]
    given, _ = driving.embeddings(parts)
    want = driving.reference(pipe, given, image=seen, adapter_conditioning_scale=weights)
    controls = [
        ours(root, adapter, parts, each, f"both {n}", weight=weights[n])
        for n, (adapter, each) in enumerate(zip(adapters, seen, strict=True))
    ]
    assert same(parts, controls, want)


@pytest.mark.parametrize("layout", ["diffusers", "TencentARC"])
@pytest.mark.parametrize("kind", ["full_adapter", "light_adapter", "full_adapter_xl"])
@torch.no_grad()
def test_single_file(root: Path, kind: str, layout: str) -> None:
    """At sides that do not halve evenly."""
    reference = sketched.adapter(kind)
    parts = driving.parts_of(tiny.model(root, sketched.FAMILY[kind], merges_kept=500))
    path = root / f"{kind}-{layout}.safetensors"
    tensors = reference.state_dict()
    save_file(sketched.original(tensors) if layout == "TencentARC" else tensors, path)
    network = open_t2i_adapter(path, parts)
    seen = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    for got, want in zip(network(seen), reference(seen), strict=True):
        assert difference(got, want) < RELATIVE


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_at_the_size_of_stable_diffusion_1_5(root: Path) -> None:
    """Every level and place of the published U-Net; two steps of 16 x 16 latents."""
    folder = tiny.model(root, "sd1", merges_kept=500)
    unet, parts = driving.at_true_size(folder)
    torch.manual_seed(1)
    adapter = tiny.diffusers.T2IAdapter(downscale_factor=4).eval()  # the tiny VAE makes 4 pixels a latent
    pipe = driving.oracle(folder, "StableDiffusionAdapterPipeline", unet=unet, adapter=adapter)
    settings: dict[str, Any] = {"size": (64, 64), "steps": 2}
    seen = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    given, conditions = driving.embeddings(parts)
    want = driving.reference(pipe, given, image=seen, **settings)
    controls = [ours(root, adapter, parts, seen, "large")]
    got = driving.ours(parts, conditions, lambda predict, clock: adapted(predict, controls, clock), **settings)
    assert (got - want).abs().max() < TOLERANCE * want.abs().max()
    assert (driving.ours(parts, conditions, **settings) - want).abs().max() > 10 * TOLERANCE * want.abs().max()
