"""A model as a program: traced in evaluation mode, and needing none of the frameworks."""

# jax.export declares some of its types only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.export  # not imported by jax itself
import jax.numpy as jnp

from .errors import ArgumentError, InteropError, UnsupportedStructureError
from .named_weights import named, open_any, replaced
from .parameters import is_quantity
from .programs import alike
from .progress import working

__all__ = ["evaluated", "export", "in_batches", "shapes_of"]


_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")  # JAX itself takes any word


def export(
    model: Any,
    *inputs: Any,
    platforms: Sequence[str] | None = None,
    batch: str = "symbolic",
    weights: str = "inside",
    params: Any = None,
    state: Any = None,
) -> jax.export.Exported:
    """Export a model in evaluation mode as a StableHLO program.

    Args:
        model: a module of any framework, also a live shim or one with forward logic of its
            own; or the pair ``(module, variables)``, ``(model, state)``. Not changed.
        inputs: a batch for each argument, arrays or ``jax.ShapeDtypeStruct``; only shapes and
            dtypes matter. An Equinox model is mapped over the batch.
        platforms: of ``"cpu"``, ``"cuda"``, ``"rocm"`` and ``"tpu"``, those that it is to run
            on; by default the one that JAX runs on here.
        batch: ``"symbolic"`` for a program that takes any batch size; ``"fixed"`` for the
            inputs' own.
        weights: ``"inside"`` the program, or ``"arguments"``: its first argument then is the
            dict that :func:`interop.weights` returns, with arrays as the file of
            :func:`interop.save` has them, without units.
        params, state: as in :func:`interop.weights`.

    Returns:
        A ``jax.export.Exported``: ``.call(*inputs)`` runs it, ``.serialize()`` makes bytes of
        it (which needs flatbuffers) that ``jax.export.deserialize`` reads where no framework
        is installed.

    Raises:
        ArgumentError: an argument has the wrong type or value.
        UnsupportedStructureError: the model's code needs a fixed batch size, or the program
            would take or return physical units.

    Example:
        >>> import brainstate, interop, jax.numpy as jnp
        >>> exported = interop.export(brainstate.nn.Linear(3, 4), jnp.ones((1, 3)))
        >>> exported.call(jnp.ones((5, 3))).shape
        (5, 4)
    """
    if isinstance(platforms, str) or {*(platforms or ())} - {*_PLATFORMS}:
        raise ArgumentError(
            f"platforms must be a tuple of platforms' names, got {platforms!r}",
            remedy=f"Pass a tuple of some of {_PLATFORMS}",
        )
    if weights not in ("inside", "arguments"):
        raise ArgumentError(
            f"export takes no weights={weights!r}",
            remedy='Pass weights="inside" or "arguments"',
        )
    run, own = evaluated(model, params, state)
    arrays = {name: leaf.mantissa if is_quantity(leaf) else leaf for name, leaf in own.items()}
    fn = run if weights == "arguments" else partial(run, arrays)
    given = (jax.tree.map(_shape, arrays),) if weights == "arguments" else ()

    def trace(*shapes: Any) -> jax.export.Exported:
        return jax.export.export(jax.jit(fn), platforms=platforms)(*given, *shapes)

    with working("exporting"):
        return in_batches(
            trace, lambda *shapes: jax.make_jaxpr(fn)(*given, *shapes), inputs, batch
        )


def in_batches(
    trace: Callable[..., Any], look: Callable[..., Any], inputs: tuple[Any, ...], batch: str
) -> Any:
    """What ``trace`` makes of the shapes of inputs, with a symbolic batch size if asked for.

    ``look`` gives the model's jaxpr for such shapes, and raises where it cannot take them.
    """
    if batch not in ("symbolic", "fixed"):
        raise ArgumentError(
            f"there is no batch={batch!r}", remedy='Pass batch="symbolic" or "fixed"'
        )
    fixed = shapes_of(inputs, None)
    if batch == "fixed":
        return trace(*fixed)
    (size,) = jax.export.symbolic_shape("batch")
    try:
        found = trace(*shapes_of(inputs, size))
    except InteropError:
        raise
    except Exception as e:
        look(*fixed)
        reason = str(e).strip().partition("\n")[0]
        raise UnsupportedStructureError(
            f"its code needs a fixed batch size ({type(e).__name__}: {reason})",
            path="model",
            remedy='Pass batch="fixed", or write -1 for the batch size in that code',
        ) from e
    own = max(jnp.shape(x)[0] for x in jax.tree.leaves(inputs) if jnp.ndim(x))
    if not alike(look, (shapes_of(inputs, n) for n in (own, own + 1, 1))):
        raise UnsupportedStructureError(
            "its code computes something else for some batch sizes, which it compares with "
            "numbers",
            path="model",
            remedy='Pass batch="fixed", once for each such size',
        )
    return found


def evaluated(model: Any, params: Any, state: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A pure function ``(weights, *inputs)`` of plain arrays, and the model's weights."""
    adapter, node = open_any(model, params, state)
    own = named(adapter, node)

    def run(weights: dict[str, Any], *inputs: Any) -> Any:
        values = {
            name: type(leaf)(weights[name], unit=leaf.unit)
            if is_quantity(leaf)
            else weights[name]
            for name, leaf in own.items()
        }
        copy = adapter.with_parameters(node, adapter.parameters(node))
        out = adapter.run(replaced(adapter, copy, values), inputs, False)
        if any(map(is_quantity, jax.tree.leaves(out, is_leaf=is_quantity))):
            raise UnsupportedStructureError(
                "it returns arrays with physical units, which programs do not have",
                path="model",
                remedy="Export a module that divides its output by the unit",
            )
        return out

    return run, own


def shapes_of(inputs: tuple[Any, ...], size: Any) -> Any:
    """Shapes and dtypes of the inputs, with ``size`` as their batch size if it is given.

    Raises:
        ArgumentError: there are none, they have units, or are batches of different sizes.
    """
    leaves = jax.tree.leaves(inputs, is_leaf=is_quantity)
    if not leaves:
        raise ArgumentError(
            "the model's inputs are missing",
            remedy="Pass a batch for each argument; only shapes and dtypes matter",
        )
    if not any(hasattr(x, "shape") for x in leaves):
        kinds = sorted({type(x).__qualname__ for x in leaves})
        raise ArgumentError(
            f"inputs must be arrays, got {', '.join(kinds)}",
            remedy="Pass a batch for each argument; jnp.ones(shape) will do",
        )
    sizes = {jnp.shape(x)[0] for x in leaves if not is_quantity(x) and jnp.ndim(x)}
    if any(map(is_quantity, leaves)) or (size is not None and len(sizes) != 1):
        raise ArgumentError(
            f"inputs must be plain arrays, batches of one size; got sizes {sorted(sizes)}",
            remedy='Pass one batch for each argument; with batch="fixed", sizes may differ',
        )

    def shape(x: Any) -> Any:
        own = jnp.shape(x)
        return _shape(x, (size, *own[1:]) if size is not None and own else own)

    return jax.tree.map(shape, inputs)


def _shape(x: Any, shape: Any = None) -> jax.ShapeDtypeStruct:
    dtype = jax.dtypes.canonicalize_dtype(jnp.result_type(x))
    return jax.ShapeDtypeStruct(jnp.shape(x) if shape is None else shape, dtype)
