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

__all__ = ["batch_norm", "dropout", "linear", "moments", "promote"]

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


def batch_norm(
    x: Array,
    mean: Array,
    var: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int = -1,
    epsilon: float,
    output_dtype: DType | None = None,
) -> jax.Array:
    """``(x - mean) * rsqrt(var + epsilon) * scale + bias`` along ``axis``.

    Ioffe and Szegedy, "Batch Normalization", ICML 2015.

    Args:
        x: ``(*batch, *space, features)`` for ``axis == -1``.
        mean, var: ``(features,)``.
        scale, bias: ``(features,)``, or None.
        axis: that of the features.
        epsilon: added to the variance.
        output_dtype: what the result is cast to; None means the common dtype of ``x``, scale
            and bias.
    """
    shape = [1] * x.ndim
    shape[axis] = -1
    if output_dtype is None:
        output_dtype = jnp.result_type(*(a for a in (x, scale, bias) if a is not None))
    factor = jax.lax.rsqrt(var.reshape(shape) + epsilon)
    if scale is not None:
        factor = factor * scale.reshape(shape)
    y = (x - mean.reshape(shape)) * factor
    return jnp.asarray(y if bias is None else y + bias.reshape(shape), output_dtype)


def moments(
    x: Array,
    axes: tuple[int, ...],
    *,
    use_fast_variance: bool,
    axis_name: Any = (),
    axis_index_groups: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of ``x`` over ``axes``, in float32 or wider.

    Args:
        x: any array.
        axes: the axes to reduce.
        use_fast_variance: whether the variance is ``max(0, E[x**2] - E[x]**2)``, which cancels
            where the mean is large, and not ``E[(x - E[x])**2]``.
        axis_name: mapped axes to reduce as well.
        axis_index_groups: as in ``jax.lax.pmean``.
    """
    x = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))

    def average(values: jax.Array) -> jax.Array:
        reduced = values.mean(axes)
        if not axis_name:
            return reduced
        return jax.lax.pmean(reduced, axis_name, axis_index_groups=axis_index_groups)

    mean = average(x)
    if use_fast_variance:
        return mean, jnp.maximum(0.0, average(x * x) - mean * mean)
    return mean, average(jnp.square(x - jnp.expand_dims(mean, axes)))
