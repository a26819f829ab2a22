"""Feature caching against the same done to diffusers' networks, written from the papers with hooks.

DeepCache (Ma et al. 2023, equations 4 and 5): on the evaluations that are not whole, what comes up to meet a map of the
way down is that of the last whole evaluation. The oracle runs the whole of diffusers' U-Net every time and puts the
features of the last whole evaluation in the place of its own. First-block cache (ParaAttention): the same with what the
blocks behind the first add to the tokens; diffusers' own is not for its SD 3 transformer, which is no CacheMixin.

Tolerance 1e-4 of [0, 1] on pixels after guided steps, and 1e-4 of the largest number for single answers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reverie
from reverie.engine.caching import cached
from reverie.engine.thrift import Cache
from reverie.types import Asked, Cond
from tests import tiny
from tests.parity.test_nets import difference
from tests.parity.test_sd3_nets import CONFIGS, inputs, pair

CLOSE = 1e-4
STEPS = 7


@pytest.fixture(scope="module")
def pipe_and_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    root = tmp_path_factory.mktemp("caching")
    scheduler = tiny.scheduler_of(tiny.SCHEDULER | {"_class_name": "DDIMScheduler", "clip_sample": False})
    pipe = tiny.pipeline(root, scheduler, merges_kept=500)
    pipe.save_pretrained(root / "model")
    return pipe, root / "model"


def widths(unet: Any) -> list[int]:
    """Channels of every map of the way down."""
    found: list[int] = [unet.config.block_out_channels[0]]
    for block in unet.down_blocks:
        found += [resnet.out_channels for resnet in block.resnets]
        found += [down.out_channels for down in block.downsamplers or ()]
    return found


@contextmanager
def deep_cached(unet: Any, branch: int, whole: set[int]) -> Iterator[None]:
    """diffusers' U-Net that takes the deep features of its last whole evaluation on all others."""
    maps = widths(unet)
    takers = [resnet for block in unet.up_blocks for resnet in block.resnets]
    evaluation, kept = -1, torch.empty(0)

    def begins(*_: Any) -> None:
        nonlocal evaluation
        evaluation += 1

    def meets(module: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal kept
        deep = given[0][:, : -maps[branch]]
        if evaluation in whole:
            kept = deep
            return given
        return (torch.cat([kept, given[0][:, -maps[branch] :]], dim=1), *given[1:])

    handles = [
        unet.register_forward_pre_hook(begins),
        takers[len(maps) - 1 - branch].register_forward_pre_hook(meets),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("branch", range(5))
def test_pictures_of_every_branch(pipe_and_folder: tuple[Any, Path], branch: int) -> None:
    pipe, folder = pipe_and_folder
    words: dict[str, Any] = {"negative_prompt": "blurry", "guidance_scale": 4.0}
    with deep_cached(pipe.unet, branch, {0, 3, 6}):
        want = pipe(
            "a red apple", num_inference_steps=STEPS, generator=torch.Generator().manual_seed(11), output_type="pt",
            height=64, width=64, **words,
        ).images.permute(0, 2, 3, 1)  # fmt: skip
    model = reverie.load(folder, device="cpu", precision="float32")
    fields = words | {"steps": STEPS, "seed": 11, "width": want.shape[2], "height": want.shape[1]}
    got = model.generate("a red apple", cache={"interval": 3, "branch": branch}, **fields)
    assert (got.pixels - want).abs().max() < CLOSE
    assert not torch.equal(got.latents, model.generate("a red apple", **fields).latents)


class FirstBlock:
    """diffusers' transformer with a first-block cache; one decision for a batch of one picture."""

    def __init__(self, network: Any, threshold: float) -> None:
        self.threshold = threshold
        self.head: Tensor | None = None
        self.rest = self.seen = torch.empty(0)
        self.skipping = False
        self.computed = 0
        self.handles = [
            network.transformer_blocks[0].register_forward_hook(self.first, with_kwargs=True),
            network.transformer_blocks[-1].register_forward_hook(self.last),
        ]

    def first(self, module: Any, args: Any, kwargs: dict[str, Any], answer: tuple[Tensor, Tensor]) -> None:
        self.seen = answer[1]
        head = self.seen - kwargs["hidden_states"]
        change = None if self.head is None else (head - self.head).abs().mean() / self.head.abs().mean()
        self.skipping = change is not None and float(change) <= self.threshold
        if not self.skipping:
            self.head, self.computed = head, self.computed + 1

    def last(self, module: Any, args: Any, answer: tuple[Any, Tensor]) -> tuple[Any, Tensor]:
        if not self.skipping:
            self.rest = answer[1] - self.seen
        return answer[0], self.seen + self.rest


@pytest.mark.parametrize("kind", ["SD3", "SD3.5 medium"])
@pytest.mark.parametrize("threshold", [0.0, 0.4])
@torch.no_grad()
def test_a_transformers_answers(kind: str, threshold: float) -> None:
    """A walk of the sample and its timesteps; prompt and negative prompt are one batch and one decision."""
    reference, ours = pair(CONFIGS[kind])
    x, _, context, vector = inputs(CONFIGS[kind], (8, 12))
    oracle = FirstBlock(reference, threshold)

    def predict(x: Tensor, sigma: float, cond: Cond) -> Tensor:
        assert cond.vector is not None
        answer: Tensor = ours(x, torch.full((len(x),), sigma), cond.context, cond.vector, taps=cond.taps)
        return answer

    asked = cached(predict, ours, Cache(threshold=threshold), 6)
    sample, walk = x[:1], torch.randn(6, *x.shape[1:], generator=torch.Generator().manual_seed(5))
    for i, sigma in enumerate((900.0, 898.0, 896.0, 500.0, 498.0, 496.0)):
        sample = sample + (0.01 if i != 3 else 1.0) * walk[i]
        both = sample.expand(2, -1, -1, -1)
        want = reference(both, context, vector, torch.full((2,), sigma)).sample
        got = asked(both, sigma, Cond(context, vector, asked=Asked(i, ("negative", "positive"))))
        assert difference(got, want) < CLOSE
    assert oracle.computed == 6 if threshold == 0 else 2 <= oracle.computed < 6


@torch.no_grad()
def test_pictures_of_a_batch_are_judged_one_by_one() -> None:
    """One that has moved far does not make the others' blocks run, nor do they keep it from running."""
    _, ours = pair(CONFIGS["SD3"])
    x, _, context, vector = inputs(CONFIGS["SD3"], (8, 12))

    def predict(x: Tensor, sigma: float, cond: Cond) -> Tensor:
        assert cond.vector is not None
        answer: Tensor = ours(x, torch.full((len(x),), sigma), cond.context, cond.vector, taps=cond.taps)
        return answer

    moved = x + torch.tensor([0.01, 3.0])[:, None, None, None] * torch.randn(
        x.shape, generator=torch.Generator().manual_seed(1)
    )
    names = ("positive",)
    together = cached(predict, ours, Cache(threshold=0.1), 2)
    alone = [cached(predict, ours, Cache(threshold=0.1), 2) for _ in range(2)]
    for i, given in enumerate((x, moved)):
        both = together(given, 500.0 - i, Cond(context, vector, asked=Asked(i, names)))
        for row in range(2):
            part = slice(row, row + 1)
            one = alone[row](given[part], 500.0 - i, Cond(context[part], vector[part], asked=Asked(i, names)))
            assert difference(both[part], one) < CLOSE
    exact = predict(moved, 499.0, Cond(context, vector))
    assert difference(both[:1], exact[:1]) > 1e-5  # the first is not what the whole network says,
    assert difference(both[1:], exact[1:]) < CLOSE  # the second is
