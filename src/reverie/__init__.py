"""Reverie: Stable Diffusion as one small, typed, tested Python system.

    import reverie
    reverie.load().generate("a red apple", seed=7).images[0].save("apple.png")

Importing this module does not import torch; the public names are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from reverie.engine.bundle import Model as Model
    from reverie.engine.bundle import load as load
    from reverie.engine.generate import Result as Result
    from reverie.engine.request import Request as Request
    from reverie.errors import ReverieError as ReverieError

_HOMES = {
    "load": "reverie.engine.bundle",
    "Model": "reverie.engine.bundle",
    "Result": "reverie.engine.generate",
    "Request": "reverie.engine.request",
    "ReverieError": "reverie.errors",
}

__all__ = ["Model", "Request", "Result", "ReverieError", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'reverie' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
