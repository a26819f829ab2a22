"""The forward process against diffusers, the papers' closed forms and exact algebra."""

import math
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr as diffusers_rescale
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reverie.diffusion.process import (
    NOISE_SCHEDULES,
    ZERO_SNR_FLOOR,
    FlowProcess,
    Process,
    cosine_betas,
    linear_betas,
    q_step,
    rescale_zero_terminal_snr,
    scaled_linear_betas,
)
from reverie.errors import RequestError
from tests.tiny import diffusers

# Ours are float64, diffusers' are float32: half a unit in its last place is 6e-8 relative, a sum of a few 2e-7.
# The cosine schedule is a difference from 1, so there the error is absolute.
FLOAT32 = 5e-7
STABLE_DIFFUSION = Process.named()
ZERO_SNR = Process.named(zero_terminal_snr=True)


def reference(schedule: str, **settings: Any) -> Any:
    return diffusers.DDPMScheduler(beta_schedule=schedule, **settings)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(("start", "end"), [(0.00085, 0.012), (0.0001, 0.02)])
@pytest.mark.parametrize("steps", [10, 1000])
def test_betas_equal_diffusers(schedule: str, start: float, end: float, steps: int) -> None:
    want = reference(schedule, num_train_timesteps=steps, beta_start=start, beta_end=end).betas.double()
    got = Process.named(schedule, steps=steps, start=start, end=end).betas
    torch.testing.assert_close(got, want, rtol=FLOAT32, atol=FLOAT32 if "cos" in schedule else 0)


def test_alphas_cumprod_equals_diffusers() -> None:
    want = reference("scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod.double()
    # a float32 product of 1000 factors: errors of 6e-8 each, which add like a random walk or worse
    torch.testing.assert_close(STABLE_DIFFUSION.alphas_cumprod, want, rtol=1e-5, atol=0)


def test_linear_betas_are_equally_spaced() -> None:
    betas = linear_betas(5, 0.1, 0.5)
    torch.testing.assert_close(betas, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64))


def test_roots_of_scaled_linear_betas_are_equally_spaced() -> None:
    betas = scaled_linear_betas(3, 0.01, 0.09)
    torch.testing.assert_close(betas, torch.tensor([0.01, 0.04, 0.09], dtype=torch.float64))


def test_cosine_betas_follow_equation_17() -> None:
    alpha_bar = torch.cumprod(1 - cosine_betas(100), 0)[:-1]  # the last beta is clipped
    f = [math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(100)]
    want = torch.tensor(f[1:], dtype=torch.float64) / f[0]
    torch.testing.assert_close(alpha_bar, want, rtol=1e-12, atol=0)


def test_first_and_last_sigma_of_stable_diffusion() -> None:
    # the range known from k-diffusion for the v1 models; its float32 table is good to four digits at the low end
    assert STABLE_DIFFUSION.sigma_min == pytest.approx(0.029168, rel=1e-4)
    assert STABLE_DIFFUSION.sigma_max == pytest.approx(14.614641, rel=1e-6)


@pytest.mark.parametrize("schedule", list(NOISE_SCHEDULES))
def test_sigmas_ascend(schedule: str) -> None:
    sigmas = Process.named(schedule).sigmas
    assert (sigmas.diff() > 0).all()
    assert sigmas.dtype == torch.float64


@pytest.mark.parametrize("steps", [1, 2, 17, 1000])
def test_chained_steps_have_the_closed_form_mean_and_variance(steps: int) -> None:
    """`q_step` is affine, so its coefficients of x0 and of each step's noise can be read off with unit vectors."""
    betas = STABLE_DIFFUSION.betas[:steps]
    rows = torch.eye(steps + 1, dtype=torch.float64)
    x = rows[0].clone()  # column 0 carries x0, column t the noise of step t
    for t, beta in enumerate(betas, 1):
        x = q_step(x, beta, rows[t])
    alpha_bar = STABLE_DIFFUSION.alphas_cumprod[steps - 1]
    torch.testing.assert_close(x[0], alpha_bar.sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(x[1:].square().sum(), 1 - alpha_bar, rtol=1e-12, atol=0)


@pytest.mark.parametrize("t", [0, 3, 500, 999])
def test_noised_is_the_closed_form_in_units_of_sigma(t: int) -> None:
    x0, noise = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    alpha_bar = STABLE_DIFFUSION.alphas_cumprod[t]
    sigma = STABLE_DIFFUSION.sigmas[t]
    ddpm = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise  # DDPM, equation 4
    got = STABLE_DIFFUSION.noised(x0, noise, sigma) / STABLE_DIFFUSION.scale(float(sigma))
    torch.testing.assert_close(got, ddpm, rtol=1e-12, atol=1e-14)


def gaussian_product(x0: Tensor, x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, float]:
    """N(y; x0, s²) N(x; y, sigma² - s²) as a Gaussian in y: precisions add, means are weighed by them."""
    prior, likelihood = sigma_next**-2, 1 / (sigma**2 - sigma_next**2)
    precision = prior + likelihood
    return (prior * x0 + likelihood * x) / precision, precision**-0.5


@pytest.mark.parametrize(("t", "s"), [(1, 0), (500, 499), (999, 998), (999, 0), (700, 20)])
def test_posterior_is_a_product_of_gaussians(t: int, s: int) -> None:
    x0, x = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()
    sigma, sigma_next = float(STABLE_DIFFUSION.sigmas[t]), float(STABLE_DIFFUSION.sigmas[s])
    mean, deviation = STABLE_DIFFUSION.posterior(x0, x, sigma, sigma_next)
    want_mean, want_deviation = gaussian_product(x0, x, sigma, sigma_next)
    torch.testing.assert_close(mean, want_mean, rtol=1e-10, atol=1e-12)
    assert deviation == pytest.approx(want_deviation, rel=1e-10)


@pytest.mark.parametrize("t", [1, 2, 500, 999])
def test_posterior_is_equation_7_of_ddpm(t: int) -> None:
    process, g = STABLE_DIFFUSION, torch.Generator().manual_seed(2)
    x0, x_t = torch.randn(2, 5, dtype=torch.float64, generator=g).unbind()
    beta, alpha_bar, before = process.betas[t], process.alphas_cumprod[t], process.alphas_cumprod[t - 1]
    want = before.sqrt() * beta / (1 - alpha_bar) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - alpha_bar) * x_t
    variance = (1 - before) / (1 - alpha_bar) * beta
    sigma, sigma_next = float(process.sigmas[t]), float(process.sigmas[t - 1])
    mean, deviation = process.posterior(x0, x_t * process.scale(sigma), sigma, sigma_next)
    # alpha_bar_{t-1} / alpha_bar_t cancels up to 1e-16 / beta
    torch.testing.assert_close(mean / process.scale(sigma_next), want, rtol=1e-9, atol=1e-11)
    assert (deviation / process.scale(sigma_next)) ** 2 == pytest.approx(float(variance), rel=1e-9)


def test_posterior_at_zero_is_the_answer() -> None:
    x0, x = torch.zeros(3), torch.ones(3)
    mean, deviation = STABLE_DIFFUSION.posterior(x0, x, 1.0, 0.0)
    assert torch.equal(mean, x0)
    assert deviation == 0


def test_snr_is_alpha_bar_over_the_rest() -> None:
    t = torch.tensor([0, 10, 999])
    alpha_bar = STABLE_DIFFUSION.alphas_cumprod[t]
    torch.testing.assert_close(STABLE_DIFFUSION.snr(t), alpha_bar / (1 - alpha_bar), rtol=1e-12, atol=0)


def test_log_snr_is_half_the_log_of_the_snr() -> None:
    sigma = float(STABLE_DIFFUSION.sigmas[300])
    snr = float(STABLE_DIFFUSION.snr(torch.tensor([300]))[0])
    assert STABLE_DIFFUSION.log_snr(sigma) == pytest.approx(0.5 * math.log(snr), abs=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_zero_terminal_snr_equals_diffusers(schedule: str) -> None:
    betas = NOISE_SCHEDULES[schedule](1000, 0.00085, 0.012)
    got = rescale_zero_terminal_snr(betas)
    # both in float64, only the order of operations differs
    torch.testing.assert_close(got, diffusers_rescale(betas), rtol=1e-9, atol=1e-14)
    assert got[-1] == 1
    assert got[0] == pytest.approx(float(betas[0]), rel=1e-9)


def test_zero_terminal_snr_keeps_sigma_finite() -> None:
    # diffusers sets the last alpha_bar to 2**-24 as well: sigma is sqrt(2**24 - 1), just below 4096
    scheduler = diffusers.EulerDiscreteScheduler(rescale_betas_zero_snr=True)
    assert float(scheduler.alphas_cumprod[-1]) == ZERO_SNR_FLOOR
    assert ZERO_SNR.sigma_max == pytest.approx(4096, rel=1e-7)
    assert torch.isfinite(ZERO_SNR.sigmas).all()


@given(st.floats(0, 999), st.sampled_from([STABLE_DIFFUSION, ZERO_SNR]))
def test_timestep_inverts_sigma(timestep: float, process: Process) -> None:
    # neighbouring log sigmas are at least 5e-4 apart, so 1e-16 in the logarithm is below 1e-11 of a timestep
    assert process.timestep(process.sigma(timestep)) == pytest.approx(timestep, abs=1e-9)


@given(st.floats(0.0292, 14.6))
def test_sigma_inverts_timestep(sigma: float) -> None:
    assert STABLE_DIFFUSION.sigma(STABLE_DIFFUSION.timestep(sigma)) == pytest.approx(sigma, rel=1e-12)


@given(st.integers(0, 999))
def test_whole_timesteps_are_the_table(timestep: int) -> None:
    assert STABLE_DIFFUSION.sigma(timestep) == pytest.approx(float(STABLE_DIFFUSION.sigmas[timestep]), rel=1e-12)


def test_timesteps_outside_are_clamped() -> None:
    assert STABLE_DIFFUSION.timestep(0) == 0
    assert STABLE_DIFFUSION.timestep(1e-9) == 0
    assert STABLE_DIFFUSION.timestep(1e9) == 999
    assert STABLE_DIFFUSION.sigma(-5) == STABLE_DIFFUSION.sigma_min
    assert STABLE_DIFFUSION.sigma(5000) == pytest.approx(STABLE_DIFFUSION.sigma_max, rel=1e-12)


@given(st.floats(1e-3, 1.0), st.sampled_from([1.0, 3.0]))
def test_flow_timestep_and_sigma(sigma: float, shift: float) -> None:
    flow = FlowProcess(shift=shift)
    x0, noise = torch.tensor([2.0], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)
    x = flow.noised(x0, noise, torch.tensor(sigma, dtype=torch.float64))
    assert float(x) == pytest.approx(flow.alpha(sigma) * 2 - sigma, abs=1e-12)
    assert flow.timestep(sigma) == pytest.approx(1000 * sigma)
    shifted = shift * sigma / (1 + (shift - 1) * sigma)  # Esser et al. 2024, equation 23
    assert flow.sigma(1000 * sigma) == pytest.approx(shifted, rel=1e-12)


def test_unknown_schedule_suggests_the_nearest() -> None:
    with pytest.raises(RequestError, match="did you mean 'scaled_linear'"):
        Process.named("scaled-lineer")
    assert NOISE_SCHEDULES.name("squaredcos_cap_v2") == "cosine"
