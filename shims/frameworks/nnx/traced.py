"""A traced module as an NNX module. This file, and what it imports, needs Flax alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx

from interop.errors import ArgumentError

from ...core import Kind, Path, at, attribute_path, nest
from ...program import Program
from .streams import key_source, stream_of
from .views import Buffer, HiddenState

__all__ = ["TYPES", "Traced"]

TYPES = {
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
        program.check_names(("program", "deterministic", "rngs", "values"), nnx.Module)
        self.program = program
        self.deterministic = not training
        self.rngs = nnx.data(None if rngs is None else stream_of(rngs).fork())
        variables = {
            attribute_path(v.path): values[v.path]
            if isinstance(values[v.path], nnx.Variable)
            else TYPES[v.kind](values[v.path])
            for v in program.values
        }
        for name, tree in nest(variables).items():
            setattr(self, name, nnx.data(tree))

    def __call__(self, *args: Any, rngs: Any = None, deterministic: bool | None = None) -> Any:
        training = not (self.deterministic if deterministic is None else deterministic)
        out, new = self.program.run(
            self.values(),
            args,
            training=training,
            key=key_source(rngs if rngs is not None else self.rngs, training=training),
        )
        for path, value in new.items():
            self._variable(path).set_value(value)
        return out

    def set_view(self, deterministic: bool | None = None) -> None:
        """Set the mode, for ``nnx.view``: True for evaluation, False for training."""
        if deterministic is not None:
            self.deterministic = deterministic

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
