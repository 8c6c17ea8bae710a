"""Linear layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from ... import specs
from ...walk import Building, Reading
from .adapter import NO_RNGS, adapter, array_of, empty, made, returns


@adapter.reads(
    nnx.Linear,
    specs.Linear,
    state=("kernel", "bias"),
    fixed={"dot_general": jax.lax.dot_general},
)
def read_linear(m: nnx.Linear, ctx: Reading) -> specs.Linear:
    return specs.Linear(
        weight=array_of(m, ctx, "kernel"),
        bias=array_of(m, ctx, "bias"),
        dtype=specs.dtype(m.dtype),
        precision=m.precision,
        preferred_element_type=specs.dtype(m.preferred_element_type),
    )


@adapter.builds(
    specs.Linear, carries=("leading_shape", "dtype", "precision", "preferred_element_type")
)
def build_linear(spec: specs.Linear, ctx: Building) -> nnx.Linear:
    arrays = {"kernel": spec.weight, "bias": spec.bias}
    options = _options(spec) | {"kernel_init": empty, "bias_init": empty}
    return made(nnx.Linear, *spec.weight.shape, arrays=arrays, **options)


def _options(spec: Any) -> dict[str, Any]:
    return {
        "use_bias": spec.bias is not None,
        "dtype": spec.dtype,
        "param_dtype": spec.weight.dtype,
        "precision": spec.precision,
        "preferred_element_type": spec.preferred_element_type,
    }


@adapter.reads(nnx.LoRA, specs.LoRA, state=("lora_a", "lora_b", "base_module"))
def read_lora(m: nnx.LoRA, ctx: Reading) -> specs.LoRA:
    base = m.base_module
    return specs.LoRA(
        lora_a=array_of(m, ctx, "lora_a", nnx.LoRAParam),
        lora_b=array_of(m, ctx, "lora_b", nnx.LoRAParam),
        base=None if base is None else ctx.read(base, f"{ctx.path}.base_module"),
        dtype=specs.dtype(m.dtype),
        promotes_base=base is not None,
    )


@adapter.reads(
    nnx.LoRALinear,
    specs.LoRA,
    state=("kernel", "bias", "lora"),
    fixed={"dot_general": jax.lax.dot_general},
)
def read_lora_linear(m: nnx.LoRALinear, ctx: Reading) -> specs.LoRA:
    lora: Any = ctx.read(m.lora, f"{ctx.path}.lora")
    return dataclasses.replace(lora, base=read_linear(m, ctx))


@adapter.builds(specs.LoRA, carries=("base", "dtype", "promotes_base", "leading_shape"))
def build_lora(spec: specs.LoRA, ctx: Building) -> nnx.LoRA | nnx.LoRALinear:
    options = {
        "a_initializer": returns(spec.lora_a),
        "b_initializer": returns(spec.lora_b),
        "rngs": NO_RNGS,
    }
    (n_in, rank), n_out = spec.lora_a.shape, spec.lora_b.shape[1]
    if spec.base is None or spec.promotes_base:
        base = None if spec.base is None else ctx.build(spec.base)
        options |= {"base_module": base, "dtype": spec.dtype, "param_dtype": spec.lora_a.dtype}
        return nnx.LoRA(n_in, rank, n_out, **options)
    ctx.build_part(spec.base, (nnx.Linear,))  # it is part of the layer
    options |= {"lora_dtype": spec.dtype, "lora_param_dtype": spec.lora_a.dtype}
    options |= _options(spec.base) | {
        "kernel_init": returns(spec.base.weight),
        "bias_init": returns(spec.base.bias),
    }
    return nnx.LoRALinear(n_in, n_out, lora_rank=rank, **options)
