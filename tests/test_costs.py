"""What conversions and shims cost, in figures that no machine's noise can change."""

import functools
import gc
import re
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import brainstate
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brainstate import graph
from brainstate import nn as bnn
from flax import nnx
from flax.nnx import graphlib

import interop
import shims

X = jnp.ones((2, 3))
MASK = np.ones((2, 3, 4), bool)
KERNEL, BIAS = jnp.ones((2, 3, 3, 4)), jnp.ones((1, 1, 4))
NORM = {"scale_initializer": jnp.ones((1, 1, 3)), "bias_initializer": jnp.ones((1, 1, 3))}


def stack(n):
    weight, bias = jnp.eye(3), jnp.ones(3)
    return bnn.Sequential(*[bnn.Linear(3, 3, w_init=weight, b_init=bias) for _ in range(n)])


def model():
    return bnn.Sequential(bnn.Linear(3, 4, b_init=jnp.ones(4)), bnn.Tanh(), bnn.Linear(4, 2))


def nnx_pair():
    guest = model()
    return shims.ToNNX(guest), interop.to_nnx(guest)


def linen_pair():
    guest = model()
    shim = shims.ToLinen(guest)
    return (shim, shim.init(jax.random.key(0), X)), interop.to_linen(guest)


def equinox_pair():
    guest = model()
    return shims.ToEquinox(guest), interop.to_equinox(guest)


def from_nnx_pair():
    native = model()
    return shims.FromNNX(interop.to_nnx(native)), native


def from_linen_pair():
    native = model()
    return shims.FromLinen(*interop.to_linen(native)), native


def from_equinox_pair():
    native = model()
    return shims.FromEquinox(interop.to_equinox(native)), native


def in_nnx(module):
    graph, state = nnx.split(module)
    return state, lambda state, x: nnx.merge(graph, state)(x)


def in_linen(pair):
    module, variables = pair
    return variables, module.apply


def in_equinox(module):
    arrays, static = eqx.partition(module, eqx.is_array)
    return arrays, lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x)


def in_brainstate(module):
    graph, values = brainstate.graph.treefy_split(module)

    def apply(values, x):
        with brainstate.environ.context(fit=False):
            return brainstate.graph.treefy_merge(graph, values)(x)

    return values, apply


PAIRS = {
    "ToNNX": (nnx_pair, in_nnx),
    "ToLinen": (linen_pair, in_linen),
    "ToEquinox": (equinox_pair, in_equinox),
    "FromNNX": (from_nnx_pair, in_brainstate),
    "FromLinen": (from_linen_pair, in_brainstate),
    "FromEquinox": (from_equinox_pair, in_brainstate),
}


def operations(values, apply):
    """The kinds of instructions of an optimised step of training with its output, in order."""

    def step(values, x):
        def loss(values):
            out = apply(values, x)
            return jnp.mean(out**2), out

        (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(values)
        return out, jax.tree.map(lambda value, g: value - 0.1 * g, values, gradients)

    program = jax.jit(step).lower(values, X).compile().as_text()
    lines = re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = \S+ ([\w-]+)\(", program, re.MULTILINE)
    assert "dot" in lines
    return sorted(lines)


@pytest.mark.parametrize("name", PAIRS)
def test_a_compiled_step_of_training_has_the_instructions_of_the_native_one(name):
    make, functional = PAIRS[name]
    shim, native = make()
    assert operations(*functional(shim)) == operations(*functional(native))


def test_a_guest_through_two_shims_compiles_to_what_one_compiles_to():
    guest = interop.to_equinox(model())
    twice = shims.ToNNX(bnn.Sequential(shims.FromEquinox(guest)))
    assert operations(*in_nnx(twice)) == operations(*in_nnx(shims.ToNNX(guest)))


def calls_in(function):
    """How many calls of Python functions ``function`` makes."""
    found = 0

    def count(frame, event, arg):
        nonlocal found
        found += event == "call"

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


WORK = {
    "brainstate to nnx": lambda m: lambda: interop.to_nnx(m),
    "brainstate to linen": lambda m: lambda: interop.to_linen(m),
    "brainstate to equinox": lambda m: lambda: interop.to_equinox(m),
    "building ToNNX": lambda m: lambda: shims.ToNNX(m),
    "building ToEquinox": lambda m: lambda: shims.ToEquinox(m),
    "a call of ToNNX": lambda m: functools.partial(shims.ToNNX(m), X),
}


@pytest.mark.parametrize("name", WORK)
def test_the_work_grows_with_the_layers_and_no_faster(name):
    few, many = WORK[name](stack(20)), WORK[name](stack(200))
    few(), many()  # what is done once
    assert calls_in(many) <= 10.5 * calls_in(few)


def counted(monkeypatch, owner, name):
    """The calls of a function from now on."""
    calls, function = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: calls.append(a) or function(*a, **k))
    return calls


def test_a_call_of_an_unchanged_guest_takes_it_apart_no_more(monkeypatch):
    shim, taken = shims.ToNNX(stack(3)), counted(monkeypatch, graph, "flatten")
    shim(X)
    nnx.state(shim)
    assert not taken
    shim.unwrap().layers[0].note = "first"
    shim(X)
    assert taken


def test_models_of_nnx_are_read_without_taking_their_graph_apart(monkeypatch):
    source, taken = interop.to_nnx(model()), counted(monkeypatch, graphlib, "flatten")
    interop.from_nnx(source)
    assert not taken


def test_a_step_of_a_cell_takes_its_copy_apart_no_more(monkeypatch):
    shim = shims.ToNNX(bnn.LSTMCell(3, 4))
    carry = shim.initialize_carry(X.shape)
    for _ in range(2):
        shim(carry, X)
    taken = counted(monkeypatch, graph, "flatten")
    started = counted(monkeypatch, bnn, "init_all_states")
    shim(carry, X)
    assert not taken
    assert not started
    shim(shim.initialize_carry((7, 3)), jnp.ones((7, 3)))  # another batch
    assert started


def test_steps_at_many_times_leave_nothing_behind():
    shim = shims.ToNNX(bnn.LSTMCell(3, 4))
    carry, counts = shim.initialize_carry(X.shape), []
    for t in range(6):
        for _ in range(3):
            with brainstate.environ.context(i=t, t=0.1 * t):
                shim(carry, X)
        gc.collect()
        counts.append(sum(type(x).__name__ == "BrainStateStructure" for x in gc.get_objects()))
    assert counts[2] == counts[5]


class Counting(nnx.Module):
    """Counts its calls, and scales by a plain attribute."""

    def __init__(self):
        self.layer, self.scale = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), 2.0
        self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
        self.calls = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, x):
        self.calls[...] += 1
        return self.scale * self.norm(self.layer(x))


def merges(monkeypatch, function):
    made = counted(monkeypatch, nnx, "merge")
    function()
    return len(made)


def test_private_copies_of_nnx_guests_are_made_once(monkeypatch):
    guest = Counting()
    shim = shims.FromNNX(guest)
    evaluating = functools.partial(brainstate.environ.context, fit=False)
    with evaluating():
        first = shim(X)
        assert merges(monkeypatch, lambda: shim(X)) == 0
        np.testing.assert_array_equal(first, shim(X))
        assert guest.calls[...] == 4 - 1
        for change in (
            lambda: setattr(guest, "scale", 3.0),
            lambda: setattr(guest, "layer", nnx.Linear(3, 4, rngs=nnx.Rngs(1))),
            lambda: guest.layer.kernel.set_metadata(note="new"),
            lambda: setattr(guest, "norm", nnx.BatchNorm(4, epsilon=0.3, rngs=nnx.Rngs(0))),
        ):
            change()
            assert merges(monkeypatch, lambda: shim(X)) == 1
            twin = nnx.clone(guest)
            twin.eval()
            np.testing.assert_array_equal(shim(X), twin(X))
    with brainstate.environ.context(fit=True):
        assert merges(monkeypatch, lambda: shim(X)) == 1
        mean = guest.norm.mean[...]
        assert merges(monkeypatch, lambda: shim(X)) == 0
        assert not jnp.array_equal(mean, guest.norm.mean[...])


class Telling(nnx.Module):
    """Gives its own parameter, or fails, or leaves a result."""

    def __init__(self):
        self.scale = nnx.Param(jnp.ones(3))

    def __call__(self, x):
        return self.scale

    def fail(self, x):
        raise ValueError(f"{x + self.scale}")

    def scaled(self, x):
        self.seen = nnx.Intermediate(x)
        return x * self.scale


def test_a_private_copy_that_has_left_something_behind_is_not_used_again():
    guest = Telling()
    shim = shims.FromNNX(guest)
    given = shim(X)
    guest.scale.set_value(jnp.full(3, 2.0))
    np.testing.assert_array_equal(given, jnp.ones(3))
    np.testing.assert_array_equal(shim(X), jnp.full(3, 2.0))
    np.testing.assert_array_equal(given, jnp.ones(3))
    with pytest.raises(ValueError, match="3"):
        shim.fail(X)
    for _ in range(2):
        np.testing.assert_array_equal(shim.scaled(X), 2 * X)


def test_private_copies_keep_no_arrays_and_no_tracers():
    guest = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    shim = shims.FromNNX(guest)
    shim(X)
    old = weakref.ref(guest.kernel[...])
    guest.kernel.set_value(jnp.zeros((3, 4)))
    gc.collect()
    assert old() is None
    with jax.checking_leaks():
        brainstate.transform.jit(shim)(X)
    np.testing.assert_array_equal(shim(X), guest(X))


def test_threads_have_private_copies_of_their_own():
    guest = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    shim, inputs = shims.FromNNX(guest), [X * i for i in range(200)]
    shim(X)
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(shim, inputs))
    for x, out in zip(inputs, outputs, strict=True):
        np.testing.assert_array_equal(out, guest(x))


@pytest.mark.parametrize("name", ["FromNNX", "FromLinen", "FromEquinox"])
def test_a_brainstate_host_traces_once_in_a_run_of_training(name):
    shim, traced = PAIRS[name][0]()[0], []

    def loss():
        traced.append(name)
        with brainstate.environ.context(fit=False):
            return jnp.mean(shim(X) ** 2)

    @brainstate.transform.jit
    def step():
        states = shim.states(brainstate.ParamState)
        gradients = brainstate.transform.grad(loss, states)()
        for path, state in states.items():
            state.value = state.value - 0.1 * gradients[path]

    step()
    count = len(traced)
    step()
    step()
    assert len(traced) == count


@pytest.mark.parametrize(
    "make",
    [
        lambda rngs: nnx.Linear(3, 4, use_bias=False, dtype="bfloat16", rngs=rngs),
        lambda rngs: nnx.Conv(3, 4, (2,), (1,), kernel_dilation=(1,), mask=MASK, rngs=rngs),
        lambda rngs: nnx.BatchNorm(3, momentum=0.7, use_running_average=True, rngs=rngs),
        lambda rngs: nnx.Embed(5, 3, param_dtype="bfloat16", rngs=rngs),
        lambda rngs: nnx.LSTMCell(3, 4, activation_fn=jnp.sin, rngs=rngs),
        lambda rngs: nnx.MultiHeadAttention(
            *(2, 4), normalize_qk=True, decode=False, keep_rngs=False, rngs=rngs
        ),
    ],
)
def test_a_layer_from_a_template_is_as_its_constructor_makes_it(make):
    native = make(nnx.Rngs(0))
    native.eval()
    first, second = (interop.convert(native, to="nnx") for _ in range(2))
    assert nnx.graphdef(first) == nnx.graphdef(second) == nnx.graphdef(native)
    states = [jax.tree.leaves(nnx.state(layer)) for layer in (native, first, second)]
    assert all(x is y is z for x, y, z in zip(*states, strict=True))
    variables = [v for layer in (first, second) for _, v in nnx.iter_graph(layer)]
    apart = [v for v in variables if isinstance(v, nnx.Module | nnx.Variable)]
    assert len(apart) == len({*map(id, apart)})


@pytest.mark.parametrize(
    "make",
    [
        lambda: bnn.Conv2d((6, 5, 3), 4, (2, 3), stride=2, w_init=KERNEL, b_init=BIAS),
        lambda: bnn.Conv2d((6, 5, 3), 4, (2, 3), w_init=KERNEL, w_mask=np.ones((2, 3, 3, 4))),
        lambda: bnn.ScaledWSConv2d((6, 5, 3), 4, (2, 3), w_init=KERNEL),
        lambda: bnn.BatchNorm2d((6, 5, 3), momentum=0.7, **NORM),
        lambda: bnn.BatchNorm2d((6, 5, 3), epsilon=1e-2, affine=False, dtype="float32", **NORM),
    ],
)
def test_a_brainstate_layer_from_a_template_is_as_its_constructor_makes_it(make):
    native = make()
    first, second = (
        interop.convert(native, to="brainstate", sample_input=(6, 5, 3)) for _ in range(2)
    )
    for layer in first, second:
        assert type(layer) is type(native)
        assert list(vars(layer)) == list(vars(native))
        for name, value in vars(native).items():
            mine = vars(layer)[name]
            if isinstance(value, brainstate.State):
                assert type(mine) is type(value)
                jax.tree.map(np.testing.assert_array_equal, mine.value, value.value)
            elif name != "w_initializer" and "bias_init" not in name and "scale_" not in name:
                np.testing.assert_array_equal(mine, value)
    states = [*first.states().values(), *second.states().values()]
    assert len({*map(id, states)}) == 2 * len(native.states())


def test_a_template_that_is_made_in_a_trace_holds_no_tracers():
    @jax.jit
    def trace(kernel):
        layer = eqx.tree_at(lambda m: m.weight, conv, kernel)
        interop.from_equinox(eqx.nn.Sequential([layer, norm]), sample_input=(3, 7, 5))
        return kernel

    conv = eqx.nn.Conv2d(3, 4, (1, 3), key=jax.random.key(0))
    norm = eqx.nn.BatchNorm(4, "batch", momentum=0.123, mode="batch")
    with jax.checking_leaks():
        trace(conv.weight)
    model = interop.from_equinox(eqx.nn.Sequential([conv, norm]), sample_input=(3, 7, 5))
    with brainstate.environ.context(fit=True):
        assert model(jnp.ones((2, 7, 5, 3))).shape == (2, 7, 3, 4)


def test_nnx_layers_of_the_same_options_need_one_call_of_the_constructor(monkeypatch):
    calls, init = [], nnx.Linear.__init__

    def counted(self, *args, **options):
        calls.append(args)
        init(self, *args, **options)

    monkeypatch.setattr(nnx.Linear, "__init__", counted)
    interop.to_nnx(bnn.Sequential(*[bnn.Linear(7, 7) for _ in range(3)]))
    assert len(calls) <= 1


def test_a_template_keeps_no_function_of_a_user_alive():
    def activation(x):
        return jnp.sin(x)

    found = weakref.ref(activation)
    interop.to_nnx(bnn.ValinaRNNCell(3, 4, activation=activation))
    del activation
    gc.collect()
    assert found() is None


def test_the_elements_of_a_mapping_are_sorted_and_not_hashed(monkeypatch):
    """NumPy's hash of numbers in order takes seconds for each million of them."""

    def hashed(*_, **__):
        raise AssertionError("np.unique is called")

    layer = model()
    converted = interop.to_equinox(layer)
    monkeypatch.setattr(np, "unique", hashed)
    assert len(interop.mapping(layer, converted)) == 4
