"""The named post-step that enlarges a finished picture: the upscaler in the package, or an ESRGAN-type file."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reverie.checkpoint.load import build
from reverie.checkpoint.source import open_weights
from reverie.errors import CheckpointError, RequestError
from reverie.nets.upscaler import CompactUpscaler, UpscalerConfig
from reverie.registry import Registry
from reverie.sampling.wrappers import fade, spans

UPSCALERS = Registry[Path]("upscaler")
UPSCALERS.add(
    "realesr-animevideov3-x4",
    Path(__file__).parent.parent / "models" / "upscaler" / "realesr-animevideov3-x4.safetensors",
)

TILE, OVERLAP = 512, 64  # pixels; the compact network sees 34 pixels far, what is beyond 16 hardly counts


@dataclass(frozen=True)
class Upscaler:
    """A network that enlarges.

    Attributes:
        scale: how much.
        network: `(B, 3, H, W)` in [0, 1] -> `(B, 3, scale * H, scale * W)`.
        project_back: whether its small shifts of colour are taken back (see `enlarge`).
    """

    scale: int
    network: Callable[[Tensor], Tensor]
    project_back: bool = False

    @torch.no_grad()
    def enlarge(self, pixels: Tensor) -> Tensor:
        """`(B, 3, H, W)` in [0, 1] -> `(B, 3, scale * H, scale * W)` in [0, 1], in tiles where it is large.

        With `project_back` one step of back-projection (Irani & Peleg 1991) puts back the difference between the
        result, reduced again, and what was given.
        """
        large = _tiled(self.network, pixels, self.scale)
        if self.project_back:
            error = pixels - F.avg_pool2d(large, self.scale)
            large = large + F.interpolate(error, scale_factor=float(self.scale), mode="bicubic")
        return large.clamp(0, 1)


def open_upscaler(name: str, device: torch.device | str = "cpu") -> Upscaler:
    """An upscaler by its name, or by the path of a file of weights (ESRGAN, Real-ESRGAN, SwinIR, HAT, ...).

    Raises:
        RequestError: neither a name nor a file.
        CheckpointError: a file that is no upscaler, or broken.
    """
    if name in UPSCALERS:
        return _own(UPSCALERS.name(name), torch.device(device))
    path = Path(name).expanduser()
    if not path.is_file():
        raise RequestError(f"no upscaler {name!r}: give a file of weights, or one of {', '.join(UPSCALERS)}")
    return _foreign(path, path.stat().st_mtime_ns, torch.device(device))


def _tiled(network: Callable[[Tensor], Tensor], pixels: Tensor, scale: int) -> Tensor:
    height, width = pixels.shape[-2:]
    rows, columns = spans(height, TILE, OVERLAP), spans(width, TILE, OVERLAP)
    if len(rows) == len(columns) == 1:
        return network(pixels)
    total = pixels.new_zeros(*pixels.shape[:2], height * scale, width * scale)
    weights = pixels.new_zeros(height * scale, width * scale)
    for row in rows:
        for column in columns:
            answer = network(pixels[..., row, column])
            weight = fade(answer.shape[-2], OVERLAP * scale)[:, None] * fade(answer.shape[-1], OVERLAP * scale)
            down, across = (slice(s.start * scale, s.stop * scale) for s in (row, column))
            weight = weight.to(answer) ** 4  # near its edges a tile knows least
            total[..., down, across] += weight * answer
            weights[down, across] += weight
    return total / weights


@cache
def _own(name: str, device: torch.device) -> Upscaler:
    path = UPSCALERS[name]
    file = open_weights(path)
    tensors = {key: file.tensor(key).float() for key in file.tensors}
    network = build(lambda: CompactUpscaler(UpscalerConfig()), tensors, f"the upscaler {path}").to(device)
    return Upscaler(network.config.scale, network, project_back=True)


@cache
def _foreign(path: Path, changed: int, device: torch.device) -> Upscaler:
    """Through spandrel, which knows about forty architectures by their tensors; the file is read by us."""
    del changed
    file = open_weights(path)
    tensors = {key: file.tensor(key) for key in file.tensors}
    try:
        described: Any = _spandrel().ModelLoader(device=device).load_from_state_dict(tensors)
    except CheckpointError:
        raise
    except Exception as error:  # spandrel has errors of its own for every architecture
        reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
        raise CheckpointError(f"{path} is not an upscaler that spandrel knows: {reason}") from None
    if described.input_channels != 3 or described.output_channels != 3 or described.scale < 1:
        raise CheckpointError(
            f"{path} holds {described.architecture.name}, which does not turn an RGB picture into a larger one"
        )
    described.eval().float()
    return Upscaler(int(described.scale), described)


def _spandrel() -> ModuleType:
    """The library.

    Raises:
        CheckpointError: not installed.
    """
    try:
        with _without_torchvision():
            import spandrel
    except ImportError:
        raise CheckpointError(
            "a file as upscaler needs the library spandrel; pip install spandrel, or name the one in the package"
        ) from None
    found: ModuleType = spandrel
    return found


@contextmanager
def _without_torchvision() -> Iterator[None]:
    """Let spandrel be imported where torchvision is absent or was built for another torch.

    Two of its architectures, which restore faces and fill holes, import three functions of torchvision; the
    upscalers need none of it.
    """
    name = "torchvision.transforms.functional"
    parents = ("torchvision", "torchvision.transforms")
    try:
        import_module(name)
    except (ImportError, RuntimeError):
        stand_in = ModuleType(name)
        for function in ("normalize", "rotate", "InterpolationMode"):
            setattr(stand_in, function, None)
        for broken in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[broken]
        sys.modules |= dict.fromkeys((*parents, name), stand_in)
        try:
            yield
        finally:
            for own in (*parents, name):
                del sys.modules[own]
    else:
        yield
