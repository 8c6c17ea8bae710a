"""Where the random keys of one call come from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from typing import Any

import jax
from flax import nnx

from interop.errors import ArgumentError, MissingKeyError

from ...core import is_traced

__all__ = ["drawing", "first_carry", "named_streams", "no_key", "stream_of"]


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


@contextlib.contextmanager
def drawing(
    rngs: Any, named: Mapping[str, Any] | None = None, *, training: bool
) -> Generator[tuple[Callable[[], jax.Array], dict[str, jax.Array]]]:
    """Draws the keys of one call: what draws that of the guest, and those of streams by name.

    The streams advance by the calls that draw from them and do not raise. One that the caller's
    trace has closed over cannot, which is then an error.
    """
    counts = [(stream, stream.count.get_value()) for stream in (named or {}).values()]
    try:
        keys = {n: s() for n, s in (named or {}).items()} if training else {}
        if rngs is None or isinstance(rngs, jax.Array):
            yield no_key if rngs is None else lambda: rngs, keys
        else:
            with _peeking(stream_of(rngs)) as draw:
                yield draw, keys
    except BaseException:
        for stream, count in counts:
            if stream.count.get_value() is not count:
                stream.count.set_value(count)
        raise


@contextlib.contextmanager
def _peeking(stream: Any) -> Generator[Callable[[], jax.Array]]:
    """Draws the next key of a stream, which advances afterwards, if it was asked for.

    A guest may ask inside a trace of its own, and the key must be no value of that.
    """
    key, count = stream.key.get_value(), stream.count.get_value()
    known = jax.random.fold_in(key, count) if is_traced((key, count)) else None
    asked: list[bool] = []

    def draw() -> jax.Array:
        asked.append(True)
        if known is not None:
            return known
        with jax.ensure_compile_time_eval():
            return jax.random.fold_in(key, count)

    yield draw
    if asked:
        stream.count.set_value(count + 1)


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
