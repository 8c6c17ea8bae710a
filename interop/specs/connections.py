"""Connections between groups of neurons."""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from .. import formulas
from .base import Array, DType, Run, Shape, Spec, mismatches_of, shape_of
from .linear import Linear

__all__ = ["AllToAll", "FixedNumConn", "SparseLinear"]


@dataclass(frozen=True, eq=False, kw_only=True)
class AllToAll(Spec):
    """``y = x @ weight + bias``, or the same with one weight for all connections.

    Shapes, with ``in, out = sizes``:
        x       (*batch, in)
        weight  (in, out), or () for all of them
        bias    (out,) or None
        y       (*batch, out); or (*batch, 1) where all its elements would be the same, and ()
                for an ``x`` of one axis

    Options: ``include_self`` tells whether there are connections from each neuron to that of
    the same number. ``leading_shape`` is as in ``Linear``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.AllToAll.shaped(3, 4).initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.ones((5, 3))).shape
        (5, 4)
    """

    weight: Array
    bias: Array | None
    sizes: tuple[int, int]
    include_self: bool = True
    leading_shape: Shape = ()

    trained: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def apply(self, run: Run, x: Array) -> Array:
        return formulas.all_to_all(
            x, self.weight, self.bias, out=self.sizes[1], include_self=self.include_self
        )

    @classmethod
    def shaped(
        cls,
        in_features: int,
        out_features: int,
        *,
        one_weight: bool = False,
        use_bias: bool = False,
        param_dtype: DType = jnp.float32,
        **options: Any,
    ) -> Self:
        shape = () if one_weight else (in_features, out_features)
        options["sizes"] = in_features, out_features
        return cls(
            weight=jax.ShapeDtypeStruct(shape, param_dtype),
            bias=jax.ShapeDtypeStruct((out_features,), param_dtype) if use_bias else None,
            **options,
        )

    def canonical(self) -> Spec:
        if self.weight.ndim == 0 or not self.include_self:
            return self
        return Linear(weight=self.weight, bias=self.bias, leading_shape=self.leading_shape)

    @property
    def holds_state(self) -> bool:
        return True

    @property
    def in_features(self) -> int:
        return self.sizes[0]

    def output_shape(self, shape: Shape | None) -> Shape | None:
        example = shape or (*self.leading_shape, self.sizes[0])
        return shape_of(functools.partial(self.apply, Run()), example)

    def mismatches(self) -> list[str]:
        shape = () if self.weight.ndim == 0 else self.sizes
        bias = (self.sizes[1],)
        return mismatches_of(weight=(self.weight, shape), bias=(self.bias, bias))


@dataclass(frozen=True, eq=False, kw_only=True)
class SparseLinear(Spec):
    """``y = x @ weight + bias``, for a matrix of few elements.

    Shapes, with ``in, out = sizes`` and ``n`` elements, in an array of any shape:
        x        (*batch, in)
        weight   (n,), or a single value for all
        rows     (n,), integers in [0, in)
        columns  (n,), integers in [0, out)
        bias     (out,) or None
        y        (*batch, out)
    Elements at one place add up.

    ``form`` names how a framework stores the matrix: ``"COO"`` in any order, ``"CSR"`` row by
    row, ``"CSC"`` column by column. The elements are in that order.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> rows, columns = jnp.array([0, 1, 2]), jnp.array([3, 0, 1])
        >>> spec = specs.SparseLinear.shaped(3, 4, rows, columns).initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.ones((5, 3))).shape
        (5, 4)
    """

    weight: Array
    rows: Array
    columns: Array
    bias: Array | None
    sizes: tuple[int, int]
    form: str = "COO"

    trained: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def apply(self, run: Run, x: Array) -> Array:
        return formulas.sparse_linear(
            x,
            self.weight,
            self.bias,
            rows=self.rows,
            columns=self.columns,
            out=self.sizes[1],
        )

    @classmethod
    def shaped(
        cls,
        in_features: int,
        out_features: int,
        rows: Array,
        columns: Array,
        *,
        one_weight: bool = False,
        use_bias: bool = False,
        param_dtype: DType = jnp.float32,
        **options: Any,
    ) -> Self:
        shape = () if one_weight else np.shape(rows)
        return cls(
            weight=jax.ShapeDtypeStruct(shape, param_dtype),
            rows=np.asarray(rows),
            columns=np.asarray(columns),
            bias=jax.ShapeDtypeStruct((out_features,), param_dtype) if use_bias else None,
            sizes=(in_features, out_features),
            **options,
        )

    @property
    def holds_state(self) -> bool:
        return True

    @property
    def in_features(self) -> int:
        return self.sizes[0]

    def output_shape(self, shape: Shape | None) -> Shape | None:
        return (*(shape[:-1] if shape else ()), self.sizes[1])

    def mismatches(self) -> list[str]:
        shape = self.rows.shape
        arrays = {"columns": (self.columns, shape), "bias": (self.bias, self.sizes[1:])}
        one = self.weight.size == 1
        return mismatches_of(weight=(self.weight, None if one else shape), **arrays)


@dataclass(frozen=True, eq=False, kw_only=True)
class FixedNumConn(SparseLinear):
    """:class:`SparseLinear` with equally many elements in each row that has some.

    Shapes:
        weight, rows, columns  (in, n), or (n,) where some rows are empty
        others                 as in ``SparseLinear``

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> rows, columns = jnp.array([0, 1, 2]), jnp.array([3, 0, 1])
        >>> spec = specs.FixedNumConn.shaped(3, 4, rows, columns).initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.ones((5, 3))).shape
        (5, 4)
    """
