"""Stacks."""

from __future__ import annotations

import equinox as eqx

from ... import specs
from ...walk import Building, Reading
from .adapter import Node, adapter


@adapter.reads(eqx.nn.Sequential, specs.Sequential)
def read_sequential(node: Node, ctx: Reading) -> specs.Sequential:
    return specs.Sequential(
        layers=ctx.read_all(Node(layer, node.state) for layer in node.module.layers)
    )


@adapter.builds(specs.Sequential)
def build_sequential(spec: specs.Sequential, ctx: Building) -> eqx.nn.Sequential:
    return eqx.nn.Sequential([ctx.build(layer) for layer in spec.layers])
