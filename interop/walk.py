"""The recursion over a model: the path for errors, the memo for shared layers, the checks
that hold for every rule."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from . import formulas, specs
from .errors import MissingShapeError, UnsupportedLayerError, UnsupportedStructureError
from .registry import Adapter, BuildRule, ReadRule, Registry

__all__ = ["Building", "Reading"]


class Reading:
    """Turns one model into specs. Readers get it as ``ctx``.

    Attributes:
        path: where the layer being read is.
        paths: the path of each spec made, by its ``id``.
    """

    def __init__(self, adapter: Adapter, registry: Registry):
        self.adapter = adapter
        self.path = "model"
        self.paths: dict[int, str] = {}
        self._registry = registry
        self._specs: dict[Any, specs.Spec] = {}
        self._owners: dict[int, tuple[str, object]] = {}
        self._found: type = object

    def read(self, node: Any, path: str) -> specs.Spec:
        """The spec of ``node``: a module of the framework, or any other callable."""
        module = self.adapter.module(node)
        if not isinstance(module, self.adapter.module_type):
            return self._remember(self.read_callable(module, path), path)
        identity = self.adapter.identity(node)
        if identity is not None and identity in self._specs:
            return self._specs[identity]
        rule = self.adapter.reader(module, path)
        outer = self.path, self._found
        self.path, self._found = path, type(module)
        try:
            self._check_fixed(module, rule)
            self._check_owners(node, path)
            spec = self._remember(rule.read(node, self), path)
        finally:
            self.path, self._found = outer
        if identity is not None:
            self._specs[identity] = spec
        return spec

    def read_all(self, nodes: Any) -> tuple[specs.Spec, ...]:
        """The specs of a stack's layers, in order."""
        layers = tuple(self.read(node, f"{self.path}[{i}]") for i, node in enumerate(nodes))
        if not layers:
            raise UnsupportedStructureError(
                f"an empty {self._found.__qualname__} has nothing to convert", path=self.path
            )
        return layers

    def read_callable(self, fn: Any, path: str) -> specs.Spec:
        """The spec of a callable without weights: an activation if it is a known one.

        Raises:
            UnsupportedStructureError: ``fn`` is not callable, or holds a module.
        """
        per_example = self.adapter.per_example
        if isinstance(fn, formulas.Single if per_example else formulas.Batched):
            fn, per_example = fn.fn, not per_example
        for part in _captured(fn):
            if (framework := self._registry.framework_of(part)) is not None:
                raise UnsupportedStructureError(
                    f"{type(part).__qualname__} ({framework}) stands inside a "
                    f"{self.adapter.name} model; its weights would be lost",
                    path=path,
                    remedy="Convert it by itself first; a live shim has materialize()",
                )
        if not callable(fn):
            raise UnsupportedStructureError(
                f"{type(fn).__qualname__} is neither a module nor callable", path=path
            )
        return _activation(fn) or specs.Function(fn=fn, per_example=per_example)

    def refuse(self, option: str, value: Any, reason: str, remedy: str | None = None) -> NoReturn:
        """Refuse the layer being read because of one option.

        Raises:
            UnsupportedLayerError: always.
        """
        raise UnsupportedLayerError(
            self._found,
            f"{option}={_short(value)}: {reason}",
            path=self.path,
            option=option,
            value=value,
            remedy=remedy,
        )

    def _remember(self, spec: specs.Spec, path: str) -> specs.Spec:
        self.paths.setdefault(id(spec), path)
        return spec

    def _check_fixed(self, module: Any, rule: ReadRule) -> None:
        for option, wanted in rule.fixed.items():
            value = getattr(module, option, wanted)
            if value is not wanted and value != wanted:
                self.refuse(option, value, f"only {_short(wanted)} converts")

    def _check_owners(self, node: Any, path: str) -> None:
        for name, container in self.adapter.containers(node):
            here = f"{path}.{name}"
            there, _ = self._owners.setdefault(id(container), (here, container))
            if there != here:
                raise UnsupportedStructureError(
                    f"one array is shared by {there} and {here}, two different layers; the "
                    f"tie would be lost",
                    path=path,
                    remedy="Wrap the model live with shims.wrap, which keeps it",
                )


class Building:
    """Turns specs into native layers. Builders get it as ``ctx``.

    Attributes:
        options: what the caller passed for the target framework, by name.
        path: where the layer being built was in the source.
        shape: shape of one example at this layer's input, or None where it is not known.
    """

    def __init__(
        self,
        adapter: Adapter,
        paths: Mapping[int, str],
        shape: specs.Shape | None,
        options: Mapping[str, Any],
    ):
        self.adapter, self.options, self.shape = adapter, options, shape
        self.path = "model"
        self._paths = paths
        self._built: dict[int, Any] = {}
        self._spec: specs.Spec | None = None

    def build(self, spec: specs.Spec) -> Any:
        """The native layer for ``spec``; the same one again where ``spec`` is used twice."""
        shape_before = self.shape
        if id(spec) not in self._built:
            outer = self.path, self._spec
            self.path, self._spec = self._paths.get(id(spec), self.path), spec
            try:
                rule = self.adapter.builder(spec, self.path)
                self._check_options(spec, rule)
                self._built[id(spec)] = rule.build(spec, self)
            finally:
                self.path, self._spec = outer
        self.shape = spec.output_shape(shape_before)
        return self._built[id(spec)]

    def refuse(self, option: str, value: Any, reason: str, remedy: str | None = None) -> NoReturn:
        """Refuse the spec being built because of one of its options.

        Raises:
            UnsupportedLayerError: always.
        """
        raise UnsupportedLayerError(
            type(self._spec),
            f"{option}={_short(value)}: {reason}",
            path=self.path,
            target=self.adapter.name,
            option=option,
            value=value,
            remedy=remedy,
        )

    def require_shape(self) -> specs.Shape:
        """Shape of one example at this layer's input.

        Raises:
            MissingShapeError: it is not known.
        """
        if self.shape is None:
            raise MissingShapeError(
                type(self._spec).__qualname__, path=self.path, target=self.adapter.name
            )
        return self.shape

    def _check_options(self, spec: specs.Spec, rule: BuildRule) -> None:
        for field in dataclasses.fields(spec):
            if field.default is dataclasses.MISSING or field.name in rule.carries:
                continue
            value = getattr(spec, field.name)
            if value is not field.default and not _plain(value, field.default):
                self.refuse(
                    field.name,
                    value,
                    f"{self.adapter.name} has no counterpart",
                    "Leave the option at its default, or wrap the layer live with shims.wrap",
                )


def _plain(value: Any, default: Any) -> bool:
    return type(value) is type(default) and value == default


def _short(value: Any) -> str:
    text = f"{type(value).__name__}{value.shape}" if hasattr(value, "shape") else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _activation(fn: Callable[..., Any]) -> specs.Activation | specs.Flatten | None:
    """``fn`` as an activation or flatten, if that is all it is."""
    options: dict[str, Any] = {}
    if isinstance(fn, functools.partial) and not fn.args:
        fn, options = fn.func, dict(fn.keywords)
    if fn is formulas.flatten:
        plain = {"start_axis": 0, "end_axis": -1, "in_size": None}
        return specs.Flatten(**(plain | options))
    name = formulas.activation_name(fn)
    if name is None or not all(isinstance(v, int | float) for v in options.values()):
        return None
    defaults = formulas.activation_defaults(name)
    changed = {k: v for k, v in options.items() if k not in defaults or v != defaults[k]}
    return specs.Activation(name=name, options=changed)


def _captured(fn: Any) -> Iterator[Any]:
    """``fn`` and what it visibly holds: bound objects, partial arguments, closure cells."""
    yield fn
    if isinstance(fn, functools.partial):
        for part in (fn.func, *fn.args, *fn.keywords.values()):
            yield from _captured(part)
    if (bound := getattr(fn, "__self__", None)) is not None:
        yield bound
    for cell in getattr(fn, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # an empty cell
            continue
