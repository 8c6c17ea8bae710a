"""Flax NNX. Channels last and batched; layers hold ``nnx.Variable``s and are mutable.

Train or evaluation mode is an attribute of each layer (``deterministic``,
``use_running_average``), which ``.train()`` and ``.eval()`` set. A layer's ``dtype`` is what
its operands are cast to before anything else, and the dtype of its result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from .. import formulas, specs
from ..composites.nnx import COMPOSITES
from ..errors import ArgumentError
from ..partitioning import Partitioning
from ..registry import Adapter

_OF_A_RUN = (nnx.RngState, nnx.Cache, nnx.Intermediate, nnx.Perturbation)


class Nnx(Adapter):
    name = "nnx"
    module_type = nnx.Module
    fixed = {"promote_dtype": dtypes.promote_dtype}
    has_partitionings = True

    def containers(self, node):
        return [(k, v) for k, v in vars(node).items() if isinstance(v, nnx.Variable)]

    def added_state(self, module, rule):
        held = nnx.Variable | nnx.Pytree
        return {k for k, v in vars(module).items() if isinstance(v, held)} - rule.state

    def has_children(self, module):
        return any(path for path, _ in nnx.iter_modules(module))

    def arrays(self, node):
        masks = (getattr(module, "mask", None) for _, module in nnx.iter_modules(node))
        return [
            *jax.tree.leaves(nnx.state(node)),
            *(mask for mask in masks if mask is not None),
        ]

    def partitionings(self, node):
        return [
            (".".join(map(str, path)), variable.get_raw_value(), found)
            for path, variable in _variables(node)
            if (found := partitioning_of(variable)) is not None
        ]

    def partition(self, built, partitionings):
        placed: set[int] = set()
        for _, variable in _variables(built) if isinstance(built, nnx.Module) else ():
            if (key := id(variable.get_raw_value())) in partitionings:
                variable.set_metadata(**metadata_of(partitionings[key]))
                placed.add(key)
        return built, placed

    def parameters(self, node):
        return nnx.state(node, nnx.Param)

    def with_parameters(self, node, parameters):
        definition, _, rest = nnx.split(node, nnx.Param, ...)
        return nnx.merge(definition, parameters, rest, copy=True)

    def container(self, leaves):
        return nnx.from_flat_state([(path, nnx.Param(leaf)) for path, leaf in leaves.items()])

    def held(self, node):
        return {path: variable.get_value() for path, variable in _lasting(node).items()}

    def hold(self, node, values):
        variables = _lasting(node)
        for path, value in values.items():
            variables[path].set_value(value)
        return node

    def run(self, node, inputs, train):
        model = nnx.clone(node)
        if train:
            model.train()
        else:
            model.eval()
        return model(*inputs)

    def read_function(self, fn):
        return read_pool(fn)

    def build_composite(self, cls, spec, ctx):
        return cls(spec, rngs=ctx.options.get("rngs"), deterministic=True)

    def close(self, built, options):
        rngs = options.get("rngs")
        if rngs is not None and not isinstance(rngs, nnx.Rngs | nnx.RngStream):
            raise ArgumentError(
                f"rngs must be an nnx.Rngs, got {type(rngs).__qualname__}",
                remedy="Pass rngs=nnx.Rngs(seed)",
            )
        return built if isinstance(built, nnx.Module) else nnx.Sequential(built)


adapter = Nnx()
adapter.ships(COMPOSITES)


def _variables(node: nnx.Module) -> list[tuple[Any, nnx.Variable]]:
    flat: Any = nnx.to_flat_state(nnx.state(node))
    return [(path, v) for path, v in flat if isinstance(v, nnx.Variable)]


_PARTITIONING = {"out_sharding", "mesh", "sharding_rules"}
_BOXES = (nn.Partitioned, nn.LogicallyPartitioned)


def partitioning_of(variable: nnx.Variable) -> Partitioning | None:
    """What a Variable's metadata say of how to split its array; None where they don't."""
    metadata = variable.get_metadata()
    names, mesh = metadata.get("out_sharding"), metadata.get("mesh")
    if isinstance(names, jax.sharding.NamedSharding):
        names, mesh = names.spec, names.mesh
    if not isinstance(names, tuple | list | jax.sharding.PartitionSpec) or not tuple(names):
        return None
    rules, box = metadata.get("sharding_rules"), metadata.get("linen_meta_type")
    logical = bool(rules) or (box is not None and issubclass(box, nn.LogicallyPartitioned))
    return Partitioning.of(variable.get_raw_value(), names, mesh, logical, rules)


def metadata_of(partitioning: Partitioning | None) -> dict[str, Any]:
    """The same as a Variable's metadata, as ``nnx.bridge`` writes them."""
    if partitioning is None:
        return {}
    metadata: dict[str, Any] = {"out_sharding": partitioning.names}
    if partitioning.mesh is not None:
        metadata["mesh"] = partitioning.mesh
    if partitioning.logical:
        metadata["sharding_rules"] = partitioning.rules
        metadata["linen_meta_type"] = nn.LogicallyPartitioned
    return metadata


def _lasting(node: nnx.Module) -> dict[tuple[Any, ...], nnx.Variable]:
    """The Variables that outlast a run, by path, each once."""
    found = nnx.to_flat_state(nnx.state(node))
    return {path: v for path, v in found if not isinstance(v, _OF_A_RUN)}


def _array(layer, ctx, name: str, wanted: type[nnx.Variable] = nnx.Param) -> Any:
    """The array of the layer's variable of that name, or None."""
    variable = getattr(layer, name)
    if variable is None:
        return None
    if type(variable) is not wanted:
        ctx.refuse(
            name,
            type(variable).__qualname__,
            f"only an nnx.{wanted.__name__} converts; another kind may be trained in its own "
            f"way, or not at all",
        )
    known = set(nnx.Variable.required_metadata)
    if partitioning_of(variable) is not None:
        known |= _PARTITIONING
        if variable.get_metadata().get("linen_meta_type") in _BOXES:
            known.add("linen_meta_type")
    metadata = {k: v for k, v in variable.get_metadata().items() if k not in known and v}
    if metadata:
        ctx.refuse(f"{name} metadata", metadata, "other frameworks have no place for it")
    return variable.get_raw_value()


class _NoRngs:
    """Stands for the ``nnx.Rngs`` of a layer whose initialisers return given arrays."""

    def params(self) -> None:
        """No key: nothing is drawn."""


_NO_RNGS: Any = _NoRngs()


def _given(array: Any) -> Any:
    return lambda *_: array


@adapter.reads(nnx.Sequential, specs.Sequential, state=("layers",))
def read_sequential(m, ctx):
    return specs.Sequential(layers=ctx.read_all(m.layers))


@adapter.builds(specs.Sequential)
def build_sequential(spec, ctx):
    return nnx.Sequential(*[ctx.build(layer) for layer in spec.layers])


@adapter.reads(
    nnx.Linear,
    specs.Linear,
    state=("kernel", "bias"),
    fixed={"dot_general": jax.lax.dot_general},
)
def read_linear(m, ctx):
    return specs.Linear(
        weight=_array(m, ctx, "kernel"),
        bias=_array(m, ctx, "bias"),
        dtype=specs.dtype(m.dtype),
        precision=m.precision,
        preferred_element_type=specs.dtype(m.preferred_element_type),
    )


@adapter.builds(
    specs.Linear, carries=("leading_shape", "dtype", "precision", "preferred_element_type")
)
def build_linear(spec, ctx):
    return nnx.Linear(
        *spec.weight.shape,
        use_bias=spec.bias is not None,
        dtype=spec.dtype,
        param_dtype=spec.weight.dtype,
        precision=spec.precision,
        preferred_element_type=spec.preferred_element_type,
        kernel_init=_given(spec.weight),
        bias_init=_given(spec.bias),
        rngs=_NO_RNGS,
    )


_GENERAL = {
    "dot_general": None,
    "dot_general_cls": None,
}


@adapter.reads(nnx.LinearGeneral, specs.LinearGeneral, state=("kernel", "bias"), fixed=_GENERAL)
def read_linear_general(m, ctx):
    return specs.LinearGeneral(
        weight=_array(m, ctx, "kernel"),
        bias=_array(m, ctx, "bias"),
        axes=m.axis,
        batch_axes=len(m.batch_axis),
        dtype=specs.dtype(m.dtype),
        precision=m.precision,
        preferred_element_type=specs.dtype(m.preferred_element_type),
    )


_CONTRACTION = ("dtype", "precision", "preferred_element_type")
_ZEROS: Any = jax.nn.initializers.zeros  # every array is replaced


@adapter.builds(specs.LinearGeneral, carries=("axes", "batch_axes", *_CONTRACTION))
def build_linear_general(spec, ctx):
    layer = nnx.LinearGeneral(
        spec.in_shape,
        spec.out_shape,
        axis=spec.axes,
        batch_axis=dict(enumerate(spec.batch_shape)),
        use_bias=spec.bias is not None,
        dtype=spec.dtype,
        param_dtype=spec.weight.dtype,
        kernel_init=_ZEROS,
        bias_init=_ZEROS,
        precision=spec.precision,
        preferred_element_type=spec.preferred_element_type,
        rngs=_NO_RNGS,
    )
    _set_general(layer, spec)
    return layer


def _set_general(layer, spec) -> None:
    layer.kernel.set_value(spec.weight)
    if spec.bias is not None:
        layer.bias.set_value(spec.bias)


@adapter.reads(
    nnx.Einsum,
    specs.Einsum,
    state=("kernel", "bias"),
    fixed={"einsum_op": jnp.einsum},
)
def read_einsum(m, ctx):
    return specs.Einsum(
        equation=m.einsum_str,
        weight=_array(m, ctx, "kernel"),
        bias=_array(m, ctx, "bias"),
        dtype=specs.dtype(m.dtype),
        precision=m.precision,
        preferred_element_type=specs.dtype(m.preferred_element_type),
    )


@adapter.builds(specs.Einsum, carries=_CONTRACTION)
def build_einsum(spec, ctx):
    return nnx.Einsum(
        spec.equation,
        spec.weight.shape,
        None if spec.bias is None else spec.bias.shape,
        dtype=spec.dtype,
        param_dtype=spec.weight.dtype,
        precision=spec.precision,
        kernel_init=_given(spec.weight),
        bias_init=_given(spec.bias),
        preferred_element_type=spec.preferred_element_type,
        rngs=_NO_RNGS,
    )


@adapter.reads(
    nnx.MultiHeadAttention,
    specs.MultiHeadAttention,
    state=(
        *("query", "key", "value", "out", "query_ln", "key_ln", "rngs"),
        *("cached_key", "cached_value", "cache_index"),
    ),
    fixed={
        "qkv_promote_dtype": dtypes.promote_dtype,
        "out_promote_dtype": dtypes.promote_dtype,
        "ln_promote_dtype": dtypes.promote_dtype,
        "qkv_dot_general": None,
        "out_dot_general": None,
        "qkv_dot_general_cls": None,
        "out_dot_general_cls": None,
    },
)
def read_attention(m, ctx):
    if m.decode:
        ctx.refuse("decode", True, "other frameworks have no place for a cache of keys")
    scales = (m.query_ln, m.key_ln) if m.normalize_qk else (None, None)
    return specs.MultiHeadAttention(
        **{name: _read_part(m, ctx, name) for name in ("query", "key", "value", "out")},
        query_scale=_head_scale(scales[0], m, ctx),
        key_scale=_head_scale(scales[1], m, ctx),
        rope=_read_rope_of(m.attention_fn, ctx),
        rate=m.dropout_rate,
        broadcast_dropout=m.broadcast_dropout,
        # without dropout NNX calls jax.nn.dot_product_attention
        core="plain" if m.dropout_rate > 0.0 else "fused",
        dtype=specs.dtype(m.dtype),
        precision=m.precision,
    )


def _read_part(m, ctx, name: str) -> specs.LinearGeneral:
    part = ctx.read(getattr(m, name), f"{ctx.path}.{name}")
    if not isinstance(part, specs.LinearGeneral):
        ctx.refuse(name, type(getattr(m, name)).__qualname__, "only a LinearGeneral converts")
    return part


def _head_scale(norm, m, ctx):
    """The scale of the normalisation that the layer makes by itself."""
    if norm is None:
        return None
    spec = ctx.read(norm, f"{ctx.path}.{'query' if norm is m.query_ln else 'key'}_ln")
    found = (spec.epsilon, spec.reduction_axes, spec.use_fast_variance, spec.output_dtype)
    if spec.bias is not None or found != (1e-6, (-1,), True, specs.dtype(m.dtype)):
        ctx.refuse("normalize_qk", norm, "only the normalisation that it makes itself converts")
    return spec.scale


def _read_rope_of(fn, ctx):
    if fn is nnx.dot_product_attention:
        return None
    with_rope = getattr(nnx, "dot_product_attention_with_rope", None)  # since flax 0.12.9
    is_partial = isinstance(fn, functools.partial) and not fn.args
    if is_partial and fn.func is with_rope and fn.keywords.keys() == {"rope"}:
        return ctx.read(fn.keywords["rope"], f"{ctx.path}.attention_fn.rope")
    return ctx.refuse(
        "attention_fn",
        fn,
        "only nnx.dot_product_attention converts, and dot_product_attention_with_rope in a "
        "functools.partial with its rope",
    )


def check_attention(spec, ctx, core: str) -> None:
    """Refuse what neither NNX nor Linen has."""
    if not spec.agrees_with(core):
        ctx.refuse("core", spec.core, f"Flax computes in the dtypes of {core!r}")
    if not spec.is_uniform:
        ctx.refuse("dtype, precision, axes", "of the parts", "Flax has the same for all")
    if len({part.bias is None for part in spec.parts}) > 1:
        ctx.refuse("use_bias", "of the parts", "Flax has all biases or none")
    if (spec.query_scale is None) != (spec.key_scale is None):
        ctx.refuse(
            "normalize_qk", "of one", "Flax normalises both queries and keys, or neither"
        )
    if spec.value.weight.shape[-1] != spec.depth:
        ctx.refuse("value_depth", spec.value.weight.shape[-1], "Flax has that of the queries")


def attention_options(spec) -> dict[str, Any]:
    """The options that both constructors take."""
    return {
        "dtype": spec.dtype,
        "param_dtype": spec.query.weight.dtype,
        "broadcast_dropout": spec.broadcast_dropout,
        "dropout_rate": spec.rate,
        "precision": spec.precision,
        "use_bias": spec.query.bias is not None,
        "decode": False,
        "normalize_qk": spec.query_scale is not None,
    }


ATTENTION = ("query_scale", "key_scale", "rate", "broadcast_dropout", "core")
ATTENTION += ("dtype", "precision")


@adapter.builds(specs.MultiHeadAttention, carries=(*ATTENTION, "rope"))
def build_attention(spec, ctx):
    check_attention(spec, ctx, "plain" if spec.rate > 0.0 else "fused")
    key_features, kv_heads, _ = spec.key.weight.shape
    if spec.value.weight.shape[0] != key_features:
        ctx.refuse("value_features", spec.value.weight.shape[0], "NNX has that of the keys")
    layer = nnx.MultiHeadAttention(
        spec.heads,
        spec.in_features,
        spec.heads * spec.depth,
        spec.out.weight.shape[-1],
        kv_heads,
        key_features,
        deterministic=True,
        kernel_init=_ZEROS,
        bias_init=_ZEROS,
        attention_fn=_attention_fn(spec.rope, ctx),
        **attention_options(spec),
        rngs=_NO_RNGS,
        keep_rngs=False,
    )
    for part, own in zip(
        spec.parts, (layer.query, layer.key, layer.value, layer.out), strict=True
    ):
        _set_general(own, part)
    norm: Any
    for norm, scale in (layer.query_ln, spec.query_scale), (layer.key_ln, spec.key_scale):
        if norm is not None:
            norm.scale.set_value(scale)
    rngs = ctx.options.get("rngs")
    if spec.rate > 0.0 and rngs is not None:
        layer.rngs = rngs.dropout.fork() if isinstance(rngs, nnx.Rngs) else rngs
    return layer


def _attention_fn(rope, ctx):
    if rope is None:
        return nnx.dot_product_attention
    if _ROPE is None or (rope.table_dtype, rope.keeps_dtype) != (None, False):
        ctx.refuse("rope", rope, "nnx.RoPE rounds nothing, and is new in flax 0.12.9")
    with_rope: Any = vars(nnx)["dot_product_attention_with_rope"]
    return functools.partial(with_rope, rope=build_rope(rope, ctx))


_ROPE: Any = getattr(nnx, "RoPE", None)  # since flax 0.12.9


def build_rope(spec, ctx):
    size = None if spec.max_length is None else spec.depth
    return _ROPE(spec.theta, size, spec.max_length)


if _ROPE is not None:
    adapter.builds(specs.RotaryEmbedding, carries=("depth", "theta", "max_length"))(build_rope)

    @adapter.reads(_ROPE, specs.RotaryEmbedding, state=("cached_sin", "cached_cos"))
    def read_rope(m, ctx):
        length, half = (None, None) if m.cached_sin is None else m.cached_sin.shape
        return specs.RotaryEmbedding(depth=half and 2 * half, theta=m.theta, max_length=length)


@adapter.reads(
    nnx.Conv,
    specs.Conv,
    state=("kernel", "bias"),
    fixed={"conv_general_dilated": jax.lax.conv_general_dilated},
)
def read_conv(m, ctx):
    return specs.Conv(
        weight=_array(m, ctx, "kernel"),
        bias=_array(m, ctx, "bias"),
        **conv_fields(m, ctx),
        preferred_element_type=specs.dtype(m.preferred_element_type),
    )


def conv_fields(m, ctx) -> dict[str, Any]:
    """The options of a convolution, which Flax spells alike in NNX and in Linen."""
    kernel = _kernel_size(m)
    input_dilation = _each(m.input_dilation, kernel)
    kernel_dilation = _each(m.kernel_dilation, kernel)
    reach = [(size - 1) * d + 1 for size, d in zip(kernel, kernel_dilation, strict=True)]
    padding, padding_mode = _padding(m, kernel), "ZEROS"
    if padding in ("CIRCULAR", "REFLECT"):
        padding, padding_mode = _flax_pads(reach), padding
    if padding == "CAUSAL":
        if len(reach) != 1:
            ctx.refuse("padding", padding, "Flax has it for one axis of space only")
        padding = (((reach[0] - 1) * input_dilation[0], 0),)
    return {
        "padding": padding,
        "padding_mode": padding_mode if any(map(any, padding)) else "ZEROS",
        "kernel_dilation": kernel_dilation,
        "groups": m.feature_group_count,
        "input_dilation": None if set(input_dilation) == {1} else input_dilation,
        **_conv_fields(m, kernel),
    }


def _conv_fields(m, kernel: tuple[int, ...]) -> dict[str, Any]:
    """Those that convolutions and transposed ones have."""
    return {
        "strides": _each(m.strides, kernel),
        "in_shape": None,
        "mask": m.mask,
        "dtype": specs.dtype(m.dtype),
        "precision": m.precision,
    }


def _kernel_size(m) -> tuple[int, ...]:
    return (m.kernel_size,) if isinstance(m.kernel_size, int) else tuple(m.kernel_size)


def _each(value: Any, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """``value`` for each axis of space; None means 1."""
    if value is None or isinstance(value, int):
        return (1 if value is None else value,) * len(kernel)
    return tuple(value)


def _padding(m, kernel: tuple[int, ...]) -> Any:
    if isinstance(m.padding, str):
        return m.padding.upper()
    pairs = [m.padding] * len(kernel) if isinstance(m.padding, int) else m.padding
    return tuple((p, p) if isinstance(p, int) else tuple(p) for p in pairs)


def _flax_pads(reach: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """How much Flax pads where it does so with other than zeros."""
    return tuple(((size - 1) // 2, size // 2) for size in reach)


def conv_options(spec, ctx) -> dict[str, Any]:
    """The same options, as both constructors take them."""
    padding = spec.padding
    if spec.padding_mode != "ZEROS":
        pads = padding
        if padding in ("SAME", "SAME_LOWER") and set(spec.strides) == {1}:
            pads = spec.pads((1,) * (spec.dims + 1))  # the same for any shape
        if spec.padding_mode == "REPLICATE" or pads != _flax_pads(spec.reach):
            ctx.refuse(
                "padding_mode",
                spec.padding_mode,
                f"Flax cannot pad by {padding} with other than zeros",
            )
        padding = spec.padding_mode
    return {
        "kernel_size": spec.kernel,
        "padding": padding,
        "input_dilation": spec.input_dilation or 1,
        "feature_group_count": spec.groups,
        **_conv_options(spec),
    }


def _conv_options(spec) -> dict[str, Any]:
    return {
        "strides": spec.strides,
        "kernel_dilation": spec.kernel_dilation,
        "use_bias": spec.bias is not None,
        "mask": spec.mask,
        "dtype": spec.dtype,
        "param_dtype": spec.weight.dtype,
        "precision": spec.precision,
    }


_CONV = ("input_dilation", "mask", "dtype", "precision", "padding_mode")


@adapter.builds(specs.Conv, carries=(*_CONV, "preferred_element_type"))
def build_conv(spec, ctx):
    return nnx.Conv(
        spec.channels,
        spec.weight.shape[-1],
        **conv_options(spec, ctx),
        preferred_element_type=spec.preferred_element_type,
        kernel_init=_given(spec.weight),
        bias_init=_given(spec.bias),
        rngs=_NO_RNGS,
    )


@adapter.reads(
    nnx.ConvTranspose,
    specs.ConvTranspose,
    state=("kernel", "bias"),
)
def read_conv_transpose(m, ctx):
    arrays = _array(m, ctx, "kernel"), _array(m, ctx, "bias")
    return specs.ConvTranspose(**conv_transpose_fields(m, *arrays, ctx))


def conv_transpose_fields(m, kernel, bias, ctx) -> dict[str, Any]:
    """A transposed convolution, which Flax has alike in NNX and in Linen."""
    size = _kernel_size(m)
    fields = _conv_fields(m, size)
    dilation, padding = _each(m.kernel_dilation, size), _padding(m, size)
    reach = tuple((n - 1) * d + 1 for n, d in zip(size, dilation, strict=True))
    strides, is_circular = fields["strides"], padding == "CIRCULAR"
    if is_circular:
        padding = _circular_pads(reach, strides, m.transpose_kernel)
    elif padding == "SAME_LOWER" and set(strides) == {1}:
        padding = "SAME"  # which is SAME_LOWER there: the first end gets more
    elif isinstance(padding, str) and padding not in ("SAME", "VALID"):
        ctx.refuse("padding", padding, "Flax fails on it when it is called")
    fields |= {
        "weight": kernel,
        "bias": bias,
        "padding": padding,
        "padding_mode": "CIRCULAR" if is_circular else "ZEROS",
        "kernel_dilation": dilation,
        "groups": 1,
        "preferred_element_type": specs.dtype(m.preferred_element_type),
    }
    if m.transpose_kernel:
        mask = m.mask if m.mask is None else specs.flipped(m.mask)
        fields |= {"weight": specs.flipped(kernel), "mask": mask}
    return fields


def _circular_pads(reach, strides, mirrored: bool) -> tuple[tuple[int, int], ...]:
    """What periodic padding comes to: Flax adds up what is one period apart in the output.

    The output then has ``stride`` times the elements of the input; where an odd number has to
    be cut off it, ``mirrored`` says that the first end loses more.
    """
    pads: list[tuple[int, int]] = []
    for size, stride in zip(reach, strides, strict=True):
        surplus = max(size - stride, 0)
        low = size - 1 - (surplus + mirrored) // 2
        pads.append((low, size + stride - 2 - low))
    return tuple(pads)


def conv_transpose_options(spec, ctx) -> dict[str, Any]:
    """The same options, as both constructors take them, with the kernel beside them."""
    if spec.groups != 1 or spec.dims > 3:
        option, value = ("groups", spec.groups) if spec.groups != 1 else ("dims", spec.dims)
        ctx.refuse(option, value, "Flax has one group, and at most three axes of space")
    kernel, mask, padding, mirrored = spec.weight, spec.mask, spec.padding, False
    if spec.padding_mode != "ZEROS":
        found = [_circular_pads(spec.reach, spec.strides, side) for side in (False, True)]
        if padding not in found:
            ctx.refuse("padding", padding, "Flax cannot pad periodically by so much")
        mirrored, padding = padding != found[0], "CIRCULAR"
    if mirrored:
        kernel, mask = specs.flipped(kernel), mask if mask is None else specs.flipped(mask)
    return {
        **_conv_options(spec),
        "kernel_size": spec.kernel,
        "padding": padding,
        "mask": mask,
        "transpose_kernel": mirrored,
        "preferred_element_type": spec.preferred_element_type,
        "kernel_init": _given(kernel),
        "bias_init": _given(spec.bias),
    }


_TRANSPOSED = ("mask", "dtype", "precision", "padding_mode", "preferred_element_type")


@adapter.builds(specs.ConvTranspose, carries=_TRANSPOSED)
def build_conv_transpose(spec, ctx):
    options, out = conv_transpose_options(spec, ctx), spec.weight.shape[-1]
    return nnx.ConvTranspose(spec.channels, out, **options, rngs=_NO_RNGS)


@adapter.reads(
    nnx.Embed,
    specs.Embedding,
    state=("embedding",),
)
def read_embed(m, ctx):
    weight, dtype = _array(m, ctx, "embedding"), specs.dtype(m.dtype)
    return specs.Embedding(weight=weight, dtype=None if dtype == weight.dtype else dtype)


@adapter.builds(specs.Embedding, carries=("dtype",))
def build_embed(spec, ctx):
    return nnx.Embed(
        *spec.weight.shape,
        dtype=spec.dtype,
        param_dtype=spec.weight.dtype,
        embedding_init=_given(spec.weight),
        rngs=_NO_RNGS,
    )


def _norm_fields(m, ctx) -> dict[str, Any]:
    """What every normalisation layer holds."""
    dtype = specs.dtype(m.dtype)
    return {
        "scale": _array(m, ctx, "scale"),
        "bias": _array(m, ctx, "bias") if hasattr(m, "bias") else None,
        "epsilon": m.epsilon,
        "use_fast_variance": m.use_fast_variance,
        "axis_name": m.axis_name,
        "axis_index_groups": m.axis_index_groups,
        "compute_dtype": None if dtype is None or specs.is_wide(dtype) else dtype,
        "output_dtype": dtype,
    }


def _norm_options(spec, ctx) -> dict[str, Any]:
    options = {
        "epsilon": spec.epsilon,
        "dtype": _norm_dtype(spec, ctx),
        "param_dtype": specs.common_dtype(spec.scale, spec.bias),
        "use_scale": spec.scale is not None,
        "scale_init": _given(_flat(spec.scale)),
        "axis_name": spec.axis_name,
        "axis_index_groups": spec.axis_index_groups,
        "use_fast_variance": spec.use_fast_variance,
        "rngs": _NO_RNGS,
    }
    if not isinstance(spec, specs.RMSNorm):
        options |= {"use_bias": spec.bias is not None, "bias_init": _given(_flat(spec.bias))}
    return options


def _norm_dtype(spec, ctx):
    """The one dtype that this framework has for the operands and for the result."""
    if spec.compute_dtype == spec.output_dtype or specs.is_wide(spec.output_dtype):
        return spec.output_dtype
    return ctx.refuse(
        "output_dtype",
        spec.output_dtype,
        "nnx would cast the input to it before taking statistics, not only the result",
    )


@adapter.reads(
    nnx.LayerNorm,
    specs.LayerNorm,
    state=("scale", "bias"),
)
@adapter.reads(
    nnx.RMSNorm,
    specs.RMSNorm,
    state=("scale",),
)
def read_layer_norm(m, ctx):
    reduction_axes = _axes(m.reduction_axes, "reduction_axes", ctx)
    feature_axes = _axes(m.feature_axes, "feature_axes", ctx)
    return (specs.RMSNorm if isinstance(m, nnx.RMSNorm) else specs.LayerNorm)(
        **_norm_fields(m, ctx),
        # of several axes only the product of their sizes is kept
        feature_shape=(m.num_features,) if len(feature_axes) == 1 else None,
        reduction_axes=tuple(sorted(reduction_axes)),
        feature_axes=tuple(sorted(feature_axes)),
    )


def _axes(axes: Any, option: str, ctx) -> tuple[int, ...]:
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    if any(axis >= 0 for axis in axes):
        ctx.refuse(
            option,
            axes,
            "non-negative axes count batch axes, which are not known here",
            "Count the axes from the end",
        )
    return axes


_AXES = ("leading_shape", "reduction_axes", "feature_axes")
_NORM = ("axis_name", "axis_index_groups", "compute_dtype", "output_dtype")


@adapter.builds(specs.LayerNorm, carries=(*_AXES, *_NORM))
@adapter.builds(specs.RMSNorm, carries=(*_AXES, *_NORM))
def build_layer_norm(spec, ctx):
    arrays = [array for array in (spec.scale, spec.bias) if array is not None]
    shape = arrays[0].shape if arrays else spec.feature_shape
    if shape is None:
        shape = spec.sized(ctx.require_shape(-spec.feature_axes[0])).feature_shape
    features = math.prod(shape or ())
    return (nnx.RMSNorm if isinstance(spec, specs.RMSNorm) else nnx.LayerNorm)(
        features,
        reduction_axes=spec.reduction_axes,
        feature_axes=spec.feature_axes,
        **_norm_options(spec, ctx),
    )


def _flat(array: Any) -> Any:
    return array if array is None or array.ndim == 1 else array.reshape(-1)


@adapter.reads(
    nnx.GroupNorm,
    specs.GroupNorm,
    state=("scale", "bias"),
)
def read_group_norm(m, ctx):
    axes = m.reduction_axes
    return specs.GroupNorm(
        **_norm_fields(m, ctx),
        num_groups=m.num_groups,
        features=m.num_groups * m.group_size,
        reduction_axes=group_axes(axes, ctx),
        repeat_axis=-1 if axes is None else 1,
    )


def group_axes(axes: Any, ctx) -> tuple[int, ...] | None:
    """The axes that a GroupNorm reduces beside that of the features, or None for all."""
    if axes is None:
        return None
    axes = tuple(sorted(_axes(axes, "reduction_axes", ctx)))
    if axes[-1] != -1:
        ctx.refuse("reduction_axes", axes, "-1, the axis of the features, must be among them")
    return axes[:-1]


@adapter.builds(specs.GroupNorm, carries=(*_NORM, "reduction_axes", "repeat_axis"))
def build_group_norm(spec, ctx):
    features, axes = spec.features or ctx.require_shape()[-1], spec.reduction_axes
    if spec.repeat_axis != (-1 if axes is None else 1):
        ctx.refuse("reduction_axes", axes, "nnx repeats the statistics along axis 1")
    return nnx.GroupNorm(
        features,
        spec.num_groups,
        reduction_axes=None if axes is None else (*axes, -1),
        **_norm_options(spec, ctx),
    )


@adapter.reads(
    nnx.InstanceNorm,
    specs.GroupNorm,
    state=("scale", "bias"),
    fixed={"feature_axes": -1},
)
def read_instance_norm(m, ctx):
    return specs.GroupNorm(
        **_norm_fields(m, ctx), num_groups=m.num_features, features=m.num_features
    )


@adapter.reads(
    nnx.BatchNorm,
    specs.BatchNorm,
    state=("scale", "bias", "mean", "var"),
)
def read_batch_norm(m, ctx):
    (axis,) = _axes(m.axis, "axis", ctx)
    fields, mean = _norm_fields(m, ctx), _array(m, ctx, "mean", nnx.BatchStat)
    if m.dtype is None:
        fields["output_dtype"] = specs.promoted_dtype(mean, fields["scale"], fields["bias"])
    return specs.BatchNorm(
        **fields,
        mean=mean,
        var=_array(m, ctx, "var", nnx.BatchStat),
        momentum=m.momentum,
        spatial_dims=None,
        axis=axis,
    )


@adapter.builds(specs.BatchNorm, carries=("axis", *_NORM))
def build_batch_norm(spec, ctx):
    promoted = specs.promoted_dtype(spec.mean, spec.scale, spec.bias)
    if spec.output_dtype is None and promoted is not None:
        ctx.refuse("dtype", None, f"nnx returns {promoted} for a half-precision input")
    layer = nnx.BatchNorm(
        *spec.mean.shape,
        use_running_average=True,
        axis=spec.axis,
        momentum=spec.momentum,
        **_norm_options(spec, ctx),
    )
    layer.mean.set_value(spec.mean)
    layer.var.set_value(spec.var)
    return layer


@adapter.reads(nnx.Dropout, specs.Dropout, state=("rngs",))
def read_dropout(m, ctx):
    return specs.Dropout(
        rate=m.rate, broadcast_dims=tuple(m.broadcast_dims), rng_collection=m.rng_collection
    )


@adapter.builds(specs.Dropout, carries=("broadcast_dims",))
def build_dropout(spec, ctx):
    return nnx.Dropout(
        spec.rate,
        broadcast_dims=spec.broadcast_dims,
        deterministic=True,
        rng_collection=spec.rng_collection,
        rngs=ctx.options.get("rngs"),
    )


_CELL: dict[str, Any] = {
    "state": ("ii", "if_", "ig", "io", "hi", "hf", "hg", "ho", "dense_i", "dense_h", "rngs"),
}


@adapter.reads(nnx.SimpleCell, specs.SimpleCell, **_CELL)
def read_simple_cell(m, ctx):
    arrays = _dense_arrays([m.dense_i], [m.dense_h], ctx, bias=m.dense_i)
    return specs.SimpleCell(**arrays, **cell_fields(m, *arrays.values()), residual=m.residual)


@adapter.reads(nnx.GRUCell, specs.GRUCell, **_CELL)
def read_gru_cell(m, ctx):
    arrays = _dense_arrays([m.dense_i], [m.dense_h], ctx, bias=m.dense_i)
    return specs.GRUCell(**arrays, bias_n=None, **cell_fields(m, *arrays.values()))


@adapter.reads(nnx.LSTMCell, specs.LSTMCell, **_CELL)
@adapter.reads(nnx.OptimizedLSTMCell, specs.LSTMCell, **_CELL)
def read_lstm_cell(m, ctx):
    if isinstance(m, nnx.OptimizedLSTMCell):
        inputs, hidden = [m.dense_i], [m.dense_h]
    else:
        inputs, hidden = [m.ii, m.if_, m.ig, m.io], [m.hi, m.hf, m.hg, m.ho]
    arrays = _dense_arrays(inputs, hidden, ctx)
    arrays["bias"] = joined([_array(layer, ctx, "bias") for layer in hidden], ctx)
    return specs.LSTMCell(**arrays, **cell_fields(m, *arrays.values()))


def _dense_arrays(inputs, hidden, ctx, bias: Any = None) -> dict[str, Any]:
    kernels = [[_array(layer, ctx, "kernel") for layer in part] for part in (inputs, hidden)]
    found = {"weight_x": joined(kernels[0], ctx), "weight_h": joined(kernels[1], ctx)}
    return found if bias is None else found | {"bias": _array(bias, ctx, "bias")}


def joined(arrays: list[Any], ctx) -> Any:
    """The arrays of a cell's gates side by side."""
    found = {str(array.dtype) for array in arrays}
    if len(found) > 1:
        ctx.refuse("param_dtype", sorted(found), "the gates of a cell convert in one dtype")
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=-1)


def cell_fields(m, *arrays: Any) -> dict[str, Any]:
    """The options of a cell, None for the usual ones, which Flax spells alike in both."""
    usual = specs.common_dtype(*arrays)
    fields = {
        "activation": None if m.activation_fn in (jnp.tanh, jax.nn.tanh) else m.activation_fn,
        "dtype": specs.plain_dtype(m.dtype, *arrays),
        "carry_init": formulas.carry_init(m.carry_init, m.param_dtype, usual),
    }
    if hasattr(m, "gate_fn"):
        fields["gate"] = None if m.gate_fn is jax.nn.sigmoid else m.gate_fn
    return fields


def cell_options(spec) -> dict[str, Any]:
    """The same options, as both constructors take them, but ``carry_init``."""
    options = {
        "activation_fn": spec.activation or jnp.tanh,
        "dtype": spec.dtype,
        "param_dtype": spec.weight_h.dtype,
    }
    return options | ({"gate_fn": spec.gate or jax.nn.sigmoid} if hasattr(spec, "gate") else {})


def _cell(cls: Any, spec, **options: Any) -> Any:
    """A cell of that class for a spec's sizes and options; every array is to be replaced."""
    empty = _given(jnp.zeros(()))
    cell = cls(
        *spec.in_shape,
        spec.hidden,
        **cell_options(spec),
        **options,
        kernel_init=empty,
        recurrent_kernel_init=empty,
        bias_init=empty,
        rngs=_NO_RNGS,
    )
    cell.carry_init = spec.carry_init  # as an argument, it warns
    return cell


_CARRIED = ("activation", "dtype", "carry_init")


def check_bias(bias: Any, ctx) -> None:
    """Refuse a cell without a bias."""
    if bias is None:
        ctx.refuse("use_bias", False, "Flax's cells have a bias")


@adapter.builds(specs.SimpleCell, carries=(*_CARRIED, "residual"))
def build_simple_cell(spec, ctx):
    check_bias(spec.bias, ctx)
    return _with_dense(_cell(nnx.SimpleCell, spec, residual=spec.residual), spec)


@adapter.builds(specs.GRUCell, carries=(*_CARRIED, "gate"))
def build_gru_cell(spec, ctx):
    check_bias(spec.bias, ctx)
    if spec.bias_n is not None:
        ctx.refuse("bias_n", spec.bias_n, "nnx has no bias in the product with the state")
    return _with_dense(_cell(nnx.GRUCell, spec), spec)


def _with_dense(cell: Any, spec) -> Any:
    cell.dense_i.kernel.set_value(spec.weight_x)
    cell.dense_i.bias.set_value(spec.bias)
    cell.dense_h.kernel.set_value(spec.weight_h)
    return cell


@adapter.builds(specs.LSTMCell, carries=(*_CARRIED, "gate"))
def build_lstm_cell(spec, ctx):
    check_bias(spec.bias, ctx)
    cell = _cell(nnx.LSTMCell, spec)
    inputs, hidden = (cell.ii, cell.if_, cell.ig, cell.io), (cell.hi, cell.hf, cell.hg, cell.ho)
    for i, parts in enumerate(gates(spec.weight_x, spec.weight_h, spec.bias, number=4)):
        inputs[i].kernel.set_value(parts[0])
        hidden[i].kernel.set_value(parts[1])
        hidden[i].bias.set_value(parts[2])
    return cell


def gates(*arrays: Any, number: int) -> list[tuple[Any, ...]]:
    """The part of each array that is of one gate, in order."""
    if number == 1:
        return [arrays]
    return list(zip(*(jnp.split(array, number, axis=-1) for array in arrays), strict=True))


_RNN = ("time_major", "return_carry", "reverse", "keep_order", "unroll")


@adapter.reads(
    nnx.RNN,
    specs.RNN,
    state=("cell", "rngs", "state_axes"),
    fixed={"state_axes": nnx.StateAxes({...: nnx.Carry}), "broadcast_rngs": None},
)
def read_rnn(m, ctx):
    cell = read_cell(m.cell, m.cell, ctx)
    return specs.RNN(cell=cell, **{name: getattr(m, name) for name in _RNN})


def read_cell(node: Any, cell: Any, ctx) -> Any:
    """The spec of the cell that a layer runs."""
    spec = ctx.read(node, f"{ctx.path}.cell")
    if not isinstance(spec, specs.Cell):
        ctx.refuse("cell", cell, "its reader does not say that it is a recurrent cell")
    return spec


@adapter.builds(specs.RNN, carries=_RNN)
def build_rnn(spec, ctx):
    return nnx.RNN(ctx.build(spec.cell), **{name: getattr(spec, name) for name in _RNN})


@adapter.reads(
    nnx.Bidirectional, specs.Bidirectional, state=("forward_rnn", "backward_rnn", "rngs")
)
def read_bidirectional(m, ctx):
    parts = {name: (getattr(m, name), getattr(m, name)) for name in RNNS}
    return specs.Bidirectional(**read_rnns(parts, ctx), **bidirectional_fields(m))


RNNS = ("forward_rnn", "backward_rnn")


def read_rnns(parts: dict[str, tuple[Any, Any]], ctx) -> dict[str, Any]:
    """The specs of both directions, from their nodes and modules by name."""
    found = {name: ctx.read(node, f"{ctx.path}.{name}") for name, (node, _) in parts.items()}
    for name, spec in found.items():
        if not isinstance(spec, specs.RNN):
            ctx.refuse(name, parts[name][1], "only an RNN converts here")
    return found


def bidirectional_fields(m) -> dict[str, Any]:
    """The options, None for the usual merge, which Flax spells alike in NNX and in Linen."""
    is_usual = m.merge_fn is type(m).merge_fn
    return {
        "merge": None if is_usual else m.merge_fn,
        "time_major": m.time_major,
        "return_carry": m.return_carry,
    }


def bidirectional_options(spec) -> dict[str, Any]:
    """The same options, as both constructors take them."""
    merge = {} if spec.merge is None else {"merge_fn": spec.merge}
    return merge | {"time_major": spec.time_major, "return_carry": spec.return_carry}


@adapter.builds(specs.Bidirectional, carries=("merge", "time_major", "return_carry"))
def build_bidirectional(spec, ctx):
    parts = [ctx.build(getattr(spec, name)) for name in RNNS]
    return nnx.Bidirectional(*parts, **bidirectional_options(spec))


def read_pool(fn: Any) -> specs.Pool | None:
    """Flax's ``max_pool`` or ``avg_pool`` with its options in a ``functools.partial``."""
    if not isinstance(fn, functools.partial) or fn.args:
        return None
    if fn.func not in (nnx.max_pool, nnx.avg_pool) or "window_shape" not in fn.keywords:
        return None
    options: dict[str, Any] = {"strides": None, "padding": "VALID", "count_include_pad": True}
    options |= fn.keywords
    window = options["window_shape"]
    strides = options["strides"] or (1,) * len(window)
    mean = fn.func is nnx.avg_pool
    return specs.pool(mean, options["count_include_pad"], window, strides, options["padding"])


@adapter.builds(specs.Pool, carries=("counts_padding",))
def build_pool(spec, ctx):
    options = {"window_shape": spec.window, "strides": spec.strides, "padding": spec.padding}
    if not spec.mean:
        return functools.partial(nnx.max_pool, **options)
    options["count_include_pad"] = spec.counts_padding
    return functools.partial(nnx.avg_pool, **options)


@adapter.builds(specs.Activation)
def build_activation(spec, ctx):
    fn = formulas.ACTIVATIONS[spec.name]
    return functools.partial(fn, **spec.options) if spec.options else fn


@adapter.builds(specs.Flatten)
def build_flatten(spec, ctx):
    return functools.partial(
        formulas.flatten,
        start_axis=spec.start_axis,
        end_axis=spec.end_axis,
        in_size=spec.in_size,
    )


@adapter.builds(specs.Function)
def build_function(spec, ctx):
    return formulas.Batched(spec.fn) if spec.per_example else spec.fn
