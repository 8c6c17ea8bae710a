"""Every ordered pair of frameworks: one guest with forward logic of its own, batch
normalisation and dropout, inside every other framework, against plain JAX."""

import functools
import gc
import weakref
from pathlib import Path

import brainstate
import equinox as eqx
import jax
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

import interop
import shims

from . import live
from .conftest import Framework
from .live import X
from .pairs import CASES, TOLERANCE, XS, assert_same_arrays

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def hosted(source, target):
    """Make a shim of ``source``'s block inside ``target``."""

    def make(rate=0.0, **options):
        target.needs("training")
        model = source.block(rate)
        module, keywords = source.arguments(model)
        return model, target.Host(module, **keywords, **options)

    return make


MODES = {True: "training", False: "evaluation"}
IN_MODES = [
    pytest.param(case, train, id=f"{name}-{MODES[train]}")
    for name, case in CASES.items()
    for train in case.modes
]


def assert_guest_works(source, model):
    """No transformation has left a tracer in it, and it is what it was by itself."""
    arrays = source.block_arrays(model)
    assert_no_tracers(arrays)
    expected, _ = live.truth(arrays, arrays, X, False)
    assert_allclose(source.block_output(model, X), expected, **TOLERANCE)


@pytest.mark.parametrize(("case", "train"), IN_MODES)
def test_every_pair(source, hosted, case, train):
    model, host = hosted(live.RATE)
    case.check(source, host, train)
    assert_guest_works(source, model)
    assert_guest_works(source, host.unwrap())


@pytest.mark.parametrize(("case", "train"), IN_MODES)
@pytest.mark.parametrize("name", ["brainstate", "linen", "nnx"])
def test_every_guest_that_equinox_gives_one_example(name, case, train):
    source, target = Framework(name), Framework("equinox")
    module, keywords = source.arguments(model := source.block(live.RATE, axis_name="batch"))
    host = target.Host(module, batched=False, **keywords)
    case.check(source, host, train)
    assert_guest_works(source, model)


def test_the_hosts_optimiser_sees_each_trainable_array_once(hosted):
    _, host = hosted()
    assert_same_arrays(host.parameters(), live.PARAMS.values())


def assert_no_tracers(tree):
    assert not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def test_a_training_call_without_a_key_is_an_error(source, target, hosted):
    if source.OWN_STREAMS:
        pytest.skip(f"{source.name}: {source.OWN_STREAMS}")
    if target.ALWAYS_KEYED:
        pytest.skip(f"{target.name}: {target.ALWAYS_KEYED}")
    _, host = hosted(rate=0.5, keyed=False)
    with pytest.raises(Exception, match=r"key|rng|PRNG|random"):
        host.call(X, train=True)
    host.call(X)


def test_nothing_leaks_into_the_guest(source, hosted):
    model, host = hosted(live.RATE)
    with jax.checking_leaks():
        host.step(X)
        host.jit(X)
        host.scan(XS, True)
    assert_guest_works(source, model)
    # Compiled functions live on, and keep neither the shim nor a guest that holds arrays.
    module = model if source.name in ("brainstate", "nnx") else host.shim
    dropped = [weakref.ref(host.shim), weakref.ref(module)]
    del model, host, module
    gc.collect()
    assert [found() for found in dropped] == [None, None]


CLOSING = {
    "brainstate": (jax.jit, brainstate.transform.jit),
    "equinox": (jax.jit, eqx.filter_jit),
    "linen": (jax.jit,),
    "nnx": (jax.jit, nnx.jit),
}


def closed_over(framework, host):
    """What becomes of a function that closes over a model, when its weights change after the
    first call; and, where the model itself changes in training, of one that trains it."""

    def call(x, train=False):  # an NNX module's mode is set outside
        return host.shim(x) if framework.name == "nnx" else host.call(x, train=train)

    for transform in CLOSING[framework.name]:
        before = host.call(X)
        function = transform(call)
        assert_allclose(function(X), before, **TOLERANCE)
        host.double()
        assert not np.allclose(host.call(X), before)
        yield "constants" if np.allclose(function(X), before) else "current values"
        if framework.name in ("brainstate", "nnx"):
            host.call(X, train=True)
            try:
                transform(functools.partial(call, train=True))(X)
                yield "trains"
            except Exception as e:
                yield type(e).__name__


@functools.cache
def closed_over_natively(name):
    if name in ("equinox", "linen"):  # where weights are values, as any others
        return ["constants"] * len(CLOSING[name])
    framework = Framework(name)
    return list(closed_over(framework, framework.Host(framework.block(0.0))))


def test_closing_over_a_shim_is_closing_over_a_native_module(target, hosted):
    found = list(closed_over(target, hosted()[1]))
    assert found == closed_over_natively(target.name)
    assert ("current values" in found) is (target.name == "brainstate")


def test_a_stack_of_layers_is_live_in_every_host(source, target):
    p = live.PARAMS
    inp, out = source.linear(p["w1"], p["b1"]), source.linear(p["w2"], p["b2"])
    model = source.sequential(inp, source.activation(jax.nn.relu), out)
    module, keywords = source.arguments(model)
    host = target.Host(module, **keywords)
    expected = np.maximum(X @ p["w1"] + p["b1"], 0) @ p["w2"] + p["b2"]
    assert_allclose(host.call(X), expected, **TOLERANCE)


def test_explain_shows_each_array_once_with_its_owner(source, hosted):
    model, host = hosted()
    report = shims.explain(host.shim)
    assert len({row.path for row in report.rows}) == len(report.rows) >= 8
    assert sum(row.kind == "parameter" for row in report.rows) == 6
    assert sum(row.kind == "running statistic" for row in report.rows) >= 2
    live = isinstance(model, nnx.Module | brainstate.nn.Module)
    mutable_host = isinstance(host.shim, nnx.Module | brainstate.nn.Module)
    assert report.live is (live and mutable_host)
    for text in (str(report), report.to_markdown()):
        assert all(row.path in text and row.array in text for row in report.rows)


def test_paths_containers_and_kinds_are_a_fixed_format(source, target, hosted):
    _, host = hosted()
    golden = GOLDEN / f"{source.name}-{target.name}.txt"
    assert f"{shims.explain(host.shim)}\n" == golden.read_text()


def test_paths_are_the_same_in_every_host():
    paths = {}
    for golden in GOLDEN.iterdir():
        _, _, *rows = golden.read_text().splitlines()
        guest = golden.stem.partition("-")[0]
        found = {row.split("  ")[0] for row in rows}
        assert paths.setdefault(guest, found) == found
    assert len(paths) == 4


def test_repr_names_the_guest(hosted):
    _, host = hosted()
    assert "Block" in repr(host.shim)


def test_explain_of_anything_else_is_refused():
    with pytest.raises(interop.ArgumentError, match="not a live shim"):
        shims.explain(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))


def test_wrapping_in_its_own_framework_returns_the_module(source):
    module, _ = source.arguments(source.linear(live.PARAMS["w1"]))
    assert shims.wrap(module, into=source.name) is module


def test_materialize_gives_the_hosts_own_layer(source, target):
    model = source.sequential(source.linear(live.PARAMS["w1"], live.PARAMS["b1"]))
    module, keywords = source.arguments(model)
    shim = shims.wrap(module, into=target.name, **keywords)
    result = target.receive(shim.materialize)
    expected = X @ live.PARAMS["w1"] + live.PARAMS["b1"]
    assert_allclose(target.call(result, X), expected, **TOLERANCE)
    assert not any("shims" in type(part).__module__ for part in jax.tree.leaves(result))


def test_materialize_can_give_the_result_buffers_of_its_own(source, target):
    source.needs("training")
    target.needs("training")
    model = source.sequential(source.linear(live.PARAMS["w1"], live.PARAMS["b1"]))
    module, keywords = source.arguments(model)
    shim = shims.wrap(module, into=target.name, **keywords)
    own = source.read(model)[0].values()
    made = target.receive(lambda: shim.materialize(copy=True))
    copied = target.read(made)[0].values()  # all are alive: no place is used a second time
    pointers = [{a.unsafe_buffer_pointer() for a in arrays} for arrays in (own, copied)]
    assert not pointers[0] & pointers[1]


def test_materialize_of_own_forward_logic_is_refused(hosted):
    _, host = hosted()
    with pytest.raises(interop.UnsupportedStructureError, match="Block"):
        host.materialize()
