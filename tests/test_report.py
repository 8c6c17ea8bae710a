"""What a conversion will do, told before it is done."""

import dataclasses
import gc
import weakref

import brainstate
import brainunit
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import interop
from interop import api, formulas, report
from interop.registry import registry

from . import test_images as images
from .cases import (
    BIAS,
    BIAS_2,
    CASES,
    EPSILON,
    MEAN,
    MOMENTUM,
    SCALE,
    SHIFT,
    VAR,
    WEIGHT,
    WEIGHT_2,
)
from .cases import (
    array as values_of,
)
from .conftest import Framework


def stack(fw):
    return fw.sequential(
        fw.layer_norm(SCALE, SHIFT, EPSILON),
        fw.linear(WEIGHT, BIAS),
        fw.activation(jnp.tanh),
        fw.sequential(fw.linear(WEIGHT_2, BIAS_2)),
    )


class FrozenState(brainstate.ParamState):
    pass


def bad():
    """Three things that Equinox cannot take, two that it can."""
    return brainstate.nn.Sequential(
        brainstate.nn.Linear(3, 4),
        brainstate.nn.Linear(4, 4, param_type=FrozenState),
        brainstate.nn.Sequential(brainstate.nn.RReLU(), brainstate.nn.ReLU()),
        brainstate.nn.Linear(
            4, 2, w_init=jnp.ones((4, 2)) * brainunit.mV, w_mask=jnp.ones((4, 2)), b_init=None
        ),
    )


def test_each_layer_has_a_row_with_what_becomes_of_it():
    report = interop.explain(stack(Framework("brainstate")), "equinox", sample_input=(3,))
    facts = [(row.path, row.source, row.target, row.how, row.shapes) for row in report.rows]
    assert report.ok
    assert facts == [
        ("model[0]", "LayerNorm", "LayerNorm", "native", ((3,), (3,))),
        ("model[1]", "Linear", "Linear", "native", ((3,), (4,))),
        ("model[2]", "Tanh", "tanh", "function", ((4,), (4,))),
        ("model[3][0]", "Linear", "Linear", "native", ((4,), (2,))),
    ]
    assert [row.changes for row in report.rows] == [
        (),
        ("weight: transpose (1, 0)",),
        (),
        ("weight: transpose (1, 0)",),
    ]
    assert [(row.shared, row.copied) for row in report.rows] == [
        (24, 0),
        (16, 48),
        (0, 0),
        (8, 32),
    ]
    assert (report.shared, report.copied) == (48, 80)


def test_a_report_is_of_any_pair(source, target):
    source.needs("layer_norm")
    target.needs("layer_norm")
    module, keywords = source.arguments(stack(source))
    report = interop.explain(module, target.name, sample_input=(3,), **keywords)
    assert report.ok
    assert (report.source, report.target) == (source.name, target.name)
    assert [row.path for row in report.rows] == [
        "model[0]",
        "model[1]",
        "model[2]",
        "model[3][0]",
    ]
    assert report.shared + report.copied == 4 * (3 + 3 + 12 + 4 + 8 + 2)
    if "equinox" not in (source.name, target.name):
        assert report.copied == 0


def arrays(model):
    """The arrays of a native model as objects, by its framework's own means."""
    if isinstance(model, tuple):
        return jax.tree.leaves(model[1])
    if isinstance(model, brainstate.nn.Module):
        return jax.tree.leaves([state.value for state in model.states().values()])
    if isinstance(model, nnx.Module):
        return jax.tree.leaves(nnx.state(model))
    return jax.tree.leaves(eqx.filter(model, eqx.is_array))


MODELS = {case.name: case.build for case in CASES} | {"a network for images": images.cnn}
SHAPES = {case.name: case.shape for case in CASES} | {
    "a network for images": lambda fw: fw.from_channels_last(images.X).shape[1:]
}


@pytest.mark.parametrize("name", MODELS)
def test_the_bytes_that_a_conversion_shares_and_copies_are_told(source, target, name):
    module, keywords = source.arguments(MODELS[name](source))
    shape = SHAPES[name](source)
    report = interop.explain(module, target.name, sample_input=shape, **keywords)
    made = interop.convert(module, to=target.name, sample_input=shape, **keywords)
    given = {id(array) for array in (*arrays(module), *jax.tree.leaves(keywords))}
    sizes = {True: 0, False: 0}
    for array in {id(array): array for array in arrays(made)}.values():
        sizes[id(array) in given] += array.nbytes
    assert report.ok
    assert (report.shared, report.copied) == (sizes[True], sizes[False])


def test_a_pair_may_stand_for_a_model():
    module, variables = stack(Framework("linen"))
    assert interop.explain((module, variables), "nnx").rows == (
        interop.explain(module, "nnx", params=variables).rows
    )


def test_all_problems_are_reported_at_once_in_order():
    report = interop.explain(bad(), "equinox", sample_input=(3,))
    assert not report.ok
    assert [problem.path for problem in report.problems] == [
        "model[1]",
        "model[2][0]",
        "model[3]",
    ]
    assert [row.how for row in report.rows] == [
        "native",
        "refused",
        "refused",
        "function",
        "refused",
    ]
    with pytest.raises(interop.InteropError) as e:
        interop.convert(bad(), to="equinox", sample_input=(3,))
    assert str(e.value) in {str(problem) for problem in report.problems}


def test_an_unknown_shape_after_a_refused_layer_is_no_problem_of_its_own():
    class New(nnx.Module):
        def __call__(self, x):
            return x

    model = nnx.Sequential(New(), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    report = interop.explain(model, "brainstate", sample_input=(3,))
    assert [problem.path for problem in report.problems] == ["model[0]"]
    assert [row.how for row in report.rows] == ["refused", "unknown"]
    report = interop.explain(nnx.Sequential(model.layers[1]), "brainstate")
    assert [type(problem) for problem in report.problems] == [interop.MissingShapeError]


def test_weights_that_do_not_fit_are_a_problem_beside_the_layers():
    module = nn.Sequential([nn.Dense(4), nn.relu])
    report = interop.explain(module, "nnx", params={"params": {"layers_0": {"bias": BIAS}}})
    (problem,) = report.problems
    assert problem.missing == ("params/layers_0/kernel",)
    assert [row.how for row in report.rows] == ["unknown", "function"]
    report = interop.explain(module, "nnx")
    assert (report.ok, report.rows) == (False, ())


def test_a_stack_that_the_target_cannot_tie_is_a_problem():
    layer = brainstate.nn.Linear(3, 3)
    stacks = [brainstate.nn.Sequential(layer, brainstate.nn.ReLU()) for _ in range(2)]
    report = interop.explain(brainstate.nn.Sequential(*stacks), "linen")
    assert [type(problem) for problem in report.problems] == [interop.UnsupportedStructureError]
    assert interop.explain(brainstate.nn.Sequential(layer, layer), "equinox").ok
    cell = nnx.RNN(nnx.GRUCell(3, 3, rngs=nnx.Rngs(0)))
    report = interop.explain(nnx.Sequential(cell, nnx.RNN(cell.cell)), "equinox")
    assert "second time" in str(report.problems[0])


def test_an_error_carries_the_report_of_its_model():
    with pytest.raises(interop.UnsupportedLayerError) as e:
        interop.to_equinox(bad())
    assert len(e.value.report.problems) == 3
    assert interop.ArgumentError("x").report is None
    with pytest.raises(interop.ConversionError) as e:
        interop.from_linen(nn.Dense(4), {"params": {"kernel": WEIGHT}})
    assert e.value.report.problems[0].missing == ("params/bias",)


def test_a_failing_conversion_does_not_work_out_the_report(monkeypatch):
    monkeypatch.setattr("interop.report.explain", None)
    with pytest.raises(interop.UnsupportedLayerError):
        interop.to_equinox(bad())


def test_a_report_is_printed_as_a_table_that_fits(monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    text = str(interop.explain(bad(), "equinox", sample_input=(3,)))
    assert max(map(len, text.splitlines())) <= 70
    joined = " ".join(text.split())
    for word in ("model[2][0]", "RReLU", "refused", "(4,)", "3 problems"):
        assert word in joined
    assert "param_type='FrozenState'" in joined


def test_a_report_of_a_network_for_images_fits_eighty_columns_without_cut_words(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    model = images.cnn(Framework("brainstate"))
    report = interop.explain(model, "equinox", sample_input=images.X.shape[1:])
    title, head, *lines = str(report).splitlines()
    assert max(map(len, (title, head, *lines))) <= 80
    assert [line.split()[0] for line in lines[:7]] == [row.path for row in report.rows]
    assert lines[7] == "  model[0]  weight: transpose (3, 2, 0, 1); bias: reshape"
    # the rows of the last weight follow the pixels, whose channels come first there
    (change,) = report.rows[-1].changes
    assert change == "weight: reshape (12, 5, 2), transpose (2, 1, 0), reshape"
    assert "what changes" not in head
    monkeypatch.setenv("COLUMNS", "160")
    title, head, *lines = str(report).splitlines()
    assert "what changes" in head
    assert len(lines) == len(report.rows)


def test_a_report_is_markdown_and_html():
    report = interop.explain(bad(), "equinox", sample_input=(3,))
    lines = report.to_markdown().splitlines()
    assert lines[0].startswith("**brainstate -> equinox does not convert: 3 problems; 5 layers")
    assert lines[4].startswith("| model[0] | Linear | Linear | native |")
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    html = report._repr_html_()
    assert html.count("<tr") == 6
    assert html.count("firebrick") == 3
    assert html.count("<li>") == 3
    stack = brainstate.nn.Sequential(brainstate.nn.ReLU(), lambda x: x)
    assert "&lt;lambda&gt;" in interop.explain(stack, "nnx")._repr_html_()


LAYER_NORMS = {
    "brainstate": brainstate.nn.LayerNorm,
    "equinox": eqx.nn.LayerNorm,
    "linen": nn.LayerNorm,
    "nnx": nnx.LayerNorm,
}


def _layer_norm(fw):
    table = fw.CONSTRUCTORS[LAYER_NORMS[fw.name]]
    return fw.construct(LAYER_NORMS[fw.name], table.x, **table.base)


AT_THE_EDGE = {  # a layer, and by framework what its own layer does; else as the formula does
    "layer norm": (
        _layer_norm,
        "E[x**2] - E[x]**2",
        {"equinox": "centred values"},
    ),
    "dropout of all": (
        lambda fw: fw.dropout(1.0),
        "gradient is 0",
        {"brainstate": "gradient is nan", "equinox": "gradient is nan"},
    ),
}


@pytest.mark.parametrize("name", AT_THE_EDGE)
def test_what_differs_at_the_edge_of_inputs_is_told(source, target, name):
    build, formula, own = AT_THE_EDGE[name]
    module, keywords = source.arguments(build(source))
    (row,) = interop.explain(module, target.name, sample_input=(3,), **keywords).rows
    here, told = own.get(source.name, formula), "; ".join(row.changes)
    there = own.get(target.name, formula) if row.how == "native" else formula
    if source.name == "equinox" and name == "layer norm":  # the target has the option
        there = here
    if here == there:
        assert not any(text in told for text in (formula, *own.values()))
    else:
        assert here in told
        assert there in told


def test_a_row_of_attention_that_is_wholly_masked_is_the_mean_in_all_frameworks():
    """So that there is nothing to tell."""
    q, k, v = (values_of(2, 3, seed=seed) for seed in (50, 51, 52))
    mask = np.zeros((2, 2), bool)
    found = [
        nnx.dot_product_attention(*(x[None, :, None] for x in (q, k, v)), mask=mask)[0, :, 0],
        eqx.nn._attention.dot_product_attention(q, k, v, mask),
        *(
            formulas.attention(*(x[None, :, None] for x in (q, k, v)), mask, core=core)[0, :, 0]
            for core in ("plain", "fused")
        ),
    ]
    for rows in found:
        np.testing.assert_allclose(rows, np.broadcast_to(v.mean(0), (2, 3)), rtol=1e-6)


def test_explaining_draws_nothing_and_changes_nothing(source, target):
    source.needs("batch_norm")
    target.needs("batch_norm")
    model = source.sequential(
        source.batch_norm(SCALE, SHIFT, MEAN, VAR, EPSILON, MOMENTUM), source.dropout(0.3)
    )
    before = [dict(arrays) for arrays in source.read(model)]
    key = brainstate.random.DEFAULT.value
    module, keywords = source.arguments(model)
    assert interop.explain(module, target.name, sample_input=(3,), **keywords).ok
    assert brainstate.random.DEFAULT.value is key
    same = jax.tree.map(lambda a, b: bool((a == b).all()), before, source.read(model))
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("to", ["brainstate", "linen", "equinox"])
def test_explaining_holds_one_layer_at_a_time(to, monkeypatch):
    made, most = [], []
    adapter = registry.adapter(to)
    rule = adapter.builders[interop.specs.Linear]

    def build(spec, ctx):
        built = rule.build(spec, ctx)
        made.append(weakref.ref(adapter.module(built)))
        gc.collect()
        most.append(sum(ref() is not None for ref in made))
        return built

    monkeypatch.setitem(
        adapter.builders, interop.specs.Linear, dataclasses.replace(rule, build=build)
    )
    layers = [nnx.Linear(3, 3, rngs=nnx.Rngs(0)) for _ in range(3)]
    report = interop.explain(nnx.Sequential(*layers[:1], nnx.Sequential(*layers[1:])), to)
    assert report.ok
    assert most == [1, 1, 1]


def test_a_registered_layer_is_in_the_report():
    from .test_registration import GAIN, MAPPINGS, Gain

    model = brainstate.nn.Sequential(brainstate.nn.Linear(3, 4), Gain(GAIN))
    with interop.registered(MAPPINGS["nnx"]):
        (_, row), other = (
            interop.explain(model, "nnx").rows,
            interop.explain(model, "linen"),
        )
    assert (row.source, row.target, row.how) == ("Gain", "NnxGain", "native")
    assert row.changes == ("by registered callbacks",)
    assert [problem.path for problem in other.problems] == ["model[1]"]


def test_bad_arguments_are_errors_and_no_reports():
    for call in (
        lambda: interop.explain(3.0, "nnx"),
        lambda: interop.explain(bad(), "torch"),
        lambda: interop.explain(eqx.nn.Linear, "nnx"),
        lambda: interop.explain(bad(), "nnx", sample_input="abc"),
    ):
        with pytest.raises(interop.ArgumentError):
            call()


def test_no_weight_is_made_to_explain(source, target, monkeypatch):
    """What is not the source's own array is abstract: it has a shape, and no values."""
    for feature in ("layer_norm", "sequential", "activation"):
        source.needs(feature)
        target.needs(feature)
    made = []

    def open_model(model):
        adapter, node = api.open_model(model)
        made.extend(adapter.arrays(node))
        return adapter, node

    monkeypatch.setattr(report, "open_model", open_model)
    module, keywords = source.arguments(stack(source))
    rows = interop.explain(module, target.name, sample_input=(3,), **keywords).rows
    copied = [row for row in rows if row.copied]
    assert len(copied) == (2 if "equinox" in (source.name, target.name) else 0)
    assert len(made) == 6
    assert sum(isinstance(array, jax.core.Tracer) for array in made) == len(copied)
