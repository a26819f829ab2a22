"""Packed weights: the block formats of GGML, and 8-bit floats and integers with a scale.

A GGML tensor is a row of blocks. A block holds small integers q and what turns them into numbers: `d * q` (type 0) or
`d * q - m` (type 1), with d and m in float16, or for the K types as small integers times a float16 of a larger block.
Layouts: ggml `ggml-common.h` (`block_q4_0`, ...) and `ggml-quants.c` (`dequantize_row_*`). All arithmetic is in
float32 and in the order of the reference, so that every number is equal to its to the bit.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
PACKINGS = {dtype: name for name, dtype in FLOAT8.items()}
HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}
NUMBERS = {**FLOAT8, "I8": torch.int8, **HALVES}  # one after the other, in the shape of the weights
CHUNK = 1 << 14  # blocks that are unpacked at once: bounds what the intermediate steps take
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # ggml `kvalues_iq4nl`


@dataclass(frozen=True)
class QuantisedTensor:
    """Weights in their packed form, to be kept so in memory and unpacked when they are used.

    Attributes:
        data: the blocks as uint8, or numbers of 8 or 16 bits in their shape.
        packing: a key of `BLOCKS` or `NUMBERS`.
        shape: of the unpacked tensor.
        scale: for 8-bit floats and integers, one number or one a row.
        products: whether linear layers multiply these numbers as they are, with inputs rounded alike.
    """

    data: Tensor
    packing: str
    shape: tuple[int, ...]
    scale: Tensor | None = None
    products: bool = False

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers, computed in float32 and rounded once to `dtype`."""
        if self.packing in HALVES:
            return self.data.to(dtype)
        if self.packing in NUMBERS:
            return self._scaled(dtype)
        block = BLOCKS[self.packing]
        packed = self.data.reshape(-1, block.size)
        result = torch.empty(len(packed), block.elements, dtype=dtype, device=self.data.device)
        for i in range(0, len(packed), CHUNK):
            result[i : i + CHUNK] = block.unpack(packed[i : i + CHUNK])
        return result.reshape(self.shape)

    def to(self, device: torch.device | str) -> "QuantisedTensor":
        """The same on another device, still packed."""
        scale = None if self.scale is None else self.scale.to(device)
        return replace(self, data=self.data.to(device), scale=scale)

    def rows(self, which: Tensor) -> "QuantisedTensor | None":
        """Some rows (of the first dimension), still packed; None where a row is not whole blocks.

        Args:
            which: `(n,)` int64.
        """
        count, *rest = self.shape
        if self.packing not in NUMBERS and math.prod(rest) % BLOCKS[self.packing].elements:
            return None
        packed = self.data.contiguous().view(torch.uint8).reshape(count, -1)[which]
        scale = self.scale if self.scale is None or self.scale.numel() == 1 else self.scale.reshape(-1)[which]
        shape = (len(which), *rest)
        data = packed.view(NUMBERS[self.packing]).reshape(shape) if self.packing in NUMBERS else packed.flatten()
        return replace(self, data=data, shape=shape, scale=scale)

    def shaped(self, shape: Sequence[int]) -> "QuantisedTensor":
        """The same numbers in the same order, of another shape; the rows stay what they are where each has a scale."""
        data = self.data.reshape(tuple(shape)) if self.packing in NUMBERS else self.data
        return replace(self, data=data, shape=tuple(shape))

    def is_finite(self) -> bool:
        """Whether no number is NaN or infinite. Of blocks only the scales are read: the rest are small integers."""
        if self.scale is not None and not bool(torch.isfinite(self.scale).all()):
            return False
        if self.packing in NUMBERS:
            parts = torch.split(self.data.reshape(-1), CHUNK * 32)
            return all(bool(torch.isfinite(widened(part).sum())) for part in parts)
        block = BLOCKS[self.packing]
        scales = self.data.reshape(-1, block.size)[:, block.scales].contiguous().view(torch.float16)
        return bool(torch.isfinite(scales).all())

    @property
    def nbytes(self) -> int:
        """Bytes of the packed numbers."""
        return self.data.nbytes

    def multiplied(self, x: Tensor) -> Tensor:
        """`x W^T` of inputs `(n, k)` that are rounded to 8 bits a row: `(n, rows)`, in bfloat16 or float32."""
        assert self.scale is not None
        data, scale = rounded(x, self.packing)
        across = self.scale.float().reshape(1, -1).expand(1, len(self.data)).contiguous()
        if self.packing == "I8":
            return torch._int_mm(data, self.data.t()).float() * scale * across
        result: Tensor = torch._scaled_mm(data, self.data.t(), scale_a=scale, scale_b=across, out_dtype=torch.bfloat16)
        return result

    def _scaled(self, dtype: torch.dtype) -> Tensor:
        rows = self.data.reshape(self.shape[0] if self.shape else 1, math.prod(self.shape[1:]))
        result = torch.empty(rows.shape, dtype=dtype, device=rows.device)
        count = max(CHUNK * 32 // max(rows.shape[1], 1), 1)
        for i in range(0, len(rows), count):
            part = widened(rows[i : i + count])
            if self.scale is not None:
                scale = self.scale.float().reshape(-1, 1)
                part *= scale if len(scale) == 1 else scale[i : i + count]
            result[i : i + count] = part
        return result.reshape(self.shape)


LARGEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0, "I8": 127.0}  # numbers that 8 bits hold


def rounded(rows: Tensor, packing: str) -> tuple[Tensor, Tensor]:
    """Rows `(n, k)` in 8 bits, each scaled so that its largest number is the largest there is.

    Returns:
        The bytes `(n, k)` and the scales `(n, 1)` float32, by which they are to be multiplied.
    """
    numbers = rows.float()
    scale = (numbers.abs().amax(1, keepdim=True) / LARGEST[packing]).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = numbers / scale
    return (scaled.round() if packing == "I8" else scaled).to(NUMBERS[packing]), scale


def products_in_bytes(packing: str, device: torch.device) -> bool:
    """Whether a device multiplies such numbers natively.

    8-bit floats: Hopper and later cards; 8-bit integers: Turing and later ones, and processors with VNNI.
    """
    if device.type == "cuda":
        least = {"F8_E4M3": (9, 0), "I8": (7, 5)}.get(packing)
        return least is not None and torch.cuda.get_device_capability(device) >= least
    return packing == "I8" and device.type == "cpu" and torch.cpu._is_vnni_supported()


def widened(numbers: Tensor) -> Tensor:
    """Numbers as float32; 8-bit floats bit by bit, several times faster than torch's `float()`.

    A float16 holds either type: that of e5m2 is its upper byte; that of e4m3fn has the exponent biased by 7 where
    float16 has 15, and a NaN where float16 has a number (OCP 8-bit Floating Point Specification, table 1).
    """
    if numbers.dtype not in FLOAT8.values():
        return numbers.float()
    signed = numbers.contiguous().view(torch.int8).to(torch.int16)
    if numbers.dtype == torch.float8_e5m2:
        return (signed << 8).view(torch.float16).float()
    wide = (signed << 7).bitwise_and_(~(1 << 14)).view(torch.float16).float().mul_(2.0**8)
    nan = (numbers.contiguous().view(torch.uint8) | 0x80) == 0xFF
    return wide.masked_fill_(nan, torch.nan) if bool(nan.any()) else wide


class Block(NamedTuple):
    """How many numbers a block holds, how many bytes it takes, and how (n, size) uint8 become (n, elements) float32.

    Attributes:
        scales: the bytes of its float16 numbers.
    """

    elements: int
    size: int
    unpack: Callable[[Tensor], Tensor]
    scales: slice


def _half(packed: Tensor) -> Tensor:
    """Two bytes a row -> one float32 a row, (n, 1)."""
    return packed.contiguous().view(torch.float16).float()


def _fields(packed: Tensor, width: int, group: int) -> Tensor:
    """Unsigned fields of `width` bits, lowest first: (n, g * group) -> (n, g, 8 / width, group)."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device).reshape(-1, 1)
    return (packed.reshape(len(packed), -1, 1, group) >> shifts).bitwise_and(2**width - 1)


def _nibbles(packed: Tensor, group: int = 16) -> Tensor:
    """Groups of bytes whose low halves come before their high halves, (n, 2 * bytes)."""
    return _fields(packed, 4, group).flatten(1)


def _bits(packed: Tensor) -> Tensor:
    """Single bits, lowest first, (n, 8 * bytes)."""
    return _fields(packed, 1, 1).flatten(1)


def _q4_0(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * (_nibbles(b[:, 2:]).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * _nibbles(b[:, 4:]).float() + _half(b[:, 2:4])


def _q5_0(b: Tensor) -> Tensor:
    q = _nibbles(b[:, 6:]) | (_bits(b[:, 2:6]) << 4)
    return _half(b[:, :2]) * (q.float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    q = _nibbles(b[:, 8:]) | (_bits(b[:, 4:8]) << 4)
    return _half(b[:, :2]) * q.float() + _half(b[:, 2:4])


def _q8_0(b: Tensor) -> Tensor:
    return b[:, 2:].contiguous().view(torch.int8).float() * _half(b[:, :2])


def _q2_k(b: Tensor) -> Tensor:
    scales = b[:, :16]
    d, m = _half(b[:, 80:82]) * (scales & 15).float(), _half(b[:, 82:84]) * (scales >> 4).float()
    q = _fields(b[:, 16:80], 2, 32).reshape(-1, 16, 16).float()
    return (d[:, :, None] * q - m[:, :, None]).flatten(1)


def _q3_k(b: Tensor) -> Tensor:
    low = _fields(b[:, 96:104], 4, 8).flatten(1)  # (n, 16)
    high = _fields(b[:, 104:108], 2, 4).flatten(1)
    d = _half(b[:, 108:110]) * ((low | (high << 4)).float() - 32)
    q = _fields(b[:, 32:96], 2, 32).reshape(-1, 16, 16).float()
    absent = 1 - _fields(b[:, :32], 1, 32).reshape(-1, 16, 16).float()  # the offset of 4 where the third bit is 0
    return (d[:, :, None] * (q - 4 * absent)).flatten(1)


def _scales_k(b: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 minima of Q4_K and Q5_K, 6 bits each in 12 bytes, times their float16: (n, 8, 1) each."""
    low, mid, high = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    d = torch.cat([low & 63, (high & 15) | ((low >> 2) & 48)], 1).float()
    m = torch.cat([mid & 63, (high >> 4) | ((mid >> 2) & 48)], 1).float()
    return (_half(b[:, :2]) * d)[:, :, None], (_half(b[:, 2:4]) * m)[:, :, None]


def _q4_k(b: Tensor) -> Tensor:
    d, m = _scales_k(b)
    q = _fields(b[:, 16:], 4, 32).reshape(-1, 8, 32).float()
    return (d * q - m).flatten(1)


def _q5_k(b: Tensor) -> Tensor:
    d, m = _scales_k(b)
    high = _fields(b[:, 16:48], 1, 32).reshape(-1, 8, 32)
    q = _fields(b[:, 48:], 4, 32).reshape(-1, 8, 32) | (high << 4)
    return (d * q.float() - m).flatten(1)


def _q6_k(b: Tensor) -> Tensor:
    low = _fields(b[:, :128], 4, 64).reshape(-1, 16, 16)
    high = _fields(b[:, 128:192], 2, 32).reshape(-1, 16, 16)
    d = _half(b[:, 208:210]) * b[:, 192:208].contiguous().view(torch.int8).float()
    return (d[:, :, None] * ((low | (high << 4)).float() - 32)).flatten(1)


def _iq4(q: Tensor) -> Tensor:
    return torch.tensor(IQ4_VALUES, dtype=torch.float32, device=q.device)[q.long()]


def _iq4_nl(b: Tensor) -> Tensor:
    return _half(b[:, :2]) * _iq4(_nibbles(b[:, 2:]))


def _iq4_xs(b: Tensor) -> Tensor:
    low = _fields(b[:, 4:8], 4, 1).flatten(1)  # (n, 8)
    high = _fields(b[:, 2:4], 2, 1).flatten(1)
    d = _half(b[:, :2]) * ((low | (high << 4)).float() - 32)
    return (d[:, :, None] * _iq4(_nibbles(b[:, 8:]).reshape(-1, 8, 32))).flatten(1)


BLOCKS: dict[str, Block] = {
    "Q4_0": Block(32, 18, _q4_0, slice(2)), "Q4_1": Block(32, 20, _q4_1, slice(4)),
    "Q5_0": Block(32, 22, _q5_0, slice(2)), "Q5_1": Block(32, 24, _q5_1, slice(4)),
    "Q8_0": Block(32, 34, _q8_0, slice(2)), "Q2_K": Block(256, 84, _q2_k, slice(80, 84)),
    "Q3_K": Block(256, 110, _q3_k, slice(108, 110)), "Q4_K": Block(256, 144, _q4_k, slice(4)),
    "Q5_K": Block(256, 176, _q5_k, slice(4)), "Q6_K": Block(256, 210, _q6_k, slice(208, 210)),
    "IQ4_NL": Block(32, 18, _iq4_nl, slice(2)), "IQ4_XS": Block(256, 136, _iq4_xs, slice(2)),
}  # fmt: skip
