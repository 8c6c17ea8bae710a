"""Cells along a sequence: RNN and Bidirectional, with options of the layer and of a call."""

import brainstate
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import interop
from interop.composites.brainstate import RNN, LSTMCell

from . import truth
from .cases import array
from .conftest import NAMES, Framework

BATCH, TIME = 3, 5
X = array(BATCH, TIME, 3, seed=60)
LENGTHS = jnp.array([2, 5, 3])
LSTM = array(3, 16, seed=61), array(4, 16, seed=62), array(16, seed=63)
GRU = array(3, 6, seed=64), array(2, 6, seed=65), array(6, seed=66)
H, C, G = array(BATCH, 4, seed=67), array(BATCH, 4, seed=68), array(BATCH, 2, seed=69)


def nnx_gru():
    cell = nnx.GRUCell(3, 2, rngs=nnx.Rngs(0))
    cell.dense_i.kernel.set_value(GRU[0])
    cell.dense_h.kernel.set_value(GRU[1])
    cell.dense_i.bias.set_value(GRU[2])
    return cell


def rnn(name, **options):
    """An LSTM along a sequence."""
    cell = Framework(name).lstm(*LSTM)
    if name == "nnx":
        return nnx.RNN(cell, **options)
    module, variables = cell
    return nn.RNN(module, **options), {"params": {"cell": variables["params"]}}


def call(name, model, x, **options):
    """A call for a batch in canonical form: states with the output first."""
    carry = options.pop("initial_carry", None)
    if name in ("linen", "nnx"):
        options |= {} if carry is None else {"initial_carry": flipped(carry)}
        module, variables = model if name == "linen" else (model, None)
        out = module.apply(variables, x, **options) if name == "linen" else module(x, **options)
        return (flipped(out[0]), out[1]) if isinstance(out, tuple) else out
    options |= {} if carry is None else {"initial_carry": carry}
    if name == "brainstate":
        return model(x, **options)
    model = model[0] if isinstance(model, tuple) else model
    time_major = options.get("time_major", False)
    arrays = {k: v for k, v in options.items() if k in ("initial_carry", "seq_lengths")}
    rest = {k: v for k, v in options.items() if k not in arrays}
    x = x.swapaxes(0, 1) if time_major else x
    out = jax.vmap(lambda x, arrays: model(x, **arrays, **rest))(x, arrays)
    carry, y = out if isinstance(out, tuple) else (None, out)
    y = y.swapaxes(0, 1) if time_major else y
    return y if carry is None else (carry, y)


def flipped(carry):
    """A carry of Flax, or a pair of them, with the output first; its own inverse."""
    if not isinstance(carry, tuple):
        return carry
    if isinstance(carry[0], tuple) or carry[0].shape != carry[1].shape:
        return tuple(map(flipped, carry))
    return carry[::-1]


def expected(x=X, h=None, c=None, lengths=None, reverse=False, keep_order=False):
    """Each sequence by itself, without what is beyond its length: last states and outputs."""
    states, outputs = [], []
    for i in range(BATCH):
        n = TIME if lengths is None else int(lengths[i])
        zero = np.zeros(4)
        start = (zero if h is None else h[i], zero if c is None else c[i])
        xs = x[i, :n][::-1] if reverse else x[i, :n]
        hs, last = truth.lstm(xs, *start, *LSTM)
        states.append((hs[-1], last))
        hs = hs[::-1] if reverse and keep_order else hs
        outputs.append(hs)
    return [np.stack(part) for part in zip(*states, strict=True)], outputs


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def same_outputs(found, wanted):
    """Up to each sequence's length."""
    for one, other in zip(found, wanted, strict=True):
        close(one[: len(other)], other)


PAIRS = [(a, b) for a in ("nnx", "linen") for b in NAMES if a != b]
OPTIONS = [
    {},
    {"initial_carry": (H, C), "return_carry": True},
    {"reverse": True, "return_carry": True},
    {"reverse": True, "keep_order": True, "seq_lengths": LENGTHS, "return_carry": True},
    {"seq_lengths": LENGTHS, "return_carry": True, "initial_carry": (H, C)},
    {"time_major": True, "return_carry": True},
]
OF_A_CALL = ("initial_carry", "seq_lengths")


ROWS = [(*pair, options, False) for pair in PAIRS for options in OPTIONS]
ROWS += [
    ("nnx", goal, options, True) for goal in ("linen", "equinox") for options in OPTIONS[2:]
]


@pytest.mark.parametrize(("name", "goal", "options", "by_call"), ROWS)
def test_an_rnn_computes_the_same_with_options_of_the_layer_or_of_the_call(
    name, goal, options, by_call
):
    arrays = {k: v for k, v in options.items() if k in OF_A_CALL}
    own = {} if by_call else {k: v for k, v in options.items() if k not in OF_A_CALL}
    asked = {**options} if by_call else arrays
    if goal == "equinox" and options.get("time_major"):
        asked["time_major"] = True  # for how this test maps over the batch
    model = rnn(name, **own)
    converted = Framework(goal).convert_from(Framework(name), model)
    state = dict(zip("hc", options.get("initial_carry", ()), strict=False))
    states, outputs = expected(
        lengths=options.get("seq_lengths"),
        reverse=options.get("reverse", False),
        keep_order=options.get("keep_order", False),
        **state,
    )
    x = X.swapaxes(0, 1) if options.get("time_major") else X
    found = call(goal, converted, x, **asked)
    carry, y = found if options.get("return_carry") else (None, found)
    same_outputs(y.swapaxes(0, 1) if options.get("time_major") else y, outputs)
    if carry is not None:
        for one, other in zip(carry, states, strict=True):
            close(one, other)


@pytest.mark.parametrize(("name", "goal"), PAIRS)
def test_two_directions_are_merged(name, goal):
    model = bidirectional(name)
    fw = Framework(goal)
    converted = fw.convert_from(Framework(name), model)
    (forward, backward), y = call(
        goal, converted, X, seq_lengths=LENGTHS, initial_carry=((H, C), G)
    )
    states, outputs = expected(h=H, c=C, lengths=LENGTHS)
    for i, length in enumerate(LENGTHS.tolist()):
        (hs,) = truth.gru(X[i, :length][::-1], G[i], *GRU, 0.0)
        close(y[i, :length], np.concatenate([outputs[i], hs[::-1]], -1))
        close(backward[i], hs[-1])
    for one, other in zip(forward, states, strict=True):
        close(one, other)
    back = Framework(name).convert_from(fw, converted)
    part = back[0] if isinstance(back, tuple) else back
    assert type(part) is type(model[0] if isinstance(model, tuple) else model)
    close(call(name, back, X)[1], call(name, model, X)[1])


def bidirectional(name):
    model = nnx.Bidirectional(nnx.RNN(lstm()), nnx.RNN(nnx_gru()), return_carry=True)
    return model if name == "nnx" else interop.to_linen(model)


def lstm():
    return Framework("nnx").lstm(*LSTM)


def test_gradients_pass_through_the_steps_of_a_composite():
    """To the parameters of a BrainState model, by a mapping those of the NNX model."""
    model = rnn("nnx")
    wanted = nnx.grad(lambda m: (m(X) ** 2).sum())(model)
    converted = interop.from_nnx(model)
    params = converted.states(brainstate.ParamState)
    found = brainstate.transform.grad(lambda: (converted(X) ** 2).sum(), params)()
    moved = interop.mapping(model, converted).apply(wanted, weights=False)
    assert found.keys() == moved.keys()
    for path, grad in found.items():
        close(grad, moved[path])


def test_a_cell_in_both_directions_stays_one_or_is_refused():
    cell = lstm()
    model = nnx.Bidirectional(nnx.RNN(cell), nnx.RNN(cell))
    for convert in (interop.from_nnx, interop.to_equinox, interop.to_linen):
        with pytest.raises(interop.UnsupportedStructureError, match=r"used (a second|in two)"):
            convert(model) if convert is not interop.from_nnx else interop.from_nnx(model)
    shared = nnx.RNN(lstm())
    linen, variables = interop.to_linen(nnx.Bidirectional(shared, shared))
    assert linen.forward_rnn is linen.backward_rnn
    assert variables["params"].keys() == {"forward_rnn"}
    back = interop.convert(linen, to="nnx", params=variables)
    assert back.forward_rnn is back.backward_rnn
    close(back(X), nnx.Bidirectional(shared, shared)(X))


def test_a_linen_cell_under_two_names_is_read_as_one():
    cell = nn.GRUCell(4)
    module = nn.Bidirectional(nn.RNN(cell), nn.RNN(cell))
    variables = module.init(jax.random.key(0), X)
    converted = interop.convert(module, to="nnx", params=variables)
    assert converted.forward_rnn.cell is converted.backward_rnn.cell
    close(converted(X), module.apply(variables, X))


def test_missing_variables_of_a_cell_are_named():
    module, variables = rnn("linen")
    variables["params"]["cell"].pop("hf")
    with pytest.raises(interop.ConversionError, match="params/cell/hf/kernel"):
        interop.convert(module, to="nnx", params=variables)


def test_a_convolutional_cell_along_time_has_channels_first_in_equinox():
    cell = nn.ConvLSTMCell(4, (3, 2))
    module = nn.RNN(cell, return_carry=True)
    x = array(2, 4, 5, 6, 3, seed=70)
    variables = module.init(jax.random.key(0), x)
    (c, h), y = module.apply(variables, x)
    converted = interop.convert(module, to="equinox", params=variables)
    (h2, c2), y2 = jax.vmap(converted)(jnp.moveaxis(x, -1, 1))
    close(jnp.moveaxis(y2, 1, -1), y)
    close(jnp.moveaxis(h2, 1, -1), h)
    close(jnp.moveaxis(c2, 1, -1), c)


def test_a_composite_rnn_takes_a_cell_and_names_what_is_none():
    cell = LSTMCell(3, 4)
    layer = RNN(cell, reverse=True, keep_order=True)
    close(layer.spec.cell.weight_x, cell.weight_x.value)
    assert layer(X).shape == (BATCH, TIME, 4)
    with pytest.raises(interop.ArgumentError, match="Linear"):
        RNN(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(interop.ArgumentError, match="no options masks"):
        layer(X, masks=None)
