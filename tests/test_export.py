"""An exported model computes the same, for any batch size, without any of the frameworks."""

import subprocess
import sys

import brainstate
import brainunit
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import interop
import shims

from .cases import BIAS, EPSILON, MEAN, MOMENTUM, SCALE, SHIFT, VAR, WEIGHT, X, array
from .conftest import Framework
from .test_weights import BUILTIN, wrapped

LOAD = """
import sys

BLOCKED = ("flax", "equinox", "brainstate", "brainunit", "saiunit", "interop", "shims")

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import jax, jax.export
import numpy as np
import safetensors.numpy

folder = sys.argv[1]
program = jax.export.deserialize(bytearray(open(folder + "/program", "rb").read()))
x = np.load(folder + "/x.npy")
weights = [safetensors.numpy.load_file(folder + "/weights")] if len(sys.argv) > 2 else []
np.save(folder + "/y.npy", program.call(*weights, x))
"""


def run_elsewhere(folder, program, x, *more):
    (folder / "program").write_bytes(program.serialize())
    np.save(folder / "x.npy", x)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), *more],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return np.load(folder / "y.npy")


def stack(fw):
    return fw.sequential(
        fw.batch_norm(SCALE, SHIFT, MEAN, VAR, EPSILON, MOMENTUM),
        fw.linear(WEIGHT, BIAS),
        fw.dropout(0.3),
        fw.activation(jnp.tanh),
    )


OTHER = array(7, 3, seed=31)


def test_an_exported_model_runs_without_the_frameworks(source, tmp_path):
    model = stack(source)
    wanted = source.call(model, OTHER)
    program = interop.export(model, X)
    found = run_elsewhere(tmp_path, program, OTHER)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_weights_may_be_arguments_and_come_from_a_file(source, tmp_path):
    model = stack(source)
    program = interop.export(model, X, weights="arguments")
    interop.save(tmp_path / "weights", model)
    found = run_elsewhere(tmp_path, program, OTHER, "weights")
    np.testing.assert_allclose(found, source.call(model, OTHER), rtol=1e-6, atol=1e-6)
    zeros = jax.tree.map(jnp.zeros_like, interop.weights(model))
    np.testing.assert_array_equal(program.call(zeros, OTHER), np.zeros((7, 4)))


@pytest.mark.parametrize("host", BUILTIN)
def test_a_shim_is_exported_in_evaluation_mode(host):
    guest = "nnx" if host == "brainstate" else "brainstate"
    model, call = wrapped(host, stack(Framework(guest)))
    program = interop.export(model, X)
    np.testing.assert_allclose(program.call(X), call(model), rtol=1e-6, atol=1e-6)
    assert program.call(OTHER).shape == (7, 4)


class Own(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dropout(0.5)(nn.Dense(2)(x), deterministic=not train)


def test_a_model_with_forward_logic_of_its_own_is_exported():
    variables = Own().init(jax.random.key(0), X, False)
    program = interop.export(Own(), X, params=variables)
    np.testing.assert_allclose(
        program.call(OTHER), Own().apply(variables, OTHER, False), rtol=1e-6
    )


class Fixed(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(WEIGHT)

    def __call__(self, x):
        parts = [row for row in x] if x.shape[0] == 5 else None
        return jnp.stack(parts) @ self.weight[...]


def test_a_model_whose_code_needs_a_fixed_batch_is_refused_with_the_reason():
    with pytest.raises(interop.UnsupportedStructureError, match="needs a fixed batch") as e:
        interop.export(Fixed(), X)
    assert e.value.__cause__ is not None
    assert 'batch="fixed"' in str(e.value)
    program = interop.export(Fixed(), X, batch="fixed")
    np.testing.assert_allclose(program.call(X), X @ WEIGHT, rtol=1e-6)


class Single(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(WEIGHT)

    def __call__(self, x):
        return (x if x.shape[0] == 1 else x - x.mean(0)) @ self.weight[...]


def test_a_model_whose_code_compares_the_batch_size_is_refused():
    with pytest.raises(interop.UnsupportedStructureError, match="for some batch sizes"):
        interop.export(Single(), X)
    program = interop.export(Single(), X[:1], batch="fixed")
    np.testing.assert_allclose(program.call(X[:1]), X[:1] @ WEIGHT, rtol=1e-6)


def test_wrong_inputs_are_the_models_error():
    with pytest.raises(TypeError, match="dot_general"):
        interop.export(eqx.nn.Linear(3, 4, key=jax.random.key(0)), jnp.ones((2, 7)))


def test_a_program_is_for_the_platforms_asked_for():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    assert interop.export(model, X, platforms=("cpu", "cuda")).platforms == ("cpu", "cuda")


class Steps(brainstate.nn.Module):
    """A recurrent cell over time with forward logic of its own, and a dropout."""

    def __init__(self):
        super().__init__()
        self.cell = brainstate.nn.GRUCell(3, 4)
        self.drop = brainstate.nn.Dropout(0.5)

    def update(self, xs):
        self.cell.init_state(xs.shape[0])
        return self.drop(brainstate.transform.for_loop(self.cell, xs.swapaxes(0, 1))[-1])


def test_a_recurrent_model_is_exported_live_and_traced_for_every_platform():
    guest, xs = Steps(), array(5, 4, 3, seed=32)
    with brainstate.environ.context(fit=False):
        wanted = guest(xs)
    shim = shims.ToNNX(guest)
    for model in (shim, shim.materialize(method="trace", sample_input=xs)):
        program = interop.export(model, xs, platforms=("cpu", "cuda", "tpu"))
        assert program.platforms == ("cpu", "cuda", "tpu")
        np.testing.assert_allclose(program.call(xs[:2]), wanted[:2], rtol=1e-5, atol=1e-6)


def test_several_inputs_and_outputs_keep_their_places():
    class Two(nnx.Module):
        def __call__(self, a, b):
            return {"sum": a + b, "rest": (a * b, b)}

    program = interop.export(Two(), X, X[:, :1])
    found = program.call(OTHER, OTHER[:, :1])
    np.testing.assert_allclose(found["sum"], OTHER + OTHER[:, :1], rtol=1e-6)
    np.testing.assert_allclose(found["rest"][0], OTHER * OTHER[:, :1], rtol=1e-6)
    with pytest.raises(ValueError, match="inconsistency"):
        program.call(OTHER, OTHER[:3, :1])


def test_the_model_stays_as_it_is():
    model = nnx.Sequential(
        nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1))
    )
    model.train()
    before = interop.weights(model)
    interop.export(model, X)
    after = interop.weights(model)
    assert all(after[name] is before[name] for name in before)
    assert model.layers[1].deterministic is False


def test_units_stay_inside():
    layer = brainstate.nn.Linear(3, 4, b_init=None)
    layer.weight.value = {k: v * brainunit.mV for k, v in layer.weight.value.items()}
    with pytest.raises(interop.UnsupportedStructureError, match="units"):
        interop.export(layer, X)
    with pytest.raises(interop.ArgumentError, match="plain arrays"):
        interop.export(layer, X * brainunit.mA)

    class Ratio(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def __call__(self, x):
            return self.layer(x) / brainunit.mV

    weights = {"layer/weight/weight": layer.weight.value["weight"].mantissa}
    program = interop.export(Ratio(), X, weights="arguments")
    np.testing.assert_allclose(program.call(weights, X), Ratio()(X), rtol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        ((X,), {"batch": "dynamic"}),
        ((X,), {"weights": "outside"}),
        ((X,), {"platforms": "cpu"}),
        ((X,), {"platforms": ("cpu", "gpu")}),
        ((), {}),
        ((X, X[:2]), {}),
    ],
)
def test_arguments_are_checked(inputs, options):
    with pytest.raises(interop.ArgumentError):
        interop.export(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), *inputs, **options)
