"""Users teach the converter layers of their own, in either of two ways, and take it back."""

import dataclasses
from typing import Any

import brainstate
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import interop
from interop.composites.equinox import Tied
from interop.registry import registry

from .cases import BIAS, WEIGHT, WEIGHT_2, X, array
from .conftest import Framework

GAIN = array(4, seed=20)


class Gain(brainstate.nn.Module):
    """``x * gain``, a layer that no framework has."""

    def __init__(self, gain):
        super().__init__()
        self.in_size = self.out_size = gain.shape
        self.gain = brainstate.ParamState(gain)

    def update(self, x):
        return x * self.gain.value


class NnxGain(nnx.Module):
    def __init__(self, gain):
        self.gain = nnx.Param(gain)

    def __call__(self, x):
        return x * self.gain[...]


class LinenGain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x * self.param("gain", nn.initializers.ones, x.shape[-1:])


class EqxGain(eqx.Module):
    gain: Any

    def __call__(self, x, *, key=None):
        return x * self.gain


MAPPINGS = {
    "nnx": interop.LayerMapping(
        Gain,
        "nnx",
        NnxGain,
        to_bst=lambda layer, ctx: Gain(layer.gain.get_value()),
        to_foreign=lambda layer, ctx: NnxGain(layer.gain.value),
    ),
    "linen": interop.LayerMapping(
        Gain,
        "linen",
        LinenGain,
        to_bst=lambda layer, ctx: Gain(layer.variables["params"]["gain"]),
        to_foreign=lambda layer, ctx: (LinenGain(), {"params": {"gain": layer.gain.value}}),
    ),
    "equinox": interop.LayerMapping(
        Gain,
        "equinox",
        EqxGain,
        to_bst=lambda layer, ctx: Gain(layer.gain),
        to_foreign=lambda layer, ctx: EqxGain(layer.gain.value),
    ),
}
GAINS = {
    "brainstate": lambda: Gain(GAIN),
    "nnx": lambda: NnxGain(GAIN),
    "linen": lambda: (LinenGain(), {"params": {"gain": GAIN}}),
    "equinox": lambda: EqxGain(GAIN),
}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class GainSpec(interop.specs.Spec):
    """``y = x * gain + shift``."""

    gain: Any
    shift: float = 0.0


def by_pairs():
    for mapping in MAPPINGS.values():
        interop.register_layer_mapping(mapping)


def by_rules():
    @interop.register_reader(Gain, GainSpec)
    def read_gain(layer, ctx):
        return GainSpec(gain=layer.gain.value)

    @interop.register_reader(NnxGain, GainSpec)
    def read_nnx_gain(layer, ctx):
        return GainSpec(gain=layer.gain.get_value())

    @interop.register_reader(LinenGain, GainSpec)
    def read_linen_gain(node, ctx):
        return GainSpec(gain=node.array("gain"))

    @interop.register_reader(EqxGain, GainSpec)
    def read_eqx_gain(node, ctx):
        return GainSpec(gain=node.module.gain)

    builders = {
        "brainstate": lambda spec, ctx: Gain(spec.gain),
        "nnx": lambda spec, ctx: NnxGain(spec.gain),
        "linen": lambda spec, ctx: ctx.adapter.from_callback(
            (LinenGain(), {"params": {"gain": spec.gain}})
        ),
        "equinox": lambda spec, ctx: EqxGain(spec.gain),
    }
    for name, build in builders.items():
        interop.register_builder(name, GainSpec)(build)


@pytest.mark.parametrize("register", [by_pairs, by_rules])
def test_a_registered_layer_converts_in_nested_stacks_between_all(source, target, register):
    if source.name not in GAINS or target.name not in GAINS:
        pytest.skip("the table registers the four frameworks")
    with interop.registered():
        register()
        inner = source.sequential(GAINS[source.name](), source.activation(jnp.tanh))
        model = source.sequential(source.linear(WEIGHT, BIAS), inner, source.linear(WEIGHT_2))
        converted = target.convert_from(source, model, sample_input=(3,))
        expected = np.tanh((np.float64(X) @ WEIGHT + BIAS) * GAIN) @ np.float64(WEIGHT_2)
        np.testing.assert_allclose(target.call(converted, X), expected, rtol=1e-5, atol=1e-5)
        alone = target.convert_from(source, GAINS[source.name]())
        wanted = target.receive(GAINS[target.name])
        assert jax.tree.structure(target.options(alone)) == jax.tree.structure(
            target.options(wanted)
        )
        y = target.call(alone, array(5, 4))
        np.testing.assert_array_equal(y, array(5, 4) * GAIN)


def test_a_pair_shares_what_its_callbacks_share():
    with interop.registered(MAPPINGS["nnx"]):
        layer = Gain(GAIN)
        assert interop.to_nnx(layer).gain.get_value() is layer.gain.value


def test_registrations_end_with_their_context():
    before = {
        adapter.name: (dict(adapter.readers), dict(adapter.builders), dict(adapter.from_hub))
        for adapter in map(registry.adapter, registry.names())
    }

    def fail():
        with interop.registered(MAPPINGS["nnx"]):
            by_rules()
            by_pairs()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    for name, (readers, builders, from_hub) in before.items():
        adapter = registry.adapter(name)
        assert adapter.readers == readers
        assert adapter.builders == builders
        assert adapter.from_hub == from_hub
    with pytest.raises(interop.UnmappedLayerError):
        interop.to_nnx(Gain(GAIN))


def test_contexts_nest():
    with interop.registered(MAPPINGS["nnx"]):
        with interop.registered(MAPPINGS["linen"]):
            interop.to_linen(Gain(GAIN))
        interop.to_nnx(Gain(GAIN))
        with pytest.raises(interop.UnmappedLayerError):
            interop.to_linen(Gain(GAIN))


def test_a_pair_may_replace_a_built_in_rule_in_one_framework_alone():
    class Traced(nnx.Linear):
        pass

    def to_foreign(layer, ctx):
        made = Traced(*WEIGHT.shape, rngs=nnx.Rngs(0))
        made.kernel.set_value(layer.weight.value["weight"])
        made.bias.set_value(layer.weight.value["bias"])
        return made

    mapping = interop.LayerMapping(
        brainstate.nn.Linear, "nnx", Traced, lambda layer, ctx: None, to_foreign
    )
    model = brainstate.nn.Sequential(Framework("brainstate").linear(WEIGHT, BIAS))
    with interop.registered(mapping):
        converted = interop.to_nnx(model)
        assert type(converted.layers[0]) is Traced
        assert type(interop.to_equinox(model).layers[0]) is eqx.nn.Linear
        assert "Linear" in interop.supported_layers("nnx")["nnx"]
        np.testing.assert_allclose(converted(X), X @ WEIGHT + BIAS, rtol=1e-5, atol=1e-5)
    assert type(interop.to_nnx(model).layers[0]) is nnx.Linear


def test_a_builder_may_replace_a_built_in_one():
    with interop.registered():

        @interop.register_builder("nnx", interop.specs.Activation)
        def build_activation(spec, ctx):
            return jnp.cos

        stack = brainstate.nn.Sequential(brainstate.nn.ReLU())
        assert interop.to_nnx(stack).layers[0] is jnp.cos
    assert interop.to_nnx(stack).layers[0] is jax.nn.relu


def test_supported_layers_lists_a_registered_layer_where_it_converts():
    with interop.registered(MAPPINGS["equinox"]):
        table = interop.supported_layers()
    assert "Gain" in table["equinox"]
    assert "Gain" not in table["nnx"]
    assert "Gain" not in interop.supported_layers("equinox")["equinox"]


def test_callbacks_learn_where_they_are_and_what_shapes_flow():
    seen = {}

    def to_bst(layer, ctx):
        seen.update(path=ctx.path, shape=ctx.require_size("Gain"), sample=ctx.sample_input)
        return Gain(layer.gain.get_value())

    def to_foreign(layer, ctx):
        seen.update(path=ctx.path, rngs=ctx.rngs, size=ctx.cur_size)
        return NnxGain(layer.gain.value)

    mapping = interop.LayerMapping(Gain, "nnx", NnxGain, to_bst, to_foreign)
    native = Framework("nnx")
    model = native.sequential(jnp.tanh, native.linear(WEIGHT), NnxGain(GAIN))
    rngs = nnx.Rngs(0)
    with interop.registered(mapping):
        back = interop.from_nnx(model, sample_input=(3,))
        assert seen == {"path": "model[2]", "shape": (4,), "sample": (3,)}
        seen.clear()
        interop.to_nnx(back, rngs=rngs)
        assert seen == {"path": "model[2]", "rngs": rngs, "size": (4,)}
        with pytest.raises(interop.MissingShapeError, match=r"^model: .*NnxGain"):
            interop.from_nnx(NnxGain(GAIN))


def failing(layer, ctx):
    raise KeyError("gain")


def refusing(layer, ctx):
    ctx.refuse("gain", "GAIN", "it is too large")


BAD_CALLBACKS = {
    "it fails": (failing, interop.ConversionError, ["failed (KeyError: 'gain')", "Gain"]),
    "it returns nothing": (
        lambda layer, ctx: None,
        interop.ConversionError,
        ["to_foreign of the LayerMapping for Gain returned NoneType, not a nnx module"],
    ),
    "it refuses": (refusing, interop.UnsupportedLayerError, ["gain='GAIN': it is too large"]),
}


@pytest.mark.parametrize("name", BAD_CALLBACKS)
def test_a_bad_callback_is_named_with_its_layer(name):
    to_foreign, cls, words = BAD_CALLBACKS[name]
    mapping = interop.LayerMapping(Gain, "nnx", NnxGain, lambda layer, ctx: layer, to_foreign)
    model = brainstate.nn.Sequential(brainstate.nn.ReLU(), Gain(GAIN))
    with interop.registered(mapping), pytest.raises(cls) as e:
        interop.to_nnx(model)
    assert e.value.path == "model[1]"
    assert [word for word in words if word not in str(e.value)] == []


def test_a_layer_with_a_pair_for_another_framework_alone_is_refused_by_name():
    with interop.registered(MAPPINGS["nnx"]):
        with pytest.raises(interop.UnmappedLayerError, match="another framework") as e:
            interop.to_equinox(brainstate.nn.Sequential(Gain(GAIN)))
        assert e.value.path == "model[0]"
        with pytest.raises(interop.UnmappedLayerError) as e:
            interop.convert(nnx.Sequential(NnxGain(GAIN)), to="equinox")
        assert e.value.path == "model[0]"


def test_the_rest_of_a_linen_model_with_a_registered_layer_is_still_checked():
    module = nn.Sequential([LinenGain(), nn.Dense(2)])
    gain, dense = {"gain": GAIN}, {"kernel": WEIGHT_2, "bias": BIAS[:2]}
    with interop.registered(MAPPINGS["linen"]):
        interop.from_linen(module, {"params": {"layers_0": gain, "layers_1": dense}})
        extra = {"layers_0": gain, "layers_1": {"kernel": WEIGHT_2}, "layers_2": dense}
        with pytest.raises(interop.ConversionError) as e:
            interop.from_linen(module, {"params": extra})
    assert e.value.missing == ("params/layers_1/bias",)
    assert e.value.unexpected == ("params/layers_2/bias", "params/layers_2/kernel")


def test_a_subclass_of_a_registered_layer_is_refused():
    class Louder(Gain):
        pass

    with (
        interop.registered(MAPPINGS["nnx"]),
        pytest.raises(interop.UnsupportedLayerError, match="for that class alone"),
    ):
        interop.to_nnx(Louder(GAIN))


def test_equinox_ties_a_registered_layer_used_twice():
    layer = Gain(GAIN)
    with interop.registered(MAPPINGS["equinox"]):
        model = interop.to_equinox(brainstate.nn.Sequential(layer, layer))
    assert isinstance(model, Tied)
    assert len(jax.tree.leaves(eqx.filter(model, eqx.is_array))) == 1


def test_a_field_that_a_registered_builder_does_not_carry_is_refused():
    with interop.registered():
        by_rules()

        @interop.register_reader(Gain, GainSpec)
        def read_gain(layer, ctx):
            return GainSpec(gain=layer.gain.value, shift=1.0)

        with pytest.raises(interop.UnsupportedLayerError, match=r"shift=1.0: nnx has no"):
            interop.to_nnx(Gain(GAIN))


def same(layer, ctx):
    return layer


BAD_REGISTRATIONS = {
    "no framework's class": (
        lambda: interop.register_layer_mapping(
            interop.LayerMapping(int, "nnx", NnxGain, same, same)
        ),
        "bst_type must be a module class",
    ),
    "an instance": (
        lambda: interop.register_layer_mapping(
            interop.LayerMapping(Gain(GAIN), "nnx", NnxGain, same, same)
        ),
        "bst_type must be a module class",
    ),
    "an unknown framework": (
        lambda: interop.register_layer_mapping(
            interop.LayerMapping(Gain, "torch", NnxGain, same, same)
        ),
        "unknown framework 'torch'",
    ),
    "a class of another framework": (
        lambda: interop.register_layer_mapping(
            interop.LayerMapping(Gain, "linen", NnxGain, same, same)
        ),
        "foreign_type=NnxGain is no linen module class",
    ),
    "both of one framework": (
        lambda: interop.register_layer_mapping(
            interop.LayerMapping(NnxGain, "nnx", NnxGain, same, same)
        ),
        "ties a class of the hub to another framework",
    ),
    "no callback": (
        lambda: interop.register_layer_mapping(
            interop.LayerMapping(Gain, "nnx", NnxGain, same, None)
        ),
        "to_foreign must be callable, got None",
    ),
    "a reader of no framework": (
        lambda: interop.register_reader(int, interop.specs.Linear),
        "layer_type must be a module class",
    ),
    "a reader of no spec": (
        lambda: interop.register_reader(Gain, Gain),
        "spec_type must be a class derived from interop.specs.Spec",
    ),
    "a builder of no spec": (
        lambda: interop.register_builder("nnx", "Linear"),
        "spec_type must be a class derived from interop.specs.Spec",
    ),
    "a builder for nobody": (
        lambda: interop.register_builder("torch", interop.specs.Linear),
        "unknown framework 'torch'",
    ),
}


@pytest.mark.parametrize("name", BAD_REGISTRATIONS)
def test_a_bad_registration_is_refused_and_leaves_nothing_behind(name):
    call, words = BAD_REGISTRATIONS[name]
    with pytest.raises(interop.ArgumentError, match=words):
        call()
    with pytest.raises(interop.UnmappedLayerError):
        interop.to_nnx(Gain(GAIN))
