"""ControlNets at work, and trained. Numbers are compared in tests/parity/test_controlnet_parity.py."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reverie.adapters.control_files import ControlFile, open_control, save_control
from reverie.adapters.controlnet import SOFT, UNION_KINDS, Control, controlled, fitted, placed
from reverie.diffusion.process import Process
from reverie.errors import RequestError
from reverie.families.base import Parts, preconditioned
from reverie.nets.autoencoder import AutoencoderConfig
from reverie.nets.controlnet import ControlNet, ControlNetConfig, Hint, UnionConfig, widths_for
from reverie.nets.controlnet_sd3 import SD3ControlNet
from reverie.nets.mmdit import MMDiT
from reverie.nets.unet import UNet, UNetConfig
from reverie.sampling.guidance import Clock
from reverie.types import Cond, Taps
from tests.adapters import controls as made
from tests.adapters.controls import SIZE, assert_equal, picture


def test_scales(file: ControlFile) -> None:
    """A1111's soft weights fall by 0.825 from the middle up; diffusers' guess mode goes from 0.1 to 1."""
    n = file.network.maps
    control = Control(file, picture(), weight=2.0)
    assert control.scales() == (2.0,) * n
    soft = tuple(2 * SOFT ** (n - 1 - i) for i in range(n))
    assert replace(control, mode="prompt").scales() == replace(control, mode="control").scales() == soft
    guess = replace(control, mode="guess").scales()
    assert guess == pytest.approx((2 * torch.logspace(-1, 0, n)).tolist())
    assert replace(control, mode="guess", curve=1.0).scales() == (2.0,) * n
    curve = tuple(float(i) for i in range(n))
    assert replace(control, curve=curve).scales() == tuple(2 * c for c in curve)
    modes = {mode: replace(control, mode=mode).positive_only for mode in ("balanced", "prompt", "control", "guess")}
    assert modes == {"balanced": False, "prompt": False, "control": True, "guess": True}


@given(st.integers(1, 30), st.floats(0, 0.9), st.floats(0.01, 1))
def test_active_steps_are_those_of_diffusers(steps: int, start: float, length: float) -> None:
    end = min(start + length, 1.0)
    clock = Clock(tuple(float(steps - i) for i in range(steps + 1)))
    control = Control(BARE, picture(size=4), start=start, end=end)
    keep = [1.0 - float(i / steps < start or (i + 1) / steps > end) for i in range(steps)]
    assert [float(control.active(clock, sigma)) for sigma in clock.sigmas[:-1]] == keep


SMALL = UNetConfig(block_out_channels=(8,), attention=(0,), heads=(1,), mid_attention=0, groups=8)
BARE = ControlFile(
    Path("a"), "controlnet", "original", ControlNet(ControlNetConfig(SMALL, widths=(1,))), AutoencoderConfig(), ()
)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"start": 0.6, "end": 0.4}, "from 0.6 to 0.4"),
        ({"end": 1.5}, "to 1.5"),
        ({"weight": float("nan")}, "finite"),
        ({"curve": (1.0, float("inf"))}, "finite"),
        ({"curve": (1.0, 2.0)}, "2 weights for 7 answers"),
        ({"picture": torch.ones(3, 8, 8)}, "its picture has shape"),
        ({"mask": torch.ones(1, 3, 8, 8)}, "its mask has shape"),
        ({"hidden": torch.ones(1, 1, 0, 8)}, "its hidden has shape"),
    ],
)
def test_impossible_values(file: ControlFile, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        Control(file, **({"picture": picture()} | settings))
    assert "ControlNet control" in str(caught.value)


def test_pictures_beside_are_for_unions(file: ControlFile) -> None:
    with pytest.raises(RequestError, match="no Union"):
        Control(file, picture(), beside=(Control(file, picture()),))
    small = ControlNetConfig(SMALL, widths=(1,), union=UnionConfig(width=8, heads=1))
    union = replace(BARE, kind="union", network=ControlNet(small))
    assert Control(union, picture(), 0.0, kind=5, beside=(Control(union, picture(), 0.4),)).scales() == (1.0,) * 4
    with pytest.raises(RequestError, match="the kinds of picture 0 to 5, and was given 6"):
        Control(union, picture(), kind=6)


def test_kinds_of_a_union() -> None:
    names = ("pose", "Depth", "scribble", "lineart", "normal", "seg", "tile", "inpaint")
    assert [UNION_KINDS[name] for name in names] == list(range(8))


def test_fitting() -> None:
    wide = torch.zeros(1, 3, 10, 40)
    wide[..., :10] = 1  # the left quarter
    assert fitted(wide, 40, 10) is wide
    for fit in ("resize", "crop", "fill"):
        assert fitted(wide, 24, 24, fit).shape == (1, 3, 24, 24)
    stretched, cut, framed = (fitted(wide, 20, 20, fit) for fit in ("resize", "crop", "fill"))
    assert stretched[..., :4].mean() > 0.99
    assert not cut.any()
    assert not framed[..., :7, :].any()
    assert not framed[..., 13:, :].any()
    assert framed[0, 0, 10, :4].mean() > 0.99
    assert 0 <= framed.min() <= framed.max() <= 1


class Listener:
    """A `predict` that keeps what it was told."""

    def __init__(self) -> None:
        self.heard: list[Cond] = []

    def __call__(self, x: Tensor, sigma: float, cond: Cond) -> Tensor:
        self.heard.append(cond)
        return x


CLOCK = Clock((9.0, 6.0, 3.0, 1.0, 0.0))


def added(
    parts: Parts, controls: list[Control], sigma: float = 6.0, control: Tensor | None = None, rows: int = 2,
    x: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """What `controls` add to one evaluation of `rows` conditions."""
    listener = Listener()
    predict = controlled(listener, controls, parts.process, parts.parameterisation, torch.float32, clock=CLOCK)
    given = torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(1)) if x is None else x
    context = torch.randn(rows, 7, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        predict(given, sigma, Cond(context, control=control))
    (cond,) = listener.heard
    return {} if cond.taps is None else dict(cond.taps.added)


def assert_close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], atol: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], atol=atol, rtol=1e-5)


def test_several_are_summed_in_any_order(sd1: Parts, file: ControlFile) -> None:
    first, second = Control(file, picture(0), 0.5), Control(file, picture(1), 1.5, curve=0.9)
    alone = [added(sd1, [control]) for control in (first, second)]
    assert set(alone[0]) == {*(f"skips.{i}" for i in range(6)), "mid_block"}
    assert_close(added(sd1, [first, second]), {n: alone[0][n] + alone[1][n] for n in alone[0]})
    assert_close(added(sd1, [first, second]), added(sd1, [second, first]))


def test_nothing_is_added_outside_the_steps_or_without_weight(sd1: Parts, file: ControlFile) -> None:
    assert added(sd1, [Control(file, picture(), start=0.5)], sigma=6.0) == {}
    assert added(sd1, [Control(file, picture(), start=0.5)], sigma=3.0) != {}
    assert added(sd1, [Control(file, picture(), weight=0.0)]) == {}
    assert added(sd1, []) == {}


@pytest.mark.parametrize("mode", ["control", "guess"])
def test_the_picture_counts_more(sd1: Parts, file: ControlFile, mode: Any) -> None:
    """The rows of the negative prompt are left alone, and need no evaluation."""
    control = Control(file, picture(), mode=mode)
    everywhere = added(sd1, [control], rows=4)
    marks = torch.tensor([0.0, 0.5, 1.0, 0.0])
    some = added(sd1, [control], rows=4, control=marks)
    assert_close(some, {name: t * marks[:, None, None, None] for name, t in everywhere.items()})
    assert added(sd1, [control], rows=4, control=torch.zeros(4)) == {}
    assert_close(added(sd1, [control], rows=4, control=torch.ones(4)), everywhere)
    balanced = replace(control, mode="balanced", curve=control.scales())
    assert_close(added(sd1, [balanced], rows=4, control=marks), everywhere)


def test_a_picture_for_each_row_and_one_for_all(sd1: Parts, file: ControlFile) -> None:
    """Conditions are joined in blocks of a batch: rows 0 and 2 are the first picture's."""
    both = added(sd1, [Control(file, picture(count=2))], rows=4)
    for i in (0, 1):
        single = added(sd1, [Control(file, picture(count=2)[i : i + 1])], rows=4)
        for name, tensor in both.items():
            assert torch.allclose(tensor[i::2], single[name][i::2], atol=1e-4)
    with pytest.raises(RequestError, match="2 control pictures for 3 rows"):
        added(sd1, [Control(file, picture(count=2))], rows=3)
    marks = torch.tensor([0.0, 0.0, 1.0, 1.0])
    guided = added(sd1, [Control(file, picture(count=2), mode="control", curve=1.0)], rows=4, control=marks)
    assert_close({n: t[2:] for n, t in guided.items()}, {n: t[2:] for n, t in both.items()}, atol=1e-4)


def test_mask(sd1: Parts, file: ControlFile) -> None:
    """Where the mask is black nothing is added; grey and edges fade."""
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., : SIZE // 2] = 1
    whole, half = added(sd1, [Control(file, picture())]), added(sd1, [Control(file, picture(), mask=mask)])
    for name, tensor in half.items():
        middle = tensor.shape[-1] // 2
        assert torch.equal(tensor[..., :middle], whole[name][..., :middle])
        assert not tensor[..., middle:].any()
    grey = added(sd1, [Control(file, picture(), mask=torch.full((1, 1, SIZE, SIZE), 0.25))])
    assert_close(grey, {name: 0.25 * t for name, t in whole.items()})


def test_window(sd1: Parts, file: ControlFile) -> None:
    """Windows of latents are windows of picture, mask and hidden pixels, four pixels each."""
    mask, hidden = picture(1)[:, :1], (picture(2)[:, :1] > 0.5).float()
    control = Control(file, picture(), mask=mask, hidden=hidden)
    cut = control.window(slice(2, 6), slice(None, 4))
    for whole, part in ((control.picture, cut.picture), (mask, cut.mask), (hidden, cut.hidden)):
        assert part is not None
        assert torch.equal(part, whole[..., 8:24, :16])
    x = torch.randn(1, 4, 4, 4)
    assert added(sd1, [cut], rows=1, x=x)["skips.0"].shape[-2:] == (4, 4)
    assert torch.equal(control.window(slice(None), slice(None)).picture, control.picture)


def test_a_picture_of_another_size(sd1: Parts, file: ControlFile) -> None:
    large = Control(file, torch.rand(1, 3, 40, 60), hidden=torch.ones(1, 1, 40, 60), mask=torch.ones(1, 1, 40, 60))
    with pytest.raises(RequestError, match="a control picture of 60 x 40 pixels for a drawing of 32 x 32"):
        added(sd1, [large])
    fit = large.fitted(SIZE, SIZE, "crop")
    assert fit.mask is not None
    assert fit.picture.shape[-2:] == fit.mask.shape[-2:] == (SIZE, SIZE)
    assert added(sd1, [fit])


def test_hidden_pixels(file: ControlFile) -> None:
    hidden = torch.zeros(1, 1, SIZE, SIZE)
    hidden[..., 4:9, 7:20] = 1
    shown = Control(file, picture(), hidden=hidden).shown()
    assert (shown[..., 4:9, 7:20] == -1).all()
    assert torch.equal(shown * (1 - hidden), picture() * (1 - hidden))
    union = Control(replace(file, kind="union"), picture(), hidden=hidden).shown()
    assert not union[..., 4:9, 7:20].any()


def test_what_is_made_of_the_picture_is_made_once(
    sd1: Parts, file: ControlFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And equals bit for bit what a fresh run makes of it at every step."""
    calls: list[int] = []
    plain = ControlNet.hint

    def counted(network: ControlNet, *args: Any) -> Hint:
        calls.append(1)
        return plain(network, *args)

    monkeypatch.setattr(ControlNet, "hint", counted)
    listener, control = Listener(), Control(file, picture())
    predict = controlled(listener, [control], sd1.process, sd1.parameterisation, torch.float32, clock=CLOCK)
    x, context = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(1, 7, 32)
    with torch.no_grad():
        for sigma in CLOCK.sigmas[:-1]:
            predict(x, sigma, Cond(context))
    assert len(calls) == 1
    for sigma, cond in zip(CLOCK.sigmas, listener.heard, strict=False):
        again = Listener()
        fresh = controlled(again, [control], sd1.process, sd1.parameterisation, torch.float32, clock=CLOCK)
        with torch.no_grad():
            fresh(x, sigma, Cond(context))
        assert cond.taps is not None
        assert again.heard[0].taps is not None
        assert all(torch.equal(t, again.heard[0].taps.added[n]) for n, t in cond.taps.added.items())


def test_it_leaves_no_trace(sd1: Parts, file: ControlFile) -> None:
    """The network and its answers without control are the same before and after, bit for bit."""
    assert isinstance(sd1.process, Process)
    predict = preconditioned(sd1.unet, sd1.process, sd1.parameterisation, torch.float32)
    x, cond = torch.randn(2, 4, 8, 8), Cond(torch.randn(2, 7, 32))
    with torch.no_grad():
        before = predict(x, 6.0, cond)
        under = controlled(
            predict, [Control(file, picture())], sd1.process, sd1.parameterisation, torch.float32, clock=CLOCK
        )
        assert (under(x, 6.0, cond) - before).abs().max() > 0.01
        assert torch.equal(predict(x, 6.0, cond), before)
    assert cond.taps is None


def sd3_control(root: Path, tmp_path: Path, parts: Parts, **settings: Any) -> ControlFile:
    transformer = made.diffusers.SD3Transformer2DModel.from_pretrained(root / "sd3-without-t5" / "transformer")
    made.sd3(transformer, **settings).save_pretrained(tmp_path / "control")
    return open_control(tmp_path / "control", parts)


def test_what_sd3_is_shown(root: Path, tmp_path: Path, sd3: Parts) -> None:
    """Latents, shifted or not as it was trained; with hidden pixels the latents of black and where to keep."""
    config, mean = sd3.vae.config, torch.full((1, 16, 8, 8), 2.0)
    seen: list[Tensor] = []

    def encode(pixels: Tensor) -> Tensor:
        seen.append(pixels)
        return mean

    plain = sd3_control(root, tmp_path, sd3)
    with pytest.raises(RequestError, match="give it an `encode`"):
        Control(plain, picture())
    assert torch.equal(Control(plain, picture(), encode=encode).shown(), mean * config.scaling_factor)
    Control(replace(plain, canny=True), picture(), encode=encode).shown()
    assert torch.allclose(2 * seen[-1] - 1, picture() * 255 * 0.5 + 0.5, atol=1e-5)
    inpaint = sd3_control(root, tmp_path, sd3, extra_conditioning_channels=1)
    hidden = torch.zeros(1, 1, SIZE, SIZE)
    hidden[..., 8:16, 4:12] = 1
    shown = Control(inpaint, picture(), hidden=hidden, encode=encode).shown()
    assert torch.allclose(shown[:, :16], (mean - config.shift_factor) * config.scaling_factor)
    assert torch.equal(shown[:, 16:], 1 - hidden[..., ::4, ::4])
    assert not seen[-1][..., 8:16, 4:12].any()
    assert (Control(inpaint, picture(), encode=encode).shown()[:, 16:] == 1).all()


@torch.no_grad()
def test_mask_and_places_of_sd3(root: Path, tmp_path: Path, sd3: Parts) -> None:
    """Answers of two blocks are spread over the first two of three, the last having nothing behind it."""
    file = sd3_control(root, tmp_path, sd3)
    mask = torch.zeros(1, 1, SIZE, 2 * SIZE)
    mask[..., :SIZE] = 1
    control = Control(file, torch.rand(1, 3, SIZE, 2 * SIZE), encode=lambda p: sd3.vae.encode(2 * p - 1)[0])
    found = []
    for each in (control, replace(control, mask=mask)):
        listener = Listener()
        predict = controlled(
            listener, [each], sd3.process, sd3.parameterisation, torch.float32, clock=Clock((0.9, 0.0))
        )
        cond = Cond(torch.randn(1, 7, 112, generator=torch.Generator().manual_seed(1)), vector=torch.zeros(1, 56))
        predict(torch.randn(1, 16, 8, 16, generator=torch.Generator().manual_seed(1)), 0.9, cond)
        assert listener.heard[0].taps is not None
        found.append(listener.heard[0].taps.added)
    assert set(found[0]) == {"transformer_blocks.0", "transformer_blocks.1"}
    for name, tokens in found[1].items():
        grid, whole = (t.view(1, 4, 8, -1) for t in (tokens, found[0][name]))
        assert torch.equal(grid[:, :, :4], whole[:, :, :4])
        assert not grid[:, :, 4:].any()


# Training


def test_training(sd1: Parts, file: ControlFile, tmp_path: Path) -> None:
    """From a U-Net, on one example: the loss falls, the U-Net stays, and what is saved opens again."""
    assert isinstance(sd1.unet, UNet)
    network = ControlNet.from_unet(sd1.unet, widths=widths_for(sd1.vae.config.factor)).train()
    unet = {name: t.clone() for name, t in sd1.unet.state_dict().items()}
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3)
    torch.manual_seed(0)
    x, context, target = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32), torch.randn(2, 4, 8, 8)
    timesteps, losses = torch.tensor([500.0, 40.0]), []
    for _ in range(5):
        answers = network(x, timesteps, context, network.hint([picture(count=2)]))
        taps = Taps(added=placed(replace(file, network=network), answers))
        loss = (sd1.unet(x, timesteps, context, taps) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    with_gradient = [name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()]
    assert {"conv_in.weight", "controlnet_cond_embedding.conv_in.weight", "controlnet_mid_block.weight"} <= set(
        with_gradient
    )
    assert_equal(sd1.unet, unet)
    save_control(tmp_path / "trained", network, torch.float32)
    assert_equal(open_control(tmp_path / "trained", sd1).network, network.state_dict())


def test_a_new_controlnet_for_sd3(sd3: Parts) -> None:
    assert isinstance(sd3.unet, MMDiT)
    network = SD3ControlNet.from_transformer(sd3.unet, 2, extra_channels=1)
    theirs, ours = sd3.unet.state_dict(), network.state_dict()
    shared = [name for name in ours if name in theirs]
    assert any(name.startswith("transformer_blocks.1.attn.") for name in shared)
    assert all(torch.equal(ours[name], theirs[name]) for name in shared)
    answers = network(torch.randn(1, 16, 8, 8), torch.ones(1), torch.randn(1, 7, 112),
                      network.hint(torch.randn(1, 17, 8, 8)), vector=torch.randn(1, 56))  # fmt: skip
    assert len(answers) == 2
    assert not any(t.any() for t in answers)
    with pytest.raises(ValueError, match="expected 1 to 2"):
        SD3ControlNet.from_transformer(sd3.unet, 3)
