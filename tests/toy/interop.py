"""Toy. Channels last and batched; modules are plain mutable objects."""

import copy
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

    def arrays(self, node):
        return list(self.parameters(node).values())

    def parameters(self, node):
        return {
            (*path, name): array
            for path, module in _modules(node)
            for name, array in vars(module).items()
            if hasattr(array, "shape")
        }

    def with_parameters(self, node, parameters):
        new = _copy(node)
        for path, module in _modules(new):
            for name in vars(module):
                if (*path, name) in parameters:
                    setattr(module, name, parameters[*path, name])
        return new

    def container(self, leaves):
        return dict(leaves)

    def held(self, node):
        return self.parameters(node)

    def hold(self, node, values):
        for path, module in _modules(node):
            vars(module).update({p[-1]: x for p, x in values.items() if p[:-1] == path})
        return node

    def run(self, node, inputs, train):
        return node(*inputs)


def _copy(module):
    new = copy.copy(module)
    if hasattr(new, "layers"):
        new.layers = [_copy(x) if isinstance(x, toy.Module) else x for x in new.layers]
    return new


def _modules(module, path=()):
    yield path, module
    for i, layer in enumerate(getattr(module, "layers", ())):
        if isinstance(layer, toy.Module):
            yield from _modules(layer, (*path, i))


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
