"""The functions users call. They check arguments and dispatch."""

from __future__ import annotations

from typing import Any

from interop.errors import ArgumentError, UnsupportedStructureError
from interop.registry import registry

from .core import check_guest, side_of
from .report import LinkReport

__all__ = ["explain", "wrap_into"]


def explain(shim: Any) -> LinkReport:
    """Tell what a shim shows: each array once, its owner and its view, and if the link is live.

    Args:
        shim: a live shim. Nothing is changed or computed.

    Returns:
        A :class:`LinkReport` to print.

    Raises:
        ArgumentError: ``shim`` is not one of this library's shims.

    Example:
        >>> import brainstate, shims
        >>> print(shims.explain(shims.ToNNX(brainstate.nn.Linear(3, 4))))
        Linear in ToNNX, live: one array, seen by both sides; 2 arrays
        path           kind       array          owner  shown as
        weight.bias    parameter  float32[4]     guest  ParamView
        weight.weight  parameter  float32[3, 4]  guest  ParamView
    """
    report: Any = getattr(shim.__class__, "_shim_report", None)
    if report is None:
        raise ArgumentError(
            f"{type(shim).__qualname__} is not a live shim",
            remedy="Make one with shims.wrap; interop.explain tells how a model converts",
        )
    return report(shim)


def wrap_into(module: Any, into: str, *, copy: bool, **options: Any) -> Any:
    """:func:`wrap`; ``options`` are those of the guests' frameworks."""
    adapter = registry.adapter(into)
    if isinstance(module, adapter.module_type):
        return module
    _, given = check_guest(module, options)  # refuses what cannot be wrapped at all
    host = side_of(into, "host")
    if host is None:
        raise UnsupportedStructureError(
            f"{into} has no live shim for modules of other frameworks",
            remedy=f"Convert it with interop.convert(..., to={into!r}), or choose another host",
        )
    if copy:
        given["copy"] = True
    return host(module, **given)
