"""A layer used twice stays one layer; what cannot stay tied is refused."""

import brainstate
import equinox as eqx
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import interop
from interop.composites.brainstate import RNN
from interop.composites.equinox import Tied

from . import truth
from .cases import BIAS_2, WEIGHT_2, X, array
from .conftest import Framework

SQUARE, SQUARE_BIAS = array(3, 3, seed=10), array(3, seed=11)


def tied(fw):
    layer = fw.linear(SQUARE, SQUARE_BIAS)
    return fw.sequential(layer, fw.activation(jnp.tanh), layer)


def test_a_layer_used_twice_stays_one_layer_through_training(source, target):
    source.needs("ties")
    model = tied(source)
    converted = target.convert_from(source, model)
    assert target.count(converted) == source.count(model) == 2
    model, converted = source.step(model, X), target.step(converted, X)
    first, second = target.read(converted)
    np.testing.assert_array_equal(first["weight"], second["weight"])
    assert not np.array_equal(first["weight"], SQUARE)
    np.testing.assert_allclose(
        target.call(converted, X), source.call(model, X), rtol=1e-5, atol=1e-5
    )


def test_a_stack_used_twice_stays_one_stack(source, target):
    source.needs("ties")
    inner = source.sequential(source.linear(SQUARE, SQUARE_BIAS), source.activation(jnp.tanh))
    model = source.sequential(inner, inner)
    converted = target.convert_from(source, model)
    assert target.count(converted) == 2
    np.testing.assert_allclose(
        target.call(converted, X), source.call(model, X), rtol=2e-6, atol=2e-6
    )


def test_equinox_ties_a_layer_used_in_two_stacks():
    layer = brainstate.nn.Linear(3, 3)
    stacks = [brainstate.nn.Sequential(layer, brainstate.nn.ReLU()) for _ in range(2)]
    model = brainstate.nn.Sequential(*stacks)
    converted = interop.to_equinox(model)
    assert isinstance(converted, Tied)
    assert Framework("equinox").count(converted) == 2
    np.testing.assert_allclose(jax.vmap(converted)(X), model(X), rtol=1e-6, atol=1e-6)


def shared(where, get, *, bias=True):
    """Two layers of Equinox's own, tied by its own means."""
    fw = Framework("equinox")
    parts = fw.linear(SQUARE, SQUARE_BIAS if bias else None), fw.linear(SQUARE + 1, SQUARE_BIAS)
    stack = eqx.nn.Sequential([parts[0], eqx.nn.Lambda(jnp.tanh), parts[1]])
    return eqx.nn.Shared(stack, where, get)


@pytest.mark.parametrize("goal", ["brainstate", "nnx", "linen"])
def test_a_shared_layer_of_equinox_is_one_layer(goal):
    model = shared(lambda stack: stack.layers[2], lambda stack: stack.layers[0])
    parts = ("weight", "bias")
    in_parts = shared(
        lambda stack: [getattr(stack.layers[2], name) for name in parts],
        lambda stack: [getattr(stack.layers[0], name) for name in parts],
    )
    fw = Framework(goal)
    for given in (model, Tied(model), in_parts):
        converted = fw.convert_from(Framework("equinox"), given)
        assert fw.count(converted) == 2
        inner = truth.linear(X, SQUARE, SQUARE_BIAS)
        wanted = truth.linear(np.tanh(inner), SQUARE, SQUARE_BIAS)
        np.testing.assert_allclose(fw.call(converted, X), wanted, rtol=1e-5, atol=1e-5)
    back = Framework("equinox").convert_from(fw, converted)
    back = back[0] if isinstance(back, tuple) else back
    assert isinstance(back, Tied)
    assert Framework("equinox").count(back) == 2


@pytest.mark.parametrize("goal", ["brainstate", "nnx", "linen"])
def test_a_shared_array_of_equinox_is_refused_with_both_places(goal):
    model = shared(lambda stack: stack.layers[2].weight, lambda stack: stack.layers[0].weight)
    with pytest.raises(interop.UnsupportedStructureError) as e:
        interop.convert(model, to=goal)
    assert "model[0]" in str(e.value)
    assert "model[2]" in str(e.value)
    model = shared(lambda stack: stack.layers[2].weight, lambda stack: stack.layers[0].weight.T)
    with pytest.raises(interop.UnsupportedLayerError, match="get"):
        interop.convert(model, to=goal)
    pair = eqx.nn.Shared([eqx.nn.Identity(), SQUARE], lambda p: p[1], lambda p: p[1])
    with pytest.raises(interop.UnsupportedLayerError, match="pytree"):
        interop.convert(pair, to=goal)


def test_equal_arrays_that_are_not_tied_stay_apart():
    fw = Framework("equinox")
    layer = fw.linear(SQUARE, SQUARE_BIAS)
    stack = eqx.nn.Sequential([layer, layer, layer, layer])
    model = eqx.nn.Shared(stack, lambda s: s.layers[2], lambda s: s.layers[0])
    converted = interop.convert(model, to="nnx")
    assert converted.layers[0] is converted.layers[2]
    assert len({*map(id, converted.layers)}) == 3


def test_arrays_shared_within_recurrent_layers_are_refused():
    rngs = nnx.Rngs(0)
    one, other = (nnx.LSTMCell(3, 3, rngs=rngs) for _ in range(2))
    other.hi.kernel = one.hi.kernel
    with pytest.raises(interop.UnsupportedStructureError) as e:
        interop.to_linen(interop.from_nnx(nnx.Sequential(nnx.RNN(one), nnx.RNN(other))))
    assert "model[0].cell.hi.kernel" in str(e.value)
    assert "model[1].cell.hi.kernel" in str(e.value)
    one.hf.kernel = one.hi.kernel
    with pytest.raises(interop.UnsupportedLayerError, match="kernel"):
        interop.from_nnx(one)
    first, second = (interop.from_nnx(nnx.GRUCell(3, 3, rngs=rngs)) for _ in range(2))
    second.weight_x = first.weight_x
    stack = brainstate.nn.Sequential(RNN(first), RNN(second))
    stack.layers[1].cell["weight_x"] = stack.layers[0].cell["weight_x"]
    with pytest.raises(interop.UnsupportedStructureError, match=r"model\[0\].cell.weight_x"):
        interop.to_nnx(stack)
    attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
    attention.key = attention.query
    with pytest.raises(interop.UnsupportedLayerError, match="the tie would be lost"):
        interop.from_nnx(attention)


def test_equinox_takes_a_layer_without_arrays_twice():
    relu = brainstate.nn.ReLU()
    converted = interop.to_equinox(
        brainstate.nn.Sequential(brainstate.nn.Linear(3, 3), relu, relu)
    )
    assert len(converted.layers) == 3


def test_an_nnx_variable_shared_by_two_layers_is_refused():
    a, b = nnx.Linear(3, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 3, rngs=nnx.Rngs(1))
    b.kernel = a.kernel
    with pytest.raises(interop.UnsupportedStructureError) as e:
        interop.from_nnx(nnx.Sequential(a, b))
    assert "model[0].kernel" in str(e.value)
    assert "model[1].kernel" in str(e.value)


def test_a_brainstate_state_shared_by_two_layers_is_refused():
    a, b = brainstate.nn.Linear(3, 3), brainstate.nn.Linear(3, 3)
    b.weight = a.weight
    with pytest.raises(interop.UnsupportedStructureError, match=r"model\[0\].weight"):
        interop.to_nnx(brainstate.nn.Sequential(a, b))


def test_linen_refuses_a_layer_used_in_two_stacks():
    layer = brainstate.nn.Linear(3, 3)
    inner = brainstate.nn.Sequential(layer, brainstate.nn.ReLU())
    with pytest.raises(interop.UnsupportedStructureError, match="two different modules") as e:
        interop.to_linen(brainstate.nn.Sequential(layer, inner))
    assert e.value.path == "model"
    dense = flax.linen.Dense(2)
    module = flax.linen.Sequential([dense, flax.linen.Sequential([dense])])
    arrays = {"kernel": WEIGHT_2, "bias": BIAS_2}
    with pytest.raises(interop.UnsupportedStructureError, match="two different stacks"):
        interop.from_linen(module, {"params": {"layers_0": arrays}})
