"""Normalisations: statistics over some axes, and the affine map that they give."""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .layers import promote

__all__ = ["moments", "normalize"]

Array = Any
DType = Any


def moments(
    x: Array,
    axes: tuple[int, ...],
    *,
    use_fast_variance: bool,
    is_centred: bool = True,
    batch_axis: str | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    dtype: DType | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of ``x`` over ``axes``, which stay with size 1.

    Args:
        x: any array.
        axes: the axes to reduce.
        use_fast_variance: whether the variance is ``max(0, E[x**2] - E[x]**2)``, which cancels
            where the mean is large, and not ``E[(x - E[x])**2]``.
        is_centred: if not, the mean is taken to be 0.
        batch_axis: a mapped axis that is one of ``axes``, and is not in ``x``.
        axis_name: mapped axes to reduce as well.
        axis_index_groups: as in ``jax.lax.pmean``.
        dtype: what ``x`` is cast to; None means float32, or wider if ``x`` is.
    """
    x = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32) if dtype is None else dtype)

    def average(values: jax.Array) -> jax.Array:
        wide = jnp.promote_types(values.dtype, jnp.float32)  # as jnp.mean sums half precision
        mean = values.mean(axes, wide, keepdims=True)
        if batch_axis is not None:
            mean = jax.lax.pmean(mean, batch_axis)
        mean = mean.astype(values.dtype)
        if axis_name is None:
            return mean
        return jax.lax.pmean(mean, axis_name, axis_index_groups=axis_index_groups)

    if not is_centred:
        var = average(_abs_squared(x))
        return jnp.zeros_like(var), var
    mean = average(x)
    if use_fast_variance:
        return mean, jnp.maximum(0.0, average(_abs_squared(x)) - _abs_squared(mean))
    return mean, average(_abs_squared(x - mean))


def _abs_squared(x: Array) -> Array:
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)


def normalize(
    x: Array,
    mean: Array,
    var: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    epsilon: float,
    compute_dtype: DType | None = None,
    output_dtype: DType | None = None,
) -> jax.Array:
    """``(x - mean) * rsqrt(var + epsilon) * scale + bias``; all shapes broadcast.

    Args:
        x: any array.
        mean, var: its statistics.
        scale, bias: arrays, or None.
        epsilon: added to the variance.
        compute_dtype: what x, scale and bias are cast to first, or None.
        output_dtype: what the result is cast to; None means the common dtype of x, scale and
            bias.
    """
    if compute_dtype is not None:
        x, scale, bias = promote(x, scale, bias, dtype=compute_dtype)
    if output_dtype is None:
        output_dtype = jnp.result_type(*(a for a in (x, scale, bias) if a is not None))
    factor = jax.lax.rsqrt(var + epsilon)
    y = (x - mean) * (factor if scale is None else factor * scale)
    return jnp.asarray(y if bias is None else y + bias, output_dtype)
