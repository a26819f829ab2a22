"""Wrappers around `denoise`."""

import pytest
import torch
from torch import Tensor

from reverie.diffusion.process import Process
from reverie.errors import GenerationError
from reverie.sampling.registry import load_all
from reverie.sampling.wrappers import checked, watched


def half(x: Tensor, sigma: float) -> Tensor:
    return x / 2


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_checked_names_the_sigma(poison: float) -> None:
    def broken(x: Tensor, sigma: float) -> Tensor:
        answer = half(x, sigma)
        answer[0, 1] = poison
        return answer

    with pytest.raises(GenerationError, match=r"at sigma 3\.142 is not finite; try precision float32"):
        checked(broken)(torch.ones(2, 2), 3.14159)


def test_checked_passes_finite_answers_unchanged() -> None:
    x = torch.randn(2, 3)
    assert torch.equal(checked(half)(x, 1.0), half(x, 1.0))


def test_checked_stops_a_sampler_at_the_first_bad_answer() -> None:
    calls = []

    def breaks_at_the_third(x: Tensor, sigma: float) -> Tensor:
        calls.append(sigma)
        return x * float("nan") if len(calls) == 3 else x / 2

    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0])
    with pytest.raises(GenerationError, match="sigma 2 "):
        load_all()["euler"].function(
            checked(breaks_at_the_third), torch.ones(1), sigmas, noise=lambda: torch.zeros(1), process=Process.named()
        )
    assert calls == [8.0, 4.0, 2.0]


def test_watched_tells_every_answer_in_order() -> None:
    told: list[tuple[float, Tensor]] = []
    sigmas = torch.tensor([8.0, 4.0, 2.0, 0.0])
    denoise = watched(half, lambda sigma, x0: told.append((sigma, x0)))
    x = torch.ones(1)
    load_all()["euler"].function(denoise, x, sigmas, noise=lambda: x, process=Process.named())
    assert [sigma for sigma, _ in told] == [8.0, 4.0, 2.0]
    assert float(told[0][1]) == 0.5


def test_watched_returns_the_answer_itself() -> None:
    x = torch.randn(3)
    assert torch.equal(watched(half, lambda sigma, x0: None)(x, 1.0), half(x, 1.0))


def test_wrappers_nest_either_way() -> None:
    """A watcher outside `checked` is not told of an answer that stopped it; inside, it is."""

    def broken(x: Tensor, sigma: float) -> Tensor:
        return x * float("nan")

    outside: list[float] = []
    inside: list[float] = []
    with pytest.raises(GenerationError):
        watched(checked(broken), lambda sigma, x0: outside.append(sigma))(torch.ones(1), 1.0)
    with pytest.raises(GenerationError):
        checked(watched(broken, lambda sigma, x0: inside.append(sigma)))(torch.ones(1), 1.0)
    assert (outside, inside) == ([], [1.0])
