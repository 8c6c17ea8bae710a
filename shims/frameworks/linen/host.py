"""Flax Linen as a host.

The shim has no arrays: ``init`` hands out the guest's own, ``apply`` runs a private copy of the
guest with the variables it is given, and ``write_back`` commits them to the guest.
"""

from __future__ import annotations

import copy as copy_module
import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from interop.errors import ArgumentError, ConversionError, MissingKeyError
from interop.frameworks.linen.adapter import boxed, is_box

from ...core import (
    Call,
    Guest,
    Kind,
    LiveGuest,
    Path,
    Structure,
    changed_parameters,
    check_alive,
    check_kept,
    check_places,
    commit,
    first_values,
    guest_of,
    is_cell,
    jax_arrays,
    nest,
    noting,
    path_text,
    report_of,
)
from ...forwarding import (
    OfInstance,
    cell_signature,
    check_keywords,
    check_names,
    is_method,
    named_class,
    signature_with,
    without_self,
)
from ...materialization import materialize
from ...report import LinkReport
from .traced import COLLECTIONS
from .traced import place as place_of

__all__ = ["ToLinen", "ToLinenCell"]

_RESULTS = ("intermediates", "perturbations")
_KEYWORDS = ("deterministic",)
_METHODS = ("materialize", "unwrap", "write_back", "init", "apply")


# What Linen itself has for a parent that is not given; the object is private.
_UNSPECIFIED: Any = {f.name: f.default for f in dataclasses.fields(nn.Dense)}["parent"]


class _Held:
    """A guest as the field of a module. Shims of one guest are equal, of two they differ:
    a function compiled for one, such as ``init``, may hold its weights."""

    def __init__(self, guest: Guest, *, copy: bool):
        self.guest, self.copy = guest, copy
        self.structure = guest.structure()
        native = guest.native
        self._natives = native if isinstance(native, tuple) else (native,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and (
            self.structure == other.structure
            and self.copy is other.copy
            and all(a is b for a, b in zip(self._natives, other._natives, strict=True))
        )

    def __hash__(self) -> int:
        return hash((self.structure, id(self._natives[0])))

    def __deepcopy__(self, memo: Any) -> _Held:
        if not isinstance(self.guest, LiveGuest):  # it cannot change
            return self
        make: Any = type(self.guest)
        values = first_values(self.guest, copy=True)
        return _Held(make(self.guest.structure().build(values)), copy=self.copy)

    def __repr__(self) -> str:
        kinds = self.structure.kinds
        names = (path_text(path) for path, kind in kinds.items() if kind is Kind.PARAMETER)
        return f"{self.structure.guest_type.__qualname__}({', '.join(names)})"


_DOC = """A live ``flax.linen.Module`` around a module of another framework.

    The guest owns its arrays. ``init``, run eagerly, returns them in ``params``,
    ``batch_stats``, ``carry`` and ``buffers``, the same objects under the guest's own paths;
    no random number is drawn. A compiled ``init`` returns copies of the arrays at the time of
    its compilation. ``apply`` uses what it is given and checks it first. After training,
    ``write_back`` commits the values.

    A function that closes over ``variables`` has them as constants, as with any Linen module.
    The shim itself holds none. A compiled function that has it as a static argument keeps the
    guest alive as long as itself, and sees attributes of the guest that change only by a shim
    made afterwards.

    Donating the variables that ``init`` returned deletes the arrays of the guest too, until
    ``write_back`` gives it new ones. With ``copy=True`` ``init`` returns copies.

    Other public methods of the guest run as the call does: ``shim.encode(x)`` in a Linen
    parent, ``shim.apply(variables, x, method="encode")`` outside; attributes read through.

    Under ``nn.vmap`` and ``nn.scan`` with split parameters all members start out identical,
    as there is nothing random in handing out weights.

    Variables and carries hold values with physical units without them, and a unit is the last
    part of its value's path, ``params/V/mV``: variables in another unit do not fit. Arguments
    and results of calls keep theirs.

    Args:
        module: the guest, a module instance.
        deterministic: the mode, as ``nn.Dropout`` has it: here or in the call.
        params: the variables of a Linen guest.
        state: the ``eqx.nn.State`` of a stateful Equinox guest.
        batch_axes: leading axes of all array arguments, also those given by name, that an
            Equinox guest is mapped over, 1 by default.
        axis_name: the name of these axes together, by default as the guest's own layers say:
            their statistics are those of the whole batch. A tuple has one name for each.
        carry: what one example starts from, for an Equinox guest that is a recurrent cell of
            your own: it is called ``guest(x, carry)`` and returns ``(carry, output)``.
            Its input has one feature axis, or ``guest.num_feature_axes``.
        copy: let ``init`` return copies of the guest's arrays.
        parent, name: as any Linen module has them.

    A guest that is a recurrent cell makes a :class:`ToLinenCell`, which ``nn.RNN`` drives.

    Raises:
        ArgumentError: ``module`` is a class, or not a module; a name of the guest collides
            with one of the shim's; (calls) the guest needs a mode and there is none, or batch
            statistics would be taken over no batch.
        ConversionError: (``apply``) variables are missing or unexpected, or of another shape
            or dtype; all are reported together. (``init``) The guest's arrays were donated.
        MissingKeyError: (``apply``) the guest draws random numbers, and ``rngs`` has no
            ``"dropout"``.

    Example:
        >>> import brainstate, jax, jax.numpy as jnp, shims
        >>> layer = brainstate.nn.Linear(3, 4)
        >>> shim = shims.ToLinen(layer)
        >>> variables = shim.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> variables["params"]["weight"]["weight"] is layer.weight.value["weight"]
        True
    """


class ToLinen(nn.Module):
    __doc__ = OfInstance(  # type: ignore[assignment]
        lambda shim: inspect.getdoc(shim._shim_structure.forward), _DOC
    )
    module: Any
    deterministic: bool | None = None

    def __init__(
        self,
        module: Any,
        deterministic: bool | None = None,
        params: Any = None,
        state: Any = None,
        batch_axes: int | None = None,
        axis_name: str | tuple[str, ...] | None = None,
        carry: Any = None,
        copy: bool = False,
        parent: Any = _UNSPECIFIED,
        name: str | None = None,
    ):
        if not isinstance(module, _Held):  # as a clone has it
            guest = guest_of(
                module,
                host="linen",
                params=params,
                state=state,
                batch_axes=batch_axes,
                axis_name=axis_name,
                carry=carry,
            )
            structure = guest.structure()
            check_names(structure, host=ToLinen, keywords=_KEYWORDS, methods=_METHODS, paths=())
            _check_params(structure)
            check_places(structure)
            module = _Held(guest, copy=copy)
        self.module, self.deterministic = module, deterministic
        self.parent: Any = parent
        self.name: str | None = name
        self._shim_start()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if "__init__" not in vars(cls):  # Linen would make one that takes the fields alone
            cls.__init__ = ToLinen.__init__
        super().__init_subclass__(**kwargs)

    def __new__(cls, module: Any = None, *args: Any, carry: Any = None, **kwargs: Any) -> Self:
        made: Any = ToLinenCell if cls is ToLinen and is_cell(module, carry) else cls
        return super().__new__(made)

    __signature__: ClassVar[Any] = OfInstance(
        lambda shim: signature_with(shim._shim_structure, _KEYWORDS), without_self(__init__)
    )

    @nn.compact
    def __call__(self, *args: Any, deterministic: bool | None = None, **kwargs: Any) -> Any:
        method = kwargs.pop("_shim_method", "__call__")  # the one compact entry of them all
        with noting(self, method, args, kwargs, deterministic=deterministic) as is_noted:
            deterministic = self.deterministic if deterministic is None else deterministic
            if is_noted and deterministic is None:
                deterministic = True
            training = None if deterministic is None else not deterministic
            return self._shim_called(method, args, kwargs, training)

    @nn.nowrap
    def _shim_called(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        training: bool | None,
    ) -> Any:
        structure = self._shim_structure
        is_step = method == "__call__" and self._shim_takes_carry(args)
        values = jax_arrays(self._shim_values(structure, structure.carried if is_step else ()))
        call = Call(method, args, kwargs, training, self._shim_key())
        run = structure.step if is_step else structure.run
        out, new, after = run(values, call)
        check_kept(structure, after, new, call)
        if not self.is_initializing():
            written = changed_parameters(structure, values, new, run, call)
            self._shim_store(structure, values, new, written)
        return out

    @nn.nowrap
    def __getattr__(self, name: str) -> Any:
        held = vars(self).get("module")
        if name.startswith("_") or not isinstance(held, _Held):
            return super().__getattr__(name)
        guest = held.structure.module(held.guest.native)
        if not is_method(guest, name):
            is_applied = self.scope is not None and not self.is_initializing()
            now = self.unwrap(self.variables) if is_applied else held.guest.native
            return getattr(held.structure.module(now), name)

        check_keywords(held.structure, name, _KEYWORDS)

        @functools.wraps(getattr(type(guest), name))
        def through_the_shim(shim: Any, *args: Any, **kwargs: Any) -> Any:
            return shim(*args, **kwargs, _shim_method=name)

        return types.MethodType(through_the_shim, self)  # as apply(..., method=name) wants it

    @nn.nowrap
    def __copy__(self) -> Any:
        return self.clone()

    @nn.nowrap
    def __deepcopy__(self, memo: Any) -> Any:
        return self.clone(module=copy_module.deepcopy(self.module, memo))

    @nn.nowrap
    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ArgumentError(
            f"a live shim of {self._shim_structure.guest_type.__qualname__} cannot be pickled",
            remedy="Save its variables, or shim.materialize(variables)",
        )

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """``nn.Module.apply``, and an ``ArgumentError`` for variables that are no mapping."""
        _check_variables(variables)
        return super().apply(variables, *args, **kwargs)

    @nn.nowrap
    def unwrap(self, variables: Mapping[str, Any] | None = None) -> Any:
        """The guest; with ``variables``, a new one that holds them.

        Raises:
            ConversionError: ``variables`` do not fit.
        """
        if variables is None:
            return self._shim_guest.native
        return self._shim_structure.build(self._shim_given(variables))

    @nn.nowrap
    def materialize(self, variables: Mapping[str, Any] | None = None, **options: Any) -> Any:
        """Turn the shim into a plain Linen module.

        Args:
            variables: the current values; by default the guest's.
            options: those of :func:`shims.materialize`: ``method``, ``sample_input``,
                ``train``, ``copy``, ``verify``, ``report``.

        Returns:
            ``(module, variables)``, what ``interop.to_linen`` makes of the guest, for training
            where ``deterministic`` is False; or, for ``method="trace"``, its forward logic as a
            traced module, and its variables.

        Raises:
            InteropError: as :func:`shims.materialize`.
        """
        return materialize(self, variables=variables, **options)

    @nn.nowrap
    def write_back(self, variables: Mapping[str, Any]) -> None:
        """Commit trained values to the guest, all or none.

        Raises:
            ConversionError: ``variables`` do not fit; nothing was written.
            ArgumentError: the guest cannot change in place, ``variables`` are no mapping, or
                values of a running transformation.
        """
        guest = self._shim_guest
        if not isinstance(guest, LiveGuest):
            raise ArgumentError(
                f"{self._shim_structure.guest_type.__qualname__} cannot change in place",
                remedy="shim.unwrap(variables) makes a new one that holds them",
            )
        _check_variables(variables)
        commit(guest, self.module.structure, self._shim_given(variables))

    # -- private: every name has the prefix _shim_ --

    @nn.nowrap
    def _shim_start(self) -> None:
        """Do what Linen does to a new module. It names a submodule after its class."""
        plain = vars(type(self)).get("_shim_plain", type(self))
        object.__setattr__(self, "__class__", plain)
        self.__post_init__()
        if plain in (ToLinen, ToLinenCell):
            named = named_class(plain, self.module.structure.guest_type.__name__)
            object.__setattr__(self, "__class__", named)

    @nn.nowrap
    def _shim_remade(
        self,
        remake: Callable[..., Any],
        variables: Mapping[str, Any] | None,
        **facts: Any,
    ) -> tuple[nn.Module, dict[str, Any]]:
        structure, values = self._shim_structure, self._shim_given(variables)
        train = self.deterministic is False
        return remake(structure, values, **facts, structural={"train": train})

    @nn.nowrap
    def _shim_report(self) -> LinkReport:
        structure, own = self._shim_structure, self._shim_guest.values()
        return report_of(
            self,
            structure,
            {p: (v, "/".join(_place(structure, p)), True) for p, v in own.items()},
            live=False,
        )

    @property
    def _shim_guest(self) -> Guest:
        return self.module.guest

    @property
    def _shim_structure(self) -> Structure:
        return self._shim_guest.structure()

    @nn.nowrap
    def _shim_takes_carry(self, args: tuple[Any, ...]) -> bool:
        return False

    @nn.nowrap
    def _shim_given(self, variables: Mapping[str, Any] | None) -> dict[Path, Any]:
        """The values that ``variables`` hold; without them, and of hidden state that stands in
        a carry instead, the guest's own."""
        structure, own = self._shim_structure, self._shim_guest.values()
        if variables is None:
            return own
        _check_variables(variables)
        carried = () if COLLECTIONS[Kind.HIDDEN] in variables else structure.carried
        wanted = {path: value for path, value in own.items() if path not in carried}
        return own | _values(structure, variables, wanted)

    def _shim_values(self, structure: Structure, carried: Collection[Path]) -> dict[Path, Any]:
        """The values that the variables hold, but those that a carry holds; at ``init`` the
        guest's own."""
        own = {p: v for p, v in self._shim_guest.values().items() if p not in carried}
        if self.is_initializing():
            names = structure.partitionings
            first = first_values(self._shim_guest, copy=self.module.copy)
            shown = {path: boxed(first[path], names.get(path)) for path in own}
            for collection, tree in _tree(structure, shown).items():
                for name, value in tree.items():
                    self._shim_variable(collection, name, value)
        values = _values(structure, nn.meta.map_axis_meta(_constrained, self.variables), own)
        check_alive(values)
        return values

    def _shim_variable(self, collection: str, name: str, value: Any) -> Any:
        if collection == "params":
            return self.param(name, lambda key: value, unbox=False)
        return self.variable(collection, name, lambda: value)

    def _shim_store(
        self,
        structure: Structure,
        values: Mapping[Path, Any],
        new: Mapping[Path, Any],
        written: Collection[Path],
    ) -> None:
        """Store what a call has changed; of the parameters those that it has ``written``."""
        changed = {path for path in values if new.get(path, values[path]) is not values[path]}
        parameters = {path for path in changed if structure.kinds[path] is Kind.PARAMETER}
        changed -= parameters - set(written)
        if not changed:
            return
        after = _tree(structure, {path: new.get(path, values[path]) for path in values})
        for collection, name in sorted({_place(structure, path)[:2] for path in changed}):
            old = self.get_variable(collection, name)
            self.put_variable(
                collection, name, nn.meta.replace_boxed(old, after[collection][name])
            )

    def _shim_key(self) -> Callable[[], jax.Array]:
        names = [name for name in ("dropout", "params") if self.has_rng(name)]
        if not names:
            return _no_key
        key = self.make_rng(names[0])
        return lambda: key


class ToLinenCell(ToLinen, nn.RNNCellBase):
    """A live ``nn.RNNCellBase`` around a recurrent cell of another framework.

    ``ToLinen`` makes it of a guest that is a cell: a ``brainstate.nn.RNNCell`` or
    ``Dynamics``, an ``nnx.RNNCellBase``, an Equinox ``LSTMCell`` or ``GRUCell``, and whatever
    is given with ``carry=``. It is called ``cell(carry, x)`` and returns ``(carry, output)``,
    as Linen's own cells, and so works in ``nn.RNN``, ``nn.Bidirectional`` and ``nn.scan``.

    The carry is what the guest's framework has for it; of a BrainState guest, a dict of its
    hidden states by path, ``{"h": ..., "c": ...}``, which are then no variables. Called with
    the inputs alone, ``cell(x)``, a BrainState guest has them in the collection ``carry``.
    """

    __signature__: ClassVar[Any] = OfInstance(
        lambda shim: cell_signature(("carry", "inputs"), _KEYWORDS),
        without_self(ToLinen.__init__),
    )

    @property
    def num_feature_axes(self) -> int:
        """Trailing axes of the input that are not batch axes."""
        return self._shim_structure.feature_axes or 0

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> Any:
        """The carry that the guest starts from.

        Args:
            rng: a key, for guests that start at random.
            input_shape: the shape of one step's input, ``(*batch, *features)``.
        """
        is_applied = self.scope is not None and not self.is_initializing()
        values = self._shim_given(self.variables if is_applied else None)
        return self._shim_structure.initial_carry(values, input_shape, lambda: rng)

    @nn.nowrap
    def _shim_takes_carry(self, args: tuple[Any, ...]) -> bool:
        return self._shim_structure.takes_carry(args)


def _check_params(structure: Structure) -> None:
    """Refuse parameters at ``params``: to Linen params inside of params are a mistake.

    Raises:
        ArgumentError: the guest has an attribute of that name.
    """
    if any(_place(structure, path)[:2] == ("params", "params") for path in structure.kinds):
        raise ArgumentError(
            f"{structure.guest_type.__qualname__} has parameters in an attribute 'params', and "
            f"Linen allows no params inside of params",
            remedy="Rename it, or wrap a module that holds this one as an attribute",
        )


def _check_variables(variables: Any) -> None:
    if not isinstance(variables, Mapping):
        raise ArgumentError(
            f"variables must be a mapping of collections, got {type(variables).__name__}",
            remedy='Pass what init returned: {"params": ..., ...}',
        )


def _no_key() -> jax.Array:
    raise MissingKeyError(
        "the wrapped layer draws random numbers, and the shim has no key for it",
        remedy='Pass rngs={"dropout": key} to apply, or deterministic=True',
    )


def _place(structure: Structure, path: Path) -> tuple[str, ...]:
    """Where a value stands in the variables."""
    return place_of(structure.kinds[path], path)


def _tree(structure: Structure, values: Mapping[Path, Any]) -> dict[str, dict[str, Any]]:
    return nest({_place(structure, path): value for path, value in values.items()})


def _flatten(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(tree, Mapping):
        return {path: tree}
    return {k: v for name, sub in tree.items() for k, v in _flatten(sub, (*path, name)).items()}


def _unboxed(box: Any) -> Any:
    return box.value if is_box(box) else box.unbox()


def _constrained(box: Any) -> Any:
    """The array of a box, split as Linen's own layers do it: not over explicit axes."""
    if not is_box(box):
        return box.unbox()
    mesh = jax.sharding.get_abstract_mesh() if box.mesh is None else box.mesh
    return box.unbox(apply_constraint=mesh.are_all_axes_auto)


def _values(
    structure: Structure, variables: Mapping[str, Any], own: Mapping[Path, Any]
) -> dict[Path, Any]:
    """The values by path, compared with the guest's first.

    Raises:
        ConversionError: keys, shapes or dtypes differ; all are reported together. Of hidden
            state the leading axis, that of the batch, may differ.
    """
    plain = nn.meta.map_axis_meta(_unboxed, variables)
    given = {k: v for k, v in _flatten(plain).items() if k[0] not in _RESULTS}
    places = {_place(structure, path): path for path in own}
    mismatched: list[str] = []
    for place, path in sorted(places.items()):
        if place in given:
            value, wanted = given[place], own[path]
            start = 1 if structure.kinds[path] is Kind.HIDDEN else 0
            same = jnp.shape(value)[start:] == jnp.shape(wanted)[start:]
            if not same or jnp.result_type(value) != jnp.result_type(wanted):
                mismatched.append(
                    f"{'/'.join(place)} is {_aval(value)}, wanted {_aval(wanted)}"
                )
    if mismatched or given.keys() != places.keys():
        raise ConversionError(
            "the variables do not fit the wrapped layer",
            missing=sorted("/".join(p) for p in places.keys() - given.keys()),
            unexpected=sorted("/".join(p) for p in given.keys() - places.keys()),
            mismatched=mismatched,
            remedy="Pass all collections that init returned, of the module as it is now",
        )
    return {path: given[place] for place, path in places.items()}


def _aval(value: Any) -> str:
    return f"{jnp.result_type(value)}{list(jnp.shape(value))}"
