"""The functions users call. They check arguments and call the rest."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any, cast

from . import specs
from .errors import ArgumentError, InteropError
from .layout import crossed
from .parameters import is_quantity
from .partitioning import carry
from .progress import expect, working
from .registry import Adapter, registry
from .walk import Building, Reading

__all__ = [
    "adapter_of",
    "convert_from",
    "convert_with",
    "keywords_of",
    "no_module",
    "open_model",
    "sample_shape",
    "sample_unit",
    "supported_layers",
    "unchecked",
]


def convert_from(source: str, model: Any, to: str, **keywords: Any) -> Any:
    """:func:`convert_with`, for a model that must be one of ``source``'s."""
    registry.adapter(source)  # says which package is missing or broken
    found = adapter_of(model).name
    if found != source:
        raise ArgumentError(
            f"expected a module of {source}, got one of {found}",
            path="model",
            remedy="interop.convert finds the source framework by itself",
        )
    return convert_with(model, to, **keywords)


def convert_with(
    model: Any,
    to: str,
    *,
    params: Any = None,
    state: Any = None,
    sample_input: Any = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """``interop.convert`` with options of the target, such as the streams for its dropout."""
    try:
        with working(f"converting to {to}"):
            return _convert(model, to, params, state, sample_input, options or {})
    except InteropError as e:
        e.reporter = functools.partial(
            _explain, model, to, params=params, state=state, sample_input=sample_input
        )
        raise


def _explain(*args: Any, **keywords: Any) -> Any:
    from .report import explain  # which imports this module

    return explain(*args, **keywords)


def _convert(
    model: Any, to: str, params: Any, state: Any, sample_input: Any, options: Mapping[str, Any]
) -> Any:
    adapter = adapter_of(model)
    target = registry.adapter(to)
    shape = sample_shape(sample_input)
    node = adapter.open(model, params, state)
    adapter.check(node)
    reading = Reading(adapter, registry)
    spec = reading.read(node, "model")
    expect(len(reading.origins))
    there = crossed(spec, reading.origins, shape, adapter, target)
    building = Building(target, reading.origins, there, options, sample_unit(sample_input))
    built = carry(adapter, node, target, building.build(there.spec))
    return target.close(built, options)


def adapter_of(model: Any) -> Adapter:
    """The adapter of the framework that ``model`` is a module of.

    Raises:
        ArgumentError: it is a class, or a module of none.
    """
    source = registry.framework_of(model)
    if source is None:
        raise no_module(model, path="model")
    return registry.adapter(source)


def no_module(found: Any, path: str | None = None) -> ArgumentError:
    """The error for what is no module of any framework; it tells what may have been meant."""
    cls = cast(Any, type(found))
    if isinstance(found, type) and registry.framework_of_class(found) is not None:
        return ArgumentError(
            f"{found.__qualname__} is a class, not an instance",
            path=path,
            remedy=f"Build it first: {found.__qualname__}(...)",
        )
    remedy = "Pass an instance of one of their modules"
    if isinstance(found, Mapping):
        remedy = "Weights alone do not tell how they are used: pass the module that has them"
    elif isinstance(found, list | tuple):
        remedy = _unpacked(cast("tuple[Any, ...]", found)) or remedy
    return ArgumentError(
        f"{cls.__module__}.{cls.__qualname__} is not a module of {', '.join(registry.names())}",
        path=path,
        remedy=remedy,
    )


def _unpacked(parts: tuple[Any, ...]) -> str | None:
    """What to do with modules in a list, or with one and what belongs to it."""
    sources = [source for part in parts if (source := registry.framework_of(part)) is not None]
    if not sources:
        return None
    companion = registry.adapter(sources[0]).companion
    if companion is not None and len(sources) == 1:
        return f"Pass the module by itself, and what belongs to it as {companion}="
    return "Put the layers into one Sequential"


def keywords_of(model: Any) -> tuple[Any, dict[str, Any]]:
    """A module, and what ``convert`` takes beside it; ``model`` may be a pair of both."""
    pair: Any = model
    if not (isinstance(model, tuple) and len(pair) == 2):
        return pair, {}
    module, companion = pair
    keyword = adapter_of(module).companion
    return module, {} if keyword is None else {keyword: companion}


def open_model(model: Any) -> tuple[Adapter, Any]:
    """The adapter and the root node of a model; of a pair where its framework has pairs.

    Raises:
        ArgumentError: it is no model of a known framework.
    """
    adapter, node = unchecked(model)
    adapter.check(node)
    return adapter, node


def unchecked(model: Any) -> tuple[Adapter, Any]:
    """:func:`open_model` for a model that may have forward logic of its own."""
    module, keywords = keywords_of(model)
    adapter = adapter_of(module)
    return adapter, adapter.open(module, keywords.get("params"), keywords.get("state"))


def sample_shape(sample_input: Any) -> specs.Shape | None:
    if sample_input is None:
        return None
    shape: Any = getattr(sample_input, "shape", sample_input)
    try:
        is_sequence = issubclass(type(shape), tuple | list)
        shape = tuple(map(operator.index, shape)) if is_sequence else (-1,)
    except TypeError:
        shape = (-1,)
    if min(shape, default=1) < 1:
        raise ArgumentError(
            f"sample_input must be one example or its shape, got {sample_input!r}",
            remedy="Leave the batch axis out, such as sample_input=(28, 28, 1)",
        )
    return shape


def sample_unit(sample_input: Any) -> Any:
    """The physical unit of an example; ``...`` where none is given."""
    return sample_input.unit if is_quantity(sample_input) else ...


def supported_layers(framework: str | None = None) -> dict[str, list[str]]:
    """The BrainState layers that convert to and from each of the other frameworks.

    Args:
        framework: only this one; by default all that are installed.

    Returns:
        For each framework the names of the ``brainstate.nn`` classes, sorted.

    Raises:
        ArgumentError: there is no such framework.
        MissingDependencyError, BrokenDependencyError: a framework cannot be imported.

    Example:
        >>> import interop
        >>> "Linear" in interop.supported_layers("nnx")["nnx"]
        True
    """
    hub, others = registry.hub()
    if framework is not None:
        others = [registry.adapter(framework)]
    shipped = set(hub.composites.values())
    rules = [rule for rule in hub.readers.values() if rule.layer_type not in shipped]
    return {
        other.name: sorted(
            rule.layer_type.__name__
            for rule in rules
            if rule.spec_type in other.builders.keys() | other.composites.keys()
            or rule.layer_type in other.from_hub
        )
        for other in others
    }
