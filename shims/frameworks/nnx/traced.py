"""A traced module as an NNX module. This file, and what it imports, needs Flax alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from interop.errors import ArgumentError

from ...core import Kind, Path, at, attribute_path, nest
from ...program import Program
from .modes import viewed
from .streams import drawing, first_carry, stream_of
from .views import Buffer, HiddenState

__all__ = ["TYPES", "Traced", "TracedCell"]

TYPES: dict[Kind, type[nnx.Variable[Any]]] = {
    Kind.PARAMETER: nnx.Param,
    Kind.STATISTIC: nnx.BatchStat,
    Kind.HIDDEN: HiddenState,
    Kind.BUFFER: Buffer,
}


class Traced(nnx.Module):
    """Traced forward logic of a module of any framework, as an ``nnx.Module``.

    It is what ``materialize(method="trace")`` and ``shims.load_traced`` return. Its Variables
    have the paths and kinds of the wrapped module's arrays. It compiles, maps (``nnx.vmap``,
    ``jax.vmap``) and differentiates twice in reverse mode; ``jax.hessian`` is forward over
    reverse, so write ``jax.jacrev(jax.jacrev(...))``. ``repr`` tells the shapes it takes, in
    which ``b`` is any batch size.

    Raises:
        ArgumentError: (calls) the arguments have other shapes or dtypes than it was traced
            for, or it is in training mode and was traced for evaluation.
        MissingKeyError: (calls) it draws random numbers, and there is no ``rngs``.
    """

    def __init__(
        self,
        program: Program,
        values: Mapping[Path, Any],
        *,
        training: bool = False,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ):
        program.check_names(("program", "deterministic", "rngs", "values"), type(self))
        self.program = program
        self.deterministic: bool = not training
        self.rngs: Any = nnx.data(None if rngs is None else stream_of(rngs).fork())
        variables = {
            attribute_path(v.path): values[v.path]
            if isinstance(values[v.path], nnx.Variable)
            else TYPES[v.kind](values[v.path])
            for v in program.values
        }
        for name, tree in nest(variables).items():
            setattr(self, name, nnx.data(tree))

    def __call__(
        self, *args: Any, rngs: Any = None, deterministic: bool | None = None, **kwargs: Any
    ) -> Any:
        training = not (self.deterministic if deterministic is None else deterministic)
        with drawing(self.rngs if rngs is None else rngs, training=training) as (key, _):
            out, new = self.program.run(self.values(), args, kwargs, training=training, key=key)
        for path, value in new.items():
            self._variable(path).set_value(value)
        return out

    def set_view(
        self, deterministic: bool | None = None, use_running_average: bool | None = None
    ) -> None:
        """Set the mode, for ``nnx.view``: True for evaluation, False for training.

        Raises:
            ArgumentError: the two differ, and the module keeps running statistics.
        """
        kinds = {value.kind for value in self.program.values}
        self.deterministic = viewed(
            self.deterministic, deterministic, use_running_average, kinds
        )

    def values(self) -> dict[Path, Any]:
        """The arrays by the wrapped module's paths."""
        return {v.path: self._variable(v.path).get_value() for v in self.program.values}

    def _variable(self, path: Path) -> nnx.Variable:
        found = at(vars(self), attribute_path(path))
        if not isinstance(found, nnx.Variable):
            raise ArgumentError(
                "a Variable of a traced module was deleted or replaced by something else",
                remedy="Write its value instead: variable.set_value(...)",
            )
        return found


class TracedCell(Traced, nnx.RNNCellBase):
    """A traced recurrent cell, called ``cell(carry, x)``, which returns ``(carry, output)``."""

    @property
    def num_feature_axes(self) -> int:
        """Trailing axes of the input that are not batch axes."""
        return self.program.feature_axes

    def initialize_carry(
        self,
        input_shape: tuple[int, ...],
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        carry_init: Callable[..., jax.Array] | None = None,
    ) -> Any:
        """The carry that the cell starts from.

        Args:
            input_shape: the shape of one step's input, ``(batch, *features)``.
            rngs: for cells that start at random.
            carry_init: an initializer for each array of the carry, in place of the cell's.

        Raises:
            ArgumentError: the cell was traced for other shapes.
            MissingKeyError: a key is needed, and there is no ``rngs``.
        """
        return first_carry(
            lambda draw: self.program.initial_carry(input_shape, draw), rngs, carry_init
        )
