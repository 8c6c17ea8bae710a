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
from .base import (
    Array,
    DType,
    Run,
    Sequential,
    Shape,
    Spec,
    common_dtype,
    mismatches_of,
    rows,
    spec_of,
)

__all__ = ["LoRA", "Linear", "ScaledWSLinear", "SignedLinear"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Linear(Spec):
    """``y = x @ weight + bias``.

    Shapes:
        x       (*batch, in)
        weight  (in, out)
        bias    (out,) or None
        mask    (in, out) or None, multiplied with the weight

    Options: ``dtype`` is what the operands are cast to; None means their common dtype.
    ``leading_shape`` is that of the axes of one example before the last. With ``scalar_input``
    ``x`` has no last axis, with ``scalar_output`` the result has none; its size is 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.Linear.shaped(3, 4).initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.ones((5, 3))).shape
        (5, 4)
    """

    weight: Array
    bias: Array | None
    leading_shape: Shape = ()
    mask: Array | None = None
    dtype: DType | None = None
    precision: Any = None
    preferred_element_type: DType | None = None
    scalar_input: bool = False
    scalar_output: bool = False

    trained: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def apply(self, run: Run, x: Array) -> Array:
        y = formulas.linear(
            jnp.asarray(x)[..., None] if self.scalar_input else x,
            self.plain_weight(),
            self.bias,
            mask=self.mask,
            dtype=self.dtype,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )
        return y[..., 0] if self.scalar_output else y

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
        leading = shape[:-1] if shape else self.leading_shape
        leading = shape or () if self.scalar_input else leading
        return leading if self.scalar_output else (*leading, self.weight.shape[1])

    @property
    def example_shape(self) -> Shape:
        size = () if self.scalar_input else self.weight.shape[:1]
        return (*self.leading_shape, *size)

    @property
    def input_unit(self) -> Any:
        units = self.units()
        if self.bias is None or not units:
            return None
        unit = units["weight"] ** -1 if "weight" in units else 1
        return units["bias"] * unit if "bias" in units else unit

    @property
    def in_features(self) -> int | None:
        return None if self.scalar_input else self.weight.shape[0]

    @property
    def takes_rows(self) -> bool:
        return not self.leading_shape and not self.scalar_input

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

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.ScaledWSLinear.shaped(3, 4).initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.ones((5, 3))).shape
        (5, 4)
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

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.SignedLinear.shaped(3, 4, use_bias=False).initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.ones((5, 3))).shape
        (5, 4)
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


@dataclass(frozen=True, eq=False, kw_only=True)
class LoRA(Spec):
    """``y = x @ lora_a @ lora_b + base(x)``.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.

    Shapes:
        x       (*batch, in)
        lora_a  (in, rank)
        lora_b  (rank, out)
    and ``base`` is a layer with such inputs and outputs, or None.

    Options: ``dtype`` is what the operands are cast to; None means their common dtype.
    ``promotes_base`` tells whether ``base`` gets ``x`` after that cast. ``leading_shape`` is as
    in :class:`Linear`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.LoRA.shaped(3, 2, 4).initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.ones((5, 3))).shape
        (5, 4)
    """

    lora_a: Array
    lora_b: Array
    base: Any = None
    dtype: DType | None = None
    promotes_base: bool = False
    leading_shape: Shape = ()

    trained: ClassVar[tuple[str, ...]] = ("lora_a", "lora_b")
    children: ClassVar[tuple[str, ...]] = ("base",)

    def apply(self, run: Run, x: Array) -> Array:
        operands = formulas.promote(x, self.lora_a, self.lora_b, dtype=self.dtype)
        y = operands[0] @ operands[1] @ operands[2]
        if self.base is None:
            return y
        return y + self.base.apply(run, operands[0] if self.promotes_base else x)

    @classmethod
    def shaped(
        cls,
        in_features: int,
        rank: int,
        out_features: int,
        *,
        base: Any = None,
        param_dtype: DType = jnp.float32,
        **options: Any,
    ) -> Self:
        """``base`` is a spec or a module that holds one."""
        return cls(
            lora_a=jax.ShapeDtypeStruct((in_features, rank), param_dtype),
            lora_b=jax.ShapeDtypeStruct((rank, out_features), param_dtype),
            base=None if base is None else spec_of(base, Spec),
            **options,
        )

    def initial(self, key: jax.Array) -> Self:
        """As the paper has it, with zeros in ``lora_b``."""
        found, b = super().initial(key), self.lora_b
        if not isinstance(b, jax.ShapeDtypeStruct):
            return found
        return replace(found, lora_b=jnp.zeros(b.shape, b.dtype))

    @property
    def feels_promotion(self) -> bool:
        """Whether ``promotes_base`` makes a difference, as far as one can tell."""
        first: Any = self.base
        while isinstance(first, Sequential):
            first = first.layers[0]
        if first is None:
            return False
        promotes = isinstance(first, Linear) and first.dtype is None
        widest = common_dtype(self.lora_a, self.lora_b)
        return self.dtype is not None or not promotes or first.weight.dtype != widest

    @property
    def is_composable(self) -> bool:
        return self.base is None or (self.base.is_composable and not self.base.random)

    @property
    def has_modes(self) -> bool:
        return self.base is not None and self.base.has_modes

    @property
    def holds_state(self) -> bool:
        return True

    def mixes_examples(self, axes: int | None = None) -> bool:
        return self.base is not None and self.base.mixes_examples(axes)

    @property
    def in_features(self) -> int:
        return self.lora_a.shape[0]

    def output_shape(self, shape: Shape | None) -> Shape | None:
        return (*(shape[:-1] if shape else self.leading_shape), self.lora_b.shape[1])

    @property
    def takes_rows(self) -> bool:
        return not self.leading_shape and (self.base is None or self.base.takes_rows)

    def with_rows(self, order: np.ndarray[Any, Any]) -> Spec:
        base = None if self.base is None else self.base.with_rows(order)
        return replace(self, lora_a=rows(self.lora_a, order), base=base)

    def mismatches(self) -> list[str]:
        rank = self.lora_a.shape[1:]
        shape = (*rank, *self.lora_b.shape[1:])
        return mismatches_of(lora_a=(self.lora_a, None), lora_b=(self.lora_b, shape))
