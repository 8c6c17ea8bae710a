"""What the framework answers about its modules, and what its rules share."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from types import FunctionType
from typing import Any, ClassVar

import brainstate
import brainunit
import jax
import jax.numpy as jnp
import numpy as np
from brainstate import nn

from ... import specs
from ...composites.brainstate import COMPOSITES, Composite, Lambda
from ...registry import Adapter, ReadRule, remembered
from ...specs import Spec
from ...walk import Building, Reading

NormParamState: Any = type(nn.LayerNorm((1,)).weight)
_PARAM_TYPES = (brainstate.ParamState, NormParamState)


_OF_A_RUN = (brainstate.ShortTermState, brainstate.random.RandomState)


class BrainState(Adapter):
    name = "brainstate"
    module_type: ClassVar[type] = brainstate.nn.Module
    is_hub = True

    def edge(self, spec: Spec) -> str | None:
        is_dropout = isinstance(spec, specs.Dropout | specs.DropoutFixed)
        return (
            spec.edge and "the gradient is nan, as all is dropped" if is_dropout else spec.edge
        )

    def containers(self, node: Any) -> Iterable[tuple[str, object]]:
        if isinstance(node, Composite):  # whose parts no rule reads
            states: Any = node.states()
            return [(".".join(map(str, path)), state) for path, state in states.items()]
        return [
            (k, v)
            for k, v in vars(node).items()
            if type(v) not in _PLAIN and isinstance(v, brainstate.State)
        ]

    def added_state(self, module: Any, rule: ReadRule) -> set[str]:
        held = vars(module).items()
        return {k for k, v in held if k not in rule.state and _holds_state(v)}

    def close(self, built: Any, options: Mapping[str, Any]) -> Any:
        return built if isinstance(built, nn.Module) else Lambda(built)

    def has_children(self, module: Any) -> bool:
        return any(path for path in module.nodes() if path)

    def arrays(self, node: Any) -> Iterable[Any]:
        masks = (getattr(module, "w_mask", None) for module in node.nodes().values())
        held = jax.tree.leaves([state.value for state in node.states().values()])
        return [*held, *(mask for mask in masks if mask is not None)]

    def parameters(self, node: Any) -> Any:
        states = node.states(brainstate.ParamState)
        return {path: state.value for path, state in states.items()}

    def with_parameters(self, node: Any, parameters: Any) -> Any:
        copy = brainstate.graph.treefy_merge(*brainstate.graph.treefy_split(node))
        for path, state in copy.states(brainstate.ParamState).items():
            state.value = parameters[path]
        return copy

    def container(self, leaves: Mapping[tuple[Any, ...], Any]) -> Any:
        found: dict[Any, Any] = {}
        for path, leaf in leaves.items():
            if isinstance(path[-1], str) and path[-2:-1] == ("weight",):
                found.setdefault(path[:-1], {})[path[-1]] = leaf
            else:
                found[path] = leaf
        return found

    def held(self, node: Any) -> Mapping[tuple[Any, ...], Any]:
        states = node.states().items()
        return {path: s.value for path, s in states if not isinstance(s, _OF_A_RUN)}

    def hold(self, node: Any, values: Mapping[tuple[Any, ...], Any]) -> Any:
        states = node.states()
        for path, value in values.items():
            states[path].value = value
        return node

    def run(self, node: Any, inputs: tuple[Any, ...], train: bool) -> Any:
        copy = brainstate.graph.treefy_merge(*brainstate.graph.treefy_split(node))
        with brainstate.environ.context(fit=train):
            return copy(*inputs)


# Most attributes are of such a class, which is quick to tell.
_PLAIN = {type(None), bool, int, float, str, FunctionType}


def _holds_state(value: Any) -> bool:
    """Whether ``value`` is, or a container with, what BrainState finds states in."""
    if type(value) in _PLAIN:
        return False
    if isinstance(value, list | tuple):
        return any(map(_holds_state, value))
    if isinstance(value, dict):
        return any(map(_holds_state, value.values()))
    return isinstance(value, brainstate.State | brainstate.graph.Node)


adapter: Adapter = BrainState()


adapter.ships(COMPOSITES)


def arrays_of(
    layer: Any, ctx: Reading, name: str = "weight", **shapes: tuple[int, ...]
) -> dict[str, Any]:
    """The arrays that a state of the layer packs, by name, with their canonical shapes."""
    state = getattr(layer, name)
    if state is None:
        return {}
    if type(state) not in _PARAM_TYPES:
        ctx.refuse(
            "param_type",
            type(state).__qualname__,
            "it may be trained in its own way, or not at all",
        )
    value = state.value
    arrays = value if isinstance(value, dict) else {name: value}
    for key, value in arrays.items():
        if np.shape(value) == shapes[key]:
            continue
        found, wanted = ([n for n in s if n != 1] for s in (np.shape(value), shapes[key]))
        if found != wanted or np.ndim(value) == len(shapes[key]):
            ctx.refuse(
                f"{name}[{key!r}].shape",
                np.shape(value),
                f"the layer has {shapes[key]} of such values"
                if math.prod(found) == math.prod(wanted)
                else f"one value is used for several of {shapes[key]}",
                "Initialise the layer with an array of the full shape",
            )
    arrays = {key: _without_no_unit(value) for key, value in arrays.items()}
    arrays = {k: v if hasattr(v, "shape") else jnp.asarray(v) for k, v in arrays.items()}
    return {k: reshape(v, shapes[k]) for k, v in arrays.items()}


def _without_no_unit(value: Any) -> Any:
    is_plain = isinstance(value, brainunit.Quantity) and value.is_unitless
    return value.mantissa if is_plain else value


def real(value: Any) -> float:
    """A hyperparameter that the layer rounded to its dtype, as the number its user wrote."""
    array = np.asarray(value)
    return float(str(array)) if array.dtype == np.float32 else float(array)


def reshape(array: Any, shape: Any) -> Any:
    """``array`` itself where its shape agrees."""
    return array if array is None or array.shape == tuple(shape) else array.reshape(shape)


def empty(shape: Any) -> Any:
    """The initialiser of an array that is replaced; it takes no memory."""
    return np.broadcast_to(np.zeros((), np.float32), shape)


def made(cls: Any, *sizes: Any, **options: Any) -> Any:
    """A layer as its constructor makes it, but without states, which are to be set.

    What is made alike are copies of one template: the constructor of a convolution runs it for
    the shape of its output.
    """
    return copy.copy(_template(cls, *sizes, **options))


@remembered
def _template(cls: Any, *sizes: Any, **options: Any) -> Any:
    with jax.ensure_compile_time_eval():  # so that it holds no tracers
        layer = cls(*sizes, **options)
    for name, value in vars(layer).items():
        if isinstance(value, brainstate.State):
            setattr(layer, name, None)
    return layer


def check_one_dtype(
    weight: Any, bias: Any, ctx: Reading | Building, name: str = "bias"
) -> None:
    if bias is not None and bias.dtype != weight.dtype:
        ctx.refuse(
            f"{name}.dtype",
            bias.dtype,
            f"BrainState uses it after a product in {weight.dtype}, where others promote both "
            f"first",
            f"Cast it to {weight.dtype}",
        )
