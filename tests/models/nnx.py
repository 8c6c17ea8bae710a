"""Flax NNX models."""

import jax
from flax import nnx

LACKS = {}
OWN_LAYOUT = set()
RATE = 0.1


def linear(weight, bias=None, **options):
    layer = nnx.Linear(
        *weight.shape,
        use_bias=bias is not None,
        param_dtype=weight.dtype,
        rngs=nnx.Rngs(0),
        **options,
    )
    layer.kernel.set_value(weight)
    if bias is not None:
        layer.bias.set_value(bias)
    return layer


def layer_norm(scale, bias, epsilon, use_fast_variance=False):
    layer = nnx.LayerNorm(
        *scale.shape,
        epsilon=epsilon,
        use_fast_variance=use_fast_variance,
        param_dtype=scale.dtype,
        rngs=nnx.Rngs(0),
    )
    layer.scale.set_value(scale)
    layer.bias.set_value(bias)
    return layer


def batch_norm(scale, bias, mean, var, epsilon, momentum, use_fast_variance=False):
    layer = nnx.BatchNorm(
        *scale.shape,
        epsilon=epsilon,
        momentum=momentum,
        use_fast_variance=use_fast_variance,
        param_dtype=scale.dtype,
        rngs=nnx.Rngs(0),
    )
    for name, value in {"scale": scale, "bias": bias, "mean": mean, "var": var}.items():
        getattr(layer, name).set_value(value)
    return layer


def dropout(rate):
    return nnx.Dropout(rate)


def sequential(*layers):
    return nnx.Sequential(*layers)


def activation(fn):
    return fn


def flatten():
    return lambda x: x.reshape(x.shape[0], -1)


def subclass(weight, bias):
    class Doubled(nnx.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    return Doubled(*weight.shape, rngs=nnx.Rngs(0))


def custom(weight, bias):
    class Residual(nnx.Module):
        def __init__(self):
            self.linear = linear(weight, bias)

        def __call__(self, x):
            return x.sum() + self.linear(x)

    return Residual()


def arguments(model):
    return model, {}


def receive(convert):
    return convert()


def _switch(model, train):
    modes = ("deterministic", "use_running_average")
    found = {getattr(m, mode, None) for _, m in nnx.iter_modules(model) for mode in modes}
    if train in found:  # not within a transformation, where NNX forbids to set attributes
        model.train() if train else model.eval()


def run(model, x, train=False, key=None):
    _switch(model, train)
    rngs = {} if key is None else {"rngs": nnx.Rngs(dropout=key)}
    return model(x, **rngs), model


@nnx.jit
def _jit(model, x):
    return model(x)


def jit(model, x):
    _switch(model, False)
    return _jit(model, x)


def _leaves(model):
    if isinstance(model, nnx.Sequential):
        return [leaf for layer in model.layers for leaf in _leaves(layer)]
    return [model]


def _arrays(layer):
    variables = {name: getattr(layer, name, None) for name in _NAMES}
    return {
        _NAMES[name]: variable.get_value()
        for name, variable in variables.items()
        if isinstance(variable, nnx.Variable)
    }


_NAMES = {"kernel": "weight"} | {name: name for name in ("scale", "bias", "mean", "var")}


def read(model):
    return [arrays for layer in _leaves(model) if (arrays := _arrays(layer))]


_OPTIONS = ("in_features", "out_features", "num_features", "use_bias", "rate")
_OPTIONS += ("param_dtype", "epsilon", "momentum", "axis", "use_fast_variance")


def options(model):
    return [
        (type(layer), {name: getattr(layer, name, None) for name in _OPTIONS})
        if isinstance(layer, nnx.Module)
        else layer
        for layer in _leaves(model)
    ]


def _gradients(model, x):
    _switch(model, False)
    return nnx.grad(lambda m: (m(x) ** 2).sum())(model)


def gradient(model, x):
    grads = _gradients(model, x)
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)
    layers = read(nnx.merge(graphdef, grads, rest))
    return [{k: v for k, v in a.items() if k not in ("mean", "var")} for a in layers]


def step(model, x):
    params, grads = nnx.state(model, nnx.Param), _gradients(model, x)
    nnx.update(model, jax.tree.map(lambda p, g: p - RATE * g, params, grads))
    return model


def count(model):
    return len(jax.tree.leaves(nnx.state(model, nnx.Param)))
