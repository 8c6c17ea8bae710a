"""Padding and pooling of images, for Linen as well: its functions are the same."""

from __future__ import annotations

import functools
from typing import Any

from ... import specs
from ...walk import Building
from .adapter import POOLS, adapter
from .functions import build_formula


def build_pool(spec: specs.Pool, ctx: Building) -> Any:
    if not spec.is_plain(*POOLS) or spec.counts == "covered":
        return spec.function
    options: dict[str, Any] = {"window_shape": spec.window}
    if spec.kind == "fold":
        options |= {"init": spec.init, "reduce_fn": spec.operation}
    if spec.kind == "mean":
        options["count_include_pad"] = spec.counts == "window"
    options |= {"strides": spec.steps, "padding": spec.padding}
    return functools.partial(POOLS[spec.kind], **options)


for _spec in (specs.AdaptivePool, specs.Pad):
    adapter.builds(_spec, carries=specs.options(_spec))(build_formula)
adapter.builds(specs.Pool, carries=specs.options(specs.Pool))(build_pool)
