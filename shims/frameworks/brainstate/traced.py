"""A traced module as a BrainState module. This file, and what it imports, needs BrainState
alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import brainstate

from interop.errors import ArgumentError

from ...core import Kind, Path, at, attribute_path, nest
from ...program import Program
from .cells import CarryCell

__all__ = ["STATES", "Traced", "TracedCell"]

STATES: dict[Kind, type[brainstate.State[Any]]] = {
    Kind.PARAMETER: brainstate.ParamState,
    Kind.STATISTIC: brainstate.BatchState,
    Kind.HIDDEN: brainstate.HiddenState,
    Kind.BUFFER: brainstate.LongTermState,
}


class Traced(brainstate.nn.Module):
    """Traced forward logic of a module of any framework, as a ``brainstate.nn.Module``.

    It is what ``materialize(method="trace")`` and ``shims.load_traced`` return. Its States
    have the paths and kinds of the wrapped module's arrays. It compiles, maps and
    differentiates twice in reverse mode. ``repr`` tells the shapes it takes, in which ``b`` is
    any batch size. ``brainstate.environ``'s ``fit`` chooses the mode; keys are drawn from
    ``brainstate.random``.

    Raises:
        ArgumentError: (calls) the arguments have other shapes or dtypes than it was traced
            for; ``fit`` asks for a mode that it was not traced in, or is not set for a module
            with both.
    """

    def __init__(self, program: Program, values: Mapping[Path, Any], *, training: bool = False):
        super().__init__()
        program.check_names(("program", "traced_states"), type(self))
        self.program = program
        states = {
            attribute_path(v.path): values[v.path]
            if isinstance(values[v.path], brainstate.State)
            else STATES[v.kind](values[v.path])
            for v in program.values
        }
        vars(self).update(nest(states))

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """The output; States that the call changes are written."""
        states = self.traced_states()
        out, new = self.program.run(
            {path: state.value for path, state in states.items()},
            args,
            kwargs,
            training=brainstate.environ.get("fit", None),
            key=brainstate.random.split_key,
        )
        for path, value in new.items():
            states[path].value = value
        return out

    def __repr__(self) -> str:
        return f"Traced({self.program!r})"

    def traced_states(self) -> dict[Path, brainstate.State[Any]]:
        """The States by the wrapped module's paths."""
        return {v.path: self._state(v.path) for v in self.program.values}

    def _state(self, path: Path) -> brainstate.State:
        found = at(vars(self), attribute_path(path))
        if not isinstance(found, brainstate.State):
            raise ArgumentError(
                "a State of a traced module was deleted or replaced by something else",
                remedy="Write its value instead: state.value = ...",
            )
        return found


class TracedCell(CarryCell, Traced):
    """A traced recurrent cell: ``init_state(batch_size)`` makes its hidden states."""

    @property
    def _shim_name(self) -> str:
        return self.program.guest

    def _shim_step(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        return Traced.update(self, *args, **kwargs)

    def _shim_start(self, batch: tuple[int, ...]) -> Any:
        features = self.program.feature_shape
        return self.program.initial_carry((*batch, *features), brainstate.random.split_key)
