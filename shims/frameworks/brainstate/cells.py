"""Recurrent cells of other frameworks, with hidden states as BrainState's own have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import brainstate
import jax
import numpy as np

from interop.errors import ArgumentError, ConversionError

from ...core import at, leaves, nest

__all__ = ["CarryCell"]


class CarryCell(brainstate.nn.RNNCell):
    """A ``brainstate.nn.RNNCell`` whose hidden states are the arrays of another cell's carry.

    Attributes:
        carry: the hidden states, in the structure of the other cell's carry.
    """

    carry: Any = None
    _shim_carried: Any

    def init_state(self, batch_size: Any = None, **kwargs: Any) -> None:
        """Make the hidden states.

        Args:
            batch_size: the batch axis, or axes; None for one example.

        Raises:
            ArgumentError: the cell does not start for such batches, or starts by the size of
                its input, and ``in_size`` is not set.
        """
        start = self._shim_start(_axes(batch_size))
        states = {path: brainstate.HiddenState(leaf) for path, leaf in leaves((), start)}
        self._shim_carried = tuple(states), jax.tree.structure(start)
        self.carry = nest(states) if () not in states else states[()]

    def reset_state(self, batch_size: Any = None, **kwargs: Any) -> None:
        """Give the hidden states the values that ``init_state`` gives them.

        Raises:
            ArgumentError: there are none, or as ``init_state`` does.
        """
        states = self._shim_hidden()
        fresh = jax.tree.leaves(self._shim_start(_axes(batch_size)))
        for state, value in zip(states, fresh, strict=True):
            state.value = value

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """The output; the hidden states move."""
        states, tree = self._shim_hidden(), self._shim_carried[1]
        carry = jax.tree.unflatten(tree, [state.value for state in states])
        after, out = self._shim_step((carry, *args), kwargs)
        if jax.tree.structure(after) != tree:
            raise ConversionError(
                f"{self._shim_name} returned a carry of another structure: "
                f"{jax.tree.structure(after)}, it was {tree}",
                remedy="Return (carry, output), with the carry as it came",
            )
        for state, value in zip(states, jax.tree.leaves(after), strict=True):
            state.value = value
        return out

    # -- private: every name has the prefix _shim_ --

    @property
    def _shim_name(self) -> str:
        """The class of the other cell."""
        raise NotImplementedError

    def _shim_start(self, batch: tuple[int, ...]) -> Any:
        """The carry that it starts from."""
        raise NotImplementedError

    def _shim_step(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """``(carry, output)`` of a call with the carry and the inputs."""
        raise NotImplementedError

    def _shim_hidden(self) -> list[brainstate.State]:
        if self.carry is None:
            raise ArgumentError(
                f"the cell {self._shim_name} has no state yet",
                remedy="Call init_state(batch_size) first",
            )
        return [at(self.carry, path) for path in self._shim_carried[0]]


def _axes(batch_size: Any) -> tuple[int, ...]:
    return () if batch_size is None else tuple(np.atleast_1d(batch_size).tolist())
