"""Functions, and layers that are little more."""

from __future__ import annotations

import functools
from typing import Any

from flax import nnx

from ... import formulas, specs
from ...walk import Building, Reading
from .adapter import adapter, array_of


@adapter.reads(nnx.PReLU, specs.PReLU, state=("negative_slope",))
def read_prelu(m: nnx.PReLU, ctx: Reading) -> specs.PReLU:
    slope, dtype = array_of(m, ctx, "negative_slope"), specs.dtype(m.dtype)
    return specs.PReLU(slope=slope, dtype=dtype, keeps_dtype=dtype is None)


@adapter.builds(specs.PReLU, carries=("dtype", "keeps_dtype"))
def build_prelu(spec: specs.PReLU, ctx: Building) -> nnx.PReLU:
    if spec.dtype is None and not spec.keeps_dtype:
        ctx.refuse("dtype", None, "Flax casts the slope to the dtype of the input")
    layer = nnx.PReLU(0.0, dtype=spec.dtype, param_dtype=spec.slope.dtype)
    layer.negative_slope.set_value(spec.slope)
    return layer


@adapter.builds(specs.Activation)
def build_activation(spec: specs.Activation, ctx: Building) -> Any:
    fn = formulas.ACTIVATIONS[spec.name]
    return functools.partial(fn, **spec.options) if spec.options else fn


@adapter.builds(specs.Flatten, carries=specs.options(specs.Flatten))
@adapter.builds(specs.Unflatten)
def build_formula(spec: specs.Flatten | specs.Unflatten, ctx: Building) -> Any:
    return spec.function


@adapter.builds(specs.Function)
def build_function(spec: specs.Function, ctx: Building) -> Any:
    return formulas.Batched(spec.fn) if spec.per_example else spec.fn
