"""Convolutions."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp

from ... import specs
from ...walk import Building, Reading
from .adapter import Node, adapter, check_one_dtype, make

_CONVS = {1: eqx.nn.Conv1d, 2: eqx.nn.Conv2d, 3: eqx.nn.Conv3d}


@adapter.reads(eqx.nn.Conv, specs.Conv)
@adapter.reads(eqx.nn.Conv1d, specs.Conv)
@adapter.reads(eqx.nn.Conv2d, specs.Conv)
@adapter.reads(eqx.nn.Conv3d, specs.Conv)
def read_conv(node: Node, ctx: Reading) -> specs.Conv:
    m = node.module
    padding = m.padding if isinstance(m.padding, str) else tuple(map(tuple, m.padding))
    is_padded = padding != "VALID" and any(map(any, padding))
    return specs.Conv(
        padding=padding,
        padding_mode=m.padding_mode if is_padded else "ZEROS",
        **_conv_fields(m, ctx),
    )


def _conv_fields(m: Any, ctx: Reading) -> dict[str, Any]:
    """What convolutions and transposed ones have."""
    check_one_dtype(m.weight, m.bias, ctx)
    return {
        "weight": jnp.moveaxis(m.weight, (0, 1), (-1, -2)),
        "bias": None if m.bias is None else m.bias.reshape(-1),
        "strides": tuple(m.stride),
        "kernel_dilation": tuple(m.dilation),
        "groups": m.groups,
        "in_shape": None,
    }


@adapter.builds(specs.Conv, carries=("padding_mode",))
def build_conv(spec: specs.Conv, ctx: Building) -> Any:
    return make(
        _CONVS.get(spec.dims, eqx.nn.Conv),
        padding=spec.padding,
        padding_mode=spec.padding_mode,
        **_conv_options(spec, ctx),
    )


def _conv_options(spec: Any, ctx: Building) -> dict[str, Any]:
    check_one_dtype(spec.weight, spec.bias, ctx)
    return {
        "num_spatial_dims": spec.dims,
        "weight": jnp.moveaxis(spec.weight, (-1, -2), (0, 1)),
        "bias": None if spec.bias is None else spec.bias.reshape(-1, *[1] * spec.dims),
        "in_channels": spec.channels,
        "out_channels": spec.weight.shape[-1],
        "kernel_size": tuple(spec.kernel),
        "stride": spec.strides,
        "dilation": spec.kernel_dilation,
        "groups": spec.groups,
        "use_bias": spec.bias is not None,
    }


_TRANSPOSED = {
    1: eqx.nn.ConvTranspose1d,
    2: eqx.nn.ConvTranspose2d,
    3: eqx.nn.ConvTranspose3d,
}


@adapter.reads(eqx.nn.ConvTranspose, specs.ConvTranspose)
@adapter.reads(eqx.nn.ConvTranspose1d, specs.ConvTranspose)
@adapter.reads(eqx.nn.ConvTranspose2d, specs.ConvTranspose)
@adapter.reads(eqx.nn.ConvTranspose3d, specs.ConvTranspose)
def read_conv_transpose(node: Node, ctx: Reading) -> specs.ConvTranspose:
    m, fields = node.module, _conv_fields(node.module, ctx)
    spec = specs.ConvTranspose(padding=(), padding_mode=m.padding_mode, **fields)
    if isinstance(m.padding, str):
        padding = _pads_of(m.padding, spec, m.output_padding)
    else:
        rows = zip(spec.reach, m.padding, m.output_padding, strict=True)
        padding = tuple((n - 1 - low, n - 1 - high + more) for n, (low, high), more in rows)
    return dataclasses.replace(spec, padding=padding)


def _pads_of(padding: str, spec: Any, output_padding: Any) -> tuple[tuple[int, int], ...]:
    """What a name for the padding comes to, in elements of the dilated input."""
    pads: list[tuple[int, int]] = []
    rows = zip(spec.reach, spec.strides, output_padding, strict=True)
    for size, stride, more in rows:
        if padding == "VALID":
            low, high = 0, -more
        else:
            total = size - stride + more
            low = (max(total, 0) + (padding == "SAME_LOWER")) // 2
            high = max(total, 0) - low - max(-total, 0)
        pads.append((size - 1 - low, size - 1 - high))
    return tuple(pads)


@adapter.builds(specs.ConvTranspose, carries=("padding_mode",))
def build_conv_transpose(spec: specs.ConvTranspose, ctx: Building) -> Any:
    none = (0,) * spec.dims
    padding: Any = tuple(
        (n - 1 - low, n - 1 - high)
        for n, (low, high) in zip(spec.reach, spec.padding, strict=True)
    )
    if spec.padding_mode != "ZEROS":
        names = ("SAME", "SAME_LOWER")
        padding = next((p for p in names if _pads_of(p, spec, none) == spec.padding), None)
        if padding is None:
            ctx.refuse("padding", spec.padding, "Equinox cannot pad periodically by so much")
    return make(
        _TRANSPOSED.get(spec.dims, eqx.nn.ConvTranspose),
        padding=padding,
        output_padding=none,
        padding_mode=spec.padding_mode,
        **_conv_options(spec, ctx),
    )
