"""Linear layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from brainstate import nn

from ... import specs
from ...walk import Building, Reading
from .adapter import adapter, arrays_of, check_one_dtype, reshape


@adapter.reads(nn.Linear, specs.Linear, state=("weight",))
def read_linear(m: nn.Linear, ctx: Reading) -> specs.Linear:
    fields = _fields(m, ctx)
    return specs.Linear(**fields, mask=_factors(m, ctx, "w_mask"))


@adapter.reads(nn.ScaledWSLinear, specs.ScaledWSLinear, state=("weight",))
def read_scaled_linear(m: nn.ScaledWSLinear, ctx: Reading) -> specs.ScaledWSLinear:
    fields = _fields(m, ctx)
    fields.setdefault("gain", None)
    return specs.ScaledWSLinear(**fields, epsilon=m.eps, mask=_factors(m, ctx, "w_mask"))


@adapter.reads(nn.SignedWLinear, specs.SignedLinear, state=("weight",))
def read_signed_linear(m: Any, ctx: Reading) -> specs.SignedLinear:
    if len(m.in_size) > 1:
        ctx.refuse("in_size", m.in_size, "BrainState's weight then has all these axes")
    return specs.SignedLinear(**_fields(m, ctx), sign=_factors(m, ctx, "w_sign"))


def _fields(m: Any, ctx: Reading) -> dict[str, Any]:
    """The arrays, and the axes of an example before the last."""
    n_in, n_out = m.in_size[-1], m.out_size[-1]
    arrays = arrays_of(m, ctx, weight=(n_in, n_out), bias=(n_out,), gain=(n_out,))
    arrays.setdefault("bias", None)
    check_one_dtype(arrays["weight"], arrays["bias"], ctx)
    return arrays | {"leading_shape": tuple(m.in_size[:-1])}


def _factors(m: Any, ctx: Reading, name: str) -> Any:
    """What the layer multiplies its weight with, for each of its elements; or None."""
    value, shape = getattr(m, name), (m.in_size[-1], m.out_size[-1])
    if value is None or np.shape(value) == shape:
        return value
    if np.ndim(value) > 2:
        ctx.refuse(name, value, f"the weight has the shape {shape}")
    is_array = hasattr(value, "dtype")  # a number does not promote the weight
    weight = m.weight.value["weight"] if isinstance(m.weight.value, dict) else m.weight.value
    array = np.asarray(value, value.dtype if is_array else weight.dtype)
    return np.broadcast_to(array, shape)


@adapter.builds(specs.Linear, carries=("mask", "leading_shape"))
def build_linear(spec: specs.Linear, ctx: Building) -> nn.Linear:
    return _build_linear(nn.Linear, spec, ctx, b_init=spec.bias, w_mask=spec.mask)


@adapter.builds(specs.ScaledWSLinear, carries=("mask", "leading_shape"))
def build_scaled_linear(spec: specs.ScaledWSLinear, ctx: Building) -> nn.ScaledWSLinear:
    options: dict[str, Any] = {"b_init": spec.bias, "w_mask": spec.mask, "eps": spec.epsilon}
    options["ws_gain"] = spec.gain is not None
    layer = _build_linear(nn.ScaledWSLinear, spec, ctx, **options)
    if spec.gain is not None:
        gain = reshape(spec.gain, (1, spec.gain.shape[0]))
        layer.weight.value = {**layer.weight.value, "gain": gain}
    return layer


@adapter.builds(specs.SignedLinear, carries=("sign",))
def build_signed_linear(spec: specs.SignedLinear, ctx: Building) -> nn.SignedWLinear:
    if spec.bias is not None:
        ctx.refuse("use_bias", True, "BrainState's SignedWLinear has none")
    return nn.SignedWLinear(*spec.weight.shape, w_init=spec.weight, w_sign=spec.sign)


def _build_linear(cls, spec: Any, ctx: Building, **options: Any) -> Any:
    check_one_dtype(spec.weight, spec.bias, ctx)
    return cls(*sizes_of(spec, ctx), w_init=spec.weight, **options)


def sizes_of(spec: Any, ctx: Building) -> tuple[Any, Any]:
    """The sizes of an example at the input and at the output of a :class:`specs.Linear`."""
    leading = ctx.shape[:-1] if ctx.shape else spec.leading_shape
    n_in, n_out = spec.weight.shape
    return (*leading, n_in), (*leading, n_out)


@adapter.reads(nn.LoRA, specs.LoRA, state=("weight", "base_module"))
def read_lora(m: Any, ctx: Reading) -> specs.LoRA:
    rank = np.shape(m.weight.value["lora_a"])[-1]
    shapes: dict[str, Any] = {"lora_a": (m.in_features, rank), "lora_b": (rank, m.out_features)}
    arrays = arrays_of(m, ctx, **shapes)
    check_one_dtype(arrays["lora_a"], arrays["lora_b"], ctx, "lora_b")
    base = m.base_module
    base = None if base is None else ctx.read(base, f"{ctx.path}.base_module")
    spec = specs.LoRA(**arrays, base=base, leading_shape=tuple(m.in_size[:-1]))
    # Where both are the same, the base gets its input as others give it.
    return dataclasses.replace(
        spec, promotes_base=base is not None and not spec.feels_promotion
    )


@adapter.builds(specs.LoRA, carries=("base", "promotes_base", "leading_shape"))
def build_lora(spec: specs.LoRA, ctx: Building) -> nn.LoRA:
    check_one_dtype(spec.lora_a, spec.lora_b, ctx, "lora_b")
    if spec.promotes_base and spec.feels_promotion:
        ctx.refuse("promotes_base", True, "BrainState gives its base the input as it is")
    leading = ctx.shape[:-1] if ctx.shape else spec.leading_shape
    n_in, rank = spec.lora_a.shape
    arrays = iter((spec.lora_a, spec.lora_b))
    return nn.LoRA(
        n_in,
        rank,
        spec.lora_b.shape[1],
        base_module=None if spec.base is None else ctx.build(spec.base),
        kernel_init=lambda _: next(arrays),
        in_size=(*leading, n_in),
    )
