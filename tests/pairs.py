"""What the suite runs for every ordered pair of frameworks, and the README says so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from . import live
from .live import X

TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}  # float32 sums in another order
XS = jnp.stack([X, X + 1, 2 * X])

CASES: dict[str, Callable[[Any, Any], None]] = {}
"""By the name that the README has for it: a check of a source's block in a host."""


def case(name: str) -> Callable[[Callable[[Any, Any], None]], Callable[[Any, Any], None]]:
    def add(check: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        CASES[name] = check
        return check

    return add


def assert_same_arrays(arrays, expected):
    """Equal up to order and transposition: hosts list arrays by their own paths."""
    assert len(arrays) == len(expected)
    rest = [np.asarray(a) for a in expected]
    for array in map(np.asarray, arrays):
        found = [
            i
            for i, other in enumerate(rest)
            for view in (other, other.T)
            if view.shape == array.shape and np.allclose(view, array, **TOLERANCE)
        ]
        assert found, array
        rest.pop(found[0])


def evaluates(call):
    expected, _ = live.truth(live.PARAMS, live.STATS, X, False)
    for _ in range(2):
        assert_allclose(call(X), expected, **TOLERANCE)


@case("eager evaluation")
def eager_evaluation(source, host):
    evaluates(host.call)


@case("compiled evaluation")
def compiled_evaluation(source, host):
    evaluates(host.jit)


def trains(source, host, call):
    """Normalises by the batch, moves the statistics, and evaluates with them."""
    stats = live.STATS
    for x in XS:
        expected, stats = live.truth(live.PARAMS, stats, x, True)
        assert_allclose(call(x, train=True), expected, **TOLERANCE)
    arrays = source.block_arrays(host.unwrap())
    assert_allclose(arrays["mean"], stats["mean"], **TOLERANCE)
    assert_allclose(arrays["var"], stats["var"], **TOLERANCE)
    expected, _ = live.truth(live.PARAMS, stats, X, False)
    assert_allclose(host.call(X), expected, **TOLERANCE)


@case("eager training calls")
def eager_training(source, host):
    trains(source, host, host.call)


@case("compiled training calls")
def compiled_training(source, host):
    trains(source, host, host.jit)


@case("gradients")
def gradients(source, host):
    *_, grads = live.trained(1)
    assert_same_arrays(host.gradients(X), grads.values())


@case("checkpointing")
def checkpointing(source, host):
    *_, grads = live.trained(1)
    assert_same_arrays(host.remat_gradients(X), grads.values())


def descends(source, host, *, compiled):
    """Training in the host is training of the guest."""
    losses, params, stats, _ = live.trained(3)
    assert_allclose([float(host.step(X, compiled)) for _ in range(3)], losses, **TOLERANCE)
    trained = host.unwrap()
    for name, array in source.block_arrays(trained).items():
        assert_allclose(array, (params | stats)[name], **TOLERANCE)
    expected, _ = live.truth(params, stats, X, False)
    assert_allclose(source.block_output(trained, X), expected, **TOLERANCE)
    assert_allclose(host.call(X), expected, **TOLERANCE)


@case("eager train steps")
def eager_steps(source, host):
    descends(source, host, compiled=False)


@case("compiled train steps with one compilation")
def compiled_steps(source, host):
    descends(source, host, compiled=True)
    assert _compiled  # the listener works
    before = len(_compiled)
    host.step(X)
    assert len(_compiled) == before


_compiled: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: _compiled.append(event) if "backend_compile" in event else None
)

_traced: list[type] = []


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_over_time(host_type, static, state, xs):
    _traced.append(host_type)
    return jax.lax.scan(lambda state, x: host_type.run(static, state, x)[::-1], state, xs)


@case("jax.jit and jax.lax.scan of the split state with one trace for equal shims")
def split_state(source, host):
    static, state = host.split(train=True)
    state, outs = _run_over_time(type(host), static, state, XS)
    stats = live.STATS
    for x, out in zip(XS, outs, strict=True):
        expected, stats = live.truth(live.PARAMS, stats, x, True)
        assert_allclose(out, expected, **TOLERANCE)
    before = len(_traced)
    _run_over_time(type(host), host.again().split(train=True)[0], state, XS)
    assert len(_traced) == before
    host.join(state)
    arrays = source.block_arrays(host.unwrap())
    for name in stats:
        assert_allclose(arrays[name], stats[name], **TOLERANCE)


@case("vmap over ensembles of weights")
def ensembles(source, host):
    def doubled(a):
        is_inexact = jnp.issubdtype(a.dtype, jnp.inexact)
        return jnp.stack([a, 2 * a if is_inexact else a])

    static, state = host.split(train=False)
    outs = jax.vmap(lambda state: host.run(static, state, X)[0])(jax.tree.map(doubled, state))
    for factor, out in zip((1, 2), outs, strict=True):
        params, stats = jax.tree.map(lambda a, f=factor: f * a, (live.PARAMS, live.STATS))
        assert_allclose(out, live.truth(params, stats, X, False)[0], **TOLERANCE)


@case("vmap over data")
def vmap(source, host):
    expected = [live.truth(live.PARAMS, live.STATS, x, False)[0] for x in XS]
    assert_allclose(host.vmap(XS), jnp.stack(expected), **TOLERANCE)


@case("scan over time")
def scan(source, host):
    stats, expected = live.STATS, []
    for x in XS:
        out, stats = live.truth(live.PARAMS, stats, x, True)
        expected.append(out)
    assert_allclose(host.scan(XS), jnp.stack(expected), **TOLERANCE)
    assert_allclose(source.block_arrays(host.unwrap())["var"], stats["var"], **TOLERANCE)


@case("abstract evaluation of shapes")
def shapes(source, host):
    assert host.shape(X) == (6, 2)
    static, state = host.split(train=False)
    weights = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)
    assert jax.eval_shape(lambda state: host.run(static, state, X)[0], weights).shape == (6, 2)


@case("other methods")
def methods(source, host):
    host.step(X)
    trained = source.block_arrays(host.unwrap())
    expected = 2 * (X @ trained["w1"] + trained["b1"])
    assert_allclose(host.method("encode", X, gain=2.0)["code"], expected, **TOLERANCE)
    assert not hasattr(host.shim, "no_such_attribute")
    assert host.shim.label == "a block"


@case("many threads")
def threads(source, host):
    """One shim, called and compiled, another of its guest, and the guest itself, at once."""
    expected, _ = live.truth(live.PARAMS, live.STATS, X, False)
    guest, other = host.unwrap(), host.again()
    if isinstance(host.shim, brainstate.nn.Module):
        host.jit(X)  # its jit keeps tracers in the States while it traces, natively as well
    compiled = host.jit
    if isinstance(host.shim, nnx.Module):  # nnx.jit empties and refills any module it is given
        host.shim.eval()
        definition, state = nnx.split(host.shim)
        merged = jax.jit(lambda state, x: nnx.merge(definition, state)(x))
        compiled = functools.partial(merged, state)
    calls = compiled, host.call, other.call, functools.partial(source.block_output, guest)

    def work(call):
        return [np.asarray(call(X)) for _ in range(4)]

    with ThreadPoolExecutor(4) as pool:
        outs = [out for found in pool.map(work, calls) for out in found]
    assert_allclose(outs, [expected] * len(outs), **TOLERANCE)
    evaluates(host.call)


@case("an exception in the guest")
def exception(source, host):
    """Leaves every value as it was, also what the guest had written before it raised."""
    before = source.block_arrays(host.unwrap())
    for compiled in (False, True):
        with pytest.raises(Exception, match=r"."):
            host.step(X[:, :2], compiled)
        after = source.block_arrays(host.unwrap())
        jax.tree.map(np.testing.assert_array_equal, after, before)
    evaluates(host.call)
