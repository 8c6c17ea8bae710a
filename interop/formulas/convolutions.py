"""Convolutions, with the channels last and any number of batch axes."""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .layers import promote

__all__ = ["convolution", "local_convolution", "standardized", "transposed_convolution"]

Array = Any
DType = Any
Shape = tuple[int, ...]
Pads = str | tuple[tuple[int, int], ...]

_PAD_MODES: dict[str, Any] = {"REFLECT": "reflect", "REPLICATE": "edge", "CIRCULAR": "wrap"}


def convolution(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    strides: Shape,
    padding: Pads,
    padding_mode: str = "ZEROS",
    input_dilation: Shape | None = None,
    kernel_dilation: Shape | None = None,
    groups: int = 1,
    dtype: DType | None = None,
    precision: Any = None,
    preferred_element_type: DType | None = None,
) -> jax.Array:
    """``jax.lax.conv_general_dilated`` plus a bias.

    Args:
        x: ``(*batch, *space, in)``.
        weight: ``(*kernel, in // groups, out)``.
        bias: ``(out,)``, or None.
        strides: one for each axis of space.
        padding: ``"SAME"``, ``"SAME_LOWER"``, ``"VALID"`` or a pair for each axis of space.
        padding_mode: with what is padded, before the input is dilated: ``"ZEROS"``,
            ``"REFLECT"``, ``"REPLICATE"`` or ``"CIRCULAR"``. Zeros are padded after it.
        input_dilation, kernel_dilation: one for each axis of space; None means 1.
        groups: into how many groups the channels are split.
        dtype: what the operands are cast to.
        precision, preferred_element_type: as in ``jax.lax.conv_general_dilated``.
    """
    space = len(strides)
    if padding_mode != "ZEROS":
        kernel = weight.shape[:space]
        x = _padded(x, kernel, strides, kernel_dilation, padding, padding_mode)
        padding = ((0, 0),) * space  # jax.lax takes no name beside a dilated input
    x, weight, bias = promote(x, weight, bias, dtype=dtype)

    def convolve(x: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            weight,
            strides,
            padding,
            input_dilation,
            kernel_dilation,
            _dimension_numbers(space),
            groups,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )

    y = _over_batch(convolve, x, space)
    return y if bias is None else y + bias


def transposed_convolution(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    strides: Shape,
    padding: tuple[tuple[int, int], ...],
    padding_mode: str = "ZEROS",
    **options: Any,
) -> jax.Array:
    """:func:`convolution` with strides of 1 of an input that is dilated by ``strides``.

    ``padding`` counts elements of the dilated input, which ``padding_mode="CIRCULAR"`` repeats
    periodically. Dumoulin and Visin, "A guide to convolution arithmetic for deep learning",
    arXiv 1603.07285, section 4.
    """
    if padding_mode == "CIRCULAR":
        rows = list(zip(padding, strides, strict=True))
        whole = [(low // s, high // s) for (low, high), s in rows]
        padding = tuple((low % s, high % s) for (low, high), s in rows)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - len(whole) - 1) + whole + [(0, 0)], "wrap")
    ones = (1,) * len(strides)
    return convolution(
        x, weight, bias, strides=ones, padding=padding, input_dilation=strides, **options
    )


def local_convolution(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    kernel_size: Shape,
    strides: Shape,
    padding: Pads,
    padding_mode: str = "ZEROS",
    input_dilation: Shape | None = None,
    kernel_dilation: Shape | None = None,
    dtype: DType | None = None,
    precision: Any = None,
) -> jax.Array:
    """A convolution that has a kernel of its own for each place of the output.

    Args:
        x: ``(*batch, *space, in)``.
        weight: ``(*out_space, in * prod(kernel_size), out)``, as in
            ``jax.lax.conv_general_dilated_local``.
        bias: ``(*out_space, out)``, or None.
        kernel_size: one for each axis of space.
        strides, padding, padding_mode, input_dilation, kernel_dilation, dtype, precision: as
            in :func:`convolution`.
    """
    space = len(strides)
    if padding_mode != "ZEROS":
        x = _padded(x, kernel_size, strides, kernel_dilation, padding, padding_mode)
        padding = ((0, 0),) * space
    x, weight, bias = promote(x, weight, bias, dtype=dtype)

    def convolve(x: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated_local(
            x,
            weight,
            strides,
            padding,
            kernel_size,
            input_dilation,
            kernel_dilation,
            _dimension_numbers(space),
            precision,
        )

    y = _over_batch(convolve, x, space)
    return y if bias is None else y + bias


def standardized(weight: Array, gain: Array | None, *, epsilon: float) -> jax.Array:
    """``gain * (weight - mean) / sqrt(max(var * fan_in, epsilon))`` for each output.

    Scaled weight standardisation: Brock et al., "High-Performance Large-Scale Image
    Recognition Without Normalization", ICML 2021, after Qiao et al., arXiv 1903.10520.

    Args:
        weight: ``(..., out)``; the mean, the biased variance and ``fan_in``, the number of
            elements, are those of one output.
        gain: ``(out,)``, or None for 1.
        epsilon: the smallest divisor, squared.
    """
    axes = tuple(range(weight.ndim - 1))
    fan_in = math.prod(weight.shape[:-1])
    scale = jax.lax.rsqrt(jnp.maximum(jnp.var(weight, axis=axes) * fan_in, epsilon))
    scale = scale if gain is None else gain * scale
    return weight * scale - jnp.mean(weight, axis=axes) * scale


def _padded(
    x: Array,
    kernel: Shape,
    strides: Shape,
    dilation: Shape | None,
    padding: Pads,
    mode: str,
) -> jax.Array:
    space = len(kernel)
    if isinstance(padding, str):
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation or (1,) * space, strict=True)]
        shape = x.shape[-space - 1 : -1]
        padding = tuple(jax.lax.padtype_to_pads(shape, reach, strides, padding))
    batch = [(0, 0)] * (x.ndim - space - 1)
    return jnp.pad(x, [*batch, *padding, (0, 0)], _PAD_MODES[mode])


def _dimension_numbers(space: int) -> jax.lax.ConvDimensionNumbers:
    last = (0, space + 1, *range(1, space + 1))
    return jax.lax.ConvDimensionNumbers(last, (space + 1, space, *range(space)), last)


def _over_batch(fn: Callable[[jax.Array], jax.Array], x: Array, space: int) -> jax.Array:
    """``fn``, which takes one batch axis, for any number of them."""
    batch = x.shape[: x.ndim - space - 1]
    if len(batch) == 1:
        return fn(x)
    y = fn(x.reshape(math.prod(batch), *x.shape[len(batch) :]))
    return y.reshape(*batch, *y.shape[1:])
