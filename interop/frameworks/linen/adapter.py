"""What the framework answers about its modules, and what its rules share."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
from flax.linen import dtypes

from ... import specs
from ...chains import MODES, Chain, mode_of
from ...composites.core import combine, split
from ...composites.linen import COMPOSITES
from ...errors import (
    ArgumentError,
)
from ...partitioning import Partitioning
from ...registry import Adapter, ReadRule
from ...specs import Spec
from ...walk import Building, Reading
from ..nnx.adapter import read_pool
from .variables import chain_of, check_variables, leaves_of, within

OVERWRITES = "each call gives the layer new parameters, which a function cannot do"
OVERWRITTEN = (
    "Call it once in evaluation, and convert the layer within, which then holds the kernel "
    "that was used; or wrap it live with shims.wrap"
)
# Collections that a call leaves behind; "carry" is what live wrappers call hidden state.
_OF_A_RUN = ("intermediates", "perturbations", "cache", "carry")


@dataclasses.dataclass(eq=False)
class Node:
    """A module and its part of the variables; ``placed`` once a stack has taken it in.

    The variables are without boxes; a root keeps in ``given`` those that the user gave.
    """

    module: Any
    variables: Mapping[str, Any]
    placed: bool = False
    given: Mapping[str, Any] | None = None

    def array(self, name: str, collection: str = "params") -> Any:
        """The array of that name, or None."""
        return self.variables.get(collection, {}).get(name)


class Linen(Adapter):
    name = "linen"
    module_type: ClassVar[type] = nn.Module
    fixed: ClassVar[Mapping[str, Any]] = {"promote_dtype": dtypes.promote_dtype}
    companion: ClassVar[str | None] = "params"
    spreads = True
    has_partitionings = True

    def open(self, model: Any, params: Any, state: Any) -> Any:
        super().open(model, None, state)
        if not isinstance(params, Mapping):
            got = "none were given" if params is None else f"got {type(params).__qualname__}"
            raise ArgumentError(
                f"linen models keep their weights outside, and {got}",
                path="model",
                remedy='Pass what model.init(...) returned, {"params": ...}: as params= of '
                "interop.convert, or as the pair (model, variables) where no such argument is",
            )
        return Node(model, _unboxed(params), given=params)

    def check(self, root: Any) -> None:
        check_variables(self, root.module, root.variables)

    def edge(self, spec: Spec) -> str | None:
        is_table = isinstance(spec, specs.Embedding)
        return "a too large index gives NaN" if is_table else spec.edge

    def read_function(self, fn: Any) -> Spec | None:
        return read_pool(fn)

    def read_composite(self, node: Any, ctx: Reading) -> Spec:
        trained, buffers = (node.variables.get(c, {}) for c in ("params", "batch_stats"))
        return node.module.skeleton.merge(combine(trained, buffers))

    def build_composite(self, cls: type, spec: Spec, ctx: Building) -> Any:
        if spec.writes_parameters:
            ctx.refuse("overwrites", True, OVERWRITES, OVERWRITTEN)
        skeleton, arrays = split(spec)
        trained, buffers = skeleton.trained(arrays), skeleton.buffers(arrays)
        module = cls(skeleton=skeleton, deterministic=not ctx.options.get("train", False))
        return node_of(module, trained, **({"batch_stats": buffers} if buffers else {}))

    def close(self, built: Any, options: Mapping[str, Any]) -> Any:
        train = options.get("train", False)
        if not isinstance(train, bool):
            raise ArgumentError(
                f"train must be True or False, got {train!r}",
                remedy="Pass train=True for the training twin",
            )
        if not isinstance(built, Node):
            built = Node(nn.Sequential((built,)), {})
        return built.module, built.variables

    def module(self, node: Any) -> Any:
        return node.module if isinstance(node, Node) else node

    def arrays(self, node: Any) -> Iterable[Any]:
        masks = (getattr(m, "mask", None) for m, _, _ in leaves_of(self, node.module, (), None))
        held = jax.tree.leaves(node.variables)
        return [*held, *(mask for mask in masks if mask is not None)]

    def partitionings(self, node: Any) -> Iterable[tuple[str, Any, Partitioning]]:
        flat: Any = jax.tree_util.tree_leaves_with_path(node.given, is_leaf=is_box)
        return [
            ("/".join(str(key.key) for key in keys), leaf.value, found)
            for keys, leaf in flat
            if is_box(leaf) and (found := partitioning_of(leaf)) is not None
        ]

    def partition(
        self, built: Any, partitionings: Mapping[int, Partitioning]
    ) -> tuple[Any, set[int]]:
        if not isinstance(built, Node):
            return built, set()
        placed = {id(array) for array in jax.tree.leaves(built.variables)}
        variables = jax.tree.map(
            lambda array: boxed(array, partitionings.get(id(array))), built.variables
        )
        return Node(built.module, variables), placed & partitionings.keys()

    def parameters(self, node: Any) -> Any:
        return (node.variables if node.given is None else node.given).get("params", {})

    def with_parameters(self, node: Any, parameters: Any) -> Any:
        return Node(node.module, {**node.variables, "params": _unboxed(parameters)})

    def container(self, leaves: Mapping[tuple[Any, ...], Any]) -> Any:
        tree: dict[str, Any] = {}
        for path, leaf in leaves.items():
            part = tree
            for step in path[:-1]:
                part = part.setdefault(step, {})
            part[path[-1]] = leaf
        return tree

    def held(self, node: Any) -> Mapping[tuple[Any, ...], Any]:
        return {(k,): tree for k, tree in node.variables.items() if k not in _OF_A_RUN}

    def hold(self, node: Any, values: Mapping[tuple[Any, ...], Any]) -> Any:
        changed = {name: tree for (name,), tree in values.items()}
        variables = {**node.variables, **changed}
        given = None if node.given is None else _boxed_as(node.given, variables)
        return Node(node.module, variables, given=given)

    def native(self, node: Any) -> Any:
        return node.module, node.variables if node.given is None else node.given

    def run(self, node: Any, inputs: tuple[Any, ...], train: bool) -> Any:
        mutable = [name for name in node.variables if name != "params"]
        module = _in_mode(node.module, train, {})
        taken = inspect.signature(type(module).__call__).parameters.keys()
        taken -= _fields(type(module))  # which are set already
        modes = {name: train is value for name, value in MODES.items() if name in taken}
        return module.apply(node.variables, *inputs, mutable=mutable, **modes)[0]

    def for_callback(self, node: Any) -> Any:
        return node

    def from_callback(self, built: Any) -> Any:
        return Node(*built) if isinstance(built, tuple) else built

    def added_state(self, module: Any, rule: ReadRule) -> set[str]:
        return _fields(type(module)) - _fields(rule.layer_type)

    def chain(self, node: Any) -> Chain | None:
        chain, places = chain_of(self.module(node))
        if not isinstance(node, Node):
            return chain
        nodes = {
            id(step.part): Node(step.part, within(node.variables, names))
            for step, names in zip(chain.steps, places, strict=True)
            if isinstance(step.part, nn.Module)
        }
        steps = [
            dataclasses.replace(step, part=nodes.get(id(step.part), step.part))
            for step in chain.steps
        ]
        return dataclasses.replace(chain, steps=tuple(steps))

    def mode(self, node: Any) -> str | None:
        module = self.module(node)
        given = {name: getattr(module, name) for name in MODES.keys() & _fields(type(module))}
        return mode_of({name: value for name, value in given.items() if value is not None})

    def has_children(self, module: Any) -> bool:
        return True  # they may appear in setup, or in a compact call


adapter: Adapter = Linen()


adapter.ships(COMPOSITES)


def is_box(value: Any) -> bool:
    """Whether ``value`` is an array in one of Linen's own boxes of names."""
    return type(value) in (nn.Partitioned, nn.LogicallyPartitioned)


def _boxed_as(given: Any, tree: Any) -> Any:
    """``tree`` in the boxes that the user's own variables have."""

    def box(old: Any, new: Any) -> Any:
        return old.replace_boxed(new) if is_box(old) and not is_box(new) else new

    boxes, structure = jax.tree.flatten(given, is_leaf=is_box)
    leaves = jax.tree.leaves(tree, is_leaf=is_box)  # in dicts where ``given`` has frozen ones
    return structure.unflatten(map(box, boxes, leaves))


def _unboxed(tree: Any) -> Any:
    """``tree`` without the boxes that :func:`partitioning_of` understands."""

    def unbox(value: Any) -> Any:
        return value.value if is_box(value) and partitioning_of(value) is not None else value

    return jax.tree.map(unbox, tree, is_leaf=is_box)


def partitioning_of(box: Any) -> Partitioning | None:
    """What a box says of how to split its array; None where it has too many names."""
    logical = isinstance(box, nn.LogicallyPartitioned)
    rules = box.rules if logical else None
    return Partitioning.of(box.value, box.names, box.mesh, logical, rules)


def boxed(value: Any, partitioning: Partitioning | None) -> Any:
    """``value`` in a box that says the same, or as it is."""
    if partitioning is None:
        return value
    if not partitioning.logical:
        return nn.Partitioned(value, partitioning.names, partitioning.mesh)
    return nn.LogicallyPartitioned(
        value, partitioning.names, partitioning.mesh, partitioning.rules
    )


def _in_mode(layer: Any, train: bool, memo: dict[int, Any]) -> Any:
    """The layers of a stack with their modes set; one used twice stays one."""
    if not isinstance(layer, nn.Module):
        return layer
    if id(layer) not in memo:
        if isinstance(layer, nn.Sequential):
            layers = tuple(_in_mode(x, train, memo) for x in layer.layers)
            changes: dict[str, Any] = {"layers": layers}
        else:
            modes = MODES.keys() & _fields(type(layer))
            changes = {name: train is MODES[name] for name in modes}
        memo[id(layer)] = layer.clone(**changes)
    return memo[id(layer)]


@functools.lru_cache(1024)
def _fields(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def node_of(module: nn.Module, params: Mapping[str, Any], **collections: Any) -> Node:
    params = {name: array for name, array in params.items() if array is not None}
    return Node(module, ({"params": params} if params else {}) | collections)
