"""Padding and pooling of images, with the channels last."""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax

from .. import formulas
from .base import Array, Run, Shape, Spec
from .functions import Formula

__all__ = ["AdaptivePool", "MaxUnpool", "Pad", "Pool", "pool"]

Pads = tuple[tuple[int, int], ...]


class Spatial(Formula):
    """A formula for images. Its channels are last, or at ``channel_axis`` of the batch."""

    channel_axis: int | None
    axes: ClassVar[tuple[str, ...]] = ("channel_axis",)

    @property
    def dims(self) -> int:
        """The number of axes of space."""
        raise NotImplementedError

    @property
    def space(self) -> int:
        return 0 if self.fixes_order else self.dims

    @property
    def fixes_order(self) -> bool:
        return self.channel_axis != -1

    def moved(self, axes: int | None, to_first: bool) -> Spec:
        if to_first and self.channel_axis in (1, -self.dims - 1):
            return replace(self, channel_axis=-1)  # the target has them first as well
        return self


@dataclass(frozen=True, eq=False, kw_only=True)
class Pad(Spatial):
    """:func:`interop.formulas.pad`.

    Example:
        >>> import jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.Pad(padding=((1, 1), (0, 2)))
        >>> spec.apply(specs.Run(), jnp.ones((5, 8, 8, 3))).shape
        (5, 10, 10, 3)
    """

    padding: Pads
    mode: str = "zero"
    value: float = 0.0
    channel_axis: int | None = -1
    formula: ClassVar[Callable[..., Any]] = staticmethod(formulas.pad)

    @property
    def dims(self) -> int:
        return len(self.padding)


@dataclass(frozen=True, eq=False, kw_only=True)
class Pool(Spatial):
    """:func:`interop.formulas.pool`.

    Example:
        >>> import jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.Pool(window=(2, 2), strides=(2, 2))
        >>> spec.apply(specs.Run(), jnp.ones((5, 8, 8, 3))).shape
        (5, 4, 4, 3)
    """

    window: tuple[int, ...]
    kind: str = "max"
    strides: tuple[int, ...] | None = None
    padding: str | Pads = "VALID"
    channel_axis: int | None = -1
    counts: str = "window"
    ceil: bool = False
    norm: float = 2.0
    operation: Callable[..., Any] | None = None
    init: float = 0.0
    indices: str | None = None
    formula: ClassVar[Callable[..., Any]] = staticmethod(formulas.pool)

    @classmethod
    def shaped(cls, window: tuple[int, ...], **options: Any) -> Self:
        return cls(window=window, **options)

    @property
    def dims(self) -> int:
        return len(self.window)

    @property
    def steps(self) -> tuple[int, ...]:
        """From window to window, along each axis of space."""
        return self.strides or (1,) * self.dims

    @property
    def is_padded(self) -> bool:
        """Whether windows may reach over the ends."""
        return self.padding in ("SAME", "SAME_LOWER") or any(map(any, self.pads()))

    def pads(self, shape: Shape = ()) -> Pads:
        """The padding of an example of that shape of space, as pairs."""
        if self.padding == "VALID":
            return ((0, 0),) * self.dims
        if not isinstance(self.padding, str):
            return self.padding
        pads = jax.lax.padtype_to_pads(shape, self.window, self.steps, self.padding)
        return tuple((int(low), int(high)) for low, high in pads)

    def is_plain(self, *kinds: str, **options: Any) -> bool:
        """Whether it is of one of these kinds, with its channels last and no other option."""
        plain = {"channel_axis": -1, "ceil": False, "indices": None} | options
        return self.kind in kinds and all(getattr(self, k) == v for k, v in plain.items())


def pool(kind: str, window: Any, strides: Any, padding: Any, **options: Any) -> Pool:
    """A :class:`Pool` with its options in one form."""
    strides = tuple(strides or (1,) * len(window))
    spec = Pool(
        kind=kind,
        window=tuple(window),
        strides=None if set(strides) == {1} else strides,
        padding=padding.upper() if isinstance(padding, str) else tuple(map(tuple, padding)),
        **options,
    )
    if not spec.is_padded:
        spec = replace(spec, padding="VALID")
        if spec.counts == "covered":
            spec = replace(spec, counts="window")
    return spec


@dataclass(frozen=True, eq=False, kw_only=True)
class AdaptivePool(Spatial):
    """:func:`interop.formulas.adaptive_pool`.

    Example:
        >>> import jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.AdaptivePool(target=(2, 2))
        >>> spec.apply(specs.Run(), jnp.ones((5, 8, 8, 3))).shape
        (5, 2, 2, 3)
    """

    target: tuple[int | None, ...]
    kind: str = "mean"
    channel_axis: int | None = -1
    operation: Callable[[Any], Any] | None = None
    formula: ClassVar[Callable[..., Any]] = staticmethod(formulas.adaptive_pool)

    @property
    def dims(self) -> int:
        return len(self.target)


@dataclass(frozen=True, eq=False, kw_only=True)
class MaxUnpool(Spec):
    """:func:`interop.formulas.max_unpool` of what was pooled, and the indices.

    A framework that maps over examples has each with indices of its own, which count in that
    example, in the order of its axes with the channels last.

    Example:
        >>> import jax.numpy as jnp
        >>> from interop import specs
        >>> pool = specs.Pool(window=(2,), strides=(2,), indices="input")
        >>> values, indices = pool.apply(specs.Run(), jnp.ones((5, 8, 3)))
        >>> spec = specs.MaxUnpool.shaped((2,))
        >>> spec.apply(specs.Run(), values, indices).shape
        (5, 8, 3)
    """

    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[int, ...]
    channel_axis: int | None = -1
    covers: bool = False

    @property
    def space(self) -> int:
        return 0 if self.fixes_order else len(self.window)

    @property
    def fixes_order(self) -> bool:
        return self.channel_axis != -1

    @classmethod
    def shaped(
        cls,
        window: tuple[int, ...],
        *,
        strides: tuple[int, ...] | None = None,
        padding: tuple[int, ...] | None = None,
        channel_axis: int | None = -1,
        covers: bool = False,
    ) -> Self:
        return cls(
            window=window,
            strides=strides or window,
            padding=padding or (0,) * len(window),
            channel_axis=channel_axis,
            covers=covers,
        )

    def apply(self, run: Run, x: Array, indices: Array, output_size: Any = None) -> Array:
        return formulas.max_unpool(
            x,
            indices,
            self.window,
            self.strides,
            self.padding,
            self.channel_axis,
            self.covers,
            output_size,
        )

    def output_shape(self, shape: Shape | None) -> None:
        return None
