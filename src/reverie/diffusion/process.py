"""Noise schedules and the forward process.

Throughout Reverie a noisy sample is `x = alpha(sigma) * x0 + sigma * noise` (Karras et al. 2022, "EDM"):

- variance preserving (Stable Diffusion 1, 2, XL): `alpha = 1`, so `x` is the DDPM sample `x_t` divided by
  `sqrt(alphas_cumprod)`, and `sigma = sqrt((1 - alphas_cumprod) / alphas_cumprod)`;
- rectified flow (Stable Diffusion 3): `alpha = 1 - sigma`, `sigma` in [0, 1];
- EDM with continuous noise levels (Playground 2.5, CosXL): `alpha = 1`, the network is told `log(sigma) / 4`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from reverie.registry import Registry

# ᾱ of the last step under zero-terminal SNR: 0 would make sigma infinite. diffusers uses the same number.
ZERO_SNR_FLOOR = 2.0**-24


def linear_betas(steps: int, start: float, end: float) -> Tensor:
    """`beta_t` equally spaced (Ho et al. 2020, DDPM, section 4). Returns `(steps,)` float64."""
    return torch.linspace(start, end, steps, dtype=torch.float64)


def scaled_linear_betas(steps: int, start: float, end: float) -> Tensor:
    """`sqrt(beta_t)` equally spaced (CompVis, the schedule of Stable Diffusion). Returns `(steps,)` float64."""
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2


def cosine_betas(steps: int, start: float = 0.0, end: float = 0.999) -> Tensor:
    """Betas whose ᾱ follows a squared cosine (Nichol & Dhariwal 2021, equation 17), clipped at 0.999.

    `start` and `end` are unused: the schedule has no free ends. Returns `(steps,)` float64.
    """
    del start, end
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    alpha_bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


NOISE_SCHEDULES = Registry[Callable[[int, float, float], Tensor]]("noise schedule")
NOISE_SCHEDULES.add("linear", linear_betas)
NOISE_SCHEDULES.add("scaled_linear", scaled_linear_betas)
NOISE_SCHEDULES.add("cosine", cosine_betas, ("squaredcos_cap_v2",))


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and stretch `sqrt(ᾱ)` so that the last step carries no signal (Lin et al. 2023, algorithm 1).

    Args:
        betas: `(T,)`.

    Returns:
        `(T,)` betas; the last one is 1, that is ᾱ_T = 0.
    """
    root = torch.cumprod(1 - betas, 0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * first / (first - last)
    alpha_bar = root**2
    alphas = torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return 1 - alphas


def q_step(x: Tensor, beta: Tensor, noise: Tensor) -> Tensor:
    """One step of the forward chain, q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I) (DDPM, equation 2).

    `x`, `noise` `(B, ...)` in DDPM units (unit variance at the end of the chain); `beta` broadcastable to them.
    """
    return (1 - beta).sqrt() * x + beta.sqrt() * noise


class _SigmaUnits:
    """What processes with `x = x0 + sigma * noise` share."""

    def alpha(self, sigma: float) -> float:
        """The factor of x0 in `x`: 1 here, because `x` is kept in units of sigma."""
        del sigma
        return 1.0

    def scale(self, sigma: float) -> float:
        """`sqrt(1 + sigma²)`: `x` divided by it is the DDPM sample x_t, whose variance is 1."""
        return math.sqrt(1 + sigma * sigma)

    def log_snr(self, sigma: float) -> float:
        """Half the log signal-to-noise ratio, `lambda = log(alpha / sigma)` (Lu et al. 2022, DPM-Solver)."""
        return math.log(self.alpha(sigma) / sigma)

    def noised(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """q(x_t | x_0) in closed form (DDPM, equation 4): `x0 + sigma * noise`. `sigma` broadcastable to `x0`."""
        return x0 + sigma * noise

    def posterior(self, x0: Tensor, x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, float]:
        """q(x_s | x_t, x_0), s < t (DDPM, equations 6 and 7, in units of sigma).

        Returns:
            The mean, shaped like `x`, and the standard deviation.
        """
        ratio = (sigma_next / sigma) ** 2
        mean = x0 + ratio * (x - x0)
        return mean, sigma_next * math.sqrt(max(1 - ratio, 0.0))


@dataclass(frozen=True, eq=False)
class Process(_SigmaUnits):
    """A variance-preserving diffusion process in units of sigma.

    Attributes:
        betas: `(T,)` float64, the noise schedule the model was trained with.
    """

    discrete: ClassVar[bool] = True  # the network was trained on whole timesteps alone
    limit: ClassVar[float] = math.inf  # no sigma is above it

    betas: Tensor

    @classmethod
    def named(
        cls,
        schedule: str = "scaled_linear",
        *,
        steps: int = 1000,
        start: float = 0.00085,
        end: float = 0.012,
        zero_terminal_snr: bool = False,
    ) -> "Process":
        """The process of a named noise schedule. The defaults are Stable Diffusion's (CompVis v1-inference.yaml)."""
        betas = NOISE_SCHEDULES[schedule](steps, start, end)
        return cls(rescale_zero_terminal_snr(betas) if zero_terminal_snr else betas)

    @property
    def steps(self) -> int:
        """T, the number of training timesteps."""
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ_t, `(T,)` float64, never quite zero (see `ZERO_SNR_FLOOR`)."""
        product = torch.cumprod(1 - self.betas, 0)
        return product.where(product > 0, ZERO_SNR_FLOOR)  # a cosine schedule's last, 2e-9, is below and stays

    @cached_property
    def sigmas(self) -> Tensor:
        """`sqrt((1 - ᾱ_t) / ᾱ_t)`, `(T,)` float64, ascending."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    @cached_property
    def _log_sigmas(self) -> list[float]:
        values: list[float] = self.sigmas.log().tolist()
        return values

    @property
    def sigma_min(self) -> float:
        """The smallest trained noise level."""
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """The largest trained noise level."""
        return float(self.sigmas[-1])

    @property
    def ends(self) -> tuple[float, float]:
        """The timesteps of `sigma_max` and `sigma_min`: T-1 and 0."""
        return self.steps - 1.0, 0.0

    def at(self, index: float) -> float:
        """Sigma at a place in the table `sigmas`, which may lie between two: here the timestep is the place."""
        return self.sigma(index)

    def snr(self, timesteps: Tensor) -> Tensor:
        """ᾱ / (1 - ᾱ) at integer `timesteps` `(B,)`; float64 `(B,)` (Kingma et al. 2021)."""
        return self.sigmas[timesteps.cpu()] ** -2

    def sigma(self, timestep: float) -> float:
        """Sigma at a timestep in [0, T-1]; log sigma is linear between neighbours (k-diffusion's rule)."""
        table = self._log_sigmas
        t = min(max(timestep, 0.0), len(table) - 1.0)
        low = min(int(t), len(table) - 2)
        w = t - low
        return math.exp((1 - w) * table[low] + w * table[low + 1])

    def timestep(self, sigma: float) -> float:
        """The timestep whose sigma this is, the inverse of `sigma`; clamped to [0, T-1]."""
        if sigma <= 0:
            return 0.0
        table = self._log_sigmas
        value = math.log(sigma)
        high = int(torch.searchsorted(self.sigmas, sigma))
        high = min(max(high, 1), len(table) - 1)
        w = (value - table[high - 1]) / (table[high] - table[high - 1])
        return min(max(high - 1 + w, 0.0), len(table) - 1.0)


@dataclass(frozen=True)
class FlowProcess:
    """Rectified flow, `x = (1 - sigma) x0 + sigma noise` (Liu et al. 2022; Esser et al. 2024, Stable Diffusion 3).

    Attributes:
        steps: timesteps of the network per unit of sigma.
        shift: resolution-dependent timestep shift (Esser et al. 2024, equation 23).
    """

    discrete: ClassVar[bool] = False
    limit: ClassVar[float] = 1.0

    steps: int = 1000
    shift: float = 1.0

    @cached_property
    def sigmas(self) -> Tensor:
        """The trained noise levels, `sigma(1)` to `sigma(T)`; `(T,)` float64, ascending, the last is 1."""
        return torch.tensor([self.sigma(t) for t in range(1, self.steps + 1)], dtype=torch.float64)

    @property
    def sigma_max(self) -> float:
        """The largest noise level, 1."""
        return 1.0

    @property
    def ends(self) -> tuple[float, float]:
        """The timesteps of `sigma_max` and `sigma_min`. They are shifted already; `sigma` would shift them again."""
        return self.timestep(self.sigma_max), self.timestep(self.sigma_min)

    def at(self, index: float) -> float:
        """Sigma at a place in the table `sigmas`, which may lie between two."""
        return self.sigma(index + 1)

    @property
    def sigma_min(self) -> float:
        """The smallest trained noise level."""
        return self.sigma(1.0)

    def alpha(self, sigma: float) -> float:
        """The factor of x0 in `x`."""
        return 1.0 - sigma

    def scale(self, sigma: float) -> float:
        """1: the network sees `x` as it is."""
        del sigma
        return 1.0

    def log_snr(self, sigma: float) -> float:
        """`lambda = log(alpha / sigma)`; -inf at pure noise."""
        return -math.inf if sigma >= 1 else math.log(self.alpha(sigma) / sigma)

    def sigma(self, timestep: float) -> float:
        """Sigma at a timestep in [0, steps], shifted."""
        t = min(max(timestep / self.steps, 0.0), 1.0)
        return self.shift * t / (1 + (self.shift - 1) * t)

    def timestep(self, sigma: float) -> float:
        """The number the network is told: `sigma * steps` (the shift is already in sigma)."""
        return sigma * self.steps

    def noised(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The straight path between data and noise. `sigma` broadcastable to `x0`."""
        return (1 - sigma) * x0 + sigma * noise

    def posterior(self, x0: Tensor, x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, float]:
        """q(x_s | x_t, x_0), s < t, of the chain whose marginals are those of the flow.

        DDPM, equations 6 and 7, for `x / alpha` with noise level `sigma / alpha`.

        Returns:
            The mean, shaped like `x`, and the standard deviation; from pure noise the mean is `alpha_s x0`.
        """
        alpha, alpha_next = self.alpha(sigma), self.alpha(sigma_next)
        ratio = (sigma_next * alpha / (alpha_next * sigma)) ** 2
        mean = alpha_next * (1 - ratio) * x0 + alpha * sigma_next**2 / (alpha_next * sigma**2) * x
        return mean, sigma_next * math.sqrt(max(1 - ratio, 0.0))


@dataclass(frozen=True)
class EdmProcess(_SigmaUnits):
    """Continuous noise levels and the network told `c_noise = log(sigma) / 4` (Karras et al. 2022, Table 1).

    Attributes:
        sigma_min, sigma_max: the ends of the range (0.002 and 80 in the paper).
        sigma_data: standard deviation of the data (0.5 in the paper and in Playground 2.5, 1 in CosXL).
        steps: entries of the table `sigmas`.
    """

    discrete: ClassVar[bool] = False
    limit: ClassVar[float] = math.inf

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    steps: int = 1000

    @cached_property
    def sigmas(self) -> Tensor:
        """The range in equal steps of log sigma, `(steps,)` float64, ascending: equal steps of `c_noise`."""
        return torch.tensor([self.at(i) for i in range(self.steps)], dtype=torch.float64)

    @property
    def ends(self) -> tuple[float, float]:
        """The timesteps of `sigma_max` and `sigma_min`."""
        return self.timestep(self.sigma_max), self.timestep(self.sigma_min)

    def at(self, index: float) -> float:
        """Sigma at a place in the table `sigmas`, which may lie between two."""
        top, bottom = self.ends
        return self.sigma(bottom + (top - bottom) * index / max(self.steps - 1, 1))

    def sigma(self, timestep: float) -> float:
        """The inverse of `timestep`."""
        return math.exp(4 * timestep)

    def timestep(self, sigma: float) -> float:
        """What the network is told: `log(sigma) / 4`. Below the range it is told the end of the range."""
        return math.log(max(sigma, self.sigma_min)) / 4


AnyProcess: TypeAlias = Process | FlowProcess | EdmProcess
