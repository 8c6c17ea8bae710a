"""Recurrent cells and networks."""

from __future__ import annotations

from typing import Any

import brainstate
import jax
import jax.numpy as jnp
import numpy as np
from brainstate import nn
from brainstate.nn import init

from ... import formulas, specs
from ...composites.brainstate import StateInit
from ...walk import Building, Reading
from .adapter import adapter, arrays_of, check_one_dtype

# A cell's hidden state is made by init_state, and belongs to a run: it is not read.


def _cell_parts(m: Any, ctx: Reading, *names: str) -> tuple[list[Any], list[Any], list[Any]]:
    """The weights for the input, those for the state, and the biases of a cell's layers."""
    parts: tuple[list[Any], list[Any], list[Any]] = [], [], []
    for name in names:
        linear = ctx.read(getattr(m, name), f"{ctx.path}.{name}")
        if type(linear) is not specs.Linear or linear.mask is not None:
            ctx.refuse(name, getattr(m, name), "only a Linear without a mask converts here")
        arrays = linear.weight[: m.num_in], linear.weight[m.num_in :], linear.bias
        for part, array in zip(parts, arrays, strict=True):
            part.append(array)
    return parts


def _joined(arrays: list[Any], ctx: Reading, name: str = "b_init") -> Any:
    """The arrays side by side; None where there is none."""
    if all(array is None for array in arrays):
        return None
    if len({array is None or array.dtype for array in arrays}) > 1:
        ctx.refuse(name, [type(array).__name__ for array in arrays], "only all alike convert")
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=-1)


# The functions of both frameworks compute the same; JAX's take no units.
_FUNCTIONS: dict[Any, Any] = {nn.relu: jax.nn.relu, nn.sigmoid: jax.nn.sigmoid}


def _cell_options(m: Any, weight: Any, ctx: Reading) -> dict[str, Any]:
    """The options that every cell has, None for the usual ones."""
    is_tanh = m.activation in (nn.tanh, jnp.tanh, jax.nn.tanh)
    return {
        "activation": None if is_tanh else _FUNCTIONS.get(m.activation, m.activation),
        "carry_init": _carry_init(m._state_initializer, weight.dtype, ctx),
    }


def _carry_init(state_init: Any, dtype: Any, ctx: Reading) -> Any:
    """A state initialiser as one that takes a key, a shape and a dtype; None for zeros."""
    own: Any = brainstate.environ.dftype()
    if isinstance(state_init, StateInit):
        return formulas.carry_init(state_init.fn, state_init.dtype, dtype)
    if type(state_init) is init.ZeroInit and state_init.unit.is_unitless:
        value = 0.0
    elif type(state_init) is init.Constant:
        value = np.asarray(state_init.value).tolist()
    elif isinstance(state_init, jax.Array | np.ndarray) and np.ndim(state_init) == 1:
        value, own = tuple(np.asarray(state_init).tolist()), state_init.dtype
    else:
        ctx.refuse(
            "state_init",
            state_init,
            "only constants convert; others draw from BrainState's random state",
            "Pass the initial state by hand",
        )
    return formulas.carry_init(formulas.Filled(value), own, dtype)


def _cell(make: Any, spec: Any, **options: Any) -> Any:
    """What the constructor of a cell makes for a spec's sizes and options."""
    dtype = spec.weight_h.dtype
    is_plain = spec.carry_init is None and dtype == brainstate.environ.dftype()
    return make(
        *spec.in_shape,
        spec.hidden,
        state_init=init.ZeroInit()
        if is_plain
        else StateInit(spec.carry_init or formulas.Filled(0.0), dtype),
        activation=spec.activation or "tanh",
        **options,
    )


def _stacked(spec: Any) -> Any:
    """The one matrix for the input and the state, side by side."""
    return jnp.concatenate([spec.weight_x, spec.weight_h])


def _swapped(array: Any) -> Any:
    """The four gates with the second and third swapped; BrainState's order is i, g, f, o."""
    if array is None:
        return None
    first, second, third, fourth = jnp.split(array, 4, axis=-1)
    return jnp.concatenate([first, third, second, fourth], axis=-1)


@adapter.reads(nn.ValinaRNNCell, specs.SimpleCell, state=("W", "h"))
def read_simple_cell(m: nn.ValinaRNNCell, ctx: Reading) -> specs.SimpleCell:
    (weight_x,), (weight_h,), (bias,) = _cell_parts(m, ctx, "W")
    options = _cell_options(m, weight_h, ctx)
    return specs.SimpleCell(weight_x=weight_x, weight_h=weight_h, bias=bias, **options)


@adapter.builds(specs.SimpleCell, carries=("activation", "carry_init"))
def build_simple_cell(spec: specs.SimpleCell, ctx: Building) -> nn.ValinaRNNCell:
    check_one_dtype(spec.weight_h, spec.bias, ctx)
    return _cell(nn.ValinaRNNCell, spec, w_init=_stacked(spec), b_init=spec.bias)


@adapter.reads(nn.LSTMCell, specs.LSTMCell, state=("W", "h", "c"))
def read_lstm_cell(m: nn.LSTMCell, ctx: Reading) -> specs.LSTMCell:
    (weight_x,), (weight_h,), (bias,) = _cell_parts(m, ctx, "W")
    return specs.LSTMCell(
        weight_x=_swapped(weight_x),
        weight_h=_swapped(weight_h),
        bias=_swapped(bias),
        forget_bias=1.0,
        **_cell_options(m, weight_h, ctx),
    )


@adapter.builds(specs.LSTMCell, carries=("activation", "forget_bias", "carry_init"))
def build_lstm_cell(spec: specs.LSTMCell, ctx: Building) -> nn.LSTMCell:
    check_one_dtype(spec.weight_h, spec.bias, ctx)
    if spec.forget_bias != 1.0:
        if spec.forget_bias or not spec.can_move_forget_bias:
            ctx.refuse(
                "forget_bias",
                spec.forget_bias,
                "BrainState adds 1 to a gate, and the bias cannot make up for it exactly",
            )
        spec = spec.with_forget_bias(1.0)
    weight, bias = _swapped(_stacked(spec)), _swapped(spec.bias)
    return _cell(nn.LSTMCell, spec, w_init=weight, b_init=bias)


@adapter.reads(nn.URLSTMCell, specs.URLSTMCell, state=("W", "bias", "h", "c"))
def read_urlstm_cell(m: nn.URLSTMCell, ctx: Reading) -> specs.URLSTMCell:
    (weight_x,), (weight_h,), (none,) = _cell_parts(m, ctx, "W")
    if none is not None:
        ctx.refuse("W", m.W, "the layer of this cell has no bias of its own")
    bias = arrays_of(m, ctx, "bias", bias=(m.num_out,))["bias"]
    options = _cell_options(m, weight_h, ctx)
    return specs.URLSTMCell(weight_x=weight_x, weight_h=weight_h, bias=bias, **options)


@adapter.builds(specs.URLSTMCell, carries=("activation", "carry_init"))
def build_urlstm_cell(spec: specs.URLSTMCell, ctx: Building) -> Any:
    def make(*sizes: Any, **options: Any) -> Any:
        cell: Any = nn.URLSTMCell.__new__(nn.URLSTMCell)
        cell._forget_bias = lambda: spec.bias  # which draws from the random state
        nn.URLSTMCell.__init__(cell, *sizes, **options)
        del cell._forget_bias
        return cell

    return _cell(make, spec, w_init=_stacked(spec))


@adapter.reads(nn.GRUCell, specs.GRUCell, state=("Wrz", "Wh", "h"))
@adapter.reads(nn.MGUCell, specs.MGUCell, state=("Wf", "Wh", "h"))
def read_gru_cell(m: nn.GRUCell | nn.MGUCell, ctx: Reading) -> specs.GRUCell | specs.MGUCell:
    is_gru = isinstance(m, nn.GRUCell)
    x, h, bias = _cell_parts(m, ctx, "Wrz" if is_gru else "Wf", "Wh")
    weight_h = _joined(h, ctx, "w_init")
    return (specs.GRUCell if is_gru else specs.MGUCell)(
        weight_x=_joined(x, ctx, "w_init"),
        weight_h=weight_h,
        bias=_joined(bias, ctx),
        bias_n=None,
        reset_first=True,
        **_cell_options(m, weight_h, ctx),
    )


@adapter.builds(specs.GRUCell, carries=("activation", "reset_first", "carry_init"))
@adapter.builds(specs.MGUCell, carries=("activation", "reset_first", "carry_init"))
def build_gru_cell(spec: specs.GRUCell | specs.MGUCell, ctx: Building) -> Any:
    if not spec.reset_first or spec.bias_n is not None:
        ctx.refuse(
            "reset_first",
            spec.reset_first,
            "BrainState multiplies the state with the reset gate, and others its product with "
            "the weights",
        )
    check_one_dtype(spec.weight_h, spec.bias, ctx)
    is_gru, at = isinstance(spec, specs.GRUCell), -spec.hidden
    weight, bias = _stacked(spec), spec.bias
    empty = {"w_init": jnp.zeros, "b_init": None if bias is None else jnp.zeros}
    cell = _cell(nn.GRUCell if is_gru else nn.MGUCell, spec, **empty)
    for layer, part in (
        (cell.Wrz if is_gru else cell.Wf, slice(at)),
        (cell.Wh, slice(at, None)),
    ):
        arrays = {"weight": weight[:, part]}
        layer.weight.value = arrays if bias is None else arrays | {"bias": bias[part]}
    return cell
