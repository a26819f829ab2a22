"""Changes that rotate a weight: OFT and BOFT, of outputs (kohya-ss, LyCORIS) or of inputs (peft, OneTrainer)."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

import torch
from torch import Tensor, nn

from reverie.adapters.deltas.base import Delta, applied, as32, described, inputs, refuse

TERMS = 5  # of Neumann's series for Cayley's transform; peft `num_cayley_neumann_terms`


@dataclass(frozen=True, eq=False)
class Turning(Delta):
    """`strength * (turned(W) - W)`.

    LyCORIS interpolates every factor of BOFT instead; at strength 1 both are the same.
    """

    @abstractmethod
    def turned(self, weight: Tensor) -> Tensor:
        """The weight `(out, ...)`, float32, with its outputs or inputs turned."""

    def difference(self, weight: Tensor, strength: float) -> Tensor:
        """See `Delta`."""
        weight = as32(weight, weight)
        return (self.turned(weight) - weight).mul_(strength)


@dataclass(frozen=True, eq=False)
class OutputTurning(Turning):
    """Turns the outputs of a layer, so that a branch need not touch its weight."""

    def branch(self, layer: nn.Module, x: Tensor, strength: float) -> Tensor:
        """See `Delta`: what the layer says without bias, turned."""
        weight, axis = layer.weight, 1 if isinstance(layer, nn.Conv2d) else -1
        assert isinstance(weight, Tensor)
        y = applied(layer, x, weight.to(x.dtype)).movedim(axis, 0)
        return (self.turned(y).to(y.dtype) - y).mul(strength).movedim(0, axis)


@dataclass(frozen=True, eq=False)
class OFT(OutputTurning):
    """Blocks of outputs are rotated: `R^T W`, `R = (I + Q) (I - Q)^-1`, `Q = B - B^T` (Qiu et al. 2023).

    Attributes:
        blocks: `(n, b, b)`, n * b outputs.
        rescale: `(out, 1, ...)`, factors of the outputs after the rotation (LyCORIS `rescaled`).
        alpha: limits the norm of all of Q to `alpha * out`; None or 0 for no limit.
    """

    endings: ClassVar[Mapping[str, str]] = {"blocks": "oft_blocks", "rescale": "rescale"}
    blocks: Tensor
    rescale: Tensor | None = None
    alpha: float | None = None

    @classmethod
    def build(cls, tensors: Mapping[str, Tensor], alpha: float | None, shape: Sequence[int]) -> "Turning":
        """OFT, or BOFT where the blocks have a fourth axis.

        Raises:
            CheckpointError: the blocks do not fit a weight of `shape`.
        """
        blocks, rescale = tensors["oft_blocks"], tensors.get("rescale")
        sizes = tuple(blocks.shape)
        fits = len(sizes) in {3, 4} and sizes[-1] == sizes[-2] and sizes[-3] * sizes[-2] == shape[0]
        if fits and len(sizes) == 4:  # the widest of the butterfly's strides must fit
            fits = sizes[-1] % 2 == 0 and shape[0] % (2 ** (sizes[0] - 1) * sizes[-1]) == 0
        if not fits or (rescale is not None and rescale.numel() != shape[0]):
            raise refuse(f"oft_blocks of {described(sizes)} do not divide a weight of {described(shape)}")
        return (BOFT if len(sizes) == 4 else cls)(blocks, rescale, alpha)

    def rotations(self, weight: Tensor) -> Tensor:
        """The blocks, orthogonal, in float32 on the weight's device."""
        blocks = as32(self.blocks, weight)
        skew = blocks - blocks.mT
        limit = (self.alpha or 0.0) * len(weight)
        if limit > 0:
            skew = skew * (limit / (torch.linalg.vector_norm(skew) + 1e-8)).clamp(max=1.0)  # 1e-8: LyCORIS, kohya-ss
        return cayley(-skew)

    def turned(self, weight: Tensor) -> Tensor:
        """See `Turning`."""
        rotations = self.rotations(weight)
        split = as32(weight, weight).reshape(*rotations.shape[:2], -1)
        return self.rescaled(torch.einsum("nij,nik->njk", rotations, split).reshape(weight.shape))

    def rescaled(self, weight: Tensor) -> Tensor:
        """With the factors of the outputs."""
        if self.rescale is None:
            return weight
        return weight * as32(self.rescale, weight).view(-1, *(1 for _ in weight.shape[1:]))


@dataclass(frozen=True, eq=False)
class BOFT(OFT):
    """OFT as a product of sparse rotations in a butterfly (Liu et al. 2023): `B_m ... B_1 W`.

    Factor i rotates outputs that lie `2^i * b / 2` apart. `W` is turned along its outputs, as LyCORIS trained before
    it changed `make_weight`, and as ComfyUI and A1111 read such files.

    Attributes:
        blocks: `(m, n, b, b)`.
    """

    def turned(self, weight: Tensor) -> Tensor:
        """See `Turning`."""
        y = as32(weight, weight).reshape(len(weight), -1)
        for i, factor in enumerate(self.rotations(weight)):
            stride = 2**i * factor.shape[-1] // 2
            near = y.view(-1, 2, stride, y.shape[-1]).transpose(1, 2).reshape(*factor.shape[:2], -1)
            far = torch.bmm(factor, near).view(-1, stride, 2, y.shape[-1])
            y = far.transpose(1, 2).flatten(0, 2)
        return self.rescaled(y.reshape(weight.shape))


@dataclass(frozen=True, eq=False)
class OldOFT(OutputTurning):
    """OFT of early LyCORIS, whose file holds the rotations themselves: `R^T W`.

    Attributes:
        blocks: `(n, b, b)`.
    """

    endings: ClassVar[Mapping[str, str]] = {"blocks": "oft_diag"}
    blocks: Tensor

    @classmethod
    def build(cls, tensors: Mapping[str, Tensor], alpha: float | None, shape: Sequence[int]) -> "OldOFT":
        """Of the tensors of a file.

        Raises:
            CheckpointError: the blocks do not fit a weight of `shape`.
        """
        sizes = tuple(tensors["oft_diag"].shape)
        if len(sizes) != 3 or sizes[1] != sizes[2] or sizes[0] * sizes[1] != shape[0]:
            raise refuse(f"oft_diag of {described(sizes)} does not divide a weight of {described(shape)}")
        return cls(tensors["oft_diag"])

    def turned(self, weight: Tensor) -> Tensor:
        """See `Turning`."""
        blocks = as32(self.blocks, weight)
        split = as32(weight, weight).reshape(*blocks.shape[:2], -1)
        return torch.einsum("nij,nik->njk", blocks, split).reshape(weight.shape)


@dataclass(frozen=True, eq=False)
class InputOFT(Turning):
    """OFT of the inputs: `W R^T` (peft; OneTrainer's and kohya-ss' OFT v2).

    Attributes:
        vectors: `(n, b * (b - 1) / 2)`, the upper triangles of Q; one row for all blocks where they are shared.
        terms: of Neumann's series for Cayley's transform; 0 for the transform itself. The file does not say: what
            peft does unless told otherwise.
    """

    endings: ClassVar[Mapping[str, str]] = {"vectors": "oft_R.weight"}
    vectors: Tensor
    terms: int = TERMS

    @classmethod
    def build(cls, tensors: Mapping[str, Tensor], alpha: float | None, shape: Sequence[int]) -> "InputOFT":
        """Of the tensors of a file.

        Raises:
            CheckpointError: they are no triangles, or do not divide the inputs of a weight of `shape`.
        """
        vectors, into = tensors["oft_R.weight"], inputs(shape)
        block = (1 + isqrt(1 + 8 * vectors.shape[-1])) // 2
        triangle = vectors.ndim == 2 and block * (block - 1) // 2 == vectors.shape[1]
        if not triangle or into % block or vectors.shape[0] not in {1, into // block}:
            raise refuse(f"oft_R.weight of {described(vectors.shape)} does not divide a weight of {described(shape)}")
        return cls(vectors)

    def rotations(self, weight: Tensor) -> Tensor:
        """The blocks `(n or 1, b, b)`."""
        vectors = as32(self.vectors, weight)
        block = (1 + isqrt(1 + 8 * vectors.shape[1])) // 2
        upper = vectors.new_zeros(len(vectors), block, block)
        rows, columns = torch.triu_indices(block, block, 1, device=vectors.device)
        upper = upper.index_put((torch.arange(len(vectors), device=vectors.device)[:, None], rows, columns), vectors)
        skew = upper - upper.mT
        return neumann(skew, self.terms) if self.terms else cayley(skew)

    def turned(self, weight: Tensor) -> Tensor:
        """See `Turning`."""
        rotations = self.rotations(weight)
        split = weight.reshape(len(weight), -1, rotations.shape[-1])
        return torch.einsum("onj,nij->oni", split, rotations.expand(split.shape[1], -1, -1)).reshape(weight.shape)


@dataclass(frozen=True, eq=False)
class InputBOFT(Turning):
    """BOFT of the inputs: `s * W (B_m ... B_1)^T` (peft; kohya-ss' BOFT).

    Attributes:
        blocks: `(m, n, b, b)`; `Q = (blocks - blocks^T) / 2`.
        factors: `(out, 1)`, s.
    """

    endings: ClassVar[Mapping[str, str]] = {"blocks": "boft_R", "factors": "boft_s"}
    blocks: Tensor
    factors: Tensor | None = None

    @classmethod
    def build(cls, tensors: Mapping[str, Tensor], alpha: float | None, shape: Sequence[int]) -> "InputBOFT":
        """Of the tensors of a file.

        Raises:
            CheckpointError: the blocks do not fit a weight of `shape`.
        """
        blocks, factors = tensors["boft_R"], tensors.get("boft_s")
        sizes = tuple(blocks.shape)
        fits = len(sizes) == 4 and sizes[2] == sizes[3] and sizes[1] * sizes[2] == inputs(shape)
        fits = fits and (sizes[0] == 1 or (sizes[2] % 2 == 0 and sizes[1] % 2 ** (sizes[0] - 1) == 0))
        if not fits or (factors is not None and factors.numel() != shape[0]):
            raise refuse(f"boft_R of {described(sizes)} does not divide a weight of {described(shape)}")
        return cls(blocks, factors)

    def turned(self, weight: Tensor) -> Tensor:
        """See `Turning`."""
        blocks = as32(self.blocks, weight)
        y = weight.reshape(len(weight), -1).T
        for i, factor in enumerate(cayley((blocks - blocks.mT) / 2)):
            order = _parted(len(y), factor.shape[-1], i).to(y.device)
            near = torch.empty_like(y).index_copy(0, order, y).view(*factor.shape[:2], -1)
            y = torch.bmm(factor, near).flatten(0, 1)[order]
        y = y.T
        if self.factors is not None:
            y = y * as32(self.factors, weight).view(-1, 1)
        return y.reshape(weight.shape)


def cayley(skew: Tensor) -> Tensor:
    """`(I - Q) (I + Q)^-1` of skew-symmetric `(..., b, b)`: rotations."""
    one = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    result: Tensor = torch.linalg.solve(one + skew, one - skew, left=False)
    return result


def neumann(skew: Tensor, terms: int) -> Tensor:
    """`I + 2 Q + 2 Q^2 + ... + Q^(terms - 1)`: peft's series for Cayley's transform (Qiu et al. 2025, OFT v2)."""
    result = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew)
    power = skew
    for k in range(1, terms):
        result = result + power * (1.0 if k == terms - 1 and terms > 2 else 2.0)
        power = power @ skew
    return result


def _parted(size: int, block: int, level: int) -> Tensor:
    """The order in which the even halves of blocks come before the odd ones, within groups of `block * 2^level`."""
    if block % 2:
        return torch.arange(size)
    return torch.arange(size).view(-1, 2**level, 2, block // 2).transpose(1, 2).flatten()
