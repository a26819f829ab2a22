"""Pictures that steer a drawing: ControlNets, T2I-Adapters, references, picture prompts. Found, opened, in place."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from reverie.adapters.attach import Attachment
from reverie.adapters.control_files import ControlFile, open_control
from reverie.adapters.controlnet import UNION_KINDS, Control, Fit, controlled, fitted
from reverie.adapters.ip_adapter import ImagePrompt, area, image_encoder_for, image_prompted, read_faces, tokens
from reverie.adapters.ip_adapter_file import IpAdapter, open_ip_adapter
from reverie.adapters.kinds import describe_addon
from reverie.adapters.reference import Reference, referenced
from reverie.adapters.t2i_adapter import FeatureControl, StylePrompt, adapted, features, style_tokens, styled
from reverie.adapters.t2i_adapter_file import open_t2i_adapter
from reverie.checkpoint.source import open_weights
from reverie.control.pixels import hint
from reverie.control.registry import Job, load_all
from reverie.engine import extras
from reverie.engine.hashes import hash_paths
from reverie.engine.library import Library
from reverie.engine.request import Request
from reverie.engine.sources import read_mask, read_picture, to_tensor
from reverie.errors import CheckpointError, RequestError
from reverie.families.json_config import read_json
from reverie.families.vision import open_clip_vision
from reverie.nets.clip_vision import ClipVision, clip_pixels
from reverie.nets.image_tokens import TokensConfig
from reverie.nets.t2i_adapter import StyleAdapter, T2IAdapter
from reverie.nets.unet import UNet
from reverie.sampling.guidance import Clock, Conditions, during
from reverie.types import Cond, Predict

if TYPE_CHECKING:
    from reverie.engine.bundle import Model
    from reverie.engine.plan import Pass

M = TypeVar("M", bound=nn.Module)
# Names of A1111's ControlNet extension: which of the two ways a reference is looked at.
REFERENCES: Mapping[str, tuple[bool, bool]] = {
    "reference": (True, False), "reference_only": (True, False), "reference_adain": (False, True),
    "reference_adain+attn": (True, True),
}  # fmt: skip
FITS: Mapping[str, Fit] = {"stretch": "resize", "crop": "crop", "fill": "fill"}
CONFIG = "config.json"


@dataclass(frozen=True, eq=False)
class Steering:
    """What steers the passes of one size.

    Attributes:
        controls: ControlNets.
        features: T2I-Adapters.
        references: pictures that are looked at.
        prompts: pictures as prompts.
        styles: pictures whose style follows the prompt.
    """

    model: "Model"
    controls: tuple[Control, ...] = ()
    features: tuple[FeatureControl, ...] = ()
    references: tuple[Reference, ...] = ()
    prompts: tuple[ImagePrompt, ...] = ()
    styles: tuple[StylePrompt, ...] = ()

    @property
    def one_sided(self) -> bool:
        """Whether some act on the prompt's side alone."""
        return any(control.positive_only for control in self.controls)

    def wrapped(self, predict: Predict, run: "Pass", clock: Clock, rows: slice, columns: slice) -> Predict:
        """`predict` of the whole picture, or of a window of it, in rows and columns of latents."""
        parts, factor = self.model.parts, self.model.parts.vae.config.factor
        if self.references:
            predict = referenced(predict, self.references, parts.unet, parts.process, clock)
        if self.prompts:
            prompts = [_windowed(prompt, rows, columns, factor) for prompt in self.prompts]
            predict = image_prompted(predict, prompts, clock)
        if self.features:
            predict = adapted(predict, self.features, clock)
        if self.controls:
            controls = [control.window(rows, columns) for control in self.controls]
            predict = controlled(
                predict, controls, parts.process, parts.parameterisation, self.model.dtype, told=run.told, clock=clock
            )
        return predict

    def told(self, conditions: Conditions, progress: float) -> Conditions:
        """Conditions with the tokens of picture prompts, and with how strongly each side is steered.

        Args:
            progress: share of the steps that came before.
        """
        styles = [style for style in self.styles if during(progress, style.start, style.end)]
        if not self.prompts and not styles and not self.one_sided:
            return conditions
        shown = [[prompt.positive for prompt in self.prompts], [prompt.negative for prompt in self.prompts]]

        def each(cond: Cond, side: int) -> Cond:
            count = len(cond.context)
            for style in styles:
                cond = styled(cond, style, negative=bool(side))
            images = tuple(t.to(cond.context).expand(count, -1, -1) for t in shown[side])
            control = torch.full((count,), 1.0 - side) if self.one_sided else None
            return replace(cond, images=images, control=control)

        def sided(parts: tuple[tuple[float, Cond], ...], side: int) -> tuple[tuple[float, Cond], ...]:
            return tuple((weight, each(cond, side)) for weight, cond in parts)

        return Conditions(
            sided(conditions.positive, 0),
            sided(conditions.negative, 1),
            None if conditions.empty is None else each(conditions.empty, 1),
            None if conditions.image_negative is None else each(conditions.image_negative, 1),
        )


def _windowed(prompt: ImagePrompt, rows: slice, columns: slice, factor: int) -> ImagePrompt:
    if prompt.mask is None:
        return prompt
    across, down = (slice(*(None if at is None else at * factor for at in (s.start, s.stop))) for s in (columns, rows))
    return replace(prompt, mask=prompt.mask[:, down, across])


class Steerer:
    """Makes the steering of a request for one model.

    Args:
        library: where files are looked for by name.
        evaluations: about how often ControlNets will be asked.

    Raises:
        RequestError: no such file or picture, several that fit, a preprocessor that cannot run.
        CheckpointError: a file that is broken, or made for another model.
    """

    def __init__(self, model: "Model", request: Request, library: Library, evaluations: int = 1) -> None:
        self._model, self._request, self._library, self._evaluations = model, request, library, evaluations
        self._made: dict[tuple[int, int], Steering] = {}
        self._formed: dict[ControlFile, ControlFile] = {}
        self.used: dict[str, str] = {}

    def at(self, width: int, height: int) -> Steering:
        """For drawings of so many pixels."""
        if (width, height) not in self._made:
            self._made[width, height] = self._steering(width, height)
        return self._made[width, height]

    def _steering(self, width: int, height: int) -> Steering:
        request, found = self._request, Steering(self._model)
        for control in request.controls:
            found = self._with_control(found, control, width, height)
        found = replace(found, controls=_together(found.controls))
        for prompt in request.image_prompts:
            made = self._prompt(prompt, width, height)
            if isinstance(made, StylePrompt):
                found = replace(found, styles=(*found.styles, made))
            else:
                found = replace(found, prompts=(*found.prompts, made))
        return found

    @cached_property
    def loras(self) -> tuple[Attachment, ...]:
        """What of picture prompts goes into the network's own layers: FaceID's LoRAs."""
        adapters = (self._picture_adapter(self._picture_path(prompt)) for prompt in self._request.image_prompts)
        beside = (adapter.lora for adapter in adapters if isinstance(adapter, IpAdapter))
        return tuple(Attachment(lora) for lora in beside if lora is not None)

    # Controls

    def _with_control(self, found: Steering, control: extras.Control, width: int, height: int) -> Steering:
        if control.kind in REFERENCES:
            return replace(found, references=(*found.references, self._reference(control, width, height)))
        net, picture = self._net(control), self._shown(control)
        picture = fitted(picture, width, height, FITS[control.resize])
        if isinstance(net, T2IAdapter):
            unet = self._model.parts.unet
            assert isinstance(unet, UNet)
            shown = features(net, picture.to(self._model.device), unet.config)
            feature = FeatureControl(shown, control.strength, control.start, control.end)
            return replace(found, features=(*found.features, feature))
        return replace(found, controls=(*found.controls, self._control(net, control, picture)))

    def _control(self, net: ControlFile, control: extras.Control, picture: Tensor) -> Control:
        height, width = picture.shape[-2:]
        mask = None if control.mask is None else self._mask(control.mask, width, height)
        kind = 0
        if net.kind == "union":
            kind = UNION_KINDS[control.kind]
        encode = self._encoded if net.kind == "sd3" else None
        hidden = (picture < 0).any(1, keepdim=True).float() if bool((picture < 0).any()) else None
        return Control(
            net, picture.clamp(min=0), control.strength, control.start, control.end, control.mode,
            control.blocks or None, mask, hidden, kind, encode=encode,
        )  # fmt: skip

    def _encoded(self, pixels: Tensor) -> Tensor:
        return self._model.encode(pixels.to(self._model.device), self._request)[0]

    def _mask(self, source: str, width: int, height: int) -> Tensor:
        mask = to_tensor(read_picture(source, "controls.mask").convert("L"))
        return fitted(mask, width, height).to(self._model.device)

    def _shown(self, control: extras.Control) -> Tensor:
        """The control picture `(1, 3, H, W)` in [0, 1]; -1 where it is to be drawn anew."""
        image = read_picture(control.picture, "controls.picture").convert("RGB")
        table = load_all()
        name = control.preprocessor
        preprocessor = table[name or _preprocessor(control.kind) or "none"]
        mask = None
        if preprocessor.name == "inpaint":
            if self._request.mask is None:
                raise RequestError("a control of the kind inpaint follows the request's mask; give one with mask")
            mask = np.asarray(read_mask(self._request.mask, image.size))
        job = Job(mask=mask, device=self._model.device.type)
        return hint(preprocessor.run(np.asarray(image), control.options, job=job)).to(self._model.device)

    def _reference(self, control: extras.Control, width: int, height: int) -> Reference:
        image = read_picture(control.picture, "controls.picture").convert("RGB")
        pixels = fitted(to_tensor(image), width, height, FITS[control.resize])
        latents = self._model.parts.vae.config.scaled(self._encoded(pixels))
        same = torch.Generator().manual_seed(0)  # whatever the seed, or pictures of a batch were others than alone
        noise = torch.randn(latents.shape, generator=same).to(latents)
        attention, adain = REFERENCES[control.kind]
        weight = min(max(control.strength, 0.0), 1.0)
        return Reference(latents, noise, weight, control.start, control.end, attention, adain)

    # Nets

    def _net(self, control: extras.Control) -> ControlFile | T2IAdapter:
        path = self._net_path(control)
        net = self._model.opened.get("control net", path, self._open_net)
        if isinstance(net, T2IAdapter):
            self._note("control", path, None)
            return self._placed(net)
        self._note("control", path, net.digest)
        if net not in self._formed:
            network = self._model.speed.form(self._placed(net.network), self._evaluations)
            self._formed[net] = replace(net, network=network)
        return self._formed[net]

    def _open_net(self, path: Path) -> ControlFile | T2IAdapter:
        if _is_t2i(path):
            adapter = open_t2i_adapter(path, self._model.parts)
            if not isinstance(adapter, T2IAdapter):
                raise CheckpointError(f"{path} is a style adapter; give it to an image prompt: PICTURE:adapter={path}")
            return adapter
        return open_control(path, self._model.parts)

    def _net_path(self, control: extras.Control) -> Path:
        name = control.net or control.kind
        path = Path(name).expanduser()
        # a folder that happens to be called like a kind is not meant
        if path.exists() and (control.net is not None or len(path.parts) > 1 or path.suffix):
            return path
        known = self._nets()
        exact = [path for path in known if _stem(path).lower() == name.lower()]
        words = {name.lower()}
        if control.net is None and (preprocessor := _preprocessor(name)):
            words.add(preprocessor.lower())  # files are called by either name
        chosen = exact or [path for path in known if any(word in _stem(path).lower() for word in words)]
        if len(chosen) == 1:
            return chosen[0]
        if chosen:
            listed = ", ".join(map(str, chosen[:5]))
            raise RequestError(f"{len(chosen)} control nets fit {name!r}: {listed}; say which with net=FILE")
        there = f"known are {', '.join(_stem(path) for path in known[:8])}" if known else "none are known"
        raise RequestError(f"no control net {name!r}: no such path, and {there}; give its file with net=FILE")

    def _nets(self) -> list[Path]:
        """Files and diffusers folders in the library's folders for control nets, and around the model."""
        found: dict[Path, None] = {}
        for path in self._library.adapters("control net", self._model.source):
            found[path.parent if (path.parent / CONFIG).exists() else path] = None
        return list(found)

    # Picture prompts

    def _prompt(self, prompt: extras.ImagePrompt, width: int, height: int) -> ImagePrompt | StylePrompt:
        path = self._picture_path(prompt)
        adapter = self._picture_adapter(path)
        pictures = [read_picture(source, "image_prompts.pictures").convert("RGB") for source in prompt.pictures]
        if isinstance(adapter, StyleAdapter):
            return self._style(path, adapter, prompt, pictures)
        vision = None if adapter.config.kind == "face" else self._vision(path, adapter.config, prompt.encoder)
        faces = None if prompt.faces is None else read_faces(Path(prompt.faces).expanduser())
        positive, negative = tokens(adapter, vision, pictures, faces)
        mask = None if prompt.mask is None else area(read_picture(prompt.mask, "image_prompts.mask"), width, height)
        blocks = {name: float(factor) for name, factor in prompt.blocks.items()}
        return ImagePrompt(
            adapter, positive, negative, prompt.strength, prompt.start, prompt.end,
            None if mask is None else mask.to(self._model.device), blocks, prompt.weight_type,
        )  # fmt: skip

    def _style(
        self, path: Path, adapter: StyleAdapter, prompt: extras.ImagePrompt, pictures: Sequence[Image.Image]
    ) -> StylePrompt:
        """Tokens of every picture, one after the other."""
        for name in ("mask", "blocks", "faces"):
            if getattr(prompt, name):
                raise RequestError(f"a style adapter's tokens follow the prompt everywhere; leave {name} out")
        states = TokensConfig("states", adapter.config.source, adapter.config.width)
        vision = self._vision(path, states, prompt.encoder)
        pixels = (clip_pixels(picture, vision.config.image_size) for picture in pictures)
        with torch.no_grad():
            made = [style_tokens(adapter, vision.states(p.to(self._model.device, self._model.dtype))) for p in pixels]
        return StylePrompt(torch.cat(made, dim=1), prompt.strength, prompt.start, prompt.end)

    def _picture_adapter(self, path: Path) -> IpAdapter | StyleAdapter:
        adapter = self._model.opened.get("IP-Adapter", path, self._open_picture_adapter)
        self._note("image prompt", path, None)
        self._placed(adapter.network if isinstance(adapter, IpAdapter) else adapter)
        return adapter

    def _picture_path(self, prompt: extras.ImagePrompt) -> Path:
        if prompt.adapter is not None:
            return self._library.adapter(prompt.adapter, "IP-Adapter", self._model.source)
        known = self._library.adapters("IP-Adapter", self._model.source)
        if len(known) != 1:
            raise RequestError(f"{len(known)} IP-Adapters are known; say which with adapter=FILE")
        return known[0]

    def _open_picture_adapter(self, path: Path) -> IpAdapter | StyleAdapter:
        if _is_t2i(path):
            adapter = open_t2i_adapter(path, self._model.parts)
            if isinstance(adapter, T2IAdapter):
                raise CheckpointError(f"{path} is a T2I-Adapter, which follows a control picture; give it to a control")
            return adapter
        return open_ip_adapter(path, self._model.parts)

    def _vision(self, adapter: Path, config: TokensConfig, named: str | None) -> ClipVision:
        """The image encoder that an adapter sees pictures with: the one that is named, or one that is at hand."""
        path = Path(named).expanduser() if named else self._encoder_path(adapter, config)
        return self._placed(self._model.opened.get("image encoder", path, open_clip_vision))

    def _encoder_path(self, adapter: Path, config: TokensConfig) -> Path:
        own = self._model.source / "image_encoder"
        places = self._library.folders_for("image encoder", self._model.source)
        return image_encoder_for(adapter, config, [*([own] if own.is_dir() else []), *places])

    # What all of them need

    def _placed(self, network: M) -> M:
        return network.to(self._model.device, self._model.dtype).requires_grad_(False)

    def _note(self, kind: str, path: Path, digest: str | None) -> None:
        """For the metadata of pictures: what was used, and its SHA-256."""
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        self.used[f"{kind}: {_stem(path)}"] = digest or hash_paths(files)


def opened_networks(model: "Model", request: Request) -> Iterator[tuple[str, extras.Control | None, nn.Module]]:
    """The networks of a request's controls and picture prompts, opened where they are, with the control of each.

    A T2I-Adapter and what makes tokens of pictures are asked once a picture, not at every step: no control is said.

    Raises:
        RequestError, CheckpointError: as `Steerer`.
    """
    steerer = Steerer(model, request, Library.of_environment())
    for control in request.controls:
        if control.kind in REFERENCES:
            continue
        path = steerer._net_path(control)
        net = model.opened.get("control net", path, steerer._open_net)
        name = f"control: {_stem(path)}"
        yield (name, None, net) if isinstance(net, T2IAdapter) else (name, control, net.network)
    for prompt in request.image_prompts:
        path = steerer._picture_path(prompt)
        adapter = model.opened.get("IP-Adapter", path, steerer._open_picture_adapter)
        yield f"image prompt: {_stem(path)}", None, adapter.network if isinstance(adapter, IpAdapter) else adapter


def _together(controls: Sequence[Control]) -> tuple[Control, ...]:
    """Pictures for one Union that act in the same way stand beside each other: it sees them all at once."""
    first: dict[object, int] = {}
    found: list[Control] = []
    for control in controls:
        act = (id(control.file), control.start, control.end, control.mode, control.curve)
        key = act if control.file.kind == "union" and control.mask is None else id(control)
        if key in first:
            found[first[key]] = replace(found[first[key]], beside=(*found[first[key]].beside, control))
        else:
            first[key] = len(found)
            found.append(control)
    return tuple(found)


def _is_t2i(path: Path) -> bool:
    if path.is_dir():
        return (path / CONFIG).exists() and read_json(path / CONFIG).get("_class_name") == "T2IAdapter"
    described = describe_addon(open_weights(path))
    return described is not None and described.kind.startswith("T2I")


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _preprocessor(kind: str) -> str | None:
    """The preprocessor of a kind; None for a kind that has none."""
    try:
        return load_all().name(kind)
    except RequestError:
        return None
