"""Neutral layer descriptions. Array layouts are defined here and nowhere else.

A field without a default is always carried. A field with a default is an option, and its
default is the plain behaviour: a builder that cannot express another value does not list the
option in its ``carries``, and the walk then refuses the layer by the option's name.

Shapes name the batch axes ``*batch``; ``x`` is the input of the layer.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .base import (
    Array,
    Deferred,
    Run,
    Sequential,
    Shape,
    Spec,
    common_dtype,
    dtype,
    fields,
    is_split,
    is_wide,
    move_channels,
    moved_axis,
    options,
    plain_dtype,
    promoted_dtype,
)

if TYPE_CHECKING:
    from .attention import MultiHeadAttention, RotaryEmbedding
    from .connections import AllToAll, FixedNumConn, SparseLinear
    from .contractions import Einsum, LinearGeneral
    from .convolutions import (
        Conv,
        ConvLocal,
        Convolution,
        ConvTranspose,
        ScaledWSConv,
        flipped,
    )
    from .dropouts import AlphaDropout, Dropout, DropoutFixed
    from .embedding import Embedding, FrozenEmbedding
    from .functions import (
        Activation,
        Flatten,
        Formula,
        Function,
        PReLU,
        SpikeBitwise,
        Unflatten,
        known_function,
    )
    from .linear import Linear, LoRA, ScaledWSLinear, SignedLinear
    from .normalized_weights import NormalizedWeight, SpectralNorm, WeightNorm
    from .norms import CENTRED, BatchNorm, GroupNorm, LayerNorm, Norm, RMSNorm
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
    from .spatial import AdaptivePool, MaxUnpool, Pad, Pool, pool

__all__ = [
    "CENTRED",
    "Activation",
    "AdaptivePool",
    "AllToAll",
    "AlphaDropout",
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
    "DropoutFixed",
    "Einsum",
    "Embedding",
    "FixedNumConn",
    "Flatten",
    "Formula",
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
    "MaxUnpool",
    "MultiHeadAttention",
    "Norm",
    "NormalizedWeight",
    "PReLU",
    "Pad",
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
    "SparseLinear",
    "Spec",
    "SpectralNorm",
    "SpikeBitwise",
    "URLSTMCell",
    "Unflatten",
    "WeightNorm",
    "common_dtype",
    "dtype",
    "fields",
    "flipped",
    "is_split",
    "is_wide",
    "known_function",
    "move_channels",
    "moved_axis",
    "options",
    "plain_dtype",
    "pool",
    "promoted_dtype",
]

_FILES = (
    "attention",
    "connections",
    "contractions",
    "convolutions",
    "dropouts",
    "embedding",
    "functions",
    "linear",
    "normalized_weights",
    "norms",
    "recurrent",
    "spatial",
)


def __getattr__(name: str) -> Any:
    """The layers are loaded at first use: Python compiles methods for each dataclass."""
    if name in __all__:
        for file in _FILES:
            module = import_module(f"{__name__}.{file}")
            globals().update({key: getattr(module, key) for key in module.__all__})
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
