"""Shims keep the sharding of the guest's arrays: run on eight CPU devices in a process."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

PROGRAM = """
import brainstate, equinox as eqx, jax, jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import shims

assert jax.device_count() == 8
mesh = Mesh(jax.devices(), ("model",))
columns = NamedSharding(mesh, PartitionSpec(None, "model"))
split = NamedSharding(mesh, PartitionSpec("model"))
weight = jax.device_put(jnp.arange(24.0).reshape(3, 8), columns)
bias = jax.device_put(jnp.ones(8), split)
x = jnp.ones((4, 3))


def layer():
    return brainstate.nn.Linear(3, 8, w_init=weight, b_init=bias)


def check(name, array):
    assert array.sharding.is_equivalent_to(columns, 2), (name, array.sharding)


guest = layer()
shim = shims.ToNNX(guest)
check("nnx view", shim.weight["weight"].get_value())

@nnx.jit
def step(model, x):
    grads = nnx.grad(lambda m: (m(x) ** 2).mean())(model)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))

step(shim, x)
check("nnx after a step", guest.weight.value["weight"])
check("nnx materialized", shim.materialize().kernel.get_value())

guest = layer()
shim = shims.ToLinen(guest)
variables = shim.init(jax.random.key(0), x)
check("linen init", variables["params"]["weight"]["weight"])
after = jax.jit(
    lambda v: jax.tree.map(
        lambda p, g: p - 0.1 * g, v, jax.grad(lambda v: (shim.apply(v, x) ** 2).mean())(v)
    )
)(variables)
check("linen after a step", after["params"]["weight"]["weight"])
shim.write_back(after)
check("linen written back", guest.weight.value["weight"])

shim = shims.ToEquinox(layer(), batched=True)
check("equinox leaf", shim.params["weight"]["weight"])

@eqx.filter_jit
def update(shim):
    grads = eqx.filter_grad(lambda s: (s(x) ** 2).mean())(shim)
    return eqx.apply_updates(shim, jax.tree.map(lambda g: -0.1 * g, grads))

check("equinox after a step", update(shim).params["weight"]["weight"])

linear = nnx.Linear(3, 8, rngs=nnx.Rngs(0))
linear.kernel.set_value(weight)
shim = shims.FromNNX(linear)
check("brainstate view", shim.kernel.value)

@brainstate.transform.jit
def train():
    params = shim.states(brainstate.ParamState)
    grads = brainstate.transform.grad(lambda: (shim(x) ** 2).mean(), params)()
    for path, state in params.items():
        state.value = state.value - 0.1 * grads[path]

train()
check("brainstate after a step", linear.kernel.get_value())
print("all shardings kept")
"""


def test_shims_keep_the_sharding_of_the_weights_through_a_training_step():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "JAX_PLATFORMS": "cpu",
        },
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "all shardings kept" in done.stdout
