"""How a shim shows its guest: signature, documentation, methods and attributes."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import wrapt

from interop.errors import ArgumentError

from .core import Path, Structure

__all__ = [
    "OfInstance",
    "cell_signature",
    "check_keywords",
    "check_names",
    "forwarded",
    "is_method",
    "named_class",
    "parameter_names",
    "refuse_attribute",
    "signature_with",
    "without_self",
]


_NO_METHODS: tuple[type, ...] = (staticmethod, classmethod, property)


class OfInstance:
    """An attribute that is computed for instances and plain for the class."""

    def __init__(self, compute: Callable[[Any], Any], of_class: Any = None):
        self._compute, self._of_class = compute, of_class

    def __get__(self, shim: Any, owner: type | None = None) -> Any:
        if shim is not None:
            return self._compute(shim)
        if self._of_class is None:
            raise AttributeError
        return self._of_class


_names: weakref.WeakKeyDictionary[Any, tuple[str, ...]] = weakref.WeakKeyDictionary()


def parameter_names(method: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a method's parameters, as its class defines it."""
    function = getattr(method, "__func__", method)
    if not inspect.isfunction(function):
        return tuple(inspect.signature(function).parameters)
    if function not in _names:
        _names[function] = tuple(inspect.signature(function).parameters)
    return _names[function]


@functools.cache
def named_class(cls: type, guest: str) -> type:
    """A class of shims whose name tells the guest's: tables of a host show no more of a module.

    There is one for each name, so that it keeps no class of guests alive.
    """
    attributes = {
        "__doc__": vars(cls).get("__doc__"),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "_shim_plain": cls,
    }
    return type(cls)(f"{cls.__name__}({guest})", (cls,), attributes)


def without_self(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a method, as its caller sees it."""
    own = inspect.signature(function)
    return own.replace(parameters=list(own.parameters.values())[1:])


def signature_with(structure: Structure, keywords: Iterable[str]) -> inspect.Signature:
    """The guest's signature, and the keywords that its shim adds."""
    own = without_self(structure.forward)
    parameters = list(own.parameters.values())
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in keywords
        if name not in own.parameters
    ]
    last = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    return own.replace(parameters=[*(p for p in parameters if p not in last), *added, *last])


def cell_signature(positional: Iterable[str], keywords: Iterable[str]) -> inspect.Signature:
    """The signature of a recurrent cell's shim: its host's, whatever the guest's is."""
    made = inspect.Parameter
    return inspect.Signature(
        [made(name, made.POSITIONAL_OR_KEYWORD) for name in positional]
        + [made(name, made.KEYWORD_ONLY, default=None) for name in keywords]
    )


def check_names(
    structure: Structure,
    *,
    host: type,
    keywords: Iterable[str],
    methods: Iterable[str],
    paths: Iterable[Path],
) -> None:
    """Refuse a guest for which the host would answer in its place.

    Args:
        structure: the guest.
        host: the shim class; none of its attributes may be a guest's array.
        keywords: names that calls of the shim take; no argument of the guest may have one.
        methods: public methods of the shim; no method of the guest may have one.
        paths: paths of the guest's arrays that become attributes of the shim.

    Raises:
        ArgumentError: names collide.
    """
    keywords = tuple(keywords)
    names = {str(path[0]) for path in paths}
    taken = {name for name in names if hasattr(host, name) or name in keywords}
    taken |= {name for name in methods if callable(getattr(structure.guest_type, name, None))}
    taken |= {name for name in _own_methods(structure) if hasattr(host, name)}
    arguments = set(inspect.signature(structure.forward).parameters)
    taken |= (set(keywords) & arguments) - structure.fills
    if taken:
        raise ArgumentError(
            f"{structure.guest_type.__qualname__} has names that the shim needs itself: "
            f"{', '.join(sorted(taken))}",
            remedy="Rename them, or wrap a module that holds this one as an attribute",
        )


def check_keywords(structure: Structure, name: str, keywords: Iterable[str]) -> None:
    """Refuse to forward a method of the guest that names an argument as the host does.

    Raises:
        ArgumentError: an argument of the method has the name of one of ``keywords``.
    """
    arguments = inspect.signature(getattr(structure.guest_type, name)).parameters
    if taken := sorted((set(keywords) & set(arguments)) - structure.fills):
        raise ArgumentError(
            f"{structure.guest_type.__qualname__}.{name} has arguments that calls of the shim "
            f"take themselves: {', '.join(taken)}",
            remedy="Rename them, or call the method on shim.unwrap()",
        )


def _own_methods(structure: Structure) -> set[str]:
    """Public methods of the guest's class, but its call, that its framework's base lacks."""
    classes = structure.guest_type.__mro__
    return {
        name
        for cls in classes[: classes.index(structure.base_type)]
        for name, value in vars(cls).items()
        if inspect.isroutine(value)
        and not name.startswith("_")
        and name != structure.forward.__name__
        and not hasattr(structure.base_type, name)
    }


def refuse_attribute(guest: Any, name: str) -> None:
    """Refuse to set an attribute on a shim that the guest has: the guest would not see it.

    Raises:
        ArgumentError: the guest has it.
    """
    if hasattr(guest, name):
        raise ArgumentError(
            f"{name} is an attribute of the wrapped {type(guest).__qualname__}, and setting it "
            f"on the shim would not change it",
            remedy=f"Set it on the module: shim.unwrap().{name} = ...; write arrays into the "
            f"shim's containers",
        )


def is_method(guest: Any, name: str) -> bool:
    """Whether ``guest.name`` is a method of its class, which computes with its arrays."""
    static: Any = inspect.getattr_static
    defined: Any = static(guest.__class__, name, None)
    return callable(defined) and not isinstance(defined, _NO_METHODS)


def forwarded(guest: Any, name: str, run: Callable[..., Any]) -> Any:
    """``guest.name``: an attribute as it is, a method as a call of the shim.

    Args:
        guest: the guest's module.
        name: the attribute.
        run: ``run(name, args, kwargs)`` calls the method through the shim.

    Raises:
        AttributeError: the guest has no such attribute.
    """
    value: Any = getattr(guest, name)
    if not is_method(guest, name):
        return value

    @wrapt.decorator
    def through_the_shim(
        wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return run(name, args, kwargs)

    return through_the_shim(value)
