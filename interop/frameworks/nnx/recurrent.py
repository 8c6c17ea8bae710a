"""Recurrent cells and networks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ... import formulas, specs
from ...walk import Building, Reading
from .adapter import adapter, array_of, empty, made

# An LSTM's layers for the input, and for the state, by gate.
_INPUTS, _HIDDEN = ("ii", "if_", "ig", "io"), ("hi", "hf", "hg", "ho")


_CELL: dict[str, Any] = {"state": (*_INPUTS, *_HIDDEN, "dense_i", "dense_h", "rngs")}


@adapter.reads(nnx.SimpleCell, specs.SimpleCell, **_CELL)
def read_simple_cell(m: nnx.SimpleCell, ctx: Reading) -> specs.SimpleCell:
    arrays = _dense_arrays([m.dense_i], [m.dense_h], ctx, bias=m.dense_i)
    return specs.SimpleCell(**arrays, **cell_fields(m, *arrays.values()), residual=m.residual)


@adapter.reads(nnx.GRUCell, specs.GRUCell, **_CELL)
def read_gru_cell(m: nnx.GRUCell, ctx: Reading) -> specs.GRUCell:
    arrays = _dense_arrays([m.dense_i], [m.dense_h], ctx, bias=m.dense_i)
    return specs.GRUCell(**arrays, bias_n=None, **cell_fields(m, *arrays.values()))


@adapter.reads(nnx.LSTMCell, specs.LSTMCell, **_CELL)
@adapter.reads(nnx.OptimizedLSTMCell, specs.LSTMCell, **_CELL)
def read_lstm_cell(m: nnx.LSTMCell | nnx.OptimizedLSTMCell, ctx: Reading) -> specs.LSTMCell:
    if isinstance(m, nnx.OptimizedLSTMCell):
        inputs, hidden = [m.dense_i], [m.dense_h]
    else:
        inputs, hidden = ([getattr(m, name) for name in part] for part in (_INPUTS, _HIDDEN))
    arrays = _dense_arrays(inputs, hidden, ctx)
    arrays["bias"] = joined([array_of(layer, ctx, "bias") for layer in hidden], ctx)
    return specs.LSTMCell(**arrays, **cell_fields(m, *arrays.values()))


def _dense_arrays(inputs: Any, hidden: Any, ctx: Reading, bias: Any = None) -> dict[str, Any]:
    own = [layer.kernel for layer in (*inputs, *hidden)]
    if len({*map(id, own)}) < len(own):
        ctx.refuse("kernel", "of several gates", "one array for them would become several")
    kernels = [[array_of(layer, ctx, "kernel") for layer in part] for part in (inputs, hidden)]
    found = {"weight_x": joined(kernels[0], ctx), "weight_h": joined(kernels[1], ctx)}
    return found if bias is None else found | {"bias": array_of(bias, ctx, "bias")}


def joined(arrays: list[Any], ctx: Reading) -> Any:
    """The arrays of a cell's gates side by side."""
    found = {str(array.dtype) for array in arrays}
    if len(found) > 1:
        ctx.refuse("param_dtype", sorted(found), "the gates of a cell convert in one dtype")
    return arrays[0] if len(arrays) == 1 else specs.Gates(tuple(arrays))


def cell_fields(m: Any, *arrays: Any) -> dict[str, Any]:
    """The options of a cell, None for the usual ones, which Flax spells alike in both."""
    usual = specs.common_dtype(*arrays)
    fields = {
        "activation": None if m.activation_fn in (jnp.tanh, jax.nn.tanh) else m.activation_fn,
        "dtype": specs.plain_dtype(m.dtype, *arrays),
        "carry_init": formulas.carry_init(m.carry_init, m.param_dtype, usual),
    }
    if hasattr(m, "gate_fn"):
        fields["gate"] = None if m.gate_fn is jax.nn.sigmoid else m.gate_fn
    return fields


def cell_functions(spec: Any) -> dict[str, Any]:
    """The same functions, as both constructors take them, but ``carry_init``."""
    functions = {"activation_fn": spec.activation or jnp.tanh}
    return functions | (
        {"gate_fn": spec.gate or jax.nn.sigmoid} if hasattr(spec, "gate") else {}
    )


def _cell(cls: Any, spec: Any, arrays: dict[str, Any], **options: Any) -> Any:
    """A cell of that class for a spec's sizes and options."""
    cell = made(
        cls,
        *spec.in_shape,
        spec.hidden,
        dtype=spec.dtype,
        param_dtype=spec.weight_h.dtype,
        **options,
        kernel_init=empty,
        recurrent_kernel_init=empty,
        bias_init=empty,
        arrays=arrays,
    )
    # A template holds no functions of users, and carry_init as an argument warns.
    functions = cell_functions(spec) | {"carry_init": spec.carry_init}
    for name, function in functions.items():
        if getattr(cell, name) is not function:
            setattr(cell, name, function)
    return cell


_CARRIED = ("activation", "dtype", "carry_init")


def check_bias(bias: Any, ctx: Building) -> None:
    """Refuse a cell without a bias."""
    if bias is None:
        ctx.refuse("use_bias", False, "Flax's cells have a bias")


@adapter.builds(specs.SimpleCell, carries=(*_CARRIED, "residual"))
def build_simple_cell(spec: specs.SimpleCell, ctx: Building) -> Any:
    check_bias(spec.bias, ctx)
    return _cell(nnx.SimpleCell, spec, _dense(spec), residual=spec.residual)


@adapter.builds(specs.GRUCell, carries=(*_CARRIED, "gate"))
def build_gru_cell(spec: specs.GRUCell, ctx: Building) -> Any:
    check_bias(spec.bias, ctx)
    if spec.bias_n is not None:
        ctx.refuse("bias_n", spec.bias_n, "nnx has no bias in the product with the state")
    return _cell(nnx.GRUCell, spec, _dense(spec))


def _dense(spec: Any) -> dict[str, Any]:
    return {
        "dense_i.kernel": spec.weight_x,
        "dense_i.bias": spec.bias,
        "dense_h.kernel": spec.weight_h,
    }


@adapter.builds(specs.LSTMCell, carries=(*_CARRIED, "gate"), apart=True)
def build_lstm_cell(spec: specs.LSTMCell, ctx: Building) -> nnx.LSTMCell:
    check_bias(spec.bias, ctx)
    parts = gates(spec.weight_x, spec.weight_h, spec.bias, number=4)
    arrays: dict[str, Any] = {}
    for i, h, (x, kernel, bias) in zip(_INPUTS, _HIDDEN, parts, strict=True):
        arrays |= {f"{i}.kernel": x, f"{h}.kernel": kernel, f"{h}.bias": bias}
    return _cell(nnx.LSTMCell, spec, arrays)


def gates(*arrays: Any, number: int) -> list[tuple[Any, ...]]:
    """The part of each array that is of one gate, in order."""
    return list(zip(*(specs.Gates.split(array, number) for array in arrays), strict=True))


_RNN = ("time_major", "return_carry", "reverse", "keep_order", "unroll")


@adapter.reads(
    nnx.RNN,
    specs.RNN,
    state=("cell", "rngs", "state_axes"),
    fixed={"state_axes": nnx.StateAxes({...: nnx.Carry}), "broadcast_rngs": None},
)
def read_rnn(m: nnx.RNN, ctx: Reading) -> specs.RNN:
    cell = read_cell(m.cell, m.cell, ctx)
    return specs.RNN(cell=cell, **{name: getattr(m, name) for name in _RNN})


def read_cell(node: Any, cell: Any, ctx: Reading) -> Any:
    """The spec of the cell that a layer runs."""
    spec = ctx.read(node, f"{ctx.path}.cell")
    if not isinstance(spec, specs.Cell):
        ctx.refuse("cell", cell, "its reader does not say that it is a recurrent cell")
    return spec


@adapter.builds(specs.RNN, carries=_RNN)
def build_rnn(spec: specs.RNN, ctx: Building) -> nnx.RNN:
    return nnx.RNN(ctx.build(spec.cell), **{name: getattr(spec, name) for name in _RNN})


@adapter.reads(
    nnx.Bidirectional, specs.Bidirectional, state=("forward_rnn", "backward_rnn", "rngs")
)
def read_bidirectional(m: nnx.Bidirectional, ctx: Reading) -> specs.Bidirectional:
    parts = {name: (getattr(m, name), getattr(m, name)) for name in RNNS}
    return specs.Bidirectional(**read_rnns(parts, ctx), **bidirectional_fields(m))


RNNS = ("forward_rnn", "backward_rnn")


def read_rnns(parts: dict[str, tuple[Any, Any]], ctx: Reading) -> dict[str, Any]:
    """The specs of both directions, from their nodes and modules by name."""
    found = {name: ctx.read(node, f"{ctx.path}.{name}") for name, (node, _) in parts.items()}
    for name, spec in found.items():
        if not isinstance(spec, specs.RNN):
            ctx.refuse(name, parts[name][1], "only an RNN converts here")
    return found


def bidirectional_fields(m: Any) -> dict[str, Any]:
    """The options, None for the usual merge, which Flax spells alike in NNX and in Linen."""
    is_usual = m.merge_fn is type(m).merge_fn
    return {
        "merge": None if is_usual else m.merge_fn,
        "time_major": m.time_major,
        "return_carry": m.return_carry,
    }


def bidirectional_options(spec: Any) -> dict[str, Any]:
    """The same options, as both constructors take them."""
    merge = {} if spec.merge is None else {"merge_fn": spec.merge}
    return merge | {"time_major": spec.time_major, "return_carry": spec.return_carry}


@adapter.builds(specs.Bidirectional, carries=("merge", "time_major", "return_carry"))
def build_bidirectional(spec: specs.Bidirectional, ctx: Building) -> nnx.Bidirectional:
    parts = [ctx.build(getattr(spec, name)) for name in RNNS]
    return nnx.Bidirectional(*parts, **bidirectional_options(spec))
