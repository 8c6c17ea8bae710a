"""Normalisations."""

from __future__ import annotations

import dataclasses
from typing import Any

import brainstate
import jax.numpy as jnp
import numpy as np
from brainstate import nn

from ... import specs
from ...walk import Building, Reading
from .adapter import NormParamState, adapter, arrays_of, empty, made, real, reshape


@adapter.reads(nn.LayerNorm, specs.LayerNorm, state=("weight",))
@adapter.reads(nn.RMSNorm, specs.RMSNorm, state=("scale",))
def read_layer_norm(m: Any, ctx: Reading) -> specs.LayerNorm | specs.RMSNorm:
    ndim, is_rms = len(m.in_size), isinstance(m, nn.RMSNorm)
    reduction_axes = tuple(m.reduction_axes)
    if any(axis >= 0 for axis in reduction_axes):
        ctx.refuse(
            "reduction_axes",
            reduction_axes,
            "non-negative axes count batch axes, which are not known here",
            "Count the axes from the end",
        )
    feature_axes = sorted(m.feature_axes)
    feature_shape = tuple(m.in_size[axis] for axis in feature_axes)
    state = "scale" if is_rms else "weight"
    arrays = arrays_of(m, ctx, state, scale=feature_shape, bias=feature_shape)
    return (specs.RMSNorm if is_rms else specs.LayerNorm)(
        **_norm_fields(m, arrays),
        feature_shape=feature_shape,
        leading_shape=tuple(m.in_size[: feature_axes[0]]),
        reduction_axes=tuple(sorted(reduction_axes)),
        feature_axes=tuple(axis - ndim for axis in feature_axes),
    )


def _norm_fields(m: Any, arrays: Any) -> dict[str, Any]:
    """What every normalisation layer holds."""
    return {
        "scale": arrays.get("scale"),
        "bias": arrays.get("bias"),
        "epsilon": real(m.epsilon),
        "use_fast_variance": m.use_fast_variance,
        "axis_name": m.axis_name,
        "axis_index_groups": m.axis_index_groups,
        "output_dtype": specs.dtype(m.dtype),
    }


def _norm_options(spec: Any) -> dict[str, Any]:
    return {
        "epsilon": spec.epsilon,
        "axis_name": spec.axis_name,
        "axis_index_groups": spec.axis_index_groups,
        "use_fast_variance": spec.use_fast_variance,
    }


def _affine_options(spec: Any) -> dict[str, Any]:
    return {
        "use_scale": spec.scale is not None,
        "use_bias": spec.bias is not None,
        "scale_init": spec.scale,
        "bias_init": spec.bias,
    }


def _check_output_dtype(spec: Any, ctx: Building) -> None:
    if spec.scale is None and spec.bias is None and spec.output_dtype is None:
        ctx.refuse(
            "use_scale, use_bias",
            False,
            "without them BrainState returns float32 whatever the input's dtype",
            "Give the layer a dtype, such as dtype=jnp.float32",
        )


_AXES = ("leading_shape", "reduction_axes", "feature_axes")


_NORM = ("axis_name", "axis_index_groups", "output_dtype")


@adapter.builds(specs.LayerNorm, carries=(*_AXES, *_NORM))
def build_layer_norm(spec: specs.LayerNorm, ctx: Building) -> Any:
    _check_output_dtype(spec, ctx)
    spec = (
        spec
        if spec.feature_shape is not None
        else spec.sized(ctx.require_shape(-spec.feature_axes[0]))
    )
    in_size: Any = (*spec.leading_shape, *(spec.feature_shape or ()))
    if spec.feature_axes != tuple(range(-len(spec.feature_axes), 0)):
        if ctx.shape is None:
            ctx.refuse("feature_axes", spec.feature_axes, "the sizes of the rest are not known")
        in_size, spec = ctx.shape, _with_ones(spec)
    affine = _affine_options(spec)
    if isinstance(spec, specs.RMSNorm):
        affine = {"use_scale": affine["use_scale"], "scale_init": spec.scale}
    layer: Any = (nn.RMSNorm if isinstance(spec, specs.RMSNorm) else nn.LayerNorm)(
        in_size,
        reduction_axes=spec.reduction_axes,
        feature_axes=spec.feature_axes,
        **affine,
        **_norm_options(spec),
    )
    layer.dtype = spec.output_dtype  # the constructor takes None for the default dtype
    return layer


@adapter.builds(specs.RMSNorm, carries=(*_AXES, *_NORM, "bias"))
def build_rms_norm(spec: specs.RMSNorm, ctx: Building) -> Any:
    """One layer; with a bias two, as BrainState's has none."""
    if spec.bias is None:
        return build_layer_norm(spec, ctx)
    if spec.scale is None or not specs.is_wide(spec.bias.dtype):
        ctx.refuse(
            "use_bias",
            True,
            "BrainState's RMSNorm has no bias, and a layer after it would have another dtype "
            "or one more weight",
            "Build it with use_bias=False",
        )
    norm = dataclasses.replace(
        spec, scale=None, bias=None, output_dtype=spec.output_dtype or spec.bias.dtype
    )
    scale: Any = spec.scale
    affine = nn.OneToOne(spec.bias.shape, w_init=scale, b_init=spec.bias)
    return nn.Sequential(build_layer_norm(norm, ctx), affine)


def read_rms_norm_with_bias(norm: Any, affine: Any, ctx: Reading) -> Any:
    """What :func:`build_rms_norm` makes of a normalisation with a bias."""
    arrays = arrays_of(affine, ctx, weight=tuple(affine.in_size), bias=tuple(affine.in_size))
    spec = read_layer_norm(norm, ctx)
    if spec.scale is not None or "bias" not in arrays or affine.in_size != spec.feature_shape:
        ctx.refuse("OneToOne", affine, "only one that scales and shifts an RMSNorm converts")
    own: Any = spec.output_dtype
    dtype = jnp.promote_types(own, arrays["weight"].dtype)
    return dataclasses.replace(
        spec, scale=arrays["weight"], bias=arrays["bias"], output_dtype=jnp.dtype(dtype)
    )


def _with_ones(spec: Any) -> Any:
    """The norm with its arrays as BrainState has them: with a 1 for each axis between."""
    axes = range(spec.feature_axes[0], 0)
    sizes = dict(zip(spec.feature_axes, spec.feature_shape, strict=True))
    shape = tuple(sizes.get(axis, 1) for axis in axes)
    scale, bias = reshape(spec.scale, shape), reshape(spec.bias, shape)
    return dataclasses.replace(spec, scale=scale, bias=bias)


@adapter.reads(nn.GroupNorm, specs.GroupNorm, state=("weight",))
def read_group_norm(m: nn.GroupNorm, ctx: Reading) -> specs.GroupNorm:
    features, axes = m.num_groups * m.group_size, m.reduction_axes
    if axes is not None and axes[-1] != -1:
        ctx.refuse("reduction_axes", axes, "the last one must be -1, that of the features")
    arrays = arrays_of(m, ctx, scale=(features,), bias=(features,))
    fields = _norm_fields(m, arrays)
    if not arrays and m.dtype is None:  # it then has that of the statistics
        if jnp.result_type(float) != jnp.float32:
            ctx.refuse("dtype", None, "the result is float32 or wider", "Give it a dtype")
        fields["output_dtype"] = jnp.dtype(jnp.float32)
    return specs.GroupNorm(
        **fields,
        num_groups=m.num_groups,
        features=features,
        reduction_axes=None if axes is None else tuple(axes[:-1]),
        repeat_axis=-1 if axes is None else 1,
    )


@adapter.builds(specs.GroupNorm, carries=(*_NORM, "reduction_axes", "repeat_axis"))
def build_group_norm(spec: specs.GroupNorm, ctx: Building) -> nn.GroupNorm:
    _check_output_dtype(spec, ctx)
    axes = spec.reduction_axes
    if spec.repeat_axis != (-1 if axes is None else 1):
        ctx.refuse("reduction_axes", axes, "BrainState repeats the statistics along axis 1")
    return nn.GroupNorm(
        (spec.features or ctx.require_shape()[-1],),
        num_groups=spec.num_groups,
        dtype=spec.output_dtype,
        reduction_axes=None if axes is None else (*axes, -1),
        **_affine_options(spec),
        **_norm_options(spec),
    )


@adapter.reads(nn.BatchNorm0d, specs.BatchNorm, state=("weight", "running_mean", "running_var"))
@adapter.reads(nn.BatchNorm1d, specs.BatchNorm, state=("weight", "running_mean", "running_var"))
@adapter.reads(nn.BatchNorm2d, specs.BatchNorm, state=("weight", "running_mean", "running_var"))
@adapter.reads(nn.BatchNorm3d, specs.BatchNorm, state=("weight", "running_mean", "running_var"))
def read_batch_norm(m: Any, ctx: Reading) -> specs.BatchNorm:
    if not m.track_running_stats:
        ctx.refuse("track_running_stats", False, "BrainState then does not normalise at all")
    if len(m.feature_axes) != 1:
        ctx.refuse("feature_axis", m.feature_axes, "only one feature axis converts")
    for name in ("running_mean", "running_var"):
        if type(getattr(m, name)) is not brainstate.BatchState:
            ctx.refuse(
                "mean_type", type(getattr(m, name)).__qualname__, "only BatchState converts"
            )
    (axis,) = m.feature_axes
    features = (m.in_size[axis],)
    arrays = arrays_of(m, ctx, scale=features, bias=features)
    return specs.BatchNorm(
        **_norm_fields(m, arrays),
        mean=reshape(m.running_mean.value, features),
        var=reshape(m.running_var.value, features),
        momentum=real(m.momentum),
        spatial_dims=m.num_spatial_dims,
        axis=axis - len(m.in_size),
    )


_BATCH_NORMS = (nn.BatchNorm0d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


# Not axis: with any but the last, training gives BrainState's statistics a wrong shape.
@adapter.builds(specs.BatchNorm, carries=_NORM)
def build_batch_norm(spec: specs.BatchNorm, ctx: Building) -> Any:
    (features,) = spec.mean.shape
    if (spec.scale is None) != (spec.bias is None):
        ctx.refuse("scale, bias", "one of two", "BrainState has both or neither")
    _check_output_dtype(spec, ctx)
    shape = ctx.shape if ctx.shape or spec.spatial_dims != 0 else (features,)
    shape = shape or ctx.require_shape()
    if len(shape) > len(_BATCH_NORMS) or spec.spatial_dims not in (None, len(shape) - 1):
        ctx.refuse("sample_input", shape, "it must have one channel axis and 0 to 3 others")
    state_shape = (*[1] * (len(shape) - 1), features)
    scale, bias, mean, var = (
        reshape(array, state_shape) for array in (spec.scale, spec.bias, spec.mean, spec.var)
    )
    layer = made(
        _BATCH_NORMS[len(shape) - 1],
        shape,
        **_norm_options(spec),
        momentum=spec.momentum,
        affine=scale is not None,
        scale_initializer=empty,
        bias_initializer=empty,
        dtype=np.float32,  # in which momentum and epsilon are kept
    )
    layer.dtype = spec.output_dtype
    layer.scale_initializer, layer.bias_initializer = scale, bias
    layer.running_mean, layer.running_var = map(brainstate.BatchState, (mean, var))
    if scale is not None:
        layer.weight = NormParamState({"bias": bias, "scale": scale})
    return layer
