"""The losses against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reverie.diffusion.parameterisation import PARAMETERISATIONS
from reverie.diffusion.process import Process
from reverie.train.loss import diffusion_loss, gradient_loss, kl_divergence, psnr

PROCESS = Process.named()
NAMES = ["epsilon", "v_prediction", "sample"]
TIMESTEPS = torch.tensor([0, 100, 400, 999])


def sample() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, 2, 3, 3, generator=g), torch.randn(4, 2, 3, 3, generator=g)


def sigmas() -> Tensor:
    return PROCESS.sigmas[TIMESTEPS].float()[:, None, None, None]


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_network_that_knows_has_no_loss(name: str, gamma: float | None) -> None:
    """It sees `c_in x` and t and answers the target that the papers state in DDPM terms."""
    x0, noise = sample()
    alpha_bar = PROCESS.alphas_cumprod[TIMESTEPS].float()[:, None, None, None]
    answers = {
        "epsilon": noise,
        "v_prediction": alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0,
        "sample": x0,
    }
    told: list[Tensor] = []

    def network(x: Tensor, timesteps: Tensor) -> Tensor:
        told.append(timesteps)
        want = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise  # DDPM's x_t
        torch.testing.assert_close(x, want, rtol=1e-5, atol=1e-5)  # float32
        return answers[name]

    loss = diffusion_loss(network, x0, noise, TIMESTEPS, process=PROCESS,
                          parameterisation=PARAMETERISATIONS[name], snr_gamma=gamma)  # fmt: skip
    assert float(loss) < 1e-10  # float32 squared
    assert torch.equal(told[0], TIMESTEPS)


def weights(name: str, gamma: float | None) -> Tensor:
    """The loss of a network that is wrong by 1 everywhere is the mean of the weights: one row at a time reads them."""
    x0, noise = sample()
    rows = []
    for i, t in enumerate(TIMESTEPS):
        target = PARAMETERISATIONS[name].target(x0[i : i + 1], noise[i : i + 1], sigmas()[i : i + 1])
        rows.append(
            diffusion_loss(
                lambda x, t, target=target: target + 1,  # type: ignore[misc]
                x0[i : i + 1],
                noise[i : i + 1],
                t[None],
                process=PROCESS,
                parameterisation=PARAMETERISATIONS[name],
                snr_gamma=gamma,
            )
        )
    return torch.stack(rows)


@pytest.mark.parametrize("name", NAMES)
def test_without_gamma_every_timestep_counts_alike(name: str) -> None:
    torch.testing.assert_close(weights(name, None), torch.ones(4), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_weights_are_the_published_ones(gamma: float) -> None:
    """Hang et al. 2023, section 3.4: min(SNR, gamma) for x0, / SNR for the noise, / (SNR + 1) for v."""
    snr = PROCESS.snr(TIMESTEPS)
    least = snr.clamp(max=gamma)
    for name, want in (("sample", least), ("epsilon", least / snr), ("v_prediction", least / (snr + 1))):
        # float32: the error of 1 is formed by adding it to the target, and SNR at t = 0 is 1175
        torch.testing.assert_close(weights(name, gamma).double(), want, rtol=1e-5, atol=0)


def test_gradients_reach_the_network() -> None:
    x0, noise = sample()
    scale = torch.ones((), requires_grad=True)
    loss = diffusion_loss(lambda x, t: scale * x, x0, noise, TIMESTEPS, process=PROCESS,
                          parameterisation=PARAMETERISATIONS["v"], snr_gamma=5.0)  # fmt: skip
    loss.backward()  # type: ignore[no-untyped-call]
    assert scale.grad is not None
    assert float(scale.grad) != 0


def test_kl_divergence_equals_torch() -> None:
    mean, log_variance = sample()
    ours = kl_divergence(mean, log_variance)
    q = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    want = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-6)
    assert float(kl_divergence(torch.zeros(3), torch.zeros(3))) == 0


def test_gradient_loss_sees_edges_and_not_brightness() -> None:
    flat = torch.zeros(1, 3, 4, 4)
    assert float(gradient_loss(flat + 0.5, flat)) == 0
    edge = flat.clone()
    edge[..., 2:] = 1  # one of the three neighbouring pairs across differs by 1, none of those down
    assert float(gradient_loss(edge, flat)) == pytest.approx(1 / 3)


@pytest.mark.parametrize("error", [0.1, 0.5])
def test_psnr(error: float) -> None:
    target = torch.zeros(2, 3, 4, 4)
    want = 10 * torch.log10(4 / F.mse_loss(target + error, target))  # the range [-1, 1] has peak 2
    torch.testing.assert_close(psnr(target + error, target), want)
