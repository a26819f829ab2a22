"""What can be trained: an autoencoder; a text encoder and U-Net on the latents of one."""

from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor, nn

from reverie.diffusion.parameterisation import PARAMETERISATIONS
from reverie.diffusion.process import Process
from reverie.engine.bundle import load
from reverie.engine.grid import captioned
from reverie.families.sd1 import folder
from reverie.nets.attention import TransformerBlock
from reverie.nets.autoencoder import Autoencoder, AutoencoderConfig
from reverie.nets.clip_text import ClipText, ClipTextConfig
from reverie.nets.unet import UNet, UNetConfig
from reverie.text.tokenizer import ClipTokenizer
from reverie.train.ahead import prepared
from reverie.train.config import AutoencoderRun, DiffusionRun
from reverie.train.data import as_images, examples, generator
from reverie.train.latents import latent_source
from reverie.train.loss import diffusion_loss, gradient_loss, kl_divergence, psnr

MEASURED = 512  # pictures that the scale of latents is measured on
SAMPLES = 8  # on a sheet, where the configuration does not say


class AutoencoderMethod:
    """Absolute, squared and gradient error of the reconstruction, plus a little KL (Rombach et al. 2022, 3.1).

    Args:
        stride: from one batch of this device to its next: how many devices train together.
    """

    def __init__(self, run: AutoencoderRun, device: torch.device, stride: int = 1) -> None:
        self.run, self.device = run, device
        self.data = examples(run.data, run.loop.seed)
        self.batches = prepared(self.data, run.loop.batch, stride, run.loop.workers)
        config = AutoencoderConfig(**run.model.model_dump(), scaling_factor=1.0)
        torch.manual_seed(run.loop.seed)
        self.network: Autoencoder = Autoencoder(config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """See `Method.loss`. Pictures are mirrored and their colour channels swapped at random."""
        loop, weights = self.run.loop, self.run.loss
        g = generator(loop.seed, 1, step)
        pictures, _ = self.batches(step)
        pictures = _augmented(pictures, g).to(self.device, memory_format=torch.channels_last)
        factor, channels = self.network.config.factor, self.network.config.latent_channels
        shape = (len(pictures), channels, pictures.shape[2] // factor, pictures.shape[3] // factor)
        noise = torch.randn(shape, generator=g).to(self.device)
        picture, mean, log_variance = self.network(pictures, noise)
        error = picture.float() - pictures
        kl = kl_divergence(mean.float(), log_variance.float())
        loss = error.abs().mean() + weights.square * error.square().mean() + weights.kl * kl
        loss = loss + weights.gradient * gradient_loss(picture.float(), pictures)
        return loss, {"psnr": psnr(picture.detach().float(), pictures).item(), "kl": kl.item()}

    @torch.no_grad()
    def export(self, weights: dict[str, Tensor], out: Path) -> None:
        """A diffusers `vae` folder whose scaling factor makes the latents' variance 1."""
        network = Autoencoder(self.network.config)
        network.load_state_dict(weights)
        mean, _ = network.to(self.device).encode(self.data.batch(0, MEASURED)[0].to(self.device))
        config = AutoencoderConfig(**{**vars(network.config), "scaling_factor": round(1 / mean.std().item(), 5)})
        folder.save_part(out / "vae", "vae", config, weights)

    @torch.no_grad()
    def sample(self, weights: dict[str, Tensor]) -> Image:
        """See `Method.sample`: pictures of the data, and under each what the autoencoder makes of it."""
        pictures, captions = self.data.batch(0, SAMPLES)
        network = Autoencoder(self.network.config)
        network.load_state_dict(weights)
        mean, _ = network.to(self.device).encode(pictures.to(self.device))
        both = [*as_images(pictures), *as_images(network.decode(mean))]
        return captioned(both, [*captions, *["decoded"] * SAMPLES], SAMPLES)


def _augmented(pictures: Tensor, g: torch.Generator) -> Tensor:
    """Half of the pictures mirrored, half with their colour channels in another order."""
    count = len(pictures)
    mirrored = torch.rand(count, generator=g) < 0.5
    pictures = torch.where(mirrored[:, None, None, None], pictures.flip(3), pictures)
    orders = torch.stack([torch.randperm(3, generator=g) for _ in range(count)])
    orders[torch.rand(count, generator=g) < 0.5] = torch.arange(3)
    return torch.stack([picture[order] for picture, order in zip(pictures, orders, strict=True)])


class TextToImage(nn.Module):
    """The two networks that are learned together."""

    def __init__(self, text_encoder: ClipText, unet: UNet) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet
        _let_the_prompt_speak(self)


@torch.no_grad()
def _let_the_prompt_speak(network: TextToImage) -> None:
    """Begin with a cross-attention that hears the words.

    With PyTorch's own initial weights two prompts change a cross-attention's output by 0.015 (its input has variance
    1): most of what it averages is padding and positions, and training spends its first thousand steps as if there
    were no prompt. Larger values and smaller positions make that 0.4.
    """
    network.text_encoder.text_model.embeddings.position_embedding.weight.mul_(0.1)
    for module in network.unet.modules():
        if isinstance(module, TransformerBlock):
            for layer in (module.attn2.to_v, *module.attn2.to_out):
                assert isinstance(layer, nn.Linear)
                layer.weight.mul_(3)


class DiffusionMethod:
    """Text encoder and U-Net, jointly, on the latents of a frozen autoencoder.

    Args:
        stride: from one batch of this device to its next: how many devices train together.
    """

    def __init__(self, run: DiffusionRun, device: torch.device, stride: int = 1) -> None:
        self.run, self.device = run, device
        self.data = examples(run.data, run.loop.seed)
        self.tokenizer = ClipTokenizer.from_folder(run.tokenizer, max_length=run.model.text_positions)
        self.vae = folder.load_part(run.autoencoder, "vae")
        self.process = Process.named(
            run.objective.schedule,
            start=run.objective.beta_start,
            end=run.objective.beta_end,
            zero_terminal_snr=run.objective.zero_terminal_snr,
        )
        torch.manual_seed(run.loop.seed)
        network = TextToImage(ClipText(self._text_config()), UNet(self._unet_config()))
        self.network: TextToImage = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.vae.to(device, torch.float32)
        self.latents = latent_source(self.data, self.vae, device, run.loop.batch, stride, run.loop.workers)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """See `Method.loss`."""
        loop, objective = self.run.loop, self.run.objective
        g = generator(loop.seed, 1, step)
        x0, captions = self.latents.batch(step)
        noise = torch.randn(x0.shape, generator=g)
        timesteps = torch.randint(self.process.steps, (len(x0),), generator=g)
        dropped = torch.rand(len(x0), generator=g) < objective.drop_caption
        told = ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
        ids = torch.tensor([self.tokenizer(caption).ids for caption in told])
        context = self.network.text_encoder(ids.to(self.device))
        loss = diffusion_loss(
            lambda x, t: self.network.unet(x, t, context),
            x0.to(self.device, memory_format=torch.channels_last),
            noise.to(self.device),
            timesteps.to(self.device),
            process=self.process,
            parameterisation=PARAMETERISATIONS[objective.prediction],
            snr_gamma=objective.snr_gamma,
        )
        return loss, {}

    def export(self, weights: dict[str, Tensor], out: Path) -> None:
        """A whole diffusers folder: drawn with right away by `reverie generate --model`."""
        network = self.network
        rows = self.data.batch(0, 1)[0].shape[2] // self.vae.config.factor
        said: dict[str, dict[str, int]] = {"text_encoder": {}, "unet": {"sample_size": rows}}
        for name, config in (("text_encoder", network.text_encoder.config), ("unet", network.unet.config)):
            own = {k.removeprefix(name + "."): v for k, v in weights.items() if k.startswith(name + ".")}
            folder.save_part(out / name, name, config, own, said=said[name])
        folder.save_part(out / "vae", "vae", self.vae.config, self.vae.state_dict())
        positions = network.text_encoder.config.positions
        folder.save_rest(out, self.run.tokenizer, self._scheduler(), dict(self.run.defaults), positions)

    def sample(self, weights: dict[str, Tensor]) -> Image:
        """See `Method.sample`: what the exported model draws for the prompts of the configuration."""
        out, wanted = self.run.loop.out / "export", self.run.samples
        self.export(weights, out)
        model = load(out, device=str(self.device), precision="float32")
        prompts = wanted.prompts or self.data.batch(0, SAMPLES)[1]
        drawn = [model.generate(prompt, seed=wanted.seed, upscaler="none").images[0] for prompt in prompts]
        return captioned(drawn, prompts, wanted.columns)

    def _text_config(self) -> ClipTextConfig:
        model = self.run.model
        return ClipTextConfig(
            vocab_size=self.tokenizer.vocab_size,
            width=model.text_width,
            inner_width=4 * model.text_width,
            layers=model.text_layers,
            heads=model.text_heads,
            positions=model.text_positions,
        )

    def _unet_config(self) -> UNetConfig:
        model, channels = self.run.model, self.vae.config.latent_channels
        return UNetConfig(
            in_channels=channels,
            out_channels=channels,
            block_out_channels=model.block_out_channels,
            attention=model.attention,
            heads=(model.heads,) * len(model.block_out_channels),
            layers_per_block=model.layers_per_block,
            context_width=model.text_width,
            groups=model.groups,
        )

    def _scheduler(self) -> dict[str, object]:
        objective = self.run.objective
        return {
            "_class_name": "DPMSolverMultistepScheduler",
            "beta_start": objective.beta_start,
            "beta_end": objective.beta_end,
            "beta_schedule": "squaredcos_cap_v2" if objective.schedule == "cosine" else objective.schedule,
            "num_train_timesteps": self.process.steps,
            "steps_offset": 1,
            "prediction_type": objective.prediction,
            "rescale_betas_zero_snr": objective.zero_terminal_snr,
            "timestep_spacing": "trailing",
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
        }
