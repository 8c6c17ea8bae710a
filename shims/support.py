"""Which live shims there are: the public class for each guest in each host."""

from __future__ import annotations

from collections.abc import Sequence

import shims
from interop.registry import registry
from interop.support import Grid

from .core import side_of

__all__ = ["pairs"]


def pairs(names: Sequence[str] | None = None) -> Grid:
    """The class that wraps a guest (row) for a host (column), from the frameworks' files.

    Args:
        names: the frameworks, by default all that there are files for.

    Raises:
        MissingDependencyError, BrokenDependencyError: a framework cannot be imported.

    Example:
        >>> from shims.support import pairs
        >>> pairs(["brainstate", "nnx"]).rows
        (('brainstate', 'itself', '`ToNNX`'), ('nnx', '`FromNNX`', 'itself'))
    """
    names = names or registry.names()
    classes = {name.lower(): name for name in shims.__all__}

    def cell(guest: str, host: str) -> str:
        if guest == host:
            return "itself"
        if side_of(guest, "guest") is None or side_of(host, "host") is None:
            return ""
        return f"`{classes.get(f'to{host}') or classes[f'from{guest}']}`"

    rows = ((guest, *(cell(guest, host) for host in names)) for guest in names)
    return Grid(("guest \\ host", *names), tuple(rows))
