"""Contractions of several axes."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict

from ... import specs
from ...walk import Building, Reading
from .adapter import adapter, array_of, empty, made

_GENERAL = {
    "dot_general": None,
    "dot_general_cls": None,
}


@adapter.reads(nnx.LinearGeneral, specs.LinearGeneral, state=("kernel", "bias"), fixed=_GENERAL)
def read_linear_general(m: nnx.LinearGeneral, ctx: Reading) -> specs.LinearGeneral:
    return specs.LinearGeneral(
        weight=array_of(m, ctx, "kernel"),
        bias=array_of(m, ctx, "bias"),
        axes=m.axis,
        batch_axes=len(m.batch_axis),
        dtype=specs.dtype(m.dtype),
        precision=m.precision,
        preferred_element_type=specs.dtype(m.preferred_element_type),
    )


_CONTRACTION = ("dtype", "precision", "preferred_element_type")


@adapter.builds(specs.LinearGeneral, carries=("axes", "batch_axes", *_CONTRACTION))
def build_linear_general(spec: specs.LinearGeneral, ctx: Building) -> nnx.LinearGeneral:
    return made(
        nnx.LinearGeneral,
        spec.in_shape,
        spec.out_shape,
        axis=spec.axes,
        batch_axis=FrozenDict(enumerate(spec.batch_shape)),
        use_bias=spec.bias is not None,
        dtype=spec.dtype,
        param_dtype=spec.weight.dtype,
        kernel_init=empty,
        bias_init=empty,
        precision=spec.precision,
        preferred_element_type=spec.preferred_element_type,
        arrays={"kernel": spec.weight, "bias": spec.bias},
    )


@adapter.reads(
    nnx.Einsum,
    specs.Einsum,
    state=("kernel", "bias"),
    fixed={"einsum_op": jnp.einsum},
)
def read_einsum(m: nnx.Einsum, ctx: Reading) -> specs.Einsum:
    return specs.Einsum(
        equation=m.einsum_str,
        weight=array_of(m, ctx, "kernel"),
        bias=array_of(m, ctx, "bias"),
        dtype=specs.dtype(m.dtype),
        precision=m.precision,
        preferred_element_type=specs.dtype(m.preferred_element_type),
    )


@adapter.builds(specs.Einsum, carries=_CONTRACTION)
def build_einsum(spec: specs.Einsum, ctx: Building) -> nnx.Einsum:
    return made(
        nnx.Einsum,
        spec.equation,
        spec.weight.shape,
        None if spec.bias is None else spec.bias.shape,
        dtype=spec.dtype,
        param_dtype=spec.weight.dtype,
        precision=spec.precision,
        kernel_init=empty,
        bias_init=empty,
        preferred_element_type=spec.preferred_element_type,
        arrays={"kernel": spec.weight, "bias": spec.bias},
    )
