"""Which switches of `fast` pay for a model on this machine, inside a budget: measured, and remembered.

Each switch is drawn in turn with the picture as it is usually drawn, so that both meet the same machine, and what it
draws is compared with the exact picture in float32.
"""

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reverie import __version__
from reverie.checkpoint.save import write_json
from reverie.engine import tiny
from reverie.engine.image import fingerprint
from reverie.engine.likeness import lpips, psnr, relative_error, ssim
from reverie.engine.request import Request
from reverie.errors import ConfigError, OutputError, RequestError
from reverie.nets.lpips import Lpips
from reverie.nets.unet import UNet
from reverie.places import user_config

if TYPE_CHECKING:
    from reverie.engine.bundle import Model

Fields = dict[str, Any]
Progress = Callable[[int, int], None]  # pictures drawn, pictures in all
PROMPTS = (
    "a red apple on a wooden table", "a portrait of a smiling woman", "a street in the rain at night",
    "a castle on a hill under clouds",
)  # fmt: skip
SEED = 7
MEASURES = {"psnr": 1, "ssim": 1, "lpips": -1}  # which way is better
SETTINGS = "fast.json"


@dataclass(frozen=True)
class Budget:
    """How unlike the exact picture a picture may be, on average over the prompts.

    Attributes:
        measure: `psnr` (dB, at least), `ssim` (at least) or `lpips` (at most).
    """

    measure: str = "psnr"
    limit: float = 30.0

    @classmethod
    def of(cls, text: str) -> "Budget":
        """`psnr=35`, `ssim=0.95`, `lpips=0.05`; of a number alone, up to 1 is SSIM and more is PSNR.

        Raises:
            RequestError: none of these.
        """
        name, equals, value = text.strip().lower().rpartition("=")
        try:
            limit = float(value)
        except ValueError:
            limit = -1.0
        measure = name.strip() if equals else "ssim" if limit <= 1 else "psnr"
        if measure not in MEASURES or not 0 <= limit <= 100:
            raise RequestError(f"budget is {text!r}; expected psnr=35, ssim=0.95 or lpips=0.05")
        return cls(measure, limit)

    def allows(self, found: "Measured") -> bool:
        """Whether a switch is inside.

        Raises:
            RequestError: LPIPS was not measured.
        """
        value = getattr(found, self.measure)
        if value is None:
            raise RequestError("the budget is in LPIPS, whose weights are not there; name their folder with --lpips")
        return bool(MEASURES[self.measure] * value >= MEASURES[self.measure] * self.limit)

    def __str__(self) -> str:
        return f"{self.measure}={self.limit:g}"


@dataclass(frozen=True)
class Measured:
    """A switch, or several, on this machine.

    Attributes:
        name: what it is called in the table.
        fields: of a request.
        speed: how many times faster, median over the prompts; `low`, `high`: least and most.
        psnr, ssim, lpips: mean over the prompts, against the exact picture; LPIPS where its weights are there.
        latents: the relative error of the latents, mean.
    """

    name: str
    fields: Fields
    speed: float
    low: float
    high: float
    psnr: float
    ssim: float
    latents: float
    lpips: float | None = None


@dataclass(frozen=True, eq=False)
class Drawing:
    """A picture `(1, H, W, 3)`, its latents, and the seconds it took."""

    pixels: Tensor
    latents: Tensor
    seconds: float


@dataclass(frozen=True, eq=False)
class Trial:
    """What is measured.

    Attributes:
        prompts: one picture each.
        common: fields of every request: size, steps...
        lpips: the network, where its weights are there.
    """

    prompts: Sequence[str] = PROMPTS
    common: Fields = field(default_factory=dict)
    lpips: Lpips | None = None

    def draw(self, model: "Model", prompt: str, fields: Mapping[str, Any]) -> Drawing:
        """One picture, without what is done to it after it is decoded."""
        request = Request.of(**{"prompt": prompt, "seed": SEED, "upscaler": "none", **self.common, **fields})
        _wait(model.device)
        start = time.perf_counter()
        result = model.draw(request)
        _wait(model.device)
        return Drawing(result.pixels, result.latents, time.perf_counter() - start)

    def exact(self, model: "Model", tell: Callable[[], None]) -> list[Drawing]:
        """The picture of every prompt without any switch."""
        found = []
        for prompt in self.prompts:
            found.append(self.draw(model, prompt, {}))
            tell()
        return found

    def measured(
        self, model: "Model", exact: Sequence[Drawing], switches: Mapping[str, Fields], tell: Callable[[], None]
    ) -> list[Measured]:
        """Every switch against the exact pictures; their seconds against the model's usual ones, prompt by prompt.

        Args:
            exact: for each prompt.
            switches: fields by name.
        """
        drawn: dict[str, list[tuple[float, Drawing]]] = {name: [] for name in switches}
        for prompt in self.prompts:
            usual = self.draw(model, prompt, {}).seconds
            tell()
            for name, fields in switches.items():
                one = self.draw(model, prompt, fields)
                drawn[name].append((usual / one.seconds, one))
                tell()
        return [self._compared(name, switches[name], found, exact) for name, found in drawn.items()]

    def _compared(
        self, name: str, fields: Fields, drawn: list[tuple[float, Drawing]], exact: Sequence[Drawing]
    ) -> Measured:
        speeds = [speed for speed, _ in drawn]
        pixels, true = (torch.cat([one.pixels for one in each]) for each in ([one for _, one in drawn], exact))
        latents, goal = (torch.cat([one.latents for one in each]) for each in ([one for _, one in drawn], exact))
        unlike = None if self.lpips is None else float(lpips(self.lpips, pixels, true).mean())
        return Measured(
            name, fields, median(speeds), min(speeds), max(speeds), float(psnr(pixels, true).mean()),
            float(ssim(pixels, true).mean()), float(relative_error(latents, goal).mean()), unlike,
        )  # fmt: skip


@dataclass(frozen=True)
class Tuned:
    """What was found.

    Attributes:
        measured: every switch, and the combinations that were tried.
        chosen: what is kept; None where nothing is inside the budget and faster.
    """

    measured: tuple[Measured, ...]
    chosen: Measured | None

    @property
    def fields(self) -> Fields:
        """What `fast` set to auto sets."""
        return {} if self.chosen is None else self.chosen.fields


def switches_of(model: "Model", guided: bool = True) -> dict[str, Fields]:
    """What can be tried with a model, by name.

    Args:
        guided: whether it draws with guidance at all.
    """
    found: dict[str, Fields] = {}
    unet = model.parts.unet
    if isinstance(unet, UNet):
        for interval in (2, 3, 5):
            for branch in (0, 2) if unet.maps > 3 else (0,):
                name = f"cache, interval {interval}" + (f", branch {branch}" if branch else "")
                found[name] = {"cache": {"interval": interval, "branch": branch}}
        found["cache, interval 5, quadratic"] = {"cache": {"interval": 5, "schedule": "quadratic"}}
        found |= {f"token merging {ratio}": {"token_merging": {"ratio": ratio}} for ratio in (0.25, 0.5)}
    else:
        found |= {f"cache, threshold {t}": {"cache": {"threshold": t}} for t in (0.05, 0.1, 0.15)}
    if guided:
        found |= {f"guidance to {end} of the steps": {"guidance_end": end} for end in (0.8, 0.6)}
    if tiny.found(model) is not None:
        found["tiny decoder"] = {"decoder": "tiny"}
    return found


def tune(
    model: "Model", exact: "Callable[[], Model]", trial: Trial, budget: Budget, progress: Progress | None = None
) -> Tuned:
    """Measure every switch of a model, then combinations of those inside the budget, the fastest first.

    Args:
        exact: opens the same model in float32; called once, before anything else is drawn.

    Raises:
        RequestError: a field of the trial that cannot be, a budget that cannot be measured.
    """
    if budget.measure == "lpips" and trial.lpips is None:
        raise RequestError("the budget is in LPIPS, whose weights are not there; name their folder with --lpips")
    reference = exact()
    guided = float(trial.common.get("guidance_scale") or reference.parts.defaults.guidance_scale) > 1
    switches = switches_of(model, guided)
    tell = _counting(progress, len(trial.prompts) * (len(switches) + 2) + 1)
    truth = trial.exact(reference, tell)
    del reference
    trial.draw(model, trial.prompts[0], {})  # the first picture brings weights to the device
    tell()
    found = trial.measured(model, truth, switches, tell)
    tried = list(_combined(model, trial, truth, [m for m in found if budget.allows(m) and m.speed > 1], budget, tell))
    inside = [m for m in (*found, *tried) if budget.allows(m) and m.speed > 1]
    return Tuned((*found, *tried), max(inside, key=lambda m: m.speed, default=None))


def _combined(
    model: "Model", trial: Trial, truth: list[Drawing], good: list[Measured], budget: Budget, tell: Callable[[], None]
) -> Iterator[Measured]:
    """Combinations of switches of different kinds: the fastest, and with it each of the next as long as both allow."""
    now: Measured | None = None
    for one in sorted(good, key=lambda m: -m.speed):
        if now is None:
            now = one
        elif not now.fields.keys() & one.fields.keys():
            name = f"{now.name} + {one.name}"
            (both,) = trial.measured(model, truth, {name: now.fields | one.fields}, tell)
            yield both
            if budget.allows(both) and both.speed > now.speed:
                now = both


def _counting(progress: Progress | None, total: int) -> Callable[[], None]:
    done = 0

    def tell() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, max(total, done))

    return tell


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# What is remembered


def settings_path(environment: Mapping[str, str] | None = None) -> Path:
    """The file with what was found, by model and machine."""
    return user_config(environment) / "reverie" / SETTINGS


def machine(device: torch.device) -> str:
    """What computes, in words that stay the same from day to day."""
    if device.type == "cuda":
        return f"{device.type} {torch.cuda.get_device_name(device)}"
    return f"{device.type} {_processor()}, {torch.get_num_threads()} threads"


def remember(model: "Model", budget: Budget, found: Tuned, path: Path | None = None) -> Path:
    """Write what was found, whole or not at all; what the file says of other models and machines stays.

    Raises:
        OutputError: the file cannot be written.
        ConfigError: the file that is there is broken.
    """
    path = settings_path() if path is None else path
    known, made_by = _read(path), fingerprint(model)
    chosen = None if found.chosen is None else asdict(found.chosen)
    entry = {"name": made_by["name"], "budget": str(budget), "fields": found.fields, "measured": chosen,
             "version": __version__}  # fmt: skip
    machines = known.get(made_by["hash"], {})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None
    write_json(path, known | {made_by["hash"]: machines | {machine(model.device): entry}})
    return path


def tuned(model: "Model", path: Path | None = None) -> Fields:
    """The fields that `reverie tune` found for a model on this machine.

    Raises:
        RequestError: it was not tuned here.
        ConfigError: the file is broken.
    """
    path, made_by = settings_path() if path is None else path, fingerprint(model)
    entry = _read(path).get(made_by["hash"], {}).get(machine(model.device))
    if entry is None:
        raise RequestError(
            f"fast is auto, but {made_by['name']} was not tuned on this machine ({machine(model.device)}); run "
            "`reverie tune` with it first, or give a level from 0 to 3"
        )
    fields = entry.get("fields") if isinstance(entry, dict) else None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} is broken at {made_by['name']}; tune the model again")
    try:
        Request.of(**fields)
    except RequestError as error:
        raise ConfigError(f"{path} is broken: {error}; tune the model again") from None
    return fields


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {str(error)[:120]}; remove it and tune again") from None
    if not isinstance(known, dict) or not all(isinstance(machines, dict) for machines in known.values()):
        raise ConfigError(f"{path} holds no settings by model and machine; remove it and tune again")
    return known


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
