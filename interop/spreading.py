"""Several outputs of a layer in a stack: some frameworks spread them over the arguments of the
next one, others pass them on as they are.

:func:`spread` changes the functions of a stack so that each is called as in the source.
Other layers take one array, and fail on several in any framework.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import formulas, specs

if TYPE_CHECKING:
    from .registry import Adapter

__all__ = ["chained", "spread"]


def spread(
    root: specs.Spec, origins: dict[int, tuple[str, type]], source: Adapter, target: Adapter
) -> specs.Spec:
    """The model for the target's way with several outputs.

    Args:
        root: the model.
        origins: where each spec came from; the new ones are added.
        source, target: the frameworks.
    """
    if source.spreads == target.spreads:
        return root
    new: dict[int, specs.Spec] = {}
    before: specs.Spec | None = None
    for leaf in _leaves(root):
        if isinstance(leaf, specs.Function) and _gives_several(before):
            former = new.get(id(before), before)
            change = _to_plain if source.spreads else _to_spreading
            new |= {
                id(old): replace(old, fn=fn)
                for old, fn in zip((before, leaf), change(former, leaf), strict=True)
                if isinstance(old, specs.Function)
            }
        before = leaf
    return _replaced(root, new, origins)


def _gives_several(spec: specs.Spec | None) -> bool:
    """Whether the output of a layer may be a tuple or a dict."""
    is_opaque = isinstance(spec, specs.Function | specs.Deferred)
    return is_opaque or getattr(spec, "return_carry", False)


def _function(spec: Any) -> Any:
    return getattr(spec, "fn", None)


def _to_plain(former: Any, leaf: specs.Function) -> tuple[Any, Any]:
    first, second = _function(former), leaf.fn
    if isinstance(second, formulas.Gathered):  # it came from such a framework
        return _unkept(first), second.fn
    return first, formulas.Spread(second)


def _unkept(first: Any) -> Any:
    if isinstance(first, formulas.Kept):
        return first.fn
    if isinstance(first, formulas.Gathered) and isinstance(first.fn, formulas.Kept):
        return formulas.Gathered(first.fn.fn)
    return first


def _to_spreading(former: Any, leaf: specs.Function) -> tuple[Any, Any]:
    first, second = _function(former), leaf.fn
    if isinstance(second, formulas.Spread):
        return first, second.fn
    if isinstance(first, formulas.Gathered):  # the outer one, by which it is known again
        return formulas.Gathered(formulas.Kept(first.fn)), formulas.Gathered(second)
    return first and formulas.Kept(first), formulas.Gathered(second)


def chained(
    layers: Iterable[specs.Spec], origins: dict[int, tuple[str, type]]
) -> list[specs.Spec]:
    """The layers of a chain, in whose code a tuple or a dict goes from call to call whole: one
    function for each run of them, in which it does.

    Args:
        layers: as they were read.
        origins: where each spec came from; the new ones are added.

    Raises:
        ValueError: what may give several goes on to a function of another stack.
    """
    found: list[specs.Spec] = []
    for layer in layers:
        before = found[-1] if found else None
        if isinstance(layer, specs.Function) and isinstance(before, specs.Function):
            steps = (*_steps(before.fn), *_steps(layer.fn))
            found[-1] = replace(before, fn=formulas.Composed(steps))
            origins[id(found[-1])] = origins[id(before)]
            continue
        *_, last = [None, *(_leaves(before) if before else ())]
        first = next(_leaves(layer))
        if isinstance(first, specs.Function) and _gives_several(last):
            raise ValueError
        found.append(layer)
    return found


def _steps(fn: Any) -> tuple[Any, ...]:
    return fn.steps if isinstance(fn, formulas.Composed) else (fn,)


def _leaves(spec: specs.Spec) -> Iterator[specs.Spec]:
    if isinstance(spec, specs.Sequential):
        for layer in spec.layers:
            yield from _leaves(layer)
    else:
        yield spec


def _replaced(
    spec: specs.Spec, new: Mapping[int, specs.Spec], origins: dict[int, tuple[str, type]]
) -> specs.Spec:
    made: dict[int, specs.Spec] = {}

    def visit(spec: specs.Spec) -> specs.Spec:
        if id(spec) not in made:
            made[id(spec)] = new.get(id(spec), spec)
            if isinstance(spec, specs.Sequential):
                layers = tuple(map(visit, spec.layers))
                if any(a is not b for a, b in zip(layers, spec.layers, strict=True)):
                    made[id(spec)] = replace(spec, layers=layers)
            if id(spec) in origins:
                origins.setdefault(id(made[id(spec)]), origins[id(spec)])
        return made[id(spec)]

    return visit(spec)
