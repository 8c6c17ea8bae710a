"""Linen modules for what ``flax.linen`` lacks. Buffers are in ``batch_stats``."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax

from .. import specs
from . import core


class Composite(nn.Module):
    """A layer that is given by its formula.

    Args:
        *args: the sizes that ``spec_type.shaped`` takes, or one spec, whose arrays only lend
            their shapes.
        deterministic: whether the layer evaluates; the call takes it as well.
        **options: the options that ``spec_type.shaped`` takes.

    Raises:
        ArgumentError: the sizes or options are wrong.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop.composites.linen import Linear
        >>> layer, x = Linear(3, 4, mask=jnp.zeros((3, 4)), use_bias=False), jnp.ones((5, 3))
        >>> float(jnp.abs(layer.apply(layer.init(jax.random.key(0), x), x)).max())
        0.0
    """

    spec_type: ClassVar[type[specs.Spec]]
    skeleton: core.Skeleton | None = None
    deterministic: bool | None = None

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        fields = {"skeleton", "deterministic", "name", "parent"}
        made: Any = cls
        init = made.__init__

        @functools.wraps(init)
        def construct(self: Any, *args: Any, **given: Any) -> None:
            own = {name: given.pop(name) for name in fields & given.keys()}
            if "skeleton" not in own:
                spec = core.construct(cls.spec_type, args, given, None)
                own["skeleton"] = core.split(spec)[0]
            init(self, **own)

        made.__init__ = construct

    @nn.compact
    def spec(self) -> Any:
        """The layer's spec, with the arrays of the variables in scope."""
        skeleton: Any = self.skeleton

        def initial(key: jax.Array) -> core.Tree:
            return core.split(skeleton.shaped.initial(key))[1]

        arrays: core.Tree = {}
        for name in skeleton.trained(skeleton.empty):
            arrays[name] = self.param(
                name, lambda key, n=name: skeleton.trained(initial(key))[n]
            )
        for name in skeleton.buffers(skeleton.empty):
            held = self.variable(
                "batch_stats",
                name,
                lambda n=name: skeleton.buffers(initial(jax.random.key(0)))[n],
            )
            arrays = core.combine(arrays, {name: held.value})
        return skeleton.merge(arrays)

    def _run(self, spec: specs.Spec, deterministic: bool | None) -> specs.Run:
        if deterministic is None:
            deterministic = self.deterministic
        if deterministic is None:
            deterministic = not spec.has_modes or nn.merge_param("deterministic", None, None)
        return specs.Run(not deterministic, lambda: self.make_rng("dropout"))

    @nn.compact
    def __call__(self, *inputs: Any, deterministic: bool | None = None, **options: Any) -> Any:
        """The layer's output for a batch."""
        spec = self.spec()
        run = self._run(spec, deterministic)
        output = spec.apply(run, *inputs, **options)
        if not self.is_initializing():
            for name, value in core.updated(spec, run).items():
                old = self.get_variable("batch_stats", name)
                new = core.combine({name: old}, {name: value})[name]
                self.put_variable("batch_stats", name, new)
        return output


class Cell(Composite, nn.RNNCellBase):
    """A recurrent cell that is given by its formula; its carry is as in Flax's own cells.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> from interop.composites.linen import URLSTMCell
        >>> xs, rnn = jnp.ones((5, 7, 3)), nn.RNN(URLSTMCell(3, 4))
        >>> rnn.apply(rnn.init(jax.random.key(0), xs), xs).shape
        (5, 7, 4)
    """

    @nn.compact
    def __call__(self, carry: Any, inputs: Any) -> Any:
        """One step: ``(new carry, output)``."""
        spec = self.spec()
        run = self._run(spec, True)
        state = spec.step(run, inputs, core.unpacked(carry, output_last=True))
        return core.packed(state, output_last=True), state[0]

    @nn.nowrap
    def initialize_carry(self, rng: Any, input_shape: tuple[int, ...]) -> Any:
        """The state before the first step, for inputs of shape ``(*batch, *features)``."""
        skeleton: Any = self.skeleton
        spec = skeleton.shaped
        return core.packed(spec.initial_carry(input_shape, rng), output_last=True)

    @property
    def num_feature_axes(self) -> int:
        """The number of axes of an input that are no batch axes."""
        skeleton: Any = self.skeleton
        return skeleton.shaped.feature_axes


COMPOSITES: list[Any] = []
"""Every composite below."""


def _layer(spec_type: type[specs.Spec]) -> Any:
    """The composite of one kind of layer."""
    base = Cell if issubclass(spec_type, specs.Cell) else Composite
    signature = core.signature(spec_type, "deterministic", "name", "parent")
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
