"""Equinox models: ``(model, state)``. Modules see one example; ``run`` maps over the batch."""

import functools
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

import shims
from interop.composites.equinox import Tied

from .. import live
from ..cases import array
from . import ALL, INITIAL, MODE, SHAPE, Constructor, Option

LACKS = {
    "ties": "an Equinox tree has no identity: the same layer twice is two layers",
    "fast variance": "Equinox computes centred variances only",
}
CHANNELS_FIRST = True
OWN_LAYOUT = {"weight", "mean", "var"}
OWN_STREAMS = None
ALWAYS_KEYED = None
RATE = 0.1
NAMESPACE, MODULE = eqx.nn, eqx.Module
NO_LAYERS = (eqx.nn.StateIndex,)
BASES = {eqx.nn.StatefulLayer}


def _set(module, **arrays):
    for name, value in arrays.items():
        module = eqx.tree_at(
            lambda m, name=name: getattr(m, name), module, value, is_leaf=lambda x: x is None
        )
    return module


def linear(weight, bias=None, **options):
    layer = eqx.nn.Linear(
        *weight.shape, use_bias=bias is not None, key=jax.random.key(0), **options
    )
    return _set(layer, weight=jnp.asarray(weight.T), bias=bias)


def layer_norm(scale, bias, epsilon, use_fast_variance=False):
    return _set(eqx.nn.LayerNorm(scale.shape, eps=epsilon), weight=scale, bias=bias)


def conv(weight, bias, shape, strides=1, padding="SAME", dilation=1, groups=1):
    *kernel, _, out = weight.shape
    layer = getattr(eqx.nn, f"Conv{len(kernel)}d")(
        shape[-1],
        out,
        tuple(kernel),
        strides,
        padding,
        dilation,
        groups,
        use_bias=bias is not None,
        key=jax.random.key(0),
    )
    column = None if bias is None else bias.reshape(-1, *[1] * len(kernel))
    return _set(layer, weight=jnp.moveaxis(weight, (-1, -2), (0, 1)), bias=column)


def lstm(weight_x, weight_h, bias):
    cell = eqx.nn.LSTMCell(*weight_x.shape[:1], len(weight_h), key=jax.random.key(0))
    return _set(cell, weight_ih=weight_x.T, weight_hh=weight_h.T, bias=bias)


def start(model, shape):
    """Zeros for Equinox's own cells, which leave the initial state to the caller."""
    module = model[0] if isinstance(model, tuple) else model
    batch, *features = shape
    if hasattr(module, "skeleton"):
        carry = module.initialize_carry((features[-1], *features[:-1]))
    else:
        h = jnp.zeros(module.hidden_size, module.weight_hh.dtype)
        carry = (h, h) if isinstance(module, eqx.nn.LSTMCell) else h
    state = carry if isinstance(carry, tuple) else (carry,)
    return tuple(jnp.stack([jnp.moveaxis(array, 0, -1)] * batch) for array in state)


def steps(model, xs, *state):
    """``xs`` and the states have their channels last."""
    module, outs = model[0] if isinstance(model, tuple) else model, []
    carry = tuple(jnp.moveaxis(array, -1, 1) for array in state)
    for x in jnp.moveaxis(xs, -1, 2):
        carry = jax.vmap(module)(x, carry if len(state) > 1 else carry[0])
        carry = carry if isinstance(carry, tuple) else (carry,)
        outs.append(jnp.moveaxis(carry[0], 1, -1))
    return jnp.stack(outs), *(jnp.moveaxis(array, 1, -1) for array in carry[1:])


def max_pool(window, strides, padding):
    return getattr(eqx.nn, f"MaxPool{len(window)}d")(window, strides, padding)


def avg_pool(window, strides):
    return getattr(eqx.nn, f"AvgPool{len(window)}d")(window, strides)


def embedding(weight):
    return eqx.nn.Embedding(weight=weight)


def rms_norm(scale, epsilon):
    layer = eqx.nn.RMSNorm(scale.shape, eps=epsilon, use_bias=False)
    return _set(layer, weight=scale)


def group_norm(scale, bias, groups, epsilon):
    return _set(eqx.nn.GroupNorm(groups, *scale.shape, eps=epsilon), weight=scale, bias=bias)


def batch_norm(scale, bias, mean, var, epsilon, momentum, use_fast_variance=False, shape=None):
    """Statistics are stored with a bias that ``1 - momentum**counter`` takes out."""
    layer = eqx.nn.BatchNorm(
        scale.shape[0], "batch", eps=epsilon, momentum=momentum, mode="batch", dtype=mean.dtype
    )
    layer, state = _set(layer, weight=scale, bias=bias), eqx.nn.State(layer)
    debias = 1 - momentum**7
    state = state.set(layer.batch_counter, jnp.array(7))
    state = state.set(layer.batch_state_index, (mean * debias, var * debias))
    return layer, state


def dropout(rate):
    return eqx.nn.Dropout(rate)


def prelu(slope):
    return eqx.nn.Lambda(eqx.nn.PReLU(slope))  # it takes no key


def sequential(*layers):
    """``layers`` may be pairs of layer and state; at most one of them holds a state."""
    state = next((part[1] for part in layers if isinstance(part, tuple) and part[1]), None)
    layers = [part[0] if isinstance(part, tuple) else part for part in layers]
    model = eqx.nn.Sequential(layers)
    return (model, state) if state is not None else model


def activation(fn):
    return eqx.nn.Lambda(fn)


def flatten():
    return eqx.nn.Lambda(jnp.ravel)


def subclass(weight, bias):
    class Doubled(eqx.nn.Linear):
        def __call__(self, x, *, key=None):
            return 2 * super().__call__(x)

    return Doubled(*weight.shape, key=jax.random.key(0))


def renamed(weight, bias):
    class Renamed(eqx.nn.Linear):
        pass

    return Renamed(*weight.shape, key=jax.random.key(0))


def custom(weight, bias):
    class Residual(eqx.Module):
        linear: eqx.nn.Linear

        def __call__(self, x, *, key=None):
            return x.sum() + self.linear(x)

    return Residual(linear(weight, bias))


def arguments(model):
    module, state = model if isinstance(model, tuple) else (model, None)
    return module, {} if state is None else {"state": state}


def receive(convert):
    return eqx.nn.make_with_state(convert)()


def _call(module, state, x, key):
    keys = None if key is None else jax.random.split(key, len(x))

    def one(x, state, key):
        takes_state = isinstance(module, eqx.nn.StatefulLayer) and module.is_stateful()
        if state is not None and (takes_state or isinstance(module, eqx.nn.Sequential)):
            return module(x, state, key=key)
        if isinstance(module, eqx.nn.PReLU):
            return module(x), state
        if isinstance(module, eqx.nn.MultiheadAttention):
            return module(x, x, x, key=key), state
        return module(x, key=key), state

    over_keys = None if key is None else 0
    return jax.vmap(one, axis_name="batch", in_axes=(0, None, over_keys), out_axes=(0, None))(
        x, state, keys
    )


def run(model, x, train=False, key=None):
    module, state = model if isinstance(model, tuple) else (model, None)
    y, state = _call(eqx.nn.inference_mode(module, not train), state, x, key)
    return y, (module, state)


@eqx.filter_jit
def jit(model, x):
    return run(model, x)[0]


def _leaves(module):
    if isinstance(module, Tied):
        return _leaves(module.shared())
    if isinstance(module, eqx.nn.Sequential):
        return [leaf for layer in module.layers for leaf in _leaves(layer)]
    return [module]


def _arrays(layer, state):
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    arrays = {"scale": weight}
    if isinstance(layer, eqx.nn.Linear):
        arrays = {"weight": weight.T}
    if isinstance(layer, eqx.nn.Embedding):
        arrays = {"weight": weight}
    if isinstance(layer, eqx.nn.Conv):
        arrays = {"weight": jnp.moveaxis(weight, (0, 1), (-1, -2))}
        bias = None if bias is None else bias.reshape(-1)
    if isinstance(layer, eqx.nn.BatchNorm) and state is not None:
        statistics = state.get(layer.batch_state_index)
        counter = state.get(layer.batch_counter)
        debias = 1 - float(layer.momentum) ** float(counter)
        arrays |= {"mean": statistics[0] / debias, "var": statistics[1] / debias}
    return {k: v for k, v in (arrays | {"bias": bias}).items() if v is not None}


def read(model):
    module, state = model if isinstance(model, tuple) else (model, None)
    return [arrays for layer in _leaves(module) if (arrays := _arrays(layer, state))]


_OPTIONS = ("in_features", "out_features", "use_bias", "shape", "p", "input_size", "eps")
_OPTIONS += ("momentum", "mode", "axis_name", "channelwise_affine", "fn")
_OPTIONS += ("num_embeddings", "embedding_size", "groups", "channels", "stride", "dilation")


def options(model):
    module = model[0] if isinstance(model, tuple) else model
    return [
        (type(layer), {name: getattr(layer, name, None) for name in _OPTIONS})
        for layer in _leaves(module)
    ]


def _gradients(model, x):
    module, state = model if isinstance(model, tuple) else (model, None)
    return eqx.filter_grad(lambda m: (run((m, state), x)[0] ** 2).sum())(module)


def gradient(model, x):
    return read((_gradients(model, x), None))


def step(model, x):
    module, state = model if isinstance(model, tuple) else (model, None)
    updates = jax.tree.map(lambda g: -RATE * g, _gradients(model, x))
    return eqx.apply_updates(module, updates), state


def count(model):
    module = model[0] if isinstance(model, tuple) else model
    return len(jax.tree.leaves(eqx.filter(module, eqx.is_inexact_array)))


def construct(cls, x, **options):
    layer, state = eqx.nn.make_with_state(cls)(**options)
    layer = jax.tree.map(
        lambda a: a + array(*a.shape).astype(a.dtype) if eqx.is_inexact_array(a) else a, layer
    )
    if cls is eqx.nn.BatchNorm and layer.mode == "batch":  # its debiasing has come to an end
        state = state.set(layer.batch_counter, jnp.array(10**6))
    return layer, state


_KEY = jax.random.key(0)


def _conv_options(dims, **base):
    shape, kernel = (4, 6, 5, 3)[: dims + 1], (3, 2, 3)[:dims]
    return Constructor(
        (2, *shape),
        {"in_channels": 4, "out_channels": 6, "kernel_size": kernel, "key": _KEY} | base,
        {
            "in_channels": SHAPE,
            "out_channels": SHAPE,
            "kernel_size": SHAPE,
            "stride": Option(2),
            "padding": Option("SAME_LOWER"),
            "dilation": Option(2),
            "groups": Option(2),
            "use_bias": Option(False),
            "padding_mode": Option({"padding_mode": "CIRCULAR", "padding": 1}),
            "dtype": INITIAL,
            "key": INITIAL,
        },
        images=True,
    )


def _transposed_options(dims, **base):
    shape, kernel = (4, 5, 4, 3)[: dims + 1], (3, 2, 3)[:dims]
    stride = {"stride": 3}
    return Constructor(
        (2, *shape),
        {"in_channels": 4, "out_channels": 6, "kernel_size": kernel, "key": _KEY} | base,
        {
            "in_channels": SHAPE,
            "out_channels": SHAPE,
            "kernel_size": SHAPE,
            "stride": Option(stride),
            "padding": Option(stride | {"padding": "SAME_LOWER"}),
            "output_padding": Option(stride | {"output_padding": 2, "padding": 1}),
            "dilation": Option(2),
            "groups": Option(2),
            "use_bias": Option(False),
            "padding_mode": Option(
                {"padding_mode": "CIRCULAR", "padding": "SAME", "stride": 2, "dilation": 2}
            ),
            "dtype": INITIAL,
            "key": INITIAL,
        },
        images=True,
    )


_TOGETHER = "with kernel_size; alone in the layer for two axes"


def _pool_options(kind, dims):
    every = {
        "kernel_size": (3, 2, 3)[:dims],
        "stride": 3,
        "padding": ((1, 0),) * dims,
    }
    options = {name: Option(value) for name, value in every.items()}
    options["use_ceil"] = Option({"use_ceil": True, "stride": 2, "kernel_size": 3})
    if dims != 2:
        options |= dict.fromkeys(every, _TOGETHER) | {"kernel_size": Option(every)}
    base = {"kernel_size": 2}
    if kind == "":
        base |= {"init": 0.0, "operation": jax.lax.add, "num_spatial_dims": 2}
        options |= {
            "init": Option({"init": 0.5, "operation": jax.lax.max}),
            "operation": Option({"init": 1.0, "operation": jax.lax.mul}),
            "num_spatial_dims": Option(1, x=(2, 4, 7)),
        }
    return Constructor((2, 4, 7, 6, 5)[: dims + 2], base, options, images=True)


def _adaptive_options(dims, **base):
    options = {"target_shape": Option((3, 4, 2)[:dims])}
    if base:
        options |= {
            "num_spatial_dims": Option(
                {"num_spatial_dims": 4, "target_shape": 2}, x=(2, 2, 3, 4, 3, 2)
            ),
            "operation": Option(jnp.median),
        }
    x = (2, 4, 7, 6, 5)[: dims + 2]
    return Constructor(x, {"target_shape": 2} | base, options, images=True)


_CELL = Constructor(
    (6, 3),
    {"input_size": 3, "hidden_size": 4, "key": _KEY},
    {
        "input_size": SHAPE,
        "hidden_size": SHAPE,
        "use_bias": Option(False),
        "dtype": Option(jnp.bfloat16),
        "key": INITIAL,
    },
)

_WITHIN = "tests/test_normalized_weights.py"

CONSTRUCTORS = {
    eqx.nn.Sequential: "its layers are tested in stacks",
    eqx.nn.Shared: "tests/test_ties.py",
    Tied: "tests/test_ties.py",
    eqx.nn.Linear: Constructor(
        (6, 3),
        {"in_features": 3, "out_features": 4, "key": _KEY},
        {
            "in_features": Option("scalar", x=(6,)),
            "out_features": Option("scalar"),
            "use_bias": Option(False),
            "dtype": Option(jnp.bfloat16),
            "key": "only the initial value depends on it",
        },
    ),
    eqx.nn.MLP: Constructor(
        (6, 3),
        {"in_size": 3, "out_size": 2, "width_size": 4, "depth": 3, "key": _KEY},
        {
            "in_size": Option("scalar", x=(6,)),
            "out_size": Option("scalar"),
            "width_size": SHAPE,
            "depth": Option({"depth": 0, "final_activation": jnp.sin}),
            "activation": Option(jnp.tanh),
            "final_activation": Option(jnp.sin),
            "use_bias": Option(False),
            "use_final_bias": Option(False),
            "dtype": Option(jnp.bfloat16),
            "scan": Option(True),
            "key": INITIAL,
        },
    ),
    eqx.nn.SpectralNorm: Constructor(
        (6, 3),
        {"layer": eqx.nn.Linear(3, 4, key=_KEY), "weight_name": "weight", "key": _KEY},
        {
            "layer": _WITHIN,
            "weight_name": "a wrong one fails at once: tests/test_normalized_weights.py",
            "num_power_iterations": Option(3),
            "eps": Option(2.0),
            "inference": MODE,
            "key": INITIAL,
        },
    ),
    eqx.nn.WeightNorm: Constructor(
        (6, 3),
        {"layer": eqx.nn.Linear(3, 4, key=_KEY)},
        {
            "layer": _WITHIN,
            "weight_name": Option("bias", refused=ALL),
            "axis": Option(1),
        },
    ),
    eqx.nn.MultiheadAttention: Constructor(
        (2, 5, 6),
        {"num_heads": 2, "query_size": 6, "key": _KEY},
        {
            "num_heads": Option(3),
            "query_size": SHAPE,
            "key_size": SHAPE,
            "value_size": SHAPE,
            "output_size": Option(5),
            "qk_size": Option(4),
            "vo_size": Option(4),
            "use_query_bias": Option(True),
            "use_key_bias": Option(True),
            "use_value_bias": Option(True),
            "use_output_bias": Option(True),
            "dropout_p": "tests/test_attention.py",
            "inference": MODE,
            "dtype": Option(jnp.bfloat16),
            "key": INITIAL,
        },
    ),
    eqx.nn.RotaryPositionalEmbedding: Constructor(
        (2, 5, 8),
        {"embedding_size": 8},
        {
            "embedding_size": SHAPE,
            "theta": "Equinox ignores it after a first layer: tests/test_attention.py",
            "dtype": Option(jnp.bfloat16),
        },
    ),
    eqx.nn.LayerNorm: Constructor(
        (6, 4),
        {"shape": (4,)},
        {
            "shape": Option((3, 4), x=(6, 3, 4)),
            "eps": Option(0.1),
            "use_weight": Option(False, refused=()),
            "use_bias": Option(False),
            "dtype": Option(jnp.bfloat16),
            "elementwise_affine": "the old name of use_weight and use_bias",
        },
    ),
    eqx.nn.Conv: _conv_options(2, num_spatial_dims=2),
    eqx.nn.Conv1d: _conv_options(1),
    eqx.nn.Conv2d: _conv_options(2),
    eqx.nn.Conv3d: _conv_options(3),
    eqx.nn.LSTMCell: _CELL,
    eqx.nn.GRUCell: _CELL,
    eqx.nn.ConvTranspose: _transposed_options(2, num_spatial_dims=2),
    eqx.nn.ConvTranspose1d: _transposed_options(1),
    eqx.nn.ConvTranspose2d: _transposed_options(2),
    eqx.nn.ConvTranspose3d: _transposed_options(3),
    **{
        getattr(eqx.nn, f"{kind}Pool{dims}d"): _pool_options(kind, dims)
        for kind in ("Max", "Avg")
        for dims in (1, 2, 3)
    },
    eqx.nn.Pool: _pool_options("", 2),
    **{
        getattr(eqx.nn, f"Adaptive{kind}Pool{dims}d"): _adaptive_options(dims)
        for kind in ("Max", "Avg")
        for dims in (1, 2, 3)
    },
    eqx.nn.AdaptivePool: _adaptive_options(2, num_spatial_dims=2, operation=jnp.sum),
    eqx.nn.PReLU: Constructor((6, 4), {}, {"init_alpha": Option(jnp.arange(4.0))}),
    eqx.nn.Embedding: Constructor(
        jnp.arange(6) % 5,
        {"num_embeddings": 5, "embedding_size": 3, "key": _KEY},
        {
            "num_embeddings": SHAPE,
            "embedding_size": SHAPE,
            "weight": "only the initial value",
            "dtype": Option(jnp.bfloat16),
            "key": "only the initial value depends on it",
        },
    ),
    eqx.nn.RMSNorm: Constructor(
        (6, 4),
        {"shape": (4,), "use_bias": False},
        {
            "shape": Option((3, 4), x=(6, 3, 4)),
            "eps": Option(0.1),
            "use_weight": Option(False),
            "use_bias": Option(True),
            "dtype": Option(jnp.bfloat16),
        },
    ),
    eqx.nn.GroupNorm: Constructor(
        (6, 4),
        {"groups": 2, "channels": 4},
        {
            "groups": Option(1),
            "channels": Option({"channels": None, "channelwise_affine": False}),
            "eps": Option(0.1),
            "channelwise_affine": Option(False),
            "dtype": Option(jnp.bfloat16),
        },
    ),
    eqx.nn.BatchNorm: Constructor(
        (6, 4),
        {"input_size": 4, "axis_name": "batch", "mode": "batch"},
        {
            "input_size": SHAPE,
            "axis_name": Option(("batch", "other"), refused=ALL),
            "eps": Option(0.1),
            "channelwise_affine": Option(False),
            "momentum": Option(0.5),
            "inference": MODE,
            "dtype": Option(jnp.bfloat16, refused=ALL, named="statistics_dtype"),
            "mode": Option("ema"),
        },
    ),
    eqx.nn.Dropout: Constructor(
        (1000, 4),
        {},
        {
            "p": Option(0.3),
            "inference": MODE,
            "deterministic": "the old name of inference",
        },
    ),
    eqx.nn.Identity: Constructor((6, 4), {}, {"args": "ignored", "kwargs": "ignored"}),
    eqx.nn.Lambda: Constructor((6, 4), {"fn": jnp.sin}, {"fn": Option(jnp.cos)}),
}


# -- live --


class Block(eqx.Module):
    """What :func:`tests.live.truth` computes, of one example."""

    label: ClassVar = "a block"
    inp: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    out: eqx.nn.Linear

    def __call__(self, x, state, key=None):
        h = self.inp(x)
        y, state = self.norm(h, state)
        y = self.drop(jnp.tanh(y), key=key)
        live.passed()
        return self.out(y) + h.sum(keepdims=True), state

    def encode(self, x, state, *, gain=1.0):
        return {"code": gain * self.inp(x)}, state


def block(rate=0.0):
    p, s = live.PARAMS, live.STATS
    stats = s["mean"], s["var"], live.EPSILON, live.MOMENTUM
    norm, state = batch_norm(p["scale"], p["shift"], *stats)
    state = state.set(norm.batch_counter, jnp.asarray(10**6))  # the start-up bias has died away
    state = state.set(norm.batch_state_index, stats[:2])
    layers = linear(p["w1"], p["b1"]), norm, eqx.nn.Dropout(rate), linear(p["w2"], p["b2"])
    return Block(*layers), state


def block_output(model, x):
    module, state = model
    module = eqx.nn.inference_mode(module)
    return jax.vmap(lambda x: module(x, state)[0], axis_name="batch")(x)


def block_arrays(model):
    module, state = model
    mean, var = state.get(module.norm.batch_state_index)
    arrays = {"w1": module.inp.weight.T, "b1": module.inp.bias, "w2": module.out.weight.T}
    arrays |= {"b2": module.out.bias, "scale": module.norm.weight, "shift": module.norm.bias}
    return arrays | {"mean": mean, "var": var}


class Host:
    """A shim whose host is this framework, called with batches, and its current state.

    One that takes whole batches, or with ``batched=False`` one example, which is mapped here.
    """

    def __init__(self, module, keyed=True, batched=True, **keywords):
        self.again = functools.partial(Host, module, keyed, batched, **keywords)
        make = eqx.nn.make_with_state(shims.ToEquinox)
        self.shim, self.state = make(module, batched=batched, **keywords)
        self._keys = iter(range(1000)) if keyed else None

    def _key(self):
        return None if self._keys is None else jax.random.key(next(self._keys))

    def _copy(self):
        return jax.tree.unflatten(*reversed(jax.tree.flatten(self.state)))

    def _mode(self, train):
        return eqx.nn.inference_mode(self.shim, value=not train)

    def call(self, x, train=False):
        if not self.shim.is_stateful():
            return self._mode(train)(x, key=self._key())
        out, self.state = _apply(self._mode(train), x, self.state, self._key())
        return out

    def jit(self, x, train=False):
        out, self.state = _compiled_apply(self._mode(train), x, self.state, self._key())
        return out

    def method(self, name, x, **options):
        @eqx.filter_jit
        def call(shim, x, state):
            return _apply(shim, x, state, None, name, **options)

        return call(self._mode(False), x, self.state)[0]

    def parameters(self):
        return jax.tree.leaves(eqx.filter(self.shim, eqx.is_inexact_array))

    def double(self):
        """Change the weights."""
        self.shim = eqx.apply_updates(self.shim, eqx.filter(self.shim, eqx.is_inexact_array))

    def gradients(self, x, train, remat=False):
        """Loss, output and gradients."""
        call = eqx.filter_checkpoint(_apply) if remat else _apply
        arguments = self._mode(train), self.state, x, self._key(), call
        (loss, (out, self.state)), grads = _graded(*arguments)
        return loss, out, jax.tree.leaves(grads)

    def step(self, x, compiled=True):
        step = _compiled_step if compiled else _step
        loss, out, self.shim, self.state = step(self._mode(True), self._copy(), x, self._key())
        return loss, out

    def split(self, train):
        """What is static of the shim, and its state, for ``run``."""
        arrays, rest = eqx.partition(self._mode(train), eqx.is_array)
        leaves, tree = jax.tree.flatten(rest)
        return (tuple(leaves), tree), (arrays, self._copy(), self._key())

    @staticmethod
    def run(static, state, x):
        """The output, and the state afterwards."""
        (leaves, tree), (arrays, state, key) = static, state
        shim = eqx.combine(arrays, jax.tree.unflatten(tree, leaves))
        key, now = jax.random.split(key)
        out, state = _apply(shim, x, state, now)
        return out, (arrays, state, key)

    def join(self, state):
        """Give the shim a state."""
        arrays, self.state, _ = state
        self.shim = eqx.combine(arrays, self.shim)

    def vmap(self, xs):
        shim, state = self._mode(False), self.state
        return jax.vmap(lambda x: _apply(shim, x, state, None)[0])(xs)

    def scan(self, xs, train):
        shim = self._mode(train)

        def body(state, step):
            out, state = _apply(shim, step[0], state, step[1])
            return state, out

        keys = jax.random.split(self._key(), len(xs))
        self.state, outs = jax.lax.scan(body, self._copy(), (xs, keys))
        return outs

    def shape(self, x, train):
        arguments = self._mode(train), x, self._copy(), self._key()
        return eqx.filter_eval_shape(_apply, *arguments)[0].shape

    def unwrap(self):
        return self.shim.unwrap(self._copy())

    def materialize(self):
        return self.shim.materialize(self._copy())


def _apply(shim, x, state, key, method="__call__", **options):
    """Call a shim with a batch; one that takes an example once for each, as users do."""

    def call(x, state, key):
        return getattr(shim, method)(x, state=state, **options, key=key)

    if shim.batched:
        return call(x, state, key)
    keys = None if key is None else jax.random.split(key, len(x))
    each = jax.vmap(call, (0, None, 0), (0, None), axis_name="batch")
    return each(x, state, keys)


_compiled_apply = eqx.filter_jit(_apply)


def _graded(shim, state, x, key, call):
    def loss(shim):
        out, after = call(shim, x, state, key)
        return (out**2).mean(), (out, after)

    return eqx.filter_value_and_grad(loss, has_aux=True)(shim)


def _step(shim, state, x, key):
    (loss, (out, state)), grads = _graded(shim, state, x, key, _apply)
    updates = jax.tree.map(lambda g: -live.STEP * g, grads)
    return loss, out, eqx.apply_updates(shim, updates), state


_compiled_step = eqx.filter_jit(_step)
