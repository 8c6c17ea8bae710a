"""Recurrent cells in every framework, and how each host drives one over time."""

import brainstate
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from brainstate import graph
from flax import nnx

from .cases import array

WEIGHT_X, WEIGHT_H, BIAS = array(3, 16, seed=40), array(4, 16, seed=41), array(16, seed=42)
XS, H, C = array(6, 5, 3, seed=43), array(5, 4, seed=44), array(5, 4, seed=45)

# -- drivers: a shim as (parameters, function of (parameters, xs, carry) -> (carry, outputs)),
# -- with time first in xs and then the batch


def _drive_nnx(shim, train):
    (shim.train if train else shim.eval)()
    rnn = nnx.RNN(shim, time_major=True, return_carry=True, rngs=False)
    definition, params, rest = nnx.split(rnn, nnx.Param, ...)
    return params, lambda params, xs, carry: nnx.merge(definition, params, rest)(
        xs, initial_carry=carry
    )


def _drive_linen(shim, train):
    shim = shim.clone(deterministic=not train)
    rnn = nn.RNN(shim, time_major=True, return_carry=True)
    variables = rnn.init(jax.random.key(0), XS, initial_carry=start(shim))
    assert set(variables) == {"params"}
    return variables, lambda variables, xs, carry: rnn.apply(variables, xs, initial_carry=carry)


def _drive_equinox(shim, train):
    shim = eqx.nn.inference_mode(shim, value=not train)
    params, rest = eqx.partition(shim, eqx.is_inexact_array)

    def drive(params, xs, carry):
        cell = jax.vmap(eqx.combine(params, rest))
        return jax.lax.scan(lambda carry, x: cell(x, carry), carry, xs)

    return params, drive


def _drive_brainstate(shim, train):
    shim.init_state(XS.shape[1])
    definition, params, rest = graph.treefy_split(shim, brainstate.ParamState, ...)

    def drive(params, xs, carry):
        cell = graph.treefy_merge(definition, params, rest)
        hidden = jax.tree.leaves(cell.carry, is_leaf=_is_state)
        for state, value in zip(hidden, jax.tree.leaves(carry), strict=True):
            state.value = value
        with brainstate.environ.context(fit=train):
            out = brainstate.transform.for_loop(cell, xs)
        after = [state.value for state in hidden]
        return jax.tree.unflatten(jax.tree.structure(carry), after), out

    return params, drive


def _is_state(leaf):
    return isinstance(leaf, brainstate.State)


_DRIVERS = {
    "brainstate": _drive_brainstate,
    "equinox": _drive_equinox,
    "linen": _drive_linen,
    "nnx": _drive_nnx,
}


def driver(host, shim, train=False):
    """The parameters of a shim, and a function that runs it over time."""
    return _DRIVERS[host](shim, train)


def start(shim, batch=XS.shape[1]):
    """What a shim's own host starts it from, for inputs of 3 features."""
    if isinstance(shim, nnx.RNNCellBase):
        return shim.initialize_carry((batch, 3), nnx.Rngs(0))
    if isinstance(shim, nn.RNNCellBase):
        return shim.initialize_carry(jax.random.key(0), (batch, 3))
    if isinstance(shim, eqx.Module):
        one = shim.initialize_carry((3,), key=jax.random.key(0))
        return jax.tree.map(lambda leaf: jnp.stack([leaf] * batch), one)
    shim.init_state(batch)
    return jax.tree.map(lambda state: state.value, shim.carry, is_leaf=_is_state)


# -- carries of an LSTM, as each framework's own cell has them

_LSTM_CARRY = {
    "brainstate": (lambda h, c: {"h": h, "c": c}, lambda carry: (carry["h"], carry["c"])),
    "equinox": (lambda h, c: (h, c), lambda carry: carry),
    "linen": (lambda h, c: (c, h), lambda carry: carry[::-1]),
    "nnx": (lambda h, c: (c, h), lambda carry: carry[::-1]),
}


def lstm_carry(guest, h, c):
    """``h`` and ``c`` as the carry of a guest's LSTM cell."""
    return _LSTM_CARRY[guest][0](h, c)


def lstm_state(guest, carry):
    """``(h, c)`` of such a carry."""
    return _LSTM_CARRY[guest][1](carry)


def lstm(weights, xs, h, c):
    """Outputs, ``h`` and ``c``; gates in the order i, f, g, o."""
    weight_x, weight_h, bias = weights
    outputs = []
    for x in xs:
        i, f, g, o = jnp.split(x @ weight_x + h @ weight_h + bias, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        outputs.append(h)
    return jnp.stack(outputs), h, c


# -- a cell of the user's own: an output that is not its state, and state of two shapes

OWN = {
    "w": array(3, 4, seed=50),
    "u": array(4, 4, seed=51),
    "b": array(4, seed=52),
    "v": array(4, 2, seed=53),
}
M0, N0 = array(5, 4, seed=54), array(5, 2, 4, seed=55)


def own(p, m, n, x):
    """One step for any batch axes: the new states and the output."""
    m = jnp.tanh(x @ p["w"] + m @ p["u"] + p["b"])
    n = 0.9 * n + jnp.stack([m, 2 * m], axis=-2)
    return m, n, m @ p["v"] + n.sum((-1, -2))[..., None]


def own_steps(p, xs, m, n):
    """Outputs and last states."""
    outputs = []
    for x in xs:
        m, n, y = own(p, m, n, x)
        outputs.append(y)
    return jnp.stack(outputs), m, n


class BrainStateOwn(brainstate.nn.RNNCell):
    def __init__(self):
        super().__init__()
        self.p = {name: brainstate.ParamState(a) for name, a in OWN.items()}

    def init_state(self, batch_size=None, **kwargs):
        batch = () if batch_size is None else (batch_size,)
        self.m = brainstate.HiddenState(jnp.zeros((*batch, 4)))
        self.n = brainstate.ShortTermState(jnp.zeros((*batch, 2, 4)))

    def update(self, x):
        p = {name: state.value for name, state in self.p.items()}
        self.m.value, self.n.value, out = own(p, self.m.value, self.n.value, x)
        return out


class NnxOwn(nnx.RNNCellBase):
    def __init__(self):
        self.p = nnx.data({name: nnx.Param(a) for name, a in OWN.items()})

    def __call__(self, carry, inputs):
        m, n, out = own(self.p, *carry, inputs)
        return (m, n), out

    def initialize_carry(self, input_shape, rngs=None, carry_init=None):
        return jnp.zeros((*input_shape[:-1], 4)), jnp.zeros((*input_shape[:-1], 2, 4))

    @property
    def num_feature_axes(self):
        return 1


class LinenOwn(nn.RNNCellBase):
    @nn.compact
    def __call__(self, carry, x):
        p = {name: self.param(name, lambda _, a=a: a) for name, a in OWN.items()}
        m, n, out = own(p, *carry, x)
        return (m, n), out

    @nn.nowrap
    def initialize_carry(self, rng, input_shape):
        return jnp.zeros((*input_shape[:-1], 4)), jnp.zeros((*input_shape[:-1], 2, 4))

    @property
    def num_feature_axes(self):
        return 1


class EquinoxOwn(eqx.Module):
    p: dict

    def __call__(self, x, carry):
        m, n, out = own(self.p, *carry, x)
        return (m, n), out


def own_cell(guest):
    """The cell in a framework, and the keywords that a shim of it takes."""
    if guest == "brainstate":
        return BrainStateOwn(), {}
    if guest == "nnx":
        return NnxOwn(), {}
    if guest == "linen":
        return LinenOwn(), {"params": {"params": OWN}}
    return EquinoxOwn(OWN), {"carry": (jnp.zeros(4), jnp.zeros((2, 4)))}


def own_carry(guest, m, n):
    """States as the carry of that cell."""
    return {"m": m, "n": n} if guest == "brainstate" else (m, n)
