"""Recurrent cells: one step each."""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from .. import formulas
from .base import Array, DType, Run, Shape, Spec, mismatches_of

__all__ = [
    "Cell",
    "LSTMCell",
]


class Cell(Spec):
    """A recurrent cell. Its state is a tuple of arrays, the first of which is its output."""

    carry: ClassVar[tuple[str, ...]] = ("h",)
    """The names of the arrays of the state."""
    feature_axes: ClassVar[int] = 1
    """The number of axes of an input that are no batch axes."""

    @property
    def in_shape(self) -> Shape:
        """The shape of one input without batch axes."""
        raise NotImplementedError

    def initial_carry(self, input_shape: Shape) -> tuple[Array, ...]:
        """The state before the first step, for inputs of shape ``(*batch, *in_shape)``."""
        raise NotImplementedError

    def step(self, run: Run, x: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        """One step: the new state."""
        raise NotImplementedError

    @property
    def is_composable(self) -> bool:
        return type(self).step is not Cell.step

    @property
    def holds_state(self) -> bool:
        return True


@dataclass(frozen=True, eq=False, kw_only=True)
class LSTMCell(Cell):
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

    carry = ("h", "c")
    trained = ("weight_x", "weight_h", "bias")

    @property
    def hidden(self) -> int:
        return self.weight_h.shape[0]

    @property
    def in_shape(self) -> Shape:
        return (self.weight_x.shape[0],)

    def initial_carry(self, input_shape: Shape) -> tuple[Array, ...]:
        zeros = jnp.zeros((*input_shape[:-1], self.hidden), self.weight_h.dtype)
        return zeros, zeros

    def step(self, run: Run, x: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        h, c = state
        return formulas.lstm_step(
            x,
            h,
            c,
            self.weight_x,
            self.weight_h,
            self.bias,
            activation=self.activation or jnp.tanh,
            gate=self.gate or jax.nn.sigmoid,
            dtype=self.dtype,
        )

    @classmethod
    def shaped(
        cls,
        in_features: int,
        hidden_features: int,
        *,
        param_dtype: DType = jnp.float32,
        **options: Any,
    ) -> Self:
        gates = 4 * hidden_features
        return cls(
            weight_x=jax.ShapeDtypeStruct((in_features, gates), param_dtype),
            weight_h=jax.ShapeDtypeStruct((hidden_features, gates), param_dtype),
            bias=jax.ShapeDtypeStruct((gates,), param_dtype),
            **options,
        )

    def mismatches(self) -> list[str]:
        gates = 4 * self.hidden
        return mismatches_of(
            weight_x=(self.weight_x, (self.weight_x.shape[0], gates)),
            weight_h=(self.weight_h, (self.hidden, gates)),
            bias=(self.bias, (gates,)),
        )
