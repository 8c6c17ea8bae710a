"""A guest is taken apart again when anything that counts has changed, and else not."""

import functools
import gc
import weakref

import brainstate
import brainunit as u
import jax.numpy as jnp
import numpy as np
import pytest
from brainstate import nn as bnn
from flax import nnx

from shims.core import guest_of


class Options:
    """Options that compare by what they hold."""

    def __init__(self, scale):
        self.scale = scale

    def __eq__(self, other):
        return isinstance(other, Options) and self.scale == other.scale

    def __hash__(self):
        return hash(self.scale)


class Guest(bnn.Module):
    def __init__(self):
        super().__init__()
        self.scale = 1.0
        self.layers = [bnn.Linear(3, 3, b_init=None), {"act": jnp.tanh}]
        self.pair = ([bnn.Dropout(0.3)],)
        self.mask = np.ones(3)
        self.options = Options(1.0)
        self.unit = 2.0 * u.mV
        self.state = brainstate.ParamState(jnp.ones(3))


def _first(guest):
    return guest.layers[0]


CHANGES = {
    "an attribute": lambda g: setattr(g, "scale", 2.0),
    "an attribute's type": lambda g: setattr(g, "scale", 1),
    "a new attribute": lambda g: setattr(g, "other", 1),
    "an attribute that goes": lambda g: delattr(g, "scale"),
    "an inner layer's attribute": lambda g: setattr(g.pair[0][0], "prob", 0.5),
    "an item of a list": lambda g: g.layers.append(jnp.sin),
    "an item of a dict": lambda g: g.layers[1].update(act=jnp.sin),
    "a layer": lambda g: g.layers.__setitem__(0, bnn.Linear(3, 4)),
    "elements of an array": lambda g: g.mask.__setitem__(0, 0.0),
    "what options hold": lambda g: setattr(g.options, "scale", 2.0),
    "a quantity": lambda g: setattr(g, "unit", 2.0 * u.volt),
    "a state's type": lambda g: setattr(g, "state", brainstate.LongTermState(jnp.ones(3))),
    "a value's unit": lambda g: setattr(g.state, "value", jnp.ones(3) * u.mV),
    "a value's kind": lambda g: setattr(g.state, "value", jnp.ones(3, int)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_whatever_changes_in_a_brainstate_guest_is_seen(change):
    module = Guest()
    guest = guest_of(module)
    before = guest.structure()
    change(module)
    after = guest.structure()
    assert after is not before
    assert (after, after.kinds) != (before, before.kinds)
    assert after == guest_of(module).structure()


def test_values_and_equal_attributes_leave_the_structure_as_it_is():
    module = Guest()
    guest = guest_of(module)
    before = guest.looks()
    module.state.value = jnp.zeros(3)
    _first(module).weight.value = {"weight": jnp.zeros((3, 3))}
    module.scale = module.scale
    assert guest.looks() is before
    module.options = Options(1.0)
    assert guest.structure() == before.structure


def test_a_state_that_is_replaced_is_looked_at():
    module = Guest()
    guest = guest_of(module)
    before = guest.looks()
    module.state = brainstate.ParamState(jnp.zeros(3))
    assert guest.structure() == before.structure
    assert any(cell.identity[0] is module.state for cell in guest.cells())


class Stack(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=nnx.Rngs(0))])
        self.drop = nnx.Dropout(0.3, rngs=nnx.Rngs(0))
        self.weight = nnx.Param(jnp.ones(3))
        self.scale = 1.0


NNX_CHANGES = {
    "an attribute": lambda m: setattr(m, "scale", 2.0),
    "an inner layer's attribute": lambda m: setattr(m.drop, "rate", 0.5),
    "a mode": lambda m: m.eval(),
    "a layer": lambda m: m.layers.append(nnx.Linear(3, 3, rngs=nnx.Rngs(0))),
    "a Variable's type": lambda m: setattr(m, "weight", nnx.BatchStat(jnp.ones(3))),
    "metadata": lambda m: m.weight.set_metadata(note="frozen"),
    "a value's kind": lambda m: m.weight.set_value(jnp.ones(3, int)),
    "a value's structure": lambda m: m.weight.set_value({"a": jnp.ones(3)}),
}


@pytest.mark.parametrize("change", NNX_CHANGES.values(), ids=NNX_CHANGES.keys())
def test_whatever_changes_in_an_nnx_guest_is_seen(change):
    module = Stack()
    guest = guest_of(module)
    before = guest.looks()
    change(module)
    after = guest.looks()
    assert after is not before
    known = guest_of(module).structure()
    assert (after.structure, after.structure.kinds) == (known, known.kinds)
    kinds = before.structure.kinds
    assert after.structure != before.structure or after.structure.kinds != kinds


def test_values_leave_an_nnx_structure_as_it_is():
    module = Stack()
    guest = guest_of(module)
    before = guest.looks()
    module.weight.set_value(jnp.zeros(3))
    module.drop(jnp.ones(3))  # its stream advances
    assert guest.looks() is before


@pytest.mark.parametrize("make", [Guest, Stack])
def test_what_was_seen_keeps_no_module_alive(make):
    module = make()
    guest = guest_of(module)
    structure, gone = guest.structure(), weakref.ref(module)
    del module, guest
    gc.collect()
    assert gone() is None
    assert structure.guest_type is make


class Foreign:
    """A node that BrainState's graph library knows, and whose attributes only it can tell."""

    def __init__(self):
        self.scale = 1.0


brainstate.graph.register_graph_node_type(
    type=Foreign,
    flatten=lambda node: ([("scale", node.scale)], None),
    set_key=setattr,
    pop_key=lambda node, key: vars(node).pop(key),
    create_empty=lambda _: object.__new__(Foreign),
    clear=lambda node: vars(node).clear(),
)


def test_a_node_of_an_unknown_kind_is_taken_apart_each_time():
    module = Guest()
    module.other = Foreign()
    guest = guest_of(module)
    before = guest.structure()
    module.other.scale = 2.0
    assert guest.structure() != before


def test_a_partial_is_looked_into_by_identity():
    module = Guest()
    module.layers[1] = functools.partial(jnp.clip, min=0)
    guest = guest_of(module)
    assert guest.looks() is guest.looks()
