"""The drawing of one batch of pictures: pass by pass, from noise or a picture to pixels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reverie.adapters.attach import Attachment
from reverie.engine import latents as latent_space
from reverie.engine import tiny
from reverie.engine.caching import saving
from reverie.engine.canvas import Canvas, spread
from reverie.engine.conditions import Encoder, Script, Words, between, joined, networks_of, script_conditions
from reverie.engine.equipment import Equipment
from reverie.engine.noises import Noises, brownian, noises
from reverie.engine.once import once
from reverie.engine.plan import Pass, preset_of
from reverie.engine.request import Request
from reverie.engine.showing import shown, told
from reverie.engine.slicing import sliced
from reverie.errors import GenerationError
from reverie.families.base import preconditioned
from reverie.sampling.guidance import Clock, Conditions, Guidance, Guided, Parts, Weight, guided
from reverie.sampling.guides import Context, build
from reverie.sampling.presets import Preset
from reverie.sampling.tapping import Layout
from reverie.sampling.wrappers import checked, masked, watched, windowed, windows
from reverie.types import Cond, Denoise, Predict

if TYPE_CHECKING:
    from reverie.engine.bundle import Model
    from reverie.engine.steering import Steerer, Steering


@dataclass(frozen=True)
class Picture:
    """One picture that is to be drawn.

    Attributes:
        place: which of the request's pictures it is, from 0.
        own: the request that draws it alone.
        travelled: how far it is on the way to `request.travel`, from 0 to 1.
    """

    place: int
    own: Request
    travelled: float = 0.0


class Kit:
    """A model and the adapters of a request: which of them a prompt asks for, and prompts encoded with them.

    Args:
        evaluations: about how often the denoising network will be asked.
        named: whether LoRAs that prompts name are meant for this model.
    """

    def __init__(self, model: "Model", request: Request, evaluations: int, *, named: bool = True) -> None:
        self._model, self._request, self._named, self.evaluations = model, request, named, evaluations
        self.equipment = Equipment(model, request, evaluations)
        self._encoders: dict[tuple[Attachment, ...], Encoder] = {}

    def attachments(self, text: str) -> tuple[Attachment, ...]:
        """The LoRAs of the request, those that a prompt names, and those that picture prompts bring."""
        named = self._named_by(text)
        return named if not self._request.image_prompts else (*named, *self._steerer.loras)

    def _named_by(self, text: str) -> tuple[Attachment, ...]:
        return self.equipment.attachments(networks_of(self._request, text) if self._named else ())

    def encoder(self, attachments: tuple[Attachment, ...]) -> Encoder:
        """One for each set of LoRAs."""
        if attachments not in self._encoders:
            self._encoders[attachments] = Encoder(self._model, self._request, self.equipment, attachments)
        return self._encoders[attachments]

    def steering(self, width: int, height: int) -> "Steering | None":
        """What steers a drawing of so many pixels; None where the request names no pictures that do."""
        return self._steerer.at(width, height) if self._steers else None

    @property
    def _steers(self) -> bool:
        return bool(self._request.controls or self._request.image_prompts)

    @cached_property
    def _steerer(self) -> "Steerer":
        from reverie.engine.steering import Steerer  # many modules, for requests that want them

        return Steerer(self._model, self._request, self.equipment.library, self.evaluations)

    def used(self, own: Request) -> dict[str, str]:
        """SHA-256 of the adapters that were used for a picture, by kind and name."""
        hires = own.hires.prompt if own.hires else None
        attachments = [a for text in (own.prompt, hires or "") for a in self._named_by(text)]
        steered = self._steerer.used if self._steers else {}
        return self.equipment.used(attachments) | steered | tiny.used(self._model, own)


@dataclass(frozen=True, eq=False)
class Job:
    """A resolved request and everything that its pictures share.

    Attributes:
        kits: the adapters of the request, for each model that draws.
        tell: is told every x0.
        last: after which the denoising networks are needed no more; None if they are to stay.
    """

    model: "Model"
    request: Request
    canvas: Canvas | None
    passes: tuple[Pass, ...]
    kits: "Mapping[Model, Kit]"
    tell: Callable[[Tensor], None]
    last: Picture | None = None


@dataclass(frozen=True, eq=False)
class Beginning:
    """What a pass begins with.

    Attributes:
        noise: `(B, C, h, w)`, the first.
        known: like it, scaled latents of the picture that is drawn over.
        mask: `(1, 1, h, w)`, 1 where it is drawn.
        channels: `(B, C', h, w)`, what the network sees beside `x`.
        told: `(B, V)` each, what it is told beside the prompt and beside the negative prompt.
    """

    noise: Tensor
    known: Tensor | None = None
    mask: Tensor | None = None
    channels: Tensor | None = None
    told: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Sample:
    """Where a pass has come to, for the next one to go on.

    Attributes:
        x: `(B, C, h, w)`, in units of sigma.
        latents: the same, scaled.
        noise: what the pass draws from.
    """

    x: Tensor
    latents: Tensor
    begun: Beginning
    noise: Noises


@torch.no_grad()
def drawn(job: Job, group: Sequence[Picture]) -> tuple[Tensor, Tensor]:
    """Latents `(B, C, h, w)` and pixels `(B, H, W, 3)` of some pictures, through every pass.

    Raises:
        GenerationError: the mathematics failed.
    """
    sample: Sample | None = None
    for run in job.passes:
        sample = _pass(job, group, run, sample)
    assert sample is not None
    if any(picture is job.last for picture in group):
        for model in job.kits:
            model.release("unet")
    return sample.latents, finished(job, sample.latents)


def finished(job: Job, latents: Tensor) -> Tensor:
    """Latents -> pixels `(B, H, W, 3)` float32 on the CPU: decoded, enlarged, put in their place."""
    model, request = job.model, job.request
    pixels = tiny.decode(model, latents, request)
    if not torch.isfinite(pixels).all():
        raise GenerationError("the decoded picture is not finite; try precision float32")
    if request.upscaler not in {None, "none"}:
        pixels = model.upscaler(str(request.upscaler)).enlarge(pixels)
    pixels = pixels.float().cpu()
    if job.canvas is not None and request.hires is None:  # after a second pass it is larger than the canvas
        pixels = job.canvas.finished(pixels, keep=request.keep_unmasked)
    return pixels.permute(0, 2, 3, 1).contiguous()


def _pass(job: Job, group: Sequence[Picture], run: Pass, before: Sample | None) -> Sample:
    """One run of a sampler."""
    request, process, config = job.request, run.model.parts.process, job.model.parts.vae.config
    factor, preset = config.factor, preset_of(request)
    shape = (config.latent_channels, run.height // factor, run.width // factor)
    own, rows = [_travelling(picture) for picture in group], [picture.place for picture in group]
    if before is None or run.after == "enlarged":
        noise = noises(request, preset, own, rows, shape, job.model.device, factor)
    else:
        noise = before.noise
    begun = _beginning(job, run, noise, before)
    if run.steps == 0:
        assert begun.known is not None
        return Sample(begun.known, begun.known, begun, noise)
    x = before.x if before and run.after == "sample" else _started(run, begun, preset)
    denoise, unconditional = _denoiser(job, group, run, begun)
    if run.then is not None:
        begun_then = _beginning(job, run.then, noise, Sample(x, x, begun, noise))
        other = _denoiser(job, group, run.then, begun_then)
        start = float(run.then.sigmas[0])
        denoise, unconditional = (switched(*both, start) for both in zip((denoise, unconditional), other, strict=True))
    options = dict(run.options)
    if run.sampler.unconditional:
        options["unconditional"] = unconditional
    on_the_way: Any = noise
    if run.sampler.brownian:
        on_the_way = brownian(request, preset, own, rows, shape, job.model.device, run)
    x = run.sampler.function(denoise, x, run.sigmas, noise=on_the_way, process=process, **options)
    latents = latent_space.end(x, float(run.sigmas[-1]), process, run.sampler)
    if begun.mask is not None and begun.known is not None:  # samplers may end above 0, and the picture has no noise
        latents = torch.where(begun.mask > 0, latents, begun.known)
    return Sample(x, latents, begun, noise)


def switched(first: Denoise, second: Denoise, start: float) -> Denoise:
    """What answers as `first` above a noise level, and as `second` from there on."""
    return lambda x, sigma: (first if sigma > start * (1 + 1e-6) else second)(x, sigma)


def _started(run: Pass, begun: Beginning, preset: Preset) -> Tensor:
    """The first sample: the picture under noise, or noise alone."""
    sigma, process = float(run.sigmas[0]), run.model.parts.process
    if run.over and begun.known is not None:
        return process.noised(begun.known, begun.noise, begun.noise.new_tensor(sigma))
    return latent_space.start(begun.noise, sigma, process, preset, run.sampler, run.base)


def _travelling(picture: Picture) -> Request:
    """The request of a frame: the seed at the end is a variation of growing strength."""
    travel = picture.own.travel
    if travel is None or travel.seed is None:
        return picture.own
    return picture.own.model_copy(update={"variation_seed": travel.seed, "variation_strength": picture.travelled})


def _beginning(job: Job, run: Pass, noise: Noises, before: Sample | None) -> Beginning:
    """The picture under the noise, its mask, and what the network sees and is told besides."""
    channels, vectors = shown(run, job.request, job.canvas, noise), told(run, job.request, noise)
    if before is None:
        begun = _first(job, run, noise)
    elif run.after == "enlarged":
        begun = Beginning(noise(), known=enlarged(job.model, before.latents, run, job.request))
    elif run.after == "latents":
        begun = Beginning(noise(), before.latents, before.begun.mask)
    else:
        begun = replace(before.begun, channels=None)
    count = len(begun.noise)
    if channels is not None:
        begun = replace(begun, channels=channels.expand(count, -1, -1, -1))
    if vectors is None:
        return replace(begun, told=None)
    return replace(begun, told=(vectors[0].expand(count, -1), vectors[1].expand(count, -1)))


def _first(job: Job, run: Pass, noise: Noises) -> Beginning:
    """Of the first pass; draws are in the order of diffusers' pipelines."""
    model, request, canvas, parts = job.model, job.request, job.canvas, job.model.parts
    if canvas is None:
        return Beginning(noise())
    pixels, hole = canvas.source().to(model.device), canvas.drawn()
    if parts.identity.variant == "pix2pix":
        first = noise()
        return Beginning(first, channels=model.encode(pixels, request)[0].expand(len(first), -1, -1, -1))
    if hole is None:
        whole = _sampled(model, pixels, request, noise)
        first = noise()
        return Beginning(first, whole.expand_as(first))
    hole = hole.to(model.device)
    shown = torch.where(hole < 0.5, pixels, torch.full_like(pixels, 0.5))
    if request.mask_fill == "fill":
        pixels = spread(pixels.cpu(), hole.cpu()).to(model.device)
    small = latent_space.mask_latents(hole, parts.vae.config.factor, preset_of(request))
    known: Tensor | None = None
    if run.over or parts.identity.variant != "inpaint":
        known = _sampled(model, pixels, request, noise)
    first = noise()
    if known is not None and request.mask_fill in {"noise", "zero"}:
        known = torch.where(small > 0, first if request.mask_fill == "noise" else torch.zeros_like(first), known)
    if known is not None:
        known = known.expand_as(first)
    if parts.identity.variant != "inpaint":
        if request.encoding == "sample":
            noise.before()  # diffusers samples what is shown for every model, and so shifts the noise on the way
        return Beginning(first, known, small)
    hidden = F.interpolate(hole, size=first.shape[-2:]).expand(len(first), -1, -1, -1)
    seen = _sampled(model, shown, request, noise).expand_as(first)
    return Beginning(first, known, channels=torch.cat([hidden, seen], 1))


def _sampled(model: "Model", pixels: Tensor, request: Request, noise: Noises) -> Tensor:
    """Scaled latents of a picture: a sample for each picture that is drawn, or the mean for all."""
    mean, deviation = model.encode(pixels, request)
    z = mean + deviation * noise.before() if request.encoding == "sample" else mean
    return model.parts.vae.config.scaled(z)


def enlarged(model: "Model", before: Tensor, run: Pass, request: Request) -> Tensor:
    """Latents of the first pass at the size of the second, enlarged as latents or as a picture."""
    hires = request.hires
    assert hires is not None
    factor = model.parts.vae.config.factor
    name, size = hires.upscaler, (run.height // factor, run.width // factor)
    if name in latent_space.LATENT_UPSCALERS:
        mode, antialias = latent_space.LATENT_UPSCALERS[name]
        return F.interpolate(before, size=size, mode=mode, antialias=antialias)
    pixels = tiny.decode(model, before, request)
    if name not in latent_space.PIXEL_UPSCALERS:
        pixels = model.upscaler(name).enlarge(pixels)
    large = latent_space.resized_pixels(pixels, (run.width, run.height), name)
    return model.parts.vae.config.scaled(model.encode(large, request)[0])


def _denoiser(job: Job, group: Sequence[Picture], run: Pass, begun: Beginning) -> tuple[Denoise, Denoise]:
    """What the sampler asks, and what it asks for the negative prompt alone (CFG++)."""
    denoise, unconditional = _answering(job, group, run, begun, _predicting(job, group, run))
    if begun.mask is not None and begun.known is not None:
        # what starts from noise alone has no picture under it yet
        process, free = run.model.parts.process, float("inf") if run.over else float(run.sigmas[0]) * (1 - 1e-6)
        denoise, unconditional = (
            masked(d, begun.mask, begun.known, begun.noise, process, free) for d in (denoise, unconditional)
        )
    return watched(checked(denoise), lambda _, x0: job.tell(x0)), unconditional


def _predicting(job: Job, group: Sequence[Picture], run: Pass) -> Predict:
    """What the network of a pass says, with the adapters of its prompt."""
    model, parts, request = run.model, run.model.parts, job.request
    kit, clock = job.kits[model], Clock.of(run.path)
    model.compiler.expect(run.evaluations)

    def make(network: nn.Module) -> Predict:
        runner = network if model.measures.blocks else model.compiler.runner(network, stays=not model.offload)
        return preconditioned(
            runner, parts.process, parts.parameterisation, model.dtype, told=run.told,
            guidance=run.guidance_scale if parts.guidance_told else None,
        )  # fmt: skip

    attachments = kit.attachments(_words(group[0].own, run).prompt)

    @cache
    def with_adapters(network: Any) -> Predict:
        return kit.equipment.predicting(network, attachments, clock, make)

    def predict(x: Tensor, sigma: float, cond: Cond) -> Tensor:
        # Asked for each time: with one part on the device at a time, encoding a prompt has put it off.
        network = model.network("unet", request.seamless, evaluations=kit.evaluations)
        return with_adapters(network)(x, sigma, cond)

    return sliced(once(predict, parts.unet), parts.unet, model.measures.slices)


def _answering(
    job: Job, group: Sequence[Picture], run: Pass, begun: Beginning, predict: Predict
) -> tuple[Denoise, Denoise]:
    """Guided answers, and those for the negative prompt alone; of the whole picture or window by window."""
    request, parameterisation = job.request, run.model.parts.parameterisation
    guidance = _guidance(job, run)
    at, clock = _conditions(job, group, run, guidance), Clock.of(run.path)
    if begun.told is not None:
        at = cache(partial(_telling, at, begun.told))
    steering = job.kits[run.model].steering(run.width, run.height)

    def within(rows: slice, columns: slice) -> Guided:
        asked = partial(saving, run=run, request=request, clock=clock, guidance=guidance)
        seen = None if begun.channels is None else begun.channels[..., rows, columns]
        conditions = at if seen is None else cache(lambda index: _seeing(at(index), seen))
        if steering is None:
            return guided(asked(predict), conditions, guidance, clock, parameterisation)
        steered = asked(steering.wrapped(predict, run, clock, rows, columns))
        return guided(
            steered, cache(lambda i: steering.told(conditions(i), i / clock.steps)), guidance, clock, parameterisation
        )

    if request.tiles is None:
        whole = within(slice(None), slice(None))
        return whole, whole.unconditional
    factor = job.model.parts.vae.config.factor
    size, overlap = request.tiles.size // factor, request.tiles.overlap // factor
    places = windows(begun.noise.shape[-2], begun.noise.shape[-1], size, overlap)
    each = [(place, within(*place)) for place in places]
    return windowed(each, overlap), windowed([(place, one.unconditional) for place, one in each], overlap)


def _guidance(job: Job, run: Pass) -> Guidance:
    request, parts = job.request, run.model.parts
    # a network that is told the scale needs no second evaluation to be guided
    scale = 1.0 if parts.guidance_told else run.guidance_scale
    weight = Weight(scale, request.guidance_curve, start=request.guidance_start, end=request.guidance_end)
    wanted: list[tuple[str, dict[str, Any]]] = [(g.name, g.options) for g in request.guides]
    if request.guidance_rescale:
        wanted.append(("rescale", {"share": request.guidance_rescale}))  # last, as in diffusers
    if parts.identity.variant == "pix2pix":
        pull = 1.5 if request.image_guidance_scale is None else request.image_guidance_scale
        wanted.insert(0, ("instruct_pix2pix", {"scale": pull}))
    return build(wanted, Context(Layout.of(parts.unet), parts.process), weight)


def _conditions(job: Job, group: Sequence[Picture], run: Pass, guidance: Guidance) -> Callable[[int], Conditions]:
    """The conditions of every step, each made once."""
    kit, first_steps = job.kits[run.model], job.passes[0].whole_steps
    encoder = kit.encoder(kit.attachments(_words(group[0].own, run).prompt))
    scripts = [Script(encoder, _words(picture.own, run), run, first_steps) for picture in group]
    travel = job.request.travel
    ends = None
    if travel and (travel.prompt is not None or travel.negative_prompt is not None):
        own = _words(job.request, run)
        words = Words(own.prompt if travel.prompt is None else travel.prompt,
                      own.negative if travel.negative_prompt is None else travel.negative_prompt)  # fmt: skip
        ends = Script(encoder, words, run, first_steps)

    batched = cache(script_conditions)  # while the words stay, so do the tensors

    @cache
    def at(index: int) -> Conditions:
        found = batched(tuple(script.at(index) for script in scripts))
        if ends is not None:
            found = _on_the_way(found, batched((ends.at(index),)), group[0].travelled)
        single = len(found.negative) == 1 and found.negative[0][0] == 1
        if "empty" in guidance.needs or not single:
            found = replace(found, empty=joined([script.empty() for script in scripts]))
        return found

    return at


def _words(own: Request, run: Pass) -> Words:
    """The words of a picture whose wildcards are decided."""
    hires = own.hires
    if not run.second or hires is None:
        return Words(own.prompt, own.negative_prompt)
    return Words(
        own.prompt if hires.prompt is None else hires.prompt,
        own.negative_prompt if hires.negative_prompt is None else hires.negative_prompt,
    )


def _on_the_way(start: Conditions, end: Conditions, share: float) -> Conditions:
    """Conditions between two, part by part; parts that only one has keep their condition and fade in or out."""

    def mixed(one: Parts, other: Parts) -> Parts:
        both = [
            (weight + share * (target - weight), between(cond, goal, share))
            for (weight, cond), (target, goal) in zip(one, other, strict=False)
        ]
        fading = [(weight * (1 - share), cond) for weight, cond in one[len(both) :]]
        rising = [(weight * share, cond) for weight, cond in other[len(both) :]]
        return (*both, *fading, *rising)

    return Conditions(mixed(start.positive, end.positive), mixed(start.negative, end.negative))


def _each(conditions: Conditions, positive: Callable[[Cond], Cond], negative: Callable[[Cond], Cond]) -> Conditions:
    return Conditions(
        tuple((weight, positive(cond)) for weight, cond in conditions.positive),
        tuple((weight, negative(cond)) for weight, cond in conditions.negative),
        None if conditions.empty is None else negative(conditions.empty),
    )


def _telling(at: Callable[[int], Conditions], vectors: tuple[Tensor, Tensor], index: int) -> Conditions:
    """The conditions of a network that is told more than the prompt."""
    positive, negative = vectors
    return _each(at(index), lambda cond: replace(cond, vector=positive), lambda cond: replace(cond, vector=negative))


def _seeing(conditions: Conditions, channels: Tensor) -> Conditions:
    """The conditions of a network that sees more than `x`; without the picture it sees zeros (instruct-pix2pix)."""

    def seen(cond: Cond) -> Cond:
        return replace(cond, channels=channels)

    blind = replace(conditions.negative[0][1], channels=torch.zeros_like(channels))
    return replace(_each(conditions, seen, seen), image_negative=blind)
