"""What holds for every sampler of the table, whatever its mathematics."""

import inspect
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path as File
from typing import Any

import pytest
import torch
from torch import Tensor

import reverie.sampling.samplers
from reverie.diffusion.noise import BrownianNoise, SeededNoise
from reverie.diffusion.process import AnyProcess, Process
from reverie.diffusion.spacing import space
from reverie.errors import GenerationError, RequestError
from reverie.sampling.registry import Sampler
from reverie.types import Denoise, Noise
from tests.sampling.gaussian import FLOW, SAMPLERS, VP, Path, denoiser, logarithmic, run

NAMES = list(SAMPLERS)
FLOWING = [name for name in NAMES if SAMPLERS[name].flow]
STEPPING = [name for name in NAMES if not SAMPLERS[name].adaptive]
ZERO_SNR = Process.named(zero_terminal_snr=True)
SHAPE = (4, 3, 3)


def sources(name: str, seeds: list[int], sigmas: Tensor) -> tuple[Tensor, Noise]:
    """First noise and the noise on the way, as the engine makes them."""
    first = SeededNoise(seeds, SHAPE)
    start = first()
    if not SAMPLERS[name].brownian:
        return start, first
    low = float(sigmas[sigmas > 0].min())
    return start, BrownianNoise(seeds, SHAPE, "cpu", low, float(sigmas[0]))


def draw(name: str, seeds: list[int], n: int = 6, process: AnyProcess = VP, sigmas: Tensor | None = None) -> Tensor:
    """Pictures in float32."""
    if sigmas is None:
        sigmas = space("karras", n, VP) if process is VP else torch.linspace(1, 0, n + 1, dtype=torch.float64)
    x, noise = sources(name, seeds, sigmas)
    return run(name, x * process.scale(float(sigmas[0])), sigmas, process, noise=noise)


@pytest.mark.parametrize("name", NAMES)
def test_repeatable(name: str) -> None:
    assert torch.equal(draw(name, [5]), draw(name, [5]))
    assert not torch.equal(draw(name, [5]), draw(name, [6]))


@pytest.mark.parametrize("name", NAMES)
def test_four_threads_give_what_one_gives(name: str) -> None:
    alone = [draw(name, [seed]) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: draw(name, [seed]), list(range(4)) * 2))
    assert all(torch.equal(a, b) for a, b in zip(alone * 2, together, strict=True))


@pytest.mark.parametrize("name", STEPPING)
def test_a_picture_does_not_depend_on_its_batch(name: str) -> None:
    together = draw(name, [7, 3, 8])
    assert torch.equal(together[1:2], draw(name, [3]))


@pytest.mark.parametrize("name", NAMES)
def test_number_of_evaluations(name: str) -> None:
    entry, calls = SAMPLERS[name], []

    def counted(x: Tensor, sigma: float) -> Tensor:
        calls.append(sigma)
        return denoiser(VP)(x, sigma)

    negative: dict[str, Any] = {"unconditional": denoiser(VP)} if entry.unconditional else {}  # not asked anew
    for n in (1, 2, 3, 20):
        calls.clear()
        path = Path((2,))
        run(name, path() * VP.sigma_max, space("leading", n, VP), noise=path, denoise=counted, **negative)
        assert len(calls) <= entry.evaluations(n) if entry.adaptive else len(calls) == entry.evaluations(n)
        assert all(sigma > 0 for sigma in calls)


@pytest.mark.parametrize("name", NAMES)
def test_few_steps_are_finite(name: str) -> None:
    for n in (1, 2, 3):
        got = draw(name, [1], n)
        assert got.dtype == torch.float32
        assert torch.isfinite(got).all(), n


def numbers(name: str) -> tuple[int, ...]:
    """Few steps, and for restart enough to go back."""
    return (1, 2, 3, 21) if name == "restart" else (1, 2, 3)


@pytest.mark.parametrize("name", FLOWING)
def test_rectified_flow_begins_with_pure_noise(name: str) -> None:
    """At sigma 1 alpha is 0 and the log-SNR infinite."""
    for n in numbers(name):
        got = draw(name, [1], n, FLOW)
        assert torch.isfinite(got).all(), n
        assert got.abs().max() < 4  # N(0.3, 0.5²), and what a single step makes of it


@pytest.mark.parametrize("name", NAMES)
def test_sigmas_may_end_above_zero(name: str) -> None:
    for n in numbers(name):
        got = draw(name, [1], sigmas=logarithmic(8.0, 0.4, n))
        assert torch.isfinite(got).all(), n
        assert got.std() > 0.1  # the noise is still there


@pytest.mark.parametrize("name", STEPPING)
def test_one_step_to_zero_is_the_first_answer(name: str) -> None:
    path = Path((5,))
    x = path() * 10
    got = run(name, x, torch.tensor([10.0, 0.0], dtype=torch.float64), noise=path)
    # x + (0 - sigma) (x - x0) / sigma rounds at the size of x
    torch.testing.assert_close(got, denoiser(VP)(x, 10.0), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_float32_survives_zero_terminal_snr(name: str) -> None:
    """From sigma 4096 in float32."""
    for spacing in ("linspace", "karras"):
        sigmas = space(spacing, 8, ZERO_SNR)
        x, noise = sources(name, [1], sigmas)
        got = run(name, x * ZERO_SNR.sigma_max, sigmas, ZERO_SNR, noise=noise)
        assert got.dtype == torch.float32
        assert torch.isfinite(got).all(), spacing


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_no_length_does_no_harm(name: str) -> None:
    """Spacings repeat a sigma where timesteps round to one (1000 steps) or Karras meets a final sigma above 0."""
    for place in (0, 2, 4):
        sigmas = [8.0, 4.0, 2.0, 1.0, 0.5]
        sigmas.insert(place, sigmas[place])
        assert torch.isfinite(draw(name, [1], sigmas=torch.tensor(sigmas, dtype=torch.float64))).all(), place


@pytest.mark.parametrize("name", NAMES)
def test_x_is_not_changed_in_place(name: str) -> None:
    x, path = torch.ones(1, 4, dtype=torch.float64), Path((1, 4))
    run(name, x, space("karras", 5, VP), noise=path)
    assert torch.equal(x, torch.ones(1, 4, dtype=torch.float64))


def test_one_file_a_sampler() -> None:
    """The file has the sampler's name; close relatives (midpoint and Heun, with and without noise) share one."""
    folder = File(reverie.sampling.samplers.__file__).parent
    homes = {name: File(inspect.getsourcefile(SAMPLERS[name].function) or "").stem for name in NAMES}
    assert set(homes.values()) == {file.stem for file in folder.glob("[a-z]*.py")}
    assert all(home in NAMES and name.startswith(home) for name, home in homes.items())


@pytest.mark.parametrize("name", NAMES)
def test_registration_tells_what_one_needs_to_know(name: str) -> None:
    entry: Sampler = SAMPLERS[name]
    parameters = inspect.signature(entry.function).parameters
    assert list(parameters)[:3] == ["denoise", "x", "sigmas"]
    assert set(entry.options) <= set(parameters)
    assert all(parameters[option].default is not inspect.Parameter.empty for option in entry.options)
    assert entry.function.__doc__
    assert entry.source
    assert set(entry.discards) <= {"a1111", "comfy"}
    for alias in (entry.label, entry.diffusers):
        assert alias is None or SAMPLERS.name(alias) == name


def test_bad_input_and_networks_gone_wrong_are_one_clear_error() -> None:
    x, path = torch.ones(1, 4), Path((1, 4))
    with pytest.raises(GenerationError, match="raise rtol or atol"):
        run("dpm_adaptive", x, space("karras", 2, VP), denoise=lambda x, sigma: path())  # no step is short enough
    with pytest.raises(GenerationError, match="is nan"):
        run("dpm_adaptive", x, space("karras", 2, VP), denoise=lambda x, sigma: x * math.nan)
    with pytest.raises(RequestError, match="2 or 3"):
        run("dpm_adaptive", x, space("karras", 2, VP), order=4)
    with pytest.raises(RequestError, match="each must be above 0"):
        run("dpm_adaptive", x, space("karras", 2, VP), atol=0.0)
    with pytest.raises(RequestError, match="above 0 and at most 1"):
        run("dpmpp_sde", x, space("karras", 2, VP), r=0.0)
    with pytest.raises(RequestError, match="1 to 4"):
        run("lms", x, space("karras", 2, VP), order=5)


def test_denoise_type_is_the_only_contract() -> None:
    denoise: Denoise = denoiser(VP)  # mypy checks that a plain function is enough
    assert denoise(torch.zeros(1), 1.0).shape == (1,)
