"""Equinox models that hold shims, seen as a whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax

from interop.errors import ArgumentError
from interop.frameworks.equinox.adapter import is_index, takes_state

from ...core import Noted, Path, path_of, recording
from ...materialization import Whole, by_path
from ...program import Program
from .host import ToEquinox, _Link
from .traced import Traced, carry_first

__all__ = ["Models"]


class Models(Whole):
    """Equinox models, for ``materialize``, ``save_traced`` and ``load_traced``."""

    module_type = Traced
    companion: str | None = "state"

    def make(self, program: Program, values: Mapping[Path, Any], **options: Any) -> Traced:
        return Traced(program, values, **options)

    def close(self, made: Any) -> Any:
        return _with_state(made, None) if made.is_stateful() else made

    def parts(self, model: Any) -> tuple[Program, dict[Path, Any], bool]:
        module, state = model if isinstance(model, tuple) else (model, None)
        if module.is_stateful() and state is None:
            raise ArgumentError(
                f"the state of {module.program.guest} is missing",
                remedy="Pass (module, state)",
            )
        return module.program, module.values(state), not module.inference

    def shims(self, model: Any) -> list[tuple[Path, Any]]:
        flat, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_shim)
        return [(path_of(keys), leaf) for keys, leaf in flat if _is_shim(leaf)]

    def run(
        self, model: Any, companion: Any, inputs: tuple[Any, ...]
    ) -> dict[Path, list[Noted]]:
        module = jax.tree.map(_marked, eqx.nn.inference_mode(model), is_leaf=_is_shim)
        # A copy, because Equinox marks a state that a call has replaced as used up.
        state = jax.tree.map(lambda x: x, companion)
        given = {"state": state} if takes_state(module) else {}
        with recording() as calls:
            module(*inputs, **given)
        return by_path(
            calls,
            self.shims(module),
            lambda shim, called: shim._shim_link.mark is called._shim_link.mark,
        )

    def call_of(self, shim: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        given = carry_first(inputs)
        return given if shim._shim_structure.takes_carry(given) else inputs

    def replace(self, model: Any, companion: Any, remake: Callable[..., Any]) -> Any:
        if companion is None and not _is_shim(model):
            self._check_stateless(model)

        def new(keys: Any, leaf: Any) -> Any:
            if not _is_shim(leaf):
                return leaf
            state = companion if leaf.is_stateful() else None
            return leaf._shim_remade(remake, state, path=path_of(keys))

        made = jax.tree_util.tree_map_with_path(new, model, is_leaf=_is_shim)
        return made if companion is None else _with_state(made, companion)

    def _check_stateless(self, model):
        for path, shim in self.shims(model):
            if shim.is_stateful():
                raise ArgumentError(
                    f"the shim at {jax.tree_util.keystr(path)} has state, and it was not given",
                    remedy="Pass state=, what eqx.nn.make_with_state returned beside the model",
                )


def _is_shim(x: Any) -> bool:
    return isinstance(x, ToEquinox)


def _marked(leaf: Any) -> Any:
    """A shim that compiled functions do not know, and whose copies are told from others."""
    if not _is_shim(leaf):
        return leaf
    shim = copy.copy(leaf)
    object.__setattr__(shim, "_shim_link", _Link(leaf._shim_link.guest, object()))
    return shim


def _with_state(model: Any, state: eqx.nn.State | None) -> tuple[Any, eqx.nn.State]:
    """A model and its state: of its own indices as in ``state``, of new ones as they start."""

    def started(leaf: Any) -> Any:
        if not is_index(leaf):
            return leaf
        try:
            return eqx.nn.StateIndex(leaf.init if state is None else state.get(leaf))
        except KeyError:
            return eqx.nn.StateIndex(leaf.init)

    fresh = jax.tree.map(started, model, is_leaf=is_index)
    return eqx.nn.make_with_state(lambda: fresh)()
