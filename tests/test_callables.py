"""Plain functions in a stack: batched or of one example, and never with weights inside."""

import functools

import brainstate
import equinox as eqx
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import interop
from interop.composites import equinox as composites
from interop.composites.brainstate import Lambda

from .cases import BIAS, WEIGHT, X, array
from .conftest import Framework


def scaled(x):
    return jnp.sin(x) * 2


def test_an_unknown_function_is_taken_over(source, target):
    source.needs("functions")
    target.needs("functions")
    model = source.sequential(source.linear(WEIGHT, BIAS), source.activation(scaled))
    converted = target.convert_from(source, model)
    np.testing.assert_allclose(
        target.call(converted, X), source.call(model, X), rtol=2e-6, atol=2e-6
    )
    back = source.convert_from(target, converted)
    assert source.options(back)[-1] == source.options(model)[-1]


def test_a_function_may_stand_first(source, target):
    source.needs("functions")
    target.needs("functions")
    model = source.sequential(source.activation(scaled), source.linear(WEIGHT, BIAS))
    converted = target.convert_from(source, model)
    np.testing.assert_allclose(
        target.call(converted, X), source.call(model, X), rtol=2e-6, atol=2e-6
    )


def test_flattening_images_works_between_batched_and_single_examples(source, target):
    source.needs("functions")
    target.needs("functions")
    images = array(5, 2, 4)
    model = source.sequential(source.flatten(), source.linear(array(8, 3), array(3)))
    converted = target.convert_from(source, model)
    np.testing.assert_allclose(
        target.call(converted, images), source.call(model, images), rtol=2e-6, atol=2e-6
    )


MIXING = {
    "centred": lambda x: x - x.mean(0),
    "reversed": lambda x: jnp.flip(x, 0),
    "summed": functools.partial(jnp.sum, axis=0),
    "a softmax over the batch": lambda x: jax.nn.softmax(x, axis=0),
    "a running sum": functools.partial(jnp.cumsum, axis=0),
    "by its size": lambda x: x / x.shape[0],
    "all in one row": jnp.ravel,
    "transposed": lambda x: x.T,
    "doubled": lambda x: jnp.concatenate([x, x]),
}


@pytest.mark.parametrize("sample", [None, (3,)])
@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("origin", ["brainstate", "linen", "nnx"])
def test_a_function_that_mixes_the_batch_is_refused_for_one_example(origin, name, sample):
    """It would compute something else, without a word: each example is a batch of one then."""
    fw = Framework(origin)
    model = fw.sequential(fw.linear(WEIGHT, BIAS), fw.activation(MIXING[name]))
    model, keywords = fw.arguments(model)
    with pytest.raises(interop.UnsupportedLayerError, match="mixes the examples") as e:
        interop.convert(model, to="equinox", sample_input=sample, **keywords)
    assert e.value.path == "model[1]"
    assert e.value.remedy.startswith("Apply it outside")
    report = interop.explain(model, to="equinox", sample_input=sample, **keywords)
    assert [row.how for row in report.rows] == ["native", "refused"]


def test_where_the_shape_decides_whether_a_function_mixes_the_batch_it_is_asked_for():
    fw = Framework("nnx")
    centred = lambda x: x - x.mean(-2, keepdims=True)  # noqa: E731
    model = fw.sequential(fw.linear(WEIGHT, BIAS), centred)
    with pytest.raises(interop.MissingShapeError, match="mix those of a batch") as e:
        interop.to_equinox(model)
    assert e.value.path == "model[1]"
    with pytest.raises(interop.UnsupportedLayerError, match="mixes the examples"):
        interop.convert(model, to="equinox", sample_input=(3,))
    converted = interop.convert(model, to="equinox", sample_input=(5, 3))
    assert converted.layers[1].fn.fn is centred


def _halves(x):
    return x[..., :2], x[..., 2:]


def test_functions_of_several_arrays_are_tried_on_what_they_get():
    fw = Framework("nnx")
    first = fw.linear(WEIGHT, BIAS)
    gate = lambda a, b: a * jnp.tanh(b)  # noqa: E731
    converted = interop.to_equinox(fw.sequential(first, _halves, gate))
    y = np.asarray(first(X))
    wanted = y[:, :2] * np.tanh(y[:, 2:])
    np.testing.assert_allclose(jax.vmap(converted)(X), wanted, rtol=1e-5, atol=1e-6)
    mixed = lambda a, b: a * jnp.tanh(b) - b.mean(0)  # noqa: E731
    with pytest.raises(interop.UnsupportedLayerError, match="mixes the examples") as e:
        interop.to_equinox(fw.sequential(first, _halves, mixed))
    assert e.value.path == "model[2]"


def test_a_function_that_mixes_images_is_named_as_the_source_has_it():
    def centred(x):
        return x - x.mean(0)

    fw = Framework("nnx")
    kernel = array(3, 3, 2, 2)
    layers = [fw.conv(kernel, None, (5, 4, 2)), centred, fw.conv(kernel, None, (5, 4, 2))]
    with pytest.raises(interop.UnsupportedLayerError, match="centred mixes the examples") as e:
        interop.convert(fw.sequential(*layers), to="equinox", sample_input=(5, 4, 2))
    assert e.value.path == "model[1]"


def test_a_function_that_mixes_the_batch_within_a_layer_is_refused():
    def centred(x):
        return x - x.mean(0)

    def shifted(x):
        return x - x.mean(-1, keepdims=True)

    def layer(activation):
        cell = nnx.SimpleCell(3, 4, activation_fn=activation, rngs=nnx.Rngs(0))
        return nnx.RNN(cell, rngs=nnx.Rngs(0))

    with pytest.raises(interop.UnsupportedLayerError, match="mixes the examples") as e:
        interop.convert(layer(centred), to="equinox", sample_input=(5, 3))
    assert e.value.option == "activation"
    model, x = layer(shifted), array(2, 5, 3)
    converted = interop.convert(model, to="equinox", sample_input=(5, 3))
    np.testing.assert_allclose(jax.vmap(converted)(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "merge",
    [
        lambda a, b: a - b.mean(0),
        lambda a, b: a - b.mean(1, keepdims=True),
        lambda a, b: jnp.concatenate([a, b], axis=2),
        lambda a, b: a - b.mean(-2, keepdims=True),  # the batch, where time comes first
    ],
)
def test_a_merge_of_both_directions_that_uses_other_axes_than_the_last_is_refused(merge):
    """An example has one axis less: such a function would use other axes, or fail."""
    model = bidirectional(merge)
    with pytest.raises(interop.UnsupportedLayerError, match="mixes the examples") as e:
        interop.convert(model, to="equinox", sample_input=(5, 3))
    assert (e.value.option, e.value.path) == ("merge", "model")
    assert e.value.remedy.startswith("Count axes from the last")


def bidirectional(merge):
    cells = [nnx.SimpleCell(3, 4, rngs=nnx.Rngs(seed)) for seed in (0, 1)]
    parts = [nnx.RNN(cell, rngs=nnx.Rngs(0)) for cell in cells]
    return nnx.Bidirectional(*parts, merge_fn=merge, rngs=nnx.Rngs(0))


def test_a_merge_of_both_directions_may_use_the_last_axis():
    model = bidirectional(lambda a, b: a - b.sum(-1, keepdims=True))
    x = array(2, 5, 3)
    first, second = model.forward_rnn(x), model.backward_rnn(x, reverse=True, keep_order=True)
    wanted = np.asarray(first) - np.asarray(second).sum(-1, keepdims=True)
    converted = interop.convert(model, to="equinox", sample_input=(5, 3))
    np.testing.assert_allclose(jax.vmap(converted)(x), wanted, rtol=1e-5, atol=1e-6)


def test_a_function_of_one_example_within_a_layer_is_refused_for_batches():
    """Written for Equinox, ``x.mean()`` is over features; of a batch, it is over all of it."""
    cell = composites.SimpleCell(3, 4, activation=lambda x: x - x.mean(), key=jax.random.key(0))
    with pytest.raises(interop.UnsupportedLayerError, match="mixes the examples") as e:
        interop.convert(cell, to="nnx")
    assert e.value.option == "activation"


def test_trying_functions_draws_no_random_number():
    """Such a function fails when it is called, as it would in any other compiled function."""
    noisy = lambda x: x + brainstate.random.normal(size=x.shape)  # noqa: E731
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), noisy)
    before = brainstate.random.DEFAULT.value
    interop.to_equinox(model)
    assert brainstate.random.DEFAULT.value is before


@pytest.mark.parametrize("to", ["nnx", "linen", "equinox"])
def test_a_lone_function_becomes_a_module(to):
    target = Framework(to)
    model = target.receive(lambda: interop.convert(Lambda(scaled), to=to))
    np.testing.assert_allclose(target.call(model, X), scaled(X), rtol=1e-6)


dense = nnx.Linear(3, 3, rngs=nnx.Rngs(0))


def through_a_global(x):
    return dense(x)


def hiding_places():
    layer = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

    def with_default(x, layer=layer):
        return layer(x)

    class Callable:
        def __init__(self):
            self.parts = [layer]

        def __call__(self, x):
            return self.parts[0](x)

    inner = lambda x: layer(x)  # noqa: E731
    return {
        "bound method": layer.__call__,
        "closure": inner,
        "closure of a closure": lambda x: inner(x),
        "partial": functools.partial(lambda layer, x: layer(x), layer),
        "default argument": with_default,
        "global": through_a_global,
        "list in a callable object": Callable(),
        "jax.jit": jax.jit(inner),
        "jax.vmap": jax.vmap(inner),
    }


@pytest.mark.parametrize("place", hiding_places())
def test_a_module_inside_a_function_is_refused(place):
    model = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(1)), hiding_places()[place])
    with pytest.raises(interop.UnsupportedStructureError, match=r"Linear \(nnx\)") as e:
        interop.from_nnx(model)
    assert e.value.path == "model[1]"


@pytest.mark.parametrize(
    ("framework", "foreign"),
    [
        ("nnx", brainstate.nn.Linear(3, 3)),
        ("linen", eqx.nn.Linear(3, 3, key=jax.random.key(0))),
        ("equinox", flax.linen.Dense(3)),
    ],
)
def test_a_module_of_another_framework_is_refused(framework, foreign):
    source = Framework(framework)
    model = source.sequential(source.linear(WEIGHT, BIAS), source.activation(foreign))
    model, keywords = source.arguments(model)
    with pytest.raises(interop.UnsupportedStructureError, match=r"^model\[1\]: ") as e:
        interop.convert(model, to="brainstate", **keywords)
    assert type(foreign).__qualname__ in str(e.value)


def test_what_cannot_be_called_is_refused():
    model = eqx.nn.Sequential([eqx.nn.Lambda(3.0)])
    with pytest.raises(
        interop.UnsupportedStructureError, match="neither a module nor callable"
    ):
        interop.from_equinox(model)
