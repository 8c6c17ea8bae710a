"""The names of the mesh axes that a model's arrays are to be split over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Partitioning"]


@dataclass(frozen=True)
class Partitioning:
    """What a framework notes beside an array of how to split it, whether it is split or not.

    Attributes:
        names: for each axis of the array the mesh axis, a tuple of them, or None.
        mesh: the mesh, or None for that of the context.
        logical: whether the names stand for mesh axes by ``rules`` and those of the context.
        rules: pairs of a name and a mesh axis, or None.
    """

    names: tuple[Any, ...]
    mesh: Any = None
    logical: bool = False
    rules: Any = None

    @classmethod
    def of(
        cls, array: Any, names: Any, mesh: Any, logical: bool, rules: Any
    ) -> Partitioning | None:
        """What is noted beside ``array``: of the names, the last may be left out.

        None where there are more names than axes.
        """
        missing = np.ndim(array) - len(names)
        if missing < 0:
            return None
        return cls((*names, *(None,) * missing), mesh, logical, rules if logical else None)
