"""Eight CPU devices: conversions keep shardings and the names of mesh axes."""

import brainstate
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import interop

assert jax.device_count() == 8
MESH = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
NAMES = {"kernel": ("data", "model"), "bias": ("model",)}
ARRAYS = {"kernel": jnp.arange(32.0).reshape(4, 8) / 32, "bias": jnp.ones(8) / 3}


def split(array, names):
    return jax.device_put(array, NamedSharding(MESH, P(*names)))


def check(array, names):
    assert array.sharding.is_equivalent_to(NamedSharding(MESH, P(*names)), array.ndim), (
        array.sharding
    )


def nnx_layer(place=split, **metadata):
    layer = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
    for name, names in NAMES.items():
        getattr(layer, name).set_value(place(ARRAYS[name], names))
        getattr(layer, name).set_metadata(out_sharding=names, mesh=MESH, **metadata)
    return layer


def linen_layer(place=split):
    boxes = {
        name: nn.Partitioned(place(ARRAYS[name], names), names, MESH)
        for name, names in NAMES.items()
    }
    return nn.Dense(8), {"params": boxes}


def arrays_of(name, model):
    """Weight and bias, and the names that the weight's axes have then."""
    if name == "nnx":
        return model.kernel.get_value(), model.bias.get_value(), NAMES["kernel"]
    if name == "linen":
        params = nn.meta.map_axis_meta(lambda box: box.value, model[1]["params"])
        return params["kernel"], params["bias"], NAMES["kernel"]
    if name == "brainstate":
        value = model.weight.value
        return value["weight"], value["bias"], NAMES["kernel"]
    return model.weight, model.bias, NAMES["kernel"][::-1]


def test_all_pairs_keep_shardings():
    weight, bias = (split(ARRAYS[name], names) for name, names in NAMES.items())
    transposed = split(ARRAYS["kernel"].T, NAMES["kernel"][::-1])
    native = eqx.nn.Linear(4, 8, key=jax.random.key(0))
    where = eqx.tree_at(lambda m: (m.weight, m.bias), native, (transposed, bias))
    sources = {
        "nnx": (nnx_layer(), {}),
        "linen": (linen_layer()[0], {"params": linen_layer()[1]}),
        "brainstate": (brainstate.nn.Linear(4, 8, w_init=weight, b_init=bias), {}),
        "equinox": (where, {}),
    }
    for source, (model, options) in sources.items():
        for target in sources.keys() - {source}:
            made = interop.convert(model, to=target, **options)
            kernel, bias, names = arrays_of(target, made)
            check(kernel, names)
            check(bias, NAMES["bias"])
            expected = ARRAYS["kernel"].T if target == "equinox" else ARRAYS["kernel"]
            assert (kernel == expected).all()


def test_names_pass_between_nnx_and_linen():
    _, variables = interop.to_linen(interop.from_nnx(nnx_layer()))
    assert not isinstance(variables["params"]["kernel"], nn.Partitioned)  # no place between
    _, variables = interop.convert(nnx_layer(), to="linen")
    box = variables["params"]["kernel"]
    assert type(box) is nn.Partitioned
    assert (box.names, box.mesh) == (("data", "model"), MESH)
    back = interop.convert(nn.Dense(8), to="nnx", params=variables)
    metadata = back.kernel.get_metadata()
    assert (metadata["out_sharding"], metadata["mesh"]) == (("data", "model"), MESH)
    assert back.kernel.get_value() is box.value
    rules = (("data", "data"), ("model", "model"))
    _, variables = interop.convert(nnx_layer(sharding_rules=rules), to="linen")
    assert type(variables["params"]["bias"]) is nn.LogicallyPartitioned
    assert variables["params"]["bias"].rules == rules
    back = interop.convert(nn.Dense(8), to="nnx", params=variables)
    assert back.bias.get_metadata("sharding_rules") == rules


def test_names_of_arrays_that_are_not_split_are_refused_where_they_have_no_place():
    for target in ("brainstate", "equinox"):
        model = nnx_layer(place=lambda array, names: array)
        with pytest.raises(interop.ConversionError, match=r"kernel is to be split by"):
            interop.convert(model, to=target)
        assert not interop.explain(model, to=target).ok
        assert interop.explain(nnx_layer(), to=target).ok
        module, variables = linen_layer(place=lambda array, names: array)
        with pytest.raises(interop.ConversionError, match=r"params/bias is to be split by"):
            interop.convert(module, to=target, params=variables)
    model = nnx_layer(place=lambda array, names: array)
    _, variables = interop.convert(model, to="linen")
    assert variables["params"]["kernel"].names == ("data", "model")


def test_rows_that_are_moved_stay_split():
    stack = brainstate.nn.Sequential(
        brainstate.nn.Conv2d((4, 4, 3), 8, (3, 3)),
        brainstate.nn.Flatten(1),
        brainstate.nn.Linear(128, 8),
    )
    linear = stack.layers[2].weight
    linear.value = linear.value | {"weight": split(linear.value["weight"], NAMES["kernel"])}
    made = interop.convert(stack, to="equinox", sample_input=(4, 4, 3))
    check(made.layers[2].weight, NAMES["kernel"][::-1])


def test_the_gates_of_a_cell_stay_split():
    for names in (None, "model"), ("data", None):
        cell = nnx.LSTMCell(8, 16, rngs=nnx.Rngs(0))
        for name in ("ii", "if_", "ig", "io", "hi", "hf", "hg", "ho"):
            kernel = getattr(cell, name).kernel
            kernel.set_value(split(kernel.get_value(), names))
        packed = interop.from_nnx(cell)
        check(packed.W.weight.value["weight"], names)
        layer = interop.to_equinox(packed)
        check(layer.weight_ih, names[::-1])
        check(layer.weight_hh, names[::-1])
        kernel = interop.to_nnx(packed).hf.kernel.get_value()
        check(kernel, names)
        np.testing.assert_array_equal(kernel, cell.hf.kernel.get_value())


def test_mapping_moves_shardings_of_boxes():
    module, variables = linen_layer()
    mapping = interop.mapping((module, variables), to="equinox")
    moved = mapping.apply(nn.get_partition_spec(variables)["params"])
    assert (moved.weight, moved.bias) == (P("model", "data"), P("model"))
    check(mapping.apply(variables["params"]).weight, ("model", "data"))
    mapping = interop.mapping(nnx_layer(), to="linen")
    state = nnx.get_named_sharding(nnx.state(nnx_layer(), nnx.Param), MESH)
    moved = mapping.apply(state)
    assert moved["kernel"].value == NamedSharding(MESH, P("data", "model"))


if __name__ == "__main__":
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            test()
            print(f"passed: {name}")
