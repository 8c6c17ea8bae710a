"""Weight-less functions: values and gradients, at their kinks too."""

import functools

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import interop
from interop import formulas

from . import truth
from .cases import array
from .conftest import NAMES, Framework

nn = brainstate.nn

# Class of BrainState, options off their defaults, and the same options in JAX's words.
LAYERS = {
    "celu": (nn.CELU, {"alpha": 0.7}, {"alpha": 0.7}),
    "elu": (nn.ELU, {"alpha": 0.7}, {"alpha": 0.7}),
    "gelu": (nn.GELU, {"approximate": False}, {"approximate": False}),
    "glu": (nn.GLU, {}, {}),
    "hard_shrink": (nn.Hardshrink, {"lambd": 1.0}, {"lambd": 1.0}),
    "hard_sigmoid": (nn.Hardsigmoid, {}, {}),
    "hard_silu": (nn.Hardswish, {}, {}),
    "hard_tanh": (
        nn.Hardtanh,
        {"min_val": -0.5, "max_val": 3},
        {"min_val": -0.5, "max_val": 3},
    ),
    "identity": (nn.Identity, {}, {}),
    "leaky_relu": (nn.LeakyReLU, {"negative_slope": 0.2}, {"negative_slope": 0.2}),
    "log_sigmoid": (nn.LogSigmoid, {}, {}),
    "log_softmax": (nn.LogSoftmax, {"dim": 1}, {"axis": 1}),
    "mish": (nn.Mish, {}, {}),
    "relu": (nn.ReLU, {}, {}),
    "relu6": (nn.ReLU6, {}, {}),
    "selu": (nn.SELU, {}, {}),
    "sigmoid": (nn.Sigmoid, {}, {}),
    "silu": (nn.SiLU, {}, {}),
    "soft_shrink": (nn.Softshrink, {"lambd": 1.0}, {"lambd": 1.0}),
    "soft_sign": (nn.Softsign, {}, {}),
    "softmax": (nn.Softmax, {"dim": -1}, {}),
    "softmin": (nn.Softmin, {"dim": -1}, {}),
    "softplus": (nn.Softplus, {}, {}),
    "tanh": (nn.Tanh, {}, {}),
    "tanh_shrink": (nn.Tanhshrink, {}, {}),
    "threshold": (
        nn.Threshold,
        {"threshold": 0.5, "value": 3.0},
        {"threshold": 0.5, "value": 3.0},
    ),
}

# 0 and every value at which one of the functions has a kink, with either options.
KINKS = jnp.array(
    [[-6.0, -3, -1, -0.5, -0.1, -0.0], [0, 0.1, 0.5, 1, 3, 6], [-7, -2, 2, 4, 7, 9]]
)


@pytest.fixture(params=[name for name in NAMES if name != "brainstate"])
def other(request):
    return Framework(request.param)


each_layer = pytest.mark.parametrize("name", LAYERS)


def value_and_gradient(call, x):
    """The output, and its gradient along a direction that weighs each element differently."""
    y, pull = jax.vjp(call, x)
    (gradient,) = pull(jnp.arange(1.0, 1 + y.size).reshape(y.shape))
    return y, gradient


def same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6, atol=2e-6)


def test_every_activation_is_tested():
    assert LAYERS.keys() == formulas.ACTIVATIONS.keys() == truth.ACTIVATIONS.keys()


@each_layer
def test_the_function_is_the_formula_and_brainstates_layer(name):
    cls, options, in_jax = LAYERS[name]
    call = functools.partial(formulas.ACTIVATIONS[name], **in_jax)
    same(value_and_gradient(call, KINKS), value_and_gradient(cls(**options), KINKS))
    exact = truth.ACTIVATIONS[name](np.float64(KINKS), **in_jax if "axis" not in in_jax else {})
    np.testing.assert_allclose(call(KINKS), exact, rtol=1e-5, atol=1e-6)


@each_layer
def test_brainstates_layer_converts_exactly(other, name):
    other.needs("activations")
    cls, options, _ = LAYERS[name]
    layer = cls(**options)
    model = other.receive(lambda: interop.convert(layer, to=other.name))
    same(
        value_and_gradient(lambda x: other.call(model, x), KINKS),
        value_and_gradient(layer, KINKS),
    )


@each_layer
def test_a_function_becomes_brainstates_layer(other, name):
    other.needs("activations")
    cls, options, in_jax = LAYERS[name]
    fn = formulas.ACTIVATIONS[name]
    if "axis" in in_jax and other.name == "equinox":
        in_jax = {"axis": in_jax["axis"] - 1}  # counted in one example
    native = other.activation(functools.partial(fn, **in_jax) if in_jax else fn)
    model = other.sequential(other.linear(jnp.eye(6)), native)
    target = Framework("brainstate")
    converted = target.convert_from(other, model)
    assert type(converted.layers[1]) is cls
    for option, value in options.items():
        assert getattr(converted.layers[1], option) == value
    same([target.call(converted, KINKS)], [other.call(model, KINKS)])


def test_softmax_over_channels_first_images_keeps_its_axis(other):
    other.needs("activations")
    layer, x = nn.Softmax2d(), array(2, 3, 4, 5)
    model = other.receive(lambda: interop.convert(layer, to=other.name))
    same([other.call(model, x)], [layer(x)])


def test_a_softmax_over_the_batch_is_refused_by_equinox():
    with pytest.raises(
        interop.UnsupportedLayerError, match="axis=0: it is the batch axis"
    ) as e:
        interop.to_equinox(nn.Softmax(dim=0))
    assert e.value.option == "axis"


@pytest.mark.parametrize(
    ("axes", "in_size"),
    [
        ((1, -1), None),
        ((1, 2), None),
        ((0, 1), (2, 3, 4)),
        ((1, -1), (2, 3, 4)),
        ((-2, -1), None),
    ],
)
def test_flatten_merges_the_same_axes(other, axes, in_size):
    other.needs("flatten")
    layer, x = nn.Flatten(*axes, in_size=in_size), array(5, 2, 3, 4)
    model = other.receive(lambda: interop.convert(layer, to=other.name))
    np.testing.assert_array_equal(other.call(model, x), layer(x))
    back = Framework("brainstate").convert_from(other, model)
    assert isinstance(back, nn.Flatten | nn.Sequential)
    np.testing.assert_array_equal(back(x), layer(x))


def test_a_flatten_of_the_batch_axis_is_refused_by_equinox():
    with pytest.raises(interop.UnsupportedLayerError, match="start_axis=0"):
        interop.to_equinox(nn.Flatten())


@pytest.mark.parametrize(("start", "end"), [(0, 3), (2, 1), (-4, -1)])
def test_flatten_refuses_axes_that_do_not_exist(start, end):
    with pytest.raises(ValueError, match="do not exist"):
        formulas.flatten(array(2, 3, 4), start, end)


def test_flatten_refuses_an_input_of_another_shape():
    with pytest.raises(ValueError, match="ending in"):
        formulas.flatten(array(2, 3, 4), 0, -1, (3, 5))


def test_the_complement_of_a_probability_is_free_of_float_noise():
    assert formulas.complement(0.7) == 0.3
    for p in np.random.default_rng(0).random(200):
        assert formulas.complement(formulas.complement(p)) == pytest.approx(p, abs=1e-15)
