"""What conversions and shims cost, in figures that no machine's noise can change."""

import functools
import re
import sys

import brainstate
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from brainstate import nn as bnn
from flax import nnx

import interop
import shims

X = jnp.ones((2, 3))


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


def test_a_call_of_an_unchanged_guest_takes_it_apart_no_more(monkeypatch):
    from brainstate import graph

    shim, taken = shims.ToNNX(stack(3)), []
    flatten = graph.flatten
    monkeypatch.setattr(graph, "flatten", lambda *a, **k: taken.append(a) or flatten(*a, **k))
    shim(X)
    nnx.state(shim)
    assert not taken
    shim.unwrap().layers[0].note = "first"
    shim(X)
    assert taken


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
