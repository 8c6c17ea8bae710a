"""Linen models that hold shims as fields, seen as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn

from interop.errors import ArgumentError
from interop.registry import registry
from interop.walk import captured

from ...core import Noted, Path, at, is_plain, path_text, recording
from ...materialization import Whole, by_path
from ...program import Program
from .guest import is_own
from .host import ToLinen
from .traced import Traced, TracedCell, variables_of

__all__ = ["Models"]


class Models(Whole):
    """Linen models, for ``materialize``, ``save_traced`` and ``load_traced``."""

    module_type = Traced
    companion: str | None = "variables"

    def make(
        self, program: Program, values: Mapping[Path, Any], *, training: bool = False
    ) -> tuple[Traced, dict[str, Any]]:
        made = TracedCell if program.is_cell else Traced
        return made(program, deterministic=not training), variables_of(program, values)

    def parts(self, model: Any) -> tuple[Program, dict[Path, Any], bool]:
        if not isinstance(model, tuple):
            raise ArgumentError(
                "a Linen module holds no weights", remedy="Pass (module, variables)"
            )
        module, variables = model
        return module.program, module.values(variables), module.deterministic is False

    def shims(self, model: Any) -> list[tuple[Path, Any]]:
        found: dict[int, tuple[Path, Any]] = {}
        for path, part in _fields(model, ()):
            if isinstance(part, ToLinen):
                found.setdefault(id(part), (path, part))
        return list(found.values())

    def run(
        self, model: Any, companion: Any, inputs: tuple[Any, ...]
    ) -> dict[Path, list[Noted]]:
        _check_given(companion)
        with recording() as calls:
            mutable = [name for name in companion if name != "params"]
            model.apply(companion, *inputs, mutable=mutable)
        return by_path(
            calls,
            self.shims(model),
            lambda shim, called: shim.module is called.module,
            lambda called: ".".join(("model", *called.scope.path)),
        )

    def check_held(self, model: Any) -> None:
        own = [
            getattr(part, "__name__", type(part).__qualname__)
            for _, part in _fields(model, ())
            if _may_make(part)
        ]
        if own:
            raise ArgumentError(
                f"{own[0]} may make shims in setup or compact methods, where they could not be "
                f"replaced, and only a call shows them",
                remedy="Pass sample_input=, an input as the model takes it",
            )

    def replace(self, model: Any, companion: Any, remake: Callable[..., Any]) -> Any:
        if isinstance(model, ToLinen):
            return model._shim_remade(remake, companion, path=())
        _check_given(companion)
        variables = {name: tree for name, tree in nn.unbox(companion).items()}
        made: dict[int, Any] = {}
        bound = model.bind(companion)
        for path, shim in self.shims(model):
            scope = _scope(bound, path)
            own = {name: at(_plain(tree), scope) for name, tree in variables.items()}
            given = {name: tree for name, tree in own.items() if tree is not None}
            made[id(shim)], new = shim._shim_remade(remake, given, path=path)
            for name in {*given, *new}:
                tree = _with(_plain(variables.get(name, {})), scope, new.get(name))
                variables[name] = tree
        return _swapped(model, made), {name: tree for name, tree in variables.items() if tree}


def _check_given(variables: Any) -> None:
    if variables is None:
        raise ArgumentError(
            "the variables of the model are missing",
            remedy="Pass (module, variables), or variables=",
        )


def _may_make(part: Any) -> bool:
    """Whether a module's code, or a function, may make shims when it is called."""
    if isinstance(part, nn.Module):
        return not isinstance(part, ToLinen) and not is_own(part)
    return (
        callable(part)
        and not is_plain(part, "flax")
        and any(registry.framework_of(held) is not None for held in captured(part))
    )


def _fields(part: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """What a module holds in its fields, with paths."""
    yield path, part
    for key, value in _held(part):
        yield from _fields(value, (*path, key))


def _held(part: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(part, ToLinen):
        return ()
    if isinstance(part, nn.Module):
        names = (field.name for field in dataclasses.fields(part))
        return [(n, getattr(part, n)) for n in names if n not in ("parent", "name")]
    if isinstance(part, Mapping):
        return part.items()
    return enumerate(part) if isinstance(part, list | tuple) else ()


def _scope(bound: nn.Module, path: Path) -> tuple[str, ...]:
    """Where the variables of the shim at ``path`` stand."""
    part: Any = bound
    for step in path:
        part = getattr(part, str(step)) if isinstance(part, nn.Module) else part[step]
    if part.scope is None:
        raise ArgumentError(
            f"the shim at {path_text(path)} is not a submodule of the model",
            remedy="Hold it as a field of the module that calls it",
        )
    return part.scope.path


def _plain(tree: Any) -> Any:
    """A tree of variables as dicts."""
    if not isinstance(tree, Mapping):
        return tree
    return {name: _plain(branch) for name, branch in tree.items()}


def _with(tree: dict[str, Any], path: tuple[str, ...], new: Any) -> dict[str, Any]:
    """``tree`` with ``new`` at ``path``; without that branch if it is None."""
    name, *rest = path
    branch = new if not rest else _with(tree.get(name, {}), tuple(rest), new)
    others = {key: value for key, value in tree.items() if key != name}
    return others if not branch and new is None else others | {name: branch}


def _swapped(part: Any, made: Mapping[int, Any]) -> Any:
    """A module with others in the place of its shims."""
    if id(part) in made:
        return made[id(part)]
    if isinstance(part, ToLinen) or not any(id(x) in made for _, x in _fields(part, ())):
        return part
    if isinstance(part, nn.Module):
        new = part.clone(**{name: _swapped(value, made) for name, value in _held(part)})
    elif isinstance(part, Mapping):
        new = {key: _swapped(value, made) for key, value in part.items()}
    else:
        new = tuple(_swapped(value, made) for value in part)
    made[id(part)] = new  # type: ignore[index]
    return new
