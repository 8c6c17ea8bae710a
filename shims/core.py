"""What every shim stands on: the guest, its cells, and the two paths of a call.

A *linked* shim's containers are views of the guest's own; its call runs the guest itself. A
*detached* shim is a copy that the host made (in a transformation, or by cloning): it holds
values of its own, and its call runs a private copy of the guest built from them. The guest is
never bound to foreign values.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import (
    Callable,
    Collection,
    Generator,
    Hashable,
    Iterable,
    Mapping,
    Sequence,
)
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from enum import Enum
from importlib import import_module
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from interop.api import convert_with, no_module
from interop.errors import ArgumentError, ConversionError, UnsupportedStructureError
from interop.parameters import is_quantity
from interop.partitioning import Partitioning
from interop.programs import returned_as_given
from interop.registry import registry

from .report import ArrayRow, LinkReport

__all__ = [
    "Aval",
    "Call",
    "Cell",
    "Guest",
    "Kind",
    "LeafCell",
    "LiveGuest",
    "Noted",
    "Looks",
    "Path",
    "Probe",
    "Structure",
    "Views",
    "at",
    "attribute_path",
    "aval_of",
    "changed_parameters",
    "check_alive",
    "check_copy",
    "check_fits",
    "check_guest",
    "check_kept",
    "check_key",
    "check_partitionings",
    "check_places",
    "commit",
    "described",
    "finished",
    "first_values",
    "guest_of",
    "is_cell",
    "is_peeking",
    "is_plain",
    "is_traced",
    "jax_arrays",
    "leaves",
    "materialize_structure",
    "named_paths",
    "nest",
    "no_batch",
    "noting",
    "path_of",
    "path_text",
    "peeking",
    "recording",
    "report_of",
    "side_of",
]

_tree_util: Any = jax.tree_util  # whose types are declared only in part

Path = tuple[str | int, ...]
"""Where a value is in the guest: its attributes, keys and indices."""


class Kind(Enum):
    """What a value of the guest means, which decides the host's container for it."""

    PARAMETER = "parameter"
    STATISTIC = "running statistic"
    HIDDEN = "hidden state"
    BUFFER = "buffer"

    @classmethod
    def of_parameter(cls, value: Any) -> Kind:
        """What an array among the parameters is: a buffer where it has no gradient."""
        is_inexact = jnp.issubdtype(jnp.result_type(value), jnp.inexact)
        return cls.PARAMETER if is_inexact else cls.BUFFER


_SAME = (
    "Write an array of the same shape and dtype; or change the wrapped module itself, and the "
    "shim shows it as it is"
)


@dataclass(frozen=True, eq=False)
class Cell(ABC):
    """One array of the guest, in place: reading and writing reach the guest itself.

    Attributes:
        path: the guest's own path of the array.
        kind: what it means.
    """

    path: Path
    kind: Kind

    @property
    @abstractmethod
    def identity(self) -> tuple[Any, Hashable]:
        """The guest's container, and which of its arrays this is; ties have one identity."""

    @abstractmethod
    def get(self) -> Any:
        """The array, as the guest holds it now."""

    def peek(self) -> Any:
        """The array, for a container that tells a transformation of the reading itself."""
        return self.get()

    @abstractmethod
    def _put(self, value: Any) -> None: ...

    def set(self, value: Any) -> None:
        """Replace the guest's array.

        Raises:
            ConversionError: as :meth:`check` does; nothing was changed.
        """
        self.check(value)
        self._put(value)

    def check(self, value: Any, remedy: str = _SAME) -> None:
        """Compare ``value`` with the guest's array.

        ``remedy`` is what the caller can do about one that does not fit.

        Raises:
            ConversionError: ``value`` is no array, or has another shape or dtype. The leading
                axis of a hidden state, that of the batch, may have another size.
        """
        check_fits(self.path, self.kind, aval_of(self.get()), value, remedy)


@dataclass(frozen=True, eq=False)
class LeafCell(Cell):
    """One array of the tree that a container of the guest holds.

    Attributes:
        container: what holds the tree.
        index: which of its leaves this is.
        tree: its structure, of which the units of arrays are a part.
        inner: the cell that the container itself shows, if it does.
    """

    container: Any
    index: int
    tree: Any
    inner: Cell | None

    @property
    def identity(self) -> tuple[Any, Hashable]:
        which = self.index, str(self.tree)
        return (self.container, which) if self.inner is None else self.inner.identity

    @abstractmethod
    def _held(self) -> Any: ...

    @abstractmethod
    def _hold(self, value: Any) -> None: ...

    def get(self) -> Any:
        return self._flat(self._held())[self.index]

    def set(self, value: Any) -> None:
        flat = self._flat(self._held())
        check_fits(self.path, self.kind, aval_of(flat[self.index]), value)
        self._put_among(flat, value)

    def peek(self) -> Any:
        return self.get() if self.inner is None else self.inner.peek()

    def _put(self, value: Any) -> None:
        self._put_among(self._flat(self._held()), value)

    def _put_among(self, flat: list[Any], value: Any) -> None:
        flat[self.index] = value
        self._hold(self.tree.unflatten(flat))

    def _flat(self, value: Any) -> list[Any]:
        try:
            flat = self.tree.flatten_up_to(value)
        except ValueError:
            flat = None
        if flat is None or not _tree_util.all_leaves(flat):
            raise ConversionError(
                f"the value has become {_tree_util.tree_structure(value)}, it was {self.tree} "
                f"when it was wrapped",
                path=path_text(self.path),
                remedy="Wrap the module again",
            )
        return flat


_ARRAYS: tuple[type, ...] = (jax.Array, np.ndarray, np.generic)

Aval = tuple[tuple[int, ...], Any]
"""The shape and the dtype of an array."""


def check_fits(
    path: Path, kind: Kind, wanted: Aval | None, value: Any, remedy: str = _SAME
) -> None:
    """Compare ``value`` with what the guest has at ``path``: see :meth:`Cell.check`."""
    known, given = wanted, aval_of(value)
    if kind is Kind.HIDDEN and known is not None and given is not None:
        known, given = (known[0][1:], known[1]), (given[0][1:], given[1])
    if known != given:
        raise ConversionError(
            "the value does not fit",
            path=path_text(path),
            mismatched=[f"wanted {_written(wanted)}, got {_described(value)}"],
            remedy=remedy,
        )


def aval_of(value: Any) -> Aval | None:
    """What counts of an array; None of what is no array."""
    if isinstance(value, jax.Array):
        return value.shape, value.dtype
    if isinstance(value, (bool, int, float, complex)):  # what a container may hold natively
        return (), jax.dtypes.canonicalize_dtype(type(value))
    return (value.shape, value.dtype) if isinstance(value, _ARRAYS) else None


def _described(value: Any) -> str:
    aval = aval_of(value)
    return _written(aval) if aval else type(value).__qualname__


def _written(aval: Aval | None) -> str:
    return f"{aval[1]}{list(aval[0])}" if aval else "what is no array"


View = TypeVar("View")


class Views(Generic[View]):
    """The views of one host: one for each array of a guest, however many shims show it."""

    def __init__(self, make: Callable[[Cell], View], is_view: Callable[[Any], bool]):
        """``is_view`` tells a container of the host's own, which needs no view."""
        self._make, self._is_view, self._lock = make, is_view, threading.Lock()
        # A view keeps its container alive, so that an id in a key is that container's.
        self._views: weakref.WeakValueDictionary[tuple[int, Hashable], View]
        self._views = weakref.WeakValueDictionary()

    def of(self, cell: Cell) -> View:
        """The view of a cell, made at first use."""
        container, index = cell.identity
        if self._is_view(container):
            return cast(View, container)
        with self._lock:
            view = self._views.get((id(container), index))
            if view is None:
                view = self._views[id(container), index] = self._make(cell)
            return view

    def known(self) -> list[View]:
        """All views that were made, and are held by somebody."""
        with self._lock:
            return list(self._views.values())


def path_text(path: Path) -> str:
    """A path as people write it: ``layers[0].weight``."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(parts).removeprefix(".")


class Probe:
    """Stands for a cell when a host tries at first use that its views work."""

    kind = Kind.PARAMETER

    def __init__(self) -> None:
        self.value: Any = np.zeros(2, np.float32)

    def get(self) -> Any:
        return self.value

    peek = get

    def check(self, value: Any, remedy: str = _SAME) -> None:
        pass

    def set(self, value: Any) -> None:
        self.value = value


def is_traced(value: Any) -> bool:
    """Whether a tree holds a value of a transformation in progress."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value))


def named_paths(
    modules: Iterable[tuple[Any, Any]], kinds: Mapping[Path, Kind]
) -> frozenset[Path]:
    """Paths of the values of those ``modules``, given with their paths, that name an axis."""
    named = [
        tuple(path) for path, part in modules if getattr(part, "axis_name", None) is not None
    ]
    return frozenset(p for p in kinds if any(p[: len(n)] == n for n in named))


def check_partitionings(structure: Structure, values: Mapping[Path, Any]) -> None:
    """Compare ``values`` with the axes that the guest has names for.

    Raises:
        ConversionError: an array has gained or lost axes, as under ``vmap``, and no names.
    """
    mismatched = [
        f"{path_text(path)} has {np.ndim(values[path])} axes, and the names {found.names}"
        for path, found in structure.partitionings.items()
        if np.ndim(values[path]) != len(found.names)
    ]
    if mismatched:
        raise ConversionError(
            "the names of mesh axes do not fit the values, which were stacked or taken apart",
            mismatched=mismatched,
            remedy="Take one member, or leave the names out of the wrapped module",
        )


def check_kept(
    structure: Structure, after: Structure, values: Mapping[Path, Any], call: Call
) -> None:
    """Compare a private copy after its call with what its host keeps: the values it had.

    Raises:
        UnsupportedStructureError: it has changed otherwise, and the next call would not know.
    """
    if after == structure or structure.starts_anew(after, values, call):
        return
    new = ", ".join(path_text(path) for path in after.kinds if path not in structure.kinds)
    changes = f"makes {new}" if new else "changes attributes of the module"
    raise UnsupportedStructureError(
        f"{structure.guest_type.__qualname__}.{call.method} {changes}, which a private copy "
        f"of it would lose",
        remedy="Keep what changes between calls in states, and make them before the module is "
        "wrapped",
    )


def finished(call: Call, out: Any) -> Any:
    """What a guest returned, which must not run on when its call is over.

    Raises:
        UnsupportedStructureError: it is a generator or a coroutine.
    """
    if inspect.isgenerator(out) or inspect.isasyncgen(out) or inspect.iscoroutine(out):
        if inspect.iscoroutine(out):
            out.close()  # it warns of one that nobody awaits
        raise UnsupportedStructureError(
            f"{call.method} returns a {type(out).__name__}, which would run when the host's "
            f"mode, key and values are gone",
            remedy="Return a list of what it yields; or call the method on shim.unwrap()",
        )
    return out


def changed_parameters(
    structure: Structure,
    values: Mapping[Path, Any],
    new: Mapping[Path, Any],
    run: Callable[..., Any],
    call: Call,
) -> list[Path]:
    """The parameters that a call has changed.

    Where calls may return arrays anew, they differ in value, or where values are not at hand,
    ``run`` of such a call computes them.
    """
    parameters = [path for path in values if structure.kinds[path] is Kind.PARAMETER]
    changed = [path for path in parameters if new.get(path, values[path]) is not values[path]]
    if not changed or not structure.renews:
        return changed
    if not is_traced([(values[path], new[path]) for path in changed]):
        return [path for path in changed if not np.array_equal(values[path], new[path])]
    again = replace(call, key=lambda: jax.random.key(0))  # the host's key is not drawn twice

    def parameters_after(*given: Any) -> list[Any]:
        _, after, _ = run({**values, **dict(zip(changed, given, strict=True))}, again)
        return [after[path] for path in changed]

    same = returned_as_given(parameters_after, *(values[path] for path in changed))
    return [path for path, is_same in zip(changed, same, strict=True) if not is_same]


def jax_arrays(values: Mapping[Path, Any]) -> Mapping[Path, Any]:
    """The values with JAX's arrays in the place of NumPy's, which a guest could change in place
    for whoever gave them."""
    numpy: Any = jnp
    found: dict[Path, Any] = {p: v for p, v in values.items() if isinstance(v, np.ndarray)}
    made = {path: numpy.asarray(v) for path, v in found.items() if _is_numbers(v)}
    return {**values, **made} if made else values


def _is_numbers(array: Any) -> bool:
    """Whether JAX has such arrays: not of texts and objects."""
    return any(jnp.issubdtype(array.dtype, kind) for kind in (np.bool_, np.number))


def check_alive(values: Mapping[Path, Any]) -> None:
    """Refuse values whose buffers are gone.

    Raises:
        ConversionError: arrays were donated, by the host's side or the guest's.
    """
    gone = [
        path_text(path)
        for path, value in values.items()
        if isinstance(value, jax.Array) and not is_traced(value) and value.is_deleted()
    ]
    if gone:
        raise ConversionError(
            "arrays were donated to a compiled function, by whoever shared them",
            missing=gone,
            remedy="Wrap with copy=True, so that each side has buffers of its own; or write "
            "the new values back first, with write_back where the shim has it",
        )


def commit(guest: LiveGuest, structure: Structure, values: Mapping[Path, Any]) -> None:
    """Write a shim's values into its guest, all or none.

    Args:
        guest: the guest.
        structure: what it was when it was wrapped.
        values: the new values of all its cells.

    Raises:
        ConversionError: the guest has changed, or the values do not fit.
        ArgumentError: they are the tracers of a transformation.
    """
    if guest.structure() != structure:
        raise ConversionError(
            "the wrapped module has changed since it was wrapped",
            remedy="Wrap it again",
        )
    if is_traced(list(values.values())):
        raise ArgumentError(
            "values of a running transformation cannot be written back: the module would keep "
            "them when it is over",
            remedy="Return them from the compiled function, and write them back outside",
        )
    cells, values = list(guest.cells()), jax_arrays(values)
    for cell in cells:
        cell.check(values[cell.path], "Write back arrays of the module's own shapes and dtypes")
    for cell in cells:
        cell.set(values[cell.path])


def first_values(guest: Guest, *, copy: bool) -> dict[Path, Any]:
    """The values that a shim starts from: the guest's arrays, or copies of them.

    Raises:
        ConversionError: arrays were donated.
    """
    values = guest.values()
    check_alive(values)
    return _copied(values) if copy else values


def check_copy(guest: Guest, *, copy: bool) -> None:
    """Refuse ``copy`` in a host that shows a guest's own arrays.

    Raises:
        ArgumentError: the link would be none.
    """
    if copy and isinstance(guest, LiveGuest):
        raise ArgumentError(
            "copy=True would cut the link to a module that changes in place",
            remedy="Leave it out: the module keeps working when the shim's values are donated",
        )


def _copied(values: Mapping[Path, Any]) -> dict[Path, Any]:
    return {p: value.copy() if hasattr(value, "copy") else value for p, value in values.items()}


def check_places(structure: Structure) -> None:
    """Refuse a guest two of whose arrays have one path as text, as hosts write it.

    Raises:
        ArgumentError: keys of a dict differ in their type alone.
    """
    known: dict[tuple[str, ...], Path] = {}
    for path in structure.kinds:
        other = known.setdefault(tuple(map(str, path)), path)
        if other != path:
            raise ArgumentError(
                f"{structure.guest_type.__qualname__} has arrays at {path_text(other)} and "
                f"{path_text(path)}, which is one place in the host",
                remedy="Use other keys than numbers and the same numbers as text",
            )


def attribute_path(path: Path) -> tuple[Any, ...]:
    """Where a value stands in a shim whose attributes hold it: the first part is a name."""
    return (str(path[0]), *path[1:])


def path_of(keys: Any) -> Path:
    """A path of JAX's tree functions as one of ours."""
    return tuple(map(_part, keys))


def leaves(
    path: Path, value: Any, is_leaf: Callable[[Any], bool] = lambda _: False
) -> list[tuple[Path, Any]]:
    """The arrays of a container's value, a tree, with their paths.

    A physical unit is part of the path of its array, so that no host, and no file, takes its
    value for one in another unit.
    """
    if isinstance(value, jax.Array):
        return [(path, value)]

    def is_whole(x: Any) -> bool:
        return is_quantity(x) or is_leaf(x)

    whole = _tree_util.tree_leaves_with_path(value, is_whole)
    found: list[tuple[Path, Any]] = []
    for keys, leaf in whole:
        here = (*path, *path_of(keys))
        is_plain = not is_quantity(leaf)
        found += [(here, leaf)] if is_plain else leaves((*here, _unit(leaf)), leaf.mantissa)
    return found


def _unit(quantity: Any) -> str:
    """A unit as a part of a path: ``mV per ms``; hosts and files have uses for slashes."""
    return str(quantity.unit).replace("/", "per")


def nest(values: Mapping[tuple[Any, ...], Any]) -> dict[Any, Any]:
    """Values by path as nested dicts."""
    tree: dict[Any, Any] = {}
    for path, value in values.items():
        branch = tree
        for part in path[:-1]:
            branch = branch.setdefault(part, {})
        branch[path[-1]] = value
    return tree


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    """What stands at a path of nested dicts; None where nothing does."""
    found: Any = tree
    for part in path:
        if not isinstance(found, dict):
            return None
        branch = cast(dict[Any, Any], found)
        found = branch.get(part)
    return found


def _part(key: Any) -> str | int:
    for name in ("key", "idx", "name"):
        if hasattr(key, name):
            part: Any = getattr(key, name)
            return part if isinstance(part, (str, int)) else str(part)
    return str(key)


@dataclass(frozen=True)
class Call:
    """One call of a guest.

    Attributes:
        method: the method's name, ``"__call__"`` for the call itself.
        args, kwargs: its arguments.
        training: the host's mode; None where the host has none, and the guest's own holds.
        key: draws a random key from the host; raises MissingKeyError where it has none.
        streams: keys of the host's other random streams, by name.
    """

    method: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    training: bool | None
    key: Callable[[], jax.Array]
    streams: Mapping[str, jax.Array] = field(default_factory=dict[str, jax.Array])


class Structure(ABC):
    """All of a guest but its values: compares equal for guests that compute alike.

    Hosts keep it where they keep what compiled functions depend on. Subclasses define
    ``__eq__`` and ``__hash__``.

    Attributes:
        guest_type: the class of the guest's module.
        forward: the guest's call, as its class defines it: for signature and documentation.
        kinds: the kind of each value by path, each container once.
        base_type: the base class of the framework's modules.
        fills: names of arguments of the call that the guest side fills from the mode and the
            key, so that a host's keyword of that name means the same.
        named: paths of the values of layers that take statistics over a named axis, such as
            that of ``jax.vmap``.
        unkept: paths of layers that take statistics over the batch, name no axis, and keep no
            running ones.
        takes_streams: whether calls look for random streams by name.
        partitionings: what the guest notes of how to split its arrays, by path; those without
            a note are left out.
        feature_axes: trailing axes of a recurrent cell's input that are not batch axes; None
            for what is no cell.
        carried: paths of hidden state that ``step`` takes from the carry, not from values.
        batch_axes: leading axes of a call's input that are no part of an example.
        renews: whether calls may return arrays anew that they do not change, as
            transformations of the framework inside of it do.
    """

    guest_type: type
    forward: Callable[..., Any]
    kinds: Mapping[Path, Kind]
    base_type: type
    fills: frozenset[str] = frozenset()
    named: Collection[Path] = ()
    takes_streams: bool = False
    unkept: Collection[Path] = ()
    partitionings: Mapping[Path, Partitioning] = {}
    feature_axes: int | None = None
    carried: Collection[Path] = ()
    batch_axes: int = 1
    renews: bool = False

    @abstractmethod
    def build(self, values: Mapping[Path, Any]) -> Any:
        """The guest's native object, newly made, holding ``values``."""

    @abstractmethod
    def run(
        self, values: Mapping[Path, Any], call: Call
    ) -> tuple[Any, dict[Path, Any], Structure]:
        """Run a private copy.

        Returns:
            The output, the copy's values by path, and its structure, after the call.
        """

    def starts_anew(self, after: Structure, values: Mapping[Path, Any], call: Call) -> bool:
        """Whether calls make their hidden state themselves, so that none has to be kept.

        Args:
            after: the structure that ``run`` returned for ``call``, and not this one.
            values: the values that it returned.
        """
        return False

    def partitioned(self, partitionings: Mapping[Path, Partitioning]) -> Structure:
        """The same with other ``partitionings``."""
        return self

    @property
    def is_recurrent(self) -> bool:
        """Whether ``step`` and ``initial_carry`` can be called."""
        return self.feature_axes is not None or bool(self.carried)

    def takes_carry(self, args: tuple[Any, ...]) -> bool:
        """Whether the arguments of a cell's call are the carry and the inputs; else they are
        the inputs alone, and the guest keeps its hidden state itself."""
        return self.feature_axes is not None

    def step(
        self, values: Mapping[Path, Any], call: Call
    ) -> tuple[tuple[Any, Any], dict[Path, Any], Structure]:
        """Run a private copy of a recurrent cell.

        Args:
            values: the values, of which those of ``carried`` paths are not used.
            call: its arguments are the carry, then the inputs.

        Returns:
            As ``run``, with ``(carry, output)`` for the output.
        """
        return self.run(values, call)

    def initial_carry(
        self,
        values: Mapping[Path, Any],
        input_shape: tuple[Any, ...],
        key: Callable[[], jax.Array],
    ) -> Any:
        """The carry that a recurrent cell starts from.

        Args:
            values: the values, all of them.
            input_shape: the shape of one step's input, ``(*batch, *features)``.
            key: draws a random key from the host.
        """
        raise NotImplementedError

    def module(self, native: Any) -> Any:
        """The module of a native object, where that is more than the module."""
        return native

    def convert_arguments(self, native: Any) -> dict[str, Any]:
        """What ``interop.convert`` takes beside the module of a native object."""
        return {}

    def tracing(self) -> contextlib.AbstractContextManager[None]:
        """The context in which ``run`` is traced into a program that leaves the process."""
        return contextlib.nullcontext()

    def __deepcopy__(self, memo: Any) -> Structure:
        return self

    def __repr__(self) -> str:
        return f"<structure of {self.guest_type.__qualname__}>"


class Guest(ABC):
    """A module of one framework, seen from a shim of another.

    Attributes:
        native: what the user gave: the module, or the module with its weights.
        cell_types: the framework's classes of recurrent cells.
    """

    native: Any
    cell_types: ClassVar[tuple[type, ...]] = ()

    @abstractmethod
    def structure(self) -> Structure:
        """All but the values, as it is now."""

    @abstractmethod
    def values(self) -> dict[Path, Any]:
        """The arrays as they are now, each container once."""


def no_batch(layer: str, path: Path, shape: Iterable[int]) -> ArgumentError:
    """The error for a layer that would take its statistics from one example alone."""
    where = path_text(path) or "its root"
    return ArgumentError(
        f"{layer} takes batch statistics at {where}, and its input of shape {list(shape)} has "
        f"no batch axis",
        remedy="Call it with a batch (a shim that sees one example takes batched=True), or "
        "give the layer an axis_name",
    )


def check_key(key: Any) -> None:
    """Refuse what is no random key.

    Raises:
        ArgumentError: ``key`` is neither None nor an array.
    """
    if not (key is None or isinstance(key, _ARRAYS)):
        raise ArgumentError(
            f"key must be a random key, got {type(key).__qualname__}",
            remedy="Pass key=jax.random.key(seed)",
        )


def is_plain(fn: Any, *packages: str) -> bool:
    """Whether a function is of JAX or NumPy, or of ``packages``: it draws no key by itself."""
    if isinstance(fn, functools.partial):
        partial = cast("functools.partial[Any]", fn)
        held = (partial.func, *partial.args, *partial.keywords.values())
        return all(is_plain(part, *packages) for part in held if callable(part))
    package = (getattr(fn, "__module__", None) or "").partition(".")[0]
    return isinstance(fn, type) or package in ("jax", "jaxlib", "numpy", *packages)


class Looks(NamedTuple):
    """A live guest at one time.

    Attributes:
        structure: all but its values.
        cells: its arrays in place, each container once.
    """

    structure: Structure
    cells: Sequence[Cell]


class LiveGuest(Guest):
    """A guest whose arrays stand in mutable containers."""

    def looks(self) -> Looks:
        """Structure and cells as they are now; the same object again is as it was."""
        return Looks(self.structure(), self.cells())

    @abstractmethod
    def cells(self) -> Sequence[Cell]:
        """The arrays in place, as they are now, each container once."""

    @abstractmethod
    def call(self, call: Call) -> Any:
        """Run the module itself."""

    def settings(self) -> Hashable:
        """What calls depend on that stands outside of the module, but for mode and key."""
        return ()

    def values(self) -> dict[Path, Any]:
        return {cell.path: cell.get() for cell in self.cells()}


def guest_of(module: Any, host: str | None = None, **options: Any) -> Guest:
    """The guest side of ``module``'s framework.

    Args, Raises: as ``check_guest`` has them; and ``ArgumentError`` for a module of ``host``,
    which needs no shim there.
    """
    if host is not None and registry.framework_of(module) == host:
        raise ArgumentError(
            f"{type(module).__qualname__} is a module of {host} already",
            remedy="Use it as it is; shims.wrap returns such a module unchanged",
        )
    make, given = check_guest(module, options)
    return make(module, **given)


def check_guest(
    module: Any, options: Mapping[str, Any]
) -> tuple[Callable[..., Guest], dict[str, Any]]:
    """What makes a guest of ``module``, and the options that were given.

    Args:
        module: a module instance.
        options: what that framework needs beside it (weights, state, batch axes); entries
            that are None are left out.

    Raises:
        ArgumentError: ``module`` is a class, or not a module of a known framework; an option
            does not belong to that framework.
        UnsupportedStructureError: that framework's modules cannot be guests.
    """
    framework = registry.framework_of(module)
    if framework is None:
        raise no_module(module)
    if hasattr(module.__class__, "_shim_report"):
        raise ArgumentError(
            f"{module.__class__.__qualname__} is a shim itself",
            remedy="Wrap what it holds: shim.unwrap()",
        )
    make = side_of(framework, "guest")
    if make is None:
        raise UnsupportedStructureError(
            f"{framework} modules cannot be wrapped live",
            remedy="Convert it with interop.convert, if it is made of known layers",
        )
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - inspect.signature(make).parameters.keys()):
        raise ArgumentError(
            f"{framework} modules do not take {', '.join(unknown)}",
            remedy="Leave the argument out",
        )
    return make, given


def is_cell(module: Any, carry: Any = None) -> bool:
    """Whether ``module`` is a recurrent cell: of its framework's classes of cells, or called
    one by giving the ``carry`` that it starts from."""
    framework = None if isinstance(module, type) else registry.framework_of(module)
    make: Any = None if framework is None else side_of(framework, "guest")
    return make is not None and (carry is not None or isinstance(module, make.cell_types))


def materialize_structure(
    structure: Structure,
    values: Mapping[Path, Any],
    to: str,
    options: Mapping[str, Any],
    *,
    plain: Callable[[Any], Any] = lambda native: native,
    example: tuple[int, ...] | None = None,
) -> Any:
    """What ``interop`` makes of a guest that holds ``values``, for the framework ``to``.

    Arrays whose layout agrees are the same objects. ``plain`` replaces the shims in a native
    object; ``example`` is the shape of one, if it is known.
    """
    native = plain(structure.build(values))
    arguments = structure.convert_arguments(native)
    module = structure.module(native)
    return convert_with(module, to, options=options, sample_input=example, **arguments)


@dataclass(frozen=True)
class Noted:
    """One call of a shim.

    Attributes:
        shim: the shim that was called; transformations call copies.
        args, kwargs: the arguments that go to the guest, described by shape and dtype.
        options: the names of those that the host's shims take themselves.
    """

    shim: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    options: frozenset[str]


_peeking: ContextVar[bool] = ContextVar("peeking", default=False)
is_peeking: Callable[[], bool] = _peeking.get
"""Whether this is inside of :func:`peeking`."""


@contextlib.contextmanager
def peeking() -> Generator[None]:
    """Let cells be looked at inside without a word to the transformation that runs: it is told
    of the containers that show them."""
    token = _peeking.set(True)
    try:
        yield
    finally:
        _peeking.reset(token)


_calls: ContextVar[list[Noted] | None] = ContextVar("calls", default=None)


@contextlib.contextmanager
def recording() -> Generator[list[Noted]]:
    """The calls of shims inside; not those that a guest makes of shims of its own."""
    calls: list[Noted] = []
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


@contextlib.contextmanager
def noting(
    shim: Any,
    method: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    **options: Any,
) -> Generator[bool]:
    """Note a call of ``shim`` if somebody is :func:`recording`; whether that is so.

    ``options`` are those that the host's shims take themselves, or None.
    """
    calls = _calls.get()
    if calls is None:
        yield False
        return
    if method == "__call__":
        given = frozenset(name for name, value in options.items() if value is not None)
        calls.append(Noted(shim, described(args), described(dict(kwargs)), given))
    token = _calls.set(None)
    try:
        yield True
    finally:
        _calls.reset(token)


def described(arguments: Any) -> Any:
    """Arguments with shape and dtype in place of arrays; what is no array stays."""

    def describe(x: Any) -> Any:
        if not (hasattr(x, "shape") and hasattr(x, "dtype")):
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(x, "weak_type", False))

    return jax.tree.map(describe, arguments)


def report_of(
    shim: Any, structure: Structure, shown: Mapping[Path, tuple[Any, str, bool]], *, live: bool
) -> LinkReport:
    """The report of a shim.

    Args:
        shim: the shim.
        structure: its guest.
        shown: for each path the value, the host's container, and whether the guest owns it.
        live: whether a change on one side shows on the other at once.
    """
    rows = tuple(
        ArrayRow(
            path_text(path),
            structure.kinds[path].value,
            "in the state" if value is None else _described(value),
            "guest" if is_guests else "shim",
            container,
        )
        for path, (value, container, is_guests) in shown.items()
    )
    return LinkReport(structure.guest_type.__qualname__, type(shim).__qualname__, live, rows)


def side_of(framework: str, side: str) -> Callable[..., Any] | None:
    """The function ``guest`` or ``host`` of a framework's file; None where it has none."""
    file = f"{__package__}.frameworks.{framework}"
    try:
        return getattr(import_module(file), side, None)
    except ModuleNotFoundError as e:
        if e.name != file:
            raise
        return None
