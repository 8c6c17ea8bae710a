"""Layers whose weight is divided by a norm of its own: spectral and weight normalisation."""

import brainstate
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import interop
from interop.composites import brainstate as of_brainstate
from interop.composites import equinox as of_equinox
from interop.composites import linen as of_linen
from interop.composites import nnx as of_nnx

from . import truth
from .cases import BIAS, IMAGES, KERNEL, WEIGHT, X, array
from .conftest import NAMES, Framework

U, V = array(4, seed=31), array(3, seed=32)
SCALE, BIAS_SCALE = array(4, seed=33), array(4, seed=34)  # of both signs
EPSILON, STEPS = 0.3, 2
OTHERS = {name: [n for n in NAMES if n != name] for name in NAMES}


def spectral(weight, u, steps=STEPS, epsilon=EPSILON):
    """Flax's: the new weight and the new vector."""
    matrix = np.float64(weight).reshape(-1, weight.shape[-1])
    for _ in range(steps):
        v = u @ matrix.T
        v = v / np.sqrt((v**2).sum() + epsilon)
        u = v @ matrix
        u = u / np.sqrt((u**2).sum() + epsilon)
    return np.float64(weight) / (v @ matrix @ u), u


def spectral_of_both(weight, u, v, steps, epsilon):
    """Equinox's: the new weight and both vectors, which do not move without steps."""
    matrix = np.float64(weight)
    for _ in range(steps):
        u = v @ matrix
        u = u / max(np.sqrt((u**2).sum()), epsilon)
        v = matrix @ u
        v = v / max(np.sqrt((v**2).sum()), epsilon)
    return matrix / (v @ matrix @ u), u, v


def unit(x, axes, epsilon):
    x = np.float64(x)
    over = tuple(set(range(x.ndim)) - {axis % x.ndim for axis in axes})
    return x / np.sqrt((x**2).sum(over, keepdims=True) + epsilon)


def nnx_linear():
    return Framework("nnx").linear(WEIGHT, BIAS)


def nnx_spectral(layer=None):
    layer = nnx.SpectralNorm(
        layer or nnx_linear(), n_steps=STEPS, epsilon=EPSILON, rngs=nnx.Rngs(0)
    )
    layer.batch_stats["kernel", "u"].set_value(U[None])
    return layer


def linen_spectral(layer=None, kernel=WEIGHT, u=U):
    layer = nn.SpectralNorm(layer or nn.Dense(4), n_steps=STEPS, epsilon=EPSILON)
    statistics = {"u": u[None], "sigma": jnp.ones(())}
    return layer, {
        "params": {"layer_instance": {"kernel": kernel, "bias": BIAS}},
        "batch_stats": {f"layer_instance/kernel/{k}": v for k, v in statistics.items()},
    }


def equinox_spectral():
    layer, state = eqx.nn.make_with_state(eqx.nn.SpectralNorm)(
        Framework("equinox").linear(WEIGHT, BIAS), "weight", STEPS, 2.0, key=jax.random.key(0)
    )
    return layer, state.set(layer.uv_index, (U, V))


@pytest.mark.parametrize("goal", ["nnx", "brainstate"])
def test_a_spectral_norm_of_nnx_or_linen_takes_the_same_training_steps(goal):
    """In training the vector moves, and in NNX the kernel as well."""
    for source, native in ("nnx", nnx_spectral()), ("linen", linen_spectral()):
        if source == goal:
            continue
        fw = Framework(goal)
        model = fw.convert_from(Framework(source), native)
        kernel, u = WEIGHT, np.float64(U)
        for train in (False, True, True, False):
            wanted, new = spectral(kernel, u)
            y, model = fw.run(model, X, train=train)
            np.testing.assert_allclose(y, truth.linear(X, wanted, BIAS), rtol=1e-5, atol=1e-5)
            u = new if train else u
            kernel = wanted if source == "nnx" else kernel
        back = Framework(source).convert_from(fw, model)
        if source == "nnx":
            assert type(back) is nnx.SpectralNorm
            found = back.layer_instance.kernel, back.batch_stats["kernel", "u"][0]
        else:
            assert type(back[0]) is nn.SpectralNorm
            params, statistics = back[1]["params"], back[1]["batch_stats"]
            found = (
                params["layer_instance"]["kernel"],
                statistics["layer_instance/kernel/u"][0],
            )
        np.testing.assert_allclose(found[0], kernel, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[1], u, rtol=1e-5, atol=1e-6)


def test_a_spectral_norm_of_linen_moves_its_vector_in_equinox():
    fw = Framework("equinox")
    converted = fw.convert_from(Framework("linen"), linen_spectral())
    u = np.float64(U)
    for train in (False, True, True, False):
        wanted, new = spectral(WEIGHT, u)
        y, converted = fw.run(converted, X, train=train)
        np.testing.assert_allclose(y, truth.linear(X, wanted, BIAS), rtol=1e-5, atol=1e-5)
        u = new if train else u


@pytest.mark.parametrize("goal", OTHERS["equinox"])
def test_a_spectral_norm_of_equinox_moves_both_vectors(goal):
    fw, native = Framework(goal), equinox_spectral()
    model = fw.convert_from(Framework("equinox"), native)
    u, v = np.float64(U), np.float64(V)
    for train in (False, True, True, False):
        wanted, u, v = spectral_of_both(WEIGHT, u, v, STEPS if train else 0, 2.0)
        y, model = fw.run(model, X, train=train)
        np.testing.assert_allclose(y, truth.linear(X, wanted, BIAS), rtol=2e-5, atol=2e-5)
    layer, state = Framework("equinox").convert_from(fw, model)
    assert type(layer) is eqx.nn.SpectralNorm
    for found, wanted in zip(state.get(layer.uv_index), (u, v), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def nnx_weight_norm(**options):
    layer = nnx.WeightNorm(nnx_linear(), epsilon=EPSILON, rngs=nnx.Rngs(0), **options)
    for path in layer.scales or {}:
        value = (BIAS_SCALE if path == ("bias",) else SCALE).reshape(layer.scales[path].shape)
        if isinstance(layer.scales[path], nnx.Variable):
            layer.scales[path].set_value(value)
        else:
            layer.scales[path] = value
    return layer


def linen_weight_norm(feature_axes=-1):
    layer = nn.WeightNorm(
        nn.Dense(4), epsilon=EPSILON, feature_axes=feature_axes, variable_filter=None
    )
    params = {"layer_instance": {"kernel": WEIGHT, "bias": BIAS}}
    params |= {"layer_instance/kernel/scale": SCALE, "layer_instance/bias/scale": BIAS_SCALE}
    return layer, {"params": params}


def equinox_weight_norm(axis=0):
    layer = eqx.nn.WeightNorm(Framework("equinox").linear(WEIGHT, BIAS), axis=axis)
    scale = SCALE[: layer.g.size].reshape(layer.g.shape)
    return eqx.tree_at(lambda m: m.g, layer, scale), None


@pytest.mark.parametrize("goal", OTHERS["linen"])
def test_a_weight_norm_of_linen_scales_kernel_and_bias(goal):
    fw = Framework(goal)
    model = fw.convert_from(Framework("linen"), linen_weight_norm())
    weight, bias = unit(WEIGHT, (1,), EPSILON) * SCALE, unit(BIAS, (0,), EPSILON) * BIAS_SCALE
    for _ in range(2):
        y = fw.call(model, X)
        np.testing.assert_allclose(y, truth.linear(X, weight, bias), rtol=1e-5, atol=1e-5)
    assert fw.count(model) == 4
    module, variables = Framework("linen").convert_from(fw, model)
    assert (type(module), module.feature_axes) == (nn.WeightNorm, (-1,))
    jax.tree.map(np.testing.assert_array_equal, variables, linen_weight_norm()[1])


@pytest.mark.parametrize("goal", OTHERS["linen"])
def test_axes_that_are_one_axis_of_a_bias_count_once(goal):
    layer = nn.WeightNorm(
        nn.Dense(4), epsilon=EPSILON, feature_axes=(0, -1), variable_filter={"bias"}
    )
    params = {
        "layer_instance": {"kernel": WEIGHT, "bias": BIAS},
        "layer_instance/bias/scale": BIAS_SCALE,
    }
    fw = Framework(goal)
    model = fw.convert_from(Framework("linen"), (layer, {"params": params}))
    wanted = truth.linear(X, WEIGHT, unit(BIAS, (0,), EPSILON) * BIAS_SCALE)
    np.testing.assert_allclose(fw.call(model, X), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("goal", OTHERS["equinox"])
@pytest.mark.parametrize("axis", [0, 1, None])
def test_a_weight_norm_of_equinox_has_norms_along_any_axis(goal, axis):
    fw = Framework(goal)
    native = equinox_weight_norm(axis)
    model = fw.convert_from(Framework("equinox"), native)
    own = () if axis is None else (1 - axis,)
    scale = native[0].g.T
    weight = unit(WEIGHT, own, 0.0) * np.float64(scale)
    y = fw.call(model, X)
    np.testing.assert_allclose(y, truth.linear(X, weight, BIAS), rtol=1e-5, atol=1e-5)
    back = Framework("equinox").convert_from(fw, model)
    back = back[0] if isinstance(back, tuple) else back
    assert (type(back), back.axis) == (eqx.nn.WeightNorm, axis)
    np.testing.assert_array_equal(back.g, native[0].g)


def test_a_weight_norm_of_nnx_leaves_its_kernel_in_brainstate_as_well():
    """With a negative scale, every second call has the other sign."""
    native = nnx_weight_norm()
    converted = interop.from_nnx(native)
    assert type(converted) is of_brainstate.WeightNorm
    kernel = np.float64(WEIGHT)
    for _ in range(3):
        kernel = unit(kernel, (1,), EPSILON) * SCALE
        wanted = truth.linear(X, kernel, BIAS)
        np.testing.assert_allclose(converted(X), wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(native(X), wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            converted.layer["weight"].value, kernel, rtol=1e-5, atol=1e-6
        )
    back = interop.to_nnx(converted)
    assert type(back) is nnx.WeightNorm
    np.testing.assert_allclose(back(X), native(X), rtol=1e-5, atol=1e-6)
    trained = len(converted.states(brainstate.ParamState))
    assert trained == len(jax.tree.leaves(nnx.state(native, nnx.Param)))


@pytest.mark.parametrize("make", [nnx_spectral, nnx_weight_norm])
def test_the_same_steps_of_gradient_descent_in_nnx_and_brainstate(make):
    native = make()
    converted = interop.from_nnx(native)
    rate = 0.1
    for _ in range(2):
        native.train()
        grads = nnx.grad(lambda m: (m(X) ** 2).sum())(native)
        own = nnx.state(native, nnx.Param)
        nnx.update(native, jax.tree.map(lambda p, g: p - rate * g, own, grads))
        params = converted.states(brainstate.ParamState)

        def loss():
            with brainstate.environ.context(fit=True):
                return (converted(X) ** 2).sum()

        for path, grad in brainstate.transform.grad(loss, params)().items():
            params[path].value = params[path].value - rate * grad
    wanted = native.layer_instance.kernel.get_value()
    assert not np.allclose(wanted, WEIGHT, atol=0.01)
    np.testing.assert_allclose(converted.layer["weight"].value, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("goal", ["linen", "equinox"])
@pytest.mark.parametrize("make", [nnx_spectral, nnx_weight_norm])
def test_a_function_cannot_overwrite_its_parameters(goal, make):
    for source, model in ("nnx", make()), ("brainstate", interop.from_nnx(make())):
        with pytest.raises(interop.UnsupportedLayerError, match="overwrites=True") as e:
            Framework(goal).convert_from(Framework(source), model)
        assert e.value.option == "overwrites"
    native = make()  # as the remedy has it
    wanted = native(X, update_stats=False) if make is nnx_spectral else native(X)
    fw = Framework(goal)
    within = fw.convert_from(Framework("nnx"), native.layer_instance)
    np.testing.assert_allclose(fw.call(within, X), wanted, rtol=1e-6)


def test_a_spectral_norm_whose_call_takes_no_option_goes_into_a_stack():
    """Linen's own takes ``update_stats`` in each call, which its Sequential cannot pass."""
    norm, state = equinox_spectral()
    head = Framework("equinox").linear(array(4, 2), None)
    model = eqx.nn.Sequential([norm, eqx.nn.Lambda(jnp.tanh), head])
    module, variables = interop.to_linen(interop.from_equinox(model, state=state))
    assert type(module.layers[0]) is of_linen.SpectralNorm
    wanted = np.tanh(truth.linear(X, spectral_of_both(WEIGHT, U, V, 0, 2.0)[0], BIAS))
    np.testing.assert_allclose(
        module.apply(variables, X), wanted @ array(4, 2), rtol=1e-5, atol=1e-5
    )
    module, variables = linen_spectral()
    stack = nn.Sequential([nn.Dense(3), module])
    dense = {"kernel": array(3, 3), "bias": array(3)}
    variables = {
        "params": {"layers_0": dense, "layers_1": variables["params"]},
        "batch_stats": {"layers_1": variables["batch_stats"]},
    }
    converted = interop.convert(stack, params=variables, to="nnx")
    assert type(converted.layers[1]) is of_nnx.SpectralNorm
    hidden = truth.linear(X, dense["kernel"], dense["bias"])
    wanted = truth.linear(hidden, spectral(WEIGHT, np.float64(U))[0], BIAS)
    np.testing.assert_allclose(converted(X), wanted, rtol=1e-5, atol=1e-5)


def test_a_convolution_keeps_its_vectors_through_another_order_of_axes():
    """Its matrix has a row for each input channel and place, in each framework's own order."""
    conv = eqx.nn.Conv2d(3, 4, (3, 2), use_bias=False, padding="SAME", key=jax.random.key(0))
    conv = eqx.tree_at(lambda m: m.weight, conv, jnp.moveaxis(KERNEL, (-1, -2), (0, 1)))
    model, state = eqx.nn.make_with_state(eqx.nn.SpectralNorm)(
        conv, "weight", key=jax.random.key(1)
    )
    v = array(18, seed=3)
    state = state.set(model.uv_index, (U, v))
    matrix = np.float64(conv.weight).reshape(4, 18)
    wanted = truth.conv(IMAGES[..., :3], KERNEL / (U @ matrix @ v), pads=((1, 1), (0, 1)))
    for goal in OTHERS["equinox"]:
        converted = interop.convert(model, to=goal, state=state)
        fw = Framework(goal)
        y, trained = fw.run(converted, IMAGES[..., :3], train=False)
        np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)
        layer, new = Framework("equinox").convert_from(fw, trained)
        np.testing.assert_array_equal(new.get(layer.uv_index)[1], v)


def test_a_flattened_image_reaches_a_normalised_linear_in_its_own_order():
    fw = Framework("linen")
    kernel = array(2 * 3 * 2, 4)
    model = nnx.Sequential(
        nnx.Conv(2, 2, (1, 1), rngs=nnx.Rngs(0)),
        fw.flatten(),
        nnx.Linear(12, 4, rngs=nnx.Rngs(0)),
    )
    model.layers[2].kernel.set_value(kernel)
    source, variables = interop.convert(model, to="linen", sample_input=(2, 3, 2))
    norm = nn.WeightNorm(nn.Dense(4), feature_axes=(0, -1))
    source = nn.Sequential([*source.layers[:2], norm])
    params = dict(variables["params"])
    scale = array(12, 4, seed=9)
    params["layers_2"] = {
        "layer_instance": params["layers_2"],
        "layer_instance/kernel/scale": scale,
    }
    x = array(5, 2, 3, 2)
    wanted = source.apply({"params": params}, x)
    converted = interop.convert(
        source, params={"params": params}, to="equinox", sample_input=(2, 3, 2)
    )
    assert type(converted.layers[2]) is of_equinox.WeightNorm
    found = jax.vmap(converted)(jnp.moveaxis(x, -1, 1))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_without_anything_to_normalise_it_is_the_layer_within():
    plain = nnx.SpectralNorm(nnx_linear(), n_steps=0, rngs=nnx.Rngs(0))
    none = nnx.WeightNorm(nnx_linear(), variable_filter=nnx.PathContains("x"), rngs=nnx.Rngs(0))
    for model in (plain, none):
        assert type(interop.from_nnx(model)) is brainstate.nn.Linear


def test_other_layers_within_are_refused_by_name():
    attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
    mirrored = nnx.ConvTranspose(3, 4, 2, transpose_kernel=True, rngs=nnx.Rngs(0))
    norm = nnx.LayerNorm(4, rngs=nnx.Rngs(0))
    stateful = Framework("equinox").convert_from(Framework("linen"), linen_spectral())[0]
    with pytest.raises(interop.ArgumentError, match="state"):
        stateful(X[0])
    for layer in (attention, mirrored):
        with pytest.raises(interop.UnsupportedLayerError) as e:
            interop.from_nnx(nnx.SpectralNorm(layer, rngs=nnx.Rngs(0)))
        assert e.value.option == "layer_instance"
    every = nnx.WeightNorm(norm, variable_filter=lambda *_: True, rngs=nnx.Rngs(0))
    with pytest.raises(interop.UnsupportedLayerError, match="layer_instance"):
        interop.from_nnx(every)
    stack = nn.WeightNorm(nn.Sequential([nn.Dense(4), nn.Dense(2)]))
    variables = stack.init(jax.random.key(0), X)
    with pytest.raises(interop.UnsupportedLayerError, match="layer_instance"):
        interop.from_linen(stack, variables)
    module, variables = linen_spectral()
    del variables["batch_stats"]["layer_instance/kernel/u"]
    with pytest.raises(interop.ConversionError, match="kernel/u"):
        interop.from_linen(module, variables)
    embedding = eqx.nn.Embedding(5, 3, key=jax.random.key(0))
    with pytest.raises(interop.UnsupportedLayerError) as e:
        interop.from_equinox(eqx.nn.WeightNorm(embedding))
    assert e.value.option == "layer"
