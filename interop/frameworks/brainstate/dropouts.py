"""Layers that drop a part of their input in training."""

from __future__ import annotations

from typing import Any

import brainstate
from brainstate import nn

from ... import formulas, specs
from ...walk import Building, Reading
from .adapter import adapter

_OF_CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@adapter.reads(nn.Dropout, specs.Dropout)
def read_dropout(m: nn.Dropout, ctx: Reading) -> specs.Dropout:
    return specs.Dropout(
        rate=formulas.complement(m.prob),
        broadcast_dims=tuple(m.broadcast_dims),
        rng_collection="dropout",
    )


@adapter.reads(nn.Dropout1d, specs.Dropout)
@adapter.reads(nn.Dropout2d, specs.Dropout)
@adapter.reads(nn.Dropout3d, specs.Dropout)
def read_dropout_of_channels(
    m: nn.Dropout1d | nn.Dropout2d | nn.Dropout3d, ctx: Reading
) -> specs.Dropout:
    channels = m.channel_axis % m.minimal_dim - m.minimal_dim
    return specs.Dropout(
        rate=formulas.complement(m.prob),
        broadcast_dims=tuple(axis for axis in range(-m.minimal_dim, 0) if axis != channels),
        rng_collection="dropout",
    )


@adapter.builds(specs.Dropout, carries=("broadcast_dims",))
def build_dropout(spec: specs.Dropout, ctx: Building) -> Any:
    if spec.rate == 1.0:
        ctx.refuse("rate", 1.0, "BrainState's own layer has a gradient of nan")
    prob, dims = formulas.complement(spec.rate), len(spec.broadcast_dims)
    is_of_channels = ctx.shape is not None and len(ctx.shape) == dims + 1
    if is_of_channels and 1 <= dims <= 3 and spec.channel_axis is not None:
        return _OF_CHANNELS[dims - 1](prob, channel_axis=spec.channel_axis)
    return nn.Dropout(prob, broadcast_dims=spec.broadcast_dims)


@adapter.reads(nn.AlphaDropout, specs.AlphaDropout)
def read_alpha_dropout(m: nn.AlphaDropout, ctx: Reading) -> specs.AlphaDropout:
    return specs.AlphaDropout(rate=formulas.complement(m.prob))


@adapter.reads(nn.FeatureAlphaDropout, specs.AlphaDropout)
def read_feature_alpha_dropout(m: nn.FeatureAlphaDropout, ctx: Reading) -> specs.AlphaDropout:
    return specs.AlphaDropout(rate=formulas.complement(m.prob), channel_axis=m.channel_axis)


@adapter.builds(specs.AlphaDropout, carries=("channel_axis",))
def build_alpha_dropout(
    spec: specs.AlphaDropout, ctx: Building
) -> nn.AlphaDropout | nn.FeatureAlphaDropout:
    if spec.rate == 1.0:
        ctx.refuse("rate", 1.0, "BrainState divides by the probability to keep")
    prob = formulas.complement(spec.rate)
    if spec.channel_axis is None:
        return nn.AlphaDropout(prob)
    return nn.FeatureAlphaDropout(prob, channel_axis=spec.channel_axis)


@adapter.reads(nn.DropoutFixed, specs.DropoutFixed, state=("mask",))
def read_dropout_fixed(m: Any, ctx: Reading) -> specs.DropoutFixed:
    mask = getattr(m, "mask", None)
    return specs.DropoutFixed(
        rate=formulas.complement(m.prob),
        in_size=tuple(m.in_size),
        mask=None if mask is None else mask.value,
    )


@adapter.builds(specs.DropoutFixed)
def build_dropout_fixed(spec: specs.DropoutFixed, ctx: Building) -> nn.DropoutFixed:
    if spec.rate == 1.0:
        ctx.refuse("rate", 1.0, "BrainState's own layer has a gradient of nan")
    layer = nn.DropoutFixed(spec.in_size, formulas.complement(spec.rate))
    if spec.mask is not None:
        layer.mask = brainstate.ShortTermState(spec.mask)
    return layer
