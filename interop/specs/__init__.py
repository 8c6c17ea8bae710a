"""Neutral layer descriptions. Array layouts are defined here and nowhere else.

A field without a default is always carried. A field with a default is an option, and its
default is the plain behaviour: a builder that cannot express another value does not list the
option in its ``carries``, and the walk then refuses the layer by the option's name.

Shapes name the batch axes ``*batch``; ``x`` is the input of the layer.
"""

from .attention import MultiHeadAttention, RotaryEmbedding
from .base import (
    Array,
    Deferred,
    Run,
    Sequential,
    Shape,
    Spec,
    common_dtype,
    dtype,
    is_wide,
    move_channels,
    moved_axis,
    plain_dtype,
    promoted_dtype,
)
from .connections import AllToAll
from .contractions import Einsum, LinearGeneral
from .convolutions import (
    Conv,
    ConvLocal,
    Convolution,
    ConvTranspose,
    ScaledWSConv,
    flipped,
)
from .embedding import Embedding, FrozenEmbedding
from .functions import Activation, Dropout, Flatten, Function
from .linear import Linear, LoRA, ScaledWSLinear, SignedLinear
from .normalized_weights import NormalizedWeight, SpectralNorm, WeightNorm
from .norms import BatchNorm, GroupNorm, LayerNorm, Norm, RMSNorm
from .recurrent import (
    RNN,
    Bidirectional,
    Cell,
    ConvLSTMCell,
    Gates,
    GRUCell,
    LSTMCell,
    MGUCell,
    SimpleCell,
    URLSTMCell,
)
from .spatial import Pool, pool

__all__ = [
    "Activation",
    "AllToAll",
    "Array",
    "BatchNorm",
    "Bidirectional",
    "Cell",
    "Conv",
    "ConvLSTMCell",
    "ConvLocal",
    "ConvTranspose",
    "Convolution",
    "Deferred",
    "Dropout",
    "Einsum",
    "Embedding",
    "Flatten",
    "FrozenEmbedding",
    "Function",
    "GRUCell",
    "Gates",
    "GroupNorm",
    "LSTMCell",
    "LayerNorm",
    "Linear",
    "LoRA",
    "LinearGeneral",
    "MGUCell",
    "MultiHeadAttention",
    "Norm",
    "NormalizedWeight",
    "Pool",
    "RMSNorm",
    "RNN",
    "RotaryEmbedding",
    "Run",
    "ScaledWSConv",
    "ScaledWSLinear",
    "Sequential",
    "Shape",
    "SignedLinear",
    "SimpleCell",
    "Spec",
    "SpectralNorm",
    "URLSTMCell",
    "WeightNorm",
    "common_dtype",
    "dtype",
    "flipped",
    "is_wide",
    "move_channels",
    "moved_axis",
    "plain_dtype",
    "pool",
    "promoted_dtype",
]
