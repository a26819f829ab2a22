"""The names of every program in the tables that Reverie wants to be compatible with."""

import pytest

from reverie.diffusion.spacing import SPACINGS
from reverie.errors import RequestError
from reverie.sampling.names import LEFT_OUT, a1111_labels, label_options, resolve
from reverie.sampling.registry import load_all

SAMPLERS = load_all()

# AUTOMATIC1111 1.10 and Forge: label, aliases -> sampler.
A1111 = {
    "euler": "Euler|k_euler", "euler_a": "Euler a|k_euler_a|k_euler_ancestral", "heun": "Heun|k_heun",
    "heunpp2": "HeunPP2", "dpm_2": "DPM2|k_dpm_2|k_dpm2", "dpm_2_a": "DPM2 a|k_dpm_2_a", "lms": "LMS|k_lms",
    "dpm_fast": "DPM fast|k_dpm_fast", "dpm_adaptive": "DPM adaptive|k_dpm_ad", "dpmpp_2s_a": "DPM++ 2S a|k_dpmpp_2s_a",
    "dpmpp_sde": "DPM++ SDE|k_dpmpp_sde", "dpmpp_2m": "DPM++ 2M|k_dpmpp_2m",
    "dpmpp_2m_sde": "DPM++ 2M SDE|k_dpmpp_2m_sde",
    "dpmpp_2m_sde_heun": "DPM++ 2M SDE Heun|k_dpmpp_2m_sde_heun", "dpmpp_3m_sde": "DPM++ 3M SDE|k_dpmpp_3m_sde",
    "ddim": "DDIM", "ddim_cfg_pp": "DDIM CFG++|ddim_cfgpp", "pndm": "PLMS", "unipc": "UniPC", "ddpm": "DDPM",
    "lcm": "LCM|k_lcm",
    "deis": "DEIS", "ipndm": "IPNDM", "ipndm_v": "IPNDM_V", "restart": "Restart",
}  # fmt: skip

COMFY = {
    "euler": "euler", "euler_cfg_pp": "euler_cfg_pp", "euler_ancestral": "euler_a",
    "euler_ancestral_cfg_pp": "euler_a_cfg_pp", "heun": "heun", "heunpp2": "heunpp2", "dpm_2": "dpm_2",
    "dpm_2_ancestral": "dpm_2_a", "lms": "lms", "dpm_fast": "dpm_fast", "dpm_adaptive": "dpm_adaptive",
    "dpmpp_2s_ancestral": "dpmpp_2s_a", "dpmpp_2s_ancestral_cfg_pp": "dpmpp_2s_a_cfg_pp", "dpmpp_sde": "dpmpp_sde",
    "dpmpp_sde_gpu": "dpmpp_sde", "dpmpp_2m": "dpmpp_2m", "dpmpp_2m_cfg_pp": "dpmpp_2m_cfg_pp",
    "dpmpp_2m_sde": "dpmpp_2m_sde", "dpmpp_2m_sde_gpu": "dpmpp_2m_sde", "dpmpp_2m_sde_heun": "dpmpp_2m_sde_heun",
    "dpmpp_2m_sde_heun_gpu": "dpmpp_2m_sde_heun", "dpmpp_3m_sde": "dpmpp_3m_sde", "dpmpp_3m_sde_gpu": "dpmpp_3m_sde",
    "ddpm": "ddpm", "lcm": "lcm", "ipndm": "ipndm", "ipndm_v": "ipndm_v", "deis": "deis",
    "res_multistep": "res_multistep", "res_multistep_cfg_pp": "res_multistep_cfg_pp",
    "res_multistep_ancestral": "res_multistep_ancestral", "res_multistep_ancestral_cfg_pp": "res_multistep_a_cfg_pp",
    "gradient_estimation": "gradient_estimation", "gradient_estimation_cfg_pp": "gradient_estimation_cfg_pp",
    "er_sde": "er_sde", "seeds_2": "seeds_2", "seeds_3": "seeds_3", "sa_solver": "sa_solver",
    "sa_solver_pece": "sa_solver_pece", "ddim": "ddim", "uni_pc": "unipc", "uni_pc_bh2": "unipc",
    "exp_heun_2_x0": "seeds_2", "exp_heun_2_x0_sde": "seeds_2",
}  # fmt: skip

# Labels that name a spacing too: AUTOMATIC1111 up to 1.8, InvokeAI, Draw Things, stable-diffusion.cpp.
FUSED = {
    "LMS Karras": ("lms", "karras"), "DPM2 Karras": ("dpm_2", "karras"), "DPM2 a Karras": ("dpm_2_a", "karras"),
    "DPM++ 2S a Karras": ("dpmpp_2s_a", "karras"), "DPM++ 2M Karras": ("dpmpp_2m", "karras"),
    "DPM++ SDE Karras": ("dpmpp_sde", "karras"), "DPM++ 2M SDE Karras": ("dpmpp_2m_sde", "karras"),
    "DPM++ 2M SDE Exponential": ("dpmpp_2m_sde", "exponential"),
    "DPM++ 2M SDE Heun Karras": ("dpmpp_2m_sde_heun", "karras"),
    "DPM++ 2M SDE Heun Exponential": ("dpmpp_2m_sde_heun", "exponential"),
    "DPM++ 3M SDE Karras": ("dpmpp_3m_sde", "karras"), "DPM++ 3M SDE Exponential": ("dpmpp_3m_sde", "exponential"),
    "k_dpmpp_2m_ka": ("dpmpp_2m", "karras"), "k_lms_ka": ("lms", "karras"), "k_dpm_2_a_ka": ("dpm_2_a", "karras"),
    "k_dpmpp_2m_sde_ka": ("dpmpp_2m_sde", "karras"), "Euler a Automatic": ("euler_a", None),
    "Euler SGM Uniform": ("euler", "sgm_uniform"), "DPM++ 2M SGMUniform": ("dpmpp_2m", "sgm_uniform"),
    "DPM++ 2M Align Your Steps": ("dpmpp_2m", "align_your_steps"),
    "deis_k": ("deis", "karras"), "lms_k": ("lms", "karras"), "heun_k": ("heun", "karras"),
    "euler_k": ("euler", "karras"), "kdpm_2_k": ("dpm_2", "karras"), "kdpm_2_a_k": ("dpm_2_a", "karras"),
    "dpmpp_2s_k": ("dpmpp_2s", "karras"), "dpmpp_2m_k": ("dpmpp_2m", "karras"),
    "dpmpp_2m_sde_k": ("dpmpp_2m_sde", "karras"), "dpmpp_3m_k": ("dpmpp_3m", "karras"),
    "dpmpp_sde_k": ("dpmpp_sde", "karras"), "unipc_k": ("unipc", "karras"),
    "Euler A Trailing": ("euler_a", "trailing"), "DPM++ SDE Trailing": ("dpmpp_sde", "trailing"),
    "DPM++ 2M AYS": ("dpmpp_2m", "ays"), "Euler A AYS": ("euler_a", "ays"), "DPM++ SDE AYS": ("dpmpp_sde", "ays"),
    "DPM++ 2M Trailing": ("dpmpp_2m", "trailing"), "DDIM Trailing": ("ddim", "trailing"),
    "UniPC Trailing": ("unipc", "trailing"), "UniPC AYS": ("unipc", "ays"), "TCD Trailing": ("tcd", "trailing"),
    "ddim_trailing": ("ddim", "trailing"),
}  # fmt: skip

INVOKE = {
    "ddim": "ddim", "ddpm": "ddpm", "deis": "deis", "lms": "lms", "pndm": "pndm", "heun": "heun", "euler": "euler",
    "euler_a": "euler_a", "kdpm_2": "dpm_2", "kdpm_2_a": "dpm_2_a", "dpmpp_2s": "dpmpp_2s", "dpmpp_2m": "dpmpp_2m",
    "dpmpp_2m_sde": "dpmpp_2m_sde", "dpmpp_3m": "dpmpp_3m", "dpmpp_sde": "dpmpp_sde", "er_sde": "er_sde",
    "unipc": "unipc", "lcm": "lcm", "tcd": "tcd",
}  # fmt: skip

OTHERS = {
    # stable-diffusion.cpp
    "dpm2": "dpm_2", "dpm++2s_a": "dpmpp_2s_a", "dpm++2m": "dpmpp_2m", "dpm++2m_sde": "dpmpp_2m_sde",
    "dpm++2m_sde_bt": "dpmpp_2m_sde", "euler_ge": "gradient_estimation", "euler_a_cfg_pp": "euler_a_cfg_pp",
    # NovelAI and Stability's API
    "k_euler_ancestral": "euler_a", "k_dpmpp_2s_ancestral": "dpmpp_2s_a", "k_dpm_2_ancestral": "dpm_2_a",
    "k_dpm_fast": "dpm_fast", "k_dpm_adaptive": "dpm_adaptive", "ddim_v3": "ddim", "plms": "pndm",
    "K_DPMPP_2M": "dpmpp_2m", "K_DPMPP_2S_ANCESTRAL": "dpmpp_2s_a", "K_HEUN": "heun", "K_LMS": "lms",
    "K_DPM_2": "dpm_2",
    # sgm, CompVis, refiners, Draw Things, k-diffusion
    "EulerEDM": "euler", "HeunEDM": "heun", "EulerAncestral": "euler_a", "DPMPP2SAncestral": "dpmpp_2s_a",
    "DPMPP2M": "dpmpp_2m", "LinearMultistep": "lms", "DPM-Solver": "dpm_solver", "DPM": "dpmpp_2m",
    "Euler Ancestral": "euler_a", "sample_dpmpp_2s_ancestral": "dpmpp_2s_a",
    "sample_dpmpp_3m_sde": "dpmpp_3m_sde", "sample_lms": "lms",
    # diffusers
    "EulerDiscreteScheduler": "euler", "EulerAncestralDiscreteScheduler": "euler_a", "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "dpm_2", "KDPM2AncestralDiscreteScheduler": "dpm_2_a", "LMSDiscreteScheduler": "lms",
    "DPMSolverSinglestepScheduler": "dpmpp_2s", "DPMSolverSDEScheduler": "dpmpp_sde",
    "DPMSolverMultistepScheduler": "dpmpp_2m", "DDIMScheduler": "ddim", "PNDMScheduler": "pndm",
    "UniPCMultistepScheduler": "unipc", "DDPMScheduler": "ddpm", "LCMScheduler": "lcm", "TCDScheduler": "tcd",
    "DEISMultistepScheduler": "deis", "SASolverScheduler": "sa_solver", "EDMEulerScheduler": "euler",
    "EDMDPMSolverMultistepScheduler": "dpmpp_2m", "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "heun", "FlowMatchLCMScheduler": "lcm", "DDIMParallelScheduler": "ddim",
    "DDPMParallelScheduler": "ddpm",
}  # fmt: skip

CLASSES = {
    "DPMSolverMultistepScheduler(use_karras_sigmas=True)": ("dpmpp_2m", "karras"),
    "DPMSolverMultistepScheduler(algorithm_type=sde-dpmsolver++)": ("dpmpp_2m_sde", None),
    "DPMSolverMultistepScheduler(algorithm_type='sde-dpmsolver++', use_karras_sigmas=True)": ("dpmpp_2m_sde", "karras"),
    "DPMSolverMultistepScheduler(algorithm_type=sde-dpmsolver++, solver_type=heun)": ("dpmpp_2m_sde_heun", None),
    "DPMSolverMultistepScheduler(solver_order=3)": ("dpmpp_3m", None),
    "DPMSolverMultistepScheduler[algorithm_type=dpmsolver, use_lu_lambdas=True]": ("dpm_solver", "lu_lambdas"),
    "EulerDiscreteScheduler(timestep_spacing=trailing)": ("euler", "trailing"),
    "KDPM2DiscreteScheduler(use_exponential_sigmas=True)": ("dpm_2", "exponential"),
}

SPACING_NAMES = {
    "uniform": "Uniform|normal|discrete|uniform", "sgm_uniform": "SGM Uniform|SGMUniform|sgm_uniform",
    "simple": "Simple|simple", "ddim_uniform": "DDIM|ddim_uniform", "karras": "Karras|karras|use_karras_sigmas",
    "exponential": "Exponential|exponential|use_exponential_sigmas", "polyexponential": "Polyexponential",
    "beta": "Beta|beta|use_beta_sigmas", "kl_optimal": "KL Optimal|kl_optimal", "align_your_steps": "Align Your Steps",
    "align_your_steps_gits": "Align Your Steps GITS|align_your_steps_GITS",
    "align_your_steps_32": "Align Your Steps 32",
    "linear_quadratic": "linear_quadratic", "turbo": "Turbo|turbo", "laplace": "Laplace", "vp": "VPScheduler|vp",
    "lu_lambdas": "use_lu_lambdas", "flow_sigmas": "use_flow_sigmas", "ays": "ays", "gits": "gits", "lcm": "lcm",
    "smoothstep": "smoothstep", "sd_turbo": "SDTurboScheduler", "leading": "leading", "trailing": "trailing",
    "linspace": "linspace",
}  # fmt: skip


def every(table: dict[str, str]) -> list[tuple[str, str]]:
    """`(one name, what it stands for)` from what it stands for -> `one|two`."""
    return [(name, meant) for meant, names in table.items() for name in names.split("|")]


@pytest.mark.parametrize(("label", "sampler"), [*every(A1111), *COMFY.items(), *INVOKE.items(), *OTHERS.items()])
def test_a_sampler_alone(label: str, sampler: str) -> None:
    assert resolve(label) == (sampler, None)


@pytest.mark.parametrize(("label", "named"), [*FUSED.items(), *CLASSES.items()])
def test_a_sampler_with_its_spacing(label: str, named: tuple[str, str | None]) -> None:
    assert resolve(label) == named
    assert resolve(label.upper() if "Scheduler" not in label else f" {label} ") == named


@pytest.mark.parametrize(("label", "spacing"), every(SPACING_NAMES))
def test_spacings(label: str, spacing: str) -> None:
    assert SPACINGS.name(label) == spacing


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_every_name_of_a_sampler_is_it(name: str) -> None:
    for alias in (name, *SAMPLERS.aliases(name)):
        assert resolve(alias)[0] == name


@pytest.mark.parametrize("name", list(LEFT_OUT))
def test_what_is_left_out_says_why(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        resolve(name)
    assert str(caught.value) == f"sampler {name!r} is not available: {LEFT_OUT[name]}"


@pytest.mark.parametrize("label", ["Undefined", "", "Karras", "Euler Karrass", "DPM++ 9Z", "NoSuchScheduler(a=b)"])
def test_what_is_no_sampler(label: str) -> None:
    with pytest.raises(RequestError, match="unknown sampler"):
        resolve(label)


def test_what_a_label_means_beside_the_sampler() -> None:
    assert label_options("uni_pc") == {"variant": "bh1"}
    assert label_options("UNI-PC bh2") == {"variant": "bh2"}
    assert label_options("exp_heun_2_x0") == {"eta": 0.0, "r": 1.0, "solver_type": "phi_2"}
    assert label_options("euler") == {}
    for label in ("uni_pc", "uni_pc_bh2", "exp_heun_2_x0", "exp_heun_2_x0_sde"):
        assert set(label_options(label)) <= set(SAMPLERS[resolve(label)[0]].options)


@pytest.mark.parametrize(
    ("sampler", "spacing", "labels"),
    [
        ("dpmpp_2m", "karras", ("DPM++ 2M", "Karras")),
        ("euler_a", None, ("Euler a", "Automatic")),
        ("euler", "uniform", ("Euler", "Uniform")),
        ("euler", "linspace", ("Euler", "Uniform")),
        ("pndm", "leading", ("PLMS", "DDIM")),
        ("dpmpp_2m_sde", "beta_timesteps", ("DPM++ 2M SDE", "Beta")),
        ("res_multistep", "vp", ("res_multistep", "vp")),
    ],
)
def test_labels_of_automatic1111(sampler: str, spacing: str | None, labels: tuple[str, str]) -> None:
    assert a1111_labels(sampler, spacing) == labels


@pytest.mark.parametrize("label", [name for names in A1111.values() for name in names.split("|")[:1]])
@pytest.mark.parametrize(
    "kind", ["Karras", "Exponential", "SGM Uniform", "Align Your Steps", "KL Optimal", "Beta", "Simple"]
)
def test_labels_come_back(label: str, kind: str) -> None:
    sampler, spacing = resolve(f"{label} {kind}")
    assert a1111_labels(sampler, spacing) == (label, kind)
