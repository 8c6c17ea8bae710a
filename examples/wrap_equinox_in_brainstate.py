"""Equinox layers inside a BrainState program, trained by BrainState with optax.

Run it: python examples/wrap_equinox_in_brainstate.py [--epochs N]

The data are scikit-learn's breast cancer records: 569 of 30 features, two classes.
"""

# %% Data
from __future__ import annotations

import argparse

import brainstate
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

import shims

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=30)
args, _ = parser.parse_known_args()  # a notebook has arguments of its own

records, labels = load_breast_cancer(return_X_y=True)
records = ((records - records.mean(0)) / records.std(0)).astype(np.float32)
train_x, test_x, train_y, test_y = train_test_split(
    records, labels, random_state=0, stratify=labels
)


# %% A BrainState model around Equinox layers, one with batch normalisation
class Body(eqx.Module):
    """Two layers of one example, with statistics of the batch between them."""

    inp: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    out: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.inp = eqx.nn.Linear(30, 24, key=first)
        self.norm = eqx.nn.BatchNorm(24, axis_name="batch", mode="batch")
        self.drop = eqx.nn.Dropout(0.2)
        self.out = eqx.nn.Linear(24, 12, key=second)

    def __call__(self, x, state, *, key=None):
        """Features of one example, and the state afterwards."""
        x, state = self.norm(self.inp(x), state)
        return self.out(self.drop(jax.nn.relu(x), key=key)), state


class Classifier(brainstate.nn.Module):
    """The Equinox body and a BrainState head."""

    def __init__(self):
        super().__init__()
        body, state = eqx.nn.make_with_state(Body)(jax.random.key(0))
        self.body = shims.FromEquinox(body, state)
        self.head = brainstate.nn.Linear(12, 2)

    def update(self, x):
        """Logits of a batch."""
        return self.head(jax.nn.relu(self.body(x)))


brainstate.random.seed(0)
model = Classifier()
params = model.states(brainstate.ParamState)
print(f"trainable states: {len(params)}, of which Equinox's: {len(params) - 1}")


# %% Train: one for_loop over the batches of an epoch
optimizer = optax.adam(5e-3)
opt_state = brainstate.LongTermState(optimizer.init({k: s.value for k, s in params.items()}))


def step(batch):
    """One Adam step; returns the loss."""
    x, y = batch
    with brainstate.environ.context(fit=True):
        grads, loss = brainstate.transform.grad(
            lambda: optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean(),
            params,
            return_value=True,
        )()
    values = {path: state.value for path, state in params.items()}
    updates, opt_state.value = optimizer.update(grads, opt_state.value, values)
    for path, value in optax.apply_updates(values, updates).items():
        params[path].value = value
    return loss


epoch = brainstate.transform.jit(lambda xs, ys: brainstate.transform.for_loop(step, (xs, ys)))
shuffle = np.random.default_rng(0)
for _ in range(args.epochs):
    order = shuffle.permutation(len(train_x))[: len(train_x) // 32 * 32].reshape(-1, 32)
    losses = epoch(jnp.asarray(train_x[order]), jnp.asarray(train_y[order]))
print(f"mean loss of the last epoch: {losses.mean():.4f}")

with brainstate.environ.context(fit=False):
    predicted = model(test_x).argmax(-1)
print(f"test accuracy: {(predicted == test_y).mean():.2%}")

# %% The trained Equinox module
body, state = model.body.unwrap()
mean, _ = state.get(body.norm.batch_state_index)
moved = bool((mean != 0).all())
print(f"a {type(body).__name__} of Equinox again; its running mean moved: {moved}")
