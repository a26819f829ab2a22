"""The transformer of Stable Diffusion 3: what holds whatever the weights are."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reverie.errors import RequestError
from reverie.nets.mmdit import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, MMDiT, MMDiTConfig, position_embedding

TINY = MMDiTConfig(layers=3, heads=2, head_width=8, context_width=12, vector_width=10, positions=12, base_positions=4)
CONFIGS = {
    "SD3": TINY,
    "SD3.5 large": replace(TINY, qk_norm=True),
    "SD3.5 medium": replace(TINY, qk_norm=True, dual_attention=(0, 1)),
}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(config: MMDiTConfig) -> MMDiT:
    torch.manual_seed(0)
    return MMDiT(config).eval().requires_grad_(False)


def inputs(config: MMDiTConfig, *, batch: int = 2, size: tuple[int, int] = (8, 12)) -> list[Tensor]:
    """Latents, timesteps, context of five tokens, pooled prompt."""
    latents = rand(batch, config.in_channels, *size)
    context, vector = rand(batch, 5, config.context_width, seed=1), rand(batch, config.vector_width, seed=2)
    return [latents, torch.linspace(30, 970, batch), context, vector]


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(SD3_MEDIUM, 2_028_328_000), (SD35_MEDIUM, 2_243_171_520), (SD35_LARGE, 8_056_627_520)],
)
def test_true_sizes_have_the_published_numbers_of_parameters(config: MMDiTConfig, parameters: int) -> None:
    """The weights of the published models: 2.0, 2.2 and 8.1 thousand million without the table of positions."""
    with torch.device("meta"):
        network = MMDiT(config)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network.pos_embed.pos_embed.shape == (1, config.positions**2, config.width)


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("size", [(2, 2), (8, 12), (24, 6)])
def test_the_answer_has_the_shape_of_the_latents(kind: str, size: tuple[int, int]) -> None:
    config = replace(CONFIGS[kind], out_channels=5)
    assert made(config)(*inputs(config, size=size)).shape == (2, 5, *size)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_pictures_of_a_batch_do_not_see_each_other(kind: str) -> None:
    network, batch = made(CONFIGS[kind]), inputs(CONFIGS[kind], batch=3)
    whole = network(*batch)
    for i in range(3):
        torch.testing.assert_close(network(*(t[i : i + 1] for t in batch)), whole[i : i + 1])


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_words_have_no_position_but_patches_have(kind: str) -> None:
    """Text tokens are a set; the encoders put their order into them. Of latents all alike, no two patches are."""
    network, (x, t, context, vector) = made(CONFIGS[kind]), inputs(CONFIGS[kind])
    torch.testing.assert_close(network(x, t, context.flip(1), vector), network(x, t, context, vector))
    answer = network(torch.ones_like(x), t, context, vector)[0]
    patches = answer.unfold(1, 2, 2).unfold(2, 2, 2).permute(1, 2, 0, 3, 4).reshape(24, -1)
    assert torch.pdist(patches).min() > 1e-4


@pytest.mark.parametrize("which", ["timesteps", "context", "vector"])
def test_every_condition_matters(which: str) -> None:
    network, given = made(TINY), inputs(TINY)
    changed = list(given)
    place = ("timesteps", "context", "vector").index(which) + 1
    changed[place] = changed[place] + 1.0
    assert (network(*changed) - network(*given)).abs().max() > 1e-3


def test_skipped_blocks_are_left_out() -> None:
    """Without any block the text is never read; without the second, the network is one of two blocks."""
    network, given = made(TINY), inputs(TINY)
    x, t, context, vector = given
    none = frozenset(range(3))
    assert torch.equal(network(*given, none), network(x, t, context + 1, vector, none))
    shorter = made(replace(TINY, layers=2))
    weights = {name: w for name, w in network.state_dict().items() if not name.startswith("transformer_blocks.1.")}
    shorter.load_state_dict(
        {n.replace("transformer_blocks.2.", "transformer_blocks.1."): w for n, w in weights.items()}
    )
    assert torch.equal(network(*given, frozenset({1})), shorter(*given))
    assert not torch.equal(network(*given, frozenset({1})), network(*given))


def test_positions_of_a_small_picture_are_the_middle_of_the_grid() -> None:
    network = made(TINY)
    grid = network.pos_embed.pos_embed.view(12, 12, -1)
    for parameter in network.pos_embed.proj.parameters():
        parameter.zero_()
    tokens = network.pos_embed(torch.zeros(1, 16, 6, 12))  # 3 x 6 patches of 12 x 12
    assert torch.equal(tokens[0], grid[4:7, 3:9].flatten(0, 1))


def test_position_embedding_by_hand() -> None:
    """Row 2, column 1 of a 4 x 4 grid scaled to 8: places 4 and 2, frequencies 1 and 1/100 in 8 channels."""
    column, row = 2.0, 4.0
    want = [
        *(math.sin(column), math.sin(column / 100), math.cos(column), math.cos(column / 100)),
        *(math.sin(row), math.sin(row / 100), math.cos(row), math.cos(row / 100)),
    ]
    torch.testing.assert_close(position_embedding(8, 4, 8)[0, 2 * 4 + 1], torch.tensor(want))


@pytest.mark.parametrize("size", [(8, 13), (7, 12)])
def test_an_odd_size_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(RequestError, match="multiples of 16 pixels"):
        made(TINY)(*inputs(TINY, size=size))


@pytest.mark.parametrize("size", [(26, 4), (4, 26)])
def test_a_size_without_positions_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(RequestError, match="positions for 24 along each side"):
        made(TINY)(*inputs(TINY, size=size))


@pytest.mark.parametrize("block", [3, -1])
def test_an_unknown_block_to_skip_is_refused(block: int) -> None:
    with pytest.raises(RequestError, match=f"no block {block} to skip: the model has blocks 0 to 2"):
        made(TINY)(*inputs(TINY), frozenset({block}))


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_half_precision_stays_near(kind: str) -> None:
    """bfloat16 keeps 8 bits, errors of a few in a thousand a layer: 5 % of the largest number over three."""
    network, given = made(CONFIGS[kind]), inputs(CONFIGS[kind])
    want = network(*given)
    x, t, context, vector = given
    half = network.bfloat16()(x.bfloat16(), t, context.bfloat16(), vector.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - want).abs().max() < 0.05 * want.abs().max()
