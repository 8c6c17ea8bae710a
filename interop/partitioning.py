"""The names of the mesh axes that a model's arrays are to be split over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from .errors import ConversionError

if TYPE_CHECKING:
    from .registry import Adapter

__all__ = ["Partitioning", "carry", "check"]


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

    def is_done(self, array: Any) -> bool:
        """Whether ``array`` is split in that way."""
        names = self.names
        if self.logical:
            rules: dict[Any, Any] = {None: None} | dict(self.rules or ())
            if not all(name in rules for name in names):
                return False
            names = tuple(rules[name] for name in names)
        sharding = getattr(array, "sharding", None)
        if not isinstance(sharding, jax.sharding.NamedSharding):
            return False
        try:
            wanted = jax.sharding.NamedSharding(
                sharding.mesh, jax.sharding.PartitionSpec(*names)
            )
        except ValueError:  # the mesh has no axis of that name
            return False
        return sharding.is_equivalent_to(wanted, len(names))


def carry(source: Adapter, node: Any, target: Adapter, built: Any) -> Any:
    """Note beside the arrays of ``built`` what is noted beside those of ``node``.

    Raises:
        ConversionError: as :func:`check` does, of the arrays that have changed.
    """
    noted = [(array, found) for _, array, found in source.partitionings(node)]
    if not noted:
        return built
    by_id = {id(array): found for array, found in noted}
    clash = any(by_id[id(array)] != found for array, found in noted)
    built, placed = target.partition(built, {} if clash else by_id)
    check(source, node, target, placed)
    return built


def check(source: Adapter, node: Any, target: Adapter, placed: set[int]) -> None:
    """Refuse names that would be lost.

    Args:
        placed: the ids of the arrays whose names have found a place in the target.

    Raises:
        ConversionError: names have no place, and the array is not itself split as they say.
    """
    lost = [
        f"{path} is to be split by {found.names}, and is not"
        for path, array, found in source.partitionings(node)
        if id(array) not in placed and any(found.names) and not found.is_done(array)
    ]
    if lost:
        raise ConversionError(
            f"names of mesh axes have no place in {target.name}",
            path="model",
            mismatched=lost,
            remedy="Split these arrays as the names say, by jax.device_put: the conversion "
            "keeps that; or take the names away",
        )
