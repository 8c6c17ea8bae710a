"""Equinox modules for what ``equinox.nn`` lacks. Buffers are in an ``eqx.nn.State``."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from .. import specs
from ..errors import ArgumentError
from . import core


class Tied(eqx.nn.StatefulLayer):
    """A stack of which some layers stand at several places, as one layer each.

    Args:
        shared: an ``eqx.nn.Shared`` around an ``eqx.nn.Sequential``.

    Example:
        >>> import equinox as eqx, jax
        >>> from interop.composites.equinox import Tied
        >>> linear = eqx.nn.Linear(3, 3, key=jax.random.key(0))
        >>> stack = eqx.nn.Sequential([linear, linear])
        >>> tied = Tied(eqx.nn.Shared(stack, lambda s: s.layers[1], lambda s: s.layers[0]))
        >>> len(jax.tree.leaves(eqx.filter(tied, eqx.is_array))), tied(jax.numpy.ones(3)).shape
        (2, (3,))
    """

    shared: eqx.nn.Shared

    def __init__(self, shared: eqx.nn.Shared):
        self.shared = shared

    def is_stateful(self) -> bool:
        """Whether a layer of the stack has buffers."""
        return self.shared().is_stateful()

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """What the stack computes, with the same arguments."""
        return self.shared()(*inputs, **options)


class Composite(eqx.nn.StatefulLayer):
    """A layer that is given by its formula. It sees one example, with its channels first.

    A layer with buffers is stateful: it takes ``state=`` and returns ``(output, state)``.

    Args:
        *args: the sizes that ``spec_type.shaped`` takes, or one spec.
        key: a random key for the initial arrays.
        inference: whether the layer evaluates; ``eqx.nn.inference_mode`` sets it.
        **options: the options that ``spec_type.shaped`` takes.

    Raises:
        ArgumentError: the sizes or options are wrong.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop.composites.equinox import Linear
        >>> key, mask = jax.random.key(0), jnp.zeros((3, 4))
        >>> layer = Linear(3, 4, mask=mask, use_bias=False, key=key)
        >>> float(jnp.abs(layer(jnp.ones(3))).max())
        0.0
    """

    spec_type: ClassVar[type[specs.Spec]]
    skeleton: core.Skeleton = eqx.field(static=True)
    buffers: Any
    inference: bool

    def __init__(self, *args: Any, key: Any = None, inference: bool = False, **options: Any):
        def fresh() -> jax.Array:
            return jax.random.key(0) if key is None else key

        spec = core.construct(self.spec_type, args, options, fresh)
        self.skeleton, arrays = core.split(spec)
        buffers = self.skeleton.buffers(arrays)
        self.buffers = eqx.nn.StateIndex(buffers) if buffers else None
        self.inference = inference
        trained = self.skeleton.trained(arrays)
        for name in (*spec.trained, *spec.children):
            setattr(self, name, trained.get(name))

    def is_stateful(self) -> bool:
        """Whether the layer has buffers."""
        return self.buffers is not None

    def spec(self, state: eqx.nn.State | None = None) -> Any:
        """The layer's spec, with its arrays and those of the state."""
        kinds = self.spec_type
        arrays = {name: getattr(self, name) for name in (*kinds.trained, *kinds.children)}
        arrays = {name: value for name, value in arrays.items() if value is not None}
        if self.buffers is not None and state is not None:
            arrays = core.combine(arrays, state.get(self.buffers))
        return self.skeleton.merge(arrays)

    def _run(self, key: Any, inference: bool | None = None) -> specs.Run:
        inference = self.inference if inference is None else inference
        keys = None if key is None else _Keys(key)
        return specs.Run(not inference, keys, axis_name="batch")

    def __call__(
        self,
        *inputs: Any,
        state: eqx.nn.State | None = None,
        key: Any = None,
        inference: bool | None = None,
        **options: Any,
    ) -> Any:
        """The layer's output for one example, and the new state if it has buffers.

        Raises:
            ArgumentError: it has buffers, and ``state`` is not given.
        """
        if inputs and isinstance(inputs[-1], eqx.nn.State):
            *rest, state = inputs
            inputs = tuple(rest)
        if self.buffers is not None and state is None:
            raise ArgumentError(
                f"{type(self).__name__} has buffers, and no state was given",
                remedy="Call it with state=, as eqx.nn.make_with_state makes it",
            )
        spec, run = self.spec(state), self._run(key, inference)

        def formula(*inputs: Any, **options: Any) -> Any:
            return spec.apply(run, *inputs, **options)

        output = core.channels_first(spec, formula)(*inputs, **options)
        if self.buffers is None or state is None:
            return output
        new = core.combine(state.get(self.buffers), core.updated(spec, run))
        return output, state.set(self.buffers, new)


class Cell(Composite):
    """A recurrent cell that is given by its formula, called as Equinox's own cells.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop.composites.equinox import MGUCell
        >>> cell = MGUCell(3, 4, key=jax.random.key(0))
        >>> cell(jnp.ones(3), cell.initialize_carry((3,))).shape
        (4,)
    """

    def __call__(self, input: Any, hidden: Any, *, key: Any = None) -> Any:
        """One step of one example: the new hidden state, whose first array is the output."""
        spec, run = self.spec(), self._run(key, True)

        def step(x: Any, *state: Any) -> Any:
            return spec.step(run, x, state)

        return core.packed(core.channels_first(spec, step)(input, *core.unpacked(hidden)))

    def initialize_carry(self, input_shape: tuple[int, ...], *, key: Any = None) -> Any:
        """The hidden state before the first step, for an input of shape ``input_shape``."""
        spec = self.spec()
        first, *space = input_shape
        state = spec.initial_carry((*space, first), key)
        return core.packed(tuple(jnp.moveaxis(array, -1, 0) for array in state))


class _Keys:
    """A stream of keys from one."""

    def __init__(self, key: jax.Array):
        self._key = key

    def __call__(self) -> jax.Array:
        self._key, fresh = jax.random.split(self._key)
        return fresh


COMPOSITES: list[Any] = []
"""Every composite below."""


def _layer(spec_type: type[specs.Spec]) -> Any:
    """The composite of one kind of layer."""
    base: Any = Cell if issubclass(spec_type, specs.Cell) else Composite

    def __init__(self: Any, *args: Any, **options: Any) -> None:  # noqa: N807
        base.__init__(self, *args, **options)

    parameters = core.signature(spec_type, "key", "inference").parameters.values()
    me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    vars(__init__)["__signature__"] = inspect.Signature([me, *parameters])
    fields = {name: Any for name in (*spec_type.trained, *spec_type.children)}
    COMPOSITES.append(
        core.subclass(base, spec_type, __name__, __init__=__init__, __annotations__=fields)
    )
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
Pool: type[Composite] = _layer(specs.Pool)
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
