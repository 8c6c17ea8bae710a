"""Layers without weights: dropout, pooling, activations, other functions."""

from __future__ import annotations

from typing import Any

from brainstate import nn

from ... import formulas, specs
from ...composites.brainstate import Lambda
from .adapter import adapter


@adapter.reads(nn.Dropout, specs.Dropout)
def read_dropout(m, ctx):
    return specs.Dropout(
        rate=formulas.complement(m.prob),
        broadcast_dims=tuple(m.broadcast_dims),
        rng_collection="dropout",
    )


@adapter.builds(specs.Dropout, carries=("broadcast_dims",))
def build_dropout(spec, ctx):
    return nn.Dropout(formulas.complement(spec.rate), broadcast_dims=spec.broadcast_dims)


_POOLS = {
    False: (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    True: (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
}


_POOL = {"return_indices": False, "channel_axis": -1}


@adapter.reads(nn.MaxPool1d, specs.Pool, fixed=_POOL)
@adapter.reads(nn.MaxPool2d, specs.Pool, fixed=_POOL)
@adapter.reads(nn.MaxPool3d, specs.Pool, fixed=_POOL)
@adapter.reads(nn.AvgPool1d, specs.Pool, fixed=_POOL)
@adapter.reads(nn.AvgPool2d, specs.Pool, fixed=_POOL)
@adapter.reads(nn.AvgPool3d, specs.Pool, fixed=_POOL)
def read_pool(m, ctx):
    return specs.pool(isinstance(m, _POOLS[True]), False, m.kernel_size, m.stride, m.padding)


@adapter.builds(specs.Pool)
def build_pool(spec, ctx):
    if spec.space > 3:
        ctx.refuse("window_shape", spec.window, "BrainState has 1 to 3 axes of space")
    return _POOLS[spec.mean][spec.space - 1](
        spec.window, stride=spec.strides, padding=spec.padding
    )


@adapter.reads(nn.Flatten, specs.Flatten)
def read_flatten(m, ctx):
    return specs.Flatten(start_axis=m.start_axis, end_axis=m.end_axis, in_size=m.in_size)


@adapter.builds(specs.Flatten)
def build_flatten(spec, ctx):
    return nn.Flatten(spec.start_axis, spec.end_axis, in_size=spec.in_size)


@adapter.reads(Lambda, specs.Function, state=())
def read_lambda(m, ctx):
    return ctx.read_callable(m.fn, ctx.path)


@adapter.builds(specs.Function)
def build_function(spec, ctx):
    return formulas.Batched(spec.fn) if spec.per_example else spec.fn


# Class, name of the function, and the function's options by attribute of the layer.
_ACTIVATIONS: list[tuple[type, str, dict[str, str]]] = [
    (nn.CELU, "celu", {"alpha": "alpha"}),
    (nn.ELU, "elu", {"alpha": "alpha"}),
    (nn.GELU, "gelu", {"approximate": "approximate"}),
    (nn.GLU, "glu", {"dim": "axis"}),
    (nn.Hardshrink, "hard_shrink", {"lambd": "lambd"}),
    (nn.Hardsigmoid, "hard_sigmoid", {}),
    (nn.Hardswish, "hard_silu", {}),
    (nn.Hardtanh, "hard_tanh", {"min_val": "min_val", "max_val": "max_val"}),
    (nn.Identity, "identity", {}),
    (nn.LeakyReLU, "leaky_relu", {"negative_slope": "negative_slope"}),
    (nn.LogSigmoid, "log_sigmoid", {}),
    (nn.LogSoftmax, "log_softmax", {"dim": "axis"}),
    (nn.Mish, "mish", {}),
    (nn.ReLU, "relu", {}),
    (nn.ReLU6, "relu6", {}),
    (nn.SELU, "selu", {}),
    (nn.Sigmoid, "sigmoid", {}),
    (nn.SiLU, "silu", {}),
    (nn.Softmax, "softmax", {"dim": "axis"}),
    (nn.Softmin, "softmin", {"dim": "axis"}),
    (nn.Softplus, "softplus", {}),
    (nn.Softshrink, "soft_shrink", {"lambd": "lambd"}),
    (nn.Softsign, "soft_sign", {}),
    (nn.Tanh, "tanh", {}),
    (nn.Tanhshrink, "tanh_shrink", {}),
    (nn.Threshold, "threshold", {"threshold": "threshold", "value": "value"}),
]


def _reads_activation(cls: type, name: str, attributes: dict[str, str]) -> None:
    defaults = formulas.activation_defaults(name)

    @adapter.reads(cls, specs.Activation)
    def read_activation(m, ctx):
        options = {option: getattr(m, attribute) for attribute, option in attributes.items()}
        if "axis" in options and options["axis"] is None:
            options["axis"] = -1
        changed = {k: v for k, v in options.items() if k not in defaults or v != defaults[k]}
        return specs.Activation(name=name, options=changed)


for _row in _ACTIVATIONS:
    _reads_activation(*_row)


# Softmax2d is softmax over the third axis from the end, so that it is read and never built.
@adapter.reads(nn.Softmax2d, specs.Activation)
def read_softmax2d(m, ctx):
    return specs.Activation(name="softmax", options={"axis": -3})


_CLASSES: dict[str, tuple[type, dict[str, str]]] = {
    name: (cls, {option: attribute for attribute, option in attributes.items()})
    for cls, name, attributes in _ACTIVATIONS
}


@adapter.builds(specs.Activation)
def build_activation(spec, ctx):
    cls, attributes = _CLASSES[spec.name]
    options: dict[str, Any] = formulas.activation_defaults(spec.name) | spec.options
    if unknown := [k for k in spec.options if k not in attributes]:
        ctx.refuse(unknown[0], spec.options[unknown[0]], f"{cls.__name__} has no such option")
    return cls(**{attributes[k]: v for k, v in options.items() if k in attributes})
