"""Tables that are indexed with integers."""

# jax.numpy and jax.custom_jvp declare some of their types only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["embed"]

Array = Any
DType = Any


def embed(
    x: Array,
    weight: Array,
    *,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    axis_name: str | None = None,
    dtype: DType | None = None,
) -> jax.Array:
    """``weight[x]``; an index that is too large is that of the last row, without a gradient.

    Args:
        x: integers ``(*batch,)`` in ``[0, number)``.
        weight: ``(number, *features)``.
        padding_idx: a row that is not trained, nor shortened.
        max_norm: rows of a larger norm are shortened to it, while gradients are those of the
            rows as they are.
        norm_type: the order of that norm.
        scale_grad_by_freq: whether the gradient of a row is divided by its number in ``x``.
        axis_name: a mapped axis to count over as well.
        dtype: what the result is cast to.

    Returns:
        An array ``(*batch, *features)``.
    """
    rows = _rows(weight, x, padding_idx, scale_grad_by_freq, axis_name)
    if max_norm is not None:
        short = _shortened(rows, x.ndim, max_norm, norm_type)
        if padding_idx is not None:
            short = jnp.where(_per_row(x, rows) == padding_idx, rows, short)
        rows = rows + jax.lax.stop_gradient(short - rows)
    return rows if dtype is None else rows.astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _rows(
    weight: Array, x: Array, padding_idx: int | None, by_frequency: bool, axis_name: str | None
) -> jax.Array:
    return weight[x]


@_rows.defjvp
def _rows_jvp(
    padding_idx: int | None,
    by_frequency: bool,
    axis_name: str | None,
    primals: tuple[Array, Array],
    tangents: tuple[Array, Any],
) -> tuple[jax.Array, jax.Array]:
    weight, x = primals
    rows = weight[x]
    tangent = tangents[0].at[x].get(mode="fill", fill_value=0)
    if by_frequency:
        counts = jnp.zeros(len(weight), rows.dtype).at[x].add(1)
        if axis_name is not None:
            counts = jax.lax.psum(counts, axis_name)
        tangent = tangent / _per_row(counts[x], rows)
    if padding_idx is not None:
        tangent = tangent * _per_row(x != padding_idx, rows).astype(rows.dtype)
    return rows, tangent


def _shortened(rows: Array, axes: int, max_norm: float, order: float) -> Array:
    flat = rows.reshape(*rows.shape[:axes], -1)
    norms = jnp.linalg.norm(flat, ord=order, axis=-1, keepdims=True)
    scale = jnp.minimum(1, max_norm / (norms + 1e-8)).astype(rows.dtype)
    return (flat * scale).reshape(rows.shape)


def _per_row(values: Array, rows: Array) -> Array:
    return values.reshape(*values.shape, *[1] * (rows.ndim - values.ndim))
