"""Flax Linen as a guest.

The values are the variables that were given with the module, by collection and path. A call
gets them, and every collection but ``params`` may change. The mode is passed as ``train``,
``training``, ``is_training``, ``deterministic`` or ``use_running_average``, where the method
takes one; layers with a mode of their own keep it, and one that would train while the host
evaluates is refused. Keys are given for ``dropout`` and ``params``, to which other streams
fall back, and for the host's other streams, where it has streams with names (NNX); else
``has_rng`` knows no other. A box of partition names is part of the structure, and its array a
value.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError

from interop.errors import (
    ArgumentError,
    ConversionError,
    MissingKeyError,
    UnsupportedStructureError,
)
from interop.frameworks.linen.adapter import boxed, is_box, partitioning_of
from interop.partitioning import Partitioning

from ...core import (
    Call,
    Guest,
    Kind,
    Path,
    Structure,
    check_partitionings,
    is_plain,
    leaves,
    named_paths,
    no_batch,
    path_of,
    path_text,
)
from ...forwarding import parameter_names

_FAILURES = (FlaxError, TypeError, ValueError)
_RESULTS = ("intermediates", "perturbations")
_TRAINING = ("train", "training", "is_training")
_EVALUATION = ("deterministic", "use_running_average")
_FLAGS = {nn.BatchNorm: "use_running_average", nn.Dropout: "deterministic"}
_KINDS = {"batch_stats": Kind.STATISTIC, "carry": Kind.HIDDEN, "cache": Kind.BUFFER}


def _kind(path: Any, leaf: Any) -> Kind:
    if path[0] == "params":
        return Kind.of_parameter(leaf)
    return _KINDS.get(path[0], Kind.BUFFER)


class LinenGuest(Guest):
    """A Linen module and its variables, seen from a shim."""

    cell_types: ClassVar[tuple[type, ...]] = (nn.RNNCellBase,)

    def __init__(self, module: nn.Module, params: Any = None):
        if not isinstance(params, Mapping):
            raise ArgumentError(
                "Linen modules keep their weights outside, and none were given",
                remedy='Pass params=, what module.init(...) returned, {"params": ...}',
            )
        if (
            params
            and "params" not in params
            and not all(isinstance(tree, Mapping) for tree in params.values())
        ):
            raise ArgumentError(
                f"params must map collections to variables, got {sorted(params)}",
                remedy='Pass {"params": ...}',
            )
        self._variables = {
            str(name): tree for name, tree in params.items() if name not in _RESULTS
        }
        strange = [path_text(p) for p, leaf in _leaves(self._variables) if not _is_array(leaf)]
        if strange:
            raise ArgumentError(
                f"params holds what is no array: {', '.join(strange)}",
                remedy="Pass what module.init(...) returned",
            )
        self.native: Any = (module, self._variables)

    def structure(self) -> Structure:
        module, variables = self.native
        return LinenStructure(module, variables)

    def values(self) -> dict[Path, Any]:
        return dict(_leaves(self._variables))


def _is_array(value: Any) -> bool:
    return hasattr(value, "dtype") or isinstance(value, bool | int | float | complex)


def _leaves(variables: Mapping[str, Any]) -> list[tuple[Path, Any]]:
    """The arrays with their paths, in the order of the tree; a box is its array."""
    return [
        pair
        for path, leaf in leaves((), variables, is_box)
        for pair in (leaves(path, leaf.value) if is_box(leaf) else [(path, leaf)])
    ]


def _partitionings(variables: Mapping[str, Any]) -> dict[Path, Partitioning]:
    flat: Any = jax.tree_util.tree_leaves_with_path(variables, is_leaf=is_box)
    found = {path_of(keys): partitioning_of(leaf) for keys, leaf in flat if is_box(leaf)}
    return {path: partitioning for path, partitioning in found.items() if partitioning}


class LinenStructure(Structure):
    """A module, and the tree of its variables."""

    def __init__(self, module: nn.Module, variables: Mapping[str, Any]):
        self.guest_type: type = type(module)
        self.forward: Callable[..., Any] = type(module).__call__
        self._module = module
        self._tree = jax.tree.structure(variables)
        flat = _leaves(variables)
        self._paths = [path for path, _ in flat]
        self.kinds: Mapping[Path, Kind] = {path: _kind(path, leaf) for path, leaf in flat}
        self.partitionings: Mapping[Path, Partitioning] = _partitionings(variables)
        self.base_type: type = nn.Module
        self.fills: frozenset[str] = frozenset((*_TRAINING, *_EVALUATION))
        self.takes_streams = True
        self._draws = _draws(module)
        if isinstance(module, nn.RNNCellBase):
            self.feature_axes: int | None = module.num_feature_axes

    def __eq__(self, other: object) -> bool:
        return type(other) is LinenStructure and (
            self is other or (self._module == other._module and self._tree == other._tree)
        )

    def __hash__(self) -> int:
        return hash((self.guest_type, self._tree))

    def build(self, values: Mapping[Path, Any]) -> Any:
        check_partitionings(self, values)
        return self._module, self._unflatten(values)

    def partitioned(self, partitionings: Mapping[Path, Partitioning]) -> Structure:
        def box(keys: Any, leaf: Any) -> Any:
            is_known = path_of(keys) in self.partitionings
            return boxed(leaf.value, partitionings.get(path_of(keys))) if is_known else leaf

        numbered = self._unflatten({path: i for i, path in enumerate(self._paths)})
        tree_util: Any = jax.tree_util
        other = copy.copy(self)
        other._tree = jax.tree.structure(
            tree_util.tree_map_with_path(box, numbered, is_leaf=is_box)
        )
        other.partitionings = partitionings
        return other

    def _unflatten(self, values):
        return jax.tree.unflatten(self._tree, [values[path] for path in self._paths])

    def run(
        self, values: Mapping[Path, Any], call: Call
    ) -> tuple[Any, dict[Path, Any], Structure]:
        variables = self._unflatten(values)
        method = getattr(type(self._module), call.method)
        named: list[tuple[Path, nn.Module]] = []
        given = _mode(self._module, method, call) | dict(call.kwargs)
        try:
            with nn.intercept_methods(functools.partial(_check_layer, call, named)):
                out, changed = self._module.apply(
                    variables,
                    *call.args,
                    method=method,
                    mutable=[name for name in variables if name != "params"],
                    rngs=_rngs(call) if self._draws else {},
                    **given,
                )
        except _FAILURES as e:
            misfit = self._misfit(
                values, lambda rngs: self._module.init(rngs, *call.args, method=method, **given)
            )
            if misfit is None:
                raise
            raise misfit from e
        _check_grown(variables, changed)
        return out, dict(_leaves({**variables, **changed})), self._with_named(named)

    def _with_named(self, layers: list[tuple[Path, nn.Module]]) -> Structure:
        """The same, with what only a call tells: which of its ``layers`` name an axis."""
        if not layers:
            return self
        other = copy.copy(self)
        other.named = named_paths(layers, self.kinds)
        return other

    def _misfit(
        self, values: Mapping[Path, Any], init: Callable[..., Any]
    ) -> ConversionError | None:
        """What keeps a call that failed from fitting what ``init`` makes for its input.

        What it has beyond that, or of another dtype, alone is no error: Linen takes both.
        """
        rngs = dict.fromkeys(("params", "dropout"), jax.random.key(0))
        try:
            wanted = dict(_leaves(jax.eval_shape(init, rngs)))
        except _FAILURES:  # then it is not the variables' fault, or not theirs alone
            return None
        missing = wanted.keys() - values.keys()
        shapes = {
            path: (jnp.shape(values[path]), wanted[path].shape)
            for path in wanted
            if path in values
        }
        mismatched = [
            f"{path_text(path)} is {list(found)}, wanted {list(shape)}"
            for path, (found, shape) in shapes.items()
            if found != shape
        ]
        if not missing and not mismatched:
            return None
        return ConversionError(
            f"the variables do not fit {self.guest_type.__qualname__} and its input",
            missing=sorted(map(path_text, missing)),
            unexpected=sorted(map(path_text, values.keys() - wanted.keys())),
            mismatched=mismatched,
            remedy="Pass params=, what module.init returned for such an input",
        )

    def initial_carry(
        self,
        values: Mapping[Path, Any],
        input_shape: tuple[Any, ...],
        key: Callable[[], jax.Array],
    ) -> Any:
        cell: Any = self._module
        return cell.initialize_carry(key(), input_shape)

    def module(self, native: Any) -> Any:
        return native[0]

    def convert_arguments(self, native: Any) -> dict[str, Any]:
        return {"params": native[1]}


def _check_grown(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Refuse a collection that a call has given another structure.

    Raises:
        UnsupportedStructureError: as ``sow`` does, whose values are results and no state.
    """
    for name in after:
        if jax.tree.structure(after[name]) != jax.tree.structure(before[name]):
            raise UnsupportedStructureError(
                f"a call changes the structure of the collection {name!r}, as sow does, and "
                f"the next one would not know",
                remedy=f"Leave {name!r} out of params=, and nothing is sown; or make its "
                f"variables before the module is wrapped",
            )


def _mode(module: nn.Module, method: Any, call: Call) -> dict[str, bool]:
    """The host's mode, by the names that the method has for it and the caller left open; but
    Linen's own layers take in the call only what their fields leave open."""
    if call.training is None:
        return {}
    names = parameter_names(method)[1 + len(call.args) :]
    mode = {name: call.training for name in _TRAINING} | {
        name: not call.training for name in _EVALUATION
    }
    return {
        name: value
        for name, value in mode.items()
        if name in names and not (_is_linens(module) and vars(module).get(name) is not None)
    }


def _check_layer(
    call: Call,
    named: list[tuple[Path, nn.Module]],
    run: Any,
    args: Any,
    kwargs: Any,
    context: Any,
) -> Any:
    """Check a layer of the wrapped module that is called. One that names an axis is noted in
    ``named``, by the path of its statistics."""
    layer = context.module
    if context.method_name == "__call__":
        if getattr(layer, "axis_name", None) is not None:
            named.append((("batch_stats", *layer.path), layer))
        _check_mode(call, layer, args, kwargs)
        if isinstance(layer, nn.BatchNorm) and type(layer).__call__ is nn.BatchNorm.__call__:
            _check_batch(layer, args, kwargs)
    return run(*args, **kwargs)


def _flag(name: str, layer: Any, args: Any, kwargs: Any) -> Any:
    given = kwargs.get(name, args[1] if len(args) > 1 else None)
    return getattr(layer, name) if given is None else given


def _check_mode(call: Call, layer: Any, args: Any, kwargs: Any) -> None:
    """Refuse a layer that trains while the host evaluates: the module fixes its mode."""
    flag = _FLAGS.get(type(layer))
    if call.training is not False or flag is None:
        return
    if _flag(flag, layer, args, kwargs) is False and getattr(layer, "rate", 1.0) != 0.0:
        raise ArgumentError(
            f"the host evaluates, and a {type(layer).__name__} of the wrapped "
            f"module has {flag}=False",
            remedy="Give the module's call an argument 'train' or 'deterministic', and "
            "pass it on to its layers",
        )


def _check_batch(layer: nn.BatchNorm, args: Any, kwargs: Any) -> None:
    """Refuse a training input that has feature axes alone."""
    shape = jnp.shape(args[0] if args else kwargs["x"])
    is_training = _flag("use_running_average", layer, args, kwargs) is False
    if is_training and layer.axis_name is None and len(shape) == np.size(layer.axis):
        raise no_batch(type(layer).__name__, layer.path, shape)


def _draws(part: Any) -> bool:
    """Whether calls may draw: of Linen's own layers only those with a dropout rate do. Of
    other modules only a call could tell."""
    if isinstance(part, list | tuple | Mapping):
        held: Any = part.values() if isinstance(part, Mapping) else part
        return any(map(_draws, held))
    if not isinstance(part, nn.Module):
        return callable(part) and not is_plain(part, "flax")
    if not is_own(part):
        return True
    held = vars(part)
    rates = [held.get("rate", 0), held.get("dropout_rate", 0)]
    return rates != [0, 0] or any(_draws(v) for name, v in held.items() if name != "parent")


def is_own(module: nn.Module) -> bool:
    """Whether a module is of one of Linen's layers, and not of a class made from another."""
    return getattr(nn, type(module).__name__, None) is type(module)


def _is_linens(module: nn.Module) -> bool:
    """Whether a module is of one of Linen's layers, or of a class that Linen made of one."""
    return type(module).__module__.startswith(f"{nn.__name__}.")


def _rngs(call: Call) -> dict[str, jax.Array]:
    """Keys for a training call; streams that the host does not name fall back to ``params``."""
    if call.training is False:
        return {}
    try:
        key = call.key()
    except MissingKeyError:  # most guests need none, and Linen says which stream is missing
        return dict(call.streams)
    return {"dropout": key, "params": jax.random.fold_in(key, 0), **call.streams}
