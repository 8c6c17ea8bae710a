"""Flax NNX. Channels last and batched; layers hold ``nnx.Variable``s and are mutable.

Train or evaluation mode is an attribute of each layer (``deterministic``,
``use_running_average``), which ``.train()`` and ``.eval()`` set. A layer's ``dtype`` is what
its operands are cast to before anything else, and the dtype of its result.
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
    spatial,
)
from .adapter import adapter

__all__ = ["adapter"]
