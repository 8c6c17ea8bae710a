"""Normalisations."""

from __future__ import annotations

import math
from typing import Any

from flax import nnx

from ... import specs
from ...walk import Building, Reading
from .adapter import adapter, array_of, empty, made


def _norm_fields(m: Any, ctx: Reading) -> dict[str, Any]:
    """What every normalisation layer holds."""
    dtype = specs.dtype(m.dtype)
    return {
        "scale": array_of(m, ctx, "scale"),
        "bias": array_of(m, ctx, "bias") if hasattr(m, "bias") else None,
        "epsilon": m.epsilon,
        "use_fast_variance": m.use_fast_variance,
        "axis_name": m.axis_name,
        "axis_index_groups": m.axis_index_groups,
        "compute_dtype": None if dtype is None or specs.is_wide(dtype) else dtype,
        "output_dtype": dtype,
    }


def _norm_options(spec: Any, ctx: Building) -> dict[str, Any]:
    options = {
        "epsilon": spec.epsilon,
        "dtype": _norm_dtype(spec, ctx),
        "param_dtype": specs.common_dtype(spec.scale, spec.bias),
        "use_scale": spec.scale is not None,
        "scale_init": empty,
        "axis_name": spec.axis_name,
        "axis_index_groups": spec.axis_index_groups,
        "use_fast_variance": spec.use_fast_variance,
        "arrays": {"scale": _flat(spec.scale), "bias": _flat(spec.bias)},
    }
    if not isinstance(spec, specs.RMSNorm):
        options |= {"use_bias": spec.bias is not None, "bias_init": empty}
    return options


def _norm_dtype(spec: Any, ctx: Building) -> Any:
    """The one dtype that this framework has for the operands and for the result."""
    if spec.compute_dtype == spec.output_dtype or specs.is_wide(spec.output_dtype):
        return spec.output_dtype
    return ctx.refuse(
        "output_dtype",
        spec.output_dtype,
        "nnx would cast the input to it before taking statistics, not only the result",
    )


@adapter.reads(
    nnx.LayerNorm,
    specs.LayerNorm,
    state=("scale", "bias"),
)
@adapter.reads(
    nnx.RMSNorm,
    specs.RMSNorm,
    state=("scale",),
)
def read_layer_norm(
    m: nnx.LayerNorm | nnx.RMSNorm, ctx: Reading
) -> specs.LayerNorm | specs.RMSNorm:
    reduction_axes = _axes(m.reduction_axes, "reduction_axes", ctx)
    feature_axes = _axes(m.feature_axes, "feature_axes", ctx)
    return (specs.RMSNorm if isinstance(m, nnx.RMSNorm) else specs.LayerNorm)(
        **_norm_fields(m, ctx),
        # of several axes only the product of their sizes is kept
        feature_shape=(m.num_features,) if len(feature_axes) == 1 else None,
        reduction_axes=tuple(sorted({*reduction_axes})),
        feature_axes=tuple(sorted({*feature_axes})),
    )


def _axes(axes: Any, option: str, ctx: Reading) -> tuple[int, ...]:
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    if any(axis >= 0 for axis in axes):
        ctx.refuse(
            option,
            axes,
            "non-negative axes count batch axes, which are not known here",
            "Count the axes from the end",
        )
    return axes


_AXES = ("leading_shape", "reduction_axes", "feature_axes")


_NORM = ("axis_name", "axis_index_groups", "compute_dtype", "output_dtype")


@adapter.builds(specs.LayerNorm, carries=(*_AXES, *_NORM))
@adapter.builds(specs.RMSNorm, carries=(*_AXES, *_NORM))
def build_layer_norm(spec: specs.LayerNorm | specs.RMSNorm, ctx: Building) -> Any:
    arrays = [array for array in (spec.scale, spec.bias) if array is not None]
    shape = arrays[0].shape if arrays else spec.feature_shape
    if shape is None:
        shape = spec.sized(ctx.require_shape(-spec.feature_axes[0])).feature_shape
    features = math.prod(shape or ())
    return made(
        nnx.RMSNorm if isinstance(spec, specs.RMSNorm) else nnx.LayerNorm,
        features,
        reduction_axes=spec.reduction_axes,
        feature_axes=spec.feature_axes,
        **_norm_options(spec, ctx),
    )


def _flat(array: Any) -> Any:
    return array if array is None or array.ndim == 1 else array.reshape(-1)


@adapter.reads(
    nnx.GroupNorm,
    specs.GroupNorm,
    state=("scale", "bias"),
)
def read_group_norm(m: nnx.GroupNorm, ctx: Reading) -> specs.GroupNorm:
    axes = m.reduction_axes
    return specs.GroupNorm(
        **_norm_fields(m, ctx),
        num_groups=m.num_groups,
        features=m.num_groups * m.group_size,
        reduction_axes=group_axes(axes, ctx),
        repeat_axis=-1 if axes is None else 1,
    )


def group_axes(axes: Any, ctx: Reading) -> tuple[int, ...] | None:
    """The axes that a GroupNorm reduces beside that of the features, or None for all."""
    if axes is None:
        return None
    axes = tuple(sorted(_axes(axes, "reduction_axes", ctx)))
    if axes[-1] != -1:
        ctx.refuse("reduction_axes", axes, "-1, the axis of the features, must be among them")
    return axes[:-1]


@adapter.builds(specs.GroupNorm, carries=(*_NORM, "reduction_axes", "repeat_axis"))
def build_group_norm(spec: specs.GroupNorm, ctx: Building) -> nnx.GroupNorm:
    features, axes = spec.features or ctx.require_shape()[-1], spec.reduction_axes
    if spec.repeat_axis != (-1 if axes is None else 1):
        ctx.refuse("reduction_axes", axes, "nnx repeats the statistics along axis 1")
    return made(
        nnx.GroupNorm,
        features,
        spec.num_groups,
        reduction_axes=None if axes is None else (*axes, -1),
        **_norm_options(spec, ctx),
    )


def check_last(axes: Any, ctx: Reading) -> None:
    """Refuse the feature axes of an InstanceNorm but for the last one."""
    if axes not in (-1, (-1,), [-1]):
        ctx.refuse("feature_axes", axes, "only -1 converts")


@adapter.reads(
    nnx.InstanceNorm,
    specs.GroupNorm,
    state=("scale", "bias"),
)
def read_instance_norm(m: nnx.InstanceNorm, ctx: Reading) -> specs.GroupNorm:
    check_last(m.feature_axes, ctx)
    return specs.GroupNorm(
        **_norm_fields(m, ctx), num_groups=m.num_features, features=m.num_features
    )


@adapter.reads(
    nnx.BatchNorm,
    specs.BatchNorm,
    state=("scale", "bias", "mean", "var"),
)
def read_batch_norm(m: nnx.BatchNorm, ctx: Reading) -> specs.BatchNorm:
    (axis,) = _axes(m.axis, "axis", ctx)
    fields, mean = _norm_fields(m, ctx), array_of(m, ctx, "mean", nnx.BatchStat)
    if m.dtype is None:
        fields["output_dtype"] = specs.promoted_dtype(mean, fields["scale"], fields["bias"])
    return specs.BatchNorm(
        **fields,
        mean=mean,
        var=array_of(m, ctx, "var", nnx.BatchStat),
        momentum=m.momentum,
        spatial_dims=None,
        axis=axis,
    )


@adapter.builds(specs.BatchNorm, carries=("axis", *_NORM))
def build_batch_norm(spec: specs.BatchNorm, ctx: Building) -> nnx.BatchNorm:
    promoted = specs.promoted_dtype(spec.mean, spec.scale, spec.bias)
    if spec.output_dtype is None and promoted is not None:
        ctx.refuse("dtype", None, f"nnx returns {promoted} for a half-precision input")
    options = _norm_options(spec, ctx)
    options["arrays"] |= {"mean": spec.mean, "var": spec.var}
    return made(
        nnx.BatchNorm,
        *spec.mean.shape,
        use_running_average=True,
        axis=spec.axis,
        momentum=spec.momentum,
        **options,
    )
