"""Every layer and stack, converted from each framework to each other one."""

import jax
import numpy as np
import pytest

from .cases import CASES

pytestmark = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def close(a, b, tolerance=2e-6):
    """Frameworks add and multiply in different orders; values here are of size 1 to 10."""
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_the_source_computes_the_hand_written_formula(source, case):
    for feature in case.needs:
        source.needs(feature)
    close(case.call(source, case.build(source)), case.expected(case.x))


def test_the_converted_model_computes_the_hand_written_formula(source, target, case):
    _, converted = case.convert(source, target)
    close(case.call(target, converted), case.expected(case.x))


def test_the_converted_model_compiles(source, target, case):
    _, converted = case.convert(source, target)
    close(case.call(target, converted, call="jit"), case.expected(case.x))


def test_the_converted_model_has_the_same_gradients(source, target, case):
    model, converted = case.convert(source, target)
    wanted = source.gradient(model, case.given(source))
    found = target.gradient(converted, case.given(target))
    assert [g.keys() for g in found] == [g.keys() for g in wanted]
    jax.tree.map(lambda a, b: close(a, b, 2e-5), found, wanted)  # sums over many products


def test_the_converted_model_maps_over_a_further_axis(source, target, case):
    _, converted = case.convert(source, target)
    batches = np.stack([case.x, case.x[::-1]])
    mapped = jax.vmap(lambda x: case.call(target, converted, x))(batches)
    close(mapped, np.stack([case.expected(x) for x in batches]))


def test_equal_layouts_share_the_array_and_others_hold_the_same_numbers(source, target, case):
    model, converted = case.convert(source, target)
    for wanted, found in zip(source.read(model), target.read(converted), strict=True):
        assert found.keys() == wanted.keys()
        for name in wanted:
            if name in (*source.OWN_LAYOUT, *target.OWN_LAYOUT, *case.own_shape):
                close(found[name], wanted[name])
            else:
                assert found[name] is wanted[name]


def test_a_round_trip_gives_back_the_types_options_and_arrays(source, target, case):
    model, converted = case.convert(source, target)
    back = source.convert_from(target, converted, sample_input=case.shape(target))
    assert source.options(back) == source.options(model)
    jax.tree.map(close, source.read(back), source.read(model))


def test_the_source_is_unchanged_by_the_conversion_and_by_training_the_result(
    source, target, case
):
    for feature in case.needs:
        source.needs(feature)
        target.needs(feature)
    model = case.build(source)
    before = jax.tree.map(np.array, source.read(model))
    options = source.options(model)
    converted = target.convert_from(source, model, sample_input=case.shape(source))
    target.step(converted, case.given(target))
    jax.tree.map(np.testing.assert_array_equal, source.read(model), before)
    assert source.options(model) == options
