"""Flax NNX as a guest.

A Variable holds a tree of arrays, each of which is a cell. The guest's own random streams are
buffers like any other: they are copied in and out, and so advance. ``nnx.Intermediate`` and
``nnx.Perturbation`` are results of a call and not state.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from interop.errors import ArgumentError

from ...core import Cell, Kind, LiveGuest, Path, Structure, leaves, path_text

_RESULTS = (nnx.Intermediate, nnx.Perturbation)


def _kind(variable: nnx.Variable, leaf: Any) -> Kind:
    if isinstance(variable, nnx.Param):
        trainable = jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        return Kind.PARAMETER if trainable else Kind.BUFFER
    return Kind.STATISTIC if isinstance(variable, nnx.BatchStat) else Kind.BUFFER


def _variables(module: nnx.Module) -> list[tuple[Path, nnx.Variable]]:
    flat: Any = nnx.to_flat_state(nnx.state(module))
    return [(path, v) for path, v in flat if not isinstance(v, _RESULTS)]


@dataclasses.dataclass(frozen=True, eq=False)
class _VariableCell(Cell):
    variable: nnx.Variable
    index: int

    @property
    def identity(self):
        return self.variable, self.index

    def get(self):
        value = self.variable.get_raw_value()
        return value if isinstance(value, jax.Array) else jax.tree.leaves(value)[self.index]

    def _put(self, value):
        flat, tree = jax.tree.flatten(self.variable.get_raw_value())
        flat[self.index] = value
        # The value is concrete, whatever trace is being built around the call.
        self.variable.set_raw_value(jax.tree.unflatten(tree, flat), _unsafe_bypass_check=True)


class NnxGuest(LiveGuest):
    """An NNX module, seen from a shim."""

    def __init__(self, module: nnx.Module):
        for path, variable in _variables(module):
            if variable.hijax or variable.ref:
                raise ArgumentError(
                    f"{path_text(path)} is a hijax or ref Variable, which cannot be shown live",
                    remedy="Build the module inside nnx.var_defaults(hijax=False, ref=False)",
                )
        self.native = module

    def structure(self):
        return NnxStructure(self.native)

    def cells(self):
        return [
            _VariableCell(leaf_path, _kind(variable, leaf), variable, index)
            for path, variable in _variables(self.native)
            for index, (leaf_path, leaf) in enumerate(leaves(path, variable.get_raw_value()))
        ]

    def call(self, call):
        values = self.values()
        out, new, _ = self.structure().run(values, call)
        for cell in self.cells():
            if cell.path in new and new[cell.path] is not values[cell.path]:
                cell.set(new[cell.path])
        return out


class NnxStructure(Structure):
    """The graph definition of a module, and the tree of each Variable's value."""

    def __init__(self, module: nnx.Module):
        self.guest_type = type(module)
        self.forward = type(module).__call__
        self._definition, state = nnx.split(module)
        every: Any = nnx.to_flat_state(state)
        flat = [(path, v) for path, v in every if not isinstance(v, _RESULTS)]
        self._makers = {
            path: (type(v), v.get_metadata(), jax.tree.structure(v.get_raw_value()))
            for path, v in flat
        }
        self._paths = {p: [q for q, _ in leaves(p, v.get_raw_value())] for p, v in flat}
        self.kinds = {
            leaf_path: _kind(variable, leaf)
            for path, variable in flat
            for leaf_path, leaf in leaves(path, variable.get_raw_value())
        }
        self.reduces_over_names = any(
            getattr(part, "axis_name", None) is not None for _, part in nnx.iter_modules(module)
        )
        trees = tuple((path, tree) for path, (_, _, tree) in self._makers.items())
        self._key = (self._definition, trees)

    def __eq__(self, other):
        return type(other) is NnxStructure and (self is other or self._key == other._key)

    def __hash__(self):
        return hash(self._key)

    def build(self, values):
        flat = {
            path: cls.from_metadata(
                jax.tree.unflatten(tree, [values[leaf] for leaf in self._paths[path]]), metadata
            )
            for path, (cls, metadata, tree) in self._makers.items()
        }
        return nnx.merge(self._definition, nnx.from_flat_state(flat))

    def run(self, values, call):
        module = self.build(values)
        if call.training is not None:
            (module.train if call.training else module.eval)()
        out = getattr(module, call.method)(*call.args, **call.kwargs)
        new = {
            leaf_path: leaf
            for path, variable in _variables(module)
            for leaf_path, leaf in leaves(path, variable.get_raw_value())
        }
        return out, new, self
