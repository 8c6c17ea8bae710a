"""Recurrent cells and networks."""

from __future__ import annotations

from typing import Any

import equinox as eqx

from ... import specs
from ...walk import Building, Reading
from .adapter import Node, adapter, check_one_dtype, make


def _cell_arrays(m: Any, ctx: Reading) -> dict[str, Any]:
    check_one_dtype(m.weight_hh, m.bias, ctx)
    return {"weight_x": m.weight_ih.T, "weight_h": m.weight_hh.T, "bias": m.bias}


def _cell(cls: type, spec: Any, ctx: Building, **fields: Any) -> Any:
    check_one_dtype(spec.weight_h, spec.bias, ctx)
    return make(
        cls,
        weight_ih=spec.weight_x.T,
        weight_hh=spec.weight_h.T,
        bias=spec.bias,
        input_size=spec.weight_x.shape[0],
        hidden_size=spec.hidden,
        use_bias=spec.bias is not None,
        **fields,
    )


@adapter.reads(eqx.nn.LSTMCell, specs.LSTMCell)
def read_lstm_cell(node: Node, ctx: Reading) -> specs.LSTMCell:
    return specs.LSTMCell(**_cell_arrays(node.module, ctx))


@adapter.builds(specs.LSTMCell)
def build_lstm_cell(spec: specs.LSTMCell, ctx: Building) -> Any:
    return _cell(eqx.nn.LSTMCell, spec, ctx)


@adapter.reads(eqx.nn.GRUCell, specs.GRUCell)
def read_gru_cell(node: Node, ctx: Reading) -> specs.GRUCell:
    return specs.GRUCell(**_cell_arrays(node.module, ctx), bias_n=node.module.bias_n)


@adapter.builds(specs.GRUCell)
def build_gru_cell(spec: specs.GRUCell, ctx: Building) -> Any:
    if (spec.bias is None) != (spec.bias_n is None):
        ctx.refuse("bias, bias_n", "one of two", "Equinox has both or neither")
    return _cell(eqx.nn.GRUCell, spec, ctx, bias_n=spec.bias_n)
