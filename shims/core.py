"""What every shim stands on: the guest, its cells, and the two paths of a call.

A *linked* shim's containers are views of the guest's own; its call runs the guest itself. A
*detached* shim is a copy that the host made (in a transformation, or by cloning): it holds
values of its own, and its call runs a private copy of the guest built from them. The guest is
never bound to foreign values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from typing import Any

import jax
import numpy as np

from interop.errors import ArgumentError, ConversionError, UnsupportedStructureError
from interop.registry import registry

__all__ = [
    "Call",
    "Cell",
    "Guest",
    "Kind",
    "Path",
    "Structure",
    "guest_of",
    "path_text",
    "side_of",
]

Path = tuple[str | int, ...]
"""Where a value is in the guest: its attributes, keys and indices."""


class Kind(Enum):
    """What a value of the guest means, which decides the host's container for it."""

    PARAMETER = "parameter"
    STATISTIC = "running statistic"
    HIDDEN = "hidden state"
    BUFFER = "buffer"


@dataclass(frozen=True, eq=False)
class Cell(ABC):
    """One array of the guest, in place: reading and writing reach the guest itself.

    Attributes:
        path: the guest's own path of the array.
        kind: what it means.
    """

    path: Path
    kind: Kind

    @property
    @abstractmethod
    def identity(self) -> tuple[Any, int]:
        """The guest's container, and which of its arrays this is; ties have one identity."""

    @abstractmethod
    def get(self) -> Any:
        """The array, as the guest holds it now."""

    @abstractmethod
    def _put(self, value: Any) -> None: ...

    def set(self, value: Any) -> None:
        """Replace the guest's array.

        Raises:
            ConversionError: ``value`` is no array, or has another shape or dtype. The shape
                of a hidden state may change, as it does with the batch size.
        """
        old = self.get()
        wanted, given = _aval(old), _aval(value)
        if self.kind is Kind.HIDDEN and given is not None and wanted is not None:
            wanted, given = wanted[1:], given[1:]
        if wanted != given:
            raise ConversionError(
                "the value does not fit",
                path=path_text(self.path),
                mismatched=[f"wanted {_described(old)}, got {_described(value)}"],
                remedy="Write an array of the same shape and dtype",
            )
        self._put(value)


def _aval(value: Any) -> tuple[Any, Any] | None:
    if not isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return None
    array: Any = value
    return array.shape, array.dtype


def _described(value: Any) -> str:
    aval = _aval(value)
    return f"{aval[1]}{list(aval[0])}" if aval else type(value).__qualname__


def path_text(path: Path) -> str:
    """A path as people write it: ``layers[0].weight``."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(parts).removeprefix(".")


@dataclass(frozen=True)
class Call:
    """One call of a guest.

    Attributes:
        method: the method's name, ``"__call__"`` for the call itself.
        args, kwargs: its arguments.
        training: the host's mode.
        key: draws a random key from the host; raises where the host has none.
    """

    method: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    training: bool
    key: Callable[[], jax.Array]


class Structure(ABC):
    """All of a guest but its values: compares equal for guests that compute alike.

    Hosts keep it where they keep what compiled functions depend on. Subclasses define
    ``__eq__`` and ``__hash__``.
    """

    guest_type: type
    forward: Callable[..., Any]
    """The guest's call, as its class defines it: for the signature and the documentation."""
    kinds: Mapping[Path, Kind]
    """The kind of each value, by path, each container once."""

    @abstractmethod
    def build(self, values: Mapping[Path, Any]) -> Any:
        """A new native module that holds ``values``."""

    @abstractmethod
    def run(
        self, values: Mapping[Path, Any], call: Call
    ) -> tuple[Any, Structure, dict[Path, Any]]:
        """Run a private copy.

        Returns:
            The output, the copy's structure after the call, and its values by path.
        """


class Guest(ABC):
    """A module of one framework, seen from a shim of another."""

    module: Any
    forward: Callable[..., Any]
    """As in :class:`Structure`."""

    @abstractmethod
    def structure(self) -> Structure:
        """All but the values, as it is now."""

    @abstractmethod
    def cells(self) -> Sequence[Cell]:
        """The guest's arrays as they are now, each container once."""

    @abstractmethod
    def call(self, call: Call) -> Any:
        """Run the module itself."""


def guest_of(module: Any) -> Guest:
    """The guest side of ``module``'s framework.

    Raises:
        ArgumentError: ``module`` is a class, or not a module of a known framework.
        UnsupportedStructureError: that framework's modules cannot be guests.
    """
    if isinstance(module, type):
        raise ArgumentError(
            f"{module.__qualname__} is a class, not an instance",
            remedy=f"Build it first: {module.__qualname__}(...)",
        )
    framework = registry.framework_of(module)
    if framework is None:
        raise ArgumentError(
            f"{type(module).__module__}.{type(module).__qualname__} is not a module of "
            f"{', '.join(registry.names())}"
        )
    make = side_of(framework, "guest")
    if make is None:
        raise UnsupportedStructureError(
            f"{framework} modules cannot be wrapped live",
            remedy="Convert it with interop.convert, if it is made of known layers",
        )
    return make(module)


def side_of(framework: str, side: str) -> Callable[..., Any] | None:
    """The function ``guest`` or ``host`` of a framework's file; None where it has none."""
    file = f"{__package__}.frameworks.{framework}"
    try:
        return getattr(import_module(file), side, None)
    except ModuleNotFoundError as e:
        if e.name != file:
            raise
        return None
