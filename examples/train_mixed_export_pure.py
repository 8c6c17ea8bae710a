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
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("out/train_mixed_export_pure"))
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--score", help=argparse.SUPPRESS)  # one artefact, in a fresh process
args, _ = parser.parse_known_args()  # a notebook has arguments of its own
folder = args.out.absolute()
folder.mkdir(parents=True, exist_ok=True)
started = time.perf_counter()

digits = load_digits()
images = (digits.images / 16.0).astype(np.float32)
train_x, test_x, train_y, test_y = train_test_split(
    images, digits.target, test_size=0.25, random_state=0, stratify=digits.target
)


# %% How each artefact is loaded: as a function from images to logits
def plain_model():
    """The Flax model that is left, with any weights."""
    from flax import nnx

    import shims

    return nnx.Sequential(
        shims.load_traced(folder / "block.traced", into="nnx"),
        nnx.Linear(64, 64, rngs=nnx.Rngs(0)),
        nnx.relu,
        nnx.Linear(64, 10, rngs=nnx.Rngs(0)),
    )


def from_safetensors():
    """The Flax model, with the weights of the file."""
    import interop

    return interop.load(folder / "weights.safetensors", plain_model())


def from_orbax():
    """The Flax model, with the weights of the checkpoint."""
    import orbax.checkpoint as ocp
    from flax import nnx

    model = plain_model()
    state = nnx.state(model, nnx.Param)
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(folder / "checkpoint", nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, found)
    nnx.update(model, state)
    return model


def from_stablehlo():
    """A program for JAX; nothing else is needed."""
    from jax import export

    data = (folder / "model.stablehlo").read_bytes()
    return export.deserialize(bytearray(data)).call


def from_onnx():
    """A graph for onnxruntime; no JAX."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    (given,) = session.get_inputs()
    return lambda images: session.run(None, {given.name: images})[0]


LOADERS = {
    "safetensors": from_safetensors,
    "orbax": from_orbax,
    "StableHLO": from_stablehlo,
    "ONNX": from_onnx,
}
PACKAGES = ("brainstate", "equinox", "flax", "jax", "onnxruntime")


def accuracy(model) -> float:
    """Share of the test images that are recognised."""
    return float((np.argmax(model(test_x), axis=-1) == test_y).mean())


if args.score:
    right = accuracy(LOADERS[args.score]())
    imported = [package for package in PACKAGES if package in sys.modules]
    print(json.dumps({"accuracy": right, "imported": imported}))
    sys.exit()

# %% The guests: forward logic of its own in BrainState, and a layer of Equinox
import brainstate  # noqa: E402
import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import optax  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
from flax import nnx  # noqa: E402

import interop  # noqa: E402
import shims  # noqa: E402


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
scores = {"(live model)": accuracy(model)}

# %% Leave BrainState and Equinox behind: the layer is converted, the block is traced
pure = shims.materialize(model, method="auto", sample_input=test_x, verify=test_x, report=print)
scores["(materialized)"] = accuracy(pure)

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

# %% Load each in a fresh process, and compare
processes = {
    name: subprocess.Popen(
        [sys.executable, __file__, "--out", folder, "--score", name],
        stdout=subprocess.PIPE,
        text=True,
    )
    for name in LOADERS
    if name not in missing
}
print(f"{'artefact':<16}{'accuracy':<12}imported by its process")
for name, score in scores.items():
    print(f"{name:<16}{score:.2%}")
for name, process in processes.items():
    printed, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{name} could not be loaded")
    found = json.loads(printed)
    print(f"{name:<16}{found['accuracy']:<12.2%}{', '.join(found['imported'])}")
for name, reason in missing.items():
    print(f"{name:<16}{reason}")
print(f"took {time.perf_counter() - started:.0f} s")
