"""Flax NNX as a host.

The shim's ``nnx.Variable``s are views: their value is the guest's own array. Copies that NNX
makes (``clone``, every transformation) own their values; NNX writes results back into the
original Variables, and so into the guest. Private API: ``Variable._raw_value``,
which the views override; ``_check_link`` tries at first use that it works both ways.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import wrapt
from flax import nnx
from jax.core import Tracer

from interop.api import convert_with
from interop.errors import ArgumentError, ConversionError, InteropError, MissingKeyError

from ..core import Call, Cell, Guest, Kind, Path, Structure, guest_of, path_text


class HiddenState(nnx.Variable):
    """Recurrent state of a guest: never a parameter."""


class Buffer(nnx.Variable):
    """A value of a guest that is neither trained nor a running statistic."""


# -- views --


def _view_type(base: type[nnx.Variable]) -> type[nnx.Variable]:
    """A Variable class whose linked instances keep their value in a guest's cell."""

    class View(base):
        __slots__ = ("_shim_cell", "_shim_own", "__weakref__")

        @property
        def _raw_value(self):
            cell = _cell(self)
            return object.__getattribute__(self, "_shim_own") if cell is None else cell.get()

        @_raw_value.setter
        def _raw_value(self, value):
            cell = _cell(self)
            if cell is None:
                object.__setattr__(self, "_shim_own", value)
            else:
                cell.set(value)

    View.__name__ = View.__qualname__ = f"{base.__name__}View"
    View.__doc__ = f"An ``nnx.{base.__name__}`` whose value is an array of a wrapped layer."
    return View


def _cell(view: nnx.Variable) -> Cell | None:
    try:
        return object.__getattribute__(view, "_shim_cell")
    except AttributeError:
        return None


_VIEW_TYPES = {
    Kind.PARAMETER: _view_type(nnx.Param),
    Kind.STATISTIC: _view_type(nnx.BatchStat),
    Kind.HIDDEN: _view_type(HiddenState),
    Kind.BUFFER: _view_type(Buffer),
}


class _Views:
    """The views that exist: one for each array of a guest, however many shims show it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._views: weakref.WeakKeyDictionary[Any, weakref.WeakValueDictionary[Any, Any]]
        self._views = weakref.WeakKeyDictionary()

    def of(self, cell: Cell) -> nnx.Variable:
        container, index = cell.identity
        with self._lock:
            views = self._views.setdefault(container, weakref.WeakValueDictionary())
            view = views.get(index)
            if view is None:
                view = views[index] = _linked(cell)
            return view


def _linked(cell: Cell) -> nnx.Variable:
    view = _owned(cell.kind, cell.get())
    object.__setattr__(view, "_shim_cell", cell)
    object.__setattr__(view, "_shim_own", None)
    return view


def _owned(kind: Kind, value: Any) -> nnx.Variable:
    return _VIEW_TYPES[kind](value, hijax=False, ref=False, eager_sharding=False)


_views = _Views()


@functools.cache
def _check_link() -> None:
    """Try that a view works both ways with the installed versions.

    Raises:
        InteropError: it does not; the message names the version.
    """
    import flax

    class Probe:
        kind = Kind.PARAMETER
        value = jnp.zeros(2)

        def get(self) -> Any:
            return self.value

        def set(self, value: Any) -> None:
            self.value = value

    probe, written = Probe(), jnp.ones(2)
    view = _linked(probe)  # type: ignore[arg-type]
    view.set_value(written)
    own = view.copy()
    if probe.value is not written or view.get_value() is not written or _cell(own) is not None:
        raise InteropError(
            f"views do not work with flax {flax.__version__}",
            remedy="Install a version that this library supports, or convert with interop",
        )


# -- the guest inside the shim --


class _Anchor:
    """Holds the guest of a linked shim, or a detached one's structure.

    To NNX it is an empty tree whose static part is the guest's structure *at the time of
    looking*, so that a changed attribute of the guest is seen by compiled functions.
    """

    def __init__(self, guest: Guest | None = None, structure: Structure | None = None):
        self.guest, self._structure = guest, structure
        self.views: dict[Path, nnx.Variable] = {}

    @property
    def guest_type(self) -> type:
        return type(self.guest.module) if self.guest is not None else self.structure.guest_type

    @property
    def forward(self) -> Callable[..., Any]:
        return self.guest.forward if self.guest is not None else self.structure.forward

    @property
    def structure(self) -> Structure:
        if self.guest is not None:
            return self.guest.structure()
        assert self._structure is not None
        return self._structure

    def __repr__(self) -> str:
        return f"{self.guest_type.__qualname__} ({'linked' if self.guest is not None else 'detached'})"


jax.tree_util.register_pytree_node(
    _Anchor, lambda a: ((), a.structure), lambda structure, _: _Anchor(structure=structure)
)
nnx.register_data_type(_Anchor)


class _AnchorSlot:
    """Keeps the guest in a linked shim when NNX writes its attributes back after a call."""

    def __init__(self) -> None:
        self._linked: weakref.WeakKeyDictionary[Any, _Anchor] = weakref.WeakKeyDictionary()

    def link(self, shim: Any, guest: Guest) -> None:
        self._linked[shim] = _Anchor(guest)
        shim._shim_anchor = self._linked[shim]

    def __get__(self, shim: Any, owner: type | None = None) -> Any:
        return self if shim is None else vars(shim)["_shim_anchor"]

    def __set__(self, shim: Any, anchor: _Anchor) -> None:
        vars(shim)["_shim_anchor"] = self._linked.get(shim, anchor)


class _OfInstance:
    """An attribute that is computed for instances and plain for the class."""

    def __init__(self, compute: Callable[[Any], Any], of_class: Any = None):
        self._compute, self._of_class = compute, of_class

    def __get__(self, shim: Any, owner: type | None = None) -> Any:
        if shim is not None and "_shim_anchor" in vars(shim):
            return self._compute(shim)
        if self._of_class is None:
            raise AttributeError
        return self._of_class


def _signature(shim: ToNNX) -> inspect.Signature:
    """The guest's, and the keywords that the shim adds."""
    own = _without_self(shim._shim_anchor.forward)
    parameters = list(own.parameters.values())
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in _KEYWORDS
    ]
    last = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    return own.replace(parameters=[*(p for p in parameters if p not in last), *added, *last])


def _without_self(function: Callable[..., Any]) -> inspect.Signature:
    own = inspect.signature(function)
    return own.replace(parameters=list(own.parameters.values())[1:])


_KEYWORDS = ("rngs", "deterministic")
# What a guest must not call its own: the host would answer in its place.
_METHODS = ("materialize", "unwrap", "set_view", "train", "eval")

_DOC = """A live ``nnx.Module`` around a module of another framework.

    The guest owns its arrays; the shim's Variables are views of them, under the guest's own
    paths, and a change on either side shows on the other at once. Copies that NNX makes
    (``nnx.split``/``merge``, ``nnx.clone``, ``copy.deepcopy``) own their values.

    Parameters are ``nnx.Param``, running statistics ``nnx.BatchStat``; recurrent state and
    other buffers have Variable types of their own, so that no optimiser sees them.
    ``model.train()`` and ``model.eval()`` reach the guest, as does a call's
    ``deterministic=``. A guest that draws random numbers gets a fresh key from ``rngs`` at
    each call. Values with physical units are seen by NNX without them.

    A function that closes over a shim sees what one that closes over a native NNX module
    sees: the values at trace time, as constants.

    Args:
        module: the guest, a module instance.
        rngs: an ``nnx.Rngs`` or stream; its ``dropout`` stream is forked for the guest, as
            ``nnx.Dropout`` does. Without, pass ``rngs=`` in calls that need randomness.

    Raises:
        ArgumentError: ``module`` is a class, or not a module; a name of the guest collides
            with one of the shim's; NNX is set to ``hijax`` or ``ref`` Variables.
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
    __doc__: Any = _OfInstance(lambda shim: inspect.getdoc(shim._shim_anchor.forward), _DOC)
    _shim_anchor: Any = _AnchorSlot()

    def __init__(self, module: Any, rngs: nnx.Rngs | nnx.RngStream | None = None):
        guest = guest_of(module)
        _check_link()
        _check_defaults()
        _check_names(guest)
        self.deterministic = False
        self.rngs = nnx.data(_forked(rngs))
        type(self)._shim_anchor.link(self, guest)
        self._shim_show(guest.cells())

    __signature__ = _OfInstance(_signature, _without_self(__init__))

    def __call__(
        self, *args: Any, rngs: Any = None, deterministic: bool | None = None, **kwargs
    ):
        return self._shim_run("__call__", args, kwargs, rngs, deterministic)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Set the mode, for ``nnx.view``.

        Args:
            deterministic: True for evaluation, False for training, None to leave it.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def unwrap(self) -> Any:
        """The guest, with its current weights.

        Returns:
            The very module that was wrapped; for a copy, which has no link to it, a new one
            that holds the copy's values.
        """
        anchor = self._shim_anchor
        if anchor.guest is not None:
            return anchor.guest.module
        return anchor.structure.build(self._shim_values(anchor.structure))

    def materialize(self, *, copy: bool = False) -> nnx.Module:
        """Turn the shim into a plain NNX module.

        Args:
            copy: give the result buffers of its own; otherwise arrays whose layout agrees
                are the same objects, and donating one side deletes the other's.

        Returns:
            What ``interop.to_nnx`` makes of the guest as it is now, in the shim's mode and
            with its random stream. An update of either is not seen by the other.

        Raises:
            UnmappedLayerError, UnsupportedLayerError, UnsupportedStructureError: a part of
                the guest cannot be rebuilt; ``error.path`` names it. Nothing was changed.

        Example:
            >>> import brainstate, shims
            >>> shims.ToNNX(brainstate.nn.Linear(3, 4)).materialize().kernel.shape
            (3, 4)
        """
        model = convert_with(self.unwrap(), "nnx", options={"rngs": self.rngs})
        if copy:
            definition, state = nnx.split(model)
            model = nnx.merge(definition, jax.tree.map(jnp.copy, state))
        if self.deterministic:
            model.eval()
        else:
            model.train()
        return model

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "_shim_anchor" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = getattr(self.unwrap(), name)
        if not (inspect.ismethod(value) and isinstance(value.__self__, self._shim_guest_type)):
            return value

        @wrapt.decorator
        def through_the_shim(wrapped, instance, args, kwargs):
            return self._shim_run(name, args, kwargs, None, None)

        return through_the_shim(value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ArgumentError(
            f"a live shim of {self._shim_guest_type.__qualname__} cannot be pickled",
            remedy="Save its weights, nnx.state(shim), or shim.materialize()",
        )

    # -- private: every name has the prefix _shim_ -----------------------------------------

    @property
    def _shim_guest_type(self) -> type:
        return self._shim_anchor.guest_type

    def _shim_run(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        rngs: Any,
        deterministic: bool | None,
    ) -> Any:
        deterministic = self.deterministic if deterministic is None else deterministic
        key = _key_source(rngs if rngs is not None else self.rngs, training=not deterministic)
        call = Call(method, args, kwargs, training=not deterministic, key=key)
        anchor = self._shim_anchor
        if anchor.guest is None:
            return self._shim_run_copy(anchor.structure, call)
        self._shim_show(anchor.guest.cells())
        try:
            return anchor.guest.call(call)
        finally:
            self._shim_show(anchor.guest.cells())

    def _shim_run_copy(self, structure: Structure, call: Call) -> Any:
        values = self._shim_values(structure)
        out, after, new = structure.run(values, call)
        for path in values.keys() & new.keys():
            if new[path] is not values[path]:
                self._shim_variable(path).set_value(new[path])
        # State that appears in a call is kept, unless it was traced: it is gone with the trace.
        if not any(isinstance(value, Tracer) for value in new.values()):
            self._shim_place(
                {
                    path: self._shim_variable(path)
                    if path in values
                    else _owned(after.kinds[path], value)
                    for path, value in new.items()
                }
            )
            self._shim_anchor = _Anchor(structure=after)
        return out

    def _shim_values(self, structure: Structure) -> dict[Path, Any]:
        return {path: self._shim_variable(path).get_value() for path in structure.kinds}

    def _shim_variable(self, path: Path) -> Any:
        found: Any = vars(self).get(str(path[0]))
        for part in path[1:]:
            found = found[part] if isinstance(found, Mapping) and part in found else None
        if not isinstance(found, nnx.Variable):
            raise ConversionError(
                "a value of the guest is missing from the shim",
                missing=[path_text(path)],
                remedy="Write to the shim's Variables instead of deleting or replacing them",
            )
        return found

    def _shim_show(self, cells: Any) -> None:
        """Show the guest's arrays as they are now; its states may have been replaced."""
        shown = {cell.path: _views.of(cell) for cell in cells}
        known = self._shim_anchor.views
        if shown.keys() == known.keys() and all(shown[p] is known[p] for p in shown):
            if foreign := [p for p in shown if self._shim_variable(p) is not shown[p]]:
                raise ConversionError(
                    "a Variable of the shim was replaced, and the guest would not see it",
                    unexpected=[path_text(path) for path in foreign],
                    remedy="Write its value instead: variable.set_value(...)",
                )
            return
        self._shim_place(shown)
        self._shim_anchor.views = shown

    def _shim_place(self, variables: Mapping[Path, nnx.Variable]) -> None:
        """Set the attributes that hold ``variables``, and delete those that hold none now."""
        tree: dict[str | int, Any] = {}
        for path, variable in variables.items():
            branch = tree
            for part in path[:-1]:
                branch = branch.setdefault(part, {})
            branch[path[-1]] = variable
        for name in [n for n in vars(self) if n not in tree and n in self._shim_shown()]:
            delattr(self, name)
        for name, value in tree.items():
            setattr(self, str(name), nnx.data(value))

    def _shim_shown(self) -> set[str]:
        own = {"deterministic", "rngs", "_shim_anchor"}
        return {n for n in vars(self) if n not in own and not n.startswith("_pytree__")}


def _forked(rngs: Any) -> nnx.RngStream | None:
    if rngs is None:
        return None
    return _stream(rngs).fork()


def _stream(rngs: Any) -> Any:
    """The stream that a native dropout layer would draw from."""
    if isinstance(rngs, nnx.RngStream):
        return rngs
    if not isinstance(rngs, nnx.Rngs):
        raise ArgumentError(
            f"rngs must be an nnx.Rngs, got {type(rngs).__qualname__}",
            remedy="Pass rngs=nnx.Rngs(seed)",
        )
    try:
        return rngs["dropout"]
    except (AttributeError, KeyError) as e:
        raise MissingKeyError(
            "rngs has neither a 'dropout' nor a default stream",
            remedy="Pass rngs=nnx.Rngs(seed) or nnx.Rngs(dropout=seed)",
        ) from e


def _key_source(rngs: Any, *, training: bool) -> Callable[[], jax.Array]:
    """Draws the key of one call.

    In training it is drawn at once: the guest may first ask for it inside a trace of its own,
    where a stream cannot advance. In evaluation few guests ask, and the stream stays put.
    """
    if rngs is None:
        return _no_key
    if isinstance(rngs, jax.Array):
        return lambda: rngs
    stream = _stream(rngs)
    if not training:
        return stream
    key = stream()
    return lambda: key


def _no_key() -> jax.Array:
    raise MissingKeyError(
        "the wrapped layer draws random numbers, and the shim has no key for it",
        remedy="Pass rngs=nnx.Rngs(seed) to ToNNX or to the call, or switch to .eval()",
    )


def _check_defaults() -> None:
    defaults = nnx.var_defaults()
    for mode in ("hijax", "ref"):
        if getattr(defaults, mode):
            raise ArgumentError(
                f"nnx.var_defaults asks for {mode} Variables, which cannot be views",
                remedy=f"Build the shim inside nnx.var_defaults({mode}=False)",
            )


def _check_names(guest: Guest) -> None:
    names = {str(cell.path[0]) for cell in guest.cells()}
    taken = sorted(name for name in names if hasattr(ToNNX, name) or name in _KEYWORDS)
    taken += [name for name in _METHODS if callable(getattr(type(guest.module), name, None))]
    keywords = inspect.signature(guest.forward).parameters
    taken += [name for name in _KEYWORDS if name in keywords]
    if taken:
        raise ArgumentError(
            f"{type(guest.module).__qualname__} has names that an NNX module needs itself: "
            f"{', '.join(taken)}",
            remedy="Rename them, or wrap the layer in a module that holds it as an attribute",
        )


host = ToNNX
