"""One step of each recurrent cell: the input and the state, then arrays, then options.

A compute ``dtype`` is what the operands of a product are cast to; None means their common one.
"""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from .layers import linear, promote

__all__ = [
    "Filled",
    "Typed",
    "carry_init",
    "conv_lstm_step",
    "flip_sequences",
    "gru_step",
    "lstm_step",
    "mgu_step",
    "simple_step",
    "urlstm_step",
]

Array = Any
DType = Any
Function = Callable[..., Any]


@dataclass(frozen=True)
class Filled:
    """An initialiser of states that are always the same, ``(key, shape, dtype) -> array``.

    Attributes:
        value: a number, or nested tuples of them, broadcast to the shape.
    """

    value: Any

    def __call__(self, key: Any, shape: tuple[int, ...], dtype: DType) -> jax.Array:
        """The state; ``key`` is not used."""
        return jnp.broadcast_to(jnp.asarray(self.value, dtype), shape)


@dataclass(frozen=True)
class Typed:
    """An initialiser whose states have one dtype, whatever is asked for."""

    fn: Function
    dtype: DType

    def __call__(self, key: Any, shape: tuple[int, ...], dtype: DType) -> jax.Array:
        """What ``fn`` makes; ``dtype`` is not used."""
        return self.fn(key, shape, self.dtype)


def carry_init(fn: Function | None, dtype: DType, usual: DType) -> Function | None:
    """An initialiser for states of ``dtype``, where those of ``usual`` are asked for.

    None means zeros, before and after.
    """
    if fn in (jax.nn.initializers.zeros, Filled(0.0)):
        fn = None
    if jnp.dtype(dtype) == jnp.dtype(usual):
        return fn
    return Typed(fn or Filled(0.0), jnp.dtype(dtype))


def simple_step(
    x: Array,
    h: Array,
    weight_x: Array,
    weight_h: Array,
    bias: Array | None,
    *,
    activation: Function = jnp.tanh,
    residual: bool = False,
    dtype: DType | None = None,
) -> jax.Array:
    """One step of an Elman network: ``activation(x @ weight_x + h @ weight_h + bias)``.

    Elman, Cognitive Science 14 (1990), 179-211; with ``residual``, ``h`` is added to the
    argument of the activation (Yue et al., arXiv:1801.06105).

    Args:
        x: ``(*batch, in)``.
        h: ``(*batch, hidden)``.
        weight_x: ``(in, hidden)``.
        weight_h: ``(hidden, hidden)``.
        bias: ``(hidden,)``, or None.
        activation: an elementwise function.
        residual: whether ``h`` is added.
        dtype: what the operands are cast to.
    """
    y = linear(x, weight_x, bias, dtype=dtype) + linear(h, weight_h, dtype=dtype)
    return activation(y + h if residual else y)


def lstm_step(
    x: Array,
    h: Array,
    c: Array,
    weight_x: Array,
    weight_h: Array,
    bias: Array | None,
    *,
    activation: Function = jnp.tanh,
    gate: Function = jax.nn.sigmoid,
    forget_bias: float = 0.0,
    dtype: DType | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One step of a long short-term memory: the new ``h`` and ``c``.

    Hochreiter and Schmidhuber, Neural Computation 9 (1997), 1735-1780, with the forget gate of
    Gers et al. (2000)::

        i, f, g, o = split(x @ weight_x + h @ weight_h + bias)
        c <- gate(f + forget_bias) * c + gate(i) * activation(g)
        h <- gate(o) * activation(c)

    Args:
        x: ``(*batch, in)``.
        h, c: ``(*batch, hidden)``.
        weight_x: ``(in, 4 * hidden)``.
        weight_h: ``(hidden, 4 * hidden)``.
        bias: ``(4 * hidden,)``, or None.
        activation, gate: elementwise functions.
        forget_bias: a constant.
        dtype: what the operands are cast to.
    """
    y = linear(x, weight_x, dtype=dtype) + linear(h, weight_h, bias, dtype=dtype)
    i, f, g, o = jnp.split(y, 4, axis=-1)
    c = gate(f + forget_bias if forget_bias else f) * c + gate(i) * activation(g)
    return gate(o) * activation(c), c


def gru_step(
    x: Array,
    h: Array,
    weight_x: Array,
    weight_h: Array,
    bias: Array | None,
    bias_n: Array | None,
    *,
    activation: Function = jnp.tanh,
    gate: Function = jax.nn.sigmoid,
    reset_first: bool = False,
    dtype: DType | None = None,
) -> jax.Array:
    """One step of a gated recurrent unit: the new ``h``.

    With ``xr, xz, xn = split(x @ weight_x + bias)`` and ``wr, wz, wn = split(weight_h)``::

        r, z = gate(xr + h @ wr), gate(xz + h @ wz)
        n = activation(xn + r * (h @ wn + bias_n))
        h <- (1 - z) * n + z * h

    as in cuDNN; or with ``reset_first``, as Chung et al. (arXiv:1412.3555) write it::

        n = activation(xn + (r * h) @ wn + bias_n)
        h <- (1 - z) * h + z * n

    Args:
        x: ``(*batch, in)``.
        h: ``(*batch, hidden)``.
        weight_x: ``(in, 3 * hidden)``.
        weight_h: ``(hidden, 3 * hidden)``.
        bias: ``(3 * hidden,)``, or None.
        bias_n: ``(hidden,)``, or None.
        activation, gate: elementwise functions.
        reset_first: which of the two forms.
        dtype: what the operands are cast to.
    """
    hidden = h.shape[-1]
    gates, n = _split(linear(x, weight_x, bias, dtype=dtype), 2 * hidden)
    weight_gates, weight_n = _split(weight_h, 2 * hidden)
    r, z = jnp.split(gate(gates + linear(h, weight_gates, dtype=dtype)), 2, axis=-1)
    if reset_first:
        n = activation(n + linear(r * h, weight_n, bias_n, dtype=dtype))
        return (1.0 - z) * h + z * n
    n = activation(n + r * linear(h, weight_n, bias_n, dtype=dtype))
    return (1.0 - z) * n + z * h


def mgu_step(
    x: Array,
    h: Array,
    weight_x: Array,
    weight_h: Array,
    bias: Array | None,
    bias_n: Array | None,
    *,
    activation: Function = jnp.tanh,
    gate: Function = jax.nn.sigmoid,
    reset_first: bool = False,
    reset_gate: bool = True,
    dtype: DType | None = None,
) -> jax.Array:
    """One step of a minimal gated unit: the new ``h``.

    With ``xf, xn = split(x @ weight_x + bias)`` and ``wf, wn = split(weight_h)``::

        f = gate(xf + h @ wf)
        n = activation(xn + f * (h @ wn + bias_n))
        h <- (1 - f) * n + f * h

    or with ``reset_first``, as Zhou et al. (arXiv:1603.09420) write it::

        n = activation(xn + (f * h) @ wn + bias_n)
        h <- (1 - f) * h + f * n

    Args:
        x: ``(*batch, in)``.
        h: ``(*batch, hidden)``.
        weight_x: ``(in, 2 * hidden)``.
        weight_h: ``(hidden, 2 * hidden)``.
        bias: ``(2 * hidden,)``, or None.
        bias_n: ``(hidden,)``, or None.
        activation, gate: elementwise functions.
        reset_first: which of the two forms.
        reset_gate: whether ``n`` has the factor ``f``.
        dtype: what the operands are cast to.
    """
    xf, xn = jnp.split(linear(x, weight_x, bias, dtype=dtype), 2, axis=-1)
    wf, wn = jnp.split(weight_h, 2, axis=-1)
    f = gate(xf + linear(h, wf, dtype=dtype))
    if reset_first:
        kept = f * h if reset_gate else h
        n = activation(xn + linear(kept, wn, bias_n, dtype=dtype))
        return (1.0 - f) * h + f * n
    hn = linear(h, wn, bias_n, dtype=dtype)
    n = activation(xn + (hn * f if reset_gate else hn))
    return (1.0 - f) * n + f * h


def urlstm_step(
    x: Array,
    h: Array,
    c: Array,
    weight_x: Array,
    weight_h: Array,
    bias: Array,
    *,
    activation: Function = jnp.tanh,
) -> tuple[jax.Array, jax.Array]:
    """One step of a long short-term memory with a refine gate: the new ``h`` and ``c``.

    Gu et al., "Improving the Gating Mechanism of Recurrent Neural Networks", ICML 2020::

        f, r, u, o = split(x @ weight_x + h @ weight_h)
        f, r = sigmoid(f + bias), sigmoid(r - bias)
        g = 2 * r * f + (1 - 2 * r) * f**2
        c <- g * c + (1 - g) * activation(u)
        h <- sigmoid(o) * activation(c)

    Args:
        x: ``(*batch, in)``.
        h, c: ``(*batch, hidden)``.
        weight_x: ``(in, 4 * hidden)``.
        weight_h: ``(hidden, 4 * hidden)``.
        bias: ``(hidden,)``.
        activation: an elementwise function.
    """
    y = linear(x, weight_x) + linear(h, weight_h)
    f, r, u, o = jnp.split(y, 4, axis=-1)
    f, r = jax.nn.sigmoid(f + bias), jax.nn.sigmoid(r - bias)
    g = 2 * r * f + (1 - 2 * r) * f**2
    c = g * c + (1 - g) * activation(u)
    return jax.nn.sigmoid(o) * activation(c), c


def conv_lstm_step(
    x: Array,
    h: Array,
    c: Array,
    weight_x: Array,
    weight_h: Array,
    bias_x: Array | None,
    bias_h: Array | None,
    *,
    strides: tuple[int, ...],
    padding: Any,
    dtype: DType | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One step of a convolutional long short-term memory: the new ``h`` and ``c``.

    Shi et al., "Convolutional LSTM Network", NeurIPS 2015, without peepholes; ``*`` is the
    cross-correlation over the axes of space::

        i, g, f, o = split(x * weight_x + bias_x + h * weight_h + bias_h)
        c <- sigmoid(f + 1) * c + sigmoid(i) * tanh(g)
        h <- sigmoid(o) * tanh(c)

    Args:
        x: ``(*batch, *space, in)``.
        h, c: ``(*batch, *space, hidden)``.
        weight_x: ``(*kernel, in, 4 * hidden)``.
        weight_h: ``(*kernel, hidden, 4 * hidden)``.
        bias_x, bias_h: ``(4 * hidden,)``, or None.
        strides: one for each axis of space.
        padding: ``"SAME"``, ``"VALID"``, or a pair for each axis of space.
        dtype: what the operands are cast to.
    """

    def convolved(x: Array, weight: Array, bias: Array | None) -> Any:
        space = weight.ndim - 2
        x, weight, bias = promote(x, weight, bias, dtype=dtype)
        letters = "DHW"[-space:] if space <= 3 else "".join(map(chr, range(97, 97 + space)))
        y = jax.lax.conv_general_dilated(
            x.reshape(-1, *x.shape[-space - 1 :]),
            weight,
            strides,
            padding,
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        )
        y = y.reshape(*x.shape[: -space - 1], *y.shape[1:])
        return y if bias is None else y + bias

    y = convolved(x, weight_x, bias_x) + convolved(h, weight_h, bias_h)
    i, g, f, o = jnp.split(y, 4, axis=-1)
    c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def flip_sequences(xs: Array, seq_lengths: Array | None = None) -> jax.Array:
    """``xs`` backwards in time, with what is beyond a sequence's length left at its end.

    Args:
        xs: ``(time, *batch, *features)``.
        seq_lengths: ``(*batch,)``, integers; None where all are as long as ``time``.
    """
    if seq_lengths is None:
        return jnp.flip(xs, 0)
    time, lengths = xs.shape[0], jnp.asarray(seq_lengths)
    backwards = jnp.arange(time - 1, -1, -1).reshape(-1, *[1] * lengths.ndim)
    index = (backwards + lengths) % time
    return jnp.take_along_axis(
        xs, index.reshape(*index.shape, *[1] * (xs.ndim - index.ndim)), 0
    )


def _split(array: Array, at: int) -> list[jax.Array]:
    return jnp.split(array, [at], axis=-1)
