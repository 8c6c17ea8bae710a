"""Layers whose weight is divided by a norm of its own before it is used."""

# jax.numpy declares some of its types only in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from .. import formulas
from .base import Array, DType, Run, Shape, Spec, mismatches_of, rows, spec_of
from .contractions import Einsum, LinearGeneral
from .convolutions import Convolution
from .linear import Linear

__all__ = ["NormalizedWeight", "SpectralNorm", "WeightNorm"]

_HAS_WEIGHT = (Linear, LinearGeneral, Einsum, Convolution)


@dataclass(frozen=True, eq=False, kw_only=True)
class NormalizedWeight(Spec):
    """What layers have that compute as ``layer`` does with another weight.

    ``layer`` is a spec with a ``weight`` of two axes or more. ``dtype`` is that of the new
    weight; None means what the arrays promote to. ``overwrites`` says that each call leaves the
    new weight in the place of the old one, in training and in evaluation.
    """

    layer: Any
    dtype: DType | None = None
    overwrites: bool = False

    children: ClassVar[tuple[str, ...]] = ("layer",)

    def normalized(self, run: Run) -> dict[str, Array]:
        """The arrays of ``layer`` that take the place of its own, by name."""
        raise NotImplementedError

    def apply(self, run: Run, *inputs: Any, **options: Any) -> Any:
        arrays = self.normalized(run)
        if self.overwrites:
            run.update(self.layer, **arrays)
        return replace(self.layer, **arrays).apply(run, *inputs, **options)

    @property
    def writes_parameters(self) -> bool:
        return self.overwrites

    @staticmethod
    def takes(layer: Spec) -> bool:
        """Whether ``layer`` has such a weight."""
        return isinstance(layer, _HAS_WEIGHT) and len(layer.weight.shape) > 1

    @property
    def is_composable(self) -> bool:
        return self.layer.is_composable

    @property
    def takes_rows(self) -> bool:
        return self.layer.takes_rows

    @property
    def space(self) -> int | None:
        return self.layer.space

    @property
    def fixes_order(self) -> bool:
        return self.layer.fixes_order

    @property
    def in_features(self) -> int | None:
        return self.layer.in_features

    @property
    def holds_state(self) -> bool:
        return True

    def mixes_examples(self, axes: int | None = None) -> bool:
        return self.layer.mixes_examples(axes)

    def moved(self, axes: int | None, to_first: bool) -> Spec:
        moved = self.layer.moved(axes, to_first)
        return self if moved is self.layer else replace(self, layer=moved)

    def output_shape(self, shape: Shape | None) -> Shape | None:
        return self.layer.output_shape(shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class SpectralNorm(NormalizedWeight):
    """``layer`` with its weight divided by (an estimate of) its largest singular value.

    Miyato et al., "Spectral Normalization for Generative Adversarial Networks", ICLR 2018, by
    :func:`interop.formulas.spectral_norm`. The weight is a matrix with a column for each
    element of its last axis.

    Shapes:
        u      (out,)
        v      the weight's, without its last axis; or None
        sigma  (), the value of the last training call, for whoever looks; or None

    With ``v``, the estimate is that of both vectors, which ``steps`` iterations improve before
    each training call. Without, every call starts from ``u``, and training calls keep what they
    come to; a weight of zeros is then left as it is.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> shaped = specs.SpectralNorm.shaped(specs.Linear.shaped(3, 4))
        >>> spec = shaped.initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.ones((5, 3))).shape
        (5, 4)
    """

    u: Array
    v: Array | None = None
    sigma: Array | None = None
    steps: int = 1
    epsilon: float = 1e-12

    buffers: ClassVar[tuple[str, ...]] = ("u", "v", "sigma")

    def normalized(self, run: Run) -> dict[str, Array]:
        weight = self.layer.weight
        steps = self.steps if run.train or self.v is None else 0
        sigma, u, v = formulas.spectral_norm(
            weight, self.u, self.v, steps=steps, epsilon=self.epsilon
        )
        if run.train:
            new = {"u": u, "v": v, "sigma": sigma}
            kept = {name: getattr(self, name) for name in new}
            kept = {name: old for name, old in kept.items() if old is not None}
            run.update(self, **{name: new[name].astype(kept[name].dtype) for name in kept})
        divisor = jnp.where(sigma != 0, sigma, 1) if self.v is None else sigma
        new_weight = weight / divisor
        if self.v is None:
            new_weight = new_weight.astype(self.dtype or jnp.result_type(weight, u, v, sigma))
        return {"weight": new_weight.astype(weight.dtype) if self.overwrites else new_weight}

    @classmethod
    def shaped(cls, layer: Spec, *, keeps_both: bool = False, **options: Any) -> Self:
        """``layer`` is a spec or a module that holds one; ``keeps_both`` gives it a ``v``."""
        part: Any = spec_of(layer, Spec)
        *rest, out = part.weight.shape
        dtype = part.weight.dtype
        return cls(
            layer=part,
            u=jax.ShapeDtypeStruct((out,), dtype),
            v=jax.ShapeDtypeStruct(tuple(rest), dtype) if keeps_both else None,
            sigma=None if keeps_both else jax.ShapeDtypeStruct((), dtype),
            **options,
        )

    def initial(self, key: jax.Array) -> Self:
        """Vectors are drawn, and both of them iterated, as their frameworks do it."""
        layer, u, v, sigma = self.layer.initial(key), self.u, self.v, self.sigma
        if isinstance(u, jax.ShapeDtypeStruct):
            u = jax.random.normal(jax.random.fold_in(key, 1), u.shape, u.dtype)
        if isinstance(v, jax.ShapeDtypeStruct):
            v = jax.random.normal(jax.random.fold_in(key, 2), v.shape, v.dtype)
            _, u, v = formulas.spectral_norm(layer.weight, u, v, steps=15, epsilon=self.epsilon)
        if isinstance(sigma, jax.ShapeDtypeStruct):
            sigma = jnp.ones(sigma.shape, sigma.dtype)
        return replace(self, layer=layer, u=u, v=v, sigma=sigma)

    def with_rows(self, order: np.ndarray[Any, Any]) -> Spec:
        v = None if self.v is None else rows(self.v, order)
        return replace(self, layer=self.layer.with_rows(order), v=v)

    def mismatches(self) -> list[str]:
        shape = self.layer.weight.shape
        arrays = {"u": (self.u, shape[-1:]), "v": (self.v, shape[:-1])}
        return mismatches_of(**arrays, sigma=(self.sigma, ()))


@dataclass(frozen=True, eq=False, kw_only=True)
class WeightNorm(NormalizedWeight):
    """``layer`` with ``scale * weight / norm(weight)`` in the place of its weight.

    Salimans and Kingma, "Weight Normalization", NeurIPS 2016, by
    :func:`interop.formulas.unit_norm`: a norm for each element of the ``axes`` of the weight,
    and of the ``bias_axes`` of the bias. None means that the array is used as it is.

    Shapes:
        scale        the sizes of ``axes``, in ascending order; or None, for 1
        bias_scale   those of ``bias_axes``; or None
        fixed_scale,
        fixed_bias_scale
                     the same as buffers, where they are not trained

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from interop import specs
        >>> shaped = specs.WeightNorm.shaped(specs.Linear.shaped(3, 4))
        >>> spec = shaped.initial(jax.random.key(0))
        >>> spec.apply(specs.Run(), jnp.ones((5, 3))).shape
        (5, 4)
    """

    scale: Array | None = None
    bias_scale: Array | None = None
    fixed_scale: Array | None = None
    fixed_bias_scale: Array | None = None
    axes: tuple[int, ...] | None = (-1,)
    bias_axes: tuple[int, ...] | None = None
    epsilon: float = 1e-12

    trained: ClassVar[tuple[str, ...]] = ("scale", "bias_scale")
    buffers: ClassVar[tuple[str, ...]] = ("fixed_scale", "fixed_bias_scale")

    def normalized(self, run: Run) -> dict[str, Array]:
        return {
            name: self._scaled(getattr(self.layer, name), axes, scale)
            for name, (axes, scale) in self.parts.items()
            if axes is not None
        }

    @property
    def parts(self) -> dict[str, tuple[tuple[int, ...] | None, Array | None]]:
        """The axes and the scale, trained or not, of each array of the layer."""
        scales = [
            fixed if trained is None else trained
            for trained, fixed in (
                (self.scale, self.fixed_scale),
                (self.bias_scale, self.fixed_bias_scale),
            )
        ]
        return {"weight": (self.axes, scales[0]), "bias": (self.bias_axes, scales[1])}

    def _scaled(self, array: Array, axes: tuple[int, ...], scale: Array | None) -> Array:
        new = formulas.unit_norm(array, axes, epsilon=self.epsilon)
        if scale is None:
            return new.astype(self.dtype or array.dtype)
        kept = {axis % array.ndim for axis in axes}
        shape = [n if i in kept else 1 for i, n in enumerate(array.shape)]
        dtype = self.dtype or jnp.result_type(array, scale)
        return (new * scale.reshape(shape)).astype(dtype)

    @property
    def has_modes(self) -> bool:
        return False

    @classmethod
    def shaped(
        cls,
        layer: Spec,
        *,
        axes: tuple[int, ...] | None = (-1,),
        bias_axes: tuple[int, ...] | None = None,
        use_scale: bool = True,
        param_dtype: DType = jnp.float32,
        **options: Any,
    ) -> Self:
        """``layer`` is a spec or a module that holds one."""
        part: Any = spec_of(layer, Spec)
        scales = {
            name: jax.ShapeDtypeStruct(_sizes(array, over), param_dtype)
            for name, array, over in (
                ("scale", part.weight, axes),
                ("bias_scale", part.bias, bias_axes),
            )
            if use_scale and over is not None
        }
        return cls(layer=part, axes=axes, bias_axes=bias_axes, **scales, **options)

    def with_rows(self, order: np.ndarray[Any, Any]) -> Spec:
        new: dict[str, Any] = {"layer": self.layer.with_rows(order)}
        if self.axes and any(axis in (0, -2) for axis in self.axes):
            for name in ("scale", "fixed_scale"):
                scale = getattr(self, name)
                new[name] = None if scale is None else rows(scale, order)
        return replace(self, **new)

    def mismatches(self) -> list[str]:
        lines: list[str] = []
        for name, (axes, scale) in self.parts.items():
            wanted = None if axes is None else _sizes(getattr(self.layer, name), axes)
            lines += mismatches_of(**{f"scale of {name}": (scale, wanted)})
        return lines


def _sizes(array: Any, axes: tuple[int, ...]) -> Shape:
    kept = {axis % len(array.shape) for axis in axes}
    return tuple(n for i, n in enumerate(array.shape) if i in kept)
