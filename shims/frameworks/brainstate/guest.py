"""BrainState as a guest.

A ``State`` holds a tree of arrays, each of which is a cell. ``brainstate.random.DEFAULT`` is
one state for the whole process: this file gives it a class by which the context of a running
guest, and no other, sees the host's key there. Private API: ``State._value``, for that, and to
look at a State without telling a transformation that it is read; ``TRACE_CONTEXT``, which
tells whether BrainState traces; ``_err_jit_true_branch``, the host callback of
``jit_error_if``, which an exported program cannot have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import threading
from collections.abc import (
    Callable,
    Collection,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
from brainstate import graph
from brainstate._state import TRACE_CONTEXT
from brainstate.random import DEFAULT
from brainstate.transform import _error_if

from interop.errors import (
    ArgumentError,
    ConversionError,
    InteropError,
    UnsupportedStructureError,
)

from ...core import (
    Aval,
    Call,
    Cell,
    Kind,
    LeafCell,
    Looks,
    Path,
    Structure,
    aval_of,
    check_fits,
    finished,
    is_peeking,
    is_traced,
    leaves,
    named_paths,
    no_batch,
    path_text,
)
from ...watching import Watch, WatchedGuest, held, layout

StatePath = tuple[str | int, ...]


def _kind(state: brainstate.State, leaf: Any) -> Kind:
    if isinstance(state, brainstate.ParamState):
        return Kind.of_parameter(leaf)
    if isinstance(state, brainstate.BatchState):
        return Kind.STATISTIC
    return Kind.HIDDEN if isinstance(state, brainstate.ShortTermState) else Kind.BUFFER


class _StateCell(LeafCell):
    def peek(self) -> Any:
        return self._flat(self.container._value)[self.index]

    def _held(self) -> Any:
        return self.container._value if is_peeking() else self.container.value

    def _hold(self, value: Any) -> None:
        self.container.value = value


def forward_of(cls: type[brainstate.nn.Module]) -> Callable[..., Any]:
    """``update``, unless the class overrides the call itself."""
    own_call = cls.__call__ is not brainstate.nn.Module.__call__
    return cls.__call__ if own_call else cls.update


def _watch(nodes: Collection[Any], states: Iterable[brainstate.State]) -> Watch | None:
    """Tells whether a module still is as it is; None where only the graph library can tell."""
    is_known = all(isinstance(node, graph.Node) for node in nodes)
    return Watch(nodes, states, _facts) if is_known else None


# What changes in a State as it is used, and is not for its copies.
_USE = {"_value", "_shim_own", "_level", "_been_writen", "_trace_state"}


def _facts(state: brainstate.State) -> tuple[Any, Collection[Any]]:
    noted = [value for name, value in vars(state).items() if name not in _USE]
    return layout(state._value), noted


class BrainStateGuest(WatchedGuest):
    """A BrainState module, seen from a shim."""

    cell_types: ClassVar[tuple[type, ...]] = (brainstate.nn.RNNCell, brainstate.nn.Dynamics)

    def __init__(self, module: brainstate.nn.Module):
        self.native: Any = module
        self._shims: list[Any] = []
        self._states: list[brainstate.State] = []

    def looks(self) -> Looks:
        for shim in self._shims:
            shim._shim_refresh()
        return super().looks()

    def _look(self) -> tuple[Watch | None, Looks]:
        _refresh(self.native)
        nodes = [node for _, node in graph.iter_node(self.native)]
        self._shims = [node for node in nodes if _is_shim(node)]
        states = graph.flatten(self.native, treefy_state=False)[1].to_flat()
        self._states = list(states.values())
        watch = _watch(nodes, self._states)
        return watch, Looks(BrainStateStructure(self.native), _cells(states))

    def settings(self) -> Hashable:
        return tuple([setting for setting in _settings() if setting[0] != "fit"])

    def call(self, call: Call) -> Any:
        structure: Any = self.structure()
        before = [(state, state.value) for state in self._states]
        try:
            with _random_from(call.key):
                out = _invoke(self.native, call, structure)
            _check_left({state: state.value for state in self._states})
            return out
        except BaseException:
            for state, value in before:
                if state.value is not value:
                    state.value = value
            raise


def _settings() -> tuple[tuple[str, Hashable], ...]:
    """Those of BrainState, by name."""
    found = sorted(brainstate.environ.all().items())
    return tuple([(name, _setting(value)) for name, value in found])


def _setting(value: Any) -> Hashable:
    if type(value) in (bool, int, float, str):
        return type(value), value
    flat, tree = jax.tree.flatten(value)  # a quantity is a tree
    return tree, tuple(_comparable(leaf) for leaf in flat if not is_traced(leaf))


def _cells(states: Mapping[Path, brainstate.State]) -> list[_StateCell]:
    return [
        _StateCell(leaf_path, _kind(state, leaf), state, index, tree, inner)
        for path, state in states.items()
        for tree in [jax.tree.structure(state._value)]
        for inner in [vars(state).get("_shim_cell")]  # of a State that shows another's array
        for index, (leaf_path, leaf) in enumerate(leaves(path, state._value))
    ]


def _states_of(module: brainstate.nn.Module) -> Mapping[Path, brainstate.State]:
    """The states of a private copy, which is looked at once."""
    _refresh(module)
    return graph.flatten(module, treefy_state=False)[1].to_flat()


def _is_shim(node: Any) -> bool:
    return hasattr(type(node), "_shim_refresh")


def _refresh(module: brainstate.nn.Module) -> None:
    """Let the shims in a module show their own guests as they are now."""
    for _, node in graph.iter_node(module):
        if _is_shim(node):
            node._shim_refresh()


def _invoke(module: brainstate.nn.Module, call: Call, structure: BrainStateStructure) -> Any:
    """Call a method of ``module``, which has that ``structure``."""
    method, training = getattr(module, call.method), call.training
    has_mode = training is not None
    mode = brainstate.environ.context(fit=training) if has_mode else contextlib.nullcontext()
    with mode:
        _check_batch(module, call, structure)
        _check_made(module, call)
        try:
            return finished(call, method(*call.args, **call.kwargs))
        except Exception as e:
            if (own := _own_error(e)) is not None:
                raise own from own.__cause__
            if brainstate.environ.get("fit", None) is not None or not _misses_fit(e):
                raise
            raise ArgumentError(
                f"{type(module).__qualname__} works differently in training and evaluation, "
                f"and the host gives no mode",
                remedy="Pass deterministic=True or False, to the shim or to the call",
            ) from e


def _own_error(error: BaseException | None) -> InteropError | None:
    """One of this library's in the errors that ``Sequential`` makes of those of its layers."""
    while isinstance(error, brainstate.BrainStateError):
        error = error.__cause__
    return error if isinstance(error, InteropError) else None


def _check_batch(module: Any, call: Call, structure: BrainStateStructure) -> None:
    """Refuse one example where batch statistics are taken. Its rank is that of ``in_size``:
    of a module without one, the layers take an example for what it is, and say nothing."""
    first, size = next(iter(call.args), None), module.in_size
    shape = getattr(first, "shape", ())
    is_example = call.method == "__call__" and size is not None and len(shape) == len(size)
    if is_example and structure.batch_norms and brainstate.environ.get("fit", None):
        path, name = structure.batch_norms[0]
        raise no_batch(name, path, shape)


def _check_made(module: Any, call: Call) -> None:
    """Refuse ``init_state`` and ``reset_state`` of a module that has none of its own, where
    they would leave the hidden states of its parts as they are, without a word."""
    if call.method not in _MAKE_STATE:
        return

    def has_own(part: Any) -> bool:
        own, inherited = getattr(type(part), call.method), brainstate.nn.Module
        return own is not getattr(inherited, call.method)

    if not has_own(module) and any(map(has_own, module.nodes().values())):
        together = call.method.replace("_", "_all_") + "s"
        raise ArgumentError(
            f"{type(module).__qualname__} has no {call.method} of its own, and that of its "
            f"parts would not be called",
            remedy=f"Call brainstate.nn.{together}(shim.unwrap(), batch_size), and "
            f"shim.refresh() where the shim has it",
        )


_MAKE_STATE = ("init_state", "reset_state")


def _misses_fit(error: BaseException | None) -> bool:
    """Whether an error is, or was made of, that of ``environ`` for a mode that is not set."""
    while error is not None and not (isinstance(error, KeyError) and "fit" in str(error)):
        error = error.__cause__ or error.__context__
    return error is not None


_BATCH_NORMS = tuple(getattr(brainstate.nn, f"BatchNorm{n}d") for n in range(4))


def _takes_batch(node: Any) -> bool:
    """Whether a module takes statistics over the batch, and names no axis."""
    return isinstance(node, _BATCH_NORMS) and node.axis_name is None


class _Start(NamedTuple):
    """A cell whose hidden state is newly made: its structure, and what is made."""

    structure: BrainStateStructure
    shapes: Mapping[Path, Aval | None]


class _Known(NamedTuple):
    """How the last step of a cell started.

    Attributes:
        key: all that it depends on.
        start: how steps of that key start, if it can be known.
        is_asked: whether that was looked at, as it is when a key comes again.
    """

    key: Hashable = None
    start: _Start | None = None
    is_asked: bool = False


class BrainStateStructure(Structure):
    """The graph definition of a module, and the tree of each state's value.

    Attributes:
        batch_norms: paths and class names of the layers that take statistics over the batch,
            and name no axis.
    """

    def __init__(self, module: brainstate.nn.Module):
        numbers = graph.RefMap()
        definition, found = graph.flatten(module, numbers, treefy_state=False)
        states = found.to_flat()
        self._numbers = {path: numbers[state] for path, state in states.items()}
        self.guest_type: type = type(module)
        self.base_type: type = brainstate.nn.Module
        self.forward: Callable[..., Any] = forward_of(type(module))
        self._definition = definition
        # The states without their values: an equal structure may live as long as the process.
        self._states = {
            path: (state.to_state_ref().replace(None), jax.tree.structure(state._value))
            for path, state in states.items()
        }
        self._paths = {
            path: [leaf_path for leaf_path, _ in leaves(path, state._value)]
            for path, state in states.items()
        }
        self.kinds: Mapping[Path, Kind] = {
            leaf_path: _kind(state, leaf)
            for path, state in states.items()
            for leaf_path, leaf in leaves(path, state._value)
        }
        self.carried: Collection[Path] = [
            path for path, kind in self.kinds.items() if kind is Kind.HIDDEN
        ]
        if isinstance(module, BrainStateGuest.cell_types):
            size: Any = module.in_size
            self.feature_axes: int | None = 1 if size is None else len(size)
        nodes: Any = module.nodes()
        self.named: Collection[Path] = named_paths(nodes.items(), self.kinds)
        norms = [(path, node) for path, node in nodes.items() if _takes_batch(node)]
        self.batch_norms: Sequence[tuple[Path, str]] = [
            (path, type(node).__name__) for path, node in norms
        ]
        self.unkept: Collection[Path] = [p for p, n in norms if not n.track_running_stats]
        trees = tuple(
            (path, _comparable(type(s)), jax.tree.structure(s._value))
            for path, s in states.items()
        )
        self._key = (_comparable(definition), trees)
        self._hash = hash(self._key)
        self._known = _Known()

    def __eq__(self, other: object) -> bool:
        return type(other) is BrainStateStructure and (
            self is other or (self._hash == other._hash and self._key == other._key)
        )

    def __hash__(self) -> int:
        return self._hash

    def build(self, values: Mapping[Path, Any]) -> Any:
        return self._copy(values)[0]

    def _copy(self, values: Mapping[Path, Any]) -> tuple[Any, dict[Path, Any], list[Any]]:
        """A private copy, its states by path, and its modules."""
        refs = {
            path: ref.replace(
                jax.tree.unflatten(tree, [values[leaf] for leaf in self._paths[path]])
            )
            for path, (ref, tree) in self._states.items()
        }
        flat: Any = refs
        made: dict[int, Any] = {}
        module = graph.unflatten(self._definition, flat, index_ref=made)
        states = {path: made[number] for path, number in self._numbers.items()}
        nodes = [part for part in made.values() if not isinstance(part, brainstate.State)]
        own: dict[int, Any] = {}
        for node in nodes:
            _unshare(vars(node), own)
        return module, states, nodes

    def run(
        self, values: Mapping[Path, Any], call: Call
    ) -> tuple[Any, dict[Path, Any], Structure]:
        module, states, nodes = self._copy(values)
        watch = _watch(nodes, states.values())
        with _random_from(call.key, private={id(state) for state in states.values()}):
            out = _invoke(module, call, self)
            _check_left({state: state.value for state in states.values()})
            if watch is not None and watch.holds():
                return out, self._values_of(states), self
            guest = BrainStateGuest(module)
            return out, guest.values(), guest.structure()

    def starts_anew(self, after: Any, values: Mapping[Path, Any], call: Call) -> bool:
        new = [path for path in after._paths if path not in self._paths]
        if any(k is not Kind.HIDDEN for p, k in after.kinds.items() if p not in self.kinds):
            return False
        if not self._grows_into(after, values):
            return False
        found: list[bool] = []

        def call_again() -> None:
            again, states, _ = after._copy(values)
            with _random_from(_any_key, private={id(s) for s in states.values()}) as stack:
                _invoke(again, call, after)
            found.append(any(states[path] is state for path in new for state in stack.states))
            found.append(BrainStateGuest(again).structure() != after)

        jax.eval_shape(call_again)
        return not any(found)

    def _grows_into(self, after: BrainStateStructure, values: Mapping[Path, Any]) -> bool:
        """Whether ``after``, of a module with those ``values``, has more states, and is else
        the same."""
        module, before = after.build(values), self.build(values)
        for path in after._paths.keys() - self._paths.keys():
            _take_back(module, before, path)
        return BrainStateGuest(module).structure() == self

    def _values_of(self, states: Mapping[Path, brainstate.State]) -> dict[Path, Any]:
        """The values that states of this structure hold now, by path."""
        found: dict[Path, Any] = {}
        for path, state in states.items():
            found |= zip(self._paths[path], jax.tree.leaves(state.value), strict=True)
        return found

    def tracing(self) -> contextlib.AbstractContextManager[None]:
        return _without_checks()

    def takes_carry(self, args: tuple[Any, ...]) -> bool:
        if len(args) < 2 or not self.is_recurrent:
            return False
        parameters = list(inspect.signature(self.forward).parameters.values())[1:]
        most = sum(parameter.kind in _POSITIONAL for parameter in parameters)
        takes_any = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
        return isinstance(args[0], Mapping) or (len(args) > most and not takes_any)

    def step(
        self, values: Mapping[Path, Any], call: Call
    ) -> tuple[tuple[Any, Any], dict[Path, Any], Structure]:
        carry, *inputs = call.args
        batch = self._batch(jnp.shape(jax.tree.leaves(inputs)[0]))
        known = carry if isinstance(carry, Mapping) else {}
        hidden = {
            path: known[name] for path in self.carried if (name := path_text(path)) in known
        }
        started, shapes = self._started({**values, **hidden}, batch)
        hidden = _hidden_from(carry, shapes, self.guest_type)
        given = {**values, **hidden}
        out, new, after = started.run(given, dataclasses.replace(call, args=tuple(inputs)))
        moved = {p: v for p, v in new.items() if after.kinds[p] is Kind.HIDDEN}
        others = {path: value for path, value in new.items() if path not in moved}
        return ({path_text(p): v for p, v in moved.items()}, out), others, self

    def _started(self, values: Mapping[Path, Any], batch: tuple[int, ...]) -> _Start:
        """What a private copy is when its hidden state is newly made.

        It is known when the same comes again, if nothing else is made, which may be of the
        trace that it is made in, and if the batch has a size, not the name of one.

        Raises:
            UnsupportedStructureError: state is made that is not hidden state.
        """
        avals = [aval_of(value) for value in values.values()]
        key = batch, _settings(), tuple(values), tuple(avals)
        known = self._known
        is_again = known.key == key
        if is_again and known.start is not None:
            return known.start
        module, states = self._initialised(values, batch, _any_key)
        cells = _cells(states)
        shapes = {c.path: aval_of(c.get()) for c in cells if c.kind is Kind.HIDDEN}
        others = [path_text(c.path) for c in cells if c.path not in {**values, **shapes}]
        if others:
            raise UnsupportedStructureError(
                f"init_state of {self.guest_type.__qualname__} makes state that is not hidden "
                f"state, and would be lost between steps: {', '.join(sorted(others))}",
                remedy="Make it a HiddenState, or in the constructor",
            )
        start = _Start(BrainStateStructure(module), shapes)
        if not is_again:
            self._known = _Known(key)
        elif not known.is_asked:
            is_lasting = all(isinstance(size, int) for size in batch) and self._grows_into(
                start.structure, {cell.path: cell.get() for cell in cells}
            )
            self._known = _Known(key, start if is_lasting else None, is_asked=True)
        return start

    def initial_carry(
        self,
        values: Mapping[Path, Any],
        input_shape: tuple[Any, ...],
        key: Callable[[], jax.Array],
    ) -> Any:
        _, states = self._initialised(values, self._batch(input_shape), key)
        return _hidden(_cells(states))

    def _batch(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The batch axes of a cell's input; other modules see one example."""
        if self.feature_axes is None:
            return ()
        if len(input_shape) < self.feature_axes:
            raise ArgumentError(
                f"{self.guest_type.__qualname__} takes inputs of {self.feature_axes} axes and "
                f"leading batch axes, got the shape {tuple(input_shape)}"
            )
        return tuple(input_shape[: len(input_shape) - self.feature_axes])

    def _initialised(
        self, values: Mapping[Path, Any], batch: tuple[int, ...], key: Callable[[], jax.Array]
    ) -> tuple[Any, Mapping[Path, brainstate.State]]:
        """A private copy whose hidden state is newly made, and its states.

        ``init_state`` knows one batch axis; it makes the states of several in one.
        """
        start = {path: jnp.zeros(()) for path in self.carried} | dict(values)
        module, own, _ = self._copy(start)
        with _random_from(key, private={id(state) for state in own.values()}):
            size = math.prod(batch)
            arguments: Any = {"batch_size": size} if batch else {}
            brainstate.nn.init_all_states(module, **arguments)
        states = _states_of(module)
        for cell in _cells(states) if len(batch) > 1 else ():
            value = cell.get()
            if cell.kind is Kind.HIDDEN and value.shape[:1] == (size,):
                cell._put(jnp.reshape(value, (*batch, *value.shape[1:])))
        return module, states


def _take_back(module: Any, before: Any, path: Path) -> None:
    """Undo that an attribute was set, at ``path`` or above it, where that can be undone."""
    for part in path:
        held, known = _held(module), _held(before)
        if part not in known:
            held.pop(part, None)
            return
        module, before = held.get(part), known[part]
        if type(module) is not type(before):
            held[part] = before
            return


def _unshare(holder: Any, own: dict[int, Any]) -> None:
    """Give a private copy its own arrays of NumPy and sets, which the module shares with it."""
    pairs = holder.items() if isinstance(holder, dict) else enumerate(holder)
    for name, value in list(pairs):
        if isinstance(value, np.ndarray | set):
            holder[name] = own.setdefault(id(value), value.copy())
        elif type(value) in (dict, list):  # which the copy has made anew
            _unshare(value, own)


def _held(part: Any) -> dict[Any, Any]:
    """What a module or container holds, by the parts of paths; of a list a copy."""
    if isinstance(part, list | tuple):
        return dict(enumerate(part))
    return part if isinstance(part, dict) else vars(part)


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _any_key() -> jax.Array:
    """Draws what is overwritten."""
    return jax.random.key(0)


def _hidden(cells: Iterable[Cell]) -> dict[str, Any]:
    """The hidden state of a module, by the paths of its arrays."""
    return {path_text(cell.path): cell.get() for cell in cells if cell.kind is Kind.HIDDEN}


def _hidden_from(
    carry: Any, shapes: Mapping[Path, Aval | None], guest_type: type
) -> dict[Path, Any]:
    """The hidden state in a carry, which has those ``shapes``.

    Raises:
        ConversionError: the carry does not fit the cell.
    """
    paths = {path_text(path): path for path in shapes}
    given = carry.keys() if isinstance(carry, Mapping) else set[str]()
    if not isinstance(carry, Mapping) or given != paths.keys():
        raise ConversionError(
            f"the carry of {guest_type.__qualname__} is a dict of its hidden states",
            missing=sorted(paths.keys() - given),
            unexpected=sorted(map(str, given - paths.keys())),
            remedy="Start from initialize_carry",
        )
    for name, path in paths.items():
        check_fits(path, Kind.HIDDEN, shapes[path], carry[name])
    return {path: carry[name] for name, path in paths.items()}


# -- what compares --


def _is_readable(array: Any) -> bool:
    return not is_traced(array) and not (isinstance(array, jax.Array) and array.is_deleted())


class _ArrayKey:
    """An array among a module's plain attributes: equal if it holds the same."""

    def __init__(self, array: Any):
        self.array = array.copy() if isinstance(array, np.ndarray) else array

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _ArrayKey):
            return False
        a, b = self.array, other.array
        if not (_is_readable(a) and _is_readable(b)):
            return a is b
        same_kind = a.shape == b.shape and a.dtype == b.dtype
        return a is b or (same_kind and bool(np.array_equal(np.asarray(a), np.asarray(b))))

    def __hash__(self) -> int:
        return hash((self.array.shape, str(self.array.dtype)))


class _SameObject:
    """A value that cannot be hashed: equal to itself only."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SameObject) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _comparable(value: Any, above: tuple[Any, ...] = ()) -> Any:
    """``value`` as a key: a graph definition is dataclasses and tuples down to attributes.

    ``above`` are the objects that it was found in.
    """
    if isinstance(value, jax.Array | np.ndarray):
        return _ArrayKey(value)
    if isinstance(value, tuple | list):
        return (type(value), *(_comparable(part, above) for part in value))
    if isinstance(value, set):
        return (set, frozenset(_comparable(part, above) for part in value))
    if isinstance(value, dict):
        return (dict, *((name, _comparable(part, above)) for name, part in value.items()))
    if dataclasses.is_dataclass(value) and type(value).__module__.startswith(graph.__name__):
        fields = dataclasses.fields(value)
        return (type(value), *(_comparable(getattr(value, field.name)) for field in fields))
    if isinstance(value, type):  # private copies have plain states in the place of views
        return vars(value).get("_shim_base", value)
    is_known = isinstance(value, graph.Node | brainstate.State)
    inner = None if is_known or any(part is value for part in above) else held(value)
    if inner is not None:
        return (_hashable(value), _comparable(inner, (*above, value)))
    return _hashable(value)


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return _SameObject(value)
    return (type(value), value) if isinstance(value, bool | int | float) else value


# -- the host's key in place of brainstate.random's --

_TRACING = threading.RLock()


class _HostKey:
    """What a guest sees of the global random state: the host's key, drawn when first read."""

    def __init__(self, draw: Callable[[], jax.Array]):
        self._draw = draw
        self.level = len(TRACE_CONTEXT.state_stack)

    @functools.cached_property
    def value(self) -> jax.Array:
        return self._draw()


_key_here: ContextVar[_HostKey | None] = ContextVar("key_here", default=None)


class _KeyByContext(type(DEFAULT)):
    """The class of ``DEFAULT``: where a guest runs, in its thread, its tasks and whatever else
    has a copy of its context, the value is another key."""

    @property
    def _value(self) -> Any:
        here = _key_here.get() if self is DEFAULT else None
        return vars(self)["_value"] if here is None else here.value

    @_value.setter
    def _value(self, value: Any) -> None:
        here = _key_here.get() if self is DEFAULT else None
        if here is None:
            vars(self)["_value"] = value
        else:
            here.value = value

    @property
    def stack_level(self) -> int:
        """The transformations around the guest are told nothing: the key is not the state's."""
        here = _key_here.get() if self is DEFAULT else None
        return self._level if here is None else here.level

    @stack_level.setter
    def stack_level(self, level: int) -> None:
        self._level = level


_KeyByContext.__name__ = _KeyByContext.__qualname__ = type(DEFAULT).__name__
DEFAULT.__class__ = _KeyByContext


class _PrivateStates(brainstate.StateTraceStack):
    """Lets a private copy use its own States.

    One that reaches a State of somebody else, by an attribute that is a bound method or a
    function closing over the original module, would compute with the wrong weights: that is
    refused. States made during the call do not come here.
    """

    def __init__(self, private: set[int] | None):
        super().__init__()
        self._private = private

    def new_arg(self, state: Any) -> None:
        is_known = self._private is None or state is DEFAULT or id(state) in self._private
        if not is_known:
            raise UnsupportedStructureError(
                f"the wrapped module uses a {type(state).__qualname__} that is not part of it, "
                f"by an attribute that holds a bound method or a closure",
                remedy="Keep the module that owns the state as an attribute, and call it",
            )


def _check_left(values: Mapping[brainstate.State, Any]) -> None:
    """Refuse what a transformation of JAX inside of the guest has left in its states.

    Raises:
        UnsupportedStructureError: as BrainState does where no shim is around.
    """
    for state, value in values.items():
        if is_traced(value) and _is_outside_traces():
            raise UnsupportedStructureError(
                f"a transformation of JAX inside of the wrapped module writes a "
                f"{type(state).__qualname__}, whose value would outlive it",
                remedy="Use BrainState's own: brainstate.transform.checkpoint, jit, vmap, ...",
            )


def is_tracing() -> bool:
    """Whether BrainState keeps track of what states are read and written."""
    return bool(TRACE_CONTEXT.state_stack)


def _is_outside_traces() -> bool:
    try:
        DEFAULT.check_valid_trace(lambda: "")
    except brainstate.TraceContextError:
        return False
    return True


@contextlib.contextmanager
def _without_checks() -> Iterator[None]:
    """Leave out the host callbacks by which BrainState checks values, such as a probability."""
    with _TRACING:
        found = _error_if._err_jit_true_branch
        _error_if._err_jit_true_branch = lambda *_: None
        try:
            with brainstate.environ.context(ir_compilation=False):
                yield
        finally:
            _error_if._err_jit_true_branch = found


@contextlib.contextmanager
def _random_from(
    draw: Callable[[], jax.Array], *, private: set[int] | None = None
) -> Iterator[Any]:
    """Let the guest draw from the host's key.

    A stack of our own would hide from BrainState that a plain JAX transformation traces a
    guest that is closed over, and let it store tracers. So inside a trace only a private copy
    gets one; a closed-over guest keeps BrainState's own checks, and in a trace of BrainState's
    draws as one that nothing wraps.

    Args:
        draw: draws the host's key.
        private: the ids of a private copy's states, or None where the guest itself runs.
    """
    is_closed_over = private is None and not _is_outside_traces()
    if is_closed_over and is_tracing():
        yield None
        return
    token = _key_here.set(_HostKey(draw))
    try:
        with contextlib.nullcontext() if is_closed_over else _PrivateStates(private) as stack:
            yield stack
    finally:
        _key_here.reset(token)
