"""Recurrent cells of every framework, driven over time by every other, against plain JAX."""

import inspect

import brainstate
import brainunit as u
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

from . import cells
from .cases import array
from .cells import BIAS, M0, N0, WEIGHT_H, WEIGHT_X, XS, C, H
from .conftest import Framework

WEIGHTS = (WEIGHT_X, WEIGHT_H, BIAS)
NAMES = ("brainstate", "equinox", "linen", "nnx")
PAIRS = [(guest, host) for guest in NAMES for host in NAMES if guest != host]
pairs = pytest.mark.parametrize(("guest", "host"), PAIRS)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # six float32 steps; BrainState moves 1 between biases


def close(found, wanted):
    jax.tree.map(lambda a, b: assert_allclose(a, b, **TOLERANCE), found, wanted)


def lstm(guest):
    source = Framework(guest)
    return source.arguments(source.lstm(*WEIGHTS))


def lstm_in(guest, host):
    module, keywords = lstm(guest)
    return shims.wrap(module, into=host, **keywords)


@pytest.fixture(scope="module")
def lstm_truth():
    def loss(weights, h, c):
        ys, h, c = cells.lstm(weights, XS, h, c)
        return (ys**2).sum() + (h * c).sum(), (ys, h, c)

    both = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, out), grads = jax.jit(both)(WEIGHTS, H, C)
    return out, grads


@pairs
def test_a_cell_runs_over_time_from_a_given_state(guest, host, lstm_truth):
    (ys, h, c), _ = lstm_truth
    params, drive = cells.driver(host, lstm_in(guest, host))
    carry = cells.lstm_carry(guest, H, C)
    eager = drive(params, XS, carry)
    close((eager[1], *cells.lstm_state(guest, eager[0])), (ys, h, c))
    compiled = jax.jit(drive)(params, XS, carry)
    close(compiled, eager)


@pairs
def test_gradients_reach_weights_and_the_first_state(guest, host, lstm_truth):
    _, (weights, dh, dc) = lstm_truth
    # BrainState's own random state is for its own transformations; below they get it
    train = host != "brainstate"
    params, drive = cells.driver(host, lstm_in(guest, host), train=train)

    def loss(params, carry):
        carry, ys = drive(params, XS, carry)
        h, c = cells.lstm_state(guest, carry)
        return (ys**2).sum() + (h * c).sum()

    found, carry = jax.jit(jax.grad(loss, argnums=(0, 1)))(
        params, cells.lstm_carry(guest, H, C)
    )
    close(cells.lstm_state(guest, carry), (dh, dc))
    found, wanted = jax.tree.leaves(found), jax.tree.leaves(weights)
    assert sum(a.size for a in found) == sum(a.size for a in wanted)
    # whatever the layout: gates are split, joined, transposed and permuted
    norms = [sum(float((a**2).sum()) for a in arrays) for arrays in (found, wanted)]
    assert_allclose(*norms, rtol=1e-4)


@pairs
def test_vmap_over_weights_and_data(guest, host):
    params, drive = cells.driver(host, lstm_in(guest, host))
    stacked = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), params)
    xs, carry = jnp.stack([XS, XS + 1]), cells.lstm_carry(guest, H, C)
    _, ys = jax.vmap(drive, in_axes=(0, 0, None))(stacked, xs, carry)
    close(ys[0], cells.lstm(WEIGHTS, XS, H, C)[0])
    half = jax.tree.map(lambda a: 0.5 * a, params)
    close(ys[1], drive(half, XS + 1, carry)[1])


@pairs
def test_a_cell_starts_from_the_state_that_the_guest_starts_from(guest, host):
    shim = lstm_in(guest, host)
    carry = cells.start(shim)
    leaves = jax.tree.leaves(carry)
    assert [leaf.shape for leaf in leaves] == [(5, 4)] * 2
    assert not any(leaf.any() for leaf in leaves)


@pairs
def test_a_cell_of_ones_own_with_an_output_that_is_not_its_state(guest, host):
    module, keywords = cells.own_cell(guest)
    shim = shims.wrap(module, into=host, **keywords)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(cells.start(shim))) == [
        (5, 2, 4),
        (5, 4),
    ]
    params, drive = cells.driver(host, shim)
    carry, ys = jax.jit(drive)(params, XS, cells.own_carry(guest, M0, N0))
    wanted, m, n = cells.own_steps(cells.OWN, XS, M0, N0)
    close(ys, wanted)
    close(carry, cells.own_carry(guest, m, n))
    assert len(jax.tree.leaves(params)) == 4


GRUS = {
    "brainstate": lambda: (
        brainstate.nn.GRUCell(3, 4, b_init=brainstate.nn.init.Normal(1.0)),
        {},
    ),
    "equinox": lambda: (eqx.nn.GRUCell(3, 4, key=jax.random.key(0)), {}),
    "linen": lambda: (
        nn.GRUCell(4),
        {"params": nn.GRUCell(4).init(jax.random.key(0), H, XS[0])},
    ),
    "nnx": lambda: (
        nnx.GRUCell(3, 4, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0)),
        {},
    ),
}


def gru_steps(guest, module, keywords):
    """The native cell, step by step."""
    if guest == "brainstate":
        module.init_state(5)
        module.h.value = H
        return jnp.stack([module(x) for x in XS])
    h, outputs = H, []
    for x in XS:
        if guest == "equinox":
            h = jax.vmap(module)(x, h)
        elif guest == "linen":
            h, _ = module.apply(keywords["params"], h, x)
        else:
            h, _ = module(h, x)
        outputs.append(h)
    return jnp.stack(outputs)


@pairs
def test_a_gated_unit_whose_carry_is_one_array(guest, host):
    module, keywords = GRUS[guest]()
    params, drive = cells.driver(host, shims.wrap(module, into=host, **keywords))
    carry = {"h": H} if guest == "brainstate" else H
    carry, ys = jax.jit(drive)(params, XS, carry)
    close(ys, gru_steps(guest, module, keywords))
    assert_array_equal(jax.tree.leaves(carry)[0], ys[-1])


# -- NNX as the host --


@pytest.fixture
def in_nnx():
    return lstm_in("brainstate", "nnx")


def sequences():
    return jnp.swapaxes(XS, 0, 1)


def test_nnx_takes_lengths_directions_and_the_last_carry(in_nnx):
    lengths, xs = jnp.array([1, 3, 6, 2, 4]), sequences()
    assert isinstance(in_nnx, nnx.RNNCellBase)
    assert in_nnx.num_feature_axes == 1
    carry, _ = nnx.RNN(in_nnx, return_carry=True)(xs, seq_lengths=lengths)
    zero = jnp.zeros((1, 4))
    for i, length in enumerate(lengths):
        _, h, c = cells.lstm(WEIGHTS, XS[:length, i : i + 1], zero, zero)
        close((carry["h"][i], carry["c"][i]), (h[0], c[0]))
    forward = cells.lstm(WEIGHTS, XS, zero, zero)[0]
    backward = cells.lstm(WEIGHTS, XS[::-1], zero, zero)[0][::-1]
    both = nnx.Bidirectional(nnx.RNN(in_nnx), nnx.RNN(lstm_in("equinox", "nnx")))
    found = nnx.jit(lambda m, x: m(x))(both, xs)
    close(found, jnp.swapaxes(jnp.concatenate([forward, backward], -1), 0, 1))


def test_nnx_trains_the_cell_and_the_guest_has_it():
    guest = Framework("brainstate").lstm(*WEIGHTS)
    rnn = nnx.RNN(shims.ToNNX(guest))
    before = guest.W.weight.value["weight"]

    @nnx.jit
    def step(rnn, xs):
        loss, grads = nnx.value_and_grad(lambda m: (m(xs) ** 2).mean())(rnn)
        params = nnx.state(rnn, nnx.Param)
        nnx.update(rnn, jax.tree.map(lambda p, g: p - 0.5 * g, params, grads))
        return loss

    losses = [float(step(rnn, sequences())) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert np.abs(guest.W.weight.value["weight"] - before).max() > 1e-3
    assert not isinstance(guest.W.weight.value["weight"], jax.core.Tracer)


def test_the_state_that_a_guest_keeps_itself_is_apart_from_the_carry(in_nnx):
    in_nnx.init_state(5)
    out = in_nnx(XS[0])
    kept = in_nnx.h.get_value()
    assert_array_equal(kept, out)
    carry, _ = in_nnx(cells.lstm_carry("brainstate", H, C), XS[0])
    assert in_nnx.h.get_value() is kept
    close(carry["h"], cells.lstm(WEIGHTS, XS[:1], H, C)[1])
    assert set(nnx.to_flat_state(nnx.state(in_nnx, nnx.Param)).paths) == {
        ("W", "weight", "bias"),
        ("W", "weight", "weight"),
    }


def test_a_carry_can_be_drawn_at_random(in_nnx):
    drawn = in_nnx.initialize_carry((5, 3), nnx.Rngs(0), nnx.initializers.normal())
    assert np.abs(drawn["h"] - drawn["c"]).min() > 0
    own = shims.ToNNX(brainstate.nn.GRUCell(3, 4, state_init=brainstate.nn.init.Normal(1.0)))
    first, second = (own.initialize_carry((5, 3), nnx.Rngs(i))["h"] for i in range(2))
    assert np.abs(first - second).max() > 0
    with pytest.raises(interop.MissingKeyError, match="rngs"):
        own.initialize_carry((5, 3))
    close(own({"h": H}, XS[0])[1], own({"h": H}, XS[0])[1])


@pytest.mark.parametrize("batch", [(), (5,), (2, 5)])
def test_a_carry_has_the_batch_axes_of_the_input(in_nnx, batch):
    carry = in_nnx.initialize_carry((*batch, 3))
    assert carry["h"].shape == (*batch, 4)
    x = jnp.broadcast_to(XS[0, 0], (*batch, 3))
    close(in_nnx(carry, x)[1], cells.lstm(WEIGHTS, x[None], carry["h"], carry["c"])[1])


def test_the_signature_is_the_hosts(in_nnx):
    assert list(inspect.signature(in_nnx).parameters)[:2] == ["carry", "inputs"]


@pytest.mark.parametrize(
    ("carry", "match"),
    [
        ((C, H), "dict of its hidden states"),
        ({"h": H}, "missing c"),
        ({"h": H, "c": C, "d": C}, "unexpected d"),
        ({"h": H, "c": C[:, :2]}, "does not fit"),
        ({"h": H, "c": C.astype(jnp.float16)}, "does not fit"),
    ],
)
def test_a_carry_that_does_not_fit_is_refused(in_nnx, carry, match):
    with pytest.raises(interop.ConversionError, match=match):
        in_nnx(carry, XS[0])


def test_a_cell_that_makes_other_state_than_hidden_state_is_refused():
    class Counting(brainstate.nn.RNNCell):
        def init_state(self, batch_size=None):
            self.h = brainstate.HiddenState(jnp.zeros((batch_size, 3)))
            self.count = brainstate.LongTermState(jnp.zeros(()))

        def update(self, x):
            self.count.value += 1
            self.h.value += x
            return self.h.value

    shim = shims.ToNNX(Counting())
    with pytest.raises(interop.UnsupportedStructureError, match="count"):
        shim({"h": XS[0]}, XS[1])


class Learned(brainstate.nn.RNNCell):
    """A cell that starts from a parameter."""

    def __init__(self):
        super().__init__()
        self.start = brainstate.ParamState(array(3, seed=65))

    def init_state(self, batch_size=None, **kwargs):
        batch = () if batch_size is None else (batch_size,)
        self.h = brainstate.HiddenState(jnp.broadcast_to(self.start.value, (*batch, 3)))

    def update(self, x):
        self.h.value = 0.5 * self.h.value + x
        return self.h.value


@pytest.mark.parametrize("host", ["equinox", "linen", "nnx"])
def test_a_first_state_that_is_learned_gets_its_gradient(host):
    guest = Learned()
    guest.init_state(5)  # of no use to the carry
    shim = shims.wrap(guest, into=host)
    if host == "nnx":
        grads = nnx.grad(lambda m: m(XS)[-1].sum())(nnx.RNN(shim, time_major=True))
    elif host == "linen":
        rnn = nn.RNN(shim, time_major=True)
        variables = rnn.init(jax.random.key(0), XS)
        grads = jax.grad(lambda v: rnn.apply(v, XS)[-1].sum())(variables)
        shim.write_back({"params": variables["params"]["cell"]})
    else:

        def loss(shim):
            start = jnp.stack([shim.initialize_carry((3,))["h"]] * 5)
            run = jax.vmap(shim)
            _, ys = jax.lax.scan(lambda carry, x: run(x, carry), {"h": start}, XS)
            return ys[-1].sum()

        grads = eqx.filter_grad(loss)(shim)
        shim.write_back()
    found = [a for a in jax.tree.leaves(grads) if a.shape == (3,)]
    assert_allclose(found, [np.full(3, 5 * 0.5 ** len(XS))])


# -- statistics and randomness in a cell --


class Noisy(brainstate.nn.RNNCell):
    """A cell with batch normalisation and dropout of its input."""

    def __init__(self):
        super().__init__()
        self.norm = brainstate.nn.BatchNorm0d((3,), momentum=0.5)
        self.drop = brainstate.nn.Dropout(0.5)

    def init_state(self, batch_size=None, **kwargs):
        self.h = brainstate.HiddenState(jnp.zeros((batch_size, 3)))

    def update(self, x):
        self.h.value = 0.5 * self.h.value + self.drop(self.norm(x))
        return self.h.value


def test_statistics_move_masks_are_fresh_and_evaluation_is_exact():
    guest = Noisy()
    shim = shims.ToNNX(guest, rngs=nnx.Rngs(0))
    same = jnp.broadcast_to(array(200, 3, seed=61), (4, 200, 3))
    carry, ys = nnx.jit(lambda m, x: m(x))(
        nnx.RNN(shim, time_major=True, return_carry=True), same
    )
    steps = ys - 0.5 * jnp.concatenate([jnp.zeros((1, 200, 3)), ys[:-1]])
    kept = np.abs(steps) > 1e-6
    assert 0.4 < kept.mean() < 0.6
    assert not (kept[0] == kept[1]).all()
    mean = (1 - 0.5**4) * np.mean(same[0], 0)
    assert_allclose(np.ravel(guest.norm.running_mean.value), mean, rtol=1e-4, atol=1e-5)
    shim.eval()
    after = guest.norm.running_mean.value
    first, second = (nnx.RNN(shim, time_major=True)(same) for _ in range(2))
    assert_array_equal(first, second)
    assert guest.norm.running_mean.value is after


# -- Linen as the host --


def test_linen_takes_directions_lengths_and_trains():
    forward, backward = lstm_in("nnx", "linen"), lstm_in("brainstate", "linen")
    assert isinstance(forward, nn.RNNCellBase)
    model = nn.Bidirectional(nn.RNN(forward), nn.RNN(backward))
    lengths, xs = jnp.array([1, 3, 6, 2, 4]), sequences()
    variables = model.init(jax.random.key(0), xs)
    found = jax.jit(model.apply)(variables, xs, seq_lengths=lengths)
    zero = jnp.zeros((1, 4))
    for i, length in enumerate(lengths):
        x = XS[:length, i : i + 1]
        wanted = cells.lstm(WEIGHTS, x, zero, zero)[0][:, 0]
        flipped = cells.lstm(WEIGHTS, x[::-1], zero, zero)[0][::-1, 0]
        close(found[i, :length], jnp.concatenate([wanted, flipped], -1))
    backward.write_back(
        {"params": jax.tree.map(jnp.zeros_like, variables["params"]["backward_rnn"]["cell"])}
    )
    assert not backward.unwrap().W.weight.value["weight"].any()


def test_linen_keeps_the_state_of_a_call_with_inputs_alone_in_a_collection():
    shim = lstm_in("brainstate", "linen")
    shim.unwrap().init_state(5)
    variables = shim.init(jax.random.key(0), XS[0])
    assert set(variables) == {"params", "carry"}
    h = c = jnp.zeros((5, 4))
    outputs = []
    for x in XS:
        y, changed = jax.jit(shim.apply, static_argnames="mutable")(
            variables, x, mutable=("carry",)
        )
        variables = {**variables, **changed}
        outputs.append(y)
    close(jnp.stack(outputs), cells.lstm(WEIGHTS, XS, h, c)[0])
    explicit = shim.init(jax.random.key(0), cells.lstm_carry("brainstate", H, C), XS[0])
    assert set(explicit) == {"params"}


# -- Equinox as the host --


def test_equinox_calls_a_cell_with_its_input_first_and_scans_it():
    shim = lstm_in("brainstate", "equinox")
    assert not shim.is_stateful()
    start = shim.initialize_carry(XS[0, 0].shape)
    assert {name: leaf.shape for name, leaf in start.items()} == {"h": (4,), "c": (4,)}
    _, ys = jax.lax.scan(lambda carry, x: shim(x, carry), start, XS[:, 0])
    close(ys, cells.lstm(WEIGHTS, XS[:, 0], jnp.zeros(4), jnp.zeros(4))[0])
    with pytest.raises(interop.ArgumentError, match=r"initialize_carry.*batched=True"):
        shim(XS[0, 0])


def test_equinox_carries_the_hidden_state_of_any_module_for_each_example():
    class Readout(brainstate.nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = Framework("brainstate").lstm(*WEIGHTS)
            self.norm = brainstate.nn.BatchNorm0d((4,))

        def update(self, x):
            return 2 * self.norm(self.cell(x))

    guest = Readout()
    guest.cell.init_state(7)
    kept = guest.cell.h.value
    make = eqx.nn.make_with_state(shims.ToEquinox)
    shim, state = make(guest, inference=True)
    carry = shim.initialize_carry((3,))
    assert {name: leaf.shape for name, leaf in carry.items()} == {
        "cell.h": (4,),
        "cell.c": (4,),
    }
    wanted = cells.lstm(WEIGHTS, XS[:2, 0], jnp.zeros(4), jnp.zeros(4))[0]
    for x, y in zip(XS[:2, 0], wanted, strict=True):
        (carry, out), state = eqx.filter_jit(shim)(x, carry, state)
        assert_allclose(out, 2 * y, rtol=1e-4)
    shim.write_back(state)
    assert guest.cell.h.value is kept
    assert shim.unwrap(state) is guest


# -- BrainState as the host --


@pytest.mark.parametrize("guest", [name for name in NAMES if name != "brainstate"])
def test_brainstate_has_a_cell_with_init_state_update_and_reset_state(guest, lstm_truth):
    cell = lstm_in(guest, "brainstate")
    assert isinstance(cell, brainstate.nn.RNNCell)
    with pytest.raises(interop.ArgumentError, match="init_state"):
        cell(XS[0])
    brainstate.nn.init_all_states(cell, 5)
    hidden = cell.states(brainstate.HiddenState)
    assert len(hidden) == 2
    assert (
        len(cell.states(brainstate.ParamState)) == {"equinox": 3, "linen": 12, "nnx": 12}[guest]
    )

    @brainstate.transform.jit
    def run(xs):
        return brainstate.transform.for_loop(cell.update, xs)

    zero = jnp.zeros((5, 4))
    wanted, h, c = cells.lstm(WEIGHTS, XS, zero, zero)
    close(run(XS), wanted)
    values = jax.tree.leaves([state.value for state in hidden.values()])
    assert sorted(float(a.sum()) for a in values) == pytest.approx(
        sorted([float(h.sum()), float(c.sum())]), rel=1e-4
    )
    cell.reset_state(5)
    close(run(XS), wanted)
    assert set(cell.states(brainstate.HiddenState)) == set(hidden)
    brainstate.nn.reset_all_states(cell, 2)
    close(run(XS[:, :2]), wanted[:, :2])


@pytest.mark.parametrize("guest", [name for name in NAMES if name != "brainstate"])
def test_brainstate_differentiates_and_maps_a_cell(guest, lstm_truth):
    cell = lstm_in(guest, "brainstate")
    params = cell.states(brainstate.ParamState)

    def loss():
        cell.init_state(5)
        return (brainstate.transform.for_loop(cell, XS) ** 2).sum()

    with brainstate.environ.context(fit=True):
        grads = brainstate.transform.grad(loss, params)()
    zero = jnp.zeros((5, 4))
    wanted = jax.grad(lambda w: (cells.lstm(w, XS, zero, zero)[0] ** 2).sum())(WEIGHTS)
    norms = [sum(float((a**2).sum()) for a in jax.tree.leaves(g)) for g in (grads, wanted)]
    assert_allclose(*norms, rtol=1e-4)
    brainstate.nn.vmap_init_all_states(cell, axis_size=5, state_tag="new")
    over_examples = brainstate.transform.vmap(
        cell, in_states=cell.states("new"), out_states=cell.states("new")
    )
    for x, y in zip(XS[:2], cells.lstm(WEIGHTS, XS, zero, zero)[0], strict=False):
        close(over_examples(x), y)


class Convolutional(nnx.RNNCellBase):
    """A cell whose state has the shape of its input."""

    def __init__(self):
        self.conv = nnx.Conv(2, 2, (3, 3), rngs=nnx.Rngs(0))

    def __call__(self, carry, inputs):
        carry = 0.5 * carry + self.conv(inputs)
        return carry, carry.mean(-1)

    def initialize_carry(self, input_shape, rngs=None, carry_init=None):
        return jnp.zeros(input_shape)

    @property
    def num_feature_axes(self):
        return 3


IMAGES = array(4, 3, 5, 6, 2, seed=62)


def image_truth(cell):
    h, outputs = 0.0, []
    for x in IMAGES:
        h = 0.5 * h + cell.conv(x)
        outputs.append(h.mean(-1))
    return jnp.stack(outputs)


def test_a_cell_of_images_starts_by_its_input_size():
    guest = Convolutional()
    shim = shims.FromNNX(guest)
    with pytest.raises(interop.ArgumentError, match="in_size"):
        shim.init_state(3)
    shim.in_size = (5, 6, 2)
    shim.init_state(3)
    close(brainstate.transform.for_loop(shim, IMAGES), image_truth(guest))
    in_linen = shims.ToLinen(guest)
    assert in_linen.num_feature_axes == 3
    rnn = nn.RNN(in_linen, time_major=True)
    variables = rnn.init(jax.random.key(0), IMAGES)
    close(jax.jit(rnn.apply)(variables, IMAGES), image_truth(guest))


def test_a_brainstate_cell_of_images_drives_over_time():
    class Images(brainstate.nn.RNNCell):
        def __init__(self):
            super().__init__()
            self.in_size = (5, 6, 2)
            self.conv = brainstate.nn.Conv2d((5, 6, 2), 2, 3)

        def init_state(self, batch_size=None, **kwargs):
            batch = () if batch_size is None else (batch_size,)
            self.h = brainstate.HiddenState(jnp.zeros((*batch, 5, 6, 2)))

        def update(self, x):
            self.h.value = 0.5 * self.h.value + self.conv(x)
            return self.h.value.mean(-1)

    guest = Images()
    shim = shims.ToNNX(guest)
    assert shim.num_feature_axes == 3
    close(nnx.RNN(shim, time_major=True)(IMAGES), image_truth(guest))


# -- spiking neurons, with physical units --


class Neuron(brainstate.nn.Dynamics):
    """Leaky integrate-and-fire, with a membrane potential in mV and a current in nA."""

    def __init__(self, size):
        super().__init__(size)
        self.weight = brainstate.ParamState(array(3, size, seed=63) * 4 * u.nA)
        self.drive = 5.0 * u.mV / u.nA

    def init_state(self, batch_size=None, **kwargs):
        batch = () if batch_size is None else (batch_size,)
        self.V = brainstate.HiddenState(jnp.zeros((*batch, 4)) * u.mV)

    def update(self, x):
        voltage = 0.8 * self.V.value + (x @ self.weight.value) * self.drive
        spikes = (voltage > 10.0 * u.mV).astype(jnp.float32)
        self.V.value = voltage - spikes * (10.0 * u.mV)
        return spikes


def neuron_truth(v):
    weight, spikes = array(3, 4, seed=63) * 4, []
    for x in XS:
        v = 0.8 * v + x @ weight * 5
        spikes.append((v > 10).astype(jnp.float32))
        v = v - spikes[-1] * 10
    return jnp.stack(spikes), v


@pytest.mark.parametrize("host", ["equinox", "linen", "nnx"])
def test_a_spiking_neuron_with_units_is_a_cell(host):
    shim = shims.wrap(Neuron(4), into=host)
    (name,) = cells.start(shim)
    v = 3 * array(5, 4, seed=64)
    params, drive = cells.driver(host, shim)
    carry, spikes = jax.jit(drive)(params, XS, {name: v})
    wanted, after = neuron_truth(v)
    assert 0.05 < float(wanted.mean()) < 0.95
    assert_array_equal(spikes, wanted)
    assert_allclose(carry[name], after, rtol=1e-4, atol=1e-3)


def test_init_state_leaves_no_tracer_in_a_module_that_is_closed_over():
    cell = brainstate.nn.LSTMCell(3, 4)
    cell.init_state(2)
    shim = shims.ToNNX(cell)
    before = cell.h
    for jit in (jax.jit, brainstate.transform.jit):
        with pytest.raises(interop.ArgumentError, match="closes over.*Call it before"):
            jit(lambda x: (shim.init_state(5), x))(XS[0])
    assert cell.h is before
    assert shim(XS[0, :2]).shape == (2, 4)

    @nnx.jit
    def run(shim, x):
        shim.init_state(5)
        return shim(x)

    assert run(shim, XS[0]).shape == (5, 4)


# -- what is no cell --


@pytest.mark.parametrize("host", ["linen", "nnx"])
def test_a_layer_is_no_cell(host):
    shim = shims.wrap(brainstate.nn.Linear(3, 4), into=host)
    assert not isinstance(shim, nn.RNNCellBase | nnx.RNNCellBase)
    wrapped = shims.FromEquinox(eqx.nn.Linear(3, 4, key=jax.random.key(0)))
    assert not isinstance(wrapped, brainstate.nn.RNNCell)
    with pytest.raises(interop.UnsupportedStructureError, match="no recurrent cell"):
        shims.ToEquinox(nnx.Linear(3, 4, rngs=nnx.Rngs(0))).initialize_carry((3,))


def test_carry_is_for_equinox_modules():
    with pytest.raises(interop.ArgumentError, match="do not take carry"):
        shims.wrap(brainstate.nn.LSTMCell(3, 4), into="nnx", carry=H)


def test_an_equinox_module_must_return_its_carry():
    class Forgetful(eqx.Module):
        def __call__(self, x, carry):
            return carry

    carry = (jnp.zeros(4), jnp.zeros(4))
    shim = shims.ToNNX(Forgetful(), carry=carry)
    with pytest.raises(interop.ArgumentError, match=r"Return \(carry, output\)"):
        shim(carry, XS[0, 0])

    class Peephole(eqx.nn.LSTMCell):
        def __call__(self, input, hidden, *, key=None):
            return super().__call__(input, hidden), input

    cell = shims.FromEquinox(Peephole(3, 4, key=jax.random.key(0)))
    cell.init_state(5)
    with pytest.raises(interop.ArgumentError, match="Pass carry="):
        cell(XS[0])


def test_compiled_steps_leak_nothing_and_are_traced_once():
    in_nnx, in_brainstate = lstm_in("brainstate", "nnx"), lstm_in("nnx", "brainstate")
    in_brainstate.init_state(5)
    traced = []

    @nnx.jit
    def run(rnn, xs):
        traced.append(1)
        return rnn(xs)

    rnn = nnx.RNN(in_nnx, time_major=True)
    with jax.checking_leaks():
        outputs = [run(rnn, XS)]
        compiled = brainstate.transform.jit(
            lambda xs: brainstate.transform.for_loop(in_brainstate, xs)
        )
        outputs.append(compiled(XS))
    first = len(traced)
    nnx.update(rnn, jax.tree.map(lambda a: 1.0 * a, nnx.state(rnn, nnx.Param)))
    outputs.append(run(rnn, XS))
    assert len(traced) == first
    for found in outputs:
        close(found, cells.lstm(WEIGHTS, XS, jnp.zeros((5, 4)), jnp.zeros((5, 4)))[0])
    guests = in_nnx.unwrap().states(), in_brainstate.states()
    values = jax.tree.leaves([[s.value for s in g.values()] for g in guests])
    assert not any(isinstance(value, jax.core.Tracer) for value in values)


def test_batch_axes_of_carry_and_input_must_agree():
    shim = lstm_in("equinox", "nnx")
    with pytest.raises(interop.ArgumentError, match="batch axes"):
        shim((H, C), XS)
    with pytest.raises(interop.ArgumentError, match="structure"):
        shim(H, XS[0])
    with pytest.raises(interop.ArgumentError, match="carry and one input"):
        shim(XS[0])


class Decaying(brainstate.nn.RNNCell):
    """Makes what is no state, too, when its hidden state is made."""

    def __init__(self):
        super().__init__()
        self.in_size = self.out_size = (3,)

    def init_state(self, batch_size=None, **kwargs):
        self.h = brainstate.HiddenState(jnp.zeros((batch_size, 3)))
        self.decay = jnp.exp(-brainstate.environ.get_dt()) * jnp.ones(3)

    def update(self, x):
        self.h.value = self.decay * self.h.value + x
        return self.h.value


def test_what_init_state_makes_beside_hidden_state_is_made_anew_at_each_step():
    shim, x = shims.ToNNX(Decaying()), jnp.ones((2, 3))
    carry, jitted = {"h": jnp.full((2, 3), 2.0)}, jax.jit(lambda m, c: m(c, x))
    with jax.checking_leaks():
        for dt in (1.0, 0.5):
            for call in (nnx.jit(lambda m, c: m(c, x)), jitted, lambda m, c: m(c, x)):
                with brainstate.environ.context(dt=dt):
                    _, out = call(shim, carry)
                close(out, 2 * np.exp(-dt) * np.ones((2, 3)) + 1)


def test_a_step_sees_a_carry_that_does_not_fit_however_often_it_has_run():
    shim = shims.ToNNX(brainstate.nn.LSTMCell(3, 4))
    carry = shim.initialize_carry((2, 3))
    for _ in range(2):
        shim(carry, jnp.ones((2, 3)))
        for wrong in ({"h": carry["h"]}, {**carry, "c": jnp.ones((2, 5))}, tuple(carry)):
            with pytest.raises(interop.ConversionError):
                shim(wrong, jnp.ones((2, 3)))
