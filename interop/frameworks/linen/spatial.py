"""Padding and pooling of images, by the same functions as in NNX."""

from __future__ import annotations

from ... import specs
from ..nnx.functions import build_formula
from ..nnx.spatial import build_pool
from .adapter import adapter

for _spec in (specs.AdaptivePool, specs.Pad):
    adapter.builds(_spec, carries=specs.options(_spec))(build_formula)
adapter.builds(specs.Pool, carries=specs.options(specs.Pool))(build_pool)
