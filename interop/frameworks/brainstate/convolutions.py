"""Convolutions."""

from __future__ import annotations

from typing import Any

import brainstate
import numpy as np
from brainstate import nn

from ... import specs
from ...errors import ArgumentError
from ...walk import Building, Reading
from .adapter import adapter, arrays_of, check_one_dtype, empty, made, reshape

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


_SCALED = (nn.ScaledWSConv1d, nn.ScaledWSConv2d, nn.ScaledWSConv3d)


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@adapter.reads(nn.Conv1d, specs.Conv, state=("weight",))
@adapter.reads(nn.Conv2d, specs.Conv, state=("weight",))
@adapter.reads(nn.Conv3d, specs.Conv, state=("weight",))
def read_conv(m: nn.Conv1d | nn.Conv2d | nn.Conv3d, ctx: Reading) -> specs.Conv:
    return specs.Conv(**_input_dilation(m), **_conv_fields(m, ctx))


@adapter.reads(nn.ScaledWSConv1d, specs.ScaledWSConv, state=("weight",))
@adapter.reads(nn.ScaledWSConv2d, specs.ScaledWSConv, state=("weight",))
@adapter.reads(nn.ScaledWSConv3d, specs.ScaledWSConv, state=("weight",))
def read_scaled_conv(
    m: nn.ScaledWSConv1d | nn.ScaledWSConv2d | nn.ScaledWSConv3d, ctx: Reading
) -> specs.ScaledWSConv:
    gain = arrays_of(m, ctx, **_conv_shapes(m)).get("gain")
    fields = _input_dilation(m) | _conv_fields(m, ctx)
    return specs.ScaledWSConv(gain=gain, epsilon=m.eps, **fields)


@adapter.reads(nn.ConvTranspose1d, specs.ConvTranspose, state=("weight",))
@adapter.reads(nn.ConvTranspose2d, specs.ConvTranspose, state=("weight",))
@adapter.reads(nn.ConvTranspose3d, specs.ConvTranspose, state=("weight",))
def read_conv_transpose(
    m: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d, ctx: Reading
) -> specs.ConvTranspose:
    fields = _conv_fields(m, ctx)
    mask = fields["mask"]
    fields["weight"] = specs.flipped(fields["weight"])
    fields["mask"] = mask if mask is None else specs.flipped(mask)
    return specs.ConvTranspose(**fields)


def _conv_shapes(m: Any) -> dict[str, Any]:
    out = (m.out_channels,)
    return {"weight": m.kernel_shape, "bias": out, "gain": out}


def _conv_fields(m: Any, ctx: Reading) -> dict[str, Any]:
    """What all convolutions have; the kernel as the layer has it."""
    arrays, mask = arrays_of(m, ctx, **_conv_shapes(m)), m.w_mask
    weight, bias = arrays["weight"], arrays.get("bias")
    check_one_dtype(weight, bias, ctx)
    shape = tuple(m.in_size)
    return {
        "weight": weight,
        "bias": bias,
        "strides": m.stride,
        "padding": m.padding,
        "kernel_dilation": m.rhs_dilation,
        "groups": m.groups,
        "in_shape": specs.move_channels(shape, to_first=False) if m.channel_first else shape,
        "mask": mask if mask is None else np.broadcast_to(mask, m.kernel_shape),
        "channels_first": m.channel_first,
    }


def _input_dilation(m: Any) -> dict[str, Any]:
    return {"input_dilation": None if set(m.lhs_dilation) == {1} else m.lhs_dilation}


_CONV = ("input_dilation", "mask", "channels_first")


@adapter.builds(specs.Conv, carries=_CONV)
def build_conv(spec: specs.Conv, ctx: Building) -> Any:
    dilation = spec.input_dilation or 1
    return _build_conv(_CONVS, spec, spec.weight, ctx, lhs_dilation=dilation)


@adapter.builds(specs.ScaledWSConv, carries=_CONV)
def build_scaled_conv(spec: specs.ScaledWSConv, ctx: Building) -> Any:
    options = {"lhs_dilation": spec.input_dilation or 1, "ws_gain": spec.gain is not None}
    layer = _build_conv(_SCALED, spec, spec.weight, ctx, eps=spec.epsilon, **options)
    if spec.gain is not None:
        gain = reshape(spec.gain, (*[1] * (spec.dims + 1), spec.gain.shape[0]))
        layer.weight.value = {**layer.weight.value, "gain": gain}
    return layer


@adapter.builds(specs.ConvTranspose, carries=("mask", "channels_first"))
def build_conv_transpose(spec: specs.ConvTranspose, ctx: Building) -> Any:
    mask = spec.mask if spec.mask is None else specs.flipped(spec.mask)
    return _build_conv(_TRANSPOSED, spec, specs.flipped(spec.weight), ctx, w_mask=mask)


def _build_conv(classes: Any, spec: Any, weight: Any, ctx: Building, **options: Any) -> Any:
    """The layer of that class which has so many axes of space; ``options`` go before."""
    check_one_dtype(spec.weight, spec.bias, ctx)
    if spec.dims > len(classes):
        ctx.refuse("kernel_size", spec.kernel, "BrainState has 1 to 3 axes")
    shape = _example_shape(spec, ctx)
    out = spec.weight.shape[-1]
    ones = [1] * spec.dims
    named = {
        "stride": spec.strides,
        "padding": spec.pads(shape) if spec.padding == "SAME_LOWER" else spec.padding,
        "rhs_dilation": spec.kernel_dilation,
        "groups": spec.groups,
        "w_mask": spec.mask,
        "channel_first": spec.channels_first,
        "w_init": empty,
        "b_init": None if spec.bias is None else empty,
    }
    first = specs.move_channels(shape, to_first=True)
    in_size, cls = first if spec.channels_first else shape, classes[spec.dims - 1]
    layer = made(cls, in_size, out, tuple(spec.kernel), **named | options)
    bias = reshape(spec.bias, (1, out, *ones) if spec.channels_first else (*ones, out))
    layer.w_initializer, layer.b_initializer = weight, bias
    arrays = {"weight": weight, "bias": bias}
    layer.weight = brainstate.ParamState({k: v for k, v in arrays.items() if v is not None})
    return layer


def _example_shape(spec: Any, ctx: Building) -> tuple[int, ...]:
    """The shape ``(*space, in)`` of an example, which BrainState fixes.

    Raises:
        ArgumentError: it contradicts the kernel.
        MissingShapeError: it is not known.
    """
    shape = spec.last(ctx.shape) or spec.last(ctx.require_shape())
    if len(shape) != spec.dims + 1 or shape[-1] != spec.channels:
        raise ArgumentError(
            f"an example must have {spec.dims} axes of space, then {spec.channels} channels; "
            f"here it has the shape {shape}",
            path=ctx.path,
            remedy="Pass sample_input=, one example without its batch axis",
        )
    return shape
