"""Flax NNX as a guest.

A Variable holds a tree of arrays, each of which is a cell. The guest's own random streams are
buffers like any other: they are copied in and out, and so advance. ``nnx.Intermediate`` and
``nnx.Perturbation`` are results of a call and not state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx import graphlib
from flax.nnx.pytreelib import PytreeState
from flax.typing import HashableMapping
from jax.extend.core import get_opaque_trace_state

from interop.errors import ArgumentError, MissingKeyError, UnsupportedStructureError
from interop.frameworks.nnx.adapter import partitioning_of
from interop.partitioning import Partitioning
from interop.walk import captured

from ...core import (
    Call,
    Kind,
    LeafCell,
    Looks,
    Path,
    Structure,
    check_partitionings,
    finished,
    is_plain,
    leaves,
    named_paths,
    no_batch,
    path_text,
)
from ...forwarding import parameter_names
from ...watching import Watch, WatchedGuest, layout
from .views import cell_of

_RESULTS = (nnx.Intermediate, nnx.Perturbation)


def _kind(variable: nnx.Variable, leaf: Any) -> Kind:
    if isinstance(variable, nnx.Param):
        return Kind.of_parameter(leaf)
    return Kind.STATISTIC if isinstance(variable, nnx.BatchStat) else Kind.BUFFER


def _variables(module: nnx.Module) -> list[tuple[Path, nnx.Variable]]:
    flat: Any = nnx.to_flat_state(nnx.state(module))
    return _lasting(flat)


def _watched(module: nnx.Module) -> tuple[Watch | None, list[tuple[Path, nnx.Variable]]]:
    """What tells whether a module still is as it is, and its Variables, each once.

    It is None where only Flax can tell.
    """
    modules, variables, is_known = [], [], True
    for path, part in nnx.iter_graph(module, graph=True):
        if isinstance(part, nnx.Variable):
            variables.append((path, part))
        elif isinstance(part, nnx.Pytree):
            modules.append(part)
        else:
            is_known = is_known and not graphlib.is_graph_node(part)
    containers = [variable for _, variable in variables]
    watch = Watch(modules, containers, _facts, constant=(HashableMapping, PytreeState))
    return watch if is_known else None, _lasting(variables)


def _lasting(variables: Iterable[tuple[Path, Any]]) -> list[tuple[Path, nnx.Variable]]:
    return [(path, v) for path, v in variables if not isinstance(v, _RESULTS)]


def _facts(variable: nnx.Variable) -> tuple[Any, Collection[Any]]:
    metadata = variable.get_metadata()
    return (*layout(variable.get_raw_value()), *metadata), metadata.values()


def _tree(variable: nnx.Variable) -> Any:
    return jax.tree.structure(variable.get_raw_value())


def _leaves(variables: list[tuple[Path, nnx.Variable]]) -> dict[Path, Any]:
    return {
        leaf_path: leaf
        for path, variable in variables
        for leaf_path, leaf in leaves(path, variable.get_raw_value())
    }


class _VariableCell(LeafCell):
    def _held(self) -> Any:
        return self.container.get_raw_value()

    def _hold(self, value: Any) -> None:
        # The value is concrete, whatever trace is being built around the call.
        _store(self.container, value)


def _store(variable: nnx.Variable, value: Any) -> None:
    """Set a Variable's value: flax's own setters check the trace, and refuse some."""
    object.__setattr__(variable, "_raw_value", value)


class NnxGuest(WatchedGuest):
    """An NNX module, seen from a shim."""

    cell_types: ClassVar[tuple[type, ...]] = (nnx.RNNCellBase,)

    def __init__(self, module: nnx.Module):
        for path, variable in _variables(module):
            if not isinstance(variable, nnx.Variable):
                raise ArgumentError(
                    f"{path_text(path)} is a plain array, which no host can show or train",
                    remedy="Make it an nnx.Variable, or a NumPy constant outside the module",
                )
            if variable.hijax or variable.ref:
                raise ArgumentError(
                    f"{path_text(path)} is a hijax or ref Variable, which cannot be shown live",
                    remedy="Build the module inside nnx.var_defaults(hijax=False, ref=False)",
                )
        _check_functions(module)
        self.native: Any = module

    def _look(self) -> tuple[Watch | None, Looks]:
        watch, _ = _watched(self.native)
        cells = [
            _VariableCell(
                leaf_path, _kind(variable, leaf), variable, index, _tree(variable), inner
            )
            for path, variable in _variables(self.native)
            for inner in [cell_of(variable)]  # of a Variable that shows another's array
            for index, (leaf_path, leaf) in enumerate(leaves(path, variable.get_raw_value()))
        ]
        return watch, Looks(NnxStructure(self.native), cells)

    def call(self, call: Call) -> Any:
        values = self.values()
        out, new, _ = self.structure().run(values, call)
        for cell in self.cells():
            if cell.path in new and new[cell.path] is not values[cell.path]:
                cell.set(new[cell.path])
        return out


def _check_functions(module: nnx.Module) -> None:
    """Refuse attributes whose function reaches the module: a copy would run the original."""
    modules: Any = nnx.iter_modules(module)
    for path, part in modules:
        for name, value in vars(part).items():
            if isinstance(value, nnx.Variable | nnx.Pytree) or not callable(value):
                continue
            if any(isinstance(x, nnx.Module | nnx.Variable) for x in captured(value)):
                raise UnsupportedStructureError(
                    f"{path_text((*path, name))} is a function that holds a module or Variable",
                    remedy="Make it a method, or a module",
                )


def _without_results(module: nnx.Module) -> nnx.Module:
    """The module, or a copy without what its calls have sown."""
    flat: Any = nnx.to_flat_state(nnx.state(module))
    if any(isinstance(variable, _RESULTS) for _, variable in flat):
        module = nnx.clone(module)
        nnx.pop(module, nnx.Any(*_RESULTS))
    return module


@dataclasses.dataclass(frozen=True)
class _Copy:
    """A private copy of a module.

    Attributes:
        module: the copy.
        watch: tells whether it is as it was made, but for values.
        variables: its Variables, by path.
        trace: where it was made: Variables can be changed in no other trace.
    """

    module: nnx.Module
    watch: Watch | None
    variables: list[tuple[Path, nnx.Variable]]
    trace: Any

    def fill(self, trees: Mapping[Path, Any]) -> None:
        for path, variable in self.variables:
            _store(variable, trees[path])

    def clear(self) -> None:
        """Let the arrays go."""
        for _, variable in self.variables:
            _store(variable, None)


def _is_of_arrays(out: Any) -> bool:
    """Whether an output holds arrays alone, and so no part of the module that gave it."""
    kinds = nnx.Variable | nnx.Pytree
    flat = jax.tree.leaves(out, is_leaf=lambda part: isinstance(part, kinds))
    return all(isinstance(leaf, jax.Array) for leaf in flat)


class NnxStructure(Structure):
    """The graph definition of a module, and the tree of each Variable's value."""

    renews = True

    def __init__(self, module: nnx.Module):
        self.guest_type: type = type(module)
        self.base_type: type = nnx.Module
        self.forward: Callable[..., Any] = type(module).__call__
        self.fills: frozenset[str] = frozenset(("deterministic", "rngs"))
        self._definition, state = nnx.split(_without_results(module))
        flat: Any = nnx.to_flat_state(state)
        self._makers = {path: (type(v), v.get_metadata(), _tree(v)) for path, v in flat}
        has_streams = any(issubclass(cls, nnx.RngState) for cls, _, _ in self._makers.values())
        modules: Any = nnx.iter_modules(module)
        self._waits = any(_waits_for_stream(part, has_streams) for _, part in modules)
        self._is_watched = any(_wants_batch(part) for _, part in nnx.iter_modules(module))
        self._paths = {p: [q for q, _ in leaves(p, v.get_raw_value())] for p, v in flat}
        self.kinds: Mapping[Path, Kind] = {
            leaf_path: _kind(variable, leaf)
            for path, variable in flat
            for leaf_path, leaf in leaves(path, variable.get_raw_value())
        }
        self.named: Collection[Path] = named_paths(nnx.iter_modules(module), self.kinds)
        found = {path: partitioning_of(variable) for path, variable in flat}
        self.partitionings: Mapping[Path, Partitioning] = {
            path: names for path, names in found.items() if names
        }
        if isinstance(module, nnx.RNNCellBase):
            self.feature_axes: int | None = module.num_feature_axes
        trees = tuple((path, tree) for path, (_, _, tree) in self._makers.items())
        self._key = (self._definition, trees)
        self._spare: dict[bool | None, list[_Copy]] = {}

    def __eq__(self, other: object) -> bool:
        return type(other) is NnxStructure and (self is other or self._key == other._key)

    def __hash__(self) -> int:
        return hash(self._key)

    def build(self, values: Mapping[Path, Any]) -> Any:
        trees = self._trees(values)
        flat = {
            path: cls.from_metadata(trees[path], metadata)
            for path, (cls, metadata, _) in self._makers.items()
        }
        return nnx.merge(self._definition, nnx.from_flat_state(flat))

    def _trees(self, values: Mapping[Path, Any]) -> dict[Path, Any]:
        """What the Variables hold, by their paths."""
        check_partitionings(self, values)
        return {
            path: jax.tree.unflatten(tree, [values[leaf] for leaf in self._paths[path]])
            for path, (_, _, tree) in self._makers.items()
        }

    def run(
        self, values: Mapping[Path, Any], call: Call
    ) -> tuple[Any, dict[Path, Any], Structure]:
        copy = self._copy(values, call.training)
        module = copy.module
        method = getattr(module, call.method)
        with _noting_singles() as singles:
            out = finished(call, method(*call.args, **self._rngs(method, call), **call.kwargs))
        if copy.watch is not None and copy.watch.holds():
            new = _leaves(copy.variables)
            _check_singles(singles, values, new)
            if _is_of_arrays(out):
                copy.clear()
                self._spare.setdefault(call.training, []).append(copy)
            else:
                _unwatch_batches(module)
            return out, new, self
        nnx.pop(module, nnx.Any(*_RESULTS))
        if nnx.graphdef(module) != nnx.graphdef(self._private(values, call.training)):
            raise UnsupportedStructureError(
                f"{self.guest_type.__qualname__}.{call.method} changes attributes or makes "
                f"Variables, which a private copy would lose",
                remedy="Call it on the module itself: shim.unwrap()",
            )
        _unwatch_batches(module)
        new = _leaves(_variables(module))
        _check_singles(singles, values, new)
        return out, new, self

    def _copy(self, values: Mapping[Path, Any], training: bool | None) -> _Copy:
        """A private copy for one call: that of an earlier one in the same trace, if it left
        nothing behind; a thread that has taken it has it alone."""
        with contextlib.suppress(KeyError, IndexError):
            copy = self._spare[training].pop()
            if copy.trace == get_opaque_trace_state():
                copy.fill(self._trees(values))
                return copy
        module = self._private(values, training)
        return _Copy(module, *_watched(module), get_opaque_trace_state())

    def _private(self, values: Any, training: bool | None) -> Any:
        """A private copy in a mode, or in the guest's own where the host has none."""
        module = self.build(values)
        if training is not None:
            (module.train if training else module.eval)()
        if training is not False and self._is_watched:
            _watch_batches(module)
        return module

    def initial_carry(
        self,
        values: Mapping[Path, Any],
        input_shape: tuple[Any, ...],
        key: Callable[[], jax.Array],
    ) -> Any:
        cell: Any = self.build(values)
        return cell.initialize_carry(input_shape, nnx.Rngs(key()))

    def _rngs(self, method: Any, call: Call) -> dict[str, Any]:
        """The host's key, for a call that takes ``rngs`` and natively fails without: where it
        has no default, or where a part has no stream of its own."""
        if "rngs" not in parameter_names(method):
            return {}
        left = list(inspect.signature(method).parameters.values())[len(call.args) :]
        own = next((p for p in left if p.name == "rngs"), None)
        if own is None or "rngs" in call.kwargs:
            return {}
        if own.default is own.empty:
            return {"rngs": nnx.Rngs(call.key())}
        if call.training is False or not self._waits:
            return {}
        try:
            return {"rngs": nnx.Rngs(call.key())}
        except MissingKeyError:  # the guest says so, if it needs one
            return {}


def _wants_batch(module: Any) -> bool:
    """Whether a module takes statistics of its input over all axes but those of features."""
    is_norm = isinstance(module, nnx.BatchNorm) and module.axis_name is None
    return is_norm and type(module).__call__ is nnx.BatchNorm.__call__


# The inputs without a batch that a guest's batch normalisations have met, during its call.
_singles: ContextVar[list[tuple[Path, Any]]] = ContextVar("singles")


@contextlib.contextmanager
def _noting_singles() -> Iterator[list[tuple[Path, Any]]]:
    found: list[tuple[Path, Any]] = []
    token = _singles.set(found)
    try:
        yield found
    finally:
        _singles.reset(token)


def _check_singles(
    singles: list[tuple[Path, Any]], values: Mapping[Path, Any], new: Mapping[Path, Any]
) -> None:
    """Refuse statistics that have changed by an input without a batch."""
    for path, shape in singles:
        if new[*path, "mean"] is not values[*path, "mean"]:
            raise no_batch("BatchNorm", path, shape)


@dataclasses.dataclass(frozen=True)
class _Watching:
    """Promotes the dtypes of a batch normalisation, and sees each of its inputs. The layer's
    class stays its own, for a guest that asks for it."""

    promote: Callable[..., Any]
    axis: Any
    path: Path

    def __call__(self, values: Any, **options: Any) -> Any:
        shape = jnp.shape(values[0])
        if len(shape) == np.size(self.axis):
            _singles.get([]).append((self.path, shape))
        return self.promote(values, **options)


def _watch_batches(module: nnx.Module) -> None:
    """Let a private copy note inputs that have feature axes alone."""
    modules: Any = nnx.iter_modules(module)
    for path, part in list(modules):
        if _wants_batch(part):
            part.promote_dtype = _Watching(part.promote_dtype, part.axis, tuple(path))


def _unwatch_batches(module: nnx.Module) -> None:
    """Undo ``_watch_batches`` for a copy that a call may have returned parts of."""
    modules: Any = nnx.iter_modules(module)
    for _, part in list(modules):
        if isinstance(getattr(part, "promote_dtype", None), _Watching):
            part.promote_dtype = part.promote_dtype.promote


def _waits_for_stream(module: Any, has_streams: bool) -> bool:
    """Whether a module of a guest, which has streams or none, may ask for that of a call. Of
    Flax's own layers only dropouts do, and stacks pass it on to functions."""
    held = vars(module)
    is_own = type(module).__module__.startswith("flax.")
    functions = module.layers if isinstance(module, nnx.Sequential) else ()
    is_known = is_own and all(
        isinstance(f, nnx.Module) or is_plain(f, "flax") for f in functions
    )
    if not (has_streams or is_known):
        return True
    rate = held.get("rate", held.get("dropout_rate", 0 if is_own else 1))
    return held.get("rngs", module) is None and rate != 0
