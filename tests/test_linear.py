"""Linear layers of every kind, embeddings and connections, in all directions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import brainstate
import brainunit
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brainstate.nn import (
    AllToAll,
    Embedding,
    FixedNumConn,
    Linear,
    LoRA,
    OneToOne,
    ScaledWSLinear,
    SignedWLinear,
    SparseLinear,
)
from flax import nnx

import interop
import shims
from interop.frameworks.brainstate.connections import differentiates
from interop.registry import registry

from .cases import BIAS, WEIGHT, X, array
from .conftest import NAMES, Framework
from .pairs import assert_same_arrays

GAIN, FACTORS = array(4, seed=20), array(3, seed=21)
MASK = np.arange(12, dtype=np.float32).reshape(3, 4) % 3
SIGN = 1 - MASK  # 1, 0 and -1
DOWN, UP = array(3, 2, seed=23), array(2, 4, seed=24)
ONE = jnp.float32(0.7)


@dataclass(frozen=True)
class Layer:
    """A layer of a framework with given arrays, and what it computes of them and ``x``.

    ``native`` are the targets that have such a layer, with its class there; ``returns`` tells
    whether it comes back from them as what it was.
    """

    framework: str
    build: Callable[[], Any]
    truth: Callable[..., Any]
    arrays: dict[str, Any]
    native: dict[str, type] = field(default_factory=dict)
    x: Any = field(default_factory=lambda: X)
    returns: bool = True


# -- hand-written truth: NumPy and float64 --


def standardized(weight, gain, epsilon):
    spread = ((weight - weight.mean(0)) ** 2).sum(0)  # variance times number of elements
    return gain * (weight - weight.mean(0)) / np.sqrt(np.maximum(spread, epsilon))


def sums(x, weight, out, include_self):
    """Each output is the weighted sum of the other neurons' inputs, added one by one."""
    y = np.zeros((len(x), out))
    for i, j in np.ndindex(x.shape[1], out):
        w = weight if np.ndim(weight) == 0 else weight[i, j]
        y[:, j] += x[:, i] * w * (include_self or i != j)
    return y


def scaled_layer():
    layer = ScaledWSLinear(3, 4, w_init=WEIGHT, b_init=BIAS, w_mask=MASK, eps=3.0)
    layer.weight.value = {**layer.weight.value, "gain": GAIN[None]}
    return layer


LAYERS = {
    "scaled": Layer(
        "brainstate",
        scaled_layer,
        lambda x, w, b, g: x @ (standardized(w, g, 3.0) * MASK) + b,
        {"w": WEIGHT, "b": BIAS, "g": GAIN},
    ),
    "signed": Layer(
        "brainstate",
        lambda: SignedWLinear(3, 4, w_init=WEIGHT, w_sign=SIGN),
        lambda x, w: x @ (np.abs(w) * SIGN),
        {"w": WEIGHT},
    ),
    "positive": Layer(
        "brainstate",
        lambda: SignedWLinear(3, 4, w_init=WEIGHT),
        lambda x, w: x @ np.abs(w),
        {"w": WEIGHT},
    ),
    "all to all": Layer(
        "brainstate",
        lambda: AllToAll(3, 4, w_init=WEIGHT, b_init=BIAS),
        lambda x, w, b: sums(x, w, 4, True) + b,
        {"w": WEIGHT, "b": BIAS},
        {"equinox": eqx.nn.Linear, "linen": nn.Dense, "nnx": nnx.Linear},
        returns=False,
    ),
    "all to others": Layer(
        "brainstate",
        lambda: AllToAll(4, 3, w_init=WEIGHT.T, include_self=False),
        lambda x, w: sums(x, w, 3, False),
        {"w": WEIGHT.T},
        x=array(5, 4),
    ),
    "one weight": Layer(
        "brainstate",
        lambda: AllToAll(3, 4, w_init=ONE, include_self=False, b_init=BIAS),
        lambda x, w, b: sums(x, w, 4, False) + b,
        {"w": ONE, "b": BIAS},
    ),
    "one weight for fewer": Layer(
        "brainstate",
        lambda: AllToAll(4, 3, w_init=ONE, include_self=False),
        lambda x, w: sums(x, w, 3, False),
        {"w": ONE},
        x=array(5, 4),
    ),
    "one weight for one sum": Layer(
        "brainstate",
        lambda: AllToAll(3, 4, w_init=ONE),
        lambda x, w: sums(x, w, 1, True),
        {"w": ONE},
    ),
    "one to one": Layer(
        "brainstate",
        lambda: OneToOne(3, w_init=FACTORS, b_init=BIAS[:3]),
        lambda x, w, b: x * w + b,
        {"w": FACTORS, "b": BIAS[:3]},
        {"linen": nn.Einsum, "nnx": nnx.Einsum},
    ),
    "many to many": Layer(
        "brainstate",
        lambda: OneToOne((2, 3), w_init=array(2, 3)),
        lambda x, w: x * w,
        {"w": array(2, 3)},
        {"linen": nn.Einsum, "nnx": nnx.Einsum},
        x=array(5, 2, 3),
    ),
}


# -- embeddings --

TABLE = array(5, 3, seed=22)
IDS = jnp.array([[4, 0, 4], [2, 4, 0]])  # the last row three times, the first one twice
TIMES = np.array([2, 1, 1, 1, 3])[:, None]
KEPT = np.array([1, 1, 1, 1, 0])[:, None]


def lora_linear():
    layer = nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0))
    for box, value in (
        (layer.kernel, WEIGHT),
        (layer.bias, BIAS),
        (layer.lora.lora_a, DOWN),
        (layer.lora.lora_b, UP),
    ):
        box.set_value(value)
    return layer


def lora(base=None):
    layer = LoRA(3, 2, 4, base_module=base)
    layer.weight.value = {"lora_a": DOWN, "lora_b": UP}
    return layer


ADAPTED = {"w": WEIGHT, "b": BIAS, "down": DOWN, "up": UP}
LAYERS |= {
    "low rank": Layer(
        "brainstate",
        lora,
        lambda x, down, up: x @ down @ up,
        {"down": DOWN, "up": UP},
        {"nnx": nnx.LoRA},
    ),
    "adapted": Layer(
        "brainstate",
        lambda: lora(Linear(3, 4, w_init=WEIGHT, b_init=BIAS)),
        lambda x, w, b, down, up: x @ (w + down @ up) + b,
        ADAPTED,
        {"nnx": nnx.LoRA},
    ),
    "adapted in one": Layer(
        "nnx",
        lora_linear,
        lambda x, w, b, down, up: x @ (w + down @ up) + b,
        ADAPTED,
        {"brainstate": LoRA},
        returns=False,
    ),
}


def of_equinox(weight, bias, n_in=3, n_out=4):
    layer = eqx.nn.Linear(n_in, n_out, key=jax.random.key(0))
    return eqx.tree_at(lambda m: (m.weight, m.bias), layer, (weight.T, bias))


LAYERS |= {
    "scalar input": Layer(
        "equinox",
        lambda: of_equinox(WEIGHT[:1], BIAS, n_in="scalar"),
        lambda x, w, b: x[:, None] * w + b,
        {"w": WEIGHT[:1], "b": BIAS},
        x=X[:, 0],
    ),
    "scalar output": Layer(
        "equinox",
        lambda: of_equinox(WEIGHT[:, :1], BIAS[:1], n_out="scalar"),
        lambda x, w, b: (x * w[:, 0]).sum(-1) + b,
        {"w": WEIGHT[:, :1], "b": BIAS[:1]},
    ),
}


ROWS, COLUMNS = np.array([0, 0, 1, 2]), np.array([1, 3, 0, 2])
FEW, PICKED = array(4, seed=25), array(3, 2, seed=26)
TARGETS = np.array([[1, 3], [0, 0], [3, 1]])  # two of them twice


def scattered(rows, columns):
    """``x`` times a matrix whose elements are given, one by one."""

    def run(x, w, b=0.0):
        y = np.zeros((len(x), 4))
        for i in np.ndindex(rows.shape):
            y[:, columns[i]] += x[:, rows[i]] * (w[i] if np.ndim(w) else w)
        return y + b

    return run


def sparse(form):
    """The same matrix in three forms: by rows, and by columns, whose order is another."""
    index, order = jnp.asarray, np.argsort(COLUMNS)
    parts = {
        "COO": (FEW, index(ROWS), index(COLUMNS)),
        "CSR": (FEW, index(COLUMNS), index([0, 2, 3, 4])),
        "CSC": (FEW[order], index(ROWS[order]), index([0, 1, 2, 3, 4])),
    }
    matrix = getattr(brainunit.sparse, form)(parts[form], shape=(3, 4))
    return lambda: SparseLinear(matrix, b_init=BIAS)


def fixed(weight, **options):
    layer = FixedNumConn(3, 4, 2, weight, seed=1, **options)
    columns = jnp.asarray(TARGETS)
    layer.conn = type(layer.conn)((layer.weight.value, columns), shape=(3, 4))
    return layer


_everywhere = np.arange(3)[:, None].repeat(2, 1)
LAYERS |= {
    **{
        f"sparse {form}": Layer(
            "brainstate", sparse(form), scattered(ROWS, COLUMNS), {"w": FEW, "b": BIAS}
        )
        for form in ("COO", "CSR")
    },
    "sparse CSC": Layer(
        "brainstate",
        sparse("CSC"),
        scattered(ROWS[np.argsort(COLUMNS)], np.sort(COLUMNS)),
        {"w": FEW[np.argsort(COLUMNS)], "b": BIAS},
    ),
    "fixed connections": Layer(
        "brainstate",
        lambda: fixed(PICKED),
        scattered(_everywhere, TARGETS),
        {"w": PICKED},
    ),
    "fixed connections of one weight": Layer(
        "brainstate",
        lambda: fixed(0.7),
        scattered(_everywhere, TARGETS),
        {"w": ONE},
    ),
}


def embedding(weight=TABLE, **options):
    layer = Embedding(len(weight), weight.shape[1:], **options)
    layer.weight.value = weight
    return lambda: layer


def shortened(rows, limit, order):
    norms = (np.abs(rows) ** order).sum(-1, keepdims=True) ** (1 / order)
    return rows * np.minimum(1, limit / norms)


def lookup(x, w):
    return w[np.asarray(x)]


def slope_of_rows(rows):
    """Of the sum of squares: what each place gets adds up in its row."""
    slope = np.zeros(TABLE.shape)
    np.add.at(slope, np.asarray(IDS), 2 * rows)
    return slope


class Embedded(Layer):
    """An embedding; its gradient is not that of its output."""

    def __init__(self, factors=1.0, limit=np.inf, order=2, frozen=False, **options):
        rows = np.float64(TABLE)
        if limit < np.inf:
            options |= {"max_norm": limit, "norm_type": float(order)}
            rows = shortened(rows, limit, order)
            rows = np.where(KEPT, rows, TABLE) if "padding_idx" in options else rows
        self.slope = slope_of_rows(lookup(IDS, rows)) * (0.0 if frozen else factors)
        build = embedding(freeze=frozen, **options)
        arrays = {} if frozen else {"w": TABLE}
        super().__init__("brainstate", build, lambda x, w=None: lookup(x, rows), arrays, x=IDS)


LAYERS |= {
    "padding": Embedded(KEPT, padding_idx=4),
    "short rows": Embedded(limit=1.2),
    "short rows with padding": Embedded(KEPT, limit=1.5, order=1, padding_idx=4),
    "by frequency": Embedded(1 / TIMES, scale_grad_by_freq=True),
    "by frequency with padding": Embedded(KEPT / TIMES, scale_grad_by_freq=True, padding_idx=4),
    "frozen": Embedded(frozen=True),
    "frozen with short rows": Embedded(frozen=True, limit=1.2),
    "matrices": Layer(
        "brainstate", embedding(array(5, 2, 3)), lookup, {"w": array(5, 2, 3)}, x=IDS
    ),
    "vectors": Layer(
        "brainstate",
        embedding(),
        lookup,
        {"w": TABLE},
        {"linen": nn.Embed, "nnx": nnx.Embed},
        x=IDS,
    ),
}


def slopes(layer, x, native):
    """The gradient of the sum of squares with respect to each array, by differences."""
    if isinstance(layer, Embedded):
        return [layer.slope] if layer.arrays or native else []
    arrays = {name: np.float64(a) for name, a in layer.arrays.items()}
    found = {name: np.zeros(a.shape) for name, a in arrays.items()}
    for name, slope in found.items():
        for place in np.ndindex(slope.shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = np.array(arrays[name])
                moved[place] += step
                ends.append((layer.truth(x, **(arrays | {name: moved})) ** 2).sum())
            slope[place] = (ends[0] - ends[1]) / 2e-6
    return [np.squeeze(slope) for slope in found.values()]


def gradients(fw, model, x):
    if fw.name == "linen" and "params" not in model[1]:
        return []
    grads = fw._gradients(model, x)
    grads = grads[1] if isinstance(grads, tuple) else grads
    return [np.squeeze(leaf) for leaf in jax.tree.leaves(grads)]


def part(model):
    return model[0] if isinstance(model, tuple) else model


# What BrainState itself cannot differentiate, or does wrong.
BROKEN = {("short rows with padding", "brainstate")}
if not differentiates("COO"):
    BROKEN |= {("sparse COO", "brainstate"), ("sparse CSR", "brainstate")}

CASES = [
    pytest.param(name, goal, id=f"{name}-{goal}")
    for name in LAYERS
    for goal in NAMES
    if (name, goal) not in BROKEN
]


@pytest.mark.parametrize(("name", "goal"), CASES)
def test_a_layer_computes_its_formula_and_its_gradient_in_every_framework(name, goal):
    layer = LAYERS[name]
    source, fw = Framework(layer.framework), Framework(goal)
    model = layer.build()
    shape = layer.x.shape[1:]
    converted = model
    if fw.name != source.name:
        converted = fw.convert_from(source, model, sample_input=shape)
        if goal in layer.native:
            assert type(part(converted)) is layer.native[goal]
        else:
            assert type(part(converted)) in registry.adapter(goal).composites.values()
        back = source.convert_from(fw, converted, sample_input=shape)
        if (name, "brainstate") not in BROKEN and (layer.returns or goal not in layer.native):
            assert type(part(back)) is type(part(model))
        assert_same_arrays(held(back), held(model))
    x = np.float64(layer.x) if jnp.issubdtype(layer.x.dtype, jnp.floating) else layer.x
    wanted = layer.truth(x, **{name: np.float64(a) for name, a in layer.arrays.items()})
    found = fw.call(converted, layer.x)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert_same_arrays(
        gradients(fw, converted, layer.x), slopes(layer, x, goal == layer.framework)
    )


def held(model):
    return [np.squeeze(array) for array in interop.weights(model).values()]


def test_numbers_in_the_place_of_weights_and_masks_keep_the_dtype():
    x = jnp.asarray(X, jnp.bfloat16)
    layer = AllToAll(3, 4, w_init=0.7)
    found = interop.to_nnx(layer)(x)
    assert found.dtype == layer(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, layer(x))
    masked = Linear(3, 4, w_init=jnp.asarray(WEIGHT, jnp.bfloat16), b_init=None, w_mask=0.3)
    found = interop.to_nnx(masked)(x)
    assert found.dtype == masked(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, masked(x))


def test_what_the_weight_is_multiplied_with_must_have_its_axes():
    layer = Linear((2, 3), (2, 4), w_mask=jnp.ones((2, 3, 2, 4)))
    with pytest.raises(interop.UnsupportedLayerError, match="w_mask") as e:
        interop.to_nnx(layer)
    assert e.value.option == "w_mask"


def test_a_signed_layer_after_flattened_images_has_its_rows_in_the_order_of_equinox():
    images = array(2, 4, 5, 3)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (60, 4)).astype(np.float32)
    stack = brainstate.nn.Sequential(
        brainstate.nn.Conv2d((4, 5, 3), 3, 1, w_init=array(1, 1, 3, 3)),
        brainstate.nn.Flatten(1),
        SignedWLinear(60, 4, w_init=array(60, 4), w_sign=signs),
    )
    network = interop.convert(stack, to="equinox", sample_input=(4, 5, 3))
    found = jax.vmap(network)(jnp.moveaxis(images, -1, 1))
    np.testing.assert_allclose(found, stack(images), rtol=1e-5, atol=1e-5)


def test_optimisers_do_not_see_a_frozen_table():
    stack = brainstate.nn.Sequential(embedding(freeze=True)(), Linear(3, 4))
    model = interop.to_nnx(stack)
    assert len(jax.tree.leaves(nnx.state(model, nnx.Param))) == 2
    assert len(interop.to_linen(stack)[1]["params"]) == 1
    network, state = eqx.nn.make_with_state(interop.to_equinox)(stack)
    params = eqx.filter(network, eqx.is_inexact_array)
    assert [a.shape for a in jax.tree.leaves(params)] == [(4, 3), (4,)]
    found = jax.vmap(lambda x: network(x, state)[0])(IDS[0])
    np.testing.assert_allclose(found, stack(IDS[0]), rtol=1e-5)
    states = {k: s.value for k, s in stack.states(brainstate.ParamState).items()}
    moved = interop.mapping(stack, model).apply(states)
    np.testing.assert_array_equal(
        moved["layers"][1]["kernel"].get_value(), stack.layers[1].weight.value["weight"]
    )
    assert len(jax.tree.leaves(moved)) == 2


def test_an_equinox_batch_is_counted_over_its_axis():
    layer = embedding(scale_grad_by_freq=True)()
    network = interop.to_equinox(layer)

    def loss(network):
        return (jax.vmap(network, axis_name="batch")(IDS.ravel()) ** 2).sum()

    assert_same_arrays(
        jax.tree.leaves(eqx.filter_jit(eqx.filter_grad(loss))(network)),
        [slope_of_rows(lookup(IDS, np.float64(TABLE))) / TIMES],
    )


# What each framework's own layer does with an index that is too large: its output, and the
# number of times that its gradient reaches the last row.
EDGES = {"brainstate": (TABLE[4], 0), "equinox": (TABLE[4], 1)}
EDGES |= dict.fromkeys(["linen", "nnx"], (np.full(3, np.nan), 0))


def test_an_index_that_is_too_large_is_told_of(source, target):
    model = source.embedding(TABLE)
    rows, times = EDGES[source.name]
    np.testing.assert_array_equal(source.call(model, jnp.array([7]))[0], rows)
    (grads,) = gradients(source, model, jnp.array([7]))
    np.testing.assert_allclose(grads, 2 * TABLE * times * (1 - KEPT), rtol=1e-6)
    module, keywords = source.arguments(model)
    (row,) = interop.explain(module, to=target.name, **keywords).rows
    differs = {source.name, target.name} != {"linen", "nnx"}
    assert ("too large index" in "".join(row.changes)) == differs


def test_a_composite_clamps_an_index_as_brainstate_does():
    layer = embedding(padding_idx=1)()
    model = interop.to_nnx(layer)
    np.testing.assert_array_equal(model(jnp.array([7])), layer(jnp.array([7])))
    (grads,) = gradients(Framework("nnx"), model, jnp.array([7]))
    np.testing.assert_array_equal(grads, np.zeros((5, 3)))


def test_a_sequence_of_indices_is_an_example_of_equinox():
    network = interop.convert(
        nnx.Embed(5, 3, rngs=nnx.Rngs(0)), to="equinox", sample_input=(3,)
    )
    assert jax.vmap(network)(IDS).shape == (2, 3, 3)


def test_the_base_of_an_adapted_layer_may_be_a_stack():
    stack = brainstate.nn.Sequential(Linear(3, 5), brainstate.nn.ReLU(), Linear(5, 4))
    layer = lora(stack)
    model = interop.to_nnx(layer)
    assert type(model.base_module) is nnx.Sequential
    np.testing.assert_allclose(model(X), layer(X), rtol=1e-5, atol=1e-5)
    assert type(interop.from_nnx(model).base_module) is brainstate.nn.Sequential
    assert len(interop.mapping(layer, model)) == 6
    with pytest.raises(
        interop.UnsupportedLayerError, match="LoRA to equinox: one of its parts"
    ):
        interop.to_equinox(layer)


def test_a_base_gets_the_input_that_it_got():
    """A cast of the input before the base cannot be undone there."""
    x, narrow = X, jnp.bfloat16
    base = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    outside = nnx.LoRA(3, 2, 4, base_module=base, dtype=narrow, rngs=nnx.Rngs(0))
    inside = nnx.LoRALinear(3, 4, lora_rank=2, lora_dtype=narrow, rngs=nnx.Rngs(0))
    inside.kernel.set_value(base.kernel.get_value())
    assert (outside(x) != inside(x)).any()
    for layer in (outside, inside):
        back = interop.to_nnx(interop.from_nnx(layer))
        assert type(back) is type(layer)
        np.testing.assert_array_equal(back(x), layer(x))


def test_a_network_of_one_number_comes_back_as_it_was():
    network = eqx.nn.MLP("scalar", "scalar", 4, 2, jnp.tanh, key=jax.random.key(0))
    module, variables = interop.convert(network, to="linen", sample_input=())
    x = X[:, 0]
    wanted = jax.vmap(network)(x)
    np.testing.assert_allclose(module.apply(variables, x), wanted, rtol=1e-5, atol=1e-6)
    back = interop.convert(module, params=variables, to="equinox")
    assert back.layers[0].in_features == back.layers[-1].out_features == "scalar"
    np.testing.assert_allclose(jax.vmap(back)(x), wanted, rtol=1e-5, atol=1e-6)


def test_connections_of_some_neurons_come_back_as_they_were():
    layer = FixedNumConn(5, 4, 2, 0.5, afferent_ratio=0.6, seed=3)
    assert 0 < layer.pre_selected.sum() < 5
    module, variables = interop.to_linen(layer)
    x = array(6, 5)
    rows = np.repeat(np.flatnonzero(layer.pre_selected), 2)
    wanted = scattered(rows, np.asarray(layer.conn.indices))(np.float64(x), 0.5)
    np.testing.assert_allclose(module.apply(variables, x), wanted, rtol=1e-5, atol=1e-6)
    back = interop.from_linen(module, variables)
    assert type(back) is FixedNumConn
    assert type(back.conn) is type(layer.conn)
    for name in ("indices", "indptr"):
        np.testing.assert_array_equal(getattr(back.conn, name), getattr(layer.conn, name))
    np.testing.assert_array_equal(back.pre_selected, layer.pre_selected)


def test_a_sparse_layer_is_native_where_its_gradient_is_right():
    for form, right in (("COO", differentiates("COO")), ("CSC", True)):
        model = interop.to_nnx(sparse(form)())
        back = interop.from_nnx(model)
        assert (type(back) is SparseLinear) == right
        assert_same_arrays(
            gradients(Framework("brainstate"), back, X),
            slopes(LAYERS[f"sparse {form}"], np.float64(X), True),
        )


@pytest.mark.filterwarnings("ignore:The Fp8DotGeneralOp is deprecated:DeprecationWarning")
def test_events_and_operations_of_float8_are_refused_with_the_reason():
    events = brainstate.nn.EventFixedNumConn(3, 4, 2, 1.5, seed=1)
    with pytest.raises(interop.UnsupportedLayerError, match=r"^model\[1\]: .*an event") as e:
        interop.to_nnx(brainstate.nn.Sequential(Linear(3, 3), events))
    assert "shims.wrap(model[1], into=...)" in str(e.value)
    for cls in (
        nn.Fp8DotGeneralOp,
        nn.Fp8DirectDotGeneralOp,
        nn.NANOOFp8DotGeneralOp,
        nn.Fp8Einsum,
    ):
        with pytest.raises(interop.UnsupportedLayerError, match="within a layer"):
            interop.from_linen(cls(), {})
    dense = nn.Dense(4, dot_general_cls=nn.Fp8DotGeneralOp)
    variables = dense.init(jax.random.key(0), X)
    with pytest.raises(interop.UnsupportedLayerError, match="dot_general_cls"):
        interop.from_linen(dense, variables)
    live = shims.ToNNX(dense, params=variables)
    np.testing.assert_array_equal(live(X), dense.apply(variables, X))


def test_a_general_layer_that_becomes_a_plain_one_is_mapped():
    layer = nnx.LinearGeneral(3, 4, rngs=nnx.Rngs(0))
    for name in ("brainstate", "equinox"):
        assert len(interop.mapping(layer, interop.convert(layer, to=name))) == 2


def test_a_general_layer_may_contract_no_axis(target):
    layer = nnx.LinearGeneral((), 4, axis=(), rngs=nnx.Rngs(0))
    layer.bias.set_value(BIAS)
    if target.name == "nnx":
        pytest.skip("nothing to convert")
    converted = target.convert_from(Framework("nnx"), layer, sample_input=(3,))
    wanted = np.asarray(X)[..., None] * np.asarray(layer.kernel) + np.asarray(BIAS)
    np.testing.assert_allclose(target.call(converted, X), wanted, rtol=1e-6, atol=1e-6)
