"""ControlNets at work: what each of them adds to one evaluation of the network it was made for.

`controlled` wraps `predict`: it asks every ControlNet that is active at this step, adds up what they say and hands it
to the network through `Taps.added`. The network itself is never touched.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from reverie.adapters.control_files import ControlFile, Network
from reverie.diffusion.parameterisation import Parameterisation
from reverie.diffusion.process import AnyProcess
from reverie.errors import RequestError
from reverie.nets.controlnet import ControlNet, Hint
from reverie.registry import Registry
from reverie.sampling.guidance import Clock, tapped
from reverie.types import Cond, Predict, Taps

Mode: TypeAlias = Literal["balanced", "prompt", "control", "guess"]
"""What counts more: neither; the prompt; the picture, which then acts on the prompt's rows alone (both as A1111 has
them); and diffusers' guess mode, like `control` with a curve of its own."""

Fit: TypeAlias = Literal["resize", "crop", "fill"]
"""How a picture of another size is brought to that of the drawing: stretched; scaled to cover it, the middle kept;
scaled to fit inside, black around it."""

Encode: TypeAlias = Callable[[Tensor], Tensor]
"""Pictures `(B, 3, H, W)` in [0, 1] -> the VAE's latents, not scaled."""

SOFT = 0.825  # of each map to the next; A1111's soft weights (sd-webui-controlnet, `hook.py`)
HIDDEN = -1.0  # what a pixel that is drawn anew is in the picture of an inpainting ControlNet (v1.1 inpaint)

UNION_KINDS = Registry[int]("kind of control picture")
"""What the Unions of xinsir call their kinds by number; 6 and 7 are ProMax's."""
UNION_KINDS.add("openpose", 0, ("pose",))
UNION_KINDS.add("depth", 1)
UNION_KINDS.add("hed", 2, ("softedge", "scribble", "pidi", "ted"))
UNION_KINDS.add("canny", 3, ("lineart", "anime_lineart", "mlsd"))
UNION_KINDS.add("normal", 4)
UNION_KINDS.add("segment", 5, ("seg", "segmentation"))
UNION_KINDS.add("tile", 6)
UNION_KINDS.add("repaint", 7, ("inpaint", "outpaint"))


@dataclass(frozen=True, eq=False)
class Control:
    """A ControlNet, the picture that it is shown, and how it acts.

    Attributes:
        picture: `(1, 3, H, W)` in [0, 1] for all pictures that are drawn, or `(B, 3, H, W)`, one for each.
        weight: what its answers are multiplied with.
        start, end: fractions of the steps. A step is controlled if it lies between them whole (as in diffusers).
        curve: a weight for each of its answers, from the largest map down to the middle (13 for Stable Diffusion 1, 10
            for XL), or one number, the ratio of each to the next; None for what `mode` says.
        mask: `(1, 1, H, W)` in [0, 1], where it acts; everywhere if None.
        hidden: `(1, 1, H, W)`, 1 where the picture is drawn anew (inpaint): such pixels are -1 for a ControlNet, 0 for
            a Union, and are black and marked for one of Stable Diffusion 3.
        kind: of the picture, as a Union counts them; see `UNION_KINDS`.
        beside: further pictures for the same Union, which sees all of them at once; of each only picture, hidden
            pixels, kind and weight count.
        encode: makes latents of the picture; for a ControlNet of Stable Diffusion 3.

    Raises:
        RequestError: values that cannot be.
    """

    file: ControlFile
    picture: Tensor
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: Mode = "balanced"
    curve: float | tuple[float, ...] | None = None
    mask: Tensor | None = None
    hidden: Tensor | None = None
    kind: int = 0
    beside: tuple["Control", ...] = ()
    encode: Encode | None = None

    def __post_init__(self) -> None:
        network = self.file.network
        self._check_numbers(network)
        channels = network.control.channels if isinstance(network, ControlNet) else 3
        for what, value, count in (
            ("picture", self.picture, channels), ("mask", self.mask, 1), ("hidden", self.hidden, 1)
        ):  # fmt: skip
            if value is not None and (value.ndim != 4 or value.shape[1] != count or 0 in value.shape):
                raise self._error(f"its {what} has shape {list(value.shape)}; expected (1, {count}, H, W)")
        if self.file.kind == "sd3" and self.encode is None:
            raise self._error("it is shown latents; give it an `encode`")
        if self.beside and self.file.kind != "union":
            raise self._error("it is no Union and shown one picture; give the others controls of their own")

    def _check_numbers(self, network: Network) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise self._error(
                f"control from {self.start:g} to {self.end:g} of the steps; expected 0 <= start < end <= 1"
            )
        numbers = (self.weight, *(self.curve if isinstance(self.curve, tuple) else (self.curve or 0.0,)))
        if not all(map(math.isfinite, numbers)):
            raise self._error("weights must be finite numbers")
        if isinstance(self.curve, tuple) and len(self.curve) != network.maps:
            raise self._error(f"{len(self.curve)} weights for {network.maps} answers; give one for each, or one ratio")
        union = network.control.union if isinstance(network, ControlNet) else None
        if union is not None and not 0 <= self.kind < union.kinds:
            raise self._error(f"it knows the kinds of picture 0 to {union.kinds - 1}, and was given {self.kind}")

    def _error(self, what: str) -> RequestError:
        return RequestError(f"ControlNet {self.file.name}: {what}")

    @property
    def positive_only(self) -> bool:
        """Whether it acts on the rows of the prompt alone, as `Cond.control` marks them."""
        network = self.file.network
        return self.mode in {"control", "guess"} or (isinstance(network, ControlNet) and network.control.pooled)

    def active(self, clock: Clock, sigma: float) -> bool:
        """Whether the step that `sigma` belongs to is controlled."""
        index, steps = clock.index(sigma), clock.steps
        weighs = any(control.weight for control in (self, *self.beside))
        return weighs and index / steps >= self.start and (index + 1) / steps <= self.end

    def scales(self) -> tuple[float, ...]:
        """What each answer is multiplied with, from the largest map down to the middle."""
        count = self.file.network.maps
        if isinstance(self.curve, tuple):
            found = self.curve
        elif self.mode == "guess" and self.curve is None:
            found = tuple(10 ** (i / max(count - 1, 1) - 1) for i in range(count))  # diffusers: logspace from 0.1 to 1
        else:
            usual = SOFT if self.mode in {"prompt", "control"} else 1.0
            ratio = usual if self.curve is None else self.curve
            found = tuple(ratio ** (count - 1 - i) for i in range(count))
        outside = 1.0 if self.beside else self.weight  # a Union weighs several pictures before it looks at them
        return tuple(outside * scale for scale in found)

    def fitted(self, width: int, height: int, fit: Fit = "resize") -> "Control":
        """The same for a drawing of so many pixels. Masks are fitted as the picture is."""
        return self._each(lambda t: fitted(t, width, height, fit))

    def window(self, rows: slice, columns: slice) -> "Control":
        """The same for a window of the drawing.

        Args:
            rows, columns: of latents, whole numbers of them.
        """
        factor = self.file.factor

        def pixels(span: slice) -> slice:
            first, last = (None if at is None else at * factor for at in (span.start, span.stop))
            return slice(first, last)

        return self._each(lambda t: t[..., pixels(rows), pixels(columns)])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Control":
        mask, hidden = (None if t is None else change(t) for t in (self.mask, self.hidden))
        beside = tuple(control._each(change) for control in self.beside)
        return replace(self, picture=change(self.picture), mask=mask, hidden=hidden, beside=beside)

    def shown(self) -> Tensor:
        """The picture as the network wants it, in float32: pixels `(B, 3, H, W)`, or latents `(B, C, h, w)`."""
        value = HIDDEN if self.file.kind in {"controlnet", "control-lora"} else 0.0
        picture = self.picture
        if self.hidden is not None:
            picture = torch.where(self.hidden > 0.5, torch.full_like(picture, value), picture)
        return self._latents(picture) if self.file.kind == "sd3" else picture

    def _latents(self, picture: Tensor) -> Tensor:
        network, vae = self.file.network, self.file.vae
        assert not isinstance(network, ControlNet)
        assert self.encode is not None
        if self.file.canny:  # sd3-ref `sd3_infer.py`: what the VAE sees is 127.5 p + 0.5
            picture = (127.5 * picture + 1.5) / 2
        extra = network.config.extra_channels
        shift = 0.0 if network.config.zero_vector and not extra else vae.shift_factor
        latents = (self.encode(picture) - shift) * vae.scaling_factor
        if not extra:
            return latents
        hidden = torch.zeros_like(picture[:, :1]) if self.hidden is None else self.hidden.to(picture)
        kept = 1 - F.interpolate(hidden, size=latents.shape[-2:])
        return torch.cat([latents, kept.to(latents).expand(len(latents), extra, -1, -1)], dim=1)


def fitted(picture: Tensor, width: int, height: int, fit: Fit = "resize") -> Tensor:
    """A picture or mask `(B, C, H, W)` at another size; unchanged where it has that size."""
    rows, columns = picture.shape[-2:]
    if (rows, columns) == (height, width):
        return picture
    if fit == "resize":
        return _scaled(picture, width, height)
    across, down = width / columns, height / rows
    ratio = max(across, down) if fit == "crop" else min(across, down)
    inner = _scaled(picture, max(round(columns * ratio), 1), max(round(rows * ratio), 1))
    left, top = ((want - have) // 2 for want, have in zip((width, height), inner.shape[:-3:-1], strict=True))
    # negative padding cuts
    return F.pad(inner, (left, width - inner.shape[-1] - left, top, height - inner.shape[-2] - top))


def _scaled(picture: Tensor, width: int, height: int) -> Tensor:
    return F.interpolate(picture, size=(height, width), mode="bilinear", antialias=True)


@dataclass(frozen=True, eq=False)
class _Run:
    """A control over one run of a sampler, and what of it stays the same."""

    control: Control
    memory: dict[str, Hint | Tensor] = field(default_factory=dict)

    def hint(self, like: Tensor) -> Hint | Tensor:
        """What the network makes of its picture, once for the run."""
        if "hint" not in self.memory:
            control, network = self.control, self.control.file.network
            if isinstance(network, ControlNet):
                all_ = (control, *control.beside)
                weights = [each.weight for each in all_] if control.beside else None
                pictures = [each.shown().to(like) for each in all_]
                self.memory["hint"] = network.hint(pictures, [each.kind for each in all_], weights)
            else:
                self.memory["hint"] = network.hint(control.shown().to(like))
        return self.memory["hint"]

    def added(self, x: Tensor, timesteps: Tensor, cond: Cond) -> dict[str, Tensor]:
        """What is added to the network's features, by their places.

        Args:
            x: `(B, C, h, w)`, scaled as the network sees it.
        """
        marks = self._marks(cond)
        rows = None if marks is None else [i for i, mark in enumerate(marks) if mark]
        if rows is not None and not rows:
            return {}
        answers = self._asked(x, timesteps, cond, rows)
        if marks is not None and rows is not None:
            strengths = torch.tensor([marks[i] for i in rows], dtype=x.dtype, device=x.device)
            answers = tuple(_spread(answer, strengths, rows, len(x)) for answer in answers)
        scales, size = self.control.scales(), (x.shape[-2], x.shape[-1])
        weighed = [scale * self._masked(t, size) for scale, t in zip(scales, answers, strict=True)]
        return placed(self.control.file, weighed)

    def _marks(self, cond: Cond) -> list[float] | None:
        """How strongly it acts on each row; None for on all of them alike."""
        if not self.control.positive_only or cond.control is None:
            return None
        marks: list[float] = cond.control.tolist()
        return None if all(mark == 1 for mark in marks) else marks

    def _asked(self, x: Tensor, timesteps: Tensor, cond: Cond, rows: list[int] | None) -> tuple[Tensor, ...]:
        """The network's answers for some rows, or all."""
        network, hint = self.control.file.network, self.hint(x)
        chosen: Callable[[Tensor], Tensor] = (lambda t: t) if rows is None else (lambda t: t[rows])

        def each(t: Tensor) -> Tensor:
            if len(x) % len(t):
                raise RequestError(
                    f"ControlNet {self.control.file.name}: {len(t)} control pictures for {len(x)} rows; "
                    "give one, or one for each picture"
                )
            return t if len(t) == 1 else chosen(t.repeat(len(x) // len(t), *(1 for _ in t.shape[1:])))

        vector = None if cond.vector is None else chosen(cond.vector)
        args = (chosen(timesteps), chosen(cond.context))
        answers: tuple[Tensor, ...]
        if isinstance(network, ControlNet):
            assert isinstance(hint, Hint)
            own, shown = chosen(x)[:, : network.config.in_channels], replace(hint, features=each(hint.features))
            answers = network(own, *args, shown, vector=vector if network.config.vector else None)
        else:
            assert isinstance(hint, Tensor)
            answers = network(chosen(x), *args, each(hint), vector=vector)
        return answers

    def _masked(self, answer: Tensor, size: tuple[int, int]) -> Tensor:
        mask = self.control.mask
        if mask is None:
            return answer
        if answer.ndim == 4 and answer.shape[-2:] == (1, 1) and size != (1, 1):
            raise RequestError(f"ControlNet {self.control.file.name} acts on the whole picture; leave its mask out")
        if answer.ndim == 4:
            return answer * F.adaptive_avg_pool2d(mask.to(answer), (answer.shape[-2], answer.shape[-1]))
        patch = math.isqrt(size[0] * size[1] // answer.shape[1])
        grid = F.adaptive_avg_pool2d(mask.to(answer), (size[0] // patch, size[1] // patch))
        return answer * grid.flatten(2).transpose(1, 2)


def _spread(answer: Tensor, strengths: Tensor, rows: list[int], count: int) -> Tensor:
    """Answers for some rows among zeros for the others."""
    found = answer.new_zeros(count, *answer.shape[1:])
    found[rows] = answer * strengths.view(-1, *(1 for _ in answer.shape[1:])).to(answer)
    return found


def placed(file: ControlFile, answers: Sequence[Tensor]) -> dict[str, Tensor]:
    """A ControlNet's answers by the places where they are added.

    Those for Stable Diffusion 3 are spread over the transformer's blocks but the last, as evenly as they go.
    """
    if file.kind != "sd3":
        paths = [f"skips.{i}" for i in range(len(answers) - 1)] + ["mid_block"]
        return dict(zip(paths, answers, strict=True))
    interval = file.base_layers / len(answers)
    return {f"transformer_blocks.{i}": answers[int(i / interval)] for i in range(file.base_layers - 1)}


def controlled(
    predict: Predict,
    controls: Sequence[Control],
    process: AnyProcess,
    parameterisation: Parameterisation,
    dtype: torch.dtype,
    *,
    told: Callable[[float], float] = float,
    clock: Clock,
) -> Predict:
    """`predict` under ControlNets. What they make of their pictures is kept for the run: make one for each.

    Args:
        controls: fitted to the drawing, each with its network on the device of `x` and in `dtype`; any number.
        process, parameterisation, dtype, told: as for `families.base.preconditioned`.
        clock: of the run.

    Raises:
        RequestError: (when called) a picture that is not of the size of the drawing.
    """
    runs = [_Run(control) for control in controls]

    def wrapper(x: Tensor, sigma: float, cond: Cond) -> Tensor:
        active = [run for run in runs if run.control.active(clock, sigma)]
        if not active:
            return predict(x, sigma, cond)
        seen = (parameterisation.at(sigma).into * x).to(dtype)
        t = told(process.timestep(sigma))
        timesteps = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        total: dict[str, Tensor] = {}
        for run in active:
            total = _sum(total, run.added(seen, timesteps, cond))
        return predict(x, sigma, tapped(cond, Taps(added=total)) if total else cond)

    return wrapper


def _sum(total: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**total, **{path: total[path] + t if path in total else t for path, t in more.items()}}
