"""Linear layers and embeddings."""

from __future__ import annotations

from brainstate import nn

from ... import specs
from .adapter import adapter, arrays_of, check_one_dtype


@adapter.reads(nn.Linear, specs.Linear, state=("weight",))
def read_linear(m, ctx):
    n_in, n_out = m.in_size[-1], m.out_size[-1]
    arrays = arrays_of(m, ctx, weight=(n_in, n_out), bias=(n_out,))
    weight, bias = arrays["weight"], arrays.get("bias")
    check_one_dtype(weight, bias, ctx)
    return specs.Linear(
        weight=weight, bias=bias, mask=m.w_mask, leading_shape=tuple(m.in_size[:-1])
    )


@adapter.builds(specs.Linear, carries=("mask", "leading_shape"))
def build_linear(spec, ctx):
    weight, bias = spec.weight, spec.bias
    check_one_dtype(weight, bias, ctx)
    leading = ctx.shape[:-1] if ctx.shape else spec.leading_shape
    in_size, out_size = (*leading, weight.shape[0]), (*leading, weight.shape[1])
    return nn.Linear(in_size, out_size, w_init=weight, b_init=bias, w_mask=spec.mask)


@adapter.reads(
    nn.Embedding,
    specs.Embedding,
    state=("weight",),
    fixed={"padding_idx": None, "max_norm": None, "scale_grad_by_freq": False, "freeze": False},
)
def read_embedding(m, ctx):
    if len(m.embedding_size) != 1:
        ctx.refuse("embedding_size", m.embedding_size, "only vectors convert")
    return specs.Embedding(**arrays_of(m, ctx, weight=(m.num_embeddings, *m.embedding_size)))


@adapter.builds(specs.Embedding)
def build_embedding(spec, ctx):
    return nn.Embedding(*spec.weight.shape, embedding_init=spec.weight)
