"""A traced module: its forward logic as exported programs, without code of its framework."""

# jax declares some of its types only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import types
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from interop.errors import ArgumentError, ConversionError, MissingDependencyError

from .core import Kind, Path, path_text
from .operation import Level, Operation

__all__ = [
    "Fixed",
    "Mode",
    "Program",
    "Step",
    "Value",
    "deserialize",
    "key_data",
    "labelled",
    "serialize",
]

KEYS = "threefry2x32"
Fixed = bool | int | float | str
_NOTHING: Mapping[str, Fixed] = types.MappingProxyType({})


@dataclass(frozen=True)
class Value:
    """One array of a traced module.

    Attributes:
        path, kind: as the guest's.
        shape, dtype: those of the array; of its data for random keys.
        keys: the implementation of random keys, or None for an array of numbers.
    """

    path: Path
    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    keys: str | None

    @classmethod
    def of(cls, path: Path, kind: Kind, value: Any) -> Value:
        """The description of an array."""
        data = key_data(value)
        return cls(path, kind, data.shape, str(data.dtype), key_kind(value))

    def wrapped(self, data: Any) -> Any:
        """The array for what a program computes with."""
        return data if self.keys is None else jax.random.wrap_key_data(data, impl=self.keys)


def key_kind(value: Any) -> str | None:
    """The implementation of typed random keys; None for other arrays."""
    if not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return None
    return str(jax.random.key_impl(value))


def key_data(value: Any) -> Any:
    """An array that a program can take: of random keys their data."""
    return value if key_kind(value) is None else jax.random.key_data(value)


@dataclass(frozen=True)
class Mode:
    """The program of one mode.

    Attributes:
        levels: for the program and each derivative, the serialised exports of a
            :class:`shims.operation.Level`.
        writes: paths of the values that a call changes.
        draws: whether it draws random numbers.
        fixed: the arguments, numbers and texts, for which alone it was traced, by label.
    """

    levels: tuple[tuple[bytes, ...], ...]
    writes: tuple[Path, ...]
    draws: bool
    fixed: Mapping[str, Fixed]

    @functools.cached_property
    def exported(self) -> tuple[Level, ...]:
        """The exports, read."""
        return tuple(Level(*map(deserialize, exports)) for exports in self.levels)


@dataclass(frozen=True)
class Step:
    """That a program is one step of a recurrent cell: of the carry and the inputs.

    Attributes:
        feature_axes: trailing axes of its input that are not batch axes; None if all are an
            example's.
        start: a serialised export of arrays, a key and an input, which makes the first carry;
            None where that depends on the arrays.
        draws: whether it draws random numbers.
    """

    feature_axes: int | None
    start: bytes | None
    draws: bool

    @functools.cached_property
    def exported(self) -> export.Exported | None:
        """The export, read."""
        return None if self.start is None else deserialize(self.start)


@dataclass(frozen=True, eq=False)
class Program:
    """The forward logic of a traced module: compares equal where it computes the same.

    Attributes:
        guest: the name of the class that was traced.
        values: its arrays, the parameters first.
        modes: what it computes in evaluation (False) and in training (True).
        step: for a recurrent cell, how it starts.
    """

    guest: str
    values: tuple[Value, ...]
    modes: Mapping[bool, Mode]
    step: Step | None = None

    def run(
        self,
        values: Mapping[Path, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        training: bool | None,
        key: Callable[[], jax.Array],
    ) -> tuple[Any, dict[Path, Any]]:
        """Compute the output, and the values that the call changes.

        Args:
            values: the arrays by path.
            args, kwargs: the arguments of the call.
            training: the mode; None where the host has none.
            key: draws a random key; asked for only where the mode draws.

        Raises:
            ArgumentError: the module was not traced in that mode, or not for such arguments.
            MissingKeyError: it draws random numbers, and there is no key.
        """
        training = self._mode(training)
        mode, operation = self.modes[training], self._operations[training]
        exported = mode.exported[0].plain
        data = [key_data(values[value.path]) for value in self.values]
        drawn = _key(key()) if mode.draws else jnp.zeros(2, jnp.uint32)
        inputs, tree = jax.tree.flatten(self.moving(mode, args, kwargs))
        inputs = [jnp.asarray(x) for x in inputs]
        self._check(exported, data, inputs, tree)
        outs = operation(*data, drawn, *inputs)
        out, new = jax.tree.unflatten(exported.out_tree, outs)
        known = {value.path: value for value in self.values}
        return out, {p: known[p].wrapped(x) for p, x in zip(mode.writes, new, strict=True)}

    def moving(self, mode: Mode, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The arguments of a call, with None for those that are fixed.

        Raises:
            ArgumentError: those are not what it was traced for.
        """
        given, tree = labelled(args, kwargs)
        fixed = {k: x for k, x in given if k in mode.fixed or isinstance(x, str)}
        if {k: (type(x), x) for k, x in fixed.items()} != {
            k: (type(x), x) for k, x in mode.fixed.items()
        }:
            raise ArgumentError(
                f"{self.guest} was traced for {_named(mode.fixed)}, and got {_named(fixed)}",
                remedy="Call it so, or trace it with a sample_input that is like this call",
            )
        return jax.tree.unflatten(tree, [None if k in fixed else x for k, x in given])

    @property
    def is_cell(self) -> bool:
        """Whether it is a recurrent cell that takes batches."""
        return self.step is not None and self.step.feature_axes is not None

    @property
    def feature_axes(self) -> int:
        """Trailing axes of a cell's input that are not batch axes."""
        return (self.step and self.step.feature_axes) or 0

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """The sizes of those axes."""
        (mode, *_) = self.modes.values()
        _, given = _arguments(mode.exported[0].plain)
        args, _ = jax.tree.unflatten(
            given, mode.exported[0].plain.in_avals[len(self.values) + 1 :]
        )
        return args[1].shape[args[1].ndim - self.feature_axes :]

    def initial_carry(self, input_shape: tuple[int, ...], key: Callable[[], jax.Array]) -> Any:
        """The carry that a recurrent cell starts from.

        Args:
            input_shape: the shape of one step's input.
            key: draws a random key; asked for only where it is needed.

        Raises:
            ArgumentError: it is no cell, it was not traced how it starts, or the shape is not
                that of its inputs.
        """
        start = None if self.step is None else self.step.exported
        if self.step is None or start is None:
            raise ArgumentError(
                f"it was not traced what {self.guest} starts from",
                remedy="Pass the carry",
            )
        *data, drawn, like = start.in_avals
        inputs = jnp.zeros(input_shape, like.dtype)
        if not _fits(inputs, like):
            raise ArgumentError(
                f"{self.guest} was traced for {_text(like)}, and is to start for "
                f"{_text(inputs)}",
                remedy="Trace it with a sample_input like that",
            )
        zeros = [jnp.zeros(value.shape, value.dtype) for value in data]
        drawn = _key(key()) if self.step.draws else jnp.zeros(2, jnp.uint32)
        return start.call(*zeros, drawn, inputs)

    def check_names(self, attributes: tuple[str, ...], base: type) -> None:
        """Refuse values whose attribute the host's module needs itself.

        Raises:
            ArgumentError: a name is in ``attributes``, or an attribute of ``base``.
        """
        names = sorted({str(value.path[0]) for value in self.values})
        taken = [name for name in names if name in attributes or hasattr(base, name)]
        if taken:
            raise ArgumentError(
                f"{self.guest} has names that the traced module needs itself: "
                f"{', '.join(taken)}",
                remedy="Rename them before it is traced",
            )

    def _mode(self, training: bool | None) -> bool:
        if training is None:
            if len(self.modes) > 1:
                raise ArgumentError(
                    f"{self.guest} was traced for training and evaluation, and the host gives "
                    f"no mode",
                    remedy="Set it as for a native layer",
                )
            training = False
        if training not in self.modes:
            raise ArgumentError(
                f"{self.guest} was traced for evaluation, and is called in training mode",
                remedy="Switch it to evaluation, or trace it with train=True for both modes",
            )
        return training

    @functools.cached_property
    def _operations(self) -> dict[bool, Operation]:
        return {
            training: Operation(mode.exported, len(self._weights))
            for training, mode in self.modes.items()
        }

    @property
    def _weights(self) -> list[Value]:
        return [value for value in self.values if value.kind is Kind.PARAMETER]

    def _check(self, exported: export.Exported, data: Any, inputs: Any, tree: Any) -> None:
        wanted = exported.in_avals
        first = len(self.values) + 1
        _, arguments = _arguments(exported)
        same = tree == arguments and all(
            _fits(x, aval) for x, aval in zip(inputs, wanted[first:], strict=True)
        )
        if not same:
            raise ArgumentError(
                f"{self.guest} was traced for {_listed(arguments, wanted[first:])}, and got "
                f"{_listed(tree, inputs)}",
                remedy="Call it with such arrays, or trace it with a sample_input like them",
            )
        self._check_data(data, wanted)
        self._check_batch([*data, None, *inputs], wanted)

    def check_values(self, values: Mapping[Path, Any]) -> None:
        """Refuse arrays that it cannot compute with.

        Raises:
            ConversionError: some have another shape or dtype.
        """
        (mode, *_) = self.modes.values()
        data = [key_data(values[value.path]) for value in self.values]
        self._check_data(data, mode.exported[0].plain.in_avals)

    def _check_data(self, data: Any, wanted: Any) -> None:
        mismatched = [
            f"{path_text(value.path)} is {_text(x)}, wanted {_text(aval)}"
            for value, x, aval in zip(self.values, data, wanted, strict=False)
            if not _fits(x, aval)
        ]
        if mismatched:
            raise ConversionError(
                f"the arrays of {self.guest} do not fit",
                mismatched=mismatched,
                remedy="Assign arrays of the same shape and dtype",
            )

    def _check_batch(self, inputs: Any, wanted: Any) -> None:
        sizes: dict[str, int] = {}
        for x, aval in zip(inputs, wanted, strict=True):
            if x is None or not aval.shape or not export.is_symbolic_dim(aval.shape[0]):
                continue
            if sizes.setdefault(str(aval.shape[0]), x.shape[0]) != x.shape[0]:
                raise ArgumentError(
                    f"{self.guest} got arrays for batches of {sizes[str(aval.shape[0])]} and "
                    f"of {x.shape[0]}",
                    remedy="Give all inputs, and its hidden state, the same batch size",
                )

    @functools.cached_property
    def digest(self) -> bytes:
        """A hash of all that it computes."""
        found = hashlib.sha256(json.dumps(self.header(), sort_keys=True).encode())
        for _, data in sorted(self.parts().items()):
            found.update(data)
        return found.digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __deepcopy__(self, memo: Any) -> Program:
        return self

    def __repr__(self) -> str:
        shapes = {self._shapes(mode) for mode in self.modes.values()}
        modes = " and ".join("training" if m else "evaluation" for m in sorted(self.modes))
        return f"{self.guest}: {'; '.join(sorted(shapes))}; for {modes}"

    def _shapes(self, mode: Mode) -> str:
        exported = mode.exported[0].plain
        outs = exported.out_avals[: len(exported.out_avals) - len(mode.writes)]
        _, arguments = _arguments(exported)
        inputs = exported.in_avals[len(self.values) + 1 :]
        given = _listed(arguments, inputs, mode.fixed)
        return f"{given} -> {', '.join(map(_text, outs)) or 'nothing'}"

    # -- as bytes --

    def header(self) -> dict[str, Any]:
        """All but the programs, for JSON."""
        return {
            "guest": self.guest,
            "values": [asdict(value) | {"kind": value.kind.name} for value in self.values],
            "modes": {
                _name(training): {
                    "levels": [len(exports) for exports in mode.levels],
                    "writes": mode.writes,
                    "draws": mode.draws,
                    "fixed": mode.fixed,
                }
                for training, mode in self.modes.items()
            },
            "step": self.step
            and {"feature_axes": self.step.feature_axes, "draws": self.step.draws},
        }

    def parts(self) -> dict[str, bytes]:
        """The programs, by names for :meth:`assemble`."""
        start = None if self.step is None else self.step.start
        return ({} if start is None else {"start": start}) | {
            f"{_name(training)}.{i}.{j}": data
            for training, mode in self.modes.items()
            for i, exports in enumerate(mode.levels)
            for j, data in enumerate(exports)
        }

    @classmethod
    def assemble(cls, header: Mapping[str, Any], parts: Mapping[str, bytes]) -> Program:
        """The program of a :meth:`header` and :meth:`parts`."""
        values = tuple(
            Value(
                tuple(facts["path"]),
                Kind[facts["kind"]],
                tuple(facts["shape"]),
                facts["dtype"],
                facts["keys"],
            )
            for facts in header["values"]
        )
        modes = {
            name == _name(True): Mode(
                tuple(
                    tuple(parts[f"{name}.{i}.{j}"] for j in range(n))
                    for i, n in enumerate(facts["levels"])
                ),
                tuple(map(tuple, facts["writes"])),
                facts["draws"],
                facts["fixed"],
            )
            for name, facts in header["modes"].items()
        }
        facts = header["step"]
        step = facts and Step(facts["feature_axes"], parts.get("start"), facts["draws"])
        return cls(header["guest"], values, modes, step)


def _name(training: bool) -> str:
    return "training" if training else "evaluation"


def _key(key: Any) -> Any:
    """A random key as programs take it."""
    data = key_data(key)
    if data.shape != (2,) or data.dtype != jnp.uint32:
        raise ArgumentError(
            f"a traced module draws from keys of {KEYS}, got {key.dtype}{list(key.shape)}",
            remedy="Pass jax.random.key(seed)",
        )
    return data


def labelled(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[tuple[str, Any]], Any]:
    """The leaves of a call's arguments, each with what it is called, and their tree."""

    def label(path: Any) -> str:
        (kind, first, *rest) = path
        name = first.key if kind.idx else f"argument {first.idx}"
        return name + jax.tree_util.keystr(tuple(rest))

    leaves, tree = jax.tree.flatten_with_path((args, dict(kwargs)))
    return [(label(path), x) for path, x in leaves], tree


def _named(fixed: Mapping[str, Fixed]) -> str:
    return ", ".join(f"{label}={x!r}" for label, x in fixed.items()) or "arrays alone"


def _arguments(exported: export.Exported) -> tuple[Any, Any]:
    """The trees of what a program takes: weights and others, and the call's arguments."""
    (inputs, _) = jax.tree.unflatten(exported.in_tree, [0] * exported.in_tree.num_leaves)
    *first, arguments = inputs
    return jax.tree.structure(tuple(first)), jax.tree.structure(arguments)


def _fits(x: Any, aval: Any) -> bool:
    return (
        x.dtype == aval.dtype
        and x.ndim == aval.ndim
        and all(
            export.is_symbolic_dim(b) or a == b
            for a, b in zip(x.shape, aval.shape, strict=True)
        )
    )


def _text(x: Any) -> str:
    return f"{x.dtype}[{', '.join(map(str, x.shape))}]"


def _listed(
    tree: Any, avals: Any, fixed: Mapping[str, Fixed] = types.MappingProxyType({})
) -> str:
    """Arguments of a call, those that have a name with it."""
    args, kwargs = jax.tree.unflatten(tree, list(map(_text, avals)))
    named = [
        f"{name}={', '.join(jax.tree.leaves(value)) or None}"
        for name, value in kwargs.items()
        if name not in fixed
    ]
    fixed_ones = [_named(fixed)] if fixed else []
    return ", ".join([*jax.tree.leaves(args), *named, *fixed_ones]) or "no arrays"


def serialize(exported: export.Exported) -> bytes:
    """An export as bytes.

    Raises:
        MissingDependencyError: ``flatbuffers`` is not installed.
    """
    with _needs_flatbuffers():
        return bytes(exported.serialize())


def deserialize(data: bytes) -> export.Exported:
    """The export of :func:`serialize`.

    Raises:
        MissingDependencyError: ``flatbuffers`` is not installed.
    """
    with _needs_flatbuffers():
        return export.deserialize(bytearray(data))


@contextlib.contextmanager
def _needs_flatbuffers() -> Generator[None]:
    try:
        yield
    except ImportError as e:
        raise MissingDependencyError("a traced module", "flatbuffers") from e
