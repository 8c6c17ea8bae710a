"""Whether two models compute the same: outputs, gradients, and layer by layer."""

# jax declares some of its types only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from . import specs
from .api import unchecked
from .correspondence import WeightMapping, mapping
from .errors import ArgumentError, ConversionError, InteropError, NotEquivalentError
from .formulas import identity
from .layout import Place, crossed
from .parameters import arrays, is_quantity, magnitude, name
from .plotting import plot_comparison
from .registry import Adapter, Registry, registry
from .walk import Reading

__all__ = ["Comparison", "Difference", "LayerDifference", "assert_equivalent", "compare"]

_TOLERANCES = {
    "float64": 1e-10,
    "complex128": 1e-10,
    "float32": 2e-5,
    "complex64": 2e-5,
    "float16": 1e-2,
    "bfloat16": 5e-2,
}


@dataclass(frozen=True)
class Difference:
    """How far two arrays are apart.

    Attributes:
        absolute: the largest difference of two elements; infinite where the shapes or units
            differ.
        relative: the same, as a share of the largest element of the first array.

    Example:
        >>> import interop
        >>> difference = interop.Difference(absolute=0.01, relative=0.001)
        >>> print(difference, difference.within(rtol=1e-2, atol=0.0))
        1.0e-02 absolute, 1.0e-03 relative True
    """

    absolute: float
    relative: float

    def within(self, rtol: float, atol: float) -> bool:
        """Whether ``absolute <= atol + rtol * largest element``."""
        if self.absolute <= atol:  # also where the first array is all zeros
            return True
        return self.absolute - atol <= rtol * (self.absolute / self.relative)

    def __str__(self) -> str:
        return f"{self.absolute:.1e} absolute, {self.relative:.1e} relative"


@dataclass(frozen=True)
class LayerDifference:
    """One layer of both models, on the same input: what the first model gives it.

    Attributes:
        path, other_path: where it is in each model.
        outputs: the difference of its outputs.

    Example:
        >>> import brainstate, interop, jax.numpy as jnp
        >>> model = brainstate.nn.Sequential(brainstate.nn.Linear(3, 4), brainstate.nn.ReLU())
        >>> comparison = interop.compare(model, interop.to_nnx(model), jnp.ones((2, 3)))
        >>> [(layer.path, layer.outputs.absolute) for layer in comparison.layers]
        [('model[0]', 0.0), ('model[1]', 0.0)]
    """

    path: str
    other_path: str
    outputs: Difference


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        outputs: the difference of the outputs.
        inputs: for each input that of its gradients, None for one that has none.
        parameters: for each parameter of the second model, by its path, that of its gradients.
        layers: layer by layer, where both are stacks of as many layers.
        dtypes: where the outputs differ in dtype, in words. That is no difference of values:
            :attr:`ok` does not look at it.
        unmapped: why ``parameters`` is empty, or None.
        rtol, atol: the tolerances for the models' dtype.

    Example:
        >>> import brainstate, interop, jax.numpy as jnp
        >>> model = brainstate.nn.Linear(3, 4)
        >>> interop.compare(model, interop.to_nnx(model), jnp.ones((2, 3)))
        <Comparison: equal (rtol=2e-05, atol=2e-05)>
    """

    outputs: Difference
    inputs: tuple[Difference | None, ...]
    parameters: dict[str, Difference]
    layers: tuple[LayerDifference, ...]
    dtypes: tuple[str, ...]
    unmapped: InteropError | None
    rtol: float
    atol: float

    @property
    def ok(self) -> bool:
        """Whether everything was compared and is within the tolerances."""
        return not self.beyond(self.rtol, self.atol) and self.unmapped is None

    @property
    def departs(self) -> LayerDifference | None:
        """The first layer beyond the tolerances, or None."""
        return next(
            (x for x in self.layers if not x.outputs.within(self.rtol, self.atol)), None
        )

    def beyond(self, rtol: float, atol: float) -> list[str]:
        """What is beyond these tolerances, in words."""
        return [
            f"{label}: {difference}"
            for label, difference in self._differences()
            if not difference.within(rtol, atol)
        ]

    def _differences(self) -> Iterator[tuple[str, Difference]]:
        yield "outputs", self.outputs
        for i, difference in enumerate(self.inputs):
            if difference is not None:
                yield f"gradient of input {i}", difference
        for path, difference in self.parameters.items():
            yield f"gradient of {path}", difference
        for layer in self.layers:
            where = layer.path
            if layer.other_path != where:
                where += f" / {layer.other_path}"
            yield f"outputs of {where}", layer.outputs

    def plot(self, axes: Any = None) -> Any:
        """Draw how far the outputs are apart, layer by layer, against the tolerance.

        Args:
            axes: a matplotlib ``Axes`` to draw into; by default a new figure's.

        Returns:
            The ``Axes``.

        Raises:
            MissingDependencyError: matplotlib is not installed (extra ``plot``).

        Example:
            >>> import brainstate, interop, jax.numpy as jnp
            >>> model = brainstate.nn.Linear(3, 4)
            >>> axes = interop.compare(model, interop.to_nnx(model), jnp.ones((2, 3))).plot()
            >>> axes.get_ylabel()
            'relative difference of outputs'
        """
        return plot_comparison(self, axes)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {str(self).splitlines()[0]}>"

    def __str__(self) -> str:
        rows = list(self._differences())
        width = max(len(label) for label, _ in rows)
        lines = [f"  {label:<{width}}  {difference}" for label, difference in rows]
        verdict = "different" if self.beyond(self.rtol, self.atol) else "equal"
        if verdict == "equal" and self.unmapped is not None:
            verdict = "equal, as far as compared"
        head = f"{verdict} (rtol={self.rtol:g}, atol={self.atol:g})"
        if self.departs is not None:
            head += f"; the first layer that departs is {self.departs.path}"
        lines += [f"  dtype of {text}" for text in self.dtypes]
        if self.unmapped is not None:
            lines.append(f"  no parameter gradients: {self.unmapped}")
        return "\n".join([head, *lines])


def compare(a: Any, b: Any, *inputs: Any, train: bool = False) -> Comparison:
    """Measure how far two models' outputs and gradients are apart.

    Gradients are of a fixed random combination of the outputs. Neither model is changed.

    Args:
        a, b: models of any framework; ``(module, variables)`` for Linen, ``(model, state)``
            for an Equinox model with state.
        inputs: batches, as ``a`` takes them: ``(batch, *example)``. They are mapped over the
            batch for a model that takes single examples, and their channels are moved for a
            framework that has them elsewhere.
        train: compare in training mode, in which batch normalisation uses the batch.

    Returns:
        A :class:`Comparison`; ``print`` it. ``comparison.departs`` is the first layer that
        does not compute the same.

    Raises:
        ArgumentError: ``a`` or ``b`` is no model, there is no input, a model fails on the
            inputs, this is inside a JAX transformation, or ``train`` is asked for models with
            dropout, whose masks differ between frameworks.
        ConversionError: the outputs have different shapes or units.

    Example:
        >>> import brainstate, interop, jax.numpy as jnp
        >>> model = brainstate.nn.Linear(3, 4)
        >>> comparison = interop.compare(model, interop.to_equinox(model), jnp.ones((2, 3)))
        >>> comparison.ok, sorted(comparison.parameters)
        (True, ['bias', 'weight'])
    """
    if not inputs:
        raise ArgumentError("compare needs at least one batch of inputs")
    if not isinstance(cast(Any, train), bool):
        raise ArgumentError(f"train must be True or False, got {train!r}")
    batch = tuple(map(_array, inputs))
    first, second = _Runner(a, train), _Runner(b, train)
    places = _places(first, second, batch[0].shape[1:])
    to_first = second.adapter.channels_first
    out, grads, input_grads = first.run(batch)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(out)):
        raise ArgumentError(
            "compare measures values, and there are none inside a JAX transformation",
            remedy="Compare outside of jax.jit, jax.grad and jax.vmap",
        )
    others = tuple(places[0].there(x, to_first=to_first) for x in batch)
    other, other_grads, other_input_grads = second.run(
        others, lambda y: _aligned(places[-1].here(y, to_first=to_first), out)
    )
    unmapped, parameters = None, dict[str, Difference]()
    try:
        links = mapping(a, b, sample_input=batch[0].shape[1:])
        parameters = _of_parameters(links, grads, other_grads)
    except InteropError as e:
        unmapped = e
    back = [places[0].here(x, to_first=to_first) for x in other_input_grads]
    rtol = max(_tolerance(leaf) for leaf in jax.tree.leaves((out, grads, other_grads)))
    return Comparison(
        _worst(out, other),
        tuple(
            _difference(x, y) if jnp.issubdtype(given.dtype, jnp.inexact) else None
            for given, x, y in zip(batch, input_grads, back, strict=True)
        ),
        parameters,
        () if len(batch) > 1 else tuple(_by_layer(first, second, places, *batch)),
        tuple(_dtypes(out, other)),
        unmapped,
        rtol,
        rtol,
    )


def assert_equivalent(
    a: Any,
    b: Any,
    *inputs: Any,
    train: bool = False,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Fail unless two models have equal outputs and gradients.

    Args:
        a, b, inputs, train: as in :func:`compare`.
        rtol, atol: tolerances, relative to the largest element of each array; by default by
            the narrowest dtype of outputs and gradients (float32: 2e-5, bfloat16: 5e-2).

    Raises:
        NotEquivalentError: they differ; an ``AssertionError`` that shows everything beyond the
            tolerances and names the first layer that departs.
        ArgumentError, ConversionError: as :func:`compare`; also if the models' weights do not
            correspond.

    Example:
        >>> import brainstate, interop, jax.numpy as jnp
        >>> model = brainstate.nn.Linear(3, 4)
        >>> interop.assert_equivalent(model, interop.to_nnx(model), jnp.ones((2, 3)))
    """
    comparison = compare(a, b, *inputs, train=train)
    if comparison.unmapped is not None:
        raise comparison.unmapped
    rtol = comparison.rtol if rtol is None else rtol
    atol = comparison.atol if atol is None else atol
    found = comparison.beyond(rtol, atol)
    if found:
        layers = comparison.layers
        first = next((x.path for x in layers if not x.outputs.within(rtol, atol)), None)
        raise NotEquivalentError(comparison, found, first, rtol, atol)


class _Runner:
    """A model with what is needed to call it."""

    def __init__(self, model: Any, train: bool):
        self.adapter, self.node = unchecked(model)
        self.train = train
        self.spec: specs.Spec | None = None
        self.reading = _Listing(self.adapter, registry)
        try:
            self.adapter.check(self.node)
            self.spec = self.reading.read(self.node, "model")
        except ConversionError:  # weights that do not fit
            raise
        except InteropError:  # what does not convert is compared as a whole
            self.spec = None
        self.layers = list(_layers(self.spec, "model"))
        random = [x for _, x in self.layers if isinstance(x, specs.Dropout) and x.rate]
        if train and random:
            raise ArgumentError(
                "masks of dropout differ between frameworks, so that training cannot be "
                "compared",
                path=self.reading.origins[id(random[0])][0],
                remedy="Compare with rate 0, or in evaluation mode",
            )

    def run(
        self, inputs: tuple[Any, ...], after: Callable[[Any], Any] = identity
    ) -> tuple[Any, Any, tuple[Any, ...]]:
        """Outputs, after what ``after`` does to them, gradients of parameters and inputs."""

        def call(parameters: Any, inputs: tuple[Any, ...]) -> Any:
            node = self.adapter.with_parameters(self.node, parameters)
            return after(self._run(node, inputs))

        out, pull = jax.vjp(call, self.adapter.parameters(self.node), inputs)
        rng = np.random.default_rng(0)

        def seed(y: Any) -> Any:
            return jnp.asarray(rng.normal(size=y.shape), y.dtype)

        seeds = jax.tree.map(seed, out)
        try:
            parameters, given = pull(seeds)
        except Exception as e:
            raise self._failure("'s gradient", inputs, e) from e
        return out, parameters, given

    def _run(self, node: Any, inputs: tuple[Any, ...]) -> Any:
        try:
            return self.adapter.run(node, inputs, self.train)
        except Exception as e:
            raise self._failure("", inputs, e) from e

    def _failure(self, what: str, inputs: tuple[Any, ...], error: Exception) -> ArgumentError:
        shapes = ", ".join(str(x.shape) for x in inputs)
        return ArgumentError(
            f"the {self.adapter.name} model{what} fails on inputs of shape {shapes} "
            f"({type(error).__name__}: {error})",
            path="model",
            remedy="Pass batches, (batch, *example), as the first model takes them",
        )

    def run_layer(self, spec: specs.Spec, x: Any) -> Any:
        return self.adapter.run_part(self.reading.nodes[id(spec)], x, self.train)


def _array(given: Any) -> Any:
    remedy = "Pass batches, (batch, *example), as the first model takes them"
    try:
        array = given if is_quantity(given) else jnp.asarray(given)
    except (TypeError, ValueError, OverflowError) as e:
        raise ArgumentError(
            f"an input must be an array, got {type(given).__qualname__}", remedy=remedy
        ) from e
    if not array.ndim:
        raise ArgumentError(f"an input must be a batch, got {given!r}", remedy=remedy)
    return array


class _Listing(Reading):
    """A reading that notes the node of each spec."""

    def __init__(self, adapter: Adapter, registry: Registry):
        super().__init__(adapter, registry)
        self.nodes: dict[int, Any] = {}

    def read(self, node: Any, path: str, given: frozenset[str] = frozenset()) -> specs.Spec:
        spec = super().read(node, path, given)
        self.nodes.setdefault(id(spec), node)
        return spec


def _layers(spec: specs.Spec | None, path: str) -> Iterator[tuple[str, specs.Spec]]:
    """The layers of nested stacks in order, each with its place."""
    if isinstance(spec, specs.Sequential):
        for i, layer in enumerate(spec.layers):
            yield from _layers(layer, f"{path}[{i}]")
    elif spec is not None:
        yield path, spec


def _by_layer(
    first: _Runner, second: _Runner, places: tuple[Place, ...], x: Any
) -> Iterator[LayerDifference]:
    """Both models' layers on what the first model gives them, up to where shapes differ."""
    if len(first.layers) != len(second.layers):
        return
    to_first = second.adapter.channels_first
    pairs = zip(first.layers, second.layers, strict=True)
    for i, ((path, layer), (other_path, other)) in enumerate(pairs):
        y = first.run_layer(layer, x)
        z = second.run_layer(other, places[i].there(x, to_first=to_first))
        try:
            z = _aligned(places[i + 1].here(z, to_first=to_first), y)
        except ConversionError:
            yield LayerDifference(path, other_path, Difference(np.inf, np.inf))
            return
        yield LayerDifference(path, other_path, _worst(y, z))
        x = y


def _places(first: _Runner, second: _Runner, shape: specs.Shape) -> tuple[Place, ...]:
    """How the first model's data lie in the second, before each layer and at the end."""
    if first.spec is None:
        return (Place(), Place())
    origins = dict(first.reading.origins)
    return crossed(first.spec, origins, shape, first.adapter, second.adapter).places


def _aligned(out: Any, like: Any) -> Any:
    """``out``, if it is shaped as ``like``.

    Raises:
        ConversionError: it is not.
    """

    def align(y: Any, z: Any) -> Any:
        if y.shape != z.shape:
            raise ConversionError(
                f"the models' outputs have different shapes, {z.shape} and {y.shape}",
                path="model",
                remedy="Compare models of the same task, on inputs that the first one takes",
            )
        units = getattr(z, "unit", None), getattr(y, "unit", None)
        if units[0] != units[1]:
            raise ConversionError(
                f"the models' outputs have different units, {units[0]} and {units[1]}",
                path="model",
            )
        return y

    first, second = (jax.tree.structure(y, is_leaf=is_quantity) for y in (out, like))
    if first != second:
        raise ConversionError("the models' outputs have different structures", path="model")
    return jax.tree.map(align, out, like, is_leaf=is_quantity)


def _of_parameters(links: WeightMapping, grads: Any, other_grads: Any) -> dict[str, Difference]:
    moved = arrays(links.apply(grads, weights=False))
    found = arrays(other_grads)
    return {name(path): _difference(moved[path], found[path]) for path in found}


def _dtypes(a: Any, b: Any) -> Iterator[str]:
    """Where two trees of arrays differ in dtype."""
    others = jax.tree.leaves(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), others, strict=True):
        if x.dtype != y.dtype:
            yield f"outputs{jax.tree_util.keystr(path)}: {x.dtype} and {y.dtype}"


def _worst(a: Any, b: Any) -> Difference:
    found = [jax.tree.leaves(tree, is_leaf=is_quantity) for tree in (a, b)]
    pairs = zip(*found, strict=True)
    return max((_difference(x, y) for x, y in pairs), key=lambda d: d.relative)


def _difference(a: Any, b: Any) -> Difference:
    if getattr(a, "unit", None) != getattr(b, "unit", None):
        return Difference(np.inf, np.inf)
    x, y = (_wide(magnitude(array)) for array in (a, b))
    if not x.size:
        return Difference(0.0, 0.0)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(x - y))
    absolute = float(np.nan_to_num(apart, nan=np.inf, posinf=np.inf).max())
    finite = np.abs(x[np.isfinite(x)])
    largest = float(finite.max()) if finite.size else 0.0
    if not absolute:
        return Difference(0.0, 0.0)
    return Difference(absolute, absolute / largest if largest else np.inf)


def _wide(array: Any) -> Any:
    is_complex = jnp.issubdtype(array.dtype, jnp.complexfloating)
    return np.asarray(array, np.complex128 if is_complex else np.float64)


def _tolerance(leaf: Any) -> float:
    return _TOLERANCES.get(str(leaf.dtype), 0.0)
