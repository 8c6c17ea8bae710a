"""Stacks."""

from __future__ import annotations

import equinox as eqx

from ... import specs
from .adapter import Node, adapter


@adapter.reads(eqx.nn.Sequential, specs.Sequential)
def read_sequential(node, ctx):
    return specs.Sequential(
        layers=ctx.read_all(Node(layer, node.state) for layer in node.module.layers)
    )


@adapter.builds(specs.Sequential)
def build_sequential(spec, ctx):
    return eqx.nn.Sequential([ctx.build(layer) for layer in spec.layers])
