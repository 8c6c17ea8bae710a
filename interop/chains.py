"""Forward logic of a user's own module that only applies its layers one after the other.

:func:`steps_of` runs the method with a stand-in for the input that nothing can look at: layers
and functions take it and give back a new one; its batch size, which nothing can look at either,
may shape it into rows, and every other use of both is an error. All that the code can reach,
``self``, globals and closures, is a stand-in of the same kind, or a plain constant. So the
steps that are found are those of any call; where anything else happens, there are none.
"""

# jax declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import dis
import functools
import inspect
import itertools
import re
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import jax.numpy as jnp

from . import formulas

__all__ = ["MODES", "SWITCHED", "Chain", "Step", "mode_of", "steps_of"]


@dataclasses.dataclass(frozen=True)
class Step:
    """A layer or a function of a chain.

    Attributes:
        part: it, with its options.
        path: where it is held: ``.layers[0]``.
        modes: the arguments of the mode that the call passes on to it.
    """

    part: Any
    path: str
    modes: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Chain:
    """What a method comes to.

    Attributes:
        steps: in the order of their calls.
        modes: the arguments of the mode that the method takes, and their defaults; ``...``
            for one without.
        other: what else the method does, where it does; there are no steps then.
    """

    steps: tuple[Step, ...] = ()
    modes: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    other: str | None = None


MODES = {
    "use_running_average": False,
    "deterministic": False,
    "train": True,
    "training": True,
    "is_training": True,
    "update_stats": True,
}
"""Names of fields of layers and of arguments that switch the mode; the value for training."""

SWITCHED = "the mode of the call"
"""What a layer is in that is not fixed to one mode."""

# Parts of names by which code tells modes apart in its own way.
_OF_MODES = {
    *("train", "training", "trains", "trainable", "eval", "evaluation", "evaluate"),
    *("evaluating", "test", "testing", "predict", "predicting", "prediction", "inference"),
    *("infer", "deterministic", "stochastic", "fit", "fitting"),
}
_CONSTANTS = (bool, int, float, str, types.NoneType)
_WORDS = re.compile("[a-z]+")
_BUILTINS = {
    fn.__name__: fn for fn in (range, len, zip, enumerate, reversed, tuple, list, min, max, int)
}


# What data may do as an array: functions of jax.numpy by their names, and becoming flat rows.
_METHODS = {"max", "mean", "min", "prod", "squeeze", "std", "sum", "var"}
_FLAT = functools.partial(formulas.flatten, start_axis=1)


class _OtherError(Exception):
    """The method does something else."""


def steps_of(
    method: Any,
    module: Any,
    is_layer: Callable[[Any], bool],
    contents: Callable[[Any], Any] = lambda value: value,
) -> Chain:
    """The layers and functions that a module's method applies, in order.

    Args:
        method: the plain function, ``(self, x)`` or with arguments that are only modes, or that
            are None by default and only passed on to layers: the steps are without those.
        module: ``self``.
        is_layer: whether a value is a module of the framework, and no container of such.
        contents: a container of the framework as a list or dict; other values as they are.

    Returns:
        No steps, and why, if the method does anything else, in training or in evaluation, or
        if that cannot be told.
    """
    if not isinstance(method, types.FunctionType):
        return Chain(other="it is no plain function")
    if not _is_plain(method.__code__):
        return Chain(other="it catches errors, sets a global or compares by identity")
    try:
        traces = [_Trace(module, is_layer, contents, train) for train in (False, True)]
        found = [trace.run(method) for trace in traces]
    except Exception as e:  # of whatever kind: the code was not written for stand-ins
        said = str(e) if isinstance(e, _OtherError) else ""  # others speak of stand-ins
        return Chain(other=_line(method, e) or said or None)
    if not all(a.is_same(b) for a, b in itertools.zip_longest(*found, fillvalue=_NOTHING)):
        return Chain(other="it does not apply the same in training and in evaluation")
    steps = tuple(Step(call.callable, call.path, call.modes) for call in found[0])
    _, _, *rest = inspect.signature(method).parameters.values()
    unset, modes = inspect.Parameter.empty, [p for p in rest if p.name in MODES]
    return Chain(steps, {p.name: ... if p.default is unset else p.default for p in modes})


def _line(method: types.FunctionType, error: Exception) -> str | None:
    """The line of a method, or of a function within, that an error comes from, if known."""
    file = method.__code__.co_filename
    lines = [
        f"{file}:{number}: {text}"
        for where, number, _, text in traceback.extract_tb(error.__traceback__)
        if where == file and text
    ]
    return lines[-1] if lines else None


def mode_of(given: Mapping[str, Any]) -> str | None:
    """The mode that such values of :data:`MODES` say; None where there is no value."""
    said = {name: value for name, value in given.items() if value not in (None, ...)}
    kinds = {"training" if value is MODES[n] else "evaluation" for n, value in said.items()}
    return " and ".join(sorted(kinds)) or None


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a layer or function with the data, and options that are constants."""

    part: Any
    path: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    modes: frozenset[str] = frozenset()

    def is_same(self, other: _Call) -> bool:
        alike = self.options == other.options and self.modes == other.modes
        return self.part is other.part and alike

    @property
    def callable(self) -> Any:
        return functools.partial(self.part, **self.options) if self.options else self.part


_NOTHING = _Call(None, "")


def _is_plain(code: types.CodeType) -> bool:
    """Whether there is no handler that could hide an error, nothing that compares by identity,
    which stand-ins don't have, and no global that is set, here or in a function within."""
    within = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    waits = code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE)
    used = {instruction.opname for instruction in dis.get_instructions(code)}
    is_open = waits or code.co_exceptiontable or used & {"IS_OP", "STORE_GLOBAL"}
    return not is_open and all(map(_is_plain, within))


def _refuse(*_: Any, **__: Any) -> Any:
    raise _OtherError


_HIDDEN = (
    *("getattribute", "setattr", "eq", "ne", "bool", "hash", "iter", "len", "contains"),
    *("getitem", "repr", "str", "format"),
)
_Hidden: Any = type("_Hidden", (), {"__slots__": (), **{f"__{n}__": _refuse for n in _HIDDEN}})


class _Shape(_Hidden):
    """Stands for the shape of the data, of which the first size may be taken, and not seen."""

    __slots__ = ("_batch",)

    def __init__(self, batch: Any):
        object.__setattr__(self, "_batch", batch)

    def __getitem__(self, i: Any) -> Any:
        if type(i) is not int or i != 0:
            raise _OtherError
        return object.__getattribute__(self, "_batch")


class _Closed(_Hidden):
    """Stands for what the code holds, and may call; nothing else."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any] = _refuse):
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return object.__getattribute__(self, "_call")(*args, **options)


class _Names(_Hidden):
    """Stands for ``self``, or a module of Python: a stand-in for each of its attributes."""

    __slots__ = ("_get",)

    def __init__(self, get: Callable[[str], Any]):
        object.__setattr__(self, "_get", get)

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, "_get")(name)


class _Parts(Mapping[Any, Any]):
    """Stands for a dict, whose keys may be used as attributes as well."""

    def __init__(self, parts: dict[Any, Any]):
        self._parts = parts

    def __getitem__(self, key: Any) -> Any:
        return self._parts[key]

    def __getattr__(self, name: str) -> Any:
        return self._parts[name]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


class _Trace:
    """One run of a method, in one of the modes."""

    def __init__(
        self,
        module: Any,
        is_layer: Callable[[Any], bool],
        contents: Callable[[Any], Any],
        train: bool,
    ):
        self._module, self._train = module, train
        self._is_layer, self._contents = is_layer, contents
        self._steps: list[_Call] = []
        self._none = _Closed()  # for arguments of the call that are not given
        self._latest = self._value()

    def run(self, method: types.FunctionType) -> list[_Call]:
        """The steps.

        Raises:
            Exception: it does something else.
        """
        names, scope = set(_names(method.__code__)), method.__globals__
        known = {name: self._stand_in(scope[name], name) for name in names & scope.keys()}
        cells = tuple(
            types.CellType(self._stand_in(cell.cell_contents, name))
            for name, cell in zip(
                method.__code__.co_freevars, method.__closure__ or (), strict=True
            )
        )
        run: Any = types.FunctionType(
            method.__code__,
            {"__builtins__": _BUILTINS, "__name__": "steps", **known},
            method.__name__,
            None,
            cells,
        )
        _, data, *rest = inspect.signature(method).parameters.values()
        kinds = (data.POSITIONAL_ONLY, data.POSITIONAL_OR_KEYWORD)
        left_out = [p for p in rest if p.name not in MODES]
        if data.kind not in kinds or any(p.default is not None for p in left_out):
            raise _OtherError("it takes more than the data, modes and what is None by default")
        options = {p.name: self._mode(p.name) if p.name in MODES else self._none for p in rest}
        out = run(_Names(self._attribute), self._latest, **options)
        if out is not self._latest or not self._steps:
            raise _OtherError("it does not return what its last layer or function gives")
        return self._steps

    def _mode(self, name: str) -> bool:
        return MODES[name] is self._train

    def _attribute(self, name: str) -> Any:
        if name in MODES:  # which a module may change after it is converted
            raise _OtherError
        return self._stand_in(attribute_of(self._module, name), f".{name}")

    def _stand_in(self, value: Any, path: str) -> Any:
        if type(value) in _CONSTANTS:
            if _is_mode(path, value):  # which may be changed after the conversion
                raise _OtherError
            return value
        if self._is_layer(value):
            return _Closed(lambda *args, **options: self._layer(value, path, *args, **options))
        value = self._contents(value)
        if isinstance(value, list | tuple):
            parts = cast("list[Any]", value)
            return tuple(self._stand_in(part, f"{path}[{i}]") for i, part in enumerate(parts))
        if isinstance(value, Mapping):
            named = cast("Mapping[Any, Any]", value).items()
            return _Parts({k: self._stand_in(part, f"{path}[{k!r}]") for k, part in named})
        if isinstance(value, types.ModuleType):
            return _Names(lambda name: self._stand_in(getattr(value, name), name))
        if callable(value) and not isinstance(value, type | types.MethodType):
            return _Closed(lambda *args, **options: self._function(value, *args, **options))
        return _Closed()

    def _layer(self, part: Any, path: str, data: Any, /, **options: Any) -> _Names:
        modes = {name: value for name, value in options.items() if name in MODES}
        left_out = options.keys() - modes.keys()
        if any(value is not self._mode(name) for name, value in modes.items()):
            raise _OtherError
        if any(options[n] is not self._none or not _is_none(part, n) for n in left_out):
            raise _OtherError
        return self._step(_Call(part, path, modes=frozenset(modes)), data)

    def _function(self, fn: Any, data: Any, /, *args: Any, **options: Any) -> _Names:
        if fn is jnp.reshape:
            return self._reshape(data, *args, **options)
        if args:
            signature = inspect.signature(fn)
            bound = signature.bind(None, *args, **options)
            kinds = [signature.parameters[name].kind for name in list(bound.arguments)[1:]]
            if {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL} & {*kinds}:
                raise _OtherError  # an option has no name that it could be passed by
            (_, *given), options = bound.args, bound.kwargs
            options |= zip(list(bound.arguments)[1 : len(bound.args)], given, strict=True)
        if not all(map(_is_constant, options.values())):
            raise _OtherError
        name = getattr(fn, "__name__", type(fn).__qualname__)
        return self._step(_Call(fn, f".{name}", options), data)

    def _step(self, step: _Call, data: Any) -> _Names:
        if data is not self._latest:
            raise _OtherError
        self._steps.append(step)
        self._latest = self._value()
        return self._latest

    def _value(self) -> _Names:
        """Stands for the data; little but its identity can be seen."""
        self._batch = batch = _Closed()  # of the latest data: a step may change it

        def get(name: str) -> Any:
            if name == "shape":
                return _Shape(batch)
            if name == "reshape":
                return _Closed(functools.partial(self._reshape, value))
            if name in _METHODS:
                return _Closed(functools.partial(self._function, getattr(jnp, name), value))
            raise _OtherError

        value = _Names(get)
        return value

    def _reshape(self, data: Any, *sizes: Any) -> Any:
        """To sizes that are constants, the first of which may be ``data.shape[0]``."""
        shape = sizes[0] if len(sizes) == 1 else sizes
        if _is_constant(shape):
            whole = _Call(jnp.reshape, ".reshape", {"shape": shape})
            row = _Call(jnp.ravel, ".reshape")
            return self._step(row if shape in (-1, (-1,)) else whole, data)
        (batch, *rest) = shape
        if batch is not self._batch or not _is_constant(rest := tuple(rest)):
            raise _OtherError
        rows = self._step(_Call(_FLAT, ".reshape"), data)
        if rest == (-1,):
            return rows
        options = {"axis": 1, "sizes": rest}
        return self._step(_Call(formulas.unflatten, ".reshape", options), rows)


def _names(code: types.CodeType) -> Iterator[str]:
    """Every name of a global, here or in a function within; some are of attributes."""
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _names(const)


def _is_none(layer: Any, name: str) -> bool:
    """Whether an argument of a layer's call is None where it is not given."""
    call: Any = type(layer).__call__
    found = inspect.signature(call).parameters.get(name)
    return found is not None and found.default is None


def _is_mode(path: str, value: Any) -> bool:
    """Whether a constant looks like a mode of the model, by its name or its text."""
    words = {*_WORDS.findall(f"{path} {value}".lower())}
    kinds = {"mode", "phase"} if not isinstance(value, str) else set[str]()
    return not words.isdisjoint(_OF_MODES | kinds)


def _is_constant(value: Any) -> bool:
    if issubclass(type(value), tuple):  # stand-ins hide their class
        return all(map(_is_constant, cast("tuple[Any, ...]", value)))
    return type(value) in _CONSTANTS


def attribute_of(module: Any, name: str) -> Any:
    """What ``module.name`` is, if that is no code of its class.

    Raises:
        AttributeError: it is, or there is no such attribute.
    """
    own = inspect.getattr_static(cast("Any", type(module)), name, None)
    kind = cast("Any", type(own))
    if not hasattr(kind, "__set__"):
        value = getattr(module, name)  # which may set it first
        if name in vars(module) or not hasattr(kind, "__get__"):
            return value
    raise AttributeError(name)
