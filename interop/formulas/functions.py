"""Weight-less functions.

``ACTIVATIONS`` names every weight-less function that converts by name. Where JAX has the
function, the entry *is* JAX's, so that a converted model holds what its author would write.
"""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

__all__ = [
    "ACTIVATIONS",
    "Batched",
    "Gathered",
    "Kept",
    "Moved",
    "Single",
    "Spread",
    "activation_defaults",
    "activation_name",
    "complement",
    "flatten",
    "hard_shrink",
    "hard_tanh",
    "identity",
    "relu6",
    "soft_shrink",
    "softmax_2d",
    "softmin",
    "spike_bitwise",
    "tanh_shrink",
    "threshold",
]


def identity(x: jax.Array) -> jax.Array:
    """Return ``x``."""
    return x


def threshold(x: jax.Array, threshold: float, value: float) -> jax.Array:
    """``x`` where ``x > threshold``, else ``value``; both take the dtype of ``x``."""
    return jnp.where(x > jnp.asarray(threshold, x.dtype), x, jnp.asarray(value, x.dtype))


def hard_tanh(x: jax.Array, min_val: float = -1.0, max_val: float = 1.0) -> jax.Array:
    """Clip ``x`` to ``[min_val, max_val]``; the gradient at both ends is 1."""
    return jnp.where(x > max_val, max_val, jnp.where(x < min_val, min_val, x))


def relu6(x: jax.Array) -> jax.Array:
    """Clip ``x`` to ``[0, 6]``; the gradient at both ends is 1, in ``jax.nn.relu6`` it is 0."""
    return hard_tanh(x, 0.0, 6.0)


def hard_shrink(x: jax.Array, lambd: float = 0.5) -> jax.Array:
    """``x`` where ``|x| > lambd``, else 0."""
    return jnp.where(x > lambd, x, jnp.where(x < -lambd, x, jnp.zeros_like(x)))


def soft_shrink(x: jax.Array, lambd: float = 0.5) -> jax.Array:
    """Move ``x`` towards 0 by ``lambd``, and to 0 where it would cross it."""
    return jnp.where(x > lambd, x - lambd, jnp.where(x < -lambd, x + lambd, jnp.zeros_like(x)))


def tanh_shrink(x: jax.Array) -> jax.Array:
    """``x - tanh(x)``."""
    return x - jnp.tanh(x)


def softmin(x: jax.Array, axis: int = -1) -> jax.Array:
    """``softmax(-x)`` over ``axis``."""
    return jax.nn.softmax(-x, axis=axis)


def softmax_2d(x: jax.Array, axis: int = -3) -> jax.Array:
    """``softmax`` over the third axis from the end, where images have their channels first."""
    return jax.nn.softmax(x, axis=axis)


def spike_bitwise(x: jax.Array, y: jax.Array, op: str) -> jax.Array:
    """A logical operation on spikes, 0 or 1, by arithmetic that has a gradient.

    Args:
        x, y: arrays of one shape.
        op: ``"or"``, ``"and"``, ``"xor"``, ``"iand"`` (not x, and y), or ``"ixor"``, another
            form of ``"xor"``.
    """
    results = {
        "or": lambda: x + y - x * y,
        "and": lambda: x * y,
        "xor": lambda: x + y - 2 * x * y,
        "iand": lambda: (1 - x) * y,
        "ixor": lambda: x * (1 - y) + (1 - x) * y,
    }
    return results[op]()


def flatten(
    x: jax.Array,
    start_axis: int = 0,
    end_axis: int = -1,
    in_size: tuple[int, ...] | None = None,
) -> jax.Array:
    """Merge the axes ``start_axis … end_axis`` of ``x`` into one.

    Args:
        x: any array. With ``in_size``, its trailing axes must have that shape.
        start_axis: first axis to merge.
        end_axis: last axis to merge.
        in_size: if given, non-negative axes count within these trailing axes, so that the
            function does the same to one example and to a batch.

    Raises:
        ValueError: ``x`` does not end in ``in_size``, or an axis is out of range.
    """
    leading = 0
    if in_size is not None:
        leading = x.ndim - len(in_size)
        if leading < 0 or x.shape[leading:] != tuple(in_size):
            raise ValueError(f"flatten: expected an array ending in {in_size}, got {x.shape}")
    start = start_axis + (leading if start_axis >= 0 else x.ndim)
    end = end_axis + (leading if end_axis >= 0 else x.ndim)
    if not 0 <= start <= end < x.ndim:
        raise ValueError(
            f"flatten: axes {start_axis} to {end_axis} do not exist in shape {x.shape}"
        )
    return x.reshape(*x.shape[:start], -1, *x.shape[end + 1 :])


def complement(p: float) -> float:
    """``1 - p`` without float noise: ``complement(0.7)`` is 0.3, and the inverse of itself."""
    q = round(1.0 - float(p), 15)
    return q if 1.0 - q == p or round(1.0 - q, 15) == p else 1.0 - float(p)


@dataclass(frozen=True)
class Batched:
    """A function of one example, applied to a batch: ``jax.vmap(fn)``."""

    fn: Callable[..., Any]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``fn`` over the leading axis of ``x``."""
        return jax.vmap(self.fn)(x)


def _as_batch(x: Any) -> Any:
    return x[None]


@dataclass(frozen=True)
class Single:
    """A function of a batch, applied to one example: ``fn(x[None])[0]``.

    That is the same only if ``fn`` treats the examples of a batch independently.
    """

    fn: Callable[..., Any]

    def __call__(self, x: Any) -> Any:
        """Apply ``fn`` to a batch that holds ``x`` alone; both may be several arrays.

        Raises:
            ValueError: ``fn`` returned no batch of one example.
        """

        def first(part: Any) -> Any:
            if part.shape[:1] != (1,):
                shapes = [(1, *leaf.shape) for leaf in jax.tree.leaves(x)]
                raise ValueError(
                    f"{self.fn} mixes batch and features: {shapes} -> {part.shape}"
                )
            return part[0]

        return jax.tree.map(first, self.fn(jax.tree.map(_as_batch, x)))


@dataclass(frozen=True)
class Spread:
    """A function that takes a tuple as its arguments, and a dict as keyword arguments."""

    fn: Callable[..., Any]

    def __call__(self, x: Any) -> Any:
        """Call ``fn`` with the parts of ``x``, or with ``x`` if that is one array."""
        if isinstance(x, tuple):
            return self.fn(*x)
        return self.fn(**x) if isinstance(x, dict) else self.fn(x)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Whole:
    """A tuple or dict that nothing takes apart."""

    value: Any


@dataclass(frozen=True)
class Kept:
    """A function whose tuple or dict is to reach :class:`Gathered` whole."""

    fn: Callable[..., Any]

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The output of ``fn``; several as one :class:`Whole`."""
        y = self.fn(*args, **options)
        return Whole(y) if isinstance(y, tuple | dict) else y


@dataclass(frozen=True)
class Gathered:
    """A function of one tuple or dict, where stacks spread them; see :class:`Kept`."""

    fn: Callable[..., Any]

    def __call__(self, x: Any, *rest: Any) -> Any:
        """Call ``fn`` with what the layer before returned."""
        if rest:  # of a layer that always returns so many
            return self.fn((x, *rest))
        return self.fn(x.value if isinstance(x, Whole) else x)


@dataclass(frozen=True)
class Composed:
    """Functions one after the other, each with the whole output of the one before."""

    steps: tuple[Callable[..., Any], ...]

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The output of the last."""
        first, *rest = self.steps
        y = first(*args, **options)
        for step in rest:
            y = step(y)
        return y


@dataclass(frozen=True)
class Moved:
    """A function for arrays whose channels stand at another axis than ``fn`` expects.

    ``enter`` and ``leave`` are arguments of ``jnp.moveaxis`` before and after ``fn``, or None.
    """

    fn: Callable[..., Any]
    enter: tuple[int, int] | None
    leave: tuple[int, int] | None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply ``fn`` between the two moves."""
        y = self.fn(x if self.enter is None else jnp.moveaxis(x, *self.enter))
        return y if self.leave is None else jnp.moveaxis(y, *self.leave)


ACTIVATIONS: Mapping[str, Callable[..., Any]] = {
    "celu": jax.nn.celu,
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
    "glu": jax.nn.glu,
    "hard_shrink": hard_shrink,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_silu": jax.nn.hard_silu,
    "hard_tanh": hard_tanh,
    "identity": identity,
    "leaky_relu": jax.nn.leaky_relu,
    "log_sigmoid": jax.nn.log_sigmoid,
    "log_softmax": jax.nn.log_softmax,
    "mish": jax.nn.mish,
    "relu": jax.nn.relu,
    "relu6": relu6,
    "selu": jax.nn.selu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "soft_shrink": soft_shrink,
    "soft_sign": jax.nn.soft_sign,
    "softmax": jax.nn.softmax,
    "softmax_2d": softmax_2d,
    "softmin": softmin,
    "softplus": jax.nn.softplus,
    "tanh": jnp.tanh,
    "tanh_shrink": tanh_shrink,
    "threshold": threshold,
}

_NAMES: dict[Callable[..., Any], str] = {fn: name for name, fn in ACTIVATIONS.items()}
_NAMES[jax.nn.hard_tanh] = "hard_tanh"  # the same with its bounds fixed


def activation_name(fn: Callable[..., Any]) -> str | None:
    """The name under which ``ACTIVATIONS`` has ``fn``, or None."""
    try:
        return _NAMES.get(fn)
    except TypeError:  # an unhashable callable cannot be one of ours
        return None


def activation_defaults(name: str) -> dict[str, Any]:
    """The options of an activation that have a default, by name."""
    parameters = list(inspect.signature(ACTIVATIONS[name]).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.default is not p.empty}
