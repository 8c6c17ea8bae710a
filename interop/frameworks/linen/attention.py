"""Attention and rotary embeddings."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from ... import specs
from ...walk import Building, Reading
from ..nnx.attention import ATTENTION, CACHE, attention_options, check_attention
from .adapter import Node, adapter, node_of

_ATTENTION_FIXED = {
    "attention_fn": nn.dot_product_attention,
    "qkv_dot_general": None,
    "out_dot_general": None,
    "qkv_dot_general_cls": None,
    "out_dot_general_cls": None,
    "qk_attn_weights_einsum_cls": None,
    "attn_weights_value_einsum_cls": None,
}


@adapter.reads(
    nn.MultiHeadDotProductAttention, specs.MultiHeadAttention, fixed=_ATTENTION_FIXED
)
@adapter.reads(nn.MultiHeadAttention, specs.MultiHeadAttention, fixed=_ATTENTION_FIXED)
@adapter.reads(nn.SelfAttention, specs.MultiHeadAttention, fixed=_ATTENTION_FIXED)
def read_attention(node: Node, ctx: Reading) -> specs.MultiHeadAttention:
    m = node.module
    shared = {"dtype": specs.dtype(m.dtype), "precision": m.precision}
    parts: dict[str, Any] = {
        name: specs.LinearGeneral(
            weight=node.array(name)["kernel"],
            bias=node.array(name).get("bias"),
            axes=(-2, -1) if name == "out" else (-1,),
            **shared,
        )
        for name in ("query", "key", "value", "out")
    }
    scales = {
        f"{name}_scale": node.array(f"{name}_ln")["scale"] if m.normalize_qk else None
        for name in ("query", "key")
    }
    cache: dict[str, Any] = {
        name: node.array(name, "cache") if m.decode else None for name in CACHE
    }
    return specs.MultiHeadAttention(
        **parts,
        **scales,
        **shared,
        rate=m.dropout_rate,
        broadcast_dropout=m.broadcast_dropout,
        core="widened" if m.force_fp32_for_softmax else "plain",
        decode=m.decode,
        **cache,
    )


@adapter.builds(specs.MultiHeadAttention, carries=ATTENTION)
def build_attention(spec: specs.MultiHeadAttention, ctx: Building) -> Node:
    core = "widened" if spec.core == "widened" else "plain"
    check_attention(spec, ctx, core)
    if spec.key.weight.shape[1] != spec.heads:
        ctx.refuse("num_kv_heads", spec.key.weight.shape[1], "Linen has as many as of queries")
    module = nn.MultiHeadDotProductAttention(
        spec.heads,
        qkv_features=spec.heads * spec.depth,
        out_features=spec.out.weight.shape[-1],
        deterministic=not ctx.options.get("train", False),
        force_fp32_for_softmax=core == "widened",
        **attention_options(spec),
    )
    params: dict[str, Any] = {
        name: node_of(module, {"kernel": part.weight, "bias": part.bias}).variables["params"]
        for name, part in zip(("query", "key", "value", "out"), spec.parts, strict=True)
    }
    if spec.query_scale is not None:
        params["query_ln"] = {"scale": spec.query_scale}
        params["key_ln"] = {"scale": spec.key_scale}
    cache: Any = {name: array for name in CACHE if (array := getattr(spec, name)) is not None}
    return node_of(module, params, **({"cache": cache} if cache else {}))
