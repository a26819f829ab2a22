"""Forms of a network: other layers in some places, everything else shared, the network as it was."""

import torch
from torch import nn

from reverie.nets.forms import shared, with_layers


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3))))


def test_what_is_not_changed_is_shared() -> None:
    made, other = network(), nn.Linear(3, 3)
    before = made(torch.ones(1, 3))
    form = with_layers(made, {"1.0": other})
    assert form.get_submodule("1.0") is other
    assert form[0] is made[0] and form.get_submodule("1.1") is made.get_submodule("1.1")
    assert made.get_submodule("1.0") is not other and torch.equal(made(torch.ones(1, 3)), before)
    assert not torch.equal(form(torch.ones(1, 3)), before)


def test_a_layer_inside_of_another_that_is_changed() -> None:
    made, inner = network(), nn.Linear(3, 3)
    outer = shared(made[1])
    form = with_layers(made, {"1": outer, "1.1.0": inner})
    assert form[1] is outer and form.get_submodule("1.1.0") is inner
    assert made.get_submodule("1.1.0") is not inner
    assert form.get_submodule("1.0") is made.get_submodule("1.0")


def test_nothing_to_change_is_the_network_itself() -> None:
    made = network()
    assert with_layers(made, {}) is made
