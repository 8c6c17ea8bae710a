"""Weights that are divided by a norm of their own before they are used."""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["spectral_norm", "unit_norm"]

Array = Any


def spectral_norm(
    weight: Array, u: Array, v: Array | None = None, *, steps: int, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest singular value of a matrix, by power iteration.

    Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018. The
    gradient takes both vectors as constants.

    Args:
        weight: ``(..., out)``; all axes but the last are the rows of the matrix.
        u: ``(out,)``, from which the iteration starts where ``v`` is None; vectors are then
            multiplied with ``rsqrt(norm**2 + epsilon)``.
        v: ``(...)``, from which it starts otherwise; vectors are then divided by
            ``max(norm, epsilon)``.
        steps: how often to iterate; at least once if ``v`` is None.
        epsilon: against a division by zero.

    Returns:
        The value ``v @ matrix @ u``, ``u`` and ``v``, in the shapes above.
    """
    matrix = weight.reshape(-1, weight.shape[-1])
    constant = jax.lax.stop_gradient(matrix)
    if v is None:
        for _ in range(steps):
            v = _soft_unit(constant @ u, epsilon)
            u = _soft_unit(v @ constant, epsilon)
    else:
        v = v.reshape(-1)
        for _ in range(steps):
            u = _hard_unit(v @ constant, epsilon)
            v = _hard_unit(constant @ u, epsilon)
    return v @ matrix @ u, u, v.reshape(weight.shape[:-1])  # pyright: ignore


def _soft_unit(x: Array, epsilon: float) -> Array:
    return x * jax.lax.rsqrt((x * x).sum() + epsilon)


def _hard_unit(x: Array, epsilon: float) -> Array:
    return x / jnp.maximum(epsilon, jnp.sqrt((x * x).sum()))


def unit_norm(x: Array, axes: tuple[int, ...], *, epsilon: float) -> Array:
    """``x * rsqrt(sum(x**2) + epsilon)``, summed over all axes but ``axes``.

    Salimans and Kingma, "Weight Normalization", NeurIPS 2016.
    """
    kept = {axis % x.ndim for axis in axes}
    over = tuple(axis for axis in range(x.ndim) if axis not in kept)
    return x * jax.lax.rsqrt((x * x).sum(over, keepdims=True) + epsilon)
