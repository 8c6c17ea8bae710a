"""``shims.FromNNX``, ``FromLinen`` and ``FromEquinox``: foreign modules in BrainState."""

import copy
import inspect

import brainstate
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.errors import FlaxError
from numpy.testing import assert_allclose, assert_array_equal

import interop
import shims

from .cases import array

X = array(5, 3, seed=31)
W, B = array(3, 4, seed=32), array(4, seed=33)


def nnx_linear():
    layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    layer.kernel.set_value(W)
    layer.bias.set_value(B)
    return layer


class Several(nnx.Module):
    """Several inputs and outputs, nested containers, a method of its own."""

    def __init__(self):
        self.parts = nnx.List([nnx_linear(), nnx.Dict(scale=nnx.Param(jnp.full(4, 2.0)))])
        self.gain = 3.0

    def __call__(self, x, y, *, shift=0.0):
        """Return a pair."""
        out = self.parts[0](x) * self.parts[1]["scale"][...] + shift
        return {"sum": out + y}, out

    def encode(self, x):
        return self.parts[0](x)


# -- one storage cell --


def test_a_write_on_either_side_shows_on_the_other_at_once():
    layer = nnx_linear()
    shim = shims.FromNNX(layer)
    assert shim.kernel.value is layer.kernel.get_value()
    shim.bias.value = jnp.ones(4)
    assert_array_equal(layer.bias[...], np.ones(4))
    layer.kernel[...] = jnp.zeros((3, 4))
    assert_array_equal(shim.kernel.value, np.zeros((3, 4)))
    assert_array_equal(shim(X), np.ones((5, 4)))


def test_two_shims_of_one_layer_have_one_state():
    layer = nnx_linear()
    assert shims.FromNNX(layer).kernel is shims.FromNNX(layer).kernel


def test_a_layer_used_twice_is_one_parameter():
    layer = nnx_linear()
    shim = shims.FromNNX(nnx.Sequential(layer, lambda x: x[:, :3], layer))
    assert len(shim.states(brainstate.ParamState)) == 2


@pytest.mark.parametrize(
    "value", [jnp.zeros((4, 3)), jnp.zeros((3, 4), jnp.float16), "weights"], ids=str
)
def test_a_write_that_does_not_fit_is_refused_and_changes_nothing(value):
    layer = nnx_linear()
    shim = shims.FromNNX(layer)
    with pytest.raises((interop.ConversionError, ValueError)):
        shim.kernel.value = value
    assert_array_equal(layer.kernel[...], W)


def test_tracers_stay_in_the_state():
    layer = nnx_linear()
    shim = shims.FromNNX(layer)
    seen = []

    @brainstate.transform.jit
    def double(x):
        shim.kernel.value = shim.kernel.value * 2
        seen.append(layer.kernel.get_value())
        return shim(x)

    assert_allclose(double(X), X @ (2 * W) + B, rtol=1e-5)
    assert_array_equal(seen[0], W)
    assert_array_equal(layer.kernel[...], 2 * W)


class Normalised(nnx.Module):
    def __init__(self):
        self.linear = nnx_linear()
        self.norm = nnx.BatchNorm(4, momentum=0.9, use_fast_variance=False, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(self.linear(x))


def test_brainstates_vmap_maps_a_guest_that_has_members():
    members = nnx.vmap(lambda _: Normalised())(jnp.arange(2))
    members.linear.kernel.set_value(jnp.stack([W, 2 * W]))
    shim = shims.FromNNX(members)
    params, states = shim.states(brainstate.ParamState), shim.states()
    h = np.stack([X @ W + B, X @ (2 * W) + B])
    mean, var = h.mean(1), h.var(1)
    expected = (h - mean[:, None]) / np.sqrt(var[:, None] + 1e-5)

    def train(x):
        def loss():
            out = shim(x)
            return out.sum(), out

        grads, out = brainstate.transform.grad(loss, params, has_aux=True)()
        for path, state in params.items():
            state.value = state.value - 0.1 * grads[path]
        return out

    for transform in (brainstate.transform.jit, lambda f: f):
        mapped = brainstate.transform.vmap(train, in_axes=None, in_states=states)
        with brainstate.environ.context(fit=True):
            out = transform(mapped)(X)
        # The gradient of the norm's shift is the size of the batch, and of all before it zero.
        assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
        expected = expected - 0.5
    assert_allclose(members.norm.bias[...], np.full((2, 4), -1.0), rtol=1e-5)
    assert_allclose(members.norm.mean[...], 0.19 * mean, rtol=1e-4, atol=1e-5)
    assert_allclose(members.norm.var[...], 0.81 + 0.19 * var, rtol=1e-4)
    shown = states["linear", "kernel"].value
    assert shown is members.linear.kernel.get_value()
    assert shown.shape == (2, 3, 4)


def test_members_of_a_guest_without_them_are_refused_and_leave_nothing():
    layer = nnx_linear()
    shim = shims.FromNNX(layer)
    stacked = {path: jnp.stack([state.value] * 3) for path, state in shim.states().items()}
    with pytest.raises(interop.ConversionError, match=r"graph\.clone"):
        shim.bias.value = stacked["bias",]

    def scale(factor):
        for state in (shim.bias, shim.kernel):
            state.value = state.value * factor

    vmap = brainstate.transform.vmap
    with pytest.raises(interop.ConversionError, match=r"nnx\.vmap"):
        vmap(scale, out_states=shim.states())(jnp.arange(3.0))
    assert_allclose(brainstate.transform.jit(lambda: shim(X))(), X @ W + B, rtol=1e-5)
    made = brainstate.transform.vmap_new_states(
        lambda: shims.FromNNX(nnx_linear())(X), state_tag="new", axis_size=2
    )
    with pytest.raises(interop.ConversionError, match=r"nnx\.vmap"):
        made()
    assert_allclose(shim(X), X @ W + B, rtol=1e-5)
    copied = brainstate.graph.clone(shim)
    for path, state in copied.states().items():
        state.value = stacked[path]
    out = vmap(copied, in_axes=None, in_states=copied.states())(X)
    assert_allclose(out, np.stack([X @ W + B] * 3), rtol=1e-5)
    assert_array_equal(layer.kernel[...], W)


COPIES = {"deepcopy": copy.deepcopy, "clone": brainstate.graph.clone}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_owns_its_values(how):
    layer = nnx_linear()
    other = COPIES[how](shims.FromNNX(layer))
    other.kernel.value = jnp.zeros((3, 4))
    assert_array_equal(layer.kernel[...], W)
    assert_array_equal(other(X), np.broadcast_to(B, (5, 4)))
    assert other.unwrap() is not layer
    assert_array_equal(other.unwrap().kernel[...], np.zeros((3, 4)))


@pytest.mark.parametrize("method", ["copy", "replace"])
def test_a_copied_state_owns_its_value(method):
    layer = nnx_linear()
    state = getattr(shims.FromNNX(layer).kernel, method)()
    state.value = jnp.zeros((3, 4))
    assert_array_equal(layer.kernel[...], W)


# -- mode and randomness --


def test_fit_reaches_the_guest_and_its_own_flags_hold_without_it():
    drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    shim = shims.FromNNX(nnx.Sequential(drop))
    ones = jnp.ones((20, 20))
    with brainstate.environ.context(fit=False):
        assert_array_equal(shim(ones), ones)
    assert (np.asarray(shim(ones)) == 0).any()
    drop.deterministic = True
    assert_array_equal(shim(ones), ones)
    with brainstate.environ.context(fit=True):
        assert (np.asarray(shim(ones)) == 0).any()
    assert drop.deterministic is True


def test_the_guests_own_stream_advances():
    drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    shim = shims.FromNNX(drop)
    call = brainstate.transform.jit(lambda x: shim(x))
    with brainstate.environ.context(fit=True):
        first, second = call(jnp.ones((20, 20))), call(jnp.ones((20, 20)))
    assert not np.array_equal(first, second)
    assert int(drop.rngs.count[...]) == 2


class DrawsAndRaises(eqx.Module):
    def __call__(self, x, key):
        raise ValueError("no")


class LinenDrawsAndRaises(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        nn.Dropout(0.5, deterministic=not train)(x)
        raise ValueError("no")


class NnxDrawsAndRaises(nnx.Module):
    def __call__(self, x, rngs):
        rngs.dropout()
        raise ValueError("no")


@pytest.mark.parametrize(
    "make",
    [
        lambda: shims.FromEquinox(DrawsAndRaises()),
        lambda: shims.FromLinen(LinenDrawsAndRaises(), {}),
        lambda: shims.FromNNX(NnxDrawsAndRaises()),
    ],
    ids=["equinox", "linen", "nnx"],
)
def test_a_call_that_raises_leaves_the_global_random_state_as_it_was(make):
    shim = make()
    with brainstate.random.seed_context(3), brainstate.environ.context(fit=True):
        before = brainstate.random.DEFAULT.value
        with pytest.raises(ValueError, match="no"):
            shim(X)
        assert brainstate.random.DEFAULT.value is before


# -- transparency --


def test_any_signature_and_methods_and_attributes_are_forwarded():
    guest = Several()
    shim = shims.FromNNX(guest)
    (total, out), (wanted, out_wanted) = shim(X, 1.0, shift=2.0), guest(X, 1.0, shift=2.0)
    assert_allclose(total["sum"], wanted["sum"], rtol=1e-6)
    assert_allclose(out, out_wanted, rtol=1e-6)
    assert_allclose(shim.encode(X), X @ W + B, rtol=1e-5)
    assert shim.gain == 3.0
    assert list(inspect.signature(shim).parameters) == ["x", "y", "shift"]
    assert shim.__doc__ == "Return a pair."
    assert {path for path in shim.states()} == {
        ("parts", 0, "kernel"),
        ("parts", 0, "bias"),
        ("parts", 1, "scale"),
    }


def test_a_module_of_another_framework_is_refused_by_name():
    with pytest.raises(interop.ArgumentError, match="of nnx, got one of linen"):
        shims.FromNNX(nn.Dense(3))
    with pytest.raises(interop.ArgumentError, match="class, not an instance"):
        shims.FromEquinox(eqx.nn.Linear)
    with pytest.raises(interop.ArgumentError, match="params="):
        shims.FromLinen(nn.Dense(3), None)
    with pytest.raises(interop.ArgumentError, match=r"no array: params\.bias, params\.kernel"):
        shims.FromLinen(nn.Dense(3), {"params": {"kernel": "w", "bias": object()}})
    with pytest.raises(interop.ArgumentError, match="state="):
        shims.FromEquinox(eqx.nn.BatchNorm(3, "batch", mode="batch"))


# -- equinox guests --


def test_an_equinox_guest_is_mapped_over_the_batch_axes():
    layer = eqx.nn.Linear(3, 4, key=jax.random.key(0))
    expected = X @ layer.weight.T + layer.bias
    assert_allclose(shims.FromEquinox(layer)(X), expected, rtol=1e-5)
    twice = shims.FromEquinox(layer, batch_axes=2)(jnp.stack([X, X]))
    assert_allclose(twice, np.stack([expected, expected]), rtol=1e-5)
    assert_allclose(shims.FromEquinox(layer, batch_axes=0)(X[0]), expected[0], rtol=1e-5)


class Shifted(eqx.Module):
    def __call__(self, x, *, shift):
        return x + shift


def test_arrays_by_name_are_mapped_as_well_and_one_without_a_batch_axis_says_so():
    shim, shift = shims.FromEquinox(Shifted()), np.arange(3.0, dtype=np.float32)
    assert_allclose(shim(X, shift=jnp.stack([shift] * len(X))), X + shift)
    with pytest.raises(ValueError, match="inconsistent sizes") as e:
        shim(X, shift=shift)
    note = " ".join(e.value.__notes__)
    assert "(3,), and saw examples" in note
    assert "in every array argument" in note


def test_an_input_with_too_few_axes_is_an_error():
    layer = eqx.nn.Dropout(0.5)
    with (
        pytest.raises(interop.ArgumentError, match="batch"),
        brainstate.environ.context(fit=True),
    ):
        shims.FromEquinox(layer, batch_axes=2)(X[0])


class Normed(eqx.Module):
    linear: eqx.nn.Linear
    norm: eqx.nn.BatchNorm

    def __init__(self, axis_name):
        key = jax.random.key(0)
        self.linear = eqx.nn.Linear(3, 4, key=key)
        self.norm = eqx.nn.BatchNorm(4, axis_name, mode="ema", momentum=0.9, eps=1e-4)

    def __call__(self, x, state, shift=0.0):
        return self.norm(self.linear(x) + shift, state)


def normed(axis_name, **options):
    module, state = eqx.nn.make_with_state(Normed)(axis_name)
    return shims.FromEquinox(module, state, **options), module


@pytest.mark.parametrize(
    "axis_name", ["batch", ("outer", "inner"), ["outer", "inner"]], ids=str
)
def test_statistics_over_two_batch_axes_are_those_of_all_examples(axis_name):
    shim, module = normed(axis_name, batch_axes=2)
    x = jnp.stack([X, 2 * X + 1])
    shift = jnp.array([1.0, -1.0])  # one for each of the outer axis
    call = brainstate.transform.jit(shim)
    with brainstate.environ.context(fit=True):
        out = call(x, shift=shift)
        call(x, shift=shift)
    h = x @ module.linear.weight.T + module.linear.bias + shift[:, None, None]
    mean, var = h.mean((0, 1)), h.var((0, 1))
    assert_allclose(out, (h - mean) / np.sqrt(var + 1e-4), rtol=1e-4, atol=1e-5)
    with brainstate.environ.context(
        fit=False
    ):  # the first batch sets them, the second is equal
        assert_allclose(shim(x, shift=shift), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "over", "axes"),
    [("b", "b", (0, 1)), (("a", "b"), "b", 1), (("a", "b"), ("a", "b"), (0, 1))],
    ids=["one name", "the second of two", "both"],
)
def test_a_module_reduces_over_the_axes_that_it_is_given_names_for(names, over, axes):
    class Centred(eqx.Module):
        def __call__(self, x, y):
            return x - jax.lax.pmean(x, over) + y

    x = jnp.stack([X, 2 * X + 1])
    shim = shims.FromEquinox(Centred(), batch_axes=2, axis_name=names)
    expected = x - x.mean(axes, keepdims=True) + 3.0
    assert_allclose(shim(x, 3.0), expected, rtol=1e-4, atol=1e-5)


def test_statistics_over_axes_that_nothing_maps_over_are_refused():
    single, module = normed("batch", batch_axes=0)
    several, _ = normed(("outer", "inner"))
    twice, _ = normed("batch", batch_axes=2)
    before = [jax.tree.leaves(s.value) for s in single.states().values()]
    with brainstate.environ.context(fit=True):
        with pytest.raises(interop.ArgumentError, match=r"name: batch\. Set batch_axes=1"):
            single(X[0])
        with pytest.raises(interop.ArgumentError, match=r"name: inner\. .* as many as"):
            several(X)
        with pytest.raises(interop.ArgumentError, match=r"are \(2, 5\), and .* \(5, 2\)"):
            twice(jnp.stack([X, X]), shift=jnp.zeros((5, 2)))
    after = [jax.tree.leaves(s.value) for s in single.states().values()]
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))
    with brainstate.environ.context(fit=False):
        assert single(X[0]).shape == (4,)

    class Misspelt(eqx.Module):
        def __call__(self, x):
            return x * weigth  # noqa: F821

    with pytest.raises(NameError, match="weigth"):
        shims.FromEquinox(Misspelt())(X)


@pytest.mark.parametrize("x", [X[0], 1.0, X[None]], ids=np.ndim)
def test_an_example_of_another_rank_is_refused(x):
    layer = eqx.nn.Linear(3, 4, key=jax.random.key(0))
    with pytest.raises(interop.ArgumentError, match="batch_axes"):
        shims.FromEquinox(layer)(x)


def test_a_state_of_another_module_is_refused():
    _, of_norm = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, "batch", mode="ema")
    (module, _), both = eqx.nn.make_with_state(lambda: (Normed("a"), Normed("b")))()
    with pytest.raises(interop.ArgumentError, match=r"nothing for .*norm\.ema.*beside"):
        shims.FromEquinox(module, of_norm)
    with pytest.raises(interop.ArgumentError, match=r"more than BatchNorm has.*substate"):
        shims.FromEquinox(module.norm, both)
    with pytest.raises(interop.ArgumentError, match=r"more than Linear has.*Leave it out"):
        shims.FromEquinox(module.linear, both)
    assert shims.FromEquinox(module.norm, both.substate(module.norm)).unwrap()[0].eps == 1e-4


def test_linen_variables_that_do_not_fit_are_one_error_with_all_paths():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, train=True):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
            return nn.Dense(2)(x)

    module = Block()
    variables = module.init(jax.random.key(0), X)
    shim = shims.FromLinen(module, variables)
    with brainstate.environ.context(fit=False):
        assert_allclose(shim(X), module.apply(variables, X, train=False), rtol=1e-6)
        with pytest.raises(
            interop.ConversionError, match=r"Dense_0.kernel is \[3, 4\], wanted"
        ):
            shim(X[:, :2])
        with pytest.raises(TypeError, match="takes"):
            shim(X, True, 3)
    params = {**variables["params"], "Dense_1": {"kernel": jnp.ones((5, 2))}, "spare": W}
    del params["Dense_0"]
    bad = shims.FromLinen(module, {"params": params})
    for call in (bad, brainstate.transform.jit(bad)):
        with (
            pytest.raises(interop.ConversionError) as error,
            brainstate.environ.context(fit=False),
        ):
            call(X)
        assert error.value.missing == (
            "batch_stats.BatchNorm_0.mean",
            "batch_stats.BatchNorm_0.var",
            "params.Dense_0.bias",
            "params.Dense_0.kernel",
            "params.Dense_1.bias",
        )
        assert error.value.unexpected == ("params.spare",)
        assert error.value.mismatched == ("params.Dense_1.kernel is [5, 2], wanted [4, 2]",)
        assert isinstance(error.value.__cause__, FlaxError)


def test_each_example_gets_a_key_of_its_own():
    shim = shims.FromEquinox(eqx.nn.Dropout(0.5))
    with brainstate.environ.context(fit=True):
        out = np.asarray(shim(jnp.ones((2, 100))))
    assert not np.array_equal(out[0], out[1])


# -- materialize --


def test_materialize_and_unwrap():
    shim = shims.FromNNX(nnx.Sequential(nnx_linear(), nnx.relu))
    layer = shim.materialize()
    assert type(layer) is brainstate.nn.Sequential
    assert_allclose(layer(X), np.maximum(X @ W + B, 0), rtol=1e-5)
    module = nn.Dense(4)
    params = {"params": {"kernel": W, "bias": B}}
    linen = shims.FromLinen(module, params)
    linen.params["bias"].value = jnp.zeros(4)
    back, variables = linen.unwrap()
    assert back == module
    assert_array_equal(variables["params"]["bias"], np.zeros(4))
    assert_array_equal(params["params"]["bias"], B)
    assert_allclose(linen.materialize()(X), X @ W, rtol=1e-5)


def test_the_private_name_that_views_stand_on_is_there():
    """Fails loudly when brainstate changes: see shims/frameworks/brainstate/host.py."""
    assert "_value" in vars(brainstate.ParamState(jnp.zeros(2)))
