"""Training through a shim, in one process or in several of ``jax.distributed``.

``python two_processes.py ADDRESS NUMBER FILE`` is process NUMBER of two, each with one CPU
device. It trains in every way of ``WAYS`` and saves the losses and the weights.
"""

import sys

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import shims

STEPS = 3
WAYS = [(host, split) for host in ("nnx", "linen") for split in ("data", "weights")]
WHOLE = {"x": P(), "w1": P(), "b1": P(), "scale": P(), "shift": P(), "w2": P(), "b2": P()}
SPLITS = {
    None: WHOLE,
    "data": WHOLE | {"x": P("cpu")},
    "weights": WHOLE
    | {"w1": P(None, "cpu"), "b1": P("cpu"), "scale": P("cpu"), "shift": P("cpu")}
    | {"w2": P("cpu")},
}


def arrays():
    """The batch and the weights, the same in every process."""
    rng = np.random.default_rng(0)
    shapes = {"x": (6, 3), "w1": (3, 4), "b1": (4,), "scale": (4,), "shift": (4,)}
    shapes |= {"w2": (4, 2), "b2": (2,)}
    return {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def placed(split):
    """The arrays, each process with its own part where ``split`` says how."""
    found = arrays()
    if split is None:
        return {name: jnp.asarray(array) for name, array in found.items()}
    mesh = Mesh(np.array(jax.devices()), ("cpu",))
    return {
        name: jax.make_array_from_callback(
            array.shape, NamedSharding(mesh, SPLITS[split][name]), array.__getitem__
        )
        for name, array in found.items()
    }


class Block(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = brainstate.nn.Linear(3, 4)
        self.norm = brainstate.nn.BatchNorm0d((4,), momentum=0.75, epsilon=0.1)
        self.second = brainstate.nn.Linear(4, 2)

    def update(self, x):
        return self.second(jnp.tanh(self.norm(self.first(x))))


def block(values):
    """The guest, holding ``values``."""
    module = Block()
    module.first.weight.value = {"weight": values["w1"], "bias": values["b1"]}
    module.norm.weight.value = {
        "scale": values["scale"].reshape(1, 4),
        "bias": values["shift"].reshape(1, 4),
    }
    module.second.weight.value = {"weight": values["w2"], "bias": values["b2"]}
    return module


def optimiser():
    # Not Adam: the first bias has no gradient but noise, which it would scale up.
    return optax.sgd(0.3, momentum=0.9)


def loss_of(out):
    return ((out - 1) ** 2).mean()


def train_in_nnx(guest, x):
    model = shims.ToNNX(guest)
    optimizer = nnx.Optimizer(model, optimiser(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(lambda m: loss_of(m(x)))(model)
        optimizer.update(model, grads)
        return loss

    return [step(model, optimizer, x) for _ in range(STEPS)]


def train_in_linen(guest, x):
    model = shims.ToLinen(guest, deterministic=False)
    variables = model.init(jax.random.key(0), x)
    sgd = optimiser()
    state = jax.jit(sgd.init)(variables["params"])

    @jax.jit
    def step(variables, state, x):
        def run(params):
            out, changed = model.apply(
                {**variables, "params": params}, x, mutable=["batch_stats"]
            )
            return loss_of(out), changed

        (loss, changed), grads = jax.value_and_grad(run, has_aux=True)(variables["params"])
        updates, state = sgd.update(grads, state)
        params = optax.apply_updates(variables["params"], updates)
        return {**variables, **changed, "params": params}, state, loss

    losses = []
    for _ in range(STEPS):
        variables, state, loss = step(variables, state, x)
        losses.append(loss)
    model.write_back(variables)
    return losses


def train(host, split):
    """The losses, and the guest's weights and statistics afterwards, whole."""
    values = placed(split)
    guest = block(values)
    losses = {"nnx": train_in_nnx, "linen": train_in_linen}[host](guest, values["x"])
    w1, w2 = guest.first.weight.value["weight"], guest.second.weight.value["weight"]
    if split == "weights":
        assert [w.addressable_data(0).shape for w in (w1, w2)] == [(3, 2), (2, 2)]
    result = {"w1": w1, "w2": w2, "mean": guest.norm.running_mean.value}
    result["losses"] = jnp.stack(losses)
    return {
        name: np.asarray(multihost_utils.process_allgather(array, tiled=True))
        for name, array in result.items()
    }


def main(address, number, file):
    jax.distributed.initialize(address, 2, int(number), initialization_timeout=120)
    assert jax.process_count() == 2
    assert jax.device_count() == 2
    assert jax.local_device_count() == 1
    found = {}
    for host, split in WAYS:
        for name, array in train(host, split).items():
            found[f"{host} {split} {name}"] = array
    np.savez(file, **found)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
