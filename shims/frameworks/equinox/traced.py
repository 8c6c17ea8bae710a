"""A traced module as an Equinox module. This file, and what it imports, needs Equinox alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax

from interop.errors import ArgumentError, MissingKeyError

from ...core import Kind, Path, at, nest
from ...program import Program

__all__ = ["Traced", "carry_first"]


class Traced(eqx.nn.StatefulLayer):
    """Traced forward logic of a module of any framework, as an ``eqx.Module``.

    It is what ``materialize(method="trace")`` and ``shims.load_traced`` return. The inexact
    leaves, in ``params`` under the wrapped module's paths, are its parameters; everything else
    stands in an ``eqx.nn.State``: ``out, state = module(x, state, key=key)``. It compiles, maps
    and differentiates twice in reverse mode. ``program`` tells the shapes that it takes, in
    which ``b`` is any batch size; a module that was traced on one example takes one example.

    Raises:
        ArgumentError: (calls) the arguments have other shapes or dtypes than it was traced
            for; it was not traced in that mode; ``state`` is missing or not wanted.
        MissingKeyError: (calls) it draws random numbers, and there is no ``key``.
    """

    params: dict[str, Any]
    buffers: eqx.nn.StateIndex[Any] | None
    inference: bool
    program: Program = eqx.field(static=True)

    def __init__(self, program: Program, values: Mapping[Path, Any], *, training: bool = False):
        self.params = nest({_place(p): values[p] for p in _paths(program, trainable=True)})
        others = tuple(values[path] for path in _paths(program, trainable=False))
        self.buffers = eqx.nn.StateIndex(others) if others else None
        self.inference = not training
        self.program = program

    def is_stateful(self) -> bool:
        """Whether calls take and return an ``eqx.nn.State``."""
        return self.buffers is not None

    def __call__(self, *args: Any, state: Any = None, key: Any = None, **kwargs: Any) -> Any:
        if state is None and args and isinstance(args[-1], eqx.nn.State):
            args, state = args[:-1], args[-1]
        if (state is None) != (self.buffers is None):
            raise ArgumentError(
                f"{self.program.guest} has {'no ' if state is not None else ''}state, and the "
                f"call has {'none' if state is None else 'one'}",
                remedy="is_stateful() tells; eqx.nn.make_with_state makes the state",
            )

        values = self.values(state)
        args = args if self.program.step is None else carry_first(args)
        out, new = self.program.run(
            values, args, kwargs, training=not self.inference, key=lambda: _given(key)
        )
        if self.buffers is None or state is None:
            return out
        if not new:
            return out, state
        others = _paths(self.program, trainable=False)
        return out, state.set(self.buffers, tuple(new.get(p, values[p]) for p in others))

    def initialize_carry(self, input_shape: tuple[int, ...], *, key: Any = None) -> Any:
        """The carry that a recurrent cell starts from: ``carry, out = cell(x, carry)``.

        Args:
            input_shape: the shape of one step's input.
            key: for cells that start at random.

        Raises:
            ArgumentError: it is no cell, or was traced for other shapes.
        """
        return self.program.initial_carry(input_shape, lambda: _given(key))

    def values(self, state: Any = None) -> dict[Path, Any]:
        """The arrays by the wrapped module's paths; those in ``state`` if it is given."""
        trainable = _paths(self.program, trainable=True)
        values = {path: at(self.params, _place(path)) for path in trainable}
        if self.buffers is not None and state is not None:
            others = _paths(self.program, trainable=False)
            values |= zip(others, state.get(self.buffers), strict=True)
        return values


def carry_first(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A cell's arguments, ``(x, carry, ...)``, as a step has them."""
    return (*args[1:2], *args[:1], *args[2:])


def _given(key: Any) -> jax.Array:
    if key is None:
        raise MissingKeyError(
            "the traced module draws random numbers, and the call has no key",
            remedy="Pass key=, or switch to eqx.nn.inference_mode",
        )
    return key


def _paths(program: Program, *, trainable: bool) -> list[Path]:
    return [v.path for v in program.values if (v.kind is Kind.PARAMETER) is trainable]


def _place(path: Path) -> tuple[str, ...]:
    return tuple(map(str, path))
