"""Use a layer of one framework live inside another.

The shim is a native module of its host framework. The guest, the wrapped layer, owns its
arrays; the shim's containers are views of them. Importing this package imports no framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .api import explain, wrap
from .materialization import materialize
from .report import ArrayRow, LinkReport
from .saving import load_traced, save_traced

if TYPE_CHECKING:
    from .frameworks.brainstate import FromEquinox, FromLinen, FromNNX
    from .frameworks.equinox import ToEquinox
    from .frameworks.linen import ToLinen
    from .frameworks.nnx import ToNNX

__all__ = [
    "ArrayRow",
    "FromEquinox",
    "FromLinen",
    "FromNNX",
    "LinkReport",
    "ToEquinox",
    "ToLinen",
    "ToNNX",
    "explain",
    "load_traced",
    "materialize",
    "save_traced",
    "wrap",
]

_FILES = {
    "FromEquinox": "brainstate",
    "FromLinen": "brainstate",
    "FromNNX": "brainstate",
    "ToEquinox": "equinox",
    "ToLinen": "linen",
    "ToNNX": "nnx",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from interop.registry import registry

    registry.adapter(_FILES[name])  # says which package is missing or broken
    return getattr(import_module(f".frameworks.{_FILES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
