"""Normalisations."""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from .. import formulas
from ..errors import ArgumentError
from .base import Array, DType, Run, Shape, Spec, is_wide, mismatches_of, moved_axis

__all__ = [
    "CENTRED",
    "BatchNorm",
    "GroupNorm",
    "LayerNorm",
    "Norm",
    "RMSNorm",
]


CENTRED = "a variance is that of the centred values"


@dataclass(frozen=True, eq=False, kw_only=True)
class Norm(Spec):
    """What all normalisations have.

    Dtypes: ``x``, scale and bias are first cast to ``compute_dtype``, the result to
    ``output_dtype``; None means the common dtype of the three. Statistics are float32 or wider,
    unless ``force_float32`` is false: then they have the output's or the input's dtype.

    ``use_fast_variance`` takes a variance as ``E[x**2] - E[x]**2``, which is inexact where a
    mean is large beside the deviation; else it is that of the centred values, as in frameworks
    that have no such option.

    ``axis_name`` is a mapped axis to take the statistics over as well, in groups of it if
    ``axis_index_groups`` says so.
    """

    keeps_shape = True
    trained: ClassVar[tuple[str, ...]] = ("scale", "bias")

    scale: Array | None
    bias: Array | None
    epsilon: float
    use_fast_variance: bool
    axis_name: Any = None
    axis_index_groups: Any = None
    compute_dtype: DType | None = None
    output_dtype: DType | None = None
    force_float32: bool = True

    @property
    def space(self) -> int | None:
        return None

    @property
    def edge(self) -> str | None:
        return (
            "a variance is E[x**2] - E[x]**2, inexact where the mean is large"
            if self.use_fast_variance
            else CENTRED
        )

    @property
    def holds_state(self) -> bool:
        return self.scale is not None or self.bias is not None

    def _moments(
        self, run: Run, x: Array, axes: tuple[int, ...], is_centred: bool = True
    ) -> tuple[Array, Array]:
        """The statistics over ``axes`` of the batch ``x``, which stay with size 1."""
        if self.compute_dtype is not None:
            x = jnp.asarray(x, self.compute_dtype)
        dtype = x.dtype if self.output_dtype is None else self.output_dtype
        return formulas.moments(
            x,
            axes,
            use_fast_variance=self.use_fast_variance,
            is_centred=is_centred,
            batch_axis=run.axis_name if 0 in axes else None,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            dtype=jnp.promote_types(dtype, jnp.float32) if self.force_float32 else dtype,
        )

    def _normalized(self, x: Array, mean: Array, var: Array, axes: tuple[int, ...]) -> Array:
        """``x`` normalised, scaled and shifted along its ``axes``."""
        shape = [x.shape[axis] if axis in axes else 1 for axis in range(x.ndim)]
        scale, bias = (a if a is None else a.reshape(shape) for a in (self.scale, self.bias))
        return formulas.normalize(
            x,
            mean,
            var,
            scale,
            bias,
            epsilon=self.epsilon,
            compute_dtype=self.compute_dtype,
            output_dtype=self.output_dtype,
        )


def _affine(
    shape: Shape, use_scale: bool, use_bias: bool, param_dtype: DType
) -> dict[str, jax.ShapeDtypeStruct | None]:
    array = jax.ShapeDtypeStruct(shape, param_dtype)
    return {"scale": array if use_scale else None, "bias": array if use_bias else None}


def _positive(axes: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    return tuple(axis % ndim for axis in axes)


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerNorm(Norm):
    """``y = (x - mean) * rsqrt(var + epsilon) * scale + bias`` over ``reduction_axes``.

    Shapes:
        x       (*batch, *example)
        scale   the sizes of ``feature_axes``, or None
        bias    the sizes of ``feature_axes``, or None

    ``feature_shape`` holds those sizes where they are known without the arrays, and
    ``leading_shape`` the sizes of the axes of one example before them, where the source fixes
    them; where those of several axes are not known, the arrays are one row. Axes are negative,
    in order: they count from the end, so that batch axes do not move them.

    Ba et al., "Layer Normalization", 2016.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.LayerNorm.shaped(3).initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.ones((5, 3))).shape
        (5, 3)
    """

    feature_shape: Shape | None
    leading_shape: Shape = ()
    reduction_axes: tuple[int, ...] = (-1,)
    feature_axes: tuple[int, ...] = (-1,)
    counts_axes = True
    is_centred: ClassVar[bool] = True

    def apply(self, run: Run, x: Array) -> Array:
        axes = _positive(self.reduction_axes, x.ndim)
        mean, var = self._moments(run, x, axes, self.is_centred)
        return self._normalized(x, mean, var, _positive(self.feature_axes, x.ndim))

    @classmethod
    def shaped(
        cls,
        shape: int | Shape,
        *,
        epsilon: float = 1e-6,
        use_scale: bool = True,
        use_bias: bool | None = None,
        use_fast_variance: bool = True,
        param_dtype: DType = jnp.float32,
        feature_axes: tuple[int, ...] | None = None,
        reduction_axes: tuple[int, ...] | None = None,
        **options: Any,
    ) -> Self:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        axes = feature_axes or tuple(range(-len(shape), 0))
        use_bias = cls.is_centred if use_bias is None else use_bias
        return cls(
            **_affine(shape, use_scale, use_bias, param_dtype),
            epsilon=epsilon,
            use_fast_variance=use_fast_variance,
            feature_shape=shape,
            feature_axes=axes,
            reduction_axes=reduction_axes or axes,
            **options,
        )

    def moved(self, axes: int | None, to_first: bool) -> Spec:
        if not axes:
            return self
        features = [moved_axis(axis, axes, to_first) for axis in self.feature_axes]
        order = sorted(range(len(features)), key=features.__getitem__)
        shape = self.feature_shape
        if shape is None and order != sorted(order) and self.holds_state:
            raise ArgumentError(
                "the weights of a normalisation are one row, whose axes cannot be told",
                remedy="Convert it to another framework first, with sample_input=",
            )
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

    def sized(self, example: Shape) -> Self:
        """This layer with the ``feature_shape`` that examples of a shape have."""
        shape = tuple(example[axis] for axis in self.feature_axes)
        scale, bias = (a if a is None else a.reshape(shape) for a in (self.scale, self.bias))
        return replace(self, scale=scale, bias=bias, feature_shape=shape)

    def mismatches(self) -> list[str]:
        shape = self.feature_shape
        return mismatches_of(scale=(self.scale, shape), bias=(self.bias, shape))


@dataclass(frozen=True, eq=False, kw_only=True)
class RMSNorm(LayerNorm):
    """``y = x * rsqrt(mean(x ** 2) + epsilon) * scale`` over ``reduction_axes``.

    As :class:`LayerNorm`, without the mean; ``use_fast_variance`` has no effect. A bias is an
    option that few frameworks have. Zhang and Sennrich, "Root Mean Square Layer
    Normalization", NeurIPS 2019.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.RMSNorm.shaped(3).initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.ones((5, 3))).shape
        (5, 3)
    """

    bias: Array | None = None
    is_centred = False

    @property
    def edge(self) -> None:
        return None


@dataclass(frozen=True, eq=False, kw_only=True)
class GroupNorm(Norm):
    """:class:`LayerNorm` of each of ``num_groups`` groups of features, over all of ``space``.

    Wu and He, "Group Normalization", ECCV 2018.

    Shapes:
        x       (batch, *space, features)
        scale   (features,) or None
        bias    (features,) or None

    ``features`` is that number where it is known without the arrays. ``reduction_axes`` are
    the axes of ``x`` to reduce beside those of a group, where that is not all of ``space``.
    Statistics have an axis of groups; ``repeat_axis`` is that along which they are repeated for
    each feature of a group. It is the axis of groups unless the source takes another one, whose
    result is then a permutation of the statistics.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.GroupNorm.shaped(4, 2).initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.ones((5, 4))).shape
        (5, 4)
    """

    num_groups: int
    features: int | None
    reduction_axes: tuple[int, ...] | None = None
    repeat_axis: int = -1
    has_channels = True

    def apply(self, run: Run, x: Array) -> Array:
        *leading, features = x.shape
        groups, size = self.num_groups, features // self.num_groups
        axes = self.reduction_axes
        axes = tuple(range(1, x.ndim - 1)) if axes is None else _positive(axes, x.ndim)
        grouped = x.reshape(*leading, groups, size)
        kept = [1 if axis in axes else n for axis, n in enumerate(leading)]

        def spread(statistics: Array) -> Array:
            statistics = statistics.squeeze((*axes, x.ndim))
            return jnp.repeat(statistics, size, axis=self.repeat_axis).reshape(*kept, features)

        mean, var = map(spread, self._moments(run, grouped, (*axes, x.ndim)))
        return self._normalized(x, mean, var, (x.ndim - 1,))

    @classmethod
    def shaped(
        cls,
        features: int,
        num_groups: int = 32,
        *,
        epsilon: float = 1e-6,
        use_scale: bool = True,
        use_bias: bool = True,
        use_fast_variance: bool = True,
        param_dtype: DType = jnp.float32,
        **options: Any,
    ) -> Self:
        return cls(
            **_affine((features,), use_scale, use_bias, param_dtype),
            epsilon=epsilon,
            use_fast_variance=use_fast_variance,
            num_groups=num_groups,
            features=features,
            **options,
        )

    @property
    def in_features(self) -> int | None:
        return self.features

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
    the input. With ``uses_running``, training normalises by the running statistics once the
    batch has moved them; ``is_first``, a boolean, tells that they are still to be set, to those
    of the first batch. ``statistics_dtype`` is that of ``mean`` and ``var`` where it is
    narrower than float32, which every framework rounds elsewhere.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.BatchNorm.shaped(3).initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.ones((5, 3))).shape
        (5, 3)
    """

    mean: Array
    var: Array
    momentum: float
    spatial_dims: int | None
    axis: int = -1
    uses_running: bool = False
    is_first: Array | None = None
    statistics_dtype: DType | None = field(init=False, default=None)
    buffers: ClassVar[tuple[str, ...]] = ("mean", "var", "is_first")

    def apply(self, run: Run, x: Array) -> Array:
        axis = self.axis % x.ndim
        shape = [x.shape[i] if i == axis else 1 for i in range(x.ndim)]
        mean, var = self._statistics(run, x, axis) if run.train else (self.mean, self.var)
        if self.compute_dtype is not None and not run.train:
            mean, var = formulas.promote(mean, var, dtype=self.compute_dtype)
        return self._normalized(x, mean.reshape(shape), var.reshape(shape), (axis,))

    def _statistics(self, run: Run, x: Array, axis: int) -> tuple[Array, Array]:
        """Those that training normalises by; moves the running ones."""
        batch = self._moments(run, x, tuple(i for i in range(x.ndim) if i != axis))
        mean, var = (a.reshape(self.mean.shape) for a in batch)
        kept, moved = self.momentum, 1.0 - self.momentum
        new = {"mean": kept * self.mean + moved * mean, "var": kept * self.var + moved * var}
        if self.is_first is not None:
            new["mean"] = jnp.where(self.is_first, mean, new["mean"])
            new["var"] = jnp.where(self.is_first, var, new["var"])
            new["is_first"] = jnp.zeros_like(self.is_first)
        run.update(self, **new)
        return (new["mean"], new["var"]) if self.uses_running else (mean, var)

    @property
    def in_features(self) -> int | None:
        return self.mean.shape[0] if self.axis == -1 else None

    @property
    def is_composable(self) -> bool:
        return self.statistics_dtype is None

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
        statistics = jax.ShapeDtypeStruct((features,), jnp.float32)
        return cls(
            **_affine((features,), use_scale, use_bias, param_dtype),
            mean=statistics,
            var=statistics,
            momentum=momentum,
            epsilon=epsilon,
            use_fast_variance=use_fast_variance,
            spatial_dims=None,
            **options,
        )

    def __post_init__(self) -> None:
        dtype = getattr(self.mean, "dtype", jnp.float32)  # arrays may be elsewhere
        if not is_wide(dtype):
            object.__setattr__(self, "statistics_dtype", dtype)

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
