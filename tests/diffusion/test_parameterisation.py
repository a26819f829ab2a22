"""Every parameterisation: the network's true target gives back x0, and agrees with its four numbers."""

import pytest
import torch
from torch import Tensor

from reverie.diffusion.parameterisation import PARAMETERISATIONS, V
from reverie.diffusion.process import FlowProcess, Process
from reverie.errors import RequestError

SIGMAS = (0.03, 0.5, 1.0, 14.6, 4096.0)
PROCESS = Process.named()
# x0 = x + sigma * (...): float64 rounds near 1e-16, and sigma 4096 multiplies it.
EXACT = 1e-11


def sample(shape: tuple[int, ...] = (2, 3, 4, 4)) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=g, dtype=torch.float64), torch.randn(shape, generator=g, dtype=torch.float64)


def levels(name: str) -> list[float]:
    """Rectified flow lives in [0, 1]; the others anywhere above 0."""
    return [0.03, 0.5, 1.0] if name == "flow_prediction" else list(SIGMAS)


def noised(name: str, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    process = FlowProcess() if name == "flow_prediction" else PROCESS
    return process.noised(x0, noise, sigma)


@pytest.mark.parametrize("name", list(PARAMETERISATIONS))
def test_true_target_gives_x0_for_one_sigma(name: str) -> None:
    x0, noise = sample()
    for sigma in levels(name):
        level = torch.tensor(sigma, dtype=torch.float64)
        x, target = noised(name, x0, noise, level), PARAMETERISATIONS[name].target(x0, noise, level)
        k = PARAMETERISATIONS[name].at(sigma)
        torch.testing.assert_close(k.skip * x + k.out * target, x0, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", list(PARAMETERISATIONS))
def test_true_target_gives_x0_for_a_sigma_per_row(name: str) -> None:
    x0, noise = sample((3, 2, 4, 4))
    sigma = torch.tensor(levels(name)[:3], dtype=torch.float64)[:, None, None, None]
    x, target = noised(name, x0, noise, sigma), PARAMETERISATIONS[name].target(x0, noise, sigma)
    k = PARAMETERISATIONS[name].at(sigma)
    torch.testing.assert_close(k.skip * x + k.out * target, x0, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", list(PARAMETERISATIONS))
def test_float_and_tensor_coefficients_are_equal(name: str) -> None:
    for sigma in levels(name):
        one = PARAMETERISATIONS[name].at(sigma)
        many = PARAMETERISATIONS[name].at(torch.tensor([sigma], dtype=torch.float64))
        for a, b in ((one.skip, many.skip), (one.out, many.out), (one.into, many.into)):
            assert b.item() == pytest.approx(a, rel=1e-14)


@pytest.mark.parametrize("name", list(PARAMETERISATIONS))
def test_target_is_what_the_four_numbers_define(name: str) -> None:
    """F's target is `(x0 - c_skip x) / c_out` (EDM, equation 8)."""
    x0, noise = sample()
    for sigma in levels(name):
        level = torch.tensor(sigma, dtype=torch.float64)
        k = PARAMETERISATIONS[name].at(level)
        want = (x0 - k.skip * noised(name, x0, noise, level)) / k.out
        got = PARAMETERISATIONS[name].target(x0, noise, level)
        # at sigma 0.03 the division multiplies the rounding by 33
        torch.testing.assert_close(got, want, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", ["epsilon", "v_prediction", "sample"])
def test_network_input_has_variance_1(name: str) -> None:
    """c_in times a unit-variance x0 plus sigma noise: `c_in² (1 + sigma²) = 1`, as DDPM keeps x_t."""
    for sigma in SIGMAS:
        assert PARAMETERISATIONS[name].at(sigma).into ** 2 * (1 + sigma**2) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("name", list(PARAMETERISATIONS))
def test_loss_weight_is_the_square_of_c_out(name: str) -> None:
    sigma = torch.tensor(levels(name), dtype=torch.float64)
    k = PARAMETERISATIONS[name].at(sigma)
    torch.testing.assert_close(PARAMETERISATIONS[name].loss_weight(sigma), k.out**2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("t", [0, 250, 999])
def test_v_is_that_of_salimans_and_ho(t: int) -> None:
    x0, noise = sample()
    alpha_bar = PROCESS.alphas_cumprod[t]
    want = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0
    torch.testing.assert_close(V().target(x0, noise, PROCESS.sigmas[t]), want, rtol=1e-12, atol=1e-12)


def test_names_and_aliases() -> None:
    assert {a: PARAMETERISATIONS.name(a) for a in ("eps", "v", "x0", "flow", "V-prediction")} == {
        "eps": "epsilon",
        "v": "v_prediction",
        "x0": "sample",
        "flow": "flow_prediction",
        "V-prediction": "v_prediction",
    }
    with pytest.raises(RequestError, match=r"unknown prediction type 'epsilom'; did you mean 'epsilon'"):
        PARAMETERISATIONS["epsilom"]
