"""Compiled regions: what is compiled and how often, when, and what happens where nothing can be.

Recompilations are counted with a backend that runs the captured graph as it is: what is captured does not depend on the
backend, and torch's own takes minutes. Capturing takes seconds: whole pictures are drawn with `-m slow`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import reverie
from reverie.engine import compiling
from reverie.engine.compiling import ENOUGH, Compile, Compiled, Compiler, compiled
from reverie.engine.once import Prompts
from reverie.errors import GenerationError, RequestError
from reverie.nets.attention import TransformerBlock
from reverie.nets.blocks import ResnetBlock
from reverie.nets.forms import shared, with_layers
from reverie.nets.seamless import seamless
from reverie.nets.unet import UNet
from reverie.types import Taps
from tests.apps import models
from tests.nets import test_mmdit
from tests.nets.test_unet import made

CPU = torch.device("cpu")
CLOSE = 1e-5  # other kernels, float32


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was compiled before does not count; the user's cache and torch's settings stay as they are."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch._dynamo.reset()
    counters.clear()
    compiling._region.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield


def graphs() -> int:
    """How many were compiled so far."""
    return int(counters["stats"]["unique_graphs"])


def eager(when: Compile = "on", backend: str = "eager") -> Compiler:
    return Compiler(when, CPU, backend)


def unet(**settings: object) -> UNet:
    """Blocks of each kind in one width: few graphs."""
    return made(**{"block_out_channels": (32, 32), "attention": (0, 1), "layers_per_block": 1} | settings)


def inputs(batch: int, size: int = 8, words: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 4, size, size), torch.full((batch,), 300.0), torch.randn(batch, words, 16)


@torch.no_grad()
def agree(form: nn.Module, network: nn.Module, given: tuple[Tensor, ...], taps: Taps | None = None) -> bool:
    usual = network(*given, taps=taps)
    return bool((form(*given, taps=taps) - usual).abs().max() < CLOSE * usual.abs().max())


def merged(network: UNet) -> UNet:
    """With other weights in some layers, as LoRAs leave it."""
    layers: dict[str, nn.Module] = {}
    for path, module in network.named_modules():
        if path.endswith(("to_q", "to_v", "conv1")):
            layers[path] = shared(module)
            assert isinstance(module.weight, Tensor)
            layers[path].register_parameter("weight", nn.Parameter(1.5 * module.weight, requires_grad=False))
    return with_layers(network, layers)


def names(form: nn.Module) -> set[str]:
    return {path for path, module in form.named_modules() if isinstance(module, Compiled)}


def test_nothing_is_compiled_anew_for_another_size_prompt_batch_or_lora() -> None:
    network = unet()
    form = compiled(network, eager())
    assert agree(form, network, inputs(2, 8, 7)) and agree(form, network, inputs(4, 12, 14))
    first = graphs()
    assert first >= 3  # residual blocks with and without another width, transformers
    for batch in ((6, 16, 21), (3, 10, 77), (2, 8, 7)):
        assert agree(form, network, inputs(*batch))
    other = merged(network)
    assert agree(compiled(other, eager()), other, inputs(2))
    assert not agree(form, other, inputs(2))
    assert graphs() == first


@pytest.mark.slow
def test_prompts_that_are_known_and_shared_rows_are_used() -> None:
    network, known = unet(), Prompts()
    form, given = compiled(network, eager()), inputs(2)
    given[0][1] = given[0][0]
    taps = Taps(prompt=known, copies=2)
    assert agree(form, network, given, taps) and agree(form, network, given, taps)
    first = graphs()
    assert agree(form, network, inputs(2), Taps(prompt=known)) and agree(form, network, given, taps)
    assert graphs() <= first + 1  # a level whose rows are shared, and one whose are not


@torch.no_grad()
@pytest.mark.parametrize("where", ["bypass", "attention", "merging"])
def test_tapped_blocks_run_as_they_are(where: str) -> None:
    block = TransformerBlock(32, 2, 16).requires_grad_(False)
    block.path, block.attn1.path = "block", "block.attn1"
    form = compiled(nn.ModuleDict({"block": block}), eager())["block"]
    taps = {
        "bypass": Taps(bypass=frozenset({"block"})),
        "attention": Taps(attention={"block.attn1": lambda module, x, context, usual: torch.zeros_like(x)}),
        "merging": Taps(merging={"block": lambda tokens: (lambda x: x[:, ::2], lambda x: x.repeat(1, 2, 1))}),
    }[where]
    x, context = torch.randn(2, 6, 32), torch.randn(2, 5, 16)
    assert torch.equal(form(x, context, taps), block(x, context, taps))
    assert not torch.allclose(form(x, context, taps), block(x, context), atol=1e-4)
    assert not graphs()


@pytest.mark.slow
def test_a_diffusion_transformer() -> None:
    network = test_mmdit.made(test_mmdit.TINY)
    given = tuple(test_mmdit.inputs(test_mmdit.TINY))
    form = compiled(network, eager())
    assert agree(form, network, given)
    assert len(names(form)) == network.config.layers and 2 <= graphs() <= 3  # the last one gives no text


def test_what_is_compiled() -> None:
    """Blocks of torch's own layers alone; the network itself stays as it is."""
    network = unet()
    found = names(compiled(network, eager()))
    assert found == {p for p, m in network.named_modules() if isinstance(m, compiling.BLOCKS)}
    assert not names(network)
    wrapping = names(compiled(seamless(network, "both"), eager()))
    assert wrapping == {path for path in found if "transformer" in path}
    block = next(path for path in found if "resnets" in path)
    layer = nn.Sequential(network.get_submodule(f"{block}.conv2"), Doubled())
    beside = with_layers(network, {f"{block}.conv2": layer})
    assert names(compiled(beside, eager())) == found - {block}
    assert isinstance(compiled(beside, eager()).get_submodule(block), ResnetBlock)


class Doubled(nn.Module):
    """A layer that is not torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


# When


@pytest.mark.parametrize(
    ("when", "device", "evaluations", "expected"),
    [
        ("on", "cpu", 1, True), ("off", "cuda", 10 * ENOUGH, False), ("auto", "cpu", 10 * ENOUGH, False),
        ("auto", "cuda", ENOUGH - 1, False), ("auto", "cuda", ENOUGH, True),
    ],
)  # fmt: skip
def test_when_it_repays(when: Compile, device: str, evaluations: int, expected: bool) -> None:
    compiler = Compiler(when, torch.device(device))
    compiler.expect(evaluations - 1)
    compiler.expect(1)
    assert compiler.wanted == expected


def test_the_form_of_the_latest_network_is_kept() -> None:
    compiler, one, other = eager(), unet(), unet()
    first = compiler.runner(one)
    assert compiler.runner(one) is first
    assert compiler.runner(other) is not first
    assert compiler.runner(one) is not first
    assert eager("off").runner(one) is one


def test_weights_that_were_moved_are_recorded_anew() -> None:
    """A recording reads them where they lay."""
    compiler, network = eager(), unet()
    first = compiler.runner(network)
    network.conv_in.weight.data = network.conv_in.weight.data.clone()
    second = compiler.runner(network)
    assert second is not first and compiler.runner(network) is second
    assert compiler.runner(network, stays=False) is not compiler.runner(network, stays=False)


# Where nothing can be compiled


def failing(message: str) -> Callable[..., Any]:
    def backend(graph: object, example: object) -> Any:
        raise RuntimeError(message)

    return backend


def test_auto_falls_back_with_one_line_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compiler, "wanted", True)
    compiler = Compiler("auto", CPU, failing("no way\nsecond line"))  # type: ignore[arg-type]
    network = unet()
    with pytest.warns(UserWarning, match=r"^drawing without compilation: .*no way") as said:
        assert agree(compiled(network, compiler), network, inputs(2))
    assert len(said) == 1 and "\n" not in str(said[0].message)
    assert agree(compiled(network, compiler), network, inputs(2))


def test_on_is_an_error_in_one_line() -> None:
    compiler = Compiler("on", CPU, failing("no way\nsecond line"))  # type: ignore[arg-type]
    with pytest.raises(GenerationError, match=r"^nothing can be compiled here: .*no way.*; leave out compile$"):
        compiled(unet(), compiler)(*inputs(2))


def test_reasons_have_names() -> None:
    class InvalidCxxCompilerError(RuntimeError):
        pass

    class TritonMissingError(RuntimeError):
        pass

    failed = torch._dynamo.exc.BackendCompilerFailed("inductor", InvalidCxxCompilerError("..."), None)
    assert compiling.reason(failed) == "there is no C++ compiler (g++ or clang++)"
    assert compiling.reason(TritonMissingError("...")) == "there is no working Triton"
    assert compiling.reason(ValueError("a\nb")) == "ValueError: a"


def test_broken_compilers_are_not_asked_again() -> None:
    compiler = Compiler("auto", torch.device("cuda"))
    compiler.expect(ENOUGH)
    compiler.broken = "no"
    assert not compiler.wanted


# Pictures


@pytest.mark.slow
def test_a_picture_is_drawn_by_compiled_blocks(tmp_path: Path) -> None:
    folder = models.folder(tmp_path / "tiny")
    pixels = []
    for when in ("off", "on"):
        model = reverie.load(folder, device="cpu", precision="float32", compile=when)
        model.compiler.backend = "eager"
        pixels.append(model.generate("a red apple", steps=2, seed=3, sampler="euler").pixels)
        assert bool(graphs()) == (when == "on")
    assert (pixels[0] - pixels[1]).abs().max() < 1e-4


def test_an_unknown_time_to_compile_is_refused() -> None:
    with pytest.raises(RequestError, match=r"^unknown time to compile 'later'; known: auto, off, on$"):
        reverie.load(device="cpu", compile="later")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own
def test_torchs_own_compiler(tmp_path: Path) -> None:
    """The numbers of the compiled network are those of the network, and what was compiled is found again."""
    network = unet()
    form = compiled(network, Compiler("on", CPU))
    for batch in ((2, 8, 7), (4, 12, 14)):
        assert agree(form, network, inputs(*batch))
    torch._dynamo.reset()
    counters.clear()
    compiling._region.cache_clear()
    assert agree(compiled(network, Compiler("on", CPU)), network, inputs(2, 8, 7))
    assert counters["inductor"]["fxgraph_cache_hit"] > 0 and not counters["inductor"]["fxgraph_cache_miss"]
