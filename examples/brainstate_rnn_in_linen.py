"""A BrainState recurrent layer inside a Flax Linen sequence model.

Run it: python examples/brainstate_rnn_in_linen.py [--epochs N]

Each image of scikit-learn's digits is a sequence of its 8 rows.
"""

# %% Data
from __future__ import annotations

import argparse

import brainstate
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import shims

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=20)
args = parser.parse_args()

images, labels = load_digits(return_X_y=True)
rows = (images / 16.0).astype(np.float32).reshape(-1, 8, 8)
train_x, test_x, train_y, test_y = train_test_split(rows, labels, random_state=0)


# %% A BrainState layer: a gated cell, run over time
class Recurrent(brainstate.nn.Module):
    """The last output of an LSTM over a batch of sequences."""

    def __init__(self, n_in: int, n_hidden: int):
        super().__init__()
        self.cell = brainstate.nn.LSTMCell(n_in, n_hidden)

    def update(self, xs):
        """``xs`` is (batch, time, features)."""
        self.cell.init_state(xs.shape[0])
        return brainstate.transform.for_loop(self.cell, jnp.swapaxes(xs, 0, 1))[-1]


# %% A Linen model that holds it
class Classifier(nn.Module):
    """A Linen layer for each row, the recurrent layer, and a Linen head."""

    core: Recurrent

    @nn.compact
    def __call__(self, x):
        """Logits of a batch of images."""
        x = nn.relu(nn.Dense(16)(x))
        x = shims.ToLinen(self.core, name="core")(x)
        return nn.Dense(10)(x)


brainstate.random.seed(0)
core = Recurrent(16, 64)
before = core.cell.W.weight.value["weight"]
model = Classifier(core)
variables = model.init(jax.random.key(0), train_x[:1])
handed_out = variables["params"]["core"]["cell"]["W"]["weight"]["weight"]
print(f"init hands out the BrainState layer's own array: {handed_out is before}")

optimizer = optax.adam(3e-3)
opt_state = optimizer.init(variables)


# %% Train
@jax.jit
def step(variables, opt_state, x, y):
    """One Adam step; returns the loss."""

    def loss_fn(variables):
        logits = model.apply(variables, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    loss, grads = jax.value_and_grad(loss_fn)(variables)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(variables, updates), opt_state, loss


shuffle = np.random.default_rng(0)
for _ in range(args.epochs):
    for batch in np.array_split(shuffle.permutation(len(train_x)), len(train_x) // 32):
        variables, opt_state, loss = step(variables, opt_state, train_x[batch], train_y[batch])

predicted = jax.jit(model.apply)(variables, test_x).argmax(-1)
print(f"test accuracy: {(predicted == test_y).mean():.2%}")

# %% Commit the trained weights to the BrainState layer
shims.ToLinen(core).write_back({"params": variables["params"]["core"]})
moved = float(jnp.abs(core.cell.W.weight.value["weight"] - before).max())
print(f"largest change of the BrainState weight: {moved:.3f}")
