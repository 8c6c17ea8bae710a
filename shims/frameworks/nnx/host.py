"""Flax NNX as a host.

The shim's ``nnx.Variable``s are views: their value is the guest's own array. Copies that NNX
makes (``clone``, every transformation) own their values; NNX writes results back into the
original Variables, and so into the guest.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, ClassVar, Self

import jax
from flax import nnx
from flax.errors import TraceContextError
from flax.nnx import graphlib

from interop.errors import ArgumentError, ConversionError
from interop.frameworks.nnx.adapter import partitioning_of

from ...core import (
    Call,
    LiveGuest,
    Looks,
    Path,
    Structure,
    at,
    attribute_path,
    check_copy,
    check_kept,
    first_values,
    guest_of,
    is_cell,
    is_traced,
    jax_arrays,
    nest,
    noting,
    path_text,
    report_of,
)
from ...forwarding import (
    OfInstance,
    cell_signature,
    check_names,
    forwarded,
    named_class,
    refuse_attribute,
    signature_with,
    without_self,
)
from ...materialization import materialize
from ...report import LinkReport
from .modes import viewed
from .streams import drawing, first_carry, named_streams, stream_of
from .views import check_link, owned, view_of

__all__ = ["ToNNX", "ToNNXCell"]


class _Anchor:
    """Holds the guest of a linked shim, or a detached one's structure.

    To NNX it is an empty tree whose static part is the guest's structure and settings *at the
    time of looking*, so that a change of them is seen by compiled functions.

    Attributes:
        first: the structure that the shim was made with.
        guest: the live guest, or None.
        views: the Variables that show the live guest's arrays.
        shown: what the live guest was like when they were placed.
        settings: a detached guest's: those of the guest that it is a copy of, at that time.
    """

    def __init__(
        self, first: Structure, guest: LiveGuest | None = None, settings: Hashable = ()
    ):
        self.first, self.guest, self.settings = first, guest, settings
        self.views: dict[Path, nnx.Variable] = {}
        self.shown: Looks | None = None

    @property
    def structure(self) -> Structure:
        return self.first if self.guest is None else self.guest.structure()

    def __repr__(self) -> str:
        return f"<wrapped {self.first.guest_type.__qualname__}>"

    def __treescope_repr__(self, path: Any, subtree_renderer: Any) -> Any:
        from treescope import rendering_parts  # which asked

        return rendering_parts.text(repr(self))


def _flatten_anchor(anchor: _Anchor) -> tuple[tuple[()], tuple[Structure, Hashable]]:
    if anchor.guest is None:
        return (), (anchor.first, anchor.settings)
    looks = anchor.guest.looks()
    if looks is not anchor.shown:
        shown = {cell.path: view_of(cell) for cell in looks.cells}
        if shown.keys() != anchor.views.keys() or any(
            shown[path] is not anchor.views[path] for path in shown
        ):
            raise ConversionError(
                f"{anchor.first.guest_type.__qualname__} has replaced arrays since the shim "
                f"last looked, as init_state does",
                remedy="Call shim.refresh(), or go through the shim: shim.init_state(...)",
            )
        anchor.shown = looks
    return (), (looks.structure, anchor.guest.settings())


def _unflatten_anchor(known: tuple[Structure, Hashable], _: Any) -> _Anchor:
    return _Anchor(known[0], settings=known[1])


jax.tree_util.register_pytree_node(_Anchor, _flatten_anchor, _unflatten_anchor)
graphlib.register_pytree_node_type(  # as NNX asks JAX about classes that it does not know
    _Anchor, _flatten_anchor, lambda parts, known: _unflatten_anchor(known, parts)
)
nnx.register_data_type(_Anchor)


class _AnchorSlot:
    """Keeps the guest in a linked shim when NNX writes its attributes back after a call."""

    def __init__(self) -> None:
        self._linked: weakref.WeakKeyDictionary[Any, _Anchor] = weakref.WeakKeyDictionary()

    def link(self, shim: Any, anchor: _Anchor) -> None:
        self._linked[shim] = anchor
        shim._shim_anchor = anchor

    def __get__(self, shim: Any, owner: type | None = None) -> Any:
        return self if shim is None else vars(shim)["_shim_anchor"]

    def __set__(self, shim: Any, anchor: _Anchor) -> None:
        vars(shim)["_shim_anchor"] = self._linked.get(shim, anchor)


_KEYWORDS = ("rngs", "deterministic")
# What a guest must not call its own: the host would answer in its place.
_METHODS = ("materialize", "unwrap", "refresh", "set_view", "train", "eval")

_DOC = """A live ``nnx.Module`` around a module of another framework.

    The guest owns its arrays; the shim's Variables are views of them, under the guest's own
    paths, and a change on either side shows on the other at once. Copies that NNX makes
    (``nnx.clone``, ``copy.deepcopy``, every transformation) own their values. A guest that
    cannot change in place (Linen variables, Equinox) leaves the current values to the shim.

    Parameters are ``nnx.Param``, running statistics ``nnx.BatchStat``; recurrent state and
    other buffers have Variable types of their own, so that no optimiser sees them.
    ``model.train()`` and ``model.eval()`` reach the guest, as does a call's
    ``deterministic=``. A guest that draws random numbers, in training or evaluation, gets a
    fresh key from ``rngs`` at each call that draws. Variables and carries hold values with
    physical units without them, and a unit is the last part of its value's path,
    ``shim.V["mV"]``; arguments and results of calls keep theirs.

    A function that closes over a shim sees what one that closes over a native NNX module
    sees: the values at trace time, as constants, and a stream that cannot advance. In a
    transformation of BrainState a BrainState guest draws from ``brainstate.random``.
    ``nnx.jit`` compiles anew when an attribute of the guest has changed, or a setting of its
    framework such as ``brainstate.environ``'s ``dt``.

    Args:
        module: the guest, a module instance.
        rngs: an ``nnx.Rngs`` or stream; its ``dropout`` stream is forked for the guest, as
            ``nnx.Dropout`` does, and for a Linen guest also streams of other names. Without,
            pass ``rngs=`` in calls that need randomness.
        params: the variables of a Linen guest.
        state: the ``eqx.nn.State`` of a stateful Equinox guest.
        batch_axes: leading axes of all array arguments, also those given by name, that an
            Equinox guest is mapped over, 1 by default.
        axis_name: the name of these axes together, by default as the guest's own layers say:
            their statistics are those of the whole batch. A tuple has one name for each.
        carry: what one example starts from, for an Equinox guest that is a recurrent cell of
            your own: it is called ``guest(x, carry)`` and returns ``(carry, output)``.
            Its input has one feature axis, or ``guest.num_feature_axes``.
        copy: for a guest that cannot change in place, start from copies of its arrays;
            otherwise donating the shim's values deletes the guest's. A guest that can has
            the new values at once.

    A guest that is a recurrent cell makes a :class:`ToNNXCell`, which ``nnx.RNN`` drives.

    Raises:
        ArgumentError: ``module`` is a class, or not a module; a name of the guest collides
            with one of the shim's; NNX is set to ``hijax`` or ``ref`` Variables; (calls)
            batch statistics would be taken over no batch.
        MissingKeyError: (calls) the guest draws random numbers, and there is no ``rngs``.
        ConversionError: (writes) a value of another shape or dtype.

    Example:
        >>> import brainstate, shims, jax.numpy as jnp
        >>> layer = brainstate.nn.Linear(3, 4)
        >>> shim = shims.ToNNX(layer)
        >>> shim.weight["bias"][...] = jnp.ones(4)
        >>> layer.weight.value["bias"].tolist()
        [1.0, 1.0, 1.0, 1.0]
    """


class ToNNX(nnx.Module):
    __doc__: Any = OfInstance(lambda shim: inspect.getdoc(shim._shim_first.forward), _DOC)
    rngs: Any = None
    _shim_anchor: Any = _AnchorSlot()

    def __new__(cls, module: Any = None, *args: Any, carry: Any = None, **kwargs: Any) -> Self:
        made: Any = ToNNXCell if cls is ToNNX and is_cell(module, carry) else cls
        is_plain = module is not None and made in (ToNNX, ToNNXCell)
        named: Any = named_class(made, type(module).__name__) if is_plain else made
        return super().__new__(named)

    def __init__(
        self,
        module: Any,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        *,
        params: Any = None,
        state: Any = None,
        batch_axes: int | None = None,
        axis_name: str | tuple[str, ...] | None = None,
        carry: Any = None,
        copy: bool = False,
    ):
        guest = guest_of(
            module,
            host="nnx",
            params=params,
            state=state,
            batch_axes=batch_axes,
            axis_name=axis_name,
            carry=carry,
        )
        check_link()
        _check_defaults()
        structure = guest.structure()
        check_names(
            structure, host=ToNNX, keywords=_KEYWORDS, methods=_METHODS, paths=structure.kinds
        )
        self.deterministic: bool = False
        if rngs is not None:
            self.rngs = stream_of(rngs).fork()
        if structure.takes_streams and (named := named_streams(rngs)):
            self._shim_streams = nnx.data({n: stream.fork() for n, stream in named.items()})
        check_copy(guest, copy=copy)
        if isinstance(guest, LiveGuest):
            type(self)._shim_anchor.link(self, _Anchor(structure, guest))
            self._shim_show(guest.looks())
        else:
            self._shim_anchor = _Anchor(structure)
            values, names = first_values(guest, copy=copy), structure.partitionings
            self._shim_place(
                {p: owned(kind, values[p], names.get(p)) for p, kind in structure.kinds.items()}
            )

    __signature__: ClassVar[Any] = OfInstance(
        lambda shim: signature_with(shim._shim_first, _KEYWORDS), without_self(__init__)
    )

    def __call__(
        self, *args: Any, rngs: Any = None, deterministic: bool | None = None, **kwargs: Any
    ) -> Any:
        return self._shim_run("__call__", args, kwargs, rngs, deterministic)

    def set_view(
        self, deterministic: bool | None = None, use_running_average: bool | None = None
    ) -> None:
        """Set the mode, for ``nnx.view``.

        Args:
            deterministic: True for evaluation, False for training, None to leave it.
            use_running_average: the same, or None.

        Raises:
            ArgumentError: the two differ, and the guest keeps running statistics.
        """
        kinds = self._shim_first.kinds.values()
        self.deterministic = viewed(
            self.deterministic, deterministic, use_running_average, kinds
        )

    def refresh(self) -> None:
        """Show the guest's arrays as they are now.

        Needed before a transformation when the guest has replaced containers behind the
        shim's back, as ``guest.init_state`` does; eager calls of the shim do it themselves.
        """
        if self._shim_anchor.guest is not None:
            self._shim_show(self._shim_anchor.guest.looks())

    def unwrap(self) -> Any:
        """The guest, with its current weights.

        Returns:
            The very module that was wrapped, where its arrays can change in place. Else, and
            for a copy of the shim, which has no link to it, a new one that holds the shim's
            values: ``(module, variables)`` for Linen, ``(module, state)`` for a stateful
            Equinox module.
        """
        anchor = self._shim_anchor
        if anchor.guest is not None:
            return anchor.guest.native
        return self._shim_partitioned(anchor.first).build(self._shim_values(anchor.first))

    def materialize(self, **options: Any) -> nnx.Module:
        """Turn the shim into a plain NNX module.

        Args:
            options: those of :func:`shims.materialize`: ``method``, ``sample_input``,
                ``train``, ``copy``, ``verify``, ``report``.

        Returns:
            What ``interop.to_nnx`` makes of the guest as it is now, in the shim's mode and
            with its random stream; or, for ``method="trace"``, its forward logic as a traced
            module. An update of either is not seen by the other.

        Raises:
            InteropError: as :func:`shims.materialize`. Nothing was changed.

        Example:
            >>> import brainstate, shims
            >>> shims.ToNNX(brainstate.nn.Linear(3, 4)).materialize().kernel.shape
            (3, 4)
        """
        return materialize(self, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "_shim_anchor" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return forwarded(self._shim_first.module(self.unwrap()), name, self._shim_run)

    def __setattr__(self, name: str, value: Any) -> None:
        is_own = name.startswith("_") or name in _KEYWORDS or "_shim_anchor" not in vars(self)
        if not is_own:
            refuse_attribute(self._shim_first.module(self.unwrap()), name)
        is_place = name == "rngs" and value is None  # of a stream that may come
        super().__setattr__(name, nnx.data(None) if is_place else value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ArgumentError(
            f"a live shim of {self._shim_first.guest_type.__qualname__} cannot be pickled, "
            "nor copied by copy.copy",
            remedy="Save its weights, nnx.state(shim), or shim.materialize(); copy it by "
            "copy.deepcopy(shim)",
        )

    # -- private: every name has the prefix _shim_ --

    @property
    def _shim_first(self) -> Structure:
        return self._shim_anchor.first

    def _shim_held(self) -> tuple[Structure, dict[Path, Any]]:
        structure = self._shim_anchor.structure
        return structure, {path: self._shim_variable(path) for path in structure.kinds}

    def _shim_remade(self, remake: Callable[..., Any], **facts: Any) -> nnx.Module:
        def in_mode(model: nnx.Module) -> nnx.Module:
            (model.eval if self.deterministic else model.train)()
            return model

        structure = self._shim_anchor.structure
        return remake(
            self._shim_partitioned(structure),
            self._shim_values(structure),
            **facts,
            finish=in_mode,
            structural={"rngs": self.rngs},
            traced={"rngs": self.rngs},
        )

    def _shim_report(self) -> LinkReport:
        anchor, live = self._shim_anchor, self._shim_anchor.guest is not None
        if live:
            self._shim_show(anchor.guest.looks())
        structure = anchor.structure
        shown = {path: self._shim_variable(path) for path in structure.kinds}
        return report_of(
            self,
            structure,
            {p: (v.get_raw_value(), type(v).__name__, live) for p, v in shown.items()},
            live=live,
        )

    def _shim_run(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        rngs: Any = None,
        deterministic: bool | None = None,
    ) -> Any:
        with noting(self, method, args, kwargs, rngs=rngs, deterministic=deterministic):
            return self._shim_called(method, args, kwargs, rngs, deterministic)

    def _shim_called(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        rngs: Any,
        deterministic: bool | None,
    ) -> Any:
        training = not (self.deterministic if deterministic is None else deterministic)
        own, given = self._shim_own_streams(), self.rngs if rngs is None else rngs
        takes = self._shim_first.takes_streams
        named = own if rngs is None or not takes else named_streams(rngs)
        with drawing(given, named, training=training) as (key, streams):
            call = Call(method, args, kwargs, training=training, key=key, streams=streams)
            return self._shim_answer(call)

    def _shim_own_streams(self) -> dict[str, Any]:
        return vars(self).get("_shim_streams", {})

    def _shim_answer(self, call: Call) -> Any:
        anchor = self._shim_anchor
        self._shim_check_added(anchor.first.kinds if anchor.guest is None else anchor.views)
        if call.method == "init_state":  # whose new states would outlive another trace
            self._shim_check_trace()
        is_step = call.method == "__call__" and self._shim_takes_carry(call.args)
        if anchor.guest is None:
            run = self._shim_step if is_step else self._shim_run_copy
            return run(anchor.first, call)
        self._shim_show(anchor.guest.looks())
        try:
            if is_step:
                return self._shim_step(anchor.structure, call)
            return anchor.guest.call(call)
        finally:
            self._shim_show(anchor.guest.looks())

    def _shim_check_trace(self) -> None:
        try:
            self.deterministic = self.deterministic  # NNX refuses it as any change
        except TraceContextError as e:
            raise ArgumentError(
                f"init_state of {self._shim_first.guest_type.__qualname__} in a transformation "
                f"that closes over it would leave values in it that are gone when it is over",
                remedy="Call it before, or pass the shim as an argument",
            ) from e

    def _shim_check_added(self, known: Mapping[Path, Any]) -> None:
        """Refuse values beside the guest's, which ``nnx.update`` adds without a word.

        Raises:
            ConversionError: there are some, with the paths of all.
        """
        places = {attribute_path(path) for path in known}
        held = {name: vars(self).get(name) for name, *_ in places}
        if added := [path for path in _places(held) if path not in places]:
            raise ConversionError(
                f"{self._shim_first.guest_type.__qualname__} has no such values",
                unexpected=[path_text(path) for path in added],
                remedy="Delete them, and update the shim with values of its own paths",
            )

    def _shim_takes_carry(self, args: tuple[Any, ...]) -> bool:
        return False

    def _shim_store(self, values: Mapping[Path, Any], new: Mapping[Path, Any]) -> None:
        for path in values.keys() & new.keys():
            if new[path] is not values[path]:
                self._shim_variable(path).set_value(new[path])

    def _shim_step(self, structure: Structure, call: Call) -> Any:
        values = jax_arrays(self._shim_values(structure))
        out, new, _ = structure.step(values, call)
        self._shim_store(values, new)
        return out

    def _shim_run_copy(self, structure: Structure, call: Call) -> Any:
        values = jax_arrays(self._shim_values(structure))
        out, new, after = structure.run(values, call)
        self._shim_store(values, new)
        if is_traced((out, new)):  # state that appears is gone with the trace
            check_kept(structure, after, new, call)
        elif after != structure:
            self._shim_place(
                {
                    path: self._shim_variable(path)
                    if path in values
                    else owned(after.kinds[path], value)
                    for path, value in new.items()
                }
            )
            self._shim_anchor = _Anchor(after, settings=self._shim_anchor.settings)
        return out

    def _shim_values(self, structure: Structure) -> dict[Path, Any]:
        return {path: self._shim_variable(path).get_value() for path in structure.kinds}

    def _shim_partitioned(self, structure: Structure) -> Structure:
        """``structure`` with the names of mesh axes that the Variables have by now."""
        found = {p: partitioning_of(self._shim_variable(p)) for p in structure.partitionings}
        return structure.partitioned({p: names for p, names in found.items() if names})

    def _shim_variable(self, path: Path) -> Any:
        found = at(vars(self), attribute_path(path))
        if not isinstance(found, nnx.Variable):
            raise ConversionError(
                "a value of the guest is missing from the shim",
                missing=[path_text(path)],
                remedy="Write to the shim's Variables instead of deleting or replacing them",
            )
        return found

    def _shim_show(self, looks: Looks) -> None:
        """Show the guest's arrays as they are now; its states may have been replaced."""
        known = self._shim_anchor.views
        is_shown = looks is self._shim_anchor.shown
        shown = known if is_shown else {c.path: view_of(c) for c in looks.cells}
        if shown.keys() != known.keys() or any(shown[p] is not known[p] for p in shown):
            self._shim_place(shown)
            self._shim_anchor.views = shown
        elif foreign := [p for p in shown if self._shim_variable(p) is not shown[p]]:
            raise ConversionError(
                "a Variable of the shim was replaced, and the guest would not see it",
                unexpected=[path_text(path) for path in foreign],
                remedy="Write its value instead: variable.set_value(...)",
            )
        self._shim_anchor.shown = looks

    def _shim_place(self, variables: Mapping[Path, nnx.Variable]) -> None:
        """Set the attributes that hold ``variables``, and delete those that hold none now."""
        tree = nest({attribute_path(path): variable for path, variable in variables.items()})
        anchor = self._shim_anchor
        for path in (*anchor.first.kinds, *anchor.views):
            if attribute_path(path)[0] not in tree and attribute_path(path)[0] in vars(self):
                delattr(self, attribute_path(path)[0])
        for name, value in tree.items():
            super().__setattr__(name, nnx.data(value))


_CELL_DOC = """A live ``nnx.RNNCellBase`` around a recurrent cell of another framework.

    ``ToNNX`` makes it of a guest that is a cell: a ``brainstate.nn.RNNCell`` or ``Dynamics``,
    a Linen ``RNNCellBase``, an Equinox ``LSTMCell`` or ``GRUCell``, and whatever is given with
    ``carry=``. It is called ``cell(carry, x)`` and returns ``(carry, output)``, as NNX's own
    cells, and so works in ``nnx.RNN``, ``nnx.Bidirectional`` and ``nnx.scan``.

    The carry is what the guest's framework has for it; of a BrainState guest, a dict of its
    hidden states by path, ``{"h": ..., "c": ...}``. The hidden states of that guest itself
    are neither read nor changed. Called with the inputs alone, ``cell(x)``, a BrainState guest
    keeps its state itself, in Variables; ``cell.init_state(batch_size)`` makes it.
    """


class ToNNXCell(ToNNX, nnx.RNNCellBase):
    __doc__: Any = OfInstance(lambda shim: inspect.getdoc(shim._shim_first.forward), _CELL_DOC)
    __signature__: ClassVar[Any] = OfInstance(
        lambda shim: cell_signature(("carry", "inputs"), _KEYWORDS),
        without_self(ToNNX.__init__),
    )

    @property
    def num_feature_axes(self) -> int:
        """Trailing axes of the input that are not batch axes."""
        return self._shim_first.feature_axes or 0

    def initialize_carry(
        self,
        input_shape: tuple[int, ...],
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        carry_init: Callable[..., jax.Array] | None = None,
    ) -> Any:
        """The carry that the guest starts from.

        Args:
            input_shape: the shape of one step's input, ``(*batch, *features)``.
            rngs: for guests that start at random.
            carry_init: an initializer for each array of the carry, in place of the guest's.

        Raises:
            MissingKeyError: the guest or ``carry_init`` needs a key, and there is no ``rngs``.
        """
        structure = self._shim_anchor.structure
        values = self._shim_values(structure)
        return first_carry(
            lambda draw: structure.initial_carry(values, input_shape, draw), rngs, carry_init
        )

    def _shim_takes_carry(self, args: tuple[Any, ...]) -> bool:
        return self._shim_anchor.structure.takes_carry(args)


def _places(tree: dict[Any, Any], path: Path = ()) -> Iterator[Path]:
    """Where values stand in nested dicts."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _places(value, (*path, name))
        elif value is not None:
            yield (*path, name)


def _check_defaults() -> None:
    defaults = nnx.var_defaults()
    for mode in ("hijax", "ref"):
        if getattr(defaults, mode):
            raise ArgumentError(
                f"nnx.var_defaults asks for {mode} Variables, which cannot be views",
                remedy=f"Build the shim inside nnx.var_defaults({mode}=False)",
            )
