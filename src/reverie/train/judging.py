"""Training the judge: true pictures with all that is known about them, made a little worse than they are."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from reverie.checkpoint.load import build
from reverie.checkpoint.save import write_json, write_weights
from reverie.checkpoint.source import open_weights
from reverie.engine.grid import captioned
from reverie.errors import CheckpointError, ConfigError
from reverie.families.folder import load_part
from reverie.nets.autoencoder import Autoencoder
from reverie.nets.judge import (
    COARSEST,
    GROUPS,
    NO_COLOUR,
    STRIDE,
    Detection,
    Judge,
    JudgeConfig,
    Maps,
    Names,
    cut_out,
)
from reverie.train.ahead import Ahead
from reverie.train.config import Blemishes, JudgeRun
from reverie.train.data import as_images, as_pixels, generator
from reverie.train.latents import encoded
from reverie.train.scenes import Scene, Scenes
from reverie.train.scenes.colours import COLOURS, Floats, is_colour
from reverie.train.scenes.scene import Place
from reverie.train.scenes.sprites import Sprites

JUDGE, CONFIG = "model.safetensors", "config.json"
SPREAD = 1 / 6  # standard deviation of the peak at a centre, in sides of the thing; at least `LEAST_SPREAD` cells
LEAST_SPREAD = 0.6
NEAR = 0.4  # height of a peak above which a cell tells the thing's extent and offset, too
OFF, LARGER = 0.05, 0.08  # standard deviations of the namer's view: of its place in sides, of the logarithm of its size
WEIGHTS = {"side": 0.5, "offset": 0.5}  # in the loss; 1 for all else
SAMPLES = 16
BENDS = 5  # points across a picture that are moved


class Truth:
    """What a judge is to say of scenes, in numbers.

    Attributes:
        concepts, styles, colours: names, in the judge's order.
    """

    def __init__(self, sprites: Sprites, concepts: Sequence[str], styles: Sequence[str]) -> None:
        self.concepts, self.styles, self.colours = tuple(concepts), tuple(styles), (NO_COLOUR, *COLOURS)
        self._sprites = sprites
        self._own = cache(self._find_own)

    def colours_of(self, concept: str, style: str, colour: str | None) -> tuple[int, int]:
        """What a thing's colour may be called, as two numbers that may be the same.

        A red heart that was painted red is the picture of one that was left alone: both answers are right for both.
        """
        own = self._own(concept, style)
        if colour is None:
            return 0, self.colours.index(own) if own else 0
        return self.colours.index(colour), 0 if colour == own else self.colours.index(colour)

    def _find_own(self, concept: str, style: str) -> str | None:
        """The colour that a drawing is said to have as it is."""
        drawing = np.asarray(self._sprites.pixels_of(concept, style))[::2, ::2]
        own = (c for c in self._sprites.tone_of(concept, style).own if c in COLOURS)
        return next((c for c in own if is_colour(drawing, c)), None)


@dataclass(frozen=True)
class Labels:
    """What the judge is to say of a batch; `h` and `w` are those of `reverie.nets.judge.Maps`, K things in all.

    Attributes:
        centre: `(B, h, w)` in [0, 1], exactly 1 at the centre of each thing.
        weight: `(B, h, w)`, of cells near centres; the weights of a thing apart from others have the sum 1.
        side, offset: as in `Maps`.
        rows: `(K,)`, whose picture.
        places: `(K, 3)`, centre and side in parts of the picture's width.
        concept, style: `(K,)` int64.
        colour: `(K, 2)` int64; either is right.
    """

    centre: Tensor
    weight: Tensor
    side: Tensor
    offset: Tensor
    rows: Tensor
    places: Tensor
    concept: Tensor
    style: Tensor
    colour: Tensor

    def to(self, device: torch.device) -> "Labels":
        """The same on a device."""
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def labels(scenes: Sequence[Scene], truth: Truth, size: int) -> Labels:
    """The labels of scenes drawn `size` pixels wide."""
    all_places = [(n, scene.things[place.thing], place) for n, scene in enumerate(scenes) for place in scene.places]
    drawn = _Maps.zeros(len(scenes), size // STRIDE)
    for n, _, place in all_places:
        drawn.add(n, place)
    things = [thing for _, thing, _ in all_places]
    return Labels(
        centre=torch.from_numpy(drawn.centre),
        weight=torch.from_numpy(drawn.weight),
        side=torch.from_numpy(drawn.side),
        offset=torch.from_numpy(drawn.offset),
        rows=torch.tensor([n for n, _, _ in all_places]),
        places=torch.tensor([[place.x, place.y, place.side] for _, _, place in all_places]),
        concept=torch.tensor([truth.concepts.index(thing.concept) for thing in things]),
        style=torch.tensor([truth.styles.index(thing.style) for thing in things]),
        colour=torch.tensor([truth.colours_of(thing.concept, thing.style, thing.colour) for thing in things]),
    )


@dataclass(frozen=True)
class _Maps:
    """What the finder is to say, drawn thing by thing."""

    centre: Floats
    weight: Floats
    side: Floats
    offset: Floats

    @classmethod
    def zeros(cls, count: int, cells: int) -> "_Maps":
        shape = count, cells, cells
        return cls(*(np.zeros(s, np.float32) for s in (shape, shape, shape, (count, 2, cells, cells))))

    def add(self, n: int, place: Place) -> None:
        """A thing in picture n; where two meet, a cell belongs to the nearer."""
        cells = self.centre.shape[1]
        x, y = place.x * cells, place.y * cells
        peak = _peak(x, y, place.side * cells, cells)
        mine = (peak >= NEAR) & (peak > self.centre[n])
        self.weight[n][mine] = peak[mine] / peak[mine].sum()
        self.side[n][mine] = np.log(place.side)
        down, across = np.nonzero(mine)
        self.offset[n][:, mine] = np.stack([x - across - 0.5, y - down - 0.5])
        self.centre[n] = np.maximum(self.centre[n], peak)


def _peak(x: float, y: float, side: float, cells: int) -> Floats:
    """A Gaussian around the cell that the point is in; 1 there."""
    spread = max(side * SPREAD, LEAST_SPREAD)
    i, j = (min(int(v), cells - 1) for v in (y, x))
    down, across = (np.exp(-((np.arange(cells) - v) ** 2) / (2 * spread**2)) for v in (i, j))
    return np.outer(down, across).astype(np.float32)


def finding_loss(maps: Maps, wanted: Labels) -> dict[str, Tensor]:
    """The finder's part of the loss, means over things.

    `centre` is the focal loss of CenterNet (Zhou et al. 2019, equation 1, alpha 2, beta 4); extent and offset come by
    the absolute error.
    """
    log_p, log_q = F.logsigmoid(maps.centre), F.logsigmoid(-maps.centre)
    at, off = wanted.centre == 1, (1 - wanted.centre) ** 4
    focal = torch.where(at, log_q.exp() ** 2 * log_p, off * log_p.exp() ** 2 * log_q)
    side = (maps.side - wanted.side).abs()
    offset = (maps.offset - wanted.offset).abs().sum(1)
    things = len(wanted.rows)
    found = {"side": (side * wanted.weight).sum() / things, "offset": (offset * wanted.weight).sum() / things}
    return {"centre": -focal.sum() / things, **found}


def naming_loss(names: Names, wanted: Labels) -> dict[str, Tensor]:
    """The namer's part: cross-entropies. Where two colours are right, what counts is the probability of both."""
    log_p = names.colour.log_softmax(1).gather(1, wanted.colour)
    same = wanted.colour[:, 0] == wanted.colour[:, 1]
    return {
        "concept": F.cross_entropy(names.concept, wanted.concept),
        "style": F.cross_entropy(names.style, wanted.style),
        "colour": -torch.where(same, log_p[:, 0], log_p.logsumexp(1)).mean(),
    }


class Blemisher:
    """Makes pictures a little worse."""

    def __init__(self, how: Blemishes, vae: Autoencoder | None) -> None:
        self.how, self.vae = how, vae

    @torch.no_grad()
    def __call__(self, pixels: Tensor, g: torch.Generator) -> Tensor:
        """Pixels `(B, 3, H, W)` in [-1, 1] -> the same, by chance of `g`; things stay where they are."""
        how = self.how
        pixels = self._bent(pixels, g)
        soft = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2.0, mode="bilinear")
        pixels = torch.lerp(pixels, soft, self._some(pixels, how.soften, g))
        count = round(how.encode * len(pixels))
        if self.vae is not None and count:
            pixels = torch.cat([self._encoded(self.vae, pixels[:count], g), pixels[count:]])
        return self._noisy(self._tinted(pixels, g), g).clamp(-1, 1)

    def _bent(self, pixels: Tensor, g: torch.Generator) -> Tensor:
        """Every part moved a little, neighbours together."""
        count, _, height, width = pixels.shape
        moves = torch.randn(count, 2, BENDS, BENDS, generator=g).to(pixels) * (2 * self.how.bend / width)
        flow = F.interpolate(moves * self._some(pixels, 1, g), (height, width), mode="bicubic").permute(0, 2, 3, 1)
        still = torch.eye(2, 3, device=pixels.device).expand(count, 2, 3)
        grid = F.affine_grid(still, [count, 3, height, width], align_corners=False)
        return F.grid_sample(pixels, grid + flow, padding_mode="border", align_corners=False)

    def _encoded(self, vae: Autoencoder, pixels: Tensor, g: torch.Generator) -> Tensor:
        latents = encoded(vae, pixels)
        noise = torch.randn(latents.shape, generator=g).to(latents)
        latents = latents + noise * self._some(pixels, 1, g) * self.how.latent_noise
        return vae.decode(vae.config.unscaled(latents))

    def _tinted(self, pixels: Tensor, g: torch.Generator) -> Tensor:
        changes = (torch.rand(3, len(pixels), 3, 1, 1, generator=g) * 2 - 1).to(pixels) * self.how.tint
        brightness, contrast, channels = changes[0, :, :1], changes[1, :, :1], changes[2]
        return pixels * (1 + contrast) * (1 + channels / 2) + brightness

    def _noisy(self, pixels: Tensor, g: torch.Generator) -> Tensor:
        noise = torch.randn(pixels.shape, generator=g).to(pixels)
        return pixels + noise * self._some(pixels, 0.5, g) * self.how.noise

    def _some(self, pixels: Tensor, share: float, g: torch.Generator) -> Tensor:
        """How much each picture is changed: in [0, 1], and 0 for all but a share."""
        much = torch.rand(2, len(pixels), 1, 1, 1, generator=g).to(pixels)
        return torch.where(much[0] < share, much[1], 0)


def _inexact(places: Tensor, g: torch.Generator) -> Tensor:
    """Places `(K, 3)` by chance a little off, and of a little other size."""
    off = torch.randn(len(places), 3, generator=g).to(places)
    moved = places[:, :2] + off[:, :2] * places[:, 2:] * OFF
    return torch.cat([moved, places[:, 2:] * (off[:, 2:] * LARGER).exp()], dim=1)


class JudgeMethod:
    """Centre, concept, style, colour and extent of every thing in a scene.

    Args:
        stride: from one batch of this device to its next.

    Raises:
        ConfigError: pictures or widths of a size that the network cannot have.
    """

    def __init__(self, run: JudgeRun, device: torch.device, stride: int = 1) -> None:
        self.run, self.device = run, device
        self.scenes = Scenes(run.data, run.loop.seed)
        composer = self.scenes.composer
        self.truth = Truth(composer.sprites, [c.name for c in composer.concepts], composer.styles)
        names = self.truth.concepts, self.truth.styles, self.truth.colours
        config = JudgeConfig(*names, run.data.size, **run.model.model_dump())
        _check(config)
        torch.manual_seed(run.loop.seed)
        self.network: Judge = Judge(config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        vae = None if run.autoencoder is None else load_part(run.autoencoder, "vae").to(device, torch.float32)
        self.blemisher = Blemisher(run.blemishes, vae)
        self.batches = Ahead(self._composed, stride)

    def _composed(self, number: int) -> tuple[Tensor, Labels]:
        size = self.run.loop.batch
        scenes = [self.scenes.scene(n) for n in range(number * size, (number + 1) * size)]
        pixels = as_pixels(torch.from_numpy(self.scenes.draw(scenes)))
        return pixels, labels(scenes, self.truth, self.run.data.size)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """See `Method.loss`. The namer is shown things as if the finder had found them, not quite exactly."""
        pixels, wanted = self.batches(step)
        g, wanted = generator(self.run.loop.seed, 1, step), wanted.to(self.device)
        worse = self.blemisher(pixels.to(self.device), g)
        names = self.network.namer(cut_out(worse, wanted.rows, _inexact(wanted.places, g)))
        maps = self.network.finder(worse.to(memory_format=torch.channels_last))
        parts = finding_loss(maps, wanted) | naming_loss(names, wanted)
        loss = torch.stack([part * WEIGHTS.get(name, 1) for name, part in parts.items()]).sum()
        right = (names.concept.argmax(1) == wanted.concept).float().mean()
        return loss, {name: part.item() for name, part in parts.items()} | {"right": right.item()}

    def export(self, weights: dict[str, Tensor], out: Path) -> None:
        """A folder that `open_judge` reads."""
        save_judge(out, self.network.config, weights)

    @torch.no_grad()
    def sample(self, weights: dict[str, Tensor]) -> Image:
        """See `Method.sample`: pictures as they are learned from, over what the judge sees in them."""
        scenes = [self.scenes.scene(n) for n in range(SAMPLES)]
        pixels = as_pixels(torch.from_numpy(self.scenes.draw(scenes)))
        worse = self.blemisher(pixels.to(self.device), generator(self.run.loop.seed, 1))
        judge = Judge(self.network.config).to(self.device)
        judge.load_state_dict(weights)
        return captioned(as_images(worse), [said(judge.config, found) for found in judge(worse)], 8)


def said(config: JudgeConfig, found: Sequence[Detection]) -> str:
    """What a judge sees in a picture, in words: "blue fox, house (flat)"."""
    if not found:
        return "nothing"
    names = [config.concepts[int(one.concept.argmax())] for one in found]
    colours = [config.colours[int(one.colour.argmax())] for one in found]
    things = [name if colour == NO_COLOUR else f"{colour} {name}" for name, colour in zip(names, colours, strict=True)]
    style = config.styles[int(torch.stack([one.style for one in found]).sum(0).argmax())]
    counted = [f"{things.count(t)} x {t}" if things.count(t) > 1 else t for t in dict.fromkeys(things)]
    return f"{', '.join(counted)} ({style})"


def _check(config: JudgeConfig) -> None:
    if config.size % COARSEST:
        raise ConfigError(f"data.size is {config.size}; the judge takes multiples of {COARSEST}")
    for name, widths in (("finder", config.finder), ("namer", config.namer)):
        if any(width % GROUPS or width <= 0 for width in widths):
            raise ConfigError(f"model.{name} {list(widths)}: expected multiples of {GROUPS}")


def save_judge(folder: Path, config: JudgeConfig, weights: dict[str, Tensor]) -> None:
    """Write a judge: `config.json` and `model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, asdict(config))
    write_weights(folder / JUDGE, {name: t.detach().to("cpu", torch.float32) for name, t in weights.items()})


def open_judge(folder: Path) -> Judge:
    """The judge in a folder.

    Raises:
        CheckpointError: there is none, or it is broken.
    """
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        names = {key: tuple(str(name) for name in raw[key]) for key in ("concepts", "styles", "colours")}
        (a, b, c), (d, e, f) = ([int(width) for width in raw[key]] for key in ("finder", "namer"))
        config = JudgeConfig(
            **names, size=int(raw["size"]), finder=(a, b, c), namer=(d, e, f), hidden=int(raw["hidden"])
        )
    except OSError as error:
        raise CheckpointError(f"no judge in {folder}: {error.strerror}; `reverie train judge` makes one") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not the configuration of a judge ({error})") from None
    file = open_weights(folder / JUDGE)
    return build(lambda: Judge(config), {name: file.tensor(name) for name in file.tensors}, f"the judge in {folder}")
