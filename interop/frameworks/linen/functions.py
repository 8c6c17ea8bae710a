"""Functions, and layers that are little more."""

from __future__ import annotations

import flax.linen as nn

from ... import specs
from ...walk import Building, Reading
from ..nnx.functions import build_activation, build_formula, build_function
from .adapter import Node, adapter, node_of

# The functions are those of NNX.
adapter.builds(specs.Activation)(build_activation)
adapter.builds(specs.Flatten, carries=specs.options(specs.Flatten))(build_formula)
adapter.builds(specs.Unflatten)(build_formula)
adapter.builds(specs.Function)(build_function)


@adapter.reads(nn.PReLU, specs.PReLU)
def read_prelu(node: Node, ctx: Reading) -> specs.PReLU:
    return specs.PReLU(slope=node.array("negative_slope"), keeps_dtype=True)


@adapter.builds(specs.PReLU, carries=("keeps_dtype",))
def build_prelu(spec: specs.PReLU, ctx: Building) -> Node:
    if not spec.keeps_dtype:
        ctx.refuse("keeps_dtype", False, "Flax casts the slope to the dtype of the input")
    if spec.slope.shape != ():
        ctx.refuse("slope", spec.slope.shape, "Linen has one slope for all elements")
    return node_of(nn.PReLU(param_dtype=spec.slope.dtype), {"negative_slope": spec.slope})
