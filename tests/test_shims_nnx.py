"""``shims.ToNNX``: a BrainState module as an ``nnx.Module`` that shares its arrays."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import pickle
import threading
import weakref

import brainstate
import brainunit as u
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import interop
import shims

bnn = brainstate.nn
X = np.linspace(-1.0, 2.0, 15, dtype=np.float32).reshape(5, 3) ** 2
W = np.arange(12, dtype=np.float32).reshape(3, 4) / 7 - 0.6
B = np.array([0.3, -0.2, 0.1, 0.5], np.float32)


class Block(bnn.Module):
    """A guest with forward logic of its own."""

    def __init__(self, keep: float = 0.7):
        super().__init__()
        self.inp = bnn.Linear(3, 4, w_init=W, b_init=B)
        self.norm = bnn.BatchNorm0d((4,), momentum=0.8, epsilon=1e-3)
        self.drop = bnn.Dropout(keep)
        self.parts = {"out": [bnn.Linear(4, 2, w_init=W.T[:, :2], b_init=B[:2])]}
        self.gain = 0.5

    def update(self, x, *, shift=0.0):
        """Return ``gain`` times what the layers compute, plus ``shift``."""
        y = self.drop(self.norm(self.inp(x)))
        return self.gain * self.parts["out"][0](y) + shift

    def encode(self, x):
        """Return the first layer's output."""
        return self.inp(x)


def native(module, x, *, fit, **kwargs):
    with brainstate.environ.context(fit=fit):
        return module(x, **kwargs)


def twin(module):
    """An independent module of equal weights."""
    return brainstate.graph.clone(module)


def arrays_of(module):
    return {path: state.value for path, state in module.states().items()}


def assert_states_concrete(module):
    for path, value in arrays_of(module).items():
        for leaf in jax.tree.leaves(value):
            assert not isinstance(leaf, jax.core.Tracer), path


def sgd(model, x, *, jit=True, steps=3, traces=None):
    optimizer = nnx.Optimizer(model, optax.sgd(0.02), wrt=nnx.Param)

    def step(model, optimizer, x):
        if traces is not None:
            traces.append(1)
        loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss

    step = nnx.jit(step) if jit else step
    return [float(step(model, optimizer, x)) for _ in range(steps)]


def native_sgd(module, x, steps=3):
    params = module.states(brainstate.ParamState)
    losses = []
    for _ in range(steps):
        with brainstate.environ.context(fit=True):
            grads, loss = brainstate.transform.grad(
                lambda: (module(x) ** 2).mean(), params, return_value=True
            )()
        for path, state in params.items():
            state.value = jax.tree.map(lambda a, g: a - 0.02 * g, state.value, grads[path])
        losses.append(float(loss))
    return losses


# -- sharing --


def test_every_trainable_array_is_one_param_under_the_guests_own_path():
    shim = shims.ToNNX(Block())
    assert {path for path, _ in nnx.to_flat_state(nnx.state(shim, nnx.Param))} == {
        ("inp", "weight", "bias"),
        ("inp", "weight", "weight"),
        ("norm", "weight", "bias"),
        ("norm", "weight", "scale"),
        ("parts", "out", 0, "weight", "bias"),
        ("parts", "out", 0, "weight", "weight"),
    }
    assert {path for path, _ in nnx.to_flat_state(nnx.state(shim, nnx.BatchStat))} == {
        ("norm", "running_mean"),
        ("norm", "running_var"),
    }


def test_the_variable_holds_the_very_array_of_the_state():
    layer = bnn.Linear(3, 4, w_init=jnp.asarray(W), b_init=jnp.asarray(B))
    shim = shims.ToNNX(layer)
    assert shim.weight["weight"].get_value() is layer.weight.value["weight"]
    assert shim.weight["weight"][...] is layer.weight.value["weight"]


def test_a_write_on_either_side_shows_on_the_other_at_once():
    layer = bnn.Linear(3, 4, w_init=W, b_init=B)
    shim = shims.ToNNX(layer)
    shim.weight["bias"][...] = jnp.full(4, 7.0)
    assert_array_equal(layer.weight.value["bias"], np.full(4, 7.0))
    layer.weight.value = {"weight": jnp.zeros((3, 4)), "bias": jnp.ones(4)}
    assert_array_equal(shim.weight["weight"].get_value(), np.zeros((3, 4)))
    assert_array_equal(shim(X), np.ones((5, 4)))


def test_nnx_update_reaches_the_guest():
    layer = bnn.Linear(3, 4, w_init=W, b_init=B)
    shim = shims.ToNNX(layer)
    nnx.update(shim, jax.tree.map(lambda a: a + 1, nnx.state(shim)))
    assert_array_equal(layer.weight.value["weight"], W + 1)


@pytest.mark.parametrize("jit", [False, True])
def test_training_through_the_shim_equals_native_training(jit):
    block = Block(keep=1.0)
    expected = native_sgd(twin(block), X)
    reference = twin(block)
    native_sgd(reference, X)
    assert_allclose(sgd(shims.ToNNX(block), X, jit=jit), expected, rtol=1e-5)
    for path, value in arrays_of(reference).items():
        for ours, theirs in zip(
            jax.tree.leaves(arrays_of(block)[path]), jax.tree.leaves(value), strict=True
        ):
            assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_guest_trains_on_natively_after_the_shim():
    block = Block(keep=1.0)
    whole = native_sgd(twin(block), X, steps=4)
    mixed = sgd(shims.ToNNX(block), X, steps=2) + native_sgd(block, X, steps=2)
    assert_allclose(mixed, whole, rtol=1e-5)


def test_weight_decay_moves_no_statistics():
    block = Block()
    shim = shims.ToNNX(block)
    shim.eval()
    optimizer = nnx.Optimizer(shim, optax.adamw(0.1, weight_decay=0.5), wrt=nnx.Param)
    before = block.norm.running_var.value
    optimizer.update(shim, nnx.grad(lambda m: m(X).sum())(shim))
    assert_array_equal(block.norm.running_var.value, before)


def test_two_shims_of_one_layer_share_one_parameter():
    layer = bnn.Linear(3, 3, w_init=W[:, :3], b_init=B[:3])
    pair = nnx.Sequential(shims.ToNNX(layer), shims.ToNNX(layer))
    assert len(jax.tree.leaves(nnx.state(pair))) == 2
    expected = native_sgd(bnn.Sequential(shared := twin(layer), shared), X)
    assert_allclose(sgd(pair, X), expected, rtol=1e-5)


def test_a_layer_used_twice_in_the_guest_is_one_parameter():
    layer = bnn.Linear(3, 3, w_init=W[:, :3], b_init=B[:3])
    guest = bnn.Sequential(layer, bnn.Tanh(), layer)
    shim = shims.ToNNX(guest)
    assert len(jax.tree.leaves(nnx.state(shim))) == 2
    expected = native_sgd(twin(guest), X)
    assert_allclose(sgd(shim, X), expected, rtol=1e-5)
    assert guest.layers[0] is guest.layers[2]


@pytest.mark.parametrize(
    "value",
    [np.zeros((4, 3), np.float32), np.zeros((3, 4), np.float16), "weights", None],
    ids=["shape", "dtype", "type", "none"],
)
def test_a_write_that_does_not_fit_is_refused_and_changes_nothing(value):
    layer = bnn.Linear(3, 4, w_init=W, b_init=B)
    shim = shims.ToNNX(layer)
    with pytest.raises(
        interop.ConversionError, match=r"weight\.weight.*wanted float32\[3, 4\]"
    ):
        shim.weight["weight"].set_value(value)
    assert_array_equal(layer.weight.value["weight"], W)


@pytest.mark.parametrize(
    "value",
    [
        {"a": (jnp.ones(3),), "b": jnp.ones(2)},
        {"a": jnp.ones(3), "b": (jnp.ones(2),)},
        {"a": jnp.ones(3), "b": None},
        {"a": jnp.ones(3) * u.mV, "b": jnp.ones(2)},
        {"a": jnp.ones(3)},
        jnp.ones(3),
    ],
    ids=["its own", "another", "none", "unit", "gone", "alone"],
)
def test_a_state_that_holds_other_arrays_by_now_is_seen_by_what_reads_or_writes_one(value):
    class Guest(bnn.Module):
        def __init__(self):
            super().__init__()
            self.parts = brainstate.ParamState({"a": jnp.ones(3), "b": jnp.ones(2)})

    guest = Guest()
    view = shims.ToNNX(guest).parts["a"]
    guest.parts.value = value
    for use in (view.get_value, lambda: view.set_raw_value(jnp.zeros(3))):
        with pytest.raises(interop.ConversionError, match=r"parts\.a.*Wrap the module again"):
            use()
    assert guest.parts.value is value


def test_setting_what_the_guest_has_is_refused_instead_of_silently_lost():
    block = Block()
    shim = shims.ToNNX(block)
    for name, value in (("inp", nnx.Param(jnp.zeros((3, 4)))), ("gain", 3.0)):
        with pytest.raises(interop.ArgumentError, match=name):
            setattr(shim, name, value)
    shim.tag = "mine"
    shim(X, deterministic=True)
    assert shim.tag == "mine"


def test_views_do_not_keep_a_guest_alive():
    layer = bnn.Linear(3, 4)
    state = weakref.ref(layer.weight)
    shims.ToNNX(layer)
    del layer
    gc.collect()
    assert state() is None


# -- copies --

COPIES = {
    "merge": lambda m: nnx.merge(*nnx.split(m), copy=True),
    "clone": nnx.clone,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_computes_the_same_and_owns_its_values(how):
    block = Block(keep=1.0)
    before = jax.tree.map(np.asarray, arrays_of(block))
    model = nnx.Sequential(shims.ToNNX(block))
    other = COPIES[how](model)
    other.eval()
    assert_array_equal(other(X), native(block, X, fit=False))
    other.train()
    sgd(other, X)
    after = arrays_of(block)
    jax.tree.map(assert_array_equal, after, before)
    assert not np.allclose(other.layers[0].inp["weight"]["weight"][...], W)
    sgd(model, X)
    assert not np.allclose(block.inp.weight.value["weight"], W)


@pytest.mark.parametrize("how", COPIES)
def test_unwrap_returns_the_guest_or_a_copy_of_it(how):
    block = Block(keep=1.0)
    shim = shims.ToNNX(block)
    other = COPIES[how](shim)
    assert shim.unwrap() is block
    sgd(other, X)
    unwrapped = other.unwrap()
    assert isinstance(unwrapped, Block)
    assert unwrapped is not block
    other.eval()
    assert_allclose(native(unwrapped, X, fit=False), other(X), rtol=1e-6)


def test_merge_without_copy_shares_variables_as_it_does_natively():
    own, shim = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), shims.ToNNX(bnn.Linear(3, 4))
    assert nnx.merge(*nnx.split(own)).kernel is own.kernel
    merged = nnx.merge(*nnx.split(shim))
    assert merged.weight["weight"] is shim.weight["weight"]
    merged.weight["weight"][...] = jnp.asarray(W)
    assert_allclose(merged(X), shim(X), rtol=1e-6)


def test_pickling_is_refused_with_the_remedy():
    with pytest.raises(interop.ArgumentError, match="materialize"):
        pickle.dumps(shims.ToNNX(bnn.Linear(3, 4)))


# -- mode and randomness --


def test_train_and_eval_reach_every_layer_of_the_guest():
    block = Block(keep=1.0)
    model = nnx.Sequential(shims.ToNNX(block))
    model.eval()
    mean = block.norm.running_mean.value
    assert_array_equal(model(X), native(block, X, fit=False))
    assert block.norm.running_mean.value is mean
    model.train()
    expected = twin(block)
    assert_allclose(model(X), native(expected, X, fit=True), rtol=1e-6)
    assert_allclose(block.norm.running_mean.value, expected.norm.running_mean.value, rtol=1e-6)
    assert not np.allclose(block.norm.running_mean.value, mean)


def test_running_statistics_follow_the_definition():
    norm = bnn.BatchNorm0d((3,), momentum=0.8, epsilon=1e-3)
    shim = shims.ToNNX(norm)
    nnx.jit(lambda m, x: m(x))(shim, X)
    assert_allclose(norm.running_mean.value, 0.2 * X.mean(0), rtol=1e-5)
    assert_allclose(norm.running_var.value, 0.8 + 0.2 * X.var(0), rtol=1e-5)


def test_a_call_can_choose_the_mode():
    shim = shims.ToNNX(bnn.Dropout(0.5), rngs=nnx.Rngs(0))
    assert_array_equal(shim(X, deterministic=True), X)
    assert (np.asarray(shim(X)) == 0).any()
    view = nnx.view(shim, deterministic=True)
    assert_array_equal(view(X), X)


def test_a_view_has_one_mode():
    norm = bnn.BatchNorm0d((3,))
    model = nnx.Sequential(shims.ToNNX(norm), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    for wrong in ({"deterministic": False}, {}):
        with pytest.raises(interop.ArgumentError, match="one mode"):
            nnx.view(model, use_running_average=True, **wrong)
    view = nnx.view(model, use_running_average=True, deterministic=True)
    assert_allclose(view(X), X / (1 + 1e-5), rtol=1e-5)
    assert_array_equal(norm.running_mean.value, np.zeros(3))
    traced = model.layers[0].materialize(method="trace", sample_input=X, train=True)
    with pytest.raises(interop.ArgumentError, match="one mode"):
        nnx.view(traced, use_running_average=True)
    plain = nnx.Sequential(shims.ToNNX(bnn.Linear(3, 3)), model.layers[1])
    assert nnx.view(plain, use_running_average=True).layers[0].deterministic is False


@pytest.mark.parametrize("jit", [False, True])
def test_each_training_call_draws_a_fresh_mask_and_evaluation_none(jit):
    model = nnx.Sequential(shims.ToNNX(bnn.Dropout(0.7), rngs=nnx.Rngs(3)))
    call = nnx.jit(lambda m, x: m(x)) if jit else (lambda m, x: m(x))
    x = np.ones((100, 100), np.float32)
    first, second = np.asarray(call(model, x)), np.asarray(call(model, x))
    assert (first != second).any()
    for y in (first, second):
        assert abs((y != 0).mean() - 0.7) < 0.03
        assert_allclose(y[y != 0], 1 / 0.7, rtol=1e-6)
    model.eval()
    count = model.layers[0].rngs.count[...]
    assert_array_equal(call(model, x), x)
    assert_array_equal(model.layers[0].rngs.count[...], count)


def test_the_same_stream_gives_the_same_masks():
    outs = [shims.ToNNX(bnn.Dropout(0.5), rngs=nnx.Rngs(dropout=7))(X) for _ in range(2)]
    assert_array_equal(*outs)


@pytest.mark.parametrize("rngs", [nnx.Rngs(5), nnx.Rngs(dropout=5), jax.random.key(5)])
def test_a_call_can_bring_its_own_randomness(rngs):
    shim = shims.ToNNX(bnn.Dropout(0.5))
    assert (np.asarray(shim(np.ones((8, 8), np.float32), rngs=rngs)) == 0).any()


def test_a_stream_can_come_and_go_later():
    shim = shims.ToNNX(bnn.Dropout(0.5))
    for rngs in (None, nnx.Rngs(3), None, nnx.Rngs(4)):
        shim.rngs = rngs
        for call in (lambda m, x: m(x), nnx.jit(lambda m, x: m(x))):
            if rngs is not None:
                assert (np.asarray(call(shim, np.ones((8, 8), np.float32))) == 0).any()
                continue
            with pytest.raises(interop.MissingKeyError):
                call(shim, X)


@pytest.mark.parametrize("jit", [False, True])
def test_a_training_call_without_a_key_is_an_error(jit):
    shim = shims.ToNNX(bnn.Dropout(0.5))
    call = nnx.jit(lambda m, x: m(x)) if jit else (lambda m, x: m(x))
    with pytest.raises(interop.MissingKeyError, match="rngs="):
        call(shim, X)
    shim.eval()
    assert_array_equal(call(shim, X), X)


def test_a_stream_that_fits_nothing_is_an_error():
    with pytest.raises(interop.MissingKeyError, match="dropout"):
        shims.ToNNX(bnn.Dropout(0.5), rngs=nnx.Rngs(params=0))
    with pytest.raises(interop.ArgumentError, match=r"nnx\.Rngs"):
        shims.ToNNX(bnn.Dropout(0.5), rngs=3)


@pytest.mark.parametrize("jit", [False, True])
def test_the_global_random_state_of_brainstate_is_left_alone(jit):
    brainstate.random.seed(0)
    before = brainstate.random.DEFAULT.value
    shim = shims.ToNNX(bnn.Dropout(0.5), rngs=nnx.Rngs(0))
    call = nnx.jit(lambda m, x: m(x)) if jit else (lambda m, x: m(x))
    call(shim, X)
    assert brainstate.random.DEFAULT.value is before
    with pytest.raises(interop.MissingKeyError):
        call(shims.ToNNX(bnn.Dropout(0.5)), X)
    assert brainstate.random.DEFAULT.value is before


def test_a_guest_may_draw_inside_its_own_loop():
    class Noisy(bnn.Module):
        def update(self, xs):
            return brainstate.transform.for_loop(
                lambda x: x + brainstate.random.normal(size=x.shape), xs
            )

    shim = shims.ToNNX(Noisy(), rngs=nnx.Rngs(0))
    for call in (lambda m, x: m(x), nnx.jit(lambda m, x: m(x))):
        noise = np.asarray(call(shim, np.zeros((4, 3), np.float32)))
        assert len(np.unique(noise)) == 12


# -- NNX transformations --


def test_gradients_equal_the_native_ones():
    block = Block(keep=1.0)
    grads = nnx.grad(lambda m: (m(X) ** 2).sum())(shims.ToNNX(twin(block)))
    with brainstate.environ.context(fit=True):
        expected = brainstate.transform.grad(
            lambda: (block(X) ** 2).sum(), block.states(brainstate.ParamState)
        )()
    for path, tree in expected.items():
        for name, value in tree.items():
            ours = nnx.to_pure_dict(grads)
            for part in (*path, name):
                ours = ours[part]
            assert_allclose(ours, value, rtol=1e-5, atol=1e-5)


def test_no_new_trace_after_an_optimiser_step_or_for_an_equal_shim():
    traces = []

    @nnx.jit
    def call(model, x):
        traces.append(1)
        return model(x)

    block = Block()
    shim = shims.ToNNX(block, rngs=nnx.Rngs(0))
    call(shim, X)
    sgd(shim, X, steps=2)
    call(shim, X)
    call(shims.ToNNX(twin(block), rngs=nnx.Rngs(1)), X)
    call(shims.ToNNX(Block(), rngs=nnx.Rngs(1)), X)
    assert len(traces) == 1
    step_traces = []
    sgd(shim, X, steps=4, traces=step_traces)
    assert len(step_traces) == 1


def test_a_changed_attribute_of_the_guest_is_seen_by_a_compiled_function():
    block = Block(keep=1.0)
    model = nnx.Sequential(shims.ToNNX(block))
    model.eval()
    call = nnx.jit(lambda m, x: m(x))
    call(model, X)
    before = call(model, X)
    block.gain = 5.0
    assert_allclose(call(model, X), before * 10, rtol=1e-6)
    block.norm.epsilon = jnp.asarray(1.0)
    assert_allclose(call(model, X), native(block, X, fit=False), rtol=1e-6)


def test_vmap_over_data_and_over_an_ensemble_of_weights():
    block = Block(keep=1.0)
    shim = shims.ToNNX(block)
    shim.eval()
    xs = np.stack([X, X + 1])
    expected = np.stack([native(block, x, fit=False) for x in xs])
    over_data = nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))
    assert_allclose(over_data(shim, xs), expected, rtol=1e-5)

    definition, state = nnx.split(shim)
    stacked = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), state)
    outs = jax.vmap(lambda s: nnx.merge(definition, s)(X))(stacked)
    assert_allclose(outs[0], expected[0], rtol=1e-5)
    assert not np.allclose(outs[0], outs[1])


def test_scan_over_time_updates_statistics_each_step():
    norm = bnn.BatchNorm0d((3,), momentum=0.5)
    shim, reference = shims.ToNNX(norm), twin(norm)
    xs = np.stack([X, X + 1, X * 2])

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def over_time(model, x):
        return model, model(x)

    _, outs = over_time(shim, xs)
    expected = [native(reference, x, fit=True) for x in xs]
    assert_allclose(outs, np.stack(expected), rtol=1e-5, atol=1e-6)
    assert_allclose(norm.running_var.value, reference.running_var.value, rtol=1e-5)


def test_remat_and_eval_shape():
    block = Block(keep=1.0)
    shim = shims.ToNNX(block)
    shim.eval()
    plain = nnx.grad(lambda m: m(X).sum())(shim)
    remat = nnx.grad(lambda m: nnx.remat(lambda m, x: m(x))(m, X).sum())(shim)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-6), plain, remat)
    shape = nnx.eval_shape(lambda m: m(jnp.asarray(X)), shim)
    assert shape.shape == (5, 2)
    assert_states_concrete(block)


def test_no_tracer_leaks():
    block = Block()
    model = nnx.Sequential(shims.ToNNX(block, rngs=nnx.Rngs(0)))
    with jax.checking_leaks():
        sgd(model, X, steps=2)
    assert_states_concrete(block)


def test_a_plain_jax_jit_of_split_state():
    block = Block(keep=1.0)
    definition, state = nnx.split(shims.ToNNX(block))

    @jax.jit
    def step(state, x):
        model = nnx.merge(definition, state)
        return model(x), nnx.state(model)

    reference = twin(block)
    out, after = step(state, X)
    assert_allclose(out, native(reference, X, fit=True), rtol=1e-5)
    mean = nnx.to_pure_dict(after)["norm"]["running_mean"]
    assert_allclose(mean, reference.norm.running_mean.value, rtol=1e-6)
    assert_array_equal(block.norm.running_mean.value, np.zeros(4))


def test_closing_over_a_shim_is_closing_over_constants():
    block = Block(keep=1.0)
    shim = shims.ToNNX(block)
    shim.eval()
    call = jax.jit(lambda x: shim(x))
    expected = native(block, X, fit=False)
    assert_allclose(call(X), expected, rtol=1e-6)
    shim.inp["weight"]["bias"][...] = jnp.zeros(4)
    assert_allclose(call(X), expected, rtol=1e-6)
    shim.train()
    with pytest.raises(Exception, match="trac"):
        jax.jit(lambda x: shim(x))(X)
    assert_states_concrete(block)


def test_donated_arrays_leave_the_guest_working():
    block = Block(keep=1.0)
    model = nnx.Sequential(shims.ToNNX(block))
    optimizer = nnx.Optimizer(model, optax.sgd(0.02), wrt=nnx.Param)

    @nnx.jit(donate_argnums=(0, 1))
    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(lambda m: (m(x) ** 2).mean())(model))

    step(model, optimizer, X)
    step(model, optimizer, X)
    assert np.isfinite(native(block, X, fit=False)).all()


def test_inside_a_brainstate_transformation_the_gradient_is_native():
    block = Block(keep=1.0)
    shim = shims.ToNNX(block)
    params = block.states(brainstate.ParamState)
    with brainstate.environ.context(fit=True):
        expected = brainstate.transform.grad(lambda: (block(X) ** 2).sum(), params)()
    ours = brainstate.transform.grad(lambda: (shim(X) ** 2).sum(), params)()
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, expected)


# -- hidden state --


def test_hidden_state_is_carried_and_is_no_parameter():
    cell = bnn.LSTMCell(3, 4)
    brainstate.nn.init_all_states(cell, 5)
    reference = twin(cell)
    shim = shims.ToNNX(cell)
    kinds = {path[0] for path, _ in nnx.to_flat_state(nnx.state(shim, nnx.Param))}
    assert kinds == {"W"}
    call = nnx.jit(lambda m, x: m(x))
    for _ in range(3):
        assert_allclose(call(shim, X), reference(X), rtol=1e-5, atol=1e-6)
    assert_allclose(cell.h.value, reference.h.value, rtol=1e-5, atol=1e-6)
    assert_allclose(shim.c.get_value(), reference.c.value, rtol=1e-5, atol=1e-6)


def test_init_state_through_the_shim_or_the_guest_is_seen_by_both():
    cell = bnn.LSTMCell(3, 4)
    shim = shims.ToNNX(cell)
    shim.init_state(5)
    assert shim.h.get_value() is cell.h.value
    shim(X)
    cell.init_state(2)
    shim(X[:2])
    assert shim.h.get_value() is cell.h.value
    assert shim.h.shape == (2, 4)


@pytest.mark.parametrize("method", ["init_state", "reset_state"])
def test_a_module_that_would_not_pass_init_state_on_to_its_cells_says_so(method):
    cell = bnn.LSTMCell(3, 4)
    cell.init_state(5)
    shim = shims.ToNNX(bnn.Sequential(cell, bnn.Linear(4, 2)))
    first = shim(X)
    with pytest.raises(interop.ArgumentError, match=f"Sequential has no {method}") as refused:
        getattr(shim, method)(5)
    assert f"{method.replace('_', '_all_')}s(shim.unwrap()" in str(refused.value)
    getattr(bnn, f"{method.replace('_', '_all_')}s")(shim.unwrap(), 5)
    shim.refresh()
    assert_allclose(nnx.jit(lambda m, x: m(x))(shim, X), first, rtol=1e-5, atol=1e-6)


def test_a_forward_that_initialises_its_state_works_compiled():
    class Rnn(bnn.Module):
        def __init__(self):
            super().__init__()
            self.cell = bnn.LSTMCell(3, 4)

        def update(self, xs):
            self.cell.init_state(xs.shape[1])
            return brainstate.transform.for_loop(self.cell, xs)

    rnn, xs = Rnn(), np.stack([X, X + 1, X * 2])
    expected = rnn(xs)
    shim = shims.ToNNX(rnn)
    assert_allclose(nnx.jit(lambda m, x: m(x))(shim, xs), expected, rtol=1e-5)
    assert_allclose(shim(xs), expected, rtol=1e-5)
    losses = sgd(shim, xs, steps=5)
    assert losses[-1] < losses[0]
    assert_states_concrete(rnn)


# -- units --


def test_units_stay_inside_the_guest():
    class Volt(bnn.Module):
        def __init__(self):
            super().__init__()
            self.weight = brainstate.ParamState(jnp.arange(3.0) * u.mV)

        def update(self, x):
            return (x * self.weight.value) / u.mV

    guest = Volt()
    shim = shims.ToNNX(guest)
    (value,) = jax.tree.leaves(nnx.state(shim))
    assert_array_equal(value, np.arange(3.0))
    nnx.update(shim, jax.tree.map(lambda a: a + 1, nnx.state(shim)))
    assert guest.weight.value.unit == u.mV
    assert_allclose(
        u.get_magnitude(nnx.jit(lambda m, x: m(x))(shim, X)), X * (np.arange(3.0) + 1)
    )


# -- transparency --


def test_signature_and_documentation_are_the_guests():
    shim = shims.ToNNX(Block())
    assert list(inspect.signature(shim).parameters) == ["x", "shift", "rngs", "deterministic"]
    assert "gain" in shim.__doc__
    assert list(inspect.signature(shims.ToNNX).parameters)[:2] == ["module", "rngs"]
    assert "live" in shims.ToNNX.__doc__
    assert list(inspect.signature(shim.encode).parameters) == ["x"]


def test_keyword_arguments_methods_and_attributes_are_forwarded():
    block = Block(keep=1.0)
    shim = shims.ToNNX(block)
    shim.eval()
    assert_allclose(shim(X, shift=3.0), native(block, X, fit=False) + 3, rtol=1e-6)
    assert_allclose(shim.encode(X), X @ W + B, rtol=1e-5)
    assert_allclose(nnx.jit(lambda m, x: m.encode(x))(shim, X), X @ W + B, rtol=1e-5)
    assert shim.gain == 0.5
    with pytest.raises(AttributeError):
        _ = shim.no_such_attribute


def test_a_shim_is_an_honest_nnx_module():
    shim = shims.ToNNX(Block())
    assert isinstance(shim, nnx.Module)
    assert isinstance(shim, shims.ToNNX)
    assert not isinstance(shim, brainstate.nn.Module)
    assert "Block" in repr(shim)


@pytest.mark.parametrize("name", ["rngs", "deterministic", "train"])
def test_a_guest_whose_arrays_collide_with_the_hosts_names_is_refused(name):
    guest = bnn.Module()
    setattr(guest, name, brainstate.ParamState(jnp.ones(2)))
    with pytest.raises(interop.ArgumentError, match=name):
        shims.ToNNX(guest)


def test_a_guest_whose_methods_or_keywords_collide_is_refused():
    class Materializes(bnn.Module):
        def materialize(self): ...

    class TakesRngs(bnn.Module):
        def update(self, x, rngs=None): ...

    for guest, name in ((Materializes(), "materialize"), (TakesRngs(), "rngs")):
        with pytest.raises(interop.ArgumentError, match=name):
            shims.ToNNX(guest)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (bnn.Linear, "class, not an instance"),
        (3, "not a module"),
        (jnp.ones(3), "not a module"),
    ],
    ids=["class", "number", "array"],
)
def test_what_cannot_be_a_guest_is_refused_by_name(bad, text):
    with pytest.raises(interop.InteropError, match=text):
        shims.ToNNX(bad)


@pytest.mark.parametrize("mode", ["hijax", "ref"])
def test_other_kinds_of_variables_are_refused(mode):
    with (
        nnx.var_defaults(**{mode: True}),
        pytest.raises(interop.ArgumentError, match=mode),
    ):
        shims.ToNNX(bnn.Linear(3, 4))


# -- wrap and materialize --


def test_wrap_makes_a_shim_or_returns_the_hosts_own_module():
    layer, own = bnn.Linear(3, 4), nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    assert isinstance(shims.wrap(layer, into="nnx"), shims.ToNNX)
    assert shims.wrap(own, into="nnx") is own
    assert shims.wrap(layer, into="brainstate") is layer
    with pytest.raises(interop.ArgumentError, match="unknown framework 'torch'"):
        shims.wrap(layer, into="torch")


@pytest.mark.parametrize("share", [True, False])
def test_materialize_gives_a_plain_module_with_the_weights_as_trained(share):
    guest = bnn.Sequential(
        bnn.Linear(3, 4, w_init=W, b_init=B),
        bnn.BatchNorm0d((4,)),
        bnn.ReLU(),
        bnn.Dropout(0.7),
        bnn.Linear(4, 2),
    )
    shim = shims.ToNNX(guest, rngs=nnx.Rngs(0))
    sgd(shim, X)
    shim.eval()
    model = shim.materialize(copy=not share)
    assert type(model) is nnx.Sequential
    assert_allclose(model(X), shim(X), rtol=1e-5, atol=1e-6)
    kernel = model.layers[0].kernel.get_value()
    assert (kernel is guest.layers[0].weight.value["weight"]) is share
    kinds = {type(node).__module__.split(".")[0] for _, node in nnx.iter_graph(model)}
    assert not kinds & {"brainstate", "shims"}
    sgd(model.train() or model, X)
    assert not np.allclose(model(X), shim(X))


def test_materialize_keeps_the_mode_and_the_random_stream():
    shim = shims.ToNNX(bnn.Sequential(bnn.Dropout(0.5)), rngs=nnx.Rngs(0))
    model = shim.materialize()
    assert (np.asarray(model(np.ones((8, 8), np.float32))) == 0).any()
    shim.eval()
    assert_array_equal(shim.materialize()(X), X)


def test_materialize_of_a_copy_has_the_copys_weights():
    shim = shims.ToNNX(bnn.Linear(3, 4, w_init=W, b_init=B))
    other = nnx.clone(shim)
    other.weight["bias"][...] = jnp.ones(4)
    assert_array_equal(other.materialize().bias[...], np.ones(4))
    assert_array_equal(shim.materialize().bias[...], B)


def test_materialize_of_hand_written_forward_logic_is_refused_with_the_path():
    shim = shims.ToNNX(Block())
    with pytest.raises(interop.UnsupportedStructureError, match="Block"):
        shim.materialize()


# -- robustness --


def test_an_exception_in_the_guest_leaves_everything_as_it_was():
    class Breaks(Block):
        def update(self, x):
            self.norm(self.inp(x))
            brainstate.random.normal()
            raise RuntimeError("no")

    guest = Breaks()
    shim = shims.ToNNX(guest, rngs=nnx.Rngs(0))
    key = brainstate.random.DEFAULT.value
    for call in (lambda m, x: m(x), nnx.jit(lambda m, x: m(x))):
        with pytest.raises(RuntimeError, match="no"):
            call(shim, X)
        assert brainstate.random.DEFAULT.value is key
        assert_states_concrete(guest)
        with pytest.raises(KeyError):
            brainstate.environ.get("fit")
        assert_allclose(shim.encode(X), X @ W + B, rtol=1e-5)


def test_many_threads_call_and_trace_one_shim_and_its_guest():
    block = Block(keep=0.5)
    shim = shims.ToNNX(block, rngs=nnx.Rngs(0))
    shim.eval()
    # nnx.jit empties and refills a module, so that other threads find it without attributes
    definition, state = nnx.split(shim)
    expected = np.asarray(native(block, X, fit=False))
    wrong: list[object] = []

    def work(kind: int) -> None:
        for i in range(15):
            with contextlib.ExitStack() as stack:
                if kind == 0:
                    stack.enter_context(brainstate.environ.context(fit=False))
                    out = block(X)
                elif kind == 1:
                    out = shim(X)
                else:
                    scale = float(i + 1)
                    traced = jax.jit(lambda state, s=scale: nnx.merge(definition, state)(X) * s)
                    out = traced(state) / scale
            if not np.allclose(out, expected, atol=1e-5):
                wrong.append(kind)

    threads = [threading.Thread(target=work, args=(kind % 3,)) for kind in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert_states_concrete(block)


def test_the_private_names_of_flax_that_views_stand_on_are_there():
    """Fails loudly when flax changes: see the docstring of shims/frameworks/nnx.py."""
    assert "_raw_value" in nnx.Variable.__slots__


def test_the_private_names_of_brainstate_that_the_key_exchange_stands_on_are_there():
    assert "_value" in vars(brainstate.random.DEFAULT)
    assert not brainstate._state.TRACE_CONTEXT.state_stack
    with brainstate.StateTraceStack():
        assert brainstate._state.TRACE_CONTEXT.state_stack


@pytest.mark.parametrize("is_copy", [False, True])
def test_values_that_an_update_adds_are_refused_by_the_next_call(is_copy):
    layer = brainstate.nn.Linear(3, 4, b_init=jnp.zeros(4))
    shim = shims.ToNNX(layer)
    shim = nnx.clone(shim) if is_copy else shim
    old = {"weight": {"bias": nnx.Param(jnp.ones(4)), "scale": nnx.Param(jnp.ones(4))}}
    nnx.update(shim, nnx.State(old))
    with pytest.raises(interop.ConversionError, match=r"Linear has no such.*weight\.scale"):
        shim(X)
    del shim.weight["scale"]
    assert_allclose(shim(X), X @ layer.weight.value["weight"] + 1, rtol=1e-6)
