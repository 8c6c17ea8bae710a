"""Two models are compared by outputs, gradients, and layer by layer."""

import brainstate
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import interop

from . import test_images as images
from .cases import (
    BIAS,
    EPSILON,
    MEAN,
    MOMENTUM,
    SCALE,
    SHIFT,
    VAR,
    WEIGHT,
    WEIGHT_2,
    X,
    array,
)
from .conftest import Framework


def stack(fw):
    return fw.sequential(
        fw.batch_norm(SCALE, SHIFT, MEAN, VAR, EPSILON, MOMENTUM),
        fw.linear(WEIGHT, BIAS),
        fw.activation(jnp.tanh),
        fw.sequential(fw.linear(WEIGHT_2)),
    )


@pytest.mark.parametrize("train", [False, True])
def test_converted_models_are_equivalent(source, target, train):
    source.needs("batch_norm")
    target.needs("batch_norm")
    model = stack(source)
    converted = target.convert_from(source, model, sample_input=(3,))
    before = [dict(arrays) for arrays in source.read(model)]
    comparison = interop.compare(model, converted, X, train=train)
    assert comparison.ok, str(comparison)
    assert comparison.unmapped is None
    assert len(comparison.layers) == 4
    assert len(comparison.parameters) == 5
    assert comparison.inputs[0].absolute < 1e-3
    same = jax.tree.map(np.array_equal, before, source.read(model))
    assert all(jax.tree.leaves(same))  # running statistics stayed, also in training
    interop.assert_equivalent(model, converted, X, train=train)


def with_change(fw, change):
    """Two linear layers; ``change`` is added to one element of the second's weight."""
    weight = WEIGHT_2.at[0, 1].add(change)
    layers = fw.linear(WEIGHT, BIAS), fw.activation(jnp.tanh), fw.linear(weight)
    return fw.sequential(*layers, fw.activation(jnp.tanh))


def test_the_first_layer_that_departs_is_named():
    a, b = with_change(Framework("nnx"), 0.0), with_change(Framework("equinox"), 0.1)
    comparison = interop.compare(a, b, X)
    assert not comparison.ok
    assert comparison.departs.path == "model[2]"
    hidden = np.tanh(np.float64(X) @ WEIGHT + BIAS)
    absolute = np.abs(0.1 * hidden[:, 0]).max()
    assert comparison.departs.outputs.absolute == pytest.approx(absolute, rel=1e-4)
    largest = np.abs(hidden @ np.float64(WEIGHT_2)).max()
    assert comparison.departs.outputs.relative == pytest.approx(absolute / largest, rel=1e-4)
    with pytest.raises(AssertionError, match="the first layer that departs is model") as e:
        interop.assert_equivalent(a, b, X)
    assert isinstance(e.value, interop.NotEquivalentError)
    assert any(line.startswith("outputs: ") for line in e.value.beyond)
    assert "model[2]" in str(comparison)
    interop.assert_equivalent(a, b, X, rtol=1.0, atol=1.0)


@pytest.mark.parametrize("into", ["nnx", "equinox"])
def test_a_layer_of_another_shape_departs(into):
    """Also where the next layer makes the same shape of it."""
    a = Framework("linen").sequential(*map(Framework("linen").linear, (WEIGHT, WEIGHT_2)))
    other = Framework(into)
    b = other.sequential(other.linear(array(3, 5)), other.linear(array(5, 2)))
    comparison = interop.compare(a, b, X)
    assert comparison.departs.path == "model[0]"
    assert comparison.departs.outputs.absolute == np.inf
    assert "the first layer that departs is model[0]" in str(comparison)
    assert isinstance(comparison.unmapped, interop.ConversionError)


def test_a_small_stack_is_compared_layer_by_layer(source, target):
    model = source.sequential(source.linear(WEIGHT, BIAS), source.activation(jnp.tanh))
    converted = target.convert_from(source, model)
    comparison = interop.compare(model, converted, X)
    assert comparison.ok, str(comparison)
    assert [layer.path for layer in comparison.layers] == ["model[0]", "model[1]"]
    assert len(comparison.parameters) == 2


IMAGE_PAIRS = [("brainstate", "equinox"), ("equinox", "linen"), ("nnx", "brainstate")]


@pytest.mark.parametrize(("a", "b"), IMAGE_PAIRS)
def test_networks_for_images_are_compared_layer_by_layer_across_layouts(a, b):
    """Also where the elements of a flattened image have another order."""
    first, second = Framework(a), Framework(b)
    x = first.from_channels_last(images.X)
    comparison = interop.compare(images.cnn(first), images.cnn(second), x)
    assert comparison.ok, str(comparison)
    places = [f"model[{place}]" for place in ("0", "1", "2", "3][0", "4", "5", "6")]
    assert [layer.path for layer in comparison.layers] == places
    assert max(layer.outputs.relative for layer in comparison.layers) < 1e-5


@pytest.mark.parametrize(("a", "b"), IMAGE_PAIRS)
@pytest.mark.parametrize(
    ("name", "path"), [("K2", "model[3][0]"), ("NORM", "model[1]"), ("W", "model[6]")]
)
def test_the_first_layer_of_a_network_for_images_that_departs_is_named(
    monkeypatch, a, b, name, path
):
    first, second = Framework(a), Framework(b)
    model = images.cnn(first)
    changed = jax.tree.map(lambda array: array.at[..., 0].add(0.5), getattr(images, name))
    monkeypatch.setattr(images, name, changed)
    x = first.from_channels_last(images.X)
    assert interop.compare(model, images.cnn(second), x).departs.path == path


def test_images_with_as_many_channels_as_rows_are_not_turned():
    """No order of axes can then be told from the shapes."""
    source, target = Framework("equinox"), Framework("nnx")
    kernel, x = array(3, 3, 4, 4, seed=70), array(2, 4, 4, 4, seed=71)
    models = [fw.sequential(fw.conv(kernel, BIAS, (4, 4, 4))) for fw in (source, target)]
    assert interop.compare(*models, x).ok
    assert interop.compare(*models[::-1], x).ok


def test_a_layer_at_two_places_is_compared_at_both():
    layer = Framework("nnx").linear(array(3, 3))
    model = nnx.Sequential(layer, jnp.tanh, layer)
    paths = [x.path for x in interop.compare(model, interop.from_nnx(model), X).layers]
    assert paths == ["model[0]", "model[1]", "model[2]"]


def test_equal_outputs_with_other_gradients_are_not_equivalent():
    """The straight-through trick: the value of one function, the gradient of another."""

    def tanh(x):
        return x + jax.lax.stop_gradient(jnp.tanh(x) - x)

    a = Framework("nnx").sequential(Framework("nnx").linear(WEIGHT, BIAS), jnp.tanh)
    b = Framework("nnx").sequential(Framework("nnx").linear(WEIGHT, BIAS), tanh)
    comparison = interop.compare(a, b, X)
    assert comparison.outputs.absolute < 1e-6
    assert comparison.departs is None
    beyond = comparison.beyond(1e-3, 1e-3)
    assert [line.partition(":")[0] for line in beyond] == [
        "gradient of input 0",
        "gradient of layers[0].bias",
        "gradient of layers[0].kernel",
    ]


def test_models_of_their_own_forward_logic_are_compared_as_a_whole():
    comparison = interop.compare(
        Framework("nnx").custom(WEIGHT, BIAS), Framework("nnx").custom(WEIGHT, BIAS), X
    )
    assert comparison.outputs.absolute == 0
    assert comparison.layers == ()
    assert isinstance(comparison.unmapped, interop.UnsupportedStructureError)
    with pytest.raises(interop.UnsupportedStructureError):
        interop.assert_equivalent(
            Framework("nnx").custom(WEIGHT, BIAS), Framework("nnx").custom(WEIGHT, BIAS), X
        )


@pytest.mark.parametrize(("dtype", "rtol"), [("bfloat16", 5e-2), ("float16", 1e-2)])
def test_tolerances_follow_the_narrowest_dtype(dtype, rtol):
    model = Framework("nnx").linear(WEIGHT.astype(dtype), BIAS.astype(dtype))
    comparison = interop.compare(model, interop.from_nnx(model), X.astype(dtype))
    assert (comparison.rtol, comparison.atol) == (rtol, rtol)
    assert comparison.ok, str(comparison)
    assert interop.compare(stack(Framework("nnx")), stack(Framework("nnx")), X).rtol == 2e-5


def test_not_a_number_differs_from_a_number_alone():
    model = Framework("nnx").linear(WEIGHT, BIAS.at[0].set(jnp.nan))
    assert interop.compare(model, interop.from_nnx(model), X).ok
    comparison = interop.compare(Framework("nnx").linear(WEIGHT, BIAS), model, X)
    assert comparison.outputs.absolute == np.inf
    assert not comparison.ok


class Turned(nnx.Module):
    """Complex outputs of real weights."""

    def __init__(self, weight, sign=1):
        self.weight, self.sign = nnx.Param(weight), sign

    def __call__(self, x):
        return jax.lax.complex(x @ self.weight, self.sign * x @ self.weight)


def test_complex_outputs_are_compared_as_such():
    turned = Turned(WEIGHT)
    assert interop.compare(turned, Turned(WEIGHT), X).outputs.absolute == 0
    found = interop.compare(turned, Turned(WEIGHT, -1), X)
    imaginary = np.asarray(X, np.float64) @ np.asarray(WEIGHT, np.float64)
    assert found.outputs.absolute == pytest.approx(2 * np.abs(imaginary).max(), rel=1e-6)
    assert found.rtol == 2e-5


class Cast(nnx.Module):
    def __init__(self, dtype):
        self.dtype = dtype

    def __call__(self, x):
        return {"y": x.astype(self.dtype), "z": x}


def test_dtypes_that_differ_are_told_and_are_no_difference_of_values():
    x = jnp.ones((2, 3))
    found = interop.compare(Cast("float32"), Cast("bfloat16"), x)
    assert found.dtypes == ("outputs['y']: float32 and bfloat16",)
    assert found.outputs.absolute == 0
    assert "dtype of outputs['y']: float32 and bfloat16" in str(found)
    assert interop.compare(Cast("float32"), Cast("float32"), x).dtypes == ()


def dropout():
    return nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.5))


LINEAR = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
BAD = {
    "no input": (lambda: interop.compare(LINEAR, LINEAR), "at least one batch"),
    "another number of features": (
        lambda: interop.compare(LINEAR, LINEAR, array(2, 7)),
        r"^model: the nnx model fails on inputs of shape \(2, 7\)",
    ),
    "no model": (lambda: interop.compare(LINEAR, 3.0, X), "not a module"),
    "masks": (
        lambda: interop.compare(dropout(), dropout(), X, train=True),
        r"^model\[1\]: masks of dropout differ",
    ),
    "other outputs": (
        lambda: interop.compare(LINEAR, nnx.Linear(3, 5, rngs=nnx.Rngs(0)), X),
        "different shapes, \\(5, 4\\) and \\(5, 5\\)",
    ),
    "linen alone": (lambda: interop.compare(nn.Dense(4), LINEAR, X), "weights outside"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_compared_is_refused_with_the_reason(name):
    call, words = BAD[name]
    with pytest.raises(interop.InteropError, match=words):
        call()


def test_dropout_is_compared_in_evaluation():
    model = dropout()
    assert interop.compare(model, interop.from_nnx(model), X).ok
    half = brainstate.nn.Dropout(1.0)
    assert interop.compare(half, interop.to_nnx(half), array(5, 3), train=True).ok


def test_nothing_is_compared_inside_a_transformation():
    model = brainstate.nn.Linear(3, 4)

    @jax.jit
    def run(x):
        return interop.compare(model, model, x).outputs.absolute

    with pytest.raises(interop.ArgumentError, match="inside a JAX transformation"):
        run(jnp.ones((2, 3)))
