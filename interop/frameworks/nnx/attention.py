"""Attention and rotary embeddings."""

from __future__ import annotations

import functools
from typing import Any

from flax import nnx
from flax.nnx.nn import dtypes

from ... import specs
from ...walk import Building, Reading
from .adapter import adapter, empty, made


@adapter.reads(
    nnx.MultiHeadAttention,
    specs.MultiHeadAttention,
    state=(
        *("query", "key", "value", "out", "query_ln", "key_ln", "rngs"),
        *("cached_key", "cached_value", "cache_index"),
    ),
    fixed={
        "qkv_promote_dtype": dtypes.promote_dtype,
        "out_promote_dtype": dtypes.promote_dtype,
        "ln_promote_dtype": dtypes.promote_dtype,
        "qkv_dot_general": None,
        "out_dot_general": None,
        "qkv_dot_general_cls": None,
        "out_dot_general_cls": None,
    },
)
def read_attention(m: nnx.MultiHeadAttention, ctx: Reading) -> specs.MultiHeadAttention:
    parts = {name: getattr(m, name) for name in ("query", "key", "value", "out")}
    for name, part in parts.items():
        first = next(other for other, own in parts.items() if own is part)
        if first != name:
            ctx.refuse(name, f"the layer of {first}", "the tie would be lost")
    scales = (m.query_ln, m.key_ln) if m.normalize_qk else (None, None)
    return specs.MultiHeadAttention(
        **{name: _read_part(m, ctx, name) for name in parts},
        query_scale=_head_scale(scales[0], m, ctx),
        key_scale=_head_scale(scales[1], m, ctx),
        rope=_read_rope_of(m.attention_fn, ctx),
        rate=m.dropout_rate,
        broadcast_dropout=m.broadcast_dropout,
        # without dropout NNX calls jax.nn.dot_product_attention
        core="plain" if m.dropout_rate > 0.0 else "fused",
        dtype=specs.dtype(m.dtype),
        precision=m.precision,
        decode=bool(m.decode),
        **(_read_cache(m) if m.decode else {}),
    )


CACHE = ("cached_key", "cached_value", "cache_index")


def _read_cache(m: Any) -> dict[str, Any]:
    """What a run has left so far; it belongs to layers that decode."""
    found = {name: getattr(m, name, None) for name in CACHE}
    return {k: None if v is None else v.get_raw_value() for k, v in found.items()}


def _read_part(m: Any, ctx: Reading, name: str) -> specs.LinearGeneral:
    part = ctx.read(getattr(m, name), f"{ctx.path}.{name}")
    if not isinstance(part, specs.LinearGeneral):
        ctx.refuse(name, type(getattr(m, name)).__qualname__, "only a LinearGeneral converts")
    return part


def _head_scale(norm: Any, m: Any, ctx: Reading) -> Any:
    """The scale of the normalisation that the layer makes by itself."""
    if norm is None:
        return None
    spec: Any = ctx.read(norm, f"{ctx.path}.{'query' if norm is m.query_ln else 'key'}_ln")
    found = (spec.epsilon, spec.reduction_axes, spec.use_fast_variance, spec.output_dtype)
    if spec.bias is not None or found != (1e-6, (-1,), True, specs.dtype(m.dtype)):
        ctx.refuse("normalize_qk", norm, "only the normalisation that it makes itself converts")
    return spec.scale


def _read_rope_of(fn: Any, ctx: Reading) -> Any:
    if fn is nnx.dot_product_attention:
        return None
    with_rope = getattr(nnx, "dot_product_attention_with_rope", None)  # since flax 0.12.9
    is_partial = isinstance(fn, functools.partial) and not fn.args
    if is_partial and fn.func is with_rope and fn.keywords.keys() == {"rope"}:
        return ctx.read(fn.keywords["rope"], f"{ctx.path}.attention_fn.rope")
    return ctx.refuse(
        "attention_fn",
        fn,
        "only nnx.dot_product_attention converts, and dot_product_attention_with_rope in a "
        "functools.partial with its rope",
    )


def check_attention(spec: Any, ctx: Building, core: str) -> None:
    """Refuse what neither NNX nor Linen has."""
    if not spec.agrees_with(core):
        ctx.refuse("core", spec.core, f"Flax computes in the dtypes of {core!r}")
    if not spec.is_uniform:
        ctx.refuse("dtype, precision, axes", "of the parts", "Flax has the same for all")
    if len({part.bias is None for part in spec.parts}) > 1:
        ctx.refuse("use_bias", "of the parts", "Flax has all biases or none")
    if (spec.query_scale is None) != (spec.key_scale is None):
        ctx.refuse(
            "normalize_qk", "of one", "Flax normalises both queries and keys, or neither"
        )
    if spec.value.weight.shape[-1] != spec.depth:
        ctx.refuse("value_depth", spec.value.weight.shape[-1], "Flax has that of the queries")


def attention_options(spec: Any) -> dict[str, Any]:
    """The options that both constructors take."""
    return {
        "dtype": spec.dtype,
        "param_dtype": spec.query.weight.dtype,
        "broadcast_dropout": spec.broadcast_dropout,
        "dropout_rate": spec.rate,
        "precision": spec.precision,
        "use_bias": spec.query.bias is not None,
        "decode": spec.decode,
        "normalize_qk": spec.query_scale is not None,
    }


ATTENTION = ("query_scale", "key_scale", "rate", "broadcast_dropout", "core")


ATTENTION += ("dtype", "precision", "decode", *CACHE)


@adapter.builds(specs.MultiHeadAttention, carries=(*ATTENTION, "rope"))
def build_attention(spec: specs.MultiHeadAttention, ctx: Building) -> nnx.MultiHeadAttention:
    check_attention(spec, ctx, "plain" if spec.rate > 0.0 else "fused")
    key_features, kv_heads, _ = spec.key.weight.shape
    if spec.value.weight.shape[0] != key_features:
        ctx.refuse("value_features", spec.value.weight.shape[0], "NNX has that of the keys")
    scales = {"query_ln.scale": spec.query_scale, "key_ln.scale": spec.key_scale}
    layer = made(
        nnx.MultiHeadAttention,
        spec.heads,
        spec.in_features,
        spec.heads * spec.depth,
        spec.out.weight.shape[-1],
        kv_heads,
        key_features,
        deterministic=True,
        kernel_init=empty,
        bias_init=empty,
        **attention_options(spec),
        keep_rngs=False,
        arrays=_arrays(spec) | scales,
    )
    if spec.rope is not None:
        layer.attention_fn = _attention_fn(spec.rope, ctx)
    for name in CACHE:
        if (array := getattr(spec, name)) is not None:
            setattr(layer, name, nnx.Cache(array))
    rngs = ctx.options.get("rngs")
    if spec.rate > 0.0 and rngs is not None:
        layer.rngs = rngs.dropout.fork() if isinstance(rngs, nnx.Rngs) else rngs
    return layer


def _arrays(spec: Any) -> dict[str, Any]:
    parts = zip(("query", "key", "value", "out"), spec.parts, strict=True)
    return {
        f"{name}.{kind}": array
        for name, part in parts
        for kind, array in (("kernel", part.weight), ("bias", part.bias))
    }


def _attention_fn(rope: Any, ctx: Building) -> Any:
    if _ROPE is None or (rope.table_dtype, rope.keeps_dtype) != (None, False):
        ctx.refuse("rope", rope, "nnx.RoPE rounds nothing, and is new in flax 0.12.9")
    with_rope: Any = vars(nnx)["dot_product_attention_with_rope"]
    return functools.partial(with_rope, rope=build_rope(rope, ctx))


_ROPE: Any = getattr(nnx, "RoPE", None)  # since flax 0.12.9


def build_rope(spec: Any, ctx: Building) -> Any:
    size = None if spec.max_length is None else spec.depth
    return _ROPE(spec.theta, size, spec.max_length)


if _ROPE is not None:
    adapter.builds(specs.RotaryEmbedding, carries=("depth", "theta", "max_length"))(build_rope)

    @adapter.reads(_ROPE, specs.RotaryEmbedding, state=("cached_sin", "cached_cos"))
    def read_rope(m: Any, ctx: Reading) -> specs.RotaryEmbedding:
        length, half = (None, None) if m.cached_sin is None else m.cached_sin.shape
        return specs.RotaryEmbedding(depth=half and 2 * half, theta=m.theta, max_length=length)
