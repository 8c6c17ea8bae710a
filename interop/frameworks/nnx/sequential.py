"""Stacks."""

from __future__ import annotations

from flax import nnx

from ... import specs
from ...walk import Building, Reading
from .adapter import adapter


@adapter.reads(nnx.Sequential, specs.Sequential, state=("layers",))
def read_sequential(m: nnx.Sequential, ctx: Reading) -> specs.Sequential:
    return specs.Sequential(layers=ctx.read_all(m.layers))


@adapter.builds(specs.Sequential)
def build_sequential(spec: specs.Sequential, ctx: Building) -> nnx.Sequential:
    return nnx.Sequential(*[ctx.build(layer) for layer in spec.layers])


adapter.refused |= dict.fromkeys(
    (nnx.List, nnx.Dict),
    "it has no forward of its own, and converts as a part of a module that chains its layers",
)
