"""Parameters and inputs in float32 and half precision: dtypes and values of the output."""

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import interop

from .cases import array
from .conftest import Framework

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
mixes = pytest.mark.parametrize(
    ("parameters", "inputs"),
    [(p, x) for p in DTYPES for x in DTYPES],
    ids=lambda dtype: np.dtype(dtype).name,
)


def same(target, converted, source, model, x):
    wanted, found = source.call(model, x), target.call(converted, x)
    assert found.dtype == wanted.dtype
    np.testing.assert_allclose(
        np.float64(found), np.float64(wanted), rtol=2e-5, atol=2e-5
    )  # both compute in float32 or do the same steps


@mixes
def test_linear_keeps_the_output_dtype(source, target, parameters, inputs):
    model = source.linear(array(3, 4, dtype=parameters), array(4, dtype=parameters))
    converted = target.convert_from(source, model)
    same(target, converted, source, model, array(5, 3, dtype=inputs))


@mixes
def test_layer_norm_keeps_the_output_dtype_except_in_equinox(
    source, target, parameters, inputs
):
    """Equinox's returns its input's dtype, as the docstrings of to_ and from_equinox say."""
    source.needs("layer_norm")
    target.needs("layer_norm")
    scale, bias = array(3, dtype=parameters), array(3, seed=1, dtype=parameters)
    model = source.layer_norm(scale, bias, 1e-3)
    converted, x = target.convert_from(source, model), array(5, 3, dtype=inputs)
    if "equinox" not in (source.name, target.name):
        same(target, converted, source, model, x)
        return
    promoted = jnp.promote_types(parameters, inputs)
    for framework, y in (
        (source, source.call(model, x)),
        (target, target.call(converted, x)),
    ):
        assert y.dtype == (inputs if framework.name == "equinox" else promoted)


@pytest.mark.parametrize("goal", ["equinox", "linen", "nnx"])
def test_a_group_norm_without_weights_returns_what_brainstate_does(goal):
    """Statistics are float32 at least, and BrainState leaves the result in their dtype."""
    source, target = Framework("brainstate"), Framework(goal)
    model = brainstate.nn.GroupNorm(4, num_groups=2, use_scale=False, use_bias=False)
    x = array(5, 4, dtype=jnp.bfloat16)
    y = target.call(target.convert_from(source, model), x)
    groups = np.float64(x).reshape(5, 2, 2)
    normal = groups - groups.mean(-1, keepdims=True)
    wanted = normal / np.sqrt(groups.var(-1, keepdims=True) + 1e-6)
    assert y.dtype == (x.dtype if goal == "equinox" else jnp.float32)
    np.testing.assert_allclose(y, wanted.reshape(5, 4), rtol=0, atol=1e-2)


@mixes
def test_batch_norm_keeps_the_output_dtype(source, target, parameters, inputs):
    source.needs("batch_norm")
    target.needs("batch_norm")
    scale, bias = array(3, dtype=parameters), array(3, seed=1, dtype=parameters)
    statistics = array(3), array(3, positive=True)
    model = source.batch_norm(scale, bias, *statistics, 1e-3, 0.9)
    converted = target.convert_from(source, model, sample_input=(3,))
    same(target, converted, source, model, array(5, 3, dtype=inputs))


def test_running_statistics_in_half_precision_are_refused(source, target):
    """Each framework rounds them at another step."""
    source.needs("batch_norm")
    target.needs("batch_norm")
    half = array(3, dtype=jnp.bfloat16, positive=True)
    model = source.batch_norm(half, half, half, half, 1e-3, 0.9)
    with pytest.raises(interop.UnsupportedLayerError, match="statistics_dtype=bfloat16"):
        target.convert_from(source, model, sample_input=(3,))


def test_a_bias_of_another_dtype_is_promoted_alike_or_refused(source, target):
    weight, bias = array(3, 4, dtype=jnp.bfloat16), array(4)
    model = source.linear(weight, bias)
    if source.name in ("linen", "nnx"):  # which cast the bias before adding it
        converted = target.convert_from(source, model)
        same(target, converted, source, model, array(5, 3, dtype=jnp.bfloat16))
        return
    with pytest.raises(interop.UnsupportedLayerError) as e:
        target.convert_from(source, model)
    assert e.value.option == "bias.dtype"


@pytest.mark.parametrize("layer", ["layer_norm", "batch_norm"])
@pytest.mark.parametrize("fast", [True, False])
def test_the_variance_is_computed_alike_at_a_large_mean(source, target, layer, fast):
    """Fast variance loses digits there: an error, but the same one."""
    for feature in (layer, "fast variance") if fast else (layer,):
        source.needs(feature)
        target.needs(feature)
    ones = jnp.ones(3)
    arrays = (ones, ones) if layer == "layer_norm" else (ones, ones, ones, ones)
    options = {"epsilon": 1e-5} | ({"momentum": 0.9} if layer == "batch_norm" else {})
    model = getattr(source, layer)(*arrays, **options, use_fast_variance=fast)
    converted = target.convert_from(source, model, sample_input=(3,))
    x = array(6, 3) + 3e3
    wanted, found = source.call(model, x, train=True), target.call(converted, x, train=True)
    exact = {"equinox"} & {source.name, target.name}
    np.testing.assert_allclose(found, wanted, rtol=5e-3 if exact else 2e-5, atol=1e-3)


def test_float64_is_kept(source, target):
    with jax.enable_x64(True):
        model = source.linear(array(3, 4, dtype=jnp.float64), array(4, dtype=jnp.float64))
        converted = target.convert_from(source, model)
        x = array(5, 3, dtype=jnp.float64)
        found = target.call(converted, x)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, source.call(model, x), rtol=1e-14)


def test_the_compute_dtype_of_flax_is_kept(target):
    """``dtype=bfloat16`` casts the operands first: another result than bfloat16 weights."""
    if target.name == "nnx":
        pytest.skip("nothing to convert")
    source = Framework("nnx")
    model = source.linear(array(3, 4), array(4), dtype=jnp.bfloat16)
    same(target, target.convert_from(source, model), source, model, array(5, 3))
