"""Forms of a network: it with other layers in some places. It stays as it is; what is not changed is shared."""

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def shared(module: M) -> M:
    """A copy of a module, but of nothing in it: parameters and children are the same."""
    copy = module.__new__(type(module))
    own: dict[str, Any] = module.__dict__
    copy.__dict__ = {name: value.copy() if isinstance(value, dict | set) else value for name, value in own.items()}
    return copy


def with_layers(network: M, layers: Mapping[str, nn.Module]) -> M:
    """The network with others in the places of some layers; modules on the way there are copied, the rest is shared.

    Args:
        layers: by path; of two that lie inside each other the outer one first, a copy into which the inner one goes.
    """
    if not layers:
        return network
    root = shared(network)
    copies: dict[str, nn.Module] = {"": root}
    for path, layer in layers.items():
        *names, last = path.split(".")
        parent, at = copies[""], ""
        for name in names:
            at = f"{at}.{name}".removeprefix(".")
            if at not in copies:
                copies[at] = parent._modules[name] = shared(parent.get_submodule(name))
            parent = copies[at]
        parent._modules[last] = copies[path] = layer
    return root
