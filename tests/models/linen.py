"""Flax Linen models: ``(module, variables)``."""

import functools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import shims
from interop.composites.linen import Composite

from .. import live
from ..cases import array
from . import ALL, INITIAL, MODE, NAME, SHAPE, Constructor, Option
from .nnx import TRANSPOSED

LACKS = {}
OWN_LAYOUT = set()
OWN_STREAMS = None
ALWAYS_KEYED = None
RATE = 0.1
NAMESPACE, MODULE = nn, nn.Module
NO_LAYERS = ()
BASES = {nn.Module, nn.RNNCellBase}


def linear(weight, bias=None, **options):
    module = nn.Dense(
        weight.shape[1], use_bias=bias is not None, param_dtype=weight.dtype, **options
    )
    arrays = {"kernel": weight} if bias is None else {"kernel": weight, "bias": bias}
    return module, {"params": arrays}


def layer_norm(scale, bias, epsilon, use_fast_variance=False):
    module = nn.LayerNorm(
        epsilon=epsilon, use_fast_variance=use_fast_variance, param_dtype=scale.dtype
    )
    return module, {"params": {"scale": scale, "bias": bias}}


def conv(weight, bias, shape, strides=1, padding="SAME", dilation=1, groups=1):
    module = nn.Conv(
        weight.shape[-1],
        weight.shape[:-2],
        strides if isinstance(strides, tuple) else (strides,) * (weight.ndim - 2),
        padding=padding,
        kernel_dilation=dilation if isinstance(dilation, tuple) else (1,) * (weight.ndim - 2),
        feature_group_count=groups,
        use_bias=bias is not None,
    )
    return module, {"params": {"kernel": weight} | ({} if bias is None else {"bias": bias})}


def lstm(weight_x, weight_h, bias):
    hidden, params = len(weight_h), {}
    for i, gate in enumerate("ifgo"):
        part = slice(i * hidden, (i + 1) * hidden)
        params[f"i{gate}"] = {"kernel": weight_x[:, part]}
        params[f"h{gate}"] = {"kernel": weight_h[:, part], "bias": bias[part]}
    return nn.LSTMCell(hidden), {"params": params}


def start(model, shape):
    carry = model[0].initialize_carry(jax.random.key(0), shape)
    return carry[::-1] if isinstance(carry, tuple) else (carry,)


def steps(model, xs, *state):
    module, variables = model
    carry, outs = state[::-1] if len(state) > 1 else state[0], []
    for x in xs:
        carry, y = module.apply(variables, carry, x)
        outs.append(y)
    return jnp.stack(outs), *(carry[:-1] if len(state) > 1 else ())


def max_pool(window, strides, padding):
    return functools.partial(nn.max_pool, window_shape=window, strides=strides, padding=padding)


def avg_pool(window, strides):
    return functools.partial(nn.avg_pool, window_shape=window, strides=strides)


def embedding(weight):
    module = nn.Embed(*weight.shape, param_dtype=weight.dtype)
    return module, {"params": {"embedding": weight}}


def rms_norm(scale, epsilon):
    return nn.RMSNorm(epsilon=epsilon), {"params": {"scale": scale}}


def group_norm(scale, bias, groups, epsilon):
    module = nn.GroupNorm(groups, epsilon=epsilon, use_fast_variance=False)
    return module, {"params": {"scale": scale, "bias": bias}}


def batch_norm(scale, bias, mean, var, epsilon, momentum, use_fast_variance=False, shape=None):
    module = nn.BatchNorm(
        use_running_average=True,
        epsilon=epsilon,
        momentum=momentum,
        use_fast_variance=use_fast_variance,
        param_dtype=scale.dtype,
    )
    statistics = {"mean": mean, "var": var}
    return module, {"params": {"scale": scale, "bias": bias}, "batch_stats": statistics}


def dropout(rate):
    return nn.Dropout(rate, deterministic=True), {}


def prelu(slope):
    return nn.PReLU(negative_slope_init=slope), {"params": {"negative_slope": slope}}


def sequential(*layers):
    modules, variables = [], {}
    for i, layer in enumerate(layers):
        module, parts = layer if isinstance(layer, tuple) else (layer, {})
        if any(module is earlier for earlier in modules):
            parts = {}  # Linen keeps a module used twice under its first place
        modules.append(module)
        for collection, arrays in parts.items():
            variables.setdefault(collection, {})[f"layers_{i}"] = arrays
    return nn.Sequential(modules), variables


def activation(fn):
    return fn


def flatten():
    return lambda x: x.reshape(x.shape[0], -1)


def subclass(weight, bias):
    class Doubled(nn.Dense):
        @nn.compact
        def __call__(self, inputs):
            return 2 * super().__call__(inputs)

    return Doubled(weight.shape[1]), linear(weight, bias)[1]


def renamed(weight, bias):
    class Renamed(nn.Dense):
        pass

    return Renamed(weight.shape[1]), linear(weight, bias)[1]


def custom(weight, bias):
    class Residual(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x.sum() + nn.Dense(weight.shape[1])(x)

    return Residual(), {"params": {"Dense_0": linear(weight, bias)[1]["params"]}}


def arguments(model):
    module, variables = model
    return module, {"params": variables}


def receive(convert):
    return convert()


def _in_mode(module, train, memo):
    """The module with the mode fields of all its layers set; one used twice stays one."""
    if not isinstance(module, nn.Module):
        return module
    if id(module) not in memo:
        memo[id(module)] = _clone(module, train, memo)
    return memo[id(module)]


def _clone(module, train, memo):
    if isinstance(module, nn.Sequential):
        return nn.Sequential([_in_mode(layer, train, memo) for layer in module.layers])
    if isinstance(module, nn.BatchNorm):
        return module.clone(use_running_average=not train)
    if isinstance(module, nn.Dropout | Composite | nn.MultiHeadDotProductAttention):
        return module.clone(deterministic=not train)
    return module


def _modes(module, train):
    """The arguments of a call that only this layer takes."""
    return {"update_stats": train} if isinstance(module, nn.SpectralNorm) else {}


def run(model, x, train=False, key=None):
    module, variables = model
    rngs = {} if key is None else {"rngs": {"dropout": key}}
    y, changed = _in_mode(module, train, {}).apply(
        variables,
        x,
        mutable=["batch_stats"] if train else [],
        **rngs,
        **_modes(module, train),
    )
    return y, (module, {**variables, **changed})


def jit(model, x):
    module, variables = model
    return jax.jit(module.apply)(variables, x)


def _leaves(module, variables):
    if not isinstance(module, nn.Sequential):
        return [(module, variables)]
    first, leaves = {}, []
    for i, layer in enumerate(module.layers):
        name = f"layers_{first.setdefault(id(layer), i)}"
        parts = {c: tree[name] for c, tree in variables.items() if name in tree}
        leaves += _leaves(layer, parts)
    return leaves


def _arrays(variables):
    arrays = {name: array for tree in variables.values() for name, array in tree.items()}
    weights = {"kernel": "weight", "embedding": "weight"}
    return {weights.get(name, name): array for name, array in arrays.items()}


def read(model):
    return [_arrays(variables) for _, variables in _leaves(*model) if variables]


def options(model):
    return [module for module, _ in _leaves(*model)]  # dataclasses: they compare by options


def _gradients(model, x):
    module, variables = model

    def loss(params):
        return (run((module, {**variables, "params": params}), x)[0] ** 2).sum()

    return jax.grad(loss)(variables["params"])


def gradient(model, x):
    return read((model[0], {"params": _gradients(model, x)}))


def step(model, x):
    module, variables = model
    update = functools.partial(jax.tree.map, lambda p, g: p - RATE * g)
    return module, {**variables, "params": update(variables["params"], _gradients(model, x))}


def count(model):
    return len(jax.tree.leaves(model[1]["params"]))


def construct(cls, x, **options):
    module = cls(**options)
    alone = {name: v for name, v in options.items() if not name.startswith("axis_")}
    inputs = [array(*x) if isinstance(x, tuple) else x]
    if isinstance(module, nn.RNNCellBase):
        inputs.insert(0, module.initialize_carry(jax.random.key(0), x))
    modes = _modes(module, False)
    variables = _in_mode(cls(**alone), False, {}).init(jax.random.key(0), *inputs, **modes)
    if "params" in variables:
        variables["params"] = jax.tree.map(
            lambda a: a + array(*a.shape).astype(a.dtype), variables["params"]
        )
    return module, variables


def _promote(*args, dtype=None, inexact=True):
    return args


def _dot_general(*args, **keywords):
    return jax.lax.dot_general(*args, **keywords)


def _dilated(*args, **keywords):
    return jax.lax.conv_general_dilated(*args, **keywords)


_MODULE = {"parent": NAME, "name": NAME}
_NORM = _MODULE | {
    "epsilon": Option(0.1),
    "use_bias": Option(False),
    "use_scale": Option(False),
    "dtype": Option(jnp.bfloat16),
    "param_dtype": INITIAL,
    "bias_init": INITIAL,
    "scale_init": INITIAL,
    "axis_index_groups": Option(
        {"axis_name": "batch", "axis_index_groups": [[0, 1]]},
        refused=("equinox",),
        named="axis_name",
        attribute=True,
    ),
    "use_fast_variance": Option(False),
    "force_float32_reductions": Option(
        {"force_float32_reductions": False, "dtype": jnp.bfloat16}
    ),
}

_RMS_NORM = {name: mark for name, mark in _NORM.items() if "bias" not in name}
_LAYER_NORM = {
    "reduction_axes": Option((-2, -1), x=(6, 3, 4)),
    "feature_axes": Option((-3, -1), x=(6, 3, 5, 4)),
    "axis_name": Option("batch", refused=("equinox",)),
}

_LSTM = _MODULE | {
    "features": SHAPE,
    "gate_fn": Option(jax.nn.hard_sigmoid),
    "activation_fn": Option(jax.nn.relu),
    "kernel_init": INITIAL,
    "recurrent_kernel_init": INITIAL,
    "bias_init": INITIAL,
    "dtype": Option(jnp.bfloat16),
    "param_dtype": Option(
        {"param_dtype": jnp.bfloat16, "recurrent_kernel_init": jax.nn.initializers.normal()},
    ),
    "carry_init": Option(nn.initializers.ones),
}
_SIMPLE = {name: mark for name, mark in _LSTM.items() if name != "gate_fn"}
_MGU = {name: mark for name, mark in _LSTM.items() if name != "bias_init"}
_RNN = _MODULE | {
    "time_major": Option(True, attribute=True),
    "return_carry": Option(True, attribute=True),
}

_CONTRACTION = _MODULE | {
    "use_bias": Option(False),
    "dtype": Option(jnp.bfloat16),
    "param_dtype": Option(jnp.bfloat16),
    "precision": Option("highest", attribute=True),
    "kernel_init": INITIAL,
    "bias_init": INITIAL,
    "promote_dtype": Option(_promote, refused=ALL),
}


def _attend(*args, **keywords):
    return nn.dot_product_attention(*args, **keywords)


_ELSEWHERE = "tests/test_attention.py"
_ATTENTION = _MODULE | {
    "num_heads": Option(3),
    "dtype": Option(jnp.bfloat16),
    "param_dtype": Option(jnp.bfloat16),
    "qkv_features": Option(12),
    "out_features": Option(5),
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
    "force_fp32_for_softmax": Option({"force_fp32_for_softmax": True, "dtype": jnp.bfloat16}),
    "qkv_dot_general": Option(_dot_general, refused=ALL),
    "out_dot_general": Option(_dot_general, refused=ALL),
    "qkv_dot_general_cls": Option(lambda: _dot_general, refused=ALL),
    "out_dot_general_cls": Option(lambda: _dot_general, refused=ALL),
    "qk_attn_weights_einsum_cls": Option(
        {
            "qk_attn_weights_einsum_cls": lambda: jnp.einsum,
            "attn_weights_value_einsum_cls": lambda: jnp.einsum,
        },
        refused=ALL,
    ),
    "attn_weights_value_einsum_cls": "it comes with qk_attn_weights_einsum_cls",
}

_WITHIN = "tests/test_normalized_weights.py"

CONSTRUCTORS = {
    nn.Sequential: "its layers are tested in stacks",
    nn.Dense: Constructor(
        (6, 3),
        {"features": 4},
        _MODULE
        | {
            "features": SHAPE,
            "use_bias": Option(False),
            "dtype": Option(jnp.bfloat16),
            "param_dtype": Option(jnp.bfloat16),
            "precision": Option("highest", attribute=True),
            "kernel_init": INITIAL,
            "bias_init": INITIAL,
            "promote_dtype": Option(_promote, refused=ALL),
            "dot_general": Option(_dot_general, refused=ALL),
            "dot_general_cls": Option(lambda: _dot_general, refused=ALL),
        },
    ),
    nn.DenseGeneral: Constructor(
        (6, 3),
        {"features": (4, 2)},
        _CONTRACTION
        | {
            "features": Option(4),
            "axis": Option((1, -1), x=(6, 5, 2, 3)),
            "batch_dims": Option((0,), refused=("equinox",), named="the batch axis"),
            "dot_general": Option(_dot_general, refused=ALL),
            "dot_general_cls": Option(lambda: _dot_general, refused=ALL),
        },
    ),
    nn.Einsum: Constructor(
        (6, 3),
        {"shape": (3, 4, 2), "einsum_str": "bi,ijk->bkj"},
        _CONTRACTION
        | {
            "shape": SHAPE,
            "einsum_str": Option("...i, ijk -> ...jk"),
            "preferred_element_type": Option(jnp.float32),
        },
    ),
    nn.MultiHeadDotProductAttention: Constructor((2, 5, 6), {"num_heads": 2}, _ATTENTION),
    nn.MultiHeadAttention: f"the same under another name: {_ELSEWHERE}",
    nn.SelfAttention: f"the same, which warns at each call: {_ELSEWHERE}",
    nn.Conv: Constructor(
        (2, 6, 5, 4),
        {"features": 6, "kernel_size": (3, 2)},
        _MODULE
        | {
            "features": SHAPE,
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
            "conv_general_dilated_cls": Option(lambda: _dilated, refused=ALL),
        },
        images=True,
    ),
    nn.SimpleCell: Constructor((6, 3), {"features": 4}, _SIMPLE | {"residual": Option(True)}),
    nn.GRUCell: Constructor((6, 3), {"features": 4}, _LSTM),
    nn.MGUCell: Constructor(
        (6, 3),
        {"features": 4},
        _MGU
        | {
            "forget_bias_init": INITIAL,
            "activation_bias_init": INITIAL,
            "reset_gate": Option(False),
        },
    ),
    nn.ConvLSTMCell: Constructor(
        (2, 6, 5, 3),
        {"features": 4, "kernel_size": (3, 2)},
        _MODULE
        | {
            "features": SHAPE,
            "kernel_size": Option((2,), x=(2, 6, 3)),
            "strides": Option((1, 1)),
            "padding": Option(((2, 0), (0, 1))),
            "use_bias": Option(False),
            "dtype": Option(jnp.bfloat16),
            "param_dtype": Option(jnp.bfloat16),
            "carry_init": Option(nn.initializers.ones),
        },
    ),
    nn.RNN: Constructor(
        (2, 5, 3),
        {"cell": nn.GRUCell(4)},
        _RNN
        | {
            "cell": "a layer of its own",
            "reverse": Option(True),
            "keep_order": Option({"reverse": True, "keep_order": True}),
            "unroll": Option(2),
            "variable_axes": Option({"variable_axes": {"other": 0}}, refused=ALL),
            "variable_broadcast": Option(["params", "other"], refused=ALL),
            "variable_carry": Option("other", refused=ALL),
            "split_rngs": Option({"split_rngs": {"params": False, "other": True}}, refused=ALL),
        },
    ),
    nn.Bidirectional: Constructor(
        (2, 5, 3),
        {"forward_rnn": nn.RNN(nn.GRUCell(4)), "backward_rnn": nn.RNN(nn.LSTMCell(4))},
        _RNN
        | {
            "forward_rnn": "a layer of its own",
            "backward_rnn": "a layer of its own",
            "merge_fn": Option(jnp.subtract),
        },
    ),
    nn.SpectralNorm: Constructor(
        (6, 3),
        {"layer_instance": nn.Dense(4)},
        _MODULE
        | {
            "layer_instance": _WITHIN,
            "n_steps": Option(3),
            "epsilon": Option(0.1),
            "dtype": Option(jnp.bfloat16),
            "param_dtype": Option(jnp.bfloat16, refused=ALL),
            "error_on_non_matrix": "it fails at once, or changes nothing",
            "collection_name": Option("other", training=False),
        },
    ),
    nn.WeightNorm: Constructor(
        (6, 3),
        {"layer_instance": nn.Dense(4)},
        _MODULE
        | {
            "layer_instance": _WITHIN,
            "epsilon": Option(0.1),
            "dtype": Option(jnp.bfloat16),
            "param_dtype": Option(jnp.bfloat16),
            "use_scale": Option(False),
            "scale_init": INITIAL,
            "feature_axes": Option((0, -1)),
            "variable_filter": Option({"bias"}),
        },
    ),
    nn.ConvLocal: Constructor(
        (2, 6, 5, 4),
        {"features": 6, "kernel_size": (3, 2)},
        _MODULE
        | {
            "features": SHAPE,
            "kernel_size": Option(3, x=(2, 5, 4)),
            "strides": Option((2, 1)),
            "padding": Option("CIRCULAR"),
            "input_dilation": Option({"input_dilation": 2, "padding": 1}),
            "kernel_dilation": Option((1, 2)),
            "feature_group_count": "Flax fails with any other than 1",
            "use_bias": Option(False),
            "mask": Option((jnp.arange(30 * 24 * 6) % 3.0).reshape(6, 5, 24, 6)),
            "dtype": Option(jnp.bfloat16),
            "param_dtype": Option(jnp.bfloat16),
            "precision": Option("highest", attribute=True),
            "kernel_init": INITIAL,
            "bias_init": INITIAL,
            "promote_dtype": Option(_promote, refused=ALL),
            "conv_general_dilated": Option(_dilated, refused=ALL),
            "conv_general_dilated_cls": Option(lambda: _dilated, refused=ALL),
        },
        images=True,
    ),
    nn.ConvTranspose: Constructor(
        (2, 6, 5, 4),
        {"features": 6, "kernel_size": (3, 2)},
        _MODULE
        | TRANSPOSED
        | {"features": SHAPE, "promote_dtype": Option(_promote, refused=ALL)},
        images=True,
    ),
    nn.LSTMCell: Constructor((6, 3), {"features": 4}, _LSTM),
    nn.OptimizedLSTMCell: Constructor((6, 3), {"features": 4}, _LSTM),
    nn.Embed: Constructor(
        jnp.arange(6) % 5,
        {"num_embeddings": 5, "features": 3},
        _MODULE
        | {
            "num_embeddings": SHAPE,
            "features": SHAPE,
            "dtype": Option(jnp.bfloat16),
            "param_dtype": Option(jnp.bfloat16),
            "embedding_init": INITIAL,
            "promote_dtype": Option(_promote, refused=ALL),
        },
    ),
    nn.LayerNorm: Constructor((6, 4), {}, _NORM | _LAYER_NORM),
    nn.RMSNorm: Constructor((6, 4), {}, _RMS_NORM | _LAYER_NORM),
    nn.GroupNorm: Constructor(
        (6, 4),
        {"num_groups": 2},
        _NORM
        | {
            "group_size": Option({"num_groups": None, "group_size": 1}),
            "reduction_axes": Option((-1,), x=(6, 5, 4)),
            "axis_name": Option("batch", refused=("equinox",)),
        },
        images=True,
    ),
    nn.InstanceNorm: Constructor(
        (6, 7, 4),
        {},
        _NORM
        | {
            "feature_axes": Option((-2, -1), refused=ALL),
            "axis_name": Option("batch", refused=("equinox",)),
        },
        images=True,
    ),
    nn.BatchNorm: Constructor(
        (6, 4),
        {},
        _NORM
        | {
            "use_running_average": MODE,
            "axis": Option(-2, x=(6, 4, 3)),
            "momentum": Option(0.5),
            "axis_name": Option("batch", refused=("equinox",), attribute=True),
        },
        images=True,
    ),
    nn.PReLU: Constructor(
        (6, 4),
        {},
        _MODULE | {"param_dtype": Option(jnp.bfloat16), "negative_slope_init": INITIAL},
    ),
    nn.Dropout: Constructor(
        (1000, 4),
        {"rate": 0.5},
        _MODULE
        | {
            "rate": Option(0.3),
            "broadcast_dims": Option((1,)),
            "deterministic": MODE,
            "rng_collection": "a name; each host has its own",
        },
    ),
}


# -- live --


class Block(nn.Module):
    """What :func:`tests.live.truth` computes."""

    label: ClassVar = "a block"
    rate: float
    axis_name: str | None

    @nn.compact
    def __call__(self, x, train=False):
        h = nn.Dense(4, name="inp")(x)
        norm = nn.BatchNorm(
            not train,
            epsilon=live.EPSILON,
            momentum=live.MOMENTUM,
            use_fast_variance=False,
            axis_name=self.axis_name,
            name="norm",
        )
        y = nn.Dropout(self.rate, deterministic=not train)(jnp.tanh(norm(h)))
        live.passed()
        return nn.Dense(2, name="out")(y) + h.sum(-1, keepdims=True)

    def encode(self, x, *, gain=1.0):
        h = x @ self.get_variable("params", "inp")["kernel"]
        return {"code": gain * (h + self.get_variable("params", "inp")["bias"])}


def block(rate=0.0, axis_name=None):
    p = live.PARAMS
    params = {
        "inp": {"kernel": p["w1"], "bias": p["b1"]},
        "norm": {"scale": p["scale"], "bias": p["shift"]},
        "out": {"kernel": p["w2"], "bias": p["b2"]},
    }
    return Block(rate, axis_name), {"params": params, "batch_stats": {"norm": dict(live.STATS)}}


def block_output(model, x):
    module, variables = model
    return module.apply(variables, x)


def block_arrays(model):
    p, stats = model[1]["params"], model[1]["batch_stats"]["norm"]
    arrays = {"w1": p["inp"]["kernel"], "b1": p["inp"]["bias"], "scale": p["norm"]["scale"]}
    arrays |= {"shift": p["norm"]["bias"], "w2": p["out"]["kernel"], "b2": p["out"]["bias"]}
    return arrays | {"mean": stats["mean"], "var": stats["var"]}


class Host:
    """A shim whose host is this framework, with its current variables."""

    def __init__(self, module, keyed=True, **keywords):
        self.again = functools.partial(Host, module, keyed, **keywords)
        self.shim = shims.wrap(module, into="linen", **keywords)
        self.variables = self.shim.init(jax.random.key(0), live.X, deterministic=True)
        self._mutable = [name for name in self.variables if name != "params"]
        self._keys = iter(range(1000)) if keyed else None
        self._jit = {
            train: jax.jit(functools.partial(self._apply, train=train))
            for train in (True, False)
        }
        self._compiled = jax.jit(self._step)

    def _rngs(self):
        return {} if self._keys is None else {"dropout": jax.random.key(next(self._keys))}

    def _apply(self, variables, rngs, x, train):
        mutable = self._mutable if train else False
        out = self.shim.apply(variables, x, deterministic=not train, rngs=rngs, mutable=mutable)
        return (out[0], {**variables, **out[1]}) if train else (out, variables)

    def call(self, x, train=False):
        out, self.variables = self._apply(self.variables, self._rngs(), x, train)
        return out

    def jit(self, x, train=False):
        out, self.variables = self._jit[train](self.variables, self._rngs(), x)
        return out

    def method(self, name, x, **options):
        shim = self.shim

        class Parent(nn.Module):
            @nn.compact
            def __call__(self, x):
                return getattr(shim.copy(name="inner"), name)(x, deterministic=True, **options)

        variables = {k: {"inner": tree} for k, tree in self.variables.items()}
        inside = jax.jit(Parent().apply)(variables, x)
        call = functools.partial(shim.apply, method=name, deterministic=True, **options)
        outside = jax.jit(call)(self.variables, x)
        jax.tree.map(np.testing.assert_array_equal, inside, outside)
        return outside

    def parameters(self):
        return jax.tree.leaves(self.variables["params"])

    def double(self):
        """Change the weights."""
        params = jax.tree.map(lambda p: 2 * p, self.variables["params"])
        self.variables = {**self.variables, "params": params}

    def _graded(self, variables, rngs, x, apply):
        def loss(params):
            out, after = apply({**variables, "params": params}, rngs, x)
            return (out**2).mean(), (out, after)

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    def gradients(self, x, train, remat=False):
        """Loss, output and gradients."""
        apply = functools.partial(self._apply, train=train)
        apply = jax.checkpoint(apply) if remat else apply
        (loss, (out, after)), grads = self._graded(self.variables, self._rngs(), x, apply)
        self.variables = {**self.variables, **{name: after[name] for name in self._mutable}}
        return loss, out, jax.tree.leaves(grads)

    def _step(self, variables, rngs, x):
        train = functools.partial(self._apply, train=True)
        (loss, (out, after)), grads = self._graded(variables, rngs, x, train)
        params = jax.tree.map(lambda p, g: p - live.STEP * g, variables["params"], grads)
        return loss, out, {**after, "params": params}

    def step(self, x, compiled=True):
        step = self._compiled if compiled else self._step
        loss, out, self.variables = step(self.variables, self._rngs(), x)
        return loss, out

    def split(self, train):
        """What is static of the shim, and its state, for ``run``."""
        return self.shim.clone(deterministic=not train), (self.variables, self._rngs())

    @staticmethod
    def run(static, state, x):
        """The output, and the state afterwards."""
        variables, keys = state
        mutable = [name for name in variables if name != "params"]
        split = {name: jax.random.split(key) for name, key in keys.items()}
        rngs = {name: key for name, (_, key) in split.items()}
        out, after = static.apply(variables, x, rngs=rngs, mutable=mutable)
        return out, ({**variables, **after}, {name: key for name, (key, _) in split.items()})

    def join(self, state):
        """Give the shim a state."""
        self.variables, _ = state

    def vmap(self, xs):
        return jax.vmap(lambda x: self._apply(self.variables, {}, x, False)[0])(xs)

    def scan(self, xs, train):
        shim, mutable = self.shim.clone(deterministic=not train), self._mutable

        class OverTime(nn.Module):
            @nn.compact
            def __call__(self, xs):
                over_time = nn.scan(
                    lambda inner, carry, x: (carry, inner(x)),
                    variable_broadcast="params",
                    variable_carry=mutable,
                    split_rngs={"dropout": True},
                )
                return over_time(shim.copy(name="inner"), None, xs)[1]

        variables = {k: {"inner": tree} for k, tree in self.variables.items()}
        outs, after = OverTime().apply(variables, xs, rngs=self._rngs(), mutable=mutable)
        self.variables |= {k: tree["inner"] for k, tree in after.items()}
        return outs

    def shape(self, x, train):
        apply = functools.partial(self._apply, train=train)
        return jax.eval_shape(apply, self.variables, self._rngs(), x)[0].shape

    def unwrap(self):
        return self.shim.unwrap(self.variables)

    def materialize(self):
        return self.shim.materialize(self.variables)
