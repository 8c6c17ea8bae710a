"""Layers without weights: dropout, pooling, activations, other functions."""

from __future__ import annotations

import functools

import flax.linen as nn

from ... import formulas, specs
from ..nnx.functions import build_pool
from .adapter import Node, adapter


@adapter.reads(nn.Dropout, specs.Dropout)
def read_dropout(node, ctx):
    m = node.module
    return specs.Dropout(
        rate=m.rate, broadcast_dims=tuple(m.broadcast_dims), rng_collection=m.rng_collection
    )


@adapter.builds(specs.Dropout, carries=("broadcast_dims",))
def build_dropout(spec, ctx):
    return Node(
        nn.Dropout(
            spec.rate,
            broadcast_dims=spec.broadcast_dims,
            deterministic=not ctx.options.get("train", False),
            rng_collection=spec.rng_collection,
        ),
        {},
    )


adapter.builds(specs.Pool, carries=("counts_padding",))(build_pool)  # the same functions


@adapter.builds(specs.Activation)
def build_activation(spec, ctx):
    fn = formulas.ACTIVATIONS[spec.name]
    return functools.partial(fn, **spec.options) if spec.options else fn


@adapter.builds(specs.Flatten)
def build_flatten(spec, ctx):
    return functools.partial(
        formulas.flatten,
        start_axis=spec.start_axis,
        end_axis=spec.end_axis,
        in_size=spec.in_size,
    )


@adapter.builds(specs.Function)
def build_function(spec, ctx):
    return formulas.Batched(spec.fn) if spec.per_example else spec.fn
