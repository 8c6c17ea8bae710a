"""NNX models that hold shims, seen as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from ...core import Noted, Path, recording
from ...graph import Graph
from ...materialization import Whole, by_path
from ...program import Program
from .host import ToNNX
from .traced import TYPES, Traced, TracedCell

__all__ = ["Models"]


class Models(Whole):
    """NNX models, for ``materialize``, ``save_traced`` and ``load_traced``."""

    module_type = Traced

    def make(self, program: Program, values: Mapping[Path, Any], **options: Any) -> Traced:
        return (TracedCell if program.is_cell else Traced)(program, values, **options)

    def parts(self, model: Any) -> tuple[Program, dict[Path, Any], bool]:
        return model.program, model.values(), not model.deterministic

    def shims(self, model: Any) -> list[tuple[Path, Any]]:
        return _graph(model).shims

    def run(
        self, model: Any, companion: Any, inputs: tuple[Any, ...]
    ) -> dict[Path, list[Noted]]:
        copy = nnx.clone(model)
        copy.eval()
        shims = self.shims(copy)
        for _, shim in shims:
            # Transformations call copies, and a compiled function that knows the model none.
            shim._shim_mark = object()
        with recording() as calls:
            copy(*inputs)
        return by_path(calls, shims, lambda shim, called: _mark(called) is shim._shim_mark)

    def replace(self, model: Any, companion: Any, remake: Callable[..., Any]) -> Any:
        for _, shim in self.shims(model):
            shim.refresh()
        graph = _graph(nnx.clone(model))
        return graph.remade(
            lambda shim, **facts: shim._shim_remade(remake, **facts),
            lambda made: vars(made) if isinstance(made, Traced) else None,
        )


def _mark(shim: Any) -> Any:
    return vars(shim).get("_shim_mark")


def _graph(model: Any) -> Graph:
    return Graph(
        model,
        is_module=lambda x: isinstance(x, nnx.Pytree),
        is_shim=lambda x: isinstance(x, ToNNX),
        is_container=lambda x: isinstance(x, nnx.Variable),
        is_plain=lambda x: type(x) in TYPES.values(),
    )
