"""``shims.ToLinen``: foreign modules as ``flax.linen`` modules."""

import brainstate
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import interop
import shims

from .cases import array

X = array(5, 3, seed=41)
W, B = array(3, 4, seed=42), array(4, seed=43)
KEY = jax.random.key(0)


def linear():
    return brainstate.nn.Linear(3, 4, w_init=W, b_init=B)


def norm():
    return brainstate.nn.Sequential(linear(), brainstate.nn.BatchNorm0d((4,)))


def test_init_hands_out_the_guests_own_arrays():
    layer = linear()
    variables = shims.ToLinen(layer).init(KEY, X)
    assert variables["params"]["weight"]["weight"] is layer.weight.value["weight"]
    assert set(shims.ToLinen(norm()).init(KEY, X, deterministic=True)) == {
        "params",
        "batch_stats",
    }
    compiled = jax.jit(shims.ToLinen(layer).init)(KEY, X)
    assert_array_equal(compiled["params"]["weight"]["weight"], W)


def wrong(change):
    variables = shims.ToLinen(norm()).init(KEY, X, deterministic=True)
    variables = jax.tree.map(lambda a: a, variables)
    change(variables)
    return variables


@pytest.mark.parametrize(
    ("change", "attribute", "text"),
    [
        (lambda v: v.pop("batch_stats"), "missing", "batch_stats/layers/1/running_mean"),
        (lambda v: v["params"]["layers"]["0"]["weight"].pop("bias"), "missing", "weight/bias"),
        (lambda v: v["params"].update(extra=jnp.ones(2)), "unexpected", "params/extra"),
        (
            lambda v: v["params"]["layers"]["0"]["weight"].update(weight=W.T),
            "mismatched",
            "float32[4, 3], wanted float32[3, 4]",
        ),
        (
            lambda v: v["params"]["layers"]["0"]["weight"].update(bias=B.astype(jnp.float16)),
            "mismatched",
            "float16[4], wanted float32[4]",
        ),
    ],
    ids=["collection", "missing", "unexpected", "shape", "dtype"],
)
def test_variables_that_do_not_fit_are_refused_and_no_weight_is_invented(
    change, attribute, text
):
    guest = norm()
    shim = shims.ToLinen(guest)
    for use in (
        lambda v: shim.apply(v, X, deterministic=True),
        shim.write_back,
        shim.unwrap,
        shim.materialize,
    ):
        with pytest.raises(interop.ConversionError) as e:
            use(wrong(change))
        assert text in " ".join(getattr(e.value, attribute))
    assert_array_equal(guest.layers[0].weight.value["weight"], W)


def test_write_back_commits_all_values():
    guest = norm()
    shim = shims.ToLinen(guest)
    variables = shim.init(KEY, X, deterministic=True)
    _, after = shim.apply(variables, X, deterministic=False, mutable=["batch_stats"])
    assert_array_equal(guest.layers[1].running_mean.value, np.zeros(4))
    shim.write_back({**jax.tree.map(lambda a: a + 1, {"params": variables["params"]}), **after})
    assert_array_equal(guest.layers[0].weight.value["weight"], W + 1)
    assert np.abs(guest.layers[1].running_mean.value).max() > 0


def test_write_back_to_what_cannot_change_says_what_to_do():
    shim = shims.ToLinen(eqx.nn.Linear(3, 4, key=KEY))
    with pytest.raises(interop.ArgumentError, match="unwrap"):
        shim.write_back(shim.init(KEY, X))


def test_statistics_in_an_immutable_collection_are_flaxs_own_error():
    shim = shims.ToLinen(norm(), deterministic=False)
    variables = shim.init(KEY, X)
    with pytest.raises(Exception, match="immutable|mutable"):
        shim.apply(variables, X)


def test_the_mode_is_a_field_or_an_argument_and_missing_where_needed_an_error():
    drop = brainstate.nn.Dropout(0.5)
    ones = jnp.ones((20, 20))
    assert_array_equal(shims.ToLinen(drop, deterministic=True).apply({}, ones), ones)
    out = shims.ToLinen(drop).apply({}, ones, deterministic=False, rngs={"dropout": KEY})
    assert (np.asarray(out) == 0).any()
    with pytest.raises(interop.MissingKeyError, match="rngs"):
        shims.ToLinen(drop).apply({}, ones, deterministic=False)
    with pytest.raises(interop.ArgumentError, match="deterministic="):
        shims.ToLinen(drop).apply({}, ones)
    assert shims.ToLinen(linear()).apply(shims.ToLinen(linear()).init(KEY, X), X).shape == (
        5,
        4,
    )


def test_a_layer_used_twice_in_the_guest_is_one_parameter():
    layer = brainstate.nn.Linear(3, 3, w_init=W[:, :3], b_init=B[:3])
    shim = shims.ToLinen(brainstate.nn.Sequential(layer, brainstate.nn.Tanh(), layer))
    variables = shim.init(KEY, X)
    assert len(jax.tree.leaves(variables)) == 2
    expected = np.tanh(X @ W[:, :3] + B[:3]) @ W[:, :3] + B[:3]
    assert_allclose(shim.apply(variables, X), expected, rtol=1e-5)


def test_inside_a_linen_model_the_shim_is_a_submodule():
    layer = linear()

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(shims.ToLinen(layer, name="core")(x))

    variables = Model().init(KEY, X)
    assert variables["params"]["core"]["weight"]["weight"] is layer.weight.value["weight"]
    grads = jax.grad(lambda v: Model().apply(v, X).sum())(variables)
    assert np.abs(grads["params"]["core"]["weight"]["weight"]).max() > 0


def test_vmap_and_scan_over_the_shim():
    layer = brainstate.nn.Linear(3, 3, w_init=W[:, :3], b_init=B[:3])

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            members = nn.vmap(
                shims.ToLinen,
                in_axes=0,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                axis_size=2,
            )(layer)
            return members(x)

    variables = Stack().init(KEY, jnp.stack([X, X]))
    assert [a.shape[0] for a in jax.tree.leaves(variables)] == [2, 2]
    out = Stack().apply(variables, jnp.stack([X, 2 * X]))
    assert_allclose(out[1], 2 * X @ W[:, :3] + B[:3], rtol=1e-5)

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                lambda module, carry, _: (module(carry), None),
                variable_broadcast="params",
                split_rngs={"params": False},
                length=3,
            )
            return scan(shims.ToLinen(layer, name="core"), x, None)[0]

    expected = X
    for _ in range(3):
        expected = expected @ W[:, :3] + B[:3]
    assert_allclose(Deep().apply(Deep().init(KEY, X), X), expected, rtol=1e-4, atol=1e-5)


def test_no_new_trace_for_the_shim_built_again():
    traces = []

    def apply(module, variables, x):
        traces.append(1)
        return module.apply(variables, x)

    call = jax.jit(apply, static_argnums=0)
    layer = linear()
    shim = shims.ToLinen(layer)
    variables = shim.init(KEY, X)
    call(shim, variables, X)
    call(shims.ToLinen(layer), jax.tree.map(lambda a: a + 1, variables), X)
    assert len(traces) == 1


def test_a_compiled_init_never_returns_another_guests_weights():
    init = jax.jit(lambda module: module.init(KEY, X), static_argnums=0)
    for weight in (W, W + 1):
        layer = brainstate.nn.Linear(3, 4, w_init=weight, b_init=B)
        variables = init(shims.ToLinen(layer))
        assert_array_equal(variables["params"]["weight"]["weight"], weight)


def test_signature_and_names():
    class TakesMode(brainstate.nn.Module):
        def update(self, x, deterministic): ...

    with pytest.raises(interop.ArgumentError, match="deterministic"):
        shims.ToLinen(TakesMode())
    with pytest.raises(interop.ArgumentError, match="class, not an instance"):
        shims.ToLinen(nnx.Linear)
    assert "Linear" in repr(shims.ToLinen(linear()))


def test_variables_that_are_none_are_refused_by_name():
    shim = shims.ToLinen(linear())
    calls = [lambda: shim.apply(3, X), lambda: shim.unwrap(3), lambda: shim.write_back(3)]
    for call in calls:
        with pytest.raises(interop.ArgumentError, match="mapping of collections, got int"):
            call()
