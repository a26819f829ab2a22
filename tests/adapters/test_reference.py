"""Reference-only against the same done to diffusers' U-Net, and its edges.

The oracle is written here from the description: an attention processor that keeps what self-attention is shown of the
reference, and shows it to the drawing's; hooks that give features mean and deviation of the reference's. Tolerance
1e-3 on latents of up to 30 after four guided steps.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reverie.adapters.reference import Reference, feature_steps, referenced, self_attention
from reverie.errors import RequestError
from reverie.families.base import Parts
from reverie.nets.unet import UNet, UNetConfig
from reverie.sampling.guidance import Clock
from reverie.types import Cond, Predict
from tests import tiny
from tests.adapters import driving

TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("reference"), "sd1", merges_kept=500)


class Looking:
    """A processor of diffusers for one self-attention layer."""

    def __init__(self, usual: Any, fidelity: float) -> None:
        self.usual, self.fidelity = usual, fidelity
        self.bank: Tensor | None = None
        self.writing = True

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **kwargs: Any) -> Tensor:
        plain: Tensor = self.usual(attn, hidden_states, None, **kwargs)
        if self.writing:
            self.bank = hidden_states
            return plain
        assert self.bank is not None
        seen = torch.cat([hidden_states, self.bank], dim=1)
        both: Tensor = self.usual(attn, hidden_states, seen, **kwargs)
        negative = self.fidelity * plain[:1] + (1 - self.fidelity) * both[:1]
        return torch.cat([negative, both[1:]])


class Adapting:
    """A hook of torch for one step of diffusers' U-Net: what its last module says."""

    def __init__(self, fidelity: float) -> None:
        self.fidelity = fidelity
        self.kept: tuple[Tensor, Tensor] | None = None
        self.writing = True

    def __call__(self, module: Any, inputs: Any, output: Any) -> Any:
        features = output[0] if isinstance(output, tuple) else output
        mean, std = features.mean((2, 3), keepdim=True), features.std((2, 3), keepdim=True, correction=0)
        if self.writing:
            self.kept = mean, std
            return output
        assert self.kept is not None
        adapted = (features - mean) / std * self.kept[1] + self.kept[0]
        negative = self.fidelity * features[:1] + (1 - self.fidelity) * adapted[:1]
        adapted = torch.cat([negative, adapted[1:]])
        return (adapted, *output[1:]) if isinstance(output, tuple) else adapted


def by_diffusers(folder: Path, parts: Parts, reference: Reference, fidelity: float) -> Tensor:
    pipe = driving.oracle(folder, "StableDiffusionPipeline", image_encoder=None)
    watching: list[Any] = []
    if reference.attention:
        usual = pipe.unet.attn_processors
        looking = {name: Looking(old, fidelity) for name, old in usual.items() if "attn1" in name}
        pipe.unet.set_attn_processor({**usual, **looking})
        watching += looking.values()
    # of two levels, at weight 1, all but the first one down, which would take part from 2 on
    for step in ("down_blocks.1.resnets.0", "down_blocks.1.resnets.1", "mid_block", "up_blocks.0.resnets.0",
                 "up_blocks.0.resnets.1", "up_blocks.0.resnets.2", "up_blocks.1.attentions.0",
                 "up_blocks.1.attentions.1", "up_blocks.1.attentions.2"):  # fmt: skip
        if reference.adain:
            watching.append(Adapting(fidelity))
            pipe.unet.get_submodule(step).register_forward_hook(watching[-1])
    forward = pipe.unet.forward

    def twice(sample: Tensor, timestep: Tensor, **kwargs: Any) -> Any:
        sigma = pipe.scheduler.sigmas[pipe.scheduler.step_index]
        noised = (reference.latents + sigma * reference.noise) / (sigma**2 + 1) ** 0.5
        for each in watching:
            each.writing = True
        forward(torch.cat([noised] * 2), timestep, **kwargs)
        for each in watching:
            each.writing = False
        return forward(sample, timestep, **kwargs)

    pipe.unet.forward = twice
    return driving.reference(pipe, driving.embeddings(parts)[0])


def drawn(parts: Parts, references: list[Reference], fidelity: float | None = None) -> Tensor:
    def extend(cond: Cond, role: str) -> Cond:
        share = 1.0 if role == "positive" or fidelity is None else 1 - fidelity
        return cond if fidelity is None else replace(cond, control=torch.tensor([share]))

    def wrap(predict: Predict, clock: Clock) -> Predict:
        return referenced(predict, references, parts.unet, parts.process, clock)

    return driving.ours(parts, driving.embeddings(parts)[1], wrap, extend)


def picture(seed: int = 0, size: Any = (12, 8), **settings: Any) -> Reference:
    return Reference(driving.rand(1, 4, *size, seed=20 + seed), driving.rand(1, 4, *size, seed=30 + seed), **settings)


WAYS: dict[str, dict[str, bool]] = {
    "attention": {"attention": True, "adain": False},
    "adain": {"attention": False, "adain": True},
    "both": {"attention": True, "adain": True},
}


@pytest.mark.parametrize(("way", "fidelity"), [("attention", 0.0), ("attention", 1.0), ("adain", 1.0), ("both", 0.5)])
def test_equals_the_same_done_to_diffusers(folder: Path, way: str, fidelity: float) -> None:
    parts, reference = driving.parts_of(folder), picture(**WAYS[way])
    want = by_diffusers(folder, parts, reference, fidelity)
    got = drawn(parts, [reference], fidelity)
    assert (got - want).abs().max() < TOLERANCE
    assert (got - drawn(parts, [])).abs().max() > 20 * TOLERANCE


def test_without_strengths_every_row_sees_all(folder: Path) -> None:
    parts = driving.parts_of(folder)
    assert torch.allclose(drawn(parts, [picture()]), drawn(parts, [picture()], 0.0), atol=1e-5)


def test_rows_that_are_not_controlled_are_as_without(folder: Path) -> None:
    parts = driving.parts_of(folder)
    predict = driving.predict_of(parts)
    clock = Clock((10.0, 1.0, 0.0))
    looking = referenced(predict, [picture()], parts.unet, parts.process, clock)
    x, context = driving.rand(2, 4, 12, 8), driving.rand(2, 7, 32, seed=1)
    plain = predict(x, 10.0, Cond(context))
    got = looking(x, 10.0, Cond(context, control=torch.tensor([0.0, 1.0])))
    assert torch.allclose(got[0], plain[0], atol=1e-5)
    assert (got[1] - plain[1]).abs().max() > 1e-3


def test_two_of_other_sizes(folder: Path) -> None:
    """Tokens are looked at, whatever their number; the order of references makes no difference."""
    parts = driving.parts_of(folder)
    small, wide = picture(1, (6, 6)), picture(2, (4, 20))
    one, other = drawn(parts, [small, wide]), drawn(parts, [wide, small])
    assert (one - other).abs().max() < TOLERANCE
    assert (one - drawn(parts, [small])).abs().max() > 5 * TOLERANCE


def test_steps_and_weight(folder: Path) -> None:
    parts = driving.parts_of(folder)
    without = drawn(parts, [])
    assert torch.equal(drawn(parts, [picture(start=0.5, end=0.5)]), without)
    assert torch.equal(drawn(parts, [picture(weight=0.0, adain=True)]), without)
    half, whole = drawn(parts, [picture(weight=0.5)]), drawn(parts, [picture()])
    assert not torch.equal(half, whole)
    assert not torch.equal(half, without)


def test_the_widest_layers_come_first(folder: Path) -> None:
    parts = driving.parts_of(folder)
    assert isinstance(parts.unet, UNet)
    paths = self_attention(parts.unet)
    assert paths[0].startswith("mid_block")  # 64 wide, all others 32
    assert len(paths) == 6


def test_steps_near_the_middle_come_first(folder: Path) -> None:
    with torch.device("meta"):
        steps = feature_steps(UNet(UNetConfig()))
    assert steps["mid_block"] == 0
    assert [steps[f"down_blocks.{n}.1"] for n in range(4)] == [2, 1.5, 1, 0.5]
    assert [steps[f"up_blocks.{n}.2"] for n in range(4)] == [0, 0.5, 1, 1.5]
    assert len(steps) == 1 + 4 * 2 + 4 * 3


def test_a_transformer_has_no_self_attention_of_its_own(folder: Path) -> None:
    parts = driving.parts_of(folder)
    with pytest.raises(RequestError, match="self-attention of a U-Net"):
        referenced(driving.predict_of(parts), [picture()], torch.nn.Linear(2, 2), parts.process, Clock((1.0, 0.0)))


def test_beside_channels_it_must_be_as_large(folder: Path) -> None:
    parts = driving.parts_of(folder)
    looking = referenced(
        driving.predict_of(parts), [picture(size=(4, 4))], parts.unet, parts.process, Clock((10.0, 1.0, 0.0))
    )
    cond = Cond(driving.rand(1, 7, 32), channels=torch.zeros(1, 5, 12, 8))
    with pytest.raises(RequestError, match="as large as the picture"):
        looking(driving.rand(1, 4, 12, 8), 10.0, cond)
