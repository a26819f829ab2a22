"""Adapters that are trained for a model that stays as it is: LoRA (Hu et al. 2021), ControlNet (Zhang et al. 2023)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from reverie.adapters.attach import changed
from reverie.adapters.control_files import save_control
from reverie.adapters.deltas import Delta, LoRA
from reverie.adapters.lora_names import networks
from reverie.adapters.lora_save import save_lora
from reverie.control.registry import load_all
from reverie.diffusion.process import Process
from reverie.engine.bundle import Model, load
from reverie.engine.grid import captioned
from reverie.engine.sources import data_url
from reverie.errors import ConfigError
from reverie.families.base import Sizes
from reverie.nets.controlnet import ControlNet, widths_for
from reverie.nets.unet import UNet
from reverie.text.embed import Encoding, Tokens
from reverie.train.ahead import prepared
from reverie.train.config import ControlRun, LoraRun, TuningRun
from reverie.train.data import Batch, as_images, examples, generator
from reverie.train.latents import encoded
from reverie.train.loss import diffusion_loss
from reverie.types import Cond, Taps

SAMPLES = 8  # on a sheet, where the configuration does not say
ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0", ".q_proj", ".k_proj", ".v_proj", ".out_proj")


class Frozen:
    """A model that stays as it is, and what is learned from: pictures, captions, noise.

    Attributes:
        model: in float32, nothing of it learns.
        unet: its denoising network.

    Raises:
        ConfigError: a model without U-Net, or whose noise is not that of diffusion timesteps.
    """

    def __init__(self, run: TuningRun, device: torch.device, stride: int) -> None:
        self.run, self.device = run, device
        self.model: Model = load(run.model, device=str(device), precision="float32", speed="plain")
        parts = self.model.parts
        if not isinstance(parts.unet, UNet) or not isinstance(parts.process, Process):
            raise ConfigError(f"adapters are trained for models with a U-Net; this one is {parts.identity.family}")
        if parts.identity.variant:
            raise ConfigError(
                f"this is a model of the kind {parts.identity.variant}; adapters are trained for plain ones"
            )
        self.process = parts.process
        for name, module in parts.modules().items():
            self.model.ready(name, module).requires_grad_(False)
        self.unet = parts.unet
        self.data = examples(run.data, run.loop.seed)
        self.batches = prepared(self.data, run.loop.batch, stride, run.loop.workers)

    def loss(
        self,
        number: int,
        batch: Batch,
        told: Callable[[Tensor, Tensor, Cond, Tensor], Tensor],
        towers: Mapping[str, nn.Module],
    ) -> Tensor:
        """The denoising loss of a batch.

        Args:
            told: `(x, timesteps, condition, pixels) -> answer`, with what learns in it.
            towers: the text encoders, with what learns in them.
        """
        run, g = self.run, generator(self.run.loop.seed, 1, number)
        pixels, captions = batch
        x0 = encoded(self.model.parts.vae, pixels.to(self.device))
        noise = torch.randn(x0.shape, generator=g).to(self.device)
        timesteps = torch.randint(self.process.steps, (len(x0),), generator=g).to(self.device)
        dropped = torch.rand(len(x0), generator=g) < run.drop_caption
        cond = self.condition(["" if drop else c for c, drop in zip(captions, dropped, strict=True)], pixels, towers)
        return diffusion_loss(
            lambda x, t: told(x, t, cond, pixels), x0, noise, timesteps, process=self.process,
            parameterisation=self.model.parts.parameterisation, snr_gamma=run.snr_gamma,
        )  # fmt: skip

    def condition(self, captions: list[str], pixels: Tensor, towers: Mapping[str, nn.Module]) -> Cond:
        """What the U-Net is told of captions."""
        encodings: list[Encoding] = []
        for tower in self.model.parts.towers:
            ids = torch.tensor([tower.tokenizer(caption).ids for caption in captions])
            encodings.append(tower.encode(towers[tower.name], Tokens(ids.to(self.device)), 0))
        return self.model.parts.condition(encodings, Sizes(pixels.shape[3], pixels.shape[2]))

    def prompts(self) -> list[str]:
        """Of the sheet of samples."""
        return self.run.samples.prompts or self.data.batch(0, SAMPLES)[1]

    def drawn(self, prompt: str, **fields: Any) -> Image:
        """One sample."""
        return self.model.generate(prompt, seed=self.run.samples.seed, upscaler="none", **fields).images[0]


class LoraWeights(nn.Module):
    """The factors of a LoRA as parameters."""

    def __init__(self, shapes: Mapping[tuple[str, str], torch.Size], run: LoraRun) -> None:
        super().__init__()
        self._places = list(shapes)
        self._alpha = float(run.alpha or run.rank)
        g = generator(run.loop.seed, 3)
        fresh = [LoRA.fresh(shape, run.rank, self._alpha, g) for shape in shapes.values()]
        self.down = nn.ParameterList([nn.Parameter(delta.down) for delta in fresh])
        self.up = nn.ParameterList([nn.Parameter(delta.up) for delta in fresh])

    def deltas(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, dict[str, Delta]]:
        """The changes that the parameters, or averages of them, make: part -> path of the layer -> change."""
        found: dict[str, dict[str, Delta]] = {}
        for i, (part, path) in enumerate(self._places):
            down, up = (self.down[i], self.up[i]) if weights is None else (weights[f"down.{i}"], weights[f"up.{i}"])
            found.setdefault(part, {})[path] = LoRA(down, up, alpha=self._alpha)
        return found


class LoraMethod:
    """A LoRA beside the layers of the U-Net and, where asked, of the text encoders.

    Args:
        stride: from one batch of this device to its next.
    """

    def __init__(self, run: LoraRun, device: torch.device, stride: int = 1) -> None:
        self.run, self.base = run, Frozen(run, device, stride)
        parts = self.base.model.parts
        self.network = LoraWeights(self._shapes(), run).to(device)
        deltas = self.network.deltas()
        forms = {
            part: changed(network, {path: [(delta, 1.0)] for path, delta in deltas.get(part, {}).items()})
            for part, network in networks(parts).items()
        }
        self.towers, self.unet = forms, forms[parts.network]

    def loss(self, number: int) -> tuple[Tensor, dict[str, float]]:
        """See `Method.loss`."""

        def told(x: Tensor, timesteps: Tensor, cond: Cond, _: Tensor) -> Tensor:
            answer: Tensor = self.unet(x, timesteps, cond.context, **_vector(cond))
            return answer

        return self.base.loss(number, self.base.batches(number), told, self.towers), {}

    def export(self, weights: dict[str, Tensor], out: Path) -> None:
        """`lora.safetensors`, in the names that every program reads."""
        out.mkdir(parents=True, exist_ok=True)
        deltas = self.network.deltas({name: t.cpu() for name, t in weights.items()})
        told = {"ss_output_name": self.run.loop.out.name, "ss_steps": str(self.run.loop.steps)}
        save_lora(
            deltas, out / "lora.safetensors", self.base.model.parts, dialect=self.run.dialect, metadata=told,
            dtype=torch.float16,
        )  # fmt: skip

    def sample(self, weights: dict[str, Tensor]) -> Image:
        """See `Method.sample`: what the model draws, and under it what it draws with the LoRA."""
        file = self.run.loop.out / "export" / "lora.safetensors"
        self.export(weights, file.parent)
        prompts = self.base.prompts()
        pictures = [self.base.drawn(prompt, loras=loras) for loras in ((), str(file)) for prompt in prompts]
        return captioned(pictures, [*prompts, *["with the LoRA"] * len(prompts)], len(prompts))

    def _shapes(self) -> dict[tuple[str, str], torch.Size]:
        """The layers that learn."""
        parts, found = self.base.model.parts, {}
        for part, network in networks(parts).items():
            if part != parts.network and not self.run.text_encoder:
                continue
            for path, module in network.named_modules():
                if isinstance(module, self._kinds()) and (self.run.layers != "attention" or path.endswith(ATTENTION)):
                    found[part, path] = module.weight.shape
        return found

    def _kinds(self) -> tuple[type[nn.Linear | nn.Conv2d], ...]:
        return (nn.Linear, nn.Conv2d) if self.run.layers == "all" else (nn.Linear,)


class ControlMethod:
    """A ControlNet, begun as a copy of the U-Net's encoder, that is shown what a preprocessor makes of the pictures.

    Args:
        stride: from one batch of this device to its next.
    """

    def __init__(self, run: ControlRun, device: torch.device, stride: int = 1) -> None:
        self.run, self.base = run, Frozen(run, device, stride)
        vae = self.base.model.parts.vae.config
        torch.manual_seed(run.loop.seed)
        widths = run.widths or widths_for(vae.factor)
        self.network = ControlNet.from_unet(self.base.unet, widths=tuple(widths)).requires_grad_(True).to(device)
        self.towers = {tower.name: tower.module for tower in self.base.model.parts.towers}
        self.preprocessor = load_all()[run.preprocessor]
        self.settings = self.preprocessor.settings(run.options)

    def loss(self, number: int) -> tuple[Tensor, dict[str, float]]:
        """See `Method.loss`. Some pictures are shown without caption, so that the ControlNet learns to see."""

        def told(x: Tensor, timesteps: Tensor, cond: Cond, pixels: Tensor) -> Tensor:
            hint = self.network.hint([self.shown(pixels).to(x)])
            vector = _vector(cond)
            answers = self.network(x, timesteps, cond.context, hint, **vector)
            paths = [f"skips.{i}" for i in range(len(answers) - 1)] + ["mid_block"]
            taps = Taps(added=dict(zip(paths, answers, strict=True)))
            answer: Tensor = self.base.unet(x, timesteps, cond.context, taps, **vector)
            return answer

        return self.base.loss(number, self.base.batches(number), told, self.towers), {}

    def shown(self, pixels: Tensor) -> Tensor:
        """What the preprocessor makes of pixels `(B, 3, H, W)` in [-1, 1]: in [0, 1]."""
        made = [self.preprocessor.run(np.asarray(picture), self.settings) for picture in as_images(pixels)]
        return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float() / 255

    def export(self, weights: dict[str, Tensor], out: Path) -> None:
        """A folder as diffusers writes it."""
        network = ControlNet(self.network.control)
        network.load_state_dict(weights)
        save_control(out, network)

    def sample(self, weights: dict[str, Tensor]) -> Image:
        """See `Method.sample`: pictures, what the ControlNet is shown of them, and what is drawn by it."""
        out = self.run.loop.out / "export"
        self.export(weights, out)
        pixels, captions = self.base.data.batch(0, SAMPLES)
        pictures, shown = as_images(pixels), as_images(2 * self.shown(pixels) - 1)
        drawn = [
            self.base.drawn(caption, controls=[{"kind": self.run.preprocessor, "picture": data_url(picture),
                                                "net": str(out), "preprocessor": "none"}])
            for caption, picture in zip(captions, shown, strict=True)
        ]  # fmt: skip
        labels = [*captions, *[self.run.preprocessor] * SAMPLES, *["drawn"] * SAMPLES]
        return captioned([*pictures, *shown, *drawn], labels, SAMPLES)


def _vector(cond: Cond) -> dict[str, Tensor]:
    return {} if cond.vector is None else {"vector": cond.vector}
