"""BrainState models."""

import functools
import math

import brainstate
import brainunit
import jax
import jax.numpy as jnp
from brainstate import nn

import shims
from interop.composites.brainstate import Lambda

from .. import live
from ..cases import array
from . import ALL, INITIAL, NAME, SHAPE, Constructor, Option

LACKS = {}
OWN_LAYOUT = set()
OWN_STREAMS = None
ALWAYS_KEYED = "brainstate.random always has a key"
RATE = 0.1
NAMESPACE, MODULE = brainstate.nn, brainstate.nn.Module
# Parts of models that are no layers: these classes with their subclasses, and bases of layers.
NO_LAYERS = (
    brainstate.nn.Regularization,
    brainstate.nn.Param,
    brainstate.nn.Delay,
    brainstate.nn.EnvironContext,
    brainstate.nn.Vmap,
    brainstate.nn.Map,
)
BASES = {
    brainstate.nn.Module,
    brainstate.nn.Dynamics,
    brainstate.nn.RNNCell,
    brainstate.nn.ElementWiseBlock,
}


def linear(weight, bias=None, **options):
    return nn.Linear(
        (weight.shape[0],), (weight.shape[1],), w_init=weight, b_init=bias, **options
    )


def layer_norm(scale, bias, epsilon, use_fast_variance=False):
    layer = nn.LayerNorm(
        scale.shape,
        epsilon=epsilon,
        scale_init=scale,
        bias_init=bias,
        use_fast_variance=use_fast_variance,
    )
    layer.dtype = None  # the result's dtype follows the input, as in the other frameworks
    return layer


def conv(weight, bias, shape, strides=1, padding="SAME", dilation=1, groups=1):
    space = weight.ndim - 2
    return getattr(nn, f"Conv{space}d")(
        shape,
        weight.shape[-1],
        weight.shape[:space],
        stride=strides,
        padding=padding,
        rhs_dilation=dilation,
        groups=groups,
        w_init=weight,
        b_init=None if bias is None else bias.reshape(*[1] * space, -1),
    )


def lstm(weight_x, weight_h, bias):
    """The cell has its gates in the order i, g, f, o, and adds 1 to f."""
    hidden = weight_h.shape[0]
    weight = jnp.concatenate([weight_x, weight_h])
    order = jnp.arange(4 * hidden).reshape(4, hidden)[jnp.array([0, 2, 1, 3])].ravel()
    return nn.LSTMCell(
        len(weight_x),
        hidden,
        w_init=weight[:, order],
        b_init=(bias - jnp.repeat(jnp.array([0.0, 1.0, 0.0, 0.0]), hidden))[order],
    )


def _hidden(model, shape):
    """The hidden states of a cell, made for inputs of a shape: the output first."""
    batch, *features = shape
    options = {"input_shape": tuple(features)} if hasattr(model, "skeleton") else {}
    model.init_state(batch, **options)
    return [getattr(model, name) for name in ("h", "c") if hasattr(model, name)]


def start(model, shape):
    return tuple(hidden.value for hidden in _hidden(model, shape))


def steps(model, xs, *state):
    hidden = _hidden(model, xs.shape[1:])
    for old, value in zip(hidden, state, strict=True):
        old.value = value
    return jnp.stack([model(x) for x in xs]), *(old.value for old in hidden[1:])


def max_pool(window, strides, padding):
    return getattr(nn, f"MaxPool{len(window)}d")(window, strides, padding)


def avg_pool(window, strides):
    return getattr(nn, f"AvgPool{len(window)}d")(window, strides)


def embedding(weight):
    return nn.Embedding(*weight.shape, embedding_init=weight)


def rms_norm(scale, epsilon):
    layer = nn.RMSNorm(scale.shape, epsilon=epsilon, scale_init=scale)
    layer.dtype = None
    return layer


def group_norm(scale, bias, groups, epsilon):
    return nn.GroupNorm(
        scale.shape,
        num_groups=groups,
        epsilon=epsilon,
        scale_init=scale,
        bias_init=bias,
        use_fast_variance=False,
    )


def batch_norm(scale, bias, mean, var, epsilon, momentum, use_fast_variance=False, shape=None):
    shape = shape or scale.shape
    ones = [1] * (len(shape) - 1)
    scale, bias, mean, var = (a.reshape(*ones, -1) for a in (scale, bias, mean, var))
    layer = getattr(nn, f"BatchNorm{len(ones)}d")(
        shape,
        epsilon=epsilon,
        momentum=momentum,
        use_fast_variance=use_fast_variance,
        scale_initializer=scale,
        bias_initializer=bias,
    )
    layer.running_mean.value, layer.running_var.value = mean, var
    return layer


def dropout(rate):
    return nn.Dropout(round(1 - rate, 12))  # the probability to keep


def prelu(slope):
    layer = nn.PReLU(slope.shape)
    layer.weight.value = slope
    return layer


def sequential(*layers):
    first, *rest = layers  # the first has to be a module
    return nn.Sequential(first if isinstance(first, nn.Module) else Lambda(first), *rest)


def activation(fn):
    return _CLASSES[fn]() if fn in _CLASSES else fn


_CLASSES = {jax.nn.relu: nn.ReLU, jax.numpy.tanh: nn.Tanh}


def flatten():
    return nn.Flatten(1)


def subclass(weight, bias):
    class Doubled(nn.Linear):
        def update(self, x):
            return 2 * super().update(x)

    return Doubled((weight.shape[0],), (weight.shape[1],), w_init=weight, b_init=bias)


def renamed(weight, bias):
    class Renamed(nn.Linear):
        pass

    return Renamed((weight.shape[0],), (weight.shape[1],), w_init=weight, b_init=bias)


def custom(weight, bias):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear(weight, bias)

        def update(self, x):
            return x.sum() + self.linear(x)

    return Residual()


def arguments(model):
    return model, {}


def receive(convert):
    return convert()


def run(model, x, train=False, key=None):
    if key is not None:
        brainstate.random.set_key(key)
    with brainstate.environ.context(fit=train):
        return model(x), model


def jit(model, x):
    return brainstate.transform.jit(lambda x: run(model, x)[0])(x)


def _leaves(model):
    if isinstance(model, nn.Sequential):
        return [leaf for layer in model.layers for leaf in _leaves(layer)]
    return [model]


def _state(layer):
    """The state that packs the layer's parameters, or None."""
    state = getattr(layer, "weight", getattr(layer, "scale", None))
    return state if isinstance(state, brainstate.State) else None


def _named(value):
    return value if isinstance(value, dict) else {"weight": value}


def _arrays(layer):
    state = _state(layer)
    arrays = dict(_named(state.value)) if state is not None else {}
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and "bias" in arrays:
        arrays["bias"] = arrays["bias"].reshape(-1)
    if hasattr(layer, "running_mean"):
        arrays |= {"mean": layer.running_mean.value, "var": layer.running_var.value}
    return arrays


def read(model):
    return [arrays for layer in _leaves(model) if (arrays := _arrays(layer))]


_OPTIONS = ("in_size", "out_size", "epsilon", "momentum", "use_fast_variance", "prob")
_OPTIONS += ("num_groups", "num_embeddings", "stride", "rhs_dilation", "groups", "padding")


def options(model):
    return [
        (type(layer), {name: getattr(layer, name, None) for name in _OPTIONS})
        if isinstance(layer, nn.Module)
        else layer
        for layer in _leaves(model)
    ]


def _gradients(model, x):
    states = model.states(brainstate.ParamState)
    grads = brainstate.transform.grad(lambda: (run(model, x)[0] ** 2).sum(), states)()
    return states, grads


def gradient(model, x):
    states, grads = _gradients(model, x)
    by_state = {id(state): grads[key] for key, state in states.items()}
    found = [_state(layer) for layer in _leaves(model)]
    grads = [dict(_named(by_state[id(state)])) for state in found if state is not None]
    return [{k: v.reshape(-1) if k == "bias" else v for k, v in g.items()} for g in grads]


def step(model, x):
    states, grads = _gradients(model, x)
    for key, state in states.items():
        state.value = jax.tree.map(lambda p, g: p - RATE * g, state.value, grads[key])
    return model


def count(model):
    states = model.states(brainstate.ParamState)
    return len(jax.tree.leaves([state.value for state in states.values()]))


def construct(cls, x, **options):
    layer = cls(**options)
    for state in layer.states(brainstate.ParamState).values():
        state.value = jax.tree.map(lambda a: a + array(*a.shape).astype(a.dtype), state.value)
    return layer


class FrozenState(brainstate.ParamState):
    def execute(self, x):
        return x


_FEW = ("equinox",)
_IMAGE = {0: (4,), 1: (5, 4), 2: (2, 5, 4), 3: (2, 2, 5, 4)}


def _batch_norm_options(dims):
    shape = _IMAGE[dims]
    return Constructor(
        (6, *shape),
        {"in_size": shape},
        {
            "in_size": SHAPE,
            # BrainState then keeps running statistics of a wrong shape in training.
            "feature_axis": Option(0, training=dims == 0),
            "track_running_stats": Option(
                {"track_running_stats": False, "affine": False}, refused=ALL
            ),
            "epsilon": Option(0.1),
            "momentum": Option(0.5),
            "affine": Option(False),
            "bias_initializer": INITIAL,
            "scale_initializer": INITIAL,
            "axis_name": Option("batch", refused=_FEW, attribute=True),
            "axis_index_groups": Option(
                {"axis_name": "batch", "axis_index_groups": [[0, 1]]},
                refused=_FEW,
                named="axis_name",
                attribute=True,
            ),
            "use_fast_variance": Option(False),
            "name": NAME,
            "dtype": Option(jax.numpy.bfloat16, refused=ALL, named="statistics_dtype"),
            "param_type": Option(FrozenState, refused=ALL),
            "mean_type": Option(brainstate.ShortTermState, refused=ALL),
        },
        images=True,
    )


def _plain(x=(6, 4), **options):
    return Constructor(x, {}, {"name": NAME} | options)


def _conv_options(dims, transposed=False, **more):
    shape = {1: (5, 4), 2: (6, 5, 4), 3: (6, 5, 3, 4)}[dims]
    kernel = (3, 2, 3)[:dims]
    mask = (jax.numpy.arange(4 * 6 * math.prod(kernel)) % 3.0).reshape(*kernel, 4, 6)
    first = {"channel_first": True, "in_size": shape[::-1], "b_init": jax.numpy.zeros}
    options = {
        "in_size": SHAPE,
        "out_channels": SHAPE,
        "kernel_size": SHAPE,
        "stride": Option(2),
        "padding": Option([(1, 0)] * dims),
        "rhs_dilation": Option(2, x=(2, *shape)),
        "groups": Option(2),
        "w_init": INITIAL,
        "b_init": Option(jax.numpy.arange(6.0).reshape(*[1] * dims, 6)),
        "w_mask": Option(mask.swapaxes(-1, -2) if transposed else mask),
        "channel_first": Option(first, x=(2, *shape[::-1]), everywhere=True),
        "name": NAME,
        "param_type": Option(FrozenState, refused=ALL),
    }
    if not transposed:
        options["lhs_dilation"] = Option({"lhs_dilation": 2, "padding": 1})
    return Constructor(
        (2, *shape),
        {"in_size": shape, "out_channels": 6, "kernel_size": kernel},
        options | more,
        images=True,
    )


_SCALED = {"ws_gain": Option(False), "eps": Option(200.0)}


def _norm():
    return {
        "epsilon": Option(0.1),
        "use_scale": Option(False),
        "scale_init": INITIAL,
        "axis_index_groups": Option(
            {"axis_name": "batch", "axis_index_groups": [[0, 1]]},
            refused=_FEW,
            named="axis_name",
            attribute=True,
        ),
        "axis_name": Option("batch", refused=_FEW),
        "use_fast_variance": Option(False),
        "dtype": Option(jax.numpy.bfloat16),
        "param_type": Option(FrozenState, refused=ALL),
    }


_LAYER_NORM = _norm() | {
    "in_size": Option((3, 4), x=(6, 3, 4)),
    "reduction_axes": Option({"in_size": (3, 4), "reduction_axes": (-2, -1)}, x=(6, 3, 4)),
    "feature_axes": Option({"in_size": (3, 5, 4), "feature_axes": (-1, -3)}, x=(6, 3, 5, 4)),
}


_TOGETHER = "with kernel_size; alone in the layer for two axes"


def _image(dims):
    return (2, 7, 6, 5, 4)[: dims + 1] + (4,)


def _pool_options(kind, dims):
    every = {"kernel_size": (3, 2, 3)[:dims], "stride": 3, "padding": [(1, 0)] * dims}
    first = {"channel_axis": 1, "stride": 2}
    options = {"name": NAME, "in_size": SHAPE, "channel_axis": Option(first, everywhere=True)}
    if dims == 2:
        options |= {name: Option(value) for name, value in every.items()}
        options["channel_axis"] = Option({"channel_axis": -3}, everywhere=True)
    else:
        options |= dict.fromkeys(every, _TOGETHER) | {"kernel_size": Option(every)}
    if kind == "Max":
        options["return_indices"] = "tests/test_spatial.py"
    base = {"kernel_size": 2}
    if kind == "LP":
        base["norm_type"], options["norm_type"] = 2.0, Option(3.0) if dims == 2 else _TOGETHER
    return Constructor(_image(dims), base, options, images=True)


def _adaptive_options(dims):
    options = {"name": NAME, "in_size": SHAPE}
    options["target_size"] = Option((3, None, 2)[:dims])
    options["channel_axis"] = (
        Option({"channel_axis": None, "target_size": 2}, everywhere=True)
        if dims == 2
        else _TOGETHER
    )
    return Constructor(_image(dims), {"target_size": 2}, options, images=True)


def _pad_options(kind, dims):
    pads = (1, 0, 2, 1, 0, 1)[: 2 * dims]
    options = {"padding": Option(pads), "in_size": SHAPE, "name": NAME}
    if kind == "Constant":
        options["value"] = Option(2.5) if dims == 2 else _TOGETHER
        options["padding"] = Option({"padding": pads, "value": -1.5})
    return Constructor(_image(dims), {"padding": 1}, options, images=True)


def _dropout_options(dims):
    x = (40, 2, 2, 2)[: dims + 1] + (30,)
    return Constructor(
        x,
        {"prob": 0.5},
        {
            "prob": Option(0.3),
            "channel_axis": Option(0, x=(200, 9, 2)) if dims == 1 else "as there",
            "name": NAME,
        },
    )


_CELL = {"num_in": 3, "num_out": 4}
_CELL_OPTIONS = {
    "num_in": SHAPE,
    "num_out": SHAPE,
    "w_init": INITIAL,
    "b_init": Option(None),
    "state_init": Option(nn.init.Constant(1.0)),
    "activation": Option("relu"),
    "name": NAME,
}

_SPARSE = array(4), jnp.array([0, 1, 0, 2]), jnp.array([3, 0, 1, 2])

CONSTRUCTORS = {
    nn.Sequential: "its layers are tested in stacks",
    nn.Linear: Constructor(
        (6, 3),
        {"in_size": (3,), "out_size": (4,)},
        {
            "in_size": Option({"in_size": (2, 3), "out_size": (2, 4)}, x=(6, 2, 3)),
            "out_size": SHAPE,
            "w_init": INITIAL,
            "b_init": Option(None),
            "w_mask": Option(jax.numpy.eye(3, 4)),
            "name": NAME,
            "param_type": Option(FrozenState, refused=ALL),
        },
    ),
    nn.ScaledWSLinear: Constructor(
        (6, 3),
        {"in_size": (3,), "out_size": (4,)},
        {
            "in_size": Option({"in_size": (2, 3), "out_size": (2, 4)}, x=(6, 2, 3)),
            "out_size": SHAPE,
            "w_init": INITIAL,
            "b_init": Option(None),
            "w_mask": Option(jnp.arange(3.0)[:, None]),
            "ws_gain": Option(False),
            "eps": Option(200.0),
            "name": NAME,
            "param_type": Option(FrozenState, refused=ALL),
        },
    ),
    nn.SignedWLinear: Constructor(
        (6, 3),
        {"in_size": (3,), "out_size": (4,)},
        {
            "in_size": Option(
                {"in_size": (2, 3), "out_size": (2, 4)}, x=(6, 2, 3), refused=ALL
            ),
            "out_size": SHAPE,
            "w_init": INITIAL,
            "w_sign": Option(1 - jnp.arange(12).reshape(3, 4) % 3),
            "name": NAME,
            "param_type": Option(FrozenState, refused=ALL),
        },
    ),
    nn.LoRA: Constructor(
        (6, 3),
        {"in_features": 3, "lora_rank": 2, "out_features": 4},
        {
            "in_features": SHAPE,
            "lora_rank": SHAPE,
            "out_features": SHAPE,
            "base_module": Option(nn.Linear(3, 4)),
            "kernel_init": INITIAL,
            "param_type": Option(FrozenState, refused=ALL),
            "in_size": Option((2, 3), x=(6, 2, 3)),
        },
    ),
    nn.AllToAll: Constructor(
        (6, 3),
        {"in_size": (3,), "out_size": (4,)},
        {
            "in_size": Option({"in_size": (2, 3), "out_size": (2, 4)}, x=(6, 2, 3)),
            "out_size": SHAPE,
            "w_init": Option(jnp.float32(0.7)),
            "b_init": Option(jnp.arange(4.0)),
            "include_self": Option(False),
            "name": NAME,
            "param_type": Option(FrozenState, refused=ALL),
        },
    ),
    nn.SparseLinear: Constructor(
        (6, 3),
        {"spar_mat": brainunit.sparse.COO(_SPARSE, shape=(3, 4))},
        {
            "spar_mat": Option(
                brainunit.sparse.CSC((array(4), _SPARSE[1], jnp.arange(5)), shape=(3, 4))
            ),
            "b_init": Option(jnp.arange(4.0)),
            "in_size": SHAPE,
            "name": NAME,
            "param_type": Option(FrozenState, refused=ALL),
        },
    ),
    nn.EventLinear: Constructor(
        (6, 3),
        {"in_size": 3, "out_size": 4, "weight": array(3, 4), "float_as_event": False},
        {
            "in_size": Option({"in_size": (2, 3), "out_size": (2, 4)}, x=(6, 2, 3)),
            "out_size": SHAPE,
            "weight": Option(jnp.float32(1.5), refused=ALL),
            "float_as_event": Option(True, refused=ALL),
            "block_size": "without effect on the result",
            "name": NAME,
            "param_type": Option(FrozenState, refused=ALL),
        },
    ),
    nn.FixedNumConn: Constructor(
        (6, 3),
        {"in_size": 3, "out_size": 4, "conn_num": 2, "conn_weight": array(3, 2), "seed": 1},
        {
            "in_size": SHAPE,
            "out_size": SHAPE,
            "conn_num": Option({"conn_num": 0, "conn_weight": 1.0}, refused=ALL),
            "conn_weight": Option(1.5),
            "efferent_target": "the other one is an error in BrainState",
            "afferent_ratio": "tests/test_linear.py",
            "allow_multi_conn": Option(False),
            "seed": INITIAL,
            "name": NAME,
            "conn_init": INITIAL,
            "param_type": Option(FrozenState, refused=ALL),
        },
    ),
    nn.OneToOne: Constructor(
        (6, 3),
        {"in_size": (3,)},
        {
            "in_size": Option((2, 3), x=(6, 2, 3)),
            "w_init": INITIAL,
            "b_init": Option(jnp.arange(3.0)),
            "name": NAME,
            "param_type": Option(FrozenState, refused=ALL),
        },
    ),
    nn.Conv1d: _conv_options(1),
    nn.Conv2d: _conv_options(2),
    nn.Conv3d: _conv_options(3),
    nn.ConvTranspose1d: _conv_options(1, transposed=True),
    nn.ConvTranspose2d: _conv_options(2, transposed=True),
    nn.ConvTranspose3d: _conv_options(3, transposed=True),
    nn.ScaledWSConv1d: _conv_options(1, **_SCALED),
    nn.ScaledWSConv2d: _conv_options(2, **_SCALED),
    nn.ScaledWSConv3d: _conv_options(3, **_SCALED),
    nn.LSTMCell: Constructor((6, 3), _CELL, _CELL_OPTIONS),
    nn.ValinaRNNCell: Constructor(
        (6, 3), _CELL, _CELL_OPTIONS | {"activation": Option("tanh")}
    ),
    nn.GRUCell: Constructor((6, 3), _CELL, _CELL_OPTIONS),
    nn.MGUCell: Constructor((6, 3), _CELL, _CELL_OPTIONS),
    nn.URLSTMCell: Constructor(
        (6, 3),
        _CELL,
        {name: mark for name, mark in _CELL_OPTIONS.items() if name != "b_init"},
    ),
    **{
        getattr(nn, f"{kind}Pool{dims}d"): _pool_options(kind, dims)
        for kind in ("Max", "Avg", "LP")
        for dims in (1, 2, 3)
    },
    **{
        getattr(nn, f"Adaptive{kind}Pool{dims}d"): _adaptive_options(dims)
        for kind in ("Max", "Avg")
        for dims in (1, 2, 3)
    },
    **{
        getattr(nn, f"{kind}Pad{dims}d"): _pad_options(kind, dims)
        for kind in ("Zero", "Constant", "Reflection", "Replication", "Circular")
        for dims in (1, 2, 3)
    },
    **dict.fromkeys(
        [nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d],
        "it has two inputs: tests/test_spatial.py",
    ),
    nn.Embedding: Constructor(
        jnp.arange(6) % 5,
        {"num_embeddings": 5, "embedding_size": 3},
        {
            "num_embeddings": SHAPE,
            "embedding_size": Option((2, 3)),
            "embedding_init": INITIAL,
            "padding_idx": Option(1),
            "max_norm": Option(0.5),
            "norm_type": Option({"max_norm": 0.5, "norm_type": 1.0}),
            "scale_grad_by_freq": Option(True),
            "freeze": Option(True),
            "name": NAME,
            "param_type": Option(FrozenState, refused=ALL),
        },
    ),
    nn.LayerNorm: Constructor(
        (6, 4),
        {"in_size": (4,)},
        _LAYER_NORM | {"use_bias": Option(False), "bias_init": INITIAL},
    ),
    nn.RMSNorm: Constructor((6, 4), {"in_size": (4,)}, _LAYER_NORM),
    nn.GroupNorm: Constructor(
        (6, 4),
        {"in_size": (4,), "num_groups": 2},
        _norm()
        | {
            "in_size": SHAPE,
            "feature_axis": "the last axis is the only one",
            "group_size": Option({"num_groups": None, "group_size": 1}),
            "use_scale": Option(False),
            "use_bias": Option(False),
            "bias_init": INITIAL,
            "reduction_axes": Option((-1,), x=(6, 5, 4)),
        },
        images=True,
    ),
    nn.BatchNorm0d: _batch_norm_options(0),
    nn.BatchNorm1d: _batch_norm_options(1),
    nn.BatchNorm2d: _batch_norm_options(2),
    nn.BatchNorm3d: _batch_norm_options(3),
    nn.Dropout: Constructor(
        (1000, 4),
        {},
        {"prob": Option(0.3), "broadcast_dims": Option((1,)), "name": NAME},
    ),
    nn.Dropout1d: _dropout_options(1),
    nn.Dropout2d: _dropout_options(2),
    nn.Dropout3d: _dropout_options(3),
    nn.AlphaDropout: Constructor((1000, 4), {}, {"prob": Option(0.3), "name": NAME}),
    nn.FeatureAlphaDropout: Constructor(
        (400, 3, 10),
        {},
        {"prob": Option(0.3), "channel_axis": Option(1), "name": NAME},
    ),
    nn.DropoutFixed: "it keeps its mask: tests/test_dropout.py",
    nn.PReLU: Constructor(
        (6, 4),
        {},
        {"num_parameters": Option(4), "init": INITIAL, "dtype": Option(jax.numpy.bfloat16)},
    ),
    nn.SpikeBitwise: "it has two inputs: tests/test_activations.py",
    nn.Unflatten: Constructor(
        (6, 12),
        {"axis": 1, "sizes": (3, 4)},
        {"axis": Option(-1), "sizes": Option((2, -1)), "name": NAME, "in_size": SHAPE},
    ),
    nn.Flatten: Constructor(
        (6, 2, 3, 4),
        {"start_axis": 1},
        {
            "start_axis": Option(2),
            "end_axis": Option(-2),
            "in_size": Option({"in_size": (2, 3, 4), "start_axis": 0}),
        },
    ),
    Lambda: Constructor((6, 4), {"fn": jax.numpy.sin}, {"fn": Option(jax.numpy.cos)}),
    nn.CELU: _plain(alpha=Option(0.5)),
    nn.ELU: _plain(alpha=Option(0.5)),
    nn.GELU: _plain(approximate=Option(True)),
    nn.GLU: _plain((6, 2, 4), dim=Option(1)),
    nn.Hardshrink: _plain(lambd=Option(0.2)),
    nn.Hardtanh: _plain(min_val=Option(-0.2), max_val=Option(0.2)),
    nn.LeakyReLU: _plain(negative_slope=Option(0.5)),
    nn.LogSoftmax: _plain((6, 2, 4), dim=Option(1)),
    nn.Softmax: _plain((6, 2, 4), dim=Option(1)),
    nn.Softmin: _plain((6, 2, 4), dim=Option(1)),
    nn.Softmax2d: _plain((6, 2, 3, 4)),
    nn.Softshrink: _plain(lambd=Option(0.2)),
    nn.Threshold: Constructor(
        (6, 4),
        {"threshold": 0.1, "value": 0.0},
        {"threshold": Option(0.5), "value": Option(2.0)},
    ),
    **dict.fromkeys(
        [
            nn.Hardsigmoid,
            nn.Hardswish,
            nn.Identity,
            nn.LogSigmoid,
            nn.Mish,
            nn.ReLU,
            nn.ReLU6,
            nn.SELU,
            nn.Sigmoid,
            nn.SiLU,
            nn.Softplus,
            nn.Softsign,
            nn.Tanh,
            nn.Tanhshrink,
        ],
        Constructor((6, 4), {}, {"name": NAME}),
    ),
}


# -- live --


class Block(nn.Module):
    """What :func:`tests.live.truth` computes."""

    label = "a block"

    def __init__(self, rate, axis_name):
        super().__init__()
        p, s = live.PARAMS, live.STATS
        self.inp = linear(p["w1"], p["b1"])
        stats = s["mean"], s["var"], live.EPSILON, live.MOMENTUM
        self.norm = batch_norm(p["scale"], p["shift"], *stats)
        self.norm.axis_name = axis_name
        self.drop = dropout(rate)
        self.out = linear(p["w2"], p["b2"])

    def update(self, x):
        h = self.inp(x)
        y = self.drop(jnp.tanh(self.norm(h)))
        live.passed()
        return self.out(y) + h.sum(-1, keepdims=True)

    def encode(self, x, *, gain=1.0):
        return {"code": gain * self.inp(x)}


def block(rate=0.0, axis_name=None):
    return Block(rate, axis_name)


def block_output(model, x):
    with brainstate.environ.context(fit=False):
        return model(x)


def block_arrays(model):
    inp, out, norm = model.inp.weight.value, model.out.weight.value, model.norm.weight.value
    arrays = inp["weight"], inp["bias"], norm["scale"], norm["bias"], out["weight"], out["bias"]
    arrays += model.norm.running_mean.value, model.norm.running_var.value
    return dict(zip(_BLOCK, arrays, strict=True))


_BLOCK = ("w1", "b1", "scale", "shift", "w2", "b2", "mean", "var")


class Host:
    """A shim whose host is this framework."""

    def __init__(self, module, keyed=True, **keywords):
        self.again = functools.partial(Host, module, keyed, **keywords)
        brainstate.random.seed(0)
        self.shim = shims.wrap(module, into="brainstate", **keywords)
        self._params = self.shim.states(brainstate.ParamState)
        self._compiled = brainstate.transform.jit(self._step)
        self._jit = {
            train: brainstate.transform.jit(lambda x, train=train: self.call(x, train))
            for train in (True, False)
        }

    def call(self, x, train=False):
        with brainstate.environ.context(fit=train):
            return self.shim(x)

    def jit(self, x, train=False):
        return self._jit[train](x)

    def method(self, name, x, **options):
        call = brainstate.transform.jit(lambda x: getattr(self.shim, name)(x, **options))
        with brainstate.environ.context(fit=False):
            return call(x)

    def parameters(self):
        return [state.value for state in self._params.values()]

    def double(self):
        """Change the weights."""
        for state in self._params.values():
            state.value = jax.tree.map(lambda p: 2 * p, state.value)

    def gradients(self, x, train, remat=False):
        """Loss, output and gradients."""

        def call(x):
            return self.call(x, train)

        if remat:
            call = brainstate.transform.checkpoint(call)
        grads, loss, out = self._graded(x, call)
        return loss, out, list(grads.values())

    def _graded(self, x, call):
        def loss():
            out = call(x)
            return (out**2).mean(), out

        return brainstate.transform.grad(loss, self._params, has_aux=True, return_value=True)()

    def _step(self, x):
        grads, loss, out = self._graded(x, lambda x: self.call(x, True))
        for path, state in self._params.items():
            state.value = state.value - live.STEP * grads[path]
        return loss, out

    def step(self, x, compiled=True):
        return (self._compiled if compiled else self._step)(x)

    def split(self, train):
        """What is static of the shim, and its state and a key, for ``run``."""
        definition, states = brainstate.graph.treefy_split(self.shim)
        return (definition, train), (states, jax.random.key(5))

    @staticmethod
    def run(static, state, x):
        """The output, and the state afterwards."""
        (definition, train), (before, key) = static, state
        shim = brainstate.graph.treefy_merge(definition, before)
        key, now = jax.random.split(key)
        out = _with_key(now, shim, x, train)
        after = jax.tree.leaves(brainstate.graph.treefy_split(shim)[1])
        # BrainState notes beside the values which of them were written.
        return out, (jax.tree.unflatten(jax.tree.structure(before), after), key)

    def join(self, state):
        """Give the shim a state."""
        states = self.shim.states()
        for path, ref in state[0].to_flat().items():
            states[path].value = ref.value

    def vmap(self, xs):
        return brainstate.transform.vmap(lambda x: self.call(x))(xs)

    def scan(self, xs, train):
        return brainstate.transform.for_loop(lambda x: self.call(x, train), xs)

    def shape(self, x, train):
        return brainstate.transform.eval_shape(lambda x: self.call(x, train), x).shape

    def unwrap(self):
        return self.shim.unwrap()

    def materialize(self):
        return self.shim.materialize()


def _with_key(key, module, x, train):
    """A call in a transformation of JAX, which draws from a key of ours: the random state is
    taken in and out as any other."""

    def call(x):
        with brainstate.environ.context(fit=train):
            return module(x)

    pure = brainstate.transform.StatefulFunction(call).make_jaxpr(x)
    states = pure.get_states(x)
    is_random = [state is brainstate.random.DEFAULT for state in states]
    values = [key if r else s.value for s, r in zip(states, is_random, strict=True)]
    after, out = pure.jaxpr_call(values, x)
    for state, value, r in zip(states, after, is_random, strict=True):
        if value is not None and not r:  # None: it was only read
            state.restore_value(value)
    return out
