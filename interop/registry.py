"""Who reads and builds what: the frameworks, their rules, and how a rule is found."""

from __future__ import annotations

import abc
import contextlib
import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import jax

from . import frameworks as _framework_files
from .chains import SWITCHED, Chain
from .errors import (
    ArgumentError,
    BrokenDependencyError,
    MissingDependencyError,
    UnmappedLayerError,
    UnsupportedLayerError,
    UnsupportedStructureError,
)
from .partitioning import Partitioning
from .specs import Spec

if TYPE_CHECKING:
    from .walk import Building, Reading

__all__ = ["Adapter", "BuildRule", "ReadRule", "Registry", "registry", "remembered"]

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class ReadRule:
    """How one native layer class becomes a spec.

    Attributes:
        layer_type: the native class.
        spec_type: the spec that ``read`` returns.
        read: ``(layer, ctx) -> spec``.
        state: names of the attributes that hold the layer's arrays or submodules.
        fixed: options that must keep this value: ``read`` does not carry any other.
        exact: whether the rule is for no subclass, and knows all that an instance may hold.
        methods: the functions of the class and of each base by name, as they were when the rule
            was made.
    """

    layer_type: type
    spec_type: type[Spec]
    read: Callable[[Any, Reading], Spec]
    state: frozenset[str]
    fixed: Mapping[str, Any]
    exact: bool = False
    methods: Mapping[type, dict[str, object]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", _methods(self.layer_type))

    def replaced(self) -> list[str]:
        """The methods that have been replaced in their classes since."""
        return [
            name
            for cls, known in self.methods.items()
            if list(map(vars(cls).get, known)) != list(known.values())  # cheap: most are equal
            for name, function in known.items()
            if vars(cls).get(name) is not function
        ]


@dataclass(frozen=True)
class BuildRule:
    """How a spec becomes a native layer.

    Attributes:
        spec_type: the spec's class.
        build: ``(spec, ctx) -> layer``.
        carries: the spec's options that ``build`` can express; any other must be plain.
        apart: whether it takes arrays whose parts are kept apart, as such.
    """

    spec_type: type[Spec]
    build: Callable[[Any, Building], Any]
    carries: frozenset[str]
    apart: bool = False


class Adapter(abc.ABC):
    """What one framework can read and build. Each framework file defines one, ``adapter``.

    Subclasses answer the questions below about the framework's modules. A *node* is what the
    walk hands to a reader: the native module, or the module with what belongs to it where the
    framework keeps weights outside.
    """

    name: ClassVar[str]
    module_type: ClassVar[type]
    per_example: ClassVar[bool] = False
    """Whether modules see one example, and the caller maps over the batch."""
    channels_first: ClassVar[bool] = False
    """Whether spatial layers take their channels before the axes of space."""
    spreads: ClassVar[bool] = False
    """Whether its stacks call a layer with the parts of a tuple or dict that they pass on."""
    has_partitionings: ClassVar[bool] = False
    """Whether the framework notes beside arrays how to split them."""
    has_identity: ClassVar[bool] = True
    """Whether a module that stands at two places stays one module."""
    fixed: ClassVar[Mapping[str, Any]] = {}
    """Options that must keep this value in every layer that has them, as in a rule."""
    ties_stacks: ClassVar[bool] = False
    """Whether :meth:`tie` can make one layer of two where modules have no identity."""
    companion: ClassVar[str | None] = None
    """The argument of ``convert`` that is the second half of a native pair of values."""
    is_hub: ClassVar[bool] = False
    """Whether pairs of rules written for two frameworks go through this one."""

    def __init__(self) -> None:
        self.readers: dict[type, ReadRule] = {}
        self.builders: dict[type[Spec], BuildRule] = {}
        self.from_hub: dict[type, Callable[[Any, Building], Any]] = {}
        """Builders of users' pairs of rules, by the hub's class of layer."""
        self.refused: dict[type, str] = {}
        """Layers that cannot be converted exactly, and why."""
        self.composites: dict[type[Spec], type] = {}
        """The framework's modules that hold a spec and compute its formula."""

    # -- what a framework's file answers ------------------------------------------------

    def open(self, model: Any, params: Any, state: Any) -> Any:
        """The root node for a model given by a user; ``params`` and ``state`` as in convert."""
        for name, value in (("params", params), ("state", state)):
            if value is not None:
                raise ArgumentError(
                    f"{self.name} models take no {name}=", remedy=f"Leave {name}= out"
                )
        return model

    def check(self, root: Any) -> None:  # noqa: B027 - few frameworks have something to check
        """Compare the weights of a whole model with what it needs, before it is read.

        Raises:
            InteropError: they do not fit.
        """

    def close(self, built: Any, options: Mapping[str, Any]) -> Any:
        """What ``convert`` returns for a finished root."""
        return built

    def module(self, node: Any) -> Any:
        """The native module of a node."""
        return node

    def containers(self, node: Any) -> Iterable[tuple[str, object]]:
        """The mutable containers that the module itself holds its arrays in, by name."""
        return ()

    def read_function(self, fn: Any) -> Spec | None:
        """The spec of one of the framework's own functions, or None."""
        return None

    def edge(self, spec: Spec) -> str | None:
        """What its own layer for ``spec`` does where the formula has :attr:`Spec.edge`."""
        return spec.edge

    def for_callback(self, node: Any) -> Any:
        """What a user's ``to_bst`` callback gets for a node."""
        return self.module(node)

    def from_callback(self, built: Any) -> Any:
        """The node for what a user's ``to_foreign`` callback returned."""
        return built

    @abc.abstractmethod
    def added_state(self, module: Any, rule: ReadRule) -> set[str]:
        """Names of attributes that hold state, and that the rule does not know of."""

    @abc.abstractmethod
    def has_children(self, module: Any) -> bool:
        """Whether ``module`` holds other modules."""

    @abc.abstractmethod
    def arrays(self, node: Any) -> Iterable[Any]:
        """The arrays that a node holds, of whatever kind, as objects."""

    def partitionings(self, node: Any) -> Iterable[tuple[str, Any, Partitioning]]:
        """The path, the array and the note, of each array that is to be split."""
        return ()

    def partition(
        self, built: Any, partitionings: Mapping[int, Partitioning]
    ) -> tuple[Any, set[int]]:
        """Take the notes over, where the framework has a place for them.

        Args:
            built: what a builder returned; it may be changed.
            partitionings: by the ``id`` of the arrays that ``built`` may hold.

        Returns:
            The same with notes, and the ids of the arrays that were found in it.
        """
        return built, set()

    @abc.abstractmethod
    def parameters(self, node: Any) -> Any:
        """The trainable arrays, in the container that the framework's optimisers take."""

    @abc.abstractmethod
    def with_parameters(self, node: Any, parameters: Any) -> Any:
        """A copy of ``node`` that holds ``parameters``, such a container, instead."""

    def container(self, leaves: Mapping[tuple[Any, ...], Any]) -> Any:
        """A container of parameters from its leaves by path; None where that takes more."""
        return None

    @abc.abstractmethod
    def run(self, node: Any, inputs: tuple[Any, ...], train: bool) -> Any:
        """The output for a batch of inputs; ``node`` stays as it is."""

    def run_part(self, node: Any, x: Any, train: bool = False) -> Any:
        """The output for a batch of what a stack holds: a layer, or a plain function."""
        fn: Any = self.module(node)
        if isinstance(fn, self.module_type):
            return self.run(node, (x,), train)
        return (jax.vmap(fn) if self.per_example else fn)(x)

    def read_composite(self, node: Any, ctx: Reading) -> Spec:
        """The spec that one of :attr:`composites` holds."""
        return self.module(node).spec

    def build_composite(self, cls: type, spec: Spec, ctx: Building) -> Any:
        """One of :attr:`composites` that holds ``spec``."""
        return cls(spec)

    @abc.abstractmethod
    def held(self, node: Any) -> Mapping[tuple[Any, ...], Any]:
        """Every value that lasts, by path, each container once: parameters, statistics and
        other buffers; neither random keys nor what belongs to one run, as hidden states do.
        """

    @abc.abstractmethod
    def hold(self, node: Any, values: Mapping[tuple[Any, ...], Any]) -> Any:
        """``node`` with such values: the same object where it can change in place.

        Values that are not given stay.
        """

    def tie(self, built: Any, reused: set[int]) -> Any:
        """A model in which the layers with these ids are one, at all their places.

        Args:
            built: what a builder returned for the whole model.
            reused: the ids of the layers that it was given several times.

        Returns:
            None where one of them is not in a stack.
        """
        return None

    def native(self, node: Any) -> Any:
        """What a user holds: the module, or the module with what belongs to it."""
        return node

    def steps(self, node: Any) -> Chain | None:
        """The layers and functions that a user's own module applies one after the other.

        Returns:
            Their nodes, each with its path from the module's; None for a layer that has a
            rule, and for a module that does anything else.
        """
        bases = cast(Any, type(self.module(node))).__mro__
        is_known = any(base in self.readers for base in bases)
        chain = None if is_known else self.chain(node)
        return chain if chain and chain.steps else None

    def chain(self, node: Any) -> Chain | None:
        """:meth:`steps` of a module without a rule, or why there are none."""
        return None

    def mode(self, node: Any) -> str | None:
        """The mode that a layer is in by options of its own, where the call gives it none.

        Returns:
            As :func:`interop.chains.mode_of`; None too where it has none and cannot be called.
        """
        return SWITCHED

    # -- rules --------------------------------------------------------------------------

    def reads(
        self,
        layer_type: type,
        spec_type: type[Spec],
        *,
        state: Iterable[str] = (),
        fixed: Mapping[str, Any] | None = None,
    ) -> Callable[[Function], Function]:
        """Register the decorated ``(layer, ctx) -> spec`` as the reader of ``layer_type``.

        Raises:
            ValueError: the class has a reader already.
        """

        def register(read: Function) -> Function:
            if layer_type in self.readers:
                raise ValueError(f"{self.name} reads {layer_type.__qualname__} already")
            self.readers[layer_type] = ReadRule(
                layer_type, spec_type, read, frozenset(state), {**self.fixed, **(fixed or {})}
            )
            return read

        return register

    def builds(
        self, spec_type: type[Spec], *, carries: Iterable[str] = (), apart: bool = False
    ) -> Callable[[Function], Function]:
        """Register the decorated ``(spec, ctx) -> layer`` as the builder of ``spec_type``.

        Raises:
            ValueError: the spec has a builder already.
        """

        def register(build: Function) -> Function:
            if spec_type in self.builders:
                raise ValueError(f"{self.name} builds {spec_type.__qualname__} already")
            self.builders[spec_type] = BuildRule(spec_type, build, frozenset(carries), apart)
            return build

        return register

    def ships(self, composites: Iterable[Any]) -> None:
        """Register modules that hold a spec, each of its own ``spec_type``."""
        for cls in composites:
            self.composites[cls.spec_type] = cls
            self.readers[cls] = ReadRule(
                cls, cls.spec_type, self.read_composite, frozenset(), {}, exact=True
            )

    def reader(self, module: object, path: str) -> ReadRule:
        """The rule for ``module``: of its exact class, or of a base whose forward it keeps.

        Raises:
            UnmappedLayerError: a layer without a rule.
            UnsupportedStructureError: a module with forward logic of its own.
            UnsupportedLayerError: a subclass that overrides something of its base.
        """
        rule = self.rule(module, path)
        self.check_instance(module, rule, path)
        return rule

    def rule(self, module: object, path: str) -> ReadRule:
        """:meth:`reader`, as far as it is the same for all modules of that very class."""
        cls = type(module)
        base = next((c for c in cls.__mro__ if c in self.readers or c in self.refused), None)
        if base is None:
            raise self._no_reader(module, path)
        if base not in self.readers:
            raise UnsupportedLayerError(
                cls, self.refused[base], path=path, remedy=f"Wrap it live: {_live(path)}"
            )
        rule = self.readers[base]
        if changed := _overridden(cls, base) + rule.replaced():
            raise _overrides(cls, changed, rule, path)
        if rule.exact and cls is not base:
            reason = f"the rule of {base.__qualname__} is for that class alone"
            raise UnsupportedLayerError(cls, reason, path=path, remedy=_own_rule(cls, path))
        return rule

    def check_instance(self, module: object, rule: ReadRule, path: str) -> None:
        """What :meth:`reader` looks at in a single module.

        Raises:
            UnsupportedLayerError: it hides a method, or holds what its class does not have.
        """
        if hidden := _shadowed(module):
            raise _overrides(type(module), hidden, rule, path)
        if not rule.exact and (added := sorted(self.added_state(module, rule))):
            cls, base = type(module), rule.layer_type
            raise UnsupportedLayerError(
                cls,
                f"it holds {', '.join(added)}, which {base.__qualname__} does not have",
                path=path,
                option=added[0],
                remedy=_own_rule(cls, path),
            )

    def _no_reader(self, module: object, path: str) -> Exception:
        cls = type(module)
        if callable(getattr(cls, "materialize", None)):
            remedy = "Replace what is live by native layers first: shims.materialize(model)"
            return UnmappedLayerError(cls, self.name, path=path, verb="read", remedy=remedy)
        is_users = _package(cls) != _package(self.module_type)
        if is_users and self.has_children(module):
            chain = self.chain(module)
            other = f" ({chain.other})" if chain and chain.other else ""
            return UnsupportedStructureError(
                f"cannot convert {cls.__qualname__} ({self.name}): its forward logic is its "
                f"own{other}, and only stacks of known layers can be rebuilt",
                path=path,
                remedy=f"Wrap it live: {_live(path)}; or convert its parts one by one",
            )
        remedy = f"Register a reader for it, or wrap it live: {_live(path)}"
        return UnmappedLayerError(cls, self.name, path=path, verb="read", remedy=remedy)

    def builder(self, spec: Spec, found: type, path: str) -> BuildRule:
        """The rule for ``spec``, which came from a layer of class ``found``.

        Raises:
            UnmappedLayerError: this framework does not build that spec.
        """
        rule = self.builders.get(type(spec))
        if rule is None:
            raise UnmappedLayerError(
                found,
                self.name,
                path=path,
                verb="build",
                remedy=f"Register a builder for specs.{type(spec).__qualname__}, or wrap it "
                f"live: {_live(path)}",
            )
        return rule


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def remembered(make: Function) -> Function:
    """``make``, which keeps what it returns for equal arguments, if these have a hash."""
    kept = functools.lru_cache(1024, typed=True)(make)

    @functools.wraps(make)
    def known(*args: Any, **options: Any) -> Any:
        try:
            return kept(*args, **options)
        except TypeError:  # some option cannot be hashed, such as a mask
            return make(*args, **options)

    return cast(Function, known)


def _live(path: str) -> str:
    return f"shims.wrap({path}, into=...)"


def _own_rule(cls: type, path: str) -> str:
    return f"Register a reader for {cls.__qualname__}, or wrap it live: {_live(path)}"


def _overrides(cls: type, names: list[str], rule: ReadRule, path: str) -> Exception:
    return UnsupportedLayerError(
        cls,
        f"it overrides {', '.join(names)} of {rule.layer_type.__qualname__}, whose rule "
        f"therefore does not apply",
        path=path,
        option=names[0],
        remedy=_own_rule(cls, path),
    )


# Attributes that Python, dataclasses or a framework's metaclass set on every class.
_HARMLESS_DUNDERS = {"__call__", "__getattr__", "__getattribute__", "__setattr__"}


def _methods(cls: type) -> dict[type, dict[str, object]]:
    found: dict[type, dict[str, object]] = {
        base: {
            name: value
            for name, value in vars(base).items()
            if inspect.isfunction(value)
            and (not name.startswith("__") or name in _HARMLESS_DUNDERS)
        }
        for base in cls.__mro__
    }
    return {base: functions for base, functions in found.items() if functions}


@functools.lru_cache(1024)
def _overridden(cls: type, base: type) -> list[str]:
    """Methods and properties of ``base`` that ``cls`` replaces, by name."""
    fields = getattr(base, "__dataclass_fields__", ())  # their values are read, not their code
    names: list[str] = []
    for c in cls.__mro__[: cls.__mro__.index(base)]:
        for name, value in vars(c).items():
            dunder = name.startswith("__") and name not in _HARMLESS_DUNDERS
            is_code = callable(value) or hasattr(value, "__get__")
            if is_code and not dunder and hasattr(base, name) and name not in (*fields, *names):
                names.append(name)
    return names


def _shadowed(module: object) -> list[str]:
    """Methods of the class that an attribute of the instance hides."""
    routines = _routines(type(module))
    return [name for name in getattr(module, "__dict__", {}) if name in routines]


@functools.lru_cache(1024)
def _routines(cls: type) -> frozenset[str]:
    """The names of the methods; a declared attribute with a function as default is none."""
    fields = {name for base in cls.__mro__ for name in inspect.get_annotations(base)}
    names = set(dir(cls)) - fields
    return frozenset(name for name in names if inspect.isroutine(getattr(cls, name, None)))


class Registry:
    """The frameworks, one for each file in ``interop/frameworks``, imported on first use."""

    def __init__(self, package: ModuleType):
        self._package = package
        self._adapters: dict[str, Adapter] = {}
        self._replaced: list[tuple[dict[Any, Any], Any, Any]] = []
        self._names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))

    def names(self) -> list[str]:
        """The frameworks that have a file, whether or not they are installed."""
        return self._names

    def adapter(self, name: str) -> Adapter:
        """The adapter of a framework.

        Raises:
            ArgumentError: there is no such framework.
            MissingDependencyError: its package is not installed.
            BrokenDependencyError: its package is installed and cannot be imported.
        """
        if not isinstance(cast(Any, name), str):
            raise ArgumentError(
                f"a framework is told by its name, got {type(name).__qualname__}",
                remedy=f"Pass one of {', '.join(map(repr, self.names()))}",
            )
        if name not in self.names():
            close = difflib.get_close_matches(name.lower(), self.names(), 1, 0.45)
            meant = f"Did you mean {close[0]!r}? " if close else ""
            raise ArgumentError(
                f"unknown framework {name!r}",
                remedy=f"{meant}Known are: {', '.join(map(repr, self.names()))}",
            )
        if name not in self._adapters:
            self._adapters[name] = self._load(name)
        return self._adapters[name]

    def _load(self, name: str) -> Adapter:
        file = f"{self._package.__name__}.{name}"
        try:
            return importlib.import_module(file).adapter
        except ModuleNotFoundError as e:
            package = (e.name or "").partition(".")[0]
            if e.name != package or importlib.util.find_spec(package) is not None:
                raise BrokenDependencyError(name, e, _versions(e)) from e
            raise MissingDependencyError(name, package) from e
        except Exception as e:
            raise BrokenDependencyError(name, e, _versions(e)) from e

    def hub(self) -> tuple[Adapter, list[Adapter]]:
        """The hub, and the other frameworks that are installed.

        Raises:
            BrokenDependencyError: a package is installed and cannot be imported.
        """
        found: list[Adapter] = []
        for name in self.names():
            try:
                found.append(self.adapter(name))
            except MissingDependencyError:
                continue
        (hub,) = (a for a in found if a.is_hub)
        return hub, [a for a in found if a is not hub]

    def framework_of(self, obj: Any) -> str | None:
        """The framework that ``obj`` is a module of, or None.

        A framework's file is named after a component of the module path of its base class,
        so that nothing is imported to find it.
        """
        return self.framework_of_class(cast(Any, type(obj)))

    def framework_of_class(self, cls: type) -> str | None:
        """The framework that instances of ``cls`` are modules of, or None."""
        parts = {part for base in cls.__mro__ for part in base.__module__.split(".")}
        for name in self.names():
            if name in parts and issubclass(cls, self.adapter(name).module_type):
                return name
        return None

    def replace(self, rules: dict[Any, Any], key: Any, rule: Any) -> None:
        """Set ``rules[key]`` of an adapter in a way that :meth:`undoing` takes back."""
        self._replaced.append((rules, key, rules.get(key)))
        rules[key] = rule

    @contextlib.contextmanager
    def undoing(self) -> Generator[None]:
        """Take back what is replaced inside, latest first."""
        before = len(self._replaced)
        try:
            yield
        finally:
            while len(self._replaced) > before:
                rules, key, rule = self._replaced.pop()
                rules.pop(key)
                if rule is not None:
                    rules[key] = rule


def _versions(error: BaseException) -> dict[str, str]:
    """Versions of JAX and of the packages in whose code ``error`` was raised."""
    packages = {"jax"}
    trace = error.__traceback__
    while trace is not None:
        packages.add(trace.tb_frame.f_globals.get("__name__", "").partition(".")[0])
        trace = trace.tb_next
    found: dict[str, str] = {}
    for package in sorted(packages - set(sys.stdlib_module_names)):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


registry: Registry = Registry(_framework_files)
