"""BrainState as a host.

The shim's ``State``s are views of a live guest's arrays, or hold the current values of a guest
that cannot change in place. A call always runs a private copy of the guest, built from the
States' values, so that BrainState's transformations see every read and write. Private API:
``State._value``, which the views override.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Self

import brainstate
import jax
import jax.numpy as jnp

from interop.errors import ArgumentError, ConversionError, InteropError, MissingKeyError
from interop.registry import registry

from ...core import (
    Call,
    Cell,
    Kind,
    LiveGuest,
    Path,
    Probe,
    Structure,
    Views,
    at,
    attribute_path,
    check_copy,
    first_values,
    guest_of,
    is_cell,
    is_traced,
    jax_arrays,
    nest,
    noting,
    path_text,
    peeking,
    report_of,
)
from ...forwarding import (
    OfInstance,
    cell_signature,
    check_names,
    forwarded,
    refuse_attribute,
    signature_with,
)
from ...materialization import materialize
from ...report import LinkReport
from .cells import CarryCell
from .guest import is_tracing

__all__ = ["FromEquinox", "FromLinen", "FromNNX", "Wrapped"]


# -- views --

# The mixin's methods call those of the State class that it is mixed into.
_Base: Any = brainstate.State if TYPE_CHECKING else object


class _View(_Base):
    """A State that can keep its value in a guest's cell.

    While a transformation runs, its values stay in the State: the guest never sees a tracer, or
    the one member that stands for all while ``brainstate.transform.vmap`` looks for states.
    """

    @property
    def _value(self) -> Any:
        own = vars(self)
        return own["_shim_own"] if "_shim_own" in own else own["_shim_cell"].peek()

    @_value.setter
    def _value(self, value: Any) -> None:
        own: Any = vars(self)
        if self._shim_put(value):
            own.pop("_shim_own", None)
        else:
            own["_shim_own"] = value

    def _shim_put(self, value: Any) -> bool:
        """Whether the guest's array now is ``value``, which may not fit, or be a tracer."""
        cell = vars(self).get("_shim_cell")
        if cell is None:
            return False
        try:
            if value is not cell.peek():
                if is_traced(value):
                    return False
                cell.set(value)
        except ConversionError:
            return False
        return True

    def _read_value(self) -> Any:
        return self._value  # which a dead transformation cannot have left

    def _write_value(self, v):
        """What ``state.value = v`` calls: a value that does not fit the guest is refused."""
        if "_shim_own" not in vars(self):
            self._shim_check(
                v,
                "Write an array of the same shape and dtype; or write to a copy of the shim, "
                "brainstate.graph.clone(shim)",
            )
        super()._write_value(v)

    def restore_value(self, v):
        """What a transformation calls with the value that it leaves, which has to fit too; but
        inside of another one it may be a member's."""
        try:
            if not is_tracing():
                self._shim_check(
                    v,
                    "For an axis of members, as under brainstate.transform.vmap, wrap a module "
                    "whose arrays have it, as nnx.vmap makes it",
                )
        except ConversionError:
            _forget(type(vars(self).get("_shim_own")))
            raise
        super().restore_value(v)

    def _shim_check(self, value: Any, remedy: str) -> None:
        cell = vars(self).get("_shim_cell")
        if cell is not None and value is not cell.peek() and not is_traced(value):
            cell.check(value, remedy)

    def copy(self):
        return _detached(super().copy(), self._value)

    def replace(self, *args: Any, **kwargs: Any) -> Any:
        other = super().replace(*args, **kwargs)
        if not isinstance(other, _View):
            return other
        return _detached(other, vars(other).get("_value", self._value))

    def to_state_ref(self):
        metadata = super().to_state_ref().get_metadata()
        for name in ("_shim_own", "_shim_cell"):
            metadata.pop(name, None)
        return brainstate.TreefyState(type(self).__bases__[1], self._value, **metadata)

    def __pretty_repr_item__(self, k, v):
        if k == "_shim_cell":
            k, v = "_value", self._value
        return None if k == "_shim_own" else super().__pretty_repr_item__(k, v)

    def copy_from(self, other):
        self.value = other.value

    def __deepcopy__(self, memo: Any) -> Structure:
        return self.copy()


def _detached(copy: Any, value: Any) -> Any:
    """Make a copy of a view own its value."""
    vars(copy).pop("_shim_cell", None)
    vars(copy).pop("_value", None)
    vars(copy)["_shim_own"] = value
    return copy


_BASES = {
    Kind.PARAMETER: brainstate.ParamState,
    Kind.STATISTIC: brainstate.BatchState,
    Kind.HIDDEN: brainstate.HiddenState,
    Kind.BUFFER: brainstate.LongTermState,
}
_VIEWS = {
    kind: type(
        f"{base.__name__}View", (_View, base), {"__doc__": _View.__doc__, "_shim_base": base}
    )
    for kind, base in _BASES.items()
}


def _linked(cell: Cell) -> brainstate.State:
    make: Any = _VIEWS[cell.kind]
    view = make(cell.get())
    own = vars(view)
    own.pop("_value")  # the constructor stores it beside the property
    own["_shim_cell"] = cell
    return view


def _is_own(container: Any) -> bool:
    return isinstance(container, brainstate.State) and isinstance(container._value, jax.Array)


_shown: Views[brainstate.State] = Views(_linked, _is_own)


def _forget(tracer: type) -> None:
    """Let the views show their guests again: the transformation whose tracers, of that class,
    they hold stops here."""
    for view in _shown.known():
        if type(vars(view).get("_shim_own")) is tracer:
            vars(view).pop("_shim_own", None)


@functools.cache
def _check_link() -> None:
    """Try that a view works both ways with the installed version.

    Raises:
        InteropError: it does not; the message names the version.
    """

    probe, written = Probe(), jnp.ones(2)
    view = _linked(probe)  # type: ignore[arg-type]
    view.value = written
    copy = view.copy()
    copy.value = jnp.zeros(2)
    if probe.value is not written or view.value is not written or copy.value is written:
        raise InteropError(
            f"views do not work with brainstate {version('brainstate')}",
            remedy="Install a version that this library supports, or convert with interop",
        )


# -- shims --

_METHODS = ("materialize", "unwrap")


def _documented(doc: str) -> Any:
    """A class's documentation, and for its instances the guest's."""
    return OfInstance(lambda shim: inspect.getdoc(shim._shim_structure.forward), doc)


_guests: weakref.WeakKeyDictionary[Any, LiveGuest] = weakref.WeakKeyDictionary()


_SHARED = """
    Of a guest that can change in place (NNX), the States are views: one array, seen by both
    sides at once. Of one that cannot (Linen variables, Equinox), they hold the current
    values, and ``unwrap()`` gives the native object with them. Trainable arrays are
    ``ParamState``s under the guest's own paths, running statistics ``BatchState``s, all else
    ``LongTermState``s.

    ``brainstate.environ``'s ``fit`` reaches the guest; where it is not set, the guest's own
    flags hold. A guest that draws random numbers gets a key from ``brainstate.random``, but not
    in evaluation. A Linen or Equinox module of one's own, which takes a key beforehand, gets
    one at each training call, whether it draws or not; layers of Flax and Equinox that cannot
    draw get none. A guest that holds streams of its own keeps them, and they advance; a call
    that takes ``rngs`` gets the host's where it has no default or a layer has no stream. Under
    ``brainstate.transform.vmap`` such a stream is one value, and all lanes have one mask, as
    with an unsplit stream under ``nnx.vmap``; keys of ``brainstate.random`` differ by lane.
    To a Linen guest ``has_rng`` names only ``dropout`` and ``params``, to which other streams
    fall back.

    A function that closes over a shim sees what one that closes over a native module sees: the
    current values in ``brainstate.transform``; in a transformation of plain JAX the values at
    trace time, as constants, and a call that changes a State there is BrainState's
    ``TraceContextError``.

    A guest that is a recurrent cell makes a :class:`WrappedCell`, a ``brainstate.nn.RNNCell``
    with ``init_state(batch_size)`` and ``update(x)``.

    Raises:
        ArgumentError: ``module`` is a class, or of another framework; a name of the guest
            collides with one of the shim's; weights or state are missing, or those of another
            module; (calls) the input has too few axes, or batch statistics would be taken over
            no batch.
        ConversionError: arrays of the guest were donated; (writes) a value of another shape
            or dtype; (calls) variables of a Linen guest do not fit the input.
    """


def _drawn_key() -> jax.Array:
    """A key from ``brainstate.random``.

    Raises:
        MissingKeyError: its state cannot advance in a plain JAX transformation.
    """
    try:
        return brainstate.random.split_key()
    except brainstate.TraceContextError as e:
        raise MissingKeyError(
            "brainstate.random cannot advance in a transformation of plain JAX",
            remedy="Use brainstate.transform, or evaluate: environ.context(fit=False)",
        ) from e


@contextlib.contextmanager
def _drawing() -> Iterator[Callable[[], jax.Array]]:
    """Draws keys for one call. One that raises leaves the global state as it was before."""
    before: list[Any] = []

    def draw() -> jax.Array:
        value = brainstate.random.DEFAULT.value
        key = _drawn_key()
        before.append(value)
        return key

    try:
        yield draw
    except BaseException:
        if before:
            brainstate.random.DEFAULT.value = before[0]
        raise


def _cell_class(cls: type[Wrapped]) -> type[Wrapped]:
    """The class of cells that belongs to a class of shims."""
    if cls not in _cell_classes:
        _cell_classes[cls] = type(
            f"{cls.__name__}Cell", (WrappedCell, cls), {"__module__": cls.__module__}
        )
    return _cell_classes[cls]


_cell_classes: dict[type, type] = {}


class Wrapped(brainstate.nn.Module):
    __doc__: Any = _documented(
        "A foreign module as a ``brainstate.nn.Module``; see the classes for each framework."
    )

    def __new__(cls, module: Any = None, *args: Any, carry: Any = None, **kwargs: Any) -> Self:
        is_new = not issubclass(cls, WrappedCell) and is_cell(module, carry)
        made: Any = _cell_class(cls) if is_new else cls
        return super().__new__(made)

    def __init__(
        self,
        module: Any,
        params: Any = None,
        state: Any = None,
        batch_axes: int | None = None,
        axis_name: str | tuple[str, ...] | None = None,
        carry: Any = None,
        copy: bool = False,
    ):
        super().__init__()
        guest = guest_of(
            module,
            params=params,
            state=state,
            batch_axes=batch_axes,
            axis_name=axis_name,
            carry=carry,
        )
        _check_link()
        structure = guest.structure()
        check_names(
            structure, host=type(self), keywords=(), methods=_METHODS, paths=structure.kinds
        )
        check_copy(guest, copy=copy)
        if isinstance(guest, LiveGuest):
            _guests[self] = guest
            self._shim_show(guest)
        else:
            values = first_values(guest, copy=copy)
            self._shim_place(
                structure, {p: _BASES[kind](values[p]) for p, kind in structure.kinds.items()}
            )

    @property
    def __signature__(self) -> inspect.Signature:
        return signature_with(self._shim_structure, ())

    def update(self, *args: Any, **kwargs: Any) -> Any:
        return self._shim_run("__call__", args, kwargs)

    def unwrap(self) -> Any:
        """The guest, with its current weights.

        Returns:
            The very module that was wrapped, where its arrays can change in place. Else, and
            for a copy of the shim, a new one that holds the shim's values: ``(module,
            variables)`` for Linen, ``(module, state)`` for a stateful Equinox module.
        """
        guest = _guests.get(self)
        return (
            guest.native
            if guest is not None
            else self._shim_structure.build(self._shim_values())
        )

    def materialize(self, **options: Any) -> brainstate.nn.Module:
        """Turn the shim into a plain BrainState module.

        Args:
            options: those of :func:`shims.materialize`: ``method``, ``sample_input``,
                ``train``, ``copy``, ``verify``, ``report``.

        Returns:
            What ``interop.convert(..., to="brainstate")`` makes of the guest as it is now; or,
            for ``method="trace"``, its forward logic as a traced module. An update of either
            side is not seen by the other.

        Raises:
            InteropError: as :func:`shims.materialize`. Nothing was changed.
        """
        return materialize(self, **options)

    def __getattr__(self, name: str) -> Any:
        structure = vars(self).get("_shim_structure")
        own = () if structure is None else {path[0] for path in structure.kinds}
        if name.startswith("_") or structure is None or name in own:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return forwarded(self._shim_structure.module(self.unwrap()), name, self._shim_run)

    def __setattr__(self, name: str, value: Any) -> None:
        guest = _guests.get(self)  # a copy that is being put together has none
        if guest is not None and not name.startswith("_"):
            refuse_attribute(self._shim_structure.module(guest.native), name)
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ArgumentError(
            f"a live shim of {self._shim_structure.guest_type.__qualname__} cannot be pickled, "
            "nor copied by copy.copy",
            remedy="Save the values of its states(), or shim.materialize(); copy it by "
            "copy.deepcopy(shim)",
        )

    # -- private: every name has the prefix _shim_ --

    def _shim_held(self) -> tuple[Structure, dict[Path, brainstate.State]]:
        return self._shim_structure, self._shim_states()

    def _shim_remade(self, remake: Callable[..., Any], **facts: Any) -> brainstate.nn.Module:
        return remake(self._shim_structure, self._shim_values(), **facts)

    def _shim_report(self) -> LinkReport:
        live = self._shim_refresh()
        shown = self._shim_states()
        return report_of(
            self,
            self._shim_structure,
            {p: (s.value, type(s).__name__, live) for p, s in shown.items()},
            live=live,
        )

    def _shim_run(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        is_step: bool = False,
    ) -> Any:
        with noting(self, method, args, kwargs):
            return self._shim_called(method, args, kwargs, is_step=is_step)

    def _shim_called(
        self, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, is_step: bool
    ) -> Any:
        self._shim_refresh()
        states = self._shim_states()
        values = jax_arrays({path: state.value for path, state in states.items()})
        structure, training = self._shim_structure, brainstate.environ.get("fit", None)
        with _drawing() as draw:
            call = Call(method, args, kwargs, training=training, key=draw)
            out, new, _ = (structure.step if is_step else structure.run)(values, call)
        for path, state in states.items():
            if new.get(path, values[path]) is not values[path]:
                state.value = new[path]
        return out

    def _shim_values(self) -> dict[Path, Any]:
        return {path: state.value for path, state in self._shim_states().items()}

    def _shim_states(self) -> dict[Path, brainstate.State]:
        found: dict[Path, brainstate.State] = {}
        for path in self._shim_structure.kinds:
            state = at(vars(self), attribute_path(path))
            if not isinstance(state, brainstate.State):
                raise ConversionError(
                    "a value of the guest is missing from the shim",
                    missing=[path_text(path)],
                    remedy="Write to the shim's States instead of deleting or replacing them",
                )
            found[path] = state
        return found

    def _shim_refresh(self) -> bool:
        """Show a live guest as it is now; whether there is one."""
        guest = _guests.get(self)
        if guest is not None:
            self._shim_show(guest)
        return guest is not None

    def _shim_show(self, guest: LiveGuest) -> None:
        """Show the guest as it is now: its mode and options, and Variables it has replaced."""
        with peeking():
            structure, cells = guest.looks()
        states = {cell.path: _shown.of(cell) for cell in cells}
        before = vars(self).get("_shim_structure")
        known = {} if before is None else self._shim_states()
        if (
            before is None
            or states.keys() != known.keys()
            or any(states[p] is not known[p] for p in states)
        ):
            self._shim_place(structure, states)
        elif structure != before:
            self._shim_structure = structure

    def _shim_place(
        self, structure: Structure, states: Mapping[Path, brainstate.State]
    ) -> None:
        for path in vars(self).get("_shim_structure", structure).kinds:
            vars(self).pop(str(path[0]), None)
        placed = nest({attribute_path(path): state for path, state in states.items()})
        vars(self).update(placed)
        self._shim_structure = structure


class WrappedCell(CarryCell, Wrapped):
    """A recurrent cell of another framework as a ``brainstate.nn.RNNCell``.

    The classes for each framework make it of a guest that is a cell: an ``RNNCellBase`` of
    NNX or Linen, an Equinox ``LSTMCell`` or ``GRUCell``, and whatever is given with ``carry=``.
    ``init_state(batch_size)`` makes its hidden states, one ``HiddenState`` for each array of
    the guest's carry, in the guest's structure under ``carry``; ``update(x)`` moves them and
    returns the output, also in ``brainstate.transform.for_loop``.

    Attributes:
        carry: the hidden states.
        in_size: the feature axes of the input. Few cells need it to start, such as
            convolutions; set it for those.
    """

    @property
    def __signature__(self) -> inspect.Signature:
        return cell_signature(("inputs",), ())

    @property
    def _shim_name(self) -> str:
        return self._shim_structure.guest_type.__qualname__

    def _shim_step(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        return self._shim_run("__call__", args, kwargs, is_step=True)

    def _shim_start(self, batch: tuple[int, ...]) -> Any:
        self._shim_refresh()
        structure = self._shim_structure
        size: Any = self.in_size
        features = size or (_UnknownSize(),) * (structure.feature_axes or 0)
        size_known = (*batch, *features)
        try:
            with _drawing() as draw:
                return structure.initial_carry(self._shim_values(), size_known, draw)
        except _SizeWantedError as e:
            raise ArgumentError(
                f"{self._shim_name} starts by the size of its input, which is not known",
                remedy="Set it: shim.in_size = (features,), without batch axes",
            ) from e


class _SizeWantedError(Exception):
    """A cell asked for a size that is not known."""


class _UnknownSize:
    """Stands for the size of a feature axis: most cells start without it."""

    def __index__(self) -> int:
        raise _SizeWantedError


def _checked(framework: str, module: Any) -> Any:
    """``module``, which must be ``framework``'s if it is a module at all."""
    found = None if isinstance(module, type) else registry.framework_of(module)
    if found is not None and found != framework:
        raise ArgumentError(
            f"expected a module of {framework}, got one of {found}",
            remedy="shims.wrap finds the framework by itself",
        )
    return module


class FromNNX(Wrapped):
    __doc__: Any = _documented(
        """A Flax NNX module as a ``brainstate.nn.Module`` that shares its arrays.

    Args:
        module: an ``nnx.Module`` instance.
        copy: refused, as it would cut the link; the module has the new values at once when
            the States' are donated.

    Example:
        >>> import shims, jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        >>> shim = shims.FromNNX(layer)
        >>> shim.bias.value = jnp.ones(4)
        >>> layer.bias[...].tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
        + _SHARED
    )

    def __init__(self, module: Any, copy: bool = False):
        super().__init__(_checked("nnx", module), copy=copy)


class FromLinen(Wrapped):
    __doc__: Any = _documented(
        """A Flax Linen module as a ``brainstate.nn.Module`` that holds its variables.

    Args:
        module: a ``flax.linen.Module`` instance.
        params: its variables, ``{"params": ..., "batch_stats": ...}``. Which shapes it wants
            depends on its input: the first call that they do not fit raises a
            ``ConversionError`` with all that is missing or has another shape.
        copy: start from copies of them; otherwise donating the States' values deletes them.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, shims
        >>> module = nn.Dense(4)
        >>> shim = shims.FromLinen(module, module.init(jax.random.key(0), jnp.ones((1, 3))))
        >>> shim(jnp.ones((2, 3))).shape
        (2, 4)
    """
        + _SHARED
    )

    def __init__(self, module: Any, params: Any = None, copy: bool = False):
        super().__init__(_checked("linen", module), params=params, copy=copy)


class FromEquinox(Wrapped):
    __doc__: Any = _documented(
        """An Equinox module as a ``brainstate.nn.Module`` that takes batches.

    Args:
        module: an ``eqx.Module`` instance.
        state: what ``eqx.nn.make_with_state`` returned beside a stateful module.
        batch_axes: leading axes of all array arguments, also those given by name, that the
            module is mapped over.
        axis_name: the name of these axes together, by default as the module's own batch
            normalisations say: their statistics are those of the whole batch. A tuple has one
            name for each.
        carry: what one example starts from, for a recurrent cell of your own: it is called
            ``module(x, carry)`` and returns ``(carry, output)``.
            Its input has one feature axis, or ``module.num_feature_axes``.
        copy: start from copies of the arrays; otherwise donating the States' values deletes
            those of ``module``.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, shims
        >>> shim = shims.FromEquinox(eqx.nn.Linear(3, 4, key=jax.random.key(0)))
        >>> shim(jnp.ones((2, 3))).shape
        (2, 4)
    """
        + _SHARED
    )

    def __init__(
        self,
        module: Any,
        state: Any = None,
        batch_axes: int = 1,
        axis_name: str | tuple[str, ...] | None = None,
        carry: Any = None,
        copy: bool = False,
    ):
        super().__init__(
            _checked("equinox", module),
            state=state,
            batch_axes=batch_axes,
            axis_name=axis_name,
            carry=carry,
            copy=copy,
        )
