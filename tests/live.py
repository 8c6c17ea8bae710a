"""One guest in every framework, with what it must compute: forward logic of its own around a
batch normalisation and a dropout. It may be told to raise once both have run."""

import contextlib
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from .cases import array

X = array(6, 3, seed=21)
PARAMS = {
    "w1": array(3, 4, seed=22),
    "b1": array(4, seed=23),
    "scale": array(4, seed=24) + 2,
    "shift": array(4, seed=25),
    "w2": array(4, 2, seed=26),
    "b2": array(2, seed=27),
}
STATS = {"mean": array(4, seed=28), "var": array(4, seed=29, positive=True)}
EPSILON, MOMENTUM, STEP, RATE = 2e-3, 0.9, 0.02, 0.3
MASKS = np.array(list(itertools.product([False, True], repeat=4)))
"""Every choice of hidden units that dropout can keep of one example."""


def truth(params, stats, x, train, mask=None):
    """Output and running statistics afterwards. Dropout keeps the units of ``mask``; all of
    them, and as they are, without one."""
    h = x @ params["w1"] + params["b1"]
    mean, var = (h.mean(0), h.var(0)) if train else (stats["mean"], stats["var"])
    y = (h - mean) / jnp.sqrt(var + EPSILON) * params["scale"] + params["shift"]
    y = jnp.tanh(y)
    if mask is not None:
        y = jnp.where(mask, y / (1 - RATE), 0)
    out = y @ params["w2"] + params["b2"] + h.sum(-1, keepdims=True)
    if not train:
        return out, stats
    moved = {"mean": mean, "var": var}
    return out, {k: MOMENTUM * stats[k] + (1 - MOMENTUM) * moved[k] for k in stats}


@jax.jit
def _possible(params, stats, x):
    return jax.vmap(lambda mask: truth(params, stats, x, True, mask)[0])(MASKS[:, None])


def mask_of(out, params, stats, x):
    """The units that dropout has kept in a training call: of the sixteen outputs that an
    example can have, which are far apart, those of the nearest. Whether it is that output is
    for the caller to compare."""
    distances = np.abs(_possible(params, stats, x) - out).max(-1)
    return MASKS[distances.argmin(0)]


@functools.partial(jax.jit, static_argnames="train")
def graded(params, stats, x, train, mask=None):
    """``(loss, (output, statistics afterwards)), gradients``."""

    def loss(params):
        out, after = truth(params, stats, x, train, mask)
        return (out**2).mean(), (out, after)

    return jax.value_and_grad(loss, has_aux=True)(params)


class BrokenError(Exception):
    """What the guest raises."""


_failing = False


@contextlib.contextmanager
def failing():
    """Let guests raise that are called, or traced, inside."""
    global _failing
    _failing = True
    try:
        yield
    finally:
        _failing = False


def passed():
    """What a guest calls after its normalisation and dropout."""
    if _failing:
        raise BrokenError
