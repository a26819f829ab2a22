"""Noise: a stream a picture, the one that diffusers, CUDA, AUTOMATIC1111 and torchsde draw."""

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
import torchsde
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reverie.diffusion.noise import (
    BrownianNoise,
    Philox,
    Rng,
    SeededNoise,
    centred,
    philox4x32,
    picture_seeds,
    slerp,
    stream,
)

SHAPE = (4, 3, 5)
RNGS: tuple[Rng, ...] = get_args(Rng)

# Random123 v1.14.0, tests/kat_vectors, "philox4x32 10": counter, key, answer.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

# What people printed of torch.randn(..., device="cuda"): seed, call, first index, values.
PRINTED = [
    # AUTOMATIC1111 stable-diffusion-webui, modules/rng_philox.py, docstring
    (0, 0, 0, [-0.9247, -0.4253, -2.6438, 0.1452, -0.1209, -0.5797, -0.6229, -0.3284, -1.0745, -0.3631, -1.6711]),
    # pytorch/pytorch#79496
    (10, 0, 0, [-0.1029, 1.6810, -0.2708]),
    # pytorch/pytorch#158398, shape (1, 64, 2048): beginning and end of the first row, the second row
    (42, 0, 0, [0.1940, 2.1614, -0.1721]),
    (42, 0, 2045, [1.4540, -2.7733, -0.8932, -0.4574, 0.8063, 0.1580]),
    # a public reproducer of a fault in torch._foreach_sub: six calls one after the other
    (42, 1, 0, [0.1391, -0.1082, -0.7174, 0.7566]),
    (42, 2, 0, [-0.5187, 1.2268, 0.6255, -0.9117]),
    (42, 5, 0, [1.4640, -0.3238, 0.7740, 1.5892]),
]


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4), st.sampled_from(RNGS), st.data())
def test_a_row_depends_on_its_own_seed_alone(seeds: list[int], rng: Rng, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, len(seeds) - 1))
    together, alone = SeededNoise(seeds, SHAPE, rng=rng), SeededNoise([seeds[row]], SHAPE, rng=rng)
    for _ in range(3):  # the whole stream, not only its beginning
        assert torch.equal(together()[row], alone()[0])


def test_stream_equals_diffusers_with_a_list_of_generators() -> None:
    seeds = [7, 8, 2**40]
    noise = SeededNoise(seeds, SHAPE)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _ in range(2):
        want = randn_tensor((3, *SHAPE), generator=generators, device=torch.device("cpu"), dtype=torch.float32)
        assert torch.equal(noise(), want)


@pytest.mark.parametrize("rng", RNGS)
def test_shape_type_and_spread(rng: Rng) -> None:
    noise = SeededNoise(range(8), (4, 32, 32), rng=rng)()
    assert noise.shape == (8, 4, 32, 32)
    assert noise.dtype == torch.float32
    # 32768 draws: the mean is within 0.0055 and the variance within 0.0078 of (0, 1) at one sigma; four sigmas
    assert abs(noise.mean()) < 0.022
    assert abs(noise.var() - 1) < 0.032


@pytest.mark.parametrize("rng", RNGS)
def test_draws_follow_one_another(rng: Rng) -> None:
    noise = SeededNoise([1], SHAPE, rng=rng)
    assert not torch.equal(noise(), noise())


@pytest.mark.parametrize("rng", RNGS)
def test_the_global_generator_is_left_alone(rng: Rng) -> None:
    before = torch.get_rng_state()
    SeededNoise([1, 2], SHAPE, rng=rng)()
    BrownianNoise([1, 2], SHAPE, "cpu", 0.1, 2.0, rng=rng)(1.0, 0.5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, answer: str) -> None:
    def words(text: str) -> list[int]:
        return [int(word, 16) for word in text.split()]

    low, high = words(key)
    got = philox4x32(np.array(words(counter), dtype=np.uint64)[:, None], (low, high))
    assert got[:, 0].tolist() == words(answer)


@pytest.mark.parametrize(("seed", "call", "first", "values"), PRINTED)
def test_philox_is_what_cuda_draws(seed: int, call: int, first: int, values: list[float]) -> None:
    noise = Philox(seed)
    drawn = [noise((64, 2048)) for _ in range(call + 1)][call].flatten()
    torch.testing.assert_close(drawn[first : first + len(values)], torch.tensor(values), rtol=0, atol=5.1e-5)


def test_philox_is_what_automatic1111_draws() -> None:
    """It computes Box-Muller in float64; where the first word is nearly 2³² float32 is off by a few 1e-5."""
    counter = np.zeros((4, 50_000), dtype=np.uint64)
    counter[0], counter[2] = 3, np.arange(50_000)
    x, y, *_ = philox4x32(counter, (7, 1))
    u, v = (x + 0.5) / 2**32, (y + 0.5) / 2**32
    want = np.sqrt(-2 * np.log(u)) * np.sin(2 * np.pi * v)
    noise = Philox(7 + 2**32)
    got = [noise((50_000,)) for _ in range(4)][3].numpy()
    difference = np.abs(got - want)
    assert difference.max() < 3e-4
    assert np.quantile(difference, 0.999) < 2e-6


@pytest.mark.gpu
def test_philox_is_what_this_gpu_draws() -> None:
    generator, ours = torch.Generator("cuda").manual_seed(123), Philox(123)
    for shape in [(4, 64, 64), (4, 8, 9), (3,)]:
        theirs = torch.randn(shape, generator=generator, device="cuda").cpu()
        torch.testing.assert_close(ours(shape), theirs, rtol=0, atol=1e-5)


def test_noise_on_the_way_from_other_seeds() -> None:
    """AUTOMATIC1111's ENSD: new streams for all but the first noise."""
    plain, delta = SeededNoise([5, 9], SHAPE), SeededNoise([5, 9], SHAPE, eta_noise_delta=31337)
    assert torch.equal(delta(), plain())
    other = SeededNoise([5 + 31337, 9 + 31337], SHAPE)
    for _ in range(2):
        assert torch.equal(delta(), other())


def test_picture_seeds() -> None:
    assert picture_seeds(10, 500, 0.0, 3) == ([10, 11, 12], [500, 501, 502])
    assert picture_seeds(10, 500, 0.1, 3) == ([10, 10, 10], [500, 501, 502])
    assert picture_seeds(10, 0, 0.0, 0) == ([], [])


def varied(strength: float, seeds: tuple[int, int] = (3, 8)) -> Tensor:
    noise = SeededNoise([seeds[0]], SHAPE, variation_seeds=[seeds[1]], variation_strength=strength)
    return noise()[0]


def first_of(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return stream(seed)(shape)


def test_variation_between_two_noises() -> None:
    assert torch.equal(varied(0.0), first_of(3))
    torch.testing.assert_close(varied(1.0), first_of(8), rtol=1e-5, atol=1e-6)
    assert torch.equal(varied(0.4, (3, 3)), first_of(3))  # no angle between them, and no division by it


def test_variation_follows_the_great_circle_of_every_column() -> None:
    a, b = first_of(3).double().numpy(), first_of(8).double().numpy()
    want = np.empty(SHAPE)
    for c in range(SHAPE[0]):
        for column in range(SHAPE[2]):
            p, q = a[c, :, column], b[c, :, column]
            angle = math.acos(float(p @ q) / math.sqrt(float((p @ p) * (q @ q))))
            want[c, :, column] = (math.sin(0.7 * angle) * p + math.sin(0.3 * angle) * q) / math.sin(angle)
    torch.testing.assert_close(varied(0.3).double(), torch.from_numpy(want), rtol=1e-4, atol=1e-5)


def test_variation_keeps_the_spread() -> None:
    """What a straight line between two noises would not: its variance in the middle is a half."""
    mixed = slerp(0.5, stream(1)((4, 64, 64)), stream(2)((4, 64, 64)))
    assert float(mixed.std()) == pytest.approx(1, abs=0.02)


def test_variation_leaves_the_noise_on_the_way() -> None:
    noise, plain = SeededNoise([3], SHAPE, variation_seeds=[8], variation_strength=0.5), SeededNoise([3], SHAPE)
    assert not torch.equal(noise(), plain())
    assert torch.equal(noise(), plain())


@pytest.mark.parametrize(("new", "old"), [(8, 4), (9, 4), (8, 5), (4, 8), (4, 9), (5, 8), (6, 6)])
def test_the_middle_of_another_size(new: int, old: int) -> None:
    """As AUTOMATIC1111's slices go, `(new - old) // 2` rounded down: an odd rest larger stays at the end."""
    onto, noise = torch.zeros(1, new, 3), 1.0 + torch.arange(old).reshape(1, old, 1).expand(1, old, 3)
    got = centred(noise, onto)[0, :, 1].tolist()
    shift = math.floor((new - old) / 2)
    kept = old if shift >= 0 else old + 2 * shift
    want = [0.0] * new
    for i in range(kept):
        want[max(shift, 0) + i] = 1.0 + max(-shift, 0) + i
    assert got == want
    assert not onto.any()  # not changed in place


def test_seed_of_another_size() -> None:
    """The composition of the old size is in the middle, the rest is what the seed draws at the new one."""
    noise = SeededNoise([6], (4, 8, 8), seed_size=(4, 6))
    start, plain = noise()[0], SeededNoise([6], (4, 8, 8))
    assert torch.equal(start[:, 2:6, 1:7], first_of(6, (4, 4, 6)))
    rest = plain()[0]
    assert torch.equal(start[:, :2], rest[:, :2])
    assert torch.equal(start[:, 6:], rest[:, 6:])
    assert torch.equal(noise(), plain())  # and the stream goes on from there


def test_seed_of_another_size_with_variation() -> None:
    noise = SeededNoise([6], (4, 8, 8), seed_size=(4, 6), variation_seeds=[2], variation_strength=0.3)()[0]
    assert torch.equal(noise[:, 2:6, 1:7], slerp(0.3, first_of(6, (4, 4, 6)), first_of(2, (4, 4, 6))))


def paths(seeds: list[int], rng: Rng = "cpu") -> BrownianNoise:
    return BrownianNoise(seeds, SHAPE, "cpu", 0.03, 14.6, rng=rng)


def test_brownian_paths_are_those_of_torchsde() -> None:
    low, high = float(np.float32(0.03)), float(np.float32(14.6))
    tree = torchsde.BrownianTree(low, torch.zeros(SHAPE), high, entropy=5)
    length = torch.tensor(4.0) - torch.tensor(1.0)
    assert torch.equal(paths([5])(4.0, 1.0)[0], -tree(1.0, 4.0) / length.sqrt())


@pytest.mark.parametrize("rng", RNGS)
def test_a_path_does_not_depend_on_its_batch_nor_on_the_questions(rng: Rng) -> None:
    together, alone = paths([1, 2, 3], rng), paths([2], rng)
    together(9.0, 3.0)
    for levels in ((14.6, 7.0), (7.0, 0.03), (2.0, 1.0)):
        assert torch.equal(together(*levels)[1], alone(*levels)[0])


def test_increments_add_up() -> None:
    """Float32 sums of up to 40 intervals."""
    noise = paths([4])
    a, b, c = 8.0, 3.0, 1.5
    whole = noise(a, c) * math.sqrt(a - c)
    torch.testing.assert_close(
        noise(a, b) * math.sqrt(a - b) + noise(b, c) * math.sqrt(b - c), whole, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(noise(c, a), -noise(a, c))


def test_increments_are_standard_normal() -> None:
    noise = BrownianNoise([11], (4, 64, 64), "cpu", 0.03, 14.6)
    levels = [14.6, 5.0, 1.0, 0.03]
    steps = torch.stack([noise(a, b) for a, b in pairwise(levels)]).flatten(1)
    # 16384 pixels: four standard errors of mean and variance, and of the correlation between steps
    assert steps.mean(1).abs().max() < 0.032
    assert (steps.var(1) - 1).abs().max() < 0.045
    assert (torch.corrcoef(steps) - torch.eye(3)).abs().max() < 0.032


def test_ends_and_steps_of_no_length() -> None:
    """Sigmas of float64 round to either side of the ends; torchsde would warn, and warnings are errors here."""
    noise = BrownianNoise([1], SHAPE, "cpu", 0.029167538, 14.614641)
    assert torch.isfinite(noise(14.6146411, 0.0291675)).all()
    assert not noise(3.0, 3.0).any()
    assert not noise(3.0, 3.0 + 1e-12).any()


def test_philox_paths() -> None:
    """A node of the tree is drawn as torch.randn does on a GPU with the node's seed: here the topmost one."""
    drawn = paths([5], "philox")(14.6, 0.03)[0]
    low, high = (float(np.float32(t)) for t in (0.03, 14.6))
    seed = int(np.random.SeedSequence(5, pool_size=24).generate_state(3)[0])
    want = -Philox(seed)(SHAPE) * math.sqrt(high - low) / torch.tensor(high - low).sqrt()
    torch.testing.assert_close(drawn, want, rtol=1e-5, atol=1e-6)


def test_philox_paths_leave_other_threads_alone() -> None:
    want = paths([5])(3.0, 2.0)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda rng: paths([5], rng)(3.0, 2.0), ("philox", "cpu") * 6))
    assert all(torch.equal(found[i], want) for i in range(1, 12, 2))
    assert all(torch.equal(found[i], found[0]) for i in range(0, 12, 2))
    assert not torch.equal(found[0], want)
