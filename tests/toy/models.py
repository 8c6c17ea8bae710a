"""Toy models."""

import jax
import toy

import shims

from ..cases import array
from . import SHAPE, Constructor, Option

_SMALL = "toy has linear layers and functions only"
LACKS = dict.fromkeys(
    ["embedding", "rms_norm", "group_norm", "conv", "lstm", "pool"]
    + ["layer_norm", "batch_norm", "dropout", "LayerNorm", "BatchNorm", "Dropout", "Flatten"],
    _SMALL,
) | {
    "dtypes": "toy has none of the checks of dtypes",
    "flatten": _SMALL,
    "block": _SMALL,
    "training": "toy has neither an optimiser nor a mode",
    "fast variance": _SMALL,
    "options": "the tables say what the first four refuse",
}
OWN_LAYOUT = set()
OWN_STREAMS = ALWAYS_KEYED = None
RATE = 0.1


def linear(weight, bias=None):
    return toy.Linear(weight, bias)


def sequential(*layers):
    return toy.Sequential(*layers)


def activation(fn):
    return toy.ReLU() if fn is jax.nn.relu else fn


def subclass(weight, bias):
    class Doubled(toy.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    return Doubled(weight, bias)


def renamed(weight, bias):
    class Renamed(toy.Linear):
        pass

    return Renamed(weight, bias)


def custom(weight, bias):
    class Residual(toy.Module):
        def __init__(self):
            self.linear = linear(weight, bias)

    return Residual()


def arguments(model):
    return model, {}


def receive(convert):
    return convert()


def run(model, x, train=False, key=None):
    return model(x), model


def jit(model, x):
    return jax.jit(model)(x)


def _leaves(model):
    if isinstance(model, toy.Sequential):
        return [leaf for layer in model.layers for leaf in _leaves(layer)]
    return [model]


def _linears(model):
    return [layer for layer in _leaves(model) if isinstance(layer, toy.Linear)]


def read(model):
    return [
        {name: array for name, array in vars(layer).items() if array is not None}
        for layer in _linears(model)
    ]


def options(model):
    return [type(leaf) if isinstance(leaf, toy.Module) else leaf for leaf in _leaves(model)]


def _gradients(model, x):
    layers = {id(layer): layer for layer in _linears(model)}
    before = {key: vars(layer).copy() for key, layer in layers.items()}

    def loss(arrays):
        for key, layer in layers.items():
            vars(layer).update(arrays[key])
        return (model(x) ** 2).sum()

    grads = jax.grad(loss)(before)
    for key, layer in layers.items():
        vars(layer).update(before[key])
    return layers, grads


def gradient(model, x):
    _, grads = _gradients(model, x)
    return [
        {name: g for name, g in grads[id(layer)].items() if g is not None}
        for layer in _linears(model)
    ]


def step(model, x):
    layers, grads = _gradients(model, x)
    for key, layer in layers.items():
        vars(layer).update(jax.tree.map(lambda p, g: p - RATE * g, vars(layer), grads[key]))
    return model


def count(model):
    layers = {id(layer): layer for layer in _linears(model)}
    return len(jax.tree.leaves([vars(layer) for layer in layers.values()]))


def construct(cls, x, **options):
    return cls(**options)


CONSTRUCTORS = {
    toy.Sequential: "its layers are tested in stacks",
    toy.ReLU: "it has no options",
    toy.Linear: Constructor(
        (6, 3),
        {"weight": array(3, 4), "bias": array(4)},
        {"weight": SHAPE, "bias": Option(None)},
    ),
}


class Host:
    """A shim whose host is toy."""

    def __init__(self, module, keyed=True, **keywords):
        self.shim = shims.wrap(module, into="toy", **keywords)

    def call(self, x, train=False):
        return self.shim(x)
