"""Equinox as a host.

The shim's trainable leaves are the guest's own arrays at construction, and what the tree is
updated to from then on. Everything else that changes stands in a ``StateIndex``. A call runs a
private copy of the guest; ``write_back`` commits the values to the guest.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import equinox as eqx
import jax

from interop.errors import (
    ArgumentError,
    ConversionError,
    MissingKeyError,
    UnsupportedStructureError,
)

from ...core import (
    Call,
    Guest,
    Kind,
    LiveGuest,
    Path,
    Structure,
    at,
    changed_parameters,
    check_alive,
    check_kept,
    check_key,
    check_places,
    commit,
    first_values,
    guest_of,
    jax_arrays,
    nest,
    noting,
    path_text,
    report_of,
)
from ...forwarding import (
    OfInstance,
    check_keywords,
    check_names,
    forwarded,
    is_method,
    signature_with,
    without_self,
)
from ...materialization import materialize
from ...report import LinkReport
from .traced import carry_first

__all__ = ["ToEquinox"]

_KEYWORDS = ("state", "key")
_METHODS = ("materialize", "unwrap", "write_back", "is_stateful")
_METHODS += ("params", "buffers", "inference", "batched")


class _Link:
    """The live guest behind a shim, or none. Shims of one guest compare equal, of two they
    differ. Compiled functions keep links, with the trees that they were called with, and so a
    link keeps no guest alive. A ``mark`` tells one from all others, so that no compiled
    function knows it."""

    def __init__(self, guest: LiveGuest | None, mark: object = None):
        self.mark = mark
        self._make: Any = type(guest)
        self._native = None if guest is None else weakref.ref(guest.native)

    @property
    def guest(self) -> LiveGuest | None:
        native = None if self._native is None else self._native()
        return None if native is None else self._make(native)

    def __eq__(self, other: object) -> bool:
        # All weak references to one object are one object, and stay so when it is gone.
        return isinstance(other, _Link) and (
            self._native is other._native and self.mark is other.mark
        )

    def __hash__(self) -> int:
        return hash(id(self._native))


def _signature(shim: ToEquinox) -> inspect.Signature:
    """The guest's, with ``carry``, ``state`` and ``key``: ``eqx.filter_jit`` binds by it."""
    structure, made = shim._shim_structure, inspect.Parameter
    own = list(signature_with(structure, ("key",)).parameters.values())
    free = [p for p in own if p.kind in (made.POSITIONAL_ONLY, made.POSITIONAL_OR_KEYWORD)]
    rest = own[len(free) :]
    takes_any = any(p.kind is made.VAR_POSITIONAL for p in rest)
    if structure.is_recurrent and not takes_any:
        default = None if shim.batched else made.empty
        carry = made("carry", made.POSITIONAL_OR_KEYWORD, default=default)
        own_state = bool(structure.carried)  # else the guest's call takes the carry as well
        first = free[:1] if own_state else [made("inputs", made.POSITIONAL_OR_KEYWORD)]
        free = [*first, carry, *free[1 if own_state else 2 :]]
    state = made("state", made.POSITIONAL_OR_KEYWORD, default=None)
    if takes_any:
        rest.append(state.replace(kind=made.KEYWORD_ONLY))
        return inspect.Signature(sorted([*free, *rest], key=lambda p: p.kind))
    return inspect.Signature([*free, state, *rest])


_DOC = """A live ``eqx.Module`` around a module of another framework.

    The guest owns its arrays; the leaves of ``params`` are those very arrays, under the
    guest's own paths. Equinox replaces leaves instead of changing them: after training,
    ``write_back`` commits the current ones to the guest, which the shim does not keep alive. A
    deep copy has no link to the guest, and two shims of one guest in a tree are two layers.
    The inexact leaves of the shim are exactly the trainable arrays. Running statistics, hidden
    state and other buffers stand in an ``eqx.nn.State``: build a stateful shim by
    ``eqx.nn.make_with_state(shims.ToEquinox)(layer)`` and call it as ``out, state =
    shim(x, state, key=key)``; one without them as ``shim(x, key=key)``.

    Attributes of the guest that are no arrays are as they were when the shim was made, in a
    module that cannot change; wrap the guest again after setting one.

    Other public methods of the guest take ``state`` and ``key`` as the call does, and run on
    the shim's values: ``shim.encode(x)``. Plain attributes read through.

    A function that closes over a shim keeps its leaves as constants, as with any
    ``eqx.Module``.

    Leaves, state and carries hold values with physical units without them, in the units that
    the guest had when it was wrapped, and a unit is the last part of its value's path,
    ``params["V"]["mV"]``; arguments and results of calls keep theirs.

    Recurrent state is per example, and so an explicit carry: a guest that is a recurrent cell,
    or that has hidden state, is called ``carry, out = shim(x, carry)``, with its input first
    as Equinox's own cells have it, and with the result that the body of ``jax.lax.scan``
    returns; ``shim.initialize_carry(x.shape)`` is what it starts from. With ``batched=True``
    the hidden state of a BrainState guest may also stand in the ``State``.

    Args:
        module: the guest, a module instance.
        batched: whether calls see a whole batch; by default one example, as Equinox's own
            layers do.
        inference: evaluation mode; ``eqx.nn.inference_mode`` switches it.
        params: the variables of a Linen guest.
        copy: start from copies of the guest's arrays. Otherwise donating the shim, as with
            ``eqx.filter_jit(donate="all")``, deletes the guest's arrays too, until
            ``write_back`` gives it new ones.

    Raises:
        ArgumentError: ``module`` is a class, or not a module; a name of the guest collides
            with one of the shim's; the guest has a random stream or other state that is per
            batch, or normalises by the batch's statistics in every mode, and ``batched`` is
            False; (calls) ``carry`` or ``state`` is missing or not
            wanted, or statistics would be taken over no batch.
        MissingKeyError: (calls) the guest draws random numbers, and there is no ``key``.
        ConversionError: arrays of the guest, or (calls) of the shim, were donated.

    Example:
        >>> import brainstate, equinox as eqx, jax, jax.numpy as jnp, shims
        >>> shim = shims.ToEquinox(brainstate.nn.Linear(3, 4))
        >>> jax.vmap(shim)(jnp.ones((2, 3))).shape
        (2, 4)
        >>> len(jax.tree.leaves(eqx.filter(shim, eqx.is_inexact_array)))
        2
    """


class ToEquinox(eqx.nn.StatefulLayer):
    __doc__ = OfInstance(  # type: ignore[assignment]
        lambda shim: inspect.getdoc(shim._shim_structure.forward), _DOC
    )
    params: dict[str, Any]
    buffers: eqx.nn.StateIndex[Any] | None
    inference: bool
    batched: bool = eqx.field(static=True)
    _shim_structure: Structure = eqx.field(static=True)
    _shim_shapes: tuple[tuple[int, ...], ...] = eqx.field(static=True, repr=False)
    _shim_link: _Link = eqx.field(static=True, repr=False)

    def __init__(
        self,
        module: Any,
        batched: bool = False,
        inference: bool = False,
        *,
        params: Any = None,
        copy: bool = False,
    ):
        guest: Guest = guest_of(module, host="equinox", params=params)
        structure, values = guest.structure(), first_values(guest, copy=copy)
        check_names(structure, host=object, keywords=_KEYWORDS, methods=_METHODS, paths=())
        check_places(structure)
        for path, kind in structure.kinds.items():
            streams = jax.numpy.issubdtype(
                jax.numpy.result_type(values[path]), jax.dtypes.prng_key
            )
            hidden = kind is Kind.HIDDEN and path not in structure.carried
            if not batched and (hidden or streams):
                raise ArgumentError(
                    f"{structure.guest_type.__qualname__} keeps {path_text(path)}, "
                    f"{'a random stream' if streams else 'hidden state'}, for a whole batch",
                    remedy="Wrap it with shims.ToEquinox(..., batched=True), and call it with "
                    "batches",
                )
        for path in () if batched else structure.unkept:
            raise _batch_wanted(structure, path)
        trainable = _paths(structure, trainable=True)
        self.params = nest({_place(path): values[path] for path in trainable})
        self.inference = inference
        self.batched = batched
        self._shim_structure = structure
        others = tuple(values[path] for path in self._shim_others)
        self._shim_shapes = tuple(map(jax.numpy.shape, others))
        self.buffers = eqx.nn.StateIndex(others) if others else None
        self._shim_link = _Link(guest if isinstance(guest, LiveGuest) else None)

    __signature__: ClassVar[Any] = OfInstance(
        lambda shim: _signature(shim), without_self(__init__)
    )

    def __copy__(self) -> ToEquinox:
        return self

    def __deepcopy__(self, memo: Any) -> ToEquinox:
        copied = jax.tree.map(lambda x: x.copy() if eqx.is_array(x) else x, self)
        object.__setattr__(copied, "_shim_link", _Link(None))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ArgumentError(
            f"a live shim of {self._shim_structure.guest_type.__qualname__} cannot be pickled",
            remedy="Save its leaves, eqx.tree_serialise_leaves, or shim.materialize()",
        )

    def is_stateful(self) -> bool:
        """Whether calls take and return an ``eqx.nn.State``."""
        return self.buffers is not None

    def __call__(self, *args: Any, state: Any = None, key: Any = None, **kwargs: Any) -> Any:
        return _ToEquinox._shim_run(self, "__call__", args, kwargs, state=state, key=key)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "_shim_link" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

        guest = self._shim_module()
        if is_method(guest, name):
            check_keywords(self._shim_structure, name, _KEYWORDS)

        def run(method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            own = {k: v for k, v in kwargs.items() if k in _KEYWORDS}
            rest = {k: v for k, v in kwargs.items() if k not in _KEYWORDS}
            return self._shim_run(method, args, rest, **own)

        return forwarded(guest, name, run)

    def _shim_module(self) -> Any:
        """The guest's module as it is now, to look attributes up in."""
        if self.buffers is None or self._shim_link.guest is not None:
            return self._shim_structure.module(self._shim_native(None))
        # Of a guest whose arrays stand beside it the module alone is looked at.
        values = {p: at(self.params, _place(p)) for p in self._shim_structure.kinds}
        return self._shim_structure.module(self._shim_structure.build(values))

    def _shim_run(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        state: Any = None,
        key: Any = None,
    ) -> Any:
        if state is None and args and isinstance(args[-1], eqx.nn.State):
            args, state = args[:-1], args[-1]
        cell_args = carry_first(args)
        is_call = method == "__call__"
        is_step = is_call and self._shim_structure.takes_carry(cell_args)
        given = cell_args if is_step else args
        with noting(self, method, given, kwargs, key=key):
            return _ToEquinox._shim_called(self, method, given, kwargs, state, key, is_step)

    def _shim_called(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        state: Any,
        key: Any,
        is_step: bool,
    ) -> Any:
        _ToEquinox._shim_check_state(self, state)
        values = jax_arrays(_ToEquinox._shim_values(self, state))
        structure = self._shim_structure
        if method == "__call__":
            _ToEquinox._shim_check_carry(self, is_step and len(args) > 1)
        else:
            _ToEquinox._shim_check_method(self, method)
        training, draw = not self.inference, _key_source(key)
        call = Call(method, args, kwargs, training=training, key=draw)
        run = structure.step if is_step else structure.run
        out, new, structure_after = run(values, call)  # which may know more of the layers
        check_kept(structure, structure_after, new, call)
        if written := changed_parameters(structure, values, new, run, call):
            raise UnsupportedStructureError(
                f"{structure.guest_type.__qualname__}.{method} writes parameters, which are "
                f"leaves of the shim and stay: {', '.join(map(path_text, written))}",
                remedy="Make what a call changes a state that is no parameter",
            )
        if self.buffers is None or state is None:
            return out
        others = self._shim_others
        after = tuple(new.get(path, values[path]) for path in others)
        if all(a is values[path] for path, a in zip(others, after, strict=True)):
            return out, state
        self._shim_check_statistics(structure_after, values, new)
        return out, state.set(self.buffers, after)

    def initialize_carry(
        self, input_shape: tuple[int, ...], *, state: Any = None, key: Any = None
    ) -> Any:
        """The carry that a recurrent guest starts from.

        Args:
            input_shape: the shape of one step's input, without a batch axis unless calls have
                one.
            state: the current state; by default the guest's buffers as they are.
            key: for guests that ask for one.

        Returns:
            What the guest's framework has for it; of a BrainState guest, a dict of its hidden
            states by path, ``{"h": ..., "c": ...}``.

        Raises:
            ArgumentError: the shim is stateful, and neither ``state`` nor the guest is there.
            UnsupportedStructureError: the guest is no recurrent cell and has no hidden state.
            MissingKeyError: the guest needs a key, and there is none.
        """
        structure = self._shim_structure
        if not structure.is_recurrent:
            raise UnsupportedStructureError(
                f"{structure.guest_type.__qualname__} is no recurrent cell",
                remedy="Derive it from its framework's class of cells, or make its hidden "
                "state, as init_state does, before it is wrapped",
            )
        return structure.initial_carry(self._shim_current(state), input_shape, _key_source(key))

    def unwrap(self, state: Any = None) -> Any:
        """A guest that holds the shim's values; the very guest that was wrapped where the
        shim still holds the guest's own arrays.

        Args:
            state: the current state; by default the guest's buffers as they are.

        Returns:
            The native object: the module, or ``(module, variables)`` for Linen.

        Raises:
            ConversionError: arrays were donated.
        """
        check_alive(self._shim_current(state))
        return self._shim_native(state)

    def _shim_native(self, state: Any) -> Any:
        values = self._shim_current(state)
        guest = self._shim_link.guest
        if guest is not None:
            own = guest.values()
            if own.keys() == values.keys() and all(own[p] is values[p] for p in own):
                return guest.native
        return self._shim_structure.build(values)

    def materialize(self, state: Any = None, **options: Any) -> Any:
        """Turn the shim into a plain Equinox module, in the shim's mode.

        Args:
            state: the current state; by default the guest's buffers as they are.
            options: those of :func:`shims.materialize`: ``method``, ``sample_input``,
                ``train``, ``copy``, ``verify``, ``report``.

        Returns:
            What ``interop.to_equinox`` makes of the guest with the shim's values, which sees
            one example; or, for ``method="trace"``, its forward logic as a traced module,
            which takes what the shim takes. With ``state``, ``(module, state)``; without, use
            ``eqx.nn.make_with_state`` where the result has state.

        Raises:
            InteropError: as :func:`shims.materialize`.
        """
        return materialize(self, state=state, **options)

    def write_back(self, state: Any = None) -> None:
        """Commit the shim's values to the guest, all or none.

        Args:
            state: the current state; without it the guest's buffers stay as they are.

        Raises:
            ArgumentError: the guest cannot change in place, or the values are those of a
                running transformation.
            ConversionError: shapes or dtypes differ; nothing was written.
        """
        guest = self._shim_link.guest
        if guest is None:
            raise ArgumentError(
                f"{self._shim_structure.guest_type.__qualname__} cannot change in place, or is "
                f"gone because nothing else refers to it",
                remedy="shim.unwrap(state) makes a new one that holds the values",
            )
        commit(guest, self._shim_structure, self._shim_current(state))

    # -- private: every name has the prefix _shim_ --

    def _shim_remade(self, remake: Callable[..., Any], state: Any, **facts: Any) -> Any:
        return remake(
            self._shim_structure,
            self._shim_current(state),
            **facts,
            is_batched=self.batched,
            finish=lambda made: eqx.nn.inference_mode(made, value=self.inference),
        )

    def _shim_report(self) -> LinkReport:
        structure, guest = self._shim_structure, self._shim_link.guest
        own = {} if guest is None else guest.values()
        shown: dict[Path, tuple[Any, str, bool]] = {}
        for path in _paths(structure, trainable=True):
            leaf = at(self.params, _place(path))
            shown[path] = leaf, ".".join(("params", *_place(path))), own.get(path) is leaf
        for path in _paths(structure, trainable=False):
            place = "eqx.nn.State" if path in self._shim_others else "carry"
            shown[path] = own.get(path), place, False
        return report_of(self, structure, shown, live=False)

    def _shim_values(self, state: Any) -> dict[Path, Any]:
        structure = self._shim_structure
        trainable = _paths(structure, trainable=True)
        values = {path: at(self.params, _place(path)) for path in trainable}
        if self.buffers is not None:
            values |= _ToEquinox._shim_from_state(self, self.buffers, state)
        check_alive(values)
        return values

    def _shim_from_state(self, index: eqx.nn.StateIndex[Any], state: Any) -> dict[Path, Any]:
        """The values that stand in a ``State``; of several members they have leading axes."""
        name = self._shim_structure.guest_type.__qualname__
        if not isinstance(state, eqx.nn.State):
            raise ArgumentError(
                f"the state of {name} is an eqx.nn.State, got {type(state).__qualname__}",
                remedy="Pass what eqx.nn.make_with_state, or the last call, returned",
            )
        try:
            given = state.get(index)
        except KeyError:
            given = ()
        found = dict(zip(self._shim_others, given, strict=False))
        kinds = self._shim_structure.kinds
        mismatched = [
            f"{path_text(path)} is {list(jax.numpy.shape(found[path]))}, wanted {list(shape)}"
            for path, shape in zip(self._shim_others, self._shim_shapes, strict=True)
            if path in found and not _ends_with(found[path], shape, kinds[path])
        ]
        if mismatched or len(given) != len(self._shim_shapes):
            raise ConversionError(
                f"the state is not that of {name}",
                missing=[path_text(path) for path in self._shim_others if path not in found],
                mismatched=mismatched,
                remedy="Pass the state that was made with this shim",
            )
        return found

    @property
    def _shim_others(self) -> list[Path]:
        """Paths of what stands in the ``State``."""
        structure = self._shim_structure
        carried = () if self.batched else structure.carried
        return [p for p in _paths(structure, trainable=False) if p not in carried]

    def _shim_current(self, state: Any) -> dict[Path, Any]:
        if state is not None:
            self._shim_check_state(state)
        guest = self._shim_link.guest
        own = {} if guest is None else guest.values()
        if self.buffers is None or state is not None:
            return own | self._shim_values(state)
        if guest is None:
            raise ArgumentError(
                "the shim is stateful, and its state was not given",
                remedy="Pass state=; the wrapped module may have it, if something refers to it",
            )
        trainable = _paths(self._shim_structure, trainable=True)
        return own | {path: at(self.params, _place(path)) for path in trainable}

    def _shim_check_carry(self, is_given: bool) -> None:
        structure = self._shim_structure
        if structure.is_recurrent and not is_given and not self.batched:
            raise ArgumentError(
                f"{structure.guest_type.__qualname__} has recurrent state, which is an "
                f"explicit carry, and the call has none",
                remedy="Call carry, out = shim(x, carry), starting from "
                "shim.initialize_carry(x.shape); or wrap it with shims.ToEquinox(..., "
                "batched=True), for hidden state that stands in the eqx.nn.State",
            )

    def _shim_check_method(self, method: str) -> None:
        structure = self._shim_structure
        if structure.carried and not self.batched:
            raise ArgumentError(
                f"{structure.guest_type.__qualname__} has recurrent state, an explicit carry "
                f"of its calls, and {method} may read it and takes none",
                remedy="Wrap it with shims.ToEquinox(..., batched=True), for hidden state that "
                "stands in the eqx.nn.State; or call the method on shim.unwrap()",
            )

    def _shim_check_state(self, state: Any) -> None:
        if (state is None) == (self.buffers is None):
            return
        name = self._shim_structure.guest_type.__qualname__
        if state is None:
            raise ArgumentError(
                f"{name} has running statistics or other state, and the call has none",
                remedy="Build it by eqx.nn.make_with_state(shims.ToEquinox)(layer), and pass "
                "state=",
            )
        raise ArgumentError(
            f"{name} has no state, and one was given",
            remedy="Leave state= out; is_stateful() tells",
        )

    def _shim_check_statistics(
        self, structure: Structure, values: Mapping[Path, Any], new: Mapping[Path, Any]
    ) -> None:
        if self.batched:
            return
        for path, value in values.items():
            is_own = structure.kinds[path] is Kind.STATISTIC and path not in structure.named
            if is_own and new.get(path, value) is not value:
                raise _batch_wanted(structure, path)


# Equinox makes a module of each method that is looked up on an instance, so that a call looks
# them up on the class.
_ToEquinox: Any = ToEquinox


def _batch_wanted(structure: Structure, path: Path) -> ArgumentError:
    return ArgumentError(
        f"{structure.guest_type.__qualname__} takes batch statistics at "
        f"{path_text(path) or 'its root'}, and the call sees one example",
        remedy="Wrap it with shims.ToEquinox(..., batched=True) and call it with batches, or "
        "give the layer an axis_name",
    )


def _ends_with(value: Any, shape: tuple[int, ...], kind: Kind) -> bool:
    """Whether an array has ``shape``; of hidden state the batch may be another."""
    own, start = jax.numpy.shape(value), 1 if kind is Kind.HIDDEN else 0
    left = len(own) - len(shape)
    return left >= 0 and own[left:][start:] == shape[start:]


def _key_source(key: Any) -> Callable[[], jax.Array]:
    check_key(key)

    def draw() -> jax.Array:
        if key is None:
            raise MissingKeyError(
                "the wrapped layer draws random numbers, and the call has no key",
                remedy="Pass key=, or switch to eqx.nn.inference_mode",
            )
        return key

    return draw


def _paths(structure: Structure, *, trainable: bool) -> list[Path]:
    return [p for p, kind in structure.kinds.items() if (kind is Kind.PARAMETER) is trainable]


def _place(path: Path) -> tuple[str, ...]:
    """Where a value stands in ``params``: one level may not mix names and numbers."""
    return tuple(map(str, path))
