"""Golden sigmas: what diffusers, k-diffusion, AUTOMATIC1111 and ComfyUI visit.

diffusers and k-diffusion run here. The other two are compared with their published numbers and with their formulas
written out in plain Python, from descriptions of their rules.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from reverie.diffusion.process import EdmProcess, FlowProcess, Process
from reverie.diffusion.spacing import SpacingRules, space
from tests.parity import kdiffusion
from tests.tiny import diffusers

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PROCESS = Process.named()
ZERO_SNR = Process.named(zero_terminal_snr=True)
STEPS = (1, 2, 5, 20, 50)
MODEL = SpacingRules(base="model")

FLOAT32 = 2e-5  # of a product of 1000 factors in float32
# Between whole timesteps diffusers interpolates sigma, not its logarithm: 3e-4 at the steep end of zero terminal SNR.
STEEP = 5e-4
RANGES = ("karras", "exponential", "beta")


def visited(name: str, n: int, **settings: Any) -> torch.Tensor:
    scheduler = getattr(diffusers, f"{name}Scheduler")(**settings)
    scheduler.set_timesteps(n)
    sigmas: torch.Tensor = scheduler.sigmas.double()
    return sigmas


def flag(kind: str) -> dict[str, bool]:
    return {f"use_{kind}_sigmas": True}


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("base", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("name", ["EulerDiscrete", "LMSDiscrete"])
def test_ranges_over_a_timestep_spacing(name: str, base: str, kind: str, n: int) -> None:
    want = visited(name, n, **BETAS, timestep_spacing=base, steps_offset=1, **flag(kind))
    if n == 1 and base == "linspace":  # NumPy's one point is timestep 0, so that the range is empty
        assert float(want[0]) == pytest.approx(PROCESS.sigma_min, rel=FLOAT32)
        return
    got = space(kind, n, PROCESS, SpacingRules(steps_offset=1, base=base))
    torch.testing.assert_close(got, want, rtol=FLOAT32, atol=0)


ENDS = [
    (name, end) for name in ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep") for end in (True, False)
]
ENDS += [("DEISMultistep", False), ("SASolver", False)]  # which know no end at 0


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize(("name", "zero"), ENDS)
def test_ranges_of_all_trained_sigmas(name: str, zero: bool, kind: str, n: int) -> None:
    ends = {"final_sigmas_type": "sigma_min"} if (name, True) in ENDS and not zero else {}
    want = visited(name, n, **BETAS, **flag(kind), **ends)
    if n == 1 and not zero and not name.startswith("DPM"):
        want[-1] = PROCESS.sigma_min  # these end at the last sigma visited, which of one is the first
    got = space(kind, n, PROCESS, SpacingRules(final_sigma=0.0 if zero else PROCESS.sigma_min))
    torch.testing.assert_close(got, want, rtol=FLOAT32, atol=0)


@pytest.mark.parametrize("n", STEPS)
def test_lu_lambdas(n: int) -> None:
    want = visited("DPMSolverMultistep", n, **BETAS, use_lu_lambdas=True)
    torch.testing.assert_close(space("lu_lambdas", n, PROCESS), want, rtol=FLOAT32, atol=0)


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("base", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("name", ["DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "SASolver"])
def test_whole_timesteps_with_an_extra_point(name: str, base: str, n: int) -> None:
    want = visited(name, n, **BETAS, timestep_spacing=base, steps_offset=1)
    rules = SpacingRules(
        steps_offset=1, extra_point=True, whole_timesteps=True, final_sigma=float(want[-1]) and PROCESS.sigma_min
    )
    torch.testing.assert_close(space(base, n, PROCESS, rules), want, rtol=FLOAT32, atol=0)


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("base", ["linspace", "leading", "trailing"])
def test_zero_terminal_snr(base: str, n: int) -> None:
    want = visited("EulerDiscrete", n, **BETAS, timestep_spacing=base, rescale_betas_zero_snr=True)
    got = space(base, n, ZERO_SNR)
    torch.testing.assert_close(got, want, rtol=STEEP, atol=0)


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("shift", [1.0, 2.5, 3.0])
@pytest.mark.parametrize("kind", ["", *RANGES])
def test_flow_matching(n: int, shift: float, kind: str) -> None:
    want = visited("FlowMatchEulerDiscrete", n, shift=shift, **(flag(kind) if kind else {}))
    got = space(kind or "uniform", n, FlowProcess(shift=shift))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("name", "spacing"), [("DPMSolverMultistep", "flow_sigmas"), ("UniPCMultistep", "flow_sigmas_unipc")]
)
def test_flow_sigmas(name: str, spacing: str, n: int, shift: float) -> None:
    want = visited(name, n, **BETAS, use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction")
    torch.testing.assert_close(space(spacing, n, FlowProcess(shift=shift)), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("kind", ["karras", "exponential"])
@pytest.mark.parametrize("name", ["EDMEuler", "EDMDPMSolverMultistep"])
def test_edm(name: str, kind: str, n: int) -> None:
    want = visited(name, n, sigma_schedule=kind, rho=5.0)
    if n == 1 and kind == "exponential":
        want[0] = 80.0  # diffusers counts up from sigma_min, where one point stays
    got = space(kind, n, EdmProcess(), None, **({"rho": 5.0} if kind == "karras" else {}))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)  # EDMDPMSolver takes 5th powers in float32


@pytest.mark.parametrize("name", ["LCM", "TCD"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 20, 50])
def test_distilled_timesteps(name: str, n: int) -> None:
    scheduler = getattr(diffusers, f"{name}Scheduler")(original_inference_steps=50)
    scheduler.set_timesteps(n)
    assert timesteps("lcm", n) == scheduler.timesteps.tolist()


@pytest.fixture(scope="module")
def k_diffusion() -> Any:
    return kdiffusion.load()


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize(("low", "high"), [(0.0291675, 14.614642), (0.1, 10.0)])
def test_ranges_of_k_diffusion(k_diffusion: Any, n: int, low: float, high: float) -> None:
    ends = {"sigma_min": low, "sigma_max": high}

    def close(got: torch.Tensor, want: torch.Tensor) -> None:
        torch.testing.assert_close(got, want.double(), rtol=FLOAT32, atol=0)

    close(space("karras", n, PROCESS, None, **ends), k_diffusion.get_sigmas_karras(n, low, high))
    close(space("karras", n, PROCESS, None, rho=3.0, **ends), k_diffusion.get_sigmas_karras(n, low, high, rho=3.0))
    close(space("exponential", n, PROCESS, None, **ends), k_diffusion.get_sigmas_exponential(n, low, high))
    for rho in (1.0, 0.5, 2.0):
        want = k_diffusion.get_sigmas_polyexponential(n, low, high, rho=rho)
        close(space("polyexponential", n, PROCESS, None, rho=rho, **ends), want)


@pytest.mark.parametrize("n", STEPS)
def test_vp_of_k_diffusion(k_diffusion: Any, n: int) -> None:
    # there exp(y) - 1 in float32, with y = 1.1e-4 at the end: its last digits are lost
    torch.testing.assert_close(space("vp", n, PROCESS), k_diffusion.get_sigmas_vp(n).double(), rtol=1e-3, atol=0)
    want = k_diffusion.get_sigmas_vp(n, beta_d=10.0, beta_min=0.2, eps_s=0.01).double()
    got = space("vp", n, PROCESS, None, beta_d=10.0, beta_min=0.2, eps_s=0.01)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)


# AUTOMATIC1111 and ComfyUI. `TABLE` is the model's table of sigmas, smallest first, as both programs keep it.
TABLE = PROCESS.sigmas.tolist()
LOGS = [math.log(sigma) for sigma in TABLE]


def timesteps(name: str, n: int) -> list[float]:
    return [round(PROCESS.timestep(sigma), 6) for sigma in space(name, n, PROCESS)[:-1].tolist()]


def between(t: float) -> float:
    """Sigma between two timesteps: a straight line in log sigma."""
    low = min(int(t), 998)
    return math.exp(LOGS[low] + (t - low) * (LOGS[low + 1] - LOGS[low]))


def test_published_timesteps() -> None:
    assert timesteps("simple", 20) == list(range(999, 0, -50))
    assert timesteps("ddim_uniform", 20) == list(range(951, 0, -50))
    assert timesteps("sgm_uniform", 20) == [round(999 - 49.95 * i, 6) for i in range(20)]
    assert timesteps("uniform", 4) == [999, 666, 333, 0]
    assert timesteps("turbo", 4) == [999, 749, 499, 249]
    assert timesteps("sd_turbo", 4) == [999, 899, 799, 699]
    assert timesteps("lcm", 4) == [999, 759, 499, 259]


@pytest.mark.parametrize("n", [1, 3, 7, 20, 30, 64, 333])
def test_rules_over_the_table(n: int) -> None:
    simple = [TABLE[-(1 + int(i * (1000 / n)))] for i in range(n)]
    uniform = [between(999 - 999 * i / max(n - 1, 1)) for i in range(n)]
    sgm = [between(999 - 999 * i / n) for i in range(n)]
    ddim = [TABLE[i] for i in range(1, 1000, 1000 // n)][::-1]
    for name, want in (("simple", simple), ("uniform", uniform), ("sgm_uniform", sgm), ("ddim_uniform", ddim)):
        assert space(name, n, PROCESS).tolist() == pytest.approx([*want, 0.0], rel=1e-9), name


@pytest.mark.parametrize("n", [1, 2, 5, 20, 50, 300])
@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.6), (0.5, 0.7), (1.0, 2.0)])
def test_beta_of_comfyui_and_of_automatic1111(n: int, alpha: float, beta: float) -> None:
    places = [round(float(stats.beta.ppf(1 - i / n, alpha, beta)) * 999) for i in range(n)]
    comfy = [TABLE[place] for i, place in enumerate(places) if i == 0 or place != places[i - 1]]
    got = space("beta_timesteps", n, PROCESS, None, alpha=alpha, beta=beta)
    assert got.tolist() == pytest.approx([*comfy, 0.0], rel=1e-9)
    low, high = TABLE[0], TABLE[-1]
    quantiles = [float(stats.beta.ppf(p, alpha, beta)) for p in 1 - np.linspace(0, 1, n)]
    a1111 = [low + quantile * (high - low) for quantile in quantiles]
    got = space("beta", n, PROCESS, None, alpha=alpha, beta=beta)
    assert got.tolist() == pytest.approx([*a1111, 0.0], rel=1e-9)


@pytest.mark.parametrize("n", [2, 5, 20])
def test_kl_optimal_of_both(n: int) -> None:
    low, high = math.atan(TABLE[0]), math.atan(TABLE[-1])
    comfy = [math.tan(i / (n - 1) * low + (1 - i / (n - 1)) * high) for i in range(n)]
    assert space("kl_optimal", n, PROCESS).tolist() == pytest.approx([*comfy, 0.0], rel=1e-9)
    a1111 = [math.tan(i / n * low + (1 - i / n) * high) for i in range(n + 1)]
    assert space("kl_optimal_to_minimum", n, PROCESS).tolist() == pytest.approx(a1111, rel=1e-9)


@pytest.mark.parametrize("n", [2, 5, 20, 50])
def test_laplace_of_comfyui(n: int) -> None:
    want = []
    for x in np.linspace(0, 1, n):
        log = -0.5 * math.copysign(1, 0.5 - x) * math.log(1 - 2 * abs(0.5 - x) + 1e-5) if x != 0.5 else 0.0
        want.append(min(max(math.exp(log), TABLE[0]), TABLE[-1]))
    assert space("laplace", n, PROCESS).tolist() == pytest.approx([*want, 0.0], rel=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 25])
@pytest.mark.parametrize("linear", [None, 1])
def test_linear_quadratic_of_comfyui(n: int, linear: int | None) -> None:
    """Their three coefficients, from threshold 0.025."""
    want = [0.0]
    if n > 1:
        few = linear or n // 2
        rest = few - 0.025 * n
        quadratic, slope = rest / (few * (n - few) ** 2), 0.025 / few - 2 * rest / (n - few) ** 2
        want = [i * 0.025 / few for i in range(few)]
        want += [quadratic * i**2 + slope * i + quadratic * few**2 for i in range(few, n)]
    got = space("linear_quadratic", n, PROCESS, None, **({"linear_steps": linear} if linear else {}))
    assert got.tolist() == pytest.approx([(1 - x) * TABLE[-1] for x in [*want, 1.0]], rel=1e-9, abs=1e-12)


def test_align_your_steps() -> None:
    published = diffusers.schedulers.scheduling_utils.AysSchedules
    for family, key in (
        ("sd1", "StableDiffusionSigmas"),
        ("sdxl", "StableDiffusionXLSigmas"),
        ("svd", "StableDiffusionVideoSigmas"),
    ):
        rules = SpacingRules(tables=family)
        assert space("align_your_steps", 11, PROCESS, rules)[:10].tolist() == pytest.approx(
            published[key][:10], rel=1e-9
        )
        assert space("ays", 10, PROCESS, rules).tolist() == pytest.approx(published[key], rel=3e-2)
        assert float(space("align_your_steps", 11, PROCESS, rules)[10]) == pytest.approx(
            0.002 if family == "svd" else 0.029
        )
    for key, family in (("StableDiffusionTimesteps", "sd1"), ("StableDiffusionXLTimesteps", "sdxl")):
        levels = [TABLE[t] for t in published[key]]
        assert space("ays", 10, PROCESS, SpacingRules(tables=family))[:-1].tolist() == pytest.approx(levels, rel=5e-3)


@pytest.mark.parametrize("n", [2, 5, 16, 40])
def test_lists_are_stretched_evenly_in_log_sigma(n: int) -> None:
    table = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]
    places = np.linspace(0, 10, n)
    want = np.exp(np.interp(places, range(11), np.log(table)))
    assert space("align_your_steps", n, PROCESS)[:-1].tolist() == pytest.approx(want.tolist(), rel=1e-9)


def test_gits_of_comfyui() -> None:
    """Its coefficient 1.20, for 1 (of which it has none), 4, 10 and more than 20 steps."""
    four = [14.61464119, 2.36326075, 0.92192322, 0.36617002]
    ten = [14.61464119, 5.85520077, 2.84484982, 1.67050016, 1.08895338, 0.74807048, 0.50118381, 0.32104823, 0.19894916,
           0.09824532]  # fmt: skip
    for levels in ([14.61464119], four, ten):
        assert space("gits", len(levels), PROCESS).tolist() == pytest.approx([*levels, 0.0], rel=1e-9)
    twenty, forty = space("gits", 20, PROCESS), space("gits", 40, PROCESS)
    assert forty[::2].tolist() == pytest.approx(twenty.tolist(), rel=1e-9)
    assert float(forty[1]) == pytest.approx(math.sqrt(float(twenty[0] * twenty[1])), rel=1e-9)


@pytest.mark.parametrize("n", [1, 4, 8, 20])
def test_uniform_over_the_distilled_levels_of_automatic1111(n: int) -> None:
    valid = [TABLE[19 + 20 * i] for i in range(50)]
    logs = [math.log(sigma) for sigma in valid]
    places = [49 - 49 * i / max(n - 1, 1) for i in range(n)]
    want = [math.exp(np.interp(place, range(50), logs)) for place in places]
    assert space("lcm_uniform", n, PROCESS).tolist() == pytest.approx([*want, 0.0], rel=1e-9)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_comfyui_on_flow_models(shift: float) -> None:
    """Its table has sigma(1/1000) to sigma(1); `normal` shifts the last level twice."""
    process = FlowProcess(shift=shift)

    def shifted(t: float) -> float:
        return shift * t / (1 + (shift - 1) * t)

    table = [shifted((i + 1) / 1000) for i in range(1000)]
    n = 7
    assert space("simple", n, process)[:-1].tolist() == pytest.approx(
        [table[-(1 + int(i * 1000 / n))] for i in range(n)]
    )
    assert space("ddim_uniform", n, process)[:-1].tolist() == pytest.approx(
        [table[i] for i in range(1, 1000, 142)][::-1]
    )
    normal = [shifted(t) for t in np.linspace(1, table[0], n)]
    assert space("normal", n, process)[:-1].tolist() == pytest.approx(normal)
    sgm = [shifted(t) for t in np.linspace(1, table[0], n + 1)[:-1]]
    assert space("sgm_uniform", n, process)[:-1].tolist() == pytest.approx(sgm)
    karras = space("karras", n, process, MODEL)
    assert (float(karras[0]), float(karras[-2])) == pytest.approx((1.0, table[0]))
