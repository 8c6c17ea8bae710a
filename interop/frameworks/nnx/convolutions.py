"""Convolutions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx

from ... import specs
from ...walk import Building, Reading
from .adapter import adapter, array_of, empty, made


@adapter.reads(
    nnx.Conv,
    specs.Conv,
    state=("kernel", "bias"),
    fixed={"conv_general_dilated": jax.lax.conv_general_dilated},
)
def read_conv(m: nnx.Conv, ctx: Reading) -> specs.Conv:
    return specs.Conv(
        weight=array_of(m, ctx, "kernel"),
        bias=array_of(m, ctx, "bias"),
        **conv_fields(m, ctx),
        preferred_element_type=specs.dtype(m.preferred_element_type),
    )


def conv_fields(m: Any, ctx: Reading) -> dict[str, Any]:
    """The options of a convolution, which Flax spells alike in NNX and in Linen."""
    kernel = _kernel_size(m)
    input_dilation = _each(m.input_dilation, kernel)
    kernel_dilation = _each(m.kernel_dilation, kernel)
    reach = [(size - 1) * d + 1 for size, d in zip(kernel, kernel_dilation, strict=True)]
    padding, padding_mode = _padding(m, kernel), "ZEROS"
    if padding in ("CIRCULAR", "REFLECT"):
        padding, padding_mode = _flax_pads(reach), padding
    if padding == "CAUSAL":
        if len(reach) != 1:
            ctx.refuse("padding", padding, "Flax has it for one axis of space only")
        padding = (((reach[0] - 1) * input_dilation[0], 0),)
    return {
        "padding": padding,
        "padding_mode": padding_mode if any(map(any, padding)) else "ZEROS",
        "kernel_dilation": kernel_dilation,
        "groups": m.feature_group_count,
        "input_dilation": None if set(input_dilation) == {1} else input_dilation,
        **_conv_fields(m, kernel),
    }


def _conv_fields(m: Any, kernel: tuple[int, ...]) -> dict[str, Any]:
    """Those that convolutions and transposed ones have."""
    return {
        "strides": _each(m.strides, kernel),
        "in_shape": None,
        "mask": m.mask,
        "dtype": specs.dtype(m.dtype),
        "precision": m.precision,
    }


def _kernel_size(m: Any) -> tuple[int, ...]:
    return (m.kernel_size,) if isinstance(m.kernel_size, int) else tuple(m.kernel_size)


def _each(value: Any, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """``value`` for each axis of space; None means 1."""
    if value is None or isinstance(value, int):
        return (1 if value is None else value,) * len(kernel)
    return tuple(value)


def _padding(m: Any, kernel: tuple[int, ...]) -> Any:
    if isinstance(m.padding, str):
        return m.padding.upper()
    pairs = [m.padding] * len(kernel) if isinstance(m.padding, int) else m.padding
    return tuple((p, p) if isinstance(p, int) else tuple(p) for p in pairs)


def _flax_pads(reach: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """How much Flax pads where it does so with other than zeros."""
    return tuple(((size - 1) // 2, size // 2) for size in reach)


def conv_options(spec: Any, ctx: Building) -> dict[str, Any]:
    """The same options, as both constructors take them."""
    padding = spec.padding
    if spec.padding_mode != "ZEROS":
        pads = padding
        if padding in ("SAME", "SAME_LOWER") and set(spec.strides) == {1}:
            pads = spec.pads((1,) * (spec.dims + 1))  # the same for any shape
        if spec.padding_mode == "REPLICATE" or pads != _flax_pads(spec.reach):
            ctx.refuse(
                "padding_mode",
                spec.padding_mode,
                f"Flax cannot pad by {padding} with other than zeros",
            )
        padding = spec.padding_mode
    return {
        "kernel_size": spec.kernel,
        "padding": padding,
        "input_dilation": spec.input_dilation or 1,
        "feature_group_count": spec.groups,
        **_conv_options(spec),
    }


def _conv_options(spec: Any) -> dict[str, Any]:
    return {
        "strides": spec.strides,
        "kernel_dilation": spec.kernel_dilation,
        "use_bias": spec.bias is not None,
        "mask": spec.mask,
        "dtype": spec.dtype,
        "param_dtype": spec.weight.dtype,
        "precision": spec.precision,
    }


_CONV = ("input_dilation", "mask", "dtype", "precision", "padding_mode")


@adapter.builds(specs.Conv, carries=(*_CONV, "preferred_element_type"))
def build_conv(spec: specs.Conv, ctx: Building) -> nnx.Conv:
    return made(
        nnx.Conv,
        spec.channels,
        spec.weight.shape[-1],
        **conv_options(spec, ctx),
        preferred_element_type=spec.preferred_element_type,
        kernel_init=empty,
        bias_init=empty,
        arrays={"kernel": spec.weight, "bias": spec.bias, "mask": spec.mask},
    )


@adapter.reads(
    nnx.ConvTranspose,
    specs.ConvTranspose,
    state=("kernel", "bias"),
)
def read_conv_transpose(m: nnx.ConvTranspose, ctx: Reading) -> specs.ConvTranspose:
    arrays = array_of(m, ctx, "kernel"), array_of(m, ctx, "bias")
    return specs.ConvTranspose(**conv_transpose_fields(m, *arrays, ctx))


def conv_transpose_fields(m: Any, kernel: Any, bias: Any, ctx: Reading) -> dict[str, Any]:
    """A transposed convolution, which Flax has alike in NNX and in Linen."""
    size = _kernel_size(m)
    fields = _conv_fields(m, size)
    dilation, padding = _each(m.kernel_dilation, size), _padding(m, size)
    reach = tuple((n - 1) * d + 1 for n, d in zip(size, dilation, strict=True))
    strides, is_circular = fields["strides"], padding == "CIRCULAR"
    if is_circular:
        padding = _circular_pads(reach, strides, m.transpose_kernel)
    elif padding == "SAME_LOWER" and set(strides) == {1}:
        padding = "SAME"  # which is SAME_LOWER there: the first end gets more
    elif isinstance(padding, str) and padding not in ("SAME", "VALID"):
        ctx.refuse("padding", padding, "Flax fails on it when it is called")
    fields |= {
        "weight": kernel,
        "bias": bias,
        "padding": padding,
        "padding_mode": "CIRCULAR" if is_circular else "ZEROS",
        "kernel_dilation": dilation,
        "groups": 1,
        "preferred_element_type": specs.dtype(m.preferred_element_type),
    }
    if m.transpose_kernel:
        mask = m.mask if m.mask is None else specs.flipped(m.mask)
        fields |= {"weight": specs.flipped(kernel), "mask": mask}
    return fields


def _circular_pads(reach: Any, strides: Any, mirrored: bool) -> tuple[tuple[int, int], ...]:
    """What periodic padding comes to: Flax adds up what is one period apart in the output.

    The output then has ``stride`` times the elements of the input; where an odd number has to
    be cut off it, ``mirrored`` says that the first end loses more.
    """
    pads: list[tuple[int, int]] = []
    for size, stride in zip(reach, strides, strict=True):
        surplus = max(size - stride, 0)
        low = size - 1 - (surplus + mirrored) // 2
        pads.append((low, size + stride - 2 - low))
    return tuple(pads)


def conv_transpose_options(spec: Any, ctx: Building) -> tuple[Any, dict[str, Any]]:
    """The kernel, and the same options, as both constructors take them."""
    if spec.groups != 1 or spec.dims > 3:
        option, value = ("groups", spec.groups) if spec.groups != 1 else ("dims", spec.dims)
        ctx.refuse(option, value, "Flax has one group, and at most three axes of space")
    kernel, mask, padding, mirrored = spec.weight, spec.mask, spec.padding, False
    if spec.padding_mode != "ZEROS":
        found = [_circular_pads(spec.reach, spec.strides, side) for side in (False, True)]
        if padding not in found:
            ctx.refuse("padding", padding, "Flax cannot pad periodically by so much")
        mirrored, padding = padding != found[0], "CIRCULAR"
    if mirrored:
        kernel, mask = specs.flipped(kernel), mask if mask is None else specs.flipped(mask)
    return kernel, {
        **_conv_options(spec),
        "kernel_size": spec.kernel,
        "padding": padding,
        "mask": mask,
        "transpose_kernel": mirrored,
        "preferred_element_type": spec.preferred_element_type,
    }


_TRANSPOSED = ("mask", "dtype", "precision", "padding_mode", "preferred_element_type")


@adapter.builds(specs.ConvTranspose, carries=_TRANSPOSED)
def build_conv_transpose(spec: specs.ConvTranspose, ctx: Building) -> nnx.ConvTranspose:
    kernel, options = conv_transpose_options(spec, ctx)
    return made(
        nnx.ConvTranspose,
        spec.channels,
        spec.weight.shape[-1],
        **options,
        kernel_init=empty,
        bias_init=empty,
        arrays={"kernel": kernel, "bias": spec.bias, "mask": options["mask"]},
    )
