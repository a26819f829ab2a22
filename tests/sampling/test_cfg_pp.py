"""The CFG++ samplers against their formulas written down once more, in float64.

Chung et al. 2024: x0 comes from the guided answer, the noise to go back from the unconditional one. What ComfyUI makes
of it for multistep methods (`comfy/k_diffusion/sampling.py`) is written here in its clock t = -log sigma.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from reverie.diffusion.spacing import space
from reverie.sampling.registry import load_all
from tests.sampling import mixture
from tests.sampling.gaussian import VP

SAMPLERS = load_all()
NAMES = [name for name in SAMPLERS if SAMPLERS[name].unconditional]
SHAPE = (2, 4, 3, 3)
SCALE = 1.4
KARRAS = space("karras", 7, VP)
ABOVE_ZERO = KARRAS[:-1]
Formula = Callable[["Model", Tensor, list[tuple[float, float]], float], Tensor]


def positive(x: Tensor, sigma: float) -> Tensor:
    """The denoiser of the first Gaussian of the mixture alone: what the prompt asks for."""
    mean = mixture.MEANS[0].to(x.dtype)[:, None, None]
    return mean + mixture.SPREAD**2 / (mixture.SPREAD**2 + sigma**2) * (x - mean)


class Model:
    """Both answers, and where they were asked for."""

    def __init__(self, scale: float = SCALE) -> None:
        self.scale = scale
        self.guided_at: list[tuple[float, Tensor]] = []
        self.unconditional_at: list[tuple[float, Tensor]] = []
        self.noise = torch.Generator().manual_seed(3)

    def unconditional(self, x: Tensor, sigma: float) -> Tensor:
        self.unconditional_at.append((sigma, x))
        return mixture.denoise(x, sigma)

    def guided(self, x: Tensor, sigma: float) -> Tensor:
        self.guided_at.append((sigma, x))
        without = mixture.denoise(x, sigma)
        return without + self.scale * (positive(x, sigma) - without)

    def draw(self) -> Tensor:
        return torch.randn(SHAPE, generator=self.noise, dtype=torch.float64)


def start(sigma: float) -> Tensor:
    return sigma * torch.randn(SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def ours(name: str, model: Model, sigmas: Tensor, **options: Any) -> Tensor:
    return SAMPLERS[name].function(
        model.guided, start(float(sigmas[0])), sigmas, noise=model.draw, process=VP,
        unconditional=model.unconditional, **options,
    )  # fmt: skip


def ddim(model: Model, x: Tensor, steps: list[tuple[float, float]], eta: float, strength: float = 1.0) -> Tensor:
    """CFG++, algorithm 2, on DDPM samples: `x_s = sqrt(a_s) x0(guided) + sqrt(1 - a_s) eps(unconditional)`."""
    for sigma, down in steps:
        a, a_next = 1 / (1 + sigma**2), 1 / (1 + down**2)
        x0, without = model.guided(x, sigma), model.unconditional(x, sigma)
        x0 = (1 - strength) * without + strength * x0
        x_t = x * math.sqrt(a)
        eps = (x_t - math.sqrt(a) * without) / math.sqrt(1 - a)
        fresh = eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
        x_t = math.sqrt(a_next) * x0 + math.sqrt(1 - a_next - fresh**2) * eps
        if fresh > 0:
            x_t = x_t + fresh * model.draw()
        x = x_t / math.sqrt(a_next)
    return x


def dpmpp_2m(model: Model, x: Tensor, steps: list[tuple[float, float]], eta: float) -> Tensor:
    old, before = None, math.nan
    for sigma, down in steps:
        x0, without = model.guided(x, sigma), model.unconditional(x, sigma)
        if down == 0:
            return x0
        h = math.log(sigma / down)
        x = x0 + math.exp(-h) * (x - without)
        if old is not None:
            x = x + (1 - math.exp(-h)) * h / (2 * math.log(before / sigma)) * (x0 - old)
        old, before = without, sigma
    return x


def split(sigma: float, down: float, eta: float) -> tuple[float, float]:
    up = eta * down * math.sqrt(1 - (down / sigma) ** 2)
    return math.sqrt(down**2 - up**2), up


def dpmpp_2s_a(model: Model, x: Tensor, steps: list[tuple[float, float]], eta: float) -> Tensor:
    for sigma, down in steps:
        x0, without = model.guided(x, sigma), model.unconditional(x, sigma)
        guidance, (target, up) = x0 - without, split(sigma, down, eta)
        if target > 0:
            middle = math.sqrt(sigma * target)
            halfway = without + middle / sigma * (x - without)
            model.guided(halfway, middle)
            without = model.unconditional(halfway, middle)
        x = without + target / sigma * (x - without) + guidance
        if up > 0:
            x = x + up * model.draw()
    return x


def res_multistep(model: Model, x: Tensor, steps: list[tuple[float, float]], eta: float) -> Tensor:
    """RES: `x + h (b_1 u_n + b_2 u_{n-1})` with `b_2 = phi_2(-h) / c_2`, `b_1 = phi_1(-h) - b_2`."""
    old, c = None, math.nan
    for sigma, down in steps:
        x0, without = model.guided(x, sigma), model.unconditional(x, sigma)
        target, up = split(sigma, down, eta)
        if old is None or target == 0:
            x = x0 + target / sigma * (x - without)
        else:
            h = math.log(sigma / target)
            phi_1 = (1 - math.exp(-h)) / h
            b_2 = (1 - phi_1) / h / (-c / h)
            x = math.exp(-h) * (x + x0 - without) + h * ((phi_1 - b_2) * without + b_2 * old)
        if up > 0:
            x = x + up * model.draw()
        old, c = without, math.log(sigma / target) if target > 0 else math.nan
    return x


def gradient_estimation(model: Model, x: Tensor, steps: list[tuple[float, float]], eta: float) -> Tensor:
    old = None
    for sigma, down in steps:
        x0, without = model.guided(x, sigma), model.unconditional(x, sigma)
        if down == 0:
            return x0
        d = (x - without) / sigma
        x = x0 + down * d
        if old is not None:
            x = x + (down - sigma) * (d - old)  # gamma 2
        old = d
    return x


def ddim_scaled(model: Model, x: Tensor, steps: list[tuple[float, float]], eta: float) -> Tensor:
    return ddim(model, x, steps, eta, 1 / 12.5)


# our sampler, its formula, its eta, whether that is an option
FORMULAS: list[tuple[str, Formula, float, bool]] = [
    ("euler_cfg_pp", ddim, 0.0, False),
    ("euler_a_cfg_pp", ddim, 1.0, True),
    ("euler_a_cfg_pp", ddim, 0.4, True),
    ("ddim_cfg_pp", ddim_scaled, 0.0, True),
    ("ddim_cfg_pp", ddim_scaled, 0.7, True),
    ("dpmpp_2m_cfg_pp", dpmpp_2m, 0.0, False),
    ("dpmpp_2s_a_cfg_pp", dpmpp_2s_a, 1.0, True),
    ("dpmpp_2s_a_cfg_pp", dpmpp_2s_a, 0.3, True),
    ("res_multistep_cfg_pp", res_multistep, 0.0, True),
    ("res_multistep_a_cfg_pp", res_multistep, 1.0, True),
    ("res_multistep_a_cfg_pp", res_multistep, 0.5, True),
    ("gradient_estimation_cfg_pp", gradient_estimation, 0.0, False),
]


@pytest.mark.parametrize("sigmas", [KARRAS, ABOVE_ZERO], ids=["to 0", "to sigma_min"])
@pytest.mark.parametrize("case", range(len(FORMULAS)), ids=[f"{f[0]} {f[2]}" for f in FORMULAS])
def test_formula(case: int, sigmas: Tensor) -> None:
    """Float64 rounding; measured: at most 2e-14 of the sample."""
    name, formula, eta, option = FORMULAS[case]
    got = ours(name, Model(), sigmas, **({"eta": eta} if option else {}))
    want = formula(Model(), start(float(sigmas[0])), list(pairwise(sigmas.tolist())), eta)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_every_cfg_pp_sampler_has_its_formula_here() -> None:
    assert {name for name, *_ in FORMULAS} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_unconditional_answer_is_asked_where_the_guided_one_was(name: str) -> None:
    """Engines answer it from the same evaluation of the network, so the two calls have to alternate."""
    model = Model()
    ours(name, model, KARRAS)
    assert len(model.guided_at) == len(model.unconditional_at) == SAMPLERS[name].evaluations(len(KARRAS) - 1)
    for guided, unconditional in zip(model.guided_at, model.unconditional_at, strict=True):
        assert guided[0] == unconditional[0]
        assert guided[1] is unconditional[1]


# without guidance each is the sampler that it is named after; options of theirs and of ours
PLAIN: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "euler_cfg_pp": ("euler", {}, {}),
    "euler_a_cfg_pp": ("euler_a", {}, {}),
    "ddim_cfg_pp": ("ddim", {"eta": 0.6}, {"eta": 0.6}),
    "dpmpp_2m_cfg_pp": ("dpmpp_2m", {"lower_order_final": False}, {}),
    "dpmpp_2s_a_cfg_pp": ("dpmpp_2s_a", {}, {}),
    "res_multistep_cfg_pp": ("res_multistep", {}, {}),
    "res_multistep_a_cfg_pp": ("res_multistep_ancestral", {}, {}),
    "gradient_estimation_cfg_pp": ("gradient_estimation", {"ge_gamma": 1.6}, {"ge_gamma": 1.6}),
}


@pytest.mark.parametrize("name", NAMES)
def test_without_guidance_it_is_the_sampler_of_its_name(name: str) -> None:
    plain, their_options, options = PLAIN[name]
    model, other = Model(scale=0.0), Model(scale=0.0)
    want = SAMPLERS[plain].function(
        other.guided, start(float(KARRAS[0])), KARRAS, noise=other.draw, process=VP, **their_options
    )
    torch.testing.assert_close(ours(name, model, KARRAS, **options), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_guidance_draws_towards_the_prompt(name: str) -> None:
    """At scale 1 every sample ends in the prompt's Gaussian (A1111's DDIM CFG++ at 12.5); unguided, half of them."""
    towards = mixture.MEANS[0].double()[:, None, None]

    def near(scale: float) -> float:
        x = ours(name, Model(scale=scale), space("karras", 30, VP))
        return float(((x - towards) ** 2).sum(1).sqrt().lt(4 * mixture.SPREAD).double().mean())

    scale = 12.5 if name == "ddim_cfg_pp" else 1.0
    assert near(scale) == 1
    assert near(0.0) < 0.9
