"""What can be told of a traced program."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from interop.programs import returned_as_given

A, B, C = jnp.ones(3), jnp.ones(3), jnp.ones((4, 3))


def scan(a, b, c):
    def body(carry, x):
        a, b = carry
        return (a, b + x), (x, x * a)

    (a, b), (c, d) = lax.scan(body, (a, b), c)
    return a, b, c, d


def swapping(a, b, c):
    (a, b), c = lax.scan(lambda carry, x: (carry[::-1], x), (a, b), c)
    return a, b, c


def loop(a, b, c):
    return lax.fori_loop(0, 3, lambda i, carry: (carry[0], carry[1] + 1, carry[2]), (a, b, c))


def branches(a, b, c):
    return lax.cond(a.sum() > 0, lambda: (a, b, c), lambda: (a, a, c))


def nested(a, b, c):
    return jax.checkpoint(jax.jit(lambda a, b, c: (a, a, c, a + b)))(a, b, c)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda a, b, c: (a, b * 1.5, a), [True, False, False]),
        (nested, [True, False, True, False]),
        (scan, [True, False, True, False]),
        (swapping, [False, False, True]),
        (loop, [True, False, True]),
        (branches, [True, False, True]),
    ],
)
def test_outputs_that_are_inputs_are_known_through_loops_and_branches(function, expected):
    assert returned_as_given(function, A, B, C) == expected
