"""Train a model made of three frameworks, then take it along in four formats.

Run it: python examples/train_mixed_export_pure.py [--out DIR] [--epochs N]

An NNX model holds a BrainState block with forward logic of its own and an Equinox layer. It is
trained on the handwritten digits that ship with scikit-learn, and materialized, after which it
is Flax alone. Then it is saved as safetensors, orbax, StableHLO and ONNX, and each of these is
loaded by a process of its own and scored on the test images.
"""

# %% Arguments and data: rows of pixels as steps of time
from __future__ import annotations

import argparse
import inspect
import subprocess
import sys
import time
from pathlib import Path

import brainstate
import equinox as eqx
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import interop
import shims

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("out/train_mixed_export_pure"))
parser.add_argument("--epochs", type=int, default=8)
args, _ = parser.parse_known_args()  # a notebook has arguments of its own
folder = args.out.absolute()
folder.mkdir(parents=True, exist_ok=True)
started = time.perf_counter()

digits = load_digits()
images = (digits.images / 16.0).astype(np.float32)
train_x, test_x, train_y, test_y = train_test_split(
    images, digits.target, test_size=0.25, random_state=0, stratify=digits.target
)
np.savez(folder / "test.npz", images=test_x, labels=test_y)


def accuracy(model, images, labels) -> float:
    """Share of the images that are recognised."""
    return float((np.argmax(model(images), axis=-1) == labels).mean())


# %% The guests: forward logic of its own in BrainState, and a layer of Equinox
class RowReader(brainstate.nn.Module):
    """Reads an image row by row, and adds to its last state what it saw on average."""

    def __init__(self, size: int):
        super().__init__()
        self.encode = brainstate.nn.Linear(8, size)
        self.drop = brainstate.nn.Dropout(0.9)  # BrainState counts what is kept
        self.cell = brainstate.nn.GRUCell(size, size)
        self.cell.init_state(1)  # a shim keeps the states that are there when it wraps

    def update(self, images):
        """Features ``(batch, size)`` of images ``(batch, 8, 8)``."""
        rows = self.drop(self.encode(images))
        self.cell.init_state(images.shape[0])
        states = brainstate.transform.for_loop(self.cell, rows.swapaxes(0, 1))
        return states[-1] + rows.mean(1)


brainstate.random.seed(0)
rngs = nnx.Rngs(0)
model = nnx.Sequential(
    shims.ToNNX(RowReader(64), rngs=rngs),
    shims.ToNNX(eqx.nn.Linear(64, 64, key=jax.random.key(0))),
    nnx.relu,
    nnx.Linear(64, 10, rngs=rngs),
)

# %% Train it, as any Flax model
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, x, y):
    """One step; returns the loss."""

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


shuffle, batch = np.random.default_rng(0), 32
for epoch in range(args.epochs):
    order = shuffle.permutation(len(train_x))
    for rows in order[: len(order) // batch * batch].reshape(-1, batch):
        value = train_step(model, optimizer, train_x[rows], train_y[rows])
    print(f"epoch {epoch + 1}: loss {float(value):.4f}")
model.eval()
scores = {"(live model)": accuracy(model, test_x, test_y)}

# %% Leave BrainState and Equinox behind: the layer is converted, the block is traced
pure = shims.materialize(model, method="auto", sample_input=test_x, verify=test_x, report=print)
scores["(materialized)"] = accuracy(pure, test_x, test_y)

# %% Save it in every format
shims.save_traced(folder / "block.traced", pure.layers[0])
interop.save(folder / "weights.safetensors", pure)
with ocp.StandardCheckpointer() as checkpointer:
    params = nnx.to_pure_dict(nnx.state(pure, nnx.Param))
    checkpointer.save(folder / "checkpoint", params, force=True)
(folder / "model.stablehlo").write_bytes(interop.export(pure, test_x).serialize())
missing = {}
try:
    # ONNX has operations of its own, and takes the block's from its code: from the live model.
    interop.to_onnx(model, test_x, path=folder / "model.onnx")
except interop.MissingDependencyError as e:
    missing["ONNX"] = f"not written: {e}"


# %% How each artefact is loaded, by a process that knows ``folder`` alone
def plain_model(folder):
    """The Flax model that is left, with any weights."""
    from flax import nnx

    import shims

    return nnx.Sequential(
        shims.load_traced(folder / "block.traced", into="nnx"),
        nnx.Linear(64, 64, rngs=nnx.Rngs(0)),
        nnx.relu,
        nnx.Linear(64, 10, rngs=nnx.Rngs(0)),
    )


def from_safetensors(folder):
    """The Flax model, with the weights of the file."""
    import interop

    return interop.load(folder / "weights.safetensors", plain_model(folder))


def from_orbax(folder):
    """The Flax model, with the weights of the checkpoint."""
    import orbax.checkpoint as ocp
    from flax import nnx

    model = plain_model(folder)
    state = nnx.state(model, nnx.Param)
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(folder / "checkpoint", nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, found)
    nnx.update(model, state)
    return model


def from_stablehlo(folder):
    """A program for JAX; nothing else is needed."""
    from jax import export

    data = (folder / "model.stablehlo").read_bytes()
    return export.deserialize(bytearray(data)).call


def from_onnx(folder):
    """A graph for onnxruntime; no JAX."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (given,) = session.get_inputs()
    return lambda images: session.run(None, {given.name: images})[0]


def score(load, folder):
    """Print the accuracy, and what was imported for it."""
    test = np.load(folder / "test.npz")
    right = accuracy(load(folder), test["images"], test["labels"])
    packages = ("brainstate", "equinox", "flax", "jax", "onnxruntime")
    imported = ", ".join(package for package in packages if package in sys.modules)
    print(f"{right:<12.2%}{imported}")


LOADERS = {
    "safetensors": from_safetensors,
    "orbax": from_orbax,
    "StableHLO": from_stablehlo,
    "ONNX": from_onnx,
}

# %% Load each in a fresh process, and compare


def started_for(load):
    """A process that scores one artefact; it gets the functions above as text."""
    functions = map(inspect.getsource, (accuracy, plain_model, load, score))
    first = "import sys, pathlib, numpy as np"
    last = f"score({load.__name__}, pathlib.Path(sys.argv[1]))"
    program = "\n".join([first, *functions, last])
    command = [sys.executable, "-c", program, folder]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


processes = {n: started_for(load) for n, load in LOADERS.items() if n not in missing}
print(f"{'artefact':<16}{'accuracy':<12}imported by its process")
for name, share in scores.items():
    print(f"{name:<16}{share:.2%}")
for name, process in processes.items():
    printed, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{name} could not be loaded")
    print(f"{name:<16}{printed.rstrip()}")
for name, reason in missing.items():
    print(f"{name:<16}{reason}")
print(f"took {time.perf_counter() - started:.0f} s")
