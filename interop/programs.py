"""What a traced program does, and what it needs of what it has."""

# jax declares some of its types only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

__all__ = ["alike", "inputs_read", "needed", "operations"]


def needed(jaxpr: Any) -> list[Any]:
    """The operations that the outputs depend on, in order."""
    return _looked_back(jaxpr)[0]


def inputs_read(jaxpr: Any) -> set[int]:
    """The positions of the inputs that the outputs depend on."""
    _, wanted = _looked_back(jaxpr)
    return {i for i, variable in enumerate(jaxpr.invars) if id(variable) in wanted}


def operations(jaxpr: Any) -> Iterator[Any]:
    """All operations, also those of nested programs."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from operations(inner)


# What may depend on whether an axis has one element, and computes nothing.
_SHAPING = {
    *("broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "jit", "pjit"),
    *("reshape", "squeeze", "transpose"),
}


def alike(trace: Callable[..., Any], sizes: Iterable[tuple[Any, ...]]) -> bool:
    """Whether a program is made of the same operations, on the same inputs, for some sizes.

    Code that compares a size with another takes one way for a symbolic size, which JAX holds
    to be unlike any number and any other symbol, and may take another for a number.

    Args:
        trace: the jaxpr for such sizes; what raises is left out.
        sizes: its arguments.
    """
    found: list[Any] = []
    for given in sizes:
        try:
            jaxpr = trace(*given).jaxpr
        except Exception:  # noqa: S112 - the code says itself that it takes no such sizes
            continue
        names = (equation.primitive.name for equation in operations(jaxpr))
        counts = Counter(name for name in names if name not in _SHAPING)
        found.append((counts, inputs_read(jaxpr)))
    return all(each == found[0] for each in found)


def _looked_back(jaxpr: Any) -> tuple[list[Any], set[int]]:
    wanted, found = set(map(id, jaxpr.outvars)), list[Any]()
    for eqn in reversed(jaxpr.eqns):
        if any(id(variable) in wanted for variable in eqn.outvars):
            wanted.update(map(id, eqn.invars))
            found.append(eqn)
    return found[::-1], wanted
