"""Trace a guest's forward logic into programs that need neither its class nor its framework."""

# jax declares some of its types only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from interop.errors import InteropError, UnsupportedStructureError
from interop.programs import alike, inputs_read, operations

from .core import Call, Kind, Path, Structure, path_text
from .operation import Function, cotangents, derivative
from .program import KEYS, Fixed, Mode, Program, Step, Value, key_data, labelled, serialize

__all__ = ["trace"]

ORDERS = 2
PLATFORMS = ("cpu", "cuda", "tpu")


def trace(
    structure: Structure,
    values: Mapping[Path, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    modes: Sequence[bool],
    path: str,
) -> tuple[Program, str | None]:
    """Trace a guest.

    Args:
        structure, values: the guest, and its arrays.
        args, kwargs: the arguments of a call, described by shape and dtype; of a recurrent
            cell's step, the carry and the inputs. Where the guest's code allows it, the
            leading axis of the first, the batch, may have another size.
        modes: training (True), evaluation (False), or both.
        path: where the guest is, for errors.

    Returns:
        The program, and why it is for the given batch size alone; None if it is not.

    Raises:
        UnsupportedStructureError: the guest cannot be traced, or the trace cannot leave this
            process; the message says why.
        MissingDependencyError: ``flatbuffers`` is not installed.
    """
    kinds = structure.kinds
    ordered = sorted(values, key=lambda p: kinds[p] is not Kind.PARAMETER)
    described = tuple(Value.of(p, kinds[p], values[p]) for p in ordered)
    call = (args, dict(kwargs))
    traces = {m: _Tracing(structure, described, call, m, path) for m in modes}
    with structure.tracing():
        found = {training: tracing.mode() for training, tracing in traces.items()}
        step = next(iter(traces.values())).start()
    program = Program(structure.guest_type.__qualname__, described, found, step)
    return program, next((t.fixed_by for t in traces.values() if t.fixed_by), None)


class _Tracing:
    """The trace of a guest, for such a call, in one mode."""

    def __init__(
        self,
        structure: Structure,
        values: Sequence[Value],
        call: tuple[tuple[Any, ...], dict[str, Any]],
        training: bool,
        path: str,
    ):
        self._structure, self._values, self._training = structure, values, training
        self._path, self._name = path, structure.guest_type.__qualname__
        self._leaves, self._tree = labelled(*call)
        self._weights = sum(value.kind is Kind.PARAMETER for value in values)
        self._writes: tuple[Path, ...] = ()
        self._fixed: dict[str, Any] = {}
        self._draws = False
        self._is_open = False  # the batch size of hidden state
        self.fixed_by: str | None = None

    def mode(self) -> Mode:
        """The programs: for any numbers among the arguments if that can be traced."""
        for label, x in self._leaves:
            if not (hasattr(x, "dtype") or isinstance(x, Fixed)):
                raise self._refused(
                    f"it is called with a {type(x).__qualname__} ({label})",
                    "Pass arrays, numbers and texts, and the rest to its constructor",
                )
        self._fixed = {k: x for k, x in self._leaves if isinstance(x, str)}
        numbers = {k: x for k, x in self._leaves if isinstance(x, bool | int | float)}
        try:
            return self._of_any_batch(self._moving())
        except UnsupportedStructureError:
            if not numbers:
                raise
        self._fixed |= numbers
        return self._of_any_batch(self._moving())

    def _moving(self) -> Any:
        """The arguments of the call without those that are fixed, described as arrays."""
        moving = [None if k in self._fixed else _described(x) for k, x in self._leaves]
        return jax.tree.unflatten(self._tree, moving)

    def _whole(self, moving: Any) -> Any:
        """The arguments of a call: ``moving`` and those that are fixed."""
        left = iter(jax.tree.leaves(moving))
        leaves = [self._fixed[k] if k in self._fixed else next(left) for k, _ in self._leaves]
        return jax.tree.unflatten(self._tree, leaves)

    def _of_any_batch(self, given: Any) -> Mode:
        """The programs for such arrays: for any batch size if that can be traced."""
        first: Exception | None = None
        for size, hidden, like in self._open_sizes(given):
            try:
                found = self._exported(_sized(given, size), hidden)
                self._check_alike(given, like)
                return found
            except Exception as e:
                # What a guest does with an unknown size may raise anything. If the fault is
                # another, tracing with the size that was given raises it too.
                first = first or e
        try:
            found = self._exported(given, None)
        except InteropError:
            raise
        except Exception as e:
            raise self._refusal(given, e) from (first or e)
        self.fixed_by = first and _in_a_line(first)
        return found

    def start(self) -> Step | None:
        """How a recurrent cell starts; None for what is called without a carry."""
        args, _ = self._moving()
        if not self._structure.takes_carry(args):
            return None
        axes, inputs = self._structure.feature_axes, args[1]
        n = 0 if axes is None else inputs.ndim - axes
        batch, features = inputs.shape[:n], inputs.shape[n:]

        def start(*given: Any) -> Any:
            *data, key, x = given
            draw: Any = functools.partial(jax.random.wrap_key_data, key, impl=KEYS)
            return self._structure.initial_carry(self._wrapped(data), x.shape, draw)

        data = [*map(self._data, self._values), jax.ShapeDtypeStruct((2,), jnp.uint32)]
        read = inputs_read(jax.make_jaxpr(start)(*data, inputs).jaxpr)
        if any(i < len(self._values) for i in read):
            return Step(axes, None, False)  # the weights are not at hand everywhere
        for size in (export.symbolic_shape("b"), batch) if n == 1 else (batch,):
            like = jax.ShapeDtypeStruct((*size, *features), inputs.dtype)
            with contextlib.suppress(Exception):  # as in ``mode``
                found = export.export(jax.jit(start), platforms=PLATFORMS)(*data, like)
                return Step(axes, serialize(found), len(self._values) in read)
        return Step(axes, None, False)

    def _wrapped(self, data: Sequence[Any]) -> dict[Path, Any]:
        return {v.path: v.wrapped(x) for v, x in zip(self._values, data, strict=True)}

    def _function(self, *given: Any) -> tuple[Any, list[Any]]:
        """The guest's call as a pure function: data of the values, of the key, arguments."""
        *data, key, moving = given
        args, kwargs = self._whole(moving)
        values = self._wrapped(data)
        self._draws = False

        def draw() -> jax.Array:
            self._draws = True
            return jax.random.wrap_key_data(key, impl=KEYS)

        call = Call("__call__", args, kwargs, training=self._training, key=draw)
        is_step = self._structure.takes_carry(args)
        run = self._structure.step if is_step else self._structure.run
        out, changed, after = run(values, call)
        if after != self._structure and self._structure.starts_anew(after, changed, call):
            changed, after = {p: changed.get(p, v) for p, v in values.items()}, self._structure
        new = {**values, **changed}  # a step's carry is among its outputs
        self._check(values, new, after)
        self._writes = tuple(p for p in values if new[p] is not values[p])
        return out, [key_data(new[path]) for path in self._writes]

    def _check(
        self, values: Mapping[Path, Any], new: Mapping[Path, Any], after: Structure
    ) -> None:
        if after != self._structure or new.keys() != values.keys():
            made = sorted(path_text(path) for path in new.keys() - values.keys())
            raise self._refused(
                f"its call makes state or changes attributes{_of(made)}, which a trace cannot",
                "Call it once, or call its init_state, before",
            )
        for value in self._values:
            a, b = values[value.path], new[value.path]
            if a is b:
                continue
            if value.kind is Kind.PARAMETER:
                raise self._refused(
                    f"its call changes the parameter {path_text(value.path)}",
                    "Keep what a call changes in a buffer",
                )
            if not self._stays(value, a, b):
                raise self._refused(
                    f"its call makes {b.dtype}{list(b.shape)} of {path_text(value.path)}, "
                    f"which was {a.dtype}{list(a.shape)}",
                    "Initialise its state for the batch of sample_input",
                )

    def _stays(self, value: Value, a: Any, b: Any) -> bool:
        """Whether the next call can take ``b`` where this one took ``a``."""
        start = 1 if value.kind is Kind.HIDDEN and a.ndim and self._is_open else 0
        same_rank = a.ndim == b.ndim
        return same_rank and a.shape[start:] == b.shape[start:] and a.dtype == b.dtype

    def _exported(self, given: Any, hidden: Any) -> Mode:
        """The programs; ``hidden`` is the batch size of hidden state, if that is open."""
        *data, key, _ = self._inputs(given, hidden)
        flat, tree = jax.tree.flatten(given)
        traced: Any = jax.jit(self._function)
        inputs = [*data, key, *flat]
        plain = export.export(traced, platforms=PLATFORMS)(*data, key, given)
        if leaf := _foreign_node(plain.out_tree):
            raise self._refused(
                f"it returns a {leaf}, which needs its package to be read",
                "Return arrays, in tuples, lists or dicts",
            )

        def function(*flat: Any) -> tuple[Any, ...]:
            n = len(data) + 1
            return tuple(jax.tree.leaves(traced(*flat[:n], jax.tree.unflatten(tree, flat[n:]))))

        levels: list[tuple[export.Exported, ...]] = [
            (
                plain,
                self._mapped(function, inputs, 0),
                self._mapped(function, inputs, self._weights),
            )
        ]
        for _ in range(ORDERS):
            outs = levels[-1][0].out_avals
            function = jax.jit(derivative(function, len(inputs)))
            inputs = [
                *inputs,
                *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cotangents(outs)),
            ]
            again = export.export(function, platforms=PLATFORMS)(*inputs)
            levels.append((again, self._mapped(function, inputs, 0)))
        return Mode(
            tuple(tuple(map(serialize, level)) for level in levels),
            self._writes,
            self._draws,
            self._fixed,
        )

    def _mapped(self, function: Function, inputs: Sequence[Any], kept: int) -> export.Exported:
        """``function`` over a leading axis of any size of all but the first ``kept`` inputs."""
        (n,) = export.symbolic_shape("n", scope=_scope(inputs))
        leading = [
            x if i < kept else jax.ShapeDtypeStruct((n, *x.shape), x.dtype)
            for i, x in enumerate(inputs)
        ]

        def one_by_one(*given: Any) -> tuple[Any, ...]:
            weights, rest = given[:kept], given[kept:]

            def one(each: Any) -> tuple[Any, ...]:
                return function(*weights, *each)

            return jax.lax.map(one, rest)

        axes = [None if i < kept else 0 for i in range(len(inputs))]
        try:
            many = jax.jit(jax.vmap(function, in_axes=axes))
            return export.export(many, platforms=PLATFORMS)(*leading)
        except Exception:
            # Such as a convolution with a weight for each example, which wants the number of
            # examples. If the fault is another, this raises it too.
            return export.export(jax.jit(one_by_one), platforms=PLATFORMS)(*leading)

    def _open_sizes(self, given: Any) -> Iterator[tuple[Any, Any, Sequence[Any]]]:
        """Open sizes of a batch and of hidden state, and numbers that they may stand for.

        Hidden state that a call makes anew may have been for another batch; where that cannot
        be traced, the sizes are one, or hidden state is for no batch at all.
        """
        n = _batch_size(given)
        if n is None:
            return
        b, h = export.symbolic_shape("b, h")
        if any(value.kind is Kind.HIDDEN for value in self._values):
            yield b, h, ((n, n), (n, n + 1), (1, 1))
            yield b, b, ((n, n), (n + 1, n + 1), (1, 1))
        yield b, None, ((n, None), (n + 1, None), (1, None))

    def _check_alike(self, given: Any, sizes: Sequence[Any]) -> None:
        """Refuse one program for all of ``sizes`` where the guest's code tells them apart."""

        def look(size: Any, hidden: Any) -> Any:
            # JAX keeps traces by function, and this is no real one: it gets one of its own.
            def anew(*data: Any) -> Any:
                return self._function(*data)

            return jax.make_jaxpr(anew)(*self._inputs(_sized(given, size), hidden))

        if not alike(look, sizes):
            raise self._refused(
                "its code computes something else for some batch sizes, which it compares",
                "Write it without comparing them",
            )

    def _inputs(self, given: Any, hidden: Any = None) -> list[Any]:
        """What describes all that :meth:`_function` takes."""
        self._is_open = hidden is not None
        data = [self._data(value, hidden) for value in self._values]
        return [*data, jax.ShapeDtypeStruct((2,), jnp.uint32), given]

    def _data(self, value: Value, hidden: Any = None) -> Any:
        """What describes a value; the leading axis of hidden state is that of its batch."""
        shape: tuple[Any, ...] = value.shape
        if value.kind is Kind.HIDDEN and shape and hidden is not None:
            shape = (hidden, *shape[1:])
        return jax.ShapeDtypeStruct(shape, jnp.dtype(value.dtype))

    def _refused(self, problem: str, remedy: str) -> UnsupportedStructureError:
        return UnsupportedStructureError(
            f"{self._name} cannot be traced: {problem}", path=self._path, remedy=remedy
        )

    def _refusal(self, given: Any, error: Exception) -> Exception:
        """The error for a trace that failed."""
        try:
            jaxpr = jax.make_jaxpr(self._function)(*self._inputs(given))
        except Exception:
            return self._refused(
                f"it does not run with traced arrays ({_in_a_line(error)})",
                "Use jax.lax for what depends on values, and check sample_input",
            )
        foreign = sorted(set(_foreign(jaxpr.jaxpr)))
        if foreign:
            return self._refused(
                f"it uses {', '.join(foreign)}, which cannot leave this process",
                "Take them out of its forward logic, or keep the shim",
            )
        return self._refused(_in_a_line(error), "Keep the shim")


def _described(x: Any) -> Any:
    """What describes an argument; a number is an array that takes on the dtype of others."""
    if hasattr(x, "dtype"):
        return x
    return jax.ShapeDtypeStruct((), jnp.result_type(x), weak_type=True)


def _batch_size(given: Any) -> int | None:
    """The leading axis of the first array that has one."""
    shapes = (x.shape for x in jax.tree.leaves(given) if getattr(x, "shape", ()))
    return next((shape[0] for shape in shapes), None)


def _sized(given: Any, size: Any) -> Any:
    """The arguments of a call with another batch size."""
    own = _batch_size(given)

    def sized(x: Any) -> Any:
        if not getattr(x, "shape", ()) or x.shape[0] != own:
            return x
        return jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype)

    return jax.tree.map(sized, given)


def _in_a_line(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"


def _scope(inputs: Sequence[Any]) -> Any:
    """The scope of the symbols in ``inputs``; one operation has one."""
    for x in inputs:
        for dim in x.shape:
            if export.is_symbolic_dim(dim):
                return dim.scope
    return None


def _of(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


_CALLBACKS = ("debug_callback", "debug_print", "io_callback", "pure_callback")


def _foreign(jaxpr: Any) -> Iterator[str]:
    """What a jaxpr does that needs more than JAX, in words."""
    for equation in operations(jaxpr):
        primitive = equation.primitive
        package = _package(primitive)
        if primitive.name in _CALLBACKS:
            yield f"a host callback ({primitive.name})"
        elif package not in ("jax", "jaxlib"):
            yield f"the operation {primitive.name} of the package {package}"


def _package(primitive: Any) -> str:
    """The package that a primitive was made in, by where its implementation is."""
    implementation: Callable[..., Any] = primitive.impl
    while hasattr(implementation, "func"):
        implementation = implementation.func  # type: ignore[attr-defined]
    return implementation.__module__.partition(".")[0]


_PLAIN: tuple[type, ...] = (tuple, list, dict, type(None))


def _foreign_node(tree: Any) -> str | None:
    """The first type in a tree that is no plain container."""
    data = tree.node_data()
    if data is not None and data[0] not in _PLAIN:
        return f"{data[0].__module__}.{data[0].__qualname__}"
    return next(filter(None, map(_foreign_node, tree.children())), None)
