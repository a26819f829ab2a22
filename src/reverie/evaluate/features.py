"""Features of pictures in a folder, as FID and its kin compare them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from reverie.checkpoint.load import build
from reverie.checkpoint.source import open_weights
from reverie.engine.sources import read_picture, to_tensor
from reverie.errors import CheckpointError, RequestError
from reverie.nets.inception import NAME, Inception, from_tensorflow

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
Progress = Callable[[int, int], None]  # pictures done, pictures in all


def open_inception(path: Path) -> Inception:
    """The network with its weights, under pytorch-fid's names or TensorFlow's.

    Raises:
        CheckpointError: other weights, or a broken file.
    """
    file = open_weights(path)
    tensors = {name: file.tensor(name).float() for name in file.tensors if not name.endswith("num_batches_tracked")}
    if any(NAME.fullmatch(name) for name in tensors):
        try:
            tensors = from_tensorflow(tensors)
        except KeyError as error:
            raise CheckpointError(f"{path} is not Inception v3: it has {error.args[0]}") from None
    tensors = {name: t for name, t in tensors.items() if not name.startswith(("fc.", "AuxLogits."))}
    counters = [name for name, _ in Inception().named_buffers() if name.endswith("num_batches_tracked")]
    return build(Inception, tensors | dict.fromkeys(counters, torch.zeros(())), f"Inception v3 in {path}")


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder and those below it, in order.

    Raises:
        RequestError: no such folder, or none in it.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    if not found:
        what = "has no pictures" if folder.is_dir() else "is not a folder"
        raise RequestError(f"{folder} {what}; pictures end in {', '.join(ENDINGS)}")
    return found


@torch.no_grad()
def features_of(
    pictures: Sequence[Path],
    network: Inception,
    device: torch.device,
    *,
    batch: int = 32,
    progress: Progress | None = None,
) -> Tensor:
    """Features `(N, 2048)` float32 on the CPU.

    Args:
        progress: called as `(pictures done, pictures in all)`.

    Raises:
        RequestError: a file that is not a picture.
    """
    network = network.to(device)
    found = []
    for start in range(0, len(pictures), batch):
        part = [
            to_tensor(read_picture(str(path), "picture").convert("RGB")) for path in pictures[start : start + batch]
        ]
        same = len({p.shape for p in part}) == 1
        groups = [torch.cat(part)] if same else part
        found += [network(group.to(device)).cpu() for group in groups]
        if progress:
            progress(min(start + batch, len(pictures)), len(pictures))
    return torch.cat(found)
