"""Pure functions for layers that some framework lacks: arrays in, arrays out."""

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

__all__ = [
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
