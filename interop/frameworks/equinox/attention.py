"""Attention and rotary embeddings."""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx

from ... import specs
from ...walk import Building, Reading
from .adapter import Node, adapter, check_one_dtype, make


@adapter.reads(eqx.nn.MultiheadAttention, specs.MultiHeadAttention)
def read_attention(node: Node, ctx: Reading) -> specs.MultiHeadAttention:
    m = node.module
    dropout: Any = ctx.read(Node(m.dropout, node.state), f"{ctx.path}.dropout")
    return specs.MultiHeadAttention(
        query=_read_heads(node, ctx, "query_proj", m.qk_size),
        key=_read_heads(node, ctx, "key_proj", m.qk_size),
        value=_read_heads(node, ctx, "value_proj", m.vo_size),
        out=_read_heads(node, ctx, "output_proj", m.vo_size),
        rate=dropout.rate,
        core="float32",
    )


def _read_heads(node: Node, ctx: Reading, name: str, depth: int) -> specs.LinearGeneral:
    """One of the projections, with an axis of heads and one of features of each."""
    part = ctx.read(Node(getattr(node.module, name), node.state), f"{ctx.path}.{name}")
    if not isinstance(part, specs.Linear):
        ctx.refuse(name, type(part).__qualname__, "only an eqx.nn.Linear converts")
    heads = (node.module.num_heads, depth)
    weight, bias = part.weight, part.bias
    if name == "output_proj":
        weight = weight.reshape(*heads, -1)
        return specs.LinearGeneral(weight=weight, bias=bias, axes=(-2, -1))
    return specs.LinearGeneral(
        weight=weight.reshape(-1, *heads), bias=None if bias is None else bias.reshape(heads)
    )


@adapter.builds(specs.MultiHeadAttention, carries=("rate", "broadcast_dropout", "core"))
def build_attention(spec: specs.MultiHeadAttention, ctx: Building) -> eqx.nn.MultiheadAttention:
    _check_attention(spec, ctx)
    sizes = [part.weight.shape[0] for part in spec.parts[:3]]
    vo_size = spec.value.weight.shape[-1]
    biases = [part.bias is not None for part in spec.parts]
    return make(
        eqx.nn.MultiheadAttention,
        query_proj=_projection(spec.query, ctx),
        key_proj=_projection(spec.key, ctx),
        value_proj=_projection(spec.value, ctx),
        output_proj=_projection(spec.out, ctx),
        dropout=make(eqx.nn.Dropout, p=spec.rate, inference=True),
        num_heads=spec.heads,
        query_size=sizes[0],
        key_size=sizes[1],
        value_size=sizes[2],
        output_size=spec.out.weight.shape[-1],
        qk_size=spec.depth,
        vo_size=vo_size,
        use_query_bias=biases[0],
        use_key_bias=biases[1],
        use_value_bias=biases[2],
        use_output_bias=biases[3],
    )


def _check_attention(spec: Any, ctx: Building) -> None:
    if not ctx.stands_alone:
        ctx.refuse("inputs_k", None, "Equinox's takes three inputs, and a stack passes one")
    if not spec.agrees_with("float32"):
        ctx.refuse("core", spec.core, "Equinox takes the softmax in float32, and nothing else")
    if not spec.is_uniform:
        ctx.refuse("dtype, precision, axes", "of the parts", "Equinox has no such options")
    if spec.key.weight.shape[1] != spec.heads:
        ctx.refuse(
            "num_kv_heads", spec.key.weight.shape[1], "Equinox has as many as of queries"
        )
    if spec.rate > 0.0 and spec.broadcast_dropout:
        ctx.refuse("broadcast_dropout", True, "Equinox decides for each head by itself")


def _projection(part: Any, ctx: Building) -> Any:
    check_one_dtype(part.weight, part.bias, ctx)
    n_in, n_out = math.prod(part.in_shape), math.prod(part.out_shape)
    return make(
        eqx.nn.Linear,
        weight=part.weight.reshape(n_in, n_out).T,
        bias=None if part.bias is None else part.bias.reshape(n_out),
        in_features=n_in,
        out_features=n_out,
        use_bias=part.bias is not None,
    )


# Not built: Equinox keeps its tables by size alone, and so takes the first theta for all.
@adapter.reads(eqx.nn.RotaryPositionalEmbedding, specs.RotaryEmbedding)
def read_rope(node: Node, ctx: Reading) -> specs.RotaryEmbedding:
    m = node.module
    return specs.RotaryEmbedding(
        depth=m.embedding_size,
        theta=m.theta,
        table_dtype=specs.dtype(m.dtype),
        keeps_dtype=True,
    )
