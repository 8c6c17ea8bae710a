"""Users' own rules: pairs of callbacks, readers and builders, and how to take them back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar, cast

from . import specs
from .errors import ArgumentError, ConversionError, InteropError, UnmappedLayerError
from .parameters import leaves_by_name
from .registry import Adapter, BuildRule, ReadRule, registry
from .walk import Building, Reading

__all__ = [
    "LayerContext",
    "LayerMapping",
    "register_builder",
    "register_layer_mapping",
    "register_reader",
    "registered",
]

Function = TypeVar("Function", bound=Callable[..., Any])


class LayerContext:
    """What the callbacks of a :class:`LayerMapping` get beside the layer.

    Attributes:
        path: where the layer is, ``model[2]``.
        sample_input: shape of one example at the model's input, or None.
        rngs, key: what the caller passed by that name, or None.

    Example:
        >>> import brainstate, interop
        >>> from flax import nnx
        >>> class Noise(brainstate.nn.Module):
        ...     scale = 2.0
        >>> def to_foreign(layer, ctx):
        ...     print(ctx, ctx.cur_size)
        ...     ctx.refuse("scale", layer.scale, "only 1 converts")
        >>> mapping = interop.LayerMapping(
        ...     Noise, "nnx", nnx.Dropout, lambda layer, ctx: Noise(), to_foreign
        ... )
        >>> with interop.registered(mapping):
        ...     try:
        ...         interop.convert(Noise(), to="nnx", sample_input=(3,))
        ...     except interop.UnsupportedLayerError as error:
        ...         print(error.option)
        <LayerContext of model> (3,)
        scale
    """

    path: str
    sample_input: Any
    rngs: Any
    key: Any

    def __init__(self, building: Building):
        self._building = building
        self.path, self.sample_input = building.path, building.sample
        self.rngs, self.key = building.options.get("rngs"), building.options.get("key")

    def __repr__(self) -> str:
        return f"<LayerContext of {self.path}>"

    @property
    def cur_size(self) -> specs.Shape | None:
        """Shape of one example at this layer's input, or None where it is not known."""
        return self._building.shape

    def require_size(self, layer_name: str) -> specs.Shape:
        """Shape of one example at this layer's input.

        Args:
            layer_name: ignored: the error names the layer's class and path.

        Raises:
            MissingShapeError: it is not known.
        """
        return self._building.require_shape()

    def refuse(self, option: str, value: Any, reason: str) -> NoReturn:
        """Refuse the layer because of one of its options.

        Raises:
            UnsupportedLayerError: always.
        """
        self._building.refuse(option, value, reason)


@dataclass(frozen=True)
class LayerMapping:
    """A pair of callbacks that convert one class of layer to BrainState and back.

    Attributes:
        bst_type: the ``brainstate.nn.Module`` class.
        framework: the other framework: ``"nnx"``, ``"linen"`` or ``"equinox"``.
        foreign_type: its class of layer.
        to_bst: ``(foreign_layer, ctx) -> bst_layer``. A Linen layer comes as an object with
            the fields ``module`` and ``variables``.
        to_foreign: ``(bst_layer, ctx) -> foreign_layer``; for Linen ``(module, variables)``.

    ``ctx`` is a :class:`LayerContext`. The callbacks answer for exactness: nothing checks that
    the two layers compute the same, :func:`interop.compare` does.

    Raises:
        ArgumentError: (:func:`register_layer_mapping`) a field is of another kind.

    Example:
        >>> import brainstate, interop
        >>> from flax import nnx
        >>> class Shift(brainstate.nn.Module):
        ...     def update(self, x):
        ...         return x + 1
        >>> class NnxShift(nnx.Module):
        ...     def __call__(self, x):
        ...         return x + 1
        >>> mapping = interop.LayerMapping(
        ...     bst_type=Shift,
        ...     framework="nnx",
        ...     foreign_type=NnxShift,
        ...     to_bst=lambda layer, ctx: Shift(),
        ...     to_foreign=lambda layer, ctx: NnxShift(),
        ... )
        >>> with interop.registered(mapping):
        ...     type(interop.to_nnx(Shift())).__name__
        'NnxShift'
    """

    bst_type: type
    framework: str
    foreign_type: type
    to_bst: Callable[[Any, Any], Any]
    to_foreign: Callable[[Any, Any], Any]


def register_layer_mapping(mapping: LayerMapping) -> None:
    """Teach the converter one class of layer by a pair of callbacks.

    The pair replaces what was registered before for the same classes, also a built-in rule.
    Other frameworks are reached through BrainState, if it has a rule for what ``to_bst``
    returns. A subclass of either class needs a registration of its own, unless the class had
    a rule already. :func:`registered` takes a registration back.

    Args:
        mapping: both classes, the framework and both callbacks.

    Raises:
        ArgumentError: ``bst_type`` is no BrainState class, ``framework`` is unknown or is
            BrainState, ``foreign_type`` is none of its classes, or a callback is not callable.

    Example:
        >>> import brainstate, interop
        >>> from flax import nnx
        >>> class Scale(brainstate.nn.Module):
        ...     def __init__(self, factor):
        ...         super().__init__()
        ...         self.factor = factor
        ...     def update(self, x):
        ...         return self.factor * x
        >>> class NnxScale(nnx.Module):
        ...     def __init__(self, factor):
        ...         self.factor = factor
        ...     def __call__(self, x):
        ...         return self.factor * x
        >>> with interop.registered():
        ...     interop.register_layer_mapping(
        ...         interop.LayerMapping(
        ...             Scale, "nnx", NnxScale,
        ...             to_bst=lambda layer, ctx: Scale(layer.factor),
        ...             to_foreign=lambda layer, ctx: NnxScale(layer.factor),
        ...         )
        ...     )
        ...     interop.to_nnx(Scale(3.0))(2.0)
        6.0
    """
    if not isinstance(cast(Any, mapping), LayerMapping):
        raise ArgumentError(
            f"mapping must be a LayerMapping, got {_shown(mapping)}",
            remedy="Pass interop.LayerMapping(bst_type, framework, foreign_type, to_bst, "
            "to_foreign)",
        )
    hub = _adapter_of(mapping.bst_type, "bst_type")
    other = registry.adapter(mapping.framework)
    if not hub.is_hub or other.is_hub:
        wrong = f"bst_type is a {hub.name} class, framework is {other.name!r}"
        raise ArgumentError(
            f"a LayerMapping ties a class of the hub to another framework; {wrong}",
            remedy="Use register_reader and register_builder for any other pair",
        )
    if _adapter_of(mapping.foreign_type, "foreign_type") is not other:
        raise ArgumentError(
            f"foreign_type={mapping.foreign_type.__qualname__} is no {other.name} module class",
            remedy="Check framework= and foreign_type=",
        )
    for name in ("to_bst", "to_foreign"):
        if not callable(getattr(mapping, name)):
            raise ArgumentError(f"{name} must be callable, got {getattr(mapping, name)!r}")
    _register_foreign_reader(hub, other, mapping)
    _register_hub_reader(hub, mapping.bst_type)

    def build(layer: Any, ctx: Building) -> Any:
        return _call(mapping.to_foreign, "to_foreign", layer, ctx, other)

    registry.replace(other.from_hub, mapping.bst_type, build)


def register_reader(
    layer_type: type,
    spec_type: type[specs.Spec],
    *,
    state: Iterable[str] | None = None,
    fixed: Mapping[str, Any] | None = None,
) -> Callable[[Function], Function]:
    """Register the decorated ``(layer, ctx) -> spec`` as the reader of ``layer_type``.

    It replaces the reader that the class had, also a built-in one. With a reader and the
    builders of its spec, a layer converts to every framework that builds the spec.

    Args:
        layer_type: a framework's class of layer.
        spec_type: what the reader returns: a class of ``interop.specs``, or a frozen
            dataclass derived from ``interop.specs.Spec``.
        state: names of the attributes that hold arrays or submodules. With it the rule also
            applies to subclasses that change nothing and hold nothing more; without, to the
            exact class alone.
        fixed: options that the reader does not carry, with the only value that converts.

    Raises:
        ArgumentError: ``layer_type`` is no class of a framework, ``spec_type`` is no spec.

    Example:
        >>> import brainstate, interop
        >>> class Twice(brainstate.nn.Module):
        ...     def update(self, x):
        ...         return 2 * x
        >>> with interop.registered():
        ...     @interop.register_reader(Twice, interop.specs.Function)
        ...     def read_twice(layer, ctx):
        ...         return interop.specs.Function(fn=lambda x: 2 * x, per_example=False)
        ...     interop.to_nnx(Twice())(3.0)
        6.0
    """
    adapter = _adapter_of(layer_type, "layer_type")
    _check_spec(spec_type)
    names, is_exact = frozenset(state or ()), state is None

    def register(read: Function) -> Function:
        rule = ReadRule(layer_type, spec_type, read, names, dict(fixed or {}), is_exact)
        registry.replace(adapter.readers, layer_type, rule)
        return read

    return register


def register_builder(
    framework: str, spec_type: type[specs.Spec], *, carries: Iterable[str] = ()
) -> Callable[[Function], Function]:
    """Register the decorated ``(spec, ctx) -> layer`` as the builder of ``spec_type``.

    It replaces the builder that the framework had, also a built-in one; no composite is built
    where it refuses a layer.

    Args:
        framework: the framework of the layers that it returns.
        spec_type: the spec it takes.
        carries: names of the spec's fields with defaults that the builder expresses; a spec
            with another value than the default in any other is refused by the field's name.

    Raises:
        ArgumentError: there is no such framework, or ``spec_type`` is no spec.

    Example:
        >>> import brainstate, interop
        >>> with interop.registered():
        ...     @interop.register_builder("nnx", interop.specs.Dropout)
        ...     def build_dropout(spec, ctx):
        ...         ctx.refuse("rate", spec.rate, "this model is for inference")
        ...     try:
        ...         interop.to_nnx(brainstate.nn.Dropout(0.9))
        ...     except interop.UnsupportedLayerError as error:
        ...         print(error)
        model: cannot convert Dropout to nnx: rate=0.1: this model is for inference.
    """
    adapter = registry.adapter(framework)
    _check_spec(spec_type)

    def register(build: Function) -> Function:
        rule = BuildRule(spec_type, build, frozenset(carries))
        registry.replace(adapter.builders, spec_type, rule)
        registry.replace(adapter.composites, spec_type, None)
        return build

    return register


@contextlib.contextmanager
def registered(*mappings: LayerMapping) -> Generator[None]:
    """Take back on leaving every registration made inside, and the ``mappings`` given.

    Args:
        mappings: registered on entering, in order.

    Raises:
        ArgumentError: as :func:`register_layer_mapping`; then nothing stays registered.

    Example:
        >>> import brainstate, interop
        >>> from flax import nnx
        >>> mapping = interop.LayerMapping(
        ...     bst_type=brainstate.nn.RReLU,
        ...     framework="nnx",
        ...     foreign_type=nnx.PReLU,
        ...     to_bst=lambda layer, ctx: brainstate.nn.RReLU(),
        ...     to_foreign=lambda layer, ctx: nnx.PReLU(),
        ... )
        >>> with interop.registered(mapping):
        ...     type(interop.to_nnx(brainstate.nn.RReLU())).__name__
        'PReLU'
        >>> interop.explain(brainstate.nn.RReLU(), to="nnx").ok
        False
    """
    with registry.undoing():
        for mapping in mappings:
            register_layer_mapping(mapping)
        yield


def _adapter_of(cls: Any, name: str) -> Adapter:
    framework = registry.framework_of_class(cls) if isinstance(cls, type) else None
    if framework is None:
        raise ArgumentError(
            f"{name} must be a module class of {', '.join(registry.names())}, got "
            f"{_shown(cls)}",
            remedy="Pass the class itself",
        )
    return registry.adapter(framework)


def _shown(found: Any) -> str:
    """``found`` in a message: a class by its name, anything else by that of its class."""
    is_class = isinstance(found, type)
    return found.__qualname__ if is_class else f"a value of {type(found).__qualname__}"


def _check_spec(spec_type: Any) -> None:
    if not (isinstance(spec_type, type) and issubclass(spec_type, specs.Spec)):
        raise ArgumentError(
            f"spec_type must be a class derived from interop.specs.Spec, got "
            f"{_shown(spec_type)}",
            remedy="Pass one such as interop.specs.Linear",
        )


def _call(callback: Any, name: str, layer: Any, ctx: Building, adapter: Adapter) -> Any:
    """What a callback makes of a layer, as a node of ``adapter``.

    Raises:
        ConversionError: the callback fails, or returns no module of the framework.
    """
    try:
        node = adapter.from_callback(callback(layer, LayerContext(ctx)))
    except InteropError:
        raise
    except Exception as e:
        raise ConversionError(
            f"{name} of the LayerMapping for {ctx.found.__qualname__} failed "
            f"({type(e).__name__}: {e})",
            path=ctx.path,
            remedy="Mend the callback; the cause is chained to this error",
        ) from e
    made = adapter.module(node)
    if not isinstance(made, adapter.module_type):
        raise ConversionError(
            f"{name} of the LayerMapping for {ctx.found.__qualname__} returned "
            f"{type(made).__qualname__}, not a {adapter.name} module",
            path=ctx.path,
            remedy="Return the layer it builds",
        )
    return node


@dataclass(frozen=True, eq=False, kw_only=True)
class HubLayer(specs.Deferred):
    """A layer of the hub, of a class that users' pairs are registered for.

    ``plain`` is its spec by the rule that its class had before, or why there is none.
    """

    hub: Adapter
    layer: Any
    layer_type: type
    plain: specs.Spec | InteropError

    def output_shape(self, shape: specs.Shape | None) -> specs.Shape | None:
        size = getattr(self.layer, "out_size", None)
        if size is not None:
            return tuple(size)
        return self.plain.output_shape(shape) if isinstance(self.plain, specs.Spec) else None

    def build(self, ctx: Building) -> Any:
        if self.layer_type in ctx.adapter.from_hub:
            built = ctx.adapter.from_hub[self.layer_type](self.layer, ctx)
            ctx.passed(self)
            return built
        if isinstance(self.plain, InteropError):
            raise self.plain
        return ctx.build(self.plain)

    def parameters(self) -> Mapping[str, specs.Array]:
        return leaves_by_name(self.hub.parameters(self.layer))


@dataclass(frozen=True, eq=False, kw_only=True)
class ForeignLayer(specs.Deferred):
    """A layer of another framework that a user's ``to_bst`` turns into one of the hub."""

    hub: Adapter
    layer: Any
    to_hub: Callable[[Any, Any], Any]
    made: list[HubLayer] = field(default_factory=list[HubLayer])

    def output_shape(self, shape: specs.Shape | None) -> specs.Shape | None:
        return self.made[0].output_shape(shape) if self.made else None

    def build(self, ctx: Building) -> Any:
        layer = _call(self.to_hub, "to_bst", self.layer, ctx, self.hub)
        layer_type = cast(Any, type(layer))
        reading = Reading(self.hub, registry)
        spec: specs.Spec | InteropError
        try:
            spec = reading.read(layer, ctx.path)
        except InteropError as e:
            spec = e
        made = HubLayer(hub=self.hub, layer=layer, layer_type=layer_type, plain=spec)
        self.made[:] = [made]
        if ctx.adapter is self.hub:
            ctx.passed(self)
            return layer
        if isinstance(spec, InteropError):
            raise spec
        ctx.adopt(reading)
        return ctx.build(spec)

    def parameters(self) -> Mapping[str, specs.Array]:
        ctx = Building(self.hub, {}, None, {})
        made = _call(self.to_hub, "to_bst", self.layer, ctx, self.hub)
        return leaves_by_name(self.hub.parameters(made))


def _register_foreign_reader(hub: Adapter, other: Adapter, mapping: LayerMapping) -> None:
    old = other.readers.get(mapping.foreign_type)

    def read(node: Any, ctx: Reading) -> specs.Spec:
        return ForeignLayer(hub=hub, layer=other.for_callback(node), to_hub=mapping.to_bst)

    rule = _rule(mapping.foreign_type, ForeignLayer, read, old)
    registry.replace(other.readers, mapping.foreign_type, rule)


def _register_hub_reader(hub: Adapter, layer_type: type) -> None:
    old = hub.readers.get(layer_type)
    if old is not None and getattr(old.read, "is_for_pairs", False):
        return

    def read(node: Any, ctx: Reading) -> specs.Spec:
        plain = _plain(old, layer_type, node, ctx)
        return HubLayer(hub=hub, layer=node, layer_type=layer_type, plain=plain)

    read.is_for_pairs = True  # pyright: ignore[reportFunctionMemberAccess]
    spec_type = HubLayer if old is None else old.spec_type
    registry.replace(hub.readers, layer_type, _rule(layer_type, spec_type, read, old))


def _rule(
    layer_type: type, spec_type: type[specs.Spec], read: Any, old: ReadRule | None
) -> ReadRule:
    """A rule for the subclasses that the ``old`` one was for."""
    if old is None:
        return ReadRule(layer_type, spec_type, read, frozenset(), {}, exact=True)
    return ReadRule(layer_type, spec_type, read, old.state, {}, old.exact)


def _plain(
    old: ReadRule | None, layer_type: type, node: Any, ctx: Reading
) -> specs.Spec | InteropError:
    """What the rule says that a pair stands beside: needed where no pair is registered."""
    if old is None:
        return UnmappedLayerError(
            layer_type,
            ctx.adapter.name,
            path=ctx.path,
            verb="read",
            remedy="Its LayerMapping is for another framework: register one for this target",
        )
    try:
        return ctx.read_by(old, node)
    except InteropError as e:
        return e
