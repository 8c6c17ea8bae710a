"""Embeddings."""

from __future__ import annotations

import equinox as eqx

from ... import specs
from ...walk import Building, Reading
from .adapter import Node, adapter


@adapter.reads(eqx.nn.Embedding, specs.Embedding)
def read_embedding(node: Node, ctx: Reading) -> specs.Embedding:
    return specs.Embedding(weight=node.module.weight)


@adapter.builds(specs.Embedding)
def build_embedding(spec: specs.Embedding, ctx: Building) -> eqx.nn.Embedding:
    if not ctx.fits(0):
        ctx.refuse("sample_input", ctx.shape, "Equinox's Embedding takes one index at a time")
    if spec.weight.ndim != 2:
        ctx.refuse("embedding_size", spec.weight.shape[1:], "only vectors are native")
    return eqx.nn.Embedding(weight=spec.weight)
