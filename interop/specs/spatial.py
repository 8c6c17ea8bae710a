"""Convolution and pooling, with the channels last."""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from .base import Array, DType, Shape, Spec, mismatches_of, shape_of

__all__ = [
    "Conv",
    "Pool",
    "pool",
]


@dataclass(frozen=True, eq=False, kw_only=True)
class Conv(Spec):
    """Cross-correlation over the axes of space, as ``jax.lax.conv_general_dilated`` does it.

    Shapes, with ``k`` axes of space:
        x       (batch, *space, in)
        weight  (*kernel, in // groups, out)
        bias    (out,) or None
        mask    that of the weight, or None; multiplied with it

    ``padding`` is ``"SAME"``, ``"SAME_LOWER"``, ``"VALID"`` or k pairs. ``in_shape`` is the
    shape ``(*space, in)`` of an example where the source fixes it. ``dtype`` is what the
    operands are cast to; None means their common dtype.
    """

    weight: Array
    bias: Array | None
    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    kernel_dilation: tuple[int, ...]
    groups: int
    in_shape: Shape | None
    input_dilation: tuple[int, ...] | None = None
    mask: Array | None = None
    dtype: DType | None = None
    precision: Any = None
    preferred_element_type: DType | None = None

    @property
    def space(self) -> int:
        return len(self.strides)

    @property
    def channels(self) -> int:
        """The number of channels of the input."""
        return self.weight.shape[-2] * self.groups

    @property
    def holds_state(self) -> bool:
        return True

    @property
    def in_features(self) -> int:
        return self.channels

    def pads(self, shape: Shape) -> tuple[tuple[int, int], ...]:
        """The padding of an example of that shape, as pairs."""
        if not isinstance(self.padding, str):
            return self.padding
        kernel = [
            (size - 1) * dilation + 1
            for size, dilation in zip(self.weight.shape, self.kernel_dilation, strict=False)
        ]
        pads = jax.lax.padtype_to_pads(shape[:-1], kernel, self.strides, self.padding)
        return tuple((int(low), int(high)) for low, high in pads)

    def output_shape(self, shape: Shape | None) -> Shape | None:
        shape = shape or self.in_shape
        if shape is None:
            return None
        last = (0, self.space + 1, *range(1, self.space + 1))
        kernel = (self.space + 1, self.space, *range(self.space))

        def run(x: jax.Array) -> jax.Array:
            return jax.lax.conv_general_dilated(
                x,
                jnp.zeros(self.weight.shape),
                self.strides,
                self.padding,
                self.input_dilation,
                self.kernel_dilation,
                jax.lax.ConvDimensionNumbers(last, kernel, last),
                self.groups,
            )

        return shape_of(run, shape)

    def mismatches(self) -> list[str]:
        weight, out = self.weight, self.weight.shape[-1:]
        lines = mismatches_of(weight=(weight, None), bias=(self.bias, out))
        return lines + mismatches_of(mask=(self.mask, weight.shape))


@dataclass(frozen=True, eq=False, kw_only=True)
class Pool(Spec):
    """The maximum or the mean over windows of space, each channel by itself.

    ``padding`` is ``"SAME"``, ``"VALID"`` or a pair for each axis of space. Padding is never
    the maximum; whether zeros of it are elements of the mean, ``counts_padding`` says.
    """

    mean: bool
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    counts_padding: bool = False

    @property
    def space(self) -> int:
        return len(self.window)

    def pads(self, shape: Shape) -> tuple[tuple[int, int], ...]:
        """The padding of an example of that shape of space, as pairs."""
        if not isinstance(self.padding, str):
            return self.padding
        pads = jax.lax.padtype_to_pads(shape, self.window, self.strides, self.padding)
        return tuple((int(low), int(high)) for low, high in pads)

    def output_shape(self, shape: Shape | None) -> Shape | None:
        if shape is None:
            return None
        pads = self.pads(shape[:-1])
        rows = zip(shape[:-1], pads, self.window, self.strides, strict=True)
        return (*[(n + sum(p) - w) // s + 1 for n, p, w, s in rows], shape[-1])


def pool(mean: bool, counts: bool, window: Any, strides: Any, padding: Any) -> Pool:
    """A :class:`Pool` whose ``counts_padding`` is plain where there is no padding."""
    padding = padding if isinstance(padding, str) else tuple(tuple(p) for p in padding)
    is_padded = padding == "SAME" or (padding != "VALID" and any(map(any, padding)))
    return Pool(
        mean=mean,
        window=tuple(window),
        strides=tuple(strides),
        padding=padding,
        counts_padding=mean and counts and is_padded,
    )
