"""Normalisations with axes, dtypes and modes that only some frameworks have."""

import brainstate
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import interop

from .cases import array
from .conftest import Framework

EPSILON = 1e-3
X = array(5, 3, 2, 4) * 2 + 1


def normal(x, axes, scale=1.0, bias=0.0, is_centred=True):
    """The textbook's formula in float64."""
    x = np.float64(x)
    mean = x.mean(axes, keepdims=True) if is_centred else 0.0
    var = np.square(x - mean).mean(axes, keepdims=True)
    return (x - mean) / np.sqrt(var + EPSILON) * np.float64(scale) + np.float64(bias)


def brainstate_norm(cls, shape, reduction_axes, feature_axes, scale, bias):
    options = {"bias_init": bias} if cls == "LayerNorm" else {}
    scale, bias = (a.reshape(3, 1, 4) for a in (scale, bias))
    options = {name: bias for name in options}
    return getattr(brainstate.nn, cls)(
        shape,
        reduction_axes=reduction_axes,
        feature_axes=feature_axes,
        epsilon=EPSILON,
        scale_init=scale,
        use_fast_variance=False,
        **options,
    )


def nnx_norm(cls, shape, reduction_axes, feature_axes, scale, bias):
    layer = getattr(nnx, cls)(
        12,
        reduction_axes=reduction_axes,
        feature_axes=feature_axes,
        epsilon=EPSILON,
        use_fast_variance=False,
        rngs=nnx.Rngs(0),
    )
    layer.scale.set_value(scale.ravel())
    if cls == "LayerNorm":
        layer.bias.set_value(bias.ravel())
    return layer


def linen_norm(cls, shape, reduction_axes, feature_axes, scale, bias):
    module = getattr(nn, cls)(
        reduction_axes=reduction_axes,
        feature_axes=feature_axes,
        epsilon=EPSILON,
        use_fast_variance=False,
    )
    arrays = {"scale": scale} | ({"bias": bias} if cls == "LayerNorm" else {})
    return module, {"params": arrays}


MAKE = {"brainstate": brainstate_norm, "nnx": nnx_norm, "linen": linen_norm}


@pytest.mark.parametrize("cls", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("reduction_axes", [(-2, -1), (-3, -1)])
def test_any_axes_are_normalised_and_any_others_scaled(source, target, cls, reduction_axes):
    """Scale and bias vary along the first and the last of three axes."""
    if source.name == "equinox":
        pytest.skip("equinox: normalises and scales the same axes")
    scale, bias = array(3, 4) + 2, array(3, 4, seed=1)
    model = MAKE[source.name](cls, (3, 2, 4), reduction_axes, (-1, -3), scale, bias)
    converted = target.convert_from(source, model, sample_input=(3, 2, 4))
    is_centred = cls == "LayerNorm"
    shift = bias[:, None] if is_centred else 0.0
    wanted = normal(X, reduction_axes, scale[:, None], shift, is_centred)
    for fw, m in ((source, model), (target, converted)):
        np.testing.assert_allclose(fw.call(m, X), wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(fw.jit(m, X), wanted, rtol=1e-5, atol=1e-5)
    slopes = [
        jax.grad(lambda x, f=f, m=m: (f.call(m, x) ** 3).sum())(X)
        for f, m in ((source, model), (target, converted))
    ]
    np.testing.assert_allclose(slopes[1], slopes[0], rtol=1e-4, atol=1e-4)
    back = source.convert_from(target, converted, sample_input=(3, 2, 4))
    part = back[0] if isinstance(back, tuple) else back
    assert type(part).__name__ == cls
    assert type(part).__module__.split(".")[0] != "interop"
    np.testing.assert_allclose(source.call(back, X), wanted, rtol=1e-5, atol=1e-5)


def test_axes_that_count_the_batch_are_normalised_over_the_batch(target):
    """Also where the module sees one example: the host names the axis that it maps over."""
    layer = nnx.LayerNorm(4, reduction_axes=(-3, -1), epsilon=EPSILON, rngs=nnx.Rngs(0))
    x = array(5, 3, 4)
    source = Framework("nnx")
    if target.name == "nnx":
        pytest.skip("nothing to convert")
    model = target.convert_from(source, layer, sample_input=(3, 4))
    np.testing.assert_allclose(target.call(model, x), normal(x, (0, 2)), rtol=1e-5, atol=1e-5)


def test_the_one_row_of_a_normalisation_of_images_crosses_layouts():
    """NNX keeps the weights of several axes in one row; Equinox has the channels first."""
    axes, kernel = (-3, -2, -1), array(1, 1, 2, 4)
    scale, bias = array(6 * 5 * 4) + 2, array(6 * 5 * 4, seed=1)
    layer = nnx.LayerNorm(
        120, reduction_axes=axes, feature_axes=axes, epsilon=EPSILON, rngs=nnx.Rngs(0)
    )
    layer.scale.set_value(scale)
    layer.bias.set_value(bias)
    fw, x = Framework("nnx"), array(2, 6, 5, 2)
    model = fw.sequential(fw.conv(kernel, None, (6, 5, 2)), layer)
    images = np.float64(x) @ np.float64(kernel)[0, 0]
    wanted = normal(images, (1, 2, 3), scale.reshape(6, 5, 4), bias.reshape(6, 5, 4))
    converted = interop.convert(model, to="equinox", sample_input=(6, 5, 2))
    found = np.moveaxis(jax.vmap(converted)(np.moveaxis(x, -1, 1)), 1, -1)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert len(interop.mapping(model, converted, sample_input=(6, 5, 2))) == 3


def test_an_axis_that_is_given_twice_counts_once(target):
    layer = nnx.LayerNorm(4, reduction_axes=(-1, -1), epsilon=EPSILON, rngs=nnx.Rngs(0))
    if target.name == "nnx":
        pytest.skip("nothing to convert")
    x = array(5, 4)
    model = target.convert_from(Framework("nnx"), layer, sample_input=(4,))
    np.testing.assert_allclose(target.call(model, x), normal(x, (1,)), rtol=1e-5, atol=1e-5)


def norms_along_devices():
    options = {"epsilon": EPSILON, "axis_name": "devices", "rngs": nnx.Rngs(0)}
    yield nnx.LayerNorm(4, **options), lambda x: normal(x, (0, 2))
    yield nnx.RMSNorm(4, **options), lambda x: normal(x, (0, 2), is_centred=False)
    yield nnx.GroupNorm(4, 1, **options), lambda x: normal(x, (0, 2))


@pytest.mark.parametrize(("layer", "formula"), list(norms_along_devices()))
def test_statistics_are_shared_along_a_named_axis(target, layer, formula):
    if target.name == "nnx":
        pytest.skip("nothing to convert")
    model = target.convert_from(Framework("nnx"), layer, sample_input=(4,))
    x = array(2, 5, 4) * 2 + 1
    y = jax.vmap(lambda x: target.call(model, x), axis_name="devices")(x)
    np.testing.assert_allclose(y, formula(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["batch", ("devices", "batch")])
def test_a_name_that_hides_the_batch_axis_is_refused_by_equinox(name):
    layer = nnx.LayerNorm(4, axis_name=name, rngs=nnx.Rngs(0))
    with pytest.raises(interop.UnsupportedLayerError, match="axis_name") as e:
        interop.convert(layer, to="equinox")
    assert e.value.option == "axis_name"


@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_instance_norm_is_a_group_norm_of_single_features(framework, target):
    if target.name == framework:
        pytest.skip("nothing to convert")
    source = Framework(framework)
    scale, bias, x = array(4) + 2, array(4, seed=1), array(2, 3, 5, 4)
    if framework == "nnx":
        model = nnx.InstanceNorm(4, epsilon=EPSILON, rngs=nnx.Rngs(0))
        model.scale.set_value(scale)
        model.bias.set_value(bias)
    else:
        params = {"scale": scale, "bias": bias}
        model = nn.InstanceNorm(epsilon=EPSILON, feature_axes=(-1,)), {"params": params}
    converted = target.convert_from(source, model, sample_input=(3, 5, 4))
    found = target.to_channels_last(target.call(converted, target.from_channels_last(x)))
    wanted = normal(x, (1, 2), scale, bias)
    np.testing.assert_allclose(source.call(model, x), wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def ema_norm():
    model, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        4, "batch", mode="ema", momentum=0.8, eps=EPSILON
    )
    weights = array(4) + 2, array(4, seed=1)
    return eqx.tree_at(lambda m: (m.weight, m.bias), model, weights), state


def test_a_batch_norm_that_trains_with_its_running_statistics_goes_on_doing_so(target):
    """Three steps: the first sets the statistics to those of its batch."""
    if target.name == "equinox":
        pytest.skip("nothing to convert")
    source, x = Framework("equinox"), array(6, 4) + 1
    model = ema_norm()
    converted = target.convert_from(source, model, sample_input=(4,))
    mean, var = np.float64(x).mean(0), np.float64(x).var(0)
    for i in range(3):
        batch = np.float64(x) * (i + 1) + i
        if i:
            mean = 0.8 * mean + 0.2 * batch.mean(0)
            var = 0.8 * var + 0.2 * batch.var(0)
        y, converted = target.run(converted, jnp.asarray(batch, jnp.float32), train=True)
        wanted = (batch - mean) / np.sqrt(var + EPSILON) * (array(4) + 2) + array(4, seed=1)
        np.testing.assert_allclose(y, wanted, rtol=2e-5, atol=2e-5)
    wanted = (x - mean) / np.sqrt(var + EPSILON) * (array(4) + 2) + array(4, seed=1)
    np.testing.assert_allclose(target.call(converted, x), wanted, rtol=2e-5, atol=2e-5)
    back = source.convert_from(target, converted)
    assert type(back[0]) is eqx.nn.BatchNorm
    assert back[0].mode == "ema"
    np.testing.assert_allclose(source.call(back, x), wanted, rtol=2e-5, atol=2e-5)
