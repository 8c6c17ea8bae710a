"""BrainState layers for what ``brainstate.nn`` lacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import brainstate
import jax

from .. import specs
from . import core


class Lambda(brainstate.nn.ElementWiseBlock):
    """A plain function as a module, where ``brainstate.nn.Sequential`` needs a module.

    Args:
        fn: a function of one array, without weights of its own.

    Example:
        >>> import jax.numpy as jnp
        >>> from interop.composites.brainstate import Lambda
        >>> Lambda(jnp.sin)(jnp.zeros(2)).tolist()
        [0.0, 0.0]
    """

    def __init__(self, fn: Callable[[Any], Any]):
        super().__init__()
        self.fn = fn

    def update(self, x: jax.Array) -> Any:
        """Return ``fn(x)``."""
        return self.fn(x)


@dataclasses.dataclass(frozen=True)
class StateInit:
    """A state initialiser for BrainState's cells from one that takes a key.

    Attributes:
        fn: ``(key, shape, dtype) -> array``.
        dtype: what it is given.

    Example:
        >>> import jax
        >>> from interop.composites.brainstate import StateInit
        >>> StateInit(jax.nn.initializers.ones, "float32")((2,)).tolist()
        [1.0, 1.0]
    """

    fn: Callable[..., Any]
    dtype: Any

    def __call__(self, shape: Any, **_: Any) -> Any:
        """The state, with a key of ``brainstate.random``."""
        return self.fn(brainstate.random.split_key(), tuple(shape), self.dtype)


class Composite(brainstate.nn.Module):
    """A layer that is given by its formula. Its mode is ``brainstate.environ``'s ``fit``.

    Args:
        *args: the sizes that ``spec_type.shaped`` takes, or one spec.
        **options: the options that ``spec_type.shaped`` takes.

    Raises:
        ArgumentError: the sizes or options are wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> from interop.composites.brainstate import GRUCell
        >>> cell = GRUCell(3, 4, use_bias_n=True)
        >>> cell.init_state(5)
        >>> cell(jnp.ones((5, 3))).shape
        (5, 4)
    """

    spec_type: ClassVar[type[specs.Spec]]

    def __init__(self, *args: Any, **options: Any):
        super().__init__()
        spec = core.construct(self.spec_type, args, options, brainstate.random.split_key)
        self.skeleton: core.Skeleton
        self.skeleton, arrays = core.split(spec)
        trained = jax.tree.map(brainstate.ParamState, self.skeleton.trained(arrays))
        buffers = jax.tree.map(brainstate.BatchState, self.skeleton.buffers(arrays))
        for attribute, states in core.combine(trained, buffers).items():
            setattr(self, attribute, states)

    @property
    def spec(self) -> Any:
        """The layer's spec, with the arrays as they are now."""
        states = {name: getattr(self, name) for name in self.skeleton.empty}
        is_state = lambda x: isinstance(x, brainstate.State)  # noqa: E731
        return self.skeleton.merge(jax.tree.map(lambda s: s.value, states, is_leaf=is_state))

    def _run(self, spec: specs.Spec) -> specs.Run:
        train = spec.has_modes and brainstate.environ.get("fit", desc="whether layers train")
        return specs.Run(train, brainstate.random.split_key)

    def update(self, *inputs: Any, **options: Any) -> Any:
        """The layer's output for a batch.

        Raises:
            KeyError: the layer's training differs from its evaluation, and ``fit`` is not set.
        """
        spec = self.spec
        run = self._run(spec)
        output = spec.apply(run, *inputs, **options)
        core.assign(vars(self), core.updated(spec, run), _put)
        return output


class Cell(Composite, brainstate.nn.RNNCell):
    """A recurrent cell that is given by its formula; its state is made by ``init_state``.

    Example:
        >>> import jax.numpy as jnp
        >>> from interop.composites.brainstate import SimpleCell
        >>> cell = SimpleCell(3, 4)
        >>> cell.init_state(5)
        >>> cell(jnp.ones((5, 3))).shape
        (5, 4)
    """

    spec_type: ClassVar[type[specs.Cell]]  # pyright: ignore[reportIncompatibleVariableOverride]

    def init_state(
        self, batch_size: int | None = None, *, input_shape: Any = None, **_: Any
    ) -> None:
        """Make the hidden states, for so many examples, or for one without an axis.

        Args:
            batch_size: the number of examples, or None.
            input_shape: the shape of one input without its batch axis, where the states'
                depend on it.
        """
        state = self._initial(batch_size, input_shape)
        for name, value in zip(self.spec_type.carry, state, strict=True):
            setattr(self, name, brainstate.HiddenState(value))

    def reset_state(
        self, batch_size: int | None = None, *, input_shape: Any = None, **_: Any
    ) -> None:
        """Set the hidden states to what ``init_state`` makes."""
        state = self._initial(batch_size, input_shape)
        for name, value in zip(self.spec_type.carry, state, strict=True):
            getattr(self, name).value = value

    def _initial(self, batch_size: int | None, input_shape: Any) -> tuple[Any, ...]:
        spec = self.spec
        features = spec.in_shape if input_shape is None else input_shape
        batch = () if batch_size is None else (batch_size,)
        key = None if spec.carry_init is None else brainstate.random.split_key()
        return spec.initial_carry((*batch, *features), key)

    def update(self, x: Any) -> Any:
        """One step: the output."""
        states = [getattr(self, name) for name in self.spec_type.carry]
        spec = self.spec
        state = spec.step(self._run(spec), x, tuple(s.value for s in states))
        for old, new in zip(states, state, strict=True):
            old.value = new
        return state[0]


def _put(state: brainstate.State, value: Any) -> None:
    state.value = value


COMPOSITES: list[Any] = []
"""Every composite below."""


def _layer(spec_type: type[specs.Spec]) -> Any:
    """The composite of one kind of layer."""
    base = Cell if issubclass(spec_type, specs.Cell) else Composite
    signature = core.signature(spec_type)
    COMPOSITES.append(core.subclass(base, spec_type, __name__, __signature__=signature))
    return COMPOSITES[-1]


AllToAll: type[Composite] = _layer(specs.AllToAll)
AlphaDropout: type[Composite] = _layer(specs.AlphaDropout)
BatchNorm: type[Composite] = _layer(specs.BatchNorm)
Bidirectional: type[Composite] = _layer(specs.Bidirectional)
Conv: type[Composite] = _layer(specs.Conv)
ConvLSTMCell: type[Cell] = _layer(specs.ConvLSTMCell)
ConvLocal: type[Composite] = _layer(specs.ConvLocal)
ConvTranspose: type[Composite] = _layer(specs.ConvTranspose)
Dropout: type[Composite] = _layer(specs.Dropout)
DropoutFixed: type[Composite] = _layer(specs.DropoutFixed)
Einsum: type[Composite] = _layer(specs.Einsum)
Embedding: type[Composite] = _layer(specs.Embedding)
FixedNumConn: type[Composite] = _layer(specs.FixedNumConn)
FrozenEmbedding: type[Composite] = _layer(specs.FrozenEmbedding)
GRUCell: type[Cell] = _layer(specs.GRUCell)
GroupNorm: type[Composite] = _layer(specs.GroupNorm)
LSTMCell: type[Cell] = _layer(specs.LSTMCell)
LayerNorm: type[Composite] = _layer(specs.LayerNorm)
Linear: type[Composite] = _layer(specs.Linear)
LinearGeneral: type[Composite] = _layer(specs.LinearGeneral)
LoRA: type[Composite] = _layer(specs.LoRA)
MGUCell: type[Cell] = _layer(specs.MGUCell)
MaxUnpool: type[Composite] = _layer(specs.MaxUnpool)
MultiHeadAttention: type[Composite] = _layer(specs.MultiHeadAttention)
PReLU: type[Composite] = _layer(specs.PReLU)
RMSNorm: type[Composite] = _layer(specs.RMSNorm)
RNN: type[Composite] = _layer(specs.RNN)
RotaryEmbedding: type[Composite] = _layer(specs.RotaryEmbedding)
ScaledWSConv: type[Composite] = _layer(specs.ScaledWSConv)
ScaledWSLinear: type[Composite] = _layer(specs.ScaledWSLinear)
SignedLinear: type[Composite] = _layer(specs.SignedLinear)
SimpleCell: type[Cell] = _layer(specs.SimpleCell)
SparseLinear: type[Composite] = _layer(specs.SparseLinear)
SpectralNorm: type[Composite] = _layer(specs.SpectralNorm)
SpikeBitwise: type[Composite] = _layer(specs.SpikeBitwise)
URLSTMCell: type[Cell] = _layer(specs.URLSTMCell)
WeightNorm: type[Composite] = _layer(specs.WeightNorm)
