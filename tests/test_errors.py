"""Bad input: every error says where, what was found, and what to do; nothing is changed."""

import functools

import brainstate
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

import interop
import shims

from .cases import BIAS, WEIGHT, array
from .conftest import Framework

RNGS = nnx.Rngs(0)
KEY = jax.random.key(0)
to_brainstate = functools.partial(interop.convert, to="brainstate")


def in_a_stack(layer):
    """``layer`` at ``model[1][0]``."""
    inner = brainstate.nn.Sequential(layer, brainstate.nn.ReLU())
    return brainstate.nn.Sequential(brainstate.nn.Linear(3, 4), inner)


class NewBrainState(brainstate.nn.Module):
    """A layer of a user's own, as the next three."""

    def update(self, x):
        return x


class NewLinen(nn.Module):
    def __call__(self, x):
        return x


class NewEquinox(eqx.Module):
    def __call__(self, x):
        return x


class NewNNX(nnx.Module):
    def __call__(self, x):
        return x


def variables(**params):
    return {"params": params}


ARRAYS = {"kernel": WEIGHT, "bias": BIAS}
MLP = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
LINEAR = brainstate.nn.Linear(3, 4)
STATEFUL = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "batch", mode="batch")

# name: (call, class of the error, builtin base, path, words in the message)
BAD_ARGUMENTS = {
    "a class": (
        lambda: to_brainstate(nnx.Linear),
        (interop.ArgumentError, TypeError, "model", ["Linear is a class", "Build it first"]),
    ),
    "a class to to_nnx": (
        lambda: interop.to_nnx(brainstate.nn.Linear),
        (interop.ArgumentError, TypeError, "model", ["Linear is a class"]),
    ),
    "a class to from_nnx": (
        lambda: interop.from_nnx(nnx.Linear),
        (interop.ArgumentError, TypeError, "model", ["Linear is a class"]),
    ),
    "an unknown framework": (
        lambda: interop.convert(LINEAR, to="torch"),
        (interop.ArgumentError, ValueError, None, ["'torch'", "'linen'", "'nnx'"]),
    ),
    "a framework's nickname": (
        lambda: interop.convert(LINEAR, to="eqx"),
        (interop.ArgumentError, ValueError, None, ["'eqx'", "Did you mean 'equinox'?"]),
    ),
    "a pair where a module is wanted": (
        lambda: interop.to_nnx((nn.Dense(4), variables(**ARRAYS))),
        (interop.ArgumentError, TypeError, "model", ["tuple", "module by itself", "params="]),
    ),
    "a pair of a module and its state": (
        lambda: interop.from_equinox(STATEFUL),
        (interop.ArgumentError, TypeError, "model", ["tuple", "module by itself", "state="]),
    ),
    "the layers in a list": (
        lambda: interop.to_nnx([LINEAR, brainstate.nn.ReLU()]),
        (interop.ArgumentError, TypeError, "model", ["list", "Sequential"]),
    ),
    "weights without their module": (
        lambda: to_brainstate(nnx.state(nnx.Linear(3, 4, rngs=RNGS))),
        (interop.ArgumentError, TypeError, "model", ["State", "module that has them"]),
    ),
    "params before the module": (
        lambda: interop.from_linen(variables(**ARRAYS), nn.Dense(4)),
        (interop.ArgumentError, TypeError, "model", ["dict", "module that has them"]),
    ),
    "a module of variables to to_nnx, which takes none": (
        lambda: interop.to_nnx(nn.Dense(4)),
        (
            interop.ArgumentError,
            TypeError,
            "model",
            ["keep their weights outside", "model.init(...)", "interop.convert"],
        ),
    ),
    "no inputs to export": (
        lambda: interop.export(LINEAR),
        (interop.ArgumentError, TypeError, None, ["inputs are missing", "a batch for each"]),
    ),
    "an unknown framework to supported_layers": (
        lambda: interop.supported_layers("torch"),
        (interop.ArgumentError, ValueError, None, ["'torch'"]),
    ),
    "no model": (
        lambda: to_brainstate(3.0),
        (interop.ArgumentError, TypeError, "model", ["builtins.float", "nnx"]),
    ),
    "another framework's model": (
        lambda: interop.from_nnx(LINEAR),
        (
            interop.ArgumentError,
            TypeError,
            "model",
            ["expected a module of nnx, got one of brainstate", "interop.convert"],
        ),
    ),
    "params for a model that holds its weights": (
        lambda: interop.convert(LINEAR, to="nnx", params={}),
        (interop.ArgumentError, TypeError, None, ["params=", "Leave"]),
    ),
    "state for a model that has none": (
        lambda: to_brainstate(nnx.Linear(3, 4, rngs=RNGS), state=1),
        (interop.ArgumentError, TypeError, None, ["state="]),
    ),
    "params for equinox": (
        lambda: to_brainstate(eqx.nn.Linear(3, 4, key=KEY), params={}),
        (interop.ArgumentError, TypeError, None, ["params="]),
    ),
    "state for linen": (
        lambda: to_brainstate(nn.Dense(4), params={}, state=1),
        (interop.ArgumentError, TypeError, None, ["state="]),
    ),
    "a state of another type": (
        lambda: interop.from_equinox(eqx.nn.Linear(3, 4, key=KEY), state={}),
        (interop.ArgumentError, TypeError, None, ["eqx.nn.State", "dict"]),
    ),
    "no state for a stateful model": (
        lambda: interop.from_equinox(STATEFUL[0]),
        (interop.ArgumentError, ValueError, "model", ["stateful", "state="]),
    ),
    "no params for linen": (
        lambda: interop.from_linen(nn.Dense(4), None),
        (interop.ArgumentError, TypeError, "model", ["none were given", '{"params": ...}']),
    ),
    "a key for rngs": (
        lambda: interop.to_nnx(LINEAR, rngs=KEY),
        (interop.ArgumentError, TypeError, None, ["nnx.Rngs", "rngs=nnx.Rngs(seed)"]),
    ),
    "train: text": (
        lambda: interop.to_linen(LINEAR, train="abc"),
        (interop.ArgumentError, TypeError, None, ["train must be True or False", "'abc'"]),
    ),
    "sample_input: text": (
        lambda: interop.convert(LINEAR, to="nnx", sample_input="abc"),
        (interop.ArgumentError, ValueError, None, ["sample_input", "'abc'"]),
    ),
    "sample_input: other features than the weight has": (
        lambda: interop.convert(in_a_stack(brainstate.nn.ReLU()), to="nnx", sample_input=(7,)),
        (
            interop.UnsupportedLayerError,
            NotImplementedError,
            "model[0]",
            ["sample_input=(7,)", "3 features"],
        ),
    ),
    "sample_input: other channels than the kernel has": (
        lambda: interop.convert(
            nnx.Conv(3, 4, (3, 3), rngs=RNGS), to="equinox", sample_input=(3, 8, 8)
        ),
        (
            interop.UnsupportedLayerError,
            NotImplementedError,
            "model",
            ["shape (3, 8, 8) here", "3 features", "its channels last"],
        ),
    ),
    "sample_input: channels last for a model that has them first": (
        lambda: interop.from_equinox(eqx.nn.Conv2d(3, 4, 3, key=KEY), sample_input=(8, 8, 3)),
        (
            interop.UnsupportedLayerError,
            NotImplementedError,
            "model",
            ["sample_input=(8, 8, 3)", "shape (8, 8, 3) here", "its channels first"],
        ),
    ),
    "sample_input: forgotten": (
        lambda: interop.from_nnx(nnx.Conv(3, 4, (3, 3), rngs=RNGS)),
        (
            interop.MissingShapeError,
            ValueError,
            "model",
            ["fixes the input shape of Conv", "sample_input=(28, 28, 1)"],
        ),
    ),
    "sample_input: with the batch axis": (
        lambda: interop.from_nnx(
            nnx.Conv(3, 4, (3, 3), rngs=RNGS), sample_input=jnp.ones((2, 8, 8, 3))
        ),
        (
            interop.UnsupportedLayerError,
            NotImplementedError,
            "model",
            ["2 axes of space", "without its batch axis"],
        ),
    ),
    "sample_input: an empty axis": (
        lambda: interop.convert(LINEAR, to="nnx", sample_input=(0, 3)),
        (interop.ArgumentError, ValueError, None, ["(0, 3)"]),
    ),
    "sample_input: a number": (
        lambda: interop.convert(LINEAR, to="nnx", sample_input=3),
        (interop.ArgumentError, TypeError, None, ["batch axis"]),
    ),
}


class Scaled(nnx.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Gated(nnx.Linear):
    def __init__(self, *args, **keywords):
        super().__init__(*args, **keywords)
        self.gate = nnx.Param(jnp.ones(4))


def with_kernel(value):
    layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    layer.kernel = nnx.Param(value)
    return layer


def with_bias(size):
    layer = nnx.Linear(3, 4, rngs=RNGS)
    layer.bias.set_value(jnp.ones(size))
    return layer


def reshaped(x):
    return x.reshape(x.shape[0], 2, 9)


class Wide(nn.Dense):
    """A subclass with parameters of its own, which its variables show."""

    extra: int = 0


class HalfStack(nnx.Sequential):
    def __call__(self, x):
        return x / 2


def patched():
    layer = brainstate.nn.Linear(3, 4)
    layer.update = lambda x: x
    return layer


def emptied():
    model = brainstate.nn.Sequential(brainstate.nn.ReLU())
    model.layers.clear()
    return model


UNSUPPORTED = {
    "an overridden forward": (
        lambda: interop.from_nnx(nnx.Sequential(jnp.sin, Scaled(3, 4, rngs=RNGS))),
        (
            interop.UnsupportedLayerError,
            NotImplementedError,
            "model[1]",
            ["Scaled", "__call__ of Linear", "shims.wrap(model[1], into=...)"],
        ),
    ),
    "a stack with another forward": (
        lambda: interop.from_nnx(HalfStack(jnp.sin)),
        (interop.UnsupportedLayerError, NotImplementedError, "model", ["__call__"]),
    ),
    "added parameters": (
        lambda: interop.from_nnx(Gated(3, 4, rngs=RNGS)),
        (interop.UnsupportedLayerError, NotImplementedError, "model", ["holds gate"]),
    ),
    "an added field": (
        lambda: interop.from_linen(nn.Sequential([Wide(4)]), variables(extra=ARRAYS)),
        (interop.UnsupportedLayerError, NotImplementedError, "model[0]", ["holds extra"]),
    ),
    "a method patched on the instance": (
        lambda: interop.to_nnx(in_a_stack(patched())),
        (interop.UnsupportedLayerError, NotImplementedError, "model[1][0]", ["update"]),
    ),
    "a unit": (
        lambda: interop.to_nnx(in_a_stack(with_unit())),
        (
            interop.UnsupportedLayerError,
            NotImplementedError,
            "model[1][0]",
            ["Linear to nnx", "weight=mV", "shims.wrap"],
        ),
    ),
    "a layer without a rule": (
        lambda: interop.to_nnx(in_a_stack(NewBrainState())),
        (
            interop.UnmappedLayerError,
            LookupError,
            "model[1][0]",
            ["NewBrainState", "brainstate", "shims.wrap(model[1][0]"],
        ),
    ),
    "a layer without a rule, linen": (
        lambda: to_brainstate(nn.Sequential([nn.relu, NewLinen()]), params={}),
        (
            interop.UnsupportedStructureError,
            NotImplementedError,
            "model[1]",
            ["NewLinen", "forward logic is its own"],
        ),
    ),
    "a layer without a rule, equinox": (
        lambda: interop.from_equinox(NewEquinox()),
        (interop.UnmappedLayerError, LookupError, "model", ["NewEquinox"]),
    ),
    "a layer without a rule, nnx": (
        lambda: interop.from_nnx(nnx.Sequential(nnx.Sequential(NewNNX()))),
        (interop.UnmappedLayerError, LookupError, "model[0][0]", ["NewNNX"]),
    ),
    "an empty stack, brainstate": (
        lambda: interop.to_nnx(emptied()),
        (interop.UnsupportedStructureError, NotImplementedError, "model", ["empty Sequential"]),
    ),
    "an empty stack, nnx": (
        lambda: interop.from_nnx(nnx.Sequential()),
        (interop.UnsupportedStructureError, NotImplementedError, "model", ["empty Sequential"]),
    ),
    "an empty stack, linen": (
        lambda: interop.from_linen(nn.Sequential([]), {}),
        (interop.UnsupportedStructureError, NotImplementedError, "model", ["empty Sequential"]),
    ),
    "an empty stack, equinox": (
        lambda: interop.from_equinox(eqx.nn.Sequential([])),
        (interop.UnsupportedStructureError, NotImplementedError, "model", ["empty Sequential"]),
    ),
    "arrays that do not fit": (
        lambda: interop.from_nnx(nnx.Sequential(jnp.sin, with_bias(7))),
        (
            interop.ConversionError,
            ValueError,
            "model[1]",
            ["Linear", "bias has shape (7,), wanted (4,)"],
        ),
    ),
    "no array": (
        lambda: interop.from_nnx(nnx.Sequential(jnp.sin, with_kernel([1.0]))),
        (interop.ConversionError, ValueError, "model[1]", ["Linear cannot be read"]),
    ),
    "an option that the target's own code refuses": (
        lambda: interop.convert(
            nnx.Sequential(nnx.Conv(3, 4, (3, 3), padding="FOO", rngs=nnx.Rngs(0))),
            to="brainstate",
            sample_input=(8, 8, 3),
        ),
        (
            interop.ConversionError,
            ValueError,
            "model[0]",
            ["Conv cannot be built in brainstate", "FOO"],
        ),
    ),
    "shapes for arrays": (
        lambda: interop.from_nnx(nnx.eval_shape(lambda: nnx.Linear(3, 4, rngs=nnx.Rngs(0)))),
        (interop.ConversionError, ValueError, "model", ["weight is a ShapeDtypeStruct"]),
    ),
    "a partitioned model": (
        lambda: interop.from_equinox(
            eqx.partition(eqx.nn.Linear(3, 4, key=KEY), eqx.is_array)[1]
        ),
        (
            interop.UnsupportedLayerError,
            NotImplementedError,
            "model",
            ["weight=None", "eqx.combine"],
        ),
    ),
    "a filtered model": (
        lambda: interop.from_equinox(eqx.filter(eqx.nn.MLP(3, 4, 2, 1, key=KEY), eqx.is_array)),
        (
            interop.UnsupportedStructureError,
            NotImplementedError,
            "model.activation",
            ["NoneType", "Put back what was filtered out"],
        ),
    ),
    "a live shim inside": (
        lambda: interop.from_nnx(nnx.Sequential(jnp.sin, shims.ToNNX(LINEAR))),
        (
            interop.UnmappedLayerError,
            LookupError,
            "model[1]",
            ["ToNNX", "shims.materialize(model)"],
        ),
    ),
    "a function that does not take the shape": (
        lambda: to_brainstate(
            nnx.Sequential(nnx.Linear(3, 4, rngs=RNGS), reshaped, nnx.BatchNorm(9, rngs=RNGS))
        ),
        (interop.ConversionError, ValueError, "model[1]", ["shape (4,)", "sample_input="]),
    ),
    "a layer over more axes than are known": (
        lambda: to_brainstate(over_two_axes(), params=variables(layers_0=ARRAYS)),
        (
            interop.MissingShapeError,
            ValueError,
            "model[1]",
            ["LayerNorm", "last 2 axes", "(4,)", "sample_input="],
        ),
    ),
    "a layer over more axes than the sample has": (
        lambda: interop.convert(
            over_two_axes(),
            to="nnx",
            params=variables(layers_0=ARRAYS),
            sample_input=(3,),
        ),
        (interop.MissingShapeError, ValueError, "model[1]", ["last 2 axes", "(4,)"]),
    ),
    "an option, named with its path and the layer": (
        lambda: interop.to_equinox(in_a_stack(with_unit())),
        (
            interop.UnsupportedLayerError,
            NotImplementedError,
            "model[1][1]",
            ["ReLU to equinox", "its input=mV"],
        ),
    ),
}


def over_two_axes():
    """A normalisation that has no arrays, and fixes the dtype of its output."""
    axes = {"reduction_axes": (-2, -1), "feature_axes": (-2, -1)}
    norm = nn.LayerNorm(use_scale=False, use_bias=False, dtype=jnp.float32, **axes)
    return nn.Sequential([nn.Dense(4), norm])


def with_unit():
    import brainunit as u

    return brainstate.nn.Linear(4, 4, w_init=array(4, 4) * u.mV, b_init=None)


NORM_VARIABLES = {
    "params": {"layers_1": {"scale": jnp.ones(3)}},
    "batch_stats": {"layers_1": {"mean": jnp.ones(3), "var": jnp.ones(3)}},
}
VARIABLES = {
    "missing": (
        MLP,
        variables(layers_0=ARRAYS),
        ["missing params/layers_2/bias, params/layers_2/kernel"],
    ),
    "unexpected": (
        nn.Dense(4),
        variables(**ARRAYS, scale=BIAS),
        ["unexpected params/scale"],
    ),
    "renamed, misshapen and extra at once": (
        MLP,
        variables(
            layers_0={"kernel": WEIGHT, "biases": BIAS},
            layers_2={"kernel": WEIGHT, "bias": BIAS},
        ),
        [
            "missing params/layers_0/bias",
            "unexpected params/layers_0/biases",
            "params/layers_2/bias has shape (4,), wanted (2,)",
            "params/layers_2/kernel has shape (3, 4), wanted (in, 2)",
        ],
    ),
    "transposed": (
        nn.Dense(4),
        variables(kernel=WEIGHT.T, bias=BIAS),
        ["params/kernel has shape (4, 3), wanted (in, 4)"],
    ),
    "swapped": (
        nn.Sequential([nn.Dense(3), nn.Dense(2)]),
        variables(
            layers_0={"kernel": array(4, 3), "bias": array(2)},
            layers_1={"kernel": array(3, 2), "bias": array(3)},
        ),
        ["params/layers_0/bias", "params/layers_1/bias"],
    ),
    "without the collection": (
        nn.Dense(4),
        ARRAYS,
        ["missing params/bias, params/kernel", "unexpected bias, kernel", '{"params": ...}'],
    ),
    "empty": (nn.Dense(4), {}, ["missing", '{"params": ...}']),
    "boxed": (
        nn.Dense(4),
        variables(kernel=nn.Partitioned(WEIGHT, ("a", "b", "c")), bias=BIAS),
        ["params/kernel is boxed in Partitioned", "nn.unbox"],
    ),
    "no arrays": (
        nn.Dense(4),
        variables(kernel="weights", bias=[1, 2, 3, 4]),
        ["params/bias is a list", "params/kernel is a str"],
    ),
    "statistics of another size": (
        nn.Sequential([nn.relu, nn.BatchNorm(use_running_average=True)]),
        NORM_VARIABLES | {"params": {"layers_1": {"scale": jnp.ones(4), "bias": jnp.ones(3)}}},
        ["params/layers_1/scale has shape (4,), wanted (3,)"],
    ),
    "statistics missing": (
        nn.BatchNorm(use_running_average=True),
        variables(scale=jnp.ones(3), bias=jnp.ones(3)),
        ["missing batch_stats/mean, batch_stats/var"],
    ),
    "statistics of a layer that has none": (
        nn.Dense(4),
        variables(**ARRAYS) | {"batch_stats": {"mean": BIAS}},
        ["unexpected batch_stats/mean"],
    ),
}


X = jnp.ones((5, 3))
DROPOUT = brainstate.nn.Dropout(0.5)
NORM = brainstate.nn.BatchNorm0d((3,))
IMAGES = jnp.ones((2, 8, 8, 3))

# What people get wrong with live shims: (call, class of the error, words in the message)
MISTAKES = {
    "a class": (lambda: shims.ToNNX(brainstate.nn.Linear), interop.ArgumentError, ["Build it"]),
    "a class into wrap": (
        lambda: shims.wrap(nnx.Linear, into="linen"),
        interop.ArgumentError,
        ["Linear is a class", "Build it first: Linear(...)"],
    ),
    "a function": (
        lambda: shims.ToNNX(jnp.sin),
        interop.ArgumentError,
        ["is not a module of", "Pass an instance"],
    ),
    "another framework's module": (
        lambda: shims.FromNNX(eqx.nn.Linear(3, 4, key=KEY)),
        interop.ArgumentError,
        ["expected a module of nnx, got one of equinox", "shims.wrap"],
    ),
    "a module of the host": (
        lambda: shims.ToNNX(nnx.Linear(3, 4, rngs=RNGS)),
        interop.ArgumentError,
        ["Linear is a module of nnx already", "Use it as it is"],
    ),
    "a module of the host, linen": (
        lambda: shims.ToLinen(nn.Dense(4)),
        interop.ArgumentError,
        ["Dense is a module of linen already"],
    ),
    "a Linen module without variables": (
        lambda: shims.FromLinen(nn.Dense(4)),
        interop.ArgumentError,
        ["none were given", "module.init(...)", '{"params": ...}'],
    ),
    "params without the collection": (
        lambda: shims.ToNNX(nn.Dense(4), params=ARRAYS),
        interop.ArgumentError,
        ["['bias', 'kernel']", '{"params": ...}'],
    ),
    "a stateful Equinox module without its state": (
        lambda: shims.FromEquinox(STATEFUL[0]),
        interop.ArgumentError,
        ["state was not given", "eqx.nn.make_with_state"],
    ),
    "a pair of a module and its state": (
        lambda: shims.FromEquinox(STATEFUL),
        interop.ArgumentError,
        ["module by itself", "state="],
    ),
    "a stateful shim without make_with_state": (
        lambda: shims.ToEquinox(NORM)(X[0]),
        interop.ArgumentError,
        ["running statistics", "eqx.nn.make_with_state(shims.ToEquinox)", "state="],
    ),
    "no key, nnx": (
        lambda: shims.ToNNX(DROPOUT)(X),
        interop.MissingKeyError,
        ["draws random numbers", "rngs=nnx.Rngs(seed)", ".eval()"],
    ),
    "no key, equinox": (
        lambda: shims.ToEquinox(DROPOUT)(X[0]),
        interop.MissingKeyError,
        ["draws random numbers", "key=", "eqx.nn.inference_mode"],
    ),
    "no mode, linen": (
        lambda: shims.ToLinen(DROPOUT).init(KEY, X),
        interop.ArgumentError,
        ["gives no mode", "deterministic=True or False"],
    ),
    "one example for a batch": (
        lambda: shims.FromEquinox(eqx.nn.Linear(3, 4, key=KEY))(X[0]),
        interop.ArgumentError,
        ["takes examples of 1 axes", "1 batch axes has the shape (3,)", "set batch_axes"],
    ),
    "channels last": (
        lambda: shims.FromEquinox(eqx.nn.Conv2d(3, 4, 3, key=KEY))(IMAGES),
        ValueError,
        [
            "mapped over the 1 leading axes of (2, 8, 8, 3)",
            "examples of (8, 8, 3)",
            "channels first",
        ],
    ),
    "one part of the variables written back": (
        lambda: shims.ToLinen(LINEAR).write_back(variables(weight={"bias": BIAS})),
        interop.ConversionError,
        ["missing params/weight/weight", "all collections that init returned"],
    ),
    "forward logic of its own, to materialize": (
        lambda: shims.ToNNX(Own()).materialize(),
        interop.UnsupportedStructureError,
        ["forward logic is its own", 'method="trace"'],
    ),
    "an argument of another framework": (
        lambda: shims.ToNNX(LINEAR, batch_axes=1),
        interop.ArgumentError,
        ["brainstate modules do not take batch_axes", "Leave"],
    ),
    "a seed for rngs": (
        lambda: shims.ToNNX(DROPOUT, rngs=0),
        interop.ArgumentError,
        ["rngs must be an nnx.Rngs, got int", "rngs=nnx.Rngs(seed)"],
    ),
    "a model for a shim": (
        lambda: shims.explain(LINEAR),
        interop.ArgumentError,
        ["not a live shim", "shims.wrap", "interop.explain"],
    ),
    "one example for a batch, to compare": (
        lambda: interop.compare(LINEAR, interop.to_equinox(LINEAR), X[0]),
        interop.ArgumentError,
        ["fails on inputs of shape (3,)", "(batch, *example)"],
    ),
    "a framework's module for its name": (
        lambda: interop.convert(LINEAR, to=nnx),
        interop.ArgumentError,
        ["told by its name, got module", "'nnx'"],
    ),
    "two models of other sizes, to map": (
        lambda: interop.mapping(LINEAR, nnx.Linear(3, 5, rngs=RNGS)),
        interop.ConversionError,
        ["'weight': (3, 4)", "'weight': (3, 5)", "same layers and sizes"],
    ),
    "the model before the path, to save": (
        lambda: interop.save(LINEAR, "weights.safetensors"),
        interop.ArgumentError,
        ["path must be the name of a file, got Linear", "interop.save(path, model)"],
    ),
    "the model before the path, to load": (
        lambda: interop.load(LINEAR, "weights.safetensors"),
        interop.ArgumentError,
        ["path must be the name of a file, got Linear", "interop.load(path, model)"],
    ),
    "a shape for an input, to export": (
        lambda: interop.export(LINEAR, (5, 3)),
        interop.ArgumentError,
        ["inputs must be arrays, got int", "jnp.ones(shape)"],
    ),
    "a name of a platform by itself": (
        lambda: interop.export(LINEAR, X, platforms="cpu"),
        interop.ArgumentError,
        ["must be a tuple of platforms' names, got 'cpu'", "('cpu',"],
    ),
    "an instance where a class is registered": (
        lambda: interop.register_reader(LINEAR, interop.specs.Linear),
        interop.ArgumentError,
        ["must be a module class", "got a value of Linear", "class itself"],
    ),
    "a live shim, to convert": (
        lambda: to_brainstate(shims.ToNNX(Own())),
        interop.UnmappedLayerError,
        ["no rule to read ToNNX", "shims.materialize(model)"],
    ),
    "a guest with a random stream, for one example": (
        lambda: shims.wrap(nnx.Dropout(0.5, rngs=RNGS), into="equinox"),
        interop.ArgumentError,
        ["a random stream", "shims.ToEquinox(..., batched=True)"],
    ),
}


class Own(brainstate.nn.Module):
    """Forward logic that is no stack."""

    def __init__(self):
        super().__init__()
        self.inner = brainstate.nn.Linear(3, 3)

    def update(self, x):
        return x + self.inner(x)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_common_mistake_is_named_with_its_remedy(name):
    call, cls, words = MISTAKES[name]
    with pytest.raises(cls) as e:
        call()
    message = "\n".join([str(e.value), *getattr(e.value, "__notes__", [])])
    assert [word for word in words if word not in message] == []
    assert not isinstance(e.value, interop.InteropError) or e.value.remedy


def test_frozen_dicts_are_as_good_as_dicts():
    dense, given = nn.Dense(4), variables(**ARRAYS)
    frozen, expected = FrozenDict(given), X @ WEIGHT + BIAS
    hosts = [shims.FromLinen(dense, frozen), shims.ToNNX(dense, params=frozen)]
    hosts.append(jax.vmap(shims.ToEquinox(dense, params=frozen)))
    for host in [interop.from_linen(dense, frozen), *hosts]:
        np.testing.assert_allclose(host(X), expected, rtol=1e-5)
    module, loaded = interop.load_weights((dense, frozen), interop.weights((dense, given)))
    assert isinstance(loaded, FrozenDict)
    assert loaded["params"]["kernel"] is WEIGHT
    links = interop.mapping((dense, frozen), interop.from_linen(dense, given))
    assert links.apply(frozen["params"])[("weight",)]["weight"] is WEIGHT
    shim = shims.ToLinen(LINEAR)
    shim.write_back(FrozenDict(shim.init(KEY, X)))
    frozen = FrozenDict(shim.init(KEY, X))
    np.testing.assert_array_equal(shim.apply(frozen, X), LINEAR(X))


@pytest.mark.parametrize("name", BAD_ARGUMENTS | UNSUPPORTED)
def test_bad_input_is_refused_with_a_path_and_a_remedy(name):
    call, (cls, builtin, path, words) = (BAD_ARGUMENTS | UNSUPPORTED)[name]
    with pytest.raises(interop.InteropError) as e:
        call()
    assert type(e.value) is cls
    assert isinstance(e.value, builtin)
    assert e.value.path == path
    message = str(e.value)
    assert message.startswith(f"{path}: " if path else e.value.problem)
    assert [word for word in words if word not in message] == []
    assert e.value.remedy
    assert message.endswith((".", "?", "!"))


ONES = jnp.ones((2, 3))
WRONG = {
    "None": None,
    "a number": np.float32(3),
    "text": "abc",
    "a dict": {},
    "a frozen dict": FrozenDict(),
    "a list": [],
    "a pair": (1, 2),
    "fractions": (2.5,),
    "a class": nnx.Linear,
    "a function": jnp.sin,
    "an array": jnp.ones(7),
    "a key": KEY,
    "an object": object(),
    "a variable": nnx.Param(jnp.ones(3)),
    "an nnx state": nnx.state(nnx.Linear(3, 4, rngs=RNGS)),
    "a module without a forward": nnx.List([]),
    "an abstract module": eqx.Module(),
    "a bound module": nn.Dense(4).bind(variables(**ARRAYS)),
    "boxes of nothing": {"params": {"kernel": 3}},
}
USES = {
    "convert": lambda wrong: interop.convert(wrong, to="nnx"),
    "convert to": lambda wrong: interop.convert(LINEAR, to=wrong),
    "sample_input": lambda wrong: interop.convert(LINEAR, to="nnx", sample_input=wrong),
    "to_linen": lambda wrong: interop.to_linen(wrong),
    "from_equinox": lambda wrong: interop.from_equinox(wrong),
    "from_linen": lambda wrong: interop.from_linen(nn.Dense(4), wrong),
    "from_linen, params": lambda wrong: interop.from_linen(nn.Dense(4), {"params": wrong}),
    "from_linen, layers": lambda wrong: interop.from_linen(MLP, variables(layers_0=wrong)),
    "from_linen, kernel": lambda wrong: interop.from_linen(
        nn.Dense(7, use_bias=False), variables(kernel=wrong)
    ),
    "supported_layers": lambda wrong: interop.supported_layers(0 if wrong is None else wrong),
    "explain": lambda wrong: interop.explain(wrong, "nnx"),
    "explain to": lambda wrong: interop.explain(LINEAR, wrong),
    "mapping": lambda wrong: interop.mapping(wrong, to="nnx"),
    "mapping to": lambda wrong: interop.mapping(LINEAR, to=wrong),
    "apply": lambda wrong: interop.mapping(LINEAR, to="nnx").apply(wrong),
    "like": lambda wrong: interop.mapping(LINEAR, to="nnx").apply(
        {("weight",): LINEAR.weight.value}, like=wrong if wrong is not None else 0
    ),
    "then": lambda wrong: interop.mapping(LINEAR, to="nnx").then(wrong),
    "from_json": lambda wrong: interop.WeightMapping.from_json(wrong),
    "compare": lambda wrong: interop.compare(wrong, LINEAR, ONES),
    "compare inputs": lambda wrong: interop.compare(LINEAR, LINEAR, wrong),
    "LayerMapping": lambda wrong: interop.register_layer_mapping(wrong),
    "register_builder": lambda wrong: interop.register_builder(wrong, interop.specs.Linear),
    "register_reader": lambda wrong: interop.register_reader(nnx.Linear, wrong),
}


# What is right in some places: a model whose problem is reported, an array, parameters.
ACCEPTED = {
    "sample_input": ["None", "a number", "a list", "a key", "a variable"],
    "explain": ["a module without a forward", "an abstract module", "a bound module"],
    "like": ["an nnx state"],
    "compare inputs": ["a variable"],
}


@pytest.mark.parametrize("use", USES)
def test_a_wrong_thing_in_any_place_is_our_error_and_says_so(use):
    accepted, texts = [], []
    for name, wrong in WRONG.items():
        try:
            USES[use](wrong)
        except interop.InteropError as e:
            texts.append(str(e))
        else:
            accepted.append(name)
    assert accepted == ACCEPTED.get(use, [])
    assert min(map(len, texts)) > 20


@pytest.mark.parametrize("name", VARIABLES)
def test_variables_that_do_not_fit_are_reported_together(name):
    module, given, words = VARIABLES[name]
    before = jax.tree.map(lambda x: x, given)
    with pytest.raises(interop.ConversionError) as e:
        interop.from_linen(module, given)
    assert isinstance(e.value, ValueError)
    assert [word for word in words if word not in str(e.value)] == []
    assert jax.tree.structure(given) == jax.tree.structure(before)


def test_the_facts_of_an_error_are_attributes():
    with pytest.raises(interop.ConversionError) as e:
        interop.from_linen(nn.Dense(4), variables(kernel=WEIGHT.T, weight=BIAS))
    assert e.value.missing == ("params/bias",)
    assert e.value.unexpected == ("params/weight",)
    assert len(e.value.mismatched) == 1
    with pytest.raises(interop.UnsupportedLayerError) as e:
        interop.from_nnx(Scaled(3, 4, rngs=RNGS))
    assert (e.value.found, e.value.option, e.value.target) == (Scaled, "__call__", None)
    with pytest.raises(interop.UnmappedLayerError) as e:
        interop.from_nnx(NewNNX())
    assert (e.value.found, e.value.framework) == (NewNNX, "nnx")


def test_a_subclass_with_another_forward_is_refused_by_name(source, target):
    source.needs("subclass")
    model, keywords = source.arguments(source.subclass(WEIGHT, BIAS))
    with pytest.raises(
        interop.UnsupportedLayerError, match=r"^model: cannot convert .*Doubled"
    ) as e:
        interop.convert(model, to=target.name, **keywords)
    assert e.value.option in str(e.value)


def test_a_model_with_forward_logic_of_its_own_is_refused(source, target):
    source.needs("custom")
    model, keywords = source.arguments(source.custom(WEIGHT, BIAS))
    with pytest.raises(interop.UnsupportedStructureError, match=r"^model: .*Residual") as e:
        interop.convert(model, to=target.name, **keywords)
    assert "shims.wrap(model, into=...)" in str(e.value)


def test_a_subclass_that_changes_nothing_converts(source, target):
    source.needs("renamed")
    model = source.renamed(WEIGHT, BIAS)
    converted = target.convert_from(source, model)
    x = array(5, 3)
    np.testing.assert_allclose(
        target.call(converted, x), source.call(model, x), rtol=2e-6, atol=2e-6
    )


def test_a_failed_conversion_leaves_the_source_unchanged(source, target):
    source.needs("subclass")
    good, bad = source.linear(WEIGHT, BIAS), source.subclass(array(4, 4), array(4))
    model = source.sequential(good, bad)
    before = [dict(arrays) for arrays in source.read(model)]
    module, keywords = source.arguments(model)
    with pytest.raises(interop.UnsupportedLayerError, match=r"^model\[1\]: "):
        interop.convert(module, to=target.name, **keywords)
    after = source.read(model)
    for wanted, found in zip(before, after, strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_an_initial_state_still_in_an_equinox_model_is_found():
    model = eqx.nn.BatchNorm(3, "batch", mode="batch")
    assert interop.from_equinox(model).in_size == (3,)


def test_converting_within_one_framework_gives_an_equal_model(source):
    model = source.sequential(source.linear(WEIGHT, BIAS), source.activation(jnp.tanh))
    copy = source.convert_from(source, model)
    assert source.options(copy) == source.options(model)
    np.testing.assert_array_equal(
        source.call(copy, array(5, 3)), source.call(model, array(5, 3))
    )


def test_supported_layers_lists_what_each_framework_exchanges():
    table = interop.supported_layers()
    assert table.keys() >= {"nnx", "linen", "equinox"}
    for layers in table.values():
        assert {"Linear", "LayerNorm", "BatchNorm1d", "Dropout", "ReLU"} <= set(layers)
        assert {"URLSTMCell", "MaxUnpool2d", "AlphaDropout"} <= set(layers)  # by composites
        assert layers == sorted(set(layers))
        assert all(hasattr(brainstate.nn, name) or name == "Lambda" for name in layers)


def test_the_named_functions_are_convert():
    for name in ("nnx", "linen", "equinox"):
        target = Framework(name)
        to, back = getattr(interop, f"to_{name}"), getattr(interop, f"from_{name}")
        model = target.receive(lambda to=to: to(brainstate.nn.Linear(3, 4)))
        module, keywords = target.arguments(model)
        assert back(module, **keywords).out_size == (4,)
