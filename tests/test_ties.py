"""A layer used twice stays one layer; what cannot stay tied is refused."""

import brainstate
import flax.linen
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import interop

from .cases import BIAS_2, WEIGHT_2, X, array
from .conftest import Framework

SQUARE, SQUARE_BIAS = array(3, 3, seed=10), array(3, seed=11)


def tied(fw):
    layer = fw.linear(SQUARE, SQUARE_BIAS)
    return fw.sequential(layer, fw.activation(jnp.tanh), layer)


def test_a_layer_used_twice_stays_one_layer_through_training(source, target):
    source.needs("ties")
    target.needs("ties")
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
    target.needs("ties")
    inner = source.sequential(source.linear(SQUARE, SQUARE_BIAS), source.activation(jnp.tanh))
    model = source.sequential(inner, inner)
    converted = target.convert_from(source, model)
    assert target.count(converted) == 2
    np.testing.assert_allclose(
        target.call(converted, X), source.call(model, X), rtol=2e-6, atol=2e-6
    )


@pytest.mark.parametrize("framework", ["brainstate", "nnx", "linen"])
def test_equinox_refuses_a_layer_used_twice(framework):
    model, keywords = Framework(framework).arguments(tied(Framework(framework)))
    with pytest.raises(interop.UnsupportedStructureError, match=r"^model: .* second time") as e:
        interop.convert(model, to="equinox", **keywords)
    assert e.value.path == "model"


def test_equinox_refuses_a_layer_used_in_two_stacks():
    layer = brainstate.nn.Linear(3, 3)
    stacks = [brainstate.nn.Sequential(layer, brainstate.nn.ReLU()) for _ in range(2)]
    with pytest.raises(
        interop.UnsupportedStructureError, match=r"^model\[1\]: Linear at model\[0\]\[0\]"
    ):
        interop.to_equinox(brainstate.nn.Sequential(*stacks))


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
