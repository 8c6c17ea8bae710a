"""Normalisations."""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import jax.numpy as jnp

from .. import formulas
from .base import Array, DType, Run, Shape, Spec, is_wide, mismatches_of, moved_axis

__all__ = [
    "BatchNorm",
    "GroupNorm",
    "LayerNorm",
    "Norm",
    "RMSNorm",
]


@dataclass(frozen=True, eq=False, kw_only=True)
class Norm(Spec):
    """What all normalisations have.

    Dtypes: ``x``, scale and bias are first cast to ``compute_dtype``, the result to
    ``output_dtype``; None means the common dtype of the three. Statistics are float32 or wider.
    """

    keeps_shape = True

    scale: Array | None
    bias: Array | None
    epsilon: float
    use_fast_variance: bool
    axis_name: Any = None
    axis_index_groups: Any = None
    compute_dtype: DType | None = None
    output_dtype: DType | None = None

    @property
    def space(self) -> int | None:
        return None

    @property
    def holds_state(self) -> bool:
        return self.scale is not None or self.bias is not None


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerNorm(Norm):
    """``y = (x - mean) * rsqrt(var + epsilon) * scale + bias`` over ``reduction_axes``.

    Shapes:
        x       (*batch, *example)
        scale   the sizes of ``feature_axes``, or None
        bias    the sizes of ``feature_axes``, or None

    ``feature_shape`` holds those sizes where they are known without the arrays, and
    ``leading_shape`` the sizes of the axes of one example before them, where the source fixes
    them. Axes are negative: they count from the end, so that batch axes do not move them.
    """

    feature_shape: Shape | None
    leading_shape: Shape = ()
    reduction_axes: tuple[int, ...] = (-1,)
    feature_axes: tuple[int, ...] = (-1,)
    counts_axes = True

    def moved(self, axes: int | None, to_first: bool) -> Spec:
        if not axes:
            return self
        features = [moved_axis(axis, axes, to_first) for axis in self.feature_axes]
        order = sorted(range(len(features)), key=features.__getitem__)
        shape = self.feature_shape
        return replace(
            self,
            scale=_transposed(self.scale, order),
            bias=_transposed(self.bias, order),
            feature_shape=None if shape is None else tuple(shape[i] for i in order),
            reduction_axes=tuple(
                sorted(moved_axis(axis, axes, to_first) for axis in self.reduction_axes)
            ),
            feature_axes=tuple(sorted(features)),
        )

    def mismatches(self) -> list[str]:
        shape = self.feature_shape
        return mismatches_of(scale=(self.scale, shape), bias=(self.bias, shape))


@dataclass(frozen=True, eq=False, kw_only=True)
class RMSNorm(LayerNorm):
    """``y = x * rsqrt(mean(x ** 2) + epsilon) * scale`` over ``reduction_axes``.

    As :class:`LayerNorm`, without the mean; ``use_fast_variance`` has no effect. A bias is an
    option that few frameworks have.
    """

    bias: Array | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class GroupNorm(Norm):
    """:class:`LayerNorm` of each of ``num_groups`` groups of features, over all of ``space``.

    Shapes:
        x       (batch, *space, features)
        scale   (features,) or None
        bias    (features,) or None

    ``features`` is that number where it is known without the arrays.
    """

    num_groups: int
    features: int | None
    has_channels = True

    def mismatches(self) -> list[str]:
        shape = None if self.features is None else (self.features,)
        return mismatches_of(scale=(self.scale, shape), bias=(self.bias, shape))


@dataclass(frozen=True, eq=False, kw_only=True)
class BatchNorm(Norm):
    """``y = (x - mean) * rsqrt(var + epsilon) * scale + bias`` over all axes but ``axis``.

    Training normalises by the batch's statistics and moves the running ones:
    ``mean <- momentum * mean + (1 - momentum) * batch_mean``, with the biased variance.

    Shapes:
        x                       (*batch, *space, features) for ``axis == -1``
        scale, bias             (features,) or None
        mean, var               (features,)

    ``spatial_dims`` is the number of axes of ``space``, or None where the source leaves it to
    the input. ``statistics_dtype`` is that of ``mean`` and ``var`` where it is narrower than
    float32, which every framework rounds elsewhere.
    """

    mean: Array
    var: Array
    momentum: float
    spatial_dims: int | None
    axis: int = -1
    statistics_dtype: DType | None = field(init=False, default=None)
    trained = ("scale", "bias")
    buffers = ("mean", "var")

    def apply(self, run: Run, x: Array) -> Array:
        mean, var = self.mean, self.var
        if run.train:
            mean, var = self._batch_statistics(run, x)
            kept, moved = self.momentum, 1.0 - self.momentum
            run.update(
                self, mean=kept * self.mean + moved * mean, var=kept * self.var + moved * var
            )
        return formulas.batch_norm(
            x,
            mean,
            var,
            self.scale,
            self.bias,
            axis=self.axis,
            epsilon=self.epsilon,
            output_dtype=self.output_dtype,
        )

    def _batch_statistics(self, run: Run, x: Array) -> tuple[Array, Array]:
        return formulas.moments(
            x,
            tuple(axis for axis in range(x.ndim) if axis != self.axis % x.ndim),
            use_fast_variance=self.use_fast_variance,
            axis_name=tuple(
                name for name in (self.axis_name, run.axis_name) if name is not None
            ),
            axis_index_groups=self.axis_index_groups,
        )

    @classmethod
    def shaped(
        cls,
        features: int,
        *,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        use_scale: bool = True,
        use_bias: bool = True,
        use_fast_variance: bool = True,
        param_dtype: DType = jnp.float32,
        **options: Any,
    ) -> Self:
        array = jax.ShapeDtypeStruct((features,), param_dtype)
        return cls(
            scale=array if use_scale else None,
            bias=array if use_bias else None,
            mean=array,
            var=array,
            momentum=momentum,
            epsilon=epsilon,
            use_fast_variance=use_fast_variance,
            spatial_dims=None,
            **options,
        )

    def __post_init__(self) -> None:
        if not is_wide(self.mean.dtype):
            object.__setattr__(self, "statistics_dtype", self.mean.dtype)

    @property
    def space(self) -> int | None:
        return self.spatial_dims

    @property
    def has_channels(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.spatial_dims is None

    def moved(self, axes: int | None, to_first: bool) -> Spec:
        if self.spatial_dims is not None or (axes is None and to_first):
            return self
        return replace(self, spatial_dims=max((axes or 1) - 1, 0))

    @property
    def holds_state(self) -> bool:
        return True

    def mismatches(self) -> list[str]:
        names = ("mean", "var", "scale", "bias")
        return mismatches_of(**{n: (getattr(self, n), self.mean.shape) for n in names})


def _transposed(array: Array | None, order: list[int]) -> Array | None:
    return array if array is None or order == sorted(order) else array.transpose(order)
