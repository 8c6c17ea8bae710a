"""Functions that mix the examples of a batch, where the target's modules see one example each.

:func:`mixing` applies the functions of a stack to a small random batch, and to its rows one by
one. What cannot be traced, as where it draws from a random state, is left alone: it fails under
``vmap`` anyway.
"""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from . import formulas, specs
from .errors import InteropError
from .layout import Flow, leaves_of

__all__ = ["Mixing", "is_local", "mixing"]

ROWS = 3
# Where nothing tells the shape of an example: sizes that most functions can divide.
_GUESSES = ((12,), (8, 12))


@dataclass(frozen=True)
class Mixing:
    """What is wrong with a function for batches.

    Attributes:
        shapes: of examples, or of parts of them, that it mixes.
        depends: whether it treats examples of other shapes one by one, and theirs is not known.
    """

    shapes: tuple[Any, ...]
    depends: bool


def mixing(
    root: specs.Spec, shape: specs.Shape | None, channels_first: bool
) -> dict[int, Mixing]:
    """Those functions of a stack that mix examples, by the ``id`` of their specs.

    Args:
        root: the model as the target takes it.
        shape: shape of one example there, or None.
        channels_first: whether the target has channels first.
    """
    found: dict[int, Mixing] = {}
    flow = Flow(shape, channels_first, {})
    batches: list[Any] | None = None  # what the function before gave, if there was one
    before: specs.Spec | None = None
    for leaf in leaves_of(root):
        if not isinstance(leaf, specs.Function):
            batches = None
        elif not leaf.per_example or batches is not None:
            batches = (
                list(_batches(flow, shape is not None, before)) if batches is None else batches
            )
            outcomes = [(batch, _outcome(leaf, batch)) for batch in batches]
            if problem := _problem(outcomes):
                found[id(leaf)] = problem
            batches = [out.batch for _, out in outcomes if out.is_independent]
        flow.passed(leaf)
        before = leaf
    return found


@dataclass(frozen=True)
class _Outcome:
    """Whether a function ran, whether each row is that of its example alone, and its output."""

    ran: bool
    is_independent: bool
    is_silent: bool
    batch: Any = None


def _shape(flow: Flow) -> specs.Shape | None:
    try:
        return flow.shape
    except InteropError:  # a function fails on it, as building the next layer will tell
        return None


def _batches(flow: Flow, is_given: bool, before: specs.Spec | None) -> Iterator[Any]:
    """Random batches for a function that comes after a layer."""
    shape = _shape(flow)
    shapes = [shape] if shape and (is_given or len(shape) > 1) else _guesses(shape, before)
    for i, example in enumerate(shapes):
        yield np.random.default_rng(i).standard_normal((ROWS, *example), np.float32)


def _guesses(shape: specs.Shape | None, before: specs.Spec | None) -> list[specs.Shape]:
    """Shapes that examples may have after a layer which tells their features at most."""
    if before is not None and before.space:
        return [(8,) * (before.space + 1)]
    last = (shape or (12,))[-1]
    return [(*guess[:-1], last) for guess in _GUESSES]


def _problem(outcomes: list[tuple[Any, _Outcome]]) -> Mixing | None:
    """What the outcomes for several batches say together."""
    mixed = [(batch, out) for batch, out in outcomes if out.ran and not out.is_independent]
    if any(out.is_independent for _, out in outcomes):
        mixed = [(batch, out) for batch, out in mixed if out.is_silent]
    if not mixed:
        return None
    shapes = tuple(jax.tree.map(_example_shape, batch) for batch, _ in mixed)
    return Mixing(shapes, depends=any(out.is_independent for _, out in outcomes))


def _example_shape(batch: np.ndarray[Any, Any]) -> specs.Shape:
    return batch.shape[1:]


def _outcome(leaf: specs.Function, batch: Any) -> _Outcome:
    """One function of one batch, at once and row by row."""
    fn = formulas.Batched(leaf.fn) if leaf.per_example else leaf.fn
    single = leaf.fn if leaf.per_example else formulas.Single(leaf.fn)

    def by_rows(batch: Any) -> Any:
        return [single(jax.tree.map(operator.itemgetter(i), batch)) for i in range(ROWS)]

    try:  # abstractly at first, which draws nothing from a random state, and is quick to fail
        jax.eval_shape(fn, batch)
    except Exception:
        return _Outcome(ran=False, is_independent=False, is_silent=False)
    try:
        jax.eval_shape(by_rows, batch)
        with jax.ensure_compile_time_eval():  # one by one: most are compiled for others too
            whole, rows = jax.tree.map(np.asarray, (fn(batch), by_rows(batch)))
    except Exception:
        return _Outcome(ran=True, is_independent=False, is_silent=False)
    same = all(_same(whole, i, row) for i, row in enumerate(rows))
    return _Outcome(ran=True, is_independent=same, is_silent=not same, batch=whole)


def is_local(fn: Any, number: int) -> bool:
    """Whether a function of so many arrays uses their last axis only, however many there are.

    One that cannot be traced counts as such.
    """
    arrays = [
        np.random.default_rng(i).standard_normal((3, 4, 12), np.float32) for i in range(number)
    ]
    try:  # abstractly at first, which draws nothing from a random state
        jax.eval_shape(fn, *arrays)
    except Exception:
        return True
    try:
        with jax.ensure_compile_time_eval():
            whole = np.asarray(fn(*arrays))
            parts = [(i, np.asarray(fn(*[array[i] for array in arrays]))) for i in (1, (2, 1))]
    except Exception:
        return False
    return all(
        whole[i].shape == part.shape and np.allclose(whole[i], part, 1e-3, 1e-4, equal_nan=True)
        for i, part in parts
    )


def _same(whole: Any, i: int, row: Any) -> bool:
    """Whether a row of a batch is that of the example by itself, to rounding."""
    leaves, single = jax.tree.leaves(whole), jax.tree.leaves(row)
    return len(leaves) == len(single) and all(
        a.shape == (ROWS, *b.shape) and np.allclose(a[i], b, 1e-3, 1e-4, equal_nan=True)
        for a, b in zip(leaves, single, strict=True)
    )
