"""Linear layers."""

from __future__ import annotations

import flax.linen as nn

from ... import specs
from ...walk import Building, Reading
from .adapter import Node, adapter, node_of


@adapter.reads(
    nn.Dense,
    specs.Linear,
    fixed={
        "dot_general": None,
        "dot_general_cls": None,
    },
)
def read_dense(node: Node, ctx: Reading) -> specs.Linear:
    return specs.Linear(
        weight=node.array("kernel"),
        bias=node.array("bias"),
        dtype=specs.dtype(node.module.dtype),
        precision=node.module.precision,
    )


@adapter.builds(specs.Linear, carries=("leading_shape", "dtype", "precision"))
def build_dense(spec: specs.Linear, ctx: Building) -> Node:
    module = nn.Dense(
        spec.weight.shape[1],
        use_bias=spec.bias is not None,
        dtype=spec.dtype,
        param_dtype=spec.weight.dtype,
        precision=spec.precision,
    )
    return node_of(module, {"kernel": spec.weight, "bias": spec.bias})
