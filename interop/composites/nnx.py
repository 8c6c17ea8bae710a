"""NNX modules for what ``flax.nnx`` lacks. Buffers are ``BatchStat`` variables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from flax import nnx

from .. import specs
from . import core


class Composite(nnx.Module):
    """A layer that is given by its formula.

    Args:
        *args: the sizes that ``spec_type.shaped`` takes, or one spec.
        rngs: streams for the initial arrays, and for what training draws.
        deterministic: whether the layer evaluates; ``.train()`` and ``.eval()`` set it.
        **options: the options that ``spec_type.shaped`` takes.

    Raises:
        ArgumentError: the sizes or options are wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from interop.composites.nnx import Linear
        >>> layer = Linear(3, 4, mask=jnp.zeros((3, 4)), use_bias=False, rngs=nnx.Rngs(0))
        >>> float(jnp.abs(layer(jnp.ones((5, 3)))).max())
        0.0
    """

    spec_type: ClassVar[type[specs.Spec]]

    def __init__(
        self,
        *args: Any,
        rngs: Any = None,
        deterministic: bool = False,
        **options: Any,
    ):
        def key() -> jax.Array:
            return (rngs or nnx.Rngs(0)).params()

        spec = core.construct(self.spec_type, args, options, key)
        self.skeleton: core.Skeleton
        self.skeleton, arrays = core.split(spec)
        buffers = _boxed(self.skeleton.buffers(arrays), nnx.BatchStat)
        trained = _boxed(self.skeleton.trained(arrays), nnx.Param)
        for name, box in core.combine(trained, buffers).items():
            setattr(self, name, nnx.data(box))
        self.deterministic = deterministic
        if spec.random:
            self.rngs: Any = rngs.dropout.fork() if isinstance(rngs, nnx.Rngs) else rngs

    @property
    def spec(self) -> Any:
        """The layer's spec, with the arrays as they are now."""
        arrays = {name: vars(self).get(name) for name in self.skeleton.empty}
        is_box = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
        values = jax.tree.map(lambda box: box.get_value(), arrays, is_leaf=is_box)
        return self.skeleton.merge(values)

    def _run(self, rngs: Any, deterministic: bool | None = None) -> specs.Run:
        rngs = getattr(self, "rngs", None) if rngs is None else rngs
        key = rngs.dropout if isinstance(rngs, nnx.Rngs) else rngs
        evaluates = self.deterministic if deterministic is None else deterministic
        return specs.Run(not evaluates, key)

    def __call__(
        self, *inputs: Any, rngs: Any = None, deterministic: bool | None = None, **options: Any
    ) -> Any:
        """The layer's output for a batch."""
        run, spec = self._run(rngs, deterministic), self.spec
        output = spec.apply(run, *inputs, **options)
        core.assign(vars(self), core.updated(spec, run), nnx.Variable.set_value)
        return output


class Cell(Composite, nnx.RNNCellBase):
    """A recurrent cell that is given by its formula; its carry is as in Flax's own cells.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from interop.composites.nnx import MGUCell
        >>> cell = MGUCell(3, 4, rngs=nnx.Rngs(0))
        >>> nnx.RNN(cell)(jnp.ones((5, 7, 3))).shape
        (5, 7, 4)
    """

    def __call__(self, carry: Any, inputs: Any) -> Any:
        """One step: ``(new carry, output)``."""
        spec = self.spec
        state = spec.step(self._run(None), inputs, core.unpacked(carry, output_last=True))
        return core.packed(state, output_last=True), state[0]

    def initialize_carry(
        self, input_shape: tuple[int, ...], rngs: Any = None, carry_init: Any = None
    ) -> Any:
        """The state before the first step, for inputs of shape ``(*batch, *features)``."""
        spec = self.spec
        if carry_init is not None:
            spec = dataclasses.replace(spec, carry_init=carry_init)
        stream = rngs.carry if isinstance(rngs, nnx.Rngs) else rngs
        key = None if stream is None else stream()
        return core.packed(spec.initial_carry(input_shape, key), output_last=True)

    @property
    def num_feature_axes(self) -> int:
        """The number of axes of an input that are no batch axes."""
        return self.skeleton.shaped.feature_axes


def _boxed(tree: Mapping[str, Any], kind: type[nnx.Variable]) -> dict[str, Any]:
    return jax.tree.map(kind, dict(tree))


COMPOSITES: list[Any] = []
"""Every composite below."""


def _layer(spec_type: type[specs.Spec]) -> Any:
    """The composite of one kind of layer."""
    base = Cell if issubclass(spec_type, specs.Cell) else Composite
    signature = core.signature(spec_type, "rngs", "deterministic")
    COMPOSITES.append(core.subclass(base, spec_type, __name__, __signature__=signature))
    return COMPOSITES[-1]


AllToAll: type[Composite] = _layer(specs.AllToAll)
AlphaDropout: type[Composite] = _layer(specs.AlphaDropout)
BatchNorm: type[Composite] = _layer(specs.BatchNorm)
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
