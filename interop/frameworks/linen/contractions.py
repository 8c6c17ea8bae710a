"""Contractions of several axes."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from ... import specs
from ...walk import Building, Reading
from .adapter import Node, adapter, node_of
from .norms import unpack
from .variables import axes_of, equation_of


@adapter.reads(
    nn.DenseGeneral,
    specs.LinearGeneral,
    fixed={
        "dot_general": None,
        "dot_general_cls": None,
    },
)
def read_dense_general(node: Node, ctx: Reading) -> specs.LinearGeneral:
    m = node.module
    return specs.LinearGeneral(
        weight=node.array("kernel"),
        bias=node.array("bias"),
        axes=axes_of(m.axis),
        batch_axes=len(axes_of(m.batch_dims)),
        dtype=specs.dtype(m.dtype),
        precision=m.precision,
    )


@adapter.builds(specs.LinearGeneral, carries=("axes", "batch_axes", "dtype", "precision"))
def build_dense_general(spec: specs.LinearGeneral, ctx: Building) -> Node:
    module = nn.DenseGeneral(
        unpack(spec.out_shape),
        axis=unpack(spec.axes),
        batch_dims=tuple(range(spec.batch_axes)),
        use_bias=spec.bias is not None,
        dtype=spec.dtype,
        param_dtype=spec.weight.dtype,
        precision=spec.precision,
    )
    return node_of(module, {"kernel": spec.weight, "bias": spec.bias})


@adapter.reads(nn.Einsum, specs.Einsum)
def read_einsum(node: Node, ctx: Reading) -> specs.Einsum:
    m = node.module
    return specs.Einsum(
        equation=equation_of(m),
        weight=node.array("kernel"),
        bias=node.array("bias"),
        dtype=specs.dtype(m.dtype),
        precision=m.precision,
        preferred_element_type=specs.dtype(m.preferred_element_type),
    )


@adapter.builds(specs.Einsum, carries=("dtype", "precision", "preferred_element_type"))
def build_einsum(spec: specs.Einsum, ctx: Building) -> Node:
    # The initialiser runs in each call, for its shape; the default needs two axes.
    short: dict[str, Any] = {}
    if spec.weight.ndim < 2:
        short["kernel_init"] = nn.initializers.ones
    module = nn.Einsum(
        spec.weight.shape,
        spec.equation,
        use_bias=spec.bias is not None,
        dtype=spec.dtype,
        param_dtype=spec.weight.dtype,
        precision=spec.precision,
        preferred_element_type=spec.preferred_element_type,
        **short,
    )
    return node_of(module, {"kernel": spec.weight, "bias": spec.bias})


adapter.refused |= dict.fromkeys(
    [
        nn.Fp8DotGeneralOp,
        nn.Fp8DirectDotGeneralOp,
        nn.NANOOFp8DotGeneralOp,
        nn.Fp8Einsum,
    ],
    "it is an operation of two arrays within a layer, whose scales Flax's train state alone "
    "takes from gradients",
)
