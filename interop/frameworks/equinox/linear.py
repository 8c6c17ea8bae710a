"""Linear layers."""

from __future__ import annotations

import inspect
import operator

import equinox as eqx
import jax

from ... import specs
from ...walk import Building, Reading
from .adapter import Node, adapter, check_one_dtype, make


@adapter.reads(eqx.nn.Linear, specs.Linear)
def read_linear(node: Node, ctx: Reading) -> specs.Linear:
    m = node.module
    if m.weight is None:
        return ctx.refuse(
            "weight", None, "the array is missing", "Put partitions together with eqx.combine"
        )
    check_one_dtype(m.weight, m.bias, ctx)
    return specs.Linear(
        weight=m.weight.T,
        bias=m.bias,
        scalar_input=m.in_features == "scalar",
        scalar_output=m.out_features == "scalar",
    )


@adapter.builds(specs.Linear, carries=("scalar_input", "scalar_output"))
def build_linear(spec: specs.Linear, ctx: Building) -> eqx.nn.Linear:
    check_one_dtype(spec.weight, spec.bias, ctx)
    if not ctx.fits(1 - spec.scalar_input):
        ctx.refuse("sample_input", ctx.shape, "Equinox's Linear takes examples of one axis")
    n_in, n_out = spec.weight.shape
    return make(
        eqx.nn.Linear,
        weight=spec.weight.T,
        bias=spec.bias,
        in_features="scalar" if spec.scalar_input else n_in,
        out_features="scalar" if spec.scalar_output else n_out,
        use_bias=spec.bias is not None,
    )


@adapter.reads(eqx.nn.MLP, specs.Sequential)
def read_mlp(node: Node, ctx: Reading) -> specs.Sequential:
    m = node.module
    layers = list(m.layers)
    if m.scan and m.depth > 0:  # the layers within are one, with an axis more
        layers[1:2] = [
            jax.tree.map(operator.itemgetter(i), m.layers[1]) for i in range(m.depth - 1)
        ]
    first, *rest = [
        ctx.read(Node(layer, node.state), f"{ctx.path}.layers[{i}]")
        for i, layer in enumerate(layers)
    ]
    parts = [first]
    for i, layer in enumerate(rest):
        parts += [_read_neuron(node, ctx, "activation", i), layer]
    default = inspect.signature(eqx.nn.MLP).parameters["final_activation"].default
    if m.depth > 0 and m.final_activation is not default:  # else it is not applied
        parts.append(_read_neuron(node, ctx, "final_activation"))
    return specs.Sequential(layers=tuple(parts))


def _read_neuron(node: Node, ctx: Reading, name: str, *index: int) -> specs.Spec:
    """A function that is applied to each neuron by itself; its arrays have an axis for them."""
    fn, path = getattr(node.module, name), f"{ctx.path}.{name}"
    has_one = name == "final_activation" and node.module.out_size == "scalar"
    axes = 0 if has_one else 1 + len(index)
    if type(fn) is eqx.nn.PReLU and fn.negative_slope.ndim == axes:
        own = eqx.nn.PReLU(fn.negative_slope[index]) if index else fn
        return ctx.read(Node(own, node.state), path)
    if any(map(eqx.is_array, jax.tree.leaves(fn))):
        ctx.refuse(name, fn, "of those with weights only PReLU with one slope converts")
    layer = fn if isinstance(fn, eqx.Module) else eqx.nn.Lambda(fn)
    spec = ctx.read(Node(layer, node.state), path)
    if isinstance(spec, specs.Function) and spec.per_example:
        return ctx.read(Node(eqx.nn.Lambda(jax.vmap(spec.fn)), node.state), path)
    if not spec.is_elementwise:
        ctx.refuse(name, fn, "it is applied to one number at a time")
    return spec
