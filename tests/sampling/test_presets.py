"""What programs do where they differ: steps for a strength, paths, names, rounding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reverie.diffusion.process import EdmProcess, FlowProcess, Process
from reverie.diffusion.spacing import SPACINGS, SpacingRules, space
from reverie.errors import RequestError
from reverie.sampling.presets import PRESETS, Policy, chosen_spacing, img2img_sigmas, told_timestep, visited
from reverie.sampling.registry import load_all

PROCESS = Process.named()
RULES = SpacingRules()
POLICIES: tuple[Policy, ...] = ("diffusers", "a1111", "a1111_fixed", "comfy")
SAMPLERS = load_all()


def countdown(n: int) -> Tensor:
    """A path whose sigmas say how many steps are left."""
    return torch.arange(n, -1, -1, dtype=torch.float64)


# steps, strength -> steps of the whole path and of the part that is drawn, by hand from the rules of each program.
GOLDEN: list[tuple[Policy, int, float, int, int]] = [
    ("diffusers", 20, 0.75, 20, 15), ("diffusers", 50, 0.8, 50, 40), ("diffusers", 20, 1.0, 20, 20),
    ("diffusers", 20, 0.04, 20, 0), ("diffusers", 100, 0.29, 100, 28), ("diffusers", 1, 0.9, 1, 0),
    ("a1111", 20, 0.75, 20, 16), ("a1111", 20, 0.5, 20, 11), ("a1111", 20, 1.0, 20, 20), ("a1111", 20, 0.999, 20, 20),
    ("a1111", 20, 0.0, 20, 1), ("a1111", 28, 0.6, 28, 17), ("a1111", 1, 0.3, 1, 1),
    ("a1111_fixed", 20, 0.75, 26, 20), ("a1111_fixed", 20, 0.5, 40, 20), ("a1111_fixed", 20, 1.0, 20, 20),
    ("a1111_fixed", 10, 0.7, 14, 10), ("a1111_fixed", 15, 0.35, 42, 15),
    ("comfy", 20, 0.75, 26, 20), ("comfy", 20, 0.5, 40, 20), ("comfy", 20, 1.0, 20, 20), ("comfy", 20, 0.99995, 20, 20),
    ("comfy", 20, 0.999, 20, 20), ("comfy", 7, 0.3, 23, 7),
]  # fmt: skip


@pytest.mark.parametrize(("policy", "n", "strength", "whole", "drawn"), GOLDEN)
def test_steps_for_a_strength(policy: Policy, n: int, strength: float, whole: int, drawn: int) -> None:
    asked = []

    def make(steps: int) -> Tensor:
        asked.append(steps)
        return countdown(steps)

    sigmas = img2img_sigmas(policy, n, strength, make)
    assert asked == [whole]
    assert sigmas.tolist() == list(range(drawn, -1, -1))


@given(st.sampled_from(POLICIES), st.integers(1, 60), st.just(0.0) | st.floats(0.01, 1))
def test_the_end_of_the_path_is_drawn(policy: Policy, n: int, strength: float) -> None:
    sigmas = img2img_sigmas(policy, n, strength, countdown)
    steps = len(sigmas) - 1
    assert sigmas.tolist() == list(range(steps, -1, -1))
    if strength == 0:
        assert steps == (policy == "a1111")
    elif policy in {"a1111_fixed", "comfy"}:
        assert steps == n
    else:
        assert abs(steps - strength * n) <= 1 + 1e-9


@pytest.mark.parametrize("policy", POLICIES)
def test_paths_that_are_longer_than_asked(policy: Policy) -> None:
    """DDIM's spacing of 30 steps has 31: AUTOMATIC1111 and diffusers count from the front, ComfyUI from the end."""
    sigmas = img2img_sigmas(policy, 30, 0.5, lambda n: space("ddim_uniform", n, PROCESS))
    assert len(sigmas) - 1 == {"diffusers": 16, "a1111": 17, "a1111_fixed": 33, "comfy": 30}[policy]


@pytest.mark.parametrize("policy", ["a1111_fixed", "comfy"])
def test_a_path_that_the_model_does_not_have(policy: Policy) -> None:
    with pytest.raises(RequestError) as caught:
        img2img_sigmas(policy, 50, 0.04, lambda n: space("karras", n, PROCESS))
    said = "50 steps at strength 0.04 are the end of 1250 steps, but steps is 1250; this model allows 1 to 1000"
    assert str(caught.value) == said
    with pytest.raises(RequestError, match="50 steps at strength 1e-310"):
        img2img_sigmas(policy, 50, 1e-310, lambda n: space("karras", n, PROCESS))


@pytest.mark.parametrize(
    ("preset", "sampler", "asked", "spacing"),
    [
        ("a1111", "dpmpp_2m", None, "karras"),
        ("a1111", "DPM++ 2M SDE", None, "exponential"),
        ("a1111", "euler_a", None, "uniform"),
        ("a1111", "ddim", None, "ddim_uniform"),
        ("a1111", "lcm", None, "lcm_uniform"),
        ("a1111", "euler", "KL Optimal", "kl_optimal_to_minimum"),
        ("a1111", "euler", "Beta", "beta"),
        ("a1111", "euler", "Align Your Steps", "align_your_steps"),
        ("comfy", "euler", "beta", "beta_timesteps"),
        ("comfy", "euler", "align_your_steps", "ays"),
        ("comfy", "euler", "kl_optimal", "kl_optimal"),
        ("comfy", "euler", "normal", "uniform"),
        ("diffusers", "euler", "simple", "trailing"),
        ("diffusers", "euler", "uniform", "linspace"),
        ("diffusers", "euler", "beta", "beta"),
    ],
)
def test_spacings_that_a_program_means(preset: str, sampler: str, asked: str | None, spacing: str) -> None:
    assert chosen_spacing(PRESETS[preset], sampler, asked) == spacing


def test_every_name_in_the_table_is_one() -> None:
    for name in PRESETS:
        preset = PRESETS[name]
        for spacing in (*preset.means, *preset.means.values(), *preset.automatic.values()):
            assert SPACINGS.name(spacing) == spacing
        for sampler in (*preset.automatic, *preset.ends, *preset.options):
            assert SAMPLERS.name(sampler) == sampler
        for sampler, options in preset.options.items():
            assert set(options) <= set(SAMPLERS[sampler].options)
        assert SPACINGS.name(chosen_spacing(preset, "euler", None)) == "uniform"


@pytest.mark.parametrize("name", ["a1111", "comfy"])
def test_samplers_that_discard_the_penultimate_sigma(name: str) -> None:
    preset = PRESETS[name]
    whole = space("karras", 21, PROCESS)
    got = visited(preset, "dpm_2", "karras", 20, PROCESS, RULES)
    torch.testing.assert_close(got, torch.cat([whole[:-2], whole[-1:]]))
    torch.testing.assert_close(visited(preset, "euler", "karras", 20, PROCESS, RULES), space("karras", 20, PROCESS))
    assert ("a1111" in SAMPLERS["dpmpp_3m_sde"].discards, "comfy" in SAMPLERS["dpmpp_3m_sde"].discards) == (True, False)
    asked = visited(preset, "euler", "karras", 20, PROCESS, SpacingRules(discard_penultimate=True))
    torch.testing.assert_close(asked, got)


def test_the_range_is_the_models_own() -> None:
    """A1111 and ComfyUI know no scheduler config; diffusers' ranges are those of its timestep spacing."""
    rules = SpacingRules(base="leading", steps_offset=1, final_sigma=0.01)
    for name in ("a1111", "comfy"):
        got = visited(PRESETS[name], "euler", "karras", 10, PROCESS, rules)
        torch.testing.assert_close(got, space("karras", 10, PROCESS, SpacingRules(base="model")))
    got = visited(PRESETS["diffusers"], "euler", "karras", 10, PROCESS, rules)
    torch.testing.assert_close(got, space("karras", 10, PROCESS, rules))
    assert got[0] < 10


def test_the_old_range_of_automatic1111() -> None:
    got = visited(PRESETS["a1111"], "euler", "karras", 5, PROCESS, RULES, sigma_min=0.1, sigma_max=10)
    assert (float(got[0]), float(got[-2])) == pytest.approx((10, 0.1))


def test_diffusers_adds_a_point_where_its_class_does() -> None:
    got = visited(PRESETS["diffusers"], "dpmpp_2m", "linspace", 10, PROCESS, RULES)
    rules = SpacingRules(extra_point=True, whole_timesteps=True)
    torch.testing.assert_close(got, space("linspace", 10, PROCESS, rules))
    torch.testing.assert_close(
        visited(PRESETS["diffusers"], "dpmpp_2m", "karras", 10, PROCESS, RULES), space("karras", 10, PROCESS)
    )


@pytest.mark.parametrize("sampler", ["ddim", "pndm"])
def test_automatic1111_ends_ddim_at_timestep_1(sampler: str) -> None:
    """It visits 951, 901, ..., 51 and lands on 1: 19 steps for 20."""
    sigmas = visited(PRESETS["a1111"], sampler, "ddim_uniform", 20, PROCESS, RULES)
    assert [round(PROCESS.timestep(sigma), 6) for sigma in sigmas.tolist()] == list(range(951, 0, -50))
    assert len(visited(PRESETS["a1111"], sampler, "ddim_uniform", 1, PROCESS, RULES)) == 2


@pytest.mark.parametrize(("n", "steps"), [(20, 20), (30, 31)])
def test_automatic1111_spaces_unipc_to_the_smallest_sigma(n: int, steps: int) -> None:
    sigmas = visited(PRESETS["a1111"], "unipc", "sgm_uniform", n, PROCESS, RULES)
    assert len(sigmas) == steps + 1
    timesteps = [PROCESS.timestep(sigma) for sigma in sigmas.tolist()]
    assert timesteps == pytest.approx([999 * (1 - i / steps) for i in range(steps + 1)], abs=1e-6)


def test_timesteps_that_the_network_is_told() -> None:
    euler, dpm, unipc = SAMPLERS["euler"], SAMPLERS["dpmpp_2m"], SAMPLERS["unipc"]
    a1111, comfy, diffusers = PRESETS["a1111"], PRESETS["comfy"], PRESETS["diffusers"]
    flow, edm = FlowProcess(), EdmProcess()
    assert told_timestep(a1111, dpm, "karras", PROCESS)(613.7) == 613.7
    assert told_timestep(comfy, euler, "karras", PROCESS)(613.7) == 614
    assert told_timestep(comfy, euler, "karras", flow)(613.7) == 613.7
    assert told_timestep(diffusers, euler, "karras", PROCESS)(613.7) == 613.7
    assert told_timestep(diffusers, dpm, "karras", PROCESS)(613.7) == 614
    assert told_timestep(diffusers, dpm, "exponential", PROCESS)(613.7) == 613
    assert told_timestep(diffusers, dpm, "exponential", PROCESS)(999.0) == 998
    assert told_timestep(diffusers, unipc, "beta", PROCESS)(0.0) == 0
    assert told_timestep(diffusers, unipc, "flow_sigmas_unipc", flow)(999.999) == 999
    assert told_timestep(diffusers, dpm, "flow_sigmas", flow)(500.0 - 1e-12) == 500
    assert told_timestep(diffusers, dpm, "karras", flow)(613.7) == 613.7
    assert told_timestep(diffusers, dpm, "exponential", edm)(-1.55) == -1.55


def test_random_numbers_and_seeds() -> None:
    a1111, comfy, diffusers = PRESETS["a1111"], PRESETS["ComfyUI"], PRESETS["diffusers"]
    assert (a1111.rng, comfy.rng, diffusers.rng) == ("philox", "cpu", "cpu")
    assert (a1111.seeds, comfy.seeds, diffusers.seeds) == ("picture", "batch", "batch")
    assert (a1111.start, comfy.start, diffusers.start) == ("sigma", "full", "class")
    assert {PRESETS[name].eta_noise_delta for name in PRESETS} == {0}
    assert (a1111.strength_steps, a1111.hires_steps) == ("a1111", "a1111_fixed")


def test_strengths_between_are_monotonic() -> None:
    for policy in POLICIES[:2]:
        lengths = [len(img2img_sigmas(policy, 20, s / 100, countdown)) for s in range(101)]
        assert lengths == sorted(lengths)
        assert lengths[-1] == 21
