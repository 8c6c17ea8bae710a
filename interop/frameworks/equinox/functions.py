"""Functions, and layers that are little more."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ... import formulas, specs
from ...walk import Building, Reading
from .adapter import Node, adapter, make


@adapter.reads(eqx.nn.Identity, specs.Activation)
def read_identity(node: Node, ctx: Reading) -> specs.Activation:
    return specs.Activation(name="identity")


@adapter.reads(eqx.nn.Lambda, specs.Function)
def read_lambda(node: Node, ctx: Reading) -> specs.Spec:
    fn = node.module.fn
    if isinstance(fn, eqx.Module):  # what takes no key stands so in a stack
        return ctx.read(Node(fn, node.state), f"{ctx.path}.fn")
    if any(map(eqx.is_inexact_array, jax.tree.leaves(fn))):  # as in a jax.tree_util.Partial
        ctx.refuse("fn", fn, "Equinox trains the arrays that it holds, which a function hides")
    if fn is jnp.ravel:
        return specs.Flatten(start_axis=1)
    spec = ctx.read_callable(fn, ctx.path)
    if isinstance(spec, specs.Activation) and "axis" in spec.options:
        axis = spec.options["axis"]
        return dataclasses.replace(spec, options={**spec.options, "axis": _batched(axis)})
    if isinstance(spec, specs.Formula):
        axes = {name: getattr(spec, name) for name in spec.axes}
        return dataclasses.replace(spec, **{k: _batched(v, k) for k, v in axes.items()})
    return spec


def _batched(axis: int | None, option: str = "axis") -> int | None:
    """An axis of one example, counted in a batch; that of channels is where all have it."""
    if option == "channel_axis" and axis == 0:
        return -1
    return axis if axis is None or axis < 0 else axis + 1


def _single(axis: int | None, option: str, ctx: Building) -> int | None:
    """The inverse of :func:`_batched`."""
    if option == "channel_axis" and axis in (-1, 0):
        return 0 if axis else None  # examples have their channels first, or none at all
    if axis == 0:
        ctx.refuse(option, axis, "it is the batch axis, and an Equinox module sees one example")
    return axis if axis is None or axis < 0 else axis - 1


@adapter.builds(specs.Activation)
def build_activation(spec: specs.Activation, ctx: Building) -> eqx.nn.Identity | eqx.nn.Lambda:
    if spec.name == "identity":
        return eqx.nn.Identity()
    fn, options = formulas.ACTIVATIONS[spec.name], dict(spec.options)
    if "axis" in options:
        options["axis"] = _single(options["axis"], "axis", ctx)
    return eqx.nn.Lambda(functools.partial(fn, **options) if options else fn)


@adapter.builds(specs.Flatten, carries=specs.options(specs.Flatten))
@adapter.builds(specs.Unflatten)
def build_formula(spec: specs.Formula, ctx: Building) -> eqx.nn.Lambda:
    axes = {name: _single(getattr(spec, name), name, ctx) for name in spec.axes}
    return eqx.nn.Lambda(dataclasses.replace(spec, **axes).function)


@adapter.reads(eqx.nn.PReLU, specs.PReLU)
def read_prelu(node: Node, ctx: Reading) -> specs.PReLU:
    return specs.PReLU(slope=node.module.negative_slope)


@adapter.builds(specs.PReLU)
def build_prelu(spec: specs.PReLU, ctx: Building) -> Any:
    if spec.slope.ndim > 1 and spec.mixes_examples(len(ctx.require_shape())):
        ctx.refuse("slope", spec.slope.shape, "it has an axis for the batch")
    layer = make(eqx.nn.PReLU, negative_slope=spec.slope)
    return layer if ctx.stands_alone else eqx.nn.Lambda(layer)  # its call takes no key


@adapter.builds(specs.Function)
def build_function(spec: specs.Function, ctx: Building) -> eqx.nn.Lambda:
    return eqx.nn.Lambda(spec.fn if spec.per_example else formulas.Single(spec.fn))
