"""Every layer to every framework: nothing is drawn, nothing of the source changes, and arrays
whose layout agrees are the same objects."""

import contextlib
import itertools
import types

import brainstate
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import interop

from .cases import BIAS, EPSILON, MEAN, MOMENTUM, RATE, SCALE, SHIFT, VAR, WEIGHT
from .conftest import NAMES, Framework

ROWS = [
    pytest.param(name, goal, cls, id=f"{name}-{goal}-{cls.__name__}")
    for name, goal in itertools.permutations(NAMES, 2)
    for cls, constructor in Framework(name).CONSTRUCTORS.items()
    if not isinstance(constructor, str) and goal not in constructor.refused
]
DRAWING = {
    name: fn
    for name, fn in vars(jax.random).items()
    if isinstance(fn, types.FunctionType) or hasattr(fn, "lower")
}
del DRAWING["key"]  # a constant stream of its own, as nnx.RNN makes one, draws nothing


class DrewError(Exception):
    """A function of jax.random was called."""


@contextlib.contextmanager
def no_randomness():
    """A call of any function of jax.random is an error, and so is any change of a state."""

    def refuse(*args, **options):
        raise DrewError

    before = brainstate.random.DEFAULT.value, np.random.get_state()[1].copy()
    with pytest.MonkeyPatch.context() as patch:
        for name in DRAWING:
            patch.setattr(jax.random, name, refuse)
        yield
    assert brainstate.random.DEFAULT.value is before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


NATIVE = {
    "brainstate": lambda: brainstate.nn.Linear(3, 4),
    "equinox": lambda: eqx.nn.Linear(3, 4, key=KEY),
    "linen": lambda: nn.Dense(4).init(KEY, jnp.ones((2, 3))),
    "nnx": lambda: nnx.Linear(3, 4, rngs=RNGS),
}
KEY, RNGS = jax.random.key(0), nnx.Rngs(0)


@pytest.mark.parametrize("name", NAMES)
def test_a_random_initialiser_would_be_noticed(name):
    state = brainstate.random.DEFAULT.value
    with pytest.raises(DrewError), no_randomness():
        NATIVE[name]()
    brainstate.random.DEFAULT.value = state


def owned(model):
    """What a model is made of, array by array, and the attributes of its outermost module."""
    module, variables = model if isinstance(model, tuple) else (model, None)
    if isinstance(module, brainstate.nn.Module):
        held = [(path, state.value) for path, state in module.states().items()]
    elif isinstance(module, nnx.Module):
        held = nnx.to_flat_state(nnx.state(module))
        held = [(path, v.get_value() if isinstance(v, nnx.Variable) else v) for path, v in held]
    else:
        held = (module, variables)
    attributes = {key: value for key, value in vars(module).items() if key != "scope"}
    return jax.tree.leaves(held), jax.tree.structure(held), attributes


def assert_same(found, wanted):
    leaves, structure, attributes = found
    assert structure == wanted[1]
    assert all(a is b for a, b in zip(leaves, wanted[0], strict=True))
    assert attributes.keys() == wanted[2].keys()
    assert [key for key in attributes if attributes[key] is not wanted[2][key]] == []


def build(name, cls):
    fw = Framework(name)
    constructor = fw.CONSTRUCTORS[cls]
    model = fw.construct(cls, constructor.x, **constructor.base)
    x = constructor.x
    return fw, model, (x if isinstance(x, tuple) else x.shape)[1:]


@pytest.mark.parametrize(("name", "goal", "cls"), ROWS)
def test_a_conversion_draws_nothing_changes_nothing_and_shares_what_it_can(name, goal, cls):
    source, model, shape = build(name, cls)
    before = owned(model)
    with no_randomness():
        converted = Framework(goal).convert_from(source, model, sample_input=shape)
    assert_same(owned(model), before)
    given = [leaf for leaf in before[0] if isinstance(leaf, jax.Array) and leaf.ndim]
    copied = [
        made.shape
        for made, leaf in itertools.product(owned(converted)[0], given)
        if isinstance(made, jax.Array)
        and (made.shape, made.dtype) == (leaf.shape, leaf.dtype)
        and np.unique(leaf).size > 1  # equal by more than chance
        and (made == leaf).all()
        and not any(made is own for own in given)  # some may be equal to one another
    ]
    assert copied == []


def test_a_refusal_draws_nothing_and_changes_nothing(source, target):
    for feature in ("batch_norm", "dropout", "custom"):
        source.needs(feature)
    norm = source.batch_norm(SCALE, SHIFT, MEAN, VAR, EPSILON, MOMENTUM)
    layers = norm, source.linear(WEIGHT, BIAS), source.dropout(RATE)
    stack = source.sequential(*layers, source.custom(WEIGHT.T, BIAS[:3]))
    before = owned(stack)
    with no_randomness(), pytest.raises(interop.UnsupportedStructureError):
        target.convert_from(source, stack, sample_input=(3,))
    assert_same(owned(stack), before)
