"""Connections between groups of neurons."""

from __future__ import annotations

from ... import specs
from .adapter import adapter
from .linear import build_dense


@adapter.builds(specs.AllToAll, carries=("leading_shape",))
def build_all_to_all(spec, ctx):
    plain = spec.as_linear()
    if plain is None:
        ctx.refuse("include_self", spec.include_self, "only a plain product is native")
    return build_dense(plain, ctx)
