"""Flax Linen. Channels last and batched; modules are frozen dataclasses without arrays.

A node is the module and its part of the variables, ``{collection: {name: array}}``. The
layers of a ``Sequential`` find theirs under ``layers_0``, ``layers_1``, …; a module used twice
under the name of its first place. Train or evaluation mode is a field of each layer, which
``Sequential`` cannot forward. A layer's ``dtype`` is what its operands are cast to in
``Dense``, and only the dtype of the result in the normalisations.
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
    variables,
)
from .adapter import adapter

__all__ = ["adapter"]
