"""Equinox's MLP is a stack of its layers in every other framework."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import interop

from . import truth
from .cases import array
from .conftest import NAMES, Framework

SIZES = (3, 4, 4, 4, 2)
WEIGHTS = [array(a, b, seed=i) for i, (a, b) in enumerate(zip(SIZES, SIZES[1:], strict=False))]
BIASES = [array(b, seed=i) for i, b in enumerate(SIZES[1:])]
X = array(5, 3)
others = pytest.mark.parametrize("goal", [name for name in NAMES if name != "equinox"])


def mlp(scan=False, activation=jax.nn.relu, **options):
    model = eqx.nn.MLP(3, 2, 4, 3, activation, scan=scan, key=jax.random.key(0), **options)
    pairs = [(weight.T, bias) for weight, bias in zip(WEIGHTS, BIASES, strict=True)]
    if scan:
        pairs[1:3] = [tuple(map(jnp.stack, zip(*pairs[1:3], strict=True)))]
    new = [array for pair in pairs for array in pair]
    return eqx.tree_at(
        lambda m: [array for layer in m.layers for array in (layer.weight, layer.bias)],
        model,
        new,
    )


def expected(activation, final=lambda x: x):
    x = X
    for weight, bias in list(zip(WEIGHTS, BIASES, strict=True))[:-1]:
        x = activation(truth.linear(x, weight, bias))
    return final(truth.linear(x, WEIGHTS[-1], BIASES[-1]))


@others
@pytest.mark.parametrize("scan", [True, False])
def test_each_layer_keeps_its_own_weights(goal, scan):
    fw = Framework(goal)
    converted = fw.convert_from(Framework("equinox"), mlp(scan))
    np.testing.assert_allclose(
        fw.call(converted, X), expected(lambda x: np.maximum(x, 0)), rtol=1e-5, atol=1e-5
    )
    for arrays, weight, bias in zip(fw.read(converted), WEIGHTS, BIASES, strict=True):
        np.testing.assert_array_equal(arrays["weight"], weight)
        np.testing.assert_array_equal(arrays["bias"], bias)


@others
def test_a_function_of_one_number_is_applied_to_each_neuron(goal):
    fw = Framework(goal)
    model = mlp(
        activation=lambda x: jax.lax.cond(x > 0, jnp.sin, jnp.cos, x),
        final_activation=eqx.nn.Lambda(lambda x: 2 * x.reshape(())),
    )
    converted = fw.convert_from(Framework("equinox"), model)
    wanted = expected(lambda x: np.where(x > 0, np.sin(x), np.cos(x)), lambda x: 2 * x)
    np.testing.assert_allclose(fw.call(converted, X), wanted, rtol=1e-5, atol=1e-5)
    assert len(interop.explain(model, to=goal).rows) == 8


@others
@pytest.mark.parametrize("scan", [True, False])
def test_each_neuron_keeps_the_slope_that_it_has_learnt(goal, scan):
    slopes, last = array(3, 4, seed=5), array(2, seed=6)
    model = eqx.tree_at(
        lambda m: (m.activation.negative_slope, m.final_activation.negative_slope),
        mlp(scan, eqx.nn.PReLU(), final_activation=eqx.nn.PReLU(0.5)),
        (slopes, last),
    )
    x = X
    for weight, bias, slope in zip(WEIGHTS, BIASES, [*slopes, last], strict=True):
        y = truth.linear(x, weight, bias)
        x = np.where(y >= 0, y, slope * y)
    fw = Framework(goal)
    converted = fw.convert_from(Framework("equinox"), model)
    np.testing.assert_allclose(fw.call(converted, X), x, rtol=1e-5, atol=1e-5)


@others
def test_a_number_has_a_slope_of_its_own(goal):
    options = {"final_activation": eqx.nn.PReLU(0.3), "key": jax.random.key(0)}
    model = eqx.nn.MLP(3, "scalar", 4, 1, jnp.tanh, **options)
    fw = Framework(goal)
    found = fw.call(fw.convert_from(Framework("equinox"), model), X)
    y = truth.linear(
        np.tanh(truth.linear(X, model.layers[0].weight.T, model.layers[0].bias)),
        model.layers[1].weight.T,
        model.layers[1].bias,
    )
    assert (y < 0).any()
    exact = np.where(y >= 0, y, 0.3 * y)
    np.testing.assert_allclose(found.reshape(5, 1), exact, rtol=1e-5, atol=1e-5)
    refused = eqx.nn.MLP(
        3, "scalar", 4, 1, final_activation=eqx.nn.PReLU(jnp.ones(2)), key=jax.random.key(0)
    )
    with pytest.raises(interop.UnsupportedLayerError, match="final_activation"):
        fw.convert_from(Framework("equinox"), refused)


@others
@pytest.mark.parametrize("option", ["activation", "final_activation"])
def test_what_is_learnt_or_no_function_of_one_number_is_refused(goal, option):
    for fn in (eqx.nn.PReLU(jnp.ones(3)), eqx.nn.LayerNorm(()), jax.nn.softmax):
        with pytest.raises(interop.UnsupportedLayerError) as e:
            Framework(goal).convert_from(Framework("equinox"), mlp(**{option: fn}))
        assert e.value.option == option
