"""What the suite runs for every ordered pair of frameworks, and the README says so."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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

BOTH, EVALUATION = (True, False), (False,)


@dataclass(frozen=True)
class Case:
    """A check of a source's block in a host: ``check(source, host, train)``.

    Attributes:
        check: the check.
        modes: what ``train`` is: where the mode is none of the check's business, ``False``.
    """

    check: Callable[[Any, Any, bool], None]
    modes: tuple[bool, ...]


CASES: dict[str, Case] = {}
"""By the name that the README has for it."""


def case(name: str, modes: tuple[bool, ...] = BOTH):
    def add(check: Callable[[Any, Any, bool], None]) -> Callable[[Any, Any, bool], None]:
        CASES[name] = Case(check, modes)
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


def assert_arrays(source, host, expected):
    """The guest, as its own framework has it, holds the arrays that plain JAX has."""
    arrays = source.block_arrays(host.unwrap())
    for name, array in expected.items():
        assert_allclose(arrays[name], array, **TOLERANCE, err_msg=name)


def assert_fresh(masks):
    """No two calls have dropped the same units, and all together about as many as they must."""
    for one, other in itertools.combinations(masks, 2):
        assert not np.array_equal(one, other)
    assert abs(1 - np.mean(masks) - live.RATE) < 0.25


def follow(outs, xs, train, params=live.PARAMS, stats=live.STATS):
    """Compare the outputs of calls one after the other with plain JAX.

    Returns:
        The statistics afterwards, and what dropout has kept in each call, or None.
    """
    masks = []
    for out, x in zip(outs, xs, strict=True):
        masks.append(live.mask_of(out, params, stats, x) if train else None)
        expected, stats = live.truth(params, stats, x, train, masks[-1])
        assert_allclose(out, expected, **TOLERANCE)
    return stats, masks


def runs(source, host, outs, train):
    """``outs``, of calls with ``XS`` in turn, are right, and so is what the calls leave."""
    stats, masks = follow(outs, XS, train)
    if train:
        assert_fresh(masks)
    assert_arrays(source, host, live.PARAMS | stats)
    follow([host.call(X)], [X], False, stats=stats)


@case("eager calls")
def eager(source, host, train):
    runs(source, host, [host.call(x, train) for x in XS], train)


@case("compiled calls")
def compiled(source, host, train):
    runs(source, host, [host.jit(x, train) for x in XS], train)


@case("scan over time")
def scan(source, host, train):
    runs(source, host, host.scan(XS, train), train)


def derives(source, host, train, *, remat):
    stats, masks = live.STATS, []
    for x in XS[:2]:
        loss, out, grads = host.gradients(x, train, remat)
        masks.append(live.mask_of(out, live.PARAMS, stats, x) if train else None)
        (value, (expected, stats)), wanted = live.graded(
            live.PARAMS, stats, x, train, masks[-1]
        )
        assert_allclose(loss, value, **TOLERANCE)
        assert_allclose(out, expected, **TOLERANCE)
        assert_same_arrays(grads, wanted.values())
    if train:
        assert_fresh(masks)
    assert_arrays(source, host, live.PARAMS | stats)


@case("values and gradients")
def gradients(source, host, train):
    derives(source, host, train, remat=False)


@case("checkpointing")
def checkpointing(source, host, train):
    derives(source, host, train, remat=True)


def descends(source, host, *, compiled):
    """Training in the host is training of the guest."""
    params, stats, masks = live.PARAMS, live.STATS, []
    for _ in range(3):
        loss, out = host.step(X, compiled)
        masks.append(live.mask_of(out, params, stats, X))
        (value, (expected, stats)), grads = live.graded(params, stats, X, True, masks[-1])
        params = jax.tree.map(lambda p, g: p - live.STEP * g, params, grads)
        assert_allclose(loss, value, **TOLERANCE)
        assert_allclose(out, expected, **TOLERANCE)
    assert_fresh(masks)
    assert_arrays(source, host, params | stats)
    expected, _ = live.truth(params, stats, X, False)
    assert_allclose(source.block_output(host.unwrap(), X), expected, **TOLERANCE)
    assert_allclose(host.call(X), expected, **TOLERANCE)


@case("eager train steps", (True,))
def eager_steps(source, host, train):
    descends(source, host, compiled=False)


@case("compiled train steps with one compilation", (True,))
def compiled_steps(source, host, train):
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
def split_state(source, host, train):
    static, state = host.split(train)
    after, outs = _run_over_time(type(host), static, state, XS)
    before = len(_traced)
    _run_over_time(type(host), host.again().split(train)[0], after, XS)
    assert len(_traced) == before
    host.join(after)
    runs(source, host, outs, train)


@case("vmap over ensembles of weights and data")
def ensembles(source, host, train):
    """Each member has weights, statistics, keys and data of its own."""

    def members(a):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            return jax.random.split(a, 2)
        return jnp.stack([a, 2 * a if jnp.issubdtype(a.dtype, jnp.inexact) else a])

    static, state = host.split(train)
    run = jax.vmap(functools.partial(type(host).run, static))
    outs, states = run(jax.tree.map(members, state), XS[:2])
    kept = []
    for i, out in enumerate(outs):
        params, stats = jax.tree.map(lambda a, f=i + 1: f * a, (live.PARAMS, live.STATS))
        stats, masks = follow([out], [XS[i]], train, params, stats)
        kept += masks
        host.join(jax.tree.map(lambda a, i=i: a[i], states))
        assert_arrays(source, host, params | stats)
    if train:
        assert_fresh(kept)


@case("vmap over data", EVALUATION)
def vmap(source, host, train):
    expected = [live.truth(live.PARAMS, live.STATS, x, False)[0] for x in XS]
    assert_allclose(host.vmap(XS), jnp.stack(expected), **TOLERANCE)


@case("abstract evaluation of shapes")
def shapes(source, host, train):
    assert host.shape(X, train) == (6, 2)
    static, state = host.split(train)
    weights = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state)
    out, after = jax.eval_shape(functools.partial(type(host).run, static), weights, X)
    assert out.shape == (6, 2)
    assert [a.shape for a in jax.tree.leaves(after)] == [
        a.shape for a in jax.tree.leaves(state)
    ]


@case("other methods", EVALUATION)
def methods(source, host, train):
    host.step(X)
    trained = source.block_arrays(host.unwrap())
    expected = 2 * (X @ trained["w1"] + trained["b1"])
    assert_allclose(host.method("encode", X, gain=2.0)["code"], expected, **TOLERANCE)
    assert not hasattr(host.shim, "no_such_attribute")
    assert host.shim.label == "a block"


@case("many threads", EVALUATION)
def threads(source, host, train):
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
    follow([host.call(X)], [X], False)


@case("an exception in the guest")
def exception(source, host, train):
    """Leaves every value as it was, also what the guest had written before it raised."""
    before, xs = source.block_arrays(host.unwrap()), XS[:, :5]  # no program knows this batch
    attempts: list[Callable[[], Any]] = [
        lambda: host.call(xs[0], train),
        lambda: host.jit(xs[0], train),
        lambda: host.scan(xs, train),
        lambda: host.gradients(xs[0], train),
        lambda: host.gradients(xs[0], train, remat=True),
    ]
    if train:
        attempts += [lambda: host.step(xs[0], False), lambda: host.step(xs[0])]
    else:
        attempts += [lambda: host.vmap(xs), lambda: host.shape(xs[0], train)]
    for attempt in attempts:
        with live.failing(), pytest.raises(live.BrokenError):
            attempt()
        after = source.block_arrays(host.unwrap())
        jax.tree.map(np.testing.assert_array_equal, after, before)
    runs(source, host, [host.call(x, train) for x in XS], train)
