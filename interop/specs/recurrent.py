"""Recurrent cells: one step each."""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .base import Array, DType, Spec, mismatches_of

__all__ = [
    "LSTMCell",
]


@dataclass(frozen=True, eq=False, kw_only=True)
class LSTMCell(Spec):
    """One step: ``i, f, g, o = split(x @ weight_x + h @ weight_h + bias)``, then
    ``c <- gate(f) * c + gate(i) * activation(g)`` and ``h <- gate(o) * activation(c)``.

    Shapes:
        x         (*batch, in)
        h, c      (*batch, hidden)
        weight_x  (in, 4 * hidden)
        weight_h  (hidden, 4 * hidden)
        bias      (4 * hidden,)

    ``activation`` is tanh where it is None, ``gate`` the logistic function. ``dtype`` is what
    the operands are cast to; None means their common dtype.
    """

    weight_x: Array
    weight_h: Array
    bias: Array
    activation: Callable[..., Any] | None = None
    gate: Callable[..., Any] | None = None
    dtype: DType | None = None

    @property
    def hidden(self) -> int:
        return self.weight_h.shape[0]

    @property
    def holds_state(self) -> bool:
        return True

    def mismatches(self) -> list[str]:
        gates = 4 * self.hidden
        return mismatches_of(
            weight_x=(self.weight_x, (self.weight_x.shape[0], gates)),
            weight_h=(self.weight_h, (self.hidden, gates)),
            bias=(self.bias, (gates,)),
        )
