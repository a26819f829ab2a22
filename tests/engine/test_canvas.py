"""What is drawn, what is kept, and where it goes back to."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from reverie.engine.canvas import Canvas, prepare, soft, spread
from reverie.engine.request import Request
from reverie.engine.sources import data_url
from reverie.errors import RequestError

RNG = np.random.default_rng(3)


def picture(width: int, height: int) -> str:
    return data_url(Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8)))


def mask(width: int, height: int, box: tuple[int, int, int, int]) -> str:
    image = Image.new("L", (width, height), 0)
    image.paste(255, box)
    return data_url(image)


def canvas_of(factor: int = 8, scale: int = 1, **fields: Any) -> Canvas:
    canvas = prepare(Request.of(**fields), factor, scale)
    assert canvas is not None
    return canvas


def _bytes(pixels: Tensor) -> Tensor:
    return (pixels * 255).round().byte()


def test_without_a_picture_there_is_no_canvas() -> None:
    assert prepare(Request.of(prompt="x"), 8, 1) is None


@pytest.mark.parametrize("field", [{"mask": "m.png"}, {"extend": {"left": 8}}])
def test_mask_and_extend_need_a_picture(field: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="needs a picture"):
        prepare(Request.of(**field), 8, 1)


@pytest.mark.parametrize(("width", "height"), [(64, 64), (50, 37), (9, 100)])
def test_any_size_is_drawn_at_whole_latents_and_comes_back_at_its_own(width: int, height: int) -> None:
    canvas = canvas_of(image=picture(width, height))
    assert canvas.size[0] % 8 == canvas.size[1] % 8 == 0
    assert canvas.size[0] - width in range(8)
    assert canvas.source().shape == (1, 3, *canvas.size[::-1])
    drawn = torch.rand(2, 3, *canvas.size[::-1])
    finished = canvas.finished(drawn, keep=True)
    assert torch.equal(finished, drawn[..., :height, :width])


def test_an_upscaler_means_that_less_is_drawn() -> None:
    canvas = canvas_of(image=picture(256, 250), scale=4)
    assert canvas.size == (64, 64)
    assert canvas.finished(torch.rand(1, 3, 256, 256), keep=True).shape == (1, 3, 250, 256)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(16, 80), st.integers(16, 80), st.floats(0, 12), st.sampled_from(["whole", "masked"]),
    st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(1, 40), st.integers(1, 40)),
)  # fmt: skip
def test_unmasked_pixels_are_those_of_the_picture_bit_for_bit(
    width: int, height: int, blur: float, area: str, box: tuple[int, int, int, int]
) -> None:
    left, top, w, h = box
    fields: dict[str, Any] = {"width": 64, "height": 64} if area == "masked" else {}
    canvas = canvas_of(
        image=picture(width, height), mask=mask(width, height, (left, top, left + w, top + h)),
        mask_blur=blur, mask_area=area, mask_padding=4, **fields,
    )  # fmt: skip
    finished = canvas.finished(torch.rand(1, 3, *canvas.size[::-1]), keep=True)
    assert canvas.mask is not None
    outside = (canvas.mask == 0).expand_as(finished)
    assert torch.equal(_bytes(finished)[outside], _bytes(canvas.picture)[outside])
    assert finished.shape == (1, 3, height, width)
    drawn = canvas.drawn()
    assert drawn is not None and drawn.any()


def test_without_keeping_everything_is_what_was_drawn() -> None:
    canvas = canvas_of(image=picture(32, 32), mask=mask(32, 32, (8, 8, 16, 16)))
    drawn = torch.rand(1, 3, 32, 32)
    assert torch.equal(canvas.finished(drawn, keep=False), drawn)


def test_inverted_masks_draw_the_rest() -> None:
    fields: dict[str, Any] = {"image": picture(32, 32), "mask": mask(32, 32, (8, 8, 16, 16))}
    straight, inverted = canvas_of(**fields), canvas_of(**fields, mask_invert=True)
    assert straight.mask is not None and inverted.mask is not None
    assert torch.equal(straight.mask, 1 - inverted.mask)


def test_an_empty_mask_is_refused() -> None:
    with pytest.raises(RequestError, match="mask is empty"):
        canvas_of(image=picture(32, 32), mask=mask(32, 32, (0, 0, 0, 0)))


def test_only_masked_draws_the_surroundings_with_the_wanted_ratio() -> None:
    canvas = canvas_of(
        image=picture(200, 100), mask=mask(200, 100, (150, 40, 160, 50)), mask_area="masked", mask_padding=10,
        width=64, height=32,
    )  # fmt: skip
    left, top, right, bottom = canvas.box
    assert canvas.size == (64, 32)
    assert (right - left) / (bottom - top) == pytest.approx(2, rel=0.05)
    assert left <= 140 and right >= 170 and top <= 30 and bottom >= 60
    assert min(left, top) >= 0 and right <= 200 and bottom <= 100


def test_extending_keeps_the_picture_and_draws_the_new_sides() -> None:
    canvas = canvas_of(image=picture(32, 24), extend={"left": 8, "bottom": 16})
    assert canvas.picture.shape == (1, 3, 40, 40)
    assert canvas.mask is not None
    assert canvas.mask[0, 0, :24, 8:].sum() == 0
    assert canvas.mask[0, 0].sum() == 40 * 40 - 32 * 24
    finished = canvas.finished(torch.rand(1, 3, 40, 40), keep=True)
    assert torch.equal(finished[..., :24, 8:], canvas.picture[..., :24, 8:])


def test_extending_by_nothing_is_refused() -> None:
    with pytest.raises(RequestError, match="adds no pixels"):
        canvas_of(image=picture(32, 24), extend={})


@pytest.mark.parametrize("how", ["stretch", "crop", "fill"])
def test_resizing_gives_the_wanted_size(how: str) -> None:
    canvas = canvas_of(image=picture(60, 30), width=48, height=48, resize=how)
    assert canvas.size == (48, 48)
    assert canvas.source().shape == (1, 3, 48, 48)
    assert canvas.finished(torch.rand(1, 3, 48, 48), keep=True).shape == (1, 3, 48, 48)


def test_cropping_keeps_the_middle() -> None:
    image = Image.new("RGB", (64, 32), "blue")
    image.paste((255, 0, 0), (16, 0, 48, 32))
    canvas = canvas_of(image=data_url(image), width=32, height=32, resize="crop")
    assert torch.allclose(canvas.picture[:, 0], torch.ones(1, 32, 32))


def test_filling_continues_the_surroundings() -> None:
    canvas = canvas_of(image=data_url(Image.new("RGB", (64, 32), "blue")), width=64, height=64, resize="fill")
    blue = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1)
    assert torch.allclose(canvas.picture, blue.expand(1, 3, 64, 64), atol=1e-5)


def test_spread_leaves_the_known_and_fills_with_what_is_near() -> None:
    image = torch.zeros(1, 3, 32, 32)
    image[:, 0, :, :16], image[:, 2, :, 16:] = 1, 1
    hole = torch.zeros(1, 1, 32, 32)
    hole[..., 8:24, 2:10] = 1
    filled = spread(image, hole)
    assert torch.equal(filled[..., :, 16:], image[..., :, 16:])
    inside = filled[0, :, 8:24, 2:10]
    assert inside[0].mean() > 0.9 and inside[2].mean() < 0.1


@pytest.mark.parametrize("blur", [0.5, 2.0, 6.0])
def test_soft_edges_stay_inside_and_reach_one(blur: float) -> None:
    hard = torch.zeros(1, 1, 64, 64)
    hard[..., 10:54, 10:54] = 1
    alpha = soft(hard, blur)
    assert torch.equal(alpha[hard == 0], torch.zeros_like(alpha[hard == 0]))
    assert alpha[0, 0, 32, 32] > 0.99
    row = alpha[0, 0, 32, 10:32]
    assert bool((row.diff() >= -1e-6).all()) and row[0] < 0.9
