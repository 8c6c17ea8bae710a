"""Rules of the project that no reader should have to enforce."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import brainstate
import jax.numpy as jnp
import pytest

import interop
import shims

ROOT = Path(__file__).parents[1]
PACKAGES = [interop, shims]
FOLDERS = ("interop", "interop/formulas", "interop/specs", "shims")
SHARED = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
NAMES = ("brainstate", "equinox", "eqx", "flax", "linen", "nnx")
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def without_docstrings(tree):
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and is_docstring(body[0]):
            del body[0]
    return tree


def is_docstring(statement):
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def words(tree):
    """Every identifier, keyword, imported name and string in a piece of code, with its line."""
    for node in ast.walk(tree):
        for _, value in ast.iter_fields(node):
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, str):
                    yield part, getattr(node, "lineno", 0)


def only_dispatches(function):
    """Whether a function is one ``return`` of one call of another."""
    match function.body:
        case [ast.Return(value=ast.Call())]:
            return True
    return False


def judged(path):
    """The code of a shared file in which no framework may be named: all of it.

    In ``__init__.py``, which declares the public names and their types, only the bodies of
    functions, and not of a public function that only dispatches.
    """
    tree = without_docstrings(ast.parse(path.read_text()))
    if path.name != "__init__.py":
        return [tree]
    functions = [node for node in tree.body if isinstance(node, FUNCTIONS)]
    package = ".".join(path.parent.relative_to(ROOT).parts)
    public = importlib.import_module(package).__all__
    return [
        statement
        for function in functions
        if not (function.name in public and only_dispatches(function))
        for statement in function.body
    ]


@pytest.mark.parametrize("path", SHARED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shared_code_names_no_framework(path):
    found = [
        f"{path.name}:{line}: {word}"
        for tree in judged(path)
        for word, line in words(tree)
        if any(name in word.lower().replace("onnx", "") for name in NAMES)  # a file format
    ]
    assert found == []


def test_the_search_for_names_would_find_them():
    code = "def f(x):\n    'nnx in a docstring'\n    return g(x, to='Linen') if nnx else flax.y"
    found = {word for word, _ in words(without_docstrings(ast.parse(code)))}
    assert {"Linen", "nnx", "flax"} <= found
    assert "nnx in a docstring" not in found
    (function,) = ast.parse("def f(x):\n    return g(x, 'nnx')").body
    assert only_dispatches(function)
    (function,) = ast.parse("def f(x):\n    return 'nnx' if x else g(x)").body
    assert not only_dispatches(function)


def test_importing_the_library_imports_no_framework_and_nothing_slow():
    code = (
        "import sys, interop, shims; "
        "slow = {'interop.specs.linear', 'interop.comparison', 'shims.program', 'rich'}; "
        "print(({'brainstate', 'brainunit', 'equinox', 'flax'} | slow) & sys.modules.keys())"
    )
    assert run_python("-c", code, cwd=ROOT) == "set()\n"


@pytest.mark.parametrize("package", [interop, shims])
def test_every_public_name_can_be_imported(package):
    assert dir(package) == sorted(package.__all__)
    assert all(hasattr(package, name) for name in package.__all__)
    assert not hasattr(package, "no_such_name")


def test_conversions_do_not_depend_on_live_shims():
    paths = (ROOT / "interop").rglob("*.py")
    nodes = [(p.name, n) for p in paths for n in ast.walk(ast.parse(p.read_text()))]
    named = [(p, a.name) for p, n in nodes if isinstance(n, ast.Import) for a in n.names]
    named += [(p, n.module or "") for p, n in nodes if isinstance(n, ast.ImportFrom)]
    assert [found for found in named if found[1].partition(".")[0] == "shims"] == []


def run_python(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_no_assert_guards_against_a_callers_mistake():
    """``python -O`` drops them, and they have neither path nor remedy."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for package in ("interop", "shims")
        for path in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert found == []


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_name_has_a_docstring(package):
    assert sorted(package.__all__) == package.__all__
    bare = [name for name in package.__all__ if not getattr(package, name).__doc__]
    assert bare == []


COMPOSITES = [
    importlib.import_module(f"interop.composites.{name}")
    for name in ("brainstate", "equinox", "linen", "nnx")
]
SPECS = [
    name
    for name in interop.specs.__all__
    if isinstance(cls := getattr(interop.specs, name), type)
    and issubclass(cls, interop.specs.Spec)
]
ABSTRACT = {"Cell", "Convolution", "Deferred", "Formula", "Norm", "NormalizedWeight"}
PUBLIC = [
    *((package, name) for package in PACKAGES for name in package.__all__ if name != "specs"),
    *((module, name) for module in COMPOSITES for name in ("Composite", "Cell")),
    *((module, cls.__name__) for module in COMPOSITES for cls in module.COMPOSITES),
    *((interop.specs, name) for name in sorted({*SPECS} - ABSTRACT)),
]


@pytest.mark.parametrize(("package", "name"), PUBLIC, ids=lambda x: getattr(x, "__name__", x))
def test_the_documentation_of_a_public_name_has_an_example_and_its_errors(package, name):
    found = getattr(package, name)
    text = inspect.getdoc(found)
    assert ">>> " in text
    assert "Raises:" in text or isinstance(found, type)


def test_a_public_object_is_shown_in_a_line():
    layer = brainstate.nn.Sequential(brainstate.nn.Linear(3, 4), brainstate.nn.ReLU())
    converted = interop.to_nnx(layer)
    shown = [
        interop.explain(layer, to="nnx"),
        interop.compare(layer, converted, jnp.ones((2, 3))),
        interop.mapping(layer, converted),
        shims.explain(shims.ToNNX(layer)),
        interop.specs.Linear(weight=jnp.ones((30, 40)), bias=None, mask=jnp.ones((30, 40))),
    ]
    assert [repr(x) for x in shown] == [
        "<Report: brainstate -> nnx converts; 2 layers, 64 B shared, 0 B copied>",
        "<Comparison: equal (rtol=2e-05, atol=2e-05)>",
        "<WeightMapping: brainstate -> nnx: 2 parameters>",
        "<LinkReport: Sequential in ToNNX, live: one array, seen by both sides; 2 arrays>",
        "Linear(weight=float32[30, 40], bias=None, mask=float32[30, 40])",
    ]


MODULES = sorted(
    name
    for package in PACKAGES
    for name in (
        package.__name__,
        *(m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")),
    )
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_run(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_a_fifth_framework_joins_by_its_files_alone(tmp_path):
    toy = ROOT / "tests" / "toy"
    for folder in ("interop", "shims", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(toy / "interop.py", tmp_path / "interop" / "frameworks" / "toy.py")
    shutil.copy(toy / "shims.py", tmp_path / "shims" / "frameworks" / "toy.py")
    shutil.copy(toy / "models.py", tmp_path / "tests" / "models" / "toy.py")
    shutil.copy(toy / "toyframe.py", tmp_path / "toy.py")
    topics = ("layers", "ties", "options", "errors", "shims_pairs", "comparison")
    tests = [f"tests/test_{topic}.py" for topic in topics]
    output = run_python("-m", "pytest", "-k", "toy", "-vv", *tests, cwd=tmp_path)
    for pair in ("toy-nnx", "brainstate-toy", "linen-toy", "toy-equinox"):
        assert f"test_the_converted_model_compiles[{pair}-small stack] PASSED" in output
        assert f"test_a_stack_of_layers_is_live_in_every_host[{pair}] PASSED" in output
        assert f"test_a_small_stack_is_compared_layer_by_layer[{pair}] PASSED" in output
        assert f"test_materialize_gives_the_hosts_own_layer[{pair}] PASSED" in output
    assert (
        "test_an_option_is_carried_over_or_refused_by_name[toy-nnx-Linear-bias] PASSED"
        in output
    )
