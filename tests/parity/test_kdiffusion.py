"""k-diffusion asks its network the same questions, step by step, and so comes to the same sample."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from reverie.diffusion.noise import BrownianNoise
from reverie.diffusion.process import Process
from reverie.diffusion.spacing import space
from reverie.sampling.registry import load_all
from tests import tiny
from tests.parity import kdiffusion
from tests.sampling import mixture

kd = kdiffusion.load()
SAMPLERS = load_all()
PROCESS = Process.named()
SHAPE = (2, 4, 4, 4)
Denoise = Callable[[Tensor, float], Tensor]

CHURN = {"s_churn": 3.0, "s_tmin": 0.3, "s_tmax": 9.0, "s_noise": 1.01}
SOME = {"eta": 0.6, "s_noise": 0.9}
# our sampler, their function, options of both, options of ours alone, options of theirs alone
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("euler", "sample_euler", {}, {}, {}),
    ("euler", "sample_euler", CHURN, {}, {}),
    ("heun", "sample_heun", {}, {}, {}),
    ("heun", "sample_heun", CHURN, {}, {}),
    ("dpm_2", "sample_dpm_2", {}, {}, {}),
    ("dpm_2", "sample_dpm_2", CHURN, {}, {}),
    ("lms", "sample_lms", {}, {}, {}),
    ("lms", "sample_lms", {"order": 2}, {}, {}),
    ("euler_a", "sample_euler_ancestral", {}, {}, {}),
    ("euler_a", "sample_euler_ancestral", SOME, {}, {}),
    ("dpm_2_a", "sample_dpm_2_ancestral", {}, {}, {}),
    ("dpm_2_a", "sample_dpm_2_ancestral", SOME, {}, {}),
    ("dpmpp_2s_a", "sample_dpmpp_2s_ancestral", {}, {}, {}),
    ("dpmpp_2s_a", "sample_dpmpp_2s_ancestral", SOME, {}, {}),
    ("dpmpp_2m", "sample_dpmpp_2m", {}, {"lower_order_final": False}, {}),
    ("dpmpp_sde", "sample_dpmpp_sde", {}, {}, {}),
    ("dpmpp_sde", "sample_dpmpp_sde", {**SOME, "r": 0.4}, {}, {}),
    ("dpmpp_2m_sde", "sample_dpmpp_2m_sde", {}, {}, {}),
    ("dpmpp_2m_sde", "sample_dpmpp_2m_sde", SOME, {}, {}),
    ("dpmpp_2m_sde_heun", "sample_dpmpp_2m_sde", {}, {}, {"solver_type": "heun"}),
    ("dpmpp_2m_sde_heun", "sample_dpmpp_2m_sde", {"eta": 0.0}, {}, {"solver_type": "heun"}),
    ("dpmpp_3m_sde", "sample_dpmpp_3m_sde", {}, {}, {}),
    ("dpmpp_3m_sde", "sample_dpmpp_3m_sde", SOME, {}, {}),
    ("dpm_fast", "sample_dpm_fast", {}, {}, {}),
    ("dpm_fast", "sample_dpm_fast", SOME, {}, {}),
    ("dpm_adaptive", "sample_dpm_adaptive", {}, {}, {}),
    ("dpm_adaptive", "sample_dpm_adaptive", SOME, {}, {}),
    ("dpm_adaptive", "sample_dpm_adaptive", {"order": 2, "rtol": 0.02, "pcoeff": 0.2, "dcoeff": 0.1}, {}, {}),
]
# between two sigmas above 0 as well; n 8, 9 and 10 are the three kinds of n for dpm_fast
SPACINGS = {"karras": ("karras", 8, 0), "exponential": ("exponential", 9, 0), "linspace": ("linspace", 10, 0),
            "above 0": ("karras", 9, 2)}  # fmt: skip


@pytest.fixture
def float64() -> Iterator[None]:
    """So that what k-diffusion makes of Python floats does not round; restored for the other tests."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@cache
def network() -> Denoise:
    """A U-Net with random weights, in float64: what it says is less smooth than a mixture of Gaussians."""
    torch.manual_seed(0)
    unet = tiny.unet(
        layers_per_block=1, block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    ).double()  # fmt: skip
    context = torch.randn(1, 5, 64, dtype=torch.float64)

    @torch.no_grad()
    def denoise(x: Tensor, sigma: float) -> Tensor:
        t = torch.tensor(PROCESS.timestep(sigma))
        eps: Tensor = unet(x / PROCESS.scale(sigma), t, context.expand(len(x), -1, -1)).sample
        return x - sigma * eps

    return denoise


class Watched:
    """Any denoiser, remembering what it was asked."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise = denoise
        self.asked: list[tuple[float, Tensor]] = []

    def __call__(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        level = float(sigma.flatten()[0]) if isinstance(sigma, Tensor) else sigma
        self.asked.append((level, x.clone()))
        return self.denoise(x, level)


class Noises:
    """The same numbers for both, remembering which increments were asked for."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)
        self.asked: list[list[float]] = []

    def __call__(self, *levels: float | Tensor) -> Tensor:
        self.asked.append([float(level) for level in levels])
        return torch.randn(SHAPE, generator=self.generator, dtype=torch.float64)


def theirs(function: str, model: Watched, x: Tensor, sigmas: Tensor, noises: Noises, **options: Any) -> Tensor:
    if function in {"sample_dpm_fast", "sample_dpm_adaptive"}:
        end = float(sigmas[-1]) or float(sigmas[-2])
        n = [len(sigmas) - 1] if function == "sample_dpm_fast" else []
        result = getattr(kd, function)(model, x, end, float(sigmas[0]), *n, disable=True, **options)
    else:
        result = getattr(kd, function)(model, x, sigmas, disable=True, **options)
    assert isinstance(result, Tensor)
    return result


def compare(monkeypatch: pytest.MonkeyPatch, denoise: Denoise, case: int, sigmas: Tensor, tolerance: float) -> None:
    name, function, both, our_options, their_options = CASES[case]
    entry = SAMPLERS[name]
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * float(sigmas[0])
    our_model, their_model, our_noises, their_noises = Watched(denoise), Watched(denoise), Noises(), Noises()
    our_options = {**both, **our_options}
    ours = entry.function(our_model, x, sigmas, noise=our_noises, process=PROCESS, **our_options)
    if entry.brownian:
        their_options = {**their_options, "noise_sampler": their_noises}
    monkeypatch.setattr(torch, "randn_like", lambda x: their_noises())
    want = theirs(function, their_model, x, sigmas, their_noises, **both, **their_options)

    assert len(our_model.asked) == len(their_model.asked)
    for (our_level, our_x), (their_level, their_x) in zip(our_model.asked, their_model.asked, strict=True):
        assert our_level == pytest.approx(their_level, rel=1e-11)
        torch.testing.assert_close(our_x, their_x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours, want, rtol=tolerance, atol=tolerance)
    if entry.brownian:
        for our_levels, their_levels in zip(our_noises.asked, their_noises.asked, strict=False):
            assert our_levels == pytest.approx(their_levels, rel=1e-11)


IDS = [f"{case[0]} {','.join(case[2])}".strip() for case in CASES]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("case", range(len(CASES)), ids=IDS)
def test_step_by_step_on_a_mixture(monkeypatch: pytest.MonkeyPatch, case: int, spacing: str) -> None:
    """Float64 rounding, which the denoiser magnifies where two modes part. Measured: 3e-13, relative."""
    name, n, cut = SPACINGS[spacing]
    compare(monkeypatch, mixture.denoise, case, space(name, n, PROCESS)[: n + 1 - cut], 1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("case", [i for i, case in enumerate(CASES) if case[0] not in {c[0] for c in CASES[:i]}])
def test_step_by_step_on_a_network(monkeypatch: pytest.MonkeyPatch, case: int) -> None:
    """Every sampler once, as above."""
    compare(monkeypatch, network(), case, space("karras", 5, PROCESS), 1e-9)


@pytest.mark.filterwarnings("ignore:Should have t[ab]")  # their times round to just outside the tree's ends
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_brownian_paths_bit_for_bit(spacing: str) -> None:
    """Float32, as AUTOMATIC1111 makes them: a tree per picture, between the lowest sigma above 0 and the highest."""
    sigmas, seeds = space(spacing, 12, PROCESS), [0, 7, 2**63 + 5]
    levels = sigmas.float()
    x = torch.zeros(3, *SHAPE[1:], dtype=torch.float32)
    theirs = kd.BrownianTreeNoiseSampler(x, levels[levels > 0].min(), levels.max(), seed=seeds)
    ours = BrownianNoise(seeds, SHAPE[1:], "cpu", float(sigmas[-2]), float(sigmas[0]))
    for i in (0, 1, 5, 10, 3):
        assert torch.equal(ours(float(sigmas[i]), float(sigmas[i + 1])), theirs(levels[i], levels[i + 1]))
    assert torch.equal(ours(2.0, 5.0), theirs(torch.tensor(2.0), torch.tensor(5.0)))  # upwards too


@pytest.mark.filterwarnings("ignore:Should have t[ab]")
@pytest.mark.parametrize(("name", "tolerance"), [("dpmpp_sde", 3e-3), ("dpmpp_2m_sde", 1e-4), ("dpmpp_3m_sde", 1e-4)])
def test_sde_samplers_along_the_same_paths(name: str, tolerance: float) -> None:
    """All in float32, as pictures are drawn; what log and exp of sigma lose there decides (theirs are tensors).

    In dpmpp_sde the times of the path pass through both: they end up a millionth away, a path the root of that.
    """
    sigmas, seeds = space("exponential", 10, PROCESS), [3, 4]
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float32) * float(sigmas[0])
    noise = BrownianNoise(seeds, SHAPE[1:], "cpu", float(sigmas[-2]), float(sigmas[0]))
    ours = SAMPLERS[name].function(mixture.denoise, x, sigmas, noise=noise, process=PROCESS)
    levels = sigmas.float()
    paths = kd.BrownianTreeNoiseSampler(x, levels[levels > 0].min(), levels.max(), seed=seeds)
    want = theirs(f"sample_{name}", Watched(mixture.denoise), x, levels, Noises(), noise_sampler=paths)
    assert ours.dtype == want.dtype == torch.float32
    torch.testing.assert_close(ours, want, rtol=tolerance, atol=tolerance)
