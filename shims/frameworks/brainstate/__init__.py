"""BrainState: its modules as guests, and as a host."""

from typing import Any

from interop.registry import registry

from .guest import BrainStateGuest
from .host import FromEquinox, FromLinen, FromNNX, Wrapped
from .models import Models

whole: Models = Models()

__all__ = ["FromEquinox", "FromLinen", "FromNNX", "guest", "host", "whole"]

guest: type[BrainStateGuest] = BrainStateGuest

_CLASSES = {"equinox": FromEquinox, "linen": FromLinen, "nnx": FromNNX}


def host(module: Any, **options: Any) -> Wrapped:
    """The shim of a module, of the class that is named after its framework."""
    return _CLASSES.get(registry.framework_of(module) or "", Wrapped)(module, **options)
