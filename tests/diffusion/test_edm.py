"""EDM's preconditioning against diffusers, and what every process promises."""

import pytest
import torch
from torch import Tensor

from reverie.diffusion.parameterisation import Edm, V
from reverie.diffusion.process import AnyProcess, EdmProcess, FlowProcess, Process
from tests.tiny import diffusers

PROCESSES: dict[str, AnyProcess] = {
    "stable diffusion": Process.named(),
    "flow": FlowProcess(),
    "shifted flow": FlowProcess(shift=3.0),
    "edm": EdmProcess(),
    "cosxl": EdmProcess(0.002, 120.0, 1.0),
}
SIGMAS = (0.002, 0.03, 0.5, 1.0, 14.6, 80.0)


def sample(seed: int = 0) -> Tensor:
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("data", [0.5, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_preconditioning_equals_diffusers(data: float, prediction: str) -> None:
    scheduler = diffusers.EDMEulerScheduler(sigma_data=data, prediction_type=prediction)
    ours, process = Edm(data, v=prediction == "v_prediction"), EdmProcess(sigma_data=data)
    x, answer = sample(1), sample(2)
    for sigma in SIGMAS:
        k = ours.at(sigma)
        torch.testing.assert_close(k.into * x, scheduler.precondition_inputs(x, sigma), rtol=1e-6, atol=1e-6)
        want = scheduler.precondition_outputs(x, answer, sigma)
        torch.testing.assert_close(k.skip * x + k.out * answer, want, rtol=1e-6, atol=1e-6)
        assert process.timestep(sigma) == pytest.approx(float(scheduler.precondition_noise(sigma)), rel=1e-6)


@pytest.mark.parametrize("v", [False, True])
def test_the_true_target_gives_x0_and_has_variance_1(v: bool) -> None:
    g = torch.Generator().manual_seed(4)
    x0 = 0.5 * torch.randn(200_000, generator=g, dtype=torch.float64)
    noise = torch.randn(200_000, generator=g, dtype=torch.float64)
    for sigma in SIGMAS:
        level = torch.tensor(sigma, dtype=torch.float64)
        target, k = Edm(0.5, v=v).target(x0, noise, level), Edm(0.5, v=v).at(sigma)
        torch.testing.assert_close(k.skip * (x0 + sigma * noise) + k.out * target, x0)
        assert float(target.var()) == pytest.approx(1, abs=0.02)  # 200,000 draws: 0.003
        assert float(Edm(0.5, v=v).loss_weight(level)) == pytest.approx(k.out**2)


def test_with_unit_data_and_v_it_is_v() -> None:
    for sigma in SIGMAS:
        ours, v = Edm(1.0, v=True).at(sigma), V().at(sigma)
        assert (ours.skip, ours.out, ours.into) == pytest.approx((v.skip, v.out, v.into), rel=1e-12)


@pytest.mark.parametrize("name", list(PROCESSES))
def test_the_table_is_the_range_in_order(name: str) -> None:
    process = PROCESSES[name]
    table = process.sigmas
    assert table.shape == (process.steps,)
    assert (table.diff() > 0).all()
    assert float(table[0]) == pytest.approx(process.sigma_min, rel=1e-12)
    assert float(table[-1]) == pytest.approx(process.sigma_max, rel=1e-12)
    for i in (0, 1, 500, process.steps - 1):
        assert process.at(i) == pytest.approx(float(table[i]), rel=1e-12)
    assert table[499] < process.at(499.5) < table[500]


@pytest.mark.parametrize("name", list(PROCESSES))
def test_ends_are_the_timesteps_of_the_range(name: str) -> None:
    process = PROCESSES[name]
    assert process.ends == pytest.approx((process.timestep(process.sigma_max), process.timestep(process.sigma_min)))


def test_edm_timesteps_and_sigmas_are_inverse() -> None:
    process = EdmProcess()
    for sigma in SIGMAS:
        assert process.sigma(process.timestep(sigma)) == pytest.approx(sigma, rel=1e-12)
    assert process.timestep(0.0) == process.ends[1]


@pytest.mark.parametrize("name", list(PROCESSES))
def test_posterior_keeps_the_marginal(name: str) -> None:
    """A sample of q(x_t | x0), then one of q(x_s | x_t, x0), is one of q(x_s | x0)."""
    process = PROCESSES[name]
    x0 = torch.tensor([0.7], dtype=torch.float64)
    for sigma, down in (
        (process.at(900), process.at(500)),
        (process.sigma_max, process.at(3)),
        (process.at(2), process.at(1)),
    ):
        centre, deviation = process.posterior(x0, process.alpha(sigma) * x0, sigma, down)
        one, _ = process.posterior(x0, process.alpha(sigma) * x0 + sigma, sigma, down)
        assert float(centre) == pytest.approx(process.alpha(down) * 0.7, rel=1e-9)
        assert float(one - centre) ** 2 + deviation**2 == pytest.approx(down**2, rel=1e-9)
