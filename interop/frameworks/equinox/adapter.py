"""What the framework answers about its modules, and what its rules share."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import equinox as eqx
import jax
import numpy as np

from ... import specs
from ...composites.equinox import COMPOSITES, Tied
from ...errors import ArgumentError
from ...parameters import is_quantity, path_of
from ...registry import Adapter, ReadRule
from ...specs import Spec
from ...walk import Building, Reading


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """A module, and the state of the model that it is a part of.

    ``has_own_state`` tells that the module still holds it, as before ``make_with_state``.
    """

    module: Any
    state: eqx.nn.State | None
    has_own_state: bool = False


class Equinox(Adapter):
    name = "equinox"
    module_type: ClassVar[type] = eqx.Module
    companion: ClassVar[str | None] = "state"
    per_example = True
    channels_first = True
    has_identity = False
    ties_stacks = True

    def open(self, model: Any, params: Any, state: Any) -> Any:
        super().open(model, params, None)
        if state is not None and not isinstance(state, eqx.nn.State):
            raise ArgumentError(
                f"state must be an eqx.nn.State, got {type(state).__qualname__}",
                remedy="Pass what eqx.nn.make_with_state returned beside the model",
            )
        if state is not None:
            return Node(model, state)
        return Node(model, _initial_state(model), has_own_state=True)

    def edge(self, spec: Spec) -> str | None:
        if isinstance(spec, specs.Embedding):
            return "a too large index gives the last row"
        if isinstance(spec, specs.Dropout):
            return spec.edge and "the gradient is nan, as all is dropped"
        return spec.edge and specs.CENTRED if isinstance(spec, specs.Norm) else spec.edge

    def module(self, node: Any) -> Any:
        return node.module if isinstance(node, Node) else node

    def read_composite(self, node: Any, ctx: Reading) -> Spec:
        return node.module.spec(node.state)

    def build_composite(self, cls: type, spec: Spec, ctx: Building) -> Any:
        if spec.mixes_examples(None if ctx.shape is None else len(ctx.shape)):
            ctx.refuse(
                "the batch axis",
                "an operand",
                "an Equinox module sees one example, and this layer depends on the others or "
                "on their order",
            )
        if spec.of_batch is not None:
            ctx.refuse(
                spec.of_batch,
                True,
                "it keeps something of each example of a batch, and an Equinox module sees one",
                "Convert it without, and pass masks instead",
            )
        if spec.writes_parameters:
            ctx.refuse(
                "overwrites",
                True,
                "each call gives the layer new parameters, which a function cannot do",
                "Call it once in evaluation, and convert the layer within, which then holds "
                "the kernel that was used; or wrap it live with shims.wrap",
            )
        names = getattr(spec, "axis_name", None)
        if "batch" in (names if isinstance(names, tuple | list) else (names,)):
            ctx.refuse("axis_name", names, "Equinox's layers are mapped over a batch so named")
        return cls(spec, inference=True)

    def added_state(self, module: Any, rule: ReadRule) -> set[str]:
        return _fields(type(module)) - _fields(rule.layer_type)

    def has_children(self, module: Any) -> bool:
        leaves = jax.tree.leaves(module, is_leaf=lambda x: x is not module and _is_module(x))
        return any(map(_is_module, leaves))

    def arrays(self, node: Any) -> Iterable[Any]:
        state = () if node.state is None else jax.tree.leaves(node.state)
        return [x for x in (*jax.tree.leaves(node.module), *state) if hasattr(x, "dtype")]

    def parameters(self, node: Any) -> Any:
        held = eqx.filter(node.module, eqx.is_inexact_array)
        return jax.tree.map(  # what an index holds is state, not a parameter
            lambda x: jax.tree.map(lambda _: None, x) if is_index(x) else x,
            held,
            is_leaf=is_index,
        )

    def with_parameters(self, node: Any, parameters: Any) -> Any:
        return Node(eqx.combine(parameters, node.module), node.state)

    def held(self, node: Any) -> Mapping[tuple[Any, ...], Any]:
        found, seen = {}, set()
        for keys, leaf in _leaves(node.module)[0]:
            if is_index(leaf) and leaf.marker not in seen:
                seen.add(leaf.marker)
                found[path_of(keys)] = node.state.get(leaf)
            elif not is_index(leaf) and (is_quantity(leaf) or _is_array(leaf)):
                found[path_of(keys)] = leaf
        return found

    def hold(self, node: Any, values: Mapping[tuple[Any, ...], Any]) -> Any:
        leaves, treedef = _leaves(node.module)
        named = [(path_of(keys), leaf) for keys, leaf in leaves]
        indices = {path: leaf for path, leaf in named if is_index(leaf) and path in values}
        states = {index.marker: values[path] for path, index in indices.items()}
        changed = [
            _with_initial(leaf, states) if is_index(leaf) else values.get(path, leaf)
            for path, leaf in named
        ]
        module = jax.tree.unflatten(treedef, changed)
        return dataclasses.replace(node, module=module, state=_updated(node.state, states))

    def native(self, node: Any) -> Any:
        is_one = node.state is None or node.has_own_state
        return node.module if is_one else (node.module, node.state)

    def tie(self, built: Any, reused: set[int]) -> Any:
        layers = layers_of(built) if isinstance(built, eqx.nn.Sequential) else {}
        first: dict[int, tuple[int, ...]] = {}
        again = {
            place: first[id(layer)]
            for place, layer in layers.items()
            if first.setdefault(id(layer), place) != place and id(layer) in reused
        }
        if {id(layers[place]) for place in again} != reused:
            return None
        return Tied(eqx.nn.Shared(built, places(again), places(again.values())))

    def run(self, node: Any, inputs: tuple[Any, ...], train: bool) -> Any:
        node = node if isinstance(node, Node) else self.open(node, None, None)
        module = eqx.nn.inference_mode(node.module, not train)
        module = module() if isinstance(module, eqx.nn.Shared) else module
        if node.state is None or not takes_state(module):
            return jax.vmap(module, axis_name="batch")(*inputs)
        over = (*[0] * len(inputs), None)
        return jax.vmap(module, axis_name="batch", in_axes=over, out_axes=(0, None))(
            *inputs, node.state
        )[0]


adapter: Adapter = Equinox()


adapter.ships(COMPOSITES)


Place = tuple[int, ...]


def layers_of(stack: Any, place: Place = ()) -> dict[Place, Any]:
    """Every layer of nested stacks, by its numbers there."""
    found: dict[Place, Any] = {}
    for i, layer in enumerate(stack.layers):
        is_stack = isinstance(layer, eqx.nn.Sequential)
        found |= layers_of(layer, (*place, i)) if is_stack else {(*place, i): layer}
    return found


@dataclasses.dataclass(frozen=True)
class _Places:
    """The layers of a stack at given places, as ``eqx.tree_at`` takes them."""

    given: tuple[Place, ...]

    def __call__(self, stack: Any) -> list[Any]:
        layers = layers_of(stack)
        return [layers[place] for place in self.given]


def places(given: Iterable[Place]) -> Any:
    return _Places(tuple(given))


def takes_state(module: Any) -> bool:
    """Whether a call of ``module`` takes an ``eqx.nn.State``."""
    if isinstance(module, eqx.nn.StatefulLayer):
        return module.is_stateful()
    return "state" in inspect.signature(module).parameters


def is_index(x: Any) -> bool:
    """Whether ``x`` stands for what an ``eqx.nn.State`` holds."""
    return isinstance(x, eqx.nn.StateIndex)


def _is_array(x: Any) -> bool:
    return isinstance(x, np.ndarray | jax.ShapeDtypeStruct) or eqx.is_array(x)


def _leaves(module: Any) -> tuple[list[tuple[Any, Any]], Any]:
    return jax.tree_util.tree_flatten_with_path(
        module, is_leaf=lambda x: is_index(x) or is_quantity(x)
    )


def _with_initial(index: eqx.nn.StateIndex, values: dict[Any, Any]) -> eqx.nn.StateIndex:
    """The index with its new value, if it is one that holds its value itself."""
    if index.marker not in values or not jax.tree.leaves(index.init):
        return index
    return eqx.tree_at(lambda x: x.init, index, values[index.marker])


def _updated(state: eqx.nn.State | None, values: dict[Any, Any]) -> eqx.nn.State | None:
    """A state with other values; its ``set`` would also compare weak types."""
    if state is None:
        return None
    old, markers = state.tree_flatten()
    new = [values.get(marker, value) for marker, value in zip(markers, old, strict=True)]
    return eqx.nn.State.tree_unflatten(markers, new)


def _is_module(x: Any) -> bool:
    return isinstance(x, eqx.Module)


@functools.lru_cache(1024)
def _fields(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def _initial_state(model: eqx.Module) -> eqx.nn.State | None:
    """The state that a model holds, if ``eqx.nn.make_with_state`` has not taken it out."""
    leaves = jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, eqx.nn.StateIndex))
    if not any(isinstance(leaf, eqx.nn.StateIndex) for leaf in leaves):
        return None
    try:
        return eqx.nn.State(model)
    except ValueError as e:
        raise ArgumentError(
            "this Equinox model is stateful, and its state was not given",
            path="model",
            remedy="Pass state=, what eqx.nn.make_with_state returned beside the model",
        ) from e


def make(cls: type, **fields: Any) -> Any:
    """An instance of a module class from its fields; the constructors draw random numbers."""
    if missing := _fields(cls) ^ fields.keys():
        raise TypeError(f"{cls.__name__} has other fields in this version: {sorted(missing)}")
    module = object.__new__(cls)
    for name, value in fields.items():
        object.__setattr__(module, name, value)
    return module


def check_one_dtype(weight: Any, bias: Any, ctx: Reading | Building) -> None:
    if bias is not None and bias.dtype != weight.dtype:
        ctx.refuse(
            "bias.dtype",
            bias.dtype,
            f"Equinox adds the bias after the product in {weight.dtype}, where others promote "
            f"both first",
            "Cast the bias to the weight's dtype",
        )
