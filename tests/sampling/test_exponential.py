"""Exponential integrators: their arithmetic against quadrature, and the orders of the samplers made of them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from torch import Tensor

from reverie.diffusion.process import AnyProcess, EdmProcess
from reverie.errors import RequestError
from reverie.sampling.exponential import idle, interpolated, leg, lowered, noise_leg, phi, sigma_at
from reverie.sampling.samplers.ipndm import WEIGHTS
from reverie.sampling.samplers.ipndm_v import weights
from reverie.sampling.samplers.lms import coefficients
from tests.sampling import mixture
from tests.sampling.gaussian import FLOW, VP, denoiser, run, silent, solution

PROCESSES: dict[str, AnyProcess] = {"vp": VP, "flow": FLOW, "edm": EdmProcess()}


@given(k=st.integers(1, 5), z=st.floats(-30, 5))
def test_phi_is_its_integral(k: int, z: float) -> None:
    """`phi_k(z) = ∫_0^1 exp((1 - u) z) u^(k-1) / (k-1)! du`. Just beyond |z| = 1 the recursion loses two digits."""
    want, _ = quad(lambda u: math.exp((1 - u) * z) * u ** (k - 1) / math.factorial(k - 1), 0, 1, epsabs=0, epsrel=1e-12)
    assert phi(k, z) == pytest.approx(want, rel=1e-11)


@given(
    start=st.floats(-4, 4),
    h=st.floats(1e-3, 6),
    gaps=st.lists(st.floats(0.05, 2), max_size=3),
    rate=st.sampled_from([-1.0, 0.0, 1.0, 1.7]),
)
def test_interpolated_is_its_integral(start: float, h: float, gaps: list[float], rate: float) -> None:
    nodes = [start - sum(gaps[:i]) for i in range(len(gaps) + 1)]

    def basis(j: int, t: float) -> float:
        return math.prod((t - node) / (nodes[j] - node) for k, node in enumerate(nodes) if k != j)

    got = interpolated(nodes, start, start + h, rate)
    for j in range(len(nodes)):
        want, _ = quad(lambda t, j=j: math.exp(rate * (t - start - h)) * basis(j, t), start, start + h, epsrel=1e-11)
        assert got[j] == pytest.approx(want, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("process", PROCESSES)
@given(share=st.floats(0.001, 0.999))
def test_sigma_at_is_the_inverse_of_log_snr(process: str, share: float) -> None:
    sigma = share * min(PROCESSES[process].limit, 100)
    assert sigma_at(PROCESSES[process], PROCESSES[process].log_snr(sigma)) == pytest.approx(sigma, rel=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("process", PROCESSES)
def test_two_legs_are_one(process: str, eta: float) -> None:
    """With an answer that stays the same, a stop on the way changes neither the mean nor the noise."""
    way, first, second = (leg(PROCESSES[process], *ends, eta) for ends in ((0.9, 0.2), (0.9, 0.5), (0.5, 0.2)))
    assert second.keep * first.keep == pytest.approx(way.keep)
    assert second.keep * first.weight(1) + second.weight(1) == pytest.approx(way.weight(1))
    assert math.hypot(second.keep * first.noise, second.noise) == pytest.approx(way.noise)


@pytest.mark.parametrize("process", PROCESSES)
def test_legs_in_terms_of_x0_and_of_the_noise_are_one_step(process: str) -> None:
    """Of DDIM: `x_t = alpha_t x0 + sigma_t noise`."""
    here, x0, eps = PROCESSES[process], torch.tensor([0.3]), torch.tensor([-1.2])
    x, want = here.alpha(0.8) * x0 + 0.8 * eps, here.alpha(0.3) * x0 + 0.3 * eps
    torch.testing.assert_close(leg(here, 0.8, 0.3).first_order(x, x0), want)
    torch.testing.assert_close(noise_leg(here, 0.8, 0.3).first_order(x, eps), want)


def test_leg_from_pure_noise() -> None:
    """Where the log-SNR is -inf: the ODE goes straight, the SDE forgets where it came from."""
    straight, forgetful = leg(FLOW, 1.0, 0.4), leg(FLOW, 1.0, 0.4, eta=1.0)
    assert (straight.keep, straight.weight(1), straight.noise) == pytest.approx((0.4, 0.6, 0.0))
    assert (forgetful.keep, forgetful.weight(1), forgetful.noise) == pytest.approx((0.0, 0.6, 0.4))


def test_idle() -> None:
    assert idle(0.0292, 0.0292 * (1 + 1e-7))
    assert not idle(0.0292, 0.0292 * (1 - 1e-4))


def test_lowered() -> None:
    assert [lowered(3, known, left, True) for known, left in ((1, 9), (2, 8), (3, 7), (3, 2), (3, 1))] == [
        1,
        2,
        3,
        2,
        1,
    ]
    assert [lowered(3, known, left, False) for known, left in ((2, 1), (3, 1))] == [2, 3]


def test_ipndm_v_is_ipndm_on_equal_steps_but_for_order_4() -> None:
    for order in (1, 2, 3):
        assert weights([-0.1] * order) == pytest.approx(WEIGHTS[order])
    assert [24 * w for w in weights([-0.1] * 4)] == pytest.approx([57, -65, 43, -11])  # for 55, -59, 37, -9


def test_ipndm_v_of_order_2_is_adams_bashforth() -> None:
    """Of orders 3 and 4 the published weights are not; those are the sampler lms."""
    assert [0.3 * w for w in weights([0.3, 0.5])] == pytest.approx(coefficients([0.0, -0.5], 0.0, 0.3))
    assert [0.3 * w for w in weights([0.3, 0.5, 0.7])] != pytest.approx(
        coefficients([0.0, -0.5, -1.2], 0.0, 0.3), rel=0.1
    )


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("dpmpp_3m", {"order": 4}, "option order is 4; it can be 1, 2, 3"),
    ("dpmpp_2m", {"solver_type": "bh2"}, "option solver_type is 'bh2'; it can be midpoint, heun"),
    ("dpm_solver", {"order": "two"}, "option order is 'two'"),
    ("dpmpp_2s", {"order": 0}, "option order is 0"),
    ("dpmpp_2s", {"eta": -1}, "option eta is -1; it can be a number from 0 to 100"),
    ("unipc", {"variant": "bh3"}, "option variant is 'bh3'; it can be bh1, bh2"),
    ("unipc", {"order": 9}, "option order is 9"),
    ("deis", {"order": 4}, "option order is 4"),
    ("ipndm", {"order": 5}, "option order is 5; it can be 1, 2, 3, 4"),
    ("ipndm_v", {"order": 2.5}, r"option order is 2\.5"),
    ("sa_solver", {"corrector_order": 0}, "option corrector_order is 0"),
    ("sa_solver_pece", {"tau": "much"}, "option tau is 'much'; it can be a number from 0 to 10"),
    ("seeds_2", {"r": 0.0}, "option r is 0"),
    ("seeds_2", {"solver_type": "phi"}, "option solver_type is 'phi'"),
    ("seeds_3", {"r_1": 0.7}, r"option r_2 is 0\.66\d*; it can be a number from 0\.71 to 0\.99"),
    ("tcd", {"gamma": 1.5}, r"option gamma is 1\.5; it can be a number from 0 to 1"),
]


@pytest.mark.parametrize(("name", "options", "message"), WRONG)
def test_wrong_options_are_one_clear_error(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=f"sampler {message}"):
        run(name, torch.ones(1, 4), torch.tensor([2.0, 1.0, 0.0]), noise=Repeated(), **options)


EVERY_ORDER: Any = {"lower_order_final": False}
# sampler, options, order on the ODE
ORDERS: list[tuple[str, dict[str, Any], int]] = [
    ("dpmpp_3m", {"order": 1}, 1),
    ("dpmpp_3m", {"order": 2, "solver_type": "heun"}, 2),
    ("dpm_solver", {"order": 3}, 2),  # the first step is of order 1
    ("dpmpp_2s", {"order": 1}, 1),
    ("dpmpp_2s", {"solver_type": "heun"}, 2),
    ("deis", {"order": 1}, 1),
    ("deis", {"order": 3}, 2),
    ("unipc", {"order": 1}, 2),
    ("unipc", {"variant": "bh1"}, 2),
    ("unipc", {"order": 2} | EVERY_ORDER, 3),  # the corrector adds one
    ("unipc", {"order": 3} | EVERY_ORDER, 4),
    ("sa_solver", {"tau": 0.0}, 2),
    ("sa_solver_pece", {"tau": 0.0}, 2),
    ("sa_solver_pece", {"tau": 0.0} | EVERY_ORDER, 4),
    ("seeds_2", {"eta": 0.0}, 2),
    ("seeds_2", {"eta": 0.0, "r": 1.0, "solver_type": "phi_2"}, 2),
    ("seeds_3", {"eta": 0.0}, 3),
    ("ipndm", {"order": 2}, 2),
    ("ipndm_v", {"order": 2}, 2),
]


def error(name: str, n: int, options: dict[str, Any]) -> float:
    """On rectified flow, from 0.9 to 0.1 in equal steps of sigma."""
    sigmas = torch.linspace(0.9, 0.1, n + 1, dtype=torch.float64)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    noise = silent if not options.keys() & {"tau", "eta"} else lambda: torch.zeros(9, dtype=torch.float64)
    got = run(name, x, sigmas, FLOW, noise=noise, **options)
    return float((got - solution(FLOW, x, 0.9, 0.1)).abs().max())


@pytest.mark.parametrize(("name", "options", "order"), ORDERS)
def test_order_of_options(name: str, options: dict[str, Any], order: int) -> None:
    """The registered order is that of the defaults. 128 and 256 steps; measured: within 0.14 of it."""
    measured = math.log2(error(name, 128, options) / error(name, 256, options))
    assert measured == pytest.approx(order, abs=0.2)


class Repeated:
    """The same noise for both."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(4)

    def __call__(self) -> Tensor:
        return torch.randn(2, 4, 3, 3, generator=self.generator, dtype=torch.float64)


def constant(timestep: float) -> float:
    return 0.8


# samplers in log-SNR, in which a process is its alpha and nothing else
IN_LOG_SNR: list[tuple[str, dict[str, Any]]] = [
    ("dpmpp_3m", {}), ("dpmpp_3m", {"eta": 1.0}), ("dpm_solver", {}), ("dpmpp_2s", {}), ("dpmpp_2s", {"eta": 0.7}),
    ("unipc", {}), ("unipc", {"order": 3, "variant": "bh1"}), ("deis", {"order": 3}),
    ("sa_solver", {"tau_of": constant}), ("sa_solver_pece", {"tau_start": math.inf, "tau_end": 0.0}),
    ("seeds_2", {}), ("seeds_2", {"eta": 0.5, "r": 1.0, "solver_type": "phi_2"}), ("seeds_3", {}),
    ("euler_cfg_pp", {}), ("euler_a_cfg_pp", {"eta": 0.6}), ("ddim_cfg_pp", {"eta": 0.6}), ("dpmpp_2m_cfg_pp", {}),
    ("dpmpp_2s_a_cfg_pp", {"eta": 0.0}), ("res_multistep_cfg_pp", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), IN_LOG_SNR)
@pytest.mark.parametrize("to_zero", [True, False])
def test_rectified_flow_is_the_same_sampler_on_x_over_alpha(name: str, options: dict[str, Any], to_zero: bool) -> None:
    """`x / alpha = x0 + (sigma / alpha) noise` is variance-preserving in our units. Float64 rounding."""
    sigmas = torch.tensor([0.95, 0.8, 0.62, 0.4, 0.25, 0.1, *([0.0] if to_zero else [])], dtype=torch.float64)
    x = Repeated()()

    def in_ratios(denoise: Callable[[Tensor, float], Tensor]) -> Callable[[Tensor, float], Tensor]:
        return lambda y, ratio: denoise(y / (1 + ratio), ratio / (1 + ratio))

    def guided(x: Tensor, sigma: float) -> Tensor:
        return mixture.denoise_flow(x, sigma) + 0.3 * x.tanh()

    negative: dict[str, Any] = {"unconditional": mixture.denoise_flow} if "cfg_pp" in name else {}
    ours = run(name, x, sigmas, FLOW, denoise=guided, noise=Repeated(), **options, **negative)
    negative = {key: in_ratios(denoise) for key, denoise in negative.items()}
    want = run(
        name, x / (1 - sigmas[0]), sigmas / (1 - sigmas), VP, denoise=in_ratios(guided), noise=Repeated(),
        **options, **negative,
    )  # fmt: skip
    torch.testing.assert_close(ours, want * (1 - sigmas[-1]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["unipc", "deis", "dpmpp_3m", "dpm_solver", "dpmpp_2s", "dpmpp_2m_cfg_pp"])
def test_from_pure_noise_is_the_limit(name: str) -> None:
    """From sigma 1, where the log-SNR is infinite, as from just below: the first answer is only not interpolated."""
    rest = [0.9, 0.7, 0.5, 0.3, 0.1]
    x = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at, below = (
        run(name, x, torch.tensor([first, *rest], dtype=torch.float64), FLOW, denoise=denoiser(FLOW))
        for first in (1.0, 1 - 1e-12)
    )
    torch.testing.assert_close(at, below, rtol=0, atol=0.05)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_tcd_steps_below_the_next_timestep(gamma: float) -> None:
    """One step from timestep 799 to 399 by way of `floor(0.7 * 399) = 279`, the noise of one forward step back up."""
    sigma, down, below = VP.sigma(799), VP.sigma(399), VP.sigma(math.floor((1 - gamma) * 399))
    x, noise = Repeated()() * sigma, Repeated()()
    got = run("tcd", x, torch.tensor([sigma, down], dtype=torch.float64), noise=Repeated(), gamma=gamma)
    x0 = denoiser(VP)(x, sigma)
    want = x0 + below / sigma * (x - x0) + math.sqrt(down**2 - below**2) * noise
    torch.testing.assert_close(got, want)
