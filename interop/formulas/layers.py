"""Layers with weights.

Arrays come first, then options by keyword. A compute ``dtype`` is what the operands are cast
to; None means their common dtype.
"""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

__all__ = [
    "all_to_all",
    "alpha_dropout",
    "dropout",
    "fixed_dropout",
    "linear",
    "prelu",
    "promote",
    "sparse_linear",
]

Array = Any
DType = Any


def promote(*arrays: Array | None, dtype: DType | None = None) -> tuple[Any, ...]:
    """The arrays cast to ``dtype``, or to their common dtype; None stays None."""
    given = [array for array in arrays if array is not None]
    dtype = jnp.result_type(*given) if dtype is None else dtype
    return tuple(None if array is None else jnp.asarray(array, dtype) for array in arrays)


def linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    mask: Array | None = None,
    dtype: DType | None = None,
    precision: Any = None,
    preferred_element_type: DType | None = None,
) -> jax.Array:
    """``x @ (weight * mask) + bias``.

    Args:
        x: ``(*batch, in)``.
        weight: ``(in, out)``.
        bias: ``(out,)``, or None.
        mask: ``(in, out)``, or None.
        dtype: what the operands are cast to.
        precision: as in ``jax.lax.dot_general``.
        preferred_element_type: as in ``jax.lax.dot_general``.
    """
    weight = weight if mask is None else weight * mask
    x, weight, bias = promote(x, weight, bias, dtype=dtype)
    y = jax.lax.dot_general(
        x,
        weight,
        (((x.ndim - 1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return y if bias is None else y + bias


def all_to_all(
    x: Array, weight: Array, bias: Array | None = None, *, out: int, include_self: bool = True
) -> jax.Array:
    """``x @ weight + bias``, where all elements of the weight may be one.

    Args:
        x: ``(*batch, in)``.
        weight: ``(in, out)``, or ``()`` for all of them.
        bias: ``(out,)``, or None.
        out: the number of neurons of the output.
        include_self: whether the diagonal of the weight takes part.

    Returns:
        An array ``(*batch, out)``. For one weight, with its diagonal and without a bias, all
        its elements would be the same: it is ``(*batch, 1)``, or ``()`` where ``x`` has one
        axis.
    """
    if weight.ndim == 0:
        y = jnp.sum(x, axis=-1, keepdims=x.ndim > 1)
        if not include_self:
            own = x[..., :out]
            rest = [(0, 0)] * (x.ndim - 1) + [(0, out - own.shape[-1])]
            y = y - jnp.pad(own, rest)
        y = weight * y
    else:
        y = x @ (weight if include_self else jnp.fill_diagonal(weight, 0, inplace=False))
    return y if bias is None else y + bias


def sparse_linear(
    x: Array, weight: Array, bias: Array | None = None, *, rows: Array, columns: Array, out: int
) -> jax.Array:
    """``x @ matrix + bias``, the matrix having a few elements, which add up at one place.

    Args:
        x: ``(*batch, in)``.
        weight: the elements, an array of any shape; or one of them for all.
        bias: ``(out,)``, or None.
        rows, columns: where they are, arrays of that shape.
        out: the number of columns.

    Returns:
        An array ``(*batch, out)``.
    """
    parts = x[..., rows] * weight
    y = jnp.zeros((*x.shape[:-1], out), parts.dtype).at[..., columns].add(parts)
    return y if bias is None else y + bias


def dropout(
    x: Array, key: jax.Array, *, rate: float, broadcast_dims: tuple[int, ...] = ()
) -> jax.Array:
    """Each element is 0 with probability ``rate``, else ``x / (1 - rate)``.

    Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting",
    JMLR 15 (2014), 1929-1958; inverted, so that evaluation is the identity. At rate 1 the
    result and its gradient are 0.

    Args:
        x: any array.
        key: a random key.
        rate: in ``[0, 1]``.
        broadcast_dims: axes of ``x`` along which one decision is shared.
    """
    if rate == 0.0:
        return x
    if rate == 1.0:
        return jnp.zeros_like(x)
    shape = list(x.shape)
    for axis in broadcast_dims:
        shape[axis] = 1
    kept = jax.random.bernoulli(key, 1.0 - rate, shape)
    return jnp.where(jnp.broadcast_to(kept, x.shape), x / (1.0 - rate), jnp.zeros_like(x))


def alpha_dropout(
    x: Array, key: jax.Array, *, rate: float, channel_axis: int | None = None
) -> jax.Array:
    """Dropout that leaves mean and variance of SELU's outputs as they are.

    Klambauer et al., "Self-Normalizing Neural Networks", NeurIPS 2017. Each element is, with
    probability ``rate``, set to the value that SELU goes to; then all are scaled and shifted.
    At rate 1 the result is 0.

    Args:
        x: any array.
        key: a random key.
        rate: in ``[0, 1]``.
        channel_axis: if given, there is one decision for each channel of each example.
    """
    if rate == 0.0:
        return x
    if rate == 1.0:
        return jnp.zeros_like(x)
    alpha = -1.7580993408473766
    scale = ((1 - rate) * (1 + rate * alpha**2)) ** -0.5
    shape = list(x.shape)
    if channel_axis is not None:
        own = {0, channel_axis % x.ndim}
        shape = [n if axis in own else 1 for axis, n in enumerate(shape)]
    kept = jax.random.bernoulli(key, 1.0 - rate, shape)
    kept = jnp.broadcast_to(kept, x.shape)
    return jnp.where(kept, x, jnp.asarray(alpha, x.dtype)) * scale - scale * rate * alpha


def fixed_dropout(x: Array, mask: Array, *, rate: float) -> jax.Array:
    """``x / (1 - rate)`` where ``mask`` is true, else 0, also at rate 1.

    Raises:
        ValueError: ``mask`` has another shape than ``x``.
    """
    if mask.shape != x.shape:
        raise ValueError(f"the mask is for inputs of shape {mask.shape}, got {x.shape}")
    if rate == 1.0:
        return jnp.zeros_like(x)
    return jnp.where(mask, x / (1.0 - rate), jnp.zeros_like(x))


def prelu(
    x: Array, slope: Array, *, dtype: DType | None = None, keeps_dtype: bool = False
) -> jax.Array:
    """``x`` where it is not negative, else ``slope * x``.

    He et al., "Delving Deep into Rectifiers", ICCV 2015.

    Args:
        x: any array.
        slope: of a shape that broadcasts with that of ``x``.
        dtype: what both are cast to.
        keeps_dtype: whether ``slope`` is cast to the dtype of ``x``.
    """
    if keeps_dtype:
        slope = jnp.asarray(slope, x.dtype)
    x, slope = promote(x, slope, dtype=dtype)
    return jnp.where(x >= 0, x, slope * x)
