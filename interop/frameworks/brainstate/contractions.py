"""Contractions of several axes."""

from __future__ import annotations

import string
from typing import Any

from brainstate import nn

from ... import specs
from ...walk import Building, Reading
from .adapter import adapter, arrays_of, check_one_dtype
from .linear import build_linear


@adapter.builds(specs.LinearGeneral)
def build_linear_general(spec: specs.LinearGeneral, ctx: Building) -> Any:
    plain = spec.as_linear()
    if plain is None:
        ctx.refuse("out_features", spec.out_shape, "only one axis of features is native")
    return build_linear(plain, ctx)


@adapter.reads(nn.OneToOne, specs.Einsum, state=("weight",))
def read_one_to_one(m: Any, ctx: Reading) -> specs.Einsum:
    arrays = arrays_of(m, ctx, weight=tuple(m.in_size), bias=tuple(m.in_size))
    weight, bias = arrays["weight"], arrays.get("bias")
    check_one_dtype(weight, bias, ctx)
    axes = string.ascii_lowercase[: weight.ndim]
    return specs.Einsum(equation=f"...{axes},{axes}->...{axes}", weight=weight, bias=bias)


@adapter.builds(specs.Einsum)
def build_one_to_one(spec: specs.Einsum, ctx: Building) -> nn.OneToOne:
    if not spec.scales:
        ctx.refuse("equation", spec.equation, "only products element by element are native")
    check_one_dtype(spec.weight, spec.bias, ctx)
    return nn.OneToOne(spec.weight.shape, w_init=spec.weight, b_init=spec.bias)
