"""BrainState models."""

import brainstate
import jax
from brainstate import nn

from interop.composites.brainstate import Lambda

LACKS = {}
OWN_LAYOUT = set()
RATE = 0.1


def linear(weight, bias=None, **options):
    return nn.Linear(
        (weight.shape[0],), (weight.shape[1],), w_init=weight, b_init=bias, **options
    )


def layer_norm(scale, bias, epsilon, use_fast_variance=False):
    layer = nn.LayerNorm(
        scale.shape,
        epsilon=epsilon,
        scale_init=scale,
        bias_init=bias,
        use_fast_variance=use_fast_variance,
    )
    layer.dtype = None  # the result's dtype follows the input, as in the other frameworks
    return layer


def batch_norm(scale, bias, mean, var, epsilon, momentum, use_fast_variance=False):
    layer = nn.BatchNorm0d(
        scale.shape,
        epsilon=epsilon,
        momentum=momentum,
        use_fast_variance=use_fast_variance,
        scale_initializer=scale,
        bias_initializer=bias,
    )
    layer.running_mean.value, layer.running_var.value = mean, var
    return layer


def dropout(rate):
    return nn.Dropout(round(1 - rate, 12))  # the probability to keep


def sequential(*layers):
    first, *rest = layers  # the first has to be a module
    return nn.Sequential(first if isinstance(first, nn.Module) else Lambda(first), *rest)


def activation(fn):
    return _CLASSES[fn]() if fn in _CLASSES else fn


_CLASSES = {jax.nn.relu: nn.ReLU, jax.numpy.tanh: nn.Tanh}


def flatten():
    return nn.Flatten(1)


def subclass(weight, bias):
    class Doubled(nn.Linear):
        def update(self, x):
            return 2 * super().update(x)

    return Doubled((weight.shape[0],), (weight.shape[1],), w_init=weight, b_init=bias)


def custom(weight, bias):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear(weight, bias)

        def update(self, x):
            return x.sum() + self.linear(x)

    return Residual()


def arguments(model):
    return model, {}


def receive(convert):
    return convert()


def run(model, x, train=False, key=None):
    if key is not None:
        brainstate.random.set_key(key)
    with brainstate.environ.context(fit=train):
        return model(x), model


def jit(model, x):
    return brainstate.transform.jit(lambda x: run(model, x)[0])(x)


def _leaves(model):
    if isinstance(model, nn.Sequential):
        return [leaf for layer in model.layers for leaf in _leaves(layer)]
    return [model]


def _arrays(layer):
    arrays = dict(layer.weight.value) if getattr(layer, "weight", None) else {}
    if hasattr(layer, "running_mean"):
        arrays |= {"mean": layer.running_mean.value, "var": layer.running_var.value}
    return arrays


def read(model):
    return [arrays for layer in _leaves(model) if (arrays := _arrays(layer))]


_OPTIONS = ("in_size", "out_size", "epsilon", "momentum", "use_fast_variance", "prob")


def options(model):
    return [
        (type(layer), {name: getattr(layer, name, None) for name in _OPTIONS})
        if isinstance(layer, nn.Module)
        else layer
        for layer in _leaves(model)
    ]


def _gradients(model, x):
    states = model.states(brainstate.ParamState)
    grads = brainstate.transform.grad(lambda: (run(model, x)[0] ** 2).sum(), states)()
    return states, grads


def gradient(model, x):
    states, grads = _gradients(model, x)
    by_state = {id(state): grads[key] for key, state in states.items()}
    layers = [layer for layer in _leaves(model) if getattr(layer, "weight", None)]
    return [by_state[id(layer.weight)] for layer in layers]


def step(model, x):
    states, grads = _gradients(model, x)
    for key, state in states.items():
        state.value = jax.tree.map(lambda p, g: p - RATE * g, state.value, grads[key])
    return model


def count(model):
    states = model.states(brainstate.ParamState)
    return len(jax.tree.leaves([state.value for state in states.values()]))
