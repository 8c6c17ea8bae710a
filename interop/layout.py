"""Where examples have their channels: some frameworks take them first, the others last.

Specs describe spatial layers with their channels last. Where source and target disagree, the
data between two spatial layers have another order of axes in the target, so that every layer
that counts axes, or mixes them, is moved with them: :func:`cross` follows the data along the
stack, and knows at each layer how many axes an example has and whether its channels moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import jax.numpy as jnp
import numpy as np

from . import formulas, specs
from .errors import (
    ArgumentError,
    ConversionError,
    MissingShapeError,
    UnsupportedLayerError,
    UnsupportedStructureError,
)
from .spreading import spread

if TYPE_CHECKING:
    from .registry import Adapter

__all__ = ["Crossed", "Flow", "Place", "cross", "crossed", "leaves_of", "several_axes"]

Origins = dict[int, tuple[str, type]]
Change = Callable[[specs.Spec], specs.Spec]


@dataclass(frozen=True)
class Place:
    """How an example of the source, between two layers or at an end, lies in the target.

    Attributes:
        is_moved: whether its channels are moved.
        order: for each of its elements there the number of the same one here, where a
            flattened example has them in another order.
    """

    is_moved: bool = False
    order: tuple[int, ...] = ()

    def there(self, batch: Any, *, to_first: bool) -> Any:
        """A batch of the source as the target has it."""
        if self.order:
            return batch[..., np.asarray(self.order)]
        return _moved_batch(batch, to_first) if self.is_moved else batch

    def here(self, batch: Any, *, to_first: bool) -> Any:
        """A batch of the target as the source has it; ``to_first`` as in :meth:`there`."""
        if self.order:
            return batch[..., np.argsort(self.order)]
        return _moved_batch(batch, not to_first) if self.is_moved else batch


def _moved_batch(batch: Any, to_first: bool) -> Any:
    return jnp.moveaxis(batch, -1, 1) if to_first else jnp.moveaxis(batch, 1, -1)


@dataclass(frozen=True)
class Crossed:
    """What :func:`cross` makes of a model.

    Attributes:
        spec: the model for the target's order of axes.
        sample: the shape of one example there, or None.
        places: how the data lie there before each layer, and after the last one.
        given: the shape of one example as the source takes it, or None.
        channels_first: whether the source takes the channels of an example first.
        origins: for each layer that was changed, by its ``id``: what it was, and the change.
    """

    spec: specs.Spec
    sample: specs.Shape | None
    places: tuple[Place, ...]
    given: specs.Shape | None
    channels_first: bool
    origins: dict[int, tuple[specs.Spec, Change]] = field(default_factory=dict[int, Any])


class Flow:
    """The shape of one example along a stack, worked out when it is asked for."""

    def __init__(self, shape: specs.Shape | None, channels_first: bool, origins: Origins):
        self._shape, self._channels_first, self._origins = shape, channels_first, origins
        self._passed: list[specs.Spec] = []

    def passed(self, spec: specs.Spec) -> None:
        """Take it that ``spec`` was applied."""
        self._passed.append(spec)

    @property
    def shape(self) -> specs.Shape | None:
        """Shape of one example here, or None where it is not known.

        Raises:
            ConversionError: a function before this place fails on its input's shape.
        """
        while self._passed:
            spec = self._passed.pop(0)
            try:
                self._shape = self._after(spec)
            except Exception as e:
                raise ConversionError(
                    f"the function fails on an example of shape {self._shape} ({e})",
                    path=self._origins.get(id(spec), ("model", object))[0],
                    remedy="Pass sample_input=, one example without its batch axis",
                ) from e
        return self._shape

    def _after(self, spec: specs.Spec) -> specs.Shape | None:
        if not (self._channels_first and spec.space):
            return spec.output_shape(self._shape)
        shape = self._shape
        out = spec.output_shape(shape and specs.move_channels(shape, to_first=False))
        return out and specs.move_channels(out, to_first=True)


def cross(
    root: specs.Spec,
    origins: Origins,
    shape: specs.Shape | None,
    *,
    to_first: bool,
    target: str,
) -> Crossed:
    """The model for examples whose channels are moved.

    Args:
        root: the model; its Conv and other spatial specs have their channels last anyway.
        origins: where each spec came from; the new ones are added.
        shape: shape of one example as the source takes it, or None.
        to_first: whether the target has the channels first, and the source last.
        target: the target's name, for errors.

    Returns:
        The same model for the target's order of axes.

    Raises:
        MissingShapeError: what is moved depends on the shape, and it is not known.
        UnsupportedLayerError: a layer cannot be moved exactly.
        UnsupportedStructureError: a layer used twice would become two.
    """
    crossing = _Crossing(list(leaves_of(root)), origins, shape, to_first, target)
    sample = crossing.sample()
    places, moved = [crossing.place], list[specs.Spec]()
    for i in range(len(crossing.leaves)):
        moved.append(crossing.pass_through(i))
        places.append(crossing.place)
    spec = crossing.rebuild(root, iter(moved))
    return Crossed(spec, sample, tuple(places), shape, not to_first, crossing.changes)


def crossed(
    root: specs.Spec,
    origins: Origins,
    shape: specs.Shape | None,
    source: Adapter,
    target: Adapter,
) -> Crossed:
    """:func:`cross`, where the frameworks differ in their order of axes; else ``root``.

    In both cases after :func:`interop.spreading.spread`.
    """
    root = spread(root, origins, source, target)
    if source.channels_first == target.channels_first:
        places = (Place(),) * (len(list(leaves_of(root))) + 1)
        return Crossed(root, shape, places, shape, source.channels_first)
    first, name = target.channels_first, target.name
    return cross(root, origins, shape, to_first=first, target=name)


def several_axes(root: specs.Spec) -> bool:
    """Whether some layer tells that examples have more axes than one, if not how many."""
    return any(leaf.least_axes > 1 for leaf in leaves_of(root))


def leaves_of(spec: specs.Spec) -> Iterator[specs.Spec]:
    """The layers of nested stacks, in order."""
    if isinstance(spec, specs.Sequential):
        for layer in spec.layers:
            yield from leaves_of(layer)
    else:
        yield spec


class _Crossing:
    """One walk along the layers.

    Attributes:
        axes: how many axes an example has here, the channels among them having moved; 0 where
            nothing moves; None where the number is not known.
    """

    def __init__(
        self,
        leaves: list[specs.Spec],
        origins: Origins,
        shape: specs.Shape | None,
        to_first: bool,
        target: str,
    ):
        self.leaves, self._flow = leaves, Flow(shape, not to_first, origins)
        self._origins, self._to_first, self._target = origins, to_first, target
        self._made: dict[tuple[Any, ...], specs.Spec] = {}
        self._moved: dict[int, specs.Spec] = {}
        self._rows: dict[int, tuple[int, ...]] = {}
        self._order: tuple[int, ...] = ()
        self._is_fixed = any(leaf.fixes_order for leaf in leaves)
        self.changes: dict[int, tuple[specs.Spec, Change]] = {}
        self.axes = self._axes_of_input()

    @property
    def shape(self) -> specs.Shape | None:
        """Shape of one example here, as the source takes it, or None."""
        return self._flow.shape

    @property
    def place(self) -> Place:
        """How the data lie here in the target."""
        return Place(bool(self.axes), self._order)

    def sample(self) -> specs.Shape | None:
        """The shape of an example of the whole model, as the target takes it."""
        if not self.axes or self.shape is None:
            return self.shape
        if len(self.shape) != self.axes:
            raise ArgumentError(
                f"sample_input must have {self.axes} axes, got {self.shape}",
                path=self._origin(self.leaves[0])[0],
                remedy="Pass one example as the model takes it, without its batch axis",
            )
        return specs.move_channels(self.shape, to_first=self._to_first)

    def pass_through(self, i: int) -> specs.Spec:
        """Layer ``i`` for its moved input; goes on to its output."""
        leaf = self.leaves[i]
        if isinstance(leaf, specs.Flatten) and self.axes != 0:
            moved = self._flatten(i, leaf)
        elif isinstance(leaf, specs.Function | specs.Unflatten):
            moved = self._function(i, leaf, leaf.function)
        else:
            moved = self._layer(i, leaf)
        self._check_tie(leaf, moved)
        self._origins.setdefault(id(moved), self._origin(leaf))
        self._flow.passed(leaf)
        return moved

    def rebuild(self, spec: specs.Spec, moved: Iterator[specs.Spec]) -> specs.Spec:
        """``spec`` with its layers replaced, in order."""
        if not isinstance(spec, specs.Sequential):
            return next(moved)
        layers = tuple(self.rebuild(layer, moved) for layer in spec.layers)
        key = tuple(map(id, layers))
        made = self._once(spec, key, lambda _: specs.Sequential(layers=layers))
        self._origins.setdefault(id(made), self._origin(spec))
        return made

    # -- one layer ----------------------------------------------------------------------

    def _layer(self, i: int, leaf: specs.Spec) -> specs.Spec:
        if leaf.space is not None and self.axes is not None:
            wanted = leaf.space + 1 if leaf.space else 0
            if self.axes != wanted:
                self._refuse(
                    leaf,
                    "its input",
                    self.shape or f"of {self.axes} axes",
                    f"channels stand elsewhere in {self._target}, and this layer does not "
                    f"take examples of so many axes there",
                )
        if leaf.has_channels and self._is_fixed and self.axes == 0:
            self._refuse(
                leaf,
                "its input",
                self.shape or "of unknown shape",
                f"another layer fixes the order of axes, and channels stand elsewhere in "
                f"{self._target}",
            )
        if i in self._rows:
            rows, self._order = self._rows[i], ()
            return self._once(leaf, rows, lambda leaf: leaf.with_rows(np.asarray(rows)))
        if self.axes is None and leaf.counts_axes:
            self._require_shape(leaf)
        axes = self.axes
        if isinstance(leaf, specs.LayerNorm) and leaf.feature_shape is None and axes:
            shape = self._require_shape(leaf)  # which tells the axes that are one row
            return self._once(
                leaf, axes, lambda leaf: leaf.sized(shape).moved(axes, self._to_first)
            )
        return self._once(leaf, axes, lambda leaf: leaf.moved(axes, self._to_first))

    def _flatten(self, i: int, leaf: specs.Flatten) -> specs.Spec:
        axes = self.axes or len(self._require_shape(leaf))
        if leaf.example_axes(axes) == (0, axes - 1) and (j := self._linear_after(i)):
            order = np.arange(np.prod(self._require_shape(leaf))).reshape(self.shape or ())
            order = np.moveaxis(order, *((-1, 0) if self._to_first else (0, -1)))
            self._rows[j] = self._order = tuple(order.ravel().tolist())
            self.axes = 0
            return self._once(leaf, axes, lambda leaf: leaf.moved(axes, self._to_first))
        if leaf.example_axes(axes) == (0, axes - 1):
            self.axes = 0
            return self._function_between(leaf, leaf.function, False, axes, 0)
        return self._function(i, leaf, leaf.function)

    def _linear_after(self, i: int) -> int | None:
        """The Linear that takes the elements of output ``i`` as they come, if there is one."""
        for j in range(i + 1, len(self.leaves)):
            leaf = self.leaves[j]
            if leaf.takes_rows:
                return j
            if not leaf.is_elementwise:
                return None
        return None

    def _function(self, i: int, leaf: specs.Function | specs.Formula, fn: Any) -> specs.Spec:
        ahead = self._ahead(i + 1)
        channels = ahead is None and self._channels_ahead(i + 1)
        if self.axes == 0 and not ahead and not channels:
            return leaf
        shape = self._require_shape(leaf)
        before = len(shape) if self.axes is None else self.axes
        out = leaf.output_shape(shape)
        rank = -1 if out is None else len(out)
        if rank in (0, 1) or (ahead == 0 and rank > 1 and rank != before):
            after = 0
        elif rank > 1 and (rank == before or rank - 1 == ahead or channels):
            after = rank
        else:
            self._refuse(
                leaf,
                "its output",
                out,
                f"channels stand elsewhere in {self._target}, and nothing tells where this "
                f"output has them",
            )
        self.axes = after
        per_example = isinstance(leaf, specs.Function) and leaf.per_example
        return self._function_between(leaf, fn, per_example, before, after)

    def _function_between(
        self, leaf: specs.Spec, fn: Any, per_example: bool, before: int, after: int
    ) -> specs.Spec:
        first, last = (0 if per_example else 1), -1
        here, there = (last, first) if self._to_first else (first, last)
        enter, leave = (there, here) if before else None, (here, there) if after else None
        if isinstance(fn, formulas.Moved) and (fn.enter, fn.leave) == (
            enter and enter[::-1],
            leave and leave[::-1],
        ):
            moved = fn.fn  # it was moved for the other order, and is moved back
        else:
            moved = formulas.Moved(fn, enter, leave)
        known = None if per_example else specs.known_function(moved)
        return self._once(
            leaf,
            (before, after),
            lambda _: known or specs.Function(fn=moved, per_example=per_example),
        )

    # -- what is ahead ------------------------------------------------------------------

    def _axes_of_input(self) -> int | None:
        ahead = self._ahead(0)
        if ahead is not None:
            return ahead + 1 if ahead else 0
        for i, leaf in enumerate(self.leaves):
            if leaf.has_channels:
                rank = None if self.shape is None else len(self.shape)
                return 0 if rank in (0, 1) else rank
            if isinstance(leaf, specs.Flatten):
                return 0
            if isinstance(leaf, specs.Function):
                return self._axes_before(leaf, self.leaves[i + 1 :])
        return 0

    def _axes_before(self, leaf: specs.Spec, rest: list[specs.Spec]) -> int:
        """The axes of a function's input, by the next layer that tells where channels are."""
        for i, later in enumerate(rest):
            if later.space is not None:
                moves = later.space and len(self._require_shape(leaf)) == later.space + 1
                return later.space + 1 if moves else 0
            if later.has_channels:
                rank, here = len(self._require_shape(leaf)), self.shape
                for passed in (leaf, *rest[:i]):
                    here = passed.output_shape(here)
                return 0 if rank == 1 or (here is not None and len(here) == 1) else rank
        return 0

    def _ahead(self, i: int) -> int | None:
        """Axes of space that the data from layer ``i`` on must have, 0 for none, if known."""
        for leaf in self.leaves[i:]:
            if leaf.space is not None:
                return leaf.space
            if not leaf.keeps_shape:
                return None
        return None

    def _channels_ahead(self, i: int) -> bool:
        """Whether a layer that has channels takes the data from layer ``i`` on as they are."""
        for leaf in self.leaves[i:]:
            if leaf.has_channels or not leaf.keeps_shape:
                return leaf.has_channels
        return False

    # -- errors and ties ----------------------------------------------------------------

    def _once(self, leaf: specs.Spec, key: Any, change: Change) -> specs.Spec:
        """The new spec for ``leaf`` in one situation: the same one each time."""
        if (id(leaf), key) not in self._made:
            made = self._made[id(leaf), key] = change(leaf)
            self.changes[id(made)] = leaf, change
        return self._made[id(leaf), key]

    def _check_tie(self, leaf: specs.Spec, moved: specs.Spec) -> None:
        if leaf.holds_state and self._moved.setdefault(id(leaf), moved) is not moved:
            path, found = self._origin(leaf)
            raise UnsupportedStructureError(
                f"{found.__qualname__} is used at two places, which need two orders of its "
                f"weights in {self._target}",
                path=path,
                remedy="Give each place its own layer, or wrap the model live with shims.wrap",
            )

    def _origin(self, spec: specs.Spec) -> tuple[str, type]:
        return self._origins.get(id(spec), ("model", type(spec)))

    def _require_shape(self, leaf: specs.Spec) -> specs.Shape:
        if self.shape is None:
            path, found = self._origin(leaf)
            raise MissingShapeError(
                found.__qualname__,
                path=path,
                target=self._target,
                reason=f"channels stand elsewhere in {self._target}, and how this is rebuilt "
                f"depends on the shape of its input",
            )
        return self.shape

    def _refuse(self, leaf: specs.Spec, option: str, value: Any, reason: str) -> NoReturn:
        path, found = self._origin(leaf)
        raise UnsupportedLayerError(
            found,
            f"{option} {value}: {reason}",
            path=path,
            target=self._target,
            option=option,
            value=value,
            remedy="Convert the parts before and after it one by one",
        )
