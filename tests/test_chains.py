"""A user's own module that only applies its layers one after the other is a stack of them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import interop
from interop.frameworks.linen.variables import check_variables
from interop.registry import registry

from . import truth
from .cases import (
    BIAS,
    BIAS_2,
    EPSILON,
    MEAN,
    MOMENTUM,
    SCALE,
    SHIFT,
    VAR,
    WEIGHT,
    WEIGHT_2,
    X,
    array,
)
from .conftest import Framework

SQUARE, SQUARE_2 = array(4, 4, seed=41), array(4, 4, seed=42)
hidden_state = [0]


class LinenNet(nn.Module):
    """Layers in attributes, a list and a dict; functions, options and a mode."""

    activation: object = jnp.tanh
    second: bool = True

    def setup(self):
        self.norm = nn.BatchNorm(momentum=MOMENTUM, epsilon=EPSILON)
        self.inp = nn.Dense(4)
        self.blocks = [nn.Dense(4, use_bias=False) for _ in range(2)]
        self.heads = {"a": nn.Dense(3), "b": nn.Dense(2)}
        self.drop = nn.Dropout(0.3)

    def __call__(self, x, *, train=False):
        x = self.inp(self.norm(x, use_running_average=not train))
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == 1 and self.second:
                x = nn.leaky_relu(x, 0.2)
        x = self.drop(self.activation(x), deterministic=not train)
        return self.heads["b"](x)


def linen_net():
    params = {
        "norm": {"scale": SCALE, "bias": SHIFT},
        "inp": {"kernel": WEIGHT, "bias": BIAS},
        "blocks_0": {"kernel": SQUARE},
        "blocks_1": {"kernel": SQUARE_2},
        "heads_b": {"kernel": WEIGHT_2, "bias": BIAS_2},
    }
    return LinenNet(), {
        "params": params,
        "batch_stats": {"norm": {"mean": MEAN, "var": VAR}},
    }


class NnxNet(nnx.Module):
    """The same in NNX."""

    def __init__(self):
        fw = Framework("nnx")
        self.norm = fw.batch_norm(SCALE, SHIFT, MEAN, VAR, EPSILON, MOMENTUM)
        self.body = nnx.Dict(
            inp=fw.linear(WEIGHT, BIAS),
            blocks=nnx.List([fw.linear(SQUARE), fw.linear(SQUARE_2)]),
        )
        self.slope = 0.2
        self.drop = nnx.Dropout(0.3, rngs=nnx.Rngs(0))
        self.head = nnx.Sequential(jnp.tanh, self.drop, fw.linear(WEIGHT_2, BIAS_2))

    def __call__(self, x):
        x = self.body.inp(self.norm(x))
        for block in self.body["blocks"]:
            x = block(x)
        return self.head(jax.nn.leaky_relu(x, negative_slope=self.slope))


def wanted(x, mean=MEAN, var=VAR):
    x = truth.linear(truth.batch_norm(x, SCALE, SHIFT, mean, var, EPSILON), WEIGHT, BIAS)
    x = truth.linear(truth.linear(x, SQUARE), SQUARE_2)
    return truth.linear(np.tanh(np.where(x > 0, x, 0.2 * x)), WEIGHT_2, BIAS_2)


SOURCES = {"linen": linen_net, "nnx": NnxNet}


@pytest.mark.parametrize("name", SOURCES)
def test_it_converts_to_a_stack_in_evaluation_and_in_training(name, target):
    if target.name == name:
        return
    model = SOURCES[name]()
    converted = target.convert_from(Framework(name), model, sample_input=(3,))
    np.testing.assert_allclose(target.call(converted, X), wanted(X), rtol=1e-5, atol=1e-5)
    _, trained = target.run(converted, X, train=True, key=jax.random.key(0))
    moved = truth.updated_statistics(X, MEAN, VAR, MOMENTUM)
    np.testing.assert_allclose(target.call(trained, X), wanted(X, *moved), rtol=1e-4, atol=1e-4)


def test_its_layers_have_paths_of_their_own():
    module, variables = linen_net()
    report = interop.explain(module, params=variables, to="nnx")
    paths = [row.path for row in report.rows]
    assert paths[:3] == ["model.norm", "model.inp", "model.blocks[0]"]
    assert paths[-1] == "model.heads['b']"
    paths = [row.path for row in interop.explain(NnxNet(), to="linen").rows]
    assert paths[1:4] == ["model.body['inp']", "model.body['blocks'][0]"] + [
        "model.body['blocks'][1]"
    ]
    module, variables = linen_net()
    del variables["params"]["blocks_1"]
    variables["params"]["other"] = {"kernel": SQUARE}
    with pytest.raises(interop.ConversionError) as e:
        interop.from_linen(module, variables)
    assert e.value.missing == ("params/blocks_1/kernel",)
    assert e.value.unexpected == ("params/other/kernel",)


def test_a_layer_used_twice_stays_one_layer():
    class Twice(nn.Module):
        def setup(self):
            self.layer = nn.Dense(3)

        def __call__(self, x):
            return self.layer(nn.tanh(self.layer(x)))

    params = {"layer": {"kernel": SQUARE[:3, :3], "bias": BIAS[:3]}}
    converted = interop.convert(Twice(), params={"params": params}, to="nnx")
    assert converted.layers[0] is converted.layers[2]
    inner = truth.linear(X, SQUARE[:3, :3], BIAS[:3])
    expected = truth.linear(np.tanh(inner), SQUARE[:3, :3], BIAS[:3])
    np.testing.assert_allclose(converted(X), expected, rtol=1e-5, atol=1e-5)


def test_its_own_modules_convert_within_each_other():
    class Outer(nn.Module):
        def setup(self):
            self.stack = nn.Sequential([nn.Dense(3), LinenNet()])

        def __call__(self, x):
            return nn.softmax(self.stack(x), axis=-1)

    net = linen_net()[1]
    first = {"kernel": SQUARE[:3, :3], "bias": BIAS[:3]}
    variables = {
        "params": {"stack": {"layers_0": first, "layers_1": net["params"]}},
        "batch_stats": {"stack": {"layers_1": net["batch_stats"]}},
    }
    converted = interop.convert(Outer(), params=variables, to="nnx")
    expected = wanted(truth.linear(X, SQUARE[:3, :3], BIAS[:3]))
    expected = np.exp(expected) / np.exp(expected).sum(-1, keepdims=True)
    np.testing.assert_allclose(converted(X), expected, rtol=1e-5, atol=1e-5)


class NnxConvNet(nnx.Module):
    """As in Flax's own introduction to NNX, but that C, H and W differ."""

    def __init__(self):
        rngs = nnx.Rngs(3)
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.pool = functools.partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.linear = nnx.Linear(48, 5, rngs=rngs)

    def __call__(self, x, rngs=None):
        x = self.pool(nnx.relu(self.drop(self.conv(x), rngs=rngs)))
        x = x.reshape(x.shape[0], -1)
        return self.linear(x)


class LinenConvNet(nn.Module):
    def setup(self):
        self.conv, self.linear = nn.Conv(4, (3, 3)), nn.Dense(5)

    def __call__(self, x):
        x = nn.avg_pool(nn.relu(self.conv(x)), window_shape=(2, 2), strides=(2, 2))
        return self.linear(jnp.reshape(x, (x.shape[0], -1)))


class NnxMeans(nnx.Module):
    """The mean over space, by the array's own method."""

    def __init__(self):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(3))
        self.linear = nnx.Linear(4, 5, rngs=nnx.Rngs(4))

    def __call__(self, x):
        return self.linear(nnx.relu(self.conv(x)).mean(axis=(1, 2)))


def _conv_nets():
    net = NnxConvNet()
    kernels = {
        name: {"kernel": part.kernel[...], "bias": part.bias[...]}
        for name, part in (("conv", net.conv), ("linear", net.linear))
    }
    return net, (LinenConvNet(), {"params": kernels})


IMAGES = array(2, 6, 8, 3, seed=45)


@pytest.mark.parametrize("to", ["brainstate", "equinox", "linen"])
def test_an_image_becomes_rows_as_convolutional_networks_write_it(to):
    net, linen = _conv_nets()
    net.eval()
    target, expected = Framework(to), net(IMAGES)
    converted = target.convert_from(Framework("nnx"), net, sample_input=(6, 8, 3))
    moved = target.from_channels_last(IMAGES)
    np.testing.assert_allclose(target.call(converted, moved), expected, rtol=1e-5, atol=1e-5)
    if to != "linen":
        again = target.convert_from(Framework("linen"), linen, sample_input=(6, 8, 3))
        np.testing.assert_allclose(target.call(again, moved), expected, rtol=1e-5, atol=1e-5)
    back = Framework("nnx").convert_from(target, converted, sample_input=moved.shape[1:])
    np.testing.assert_allclose(back(IMAGES), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("to", ["brainstate", "equinox", "linen"])
def test_methods_of_arrays_are_functions(to):
    net, target = NnxMeans(), Framework(to)
    converted = target.convert_from(Framework("nnx"), net, sample_input=(6, 8, 3))
    y = target.call(converted, target.from_channels_last(IMAGES))
    np.testing.assert_allclose(y, net(IMAGES), rtol=1e-5, atol=1e-5)


def test_many_parts_of_one_class_are_each_in_one_stack():
    """They are unbound one by one, so that a later one may get the id of an earlier one."""

    class Deep(nn.Module):
        def setup(self):
            self.parts = [Normed() for _ in range(12)]

        def __call__(self, x):
            for part in self.parts:
                x = part(x)
            return x

    deep = Deep()
    variables = deep.init(jax.random.key(0), X)
    adapter = registry.adapter("linen")
    for _ in range(40):
        check_variables(adapter, deep, variables)


class Decoder(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(3, 24, rngs=nnx.Rngs(3))
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=nnx.Rngs(4))
        self.height = 3

    def __call__(self, x):
        x = self.linear(x)
        return self.conv(x.reshape(x.shape[0], self.height, 4, 2))


class FixedDecoder(Decoder):
    def __call__(self, x):
        return self.conv(jnp.reshape(self.linear(x), (-1, self.height, 4, 2)))


@pytest.mark.parametrize("net", [Decoder, FixedDecoder])
@pytest.mark.parametrize("to", ["brainstate", "equinox", "linen"])
def test_rows_become_images(net, to):
    model, target = net(), Framework(to)
    converted = target.convert_from(Framework("nnx"), model, sample_input=(3,))
    y = target.to_channels_last(target.call(converted, X))
    np.testing.assert_allclose(y, model(X), rtol=1e-5, atol=1e-5)


def _twice(x, train=False):
    return 2 * x if train else x


def _scaled(x, *scales, **options):
    return x * (scales[0] if scales else 1.0)


OTHER = {
    "a sum": lambda self, x: x + self.a(x),
    "an older value": lambda self, x: (self.a(x), self.b(x))[1],
    "an optional input": lambda self, x, y=None: self.a(x if y is None else y),
    "two inputs": lambda self, x, y: self.a(x),
    "an option that is no mode": lambda self, x, gain=1.0: self.a(x),
    "a shape": lambda self, x: self.a(x) if x.ndim == 2 else self.b(x),
    "a size": lambda self, x: self.a(x) if x.shape[0] == 4 else self.b(x),
    "another size": lambda self, x: self.a(x.reshape(x.shape[1], -1)),
    "the last size": lambda self, x: self.a(x.reshape(x.shape[-1], -1)),
    "rows of that size": lambda self, x: self.a(x.reshape(x.shape[0], x.shape[0])),
    "a size in a function": lambda self, x: jnp.broadcast_to(self.a(x), (x.shape[0], 3)),
    "an older value's rows": lambda self, x: (self.a(x), x.reshape(x.shape[0], -1))[1],
    "an older size": lambda self, x: self.a(x).mean(0, keepdims=True).reshape(x.shape[0], -1),
    "another order": lambda self, x: self.a(jnp.reshape(x, (x.shape[0], -1), order="F")),
    "another attribute": lambda self, x: self.a(x.T),
    "a class": lambda self, x: self.a(x) if isinstance(x, jax.Array) else self.b(x),
    "a comparison": lambda self, x: self.a(x) if x == 0 else self.b(x),
    "a truth value": lambda self, x: self.a(x if x else x),
    "a text": lambda self, x: self.a(x) if "<" in f"{x}" else self.b(x),
    "a mode of one's own": lambda self, x: self.a(x) if self.deterministic else self.b(x),
    "a mode": lambda self, x, train=False: self.a(x) if train else self.b(x),
    "a mode the other way": lambda self, x, train=False: self.drop(x, deterministic=train),
    "a fixed mode": lambda self, x: self.drop(x, deterministic=True),
    "a function's mode": lambda self, x, train=False: _twice(self.a(x), train=train),
    "another method": lambda self, x: self.a(self.helper(x)),
    "a property": lambda self, x: self.chosen(x),
    "an attribute of a layer": lambda self, x: self.a(x) if self.a.use_bias else x,
    "several outputs": lambda self, x: (self.a(x), 1),
    "nothing": lambda self, x: x,
    "the wrong end": lambda self, x: (self.a(x), x)[1],
    "a global": lambda self, x: self.a(x) if hidden_state.append(1) else self.b(x),
    "a global's length": lambda self, x: self.a(x) if len(hidden_state) > 3 else self.b(x),
    "an array": lambda self, x: jnp.add(self.a(x), SCALE),
    "an option without a name": lambda self, x: jnp.power(self.a(x), 2),
    "one of any number": lambda self, x: _scaled(self.a(x), 3.0),
    "a new layer": lambda self, x: nn.Dense(3)(self.a(x)),
    "a generator": lambda self, x: (yield self.a(x)),
}


def _handled(self, x):
    try:
        return self.a(x[0])
    except TypeError:
        return self.b(x)


def _assigned(self, x):
    self.count = 1
    return self.a(x)


def _last_without(self, x):
    for layer in (self.a, self.b):
        x = layer(x)
        if layer is not self.b:
            x = jnp.tanh(x)
    return x


def _global(self, x):
    global counted
    counted += 1
    return self.a(x) if counted > 1 else self.b(x)


counted = 0


def _of_base(self, x):
    return super(type(self), self).__call__(self.a(x))


OTHER |= {"an identity": _last_without, "a global that is set": _global}
OTHER |= {"a handler": _handled, "an assignment": _assigned, "a base class": _of_base}
OTHER["a compiled call"] = jax.jit(lambda self, x: self.a(x))


def _with_call(call):
    class Linen(nn.Module):
        deterministic: bool = True

        def setup(self):
            self.a, self.b, self.drop = nn.Dense(3), nn.Dense(3), nn.Dropout(0.3)

        def helper(self, x):
            return 2 * x

        @property
        def chosen(self):
            return self.a

        __call__ = call

    class Nnx(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.a, self.b = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)
            self.drop = nnx.Dropout(0.3, rngs=rngs)
            self.deterministic = True

        def helper(self, x):
            return 2 * x

        @property
        def chosen(self):
            return self.a

        __call__ = call

    return Linen(), Nnx()


@pytest.mark.parametrize("name", [name for name in OTHER if name != "a global's length"])
def test_a_module_that_does_anything_else_is_refused(name):
    before = list(hidden_state)
    linen, other = _with_call(OTHER[name])
    params = {k: {"kernel": SQUARE[:3, :3], "bias": BIAS[:3]} for k in ("a", "b")}
    for model, keywords in (linen, {"params": {"params": params}}), (other, {}):
        with pytest.raises(interop.UnsupportedStructureError, match="forward logic"):
            interop.convert(model, to="brainstate", **keywords)
    assert hidden_state == before


def test_a_mode_that_only_the_layers_get_converts():
    """The same module as of the refusals above, which have no other cause."""
    call = lambda self, x, train=False: self.b(self.drop(self.a(x), deterministic=not train))  # noqa: E731
    linen, other = _with_call(call)
    params = {k: {"kernel": SQUARE[:3, :3], "bias": BIAS[:3]} for k in ("a", "b")}
    expected = truth.linear(truth.linear(X, SQUARE[:3, :3], BIAS[:3]), SQUARE[:3, :3], BIAS[:3])
    converted = interop.convert(linen, params={"params": params}, to="equinox")
    np.testing.assert_allclose(jax.vmap(converted)(X), expected, rtol=1e-5, atol=1e-5)
    converted = interop.convert(other, to="equinox")
    np.testing.assert_allclose(jax.vmap(converted)(X), other(X), rtol=1e-5, atol=1e-5)


def _halves(x):
    return x[..., :2], x[..., 2:]


def _gated(halves, scale=1.0):
    return halves[0] * jnp.tanh(halves[1]) * scale


class Gating(nnx.Module):
    def __init__(self):
        self.a = Framework("nnx").linear(WEIGHT, BIAS)

    def __call__(self, x):
        return _gated(_halves(jnp.sin(self.a(x))))


def test_functions_of_a_chain_get_a_tuple_whole(target):
    """In NNX's own Sequential it would be spread over their arguments."""
    if target.name == "nnx":
        pytest.skip("nothing to convert")
    converted = target.convert_from(Framework("nnx"), Gating())
    first, second = _halves(np.sin(truth.linear(X, WEIGHT, BIAS)))
    wanted = first * np.tanh(second)
    np.testing.assert_allclose(target.call(converted, X), wanted, rtol=1e-5, atol=1e-5)
    back = Framework("nnx").convert_from(target, converted)
    np.testing.assert_allclose(back(X), wanted, rtol=1e-5, atol=1e-5)


def test_a_tuple_from_one_chain_into_another_is_refused():
    class Inner(nnx.Module):
        def __call__(self, halves):
            return jnp.cos(_gated(halves))

    class Outer(nnx.Module):
        def __init__(self):
            self.a, self.inner = Framework("nnx").linear(WEIGHT, BIAS), Inner()

        def __call__(self, x):
            return self.inner(_halves(self.a(x)))

    with pytest.raises(interop.UnsupportedStructureError, match="to a function of another"):
        interop.to_linen(Outer())


def test_weights_that_the_call_does_not_use_are_not_lost():
    class Unused(nnx.Module):
        def __init__(self):
            self.a, self.spare = Framework("nnx").linear(WEIGHT), nnx.Param(SCALE)

        def __call__(self, x):
            return self.a(x)

    with pytest.raises(interop.UnsupportedStructureError, match="does not use all"):
        interop.from_nnx(Unused())


def test_a_decorated_call_and_a_compact_one_are_refused():
    def doubled(call):
        @functools.wraps(call)
        def wrapper(self, x):
            return 2 * call(self, x)

        return wrapper

    class Compact(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x)

    linen, other = _with_call(doubled(lambda self, x: self.a(x)))
    params = {"a": {"kernel": SQUARE[:3, :3], "bias": BIAS[:3]}}
    compact = {"Dense_0": params["a"]}
    for model, keywords in (
        (linen, {"params": {"params": params}}),
        (Compact(), {"params": {"params": compact}}),
        (other, {}),
    ):
        with pytest.raises(interop.UnsupportedStructureError, match="forward logic"):
            interop.convert(model, to="brainstate", **keywords)


class Normed(nn.Module):
    """A part that takes a mode, and evaluates where it gets none."""

    def setup(self):
        self.norm = nn.BatchNorm()

    def __call__(self, x, train=False):
        return self.norm(x, use_running_average=not train)


class NnxNormed(nnx.Module):
    def __init__(self):
        self.norm = Framework("nnx").batch_norm(SCALE, SHIFT, MEAN, VAR, EPSILON, MOMENTUM)

    def __call__(self, x, train=False):
        return self.norm(x, use_running_average=not train)


FROZEN = nn.BatchNorm(use_running_average=True)


def _fixed(norm, drop, call):
    class Linen(nn.Module):
        def setup(self):
            self.norm, self.drop = norm.clone(), drop.clone()

        __call__ = call

    return Linen(), {"params": Linen().init(jax.random.key(0), X)}


def _both(self, x, train=False):
    return self.drop(self.norm(x), deterministic=not train)


FIXED = {
    "a frozen normalisation": lambda: _fixed(FROZEN, nn.Dropout(0.3), _both),
    "a normalisation that always trains": lambda: _fixed(
        nn.BatchNorm(use_running_average=False), nn.Dropout(0.3), _both
    ),
    "a dropout that is off": lambda: _fixed(
        nn.BatchNorm(),
        nn.Dropout(0.3, deterministic=True),
        lambda self, x, train=False: self.drop(self.norm(x, use_running_average=not train)),
    ),
    "a stack that gets no mode": lambda: _fixed(
        nn.Sequential([FROZEN]), nn.Dropout(0.3), _both
    ),
    "a part that gets no mode": lambda: _fixed(Normed(), nn.Dropout(0.3), _both),
    "two layers of a stack": lambda: (
        nn.Sequential([FROZEN, nn.Dropout(0.3, deterministic=False)]),
        {"params": nn.Sequential([FROZEN]).init(jax.random.key(0), X)},
    ),
    "a part of NNX that gets no mode": lambda: (
        nnx.Sequential(NnxNormed(), nnx.Dropout(0.3)),
        {},
    ),
}


@pytest.mark.parametrize("name", FIXED)
def test_a_layer_that_keeps_one_mode_beside_others_that_change_it_is_refused(name):
    model, keywords = FIXED[name]()
    with pytest.raises(interop.UnsupportedStructureError, match="one switch for all") as e:
        interop.convert(model, to="equinox", sample_input=(3,), **keywords)
    assert e.value.path in ("model.drop", "model[1]")
    assert "norm" in str(e.value) or "model[0]" in str(e.value)


def test_a_part_that_leaves_the_mode_to_its_layers_converts_beside_others():
    class Dropped(nnx.Module):
        def __init__(self):
            self.drop = nnx.Dropout(0.3, rngs=nnx.Rngs(0))

        def __call__(self, x, deterministic=None):
            return self.drop(x, deterministic=deterministic)

    model = nnx.Sequential(Dropped(), nnx.Dropout(0.3, rngs=nnx.Rngs(1)))
    converted = interop.to_equinox(model)
    np.testing.assert_array_equal(jax.vmap(converted)(X), X)


def test_a_part_that_is_called_with_and_without_a_mode_is_refused():
    call = lambda self, x, train=False: self.norm(self.norm(x, train=train))  # noqa: E731
    model, keywords = _fixed(Normed(), nn.Dropout(0.3), call)
    with pytest.raises(interop.UnsupportedStructureError, match="with and without a mode"):
        interop.convert(model, to="nnx", **keywords)


def test_layers_that_all_keep_one_mode_follow_the_switch_of_the_target():
    call = lambda self, x: self.drop(self.norm(x))  # noqa: E731
    model, keywords = _fixed(FROZEN, nn.Dropout(0.3, deterministic=True), call)
    converted = interop.convert(model, to="nnx", **keywords)
    np.testing.assert_allclose(converted(X), X / np.sqrt(1 + 1e-5), rtol=1e-5, atol=1e-5)


IS_TRAINING = True


FLAGS = {
    "is_train": lambda self, x: jnp.tanh(self.a(x)) if self.is_train else self.a(x),
    "in_eval_mode": lambda self, x: self.a(x) if self.in_eval_mode else jnp.tanh(self.a(x)),
    "mode": lambda self, x: jnp.tanh(self.a(x)) if self.mode else self.a(x),
    "stage": lambda self, x: jnp.tanh(self.a(x)) if self.stage == "train" else self.a(x),
    "global": lambda self, x: jnp.tanh(self.a(x)) if IS_TRAINING else self.a(x),
    "use_tanh": lambda self, x: jnp.tanh(self.a(x)) if self.use_tanh else self.a(x),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_that_may_be_modes_are_no_constants(name):
    """They are changed after a conversion, which the converted model would not see."""

    class Flagged(nnx.Module):
        def __init__(self):
            self.a = Framework("nnx").linear(SQUARE[:3, :3], BIAS[:3])
            self.is_train = self.in_eval_mode = self.mode = self.use_tanh = True
            self.stage = "train"

        __call__ = FLAGS[name]

    if name == "use_tanh":  # a choice, as are the layers themselves
        expected = np.tanh(truth.linear(X, SQUARE[:3, :3], BIAS[:3]))
        converted = interop.convert(Flagged(), to="equinox")
        np.testing.assert_allclose(jax.vmap(converted)(X), expected, rtol=1e-5, atol=1e-5)
        return
    with pytest.raises(interop.UnsupportedStructureError, match="forward logic"):
        interop.convert(Flagged(), to="equinox")


def _added(self, x):
    return self.b(x + self.a(x))


def _wrapped(self, x):
    return (self.a(x),)


def _several(self, x, y):
    return self.a(x)


def _swapped(self, x, train=False):
    return self.b(self.a(x)) if train else self.a(self.b(x))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (_added, r"test_chains.py:\d+: return self.b\(x \+ self.a\(x\)\)"),
        (_wrapped, "does not return what its last layer"),
        (_several, "takes more than the data"),
        (_handled, "catches errors"),
        (_swapped, "the same in training and in evaluation"),
        (OTHER["a compiled call"], "no plain function|is decorated"),
    ],
)
def test_a_refusal_of_forward_logic_tells_what_it_does(call, says):
    linen, other = _with_call(call)
    params = {k: {"kernel": SQUARE[:3, :3], "bias": BIAS[:3]} for k in ("a", "b")}
    for model, keywords in (linen, {"params": {"params": params}}), (other, {}):
        with pytest.raises(interop.UnsupportedStructureError, match=says):
            interop.convert(model, to="brainstate", **keywords)
