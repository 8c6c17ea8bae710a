"""A BrainState recurrent cell inside a Flax Linen sequence model.

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
args, _ = parser.parse_known_args()  # a notebook has arguments of its own

images, labels = load_digits(return_X_y=True)
rows = (images / 16.0).astype(np.float32).reshape(-1, 8, 8)
train_x, test_x, train_y, test_y = train_test_split(rows, labels, random_state=0)


# %% A Linen model that runs a BrainState cell over time
class Classifier(nn.Module):
    """A Linen layer for each row, the BrainState cell in Linen's RNN, and a Linen head."""

    cell: brainstate.nn.RNNCell

    @nn.compact
    def __call__(self, x):
        """Logits of a batch of images."""
        x = nn.relu(nn.Dense(16)(x))
        x = nn.RNN(shims.ToLinen(self.cell, name="core"))(x)
        return nn.Dense(10)(x[:, -1])


brainstate.random.seed(0)
cell = brainstate.nn.LSTMCell(16, 64)
before = cell.W.weight.value["weight"]
model = Classifier(cell)
variables = model.init(jax.random.key(0), train_x[:1])
handed_out = variables["params"]["core"]["W"]["weight"]["weight"]
print(f"init hands out the BrainState cell's own weights: {bool((handed_out == before).all())}")

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

# %% Commit the trained weights to the BrainState cell
shims.ToLinen(cell).write_back({"params": variables["params"]["core"]})
moved = float(jnp.abs(cell.W.weight.value["weight"] - before).max())
print(f"largest change of the BrainState weight: {moved:.3f}")
