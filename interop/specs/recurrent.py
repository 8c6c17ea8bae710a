"""Recurrent cells, one step each; and layers that take their steps along a sequence."""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, cast

import jax
import jax.numpy as jnp

from .. import formulas
from ..errors import ArgumentError
from .base import Array, DType, Run, Shape, Spec, is_wide, mismatches_of, spec_of

__all__ = [
    "Bidirectional",
    "Cell",
    "ConvLSTMCell",
    "GRUCell",
    "Gates",
    "LSTMCell",
    "MGUCell",
    "RNN",
    "SimpleCell",
    "URLSTMCell",
]

Function = Callable[..., Any]
State = tuple[Array, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Gates:
    """An array whose gates are kept apart, as some frameworks hold them.

    Attributes:
        parts: one array for each gate, in order: the whole has them side by side.
    """

    parts: tuple[Array, ...]

    @property
    def shape(self) -> Shape:
        first = self.parts[0].shape
        return (*first[:-1], len(self.parts) * first[-1])

    @property
    def dtype(self) -> DType:
        return self.parts[0].dtype

    @staticmethod
    def join(array: Any) -> Any:
        """An array as a whole."""
        is_apart = isinstance(array, Gates)
        return jnp.concatenate(array.parts, axis=-1) if is_apart else array

    @staticmethod
    def split(array: Array | Gates, number: int) -> tuple[Array, ...]:
        """An array as that many gates."""
        if isinstance(array, Gates) and len(array.parts) == number:
            return array.parts
        return (array,) if number == 1 else tuple(jnp.split(Gates.join(array), number, axis=-1))


@dataclass(frozen=True, eq=False, kw_only=True)
class Cell(Spec):
    """A recurrent cell. Its state is a tuple of arrays, the first of which is its output.

    ``weight_x`` is multiplied with the input, ``weight_h`` with the output of the step before.
    ``carry_init(key, shape, dtype)`` makes each array of the state before the first step;
    None means zeros. An initialiser that is random draws other numbers in each framework.
    """

    weight_x: Array
    weight_h: Array
    carry_init: Function | None = None

    carry: ClassVar[tuple[str, ...]] = ("h",)
    """The names of the arrays of the state."""
    functions: ClassVar[Mapping[str, int]] = {"activation": 1, "gate": 1}

    @property
    def feature_axes(self) -> int:
        """The number of axes of an input that are no batch axes."""
        return (self.space or 0) + 1

    @property
    def hidden(self) -> int:
        """The number of features of the state."""
        return self.weight_h.shape[-2]

    @property
    def in_shape(self) -> Shape:
        """The shape of one input without batch axes."""
        return (self.weight_x.shape[0],)

    def state_shape(self, input_shape: Shape) -> Shape:
        """The shape of each array of the state, for inputs of shape ``input_shape``."""
        return (*input_shape[:-1], self.hidden)

    def initial_carry(self, input_shape: Shape, key: Any = None) -> State:
        """The state before the first step.

        Args:
            input_shape: ``(*batch, *features)``.
            key: what ``carry_init`` draws from; that of seed 0 where it is None.
        """
        shape, dtype, number = (
            self.state_shape(input_shape),
            self.weight_h.dtype,
            len(self.carry),
        )
        if self.carry_init is None:
            return (jnp.zeros(shape, dtype),) * number
        key = jax.random.key(0) if key is None else key
        keys = jax.random.split(key, number) if number > 1 else [key]
        values = [self.carry_init(k, shape, dtype) for k in keys]
        return tuple(values[::-1])  # the output last, the order in which carries are drawn

    def step(self, run: Run, x: Array, state: State) -> State:
        """One step: the new state."""
        raise NotImplementedError

    @property
    def is_composable(self) -> bool:
        return type(self).step is not Cell.step

    @property
    def holds_state(self) -> bool:
        return True


@dataclass(frozen=True, eq=False, kw_only=True)
class DenseCell(Cell):
    """A cell that multiplies with matrices, for all of its ``gates`` at once.

    A reader may give any of its arrays as :class:`Gates`; a builder gets whole ones, unless it
    takes them ``apart``.

    Shapes:
        x         (*batch, in)
        state     (*batch, hidden)
        weight_x  (in, gates * hidden)
        weight_h  (hidden, gates * hidden)
        bias      (bias_gates * hidden,) or None
    """

    bias: Array | None

    gates: ClassVar[int]
    """The number of parts of the weights."""
    bias_gates: ClassVar[int | None] = None
    """The number of parts of the bias; None where it has all of them."""
    trained: ClassVar[tuple[str, ...]] = ("weight_x", "weight_h", "bias")

    @classmethod
    def shaped(
        cls,
        in_features: int,
        hidden_features: int,
        *,
        use_bias: bool = True,
        param_dtype: DType = jnp.float32,
        **options: Any,
    ) -> Self:
        columns = cls.gates * hidden_features
        size = (cls.bias_gates or cls.gates) * hidden_features
        return cls(
            weight_x=jax.ShapeDtypeStruct((in_features, columns), param_dtype),
            weight_h=jax.ShapeDtypeStruct((hidden_features, columns), param_dtype),
            bias=jax.ShapeDtypeStruct((size,), param_dtype) if use_bias else None,
            **options,
        )

    def joined(self) -> Self:
        arrays = {name: getattr(self, name) for name in self.trained}
        if not any(isinstance(array, Gates) for array in arrays.values()):
            return self
        return replace(self, **{name: Gates.join(array) for name, array in arrays.items()})

    def mismatches(self) -> list[str]:
        n, gates = self.hidden, self.gates
        return [
            *_mismatches("weight_x", self.weight_x, (self.weight_x.shape[0],), gates, n),
            *_mismatches("weight_h", self.weight_h, (n,), gates, n),
            *_mismatches("bias", self.bias, (), self.bias_gates or gates, n),
        ]


def _mismatches(name: str, array: Any, rows: Shape, gates: int, hidden: int) -> list[str]:
    if not isinstance(array, Gates):
        return mismatches_of(**{name: (array, (*rows, gates * hidden))})
    parts = {f"{name}[{i}]": (part, (*rows, hidden)) for i, part in enumerate(array.parts)}
    return mismatches_of(**parts)


@dataclass(frozen=True, eq=False, kw_only=True)
class ResettingCell(DenseCell):
    """A :class:`DenseCell` with a gate that resets what the last state adds to the next.

    Shapes:
        bias_n  (hidden,) or None: added where the state is multiplied for the candidate
    """

    bias_n: Array | None

    trained: ClassVar[tuple[str, ...]] = ("weight_x", "weight_h", "bias", "bias_n")

    @classmethod
    def shaped(
        cls,
        in_features: int,
        hidden_features: int,
        *,
        use_bias: bool = True,
        use_bias_n: bool = False,
        param_dtype: DType = jnp.float32,
        **options: Any,
    ) -> Self:
        bias_n = jax.ShapeDtypeStruct((hidden_features,), param_dtype)
        return super().shaped(
            in_features,
            hidden_features,
            use_bias=use_bias,
            param_dtype=param_dtype,
            bias_n=bias_n if use_bias_n else None,
            **options,
        )

    def mismatches(self) -> list[str]:
        return super().mismatches() + mismatches_of(bias_n=(self.bias_n, (self.hidden,)))


@dataclass(frozen=True, eq=False, kw_only=True)
class SimpleCell(DenseCell):
    """One step of an Elman network: ``h <- activation(x @ weight_x + h @ weight_h + bias)``.

    Shapes:
        x         (*batch, in)
        h         (*batch, hidden)
        weight_x  (in, hidden)
        weight_h  (hidden, hidden)
        bias      (hidden,) or None

    ``activation`` is tanh where it is None; with ``residual``, ``h`` is added to its argument.
    ``dtype`` is what the operands are cast to; None means their common dtype.

    Source: Elman, "Finding Structure in Time", Cognitive Science 14 (1990), 179-211.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.SimpleCell.shaped(3, 4).initial(jax.random.key(0))
        >>> state = spec.initial_carry((5, 3), None)
        >>> [a.shape for a in spec.step(specs.Run(), jnp.ones((5, 3)), state)]
        [(5, 4)]
    """

    activation: Function | None = None
    residual: bool = False
    dtype: DType | None = None

    gates = 1

    def step(self, run: Run, x: Array, state: State) -> State:
        (h,) = state
        h = formulas.simple_step(
            x,
            h,
            self.weight_x,
            self.weight_h,
            self.bias,
            activation=self.activation or jnp.tanh,
            residual=self.residual,
            dtype=self.dtype,
        )
        return (h,)


@dataclass(frozen=True, eq=False, kw_only=True)
class LSTMCell(DenseCell):
    """One step: ``i, f, g, o = split(x @ weight_x + h @ weight_h + bias)``, then
    ``c <- gate(f + forget_bias) * c + gate(i) * activation(g)`` and
    ``h <- gate(o) * activation(c)``.

    Shapes:
        x         (*batch, in)
        h, c      (*batch, hidden)
        weight_x  (in, 4 * hidden)
        weight_h  (hidden, 4 * hidden)
        bias      (4 * hidden,) or None

    ``activation`` is tanh where it is None, ``gate`` the logistic function. ``forget_bias`` is
    a constant. ``dtype`` is what the operands are cast to; None means their common dtype.

    Source: Hochreiter and Schmidhuber, Neural Computation 9 (1997), 1735-1780, with the forget
    gate of Gers et al., Neural Computation 12 (2000), 2451-2471.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.LSTMCell.shaped(3, 4).initial(jax.random.key(0))
        >>> state = spec.initial_carry((5, 3), None)
        >>> [a.shape for a in spec.step(specs.Run(), jnp.ones((5, 3)), state)]
        [(5, 4), (5, 4)]
    """

    activation: Function | None = None
    gate: Function | None = None
    forget_bias: float = 0.0
    dtype: DType | None = None

    gates = 4
    carry: ClassVar[tuple[str, ...]] = ("h", "c")

    def canonical(self) -> LSTMCell:
        """With ``forget_bias`` in the bias, unless that would round it."""
        is_plain = not self.forget_bias or not self.can_move_forget_bias
        return self if is_plain else self.with_forget_bias(0.0)

    @property
    def can_move_forget_bias(self) -> bool:
        """Whether there is a bias that a constant can be added to in float32 or wider."""
        return self.bias is not None and is_wide(self.bias.dtype)

    def with_forget_bias(self, value: float) -> LSTMCell:
        """The same layer with another ``forget_bias``; the bias makes up for it."""
        i, f, g, o = Gates.split(self.bias, 4)
        bias = Gates((i, f + (self.forget_bias - value), g, o))
        return replace(self, bias=bias, forget_bias=value)

    def step(self, run: Run, x: Array, state: State) -> State:
        h, c = state
        return formulas.lstm_step(
            x,
            h,
            c,
            self.weight_x,
            self.weight_h,
            self.bias,
            activation=self.activation or jnp.tanh,
            gate=self.gate or jax.nn.sigmoid,
            forget_bias=self.forget_bias,
            dtype=self.dtype,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class GRUCell(ResettingCell):
    """One step of a gated recurrent unit.

    With ``xr, xz, xn = split(x @ weight_x + bias)`` and ``wr, wz, wn = split(weight_h)``::

        r, z = gate(xr + h @ wr), gate(xz + h @ wz)
        n = activation(xn + r * (h @ wn + bias_n))
        h <- (1 - z) * n + z * h

    or with ``reset_first``::

        n = activation(xn + (r * h) @ wn + bias_n)
        h <- (1 - z) * h + z * n

    Shapes:
        x         (*batch, in)
        h         (*batch, hidden)
        weight_x  (in, 3 * hidden)
        weight_h  (hidden, 3 * hidden)
        bias      (3 * hidden,) or None
        bias_n    (hidden,) or None

    ``activation`` is tanh where it is None, ``gate`` the logistic function. ``dtype`` is what
    the operands are cast to; None means their common dtype.

    Source: Cho et al., arXiv:1406.1078; the form with ``reset_first`` as Chung et al.,
    arXiv:1412.3555, write it, the other as cuDNN computes it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.GRUCell.shaped(3, 4).initial(jax.random.key(0))
        >>> state = spec.initial_carry((5, 3), None)
        >>> [a.shape for a in spec.step(specs.Run(), jnp.ones((5, 3)), state)]
        [(5, 4)]
    """

    activation: Function | None = None
    gate: Function | None = None
    reset_first: bool = False
    dtype: DType | None = None

    gates = 3

    def step(self, run: Run, x: Array, state: State) -> State:
        (h,) = state
        h = formulas.gru_step(
            x,
            h,
            self.weight_x,
            self.weight_h,
            self.bias,
            self.bias_n,
            activation=self.activation or jnp.tanh,
            gate=self.gate or jax.nn.sigmoid,
            reset_first=self.reset_first,
            dtype=self.dtype,
        )
        return (h,)


@dataclass(frozen=True, eq=False, kw_only=True)
class MGUCell(ResettingCell):
    """One step of a minimal gated unit.

    With ``xf, xn = split(x @ weight_x + bias)`` and ``wf, wn = split(weight_h)``::

        f = gate(xf + h @ wf)
        n = activation(xn + f * (h @ wn + bias_n))
        h <- (1 - f) * n + f * h

    or with ``reset_first``::

        n = activation(xn + (f * h) @ wn + bias_n)
        h <- (1 - f) * h + f * n

    Shapes:
        x         (*batch, in)
        h         (*batch, hidden)
        weight_x  (in, 2 * hidden)
        weight_h  (hidden, 2 * hidden)
        bias      (2 * hidden,) or None
        bias_n    (hidden,) or None

    ``activation`` is tanh where it is None, ``gate`` the logistic function. Without
    ``reset_gate``, ``n`` has no factor ``f``. ``dtype`` is what the operands are cast to; None
    means their common dtype.

    Source: Zhou et al., arXiv:1603.09420, who write the form with ``reset_first``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.MGUCell.shaped(3, 4).initial(jax.random.key(0))
        >>> state = spec.initial_carry((5, 3), None)
        >>> [a.shape for a in spec.step(specs.Run(), jnp.ones((5, 3)), state)]
        [(5, 4)]
    """

    activation: Function | None = None
    gate: Function | None = None
    reset_first: bool = False
    reset_gate: bool = True
    dtype: DType | None = None

    gates = 2

    def step(self, run: Run, x: Array, state: State) -> State:
        (h,) = state
        h = formulas.mgu_step(
            x,
            h,
            self.weight_x,
            self.weight_h,
            self.bias,
            self.bias_n,
            activation=self.activation or jnp.tanh,
            gate=self.gate or jax.nn.sigmoid,
            reset_first=self.reset_first,
            reset_gate=self.reset_gate,
            dtype=self.dtype,
        )
        return (h,)


@dataclass(frozen=True, eq=False, kw_only=True)
class URLSTMCell(DenseCell):
    """One step of a long short-term memory with a refine gate.

    With ``f, r, u, o = split(x @ weight_x + h @ weight_h)``::

        f, r = sigmoid(f + bias), sigmoid(r - bias)
        g = 2 * r * f + (1 - 2 * r) * f**2
        c <- g * c + (1 - g) * activation(u)
        h <- sigmoid(o) * activation(c)

    Shapes:
        x         (*batch, in)
        h, c      (*batch, hidden)
        weight_x  (in, 4 * hidden)
        weight_h  (hidden, 4 * hidden)
        bias      (hidden,)

    ``activation`` is tanh where it is None.

    Source: Gu et al., "Improving the Gating Mechanism of Recurrent Neural Networks", ICML 2020.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.URLSTMCell.shaped(3, 4).initial(jax.random.key(0))
        >>> state = spec.initial_carry((5, 3), None)
        >>> [a.shape for a in spec.step(specs.Run(), jnp.ones((5, 3)), state)]
        [(5, 4), (5, 4)]
    """

    activation: Function | None = None

    gates = 4
    bias_gates: ClassVar[int] = 1
    carry: ClassVar[tuple[str, ...]] = ("h", "c")

    def step(self, run: Run, x: Array, state: State) -> State:
        h, c = state
        return formulas.urlstm_step(
            x,
            h,
            c,
            self.weight_x,
            self.weight_h,
            self.bias,
            activation=self.activation or jnp.tanh,
        )

    @classmethod
    def shaped(
        cls,
        in_features: int,
        hidden_features: int,
        *,
        param_dtype: DType = jnp.float32,
        **options: Any,
    ) -> Self:
        return super().shaped(in_features, hidden_features, param_dtype=param_dtype, **options)


@dataclass(frozen=True, eq=False, kw_only=True)
class ConvLSTMCell(Cell):
    """One step of a convolutional long short-term memory; ``*`` is the cross-correlation.

    With ``i, g, f, o = split(x * weight_x + bias_x + h * weight_h + bias_h)``::

        c <- sigmoid(f + 1) * c + sigmoid(i) * tanh(g)
        h <- sigmoid(o) * tanh(c)

    Shapes:
        x               (*batch, *space, in)
        h, c            (*batch, *space, hidden)
        weight_x        (*kernel, in, 4 * hidden)
        weight_h        (*kernel, hidden, 4 * hidden)
        bias_x, bias_h  (4 * hidden,) or None

    ``strides`` has a number, and ``padding`` a pair, for each axis of space; ``padding`` may
    also be ``"SAME"`` or ``"VALID"``. ``dtype`` is what the operands are cast to; None means
    their common dtype.

    Source: Shi et al., "Convolutional LSTM Network", NeurIPS 2015, without peepholes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.ConvLSTMCell.shaped(3, 4, (3, 3)).initial(jax.random.key(0))
        >>> state = spec.initial_carry((5, 8, 8, 3), None)
        >>> [a.shape for a in spec.step(specs.Run(), jnp.ones((5, 8, 8, 3)), state)]
        [(5, 8, 8, 4), (5, 8, 8, 4)]
    """

    bias_x: Array | None
    bias_h: Array | None
    strides: Shape
    padding: Any
    dtype: DType | None = None

    carry: ClassVar[tuple[str, ...]] = ("h", "c")
    trained: ClassVar[tuple[str, ...]] = ("weight_x", "weight_h", "bias_x", "bias_h")

    @property
    def space(self) -> int:
        return len(self.weight_x.shape) - 2

    @property
    def in_shape(self) -> Shape:
        raise ArgumentError(
            "the size of a convolutional cell's state is that of its input",
            remedy="Pass input_shape=, the shape of one input without its batch axis",
        )

    def step(self, run: Run, x: Array, state: State) -> State:
        h, c = state
        return formulas.conv_lstm_step(
            x,
            h,
            c,
            self.weight_x,
            self.weight_h,
            self.bias_x,
            self.bias_h,
            strides=self.strides,
            padding=self.padding,
            dtype=self.dtype,
        )

    @classmethod
    def shaped(
        cls,
        in_features: int,
        hidden_features: int,
        kernel_size: Shape,
        *,
        strides: Shape | None = None,
        padding: Any = "SAME",
        use_bias: bool = True,
        param_dtype: DType = jnp.float32,
        **options: Any,
    ) -> Self:
        gates, kernel = 4 * hidden_features, tuple(kernel_size)

        def weight(n_in: int) -> Any:
            return jax.ShapeDtypeStruct((*kernel, n_in, gates), param_dtype)

        bias = jax.ShapeDtypeStruct((gates,), param_dtype) if use_bias else None
        return cls(
            weight_x=weight(in_features),
            weight_h=weight(hidden_features),
            bias_x=bias,
            bias_h=bias,
            strides=strides or (1,) * len(kernel),
            padding=padding,
            **options,
        )

    def mismatches(self) -> list[str]:
        *kernel, hidden, gates = self.weight_h.shape
        n_in = self.weight_x.shape[-2]
        return mismatches_of(
            weight_x=(self.weight_x, (*kernel, n_in, 4 * hidden)),
            weight_h=(self.weight_h, (*kernel, hidden, 4 * hidden)),
            bias_x=(self.bias_x, (gates,)),
            bias_h=(self.bias_h, (gates,)),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class RNN(Spec):
    """The outputs of a cell along a sequence: ``y[t] = h`` after the step that takes ``x[t]``.

    Shapes:
        x             (*batch, time, *features), or (time, *batch, *features) if ``time_major``
        y             (*batch, time, *hidden), or (time, *batch, *hidden)
        seq_lengths   (*batch,), integers, or None

    With ``reverse``, the sequence is taken from its end, and the outputs are in that order,
    or with ``keep_order`` in that of the input. What is beyond a sequence's length stays at
    its end. With ``return_carry``, the result is the last state and the outputs; a state is
    a tuple of arrays, or the one array that there is, the output first. ``unroll`` is the
    number of steps in one iteration of the compiled loop.

    A call takes an ``initial_carry`` in the same form, ``seq_lengths``, and every option but
    ``unroll`` again.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.RNN.shaped(specs.GRUCell.shaped(3, 4)).initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.ones((5, 7, 3))).shape
        (5, 7, 4)
    """

    cell: Cell
    time_major: bool = False
    return_carry: bool = False
    reverse: bool = False
    keep_order: bool = False
    unroll: int = 1

    children: ClassVar[tuple[str, ...]] = ("cell",)
    takes_examples = True
    least_axes = 2

    @property
    def space(self) -> int:
        return self.cell.space + 1 if self.cell.space else 0

    @property
    def holds_state(self) -> bool:
        return True

    @property
    def is_composable(self) -> bool:
        return self.cell.is_composable

    def apply(
        self,
        run: Run,
        x: Array,
        initial_carry: Any = None,
        seq_lengths: Array | None = None,
        **options: Any,
    ) -> Any:
        time_major, return_carry, reverse, keep_order = _chosen(self, options)
        axis = 0 if time_major else x.ndim - self.cell.feature_axes - 1
        xs = jnp.moveaxis(x, axis, 0)
        if seq_lengths is not None:
            seq_lengths = jnp.broadcast_to(seq_lengths, xs.shape[1 : -self.cell.feature_axes])
        if initial_carry is None:
            draws = self.cell.carry_init is not None and run.has_key
            state = self.cell.initial_carry(xs.shape[1:], run.key() if draws else None)
        else:
            state = _as_tuple(initial_carry)
        keeps_states = seq_lengths is not None and return_carry

        def step(state: State, x: Array) -> tuple[State, Any]:
            state = self.cell.step(run, x, state)
            return state, state if keeps_states else state[:1]

        xs = formulas.flip_sequences(xs, seq_lengths) if reverse else xs
        last, states = jax.lax.scan(step, state, xs, unroll=self.unroll)
        ys = states[0]
        ys = formulas.flip_sequences(ys, seq_lengths) if reverse and keep_order else ys
        ys = jnp.moveaxis(ys, 0, axis)
        if keeps_states:
            last = tuple(_at(array, seq_lengths) for array in states)
        carry = last if len(self.cell.carry) > 1 else last[0]
        return (carry, ys) if return_carry else ys

    @classmethod
    def shaped(cls, cell: Cell, **options: Any) -> Self:
        """``cell`` is a spec or a module that holds one."""
        return cls(cell=spec_of(cell, Cell), **options)

    def output_shape(self, shape: Shape | None) -> Shape | None:
        if shape is None or self.time_major or self.return_carry:
            return None
        return self.cell.state_shape(shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class Bidirectional(Spec):
    """``merge(forward_rnn(x), backward_rnn(x))``, the second from the sequence's end.

    Shapes as of :class:`RNN`. Both outputs are in the order of the input. ``merge`` is a
    function of both at each time; None means that they are concatenated on their last axis.
    With ``return_carry``, the result is the pair of the last states, and the outputs.

    A call takes a pair as ``initial_carry``, ``seq_lengths``, and the options ``time_major``
    and ``return_carry`` again. Those of both parts do not count.

    Source: Schuster and Paliwal, IEEE Transactions on Signal Processing 45 (1997), 2673-2681.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> rnns = [specs.RNN.shaped(specs.GRUCell.shaped(3, 4)) for _ in range(2)]
        >>> spec = specs.Bidirectional.shaped(*rnns).initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.ones((5, 7, 3))).shape
        (5, 7, 8)
    """

    forward_rnn: RNN
    backward_rnn: RNN
    merge: Function | None = None
    time_major: bool = False
    return_carry: bool = False

    children: ClassVar[tuple[str, ...]] = ("forward_rnn", "backward_rnn")
    functions: ClassVar[Mapping[str, int]] = {"merge": 2}
    takes_examples = True
    least_axes = 2

    @property
    def space(self) -> int:
        return self.forward_rnn.space

    @property
    def holds_state(self) -> bool:
        return True

    @property
    def is_composable(self) -> bool:
        return self.forward_rnn.is_composable and self.backward_rnn.is_composable

    def apply(
        self,
        run: Run,
        x: Array,
        initial_carry: Any = None,
        seq_lengths: Array | None = None,
        **options: Any,
    ) -> Any:
        time_major, return_carry = _chosen(self, options)
        first, second = (None, None) if initial_carry is None else initial_carry
        call = {"time_major": time_major, "return_carry": True}
        forward, ys = self.forward_rnn.apply(run, x, first, seq_lengths, reverse=False, **call)
        backward, zs = self.backward_rnn.apply(
            run, x, second, seq_lengths, reverse=True, keep_order=True, **call
        )
        merged = (
            jnp.concatenate([ys, zs], axis=-1) if self.merge is None else self.merge(ys, zs)
        )
        return ((forward, backward), merged) if return_carry else merged

    @classmethod
    def shaped(cls, forward_rnn: RNN, backward_rnn: RNN, **options: Any) -> Self:
        """Both are specs or modules that hold one."""
        forward, backward = spec_of(forward_rnn, RNN), spec_of(backward_rnn, RNN)
        return cls(forward_rnn=forward, backward_rnn=backward, **options)

    def output_shape(self, shape: Shape | None) -> Shape | None:
        if shape is None or self.time_major or self.return_carry or self.merge is not None:
            return None
        *time, features = self.forward_rnn.cell.state_shape(shape)
        return (*time, features + self.backward_rnn.cell.hidden)


_CHOICES = ("time_major", "return_carry", "reverse", "keep_order")


def _chosen(spec: RNN | Bidirectional, options: dict[str, Any]) -> tuple[bool, ...]:
    """The options of a call, or those of the layer where they are None."""
    names = [name for name in _CHOICES if hasattr(spec, name)]
    if unknown := options.keys() - {*names}:
        raise ArgumentError(
            f"{type(spec).__name__} has no options {', '.join(sorted(unknown))}",
            remedy=f"A call takes {', '.join(names)}",
        )
    given = [options.get(name) for name in names]
    return tuple(
        getattr(spec, name) if value is None else value
        for name, value in zip(names, given, strict=True)
    )


def _as_tuple(state: Any) -> State:
    return tuple(cast("State", state)) if isinstance(state, list | tuple) else (state,)


def _at(states: Array, seq_lengths: Any) -> Array:
    """Of states ``(time, *batch, *hidden)`` the last within each sequence's length."""
    index = ((seq_lengths - 1) % states.shape[0])[None]
    index = index.reshape(*index.shape, *[1] * (states.ndim - index.ndim))
    return jnp.take_along_axis(states, index, 0)[0]
