"""Normalisations."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from ... import specs
from ...walk import Building, Reading
from ..nnx.norms import check_last, group_axes
from .adapter import Node, adapter, node_of
from .variables import axes_of


def _norm_fields(node: Node) -> dict[str, Any]:
    """What every normalisation layer holds."""
    m = node.module
    return {
        "scale": node.array("scale"),
        "bias": node.array("bias"),
        "epsilon": m.epsilon,
        "use_fast_variance": m.use_fast_variance,
        "axis_name": m.axis_name,
        "axis_index_groups": m.axis_index_groups,
        "output_dtype": specs.dtype(m.dtype),
        "force_float32": m.force_float32_reductions,
    }


def _norm_options(spec: Any) -> dict[str, Any]:
    options = {
        "epsilon": spec.epsilon,
        "dtype": spec.output_dtype,
        "param_dtype": specs.common_dtype(spec.scale, spec.bias),
        "use_scale": spec.scale is not None,
        "axis_name": spec.axis_name,
        "axis_index_groups": spec.axis_index_groups,
        "use_fast_variance": spec.use_fast_variance,
        "force_float32_reductions": spec.force_float32,
    }
    has_bias = {} if isinstance(spec, specs.RMSNorm) else {"use_bias": spec.bias is not None}
    return options | has_bias


def _from_the_end(axes: Any, option: str, ctx: Reading) -> tuple[int, ...]:
    if any(axis >= 0 for axis in axes_of(axes)):
        ctx.refuse(
            option,
            axes,
            "non-negative axes count batch axes, which are not known here",
            "Count the axes from the end",
        )
    return axes_of(axes)


@adapter.reads(nn.LayerNorm, specs.LayerNorm)
@adapter.reads(nn.RMSNorm, specs.RMSNorm)
def read_layer_norm(node: Node, ctx: Reading) -> specs.LayerNorm | specs.RMSNorm:
    m = node.module
    return (specs.RMSNorm if isinstance(m, nn.RMSNorm) else specs.LayerNorm)(
        **_norm_fields(node),
        feature_shape=_shape(node),
        reduction_axes=tuple(sorted({*_from_the_end(m.reduction_axes, "reduction_axes", ctx)})),
        feature_axes=tuple(sorted({*_from_the_end(m.feature_axes, "feature_axes", ctx)})),
    )


def _shape(node: Node) -> tuple[int, ...] | None:
    """The shape of scale and bias, or None where there is neither."""
    arrays = (node.array("scale"), node.array("bias"))
    return next((array.shape for array in arrays if array is not None), None)


def unpack(axes: tuple[int, ...]) -> int | tuple[int, ...]:
    """A single axis as users write it: Linen modules compare by their options."""
    return axes[0] if len(axes) == 1 else axes


_AXES = ("leading_shape", "reduction_axes", "feature_axes")


_NORM = ("axis_name", "axis_index_groups", "output_dtype", "force_float32")


@adapter.builds(specs.LayerNorm, carries=(*_AXES, *_NORM))
@adapter.builds(specs.RMSNorm, carries=(*_AXES, *_NORM))
def build_layer_norm(spec: specs.LayerNorm | specs.RMSNorm, ctx: Building) -> Node:
    if spec.feature_shape is None and len(spec.feature_axes) > 1 and spec.holds_state:
        spec = spec.sized(ctx.require_shape(-spec.feature_axes[0]))
    module = (nn.RMSNorm if isinstance(spec, specs.RMSNorm) else nn.LayerNorm)(
        reduction_axes=unpack(spec.reduction_axes),
        feature_axes=unpack(spec.feature_axes),
        **_norm_options(spec),
    )
    return node_of(module, {"scale": spec.scale, "bias": spec.bias})


@adapter.reads(nn.GroupNorm, specs.GroupNorm)
def read_group_norm(node: Node, ctx: Reading) -> specs.GroupNorm:
    m, (features,) = node.module, _shape(node) or (None,)
    num_groups = m.num_groups
    if num_groups is None:
        if features is None:
            ctx.refuse(
                "group_size",
                m.group_size,
                "without arrays the number of features is not known",
                "Give num_groups instead",
            )
        num_groups = features // m.group_size
    axes = group_axes(m.reduction_axes, ctx)
    fields = _norm_fields(node)
    return specs.GroupNorm(
        **fields, num_groups=num_groups, features=features, reduction_axes=axes
    )


@adapter.reads(nn.InstanceNorm, specs.GroupNorm)
def read_instance_norm(node: Node, ctx: Reading) -> specs.GroupNorm:
    check_last(node.module.feature_axes, ctx)
    (features,) = _shape(node) or (0,)
    if not features:
        ctx.refuse("use_scale, use_bias", False, "without them the features are not known")
    return specs.GroupNorm(**_norm_fields(node), num_groups=features, features=features)


@adapter.builds(specs.GroupNorm, carries=(*_NORM, "reduction_axes", "repeat_axis"))
def build_group_norm(spec: specs.GroupNorm, ctx: Building) -> Node:
    axes = spec.reduction_axes
    if spec.repeat_axis != -1:
        ctx.refuse("reduction_axes", axes, "linen repeats the statistics along the groups")
    axes = None if axes is None else (*axes, -1)
    module = nn.GroupNorm(spec.num_groups, reduction_axes=axes, **_norm_options(spec))
    return node_of(module, {"scale": spec.scale, "bias": spec.bias})


@adapter.reads(nn.BatchNorm, specs.BatchNorm)
def read_batch_norm(node: Node, ctx: Reading) -> specs.BatchNorm:
    m = node.module
    (axis,) = _from_the_end(m.axis, "axis", ctx)
    return specs.BatchNorm(
        **_norm_fields(node),
        mean=node.array("mean", "batch_stats"),
        var=node.array("var", "batch_stats"),
        momentum=m.momentum,
        spatial_dims=None,
        axis=axis,
    )


@adapter.builds(specs.BatchNorm, carries=("axis", *_NORM))
def build_batch_norm(spec: specs.BatchNorm, ctx: Building) -> Node:
    module = nn.BatchNorm(
        use_running_average=not ctx.options.get("train", False),
        axis=spec.axis,
        momentum=spec.momentum,
        **_norm_options(spec),
    )
    return node_of(
        module,
        {"scale": spec.scale, "bias": spec.bias},
        batch_stats={"mean": spec.mean, "var": spec.var},
    )
