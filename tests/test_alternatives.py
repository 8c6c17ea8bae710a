"""What README says of ``brainstate.interop`` and ``flax.nnx.bridge`` beside this library."""

from __future__ import annotations

import brainstate
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brainstate import interop as peer
from flax import nnx

import interop
import shims

from .cases import X

RNGS = nnx.Rngs(0)


def test_conversion_without_brainstate_on_either_side():
    layer = nnx.Linear(3, 4, rngs=RNGS)
    with pytest.raises(peer.UnmappedLayerError):
        peer.to_equinox(layer)
    assert interop.to_equinox(layer).weight.shape == (4, 3)


def test_activations():
    model = brainstate.nn.Sequential(brainstate.nn.Linear(3, 4), brainstate.nn.ReLU())
    with pytest.raises(peer.UnmappedLayerError):
        peer.to_nnx(model, rngs=RNGS)
    np.testing.assert_allclose(interop.to_nnx(model)(X), model(X), rtol=1e-6)


def test_a_layer_used_twice():
    layer = brainstate.nn.Linear(3, 3)
    model = brainstate.nn.Sequential(layer, layer)
    theirs, ours = peer.to_nnx(model, rngs=RNGS), interop.to_nnx(model)
    assert theirs.layers[0] is not theirs.layers[1]
    assert ours.layers[0] is ours.layers[1]


class Doubled(brainstate.nn.Linear):
    def update(self, x):
        return 2 * super().update(x)


def test_a_changed_forward_method():
    layer = Doubled(3, 4)
    assert not np.allclose(peer.to_nnx(layer, rngs=RNGS)(X), layer(X))
    with pytest.raises(interop.UnsupportedLayerError, match="overrides update"):
        interop.to_nnx(layer)


def test_an_option():
    layer = brainstate.nn.Linear(3, 4, w_mask=jnp.zeros((3, 4)))
    assert not np.allclose(peer.to_nnx(layer, rngs=RNGS)(X), layer(X))
    np.testing.assert_allclose(interop.to_nnx(layer)(X), layer(X))


def test_random_state():
    def state():
        return np.asarray(jax.random.key_data(brainstate.random.DEFAULT.value))

    before = state()
    interop.from_nnx(nnx.Linear(3, 4, rngs=RNGS))
    assert (state() == before).all()
    peer.from_nnx(nnx.Linear(3, 4, rngs=RNGS))
    assert (state() != before).any()


def test_the_bridge_takes_flax_alone():
    with pytest.raises(AttributeError):
        nnx.bridge.ToNNX(brainstate.nn.Linear(3, 4), rngs=RNGS).lazy_init(X)


def test_weights_that_do_not_fit():
    assert nnx.bridge.ToLinen(nnx.Linear, args=(3, 4)).apply({}, X).shape == (5, 4)
    with pytest.raises(interop.ConversionError, match="missing params/bias, params/kernel"):
        shims.ToLinen(nnx.Linear(3, 4, rngs=RNGS)).apply({}, X)


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic: bool = False):
        return nn.Dropout(0.5)(x, deterministic=deterministic)


def test_the_switch_reaches_dropout():
    theirs = nnx.bridge.ToNNX(Dropping(), rngs=nnx.Rngs(0, dropout=1)).lazy_init(X)
    ours = shims.ToNNX(Dropping(), params={}, rngs=nnx.Rngs(0))
    for model in (theirs, ours):
        model.eval()
    assert not (theirs(X) == X).all()
    np.testing.assert_array_equal(ours(X), X)


def test_what_the_others_have_no_name_for():
    for module in (peer, nnx.bridge):
        assert not {"explain", "compare", "mapping"} & set(dir(module))
