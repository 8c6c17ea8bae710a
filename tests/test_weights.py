"""Weights by name, and in files: all or nothing, across frameworks, whatever the file holds."""

import json
import os

import brainstate
import brainunit
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import interop
import shims

from .cases import BIAS, EPSILON, MEAN, MOMENTUM, SCALE, SHIFT, VAR, WEIGHT, WEIGHT_2, X, array
from .conftest import Framework

BUILTIN = ("brainstate", "equinox", "linen", "nnx")


def stack(fw, factor=1.0):
    return fw.sequential(
        fw.batch_norm(SCALE * factor, SHIFT, MEAN * factor, VAR * factor, EPSILON, MOMENTUM),
        fw.linear(WEIGHT * factor, BIAS),
        fw.activation(jnp.tanh),
        fw.sequential(fw.linear(WEIGHT_2, BIAS[:2] * factor)),
    )


def copied(named):
    return {name: np.array(value) for name, value in named.items()}


def equal(a, b):
    assert list(a) == list(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name, strict=True)


NAMES = {
    "brainstate": [
        "layers/0/running_mean",
        "layers/1/weight/weight",
        "layers/3/layers/0/weight/bias",
    ],
    "equinox": ["layers/0/batch_state_index/0", "layers/1/weight", "layers/3/layers/0/bias"],
    "linen": [
        "batch_stats/layers_0/mean",
        "params/layers_1/kernel",
        "params/layers_3/layers_0/bias",
    ],
    "nnx": ["layers/0/mean", "layers/1/kernel", "layers/3/layers/0/bias"],
}


def test_every_array_is_there_under_a_name_of_text(source):
    found = interop.weights(stack(source))
    assert set(NAMES[source.name]) <= found.keys()
    assert all(type(name) is str for name in found)
    mean, weight, bias = (np.asarray(found[name]) for name in NAMES[source.name])
    if source.name != "equinox":  # which stores statistics with a bias of its own
        np.testing.assert_array_equal(mean, MEAN)
    np.testing.assert_array_equal(weight, WEIGHT.T if source.name == "equinox" else WEIGHT)
    np.testing.assert_array_equal(bias, BIAS[:2])
    assert len(found) == (9 if source.name == "equinox" else 8)  # a counter of its own


def test_a_model_takes_over_weights(source):
    model, other = stack(source), stack(source, 2.0)
    y, old = source.call(model, X), copied(interop.weights(other))
    loaded = interop.load_weights(other, interop.weights(model))
    np.testing.assert_array_equal(source.call(loaded, X), y)
    mutable = source.name in ("brainstate", "nnx")
    assert (loaded is other) == mutable
    assert type(loaded) is type(other)
    if not mutable:
        equal(copied(interop.weights(other)), old)
    values = zip(interop.weights(loaded).values(), interop.weights(model).values(), strict=True)
    assert all(a is b for a, b in values)


def test_all_that_does_not_fit_is_reported_at_once_and_nothing_is_written(source):
    model = stack(source)
    before = interop.weights(model)
    names = list(before)
    given = {name: np.asarray(value) * 2 for name, value in before.items()}
    del given[names[0]]
    given["more"] = np.zeros(2)
    given[names[2]] = np.zeros((7, 7), np.float32)
    given[names[3]] = given[names[3]].astype(np.float16)
    given[names[4]] = [1.0, 2.0]
    for strict in (True, False):
        with pytest.raises(interop.ConversionError, match="do not fit the model") as e:
            interop.load_weights(model, given, strict=strict)
        assert e.value.missing == ((names[0],) if strict else ())
        assert e.value.unexpected == (("more",) if strict else ())
        found = [line.partition(" ")[0] for line in e.value.mismatched]
        assert found == names[2:5]
        assert "float32[7, 7]" in e.value.mismatched[0]
        assert "float16" in e.value.mismatched[1]
        assert "list" in e.value.mismatched[2]
    after = interop.weights(model)
    assert all(after[name] is before[name] for name in before)


def test_without_strict_what_is_there_is_taken_and_the_rest_stays(source):
    model = stack(source)
    before = interop.weights(model)
    name = NAMES[source.name][2]
    loaded = interop.load_weights(model, {name: BIAS[:2] * 3, "more": X}, strict=False)
    after = interop.weights(loaded)
    np.testing.assert_array_equal(after[name], BIAS[:2] * 3)
    assert all(after[other] is before[other] for other in before if other != name)


def test_a_file_brings_the_model_back(source, tmp_path):
    model, file = stack(source), tmp_path / "model.safetensors"
    y = source.call(model, X)
    interop.save(file, model)
    loaded = interop.load(file, stack(source, 3.0))
    np.testing.assert_array_equal(source.call(loaded, X), y)
    equal(copied(interop.weights(loaded)), copied(interop.weights(model)))
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_file_of_one_framework_loads_into_the_converted_model_of_another(
    source, target, tmp_path
):
    model, file = stack(source), tmp_path / "model.safetensors"
    interop.save(file, model)
    template = stack(source, 2.0)
    before = copied(interop.weights(template))
    fresh = target.convert_from(source, stack(source, 3.0), sample_input=(3,))
    loaded = interop.load(file, fresh, source=template, sample_input=(3,))
    np.testing.assert_allclose(
        target.call(loaded, X), source.call(model, X), rtol=1e-5, atol=1e-5
    )
    equal(copied(interop.weights(template)), before)
    with pytest.raises(interop.ConversionError, match="unexpected"):
        interop.load(
            file, target.sequential(target.linear(WEIGHT)), source=template, sample_input=(3,)
        )
    with pytest.raises(interop.ConversionError, match="missing"):  # of the source
        interop.load(file, fresh, source=source.sequential(source.linear(WEIGHT)))


def wrapped(kind, layer):
    x, key = jnp.ones((2, 3)), jax.random.key(0)
    match kind:
        case "nnx":
            return shims.ToNNX(layer, rngs=nnx.Rngs(0)), lambda m: m(X, deterministic=True)
        case "linen":
            shim = shims.ToLinen(layer, deterministic=True)
            return (shim, shim.init(key, x)), lambda m: m[0].apply(m[1], X)
        case "equinox":
            shim = eqx.nn.make_with_state(shims.ToEquinox)(layer, batched=True, inference=True)
            return shim, lambda m: m[0](X, state=m[1])[0]
    model = shims.FromNNX(layer)
    return model, lambda m: run_native(m, X)


def run_native(model, x):
    with brainstate.environ.context(fit=False):
        return model(x)


@pytest.mark.parametrize("host", BUILTIN)
def test_a_shim_is_a_module_of_its_host(host, tmp_path):
    guest = "nnx" if host == "brainstate" else "brainstate"

    def layer(factor):
        fw = Framework(guest)
        norm = fw.batch_norm(SCALE * factor, SHIFT, MEAN, VAR, EPSILON, MOMENTUM)
        return fw.sequential(norm, fw.linear(WEIGHT * factor, BIAS), fw.dropout(0.3))

    (model, call), (other, _) = wrapped(host, layer(1.0)), wrapped(host, layer(2.0))
    y = call(model)
    assert float(jnp.abs(call(other) - y).max()) > 0.1
    interop.save(tmp_path / "shim", model)
    loaded = interop.load(tmp_path / "shim", other)
    np.testing.assert_array_equal(call(loaded), y)
    assert len(interop.weights(model)) == 6


def test_loading_into_a_shim_reaches_the_layer_it_wraps(tmp_path):
    layer = brainstate.nn.Linear(3, 4)
    shim = shims.ToNNX(layer)
    new = {name: np.asarray(value) + 1 for name, value in interop.weights(shim).items()}
    interop.load_weights(shim, new)
    np.testing.assert_array_equal(layer.weight.value["weight"], new["weight/weight"])


def test_tied_weights_stand_there_once():
    shared = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    assert len(interop.weights(nnx.Sequential(shared, jnp.tanh, shared))) == 2
    layer = brainstate.nn.Linear(3, 3)
    assert len(interop.weights(brainstate.nn.Sequential(layer, layer))) == 2

    class Tied(eqx.Module):
        shared: eqx.nn.Shared

        def __init__(self, key):
            a, b = eqx.nn.Linear(3, 3, key=key), eqx.nn.Linear(3, 3, key=key)
            self.shared = eqx.nn.Shared((a, b), lambda p: p[1].weight, lambda p: p[0].weight)

    model = Tied(jax.random.key(0))
    assert len(interop.weights(model)) == 3
    new = {name: np.asarray(value) + 1 for name, value in interop.weights(model).items()}
    a, b = interop.load_weights(model, new).shared()
    assert a.weight is b.weight


def test_random_keys_and_what_a_run_leaves_behind_are_no_weights():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layer, self.drop = nnx.Linear(3, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
            self.memory, self.buffer = nnx.Cache(jnp.ones(2)), nnx.BatchStat(jnp.ones(5))

        def __call__(self, x):
            self.seen = nnx.Intermediate(y := self.drop(self.layer(x)))
            return y

    model = Model(nnx.Rngs(0))
    model(X)
    assert sorted(interop.weights(model)) == ["buffer", "layer/bias", "layer/kernel"]

    cell = brainstate.nn.LSTMCell(3, 4)
    brainstate.nn.init_all_states(cell, 7)
    assert {v.shape for v in interop.weights(cell).values()} == {(7, 16), (16,)}
    live = interop.weights(shims.ToNNX(cell))
    assert live.keys() == interop.weights(cell).keys()


def test_a_module_without_a_known_layer_has_weights_as_well():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            names = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
            return x @ self.param("kernel", names, (3, 2))

    variables = Own().init(jax.random.key(0), X)
    assert interop.weights(Own(), params=variables).keys() == {"params/kernel"}
    new = {"params/kernel": np.full((3, 2), 2.0, np.float32)}
    _, loaded = interop.load_weights(Own(), new, params=variables)
    assert loaded["params"]["kernel"].names == ("in", "out")
    assert float(loaded["params"]["kernel"].value[0, 0]) == 2.0


def test_an_equinox_model_that_holds_its_state_gets_it_back():
    def model(value):
        layer = eqx.nn.BatchNorm(3, "batch", mode="batch")
        other = jax.tree.map(lambda x: jnp.full_like(x, value), eqx.filter(layer, eqx.is_array))
        return eqx.combine(other, layer)

    loaded = interop.load_weights(model(1), interop.weights(model(2)))
    assert isinstance(loaded, eqx.nn.BatchNorm)
    state = eqx.nn.State(loaded)
    assert float(state.get(loaded.batch_state_index)[0][1]) == 2.0
    taken, state = eqx.nn.make_with_state(lambda: loaded)()
    assert int(state.get(taken.batch_counter)) == 2


def test_the_state_that_was_given_can_still_be_used():
    model = stack(Framework("equinox"))
    loaded = interop.load_weights(model, interop.weights(model))
    for module, state in (model, loaded):
        state.get(module.layers[0].batch_counter)


@pytest.mark.parametrize(
    "dtype",
    [
        "bfloat16",
        "float16",
        "float8_e4m3fn",
        "float8_e5m2",
        "int8",
        "uint32",
        "bool",
        "complex64",
    ],
)
def test_dtypes_survive_a_file(dtype, tmp_path):
    values = jnp.asarray([[0, 1, 2], [3, 1, 0]]).astype(dtype)
    model, other = (nnx.Module() for _ in range(2))
    model.table, other.table = nnx.Param(values), nnx.Param(jnp.zeros_like(values))
    interop.save(tmp_path / "model", model)
    interop.load(tmp_path / "model", other)
    assert other.table.get_value().dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(other.table.get_value(), values)
    other.table = nnx.Param(jnp.zeros((2, 3), jnp.int16))
    with pytest.raises(interop.ConversionError, match=rf"wanted int16\[2, 3\], got {dtype}"):
        interop.load(tmp_path / "model", other)


def test_empty_scalar_and_transposed_arrays_survive_a_file(tmp_path):
    layer = eqx.nn.Lambda(
        (np.arange(6.0).reshape(2, 3).T, np.zeros((0, 3)), np.full((), 2, np.float32))
    )
    other = jax.tree.map(np.zeros_like, layer)
    interop.save(tmp_path / "model", layer)
    loaded = interop.load(tmp_path / "model", other)
    equal(interop.weights(loaded), interop.weights(layer))
    assert all(isinstance(x, np.ndarray) for x in interop.weights(loaded).values())
    loaded.fn[0][0, 0] = 5  # a buffer of its own


def with_unit(unit):
    layer = brainstate.nn.Linear(3, 4)
    layer.weight.value = {k: (v + 1) * unit for k, v in layer.weight.value.items()}
    return layer


def test_units_survive_a_file_and_are_compared(tmp_path):
    model, other = (
        with_unit(brainunit.mV / brainunit.ms),
        with_unit(brainunit.mV / brainunit.ms),
    )
    interop.save(tmp_path / "model", model)
    interop.load(tmp_path / "model", other)
    found = other.weight.value["weight"]
    assert found.unit == brainunit.mV / brainunit.ms
    np.testing.assert_array_equal(found.mantissa, model.weight.value["weight"].mantissa)
    volts = with_unit(brainunit.volt / brainunit.ms)
    for wrong in (volts, brainstate.nn.Linear(3, 4)):
        before = interop.weights(wrong)
        for load in (
            lambda wrong=wrong: interop.load(tmp_path / "model", wrong),
            lambda wrong=wrong: interop.load_weights(wrong, interop.weights(model)),
        ):
            with pytest.raises(interop.ConversionError, match="mV / ms"):
                load()
        after = interop.weights(wrong)
        assert all(after[name] is before[name] for name in before)


def foreign(data):
    return safetensors.numpy.save(safetensors.numpy.load(data))


def lying(dtypes):
    facts = {"format": "interop.save 1", "units": "{}", "dtypes": json.dumps(dtypes)}
    return safetensors.numpy.save({"a": np.ones(4)}, metadata=facts)


SPOILED = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[:-5],
    "truncated header": lambda data: data[:20],
    "one bit": lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
    "text": lambda data: b"weights = [1, 2, 3]" * 10,
    "longer": lambda data: data + b"\0" * 8,
    "foreign": foreign,
    "lying": lambda data: lying({}),
    "objects": lambda data: lying({"a": "object"}),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_damaged_or_foreign_file_is_refused(how, tmp_path):
    model, file = brainstate.nn.Linear(3, 4), tmp_path / "model"
    interop.save(file, model)
    file.write_bytes(SPOILED[how](file.read_bytes()))
    before = interop.weights(model)
    with pytest.raises(interop.ConversionError, match="Nothing was changed"):
        interop.load(file, model)
    assert all(interop.weights(model)[name] is before[name] for name in before)


def test_any_flipped_bit_of_a_file_is_noticed(tmp_path):
    model, file = brainstate.nn.Linear(3, 4), tmp_path / "model"
    interop.save(file, model)
    data = file.read_bytes()
    for at in range(len(data)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(interop.ConversionError, match="Nothing was changed"):
            interop.load(file, model, strict=False)


def test_a_save_that_fails_leaves_the_older_file(tmp_path, monkeypatch):
    file = tmp_path / "model"
    interop.save(file, brainstate.nn.Linear(3, 4))
    before = file.read_bytes()

    def fail(*_):
        raise OSError("no space left")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as m:
            m.setattr(os, name, fail)
            with pytest.raises(OSError, match="no space"):
                interop.save(file, brainstate.nn.Linear(5, 4))
        assert file.read_bytes() == before
        assert os.listdir(tmp_path) == ["model"]
    with pytest.raises(interop.ArgumentError, match="no folder"):
        interop.save(tmp_path / "none" / "model", brainstate.nn.Linear(3, 4))
    with pytest.raises(FileNotFoundError):
        interop.load(tmp_path / "none", brainstate.nn.Linear(3, 4))


def test_what_cannot_be_saved_is_refused_by_name(tmp_path):
    donated = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    donated.kernel.get_value().delete()
    with pytest.raises(interop.ConversionError, match="^kernel: .*donated"):
        interop.save(tmp_path / "model", donated)
    abstract = eqx.filter_eval_shape(eqx.nn.Linear, 3, 4, key=jax.random.key(0))
    with pytest.raises(interop.ConversionError, match="^weight: .*abstract"):
        interop.save(tmp_path / "model", abstract)
    wide = eqx.nn.Lambda(np.ones(2, np.complex128))
    with pytest.raises(interop.ConversionError, match="complex128"):
        interop.save(tmp_path / "model", wide)
    assert os.listdir(tmp_path) == []

    state = brainstate.nn.Linear(3, 4)
    state.note = brainstate.ParamState("text")
    with pytest.raises(interop.ConversionError, match="^note: it holds a str"):
        interop.weights(state)
    with pytest.raises(interop.ArgumentError, match="mapping"):
        interop.load_weights(state, [1, 2])


def test_an_abstract_model_can_be_loaded():
    layer = eqx.nn.Linear(3, 4, key=jax.random.key(0))
    abstract = eqx.filter_eval_shape(eqx.nn.Linear, 3, 4, key=jax.random.key(0))
    loaded = interop.load_weights(abstract, interop.weights(layer))
    np.testing.assert_array_equal(loaded(X[0]), layer(X[0]))
    module = nn.Dense(4)
    shapes = jax.eval_shape(module.init, jax.random.key(0), X)
    params = module.init(jax.random.key(0), X)
    _, loaded = interop.load_weights(
        module, interop.weights(module, params=params), params=shapes
    )
    np.testing.assert_array_equal(module.apply(loaded, X), module.apply(params, X))


def test_arrays_go_to_where_the_models_were():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    model.kernel.set_value(jax.device_put(model.kernel.get_value(), sharding))
    given = copied(interop.weights(model))
    interop.load_weights(model, given)
    assert model.kernel.get_value().sharding == sharding
    given["kernel"][:] = 7
    assert float(model.kernel.get_value()[0, 0]) != 7


def test_two_names_that_read_alike_are_refused():
    model = nnx.Module()
    model.parts = nnx.data({"a/b": nnx.Param(jnp.ones(2)), "a": {"b": nnx.Param(jnp.ones(3))}})
    with pytest.raises(interop.ConversionError, match="both called 'parts/a/b'"):
        interop.weights(model)


@pytest.mark.parametrize("build", [lambda fw: stack(fw), lambda fw: fw.linear(array(3, 4))])
def test_names_are_the_same_in_every_process(source, build):
    """They depend on nothing but the model: two models made alike have the same."""
    assert list(interop.weights(build(source))) == list(interop.weights(build(source)))
