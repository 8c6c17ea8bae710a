"""Train steps through a shim in two processes of ``jax.distributed`` equal those in one."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from . import STRICT
from .devices import two_processes

PROGRAM = Path(two_processes.__file__)
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    "PYTHONPATH": str(PROGRAM.parents[2]),
}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_both(files):
    """Run both processes to their end; what each printed, and its exit status."""
    address = f"127.0.0.1:{free_port()}"
    running = [
        subprocess.Popen(
            [sys.executable, *STRICT, str(PROGRAM), address, str(number), str(file)],
            env=os.environ | ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, file in enumerate(files)
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return printed, [process.returncode for process in running]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process saved."""
    files = [tmp_path_factory.mktemp("processes") / f"{number}.npz" for number in range(2)]
    for attempt in range(3):
        printed, status = run_both(files)
        # Between finding the port and using it another program may have taken it.
        if attempt == 2 or "address already in use" not in printed[0].lower():
            break
    assert status == [0, 0], "\n".join(printed)
    return [dict(np.load(file)) for file in files]


@pytest.fixture(scope="module")
def expected():
    """The same training in plain JAX."""
    given = {name: jnp.asarray(array) for name, array in two_processes.arrays().items()}
    x = given.pop("x")

    def run(p):
        h = x @ p["w1"] + p["b1"]
        mean, var = h.mean(0), h.var(0)
        h = (h - mean) / jnp.sqrt(var + 0.1) * p["scale"] + p["shift"]
        return ((jnp.tanh(h) @ p["w2"] + p["b2"] - 1) ** 2).mean(), mean

    sgd = two_processes.optimiser()
    state, mean, losses = sgd.init(given), jnp.zeros(4), []
    for _ in range(two_processes.STEPS):
        (loss, now), grads = jax.value_and_grad(run, has_aux=True)(given)
        updates, state = sgd.update(grads, state)
        given = optax.apply_updates(given, updates)
        mean = 0.75 * mean + 0.25 * now
        losses.append(loss)
    return {"losses": jnp.stack(losses), "mean": mean, "w1": given["w1"], "w2": given["w2"]}


def check(found, expected):
    for name, array in expected.items():
        np.testing.assert_allclose(np.ravel(found[name]), np.ravel(array), atol=2e-5)


@pytest.mark.parametrize("host", ["nnx", "linen"])
def test_one_process_trains_as_plain_jax_does(host, expected):
    check(two_processes.train(host, None), expected)


@pytest.mark.parametrize(("host", "split"), two_processes.WAYS)
def test_two_processes_train_as_one(host, split, results, expected):
    for found in results:
        check({name: found[f"{host} {split} {name}"] for name in expected}, expected)
