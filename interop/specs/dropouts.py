"""Layers that drop a part of their input in training."""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from .. import formulas
from ..errors import ArgumentError
from .base import Array, Run, Shape, Spec, move_channels, moved_axis

__all__ = ["AlphaDropout", "Dropout", "DropoutFixed"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Dropout(Spec):
    """Training: each element is 0 with probability ``rate``, else ``x / (1 - rate)``.

    ``broadcast_dims`` are axes of the batched ``x`` along which one decision is shared.
    ``rng_collection`` names the random stream, in frameworks that have several. At rate 1 the
    result and its gradient are 0; a native layer may have a gradient of nan there.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> run = specs.Run(train=True, key=lambda: jax.random.key(0))
        >>> spec = specs.Dropout.shaped(0.3)
        >>> round(float(spec.apply(run, jnp.ones((5, 3))).max()), 2)
        1.43
    """

    rate: float
    rng_collection: str
    broadcast_dims: tuple[int, ...] = ()
    keeps_shape = True
    random = True

    def apply(self, run: Run, x: jax.Array) -> Any:
        if not run.train:
            return x
        return formulas.dropout(
            x, run.key(), rate=self.rate, broadcast_dims=self.broadcast_dims
        )

    @classmethod
    def shaped(cls, rate: float, *, broadcast_dims: tuple[int, ...] = ()) -> Self:
        return cls(rate=rate, broadcast_dims=broadcast_dims, rng_collection="dropout")

    @property
    def space(self) -> int | None:
        return None

    @property
    def edge(self) -> str | None:
        return "the gradient is 0, as all is dropped" if self.rate == 1 else None

    @property
    def counts_axes(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return bool(self.broadcast_dims)

    def mixes_examples(self, axes: int | None = None) -> bool:
        batch = (0,) if axes is None else (0, -axes - 1)
        return any(dim in batch for dim in self.broadcast_dims)

    @property
    def is_elementwise(self) -> bool:
        return not self.broadcast_dims

    @property
    def channel_axis(self) -> int | None:
        """The axis of an example, from its end, whose channels are dropped whole; or None."""
        axes = range(-len(self.broadcast_dims) - 1, 0)
        rest = set(axes) - set(self.broadcast_dims)
        return rest.pop() if self.broadcast_dims and len(rest) == 1 else None

    def moved(self, axes: int | None, to_first: bool) -> Spec:
        if not axes or not self.broadcast_dims:
            return self
        dims = [_moved(dim, axes, to_first) for dim in self.broadcast_dims]
        return replace(self, broadcast_dims=tuple(sorted(dims)))


@dataclass(frozen=True, eq=False, kw_only=True)
class AlphaDropout(Spec):
    """Training: each element is SELU's least value with probability ``rate``; all are then
    scaled and shifted so that mean and variance stay.

    With ``channel_axis``, an axis of the batched ``x``, there is one decision for each channel
    of each example.

    Klambauer et al., "Self-Normalizing Neural Networks", NeurIPS 2017.

    Example:
        >>> import jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.AlphaDropout(rate=0.3)
        >>> spec.apply(specs.Run(), jnp.ones((5, 3))).shape
        (5, 3)
    """

    rate: float
    channel_axis: int | None = None
    keeps_shape = True
    random = True

    def apply(self, run: Run, x: jax.Array) -> Any:
        if not run.train:
            return x
        return formulas.alpha_dropout(
            x, run.key(), rate=self.rate, channel_axis=self.channel_axis
        )

    @classmethod
    def shaped(cls, rate: float, *, channel_axis: int | None = None) -> Self:
        return cls(rate=rate, channel_axis=channel_axis)

    @property
    def space(self) -> int | None:
        return None

    @property
    def counts_axes(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.channel_axis is not None

    @property
    def is_elementwise(self) -> bool:
        return self.channel_axis is None

    def moved(self, axes: int | None, to_first: bool) -> Spec:
        if not axes or self.channel_axis is None:
            return self
        return replace(self, channel_axis=_moved(self.channel_axis, axes, to_first))


@dataclass(frozen=True, eq=False, kw_only=True)
class DropoutFixed(Spec):
    """Training: ``x / (1 - rate)`` where ``mask`` is true, else 0; the same in each call.

    Shapes:
        x     that of the mask
        mask  ``in_size``, before which there may be a batch axis; None if there is none yet,
              so that the layer does not train

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.DropoutFixed.shaped(3, 0.3).initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.ones((5, 3))).shape
        (5, 3)
    """

    rate: float
    in_size: Shape
    mask: Array | None

    buffers: ClassVar[tuple[str, ...]] = ("mask",)
    keeps_shape = True
    takes_examples = True
    counts_axes = True

    def apply(self, run: Run, x: jax.Array) -> Any:
        if not run.train or self.rate == 0.0:
            return x
        if self.mask is None:
            raise ArgumentError(
                "this dropout has no mask yet, and so does not train",
                remedy="Make the mask before the conversion, by the layer's init_state(...)",
            )
        return formulas.fixed_dropout(x, self.mask, rate=self.rate)

    @classmethod
    def shaped(cls, in_size: int | Shape, rate: float) -> Self:
        in_size = (in_size,) if isinstance(in_size, int) else tuple(in_size)
        return cls(rate=rate, in_size=in_size, mask=jax.ShapeDtypeStruct(in_size, bool))

    def initial(self, key: jax.Array) -> Self:
        if not isinstance(self.mask, jax.ShapeDtypeStruct):
            return self
        mask = jax.random.bernoulli(key, 1.0 - self.rate, self.mask.shape)
        return replace(self, mask=mask)

    @property
    def space(self) -> int | None:
        return None

    def moved(self, axes: int | None, to_first: bool) -> Spec:
        size, mask = len(self.in_size), self.mask
        if axes != size:
            return self
        if mask is not None:
            mask = jnp.moveaxis(mask, *((-1, -size) if to_first else (-size, -1)))
        return replace(self, in_size=move_channels(self.in_size, to_first), mask=mask)

    @property
    def edge(self) -> str | None:
        return "the gradient is 0, as all is dropped" if self.rate == 1 else None

    def mixes_examples(self, axes: int | None = None) -> bool:
        return self.mask is not None and self.mask.ndim > len(self.in_size)

    @property
    def holds_state(self) -> bool:
        return self.mask is not None


def _moved(axis: int, axes: int, to_first: bool) -> int:
    """An axis of a batch, counted from the end, after the channels of the examples moved."""
    if axis in (0, -axes - 1):
        return 0
    return moved_axis(axis - (axes + 1 if axis > 0 else 0), axes, to_first)
