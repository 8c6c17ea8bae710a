"""Embeddings."""

from __future__ import annotations

import flax.linen as nn

from ... import specs
from ...walk import Building, Reading
from .adapter import Node, adapter, node_of


@adapter.reads(nn.Embed, specs.Embedding, fixed={"promote_dtype": nn.Embed.promote_dtype})
def read_embed(node: Node, ctx: Reading) -> specs.Embedding:
    weight, dtype = node.array("embedding"), specs.dtype(node.module.dtype)
    return specs.Embedding(weight=weight, dtype=None if dtype == weight.dtype else dtype)


@adapter.builds(specs.Embedding, carries=("dtype",))
def build_embed(spec: specs.Embedding, ctx: Building) -> Node:
    if spec.weight.ndim != 2:
        ctx.refuse("embedding_size", spec.weight.shape[1:], "only vectors are native")
    module = nn.Embed(*spec.weight.shape, dtype=spec.dtype, param_dtype=spec.weight.dtype)
    return node_of(module, {"embedding": spec.weight})
