"""Every guide: its formula, what it is neutral at, and that any two go together."""

import itertools
import json
import math
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from reverie.diffusion.parameterisation import Eps, V
from reverie.errors import RequestError
from reverie.sampling.guidance import Answers, Clock, Conditions, Guidance, Weight, guided
from reverie.sampling.guides import Context, along, build, listing, load_all
from reverie.sampling.tapping import Layout, blurred, recording
from reverie.types import Cond
from tests.sampling import network

GUIDES = load_all()
Settings = dict[str, Any]
# Settings at which a guide does something within two steps.
ACTIVE: dict[str, Settings] = {
    "apg": {"norm_threshold": 5.0, "eta": 0.3},
    "cfg_pp": {},
    "cfg_zero": {},
    "classifier_free": {"scale": 3.0, "curve": "linear_down", "sigma_high": 100.0},
    "dynamic_thresholding": {"mimic_scale": 2.0, "percentile": 0.9},
    "freeu": {},
    "instruct_pix2pix": {"scale": 2.0},
    "pag": {"layers": "mid+up.1"},
    "perp_neg": {},
    "rescale": {},
    "sag": {},
    "seg": {"blur": 0.7},
    "slg": {"start": 0.0, "end": 1.0, "layers": "mid"},
}
# Settings at which it changes nothing.
NEUTRAL: dict[str, list[Settings]] = {
    "apg": [{"eta": 1.0, "norm_threshold": 0.0, "momentum": 0.0}],
    "cfg_pp": [],  # its scale means another thing
    "cfg_zero": [{"optimised_scale": False}],
    "classifier_free": [{}],
    "dynamic_thresholding": [{"share": 0.0}],
    "freeu": [{"b1": 1.0, "b2": 1.0, "s1": 1.0, "s2": 1.0}],
    "instruct_pix2pix": [{"scale": 1.0}],
    "pag": [{"scale": 0.0}, {"end": 0.0}, {"adaptive_scale": 1.0}],
    "perp_neg": [],  # with scale 0 it is guidance against the empty prompt
    "rescale": [{"share": 0.0}],
    "sag": [{"scale": 0.0}, {"start": 1.0}],
    "seg": [{"scale": 0.0}, {"blur": 0.0}, {"start": 1.0}],
    "slg": [{"scale": 0.0}, {"end": 0.0}],
}
SIGMA = 3.0


def answer(*wanted: tuple[str, Settings], batch: int = 2, given: Conditions | None = None, **run: Any) -> Tensor:
    """One evaluation of the small U-Net with these guides."""
    return network.steer(*wanted, given=given or network.simple(batch), **run)(SIGMA * network.noise(batch), SIGMA)


def said(cond_seed: int, *, picture: bool = True) -> Tensor:
    """x0 under one condition alone."""
    return network.predict()(SIGMA * network.noise(), SIGMA, network.cond(cond_seed, picture=picture))


POSITIVE, NEGATIVE, EMPTY = said(1), said(3), said(5)


def close(got: Tensor, want: Tensor) -> None:
    # float32 of numbers near 10, which are summed in another order
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_tables_here_know_every_guide() -> None:
    assert sorted(ACTIVE) == sorted(NEUTRAL) == sorted(GUIDES)


@pytest.mark.parametrize("name", sorted(ACTIVE))
def test_a_guide_does_something_repeatably(name: str) -> None:
    plain = network.drawn(network.steer())
    got = network.drawn(network.steer((name, ACTIVE[name])))
    assert got.isfinite().all()
    assert (got - plain).abs().max() > 1e-2 * plain.abs().max()
    assert torch.equal(got, network.drawn(network.steer((name, ACTIVE[name]))))


@pytest.mark.parametrize(("name", "settings"), [(n, s) for n, many in NEUTRAL.items() for s in many])
def test_neutral_settings_give_plain_guidance_exactly(name: str, settings: Settings) -> None:
    assert torch.equal(answer((name, settings)), answer())


@pytest.mark.parametrize("name", sorted(set(ACTIVE) - {"freeu", "pag", "sag", "seg", "slg", "cfg_pp"}))
def test_outside_the_interval_only_the_positive_counts(name: str) -> None:
    """What changes classifier-free guidance is silent where that is."""
    weight = Weight(4.0, sigma_low=100.0)
    settings: Settings = {} if name == "classifier_free" else ACTIVE[name]
    # rescale multiplies by a quotient that is 1 but for rounding
    torch.testing.assert_close(answer((name, settings), weight=weight), POSITIVE, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(sorted(ACTIVE), 2)))
def test_any_two_go_together(first: str, second: str) -> None:
    """In both orders finite, and each picture of a batch as if it were alone; with parts and several negatives."""
    wanted = ((first, ACTIVE[first]), (second, ACTIVE[second]))
    for order in (wanted, wanted[::-1]):
        got = answer(*order, given=network.conditions())
        assert got.isfinite().all()
    alone = answer(*order, batch=1, given=network.conditions(1))
    # float32: a batch is summed in another order
    torch.testing.assert_close(got[:1], alone, rtol=1e-5, atol=1e-5 * float(got.abs().max()))


@pytest.mark.parametrize("name", sorted(ACTIVE))
def test_pictures_of_a_batch_do_not_meet(name: str) -> None:
    """Two pictures at once are the two one by one: nothing is measured over the batch."""
    run = network.steer((name, ACTIVE[name]), given=network.conditions())
    x = SIGMA * network.noise()
    both = run(x, SIGMA)
    swapped = network.steer((name, ACTIVE[name]), given=_swapped(network.conditions()))(x.flip(0), SIGMA).flip(0)
    torch.testing.assert_close(both, swapped, rtol=1e-5, atol=1e-5 * float(both.abs().max()))


def _swapped(given: Conditions) -> Conditions:
    def flip(cond: Cond) -> Cond:
        assert cond.channels is not None
        return replace(cond, context=cond.context.flip(0), channels=cond.channels.flip(0))

    assert given.empty
    assert given.image_negative
    positive, negative = (tuple((w, flip(c)) for w, c in parts) for parts in (given.positive, given.negative))
    return Conditions(positive, negative, flip(given.empty), flip(given.image_negative))


# Formulas


def test_classifier_free_settings_replace_those_of_the_request() -> None:
    weight = Weight(4.0, "linear", start=0.2, end=0.9)
    settings: Settings = {"scale": 9.0, "curve": "1,2", "start": 0.1, "end": 0.5, "sigma_low": 0.3, "sigma_high": 5.0}
    got = build([("classifier_free", settings)], network.context(), weight).weight
    assert got == Weight(9.0, "1,2", start=0.1, end=0.5, sigma_low=0.3, sigma_high=5.0)
    assert build([("cfg", {"scale": 2.0})], network.context(), weight).weight == Weight(
        2.0, "linear", start=0.2, end=0.9
    )


def test_classifier_free_counts_wherever_it_stands() -> None:
    """An interval holds for guides inside and outside of it."""
    inside = answer(("classifier_free", {"sigma_low": 100.0}), ("apg", {}))
    assert torch.equal(inside, answer(("apg", {}), ("classifier_free", {"sigma_low": 100.0})))
    assert torch.equal(inside, POSITIVE)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("space", ["output", "v"])
def test_rescale_matches_the_spread(prediction: str, space: str) -> None:
    """With share 1 the standard deviation of what is measured is the prompt's (Lin et al. 2023, equation 15)."""
    seen: list[Answers] = []
    guidance = build([("rescale", {"share": 1.0, "space": space})], network.context(), Weight(6.0))

    def keep(answers: Answers) -> Tensor:
        seen.append(answers)
        return guidance.guide(answers)

    run = network.run_of(Guidance(keep, guidance.weight), network.simple(), prediction=prediction)
    got = run(SIGMA * network.noise(), SIGMA)
    measured = V() if space == "v" else None
    spreads = [seen[0].output(x0, measured).flatten(1).std(1) for x0 in (got, seen[0].positive)]
    torch.testing.assert_close(*spreads, rtol=1e-4, atol=1e-5)


def test_rescale_by_a_share() -> None:
    plain, all_of_it = answer(weight=Weight(6.0)), answer(("rescale", {"share": 1.0}), weight=Weight(6.0))
    close(answer(("rescale", {"share": 0.3}), weight=Weight(6.0)), 0.3 * all_of_it + 0.7 * plain)


def test_perp_neg() -> None:
    """ComfyUI's and the authors' formula, picture by picture."""
    p, n = POSITIVE - EMPTY, NEGATIVE - EMPTY
    inner = [(n[i] * p[i]).sum() / (p[i] ** 2).sum() * p[i] for i in range(2)]
    want = EMPTY + 4 * (p - 0.7 * (n - torch.stack(inner)))
    close(answer(("perp_neg", {"scale": 0.7})), want)


def test_perp_neg_with_weighted_negative_prompts() -> None:
    given = network.conditions()
    prompt = Conditions(given.positive[:1], given.negative, given.empty)
    p = POSITIVE - EMPTY
    off = [said(3) - EMPTY, said(4) - EMPTY]
    apart = [n - along(n, p) for n in off]
    close(answer(("perp_neg", {}), given=prompt), EMPTY + 4 * (p - apart[0] - 0.4 * apart[1]))


def test_perp_neg_of_scale_0_asks_for_no_negative_prompt() -> None:
    close(answer(("perp_neg", {"scale": 0.0})), EMPTY + 4 * (POSITIVE - EMPTY))


def test_along_is_the_parallel_part() -> None:
    parallel = along(NEGATIVE, POSITIVE)
    axes = (1, 2, 3)
    cosine = (parallel * POSITIVE).sum(axes) / parallel.square().sum(axes).sqrt() / POSITIVE.square().sum(axes).sqrt()
    torch.testing.assert_close(cosine.abs(), torch.ones(2), rtol=1e-5, atol=1e-5)
    rest = ((NEGATIVE - parallel) * POSITIVE).sum(axes)
    torch.testing.assert_close(rest / POSITIVE.square().sum(axes), torch.zeros(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("longest", [2.0, 1000.0])
def test_apg_update_is_perpendicular_short_and_remembered(longest: float) -> None:
    settings: Settings = {"eta": 0.0, "norm_threshold": longest, "momentum": -0.5}
    run = network.steer(("apg", settings), weight=Weight(3.0))
    x = SIGMA * network.noise()
    memory = torch.zeros(())
    for _ in range(2):
        got = run(x, SIGMA)
        memory = (POSITIVE - NEGATIVE) - 0.5 * memory
        length = memory.flatten(1).norm(dim=1)[:, None, None, None]
        update = memory * (longest / length).clamp(max=1)
        close(got, POSITIVE + 2 * (update - along(update, POSITIVE)))


def test_cfg_zero_fits_the_negative_prediction() -> None:
    """The least-squares factor: what remains is perpendicular to the negative prediction."""
    x = SIGMA * network.noise()
    v = {name: (x - x0) / SIGMA for name, x0 in (("p", POSITIVE), ("n", NEGATIVE))}
    axes = (1, 2, 3)
    fit = (v["p"] * v["n"]).sum(axes, keepdim=True) / (v["n"] ** 2).sum(axes, keepdim=True)
    close(answer(("cfg_zero", {})), x - SIGMA * (fit * v["n"] + 4 * (v["p"] - fit * v["n"])))


def test_cfg_zero_does_not_move_at_first() -> None:
    run = network.steer(("cfg_zero", {"zero_steps": 1}))
    first, second, _ = network.sigmas(2)
    x = SIGMA * network.noise()
    assert torch.equal(run(x, first), x)
    close(run(x, second), network.steer(("cfg_zero", {}))(x, second))
    assert not torch.allclose(run(x, second), x, atol=second / 10)


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_cfg_pp_is_the_cfg_pp_of_euler(scale: float) -> None:
    """`x' = x0_λ + σ' (x - negative) / σ`, as the samplers with that name have it."""
    levels = network.sigmas(5)
    plain = network.steer(weight=Weight(scale), steps=5)
    want = levels[0] * network.noise()
    for sigma, down in itertools.pairwise(levels):
        x0 = plain(want, sigma)
        want = x0 + down * (want - plain.unconditional(want, sigma)) / sigma
    got = network.drawn(network.steer(("cfg_pp", {"scale": scale}), steps=5), steps=5)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)  # float32 over five steps, with scales up to 20


def test_cfg_pp_keeps_to_the_interval() -> None:
    weight = Weight(4.0, sigma_low=100.0)
    assert torch.equal(answer(("cfg_pp", {}), weight=weight), POSITIVE)


def test_instruct_pix2pix() -> None:
    nothing = said(3, picture=False)
    want = nothing + 4 * (POSITIVE - NEGATIVE) + 2.5 * (NEGATIVE - nothing)
    close(answer(("instruct_pix2pix", {"scale": 2.5})), want)


def test_instruct_pix2pix_asks_three_at_once() -> None:
    """In diffusers' order: prompt and picture, picture, neither."""
    asked: list[tuple[int, ...]] = []
    given = network.simple()
    guidance = build([("instruct_pix2pix", {})], network.context(), Weight(4.0))

    def watching(x: Tensor, sigma: float, cond: Cond) -> Tensor:
        assert cond.channels is not None
        assert given.image_negative
        assert torch.equal(cond.context[:2], given.positive[0][1].context)
        assert torch.equal(cond.context[2:4], given.negative[0][1].context)
        assert cond.channels[4:].abs().max() == 0
        asked.append(tuple(x.shape))
        return network.predict()(x, sigma, cond)

    guided(watching, lambda index: given, guidance, Clock((3.0, 0.0)), Eps())(SIGMA * network.noise(), SIGMA)
    assert asked == [(6, 4, 8, 8)]


@pytest.mark.parametrize(("name", "missing"), [("instruct_pix2pix", "shown a picture"), ("perp_neg", "empty prompt")])
def test_what_a_guide_needs_is_known_before_and_missed_in_words(name: str, missing: str) -> None:
    guidance = build([(name, {})], network.context(), Weight(4.0))
    assert guidance.needs == {"image_negative" if name == "instruct_pix2pix" else "empty"}
    full = network.simple()
    with pytest.raises(RequestError, match=missing):
        answer((name, {}), given=Conditions(full.positive, full.negative))


@pytest.mark.parametrize(
    ("name", "settings"), [("pag", {}), ("slg", {"end": 1.0, "start": 0.0}), ("seg", {"blur": 1.0})]
)
def test_perturbations_add_the_difference(name: str, settings: Settings) -> None:
    """`x0 + scale (positive - perturbed)`: twice the scale is twice the push, with and without guidance."""
    for scale in (4.0, 1.0):
        run: Mapping[str, Any] = {"weight": Weight(scale)}
        plain = answer(**run)
        once, twice = (answer((name, settings | {"scale": s}), **run) - plain for s in (1.5, 3.0))
        assert once.abs().max() > 0.01
        close(twice, 2 * once)
    weight = Weight(1.0)
    close(answer((name, settings | {"scale": 1.0}), weight=weight) - POSITIVE, once / 1.5)


def test_perturbations_count_each_part_of_a_prompt() -> None:
    given = network.conditions()
    parts = [Conditions(((1.0, cond),), given.negative, given.empty) for _, cond in given.positive]
    pushes = [answer(("pag", {}), given=each) - answer(given=each) for each in parts]
    whole = answer(("pag", {}), given=given) - answer(given=given)
    close(whole, pushes[0] + 0.5 * pushes[1])


def test_pag_adapts_to_the_timestep() -> None:
    t = network.PROCESS.timestep(SIGMA)
    adapted = answer(("pag", {"scale": 3.0, "adaptive_scale": 0.002}))
    close(adapted, answer(("pag", {"scale": 3.0 - 0.002 * (1000 - t)})))


def test_sag_blurs_where_attention_is_strong() -> None:
    """Below any attention everything is blurred: Hong et al. 2023 without their mask."""
    process, x = network.PROCESS, SIGMA * network.noise()
    there = x + blurred(NEGATIVE, 1.0, 4) - NEGATIVE
    degraded = network.predict()(there, SIGMA, network.cond(3))
    eps = (x - answer()) / SIGMA + 0.75 * ((x - NEGATIVE) - (there - degraded)) / SIGMA
    close(answer(("sag", {"threshold": 0.0})), x - SIGMA * eps)
    assert process.alpha(SIGMA) == 1
    masked = answer(("sag", {}))
    assert not torch.allclose(masked, answer(("sag", {"threshold": 0.0})), atol=1e-3)
    # Nothing receives more attention than there are tokens: nothing is blurred, nothing is pushed.
    close(answer(("sag", {"threshold": 16.1})), answer())


def test_sag_without_guidance_is_about_the_positive() -> None:
    x = SIGMA * network.noise()
    there = x + blurred(POSITIVE, 1.0, 4) - POSITIVE
    degraded = network.predict()(there, SIGMA, network.cond(1))
    push = ((x - POSITIVE) - (there - degraded)) / SIGMA
    got = answer(("sag", {"threshold": 0.0}), weight=Weight(1.0))
    close(got, POSITIVE - SIGMA * 0.75 * push)


def test_sag_reads_the_map_of_its_own_condition() -> None:
    """In a batch of several conditions the rows of the negative, whatever else is asked with it."""
    around: list[list[tuple[str, Settings]]] = [[], [("perp_neg", {})], [("pag", {})]]
    for wanted in around:
        maps: list[Tensor] = []
        guidance = build([("sag", {}), *wanted], network.context(), Weight(4.0))
        inner = guidance.guide

        def keep(answers: Answers, inner: Any = inner, maps: list[Tensor] = maps) -> Tensor:
            x0: Tensor = inner(answers)
            maps.append(answers.attention("negative", network.context().layout.attention_at("mid")[0]))
            return x0

        run = network.run_of(Guidance(keep, guidance.weight, record=guidance.record), network.simple())
        run(SIGMA * network.noise(), SIGMA)
        assert maps[0].shape == (2, 16, 16)
        torch.testing.assert_close(maps[0], _map_of(3), rtol=1e-4, atol=1e-5)


def _map_of(seed: int) -> Tensor:
    path = network.context().layout.attention_at("mid")[0]
    maps: dict[str, Tensor] = {}
    tapped = replace(network.cond(seed), taps=recording(frozenset({path}), maps))
    network.predict()(SIGMA * network.noise(), SIGMA, tapped)
    return maps[path]


def test_freeu_is_in_every_evaluation() -> None:
    """The unconditional answer too, and what other guides ask, wherever it stands among them."""
    assert torch.equal(answer(("freeu", {}), ("pag", {})), answer(("pag", {}), ("freeu", {})))
    run, plain = network.steer(("freeu", {})), network.steer()
    x = SIGMA * network.noise()
    assert not torch.allclose(run.unconditional(x, SIGMA), plain.unconditional(x, SIGMA), atol=1e-2)


@pytest.mark.parametrize("version", [1, 2])
def test_freeu_taps(version: int) -> None:
    settings: Settings = {"b1": 1.4, "s1": 0.5, "b2": 1.0, "s2": 1.0, "version": version}
    taps = build([("freeu", settings)], network.context(), Weight()).taps
    assert set(taps.skips) == {"up_blocks.0"}
    features, skip = network.draw(2, 6, 4, 4, seed=1), network.draw(2, 5, 4, 4, seed=2)
    got, low = taps.skips["up_blocks.0"](features, skip)
    assert torch.equal(got[:, 3:], features[:, 3:])
    gain = got[:, :3] / features[:, :3]
    mean = features.mean(1)
    if version == 1:
        torch.testing.assert_close(gain, torch.full_like(gain, 1.4))
    else:  # 1 where the features are weakest, b where they are strongest
        place = mean.flatten(1).argmax(1), mean.flatten(1).argmin(1)
        torch.testing.assert_close(gain.flatten(2)[0, :, place[0][0]], torch.full((3,), 1.4))
        torch.testing.assert_close(gain.flatten(2)[1, :, place[1][1]], torch.ones(3))
    # the mean is the lowest frequency, the chequered pattern the highest
    torch.testing.assert_close(low.mean((-2, -1)), 0.5 * skip.mean((-2, -1)))
    chequered = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 2)
    torch.testing.assert_close((low * chequered).sum((-2, -1)), (skip * chequered).sum((-2, -1)))


def test_freeu_of_flat_features_is_finite() -> None:
    taps = build([("freeu", {"version": 2})], network.context(), Weight()).taps
    got, _ = taps.skips["up_blocks.0"](torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2))
    assert torch.equal(got, torch.ones(1, 4, 2, 2))


def test_freeu_by_width_is_comfyui_s_choice() -> None:
    """Features 4 times as wide as at the top are stage 1, twice as wide stage 2, wherever they are."""
    layout = Layout((), (), ("up_blocks.0", "up_blocks.1"), channels=2)
    guidance = build([("freeu", {"b1": 2.0, "b2": 3.0, "s1": 1.0, "s2": 1.0, "stages": "widths"})],
                     Context(layout, network.PROCESS), Weight())  # fmt: skip
    for tap in guidance.taps.skips.values():
        for width, gain in ((8, 2.0), (4, 3.0), (2, 1.0)):
            got, _ = tap(torch.ones(1, width, 2, 2), torch.ones(1, 1, 2, 2))
            assert got[0, 0, 0, 0] == gain
    assert len(guidance.taps.skips) == 2


def _spread(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    centred = x - x.mean((-2, -1), keepdim=True)
    return centred.abs().amax(axes)


@pytest.mark.parametrize("channels", ["apart", "together"])
def test_dynamic_thresholding_has_the_spread_of_the_mimicked_scale(channels: str) -> None:
    axes = (-2, -1) if channels == "apart" else (-3, -2, -1)
    mimic = NEGATIVE + 2 * (POSITIVE - NEGATIVE)
    got = answer(("dynamic_thresholding", {"mimic_scale": 2.0, "channels": channels}), weight=Weight(20.0))
    torch.testing.assert_close(_spread(got, axes), _spread(mimic, axes), rtol=1e-4, atol=1e-4)
    plain = answer(weight=Weight(20.0))
    torch.testing.assert_close(got.mean((-2, -1)), plain.mean((-2, -1)), rtol=1e-4, atol=1e-4)


def test_dynamic_thresholding_clamps_above_the_percentile() -> None:
    """Written out for one channel: the published order of clamping, shrinking and stretching."""
    plain, mimic = answer(weight=Weight(20.0))[0, 0], (NEGATIVE + 2 * (POSITIVE - NEGATIVE))[0, 0]
    got = answer(("dynamic_thresholding", {"mimic_scale": 2.0, "percentile": 0.8}), weight=Weight(20.0))[0, 0]
    away = plain - plain.mean()
    aim = (mimic - mimic.mean()).abs().max()
    limit = max(aim, torch.quantile(away.abs(), 0.8))
    close(got, away.clamp(-limit, limit) / limit * aim + plain.mean())


def test_dynamic_thresholding_measures_standard_deviations() -> None:
    mimic = NEGATIVE + 2 * (POSITIVE - NEGATIVE)
    got = answer(("dynamic_thresholding", {"mimic_scale": 2.0, "measure": "std"}), weight=Weight(20.0))
    torch.testing.assert_close(got.std((-2, -1)), mimic.std((-2, -1)), rtol=1e-4, atol=1e-4)


def test_dynamic_thresholding_towards_zero_only_scales() -> None:
    plain = answer(weight=Weight(20.0))
    got = answer(("dynamic_thresholding", {"mimic_scale": 2.0, "centre": "zero"}), weight=Weight(20.0))
    factor = (got / plain).flatten(2)
    torch.testing.assert_close(factor, factor[..., :1].expand_as(factor), rtol=1e-3, atol=1e-4)
    assert factor.max() < 1


def test_dynamic_thresholding_has_a_curve_of_its_own() -> None:
    run = network.steer(("dynamic_thresholding", {"mimic_scale": 8.0, "mimic_curve": "2,8"}), weight=Weight(20.0))
    fixed = network.steer(("dynamic_thresholding", {"mimic_scale": 2.0}), weight=Weight(20.0))
    x, sigma = 10 * network.noise(), network.sigmas(2)[0]
    assert torch.equal(run(x, sigma), fixed(x, sigma))


# The table


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("pagg", {}, "unknown guide 'pagg'; did you mean 'pag'"),
        ("pag", {"scal": 3}, "guide pag: unknown setting 'scal'; did you mean scale"),
        ("instruct_pix2pix", {"q": 3}, "guide instruct_pix2pix: unknown setting 'q'; settings are scale"),
        ("pag", {"scale": "strong"}, "guide pag: scale is 'strong': input should be a valid number"),
        ("pag", {"scale": -1}, "guide pag: scale is -1: input should be greater than or equal to 0"),
        ("pag", {"scale": math.nan}, "guide pag: scale is nan: input should be a finite number"),
        ("rescale", {"space": "w"}, "guide rescale: space is 'w': input should be 'output' or 'v'"),
        (
            "pag",
            {"layers": "cellar"},
            "guide pag: no self-attention layer 'cellar' in this network; there are down.0.0",
        ),
        ("slg", {"layers": "9"}, "guide slg: no transformer block '9' in this network"),
        ("classifier_free", {"curve": "odd"}, "guide classifier_free: guidance curve 'odd' is neither"),
        (
            "classifier_free",
            {"start": 0.9, "end": 0.1},
            "guide classifier_free: the interval of guidance starts at 0.9",
        ),
        ("dynthresh", {"mimic_curve": "odd"}, "guide dynamic_thresholding: guidance curve 'odd'"),
    ],
)
def test_what_cannot_be_is_one_line(name: str, settings: Settings, message: str) -> None:
    with pytest.raises(RequestError) as error:
        build([(name, settings)], network.context(), Weight())
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_freeu_twice_or_without_up_blocks_is_refused() -> None:
    with pytest.raises(RequestError, match=r"guide freeu: another guide works on up_blocks\.0 already"):
        build([("freeu", {}), ("freeu", {})], network.context(), Weight())
    with pytest.raises(RequestError, match="guide freeu: this network has no two up blocks"):
        build([("freeu", {})], Context(Layout((), (), ()), network.PROCESS), Weight())


def test_settings_may_be_written_as_words() -> None:
    """Flags are text: `pag:scale=2,layers=7`."""
    assert torch.equal(answer(("pag", {"scale": "2"})), answer(("PAG", {"scale": 2})))
    assert GUIDES["slg"].checked({"layers": 7})["layers"] == "7"


@pytest.mark.parametrize("name", sorted(ACTIVE))
def test_every_guide_is_described(name: str) -> None:
    entry = GUIDES[name]
    assert entry.summary.endswith(".")
    assert any(digit in entry.source for digit in "0123456789") or name == "dynamic_thresholding"
    assert entry.checked({}) == {setting.name: setting.default for setting in entry.settings}
    for setting in entry.settings:
        assert setting.description, setting.name
        if setting.low is not None and setting.default is not None:
            assert setting.low <= setting.default
        if setting.choices:
            assert setting.default in setting.choices


def test_the_list_is_plain_data() -> None:
    rows = listing()
    assert [row["name"] for row in rows] == sorted(GUIDES)
    assert json.loads(json.dumps(rows))[0]["settings"][0]["name"] == "eta"


def test_loading_the_table_in_threads_is_safe() -> None:
    tables: list[int] = []
    threads = [threading.Thread(target=lambda: tables.append(len(load_all()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tables == [len(ACTIVE)] * 4
