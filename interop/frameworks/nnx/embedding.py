"""Embeddings."""

from __future__ import annotations

from flax import nnx

from ... import specs
from ...walk import Building, Reading
from .adapter import adapter, array_of, empty, made


@adapter.reads(nnx.Embed, specs.Embedding, state=("embedding",))
def read_embed(m: nnx.Embed, ctx: Reading) -> specs.Embedding:
    weight, dtype = array_of(m, ctx, "embedding"), specs.dtype(m.dtype)
    return specs.Embedding(weight=weight, dtype=None if dtype == weight.dtype else dtype)


@adapter.builds(specs.Embedding, carries=("dtype",))
def build_embed(spec: specs.Embedding, ctx: Building) -> nnx.Embed:
    if spec.weight.ndim != 2:
        ctx.refuse("embedding_size", spec.weight.shape[1:], "only vectors are native")
    return made(
        nnx.Embed,
        *spec.weight.shape,
        dtype=spec.dtype,
        param_dtype=spec.weight.dtype,
        embedding_init=empty,
        arrays={"embedding": spec.weight},
    )
