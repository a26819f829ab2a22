"""Pictures in a terminal: the protocols of kitty and iTerm2 where it speaks one, else two pixels a character."""

import base64
import io
import os
import sys
from collections.abc import Mapping
from typing import TextIO

from PIL import Image

COLUMNS = 48  # width of a picture in characters


def protocol(environment: Mapping[str, str] | None = None) -> str:
    """`kitty`, `iterm2` or `blocks`, from what terminals say about themselves in the environment."""
    env = os.environ if environment is None else environment
    if "KITTY_WINDOW_ID" in env or env.get("TERM") == "xterm-kitty" or env.get("TERM_PROGRAM") == "ghostty":
        return "kitty"
    if env.get("TERM_PROGRAM") in {"iTerm.app", "WezTerm", "mintty"}:
        return "iterm2"
    return "blocks"


def encoded(image: Image.Image, how: str) -> str:
    """The characters that show `image`."""
    if how == "blocks":
        return _blocks(image)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    if how == "iterm2":
        return f"\x1b]1337;File=inline=1;width={COLUMNS};preserveAspectRatio=1:{data}\a\n"
    pieces = [data[i : i + 4096] for i in range(0, len(data), 4096)]  # kitty's limit for one escape
    head = f"a=T,f=100,c={COLUMNS},"
    return "".join(
        f"\x1b_G{head if i == 0 else ''}m={int(i < len(pieces) - 1)};{piece}\x1b\\" for i, piece in enumerate(pieces)
    ) + "\n"  # fmt: skip


class Screen:
    """A place in the terminal where one picture replaces the other. Does nothing where there is no terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.how = protocol()
        self._lines = 0

    def show(self, image: Image.Image) -> None:
        """Show `image` in place of the one before."""
        if not self.stream.isatty():
            return
        if self._lines:
            self.stream.write(f"\x1b[{self._lines}A\r\x1b[J")
        text = encoded(image, self.how)
        self._lines = text.count("\n") if self.how == "blocks" else round(COLUMNS * image.height / image.width / 2) + 1
        self.stream.write(text)
        self.stream.flush()


def _blocks(image: Image.Image) -> str:
    """Upper half blocks: the foreground is the pixel above, the background the one below."""
    rows = max(round(COLUMNS * image.height / image.width / 2), 1)
    small = image.convert("RGB").resize((COLUMNS, 2 * rows), Image.Resampling.BOX)
    pixels = small.load()
    assert pixels is not None
    lines = []
    for row in range(rows):
        cells = ((pixels[x, 2 * row], pixels[x, 2 * row + 1]) for x in range(COLUMNS))
        lines.append("".join(f"\x1b[38;2;{_rgb(up)};48;2;{_rgb(low)}m▀" for up, low in cells) + "\x1b[0m\n")
    return "".join(lines)


def _rgb(pixel: object) -> str:
    assert isinstance(pixel, tuple)
    return ";".join(str(value) for value in pixel[:3])
