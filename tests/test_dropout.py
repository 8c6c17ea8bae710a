"""Dropout: what is kept and how it is scaled, and where its random numbers come from."""

import brainstate
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import interop

from .cases import linear, stack
from .conftest import Framework

ONES = jnp.ones((40, 100))


def converted(source, target, rate):
    source.needs("dropout")
    target.needs("dropout")
    return target.convert_from(source, source.dropout(rate))


def test_training_drops_the_given_fraction_and_scales_the_rest(source, target):
    model = converted(source, target, 0.3)
    y = np.asarray(target.call(model, ONES, train=True, key=jax.random.key(0)))
    kept = y != 0
    assert 0.67 < kept.mean() < 0.73  # 4000 elements: four standard deviations
    np.testing.assert_allclose(y[kept], 1 / 0.7, rtol=1e-6)


def test_evaluation_changes_nothing(source, target):
    model = converted(source, target, 0.3)
    np.testing.assert_array_equal(target.call(model, ONES), ONES)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_the_ends_keep_all_or_nothing(source, target, rate):
    model = converted(source, target, rate)
    y = target.call(model, ONES, train=True, key=jax.random.key(0))
    np.testing.assert_array_equal(y, (1 - rate) * ONES)


def test_where_all_is_dropped_the_gradient_is_0(source, target):
    """Equinox's and BrainState's own layers have nan there: they divide by what is kept."""
    model = converted(source, target, 1.0)
    key = jax.random.key(0)
    target.call(model, ONES[:2], train=True, key=key)  # which sets the mode
    gradient = jax.grad(lambda x: target.call(model, x, train=True, key=key).sum())(ONES[:2])
    np.testing.assert_array_equal(gradient, 0 * ONES[:2])


def test_different_keys_give_different_masks_and_equal_keys_the_same(source, target):
    model = converted(source, target, 0.3)
    first, again, other = (
        np.asarray(target.call(model, ONES, train=True, key=jax.random.key(seed)))
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[0], first[1])  # nor is one mask used for all examples


def test_the_rate_does_not_drift_over_round_trips(source, target):
    source.needs("dropout")
    target.needs("dropout")
    for rate in (0.3, 0.1, 0.7, 0.15):
        model = source.dropout(rate)
        for _ in range(3):
            model = source.convert_from(target, target.convert_from(source, model))
        assert source.options(model) == source.options(source.dropout(rate))


def test_conversion_draws_no_random_numbers(source, target):
    source.needs("layer_norm")
    target.needs("layer_norm")
    model = stack(source)
    before = brainstate.random.DEFAULT.value, np.random.get_state()[1].copy()
    target.convert_from(source, model)
    assert brainstate.random.DEFAULT.value is before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


def counts(rngs):
    return jax.tree.map(int, nnx.to_pure_dict(nnx.state(rngs, nnx.RngCount)))


def test_only_dropout_forks_the_users_streams_as_native_layers_do():
    rngs = nnx.Rngs(0, dropout=1)
    interop.to_nnx(linear(Framework("brainstate")), rngs=rngs)
    assert counts(rngs) == counts(nnx.Rngs(0, dropout=1))
    model = interop.to_nnx(brainstate.nn.Dropout(0.7), rngs=rngs)
    native = nnx.Dropout(0.3, rngs=nnx.Rngs(0, dropout=1))
    model.train()
    np.testing.assert_array_equal(model(ONES), native(ONES))
    assert not np.array_equal(model(ONES), native(2 * ONES) / 4)


def test_training_without_a_key_is_an_error_in_every_host(source, target):
    model = converted(source, target, 0.3)
    if target.name == "brainstate":
        pytest.skip("brainstate has a random state of its own")
    with pytest.raises(Exception, match=r"(?i)rng|key"):
        target.call(model, ONES, train=True)


# -- BrainState's further kinds --

BRAIN = Framework("brainstate")
others = pytest.mark.parametrize("goal", ["nnx", "linen", "equinox"])


def trained(fw, model, x, seed=0):
    return np.float64(fw.call(model, x, train=True, key=jax.random.key(seed)))


@others
@pytest.mark.parametrize("prob", [0.7, 1.0])
def test_whole_channels_are_dropped_wherever_a_framework_has_them(goal, prob):
    """After a convolution that copies its input, so that their order is known."""
    fw = Framework(goal)
    kernel = jnp.eye(50).reshape(1, 1, 50, 50)
    model = brainstate.nn.Sequential(
        BRAIN.conv(kernel, None, (2, 3, 50)), brainstate.nn.Dropout2d(prob)
    )
    found = fw.convert_from(BRAIN, model, sample_input=(2, 3, 50))
    x = fw.from_channels_last(jnp.ones((40, 2, 3, 50)))
    y = np.asarray(fw.to_channels_last(trained(fw, found, x)))
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1, :1], y.shape))
    kept = y[:, 0, 0] != 0
    assert abs(kept.mean() - prob) <= (0.04 if prob < 1 else 0)  # 2000: four deviations
    np.testing.assert_allclose(y[:, 0, 0][kept], 1 / prob, rtol=1e-6)
    back = BRAIN.convert_from(fw, found, sample_input=x.shape[1:])
    assert type(back.layers[1]) is brainstate.nn.Dropout2d
    assert (back.layers[1].prob, back.layers[1].channel_axis) == (prob, -1)


@others
def test_alpha_dropout_keeps_mean_and_variance(goal):
    fw, x = Framework(goal), jax.random.normal(jax.random.key(1), (200, 4, 100))
    for layer in (
        brainstate.nn.AlphaDropout(0.7),
        brainstate.nn.FeatureAlphaDropout(0.7, channel_axis=2),
    ):
        model = fw.convert_from(BRAIN, layer)
        np.testing.assert_array_equal(fw.call(model, x), x)
        y = trained(fw, model, x)
        assert abs(y.mean()) < 0.05
        assert abs(y.std() - 1) < 0.05
        alpha, keep = -1.7580993408473766, 0.7
        scale = (keep * (1 + 0.3 * alpha**2)) ** -0.5
        dropped = np.isclose(y, scale * alpha * (1 - 0.3), atol=1e-5)
        assert abs(dropped.mean() - 0.3) < 0.02
        np.testing.assert_allclose(
            y[~dropped], scale * (np.float64(x)[~dropped] - 0.3 * alpha), rtol=1e-4, atol=1e-5
        )
        by_channel = (dropped == dropped[:, :1]).all()
        assert by_channel == (type(layer) is brainstate.nn.FeatureAlphaDropout)
        back = BRAIN.convert_from(fw, model)
        assert type(back) is type(layer)
        assert back.prob == 0.7


@others
def test_alpha_dropout_follows_its_channels(goal):
    fw = Framework(goal)
    kernel = jnp.eye(30).reshape(1, 1, 30, 30)
    model = brainstate.nn.Sequential(
        BRAIN.conv(kernel, None, (2, 3, 30)), brainstate.nn.FeatureAlphaDropout(0.5)
    )
    found = fw.convert_from(BRAIN, model, sample_input=(2, 3, 30))
    x = fw.from_channels_last(jnp.ones((20, 2, 3, 30)))
    y = fw.to_channels_last(trained(fw, found, x))
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1, :1], y.shape))
    assert len(np.unique(y[:, 0, 0].round(4))) == 2


@others
def test_a_fixed_mask_is_carried_over(goal):
    fw, layer = Framework(goal), brainstate.nn.DropoutFixed((5,), 0.5)
    brainstate.random.seed(3)
    layer.init_state()
    mask, x = layer.mask.value, jnp.arange(1.0, 6)
    assert 0 < mask.sum() < 5
    model = fw.convert_from(BRAIN, layer)
    if goal == "equinox":
        network, state = model
        y, state = network(x, state=state)
        np.testing.assert_array_equal(y, x)
        found, state = eqx.nn.inference_mode(network, False)(x, state=state)
        model = network, state
    else:
        np.testing.assert_array_equal(fw.call(model, x), x)
        found = fw.call(model, x, train=True)
    np.testing.assert_array_equal(found, np.where(mask, 2 * x, 0))
    back = BRAIN.convert_from(fw, model)
    assert type(back) is brainstate.nn.DropoutFixed
    np.testing.assert_array_equal(back.mask.value, mask)


def test_a_fixed_mask_moves_with_the_channels():
    brainstate.random.seed(3)
    layer = brainstate.nn.DropoutFixed((2, 3, 4), 0.5)
    layer.init_state()
    conv = BRAIN.conv(jnp.eye(4).reshape(1, 1, 4, 4), None, (2, 3, 4))
    make = eqx.nn.make_with_state(interop.to_equinox)
    network, state = make(brainstate.nn.Sequential(conv, layer))
    y, state = eqx.nn.inference_mode(network, False)(jnp.ones((4, 2, 3)), state)
    np.testing.assert_array_equal(jnp.moveaxis(y, 0, -1), np.where(layer.mask.value, 2, 0))
    back = interop.from_equinox(network, state=state, sample_input=(4, 2, 3))
    np.testing.assert_array_equal(back.layers[1].mask.value, layer.mask.value)


def test_a_mask_for_a_batch_has_no_place_where_examples_stand_alone():
    layer = brainstate.nn.DropoutFixed((5,), 0.5)
    layer.init_state(3)
    with pytest.raises(interop.UnsupportedLayerError, match="one example"):
        interop.to_equinox(layer)
    model = interop.to_nnx(layer)
    model.train()
    x = jnp.ones((3, 5))
    np.testing.assert_array_equal(model(x), np.where(layer.mask.value, 2, 0))


def test_a_fixed_dropout_without_a_mask_evaluates_only():
    model = interop.to_nnx(brainstate.nn.DropoutFixed((5,), 0.5))
    np.testing.assert_array_equal(model(ONES[:, :5]), ONES[:, :5])
    model.train()
    with pytest.raises(interop.ArgumentError, match=r"no mask yet.*init_state"):
        model(ONES[:, :5])


def test_a_decision_shared_by_the_batch_is_refused_where_examples_stand_alone():
    with pytest.raises(interop.UnsupportedLayerError, match="one example"):
        interop.to_equinox(brainstate.nn.Dropout(0.5, broadcast_dims=(0,)))
