"""Connections between groups of neurons."""

from __future__ import annotations

import numpy as np
from brainstate import nn

from ... import specs
from .adapter import adapter, arrays_of, check_one_dtype


@adapter.reads(nn.AllToAll, specs.AllToAll, state=("weight",))
def read_all_to_all(m, ctx):
    sizes = m.in_size[-1], m.out_size[-1]
    is_one = np.ndim(m.weight.value["weight"]) == 0
    arrays = arrays_of(m, ctx, weight=() if is_one else sizes, bias=sizes[1:])
    weight, bias = arrays["weight"], arrays.get("bias")
    check_one_dtype(weight, bias, ctx)
    return specs.AllToAll(
        weight=weight,
        bias=bias,
        sizes=sizes,
        include_self=m.include_self,
        leading_shape=tuple(m.in_size[:-1]),
    )


@adapter.builds(specs.AllToAll, carries=("include_self", "leading_shape"))
def build_all_to_all(spec, ctx):
    check_one_dtype(spec.weight, spec.bias, ctx)
    leading = ctx.shape[:-1] if ctx.shape else spec.leading_shape
    return nn.AllToAll(
        *((*leading, size) for size in spec.sizes),
        w_init=spec.weight,
        b_init=spec.bias,
        include_self=spec.include_self,
    )
