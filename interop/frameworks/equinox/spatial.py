"""Padding and pooling of images."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import numpy as np

from ... import specs
from ...walk import Building, Reading
from .adapter import Node, adapter
from .functions import build_formula

_POOLS = {
    "max": (eqx.nn.MaxPool1d, eqx.nn.MaxPool2d, eqx.nn.MaxPool3d),
    "mean": (eqx.nn.AvgPool1d, eqx.nn.AvgPool2d, eqx.nn.AvgPool3d),
}
_ADAPTIVE = {
    "mean": (eqx.nn.AdaptiveAvgPool1d, eqx.nn.AdaptiveAvgPool2d, eqx.nn.AdaptiveAvgPool3d),
    "max": (eqx.nn.AdaptiveMaxPool1d, eqx.nn.AdaptiveMaxPool2d, eqx.nn.AdaptiveMaxPool3d),
}


def _reads_pool(kind: str, cls: type) -> None:
    @adapter.reads(cls, specs.Pool)
    def read_pool(node: Node, ctx: Reading) -> specs.Pool:
        m = node.module
        options: dict[str, Any] = {}
        if kind == "fold":
            _check_plain("operation", m.operation, ctx)
            if not isinstance(m.init, int | float):
                ctx.refuse("init", m.init, "only a number converts, not an array")
            options = {"operation": m.operation, "init": m.init}
        if m.use_ceil:
            options["ceil"] = True
        return specs.pool(kind, m.kernel_size, m.stride, m.padding, **options)


def _reads_adaptive_pool(kind: str, cls: type) -> None:
    @adapter.reads(cls, specs.AdaptivePool)
    def read_adaptive_pool(node: Node, ctx: Reading) -> specs.AdaptivePool:
        m = node.module
        target = tuple(m.target_shape)
        if kind != "fold":
            return specs.AdaptivePool(target=target, kind=kind)
        _check_plain("operation", m.operation, ctx)
        return specs.AdaptivePool(target=target, kind="fold", operation=m.operation)


def _check_plain(option: str, fn: Any, ctx: Reading) -> None:
    if any(eqx.is_array(leaf) for leaf in jax.tree.leaves(fn)):
        ctx.refuse(option, fn, "only a function without arrays converts")


_FOLDS = {"fold": (eqx.nn.Pool,)}, {"fold": (eqx.nn.AdaptivePool,)}

for _table, _reads in (
    (_POOLS | _FOLDS[0], _reads_pool),
    (_ADAPTIVE | _FOLDS[1], _reads_adaptive_pool),
):
    for _kind, _classes in _table.items():
        for _cls in _classes:
            _reads(_kind, _cls)


adapter.builds(specs.Pad, carries=specs.options(specs.Pad))(build_formula)


@adapter.builds(specs.Pool, carries=specs.options(specs.Pool))
def build_pool(spec: specs.Pool, ctx: Building) -> Any:
    if spec.indices is not None:
        ctx.refuse("indices", spec.indices, "Equinox's pools return no indices")
    pads = None
    if spec.is_plain("max", "mean", "fold", ceil=spec.ceil, counts="window"):
        pads = _pads(spec, ctx)
    if pads is None or (spec.kind != "fold" and spec.dims > 3):
        return build_formula(spec, ctx)
    options = {"stride": spec.steps, "padding": pads, "use_ceil": spec.ceil}
    if spec.operation is not None:
        return eqx.nn.Pool(spec.init, spec.operation, spec.dims, spec.window, **options)
    return _POOLS[spec.kind][spec.dims - 1](spec.window, **options)


def _pads(spec: Any, ctx: Building) -> Any:
    """The padding as pairs that Equinox takes, or None."""
    if spec.padding == "SAME" and (ctx.shape is None or spec.ceil):
        return None
    pads = spec.pads((ctx.shape or ())[1:])
    limits = np.asarray(pads).max(-1) + np.multiply(spec.ceil, spec.steps)
    return pads if (limits <= spec.window).all() else None


@adapter.builds(specs.AdaptivePool, carries=specs.options(specs.AdaptivePool))
def build_adaptive_pool(spec: specs.AdaptivePool, ctx: Building) -> Any:
    target: Any = spec.target
    if spec.channel_axis != -1 or None in target:
        return build_formula(spec, ctx)
    if spec.operation is not None:
        return eqx.nn.AdaptivePool(target, spec.dims, spec.operation)
    if spec.dims > 3:
        return build_formula(spec, ctx)
    return _ADAPTIVE[spec.kind][spec.dims - 1](target)
