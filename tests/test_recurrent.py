"""Recurrent cells: several steps from a state that is not zero, with biases that are not."""

import brainstate
import numpy as np
import pytest

import interop

from . import truth
from .cases import array
from .conftest import NAMES, Framework

WEIGHT_X, WEIGHT_H, BIAS = array(3, 16, seed=40), array(4, 16, seed=41), array(16, seed=42)
XS, H, C = array(5, 2, 3, seed=43), array(2, 4, seed=44), array(2, 4, seed=45)


def close(found, wanted):
    """Five steps, in which BrainState takes 1 from a bias and adds it again."""
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


EXPECTED = truth.lstm(XS, H, C, WEIGHT_X, WEIGHT_H, BIAS)


def test_the_source_computes_the_hand_written_formula(source):
    source.needs("lstm")
    close(source.steps(source.lstm(WEIGHT_X, WEIGHT_H, BIAS), XS, H, C), EXPECTED)


def test_a_cell_computes_the_same_steps(source, target):
    source.needs("lstm")
    target.needs("lstm")
    model = source.lstm(WEIGHT_X, WEIGHT_H, BIAS)
    converted = target.convert_from(source, model)
    close(target.steps(converted, XS, H, C), EXPECTED)
    back = source.convert_from(target, converted)
    close(source.steps(back, XS, H, C), EXPECTED)


def test_a_cell_that_has_run_converts_without_its_state():
    cell = Framework("brainstate").lstm(WEIGHT_X, WEIGHT_H, BIAS)
    Framework("brainstate").steps(cell, XS, H, C)
    close(Framework("nnx").steps(interop.to_nnx(cell), XS, H, C), EXPECTED)


@pytest.mark.parametrize("to", [name for name in NAMES if name != "brainstate"])
def test_a_cell_in_a_stack_is_refused(to):
    stack = brainstate.nn.Sequential(
        brainstate.nn.Linear(3, 3), brainstate.nn.LSTMCell(3, 4), brainstate.nn.Linear(4, 2)
    )
    with pytest.raises(interop.UnsupportedStructureError, match=r"^model\[1\]: LSTMCell"):
        interop.convert(stack, to=to)
