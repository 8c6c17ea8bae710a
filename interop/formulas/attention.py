"""Attention, and the rotation of its heads by their positions."""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

__all__ = ["attention", "rotate", "head_norm"]

Array = Any
DType = Any


def attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    *,
    core: str = "plain",
    precision: Any = None,
    drop: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """``softmax(query @ key / sqrt(depth)) @ value``, for each head.

    Vaswani et al., "Attention Is All You Need", NeurIPS 2017. Several heads of the query may
    share one of key and value: Ainslie et al., "GQA", EMNLP 2023. A query that the mask lets
    see no key gets the mean of all values.

    Args:
        query: ``(*batch, length, heads, depth)``.
        key: ``(*batch, source, kv_heads, depth)``; ``heads`` is a multiple of ``kv_heads``.
        value: ``(*batch, source, kv_heads, value_depth)``.
        mask: what broadcasts to ``(*batch, heads, length, source)``; 0 hides a key.
        core: the dtypes on the way. ``"plain"``: that of the operands; ``"float32"``: the
            softmax in float32, and back; ``"widened"``: the softmax in float32, which the
            result stays in; ``"fused"``: as ``jax.nn.dot_product_attention``, which also
            sums up in float32, and ignores ``precision``.
        precision: as in ``jnp.einsum``.
        drop: applied to the weights ``(*batch, heads, length, source)``; not with ``"fused"``.

    Returns:
        ``(*batch, length, heads, value_depth)``.
    """
    if core == "fused":
        return _fused(query, key, value, mask)
    *_, heads, depth = query.shape
    grouped = (*query.shape[:-2], key.shape[-2], heads // key.shape[-2], depth)
    scaled = (query / jnp.sqrt(depth).astype(query.dtype)).reshape(grouped)
    scores = jnp.einsum("...qhgd,...khd->...hgqk", scaled, key, precision=precision)
    scores = scores.reshape(*scores.shape[:-4], heads, *scores.shape[-2:])
    if mask is not None:
        hidden = cast("Any", jnp.finfo(scores.dtype)).min
        scores = jnp.where(mask, scores, hidden)
    dtype = scores.dtype
    wide = dtype if core == "plain" else jnp.promote_types(dtype, jnp.float32)
    weights = jax.nn.softmax(scores.astype(wide))
    weights = weights if core == "widened" else weights.astype(dtype)
    weights = weights if drop is None else drop(weights)
    weights = weights.reshape(*weights.shape[:-3], *grouped[-3:-1], *weights.shape[-2:])
    out = jnp.einsum("...hgqk,...khd->...qhgd", weights, value, precision=precision)
    return out.reshape(*out.shape[:-3], heads, out.shape[-1])


def _fused(query: Array, key: Array, value: Array, mask: Array | None) -> jax.Array:
    batch = query.shape[:-3]
    if mask is not None:
        seen = jnp.asarray(mask, bool)
        seen = seen.reshape(*[1] * (3 - seen.ndim), *seen.shape)
        mask = jnp.broadcast_to(seen, (*batch, *seen.shape[-3:])).reshape(-1, *seen.shape[-3:])
    query, key, value = (
        x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value)
    )
    out = jax.nn.dot_product_attention(query, key, value, mask=mask)
    return out.reshape(*batch, *out.shape[1:])


def head_norm(x: Array, scale: Array, *, epsilon: float, dtype: DType) -> jax.Array:
    """``(x - mean) / sqrt(var + epsilon) * scale`` over the last axis, of queries or keys.

    Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters", ICML 2023.

    Args:
        x: ``(..., depth)``.
        scale: ``(depth,)``.
        epsilon: added to the variance, ``E[x**2] - E[x]**2``.
        dtype: that of the result.
    """
    wide = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean(-1, keepdims=True)
    var = jnp.maximum(0.0, (wide * wide).mean(-1, keepdims=True) - mean * mean)
    return jnp.asarray((x - mean) * (jax.lax.rsqrt(var + epsilon) * scale), dtype)


def rotate(
    x: Array,
    positions: Array | None = None,
    *,
    theta: float = 10000.0,
    table_dtype: DType | None = None,
    keeps_dtype: bool = False,
) -> jax.Array:
    """Turn the pairs of elements ``i``, ``i + depth/2`` by ``position * theta**(-2i/depth)``.

    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.

    Args:
        x: ``(..., length, depth)``, with an even depth.
        positions: ``(length,)`` or ``(..., length)``; by default ``0, 1, ...``.
        theta: the base of the frequencies.
        table_dtype: what sines and cosines are rounded to.
        keeps_dtype: whether the result has the dtype of ``x``.
    """
    length, depth = x.shape[-2:]
    if positions is None:
        positions = jnp.arange(float(length))
    frequencies = 1.0 / (theta ** (jnp.arange(0.0, depth, 2) / depth))
    angles = jnp.asarray(positions)[..., None] * frequencies
    cos, sin = (
        jnp.tile(jnp.asarray(part, table_dtype), 2)
        for part in (jnp.cos(angles), jnp.sin(angles))
    )
    turned = jnp.concatenate([-x[..., depth // 2 :], x[..., : depth // 2]], axis=-1)
    y = x * cos + turned * sin
    return y.astype(x.dtype) if keeps_dtype else y
