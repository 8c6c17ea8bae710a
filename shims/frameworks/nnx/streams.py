"""Where the random keys of one call come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from flax.errors import TraceContextError

from interop.errors import ArgumentError, MissingKeyError

__all__ = ["first_carry", "key_source", "named_streams", "no_key", "stream_of"]


def stream_of(rngs: Any) -> Any:
    """The stream that a native dropout layer would draw from.

    Raises:
        ArgumentError: ``rngs`` is something else.
        MissingKeyError: it has no such stream.
    """
    if isinstance(rngs, nnx.RngStream):
        return rngs
    if not isinstance(rngs, nnx.Rngs):
        raise ArgumentError(
            f"rngs must be an nnx.Rngs, got {type(rngs).__qualname__}",
            remedy="Pass rngs=nnx.Rngs(seed)",
        )
    try:
        return rngs["dropout"]
    except (AttributeError, KeyError) as e:
        raise MissingKeyError(
            "rngs has neither a 'dropout' nor a default stream",
            remedy="Pass rngs=nnx.Rngs(seed) or nnx.Rngs(dropout=seed)",
        ) from e


def named_streams(rngs: Any) -> dict[str, Any]:
    """The streams that stand for themselves, beside those that every guest's key comes from."""
    if not isinstance(rngs, nnx.Rngs):
        return {}
    return {name: rngs[name] for name in rngs if name not in ("default", "params", "dropout")}


def key_source(rngs: Any, *, training: bool) -> Callable[[], jax.Array]:
    """Draws the key of one call.

    In training it is drawn at once: the guest may first ask for it inside a trace of its own,
    where a stream cannot advance. In evaluation few guests ask, and the stream stays put. A
    stream that the caller's trace has closed over cannot advance at all; who asks is told so.
    """
    if rngs is None:
        return no_key
    if isinstance(rngs, jax.Array):
        return lambda: rngs
    stream = stream_of(rngs)
    if not training:
        return stream
    try:
        key = stream()
    except TraceContextError:
        return stream
    return lambda: key


def no_key() -> jax.Array:
    """Raise: there is no key.

    Raises:
        MissingKeyError: always.
    """
    raise MissingKeyError(
        "the wrapped layer draws random numbers, and the shim has no key for it",
        remedy="Pass rngs=nnx.Rngs(seed) to ToNNX or to the call, or switch to .eval()",
    )


def first_carry(
    start: Callable[[Callable[[], jax.Array]], Any], rngs: Any, carry_init: Any
) -> Any:
    """What a cell starts from: ``start(draw)``, or ``carry_init`` of each of its arrays."""
    draw = _carry_source(rngs)
    carry = start(draw)
    if carry_init is None:
        return carry
    return jax.tree.map(lambda leaf: carry_init(draw(), leaf.shape, leaf.dtype), carry)


def _carry_source(rngs: Any) -> Callable[[], jax.Array]:
    if rngs is None:
        return no_key
    return rngs.carry if isinstance(rngs, nnx.Rngs) else rngs
