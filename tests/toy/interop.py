"""Toy. Channels last and batched; modules are plain mutable objects."""

import functools

import toy

from .. import formulas, specs
from ..registry import Adapter


class Toy(Adapter):
    name = "toy"
    module_type = toy.Module

    def close(self, built, options):
        return built if isinstance(built, toy.Module) else toy.Sequential(built)

    def added_state(self, module, rule):
        return vars(module).keys() - rule.state

    def has_children(self, module):
        return any(isinstance(value, toy.Module) for value in vars(module).values())


adapter = Toy()


@adapter.reads(toy.Sequential, specs.Sequential, state=("layers",))
def read_sequential(m, ctx):
    return specs.Sequential(layers=ctx.read_all(m.layers))


@adapter.builds(specs.Sequential)
def build_sequential(spec, ctx):
    return toy.Sequential(*[ctx.build(layer) for layer in spec.layers])


@adapter.reads(toy.Linear, specs.Linear, state=("weight", "bias"))
def read_linear(m, ctx):
    return specs.Linear(weight=m.weight, bias=m.bias)


@adapter.builds(specs.Linear, carries=("leading_shape",))
def build_linear(spec, ctx):
    return toy.Linear(spec.weight, spec.bias)


@adapter.reads(toy.ReLU, specs.Activation)
def read_relu(m, ctx):
    return specs.Activation(name="relu")


@adapter.builds(specs.Activation)
def build_activation(spec, ctx):
    if spec.name == "relu":
        return toy.ReLU()
    return functools.partial(formulas.ACTIVATIONS[spec.name], **spec.options)


@adapter.builds(specs.Function)
def build_function(spec, ctx):
    return formulas.Batched(spec.fn) if spec.per_example else spec.fn
