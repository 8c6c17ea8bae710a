"""The mode of a shim, which is one for all layers of its guest."""

from __future__ import annotations

from collections.abc import Collection

from interop.errors import ArgumentError

from ...core import Kind

__all__ = ["viewed"]


def viewed(
    now: bool,
    deterministic: bool | None,
    use_running_average: bool | None,
    kinds: Collection[Kind],
) -> bool:
    """Whether a view evaluates.

    Args:
        now: whether what it is a view of does.
        deterministic, use_running_average: what ``nnx.view`` was given, or None.
        kinds: those of the guest's arrays.

    Raises:
        ArgumentError: dropout and running statistics would be in different modes.
    """
    mode = now if deterministic is None else deterministic
    if use_running_average not in (None, mode) and Kind.STATISTIC in kinds:
        raise ArgumentError(
            f"use_running_average={use_running_average} with deterministic={mode}: a shim has "
            f"one mode for all layers of its guest",
            remedy="Give nnx.view both, with one value; or leave the shim out by only=",
        )
    return mode
