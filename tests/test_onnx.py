"""ONNX files compute what the models do, in onnxruntime; `make test-onnx` runs this."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import interop

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
