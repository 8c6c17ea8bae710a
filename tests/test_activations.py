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
        np.testing.assert_allclose(x, y, rtol=5e-6, atol=2e-6)


def test_every_activation_is_tested():
    names = LAYERS.keys() | {"softmax_2d"}  # which needs images, below
    assert names == formulas.ACTIVATIONS.keys() == truth.ACTIVATIONS.keys()


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
    exact = truth.ACTIVATIONS["softmax_2d"](np.float64(x))
    np.testing.assert_allclose(other.call(model, x), exact, rtol=1e-5, atol=1e-6)
    same([other.call(model, x)], [layer(x)])
    back = Framework("brainstate").convert_from(other, model)
    assert type(back if other.name == "equinox" else back.layers[0]) is nn.Softmax2d


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


@pytest.mark.parametrize("sizes", [(3, 4), (2, -1, 2)])
def test_unflatten_splits_the_same_axis(other, sizes):
    other.needs("flatten")
    x = array(5, 12, 2)
    for layer in (nn.Unflatten(1, sizes), nn.Unflatten(-2, sizes, in_size=(12, 2))):
        model = other.receive(lambda layer=layer: interop.convert(layer, to=other.name))
        exact = np.reshape(x, (5, sizes[0], -1, 2) if len(sizes) == 2 else (5, 2, 3, 2, 2))
        np.testing.assert_array_equal(other.call(model, x), exact)
        np.testing.assert_array_equal(layer(x), exact)
        back = Framework("brainstate").convert_from(other, model)
        back = back.layers[0] if isinstance(back, nn.Sequential) else back
        assert type(back) is nn.Unflatten
        assert (back.axis, back.sizes) == (layer.axis, sizes)


def test_unflatten_between_vectors_and_images_keeps_their_order(other):
    other.needs("conv")
    brain = Framework("brainstate")
    weight, kernel, x = array(5, 24), array(2, 1, 4, 3), array(2, 5)
    model = nn.Sequential(
        brain.linear(weight), nn.Unflatten(1, (3, 2, 4)), brain.conv(kernel, None, (3, 2, 4))
    )
    found = other.convert_from(brain, model, sample_input=(5,))
    exact = truth.conv(
        truth.linear(x, weight).reshape(2, 3, 2, 4), kernel, pads=((0, 1), (0, 0))
    )
    y = other.to_channels_last(other.call(found, x))
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)
    back = brain.convert_from(other, found, sample_input=(5,))
    assert [type(layer) for layer in back.layers] == [type(layer) for layer in model.layers]


def test_unflatten_refuses_an_axis_that_does_not_exist():
    with pytest.raises(ValueError, match="does not exist"):
        formulas.unflatten(array(2, 3), 2, (1, 3))


def test_the_slopes_take_the_dtype_that_they_had(source, target):
    """Flax casts the slope to the input's dtype, the others promote both."""
    source.needs("prelu")
    target.needs("prelu")
    native = source.sequential(source.prelu(jnp.array(0.3)))
    model = target.convert_from(source, native)
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jnp.asarray(KINKS, dtype)
        found, wanted = target.call(model, x), source.call(native, x)
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(np.float32(found), np.float32(wanted))
    exact = np.where(KINKS >= 0, KINKS, 0.3 * np.float64(KINKS))
    np.testing.assert_allclose(target.call(model, KINKS), exact, rtol=1e-6)
    back = source.convert_from(target, model)
    assert kinds(source, back) == kinds(source, native)


def kinds(fw, model):
    module = fw.arguments(model)[0]
    return [type(part) for part in (module, *getattr(module, "layers", ()))]


def test_a_slope_trains_in_a_stack_of_any_framework(target):
    target.needs("prelu")
    model = nn.Sequential(Framework("brainstate").linear(jnp.eye(6)), nn.PReLU(6))
    found = target.convert_from(Framework("brainstate"), model)
    assert target.count(found) == 2
    y = target.call(target.step(found, KINKS), KINKS)
    x = np.float64(KINKS)
    low = np.minimum(x, 0)
    slope = 0.25 - target.RATE * (2 * 0.25 * low**2).sum(0)
    scale = np.where(x >= 0, 1, 0.25)
    weight = np.eye(6) - target.RATE * x.T @ (2 * scale**2 * x)
    z = x @ weight
    np.testing.assert_allclose(y, np.where(z >= 0, z, slope * z), rtol=1e-4)


def test_a_slope_for_each_example_has_no_place_where_examples_stand_alone():
    layer = nn.PReLU((3, 6))
    with pytest.raises(interop.UnsupportedLayerError, match="one example"):
        interop.convert(layer, to="equinox", sample_input=(6,))


SPIKES = {
    "or": [0, 1, 1, 1],
    "and": [0, 0, 0, 1],
    "xor": [0, 1, 1, 0],
    "iand": [0, 1, 0, 0],
    "ixor": [0, 1, 1, 0],
}


@pytest.mark.parametrize("op", SPIKES)
def test_operations_on_spikes_are_those_of_their_tables(other, op):
    other.needs("activations")
    x, y = jnp.array([[0.0, 0, 1, 1]]), jnp.array([[0.0, 1, 0, 1]])
    model = other.convert_from(Framework("brainstate"), nn.SpikeBitwise(op))
    module, keywords = other.arguments(model)
    if other.name == "linen":
        found = module.apply(keywords["params"], x, y)
    else:
        found = jax.vmap(module)(x, y)
    np.testing.assert_array_equal(found, [SPIKES[op]])
    back = Framework("brainstate").convert_from(other, model)
    assert (type(back), back.op) == (nn.SpikeBitwise, op)


def test_what_brainstate_cannot_compute_with_spikes_is_refused():
    with pytest.raises(interop.UnsupportedLayerError, match="op='add'"):
        interop.to_nnx(nn.SpikeBitwise("add"))


def test_a_layer_that_draws_in_evaluation_is_refused_with_the_reason(other):
    other.needs("activations")
    with pytest.raises(interop.UnsupportedLayerError, match=r"at each call, in evaluation too"):
        interop.convert(nn.RReLU(), to=other.name)
    (row,) = interop.explain(nn.RReLU(), to=other.name).rows
    assert row.how == "refused"
    assert "RReLU" not in interop.supported_layers(other.name)[other.name]


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
