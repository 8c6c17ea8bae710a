"""The recursion over a model: the path for errors, the memo for shared layers, the checks
that hold for every rule."""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, cast

import jax
import jax.numpy as jnp
import numpy as np

from . import formulas, specs
from .chains import SWITCHED, Chain, mode_of
from .errors import (
    ConversionError,
    InteropError,
    MissingShapeError,
    UnmappedLayerError,
    UnsupportedLayerError,
    UnsupportedStructureError,
)
from .independence import Mixing, is_local, mixing
from .layout import Crossed, Flow, leaves_of, several_axes
from .parameters import is_quantity, leaves_by_name
from .progress import advance
from .registry import Adapter, BuildRule, ReadRule, Registry
from .spreading import chained

__all__ = ["Building", "Reading"]

Origin = tuple[str, type]

# Most options are of such a class, which is quick to tell.
_NUMBERS = {type(None), bool, int, float, str, tuple}


class Reading:
    """Turns one model into specs. Readers get it as ``ctx``.

    Attributes:
        path: where the layer being read is.
        origins: for each spec made, by its ``id``: where it came from, and from what class.
        shared: the ids of modules that are one wherever they stand, also where modules have
            no identity.
        alive: what must live as long as such ids are in use.
    """

    path: str

    def __init__(self, adapter: Adapter, registry: Registry):
        self.adapter = adapter
        self.path = "model"
        self.origins: dict[int, Origin] = {}
        self.shared: set[int] = set()
        self._registry = registry
        self._specs: dict[int, specs.Spec] = {}
        self.alive: list[Any] = []
        self._owners: dict[int, tuple[str, object]] = {}
        self._found: type = object  # as long as nothing is being read
        self._mode: str | None = SWITCHED  # of the arguments of the chain that is being read
        self._given: dict[int, frozenset[str]] = {}
        self._rules: dict[type, ReadRule] = {}
        self._modes: dict[str, str] = {}

    def read(self, node: Any, path: str, given: frozenset[str] = frozenset()) -> specs.Spec:
        """The spec of ``node``: a module of the framework, or any other callable.

        ``given`` are the arguments of the mode that a chain's call passes on to it.
        """
        module: object = self.adapter.module(node)
        if not isinstance(module, self.adapter.module_type):
            return self._remember(self.read_callable(module, path), path, type(module))
        if id(module) in self._specs:
            spec = self._specs[id(module)]
            if self._given[id(module)] != given and any(s.has_modes for s in leaves_of(spec)):
                raise _one_switch(type(module), "is called with and without a mode", path)
            return spec
        chain, rule = self._how(node, module, path)
        outer = self.path, self._found, self._mode
        if chain and self._found is not object and not chain.modes.keys() <= given:
            self._mode = mode_of({n: v for n, v in chain.modes.items() if n not in given})
        self.path, self._found = path, type(module)
        try:
            self._check_owners(node, path)
            spec = self._read_chain(chain) if chain else self.read_by(cast(Any, rule), node)
        finally:
            self.path, self._found, self._mode = outer
        if not chain and spec.has_modes:
            mode = self._mode if given else None  # which may say None, for the layer's own
            self._check_mode(mode or self.adapter.mode(node), node, path)
        self._given[id(module)] = given
        if self.adapter.has_identity or id(module) in self.shared:
            self._specs[id(module)] = spec
        advance()
        return spec

    def _how(
        self, node: Any, module: object, path: str
    ) -> tuple[Chain | None, ReadRule | None]:
        """What a user's own module comes to, or the rule for a layer."""
        rule = self._rules.get(type(module))
        if rule is None:
            if chain := self.adapter.steps(node):
                return chain, None
            rule = self._rules[type(module)] = self.adapter.rule(module, path)
        self.adapter.check_instance(module, rule, path)
        return None, rule

    def _check_mode(self, mode: str | None, node: Any, path: str) -> None:
        """Refuse layers in more modes than one: the target has one switch for all."""
        if mode is None:  # the source cannot call it so
            return
        self._modes.setdefault(mode, path)
        if other := next((key for key in self._modes if key != mode), None):
            first = self._modes[other]
            found: object = self.adapter.module(node)
            raise _one_switch(
                type(found),
                f"is in {mode}, whereas {first} is in {other}",
                path,
            )

    def _read_chain(self, chain: Chain) -> specs.Spec:
        """The stack that a user's own module comes to."""
        nodes = [step.part for step in chain.steps]
        paths = [f"{self.path}{step.path}" for step in chain.steps]
        read = self.read_all(nodes, paths, [step.modes for step in chain.steps])
        self.alive += [chain, read]  # as they are known by their ids
        try:
            layers = chained(read, self.origins)
        except ValueError as e:
            raise UnsupportedStructureError(
                f"{self._found.__qualname__} gives the outputs of one stack to a function of "
                f"another, which may get several as one, or as several",
                path=self.path,
                remedy="Call both in one method, or wrap the model live with shims.wrap",
            ) from e
        return self._remember(specs.Sequential(layers=tuple(layers)), self.path, self._found)

    def read_by(self, rule: ReadRule, node: Any) -> specs.Spec:
        """The spec that ``rule`` makes of the layer being read."""
        self._check_fixed(self.adapter.module(node), rule)
        spec, mismatched = self._spec_by(rule, node)
        self._remember(spec, self.path, self._found)
        if self.adapter.per_example:
            _check_functions(spec, self)
        if mismatched:
            raise ConversionError(
                f"the arrays of {self._found.__qualname__} do not fit",
                path=self.path,
                mismatched=mismatched,
                remedy="Check what was assigned to it after it was built",
            )
        return spec

    def _spec_by(self, rule: ReadRule, node: Any) -> tuple[specs.Spec, list[str]]:
        """The spec, and a line for each of its arrays that does not fit."""
        try:
            spec = rule.read(node, self).canonical()
            self._check_numbers(spec)
            return spec, spec.mismatches() or _not_inexact(spec)
        except InteropError:
            raise
        except Exception as e:
            for name, array in leaves_by_name(self.adapter.held(node)).items():
                if is_quantity(array):
                    raise _unit_refused(self._found, name, array.unit, self.path) from e
            raise ConversionError(
                f"{self._found.__qualname__} cannot be read ({type(e).__name__}: {e})",
                path=self.path,
                remedy="Check what was assigned to it after it was built; if it works, wrap it "
                "live with shims.wrap",
            ) from e

    def _check_numbers(self, spec: specs.Spec) -> None:
        """Refuse an array for a number: optimisers of other frameworks may train it."""
        weights = (*spec.trained, *spec.buffers)
        for name in specs.fields(type(spec)):
            value = getattr(spec, name)
            if type(value) in _NUMBERS or name in weights:
                continue
            if isinstance(value, jax.Array | np.ndarray) and not value.ndim:
                remedy = f"Pass float({name})"
                self.refuse(name, value, "only a number converts, not an array", remedy)

    def read_all(
        self, nodes: Any, paths: Any = None, given: Any = None
    ) -> tuple[specs.Spec, ...]:
        """The specs of a stack's layers, in order; their paths are numbers if not given."""
        nodes = list(nodes)
        paths = paths or [f"{self.path}[{i}]" for i in range(len(nodes))]
        given = given or [frozenset[str]()] * len(nodes)
        layers = tuple(itertools.starmap(self.read, zip(nodes, paths, given, strict=True)))
        for path, layer in zip(paths, layers, strict=True):
            if isinstance(layer, specs.Cell):
                raise UnsupportedStructureError(
                    f"{self.origins[id(layer)][1].__qualname__} stands in a stack; other "
                    f"frameworks pass its state by hand, which a stack does not",
                    path=path,
                    remedy="Convert the cell by itself",
                )
        if not layers:
            raise UnsupportedStructureError(
                f"an empty {self._found.__qualname__} has nothing to convert",
                path=self.path,
                remedy="Leave it out",
            )
        return layers

    def read_callable(self, fn: Any, path: str) -> specs.Spec:
        """The spec of a callable without weights: an activation if it is a known one.

        Raises:
            UnsupportedStructureError: ``fn`` is not callable, or holds a module.
        """
        if (known := specs.known_function(fn) or self.adapter.read_function(fn)) is not None:
            return known
        per_example = self.adapter.per_example
        if isinstance(fn, formulas.Single if per_example else formulas.Batched):
            fn, per_example = fn.fn, not per_example
        for part in captured(fn):
            if (framework := self._registry.framework_of(part)) is not None:
                raise UnsupportedStructureError(
                    f"{type(part).__qualname__} ({framework}) stands inside a "
                    f"{self.adapter.name} model; its weights would be lost",
                    path=path,
                    remedy="Convert it by itself first; a live shim has materialize()",
                )
        if not callable(fn):
            raise UnsupportedStructureError(
                f"{type(fn).__qualname__} is neither a module nor callable",
                path=path,
                remedy="Put back what was filtered out" if fn is None else "Leave it out",
            )
        return specs.Function(fn=fn, per_example=per_example)

    def refuse(
        self, option: str, value: Any, reason: str, remedy: str | None = None
    ) -> NoReturn:
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

    def _remember(self, spec: specs.Spec, path: str, found: type) -> specs.Spec:
        self.origins.setdefault(id(spec), (path, found))
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
        sample: shape of one example at the model's input, or None.
        path: where the layer being built was in the source.
        found: its class there.
    """

    adapter: Adapter
    options: Mapping[str, Any]
    sample: specs.Shape | None
    path: str

    def __init__(
        self,
        adapter: Adapter,
        origins: Mapping[int, Origin],
        there: Crossed | None,
        options: Mapping[str, Any],
        unit: Any = ...,
    ):
        self.adapter, self.options, self._there = adapter, options, there
        self.sample = None if there is None else there.sample
        self.path = "model"
        self.found: type = object
        self._origins = dict(origins)
        self._flow = Flow(self.sample, adapter.channels_first, self._origins)
        self._built: dict[int, Any] = {}
        self._reused: dict[int, specs.Spec] = {}
        self._is_vague = there is not None and self.sample is None and several_axes(there.spec)
        self._levels = 0
        self._held: set[int] = set()
        self._mixing: dict[int, Mixing] | None = None  # until a function asks
        self._unit = unit  # of the data here; None where they have none, ... where unknown

    def build(self, spec: specs.Spec) -> Any:
        """The native layer for ``spec``; the same one again where ``spec`` is used twice.

        Raises:
            UnsupportedStructureError: the framework would make two layers of one.
        """
        if id(spec) in self._built and spec.holds_state and not self.adapter.has_identity:
            if not self.adapter.ties_stacks:
                raise self._second_use(spec)
            again = [leaf for leaf in leaves_of(spec) if leaf.holds_state]
            self._reused |= {id(self._built[id(leaf)]): leaf for leaf in again}
        if id(spec) in self._held:
            raise self._second_use(spec)
        if id(spec) not in self._built:
            outer = self.path, self.found
            self.path, self.found = self._origins.get(id(spec), (self.path, type(spec)))
            self._levels += 1
            try:
                self._built[id(spec)] = self._build_or_refuse(spec)
            finally:
                self.path, self.found = outer
                self._levels -= 1
            advance()
            if not self._levels and self._reused:
                self._built[id(spec)] = self._tied(self._built[id(spec)])
            if isinstance(spec, specs.Sequential | specs.Deferred):
                return self._built[id(spec)]  # it has told by itself what was passed
        self._try_unit(spec)
        self.passed(spec)
        return self._built[id(spec)]

    def _build(self, spec: specs.Spec) -> Any:
        if isinstance(spec, specs.Deferred):
            return spec.build(self)
        self._check_sample(spec)
        if self.adapter.per_example and self._there is not None:
            if isinstance(spec, specs.Function):
                self._check_independence(spec, self._there.spec)
            else:
                _check_functions(spec, self)
        try:
            rule = self.adapter.builder(spec, self.found, self.path)
            self._check_options(spec, rule)
            return rule.build(spec if rule.apart else spec.joined(), self)
        except (UnmappedLayerError, UnsupportedLayerError) as e:
            composite = self.adapter.composites.get(type(spec))
            if composite is not None and spec.is_composable:
                for part in spec.inner().values():
                    self._hold(part)
                return self.adapter.build_composite(composite, spec, self)
            if composite is None or isinstance(e, UnsupportedLayerError) or e.path != self.path:
                raise
            raise UnsupportedLayerError(
                self.found,
                "one of its parts, or of its options, has no single formula",
                path=self.path,
                target=self.adapter.name,
                remedy="Convert its parts one by one, or wrap it live with shims.wrap",
            ) from e

    def build_part(self, spec: specs.Spec, kinds: tuple[type, ...]) -> Any:
        """The native layer for ``spec``, of which the layer being built takes the arrays.

        Raises:
            UnsupportedLayerError: it is none of ``kinds``, but a composite or a stack.
        """
        rule = self.adapter.builder(spec, self.found, self.path)
        self._check_options(spec, rule)
        built = rule.build(spec, self)
        if not isinstance(module := self.adapter.module(built), kinds):
            name = type(module).__qualname__
            self.refuse("layer", name, f"{self.adapter.name} needs a native layer here")
        self._hold(spec)
        return built

    def _build_or_refuse(self, spec: specs.Spec) -> Any:
        """:meth:`_build`; a layer that fails in the target's own code is refused."""
        try:
            return self._build(spec)
        except InteropError:
            raise
        except Exception as e:
            for option, unit in spec.units().items():
                goal = self.adapter.name
                raise _unit_refused(self.found, option, unit, self.path, goal) from e
            raise ConversionError(
                f"{self.found.__qualname__} cannot be built in {self.adapter.name} "
                f"({type(e).__name__}: {e})",
                path=self.path,
                remedy="Check that it works as it is, on an example like sample_input; if it "
                "does, wrap it live with shims.wrap",
            ) from e

    def _try_unit(self, spec: specs.Spec) -> None:
        """Let a layer whose weights, or whose input, have a physical unit compute with it.

        Raises:
            UnsupportedLayerError: it fails, or would in training.
            MissingShapeError: it cannot be tried.
        """
        self._unit = spec.input_unit if self._unit is ... else self._unit
        units, unit = spec.units(), self._unit
        if not units and unit is None:
            return
        path, found = self._origins.get(id(spec), (self.path, type(spec)))

        def call(x: Any) -> None:
            y = self.adapter.run_part(self._built[id(spec)], x if unit is None else x * unit)
            self._unit = y.unit if is_quantity(y) else None

        shape = spec.example_shape if self.shape is None else self.shape
        if shape is None:
            reason = f"{found.__qualname__} is tried with units on an example"
            raise MissingShapeError(
                found.__qualname__, path=path, target=self.adapter.name, reason=reason
            )
        x = jax.ShapeDtypeStruct((1, *shape), "int32" if spec.takes_integers else "float32")
        try:
            if spec.random:
                raise NotImplementedError("masks are drawn for arrays without a unit")
            jax.eval_shape(call, x)  # pyright: ignore[reportUnknownMemberType]
        except Exception as e:
            option, value = next(iter(units.items()), ("its input", unit))
            raise _unit_refused(found, option, value, path, self.adapter.name) from e

    def _hold(self, spec: specs.Spec) -> None:
        """Take it that a composite holds the arrays of ``spec``, and shares them with none."""
        if spec.holds_state and (id(spec) in self._held or id(spec) in self._built):
            raise self._second_use(spec)
        self._held.add(id(spec))
        for part in spec.inner().values():
            self._hold(part)

    def _tied(self, built: Any) -> Any:
        tied = self.adapter.tie(built, set(self._reused))
        if tied is None:
            raise self._second_use(next(iter(self._reused.values())))
        return tied

    def _second_use(self, spec: specs.Spec) -> UnsupportedStructureError:
        first, found = self._origins.get(id(spec), (self.path, type(spec)))
        return UnsupportedStructureError(
            f"{found.__qualname__} at {first} is used a second time; {self.adapter.name} would "
            f"hold two copies, which training pulls apart",
            path=self.path,
            remedy="Give each place its own layer, or wrap the model live with shims.wrap",
        )

    def adopt(self, reading: Reading) -> None:
        """Take over where the specs of a further ``reading`` came from."""
        self._origins |= reading.origins

    def passed(self, spec: specs.Spec) -> None:
        """Take it that ``spec`` was applied: ``shape`` is that of its output from now on."""
        self._flow.passed(spec)

    @property
    def stands_alone(self) -> bool:
        """Whether the layer being built is the whole model, and no part of a stack."""
        return self._levels == 1

    @property
    def shape(self) -> specs.Shape | None:
        """Shape of one example at this layer's input, or None where it is not known.

        Raises:
            ConversionError: a function before this layer fails on its input's shape.
        """
        return None if self._is_vague else self._flow.shape

    def fits(self, axes: int) -> bool:
        """Whether examples have so many axes here, as far as anything tells."""
        if self.shape is None:
            return self.sample is None and not self._is_vague
        return len(self.shape) == axes

    def refuse(
        self, option: str, value: Any, reason: str, remedy: str | None = None
    ) -> NoReturn:
        """Refuse the layer being built because of one of its options.

        Raises:
            UnsupportedLayerError: always.
        """
        raise UnsupportedLayerError(
            self.found,
            f"{option}={_short(value)}: {reason}",
            path=self.path,
            target=self.adapter.name,
            option=option,
            value=value,
            remedy=remedy,
        )

    def require_shape(self, axes: int = 0) -> specs.Shape:
        """Shape of one example at this layer's input, which the layer takes ``axes`` axes of.

        Raises:
            MissingShapeError: it is not known.
        """
        if self.shape is not None and len(self.shape) >= axes:
            return self.shape
        raise MissingShapeError(
            self.found.__qualname__,
            path=self.path,
            target=self.adapter.name,
            reason=f"{self.found.__qualname__} needs the last {axes} axes of an example, "
            f"of which {self.shape} is known"
            if self.shape
            else None,
        )

    def _check_sample(self, spec: specs.Spec) -> None:
        there = self._there
        if there is None or spec.in_features is None or not (self.sample and self.shape):
            return
        moves = spec.space or (spec.has_channels and len(self.shape) > 1)
        axis = 0 if self.adapter.channels_first and moves else -1
        space = f"{spec.space} axes of space and " if spec.space else ""
        misfits = spec.space and len(self.shape) != spec.space + 1
        if misfits or self.shape[axis] != spec.in_features:
            first, shape = there.channels_first, self.shape
            if moves and first != self.adapter.channels_first:
                shape = specs.move_channels(shape, to_first=first)
            order = f"its channels {'first' if first else 'last'}, " if moves else ""
            self.refuse(
                "sample_input",
                there.given,
                f"an example has shape {shape} here, and this layer takes "
                f"{space}{spec.in_features} features",
                f"Pass one example as the model takes it, {order}without its batch axis",
            )

    def _check_independence(self, spec: specs.Function, root: specs.Spec) -> None:
        """Refuse a function in a stack that mixes the examples of a batch."""
        if spec.per_example:
            return
        if self._mixing is None:
            self._mixing = mixing(root, self.sample, self.adapter.channels_first)
        if (found := self._mixing.get(id(spec))) is None:
            return
        fn: Any = spec.fn
        while isinstance(fn, formulas.Moved | formulas.Spread):  # as the source has it
            fn = fn.fn
        name = getattr(fn, "__qualname__", None) or repr(fn)
        shapes = " or ".join(map(str, found.shapes))
        if found.depends:
            raise MissingShapeError(
                name,
                path=self.path,
                target=self.adapter.name,
                reason=f"{self.adapter.name} sees one example, and {name} would mix those of a "
                f"batch if they had shape {shapes}",
            )
        raise UnsupportedLayerError(
            self.found,
            f"{name} mixes the examples of a batch (tried with shape {shapes}), and "
            f"{self.adapter.name} sees one at a time",
            path=self.path,
            target=self.adapter.name,
            option="fn",
            value=spec.fn,
            remedy="Apply it outside of the model, or wrap the model live with shims.wrap",
        )

    def _check_options(self, spec: specs.Spec, rule: BuildRule) -> None:
        for name, default in specs.options(type(spec)).items():
            value = getattr(spec, name)
            if value is default or name in rule.carries:
                continue
            if not _plain(value, default):
                self.refuse(
                    name,
                    value,
                    f"{self.adapter.name} has no counterpart",
                    "Leave the option at its default, or wrap the layer live with shims.wrap",
                )


def _check_functions(spec: specs.Spec, ctx: Reading | Building) -> None:
    """Refuse a layer that holds a function which does not treat each example by itself.

    With a batch it would compute something else than with the examples of it.
    """
    for name, number in spec.functions.items():
        fn: Any = getattr(spec, name, None)
        if fn is None or formulas.activation_name(fn) is not None or is_local(fn, number):
            continue
        ctx.refuse(
            name,
            fn,
            f"it mixes the examples of a batch, or counts axes from the first, and "
            f"{ctx.adapter.name} sees one example",
            "Count axes from the last, of which it may use that one",
        )
    for part in spec.inner().values():
        _check_functions(part, ctx)


def _one_switch(found: type, problem: str, path: str) -> UnsupportedStructureError:
    return UnsupportedStructureError(
        f"{found.__qualname__} {problem}; what it is converted to has one switch for all",
        path=path,
        remedy="Pass the mode of the call on to both, or wrap the model live with shims.wrap",
    )


def _not_inexact(spec: specs.Spec) -> list[str]:
    """A line for each weight of integers: frameworks promote them in ways of their own."""
    if spec.takes_integers:  # its weights are looked up, not computed with
        return []
    found = {name: getattr(spec, name) for name in spec.trained}
    return [
        f"{name} has dtype {array.dtype.name}, wanted floating-point or complex numbers"
        for name, array in found.items()
        if array is not None and not _is_inexact(array.dtype)
    ]


@functools.cache
def _is_inexact(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, np.inexact)


def _unit_refused(
    found: type, option: str, unit: Any, path: str, target: str | None = None
) -> UnsupportedLayerError:
    where = f" in {target}" if target else ""
    return UnsupportedLayerError(
        found,
        f"{option}={unit}: this layer does not compute with units{where}",
        path=path,
        target=target,
        option=option,
        value=unit,
        remedy="Take the unit away first, or wrap the layer live with shims.wrap. An input "
        "with a unit is told by sample_input=",
    )


def _plain(value: Any, default: Any) -> bool:
    return type(value) is type(default) and value == default


def _short(value: Any) -> str:
    if isinstance(value, np.dtype):
        return value.name
    text = f"{type(value).__name__}{value.shape}" if hasattr(value, "shape") else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def captured(fn: Any) -> Iterator[Any]:
    """``fn`` and what it visibly holds, and what that holds; global names one level deep."""
    pending, seen = [fn], set[int]()
    while pending:
        part = pending.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        pending += _held(part)
        if inspect.isfunction(part):
            names = {i.argval for i in dis.get_instructions(part) if i.opname == "LOAD_GLOBAL"}
            yield from (part.__globals__[name] for name in names & part.__globals__.keys())


def _held(part: Any) -> list[Any]:
    """What a callable or a container holds: elements, attributes, defaults, closure cells."""
    if isinstance(part, dict):
        return list(cast("dict[Any, Any]", part).values())
    if isinstance(part, list | tuple):
        return list(cast("list[Any]", part))
    if isinstance(part, type) or not callable(part):
        return []
    names = ("__self__", "__wrapped__", "__defaults__", "func", "args", "keywords")
    held = [getattr(part, name, None) for name in names]
    held += getattr(part, "__dict__", {}).values()
    for cell in getattr(part, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty cell
            held.append(cell.cell_contents)
    return held
