"""The correspondence of two models' weights, and what it does to trees of their shape."""

import brainstate
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import interop
from interop import correspondence, rearrangement

from .cases import (
    BIAS,
    BIAS_2,
    EPSILON,
    MEAN,
    MOMENTUM,
    SCALE,
    SHIFT,
    VAR,
    WEIGHT,
    WEIGHT_2,
    array,
)
from .conftest import Framework

NAMES = ("brainstate", "equinox", "linen", "nnx")
X, Y = array(8, 3, seed=30), array(8, 2, seed=31)


def stack(fw):
    inner = fw.sequential(fw.activation(jnp.tanh), fw.linear(WEIGHT_2, BIAS_2))
    return fw.sequential(fw.layer_norm(SCALE, SHIFT, EPSILON), fw.linear(WEIGHT, BIAS), inner)


def parameters(name, model):
    """What the framework's optimisers take, by its own public API."""
    if name == "brainstate":
        return {k: s.value for k, s in model.states(brainstate.ParamState).items()}
    if name == "nnx":
        return nnx.state(model, nnx.Param)
    if name == "linen":
        return model[1]["params"]
    return eqx.filter(model, eqx.is_inexact_array)


def output(name, model, params):
    """On ``X``, in evaluation mode, with ``params`` in the model's place."""
    if name == "nnx":
        definition, _, rest = nnx.split(model, nnx.Param, ...)
        return nnx.merge(definition, params, rest)(X)
    if name == "linen":
        return model[0].apply({**model[1], "params": params}, X)
    return jax.vmap(eqx.combine(params, model))(X)


def gradients(name, model, params):
    """Mean squared error and its gradient, by the framework's own means."""
    if name != "brainstate":
        return jax.value_and_grad(lambda p: ((output(name, model, p) - Y) ** 2).mean())(params)
    states = model.states(brainstate.ParamState)
    for path, state in states.items():
        state.value = params[path]
    grad = brainstate.transform.grad(
        lambda: ((model(X) - Y) ** 2).mean(), states, return_value=True
    )
    grads, value = grad()
    return value, dict(grads)


OPTIMIZER = optax.adamw(optax.exponential_decay(0.05, 5, 0.9), weight_decay=1e-2)


def train(name, model, params, state, steps):
    losses = []
    for _ in range(steps):
        value, grads = gradients(name, model, params)
        updates, state = OPTIMIZER.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    if name == "brainstate":
        gradients(name, model, params)  # leaves the last parameters in the states
    return losses, params, state


@pytest.mark.parametrize("into", ["equinox", "linen", "nnx"])
def test_a_training_run_is_resumed_in_another_framework(into):
    source = Framework("brainstate")
    model = stack(source)
    params = parameters("brainstate", model)
    straight, _, _ = train("brainstate", stack(source), params, OPTIMIZER.init(params), 20)
    first, params, state = train("brainstate", model, params, OPTIMIZER.init(params), 10)

    converted = interop.convert(model, to=into)
    moved = interop.mapping(model, converted).apply(state)
    native = parameters(into, converted)
    assert jax.tree.structure(moved) == jax.tree.structure(OPTIMIZER.init(native))
    second, _, _ = train(into, converted, native, moved, 10)
    np.testing.assert_allclose(first + second, straight, rtol=1e-4)
    assert straight[-1] < straight[10] < straight[0]


@pytest.mark.parametrize("framework", NAMES)
def test_gradients_move_with_the_mapping(framework):
    """The truth is the other framework's own gradient."""
    model = stack(Framework("brainstate"))
    grads = gradients("brainstate", model, parameters("brainstate", model))[1]
    other = stack(Framework(framework))
    expected = gradients(framework, other, parameters(framework, other))[1]
    moved = interop.mapping(model, other).apply(grads)
    assert jax.tree.structure(moved) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), moved, expected
    )


@pytest.mark.parametrize("a", NAMES)
@pytest.mark.parametrize("b", NAMES)
def test_inverting_and_chaining_mappings_is_exact(a, b):
    first, second = stack(Framework(a)), stack(Framework(b))
    there, back = interop.mapping(first, second), interop.mapping(second, first)
    middle = interop.mapping(second, stack(Framework("nnx")))
    assert len(there) == 6
    assert dict(_moves(there.invert())) == dict(_moves(back))
    assert there.then(middle) == interop.mapping(first, stack(Framework("nnx")))
    params = parameters(a, first)
    again = back.apply(there.apply(params))
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def _moves(mapping):
    return {change.target: (change.sources, change.pieces) for change in mapping.changes}


def test_a_mapping_reads_as_a_table():
    model = Framework("brainstate").sequential(Framework("brainstate").linear(WEIGHT, BIAS))
    assert str(interop.mapping(model, to="equinox")).splitlines() == [
        "brainstate -> equinox: 2 parameters",
        "  layers[0].weight.weight (3, 4)  ->  layers[0].weight (4, 3)  transpose (1, 0)",
        "  layers[0].weight.bias (4,)      ->  layers[0].bias (4,)      same",
    ]


def test_arrays_of_equal_layout_stay_the_same_objects():
    model = stack(Framework("nnx"))
    params = parameters("nnx", model)
    moved = interop.mapping(model, to="linen").apply(params)
    assert moved["layers_1"]["kernel"] is params["layers"][1]["kernel"].get_value()


def test_what_is_no_parameter_stays_as_it_is():
    model = stack(Framework("linen"))
    params = parameters("linen", model)
    count, key = jnp.array(3), jax.random.key(0)
    tree = {"params": params, "step": count, "rest": (key, None, [params, "text"])}
    moved = interop.mapping(model, to="equinox").apply(tree)
    assert moved["step"] is count
    assert moved["rest"][0] is key
    assert moved["rest"][1:2] + tuple(moved["rest"][2][1:]) == (None, "text")
    for part in (moved["params"], moved["rest"][2][0]):
        np.testing.assert_array_equal(part.layers[1].weight, WEIGHT.T)


def one_linear():
    return interop.mapping(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), to="equinox")


def test_brainstate_s_own_container_of_states_is_one_of_parameters():
    model = stack(Framework("brainstate"))
    params = parameters("brainstate", model)
    moved = interop.mapping(model, to="linen").apply(brainstate.util.FlattedDict(params))
    jax.tree.map(
        np.testing.assert_array_equal, moved, interop.mapping(model, to="linen").apply(params)
    )


def test_masks_and_labels_stay_with_their_parameter():
    mask = one_linear().apply({"kernel": True, "bias": False})
    assert (mask.weight, mask.bias) == (True, False)
    labels = one_linear().apply({"kernel": "slow", "bias": "fast"})
    assert (labels.weight, labels.bias) == ("slow", "fast")
    whole = one_linear().apply({"kernel": np.arange(12).reshape(3, 4) > 5, "bias": None})
    np.testing.assert_array_equal(whole.weight, (np.arange(12).reshape(3, 4) > 5).T)
    assert type(whole.weight) is np.ndarray
    assert whole.bias is None
    state = optax.masked(optax.adam(1e-3), {"kernel": True, "bias": False}).init(
        {"kernel": WEIGHT, "bias": BIAS}
    )
    moved = one_linear().apply(state)
    assert moved.inner_state[0].mu.weight.shape == (4, 3)
    assert moved.inner_state[0].mu.bias == optax.MaskedNode()


def test_shardings_move_with_their_axes():
    moved = one_linear().apply({"kernel": P("data", "model"), "bias": P("model")})
    assert (moved.weight, moved.bias) == (P("model", "data"), P("model"))
    moved = one_linear().apply({"kernel": P("data"), "bias": P()})
    assert (moved.weight, moved.bias) == (P(None, "data"), P())
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    sharding = NamedSharding(mesh, P("data", "model"))
    shapes = jax.ShapeDtypeStruct((3, 4), jnp.float32)
    moved = one_linear().apply({"kernel": sharding, "bias": NamedSharding(mesh, P())})
    assert moved.weight.spec == P("model", "data")
    moved = one_linear().apply({"kernel": shapes, "bias": None})
    assert (moved.weight.shape, moved.weight.dtype) == ((4, 3), jnp.float32)


def test_a_mapping_works_inside_jit():
    apply = jax.jit(one_linear().apply)
    np.testing.assert_array_equal(apply({"kernel": WEIGHT, "bias": BIAS}).weight, WEIGHT.T)


@pytest.mark.parametrize("into", NAMES)
def test_a_mapping_survives_json(into):
    model = stack(Framework("nnx"))
    mapping = interop.mapping(model, to=into)
    loaded = interop.WeightMapping.from_json(mapping.to_json())
    assert loaded == mapping
    assert hash(loaded) == hash(mapping)
    params = parameters("nnx", model)
    expected = mapping.apply(params)
    if into == "equinox":
        with pytest.raises(interop.ArgumentError, match="like="):
            loaded.apply(params)
    found = loaded.apply(params, like=expected if into == "equinox" else None)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_running_statistics_are_not_in_a_mapping():
    native = Framework("equinox")
    model = native.batch_norm(SCALE, SHIFT, MEAN, VAR, EPSILON, MOMENTUM)
    mapping = interop.mapping(model, to="linen")
    assert {change.target for change in mapping.changes} == {("scale",), ("bias",)}


def test_tied_layers_are_mapped_once():
    layer = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    assert len(interop.mapping(nnx.Sequential(layer, layer), to="linen")) == 2


def test_a_registered_layer_is_mapped_through_its_callbacks():
    from .test_registration import GAIN, MAPPINGS, NnxGain

    model = nnx.Sequential(jnp.tanh, NnxGain(GAIN))
    with interop.registered(MAPPINGS["nnx"], MAPPINGS["linen"]):
        mapping = interop.mapping(model, to="linen")
    moved = mapping.apply(nnx.state(model, nnx.Param))
    np.testing.assert_array_equal(moved["layers_1"]["gain"], GAIN)


def test_a_constant_that_a_reader_adds_is_told_from_a_move():
    from .test_registration import GAIN, Gain, GainSpec, by_rules

    with interop.registered():
        by_rules()

        @interop.register_reader(Gain, GainSpec)
        def read_gain(layer, ctx):
            return GainSpec(gain=layer.gain.value[::-1] + jnp.array([0.0, 1.0, 1.0, 0.0]))

        model = Gain(GAIN)
        mapping = interop.mapping(model, to="nnx")
    params = {("gain",): GAIN}
    with pytest.raises(interop.ArgumentError, match="weights=True"):
        mapping.apply(params)
    weights, grads = mapping.apply(params, weights=True), mapping.apply(params, weights=False)
    expected = GAIN[::-1] + jnp.array([0.0, 1.0, 1.0, 0.0])
    np.testing.assert_allclose(weights["gain"].get_value(), expected, rtol=1e-6)
    np.testing.assert_array_equal(grads["gain"].get_value(), GAIN[::-1])
    back = mapping.invert().apply(weights, weights=True)
    np.testing.assert_allclose(back["gain",], GAIN, rtol=1e-6)
    assert "add +1" in str(mapping)


@pytest.mark.parametrize("base", [2, 6])
@pytest.mark.parametrize("into", ["equinox", "linen"])
def test_numbers_of_many_digits_give_the_same_mapping(monkeypatch, base, into):
    """As models have them with more elements than there are exact floating-point numbers."""
    cell = brainstate.nn.LSTMCell(3, 4, w_init=array(7, 16), b_init=array(16))
    expected = interop.mapping(cell, to=into)
    monkeypatch.setattr(correspondence, "_BASE", base)
    assert interop.mapping(cell, to=into) == expected


def test_a_reader_that_mixes_weights_is_refused():
    from .test_registration import GAIN, Gain, GainSpec, by_rules

    with interop.registered():
        by_rules()

        @interop.register_reader(Gain, GainSpec)
        def read_gain(layer, ctx):
            return GainSpec(gain=layer.gain.value + layer.gain.value[::-1])

        with pytest.raises(interop.ConversionError, match="from several weights") as e:
            interop.mapping(Gain(GAIN), to="nnx")
    assert e.value.path == "model"


LINEAR = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
BAD_MAPPINGS = {
    "no target": (lambda: interop.mapping(LINEAR), "two models, or one"),
    "two targets": (lambda: interop.mapping(LINEAR, LINEAR, to="nnx"), "two models, or one"),
    "no model": (lambda: interop.mapping(LINEAR, 3.0), "builtins.float is not a module"),
    "linen without variables": (
        lambda: interop.mapping(nn.Dense(4), LINEAR),
        "keep their weights outside",
    ),
    "another number of layers": (
        lambda: interop.mapping(
            LINEAR, nnx.Sequential(LINEAR, nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
        ),
        "nnx has 1 layers with parameters",
    ),
    "other shapes": (
        lambda: interop.mapping(
            nnx.Sequential(jnp.tanh, LINEAR),
            brainstate.nn.Sequential(brainstate.nn.Linear(3, 5)),
        ),
        r"^model\[1\]: the models do not correspond",
    ),
    "no bias": (
        lambda: interop.mapping(LINEAR, brainstate.nn.Linear(3, 4, b_init=None)),
        "^model: the models do not correspond",
    ),
    "another tree": (
        lambda: one_linear().apply({"kernel": WEIGHT}),
        "missing bias; unexpected kernel|missing bias",
    ),
    "a leaf of another shape": (
        lambda: one_linear().apply({"kernel": WEIGHT.T, "bias": BIAS}),
        r"^kernel: the leaf has shape \(4, 3\), its parameter \(3, 4\)",
    ),
    "like= of another tree": (
        lambda: interop.WeightMapping.from_json(one_linear().to_json()).apply(
            {"kernel": WEIGHT, "bias": BIAS}, like={"weight": WEIGHT.T}
        ),
        "like= does not have .* missing bias",
    ),
    "mappings that do not meet": (
        lambda: one_linear().then(one_linear()),
        "a mapping to equinox .* cannot be followed by one from nnx",
    ),
    "no json": (lambda: interop.WeightMapping.from_json("{}"), "written by to_json"),
}


@pytest.mark.parametrize("name", BAD_MAPPINGS)
def test_a_mapping_that_cannot_be_is_refused_with_the_reason(name):
    call, words = BAD_MAPPINGS[name]
    with pytest.raises(interop.InteropError, match=words):
        call()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_reshape_and_transposition_is_found_as_one_piece(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    axes = data.draw(st.permutations(range(len(shape))))
    ids = rearrangement.number({("w",): shape})["w",].transpose(axes)
    cut = data.draw(st.integers(0, len(shape)))
    ids = ids.reshape(int(np.prod(ids.shape[:cut])), -1)
    (change,) = rearrangement.find(
        {("w",): shape}, {("v",): ids}, {("v",): np.zeros(ids.shape)}
    )
    assert len(change.pieces) == 1
    values = {("w",): np.random.default_rng(0).normal(size=shape)}
    moved = rearrangement.rearrange(change, {("w",): shape}, values, shift=False)
    np.testing.assert_array_equal(moved, values["w",].transpose(axes).reshape(ids.shape))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4))
def test_any_rearrangement_of_several_arrays_is_found(seed, m, n):
    rng = np.random.default_rng(seed)
    shapes = {("a",): (m, n), ("b",): (n,), ("c",): (2, m)}
    size = m * n + n + 2 * m
    gates = rng.permutation(size)
    moved = {("x",): gates[: size // 2], ("y",): gates[size // 2 :].reshape(-1, 1)}
    shifts = {path: rng.integers(0, 2, ids.shape) * 1.0 for path, ids in moved.items()}
    changes = rearrangement.find(shapes, moved, shifts)
    values = {path: rng.normal(size=shape) for path, shape in shapes.items()}
    flat = np.concatenate([value.ravel() for value in values.values()])
    for change in changes:
        found = rearrangement.rearrange(change, shapes, values, shift=True)
        expected = flat[moved[change.target]] + shifts[change.target]
        np.testing.assert_allclose(found, expected)


def test_lstm_gates_are_cut_and_joined_in_few_blocks():
    """One matrix for all gates, next to one for each gate in another order."""
    n, h = 3, 2
    packed = rearrangement.number({("w",): (n, 4 * h)})["w",]
    gates = {(gate,): packed[:, i * h : (i + 1) * h] for i, gate in enumerate("ifgo")}
    zeros = {path: np.zeros(ids.shape) for path, ids in gates.items()}
    changes = rearrangement.find({("w",): (n, 4 * h)}, gates, zeros)
    assert [len(change.pieces) for change in changes] == [1, 1, 1, 1]
    values = {("w",): np.random.default_rng(0).normal(size=(n, 4 * h))}
    shapes = {("w",): (n, 4 * h)}
    moved = rearrangement.rearrange(changes[2], shapes, values, shift=False)
    np.testing.assert_array_equal(moved, values["w",][:, 2 * h : 3 * h])
    assert changes[2].describe(shapes) == "part"


def test_a_flattened_image_keeps_its_pixels_between_layouts():
    """Rows of the linear layer follow the channels, which Equinox has first."""
    cnn = brainstate.nn.Sequential(
        brainstate.nn.Conv2d((4, 4, 3), 2, kernel_size=3, w_init=array(3, 3, 3, 2)),
        brainstate.nn.Flatten(1),
        brainstate.nn.Linear(32, 5, w_init=array(32, 5)),
    )
    network = interop.convert(cnn, to="equinox", sample_input=(4, 4, 3))
    mapping = interop.mapping(cnn, network, sample_input=(4, 4, 3))
    moved = mapping.apply(parameters("brainstate", cnn))
    np.testing.assert_array_equal(
        moved.layers[0].weight, np.transpose(array(3, 3, 3, 2), (3, 2, 0, 1))
    )
    rows = np.asarray(array(32, 5)).reshape(4, 4, 2, 5).transpose(3, 2, 0, 1).reshape(5, 32)
    np.testing.assert_array_equal(moved.layers[2].weight, rows)
    assert [len(change.pieces) for change in mapping.changes] == [1] * len(mapping)
    assert interop.compare(cnn, network, array(2, 4, 4, 3)).ok


def test_the_gates_of_an_lstm_are_mapped_with_their_forget_bias():
    """BrainState adds 1 to the forget gate's bias when it is used, Flax holds the sum."""
    cell = brainstate.nn.LSTMCell(3, 4, w_init=array(7, 16), b_init=array(16))
    mapping = interop.mapping(cell, to="linen")
    params = parameters("brainstate", cell)
    weights = mapping.apply(params, weights=True)
    kernel, bias = np.asarray(array(7, 16)), np.asarray(array(16))
    i, g, f, o = (slice(4 * k, 4 * k + 4) for k in range(4))
    for gate, part in {"i": i, "g": g, "f": f, "o": o}.items():
        np.testing.assert_array_equal(weights[f"i{gate}"]["kernel"], kernel[:3, part])
        np.testing.assert_array_equal(weights[f"h{gate}"]["kernel"], kernel[3:, part])
        added = 1.0 if gate == "f" else 0.0
        np.testing.assert_allclose(weights[f"h{gate}"]["bias"], bias[part] + added, rtol=1e-6)
    with pytest.raises(interop.ArgumentError, match="differ by a constant"):
        mapping.apply(optax.adam(1e-3).init(params))
    moments = mapping.apply(params, weights=False)
    np.testing.assert_array_equal(moments["hf"]["bias"], bias[f])
    back = mapping.invert().apply(weights, weights=True)
    # adding 1 rounds a small bias to the last bit of 1
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1.2e-7), back, params
    )


@pytest.mark.parametrize("into", ["linen", "equinox"])
def test_a_mapping_moves_the_state_of_an_nnx_optimizer(into):
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    nnx.update(optimizer, jax.tree.map(lambda a: a + 1, nnx.state(optimizer)))
    optimizer.update(model, nnx.grad(lambda m: (m(jnp.ones((2, 3))) ** 2).sum())(model))
    mapping = interop.mapping(model, to=into)
    kernel = np.asarray(optimizer.opt_state[0].mu["kernel"][...])
    assert np.abs(kernel).min() > 0
    for state in (optimizer.opt_state, nnx.state(optimizer)["opt_state"]):
        moved = mapping.apply(state)[0]
        mu = moved.mu if isinstance(moved, tuple) else moved["mu"]
        if into == "linen":
            np.testing.assert_array_equal(mu["kernel"], kernel)
        else:
            np.testing.assert_array_equal(mu.weight, kernel.T)


@pytest.mark.parametrize("name", ["brainstate", "linen", "equinox"])
def test_an_nnx_optimizer_goes_on_where_another_framework_stopped(name):
    model = stack(Framework(name))
    params = parameters(name, model)
    first, params, state = train(name, model, params, OPTIMIZER.init(params), 3)
    mapping = interop.mapping(model, to="nnx")
    expected, _, _ = train(name, model, params, state, 3)

    other = stack(Framework("nnx"))
    nnx.update(other, mapping.apply(params))
    optimizer = nnx.Optimizer(other, OPTIMIZER, wrt=nnx.Param)
    boxes = jax.tree.structure(optimizer.opt_state)
    moved = jax.tree.leaves(mapping.apply(state))
    optimizer.opt_state = nnx.data(jax.tree.unflatten(boxes, moved))
    found = []
    for _ in range(3):
        value, grads = nnx.value_and_grad(lambda m: ((m(X) - Y) ** 2).mean())(other)
        optimizer.update(other, grads)
        found.append(float(value))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_states_averages_and_masks_move_between_any_two(source, target):
    """The truth is the other model's own parameters, and what is computed from them."""
    model, other = stack(source), stack(target)
    params, native = parameters(source.name, model), parameters(target.name, other)

    def parts(params):
        signs = jax.tree.map(lambda w: w > 0, params)
        vectors = jax.tree.map(lambda w: w.ndim == 1, params)
        state = optax.chain(optax.trace(0.9), optax.ema(0.99)).init(params)
        state = (state[0]._replace(trace=params), state[1]._replace(ema=params))
        return {"state": state, "averages": [params], "signs": signs, "frozen": vectors}

    moved, expected = interop.mapping(model, other).apply(parts(params)), parts(native)
    assert jax.tree.structure(moved) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, moved, expected)
    assert {type(leaf) for leaf in jax.tree.leaves(moved["frozen"])} == {bool}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(moved["signs"])} == {"bool"}


@pytest.mark.parametrize("name", ["brainstate", "equinox", "linen"])
def test_the_one_row_of_a_normalisation_over_several_axes_is_mapped(name):
    """NNX keeps the weights of several axes in one row, the others by axes."""
    axes = (-2, -1)
    native = nnx.LayerNorm(12, reduction_axes=axes, feature_axes=axes, rngs=nnx.Rngs(0))
    scale, bias = array(12), array(12, seed=1)
    native.scale.set_value(scale)
    native.bias.set_value(bias)
    keywords = {"to": name, "sample_input": (3, 4)}
    mapping = interop.mapping(native, interop.convert(native, **keywords))
    moved = jax.tree.leaves(mapping.apply(nnx.state(native, nnx.Param)))
    found = {np.asarray(a).tobytes(): a.shape for a in moved}
    assert found == {np.asarray(a).tobytes(): (3, 4) for a in (scale, bias)}
    other = nnx.LayerNorm(10, reduction_axes=axes, feature_axes=axes, rngs=nnx.Rngs(0))
    with pytest.raises(interop.ConversionError, match="do not correspond"):
        interop.mapping(other, interop.convert(native, **keywords))
