"""Write the tables of pairs and of kinds of layer: python tests/support_table.py [--check]."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from interop.support import layers, refused
from shims.support import pairs
from tests.pairs import CASES

ROOT = Path(__file__).parents[1]
FILES = (ROOT / "README.md", ROOT / "docs" / "kinds.md")


def covered() -> str:
    """Markdown: what the tests run for every pair, from the table that they are made of."""
    what = "a model with batch normalisation and dropout, in training and evaluation"
    how = "in Equinox with batches and with single examples"
    text = (
        f"For each of them the tests run, against plain JAX, {what}, {how}: {', '.join(CASES)}."
    )
    return f"{textwrap.fill(text, 96)}\n"


_PARTS = {
    "table": lambda: layers().to_markdown(),
    "refused": lambda: refused().to_markdown(),
    "pairs": lambda: f"{pairs().to_markdown()}\n{covered()}",
}


def with_table(text: str) -> str:
    """``text`` with the parts between the markers replaced."""
    for name, make in _PARTS.items():
        start = f"<!-- {name}: written by tests/support_table.py -->\n"
        before, found, rest = text.partition(start)
        if found:
            _, end, after = rest.partition(f"<!-- end of {name} -->")
            text = f"{before}{start}\n{make()}\n{end}{after}"
    return text


if __name__ == "__main__":
    new = {file: with_table(file.read_text()) for file in FILES}
    if "--check" in sys.argv:
        sys.exit(any(file.read_text() != text for file, text in new.items()))
    for file, text in new.items():
        file.write_text(text)
