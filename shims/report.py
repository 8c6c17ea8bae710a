"""What a shim shows: each array of its guest once, its owner, and whether the link is live."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["ArrayRow", "LinkReport"]


@dataclass(frozen=True)
class ArrayRow:
    """One array of a guest.

    Attributes:
        path: the guest's own path, such as ``layers[0].weight.weight``.
        kind: parameter, running statistic, hidden state or buffer.
        array: dtype and shape.
        owner: ``"guest"`` or ``"shim"``: whose value counts.
        shown_as: the host's container or place for it.

    Example:
        >>> import brainstate, shims
        >>> row = shims.explain(shims.ToNNX(brainstate.nn.Linear(3, 4))).rows[0]
        >>> row.path, row.kind, row.array, row.owner
        ('weight.bias', 'parameter', 'float32[4]', 'guest')
    """

    path: str
    kind: str
    array: str
    owner: str
    shown_as: str


@dataclass(frozen=True)
class LinkReport:
    """The arrays behind a shim; ``print`` it, or take ``to_markdown()`` for an issue.

    Attributes:
        guest: the class of the wrapped module.
        host: the class of the shim.
        live: whether a change on one side shows on the other at once.
        rows: each array once.

    Example:
        >>> import brainstate, shims
        >>> shims.explain(shims.ToNNX(brainstate.nn.Linear(3, 4)))
        <LinkReport: Linear in ToNNX, live: one array, seen by both sides; 2 arrays>
    """

    guest: str
    host: str
    live: bool
    rows: tuple[ArrayRow, ...]

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._title()}>"

    def __str__(self) -> str:
        table = [_HEAD, *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(n) for cell, n in zip(cells, widths, strict=True)).rstrip()
            for cells in table
        ]
        return "\n".join([self._title(), *lines])

    def to_markdown(self) -> str:
        """The report as a Markdown table."""
        rows = [_HEAD, ("---",) * len(_HEAD), *(_cells(row) for row in self.rows)]
        return "\n".join([self._title(), "", *map(_markdown, rows)])

    def _title(self) -> str:
        link = "live: one array, seen by both sides" if self.live else "not live"
        return f"{self.guest} in {self.host}, {link}; {len(self.rows)} arrays"


_HEAD = ("path", "kind", "array", "owner", "shown as")


def _cells(row: ArrayRow) -> tuple[str, ...]:
    return row.path, row.kind, row.array, row.owner, row.shown_as


def _markdown(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
