"""What converts: a row for each kind of layer, a column for each framework, from the rules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .registry import Adapter, registry

__all__ = ["Grid", "layers", "refused"]


@dataclass(frozen=True)
class Grid:
    """A table of text.

    Attributes:
        columns: the headings.
        rows: as many cells each.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_markdown(self) -> str:
        """The table in Markdown."""
        head, *rows = [f"| {' | '.join(cells)} |" for cells in (self.columns, *self.rows)]
        return "\n".join([head, "|---" * len(self.columns) + "|", *rows]) + "\n"


def layers(names: Sequence[str] | None = None) -> Grid:
    """What each framework has for each kind of layer.

    Args:
        names: the frameworks, by default all that there are files for.

    Returns:
        A row for each spec: the native classes, ``function`` for a plain callable, or
        ``composite`` for a module of this library.

    Raises:
        MissingDependencyError, BrokenDependencyError: a framework cannot be imported.

    Example:
        >>> from interop.support import layers
        >>> grid = layers(["brainstate", "nnx"])
        >>> next(row for row in grid.rows if row[0] == "LayerNorm")
        ('LayerNorm', '`LayerNorm`', '`LayerNorm`')
    """
    adapters = [registry.adapter(name) for name in names or registry.names()]
    cells = {adapter.name: _cells(adapter) for adapter in adapters}
    kinds = sorted({kind for found in cells.values() for kind in found})
    return Grid(
        ("layer", *cells),
        tuple((kind, *(found.get(kind, "") for found in cells.values())) for kind in kinds),
    )


def refused(names: Sequence[str] | None = None) -> Grid:
    """Which layers no framework can take over exactly, and why.

    Args:
        names: as in :func:`layers`.

    Raises:
        MissingDependencyError, BrokenDependencyError: a framework cannot be imported.

    Example:
        >>> from interop.support import refused
        >>> refused(["brainstate"]).rows[0][:2]
        ('`EventFixedNumConn`', 'brainstate')
    """
    rows: list[tuple[str, ...]] = []
    for adapter in (registry.adapter(name) for name in names or registry.names()):
        classes: defaultdict[str, list[str]] = defaultdict(list)
        for cls, reason in adapter.refused.items():
            classes[reason].append(cls.__name__)
        rows += [(_listed(found), adapter.name, why) for why, found in classes.items()]
    return Grid(("layer", "framework", "why"), tuple(rows))


def _cells(adapter: Adapter) -> dict[str, str]:
    """By the name of each spec: what the framework has for it."""
    shipped = set(adapter.composites.values())
    native: defaultdict[str, list[str]] = defaultdict(list)
    cells: dict[str, str] = {}
    for rule in adapter.readers.values():
        if rule.layer_type in shipped:
            cells[rule.spec_type.__name__] = "composite"
        else:
            native[rule.spec_type.__name__].append(rule.layer_type.__name__)
    cells |= {rule.spec_type.__name__: "function" for rule in adapter.builders.values()}
    return cells | {kind: _listed(classes) for kind, classes in native.items()}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))
