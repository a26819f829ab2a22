"""Classifier-free guidance."""

import pytest
import torch
from torch import Tensor

from reverie.sampling.guidance import classifier_free, conditional
from reverie.types import Cond

POSITIVE, NEGATIVE = Cond(torch.full((2, 3, 4), 2.0)), Cond(torch.full((2, 3, 4), -1.0))


def predict(x: Tensor, sigma: float, cond: Cond) -> Tensor:
    """A network without weights whose answer depends on all three."""
    return 0.5 * x + sigma * cond.context.mean(dim=(1, 2))[:, None]


def x() -> Tensor:
    return torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 7.5])
def test_formula(scale: float) -> None:
    positive, negative = predict(x(), 0.7, POSITIVE), predict(x(), 0.7, NEGATIVE)
    want = negative + scale * (positive - negative)
    # float32, sums of numbers near 10
    torch.testing.assert_close(
        classifier_free(predict, POSITIVE, NEGATIVE, scale)(x(), 0.7), want, rtol=1e-6, atol=1e-6
    )


def test_scale_0_is_the_negative_condition() -> None:
    got = classifier_free(predict, POSITIVE, NEGATIVE, 0.0)(x(), 0.7)
    assert torch.equal(got, predict(x(), 0.7, NEGATIVE))


def test_scale_1_is_the_positive_condition_alone() -> None:
    rows = []

    def counted(x: Tensor, sigma: float, cond: Cond) -> Tensor:
        rows.append(len(x))
        return predict(x, sigma, cond)

    got = classifier_free(counted, POSITIVE, NEGATIVE, 1)(x(), 0.7)
    assert torch.equal(got, conditional(predict, POSITIVE)(x(), 0.7))
    assert rows == [2]  # no second condition goes through the network


def test_both_conditions_go_through_the_network_as_one_batch() -> None:
    seen = []

    def watching(x: Tensor, sigma: float, cond: Cond) -> Tensor:
        seen.append((len(x), cond.context.shape))
        return predict(x, sigma, cond)

    classifier_free(watching, POSITIVE, NEGATIVE, 7.5)(x(), 0.7)
    assert seen == [(4, (4, 3, 4))]


@pytest.mark.parametrize("scale", [0.0, 3.0, 7.5])
def test_equals_guidance_of_the_noise(scale: float) -> None:
    """Guiding x0 and guiding eps are one thing, because `x0 = x - sigma eps` is affine."""
    sigma = 2.3
    noise = {id(c): (x() - predict(x(), sigma, c)) / sigma for c in (POSITIVE, NEGATIVE)}
    guided = noise[id(NEGATIVE)] + scale * (noise[id(POSITIVE)] - noise[id(NEGATIVE)])
    got = classifier_free(predict, POSITIVE, NEGATIVE, scale)(x(), sigma)
    # float32: rounding near 1e-6, multiplied by scale and sigma
    torch.testing.assert_close(got, x() - sigma * guided, rtol=1e-5, atol=3e-5)
