"""Layers around another one, whose weight they normalise."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp

from ... import specs
from ...walk import Building, Reading
from .adapter import Node, adapter, make

_LAYERS = (eqx.nn.Linear, eqx.nn.Conv, eqx.nn.ConvTranspose)


def _read_layer(node: Node, ctx: Reading) -> Any:
    m = node.module
    if m.weight_name != "weight":
        ctx.refuse("weight_name", m.weight_name, "only the weight converts")
    layer = ctx.read(Node(m.layer, node.state), f"{ctx.path}.layer")
    if not isinstance(m.layer, _LAYERS):
        ctx.refuse("layer", type(m.layer).__qualname__, "only Linear and convolutions convert")
    return layer


@adapter.reads(eqx.nn.SpectralNorm, specs.SpectralNorm)
def read_spectral_norm(node: Node, ctx: Reading) -> specs.SpectralNorm:
    m, layer = node.module, _read_layer(node, ctx)
    state: Any = node.state
    u, v = state.get(m.uv_index)
    space = layer.weight.shape[:-2]  # which Equinox has after the inputs
    return specs.SpectralNorm(
        layer=layer,
        u=u,
        v=jnp.moveaxis(v.reshape(-1, *space), 0, -1) if space else v,
        steps=m.num_power_iterations,
        epsilon=m.eps,
    )


@adapter.builds(specs.SpectralNorm, carries=("v", "steps", "epsilon"))
def build_spectral_norm(spec: specs.SpectralNorm, ctx: Building) -> eqx.nn.SpectralNorm[Any]:
    v: Any = spec.v
    if v is None:
        return ctx.refuse("v", None, "Equinox keeps both vectors")
    v = jnp.moveaxis(v, -1, 0).reshape(-1) if v.ndim > 1 else v
    return make(
        eqx.nn.SpectralNorm,
        layer=ctx.build_part(spec.layer, _LAYERS),
        weight_name="weight",
        uv_index=eqx.nn.StateIndex((spec.u, v)),
        num_power_iterations=spec.steps,
        eps=spec.epsilon,
        inference=True,
    )


@adapter.reads(eqx.nn.WeightNorm, specs.WeightNorm)
def read_weight_norm(node: Node, ctx: Reading) -> specs.WeightNorm:
    m, layer = node.module, _read_layer(node, ctx)
    axes = () if m.axis is None else (_moved(m.axis % m.g.ndim, m.g.ndim),)
    return specs.WeightNorm(
        layer=layer, scale=m.g.reshape([-1] * len(axes)), axes=axes, epsilon=0.0
    )


def _moved(axis: int, ndim: int) -> int:
    """Where an axis of ``(out, in, *kernel)`` is in ``(*kernel, in, out)``, from its end."""
    return -1 - axis if axis < 2 else axis - 2 - ndim


@adapter.builds(specs.WeightNorm, carries=("scale", "axes", "epsilon"))
def build_weight_norm(spec: specs.WeightNorm, ctx: Building) -> Any:
    if spec.epsilon != 0:
        ctx.refuse("epsilon", spec.epsilon, "Equinox adds nothing to the norm")
    if spec.axes is None or len(spec.axes) > 1:
        ctx.refuse("axes", spec.axes, "Equinox has norms along one axis, or one for all")
    scale: Any = spec.scale
    if scale is None:
        return ctx.refuse("use_scale", False, "Equinox has a scale")
    ndim = len(spec.layer.weight.shape)
    found = (
        [axis for axis in range(ndim) if (_moved(axis, ndim) - spec.axes[0]) % ndim == 0]
        if spec.axes
        else [None]
    )
    norm: Any = eqx.nn.WeightNorm(ctx.build_part(spec.layer, _LAYERS), "weight", found[0])
    return eqx.tree_at(lambda m: m.g, norm, scale.reshape(norm.g.shape))
