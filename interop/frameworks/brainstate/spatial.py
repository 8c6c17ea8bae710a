"""Padding and pooling of images."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from brainstate import nn

from ... import specs
from ...walk import Building, Reading
from .adapter import adapter

_PADS = {
    "zero": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "constant": (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}
_POOLS = {
    "max": (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    "mean": (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    "norm": (nn.LPPool1d, nn.LPPool2d, nn.LPPool3d),
}
_ADAPTIVE = {
    "mean": (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    "max": (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
}
_UNPOOLS = (nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d)

# Until 0.6, indices counted in the input; then in what the windows cover.
_COVERS = tuple(map(int, importlib.metadata.version("brainstate").split(".")[:2])) >= (0, 6)
_COUNTED = "covered" if _COVERS else "input"


def _reads_pad(mode: str, cls: type) -> None:
    @adapter.reads(cls, specs.Pad)
    def read_pad(m: Any, ctx: Reading) -> specs.Pad:
        value = getattr(m, "value", 0.0)
        if not isinstance(value, int | float):
            ctx.refuse("value", value, "only a number converts")
        return specs.Pad(padding=tuple(map(tuple, m.padding)), mode=mode, value=value)


def _reads_pool(kind: str, cls: type) -> None:
    @adapter.reads(cls, specs.Pool)
    def read_pool(m: Any, ctx: Reading) -> specs.Pool:
        options: dict[str, Any] = {"channel_axis": m.channel_axis}
        if kind == "mean":
            options["counts"] = "covered"
        if kind == "norm":
            options["norm"] = m.norm_type
        if kind == "max" and m.return_indices:
            options["indices"] = _COUNTED
        return specs.pool(kind, m.kernel_size, m.stride, m.padding, **options)


def _reads_adaptive_pool(kind: str, cls: type) -> None:
    @adapter.reads(cls, specs.AdaptivePool)
    def read_adaptive_pool(m: Any, ctx: Reading) -> specs.AdaptivePool:
        target, axis = tuple(m.target_shape), m.channel_axis
        return specs.AdaptivePool(target=target, kind=kind, channel_axis=axis)


for _table, _reads in (
    (_PADS, _reads_pad),
    (_POOLS, _reads_pool),
    (_ADAPTIVE, _reads_adaptive_pool),
):
    for _kind, _classes in _table.items():
        for _cls in _classes:
            _reads(_kind, _cls)


@adapter.builds(specs.Pad, carries=specs.options(specs.Pad))
def build_pad(spec: specs.Pad, ctx: Building) -> Any:
    if spec.dims > 3 or spec.channel_axis != -1:
        return spec.function
    flat = [n for pair in spec.padding for n in pair]
    options = {"value": spec.value} if spec.mode == "constant" else {}
    return _PADS[spec.mode][spec.dims - 1](flat, **options)


@adapter.builds(specs.Pool, carries=specs.options(specs.Pool))
def build_pool(spec: specs.Pool, ctx: Building) -> Any:
    counts = "covered" if spec.kind == "mean" and spec.is_padded else "window"
    axis = spec.channel_axis
    is_native = spec.is_plain(*_POOLS, channel_axis=axis, counts=counts, indices=spec.indices)
    if not is_native or spec.dims > 3 or spec.indices not in (None, _COUNTED):
        return spec.function
    options: dict[str, Any] = {"norm_type": spec.norm} if spec.kind == "norm" else {}
    if spec.indices:
        options["return_indices"] = True
    return _POOLS[spec.kind][spec.dims - 1](
        kernel_size=spec.window,
        stride=spec.steps,
        padding=spec.padding,
        channel_axis=spec.channel_axis,
        **options,
    )


@adapter.builds(specs.AdaptivePool, carries=specs.options(specs.AdaptivePool))
def build_adaptive_pool(spec: specs.AdaptivePool, ctx: Building) -> Any:
    if spec.kind not in _ADAPTIVE or spec.dims > 3:
        return spec.function
    cls = _ADAPTIVE[spec.kind][spec.dims - 1]
    return cls(spec.target, channel_axis=spec.channel_axis)


@adapter.reads(nn.MaxUnpool1d, specs.MaxUnpool)
@adapter.reads(nn.MaxUnpool2d, specs.MaxUnpool)
@adapter.reads(nn.MaxUnpool3d, specs.MaxUnpool)
def read_max_unpool(m: Any, ctx: Reading) -> specs.MaxUnpool:
    return specs.MaxUnpool(
        window=tuple(m.kernel_size),
        strides=tuple(m.stride),
        padding=tuple(m.padding),
        channel_axis=m.channel_axis,
        covers=_COVERS,
    )


@adapter.builds(specs.MaxUnpool, carries=("channel_axis", "covers"))
def build_max_unpool(spec: specs.MaxUnpool, ctx: Building) -> Any:
    if spec.covers != _COVERS:
        ctx.refuse("covers", spec.covers, "this version of BrainState counts otherwise")
    if len(spec.window) > 3:
        ctx.refuse("window", spec.window, "BrainState has 1 to 3 axes of space")
    return _UNPOOLS[len(spec.window) - 1](
        spec.window, spec.strides, spec.padding, channel_axis=spec.channel_axis
    )
