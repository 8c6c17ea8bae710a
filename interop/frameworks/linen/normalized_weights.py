"""Layers around another one, whose kernel they normalise."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ... import specs
from ...walk import Building, Reading
from ..nnx.normalized_weights import (
    ONLY_KERNELS,
    check_layer,
    feature_axes,
    normalized_axes,
    normalized_names,
    scales_of,
)
from .adapter import Node, adapter
from .recurrent import above, below
from .variables import flatten, normalized_by

_LAYERS = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, nn.ConvLocal, nn.ConvTranspose)


def _arrays(node: Node) -> dict[str, Any]:
    """The parameters of the layer within by name."""
    within = below(node, "layer_instance").variables.get("params", {})
    return {"/".join(path): array for path, array in flatten(within, ())}


def _read_layer(node: Node, ctx: Reading, names: set[str]) -> Any:
    """The spec of the layer within, of whose arrays those of such names are normalised."""
    part = below(node, "layer_instance")
    layer = ctx.read(part, f"{ctx.path}.layer_instance")
    own = getattr(layer, "weight", None) is part.array("kernel") is not None
    if names and not (
        own and specs.NormalizedWeight.takes(layer) and names <= {"kernel", "bias"}
    ):
        ctx.refuse("layer_instance", type(part.module).__qualname__, ONLY_KERNELS)
    return layer


@adapter.reads(nn.SpectralNorm, specs.SpectralNorm)
def read_spectral_norm(node: Node, ctx: Reading) -> specs.SpectralNorm:
    m = node.module
    found = {name for name, array in _arrays(node).items() if array.ndim > 1}
    names = found if m.n_steps >= 1 else set()
    layer = _read_layer(node, ctx, names)
    if not names:  # there is nothing to normalise
        return layer
    u, sigma = (
        node.array(f"layer_instance/kernel/{name}", m.collection_name)
        for name in ("u", "sigma")
    )
    if u.dtype != jnp.promote_types(u.dtype, layer.weight.dtype):
        ctx.refuse("param_dtype", u.dtype, "its first call in training widens it")
    return specs.SpectralNorm(
        layer=layer,
        u=u[0],
        sigma=sigma,
        steps=m.n_steps,
        epsilon=m.epsilon,
        dtype=specs.dtype(m.dtype),
    )


@adapter.builds(specs.SpectralNorm, carries=("dtype", "sigma", "steps", "epsilon"))
def build_spectral_norm(spec: specs.SpectralNorm, ctx: Building) -> Node:
    if not ctx.stands_alone:
        ctx.refuse("update_stats", None, "Linen has it in each call, which a stack cannot pass")
    check_layer(spec, ctx)
    layer = ctx.build_part(spec.layer, _LAYERS)
    module = nn.SpectralNorm(
        layer.module,
        n_steps=spec.steps,
        epsilon=spec.epsilon,
        dtype=spec.dtype,
        param_dtype=spec.u.dtype,
    )
    sigma = jnp.ones((), spec.u.dtype) if spec.sigma is None else spec.sigma
    arrays = {"u": spec.u[None], "sigma": sigma}
    node = above(module, {"layer_instance": layer}, ctx)
    statistics = {f"layer_instance/kernel/{name}": array for name, array in arrays.items()}
    return Node(module, {**node.variables, "batch_stats": statistics})


@adapter.reads(nn.WeightNorm, specs.WeightNorm)
def read_weight_norm(node: Node, ctx: Reading) -> specs.WeightNorm:
    m, part = node.module, below(node, "layer_instance")
    names = set(normalized_by(m, _arrays(node)))
    layer = _read_layer(node, ctx, names)
    if not names:
        return layer
    fields: dict[str, Any] = {}
    for name, own in (("kernel", ""), ("bias", "bias_")):
        fields[f"{own}axes"] = axes = None
        if name in names:
            array = part.array(name)
            fields[f"{own}axes"] = axes = normalized_axes(m, array, ctx)
            if m.use_scale:
                scale = node.array(f"layer_instance/{name}/scale")
                sizes = tuple(array.shape[axis] for axis in axes)
                fields[f"{own}scale"] = scale.reshape(sizes)
    return specs.WeightNorm(
        layer=layer, **fields, epsilon=m.epsilon, dtype=specs.dtype(m.dtype)
    )


@adapter.builds(
    specs.WeightNorm,
    carries=("dtype", "axes", "bias_axes", "epsilon", "scale", "bias_scale"),
)
def build_weight_norm(spec: specs.WeightNorm, ctx: Building) -> Node:
    axes, names, scales = feature_axes(spec, ctx), normalized_names(spec), scales_of(spec, ctx)
    check_layer(spec, ctx)
    layer = ctx.build_part(spec.layer, _LAYERS)
    module = nn.WeightNorm(
        layer.module,
        epsilon=spec.epsilon,
        dtype=spec.dtype,
        param_dtype=specs.common_dtype(*scales.values()),
        use_scale=bool(scales),
        feature_axes=axes,
        variable_filter=set(names),
    )
    node = above(module, {"layer_instance": layer}, ctx)
    params = dict(node.variables["params"])
    params |= {f"layer_instance/{name}/scale": scale for name, scale in scales.items()}
    return Node(module, {**node.variables, "params": params})
