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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from .walk import Building

__all__ = [
    "Activation",
    "BatchNorm",
    "Deferred",
    "Dropout",
    "Embedding",
    "Flatten",
    "Function",
    "GroupNorm",
    "LayerNorm",
    "Linear",
    "RMSNorm",
    "Sequential",
    "Spec",
    "common_dtype",
    "dtype",
    "is_wide",
    "promoted_dtype",
]

Array = Any  # jax.Array or numpy.ndarray: a spec holds what the source held
DType = Any
Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Spec:
    """Base of all specs. Specs compare by identity: one spec twice is one layer used twice."""

    @property
    def holds_state(self) -> bool:
        """Whether using the layer at two places ties something."""
        return False

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

    def mismatches(self) -> list[str]:
        out = self.weight.shape[1:]
        return _mismatches(weight=(self.weight, None), bias=(self.bias, out))


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
class Norm(Spec):
    """What all normalisations have.

    Dtypes: ``x``, scale and bias are first cast to ``compute_dtype``, the result to
    ``output_dtype``; None means the common dtype of the three. Statistics are float32 or wider.
    """

    scale: Array | None
    bias: Array | None
    epsilon: float
    use_fast_variance: bool
    axis_name: Any = None
    axis_index_groups: Any = None
    compute_dtype: DType | None = None
    output_dtype: DType | None = None

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

    def mismatches(self) -> list[str]:
        shape = self.feature_shape
        return _mismatches(scale=(self.scale, shape), bias=(self.bias, shape))


@dataclass(frozen=True, eq=False, kw_only=True)
class RMSNorm(LayerNorm):
    """``y = x * rsqrt(mean(x ** 2) + epsilon) * scale`` over ``reduction_axes``.

    As :class:`LayerNorm`, with neither mean nor bias; ``use_fast_variance`` has no effect.
    """

    bias: None = None


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


@dataclass(frozen=True, eq=False, kw_only=True)
class Activation(Spec):
    """A weight-less function of :data:`interop.formulas.ACTIVATIONS`, by name.

    ``options`` holds those that differ from the function's defaults. An ``axis`` counts in
    the batched input.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, eq=False, kw_only=True)
class Flatten(Spec):
    """:func:`interop.formulas.flatten` of the batched input."""

    start_axis: int
    end_axis: int
    in_size: Shape | None

    def output_shape(self, shape: Shape | None) -> Shape | None:
        if shape is None:
            return None
        from .formulas import flatten

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

    def output_shape(self, shape: Shape | None) -> Shape | None:
        if shape is None:
            return None
        return _shape_of(jax.vmap(self.fn) if self.per_example else self.fn, shape)


class Deferred(Spec):
    """A layer that only its own rule knows how to build, once the target is known."""

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
