"""Changes that are products of small matrices: LoRA (LoCon), LoHa, LoKr, GLoRA."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from reverie.adapters.deltas.base import (
    Delta,
    applied,
    as32,
    check_rank,
    described,
    inputs,
    pointwise,
    refuse,
    scale_of,
)


@dataclass(frozen=True, eq=False)
class LoRA(Delta):
    """`alpha / rank * up @ down` (Hu et al. 2021); of convolutions, LoCon (LyCORIS; Yeh et al. 2023).

    Attributes:
        down: `(rank, in)`, of a convolution `(rank, in, k, k)` or flat; `(rank, in)` or `(rank, in, 1, 1)` with `mid`.
        up: `(out, rank)` or `(out, rank, 1, 1)`.
        mid: `(rank, rank, k, k)`, the core of a Tucker decomposition (LyCORIS calls it CP).
        bias: `(out,)`, scaled like the rest (peft's `lora_bias`).
        alpha: numerator of the scale; None for the rank itself.
    """

    cheap: ClassVar[bool] = True
    endings: ClassVar[Mapping[str, str]] = {
        "down": "lora_down.weight",
        "up": "lora_up.weight",
        "mid": "lora_mid.weight",
        "bias": "lora_up.bias",
    }
    down: Tensor
    up: Tensor
    mid: Tensor | None = None
    bias: Tensor | None = None
    alpha: float | None = None

    @classmethod
    def build(cls, tensors: Mapping[str, Tensor], alpha: float | None, shape: Sequence[int]) -> "LoRA":
        """Of the tensors of a file.

        Raises:
            CheckpointError: they do not fit one another or a weight of `shape`.
        """
        down, up, mid = tensors["lora_down.weight"], tensors["lora_up.weight"], tensors.get("lora_mid.weight")
        rank = down.shape[0] if down.ndim > 1 else 0
        check_rank(rank, shape, "lora_down.weight")
        core = (shape[1] if mid is not None and len(shape) > 2 else inputs(shape)) * rank
        fits = up.ndim > 1 and up.numel() == shape[0] * rank == shape[0] * up.shape[1] and down.numel() == core
        fits = fits and (mid is None or tuple(mid.shape) == (rank, rank, *shape[2:]))
        if not fits:
            shapes = f"lora_down.weight of {described(down.shape)} and lora_up.weight of {described(up.shape)}"
            raise refuse(f"{shapes} make no weight of {described(shape)}")
        return cls(down, up, mid, tensors.get("lora_up.bias"), alpha)

    @classmethod
    def fresh(
        cls, shape: Sequence[int], rank: int, alpha: float | None = None, generator: torch.Generator | None = None
    ) -> "LoRA":
        """A new one, which changes nothing yet: `down` random, `up` zero (initialised as kohya-ss and peft do).

        Args:
            shape: of the weight.
            generator: draws `down`, uniform in ±1/sqrt(in * k * k) (He et al. 2015 with a = sqrt 5).
        """
        bound = inputs(shape) ** -0.5
        down = (torch.rand(rank, *shape[1:], generator=generator) * 2 - 1) * bound
        return cls(down, torch.zeros(shape[0], rank, *(1 for _ in shape[2:])), alpha=alpha)

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """`alpha / rank`."""
        return scale_of(self.alpha, self.rank)

    def difference(self, weight: Tensor, strength: float) -> Tensor:
        """See `Delta`."""
        up, down = as32(self.up, weight).flatten(1), self._down(weight)
        return (up @ down).mul_(self.scale * strength).view(weight.shape)

    def added(self, total: Tensor, weight: Tensor, strength: float) -> Tensor:
        """See `Delta`; in one pass over the memory."""
        up, down = as32(self.up, weight).flatten(1), self._down(weight)
        return torch.addmm(total.flatten(1), up, down, alpha=self.scale * strength).view(weight.shape)

    def _down(self, weight: Tensor) -> Tensor:
        """`(rank, in * k * k)`, the core of a Tucker decomposition multiplied in."""
        down = as32(self.down, weight).flatten(1)
        if self.mid is not None:
            down = torch.einsum("rs...,si->ri...", as32(self.mid, weight), down).flatten(1)
        return down

    def bias_difference(self, bias: Tensor | None, strength: float) -> Tensor | None:
        """See `Delta`."""
        return None if self.bias is None else as32(self.bias, self.bias) * (self.scale * strength)

    def branch(self, layer: nn.Module, x: Tensor, strength: float) -> Tensor:
        """See `Delta`: two thin layers."""
        down, up = self.down.to(x), self.up.to(x).flatten(1)
        if self.mid is not None:
            y = applied(layer, pointwise(layer, x, down.flatten(1)), self.mid.to(x))
        elif isinstance(layer, nn.Conv2d):
            y = applied(layer, x, down.reshape(self.rank, -1, *layer.kernel_size))
        else:
            y = applied(layer, x, down.flatten(1))
        y = pointwise(layer, y, up) * (self.scale * strength)
        bias = self.bias_difference(None, strength)
        return y if bias is None else y + bias.to(y).view(-1, *(1,) * (y.ndim - 2 if y.ndim == 4 else 0))

    def rows(self, which: slice | Tensor) -> "LoRA":
        """See `Delta`."""
        return replace(self, up=self.up[which], bias=None if self.bias is None else self.bias[which])


@dataclass(frozen=True, eq=False)
class LoHa(Delta):
    """`alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b)`, elementwise between (FedPara; Hyeon-Woo et al. 2022, LyCORIS).

    Attributes:
        w1_a, w2_a: `(out, rank)`; with cores `(rank, out)`.
        w1_b, w2_b: `(rank, in * k * k)`; with cores `(rank, in)`.
        t1, t2: `(rank, rank, k, k)`, the cores of Tucker decompositions.
    """

    endings: ClassVar[Mapping[str, str]] = {
        "w1_a": "hada_w1_a",
        "w1_b": "hada_w1_b",
        "w2_a": "hada_w2_a",
        "w2_b": "hada_w2_b",
        "t1": "hada_t1",
        "t2": "hada_t2",
    }
    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None = None
    t2: Tensor | None = None
    alpha: float | None = None

    @classmethod
    def build(cls, tensors: Mapping[str, Tensor], alpha: float | None, shape: Sequence[int]) -> "LoHa":
        """Of the tensors of a file.

        Raises:
            CheckpointError: they do not fit one another or a weight of `shape`.
        """
        for side in "12":
            a, b, t = (tensors.get(f"hada_{name}") for name in (f"w{side}_a", f"w{side}_b", f"t{side}"))
            assert a is not None and b is not None
            _check_factors(a, b, t, (*shape[:1], inputs(shape)) if t is None else shape, f"hada_w{side}", shape)
        return cls(**_named(tensors, "hada_"), alpha=alpha)

    @property
    def rank(self) -> int:
        """Of each factor; that of the product is up to its square."""
        return self.w1_b.shape[0]

    def difference(self, weight: Tensor, strength: float) -> Tensor:
        """See `Delta`."""
        one = _factor(self.w1_a, self.w1_b, self.t1, weight)
        two = _factor(self.w2_a, self.w2_b, self.t2, weight)
        return (one * two * (scale_of(self.alpha, self.rank) * strength)).reshape(weight.shape)


@dataclass(frozen=True, eq=False)
class LoKr(Delta):
    """`alpha / rank * w1 ⊗ w2`, Kronecker's product (LyCORIS; KronA, Edalati et al. 2022).

    Either factor is there as a whole, or as the product of two of a rank, `w2` with a core between. The scale is 1
    where both are whole (LyCORIS, ComfyUI; peft's is `alpha / rank` even then, and its file does not know the rank).

    Attributes:
        w1, w1_a, w1_b: `(out_1, in_1)`, `(out_1, rank)`, `(rank, in_1)`.
        w2, w2_a, w2_b: `(out_2, in_2)` or `(out_2, in_2, k, k)`, `(out_2, rank)`, `(rank, in_2 * k * k)`.
        t2: `(rank, rank, k, k)`; then `w2_a` is `(rank, out_2)` and `w2_b` `(rank, in_2)`.
    """

    cheap: ClassVar[bool] = True
    endings: ClassVar[Mapping[str, str]] = {
        "w1": "lokr_w1",
        "w1_a": "lokr_w1_a",
        "w1_b": "lokr_w1_b",
        "w2": "lokr_w2",
        "w2_a": "lokr_w2_a",
        "w2_b": "lokr_w2_b",
        "t2": "lokr_t2",
    }
    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None
    alpha: float | None = None

    @classmethod
    def build(cls, tensors: Mapping[str, Tensor], alpha: float | None, shape: Sequence[int]) -> "LoKr":
        """Of the tensors of a file.

        Raises:
            CheckpointError: a factor is missing, or they do not fit a weight of `shape`.
        """
        delta = cls(**_named(tensors, "lokr_"), alpha=alpha)
        for whole, a, b in ((delta.w1, delta.w1_a, delta.w1_b), (delta.w2, delta.w2_a, delta.w2_b)):
            if whole is None and (a is None or b is None):
                raise refuse("LoKr lacks one of its factors")
        if delta.rank is not None:
            check_rank(delta.rank, shape, "LoKr")
        try:
            with torch.device("meta"):
                w1, w2 = delta.mapped(lambda t: torch.empty_like(t, device="meta")).factors(torch.empty(()))
        except RuntimeError:
            raise refuse("the factors of LoKr do not fit one another") from None
        out, into = w1.shape[0] * w2.shape[0], w1.shape[1] * inputs(w2.shape)
        if (out, into) != (shape[0], inputs(shape)) or (w2.ndim > 2 and w2.shape[2:] != tuple(shape[2:])):
            sizes = f"{described(w1.shape)} and {described(w2.shape)}"
            raise refuse(f"factors of LoKr of {sizes} make no weight of {described(shape)}")
        return delta

    @property
    def rank(self) -> int | None:
        """Of the factors that are products; that of `w2` goes first. None where both are whole."""
        within = self.w2_b if self.w2 is None else self.w1_b if self.w1 is None else None
        return None if within is None else within.shape[0]

    @property
    def scale(self) -> float:
        """`alpha / rank`, or 1."""
        return 1.0 if self.rank is None else scale_of(self.alpha, self.rank)

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Both factors, whole, in float32 on the weight's device."""
        w1, w2 = self.w1, self.w2
        if w1 is None:
            assert self.w1_a is not None and self.w1_b is not None
            w1 = _factor(self.w1_a, self.w1_b, None, weight)
        if w2 is None:
            assert self.w2_a is not None and self.w2_b is not None
            w2 = _factor(self.w2_a, self.w2_b, self.t2, weight)
        return as32(w1, weight), as32(w2, weight)

    def difference(self, weight: Tensor, strength: float) -> Tensor:
        """See `Delta`."""
        w1, w2 = self.factors(weight)
        product = torch.kron(w1.view(*w1.shape, *(1 for _ in w2.shape[2:])), w2.contiguous())
        return product.mul_(self.scale * strength).reshape(weight.shape)

    def branch(self, layer: nn.Module, x: Tensor, strength: float) -> Tensor:
        """See `Delta`: `w2` on each group of channels, `w1` among the groups."""
        w1, w2 = (t.to(x.dtype) for t in self.factors(x))
        if isinstance(layer, nn.Conv2d):
            batch, _, *size = x.shape
            w2 = w2.reshape(w2.shape[0], -1, *layer.kernel_size)
            y = applied(layer, x.reshape(batch * w1.shape[1], w2.shape[1], *size), w2)
            y = y.view(batch, w1.shape[1], *y.shape[1:])
            return torch.einsum("mg,bgohw->bmohw", w1, y).flatten(1, 2) * (self.scale * strength)
        y = applied(layer, x.reshape(*x.shape[:-1], w1.shape[1], -1), w2)
        return torch.einsum("mg,...go->...mo", w1, y).flatten(-2) * (self.scale * strength)


@dataclass(frozen=True, eq=False)
class GLoRA(Delta):
    """`alpha / rank * (W a1 a2 + b1 b2)` (Chavan et al. 2023, the parts A and B; LyCORIS).

    Files of LyCORIS before 2.0 hold the factors the other way round; `build` turns them.

    Attributes:
        a1, a2: `(in, rank)`, `(rank, in)`: among the inputs.
        b1, b2: `(out, rank)`, `(rank, in)` or `(rank, in, k, k)`.
        bm: `(rank, rank, k, k)`, the core of a Tucker decomposition.
    """

    cheap: ClassVar[bool] = True
    endings: ClassVar[Mapping[str, str]] = {
        "a1": "a1.weight",
        "a2": "a2.weight",
        "b1": "b1.weight",
        "b2": "b2.weight",
        "bm": "bm.weight",
    }
    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    bm: Tensor | None = None
    alpha: float | None = None

    @classmethod
    def build(cls, tensors: Mapping[str, Tensor], alpha: float | None, shape: Sequence[int]) -> "GLoRA":
        """Of the tensors of a file.

        Raises:
            CheckpointError: they do not fit a weight of `shape` in either order.
        """
        a1, a2, b1, b2 = (tensors[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
        bm = tensors.get("bm.weight")
        for factors in ((a1, a2, b1, b2), (a2, a1, b2, b1)):
            delta = cls(*factors, bm=bm, alpha=alpha)
            if delta.fits(shape):
                check_rank(delta.rank, shape, "a1.weight")
                return delta
        sizes = ", ".join(described(t.shape) for t in (a1, a2, b1, b2))
        raise refuse(f"factors of GLoRA of {sizes} make no weight of {described(shape)}")

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the factors make a weight of a shape."""
        if min(t.ndim for t in (self.a1, self.a2, self.b1, self.b2)) < 2:
            return False
        rank, into = self.rank, shape[1]
        core = into if self.bm is not None else inputs(shape)
        return (
            self.a1.numel() == self.a2.numel() == into * rank
            and self.a1.shape[0] == self.a2.shape[1] == into
            and (self.b1.shape[0], self.b1.numel()) == (shape[0], shape[0] * rank)
            and (self.b2.shape[0], self.b2.numel()) == (rank, rank * core)
            and (self.bm is None or tuple(self.bm.shape) == (rank, rank, *shape[2:]))
        )

    @property
    def rank(self) -> int:
        """Columns of `a1`."""
        return self.a1.shape[1]

    def difference(self, weight: Tensor, strength: float) -> Tensor:
        """See `Delta`."""
        a1, a2 = (as32(t, weight).flatten(1) for t in (self.a1, self.a2))
        within = torch.einsum("oi...,ir,rj->oj...", as32(weight, weight), a1, a2)
        beside = self._beside.difference(weight, 1.0)
        return (within + beside) * (scale_of(self.alpha, self.rank) * strength)

    def branch(self, layer: nn.Module, x: Tensor, strength: float) -> Tensor:
        """See `Delta`: the layer on what `a1 a2` make of its input, and a thin layer beside it."""
        a1, a2 = (t.to(x).flatten(1) for t in (self.a1, self.a2))
        weight = layer.weight
        assert isinstance(weight, Tensor)
        within = applied(layer, pointwise(layer, pointwise(layer, x, a2), a1), weight.to(x.dtype))
        return (within + self._beside.branch(layer, x, 1.0)) * (scale_of(self.alpha, self.rank) * strength)

    @property
    def _beside(self) -> LoRA:
        """`b1 b2`, which is a LoRA."""
        return LoRA(self.b2, self.b1, self.bm)


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Fields by the endings of an algorithm's tensors."""
    return {ending.removeprefix(prefix): t for ending, t in tensors.items() if ending.startswith(prefix)}


def _factor(a: Tensor, b: Tensor, core: Tensor | None, like: Tensor) -> Tensor:
    """`a @ b`, or `(rank, out)` and `(rank, in)` around a core: `(out, in, k, k)`."""
    a, b = as32(a, like), as32(b, like)
    if core is None:
        return a @ b
    return torch.einsum("rs...,ro,si->oi...", as32(core, like), a, b)


def _check_factors(
    a: Tensor, b: Tensor, core: Tensor | None, wanted: Sequence[int], name: str, shape: Sequence[int]
) -> None:
    """Refuse factors that do not make a matrix, or with a core a kernel, of the shape `wanted`."""
    rank = b.shape[0] if b.ndim == 2 else 0
    check_rank(rank, shape, f"{name}_b")
    expected = (wanted[0], rank) if core is None else (rank, wanted[0])
    fits = tuple(a.shape) == expected and b.shape[1] == wanted[1]
    if not fits or (core is not None and tuple(core.shape) != (rank, rank, *wanted[2:])):
        sizes = f"{name}_a of {described(a.shape)} and {name}_b of {described(b.shape)}"
        raise refuse(f"{sizes} make no weight of {described(shape)}")
