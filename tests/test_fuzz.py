"""Random layers and stacks with random options and values, along random routes of conversions.

``make fuzz MINUTES=60`` runs this with new seeds for as long as asked; CI runs a fixed part.
"""

import copy
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, event, given, note, settings

import interop

from . import truth
from .cases import array
from .conftest import NAMES, Framework
from .models import Option
from .test_options import Layout, in_evaluation, in_modes, in_steps
from .test_options import given as input_of

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))


def fuzzed(examples):
    """So many examples in CI, always the same; as many as asked for, made small, elsewhere."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        phases=[Phase.explicit, Phase.generate] + [Phase.shrink] * bool(EXAMPLES),
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


@dataclass
class Tally:
    """How many conversions of layers with options were accepted, and what was refused."""

    accepted: int = 0
    refused: dict[str, int] = field(default_factory=dict)

    def refuse(self, source, target, cls, option):
        row = f"{source} -> {target}: {cls.__name__}, {option}"
        self.refused[row] = self.refused.get(row, 0) + 1

    def __str__(self):
        number = sum(self.refused.values())
        share = self.accepted / max(self.accepted + number, 1)
        rows = sorted(self.refused.items(), key=lambda item: -item[1])
        lines = [f"{share:.1%} of {self.accepted + number} conversions were accepted"]
        return "\n".join(lines + [f"  {count} x {row}" for row, count in rows])


TALLY = Tally()


@pytest.fixture(scope="module", autouse=True)
def tally():
    """At least 95 % of what the tables declare supported is, also in combination."""
    TALLY.accepted, TALLY.refused = 0, {}
    yield
    print(f"\n{TALLY}")
    assert sum(TALLY.refused.values()) <= 0.05 * TALLY.accepted, str(TALLY)


# -- layers ---------------------------------------------------------------------------------

LAYERS = [
    (name, cls)
    for name in NAMES
    for cls, constructor in Framework(name).CONSTRUCTORS.items()
    if not isinstance(constructor, str)
]
_DTYPES = st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16])
VARIED = {  # options that take more than the one value of the tables
    "epsilon": st.sampled_from([1e-6, 1e-3, 0.5]),
    "eps": st.sampled_from([1e-6, 1e-3, 0.5]),
    "momentum": st.sampled_from([0.0, 0.3, 0.99, 1.0]),
    "rate": st.sampled_from([0.0, 0.3, 0.9]),
    "dtype": _DTYPES,
    "param_dtype": _DTYPES,
}
VALUES = {
    "plain": lambda x: x,
    "with a large mean": lambda x: x + 300,
    "with a tiny variance": lambda x: 1 + 1e-3 * x,
    "tiny": lambda x: x * 1e-20,
    "subnormal": lambda x: x * 1e-40,
    "large": lambda x: x * 1e15,
    "with inf": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 1, np.inf, x),
    "with nan": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 1, np.nan, x),
}


@dataclass
class Layer:
    """One native layer, built from its framework's table of options."""

    name: str
    cls: type
    options: dict[str, Any]
    x: Any
    values: str = "plain"

    @property
    def table(self):
        return Framework(self.name).CONSTRUCTORS[self.cls]

    @property
    def marks(self):
        marks = (self.table.options.get(option) for option in self.options)
        return [mark for mark in marks if isinstance(mark, Option)]

    @property
    def has_images(self):
        """Whether each framework has the channels of inputs where it wants them."""
        return self.table.images and not any(mark.everywhere for mark in self.marks)

    def build(self):
        """The model; options that do not go together natively are no case."""
        try:
            options = self.table.base | self.options
            model = Framework(self.name).construct(self.cls, self.x, **options)
            Framework(self.name).call(model, self.given())
        except Exception as e:  # noqa: BLE001 - whatever the framework says to its own users
            event(f"invalid natively: {type(e).__name__}")
            assume(False)
        return model

    def outputs(self, fw, model, x):
        """In evaluation; and in training and after it, where that is the same each time."""
        if "Cell" in self.cls.__name__:
            return list(in_steps(fw, model, x.shape))
        random = any("Dropout" in base.__name__ for base in self.cls.__mro__)
        trains = not random and all(mark.training for mark in self.marks)
        source = Framework(self.name)
        reader = Layout(fw, source) if self.has_images and fw.name != self.name else fw
        return list((in_modes if trains else in_evaluation)(reader, model, x))

    def seen_by(self, fw):
        """The input in the layout of another framework."""
        x = self.given()
        if not self.has_images:
            return x
        return fw.from_channels_last(Framework(self.name).to_channels_last(x))

    def given(self):
        x = input_of(self.x)
        if not jnp.issubdtype(x.dtype, jnp.floating) or self.values == "plain":
            return x
        return jnp.asarray(VALUES[self.values](np.asarray(x)), x.dtype)


@st.composite
def layers(draw):
    name, cls = draw(st.sampled_from(LAYERS))
    table = Framework(name).CONSTRUCTORS[cls]
    marks = {
        option: mark
        for option, mark in table.options.items()
        if isinstance(mark, Option) and not mark.refused and not mark.attribute
    }
    chosen = (
        draw(st.lists(st.sampled_from(sorted(marks)), unique=True, max_size=3)) if marks else []
    )
    options: dict[str, Any] = {}
    x = table.x
    for option in chosen:
        mark = marks[option]
        value = mark.value if isinstance(mark.value, dict) else {option: mark.value}
        clash = any(key in options and options[key] is not value[key] for key in value)
        if clash or (mark.x is not None and options):  # it may be for the input before
            continue
        x = x if mark.x is None else mark.x
        options |= {
            key: draw(VARIED[key]) if key in VARIED and not isinstance(v, dict) else v
            for key, v in value.items()
        }
    return Layer(name, cls, options, x, draw(st.sampled_from(sorted(VALUES))))


def routes(start):
    """One to four frameworks after ``start``, none twice in a row."""
    return (
        st.lists(st.sampled_from(NAMES), min_size=1, max_size=4)
        .map(lambda names: [b for a, b in zip([start, *names], names, strict=False) if a != b])
        .filter(bool)
    )


@st.composite
def journeys(draw):
    layer = draw(layers())
    route = draw(routes(layer.name))
    if layer.table.images and not layer.has_images:  # after channels first they are as usual
        first = [i for i, name in enumerate(route) if Framework(name).channels_first]
        route = route[: first[0] + 1] if first else route
    return layer, route


def assert_close(found, wanted, noises):
    """Equal dtypes, and values to rounding: of the result, and of the input as it passes."""
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    found, wanted, *noises = (np.asarray(a, np.float64) for a in (found, wanted, *noises))
    finite = np.isfinite(wanted)
    scale = np.abs(wanted[finite]).max(initial=0.0)
    np.testing.assert_array_equal(np.isfinite(found), finite)
    with np.errstate(invalid="ignore"):
        moved = [np.abs(noise - wanted) for noise in noises]
        moved = np.nan_to_num(moved, nan=0.0, posinf=0.0).max(initial=0.0)
    tolerance = 1e-35 + 20 * moved + 2e-5 * scale
    np.testing.assert_allclose(
        np.where(finite, found, 0), np.where(finite, wanted, 0), rtol=0, atol=tolerance
    )


def shaken(x, seed):
    """``x`` off by a rounding error of each number: what the output may depend on."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    signs = np.where(np.random.default_rng(seed).random(x.shape) < 0.5, -1, 1)
    return x * jnp.asarray(1 + signs * float(jnp.finfo(x.dtype).eps), x.dtype)


@fuzzed(50)
@given(journeys())
def test_a_layer_with_random_options_keeps_its_outputs_along_a_route(journey):
    layer, route = journey
    note(f"{layer.name} {layer.cls.__name__} {layer.options} {layer.values} -> {route}")
    models = [layer.build()]
    places = [Framework(layer.name)]
    for goal in route:
        example = layer.seen_by(places[-1])
        try:
            target = Framework(goal)
            models.append(
                target.convert_from(places[-1], models[-1], sample_input=example.shape[1:])
            )
        except interop.UnsupportedLayerError as e:
            TALLY.refuse(places[-1].name, goal, layer.cls, e.option)
            break
        TALLY.accepted += 1
        places.append(target)
    x = layer.given()
    noises = [  # one alone may by chance show little of what badly conditioned input does
        layer.outputs(places[0], copy.deepcopy(models[0]), shaken(x, seed)) for seed in range(3)
    ]
    wanted = layer.outputs(places[0], models[0], x)
    for target, model in zip(places[1:], models[1:], strict=True):
        found = layer.outputs(target, model, x)
        for one, other, *moved in zip(found, wanted, *noises, strict=True):
            assert_close(one, other, moved)


# -- stacks ---------------------------------------------------------------------------------


@dataclass
class Part:
    """One layer of a stack in any framework, and what it computes in NumPy and float64.

    ``apply(arrays, x, train)`` returns the output, and the arrays after a training call.
    """

    name: str
    arrays: dict[str, Any]
    build: Callable[[Any], Any]
    apply: Callable[[dict[str, Any], Any, bool], tuple[Any, dict[str, Any]]]
    needs: tuple[str, ...] = ()


def _pure(name, arrays, build, formula, *needs):
    return Part(name, arrays, build, lambda a, x, train: (formula(x, **a), a), needs)


def _values(draw, *shape, positive=False):
    seed = draw(st.integers(0, 5))
    return array(*shape, seed=seed, positive=positive)


def _norm_arrays(draw, features):
    scale, bias = _values(draw, features, positive=True), _values(draw, features)
    return {"scale": scale, "bias": bias}, draw(st.sampled_from([1e-5, 0.1]))


def a_linear(draw, shape):
    out = draw(st.sampled_from([2, 4, 5]))
    arrays = {"weight": _values(draw, shape[-1], out)}
    if draw(st.booleans()):
        arrays["bias"] = _values(draw, out)
    build = lambda fw: fw.linear(**arrays)  # noqa: E731
    return _pure("linear", arrays, build, truth.linear, "linear"), (out,)


def a_layer_norm(draw, shape):
    arrays, epsilon = _norm_arrays(draw, shape[-1])
    formula = functools.partial(truth.layer_norm, epsilon=epsilon)
    build = lambda fw: fw.layer_norm(**arrays, epsilon=epsilon)  # noqa: E731
    return _pure("layer norm", arrays, build, formula, "layer_norm"), shape


def an_rms_norm(draw, shape):
    arrays, epsilon = _norm_arrays(draw, shape[-1])
    del arrays["bias"]
    formula = functools.partial(truth.rms_norm, epsilon=epsilon)
    build = lambda fw: fw.rms_norm(**arrays, epsilon=epsilon)  # noqa: E731
    return _pure("rms norm", arrays, build, formula, "rms_norm"), shape


def a_group_norm(draw, shape):
    arrays, epsilon = _norm_arrays(draw, shape[-1])
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4, 5) if shape[-1] % g == 0]))
    formula = functools.partial(truth.group_norm, groups=groups, epsilon=epsilon)
    build = lambda fw: fw.group_norm(**arrays, groups=groups, epsilon=epsilon)  # noqa: E731
    return _pure("group norm", arrays, build, formula, "group_norm"), shape


def a_batch_norm(draw, shape):
    (arrays, epsilon), n = _norm_arrays(draw, shape[-1]), shape[-1]
    arrays |= {"mean": _values(draw, n), "var": _values(draw, n, positive=True)}
    momentum = draw(st.sampled_from([0.5, 0.9]))

    def apply(a, x, train):
        if not train:
            return truth.batch_norm(x, **a, epsilon=epsilon), a
        rows = np.float64(x).reshape(-1, n)
        moved = truth.updated_statistics(rows, a["mean"], a["var"], momentum)
        own = {"mean": rows.mean(0), "var": rows.var(0)}
        after = a | dict(zip(("mean", "var"), moved, strict=True))
        return truth.batch_norm(x, **(a | own), epsilon=epsilon), after

    build = lambda fw: fw.batch_norm(  # noqa: E731
        **arrays, epsilon=epsilon, momentum=momentum, shape=shape if len(shape) > 1 else None
    )
    return Part("batch norm", arrays, build, apply, ("batch_norm",)), shape


def an_activation(draw, shape):
    fn, formula = draw(
        st.sampled_from(
            [
                (jnp.tanh, np.tanh),
                (jax.nn.gelu, truth.ACTIVATIONS["gelu"]),
                (jax.nn.softplus, truth.ACTIVATIONS["softplus"]),
                (jax.nn.softmax, truth.ACTIVATIONS["softmax"]),
                (jnp.sin, np.sin),
            ]
        )
    )
    assume(fn is not jax.nn.softmax or len(shape) == 1)  # elsewhere it sees its own last axis
    return _pure(fn.__name__, {}, lambda fw: fw.activation(fn), formula, "activation"), shape


def a_dropout(draw, shape):
    return _pure("dropout", {}, lambda fw: fw.dropout(0.3), lambda x: x, "dropout"), shape


def a_conv(draw, shape):
    kernel, groups = draw(st.sampled_from([(1, 2), (3, 2)])), draw(st.sampled_from([1, 2]))
    groups = groups if shape[-1] % 2 == 0 else 1
    strides, dilation = (
        draw(st.sampled_from([(1, 1), (2, 1)])),
        draw(st.sampled_from([(1, 1), (1, 2)])),
    )
    pads = draw(st.sampled_from([((1, 1), (1, 1)), ((2, 0), (1, 2))]))
    arrays = {"weight": _values(draw, *kernel, shape[-1] // groups, 4)}
    if draw(st.booleans()):
        arrays["bias"] = _values(draw, 4)
    options = {"strides": strides, "dilation": dilation, "groups": groups}
    formula = functools.partial(truth.conv, pads=pads, **options)
    out = formula(np.zeros((1, *shape)), arrays["weight"]).shape[1:]
    assume(0 not in out)
    build = lambda fw: fw.conv(  # noqa: E731
        arrays["weight"], arrays.get("bias"), shape, padding=pads, **options
    )
    return _pure("conv", arrays, build, formula, "conv"), out


def a_flatten(draw, shape):
    def build(fw):
        return fw.flatten()

    return _pure("flatten", {}, build, None, "flatten"), (int(np.prod(shape)),)


VECTORS = [a_linear, a_linear, a_layer_norm, an_rms_norm, a_group_norm, a_batch_norm]
VECTORS += [an_activation, a_dropout]
IMAGES = [a_conv, a_conv, a_group_norm, a_batch_norm, an_activation, a_dropout, a_flatten]


@dataclass
class Stack:
    """Layers of all kinds; ``cut`` is where a nested stack begins."""

    parts: list[Part]
    x: Any
    cut: int

    def build(self, fw):
        for feature in (*(need for part in self.parts for need in part.needs), "sequential"):
            assume(feature not in fw.lacks)
        layers = [part.build(fw) for part in self.parts]
        inner = layers[self.cut :]
        if 0 < self.cut < len(layers) - 1:
            layers = [*layers[: self.cut], fw.sequential(*inner)]
        return fw.sequential(*layers)

    @property
    def has_images(self):
        """Whether a layer tells that the input has channels, whose place differs."""
        names = [part.name for part in self.parts]
        before = names[: names.index("flatten")] if "flatten" in names else names
        return self.x.ndim > 2 and not {"conv", "group norm", "batch norm"}.isdisjoint(before)

    def seen_by(self, fw, x):
        """An input, whose channels are last, in the layout of a framework."""
        return fw.from_channels_last(x) if self.has_images else x

    def compute(self, fw, x, arrays=None, train=False, rounded=np.float64):
        """The output in the order of axes of ``fw``, and the arrays afterwards.

        ``rounded`` is what happens to each layer's input and arrays.
        """
        after = []
        for part, own in zip(self.parts, arrays or [p.arrays for p in self.parts], strict=True):
            x = rounded(x)
            own = {name: rounded(value) for name, value in own.items()}
            if part.name == "flatten":
                x = np.moveaxis(x, -1, 1) if fw.channels_first and self.has_images else x
                x = x.reshape(len(x), -1)
            else:
                x, own = part.apply(own, x, train)
            after.append(own)
        return x, after


@st.composite
def stacks(draw):
    features = draw(st.sampled_from([2, 3, 4]))
    shape = (4, 3, features) if draw(st.booleans()) else (features,)
    x, parts = _values(draw, 3, *shape), []
    for _ in range(draw(st.integers(1, 5))):
        kinds = IMAGES if len(shape) > 1 else VECTORS
        if any(part.name == "batch norm" for part in parts):  # Equinox's models hold one state
            kinds = [kind for kind in kinds if kind is not a_batch_norm]
        part, shape = draw(st.sampled_from(kinds))(draw, shape)
        parts.append(part)
    return Stack(parts, x, draw(st.integers(0, len(parts))))


@st.composite
def stacks_on_routes(draw):
    start = draw(st.sampled_from(NAMES))
    return draw(stacks()), start, draw(routes(start))


def gradient(loss, array):
    """The derivative of ``loss`` by each element, in float64 by central differences."""
    array, h = np.float64(array), 1e-6
    found = np.zeros(array.shape)
    for place in np.ndindex(*array.shape):
        step = np.zeros(array.shape)
        step[place] = h
        found[place] = (loss(array + step) - loss(array - step)) / (2 * h)
    return found


def descended(stack, fw, compute):
    """The arrays after one step of descent on the sum of squares of the output."""
    arrays = [dict(part.arrays) for part in stack.parts]

    def loss(i, name, value):
        changed = [own | {name: value} if i == j else own for j, own in enumerate(arrays)]
        return (compute(stack.x, changed)[0] ** 2).sum()

    def moved(i, name, value):
        if name in ("mean", "var"):
            return value
        return value - fw.RATE * gradient(functools.partial(loss, i, name), value)

    return [
        {name: moved(i, name, value) for name, value in own.items()}
        for i, own in enumerate(arrays)
    ]


def computed(stack, fw, seed=None):
    """What a stack of a framework comes to, by hand.

    With a ``seed``, where what goes into each layer is the next number of float32, or so.
    """

    def compute(x, arrays=None, train=False):
        rng = np.random.default_rng(seed)  # the same each time, as rounding is

        def beside(array):
            signs = rng.choice([-1, 1], np.shape(array))
            return np.float64(array) * (1 + np.finfo(np.float32).eps * signs)

        rounded = np.float64 if seed is None else beside
        return stack.compute(fw, x, arrays, train, rounded)

    in_training, after = compute(stack.x, train=True)
    return {
        "output": compute(stack.x)[0],
        "slope": gradient(lambda x: (compute(x)[0] ** 2).sum(), stack.x),
        "after a step": compute(stack.x, descended(stack, fw, compute))[0],
        "in training": in_training,
        "after training": compute(stack.x, after)[0],
    }


def assert_near(found, wanted, share, least=1e-3, beside=0.0):
    """Equal to ``share`` of the largest element, or of ``least``, and ``beside``."""
    atol = share * max(np.abs(wanted).max(), least) + beside
    np.testing.assert_allclose(np.float64(found), wanted, rtol=0, atol=atol)


class Expected:
    """What a stack of a framework computes, and how far rounding moves it.

    A norm of values that are almost equal magnifies what rounding has left of them.
    """

    def __init__(self, stack, source):
        self.stack = stack
        self.values = computed(stack, source)
        moved = [computed(stack, source, seed) for seed in range(3)]
        self.spread = {
            name: 8 * max(np.abs(other[name] - value).max() for other in moved)
            for name, value in self.values.items()
        }

        kinds = {part.name for part in stack.parts}
        largest = np.abs(self.values["after a step"]).max()
        self.learns = any(part.arrays for part in stack.parts) and largest < 1e3
        self.trains = "dropout" not in kinds
        # Equinox's statistics start with a bias, which a conversion takes out of them
        self.settles = source.name != "equinox" or "batch norm" not in kinds

    def check(self, fw, model, x):
        def call(model, x):
            return to_channels_last(fw.call(model, self.stack.seen_by(fw, x)))

        def assert_is(found, name, share, **options):
            assert_near(found, self.values[name], share, **options, beside=self.spread[name])

        own = self.stack.seen_by(fw, x)
        to_channels_last = fw.to_channels_last if self.stack.has_images else lambda y: y
        assert_is(call(model, x), "output", 2e-5)
        slope = jax.grad(lambda x: (call(model, x) ** 2).sum())(x)
        # of two features that are normalised it may be all cancellation
        assert_is(slope, "slope", 1e-3, least=1e-2 * (self.values["output"] ** 2).sum())
        if self.learns:
            assert_is(call(fw.step(copy.deepcopy(model), own), x), "after a step", 1e-2)
        if self.trains:
            y, model = fw.run(model, own, train=True)
            assert_is(to_channels_last(y), "in training", 2e-5)
        if self.trains and self.settles:
            assert_is(call(model, x), "after training", 1e-4)


@fuzzed(12)
@given(stacks_on_routes())
def test_a_random_stack_computes_and_learns_the_same_along_a_route(journey):
    stack, start, route = journey
    note(f"{[(part.name, *part.arrays) for part in stack.parts]} {start} -> {route}")
    places, models = [Framework(start)], [stack.build(Framework(start))]
    for goal in route:
        example = stack.seen_by(places[-1], stack.x).shape[1:]
        places.append(Framework(goal))
        models.append(places[-1].convert_from(places[-2], models[-1], sample_input=example))
    expected = Expected(stack, places[0])
    for fw, model in zip(places, models, strict=True):
        expected.check(fw, model, stack.x)
