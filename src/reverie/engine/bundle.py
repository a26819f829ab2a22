"""A loaded model: its parts, where they live and in which precision, and the one way to draw with them."""

from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor, nn

from reverie.diffusion.parameterisation import PARAMETERISATIONS
from reverie.engine import latents as latent_space
from reverie.engine.memory import frugally
from reverie.engine.opened import Opened
from reverie.engine.placing import WEIGHTS, Weights, check_numbers, keeps_packed, place
from reverie.engine.remembered import Remembered, are_large, key_of
from reverie.engine.request import Request
from reverie.engine.sources import data_url
from reverie.engine.upscale import Upscaler, open_upscaler
from reverie.errors import CheckpointError, RequestError
from reverie.families.base import Parts
from reverie.families.detect import load_parts
from reverie.nets.autoencoder import Autoencoder
from reverie.nets.seamless import seamless as wrapping

if TYPE_CHECKING:
    from reverie.engine.generate import Progress, Result, Watch

Precision = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BUNDLED = "emoji"
TILES = (512, 256)  # pixels, tried in this order where memory runs out
M = TypeVar("M", bound=nn.Module)


class Residents:
    """What is on the device: the parts of a model, and of the one that it hands over to.

    Attributes:
        one_at_a_time: the others go to the CPU when a part is needed.
        placed: parts that are ready, by their model and name.
    """

    def __init__(self, one_at_a_time: bool) -> None:
        self.one_at_a_time = one_at_a_time
        self.placed: dict[tuple[int, str], nn.Module] = {}

    def clear(self) -> None:
        """Take every part off the device."""
        for module in self.placed.values():
            module.to("cpu")
        self.placed.clear()


class Model:
    """A model that can draw. Made by `reverie.load`.

    Opening maps the files and reads nothing; a part is checked and brought to the device and precision it computes
    in when it is first needed.

    Attributes:
        parts: the networks and what is known about them.
        source: the path it was opened from.
        device, dtype: where and in which precision the networks compute.
        weights: `packed`, `full` or `auto`; see `packed`.
        opened: adapters that were opened for it.
        forms: the last form of each network with adapters in it, and what it was made of.
    """

    def __init__(
        self,
        parts: Parts,
        source: Path,
        device: torch.device,
        dtype: torch.dtype,
        *,
        offload: bool = False,
        weights: Weights = "auto",
    ) -> None:
        self.parts, self.source, self.device, self.dtype, self.weights = parts, source, device, dtype, weights
        self._residents = Residents(offload)
        self._checked: set[str] = set()
        self.opened = Opened()
        self.forms: dict[str, tuple[object, nn.Module]] = {}
        self._wrapped: dict[tuple[str, str], nn.Module] = {}
        self._successors: dict[Path, Model] = {}

    @property
    def offload(self) -> bool:
        """Whether one part at a time is on the device, the others on the CPU: slower, for little memory.

        Drawing switches it on where memory runs out.
        """
        return self._residents.one_at_a_time

    @offload.setter
    def offload(self, value: bool) -> None:
        self._residents.one_at_a_time = value

    @cached_property
    def packed(self) -> bool:
        """Whether packed weights (GGUF, 8-bit floats) stay packed and are unpacked at every use."""
        return keeps_packed(self.weights, self.parts.modules().values(), self.device, self.dtype)

    def successor(self, name: str) -> "Model":
        """Another model on the same device in the same precision, by path, name or hash; the last one is kept.

        Raises:
            CheckpointError: broken, or of an unknown family.
            RequestError: no such model.
        """
        from reverie.engine.library import Library

        path = Library.of_environment().resolve(name)
        if path not in self._successors:
            other = Model(load_parts(path), path, self.device, self.dtype, weights=self.weights)
            for old in self._successors.values():
                old.leave()
            other._residents, self._successors = self._residents, {path: other}
        return self._successors[path]

    def leave(self) -> None:
        """Take every part of this model off the device."""
        for owner, name in [key for key in self._residents.placed if key[0] == id(self)]:
            self._residents.placed.pop((owner, name)).to("cpu")

    def ready(self, name: str, module: M) -> M:
        """The part `name`, on the device, in the computing precision, its weights checked.

        Raises:
            CheckpointError: NaN or infinity in the weights; the tensor is named.
        """
        placed = self._residents.placed
        if (id(self), name) not in placed:
            if name not in self._checked:
                self._check(name, module)
                self._checked.add(name)
            if self.offload:
                self._residents.clear()
                self.forms.clear()
            place(module, self.device, self.dtype, packed=self.packed)
            placed[id(self), name] = module
        return module

    def _check(self, name: str, module: nn.Module) -> None:
        """Whether every weight is a number; large files that were once seen to be sound are not read again."""
        files = self.parts.identity.files.get(name, ())
        if not are_large(files):
            check_numbers(module, self.source, name)
            return
        seen = "; ".join(what for what, _ in self.parts.identity.evidence)  # an averaged copy is in the same file
        memory, key = Remembered.of_environment(), key_of(f"sound {name}: {seen}", files)
        if memory.get(key) is None:
            check_numbers(module, self.source, name)
            memory.note(key, "yes")

    def network(self, name: Literal["unet", "vae"], seamless: Literal["none", "x", "y", "both"] = "none") -> nn.Module:
        """A part, ready; where pictures are to join at their edges, a form of it with the same weights that wraps."""
        network: nn.Module = self.ready(name, getattr(self.parts, name))
        if seamless == "none":
            return network
        return self._wrapped.setdefault((name, seamless), wrapping(network, seamless))

    def decode(self, latents: Tensor, request: Request) -> Tensor:
        """Scaled latents -> pixels `(B, 3, H, W)` in [0, 1]; in tiles where asked, or where memory runs out."""
        vae = self._vae(request)
        return frugally(
            "decoding",
            [
                (name, partial(latent_space.decode, vae, latents, self.dtype, tile))
                for name, tile in self._tiles(request)
            ],
        )

    def encode(self, pixels: Tensor, request: Request) -> tuple[Tensor, Tensor]:
        """Pixels `(B, 3, H, W)` in [0, 1] -> mean and standard deviation of their latents, not scaled."""
        vae = self._vae(request)
        return frugally(
            "encoding",
            [
                (name, partial(latent_space.encode, vae, pixels, self.dtype, tile))
                for name, tile in self._tiles(request)
            ],
        )

    def upscaler(self, name: str) -> Upscaler:
        """An upscaler by name or file, on the model's device."""
        return open_upscaler(name, self.device)

    def _vae(self, request: Request) -> Autoencoder:
        vae = self.network("vae", request.seamless)
        assert isinstance(vae, Autoencoder)
        return vae

    def _tiles(self, request: Request) -> list[tuple[str, int]]:
        """Tile sizes in latents to try, 0 for one piece. A picture that joins at its edges is never cut."""
        factor = self.parts.vae.config.factor
        if request.seamless != "none" or request.vae_tile == 0:
            return [("in one piece", 0)]
        if request.vae_tile:
            return [(f"in tiles of {request.vae_tile}", max(request.vae_tile // factor, 1))]
        return [("in one piece", 0), *((f"in tiles of {pixels} pixels", pixels // factor) for pixels in TILES)]

    def generate(
        self, prompt: str = "", *, progress: "Progress | None" = None, watch: "Watch | None" = None, **fields: Any
    ) -> "Result":
        """Draw.

        Args:
            prompt: what the picture shows.
            progress: called as `(evaluations done, evaluations in all)`.
            watch: called as `(evaluations done, evaluations in all, x0)`: the latents as they are so far.
            fields: the other fields of `Request`; `image` and `mask` may be PIL pictures.

        Raises:
            RequestError: a field out of range, an unknown name.
            GenerationError: the mathematics failed.
        """
        given = {k: data_url(v) if isinstance(v, Image) else v for k, v in fields.items()}
        return self.draw(Request.of(prompt=prompt, **given), progress=progress, watch=watch)

    def draw(self, request: Request, *, progress: "Progress | None" = None, watch: "Watch | None" = None) -> "Result":
        """As `generate`, from a ready request."""
        from reverie.engine.generate import generate

        return generate(self, request, progress=progress, watch=watch)


def load(
    source: str | Path | None = None,
    *,
    device: str = "auto",
    precision: Precision = "auto",
    variant: str | None = None,
    prediction: str | None = None,
    vae: str | Path | None = None,
    unet: str | Path | None = None,
    text_encoder: str | Path | None = None,
    ema: bool = False,
    offload: bool = False,
    weights: Weights = "auto",
) -> Model:
    """Open a model.

    Args:
        source: a safetensors file, a diffusers folder, or None for the bundled model.
        device: `cpu`, `cuda`, `cuda:1`, `mps`; `auto` takes the best there is.
        precision: `auto` is float32 on a CPU, float16 on CUDA and MPS.
        variant: of a folder's weight files, for example `fp16`.
        prediction: override what the file says it predicts: `epsilon`, `v`, `sample`.
        vae, unet, text_encoder: a file or folder from which this part comes instead.
        ema: take the averaged U-Net that a single file holds beside the other.
        offload: keep one part at a time on the device.
        weights: packed weights (GGUF, 8-bit floats) stay `packed` in memory and are unpacked at every use, or are
            brought to their `full` size once; `auto` keeps them packed where that would take over half of the free
            memory. The pictures are the same.

    Raises:
        CheckpointError: not there, broken, or of an unknown family.
        RequestError: unknown device, precision or way to keep weights.
    """
    path = bundled_path() if source is None else Path(source).expanduser()
    if source is not None and not path.exists():
        raise CheckpointError(f"no model at {path}; give a .safetensors file or a diffusers folder")
    where = pick_device(device)
    if precision != "auto" and precision not in DTYPES:
        raise RequestError(f"unknown precision {precision!r}; known: auto, {', '.join(DTYPES)}")
    if weights not in WEIGHTS:
        raise RequestError(f"unknown way to keep weights {weights!r}; known: {', '.join(WEIGHTS)}")
    automatic = torch.float32 if where.type == "cpu" else torch.float16
    others = {"vae": vae, "unet": unet, "text_encoder": text_encoder}
    given = {name: Path(other).expanduser() for name, other in others.items() if other is not None}
    parts = load_parts(path, variant, ema=ema, **given)
    if prediction is not None:
        parts = parts.with_prediction(PARAMETERISATIONS[prediction])
    return Model(parts, path, where, DTYPES.get(precision, automatic), offload=offload, weights=weights)


def bundled_path() -> Path:
    """The folder of the model inside the package."""
    return Path(__file__).parent.parent / "models" / BUNDLED


def pick_device(name: str) -> torch.device:
    """A torch device from its name.

    Raises:
        RequestError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RequestError(f"device {name!r} cannot be used here ({reason}); use cpu or auto") from None
    return device
