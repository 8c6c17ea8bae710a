"""Pooling, with the channels last."""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from .base import Shape, Spec

__all__ = [
    "Pool",
    "pool",
]


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
