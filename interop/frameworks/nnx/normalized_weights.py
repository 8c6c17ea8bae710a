"""Layers around another one, whose kernel they normalise, and write back into it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ... import specs
from ...walk import Building, Reading
from .adapter import NO_RNGS, adapter, returns

_LAYERS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.ConvTranspose)


def _read_layer(m: Any, ctx: Reading, paths: list[tuple[Any, ...]]) -> Any:
    """The spec of the layer within, of whose arrays those at ``paths`` are normalised."""
    native = m.layer_instance
    layer = ctx.read(native, f"{ctx.path}.layer_instance")
    kernel = getattr(native, "kernel", None)
    own = kernel is not None and getattr(layer, "weight", None) is kernel.get_raw_value()
    if paths and not (
        own and specs.NormalizedWeight.takes(layer) and {*paths} <= {("kernel",), ("bias",)}
    ):
        ctx.refuse("layer_instance", type(native).__qualname__, ONLY_KERNELS)
    return layer


ONLY_KERNELS = (
    "only a dense layer or a convolution converts here, whose kernel has the output's features "
    "last"
)


@adapter.reads(
    nnx.SpectralNorm, specs.SpectralNorm, state=("layer_instance", "batch_stats", "rngs")
)
def read_spectral_norm(m: nnx.SpectralNorm, ctx: Reading) -> specs.SpectralNorm:
    paths = [path[:-1] for path in m.batch_stats] if m.n_steps >= 1 else []
    layer = _read_layer(m, ctx, paths)
    if not paths:  # there is nothing to normalise
        return layer
    u, sigma = (m.batch_stats["kernel", name].get_raw_value() for name in ("u", "sigma"))
    return specs.SpectralNorm(
        layer=layer,
        u=u[0],
        sigma=sigma,
        steps=m.n_steps,
        epsilon=m.epsilon,
        dtype=specs.dtype(m.dtype),
        overwrites=True,
    )


def _build_layer(spec: Any, ctx: Building) -> Any:
    if not spec.overwrites:
        ctx.refuse("overwrites", False, "NNX leaves the new kernel in the place of the old one")
    check_layer(spec, ctx)
    return ctx.build_part(spec.layer, _LAYERS)


def check_layer(spec: Any, ctx: Building) -> None:
    """Refuse a layer whose kernel Flax mirrors."""
    if isinstance(spec.layer, specs.ConvTranspose) and spec.layer.padding_mode != "ZEROS":
        ctx.refuse("layer.padding_mode", spec.layer.padding_mode, "Flax may mirror the kernel")


@adapter.builds(
    specs.SpectralNorm, carries=("dtype", "overwrites", "sigma", "steps", "epsilon")
)
def build_spectral_norm(spec: specs.SpectralNorm, ctx: Building) -> nnx.SpectralNorm:
    norm = nnx.SpectralNorm(
        _build_layer(spec, ctx),
        n_steps=0,  # so that nothing is drawn
        epsilon=spec.epsilon,
        dtype=spec.dtype,
        param_dtype=spec.u.dtype,
        update_stats=False,
        rngs=NO_RNGS,
    )
    norm.n_steps = spec.steps
    sigma = jnp.ones((), spec.u.dtype) if spec.sigma is None else spec.sigma
    arrays = {"u": spec.u[None], "sigma": sigma}
    norm.batch_stats = nnx.data(
        {("kernel", name): nnx.BatchStat(array) for name, array in arrays.items()}
    )
    return norm


@adapter.reads(nnx.WeightNorm, specs.WeightNorm, state=("layer_instance", "scales"))
def read_weight_norm(m: Any, ctx: Reading) -> specs.WeightNorm:
    state: Any = nnx.to_flat_state(nnx.state(m.layer_instance))
    paths = [path for path, variable in state if m.variable_filter(path, variable)]
    layer = _read_layer(m, ctx, paths)
    if not paths:
        return layer
    fields: dict[str, Any] = {}
    for name, own in (("kernel", ""), ("bias", "bias_")):
        normalises = (name,) in paths
        array = getattr(layer, "weight" if name == "kernel" else name)
        fields[f"{own}axes"] = normalized_axes(m, array, ctx) if normalises else None
        if normalises and m.use_scale:
            scale = m.scales[name,]
            is_trained = isinstance(scale, nnx.Param)  # since flax 0.12.12
            value = scale.get_raw_value() if isinstance(scale, nnx.Variable) else scale
            sizes = tuple(array.shape[axis] for axis in fields[f"{own}axes"])
            fields[f"{'' if is_trained else 'fixed_'}{own}scale"] = value.reshape(sizes)
    return specs.WeightNorm(
        layer=layer,
        **fields,
        epsilon=m.epsilon,
        dtype=specs.dtype(m.dtype),
        overwrites=True,
    )


def normalized_axes(m: Any, array: Any, ctx: Reading) -> tuple[int, ...]:
    """The axes of an array that have norms of their own, which Flax spells alike in both."""
    given = () if m.feature_axes is None else m.feature_axes
    axes = (given,) if isinstance(given, int) else tuple(given)
    if any(not -array.ndim <= axis < array.ndim for axis in axes):
        ctx.refuse("feature_axes", given, f"an array has {array.ndim} axes here")
    return tuple(sorted({axis % array.ndim - array.ndim for axis in axes}))


def feature_axes(spec: Any, ctx: Building) -> Any:
    """The same option, as both constructors take it."""
    axes, bias_axes = spec.axes, spec.bias_axes
    if axes is None or bias_axes is None:
        return axes if bias_axes is None else bias_axes
    counted = [
        tuple(sorted(axis % array.ndim - array.ndim for axis in part))
        for array, part in ((spec.layer.weight, axes), (spec.layer.bias, bias_axes))
    ]
    if counted[0] != counted[1]:
        ctx.refuse("bias_axes", bias_axes, "Flax has the same axes for kernel and bias")
    return counted[0]


def normalized_names(spec: Any) -> list[str]:
    """The arrays that are normalised, by Flax's names."""
    axes = {"kernel": spec.axes, "bias": spec.bias_axes}
    return [name for name, given in axes.items() if given is not None]


def scales_of(spec: Any, ctx: Building) -> dict[str, Any]:
    """Their scales, by the same names; Flax has one for each, or for none."""
    parts = spec.parts
    scales = {"kernel": parts["weight"][1], "bias": parts["bias"][1]}
    found = {name: scales[name] for name in normalized_names(spec)}
    if len({scale is None for scale in found.values()}) > 1:
        ctx.refuse("use_scale", "of one", "Flax has all scales or none")
    return {name: scale for name, scale in found.items() if scale is not None}


@functools.cache
def _trains_scales() -> bool:
    """Whether NNX's scales are parameters: since flax 0.12.12."""
    linear = nnx.Linear(
        1, 1, use_bias=False, kernel_init=returns(jnp.ones((1, 1))), rngs=NO_RNGS
    )
    norm: Any = nnx.WeightNorm(linear, scale_init=returns(jnp.ones(1)), rngs=_NO_KEYS)
    return isinstance(norm.scales["kernel",], nnx.Param)


_NO_KEYS: Any = {"params": None}


@adapter.builds(
    specs.WeightNorm,
    carries=(
        *("dtype", "overwrites", "axes", "bias_axes", "epsilon"),
        *("scale", "bias_scale", "fixed_scale", "fixed_bias_scale"),
    ),
)
def build_weight_norm(spec: specs.WeightNorm, ctx: Building) -> nnx.WeightNorm:
    axes, names, scales = feature_axes(spec, ctx), normalized_names(spec), scales_of(spec, ctx)
    is_trained = spec.fixed_scale is None and spec.fixed_bias_scale is None
    if scales and is_trained != _trains_scales():
        ctx.refuse("scale", "trained" if is_trained else "fixed", "NNX has it otherwise here")
    in_order = iter([scales[name] for name in sorted(scales)])
    norm = nnx.WeightNorm(
        _build_layer(spec, ctx),
        feature_axes=axes,
        use_scale=bool(scales),
        scale_init=lambda *_: next(in_order),
        epsilon=spec.epsilon,
        dtype=spec.dtype,
        variable_filter=nnx.Any(*map(nnx.PathContains, names)),
        rngs=_NO_KEYS,
    )
    norm.scale_init = jax.nn.initializers.ones
    return norm
