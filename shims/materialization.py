"""Leave the shim behind: a model with its shims replaced by native modules."""

# jax declares some of its types only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import functools
import inspect
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from interop.api import unchecked
from interop.comparison import compare
from interop.correspondence import WeightMapping, mapping, rebuilt, stand_ins
from interop.errors import (
    ArgumentError,
    ConversionError,
    InteropError,
    UnsupportedStructureError,
)
from interop.registry import registry

from .core import (
    Noted,
    Path,
    Structure,
    check_alive,
    described,
    materialize_structure,
    path_text,
    side_of,
)
from .program import Program
from .tracing import trace

__all__ = ["Remake", "Replacement", "Whole", "by_path", "materialize"]

METHODS = ("structural", "trace", "auto")


@dataclass(frozen=True)
class Replacement:
    """What became of one shim.

    Attributes:
        path: where it stood, such as ``model.core``.
        guest: the class that it wrapped.
        method: ``"structural"`` or ``"trace"``.
        reason: why it was traced, for ``method="auto"``; else None.
        fixed_by: why a traced module takes the sample's batch size alone; None if it takes any.
    """

    path: str
    guest: str
    method: str
    reason: str | None = None
    fixed_by: str | None = None

    def __str__(self) -> str:
        why = "" if self.reason is None else f" ({self.reason})"
        size = "" if self.fixed_by is None else f"; for one batch size ({self.fixed_by})"
        return f"{self.path}: {self.guest}, {self.method}{why}{size}"


@dataclass
class Remake:
    """Makes a native module of each shim; passed to a host's shims.

    Attributes:
        to: the host's framework.
        method, train, copy: as in :func:`materialize`.
        calls: by the path of each shim, its calls in one of the model.
        programs: by path, those of shims that were traced before.
        rows: what was done.
    """

    to: str
    method: str
    train: bool
    copy: bool
    calls: Mapping[Path, Sequence[Noted]]
    whole: Whole
    programs: Mapping[Path, Program] = field(default_factory=dict[Path, Program])
    rows: list[Replacement] = field(default_factory=list[Replacement])

    def __call__(
        self,
        structure: Structure,
        values: Mapping[Path, Any],
        *,
        path: Path,
        ties: str | None = None,
        is_batched: bool = True,
        finish: Callable[[Any], Any] = lambda made: made,
        structural: Mapping[str, Any] | None = None,
        traced: Mapping[str, Any] | None = None,
    ) -> Any:
        """The native module of a guest.

        Args:
            structure, values: the guest as it is now.
            path: where the shim is in the model.
            ties: what it shares with others and a conversion would not, or None.
            is_batched: whether calls of the shim see batches.
            finish: brings a converted module into the shim's mode.
            structural, traced: the host's options for both.

        Raises:
            InteropError: it cannot be made; ``error.path`` tells where.
        """
        where = f"model.{path_text(path)}" if path else "model"
        name = structure.guest_type.__qualname__
        if path in self.programs:
            return self.whole.make(self.programs[path], values, **(traced or {}))
        check_alive(values)
        if self.copy:
            values = {p: jax.numpy.copy(value) for p, value in values.items()}
        calls = self.calls.get(path, ())
        example = _example(calls, structure.batch_axes if is_batched else 0)
        converted = functools.partial(
            self._converted, structure, values, ties, structural or {}, example, calls, finish
        )
        program = functools.partial(self._program, structure, values, calls, where)
        reason = None
        if self.method != "trace":
            try:
                made = converted()
            except InteropError as e:
                if self.method == "structural":
                    remedy = _OTHERS if not calls else _TRACE if _works(program) else None
                    raise _located(e, where, remedy) from e.__cause__
                reason = e.problem
            else:
                self.rows.append(Replacement(where, name, "structural"))
                return made
        found, fixed_by = self._traced(program, converted, reason)
        self.rows.append(Replacement(where, name, "trace", reason, fixed_by))
        return self.whole.make(found, values, training=self.train, **(traced or {}))

    def _converted(
        self,
        structure: Structure,
        values: Mapping[Path, Any],
        ties: str | None,
        options: Mapping[str, Any],
        example: tuple[int, ...] | None,
        calls: Sequence[Noted],
        finish: Callable[[Any], Any],
    ) -> Any:
        if ties is not None:
            raise UnsupportedStructureError(
                f"it shares {ties} with another part of the model; conversion would untie them"
            )
        made = materialize_structure(
            structure, values, self.to, options, plain=_without_shims, example=example
        )
        self._check_options(made, calls)
        return finish(made)

    def _traced(
        self,
        program: Callable[[], tuple[Program, str | None]],
        converted: Callable[[], Any],
        reason: str | None,
    ) -> tuple[Program, str | None]:
        try:
            return program()
        except UnsupportedStructureError as e:
            if reason is not None:
                e.problem = f"{e.problem}; and {reason}"
            is_other = self.method == "trace" and _works(converted)
            raise _located(e, None, _STRUCTURAL if is_other else None) from e.__cause__

    def _check_options(self, made: Any, calls: Sequence[Noted]) -> None:
        """Refuse a converted module that does not take what the model passes by name.

        A stack may take such an argument for its first layer alone.
        """
        module: Any = made[0] if isinstance(made, tuple) else made
        given = {name for call in calls for name in (*call.kwargs, *call.options)}
        taken = inspect.signature(self.whole.forward(module)).parameters
        if unknown := sorted(given - taken.keys()):
            raise UnsupportedStructureError(
                f"the model calls it with {', '.join(unknown)}=, which the native "
                f"{type(module).__qualname__} does not take",
            )

    def _program(
        self, structure: Structure, values: Any, calls: Sequence[Noted], where: str
    ) -> tuple[Program, str | None]:
        name = structure.guest_type.__qualname__
        if not calls:
            raise UnsupportedStructureError(
                f"{name}.__call__ is not reached by the model on sample_input",
                path=where,
                remedy="Pass a sample_input that reaches it; other methods are not traced",
            )
        first, *others = [(call.args, dict(call.kwargs)) for call in calls]
        if any(_examples(first) != _examples(other) for other in others):
            raise UnsupportedStructureError(
                f"{name} is called with arguments of several shapes, and a traced module is "
                f"for one",
                path=where,
                remedy="Wrap the module once for each",
            )
        modes = (False, True) if self.train else (False,)
        found, fixed_by = trace(structure, values, *first, modes=modes, path=where)
        for args, kwargs in others:
            for mode in found.modes.values():
                try:
                    found.moving(mode, args, kwargs)
                except ArgumentError as e:
                    raise UnsupportedStructureError(
                        f"the model calls {name} with several values of an argument that its "
                        f"trace fixes ({e.problem})",
                        path=where,
                        remedy="Wrap the module once for each",
                    ) from e
        return found, fixed_by


_OTHERS = 'method="trace" or "auto", with sample_input=, takes any forward logic'
_TRACE = 'method="trace" and "auto" would work'
_STRUCTURAL = 'method="structural" and "auto" would work'


def _works(make: Callable[[], object]) -> bool:
    try:
        make()
    except InteropError:
        return False
    return True


def _example(calls: Sequence[Noted], batch_axes: int) -> tuple[int, ...] | None:
    """The shape of one example in the input of a call."""
    shape = getattr(calls[0].args[0], "shape", None) if calls and calls[0].args else None
    return None if shape is None else tuple(shape[batch_axes:])


def _examples(call: Any) -> Any:
    """What calls agree in that differ in the batch size at most."""
    leaves, tree = jax.tree.flatten(call)
    shapes = [getattr(x, "shape", ()) for x in leaves]
    dtypes = [getattr(x, "dtype", type(x)) for x in leaves]
    return tree, [shape[1:] for shape in shapes], list(map(len, shapes)), dtypes


def _located(error: InteropError, where: str | None, remedy: str | None) -> InteropError:
    """``error``, which a part of a model raised, as one of the model; ``remedy`` replaces its
    own, which is for who has not wrapped the part yet."""
    path = error.path
    if where is not None:
        inner = (path or "model").removeprefix("model")
        path = where + inner
    InteropError.__init__(error, error.problem, path=path, remedy=remedy or error.remedy)
    return error


def by_path(
    calls: Iterable[Noted],
    shims: Iterable[tuple[Path, Any]],
    same: Callable[[Any, Any], bool] = operator.is_,
    where: Callable[[Any], str] = lambda shim: "model",
) -> dict[Path, list[Noted]]:
    """The calls of each shim.

    Args:
        calls, shims: what was called in a model, and what it holds.
        same: tells whether a shim of ``shims`` was called as that one.
        where: the path of a shim that the model does not hold.

    Raises:
        UnsupportedStructureError: one was called that the model does not hold.
    """
    found: dict[Path, list[Noted]] = {}
    for call in calls:
        paths = [path for path, shim in shims if same(shim, call.shim)]
        if not paths:
            raise UnsupportedStructureError(
                f"{type(call.shim).__qualname__} is made in the code of the model, where it "
                f"cannot be replaced",
                path=where(call.shim),
                remedy="Hold the shim as a field or attribute of the module that calls it",
            )
        for path in paths:
            found.setdefault(path, []).append(call)
    return found


class Whole(ABC):
    """A host's models, seen as a whole.

    Attributes:
        module_type: the host's class of traced modules.
        companion: the argument of :func:`materialize` that goes with a model, or None.
    """

    module_type: type
    companion: str | None = None

    @abstractmethod
    def make(self, program: Program, values: Mapping[Path, Any], **options: Any) -> Any:
        """The traced module of a program, or the native pair that it is part of."""

    def close(self, made: Any) -> Any:
        """The native model of a traced module that stands alone."""
        return made

    @abstractmethod
    def parts(self, model: Any) -> tuple[Program, dict[Path, Any], bool]:
        """Of a traced module its program and arrays, and whether it is in training mode."""

    @abstractmethod
    def shims(self, model: Any) -> list[tuple[Path, Any]]:
        """The shims in a model, each once, with their paths."""

    @abstractmethod
    def run(
        self, model: Any, companion: Any, inputs: tuple[Any, ...]
    ) -> dict[Path, list[Noted]]:
        """Call a copy of the model in evaluation mode, and tell how it calls its shims.

        Raises:
            UnsupportedStructureError: it makes some in its code.
        """

    def check_held(self, model: Any) -> None:  # noqa: B027 - few hosts have such models
        """Refuse a model whose shims only a call can tell.

        Raises:
            ArgumentError: that is so.
        """

    def call_of(self, shim: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments that a guest's step or call gets where its shim is called so."""
        return inputs

    def forward(self, module: Any) -> Callable[..., Any]:
        """The call of a native module, as its class defines it."""
        return type(module).__call__

    @abstractmethod
    def replace(self, model: Any, companion: Any, remake: Callable[..., Any]) -> Any:
        """A copy of the model with what ``remake``, a :class:`Remake`, makes of each shim."""


def materialize(
    model: Any,
    *,
    method: str = "structural",
    sample_input: Any = None,
    train: bool = False,
    variables: Any = None,
    state: Any = None,
    copy: bool = False,
    verify: Any = None,
    report: Callable[[str], object] | None = None,
) -> Any:
    """Replace every shim in a model by a native module of the model's framework.

    Args:
        model: a shim, or a model that holds shims anywhere; ``(module, variables)`` for Linen
            and ``(model, state)`` for Equinox may be given as a pair. It is not changed. Shims
            that it makes in its own code (Linen's ``compact`` and ``setup``) are refused.
        method: ``"structural"`` converts each guest, as ``interop.convert`` does.
            ``"trace"`` takes any forward logic: it is exported as a program, in a module of
            the host whose parameters and buffers keep their paths and kinds. ``"auto"``
            converts what it can, and traces the rest.
        sample_input: the argument of a call of the model, or a tuple of its arguments, as the
            model itself takes them, or their ``jax.ShapeDtypeStruct``. Tracing needs it: traced
            modules take any batch size where the guests' code does, and these shapes otherwise.
            Converting needs it for layers that depend on the shape of their input, and for
            Linen models with code of their own, which may make shims in it; and what the model
            passes its shims by name is then checked.
        train: trace for training as well, and start in that mode; by default traced modules
            are for evaluation. Converted ones stay in the shim's mode, and have both.
        variables: the variables of a Linen model.
        state: the ``eqx.nn.State`` of an Equinox model.
        copy: give the guests' arrays buffers of their own; otherwise arrays whose layout
            agrees are the same objects.
        verify: a batch of inputs, or a tuple of them, as ``interop.compare`` takes them: both
            models are compared on it, in evaluation mode, before the result is returned.
        report: called with a line for each shim: where it stood, what it wrapped, and what was
            done; such as ``print``.

    Returns:
        A model of the same framework without shims, with the weights, statistics and mode as
        they are now: ``(module, variables)`` for Linen, ``(model, state)`` for an Equinox
        model that was given with its state, or of which a traced shim has state. The rest of
        it is the model's own; its containers are copies where the framework has mutable ones.
        Layers that are one stay one.

    Raises:
        ArgumentError: there is no shim in ``model``, ``method`` is unknown, or an argument is
            missing.
        UnmappedLayerError, UnsupportedLayerError, UnsupportedStructureError: a guest cannot be
            converted or traced; ``error.path`` names it, and the remedy another way.
        ConversionError: the result differs from the model on ``verify``; the message has the
            first difference and its size.
        MissingDependencyError: ``flatbuffers`` is missing, for tracing.

    Example:
        >>> import brainstate, jax.numpy as jnp, shims
        >>> class Block(brainstate.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.inner = brainstate.nn.Linear(3, 3)
        ...
        ...     def update(self, x):
        ...         return x + self.inner(x)
        >>> x = jnp.ones((5, 3))
        >>> shim = shims.ToNNX(Block())
        >>> model = shims.materialize(shim, method="trace", sample_input=x, verify=x)
        >>> model.program
        Block: float32[b, 3] -> float32[b, 3]; for evaluation
        >>> model.inner["weight"]["bias"].shape
        (3,)
    """
    if method not in METHODS:
        raise ArgumentError(f"unknown method {method!r}", remedy=f"Known are {METHODS}")
    if method != "structural" and sample_input is None:
        raise ArgumentError(
            f"method={method!r} needs sample_input",
            remedy="Pass an input as the model takes it, with its batch axis",
        )
    module, companion, to, whole = _opened(model, variables, state)
    if not whole.shims(module):
        raise ArgumentError(
            f"{type(module).__qualname__} holds no shims",
            remedy="Pass a shim, or a model that holds some as fields or attributes; those "
            "that its code makes, as in compact or setup, cannot be replaced",
        )
    calls = _calls_of(whole, module, companion, sample_input)
    remake = Remake(to, method, train, copy, calls, whole)
    made = whole.replace(module, companion, remake)
    if verify is not None:
        source = module if companion is None else (module, companion)
        _verify(source, made, _tuple(verify))
    if report is not None:
        for row in remake.rows:
            report(str(row))
    return made


def _calls_of(
    whole: Whole, module: Any, companion: Any, sample_input: Any
) -> dict[Path, list[Noted]]:
    """How a call of the model on ``sample_input``, if there is one, calls its shims."""
    if sample_input is None:
        whole.check_held(module)
        return {}
    inputs = _tuple(sample_input)
    if not any(hasattr(x, "dtype") for x in jax.tree.leaves(inputs)):
        raise ArgumentError(
            f"sample_input={sample_input!r} holds no array",
            remedy="Pass an input as the model takes it, with its batch axis, or "
            "jax.ShapeDtypeStruct(shape, dtype)",
        )
    if whole.shims(module)[0][1] is not module:
        return whole.run(module, companion, jax.tree.map(_array, inputs))
    arguments = described(whole.call_of(module, inputs))
    return {(): [Noted(module, arguments, {}, frozenset())]}


def _array(x: Any) -> Any:
    """An input that a model can be called with; only its shape and dtype matter."""
    return jax.numpy.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x


def _tuple(inputs: Any) -> tuple[Any, ...]:
    return tuple(inputs) if isinstance(inputs, tuple) else (inputs,)


def _opened(model: Any, variables: Any, state: Any) -> tuple[Any, Any, str, Whole]:
    """The module, what belongs to it, its framework, and that one's models."""
    module: Any = model
    given = {"variables": variables, "state": state}
    if isinstance(model, tuple) and len(model) == 2:
        module, second = model
    else:
        second = None
    framework = None if isinstance(module, type) else registry.framework_of(module)
    whole: Any = None if framework is None else side_of(framework, "whole")
    if framework is None or whole is None:
        raise ArgumentError(f"{type(module).__qualname__} is no model of a known host")
    for name, value in given.items():
        if value is not None and name != whole.companion:
            raise ArgumentError(f"{framework} models take no {name}=", remedy="Leave it out")
    own = given.get(whole.companion or "")
    return module, second if own is None else own, framework, whole


def _without_shims(native: Any) -> Any:
    """A guest's native object, its own shims converted."""
    module: Any = native[0] if isinstance(native, tuple) else native
    whole: Any = side_of(registry.framework_of(module) or "", "whole")
    if whole is None or not whole.shims(module):
        return native
    inner, companion, to, whole = _opened(native, None, None)
    return whole.replace(inner, companion, Remake(to, "structural", False, False, {}, whole))


def _mapping(model: Any, other: Any, sample_input: Any) -> WeightMapping | None:
    """:func:`interop.mapping` from a model with shims to what became of it; else None."""
    pair: Any = model if isinstance(model, tuple) else (model,)
    framework = registry.framework_of(pair[0])
    if framework is None or side_of(framework, "whole") is None:
        return None
    module, companion, to, whole = _opened(model, None, None)
    shims = whole.shims(module)
    if not shims:
        return None
    remake = Remake(to, "structural", False, False, {}, whole)
    there: Any = other[0] if isinstance(other, tuple) else other
    is_own = registry.framework_of(there) == to
    parts = {path: _part(there, path) for path, _ in shims} if is_own else {}
    traced = {path: part for path, part in parts.items() if isinstance(part, whole.module_type)}
    remake.programs = {path: part.program for path, part in traced.items()}
    adapter, node = unchecked(model)

    def rebuild(container: Any) -> Any:
        numbered = adapter.native(adapter.with_parameters(node, container))
        inner, beside, *_ = _opened(numbered, None, None)
        return adapter.parameters(unchecked(whole.replace(inner, beside, remake))[1])

    made = whole.replace(module, companion, remake)
    own, target = adapter.parameters(node), adapter.parameters(unchecked(made)[1])
    wanted = adapter.parameters(unchecked(other)[1]) if is_own else None
    if jax.tree.structure(wanted) == jax.tree.structure(target):
        return rebuilt(to, own, rebuild, wanted)
    there_after = mapping(made, other, sample_input=sample_input)
    return rebuilt(to, own, rebuild, target).then(there_after)


stand_ins.append(_mapping)


def _part(model: Any, path: Path) -> Any:
    """What stands at a shim's path in another model; None where nothing does."""
    part = model
    for step in path:
        is_plain = isinstance(part, list | tuple | Mapping)
        try:
            part = part[step] if is_plain else getattr(part, str(step))
        except (AttributeError, LookupError, TypeError):
            return None
    return part


def _verify(source: Any, made: Any, inputs: tuple[Any, ...]) -> None:
    """Compare.

    Raises:
        ConversionError: they differ.
    """
    found = compare(source, made, *inputs)
    beyond = found.beyond(found.rtol, found.atol)
    beyond += [f"dtype of {text}" for text in found.dtypes]
    if beyond:
        first = found.departs.path if found.departs is not None else "model"
        raise ConversionError(
            f"the materialized model computes something else (rtol={found.rtol:g}, "
            f"atol={found.atol:g})",
            path=first,
            mismatched=beyond,
            remedy="Keep the shim, and report this",
        )
