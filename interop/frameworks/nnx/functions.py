"""Layers without weights: dropout, pooling, activations, other functions."""

from __future__ import annotations

import functools

from flax import nnx

from ... import formulas, specs
from .adapter import adapter


@adapter.reads(nnx.Dropout, specs.Dropout, state=("rngs",))
def read_dropout(m, ctx):
    return specs.Dropout(
        rate=m.rate, broadcast_dims=tuple(m.broadcast_dims), rng_collection=m.rng_collection
    )


@adapter.builds(specs.Dropout, carries=("broadcast_dims",))
def build_dropout(spec, ctx):
    return nnx.Dropout(
        spec.rate,
        broadcast_dims=spec.broadcast_dims,
        deterministic=True,
        rng_collection=spec.rng_collection,
        rngs=ctx.options.get("rngs"),
    )


@adapter.builds(specs.Pool, carries=("counts_padding",))
def build_pool(spec, ctx):
    options = {"window_shape": spec.window, "strides": spec.strides, "padding": spec.padding}
    if not spec.mean:
        return functools.partial(nnx.max_pool, **options)
    options["count_include_pad"] = spec.counts_padding
    return functools.partial(nnx.avg_pool, **options)


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
