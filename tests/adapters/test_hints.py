"""What the names of distilled adapters tell."""

from pathlib import Path

import pytest

from reverie.adapters.hints import KINDS, hint_for
from reverie.diffusion.spacing import SPACINGS
from reverie.sampling.registry import load_all

PUBLISHED = [
    ("models--latent-consistency--lcm-lora-sdv1-5/snapshots/a/pytorch_lora_weights.safetensors", "LCM", "lcm", 4),
    ("lcm-lora-sdxl.safetensors", "LCM", "lcm", 4),
    ("Hyper-SD15-8steps-lora.safetensors", "Hyper-SD", "ddim", 8),
    ("Hyper-SDXL-1step-lora.safetensors", "Hyper-SD", "tcd", 1),
    ("Hyper-SDXL-12steps-CFG-lora.safetensors", "Hyper-SD with guidance", "ddim", 12),
    ("sdxl_lightning_4step_lora.safetensors", "SDXL-Lightning", "euler", 4),
    ("dmd2_sdxl_4step_lora.safetensors", "DMD2", "lcm", 4),
    ("pcm_sd15_smallcfg_2step_converted.safetensors", "PCM", "ddim", 2),
    ("models--h1t--TCD-SD15-LoRA/snapshots/b/pytorch_lora_weights.safetensors", "TCD", "tcd", 4),
    ("models--jasperai--flash-sdxl/snapshots/b/pytorch_lora_weights.safetensors", "Flash Diffusion", "lcm", 4),
    ("sdxl-turbo-lora.safetensors", "Turbo", "euler_a", 4),
]


@pytest.mark.parametrize(("path", "kind", "sampler", "steps"), PUBLISHED)
def test_published(path: str, kind: str, sampler: str, steps: int) -> None:
    hint = hint_for(Path("loras") / path, {})
    assert hint is not None
    assert (hint.kind, hint.sampler, hint.steps) == (kind, sampler, steps)
    assert hint.why in hint.line()


@pytest.mark.parametrize("name", ["turbolence", "falcm", "my style 4 steps", "flashlight", "hypersthene", "tcdx"])
def test_others(name: str) -> None:
    assert hint_for(Path(f"{name}.safetensors"), {"ss_tag_frequency": "lcm turbo"}) is None


def test_titles_tell() -> None:
    hint = hint_for(Path("a.safetensors"), {"modelspec.title": "My LCM LoRA"})
    assert hint is not None
    assert hint.why == "modelspec.title has 'lcm'"


def test_samplers_and_spacings_exist() -> None:
    samplers = load_all()
    for _, hint in KINDS:
        assert hint.sampler in samplers
        assert hint.spacing in SPACINGS
