"""An exported function as an operation of JAX: it compiles, maps over axes, and differentiates
in reverse mode as often as derivatives of it were exported along."""

# jax declares some of its types only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.export import Exported

from interop.errors import UnsupportedStructureError

__all__ = ["Level", "Operation", "cotangents", "derivative", "is_inexact"]

Function = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class Level:
    """A function of arrays, exported three times.

    Attributes:
        plain: the function.
        every: the function mapped over a leading axis of every input.
        shared: mapped over a leading axis of all but the weights, the first inputs; None for
            a derivative, whose results for each example differ with respect to them.
    """

    plain: Exported
    every: Exported
    shared: Exported | None = None


def is_inexact(x: Any) -> bool:
    """Whether an array, or what describes one, has derivatives."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def cotangents(arrays: Sequence[Any]) -> list[Any]:
    """Those of ``arrays`` that have derivatives."""
    return [x for x in arrays if is_inexact(x)]


def derivative(function: Function, size: int) -> Function:
    """The function of ``size`` inputs of ``function``, and cotangents of its outputs that have
    derivatives, that gives the cotangents of its inputs that have them."""

    def pull(*given: Any) -> tuple[Any, ...]:
        inputs, seeds = given[:size], given[size:]

        def inexact(*moving: Any) -> list[Any]:
            left = iter(moving)
            return cotangents(function(*(next(left) if is_inexact(x) else x for x in inputs)))

        _, back = jax.vjp(inexact, *cotangents(inputs))
        return back(list(seeds))

    return pull


class Operation:
    """A function, exported with its derivatives, as an operation on flat arrays.

    Args:
        levels: the function, its derivative, the derivative of that, …
        weights: how many of its first inputs are weights, which ``jax.vmap`` seldom maps.
    """

    def __init__(self, levels: Sequence[Level], weights: int):
        self._level, self._next = levels[0], levels[1:]
        self._weights = weights

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        return self._function(*inputs)

    @functools.cached_property
    def _function(self) -> Function:
        function: Any = jax.custom_vjp(self._mapped)

        def forward(*inputs: Any) -> tuple[Any, Any]:
            # The differentiable function again, so that this derivative has one too.
            return function(*inputs), inputs

        def backward(inputs: Any, seeds: Any) -> tuple[Any, ...]:
            if self._derivative is None:
                raise UnsupportedStructureError(
                    "a traced module differentiates twice, and this is a further derivative",
                    remedy="Differentiate the original module",
                )
            outs = zip(seeds, self._level.plain.out_avals, strict=True)
            found = iter(self._derivative(*inputs, *(s for s, out in outs if is_inexact(out))))
            return tuple(
                next(found) if is_inexact(x) else np.zeros(x.shape, jax.dtypes.float0)
                for x in inputs
            )

        function.defvjp(forward, backward)
        return jax.jit(function)

    @functools.cached_property
    def _derivative(self) -> Operation | None:
        return Operation(self._next, self._weights) if self._next else None

    @functools.cached_property
    def _mapped(self) -> Function:
        """The function with its rule for ``jax.vmap``."""
        level = self._level
        plain: Any = custom_vmap(_flat(level.plain))
        every: Any = custom_vmap(_flat(level.every))
        shared: Any = None if level.shared is None else custom_vmap(_flat(level.shared))
        keeps = self._weights

        @plain.def_vmap
        def _map(size: int, mapped: Sequence[bool], *inputs: Any) -> Any:
            if shared is not None and not any(mapped[:keeps]):
                rest = _spread(size, mapped[keeps:], inputs[keeps:])
                return _all_mapped(shared(*inputs[:keeps], *rest))
            return _all_mapped(every(*_spread(size, mapped, inputs)))

        @every.def_vmap
        def _map_every(size: int, mapped: Sequence[bool], *inputs: Any) -> Any:
            return _unmerged(size, every, _spread(size, mapped, inputs))

        if shared is not None:

            @shared.def_vmap
            def _map_shared(size: int, mapped: Sequence[bool], *inputs: Any) -> Any:
                rest = _spread(size, mapped[keeps:], inputs[keeps:])
                if not any(mapped[:keeps]):
                    return _unmerged(size, functools.partial(shared, *inputs[:keeps]), rest)
                inner = rest[0].shape[1]  # the key at least is mapped already
                weights = [
                    jnp.broadcast_to(w[:, None], (size, inner, *w.shape[1:]))
                    if is_mapped
                    else jnp.broadcast_to(w, (size, inner, *w.shape))
                    for w, is_mapped in zip(inputs[:keeps], mapped[:keeps], strict=True)
                ]
                return _unmerged(size, every, [*weights, *rest])

        return plain


def _flat(exported: Exported) -> Function:
    def call(*inputs: Any) -> tuple[Any, ...]:
        args, kwargs = jax.tree.unflatten(exported.in_tree, inputs)
        return tuple(jax.tree.leaves(exported.call(*args, **kwargs)))

    return call


def _spread(size: int, mapped: Sequence[bool], inputs: Sequence[Any]) -> list[Any]:
    """``inputs`` with a leading axis each."""
    return [
        x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
        for x, is_mapped in zip(inputs, mapped, strict=True)
    ]


def _all_mapped(outs: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[bool, ...]]:
    return outs, (True,) * len(outs)


def _unmerged(size: int, function: Function, inputs: Sequence[Any]) -> Any:
    """Map over two leading axes as over one."""
    inner = inputs[0].shape[1]
    outs = function(*(x.reshape(size * inner, *x.shape[2:]) for x in inputs))
    return _all_mapped(tuple(y.reshape(size, inner, *y.shape[1:]) for y in outs))
