"""What a layer of a stack hands on to the next: several outputs, and sequences."""

import equinox as eqx
import jax
import numpy as np
import pytest
from flax import nnx

import interop

from . import truth
from .cases import WEIGHT, WEIGHT_2, X, array
from .conftest import NAMES, Framework

SPREADING = {"nnx", "linen"}
HIDDEN = truth.linear(X, WEIGHT)


def as_tuple(x):
    return x, 2 * x


def as_one(x):
    return (x,)


def as_dict(x):
    return {"b": x, "a": 2 * x}


def as_array(x):
    return x[..., :1] * x


def of_arguments(a, b=0.0):
    return b - 3 * a


def of_whole(parts):
    """Not of the parts, but of what holds them."""
    if isinstance(parts, dict):
        return parts["b"] - 3 * parts["a"]
    return of_arguments(*parts) if isinstance(parts, tuple) else of_arguments(parts)


@pytest.mark.parametrize("maker", [as_tuple, as_one, as_dict, as_array])
def test_a_function_is_called_with_several_outputs_as_in_its_source(source, target, maker):
    """Flax's stacks spread a tuple or dict over the arguments; the others pass it on."""
    taker = of_arguments if source.name in SPREADING else of_whole
    head = source.sequential(source.activation(taker), source.linear(WEIGHT_2))
    model = source.sequential(source.linear(WEIGHT), source.activation(maker), head)
    wanted = truth.linear(of_whole(maker(HIDDEN)), WEIGHT_2)
    converted = target.convert_from(source, model, sample_input=(3,))
    np.testing.assert_allclose(target.call(converted, X), wanted, rtol=1e-5, atol=1e-5)
    back = source.convert_from(target, converted, sample_input=(3,))
    np.testing.assert_allclose(source.call(back, X), wanted, rtol=1e-5, atol=1e-5)


def test_functions_are_the_same_objects_after_a_round_trip():
    model = nnx.Sequential(as_tuple, of_arguments, nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    for name in ("brainstate", "equinox"):
        back = interop.convert(interop.convert(model, to=name), to="nnx")
        assert list(back.layers[:2]) == [as_tuple, of_arguments]
    plain = interop.from_nnx(model)
    assert plain.layers[2].weight.value["weight"] is model.layers[2].kernel.get_value()


def test_several_functions_in_a_row_come_back_as_they_were():
    functions = [as_tuple, of_whole, as_dict, of_whole]
    model = eqx.nn.Sequential([eqx.nn.Lambda(fn) for fn in functions])
    wanted = of_whole(as_dict(of_whole(as_tuple(X))))
    for name in ("nnx", "linen"):
        converted = Framework(name).convert_from(Framework("equinox"), model)
        np.testing.assert_allclose(Framework(name).call(converted, X), wanted, rtol=1e-6)
        back = Framework("equinox").convert_from(Framework(name), converted)
        assert [layer.fn for layer in back[0].layers] == functions


SEQUENCE = array(2, 5, 3)


def sequences():
    rngs = nnx.Rngs(0)

    def rnn(**options):
        return nnx.RNN(nnx.GRUCell(4, 4, rngs=rngs), **options)

    def of_last(carry, states):
        return carry + states[:, -1]

    linear, head = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
    return {
        "every step": nnx.Sequential(linear, rnn(), nnx.LayerNorm(4, rngs=rngs), head),
        "last step": nnx.Sequential(linear, rnn(), lambda y: y[:, -1], head),
        "state": nnx.Sequential(linear, rnn(return_carry=True), of_last, head),
    }


@pytest.mark.parametrize("goal", [name for name in NAMES if name != "nnx"])
@pytest.mark.parametrize("case", ["every step", "last step", "state"])
def test_a_sequence_passes_through_a_stack(goal, case):
    model, target = sequences()[case], Framework(goal)
    converted = target.convert_from(Framework("nnx"), model, sample_input=(5, 3))
    np.testing.assert_allclose(
        target.call(converted, SEQUENCE), model(SEQUENCE), rtol=1e-5, atol=1e-5
    )
    back = Framework("nnx").convert_from(target, converted, sample_input=(5, 3))
    np.testing.assert_allclose(back(SEQUENCE), model(SEQUENCE), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["every step", "last step", "state"])
def test_equinox_takes_a_sequence_of_unknown_length(case):
    """Its own Linear and LayerNorm take one step, and so become composites."""
    model = sequences()[case]
    converted = interop.convert(model, to="equinox")
    np.testing.assert_allclose(
        jax.vmap(converted)(SEQUENCE), model(SEQUENCE), rtol=1e-5, atol=1e-5
    )


def test_indices_of_a_sequence_of_unknown_length_are_taken_by_equinox():
    """Its own Embedding takes one index, which is no sequence."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Embed(7, 3, rngs=rngs), nnx.RNN(nnx.GRUCell(3, 4, rngs=rngs)))
    ids = np.array([[0, 3, 6, 1], [5, 2, 2, 4]])
    converted = interop.convert(model, to="equinox")
    np.testing.assert_allclose(jax.vmap(converted)(ids), model(ids), rtol=1e-5, atol=1e-5)


def test_a_function_of_a_batch_may_take_and_return_several_arrays_in_equinox():
    model = nnx.Sequential(as_tuple, of_arguments)
    converted = interop.convert(model, to="equinox")
    assert isinstance(converted.layers[0], eqx.nn.Lambda)
    np.testing.assert_allclose(jax.vmap(converted)(X), of_arguments(*as_tuple(X)), rtol=1e-6)
