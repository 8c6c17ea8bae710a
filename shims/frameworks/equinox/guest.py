"""Equinox as a guest.

The values are the arrays of the module's tree, and those of its ``State`` under the paths of
the indices. A module sees one example: the guest maps it over leading axes of every array
argument, splits the key, and keeps one state for the batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import equinox as eqx
import jax
import numpy as np

from interop.errors import ArgumentError, MissingKeyError
from interop.frameworks.equinox.adapter import is_index

from ...core import Call, Guest, Kind, Path, Structure, check_key, is_plain, leaves, path_of


def _flatten(module: Any) -> tuple[list[tuple[Path, Any]], Any]:
    """The leaves of a module with their paths, state indices whole, and its structure."""
    return leaves((), module, is_index), jax.tree.structure(module, is_leaf=is_index)


def _kind(leaf: Any) -> Kind:
    return Kind.PARAMETER if eqx.is_inexact_array(leaf) else Kind.BUFFER


def _frozen(module: Any) -> list[Path]:
    """Paths of what paramax's ``NonTrainable`` wraps; the module unwraps it itself."""

    def is_frozen(x: Any) -> bool:
        cls = type(x)
        return (cls.__module__, cls.__name__) == ("paramax.wrappers", "NonTrainable")

    flat, _ = jax.tree_util.tree_flatten_with_path(module, is_leaf=is_frozen)
    return [path_of(keys) for keys, leaf in flat if is_frozen(leaf)]


class EquinoxGuest(Guest):
    """An Equinox module and its state, seen from a shim."""

    cell_types: ClassVar[tuple[type, ...]] = (eqx.nn.LSTMCell, eqx.nn.GRUCell)

    def __init__(
        self,
        module: eqx.Module,
        state: eqx.nn.State | None = None,
        batch_axes: int = 1,
        axis_name: Any = None,
        carry: Any = None,
    ):
        if state is not None and not isinstance(state, eqx.nn.State):
            raise ArgumentError(f"expected an eqx.nn.State, got {type(state).__qualname__}")
        if state is None and any(is_index(leaf) for _, leaf in _flatten(module)[0]):
            raise ArgumentError(
                f"{type(module).__qualname__} is stateful, and its state was not given",
                remedy="Pass state=, what eqx.nn.make_with_state returned beside the module",
            )
        if state is not None:
            _check_state(module, state)
        if not isinstance(batch_axes, int) or batch_axes < 0:
            raise ArgumentError(f"batch_axes must be 0 or more, got {batch_axes!r}")
        self.native: Any = module if state is None else (module, state)
        self._module, self._state = module, state
        self._structure = EquinoxStructure(
            module,
            state,
            batch_axes,
            _names(axis_name) or _own_names(module),
            jax.tree.map(np.asarray, carry),
        )

    def structure(self) -> Structure:
        return self._structure

    def values(self) -> dict[Path, Any]:
        return self._structure.values_of(self._module, self._state)


def _check_state(module: eqx.Module, state: eqx.nn.State) -> None:
    """Refuse a state that is not the module's own.

    Raises:
        ArgumentError: it lacks what the module looks up, or holds more.
    """
    name = type(module).__qualname__
    try:
        own = state.substate(module)
    except KeyError as e:
        raise ArgumentError(
            f"the state is that of another module: it has nothing for {e.args[0]} of {name}",
            remedy="Pass what eqx.nn.make_with_state returned beside the module",
        ) from e
    if len(jax.tree.leaves(own)) != len(jax.tree.leaves(state)):
        raise ArgumentError(
            f"the state holds more than {name} has",
            remedy="Leave it out for a module without state; of that of a whole model pass "
            "state.substate(module)",
        )


def _own_names(module: eqx.Module) -> tuple[Any, ...]:
    """The axes that the module's own batch normalisations reduce over."""

    def is_norm(x: Any) -> bool:
        return isinstance(x, eqx.nn.BatchNorm)

    found = jax.tree.leaves(module, is_leaf=is_norm)
    names = {_names(norm.axis_name) for norm in found if is_norm(norm)}
    if len(names) > 1:
        raise ArgumentError(
            f"the module's layers name their batch axes differently: {sorted(map(str, names))}",
            remedy="Give all of them one axis_name",
        )
    return names.pop() if names else ()


def _names(axis_name: Any) -> tuple[Any, ...]:
    if isinstance(axis_name, list | tuple):
        return tuple(axis_name)
    return () if axis_name is None else (axis_name,)


class EquinoxStructure(Structure):
    """A module's tree without its arrays, and the layout of its state."""

    def __init__(
        self,
        module: eqx.Module,
        state: eqx.nn.State | None,
        batch_axes: int,
        names: tuple[Any, ...],
        carry: Any = None,
    ):
        self.guest_type: type = type(module)
        self.base_type: type = eqx.Module
        self.forward: Callable[..., Any] = type(module).__call__
        self.fills: frozenset[str] = frozenset(("key", "state", "inference", "deterministic"))
        self.batch_axes: int = batch_axes
        self._names = names
        flat, self._tree = _flatten(module)
        self._leaves = [(path, None if eqx.is_array(leaf) else leaf) for path, leaf in flat]
        self._is_array = [eqx.is_array(leaf) for _, leaf in flat]
        self._state_tree = None if state is None else jax.tree.structure(state)
        self._state_paths = [] if state is None else _state_paths(flat, self._state_tree)
        frozen = _frozen(module)
        kinds = {
            path: Kind.BUFFER if any(path[: len(f)] == f for f in frozen) else _kind(leaf)
            for path, leaf in flat
            if eqx.is_array(leaf)
        }
        kinds |= dict.fromkeys(self._state_paths, Kind.STATISTIC)
        self.kinds: Mapping[Path, Kind] = kinds
        self._example_rank = _example_rank(module)
        self._draws = {mode: _draws(module, mode) for mode in (True, False, None)}
        static = tuple(
            (path, "a state" if is_index(leaf) else leaf)
            for (path, leaf), is_array in zip(self._leaves, self._is_array, strict=True)
            if not is_array
        )
        self._key = (
            self._tree,
            static,
            self._state_tree,
            tuple(self.kinds),
            batch_axes,
            names,
            _contents(carry),
        )
        self._own_carry = carry is not None
        self._initial = _initial_carry(module) if carry is None else carry
        if self._initial is not None:
            self.feature_axes: int | None = int(getattr(module, "num_feature_axes", 1))

    def __eq__(self, other: object) -> bool:
        return type(other) is EquinoxStructure and (self is other or self._key == other._key)

    def __hash__(self) -> int:
        return hash((self.guest_type, tuple(self.kinds), self.batch_axes, self._names))

    def values_of(self, module: eqx.Module, state: eqx.nn.State | None) -> dict[Path, Any]:
        """The arrays of a module and a state of this structure, by path."""
        flat, _ = _flatten(module)
        values = {path: leaf for path, leaf in flat if path in self.kinds}
        if state is not None:
            values |= zip(self._state_paths, jax.tree.leaves(state), strict=True)
        return values

    def build(self, values: Mapping[Path, Any]) -> Any:
        module, state = self._build(values)
        return module if state is None else (module, state)

    def _build(self, values):
        flat = [
            values[path] if is_array else leaf
            for (path, leaf), is_array in zip(self._leaves, self._is_array, strict=True)
        ]
        module = jax.tree.unflatten(self._tree, flat)
        if self._state_tree is None:
            return module, None
        state = jax.tree.unflatten(self._state_tree, [values[p] for p in self._state_paths])
        return module, state

    def run(
        self, values: Mapping[Path, Any], call: Call
    ) -> tuple[Any, dict[Path, Any], Structure]:
        self._check_rank(call, self.batch_axes)
        return self._run(values, call, self.batch_axes)

    def step(
        self, values: Mapping[Path, Any], call: Call
    ) -> tuple[tuple[Any, Any], dict[Path, Any], Structure]:
        if len(call.args) < 2:
            raise ArgumentError(
                f"{self.guest_type.__qualname__} is called with its carry and one input",
                remedy="Start from initialize_carry",
            )
        carry, x, *rest = call.args
        axes = self._axes(carry, x)
        call = dataclasses.replace(call, args=(x, carry, *rest))
        out, new, after = self._run(values, call, axes)
        if not self._own_carry:  # the output is the first part of Equinox's own hidden states
            out = (out, jax.tree.leaves(out)[0])
        if not isinstance(out, tuple) or [_tree(out[0]), len(out)] != [_tree(carry), 2]:
            raise ArgumentError(
                f"{self.guest_type.__qualname__} is called as a recurrent cell and returns "
                f"{_tree(out)}, which does not hold its carry {_tree(carry)}",
                remedy="Return (carry, output), and the carry as it came"
                if self._own_carry
                else "Pass carry=, and return (carry, output)",
            )
        return out, new, after

    def initial_carry(
        self,
        values: Mapping[Path, Any],
        input_shape: tuple[Any, ...],
        key: Callable[[], jax.Array],
    ) -> Any:
        batch = tuple(input_shape)[: len(input_shape) - self._rank]
        return jax.tree.map(
            lambda leaf: jax.numpy.broadcast_to(leaf, (*batch, *leaf.shape)), self._initial
        )

    @property
    def _rank(self) -> int:
        return self.feature_axes or 0

    def _axes(self, carry: Any, x: Any) -> int:
        """The batch axes of a cell's call."""
        wanted = _tree(self._initial)
        if _tree(carry) != wanted:
            raise ArgumentError(
                f"the carry of {self.guest_type.__qualname__} has the structure {wanted}, got "
                f"{_tree(carry)}",
                remedy="Start from initialize_carry",
            )
        pairs = zip(jax.tree.leaves(carry), jax.tree.leaves(self._initial), strict=True)
        axes = max(map(jax.numpy.ndim, jax.tree.leaves(x)), default=0) - self._rank
        if any(jax.numpy.ndim(leaf) - one.ndim != axes for leaf, one in pairs):
            raise ArgumentError(
                f"the batch axes of carry and input differ: {self.guest_type.__qualname__} "
                f"got {jax.tree.map(jax.numpy.shape, (carry, x))}",
                remedy="Start from initialize_carry with the input's shape",
            )
        return axes

    def _run(self, values, call, axes: int):
        module, state = self._build(values)
        if call.training is not None:
            module = eqx.nn.inference_mode(module, value=not call.training)
        method = getattr(module, call.method)
        # A method that Equinox has compiled shows its signature on the class alone.
        parameters = inspect.signature(getattr(type(module), call.method)).parameters
        if state is not None and "state" not in parameters:
            raise ArgumentError(
                f"{self.guest_type.__qualname__}.{call.method} has state and takes no argument "
                f"'state'",
                remedy="Name the argument that takes the eqx.nn.State 'state'",
            )

        def one_example(args: Any, kwargs: Any, key: Any, state: Any) -> Any:
            own = {} if state is None else {"state": state}
            if "key" in parameters:
                own["key"] = key
            out = method(*args, **kwargs, **own)
            return (out, None) if state is None else out

        kwargs = dict(call.kwargs)
        key = kwargs.pop("key", None)
        check_key(key)
        missing: MissingKeyError | None = None
        if key is None and "key" in parameters and self._draws[call.training]:
            try:
                key = call.key()
            except MissingKeyError as e:  # for a layer that cannot do without
                missing = e
        batch = self._batch((call.args, kwargs), axes)
        keys = key if key is None or not axes else jax.random.split(key, batch)
        mapped = self._mapped(one_example, batch)
        with self._explaining((call.args, kwargs), axes, missing):
            out, state = mapped(call.args, kwargs, keys, state)
        new = dict(values)
        if state is not None:
            new |= zip(self._state_paths, jax.tree.leaves(state), strict=True)
        return out, new, self

    @contextlib.contextmanager
    def _explaining(
        self, arguments: Any, axes: int, missing: MissingKeyError | None
    ) -> Iterator[None]:
        """Say of a call that fails how the module was mapped.

        Raises:
            ArgumentError: it reduces over an axis by a name that no axis has.
            MissingKeyError: it is ``missing``, and a dropout asks for the key.
        """
        try:
            yield
        except NameError as e:
            if "unbound axis name" not in str(e):
                raise
            raise ArgumentError(
                f"{self.guest_type.__qualname__} reduces over an axis that nothing maps over: "
                f"{str(e).partition('.')[0]}",
                remedy="Set batch_axes=1, or as many as its layers have names, and axis_name= "
                "as they say; or map the shim itself: jax.vmap(..., axis_name=...)",
            ) from e
        except RuntimeError as e:
            if missing is None or "requires a key" not in str(e):
                raise
            raise missing from e
        except (TypeError, ValueError) as e:
            e.add_note(self._seen(arguments, axes))
            raise

    def _seen(self, arguments: Any, axes: int) -> str:
        """For the traceback of a call that failed: what the module was given."""
        shapes = [
            jax.numpy.shape(x) for x in jax.tree.leaves(arguments) if eqx.is_array_like(x)
        ]
        examples = ", ".join(str(shape[axes:]) for shape in shapes)
        return (
            f"{self.guest_type.__qualname__} was mapped over the {axes} leading axes of "
            f"{', '.join(map(str, shapes))}, and saw examples of {examples}. As an Equinox "
            f"module it takes one example, of images with the channels first: give the shim "
            f"a batch of such, in every array argument, or set batch_axes."
        )

    def _check_rank(self, call: Call, axes: int) -> None:
        """Refuse an input that Equinox would take for a matrix, without a word.

        Raises:
            ArgumentError: an example has more or fewer axes than the first layer takes.
        """
        if self._example_rank is None or call.method != "__call__" or not call.args:
            return
        shape = jax.numpy.shape(call.args[0])
        if len(shape) - axes != self._example_rank:
            raise ArgumentError(
                f"{self.guest_type.__qualname__} takes examples of {self._example_rank} axes, "
                f"and its input of {axes} batch axes has the shape {shape}",
                remedy="Give it a batch, or set batch_axes",
            )

    def _batch(self, arguments: Any, axes: int) -> tuple[int, ...]:
        """The sizes of the batch axes.

        Raises:
            ArgumentError: no array has so many axes.
        """
        arrays = [x for x in jax.tree.leaves(arguments) if eqx.is_array_like(x)]
        shapes = [shape for x in arrays if len(shape := jax.numpy.shape(x)) >= axes]
        if axes and not shapes:
            raise ArgumentError(
                f"{self.guest_type.__qualname__} is mapped over {axes} leading "
                f"axes, and its input has fewer",
                remedy="Give it a batch, or set batch_axes",
            )
        return shapes[0][:axes] if axes else ()

    def _mapped(self, function: Callable[..., Any], batch: tuple[int, ...]) -> Any:
        """``function`` of one example as one of batches."""
        names, axes = self._names, len(batch)
        if len(names) == 1 and axes > 1:
            return _merged(_vmapped(function, names), batch)
        return _vmapped(function, (*names, *(None,) * axes)[:axes])

    def module(self, native: Any) -> Any:
        return native if self._state_tree is None else native[0]

    def convert_arguments(self, native: Any) -> dict[str, Any]:
        return {} if self._state_tree is None else {"state": native[1]}


def _example_rank(module: Any) -> int | None:
    """The axes of one example, where the first layer is linear; else it says so itself."""
    if type(module) is eqx.nn.Sequential:
        return _example_rank(module.layers[0]) if module.layers else None
    if type(module) not in (eqx.nn.Linear, eqx.nn.MLP):
        return None
    size: Any = getattr(module, "in_features", None) or getattr(module, "in_size", None)
    return 0 if size == "scalar" else 1


def _initial_carry(module: eqx.Module) -> Any:
    """What one example of Equinox's own cells starts from; None for any other module."""
    if not isinstance(module, EquinoxGuest.cell_types):
        return None
    cell: Any = module
    zeros = np.zeros(cell.hidden_size, cell.weight_hh.dtype)
    return (zeros, zeros) if isinstance(module, eqx.nn.LSTMCell) else zeros


def _contents(tree: Any) -> Any:
    """A tree of concrete arrays as a key."""
    flat, structure = jax.tree.flatten(tree)
    return structure, tuple((x.tobytes(), x.shape, str(x.dtype)) for x in flat)


def _tree(value: Any) -> Any:
    return jax.tree.structure(value)


def _leading_axis(leaf: Any) -> int | None:
    return 0 if eqx.is_array(leaf) and leaf.ndim else None


def _vmapped(function: Callable[..., Any], names: tuple[Any, ...]) -> Callable[..., Any]:
    """``function`` of arguments, keywords, key and state over leading axes of these names."""
    each: Any = _leading_axis
    for name in reversed(names):
        function = eqx.filter_vmap(
            function,
            in_axes=(each, each, each, None),
            out_axes=(eqx.if_array(0), None),
            **({} if name is None else {"axis_name": name}),
        )
    return function


def _merged(function: Callable[..., Any], batch: tuple[int, ...]) -> Callable[..., Any]:
    """``function`` of one leading axis as one of several, which have one name together."""
    axes = len(batch)

    def merge(x: Any) -> Any:
        if not eqx.is_array(x) or not x.ndim:
            return x
        if x.shape[:axes] != batch[: x.ndim]:
            raise ArgumentError(
                f"the batch axes are {batch}, and those of another input {x.shape[:axes]}",
                remedy="Give all of them the same",
            )
        rest = x.shape[axes:]
        full = x.reshape(x.shape + (1,) * (axes - x.ndim))
        return jax.numpy.broadcast_to(full, (*batch, *rest)).reshape(-1, *rest)

    def split(x: Any) -> Any:
        return x.reshape(*batch, *x.shape[1:]) if eqx.is_array(x) else x

    def call(args: Any, kwargs: Any, keys: Any, state: Any) -> Any:
        out, state = function(*jax.tree.map(merge, (args, kwargs, keys)), state)
        return jax.tree.map(split, out), state

    return call


def _state_paths(flat: list[tuple[Path, Any]], tree: Any) -> list[Path]:
    """Paths for the leaves of a state, in its own order, from the indices of the module."""
    numbered = jax.tree.unflatten(tree, range(tree.num_leaves))
    paths: dict[int, Path] = {
        number: leaf_path
        for path, index in flat
        if is_index(index)
        for leaf_path, number in leaves(path, numbered.get(index))
    }
    return [paths.get(number, ("state", number)) for number in range(tree.num_leaves)]


def _draws(module: Any, training: bool | None) -> bool:
    """Whether a call with ``key`` may use it: of Equinox's own layers dropouts alone do."""

    def may(part: Any) -> bool:
        if isinstance(part, eqx.nn.Dropout):
            return training is True or not part.inference
        if isinstance(part, eqx.Module):
            return getattr(eqx.nn, type(part).__name__, None) is not type(part)
        return callable(part) and not is_plain(part, "equinox")

    return training is not False and any(map(may, _parts(module)))


def _parts(part: Any) -> Iterator[Any]:
    """A module and all that it holds."""
    yield part
    if isinstance(part, eqx.Module | dict):
        held = part.values() if isinstance(part, dict) else vars(part).values()
    else:
        held = part if isinstance(part, list | tuple) else ()
    if isinstance(part, functools.partial):
        held = (part.func, *part.args, *part.keywords.values())
    for value in held:
        yield from _parts(value)
