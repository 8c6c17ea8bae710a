"""Flax Linen as a guest.

The values are the variables that were given with the module, by collection and path. A call
gets them, and every collection but ``params`` may change. ``train``, ``deterministic`` and
``use_running_average`` are passed where the guest's call takes them; without a mode of the
host, and with a guest that takes none of them, the fields of its layers decide.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from interop.errors import ArgumentError, MissingKeyError

from ...core import Call, Guest, Kind, Structure, leaves

_RESULTS = ("intermediates", "perturbations")
_KINDS = {"batch_stats": Kind.STATISTIC, "carry": Kind.HIDDEN, "cache": Kind.BUFFER}


def _kind(path: Any, leaf: Any) -> Kind:
    if path[0] == "params":
        trainable = jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        return Kind.PARAMETER if trainable else Kind.BUFFER
    return _KINDS.get(path[0], Kind.BUFFER)


class LinenGuest(Guest):
    """A Linen module and its variables, seen from a shim."""

    is_live = False

    def __init__(self, module: nn.Module, params: Any = None):
        if not isinstance(params, Mapping):
            raise ArgumentError(
                "Linen modules keep their weights outside, and none were given",
                remedy='Pass params=, what module.init(...) returned, {"params": ...}',
            )
        if (
            params
            and "params" not in params
            and not all(isinstance(tree, Mapping) for tree in params.values())
        ):
            raise ArgumentError(
                f"params must map collections to variables, got {sorted(params)}",
                remedy='Pass {"params": ...}',
            )
        self._variables = {
            str(name): tree for name, tree in params.items() if name not in _RESULTS
        }
        self.native = (module, self._variables)

    def structure(self):
        module, variables = self.native
        return LinenStructure(module, variables)

    def values(self):
        return dict(leaves((), self._variables))


class LinenStructure(Structure):
    """A module, and the tree of its variables."""

    def __init__(self, module: nn.Module, variables: Mapping[str, Any]):
        self.guest_type = type(module)
        self.forward = type(module).__call__
        self._module = module
        self._tree = jax.tree.structure(variables)
        flat = leaves((), variables)
        self._paths = [path for path, _ in flat]
        self.kinds = {path: _kind(path, leaf) for path, leaf in flat}
        parameters = inspect.signature(self.forward).parameters
        self._takes_train = "train" in parameters
        self._takes = [
            name for name in ("deterministic", "use_running_average") if name in parameters
        ]

    def __eq__(self, other):
        return type(other) is LinenStructure and (
            self is other or (self._module == other._module and self._tree == other._tree)
        )

    def __hash__(self):
        return hash((self.guest_type, self._tree))

    def build(self, values):
        return self._module, self._unflatten(values)

    def _unflatten(self, values):
        return jax.tree.unflatten(self._tree, [values[path] for path in self._paths])

    def run(self, values, call):
        variables = self._unflatten(values)
        kwargs = self._mode(call) | dict(call.kwargs)
        out, changed = self._module.apply(
            variables,
            *call.args,
            method=None if call.method == "__call__" else call.method,
            mutable=[name for name in variables if name != "params"],
            rngs=_rngs(call),
            **kwargs,
        )
        return out, dict(leaves((), {**variables, **changed})), self

    def _mode(self, call: Call) -> dict[str, bool]:
        if call.training is None or call.method != "__call__":
            return {}
        mode = {name: not call.training for name in self._takes}
        return mode | ({"train": call.training} if self._takes_train else {})

    def module(self, native):
        return native[0]

    def convert_arguments(self, native):
        return {"params": native[1]}


def _rngs(call: Call) -> dict[str, jax.Array]:
    """Keys for a training call; every stream that the guest names falls back to ``params``."""
    if call.training is False:
        return {}
    try:
        return {"params": call.key()}
    except MissingKeyError:  # most guests need none, and Linen says which stream is missing
        return {}
