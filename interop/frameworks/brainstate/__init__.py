"""BrainState. Channels last and batched; a layer packs its arrays in one ``ParamState``.

Train or evaluation mode is ``brainstate.environ``'s ``fit``, so that modules carry no flag.
Dropout's ``prob`` is the probability to keep. Normalisation layers round ``epsilon`` and
``momentum`` to their dtype and cast their result to it.
"""

from . import (
    connections,
    contractions,
    convolutions,
    dropouts,
    embedding,
    functions,
    linear,
    norms,
    recurrent,
    sequential,
    spatial,
)
from .adapter import adapter

__all__ = ["adapter"]
