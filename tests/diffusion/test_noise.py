"""Noise: one stream a picture, the one that diffusers draws."""

import torch
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import given
from hypothesis import strategies as st

from reverie.diffusion.noise import SeededNoise

SHAPE = (4, 3, 5)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4), st.data())
def test_a_row_depends_on_its_own_seed_alone(seeds: list[int], data: st.DataObject) -> None:
    row = data.draw(st.integers(0, len(seeds) - 1))
    together, alone = SeededNoise(seeds, SHAPE), SeededNoise([seeds[row]], SHAPE)
    for _ in range(3):  # the whole stream, not only its beginning
        assert torch.equal(together()[row], alone()[0])


def test_stream_equals_diffusers_with_a_list_of_generators() -> None:
    seeds = [7, 8, 2**40]
    noise = SeededNoise(seeds, SHAPE)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _ in range(2):
        want = randn_tensor((3, *SHAPE), generator=generators, device=torch.device("cpu"), dtype=torch.float32)
        assert torch.equal(noise(), want)


def test_shape_type_and_spread() -> None:
    noise = SeededNoise(range(8), (4, 32, 32))()
    assert noise.shape == (8, 4, 32, 32)
    assert noise.dtype == torch.float32
    # 32768 draws: the mean is within 0.0055 and the variance within 0.0078 of (0, 1) at one sigma; four sigmas
    assert abs(noise.mean()) < 0.022
    assert abs(noise.var() - 1) < 0.032


def test_draws_follow_one_another() -> None:
    noise = SeededNoise([1], SHAPE)
    assert not torch.equal(noise(), noise())


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    SeededNoise([1, 2], SHAPE)()
    assert torch.equal(torch.get_rng_state(), before)
