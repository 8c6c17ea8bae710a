"""Donated host values: a live link keeps the guest working; elsewhere ``copy=True`` does."""

import brainstate
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

import interop
import shims

from . import live
from .live import X

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
KEY = jax.random.key(0)
IN_PLACE = ("brainstate", "nnx")  # what changes in place has the new values at once


def moved(tree):
    """Every floating-point array plus one: all buffers can be donated and used again."""
    return jax.tree.map(lambda a: a + 1 if eqx.is_inexact_array(a) else a, tree)


_donating = jax.jit(moved, donate_argnums=0)


class InNnx:
    def __init__(self, module, **options):
        self.shim = shims.wrap(module, into="nnx", **options)
        self.shim.eval()

    def donate(self):
        step = nnx.jit(lambda m: nnx.update(m, moved(nnx.state(m))), donate_argnums=0)
        step(self.shim)

    def __call__(self, x):
        return self.shim(x)

    def unwrap(self):
        return self.shim.unwrap()


class InBrainState(InNnx):
    def __init__(self, module, **options):
        self.shim = shims.wrap(module, into="brainstate", **options)

    def donate(self):
        states = self.shim.states()
        after = _donating({path: state.value for path, state in states.items()})
        for path, value in after.items():
            states[path].value = value

    def __call__(self, x):
        with brainstate.environ.context(fit=False):
            return self.shim(x)


class InLinen:
    def __init__(self, module, **options):
        self.shim = shims.wrap(module, into="linen", **options)
        self.variables = self.shim.init(KEY, X, deterministic=True)

    def donate(self):
        self.variables = _donating(self.variables)

    def __call__(self, x):
        return self.shim.apply(self.variables, x, deterministic=True)

    def unwrap(self):
        return self.shim.unwrap(self.variables)

    def write_back(self):
        self.shim.write_back(self.variables)


class InEquinox:
    def __init__(self, module, **options):
        make = eqx.nn.make_with_state(shims.ToEquinox)
        shim, self.state = make(module, batched=True, **options)
        self.shim = eqx.nn.inference_mode(shim)

    def donate(self):
        step = eqx.filter_jit(lambda shim, state: moved((shim, state)), donate="all")
        self.shim, self.state = step(self.shim, self.state)

    def __call__(self, x):
        return self.shim(x, self.state)[0]

    def unwrap(self):
        return self.shim.unwrap(self.state)

    def write_back(self):
        self.shim.write_back(self.state)


HOSTS = {"nnx": InNnx, "brainstate": InBrainState, "linen": InLinen, "equinox": InEquinox}
PLUS_ONE = (
    {k: a + 1 for k, a in live.PARAMS.items()},
    {k: a + 1 for k, a in live.STATS.items()},
)
BEFORE, _ = live.truth(live.PARAMS, live.STATS, X, False)
AFTER, _ = live.truth(*PLUS_ONE, X, False)


@pytest.fixture
def hosted(source, target, monkeypatch):
    for name in ("PARAMS", "STATS"):  # guests hold the very arrays
        monkeypatch.setattr(live, name, jax.tree.map(jnp.copy, getattr(live, name)))
    model = source.block(0.0)
    module, keywords = source.arguments(model)
    return model, lambda **options: HOSTS[target.name](module, **keywords, **options)


def test_the_shim_goes_on_and_the_guest_where_the_link_is_live(source, target, hosted):
    model, make = hosted
    host = make()
    host.donate()
    assert_allclose(host(X), AFTER, **TOLERANCE)
    assert_allclose(source.block_output(host.unwrap(), X), AFTER, **TOLERANCE)
    if source.name in IN_PLACE and target.name in IN_PLACE:
        assert_allclose(source.block_output(model, X), AFTER, **TOLERANCE)
        return
    with pytest.raises(interop.ConversionError, match=r"were donated.*copy=True"):
        make()
    if source.name in IN_PLACE:
        host.write_back()
        assert_allclose(source.block_output(model, X), AFTER, **TOLERANCE)


def test_with_a_copy_the_guest_keeps_its_own_buffers(source, target, hosted):
    model, make = hosted
    if source.name in IN_PLACE and target.name in IN_PLACE:
        with pytest.raises(interop.ArgumentError, match="cut the link"):
            make(copy=True)
        return
    host = make(copy=True)
    assert_allclose(host(X), BEFORE, **TOLERANCE)
    host.donate()
    assert_allclose(host(X), AFTER, **TOLERANCE)
    assert_allclose(source.block_output(model, X), BEFORE, **TOLERANCE)
    make()


def test_arrays_that_the_guest_donates_are_an_error_in_the_shim():
    layer = brainstate.nn.Linear(3, 4)
    linen, equinox = shims.ToLinen(layer), shims.ToEquinox(layer, batched=True)
    own = shims.ToEquinox(layer, batched=True, copy=True)
    variables = linen.init(KEY, X)
    expected = np.asarray(layer(X))
    layer.weight.value = _donating(layer.weight.value)
    for call in (
        lambda: linen.apply(variables, X),
        lambda: linen.materialize(variables),
        lambda: equinox(X),
        equinox.materialize,
        equinox.unwrap,
    ):
        with pytest.raises(interop.ConversionError, match=r"weight\.weight.*copy=True") as e:
            call()
        assert "weight.weight" in e.value.missing
    assert_allclose(own(X), expected, rtol=1e-6)


def test_buffers_and_guest_donated_together_are_one_buffer_unless_copied():
    layer = brainstate.nn.Linear(3, 4)
    both = jax.jit(lambda a, b: moved((a, b)), donate_argnums=(0, 1))
    own = shims.ToLinen(layer, copy=True).init(KEY, X)
    shared = shims.ToLinen(layer).init(KEY, X)
    with pytest.raises(Exception, match="same buffer twice"):
        both(shared, layer.weight.value)
    for tree in both(own, layer.weight.value):
        assert jnp.isfinite(jax.tree.leaves(tree)[0]).all()


def test_a_copy_in_linens_own_transformations_and_clones():
    import flax.linen as nn

    layer = brainstate.nn.Linear(3, 4)
    shim = shims.ToLinen(layer, copy=True).copy(name="core")
    variables = shim.init(KEY, X)
    assert variables["params"]["weight"]["weight"] is not layer.weight.value["weight"]
    stack = nn.vmap(
        shims.ToLinen, variable_axes={"params": None}, split_rngs={"params": False}, in_axes=0
    )(layer, copy=True)
    assert_allclose(stack.apply(stack.init(KEY, X), X), layer(X), rtol=1e-5)
    dense = nn.Dense(4)
    params = dense.init(KEY, X)
    assert shims.wrap(dense, into="nnx", params=params, copy=True)(X).shape == (6, 4)
