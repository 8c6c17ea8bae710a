"""ONNX files compute what the models do, in onnxruntime; `make test-onnx` runs this."""

import functools
import importlib.util

import brainstate
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import interop
import shims

from .cases import (
    BIAS,
    CONV,
    EPSILON,
    IMAGES,
    KERNEL,
    MEAN,
    MOMENTUM,
    SCALE,
    SHIFT,
    SHIFT_4,
    VAR,
    WEIGHT,
    X,
    array,
)
from .conftest import Framework
from .test_docs import check_artefacts, run_example, run_readme

INSTALLED = importlib.util.find_spec("jax2onnx") is not None
needs_onnx = pytest.mark.skipif(
    not INSTALLED, reason="jax2onnx pins another orbax: make test-onnx has a virtualenv for it"
)


def run_file(path, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return session.run(None, {session.get_inputs()[0].name: np.asarray(x)})[0]


def dense(fw):
    norm = fw.batch_norm(SCALE, SHIFT, MEAN, VAR, EPSILON, MOMENTUM)
    return fw.sequential(
        norm, fw.linear(WEIGHT, BIAS), fw.dropout(0.3), fw.activation(jax.nn.gelu)
    )


@needs_onnx
def test_a_stack_is_the_same_in_onnxruntime_for_any_batch_size(source, tmp_path):
    model, path, x = dense(source), tmp_path / "model.onnx", array(9, 3, seed=41)
    interop.to_onnx(model, X, path=path)
    np.testing.assert_allclose(run_file(path, x), source.call(model, x), rtol=0, atol=1e-5)


@needs_onnx
@pytest.mark.parametrize("batch", ["symbolic", "fixed"])
def test_a_network_for_images_is_the_same_in_onnxruntime(source, tmp_path, batch):
    shape = IMAGES.shape[1:]
    layers = [source.conv(KERNEL, SHIFT_4, shape, **CONV), source.activation(jnp.tanh)]
    pool = source.max_pool((2, 2), (1, 1), ((0, 1), (1, 0)))
    model, path = source.sequential(*layers, pool), tmp_path / "model.onnx"
    x = source.from_channels_last(IMAGES)
    interop.to_onnx(model, x, path=path, batch=batch)
    y = source.call(model, 2 * x)
    np.testing.assert_allclose(run_file(path, 2 * x), y, rtol=0, atol=1e-5)


@needs_onnx
def test_pools_that_pad_and_average_are_the_same(tmp_path):
    pools = [
        functools.partial(nnx.max_pool, window_shape=(3, 2), strides=(2, 1), padding="SAME"),
        functools.partial(nnx.avg_pool, window_shape=(2, 2), strides=(1, 2)),
    ]
    model = nnx.Sequential(*pools)
    interop.to_onnx(model, IMAGES, path=tmp_path / "model.onnx")
    x = array(3, *IMAGES.shape[1:], seed=42)
    np.testing.assert_allclose(
        run_file(tmp_path / "model.onnx", x), model(x), rtol=0, atol=1e-5
    )


def check(model, x, path, other):
    """A file of the model is right on a batch of another size."""
    interop.to_onnx(model, x, path=path)
    wanted = interop.export(model, x).call(other)
    np.testing.assert_allclose(run_file(path, other), wanted, rtol=0, atol=1e-5)


class ByRow(eqx.Module):
    """Equinox's own modules over the rows of an example."""

    embed: eqx.nn.Embedding
    attend: eqx.nn.MultiheadAttention
    cell: eqx.nn.GRUCell

    def __call__(self, indices):
        h = jax.vmap(self.embed)(indices)
        h = h + self.attend(h, h, h)
        return jax.lax.scan(lambda c, x: (self.cell(x, c), None), jnp.zeros(3), h)[0]


class Steps(brainstate.nn.Module):
    def __init__(self, embed, attend, cell):
        super().__init__()
        self.embed, self.attend, self.cell = embed, attend, cell

    def update(self, indices):
        h = self.embed(indices)
        h = h + self.attend(h)
        self.cell.init_state(h.shape[0])
        return brainstate.transform.for_loop(self.cell, h.swapaxes(0, 1))[-1]


@needs_onnx
@pytest.mark.parametrize("name", ["nnx", "linen", "equinox", "brainstate"])
def test_embedding_attention_and_a_recurrent_cell_are_the_same_for_any_batch_size(
    name, tmp_path
):
    rngs, key = nnx.Rngs(0), jax.random.key(0)
    embed = nnx.Embed(7, 6, rngs=rngs)
    attend = nnx.MultiHeadAttention(2, 6, 6, decode=False, rngs=rngs)
    match name:
        case "equinox":
            parts = eqx.nn.Embedding(7, 6, key=key), eqx.nn.MultiheadAttention(2, 6, key=key)
            model = ByRow(*parts, eqx.nn.GRUCell(6, 3, key=key))
        case "brainstate":
            parts = (interop.convert(part, to=name) for part in (embed, attend))
            model = Steps(*parts, brainstate.nn.LSTMCell(6, 3))
        case _:
            rnn = nnx.RNN(nnx.OptimizedLSTMCell(6, 3, rngs=rngs))
            model = nnx.Sequential(embed, attend, rnn)
            if name == "linen":
                parts = [interop.to_linen(part) for part in model.layers]
                variables = {f"layers_{i}": v["params"] for i, (_, v) in enumerate(parts)}
                model = nn.Sequential([module for module, _ in parts]), {"params": variables}
    indices = jnp.asarray([[1, 2, 6, 0], [3, 3, 4, 5]])
    other = np.asarray([[0, 5, 6, 1], [2, 2, 2, 2], [6, 1, 3, 4]], np.int32)
    check(model, indices, tmp_path / "model.onnx", other)


class Residual(brainstate.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = brainstate.nn.Linear(3, 3, w_init=array(3, 3, seed=43))

    def update(self, x):
        return x + jnp.tanh(self.inner(x))


@needs_onnx
def test_a_shim_is_written_and_a_traced_module_is_refused_with_the_remedy(tmp_path):
    shim, path = shims.ToNNX(Residual()), tmp_path / "model.onnx"
    check(shim, X, path, array(7, 3, seed=44))
    traced = shim.materialize(method="trace", sample_input=X)
    with pytest.raises(interop.UnsupportedStructureError, match="call_exported") as found:
        interop.to_onnx(traced, X, path=path)
    assert "live shims" in found.value.remedy


@needs_onnx
def test_what_onnxruntime_cannot_run_is_refused(tmp_path):
    model = nnx.Sequential(lambda x: jnp.abs(jnp.fft.fft(x)))
    with pytest.raises(interop.UnsupportedStructureError, match="onnxruntime cannot run"):
        interop.to_onnx(model, X, path=tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@needs_onnx
def test_an_operation_without_a_counterpart_is_named(tmp_path):
    model = nnx.Sequential(lambda x: jnp.linalg.eigh(x)[0])
    with pytest.raises(interop.UnsupportedStructureError, match="the operation eigh"):
        interop.to_onnx(model, jnp.ones((2, 3, 3)), path=tmp_path / "model", batch="fixed")
    assert list(tmp_path.iterdir()) == []


@needs_onnx
def test_the_readmes_programs_run_with_onnx():
    run_readme()


@needs_onnx
def test_the_example_takes_its_model_along_in_onnx_as_well(tmp_path):
    check_artefacts(run_example("train_mixed_export_pure", "--out", tmp_path))


@pytest.mark.skipif(INSTALLED, reason="jax2onnx is installed")
def test_without_its_packages_it_says_what_to_install(tmp_path):
    with pytest.raises(interop.MissingDependencyError, match="jax2onnx"):
        interop.to_onnx(dense(Framework("nnx")), X, path=tmp_path / "model.onnx")
