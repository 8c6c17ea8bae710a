"""Functions, and layers that are little more."""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Self, cast

import jax
import jax.numpy as jnp

from .. import formulas
from ..formulas import ACTIVATIONS, activation_defaults
from .base import (
    Array,
    DType,
    Run,
    Shape,
    Spec,
    mismatches_of,
    move_channels,
    moved_axis,
    shape_of,
)

__all__ = [
    "Activation",
    "Flatten",
    "Formula",
    "Function",
    "PReLU",
    "SpikeBitwise",
    "Unflatten",
    "known_function",
]


@dataclass(frozen=True, eq=False, kw_only=True)
class Activation(Spec):
    """A weight-less function of :data:`interop.formulas.ACTIVATIONS`, by name.

    ``options`` holds those that differ from the function's defaults. An ``axis`` counts in
    the batched input.

    Example:
        >>> import jax
        >>> from interop import specs
        >>> specs.known_function(jax.nn.relu)
        Activation(name='relu', options={})
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    keeps_shape = True

    @property
    def space(self) -> int | None:
        return None

    @property
    def axis(self) -> int | None:
        """The one axis that the function is not elementwise along, or None."""
        return self.options.get("axis", activation_defaults(self.name).get("axis"))

    @property
    def counts_axes(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.axis is not None

    @property
    def is_elementwise(self) -> bool:
        return self.axis is None

    def moved(self, axes: int | None, to_first: bool) -> Spec:
        if not axes or self.axis is None or self.axis in (0, -axes - 1):
            return self
        axis = self.axis - (axes + 1 if self.axis > 0 else 0)
        moved = {"axis": moved_axis(axis, axes, to_first)}
        plain = moved["axis"] == activation_defaults(self.name)["axis"]
        rest = {name: value for name, value in self.options.items() if name != "axis"}
        return replace(self, options=rest if plain else rest | moved)

    def output_shape(self, shape: Shape | None) -> Shape | None:
        if shape is None or self.name != "glu":
            return shape
        return shape_of(partial(ACTIVATIONS["glu"], **self.options), shape)


_FORMULAS: dict[Callable[..., Any], type[Formula]] = {}


class Formula(Spec):
    """A function of one array whose keywords are the spec's fields.

    Where a framework has no such layer, :attr:`function` stands in its place.
    """

    formula: ClassVar[Callable[..., Any]]
    """The function, a ``staticmethod``."""
    axes: ClassVar[tuple[str, ...]] = ()
    """Fields that are axes of the batched input."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "formula" in vars(cls):
            _FORMULAS[cls.formula] = cls

    @property
    def function(self) -> Callable[..., Any]:
        """The formula for a batch, with those options that differ from its defaults."""
        changed: dict[str, Any] = {}
        for name in _fields(type(self)):
            value = getattr(self, name)
            default = inspect.signature(self.formula).parameters[name].default
            if value is not default and value != default:
                changed[name] = value
        return partial(self.formula, **changed) if changed else self.formula

    def apply(self, run: Run, x: Any) -> Any:
        return self.function(x)

    @property
    def space(self) -> int | None:
        return None

    def output_shape(self, shape: Shape | None) -> Shape | None:
        return None if shape is None else shape_of(self.function, shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class Flatten(Formula):
    """:func:`interop.formulas.flatten` of the batched input.

    Example:
        >>> import jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.Flatten(start_axis=1)
        >>> spec.apply(specs.Run(), jnp.ones((5, 2, 3))).shape
        (5, 6)
    """

    start_axis: int = 0
    end_axis: int = -1
    in_size: Shape | None = None
    formula: ClassVar[Callable[..., Any]] = staticmethod(formulas.flatten)

    @property
    def axes(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return () if self.in_size is not None else ("start_axis", "end_axis")

    def example_axes(self, axes: int) -> tuple[int, int]:
        """The first and last merged axis within examples of so many axes."""
        batch = 0 if self.in_size is not None else 1
        start, end = self.start_axis, self.end_axis
        return (
            start - batch if start >= 0 else start + axes,
            end - batch if end >= 0 else end + axes,
        )

    def moved(self, axes: int | None, to_first: bool) -> Spec:
        if self.in_size is None or not axes:
            return self
        return replace(self, in_size=move_channels(self.in_size, to_first))


@dataclass(frozen=True, eq=False, kw_only=True)
class Unflatten(Formula):
    """:func:`interop.formulas.unflatten` of the batched input.

    Example:
        >>> import jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.Unflatten(axis=-1, sizes=(2, 3))
        >>> spec.apply(specs.Run(), jnp.ones((5, 6))).shape
        (5, 2, 3)
    """

    axis: int
    sizes: tuple[int, ...]
    formula: ClassVar[Callable[..., Any]] = staticmethod(formulas.unflatten)
    axes: ClassVar[tuple[str, ...]] = ("axis",)


@dataclass(frozen=True, eq=False, kw_only=True)
class SpikeBitwise(Spec):
    """:func:`interop.formulas.spike_bitwise` of two inputs.

    Example:
        >>> import jax.numpy as jnp
        >>> from interop import specs
        >>> spec, bits = specs.SpikeBitwise(op="and"), jnp.array([True, False])
        >>> spec.apply(specs.Run(), bits, jnp.array([True, True])).tolist()
        [True, False]
    """

    op: str
    keeps_shape = True
    takes_examples = True

    def apply(self, run: Run, x: Any, y: Any) -> Any:
        return formulas.spike_bitwise(x, y, self.op)

    @classmethod
    def shaped(cls, op: str) -> Self:
        return cls(op=op)

    @property
    def space(self) -> int | None:
        return None

    @property
    def is_elementwise(self) -> bool:
        return True


@dataclass(frozen=True, eq=False, kw_only=True)
class PReLU(Spec):
    """``x`` where it is not negative, else ``slope * x``.

    Shapes:
        x      (*batch, *example)
        slope  any that broadcasts with an example's: (), or (channels,)

    ``dtype`` is what both are cast to, None their common dtype; or, with ``keeps_dtype``, that
    of ``x``.

    He et al., "Delving Deep into Rectifiers", ICCV 2015.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.PReLU.shaped().initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.ones((5, 3))).shape
        (5, 3)
    """

    slope: Array
    dtype: DType | None = None
    keeps_dtype: bool = False

    trained: ClassVar[tuple[str, ...]] = ("slope",)
    keeps_shape = True

    def apply(self, run: Run, x: Any) -> Any:
        return formulas.prelu(x, self.slope, dtype=self.dtype, keeps_dtype=self.keeps_dtype)

    @classmethod
    def shaped(
        cls,
        shape: int | Shape = (),
        *,
        dtype: DType | None = None,
        keeps_dtype: bool = False,
        param_dtype: DType = jnp.float32,
    ) -> Self:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        slope = jax.ShapeDtypeStruct(shape, param_dtype)
        return cls(slope=slope, dtype=dtype, keeps_dtype=keeps_dtype)

    def initial(self, key: jax.Array) -> Self:
        if not isinstance(self.slope, jax.ShapeDtypeStruct):
            return self
        return replace(self, slope=jnp.full(self.slope.shape, 0.25, self.slope.dtype))

    @property
    def space(self) -> int | None:
        return None

    @property
    def holds_state(self) -> bool:
        return True

    @property
    def is_elementwise(self) -> bool:
        return self.slope.size == 1

    @property
    def counts_axes(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.slope.size > 1

    def mixes_examples(self, axes: int | None = None) -> bool:
        return axes is not None and self.slope.ndim > axes

    def mismatches(self) -> list[str]:
        return mismatches_of(slope=(self.slope, None))

    def moved(self, axes: int | None, to_first: bool) -> Spec:
        if not axes or self.slope.size == 1 or self.slope.ndim > axes:
            return self
        slope = self.slope.reshape((1,) * (axes - self.slope.ndim) + self.slope.shape)
        slope = jnp.moveaxis(slope, *((-1, 0) if to_first else (0, -1)))
        shape = slope.shape
        while shape[0] == 1:  # as frameworks hold the slopes of channels
            shape = shape[1:]
        return replace(self, slope=slope.reshape(shape))


@dataclass(frozen=True, eq=False, kw_only=True)
class Function(Spec):
    """Any other callable, without weights of its own.

    ``per_example`` says what it expects: one example, or a batch of them.

    Example:
        >>> import jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.Function(fn=jnp.sin, per_example=False)
        >>> spec.function(jnp.zeros(2)).tolist()
        [0.0, 0.0]
    """

    fn: Callable[..., Any]
    per_example: bool

    @property
    def function(self) -> Callable[..., Any]:
        """``fn``, by the name that formulas have it under."""
        return self.fn

    @property
    def space(self) -> int | None:
        return None

    def output_shape(self, shape: Shape | None) -> Shape | None:
        if shape is None:
            return None
        return shape_of(jax.vmap(self.fn) if self.per_example else self.fn, shape)


def known_function(fn: Callable[..., Any]) -> Activation | Formula | None:
    """``fn`` as an activation or another formula, if that is all it is."""
    options: dict[str, Any] = {}
    if isinstance(fn, functools.partial):
        partial = cast("functools.partial[Any]", fn)
        if partial.args:
            return None
        fn, options = partial.func, dict(partial.keywords)
    name = formulas.activation_name(fn)
    if name is None:
        return _formula(fn, options)
    if not all(isinstance(v, int | float) for v in options.values()):
        return None
    defaults = formulas.activation_defaults(name)
    changed = {k: v for k, v in options.items() if k not in defaults or v != defaults[k]}
    return Activation(name=name, options=changed)


def _formula(fn: Callable[..., Any], options: dict[str, Any]) -> Formula | None:
    cls = _FORMULAS.get(fn) if isinstance(fn, types.FunctionType) else None
    try:
        return None if cls is None else cls(**options)
    except TypeError:  # an option is missing, and to be given at each call
        return None


@functools.cache
def _fields(spec_type: type[Spec]) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(spec_type))
