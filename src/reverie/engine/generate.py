"""One function draws every picture."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from PIL.Image import Image
from torch import Tensor

from reverie.diffusion.noise import picture_seeds
from reverie.engine.canvas import Canvas, prepare
from reverie.engine.conditions import networks_of, words_of
from reverie.engine.drawing import Job, Kit, Picture, drawn
from reverie.engine.memory import frugally
from reverie.engine.plan import Pass, plan, preset_of, refined, second_plan
from reverie.engine.request import Request
from reverie.engine.resolve import draws_over, resolve

if TYPE_CHECKING:
    from reverie.engine.bundle import Model

Progress = Callable[[int, int], None]
Watch = Callable[[int, int, Tensor], None]


@dataclass(frozen=True, eq=False)
class Result:
    """What was drawn.

    Attributes:
        pixels: `(N, H, W, 3)` float32 in [0, 1], before rounding to bytes.
        latents: `(N, C, h, w)` float32, scaled as the U-Net sees them.
        request: the request with every default made explicit, the seed too.
        models: for each picture name, source, family and hash of the model, the hash of the one that took over, and
            those of adapters (`lora: NAME`, `control: NAME`...).
        own: for each picture the request that draws it alone, its wildcards decided.
    """

    pixels: Tensor
    latents: Tensor
    request: Request
    models: tuple[dict[str, str], ...]
    own: tuple[Request, ...]

    @property
    def model(self) -> dict[str, str]:
        """What drew the first picture."""
        return self.models[0]

    @cached_property
    def images(self) -> list[Image]:
        """PIL pictures; saved as PNG they carry their request."""
        from reverie.engine.image import to_images

        each = enumerate(zip(self.own, self.models, strict=True))
        return [image for i, (own, model) in each for image in to_images(self.pixels[i : i + 1], [own], model)]


def pictures_of(request: Request) -> list[Picture]:
    """The pictures of a resolved request, each with its own seed and its own words.

    Raises:
        RequestError: an unknown wildcard.
    """
    if request.travel:
        last = request.travel.frames - 1
        return [Picture(i, request, i / last) for i in range(last + 1)]
    seed, variation = request.seed or 0, request.variation_seed or 0
    seeds, variations = picture_seeds(seed, variation, request.variation_strength, request.count)
    shared = preset_of(request).seeds == "batch"
    found = []
    for i, (own_seed, own_variation) in enumerate(zip(seeds, variations, strict=True)):
        if request.only not in (None, i):
            continue
        words = words_of(request, seed + i)
        update: dict[str, Any] = {"prompt": words.prompt, "negative_prompt": words.negative, "batch_size": 1}
        if (words.prompt, words.negative) != (request.prompt, request.negative_prompt):
            update |= {"dynamic_prompts": False, "wildcards": None}  # they are decided
        update |= {"only": i} if shared and request.count > 1 else {"count": 1, "seed": own_seed}
        if request.variation_strength:
            update["variation_seed"] = own_variation
        if request.hires:
            second = words_of(request, seed + i, second=True)
            update["hires"] = request.hires.model_copy(
                update={"prompt": request.hires.prompt and second.prompt,
                        "negative_prompt": request.hires.negative_prompt and second.negative}
            )  # fmt: skip
        found.append(Picture(i, request.model_copy(update=update)))
    return found


def generate(
    model: "Model", request: Request, *, progress: Progress | None = None, watch: Watch | None = None
) -> Result:
    """Draw `request` with `model`; see `Model.generate`."""
    request = resolve(model, request)
    results = list(batches(model, request, progress=progress, watch=watch))
    pixels, latents = torch.cat([r.pixels for r in results]), torch.cat([r.latents for r in results])
    own, models = (tuple(one for r in results for one in getattr(r, name)) for name in ("own", "models"))
    return Result(pixels, latents, request, models, own)


def batches(
    model: "Model",
    request: Request,
    *,
    pictures: Sequence[Picture] | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
    last: bool = False,
) -> Iterator[Result]:
    """Draw a resolved request, handing over each batch as soon as it is drawn.

    Args:
        pictures: instead of the request's own; prompts and seeds may be others, all else is the request's.
        progress: called as `(evaluations done, evaluations in all)`.
        watch: called as `(evaluations done, evaluations in all, x0)` with the latents as they are so far.
        last: nothing is drawn with the model afterwards: its denoising network goes before the last picture is decoded.
    """
    from reverie.engine.image import fingerprint

    if model.memory is not None:
        from reverie.engine.budget import fit  # for those who set a limit

        fit(model, request, model.memory, prepared, last=last)
    done, total = 0, 0

    def tell(x0: Tensor) -> None:
        nonlocal done, total
        done += 1
        total = max(done, total)  # samplers that choose their own steps may take more than is usual
        if progress:
            progress(done, total)
        if watch:
            watch(done, total, x0)

    job, groups = prepared(model, request, pictures=pictures, tell=tell)
    if last:
        job = replace(job, last=groups[-1][-1])
    total = sum(run.evaluations for run in job.passes) * len(groups)
    made_by = fingerprint(model)
    if request.refine is not None:
        made_by |= {"refiner_hash": fingerprint(model.successor(request.refine.model))["hash"]}
    for group in groups:
        own = (picture.own for picture in group)
        for part in _halved(job, group):
            latents, pixels = part
            used = made_by | job.kits[model].used(group[0].own)
            yield Result(pixels, latents.cpu(), request, (used,) * len(pixels), tuple(islice(own, len(pixels))))


def prepared(
    model: "Model",
    request: Request,
    kit: type[Kit] = Kit,
    *,
    pictures: Sequence[Picture] | None = None,
    tell: Callable[[Tensor], None] = lambda x0: None,
) -> tuple[Job, list[list[Picture]]]:
    """What is drawn for a resolved request, and which of its pictures together.

    Args:
        kit: what adapters come in.
        pictures, tell: see `batches` and `Job`.
    """
    scale = model.upscaler(request.upscaler).scale if request.upscaler not in {None, "none"} else 1
    canvas = prepare(request, model.parts.vae.config.factor, scale) if draws_over(model, request) else None
    passes = _passes(model, request, canvas)
    groups = _grouped(request, passes, pictures_of(request) if pictures is None else pictures, model.measures.batch)
    models = {each.model for run in passes for each in (run, run.then) if each is not None}
    asked = sum(run.evaluations for run in passes) * len(groups)
    kits = {
        each: kit(each, request if each is model else _bare(request), asked, named=each is model) for each in models
    }
    return Job(model, request, canvas, passes, kits, tell), groups


def _passes(model: "Model", request: Request, canvas: Canvas | None) -> tuple[Pass, ...]:
    size = canvas.size if canvas else (request.width or 0, request.height or 0)
    # Inpainting at full strength, and models that see the picture beside the noise, begin with noise alone.
    from_noise = (
        canvas is None
        or model.parts.identity.variant == "pix2pix"
        or (canvas.mask is not None and request.strength == 1)
    )
    first = plan(model, request, size, over=not from_noise)
    second = second_plan(model, request, first)
    last = refined(model, request, second or first)
    return last if second is None else (first, *last)


def _grouped(
    request: Request, passes: tuple[Pass, ...], pictures: Sequence[Picture], most: int | None
) -> list[list[Picture]]:
    """Pictures that are drawn together: as many as the batch size says, where their prompts have the same parts.

    Args:
        most: of them at once; None for no bound.
    """
    alone = request.travel is not None or any(run.sampler.adaptive for run in passes)
    size = 1 if alone else min(request.batch_size, most or request.batch_size)
    groups: list[list[Picture]] = []
    for picture in pictures:
        if groups and len(groups[-1]) < size and _like(groups[-1][-1].own, picture.own):
            groups[-1].append(picture)
        else:
            groups.append([picture])
    return groups


def _like(one: Request, other: Request) -> bool:
    """Whether two pictures' prompts, of both passes, have as many parts of equal weights, and name the same LoRAs."""
    return all(
        a == b or ("AND" not in a + b and networks_of(one, a) == networks_of(other, b))
        for a, b in zip(_texts(one), _texts(other), strict=True)
    )


def _texts(own: Request) -> tuple[str, ...]:
    """Every prompt of a picture."""
    hires = own.hires
    second = () if hires is None else (hires.prompt or "", hires.negative_prompt or "")
    return (own.prompt, own.negative_prompt, *second)


def _bare(request: Request) -> Request:
    """A request without adapters, for a model that takes over: they were made for the other one."""
    return request.model_copy(update={"loras": (), "embeddings": (), "controls": (), "image_prompts": ()})


def _halved(job: Job, group: list[Picture]) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw a group; where memory runs out, half of it at a time."""
    if len(group) == 1:
        yield _alone(job, group)
        return
    half = len(group) // 2

    def whole() -> list[tuple[Tensor, Tensor]]:
        return [drawn(job, group)]

    def halves() -> list[tuple[Tensor, Tensor]]:
        return [*_halved(job, group[:half]), *_halved(job, group[half:])]

    yield from frugally("drawing", [(f"{len(group)} pictures at once", whole), ("half as many", halves)])


def _alone(job: Job, group: list[Picture]) -> tuple[Tensor, Tensor]:
    """One picture; where the device's memory runs out, with one part of the model on it at a time."""
    model = job.model

    def one_by_one() -> tuple[Tensor, Tensor]:
        model.offload = True
        return drawn(job, group)

    if model.device.type == "cpu" or model.offload:
        return drawn(job, group)
    ways = [("with every part on the device", lambda: drawn(job, group)), ("with one part at a time", one_by_one)]
    return frugally("drawing", ways)
