"""Write the table of what converts into README.md: python tests/support_table.py [--check]."""

from __future__ import annotations

import sys
import textwrap
from collections import defaultdict
from pathlib import Path

import shims
from interop.registry import registry
from shims.core import side_of
from tests.pairs import CASES

README = Path(__file__).parents[1] / "README.md"


def table() -> str:
    """Markdown: a row for each spec, a column for each framework, from the rules themselves."""
    adapters = [registry.adapter(name) for name in registry.names()]
    classes: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    builds: dict[str, set[str]] = defaultdict(set)
    composites: dict[str, set[str]] = defaultdict(set)
    for adapter in adapters:
        shipped = set(adapter.composites.values())
        for rule in adapter.readers.values():
            if rule.layer_type in shipped:
                composites[rule.spec_type.__name__].add(adapter.name)
                continue
            classes[rule.spec_type.__name__][adapter.name].append(rule.layer_type.__name__)
        for rule in adapter.builders.values():
            builds[rule.spec_type.__name__].add(adapter.name)
    lines = [
        "| layer | " + " | ".join(a.name for a in adapters) + " |",
        "|---" * (len(adapters) + 1) + "|",
    ]
    for spec in sorted(builds.keys() | classes.keys() | composites.keys()):
        cells = [
            ", ".join(f"`{name}`" for name in sorted(classes[spec][a.name]))
            or ("function" if a.name in builds[spec] else "")
            or ("composite" if a.name in composites[spec] else "")
            for a in adapters
        ]
        lines.append(f"| {spec} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def pairs() -> str:
    """Markdown: the public class that wraps a guest (row) for a host (column)."""
    names = registry.names()
    lines = ["| guest \\ host | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for guest in names:
        cells = ["itself" if guest == host else f"`{_shim(guest, host)}`" for host in names]
        lines.append(f"| {guest} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def covered() -> str:
    """Markdown: what the tests run for every pair, from the table that they are made of."""
    text = f"For each of them the tests run, against plain JAX: {', '.join(CASES)}."
    return f"{textwrap.fill(text, 96)}\n"


def _shim(guest: str, host: str) -> str:
    """The name under which ``shims`` has the class: of the host, or of the guest."""
    if side_of(guest, "guest") is None or side_of(host, "host") is None:
        return ""
    found = {name.lower(): name for name in shims.__all__}
    return found.get(f"to{host}") or found[f"from{guest}"]


_PARTS = {"table": table, "pairs": lambda: f"{pairs()}\n{covered()}"}


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
    old = README.read_text()
    if "--check" in sys.argv:
        sys.exit(old != with_table(old))
    README.write_text(with_table(old))
