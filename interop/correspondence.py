"""The correspondence of two models' weights, and what it does to trees of their shape."""

# jax.tree_util declares some of its types only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from . import rearrangement, specs
from .api import convert_with, keywords_of, open_model, sample_shape
from .errors import ArgumentError, ConversionError, InteropError
from .layout import crossed
from .parameters import Path, arrays, is_empty, is_quantity, leaves, magnitude, name
from .rearrangement import Piece, Rearrangement
from .registry import Adapter, registry
from .walk import Reading

__all__ = ["WeightMapping", "arrays_of", "changes_of", "mapping", "rebuilt", "stand_ins"]

Shapes = dict[Path, tuple[int, ...]]
Change = Callable[[specs.Spec, Reading], specs.Spec]


@dataclass(frozen=True)
class WeightMapping:
    """Which weight of one model is which of another, and how it is laid out there.

    Made by :func:`mapping`. It holds no arrays, and does not change.

    Attributes:
        source, target: the frameworks.
        shapes: the shape of each parameter of the source, by its path.
        changes: for each parameter of the target, what it is made of.

    Example:
        >>> import brainstate, interop
        >>> interop.mapping(brainstate.nn.Linear(3, 4), to="equinox")
        <WeightMapping: brainstate -> equinox: 2 parameters>
    """

    source: str
    target: str
    shapes: Shapes = field(hash=False)
    changes: tuple[Rearrangement, ...]
    _source_tree: Any = field(default=None, repr=False, compare=False)
    _target_tree: Any = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {str(self).splitlines()[0]}>"

    def __str__(self) -> str:
        rows = [
            (
                " + ".join(f"{name(path)} {self.shapes[path]}" for path in change.sources),
                f"{name(change.target)} {change.shape}",
                change.describe(self.shapes),
            )
            for change in self.changes
        ]
        left, right = (max((len(row[i]) for row in rows), default=0) for i in (0, 1))
        lines = [f"  {a:<{left}}  ->  {b:<{right}}  {how}" for a, b, how in rows]
        return "\n".join([f"{self.source} -> {self.target}: {len(rows)} parameters", *lines])

    def __len__(self) -> int:
        return len(self.changes)

    def apply(self, tree: Any, *, weights: bool | None = None, like: Any = None) -> Any:
        """Bring every parameter-shaped part of ``tree`` into the target's layout.

        Args:
            tree: a pytree that is, or holds anywhere, containers of the source's parameters:
                gradients, Adam moments, EMA weights, freeze masks, shardings, whole optax
                states. A container is what the framework's optimisers take: a nested dict or
                ``nnx.State`` of an NNX model, the ``params`` dict of a Linen model,
                ``{path: state.value}`` of ``model.states(ParamState)`` in BrainState, the
                filtered module in Equinox. Boxes such as those of ``nnx.Optimizer`` are seen
                through. Its leaves are arrays of the parameters' shapes;
                or a ``PartitionSpec``, ``NamedSharding`` or ``ShapeDtypeStruct``, whose axes
                move along; or one value for the whole array (a number, a label, nothing),
                which stays as it is. Everything outside containers stays as it is.
            weights: whether the leaves are weights or gradients. That only matters where the
                frameworks' weights differ by a constant, which gradients do not see.
            like: parameters of the target in its own container; needed if the mapping was
                loaded from JSON and the target keeps them in modules.

        Returns:
            The same pytree with the target's containers in the places of the source's. Arrays
            of equal layout are the same objects.

        Raises:
            ConversionError: no part of ``tree`` has the source's parameters, ``like`` does not
                have the target's, or a leaf neither fits its parameter nor is one value for
                it.
            ArgumentError: ``weights`` or ``like`` is needed.

        Example:
            >>> import brainstate, interop, optax
            >>> model = brainstate.nn.Linear(3, 4)
            >>> params = {k: s.value for k, s in model.states(brainstate.ParamState).items()}
            >>> state = optax.adam(1e-3).init(params)
            >>> moved = interop.mapping(model, to="equinox").apply(state)
            >>> moved[0].mu.weight.shape, moved[0].count is state[0].count
            ((4, 3), True)
        """
        shifted = any(piece.shift for change in self.changes for piece in change.pieces)
        if shifted and weights is None:
            raise ArgumentError(
                f"some weights of {self.source} and {self.target} differ by a constant",
                remedy="Pass weights=True for weights or averages of them, weights=False for "
                "gradients and moments of them",
            )
        if not self.changes:
            return tree
        matched: list[bool] = []

        def is_container(part: Any) -> bool:
            return self._values(part) is not None

        def move(part: Any) -> Any:
            values = self._values(part)
            if values is None:
                return part
            matched.append(True)
            return self._rebuild(self._moved(values, shift=bool(weights)), like)

        moved = jax.tree.map(move, tree, is_leaf=is_container)
        if not matched:
            raise self._nothing_found(tree)
        return moved

    def invert(self) -> WeightMapping:
        """The mapping from the target to the source."""
        ids, shifts = self._trace()
        shapes: Shapes = {change.target: change.shape for change in self.changes}
        size = sum(map(math.prod, self.shapes.values()))
        back, added = np.empty(size, np.int64), np.empty(size)
        flat = _flat(ids)
        back[flat], added[flat] = np.arange(size), -_flat(shifts)
        return WeightMapping(
            self.target,
            self.source,
            shapes,
            rearrangement.find(shapes, _unflat(back, self.shapes), _unflat(added, self.shapes)),
            self._target_tree,
            self._source_tree,
        )

    def then(self, other: WeightMapping) -> WeightMapping:
        """This mapping followed by ``other``, as one.

        Raises:
            ArgumentError: ``other`` is no mapping, or does not start where this one ends.
        """
        if not isinstance(cast(Any, other), WeightMapping):
            raise ArgumentError(
                f"other must be a WeightMapping, got {type(other).__qualname__}"
            )
        ends: Shapes = {change.target: change.shape for change in self.changes}
        if (self.target, ends) != (other.source, other.shapes):
            raise ArgumentError(
                f"a mapping to {self.target} ({_listed(ends)}) cannot be followed by one from "
                f"{other.source} ({_listed(other.shapes)})",
                remedy="Make both mappings from the same model in the middle",
            )
        ids, shifts = self._trace()
        moved = other._moved(dict(ids), shift=False)
        added = other._moved(dict(shifts), shift=True)
        return WeightMapping(
            self.source,
            other.target,
            self.shapes,
            rearrangement.find(self.shapes, moved, added),
            self._source_tree,
            other._target_tree,
        )

    def to_json(self) -> str:
        """The mapping as text, for :meth:`from_json`; it holds no weights."""
        return json.dumps(
            {
                "format": 1,
                "source": self.source,
                "target": self.target,
                "shapes": [[path, shape] for path, shape in self.shapes.items()],
                "changes": [dataclasses.asdict(change) for change in self.changes],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> WeightMapping:
        """The mapping that :meth:`to_json` wrote.

        Raises:
            ArgumentError: ``text`` is something else.

        Example:
            >>> import brainstate, interop
            >>> mapping = interop.mapping(brainstate.nn.Linear(3, 4), to="linen")
            >>> interop.WeightMapping.from_json(mapping.to_json()) == mapping
            True
        """
        try:
            facts = json.loads(text)
            if facts["format"] != 1:
                raise ValueError(f"format {facts['format']}")
            shapes = {tuple(path): tuple(shape) for path, shape in facts["shapes"]}
            changes = tuple(_change(change) for change in facts["changes"])
            return cls(facts["source"], facts["target"], shapes, changes)
        except (ValueError, KeyError, TypeError) as e:
            raise ArgumentError(
                f"this is no mapping written by to_json ({type(e).__name__}: {e})",
                remedy="Pass the text that to_json returned",
            ) from e

    def _values(self, part: Any) -> dict[Path, Any] | None:
        """The leaves of the source's parameters, if ``part`` is a container of just those."""
        found = leaves(part)
        if not self.shapes.keys() <= found.keys():
            return None
        extra = found.keys() - self.shapes.keys()
        return found if all(is_empty(found[path]) for path in extra) else None

    def _moved(self, values: dict[Path, Any], *, shift: bool) -> dict[Path, Any]:
        return {
            change.target: rearrangement.rearrange(change, self.shapes, values, shift)
            for change in self.changes
        }

    def _rebuild(self, moved: dict[Path, Any], like: Any) -> Any:
        tree = self._target_tree if like is None else _tree(like)
        if tree is not None:
            treedef, paths = tree
            if moved.keys() != paths.keys():
                raise ConversionError(
                    f"like= does not have the parameters of the {self.target} model",
                    missing=sorted(map(name, moved.keys() - paths.keys())),
                    unexpected=sorted(map(name, paths.keys() - moved.keys())),
                    remedy="Pass the target's parameters in their own container",
                )
            placed = [_placed(moved[path], leaf) for path, leaf in paths.items()]
            return jax.tree.unflatten(treedef, placed)
        container = registry.adapter(self.target).container(moved)
        if container is None:
            raise ArgumentError(
                f"this mapping was loaded, and {self.target} keeps parameters in modules",
                remedy="Pass like=, the target's parameters in their own container",
            )
        return container

    def _trace(self) -> tuple[dict[Path, Any], dict[Path, Any]]:
        """For each element of the target, the number of its source, and what is added."""
        ids = rearrangement.number(self.shapes)
        zeros = {path: np.zeros(shape) for path, shape in self.shapes.items()}
        return self._moved(dict(ids), shift=False), self._moved(dict(zeros), shift=True)

    def _nothing_found(self, tree: Any) -> ConversionError:
        found = {path for path, leaf in leaves(tree).items() if not is_empty(leaf)}
        return ConversionError(
            f"no part of the tree has the parameters of the {self.source} model",
            missing=sorted(map(name, self.shapes.keys() - found)),
            unexpected=sorted(map(name, found - self.shapes.keys())),
            remedy="Pass them in the container that the framework's optimisers take",
        )


stand_ins: list[Callable[[Any, Any, Any], WeightMapping | None]] = []
"""Asked first for the mapping from ``a`` to ``b`` with a ``sample_input``: each answers for
models that hold parts which stand for others, and with None for the rest."""


def mapping(
    a: Any, b: Any = None, *, to: str | None = None, sample_input: Any = None
) -> WeightMapping:
    """Find which weight of one model is which of another.

    Nothing but the layout is compared: the values may differ, as between a model and its
    converted twin that was trained on.

    Args:
        a: a model; ``(module, variables)`` for Linen, ``(model, state)`` for an Equinox model
            with state. It may be a live shim, or hold some, whose parameters are in its
            container as in any optimiser's.
        b: a model of the same layers, of any framework; of a model with shims, what it
            materialized to.
        to: instead of ``b``, the framework that ``a`` would be converted to.
        sample_input: one example for ``a`` without its batch axis, or its shape; needed where
            :func:`interop.convert` needs it, such as for a Flatten between layouts.

    Returns:
        A :class:`WeightMapping` of the trainable parameters from ``a`` to ``b``. Running
        statistics belong to no optimiser, and are not in it: ``convert`` carries a model's
        own, and ``interop.load_weights(b, weights, source=a)`` others, such as averages of a
        whole model.

    Raises:
        ArgumentError: not exactly one of ``b`` and ``to`` is given, or one is no model.
        ConversionError: the models' layers or their parameters do not correspond.
        InteropError: a model has a layer that does not convert.

    Example:
        >>> import brainstate, interop
        >>> print(interop.mapping(brainstate.nn.Linear(3, 4), to="equinox"))
        brainstate -> equinox: 2 parameters
          weight.weight (3, 4)  ->  weight (4, 3)  transpose (1, 0)
          weight.bias (4,)      ->  bias (4,)      same
    """
    if (b is None) == (to is None):
        raise ArgumentError(
            "mapping takes two models, or one and the framework to=",
            remedy='Write mapping(a, b) or mapping(a, to="...")',
        )
    module, keywords = keywords_of(a)
    for stand_in in stand_ins if b is not None else ():
        if (found := stand_in(a, b, sample_input)) is not None:
            return found
    adapter, node = open_model(a)
    if to is not None:
        b = convert_with(module, to, sample_input=sample_input, options={}, **keywords)
    other, other_node = open_model(b)
    shape = sample_shape(sample_input)

    def change(spec: specs.Spec, reading: Reading) -> specs.Spec:
        return crossed(spec, reading.origins, shape, adapter, other).spec

    first = _Numbered(adapter, node, change)
    second = _Numbered(other, other_node, _unchanged)
    ids, shifts = _match(first, second)
    return WeightMapping(
        first.adapter.name,
        second.adapter.name,
        first.shapes,
        rearrangement.find(first.shapes, ids, shifts),
        _tree(first.parameters),
        _tree(second.parameters),
    )


def _unchanged(spec: specs.Spec, reading: Reading) -> specs.Spec:
    return spec


def changes_of(
    source: Adapter, node: Any, target: Adapter, built: Any, change: Any = None
) -> tuple[str, ...]:
    """How the parameters of one layer are laid out anew, where they are; in words.

    ``change`` is what was done to the layer's spec between reading and building.
    """
    try:
        first = _Numbered(source, node, lambda spec, _: change(spec) if change else spec)
        second = _Numbered(target, built, _unchanged)
        changes = rearrangement.find(first.shapes, *_match(first, second))
    except InteropError:
        return ()
    found = [(name(change.target), change.describe(first.shapes)) for change in changes]
    return tuple(f"{path}: {how}" for path, how in found if how != "same")


def rebuilt(
    framework: str, container: Any, rebuild: Callable[[Any], Any], target: Any
) -> WeightMapping:
    """The mapping from a container of parameters to what a function makes of it.

    Args:
        framework: whose containers they are.
        container: the parameters.
        rebuild: called with such containers, which hold numbers.
        target: what it would make of ``container``.

    Raises:
        ConversionError: it does more than move elements and add constants to them, or makes
            something else than ``target``.
    """
    shapes, wanted = _shapes(container), _shapes(target)
    dtypes = [leaf.dtype for leaf in arrays(container).values()]
    base = min((_base(dtype) for dtype in dtypes), default=_BASE)
    ids = rearrangement.number(shapes)
    size = sum(map(math.prod, shapes.values()))

    def remade(digits: dict[Path, Any]) -> dict[Path, Any]:
        leaves = [jnp.asarray(d, t) for d, t in zip(digits.values(), dtypes, strict=True)]
        made = rebuild(jax.tree.unflatten(jax.tree.structure(container), leaves))
        if _shapes(made) != wanted:
            raise ConversionError(
                "the models do not correspond: the first becomes another than the second",
                missing=[name(path) for path in _shapes(made).keys() - wanted.keys()],
                unexpected=[name(path) for path in wanted.keys() - _shapes(made).keys()],
                remedy="Pass what materialize made of the first",
            )
        return arrays(made)

    readings = [(n, remade(up), remade(down)) for n, up, down in _digits(ids, size, base)]
    found, shifts = dict[Path, Any](), dict[Path, Any]()
    for path in wanted:
        pairs = [(n, *_as_floats(up[path], down[path])) for n, up, down in readings]
        numbers, shifts[path] = _decoded(pairs, size, base)
        if numbers is None:
            raise ConversionError(
                "the parameter is not made of elements of the source's", path=name(path)
            )
        found[path] = numbers
    unused = np.ones(size, bool)
    for numbers in found.values():
        unused[numbers] = False
    if unused.any():
        lost = [name(path) for path, numbers in ids.items() if unused[numbers].any()]
        raise ConversionError("parameters have no counterpart in the target", missing=lost)
    changes = rearrangement.find(shapes, found, shifts)
    return WeightMapping(framework, framework, shapes, changes, _tree(container), _tree(target))


# float32 holds every integer up to 16 times this base, and eighths of those up to twice it, so
# that a reader may add a constant to a digit.
_BASE = 2**20


def _base(dtype: Any) -> int:
    """The base of digits that arrays of ``dtype`` hold as float32 holds those of ``_BASE``."""
    return min(_BASE, 2 ** (jnp.finfo(dtype).nmant - 3))


def _digits(ids: dict[Path, Any], size: int, base: int) -> Iterator[tuple[int, Any, Any]]:
    """For each digit of the numbers its scale, the digits, and their complements."""
    scale = 1
    while scale < max(size, 2):
        digits = {path: numbers // scale % base for path, numbers in ids.items()}
        yield scale, digits, {path: base - 1 - digit for path, digit in digits.items()}
        scale *= base


def _decoded(pairs: list[tuple[int, Any, Any]], size: int, base: int) -> tuple[Any, Any]:
    """The numbers of an array's elements, or None if they have none, and what is added.

    ``pairs`` has for each digit its scale, what it became, and what its complement became.
    """
    shift = (pairs[0][1] + pairs[0][2] - (base - 1)) / 2
    ids = _number([(scale, up - shift) for scale, up, _ in pairs], base)
    if ids is None or ids.max(initial=0) >= size:
        return None, shift
    ordered = np.sort(ids, axis=None)  # np.unique hashes, which takes seconds for each million
    return (ids if (ordered[1:] > ordered[:-1]).all() else None), shift


class _Numbered:
    """A model read several times with numbers in place of its parameters' elements.

    The numbers are written in digits, one reading for each digit and one for its complement.
    A rule that only moves elements shows where to; one that adds a constant shows it in the
    sum of both; one that does anything else shows numbers that there are not.
    """

    def __init__(self, adapter: Adapter, node: Any, change: Change):
        self.adapter, self._node, self._change = adapter, node, change
        self.parameters = adapter.parameters(node)
        self.shapes: Shapes = {
            path: tuple(leaf.shape) for path, leaf in arrays(self.parameters).items()
        }
        if empty := [name(path) for path, shape in self.shapes.items() if 0 in shape]:
            raise ConversionError(
                f"{', '.join(empty)} of {adapter.name} has no elements to follow",
                path="model",
                remedy="Map the model without that layer",
            )
        self.ids = rearrangement.number(self.shapes)
        self.size = sum(map(math.prod, self.shapes.values()))
        readings = [
            (scale, self._read(up), self._read(down))
            for scale, up, down in _digits(self.ids, self.size, _BASE)
        ]
        self.layers: list[tuple[str, str, dict[str, Any]]] = []
        self.frozen = np.zeros(self.size, bool)
        for i, (where, part) in enumerate(readings[0][1]):
            arrays_read = [
                (scale, arrays_of(up[i][1]), arrays_of(down[i][1]))
                for scale, up, down in readings
            ]
            fields = self._fields(where, arrays_read)
            for key in fields.keys() & set(part.buffers):  # seen here by optimisers in vain
                self.frozen[fields.pop(key)[0].ravel()] = True
            if fields:
                self.layers.append((where, _kind(part), fields))

    @jax.ensure_compile_time_eval()
    def _read(self, digits: dict[Path, Any]) -> list[tuple[str, specs.Spec]]:
        numbered = [jnp.asarray(digits[path], jnp.float32) for path in arrays(self.parameters)]
        container = jax.tree.unflatten(jax.tree.structure(self.parameters), numbered)
        reading = Reading(self.adapter, registry)
        node = self.adapter.with_parameters(self._node, container)
        spec = self._change(reading.read(node, "model"), reading)
        return [
            (reading.origins.get(id(part), ("model", object))[0], part.simplest())
            for part in _parts(spec, set())
        ]

    def _fields(
        self, where: str, readings: list[tuple[int, dict[str, Any], dict[str, Any]]]
    ) -> dict[str, Any]:
        """For each array of a layer the numbers of its elements, and what is added to them."""
        fields: dict[str, Any] = {}
        for key, read in readings[0][1].items():
            if isinstance(magnitude(read), Tracer):
                continue  # numbers are none, so that it is no parameter
            pairs = [(scale, *_as_floats(up[key], down[key])) for scale, up, down in readings]
            if np.array_equal(*pairs[0][1:]):
                continue  # an array that is no parameter
            ids, shift = _decoded(pairs, self.size, _BASE)
            if ids is None:
                raise ConversionError(
                    f"{key} is computed from several weights of the {self.adapter.name} "
                    f"layer, so that its gradient does not tell theirs",
                    path=where,
                    remedy="Map the model to a framework that keeps these weights apart",
                )
            fields[key] = ids, shift
        return fields


def _number(digits: list[tuple[int, Any]], base: int) -> Any:
    """The numbers with those digits, each with its scale; None if one is no digit."""
    if any(((d != np.rint(d)) | (d < 0) | (d >= base)).any() for _, d in digits):
        return None
    return sum(scale * digit.astype(np.int64) for scale, digit in digits)


def _as_floats(*arrays: Any) -> list[Any]:
    return [np.asarray(magnitude(array), np.float64) for array in arrays]


def _parts(spec: specs.Spec, seen: set[int]) -> list[specs.Spec]:
    """The layers of nested stacks in order, one used twice only once."""
    if id(spec) in seen:
        return []
    seen.add(id(spec))
    if isinstance(spec, specs.Sequential):
        return [part for layer in spec.layers for part in _parts(layer, seen)]
    return [spec]


def _kind(spec: specs.Spec) -> str:
    return "registered layer" if isinstance(spec, specs.Deferred) else type(spec).__name__


def arrays_of(spec: specs.Spec) -> dict[str, Any]:
    """The arrays that a spec holds, by the names of its fields."""
    if isinstance(spec, specs.Deferred):
        return dict(spec.parameters())
    if not dataclasses.is_dataclass(spec):
        return {}
    spec = spec.joined()
    if isinstance(spec, specs.Sequential):
        held = {f"layers[{i}]": arrays_of(layer) for i, layer in enumerate(spec.layers)}
        return {
            f"{i}.{key}": array for i, arrays in held.items() for key, array in arrays.items()
        }
    inner, found = spec.inner(), dict[str, Any]()
    for option in dataclasses.fields(spec):
        if option.name in inner:
            held = arrays_of(inner[option.name])
            found |= {f"{option.name}.{key}": array for key, array in held.items()}
            continue
        for path, leaf in leaves(getattr(spec, option.name)).items():
            if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
                found[name((option.name, *path))] = leaf
    return found


def _match(first: _Numbered, second: _Numbered) -> tuple[dict[Path, Any], dict[Path, Any]]:
    """For each parameter of the second model its elements' numbers in the first, and the rest.

    Raises:
        ConversionError: they do not correspond.
    """
    _check_layers(first, second)
    ids, shifts = np.full(second.size, -1), np.zeros(second.size)
    for (_, _, a), (_, _, b) in zip(first.layers, second.layers, strict=True):
        for key, (ids_b, shift_b) in b.items():
            ids_a, shift_a = a[key]
            ids[ids_b.ravel()] = ids_a.ravel()
            shifts[ids_b.ravel()] = shift_a.ravel() - shift_b.ravel()
    used = first.frozen.copy()
    used[ids[ids >= 0]] = True
    missing = [name(path) for path, part in second.ids.items() if (ids[part] < 0).any()]
    unused = [name(path) for path, part in first.ids.items() if not used[part].all()]
    if missing or unused:
        raise ConversionError(
            f"parameters of {second.adapter.name} without a counterpart in "
            f"{first.adapter.name}, or the other way round",
            missing=missing,
            unexpected=unused,
        )
    return _unflat(ids, second.shapes), _unflat(shifts, second.shapes)


_PAIR = "Pass what the first was converted to, or a model of the same layers and sizes"


def _check_layers(first: _Numbered, second: _Numbered) -> None:
    def facts(layer: tuple[str, str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
        return layer[1], {key: ids.shape for key, (ids, _) in sorted(layer[2].items())}

    a, b = list(map(facts, first.layers)), list(map(facts, second.layers))
    if len(a) != len(b):
        raise ConversionError(
            f"the models do not correspond: {first.adapter.name} has {len(a)} layers with "
            f"parameters ({', '.join(kind for kind, _ in a)}), {second.adapter.name} {len(b)} "
            f"({', '.join(kind for kind, _ in b)})",
            path="model",
            remedy=_PAIR,
        )
    i = next((i for i in range(len(a)) if not _is_alike(a[i], b[i])), None)
    if i is None:
        return
    here, there = ", ".join(map(str, a[i])), ", ".join(map(str, b[i]))
    raise ConversionError(
        f"the models do not correspond: {here} in {first.adapter.name}, {there} at "
        f"{second.layers[i][0]} in {second.adapter.name}",
        path=first.layers[i][0],
        remedy=_PAIR,
    )


def _is_alike(a: tuple[str, dict[str, Any]], b: tuple[str, dict[str, Any]]) -> bool:
    """Whether two layers are of one kind and sizes; an array of several axes may be one row."""
    (kind, shapes), (other, others) = a, b
    return (kind, shapes.keys()) == (other, others.keys()) and all(
        shape == others[key]
        or (1 in (len(shape), len(others[key])) and math.prod(shape) == math.prod(others[key]))
        for key, shape in shapes.items()
    )


def _shapes(container: Any) -> Shapes:
    return {path: tuple(leaf.shape) for path, leaf in arrays(container).items()}


def _tree(container: Any) -> Any:
    # None and what else is empty is a part of the structure; an array with a unit is a leaf
    structure = jax.tree.structure(container, is_leaf=is_quantity)
    return structure, {p: jax.tree.structure(leaf) for p, leaf in arrays(container).items()}


def _placed(value: Any, leaf: Any) -> Any:
    """A value for the place of a leaf of that structure: a plain array gets the leaf's unit."""
    is_plain = hasattr(value, "dtype") and not is_quantity(value)
    return jax.tree.unflatten(leaf, [value]) if is_plain else value


def _flat(parts: dict[Path, Any]) -> Any:
    return np.concatenate([part.ravel() for part in parts.values()])


def _unflat(flat: Any, shapes: Shapes) -> dict[Path, Any]:
    return {path: flat[ids] for path, ids in rearrangement.number(shapes).items()}


def _listed(shapes: Shapes) -> str:
    return ", ".join(f"{name(path)} {shape}" for path, shape in shapes.items())


def _change(facts: dict[str, Any]) -> Rearrangement:
    def piece(given: dict[str, Any]) -> Piece:
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in given.items()
        }
        return Piece(**values)

    pieces = tuple(map(piece, facts["pieces"]))
    return Rearrangement(tuple(facts["target"]), tuple(facts["shape"]), pieces)
