"""What the network is asked, and classifier-free guidance."""

import math
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reverie.diffusion.parameterisation import PARAMETERISATIONS, Flow
from reverie.errors import RequestError
from reverie.sampling.guidance import (
    Answers,
    Clock,
    Conditions,
    Guidance,
    Weight,
    alike,
    cat,
    guided,
    tapped,
)
from reverie.sampling.guides import build
from reverie.types import Cond, Predict, Taps
from tests.sampling import network

SIGMAS = (8.0, 4.0, 2.0, 1.0, 0.0)
POSITIVE, NEGATIVE, EMPTY, OTHER = (Cond(torch.full((2, 3, 4), value)) for value in (2.0, -1.0, 0.25, 0.5))
X = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


def predict(x: Tensor, sigma: float, cond: Cond) -> Tensor:
    """A network without weights whose answer depends on all three."""
    return 0.5 * x + sigma * cond.context.mean(dim=(1, 2))[:, None]


class Watched:
    """A network that remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[float]] = []

    def __call__(self, x: Tensor, sigma: float, cond: Cond) -> Tensor:
        self.asked.append(cond.context[:: len(X), 0, 0].tolist())
        return predict(x, sigma, cond)


def denoised(
    network: Predict, scale: float | Weight, conditions: Conditions | None = None, sigma: float = 2.0, x: Tensor = X
) -> Tensor:
    weight = scale if isinstance(scale, Weight) else Weight(scale)
    given = conditions or Conditions(((1.0, POSITIVE),), ((1.0, NEGATIVE),))
    guidance = Guidance(weight=weight)
    return guided(network, lambda index: given, guidance, Clock(SIGMAS), PARAMETERISATIONS["eps"])(x, sigma)


# The clock


def test_clock_of_a_plan() -> None:
    clock = Clock.of(torch.tensor(SIGMAS))
    assert [clock.index(s) for s in SIGMAS[:-1]] == [0, 1, 2, 3]
    assert [clock.progress(s) for s in SIGMAS[:-1]] == [0, 0.25, 0.5, 0.75]
    assert [clock.following(s) for s in SIGMAS[:-1]] == [4, 2, 1, 0]


@pytest.mark.parametrize(("sigma", "index"), [(9.0, 0), (5.0, 0), (3.999, 1), (1.5, 2), (0.4, 3), (0.0, 3)])
def test_levels_between_steps_belong_to_the_earlier_one(sigma: float, index: int) -> None:
    assert Clock(SIGMAS).index(sigma) == index


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=40, unique=True), st.floats(-3e-7, 3e-7))
def test_rounding_does_not_change_the_step(levels: list[float], error: float) -> None:
    falling = sorted(levels, reverse=True)
    apart = [a for a, b in zip(falling, [*falling[1:], 0.0], strict=True) if b < a * (1 - 1e-4)]
    clock = Clock((*apart, 0.0))
    assert [clock.index(sigma * (1 + error)) for sigma in apart] == list(range(len(apart)))


# The scale


@pytest.mark.parametrize(("start", "end", "steps"), [(0, 1, [0, 1, 2, 3]), (0.25, 0.75, [1, 2]), (0.3, 1, [2, 3]),
                                                      (0, 0.1, [0]), (0, 0, []), (1, 1, [])])  # fmt: skip
def test_guidance_has_an_interval_of_steps(start: float, end: float, steps: list[int]) -> None:
    weight, clock = Weight(7.0, start=start, end=end), Clock(SIGMAS)
    assert [i for i, sigma in enumerate(SIGMAS[:-1]) if weight.at(clock, sigma) != 1] == steps


def test_guidance_has_an_interval_of_noise_levels() -> None:
    weight, clock = Weight(7.0, sigma_low=1.0, sigma_high=4.0), Clock(SIGMAS)
    assert [weight.at(clock, sigma) for sigma in SIGMAS[:-1]] == [1, 7, 7, 1]


def test_guidance_has_a_curve() -> None:
    clock = Clock(SIGMAS)
    assert [Weight(7.0, "1,7,3,3").at(clock, s) for s in SIGMAS[:-1]] == [1, 7, 3, 3]
    assert [Weight(7.0, "linear_down").at(clock, s) for s in SIGMAS[:-1]] == pytest.approx([7, 5, 3, 1])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"start": 0.8, "end": 0.2}, "starts at 0.8 and ends before, at 0.2"),
        ({"sigma_low": 5.0, "sigma_high": 1.0}, "sigma interval"),
        ({"curve": "lineer"}, "'lineer'"),
    ],
)
def test_a_weight_that_cannot_be_is_refused(settings: dict[str, float], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        replace(Weight(7.0), **settings)  # type: ignore[arg-type]


# Classifier-free guidance


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 7.5])
def test_formula(scale: float) -> None:
    positive, negative = predict(X, 2.0, POSITIVE), predict(X, 2.0, NEGATIVE)
    # float32, sums of numbers near 10
    torch.testing.assert_close(denoised(predict, scale), negative + scale * (positive - negative), rtol=1e-6, atol=1e-6)


def test_one_batch_gives_the_bits_it_always_gave() -> None:
    """Negative first, then positive, in one batch: pictures drawn before guides existed stay the same."""
    given, x = network.simple(), 3 * network.noise()
    positive, negative = given.positive[0][1], given.negative[0][1]
    both = Cond(torch.cat([negative.context, positive.context]), channels=torch.cat([negative.channels] * 2))  # type: ignore[list-item]
    without, with_prompt = network.predict()(torch.cat([x, x]), 3.0, both).chunk(2)
    got = network.steer(weight=Weight(7.5), given=given)(x, 3.0)
    assert torch.equal(got, without + 7.5 * (with_prompt - without))


def test_scale_0_is_the_negative_condition() -> None:
    assert torch.equal(denoised(predict, 0.0), predict(X, 2.0, NEGATIVE))


@pytest.mark.parametrize("scale", [1.0, Weight(7.0, start=0.75), Weight(7.0, sigma_high=1.5)])
def test_without_guidance_only_the_positive_is_asked(scale: float | Weight) -> None:
    watched = Watched()
    assert torch.equal(denoised(watched, scale), predict(X, 2.0, POSITIVE))
    assert watched.asked == [[2.0]]


@pytest.mark.parametrize("scale", [0.0, 3.0, 7.5])
def test_equals_guidance_of_the_noise(scale: float) -> None:
    """Guiding x0 and guiding eps are one thing, because `x0 = x - sigma eps` is affine."""
    noise = {id(c): (X - predict(X, 2.0, c)) / 2.0 for c in (POSITIVE, NEGATIVE)}
    want = noise[id(NEGATIVE)] + scale * (noise[id(POSITIVE)] - noise[id(NEGATIVE)])
    # float32: rounding near 1e-6, multiplied by scale and sigma
    torch.testing.assert_close(denoised(predict, scale), X - 2.0 * want, rtol=1e-5, atol=3e-5)


# Several conditions


def test_parts_of_a_prompt_add_up_from_the_negative() -> None:
    given = Conditions(((1.0, POSITIVE), (0.5, OTHER)), ((1.0, NEGATIVE),))
    a, b, n = (predict(X, 2.0, c) for c in (POSITIVE, OTHER, NEGATIVE))
    watched = Watched()
    got = denoised(watched, 4.0, given)
    torch.testing.assert_close(got, n + 4 * ((a - n) + 0.5 * (b - n)), rtol=1e-5, atol=1e-5)
    assert watched.asked == [[-1.0, 2.0, 0.5]]


def test_negative_prompts_add_up_from_the_empty_one() -> None:
    given = Conditions(((1.0, POSITIVE),), ((1.0, NEGATIVE), (0.3, OTHER)), EMPTY)
    p, a, b, e = (predict(X, 2.0, c) for c in (POSITIVE, NEGATIVE, OTHER, EMPTY))
    n = e + (a - e) + 0.3 * (b - e)
    watched = Watched()
    torch.testing.assert_close(denoised(watched, 4.0, given), n + 4 * (p - n), rtol=1e-5, atol=1e-5)
    assert watched.asked == [[0.25, -1.0, 0.5, 2.0]]


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_one_weighted_negative_prompt(weight: float) -> None:
    given = Conditions(((1.0, POSITIVE),), ((weight, NEGATIVE),), EMPTY)
    p, a, e = (predict(X, 2.0, c) for c in (POSITIVE, NEGATIVE, EMPTY))
    n = e + weight * (a - e)
    torch.testing.assert_close(denoised(predict, 4.0, given), n + 4 * (p - n), rtol=1e-5, atol=1e-5)


def test_weights_without_an_empty_prompt_say_what_is_missing() -> None:
    with pytest.raises(RequestError, match="the empty prompt"):
        denoised(predict, 4.0, Conditions(((1.0, POSITIVE),), ((0.5, NEGATIVE),)))


def test_scale_1_of_several_parts_still_needs_the_negative() -> None:
    given = Conditions(((1.0, POSITIVE), (0.5, OTHER)), ((1.0, NEGATIVE),))
    a, b, n = (predict(X, 2.0, c) for c in (POSITIVE, OTHER, NEGATIVE))
    torch.testing.assert_close(denoised(predict, 1.0, given), n + (a - n) + 0.5 * (b - n), rtol=1e-5, atol=1e-5)


def test_conditions_change_with_the_steps() -> None:
    prompts = [POSITIVE, OTHER, EMPTY, NEGATIVE]
    denoise = guided(
        predict,
        lambda index: Conditions(((1.0, prompts[index]),), ()),
        Guidance(weight=Weight(1.0)),
        Clock(SIGMAS),
        PARAMETERISATIONS["eps"],
    )
    for sigma, prompt in zip(SIGMAS[:-1], prompts, strict=True):
        assert torch.equal(denoise(X, sigma), predict(X, sigma, prompt))


# Batches


@pytest.mark.parametrize(
    "other",
    [
        Cond(torch.zeros(2, 6, 4)),
        Cond(torch.zeros(2, 3, 4), taps=Taps()),
        Cond(torch.zeros(2, 3, 4), vector=torch.zeros(2, 7)),
        Cond(torch.zeros(2, 3, 4), channels=torch.zeros(2, 1, 8, 8)),
    ],
    ids=["longer", "tapped", "vector", "channels"],
)
def test_what_does_not_fit_together_is_asked_apart(other: Cond) -> None:
    assert not alike(POSITIVE, other)
    watched = Watched()
    got = denoised(watched, 4.0, Conditions(((1.0, POSITIVE),), ((1.0, other),)))
    p, n = predict(X, 2.0, POSITIVE), predict(X, 2.0, other)
    torch.testing.assert_close(got, n + 4 * (p - n))
    assert watched.asked == [[0.0], [2.0]]


def test_cat_joins_every_field() -> None:
    taps = Taps()
    one, two = (
        Cond(torch.full((2, 3, 4), v), torch.full((2, 5), v), torch.full((2, 1, 2, 2), v), taps) for v in (1.0, 2.0)
    )
    both = cat([one, two])
    for field in ("context", "vector", "channels"):
        assert torch.equal(getattr(both, field), torch.cat([getattr(one, field), getattr(two, field)]))
    assert both.taps is taps
    assert cat([one]) is one


def test_nothing_is_asked_twice_or_too_early() -> None:
    watched = Watched()

    def curious(answers: Answers) -> Tensor:
        assert watched.asked == []
        answers.want("negative", "positive")
        assert watched.asked == []
        total = answers.positive + answers.negative + answers.positive + answers.ask(POSITIVE) + answers.ask(OTHER)
        return total + answers.plain.positive + answers.replaced(positive=X).negative

    given = Conditions(((1.0, POSITIVE),), ((1.0, NEGATIVE),))
    guided(watched, lambda index: given, Guidance(curious), Clock(SIGMAS), Flow())(X, 2.0)
    assert watched.asked == [[-1.0, 2.0], [0.5]]


# What guides are given


def answers_of(scale: float = 4.0, sigma: float = 2.0, parameterisation: str = "eps") -> Answers:
    """The answers that a guide sees."""
    seen: list[Answers] = []

    def keep(answers: Answers) -> Tensor:
        seen.append(answers)
        return answers.x

    given = Conditions(((1.0, POSITIVE), (0.5, OTHER)), ((1.0, NEGATIVE),), EMPTY)
    run = (Guidance(keep, Weight(scale)), Clock(SIGMAS), PARAMETERISATIONS[parameterisation])
    guided(predict, lambda index: given, *run)(X, sigma)
    return seen[0]


def test_answers_know_where_they_are() -> None:
    answers = answers_of(sigma=3.0)
    assert (answers.index, answers.steps, answers.progress, answers.following) == (1, 4, 0.25, 2.0)
    assert (answers.scale, answers.active, answers.sigma) == (4.0, True, 3.0)
    assert answers.within(0.25, 0.5)
    assert not answers.within(0.5, 1)
    assert not answers.within(0, 0.25)


def test_replaced_answers_are_seen_inside_and_plain_ones_stay() -> None:
    answers = answers_of()
    before = answers.positive, answers.negative
    changed = answers.replaced(positive=X + 1)
    assert torch.equal(changed.positive, X + 1)
    assert torch.equal(changed.negative, before[1])
    again = changed.replaced(positive=X + 2, negative=X)
    assert (again.positive - again.negative).allclose(torch.tensor(2.0))
    assert torch.equal(again.plain.positive, before[0])
    assert torch.equal(answers.positive, before[0])


def test_the_parts_of_a_prompt_are_measured_from_the_plain_negative() -> None:
    fresh = answers_of()
    changed = fresh.replaced(positive=X, negative=100 * X)
    torch.testing.assert_close(changed.plain.positive, answers_of().positive)


def test_asking_at_another_point() -> None:
    answers = answers_of()
    assert torch.equal(answers.ask(POSITIVE, X + 1), predict(X + 1, 2.0, POSITIVE))
    assert torch.equal(answers.at(X + 1).negative, predict(X + 1, 2.0, NEGATIVE))
    assert torch.equal(answers.ask(POSITIVE), predict(X, 2.0, POSITIVE))


@pytest.mark.parametrize("name", list(PARAMETERISATIONS))
def test_output_is_what_the_network_said(name: str) -> None:
    """`x0 = c_skip x + c_out F`: noise, v, x0 or velocity and back."""
    sigma = 0.7  # inside every process
    kind = PARAMETERISATIONS[name]
    answers = answers_of(sigma=sigma, parameterisation=name)
    said = torch.randn(2, 5, generator=torch.Generator().manual_seed(3))
    k = kind.at(sigma)
    torch.testing.assert_close(answers.output(k.skip * X + k.out * said), said)
    torch.testing.assert_close(answers.from_output(said), k.skip * X + k.out * said)
    other = PARAMETERISATIONS["v"]
    torch.testing.assert_close(answers.from_output(answers.output(said, other), other), said)


def test_taps_add_to_those_of_the_condition() -> None:
    own, more = Taps(bypass=frozenset({"a"})), Taps(bypass=frozenset({"b"}))
    assert tapped(Cond(POSITIVE.context), more).taps is more
    both = tapped(Cond(POSITIVE.context, taps=own), more).taps
    assert both
    assert both.bypass == {"a", "b"}


def test_every_evaluation_has_the_taps_of_the_guidance() -> None:
    seen: list[Taps | None] = []

    def watching(x: Tensor, sigma: float, cond: Cond) -> Tensor:
        seen.append(cond.taps)
        return predict(x, sigma, cond)

    own = Cond(NEGATIVE.context, taps=Taps(bypass=frozenset({"own"})))
    given = Conditions(((1.0, POSITIVE),), ((1.0, own),))
    guidance = Guidance(weight=Weight(4.0), taps=Taps(bypass=frozenset({"all"})))
    guided(watching, lambda index: given, guidance, Clock(SIGMAS), Flow())(X, 2.0)
    assert [taps.bypass for taps in seen if taps] == [{"own", "all"}, {"all"}]


def test_untapped_evaluations_have_no_taps() -> None:
    def watching(x: Tensor, sigma: float, cond: Cond) -> Tensor:
        assert cond.taps is None
        return predict(x, sigma, cond)

    denoised(watching, 4.0)


# The run


def test_unconditional_is_the_negative_where_it_was_last_asked() -> None:
    watched = Watched()
    given = Conditions(((1.0, POSITIVE),), ((1.0, NEGATIVE),))
    denoise = guided(watched, lambda index: given, Guidance(weight=Weight(4.0)), Clock(SIGMAS), Flow())
    denoise(X, 2.0)
    assert torch.equal(denoise.unconditional(X, 2.0), predict(X, 2.0, NEGATIVE))
    assert len(watched.asked) == 1  # guidance had needed it


def test_unconditional_is_evaluated_where_guidance_did_without() -> None:
    watched = Watched()
    given = Conditions(((1.0, POSITIVE),), ((1.0, NEGATIVE),))
    denoise = guided(watched, lambda index: given, Guidance(weight=Weight(1.0)), Clock(SIGMAS), Flow())
    denoise(X, 2.0)
    assert torch.equal(denoise.unconditional(X, 2.0), predict(X, 2.0, NEGATIVE))
    assert torch.equal(denoise.unconditional(X, 2.0), predict(X, 2.0, NEGATIVE))
    assert torch.equal(denoise.unconditional(X + 1, 1.0), predict(X + 1, 1.0, NEGATIVE))
    assert watched.asked == [[2.0], [-1.0], [-1.0]]


def test_runs_at_once_do_not_meet() -> None:
    """Guides with a memory (momentum) and taps, in threads on one network: as one after another, to the last bit."""
    wanted: list[tuple[tuple[str, dict[str, Any]], ...]] = [
        (("apg", {"momentum": 0.5}),),
        (("pag", {}), ("apg", {"momentum": -0.7})),
        (("freeu", {}), ("sag", {})),
    ]
    want = [network.drawn(network.steer(*guides)) for guides in wanted]
    got: dict[int, Tensor] = {}
    barrier = threading.Barrier(len(wanted))

    def run(which: int) -> None:
        barrier.wait()
        got[which] = network.drawn(network.steer(*wanted[which]))

    threads = [threading.Thread(target=run, args=(which,)) for which in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[i], want[i]) for i in range(len(wanted)))


def test_one_guidance_serves_many_runs() -> None:
    """What guides remember belongs to the run."""
    guidance = build([("apg", {"momentum": 0.9})], network.context(), Weight(4.0))
    runs = [network.drawn(network.run_of(guidance, network.simple())) for _ in range(2)]
    assert torch.equal(*runs)
    assert math.isfinite(runs[0].abs().max())
