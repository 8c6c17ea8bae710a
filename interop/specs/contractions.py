"""Layers that contract any axes of their input with a weight of any rank."""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from .. import formulas
from .base import Array, DType, Run, Shape, Spec, mismatches_of, shape_of
from .linear import Linear

__all__ = ["Einsum", "LinearGeneral"]


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearGeneral(Spec):
    """``y = x @ weight + bias``, summed over ``axes`` of ``x``.

    Shapes:
        x       any, with the sizes of ``axes`` in ascending order being ``in``
        weight  (*batch, *in, *out)
        bias    (*batch, *out) or None
        y       (*batch, *rest, *out), ``rest`` being the other axes of ``x``

    ``axes`` count in the batched input; its first ``batch_axes`` axes have weights of their
    own. ``dtype`` is what the operands are cast to; None means their common dtype.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> shaped = specs.LinearGeneral.shaped((2, 3), 4, axes=(-2, -1))
        >>> spec = shaped.initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.ones((5, 2, 3))).shape
        (5, 4)
    """

    weight: Array
    bias: Array | None
    axes: tuple[int, ...] = (-1,)
    batch_axes: int = 0
    dtype: DType | None = None
    precision: Any = None
    preferred_element_type: DType | None = None

    trained: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def apply(self, run: Run, x: Array) -> Array:
        return formulas.linear_general(
            x,
            self.weight,
            self.bias,
            axes=self.axes,
            batch_axes=self.batch_axes,
            dtype=self.dtype,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )

    @classmethod
    def shaped(
        cls,
        in_features: int | tuple[int, ...],
        out_features: int | tuple[int, ...],
        *,
        batch_shape: tuple[int, ...] = (),
        use_bias: bool = True,
        param_dtype: DType = jnp.float32,
        **options: Any,
    ) -> Self:
        sizes, out = _tuple(in_features), _tuple(out_features)
        bias = jax.ShapeDtypeStruct((*batch_shape, *out), param_dtype)
        return cls(
            weight=jax.ShapeDtypeStruct((*batch_shape, *sizes, *out), param_dtype),
            bias=bias if use_bias else None,
            batch_axes=len(batch_shape),
            **options,
        )

    def initial(self, key: jax.Array) -> Self:
        rows = math.prod(self.batch_shape + self.in_shape)
        flat = Linear.shaped(rows, math.prod(self.out_shape), param_dtype=self.weight.dtype)
        bias = None if self.bias is None else jnp.zeros(self.bias.shape, self.bias.dtype)
        weight = flat.initial(key).weight.reshape(self.weight.shape)
        return replace(self, weight=weight, bias=bias)

    @property
    def batch_shape(self) -> Shape:
        """The sizes of the axes that have weights of their own."""
        return self.weight.shape[: self.batch_axes]

    @property
    def in_shape(self) -> Shape:
        """The sizes of ``axes``, in ascending order."""
        return self.weight.shape[self.batch_axes : self.batch_axes + len(self.axes)]

    @property
    def out_shape(self) -> Shape:
        """The sizes of the last axes of the output."""
        return self.weight.shape[self.batch_axes + len(self.axes) :]

    def as_linear(self) -> Linear | None:
        """The same layer as a :class:`Linear`, if it is one."""
        if self.axes != (-1,) or self.batch_axes or len(self.out_shape) != 1:
            return None
        return Linear(
            weight=self.weight,
            bias=self.bias,
            dtype=self.dtype,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )

    def simplest(self) -> Spec:
        return self.as_linear() or self

    @property
    def holds_state(self) -> bool:
        return True

    def mixes_examples(self, axes: int | None = None) -> bool:
        return self.batch_axes > 0 or 0 in self.axes

    @property
    def in_features(self) -> int | None:
        return self.in_shape[-1] if -1 in self.axes else None

    def output_shape(self, shape: Shape | None) -> Shape | None:
        if shape is None or self.mixes_examples():
            return None
        return shape_of(functools.partial(self.apply, Run()), shape)

    def mismatches(self) -> list[str]:
        bias = (*self.batch_shape, *self.out_shape)
        return mismatches_of(weight=(self.weight, None), bias=(self.bias, bias))


@dataclass(frozen=True, eq=False, kw_only=True)
class Einsum(Spec):
    """``y = einsum(equation, x, weight) + bias``.

    Shapes:
        x, weight  as the two operands of ``equation``, such as ``"...i,ij->...j"``
        bias       those axes of the weight that the result has, in its order; or None

    ``dtype`` is what the operands are cast to; None means their common dtype.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.Einsum.shaped("...i,io->...o", (3, 4)).initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.ones((5, 3))).shape
        (5, 4)
    """

    equation: str
    weight: Array
    bias: Array | None
    dtype: DType | None = None
    precision: Any = None
    preferred_element_type: DType | None = None

    trained: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def apply(self, run: Run, x: Array) -> Array:
        return formulas.einsum(
            x,
            self.weight,
            self.bias,
            equation=self.equation,
            dtype=self.dtype,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )

    @classmethod
    def shaped(
        cls,
        equation: str,
        weight_shape: tuple[int, ...],
        *,
        use_bias: bool = True,
        param_dtype: DType = jnp.float32,
        **options: Any,
    ) -> Self:
        bias_shape = formulas.einsum_bias_shape(equation, weight_shape)
        bias = jax.ShapeDtypeStruct(bias_shape, param_dtype) if use_bias else None
        weight = jax.ShapeDtypeStruct(tuple(weight_shape), param_dtype)
        return cls(equation=equation, weight=weight, bias=bias, **options)

    @property
    def holds_state(self) -> bool:
        return True

    @property
    def scales(self) -> bool:
        """Whether it multiplies the last axes of ``x`` with the weight, element by element."""
        operands, result = self.equation.replace(" ", "").split("->")
        x, weight = operands.split(",")
        letters = x.replace("...", "")
        is_plain = x == result and len(set(letters)) == len(letters)
        return is_plain and letters.endswith(weight) and x.endswith(weight) and weight != ""

    def mixes_examples(self, axes: int | None = None) -> bool:
        operands, result = self.equation.replace(" ", "").split("->")
        x, weight = operands.split(",")
        batch = "..." if x.startswith("...") else x[:1]
        return not batch or not result.startswith(batch) or batch in weight

    def output_shape(self, shape: Shape | None) -> Shape | None:
        if shape is None or self.mixes_examples():
            return None
        return shape_of(functools.partial(self.apply, Run()), shape)

    def mismatches(self) -> list[str]:
        bias = formulas.einsum_bias_shape(self.equation, self.weight.shape)
        return mismatches_of(weight=(self.weight, None), bias=(self.bias, bias))


def _tuple(sizes: int | tuple[int, ...]) -> Shape:
    return (sizes,) if isinstance(sizes, int) else tuple(sizes)
