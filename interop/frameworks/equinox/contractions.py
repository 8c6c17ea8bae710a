"""Contractions of several axes."""

from __future__ import annotations

from typing import Any

from ... import specs
from ...walk import Building
from .adapter import adapter
from .linear import build_linear


@adapter.builds(specs.LinearGeneral)
def build_linear_general(spec: specs.LinearGeneral, ctx: Building) -> Any:
    plain = spec.as_linear()
    if plain is None:
        ctx.refuse("out_features", spec.out_shape, "only one axis of features is native")
    return build_linear(plain, ctx)
