"""Compilation by region: the blocks that a network repeats, compiled by `torch.compile`, and the rest as it is.

Every block of one kind and shape runs the same compiled code, so that one compilation serves all of them, and weights
are its arguments: a LoRA that is merged changes none of it. Numbers of pictures, tokens and words are left open, so
that another size, prompt or number of steps compiles nothing anew. What is compiled is kept on disk.
"""

import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from reverie.checkpoint.packed import is_packed, numbers_of
from reverie.engine.recording import Recorded
from reverie.errors import GenerationError
from reverie.nets.attention import TransformerBlock
from reverie.nets.blocks import ResnetBlock
from reverie.nets.forms import shared, with_layers
from reverie.nets.mmdit import JointBlock
from reverie.places import user_cache
from reverie.types import Taps

Compile = Literal["auto", "off", "on"]
COMPILE = ("auto", "off", "on")
BLOCKS = (TransformerBlock, ResnetBlock, JointBlock)
# A block of each shape is one compilation: SD 1.5 has 12 shapes of residual blocks and 4 of transformers, each of them
# a second time for a batch of one and where conditions share their first rows. torch's own limit is 8.
LIMIT = 64
# Evaluations after which `auto` compiles: who has drawn so much will draw more, and has paid as much for evaluations as
# a compilation costs on a card that takes some 50 ms for one. An estimate: it has not been measured.
ENOUGH = 600

M = TypeVar("M", bound=nn.Module)
Run = Callable[..., Tensor]


class Compiler:
    """Makes forms of networks whose blocks are compiled, when that repays.

    Args:
        when: `on` at once, `off` never; `auto` on CUDA, from `ENOUGH` evaluations on.
        backend: of `torch.compile`.

    Attributes:
        evaluations: how many were asked for so far.
        broken: why nothing can be compiled here; empty while that is not known.
    """

    def __init__(self, when: Compile, device: torch.device, backend: str = "inductor") -> None:
        self.when, self.device, self.backend = when, device, backend
        self.evaluations = 0
        self.broken = ""
        self._latest: tuple[tuple[nn.Module, tuple[int, ...]], Run] | None = None

    def expect(self, evaluations: int) -> None:
        """Tell that a network is going to be asked so many times."""
        self.evaluations += evaluations

    def runner(self, network: nn.Module, *, stays: bool = True) -> Run:
        """What runs a network: itself, or its compiled form, on CUDA recorded as a graph.

        That of the latest network is kept, with what was recorded, as long as its weights lie where they did.

        Args:
            stays: whether they will while it runs; what is moved cannot be recorded.
        """
        if not self.wanted:
            return network
        if not stays:
            self._latest = None
            return compiled(network, self)
        key = network, tuple(map(_place, network.parameters()))
        if self._latest is None or self._latest[0] != key:
            self._latest = None  # the memory of its recordings first
            form = compiled(network, self)
            self._latest = key, Recorded(form) if self.device.type == "cuda" else form
        return self._latest[1]

    @property
    def wanted(self) -> bool:
        """Whether blocks are compiled now."""
        if self.when != "auto" or self.broken:
            return self.when == "on"
        return self.device.type == "cuda" and self.evaluations >= ENOUGH

    def run(self, kind: Any, *given: object) -> Any:
        """What the compiled `forward` of a kind of block says; where it cannot be compiled, what the plain one does.

        Raises:
            GenerationError: it cannot, and `on` was asked for.
        """
        if self.broken:
            return kind.forward(*given)
        try:
            return _region(kind, self.backend)(*given)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.broken = reason(error)
        if self.when == "on":
            raise GenerationError(f"nothing can be compiled here: {self.broken}; leave out compile")
        warnings.warn(f"drawing without compilation: {self.broken}", stacklevel=2)
        return kind.forward(*given)


def _place(weight: Tensor) -> int:
    """Where the numbers of a weight lie."""
    return numbers_of(weight).data_ptr()


def reason(error: BaseException) -> str:
    """Why a compilation failed, in one line: a compiler that is missing by its name, else what torch says."""
    cause = getattr(error, "inner_exception", error)
    kind, text = type(cause).__name__, str(cause).strip()
    if "InvalidCxxCompiler" in kind:
        return "there is no C++ compiler (g++ or clang++)"
    if "Triton" in kind:
        return "there is no working Triton"
    return f"{kind}: {text.splitlines()[0]}" if text else kind


def compiled(network: M, compiler: Compiler) -> M:
    """The form of a network whose blocks are compiled. Make it last, of the form with LoRAs in it.

    Blocks stay as they are that hold other layers than torch's own (side branches, seamless convolutions) or packed
    weights, and run as they are where an evaluation taps them.
    """
    layers: dict[str, nn.Module] = {}
    for path, module in network.named_modules():
        if isinstance(module, BLOCKS) and is_compilable(module):
            layers[path] = _compiled(module, compiler)
    if layers:
        _prepare()
    return with_layers(network, layers)


def is_compilable(block: nn.Module) -> bool:
    """Whether every layer of a block is one of torch's own, with plain weights."""
    leaves = (module for module in block.modules() if not [*module.children()])
    return not is_packed(block) and all(type(leaf).__module__.startswith("torch.nn.") for leaf in leaves)


def _compiled(block: nn.Module, compiler: Compiler) -> nn.Module:
    """The block, sharing all that is in it, with its `forward` compiled."""
    copy = shared(block)
    kind: Any = type(block)  # mypy takes a class of modules for one that has no hash
    copy.__class__ = _compiled_class(kind)
    copy.compiler = compiler  # type: ignore[assignment]
    return copy


class Compiled:
    """What a block becomes that is compiled. Mixed into the block's own class."""

    compiler: Compiler

    def forward(self, *given: Any) -> Any:
        """As the block."""
        kind: Any = type(self).__mro__[2]  # behind the compiled class and this one
        taps = next((one for one in given if isinstance(one, Taps)), None)
        tensors = [one for one in given if isinstance(one, Tensor)]
        if taps and taps.reach(getattr(self, "path", "")):
            return kind.forward(self, *given)
        if taps and taps.prompt and isinstance(self, TransformerBlock):
            return self.compiler.run(kind, self, *tensors, None, taps.prompt(self.attn2, tensors[1]))
        return self.compiler.run(kind, self, *tensors)


@cache
def _compiled_class(kind: Any) -> type[nn.Module]:
    """The class of compiled blocks of a kind."""
    return type(f"Compiled{kind.__name__}", (Compiled, kind), {})


@cache
def _region(kind: Any, backend: str) -> Callable[..., Any]:
    """The compiled `forward` of a kind of block, for every block of it."""
    region: Callable[..., Any] = torch.compile(kind.forward, dynamic=True, backend=backend)
    return region


def _prepare() -> None:
    """Where compiled code is kept, and how many shapes of blocks there may be; torch has one setting for a process."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(user_cache() / "reverie" / "compiled"))
    torch._inductor.config.fx_graph_cache = True
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, LIMIT)
