"""Variables whose value is an array of a guest.

Private API: ``Variable._raw_value``, which a view overrides. ``check_link`` tries at first use
that it works both ways.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
from flax import nnx

from interop.errors import InteropError
from interop.frameworks.nnx.adapter import metadata_of
from interop.partitioning import Partitioning

from ...core import Cell, Kind, Probe, Views

__all__ = ["Buffer", "HiddenState", "cell_of", "check_link", "owned", "view_of"]


class HiddenState(nnx.Cache[Any]):
    """Recurrent state of a guest: never a parameter, and not worth a checkpoint."""


class Buffer(nnx.Variable[Any]):
    """A value of a guest that is neither trained nor a running statistic."""


class _Link(NamedTuple):
    """What a linked view holds; another holds its value."""

    cell: Cell


def _view_type(base: type[nnx.Variable]) -> type[nnx.Variable]:
    """A Variable class whose linked instances keep their value in a guest's cell."""

    class View(base):
        __slots__ = ("_shim_held", "__weakref__")

        @property
        def _raw_value(self) -> Any:
            held = object.__getattribute__(self, "_shim_held")
            return held.cell.get() if type(held) is _Link else held

        @_raw_value.setter
        def _raw_value(self, value: Any) -> None:
            cell = cell_of(self)
            if cell is None:
                object.__setattr__(self, "_shim_held", value)
            else:
                cell.set(value)

    View.__name__ = View.__qualname__ = f"{base.__name__}View"
    View.__doc__ = f"An ``nnx.{base.__name__}`` that can show an array of a wrapped layer."
    return View


def cell_of(view: nnx.Variable[Any]) -> Cell | None:
    """The cell that a view shows; None for any other Variable."""
    try:
        held = object.__getattribute__(view, "_shim_held")
    except AttributeError:
        return None
    return held.cell if type(held) is _Link else None


_TYPES = {
    Kind.PARAMETER: _view_type(nnx.Param),
    Kind.STATISTIC: _view_type(nnx.BatchStat),
    Kind.HIDDEN: _view_type(HiddenState),
    Kind.BUFFER: _view_type(Buffer),
}


def owned(
    kind: Kind, value: Any, partitioning: Partitioning | None = None
) -> nnx.Variable[Any]:
    """A Variable for a value of that kind, linked to nothing."""
    metadata = metadata_of(partitioning)
    return _TYPES[kind](value, hijax=False, ref=False, eager_sharding=False, **metadata)


def _linked(cell: Cell) -> nnx.Variable:
    view = owned(cell.kind, cell.get())
    object.__setattr__(view, "_shim_held", _Link(cell))
    return view


def _is_own(container: Any) -> bool:
    return isinstance(container, nnx.Variable) and isinstance(
        container.get_raw_value(), jax.Array
    )


_views: Views[nnx.Variable] = Views(_linked, _is_own)


def view_of(cell: Cell) -> nnx.Variable[Any]:
    """The view of a cell."""
    return _views.of(cell)


@functools.cache
def check_link() -> None:
    """Try that a view works both ways with the installed version.

    Raises:
        InteropError: it does not; the message names the version.
    """

    probe, written = Probe(), jnp.ones(2)
    view = _linked(probe)  # type: ignore[arg-type]
    view.set_value(written)
    copy = view.copy()
    if (
        probe.value is not written
        or view.get_value() is not written
        or cell_of(copy) is not None
        or copy.get_value() is not written
    ):
        raise InteropError(
            f"views do not work with flax {flax.__version__}",
            remedy="Install a version that this library supports, or convert with interop",
        )
