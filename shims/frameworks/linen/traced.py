"""A traced module as a Linen module. This file, and what it imports, needs Flax alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from interop.errors import ArgumentError, ConversionError, MissingKeyError

from ...core import Kind, Path, at, nest
from ...program import Program

__all__ = ["COLLECTIONS", "Traced", "TracedCell", "place", "variables_of"]

COLLECTIONS = {
    Kind.PARAMETER: "params",
    Kind.STATISTIC: "batch_stats",
    Kind.HIDDEN: "carry",
    Kind.BUFFER: "buffers",
}


def place(kind: Kind, path: Path) -> tuple[str, ...]:
    """Where a value stands in the variables."""
    return (COLLECTIONS[kind], *map(str, path))


def variables_of(program: Program, values: Mapping[Path, Any]) -> dict[str, Any]:
    """The variables that hold ``values``."""
    return nest({place(v.kind, v.path): values[v.path] for v in program.values})


class Traced(nn.Module):
    """Traced forward logic of a module of any framework, as a ``flax.linen.Module``.

    It is what ``materialize(method="trace")`` and ``shims.load_traced`` return, with its
    variables, which have the paths and kinds of the wrapped module's arrays: ``params``,
    ``batch_stats``, ``carry`` and ``buffers``. It compiles, maps and differentiates twice in
    reverse mode. ``repr`` tells the shapes it takes, in which ``b`` is any batch size.

    Attributes:
        program: what it computes.
        deterministic: True for evaluation, False for training; here or in the call.

    Raises:
        ArgumentError: (``init``) its variables come with it; (``apply``) the arguments have
            other shapes or dtypes than it was traced for, or it was not traced in that mode.
        ConversionError: (``apply``) variables are missing.
        MissingKeyError: (``apply``) it draws random numbers, and ``rngs`` has no ``"dropout"``.
    """

    program: Program
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, *args: Any, deterministic: bool | None = None, **kwargs: Any) -> Any:
        if self.is_initializing():
            raise ArgumentError(
                f"the weights of {self.program.guest} came with it, and are not made anew",
                remedy="Call apply with the variables that came with the module",
            )
        deterministic = self.deterministic if deterministic is None else deterministic
        training = None if deterministic is None else not deterministic
        places = {v.path: place(v.kind, v.path) for v in self.program.values}
        values = self.values(self.variables)
        key = self._key(training)
        out, new = self.program.run(values, args, kwargs, training=training, key=key)
        after = nest({where: new.get(p, values[p]) for p, where in places.items()})
        for collection, name in sorted({places[path][:2] for path in new}):
            self.put_variable(collection, name, after[collection][name])
        return out

    @nn.nowrap
    def values(self, variables: Mapping[str, Any]) -> dict[Path, Any]:
        """The arrays by the wrapped module's paths.

        Raises:
            ConversionError: some are missing.
        """
        places = {v.path: place(v.kind, v.path) for v in self.program.values}
        held = dict(nn.unbox(variables))
        values = {path: at(held, where) for path, where in places.items()}
        if missing := ["/".join(places[path]) for path in values if values[path] is None]:
            raise ConversionError(
                "variables are missing",
                missing=missing,
                remedy="Pass all collections that came with the module",
            )
        return values

    @nn.nowrap
    def _key(self, training: bool | None) -> Callable[[], jax.Array]:
        if not self.has_rng("dropout"):
            return _no_key
        return lambda: self.make_rng("dropout")


class TracedCell(Traced, nn.RNNCellBase):
    """A traced recurrent cell, called ``cell(carry, x)``, which returns ``(carry, output)``."""

    @property
    def num_feature_axes(self) -> int:
        """Trailing axes of the input that are not batch axes."""
        return self.program.feature_axes

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> Any:
        """The carry that the cell starts from.

        Args:
            rng: a key, for cells that start at random.
            input_shape: the shape of one step's input, ``(batch, *features)``.

        Raises:
            ArgumentError: the cell was traced for other shapes.
        """
        return self.program.initial_carry(input_shape, lambda: rng)


def _no_key() -> jax.Array:
    raise MissingKeyError(
        "the traced module draws random numbers, and has no key for it",
        remedy='Pass rngs={"dropout": key} to apply, or deterministic=True',
    )
