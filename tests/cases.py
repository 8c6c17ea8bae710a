"""Layers and stacks to convert, with the output that each must have."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import truth


def array(*shape, seed=0, dtype=jnp.float32, positive=False):
    """Distinct values of both signs, or at least 0.5."""
    values = np.random.default_rng([seed, *shape]).normal(size=shape)
    return jnp.asarray(np.abs(values) + 0.5 if positive else values, dtype)


X = array(5, 3, seed=1)
WEIGHT, BIAS = array(3, 4, seed=2), array(4, seed=3)
WEIGHT_2, BIAS_2 = array(4, 2, seed=4), array(2, seed=5)
SCALE, SHIFT = array(3, seed=6) + 2, array(3, seed=7)
MEAN, VAR = array(3, seed=8), array(3, seed=9, positive=True)
EPSILON, MOMENTUM, RATE = 2e-3, 0.9, 0.3
INDICES = jnp.array([4, 0, 4, 2, 1])
TABLE = array(5, 3, seed=10)
IMAGES = array(2, 4, 5, 6, seed=11)  # of height 4, width 5 and 6 channels
KERNEL, SHIFT_4 = array(3, 2, 3, 4, seed=14), array(4, seed=15)
CONV = {"strides": (2, 1), "padding": ((1, 2), (0, 1)), "dilation": (1, 2), "groups": 2}
SCALE_6, SHIFT_6 = array(6, seed=12) + 2, array(6, seed=13)


@dataclass(frozen=True)
class Case:
    """A model in every framework, and its output in evaluation mode on ``x``.

    ``x`` has its channels last, and each framework is given it in its own layout. Arrays
    named in ``own_shape`` have another shape in some framework.
    """

    name: str
    needs: tuple[str, ...]
    build: Callable[[Any], Any]
    expected: Callable[[Any], Any]
    x: Any = field(default_factory=lambda: X)
    own_shape: tuple[str, ...] = ()

    def convert(self, source, target):
        """The model in ``source`` and converted to ``target``; skips what they lack."""
        for feature in self.needs:
            source.needs(feature)
            target.needs(feature)
        model = self.build(source)
        return model, target.convert_from(source, model, sample_input=self.shape(source))

    def given(self, fw, x=None):
        """``x`` as models of the framework take it."""
        return fw.from_channels_last(self.x if x is None else x)

    def shape(self, fw):
        """The shape of one example, as models of the framework take it."""
        return self.given(fw).shape[1:]

    def call(self, fw, model, x=None, call="call"):
        """The output, with its channels last."""
        return fw.to_channels_last(getattr(fw, call)(model, self.given(fw, x)))


def linear(fw):
    return fw.linear(WEIGHT, BIAS)


def layer_norm(fw):
    return fw.layer_norm(SCALE, SHIFT, EPSILON)


def batch_norm(fw):
    return fw.batch_norm(SCALE, SHIFT, MEAN, VAR, EPSILON, MOMENTUM)


def stack(fw):
    head = fw.sequential(fw.activation(jnp.tanh), fw.linear(WEIGHT_2, BIAS_2))
    return fw.sequential(layer_norm(fw), linear(fw), fw.activation(jax.nn.relu), head)


def stack_in_training(fw):
    layers = batch_norm(fw), fw.activation(jnp.tanh), linear(fw), fw.dropout(RATE)
    return fw.sequential(*layers)


_linear = functools.partial(truth.linear, weight=WEIGHT, bias=BIAS)
_layer_norm = functools.partial(truth.layer_norm, scale=SCALE, bias=SHIFT, epsilon=EPSILON)
_batch_norm = functools.partial(
    truth.batch_norm, scale=SCALE, bias=SHIFT, mean=MEAN, var=VAR, epsilon=EPSILON
)


def _stack(x):
    hidden = np.maximum(_linear(_layer_norm(x)), 0)
    return truth.linear(np.tanh(hidden), WEIGHT_2, BIAS_2)


CASES = [
    Case("linear", ("linear",), linear, _linear),
    Case(
        "linear without bias",
        ("linear",),
        lambda fw: fw.linear(WEIGHT),
        lambda x: truth.linear(x, WEIGHT),
    ),
    Case("layer norm", ("layer_norm",), layer_norm, _layer_norm),
    Case("batch norm", ("batch_norm",), batch_norm, _batch_norm),
    Case(
        "embedding",
        ("embedding",),
        lambda fw: fw.embedding(TABLE),
        lambda x: np.asarray(TABLE)[x],
        INDICES,
    ),
    Case(
        "rms norm",
        ("rms_norm",),
        lambda fw: fw.rms_norm(SCALE, EPSILON),
        lambda x: truth.rms_norm(x, SCALE, EPSILON),
    ),
    Case(
        "conv",
        ("conv",),
        lambda fw: fw.conv(KERNEL, SHIFT_4, (4, 5, 6), **CONV),
        lambda x: truth.conv(x, KERNEL, SHIFT_4, (2, 1), ((1, 2), (0, 1)), (1, 2), 2),
        IMAGES,
        ("bias",),
    ),
    Case(
        "conv without bias",
        ("conv",),
        lambda fw: fw.conv(KERNEL, None, (4, 5, 6), groups=2, padding="SAME"),
        lambda x: truth.conv(x, KERNEL, 0.0, pads=((1, 1), (0, 1)), groups=2),
        IMAGES,
    ),
    Case(
        "group norm",
        ("group_norm",),
        lambda fw: fw.group_norm(SCALE_6, SHIFT_6, 2, EPSILON),
        lambda x: truth.group_norm(x, SCALE_6, SHIFT_6, 2, EPSILON),
        IMAGES,
    ),
    Case(
        "small stack",
        ("linear", "sequential", "activation"),
        lambda fw: fw.sequential(linear(fw), fw.activation(jax.nn.relu)),
        lambda x: np.maximum(_linear(x), 0),
    ),
    Case("nested stack", ("layer_norm", "sequential"), stack, _stack),
    Case(
        "stack in training",
        ("batch_norm", "dropout"),
        stack_in_training,
        lambda x: _linear(np.tanh(_batch_norm(x))),
    ),
]
