"""BrainState. Channels last and batched; a layer packs its arrays in one ``ParamState``.

Train or evaluation mode is ``brainstate.environ``'s ``fit``, so that modules carry no flag.
Dropout's ``prob`` is the probability to keep. Normalisation layers round ``epsilon`` and
``momentum`` to their dtype and cast their result to it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import brainstate
import brainunit
import jax
import jax.numpy as jnp
import numpy as np
from brainstate import nn
from brainstate.nn import init

from .. import formulas, specs
from ..composites.brainstate import COMPOSITES, Lambda, StateInit
from ..errors import ArgumentError
from ..registry import Adapter

_PARAM_TYPES = (brainstate.ParamState, type(nn.LayerNorm((1,)).weight))
_OF_A_RUN = (brainstate.ShortTermState, brainstate.random.RandomState)


class BrainState(Adapter):
    name = "brainstate"
    module_type = brainstate.nn.Module
    is_hub = True

    def containers(self, node):
        return [(k, v) for k, v in vars(node).items() if isinstance(v, brainstate.State)]

    def added_state(self, module, rule):
        held = brainstate.State | brainstate.graph.Node
        return {k for k, v in vars(module).items() if isinstance(v, held)} - rule.state

    def close(self, built, options):
        return built if isinstance(built, nn.Module) else Lambda(built)

    def has_children(self, module):
        return any(path for path in module.nodes() if path)

    def arrays(self, node):
        masks = (getattr(module, "w_mask", None) for module in node.nodes().values())
        held = jax.tree.leaves([state.value for state in node.states().values()])
        return [*held, *(mask for mask in masks if mask is not None)]

    def parameters(self, node):
        states = node.states(brainstate.ParamState)
        return {path: state.value for path, state in states.items()}

    def with_parameters(self, node, parameters):
        copy = brainstate.graph.treefy_merge(*brainstate.graph.treefy_split(node))
        for path, state in copy.states(brainstate.ParamState).items():
            state.value = parameters[path]
        return copy

    def container(self, leaves):
        found: dict[Any, Any] = {}
        for path, leaf in leaves.items():
            if isinstance(path[-1], str) and path[-2:-1] == ("weight",):
                found.setdefault(path[:-1], {})[path[-1]] = leaf
            else:
                found[path] = leaf
        return found

    def held(self, node):
        states = node.states().items()
        return {path: s.value for path, s in states if not isinstance(s, _OF_A_RUN)}

    def hold(self, node, values):
        states = node.states()
        for path, value in values.items():
            states[path].value = value
        return node

    def run(self, node, inputs, train):
        copy = brainstate.graph.treefy_merge(*brainstate.graph.treefy_split(node))
        with brainstate.environ.context(fit=train):
            return copy(*inputs)


adapter = BrainState()
adapter.ships(COMPOSITES)


def _arrays(layer, ctx, name: str = "weight", **shapes: tuple[int, ...]) -> dict[str, Any]:
    """The arrays that a state of the layer packs, by name, with their canonical shapes."""
    state = getattr(layer, name)
    if state is None:
        return {}
    if type(state) not in _PARAM_TYPES:
        ctx.refuse(
            "param_type",
            type(state).__qualname__,
            "it may be trained in its own way, or not at all",
        )
    arrays = state.value if isinstance(state.value, dict) else {name: state.value}
    for key, value in arrays.items():
        if isinstance(value, brainunit.Quantity) and not value.is_unitless:
            ctx.refuse(
                f"{name}[{key!r}]",
                value.unit,
                "only BrainState computes with units",
                "Divide the weight by its unit first, or wrap the layer live with shims.wrap",
            )
        if np.size(value) != math.prod(shapes[key]):
            ctx.refuse(
                f"{name}[{key!r}].shape",
                np.shape(value),
                f"one value is used for several of {shapes[key]}",
                "Initialise the layer with an array of the full shape",
            )
    return {k: _reshape(brainunit.get_magnitude(v), shapes[k]) for k, v in arrays.items()}


def _real(value: Any) -> float:
    """A hyperparameter that the layer rounded to its dtype, as the number its user wrote."""
    array = np.asarray(value)
    return float(str(array)) if array.dtype == np.float32 else float(array)


@adapter.reads(nn.Sequential, specs.Sequential, state=("layers",))
def read_sequential(m, ctx):
    if [type(layer) for layer in m.layers] == [nn.RMSNorm, nn.OneToOne]:
        norm, affine = m.layers
        return _read_rms_norm_with_bias(norm, affine, ctx)
    return specs.Sequential(layers=ctx.read_all(m.layers))


@adapter.builds(specs.Sequential)
def build_sequential(spec, ctx):
    first, *rest = [ctx.build(layer) for layer in spec.layers]
    if not isinstance(first, nn.Module):  # BrainState takes plain callables after a module only
        first = Lambda(first)
    return nn.Sequential(first, *rest)


def _check_one_dtype(weight, bias, ctx):
    if bias is not None and bias.dtype != weight.dtype:
        ctx.refuse(
            "bias.dtype",
            bias.dtype,
            f"BrainState adds the bias after the product in {weight.dtype}, where others "
            f"promote both first",
            "Cast the bias to the weight's dtype",
        )


@adapter.reads(nn.Linear, specs.Linear, state=("weight",))
def read_linear(m, ctx):
    n_in, n_out = m.in_size[-1], m.out_size[-1]
    arrays = _arrays(m, ctx, weight=(n_in, n_out), bias=(n_out,))
    weight, bias = arrays["weight"], arrays.get("bias")
    _check_one_dtype(weight, bias, ctx)
    return specs.Linear(
        weight=weight, bias=bias, mask=m.w_mask, leading_shape=tuple(m.in_size[:-1])
    )


@adapter.builds(specs.Linear, carries=("mask", "leading_shape"))
def build_linear(spec, ctx):
    weight, bias = spec.weight, spec.bias
    _check_one_dtype(weight, bias, ctx)
    leading = ctx.shape[:-1] if ctx.shape else spec.leading_shape
    in_size, out_size = (*leading, weight.shape[0]), (*leading, weight.shape[1])
    return nn.Linear(in_size, out_size, w_init=weight, b_init=bias, w_mask=spec.mask)


@adapter.builds(specs.LinearGeneral)
def build_linear_general(spec, ctx):
    plain = spec.as_linear()
    if plain is None:
        ctx.refuse("out_features", spec.out_shape, "only one axis of features is native")
    return build_linear(plain, ctx)


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SCALED = (nn.ScaledWSConv1d, nn.ScaledWSConv2d, nn.ScaledWSConv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@adapter.reads(nn.Conv1d, specs.Conv, state=("weight",))
@adapter.reads(nn.Conv2d, specs.Conv, state=("weight",))
@adapter.reads(nn.Conv3d, specs.Conv, state=("weight",))
def read_conv(m, ctx):
    return specs.Conv(**_input_dilation(m), **_conv_fields(m, ctx))


@adapter.reads(nn.ScaledWSConv1d, specs.ScaledWSConv, state=("weight",))
@adapter.reads(nn.ScaledWSConv2d, specs.ScaledWSConv, state=("weight",))
@adapter.reads(nn.ScaledWSConv3d, specs.ScaledWSConv, state=("weight",))
def read_scaled_conv(m, ctx):
    gain = _arrays(m, ctx, **_conv_shapes(m)).get("gain")
    fields = _input_dilation(m) | _conv_fields(m, ctx)
    return specs.ScaledWSConv(gain=gain, epsilon=m.eps, **fields)


@adapter.reads(nn.ConvTranspose1d, specs.ConvTranspose, state=("weight",))
@adapter.reads(nn.ConvTranspose2d, specs.ConvTranspose, state=("weight",))
@adapter.reads(nn.ConvTranspose3d, specs.ConvTranspose, state=("weight",))
def read_conv_transpose(m, ctx):
    fields = _conv_fields(m, ctx)
    mask = fields["mask"]
    fields["weight"] = specs.flipped(fields["weight"])
    fields["mask"] = mask if mask is None else specs.flipped(mask)
    return specs.ConvTranspose(**fields)


def _conv_shapes(m) -> dict[str, Any]:
    out = (m.out_channels,)
    return {"weight": m.kernel_shape, "bias": out, "gain": out}


def _conv_fields(m, ctx) -> dict[str, Any]:
    """What all convolutions have; the kernel as the layer has it."""
    arrays, mask = _arrays(m, ctx, **_conv_shapes(m)), m.w_mask
    weight, bias = arrays["weight"], arrays.get("bias")
    _check_one_dtype(weight, bias, ctx)
    shape = tuple(m.in_size)
    return {
        "weight": weight,
        "bias": bias,
        "strides": m.stride,
        "padding": m.padding,
        "kernel_dilation": m.rhs_dilation,
        "groups": m.groups,
        "in_shape": specs.move_channels(shape, to_first=False) if m.channel_first else shape,
        "mask": mask if mask is None else np.broadcast_to(mask, m.kernel_shape),
        "channels_first": m.channel_first,
    }


def _input_dilation(m) -> dict[str, Any]:
    return {"input_dilation": None if set(m.lhs_dilation) == {1} else m.lhs_dilation}


_CONV = ("input_dilation", "mask", "channels_first")


@adapter.builds(specs.Conv, carries=_CONV)
def build_conv(spec, ctx):
    return _build_conv(_CONVS, spec, ctx, lhs_dilation=spec.input_dilation or 1)


@adapter.builds(specs.ScaledWSConv, carries=_CONV)
def build_scaled_conv(spec, ctx):
    options = {"lhs_dilation": spec.input_dilation or 1, "ws_gain": spec.gain is not None}
    layer = _build_conv(_SCALED, spec, ctx, eps=spec.epsilon, **options)
    if spec.gain is not None:
        gain = _reshape(spec.gain, (*[1] * (spec.dims + 1), spec.gain.shape[0]))
        layer.weight.value = {**layer.weight.value, "gain": gain}
    return layer


@adapter.builds(specs.ConvTranspose, carries=("mask", "channels_first"))
def build_conv_transpose(spec, ctx):
    mask = spec.mask if spec.mask is None else specs.flipped(spec.mask)
    options = {"w_init": specs.flipped(spec.weight), "w_mask": mask}
    return _build_conv(_TRANSPOSED, spec, ctx, **options)


def _build_conv(classes, spec, ctx, **options: Any) -> Any:
    """The layer of that class which has so many axes of space; ``options`` go before."""
    _check_one_dtype(spec.weight, spec.bias, ctx)
    if spec.dims > len(classes):
        ctx.refuse("kernel_size", spec.kernel, "BrainState has 1 to 3 axes")
    shape = _example_shape(spec, ctx)
    out = spec.weight.shape[-1]
    ones = [1] * spec.dims
    named = {
        "stride": spec.strides,
        "padding": spec.pads(shape) if spec.padding == "SAME_LOWER" else spec.padding,
        "rhs_dilation": spec.kernel_dilation,
        "groups": spec.groups,
        "w_init": spec.weight,
        "w_mask": spec.mask,
        "b_init": _reshape(spec.bias, (1, out, *ones) if spec.channels_first else (*ones, out)),
        "channel_first": spec.channels_first,
    }
    first = specs.move_channels(shape, to_first=True)
    in_size = first if spec.channels_first else shape
    return classes[spec.dims - 1](in_size, out, tuple(spec.kernel), **named | options)


def _example_shape(spec, ctx) -> tuple[int, ...]:
    """The shape ``(*space, in)`` of an example, which BrainState fixes.

    Raises:
        ArgumentError: it contradicts the kernel.
        MissingShapeError: it is not known.
    """
    shape = spec.last(ctx.shape) or spec.last(ctx.require_shape())
    if len(shape) != spec.dims + 1 or shape[-1] != spec.channels:
        raise ArgumentError(
            f"an example must have {spec.dims} axes of space, then {spec.channels} channels; "
            f"here it has the shape {shape}",
            path=ctx.path,
            remedy="Pass sample_input=, one example without its batch axis",
        )
    return shape


@adapter.reads(
    nn.Embedding,
    specs.Embedding,
    state=("weight",),
    fixed={"padding_idx": None, "max_norm": None, "scale_grad_by_freq": False, "freeze": False},
)
def read_embedding(m, ctx):
    if len(m.embedding_size) != 1:
        ctx.refuse("embedding_size", m.embedding_size, "only vectors convert")
    return specs.Embedding(**_arrays(m, ctx, weight=(m.num_embeddings, *m.embedding_size)))


@adapter.builds(specs.Embedding)
def build_embedding(spec, ctx):
    return nn.Embedding(*spec.weight.shape, embedding_init=spec.weight)


@adapter.reads(nn.LayerNorm, specs.LayerNorm, state=("weight",))
@adapter.reads(nn.RMSNorm, specs.RMSNorm, state=("scale",))
def read_layer_norm(m, ctx):
    ndim, is_rms = len(m.in_size), isinstance(m, nn.RMSNorm)
    reduction_axes = tuple(m.reduction_axes)
    if any(axis >= 0 for axis in reduction_axes):
        ctx.refuse(
            "reduction_axes",
            reduction_axes,
            "non-negative axes count batch axes, which are not known here",
            "Count the axes from the end",
        )
    feature_axes = sorted(m.feature_axes)
    feature_shape = tuple(m.in_size[axis] for axis in feature_axes)
    state = "scale" if is_rms else "weight"
    arrays = _arrays(m, ctx, state, scale=feature_shape, bias=feature_shape)
    return (specs.RMSNorm if is_rms else specs.LayerNorm)(
        **_norm_fields(m, arrays),
        feature_shape=feature_shape,
        leading_shape=tuple(m.in_size[: feature_axes[0]]),
        reduction_axes=tuple(sorted(reduction_axes)),
        feature_axes=tuple(axis - ndim for axis in feature_axes),
    )


def _norm_fields(m, arrays) -> dict[str, Any]:
    """What every normalisation layer holds."""
    return {
        "scale": arrays.get("scale"),
        "bias": arrays.get("bias"),
        "epsilon": _real(m.epsilon),
        "use_fast_variance": m.use_fast_variance,
        "axis_name": m.axis_name,
        "axis_index_groups": m.axis_index_groups,
        "output_dtype": specs.dtype(m.dtype),
    }


def _norm_options(spec) -> dict[str, Any]:
    return {
        "epsilon": spec.epsilon,
        "axis_name": spec.axis_name,
        "axis_index_groups": spec.axis_index_groups,
        "use_fast_variance": spec.use_fast_variance,
    }


def _affine_options(spec) -> dict[str, Any]:
    return {
        "use_scale": spec.scale is not None,
        "use_bias": spec.bias is not None,
        "scale_init": spec.scale,
        "bias_init": spec.bias,
    }


def _check_output_dtype(spec, ctx):
    if spec.scale is None and spec.bias is None and spec.output_dtype is None:
        ctx.refuse(
            "use_scale, use_bias",
            False,
            "without them BrainState returns float32 whatever the input's dtype",
            "Give the layer a dtype, such as dtype=jnp.float32",
        )


_AXES = ("leading_shape", "reduction_axes", "feature_axes")
_NORM = ("axis_name", "axis_index_groups", "output_dtype")


@adapter.builds(specs.LayerNorm, carries=(*_AXES, *_NORM))
def build_layer_norm(spec, ctx):
    _check_output_dtype(spec, ctx)
    spec = (
        spec
        if spec.feature_shape is not None
        else spec.sized(ctx.require_shape(-spec.feature_axes[0]))
    )
    in_size: Any = (*spec.leading_shape, *(spec.feature_shape or ()))
    if spec.feature_axes != tuple(range(-len(spec.feature_axes), 0)):
        if ctx.shape is None:
            ctx.refuse("feature_axes", spec.feature_axes, "the sizes of the rest are not known")
        in_size, spec = ctx.shape, _with_ones(spec)
    affine = _affine_options(spec)
    if isinstance(spec, specs.RMSNorm):
        affine = {"use_scale": affine["use_scale"], "scale_init": spec.scale}
    layer: Any = (nn.RMSNorm if isinstance(spec, specs.RMSNorm) else nn.LayerNorm)(
        in_size,
        reduction_axes=spec.reduction_axes,
        feature_axes=spec.feature_axes,
        **affine,
        **_norm_options(spec),
    )
    layer.dtype = spec.output_dtype  # the constructor takes None for the default dtype
    return layer


@adapter.builds(specs.RMSNorm, carries=(*_AXES, *_NORM, "bias"))
def build_rms_norm(spec, ctx):
    """One layer; with a bias two, as BrainState's has none."""
    if spec.bias is None:
        return build_layer_norm(spec, ctx)
    if spec.scale is None or not specs.is_wide(spec.bias.dtype):
        ctx.refuse(
            "use_bias",
            True,
            "BrainState's RMSNorm has no bias, and a layer after it would have another dtype "
            "or one more weight",
            "Build it with use_bias=False",
        )
    norm = dataclasses.replace(
        spec, scale=None, bias=None, output_dtype=spec.output_dtype or spec.bias.dtype
    )
    scale: Any = spec.scale
    affine = nn.OneToOne(spec.bias.shape, w_init=scale, b_init=spec.bias)
    return nn.Sequential(build_layer_norm(norm, ctx), affine)


def _read_rms_norm_with_bias(norm, affine, ctx):
    """What :func:`build_rms_norm` makes of a normalisation with a bias."""
    arrays = _arrays(affine, ctx, weight=tuple(affine.in_size), bias=tuple(affine.in_size))
    spec = read_layer_norm(norm, ctx)
    if spec.scale is not None or "bias" not in arrays or affine.in_size != spec.feature_shape:
        ctx.refuse("OneToOne", affine, "only one that scales and shifts an RMSNorm converts")
    own: Any = spec.output_dtype
    dtype = jnp.promote_types(own, arrays["weight"].dtype)
    return dataclasses.replace(
        spec, scale=arrays["weight"], bias=arrays["bias"], output_dtype=jnp.dtype(dtype)
    )


def _with_ones(spec):
    """The norm with its arrays as BrainState has them: with a 1 for each axis between."""
    axes = range(spec.feature_axes[0], 0)
    sizes = dict(zip(spec.feature_axes, spec.feature_shape, strict=True))
    shape = tuple(sizes.get(axis, 1) for axis in axes)
    scale, bias = _reshape(spec.scale, shape), _reshape(spec.bias, shape)
    return dataclasses.replace(spec, scale=scale, bias=bias)


@adapter.reads(nn.GroupNorm, specs.GroupNorm, state=("weight",))
def read_group_norm(m, ctx):
    features, axes = m.num_groups * m.group_size, m.reduction_axes
    if axes is not None and axes[-1] != -1:
        ctx.refuse("reduction_axes", axes, "the last one must be -1, that of the features")
    arrays = _arrays(m, ctx, scale=(features,), bias=(features,))
    return specs.GroupNorm(
        **_norm_fields(m, arrays),
        num_groups=m.num_groups,
        features=features,
        reduction_axes=None if axes is None else tuple(axes[:-1]),
        repeat_axis=-1 if axes is None else 1,
    )


@adapter.builds(specs.GroupNorm, carries=(*_NORM, "reduction_axes", "repeat_axis"))
def build_group_norm(spec, ctx):
    _check_output_dtype(spec, ctx)
    axes = spec.reduction_axes
    if spec.repeat_axis != (-1 if axes is None else 1):
        ctx.refuse("reduction_axes", axes, "BrainState repeats the statistics along axis 1")
    return nn.GroupNorm(
        (spec.features or ctx.require_shape()[-1],),
        num_groups=spec.num_groups,
        dtype=spec.output_dtype,
        reduction_axes=None if axes is None else (*axes, -1),
        **_affine_options(spec),
        **_norm_options(spec),
    )


@adapter.reads(nn.BatchNorm0d, specs.BatchNorm, state=("weight", "running_mean", "running_var"))
@adapter.reads(nn.BatchNorm1d, specs.BatchNorm, state=("weight", "running_mean", "running_var"))
@adapter.reads(nn.BatchNorm2d, specs.BatchNorm, state=("weight", "running_mean", "running_var"))
@adapter.reads(nn.BatchNorm3d, specs.BatchNorm, state=("weight", "running_mean", "running_var"))
def read_batch_norm(m, ctx):
    if not m.track_running_stats:
        ctx.refuse("track_running_stats", False, "BrainState then does not normalise at all")
    if len(m.feature_axes) != 1:
        ctx.refuse("feature_axis", m.feature_axes, "only one feature axis converts")
    for name in ("running_mean", "running_var"):
        if type(getattr(m, name)) is not brainstate.BatchState:
            ctx.refuse(
                "mean_type", type(getattr(m, name)).__qualname__, "only BatchState converts"
            )
    (axis,) = m.feature_axes
    features = (m.in_size[axis],)
    arrays = _arrays(m, ctx, scale=features, bias=features)
    return specs.BatchNorm(
        **_norm_fields(m, arrays),
        mean=_reshape(m.running_mean.value, features),
        var=_reshape(m.running_var.value, features),
        momentum=_real(m.momentum),
        spatial_dims=m.num_spatial_dims,
        axis=axis - len(m.in_size),
    )


_BATCH_NORMS = (nn.BatchNorm0d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


# Not axis: with any but the last, training gives BrainState's statistics a wrong shape.
@adapter.builds(specs.BatchNorm, carries=_NORM)
def build_batch_norm(spec, ctx):
    (features,) = spec.mean.shape
    if (spec.scale is None) != (spec.bias is None):
        ctx.refuse("scale, bias", "one of two", "BrainState has both or neither")
    _check_output_dtype(spec, ctx)
    shape = ctx.shape if ctx.shape or spec.spatial_dims != 0 else (features,)
    shape = shape or ctx.require_shape()
    if len(shape) > len(_BATCH_NORMS) or spec.spatial_dims not in (None, len(shape) - 1):
        ctx.refuse("sample_input", shape, "it must have one channel axis and 0 to 3 others")
    state_shape = (*[1] * (len(shape) - 1), features)
    layer = _BATCH_NORMS[len(shape) - 1](
        shape,
        **_norm_options(spec),
        momentum=spec.momentum,
        affine=spec.scale is not None,
        scale_initializer=_reshape(spec.scale, state_shape),
        bias_initializer=_reshape(spec.bias, state_shape),
        dtype=np.float32,  # in which momentum and epsilon are kept
    )
    layer.dtype = spec.output_dtype
    for state, array in ((layer.running_mean, spec.mean), (layer.running_var, spec.var)):
        state.value = _reshape(array, state_shape)  # pyright: ignore[reportOptionalMemberAccess]
    return layer


def _reshape(array: Any, shape: Any) -> Any:
    """``array`` itself where its shape agrees."""
    return array if array is None or array.shape == tuple(shape) else array.reshape(shape)


@adapter.reads(nn.Dropout, specs.Dropout)
def read_dropout(m, ctx):
    return specs.Dropout(
        rate=formulas.complement(m.prob),
        broadcast_dims=tuple(m.broadcast_dims),
        rng_collection="dropout",
    )


@adapter.builds(specs.Dropout, carries=("broadcast_dims",))
def build_dropout(spec, ctx):
    return nn.Dropout(formulas.complement(spec.rate), broadcast_dims=spec.broadcast_dims)


# A cell's hidden state is made by init_state, and belongs to a run: it is not read.


def _cell_parts(m, ctx, *names: str) -> tuple[list[Any], list[Any], list[Any]]:
    """The weights for the input, those for the state, and the biases of a cell's layers."""
    parts: tuple[list[Any], list[Any], list[Any]] = [], [], []
    for name in names:
        linear = ctx.read(getattr(m, name), f"{ctx.path}.{name}")
        if type(linear) is not specs.Linear or linear.mask is not None:
            ctx.refuse(name, getattr(m, name), "only a Linear without a mask converts here")
        arrays = linear.weight[: m.num_in], linear.weight[m.num_in :], linear.bias
        for part, array in zip(parts, arrays, strict=True):
            part.append(array)
    return parts


def _joined(arrays: list[Any], ctx, name: str = "b_init") -> Any:
    """The arrays side by side; None where there is none."""
    if all(array is None for array in arrays):
        return None
    if len({array is None or array.dtype for array in arrays}) > 1:
        ctx.refuse(name, [type(array).__name__ for array in arrays], "only all alike convert")
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=-1)


# The functions of both frameworks compute the same; JAX's take no units.
_FUNCTIONS: dict[Any, Any] = {nn.relu: jax.nn.relu, nn.sigmoid: jax.nn.sigmoid}


def _cell_options(m, weight, ctx) -> dict[str, Any]:
    """The options that every cell has, None for the usual ones."""
    is_tanh = m.activation in (nn.tanh, jnp.tanh, jax.nn.tanh)
    return {
        "activation": None if is_tanh else _FUNCTIONS.get(m.activation, m.activation),
        "carry_init": _carry_init(m._state_initializer, weight.dtype, ctx),
    }


def _carry_init(state_init: Any, dtype: Any, ctx) -> Any:
    """A state initialiser as one that takes a key, a shape and a dtype; None for zeros."""
    own: Any = brainstate.environ.dftype()
    if isinstance(state_init, StateInit):
        return formulas.carry_init(state_init.fn, state_init.dtype, dtype)
    if type(state_init) is init.ZeroInit and state_init.unit.is_unitless:
        value = 0.0
    elif type(state_init) is init.Constant:
        value = np.asarray(state_init.value).tolist()
    elif isinstance(state_init, jax.Array | np.ndarray) and np.ndim(state_init) == 1:
        value, own = tuple(np.asarray(state_init).tolist()), state_init.dtype
    else:
        ctx.refuse(
            "state_init",
            state_init,
            "only constants convert; others draw from BrainState's random state",
            "Pass the initial state by hand",
        )
    return formulas.carry_init(formulas.Filled(value), own, dtype)


def _cell(make: Any, spec, **options: Any) -> Any:
    """What the constructor of a cell makes for a spec's sizes and options."""
    dtype = spec.weight_h.dtype
    is_plain = spec.carry_init is None and dtype == brainstate.environ.dftype()
    return make(
        *spec.in_shape,
        spec.hidden,
        state_init=init.ZeroInit()
        if is_plain
        else StateInit(spec.carry_init or formulas.Filled(0.0), dtype),
        activation=spec.activation or "tanh",
        **options,
    )


def _stacked(spec) -> Any:
    """The one matrix for the input and the state, side by side."""
    return jnp.concatenate([spec.weight_x, spec.weight_h])


def _swapped(array: Any) -> Any:
    """The four gates with the second and third swapped; BrainState's order is i, g, f, o."""
    if array is None:
        return None
    first, second, third, fourth = jnp.split(array, 4, axis=-1)
    return jnp.concatenate([first, third, second, fourth], axis=-1)


@adapter.reads(nn.ValinaRNNCell, specs.SimpleCell, state=("W", "h"))
def read_simple_cell(m, ctx):
    (weight_x,), (weight_h,), (bias,) = _cell_parts(m, ctx, "W")
    options = _cell_options(m, weight_h, ctx)
    return specs.SimpleCell(weight_x=weight_x, weight_h=weight_h, bias=bias, **options)


@adapter.builds(specs.SimpleCell, carries=("activation", "carry_init"))
def build_simple_cell(spec, ctx):
    _check_one_dtype(spec.weight_h, spec.bias, ctx)
    return _cell(nn.ValinaRNNCell, spec, w_init=_stacked(spec), b_init=spec.bias)


@adapter.reads(nn.LSTMCell, specs.LSTMCell, state=("W", "h", "c"))
def read_lstm_cell(m, ctx):
    (weight_x,), (weight_h,), (bias,) = _cell_parts(m, ctx, "W")
    return specs.LSTMCell(
        weight_x=_swapped(weight_x),
        weight_h=_swapped(weight_h),
        bias=_swapped(bias),
        forget_bias=1.0,
        **_cell_options(m, weight_h, ctx),
    )


@adapter.builds(specs.LSTMCell, carries=("activation", "forget_bias", "carry_init"))
def build_lstm_cell(spec, ctx):
    _check_one_dtype(spec.weight_h, spec.bias, ctx)
    if spec.forget_bias != 1.0:
        if spec.forget_bias or not spec.can_move_forget_bias:
            ctx.refuse(
                "forget_bias",
                spec.forget_bias,
                "BrainState adds 1 to a gate, and the bias cannot make up for it exactly",
            )
        spec = spec.with_forget_bias(1.0)
    weight, bias = _swapped(_stacked(spec)), _swapped(spec.bias)
    return _cell(nn.LSTMCell, spec, w_init=weight, b_init=bias)


@adapter.reads(nn.URLSTMCell, specs.URLSTMCell, state=("W", "bias", "h", "c"))
def read_urlstm_cell(m, ctx):
    (weight_x,), (weight_h,), (none,) = _cell_parts(m, ctx, "W")
    if none is not None:
        ctx.refuse("W", m.W, "the layer of this cell has no bias of its own")
    bias = _arrays(m, ctx, "bias", bias=(m.num_out,))["bias"]
    options = _cell_options(m, weight_h, ctx)
    return specs.URLSTMCell(weight_x=weight_x, weight_h=weight_h, bias=bias, **options)


@adapter.builds(specs.URLSTMCell, carries=("activation", "carry_init"))
def build_urlstm_cell(spec, ctx):
    def make(*sizes: Any, **options: Any) -> Any:
        cell = nn.URLSTMCell.__new__(nn.URLSTMCell)
        cell._forget_bias = lambda: spec.bias  # which draws from the random state
        nn.URLSTMCell.__init__(cell, *sizes, **options)
        del cell._forget_bias
        return cell

    return _cell(make, spec, w_init=_stacked(spec))


@adapter.reads(nn.GRUCell, specs.GRUCell, state=("Wrz", "Wh", "h"))
@adapter.reads(nn.MGUCell, specs.MGUCell, state=("Wf", "Wh", "h"))
def read_gru_cell(m, ctx):
    is_gru = isinstance(m, nn.GRUCell)
    x, h, bias = _cell_parts(m, ctx, "Wrz" if is_gru else "Wf", "Wh")
    weight_h = _joined(h, ctx, "w_init")
    return (specs.GRUCell if is_gru else specs.MGUCell)(
        weight_x=_joined(x, ctx, "w_init"),
        weight_h=weight_h,
        bias=_joined(bias, ctx),
        bias_n=None,
        reset_first=True,
        **_cell_options(m, weight_h, ctx),
    )


@adapter.builds(specs.GRUCell, carries=("activation", "reset_first", "carry_init"))
@adapter.builds(specs.MGUCell, carries=("activation", "reset_first", "carry_init"))
def build_gru_cell(spec, ctx):
    if not spec.reset_first or spec.bias_n is not None:
        ctx.refuse(
            "reset_first",
            spec.reset_first,
            "BrainState multiplies the state with the reset gate, and others its product with "
            "the weights",
        )
    _check_one_dtype(spec.weight_h, spec.bias, ctx)
    is_gru, at = isinstance(spec, specs.GRUCell), -spec.hidden
    weight, bias = _stacked(spec), spec.bias
    empty = {"w_init": jnp.zeros, "b_init": None if bias is None else jnp.zeros}
    cell = _cell(nn.GRUCell if is_gru else nn.MGUCell, spec, **empty)
    for layer, part in (
        (cell.Wrz if is_gru else cell.Wf, slice(at)),
        (cell.Wh, slice(at, None)),
    ):
        arrays = {"weight": weight[:, part]}
        layer.weight.value = arrays if bias is None else arrays | {"bias": bias[part]}
    return cell


_POOLS = {
    False: (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    True: (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
}
_POOL = {"return_indices": False, "channel_axis": -1}


@adapter.reads(nn.MaxPool1d, specs.Pool, fixed=_POOL)
@adapter.reads(nn.MaxPool2d, specs.Pool, fixed=_POOL)
@adapter.reads(nn.MaxPool3d, specs.Pool, fixed=_POOL)
@adapter.reads(nn.AvgPool1d, specs.Pool, fixed=_POOL)
@adapter.reads(nn.AvgPool2d, specs.Pool, fixed=_POOL)
@adapter.reads(nn.AvgPool3d, specs.Pool, fixed=_POOL)
def read_pool(m, ctx):
    return specs.pool(isinstance(m, _POOLS[True]), False, m.kernel_size, m.stride, m.padding)


@adapter.builds(specs.Pool)
def build_pool(spec, ctx):
    if spec.space > 3:
        ctx.refuse("window_shape", spec.window, "BrainState has 1 to 3 axes of space")
    return _POOLS[spec.mean][spec.space - 1](
        spec.window, stride=spec.strides, padding=spec.padding
    )


@adapter.reads(nn.Flatten, specs.Flatten)
def read_flatten(m, ctx):
    return specs.Flatten(start_axis=m.start_axis, end_axis=m.end_axis, in_size=m.in_size)


@adapter.builds(specs.Flatten)
def build_flatten(spec, ctx):
    return nn.Flatten(spec.start_axis, spec.end_axis, in_size=spec.in_size)


@adapter.reads(Lambda, specs.Function, state=())
def read_lambda(m, ctx):
    return ctx.read_callable(m.fn, ctx.path)


@adapter.builds(specs.Function)
def build_function(spec, ctx):
    return formulas.Batched(spec.fn) if spec.per_example else spec.fn


# Class, name of the function, and the function's options by attribute of the layer.
_ACTIVATIONS: list[tuple[type, str, dict[str, str]]] = [
    (nn.CELU, "celu", {"alpha": "alpha"}),
    (nn.ELU, "elu", {"alpha": "alpha"}),
    (nn.GELU, "gelu", {"approximate": "approximate"}),
    (nn.GLU, "glu", {"dim": "axis"}),
    (nn.Hardshrink, "hard_shrink", {"lambd": "lambd"}),
    (nn.Hardsigmoid, "hard_sigmoid", {}),
    (nn.Hardswish, "hard_silu", {}),
    (nn.Hardtanh, "hard_tanh", {"min_val": "min_val", "max_val": "max_val"}),
    (nn.Identity, "identity", {}),
    (nn.LeakyReLU, "leaky_relu", {"negative_slope": "negative_slope"}),
    (nn.LogSigmoid, "log_sigmoid", {}),
    (nn.LogSoftmax, "log_softmax", {"dim": "axis"}),
    (nn.Mish, "mish", {}),
    (nn.ReLU, "relu", {}),
    (nn.ReLU6, "relu6", {}),
    (nn.SELU, "selu", {}),
    (nn.Sigmoid, "sigmoid", {}),
    (nn.SiLU, "silu", {}),
    (nn.Softmax, "softmax", {"dim": "axis"}),
    (nn.Softmin, "softmin", {"dim": "axis"}),
    (nn.Softplus, "softplus", {}),
    (nn.Softshrink, "soft_shrink", {"lambd": "lambd"}),
    (nn.Softsign, "soft_sign", {}),
    (nn.Tanh, "tanh", {}),
    (nn.Tanhshrink, "tanh_shrink", {}),
    (nn.Threshold, "threshold", {"threshold": "threshold", "value": "value"}),
]


def _reads_activation(cls: type, name: str, attributes: dict[str, str]) -> None:
    defaults = formulas.activation_defaults(name)

    @adapter.reads(cls, specs.Activation)
    def read_activation(m, ctx):
        options = {option: getattr(m, attribute) for attribute, option in attributes.items()}
        if "axis" in options and options["axis"] is None:
            options["axis"] = -1
        changed = {k: v for k, v in options.items() if k not in defaults or v != defaults[k]}
        return specs.Activation(name=name, options=changed)


for _row in _ACTIVATIONS:
    _reads_activation(*_row)


# Softmax2d is softmax over the third axis from the end, so that it is read and never built.
@adapter.reads(nn.Softmax2d, specs.Activation)
def read_softmax2d(m, ctx):
    return specs.Activation(name="softmax", options={"axis": -3})


_CLASSES: dict[str, tuple[type, dict[str, str]]] = {
    name: (cls, {option: attribute for attribute, option in attributes.items()})
    for cls, name, attributes in _ACTIVATIONS
}


@adapter.builds(specs.Activation)
def build_activation(spec, ctx):
    cls, attributes = _CLASSES[spec.name]
    options: dict[str, Any] = formulas.activation_defaults(spec.name) | spec.options
    if unknown := [k for k in spec.options if k not in attributes]:
        ctx.refuse(unknown[0], spec.options[unknown[0]], f"{cls.__name__} has no such option")
    return cls(**{attributes[k]: v for k, v in options.items() if k in attributes})
