"""Checkpoints with orbax, by the ordinary calls of each host: shims and converted models."""

import brainstate
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import interop
import shims

from .cases import EPSILON, MEAN, MOMENTUM, SCALE, SHIFT, VAR, WEIGHT, X
from .conftest import Framework
from .test_weights import BUILTIN, wrapped


def stack(fw, factor):
    norm = fw.batch_norm(SCALE * factor, SHIFT, MEAN * factor, VAR, EPSILON, MOMENTUM)
    return fw.sequential(norm, fw.linear(WEIGHT * factor))


def tree_of(host, model):
    """What users of the host give orbax."""
    match host:
        case "nnx":
            return nnx.to_pure_dict(nnx.state(model))
        case "linen":
            return model[1]
        case "equinox":
            return eqx.filter(model, eqx.is_array)
    return {"/".join(map(str, k)): state.value for k, state in model.states().items()}


def with_tree(host, model, tree):
    match host:
        case "nnx":
            state = nnx.state(model)
            nnx.replace_by_pure_dict(state, tree)
            nnx.update(model, state)
            return model
        case "linen":
            return model[0], tree
        case "equinox":
            return eqx.combine(tree, model)
    for path, state in model.states().items():
        state.value = tree["/".join(map(str, path))]
    return model


def through_orbax(host, model, other, folder):
    with ocp.PyTreeCheckpointer() as checkpointer:
        if host == "equinox":  # its trees are modules: orbax takes their leaves
            leaves = jax.tree.leaves(tree_of(host, model))
            treedef = jax.tree.structure(tree_of(host, other))
            checkpointer.save(folder, dict(enumerate(map(np.asarray, leaves))))
            found = checkpointer.restore(folder)
            restored = [jnp.asarray(found[str(i)]) for i in range(len(leaves))]
            return with_tree(host, other, jax.tree.unflatten(treedef, restored))
        checkpointer.save(folder, tree_of(host, model))
        item = tree_of(host, other)
        args = ocp.checkpoint_utils.construct_restore_args(item)
        return with_tree(
            host, other, checkpointer.restore(folder, item=item, restore_args=args)
        )


@pytest.mark.parametrize("host", BUILTIN)
def test_a_shim_is_restored_by_orbax(host, tmp_path):
    guest = Framework("nnx" if host == "brainstate" else "brainstate")
    (model, call), (other, _) = (wrapped(host, stack(guest, f)) for f in (1.0, 2.0))
    assert float(jnp.abs(call(other) - call(model)).max()) > 0.1
    restored = through_orbax(host, model, other, tmp_path / "checkpoint")
    np.testing.assert_array_equal(call(restored), call(model))


@pytest.mark.parametrize("host", BUILTIN)
def test_a_converted_model_is_restored_by_orbax(host, tmp_path):
    fw, source = Framework(host), Framework("nnx" if host == "brainstate" else "brainstate")
    model, other = (
        fw.convert_from(source, stack(source, f), sample_input=(3,)) for f in (1.0, 2.0)
    )
    y = fw.call(model, X)
    assert float(jnp.abs(fw.call(other, X) - y).max()) > 0.1
    restored = through_orbax(host, model, other, tmp_path / "checkpoint")
    np.testing.assert_array_equal(fw.call(restored, X), y)


class Residual(brainstate.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.inner = brainstate.nn.Linear(3, 4, w_init=WEIGHT * factor)
        self.count = brainstate.LongTermState(jnp.full((), factor))

    def update(self, x):
        return x.sum(-1, keepdims=True) + self.count.value * jnp.tanh(self.inner(x))


class ResidualFlax(nnx.Module):
    def __init__(self, factor):
        self.inner = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        self.inner.kernel.set_value(WEIGHT * factor)
        self.count = nnx.BatchStat(jnp.full((), factor))

    def __call__(self, x):
        return x.sum(-1, keepdims=True) + self.count[...] * jnp.tanh(self.inner(x))


TRACED = {
    "nnx": lambda f, **how: shims.ToNNX(Residual(f)).materialize(sample_input=X, **how),
    "linen": lambda f, **how: shims.ToLinen(Residual(f)).materialize(sample_input=X, **how),
    "equinox": lambda f, **how: shims.materialize(
        eqx.nn.make_with_state(shims.ToEquinox)(Residual(f)), sample_input=X[0], **how
    ),
    "brainstate": lambda f, **how: shims.FromNNX(ResidualFlax(f)).materialize(
        sample_input=X, **how
    ),
}
CALLS = {
    "nnx": lambda model: model(X),
    "linen": lambda model: model[0].apply(model[1], X),
    "equinox": lambda pair: jax.vmap(pair[0], in_axes=(0, None))(X, pair[1])[0],
    "brainstate": lambda model: model(X),
}


@pytest.mark.parametrize("host", BUILTIN)
def test_a_traced_module_is_restored_by_orbax(host, tmp_path):
    call = CALLS[host]
    model, other = (TRACED[host](factor, method="trace") for factor in (1.0, 2.0))
    expected = X.sum(1, keepdims=True) + jnp.tanh(X @ WEIGHT)
    np.testing.assert_allclose(call(model), expected, rtol=1e-5)
    assert float(jnp.abs(call(other) - expected).max()) > 0.1
    restored = through_orbax(host, model, other, tmp_path / "checkpoint")
    np.testing.assert_array_equal(call(restored), call(model))


def test_named_weights_are_a_tree_for_orbax_in_every_framework(source, tmp_path):
    model, other = stack(source, 1.0), stack(source, 2.0)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", interop.weights(model))
        item = interop.weights(other)
        args = ocp.checkpoint_utils.construct_restore_args(item)
        found = checkpointer.restore(tmp_path / "checkpoint", item=item, restore_args=args)
    loaded = interop.load_weights(other, found)
    np.testing.assert_array_equal(source.call(loaded, X), source.call(model, X))
