"""A bar on a terminal, and pictures of reports."""

from __future__ import annotations

import io
import sys
import time

import brainstate
import jax.numpy as jnp
import matplotlib
import pytest

import interop
from interop import progress
from interop.walk import Building

from .cases import BIAS, BIAS_2, WEIGHT, WEIGHT_2, array


class Terminal(io.StringIO):
    def isatty(self):
        return True


def slow(x):
    time.sleep(0.1)
    return x


@pytest.mark.parametrize(
    ("stream", "delay", "shows"),
    [(Terminal, 0.0, True), (Terminal, 60.0, False), (io.StringIO, 0.0, False)],
    ids=["slow on a terminal", "fast on a terminal", "no terminal"],
)
def test_a_bar_is_shown_after_a_while_on_a_terminal_alone(stream, delay, shows, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", delay)
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setenv("TERM", "xterm")
    model = brainstate.nn.Sequential(brainstate.nn.Linear(3, 4), brainstate.nn.Linear(4, 2))
    model.layers.append(slow)
    build = Building.build
    monkeypatch.setattr(Building, "build", lambda self, spec: slow(build(self, spec)))
    interop.to_nnx(model)
    interop.export(model, jnp.ones((1, 3)))
    text = sys.stderr.getvalue()
    assert ("converting to nnx" in text) is shows
    assert ("exporting" in text) is shows
    assert progress._bar.get() is None


def test_the_bar_comes_after_a_second():
    assert progress.DELAY == 1.0


def test_an_interrupt_leaves_the_source_unchanged_and_ends_the_bar(source, target, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "DELAY", 0.0)
    model = source.sequential(source.linear(WEIGHT, BIAS), source.linear(WEIGHT_2, BIAS_2))
    before = [dict(arrays) for arrays in source.read(model)]
    build, calls = Building._build, []

    def interrupted(self, spec):
        calls.append(spec)
        if len(calls) == 3:  # the stack, its first layer, and then
            raise KeyboardInterrupt
        return build(self, spec)

    monkeypatch.setattr(Building, "_build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        target.convert_from(source, model)
    after = source.read(model)
    for wanted, found in zip(before, after, strict=True):
        assert wanted.keys() == found.keys()
        assert all((wanted[name] == found[name]).all() for name in wanted)
    assert progress._bar.get() is None


@pytest.fixture
def agg():
    before = matplotlib.get_backend()
    matplotlib.use("Agg")
    yield
    import matplotlib.pyplot as plt

    plt.close("all")
    matplotlib.use(before)


@pytest.mark.usefixtures("agg")
def test_a_report_is_drawn_with_what_is_shared_moved_and_refused(tmp_path):
    model = brainstate.nn.Sequential(
        brainstate.nn.Linear(3, 4), brainstate.nn.ReLU(), brainstate.nn.RReLU()
    )
    report = interop.explain(model, to="equinox")
    axes = report.plot()
    shared, copied, refused = (list(bars) for bars in axes.containers)
    assert [bar.get_width() for bar in shared] == [16, 0, 0]
    assert [bar.get_width() for bar in copied] == [48, 0, 0]
    assert [bar.get_width() > 0 for bar in refused] == [False, False, True]
    texts = [text.get_text().strip() for text in axes.texts]
    assert texts[0] == "native; weight: transpose (1, 0)"
    assert "RReLU" in texts[2]
    axes.figure.savefig(tmp_path / "report.png")


@pytest.mark.usefixtures("agg")
def test_a_comparison_is_drawn_through_depth_into_given_axes(tmp_path):
    import matplotlib.pyplot as plt

    model = brainstate.nn.Sequential(brainstate.nn.Linear(3, 4), brainstate.nn.Linear(4, 2))
    other = interop.to_nnx(model)
    other.layers[1].bias.set_value(other.layers[1].bias.get_value() + 0.01)
    comparison = interop.compare(model, other, array(5, 3))
    _, given = plt.subplots()
    axes = comparison.plot(given)
    assert axes is given
    assert [label.get_text() for label in axes.get_xticklabels()] == ["model[0]", "model[1]"]
    first, second = axes.lines[0].get_ydata()
    assert first < comparison.rtol < second
    axes.figure.savefig(tmp_path / "comparison.png")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    report = interop.explain(brainstate.nn.Linear(3, 4), to="nnx")
    with pytest.raises(interop.MissingDependencyError, match="pip install matplotlib"):
        report.plot()
