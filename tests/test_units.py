"""Weights and inputs with physical units: carried where the target computes with them."""

import brainstate
import brainunit as u
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import interop
import shims

from .cases import BIAS, BIAS_2, INDICES, TABLE, WEIGHT, WEIGHT_2, X

bnn = brainstate.nn
ARRAY = {"weight": np.asarray(WEIGHT), "bias": np.asarray(BIAS)}


def linear(unit=u.mV, bias_unit=u.mV):
    return bnn.Linear(3, 4, w_init=WEIGHT * unit, b_init=BIAS * bias_unit)


def parameters(model):
    return {path: state.value for path, state in model.states(brainstate.ParamState).items()}


def equal(found, unit, expected):
    assert found.unit == unit
    np.testing.assert_allclose(found.mantissa, expected, rtol=2e-6, atol=2e-6)


Y = np.asarray(X) @ ARRAY["weight"] + ARRAY["bias"]


def test_weights_with_units_go_to_equinox_and_back_as_the_same_arrays():
    model = linear()
    network = interop.to_equinox(model)
    equal(jax.vmap(network)(X), u.mV, Y)
    assert network.bias is model.weight.value["bias"]
    equal(network.weight, u.mV, ARRAY["weight"].T)
    back = interop.from_equinox(network)
    equal(back(X), u.mV, Y)
    assert back.weight.value["bias"] is network.bias


def test_an_embedding_with_a_unit_goes_to_equinox_and_back():
    model = bnn.Embedding(5, 3, embedding_init=TABLE * u.mV)
    network = interop.to_equinox(model)
    assert network.weight is model.weight.value
    equal(jax.vmap(network)(INDICES), u.mV, np.asarray(TABLE)[INDICES])
    equal(interop.from_equinox(network)(INDICES), u.mV, np.asarray(TABLE)[INDICES])


@pytest.mark.parametrize("sample", [None, X[0] * u.mA], ids=["", "sample"])
def test_a_layer_whose_bias_tells_that_its_input_has_a_unit_converts(sample):
    network = interop.convert(linear(u.ohm), to="equinox", sample_input=sample)
    equal(jax.vmap(network)(X * u.mA), u.mV, Y)


STACKS = {
    "relu": (lambda: bnn.ReLU(), "its input=mV"),
    "dropout": (lambda: bnn.Dropout(0.5), "its input=mV"),
    "norm": (lambda: bnn.LayerNorm((4,)), "its input=mV"),
    "a bias without a unit": (
        lambda: bnn.Linear(4, 2, w_init=WEIGHT_2, b_init=BIAS_2),
        "its input=mV",
    ),
    "a function": (lambda: jnp.sin, "its input=mV"),
}


@pytest.mark.parametrize("name", STACKS)
def test_a_layer_after_them_that_does_not_take_the_unit_is_refused_by_name(name):
    layer, words = STACKS[name]
    with pytest.raises(interop.UnsupportedLayerError, match=words) as e:
        interop.to_equinox(bnn.Sequential(linear(), layer()))
    assert e.value.path == "model[1]"
    report = interop.explain(bnn.Sequential(linear(), layer()), "equinox")
    assert [row.how for row in report.rows] == ["native", "refused"]


def test_a_unit_that_is_taken_away_again_is_no_hindrance():
    weight = WEIGHT_2 / u.mV
    stacks = [
        bnn.Sequential(linear(), lambda x: x / u.mV, bnn.Tanh()),
        bnn.Sequential(linear(), bnn.Linear(4, 2, w_init=weight, b_init=None), bnn.Tanh()),
    ]
    for stack in stacks:
        found = jax.vmap(interop.to_equinox(stack))(X)
        np.testing.assert_allclose(found, stack(X), rtol=2e-6, atol=2e-6)


def in_mv(model):
    return jax.tree.map(lambda x: x * u.mV if eqx.is_inexact_array(x) else x, model)


KEY = jax.random.key(0)
REFUSED = {
    "Linear": lambda: eqx.nn.Linear(3, 4, key=KEY),
    "Embedding": lambda: eqx.nn.Embedding(5, 3, key=KEY),
    "LayerNorm": lambda: eqx.nn.LayerNorm(3),
    "Conv1d": lambda: eqx.nn.Conv1d(3, 4, 2, key=KEY),
    "LSTMCell": lambda: eqx.nn.LSTMCell(3, 4, key=KEY),
    "GRUCell": lambda: eqx.nn.GRUCell(3, 4, key=KEY),
    "MultiheadAttention": lambda: eqx.nn.MultiheadAttention(2, 4, key=KEY),
}
SAMPLES = {"Embedding": (), "Conv1d": (3, 5), "MultiheadAttention": (5, 4)}


@pytest.mark.parametrize("name", REFUSED)
def test_a_target_that_does_not_compute_with_units_is_never_given_any(name):
    model = in_mv(REFUSED[name]())
    with pytest.raises(interop.UnsupportedLayerError, match=f"{name}.*=mV: this layer") as e:
        interop.convert(model, to="nnx", sample_input=SAMPLES.get(name, (3,)))
    assert e.value.__cause__ is not None


CELLS = (bnn.LSTMCell, bnn.GRUCell, bnn.ValinaRNNCell)


@pytest.mark.parametrize("cls", CELLS)
def test_a_cell_with_units_is_refused(cls):
    cell = cls(3, 4)
    for state in cell.states(brainstate.ParamState).values():
        state.value = in_mv(state.value)
    with pytest.raises(interop.UnsupportedLayerError, match="=mV: this layer"):
        interop.convert(cell, to="nnx", sample_input=(3,))


def test_gates_with_units_that_are_kept_apart_are_refused():
    cell = nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0))
    for layer in (cell.ii, cell.if_, cell.ig, cell.io):
        layer.kernel.set_value(layer.kernel.get_value() * u.mV)
    for to in ("linen", "equinox"):
        with pytest.raises(interop.UnsupportedLayerError, match="weight_x=mV"):
            interop.convert(cell, to=to, sample_input=(3,))


def test_an_input_with_a_unit_is_refused_where_the_target_takes_none():
    plain = bnn.Linear(3, 4, w_init=WEIGHT, b_init=None)
    with pytest.raises(interop.UnsupportedLayerError, match="its input=mA"):
        interop.convert(plain, to="nnx", sample_input=X[0] * u.mA)
    network = interop.convert(plain, to="equinox", sample_input=X[0] * u.mA)
    equal(jax.vmap(network)(X * u.mA), u.mA, np.asarray(X) @ ARRAY["weight"])


def test_what_has_to_be_tried_on_an_example_asks_for_one():
    with pytest.raises(interop.MissingShapeError, match="LayerNorm is tried with units"):
        interop.convert(in_mv(eqx.nn.LayerNorm(3)), to="brainstate")


def test_a_dimensionless_quantity_is_an_array():
    model = bnn.Linear(3, 4, w_init=u.Quantity(WEIGHT), b_init=BIAS)
    np.testing.assert_allclose(interop.to_nnx(model)(X), Y, rtol=2e-6, atol=2e-6)


def test_a_mapping_moves_values_with_their_units():
    model = linear()
    network = interop.to_equinox(model)
    mapping = interop.mapping(model, network)
    moved = mapping.apply(parameters(model))
    equal(moved.weight, u.mV, ARRAY["weight"].T)
    assert moved.bias is network.bias
    volts = jax.tree.map(
        lambda q: q.in_unit(u.volt), parameters(model), is_leaf=lambda x: hasattr(x, "unit")
    )
    equal(mapping.apply(volts).weight, u.volt, ARRAY["weight"].T / 1000)
    state = optax.trace(0.9).init(parameters(model))
    assert mapping.apply(state).trace.weight.unit == u.mV
    frozen = mapping.apply({("weight",): {"weight": True, "bias": False}})
    assert (frozen.weight, frozen.bias) == (True, False)
    back = interop.WeightMapping.from_json(mapping.invert().to_json())
    found = back.apply(eqx.filter(network, eqx.is_inexact_array))
    equal(found["weight",]["weight"], u.mV, ARRAY["weight"])


def test_plain_values_get_the_unit_of_the_parameter_that_they_become():
    """As those of a shim are, whose host sees arrays."""
    shim = shims.ToEquinox(linear())
    network = shim.materialize()
    moved = interop.mapping(shim, network).apply(eqx.filter(shim, eqx.is_inexact_array))
    equal(moved.weight, u.mV, ARRAY["weight"].T)
    trainable = eqx.filter(network, eqx.is_inexact_array)
    assert jax.tree.structure(moved) == jax.tree.structure(trainable)


def test_a_shim_with_units_materializes_where_the_host_computes_with_them():
    with pytest.raises(interop.UnsupportedLayerError, match="weight=mV"):
        shims.ToNNX(linear()).materialize()
    equal(shims.FromEquinox(interop.to_equinox(linear())).materialize()(X), u.mV, Y)


def test_models_with_units_are_compared():
    model, network = linear(u.ohm), interop.to_equinox(linear(u.ohm))
    comparison = interop.compare(model, network, X * u.mA)
    assert comparison.ok
    assert sorted(comparison.parameters) == ["bias", "weight"]
    interop.assert_equivalent(model, network, X * u.mA)
    other = linear(u.volt, u.volt)
    with pytest.raises(interop.ConversionError, match="different units, mV and V"):
        interop.compare(linear(), other, X)
    with pytest.raises(interop.ArgumentError, match="the equinox model fails"):
        interop.compare(linear(u.mV), network, X)
