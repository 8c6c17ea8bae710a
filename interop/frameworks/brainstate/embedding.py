"""Embeddings."""

from __future__ import annotations

from brainstate import nn

from ... import specs
from ...walk import Building, Reading
from .adapter import adapter, arrays_of

_OPTIONS = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq")


@adapter.reads(nn.Embedding, specs.Embedding, state=("weight",))
def read_embedding(m: nn.Embedding, ctx: Reading) -> specs.Embedding:
    arrays = arrays_of(m, ctx, weight=(m.num_embeddings, *m.embedding_size))
    options = {name: getattr(m, name) for name in _OPTIONS}
    if m.max_norm is None:
        del options["norm_type"]
    return (specs.FrozenEmbedding if m.freeze else specs.Embedding)(**arrays, **options)


@adapter.builds(specs.Embedding, carries=_OPTIONS)
@adapter.builds(specs.FrozenEmbedding, carries=_OPTIONS)
def build_embedding(
    spec: specs.Embedding | specs.FrozenEmbedding, ctx: Building
) -> nn.Embedding:
    number, *features = spec.weight.shape
    options = {name: getattr(spec, name) for name in _OPTIONS}
    options["freeze"] = isinstance(spec, specs.FrozenEmbedding)
    layer = nn.Embedding(number, features, embedding_init=spec.weight, **options)
    layer.weight.value = spec.weight  # the constructor sets the row of padding to zero
    return layer
