"""How the elements of some arrays are moved into others: found from numbered elements."""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .errors import ConversionError
from .parameters import Path, is_empty, name

__all__ = ["Piece", "Rearrangement", "find", "number", "rearrange"]

Shape = tuple[int, ...]
Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Piece:
    """A block of a source array that becomes a block of the target.

    ``target[target_start:target_stop] = source[start:stop].reshape(factors).transpose(axes)``,
    reshaped to the block, plus ``shift`` where the values are weights.
    """

    source: Path
    start: Shape
    stop: Shape
    factors: Shape
    axes: Shape
    target_start: Shape
    target_stop: Shape
    shift: float = 0.0

    def move(self, array: Any) -> Any:
        """The block of the target, from the whole source array."""
        block = array[_slices(self.start, self.stop)]
        shape = [b - a for a, b in zip(self.target_start, self.target_stop, strict=True)]
        return block.reshape(self.factors).transpose(self.axes).reshape(shape)


@dataclass(frozen=True)
class Rearrangement:
    """How one target array is made: of pieces that cover it."""

    target: Path
    shape: Shape
    pieces: tuple[Piece, ...]

    @property
    def sources(self) -> tuple[Path, ...]:
        """The arrays that the pieces are taken from, in order, each once."""
        return tuple(dict.fromkeys(piece.source for piece in self.pieces))

    def describe(self, shapes: dict[Path, Shape]) -> str:
        """The change in a few words."""
        shifts = sorted({p.shift for p in self.pieces} - {0.0})
        added = "".join(f", add {shift:+g} to part" for shift in shifts)
        if len(self.pieces) > 1:
            return f"{len(self.pieces)} blocks{added}"
        [piece] = list(self.pieces)
        shape = shapes[piece.source]
        part = "" if _covers(piece.start, piece.stop, shape) else "part, "
        block = tuple(b - a for a, b in zip(piece.start, piece.stop, strict=True))
        if piece.axes == tuple(range(len(piece.axes))):
            moved = "same" if self.shape == block else "reshape"
            return ("part" if part and moved == "same" else part + moved) + added
        if piece.factors == shape and [shape[i] for i in piece.axes] == [*self.shape]:
            return f"{part}transpose {piece.axes}{added}"
        return f"{part}reshape {piece.factors}, transpose {piece.axes}, reshape{added}"


def _slices(start: Shape, stop: Shape) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in zip(start, stop, strict=True))


def _covers(start: Shape, stop: Shape, shape: Shape) -> bool:
    return stop == shape and not any(start)


# -- finding --


def number(shapes: dict[Path, Shape]) -> dict[Path, Ints]:
    """Arrays of those shapes in which each element has a number of its own, from 0 on."""
    found: dict[Path, Ints] = {}
    first = 0
    for path, shape in shapes.items():
        size = math.prod(shape)
        found[path] = np.arange(first, first + size, dtype=np.int64).reshape(shape)
        first += size
    return found


def find(
    shapes: dict[Path, Shape], moved: dict[Path, Ints], shifts: dict[Path, Any]
) -> tuple[Rearrangement, ...]:
    """The rearrangements that make ``moved`` of the numbered arrays of ``shapes``."""
    finder = _Finder(shapes)
    return tuple(
        Rearrangement(path, ids.shape, tuple(finder.pieces(ids, shifts[path], (0,) * ids.ndim)))
        for path, ids in moved.items()
    )


class _Finder:
    def __init__(self, shapes: dict[Path, Shape]):
        self.paths, self.shapes = list(shapes), shapes
        self.first = np.cumsum([0] + [math.prod(shape) for shape in shapes.values()])[:-1]

    def pieces(self, ids: Ints, shift: Any, start: Shape) -> list[Piece]:
        owners = np.searchsorted(self.first, ids, side="right") - 1
        if (piece := self._piece(ids, shift, owners, start)) is not None:
            return [piece]
        axis, cuts = _cuts(ids, shift, owners)
        found: list[Piece] = []
        for a, b in zip([0, *cuts], [*cuts, ids.shape[axis]], strict=True):
            part = (slice(None),) * axis + (slice(a, b),)
            at = (*start[:axis], start[axis] + a, *start[axis + 1 :])
            found += self.pieces(ids[part], shift[part], at)
        return found

    def _piece(self, ids: Ints, shift: Any, owners: Ints, start: Shape) -> Piece | None:
        """All of ``ids`` as one piece, if they are a block of one array."""
        if (owners != owners.flat[0]).any() or (shift != shift.flat[0]).any():
            return None
        owner = int(owners.flat[0])
        path, first = self.paths[owner], int(self.first[owner])
        index = np.unravel_index(ids - first, self.shapes[path]) if self.shapes[path] else ()
        low = tuple(int(i.min()) for i in index)
        high = tuple(int(i.max()) + 1 for i in index)
        block = tuple(b - a for a, b in zip(low, high, strict=True))
        if math.prod(block) != ids.size:
            return None
        inside = [i - a for i, a in zip(index, low, strict=True)]
        relative = np.ravel_multi_index(inside, block) if block else np.zeros(ids.shape, int)
        order = _transposition(relative)
        if order is None:
            return None
        stop = tuple(a + n for a, n in zip(start, ids.shape, strict=True))
        return Piece(path, low, high, *order, start, stop, float(shift.flat[0]))


def _transposition(ids: Ints) -> tuple[Shape, Shape] | None:
    """``(factors, axes)`` with ``ids == arange(n).reshape(factors).transpose(axes)``."""
    digits: list[tuple[int, int]] = []
    for axis in range(ids.ndim):
        found = _digits(ids[(0,) * axis + (slice(None),) + (0,) * (ids.ndim - axis - 1)])
        if found is None:
            return None
        digits += found
    order = sorted(range(len(digits)), key=lambda i: -digits[i][1])
    factors = tuple(digits[i][0] for i in order)
    axes = tuple(order.index(i) for i in range(len(digits)))
    if math.prod(factors) != ids.size:
        return None
    moved = np.arange(ids.size).reshape(factors).transpose(axes).reshape(ids.shape)
    return (factors, axes) if np.array_equal(moved, ids) else None


def _run(line: Ints) -> int:
    """How many elements at the start of ``line`` are equally far apart."""
    steps = np.diff(line)
    changes = np.flatnonzero(steps != steps[:1])
    return int(changes[0]) + 1 if changes.size else line.size


def _digits(line: Ints) -> list[tuple[int, int]] | None:
    """``(size, stride)`` of the axes, outermost first, that ``line`` is a flattening of."""
    if line.size == 1:
        return []
    n, stride = _run(line), int(line[1] - line[0])
    if line.size % n or stride <= 0:
        return None
    outer = _digits(line[::n])
    return None if outer is None else [*outer, (n, stride)]


def _cuts(ids: Ints, shift: Any, owners: Ints) -> tuple[int, list[int]]:
    """An axis, and where to cut it so that the parts are closer to being pieces."""
    for axis in range(ids.ndim):
        line = (0,) * axis + (slice(None),) + (0,) * (ids.ndim - axis - 1)
        changes = np.diff(owners[line]).astype(bool) | np.diff(shift[line]).astype(bool)
        if changes.any():
            return axis, [int(i) + 1 for i in np.flatnonzero(changes)]
    for axis in range(ids.ndim):
        line = (0,) * axis + (slice(None),) + (0,) * (ids.ndim - axis - 1)
        if (n := _run(ids[line])) < ids.shape[axis]:
            return axis, [n]
    axis = max(range(ids.ndim), key=lambda axis: ids.shape[axis])
    return axis, list(range(1, ids.shape[axis]))


# -- applying --


def rearrange(
    change: Rearrangement, shapes: dict[Path, Shape], values: dict[Path, Any], shift: bool
) -> Any:
    """The leaf of the target, from the leaves of the source.

    Raises:
        ConversionError: a leaf has neither its parameter's shape nor is one for all of it, or
            a sharded axis does not stay one axis.
    """
    found = [values[path] for path in change.sources]
    if all(map(_is_whole, found)):
        return _common(change, found)
    if any(isinstance(leaf, jax.sharding.PartitionSpec) for leaf in found):
        return _partition(change, shapes, values)
    if any(isinstance(leaf, jax.sharding.NamedSharding) for leaf in found):
        specs = {path: getattr(leaf, "spec", leaf) for path, leaf in values.items()}
        return jax.sharding.NamedSharding(found[0].mesh, _partition(change, shapes, specs))
    for path, leaf in zip(change.sources, found, strict=True):
        if getattr(leaf, "shape", None) != shapes[path]:
            raise ConversionError(
                f"the leaf has shape {getattr(leaf, 'shape', None)}, its parameter "
                f"{shapes[path]}",
                path=name(path),
                remedy="Convert leaves of the parameters' shapes, or one value for each",
            )
    if isinstance(found[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(change.shape, found[0].dtype)
    return _assemble(change, values, shift)


def _is_whole(leaf: Any) -> bool:
    """Whether ``leaf`` says one thing of a whole array: a number, a mask, a label, nothing."""
    sharding = jax.sharding.PartitionSpec | jax.sharding.Sharding
    return not isinstance(leaf, sharding) and (
        is_empty(leaf) or getattr(leaf, "shape", ()) == () or not hasattr(leaf, "dtype")
    )


def _common(change: Rearrangement, found: list[Any]) -> Any:
    if any(type(leaf) is not type(found[0]) or leaf != found[0] for leaf in found[1:]):
        raise ConversionError(
            f"{', '.join(map(name, change.sources))} become one array and have different "
            f"values: {', '.join(map(repr, found))}",
            path=name(change.target),
            remedy="Give them the same value",
        )
    return found[0]


def _assemble(change: Rearrangement, values: dict[Path, Any], shift: bool) -> Any:
    blocks = [piece.move(values[piece.source]) for piece in change.pieces]
    if shift:
        blocks = [
            block + np.asarray(piece.shift, block.dtype) if piece.shift else block
            for block, piece in zip(blocks, change.pieces, strict=True)
        ]
    if len(blocks) == 1:
        (block,), (piece,) = blocks, change.pieces
        source = values[piece.source]
        unmoved = piece.axes == tuple(range(len(piece.axes))) and block.shape == source.shape
        return source if unmoved and not (shift and piece.shift) else block
    if all(isinstance(block, np.ndarray) for block in blocks):
        out = np.empty(change.shape, np.result_type(*blocks))
        for block, piece in zip(blocks, change.pieces, strict=True):
            out[_slices(piece.target_start, piece.target_stop)] = block
        return out
    out = jnp.zeros(change.shape, jnp.result_type(*blocks))
    for block, piece in zip(blocks, change.pieces, strict=True):
        out = out.at[_slices(piece.target_start, piece.target_stop)].set(block)
    return out


def _partition(
    change: Rearrangement, shapes: dict[Path, Shape], values: dict[Path, Any]
) -> Any:
    """The ``PartitionSpec`` of the target's axes."""
    given = [tuple(values[path] or ()) for path in change.sources]
    if not any(entry is not None for entries in given for entry in entries):
        return jax.sharding.PartitionSpec()
    (piece, *others), (entries, *_) = change.pieces, given
    shape = shapes[piece.source]
    if others or not _covers(piece.start, piece.stop, shape):
        raise _unsplit(change, given)
    padded = [*entries, *[None] * (len(shape) - len(entries))]
    by_factor = _regroup(padded, shape, piece.factors)
    moved = by_factor and [by_factor[axis] for axis in piece.axes]
    sizes = tuple(piece.factors[axis] for axis in piece.axes)
    result = None if moved is None else _regroup(moved, sizes, change.shape)
    if result is None:
        raise _unsplit(change, given)
    while result and result[-1] is None:
        result.pop()
    return jax.sharding.PartitionSpec(*result)


def _unsplit(change: Rearrangement, given: list[Any]) -> ConversionError:
    return ConversionError(
        f"the sharding {given[0]} has no counterpart: the axis is cut up or merged in "
        f"{name(change.target)}",
        path=name(change.sources[0]),
        remedy="Leave that axis unsharded, or shard the converted parameters anew",
    )


def _regroup(entries: list[Any], sizes: Shape, wanted: Shape) -> list[Any] | None:
    """``entries`` of the axes ``sizes`` for the axes ``wanted`` that they are reshaped to.

    An axis that is split keeps its entry on the outer part; one that is merged may have one
    only if it is the outermost. None where that is impossible.
    """
    outside = 1
    starts: dict[int, Any] = {}
    for entry, size in zip(entries, sizes, strict=True):
        if entry is not None and size > 1:
            starts[outside] = entry
        elif entry is not None:
            return None
        outside *= size
    result: list[Any] = []
    outside = 1
    for size in wanted:
        result.append(starts.pop(outside, None) if size > 1 else None)
        outside *= size
    return None if starts else result
