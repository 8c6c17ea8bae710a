"""Padding and pooling of images in every direction, against loops over NumPy."""

import functools

import brainstate
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import interop
from interop import formulas

from . import truth
from .cases import array
from .conftest import NAMES, Framework

nn = brainstate.nn
X = array(2, 7, 6, 4, seed=50)
SAME = ((1, 1), (0, 1))  # of windows of (3, 3) with strides (3, 2) over (7, 6)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=[name for name in NAMES if name != "brainstate"])
def other(request):
    fw = Framework(request.param)
    fw.needs("pool")
    return fw


def call(fw, model, x):
    """The output for images with their channels last."""
    return fw.to_channels_last(fw.call(model, fw.from_channels_last(x)))


# BrainState's layer, and what it computes: every option off its default.
LAYERS = [
    (nn.ZeroPad2d((1, 0, 2, 1)), lambda x: truth.padded(x, ((1, 0), (2, 1)))),
    (nn.ConstantPad2d((1, 2), 0.3), lambda x: truth.padded(x, ((1, 1), (2, 2)), value=0.3)),
    (nn.ReflectionPad2d((2, 1)), lambda x: truth.padded(x, ((2, 2), (1, 1)), "reflect")),
    (nn.ReplicationPad2d(1), lambda x: truth.padded(x, ((1, 1), (1, 1)), "replicate")),
    (nn.CircularPad2d((1, 2, 0, 1)), lambda x: truth.padded(x, ((1, 2), (0, 1)), "circular")),
    (
        nn.MaxPool2d((3, 2), 2, [(1, 0), (0, 1)]),
        lambda x: truth.pooled(x, np.max, (3, 2), (2, 2), ((1, 0), (0, 1)), -np.inf),
    ),
    (
        nn.AvgPool2d((3, 3), (1, 2), [(1, 2), (0, 1)]),
        lambda x: truth.pooled(x, np.nanmean, (3, 3), (1, 2), ((1, 2), (0, 1)), np.nan),
    ),
    (nn.AvgPool2d(2), lambda x: truth.pooled(x, np.mean, (2, 2))),
    (
        nn.LPPool2d(3.0, (2, 3), 1, 1),
        lambda x: (
            truth.pooled(np.abs(x) ** 3, np.mean, (2, 3), (1, 1), ((1, 1), (1, 1))) ** (1 / 3)
        ),
    ),
    (nn.AdaptiveAvgPool2d((4, None)), lambda x: truth.adapted(x, np.mean, (4, None))),
    (nn.AdaptiveMaxPool2d((3, 2)), lambda x: truth.adapted(x, np.max, (3, 2))),
]


@pytest.fixture(scope="module")
def stages():
    """The stack of all layers, and the truth after each of them."""
    values = [np.float64(X)]
    for _, fn in LAYERS:
        values.append(fn(values[-1]))
    return nn.Sequential(*[layer for layer, _ in LAYERS]), values


def test_each_layer_is_the_hand_written_formula(stages):
    stack, values = stages
    for layer, x, y in zip(stack.layers, values, values[1:], strict=False):
        close(layer(jnp.float32(x)), y)


def test_a_stack_of_them_converts_and_comes_back(stages, other):
    """By way of every type of layer, with the gradients, and back to the same types."""
    stack, values = stages
    model = other.convert_from(Framework("brainstate"), stack, sample_input=X.shape[1:])

    def loss(call):
        return jax.jit(jax.value_and_grad(lambda x: (call(x) ** 2).sum() / 2, has_aux=False))

    y, gradient = loss(lambda x: call(other, model, x))(X)
    wanted, exact = loss(stack)(X)
    close(y, (values[-1] ** 2).sum() / 2, 1e-4)
    close(wanted, y)
    close(gradient, exact, 1e-4)
    sample = other.from_channels_last(X).shape[1:]
    back = Framework("brainstate").convert_from(other, model, sample_input=sample)
    assert [type(layer) for layer in back.layers] == [type(layer) for layer in stack.layers]
    for found, layer in zip(back.layers, stack.layers, strict=True):
        for option in ("kernel_size", "norm_type", "value", "target_shape", "pool_dim"):
            assert getattr(found, option, None) == getattr(layer, option, None)


FLAX = {
    "max": functools.partial(nnx.max_pool, window_shape=(3, 2), padding=((1, 0), (0, 1))),
    "min": functools.partial(nnx.min_pool, window_shape=(3, 3), strides=(3, 2), padding="SAME"),
    "mean": functools.partial(
        nnx.avg_pool, window_shape=(3, 3), strides=(3, 2), padding="SAME"
    ),
    "covered": functools.partial(
        nnx.avg_pool,
        window_shape=(3, 3),
        strides=(3, 2),
        padding="SAME",
        count_include_pad=False,
    ),
    "fold": functools.partial(
        nnx.pool,
        init=1.0,
        reduce_fn=jax.lax.mul,
        window_shape=(2, 2),
        strides=None,
        padding=((1, 1), (0, 0)),
    ),
}
EXACT = {
    "max": lambda x: truth.pooled(x, np.max, (3, 2), (1, 1), ((1, 0), (0, 1)), -np.inf),
    "min": lambda x: truth.pooled(x, np.min, (3, 3), (3, 2), SAME, np.inf),
    "mean": lambda x: truth.pooled(x, np.mean, (3, 3), (3, 2), SAME),
    "covered": lambda x: truth.pooled(x, np.nanmean, (3, 3), (3, 2), SAME, np.nan),
    "fold": lambda x: truth.pooled(x, np.prod, (2, 2), (1, 1), ((1, 1), (0, 0)), 1.0),
}


@pytest.mark.parametrize("kind", FLAX)
def test_flax_functions_go_around_all_frameworks(kind):
    flax, close_to = Framework("nnx"), EXACT[kind](np.float64(X))
    model, source = nnx.Sequential(FLAX[kind]), flax
    close(model(X), close_to)
    for name in ("brainstate", "equinox", "linen", "nnx"):
        target = Framework(name)
        sample = source.from_channels_last(X).shape[1:]
        model = target.convert_from(source, model, sample_input=sample)
        close(call(target, model, X), close_to)
        source = target
    (back,) = model.layers
    assert back.func is FLAX[kind].func
    options = {"strides": (1, 1), "padding": "VALID"} | FLAX[kind].keywords
    assert {"strides": (1, 1)} | back.keywords == options | {
        "strides": options["strides"] or (1, 1),
        **({"count_include_pad": True} if kind == "mean" else {}),
        **({"padding": back.keywords["padding"]} if options["padding"] == "SAME" else {}),
    }


OF_EQUINOX = [
    (
        eqx.nn.MaxPool2d(3, 2, 1, use_ceil=True),
        lambda x: truth.pooled(x, np.max, (3, 3), (2, 2), ((1, 1), (1, 3)), -np.inf),
    ),
    (
        eqx.nn.AvgPool2d((2, 3), 1, ((1, 0), (2, 1))),
        lambda x: truth.pooled(x, np.mean, (2, 3), (1, 1), ((1, 0), (2, 1))),
    ),
    (
        eqx.nn.Pool(0.0, jax.lax.add, 2, 2, 2, 1),
        lambda x: truth.pooled(x, np.sum, (2, 2), (2, 2), ((1, 1), (1, 1))),
    ),
    (eqx.nn.AdaptiveMaxPool2d(2), lambda x: truth.adapted(x, np.max, (2, 2))),
    (
        eqx.nn.AdaptivePool((1, 2), 2, lambda x: jnp.sum(x**2)),
        lambda x: truth.adapted(x, lambda b, axis: ((b**2).sum(axis)) ** 2, (1, 2)),
    ),
]


@pytest.mark.parametrize("to", [name for name in NAMES if name != "equinox"])
def test_equinox_pools_convert_and_come_back(to):
    equinox, target = Framework("equinox"), Framework(to)
    target.needs("pool")
    model = eqx.nn.Sequential([layer for layer, _ in OF_EQUINOX])
    exact = np.float64(X)
    for _, fn in OF_EQUINOX:
        exact = fn(exact)
    close(call(equinox, model, X), exact, 1e-4)
    sample = equinox.from_channels_last(X).shape[1:]
    found = target.convert_from(equinox, model, sample_input=sample)
    close(call(target, found, X), exact, 1e-4)
    back = equinox.convert_from(target, found, sample_input=X.shape[1:])
    for layer, (wanted, _) in zip(back[0].layers, OF_EQUINOX, strict=True):
        assert type(layer) is type(wanted)
        assert vars(layer) == vars(wanted)


@pytest.mark.parametrize("pool", [eqx.nn.Pool(jnp.zeros(()), jax.lax.add, 2, 2)])
def test_what_a_pool_would_learn_is_refused(pool):
    with pytest.raises(interop.UnsupportedLayerError, match="init="):
        interop.convert(pool, to="nnx")


@pytest.mark.parametrize(
    "layer",
    [
        nn.AvgPool2d(2, padding="SAME"),
        nn.LPPool2d(3.0, 2),
        nn.MaxPool2d(2, padding=1),
        nn.AdaptiveAvgPool2d(3),
        nn.ConstantPad2d(1, 0.3),
    ],
)
def test_half_precision_stays_what_it_is(layer, other):
    x = jnp.asarray(X, jnp.bfloat16)
    model = other.convert_from(Framework("brainstate"), layer, sample_input=X.shape[1:])
    found, wanted = call(other, model, x), layer(x)
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(np.float32(found), np.float32(wanted))


def test_flax_counts_in_float32_what_others_count_in_the_dtype_of_the_input():
    x = jnp.asarray(X, jnp.bfloat16)
    for to in ("brainstate", "equinox"):
        target = Framework(to)
        model = target.convert_from(
            Framework("nnx"), nnx.Sequential(FLAX["covered"]), sample_input=X.shape[1:]
        )
        found, wanted = call(target, model, x), FLAX["covered"](x)
        assert found.dtype == wanted.dtype == jnp.float32
        close(found, wanted)


# -- maxima and where they were --

POOL = {"kernel_size": (3, 2), "stride": 2, "padding": (1, 0)}


def pooled_with_indices(x):
    return nn.MaxPool2d(**POOL, return_indices=True)(x)


def test_indices_are_those_of_the_maxima():
    """Of an image that the windows cover to its end, in which all versions count alike."""
    x = array(2, 7, 6, 3, seed=51)
    maxima, indices = pooled_with_indices(x)
    exact = truth.pooled(x, np.max, (3, 2), (2, 2), ((1, 1), (0, 0)), -np.inf)
    close(maxima, exact)
    for counted in ("input", "covered"):
        y, where = formulas.pool(
            x, (3, 2), strides=(2, 2), padding=((1, 1), (0, 0)), indices=counted
        )
        np.testing.assert_array_equal(y, maxima)
        shape = (2, 7 + (counted == "covered"), 6, 3)
        at = np.unravel_index(np.asarray(where), shape)
        np.testing.assert_array_equal(np.pad(x, [(0, 0), (0, 1), (0, 0), (0, 0)])[at], maxima)


def test_maxima_go_back_to_where_they_were(other):
    """In Equinox the indices count in the example, channels last; elsewhere in the batch."""
    x = array(2, 6, 6, 3, seed=52)
    pool = nn.MaxPool2d((3, 2), return_indices=True)
    unpool = nn.MaxUnpool2d((3, 2))
    brain = Framework("brainstate")
    pair = [other.convert_from(brain, m, sample_input=x.shape[1:]) for m in (pool, unpool)]
    y, where = pool(x)
    exact = np.zeros(x.size)
    exact[np.asarray(where).ravel()] = np.asarray(y).ravel()
    exact = exact.reshape(x.shape)
    np.testing.assert_array_equal(unpool(y, where), exact)
    found, at = other.call(pair[0], other.from_channels_last(x))
    if other.name == "equinox":
        images = jax.vmap(pair[1][0])(found, at)
        at = other.to_channels_last(at) + jnp.arange(2).reshape(2, 1, 1, 1) * x[0].size
    elif other.name == "linen":
        images = pair[1][0].apply(pair[1][1], found, at)
    else:
        images = pair[1](found, at)
    np.testing.assert_array_equal(other.to_channels_last(images), exact)
    np.testing.assert_array_equal(other.to_channels_last(found), y)
    np.testing.assert_array_equal(at, where)
    sample = other.from_channels_last(x).shape[1:]
    for m, cls in zip(pair, (nn.MaxPool2d, nn.MaxUnpool2d), strict=True):
        back = brain.convert_from(other, m, sample_input=sample)
        back = back.layers[0] if isinstance(back, nn.Sequential) else back
        assert type(back) is cls
        assert (back.kernel_size, back.stride) == ((3, 2), (3, 2))


@pytest.mark.parametrize("size", [None, 9, (9, 7), (2, 9, 7, 3)])
def test_unpooling_takes_the_size_of_its_output(size):
    x = array(2, 7, 6, 3, seed=53)
    y, where = pooled_with_indices(x)
    layer = nn.MaxUnpool2d(**POOL)
    module, variables = interop.to_linen(layer)
    found = module.apply(variables, y, where, output_size=size)
    np.testing.assert_array_equal(found, layer(y, where, output_size=size))


def test_channels_first_and_no_channels_are_carried(other):
    x = array(2, 4, 7, 6, seed=54)
    for layer in (
        nn.MaxPool2d((3, 2), 2, channel_axis=1),
        nn.AvgPool2d((3, 2), padding=1, channel_axis=None),
        nn.LPPool2d(1.5, 2, channel_axis=0),
        nn.AdaptiveAvgPool2d((3, 4), channel_axis=-3),
    ):
        model = other.convert_from(Framework("brainstate"), layer, sample_input=x.shape[1:])
        close(other.call(model, x), layer(x))


# -- between the two orders of axes --

K, B = array(3, 3, 4, 6, seed=55), array(6, seed=56)
OF_CHANNELS, OF_ALL = array(3, seed=57), array(7, 6, 3, seed=58)
OF_NEURONS, W = array(7 * 6 * 3, seed=59), array(7 * 6 * 3, 5, seed=60)


def network(fw):
    """With slopes for each channel, for each element of an image, and for each neuron."""
    first = fw.name == "equinox"
    order = fw.from_channels_last(np.arange(W.shape[0]).reshape(1, 7, 6, 3)).ravel()
    return fw.sequential(
        fw.conv(K, B, (7, 6, 4)),
        fw.activation(functools.partial(jax.nn.glu, axis=-3 if first else -1)),
        fw.prelu(OF_CHANNELS.reshape(3, 1, 1) if first else OF_CHANNELS),
        fw.prelu(fw.from_channels_last(OF_ALL[None])[0]),
        fw.flatten(),
        fw.prelu(OF_NEURONS[order]),
        fw.linear(W[order]),
    )


def test_slopes_and_gates_move_with_the_channels(source, target):
    source.needs("prelu")
    target.needs("prelu")
    y = truth.ACTIVATIONS["glu"](truth.conv(X, K, B, pads=((1, 1), (1, 1))))
    for slope in (OF_CHANNELS, OF_ALL):
        y = np.where(y >= 0, y, slope * y)
    y = y.reshape(2, -1)
    exact = np.where(y >= 0, y, OF_NEURONS * y) @ np.float64(W)
    samples = [fw.from_channels_last(X).shape[1:] for fw in (source, target)]
    model = target.convert_from(source, network(source), sample_input=samples[0])
    close(target.call(model, target.from_channels_last(X)), exact, 1e-4)
    back = source.convert_from(target, model, sample_input=samples[1])
    close(source.call(back, source.from_channels_last(X)), exact, 1e-4)
