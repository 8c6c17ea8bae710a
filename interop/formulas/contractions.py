"""Layers that contract any axes of their input with a weight of any rank."""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .layers import promote

__all__ = ["einsum", "einsum_bias_shape", "einsum_letters", "linear_general"]

Array = Any
DType = Any


def linear_general(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    axes: tuple[int, ...] = (-1,),
    batch_axes: int = 0,
    dtype: DType | None = None,
    precision: Any = None,
    preferred_element_type: DType | None = None,
) -> jax.Array:
    """The product of ``x`` and ``weight``, summed over ``axes`` of ``x``.

    Args:
        x: any array. Its first ``batch_axes`` axes have weights of their own.
        weight: ``(*batch, *in, *out)``; ``in`` are the sizes of ``axes`` in ascending order.
        bias: ``(*batch, *out)``, or None.
        axes: the axes of ``x`` to sum over.
        batch_axes: how many leading axes ``x`` and ``weight`` share.
        dtype: what the operands are cast to.
        precision, preferred_element_type: as in ``jax.lax.dot_general``.

    Returns:
        An array of shape ``(*batch, *rest, *out)``, ``rest`` being the other axes of ``x``.
    """
    summed = tuple(sorted(axis % x.ndim for axis in axes))
    batch = tuple(range(batch_axes))
    x, weight, bias = promote(x, weight, bias, dtype=dtype)
    y = jax.lax.dot_general(
        x,
        weight,
        ((summed, tuple(range(batch_axes, batch_axes + len(summed)))), (batch, batch)),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    if bias is None:
        return y
    rest = x.ndim - batch_axes - len(summed)
    return y + bias.reshape(*bias.shape[:batch_axes], *[1] * rest, *bias.shape[batch_axes:])


def einsum(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    equation: str,
    dtype: DType | None = None,
    precision: Any = None,
    preferred_element_type: DType | None = None,
) -> jax.Array:
    """``jnp.einsum(equation, x, weight) + bias``.

    Args:
        x: the first operand.
        weight: the second operand.
        bias: an array, or None. Its axes are those of the weight that the result has, in the
            order of the result.
        equation: two operands and an explicit result, such as ``"...i,ij->...j"``.
        dtype: what the operands are cast to.
        precision, preferred_element_type: as in ``jnp.einsum``.
    """
    x, weight, bias = promote(x, weight, bias, dtype=dtype)
    y = jnp.einsum(
        equation, x, weight, precision=precision, preferred_element_type=preferred_element_type
    )
    if bias is None:
        return y
    _, of_weight, of_result = einsum_letters(equation, x.ndim, weight.ndim)
    sizes = dict(zip(of_weight, weight.shape, strict=True))
    return y + bias.reshape([sizes.get(letter, 1) for letter in of_result])


def einsum_letters(equation: str, *ndims: int) -> tuple[str, str, str]:
    """The letters of both operands and the result, with letters for each ellipsis."""
    operands, result = equation.replace(" ", "").split("->")
    parts = operands.split(",")
    free = [c for c in map(chr, range(0x4E00, 0x4E00 + max(ndims))) if c not in equation]
    longest = 0
    for i, (part, ndim) in enumerate(zip(parts, ndims, strict=True)):
        if "..." in part:
            missing = ndim - len(part.replace("...", ""))
            longest = max(longest, missing)
            parts[i] = part.replace("...", "".join(free[len(free) - missing :]))
    result = result.replace("...", "".join(free[len(free) - longest :]))
    return parts[0], parts[1], result


def einsum_bias_shape(equation: str, weight_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of those axes of the weight that the result has, in its order."""
    x, weight = equation.replace(" ", "").split("->")[0].split(",")
    hidden = len(weight_shape) - len(weight.replace("...", ""))
    ndim = len(x.replace("...", "")) + (hidden if "..." in x else 0)
    _, of_weight, of_result = einsum_letters(equation, ndim, len(weight_shape))
    sizes = dict(zip(of_weight, weight_shape, strict=True))
    return tuple(sizes[letter] for letter in of_result if letter in sizes)
