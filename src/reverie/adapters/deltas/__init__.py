"""The algorithms by which a file changes a weight, and the tensors that each is made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from math import isfinite
from typing import TypeAlias

from torch import Tensor

from reverie.adapters.deltas.base import Delta, Sum, check_finite, described, refuse
from reverie.adapters.deltas.direct import IA3, DoRA, FullDifference, NormDifference, PeftIA3, Replacement
from reverie.adapters.deltas.lowrank import GLoRA, LoHa, LoKr, LoRA
from reverie.adapters.deltas.orthogonal import BOFT, OFT, InputBOFT, InputOFT, OldOFT
from reverie.errors import CheckpointError
from reverie.registry import Registry

__all__ = [
    "BOFT",
    "DELTAS",
    "ENDINGS",
    "IA3",
    "OFT",
    "Algorithm",
    "Delta",
    "DoRA",
    "FullDifference",
    "GLoRA",
    "InputBOFT",
    "InputOFT",
    "LoHa",
    "LoKr",
    "LoRA",
    "NormDifference",
    "OldOFT",
    "PeftIA3",
    "Replacement",
    "Sum",
    "assembled",
]

Build: TypeAlias = Callable[[Mapping[str, Tensor], float | None, Sequence[int]], Delta]
"""`(tensors by ending, alpha, shape of the weight) -> the change`."""


@dataclass(frozen=True)
class Algorithm:
    """How a kind of change is recognised and made.

    Attributes:
        needs: endings of the tensors that are always there.
        options: endings of those that may be.
        build: makes the change; it raises CheckpointError where the tensors are none.
    """

    needs: tuple[str, ...]
    options: tuple[str, ...]
    build: Build

    @property
    def endings(self) -> tuple[str, ...]:
        """All endings of its tensors; `alpha` besides."""
        return self.needs + self.options


DELTAS: Registry[Algorithm] = Registry("algorithm")


def _register(name: str, kind: type[Delta], build: Build) -> None:
    """Fields without a default are what an algorithm needs."""
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    needs = tuple(ending for name, ending in kind.endings.items() if name in needed)
    options = tuple(ending for name, ending in kind.endings.items() if name not in needed)
    DELTAS.add(name, Algorithm(needs, options, build))


_register("lora", LoRA, LoRA.build)
_register("loha", LoHa, LoHa.build)
_register("lokr", LoKr, LoKr.build)
_register("glora", GLoRA, GLoRA.build)
_register("oft", OFT, OFT.build)
_register("old oft", OldOFT, OldOFT.build)
_register("input oft", InputOFT, InputOFT.build)
_register("input boft", InputBOFT, InputBOFT.build)
_register("ia3", IA3, IA3.build)
_register("peft ia3", PeftIA3, PeftIA3.build)
_register("full", FullDifference, FullDifference.build)
_register("norm", NormDifference, NormDifference.build)
_register("set", Replacement, Replacement.build)

MAGNITUDES = ("dora_scale", "lora_magnitude_vector")  # DoRA, on top of whatever else there is
RESHAPED = "reshape_weight"  # ComfyUI: the shape of a layer that the adapter enlarges
ENDINGS = frozenset(e for name in DELTAS for e in DELTAS[name].endings) | {*MAGNITUDES, RESHAPED, "alpha"}
"""Every ending that a tensor of a change can have."""


def assembled(tensors: Mapping[str, Tensor], alpha: float | None, shape: Sequence[int]) -> Delta:
    """The change of one layer, of all tensors that a file has for it.

    Args:
        tensors: by the end of their names, one of `ENDINGS`; `alpha` is not among them.
        alpha: of the file, or of its metadata (for peft's rsLoRA `lora_alpha * sqrt(rank)`); None where there is none.
        shape: of the layer's weight.

    Raises:
        CheckpointError: tensors that are missing, left over, of impossible shapes, or NaN; an absurd rank.
    """
    check_finite(tensors)
    if alpha is not None and not isfinite(alpha):
        raise CheckpointError(f"alpha is {alpha}; the file is damaged: fetch it again")
    if RESHAPED in tensors and tensors[RESHAPED].tolist() != list(shape):
        wanted = described([int(n) for n in tensors[RESHAPED].tolist()])
        raise refuse(f"the file enlarges this layer of {described(shape)} to {wanted}, which no Stable Diffusion has")
    parts, left = [], {ending: t for ending, t in tensors.items() if ending not in {*MAGNITUDES, RESHAPED}}
    for name in DELTAS:
        algorithm = DELTAS[name]
        own = {ending: left.pop(ending) for ending in algorithm.endings if ending in left}
        missing = [ending for ending in algorithm.needs if ending not in own]
        if own and missing:
            raise refuse(f"{', '.join(own)} without {', '.join(missing)}")
        if own:
            parts.append(algorithm.build(own, alpha, shape))
    if left or not parts:
        raise refuse(f"{', '.join(left or tensors) or 'no tensor'}: no known change of a layer")
    inner = parts[0] if len(parts) == 1 else Sum(tuple(parts))
    return DoRA.build(inner, tensors, shape) if any(ending in tensors for ending in MAGNITUDES) else inner
