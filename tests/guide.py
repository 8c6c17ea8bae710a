# ruff: noqa: E501 - the lines are the guide's
"""The code of BrainState's guide "Interoperate with Flax and Equinox", line by line.

The only change is the line that imports ``interop``. Indentation, which the guide's text has
lost, is put back. Each cell is followed by what the guide prints.
"""

CELLS = [
    (
        """
import jax
import jax.numpy as jnp
import flax.nnx as nnx

import brainstate
import interop

brainstate.random.seed(0)
""",
        [],
    ),
    (
        """
layers = interop.supported_layers()
for framework, names in layers.items():
    print(f'{framework:8} : {", ".join(names)}')
""",
        None,  # we support more
    ),
    (
        """
def make_model():
    return brainstate.nn.Sequential(
        brainstate.nn.Linear(4, 8),
        brainstate.nn.LayerNorm(8),
        brainstate.nn.Linear(8, 2),
    )

x = brainstate.random.randn(3, 4)
""",
        [],
    ),
    (
        """
model = make_model()
reference = model(x)

# BrainState -> NNX
nnx_model = interop.to_nnx(model, rngs=nnx.Rngs(0))
print('to_nnx output matches :', bool(jnp.allclose(reference, nnx_model(x), atol=1e-5)))

# NNX -> BrainState
back = interop.from_nnx(nnx_model)
print('from_nnx output matches:', bool(jnp.allclose(reference, back(x), atol=1e-5)))
""",
        ["to_nnx output matches : True", "from_nnx output matches: True"],
    ),
    (
        """
model = make_model()
reference = model(x)

# BrainState -> Linen
linen_module, params = interop.to_linen(model)
print('to_linen output matches :', bool(jnp.allclose(reference, linen_module.apply(params, x), atol=1e-5)))

# Linen -> BrainState
back = interop.from_linen(linen_module, params)
print('from_linen output matches:', bool(jnp.allclose(reference, back(x), atol=1e-5)))
""",
        ["to_linen output matches : True", "from_linen output matches: True"],
    ),
    (
        """
model = make_model()
reference = model(x)

# BrainState -> Equinox (call per-example, so vmap over the batch)
eqx_model = interop.to_equinox(model, key=jax.random.PRNGKey(0))
eqx_out = jax.vmap(eqx_model)(x)
print('to_equinox output matches :', bool(jnp.allclose(reference, eqx_out, atol=1e-5)))

# Equinox -> BrainState
back = interop.from_equinox(eqx_model)
print('from_equinox output matches:', bool(jnp.allclose(reference, back(x), atol=1e-5)))
""",
        ["to_equinox output matches : True", "from_equinox output matches: True"],
    ),
    (
        """
conv = nnx.Conv(in_features=3, out_features=4, kernel_size=(3, 3), rngs=nnx.Rngs(0))
bst_conv = interop.from_nnx(conv, sample_input=(8, 8, 3))  # H, W, C (no batch dim)

image = brainstate.random.randn(2, 8, 8, 3)
print('converted conv output shape:', bst_conv(image).shape)
""",
        ["converted conv output shape: (2, 8, 8, 4)"],
    ),
]

# What the guide says supported_layers() lists, by framework.
SUPPORTED = {
    "nnx": "BatchNorm1d, BatchNorm2d, BatchNorm3d, Conv1d, Conv2d, Conv3d, Dropout, Embedding, "
    "GroupNorm, LSTMCell, LayerNorm, Linear, RMSNorm",
    "linen": "BatchNorm1d, BatchNorm2d, BatchNorm3d, Conv1d, Conv2d, Conv3d, Dropout, "
    "Embedding, GroupNorm, LSTMCell, LayerNorm, Linear, RMSNorm",
    "equinox": "Conv1d, Conv2d, Conv3d, Dropout, Embedding, GroupNorm, LSTMCell, LayerNorm, "
    "Linear, RMSNorm",
}
