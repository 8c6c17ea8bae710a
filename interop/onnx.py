"""A model as an ONNX file, made by jax2onnx and proved by onnxruntime."""

# jax declares some of its types only in part, jax2onnx and onnxruntime none.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .errors import (
    ArgumentError,
    BrokenDependencyError,
    ConversionError,
    InteropError,
    MissingDependencyError,
    UnsupportedStructureError,
)
from .exporting import evaluated, in_batches
from .files import write
from .programs import needed
from .progress import working

__all__ = ["to_onnx"]

_TOLERANCE = 1e-5


def to_onnx(
    model: Any,
    *inputs: Any,
    path: str | os.PathLike[str],
    batch: str = "symbolic",
    params: Any = None,
    state: Any = None,
) -> None:
    """Write a model in evaluation mode as an ONNX file, once it is proved to be right.

    Args:
        model, params, state: as in :func:`interop.export`.
        inputs: a batch for each argument: arrays of numbers that the model can take. The file
            is run by onnxruntime on others like them, and compared with the model.
        path: the file; written when all is well, and else left as it was.
        batch: ``"symbolic"`` for any batch size, or ``"fixed"``.

    Raises:
        UnsupportedStructureError: an operation has no counterpart in ONNX, named in the
            message; or as :func:`interop.export`.
        ConversionError: onnxruntime computes something else, beyond 1e-5.
        ArgumentError: as :func:`interop.export`; or an input is no array.
        MissingDependencyError, BrokenDependencyError: jax2onnx or onnxruntime cannot be
            imported: extra ``onnx``.

    Example:
        >>> import brainstate, importlib.util, interop, jax.numpy as jnp, tempfile
        >>> model, has_onnx = brainstate.nn.Linear(3, 4), importlib.util.find_spec("jax2onnx")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     if has_onnx:
        ...         interop.to_onnx(model, jnp.ones((2, 3)), path=f"{folder}/model.onnx")
    """
    converter, runtime = _package("jax2onnx"), _package("onnxruntime")
    if not all(hasattr(x, "shape") and hasattr(x, "dtype") for x in inputs):
        raise ArgumentError("inputs must be arrays", remedy="Pass one batch for each argument")
    run, own = evaluated(model, params, state)
    fn = functools.partial(run, own)

    def convert(*shapes: Any) -> bytes:
        flat = _flattened(_flattened(fn, shapes), shapes)  # anew, without what fell out of use

        try:
            found = converter.to_onnx(flat, list(shapes))
        except Exception as e:
            name = _operation(e)
            what = f"the operation {name}" if name else "the model"
            raise UnsupportedStructureError(
                f"{what} cannot be written as ONNX ({type(e).__name__}: {e})",
                path="model",
                remedy=_REMEDIES.get(name, "Replace that operation, or use interop.export"),
            ) from e
        # Its notes on the shapes in between, which may be wrong, mislead onnxruntime.
        del found.graph.value_info[:]
        return found.SerializeToString()

    with working("converting to ONNX"):
        data = in_batches(convert, jax.make_jaxpr(fn), inputs, batch)
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # it warns of what it leaves out of a sound graph
    try:
        session = runtime.InferenceSession(data, options)
        _check(session, fn, inputs, grow=batch == "symbolic")
    except InteropError:
        raise
    except Exception as e:
        raise UnsupportedStructureError(
            f"onnxruntime cannot run what became of it ({type(e).__name__}: {e})",
            path="model",
            remedy="Nothing was written. Use interop.export",
        ) from e
    write(path, data)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name != name:
            raise BrokenDependencyError(name, e, _versions(name)) from e
        raise MissingDependencyError("interop.to_onnx", name) from e
    except Exception as e:
        raise BrokenDependencyError(name, e, _versions(name)) from e


def _versions(name: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in ("jax", name)}


# Nested programs by the primitive that calls them: jax2onnx gets one flat program.
_NESTED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
    "checkpoint": "jaxpr",
}
_REMEDIES = {
    "call_exported": "It runs an exported program, as a traced module does: pass the model as "
    "it was before, with its live shims",
}
_POOLS: dict[str, tuple[Any, float]] = {
    "reduce_window_max": (jax.lax.max, -np.inf),
    "reduce_window_min": (jax.lax.min, np.inf),
    "reduce_window_sum": (jax.lax.add, 0.0),
}


def _flattened(fn: Callable[..., Any], shapes: Any) -> Callable[..., list[Any]]:
    program = jax.make_jaxpr(fn)(*shapes)
    return lambda *xs: _evaluate(program.jaxpr, program.consts, *xs)


def _evaluate(jaxpr: Any, consts: Any, *args: Any) -> list[Any]:
    """Run a program, its nested ones in place, and pools as joined slices of their input."""
    from jax.extend.core import Literal  # slow to import

    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    joined: dict[Any, list[Any]] = {}  # what was concatenated

    def read(variable: Any) -> Any:
        is_literal = isinstance(variable, Literal)
        return variable.val if is_literal else values[variable]

    for eqn in needed(jaxpr):  # a start at zero may have drawn a key
        operands, name = list(map(read, eqn.invars)), eqn.primitive.name
        if name in _NESTED:
            nested = eqn.params[_NESTED[name]]
            inner = getattr(nested, "jaxpr", nested)
            out = _evaluate(inner, getattr(nested, "consts", ()), *operands)
        elif name in _POOLS and set(eqn.params["base_dilation"]) == {1}:
            out = [_pooled(eqn, *operands)]
        elif name == "gather" and _takes_rows(eqn, *operands):
            x, starts = operands
            out = [_rows(eqn, x, joined.get(eqn.invars[1], [starts]))]
        else:
            out = eqn.primitive.bind(*operands, **eqn.params)
            out = out if eqn.primitive.multiple_results else [out]
        values.update(zip(eqn.outvars, out, strict=True))
        if name == "concatenate" and eqn.params["dimension"] == out[0].ndim - 1:
            joined[eqn.outvars[0]] = operands
    return list(map(read, jaxpr.outvars))


def _pooled(eqn: Any, x: Any) -> Any:
    """jax2onnx takes every axis of a pool for one of space, which onnxruntime refuses."""
    join, fill = _POOLS[eqn.primitive.name]
    facts = ("window_dimensions", "window_strides", "padding", "window_dilation")
    windows = zip(*[eqn.params[fact] for fact in facts], strict=True)
    for axis, (size, stride, pads, dilation) in enumerate(windows):
        if size == stride == 1 and not any(pads):
            continue
        edge = jax.lax.full_like(jax.lax.slice_in_dim(x, 0, 1, axis=axis), fill)
        x = jax.lax.concatenate([*[edge] * pads[0], x, *[edge] * pads[1]], axis)
        reach = (eqn.outvars[0].aval.shape[axis] - 1) * stride + 1
        starts = [i * dilation for i in range(size)]
        parts = [jax.lax.slice_in_dim(x, i, i + reach, stride, axis) for i in starts]
        x = functools.reduce(join, parts)
    return x


def _takes_rows(eqn: Any, x: Any, starts: Any) -> bool:
    """Whether a gather slices whole rows off its operand, as an index under ``vmap`` does."""
    facts = eqn.params["dimension_numbers"]
    kept = starts.ndim - 1
    return (
        eqn.params["mode"] == jax.lax.GatherScatterMode.CLIP
        and tuple(eqn.params["slice_sizes"]) == (1, *x.shape[1:])
        and 0 in facts.start_index_map
        and not facts.collapsed_slice_dims
        and not facts.operand_batching_dims
        and facts.offset_dims == tuple(range(kept, kept + x.ndim))
    )


def _rows(eqn: Any, x: Any, starts: list[Any]) -> Any:
    """jax2onnx reads starts along several axes wrongly; but for rows, all others are zero.

    ``starts`` are the parts that they were joined of along their last axis.
    """
    facts, kept = eqn.params["dimension_numbers"], starts[0].ndim - 1
    column = facts.start_index_map.index(0)
    while column >= starts[0].shape[-1]:
        first, *starts = starts
        column -= first.shape[-1]
    rows = jax.lax.gather(
        x,
        jax.lax.slice_in_dim(starts[0], column, column + 1, axis=kept),
        jax.lax.GatherDimensionNumbers(
            offset_dims=facts.offset_dims[:-1], collapsed_slice_dims=(0,), start_index_map=(0,)
        ),
        eqn.params["slice_sizes"],
        mode="clip",
    )
    return jax.lax.expand_dims(rows, (kept,))


def _operation(error: BaseException) -> str:
    """The operation that jax2onnx was at: the last in its frames; nothing if it was at none."""
    found, trace = "", error.__traceback__
    while trace is not None:
        eqn: Any = trace.tb_frame.f_locals.get("eqn")
        if hasattr(eqn, "primitive"):
            found = eqn.primitive.name
        trace = trace.tb_next
    return found


def _check(session: Any, fn: Any, inputs: tuple[Any, ...], *, grow: bool) -> None:
    """Compare the file with the model on a second input, of another batch size if it can.

    Raises:
        ConversionError: they differ.
    """
    rng = np.random.default_rng(0)
    given = [_like(np.asarray(x), rng, grow=grow) for x in inputs]
    names = [x.name for x in session.get_inputs()]
    found = session.run(None, dict(zip(names, given, strict=True)))
    for i, (y, wanted) in enumerate(zip(found, jax.tree.leaves(fn(*given)), strict=True)):
        wanted = np.asarray(wanted, np.float64)
        scale = max(1.0, float(np.abs(wanted).max(initial=0.0)))
        if y.shape != wanted.shape or not np.allclose(y, wanted, 0.0, _TOLERANCE * scale):
            raise ConversionError(
                f"output {i} of the ONNX file is not the model's within {_TOLERANCE:g}",
                path="model",
                remedy="Nothing was written. Use interop.export, and report this",
            )


def _like(x: Any, rng: np.random.Generator, *, grow: bool) -> Any:
    shape = (x.shape[0] + 1, *x.shape[1:]) if grow and x.ndim else x.shape
    if jnp.issubdtype(x.dtype, jnp.floating):
        return rng.normal(size=shape).astype(x.dtype)
    return rng.choice(x.ravel(), size=shape).astype(x.dtype)
