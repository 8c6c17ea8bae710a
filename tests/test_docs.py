"""README, examples and the generated table are what they claim."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from flax import nnx

from tests import STRICT
from tests.notebook import CELL

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
PAGES = sorted(p.name for p in (ROOT / "docs").glob("*.md") if BLOCK.search(p.read_text()))
HAS_ONNX = importlib.util.find_spec("jax2onnx") is not None


def printed_by(block: str, scope: dict[str, object]) -> list[str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(block, "README.md", "exec"), scope)
    return out.getvalue().splitlines()


def promised_by(block: str) -> list[str]:
    """What the comments after ``print`` say: on its line, or on lines of their own after it."""
    lines = block.splitlines()
    inline = [re.search(r"\bprint\(.*\)  # (.+)$", line) for line in lines]
    below = [re.match(r"# (.+)$", line) for line in lines]
    return [m.group(1) for pair in zip(inline, below, strict=True) for m in pair if m]


def test_the_readmes_programs_print_what_they_promise():
    assert len(BLOCK.findall(README)) >= 6
    run_readme()


@pytest.mark.parametrize("page", PAGES)
def test_the_programs_of_the_manual_print_what_they_promise(page):
    run_blocks((ROOT / "docs" / page).read_text())


def test_the_manual_has_programs_and_every_page_is_in_its_contents():
    assert {"index.md", "migrating.md", "how_it_works.md"} <= set(PAGES)
    contents = (ROOT / "mkdocs.yml").read_text()
    pages = sorted(p.relative_to(ROOT / "docs") for p in (ROOT / "docs").rglob("*.md"))
    assert [str(page) for page in pages if f"- {page}" not in contents] == []


def run_readme() -> None:
    run_blocks(README)


def run_blocks(text: str) -> None:
    blocks = BLOCK.findall(text)
    scope: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        promised = promised_by(block)
        assert promised, f"this block promises nothing:\n{block}"
        if "onnxruntime" in block and not HAS_ONNX:
            continue  # tests/test_onnx.py runs them all where it is installed
        assert printed_by(block, scope) == promised, block


def test_the_readme_shows_each_artefact_in_at_most_five_lines():
    section = README.partition("## Take it with you\n")[2].partition("\n## ")[0]
    blocks = BLOCK.findall(section)
    for artefact in ("safetensors", "orbax", "jax.export", "to_onnx"):
        (block,) = (b for b in blocks if artefact in b)
        assert len([line for line in block.splitlines() if line]) <= 5, block


@pytest.mark.skipif(
    not hasattr(nnx, "RoPE"), reason="the table is of the newest versions, which have nnx.RoPE"
)
@pytest.mark.parametrize("script", ["support_table.py", "layer_table.py"])
def test_the_tables_of_what_converts_are_current(script):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    script = ROOT / "tests" / script
    done = subprocess.run([sys.executable, script, "--check"], env=env, check=False)
    assert done.returncode == 0, "stale: run `make table` on Python 3.13"


REFUSED = {
    *(("EventFixedNumConn", "brainstate"), ("RReLU", "brainstate")),
    *(("List", "nnx"), ("Dict", "nnx"), ("SpectralNorm", "nnx"), ("WeightNorm", "nnx")),
    *(("Fp8DirectDotGeneralOp", "linen"), ("Fp8DotGeneralOp", "linen")),
    *(("Fp8Einsum", "linen"), ("NANOOFp8DotGeneralOp", "linen")),
}


def test_no_other_layers_are_refused_than_those_that_are_known():
    text = (ROOT / "docs" / "support.md").read_text()
    table = text.partition("## What is refused")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in table.strip().splitlines()[2:]]
    assert {(row[0].strip("| `"), row[1]) for row in rows} == REFUSED
    assert "416 of 428 pairs to and from BrainState convert" in " ".join(text.split())


EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_in_the_gallery_and_in_the_manual_and_made_of_cells(name):
    assert f"]({name})" in (ROOT / "examples" / "README.md").read_text()
    assert f'"examples/{name}"' in (ROOT / "docs" / "examples.md").read_text()
    script = (ROOT / "examples" / name).read_text()
    text, *cells = CELL.split(script)
    assert ast.get_docstring(ast.parse(text))
    assert len(cells) >= 3
    assert not re.search("__file__|__main__", script)  # then it runs as a script too


def test_what_the_readme_links_to_is_there():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for script in re.findall(r"python (examples/\S+\.py)", README):
        assert (ROOT / script).exists(), script


def run_example(name: str, *arguments: object) -> str:
    """What the example prints, run as a notebook; warnings are errors."""
    notebook, script = ROOT / "tests" / "notebook.py", ROOT / "examples" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, *STRICT, notebook, script, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_model_of_four_frameworks_trains_alike_in_all_four_hosts():
    text = run_example("four_frameworks_one_model", "--steps", 120)
    rows = re.findall(r"^\S.*?\s{2,}([\d.]+)\s+([\d.]+)\s+([\d.]+)%$", text, re.MULTILINE)
    assert len(rows) == 4
    assert all(float(accuracy) > 90 for *_, accuracy in rows)
    assert number(text, "largest difference of the first 20 losses") < 1e-4


def test_a_brainstate_rnn_trains_inside_linen():
    text = run_example("brainstate_rnn_in_linen")
    assert "own weights: True" in text
    assert number(text, "test accuracy") > 94
    assert number(text, "largest change of the BrainState weight") > 0.01


def test_equinox_layers_train_inside_brainstate():
    text = run_example("wrap_equinox_in_brainstate")
    assert "trainable states: 7, of which Equinox's: 6" in text
    assert number(text, "test accuracy") > 93
    assert "its running mean moved: True" in text


def test_a_model_of_three_frameworks_is_taken_along_in_four_formats(tmp_path):
    check_artefacts(run_example("train_mixed_export_pure", "--out", tmp_path))


def check_artefacts(text: str) -> None:
    """Each was loaded without the guests' frameworks, and is as accurate as the model."""
    assert "model.layers[0]: RowReader, trace" in text
    assert "model.layers[1]: Linear, structural" in text
    rows = re.findall(r"^(\S+|\(.*\)) +([\d.]+)% *(.*)$", text, re.MULTILINE)
    accuracies, imported = {r[1] for r in rows}, {r[0]: r[2] for r in rows}
    expected = {"(live model)": "", "(materialized)": "", "StableHLO": "jax"}
    expected |= dict.fromkeys(("safetensors", "orbax"), "flax, jax")
    if HAS_ONNX:
        expected["ONNX"] = "onnxruntime"
    else:
        assert re.search("^ONNX +not written: .*jax2onnx", text, re.MULTILINE)
    assert imported == expected
    assert len(accuracies) == 1
    assert float(accuracies.pop()) > 96
    assert float(re.search(r"took (\d+) s", text).group(1)) < 120


@pytest.fixture(scope="module")
def embed_in_flax(tmp_path_factory):
    out = tmp_path_factory.mktemp("embed_in_flax")
    return run_example("embed_in_flax", "--out", out), out


def number(text: str, label: str) -> float:
    return float(re.search(rf"{label}:\s+([-+.\de]+)", text).group(1))


def test_the_example_reaches_97_percent_and_keeps_it_without_brainstate(embed_in_flax):
    text, _ = embed_in_flax
    live = number(text, "test accuracy with the live block")
    assert live >= 97.0
    assert number(text, "test accuracy without BrainState") == live
    assert number(text, "largest difference of the logits after") < 1e-4
    assert number(text, "BrainState objects left in the model") == 0


def test_the_example_moves_the_brainstate_weights_and_restores_its_checkpoint(embed_in_flax):
    text, out = embed_in_flax
    assert number(text, "largest change of the BrainState weight") > 0.01
    assert "the Flax model holds the same array:     True" in text
    assert text.count("predictions equal after restoring:       True") == 2
    assert (out / "training.png").stat().st_size > 10_000
    assert float(re.search(r"took (\d+) s", text).group(1)) < 120


def test_the_example_of_conversion_looks_proves_and_goes_on_training():
    text = run_example("convert_models")
    for line in (
        "problems found at once: 2",
        "the Flax model holds the same arrays: True",
        "equal (rtol=2e-05, atol=2e-05)",
        "the loss falls at every step: True",
        "a registered layer converts: True",
    ):
        assert line in text
