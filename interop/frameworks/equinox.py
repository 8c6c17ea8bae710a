"""Equinox. Modules are immutable trees that see one example; ``Linear`` stores ``(out, in)``.

Running statistics live in an ``eqx.nn.State`` outside the module. Train or evaluation mode is
the field ``inference`` of each layer. A tree has no identity: a layer that stands at two places
is two layers once the tree is updated. ``BatchNorm(mode="batch")`` stores its statistics
without the debiasing that it divides out, ``1 - momentum**counter``, in inference.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import operator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .. import formulas, specs
from ..composites.equinox import COMPOSITES
from ..errors import ArgumentError
from ..parameters import is_quantity, path_of
from ..registry import Adapter


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """A module, and the state of the model that it is a part of.

    ``has_own_state`` tells that the module still holds it, as before ``make_with_state``.
    """

    module: Any
    state: eqx.nn.State | None
    has_own_state: bool = False


class Equinox(Adapter):
    name = "equinox"
    module_type = eqx.Module
    companion = "state"
    per_example = True
    channels_first = True
    has_identity = False

    def open(self, model, params, state):
        super().open(model, params, None)
        if state is not None and not isinstance(state, eqx.nn.State):
            raise ArgumentError(
                f"state must be an eqx.nn.State, got {type(state).__qualname__}",
                remedy="Pass what eqx.nn.make_with_state returned beside the model",
            )
        if state is not None:
            return Node(model, state)
        return Node(model, _initial_state(model), has_own_state=True)

    def module(self, node):
        return node.module if isinstance(node, Node) else node

    def read_composite(self, node, ctx):
        return node.module.spec(node.state)

    def build_composite(self, cls, spec, ctx):
        if spec.mixes_examples:
            ctx.refuse(
                "the batch axis",
                "an operand",
                "an Equinox module sees one example, and this layer depends on the others or "
                "on their order",
            )
        names = getattr(spec, "axis_name", None)
        if "batch" in (names if isinstance(names, tuple | list) else (names,)):
            ctx.refuse("axis_name", names, "Equinox's layers are mapped over a batch so named")
        return cls(spec, inference=True)

    def added_state(self, module, rule):
        return _fields(type(module)) - _fields(rule.layer_type)

    def has_children(self, module):
        leaves = jax.tree.leaves(module, is_leaf=lambda x: x is not module and _is_module(x))
        return any(map(_is_module, leaves))

    def arrays(self, node):
        state = () if node.state is None else jax.tree.leaves(node.state)
        return [x for x in (*jax.tree.leaves(node.module), *state) if hasattr(x, "dtype")]

    def parameters(self, node):
        held = eqx.filter(node.module, eqx.is_inexact_array)
        return jax.tree.map(  # what an index holds is state, not a parameter
            lambda x: jax.tree.map(lambda _: None, x) if is_index(x) else x,
            held,
            is_leaf=is_index,
        )

    def with_parameters(self, node, parameters):
        return Node(eqx.combine(parameters, node.module), node.state)

    def held(self, node):
        found, seen = {}, set()
        for keys, leaf in _leaves(node.module)[0]:
            if is_index(leaf) and leaf.marker not in seen:
                seen.add(leaf.marker)
                found[path_of(keys)] = node.state.get(leaf)
            elif not is_index(leaf) and (is_quantity(leaf) or _is_array(leaf)):
                found[path_of(keys)] = leaf
        return found

    def hold(self, node, values):
        leaves, treedef = _leaves(node.module)
        named = [(path_of(keys), leaf) for keys, leaf in leaves]
        indices = {path: leaf for path, leaf in named if is_index(leaf) and path in values}
        states = {index.marker: values[path] for path, index in indices.items()}
        changed = [
            _with_initial(leaf, states) if is_index(leaf) else values.get(path, leaf)
            for path, leaf in named
        ]
        module = jax.tree.unflatten(treedef, changed)
        return dataclasses.replace(node, module=module, state=_updated(node.state, states))

    def native(self, node):
        is_one = node.state is None or node.has_own_state
        return node.module if is_one else (node.module, node.state)

    def run(self, node, inputs, train):
        module = eqx.nn.inference_mode(node.module, not train)
        if node.state is None or not takes_state(module):
            return jax.vmap(module, axis_name="batch")(*inputs)
        over = (*[0] * len(inputs), None)
        return jax.vmap(module, axis_name="batch", in_axes=over, out_axes=(0, None))(
            *inputs, node.state
        )[0]


adapter = Equinox()
adapter.ships(COMPOSITES)


def takes_state(module: Any) -> bool:
    """Whether a call of ``module`` takes an ``eqx.nn.State``."""
    if isinstance(module, eqx.nn.StatefulLayer):
        return module.is_stateful()
    return "state" in inspect.signature(module).parameters


def is_index(x: Any) -> bool:
    """Whether ``x`` stands for what an ``eqx.nn.State`` holds."""
    return isinstance(x, eqx.nn.StateIndex)


def _is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray | jax.ShapeDtypeStruct) or eqx.is_array(x)


def _leaves(module: Any) -> tuple[list[tuple[Any, Any]], Any]:
    return jax.tree_util.tree_flatten_with_path(
        module, is_leaf=lambda x: is_index(x) or is_quantity(x)
    )


def _with_initial(index: eqx.nn.StateIndex, values: dict[Any, Any]) -> eqx.nn.StateIndex:
    """The index with its new value, if it is one that holds its value itself."""
    if index.marker not in values or not jax.tree.leaves(index.init):
        return index
    return eqx.tree_at(lambda x: x.init, index, values[index.marker])


def _updated(state: eqx.nn.State | None, values: dict[Any, Any]) -> eqx.nn.State | None:
    """A state with other values; its ``set`` would also compare weak types."""
    if state is None:
        return None
    old, markers = state.tree_flatten()
    new = [values.get(marker, value) for marker, value in zip(markers, old, strict=True)]
    return eqx.nn.State.tree_unflatten(markers, new)


def _is_module(x: Any) -> bool:
    return isinstance(x, eqx.Module)


@functools.lru_cache(1024)
def _fields(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def _initial_state(model: eqx.Module) -> eqx.nn.State | None:
    """The state that a model holds, if ``eqx.nn.make_with_state`` has not taken it out."""
    leaves = jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, eqx.nn.StateIndex))
    if not any(isinstance(leaf, eqx.nn.StateIndex) for leaf in leaves):
        return None
    try:
        return eqx.nn.State(model)
    except ValueError as e:
        raise ArgumentError(
            "this Equinox model is stateful, and its state was not given",
            path="model",
            remedy="Pass state=, what eqx.nn.make_with_state returned beside the model",
        ) from e


def _make(cls: type, **fields: Any) -> Any:
    """An instance of a module class from its fields; the constructors draw random numbers."""
    if missing := _fields(cls) ^ fields.keys():
        raise TypeError(f"{cls.__name__} has other fields in this version: {sorted(missing)}")
    module = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(module, name, value)
    return module


def _check_one_dtype(weight, bias, ctx):
    if bias is not None and bias.dtype != weight.dtype:
        ctx.refuse(
            "bias.dtype",
            bias.dtype,
            f"Equinox adds the bias after the product in {weight.dtype}, where others promote "
            f"both first",
            "Cast the bias to the weight's dtype",
        )


@adapter.reads(eqx.nn.Sequential, specs.Sequential)
def read_sequential(node, ctx):
    return specs.Sequential(
        layers=ctx.read_all(Node(layer, node.state) for layer in node.module.layers)
    )


@adapter.builds(specs.Sequential)
def build_sequential(spec, ctx):
    return eqx.nn.Sequential([ctx.build(layer) for layer in spec.layers])


@adapter.reads(eqx.nn.Linear, specs.Linear)
def read_linear(node, ctx):
    m = node.module
    for option in ("in_features", "out_features"):
        if getattr(m, option) == "scalar":
            ctx.refuse(option, "scalar", "other frameworks have no axis-less input or output")
    if m.weight is None:
        return ctx.refuse(
            "weight", None, "the array is missing", "Put partitions together with eqx.combine"
        )
    _check_one_dtype(m.weight, m.bias, ctx)
    return specs.Linear(weight=m.weight.T, bias=m.bias)


@adapter.builds(specs.Linear)
def build_linear(spec, ctx):
    _check_one_dtype(spec.weight, spec.bias, ctx)
    if ctx.shape is not None and len(ctx.shape) != 1:
        ctx.refuse("sample_input", ctx.shape, "Equinox's Linear takes examples of one axis")
    n_in, n_out = spec.weight.shape
    return _make(
        eqx.nn.Linear,
        weight=spec.weight.T,
        bias=spec.bias,
        in_features=n_in,
        out_features=n_out,
        use_bias=spec.bias is not None,
    )


@adapter.reads(eqx.nn.MLP, specs.Sequential)
def read_mlp(node, ctx):
    m = node.module
    for option in ("in_size", "out_size"):
        if getattr(m, option) == "scalar":
            ctx.refuse(option, "scalar", "other frameworks have no axis-less input or output")
    layers = list(m.layers)
    if m.scan and m.depth > 0:  # the layers within are one, with an axis more
        layers[1:2] = [
            jax.tree.map(operator.itemgetter(i), m.layers[1]) for i in range(m.depth - 1)
        ]
    first, *rest = [
        ctx.read(Node(layer, node.state), f"{ctx.path}.layers[{i}]")
        for i, layer in enumerate(layers)
    ]
    parts = [first]
    for layer in rest:
        parts += [_read_neuron(node, ctx, "activation"), layer]
    default = inspect.signature(eqx.nn.MLP).parameters["final_activation"].default
    if m.depth > 0 and m.final_activation is not default:  # else it is not applied
        parts.append(_read_neuron(node, ctx, "final_activation"))
    return specs.Sequential(layers=tuple(parts))


def _read_neuron(node, ctx, name: str) -> specs.Spec:
    """A function that is applied to each neuron by itself."""
    fn = getattr(node.module, name)
    if any(map(eqx.is_array, jax.tree.leaves(fn))):
        ctx.refuse(name, fn, "only one without weights converts")
    path = f"{ctx.path}.{name}"
    layer = fn if isinstance(fn, eqx.Module) else eqx.nn.Lambda(fn)
    spec = ctx.read(Node(layer, node.state), path)
    if isinstance(spec, specs.Function) and spec.per_example:
        return ctx.read(Node(eqx.nn.Lambda(jax.vmap(spec.fn)), node.state), path)
    if not spec.is_elementwise:
        ctx.refuse(name, fn, "it is applied to one number at a time")
    return spec


@adapter.builds(specs.LinearGeneral)
def build_linear_general(spec, ctx):
    plain = spec.as_linear()
    if plain is None:
        ctx.refuse("out_features", spec.out_shape, "only one axis of features is native")
    return build_linear(plain, ctx)


@adapter.reads(eqx.nn.MultiheadAttention, specs.MultiHeadAttention)
def read_attention(node, ctx):
    m = node.module
    dropout = ctx.read(Node(m.dropout, node.state), f"{ctx.path}.dropout")
    return specs.MultiHeadAttention(
        query=_read_heads(node, ctx, "query_proj", m.qk_size),
        key=_read_heads(node, ctx, "key_proj", m.qk_size),
        value=_read_heads(node, ctx, "value_proj", m.vo_size),
        out=_read_heads(node, ctx, "output_proj", m.vo_size),
        rate=dropout.rate,
        core="float32",
    )


def _read_heads(node, ctx, name: str, depth: int) -> specs.LinearGeneral:
    """One of the projections, with an axis of heads and one of features of each."""
    part = ctx.read(Node(getattr(node.module, name), node.state), f"{ctx.path}.{name}")
    if not isinstance(part, specs.Linear):
        ctx.refuse(name, type(part).__qualname__, "only an eqx.nn.Linear converts")
    heads = (node.module.num_heads, depth)
    weight, bias = part.weight, part.bias
    if name == "output_proj":
        weight = weight.reshape(*heads, -1)
        return specs.LinearGeneral(weight=weight, bias=bias, axes=(-2, -1))
    return specs.LinearGeneral(
        weight=weight.reshape(-1, *heads), bias=None if bias is None else bias.reshape(heads)
    )


@adapter.builds(specs.MultiHeadAttention, carries=("rate", "broadcast_dropout", "core"))
def build_attention(spec, ctx):
    _check_attention(spec, ctx)
    sizes = [part.weight.shape[0] for part in spec.parts[:3]]
    vo_size = spec.value.weight.shape[-1]
    biases = [part.bias is not None for part in spec.parts]
    return _make(
        eqx.nn.MultiheadAttention,
        query_proj=_projection(spec.query, ctx),
        key_proj=_projection(spec.key, ctx),
        value_proj=_projection(spec.value, ctx),
        output_proj=_projection(spec.out, ctx),
        dropout=_make(eqx.nn.Dropout, p=spec.rate, inference=True),
        num_heads=spec.heads,
        query_size=sizes[0],
        key_size=sizes[1],
        value_size=sizes[2],
        output_size=spec.out.weight.shape[-1],
        qk_size=spec.depth,
        vo_size=vo_size,
        use_query_bias=biases[0],
        use_key_bias=biases[1],
        use_value_bias=biases[2],
        use_output_bias=biases[3],
    )


def _check_attention(spec, ctx):
    if not ctx.stands_alone:
        ctx.refuse("inputs_k", None, "Equinox's takes three inputs, and a stack passes one")
    if not spec.agrees_with("float32"):
        ctx.refuse("core", spec.core, "Equinox takes the softmax in float32, and nothing else")
    if not spec.is_uniform:
        ctx.refuse("dtype, precision, axes", "of the parts", "Equinox has no such options")
    if spec.key.weight.shape[1] != spec.heads:
        ctx.refuse(
            "num_kv_heads", spec.key.weight.shape[1], "Equinox has as many as of queries"
        )
    if spec.rate > 0.0 and spec.broadcast_dropout:
        ctx.refuse("broadcast_dropout", True, "Equinox decides for each head by itself")


def _projection(part, ctx):
    _check_one_dtype(part.weight, part.bias, ctx)
    n_in, n_out = math.prod(part.in_shape), math.prod(part.out_shape)
    return _make(
        eqx.nn.Linear,
        weight=part.weight.reshape(n_in, n_out).T,
        bias=None if part.bias is None else part.bias.reshape(n_out),
        in_features=n_in,
        out_features=n_out,
        use_bias=part.bias is not None,
    )


# Not built: Equinox keeps its tables by size alone, and so takes the first theta for all.
@adapter.reads(eqx.nn.RotaryPositionalEmbedding, specs.RotaryEmbedding)
def read_rope(node, ctx):
    m = node.module
    return specs.RotaryEmbedding(
        depth=m.embedding_size,
        theta=m.theta,
        table_dtype=specs.dtype(m.dtype),
        keeps_dtype=True,
    )


_CONVS = {1: eqx.nn.Conv1d, 2: eqx.nn.Conv2d, 3: eqx.nn.Conv3d}


@adapter.reads(eqx.nn.Conv, specs.Conv)
@adapter.reads(eqx.nn.Conv1d, specs.Conv)
@adapter.reads(eqx.nn.Conv2d, specs.Conv)
@adapter.reads(eqx.nn.Conv3d, specs.Conv)
def read_conv(node, ctx):
    m = node.module
    padding = m.padding if isinstance(m.padding, str) else tuple(map(tuple, m.padding))
    is_padded = padding != "VALID" and any(map(any, padding))
    return specs.Conv(
        padding=padding,
        padding_mode=m.padding_mode if is_padded else "ZEROS",
        **_conv_fields(m, ctx),
    )


def _conv_fields(m, ctx) -> dict[str, Any]:
    """What convolutions and transposed ones have."""
    _check_one_dtype(m.weight, m.bias, ctx)
    return {
        "weight": jnp.moveaxis(m.weight, (0, 1), (-1, -2)),
        "bias": None if m.bias is None else m.bias.reshape(-1),
        "strides": tuple(m.stride),
        "kernel_dilation": tuple(m.dilation),
        "groups": m.groups,
        "in_shape": None,
    }


@adapter.builds(specs.Conv, carries=("padding_mode",))
def build_conv(spec, ctx):
    return _make(
        _CONVS.get(spec.dims, eqx.nn.Conv),
        padding=spec.padding,
        padding_mode=spec.padding_mode,
        **_conv_options(spec, ctx),
    )


def _conv_options(spec, ctx) -> dict[str, Any]:
    _check_one_dtype(spec.weight, spec.bias, ctx)
    return {
        "num_spatial_dims": spec.dims,
        "weight": jnp.moveaxis(spec.weight, (-1, -2), (0, 1)),
        "bias": None if spec.bias is None else spec.bias.reshape(-1, *[1] * spec.dims),
        "in_channels": spec.channels,
        "out_channels": spec.weight.shape[-1],
        "kernel_size": tuple(spec.kernel),
        "stride": spec.strides,
        "dilation": spec.kernel_dilation,
        "groups": spec.groups,
        "use_bias": spec.bias is not None,
    }


_TRANSPOSED = {
    1: eqx.nn.ConvTranspose1d,
    2: eqx.nn.ConvTranspose2d,
    3: eqx.nn.ConvTranspose3d,
}


@adapter.reads(eqx.nn.ConvTranspose, specs.ConvTranspose)
@adapter.reads(eqx.nn.ConvTranspose1d, specs.ConvTranspose)
@adapter.reads(eqx.nn.ConvTranspose2d, specs.ConvTranspose)
@adapter.reads(eqx.nn.ConvTranspose3d, specs.ConvTranspose)
def read_conv_transpose(node, ctx):
    m, fields = node.module, _conv_fields(node.module, ctx)
    spec = specs.ConvTranspose(padding=(), padding_mode=m.padding_mode, **fields)
    if isinstance(m.padding, str):
        padding = _pads_of(m.padding, spec, m.output_padding)
    else:
        rows = zip(spec.reach, m.padding, m.output_padding, strict=True)
        padding = tuple((n - 1 - low, n - 1 - high + more) for n, (low, high), more in rows)
    return dataclasses.replace(spec, padding=padding)


def _pads_of(padding: str, spec, output_padding) -> tuple[tuple[int, int], ...]:
    """What a name for the padding comes to, in elements of the dilated input."""
    pads: list[tuple[int, int]] = []
    rows = zip(spec.reach, spec.strides, output_padding, strict=True)
    for size, stride, more in rows:
        if padding == "VALID":
            low, high = 0, -more
        else:
            total = size - stride + more
            low = (max(total, 0) + (padding == "SAME_LOWER")) // 2
            high = max(total, 0) - low - max(-total, 0)
        pads.append((size - 1 - low, size - 1 - high))
    return tuple(pads)


@adapter.builds(specs.ConvTranspose, carries=("padding_mode",))
def build_conv_transpose(spec, ctx):
    none = (0,) * spec.dims
    padding: Any = tuple(
        (n - 1 - low, n - 1 - high)
        for n, (low, high) in zip(spec.reach, spec.padding, strict=True)
    )
    if spec.padding_mode != "ZEROS":
        names = ("SAME", "SAME_LOWER")
        padding = next((p for p in names if _pads_of(p, spec, none) == spec.padding), None)
        if padding is None:
            ctx.refuse("padding", spec.padding, "Equinox cannot pad periodically by so much")
    return _make(
        _TRANSPOSED.get(spec.dims, eqx.nn.ConvTranspose),
        padding=padding,
        output_padding=none,
        padding_mode=spec.padding_mode,
        **_conv_options(spec, ctx),
    )


@adapter.reads(eqx.nn.Embedding, specs.Embedding)
def read_embedding(node, ctx):
    return specs.Embedding(weight=node.module.weight)


@adapter.builds(specs.Embedding)
def build_embedding(spec, ctx):
    if ctx.shape:
        ctx.refuse("sample_input", ctx.shape, "Equinox's Embedding takes one index at a time")
    return eqx.nn.Embedding(weight=spec.weight)


@adapter.reads(eqx.nn.LayerNorm, specs.LayerNorm)
@adapter.reads(eqx.nn.RMSNorm, specs.RMSNorm)
def read_layer_norm(node, ctx):
    m, is_rms = node.module, isinstance(node.module, eqx.nn.RMSNorm)
    axes = tuple(range(-len(m.shape), 0))
    return (specs.RMSNorm if is_rms else specs.LayerNorm)(
        scale=m.weight,
        bias=m.bias,
        epsilon=m.eps,
        use_fast_variance=is_rms,  # which has no variance: the default
        feature_shape=m.shape,
        reduction_axes=axes,
        feature_axes=axes,
    )


def _check_output_dtype(spec, ctx):
    if spec.output_dtype not in (None, jnp.dtype(jnp.float32), jnp.dtype(jnp.float64)):
        ctx.refuse("output_dtype", spec.output_dtype, "Equinox returns the input's dtype")


_NORM = ("reduction_axes", "feature_axes", "output_dtype")


@adapter.builds(specs.LayerNorm, carries=_NORM)
@adapter.builds(specs.RMSNorm, carries=(*_NORM, "bias"))
def build_layer_norm(spec, ctx):
    _check_output_dtype(spec, ctx)
    trailing = tuple(range(-len(spec.feature_axes), 0))
    if spec.feature_axes != trailing or tuple(sorted(spec.reduction_axes)) != trailing:
        ctx.refuse(
            "reduction_axes",
            spec.reduction_axes,
            f"Equinox normalises and scales the same trailing axes (feature_axes="
            f"{spec.feature_axes})",
        )
    spec = (
        spec
        if spec.feature_shape is not None
        else spec.sized(ctx.require_shape(-spec.feature_axes[0]))
    )
    shape = spec.feature_shape
    if ctx.shape is not None and len(ctx.shape) != len(shape):
        ctx.refuse("in_size", ctx.shape, f"Equinox normalises whole examples of shape {shape}")
    return _make(
        eqx.nn.RMSNorm if isinstance(spec, specs.RMSNorm) else eqx.nn.LayerNorm,
        shape=tuple(shape),
        eps=spec.epsilon,
        use_weight=spec.scale is not None,
        use_bias=spec.bias is not None,
        weight=spec.scale,
        bias=spec.bias,
    )


@adapter.reads(eqx.nn.GroupNorm, specs.GroupNorm)
def read_group_norm(node, ctx):
    m = node.module
    return specs.GroupNorm(
        scale=m.weight,
        bias=m.bias,
        epsilon=m.eps,
        use_fast_variance=False,
        num_groups=m.groups,
        features=m.channels,
    )


def _check_affine(spec, ctx):
    if (spec.scale is None) != (spec.bias is None):
        ctx.refuse("scale, bias", "one of two", "Equinox has both or neither")


@adapter.builds(specs.GroupNorm, carries=("output_dtype",))
def build_group_norm(spec, ctx):
    _check_output_dtype(spec, ctx)
    _check_affine(spec, ctx)
    return _make(
        eqx.nn.GroupNorm,
        groups=spec.num_groups,
        channels=spec.features,
        eps=spec.epsilon,
        channelwise_affine=spec.scale is not None,
        weight=spec.scale,
        bias=spec.bias,
    )


@adapter.reads(eqx.nn.BatchNorm, specs.BatchNorm)
def read_batch_norm(node, ctx):
    m, state = node.module, node.state
    if not isinstance(m.axis_name, str):
        ctx.refuse("axis_name", m.axis_name, "only one name, that of the batch axis, converts")
    if m.mode == "ema":
        (mean, var), is_first = (
            state.get(index) for index in (m.ema_state_index, m.ema_first_time_index)
        )
    else:
        mean, var = state.get(m.batch_state_index)
        counter = state.get(m.batch_counter)
        debias = jnp.where(counter == 0, 1.0, 1.0 - m.momentum**counter).astype(mean.dtype)
        mean, var, is_first = mean / debias, var / debias, None
    return specs.BatchNorm(
        scale=m.weight,
        bias=m.bias,
        mean=mean,
        var=var,
        uses_running=m.mode == "ema",
        is_first=is_first,
        momentum=m.momentum,
        epsilon=m.eps,
        use_fast_variance=False,
        spatial_dims=None,
        output_dtype=specs.promoted_dtype(mean, m.weight, m.bias),
    )


# After so many steps the debiasing is 1 to the last bit, so that the statistics are stored as
# the other frameworks have them. An int32, with room for as many steps again.
_SETTLED = 2**30


@adapter.builds(specs.BatchNorm, carries=("output_dtype", "uses_running", "is_first"))
def build_batch_norm(spec, ctx):
    _check_output_dtype(spec, ctx)
    _check_affine(spec, ctx)
    promoted = specs.promoted_dtype(spec.mean, spec.scale, spec.bias)
    if spec.output_dtype is None and promoted is not None:
        ctx.refuse("dtype", None, f"Equinox returns {promoted} for a half-precision input")
    if spec.uses_running != (spec.is_first is not None):
        ctx.refuse("uses_running", spec.uses_running, "Equinox has both or neither")
    if not (spec.uses_running or 0 <= np.float32(spec.momentum) < 1):
        ctx.refuse("momentum", spec.momentum, "Equinox divides by 1 - momentum**counter")
    counts = {"batch": jnp.array(_SETTLED), "ema": spec.is_first}
    mode = "ema" if spec.uses_running else "batch"
    count, statistics = map(eqx.nn.StateIndex, (counts[mode], (spec.mean, spec.var)))
    is_ema = spec.uses_running
    return _make(
        eqx.nn.BatchNorm,
        weight=spec.scale,
        bias=spec.bias,
        ema_first_time_index=count if is_ema else None,
        ema_state_index=statistics if is_ema else None,
        batch_counter=None if is_ema else count,
        batch_state_index=None if is_ema else statistics,
        axis_name="batch",
        inference=True,
        input_size=spec.mean.shape[0],
        eps=spec.epsilon,
        channelwise_affine=spec.scale is not None,
        momentum=spec.momentum,
        mode=mode,
    )


@adapter.reads(eqx.nn.Dropout, specs.Dropout)
def read_dropout(node, ctx):
    p = node.module.p
    if not isinstance(p, int | float):
        ctx.refuse("p", p, "only a number converts, not an array")
    return specs.Dropout(rate=float(p), rng_collection="dropout")


@adapter.builds(specs.Dropout)
def build_dropout(spec, ctx):
    return _make(eqx.nn.Dropout, p=spec.rate, inference=True)


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


def _cell_arrays(m, ctx) -> dict[str, Any]:
    _check_one_dtype(m.weight_hh, m.bias, ctx)
    return {"weight_x": m.weight_ih.T, "weight_h": m.weight_hh.T, "bias": m.bias}


def _cell(cls: type, spec, ctx, **fields: Any) -> Any:
    _check_one_dtype(spec.weight_h, spec.bias, ctx)
    return _make(
        cls,
        weight_ih=spec.weight_x.T,
        weight_hh=spec.weight_h.T,
        bias=spec.bias,
        input_size=spec.weight_x.shape[0],
        hidden_size=spec.hidden,
        use_bias=spec.bias is not None,
        **fields,
    )


@adapter.reads(eqx.nn.LSTMCell, specs.LSTMCell)
def read_lstm_cell(node, ctx):
    return specs.LSTMCell(**_cell_arrays(node.module, ctx))


@adapter.builds(specs.LSTMCell)
def build_lstm_cell(spec, ctx):
    return _cell(eqx.nn.LSTMCell, spec, ctx)


@adapter.reads(eqx.nn.GRUCell, specs.GRUCell)
def read_gru_cell(node, ctx):
    return specs.GRUCell(**_cell_arrays(node.module, ctx), bias_n=node.module.bias_n)


@adapter.builds(specs.GRUCell)
def build_gru_cell(spec, ctx):
    if (spec.bias is None) != (spec.bias_n is None):
        ctx.refuse("bias, bias_n", "one of two", "Equinox has both or neither")
    return _cell(eqx.nn.GRUCell, spec, ctx, bias_n=spec.bias_n)


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
