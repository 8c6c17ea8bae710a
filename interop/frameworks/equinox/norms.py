"""Normalisations."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from ... import specs
from ...walk import Building, Reading
from .adapter import Node, adapter, make


@adapter.reads(eqx.nn.LayerNorm, specs.LayerNorm)
@adapter.reads(eqx.nn.RMSNorm, specs.RMSNorm)
def read_layer_norm(node: Node, ctx: Reading) -> specs.LayerNorm | specs.RMSNorm:
    m, is_rms = node.module, isinstance(node.module, eqx.nn.RMSNorm)
    axes = tuple(range(-len(m.shape), 0))
    return (specs.RMSNorm if is_rms else specs.LayerNorm)(
        scale=m.weight,
        bias=m.bias,
        epsilon=m.eps,
        use_fast_variance=is_rms,  # which has no variance: the default
        feature_shape=m.shape,
        reduction_axes=axes,
        feature_axes=axes,
    )


def _check_output_dtype(spec: Any, ctx: Building) -> None:
    if spec.output_dtype not in (None, jnp.dtype(jnp.float32), jnp.dtype(jnp.float64)):
        ctx.refuse("output_dtype", spec.output_dtype, "Equinox returns the input's dtype")


_NORM = ("reduction_axes", "feature_axes", "output_dtype")


@adapter.builds(specs.LayerNorm, carries=_NORM)
@adapter.builds(specs.RMSNorm, carries=(*_NORM, "bias"))
def build_layer_norm(spec: specs.LayerNorm | specs.RMSNorm, ctx: Building) -> Any:
    _check_output_dtype(spec, ctx)
    trailing = tuple(range(-len(spec.feature_axes), 0))
    if spec.feature_axes != trailing or tuple(sorted(spec.reduction_axes)) != trailing:
        ctx.refuse(
            "reduction_axes",
            spec.reduction_axes,
            f"Equinox normalises and scales the same trailing axes (feature_axes="
            f"{spec.feature_axes})",
        )
    if spec.feature_shape is None:
        spec = spec.sized(ctx.require_shape(-spec.feature_axes[0]))
    shape = spec.feature_shape or ()
    if not ctx.fits(len(shape)):
        ctx.refuse("in_size", ctx.shape, f"Equinox normalises whole examples of shape {shape}")
    return make(
        eqx.nn.RMSNorm if isinstance(spec, specs.RMSNorm) else eqx.nn.LayerNorm,
        shape=tuple(shape),
        eps=spec.epsilon,
        use_weight=spec.scale is not None,
        use_bias=spec.bias is not None,
        weight=spec.scale,
        bias=spec.bias,
    )


@adapter.reads(eqx.nn.GroupNorm, specs.GroupNorm)
def read_group_norm(node: Node, ctx: Reading) -> specs.GroupNorm:
    m = node.module
    return specs.GroupNorm(
        scale=m.weight,
        bias=m.bias,
        epsilon=m.eps,
        use_fast_variance=False,
        num_groups=m.groups,
        features=m.channels,
    )


def _check_affine(spec: Any, ctx: Building) -> None:
    if (spec.scale is None) != (spec.bias is None):
        ctx.refuse("scale, bias", "one of two", "Equinox has both or neither")


@adapter.builds(specs.GroupNorm, carries=("output_dtype",))
def build_group_norm(spec: specs.GroupNorm, ctx: Building) -> eqx.nn.GroupNorm:
    _check_output_dtype(spec, ctx)
    _check_affine(spec, ctx)
    return make(
        eqx.nn.GroupNorm,
        groups=spec.num_groups,
        channels=spec.features,
        eps=spec.epsilon,
        channelwise_affine=spec.scale is not None,
        weight=spec.scale,
        bias=spec.bias,
    )


@adapter.reads(eqx.nn.BatchNorm, specs.BatchNorm)
def read_batch_norm(node: Node, ctx: Reading) -> specs.BatchNorm:
    m: Any = node.module
    state: Any = node.state
    if not isinstance(m.axis_name, str):
        ctx.refuse("axis_name", m.axis_name, "only one name, that of the batch axis, converts")
    if m.mode == "ema":
        (mean, var), is_first = (
            state.get(index) for index in (m.ema_state_index, m.ema_first_time_index)
        )
    else:
        mean, var = state.get(m.batch_state_index)
        counter = state.get(m.batch_counter)
        debias = jnp.where(counter == 0, 1.0, 1.0 - m.momentum**counter).astype(mean.dtype)
        mean, var, is_first = mean / debias, var / debias, None
    return specs.BatchNorm(
        scale=m.weight,
        bias=m.bias,
        mean=mean,
        var=var,
        uses_running=m.mode == "ema",
        is_first=is_first,
        momentum=m.momentum,
        epsilon=m.eps,
        use_fast_variance=False,
        spatial_dims=None,
        output_dtype=specs.promoted_dtype(mean, m.weight, m.bias),
    )


# After so many steps the debiasing is 1 to the last bit, so that the statistics are stored as
# the other frameworks have them. An int32, with room for as many steps again.
_SETTLED = 2**30


@adapter.builds(specs.BatchNorm, carries=("output_dtype", "uses_running", "is_first"))
def build_batch_norm(spec: specs.BatchNorm, ctx: Building) -> eqx.nn.BatchNorm:
    _check_output_dtype(spec, ctx)
    _check_affine(spec, ctx)
    promoted = specs.promoted_dtype(spec.mean, spec.scale, spec.bias)
    if spec.output_dtype is None and promoted is not None:
        ctx.refuse("dtype", None, f"Equinox returns {promoted} for a half-precision input")
    if spec.uses_running != (spec.is_first is not None):
        ctx.refuse("uses_running", spec.uses_running, "Equinox has both or neither")
    if not (spec.uses_running or 0 <= np.float32(spec.momentum) < 1):
        ctx.refuse("momentum", spec.momentum, "Equinox divides by 1 - momentum**counter")
    counts = {"batch": jnp.array(_SETTLED), "ema": spec.is_first}
    mode = "ema" if spec.uses_running else "batch"
    count, statistics = map(eqx.nn.StateIndex, (counts[mode], (spec.mean, spec.var)))
    is_ema = spec.uses_running
    return make(
        eqx.nn.BatchNorm,
        weight=spec.scale,
        bias=spec.bias,
        ema_first_time_index=count if is_ema else None,
        ema_state_index=statistics if is_ema else None,
        batch_counter=None if is_ema else count,
        batch_state_index=None if is_ema else statistics,
        axis_name="batch",
        inference=True,
        input_size=spec.mean.shape[0],
        eps=spec.epsilon,
        channelwise_affine=spec.scale is not None,
        momentum=spec.momentum,
        mode=mode,
    )
