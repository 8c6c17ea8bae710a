"""Recurrent cells: several steps from a state that is not zero, with biases that are not."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import brainstate
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import interop
from interop.registry import registry

from . import truth
from .cases import array
from .conftest import NAMES, Framework

bnn = brainstate.nn


def weights(gates, *biases):
    """For 3 features and a state of 4: two matrices, and biases of so many gates."""
    matrices = array(3, 4 * gates, seed=40), array(4, 4 * gates, seed=41)
    return *matrices, *(array(4 * n, seed=42 + n) for n in biases)


XS, H, C = array(4, 2, 3, seed=43), array(2, 4, seed=44), array(2, 4, seed=45)
SIMPLE, LSTM, GRU, MGU = weights(1, 1), weights(4, 4), weights(3, 3, 1), weights(2, 2, 1)
URLSTM = weights(4, 1)
IMAGES = array(4, 2, 5, 6, 3, seed=46)
STATES = array(2, 5, 6, 4, seed=47), array(2, 5, 6, 4, seed=48)
CONV = array(3, 2, 3, 16, seed=49), array(3, 2, 4, 16, seed=50), *weights(1, 4, 4)[2:]


def linen(module, **parts):
    """A Linen cell with ``{name: (kernel, bias or None)}``."""
    names = ("kernel", "bias")
    params = {
        name: {k: v for k, v in zip(names, part, strict=True) if v is not None}
        for name, part in parts.items()
    }
    return module, {"params": params}


def gated(module, gates, weight_x, weight_h, bias, bias_n=None):
    """A Linen cell with a bias for the input in each gate, and another in the last."""
    split = functools.partial(np.split, indices_or_sections=len(gates), axis=-1)
    parts = {}
    for gate, x, h, b in zip(gates, split(weight_x), split(weight_h), split(bias), strict=True):
        parts |= {f"i{gate}": (x, b), f"h{gate}": (h, bias_n if gate == "n" else None)}
    return linen(module, **jax.tree.map(jnp.asarray, parts))


def dense(cell, weight_x, weight_h, bias):
    """An NNX cell with one matrix for the input, and one for the state."""
    cell.dense_i.kernel.set_value(weight_x)
    cell.dense_h.kernel.set_value(weight_h)
    cell.dense_i.bias.set_value(bias)
    return cell


def packed(cell, **parts):
    """A BrainState cell whose layers take the input and the state in one array."""
    for name, (weight_x, weight_h, bias) in parts.items():
        value = {"weight": jnp.concatenate([weight_x, weight_h])}
        getattr(cell, name).weight.value = value if bias is None else value | {"bias": bias}
    return cell


def urlstm():
    cell = packed(bnn.URLSTMCell(3, 4), W=(*URLSTM[:2], None))
    cell.bias.value = URLSTM[2]
    return cell


def equinox_gru():
    cell = eqx.nn.GRUCell(3, 4, key=jax.random.key(0))
    arrays = GRU[0].T, GRU[1].T, *GRU[2:]
    return eqx.tree_at(lambda m: (m.weight_ih, m.weight_hh, m.bias, m.bias_n), cell, arrays)


def first(arrays, at):
    return tuple(array[..., :at] for array in arrays)


def rest(arrays, at):
    return tuple(array[..., at:] for array in arrays)


def conv_lstm():
    module = nn.ConvLSTMCell(4, (3, 2))
    return linen(module, ih=(CONV[0], CONV[2]), hh=(CONV[1], CONV[3]))


RNGS = nnx.Rngs(0)
OPTIMIZED = nnx.OptimizedLSTMCell(3, 4, rngs=RNGS)
OPTIMIZED.dense_h.bias.set_value(LSTM[2])
OPTIMIZED.dense_i.kernel.set_value(LSTM[0])
OPTIMIZED.dense_h.kernel.set_value(LSTM[1])


@dataclasses.dataclass(frozen=True)
class Cell:
    """A kind of cell: its own class in each framework that has one, and what it computes."""

    expected: tuple[Any, ...]
    build: dict[str, Callable[[], Any]]
    native: tuple[str, ...]
    xs: Any = dataclasses.field(default_factory=lambda: XS)
    state: tuple[Any, ...] = (H,)


SIMPLE_CELLS = {
    "brainstate": lambda: packed(bnn.ValinaRNNCell(3, 4, activation="tanh"), W=SIMPLE),
    "nnx": lambda: dense(nnx.SimpleCell(3, 4, rngs=RNGS), *SIMPLE),
    "linen": lambda: gated(nn.SimpleCell(4), ("",), *SIMPLE),
}
RESIDUAL_CELLS = {
    "nnx": lambda: dense(nnx.SimpleCell(3, 4, residual=True, rngs=RNGS), *SIMPLE),
    "linen": lambda: gated(nn.SimpleCell(4, residual=True), ("",), *SIMPLE),
}

CELLS = {
    "simple": Cell(
        truth.simple(XS, H, *SIMPLE), SIMPLE_CELLS, native=("brainstate", "linen", "nnx")
    ),
    "residual": Cell(
        truth.simple(XS, H, *SIMPLE, residual=True), RESIDUAL_CELLS, native=("linen", "nnx")
    ),
    "lstm": Cell(
        truth.lstm(XS, H, C, *LSTM),
        {name: functools.partial(Framework(name).lstm, *LSTM) for name in NAMES},
        native=tuple(NAMES),
        state=(H, C),
    ),
    "optimized lstm": Cell(
        truth.lstm(XS, H, C, *LSTM), {"nnx": lambda: OPTIMIZED}, tuple(NAMES), state=(H, C)
    ),
    "gru": Cell(
        truth.gru(XS, H, *GRU[:3], 0.0),
        {"nnx": lambda: dense(nnx.GRUCell(3, 4, rngs=RNGS), *GRU[:3])},
        native=("nnx",),
    ),
    "gru with two biases": Cell(
        truth.gru(XS, H, *GRU),
        {"linen": lambda: gated(nn.GRUCell(4), "rzn", *GRU), "equinox": equinox_gru},
        native=("equinox", "linen"),
    ),
    "gru, reset first": Cell(
        truth.gru_reset_first(XS, H, *GRU[:3]),
        {
            "brainstate": lambda: packed(
                bnn.GRUCell(3, 4), Wrz=first(GRU[:3], 8), Wh=rest(GRU[:3], 8)
            )
        },
        native=("brainstate",),
    ),
    "mgu": Cell(
        truth.mgu(XS, H, *MGU),
        {"linen": lambda: gated(nn.MGUCell(4), "fn", *MGU)},
        native=("linen",),
    ),
    "mgu without reset": Cell(
        truth.mgu(XS, H, *MGU[:3], reset=False),
        {"linen": lambda: gated(nn.MGUCell(4, reset_gate=False), "fn", *MGU[:3])},
        native=("linen",),
    ),
    "mgu, reset first": Cell(
        truth.mgu_reset_first(XS, H, *MGU[:3]),
        {
            "brainstate": lambda: packed(
                bnn.MGUCell(3, 4), Wf=first(MGU[:3], 4), Wh=rest(MGU[:3], 4)
            )
        },
        native=("brainstate",),
    ),
    "urlstm": Cell(
        truth.urlstm(XS, H, C, *URLSTM), {"brainstate": urlstm}, ("brainstate",), state=(H, C)
    ),
    "conv lstm": Cell(
        truth.conv_lstm(IMAGES, *STATES, *CONV, pads=((1, 1), (0, 1))),
        {"linen": conv_lstm},
        native=("linen",),
        xs=IMAGES,
        state=STATES,
    ),
}
KINDS = pytest.mark.parametrize("kind", CELLS)


def close(found, wanted):
    """Four steps, in which BrainState takes 1 from a bias and adds it again."""
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def built(kind, fw):
    cell = CELLS[kind]
    if fw.name not in cell.build:
        pytest.skip(f"{fw.name} has no such cell")
    return cell, cell.build[fw.name]()


def module(model):
    return model[0] if isinstance(model, tuple) else model


@KINDS
@pytest.mark.parametrize("name", NAMES)
def test_the_source_computes_the_hand_written_formula(kind, name):
    cell, model = built(kind, Framework(name))
    close(Framework(name).steps(model, cell.xs, *cell.state), cell.expected)


@KINDS
def test_a_cell_computes_the_same_steps_there_and_back(source, target, kind):
    cell, model = built(kind, source)
    converted = target.convert_from(source, model)
    close(target.steps(converted, cell.xs, *cell.state), cell.expected)
    is_composite = type(module(converted)).__module__.startswith("interop")
    assert is_composite == (target.name not in cell.native)
    back = source.convert_from(target, converted)
    if kind != "optimized lstm":
        assert type(module(back)) is type(module(model))
    close(source.steps(back, cell.xs, *cell.state), cell.expected)


@KINDS
def test_a_cell_has_the_same_gradients_through_time(source, target, kind):
    """Compiled, and mapped over a further axis."""
    cell, model = built(kind, source)
    if source.name != min(cell.build) or kind == "optimized lstm":
        pytest.skip("once for each formula and target")
    converted = target.convert_from(source, model)
    value, (grads, dx) = wanted_gradients(kind, source.name)
    other, (there, dy) = gradients(target, converted, cell)
    close([other, dy], [value, dx])
    models = [
        m if fw.name == "linen" else module(m)
        for fw, m in ((source, model), (target, converted))
    ]
    moved = interop.mapping(*models).apply(grads, weights=False)
    close(jax.tree.leaves(there), jax.tree.leaves(moved))


@functools.cache
def wanted_gradients(kind, name):
    cell, model = built(kind, Framework(name))
    return gradients(Framework(name), model, cell)


def gradients(fw, model, cell):
    """Of the sum of squares of what two sequences give, to the parameters and the inputs."""
    root, keywords = fw.arguments(model)
    adapter = registry.adapter(fw.name)
    node = adapter.open(root, keywords.get("params"), keywords.get("state"))

    def outputs(params, xs):
        return fw.steps(adapter.native(adapter.with_parameters(node, params)), xs, *cell.state)

    def loss(params, both):
        mapped = jax.vmap(outputs, (None, 0))(params, both)
        return sum((part**2).mean() for part in mapped)

    both = jnp.stack([cell.xs, cell.xs[::-1]])
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(adapter.parameters(node), both)


HALF = [
    ("brainstate", bnn.LSTMCell, (H, C)),
    ("brainstate", bnn.GRUCell, (H,)),
    ("linen", nn.MGUCell, (H,)),
    ("equinox", eqx.nn.LSTMCell, (H, C)),
]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("name", "cls", "state"), HALF, ids=lambda value: str(value)[:20])
def test_half_precision_weights_keep_their_bits_and_the_dtype_of_the_result(
    name, cls, state, dtype
):
    source = Framework(name)
    constructor = source.CONSTRUCTORS[cls]
    options = {"recurrent_kernel_init": nn.initializers.normal()} if name == "linen" else {}
    model = source.construct(cls, (2, 3), **constructor.base, **options)
    model = jax.tree.map(lambda a: a.astype(dtype), model) if name == "equinox" else model
    if name == "linen":
        model = model[0], jax.tree.map(lambda a: a.astype(dtype), model[1])
    if name == "brainstate":
        for part in model.states(brainstate.ParamState).values():
            part.value = jax.tree.map(lambda a: a.astype(dtype), part.value)
    wanted = source.start(model, (2, 3))
    for goal in set(NAMES) - {name}:
        target = Framework(goal)
        converted = target.convert_from(source, model)
        assert [a.dtype for a in target.start(converted, (2, 3))] == [a.dtype for a in wanted]
        for given in (jnp.float32, dtype):
            inputs = [jnp.asarray(a, given) for a in (XS, *state)]
            found, expected = target.steps(converted, *inputs), source.steps(model, *inputs)
            assert [a.dtype for a in found] == [a.dtype for a in expected]
            scale = 1e-5 if given == jnp.float32 else 0.05  # sums are rounded in other places
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=scale, atol=scale)


def test_a_cell_that_has_run_converts_without_its_state():
    cell = Framework("brainstate").lstm(*LSTM)
    Framework("brainstate").steps(cell, XS, H, C)
    close(Framework("nnx").steps(interop.to_nnx(cell), XS, H, C), CELLS["lstm"].expected)


@pytest.mark.parametrize("to", [name for name in NAMES if name != "brainstate"])
def test_a_cell_in_a_stack_is_refused(to):
    stack = brainstate.nn.Sequential(
        brainstate.nn.Linear(3, 3), brainstate.nn.LSTMCell(3, 4), brainstate.nn.Linear(4, 2)
    )
    with pytest.raises(interop.UnsupportedStructureError, match=r"^model\[1\]: LSTMCell"):
        interop.convert(stack, to=to)


@pytest.mark.parametrize(
    "state_init",
    [bnn.init.Normal(), bnn.init.ZeroInit(), jnp.arange(4.0)],
    ids=["drawn", "zeros", "an array"],
)
def test_a_state_initialiser_is_carried_if_it_is_constant(state_init):
    cell = bnn.GRUCell(3, 4, state_init=state_init)
    if isinstance(state_init, bnn.init.Normal):
        with pytest.raises(interop.UnsupportedLayerError, match="state_init="):
            interop.to_nnx(cell)
        return
    wanted = Framework("brainstate").start(cell, (2, 3))
    close(Framework("nnx").start(interop.to_nnx(cell), (2, 3)), wanted)
    back = interop.from_nnx(interop.to_nnx(cell))
    close(Framework("brainstate").start(back, (2, 3)), wanted)


def test_a_cell_whose_gates_differ_in_dtype_is_refused():
    cell = nnx.LSTMCell(3, 4, rngs=RNGS)
    cell.ig.kernel.set_value(jnp.zeros((3, 4), jnp.bfloat16))
    with pytest.raises(interop.UnsupportedLayerError, match="param_dtype"):
        interop.to_equinox(cell)


def test_a_conversion_to_the_cell_with_a_random_bias_draws_nothing():
    linen_cell = interop.to_linen(urlstm())
    brainstate.random.seed(3)
    interop.from_linen(*linen_cell)
    found = brainstate.random.split_key()
    brainstate.random.seed(3)
    np.testing.assert_array_equal(
        jax.random.key_data(found), jax.random.key_data(brainstate.random.split_key())
    )


def test_gates_that_both_frameworks_keep_apart_are_the_same_arrays():
    cell = Framework("nnx").lstm(*LSTM)
    _, variables = interop.to_linen(cell)
    back = interop.convert(nn.LSTMCell(4), to="nnx", params=variables)
    names = {"if_" if gate == "if" else gate: gate for gate in variables["params"]}
    for own, gate in names.items():
        for kind, held in variables["params"][gate].items():
            assert held is getattr(getattr(cell, own), kind).get_raw_value()
            assert held is getattr(getattr(back, own), kind).get_raw_value()
    assert len(names) == 8


def test_a_gate_of_another_size_is_refused_by_name():
    cell = Framework("nnx").lstm(*LSTM)
    cell.hg.kernel.set_value(jnp.ones((4, 5)))
    with pytest.raises(interop.ConversionError, match=r"weight_h\[2\] has shape \(4, 5\)") as e:
        interop.to_linen(cell)
    assert e.value.path == "model"
