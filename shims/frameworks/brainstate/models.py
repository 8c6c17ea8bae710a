"""BrainState models that hold shims, seen as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import brainstate
import jax.numpy as jnp

from ...core import Noted, Path, recording
from ...graph import Graph
from ...materialization import Whole, by_path
from ...program import Program
from .guest import forward_of
from .host import Wrapped, WrappedCell
from .traced import STATES, Traced, TracedCell

__all__ = ["Models"]


class Models(Whole):
    """BrainState models, for ``materialize``, ``save_traced`` and ``load_traced``."""

    module_type = Traced

    def make(self, program: Program, values: Mapping[Path, Any], **options: Any) -> Traced:
        made = TracedCell if program.is_cell else Traced
        return made(program, values)  # the mode is brainstate.environ's

    def parts(self, model: Any) -> tuple[Program, dict[Path, Any], bool]:
        states = model.traced_states()
        return model.program, {path: state.value for path, state in states.items()}, False

    def shims(self, model: Any) -> list[tuple[Path, Any]]:
        return _graph(model).shims

    def run(
        self, model: Any, companion: Any, inputs: tuple[Any, ...]
    ) -> dict[Path, list[Noted]]:
        copy = brainstate.graph.clone(model)
        with recording() as calls, brainstate.environ.context(fit=False):
            copy(*inputs)
        return by_path(calls, self.shims(copy))

    def call_of(self, shim: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if not isinstance(shim, WrappedCell):
            return inputs
        batch = jnp.shape(inputs[0])[: -(shim._shim_structure.feature_axes or 0) or None]
        return shim._shim_start(batch), *inputs

    def forward(self, module: Any) -> Callable[..., Any]:
        return forward_of(type(module))

    def replace(self, model: Any, companion: Any, remake: Callable[..., Any]) -> Any:
        for _, shim in self.shims(model):
            shim._shim_refresh()
        graph = _graph(brainstate.graph.clone(model))
        return graph.remade(
            lambda shim, **facts: shim._shim_remade(remake, **facts),
            lambda made: vars(made) if isinstance(made, Traced) else None,
        )


def _graph(model: Any) -> Graph:
    return Graph(
        model,
        is_module=lambda x: isinstance(x, brainstate.graph.Node),
        is_shim=lambda x: isinstance(x, Wrapped),
        is_container=lambda x: isinstance(x, brainstate.State),
        is_plain=lambda x: type(x) in STATES.values(),
    )
