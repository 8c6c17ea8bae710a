"""Recurrent cells and networks."""

from __future__ import annotations

from functools import partial
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


def _cell_arrays(m: Any, ctx: Reading, **layers: tuple[int, ...]) -> dict[str, Any]:
    """The weights for the input, those for the state, and the biases, of a cell's layers.

    ``layers`` says of each layer where its gates belong among those of the whole cell.
    """
    found: dict[int, tuple[Any, Any, Any]] = {}
    for name, places in layers.items():
        linear = ctx.read(getattr(m, name), f"{ctx.path}.{name}")
        if type(linear) is not specs.Linear or linear.mask is not None:
            ctx.refuse(name, getattr(m, name), "only a Linear without a mask converts here")
        is_one = len(places) == 1  # whose bias is shared
        gates = _cut(linear.weight, None if is_one else linear.bias, m.num_in, len(places))
        if is_one:
            gates = [(*gates[0][:2], linear.bias)]
        found |= zip(places, gates, strict=True)
    x, h, bias = zip(*(found[place] for place in range(len(found))), strict=True)
    return {
        "weight_x": _joined(x, ctx, "w_init"),
        "weight_h": _joined(h, ctx, "w_init"),
        "bias": _joined(bias, ctx, "b_init"),
    }


@partial(jax.jit, static_argnums=(2, 3))
def _cut(weight: Any, bias: Any, inputs: int, gates: int) -> list[tuple[Any, Any, Any]]:
    """The rows for the input, those for the state, and the bias of each gate, in one copy."""
    weights = [jnp.split(part, gates, axis=-1) for part in (weight[:inputs], weight[inputs:])]
    biases = [None] * gates if bias is None else jnp.split(bias, gates)
    return list(zip(*weights, biases, strict=True))


def _joined(arrays: tuple[Any, ...], ctx: Reading, name: str) -> Any:
    """The arrays of a cell's gates side by side; None where there is none."""
    if all(array is None for array in arrays):
        return None
    if len({array is None or array.dtype for array in arrays}) > 1:
        ctx.refuse(name, [type(array).__name__ for array in arrays], "only all alike convert")
    return arrays[0] if len(arrays) == 1 else specs.Gates(arrays)


def _packed(spec: Any, number: int, *gates: int) -> tuple[Any, Any]:
    """The matrix for the input and the state, and the bias, of some of a cell's gates."""
    arrays = (spec.weight_x, spec.weight_h, spec.bias)
    split = any(map(specs.is_split, jax.tree.leaves(arrays)))
    weight, bias = _pack(arrays, number, gates, split)
    if spec.bias is not None and len(gates) == 1:
        bias = specs.Gates.split(spec.bias, number)[gates[0]]  # the same array
    return weight, bias


@partial(jax.jit, static_argnums=(1, 2, 3))
def _pack(arrays: Any, number: int, gates: tuple[int, ...], split: bool) -> tuple[Any, Any]:
    """Those gates of the weights for the input and the state, and of the bias, in one copy."""
    parts: Any = [None if a is None else specs.Gates.split(a, number) for a in arrays]
    x, h, bias = parts
    blocks = [jnp.concatenate([x[gate], h[gate]]) for gate in gates]
    if split:
        weight = jnp.concatenate(blocks, axis=-1)
    else:  # takes a third of the time, and would gather what is split
        weight = jnp.stack(blocks, axis=1).reshape(len(blocks[0]), -1)
    return weight, bias and jnp.concatenate([bias[gate] for gate in gates])


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


@adapter.reads(nn.ValinaRNNCell, specs.SimpleCell, state=("W", "h"))
def read_simple_cell(m: nn.ValinaRNNCell, ctx: Reading) -> specs.SimpleCell:
    arrays = _cell_arrays(m, ctx, W=(0,))
    return specs.SimpleCell(**arrays, **_cell_options(m, arrays["weight_h"], ctx))


@adapter.builds(specs.SimpleCell, carries=("activation", "carry_init"))
def build_simple_cell(spec: specs.SimpleCell, ctx: Building) -> nn.ValinaRNNCell:
    check_one_dtype(spec.weight_h, spec.bias, ctx)
    weight, bias = _packed(spec, 1, 0)
    return _cell(nn.ValinaRNNCell, spec, w_init=weight, b_init=bias)


_LSTM_GATES = (0, 2, 1, 3)  # BrainState's order is i, g, f, o


@adapter.reads(nn.LSTMCell, specs.LSTMCell, state=("W", "h", "c"))
def read_lstm_cell(m: nn.LSTMCell, ctx: Reading) -> specs.LSTMCell:
    arrays = _cell_arrays(m, ctx, W=_LSTM_GATES)
    options = _cell_options(m, arrays["weight_h"], ctx)
    return specs.LSTMCell(**arrays, forget_bias=1.0, **options)


@adapter.builds(specs.LSTMCell, carries=("activation", "forget_bias", "carry_init"), apart=True)
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
    weight, bias = _packed(spec, 4, *_LSTM_GATES)
    return _cell(nn.LSTMCell, spec, w_init=weight, b_init=bias)


@adapter.reads(nn.URLSTMCell, specs.URLSTMCell, state=("W", "bias", "h", "c"))
def read_urlstm_cell(m: nn.URLSTMCell, ctx: Reading) -> specs.URLSTMCell:
    arrays = _cell_arrays(m, ctx, W=(0, 1, 2, 3))
    if arrays["bias"] is not None:
        ctx.refuse("W", m.W, "the layer of this cell has no bias of its own")
    arrays |= arrays_of(m, ctx, "bias", bias=(m.num_out,))
    return specs.URLSTMCell(**arrays, **_cell_options(m, arrays["weight_h"], ctx))


@adapter.builds(specs.URLSTMCell, carries=("activation", "carry_init"))
def build_urlstm_cell(spec: specs.URLSTMCell, ctx: Building) -> Any:
    def make(*sizes: Any, **options: Any) -> Any:
        cell: Any = nn.URLSTMCell.__new__(nn.URLSTMCell)
        cell._forget_bias = lambda: spec.bias  # which draws from the random state
        nn.URLSTMCell.__init__(cell, *sizes, **options)
        del cell._forget_bias
        return cell

    return _cell(make, spec, w_init=_packed(spec, 1, 0)[0])


@adapter.reads(nn.GRUCell, specs.GRUCell, state=("Wrz", "Wh", "h"))
@adapter.reads(nn.MGUCell, specs.MGUCell, state=("Wf", "Wh", "h"))
def read_gru_cell(m: nn.GRUCell | nn.MGUCell, ctx: Reading) -> specs.GRUCell | specs.MGUCell:
    is_gru = isinstance(m, nn.GRUCell)
    if is_gru:
        arrays = _cell_arrays(m, ctx, Wrz=(0, 1), Wh=(2,))
    else:
        arrays = _cell_arrays(m, ctx, Wf=(0,), Wh=(1,))
    options = _cell_options(m, arrays["weight_h"], ctx)
    cell = specs.GRUCell if is_gru else specs.MGUCell
    return cell(**arrays, bias_n=None, reset_first=True, **options)


@adapter.builds(specs.GRUCell, carries=("activation", "reset_first", "carry_init"), apart=True)
@adapter.builds(specs.MGUCell, carries=("activation", "reset_first", "carry_init"), apart=True)
def build_gru_cell(spec: specs.GRUCell | specs.MGUCell, ctx: Building) -> Any:
    if not spec.reset_first or spec.bias_n is not None:
        ctx.refuse(
            "reset_first",
            spec.reset_first,
            "BrainState multiplies the state with the reset gate, and others its product with "
            "the weights",
        )
    check_one_dtype(spec.weight_h, spec.bias, ctx)
    is_gru = isinstance(spec, specs.GRUCell)
    empty = {"w_init": jnp.zeros, "b_init": None if spec.bias is None else jnp.zeros}
    cell = _cell(nn.GRUCell if is_gru else nn.MGUCell, spec, **empty)
    layers = ((cell.Wrz, 0, 1), (cell.Wh, 2)) if is_gru else ((cell.Wf, 0), (cell.Wh, 1))
    for layer, *gates in layers:
        weight, bias = _packed(spec, 3 if is_gru else 2, *gates)
        arrays = {"weight": weight}
        layer.weight.value = arrays if bias is None else arrays | {"bias": bias}
    return cell
