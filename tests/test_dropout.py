"""Dropout: what is kept and how it is scaled, and where its random numbers come from."""

import brainstate
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
