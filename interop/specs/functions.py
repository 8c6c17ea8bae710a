"""Layers without weights."""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import jax

from ..formulas import ACTIVATIONS, activation_defaults, dropout, flatten
from .base import Run, Shape, Spec, move_channels, moved_axis, shape_of

__all__ = [
    "Activation",
    "Dropout",
    "Flatten",
    "Function",
]


@dataclass(frozen=True, eq=False, kw_only=True)
class Dropout(Spec):
    """Training: each element is 0 with probability ``rate``, else ``x / (1 - rate)``.

    ``broadcast_dims`` are axes of the batched ``x`` along which one decision is shared.
    ``rng_collection`` names the random stream, in frameworks that have several.
    """

    rate: float
    rng_collection: str
    broadcast_dims: tuple[int, ...] = ()
    keeps_shape = True
    random = True

    def apply(self, run: Run, x: jax.Array) -> Any:
        if not run.train:
            return x
        return dropout(x, run.key(), rate=self.rate, broadcast_dims=self.broadcast_dims)

    @classmethod
    def shaped(cls, rate: float, *, broadcast_dims: tuple[int, ...] = ()) -> Self:
        return cls(rate=rate, broadcast_dims=broadcast_dims, rng_collection="dropout")

    @property
    def space(self) -> int | None:
        return None

    @property
    def is_elementwise(self) -> bool:
        return not self.broadcast_dims


@dataclass(frozen=True, eq=False, kw_only=True)
class Activation(Spec):
    """A weight-less function of :data:`interop.formulas.ACTIVATIONS`, by name.

    ``options`` holds those that differ from the function's defaults. An ``axis`` counts in
    the batched input.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    keeps_shape = True

    @property
    def space(self) -> int | None:
        return None

    @property
    def axis(self) -> int | None:
        """The one axis that the function is not elementwise along, or None."""
        return self.options.get("axis", activation_defaults(self.name).get("axis"))

    @property
    def counts_axes(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.axis is not None

    @property
    def is_elementwise(self) -> bool:
        return self.axis is None

    def moved(self, axes: int | None, to_first: bool) -> Spec:
        if not axes or self.axis is None or self.axis in (0, -axes - 1):
            return self
        axis = self.axis - (axes + 1 if self.axis > 0 else 0)
        moved = {"axis": moved_axis(axis, axes, to_first)}
        plain = moved["axis"] == activation_defaults(self.name)["axis"]
        rest = {name: value for name, value in self.options.items() if name != "axis"}
        return replace(self, options=rest if plain else rest | moved)

    def output_shape(self, shape: Shape | None) -> Shape | None:
        if shape is None or self.name != "glu":
            return shape
        return shape_of(partial(ACTIVATIONS["glu"], **self.options), shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class Flatten(Spec):
    """:func:`interop.formulas.flatten` of the batched input."""

    start_axis: int
    end_axis: int
    in_size: Shape | None

    @property
    def space(self) -> int | None:
        return None

    def example_axes(self, axes: int) -> tuple[int, int]:
        """The first and last merged axis within examples of so many axes."""
        batch = 0 if self.in_size is not None else 1
        start, end = self.start_axis, self.end_axis
        return (
            start - batch if start >= 0 else start + axes,
            end - batch if end >= 0 else end + axes,
        )

    def moved(self, axes: int | None, to_first: bool) -> Spec:
        if self.in_size is None or not axes:
            return self
        return replace(self, in_size=move_channels(self.in_size, to_first))

    def output_shape(self, shape: Shape | None) -> Shape | None:
        if shape is None:
            return None

        def run(x: jax.Array) -> jax.Array:
            return flatten(x, self.start_axis, self.end_axis, self.in_size)

        return shape_of(run, shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class Function(Spec):
    """Any other callable, without weights of its own.

    ``per_example`` says what it expects: one example, or a batch of them.
    """

    fn: Callable[..., Any]
    per_example: bool

    @property
    def space(self) -> int | None:
        return None

    def output_shape(self, shape: Shape | None) -> Shape | None:
        if shape is None:
            return None
        return shape_of(jax.vmap(self.fn) if self.per_example else self.fn, shape)
