"""How each program draws. A runner imports its program and opens the model; all are used in the same way.

All draw with DDIM, the same prompt, seed and guidance. Reverie and diffusers begin with the same noise, OpenVINO takes
the place of the networks in diffusers' pipeline; the noise of stable-diffusion.cpp is its own.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from peer.variants import GUIDANCE, PROMPT, SEED

Tell = Callable[[], None]


class NotOfferedError(Exception):
    """A program cannot do what is measured; says why."""


class Runner(ABC):
    """A program with a model opened.

    Attributes:
        note: the type of number that it computes with.
    """

    note = ""

    @abstractmethod
    def draw(self, size: int, steps: int, tell: Tell) -> tuple[Any, Any]:
        """The last latents `(1, 4, size/8, size/8)` (None where they are not shown), and the picture.

        Args:
            tell: called at the end of every step.
        """

    @abstractmethod
    def decode(self, latents: Any) -> Any:
        """Latents as the denoising network sees them -> a picture.

        Raises:
            NotOfferedError: it does not decode alone.
        """


class Reverie(Runner):
    """Reverie, by its public functions."""

    def __init__(self, folder: Path, device: str, *, precision: str) -> None:
        file = folder.with_suffix(".safetensors")
        load = import_module("reverie").load
        self.model = load(file if file.exists() else folder, device=device, precision=precision)
        self.note = str(self.model.dtype).removeprefix("torch.")
        self._synchronise = synchroniser(device)

    def draw(self, size: int, steps: int, tell: Tell) -> tuple[Any, Any]:
        """By `Model.generate`."""

        def progress(done: int, total: int) -> None:
            self._synchronise()
            tell()

        result = self.model.generate(
            PROMPT, progress=progress, width=size, height=size, steps=steps, guidance_scale=GUIDANCE, seed=SEED,
            sampler="ddim",
        )  # fmt: skip
        return result.latents, result.images[0]

    def decode(self, latents: Any) -> Any:
        """By `Model.decode`."""
        request = import_module("reverie").Request.of(prompt=PROMPT)
        with import_module("torch").inference_mode():
            pixels = self.model.decode(latents.to(self.model.device), request)
        self._synchronise()
        return pixels


class Diffusers(Runner):
    """diffusers' pipeline."""

    def __init__(
        self,
        folder: Path,
        device: str,
        *,
        dtype: str,
        channels_last: bool = False,
        compile: str = "",  # noqa: A002
    ) -> None:
        library, self.torch = import_module("diffusers"), import_module("torch")
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        own = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in index else {}
        pipeline = getattr(library, index["_class_name"])
        self.pipe = pipeline.from_pretrained(folder, torch_dtype=getattr(self.torch, dtype), **own).to(device)
        # As Reverie draws with DDIM: x0 is not clipped, and the last step ends without noise.
        ddim = {"clip_sample": False, "set_alpha_to_one": True}
        self.pipe.scheduler = library.DDIMScheduler.from_config(self.pipe.scheduler.config, **ddim)
        self.pipe.set_progress_bar_config(disable=True)
        self._synchronise, self.note = synchroniser(device), dtype
        if channels_last:
            for network in (self.pipe.unet, self.pipe.vae):
                network.to(memory_format=self.torch.channels_last)
        if compile:
            self.pipe.unet = self.torch.compile(self.pipe.unet, mode=compile)
            self.pipe.vae.decode = self.torch.compile(self.pipe.vae.decode, mode=compile)

    def draw(self, size: int, steps: int, tell: Tell) -> tuple[Any, Any]:
        """By the pipeline's call."""
        last: dict[str, Any] = {}

        def ended(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            self._synchronise()
            tell()
            last.update(given)
            return given

        found = self.pipe(
            PROMPT, width=size, height=size, num_inference_steps=steps, guidance_scale=GUIDANCE,
            generator=self.torch.Generator().manual_seed(SEED), callback_on_step_end=ended,
            callback_on_step_end_tensor_inputs=["latents"],
        )  # fmt: skip
        return last["latents"].float().cpu(), found.images[0]

    def decode(self, latents: Any) -> Any:
        """As the pipeline does it."""
        vae = self.pipe.vae
        with self.torch.no_grad():
            given = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
            pixels = vae.decode(given, return_dict=False)[0]
        self._synchronise()
        return pixels


class OpenVino(Diffusers):
    """diffusers' pipeline whose denoising network and decoder are computed by OpenVINO, at fixed shapes."""

    def __init__(self, folder: Path, device: str, *, hint: str) -> None:
        super().__init__(folder, device, dtype="float32")
        self.core, self.folder, self.hint = import_module("openvino").Core(), folder / "openvino", hint
        self.compiled: dict[tuple[str, int], Any] = {}
        self.pipe.unet = self._network(self.pipe.unet)
        self.pipe.vae.decoder = self.pipe.vae.post_quant_conv = None
        self.pipe.vae.decode = self._decoded

    def _network(self, original: Any) -> Any:
        """What stands in for the U-Net in the pipeline."""
        torch = self.torch
        stand_in = torch.nn.Module()
        stand_in.config, stand_in.dtype, stand_in.device = original.config, torch.float32, torch.device("cpu")
        if hasattr(original, "add_embedding"):
            stand_in.add_embedding = original.add_embedding

        def forward(sample: Any, timestep: Any, encoder_hidden_states: Any, **given: Any) -> tuple[Any]:
            inputs = [sample, timestep.reshape(1).float(), encoder_hidden_states]
            inputs += [added for _, added in sorted((given.get("added_cond_kwargs") or {}).items())]
            return (self._asked("unet", inputs),)

        stand_in.forward = forward
        return stand_in

    def _decoded(self, latents: Any, **_: Any) -> tuple[Any]:
        return (self._asked("vae", [latents]),)

    def _asked(self, name: str, inputs: list[Any]) -> Any:
        arrays = [tensor.numpy() for tensor in inputs]
        key = name, arrays[0].shape[-1]
        if key not in self.compiled:
            model = self.core.read_model(self.folder / f"{name}.xml")
            model.reshape({port: list(array.shape) for port, array in zip(model.inputs, arrays, strict=True)})
            compiled = self.core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": self.hint})
            self.note = str(compiled.get_property("INFERENCE_PRECISION_HINT")).split("'")[1]  # <Type: 'bfloat16'>
            self.compiled[key] = compiled
        return self.torch.from_numpy(next(iter(self.compiled[key](arrays).values())))


def to_openvino(folder: Path) -> None:
    """Convert the denoising network and the decoder of a diffusers folder, weights in float16, if that is not done."""
    out = folder / "openvino"
    if (out / "vae.xml").exists():
        return
    openvino, library, torch = import_module("openvino"), import_module("diffusers"), import_module("torch")
    unet = library.UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    vae = library.AutoencoderKL.from_pretrained(folder / "vae").eval()
    side, width = 32, unet.config.cross_attention_dim
    example = [torch.randn(2, unet.config.in_channels, side, side), torch.ones(1), torch.randn(2, 77, width)]
    if hasattr(unet, "add_embedding"):
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        example += [torch.randn(2, pooled), torch.ones(2, 6)]

    class Network(torch.nn.Module):  # type: ignore[misc, name-defined]
        """The U-Net with inputs by place."""

        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, sample: Any, timestep: Any, context: Any, *added: Any) -> Any:
            names = ("text_embeds", "time_ids")
            told = dict(zip(names, added, strict=True)) if added else None
            return self.unet(sample, timestep, context, added_cond_kwargs=told, return_dict=False)[0]

    class Decoder(torch.nn.Module):  # type: ignore[misc, name-defined]
        """The VAE's half that draws."""

        def __init__(self) -> None:
            super().__init__()
            self.vae = vae

        def forward(self, latents: Any) -> Any:
            return self.vae.decode(latents, return_dict=False)[0]

    with torch.no_grad():
        for name, network, given in (("unet", Network(), example), ("vae", Decoder(), [example[0][:1]])):
            model = openvino.convert_model(network, example_input=tuple(given))
            openvino.save_model(model, out / f"{name}.xml", compress_to_fp16=True)


class StableDiffusionCpp(Runner):
    """stable-diffusion.cpp by its Python bindings."""

    def __init__(self, folder: Path, device: str, *, wtype: str) -> None:
        file = folder.with_suffix(".safetensors")
        if not file.exists():
            raise NotOfferedError("no single file of this model is written")
        kind = import_module("stable_diffusion_cpp").StableDiffusion
        self.model = kind(model_path=str(file), wtype=wtype, verbose=False)
        self.note = wtype

    def draw(self, size: int, steps: int, tell: Tell) -> tuple[Any, Any]:
        """By `generate_image`; no step can be left out once it has begun."""
        pictures = self.model.generate_image(
            prompt=PROMPT, width=size, height=size, sample_steps=steps, cfg_scale=GUIDANCE, seed=SEED,
            sample_method="ddim_trailing", progress_callback=lambda step, total, seconds: tell() if step else None,
        )  # fmt: skip
        return None, pictures[0]

    def decode(self, latents: Any) -> Any:
        """Not offered."""
        raise NotOfferedError("it does not decode latents alone")


RUNNERS: dict[str, Callable[..., Runner]] = {
    "reverie": Reverie, "diffusers": Diffusers, "openvino": OpenVino, "sdcpp": StableDiffusionCpp
}  # fmt: skip


def synchroniser(device: str) -> Tell:
    """What waits for the device; nothing on a CPU."""
    if not device.startswith("cuda"):
        return lambda: None
    wait: Tell = import_module("torch").cuda.synchronize
    return wait
