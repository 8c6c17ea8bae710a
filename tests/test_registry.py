"""Frameworks are found by their files, and imported when they are needed."""

import importlib.metadata
import types

import pytest

import interop
from interop import specs
from interop.registry import Adapter, Registry


@pytest.fixture
def package(tmp_path, monkeypatch):
    """``make(framework=code)``: a registry over a package with such files in it."""

    def make(**files):
        name = f"frameworks_of_{tmp_path.name}"
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").write_text("")
        for file, code in files.items():
            (folder / f"{file}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        return Registry(importlib.import_module(name))

    return make


def test_a_missing_package_is_named_with_the_command_that_installs_it(package):
    registry = package(absent="import package_that_is_not_there.nn")
    with pytest.raises(interop.MissingDependencyError) as e:
        registry.adapter("absent")
    assert isinstance(e.value, ImportError)
    assert (e.value.framework, e.value.package) == ("absent", "package_that_is_not_there")
    assert "pip install package_that_is_not_there" in str(e.value)
    assert isinstance(e.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import jax.module_that_is_not_there", "ModuleNotFoundError"),
        ("from jax import name_that_is_not_there", "ImportError"),
        ("import jax; jax.name_that_is_not_there", "AttributeError"),
        ("raise RuntimeError('half installed')", "half installed"),
    ],
)
def test_a_broken_package_is_not_called_missing(package, code, words):
    with pytest.raises(interop.BrokenDependencyError, match=words) as e:
        package(broken=code).adapter("broken")
    assert isinstance(e.value, ImportError)
    assert e.value.framework == "broken"
    assert f"jax {importlib.metadata.version('jax')}" in str(e.value)
    assert e.value.__cause__ is not None


def test_a_broken_package_names_the_versions_on_the_way(package):
    """The cause may lie in a package that the framework imports: show both versions."""
    source = "import numpy as np\nnp.testing.assert_array_equal(1, 2)"
    with pytest.raises(interop.BrokenDependencyError) as e:
        package(broken=source).adapter("broken")
    assert e.value.versions.keys() >= {"jax", "numpy"}


def test_a_missing_framework_is_left_out_of_the_table(package):
    hub = """
from interop.registry import Adapter
class Hub(Adapter):
    name, module_type, is_hub = "hub", type, True
Hub.__abstractmethods__ = frozenset()  # nothing here calls them
adapter = Hub()
"""
    registry = package(hub=hub, absent="import package_that_is_not_there")
    assert registry.names() == ["absent", "hub"]
    found, others = registry.hub()
    assert (found.name, others) == ("hub", [])


def test_an_object_of_no_framework_is_not_one(package):
    registry = package(broken="raise RuntimeError")
    assert registry.framework_of(3.0) is None
    with pytest.raises(interop.BrokenDependencyError):
        registry.framework_of(types.new_class("Model", (), {}, _in_module("lib.broken.nn"))())


def _in_module(name):
    return lambda namespace: namespace.update(__module__=name)


def test_a_second_rule_for_one_type_is_an_error():
    class Toy(Adapter):
        name, module_type = "toy", object

    Toy.__abstractmethods__ = frozenset()  # nothing here calls them
    toy = Toy()

    @toy.reads(int, specs.Linear)
    def read_int(node, ctx):
        return None

    @toy.builds(specs.Linear)
    def build_int(spec, ctx):
        return None

    with pytest.raises(ValueError, match="reads int already"):
        toy.reads(int, specs.Linear)(read_int)
    with pytest.raises(ValueError, match="builds Linear already"):
        toy.builds(specs.Linear)(build_int)
