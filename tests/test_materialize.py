"""Leave the shim behind: traced and converted modules, alone and inside whole models."""

import subprocess
import sys
import textwrap
from pathlib import Path

import brainstate
import equinox as eqx
import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import interop
import shims
from shims.frameworks.equinox.traced import Traced as EquinoxTraced
from shims.frameworks.nnx.traced import Traced as NnxTraced

from . import live
from .cases import array
from .conftest import Framework

ROOT = Path(__file__).parents[1]
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}
X = array(5, 3, seed=31)
W, B = array(3, 3, seed=32), array(3, seed=33)


class Residual(brainstate.nn.Module):
    """x + tanh(x W + b), with forward logic of its own."""

    def __init__(self, weight=W, bias=B):
        super().__init__()
        self.inner = brainstate.nn.Linear(3, 3, w_init=weight, b_init=bias)

    def update(self, x):
        return x + jnp.tanh(self.inner(x))


def residual(x, w=W, b=B):
    return x + jnp.tanh(x @ w + b)


def quiet(x):
    return (residual(x) ** 3).sum()


@pytest.fixture(scope="module")
def traced():
    return shims.ToNNX(Residual()).materialize(method="trace", sample_input=X)


# -- one shim --


def test_a_traced_module_computes_and_keeps_paths_and_kinds(traced):
    assert_allclose(traced(X), residual(X), **TOLERANCE)
    flat = dict(nnx.to_flat_state(nnx.state(traced, nnx.Param)))
    assert sorted(flat) == [("inner", "weight", "bias"), ("inner", "weight", "weight")]
    assert "Residual: float32[b, 3] -> float32[b, 3]; for evaluation" in repr(traced)


def test_a_traced_module_takes_another_batch_size_and_no_other_shape(traced):
    assert_allclose(traced(X[:2]), residual(X[:2]), **TOLERANCE)
    with pytest.raises(
        interop.ArgumentError, match=r"float32\[b, 3\], and got float32\[5, 2\]"
    ):
        traced(X[:, :2])
    with pytest.raises(interop.ArgumentError, match="int32"):
        traced(X.astype(jnp.int32))


def test_a_traced_module_has_first_and_second_derivatives(traced):
    definition, state = nnx.split(traced)

    def loss(x):
        return (nnx.merge(definition, state)(x) ** 3).sum()

    assert_allclose(jax.grad(loss)(X), jax.grad(quiet)(X), **TOLERANCE)
    found = jax.jit(jax.jacrev(jax.jacrev(loss)))(X[:2])
    assert_allclose(found, jax.hessian(quiet)(X[:2]), rtol=2e-4, atol=2e-5)
    with pytest.raises(interop.UnsupportedStructureError, match="differentiates twice"):
        jax.grad(lambda x: jax.grad(lambda y: jax.grad(loss)(y).sum())(x).sum())(X[:1])


def test_a_traced_module_maps_over_inputs_and_weights(traced):
    definition, state = nnx.split(traced)

    def call(state, x):
        return nnx.merge(definition, state)(x)

    xs = jnp.stack([X, X + 1, X - 1])
    many = jax.tree.map(lambda a: jnp.stack([a, 2 * a, 3 * a]), state)
    expected = jnp.stack(
        [residual(x, k * W, k * B) for k, x in zip((1, 2, 3), xs, strict=True)]
    )
    assert_allclose(jax.vmap(call)(many, xs), expected, **TOLERANCE)
    nested = jax.vmap(lambda s: jax.vmap(lambda x: call(s, x))(xs))(many)
    assert_allclose(nested[1], residual(xs, 2 * W, 2 * B), **TOLERANCE)
    over_x = jax.vmap(lambda x: jax.vmap(lambda s: call(s, x))(many))(xs)
    assert_allclose(over_x[1, 2], residual(xs[1], 3 * W, 3 * B), **TOLERANCE)
    slopes = jax.vmap(jax.grad(lambda x: (call(state, x[None]) ** 3).sum()))(X)
    assert_allclose(slopes, jax.grad(quiet)(X), **TOLERANCE)


@pytest.mark.parametrize("name", ["nnx", "linen", "equinox", "brainstate"])
def test_batch_norm_trains_in_a_traced_module_of_every_host(name):
    """The block of ``live``: batch normalisation, and forward logic of its own."""
    guest = Framework("nnx" if name == "brainstate" else "brainstate")
    module, keywords = guest.arguments(guest.block())
    if name == "equinox":
        made, state = eqx.nn.make_with_state(
            lambda: shims.ToEquinox(module, batched=True, **keywords).materialize(
                method="trace", sample_input=live.X, train=True
            )
        )()
        out, state = made(live.X, state)
        stats = jax.tree.leaves(state)
    else:
        shim = shims.wrap(module, into=name, **keywords)
        made = shim.materialize(method="trace", sample_input=live.X, train=True)
        if name == "nnx":
            out, stats = made(live.X), jax.tree.leaves(nnx.state(made, nnx.BatchStat))
        elif name == "linen":
            model, variables = made
            out, changed = model.apply(variables, live.X, mutable=["batch_stats"])
            stats = jax.tree.leaves(changed)
        else:
            with brainstate.environ.context(fit=True):
                out = made(live.X)
            stats = [s.value for s in made.states(brainstate.BatchState).values()]
    expected, after = live.truth(live.PARAMS, live.STATS, live.X, True)
    assert_allclose(out, expected, **TOLERANCE)
    found = sorted(np.asarray(stats).ravel().tolist())
    wanted = sorted(np.concatenate([after["mean"], after["var"]]).tolist())
    assert_allclose(found, wanted, **TOLERANCE)


def test_a_module_that_was_traced_for_evaluation_refuses_to_train(traced):
    with pytest.raises(interop.ArgumentError, match="train=True"):
        traced(X, deterministic=False)


class Dropping(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = brainstate.nn.Dropout(0.7)

    def update(self, x):
        return 2 * self.drop(x)


def test_dropout_draws_fresh_masks_from_the_hosts_keys():
    shim = shims.ToNNX(Dropping(), rngs=nnx.Rngs(0))
    ones = jnp.ones((40, 30))
    made = shim.materialize(method="trace", sample_input=ones, train=True)
    first, second = made(ones), made(ones)
    assert (np.asarray(first) != np.asarray(second)).any()
    assert_allclose(np.unique(first), [0.0, 2 / 0.7], rtol=1e-6)
    assert_allclose((np.asarray(first) > 0).mean(), 0.7, atol=0.05)
    made.eval()
    assert_array_equal(made(ones), 2 * ones)
    made.train()
    with pytest.raises(interop.MissingKeyError):
        shims.ToNNX(Dropping()).materialize(method="trace", sample_input=ones, train=True)(ones)


class Recurrent(brainstate.nn.Module):
    """The sum over time of an Elman cell's hidden state, which goes on from call to call."""

    def __init__(self):
        super().__init__()
        self.weight = brainstate.ParamState(W)
        self.h = brainstate.HiddenState(jnp.zeros((5, 3)))

    def update(self, xs):
        def step(h, x):
            h = jnp.tanh(x + h @ self.weight.value)
            return h, h

        self.h.value, hs = jax.lax.scan(step, self.h.value, jnp.swapaxes(xs, 0, 1))
        return hs.sum(0)


def test_hidden_state_goes_on_and_takes_another_batch_size():
    xs = array(5, 4, 3, seed=34)
    made = shims.ToNNX(Recurrent()).materialize(method="trace", sample_input=xs)
    h, expected = jnp.zeros((5, 3)), []
    for _ in range(2):
        total = 0
        for t in range(4):
            h = jnp.tanh(xs[:, t] + h @ W)
            total += h
        expected.append(total)
    assert_allclose(made(xs), expected[0], **TOLERANCE)
    assert_allclose(made(xs), expected[1], **TOLERANCE)
    assert type(made.h).__name__ == "HiddenState"
    with pytest.raises(interop.ArgumentError, match="batches of 5 and of 2"):
        made(xs[:2])
    made.h.set_value(jnp.zeros((2, 3)))
    assert_allclose(made(xs[:2]), expected[0][:2], **TOLERANCE)


class Cell(brainstate.nn.Module):
    """An LSTM over time, that starts anew in each call."""

    def __init__(self):
        super().__init__()
        self.cell = brainstate.nn.LSTMCell(3, 4)

    def update(self, xs):
        self.cell.init_state(xs.shape[0])
        return jnp.stack([self.cell(xs[:, t]) for t in range(xs.shape[1])], 1)


def test_an_lstm_over_time_that_starts_anew_in_each_call():
    guest, xs = Cell(), array(5, 4, 3, seed=35)
    expected = guest(xs)
    made = shims.ToNNX(guest).materialize(method="trace", sample_input=xs)
    assert_allclose(made(xs), expected, **TOLERANCE)
    assert_allclose(made(xs[:2]), expected[:2], **TOLERANCE)
    assert made.cell["h"].shape == (2, 4)


WX, WH = array(3, 4, seed=43), array(4, 4, seed=44)
XS = array(5, 6, 3, seed=45)


class Leaky(brainstate.nn.RNNCell):
    """h <- tanh(x WX + h WH) + h / 10; it returns twice that."""

    def __init__(self):
        super().__init__()
        self.in_size, self.out_size = (3,), (4,)
        self.x = brainstate.nn.Linear(3, 4, w_init=WX, b_init=None)
        self.h_weight = brainstate.ParamState(WH)

    def init_state(self, batch_size=None, **kwargs):
        batch = () if batch_size is None else (batch_size,)
        self.h = brainstate.HiddenState(jnp.full((*batch, 4), 0.5))

    def update(self, x):
        h = self.h.value
        self.h.value = jnp.tanh(self.x(x) + h @ self.h_weight.value) + h / 10
        return 2 * self.h.value


class LeakyFlax(nnx.RNNCellBase):
    num_feature_axes = 1

    def __init__(self):
        self.x, self.h = nnx.Param(WX), nnx.Param(WH)

    def __call__(self, carry, x):
        carry = jnp.tanh(x @ self.x[...] + carry @ self.h[...]) + carry / 10
        return carry, 2 * carry

    def initialize_carry(self, input_shape, rngs=None, carry_init=None):
        return jnp.full((*input_shape[:-1], 4), 0.5)


def leaky(xs, wh=WH):
    h, outs = jnp.full((len(xs), 4), 0.5), []
    for t in range(xs.shape[1]):
        h = jnp.tanh(xs[:, t] @ WX + h @ wh) + h / 10
        outs.append(2 * h)
    return jnp.stack(outs, 1)


def over_time(name, cell, xs):
    """The outputs of a cell of that host, driven as its own cells are."""
    match name:
        case "nnx":
            return nnx.RNN(cell)(xs)
        case "linen":
            module, variables = cell
            return nn.RNN(module).apply({"params": {"cell": variables["params"]}}, xs)
        case "equinox":
            start = cell.initialize_carry(xs[0, 0].shape)
            one = jax.vmap(lambda x: jax.lax.scan(lambda c, x: cell(x, c), start, x)[1])
            return one(xs)
    cell.init_state(len(xs))
    return brainstate.transform.for_loop(cell.update, xs.swapaxes(0, 1)).swapaxes(0, 1)


def test_a_traced_cell_is_a_cell_of_its_host_and_of_every_other(tmp_path):
    rnn = nnx.RNN(shims.ToNNX(Leaky()))
    made = shims.materialize(rnn, method="trace", sample_input=XS)
    assert isinstance(made.cell, nnx.RNNCellBase)
    assert_allclose(made(XS), leaky(XS), **TOLERANCE)
    assert_allclose(made(XS[:2]), leaky(XS[:2]), **TOLERANCE)
    slope = nnx.grad(lambda m: (m(XS) ** 2).sum())(made)["cell"]["h_weight"].get_value()
    expected = jax.grad(lambda w: (leaky(XS, w) ** 2).sum())(WH)
    assert_allclose(slope, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(interop.ArgumentError, match=r"is to start for float32\[5, 4\]"):
        made.cell.initialize_carry((5, 4))
    shims.save_traced(tmp_path / "cell", made.cell)
    for host in ("linen", "brainstate"):
        cell = shims.load_traced(tmp_path / "cell", into=host)
        assert_allclose(over_time(host, cell, XS), leaky(XS), **TOLERANCE)


@pytest.mark.parametrize("host", ["equinox", "brainstate"])
def test_a_cell_is_traced_alone(host):
    if host == "equinox":
        shim = shims.ToEquinox(Leaky())
        sample = (X[0], shim.initialize_carry((3,)))
    else:
        shim, sample = shims.FromNNX(LeakyFlax()), X
    made = shim.materialize(method="trace", sample_input=sample)
    assert not isinstance(made, type(shim))
    assert_allclose(over_time(host, made, XS), leaky(XS), **TOLERANCE)


def test_a_convolution_maps_over_weights_for_each_example():
    class Conv(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = brainstate.ParamState(array(3, 2, 4, seed=36))

        def update(self, x):
            return jax.lax.conv_general_dilated(
                x, self.weight.value, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            )

    x, guest = array(3, 6, 2, seed=37), Conv()
    made = shims.ToNNX(guest).materialize(method="trace", sample_input=x)
    assert_allclose(made(x), guest(x), **TOLERANCE)
    definition, state = nnx.split(made)
    many = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), state)
    outs = jax.vmap(lambda s: nnx.merge(definition, s)(x))(many)
    assert_allclose(outs, jnp.stack([guest(x), 2 * guest(x)]), **TOLERANCE)


@jax.custom_vjp
def spike(v):
    return (v > 0).astype(v.dtype)


spike.defvjp(lambda v: (spike(v), v), lambda v, g: (g / (1 + jnp.abs(v)) ** 2,))


def test_the_surrogate_gradient_of_a_spike_survives():
    class Spiking(brainstate.nn.Module):
        def update(self, x):
            return spike(x)

    made = shims.ToNNX(Spiking()).materialize(method="trace", sample_input=X)
    assert_array_equal(made(X), (np.asarray(X) > 0).astype(np.float32))
    expected = 1 / (1 + np.abs(X)) ** 2
    assert_allclose(jax.grad(lambda x: made(x).sum())(X), expected, rtol=1e-6)
    each = jax.vmap(jax.grad(lambda x: made(x[None]).sum()))(X)
    assert_allclose(each, expected, rtol=1e-6)


def test_copy_gives_buffers_of_its_own():
    guest = Residual()
    own = guest.inner.weight.value["bias"].unsafe_buffer_pointer()
    for copy in (False, True):
        made = shims.ToNNX(guest).materialize(method="trace", sample_input=X, copy=copy)
        found = made.inner["weight"]["bias"].get_value().unsafe_buffer_pointer()
        assert (found == own) is not copy


# -- refusals --


def refused(module, match, sample=X, error=interop.UnsupportedStructureError):
    with pytest.raises(error, match=match) as found:
        shims.ToNNX(module).materialize(method="trace", sample_input=sample)
    assert found.value.path == "model"


def guest_with(function, **states):
    class Made(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in states.items():
                setattr(self, name, value)

        update = function

    return Made()


def test_what_cannot_leave_the_process_is_refused_by_name():
    def calls_back(self, x):
        return jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    refused(guest_with(calls_back), "a host callback")

    foreign = jax.extend.core.Primitive("toy_operation")
    foreign.def_abstract_eval(lambda x: x)

    def implementation(x):
        return x

    implementation.__module__ = "toypackage.kernels"
    foreign.def_impl(implementation)
    refused(
        guest_with(lambda self, x: foreign.bind(x)), "toy_operation of the package toypackage"
    )


def test_what_cannot_be_traced_is_refused_with_the_reason():
    def branches(self, x):
        return x if float(x.sum()) > 0 else -x

    refused(guest_with(branches), "ConcretizationTypeError")

    def moves(self, x):
        self.w.value = self.w.value + 1
        return x

    refused(guest_with(moves, w=brainstate.ParamState(B)), "changes the parameter w")

    def makes(self, x):
        self.made = brainstate.LongTermState(x)
        return x

    refused(guest_with(makes), "makes state")


def test_arguments_are_checked():
    shim = shims.ToNNX(Residual())
    with pytest.raises(interop.ArgumentError, match="unknown method"):
        shim.materialize(method="magic")
    with pytest.raises(interop.ArgumentError, match="needs sample_input"):
        shim.materialize(method="trace")
    with pytest.raises(interop.ArgumentError, match=r"sample_input=\(5, 3\) holds no array"):
        shim.materialize(method="trace", sample_input=(5, 3))
    with pytest.raises(interop.ArgumentError, match="holds no shims"):
        shims.materialize(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(interop.UnsupportedStructureError, match='method="trace"'):
        shim.materialize()


def test_a_missing_flatbuffers_is_named(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("jax._src.export.serialization")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(jax._src.export, "serialization", raising=False)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(interop.MissingDependencyError, match="flatbuffers") as found:
        shims.ToNNX(Residual()).materialize(method="trace", sample_input=X)
    assert found.value.package == "flatbuffers"


# -- whole models --


class Host(nnx.Module):
    def __init__(self, *cores):
        self.head = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.cores = nnx.List(cores)

    def __call__(self, x):
        for core in self.cores:
            x = core(x)
        return self.head(x)


def test_an_nnx_model_is_materialized_part_by_part():
    plain = brainstate.nn.Sequential(brainstate.nn.Linear(3, 3))
    model = Host(shims.ToNNX(Residual()), shims.ToNNX(plain))
    before, lines = model(X), []
    made = shims.materialize(
        model, method="auto", sample_input=X, verify=X, report=lines.append
    )
    assert_allclose(made(X), before, **TOLERANCE)
    assert [type(core) for core in made.cores] == [NnxTraced, nnx.Sequential]
    assert lines[0].startswith("model.cores[0]: Residual, trace (cannot convert Residual")
    assert lines[1] == "model.cores[1]: Sequential, structural"
    assert made.head.kernel.get_value() is model.head.kernel.get_value()
    assert_array_equal(model(X), before)
    with pytest.raises(interop.UnsupportedStructureError) as found:
        shims.materialize(model)
    assert found.value.path == "model.cores[0]"


def test_ties_of_guests_stay_ties():
    guest, linear = Residual(), brainstate.nn.Linear(3, 3)
    shim = shims.ToNNX(linear)
    model = Host(shims.ToNNX(guest), shims.ToNNX(guest), shim, shim)
    made = shims.materialize(model, method="auto", sample_input=X)
    assert made.cores[0] is made.cores[1]
    assert made.cores[2] is made.cores[3]
    assert_allclose(made(X), model(X), **TOLERANCE)
    described = jax.ShapeDtypeStruct(X.shape, X.dtype)
    made = shims.materialize(model, method="auto", sample_input=described)
    assert_allclose(made(X), model(X), **TOLERANCE)
    model.kernel = model.cores[0].inner["weight"]["weight"]
    made = shims.materialize(model, method="trace", sample_input=X)
    assert made.kernel is made.cores[0].inner["weight"]["weight"]
    partly = Host(shims.ToNNX(guest), shims.ToNNX(guest.inner))
    with pytest.raises(interop.UnsupportedStructureError, match="shares"):
        shims.materialize(partly, method="structural")
    made = shims.materialize(partly, method="trace", sample_input=X)
    shared = made.cores[1].weight["weight"]
    assert made.cores[0].inner["weight"]["weight"] is shared
    assert len(jax.tree.leaves(nnx.state(made, nnx.Param))) == 4
    assert_allclose(made(X), partly(X), **TOLERANCE)


def test_a_linen_model_is_materialized_with_its_variables():
    class Model(nn.Module):
        core: nn.Module
        layers: tuple[nn.Module, ...]

        @nn.compact
        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return nn.Dense(2)(self.core(x))

    plain = brainstate.nn.Sequential(brainstate.nn.Linear(3, 3))
    model = Model(shims.ToLinen(Residual()), (shims.ToLinen(plain), nn.Dense(3)))
    variables = model.init(jax.random.key(0), X)
    changed = jax.tree.map(lambda a: a + 0.1, variables)
    made, new = shims.materialize((model, changed), method="auto", sample_input=X, verify=X)
    assert_allclose(made.apply(new, X), model.apply(changed, X), **TOLERANCE)
    assert new["params"]["Dense_0"]["kernel"] is changed["params"]["Dense_0"]["kernel"]
    assert not isinstance(made.core, shims.ToLinen)
    assert not isinstance(made.layers[0], shims.ToLinen)
    with pytest.raises(interop.ArgumentError, match="variables"):
        shims.materialize(model, method="structural")
    with pytest.raises(interop.ArgumentError, match="came with it"):
        made.core.init(jax.random.key(0), X)


def test_an_equinox_model_is_materialized_with_its_state():
    class Counting(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = brainstate.nn.Linear(3, 3, w_init=W, b_init=B)
            self.count = brainstate.LongTermState(jnp.zeros(()))

        def update(self, x):
            self.count.value = self.count.value + 1
            return self.inner(x) + self.count.value

    class Model(eqx.Module):
        core: shims.ToEquinox
        plain: shims.ToEquinox

        def __call__(self, x, state):
            x, state = self.core(x, state)
            return self.plain(x), state

    model, state = eqx.nn.make_with_state(
        lambda: Model(shims.ToEquinox(Counting()), shims.ToEquinox(brainstate.nn.Linear(3, 2)))
    )()
    _, state = model(X[0], state)
    made, new = shims.materialize((model, state), method="auto", sample_input=X[0])
    assert isinstance(made.core, EquinoxTraced)
    assert isinstance(made.plain, eqx.nn.Linear)
    out, new = made(X[0], new)
    expected, _ = model(X[0], state)
    assert_allclose(out, expected, **TOLERANCE)
    assert_allclose(made.core.values(new)["count",], 2.0)
    with pytest.raises(interop.ArgumentError, match="state"):
        shims.materialize(model)
    with pytest.raises(interop.ArgumentError, match="Counting is missing"):
        shims.save_traced("never.written", made.core)


def test_a_brainstate_model_is_materialized():
    class Own(nnx.Module):
        def __init__(self):
            self.inner = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return x + self.inner(x)

    own = Own()
    model = brainstate.nn.Sequential(
        shims.FromNNX(own), brainstate.nn.Linear(3, 3), shims.FromNNX(own.inner)
    )
    made = shims.materialize(model, method="trace", sample_input=X)
    assert_allclose(made(X), model(X), **TOLERANCE)
    first, _, last = made.layers
    assert first.inner["kernel"] is last.kernel
    assert len(made.states(brainstate.ParamState)) == 3  # of Linear one, of two arrays
    assert not any(isinstance(node, shims.FromNNX) for node in made.nodes().values())


def test_a_shim_inside_a_guest_is_materialized_too():
    inner = shims.FromNNX(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    shim = shims.ToNNX(brainstate.nn.Sequential(inner, brainstate.nn.ReLU()))
    made = shim.materialize()
    assert_allclose(made(X), shim(X), **TOLERANCE)
    assert type(made.layers[0]) is nnx.Linear


class Passing(nnx.Module):
    """Calls a shim with keyword arguments, in a function that it compiles itself."""

    def __init__(self, core, **kwargs):
        self.core, self.kwargs = core, nnx.static(kwargs)

    @nnx.jit
    def __call__(self, x):
        return self.core(x, **self.kwargs)


class Scaled(Residual):
    def update(self, x, scale=1.0):
        return scale * super().update(x)


def test_a_traced_module_takes_what_a_model_passes_by_name():
    model = Passing(shims.ToNNX(Scaled()), scale=2.0)
    model(X)  # is compiled for the shim by now
    made = shims.materialize(model, method="auto", sample_input=X, verify=X)
    assert "float32[b, 3], scale=float32[] ->" in repr(made.core)
    assert_allclose(made(X), 2 * residual(X), **TOLERANCE)
    with pytest.raises(interop.ArgumentError, match=r"and got float32\[5, 3\]\. "):
        made.core(X)


class Switching(nn.Module):
    core: nn.Module

    def __call__(self, x, train=False):
        return self.core(x, deterministic=not train)


def test_an_argument_that_a_stack_would_pass_to_its_first_layer_alone_is_refused():
    """So the second dropout would drop nothing."""
    drop = brainstate.nn.Dropout(0.5)
    stack = brainstate.nn.Sequential(drop, brainstate.nn.Linear(3, 3), drop)
    model = Passing(shims.ToNNX(stack, rngs=nnx.Rngs(0)), deterministic=False)
    linen = Switching(shims.ToLinen(stack))
    variables = linen.init(jax.random.key(0), X)
    for whole in (model, (linen, variables)):
        with pytest.raises(
            interop.UnsupportedStructureError, match="with deterministic=, which"
        ) as found:
            shims.materialize(whole, sample_input=X)
        assert found.value.path == "model.core"
        assert 'method="trace" and "auto" would work' in found.value.remedy


class InSetup(nn.Module):
    last: nn.Module

    def setup(self):
        self.core = shims.ToLinen(brainstate.nn.Linear(3, 3))

    def __call__(self, x):
        return self.last(self.core(x))


class Encoding(nn.Module):
    core: nn.Module

    def __call__(self, x):
        return self.core.encode(x)


def test_a_model_that_calls_another_method_of_a_shim_is_not_traced():
    class Encoder(Residual):
        def encode(self, x):
            return self.inner(x)

    model = Encoding(shims.ToLinen(Encoder()))
    variables = model.init(jax.random.key(0), X)
    with pytest.raises(interop.UnsupportedStructureError, match="other methods are not traced"):
        shims.materialize((model, variables), method="trace", sample_input=X)


class InCompact(nn.Module):
    last: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.last(shims.ToLinen(brainstate.nn.Linear(3, 3), name="hidden")(x))


@pytest.mark.parametrize(("made", "path"), [(InSetup, "core"), (InCompact, "hidden")])
def test_a_shim_that_a_linen_model_makes_itself_is_refused_by_name(made, path):
    model = made(shims.ToLinen(brainstate.nn.Linear(3, 3)))
    variables = model.init(jax.random.key(0), X)
    with pytest.raises(interop.ArgumentError, match="Pass sample_input="):
        shims.materialize((model, variables))
    with pytest.raises(interop.UnsupportedStructureError, match="Hold the shim") as found:
        shims.materialize((model, variables), sample_input=X)
    assert found.value.path == f"model.{path}"


def test_a_shim_that_a_call_makes_is_refused():
    class Model(nnx.Module):
        def __init__(self):
            self.core = shims.ToNNX(brainstate.nn.Linear(3, 3))

        def __call__(self, x):
            return shims.ToNNX(brainstate.nn.Linear(3, 3))(self.core(x))

    with pytest.raises(interop.UnsupportedStructureError, match="made in the code"):
        shims.materialize(Model(), sample_input=X)


def test_an_equinox_model_that_compiles_itself_is_seen_through():
    class Model(eqx.Module):
        core: shims.ToEquinox

        @eqx.filter_jit
        def __call__(self, x):
            return self.core(x)

    model = Model(shims.ToEquinox(Residual()))
    eqx.nn.inference_mode(model)(X[0])
    made = shims.materialize(model, method="trace", sample_input=X[0])
    assert_allclose(jax.vmap(made)(X), residual(X), **TOLERANCE)


def test_a_sample_tells_a_conversion_the_shape_of_an_image():
    images = array(2, 4, 4, 2, seed=46)
    head = brainstate.nn.Linear(8, 3, w_init=array(8, 3, seed=47))
    pool = brainstate.nn.MaxPool2d(2, 2, channel_axis=-1)
    stack = brainstate.nn.Sequential(pool, brainstate.nn.Flatten(start_axis=-3), head)
    shim = shims.ToEquinox(stack)
    with pytest.raises(interop.MissingShapeError):
        shim.materialize()
    with pytest.raises(interop.ArgumentError, match="18 elements at a layer that takes 8"):
        shim.materialize(sample_input=array(6, 6, 2, seed=46))
    made = shim.materialize(sample_input=images[0])
    found = jax.vmap(made)(jnp.moveaxis(images, -1, 1))
    assert_allclose(found, stack(images), **TOLERANCE)


def test_a_report_tells_why_a_trace_is_for_one_batch_size():
    def looped(self, x):
        return jnp.stack([row + 1 for row in x])

    lines = []
    made = shims.ToNNX(guest_with(looped)).materialize(
        method="trace", sample_input=X, report=lines.append
    )
    assert "float32[5, 3] -> float32[5, 3]" in repr(made)
    assert "for one batch size (" in lines[0]


def test_code_that_compares_batch_sizes_is_for_those_that_it_does_not_tell_apart():
    def centred(self, x):
        return x if x.shape[0] == 1 else x - x.mean(0)

    lines = []
    made = shims.ToNNX(guest_with(centred)).materialize(
        method="trace", sample_input=X, report=lines.append
    )
    assert "float32[5, 3] -> float32[5, 3]" in repr(made)
    assert "computes something else for some batch sizes" in lines[0]

    def adapts(self, x):
        if self.h.value.shape[0] != x.shape[0]:
            self.h.value = jnp.zeros_like(x)
        self.h.value = x + 0.5 * self.h.value
        return self.h.value

    guest = guest_with(adapts, h=brainstate.HiddenState(jnp.zeros((5, 3))))
    made = shims.ToNNX(guest).materialize(method="trace", sample_input=X)
    assert_allclose([made(X), made(X)], [X, 1.5 * X], **TOLERANCE)
    with pytest.raises(interop.ArgumentError, match="batches of 5 and of 2"):
        made(X[:2])


def test_errors_tell_what_else_would_work():
    def branches(self, x):
        return x if float(x.sum()) > 0 else -x

    neither = nnx.Sequential(shims.ToNNX(guest_with(branches)))
    with pytest.raises(
        interop.UnsupportedStructureError, match="ConcretizationTypeError.*; and "
    ) as found:
        shims.materialize(neither, method="auto", sample_input=X)
    assert found.value.path == "model.layers[0]"
    assert "would work" not in str(found.value)


def test_a_shim_that_is_called_with_several_shapes_is_refused():
    class Model(nnx.Module):
        def __init__(self):
            self.core = shims.ToNNX(Residual())

        def __call__(self, x):
            return self.core(x) @ self.core(x[0])

    with pytest.raises(interop.UnsupportedStructureError, match="several shapes"):
        shims.materialize(Model(), method="trace", sample_input=X)


def test_verify_tells_what_differs(monkeypatch):
    from shims import materialization

    shim = shims.ToNNX(Residual())
    honest = materialization.trace
    monkeypatch.setattr(
        materialization,
        "trace",
        lambda structure, values, *args, **options: honest(
            shims.core.guest_of(Doubled()).structure(), values, *args, **options
        ),
    )
    with pytest.raises(
        interop.ConversionError, match=r"^model: .*outputs: .* absolute"
    ) as found:
        shim.materialize(method="trace", sample_input=X, verify=X)
    assert found.value.path == "model"

    class Widened(Residual):
        def update(self, x):
            return super().update(x).astype(jnp.float32)

    half = shims.ToNNX(Residual(W.astype(jnp.bfloat16), B.astype(jnp.bfloat16)))
    monkeypatch.setattr(
        materialization,
        "trace",
        lambda structure, values, *args, **options: honest(
            shims.core.guest_of(Widened()).structure(), values, *args, **options
        ),
    )
    x = X.astype(jnp.bfloat16)
    with pytest.raises(interop.ConversionError, match="dtype of outputs: bfloat16 and float32"):
        half.materialize(method="trace", sample_input=x, verify=x)


class Doubled(Residual):
    def update(self, x):
        return 2 * super().update(x)


# -- saving --


TRAIN_ELSEWHERE = """
    import sys
    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {blocked!r}:
                raise ImportError(name + " is blocked")
    sys.meta_path.insert(0, Blocked())
    import jax, jax.numpy as jnp, numpy as np, shims
    x = jnp.asarray(np.load({x!r}))
    {body}
    np.save({out!r}, np.asarray(losses))
"""
BODIES = {
    "nnx": """
    from flax import nnx
    model = shims.load_traced({file!r}, into="nnx")
    losses = []
    for _ in range(4):
        loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
        losses.append(loss)
        new = jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model, nnx.Param), grads)
        nnx.update(model, new)
    """,
    "linen": """
    model, variables = shims.load_traced({file!r}, into="linen")
    losses = []
    params = variables["params"]
    for _ in range(4):
        loss, grads = jax.value_and_grad(
            lambda p: (model.apply({{"params": p}}, x) ** 2).mean())(params)
        losses.append(loss)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    """,
    "equinox": """
    import equinox as eqx
    model = shims.load_traced({file!r}, into="equinox")
    losses = []
    for _ in range(4):
        loss, grads = eqx.filter_value_and_grad(lambda m: (m(x) ** 2).mean())(model)
        losses.append(loss)
        model = eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, grads))
    """,
}
BODIES["brainstate"] = """
    import brainstate
    model = shims.load_traced({file!r}, into="brainstate")
    states = model.states(brainstate.ParamState)
    losses = []
    step = brainstate.transform.grad(lambda: (model(x) ** 2).mean(), states, return_value=True)
    for _ in range(4):
        grads, loss = step()
        losses.append(loss)
        for path, state in states.items():
            state.value = state.value - 0.1 * grads[path]
"""


@pytest.mark.parametrize("into", sorted(BODIES))
def test_a_saved_module_trains_where_the_guests_framework_is_missing(into, traced, tmp_path):
    shims.save_traced(tmp_path / "model", traced)
    np.save(tmp_path / "x.npy", X)
    files = {"file": str(tmp_path / "model"), "x": str(tmp_path / "x.npy")}
    frameworks = {"nnx": {"flax"}, "linen": {"flax"}}.get(into, {into})
    blocked = sorted({"brainstate", "brainunit", "flax", "equinox"} - frameworks)
    if into == "brainstate":
        blocked.remove("brainunit")
    out = str(tmp_path / "losses.npy")
    body = textwrap.dedent(BODIES[into].format(**files))
    code = textwrap.dedent(TRAIN_ELSEWHERE).format(blocked=blocked, body=body, out=out, **files)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

    w, b, expected = W, B, []
    for _ in range(4):
        loss, (gw, gb) = jax.value_and_grad(
            lambda w, b: (residual(X, w, b) ** 2).mean(), argnums=(0, 1)
        )(w, b)
        w, b = w - 0.1 * gw, b - 0.1 * gb
        expected.append(loss)
    assert_allclose(np.load(out), expected, rtol=1e-5)


def test_a_file_holds_the_hidden_state_of_another_batch_size(tmp_path):
    xs = array(5, 4, 3, seed=37)
    made = shims.ToNNX(Recurrent()).materialize(method="trace", sample_input=xs)
    made.h.set_value(jnp.ones((2, 3)))
    shims.save_traced(tmp_path / "model", made)
    loaded = shims.load_traced(tmp_path / "model", into="nnx")
    assert_array_equal(loaded(xs[:2]), made(xs[:2]))


def test_arrays_that_do_not_fit_are_not_saved(traced, tmp_path):
    made = nnx.clone(traced)
    kernel = made.inner["weight"]["weight"]
    kernel.set_value(kernel.get_value().reshape(9, 1))
    with pytest.raises(interop.ConversionError, match=r"inner.weight.*float32\[9, 1\], wanted"):
        shims.save_traced(tmp_path / "model", made)
    assert not (tmp_path / "model").exists()


def test_damaged_files_and_other_models_are_refused(traced, tmp_path):
    file = tmp_path / "model"
    shims.save_traced(file, traced)
    data = file.read_bytes()
    flipped = [
        data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(0, len(data), 37)
    ]
    for broken in (data[: len(data) // 2], b"", b"nothing of ours", *flipped):
        file.write_bytes(broken)
        with pytest.raises(interop.ConversionError, match="damaged"):
            shims.load_traced(file, into="nnx")
    with pytest.raises(interop.ArgumentError, match="no traced module"):
        shims.save_traced(file, nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


# -- in the middle of training --


ADAM = optax.adam(0.05)


def loss_of(y):
    return ((y - 1) ** 2).mean()


def train_nnx(model, state, steps):
    losses = []
    for _ in range(steps):
        loss, grads = nnx.value_and_grad(lambda m: loss_of(m(X)))(model)
        params = nnx.state(model, nnx.Param)
        updates, state = ADAM.update(grads, state or ADAM.init(params), params)
        nnx.update(model, optax.apply_updates(params, updates))
        losses.append(float(loss))
    return losses, model, state


def train_linen(model, state, steps):
    module, variables = model
    losses, params = [], variables["params"]
    for _ in range(steps):
        loss, grads = jax.value_and_grad(lambda p: loss_of(module.apply({"params": p}, X)))(
            params
        )
        updates, state = ADAM.update(grads, state or ADAM.init(params), params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    return losses, (module, {"params": params}), state


def train_equinox(model, state, steps):
    losses = []
    for _ in range(steps):
        loss, grads = eqx.filter_value_and_grad(lambda m: loss_of(jax.vmap(m)(X)))(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = ADAM.update(grads, state or ADAM.init(params), params)
        model = eqx.apply_updates(model, updates)
        losses.append(float(loss))
    return losses, model, state


def train_brainstate(model, state, steps):
    losses, states = [], model.states(brainstate.ParamState)
    slope = brainstate.transform.grad(lambda: loss_of(model(X)), states, return_value=True)
    for _ in range(steps):
        grads, loss = slope()
        params = {path: s.value for path, s in states.items()}
        updates, state = ADAM.update(dict(grads), state or ADAM.init(params), params)
        for path, value in optax.apply_updates(params, updates).items():
            states[path].value = value
        losses.append(float(loss))
    return losses, model, state


TRAIN = {
    "nnx": train_nnx,
    "linen": train_linen,
    "equinox": train_equinox,
    "brainstate": train_brainstate,
}


class Two(nn.Module):
    first: nn.Module
    last: nn.Module

    def __call__(self, x):
        return self.last(self.first(x))


def mixed(host, wrapped):
    """A model of the host: a guest, and a native layer."""
    fw = Framework(host)
    last, shim = fw.linear(array(3, 2, seed=41), array(2, seed=42)), shims.wrap(wrapped, host)
    match host:
        case "nnx":
            return nnx.Sequential(shim, last)
        case "equinox":
            return eqx.nn.Sequential([shim, last])
        case "brainstate":
            return brainstate.nn.Sequential(shim, last)
    module = Two(shim, last[0])
    return module, module.init(jax.random.key(0), X)


@pytest.mark.parametrize("host", sorted(TRAIN))
def test_a_whole_model_trains_on_with_its_optimiser_state(host):
    """In NNX it is a traced part that takes its moments along, else a converted one."""

    def model():
        other = Framework("equinox" if host == "brainstate" else "brainstate")
        layer = other.sequential(other.linear(W, B), other.activation(jnp.tanh))
        return mixed(host, Residual() if host == "nnx" else layer)

    method = {"nnx": {"method": "trace", "sample_input": X}, "linen": {"sample_input": X}}
    train = TRAIN[host]
    expected, *_ = train(model(), None, 6)
    before, live, state = train(model(), None, 3)
    made = shims.materialize(live, **method.get(host, {}))
    moved = interop.mapping(live, made).apply(state)
    after, *_ = train(made, moved, 3)
    assert_allclose(before + after, expected, rtol=1e-5)
    assert min(expected) < 0.8 * expected[0]


def test_a_mapping_to_another_model_is_refused():
    live = mixed("nnx", brainstate.nn.Linear(3, 3))
    other = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(interop.ConversionError, match="do not correspond"):
        interop.mapping(live, other)


class Scaling(brainstate.nn.Module):
    def update(self, x, scale=1.0):
        return x * scale


class Doubling(nnx.Module):
    def __init__(self):
        self.scaling = shims.ToNNX(Scaling())

    def __call__(self, x):
        return self.scaling(x, scale=2.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_number_among_the_arguments_widens_no_dtype(dtype):
    """A program takes arrays; one for the number would widen narrower inputs."""
    pure = shims.materialize(Doubling(), method="trace", sample_input=X.astype(dtype))
    y = pure(X.astype(dtype))
    assert y.dtype == dtype
    assert_array_equal(y, 2 * X.astype(dtype))


class Steered(Residual):
    """What it computes depends on numbers and texts that arrays cannot stand for."""

    def update(self, x, sign=True, *, times=1, scale=1.0, mode="sin"):
        y = super().update(x) * scale
        for _ in range(times):
            y = getattr(jnp, mode)(y)
        return y if sign else -y


class Steering(nnx.Module):
    def __init__(self, **given):
        self.core, self.given = shims.ToNNX(Steered()), given

    def __call__(self, x):
        return self.core(x, False, **self.given)


def test_a_trace_keeps_the_flags_that_a_model_passes(tmp_path):
    model = Steering(times=2, mode="cos", scale=0.5)
    pure = shims.materialize(model, method="trace", sample_input=X, verify=X)
    expected = -jnp.cos(jnp.cos(residual(X, W, B) * 0.5))
    assert_allclose(pure(X), expected, rtol=1e-6)
    assert_allclose(nnx.jit(lambda m, x: m(x))(pure, X[:2]), expected[:2], rtol=1e-6)
    assert "argument 1=False, scale=0.5, times=2" in repr(pure.core.program)

    shims.save_traced(tmp_path / "core", pure.core)
    loaded = shims.load_traced(tmp_path / "core", into="nnx")
    given = {"times": 2, "mode": "cos", "scale": 0.5}
    assert_allclose(loaded(X, False, **given), expected, rtol=1e-6)
    others = [(True, given), (0, given), (False, given | {"times": 3}), (False, {})]
    others += [(False, given | {"mode": "sin"}), (False, given | {"times": jnp.asarray(2)})]
    for sign, given in others:
        with pytest.raises(interop.ArgumentError, match="was traced for .*mode='cos'"):
            loaded(X, sign, **given)


def test_flags_that_differ_between_calls_or_are_objects_are_refused():
    class Twice(Steering):
        def __call__(self, x):
            return self.core(x, times=1) + self.core(x, times=2)

    class Handing(Steering):
        def __call__(self, x):
            return self.core(x, sign=object())

    for model, problem in ((Twice(), "several values"), (Handing(), r"a object \(sign\)")):
        with pytest.raises(interop.UnsupportedStructureError, match=problem) as e:
            shims.materialize(model, method="trace", sample_input=X)
        assert e.value.path == "model.core"


SHARED = brainstate.nn.Linear(3, 3)


class MakesShim(nn.Module):
    @nn.compact
    def __call__(self, x):
        return shims.ToLinen(SHARED)(x)


@pytest.mark.parametrize(
    "second",
    [nn.remat(MakesShim)(), lambda x: shims.ToLinen(SHARED)(x)],
    ids=["remat", "lambda"],
)
def test_shims_made_behind_a_transformation_or_in_a_function_are_not_left_behind(second):
    model = nn.Sequential([shims.ToLinen(SHARED), second])
    variables = model.init(jax.random.key(0), X)
    with pytest.raises(interop.InteropError, match="may make shims"):
        shims.materialize((model, variables))
    with pytest.raises(interop.UnsupportedStructureError, match="in the code of the model"):
        shims.materialize((model, variables), sample_input=X)
