"""One guest in every framework, with what it must compute: forward logic of its own around a
batch normalisation and a dropout."""

import jax
import jax.numpy as jnp

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
EPSILON, MOMENTUM, STEP = 2e-3, 0.9, 0.02


def truth(params, stats, x, train):
    """Output and running statistics afterwards."""
    h = x @ params["w1"] + params["b1"]
    mean, var = (h.mean(0), h.var(0)) if train else (stats["mean"], stats["var"])
    y = (h - mean) / jnp.sqrt(var + EPSILON) * params["scale"] + params["shift"]
    out = jnp.tanh(y) @ params["w2"] + params["b2"] + h.sum(-1, keepdims=True)
    if not train:
        return out, stats
    moved = {"mean": mean, "var": var}
    return out, {k: MOMENTUM * stats[k] + (1 - MOMENTUM) * moved[k] for k in stats}


@jax.jit
def _step(params, stats, x):
    def loss(params):
        out, after = truth(params, stats, x, True)
        return (out**2).mean(), after

    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return value, jax.tree.map(lambda p, g: p - STEP * g, params, grads), stats, grads


def trained(steps, x=X):
    """Losses, parameters, statistics and last gradients of plain gradient descent."""
    params, stats, losses, grads = PARAMS, STATS, [], None
    for _ in range(steps):
        value, params, stats, grads = _step(params, stats, x)
        losses.append(float(value))
    return losses, params, stats, grads
