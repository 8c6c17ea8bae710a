"""What a guest may do in its calls: draw anywhere, make its own state, change what it holds."""

import asyncio
import contextvars
import dataclasses
import types

import brainstate
import equinox as eqx
import flax.errors
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
X = array(4, 3, seed=71)
XS = array(5, 4, 3, seed=72)
KEY = jax.random.key(0)

traced = []
compiled = nnx.jit(lambda m, x: traced.append(1) or m(x))


# -- draws --


class NoisyLoop(bnn.Module):
    """Draws within a loop of its own, in either mode."""

    def update(self, x):
        loop = brainstate.transform.for_loop
        return loop(lambda row: row + brainstate.random.normal(size=row.shape), x)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("call", [lambda m, x: m(x), compiled], ids=["eager", "compiled"])
def test_a_guest_draws_in_its_own_loop_and_the_stream_advances(mode, call):
    for copied in (lambda m: m, nnx.clone):
        shim = copied(shims.ToNNX(NoisyLoop(), rngs=nnx.Rngs(0)))
        getattr(shim, mode)()
        first, second = call(shim, X), call(shim, X)
        assert (first != second).any()
        assert len(set((first - X).ravel().tolist())) == X.size
        assert shim.rngs.count[...] == 2


def test_a_stream_advances_by_the_calls_that_draw_and_return():
    class Dropping(bnn.Module):
        def __init__(self):
            super().__init__()
            self.drop = bnn.Dropout(0.5)

        def update(self, x, *, fail=False):
            out = self.drop(x)
            return 1 / 0 if fail else out

    rngs = nnx.Rngs(dropout=3)
    shim, twin = shims.ToNNX(Dropping()), nnx.Rngs(dropout=3)
    shim(X, rngs=rngs, deterministic=True)
    with pytest.raises(ZeroDivisionError):
        shim(X, rngs=rngs, fail=True)
    assert rngs.dropout.count[...] == 0
    shim(X, rngs=rngs)
    assert rngs.dropout.count[...] == 1
    twin.dropout()
    assert_array_equal(shim(X, rngs=rngs), shim(X, rngs=twin))


TRACES = {
    "grad": lambda f: jax.grad(lambda x: f(x).sum())(X),
    "vmap": lambda f: jax.vmap(f)(X),
    "jit": lambda f: jax.jit(f)(X),
}


@pytest.mark.parametrize("name", TRACES)
def test_a_shim_that_jax_closes_over_draws_as_little_as_a_native_layer(name):
    shim, key = shims.ToNNX(bnn.Dropout(0.5), rngs=nnx.Rngs(0)), brainstate.random.DEFAULT.value
    for layer in (shim, nnx.Dropout(0.5, rngs=nnx.Rngs(0))):
        with pytest.raises(Exception, match="different trace level|JAX tracer being written"):
            TRACES[name](layer)
        assert layer.rngs.count[...] == 0
        layer.eval()
        TRACES[name](layer)
    assert brainstate.random.DEFAULT.value is key


class InACopiedContext(bnn.Module):
    def update(self, x):
        draw = brainstate.random.normal
        return contextvars.copy_context().run(lambda: x + draw(size=x.shape))


class InTasks(bnn.Module):
    def update(self, x):
        async def noise():
            return brainstate.random.normal(size=x.shape)

        async def both():
            return await asyncio.gather(noise(), noise())

        first, second = asyncio.run(both())  # two draws, so that their difference is not zero
        return x + first - second


@pytest.mark.parametrize("guest", [InACopiedContext, InTasks])
def test_a_guest_draws_the_hosts_key_in_any_context_of_its_own(guest):
    shim = shims.ToNNX(guest(), rngs=nnx.Rngs(0))
    key = brainstate.random.DEFAULT.value
    outs = [X, shim(X), shim(X), compiled(shim, X)]
    assert len({out.tobytes() for out in map(jax.device_get, outs)}) == 4
    assert brainstate.random.DEFAULT.value is key
    again = shims.ToNNX(guest(), rngs=nnx.Rngs(0))
    assert_array_equal(again(X), outs[1])


class Waiting(nnx.Module):
    """One layer has a stream, and the other waits for that of the call."""

    def __init__(self):
        self.own = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
        self.waiting = nnx.Dropout(0.5)

    def __call__(self, x, rngs=None):
        return self.waiting(self.own(x), rngs=rngs)


class Asking(nnx.Module):
    def __init__(self):
        self.own = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

    def __call__(self, x, rngs):
        return self.own(x) + rngs.normal(x.shape)


class FallingBack(nnx.Module):
    """Natively draws from its own stream where the call brings none."""

    def __init__(self):
        self.rngs = nnx.Rngs(1)
        self.cell = nnx.LSTMCell(3, 3, rngs=self.rngs)

    def __call__(self, x, rngs=None):
        return x + (self.rngs if rngs is None else rngs).normal(x.shape)


def test_a_call_gets_the_hosts_rngs_where_it_natively_fails_without():
    for guest, drawn in ((Waiting(), True), (Asking(), True), (FallingBack(), False)):
        shim, key = shims.FromNNX(guest), brainstate.random.DEFAULT.value
        with brainstate.environ.context(fit=True):
            first, second = shim(X), shim(X)
        assert (first != second).any()
        assert (brainstate.random.DEFAULT.value is not key) is drawn
        counts = [c[...] for _, c in nnx.to_flat_state(nnx.state(guest, nnx.RngCount))]
        assert max(counts) > 1
    linen = shims.ToLinen(Asking(), deterministic=False)
    variables = linen.init(KEY, X, deterministic=True)
    outs = [
        linen.apply(variables, X, rngs={"dropout": jax.random.key(seed)}, mutable=["buffers"])
        for seed in (0, 1)
    ]
    assert (outs[0][0] != outs[1][0]).any()


NEVER_DRAW = {
    "stack": lambda rngs: nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), nnx.tanh),
    "attention": lambda rngs: nnx.MultiHeadAttention(1, 3, decode=False, rngs=rngs),
}


@pytest.mark.parametrize("name", NEVER_DRAW)
def test_layers_that_never_draw_leave_the_hosts_keys_alone(name):
    shim, key = shims.FromNNX(NEVER_DRAW[name](nnx.Rngs(0))), brainstate.random.DEFAULT.value
    with brainstate.environ.context(fit=True):
        shim(X)
    assert brainstate.random.DEFAULT.value is key


# -- hidden state --


class Sequence(bnn.Module):
    """Makes the hidden state of its cells in each call."""

    def __init__(self):
        super().__init__()
        self.cell, self.cells, self.trace = bnn.LSTMCell(3, 4), [bnn.GRUCell(4, 4)], None

    def update(self, xs):
        bnn.init_all_states(self.cell, xs.shape[1])
        self.cells[0].init_state(xs.shape[1])
        self.trace = {"sum": brainstate.ShortTermState(jnp.zeros(xs.shape[1:]))}

        def step(x):
            self.trace["sum"].value += x
            return self.cells[0](self.cell(self.trace["sum"].value))

        return brainstate.transform.for_loop(step, xs)


class Continuing(Sequence):
    """Makes it in the first call, and goes on from it in the next."""

    def update(self, xs):
        if not hasattr(self.cell, "h"):
            self.cell.init_state(xs.shape[1])
        return brainstate.transform.for_loop(self.cell, xs)


class Counting(Sequence):
    """Makes it in each call, and counts the calls too."""

    calls = 0

    def update(self, xs):
        self.calls = self.calls + 1
        return super().update(xs) * self.calls


def in_each_host(guest):
    linen, equinox = shims.ToLinen(guest), shims.ToEquinox(guest, batched=True)
    variables = linen.init(KEY, XS)
    assert set(variables) == {"params"}
    yield lambda: linen.apply(variables, XS)
    yield lambda: jax.jit(linen.apply)(variables, XS)
    yield lambda: eqx.filter_jit(equinox)(XS)
    yield lambda: compiled(shims.ToNNX(guest), XS)


def test_hidden_state_that_each_call_makes_needs_no_place_in_the_host():
    guest = Sequence()
    expected = brainstate.graph.clone(guest)(XS)
    for call in in_each_host(guest):
        assert_allclose(call(), expected, rtol=1e-5, atol=1e-6)
    assert guest.trace is None
    linen = shims.ToLinen(guest, deterministic=True)
    with jax.checking_leaks():
        jax.eval_shape(linen.apply, linen.init(KEY, XS), XS)
    traced_module, variables = linen.materialize(method="trace", sample_input=XS)
    assert_allclose(traced_module.apply(variables, XS), expected, rtol=1e-5, atol=1e-6)
    gradients = nnx.grad(lambda shim: (shim(XS) ** 2).sum())(shims.ToNNX(guest))
    assert all((g != 0).any() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("make", [Continuing, Counting])
def test_hidden_state_that_a_later_call_would_use_is_refused(make):
    guest = make()
    for call in (
        lambda: shims.ToLinen(guest).init(KEY, XS),
        lambda: shims.ToEquinox(guest, batched=True)(XS),
        lambda: compiled(shims.ToNNX(guest), XS),
    ):
        with pytest.raises(interop.UnsupportedStructureError, match=r"makes cell\.c, cell\.h"):
            call()


class Normalised(bnn.RNNCell):
    """A cell with running statistics."""

    def __init__(self):
        super().__init__()
        self.norm = bnn.BatchNorm0d((3,), axis_name="batch")

    def init_state(self, batch_size=None, **kwargs):
        self.h = brainstate.HiddenState(
            jnp.zeros(3) if batch_size is None else jnp.zeros((batch_size, 3))
        )

    def update(self, x):
        self.h.value = 0.5 * self.h.value + self.norm(x)
        return self.h.value


def test_a_cell_with_statistics_starts_from_its_state_when_the_guest_is_gone():
    guest = Normalised()
    shim, state = eqx.nn.make_with_state(shims.ToEquinox)(guest)
    shim = eqx.nn.inference_mode(shim)
    assert shim.initialize_carry((3,))["h"].shape == (3,)
    del guest
    with pytest.raises(interop.ArgumentError, match="Pass state="):
        shim.initialize_carry((3,))
    carry = shim.initialize_carry((3,), state=state)
    (carry, out), _ = shim(X[0], carry, state)
    assert_allclose(out, X[0] / jnp.sqrt(1 + 1e-5), rtol=1e-5)


# -- attributes --


class Settings:
    def __init__(self, **values):
        self.inner = types.SimpleNamespace(**values)


@dataclasses.dataclass
class Config:
    gain: float = 1.0


class Level:
    """Hashes by its value, and changes all the same."""

    def __init__(self, gain):
        self.gain = gain

    def __eq__(self, other):
        return isinstance(other, Level) and self.gain == other.gain

    def __hash__(self):
        return hash(self.gain)


class Scaled(bnn.Module):
    def __init__(self, settings, gain):
        super().__init__()
        self.settings, self.gain = settings, gain

    def update(self, x):
        return self.gain(self.settings) * x


def _set(holder, value):
    holder.gain = value


CHANGES = {
    "a plain object": (
        Settings(gain=-1.0),
        lambda s: s.inner.gain,
        lambda s, v: _set(s.inner, v),
    ),
    "a dataclass": (Config(-1.0), lambda s: s.gain, _set),
    "an object with a hash": (Level(-1.0), lambda s: s.gain, _set),
    "a set": ({-1.0}, min, lambda s, v: s.add(v)),
    "an array": (np.full(1, -1.0, np.float32), lambda s: s[0], lambda s, v: s.fill(v)),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_setting_that_changes_inside_an_attribute_is_seen_by_compiled_functions(kind):
    settings, gain, change = CHANGES[kind]
    guest = Scaled(settings, gain)
    shim = shims.ToNNX(guest)
    first = shims.ToLinen(guest)
    assert_allclose(compiled(shim, X), -X)
    change(settings, -2.0)  # which has the same hash
    assert_allclose(compiled(shim, X), -2 * X)
    assert first != shims.ToLinen(guest)
    kept = len(traced)
    compiled(shim, X)
    assert len(traced) == kept


class Scratch(bnn.Module):
    def __init__(self):
        super().__init__()
        self.counts, self.seen = {"calls": [np.zeros(2)]}, set()

    def update(self, x):
        self.counts["calls"][0][0] += 1
        self.seen.add(x.shape)
        return x


def test_what_a_private_copy_changes_in_place_does_not_reach_the_guest():
    guest = Scratch()
    for call in (
        lambda: shims.ToLinen(guest).apply({}, X),
        lambda: shims.ToEquinox(guest)(X),
        lambda: compiled(shims.ToNNX(guest), X),
    ):
        with pytest.raises(interop.UnsupportedStructureError, match="changes attributes"):
            call()
    assert guest.counts["calls"][0].sum() == 0
    assert not guest.seen
    shims.ToNNX(guest)(X)  # the guest itself, as natively
    assert guest.seen == {X.shape}


class Yielding(bnn.Module):
    def update(self, x):
        return x

    def rows(self, x):
        for row in x:
            yield row + brainstate.random.normal(size=row.shape)

    async def later(self, x):
        return x


class YieldingInNnx(nnx.Module):
    def __call__(self, x):
        return x

    def rows(self, x):
        yield x

    async def later(self, x):
        return x


@pytest.mark.parametrize(
    "make",
    [lambda: shims.ToNNX(Yielding()), lambda: shims.FromNNX(YieldingInNnx())],
    ids=["brainstate", "nnx"],
)
def test_a_method_that_would_run_after_its_call_is_refused(make):
    for name, found in (("rows", "generator"), ("later", "coroutine")):
        with pytest.raises(
            interop.UnsupportedStructureError, match=f"{name} returns a {found}"
        ):
            getattr(make(), name)(X)


# -- parameters --


class Clipping(bnn.Module):
    """Writes a parameter in its call."""

    def __init__(self):
        super().__init__()
        self.gain = brainstate.ParamState(jnp.full(3, 2.0))

    def update(self, x):
        self.gain.value = jnp.minimum(self.gain.value, 1.0)
        return x * self.gain.value


class ClippingInNnx(nnx.Module):
    def __init__(self):
        self.gain = nnx.Param(jnp.full(3, 2.0))

    def __call__(self, x):
        self.gain[...] = jnp.minimum(self.gain[...], 1.0)
        return x * self.gain[...]


class ClippingCompiled(ClippingInNnx):
    __call__ = nnx.jit(ClippingInNnx.__call__)


@pytest.mark.parametrize("make", [Clipping, ClippingInNnx, ClippingCompiled])
def test_a_parameter_that_a_call_writes_is_kept_or_refused(make):
    linen = shims.ToLinen(make())
    variables = linen.init(KEY, X)
    for apply in (linen.apply, jax.jit(linen.apply, static_argnames="mutable")):
        out, after = apply(variables, X, mutable=("params",))
        assert_array_equal(out, X)
        assert_array_equal(after["params"]["gain"], jnp.ones(3))
        with pytest.raises(flax.errors.ModifyScopeVariableError, match="params"):
            apply(variables, X)
    for call in (lambda shim, x: shim(x), eqx.filter_jit(lambda shim, x: shim(x))):
        with pytest.raises(interop.UnsupportedStructureError, match="writes parameters.*gain"):
            call(shims.ToEquinox(make()), X)
    guest = make()
    mutable = shims.wrap(guest, into="nnx" if make is Clipping else "brainstate")
    assert_array_equal(mutable(X), X)
    value = guest.gain.value if make is Clipping else guest.gain[...]
    assert_array_equal(value, jnp.ones(3))


class CompilesItself(nnx.Module):
    """NNX returns every array of a compiled method anew, whether it has changed or not."""

    def __init__(self):
        self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

    @nnx.jit
    def __call__(self, x):
        return self.linear(x)


class Scanned(nnx.Module):
    """The same of two layers, one after the other, and of a Variable that each reads."""

    def __init__(self):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0)
        def make(rngs):
            return nnx.Linear(3, 3, rngs=rngs)

        self.layers = make(nnx.Rngs(0))
        self.gain = nnx.Param(jnp.full(3, 0.5))

    def __call__(self, x):
        @nnx.scan(in_axes=(0, None, nnx.Carry), out_axes=nnx.Carry)
        def forward(layer, gain, x):
            return jnp.tanh(layer(x)) * gain[...]

        return nnx.remat(forward)(self.layers, self.gain, x)


@pytest.mark.parametrize("make", [CompilesItself, Scanned])
def test_parameters_that_a_transformation_returns_anew_are_not_written(make):
    guest = make()
    expected = guest(X)
    linen, equinox = shims.ToLinen(guest), shims.ToEquinox(guest, batched=True)
    variables = linen.init(KEY, X)
    for out in (
        linen.apply(variables, X),
        jax.jit(linen.apply)(variables, X),
        equinox(X),
        eqx.filter_jit(equinox)(X),
        shims.FromNNX(guest)(X),
    ):
        assert_allclose(out, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "make", [lambda: nnx.Linear(3, 4, rngs=nnx.Rngs(0)), lambda: bnn.Linear(3, 4)]
)
def test_values_of_a_running_transformation_are_not_written_back(make):
    guest = make()
    expected = guest(X)
    linen, equinox = shims.ToLinen(guest), shims.ToEquinox(guest)
    variables = linen.init(KEY, X)
    with pytest.raises(interop.ArgumentError, match="running transformation"):
        jax.jit(linen.write_back)(variables)
    with pytest.raises(interop.ArgumentError, match="running transformation"):
        eqx.filter_jit(lambda shim: shim.write_back())(equinox)
    with pytest.raises(interop.ArgumentError, match="must be a mapping"):
        linen.write_back(None)
    assert_array_equal(guest(X), expected)


# -- ties and paths --


def test_a_layer_used_twice_is_one_pair_of_leaves_in_equinox_and_stays_tied():
    layer = bnn.Linear(3, 3, w_init=array(3, 3, seed=73), b_init=array(3, seed=74))
    shim = shims.ToEquinox(bnn.Sequential(layer, bnn.Tanh(), layer))
    leaves = eqx.filter(shim, eqx.is_inexact_array)
    assert len(jax.tree.leaves(leaves)) == 2
    moved = eqx.apply_updates(shim, jax.tree.map(lambda a: -0.1 * a, leaves))
    w, b = (0.9 * layer.weight.value[name] for name in ("weight", "bias"))
    expected = jnp.tanh(X @ w + b) @ w + b
    assert_allclose(jax.vmap(moved)(X), expected, rtol=1e-5, atol=1e-6)


class Unsorted(bnn.Module):
    """Arrays of one shape, with names that sort otherwise than they were made, or as text."""

    def __init__(self):
        super().__init__()
        for seed, name in enumerate(("second", "first"), 75):
            setattr(self, name, brainstate.ParamState(array(3, 3, seed=seed)))
        self.layers = {10: self.first, 9: brainstate.ParamState(array(3, 3, seed=78))}

    def update(self, x):
        y = x @ self.second.value
        return jnp.tanh(y) @ self.first.value @ self.layers[9].value


def test_values_are_bound_by_path_and_not_by_order():
    guest = Unsorted()
    expected = guest(X)
    equinox, linen, in_nnx = shims.ToEquinox(guest), shims.ToLinen(guest), shims.ToNNX(guest)
    rebuilt = jax.tree.map(lambda a: a + 0, equinox)
    variables = jax.tree.map(lambda a: a + 0, linen.init(KEY, X))
    for out in (rebuilt(X), linen.apply(variables, X), compiled(nnx.clone(in_nnx), X)):
        assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    assert_allclose(rebuilt.unwrap()(X), expected, rtol=1e-5, atol=1e-6)


def test_a_collection_of_hidden_state_under_scan_is_made_by_init_outside_of_it():
    cell = bnn.GRUCell(3, 4)
    cell.init_state(4)
    reference = brainstate.graph.clone(cell)

    class Over(nn.Module):
        @nn.compact
        def __call__(self, xs):
            over = nn.scan(
                lambda module, _, x: (None, module(x)),
                variable_broadcast="params",
                variable_carry="carry",
                split_rngs={"params": False},
            )
            return over(shims.ToLinen(cell, name="cell"), None, xs)[1]

    inner = shims.ToLinen(cell).init(KEY, X)
    variables = {name: {"cell": tree} for name, tree in inner.items()}
    out, after = Over().apply(variables, XS, mutable=["carry"])
    expected = [reference(x) for x in XS]
    assert_allclose(out, jnp.stack(expected), rtol=1e-5, atol=1e-5)
    assert_allclose(after["carry"]["cell"]["h"], expected[-1], rtol=1e-5, atol=1e-5)
