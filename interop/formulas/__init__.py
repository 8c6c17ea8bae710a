"""Pure functions for layers that some framework lacks: arrays in, arrays out."""

from .attention import attention, head_norm, rotate
from .contractions import einsum, einsum_bias_shape, linear_general
from .functions import (
    ACTIVATIONS,
    Batched,
    Moved,
    Single,
    activation_defaults,
    activation_name,
    complement,
    flatten,
    hard_shrink,
    hard_tanh,
    identity,
    relu6,
    soft_shrink,
    softmin,
    tanh_shrink,
    threshold,
)
from .layers import batch_norm, dropout, linear, lstm_step, moments, promote

__all__ = [
    "attention",
    "einsum",
    "einsum_bias_shape",
    "head_norm",
    "linear_general",
    "rotate",
    "batch_norm",
    "dropout",
    "linear",
    "lstm_step",
    "moments",
    "promote",
    "ACTIVATIONS",
    "Batched",
    "Moved",
    "Single",
    "activation_defaults",
    "activation_name",
    "complement",
    "flatten",
    "hard_shrink",
    "hard_tanh",
    "identity",
    "relu6",
    "soft_shrink",
    "softmin",
    "tanh_shrink",
    "threshold",
]
