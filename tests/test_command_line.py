"""``python -m interop``: what is installed, what works with what, and one model explained."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from interop.__main__ import main
from interop.errors import BrokenDependencyError, MissingDependencyError
from interop.registry import registry

ROOT = Path(__file__).parents[1]
MODELS = """
import brainstate, flax.linen as nn, jax.numpy as jnp
from flax import nnx

def conv():
    return nnx.Sequential(nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)), nnx.relu)

def linen():
    return nn.Dense(4), {"params": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}

model = brainstate.nn.Linear(3, 4)
number = 3
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    (tmp_path / "some_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "some_models", raising=False)


@pytest.mark.usefixtures("models")
def test_a_users_model_is_explained(capsys):
    assert main(["explain", "some_models:conv", "--to", "brainstate"]) == 1
    assert "does not convert: 1 problem" in capsys.readouterr().out
    shape = ["--sample-input", "8,8,3"]
    assert main(["explain", "some_models:conv", "--to", "brainstate", *shape]) == 0
    assert "Conv2d" in capsys.readouterr().out
    assert main(["explain", "some_models:linen", "--to", "nnx", "--markdown"]) == 0
    assert "| model | Dense | Linear | native |" in capsys.readouterr().out
    assert main(["explain", "some_models:model", "--to", "equinox"]) == 0
    assert "transpose (1, 0)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no_such_models:model"], "there is no module 'no_such_models'"),
        (["some_models:missing"], "some_models has no 'missing'"),
        (["some_models"], "package.module:factory"),
        (["some_models:number"], "builtins.int is not a module of"),
        (["some_models:conv", "--sample-input", "8,x"], "'8,x' is no shape"),
    ],
)
@pytest.mark.usefixtures("models")
def test_a_wrong_argument_is_told_without_a_traceback(arguments, words, capsys):
    with pytest.raises(SystemExit) as e:
        main(["explain", *arguments, "--to", "nnx"])
    assert e.value.code == 2
    assert words in capsys.readouterr().err


def test_the_program_prints_versions_pairs_and_layers():
    done = subprocess.run(
        [sys.executable, "-m", "interop"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    words = done.stdout.split()
    assert words.count("works") == len(registry.names())
    assert {"flax", "ToEquinox", "FromLinen", "LayerNorm", "composite"} <= set(words)


def test_conversions_are_shown_where_there_are_no_shims(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "shims"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "shims", None)  # its import fails
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "LayerNorm" in out
    assert "ToEquinox" not in out


def test_what_is_missing_or_broken_is_said_and_the_rest_is_shown(monkeypatch, capsys):
    found = registry.adapter

    def adapter(name):
        if name == "equinox":
            raise MissingDependencyError(name, "equinox")
        if name == "linen":
            raise BrokenDependencyError(name, ValueError("no"), {"flax": "1", "jax": "2"})
        return found(name)

    monkeypatch.setattr(registry, "adapter", adapter)
    assert main([]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "not installed: pip install equinox" in out
    assert "flax 1, jax 2" in out
    assert "FromNNX" in out
    assert "ToEquinox" not in out
