"""Neutral layer descriptions. Array layouts are defined here and nowhere else.

A field without a default is always carried. A field with a default is an option, and its
default is the plain behaviour: a builder that cannot express another value does not list the
option in its ``carries``, and the walk then refuses the layer by the option's name.

Shapes name the batch axes ``*batch``; ``x`` is the input of the layer.
"""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .formulas import ACTIVATIONS, activation_defaults, flatten

if TYPE_CHECKING:
    from .walk import Building

__all__ = [
    "Activation",
    "BatchNorm",
    "Conv",
    "Deferred",
    "Dropout",
    "Embedding",
    "Flatten",
    "Function",
    "GroupNorm",
    "LSTMCell",
    "LayerNorm",
    "Linear",
    "Pool",
    "RMSNorm",
    "Sequential",
    "Spec",
    "common_dtype",
    "dtype",
    "is_wide",
    "move_channels",
    "moved_axis",
    "pool",
    "promoted_dtype",
]

Array = Any  # jax.Array or numpy.ndarray: a spec holds what the source held
DType = Any
Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Spec:
    """Base of all specs. Specs compare by identity: one spec twice is one layer used twice."""

    keeps_shape: ClassVar[bool] = False
    """Whether the output has the shape of the input, and each axis its meaning."""
    has_channels: ClassVar[bool] = False
    """Whether one axis has another meaning than the rest, however many there are."""
    counts_axes: ClassVar[bool] = False
    """Whether the result depends on the order of the axes, and ``moved`` changes that."""

    @property
    def space(self) -> int | None:
        """Axes that an example has beside that of its channels; None where any will do."""
        return 0

    @property
    def holds_state(self) -> bool:
        """Whether using the layer at two places ties something."""
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


@dataclass(frozen=True, eq=False, kw_only=True)
class Linear(Spec):
    """``y = x @ weight + bias``.

    Shapes:
        x       (*batch, in)
        weight  (in, out)
        bias    (out,) or None
        mask    (in, out) or None, multiplied with the weight

    Options: ``dtype`` is what the operands are cast to; None means their common dtype.
    ``leading_shape`` is that of the axes of one example before the last.
    """

    weight: Array
    bias: Array | None
    leading_shape: Shape = ()
    mask: Array | None = None
    dtype: DType | None = None
    precision: Any = None
    preferred_element_type: DType | None = None

    @property
    def holds_state(self) -> bool:
        return True

    def output_shape(self, shape: Shape | None) -> Shape | None:
        return (*(shape[:-1] if shape else self.leading_shape), self.weight.shape[1])

    def with_rows(self, order: np.ndarray[Any, Any]) -> Spec:
        mask = None if self.mask is None else self.mask[order]
        return replace(self, weight=self.weight[order], mask=mask)

    def mismatches(self) -> list[str]:
        out = self.weight.shape[1:]
        return _mismatches(weight=(self.weight, None), bias=(self.bias, out))


@dataclass(frozen=True, eq=False, kw_only=True)
class Conv(Spec):
    """Cross-correlation over the axes of space, as ``jax.lax.conv_general_dilated`` does it.

    Shapes, with ``k`` axes of space:
        x       (batch, *space, in)
        weight  (*kernel, in // groups, out)
        bias    (out,) or None
        mask    that of the weight, or None; multiplied with it

    ``padding`` is ``"SAME"``, ``"SAME_LOWER"``, ``"VALID"`` or k pairs. ``in_shape`` is the
    shape ``(*space, in)`` of an example where the source fixes it. ``dtype`` is what the
    operands are cast to; None means their common dtype.
    """

    weight: Array
    bias: Array | None
    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    kernel_dilation: tuple[int, ...]
    groups: int
    in_shape: Shape | None
    input_dilation: tuple[int, ...] | None = None
    mask: Array | None = None
    dtype: DType | None = None
    precision: Any = None
    preferred_element_type: DType | None = None

    @property
    def space(self) -> int:
        return len(self.strides)

    @property
    def channels(self) -> int:
        """The number of channels of the input."""
        return self.weight.shape[-2] * self.groups

    @property
    def holds_state(self) -> bool:
        return True

    def pads(self, shape: Shape) -> tuple[tuple[int, int], ...]:
        """The padding of an example of that shape, as pairs."""
        if not isinstance(self.padding, str):
            return self.padding
        kernel = [
            (size - 1) * dilation + 1
            for size, dilation in zip(self.weight.shape, self.kernel_dilation, strict=False)
        ]
        pads = jax.lax.padtype_to_pads(shape[:-1], kernel, self.strides, self.padding)
        return tuple((int(low), int(high)) for low, high in pads)

    def output_shape(self, shape: Shape | None) -> Shape | None:
        shape = shape or self.in_shape
        if shape is None:
            return None
        last = (0, self.space + 1, *range(1, self.space + 1))
        kernel = (self.space + 1, self.space, *range(self.space))

        def run(x: jax.Array) -> jax.Array:
            return jax.lax.conv_general_dilated(
                x,
                jnp.zeros(self.weight.shape),
                self.strides,
                self.padding,
                self.input_dilation,
                self.kernel_dilation,
                jax.lax.ConvDimensionNumbers(last, kernel, last),
                self.groups,
            )

        return _shape_of(run, shape)

    def mismatches(self) -> list[str]:
        weight, out = self.weight, self.weight.shape[-1:]
        lines = _mismatches(weight=(weight, None), bias=(self.bias, out))
        return lines + _mismatches(mask=(self.mask, weight.shape))


@dataclass(frozen=True, eq=False, kw_only=True)
class Pool(Spec):
    """The maximum or the mean over windows of space, each channel by itself.

    ``padding`` is ``"SAME"``, ``"VALID"`` or a pair for each axis of space. Padding is never
    the maximum; whether zeros of it are elements of the mean, ``counts_padding`` says.
    """

    mean: bool
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    counts_padding: bool = False

    @property
    def space(self) -> int:
        return len(self.window)

    def pads(self, shape: Shape) -> tuple[tuple[int, int], ...]:
        """The padding of an example of that shape of space, as pairs."""
        if not isinstance(self.padding, str):
            return self.padding
        pads = jax.lax.padtype_to_pads(shape, self.window, self.strides, self.padding)
        return tuple((int(low), int(high)) for low, high in pads)

    def output_shape(self, shape: Shape | None) -> Shape | None:
        if shape is None:
            return None
        pads = self.pads(shape[:-1])
        rows = zip(shape[:-1], pads, self.window, self.strides, strict=True)
        return (*[(n + sum(p) - w) // s + 1 for n, p, w, s in rows], shape[-1])


def pool(mean: bool, counts: bool, window: Any, strides: Any, padding: Any) -> Pool:
    """A :class:`Pool` whose ``counts_padding`` is plain where there is no padding."""
    padding = padding if isinstance(padding, str) else tuple(tuple(p) for p in padding)
    is_padded = padding == "SAME" or (padding != "VALID" and any(map(any, padding)))
    return Pool(
        mean=mean,
        window=tuple(window),
        strides=tuple(strides),
        padding=padding,
        counts_padding=mean and counts and is_padded,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Embedding(Spec):
    """``y = weight[x]``, for integers ``x`` in ``[0, number)``.

    Shapes:
        x       (*batch,)
        weight  (number, features)

    ``dtype`` is what the result is cast to; None means the weight's.
    """

    weight: Array
    dtype: DType | None = None

    @property
    def holds_state(self) -> bool:
        return True

    def output_shape(self, shape: Shape | None) -> Shape | None:
        return None if shape is None else (*shape, self.weight.shape[-1])

    def mismatches(self) -> list[str]:
        return _mismatches(weight=(self.weight, None))


@dataclass(frozen=True, eq=False, kw_only=True)
class LSTMCell(Spec):
    """One step: ``i, f, g, o = split(x @ weight_x + h @ weight_h + bias)``, then
    ``c <- gate(f) * c + gate(i) * activation(g)`` and ``h <- gate(o) * activation(c)``.

    Shapes:
        x         (*batch, in)
        h, c      (*batch, hidden)
        weight_x  (in, 4 * hidden)
        weight_h  (hidden, 4 * hidden)
        bias      (4 * hidden,)

    ``activation`` is tanh where it is None, ``gate`` the logistic function. ``dtype`` is what
    the operands are cast to; None means their common dtype.
    """

    weight_x: Array
    weight_h: Array
    bias: Array
    activation: Callable[..., Any] | None = None
    gate: Callable[..., Any] | None = None
    dtype: DType | None = None

    @property
    def hidden(self) -> int:
        return self.weight_h.shape[0]

    @property
    def holds_state(self) -> bool:
        return True

    def mismatches(self) -> list[str]:
        gates = 4 * self.hidden
        return _mismatches(
            weight_x=(self.weight_x, (self.weight_x.shape[0], gates)),
            weight_h=(self.weight_h, (self.hidden, gates)),
            bias=(self.bias, (gates,)),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Norm(Spec):
    """What all normalisations have.

    Dtypes: ``x``, scale and bias are first cast to ``compute_dtype``, the result to
    ``output_dtype``; None means the common dtype of the three. Statistics are float32 or wider.
    """

    keeps_shape = True

    scale: Array | None
    bias: Array | None
    epsilon: float
    use_fast_variance: bool
    axis_name: Any = None
    axis_index_groups: Any = None
    compute_dtype: DType | None = None
    output_dtype: DType | None = None

    @property
    def space(self) -> int | None:
        return None

    @property
    def holds_state(self) -> bool:
        return self.scale is not None or self.bias is not None


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerNorm(Norm):
    """``y = (x - mean) * rsqrt(var + epsilon) * scale + bias`` over ``reduction_axes``.

    Shapes:
        x       (*batch, *example)
        scale   the sizes of ``feature_axes``, or None
        bias    the sizes of ``feature_axes``, or None

    ``feature_shape`` holds those sizes where they are known without the arrays, and
    ``leading_shape`` the sizes of the axes of one example before them, where the source fixes
    them. Axes are negative: they count from the end, so that batch axes do not move them.
    """

    feature_shape: Shape | None
    leading_shape: Shape = ()
    reduction_axes: tuple[int, ...] = (-1,)
    feature_axes: tuple[int, ...] = (-1,)
    counts_axes = True

    def moved(self, axes: int | None, to_first: bool) -> Spec:
        if not axes:
            return self
        features = [moved_axis(axis, axes, to_first) for axis in self.feature_axes]
        order = sorted(range(len(features)), key=features.__getitem__)
        shape = self.feature_shape
        return replace(
            self,
            scale=_transposed(self.scale, order),
            bias=_transposed(self.bias, order),
            feature_shape=None if shape is None else tuple(shape[i] for i in order),
            reduction_axes=tuple(
                sorted(moved_axis(axis, axes, to_first) for axis in self.reduction_axes)
            ),
            feature_axes=tuple(sorted(features)),
        )

    def mismatches(self) -> list[str]:
        shape = self.feature_shape
        return _mismatches(scale=(self.scale, shape), bias=(self.bias, shape))


@dataclass(frozen=True, eq=False, kw_only=True)
class RMSNorm(LayerNorm):
    """``y = x * rsqrt(mean(x ** 2) + epsilon) * scale`` over ``reduction_axes``.

    As :class:`LayerNorm`, without the mean; ``use_fast_variance`` has no effect. A bias is an
    option that few frameworks have.
    """

    bias: Array | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class GroupNorm(Norm):
    """:class:`LayerNorm` of each of ``num_groups`` groups of features, over all of ``space``.

    Shapes:
        x       (batch, *space, features)
        scale   (features,) or None
        bias    (features,) or None

    ``features`` is that number where it is known without the arrays.
    """

    num_groups: int
    features: int | None
    has_channels = True

    def mismatches(self) -> list[str]:
        shape = None if self.features is None else (self.features,)
        return _mismatches(scale=(self.scale, shape), bias=(self.bias, shape))


@dataclass(frozen=True, eq=False, kw_only=True)
class BatchNorm(Norm):
    """``y = (x - mean) * rsqrt(var + epsilon) * scale + bias`` over all axes but ``axis``.

    Training normalises by the batch's statistics and moves the running ones:
    ``mean <- momentum * mean + (1 - momentum) * batch_mean``, with the biased variance.

    Shapes:
        x                       (*batch, *space, features) for ``axis == -1``
        scale, bias             (features,) or None
        mean, var               (features,)

    ``spatial_dims`` is the number of axes of ``space``, or None where the source leaves it to
    the input. ``statistics_dtype`` is that of ``mean`` and ``var`` where it is narrower than
    float32, which every framework rounds elsewhere.
    """

    mean: Array
    var: Array
    momentum: float
    spatial_dims: int | None
    axis: int = -1
    statistics_dtype: DType | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if not is_wide(self.mean.dtype):
            object.__setattr__(self, "statistics_dtype", self.mean.dtype)

    @property
    def space(self) -> int | None:
        return self.spatial_dims

    @property
    def has_channels(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.spatial_dims is None

    def moved(self, axes: int | None, to_first: bool) -> Spec:
        if self.spatial_dims is not None or (axes is None and to_first):
            return self
        return replace(self, spatial_dims=max((axes or 1) - 1, 0))

    @property
    def holds_state(self) -> bool:
        return True

    def mismatches(self) -> list[str]:
        names = ("mean", "var", "scale", "bias")
        return _mismatches(**{n: (getattr(self, n), self.mean.shape) for n in names})


@dataclass(frozen=True, eq=False, kw_only=True)
class Dropout(Spec):
    """Training: each element is 0 with probability ``rate``, else ``x / (1 - rate)``.

    ``broadcast_dims`` are axes of the batched ``x`` along which one decision is shared.
    ``rng_collection`` names the random stream, in frameworks that have several.
    """

    rate: float
    rng_collection: str
    broadcast_dims: tuple[int, ...] = ()
    keeps_shape = True

    @property
    def space(self) -> int | None:
        return None

    @property
    def is_elementwise(self) -> bool:
        return not self.broadcast_dims


@dataclass(frozen=True, eq=False, kw_only=True)
class Activation(Spec):
    """A weight-less function of :data:`interop.formulas.ACTIVATIONS`, by name.

    ``options`` holds those that differ from the function's defaults. An ``axis`` counts in
    the batched input.
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
        return _shape_of(partial(ACTIVATIONS["glu"], **self.options), shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class Flatten(Spec):
    """:func:`interop.formulas.flatten` of the batched input."""

    start_axis: int
    end_axis: int
    in_size: Shape | None

    @property
    def space(self) -> int | None:
        return None

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

    def output_shape(self, shape: Shape | None) -> Shape | None:
        if shape is None:
            return None

        def run(x: jax.Array) -> jax.Array:
            return flatten(x, self.start_axis, self.end_axis, self.in_size)

        return _shape_of(run, shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class Function(Spec):
    """Any other callable, without weights of its own.

    ``per_example`` says what it expects: one example, or a batch of them.
    """

    fn: Callable[..., Any]
    per_example: bool

    @property
    def space(self) -> int | None:
        return None

    def output_shape(self, shape: Shape | None) -> Shape | None:
        if shape is None:
            return None
        return _shape_of(jax.vmap(self.fn) if self.per_example else self.fn, shape)


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
    """Layers applied one after the other. The same spec twice is one layer used twice."""

    layers: tuple[Spec, ...]

    @property
    def holds_state(self) -> bool:
        return any(layer.holds_state for layer in self.layers)

    def output_shape(self, shape: Shape | None) -> Shape | None:
        for layer in self.layers:
            shape = layer.output_shape(shape)
        return shape


def move_channels(shape: Shape, to_first: bool) -> Shape:
    """``shape`` with its last axis in front, or its first at the end."""
    return (*shape[-1:], *shape[:-1]) if to_first else (*shape[1:], *shape[:1])


def moved_axis(axis: int, axes: int, to_first: bool) -> int:
    """Where a negative ``axis`` of so many axes is after :func:`move_channels`."""
    return (axis + (1 if to_first else -1)) % axes - axes


def _transposed(array: Array | None, order: list[int]) -> Array | None:
    return array if array is None or order == sorted(order) else array.transpose(order)


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


def promoted_dtype(statistics: Array, *parameters: Array | None) -> DType | None:
    """``output_dtype`` of a layer that promotes its input with its statistics as well.

    None where its parameters promote the input as far anyway.
    """
    given = [array for array in parameters if array is not None]
    widest = common_dtype(statistics, *given)
    return None if given and common_dtype(*given) == widest else widest


def _mismatches(**arrays: tuple[Array | None, Shape | None]) -> list[str]:
    """Compare arrays with the shapes they must have; None where any will do."""
    lines: list[str] = []
    for name, (array, shape) in arrays.items():
        if array is not None and not hasattr(array, "__array__"):
            lines.append(f"{name} is a {type(array).__qualname__}, not an array")
        elif array is not None and shape not in (None, array.shape):
            lines.append(f"{name} has shape {array.shape}, wanted {shape}")
    return lines


def _shape_of(fn: Callable[..., Any], example: Shape) -> Shape | None:
    out = jax.eval_shape(fn, jax.ShapeDtypeStruct((1, *example), "float32"))
    return tuple(out.shape[1:]) if hasattr(out, "shape") else None
