"""Whether a module that changes in place is as it was: cheaper than to take it apart again."""

# Attributes of modules are of any type.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import functools
import inspect
import operator
import sys
from abc import abstractmethod
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import chain
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np

from .core import Cell, LiveGuest, Looks, Structure

__all__ = ["Same", "Watch", "WatchedGuest", "held", "layout"]

_CONSTANT = {type(None), bool, int, float, complex, str, bytes}


class Watch:
    """Modules and their containers of arrays, but not the arrays' values, at one time.

    Attributes are compared by identity, and by their contents too where these can change:
    items of containers, elements of NumPy arrays, what other objects hold, and the hash of what
    has one of its own.

    Args:
        modules: every module; their attributes stand in ``vars``.
        containers: what holds arrays.
        facts: what counts of a container: what is equal as long as it is as it was, and
            what is compared by identity.
        constant: classes whose instances never change.
    """

    def __init__(
        self,
        modules: Iterable[Any],
        containers: Iterable[Any],
        facts: Callable[[Any], tuple[Any, Collection[Any]]],
        constant: Iterable[type] = (),
    ):
        self._constant = _CONSTANT.union(constant)
        modules, self._containers, self._facts = list(modules), list(containers), facts
        self._dicts: list[dict[Any, Any]] = list(map(vars, modules))
        self._lists: list[list[Any]] = []
        self._contents: list[tuple[Callable[[Any], Any], Any, Any]] = []
        self._known_by_id = set(map(id, (*modules, *self._containers)))
        for value in list(chain(*map(dict.values, self._dicts))):
            self._watch(value)
        self._known = self._found()

    def _watch(self, value: Any) -> None:
        """Note what can change inside of ``value``."""
        kind = type(value)
        is_known = kind in self._constant or id(value) in self._known_by_id
        if is_known or isinstance(value, jax.Array):
            return
        if kind is tuple:
            parts: Iterable[Any] = value
        elif kind is list:
            self._lists.append(value)
            parts = value
        elif kind is dict:
            self._dicts.append(value)
            parts = value.values()
        else:
            parts = self._watch_other(value)
        for part in parts:
            self._watch(part)

    def _watch_other(self, value: Any) -> Iterable[Any]:
        """The same for what is no plain container; the parts that it has."""
        if isinstance(value, np.ndarray):
            self._contents.append((_elements, value, _elements(value)))
        elif not jax.tree_util.all_leaves((value,)):
            flat, tree = _parts(value)
            self._contents.append((_parts, value, (flat, tree)))
            return [part.value for part in flat]
        elif isinstance(value, set):
            self._contents.append((frozenset, value, frozenset(value)))
        elif (inner := held(value)) is not None:
            self._known_by_id.add(id(value))  # it may hold itself
            self._dicts.append(vars(value))
            return inner.values()
        elif type(value).__hash__ not in (None, object.__hash__):
            self._contents.append((_hash, value, _hash(value)))
        return ()

    def _found(self) -> tuple[Any, ...]:
        facts = [self._facts(container) for container in self._containers]
        held = [*map(dict.values, self._dicts), *self._lists, *[same for _, same in facts]]
        equal = [*map(len, held), *chain(*self._dicts), *[fact for fact, _ in facts]]
        return equal, [*chain(*held)]

    def holds(self) -> bool:
        """Whether all is as it was."""
        equal, values = self._found()
        return (
            equal == self._known[0]
            and all(map(operator.is_, values, self._known[1]))
            and all([look(value) == old for look, value, old in self._contents])
        )


class Same(NamedTuple):
    """Compares by identity."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _elements(array: np.ndarray[Any, Any]) -> Any:
    elements = array.tolist() if array.dtype == object else array.tobytes()
    return array.shape, array.dtype, elements


def _parts(value: Any) -> tuple[list[Same], Any]:
    flat, tree = jax.tree.flatten(value, is_leaf=lambda part: part is not value)
    return list(map(Same, flat)), tree


def _hash(value: Any) -> int | None:
    try:
        return hash(value)
    except TypeError:  # something inside has no hash: it counts by identity
        return None


_OTHERS = sys.stdlib_module_names | {"jax", "jaxlib", "numpy", "interop", "shims"}


def held(value: Any) -> dict[str, Any] | None:
    """The public attributes of an object that may hold a module's settings; else None.

    Its class is the user's or of another package: no function or class, and nothing of Python's
    own library, as loggers are, or of this one. What a class computes once and keeps does not
    count.
    """
    cls = type(value)
    is_other = cls.__module__.partition(".")[0] in _OTHERS
    is_settings = not is_other or cls in (SimpleNamespace, Namespace)
    if isinstance(value, type) or not hasattr(value, "__dict__") or not is_settings:
        return None
    return {
        name: part
        for name, part in vars(value).items()
        if not name.startswith("_")
        and not isinstance(inspect.getattr_static(cls, name, None), functools.cached_property)
    }


def layout(value: Any) -> tuple[Any, ...]:
    """What a tree of arrays is but for their elements and shapes."""
    if isinstance(value, jax.Array):
        return (value.dtype,)
    flat, tree = jax.tree.flatten(value)
    return tree, *[getattr(leaf, "dtype", type(leaf)) for leaf in flat]


class WatchedGuest(LiveGuest):
    """A live guest that is taken apart again only when it has changed."""

    _last: tuple[Watch | None, Looks] | None = None

    @abstractmethod
    def _look(self) -> tuple[Watch | None, Looks]:
        """The guest as it is now, and what tells whether it still is, if anything can.

        The watch has to be made first, so that no change is missed.
        """

    def looks(self) -> Looks:
        last = self._last
        if last is None or last[0] is None or not last[0].holds():
            last = self._last = self._look()
        return last[1]

    def structure(self) -> Structure:
        return self.looks().structure

    def cells(self) -> Sequence[Cell]:
        return self.looks().cells
