"""k-diffusion's `sampling` module, the oracle of the samplers, without the rest of that package.

Its `__init__` imports training code (wandb, clip, clean-fid, kornia...), and two helpers of `sampling` import
torchvision and torchdiffeq, which no sampler needs.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest


def load() -> Any:
    """The module; skips the tests of the file where the distribution `k_diffusion` is not installed."""
    spec = find_spec("k_diffusion")
    if spec is None:
        pytest.skip("k-diffusion is not installed (pip install --no-deps k-diffusion)", allow_module_level=True)
    package = ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations or [])
    standing_in = {"k_diffusion": package, **_stubs()}
    sys.modules.update(standing_in)
    try:
        return import_module("k_diffusion.sampling")
    finally:  # other tests must not take the stand-ins for the real thing
        for name in [name for name in sys.modules if name in standing_in or name.startswith("k_diffusion.")]:
            del sys.modules[name]


def _stubs() -> dict[str, ModuleType]:
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchdiffeq")
    modules = {name: ModuleType(name) for name in names if name not in sys.modules}
    for name, attribute in (("torchvision.transforms", "functional"), ("torchdiffeq", "odeint")):
        if name in modules:
            setattr(modules[name], attribute, modules.get(f"{name}.{attribute}"))
    return modules
