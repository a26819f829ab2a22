"""`reverie upscale`: a picture enlarged by a network, and drawn over in tiles where that is wanted."""

from pathlib import Path

from reverie.apps import console
from reverie.engine.canvas import resized
from reverie.engine.image import picture_format, save_image
from reverie.engine.sources import read_picture, to_picture, to_tensor
from reverie.engine.upscale import UPSCALERS, open_upscaler
from reverie.errors import RequestError


def run_upscale(source: str, out: Path, upscaler: str | None, scale: float | None, device: str) -> None:
    """Enlarge a picture file.

    Args:
        upscaler: name or file; the one in the package if None.
        scale: how much in all; what the network does if None. More takes several rounds, less is reduced again.

    Raises:
        RequestError: a picture or an upscaler that cannot be read, a scale out of range.
    """
    picture_format(out)
    if scale is not None and not 1 <= scale <= 16:
        raise RequestError(f"scale is {scale:g}; expected 1 to 16")
    network = open_upscaler(upscaler or next(iter(UPSCALERS)), device)
    pixels = to_tensor(read_picture(source).convert("RGB"))
    height, width = pixels.shape[-2:]
    wanted = (round(width * (scale or network.scale)), round(height * (scale or network.scale)))
    with console.busy("enlarging"):
        while pixels.shape[-1] < wanted[0]:
            if network.scale == 1:
                raise RequestError(f"{upscaler} does not enlarge: its scale is 1")
            pixels = network.enlarge(pixels.to(device)).cpu()
    save_image(to_picture(resized(pixels, wanted)), out)
    console.out.print(f"{out}  {wanted[0]}x{wanted[1]}", markup=False)
