"""Layers that drop a part of their input in training."""

from __future__ import annotations

from flax import nnx

from ... import specs
from ...walk import Building, Reading
from .adapter import adapter


@adapter.reads(nnx.Dropout, specs.Dropout, state=("rngs",))
def read_dropout(m: nnx.Dropout, ctx: Reading) -> specs.Dropout:
    return specs.Dropout(
        rate=m.rate, broadcast_dims=tuple(m.broadcast_dims), rng_collection=m.rng_collection
    )


@adapter.builds(specs.Dropout, carries=("broadcast_dims",))
def build_dropout(spec: specs.Dropout, ctx: Building) -> nnx.Dropout:
    return nnx.Dropout(
        spec.rate,
        broadcast_dims=spec.broadcast_dims,
        deterministic=True,
        rng_collection=spec.rng_collection,
        rngs=ctx.options.get("rngs"),
    )
