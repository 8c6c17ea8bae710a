"""Padding and pooling of images, and other functions of whole arrays.

The axes of space are the last ones but that of the channels, so that any number of axes may
stand before them.
"""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["adaptive_pool", "max_unpool", "pad", "pool", "unflatten"]

Pads = Sequence[tuple[int, int]]

_MODES = {
    "zero": "constant",
    "constant": "constant",
    "reflect": "reflect",
    "replicate": "edge",
    "circular": "wrap",
}


def unflatten(x: jax.Array, axis: int, sizes: tuple[int, ...]) -> jax.Array:
    """Split ``axis`` of ``x`` into axes of ``sizes``, one of which may be -1.

    Raises:
        ValueError: there is no such axis, or the sizes do not fit.
    """
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"unflatten: axis {axis} does not exist in shape {x.shape}")
    axis %= x.ndim
    return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])


def pad(
    x: jax.Array,
    padding: Pads,
    mode: str = "zero",
    value: float = 0.0,
    channel_axis: int | None = -1,
) -> jax.Array:
    """Put ``padding`` around the axes of space.

    Args:
        x: images, with any axes before.
        padding: a pair for each axis of space, before and after it.
        mode: ``"zero"``, ``"constant"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        value: what ``"constant"`` pads with.
        channel_axis: the axis that is none of space, or None.
    """
    pads = _everywhere(x.ndim, padding, channel_axis, (0, 0))
    options = {"constant_values": value} if mode == "constant" else {}
    return jnp.pad(x, pads, mode=_MODES[mode], **options)


def pool(
    x: jax.Array,
    window: tuple[int, ...],
    kind: str = "max",
    strides: tuple[int, ...] | None = None,
    padding: str | Pads = "VALID",
    channel_axis: int | None = -1,
    counts: str = "window",
    ceil: bool = False,
    norm: float = 2.0,
    operation: Callable[..., Any] | None = None,
    init: float = 0.0,
    indices: str | None = None,
) -> Any:
    """Reduce windows of space to one number each, each channel by itself.

    Args:
        x: images, with any axes before.
        window: its size along each axis of space.
        kind: ``"max"``, ``"min"``, ``"mean"``; ``"norm"``, the power mean of magnitudes;
            ``"fold"``, whatever ``operation`` makes of them.
        strides: from window to window; None stands for 1.
        padding: ``"VALID"``, ``"SAME"``, or a pair for each axis of space.
        channel_axis: the axis that is none of space, or None.
        counts: what a mean divides by: ``"window"``, its size; ``"covered"``, the elements of
            ``x`` in it, or 1 if there are none; ``"float32"``, the same number in float32,
            which may be 0.
        ceil: whether a last window that is not full counts, as if there were padding.
        norm: the exponent of ``"norm"``.
        operation: an associative function of two numbers, for ``"fold"``.
        init: what ``operation`` starts with, and finds in padding.
        indices: whether to return ``(maxima, where they are)`` instead; the numbers count, in
            row-major order, in ``"input"``, all of ``x``, or in ``"covered"``, what the windows
            reach of it and of the padding behind it.
    """
    windows = _windows(x, window, strides or (1,) * len(window), padding, channel_axis, ceil)

    def fold(x: Any, init: Any, operation: Any) -> jax.Array:
        return jax.lax.reduce_window(x, init, operation, *windows)

    folds = {
        "max": (-jnp.inf, jax.lax.max),
        "min": (jnp.inf, jax.lax.min),
        "fold": (init, operation),
    }
    if indices is not None:
        return _with_indices(x, *windows, counted=indices)
    if kind in folds:
        return fold(x, *folds[kind])
    if kind == "norm":
        total = fold(jnp.abs(x) ** norm, 0.0, jax.lax.add)
        root = jnp.where(total > 0, total, 1.0) ** (1.0 / norm)
        return np.prod(window) ** (-1.0 / norm) * jnp.where(total > 0, root, 0.0)
    total = fold(x, 0.0, jax.lax.add)
    if counts == "window":
        return total / math.prod(window)
    if counts == "covered":
        return total / jnp.maximum(fold(jnp.ones_like(x), 0.0, jax.lax.add), 1)
    return total / fold(jnp.ones(x.shape, jnp.float32), 0.0, jax.lax.add)


def _windows(
    x: jax.Array,
    window: tuple[int, ...],
    strides: tuple[int, ...],
    padding: str | Pads,
    channel_axis: int | None,
    ceil: bool,
) -> tuple[Any, Any, Any]:
    """Sizes, strides and padding along every axis of ``x``."""
    sizes = tuple(_everywhere(x.ndim, window, channel_axis, 1))
    steps = tuple(_everywhere(x.ndim, strides, channel_axis, 1))
    if isinstance(padding, str):
        pads = tuple(jax.lax.padtype_to_pads(x.shape, sizes, steps, padding))
    else:
        pads = tuple(_everywhere(x.ndim, padding, channel_axis, (0, 0)))
    if ceil:
        rows = zip(x.shape, pads, sizes, steps, strict=True)
        pads = tuple(
            (low, high + (step if (n + low + high - size) % step else 0))
            for n, (low, high), size, step in rows
        )
    return sizes, steps, pads


def max_unpool(
    x: jax.Array,
    indices: jax.Array,
    window: tuple[int, ...],
    strides: tuple[int, ...],
    padding: tuple[int, ...],
    channel_axis: int | None = -1,
    covers: bool = False,
    output_size: int | tuple[int, ...] | None = None,
) -> jax.Array:
    """Put maxima back where :func:`pool` found them, with zeros elsewhere.

    Args:
        x: what was pooled.
        indices: where the maxima were; of the shape of ``x``.
        window, strides: those of the pooling.
        padding: that of the pooling, one number for both ends of each axis of space.
        channel_axis: the axis that is none of space, or None.
        covers: whether the indices count in what the windows reached, or in the result that
            there is without ``output_size``.
        output_size: of each axis of space, or of every axis.
    """
    axes = _space(x.ndim, len(window), channel_axis)
    counted, shape = list(x.shape), list(x.shape)
    for i, axis in enumerate(axes):
        reached = (x.shape[axis] - 1) * strides[i] + window[i] - padding[i]
        shape[axis] = reached - padding[i]
        counted[axis] = reached if covers else shape[axis]
    if isinstance(output_size, int):
        output_size = (output_size,) * len(axes)
    if output_size is not None and len(output_size) == x.ndim:
        shape = list(output_size)
    elif output_size is not None:
        if len(output_size) != len(axes):
            raise ValueError(f"output_size must have {len(axes)} axes, got {output_size}")
        for axis, size in zip(axes, output_size, strict=True):
            shape[axis] = size
    if shape == counted:
        flat = jnp.zeros(math.prod(shape), x.dtype).at[indices.ravel()].set(x.ravel())
        return flat.reshape(shape)
    where = jnp.unravel_index(indices.ravel(), tuple(counted))
    return jnp.zeros(shape, x.dtype).at[where].set(x.ravel(), mode="drop")


def adaptive_pool(
    x: jax.Array,
    target: tuple[int | None, ...],
    kind: str = "mean",
    channel_axis: int | None = -1,
    operation: Callable[[Any], Any] | None = None,
) -> jax.Array:
    """Reduce each axis of space to a given size, by blocks that differ by one at most.

    Args:
        x: images, with any axes before.
        target: the size for each axis of space; None leaves it as it is.
        kind: ``"mean"``, ``"max"``, or ``"fold"``, whatever ``operation`` makes of a block.
        channel_axis: the axis that is none of space, or None.
        operation: a function of one axis, for ``"fold"``; where all blocks are equally long, it
            gets its result, a number, once more, as in Equinox.

    Raises:
        ValueError: an axis is shorter than its target.
    """
    over = {"mean": jnp.mean, "max": jnp.max}
    for axis, size in zip(_space(x.ndim, len(target), channel_axis), target, strict=True):
        if size is None:
            continue
        if x.shape[axis] < size:
            raise ValueError(f"adaptive_pool: {x.shape[axis]} elements do not make {size}")
        reduce: Any = over.get(kind) or _along_last(operation, twice=x.shape[axis] % size == 0)
        x = _in_blocks(x, axis, size, reduce)
    return x


def _in_blocks(x: jax.Array, axis: int, size: int, reduce: Any) -> jax.Array:
    x = jnp.moveaxis(x, axis, -1)
    short, more = divmod(x.shape[-1], size)
    split = more * (short + 1)
    lead = x.shape[:-1]
    blocks = [x[..., :split].reshape(*lead, more, short + 1)] if more else []
    blocks.append(x[..., split:].reshape(*lead, size - more, short))
    y = jnp.concatenate([reduce(block, axis=-1) for block in blocks], -1)
    return jnp.moveaxis(y, -1, axis)


def _along_last(operation: Any, twice: bool) -> Callable[..., Any]:
    def reduce(x: jax.Array, axis: int) -> jax.Array:
        y = jax.vmap(operation)(x.reshape(-1, x.shape[axis]))
        return (jax.vmap(operation)(y) if twice else y).reshape(x.shape[:-1])

    return reduce


def _with_indices(x: jax.Array, sizes: Any, steps: Any, pads: Any, counted: str) -> Any:
    shape = x.shape
    if counted == "covered":
        rows = zip(x.shape, sizes, steps, pads, strict=True)
        shape = [
            (n + low + high - size) // step * step + size - low
            for n, size, step, (low, high) in rows
        ]
    total = math.prod(shape)
    strides = np.cumprod([1, *shape[:0:-1]])[::-1]
    numbers = sum(
        jax.lax.broadcasted_iota(jnp.int32, x.shape, i) * int(stride)
        for i, stride in enumerate(strides)
    )

    def better(one: Any, other: Any) -> Any:
        (a, i), (b, j) = one, other
        wins = (b > a) | ((b == a) & (j < i))
        return jnp.where(wins, b, a), jnp.where(wins, j, i)

    first = jnp.asarray(-jnp.inf, x.dtype), jnp.int32(total)
    maxima, where = jax.lax.reduce_window((x, numbers), first, better, sizes, steps, pads)
    return maxima, jnp.where(where == total, 0, where)


def _space(ndim: int, dims: int, channel_axis: int | None) -> list[int]:
    """The axes of space of an array of ``ndim`` axes.

    Raises:
        ValueError: it has not so many.
    """
    if channel_axis is not None and not -ndim <= channel_axis < ndim:
        raise ValueError(f"axis {channel_axis} does not exist among {ndim} axes")
    axes = [i for i in range(ndim) if channel_axis is None or i != channel_axis % ndim]
    if len(axes) < dims:
        raise ValueError(f"{dims} axes of space are wanted, got {len(axes)}")
    return axes[-dims:]


def _everywhere(ndim: int, values: Any, channel_axis: int | None, plain: Any) -> list[Any]:
    """``values`` of the axes of space, and ``plain`` for every other axis."""
    found = [plain] * ndim
    for axis, value in zip(_space(ndim, len(values), channel_axis), values, strict=True):
        found[axis] = value
    return found
