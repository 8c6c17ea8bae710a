"""Train a BrainState block inside a Flax NNX classifier, then leave BrainState behind.

Run it: python examples/embed_in_flax.py [--out DIR] [--epochs N]

The data are the handwritten digits that ship with scikit-learn: 1797 images of 8 x 8.
"""

# %% Arguments and data
from __future__ import annotations

import argparse
import time
from pathlib import Path

import brainstate
import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")  # write the picture, open no window
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import shims

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("out/embed_in_flax"))
parser.add_argument("--epochs", type=int, default=50)
args, _ = parser.parse_known_args()  # a notebook has arguments of its own
args.out.mkdir(parents=True, exist_ok=True)
started = time.perf_counter()

images, labels = load_digits(return_X_y=True)
images = (images / 16.0).astype(np.float32)
train_x, test_x, train_y, test_y = train_test_split(
    images, labels, test_size=0.25, random_state=0, stratify=labels
)


# %% A BrainState block: hand-written skip connection around a stack of layers
class ResidualBlock(brainstate.nn.Module):
    """``x + body(x)``."""

    def __init__(self, size: int):
        super().__init__()
        self.body = brainstate.nn.Sequential(
            brainstate.nn.Linear(size, size),
            brainstate.nn.BatchNorm0d((size,)),
            brainstate.nn.ReLU(),
            brainstate.nn.Dropout(0.7),  # BrainState counts what is kept
            brainstate.nn.Linear(size, size),
        )

    def update(self, x):
        """Add what the stack computes to its input."""
        return x + self.body(x)


# %% A Flax classifier that holds it
class Classifier(nnx.Module):
    """Two Flax layers around the block."""

    def __init__(self, block, rngs: nnx.Rngs):
        self.inp = nnx.Linear(64, 128, rngs=rngs)
        self.block = shims.ToNNX(block, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        """Logits of a batch of images."""
        return self.out(nnx.relu(self.block(nnx.relu(self.inp(x)))))


brainstate.random.seed(0)
block = ResidualBlock(128)
model = Classifier(block, nnx.Rngs(0))
batch = 32
steps = args.epochs * (len(train_x) // batch)
schedule = optax.cosine_decay_schedule(3e-3, steps)
optimizer = nnx.Optimizer(model, optax.adamw(schedule, weight_decay=1e-2), wrt=nnx.Param)
weight_before = block.body.layers[0].weight.value["weight"]


# %% Train: nothing here knows of BrainState
@nnx.jit
def train_step(model, optimizer, x, y):
    """One AdamW step; returns the loss."""

    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def predict(model, x):
    """The class of each image."""
    return jnp.argmax(model(x), axis=-1)


def accuracy(model) -> float:
    """Share of the test images that are recognised, in evaluation mode."""
    model.eval()
    right = float((predict(model, test_x) == test_y).mean())
    model.train()
    return right


losses, accuracies = [], []
shuffle = np.random.default_rng(0)
bar = Progress(
    TextColumn("training"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("loss {task.fields[loss]:.4f}  test accuracy {task.fields[accuracy]:.1%}"),
)
with bar:
    task = bar.add_task("", total=args.epochs, loss=float("nan"), accuracy=0.0)
    for _ in range(args.epochs):
        order = shuffle.permutation(len(train_x))
        batches = order[: len(order) // batch * batch].reshape(-1, batch)
        epoch = [train_step(model, optimizer, train_x[i], train_y[i]) for i in batches]
        losses.append(float(np.mean(epoch)))
        accuracies.append(accuracy(model))
        bar.update(task, advance=1, loss=losses[-1], accuracy=accuracies[-1])
print(f"test accuracy with the live block:   {accuracies[-1]:.2%}")

# %% The BrainState layer itself was trained: the shim's arrays are its own
weight_after = block.body.layers[0].weight.value["weight"]
shown = model.block.body["layers"][0]["weight"]["weight"].get_value()
moved = float(jnp.abs(weight_after - weight_before).max())
print(f"largest change of the BrainState weight: {moved:.3f}")
print(f"the Flax model holds the same array:     {shown is weight_after}")


# %% Save and restore with orbax, as any Flax model
def is_restored(model, name: str) -> bool:
    """Whether a checkpoint brings back a model that predicts the same."""
    checkpoint = (args.out / name).absolute()
    definition, state = nnx.split(model)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(checkpoint, nnx.to_pure_dict(state), force=True)
        checkpointer.wait_until_finished()
        template = jax.tree.map(jnp.zeros_like, nnx.to_pure_dict(state))
        restored = checkpointer.restore(checkpoint, template)
    nnx.replace_by_pure_dict(state, restored)
    again = nnx.merge(definition, state)
    return bool((predict(again, test_x) == predict(model, test_x)).all())


model.eval()
print(f"predictions equal after restoring:       {is_restored(model, 'with_the_live_block')}")


# %% Leave BrainState behind: convert the stack, write the skip connection in Flax
class FlaxResidualBlock(nnx.Module):
    """The same block; its stack is what ``materialize`` made."""

    def __init__(self, body: nnx.Module):
        self.body = body

    def __call__(self, x):
        """Add what the stack computes to its input."""
        return x + self.body(x)


model.eval()
before = model(test_x)
model.block = FlaxResidualBlock(shims.ToNNX(block.body).materialize())
model.eval()
after = model(test_x)
print(f"largest difference of the logits after:  {jnp.abs(before - after).max():.1e}")
print(f"test accuracy without BrainState:    {accuracy(model):.2%}")
model.eval()

foreign = [
    type(node).__name__
    for _, node in nnx.iter_graph(model)
    if isinstance(node, brainstate.State | brainstate.graph.Node | shims.ToNNX)
]
print(f"BrainState objects left in the model:    {len(foreign)}")
assert not foreign, foreign

print(f"predictions equal after restoring:       {is_restored(model, 'without_brainstate')}")

# %% Picture
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
left.plot(range(1, len(losses) + 1), losses)
left.set(title="Training loss", xlabel="epoch", ylabel="cross entropy", yscale="log")
right.plot(range(1, len(accuracies) + 1), accuracies, color="tab:green")
right.set(title="Test accuracy", xlabel="epoch", ylabel="share recognised")
for axis in (left, right):
    axis.grid(alpha=0.3)
figure.suptitle("A BrainState block trained inside a Flax NNX classifier")
figure.savefig(args.out / "training.png", dpi=120)
print(f"wrote {args.out / 'training.png'} and two checkpoints")
print(f"took {time.perf_counter() - started:.0f} s")
