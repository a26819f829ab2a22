"""The table of preprocessors, and the one way to run any of them.

Neither OpenCV nor torch is imported before a preprocessor runs, so that listing them costs nothing.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from reverie.control.pixels import MOST_PIXELS, Pixels, checked, checked_mask, detection_size, resized
from reverie.errors import RequestError
from reverie.registry import Registry

Value = int | float | bool | str
TRUE, FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


@dataclass(frozen=True)
class Option:
    """One setting of a preprocessor.

    Attributes:
        default: its type is the option's type.
        low, high: the range of a number, ends included.
        choices: the words that a text may be; any, where there are none.
    """

    name: str
    default: Value
    help: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()

    def parse(self, value: object) -> Value:
        """A value as this option takes it, from a text or from what JSON has.

        Raises:
            RequestError: of another kind, or out of range.
        """
        parsed = self._converted(value)
        if isinstance(parsed, str):
            fits = not self.choices or parsed in self.choices
        else:
            fits = parsed is not None and math.isfinite(parsed) and self.low <= parsed <= self.high
        if parsed is None or not fits:
            raise RequestError(f"option {self.name} is {value!r}; expected {self.expected}")
        return parsed

    @property
    def expected(self) -> str:
        """What it takes, in words."""
        if self.choices:
            return " or ".join(self.choices)
        if isinstance(self.default, bool):
            return "true or false"
        if isinstance(self.default, str):
            return "a text"
        kind = "a whole number" if isinstance(self.default, int) else "a number"
        return kind if math.inf in (self.high, -self.low) else f"{kind} from {self.low:g} to {self.high:g}"

    def _converted(self, value: object) -> Value | None:
        text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
        if isinstance(self.default, bool):
            return text.lower() in TRUE if text.lower() in TRUE | FALSE else None
        if isinstance(self.default, str):
            return text
        try:
            return int(text) if isinstance(self.default, int) else float(text)
        except ValueError:
            return None


@dataclass(frozen=True)
class Job:
    """What a preprocessor is given beside the picture and its options.

    Attributes:
        mask: `(H, W)`, above 127 where the picture is to be drawn anew; only `inpaint` takes one.
        weights: a file of weights instead of the one that is looked for.
        device: where networks run.
    """

    mask: Pixels | None = None
    weights: Path | None = None
    device: str = "cpu"


Function = Callable[
    ..., Pixels
]  # (picture (H, W, 3), job, **options) -> (H, W, 3), or (H, W, 4) as `pixels.hint` reads


@dataclass(frozen=True)
class Preprocessor:
    """A preprocessor and what one needs to know to use it.

    Attributes:
        function: `(picture (H, W, 3) uint8 RGB, job, **options) -> (H, W, 3) uint8 RGB` of the same size.
        summary: what it gives, in one line.
        source: paper, or the program whose constants it has.
        learned: it needs weights; `reverie.control.weights` says which and where.
        sharp: its values are classes or lines, which no resizing may mix.
        most: longer side, in pixels, at which its network runs; larger pictures are reduced for it.
    """

    name: str
    function: Function
    summary: str
    source: str
    options: tuple[Option, ...] = ()
    learned: str | None = None
    sharp: bool = False
    most: int | None = None

    def settings(self, given: Mapping[str, object]) -> dict[str, Value]:
        """Every option, given or by default.

        Raises:
            RequestError: no such option, or a value that it does not take.
        """
        known = {option.name: option for option in self.options}
        for name in given:
            if name not in known:
                names = ", ".join(known) or "none"
                raise RequestError(f"preprocessor {self.name} has no option {name!r}; its options: {names}")
        return {name: option.parse(given.get(name, option.default)) for name, option in known.items()}

    def run(
        self,
        picture: Pixels,
        options: Mapping[str, object] | None = None,
        *,
        job: Job | None = None,
        resolution: int | None = None,
    ) -> Pixels:
        """The control picture.

        Args:
            picture: `(H, W, 3)` uint8, RGB.
            options: by their names; what is not there is as in `Option.default`.
            resolution: run at this length of the shorter side, both sides rounded to multiples of 64 as
                ControlNet's own scripts do; the picture's own size if None.

        Returns:
            `(H, W, 3)` uint8, the size of the picture; of `inpaint` `(H, W, 4)`, see `reverie.control.pixels.hint`.

        Raises:
            RequestError: no picture, a wrong option, OpenCV or the weights not there.
        """
        settings, job = self.settings(options or {}), job or Job()
        height, width = checked(picture).shape[:2]
        if job.mask is not None:
            job = Job(checked_mask(job.mask, (height, width)), job.weights, job.device)
        inner = detection_size((height, width), resolution, self.most)
        if inner == (height, width):
            return self.function(picture, job, **settings)
        if math.prod(inner) > MOST_PIXELS:
            raise RequestError(f"resolution {resolution} makes {inner[1]}x{inner[0]}; at most {MOST_PIXELS:,} pixels")
        mask = None if job.mask is None else resized(job.mask, inner, sharp=True)
        answer = self.function(resized(picture, inner), Job(mask, job.weights, job.device), **settings)
        full: Pixels = resized(answer, (height, width), sharp=self.sharp)
        return full


PREPROCESSORS = Registry[Preprocessor]("preprocessor")


def preprocessor(name: str, *aliases: str, summary: str, source: str, **facts: Any) -> Callable[[Function], Function]:
    """Register a function as the preprocessor `name`; see `Preprocessor` for the facts.

    Aliases are the names of the same thing in AUTOMATIC1111's ControlNet extension and in controlnet_aux.
    """

    def register(function: Function) -> Function:
        PREPROCESSORS.add(name, Preprocessor(name, function, summary, source, **facts), aliases)
        return function

    return register


MODULES = (
    "edges",
    "soft_edges",
    "line_art",
    "lines",
    "depth",
    "pose",
    "segmentation",
    "colours",
)  # the order of the list


def load_all() -> Registry[Preprocessor]:
    """The full table."""
    for module in MODULES:
        import_module(f"reverie.control.{module}")
    return PREPROCESSORS
