"""Models in states that their constructors do not make: right, or refused by name."""

import brainstate
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import interop

from .cases import BIAS, BIAS_2, WEIGHT, WEIGHT_2, X
from .conftest import NAMES, Framework

Y = np.asarray(X) @ np.asarray(WEIGHT) + np.asarray(BIAS)
PARAMS = {"params": {"kernel": WEIGHT, "bias": BIAS}}


@pytest.mark.parametrize("name", NAMES)
def test_weights_may_be_tracers(name):
    fw = Framework(name)

    @jax.jit
    def run(params, x):
        return fw.call(interop.convert(nn.Dense(4), to=name, params=params), x)

    np.testing.assert_allclose(run(PARAMS, X), Y, rtol=2e-6, atol=2e-6)


def test_a_conversion_runs_on_shapes_alone():
    stack = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True), nn.Dense(2)])
    variables = jax.eval_shape(stack.init, jax.random.key(0), X)

    def weights(variables):
        network = interop.convert(stack, to="equinox", params=variables)
        return eqx.filter(network, eqx.is_array)

    shapes = jax.eval_shape(weights, variables)
    assert [layer.weight.shape for layer in shapes.layers] == [(4, 3), (4,), (2, 4)]


def test_a_mapping_is_found_and_a_model_explained_where_weights_are_tracers():
    module = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True)])
    variables = module.init(jax.random.key(0), X)
    rows = []

    @jax.jit
    def moved(variables):
        rows.extend(interop.explain((module, variables), "equinox", sample_input=(3,)).rows)
        mapping = interop.mapping((module, variables), to="equinox")
        return mapping.apply(variables["params"])

    kernel = variables["params"]["layers_0"]["kernel"]
    np.testing.assert_array_equal(moved(variables).layers[0].weight, kernel.T)
    kernels, statistics = (row.changes for row in rows)
    assert kernels == ("weight: transpose (1, 0)",)
    assert ["variance" in change for change in statistics] == [True]


def test_a_table_of_integers_is_looked_up():
    table = jnp.arange(15).reshape(5, 3)
    model = interop.to_nnx(brainstate.nn.Embedding(5, 3, embedding_init=table))
    np.testing.assert_array_equal(model(jnp.array([4, 1])), table[jnp.array([4, 1])])


def with_weight(value):
    layer = brainstate.nn.Linear(3, 4, w_init=WEIGHT, b_init=BIAS)
    layer.weight = brainstate.ParamState(value)
    return layer


def column(value):
    layer = brainstate.nn.Linear(1, 3, b_init=None)
    layer.weight = brainstate.ParamState({"weight": value})
    return layer


def with_kernel(value):
    layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    layer.kernel.set_value(value)
    return layer


def with_field(value):
    layer = eqx.nn.Linear(3, 4, key=jax.random.key(0))
    return eqx.tree_at(lambda layer: layer.weight, layer, value)


def with_attribute(name, value):
    layer = brainstate.nn.Linear(3, 4)
    setattr(layer, name, value)
    return layer


def deleted():
    array = jnp.ones((3, 4))
    array.delete()
    return array


INTEGERS = {
    "brainstate": lambda w: (with_weight({"weight": w}), {}),
    "nnx": lambda w: (with_kernel(w), {}),
    "linen": lambda w: (nn.Dense(4, use_bias=False), {"params": {"params": {"kernel": w}}}),
    "equinox": lambda w: (with_field(w.T), {}),
}


@pytest.mark.parametrize("dtype", ["int8", "bool"])
@pytest.mark.parametrize("name", INTEGERS)
def test_weights_that_are_integers_are_refused(name, dtype):
    """Flax computes float32 with them, the others in the integers' own arithmetic."""
    model, keywords = INTEGERS[name](WEIGHT.astype(dtype))
    for to in NAMES:
        with pytest.raises(interop.InteropError, match=f"dtype.*{dtype}") as e:
            interop.convert(model, to=to, **keywords)
        assert e.value.path == "model"


MODELS = {
    "another shape of the same size": (
        lambda: with_weight({"weight": WEIGHT.T, "bias": BIAS}),
        "weight['weight'].shape=(4, 3): the layer has (3, 4)",
    ),
    "a row for a column": (
        lambda: column(jnp.ones((3, 1))),
        "weight['weight'].shape=(3, 1): the layer has (1, 3)",
    ),
    "a flat weight": (
        lambda: with_weight({"weight": WEIGHT.ravel(), "bias": BIAS}),
        "weight['weight'].shape=(12,)",
    ),
    "no weight": (lambda: with_weight({"bias": BIAS}), "cannot be read (KeyError: 'weight')"),
    "a further array": (
        lambda: with_weight({"weight": WEIGHT, "bias": BIAS, "more": BIAS}),
        "cannot be read (KeyError: 'more')",
    ),
    "no state": (lambda: with_attribute("weight", None), "cannot be read"),
    "states in a list": (
        lambda: with_attribute("more", [brainstate.ParamState(BIAS)]),
        "it holds more, which Linear does not have",
    ),
    "a layer in a dict": (
        lambda: with_attribute("more", {"a": [brainstate.nn.Linear(3, 4)]}),
        "it holds more, which Linear does not have",
    ),
    "a number as weight": (lambda: with_field(2.0), "cannot be read"),
    "a list as weight": (lambda: with_field([[1.0] * 3] * 4), "cannot be read"),
    "a donated weight, brainstate": (
        lambda: with_weight({"weight": deleted(), "bias": BIAS}),
        "weight has been deleted",
    ),
    "a donated weight, nnx": (lambda: with_kernel(deleted()), "weight has been deleted"),
    "a donated weight, equinox": (lambda: with_field(deleted()), "deleted"),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_was_assigned_after_construction_is_carried_or_refused(name):
    make, words = MODELS[name]
    for to in NAMES:
        with pytest.raises(interop.InteropError) as e:
            interop.convert(make(), to=to)
        assert words in str(e.value)
        assert e.value.path == "model"
        assert e.value.remedy


@pytest.mark.parametrize(
    ("cls", "method"), [(brainstate.nn.Linear, "update"), (nnx.Linear, "__call__")]
)
def test_a_method_that_was_replaced_in_its_class_is_noticed(cls, method, monkeypatch):
    layer = cls(3, 4, rngs=nnx.Rngs(0)) if cls is nnx.Linear else cls(3, 4)
    monkeypatch.setattr(cls, method, lambda self, x: x)
    with pytest.raises(interop.UnsupportedLayerError, match=f"overrides {method} of Linear"):
        interop.convert(layer, to="equinox")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("update", jnp.tanh, "overrides update of Linear"),
        ("more", brainstate.ParamState(BIAS), "it holds more"),
    ],
)
def test_every_layer_of_a_class_is_looked_at(name, value, words):
    layers = [brainstate.nn.Linear(3, 3) for _ in range(3)]
    setattr(layers[2], name, value)
    with pytest.raises(interop.UnsupportedLayerError, match=words) as e:
        interop.convert(brainstate.nn.Sequential(*layers), to="nnx")
    assert e.value.path == "model[2]"


def test_a_mapping_of_an_array_without_elements_is_refused():
    model = eqx.nn.Linear(0, 3, use_bias=False, key=jax.random.key(0))
    assert interop.convert(model, to="nnx")(jnp.ones((2, 0))).shape == (2, 3)
    with pytest.raises(interop.ConversionError, match="weight of equinox has no elements"):
        interop.mapping(model, to="nnx")


def test_an_empty_batch_passes(source, target):
    layers = source.linear(WEIGHT, BIAS), source.linear(WEIGHT_2, BIAS_2)
    converted = target.convert_from(source, source.sequential(*layers))
    assert target.call(converted, X[:0]).shape == (0, 2)


def test_a_function_whose_arrays_equinox_trains_is_refused():
    project = jax.tree_util.Partial(lambda weight, x: x @ weight, WEIGHT)
    model = eqx.nn.Sequential([eqx.nn.Lambda(jnp.tanh), eqx.nn.Lambda(project)])
    assert jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))[0] is WEIGHT
    for to in NAMES:
        with pytest.raises(interop.UnsupportedLayerError, match="fn=.*trains the arrays") as e:
            interop.convert(model, to=to)
        assert e.value.path == "model[1]"


def test_constants_of_a_function_are_not_trained_in_equinox_either():
    project = jax.tree_util.Partial(lambda weight, x: x @ weight, WEIGHT)
    stack = brainstate.nn.Sequential(brainstate.nn.Linear(3, 3), project)
    network = interop.to_equinox(stack)
    assert len(jax.tree.leaves(eqx.filter(network, eqx.is_inexact_array))) == 2
    np.testing.assert_allclose(jax.vmap(network)(X), stack(X), rtol=2e-6, atol=2e-6)
