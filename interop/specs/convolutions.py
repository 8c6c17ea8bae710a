"""Convolutions, with the channels last."""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from .. import formulas
from .base import Array, DType, Run, Shape, Spec, mismatches_of, move_channels, shape_of

__all__ = [
    "Conv",
    "ConvLocal",
    "ConvTranspose",
    "Convolution",
    "ScaledWSConv",
    "flipped",
]

Pads = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Convolution(Spec):
    """What all convolutions have; ``weight`` and ``bias`` are as each of them says.

    ``strides`` and ``kernel_dilation`` have a number for each axis of space. ``in_shape`` is
    the shape ``(*space, in)`` of an example where the source fixes it.

    Options:
        padding_mode            with what is padded: ``"ZEROS"``, ``"REFLECT"``,
                                ``"REPLICATE"`` or ``"CIRCULAR"``
        mask                    an array of the weight's shape, multiplied with it, or None
        dtype                   what the operands are cast to; None means their common dtype
        precision               as in ``jax.lax.conv_general_dilated``
        preferred_element_type  as there
        channels_first          whether inputs and outputs have their channels before the axes
                                of space, wherever the framework has them
    """

    weight: Array
    bias: Array | None
    strides: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int
    in_shape: Shape | None
    padding_mode: str = "ZEROS"
    mask: Array | None = None
    dtype: DType | None = None
    precision: Any = None
    preferred_element_type: DType | None = None
    channels_first: bool = False

    trained: ClassVar[tuple[str, ...]] = ("weight", "bias")

    @property
    def dims(self) -> int:
        """The number of axes of space."""
        return len(self.strides)

    @property
    def kernel(self) -> Shape:
        """The sizes of the kernel."""
        return self.weight.shape[: self.dims]

    @property
    def channels(self) -> int:
        """The number of channels of the input."""
        return self.weight.shape[-2] * self.groups

    @property
    def in_features(self) -> int | None:
        return None if self.channels_first else self.channels

    @property
    def reach(self) -> Shape:
        """The sizes of the dilated kernel."""
        rows = zip(self.kernel, self.kernel_dilation, strict=True)
        return tuple((size - 1) * dilation + 1 for size, dilation in rows)

    @property
    def space(self) -> int:
        return 0 if self.channels_first else self.dims

    @property
    def fixes_order(self) -> bool:
        return self.channels_first

    @property
    def holds_state(self) -> bool:
        return True

    def moved(self, axes: int | None, to_first: bool) -> Spec:
        if self.channels_first and to_first:  # the target has them first as well
            return replace(self, channels_first=False)
        return self

    def last(self, shape: Shape | None) -> Shape | None:
        """The shape ``(*space, in)`` of an example whose shape is ``shape``."""
        if shape is None or not self.channels_first:
            return shape or self.in_shape
        return move_channels(shape, to_first=False)

    def output_shape(self, shape: Shape | None) -> Shape | None:
        shape = self.last(shape)
        if shape is None:
            return None
        apart = (*self.trained, "mask", "dtype", "precision", "preferred_element_type")
        options = {f.name: getattr(self, f.name) for f in fields(self)}
        known = tuple((k, v) for k, v in options.items() if k not in apart)
        out = _output_shape(type(self), self.trained, self.weight.shape, known, shape)
        return out and move_channels(out, to_first=True) if self.channels_first else out

    def apply(self, run: Run, x: Array) -> Array:
        weight = self.plain_weight()
        if self.mask is not None:
            weight = weight * self.mask
        if not self.channels_first:
            return self.convolve(x, weight)
        first, last = -1 - self.dims, -1
        return jnp.moveaxis(self.convolve(jnp.moveaxis(x, first, last), weight), last, first)

    def plain_weight(self) -> Array:
        """The weight that the input is multiplied with, but for the mask."""
        return self.weight

    def convolve(self, x: Array, weight: Array) -> Array:
        """The result for ``x`` with its channels last, and a weight with its mask applied."""
        raise NotImplementedError

    def _options(self) -> dict[str, Any]:
        """The options that all formulas take."""
        return {
            "strides": self.strides,
            "padding_mode": self.padding_mode,
            "kernel_dilation": self.kernel_dilation,
            "dtype": self.dtype,
            "precision": self.precision,
        }

    def mismatches(self) -> list[str]:
        weight, out = self.weight, self.weight.shape[-1:]
        lines = mismatches_of(weight=(weight, None), bias=(self.bias, out))
        return lines + mismatches_of(mask=(self.mask, weight.shape))

    @classmethod
    def shaped(
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        *,
        strides: tuple[int, ...] | None = None,
        padding: str | Pads = "VALID",
        kernel_dilation: tuple[int, ...] | None = None,
        groups: int = 1,
        use_bias: bool = True,
        param_dtype: DType = jnp.float32,
        **options: Any,
    ) -> Self:
        ones = (1,) * len(kernel_size)
        shape = (*kernel_size, in_channels // groups, out_channels)
        options["padding"] = padding
        return cls(
            weight=jax.ShapeDtypeStruct(shape, param_dtype),
            bias=jax.ShapeDtypeStruct((out_channels,), param_dtype) if use_bias else None,
            strides=strides or ones,
            kernel_dilation=kernel_dilation or ones,
            groups=groups,
            in_shape=None,
            **options,
        )


@functools.lru_cache(1024)
def _output_shape(
    cls: type[Convolution],
    trained: tuple[str, ...],
    weight_shape: Shape,
    options: tuple[tuple[str, Any], ...],
    shape: Shape,
) -> Shape | None:
    """The shape of one output; kept, as models have many layers alike."""
    arrays: dict[str, Any] = dict.fromkeys(trained)
    arrays["weight"] = jax.ShapeDtypeStruct(weight_shape, "float32")
    plain = cls(**arrays, **dict(options))

    def run(x: jax.Array) -> jax.Array:
        return plain.convolve(x, jnp.zeros(weight_shape))

    return shape_of(run, shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class Conv(Convolution):
    """Cross-correlation over the axes of space, as ``jax.lax.conv_general_dilated`` does it.

    Shapes, with ``k`` axes of space:
        x       (*batch, *space, in)
        weight  (*kernel, in // groups, out)
        bias    (out,) or None
        mask    that of the weight, or None; multiplied with it

    ``padding`` is ``"SAME"``, ``"SAME_LOWER"``, ``"VALID"`` or k pairs; ``padding_mode`` says
    with what: ``"ZEROS"``, ``"REFLECT"``, ``"REPLICATE"`` or ``"CIRCULAR"``. ``dtype`` is what
    the operands are cast to; None means their common dtype. ``channels_first`` says that inputs
    and outputs have their channels before the axes of space.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.Conv.shaped(3, 4, (3, 3)).initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.ones((5, 8, 8, 3))).shape
        (5, 6, 6, 4)
    """

    padding: str | Pads
    input_dilation: tuple[int, ...] | None = None

    def pads(self, shape: Shape) -> Pads:
        """The padding of an example of that shape, channels last, as pairs."""
        if not isinstance(self.padding, str):
            return self.padding
        pads = jax.lax.padtype_to_pads(shape[:-1], self.reach, self.strides, self.padding)
        return tuple((int(low), int(high)) for low, high in pads)

    def convolve(self, x: Array, weight: Array) -> Array:
        return formulas.convolution(
            x,
            weight,
            self.bias,
            padding=self.padding,
            input_dilation=self.input_dilation,
            groups=self.groups,
            preferred_element_type=self.preferred_element_type,
            **self._options(),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class ScaledWSConv(Conv):
    """:class:`Conv` whose weight is standardised first, for each output channel.

    ``gain * (weight - mean) / sqrt(max(var * fan_in, epsilon))`` takes the place of the weight:
    Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", ICML
    2021. A mask is multiplied with the result.

    Shapes:
        gain    (out,) or None
        others  as in ``Conv``

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.ScaledWSConv.shaped(3, 4, (3, 3)).initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.ones((5, 8, 8, 3))).shape
        (5, 6, 6, 4)
    """

    gain: Array | None
    epsilon: float

    trained: ClassVar[tuple[str, ...]] = ("weight", "bias", "gain")

    def plain_weight(self) -> Array:
        return formulas.standardized(self.weight, self.gain, epsilon=self.epsilon)

    def mismatches(self) -> list[str]:
        out = self.weight.shape[-1:]
        return super().mismatches() + mismatches_of(gain=(self.gain, out))

    @classmethod
    def shaped(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        *,
        strides: tuple[int, ...] | None = None,
        padding: str | Pads = "VALID",
        kernel_dilation: tuple[int, ...] | None = None,
        groups: int = 1,
        use_bias: bool = True,
        use_gain: bool = True,
        epsilon: float = 1e-4,
        param_dtype: DType = jnp.float32,
        **options: Any,
    ) -> Self:
        return super().shaped(
            in_channels,
            out_channels,
            kernel_size,
            strides=strides,
            padding=padding,
            kernel_dilation=kernel_dilation,
            groups=groups,
            use_bias=use_bias,
            param_dtype=param_dtype,
            gain=jax.ShapeDtypeStruct((out_channels,), param_dtype) if use_gain else None,
            epsilon=epsilon,
            **options,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class ConvTranspose(Convolution):
    """Cross-correlation of an input that is dilated by ``strides``.

    Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", arXiv 1603.07285.

    Shapes, with ``k`` axes of space:
        x       (*batch, *space, in)
        weight  (*kernel, in // groups, out), not flipped
        bias    (out,) or None
        mask    that of the weight, or None; multiplied with it

    ``padding`` is k pairs, which count elements of the dilated input, or ``"SAME"`` or
    ``"VALID"`` for those of ``jax.lax.conv_transpose``; with ``padding_mode="CIRCULAR"`` the
    input goes on periodically, else with zeros. The output has
    ``(n - 1) * stride + 1 + low + high - (kernel - 1) * dilation`` elements along an axis of n.
    The other options are those of ``Conv``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.ConvTranspose.shaped(3, 4, (3, 3)).initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.ones((5, 8, 8, 3))).shape
        (5, 10, 10, 4)
    """

    padding: Pads

    def __post_init__(self) -> None:
        if isinstance(self.padding, str):
            pads = _transposed_pads(self.padding, self.reach, self.strides)
            object.__setattr__(self, "padding", pads)

    def convolve(self, x: Array, weight: Array) -> Array:
        return formulas.transposed_convolution(
            x,
            weight,
            self.bias,
            padding=self.padding,
            groups=self.groups,
            preferred_element_type=self.preferred_element_type,
            **self._options(),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class ConvLocal(Convolution):
    """:class:`Conv` with a kernel of its own for each place of the output.

    Shapes:
        x       (*batch, *space, in)
        weight  (*out_space, in * prod(kernel_size), out), as in
                ``jax.lax.conv_general_dilated_local``
        bias    (*out_space, out) or None
        mask    that of the weight, or None; multiplied with it

    Options are those of ``Conv``, without ``preferred_element_type`` and with one group.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> spec = specs.ConvLocal.shaped((8, 3), 4, (3,)).initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.ones((5, 8, 3))).shape
        (5, 6, 4)
    """

    padding: str | Pads
    kernel_size: Shape
    input_dilation: tuple[int, ...] | None = None

    @property
    def kernel(self) -> Shape:
        return self.kernel_size

    @property
    def channels(self) -> int:
        return self.weight.shape[-2] // math.prod(self.kernel_size)

    def convolve(self, x: Array, weight: Array) -> Array:
        return formulas.local_convolution(
            x,
            weight,
            self.bias,
            kernel_size=self.kernel_size,
            padding=self.padding,
            input_dilation=self.input_dilation,
            **self._options(),
        )

    def mismatches(self) -> list[str]:
        shape = self.weight.shape
        lines = mismatches_of(weight=(self.weight, None), mask=(self.mask, shape))
        return lines + mismatches_of(bias=(self.bias, (*shape[:-2], shape[-1])))

    @classmethod
    def shaped(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        in_shape: Shape,
        out_channels: int,
        kernel_size: tuple[int, ...],
        *,
        strides: tuple[int, ...] | None = None,
        padding: str | Pads = "VALID",
        kernel_dilation: tuple[int, ...] | None = None,
        use_bias: bool = True,
        param_dtype: DType = jnp.float32,
        **options: Any,
    ) -> Self:
        ones = (1,) * len(kernel_size)
        options |= {
            "strides": strides or ones,
            "padding": padding,
            "kernel_dilation": kernel_dilation or ones,
        }
        plain = Conv.shaped(in_shape[-1], out_channels, kernel_size, **options)
        out = plain.output_shape(in_shape) or ()
        shape = (*out[:-1], in_shape[-1] * math.prod(kernel_size), out_channels)
        return cls(
            weight=jax.ShapeDtypeStruct(shape, param_dtype),
            bias=jax.ShapeDtypeStruct(out, param_dtype) if use_bias else None,
            kernel_size=kernel_size,
            groups=1,
            in_shape=None,
            **options,
        )


def flipped(kernel: Array) -> Array:
    """A kernel ``(*kernel, in, out)`` as ``(*flipped_kernel, out, in)``, and the other way."""
    return kernel[(slice(None, None, -1),) * (kernel.ndim - 2)].swapaxes(-1, -2)


def _transposed_pads(padding: str, reach: Shape, strides: Shape) -> Pads:
    """``"SAME"`` or ``"VALID"`` of a transposed convolution, as ``jax.lax`` defines them.

    Args:
        padding: with ``"SAME"`` the output has ``stride`` times the elements of the input,
            with ``"VALID"`` every place where the kernel meets an element.
        reach: the sizes of the dilated kernel.
        strides: by which the input is dilated.
    """
    pads: list[tuple[int, int]] = []
    for size, stride in zip(reach, strides, strict=True):
        if padding == "VALID":
            low, total = size - 1, size + stride - 2 + max(size - stride, 0)
        else:
            total = size + stride - 2
            low = size - 1 if stride > size - 1 else (total + 1) // 2
        pads.append((low, total - low))
    return tuple(pads)
