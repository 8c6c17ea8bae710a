"""What a traced program does, and what it needs of what it has."""

# jax declares some of its types only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

__all__ = ["alike", "inputs_read", "needed", "operations", "returned_as_given"]


def needed(jaxpr: Any) -> list[Any]:
    """The operations that the outputs depend on, in order."""
    return _looked_back(jaxpr)[0]


def inputs_read(jaxpr: Any) -> set[int]:
    """The positions of the inputs that the outputs depend on."""
    _, wanted = _looked_back(jaxpr)
    return {i for i, variable in enumerate(jaxpr.invars) if id(variable) in wanted}


def returned_as_given(function: Callable[..., Any], *inputs: Any) -> list[bool]:
    """For each output, if it is the input at its place, as it is or out of nested programs."""
    jaxpr = jax.make_jaxpr(function)(*inputs).jaxpr
    return [i == n for n, i in enumerate(_passed_on(jaxpr))]


def _passed_on(jaxpr: Any) -> list[int | None]:
    """For each output the position of the input that it is; None where it is computed."""
    known = {id(variable): i for i, variable in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        for out, i in zip(eqn.outvars, _passed_through(eqn), strict=False):
            if i is not None and id(eqn.invars[i]) in known:
                known[id(out)] = known[id(eqn.invars[i])]
    return [known.get(id(variable)) for variable in jaxpr.outvars]


def _passed_through(eqn: Any) -> list[int | None]:
    """The same for one operation that holds programs; nothing for others."""
    params = eqn.params
    match eqn.primitive.name:
        case "scan":
            return _passed_through_scan(eqn, params["jaxpr"].jaxpr)
        case "while":
            consts, first = params["cond_nconsts"], params["body_nconsts"]
            found = _passed_on(params["body_jaxpr"].jaxpr)
            return [consts + i if i == first + n else None for n, i in enumerate(found)]
        case "cond":
            branches = [_passed_on(branch.jaxpr) for branch in params["branches"]]
            return [
                i[0] + 1 if i[0] is not None and len(set(i)) == 1 else None
                for i in zip(*branches, strict=True)
            ]
        case "jit" | "pjit" | "checkpoint" | "remat" | "remat2" | "closed_call":
            return _passed_on(getattr(params["jaxpr"], "jaxpr", params["jaxpr"]))
        case _:
            return []


def _passed_through_scan(eqn: Any, body: Any) -> list[int | None]:
    """It takes constants, a carry and what is mapped over, and returns the carry and stacks."""
    is_whole = [_as_many_axes(*pair) for pair in zip(eqn.invars, body.invars, strict=True)]
    carried = sum(map(_as_many_axes, eqn.outvars, body.outvars))
    first = sum(is_whole) - carried
    found = _passed_on(body)
    carry = [i if i == first + n else None for n, i in enumerate(found[:carried])]
    return carry + [None if i is None or is_whole[i] else i for i in found[carried:]]


def _as_many_axes(variable: Any, other: Any) -> bool:
    return variable.aval.ndim == other.aval.ndim


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
