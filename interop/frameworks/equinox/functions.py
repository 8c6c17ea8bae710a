"""Layers without weights: dropout, pooling, activations, other functions."""

from __future__ import annotations

import dataclasses
import functools

import equinox as eqx
import jax.numpy as jnp

from ... import formulas, specs
from .adapter import adapter, make


@adapter.reads(eqx.nn.Dropout, specs.Dropout)
def read_dropout(node, ctx):
    p = node.module.p
    if not isinstance(p, int | float):
        ctx.refuse("p", p, "only a number converts, not an array")
    return specs.Dropout(rate=float(p), rng_collection="dropout")


@adapter.builds(specs.Dropout)
def build_dropout(spec, ctx):
    return make(eqx.nn.Dropout, p=spec.rate, inference=True)


@adapter.reads(eqx.nn.Identity, specs.Activation)
def read_identity(node, ctx):
    return specs.Activation(name="identity")


@adapter.reads(eqx.nn.Lambda, specs.Function)
def read_lambda(node, ctx):
    fn = node.module.fn
    if fn is jnp.ravel:
        return specs.Flatten(start_axis=1, end_axis=-1, in_size=None)
    spec = ctx.read_callable(fn, ctx.path)
    if isinstance(spec, specs.Activation) and "axis" in spec.options:
        axis = spec.options["axis"]
        return dataclasses.replace(spec, options={**spec.options, "axis": _batched(axis)})
    if isinstance(spec, specs.Flatten) and spec.in_size is None:
        return dataclasses.replace(
            spec, start_axis=_batched(spec.start_axis), end_axis=_batched(spec.end_axis)
        )
    return spec


def _batched(axis: int) -> int:
    """An axis of one example, counted in a batch."""
    return axis + 1 if axis >= 0 else axis


def _single(axis: int, option: str, ctx) -> int:
    """An axis of a batch, counted in one example."""
    if axis == 0:
        ctx.refuse(option, axis, "it is the batch axis, and an Equinox module sees one example")
    return axis - 1 if axis > 0 else axis


_POOLS = {
    False: (eqx.nn.MaxPool1d, eqx.nn.MaxPool2d, eqx.nn.MaxPool3d),
    True: (eqx.nn.AvgPool1d, eqx.nn.AvgPool2d, eqx.nn.AvgPool3d),
}


@adapter.reads(eqx.nn.MaxPool1d, specs.Pool, fixed={"use_ceil": False})
@adapter.reads(eqx.nn.MaxPool2d, specs.Pool, fixed={"use_ceil": False})
@adapter.reads(eqx.nn.MaxPool3d, specs.Pool, fixed={"use_ceil": False})
@adapter.reads(eqx.nn.AvgPool1d, specs.Pool, fixed={"use_ceil": False})
@adapter.reads(eqx.nn.AvgPool2d, specs.Pool, fixed={"use_ceil": False})
@adapter.reads(eqx.nn.AvgPool3d, specs.Pool, fixed={"use_ceil": False})
def read_pool(node, ctx):
    m = node.module
    return specs.pool(isinstance(m, _POOLS[True]), True, m.kernel_size, m.stride, m.padding)


@adapter.builds(specs.Pool, carries=("counts_padding",))
def build_pool(spec, ctx):
    if spec.space > 3:
        ctx.refuse("window_shape", spec.window, "Equinox has 1 to 3 axes of space")
    pads = ((0, 0),) * spec.space
    if spec.padding != "VALID":
        pads = spec.pads(ctx.require_shape()[1:] if spec.padding == "SAME" else ())
    if spec.mean and any(map(any, pads)) and not spec.counts_padding:
        ctx.refuse("padding", spec.padding, "Equinox counts padding in the mean")
    if any(max(pair) > size for pair, size in zip(pads, spec.window, strict=True)):
        ctx.refuse("padding", pads, "Equinox takes no padding wider than the window")
    return _POOLS[spec.mean][spec.space - 1](spec.window, spec.strides, pads)


@adapter.builds(specs.Activation)
def build_activation(spec, ctx):
    if spec.name == "identity":
        return eqx.nn.Identity()
    fn, options = formulas.ACTIVATIONS[spec.name], dict(spec.options)
    if "axis" in options:
        options["axis"] = _single(options["axis"], "axis", ctx)
    return eqx.nn.Lambda(functools.partial(fn, **options) if options else fn)


@adapter.builds(specs.Flatten)
def build_flatten(spec, ctx):
    start, end = spec.start_axis, spec.end_axis
    if spec.in_size is None:
        start, end = _single(start, "start_axis", ctx), _single(end, "end_axis", ctx)
    return eqx.nn.Lambda(
        functools.partial(
            formulas.flatten, start_axis=start, end_axis=end, in_size=spec.in_size
        )
    )


@adapter.builds(specs.Function)
def build_function(spec, ctx):
    return eqx.nn.Lambda(spec.fn if spec.per_example else formulas.Single(spec.fn))
