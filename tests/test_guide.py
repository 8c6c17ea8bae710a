"""BrainState's interop guide runs on this library with its import line as the only change."""

import contextlib
import io

import pytest

import interop

from .guide import CELLS, SUPPORTED


@pytest.mark.parametrize("cell", range(1, len(CELLS)))
def test_a_cell_of_the_guide_prints_what_the_guide_shows(cell):
    scope = {"__name__": "__main__"}
    for code, _ in [cells for i, cells in enumerate(CELLS[:cell]) if i in (0, 2)]:
        exec(compile(code, "guide", "exec"), scope)
    code, promised = CELLS[cell]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "guide", "exec"), scope)
    if promised is not None:
        assert out.getvalue().splitlines() == promised


@pytest.mark.parametrize("framework", SUPPORTED)
def test_the_layers_that_the_guide_lists_are_supported(framework):
    supported = interop.supported_layers(framework)[framework]
    assert [name for name in SUPPORTED[framework].split(", ") if name not in supported] == []
