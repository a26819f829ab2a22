"""One network of a checkpoint, found and described but not yet built."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn

from reverie.checkpoint.load import build
from reverie.errors import CheckpointError
from reverie.families import configs
from reverie.families.json_config import Json
from reverie.nets.autoencoder import Autoencoder
from reverie.nets.clip_text import ClipText
from reverie.nets.unet import UNet

T = TypeVar("T")


@contextmanager
def about(where: str) -> Iterator[None]:
    """Put `where` before what a CheckpointError says."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{where}{error}") from None


@dataclass(frozen=True)
class Kind:
    """A kind of network.

    Attributes:
        title: what people call it.
        make: builds it from its config.
        read: `(config.json, names of its tensors) -> config`.
        write: the config as JSON.
        tidied: its tensors under our names, where writers of folders have used others.
        stems: names of its weight files in a folder, as safetensors and as torch files.
    """

    title: str
    make: Callable[[Any], nn.Module]
    read: Callable[[Json, Collection[str]], Any]
    write: Callable[[Any], dict[str, Any]]
    tidied: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    stems: tuple[str, str] = ("diffusion_pytorch_model", "diffusion_pytorch_model")


@dataclass(frozen=True)
class Piece:
    """One network of a checkpoint.

    Attributes:
        part: the name of its folder: `unet`, `vae`, `text_encoder`, ...
        config: its shape.
        tensors: reads its tensors, under our names.
        files: where they are.
        where: for messages.
        by_shape: the config comes from a header, which does not say everything, not from JSON.
    """

    part: str
    kind: Kind
    config: Any
    tensors: Callable[[], Mapping[str, Tensor]] = field(repr=False)
    files: tuple[Path, ...]
    where: str
    by_shape: bool = True

    def build(self) -> nn.Module:
        """The network, its parameters mapped from the file.

        Raises:
            CheckpointError: a tensor that such a network does not have; see `reverie.checkpoint.load.build`.
        """
        with about(f"{self.where} does not fit: "):
            tensors = self.tensors()
        return build(lambda: self.kind.make(self.config), tensors, self.where)

    def changed(self, **settings: object) -> "Piece":
        """The same with other settings in its config."""
        return replace(self, config=replace(self.config, **settings))


Pieces: TypeAlias = dict[str, Piece]
Parts: TypeAlias = Mapping[str, tuple[Any, Mapping[str, Tensor]]]
"""Config and tensors of networks, by the names of their folders."""


def tidied_clip(tensors: Mapping[str, T]) -> dict[str, T]:
    """CLIP's text encoder: transformers 5 writes no `text_model.`, old versions a buffer of positions."""
    found = dict(tensors)
    found.pop("text_model.embeddings.position_ids", None)
    found.pop("embeddings.position_ids", None)
    if "embeddings.token_embedding.weight" in found:
        return {name if name.startswith("text_projection.") else f"text_model.{name}": t for name, t in found.items()}
    return found


# The attention of an autoencoder as diffusers named it before 0.15; published VAEs still have these names.
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def tidied_vae(tensors: Mapping[str, T]) -> dict[str, T]:
    """An autoencoder whose attention has its old names."""
    return {_renewed(name) if ".attentions." in name else name: t for name, t in tensors.items()}


def _renewed(name: str) -> str:
    for old, new in OLD_ATTENTION.items():
        name = name.replace(old, new)
    return name


UNET = Kind("U-Net", UNet, lambda json, names: configs.unet_config(json), configs.unet_json)
VAE = Kind("VAE", Autoencoder, lambda json, names: configs.vae_config(json), configs.vae_json, tidied_vae)
CLIP = Kind(
    "text encoder",
    ClipText,
    lambda json, names: configs.text_config(json, projected="text_projection.weight" in names),
    configs.text_json,
    tidied_clip,
    ("model", "pytorch_model"),
)
# By the names of their folders: what families with a U-Net have.
KINDS: dict[str, Kind] = {"text_encoder": CLIP, "text_encoder_2": CLIP, "unet": UNET, "vae": VAE}
