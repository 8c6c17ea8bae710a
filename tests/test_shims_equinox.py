"""``shims.ToEquinox``: foreign modules as ``eqx.Module``s."""

import copy

import brainstate
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import interop
import shims

from .cases import array

X = array(5, 3, seed=51)
W, B = array(3, 4, seed=52), array(4, seed=53)
KEY = jax.random.key(0)


def linear():
    return brainstate.nn.Linear(3, 4, w_init=W, b_init=B)


def stateful(module, **options):
    return eqx.nn.make_with_state(shims.ToEquinox)(module, **options)


def each_array(change, tree):
    return jax.tree.map(lambda a: change(a) if eqx.is_inexact_array(a) else a, tree)


def inexact(tree):
    return jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))


def test_the_inexact_leaves_are_the_guests_own_trainable_arrays():
    layer = linear()
    shim = shims.ToEquinox(layer)
    assert {id(leaf) for leaf in inexact(shim)} == {id(a) for a in layer.weight.value.values()}
    norm, _ = stateful(brainstate.nn.BatchNorm0d((4,)), batched=True)
    assert len(inexact(norm)) == 2


def test_one_example_or_a_batch():
    expected = X @ W + B
    shim = shims.ToEquinox(linear())
    assert not shim.is_stateful()
    assert_allclose(shim(X[0]), expected[0], rtol=1e-5)
    assert_allclose(jax.vmap(shim)(X), expected, rtol=1e-5)
    assert_allclose(shims.ToEquinox(linear(), batched=True)(X), expected, rtol=1e-5)


def test_in_a_sequential_with_native_layers():
    norm, state = eqx.nn.make_with_state(
        lambda: eqx.nn.Sequential(
            [
                shims.ToEquinox(linear()),
                eqx.nn.Lambda(jax.nn.relu),
                shims.ToEquinox(brainstate.nn.BatchNorm0d((4,), axis_name="batch")),
                shims.ToEquinox(brainstate.nn.Dropout(0.5)),
            ]
        )
    )()
    assert norm.is_stateful()
    call = jax.vmap(
        lambda x, state, key: norm(x, state, key=key),
        axis_name="batch",
        in_axes=(0, None, 0),
        out_axes=(0, None),
    )
    keys = jax.random.split(KEY, 5)
    out, after = call(X, state, keys)
    hidden = np.maximum(X @ W + B, 0)
    wanted = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
    kept = np.asarray(out) != 0
    assert kept.any()
    assert not kept.all()
    assert_allclose(np.asarray(out)[kept], 2 * wanted[kept], rtol=1e-3, atol=1e-3)
    frozen = eqx.nn.inference_mode(norm)
    out, _ = jax.vmap(lambda x: frozen(x, after), axis_name="batch", out_axes=(0, None))(X)
    assert_allclose(
        out, (hidden - 0.01 * hidden.mean(0)) / np.sqrt(0.99 + 0.01 * hidden.var(0)), rtol=1e-3
    )


def test_batch_statistics_over_no_batch_are_refused():
    shim, state = stateful(brainstate.nn.BatchNorm0d((3,)))
    with pytest.raises(interop.ArgumentError, match="batched=True"):
        shim(X[0], state=state)
    with pytest.raises(interop.ArgumentError, match="batched=True"):
        jax.vmap(lambda x: shim(x, state=state)[0])(X)
    frozen = eqx.nn.inference_mode(shim)
    assert frozen(X[0], state=state)[0].shape == (3,)


def test_hidden_state_of_a_batch_stands_in_the_state():
    cell = brainstate.nn.LSTMCell(3, 4)
    cell.init_state(5)
    reference = brainstate.graph.clone(cell)
    shim, state = stateful(cell, batched=True)
    for _ in range(3):
        out, state = eqx.filter_jit(shim)(X, state=state)
        assert_allclose(out, reference(X), rtol=1e-5, atol=1e-6)


def test_a_call_without_its_state_or_key_is_an_error():
    shim, state = stateful(brainstate.nn.BatchNorm0d((3,)), batched=True)
    with pytest.raises(interop.ArgumentError, match="make_with_state"):
        shim(X)
    assert shim(X, state)[0].shape == X.shape
    drop = shims.ToEquinox(brainstate.nn.Dropout(0.5))
    with pytest.raises(interop.MissingKeyError, match="key="):
        drop(X[0])
    assert_array_equal(eqx.nn.inference_mode(drop)(X[0]), X[0])


def test_write_back_commits_trained_values_all_or_none():
    guest = brainstate.nn.Sequential(linear(), brainstate.nn.BatchNorm0d((4,)))
    shim, state = stateful(guest, batched=True)
    _, state = shim(X, state=state)
    shim = each_array(lambda a: a + 1, shim)
    assert_array_equal(guest.layers[0].weight.value["weight"], W)
    shim.write_back(state)
    assert_array_equal(guest.layers[0].weight.value["weight"], W + 1)
    assert np.abs(guest.layers[1].running_mean.value).max() > 0
    half = jax.tree.map(lambda a: a.astype(jnp.float16) if eqx.is_inexact_array(a) else a, shim)
    with pytest.raises(interop.ConversionError, match="float16"):
        half.write_back(state)
    assert_array_equal(guest.layers[0].weight.value["weight"], W + 1)


def test_unwrap_returns_the_guest_or_one_with_the_shims_values():
    layer = linear()
    shim = shims.ToEquinox(layer)
    assert shim.unwrap() is layer
    trained = each_array(lambda a: a * 2, shim)
    assert trained.unwrap() is not layer
    assert_allclose(trained.unwrap()(X), 2 * (X @ W + B), rtol=1e-5)
    assert_allclose(jax.vmap(trained.materialize())(X), 2 * (X @ W + B), rtol=1e-5)


def test_ensembles_of_weights():
    shim = shims.ToEquinox(linear(), batched=True)
    pair = each_array(lambda a: jnp.stack([a, 2 * a]), shim)
    out = eqx.filter_vmap(lambda m, x: m(x), in_axes=(eqx.if_array(0), None))(pair, X)
    assert_allclose(out[1], 2 * (X @ W + B), rtol=1e-5)


def test_deep_copies_of_shims_of_two_live_modules_are_stacked():
    shims_of_two = [
        shims.ToEquinox(brainstate.nn.Linear(3, 4, w_init=w, b_init=B), batched=True)
        for w in (W, W + 1)
    ]
    with pytest.raises(ValueError, match="pytree"):
        jax.tree.map(lambda a, b: a, *shims_of_two)
    parts = [eqx.partition(copy.deepcopy(s), eqx.is_array) for s in shims_of_two]
    pair = jax.tree.map(lambda *a: jnp.stack(a), *(arrays for arrays, _ in parts))
    out, _ = jax.lax.scan(lambda x, a: (x, eqx.combine(a, parts[0][1])(x)), X, pair)[::-1]
    assert_allclose(out, [X @ W + B, X @ (W + 1) + B], rtol=1e-5)


def test_no_new_trace_after_a_step_or_for_the_shim_built_again():
    traces = []

    @eqx.filter_jit
    def call(shim, x):
        traces.append(1)
        return shim(x)

    layer = linear()
    call(shims.ToEquinox(layer), X[0])
    call(each_array(lambda a: a + 1, shims.ToEquinox(layer)), X[0])
    assert len(traces) == 1
    call(shims.ToEquinox(linear()), X[0])  # another guest: a shim must not take its place
    assert len(traces) == 2


def test_an_nnx_guest_shares_its_arrays_and_is_written_back():
    layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    shim = shims.ToEquinox(layer)
    assert shim.params["kernel"] is layer.kernel.get_value()
    each_array(lambda a: a * 0, shim).write_back()
    assert_array_equal(layer.kernel[...], np.zeros((3, 4)))


def test_names_that_collide_and_classes_are_refused():
    class TakesKey(brainstate.nn.Module):
        def update(self, x, key): ...

    with pytest.raises(interop.ArgumentError, match="key"):
        shims.ToEquinox(TakesKey())
    with pytest.raises(interop.ArgumentError, match="class, not an instance"):
        shims.ToEquinox(brainstate.nn.Linear)


def test_statistics_of_a_batch_that_are_not_kept_are_refused():
    norm = brainstate.nn.BatchNorm0d((3,), track_running_stats=False, affine=False)
    guest = brainstate.nn.Sequential(brainstate.nn.Tanh(), norm)
    with pytest.raises(interop.ArgumentError, match=r"layers\[1\].*batched=True"):
        shims.ToEquinox(guest)
    with brainstate.environ.context(fit=True):
        assert_allclose(shims.ToEquinox(guest, batched=True)(X), guest(X), rtol=1e-6)


def test_a_named_axis_of_one_layer_excuses_no_other():
    class Two(nnx.Module):
        def __init__(self):
            self.named = nnx.BatchNorm(3, axis_name="batch", rngs=nnx.Rngs(0))
            self.plain = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.plain(self.named(x))

    shim, state = stateful(Two())
    call = jax.vmap(lambda x: shim(x, state)[0], axis_name="batch")
    with pytest.raises(interop.ArgumentError, match=r"statistics at plain, .* no batch axis"):
        call(X)
    with pytest.raises(interop.ArgumentError, match=r"statistics at plain\."):
        call(jnp.stack([X, X]))


def test_what_is_no_state_or_that_of_another_shim_is_refused():
    guest = brainstate.nn.BatchNorm0d((3,))
    shim, state = stateful(guest, batched=True)
    _, other = stateful(brainstate.nn.BatchNorm0d((4,)), batched=True)
    _, foreign = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="batch")
    for use in (lambda s: shim(X, state=s), shim.unwrap, shim.write_back, shim.materialize):
        with pytest.raises(interop.ArgumentError, match=r"is an eqx\.nn\.State, got int"):
            use(3)
        with pytest.raises(
            interop.ConversionError, match=r"running_mean is \[4\], wanted \[3\]"
        ):
            use(other)
        with pytest.raises(interop.ConversionError, match="missing running_mean, running_var"):
            use(foreign)
    assert_array_equal(guest.running_mean.value, np.zeros(3))
    layer = linear()
    plain = shims.ToEquinox(layer)
    for use in (plain.unwrap, plain.write_back):
        with pytest.raises(interop.ArgumentError, match="has no state, and one was given"):
            use(state)
    _, after = shim(X, state)
    members = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), after)
    assert shim.unwrap(members).running_mean.value.shape == (2, 3)


def test_what_is_no_key_is_refused():
    shim = shims.ToEquinox(brainstate.nn.Dropout(0.5))
    with pytest.raises(interop.ArgumentError, match="random key, got int"):
        shim(X[0], key=3)
    assert shim(X[0], key=jax.random.PRNGKey(0)).shape == (3,)
    with pytest.raises(interop.ArgumentError, match="random key, got int"):
        shims.FromEquinox(eqx.nn.Dropout(0.5))(X, key=3)


class Normed(nn.Module):
    """A Linen block, of whose layers only a call tells."""

    axis_name: str | None

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(4, kernel_init=lambda *_: W, bias_init=lambda *_: B)(x)
        norm = nn.BatchNorm(axis_name=self.axis_name, momentum=0.9, epsilon=1e-4)
        return norm(x, use_running_average=not train)


def test_a_linen_layer_takes_its_statistics_over_a_named_axis():
    module = Normed("batch")
    variables = module.init(KEY, X, train=False)
    shim, state = stateful(module, params=variables)
    call = jax.vmap(shim, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    h = X @ W + B
    out, after = call(X, state)
    assert_allclose(out, (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-4), rtol=1e-4, atol=1e-5)
    _, after = jax.jit(call)(2 * X, after)
    g = 2 * X @ W + B
    _, trained = shim.unwrap(after)
    found = trained["batch_stats"]["BatchNorm_0"]
    assert_allclose(found["mean"], 0.09 * h.mean(0) + 0.1 * g.mean(0), rtol=1e-4, atol=1e-6)
    assert_allclose(found["var"], 0.81 + 0.09 * h.var(0) + 0.1 * g.var(0), rtol=1e-4)
    plain, state = stateful(Normed(None), params=variables)
    with pytest.raises(interop.ArgumentError, match=r"at BatchNorm_0, .* no batch axis"):
        plain(X[0], state)
    with pytest.raises(interop.ArgumentError, match=r"at batch_stats\.BatchNorm_0\.mean"):
        plain(X, state)  # an example of two axes, as an image without channels


class Normalises(brainstate.nn.Module):
    """Its method has parameters, running statistics and a dropout of its own."""

    def __init__(self, keep=1.0, axis_name=None):
        super().__init__()
        self.linear = linear()
        self.norm = brainstate.nn.BatchNorm0d((4,), momentum=0.9, axis_name=axis_name)
        self.drop = brainstate.nn.Dropout(keep)

    def update(self, x):
        return self.encode(x)

    def encode(self, x, *, gain=1.0):
        return gain * self.drop(self.norm(self.linear(x)))


def normalised(w, b):
    h = X @ w + b
    return (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_method_in_training_moves_the_statistics_and_has_the_gradient(compiled):
    guest = Normalises()
    shim, state = stateful(guest, batched=True)

    def loss(shim, state):
        out, state = shim.encode(X, state=state, gain=2.0)
        return (out**3).sum(), state

    step = eqx.filter_value_and_grad(loss, has_aux=True)
    step = eqx.filter_jit(step) if compiled else step
    (value, after), grads = step(shim, state)
    expected, (dw, db) = jax.value_and_grad(
        lambda w, b: ((2 * normalised(w, b)) ** 3).sum(), argnums=(0, 1)
    )(W, B)
    assert_allclose(value, expected, rtol=1e-3, atol=1e-3)
    assert_allclose(grads.params["linear"]["weight"]["weight"], dw, rtol=1e-3, atol=1e-2)
    assert_allclose(grads.params["linear"]["weight"]["bias"], db, rtol=1e-3, atol=1e-2)
    h = X @ W + B
    trained = shim.unwrap(after)
    assert_allclose(trained.norm.running_mean.value, 0.1 * h.mean(0), rtol=1e-4)
    assert_allclose(trained.norm.running_var.value, 0.9 + 0.1 * h.var(0), rtol=1e-4)
    assert_array_equal(guest.norm.running_mean.value, np.zeros(4))
    frozen = eqx.nn.inference_mode(shim)
    out, last = frozen.encode(X, state=after)
    scale = np.sqrt(0.9 + 0.1 * h.var(0) + 1e-5)
    assert_allclose(out, (h - 0.1 * h.mean(0)) / scale, rtol=1e-4, atol=1e-5)
    assert_array_equal(
        shim.unwrap(last).norm.running_mean.value, trained.norm.running_mean.value
    )


def test_a_method_of_one_example_is_mapped_over_a_named_axis_with_a_key_for_each():
    shim, state = stateful(Normalises(keep=0.5, axis_name="batch"))
    call = jax.vmap(
        lambda x, key: shim.encode(x, state=state, key=key, gain=3.0),
        axis_name="batch",
        out_axes=(0, None),
    )
    out, after = call(X, jax.random.split(KEY, 5))
    kept = np.asarray(out) != 0
    assert kept.any()
    assert not kept.all()
    assert_allclose(out[kept], 6 * normalised(W, B)[kept], rtol=1e-3, atol=1e-3)
    assert_allclose(
        shim.unwrap(after).norm.running_mean.value, 0.1 * (X @ W + B).mean(0), rtol=1e-4
    )
    plain, state = stateful(Normalises())
    with pytest.raises(interop.ArgumentError, match="batched=True"):
        plain.encode(X[0], state=state)
    with pytest.raises(interop.MissingKeyError, match="key="):
        stateful(Normalises(keep=0.5), batched=True)[0].encode(X, state=state)


def test_another_method_of_a_module_with_hidden_state_is_refused_by_name_or_takes_batches():
    class Reads(brainstate.nn.LSTMCell):
        def readout(self, x):
            return x + self.h.value

    cell = Reads(3, 3)
    cell.init_state(5)
    shim = shims.ToEquinox(cell)
    with pytest.raises(interop.ArgumentError, match=r"readout may read it.*batched=True"):
        shim.readout(X[0])
    whole, state = stateful(cell, batched=True)
    out, state = whole(X, state=state)
    assert_allclose(whole.readout(X, state=state)[0], X + out, rtol=1e-6)
