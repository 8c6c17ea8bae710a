"""Layers that drop a part of their input in training."""

from __future__ import annotations

import equinox as eqx

from ... import specs
from ...walk import Building, Reading
from .adapter import Node, adapter, make


@adapter.reads(eqx.nn.Dropout, specs.Dropout)
def read_dropout(node: Node, ctx: Reading) -> specs.Dropout:
    p = node.module.p
    if not isinstance(p, int | float):
        ctx.refuse("p", p, "only a number converts, not an array")
    return specs.Dropout(rate=float(p), rng_collection="dropout")


@adapter.builds(specs.Dropout)
def build_dropout(spec: specs.Dropout, ctx: Building) -> eqx.nn.Dropout:
    if spec.rate == 1.0:
        ctx.refuse("rate", 1.0, "Equinox's own layer has a gradient of nan")
    return make(eqx.nn.Dropout, p=spec.rate, inference=True)
