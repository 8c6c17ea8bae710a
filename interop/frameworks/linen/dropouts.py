"""Layers that drop a part of their input in training."""

from __future__ import annotations

import flax.linen as nn

from ... import specs
from ...walk import Building, Reading
from .adapter import Node, adapter


@adapter.reads(nn.Dropout, specs.Dropout)
def read_dropout(node: Node, ctx: Reading) -> specs.Dropout:
    m = node.module
    return specs.Dropout(
        rate=m.rate, broadcast_dims=tuple(m.broadcast_dims), rng_collection=m.rng_collection
    )


@adapter.builds(specs.Dropout, carries=("broadcast_dims",))
def build_dropout(spec: specs.Dropout, ctx: Building) -> Node:
    return Node(
        nn.Dropout(
            spec.rate,
            broadcast_dims=spec.broadcast_dims,
            deterministic=not ctx.options.get("train", False),
            rng_collection=spec.rng_collection,
        ),
        {},
    )
