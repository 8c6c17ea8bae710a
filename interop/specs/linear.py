"""Layers that multiply with a matrix."""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from .. import formulas
from .base import Array, DType, Run, Shape, Spec, mismatches_of, rows

__all__ = ["Linear", "ScaledWSLinear", "SignedLinear"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Linear(Spec):
    """``y = x @ weight + bias``.

    Shapes:
        x       (*batch, in)
        weight  (in, out)
        bias    (out,) or None
        mask    (in, out) or None, multiplied with the weight

    Options: ``dtype`` is what the operands are cast to; None means their common dtype.
    ``leading_shape`` is that of the axes of one example before the last.
    """

    weight: Array
    bias: Array | None
    leading_shape: Shape = ()
    mask: Array | None = None
    dtype: DType | None = None
    precision: Any = None
    preferred_element_type: DType | None = None

    trained: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def apply(self, run: Run, x: Array) -> Array:
        return formulas.linear(
            x,
            self.plain_weight(),
            self.bias,
            mask=self.mask,
            dtype=self.dtype,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )

    def plain_weight(self) -> Array:
        """The weight that the input is multiplied with, but for the mask."""
        return self.weight

    @classmethod
    def shaped(
        cls,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        param_dtype: DType = jnp.float32,
        **options: Any,
    ) -> Self:
        return cls(
            weight=jax.ShapeDtypeStruct((in_features, out_features), param_dtype),
            bias=jax.ShapeDtypeStruct((out_features,), param_dtype) if use_bias else None,
            **options,
        )

    @property
    def holds_state(self) -> bool:
        return True

    def output_shape(self, shape: Shape | None) -> Shape | None:
        # Unless something tells of more axes, an example has one: as users of such stacks mean
        # it. Layers built for it that depend on it fail on others when they are called.
        return (*(shape[:-1] if shape else self.leading_shape), self.weight.shape[1])

    @property
    def example_shape(self) -> Shape:
        return (*self.leading_shape, self.weight.shape[0])

    @property
    def input_unit(self) -> Any:
        units = self.units()
        if self.bias is None or not units:
            return None
        unit = units["weight"] ** -1 if "weight" in units else 1
        return units["bias"] * unit if "bias" in units else unit

    @property
    def in_features(self) -> int:
        return self.weight.shape[0]

    @property
    def takes_rows(self) -> bool:
        return not self.leading_shape

    def with_rows(self, order: np.ndarray[Any, Any]) -> Spec:
        mask = None if self.mask is None else self.mask[order]
        return replace(self, weight=rows(self.weight, order), mask=mask)

    def mismatches(self) -> list[str]:
        out = self.weight.shape[1:]
        return mismatches_of(weight=(self.weight, None), bias=(self.bias, out))


@dataclass(frozen=True, eq=False, kw_only=True)
class ScaledWSLinear(Linear):
    """:class:`Linear` whose weight is standardised first, for each output.

    ``gain * (weight - mean) / sqrt(max(var * in, epsilon))`` takes the place of the weight:
    Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", ICML
    2021. A mask is multiplied with the result.

    Shapes:
        gain    (out,) or None
        others  as in ``Linear``
    """

    gain: Array | None
    epsilon: float

    trained: ClassVar[tuple[str, ...]] = ("weight", "bias", "gain")

    def plain_weight(self) -> Array:
        return formulas.standardized(self.weight, self.gain, epsilon=self.epsilon)

    def mismatches(self) -> list[str]:
        out = self.weight.shape[1:]
        return super().mismatches() + mismatches_of(gain=(self.gain, out))

    @classmethod
    def shaped(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        use_gain: bool = True,
        epsilon: float = 1e-4,
        param_dtype: DType = jnp.float32,
        **options: Any,
    ) -> Self:
        return super().shaped(
            in_features,
            out_features,
            use_bias=use_bias,
            param_dtype=param_dtype,
            gain=jax.ShapeDtypeStruct((out_features,), param_dtype) if use_gain else None,
            epsilon=epsilon,
            **options,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class SignedLinear(Linear):
    """:class:`Linear` with the signs of its weights given: ``y = x @ (abs(weight) * sign)``.

    Neurons that only excite, or only inhibit, have such weights: Song et al., "Training
    Excitatory-Inhibitory Recurrent Neural Networks for Cognitive Tasks", PLoS Computational
    Biology 12 (2016).

    Shapes:
        sign    (in, out), or None for positive weights; not trained
        others  as in ``Linear``
    """

    sign: Array | None = None

    def plain_weight(self) -> Array:
        weight = jnp.abs(self.weight)
        return weight if self.sign is None else weight * self.sign

    def with_rows(self, order: np.ndarray[Any, Any]) -> Spec:
        sign = None if self.sign is None else self.sign[order]
        return replace(super().with_rows(order), sign=sign)

    def mismatches(self) -> list[str]:
        shape = self.weight.shape
        return super().mismatches() + mismatches_of(sign=(self.sign, shape))
