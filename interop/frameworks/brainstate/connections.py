"""Connections between groups of neurons."""

from __future__ import annotations

import functools
from typing import Any

import brainevent
import brainstate
import brainunit
import jax
import jax.numpy as jnp
import numpy as np
from brainstate import nn

from ... import specs
from ...walk import Building, Reading
from .adapter import adapter, arrays_of, check_one_dtype

_CLASSES: dict[str, Any] = {
    "COO": brainunit.sparse.COO,
    "CSR": brainunit.sparse.CSR,
    "CSC": brainunit.sparse.CSC,
}


@adapter.reads(nn.AllToAll, specs.AllToAll, state=("weight",))
def read_all_to_all(m: Any, ctx: Reading) -> specs.AllToAll:
    sizes = m.in_size[-1], m.out_size[-1]
    is_one = np.ndim(m.weight.value["weight"]) == 0
    arrays = arrays_of(m, ctx, weight=() if is_one else sizes, bias=sizes[1:])
    weight, bias = arrays["weight"], arrays.get("bias")
    check_one_dtype(weight, bias, ctx)
    return specs.AllToAll(
        weight=weight,
        bias=bias,
        sizes=sizes,
        include_self=m.include_self,
        leading_shape=tuple(m.in_size[:-1]),
    )


@adapter.builds(specs.AllToAll, carries=("include_self", "leading_shape"))
def build_all_to_all(spec: specs.AllToAll, ctx: Building) -> nn.AllToAll:
    check_one_dtype(spec.weight, spec.bias, ctx)
    leading = ctx.shape[:-1] if ctx.shape else spec.leading_shape
    return nn.AllToAll(
        *((*leading, size) for size in spec.sizes),
        w_init=spec.weight,
        b_init=spec.bias,
        include_self=spec.include_self,
    )


@adapter.reads(nn.SparseLinear, specs.SparseLinear, state=("weight",))
def read_sparse_linear(m: Any, ctx: Reading) -> specs.SparseLinear:
    matrix = m.spar_mat
    forms: dict[type, str] = {cls: name for name, cls in _CLASSES.items()}
    form = forms.get(type(matrix), "")
    if not form:
        ctx.refuse("spar_mat", type(matrix).__qualname__, "only COO, CSR and CSC convert")
    if form == "COO":
        places = matrix.row, matrix.col
    else:
        pointed = _counted(matrix.indptr), matrix.indices
        places = pointed if form == "CSR" else pointed[::-1]
    rows, columns = map(np.asarray, places)
    sizes = tuple(matrix.shape)
    arrays = arrays_of(m, ctx, weight=rows.shape, bias=sizes[1:])
    arrays.setdefault("bias", None)
    check_one_dtype(arrays["weight"], arrays["bias"], ctx)
    return specs.SparseLinear(**arrays, rows=rows, columns=columns, sizes=sizes, form=form)


@adapter.builds(specs.SparseLinear, carries=("form",))
def build_sparse_linear(spec: specs.SparseLinear, ctx: Building) -> nn.SparseLinear:
    check_one_dtype(spec.weight, spec.bias, ctx)
    if spec.weight.shape != (spec.rows.size,):
        ctx.refuse(
            "weight.shape", spec.weight.shape, "BrainState has one value for each element"
        )
    ordered = {"CSR": spec.rows, "CSC": spec.columns}.get(spec.form, ())
    if (np.diff(ordered) < 0).any():
        ctx.refuse("form", spec.form, "the elements are in another order")
    if not differentiates(spec.form):
        ctx.refuse("form", spec.form, "this version of brainunit takes wrong gradients of it")
    matrix = _matrix(spec.form, spec.weight, spec.rows, spec.columns, spec.sizes)
    return nn.SparseLinear(matrix, b_init=spec.bias, in_size=spec.sizes[:1])


def _matrix(form: str, weight: Any, rows: Any, columns: Any, sizes: tuple[int, int]) -> Any:
    places: dict[str, Any] = {
        "COO": lambda: (jnp.asarray(rows), jnp.asarray(columns)),
        "CSR": lambda: (jnp.asarray(columns), _pointers(rows, sizes[0])),
        "CSC": lambda: (jnp.asarray(rows), _pointers(columns, sizes[1])),
    }
    return _CLASSES[form]((weight, *places[form]()), shape=sizes)


def _counted(pointers: Any) -> Any:
    """The number of the row of each element, where the elements are row by row."""
    counts: Any = np.diff(np.asarray(pointers))
    return np.repeat(np.arange(len(pointers) - 1), counts)


def _pointers(rows: Any, number: int) -> Any:
    """The inverse of :func:`_counted`."""
    counts = np.bincount(np.ravel(rows), minlength=number)
    return jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32)


@functools.cache
def differentiates(form: str) -> bool:
    """Whether brainunit gives the elements of a matrix their own gradients."""
    with jax.ensure_compile_time_eval():
        x, slopes = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 10.0]])
        step = -1 if form == "CSC" else 1  # which is in the order of columns
        rows, columns = np.array([0, 1])[::step], np.array([1, 0])[::step]

        def product(weight: jax.Array) -> jax.Array:
            return ((x @ _matrix(form, weight, rows, columns, (2, 2))) * slopes).sum()

        return jax.grad(product)(jnp.ones(2)).tolist() == [10.0, 2.0][::step]


@adapter.reads(nn.FixedNumConn, specs.FixedNumConn, state=("weight",))
def read_fixed_num_conn(m: Any, ctx: Reading) -> specs.FixedNumConn:
    if m.conn_num < 1:
        ctx.refuse("conn_num", m.conn_num, "there are no connections, and no weight to train")
    sizes, columns = (m.in_size[-1], m.out_size[-1]), np.asarray(m.conn.indices)
    rows = np.arange(sizes[0])
    rows = rows[m.pre_selected] if hasattr(m, "pre_selected") else rows[:, None]
    if rows.ndim == 1:
        rows = np.repeat(rows, m.conn_num)
    one = np.size(m.weight.value) == 1
    shape = np.shape(m.weight.value) if one else columns.shape
    return specs.FixedNumConn(
        **arrays_of(m, ctx, weight=shape),
        rows=np.broadcast_to(rows, columns.shape),
        columns=columns,
        bias=None,
        sizes=sizes,
    )


@adapter.builds(specs.FixedNumConn)
def build_fixed_num_conn(spec: specs.FixedNumConn, ctx: Building) -> Any:
    """The constructor draws connections, and warns of a name of its own."""
    n_in = spec.sizes[0]
    counts = np.bincount(np.ravel(spec.rows), minlength=n_in)
    whole = np.repeat(np.arange(n_in)[:, None], counts.max(), axis=1)
    some = np.repeat(np.flatnonzero(counts), counts.max())
    is_whole = np.array_equal(spec.rows, whole)
    fits = is_whole or np.array_equal(spec.rows, some)
    if spec.bias is not None or not fits or not counts.any():
        ctx.refuse("rows", spec.rows, "BrainState has as many connections from each neuron")
    layer: Any = object.__new__(nn.FixedNumConn)
    nn.Module.__init__(layer)
    layer.in_size, layer.out_size = spec.sizes
    layer.efferent_target, layer.seed, layer.allow_multi_conn = "post", None, True
    layer.conn_num = int(counts.max())
    layer.weight = brainstate.ParamState(spec.weight)
    columns = jnp.asarray(spec.columns)
    if is_whole:
        layer.conn = brainevent.FixedNumPerPre((spec.weight, columns), shape=spec.sizes)
        return layer
    layer.pre_selected = counts > 0
    parts = spec.weight, columns, _pointers(spec.rows, n_in)
    layer.conn = brainevent.CSR(parts, shape=spec.sizes)
    return layer


_EVENTS = (
    "what counts as an event, and whether its value matters, differs between the versions and "
    "the backends of brainevent"
)

adapter.refused[nn.EventFixedNumConn] = _EVENTS


@adapter.reads(nn.EventLinear, specs.Linear, state=("weight",))
def read_event_linear(m: Any, ctx: Reading) -> specs.Linear:
    """Without events it is a plain product."""
    if m.float_as_event:
        ctx.refuse("float_as_event", True, _EVENTS)
    if np.size(m.weight.value) == 1:
        ctx.refuse("weight", m.weight.value, "BrainState then adds up all of the batch")
    arrays = arrays_of(m, ctx, weight=(m.in_size[-1], m.out_size[-1]))
    return specs.Linear(**arrays, bias=None, leading_shape=tuple(m.in_size[:-1]))
