"""``brainstate.interop``: the same names, parameters and results, wherever it converts."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brainstate import interop as peer

import interop

from .cases import (
    BIAS,
    BIAS_2,
    EPSILON,
    INDICES,
    MOMENTUM,
    SCALE,
    SCALE_6,
    SHIFT,
    SHIFT_6,
    TABLE,
    WEIGHT,
    WEIGHT_2,
    X,
    array,
)
from .conftest import Framework

PAIRS = [(name, there) for name in ("nnx", "linen", "equinox") for there in (True, False)]
IMAGES = {space: array(2, *(5, 4, 3)[:space], 6, seed=20) for space in (1, 2, 3)}
MEAN_6, VAR_6 = array(6, seed=21), array(6, seed=22, positive=True)


def conv(space):
    kernel = array(*(3, 2, 1)[:space], 6, 4, seed=23)
    x = IMAGES[space]
    return lambda fw: fw.conv(kernel, array(4, seed=24), x.shape[1:], padding="SAME"), x


def batch_norm(space):
    x, arrays = IMAGES[space], (SCALE_6, SHIFT_6, MEAN_6, VAR_6, EPSILON, MOMENTUM)
    return lambda fw: fw.batch_norm(*arrays, shape=x.shape[1:]), x


LSTM = array(3, 16, seed=25), array(4, 16, seed=26), array(16, seed=27)
XS, STATE = array(3, 2, 3, seed=28), (array(2, 4, seed=29), array(2, 4, seed=30))
# The layers that the guide lists: a model in each framework, and a batch for it.
LAYERS = {
    "Linear": (lambda fw: fw.linear(WEIGHT, BIAS), X),
    "Embedding": (lambda fw: fw.embedding(TABLE), INDICES),
    "LayerNorm": (lambda fw: fw.layer_norm(SCALE, SHIFT, EPSILON), X),
    "RMSNorm": (lambda fw: fw.rms_norm(SCALE, EPSILON), X),
    "GroupNorm": (lambda fw: fw.group_norm(SCALE_6, SHIFT_6, 2, EPSILON), IMAGES[2]),
    "Dropout": (lambda fw: fw.dropout(0.3), X),
    "LSTMCell": (lambda fw: fw.lstm(*LSTM), None),
    **{f"BatchNorm{space}d": batch_norm(space) for space in (1, 2, 3)},
    **{f"Conv{space}d": conv(space) for space in (1, 2, 3)},
    "Sequential": (
        lambda fw: fw.sequential(
            fw.linear(WEIGHT, BIAS), fw.sequential(fw.linear(WEIGHT_2, BIAS_2))
        ),
        X,
    ),
}


@pytest.mark.parametrize("name", [name for name in peer.__all__ if not name.endswith("Error")])
def test_every_name_takes_what_the_peer_takes_in_the_same_way(name):
    own, theirs = getattr(interop, name), getattr(peer, name)
    own, theirs = (inspect.signature(f).parameters for f in (own, theirs))
    facts = {name: (p.kind, p.default) for name, p in own.items()}
    assert [name for name in own if name in theirs] == list(theirs)
    assert {name: facts[name] for name in theirs} == {
        name: (p.kind, p.default) for name, p in theirs.items()
    }
    added = [p for name, p in own.items() if name not in theirs]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in added)


def test_an_error_of_the_peer_s_name_is_caught_as_the_peer_s_is():
    names = [name for name in peer.__all__ if name.endswith("Error")]
    for a, b in itertools.product(names, names):
        if issubclass(getattr(peer, a), getattr(peer, b)):
            assert issubclass(getattr(interop, a), getattr(interop, b))


def test_the_library_has_every_name_of_the_peer():
    assert set(peer.__all__) <= set(interop.__all__)


def test_supported_layers_has_the_form_of_the_peer_s_and_no_fewer_names():
    own, theirs = interop.supported_layers(), peer.supported_layers()
    assert own.keys() == theirs.keys()
    for framework, names in theirs.items():
        assert names == sorted(names)
        assert set(names) <= set(own[framework])
        assert interop.supported_layers(framework) == {framework: own[framework]}
        assert peer.supported_layers(framework) == {framework: names}


def outputs(fw, model, x):
    if x is None:
        return fw.steps(model, XS, *STATE)
    return (fw.to_channels_last(fw.call(model, fw.from_channels_last(x))),)


def classes(model):
    """The classes of a model's layers, without its containers of arrays."""
    module = model[0] if isinstance(model, tuple) else model
    layers = getattr(module, "layers", None)
    inner = () if layers is None else layers
    return [type(module).__name__, *(name for layer in inner for name in classes(layer))]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("name", "there"), PAIRS)
def test_every_layer_that_the_peer_converts_gives_the_same(name, there, layer):
    build, x = LAYERS[layer]
    hub, other = Framework("brainstate"), Framework(name)
    source, target = (hub, other) if there else (other, hub)
    function = f"{'to' if there else 'from'}_{name}"
    if name == "equinox" and layer.startswith("BatchNorm"):
        pytest.skip("brainstate.interop has no rule for batch normalisation of Equinox")
    module, keywords = source.arguments(build(source))
    given = keywords if name == "linen" and not there else {}
    shapes = [{}, {}]
    if not there and x is not None:  # Equinox's examples have their channels first, not there
        shapes = [
            {"sample_input": batch.shape[1:]} for batch in (source.from_channels_last(x), x)
        ]
    own = target.receive(lambda: getattr(interop, function)(module, **given, **shapes[0]))
    theirs = getattr(peer, function)(module, **given, **shapes[1])
    if isinstance(own, tuple) and not isinstance(theirs, tuple):
        own, _ = own  # a model without state, and none
    assert classes(own) == classes(theirs)
    for a, b in zip(outputs(target, own, x), outputs(target, theirs, x), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)
    arrays = [jax.tree.leaves(target.read(model)) for model in (own, theirs)]
    for a, b in zip(*arrays, strict=True):
        np.testing.assert_array_equal(jnp.ravel(a), jnp.ravel(b))
