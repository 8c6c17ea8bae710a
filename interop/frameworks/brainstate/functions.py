"""Functions, and layers that are little more."""

from __future__ import annotations

from typing import Any

from brainstate import nn

from ... import formulas, specs
from ...composites.brainstate import Lambda
from ...walk import Building, Reading
from .adapter import adapter, arrays_of


@adapter.reads(nn.Flatten, specs.Flatten)
def read_flatten(m: Any, ctx: Reading) -> specs.Flatten:
    return specs.Flatten(start_axis=m.start_axis, end_axis=m.end_axis, in_size=m.in_size)


@adapter.builds(specs.Flatten, carries=specs.options(specs.Flatten))
def build_flatten(spec: specs.Flatten, ctx: Building) -> nn.Flatten:
    return nn.Flatten(spec.start_axis, spec.end_axis, in_size=spec.in_size)


@adapter.reads(nn.Unflatten, specs.Unflatten)
def read_unflatten(m: Any, ctx: Reading) -> specs.Unflatten:
    return specs.Unflatten(axis=m.axis, sizes=tuple(m.sizes))


@adapter.builds(specs.Unflatten)
def build_unflatten(spec: specs.Unflatten, ctx: Building) -> nn.Unflatten:
    return nn.Unflatten(spec.axis, spec.sizes)


@adapter.reads(nn.PReLU, specs.PReLU, state=("weight",))
def read_prelu(m: nn.PReLU, ctx: Reading) -> specs.PReLU:
    arrays = arrays_of(m, ctx, weight=m.weight.value.shape)
    return specs.PReLU(slope=arrays["weight"])


@adapter.builds(specs.PReLU)
def build_prelu(spec: specs.PReLU, ctx: Building) -> nn.PReLU:
    shape = spec.slope.shape
    layer = nn.PReLU(1)
    layer.num_parameters = shape[0] if len(shape) == 1 else shape
    layer.weight.value = spec.slope
    return layer


@adapter.reads(nn.SpikeBitwise, specs.SpikeBitwise)
def read_spike_bitwise(m: nn.SpikeBitwise, ctx: Reading) -> specs.SpikeBitwise:
    known = ("or", "and", "xor", "iand", "ixor")
    if m.op not in known:
        ctx.refuse("op", m.op, f"BrainState computes {', '.join(known)}")
    return specs.SpikeBitwise(op=m.op)


@adapter.builds(specs.SpikeBitwise)
def build_spike_bitwise(spec: specs.SpikeBitwise, ctx: Building) -> nn.SpikeBitwise:
    return nn.SpikeBitwise(spec.op)


adapter.refused[nn.RReLU] = (
    "its slopes are drawn from BrainState's global random state at each call, in evaluation "
    "too: there is no function of the input to convert, though LeakyReLU of the middle slope "
    "may serve"
)


@adapter.reads(Lambda, specs.Function, state=())
def read_lambda(m: Lambda, ctx: Reading) -> specs.Spec:
    return ctx.read_callable(m.fn, ctx.path)


@adapter.builds(specs.Function)
def build_function(spec: specs.Function, ctx: Building) -> Any:
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
    (nn.Softmax2d, "softmax_2d", {}),
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
    def read_activation(m: Any, ctx: Reading) -> specs.Activation:
        options = {option: getattr(m, attribute) for attribute, option in attributes.items()}
        if "axis" in options and options["axis"] is None:
            options["axis"] = -1
        changed = {k: v for k, v in options.items() if k not in defaults or v != defaults[k]}
        return specs.Activation(name=name, options=changed)


for _row in _ACTIVATIONS:
    _reads_activation(*_row)


_CLASSES: dict[str, tuple[type, dict[str, str]]] = {
    name: (cls, {option: attribute for attribute, option in attributes.items()})
    for cls, name, attributes in _ACTIVATIONS
}


@adapter.builds(specs.Activation)
def build_activation(spec: specs.Activation, ctx: Building) -> Any:
    cls, attributes = _CLASSES[spec.name]
    options = {**formulas.activation_defaults(spec.name), **spec.options}
    if unknown := [k for k in spec.options if k not in attributes]:
        ctx.refuse(unknown[0], spec.options[unknown[0]], f"{cls.__name__} has no such option")
    return cls(**{attributes[k]: v for k, v in options.items() if k in attributes})
