"""Guides against diffusers: whole runs of its pipelines, the same weights and seeds.

Compared are the final latents, before a VAE could hide anything. The two sum in different orders (diffusers keeps x in
DDPM units, Reverie in units of sigma) and guidance multiplies what rounding leaves by its scales: 3e-5 of the largest
latent, measured 1e-6 to 8e-6. Every test also asks that the guide changed a hundred times more than that.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from reverie.diffusion.parameterisation import PARAMETERISATIONS
from reverie.diffusion.process import Process
from reverie.families.base import preconditioned
from reverie.families.sd1.folder import load_part
from reverie.sampling.guidance import Clock, Conditions, Weight, guided
from reverie.sampling.guides import Context, build
from reverie.sampling.tapping import Layout
from reverie.types import Cond
from tests import tiny
from tests.tiny import diffusers

PROMPT, NEGATIVE = "a red apple on a table", "blurry"
STEPS, SEED, SCALE = 4, 11, 4.0
SIZE = (8, 8)  # latents; four pixels each
TOLERANCE = 3e-5
PROCESS = Process.named()
Wanted = tuple[tuple[str, Mapping[str, Any]], ...]
Oracle = Callable[[Tensor, Tensor, int], Tensor]
"""`(positive, negative, step) -> guided`, outputs of the network."""


def scheduler(prediction: str = "epsilon") -> Any:
    own = {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": prediction}
    return tiny.scheduler_of({"_class_name": "DDIMScheduler", **tiny.SCHEDULER, **own})


def opinionated(unet: Any) -> Any:
    """Random weights that listen to the prompt and look somewhere in particular: guides need something to work on."""
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if any(part in name for part in ("attn1.to_q", "attn1.to_k", "attn2.to_v", "attn2.to_out")):
                weight.mul_(4)
    return unet


class Model:
    """A pipeline of diffusers and Reverie's U-Net with the same weights."""

    def __init__(self, folder: Path, in_channels: int = 4) -> None:
        self.pipe = tiny.pipeline(folder, scheduler(), merges_kept=500)
        torch.manual_seed(1)
        self.pipe.unet = opinionated(tiny.unet(in_channels=in_channels))
        self.pipe.unet.save_pretrained(folder / "unet")
        self.unet = load_part(folder / "unet", "unet")
        self.context = Context(Layout.of(self.unet), PROCESS)
        with torch.no_grad():
            self.positive, self.negative = self.pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)

    def conditions(self, picture: Tensor | None = None) -> Conditions:
        nothing = None if picture is None else Cond(self.negative, channels=torch.zeros_like(picture))
        positive, negative = Cond(self.positive, channels=picture), Cond(self.negative, channels=picture)
        return Conditions(((1.0, positive),), ((1.0, negative),), image_negative=nothing)

    @torch.no_grad()
    def drawn(
        self, *wanted: tuple[str, Mapping[str, Any]], scale: float = SCALE, prediction: str = "epsilon",
        picture: Tensor | None = None, size: tuple[int, int] = SIZE,
    ) -> Tensor:  # fmt: skip
        """Reverie's latents: DDIM without fresh noise is Euler's method in units of sigma."""
        steps = scheduler(prediction)
        steps.set_timesteps(STEPS)
        levels = [PROCESS.sigma(float(t)) for t in steps.timesteps] + [PROCESS.sigma(0)]
        kind, given = PARAMETERISATIONS[prediction], self.conditions(picture)
        predict = preconditioned(self.unet, PROCESS, kind, torch.float32, told=round)
        guidance = build(wanted, self.context, Weight(scale))
        denoise = guided(predict, lambda index: given, guidance, Clock(tuple(levels)), kind)
        x = PROCESS.scale(levels[0]) * self.noise(size)
        for sigma, down in pairwise(levels):
            x0 = denoise(x, sigma)
            x = x0 + (down / sigma) * (x - x0)
        latents: Tensor = x / PROCESS.scale(levels[-1])
        return latents

    def noise(self, size: tuple[int, int] = SIZE) -> Tensor:
        return torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(SEED))

    def pipeline(self, name: str, prediction: str = "epsilon", **settings: Any) -> Any:
        parts = {k: v for k, v in self.pipe.components.items() if k != "scheduler"}
        made = getattr(diffusers, name)(
            **parts, scheduler=scheduler(prediction), requires_safety_checker=False, **settings
        )
        made.set_progress_bar_config(disable=True)
        return made

    def reference(self, pipe: Any, scale: float = SCALE, **options: Any) -> Tensor:
        latents: Tensor = pipe(
            PROMPT, negative_prompt=NEGATIVE, num_inference_steps=STEPS, guidance_scale=scale,
            generator=torch.Generator().manual_seed(SEED), output_type="latent", **options,
        ).images  # fmt: skip
        return latents

    @torch.no_grad()
    def loop(self, combine: Oracle, prediction: str = "epsilon") -> Tensor:
        """The loop of diffusers' pipelines around one of its guiders."""
        steps = scheduler(prediction)
        steps.set_timesteps(STEPS)
        latents = self.noise()
        for i, t in enumerate(steps.timesteps):
            both = self.pipe.unet(torch.cat([latents] * 2), t, torch.cat([self.negative, self.positive])).sample
            negative, positive = both.chunk(2)
            latents = steps.step(combine(positive, negative, i), t, latents).prev_sample
        return latents


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("guided"))


def same(got: Tensor, want: Tensor, plain: Tensor) -> None:
    """`got` is `want`, and neither is `plain`."""
    size = float(want.abs().max())
    assert (got - want).abs().max() < TOLERANCE * size
    assert (want - plain).abs().max() > 100 * TOLERANCE * size


def test_plain_guidance(model: Model) -> None:
    for prediction in ("epsilon", "v_prediction"):
        want = model.reference(model.pipeline("StableDiffusionPipeline", prediction))
        same(model.drawn(prediction=prediction), want, model.drawn(prediction=prediction, scale=1.0))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_rescale(model: Model, prediction: str, share: float) -> None:
    pipe = model.pipeline("StableDiffusionPipeline", prediction)
    want = model.reference(pipe, scale=9.0, guidance_rescale=share)
    got = model.drawn(("rescale", {"share": share}), scale=9.0, prediction=prediction)
    same(got, want, model.drawn(scale=9.0, prediction=prediction))


@pytest.mark.parametrize(
    ("settings", "layers", "scale"),
    [
        ({"scale": 3.0}, "mid", SCALE),
        ({"scale": 3.0}, "mid", 1.0),
        ({"scale": 3.0, "adaptive_scale": 0.004}, "mid", SCALE),
        ({"scale": 2.0}, "up.1+down.0.1", SCALE),
    ],
)
def test_pag(model: Model, settings: dict[str, float], layers: str, scale: float) -> None:
    theirs = {"mid": ["mid"], "up.1+down.0.1": ["up_blocks.1", "down_blocks.0.attentions.1"]}[layers]
    pipe = model.pipeline("StableDiffusionPAGPipeline", pag_applied_layers=theirs)
    want = model.reference(
        pipe, scale, pag_scale=settings["scale"], pag_adaptive_scale=settings.get("adaptive_scale", 0.0)
    )
    same(model.drawn(("pag", settings | {"layers": layers}), scale=scale), want, model.drawn(scale=scale))


def test_pag_with_rescale(model: Model) -> None:
    pipe = model.pipeline("StableDiffusionPAGPipeline", "v_prediction", pag_applied_layers=["mid"])
    want = model.reference(pipe, pag_scale=3.0, guidance_rescale=0.7)
    wanted: Wanted = (("pag", {"scale": 3.0}), ("rescale", {"share": 0.7}))
    got = model.drawn(*wanted, prediction="v_prediction")
    same(got, want, model.drawn(wanted[0], prediction="v_prediction"))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scale", [SCALE, 1.0])
def test_sag(model: Model, prediction: str, scale: float) -> None:
    pipe = model.pipeline("StableDiffusionSAGPipeline", prediction)
    want = model.reference(pipe, scale, sag_scale=1.5)
    got = model.drawn(("sag", {"scale": 1.5}), scale=scale, prediction=prediction)
    same(got, want, model.drawn(scale=scale, prediction=prediction))


def test_sag_of_a_wide_picture(model: Model) -> None:
    """A mask of 4 x 6 places on latents of 8 x 12."""
    want = model.reference(model.pipeline("StableDiffusionSAGPipeline"), sag_scale=1.5, height=32, width=48)
    same(model.drawn(("sag", {"scale": 1.5}), size=(8, 12)), want, model.drawn(size=(8, 12)))


@pytest.mark.parametrize(
    "factors", [{"b1": 1.5, "b2": 1.6, "s1": 0.9, "s2": 0.2}, {"b1": 0.6, "b2": 1.2, "s1": 2.0, "s2": 1.0}]
)
def test_freeu(model: Model, factors: dict[str, float]) -> None:
    pipe = model.pipeline("StableDiffusionPipeline")
    pipe.enable_freeu(**factors)
    try:
        want = model.reference(pipe)
    finally:
        pipe.disable_freeu()
    same(model.drawn(("freeu", factors)), want, model.drawn())


def test_freeu_on_one_evaluation(model: Model) -> None:
    """Bit-close: 1e-5 of the answer."""
    taps = build([("freeu", {})], model.context, Weight()).taps
    x, t = model.noise(), torch.tensor([300.0])
    model.pipe.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    try:
        with torch.no_grad():
            want = model.pipe.unet(x, t, model.positive).sample
            got = model.unet(x, t, model.positive, taps)
    finally:
        model.pipe.unet.disable_freeu()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model whose U-Net sees a picture in four channels of its own."""
    return Model(tmp_path_factory.mktemp("seeing"), in_channels=8)


@pytest.mark.parametrize(("text", "image"), [(4.0, 1.5), (2.0, 3.0), (5.0, 1.0)])
def test_instruct_pix2pix(seeing: Model, text: float, image: float) -> None:
    model = seeing
    picture = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    pipe = model.pipeline("StableDiffusionInstructPix2PixPipeline")
    want = model.reference(pipe, text, image=picture, image_guidance_scale=image)
    got = model.drawn(("instruct_pix2pix", {"scale": image}), scale=text, picture=picture)
    same(got, want, model.drawn(scale=1.0, picture=picture))


APG = [
    {"eta": 0.0, "norm_threshold": 15.0, "momentum": -0.5},
    {"eta": 0.5, "norm_threshold": 0.7, "momentum": 0.3},
    {"eta": 0.2, "norm_threshold": 0.0, "momentum": 0.0},
]


@pytest.mark.parametrize(("form", "prediction"), [("paper", "epsilon"), ("diffusers", "v_prediction")])
@pytest.mark.parametrize("settings", APG)
def test_apg(model: Model, settings: dict[str, float], form: str, prediction: str) -> None:
    """diffusers' guider sees the network's output; its "original formulation" counts the scale from 0."""
    module = diffusers.guiders.adaptive_projected_guidance
    buffer = module.MomentumBuffer(settings["momentum"]) if settings["momentum"] else None
    paper = form == "paper"

    def combine(positive: Tensor, negative: Tensor, step: int) -> Tensor:
        guided: Tensor = module.normalized_guidance(
            positive, negative, 9.0 - paper, buffer, settings["eta"], settings["norm_threshold"], paper
        )
        return guided

    want = model.loop(combine, prediction)
    got = model.drawn(("apg", {**settings, "space": "output", "form": form}), scale=9.0, prediction=prediction)
    same(got, want, model.drawn(scale=9.0, prediction=prediction))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_steps", [0, 2])
def test_cfg_zero(model: Model, prediction: str, zero_steps: int) -> None:
    guider = diffusers.guiders.ClassifierFreeZeroStarGuidance(guidance_scale=SCALE, zero_init_steps=zero_steps)

    def combine(positive: Tensor, negative: Tensor, step: int) -> Tensor:
        guider.set_state(step, STEPS, torch.tensor(0))
        guided: Tensor = guider.forward(positive, negative).pred
        return guided

    want = model.loop(combine, prediction)
    got = model.drawn(("cfg_zero", {"zero_steps": zero_steps}), prediction=prediction)
    same(got, want, model.drawn(prediction=prediction))


@contextmanager
def skipped(block: Any) -> Iterator[None]:
    """A transformer block of diffusers through which its input passes."""
    block.forward = lambda hidden_states, *args, **named: hidden_states
    try:
        yield
    finally:
        del block.forward


def test_slg(model: Model) -> None:
    """diffusers' guider on its own U-Net, whose middle transformer block is skipped for the third answer."""
    guider = diffusers.guiders.SkipLayerGuidance(
        guidance_scale=SCALE, skip_layer_guidance_scale=2.0, skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=0.8, skip_layer_guidance_layers=[0],
    )  # fmt: skip
    state = SimpleNamespace(latents=model.noise())
    steps = scheduler()
    steps.set_timesteps(STEPS)
    unet = model.pipe.unet
    with torch.no_grad():
        for i, t in enumerate(steps.timesteps):
            guider.set_state(i, STEPS, t)
            positive, negative = (unet(state.latents, t, c).sample for c in (model.positive, model.negative))
            with skipped(unet.mid_block.attentions[0].transformer_blocks[0]):
                without = unet(state.latents, t, model.positive).sample
            pred = guider.forward(positive, negative, without).pred
            state.latents = steps.step(pred, t, state.latents).prev_sample
    # Their guider begins after the step of its start, and ends before int(0.8 * 4) = 3: steps 1 and 2.
    got = model.drawn(("slg", {"scale": 2.0, "start": 0.1, "end": 0.75}))
    same(got, state.latents, model.drawn())
