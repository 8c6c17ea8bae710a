"""What can be told of a traced program."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from interop.programs import passed_on

A, B, C = jnp.ones(3), jnp.ones(3), jnp.ones((4, 3))


def scan(a, b, c):
    def body(carry, x):
        a, b = carry
        return (a, b + x), (x, x * a)

    return lax.scan(body, (a, b), c)


def swapping(a, b, c):
    return lax.scan(lambda carry, x: (carry[::-1], carry[0]), (a, b), c)


def loop(a, b, c):
    return lax.fori_loop(0, 3, lambda i, carry: (carry[0], carry[1] + 1), (a, b))


def branches(a, b, c):
    return lax.cond(a.sum() > 0, lambda: (a, b, c), lambda: (a, a, c))


def nested(a, b, c):
    return jax.checkpoint(jax.jit(lambda a, b: (b, a, a + b)))(a, b)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda a, b, c: (c, a, a * 2, a), [2, 0, None, 0]),
        (nested, [1, 0, None]),
        (scan, [0, None, 2, None]),
        (swapping, [None, None, None]),
        (loop, [0, None]),
        (branches, [0, None, 2]),
    ],
)
def test_outputs_that_are_inputs_are_known_through_loops_and_branches(function, expected):
    assert passed_on(jax.make_jaxpr(function)(A, B, C).jaxpr) == expected
