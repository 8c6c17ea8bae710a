"""What a traced program needs of what it has."""

from __future__ import annotations

from typing import Any

__all__ = ["inputs_read", "needed"]


def needed(jaxpr: Any) -> list[Any]:
    """The operations that the outputs depend on, in order."""
    return _looked_back(jaxpr)[0]


def inputs_read(jaxpr: Any) -> set[int]:
    """The positions of the inputs that the outputs depend on."""
    _, wanted = _looked_back(jaxpr)
    return {i for i, variable in enumerate(jaxpr.invars) if id(variable) in wanted}


def _looked_back(jaxpr: Any) -> tuple[list[Any], set[int]]:
    wanted, found = set(map(id, jaxpr.outvars)), list[Any]()
    for eqn in reversed(jaxpr.eqns):
        if any(id(variable) in wanted for variable in eqn.outvars):
            wanted.update(map(id, eqn.invars))
            found.append(eqn)
    return found[::-1], wanted
