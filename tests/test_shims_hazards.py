"""What once was silently wrong in a shim: right now, or refused by name."""

import collections
import copy
import functools
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import brainstate
import brainunit as u
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

bnn = brainstate.nn
X = array(4, 4, seed=61)
KEY = jax.random.key(0)


class Encoder(eqx.Module):
    linear: eqx.nn.Linear

    def __call__(self, x):
        return self.linear(x)

    def encode(self, x):
        return self.linear(x)


@pytest.mark.parametrize("into", ["brainstate", "nnx"])
def test_methods_of_an_equinox_guest_are_mapped_like_its_call(into):
    module = Encoder(eqx.nn.Linear(4, 4, key=KEY))
    shim = shims.wrap(module, into=into)
    assert_allclose(shim.encode(X), jax.vmap(module)(X), rtol=1e-5)


class HoldsMethod(bnn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.fn = self._forward

    def _forward(self, x):
        return self.inner(x)

    def update(self, x):
        return self.fn(x)


def test_an_attribute_that_reaches_the_original_module_is_refused():
    layer = bnn.Linear(4, 2)
    linen = shims.ToLinen(HoldsMethod(layer))
    uses = (
        lambda: nnx.grad(lambda m: m(X).sum())(shims.ToNNX(HoldsMethod(layer))),
        lambda: linen.init(KEY, X),
        lambda: shims.ToEquinox(HoldsMethod(layer))(X[0]),
    )
    for use in uses:
        with pytest.raises(
            interop.UnsupportedStructureError, match="bound method or a closure"
        ):
            use()
    assert shims.ToNNX(HoldsMethod(layer))(X).shape == (4, 2)  # the guest itself may


def test_an_nnx_attribute_that_reaches_a_module_is_refused():
    class Net(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
            self.fn = lambda x: self.linear(x)

        def __call__(self, x):
            return self.fn(x)

    with pytest.raises(interop.UnsupportedStructureError, match="fn is a function"):
        shims.FromNNX(Net())


def test_a_state_replaced_behind_the_shim_is_noticed_before_a_transformation():
    cell = bnn.GRUCell(4, 3)
    cell.init_state(4)
    shim = shims.ToNNX(cell)
    call = nnx.jit(lambda m, x: m(x))
    first = call(shim, X)
    cell.init_state(4)
    with pytest.raises(interop.ConversionError, match="refresh"):
        call(shim, X)
    shim.refresh()
    assert_allclose(call(shim, X), first, rtol=1e-6)
    shim.init_state(4)
    assert_allclose(call(shim, X), first, rtol=1e-6)


class FixesItsMode(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(x)


class NamesItTraining(nn.Module):
    @nn.compact
    def __call__(self, x, training):
        return nn.Dropout(0.5, deterministic=not training)(x)

    @nn.compact
    def encode(self, x, train=False):
        return nn.Dropout(0.5, deterministic=not train)(x)


def test_a_linen_layer_that_would_train_in_evaluation_is_refused():
    module = FixesItsMode()
    shim = shims.ToNNX(module, params=module.init(KEY, X))
    shim(X)
    shim.eval()
    with pytest.raises(interop.ArgumentError, match="use_running_average=False"):
        shim(X)


def test_the_mode_reaches_a_linen_guest_by_any_of_its_names():
    shim = shims.ToNNX(NamesItTraining(), rngs=nnx.Rngs(0), params={})
    ones = jnp.ones((20, 20))
    assert (np.asarray(shim(ones)) == 0).any()
    shim.eval()
    assert_array_equal(shim(ones), ones)
    assert (np.asarray(shim(ones, True, rngs=KEY, deterministic=False)) == 0).any()


@pytest.mark.parametrize(
    "make",
    [
        lambda: shims.ToNNX(eqx.nn.Dropout(0.5), rngs=nnx.Rngs(0)),
        lambda: shims.ToNNX(nn.Dropout(0.5), rngs=nnx.Rngs(0), params={}),
    ],
    ids=["equinox", "linen"],
)
def test_stock_layers_that_take_a_mode_or_key_are_guests(make):
    shim = make()
    ones = jnp.ones((20, 20))
    first, second = np.asarray(shim(ones)), np.asarray(shim(ones))
    assert (first != second).any()
    shim.eval()
    assert_array_equal(shim(ones), ones)


def test_an_nnx_dropout_without_streams_gets_the_hosts_key():
    ones = jnp.ones((20, 20))
    shim = shims.ToLinen(nnx.Dropout(0.5))
    out = [
        np.asarray(
            shim.apply({}, ones, deterministic=False, rngs={"dropout": jax.random.key(i)})
        )
        for i in range(2)
    ]
    assert (out[0] != out[1]).any()
    assert_array_equal(shim.apply({}, ones, deterministic=True), ones)


def test_one_array_seen_through_two_layers_of_shims_is_one_parameter():
    encoder = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    inner = bnn.Sequential(shims.FromNNX(encoder))
    net = nnx.Sequential(encoder, shims.ToNNX(inner))
    assert len(jax.tree.leaves(nnx.state(net))) == 2
    grads = nnx.grad(lambda m: m(X).sum())(net)
    assert len(jax.tree.leaves(grads)) == 2


class Unit(bnn.Module):
    def __init__(self):
        super().__init__()
        self.w = brainstate.ParamState(jnp.ones(4) * u.mV)

    def update(self, x):
        return x * self.w.value / u.mV


def test_a_changed_unit_is_an_error_instead_of_a_factor_of_a_thousand():
    guest = Unit()
    linen, equinox, shim = shims.ToLinen(guest), shims.ToEquinox(guest), shims.ToNNX(guest)
    variables = linen.init(KEY, X)
    guest.w.value = jnp.ones(4) * u.volt
    with pytest.raises(interop.ConversionError, match="unexpected params/w/mV"):
        linen.write_back(variables)
    with pytest.raises(interop.ConversionError, match="changed"):
        equinox.write_back()
    old = shim.w["mV"]
    with pytest.raises(interop.ConversionError, match="wrapped"):
        old.get_value()
    assert_array_equal(shim(X), 1000.0 * X)  # the module itself has changed, and shows it
    assert_array_equal(shims.ToNNX(guest).w["V"].get_value(), jnp.ones(4))


class Scaled(eqx.Module):
    w: jax.Array

    def __call__(self, x):
        return x * self.w / u.mV


def test_variables_in_one_unit_are_not_read_in_another():
    guest = Unit()
    variables = shims.ToLinen(guest).init(KEY, X)
    assert_array_equal(shims.ToLinen(guest).apply(variables, X), X)
    guest.w.value = jnp.ones(4) * u.volt
    others = [guest, Scaled(jnp.ones(4) * u.volt), Scaled(jnp.ones(4))]
    fits = r"missing params/w.*; unexpected params/w/mV\. .* as it is now"
    for shim in map(shims.ToLinen, others):
        for call in (shim.apply, shim.unwrap):
            with pytest.raises(interop.ConversionError, match=fits):
                call(variables, X) if call == shim.apply else call(variables)
    assert_array_equal(
        shims.ToLinen(guest).apply({"params": {"w": {"V": jnp.ones(4)}}}, X), 1000 * X
    )
    rate = Scaled(jnp.ones(4) * u.mV / u.ms)
    assert jax.tree.leaves(shims.ToLinen(rate).init(KEY, X)["params"]["w"]["mV per ms"])


def test_a_state_of_brainstate_shows_no_value_in_another_unit():
    class Held(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(4) * u.mV)

        def __call__(self, x):
            return x * self.w[...] / u.mV

    guest = Held()
    shim = shims.FromNNX(guest)
    old = shim.w["mV"]
    guest.w.set_value(jnp.ones(4) * u.volt)
    with pytest.raises(interop.ConversionError, match=r"w\.mV: .* become"):
        old.value = jnp.zeros(4)
    assert_array_equal(shim(X), 1000.0 * X)
    assert_array_equal(shim.w["V"].value, jnp.ones(4))


def test_random_streams_of_a_guest_need_batches_in_equinox():
    drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    with pytest.raises(interop.ArgumentError, match="random stream"):
        eqx.nn.make_with_state(shims.ToEquinox)(drop)


def test_a_call_that_changes_the_nnx_module_itself_is_refused():
    class Counts(nnx.Module):
        def __init__(self):
            self.calls = 0

        def __call__(self, x):
            self.calls += 1
            return x

    with pytest.raises(interop.UnsupportedStructureError, match="changes attributes"):
        shims.FromNNX(Counts())(X)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_intermediates_of_an_nnx_guest_are_not_state():
    class Sows(nnx.Module):
        def __call__(self, x):
            self.sow(nnx.Intermediate, "seen", x)
            return x

    guest = Sows()
    shim = shims.FromNNX(guest)
    for _ in range(3):
        assert_array_equal(shim(X), X)
    assert len(shim.states()) == 0


@pytest.mark.parametrize("wrap", [shims.ToNNX, None], ids=["ToNNX", "FromNNX"])
def test_setting_an_attribute_of_the_guest_on_the_shim_is_refused(wrap):
    guest = HoldsMethod(bnn.Linear(4, 2)) if wrap else nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    shim = (wrap or shims.FromNNX)(guest)
    with pytest.raises(interop.ArgumentError, match="unwrap"):
        setattr(shim, "fn" if wrap else "in_features", 3)


def test_attributes_that_compare_equal_are_not_taken_for_each_other():
    class Power(bnn.Module):
        def __init__(self, n):
            super().__init__()
            self.n, self.mask = n, np.ones(4, np.float32)

        def update(self, x):
            return jnp.asarray([1, 2]) * self.n, x * self.mask

    call = nnx.jit(lambda m, x: m(x))
    guest = Power(2)
    assert call(shims.ToNNX(guest), X)[0].dtype == jnp.int32
    assert call(shims.ToNNX(Power(2.0)), X)[0].dtype == jnp.float32
    guest.mask[0] = 0.0
    assert_array_equal(call(shims.ToNNX(guest), X)[1][:, 0], np.zeros(4))


def test_statistics_are_put_back_when_the_guest_raises():
    class Breaks(bnn.Module):
        def __init__(self):
            super().__init__()
            self.norm = bnn.BatchNorm0d((4,))

        def update(self, x):
            self.norm(x)
            raise RuntimeError("no")

    guest = Breaks()
    shim = shims.ToNNX(guest, rngs=nnx.Rngs(0))
    with pytest.raises(RuntimeError, match="no"):
        shim(X)
    assert_array_equal(guest.norm.running_mean.value, np.zeros(4))
    assert int(shim.rngs.count[...]) == 0


def test_a_state_that_is_not_wanted_is_an_error():
    shim = shims.ToEquinox(bnn.Linear(4, 2))
    _, state = eqx.nn.make_with_state(shims.ToEquinox)(bnn.BatchNorm0d((4,)), batched=True)
    for call in (lambda: shim(X[0], state=state), lambda: shim(X[0], state)):
        with pytest.raises(interop.ArgumentError, match="no state"):
            call()


def test_a_plain_array_attribute_of_an_nnx_guest_is_refused_by_name():
    class Net(nnx.Module):
        def __init__(self):
            self.table = nnx.data(jnp.ones(3))

        def __call__(self, x):
            return x

    with pytest.raises(interop.ArgumentError, match="table is a plain array"):
        shims.FromNNX(Net())


def test_a_state_that_holds_a_python_number():
    class Counter(bnn.Module):
        def __init__(self):
            super().__init__()
            self.count = brainstate.LongTermState(0)

        def update(self, x):
            self.count.value = self.count.value + 1
            return x + self.count.value

    guest = Counter()
    shim = shims.ToNNX(guest)
    call = nnx.jit(lambda m, x: m(x))
    assert_allclose(call(shim, X), X + 1, rtol=1e-6)
    assert_allclose(call(shim, X), X + 2, rtol=1e-6)
    assert int(guest.count.value) == 2


def test_keys_and_scalars_given_to_an_equinox_guest():
    class Scaled(eqx.Module):
        drop: eqx.nn.Dropout

        def __call__(self, x, scale, key=None):
            return self.drop(x * scale, key=key)

    shim = shims.FromEquinox(Scaled(eqx.nn.Dropout(0.5)))
    with brainstate.environ.context(fit=True):
        out = np.asarray(shim(jnp.ones((2, 100)), jnp.asarray(2.0), key=KEY))
    assert set(np.unique(out)) == {0.0, 4.0}
    assert (out[0] != out[1]).any()


def test_a_method_whose_argument_the_host_takes_itself_is_refused():
    class Encodes(bnn.Module):
        def update(self, x):
            return x

        def encode(self, x, key=None, deterministic=None):
            return x

    for shim, name in (
        (shims.ToLinen(Encodes()), "deterministic"),
        (shims.ToEquinox(Encodes()), "key"),
    ):
        with pytest.raises(interop.ArgumentError, match=f"encode has arguments.*{name}"):
            _ = shim.encode
    assert shims.ToNNX(Encodes()).encode(X, key=KEY) is X


def test_a_guest_whose_method_a_linen_module_has_itself_is_refused():
    class Binds(bnn.Module):
        def update(self, x):
            return x

        def bind(self): ...

    with pytest.raises(interop.ArgumentError, match="bind"):
        shims.ToLinen(Binds())


def test_collections_of_results_are_no_weights():
    shim = shims.ToLinen(bnn.Linear(4, 2))
    variables = shim.init(KEY, X)
    assert shim.apply({**variables, "intermediates": {"y": (X,)}}, X).shape == (4, 2)


def test_wrap_gives_the_class_that_is_named_after_the_guest():
    assert (
        type(shims.wrap(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), into="brainstate")) is shims.FromNNX
    )


class Keyed(bnn.Module):
    def __init__(self, *keys):
        super().__init__()
        pairs = ((key, jnp.full(4, 2.0 + i)) for i, key in enumerate(keys))
        self.w = brainstate.ParamState(collections.OrderedDict(pairs))

    def update(self, x):
        total = x
        for value in self.w.value.values():
            total = total * value
        return total


@pytest.mark.parametrize("into", ["linen", "equinox"])
def test_keys_that_are_numbers_and_text_are_kept_apart_or_refused(into):
    with pytest.raises(interop.ArgumentError, match=r"w\[1\] and w\.1, which is one place"):
        shims.wrap(Keyed(1, "1"), into=into)
    guest = Keyed(10, "9")
    shim = shims.wrap(guest, into=into)
    if into == "equinox":
        half = jax.tree.map(
            lambda a: a * jnp.arange(4.0) if eqx.is_inexact_array(a) else a, shim
        )
        assert_allclose(half(X[0]), X[0] * 6 * jnp.arange(4.0) ** 2, rtol=1e-6)
        half.write_back()
        assert_array_equal(guest.w.value["9"], 3 * np.arange(4.0))
    else:
        assert_allclose(shim.apply(shim.init(KEY, X), X), X * 6, rtol=1e-6)


class Scales(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.gain = 1.0

    def __call__(self, x):
        return self.gain * self.linear(x)


def test_a_changed_attribute_is_seen_through_two_layers_of_shims():
    guest = Scales()
    shim = shims.ToNNX(bnn.Sequential(shims.FromNNX(guest)))
    call = nnx.jit(lambda m, x: m(x))
    before = call(shim, X)
    guest.gain = 3.0
    assert_allclose(call(shim, X), 3 * before, rtol=1e-6)
    assert_allclose(shim(X), 3 * before, rtol=1e-6)


def test_a_variable_replaced_two_shims_down_is_shown_by_both():
    guest = Scales()
    shim = shims.ToNNX(bnn.Sequential(shims.FromNNX(guest)))
    guest.linear.kernel = nnx.Param(jnp.eye(4))
    guest.linear.bias = nnx.Param(jnp.ones(4))
    assert_allclose(shim(X), X + 1, rtol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_stream_of_the_guest_under_vmap_is_one_mask_for_all_lanes_and_advances(compiled):
    drop, ones = nnx.Dropout(0.5, rngs=nnx.Rngs(0)), np.ones((3, 40), np.float32)
    call = brainstate.transform.vmap(shims.FromNNX(drop))
    call = brainstate.transform.jit(call) if compiled else call
    with brainstate.environ.context(fit=True):
        first, second = np.asarray(call(ones)), np.asarray(call(ones))
    for out in (first, second):
        assert set(np.unique(out)) == {0.0, 2.0}
        assert_array_equal(out, np.stack([out[0]] * 3))
    assert (first != second).any()
    assert int(drop.rngs.count[...]) == 2
    keyed = brainstate.transform.vmap(shims.FromNNX(nnx.Dropout(0.5)))
    with brainstate.environ.context(fit=True):
        out = np.asarray(keyed(ones))
    assert (out[0] != out[1]).any()


class Noisy(nn.Module):
    """Adds noise where there is a stream for it."""

    @nn.compact
    def __call__(self, x, train=False):
        if train and self.has_rng("noise"):
            x = x + jax.random.normal(self.make_rng("noise"), x.shape)
        return nn.Dropout(0.0, deterministic=not train)(x)


def test_a_linen_guest_has_the_streams_of_nnx_by_name():
    shim = shims.ToNNX(Noisy(), rngs=nnx.Rngs(0, noise=1), params={})
    for call in (lambda m, **kw: m(X, **kw), nnx.jit(lambda m: m(X))):
        first, second = call(shim), call(shim)
        assert (np.asarray(first) != np.asarray(second)).any()
        assert abs(np.asarray(first - X).std() - 1) < 0.5
    keys = {"noise": nnx.Rngs(0, noise=1).noise(), "dropout": KEY}
    expected = Noisy().apply({}, X, train=True, rngs=keys)
    in_the_call = shims.ToNNX(Noisy(), params={})(X, rngs=nnx.Rngs(0, noise=1))
    assert_array_equal(in_the_call, expected)
    assert_array_equal(shim(X, deterministic=True), X)
    assert_array_equal(shims.ToNNX(Noisy(), rngs=nnx.Rngs(0), params={})(X), X)


def test_streams_are_put_back_when_a_guest_that_cannot_change_raises():
    class Breaks(nn.Module):
        def __call__(self, x, train=False):
            self.make_rng("noise")
            raise RuntimeError("no")

    shim = shims.ToNNX(Breaks(), rngs=nnx.Rngs(0, noise=1), params={})
    for call in (lambda m: m(X), nnx.jit(lambda m: m(X))):
        with pytest.raises(RuntimeError, match="no"):
            call(shim)
        counts = jax.tree.leaves(nnx.state(shim, nnx.RngCount))
        assert [int(count) for count in counts] == [0, 0]


class TakesKey(eqx.Module):
    linear: eqx.nn.Linear

    def __call__(self, x, key=None):
        return self.linear(x)


def _linen(module):
    return shims.FromLinen(module, module.init({"params": KEY, "dropout": KEY}, X))


QUIET = {  # by what tells that they cannot ask
    "an Equinox layer": lambda: shims.FromEquinox(eqx.nn.Linear(4, 4, key=KEY)),
    "an Equinox stack": lambda: shims.FromEquinox(eqx.nn.MLP(4, 4, 4, 2, key=KEY)),
    "a Linen layer": lambda: _linen(nn.Dense(4)),
    "a Linen stack": lambda: _linen(nn.Sequential([nn.Dense(4), jnp.tanh, nn.LayerNorm()])),
    "an NNX layer": lambda: shims.FromNNX(nnx.Linear(4, 4, rngs=nnx.Rngs(0))),
    "an NNX dropout with its own stream": lambda: shims.FromNNX(
        nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    ),
}
DRAWING = {
    "an Equinox stack": lambda: shims.FromEquinox(
        eqx.nn.Sequential([eqx.nn.Linear(4, 4, key=KEY), eqx.nn.Dropout(0.5)])
    ),
    "an Equinox module of one's own": lambda: shims.FromEquinox(
        TakesKey(eqx.nn.Linear(4, 4, key=KEY))
    ),
    "a Linen dropout": lambda: _linen(nn.Sequential([nn.Dropout(0.5, deterministic=False)])),
    "a Linen module of one's own": lambda: shims.FromLinen(Noisy(), {}),
    "an NNX dropout": lambda: shims.FromNNX(nnx.Dropout(0.5)),
}


def _draws_from_brainstate(shim, fit):
    brainstate.random.seed(0)
    before = brainstate.random.DEFAULT.value
    with brainstate.environ.context(fit=fit):
        shim(X)
    return brainstate.random.DEFAULT.value is not before


@pytest.mark.parametrize("name", QUIET)
def test_a_guest_that_needs_no_key_leaves_the_random_state_of_brainstate_alone(name):
    assert not _draws_from_brainstate(QUIET[name](), True)


@pytest.mark.parametrize("name", DRAWING)
def test_a_guest_that_may_need_a_key_draws_one_in_training(name):
    shim = DRAWING[name]()
    assert _draws_from_brainstate(shim, True)
    if name != "a Linen dropout":  # it fixes its mode
        assert not _draws_from_brainstate(shim, False)


def test_a_guest_that_may_need_a_key_and_does_not_trains_in_a_plain_transformation():
    shim = shims.FromEquinox(TakesKey(eqx.nn.Linear(4, 4, key=KEY)))
    drop = shims.FromEquinox(eqx.nn.Dropout(0.5))
    in_nnx = shims.ToNNX(bnn.Linear(4, 4), rngs=nnx.Rngs(0))
    with brainstate.environ.context(fit=True):
        assert_allclose(jax.jit(shim)(X), shim(X), rtol=1e-6)
        with pytest.raises(interop.MissingKeyError, match="brainstate.transform"):
            jax.jit(drop)(X)
    assert_allclose(jax.jit(lambda x: in_nnx(x))(X), in_nnx(X), rtol=1e-6)


def test_a_linen_layer_keeps_a_mode_that_its_fields_fix():
    drop = shims.FromLinen(nn.Dropout(0.5, deterministic=False), {})
    with brainstate.environ.context(fit=True):
        assert (np.asarray(drop(jnp.ones((20, 20)))) == 0).any()
    with (
        brainstate.environ.context(fit=False),
        pytest.raises(interop.ArgumentError, match="False"),
    ):
        drop(X)


class Counts(bnn.Module):
    """Changes an attribute in a call."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def update(self, x):
        self.calls = self.calls + 1
        return x * self.calls


class Accumulates(bnn.Module):
    """Makes its state in the first call."""

    def update(self, x):
        if not hasattr(self, "sum"):
            self.sum = brainstate.ShortTermState(jnp.zeros_like(x))
        self.sum.value = self.sum.value + x
        return self.sum.value


@pytest.mark.parametrize(
    ("guest", "text"), [(Counts, "changes attributes"), (Accumulates, "makes sum")]
)
def test_what_a_call_changes_beside_values_is_kept_or_refused(guest, text):
    linen, compiled = shims.ToLinen(guest()), nnx.jit(lambda m, x: m(x))
    for call in (
        lambda: linen.init(KEY, X),
        lambda: linen.apply({}, X),
        lambda: shims.ToEquinox(guest(), batched=True)(X),
        lambda: compiled(shims.ToNNX(guest()), X),
    ):
        with pytest.raises(interop.UnsupportedStructureError, match=text):
            call()
    for shim in (shims.ToNNX(guest()), nnx.clone(shims.ToNNX(guest()))):
        for n in (1, 2, 3):
            assert_allclose(shim(X), n * X, rtol=1e-6)


def test_state_made_before_wrapping_is_carried():
    guest = Accumulates()
    guest(X)
    shim = shims.ToLinen(guest)
    variables = shim.init(KEY, X)
    out, variables = shim.apply(variables, X, mutable=["carry"])
    assert_allclose(out, 2 * X, rtol=1e-6)
    assert_allclose(shim.apply(variables, X, mutable=["carry"])[0], 3 * X, rtol=1e-6)


def _arrays(tree):
    return eqx.filter(tree, eqx.is_array)


def _values(module):
    return [state.value for state in module.states().values()]


COPIED = {
    shims.ToNNX: (lambda: bnn.Linear(4, 4), _values, nnx.state),
    shims.ToLinen: (lambda: bnn.Linear(4, 4), _values, lambda shim: shim.init(KEY, X)),
    shims.ToEquinox: (lambda: bnn.Linear(4, 4), _values, _arrays),
    shims.FromNNX: (lambda: nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.state, _values),
}


@pytest.mark.parametrize("make", COPIED)
def test_a_shim_is_not_pickled_and_a_deep_copy_is_apart(make):
    build, arrays_of_guest, arrays_of_shim = COPIED[make]
    guest = build()
    shim = make(guest)
    with pytest.raises(interop.ArgumentError, match=r"cannot be pickled.*materialize"):
        pickle.dumps(shim)
    other = copy.deepcopy(shim)
    assert type(other) is type(shim)
    assert shim.unwrap() is guest
    assert other.unwrap() is not guest
    copies = jax.tree.leaves(arrays_of_shim(other))
    assert len(copies) == 2
    own = [id(array) for array in jax.tree.leaves(arrays_of_guest(guest))]
    if make is not shims.FromNNX:  # which may share an array until one side is written to
        assert not any(id(array) in own for array in copies)


def test_a_guest_that_is_gone_is_not_needed_to_go_on():
    shim, state = eqx.nn.make_with_state(shims.ToEquinox)(
        bnn.Sequential(bnn.Linear(4, 4), bnn.BatchNorm0d((4,))), batched=True
    )
    out, state = shim(X, state)
    assert out.shape == (4, 4)
    assert isinstance(shim.unwrap(state), bnn.Sequential)
    for use in (lambda: shim.write_back(state), shim.unwrap):
        with pytest.raises(interop.ArgumentError, match="refers to it"):
            use()


def test_other_threads_draw_from_brainstate_while_a_guest_has_the_hosts_key():
    has_drawn, may_go_on = threading.Event(), threading.Event()

    class Waits(bnn.Module):
        def update(self, x):
            noise = brainstate.random.normal(size=x.shape)
            has_drawn.set()
            assert may_go_on.wait(60)
            return x + noise + brainstate.random.normal(size=x.shape)

    def draw():
        brainstate.random.seed(7)
        return [float(brainstate.random.normal()) for _ in range(2)]

    shim, alone = shims.ToNNX(Waits(), rngs=nnx.Rngs(0)), draw()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(shim, X)
        assert has_drawn.wait(60)
        beside = draw()
        second = pool.submit(shims.ToNNX(Waits(), rngs=nnx.Rngs(0)), X)  # waits for nobody
        may_go_on.set()
    assert beside == alone
    assert_array_equal(first.result(), second.result())


class Steps(bnn.Module):
    """Reads a setting of BrainState."""

    def update(self, x):
        return x * (brainstate.environ.get("dt") / u.ms)


def test_a_changed_setting_of_brainstate_is_seen_by_a_compiled_function():
    shim, traces = shims.ToNNX(Steps()), []

    @nnx.jit
    def call(shim, x):
        traces.append(1)
        return shim(x)

    for dt, count in ((0.1, 1), (0.1, 1), (0.2, 2), (0.1, 2)):
        with brainstate.environ.context(dt=dt * u.ms):  # an equal quantity, another object
            assert_allclose(call(shim, X), X * dt, rtol=1e-6)
            scan = nnx.scan(
                lambda m, x: (m, m(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0)
            )
            assert_allclose(scan(shim, X[None])[1][0], X * dt, rtol=1e-6)
        assert len(traces) == count


NonTrainable = type(
    "NonTrainable",
    (eqx.Module,),
    {  # as paramax has it
        "__module__": "paramax.wrappers",
        "__annotations__": {"tree": object},
        "unwrap": lambda self: jax.tree.map(jax.lax.stop_gradient, self.tree),
    },
)


class Frozen(eqx.Module):
    kernel: NonTrainable
    bias: jax.Array

    def __call__(self, x):
        return self.kernel.unwrap()["w"] @ x + self.bias


@pytest.mark.parametrize("into", ["brainstate", "linen", "nnx"])
def test_what_paramax_freezes_is_no_parameter(into):
    weight = array(3, 4, seed=65)
    module = Frozen(NonTrainable({"w": weight}), array(3, seed=66))
    shim = shims.wrap(module, into=into)
    kinds = {row.path: row.kind for row in shims.explain(shim).rows}
    assert kinds == {"kernel.tree.w": "buffer", "bias": "parameter"}
    out = shim.apply(shim.init(KEY, X), X) if into == "linen" else shim(X)
    assert_allclose(out, X @ weight.T + module.bias, rtol=1e-5)


def test_parameters_named_params_have_no_place_in_linen():
    class Holds(bnn.Module):
        def __init__(self):
            super().__init__()
            self.params = {"w": brainstate.ParamState(jnp.ones(4))}

        def update(self, x):
            return x * self.params["w"].value

    with pytest.raises(interop.ArgumentError, match="attribute 'params'"):
        shims.ToLinen(Holds())
    assert_array_equal(shims.ToNNX(Holds())(X), X)
    assert shims.ToLinen(bnn.Sequential(Holds())).init(KEY, X).keys() == {"params"}


class Sows(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = self.perturb("perturbed", nn.Dense(4)(x))
        self.sow("intermediates", "seen", x)
        self.sow("losses", "size", (x**2).sum())
        return x


@pytest.mark.parametrize("into", ["brainstate", "equinox", "nnx"])
def test_what_a_linen_guest_sows_is_no_state(into):
    module = Sows()
    variables = module.init(KEY, X)
    weights = {"params": variables["params"]}
    assert set(variables) == {"params", "losses", "perturbations"}
    shim = shims.wrap(module, into=into, params=weights)
    for _ in range(2):
        out = jax.vmap(shim)(X) if into == "equinox" else shim(X)
        assert_allclose(out, module.apply(weights, X), rtol=1e-5)
    assert len(shims.explain(shim).rows) == 2
    if into == "equinox":
        make = eqx.nn.make_with_state(shims.ToEquinox)
        grown, state = make(module, params=variables, batched=True)
        grown = functools.partial(grown, state=state)
    else:
        grown = shims.wrap(module, into=into, params=variables)
    with pytest.raises(interop.UnsupportedStructureError, match=r"'losses', as sow does"):
        grown(X)


def test_a_brainstate_guest_may_draw_in_evaluation():
    class Noise(bnn.Module):
        def update(self, x):
            return x + brainstate.random.normal(size=x.shape)

    shim = shims.ToLinen(Noise(), deterministic=True)
    first, second = (
        shim.apply({}, X, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 1)
    )
    assert (np.asarray(first) != np.asarray(second)).any()
    with pytest.raises(interop.MissingKeyError):
        shim.apply({}, X)


def test_a_guest_of_brainstate_draws_the_hosts_key_in_a_transformation_of_brainstate():
    shim, x = shims.ToLinen(bnn.Dropout(0.7)), jnp.ones((6, 20))

    def call(x, key):
        return shim.apply({}, x, deterministic=False, rngs={"dropout": key})

    compiled = brainstate.transform.jit(call)
    brainstate.random.seed(0)
    before = brainstate.random.DEFAULT.value
    for key in jax.random.split(KEY):
        assert_array_equal(compiled(x, key), call(x, key))
    assert brainstate.random.DEFAULT.value is before


def test_a_brainstate_layer_in_an_nnx_module_trains_in_a_brainstate_program():
    class Block(nnx.Module):
        def __init__(self, layer):
            self.layer = layer

        def __call__(self, x):
            return jnp.tanh(self.layer(x))

    linear = bnn.Linear(4, 2)
    drop = bnn.Dropout(0.7)
    norm = bnn.BatchNorm0d((2,), momentum=0.8)
    layer = shims.ToNNX(bnn.Sequential(linear, norm, drop), rngs=nnx.Rngs(0))
    shim = shims.FromNNX(Block(layer))
    weights = shim.states(brainstate.ParamState)

    def loss():
        return (shim(X) ** 2).mean()

    @brainstate.transform.jit
    def step():
        for key, gradient in brainstate.transform.grad(loss, weights)().items():
            weights[key].value -= 0.1 * gradient

    mean, first = np.zeros(2), linear.weight.value["weight"]
    with brainstate.environ.context(fit=True):
        for _ in range(3):
            now = linear.weight.value
            h = X @ now["weight"] + now["bias"]
            mean = 0.8 * mean + 0.2 * np.asarray(h.mean(0))
            step()
            assert_allclose(np.ravel(norm.running_mean.value), mean, rtol=1e-4, atol=1e-6)
        masks = brainstate.transform.for_loop(shim, jnp.stack([X] * 4)) == 0
    assert (masks[1:] != masks[0]).any()
    assert (linear.weight.value["weight"] != first).all()
    now = linear.weight.value
    with brainstate.environ.context(fit=False):
        compiled = brainstate.transform.jit(shim)
        assert_allclose(compiled(X), np.tanh(norm(linear(X))), rtol=1e-5, atol=1e-6)
        linear.weight.value = {name: value * 2 for name, value in now.items()}
        assert_allclose(compiled(X), np.tanh(norm(linear(X))), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("host", ["linen", "nnx"])
def test_a_dropout_of_equinox_without_a_key_says_how_its_host_gives_one(host):
    shim = shims.wrap(eqx.nn.Sequential([eqx.nn.Dropout(0.3)]), into=host)
    call = functools.partial(shim.apply, {}, deterministic=False) if host == "linen" else shim
    with pytest.raises(interop.MissingKeyError, match="rngs="):
        call(X)


def test_a_shim_is_not_wrapped_again():
    shim = shims.ToNNX(bnn.Linear(4, 4))
    for into in ("brainstate", "equinox", "linen"):
        with pytest.raises(interop.ArgumentError, match=r"a shim itself.*unwrap"):
            shims.wrap(shim, into=into)


class Resistors(bnn.Module):
    def __init__(self):
        super().__init__()
        self.w = brainstate.ParamState(array(4, 2, seed=67) * u.ohm)

    def update(self, current):
        return current @ self.w.value


IN_HOST = {
    "nnx": lambda shim: lambda x: nnx.jit(lambda shim, x: shim(x))(shim, x),
    "linen": lambda shim: lambda x: jax.jit(shim.apply)(shim.init(KEY, x), x),
    "equinox": lambda shim: lambda x: eqx.filter_jit(lambda s, x: jax.vmap(s)(x))(shim, x),
}


@pytest.mark.parametrize("into", IN_HOST)
def test_arguments_and_results_of_a_brainstate_guest_keep_their_units(into):
    call = IN_HOST[into](shims.wrap(Resistors(), into=into))
    voltage = call(X * u.mA)
    assert_allclose(voltage.to_decimal(u.mV), X @ array(4, 2, seed=67), rtol=1e-5)


class ScalesInNnx(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(array(4, seed=68))

    def __call__(self, x):
        return x * self.w[...]


class ScalesInEquinox(eqx.Module):
    w: jax.Array

    def __call__(self, x):
        return x * self.w


class ScalesInLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x * self.param("w", lambda _: array(4, seed=68))


@pytest.mark.parametrize(
    "make",
    [
        lambda: shims.FromNNX(ScalesInNnx()),
        lambda: shims.FromEquinox(ScalesInEquinox(array(4, seed=68))),
        lambda: shims.FromLinen(ScalesInLinen(), ScalesInLinen().init(KEY, X)),
    ],
    ids=["nnx", "equinox", "linen"],
)
def test_arguments_and_results_keep_their_units_in_brainstate(make):
    out = brainstate.transform.jit(make())(X * u.mV)
    assert_allclose(1e3 * out.to_decimal(u.volt), X * array(4, seed=68), rtol=1e-5)


class Gains(bnn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.gain = bnn.Linear(4, 4), 1.0

    def update(self, x):
        return self.gain * self.linear(x)


def test_a_changed_attribute_is_seen_by_a_linen_shim_and_compiled_for_one_made_afterwards():
    guest, traces = Gains(), []
    shim = shims.ToLinen(guest)
    variables = shim.init(KEY, X)

    @functools.partial(jax.jit, static_argnums=0)
    def call(module, variables, x):
        traces.append(1)
        return module.apply(variables, x)

    before = call(shim, variables, X)
    call(shims.ToLinen(guest), variables, X)
    assert len(traces) == 1
    guest.gain = 3.0
    assert_allclose(shim.apply(variables, X), 3 * before, rtol=1e-6)
    assert_allclose(call(shims.ToLinen(guest), variables, X), 3 * before, rtol=1e-6)
    assert len(traces) == 2


def test_an_equinox_shim_has_the_attributes_that_its_guest_had():
    guest = Gains()
    shim = shims.ToEquinox(guest)
    before = shim(X[0])
    guest.gain = 3.0
    assert_array_equal(shim(X[0]), before)
    with pytest.raises(interop.ConversionError, match="changed since it was wrapped"):
        shim.write_back()
    assert_allclose(shims.ToEquinox(guest)(X[0]), 3 * before, rtol=1e-6)


def test_a_mode_that_is_missing_is_named_however_deep_the_layer_is():
    shim = shims.ToLinen(bnn.Sequential(bnn.Linear(4, 4), bnn.Dropout(0.5)))
    with pytest.raises(interop.ArgumentError, match="deterministic=True or False"):
        shim.init(KEY, X)


@pytest.mark.parametrize(
    "module",
    [
        eqx.nn.Linear(4, 4, key=KEY),
        eqx.nn.MLP(4, 4, 4, 1, key=KEY),
        eqx.nn.Sequential([eqx.nn.Linear(4, 4, key=KEY)]),
    ],
    ids=["Linear", "MLP", "Sequential"],
)
def test_a_batch_is_not_taken_for_a_matrix_by_equinoxs_linear(module):
    xs = jnp.stack([X, X + 1])
    with pytest.raises(interop.ArgumentError, match=r"examples of 1 axes.*\(2, 4, 4\)"):
        shims.FromEquinox(module)(xs)
    with pytest.raises(interop.ArgumentError, match="batch_axes"):
        shims.ToNNX(module)(xs)
    expected = jax.vmap(jax.vmap(module))(xs)
    assert_allclose(shims.FromEquinox(module, batch_axes=2)(xs), expected, rtol=1e-5)
    scalar = eqx.nn.Linear("scalar", 3, key=KEY)
    assert shims.FromEquinox(scalar)(X[0]).shape == (4, 3)


class NoisyInTraining(nn.Module):
    """Drops only where it is given a key, as it would in training."""

    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(x)


class NoisyWithKey(eqx.Module):
    drop: eqx.nn.Dropout = eqx.nn.Dropout(0.5)

    def __call__(self, x, *, key=None):
        return x if key is None else self.drop(x, key=key)


class CompiledWithKey(NoisyWithKey):
    __call__ = eqx.filter_jit(NoisyWithKey.__call__)


HIDDEN_DRAWS = {
    "a compiled call": CompiledWithKey(),
    "nn.remat": nn.remat(NoisyInTraining)(),
    "a function of Linen's Sequential": nn.Sequential([lambda x: NoisyInTraining()(x)]),
    "eqx.filter_jit": eqx.nn.Sequential([eqx.filter_jit(NoisyWithKey())]),
    "a partial": eqx.nn.Sequential([jax.tree_util.Partial(NoisyWithKey())]),
    "a function of Equinox's Sequential": eqx.nn.Sequential(
        [lambda x, key: NoisyWithKey()(x, key=key)]
    ),
}


@pytest.mark.parametrize("name", HIDDEN_DRAWS)
def test_a_key_reaches_what_draws_behind_a_transformation_or_a_function(name):
    guest, x = HIDDEN_DRAWS[name], jnp.ones((40, 10))
    keywords = {"params": {}} if isinstance(guest, nn.Module) else {}
    shim = shims.ToNNX(guest, rngs=nnx.Rngs(0), **keywords)
    assert 0.3 < float((shim(x) == 0).mean()) < 0.7
    assert (shim(x) != shim(x)).any()
    shim.eval()
    np.testing.assert_array_equal(shim(x), x)


class Rematerialised(bnn.Module):
    """Writes its statistics within a transformation of JAX, which BrainState does not see."""

    def __init__(self, checkpoint):
        super().__init__()
        self.norm, self.checkpoint = bnn.BatchNorm0d((3,)), checkpoint

    def update(self, x):
        return self.checkpoint(lambda x: self.norm(x))(x)


@pytest.mark.parametrize("kind", ["linked", "copied", "linen", "equinox"])
def test_what_a_transformation_of_jax_leaves_in_states_is_refused(kind):
    x = array(4, 3)
    for checkpoint in (jax.checkpoint, brainstate.transform.checkpoint):
        guest = Rematerialised(checkpoint)
        before = guest.norm.running_mean.value
        if kind == "linen":
            shim = shims.ToLinen(guest)
            variables = shim.init(jax.random.key(0), x, deterministic=True)
            mutable = [name for name in variables if name != "params"]
            run = functools.partial(
                shim.apply, variables, x, deterministic=False, mutable=mutable
            )
        elif kind == "equinox":
            make = eqx.nn.make_with_state(functools.partial(shims.ToEquinox, batched=True))
            shim, state = make(guest)
            run = functools.partial(shim, x, state)
        else:
            shim = shims.ToNNX(guest)
            run = functools.partial(shim if kind == "linked" else nnx.clone(shim), x)
        if checkpoint is jax.checkpoint:
            with pytest.raises(interop.InteropError, match="would outlive it"):
                run()
            assert guest.norm.running_mean.value is before
        else:
            assert not any(isinstance(v, jax.core.Tracer) for v in jax.tree.leaves(run()))


class Sowing(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(3, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        y = self.linear(x)
        self.sow(nnx.Intermediate, "hidden", y)
        return y


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
@pytest.mark.parametrize("into", ["brainstate", "linen", "equinox"])
def test_a_guest_that_has_sown_by_itself_is_wrapped_without_what_it_has_sown(into):
    guest, x = Sowing(), array(5, 3)
    wanted = guest(x)
    shim = shims.wrap(guest, into=into)
    for _ in range(2):
        if into == "linen":
            found = shim.apply(shim.init(jax.random.key(0), x), x)
        else:
            found = jax.vmap(shim)(x) if into == "equinox" else shim(x)
        assert_allclose(found, wanted, rtol=1e-6)
        guest(x)


class LinenNormed(nn.Module):
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=True):
        norm = nn.BatchNorm(axis_name=self.axis_name, name="norm")
        return norm(nn.Dense(4)(x), use_running_average=not train)


class NnxNormed(nnx.Module):
    def __init__(self, axis_name=None):
        rngs = nnx.Rngs(0)
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, axis_name=axis_name, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(x))


def brainstate_normed(axis_name=None):
    norm = bnn.BatchNorm0d((4,), axis_name=axis_name)
    return bnn.Sequential(bnn.Linear(4, 4), norm)


NORMED = {
    "brainstate": ("layers[1]", brainstate_normed),
    "linen": ("norm", LinenNormed),
    "nnx": ("norm", NnxNormed),
}


def normed_in(host, guest, *, train, **options):
    """Calls of a shim, eager and compiled."""
    module = NORMED[guest][1](**options)
    given = {}
    if guest == "linen":
        given["params"] = module.init(KEY, X, train=False)
    if host == "nnx":
        shim = shims.ToNNX(module, **given)
        (shim.train if train else shim.eval)()
        return [shim, lambda x: nnx.jit(lambda m, x: m(x))(shim, x)]
    if host == "linen":
        linen = shims.ToLinen(module, deterministic=not train, **given)
        variables = linen.init(KEY, X)
        return [lambda x: linen.apply(variables, x, mutable=["batch_stats"])[0]]
    if host == "equinox":
        make = eqx.nn.make_with_state(shims.ToEquinox)
        layer, state = make(module, batched=True, inference=not train, **given)
        return [lambda x: layer(x, state)[0]]
    wrapped = shims.wrap(module, into=host, **given)

    def call(x):
        with brainstate.environ.context(fit=train):
            return wrapped(x)

    return [call, brainstate.transform.jit(call)]


@pytest.mark.parametrize(
    ("guest", "host"),
    [(g, h) for g in NORMED for h in ("brainstate", "equinox", "linen", "nnx") if g != h],
)
def test_batch_statistics_of_one_example_are_refused(guest, host):
    path = NORMED[guest][0].replace("[", r"\[").replace("]", r"\]")
    for call in normed_in(host, guest, train=True):
        with pytest.raises(interop.ArgumentError, match=rf"at {path}, .* \[4\] has no batch"):
            call(X[0])
        assert_allclose(call(X).mean(0), np.zeros(4), atol=1e-5)
    for call in normed_in(host, guest, train=False):
        assert_allclose(call(X[0]), call(X)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_linen_batch_normalisation_with_a_call_of_its_own_is_left_alone(by_name):
    class Norm(nn.BatchNorm):
        def __call__(self, inputs, train):
            return super().__call__(inputs, use_running_average=not train)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            norm = Norm(momentum=0.7, name="norm")
            return norm(inputs=x, train=train) if by_name else norm(x, train)

    module = Model()
    shim = shims.ToNNX(module, params=module.init(KEY, X, train=False))
    shim(X)
    assert_allclose(shim.batch_stats["norm"]["mean"], 0.3 * X.mean(0), rtol=1e-5, atol=1e-6)
    shim.eval()
    assert_allclose(shim(X[0]), shim(X)[0], rtol=1e-5, atol=1e-6)


def test_a_guest_sees_its_layers_in_their_own_classes():
    class Asks(NnxNormed):
        def __call__(self, x):
            return 2 * self.norm(x) if type(self.norm) is nnx.BatchNorm else x

    shim = shims.FromNNX(Asks())
    with brainstate.environ.context(fit=True):
        assert_allclose(shim(X), Asks()(X), rtol=1e-5, atol=1e-6)
        with pytest.raises(interop.ArgumentError, match="at norm, .* no batch axis"):
            shim(X[0])


def test_a_layer_that_a_method_returns_is_as_it_was():
    class Shows(NnxNormed):
        def part(self):
            return self.norm, 1.0

    guest = Shows()
    part, _ = shims.FromNNX(guest).part()
    assert type(part) is nnx.BatchNorm
    assert part.promote_dtype is guest.norm.promote_dtype
    assert part(X[0]).shape == (4,)


@pytest.mark.parametrize("guest", NORMED)
def test_one_example_is_enough_for_statistics_over_a_named_axis(guest):
    (call,) = normed_in("equinox", guest, train=True, axis_name="batch")
    out = jax.vmap(call, axis_name="batch")(X)
    assert_allclose(out.mean(0), np.zeros(4), atol=1e-5)
    assert_allclose(out.var(0), np.ones(4), rtol=1e-3)


class Normalised(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(4, momentum=0.9, use_fast_variance=False, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x)


def test_numpy_arrays_that_hold_the_values_are_left_alone():
    """As a checkpoint gives them: NNX's layers write into the arrays that they have."""
    shim = shims.ToLinen(trained := Normalised(), deterministic=False)
    given = jax.tree.map(np.array, shim.init(jax.random.key(0), X))
    before = jax.tree.map(np.copy, given)

    def call():
        return shim.apply(given, X, mutable="batch_stats")[1]["batch_stats"]["norm"]

    for run in (call, jax.jit(call)):
        assert_allclose(run()["mean"], 0.1 * X.mean(0), rtol=1e-5)
        jax.tree.map(assert_array_equal, given, before)
    shim.write_back(given)
    trained(X)
    jax.tree.map(assert_array_equal, given, before)

    hosted = shims.FromNNX(guest := Normalised())
    zeros = np.zeros(4, np.float32)
    hosted.states()["norm", "mean"].value = zeros
    with brainstate.environ.context(fit=True):
        hosted(X)
    assert not zeros.any()
    assert_allclose(guest.norm.mean[...], 0.1 * X.mean(0), rtol=1e-5)


@pytest.mark.parametrize("host", ["equinox", "linen", "nnx"])
def test_errors_of_layers_in_a_brainstate_sequential_are_those_of_the_shim(host):
    inner = bnn.Sequential(bnn.Linear(4, 4), bnn.Dropout(0.5))
    guest = bnn.Sequential(bnn.Linear(4, 4), inner)
    shim = shims.wrap(guest, into=host)
    if host == "linen":
        call = functools.partial(shim.apply, shim.init(KEY, X, deterministic=True))
        call = functools.partial(call, deterministic=False)
    else:
        call = shim
    with pytest.raises(interop.MissingKeyError, match="draws random numbers"):
        call(X)

    class Raises(bnn.Module):
        def update(self, x):
            raise ValueError("no")

    with pytest.raises(brainstate.BrainStateError) as error:
        shims.ToNNX(bnn.Sequential(bnn.Linear(4, 4), Raises()))(X)
    assert isinstance(error.value.__cause__, ValueError)
