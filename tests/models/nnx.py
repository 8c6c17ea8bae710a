"""Flax NNX models."""

import functools
import warnings

import jax
import jax.numpy as jnp
from flax import nnx

import shims

from .. import live
from ..cases import array
from . import ALL, INITIAL, MODE, SHAPE, Constructor, Option

LACKS = {}
OWN_LAYOUT = set()
OWN_STREAMS = "an NNX module holds its own random streams"
ALWAYS_KEYED = None
RATE = 0.1
NAMESPACE, MODULE = nnx, nnx.Module
NO_LAYERS = ()
BASES = {nnx.Module, nnx.RNNCellBase}


def linear(weight, bias=None, **options):
    layer = nnx.Linear(
        *weight.shape,
        use_bias=bias is not None,
        param_dtype=weight.dtype,
        rngs=nnx.Rngs(0),
        **options,
    )
    layer.kernel.set_value(weight)
    if bias is not None:
        layer.bias.set_value(bias)
    return layer


def layer_norm(scale, bias, epsilon, use_fast_variance=False):
    layer = nnx.LayerNorm(
        *scale.shape,
        epsilon=epsilon,
        use_fast_variance=use_fast_variance,
        param_dtype=scale.dtype,
        rngs=nnx.Rngs(0),
    )
    layer.scale.set_value(scale)
    layer.bias.set_value(bias)
    return layer


def conv(weight, bias, shape, strides=1, padding="SAME", dilation=1, groups=1):
    layer = nnx.Conv(
        shape[-1],
        weight.shape[-1],
        weight.shape[:-2],
        strides,
        padding=padding,
        kernel_dilation=dilation,
        feature_group_count=groups,
        use_bias=bias is not None,
        rngs=nnx.Rngs(0),
    )
    layer.kernel.set_value(weight)
    if bias is not None:
        layer.bias.set_value(bias)
    return layer


def lstm(weight_x, weight_h, bias):
    cell = nnx.LSTMCell(*weight_x.shape[:1], len(weight_h), rngs=nnx.Rngs(0))
    inputs, hidden = (cell.ii, cell.if_, cell.ig, cell.io), (cell.hi, cell.hf, cell.hg, cell.ho)
    for i in range(4):
        part = slice(i * len(weight_h), (i + 1) * len(weight_h))
        inputs[i].kernel.set_value(weight_x[:, part])
        hidden[i].kernel.set_value(weight_h[:, part])
        hidden[i].bias.set_value(bias[part])
    return cell


def start(model, shape):
    carry = model.initialize_carry(shape, nnx.Rngs(0))
    return carry[::-1] if isinstance(carry, tuple) else (carry,)


def steps(model, xs, *state):
    carry, outs = state[::-1] if len(state) > 1 else state[0], []
    for x in xs:
        carry, y = model(carry, x)
        outs.append(y)
    return jnp.stack(outs), *(carry[:-1] if len(state) > 1 else ())


def max_pool(window, strides, padding):
    return functools.partial(
        nnx.max_pool, window_shape=window, strides=strides, padding=padding
    )


def avg_pool(window, strides):
    return functools.partial(nnx.avg_pool, window_shape=window, strides=strides)


def embedding(weight):
    layer = nnx.Embed(*weight.shape, param_dtype=weight.dtype, rngs=nnx.Rngs(0))
    layer.embedding.set_value(weight)
    return layer


def rms_norm(scale, epsilon):
    layer = nnx.RMSNorm(*scale.shape, epsilon=epsilon, rngs=nnx.Rngs(0))
    layer.scale.set_value(scale)
    return layer


def group_norm(scale, bias, groups, epsilon):
    layer = nnx.GroupNorm(
        *scale.shape, groups, epsilon=epsilon, use_fast_variance=False, rngs=nnx.Rngs(0)
    )
    layer.scale.set_value(scale)
    layer.bias.set_value(bias)
    return layer


def batch_norm(scale, bias, mean, var, epsilon, momentum, use_fast_variance=False, shape=None):
    layer = nnx.BatchNorm(
        *scale.shape,
        epsilon=epsilon,
        momentum=momentum,
        use_fast_variance=use_fast_variance,
        param_dtype=scale.dtype,
        rngs=nnx.Rngs(0),
    )
    for name, value in {"scale": scale, "bias": bias, "mean": mean, "var": var}.items():
        getattr(layer, name).set_value(value)
    return layer


def dropout(rate):
    return nnx.Dropout(rate)


def prelu(slope):
    return nnx.PReLU(slope)


def sequential(*layers):
    return nnx.Sequential(*layers)


def activation(fn):
    return fn


def flatten():
    return lambda x: x.reshape(x.shape[0], -1)


def subclass(weight, bias):
    class Doubled(nnx.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    return Doubled(*weight.shape, rngs=nnx.Rngs(0))


def renamed(weight, bias):
    class Renamed(nnx.Linear):
        pass

    return Renamed(*weight.shape, rngs=nnx.Rngs(0))


def custom(weight, bias):
    class Residual(nnx.Module):
        def __init__(self):
            self.linear = linear(weight, bias)

        def __call__(self, x):
            return x.sum() + self.linear(x)

    return Residual()


def arguments(model):
    return model, {}


def receive(convert):
    return convert()


def _switch(model, train):
    modes = ("deterministic", "use_running_average")
    found = {getattr(m, mode, None) for _, m in nnx.iter_modules(model) for mode in modes}
    if train in found:  # not within a transformation, where NNX forbids to set attributes
        model.train() if train else model.eval()


def run(model, x, train=False, key=None):
    _switch(model, train)
    rngs = {} if key is None else {"rngs": nnx.Rngs(dropout=key)}
    return model(x, **rngs), model


@nnx.jit
def _jit(model, x):
    return model(x)


def jit(model, x):
    _switch(model, False)
    return _jit(model, x)


def _leaves(model):
    if isinstance(model, nnx.Sequential):
        return [leaf for layer in model.layers for leaf in _leaves(layer)]
    return [model]


def _arrays(layer):
    variables = {name: getattr(layer, name, None) for name in _NAMES}
    return {
        _NAMES[name]: variable.get_value()
        for name, variable in variables.items()
        if isinstance(variable, nnx.Variable)
    }


_NAMES = {"kernel": "weight", "embedding": "weight"} | {
    name: name for name in ("scale", "bias", "mean", "var")
}


def read(model):
    return [arrays for layer in _leaves(model) if (arrays := _arrays(layer))]


_OPTIONS = ("in_features", "out_features", "num_features", "use_bias", "rate")
_OPTIONS += ("param_dtype", "epsilon", "momentum", "axis", "use_fast_variance")
_OPTIONS += ("num_embeddings", "features", "num_groups", "feature_group_count")


def options(model):
    return [
        (type(layer), {name: getattr(layer, name, None) for name in _OPTIONS})
        if isinstance(layer, nnx.Module)
        else layer
        for layer in _leaves(model)
    ]


def _gradients(model, x):
    _switch(model, False)
    return nnx.grad(lambda m: (m(x) ** 2).sum())(model)


def gradient(model, x):
    grads = _gradients(model, x)
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)
    layers = read(nnx.merge(graphdef, grads, rest))
    return [{k: v for k, v in a.items() if k not in ("mean", "var")} for a in layers]


def step(model, x):
    params, grads = nnx.state(model, nnx.Param), _gradients(model, x)
    nnx.update(model, jax.tree.map(lambda p, g: p - RATE * g, params, grads))
    return model


def count(model):
    return len(jax.tree.leaves(nnx.state(model, nnx.Param)))


def construct(cls, x, **options):
    with warnings.catch_warnings():
        if "carry_init" in options:
            warnings.simplefilter("ignore")  # of an argument that is to be given elsewhere
        layer = cls(**options)
    for variable in jax.tree.leaves(
        nnx.state(layer, nnx.Param), is_leaf=lambda v: isinstance(v, nnx.Variable)
    ):
        value = variable.get_raw_value()
        variable.set_raw_value(value + array(*value.shape).astype(value.dtype))
    nnx.update(layer, nnx.state(layer))
    return layer


def _promote(args, *, dtype=None, inexact=True):
    return args


def _dot_general(*args, **keywords):
    return jax.lax.dot_general(*args, **keywords)


def _dilated(*args, **keywords):
    return jax.lax.conv_general_dilated(*args, **keywords)


_RNGS = nnx.Rngs(0)
_KEYS = "the random streams, which the result gets by to_nnx(rngs=)"


def _note(option, array, found=None, **others):
    metadata = {option: {"note": "mine"}, **others}
    return Option(metadata, refused=ALL, named=f"{array} metadata", found=found)


_NORM = {
    "num_features": SHAPE,
    "epsilon": Option(0.1),
    "dtype": Option(jnp.bfloat16),
    "use_bias": Option(False),
    "use_scale": Option(False),
    "param_dtype": Option(jnp.bfloat16),
    "bias_init": INITIAL,
    "scale_init": INITIAL,
    "axis_index_groups": Option(
        {"axis_name": "batch", "axis_index_groups": [[0, 1]]},
        refused=("equinox",),
        named="axis_name",
        attribute=True,
    ),
    "use_fast_variance": Option(False),
    "promote_dtype": Option(_promote, refused=ALL),
    "rngs": INITIAL,
    "bias_metadata": _note("bias_metadata", "bias"),
    "scale_metadata": _note("scale_metadata", "scale"),
}

_RMS_NORM = {name: mark for name, mark in _NORM.items() if "bias" not in name}
_LAYER_NORM = {
    "reduction_axes": Option((-2, -1), x=(6, 3, 4)),
    "feature_axes": Option({"num_features": 12, "feature_axes": (-3, -1)}, x=(6, 3, 5, 4)),
    "axis_name": Option("batch", refused=("equinox",)),
}

_CELL = {"in_features": 3, "hidden_features": 4, "rngs": _RNGS}
_LSTM = {
    "in_features": SHAPE,
    "hidden_features": SHAPE,
    "gate_fn": Option(jax.nn.hard_sigmoid),
    "activation_fn": Option(jax.nn.relu),
    "kernel_init": INITIAL,
    "recurrent_kernel_init": INITIAL,
    "bias_init": INITIAL,
    "dtype": Option(jnp.bfloat16),
    "param_dtype": Option(
        {"param_dtype": jnp.bfloat16, "recurrent_kernel_init": jax.nn.initializers.normal()},
    ),
    "carry_init": Option(nnx.initializers.ones),
    "promote_dtype": Option(_promote, refused=ALL),
    "keep_rngs": "it warns: the streams are an argument of initialize_carry",
    "rngs": INITIAL,
    "kernel_metadata": _note("kernel_metadata", "kernel"),
    "recurrent_kernel_metadata": _note("recurrent_kernel_metadata", "kernel"),
    "bias_metadata": _note("bias_metadata", "bias"),
}

_CONTRACTION = {
    "use_bias": Option(False),
    "dtype": Option(jnp.bfloat16),
    "param_dtype": Option(jnp.bfloat16),
    "precision": Option("highest", attribute=True),
    "kernel_init": INITIAL,
    "bias_init": INITIAL,
    "promote_dtype": Option(_promote, refused=ALL),
    "preferred_element_type": Option(jnp.float32),
    "rngs": INITIAL,
    "kernel_metadata": _note("kernel_metadata", "kernel"),
    "bias_metadata": _note("bias_metadata", "bias"),
}


def _attend(*args, **keywords):
    return nnx.dot_product_attention(*args, **keywords)


_ELSEWHERE = "tests/test_attention.py"
_ATTENTION = {
    "num_heads": Option(3),
    "in_features": SHAPE,
    "qkv_features": Option(12),
    "out_features": Option(5),
    "num_kv_heads": Option(1),
    "in_kv_features": SHAPE,
    "dtype": Option(jnp.bfloat16),
    "param_dtype": Option(jnp.bfloat16),
    "broadcast_dropout": _ELSEWHERE,
    "dropout_rate": _ELSEWHERE,
    "deterministic": MODE,
    "precision": Option("highest", attribute=True),
    "kernel_init": INITIAL,
    "out_kernel_init": INITIAL,
    "bias_init": INITIAL,
    "out_bias_init": INITIAL,
    "use_bias": Option(False),
    "attention_fn": Option(_attend, refused=ALL),
    "decode": _ELSEWHERE,
    "normalize_qk": Option(True),
    "qkv_promote_dtype": Option(_promote, refused=ALL),
    "out_promote_dtype": Option(_promote, refused=ALL),
    "ln_promote_dtype": Option(_promote, refused=ALL),
    "qkv_dot_general": Option(_dot_general, refused=ALL),
    "out_dot_general": Option(_dot_general, refused=ALL),
    "qkv_dot_general_cls": Option(lambda: _dot_general, refused=ALL),
    "out_dot_general_cls": Option(lambda: _dot_general, refused=ALL),
    "rngs": INITIAL,
    "keep_rngs": "whether it holds the streams, which the result gets by to_nnx(rngs=)",
    "kernel_metadata": _note("kernel_metadata", "kernel", "LinearGeneral"),
    "out_kernel_metadata": _note("out_kernel_metadata", "kernel", "LinearGeneral"),
    "bias_metadata": _note("bias_metadata", "bias", "LinearGeneral"),
    "out_bias_metadata": _note("out_bias_metadata", "bias", "LinearGeneral"),
    "query_ln_scale_metadata": _note(
        "query_ln_scale_metadata", "scale", "LayerNorm", normalize_qk=True
    ),
    "key_ln_scale_metadata": _note(
        "key_ln_scale_metadata", "scale", "LayerNorm", normalize_qk=True
    ),
}
_SIMPLE = {name: mark for name, mark in _LSTM.items() if name != "gate_fn"}
_RNN = {
    "time_major": Option(True, attribute=True),
    "return_carry": Option(True, attribute=True),
    "rngs": "only a random initial state depends on it",
}

_WITHIN = "tests/test_normalized_weights.py"
_PURE = {"equinox": "overwrites", "linen": "overwrites"}


def _scales(key, shape):  # a random one fails: NNX gives it no key
    return jnp.arange(4.0).reshape(shape) - 1.3


TRANSPOSED = {
    "kernel_size": Option(3, x=(2, 5, 4)),
    "strides": Option((2, 1)),
    "padding": Option([(1, 0), (2, 1)]),
    "kernel_dilation": Option((1, 2)),
    "use_bias": Option(False),
    "mask": Option((jnp.arange(144) % 3.0).reshape(3, 2, 4, 6)),
    "dtype": Option(jnp.bfloat16),
    "param_dtype": INITIAL,
    "precision": Option("highest", attribute=True),
    "kernel_init": INITIAL,
    "bias_init": INITIAL,
    "transpose_kernel": Option({"transpose_kernel": True, "strides": (2, 1)}),
    "promote_dtype": Option(_promote, refused=ALL),
    "preferred_element_type": Option(
        {"preferred_element_type": jnp.float32, "dtype": jnp.bfloat16}
    ),
}

CONSTRUCTORS = {
    nnx.Sequential: "its layers are tested in stacks",
    nnx.Linear: Constructor(
        (6, 3),
        {"in_features": 3, "out_features": 4, "rngs": _RNGS},
        {
            "in_features": SHAPE,
            "out_features": SHAPE,
            "use_bias": Option(False),
            "dtype": Option(jnp.bfloat16),
            "param_dtype": Option(jnp.bfloat16),
            "precision": Option("highest", attribute=True),
            "kernel_init": INITIAL,
            "bias_init": INITIAL,
            "dot_general": Option(_dot_general, refused=ALL),
            "promote_dtype": Option(_promote, refused=ALL),
            "preferred_element_type": Option(jnp.float32),
            "rngs": INITIAL,
            "kernel_metadata": _note("kernel_metadata", "kernel"),
            "bias_metadata": _note("bias_metadata", "bias"),
        },
    ),
    nnx.LoRA: Constructor(
        (6, 3),
        {"in_features": 3, "lora_rank": 2, "out_features": 4, "rngs": _RNGS},
        {
            "in_features": SHAPE,
            "lora_rank": SHAPE,
            "out_features": SHAPE,
            "base_module": Option(nnx.Linear(3, 4, rngs=_RNGS)),
            "dtype": Option(
                {"dtype": jnp.bfloat16, "base_module": nnx.Linear(3, 4, rngs=_RNGS)}
            ),
            "param_dtype": Option(jnp.bfloat16),
            "a_initializer": INITIAL,
            "b_initializer": INITIAL,
            "lora_param_type": Option(nnx.Param, refused=ALL, named="lora_a"),
            "promote_dtype": Option(_promote, refused=ALL),
            "rngs": INITIAL,
            "a_metadata": _note("a_metadata", "lora_a"),
            "b_metadata": _note("b_metadata", "lora_b"),
        },
    ),
    nnx.LoRALinear: Constructor(
        (6, 3),
        {"in_features": 3, "lora_rank": 2, "out_features": 4, "rngs": _RNGS},
        {
            "in_features": SHAPE,
            "out_features": SHAPE,
            "lora_rank": SHAPE,
            "lora_dtype": Option(jnp.bfloat16),
            "lora_param_dtype": Option(jnp.bfloat16),
            "a_initializer": INITIAL,
            "b_initializer": INITIAL,
            "lora_param_type": Option(nnx.Param, refused=ALL, named="lora_a", found="LoRA"),
            "lora_promote_dtype": Option(
                _promote, refused=ALL, named="promote_dtype", found="LoRA"
            ),
            "rngs": INITIAL,
            "a_metadata": _note("a_metadata", "lora_a", "LoRA"),
            "b_metadata": _note("b_metadata", "lora_b", "LoRA"),
            "kwargs": Option({"use_bias": False, "dtype": jnp.bfloat16}),
        },
    ),
    nnx.LinearGeneral: Constructor(
        (6, 3),
        {"in_features": 3, "out_features": (4, 2), "rngs": _RNGS},
        _CONTRACTION
        | {
            "in_features": SHAPE,
            "out_features": Option(4),
            "axis": Option({"in_features": (5, 3), "axis": (1, -1)}, x=(6, 5, 2, 3)),
            "batch_axis": Option(
                {"batch_axis": {0: 6}}, refused=("equinox",), named="the batch axis"
            ),
            "dot_general": Option(_dot_general, refused=ALL),
            "dot_general_cls": Option(lambda: _dot_general, refused=ALL),
        },
    ),
    nnx.Einsum: Constructor(
        (6, 3),
        {
            "einsum_str": "bi,ijk->bkj",
            "kernel_shape": (3, 4, 2),
            "bias_shape": (2, 4),
            "rngs": _RNGS,
        },
        {name: mark for name, mark in _CONTRACTION.items() if name != "use_bias"}
        | {
            "einsum_str": Option({"einsum_str": "...i, ijk -> ...jk", "bias_shape": (4, 2)}),
            "kernel_shape": SHAPE,
            "bias_shape": Option(None),
            "einsum_op": Option(lambda *a, **k: jnp.einsum(*a, **k), refused=ALL),
        },
    ),
    nnx.MultiHeadAttention: Constructor(
        (2, 5, 6),
        {"num_heads": 2, "in_features": 6, "decode": False, "rngs": _RNGS},
        _ATTENTION,
    ),
    nnx.Conv: Constructor(
        (2, 6, 5, 4),
        {"in_features": 4, "out_features": 6, "kernel_size": (3, 2), "rngs": _RNGS},
        {
            "in_features": SHAPE,
            "out_features": SHAPE,
            "kernel_size": Option(3, x=(2, 5, 4)),
            "strides": Option((2, 1)),
            "padding": Option([(1, 0), (2, 1)]),
            "input_dilation": Option({"input_dilation": 2, "padding": 1}),
            "kernel_dilation": Option((1, 2)),
            "feature_group_count": Option(2),
            "use_bias": Option(False),
            "mask": Option((jnp.arange(144) % 3.0).reshape(3, 2, 4, 6)),
            "dtype": Option(jnp.bfloat16),
            "param_dtype": INITIAL,
            "precision": Option("highest", attribute=True),
            "kernel_init": INITIAL,
            "bias_init": INITIAL,
            "promote_dtype": Option(_promote, refused=ALL),
            "conv_general_dilated": Option(_dilated, refused=ALL),
            "preferred_element_type": Option(
                {"preferred_element_type": jnp.float32, "dtype": jnp.bfloat16}
            ),
            "rngs": INITIAL,
            "kernel_metadata": _note("kernel_metadata", "kernel"),
            "bias_metadata": _note("bias_metadata", "bias"),
        },
        images=True,
    ),
    nnx.SimpleCell: Constructor((6, 3), _CELL, _SIMPLE | {"residual": Option(True)}),
    nnx.GRUCell: Constructor((6, 3), _CELL, _LSTM),
    nnx.RNN: Constructor(
        (2, 5, 3),
        {"cell": nnx.GRUCell(3, 4, rngs=_RNGS)},
        _RNN
        | {
            "cell": "a layer of its own",
            "reverse": Option(True),
            "keep_order": Option({"reverse": True, "keep_order": True}),
            "unroll": Option(2),
            "state_axes": Option(nnx.StateAxes({...: None}), refused=ALL),
            "broadcast_rngs": Option("dropout", refused=ALL),
        },
    ),
    nnx.Bidirectional: Constructor(
        (2, 5, 3),
        {
            "forward_rnn": nnx.RNN(nnx.GRUCell(3, 4, rngs=_RNGS)),
            "backward_rnn": nnx.RNN(nnx.LSTMCell(3, 4, rngs=_RNGS)),
        },
        _RNN
        | {
            "forward_rnn": "a layer of its own",
            "backward_rnn": "a layer of its own",
            "merge_fn": Option(jnp.subtract),
        },
    ),
    nnx.ConvTranspose: Constructor(
        (2, 6, 5, 4),
        {"in_features": 4, "out_features": 6, "kernel_size": (3, 2), "rngs": _RNGS},
        TRANSPOSED
        | {
            "in_features": SHAPE,
            "out_features": SHAPE,
            "rngs": INITIAL,
            "kernel_metadata": _note("kernel_metadata", "kernel"),
            "bias_metadata": _note("bias_metadata", "bias"),
        },
        images=True,
    ),
    nnx.SpectralNorm: Constructor(
        (6, 3),
        {"layer_instance": nnx.Linear(3, 4, rngs=_RNGS), "rngs": _RNGS},
        {
            "layer_instance": _WITHIN,
            "n_steps": Option(3),
            "epsilon": Option(0.1),
            "dtype": Option(jnp.bfloat16),
            # NNX then warns in training, which is an error here
            "param_dtype": Option(jnp.bfloat16, training=False),
            "error_on_non_matrix": "it fails at once, or changes nothing",
            "update_stats": MODE,
            "rngs": INITIAL,
        },
        refused=_PURE,
    ),
    nnx.WeightNorm: Constructor(
        (6, 3),
        {"layer_instance": nnx.Linear(3, 4, rngs=_RNGS), "rngs": _RNGS},
        {
            "layer_instance": _WITHIN,
            "feature_axes": Option(0),
            "use_scale": Option(False),
            "scale_init": Option(_scales),
            "epsilon": Option(0.1),
            "dtype": Option(jnp.bfloat16),
            "param_dtype": INITIAL,
            "variable_filter": Option(nnx.PathContains("bias")),
            "promote_dtype": Option(_promote, refused=ALL),
            "rngs": INITIAL,
        },
        refused=_PURE,
    ),
    nnx.LSTMCell: Constructor((6, 3), _CELL, _LSTM),
    nnx.OptimizedLSTMCell: Constructor((6, 3), _CELL, _LSTM),
    nnx.Embed: Constructor(
        jnp.arange(6) % 5,
        {"num_embeddings": 5, "features": 3, "rngs": _RNGS},
        {
            "num_embeddings": SHAPE,
            "features": SHAPE,
            "dtype": Option(jnp.bfloat16),
            "param_dtype": Option(jnp.bfloat16),
            "embedding_init": INITIAL,
            "promote_dtype": Option(_promote, refused=ALL),
            "rngs": INITIAL,
            "embedding_metadata": _note("embedding_metadata", "embedding"),
        },
    ),
    nnx.LayerNorm: Constructor((6, 4), {"num_features": 4, "rngs": _RNGS}, _NORM | _LAYER_NORM),
    nnx.RMSNorm: Constructor(
        (6, 4), {"num_features": 4, "rngs": _RNGS}, _RMS_NORM | _LAYER_NORM
    ),
    nnx.GroupNorm: Constructor(
        (6, 4),
        {"num_features": 4, "num_groups": 2, "rngs": _RNGS},
        _NORM
        | {
            "group_size": Option({"num_groups": None, "group_size": 1}),
            "reduction_axes": Option((-1,), x=(6, 5, 4)),
            "axis_name": Option("batch", refused=("equinox",)),
        },
        images=True,
    ),
    nnx.InstanceNorm: Constructor(
        (6, 7, 4),
        {"num_features": 4, "rngs": _RNGS},
        _NORM
        | {
            "feature_axes": Option((-2, -1), refused=ALL),
            "axis_name": Option("batch", refused=("equinox",)),
        },
        images=True,
    ),
    nnx.BatchNorm: Constructor(
        (6, 4),
        {"num_features": 4, "rngs": _RNGS},
        _NORM
        | {
            "use_running_average": MODE,
            "axis": Option(-2, x=(6, 4, 3)),
            "momentum": Option(0.5),
            "axis_name": Option("batch", refused=("equinox",), attribute=True),
        },
        images=True,
    ),
    nnx.PReLU: Constructor(
        (6, 4),
        {},
        {
            "negative_slope_init": INITIAL,
            "dtype": Option(jnp.bfloat16),
            "param_dtype": Option(jnp.bfloat16),
            "promote_dtype": Option(_promote, refused=ALL),
            "negative_slope_metadata": _note("negative_slope_metadata", "negative_slope"),
        },
    ),
    nnx.Dropout: Constructor(
        (1000, 4),
        {"rate": 0.5},
        {
            "rate": Option(0.3),
            "broadcast_dims": Option((1,)),
            "deterministic": MODE,
            "rng_collection": "a name; each host has its own",
            "rngs": _KEYS,
        },
    ),
}

if hasattr(nnx, "RoPE"):  # since flax 0.12.9
    CONSTRUCTORS[nnx.RoPE] = Constructor(
        (2, 5, 6),
        {},
        {
            "theta": Option(100.0),
            "embedding_size": "it warns when called: tests/test_attention.py",
            "max_seq_len": "it comes with embedding_size",
        },
    )


# -- live --


class Block(nnx.Module):
    """What :func:`tests.live.truth` computes."""

    label = "a block"

    def __init__(self, rate, axis_name):
        p, s = live.PARAMS, live.STATS
        self.inp = linear(p["w1"], p["b1"])
        stats = s["mean"], s["var"], live.EPSILON, live.MOMENTUM
        self.norm = batch_norm(p["scale"], p["shift"], *stats)
        self.norm.axis_name = axis_name
        # A stream of its own is for a whole batch: the one example of an axis is given its key.
        self.drop = nnx.Dropout(rate, rngs=None if axis_name else nnx.Rngs(7))
        self.out = linear(p["w2"], p["b2"])

    def __call__(self, x, rngs=None):
        h = self.inp(x)
        y = self.drop(jnp.tanh(self.norm(h)), rngs=rngs)
        live.passed()
        return self.out(y) + h.sum(-1, keepdims=True)

    def encode(self, x, *, gain=1.0):
        return {"code": gain * self.inp(x)}


def block(rate=0.0, axis_name=None):
    return Block(rate, axis_name)


def block_output(model, x):
    model = nnx.clone(model)
    model.eval()
    return model(x)


def block_arrays(model):
    layers = model.inp.kernel, model.inp.bias, model.norm.scale, model.norm.bias
    layers += model.out.kernel, model.out.bias, model.norm.mean, model.norm.var
    return dict(zip(_BLOCK, [v.get_value() for v in layers], strict=True))


_BLOCK = ("w1", "b1", "scale", "shift", "w2", "b2", "mean", "var")


class Host:
    """A shim whose host is this framework."""

    def __init__(self, module, keyed=True, **keywords):
        self.again = functools.partial(Host, module, keyed, **keywords)
        self.shim = shims.wrap(module, into="nnx", **keywords)
        if keyed:
            self.shim.rngs = nnx.RngStream(0, tag="dropout")

    def call(self, x, train=False):
        _switch(self.shim, train)
        return self.shim(x)

    def jit(self, x, train=False):
        _switch(self.shim, train)
        return _jit(self.shim, x)

    def method(self, name, x, **options):
        _switch(self.shim, False)
        return nnx.jit(lambda m, x: getattr(m, name)(x, **options))(self.shim, x)

    def parameters(self):
        return jax.tree.leaves(nnx.state(self.shim, nnx.Param))

    def double(self):
        """Change the weights."""
        params = nnx.state(self.shim, nnx.Param)
        nnx.update(self.shim, jax.tree.map(lambda p: 2 * p, params))

    def gradients(self, x, train, remat=False):
        """Loss, output and gradients."""
        _switch(self.shim, train)
        loss, out, grads = _graded(self.shim, x, nnx.remat(_call) if remat else _call)
        return loss, out, jax.tree.leaves(grads)

    def step(self, x, compiled=True):
        _switch(self.shim, True)
        return (_compiled_step if compiled else _step)(self.shim, x)

    def split(self, train):
        """What is static of the shim, and its state, for ``run``."""
        _switch(self.shim, train)
        return nnx.split(self.shim)

    @staticmethod
    def run(static, state, x):
        """The output, and the state afterwards."""
        shim = nnx.merge(static, state)
        return shim(x), nnx.state(shim)

    def join(self, state):
        """Give the shim a state."""
        nnx.update(self.shim, state)

    def vmap(self, xs):
        _switch(self.shim, False)
        return nnx.vmap(_call, in_axes=(None, 0))(self.shim, xs)

    def scan(self, xs, train):
        _switch(self.shim, train)
        scan = nnx.scan(lambda m, x: (m, m(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        return scan(self.shim, xs)[1]

    def shape(self, x, train):
        _switch(self.shim, train)
        return nnx.eval_shape(_call, self.shim, x).shape

    def unwrap(self):
        return self.shim.unwrap()

    def materialize(self):
        return self.shim.materialize()


def _call(shim, x):
    return shim(x)


def _graded(shim, x, call):
    def loss(shim):
        out = call(shim, x)
        return (out**2).mean(), out

    (value, out), grads = nnx.value_and_grad(loss, has_aux=True)(shim)
    return value, out, grads


def _step(shim, x):
    loss, out, grads = _graded(shim, x, _call)
    params = nnx.state(shim, nnx.Param)
    nnx.update(shim, jax.tree.map(lambda p, g: p - live.STEP * g, params, grads))
    return loss, out


_compiled_step = nnx.jit(_step)
