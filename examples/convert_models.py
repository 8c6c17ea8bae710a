"""Convert a model between four frameworks: look before, prove after, carry the optimiser over.

Run it: python examples/convert_models.py
"""

# %% A BrainState model
import brainstate
import brainunit
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import interop

brainstate.random.seed(0)
model = brainstate.nn.Sequential(
    brainstate.nn.Linear(4, 8),
    brainstate.nn.LayerNorm(8),
    brainstate.nn.ReLU(),
    brainstate.nn.Linear(8, 2),
)
x = jax.random.normal(jax.random.key(0), (16, 4))
y = jnp.stack([x[:, 0] * x[:, 1], jnp.sin(x[:, 2])], axis=1)

# %% Look before: what will happen to each layer, and what stands in the way
print(interop.explain(model, to="equinox"))
print()

broken = brainstate.nn.Sequential(
    brainstate.nn.Linear(4, 8),
    brainstate.nn.RReLU(),  # draws noise whenever it is called
    brainstate.nn.Linear(8, 2, w_init=jnp.ones((8, 2)) * brainunit.mV, b_init=None),
)
report = interop.explain(broken, to="nnx")
print(f"problems found at once: {len(report.problems)}")
for problem in report.problems:
    print(f"  {problem.path}: {type(problem).__name__}")
print()

# %% Convert: the guide's functions, and any pair by convert
nnx_model = interop.to_nnx(model, rngs=nnx.Rngs(0))
linen_module, variables = interop.to_linen(model)
eqx_model = interop.to_equinox(model)
direct = interop.convert(nnx_model, to="equinox")  # not through BrainState

reference = model(x)
outputs = {
    "nnx": nnx_model(x),
    "linen": linen_module.apply(variables, x),
    "equinox": jax.vmap(eqx_model)(x),
    "nnx -> equinox": jax.vmap(direct)(x),
    "and back": interop.from_equinox(direct)(x),
}
for name, output in outputs.items():
    print(f"{name:>14}: output differs by {jnp.abs(output - reference).max():.1e}")
shared = nnx_model.layers[0].kernel.get_value() is model.layers[0].weight.value["weight"]
print(f"the Flax model holds the same arrays: {shared}")
print()

# %% Prove after: outputs, gradients of inputs and of parameters, layer by layer
print(interop.compare(model, eqx_model, x))
interop.assert_equivalent(model, (linen_module, variables), x)
print()


# %% Train in BrainState ...
optimizer = optax.adam(1e-2)
states = model.states(brainstate.ParamState)


def parameters():
    """The values that optax sees."""
    return {path: state.value for path, state in states.items()}


opt_state = optimizer.init(parameters())
gradient = brainstate.transform.grad(
    lambda: ((model(x) - y) ** 2).mean(), states, return_value=True
)
losses = []
for _ in range(10):
    grads, loss = gradient()
    updates, opt_state = optimizer.update(dict(grads), opt_state, parameters())
    for path, value in optax.apply_updates(parameters(), updates).items():
        states[path].value = value
    losses.append(float(loss))

# %% ... and go on in Equinox, with Adam's moments
trained = interop.to_equinox(model)
mapping = interop.mapping(model, trained)
print(mapping)
opt_state = mapping.apply(opt_state)


@eqx.filter_jit
def step(network, opt_state):
    """One step of Adam."""
    loss, grads = eqx.filter_value_and_grad(
        lambda network: ((jax.vmap(network)(x) - y) ** 2).mean()
    )(network)
    updates, opt_state = optimizer.update(grads, opt_state)
    return eqx.apply_updates(network, updates), opt_state, loss


for _ in range(10):
    trained, opt_state, loss = step(trained, opt_state)
    losses.append(float(loss))
print("loss, BrainState:", " ".join(f"{loss:.3f}" for loss in losses[:10]))
print("loss, Equinox:   ", " ".join(f"{loss:.3f}" for loss in losses[10:]))
print(f"the loss falls at every step: {losses == sorted(losses, reverse=True)}")
print()


# %% A layer of one's own
class Scale(brainstate.nn.Module):
    """``factor * x``."""

    def __init__(self, factor):
        super().__init__()
        self.factor = brainstate.ParamState(factor)

    def update(self, x):
        """Scale ``x``."""
        return x * self.factor.value


class NnxScale(nnx.Module):
    """The same in Flax."""

    def __init__(self, factor):
        self.factor = nnx.Param(factor)

    def __call__(self, x):
        """Scale ``x``."""
        return x * self.factor[...]


interop.register_layer_mapping(
    interop.LayerMapping(
        bst_type=Scale,
        framework="nnx",
        foreign_type=NnxScale,
        to_bst=lambda layer, ctx: Scale(layer.factor.get_value()),
        to_foreign=lambda layer, ctx: NnxScale(layer.factor.value),
    )
)
scaled = brainstate.nn.Sequential(brainstate.nn.Linear(4, 3), Scale(jnp.array([1.0, 2.0, 3.0])))
interop.assert_equivalent(scaled, interop.to_nnx(scaled), x)
print("a registered layer converts: True")
