"""Convolutions of every kind, with every way to pad, in all directions."""

import brainstate
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import interop
from interop.composites import nnx as composites

from . import truth
from .cases import array
from .conftest import NAMES, Framework

X = array(2, 5, 7, 4)  # of height 5, width 7 and 4 channels
KERNEL, BIAS = array(3, 2, 2, 6, seed=1), array(6, seed=2)  # in two groups
WHOLE = array(3, 2, 4, 6, seed=3)  # in one
WIDE = array(4, 2, 4, 6, seed=4)
MASK = jnp.asarray(np.arange(3 * 2 * 4 * 6).reshape(3, 2, 4, 6) % 3, jnp.float32)
GAIN = array(6, seed=5)
PLACES = array(3, 7, 24, 6, seed=6)
PLACES_BIAS = array(3, 7, 6, seed=7)


# -- hand-written truth: NumPy, channels last, two axes of space --


def padded(x, pads, mode):
    return np.pad(x, [(0, 0), *pads, (0, 0)], mode)


def dilated(x, strides, whole=False):
    """Zeros between the elements; ``whole`` if after the last one as well."""
    high, wide = x.shape[1] * strides[0], x.shape[2] * strides[1]
    y = np.zeros((x.shape[0], high, wide, x.shape[3]))
    y[:, :: strides[0], :: strides[1]] = x
    return y if whole else y[:, : high - strides[0] + 1, : wide - strides[1] + 1]


def transposed(x, weight, strides, pads, dilation=(1, 1), groups=1):
    return truth.conv(
        dilated(x, strides), weight, BIAS, (1, 1), pads, dilation=dilation, groups=groups
    )


def periodic(x, weight, strides, low):
    x, y = dilated(x, strides, whole=True), 0.0
    for i, j in np.ndindex(*weight.shape[:2]):
        y = y + np.roll(x, (low[0] - i, low[1] - j), (1, 2)) @ np.float64(weight[i, j])
    return y + BIAS


def standardized(weight, gain, epsilon):
    weight = np.float64(weight)
    out = np.empty_like(weight)
    for i in range(weight.shape[-1]):
        part = weight[..., i]
        spread = ((part - part.mean()) ** 2).sum()  # variance times number of elements
        out[..., i] = gain[i] * (part - part.mean()) / np.sqrt(max(spread, epsilon))
    return out


def local(x, weight, bias, strides):
    """Kernels of 3 by 2, whose elements are in the order of channels, then of space."""
    y = np.zeros((len(x), *weight.shape[:2], weight.shape[-1]))
    for i, j in np.ndindex(*weight.shape[:2]):
        window = x[:, i * strides[0] :, j * strides[1] :][:, :3, :2]
        y[:, i, j] = np.moveaxis(window, -1, 1).reshape(len(x), -1) @ np.float64(weight[i, j])
    return y + bias


# -- layers of each framework --


def of_nnx(weight, cls=nnx.Conv, **options):
    rows = (weight.shape[-2], weight.shape[-1])
    if options.get("transpose_kernel"):
        weight, rows = weight[::-1, ::-1].swapaxes(-1, -2), rows
    layer = cls(*rows, weight.shape[:2], rngs=nnx.Rngs(0), **options)
    layer.kernel.set_value(weight)
    layer.bias.set_value(BIAS)
    return layer


def of_nnx_in_groups(**options):
    layer = nnx.Conv(4, 6, (3, 2), feature_group_count=2, rngs=nnx.Rngs(0), **options)
    layer.kernel.set_value(KERNEL)
    layer.bias.set_value(BIAS)
    return layer


def of_linen(module, weight, bias=BIAS):
    return module, {"params": {"kernel": weight, "bias": bias}}


def of_equinox(cls, weight, **options):
    groups = 4 // weight.shape[-2]
    layer = cls(4, 6, weight.shape[:2], groups=groups, key=jax.random.key(0), **options)
    arrays = jnp.moveaxis(weight, (-1, -2), (0, 1)), BIAS[:, None, None]
    return eqx.tree_at(lambda m: (m.weight, m.bias), layer, arrays)


def of_brainstate(cls, weight, shape=(5, 7, 4), **options):
    options.setdefault("b_init", BIAS)
    return cls(shape, 6, (3, 2), w_init=weight, **options)


def mirrored(weight):
    return weight[::-1, ::-1].swapaxes(-1, -2)


def scaled():
    layer = of_brainstate(
        brainstate.nn.ScaledWSConv2d,
        KERNEL,
        groups=2,
        padding="VALID",
        w_mask=MASK[:, :, :2],
        eps=14.0,
    )
    layer.weight.value = {**layer.weight.value, "gain": GAIN.reshape(1, 1, 1, 6)}
    return layer


# The framework, the layer, and what it computes.
LAYERS = {
    "circular": (
        "nnx",
        lambda: of_nnx_in_groups(padding="CIRCULAR", strides=(2, 1), kernel_dilation=(1, 2)),
        lambda x: truth.conv(
            padded(x, [(1, 1), (1, 1)], "wrap"),
            KERNEL,
            BIAS,
            (2, 1),
            dilation=(1, 2),
            groups=2,
        ),
    ),
    "reflect": (
        "linen",
        lambda: of_linen(nn.Conv(6, (3, 2), padding="REFLECT", mask=MASK), WHOLE),
        lambda x: truth.conv(padded(x, [(1, 1), (0, 1)], "reflect"), WHOLE * MASK, BIAS),
    ),
    "mixed pads": (
        "nnx",
        lambda: of_nnx_in_groups(padding=[(1, 2), 3]),
        lambda x: truth.conv(x, KERNEL, BIAS, pads=((1, 2), (3, 3)), groups=2),
    ),
    "same, the lower first": (
        "equinox",
        lambda: of_equinox(eqx.nn.Conv2d, KERNEL, padding="SAME_LOWER", stride=2),
        lambda x: truth.conv(x, KERNEL, BIAS, (2, 2), ((1, 1), (1, 0)), groups=2),
    ),
    "replicate": (
        "equinox",
        lambda: of_equinox(
            eqx.nn.Conv2d, KERNEL, padding="SAME", stride=2, padding_mode="REPLICATE"
        ),
        lambda x: truth.conv(
            padded(x, [(1, 1), (0, 1)], "edge"), KERNEL, BIAS, (2, 2), groups=2
        ),
    ),
    "circular by hand": (
        "equinox",
        lambda: of_equinox(
            eqx.nn.Conv2d, WHOLE, padding=((2, 1), (0, 3)), padding_mode="CIRCULAR"
        ),
        lambda x: truth.conv(padded(x, [(2, 1), (0, 3)], "wrap"), WHOLE, BIAS),
    ),
    "transposed, same": (
        "nnx",
        lambda: of_nnx(
            WHOLE, nnx.ConvTranspose, strides=(2, 1), kernel_dilation=(1, 2), mask=MASK
        ),
        lambda x: transposed(x, WHOLE * MASK, (2, 1), ((2, 1), (1, 1)), (1, 2)),
    ),
    "transposed, valid, mirrored": (
        "linen",
        lambda: of_linen(
            nn.ConvTranspose(
                6,
                (3, 2),
                (2, 3),
                "VALID",
                transpose_kernel=True,
                mask=mirrored(MASK),
            ),
            mirrored(WHOLE),
        ),
        lambda x: transposed(x, WHOLE * MASK, (2, 3), ((2, 2), (1, 2))),
    ),
    "transposed, periodic": (
        "nnx",
        lambda: of_nnx(WIDE, nnx.ConvTranspose, strides=(2, 1), padding="CIRCULAR"),
        lambda x: periodic(x, WIDE, (2, 1), (2, 1)),
    ),
    "transposed, periodic, mirrored": (
        "linen",
        lambda: of_linen(
            nn.ConvTranspose(6, (4, 2), (2, 1), "CIRCULAR", transpose_kernel=True),
            mirrored(WIDE),
        ),
        lambda x: periodic(x, WIDE, (2, 1), (2, 0)),
    ),
    "transposed, periodic, the lower first": (
        "equinox",
        lambda: of_equinox(
            eqx.nn.ConvTranspose2d,
            WIDE,
            stride=(2, 1),
            padding="SAME_LOWER",
            padding_mode="CIRCULAR",
        ),
        lambda x: periodic(x, WIDE, (2, 1), (2, 0)),
    ),
    "transposed, with more of the output": (
        "equinox",
        lambda: of_equinox(
            eqx.nn.ConvTranspose2d,
            KERNEL,
            stride=(2, 3),
            padding=((1, 0), (0, 1)),
            output_padding=(1, 2),
        ),
        lambda x: transposed(x, KERNEL, (2, 3), ((1, 3), (1, 2)), groups=2),
    ),
    "transposed, in groups": (
        "brainstate",
        lambda: of_brainstate(
            brainstate.nn.ConvTranspose2d,
            mirrored(KERNEL),
            stride=2,
            groups=2,
            w_mask=mirrored(MASK[:, :, :2]),
        ),
        lambda x: transposed(x, KERNEL * MASK[:, :, :2], (2, 2), ((2, 1), (1, 1)), groups=2),
    ),
    "standardised": (
        "brainstate",
        scaled,
        lambda x: truth.conv(
            x, standardized(KERNEL, GAIN, 14.0) * MASK[:, :, :2], BIAS, groups=2
        ),
    ),
    "local": (
        "linen",
        lambda: of_linen(
            nn.ConvLocal(6, (3, 2), (2, 1), padding="CIRCULAR"), PLACES, PLACES_BIAS
        ),
        lambda x: local(padded(x, [(1, 1), (0, 1)], "wrap"), PLACES, PLACES_BIAS, (2, 1)),
    ),
}


def close(a, b, tolerance=2e-5):
    """Sums of up to 24 products of a magnitude of 1, in other orders."""
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def call(fw, model, x=X, by="call"):
    """The output for images, with the channels last."""
    return fw.to_channels_last(getattr(fw, by)(model, fw.from_channels_last(x)))


def sample(fw, x=X):
    return fw.from_channels_last(x).shape[1:]


def kind(model):
    return type(model[0] if isinstance(model, tuple) else model)


@pytest.mark.parametrize("goal", NAMES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_convolution_computes_its_formula_and_its_gradient_everywhere(name, goal):
    origin, make, expected = LAYERS[name]
    source, target, model = Framework(origin), Framework(goal), make()
    wanted = expected(np.float64(X))
    close(call(source, model), wanted)
    if goal == origin:
        return
    converted = target.convert_from(source, model, sample_input=sample(source))
    close(call(target, converted, by="jit"), wanted)
    back = source.convert_from(target, converted, sample_input=sample(target))
    assert kind(back) is kind(model)
    close(call(source, back), wanted)
    stepped = [
        call(fw, fw.step(m, fw.from_channels_last(0.05 * X)))
        for fw, m in ((source, model), (target, converted))
    ]
    close(*stepped, 1e-4)
    assert np.abs(stepped[0] - wanted).max() > 1e-2


NATIVE = {
    "circular": ("equinox", "linen"),
    "circular by hand": (),
    "same, the lower first": ("brainstate", "linen", "nnx"),
    "transposed, same": ("brainstate", "linen"),
    "transposed, periodic": ("equinox", "linen"),
    "transposed, periodic, the lower first": ("linen", "nnx"),
    "transposed, in groups": (),
    "transposed, with more of the output": ("brainstate",),
}


@pytest.mark.parametrize("name", NATIVE)
def test_native_layers_are_preferred_where_they_are_exact(name):
    origin, make, _ = LAYERS[name]
    source, model, found = Framework(origin), make(), []
    for target in map(Framework, set(NAMES) - {origin}):
        converted = target.convert_from(source, model, sample_input=sample(source))
        if "composites" not in kind(converted).__module__:
            found.append(target.name)
    assert sorted(found) == sorted(NATIVE[name])


# -- channels --


@pytest.mark.parametrize("cls", ["Conv2d", "ConvTranspose2d"])
@pytest.mark.parametrize("goal", ["equinox", "linen", "nnx"])
def test_channels_that_stand_first_stay_first(cls, goal):
    """In every framework the converted layer takes the images as they are."""
    source, target, x = Framework("brainstate"), Framework(goal), jnp.moveaxis(X, -1, 1)
    kernel = mirrored(KERNEL) if "Transpose" in cls else KERNEL
    model = of_brainstate(
        getattr(brainstate.nn, cls),
        kernel,
        (4, 5, 7),
        groups=2,
        channel_first=True,
        b_init=BIAS.reshape(1, 6, 1, 1),
    )
    converted = target.convert_from(source, model)
    close(target.call(converted, x), model(x))
    if "Transpose" not in cls:
        wanted = truth.conv(X, KERNEL, BIAS, pads=((1, 1), (0, 1)), groups=2)
        close(model(x), np.moveaxis(wanted, -1, 1))
    back = source.convert_from(target, converted, sample_input=(4, 5, 7))
    if goal == "equinox":  # whose layers all take them first
        close(source.call(back, X), jnp.moveaxis(model(x), 1, -1))
    else:
        assert back.channel_first
        close(source.call(back, x), model(x))


def test_a_layer_that_tells_channels_apart_is_refused_beside_one_that_fixes_the_order():
    conv = of_brainstate(
        brainstate.nn.Conv2d,
        KERNEL,
        (4, 5, 7),
        groups=2,
        channel_first=True,
        b_init=BIAS.reshape(1, 6, 1, 1),
    )
    model = brainstate.nn.Sequential(conv, brainstate.nn.GroupNorm((7,), num_groups=1))
    with pytest.raises(interop.UnsupportedLayerError, match="fixes the order") as e:
        interop.to_equinox(model)
    assert e.value.path == "model[1]"


@pytest.mark.parametrize("name", ["transposed, periodic", "circular", "local", "standardised"])
def test_flattened_features_are_permuted_for_the_linear_layer_after_them(name, target):
    """``Conv -> Flatten -> Linear``: Equinox flattens channels first, the others last."""
    origin, make, expected = LAYERS[name]
    source = Framework(origin)
    if source.name == target.name:
        pytest.skip("nothing to convert")
    features = expected(np.float64(X)).reshape(len(X), -1)
    weight, bias = array(features.shape[1], 3) / 9, array(3)
    layers = make(), source.flatten(), source.linear(weight, bias)
    if origin == "linen":
        (conv, variables), flatten, (linear, rest) = layers
        model = nn.Sequential([conv, flatten, linear])
        model = model, {"params": {"layers_0": variables["params"], "layers_2": rest["params"]}}
    else:
        model = source.sequential(*layers)
    converted = target.convert_from(source, model, sample_input=sample(source))
    wanted = np.maximum(features, -np.inf) @ np.float64(weight) + bias
    close(target.call(converted, target.from_channels_last(X)), wanted, 1e-4)
    back = source.convert_from(target, converted, sample_input=sample(target))
    close(source.call(back, X), wanted, 1e-4)


# -- batches, ranks and dtypes --


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("goal", ["brainstate", "linen"])
def test_a_composite_takes_any_number_of_batch_axes(goal, batch):
    target, model = Framework(goal), LAYERS["circular"][1]()
    converted = target.convert_from(Framework("nnx"), model, sample_input=(5, 7, 4))
    x = array(*batch, 5, 7, 4)
    close(target.call(converted, x), model(x))


@pytest.mark.parametrize("goal", ["brainstate", "linen", "nnx"])
def test_more_than_three_axes_of_space(goal):
    source, target = Framework("equinox"), Framework(goal)
    layer = eqx.nn.Conv(4, 2, 3, (2, 1, 2, 1), padding=1, key=jax.random.key(0))
    x = array(2, 3, 2, 2, 3, 2)  # channels last
    converted = target.convert_from(source, layer, sample_input=(2, 3, 2, 2, 3))
    close(target.call(converted, x), call(source, layer, x))
    assert kind(source.convert_from(target, converted, sample_input=x.shape[1:])) is eqx.nn.Conv


HALF = [jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize("cls", [nnx.Conv, nnx.ConvTranspose])
@pytest.mark.parametrize("inputs", [jnp.float32, *HALF])
@pytest.mark.parametrize("preferred", [None, jnp.float32])
def test_compute_dtypes_of_flax_are_kept(cls, inputs, preferred, target):
    """Whatever the input's dtype, as the operands are cast."""
    if target.name == "nnx":
        pytest.skip("nothing to convert")
    model = of_nnx(WHOLE, cls, dtype=jnp.bfloat16, preferred_element_type=preferred)
    converted = target.convert_from(Framework("nnx"), model, sample_input=(5, 7, 4))
    x = X.astype(inputs)
    found, wanted = call(target, converted, x), model(x)
    assert found.dtype == wanted.dtype
    close(np.float64(found), np.float64(wanted))


@pytest.mark.parametrize("dtype", [jnp.float32, *HALF])
def test_weights_in_half_precision_stay_so(dtype, source, target):
    weight, bias = WHOLE.astype(dtype), BIAS.astype(dtype)
    model = source.conv(weight, bias, (5, 7, 4))
    converted = target.convert_from(source, model, sample_input=sample(source))
    x = X.astype(dtype)
    found, wanted = call(target, converted, x), call(source, model, x)
    assert found.dtype == wanted.dtype == dtype
    np.testing.assert_array_equal(found, wanted)


# -- refusals and weights --


@pytest.mark.parametrize("padding", ["CAUSAL", "REFLECT"])
def test_a_padding_that_flax_fails_on_is_refused(padding):
    layer = nnx.ConvTranspose(4, 6, (3,), padding=padding, rngs=nnx.Rngs(0))
    with pytest.raises(RuntimeError, match="padding type"):
        layer(X[0])
    with pytest.raises(interop.UnsupportedLayerError, match="fails") as e:
        interop.convert(layer, to="linen")
    assert e.value.option == "padding"


def test_a_causal_padding_over_several_axes_is_refused():
    layer = nnx.Conv(4, 6, (3, 2), padding="CAUSAL", rngs=nnx.Rngs(0))
    with pytest.raises(interop.UnsupportedLayerError, match="one axis"):
        interop.convert(layer, to="linen")


@pytest.mark.parametrize("name", ["transposed, same", "transposed, periodic, mirrored"])
def test_flipped_kernels_map_to_flipped_kernels(name, target):
    """What holds of weights holds of all that is shaped like them, such as Adam's moments."""
    origin, make, _ = LAYERS[name]
    source, model = Framework(origin), make()
    if source.name == target.name:
        pytest.skip("nothing to convert")
    found = interop.mapping(model, to=target.name, sample_input=(5, 7, 4))
    converted = target.convert_from(source, model, sample_input=(5, 7, 4))
    params = model[1]["params"] if origin == "linen" else nnx.state(model, nnx.Param)
    moved = jax.tree.leaves(found.apply(params))
    wanted = {
        "brainstate": lambda m: [s.value for s in m.states().values()],
        "equinox": lambda m: eqx.filter(m, eqx.is_inexact_array),
        "linen": lambda m: m[1]["params"],
        "nnx": lambda m: nnx.state(m, nnx.Param),
    }[target.name](converted)
    for a, b in zip(moved, jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_periodic_input_is_dilated_after_it_is_padded():
    """Flax's own layers and ``jax.lax`` fail on such a combination."""
    options = {"padding": ((1, 1), (0, 1)), "padding_mode": "CIRCULAR"}
    layer = composites.Conv(4, 6, (3, 2), input_dilation=(2, 3), **options, rngs=nnx.Rngs(0))
    x = dilated(padded(X, options["padding"], "wrap"), (2, 3))
    close(layer(X), truth.conv(x, layer.weight.get_value()))


def test_a_composite_is_made_by_its_sizes():
    layer = composites.ConvTranspose(
        4, 6, (3, 2), padding="SAME", strides=(2, 1), rngs=nnx.Rngs(0)
    )
    assert layer(X).shape == (2, 10, 7, 6)
    assert layer.weight.shape == (3, 2, 4, 6)
    scaled = composites.ScaledWSConv(4, 6, (3, 2), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(scaled.gain.get_value(), jnp.ones(6))
