"""Tables that are indexed with integers."""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from .. import formulas
from .base import Array, DType, Run, Shape, Spec, mismatches_of

__all__ = ["Embedding", "FrozenEmbedding"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Embedding(Spec):
    """``y = weight[x]``, for integers ``x`` in ``[0, number)``.

    Shapes:
        x       (*batch,)
        weight  (number, *features)
        y       (*batch, *features)

    Options:
        padding_idx         a row that is not trained, nor shortened; or None
        max_norm            rows of a larger norm are shortened to it in the result, while
                            gradients are those of the rows as they are; or None
        norm_type           the order of that norm
        scale_grad_by_freq  whether the gradient of a row is divided by how often the batch has
                            it; modules of one example count over the axis ``"batch"``
        dtype               what the result is cast to; None means the weight's

    A larger index is that of the last row, without a gradient. A framework's own layer may
    differ there.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.Embedding.shaped(10, 4).initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.array([1, 7])).shape
        (2, 4)
    """

    weight: Array
    padding_idx: int | None = None
    max_norm: float | None = None
    norm_type: float = 2.0
    scale_grad_by_freq: bool = False
    dtype: DType | None = None

    trained: ClassVar[tuple[str, ...]] = ("weight",)
    takes_integers = True

    def apply(self, run: Run, x: Array) -> Array:
        return formulas.embed(
            x,
            self.weight,
            padding_idx=self.padding_idx,
            max_norm=self.max_norm,
            norm_type=self.norm_type,
            scale_grad_by_freq=self.scale_grad_by_freq,
            axis_name=run.axis_name,
            dtype=self.dtype,
        )

    @classmethod
    def shaped(
        cls,
        num_embeddings: int,
        features: int | tuple[int, ...],
        *,
        param_dtype: DType = jnp.float32,
        **options: Any,
    ) -> Self:
        sizes = (features,) if isinstance(features, int) else tuple(features)
        return cls(
            weight=jax.ShapeDtypeStruct((num_embeddings, *sizes), param_dtype), **options
        )

    @property
    def example_shape(self) -> Shape:
        return ()

    @property
    def edge(self) -> str:
        return "a too large index gives the last row, without a gradient"

    @property
    def holds_state(self) -> bool:
        return True

    def output_shape(self, shape: Shape | None) -> Shape | None:
        return None if shape is None else (*shape, *self.weight.shape[1:])

    def mismatches(self) -> list[str]:
        return mismatches_of(weight=(self.weight, None))


@dataclass(frozen=True, eq=False, kw_only=True)
class FrozenEmbedding(Embedding):
    """:class:`Embedding` whose table is no parameter: optimisers do not see it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.FrozenEmbedding.shaped(10, 4).initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.array([1, 7])).shape
        (2, 4)
    """

    trained: ClassVar[tuple[str, ...]] = ()
    buffers: ClassVar[tuple[str, ...]] = ("weight",)

    @property
    def has_modes(self) -> bool:
        return False

    def apply(self, run: Run, x: Array) -> Array:
        return jax.lax.stop_gradient(super().apply(run, x))
