"""Linear layers."""

from __future__ import annotations

import jax
from flax import nnx

from ... import specs
from .adapter import NO_RNGS, adapter, array_of, returns


@adapter.reads(
    nnx.Linear,
    specs.Linear,
    state=("kernel", "bias"),
    fixed={"dot_general": jax.lax.dot_general},
)
def read_linear(m, ctx):
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
def build_linear(spec, ctx):
    return nnx.Linear(
        *spec.weight.shape,
        use_bias=spec.bias is not None,
        dtype=spec.dtype,
        param_dtype=spec.weight.dtype,
        precision=spec.precision,
        preferred_element_type=spec.preferred_element_type,
        kernel_init=returns(spec.weight),
        bias_init=returns(spec.bias),
        rngs=NO_RNGS,
    )
