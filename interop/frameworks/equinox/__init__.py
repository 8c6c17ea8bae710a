"""Equinox. Modules are immutable trees that see one example; ``Linear`` stores ``(out, in)``.

Running statistics live in an ``eqx.nn.State`` outside the module. Train or evaluation mode is
the field ``inference`` of each layer. A tree has no identity: a layer that stands at two places
is two layers once the tree is updated. ``BatchNorm(mode="batch")`` stores its statistics
without the debiasing that it divides out, ``1 - momentum**counter``, in inference.
"""

from . import (
    attention,
    contractions,
    convolutions,
    dropouts,
    embedding,
    functions,
    linear,
    normalized_weights,
    norms,
    recurrent,
    sequential,
    sharing,
    spatial,
)
from .adapter import adapter

__all__ = ["adapter"]
