"""BrainState layers for what ``brainstate.nn`` lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import brainstate
import jax

__all__ = ["Lambda"]


class Lambda(brainstate.nn.ElementWiseBlock):
    """A plain function as a module, where ``brainstate.nn.Sequential`` needs a module.

    Args:
        fn: a function of one array, without weights of its own.

    Example:
        >>> import jax.numpy as jnp
        >>> from interop.composites.brainstate import Lambda
        >>> Lambda(jnp.sin)(jnp.zeros(2)).tolist()
        [0.0, 0.0]
    """

    def __init__(self, fn: Callable[[Any], Any]):
        super().__init__()
        self.fn = fn

    def update(self, x: jax.Array) -> Any:
        """Return ``fn(x)``."""
        return self.fn(x)
