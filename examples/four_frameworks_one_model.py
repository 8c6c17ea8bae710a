"""One classifier, a block from each framework, hosted in each of the four in turn.

Run it: python examples/four_frameworks_one_model.py [--steps N]

Every host trains the same four blocks with its own means, on the same batches of scikit-learn's
digits, by plain gradient descent. The losses agree.
"""

# %% Data
from __future__ import annotations

import argparse

import brainstate
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from sklearn.datasets import load_digits

import shims

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=400)
args, _ = parser.parse_known_args()  # a notebook has arguments of its own

RATE = 0.3
images, labels = load_digits(return_X_y=True)
images = jnp.asarray(images / 16.0, jnp.float32)
order = np.random.default_rng(0).permutation(len(images))
train, test = order[:1400], order[1400:]
batches = [train[i * 64 % 1344 :][:64] for i in range(args.steps)]


def cross_entropy(logits, y):
    """Mean cross entropy of a batch."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1).mean()


# %% Four blocks, each written for another framework
class BrainStateBlock(brainstate.nn.Module):
    """A residual layer."""

    def __init__(self):
        super().__init__()
        self.linear = brainstate.nn.Linear(64, 64)

    def update(self, x):
        """Add a layer to its input."""
        return x + jnp.tanh(self.linear(x))


class NnxBlock(nnx.Module):
    """A gated layer."""

    def __init__(self, rngs):
        self.value = nnx.Linear(64, 48, rngs=rngs)
        self.gate = nnx.Linear(64, 48, rngs=rngs)

    def __call__(self, x):
        """Multiply a layer with a gate."""
        return self.value(x) * nnx.sigmoid(self.gate(x))


class LinenBlock(nn.Module):
    """A normalised layer."""

    @nn.compact
    def __call__(self, x):
        """Normalise, then a layer."""
        return nn.relu(nn.Dense(32)(nn.LayerNorm()(x)))


class EquinoxBlock(eqx.Module):
    """The head, of one example."""

    linear: eqx.nn.Linear

    def __init__(self, key):
        self.linear = eqx.nn.Linear(32, 10, key=key)

    def __call__(self, x):
        """Logits of one example."""
        return self.linear(x)


def blocks():
    """The four blocks with their initial weights, the same at each call."""
    brainstate.random.seed(0)
    linen = LinenBlock()
    params = linen.init(jax.random.key(2), jnp.ones((1, 48)))
    return (
        BrainStateBlock(),
        NnxBlock(nnx.Rngs(1)),
        (linen, params),
        EquinoxBlock(jax.random.key(3)),
    )


# %% Hosted in Flax NNX
class InNnx(nnx.Module):
    """The chain as an ``nnx.Module``."""

    def __init__(self):
        bst, own, (linen, params), equinox = blocks()
        self.parts = nnx.List(
            [shims.ToNNX(bst), own, shims.ToNNX(linen, params=params), shims.ToNNX(equinox)]
        )

    def __call__(self, x):
        """Logits of a batch."""
        for part in self.parts:
            x = part(x)
        return x


def train_in_nnx():
    """Train with ``nnx.value_and_grad``."""
    model = InNnx()

    @nnx.jit
    def step(model, x, y):
        loss, grads = nnx.value_and_grad(lambda m: cross_entropy(m(x), y))(model)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - RATE * g, params, grads))
        return loss

    losses = [float(step(model, images[i], labels[i])) for i in batches]
    return losses, nnx.jit(lambda m, x: m(x))(model, images[test])


# %% Hosted in Flax Linen
def train_in_linen():
    """Train the variables that ``init`` hands out."""
    bst, own, (linen, params), equinox = blocks()
    model = nn.Sequential(
        [shims.ToLinen(bst), shims.ToLinen(own), linen, shims.ToLinen(equinox)]
    )
    variables = model.init(jax.random.key(0), images[:1])
    variables["params"]["layers_2"] = params["params"]

    @jax.jit
    def step(variables, x, y):
        loss, grads = jax.value_and_grad(lambda v: cross_entropy(model.apply(v, x), y))(
            variables
        )
        return loss, jax.tree.map(lambda p, g: p - RATE * g, variables, grads)

    losses = []
    for i in batches:
        loss, variables = step(variables, images[i], labels[i])
        losses.append(float(loss))
    return losses, jax.jit(model.apply)(variables, images[test])


# %% Hosted in Equinox
class InEquinox(eqx.Module):
    """The chain as an ``eqx.Module``, of one example."""

    parts: list

    def __init__(self):
        bst, own, (linen, params), equinox = blocks()
        self.parts = [
            shims.ToEquinox(bst),
            shims.ToEquinox(own),
            shims.ToEquinox(linen, params=params),
            equinox,
        ]

    def __call__(self, x):
        """Logits of one example."""
        for part in self.parts:
            x = part(x)
        return x


def train_in_equinox():
    """Train with ``eqx.filter_value_and_grad``."""
    model = InEquinox()

    @eqx.filter_jit
    def step(model, x, y):
        loss = eqx.filter_value_and_grad(lambda m: cross_entropy(jax.vmap(m)(x), y))
        value, grads = loss(model)
        return value, eqx.apply_updates(model, jax.tree.map(lambda g: -RATE * g, grads))

    losses = []
    for i in batches:
        loss, model = step(model, images[i], labels[i])
        losses.append(float(loss))
    return losses, jax.vmap(model)(images[test])


# %% Hosted in BrainState
class InBrainState(brainstate.nn.Module):
    """The chain as a ``brainstate.nn.Module``."""

    def __init__(self):
        super().__init__()
        bst, own, (linen, params), equinox = blocks()
        self.parts = [
            bst,
            shims.FromNNX(own),
            shims.FromLinen(linen, params),
            shims.FromEquinox(equinox),
        ]

    def update(self, x):
        """Logits of a batch."""
        for part in self.parts:
            x = part(x)
        return x


def train_in_brainstate():
    """Train with ``brainstate.transform.grad``."""
    model = InBrainState()
    params = model.states(brainstate.ParamState)

    @brainstate.transform.jit
    def step(x, y):
        grads, loss = brainstate.transform.grad(
            lambda: cross_entropy(model(x), y), params, return_value=True
        )()
        for path, state in params.items():
            state.value = jax.tree.map(lambda p, g: p - RATE * g, state.value, grads[path])
        return loss

    losses = [float(step(images[i], labels[i])) for i in batches]
    return losses, model(images[test])


# %% The same numbers in all four
results = {
    "Flax NNX": train_in_nnx(),
    "Flax Linen": train_in_linen(),
    "Equinox": train_in_equinox(),
    "BrainState": train_in_brainstate(),
}
print("host        loss at step 1   at step 20   test accuracy")
for host, (losses, logits) in results.items():
    accuracy = float((logits.argmax(-1) == labels[test]).mean())
    print(f"{host:<12}{losses[0]:>13.6f}{losses[19]:>13.6f}{accuracy:>15.1%}")
first = np.array([losses[:20] for losses, _ in results.values()])
print(f"largest difference of the first 20 losses: {np.ptp(first, axis=0).max():.1e}")
