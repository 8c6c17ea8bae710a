"""What the composites of every framework share: a spec taken apart, and put together again.

A composite is a module that holds one spec: its arrays in containers of the framework, and
the rest in a :class:`Skeleton`, which is static. Arrays are in a nested dict, a *tree*, by the
names of the spec's fields; those of a child are such a dict again.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import ArgumentError
from ..specs import Run, Spec

__all__ = [
    "Constant",
    "Skeleton",
    "Tree",
    "assign",
    "channels_first",
    "combine",
    "construct",
    "packed",
    "signature",
    "split",
    "subclass",
    "unpacked",
    "updated",
]

Tree = dict[str, Any]


class Constant:
    """An array that is an option, such as a mask: never trained, and compared by value."""

    def __init__(self, value: Any):
        self.value = value
        array = np.asarray(value)
        self._key = (array.shape, array.dtype.name, array.tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"{self._key[1]}{list(self._key[0])}"


class Skeleton:
    """A spec without its arrays; equal for equal options, and hashable.

    Attributes:
        spec_type: the spec's class.
        fields: its fields by name: a ``ShapeDtypeStruct`` for an array, a :class:`Skeleton`
            for a child, a :class:`Constant` for an array that is an option.
    """

    spec_type: type[Spec]
    fields: tuple[tuple[str, Any], ...]

    def __init__(self, spec_type: type[Spec], fields: tuple[tuple[str, Any], ...]):
        self.spec_type, self.fields = spec_type, fields

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Skeleton):
            return NotImplemented
        return self.spec_type is other.spec_type and self.fields == other.fields

    def __hash__(self) -> int:
        return hash((self.spec_type, self.fields))

    def merge(self, arrays: Mapping[str, Any]) -> Any:
        """The spec with given arrays, a tree."""
        return self.spec_type(
            **{name: _filled(value, arrays.get(name, {})) for name, value in self.fields}
        )

    @functools.cached_property
    def empty(self) -> Tree:
        """The tree with a ``ShapeDtypeStruct`` in the place of each array."""
        return _pruned({name: _empty(value) for name, value in self.fields})

    @property
    def shaped(self) -> Any:
        """The spec with a ``ShapeDtypeStruct`` in the place of each array."""
        return self.merge(self.empty)

    def buffers(self, arrays: Mapping[str, Any]) -> Tree:
        """The part of a tree that is not trained."""
        return self._part(arrays, is_buffer=True)

    def trained(self, arrays: Mapping[str, Any]) -> Tree:
        """The part of a tree that is trained."""
        return self._part(arrays, is_buffer=False)

    def _part(self, arrays: Mapping[str, Any], is_buffer: bool) -> Tree:
        known, part = dict(self.fields), Tree()
        for name, value in arrays.items():
            child = known[name]
            if isinstance(child, Skeleton):
                part[name] = child._part(value, is_buffer)
            elif (name in self.spec_type.buffers) == is_buffer:
                part[name] = value
        return _pruned(part)

    def __repr__(self) -> str:
        defaults = {field.name: field.default for field in dataclasses.fields(self.spec_type)}
        shown = [
            f"{name}={_text(value)}"
            for name, value in self.fields
            if value is not defaults[name] and value != defaults[name]
        ]
        return f"{self.spec_type.__name__}({', '.join(shown)})"


def split(spec: Spec) -> tuple[Skeleton, Tree]:
    """A spec as its skeleton and its arrays."""
    fields: list[tuple[str, Any]] = []
    arrays: Tree = {}
    spec = spec.joined()
    for field in dataclasses.fields(spec):
        name, value = field.name, getattr(spec, field.name)
        if not field.init:
            continue
        if isinstance(value, Spec):
            value, arrays[name] = split(value)
        elif name in spec.trained + spec.buffers and value is not None:
            arrays[name] = value
            value = jax.ShapeDtypeStruct(value.shape, value.dtype)
        else:
            value = _held(value)
        fields.append((name, value))
    return Skeleton(type(spec), tuple(fields)), _pruned(arrays)


def combine(one: Mapping[str, Any], other: Mapping[str, Any]) -> Tree:
    """The leaves of two trees; those of ``other`` win."""
    both = dict(one)
    for name, value in other.items():
        is_tree = isinstance(value, Mapping) and isinstance(both.get(name), Mapping)
        both[name] = combine(both[name], cast("Tree", value)) if is_tree else value
    return both


def updated(spec: Spec, run: Run) -> Tree:
    """The tree of those buffers of ``spec`` and of its children that a run has changed."""
    found: Tree = dict(run.updates.get(id(spec), {}))
    found |= {name: updated(part, run) for name, part in spec.inner().items()}
    return _pruned(found)


def assign(holders: Any, tree: Mapping[str, Any], put: Callable[[Any, Any], None]) -> None:
    """Give containers of a framework, in such a tree, the values of another, by ``put``."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            assign(holders[name], cast("Tree", value), put)
        else:
            put(holders[name], value)


def construct(spec_type: type[Spec], args: Any, options: Mapping[str, Any], key: Any) -> Any:
    """The spec for a composite's constructor: the one it is given, or a fresh one.

    Args:
        spec_type: the class of spec that the composite holds.
        args: one spec, or the sizes that ``spec_type.shaped`` takes.
        options: the options that it takes.
        key: returns a random key for fresh arrays; None leaves a ``ShapeDtypeStruct`` for each.

    Raises:
        ArgumentError: the sizes or options are not those of ``spec_type.shaped``.
    """
    if args and isinstance(args[0], spec_type):
        return args[0]
    try:
        signature(spec_type).bind(*args, **options)
    except TypeError as e:
        name = spec_type.__name__
        raise ArgumentError(f"{name}: {e}", remedy=f"See help({name})") from e
    empty = spec_type.shaped(*args, **options)
    return empty if key is None else empty.initial(key())


def channels_first(spec: Spec, formula: Callable[..., Any]) -> Callable[..., Any]:
    """A formula for batches, channels last, as a function of examples, channels first."""
    moves = bool(spec.space) or spec.has_channels

    def enter(x: Any) -> Any:
        x = jnp.asarray(x)
        x = jnp.moveaxis(x, 0, -1) if moves and x.ndim > 1 else x
        return x if spec.takes_examples else x[None]

    def leave(y: Any) -> Any:
        y = y if spec.takes_examples else y[0]
        return jnp.moveaxis(y, -1, 0) if moves and y.ndim > 1 else y

    def option(value: Any) -> Any:
        if callable(value):
            return jax.vmap(value)
        return enter(value) if isinstance(value, jax.Array | np.ndarray) else value

    def call(*inputs: Any, **options: Any) -> Any:
        given = jax.tree.map(option, options)
        return jax.tree.map(leave, formula(*jax.tree.map(enter, inputs), **given))

    return call


def subclass(base: type, spec_type: type[Spec], module: str, **namespace: Any) -> Any:
    """The composite of one kind of layer: ``base`` with its documentation.

    Args:
        base: the framework's class that holds a spec.
        spec_type: the kind.
        module: where the class is a global variable under the spec's name.
        **namespace: further attributes of the class.
    """
    namespace |= {"spec_type": spec_type, "__module__": module, "__doc__": spec_type.__doc__}
    return types.new_class(spec_type.__name__, (base,), {}, lambda body: body.update(namespace))


def signature(spec_type: type[Spec], *options: str) -> inspect.Signature:
    """What the constructor of a composite takes: as ``spec_type.shaped``, and ``options``."""
    given = inspect.signature(spec_type.shaped).parameters.values()
    explicit = [p for p in given if p.kind is not inspect.Parameter.VAR_KEYWORD]
    names = [p.name for p in explicit]
    defaults = {name: None for name in options}
    if len(explicit) < len(given):  # the rest are options of the spec by their own names
        defaults = _options(spec_type) | defaults
    rest = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in defaults.items()
        if name not in names
    ]
    return inspect.Signature([*explicit, *rest])


def _options(spec_type: type[Spec]) -> dict[str, Any]:
    arrays = spec_type.trained + spec_type.buffers + spec_type.children
    fields = [field for field in dataclasses.fields(spec_type) if field.init]
    return {
        field.name: field.default
        for field in fields
        if field.name not in arrays and field.default is not dataclasses.MISSING
    }


def packed(state: tuple[Any, ...], output_last: bool = False) -> Any:
    """The state of a cell as its carry: a tuple, or the one array that there is."""
    state = state[::-1] if output_last else state
    return state[0] if len(state) == 1 else state


def unpacked(carry: Any, output_last: bool = False) -> tuple[Any, ...]:
    """The inverse of :func:`packed`."""
    state = tuple(carry) if isinstance(carry, list | tuple) else (carry,)
    return state[::-1] if output_last else state


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray)


def _filled(value: Any, arrays: Any) -> Any:
    if isinstance(value, jax.ShapeDtypeStruct):
        return arrays
    if isinstance(value, Skeleton):
        return value.merge(arrays)
    return _released(value)


def _empty(value: Any) -> Any:
    if isinstance(value, jax.ShapeDtypeStruct):
        return value
    if isinstance(value, Skeleton):
        return value.empty
    return {}


def _pruned(tree: Mapping[str, Any]) -> Tree:
    return {name: v for name, v in tree.items() if not (isinstance(v, dict) and not v)}


def _held(value: Any) -> Any:
    """An option in a form that has a hash."""
    if _is_array(value):
        return Constant(value)
    if isinstance(value, list | tuple):
        return tuple(map(_held, cast("tuple[Any, ...]", value)))
    return value


def _released(value: Any) -> Any:
    if isinstance(value, Constant):
        return value.value
    if isinstance(value, tuple):
        return tuple(map(_released, cast("tuple[Any, ...]", value)))
    return value


def _text(value: Any) -> str:
    if isinstance(value, jax.ShapeDtypeStruct):
        return f"{value.dtype.name}{list(value.shape)}"
    return getattr(value, "__name__", None) or repr(value)
