"""Every option of every supported layer is carried over, or refused by name."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import interop
from interop import specs
from interop.registry import registry

from .cases import array
from .conftest import NAMES, Framework
from .layer_table import public_layers
from .models import ALL, Option

ROWS = [
    pytest.param(name, goal, cls, option, id=f"{name}-{goal}-{cls.__name__}-{option}")
    for name, goal in itertools.permutations(NAMES, 2)
    for cls, constructor in Framework(name).CONSTRUCTORS.items()
    if not isinstance(constructor, str)
    for option, mark in constructor.options.items()
    if isinstance(mark, Option)
]


@pytest.mark.parametrize("framework", NAMES)
def test_every_option_is_in_the_table(framework):
    """A new release may bring a new option: carry it or refuse it, and say so in the table."""
    table = Framework(framework).CONSTRUCTORS
    adapter = registry.adapter(framework)
    assert table.keys() == adapter.readers.keys() - set(adapter.composites.values())
    for cls, constructor in table.items():
        if isinstance(constructor, str):
            continue
        parameters = set(inspect.signature(cls.__init__).parameters) - {"self"}
        missing = parameters - constructor.options.keys() - set(constructor.base)
        assert not missing, f"{cls.__name__} has options without a row: {missing}"


CALLS = {  # arguments of calls of layers
    "the data, and the state of cells": """
        x args inputs input spk pre_val indices query key_ value inputs_q inputs_k inputs_v
        inputs_kv carry hidden initial_carry state kwargs options""",
    "the mode, for which each target has a switch of its own": """
        use_running_average deterministic inference update_stats""",
    "random keys, which each target takes in its own way": "key rng rngs dropout_rng init_key",
    "of the target's layer under the same name, or none of it, so that Python refuses it": """
        mask is_causal process_heads decode sow_weights input_positions output_size einsum_str
        seq_lengths return_carry time_major reverse keep_order out_sharding qkv_sharding""",
}


def _call(framework, cls):
    method = cls.update if hasattr(cls, "update") and framework != "toy" else cls.__call__
    return set(inspect.signature(method).parameters) - {"self"}


@pytest.mark.parametrize("framework", NAMES)
def test_every_argument_of_a_call_is_in_the_table(framework):
    """A new release may bring a new one: carry it, or see that it fails where it is unknown."""
    known = set(" ".join(CALLS.values()).split())
    for cls in Framework(framework).CONSTRUCTORS:
        unknown = _call(framework, cls) - known
        assert not unknown, f"a call of {cls.__name__} has {unknown}, which have no row"


# They pass arguments on to what they hold, or refuse by name those that they do not know.
_OPEN = specs.Cell | specs.RNN | specs.Bidirectional | specs.NormalizedWeight


@pytest.mark.parametrize("framework", NAMES)
def test_a_composite_takes_no_argument_that_it_does_not_use(framework):
    for spec_type in registry.adapter(framework).composites:
        parameters = inspect.signature(spec_type.apply).parameters.values()
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
        assert not open_ended or issubclass(spec_type, _OPEN), spec_type.__name__


@pytest.mark.parametrize("framework", [name for name in NAMES if name != "toy"])
def test_every_public_layer_converts_or_is_refused_with_a_reason(framework):
    """A new release may bring a new layer: read it, or say why not."""
    adapter = registry.adapter(framework)
    known = adapter.readers.keys() | adapter.refused.keys()
    layers = public_layers(framework)
    assert len(layers) > 25
    assert [name for name, cls in layers.items() if cls not in known] == []


def build(name, cls, option):
    """The layer with the option off its default, its mark, and the shape of an input."""
    source = Framework(name)
    constructor = source.CONSTRUCTORS[cls]
    mark = constructor.options[option]
    value = mark.value if isinstance(mark.value, dict) else {option: mark.value}
    x = constructor.x if mark.x is None else mark.x
    return source, mark, x, source.construct(cls, x, **(constructor.base | value))


@pytest.mark.parametrize(("name", "goal", "cls", "option"), ROWS)
def test_an_option_is_carried_over_or_refused_by_name(name, goal, cls, option):
    target = Framework(goal)
    target.needs("options")
    source, mark, x, model = build(name, cls, option)
    is_images = source.CONSTRUCTORS[cls].images and not mark.everywhere
    always = None if mark.refused == ALL else source.CONSTRUCTORS[cls].refused.get(goal)
    if mark.refused == ALL or goal in mark.refused or always:
        with pytest.raises(interop.UnsupportedLayerError) as e:
            target.convert_from(source, model, sample_input=given(x).shape[1:])
        assert e.value.option == (always or mark.named or option)
        assert (mark.found or cls.__name__) in str(e.value)
        assert e.value.option in str(e.value)
        return
    converted = target.convert_from(source, model, sample_input=given(x).shape[1:])
    if mark.attribute:
        assert attribute(converted, option) == attribute(model, option)
    elif "Dropout" in cls.__name__:
        np.testing.assert_allclose(
            dropped(target, converted, x), dropped(source, model, x), atol=0.08
        )
    else:
        runs = in_modes if mark.training else in_evaluation
        runs = in_steps if "Cell" in cls.__name__ else runs
        runs = along_a_named_axis if option == "axis_name" else runs
        fws = [Layout(target, source), source] if is_images else [target, source]
        for found, wanted in zip(
            runs(fws[0], converted, x), runs(fws[1], model, x), strict=True
        ):
            assert found.dtype == wanted.dtype
            np.testing.assert_allclose(
                np.float64(found), np.float64(wanted), rtol=1e-5, atol=1e-5
            )


class Layout:
    """A framework whose models are called as those of another: with images in its layout."""

    def __init__(self, framework, other):
        self._framework, self._other = framework, other

    def run(self, model, x, **options):
        x = self._framework.from_channels_last(self._other.to_channels_last(x))
        y, model = self._framework.run(model, x, **options)
        return self._other.from_channels_last(self._framework.to_channels_last(y)), model

    def call(self, model, x, **options):
        return self.run(model, x, **options)[0]


def given(x):
    return array(*x) if isinstance(x, tuple) else x


def attribute(model, option):
    model = model[0] if isinstance(model, tuple) else model
    if hasattr(model, "skeleton"):  # a composite, whose options are those of its spec
        return dict(model.skeleton.fields)[option]
    return getattr(model, option)


def in_evaluation(fw, model, x):
    yield fw.call(model, given(x))


def in_steps(fw, model, x):
    """The state that a cell starts with, and some steps from another one."""
    state = fw.start(model, x)
    yield from state
    state = [array(*part.shape, seed=i) for i, part in enumerate(state)]
    yield from fw.steps(model, array(3, *x), *state)


def in_modes(fw, model, x):
    """In evaluation, in training, and in evaluation after that."""
    yield fw.call(model, given(x))
    y, model = fw.run(model, given(x), train=True)
    yield y
    yield fw.call(model, given(x))


def along_a_named_axis(fw, model, x):
    yield jax.vmap(lambda x: fw.call(model, x), axis_name="batch")(np.stack([given(x)] * 2))


def dropped(fw, model, x):
    """The fraction kept, the scale, and the axes along which all decisions are the same."""
    y = fw.call(model, jax.numpy.ones(x), train=True, key=jax.random.key(0))
    y = np.asarray(y)
    return [(y != 0).mean(), y.max(), (y == y[:, :1]).all(), (y == y[:1]).all()]


@pytest.mark.parametrize("goal", ["brainstate", "equinox", "linen"])
def test_an_array_for_a_number_is_refused(goal):
    """In Equinox it would be one more parameter, which an optimiser moves."""
    rngs = nnx.Rngs(0)
    for option, layer in {
        "rate": nnx.Dropout(jnp.array(0.3), rngs=rngs),
        "epsilon": nnx.LayerNorm(4, epsilon=jnp.array(0.1), rngs=rngs),
        "momentum": nnx.BatchNorm(4, momentum=np.array(0.9), rngs=rngs),
    }.items():
        with pytest.raises(interop.UnsupportedLayerError, match="only a number") as e:
            interop.convert(nnx.Sequential(layer), to=goal, sample_input=(4,))
        assert (e.value.path, e.value.option) == ("model[0]", option)
        assert e.value.remedy == f"Pass float({option})"
