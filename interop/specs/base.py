"""What every spec is, and the arithmetic of shapes and dtypes that specs share."""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ..errors import ArgumentError
from ..parameters import is_quantity

if TYPE_CHECKING:
    from ..walk import Building

__all__ = [
    "Array",
    "DType",
    "Deferred",
    "Run",
    "Sequential",
    "Shape",
    "Spec",
    "common_dtype",
    "options",
    "dtype",
    "fields",
    "is_split",
    "is_wide",
    "mismatches_of",
    "move_channels",
    "moved_axis",
    "plain_dtype",
    "promoted_dtype",
    "rows",
    "shape_of",
    "spec_of",
]

Array = Any  # jax.Array or numpy.ndarray: a spec holds what the source held
DType = Any
Shape = tuple[int, ...]


class Run:
    """What a host gives a formula: the mode, random keys, and a place for new values.

    Args:
        train: whether the layer trains; its formula then may draw keys and move its buffers.
        key: returns a fresh key at each call, or raises if the host has none.
        axis_name: the axis that the host maps examples over, where a formula sees one example.
    """

    train: bool
    axis_name: str | None

    def __init__(
        self,
        train: bool = False,
        key: Callable[[], jax.Array] | None = None,
        axis_name: str | None = None,
    ):
        self.train, self.axis_name = train, axis_name
        self.updates: dict[int, dict[str, Any]] = {}
        self._key = key

    @property
    def has_key(self) -> bool:
        """Whether the host gives keys."""
        return self._key is not None

    def key(self) -> jax.Array:
        """A fresh random key.

        Raises:
            ArgumentError: the host gave none.
        """
        if self._key is None:
            raise ArgumentError(
                "this layer draws random numbers, and has no key",
                remedy="Pass a key as layers of this framework take it, or evaluate the model",
            )
        return self._key()

    def update(self, spec: Spec, **buffers: Any) -> None:
        """Give buffers of ``spec`` new values, by the names of its fields."""
        self.updates.setdefault(id(spec), {}).update(buffers)


@dataclass(frozen=True, eq=False, kw_only=True)
class Spec:
    """Base of all specs. Specs compare by identity: one spec twice is one layer used twice.

    A spec that defines :meth:`apply` can be built as a composite wherever the target has no
    native layer with all its options: a module of the target that holds the spec's arrays and
    computes its formula.

    Example:
        >>> import dataclasses, jax.numpy as jnp
        >>> from interop import specs
        >>> @dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
        ... class Scale(specs.Spec):
        ...     factor: specs.Array
        ...     trained = ("factor",)
        ...     def apply(self, run, x):
        ...         return self.factor * x
        >>> Scale(factor=jnp.array(3.0)).apply(specs.Run(), jnp.ones(2)).tolist()
        [3.0, 3.0]
    """

    trained: ClassVar[tuple[str, ...]] = ()
    """Fields that hold trainable arrays, or None."""
    buffers: ClassVar[tuple[str, ...]] = ()
    """Fields that hold arrays which only the layer itself changes, or None."""
    children: ClassVar[tuple[str, ...]] = ()
    """Fields that hold another spec, or None."""
    random: ClassVar[bool] = False
    """Whether training draws random numbers."""
    least_axes: ClassVar[int] = 1
    """How many axes an example has at least."""
    takes_examples: ClassVar[bool] = False
    """Whether the formula takes one example without a batch axis as well."""
    keeps_shape: ClassVar[bool] = False
    """Whether the output has the shape of the input, and each axis its meaning."""
    has_channels: ClassVar[bool] = False
    """Whether one axis has another meaning than the rest, however many there are."""
    takes_integers: ClassVar[bool] = False
    """Whether its inputs are indices."""
    counts_axes: ClassVar[bool] = False
    """Whether the result depends on the order of the axes, and ``moved`` changes that."""
    functions: ClassVar[Mapping[str, int]] = {}
    """Fields, of some of its classes, that hold functions of data; of how many arrays."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls.__repr__ = Spec.__repr__  # which dataclasses then leave alone

    def __repr__(self) -> str:
        """Arrays by dtype and shape, and the options that are not plain."""
        shown = [
            f"{field.name}={_described(value)}"
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not field.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def fixes_order(self) -> bool:
        """Whether its axes are in one order, wherever a framework has its channels."""
        return False

    @property
    def space(self) -> int | None:
        """Axes that an example has beside that of its channels; None where any will do."""
        return 0

    @property
    def in_features(self) -> int | None:
        """The features, or channels, that an example must have; None where any will do."""
        return None

    @property
    def example_shape(self) -> Shape | None:
        """The shape of an example that the layer takes; None where nothing tells it."""
        return None if self.space != 0 or self.in_features is None else (self.in_features,)

    @property
    def input_unit(self) -> Any:
        """The physical unit that its arrays want its input to have; None where they don't."""
        return None

    @property
    def holds_state(self) -> bool:
        """Whether using the layer at two places ties something."""
        return False

    def mixes_examples(self, axes: int | None = None) -> bool:
        """Whether an example's output depends on the rest of its batch, or its place there.

        Args:
            axes: number of axes of an example; None where not known.
        """
        return False

    @property
    def has_modes(self) -> bool:
        """Whether training differs from evaluation."""
        return bool(self.random or self.buffers)

    @property
    def writes_parameters(self) -> bool:
        """Whether a call gives its trainable arrays new values."""
        return False

    @property
    def of_batch(self) -> str | None:
        """The option by which it keeps something of each example of one batch, if it does."""
        return None

    @property
    def edge(self) -> str | None:
        """What the formula does at the edge of its inputs, where frameworks differ."""
        return None

    @property
    def takes_rows(self) -> bool:
        """Whether :meth:`with_rows` gives the layer for another order of its inputs."""
        return False

    @property
    def is_elementwise(self) -> bool:
        """Whether it does the same to each element, wherever that stands."""
        return False

    def moved(self, axes: int | None, to_first: bool) -> Spec:
        """The same layer for examples of so many axes whose channels are moved.

        Args:
            axes: number of axes of an example; 0 where nothing moves, None where not known.
            to_first: whether the last axis is moved to the front, or the first to the end.
        """
        return self

    def with_rows(self, order: np.ndarray[Any, Any]) -> Spec:
        """The same layer for inputs ``x[..., order]``."""
        raise NotImplementedError

    def output_shape(self, shape: Shape | None) -> Shape | None:
        """Shape of one output example for one input example; None where it is not known."""
        return shape

    def mismatches(self) -> list[str]:
        """One line for each array that is none, or does not fit the others."""
        return []

    def inner(self) -> dict[str, Spec]:
        """The specs that this one holds, by the names of their fields."""
        found = {name: getattr(self, name) for name in self.children}
        return {name: part for name, part in found.items() if part is not None}

    def canonical(self) -> Spec:
        """The same layer with its arrays as other layers of its kind hold them."""
        return self

    def units(self) -> dict[str, Any]:
        """The physical units of its arrays that have one, by the names of its fields."""
        found: dict[str, Any] = {}
        for name, value in vars(self).items():
            if _is_unitless(cast(Any, type(value))):
                continue
            for part in jax.tree.leaves(value, is_leaf=is_quantity):
                if is_quantity(part) and not part.is_unitless:
                    found[name] = part.unit
        for name, part in self.inner().items():
            found |= {f"{name}.{key}": unit for key, unit in part.units().items()}
        return found

    def joined(self) -> Self:
        """The same layer with one array in each field, where it keeps parts of some apart."""
        return self

    def sized(self, example: Shape) -> Self:
        """This layer with the sizes that it has for examples of a shape."""
        return self

    def simplest(self) -> Spec:
        """The same layer as one of a simpler kind, as which frameworks may build it."""
        return self

    def apply(self, run: Run, *inputs: Any, **options: Any) -> Any:
        """The layer's formula for a batch; a buffer's new value goes to ``run.update``."""
        raise NotImplementedError

    @property
    def is_composable(self) -> bool:
        """Whether the formula covers this very instance, so that a composite can hold it."""
        return type(self).apply is not Spec.apply

    @classmethod
    def shaped(cls, *sizes: Any, **options: Any) -> Self:
        """The layer of given sizes and options, with a ``ShapeDtypeStruct`` for each array.

        Its signature is that of the composites' constructors.
        """
        raise NotImplementedError

    def initial(self, key: jax.Array) -> Self:
        """This layer with fresh arrays in place of each ``ShapeDtypeStruct``.

        Scales, gains and variances are 1, biases and means 0, the rest as LeCun et al. (1998).
        """
        values: dict[str, Any] = {}
        for i, name in enumerate((*self.trained, *self.buffers, *self.children)):
            values[name] = _initial(name, getattr(self, name), jax.random.fold_in(key, i))
        return replace(self, **values)


class Deferred(Spec):
    """A layer that only its own rule knows how to build, once the target is known."""

    @property
    def space(self) -> int | None:
        return None

    @property
    def holds_state(self) -> bool:
        return True

    def build(self, ctx: Building) -> Any:
        """The layer in the framework of ``ctx``; tells ``ctx.passed`` what it did itself."""
        raise NotImplementedError

    def parameters(self) -> Mapping[str, Array]:
        """Its trainable arrays by name, named alike whatever framework it came from."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, kw_only=True)
class Sequential(Spec):
    """Layers applied one after the other. The same spec twice is one layer used twice.

    Example:
        >>> from interop import specs
        >>> layers = specs.Flatten(start_axis=1), specs.Linear.shaped(6, 4)
        >>> spec = specs.Sequential(layers=layers)
        >>> spec.output_shape((2, 3))
        (4,)
    """

    layers: tuple[Spec, ...]

    @property
    def holds_state(self) -> bool:
        return any(layer.holds_state for layer in self.layers)

    def output_shape(self, shape: Shape | None) -> Shape | None:
        for layer in self.layers:
            shape = layer.output_shape(shape)
        return shape


def _initial(name: str, value: Any, key: jax.Array) -> Any:
    if isinstance(value, Spec):
        return value.initial(key)
    if not isinstance(value, jax.ShapeDtypeStruct):
        return value
    if "scale" in name or "var" in name or "gain" in name:
        return jnp.ones(value.shape, value.dtype)
    if "bias" in name or "mean" in name or len(value.shape) < 2:
        return jnp.zeros(value.shape, value.dtype)
    return jax.nn.initializers.lecun_normal()(key, value.shape, value.dtype)


@functools.cache
def fields(spec_type: type[Spec]) -> tuple[str, ...]:
    """The names of its fields, if it is a dataclass."""
    is_dataclass = dataclasses.is_dataclass(spec_type)
    return tuple(field.name for field in dataclasses.fields(spec_type)) if is_dataclass else ()


@functools.cache
def options(spec_type: type[Spec]) -> Mapping[str, Any]:
    """Its options by name, with their defaults."""
    every = dataclasses.fields(spec_type)
    return {f.name: f.default for f in every if f.default is not dataclasses.MISSING}


@functools.cache
def _is_unitless(cls: type) -> bool:
    """Whether nothing of that class has a unit, or holds what has one."""
    return issubclass(cls, type(None) | bool | int | float | str | np.ndarray | jax.Array)


def _described(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    return getattr(value, "__name__", None) or repr(value)


def move_channels(shape: Shape, to_first: bool) -> Shape:
    """``shape`` with its last axis in front, or its first at the end."""
    return (*shape[-1:], *shape[:-1]) if to_first else (*shape[1:], *shape[:1])


def moved_axis(axis: int, axes: int, to_first: bool) -> int:
    """Where a negative ``axis`` of so many axes is after :func:`move_channels`."""
    return (axis + (1 if to_first else -1)) % axes - axes


def dtype(value: Any) -> DType | None:
    """``value`` in one form, so that dtypes compare; None stays None."""
    return None if value is None else jnp.dtype(value)


def is_wide(dtype: DType | None) -> bool:
    """Whether ``dtype`` is float32 or wider: a cast to it loses nothing that float32 keeps."""
    return dtype is not None and jnp.promote_types(dtype, jnp.float32) == dtype


def common_dtype(*arrays: Array | None) -> DType:
    """The dtype that the given arrays promote to; float32 where there are none."""
    given = [a.dtype for a in arrays if a is not None]
    return jnp.result_type(*given) if given else jnp.dtype(jnp.float32)


def plain_dtype(value: Any, *arrays: Array | None) -> DType | None:
    """``value``, what operands are cast to, or None where they all come to it anyway."""
    widest = jnp.result_type(jnp.float32, jax.dtypes.canonicalize_dtype("float64"))
    is_plain = dtype(value) == common_dtype(*arrays) == widest
    return None if is_plain else dtype(value)


def promoted_dtype(statistics: Array, *parameters: Array | None) -> DType | None:
    """``output_dtype`` of a layer that promotes its input with its statistics as well.

    None where its parameters promote the input as far anyway.
    """
    given = [array for array in parameters if array is not None]
    widest = common_dtype(statistics, *given)
    return None if given and common_dtype(*given) == widest else widest


def rows(array: Array, order: np.ndarray[Any, Any]) -> Array:
    """``array[order]``, split over devices as ``array`` is.

    Raises:
        ArgumentError: ``order``, which the shape of an example tells, is for another size.
    """
    if len(order) != array.shape[0]:
        raise ArgumentError(
            f"an example of that shape has {len(order)} elements at a layer that takes "
            f"{array.shape[0]}",
            path="model",
            remedy="Pass sample_input as the model takes it, without its batch axis",
        )
    if isinstance(array, Tracer) or not is_split(array):
        return array[order]

    def take(whole: Array) -> Array:
        return whole[order]

    compiled: Any = jax.jit(take, out_shardings=array.sharding)
    return compiled(array)


def is_split(array: Array) -> bool:
    """Whether an array may be on several devices: a tracer may."""
    if isinstance(array, Tracer):
        return True
    sharding: Any = array.sharding if isinstance(array, jax.Array) else None
    return sharding is not None and len(sharding.device_set) > 1


def mismatches_of(**arrays: tuple[Array | None, Shape | None]) -> list[str]:
    """Compare arrays with the shapes they must have; None where any will do."""
    lines: list[str] = []
    for name, (array, shape) in arrays.items():
        if array is not None and not hasattr(array, "__array__"):
            lines.append(f"{name} is a {type(array).__qualname__}, not an array")
        elif isinstance(array, jax.Array) and _is_deleted(array):
            lines.append(f"{name} has been deleted, as by donating it to a compiled function")
        elif array is not None and shape not in (None, array.shape):
            lines.append(f"{name} has shape {array.shape}, wanted {shape}")
    return lines


def spec_of(part: Any, wanted: type[Spec]) -> Any:
    """The spec that a composite holds, or ``part`` itself if it is one.

    Raises:
        ArgumentError: it is neither, or none of class ``wanted``.
    """
    spec = part if isinstance(part, Spec) else getattr(part, "spec", None)
    spec = spec() if callable(spec) else spec
    if not isinstance(spec, wanted):
        raise ArgumentError(
            f"expected a composite or spec of {wanted.__name__}, got {type(part).__qualname__}",
            remedy="Convert another framework's layer first, or build it from this package",
        )
    return spec


def _is_deleted(array: jax.Array) -> bool:
    return not isinstance(array, Tracer) and array.is_deleted()


def shape_of(fn: Callable[..., Any], example: Shape) -> Shape | None:
    out = jax.eval_shape(fn, jax.ShapeDtypeStruct((1, *example), "float32"))
    return tuple(out.shape[1:]) if hasattr(out, "shape") else None
