"""A network as `predict`."""

import torch
from torch import Tensor

from reverie.diffusion.parameterisation import V
from reverie.diffusion.process import Process
from reverie.families.base import preconditioned
from reverie.types import Cond, Taps

PROCESS = Process.named()
X = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))


def test_a_network_is_given_what_the_condition_has_and_nothing_else() -> None:
    seen: list[dict[str, object]] = []

    def network(x: Tensor, timesteps: Tensor, context: Tensor, **named: object) -> Tensor:
        seen.append(named)
        return x[:, :4]

    predict = preconditioned(network, PROCESS, V(), torch.float32)
    context, vector, taps = torch.zeros(2, 5, 6), torch.ones(2, 7), Taps()
    predict(X, 2.0, Cond(context))
    predict(X, 2.0, Cond(context, vector, taps=taps))
    assert seen == [{}, {"vector": vector, "taps": taps}]


def test_channels_stand_beside_the_scaled_sample() -> None:
    """`c_in` is for `x` alone: what is beside it has no noise to be scaled away."""
    channels = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(1))
    got: list[Tensor] = []

    def network(x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        got.append(x)
        return torch.zeros_like(x[:, :4])

    kind = V().at(2.0)
    x0 = preconditioned(network, PROCESS, V(), torch.bfloat16)(X, 2.0, Cond(torch.zeros(2, 5, 6), channels=channels))
    assert torch.equal(got[0], torch.cat([kind.into * X, channels], dim=1).bfloat16())
    assert torch.equal(x0, kind.skip * X)
    assert x0.dtype == torch.float32
