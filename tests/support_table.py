"""Write the table of what converts into README.md: python tests/support_table.py [--check]."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from interop.registry import registry

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- table: written by tests/support_table.py -->\n", "<!-- end of table -->"


def table() -> str:
    """Markdown: a row for each spec, a column for each framework, from the rules themselves."""
    adapters = [registry.adapter(name) for name in registry.names()]
    classes: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    builds: dict[str, set[str]] = defaultdict(set)
    for adapter in adapters:
        for rule in adapter.readers.values():
            classes[rule.spec_type.__name__][adapter.name].append(rule.layer_type.__name__)
        for rule in adapter.builders.values():
            builds[rule.spec_type.__name__].add(adapter.name)
    lines = [
        "| layer | " + " | ".join(a.name for a in adapters) + " |",
        "|---" * (len(adapters) + 1) + "|",
    ]
    for spec in sorted(builds.keys() | classes.keys()):
        cells = [
            ", ".join(f"`{name}`" for name in sorted(classes[spec][a.name]))
            or ("function" if a.name in builds[spec] else "")
            for a in adapters
        ]
        lines.append(f"| {spec} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """``text`` with the part between the markers replaced."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    old = README.read_text()
    if "--check" in sys.argv:
        sys.exit(old != with_table(old))
    README.write_text(with_table(old))
