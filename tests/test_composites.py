"""Modules that hold a spec: usable by themselves, and built where no native layer is exact."""

import importlib

import brainstate
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from interop.correspondence import arrays_of
from interop.registry import registry
from interop.specs import RNN, Cell, GRUCell, Linear, LSTMCell, Run
from interop.walk import Reading

from .conftest import NAMES, Framework

LINEAR = Linear.shaped(3, 4)
# Sizes and options for the constructor of each composite, and the shape of an input.
MADE = {
    "AllToAll": ((3, 4), {"one_weight": True, "include_self": False}, (5, 3)),
    "Bidirectional": (
        (RNN.shaped(GRUCell.shaped(3, 4)), RNN.shaped(LSTMCell.shaped(3, 2))),
        {"merge": None},
        (5, 6, 3),
    ),
    "ConvLSTMCell": ((3, 4, (3, 2)), {"padding": "SAME"}, (5, 6, 2, 3)),
    "GRUCell": ((3, 4), {"use_bias_n": True, "reset_first": True}, (5, 3)),
    "Einsum": (("...i,ijk->...kj", (3, 4, 2)), {"dtype": jnp.float32}, (5, 3)),
    "BatchNorm": ((4,), {"uses_running": True, "use_scale": False}, (5, 4)),
    "AlphaDropout": ((0.3,), {"channel_axis": -1}, (5, 4)),
    "DropoutFixed": ((4, 0.3), {}, (5, 4)),
    "PReLU": ((4,), {"keeps_dtype": True}, (5, 4)),
    "Dropout": ((0.3,), {"broadcast_dims": (1,)}, (5, 4)),
    "GroupNorm": ((4, 2), {"reduction_axes": (), "use_bias": False}, (5, 4)),
    "LayerNorm": ((4,), {"reduction_axes": (-2, -1), "use_scale": False}, (5, 3, 4)),
    "RMSNorm": (((3, 4),), {"use_bias": True}, (5, 3, 4)),
    "LSTMCell": ((3, 4), {"activation": jax.nn.relu}, (5, 3)),
    "MGUCell": ((3, 4), {"reset_gate": False, "reset_first": True}, (5, 3)),
    "RNN": ((LSTMCell.shaped(3, 4),), {"reverse": True, "unroll": 2}, (5, 6, 3)),
    "SimpleCell": ((3, 4), {"residual": True, "use_bias": False}, (5, 3)),
    "SpectralNorm": ((LINEAR,), {"steps": 2, "keeps_both": True}, (5, 3)),
    "WeightNorm": ((LINEAR,), {"axes": (0,), "bias_axes": (), "epsilon": 0.1}, (5, 3)),
    "URLSTMCell": ((3, 4), {"activation": jax.nn.relu}, (5, 3)),
    "Conv": ((4, 6, (3, 2)), {"padding": "SAME", "padding_mode": "REFLECT"}, (2, 5, 7, 4)),
    "ConvLocal": (((5, 7, 4), 6, (3, 2)), {"strides": (2, 1)}, (2, 5, 7, 4)),
    "ConvTranspose": ((4, 6, (3, 2)), {"groups": 2, "strides": (2, 1)}, (2, 5, 7, 4)),
    "ScaledWSConv": ((4, 6, (3, 2)), {"groups": 2, "padding": "SAME"}, (2, 5, 7, 4)),
    "Embedding": ((5, (2, 3)), {"max_norm": 0.5, "norm_type": 1.0}, jnp.arange(4)),
    "FrozenEmbedding": ((5, 3), {"padding_idx": 2}, jnp.arange(4)),
    "SparseLinear": ((3, 4, [2, 0, 2], [1, 3, 0]), {"use_bias": True}, (5, 3)),
    "FixedNumConn": (
        (3, 4, [[0, 0], [1, 1], [2, 2]], [[1, 3], [0, 0], [2, 1]]),
        {"one_weight": True},
        (5, 3),
    ),
    "ScaledWSLinear": ((3, 4), {"epsilon": 0.3, "use_bias": False}, (5, 3)),
    "SignedLinear": ((3, 4), {"sign": 1 - np.arange(12).reshape(3, 4) % 3}, (5, 3)),
    "LoRA": ((3, 2, 4), {"base": LINEAR, "dtype": jnp.float32}, (5, 3)),
    "Linear": ((3, 4), {"mask": np.arange(12).reshape(3, 4) % 2}, (5, 3)),
    "LinearGeneral": (((2, 3), 4), {"axes": (-3, -1)}, (6, 2, 5, 3)),
    "MultiHeadAttention": ((4, 8), {"num_kv_heads": 2, "normalize_qk": True}, (2, 5, 8)),
    "RotaryEmbedding": ((6,), {"theta": 100.0, "keeps_dtype": True}, (2, 5, 6)),
}


# What a framework always has natively.
ELSEWHERE = {"MaxUnpool", "Pool", "SpikeBitwise"}  # tests/test_spatial.py, test_activations.py
NATIVE = {"linen": {"Bidirectional", "RNN"}, "nnx": {"Bidirectional", "RNN"}}


def composites(name):
    return {cls.__name__: cls for cls in registry.adapter(name).composites.values()}


@pytest.mark.parametrize("name", NAMES)
def test_every_composite_is_in_the_table(name):
    module = importlib.import_module(f"interop.composites.{name}")
    assert composites(name).keys() - ELSEWHERE == MADE.keys() - NATIVE.get(name, set())
    for layer, cls in composites(name).items():
        assert getattr(module, layer) is cls
        assert cls.__doc__ == cls.spec_type.__doc__


def make(name, layer):
    """A composite of a framework from its public constructor: what users of it hold."""
    sizes, options, x = MADE[layer]
    cls = composites(name)[layer]
    if name == "nnx":
        return cls(*sizes, **options, rngs=nnx.Rngs(0), deterministic=True)
    if name == "linen":
        module = cls(*sizes, **options, deterministic=True)
        if issubclass(cls, nn.RNNCellBase):
            carry = module.initialize_carry(None, x)
            return module, module.init(jax.random.key(0), carry, jnp.ones(x))
        return module, module.init(jax.random.key(0), given(x))
    if name == "equinox":
        key = jax.random.key(0)
        module, state = eqx.nn.make_with_state(cls)(*sizes, **options, key=key)
        module = eqx.nn.inference_mode(module)
        is_stateful = module.is_stateful()
        return (module, state) if is_stateful else module
    brainstate.random.seed(0)
    return cls(*sizes, **options)


@pytest.mark.parametrize("layer", MADE)
def test_a_composite_converts_to_every_framework_and_back(source, target, layer):
    if layer in NATIVE.get(source.name, ()):
        pytest.skip(f"{source.name} has it natively")
    x = given(MADE[layer][2])
    model = make(source.name, layer)
    images = bool(held(source, model).space)
    lay = {fw: fw.from_channels_last(x) if images else x for fw in (source, target)}
    converted = target.convert_from(source, model, sample_input=lay[source].shape[1:])
    back = source.convert_from(target, converted, sample_input=lay[target].shape[1:])
    assert type(part(back)) in registry.adapter(source.name).readers
    specs = [held(fw, m) for fw, m in ((source, model), (target, converted), (source, back))]
    for spec in specs[1:]:
        assert jax.tree.map(jnp.shape, arrays_of(spec)) == jax.tree.map(
            jnp.shape, arrays_of(specs[0])
        )
        for key, array in arrays_of(spec).items():
            np.testing.assert_allclose(array, arrays_of(specs[0])[key], rtol=1e-6, atol=1e-7)
    if not issubclass(composites(source.name)[layer].spec_type, Cell):
        calls = ((target, converted), (source, model))
        found, wanted = [fw.call(m, lay[fw]) for fw, m in calls]
        if images:
            found, wanted = target.to_channels_last(found), source.to_channels_last(wanted)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def part(model):
    return model[0] if isinstance(model, tuple) else model


def held(fw, model):
    """The spec that a model of one layer is read as."""
    module, keywords = fw.arguments(model)
    adapter = registry.adapter(fw.name)
    node = adapter.open(module, keywords.get("params"), keywords.get("state"))
    return Reading(adapter, registry).read(node, "model")


def given(shape):
    if not isinstance(shape, tuple):
        return shape
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("layer", [layer for layer in MADE if layer.endswith("Cell")])
@pytest.mark.parametrize("name", NAMES)
def test_a_cell_steps_as_its_formula(name, layer):
    model, fw, shape = make(name, layer), Framework(name), MADE[layer][2]
    spec, x = held(fw, model), given(shape)
    start = fw.start(model, shape)
    assert all(not array.any() and array.dtype == jnp.float32 for array in start)
    state = tuple(given(array.shape) * (i + 1) for i, array in enumerate(start))
    found, *_ = fw.steps(model, x[None], *state)
    wanted = spec.step(Run(), x, state)[0]
    np.testing.assert_allclose(found[0], wanted, rtol=1e-5, atol=1e-6)
