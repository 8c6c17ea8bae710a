"""Attention, and the rotation of its heads by their positions."""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from .. import formulas
from ..errors import ArgumentError
from .base import Array, DType, Run, Shape, Spec, mismatches_of
from .contractions import LinearGeneral

__all__ = ["MultiHeadAttention", "RotaryEmbedding"]


@dataclass(frozen=True, eq=False, kw_only=True)
class RotaryEmbedding(Spec):
    """Each pair of elements is turned by its position: :func:`interop.formulas.rotate`.

    Shapes:
        x          (*batch, length, depth), with an even depth
        input_positions
                   (length,) or (*batch, length); by default ``0, 1, ...``

    ``depth`` is None where any will do. ``table_dtype`` is what sines and cosines are rounded
    to, and ``keeps_dtype`` whether the result has the dtype of ``x``, and not the common one.
    ``max_length`` is for how many positions some frameworks keep a table; None for none.

    Example:
        >>> import jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.RotaryEmbedding(depth=4)
        >>> spec.apply(specs.Run(), jnp.ones((7, 2, 4))).shape
        (7, 2, 4)
    """

    depth: int | None = None
    theta: float = 10000.0
    table_dtype: DType | None = None
    keeps_dtype: bool = False
    max_length: int | None = None

    keeps_shape = True
    least_axes = 2

    def apply(self, run: Run, x: Array, input_positions: Array | None = None) -> Array:
        return formulas.rotate(
            x,
            input_positions,
            theta=self.theta,
            table_dtype=self.table_dtype,
            keeps_dtype=self.keeps_dtype,
        )

    @classmethod
    def shaped(cls, depth: int | None = None, **options: Any) -> Self:
        return cls(depth=depth, **options)

    @property
    def in_features(self) -> int | None:
        return self.depth


@dataclass(frozen=True, eq=False, kw_only=True)
class MultiHeadAttention(Spec):
    """``out(attention(query(inputs_q), key(inputs_k), value(inputs_v), mask))``.

    Shapes:
        inputs_q        (*batch, length, in)
        inputs_k        (*batch, source, key_in); by default ``inputs_q``
        inputs_v        (*batch, source, value_in); by default ``inputs_k``
        mask            what broadcasts to (*batch, heads, length, source); 0 hides a key
        query.weight    (in, heads, depth)
        key.weight      (key_in, kv_heads, depth)
        value.weight    (value_in, kv_heads, value_depth)
        out.weight      (heads, value_depth, out)
        query_scale,
        key_scale       (depth,) or None: of a normalisation of each head
        y               (*batch, length, out)

    The formula, and what ``core`` is, are those of :func:`interop.formulas.attention`. A query
    that sees no key gets the mean of all values. ``dtype`` is what the operands are cast to;
    None means their common dtype. In training, each of the weights of the values is dropped
    with probability ``rate``; ``broadcast_dropout`` shares the decisions between examples and
    heads. ``rope`` turns the heads of queries and keys by their positions.

    With ``decode``, each call takes one step of a sequence. Its key and value go into
    ``cached_key`` and ``cached_value``, ``(*batch, max_length, kv_heads, depth)``, at
    ``cache_index``, an integer that each call moves on; what is beyond it is hidden.

    A call takes ``is_causal`` as well, which hides the keys after each query; and
    ``process_heads``, which maps the heads of query, key and value to those that are used.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.MultiHeadAttention.shaped(2, 4).initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.ones((5, 7, 4))).shape
        (5, 7, 4)
    """

    query: LinearGeneral
    key: LinearGeneral
    value: LinearGeneral
    out: LinearGeneral
    query_scale: Array | None = None
    key_scale: Array | None = None
    rope: RotaryEmbedding | None = None
    rate: float = 0.0
    broadcast_dropout: bool = False
    core: str = "plain"
    dtype: DType | None = None
    precision: Any = None
    decode: bool = False
    cached_key: Array | None = None
    cached_value: Array | None = None
    cache_index: Array | None = None

    trained: ClassVar[tuple[str, ...]] = ("query_scale", "key_scale")
    buffers: ClassVar[tuple[str, ...]] = ("cached_key", "cached_value", "cache_index")
    children: ClassVar[tuple[str, ...]] = ("query", "key", "value", "out", "rope")
    least_axes = 2

    def apply(
        self,
        run: Run,
        inputs_q: Array,
        inputs_k: Array | None = None,
        inputs_v: Array | None = None,
        mask: Array | None = None,
        *,
        is_causal: bool = False,
        process_heads: Callable[..., tuple[Array, Array, Array]] | None = None,
    ) -> Array:
        if inputs_k is None and inputs_v is not None:
            raise ArgumentError(
                "inputs_v is given without inputs_k",
                remedy="Pass inputs_k, which may stand for both",
            )
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        query = self._normalized(self.query.apply(run, inputs_q), self.query_scale)
        key = self._normalized(self.key.apply(run, inputs_k), self.key_scale)
        value = self.value.apply(run, inputs_v)
        if process_heads is not None:
            query, key, value = process_heads(query, key, value)
        if self.decode:
            key, value, mask = self._decoded(run, key, value, mask)
        if self.rope is not None:
            query, key = (_turned(self.rope, run, heads) for heads in (query, key))
        if self.core != "float32":
            query, key, value = formulas.promote(query, key, value, dtype=self.dtype)
        if is_causal:
            causal = jnp.tri(query.shape[-3], key.shape[-3], dtype=bool)
            mask = causal if mask is None else jnp.logical_and(mask, causal)
        drops = run.train and self.rate > 0.0
        heads = formulas.attention(
            query,
            key,
            value,
            mask,
            core=self.core,
            precision=self.precision,
            drop=self._drop(run) if drops else None,
        )
        return self.out.apply(run, heads)

    def _decoded(
        self, run: Run, key: Array, value: Array, mask: Array | None
    ) -> tuple[Array, Array, Array]:
        """All keys and values with this step's, and a mask that hides those still to come."""
        keys, values, index = self.cached_key, self.cached_value, self.cache_index
        if keys is None or values is None or index is None:
            raise ArgumentError(
                "this layer decodes step by step, and has no cache of keys",
                remedy="Make the cache before the layer is converted",
            )
        *batch, length, heads, depth = keys.shape
        if key.shape != (*batch, 1, heads, depth):
            raise ArgumentError(
                f"one step has keys of shape {(*batch, 1, heads, depth)}, got {key.shape}",
                remedy="Pass one step of the batch that the cache was made for",
            )
        none = jnp.zeros_like(index)
        start = (*[none] * len(batch), index, none, none)
        keys = jax.lax.dynamic_update_slice(keys, key, start)
        values = jax.lax.dynamic_update_slice(values, value, start)
        run.update(self, cached_key=keys, cached_value=values, cache_index=index + 1)
        seen = jnp.arange(length) <= index
        return keys, values, seen if mask is None else jnp.logical_and(mask, seen)

    def _normalized(self, heads: Array, scale: Array | None) -> Array:
        if scale is None:
            return heads
        dtype = jnp.result_type(heads, scale) if self.dtype is None else self.dtype
        return formulas.head_norm(heads, scale, epsilon=1e-6, dtype=dtype)

    def _drop(self, run: Run) -> Callable[[jax.Array], jax.Array]:
        key = run.key()

        def drop(weights: jax.Array) -> jax.Array:
            shared = tuple(range(weights.ndim - 2)) if self.broadcast_dropout else ()
            return formulas.dropout(weights, key, rate=self.rate, broadcast_dims=shared)

        return drop

    @classmethod
    def shaped(
        cls,
        num_heads: int,
        in_features: int,
        *,
        key_features: int | None = None,
        value_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        depth: int | None = None,
        value_depth: int | None = None,
        use_bias: bool = True,
        normalize_qk: bool = False,
        param_dtype: DType = jnp.float32,
        **options: Any,
    ) -> Self:
        depth = in_features // num_heads if depth is None else depth
        value_depth = depth if value_depth is None else value_depth
        key_features = in_features if key_features is None else key_features
        value_features = key_features if value_features is None else value_features
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        scale = jax.ShapeDtypeStruct((depth,), param_dtype) if normalize_qk else None

        def part(n_in: Any, n_out: Any, **more: Any) -> LinearGeneral:
            shared = {name: options.get(name) for name in ("dtype", "precision")}
            return LinearGeneral.shaped(
                n_in, n_out, use_bias=use_bias, param_dtype=param_dtype, **shared, **more
            )

        return cls(
            query=part(in_features, (num_heads, depth)),
            key=part(key_features, (kv_heads, depth)),
            value=part(value_features, (kv_heads, value_depth)),
            out=part((num_heads, value_depth), out_features or in_features, axes=(-2, -1)),
            query_scale=scale,
            key_scale=scale,
            **options,
        )

    @property
    def random(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rate > 0.0

    @property
    def has_modes(self) -> bool:
        return self.random

    @property
    def of_batch(self) -> str | None:
        return "decode" if self.decode else None

    @property
    def parts(self) -> tuple[LinearGeneral, ...]:
        """The four layers within."""
        return self.query, self.key, self.value, self.out

    @property
    def heads(self) -> int:
        """The number of heads of the query."""
        return self.query.weight.shape[1]

    @property
    def depth(self) -> int:
        """The features of each head of query and key."""
        return self.query.weight.shape[2]

    @property
    def is_uniform(self) -> bool:
        """Whether the four layers within are the usual ones, with this layer's own options."""
        usual = [(-1,), (-1,), (-1,), (-2, -1)]
        return all(
            tuple(sorted(part.axes)) == axes
            and not part.batch_axes
            and part.preferred_element_type is None
            and (part.dtype, part.precision) == (self.dtype, self.precision)
            for part, axes in zip(self.parts, usual, strict=True)
        )

    def agrees_with(self, core: str) -> bool:
        """Whether ``core`` gives the same result.

        In float32 all agree to rounding, where no precision is asked for.
        """
        dtypes = {self.dtype or part.weight.dtype for part in self.parts}
        is_single = dtypes == {jnp.dtype(jnp.float32)} and self.precision is None
        return self.core == core or is_single

    @property
    def holds_state(self) -> bool:
        return True

    @property
    def in_features(self) -> int:
        return self.query.weight.shape[0]

    def output_shape(self, shape: Shape | None) -> Shape | None:
        return None if shape is None else (*shape[:-1], self.out.weight.shape[-1])

    def mismatches(self) -> list[str]:
        _, heads, depth = self.query.weight.shape
        _, kv_heads, value_depth = self.value.weight.shape
        wanted = mismatches_of(
            key=(self.key.weight, (self.key.weight.shape[0], kv_heads, depth)),
            out=(self.out.weight, (heads, value_depth, self.out.weight.shape[-1])),
            query_scale=(self.query_scale, (depth,)),
            key_scale=(self.key_scale, (depth,)),
        )
        parts = [line for part in self.parts for line in part.mismatches()]
        return parts + wanted


def _turned(rope: RotaryEmbedding, run: Run, heads: Array) -> Array:
    """Heads ``(*batch, length, heads, depth)``, each turned by itself."""
    return rope.apply(run, heads.swapaxes(-2, -3)).swapaxes(-2, -3)
