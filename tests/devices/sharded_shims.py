"""Eight CPU devices: shims keep shardings and the names of mesh axes, in every host."""

import brainstate
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import interop
import shims

assert jax.device_count() == 8
MESH = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
EXPLICIT = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
NAMES = {"kernel": (None, "model"), "bias": ("model",)}
X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)
WEIGHT, BIAS = jnp.arange(24.0).reshape(3, 8) / 24, jnp.ones(8) / 3
PLAIN = X @ WEIGHT + BIAS


def split(array, names, mesh=MESH):
    return jax.device_put(array, NamedSharding(mesh, P(*names)))


def check(array, names, mesh=MESH):
    assert array.sharding.is_equivalent_to(NamedSharding(mesh, P(*names)), array.ndim), (
        array.sharding,
        names,
    )


def nnx_guest(mesh=MESH, **metadata):
    """A layer with names in its metadata and split arrays."""
    layer = nnx.Linear(3, 8, rngs=nnx.Rngs(0))
    for name, array in (("kernel", WEIGHT), ("bias", BIAS)):
        variable = getattr(layer, name)
        variable.set_value(split(array, NAMES[name], mesh))
        variable.set_metadata(out_sharding=NAMES[name], mesh=mesh, **metadata)
    return layer


def linen_guest(box=nn.Partitioned, mesh=MESH, **options):
    """A module, and its variables in boxes."""
    arrays = {"kernel": WEIGHT, "bias": BIAS}
    params = {
        name: box(split(array, NAMES[name], mesh), NAMES[name], mesh, **options)
        for name, array in arrays.items()
    }
    return nn.Dense(8), {"params": params}


def loss(out):
    return (out**2).mean()


def check_boxes(params, mesh=MESH, box=nn.Partitioned):
    for name, names in NAMES.items():
        assert type(params[name]) is box, params
        assert params[name].names == names
        assert params[name].mesh == mesh
        check(params[name].value, names, mesh)


def check_variables(shim):
    for name, names in NAMES.items():
        variable = shim.params[name]
        assert variable.get_metadata("out_sharding") == names
        check(variable.get_value(), names)


def test_nnx_in_linen():
    guest = nnx_guest()
    shim = shims.ToLinen(guest)
    variables = shim.init(jax.random.key(0), X)
    check_boxes(variables["params"])
    assert variables["params"]["kernel"].value is guest.kernel.get_value()
    assert nn.get_partition_spec(variables)["params"]["kernel"] == P(None, "model")

    @jax.jit
    def step(variables):
        grads = jax.grad(lambda v: loss(shim.apply(v, X)))(variables)
        return jax.tree.map(lambda p, g: p - 0.1 * g, variables, grads)

    after = step(variables)
    check_boxes(after["params"])
    shim.write_back(after)
    assert guest.kernel.get_value() is after["params"]["kernel"].value
    assert guest.kernel.get_metadata("out_sharding") == (None, "model")
    shim.write_back(nn.unbox(variables))
    assert jnp.allclose(guest(X), PLAIN, atol=1e-6)


def test_nnx_in_linen_over_explicit_axes():
    shim = shims.ToLinen(nnx_guest(EXPLICIT))
    variables = shim.init(jax.random.key(0), X)
    check_boxes(variables["params"], EXPLICIT)
    assert jnp.allclose(jax.jit(shim.apply)(variables, X), PLAIN, atol=1e-6)


def test_nnx_in_linen_logical():
    rules = (("embed", None), ("mlp", "model"))
    guest = nnx_guest()
    guest.kernel.set_metadata(out_sharding=("embed", "mlp"), sharding_rules=rules)
    box = shims.ToLinen(guest).init(jax.random.key(0), X)["params"]["kernel"]
    assert type(box) is nn.LogicallyPartitioned
    assert (box.names, box.rules) == (("embed", "mlp"), rules)


class Scanned(nn.Module):
    shim: nn.Module
    lift: str

    @nn.compact
    def __call__(self, x):
        metadata = {nn.PARTITION_NAME: "layers"}
        if self.lift == "vmap":
            body = nn.vmap(
                lambda shim, x: shim(x),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                axis_size=2,
                in_axes=None,
                metadata_params=metadata,
            )
            return body(self.shim, x)
        body = nn.scan(
            lambda shim, carry, _: (carry, shim(carry)),
            variable_axes={"params": 1},
            split_rngs={"params": True},
            length=2,
            metadata_params=metadata,
        )
        return body(self.shim, x, None)[1]


def test_names_under_linen_lifts():
    for lift, names in (
        ("vmap", ("layers", None, "model")),
        ("scan", (None, "layers", "model")),
    ):
        model = Scanned(shims.ToLinen(nnx_guest()), lift)
        variables = model.init(jax.random.key(0), X)
        kernel = variables["params"]["shim"]["kernel"]
        assert kernel.names == names, kernel.names
        assert kernel.value.ndim == 3
        out = jax.jit(model.apply)(variables, X)
        assert jnp.allclose(out, jnp.stack([PLAIN, PLAIN]), atol=1e-6)


def test_linen_in_nnx():
    shim = shims.ToNNX(linen_guest()[0], params=linen_guest()[1])
    check_variables(shim)
    spec = nnx.get_partition_spec(nnx.state(shim, nnx.Param))
    assert spec["params"]["kernel"].get_raw_value() == P(None, "model")
    optimizer = nnx.Optimizer(shim, optax.adam(1e-2), wrt=nnx.Param)
    moment = optimizer.opt_state[0].mu["params"]["kernel"]
    assert moment.get_metadata("out_sharding") == (None, "model")

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: loss(m(X)))(model))

    step(shim, optimizer)
    check_variables(shim)
    check_boxes(shim.unwrap()[1]["params"])
    assert not jnp.allclose(shim.unwrap()[1]["params"]["kernel"].value, WEIGHT)


def test_linen_in_nnx_logical():
    rules = (("mlp", "model"),)
    module, variables = linen_guest()
    variables["params"]["kernel"] = nn.LogicallyPartitioned(
        split(WEIGHT, (None, "model")), ("embed", "mlp"), MESH, rules
    )
    shim = shims.ToNNX(module, params=variables)
    metadata = shim.params["kernel"].get_metadata()
    assert (metadata["out_sharding"], metadata["sharding_rules"]) == (("embed", "mlp"), rules)
    box = shim.unwrap()[1]["params"]["kernel"]
    assert type(box) is nn.LogicallyPartitioned
    assert (box.names, box.rules, box.mesh) == (("embed", "mlp"), rules, MESH)


def test_names_under_nnx_lifts():
    module, variables = linen_guest()
    metadata = {nnx.PARTITION_NAME: "members"}

    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata=metadata)
    def make(_):
        return shims.ToNNX(module, params=variables)

    members = make(jnp.arange(2))
    assert members.params["kernel"].get_value().shape == (2, 3, 8)
    stacked = ("members", None, "model")
    assert members.params["kernel"].get_metadata("out_sharding") == stacked

    @nnx.vmap(in_axes=(0, None), out_axes=0, transform_metadata=metadata)
    def each(member, x):
        assert member.params["kernel"].get_metadata("out_sharding") == (None, "model")
        return member(x)

    assert jnp.allclose(each(members, X), jnp.stack([PLAIN, PLAIN]), atol=1e-6)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0), transform_metadata=metadata)
    def over(x, member):
        return x, member(x)

    assert jnp.allclose(over(X, members)[1], jnp.stack([PLAIN, PLAIN]), atol=1e-6)
    assert members.params["kernel"].get_metadata("out_sharding") == stacked
    assert members.unwrap()[1]["params"]["kernel"].names == stacked


def train_in_brainstate(shim, kernel):
    params = shim.states(brainstate.ParamState)
    check(params[kernel].value, (None, "model"))

    @brainstate.transform.jit
    def step():
        grads = brainstate.transform.grad(lambda: loss(shim(X)), params)()
        for path, state in params.items():
            state.value = state.value - 0.1 * grads[path]

    step()
    check(params[kernel].value, (None, "model"))
    assert not jnp.allclose(params[kernel].value, WEIGHT)


def test_nnx_in_brainstate():
    guest = nnx_guest()
    train_in_brainstate(shims.FromNNX(guest), ("kernel",))
    assert guest.kernel.get_metadata("out_sharding") == (None, "model")


def test_linen_in_brainstate():
    shim = shims.FromLinen(*linen_guest())
    train_in_brainstate(shim, ("params", "kernel"))
    check_boxes(shim.unwrap()[1]["params"])


def trained_in_equinox(shim):
    @eqx.filter_jit
    def update(shim):
        grads = eqx.filter_grad(lambda s: loss(s(X)))(shim)
        return eqx.apply_updates(shim, jax.tree.map(lambda g: -0.1 * g, grads))

    return update(shim)


def refuses_stale_names(make):
    """An ensemble has an axis that Equinox has no name for."""
    members = eqx.filter_vmap(lambda _: make())(jnp.arange(2))
    each = eqx.filter_vmap(lambda s, x: s(x), in_axes=(eqx.if_array(0), None))
    assert jnp.allclose(each(members, X), jnp.stack([PLAIN, PLAIN]), atol=1e-6)
    with pytest.raises(interop.ConversionError, match="kernel has 3 axes, and the names"):
        members.unwrap()


def test_nnx_in_equinox():
    def make():
        return shims.ToEquinox(nnx_guest(), batched=True)

    native = trained_in_equinox(make()).unwrap()
    assert native.kernel.get_metadata("out_sharding") == (None, "model")
    check(native.kernel.get_value(), (None, "model"))
    refuses_stale_names(make)


def test_linen_in_equinox():
    def make():
        return shims.ToEquinox(linen_guest()[0], batched=True, params=linen_guest()[1])

    check_boxes(trained_in_equinox(make()).unwrap()[1]["params"])
    refuses_stale_names(make)


def brainstate_layer():
    """A layer with split arrays; BrainState has no place for names."""
    weight, bias = split(WEIGHT, NAMES["kernel"]), split(BIAS, NAMES["bias"])
    return brainstate.nn.Linear(3, 8, w_init=weight, b_init=bias)


def test_brainstate_in_nnx():
    guest = brainstate_layer()
    shim = shims.ToNNX(guest)
    check(shim.weight["weight"].get_value(), (None, "model"))

    @nnx.jit
    def step(model):
        grads = nnx.grad(lambda m: loss(m(X)))(model)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))

    step(shim)
    check(guest.weight.value["weight"], (None, "model"))
    check(shim.materialize().kernel.get_value(), (None, "model"))


def test_brainstate_in_linen():
    guest = brainstate_layer()
    shim = shims.ToLinen(guest)
    variables = shim.init(jax.random.key(0), X)
    check(variables["params"]["weight"]["weight"], (None, "model"))

    @jax.jit
    def step(variables):
        grads = jax.grad(lambda v: loss(shim.apply(v, X)))(variables)
        return jax.tree.map(lambda p, g: p - 0.1 * g, variables, grads)

    after = step(variables)
    check(after["params"]["weight"]["weight"], (None, "model"))
    shim.write_back(after)
    check(guest.weight.value["weight"], (None, "model"))


def test_brainstate_in_equinox():
    shim = shims.ToEquinox(brainstate_layer(), batched=True)
    check(shim.params["weight"]["weight"], (None, "model"))
    check(trained_in_equinox(shim).params["weight"]["weight"], (None, "model"))


if __name__ == "__main__":
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            test()
            print(f"passed: {name}")
