"""A loaded model: its parts, where they live and in which precision, and the one way to draw with them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor, nn

from reverie.checkpoint.quantising import quantisation_of
from reverie.diffusion.parameterisation import PARAMETERISATIONS
from reverie.engine import latents as latent_space
from reverie.engine.blockwise import blocks_of, blockwise
from reverie.engine.compiling import COMPILE, Compile, Compiler
from reverie.engine.heap import kept_heap
from reverie.engine.measures import TILES, Measures, Works, parse_size
from reverie.engine.memory import frugally
from reverie.engine.opened import Opened
from reverie.engine.placing import WEIGHTS, Originals, Placed, Weights, check_numbers, keeps_packed, place
from reverie.engine.remembered import Remembered, are_large, key_of
from reverie.engine.request import Request
from reverie.engine.sources import data_url
from reverie.engine.speed import MODES, Speed, SpeedMode, automatic_precision, is_large, layout_for
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
M = TypeVar("M", bound=nn.Module)
R = TypeVar("R")


class Residents:
    """What is on the device: the parts of a model, and of the one that it hands over to.

    Attributes:
        one_at_a_time: the others go back to where they lie when a part is needed.
        placed: parts that are ready, by their model and name.
        measures: what is done to stay below a limit of memory.
    """

    def __init__(self, one_at_a_time: bool) -> None:
        self.one_at_a_time = one_at_a_time
        self.placed: dict[tuple[int, str], Placed] = {}
        self.measures = Measures()

    def clear(self) -> None:
        """Take every part off the device."""
        for placed in self.placed.values():
            placed.leave()
        self.placed.clear()


class Model:
    """A model that can draw. Made by `reverie.load`.

    Opening maps the files and reads nothing; a part is checked and brought to the device and precision it computes
    in when it is first needed.

    Attributes:
        parts: the networks and what is known about them.
        source: the path it was opened from.
        device, dtype: where and in which precision the networks compute.
        weights: how they are kept; see `load`.
        speed: how its networks are computed.
        compiler: whether its networks are compiled.
        memory: bytes that weights and activations may take together; None for no limit.
        works: what its networks cost, as far as it was found out.
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
        speed: SpeedMode = "auto",
        memory: int | None = None,
        compile: Compile = "auto",  # noqa: A002
    ) -> None:
        self.parts, self.source, self.device, self.dtype, self.weights = parts, source, device, dtype, weights
        compiled = compile == "on" and device.type == "cpu"  # of torch's own layers
        self.speed = Speed(device, dtype, "plain" if compiled else speed)
        self.compiler = Compiler(compile, device)
        self._residents = Residents(offload)
        self._checked: set[str] = set()
        self.memory = memory
        self.works: Works = {}
        self.opened = Opened()
        self.forms: dict[str, tuple[object, nn.Module]] = {}
        self._wrapped: dict[tuple[str, str], nn.Module] = {}
        self._successors: dict[Path, Model] = {}

    @property
    def offload(self) -> bool:
        """Whether one part at a time is on the device, the others on the CPU: slower, for little memory.

        Drawing switches it on where memory runs out.
        """
        return self._residents.one_at_a_time or self.measures.offload

    @offload.setter
    def offload(self, value: bool) -> None:
        self._residents.one_at_a_time = value

    @property
    def measures(self) -> Measures:
        """What is done to stay below `memory`; chosen for each request. Other measures begin with nothing in place."""
        return self._residents.measures

    @measures.setter
    def measures(self, value: Measures) -> None:
        if value != self.measures:
            self._residents.clear()
            self.forms.clear()
            self.speed.forget()
            self._wrapped.clear()
            self._residents.measures = value

    @property
    def lasting(self) -> Measures:
        """What is done whatever the limit."""
        return Measures(offload=self._residents.one_at_a_time, packed=self._keeps_packed)

    @property
    def packed(self) -> bool:
        """Whether packed weights (GGUF, 8-bit floats) stay packed and are unpacked at every use."""
        return self.measures.packed or self._keeps_packed

    @cached_property
    def _keeps_packed(self) -> bool:
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
            other = Model(
                load_parts(path), path, self.device, self.dtype, weights=self.weights, speed=self.speed.mode,
                memory=self.memory, compile=self.compiler.when,
            )  # fmt: skip
            for old in self._successors.values():
                old.leave()
            other._residents, self._successors = self._residents, {path: other}
        return self._successors[path]

    def leave(self) -> None:
        """Take every part of this model off the device."""
        for owner, name in [key for key in self._residents.placed if key[0] == id(self)]:
            self._residents.placed.pop((owner, name)).leave()

    def release(self, name: str) -> None:
        """Take one part off the device; it is brought again when it is needed."""
        placed = self._residents.placed.pop((id(self), name), None)
        if placed is not None:
            self.forms.clear()
            self.speed.forget()
            placed.leave()

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
            self.speed.forget()
            placed[id(self), name] = self._placed(name, module)
        network = placed[id(self), name].network
        assert isinstance(network, type(module))
        return network

    def _placed(self, name: str, module: nn.Module) -> Placed:
        if self.measures.blocks and blocks_of(module):
            form, conveyor = blockwise(module, self.device, self.dtype)
            return Placed(form, conveyor=conveyor)
        originals = Originals(module)
        layout = layout_for(self.device, self.dtype) if self.speed.mode == "auto" else torch.preserve_format
        kind = quantisation_of(name, self.weights)
        place(
            module,
            self.device,
            self.dtype,
            packed=self.packed,
            quantisation=kind,
            halves=self.speed.halves(module),
            layout=layout,
        )
        return Placed(module, originals, forgets=self.memory is not None)

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

    def network(
        self,
        name: Literal["unet", "vae"],
        seamless: Literal["none", "x", "y", "both"] = "none",
        *,
        evaluations: int = 1,
    ) -> nn.Module:
        """A part, ready to compute in the fastest way known; forms of it with the same weights.

        Args:
            seamless: where pictures are to join at their edges, it wraps.
            evaluations: about how often it will be asked (`Speed.form`).
        """
        network: nn.Module = self.ready(name, getattr(self.parts, name))
        if seamless != "none":
            if (name, seamless) not in self._wrapped:
                self._wrapped[name, seamless] = wrapping(network, seamless)
            network = self._wrapped[name, seamless]
        return network if self.measures.blocks else self.speed.form(network, evaluations)

    def decode(self, latents: Tensor, request: Request) -> Tensor:
        """Scaled latents -> pixels `(B, 3, H, W)` in [0, 1]; in tiles where asked, or where memory runs out."""
        return self._by_vae("decoding", latent_space.decode, latents, request)

    def encode(self, pixels: Tensor, request: Request) -> tuple[Tensor, Tensor]:
        """Pixels `(B, 3, H, W)` in [0, 1] -> mean and standard deviation of their latents, not scaled."""
        return self._by_vae("encoding", latent_space.encode, pixels, request)

    def _by_vae(
        self, what: str, compute: Callable[[Autoencoder, Tensor, torch.dtype, int], R], x: Tensor, request: Request
    ) -> R:
        vae = self._vae(request)
        ways = [(name, partial(compute, vae, x, self.dtype, tile)) for name, tile in self._tiles(request)]
        with self._heap():
            return frugally(what, ways)

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
        tiles = [pixels for pixels in TILES if pixels <= (self.measures.tile or pixels)]
        whole = [] if self.measures.tile else [("in one piece", 0)]
        return [*whole, *((f"in tiles of {pixels} pixels", max(pixels // factor, 1)) for pixels in tiles)]

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

        with self._heap():
            return generate(self, request, progress=progress, watch=watch)

    def _heap(self) -> AbstractContextManager[None]:
        return kept_heap() if self.speed.acts and self.memory is None else nullcontext()


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
    speed: SpeedMode = "auto",
    memory: str | int | None = None,
    compile: Compile = "auto",  # noqa: A002
) -> Model:
    """Open a model.

    Args:
        source: a safetensors file, a diffusers folder, or None for the bundled model.
        device: `cpu`, `cuda`, `cuda:1`, `mps`; `auto` takes the best there is.
        precision: `auto` is what the device is made for: on a CPU bfloat16 where it multiplies that natively and the
            model is large, else float32; on CUDA bfloat16 (Ampere and later), float16 (Volta, Turing) or float32; on
            MPS float16.
        variant: of a folder's weight files, for example `fp16`.
        prediction: override what the file says it predicts: `epsilon`, `v`, `sample`.
        vae, unet, text_encoder: a file or folder from which this part comes instead.
        ema: take the averaged U-Net that a single file holds beside the other.
        offload: keep one part at a time on the device.
        weights: packed weights (GGUF, 8-bit floats) stay `packed` in memory and are unpacked at every use, or are
            brought to their `full` size once; `auto` keeps them packed where that would take over half of the free
            memory. The pictures are the same. `fp8`, `int8` and `int4` quantise the weights of the denoising network
            and of the text encoders as they are opened, for a half or a quarter of the memory; pictures change.
        speed: `auto` computes every layer in the way that is fastest on this machine, `plain` in torch's usual one.
        memory: the most that weights and activations may take together: bytes, or text such as `6G`. Before each
            picture the cheapest measures that keep below it are chosen; see docs/memory.md.
        compile: `on` compiles the blocks that the denoising network repeats, which takes minutes the first time on a
            machine; `auto` does so on CUDA once a model has drawn enough for it to repay, `off` never.

    Raises:
        CheckpointError: not there, broken, or of an unknown family.
        RequestError: unknown device, precision, way to keep weights or to compute, or when to compile.
    """
    path = bundled_path() if source is None else Path(source).expanduser()
    if source is not None and not path.exists():
        raise CheckpointError(f"no model at {path}; give a .safetensors file or a diffusers folder")
    where = pick_device(device)
    if precision != "auto" and precision not in DTYPES:
        raise RequestError(f"unknown precision {precision!r}; known: auto, {', '.join(DTYPES)}")
    if weights not in WEIGHTS:
        raise RequestError(f"unknown way to keep weights {weights!r}; known: {', '.join(WEIGHTS)}")
    limit = None if memory is None else parse_size(memory)
    if speed not in MODES:
        raise RequestError(f"unknown speed {speed!r}; known: {', '.join(MODES)}")
    if compile not in COMPILE:
        raise RequestError(f"unknown time to compile {compile!r}; known: {', '.join(COMPILE)}")
    others = {"vae": vae, "unet": unet, "text_encoder": text_encoder}
    given = {name: Path(other).expanduser() for name, other in others.items() if other is not None}
    parts = load_parts(path, variant, ema=ema, **given)
    if prediction is not None:
        parts = parts.with_prediction(PARAMETERISATIONS[prediction])
    large = any(is_large(module) for module in parts.modules().values())
    dtype = DTYPES[precision] if precision != "auto" else automatic_precision(where, large=large)
    model = Model(
        parts, path, where, dtype, offload=offload, weights=weights, speed=speed, memory=limit, compile=compile
    )
    if large:
        model.speed.settle_threads()
    return model


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
