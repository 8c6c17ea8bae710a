"""Recurrent cells and networks."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from ... import formulas, specs
from ...walk import Building, Reading
from ..nnx.recurrent import (
    RNNS,
    bidirectional_fields,
    bidirectional_options,
    cell_fields,
    cell_functions,
    check_bias,
    gates,
    joined,
    read_cell,
    read_rnns,
)
from .adapter import Node, adapter, node_of
from .sequential import place
from .variables import gates_of


def _gate_arrays(node: Node, ctx: Reading) -> dict[str, Any]:
    gates, biased = gates_of(node.module)

    def side_by_side(part: str, name: str) -> Any:
        return joined([node.array(f"{part}{gate}")[name] for gate in gates], ctx)

    kernels = {"weight_x": side_by_side("i", "kernel"), "weight_h": side_by_side("h", "kernel")}
    return kernels | {"bias": side_by_side(biased, "bias")}


def _gate_params(module: Any, spec: Any) -> dict[str, Any]:
    names, biased = gates_of(module)
    arrays = gates(spec.weight_x, spec.weight_h, spec.bias, number=len(names))
    params: dict[str, Any] = {}
    for gate, (x, h, bias) in zip(names, arrays, strict=True):
        params[f"i{gate}"], params[f"h{gate}"] = {"kernel": x}, {"kernel": h}
        params[f"{biased}{gate}"]["bias"] = bias
    return params


def _cell_options(spec: Any) -> dict[str, Any]:
    options = cell_functions(spec)
    options |= {"dtype": spec.dtype, "param_dtype": spec.weight_h.dtype}
    if spec.carry_init is not None:
        options["carry_init"] = spec.carry_init
    if not specs.is_wide(spec.weight_h.dtype):
        # Linen traces the initialiser at each call, and the usual one takes no such dtype
        options["recurrent_kernel_init"] = nn.linear.default_kernel_init
    return options


_CARRIED = ("activation", "dtype", "carry_init")


@adapter.reads(nn.SimpleCell, specs.SimpleCell)
def read_simple_cell(node: Node, ctx: Reading) -> specs.SimpleCell:
    arrays = _gate_arrays(node, ctx)
    fields = cell_fields(node.module, *arrays.values())
    return specs.SimpleCell(**arrays, **fields, residual=node.module.residual)


@adapter.builds(specs.SimpleCell, carries=(*_CARRIED, "residual"), apart=True)
def build_simple_cell(spec: specs.SimpleCell, ctx: Building) -> Node:
    check_bias(spec.bias, ctx)
    module = nn.SimpleCell(spec.hidden, **_cell_options(spec), residual=spec.residual)
    return node_of(module, _gate_params(module, spec))


@adapter.reads(nn.LSTMCell, specs.LSTMCell)
@adapter.reads(nn.OptimizedLSTMCell, specs.LSTMCell)
def read_lstm_cell(node: Node, ctx: Reading) -> specs.LSTMCell:
    arrays = _gate_arrays(node, ctx)
    return specs.LSTMCell(**arrays, **cell_fields(node.module, *arrays.values()))


@adapter.builds(specs.LSTMCell, carries=(*_CARRIED, "gate"), apart=True)
def build_lstm_cell(spec: specs.LSTMCell, ctx: Building) -> Node:
    check_bias(spec.bias, ctx)
    module = nn.LSTMCell(spec.hidden, **_cell_options(spec))
    return node_of(module, _gate_params(module, spec))


@adapter.reads(nn.GRUCell, specs.GRUCell)
@adapter.reads(nn.MGUCell, specs.MGUCell)
def read_gru_cell(node: Node, ctx: Reading) -> specs.GRUCell | specs.MGUCell:
    arrays = _gate_arrays(node, ctx) | {"bias_n": node.array("hn").get("bias")}
    fields = cell_fields(node.module, *arrays.values())
    if isinstance(node.module, nn.GRUCell):
        return specs.GRUCell(**arrays, **fields)
    return specs.MGUCell(**arrays, **fields, reset_gate=node.module.reset_gate)


@adapter.builds(specs.GRUCell, carries=(*_CARRIED, "gate"), apart=True)
@adapter.builds(specs.MGUCell, carries=(*_CARRIED, "gate", "reset_gate"), apart=True)
def build_gru_cell(spec: specs.GRUCell | specs.MGUCell, ctx: Building) -> Node:
    check_bias(spec.bias, ctx)
    is_gru, wants = isinstance(spec, specs.GRUCell), getattr(spec, "reset_gate", True)
    if (spec.bias_n is not None) != wants:
        has = "has" if wants else "has no"
        ctx.refuse("bias_n", spec.bias_n, f"this cell {has} such a bias in Linen")
    options: dict[str, Any] = {} if is_gru else {"reset_gate": wants}
    module = (nn.GRUCell if is_gru else nn.MGUCell)(
        spec.hidden, **_cell_options(spec), **options
    )
    params = _gate_params(module, spec)
    if spec.bias_n is not None:
        params["hn"]["bias"] = spec.bias_n
    return node_of(module, params)


@adapter.reads(nn.ConvLSTMCell, specs.ConvLSTMCell)
def read_conv_lstm_cell(node: Node, ctx: Reading) -> specs.ConvLSTMCell:
    m, parts = node.module, (node.array("ih"), node.array("hh"))
    arrays = {
        "weight_x": parts[0]["kernel"],
        "weight_h": parts[1]["kernel"],
        "bias_x": parts[0].get("bias"),
        "bias_h": parts[1].get("bias"),
    }
    usual = specs.common_dtype(*arrays.values())
    return specs.ConvLSTMCell(
        **arrays,
        strides=tuple(m.strides or (1,) * len(m.kernel_size)),
        padding=_cell_padding(m.padding, ctx),
        dtype=specs.plain_dtype(m.dtype, *arrays.values()),
        carry_init=formulas.carry_init(m.carry_init, m.param_dtype, usual),
    )


def _cell_padding(padding: Any, ctx: Reading) -> Any:
    if not isinstance(padding, str):
        return tuple(map(tuple, padding))
    if padding.upper() not in ("SAME", "VALID"):
        ctx.refuse("padding", padding, "a recurrent cell converts with zeros around its input")
    return padding.upper()


@adapter.builds(specs.ConvLSTMCell, carries=("dtype", "carry_init"))
def build_conv_lstm_cell(spec: specs.ConvLSTMCell, ctx: Building) -> Node:
    if (spec.bias_x is None) != (spec.bias_h is None):
        ctx.refuse("bias_x, bias_h", "one of two", "Linen has both or neither")
    carry_init: dict[str, Any] = (
        {} if spec.carry_init is None else {"carry_init": spec.carry_init}
    )
    module = nn.ConvLSTMCell(
        spec.hidden,
        tuple(spec.weight_x.shape[: spec.space]),
        strides=spec.strides,
        padding=spec.padding,
        use_bias=spec.bias_x is not None,
        dtype=spec.dtype,
        param_dtype=spec.weight_x.dtype,
        **carry_init,
    )
    arrays = {"ih": (spec.weight_x, spec.bias_x), "hh": (spec.weight_h, spec.bias_h)}
    return node_of(module, {k: _part(kernel=w, bias=b) for k, (w, b) in arrays.items()})


def _part(**arrays: Any) -> dict[str, Any]:
    return {name: array for name, array in arrays.items() if array is not None}


_RNN = ("time_major", "return_carry", "reverse", "keep_order", "unroll")


def below(node: Node, name: str) -> Node:
    """The submodule of that name, and its variables."""
    variables = {k: tree[name] for k, tree in node.variables.items() if name in tree}
    return Node(getattr(node.module, name), variables)


def above(module: Any, parts: dict[str, Any], ctx: Building) -> Node:
    """A module with submodules by their names; one that has two names is under the first."""
    variables: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for name, node in parts.items():
        if id(node) in seen:
            continue
        seen.add(id(node))
        place(node, ctx)
        for collection, tree in node.variables.items():
            variables.setdefault(collection, {})[name] = tree
    return Node(module, variables)


@adapter.reads(
    nn.RNN,
    specs.RNN,
    fixed={
        name: nn.RNN.__dataclass_fields__[name].default
        for name in ("variable_axes", "variable_broadcast", "variable_carry", "split_rngs")
    },
)
def read_rnn(node: Node, ctx: Reading) -> specs.RNN:
    cell = read_cell(below(node, "cell"), node.module.cell, ctx)
    return specs.RNN(cell=cell, **{name: getattr(node.module, name) for name in _RNN})


@adapter.builds(specs.RNN, carries=_RNN)
def build_rnn(spec: specs.RNN, ctx: Building) -> Node:
    cell = ctx.build(spec.cell)
    module = nn.RNN(cell.module, **{name: getattr(spec, name) for name in _RNN})
    return above(module, {"cell": cell}, ctx)


@adapter.reads(nn.Bidirectional, specs.Bidirectional)
def read_bidirectional(node: Node, ctx: Reading) -> specs.Bidirectional:
    parts = {name: (below(node, name), getattr(node.module, name)) for name in RNNS}
    return specs.Bidirectional(**read_rnns(parts, ctx), **bidirectional_fields(node.module))


@adapter.builds(specs.Bidirectional, carries=("merge", "time_major", "return_carry"))
def build_bidirectional(spec: specs.Bidirectional, ctx: Building) -> Node:
    parts = {name: ctx.build(getattr(spec, name)) for name in RNNS}
    modules = {name: node.module for name, node in parts.items()}
    return above(nn.Bidirectional(**modules, **bidirectional_options(spec)), parts, ctx)
