"""What the framework answers about its modules, and what its rules share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any, ClassVar

import flax.linen as nn
import jax
import numpy as np
from flax import nnx
from flax.nnx.nn import dtypes

from ... import specs
from ...chains import Chain, steps_of
from ...composites.nnx import COMPOSITES, Composite
from ...errors import ArgumentError
from ...partitioning import Partitioning
from ...registry import Adapter, ReadRule, remembered
from ...specs import Spec
from ...walk import Building, Reading

_OF_A_RUN = (nnx.RngState, nnx.Cache, nnx.Intermediate, nnx.Perturbation)


class Nnx(Adapter):
    name = "nnx"
    module_type: ClassVar[type] = nnx.Module
    fixed: ClassVar[Mapping[str, Any]] = {"promote_dtype": dtypes.promote_dtype}
    spreads = True
    has_partitionings = True

    def containers(self, node: Any) -> Iterable[tuple[str, object]]:
        if isinstance(node, nnx.RNNCellBase | Composite):  # whose parts no rule reads
            return [(".".join(map(str, path)), v) for path, v in _variables(node)]
        return [(k, v) for k, v in vars(node).items() if _is_part(v, nnx.Variable)]

    def added_state(self, module: Any, rule: ReadRule) -> set[str]:
        held = vars(module).items()
        return {k for k, v in held if k not in rule.state and _is_part(v)}

    def chain(self, node: Any) -> Chain | None:
        cls = type(node)
        if cls.__getattribute__ is not nnx.Module.__getattribute__:
            return None
        call = inspect.getattr_static(cls, "__call__", None)
        chain = steps_of(call, node, _is_layer, _contents)
        used = {id(v) for step in chain.steps for v in _held(step.part)}
        if chain.steps and used != {id(v) for v in _held(node)}:
            return Chain(other="it does not use all that the module holds")
        return chain

    def has_children(self, module: Any) -> bool:
        return any(path for path, _ in nnx.iter_modules(module))

    def arrays(self, node: Any) -> Iterable[Any]:
        masks = (getattr(module, "mask", None) for _, module in nnx.iter_modules(node))
        return [
            *jax.tree.leaves(nnx.state(node)),
            *(mask for mask in masks if mask is not None),
        ]

    def partitionings(self, node: Any) -> Iterable[tuple[str, Any, Partitioning]]:
        if all(partitioning_of(variable) is None for variable in _below(node)):
            return []
        return [
            (".".join(map(str, path)), variable.get_raw_value(), found)
            for path, variable in _variables(node)
            if (found := partitioning_of(variable)) is not None
        ]

    def partition(
        self, built: Any, partitionings: Mapping[int, Partitioning]
    ) -> tuple[Any, set[int]]:
        placed: set[int] = set()
        for _, variable in _variables(built) if isinstance(built, nnx.Module) else ():
            if (key := id(variable.get_raw_value())) in partitionings:
                variable.set_metadata(**metadata_of(partitionings[key]))
                placed.add(key)
        return built, placed

    def parameters(self, node: Any) -> Any:
        return nnx.state(node, nnx.Param)

    def with_parameters(self, node: Any, parameters: Any) -> Any:
        definition, _, rest = nnx.split(node, nnx.Param, ...)
        return nnx.merge(definition, parameters, rest, copy=True)

    def container(self, leaves: Mapping[tuple[Any, ...], Any]) -> Any:
        return nnx.from_flat_state([(path, nnx.Param(leaf)) for path, leaf in leaves.items()])

    def held(self, node: Any) -> Mapping[tuple[Any, ...], Any]:
        return {path: _value(part) for path, part in _lasting(node).items()}

    def hold(self, node: Any, values: Mapping[tuple[Any, ...], Any]) -> Any:
        held = _lasting(node)
        for path, value in values.items():
            if isinstance(held[path], nnx.Variable):
                held[path].set_value(value)
            else:
                nnx.update(node, nnx.from_flat_state([(path, value)]))
        return node

    def run(self, node: Any, inputs: tuple[Any, ...], train: bool) -> Any:
        model = nnx.clone(node)
        if train:
            model.train()
        else:
            model.eval()
        return model(*inputs)

    def edge(self, spec: Spec) -> str | None:
        is_table = isinstance(spec, specs.Embedding)
        return "a too large index gives NaN" if is_table else spec.edge

    def read_function(self, fn: Any) -> Spec | None:
        return read_pool(fn)

    def build_composite(self, cls: type, spec: Spec, ctx: Building) -> Any:
        return cls(spec, rngs=ctx.options.get("rngs"), deterministic=True)

    def close(self, built: Any, options: Mapping[str, Any]) -> Any:
        rngs = options.get("rngs")
        if rngs is not None and not isinstance(rngs, nnx.Rngs | nnx.RngStream):
            raise ArgumentError(
                f"rngs must be an nnx.Rngs, got {type(rngs).__qualname__}",
                remedy="Pass rngs=nnx.Rngs(seed)",
            )
        return built if isinstance(built, nnx.Module) else nnx.Sequential(built)


adapter: Adapter = Nnx()


adapter.ships(COMPOSITES)


_PLAIN = {type(None), bool, int, float, str, type, FunctionType}


def _is_part(value: Any, kinds: Any = nnx.Variable | nnx.Pytree) -> bool:
    """Whether ``value`` is of these classes, which is slow to ask of a Variable's."""
    return type(value) not in _PLAIN and isinstance(value, kinds)


def _below(node: nnx.Module) -> list[nnx.Variable]:
    """Every Variable of a module and its parts, each once and in no order.

    What ``nnx.state`` tells beside it takes several times as long.
    """
    found: list[nnx.Variable] = []
    pending, seen = [node], set[int]()
    while pending:
        part: Any = pending.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, nnx.Variable):
            found.append(part)
        else:
            values = list(vars(part).values())
            pending += filter(_is_part, jax.tree.leaves(values, is_leaf=_is_part))
    return found


def _variables(node: nnx.Module) -> list[tuple[Any, nnx.Variable]]:
    flat: Any = nnx.to_flat_state(nnx.state(node))
    return [(path, v) for path, v in flat if isinstance(v, nnx.Variable)]


_PARTITIONING = {"out_sharding", "mesh", "sharding_rules"}


_BOXES = (nn.Partitioned, nn.LogicallyPartitioned)


def partitioning_of(variable: nnx.Variable[Any]) -> Partitioning | None:
    """What a Variable's metadata say of how to split its array; None where they don't."""
    metadata = variable.get_metadata()
    names, mesh = metadata.get("out_sharding"), metadata.get("mesh")
    if isinstance(names, jax.sharding.NamedSharding):
        names, mesh = names.spec, names.mesh
    if not isinstance(names, tuple | list | jax.sharding.PartitionSpec) or not tuple(names):
        return None
    rules, box = metadata.get("sharding_rules"), metadata.get("linen_meta_type")
    logical = bool(rules) or (box is not None and issubclass(box, nn.LogicallyPartitioned))
    return Partitioning.of(variable.get_raw_value(), names, mesh, logical, rules)


def metadata_of(partitioning: Partitioning | None) -> dict[str, Any]:
    """The same as a Variable's metadata, as ``nnx.bridge`` writes them."""
    if partitioning is None:
        return {}
    metadata: dict[str, Any] = {"out_sharding": partitioning.names}
    if partitioning.mesh is not None:
        metadata["mesh"] = partitioning.mesh
    if partitioning.logical:
        metadata["sharding_rules"] = partitioning.rules
        metadata["linen_meta_type"] = nn.LogicallyPartitioned
    return metadata


def _lasting(node: nnx.Module) -> dict[tuple[Any, ...], Any]:
    """The Variables and plain arrays that outlast a run, by path, each once."""
    found = nnx.to_flat_state(nnx.state(node))
    return {path: v for path, v in found if not isinstance(v, _OF_A_RUN)}


def _is_layer(value: Any) -> bool:
    return isinstance(value, nnx.Module) and not isinstance(value, nnx.List | nnx.Dict)


def _contents(value: Any) -> Any:
    if isinstance(value, nnx.List):
        return list(value)
    return dict(value.items()) if isinstance(value, nnx.Dict) else value


def _held(part: Any) -> list[Any]:
    """The Variables below a module, but for random streams."""
    if not isinstance(part, nnx.Module):
        return []
    return [v for _, v in _variables(part) if not isinstance(v, nnx.RngState)]


def _value(part: Any) -> Any:
    return part.get_value() if isinstance(part, nnx.Variable) else part


def array_of(
    layer: Any, ctx: Reading, name: str, wanted: type[nnx.Variable[Any]] = nnx.Param
) -> Any:
    """The array of the layer's variable of that name, or None."""
    variable = getattr(layer, name)
    if variable is None:
        return None
    if type(variable) is not wanted:
        ctx.refuse(
            name,
            type(variable).__qualname__,
            f"only an nnx.{wanted.__name__} converts; another kind may be trained in its own "
            f"way, or not at all",
        )
    known = set(nnx.Variable.required_metadata)
    if partitioning_of(variable) is not None:
        known |= _PARTITIONING
        if variable.get_metadata().get("linen_meta_type") in _BOXES:
            known.add("linen_meta_type")
    metadata = {k: v for k, v in variable.get_metadata().items() if k not in known and v}
    if metadata:
        ctx.refuse(f"{name} metadata", metadata, "other frameworks have no place for it")
    return variable.get_raw_value()


class _NoRngs:
    """Stands for the ``nnx.Rngs`` of a layer whose initialisers return given arrays."""

    def params(self) -> None:
        """No key: nothing is drawn."""


NO_RNGS: Any = _NoRngs()


def returns(array: Any) -> Any:
    return lambda *_: array


def empty(key: Any, shape: Any, dtype: Any) -> Any:
    """The initialiser of an array that :func:`made` replaces."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def made(cls: Any, *sizes: Any, arrays: Mapping[str, Any], **options: Any) -> Any:
    """A layer of that class as its constructor makes it, with these arrays.

    What is made alike comes from one template: a constructor takes as long as forty copies, as
    it looks at each attribute several times.

    Args:
        cls: the class.
        *sizes: positional arguments of its constructor.
        arrays: by path, those of Variables and others; None stands for no array.
        **options: keywords of its constructor. No functions of users, which would stay alive.
    """
    definition, kinds = _template(cls, *sizes, **options)
    arrays = {path: array for path, array in arrays.items() if array is not None}
    if kinds.keys() != arrays.keys():
        raise ValueError(f"{cls.__qualname__} has {sorted(kinds)}, got {sorted(arrays)}")
    return nnx.merge(definition, [kind(arrays[path]) for path, kind in kinds.items()])


@remembered
def _template(cls: Any, *sizes: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """What is alike in layers, and what holds each of their arrays, in the order of merge."""
    with nnx.var_defaults(hijax=False, ref=False):
        definition, state = nnx.split(cls(*sizes, **options, rngs=NO_RNGS))
    flat: Any = nnx.to_flat_state(state)
    return definition, {
        ".".join(map(str, path)): type(held) if isinstance(held, nnx.Variable) else _as_it_is
        for path, held in flat
    }


def _as_it_is(array: Any) -> Any:
    return array


POOLS: dict[str, Callable[..., Any]] = {
    "max": nnx.max_pool,
    "min": nnx.min_pool,
    "mean": nnx.avg_pool,
    "fold": nnx.pool,
}


def read_pool(fn: Any) -> specs.Pool | None:
    """One of Flax's pooling functions with its options in a ``functools.partial``."""
    if not isinstance(fn, functools.partial) or fn.args or "window_shape" not in fn.keywords:
        return None
    kind = next((kind for kind, pool in POOLS.items() if pool is fn.func), None)
    options = {"strides": None, "padding": "VALID", "count_include_pad": True} | fn.keywords
    given = options["window_shape"], options["strides"], options["padding"]
    if kind == "fold" and isinstance(options.get("init"), int | float):
        operation = options.get("reduce_fn")
        return specs.pool("fold", *given, operation=operation, init=options["init"])
    if kind == "mean" and not options["count_include_pad"]:
        return specs.pool("mean", *given, counts="float32")
    return None if kind in (None, "fold") else specs.pool(kind, *given)
