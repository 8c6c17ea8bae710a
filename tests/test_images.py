"""Images through stacks: one framework has the channels first, and data cross the layouts."""

import functools

import brainstate
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import interop

from . import truth
from .cases import array
from .conftest import NAMES, Framework

X = array(2, 7, 6, 3, seed=30)  # of height 7, width 6 and 3 channels
K1, B1 = array(3, 3, 3, 4, seed=31), array(4, seed=32)
NORM = array(4, seed=33) + 2, array(4, seed=34), array(4, seed=35), array(4, positive=True)
K2, B2 = array(2, 3, 4, 5, seed=36), array(5, seed=37)
SPACE = 3, 4  # of the images that are flattened
W, B = array(3 * 4 * 5, 2, seed=38), array(2, seed=39)


def rows(fw):
    """The weight of the last layer for the order in which the framework flattens."""
    if fw.from_channels_last(X) is X:
        return W
    return W.reshape(*SPACE, 5, 2).transpose(2, 0, 1, 3).reshape(-1, 2)


def cnn(fw):
    return fw.sequential(
        fw.conv(K1, B1, (7, 6, 3), padding="SAME"),
        fw.batch_norm(*NORM, 1e-3, 0.9, shape=(7, 6, 4)),
        fw.activation(jax.nn.relu),
        fw.sequential(fw.conv(K2, B2, (7, 6, 4), strides=(2, 1), padding="VALID")),
        fw.flatten(),
        fw.activation(jnp.tanh),
        fw.linear(rows(fw), B),
    )


def expected(x, mean=NORM[2], var=NORM[3]):
    y = truth.conv(x, K1, B1, pads=((1, 1), (1, 1)))
    y = np.maximum(truth.batch_norm(y, NORM[0], NORM[1], mean, var, 1e-3), 0)
    y = truth.conv(y, K2, B2, (2, 1))
    return truth.linear(np.tanh(y.reshape(len(y), -1)), W, B)


def close(a, b, tolerance=1e-5):
    """Sums of up to 60 products, in other orders."""
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def converted(source, target, model=None):
    for feature in ("conv", "batch_norm", "flatten"):
        source.needs(feature)
        target.needs(feature)
    sample = source.from_channels_last(X).shape[1:]
    return target.convert_from(source, model or cnn(source), sample_input=sample)


def test_the_source_computes_the_hand_written_formula(source):
    source.needs("conv")
    close(source.call(cnn(source), source.from_channels_last(X)), expected(X))


def test_a_network_for_images_converts_in_evaluation_and_training(source, target):
    model = converted(source, target)
    given = target.from_channels_last(X)
    close(target.call(model, given), expected(X))
    hidden = truth.conv(X, K1, B1, pads=((1, 1), (1, 1)))
    y, _ = target.run(model, given, train=True)
    batch = hidden.mean((0, 1, 2)), hidden.var((0, 1, 2))
    close(y, expected(X, *batch), 1e-4)


def test_a_network_for_images_comes_back(source, target):
    model = converted(source, target)
    sample = target.from_channels_last(X).shape[1:]
    back = source.convert_from(target, model, sample_input=sample)
    close(source.call(back, source.from_channels_last(X)), expected(X))


def features(fw, *layers):
    return fw.sequential(fw.conv(K1, B1, (7, 6, 3)), *layers)


def same(source, target, model):
    found = converted(source, target, model)
    y = target.call(found, target.from_channels_last(X))
    wanted = source.call(model, source.from_channels_last(X))
    close(target.to_channels_last(y), source.to_channels_last(wanted))
    return found


def test_flattened_features_keep_their_order(source, target):
    """Nothing after the flattening could undo another order."""
    converted(source, target)
    same(source, target, features(source, source.flatten()))


def test_an_unknown_function_between_spatial_layers_sees_its_own_layout(source, target):
    axis = 0 if source.name == "equinox" else -1

    def shifted(x):
        return x - x.max(axis, keepdims=True)

    last = source.activation(shifted)
    found = same(source, target, features(source, last))
    sample = target.from_channels_last(X).shape[1:]
    back = source.convert_from(target, found, sample_input=sample)
    assert source.options(back)[-1] == source.options(features(source, last))[-1]


def test_a_function_before_a_norm_of_images_moves_with_it(source, target):
    for feature in ("functions", "flatten"):
        source.needs(feature)
        target.needs(feature)
    scale, shift = array(3, positive=True), array(3, seed=1)
    weight = array(7 * 6 * 3, 2, seed=2)
    own = weight
    if source.channels_first:
        own = weight.reshape(7, 6, 3, 2).transpose(2, 0, 1, 3).reshape(-1, 2)
    model = source.sequential(
        source.activation(jnp.sin),
        source.group_norm(scale, shift, groups=3, epsilon=1e-3),
        source.flatten(),
        source.linear(own, B),
    )
    sample = source.from_channels_last(X).shape[1:]
    found = target.convert_from(source, model, sample_input=sample)
    y = truth.group_norm(np.sin(X), scale, shift, groups=3, epsilon=1e-3)
    wanted = truth.linear(y.reshape(2, -1), weight, B)
    close(target.call(found, target.from_channels_last(X)), wanted)


def test_flattened_input_of_which_nothing_tells_that_it_has_channels_stays(source, target):
    """Also before a normalisation, whose channels are those of the flattened examples."""
    for feature in ("functions", "flatten"):
        source.needs(feature)
        target.needs(feature)
    scale, shift = array(7 * 6 * 3, positive=True), array(7 * 6 * 3, seed=1)
    for first in ([], [source.activation(jnp.sin)]):
        norm = source.group_norm(scale, shift, groups=3, epsilon=1e-3)
        model = source.sequential(*first, source.flatten(), norm)
        found = target.convert_from(source, model, sample_input=X.shape[1:])
        x = (np.sin(X) if first else np.float64(X)).reshape(2, -1)
        wanted = truth.group_norm(x, scale, shift, groups=3, epsilon=1e-3)
        close(target.call(found, X), wanted)


def test_softmax_over_channels_follows_them(source, target):
    axis = -3 if source.name == "equinox" else -1
    softmax = functools.partial(jax.nn.softmax, axis=axis)
    same(source, target, features(source, source.activation(softmax)))


def test_global_pooling_by_a_function_keeps_its_axes(source, target):
    def mean(x):  # a batch with its channels last, or one example with them first
        return x.mean((1, 2))

    same(
        source,
        target,
        features(source, source.activation(mean), source.linear(array(4, 2), array(2))),
    )


@pytest.mark.parametrize("origin", [name for name in NAMES if name != "equinox"])
def test_where_the_shape_decides_it_is_asked_for(origin):
    source = Framework(origin)
    for feature in ("conv", "flatten"):
        source.needs(feature)
    model, keywords = source.arguments(cnn(source))
    if origin == "brainstate":  # its layers know the shape
        eqx.nn.make_with_state(interop.to_equinox)(model)
        return
    with pytest.raises(interop.MissingShapeError, match="sample_input=") as e:
        interop.convert(model, to="equinox", **keywords)
    assert e.value.path == "model[4]"


def test_brainstate_asks_for_the_shape_of_images():
    layer = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    with pytest.raises(interop.MissingShapeError, match=r"of Conv .* sample_input=") as e:
        interop.from_nnx(nnx.Sequential(layer, jax.nn.relu))
    assert e.value.path == "model[0]"


@pytest.mark.parametrize("shape", [(7, 6, 4), (7, 6), (2, 7, 6, 3)])
def test_a_sample_that_contradicts_the_kernel_is_refused(shape):
    layer = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    with pytest.raises(
        interop.UnsupportedLayerError, match="2 axes of space and 3 features"
    ) as e:
        interop.from_nnx(layer, sample_input=shape)
    assert e.value.option == "sample_input"


def test_a_sample_of_another_rank_is_refused_between_layouts():
    layer = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    with pytest.raises(interop.ArgumentError, match="must have 3 axes"):
        interop.convert(
            nnx.Sequential(layer, jax.nn.relu), to="equinox", sample_input=(1, 7, 6, 3)
        )


@pytest.mark.parametrize("to", ["brainstate", "linen", "equinox"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_causal_padding_becomes_explicit(to, dilation):
    target, x = Framework(to), array(2, 7, 3)
    layer = nnx.Conv(3, 4, 3, padding="CAUSAL", kernel_dilation=dilation, rngs=nnx.Rngs(0))
    model = target.receive(lambda: interop.convert(layer, to=to, sample_input=(7, 3)))
    y = target.call(model, target.from_channels_last(x))
    close(target.to_channels_last(y), layer(x))


def test_a_layer_norm_over_channels_alone_moves_with_them_where_they_come_first():
    norm = nnx.LayerNorm(4, rngs=nnx.Rngs(0))
    norm.scale.set_value(array(4))
    model = nnx.Sequential(nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)), norm)
    target, x = Framework("equinox"), array(2, 7, 6, 3)
    converted = target.convert_from(Framework("nnx"), model, sample_input=(7, 6, 3))
    y = target.call(converted, target.from_channels_last(x))
    close(target.to_channels_last(y), model(x))


def test_a_layer_norm_over_whole_images_has_its_weights_moved():
    target, x = Framework("equinox"), X
    norm = nn.LayerNorm(reduction_axes=(-3, -2, -1), feature_axes=(-3, -2, -1))
    module = nn.Sequential([nn.Conv(4, (3, 3)), norm])
    params = {
        "layers_0": {"kernel": K1, "bias": B1},
        "layers_1": {"scale": array(7, 6, 4), "bias": array(7, 6, 4, seed=1)},
    }
    model = target.receive(
        lambda: interop.convert(
            module, to="equinox", params={"params": params}, sample_input=(7, 6, 3)
        )
    )
    y = target.to_channels_last(target.call(model, target.from_channels_last(x)))
    close(y, module.apply({"params": params}, x), 1e-4)


def test_a_linear_layer_on_images_is_refused_where_it_takes_vectors():
    model = nnx.Sequential(
        nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    )
    with pytest.raises(interop.UnsupportedLayerError, match="its input") as e:
        interop.convert(model, to="equinox", sample_input=(7, 6, 3))
    assert e.value.path == "model[1]"


def test_a_function_may_make_images_of_vectors():
    def image(x):
        return x.reshape(len(x), 7, 6, 3)

    model = nnx.Sequential(
        nnx.Linear(5, 126, rngs=nnx.Rngs(0)), image, nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(1))
    )
    target, x = Framework("equinox"), array(2, 5)
    found = target.receive(lambda: interop.convert(model, to="equinox", sample_input=(5,)))
    close(target.to_channels_last(target.call(found, x)), model(x))


def test_a_linear_layer_at_two_places_with_two_orders_is_refused():
    conv = brainstate.nn.Conv2d((2, 3, 1), 2, 1, padding="VALID")
    layer = brainstate.nn.Linear(12, 12)
    model = brainstate.nn.Sequential(conv, brainstate.nn.Flatten(1), layer, layer)
    with pytest.raises(interop.UnsupportedStructureError, match="two"):
        interop.to_equinox(model)


def test_pooling_between_convolutions(source, target):
    source.needs("pool")
    target.needs("pool")
    model = source.sequential(
        source.conv(K1, B1, (7, 6, 3)),
        source.max_pool((2, 3), (2, 1), ((1, 0), (0, 1))),
        source.avg_pool((2, 1), (1, 2)),
    )
    same(source, target, model)
    y = source.to_channels_last(source.call(model, source.from_channels_last(X)))
    x = truth.conv(X, K1, B1, pads=((1, 1), (1, 1)))
    x = np.pad(x, [(0, 0), (1, 0), (0, 1), (0, 0)], constant_values=-np.inf)
    x = np.lib.stride_tricks.sliding_window_view(x, (2, 3), (1, 2))[:, ::2].max((-2, -1))
    x = np.lib.stride_tricks.sliding_window_view(x, (2, 1), (1, 2))[:, :, ::2].mean((-2, -1))
    close(y, x)


@pytest.mark.parametrize("to", ["brainstate", "equinox"])
def test_same_padding_of_the_maximum_follows_the_shape(to):
    target = Framework(to)
    pool = functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2), padding="SAME")
    model = nnx.Sequential(nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)), pool)
    found = target.receive(lambda: interop.convert(model, to=to, sample_input=(7, 6, 3)))
    close(target.to_channels_last(target.call(found, target.from_channels_last(X))), model(X))


@pytest.mark.parametrize("to", ["brainstate", "equinox"])
@pytest.mark.parametrize("counted", [True, False])
def test_a_mean_over_padding_counts_it_as_before(to, counted):
    options = {"window_shape": (2, 2), "padding": "SAME", "count_include_pad": counted}
    pool = functools.partial(nnx.avg_pool, **options)
    model = nnx.Sequential(nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)), pool)
    target = Framework(to)
    found = target.convert_from(Framework("nnx"), model, sample_input=(7, 6, 3))
    close(target.to_channels_last(target.call(found, target.from_channels_last(X))), model(X))
    y = model.layers[0](X)
    last = y[:, -1, -1] / (4 if counted else 1)
    close(model(X)[:, -1, -1], last)
