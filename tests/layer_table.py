"""Write docs/support.md, a row for each public layer: python tests/layer_table.py [--check].

Every row is the answer of ``interop.explain`` for a layer that the tests build, and its options
are those of the table that the tests run. Run it on Python 3.13, whose layers are the newest.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from pathlib import Path

import interop
from interop.registry import registry
from interop.support import Grid
from tests.cases import array
from tests.conftest import NAMES, Framework
from tests.models import ALL, Option

SUPPORT = Path(__file__).parents[1] / "docs" / "support.md"
HOW = ("native", "function", "composite", "refused")
_INTRO = """# What converts, layer by layer

Each public layer of each framework, built as the tests build it, and what it becomes in the
others: **native**, a class of the target; **function**, a plain callable; **composite**, a
module of `interop.composites` with the source's formula; **refused**, with the reason. Options
that no column names do not change the result.
"""
# Rows that are no classes: plain functions in a stack, and Flax's functions for pooling.
_FUNCTIONS = {"nnx": 1, "linen": 3}


def public_layers(name: str) -> dict[str, type]:
    """The framework's public classes of modules, but for those that are no layers."""
    models = Framework(name)
    return {
        label: cls
        for label, cls in sorted(vars(models.NAMESPACE).items())
        if inspect.isclass(cls)
        and issubclass(cls, models.MODULE)
        and not label.startswith("_")
        and not issubclass(cls, models.NO_LAYERS)
        and cls not in models.BASES
        and vars(models.NAMESPACE).get(cls.__name__, cls) is cls
        and (label == cls.__name__ or not hasattr(models.NAMESPACE, cls.__name__))
    }


def verdict(name: str, cls: type, goal: str) -> tuple[str, str]:
    """What becomes of a plain layer of that class: how, and into what or why not."""
    fw, refused = Framework(name), registry.adapter(name).refused
    if cls in refused:
        return "refused", refused[cls]
    constructor = fw.CONSTRUCTORS[cls]
    if isinstance(constructor, str):
        return by_rule(name, cls, goal)
    x = array(*constructor.x) if isinstance(constructor.x, tuple) else constructor.x
    module, keywords = fw.arguments(fw.construct(cls, constructor.x, **constructor.base))
    report = interop.explain(module, goal, sample_input=x.shape[1:], **keywords)
    if report.problems:
        return "refused", report.problems[0].problem
    how = max((row.how for row in report.rows), key=HOW.index)
    return how, ", ".join(dict.fromkeys(row.target for row in report.rows if row.target))


def by_rule(name: str, cls: type, goal: str) -> tuple[str, str]:
    """The same for a layer that stands in no table: what the target has for its spec."""
    target = registry.adapter(goal)
    spec_type = registry.adapter(name).readers[cls].spec_type
    rules = target.readers.values()
    native = {rule.layer_type.__name__ for rule in rules if rule.spec_type is spec_type}
    native -= {composite.__name__ for composite in target.composites.values()}
    if spec_type in target.builders:
        return ("native", ", ".join(sorted(native))) if native else ("function", "")
    return "composite", target.composites[spec_type].__name__


def options(name: str, cls: type) -> tuple[str, str]:
    """The options that are carried everywhere; and those refused, with by whom."""
    constructor = Framework(name).CONSTRUCTORS.get(cls)
    carried, refused = [], []
    for option, mark in getattr(constructor, "options", {}).items():
        if isinstance(mark, Option) and mark.refused:
            goals = "" if mark.refused == ALL else f" ({', '.join(mark.refused)})"
            refused.append(f"{option}{goals}")
        elif isinstance(mark, Option):
            carried.append(option)
    return ", ".join(carried), ", ".join(refused)


def support() -> str:
    """The text of docs/support.md."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    refused: dict[tuple[str, str, str], list[str]] = {}
    sections: list[str] = []
    for name in NAMES:
        goals = [goal for goal in NAMES if goal != name]
        rows: list[tuple[str, ...]] = []
        for label, cls in public_layers(name).items():
            verdicts = [verdict(name, cls, goal) for goal in goals]
            for goal, (how, _) in zip(goals, verdicts, strict=True):
                counts.setdefault((name, goal), Counter())[how] += 1
            for goal, (how, why) in zip(goals, verdicts, strict=True):
                if how == "refused":
                    why = str(getattr(why, "problem", why))
                    refused.setdefault((label, name, why), []).append(goal)
            cells = [f"**{how}** {what}".replace("|", "\\|") for how, what in verdicts]
            rows.append((f"`{label}`", *cells, *options(name, cls)))
        grid = Grid(("layer", *goals, "options carried", "options refused"), tuple(rows))
        sections.append(f"## From {name}\n\n{grid.to_markdown()}")
    left = Grid(
        ("layer", "from", "to", "why"),
        tuple((f"`{k[0]}`", k[1], ", ".join(goals), k[2]) for k, goals in refused.items()),
    )
    parts = [_INTRO, _summary(counts).to_markdown(), _total(counts)]
    return "\n".join([*parts, "## What is refused\n", left.to_markdown(), *sections])


def _total(counts: dict[tuple[str, str], Counter[str]]) -> str:
    """How many pairs with BrainState on one side there are, and convert."""
    of_hub = {pair: count for pair, count in counts.items() if "brainstate" in pair}
    rows = sum(count.total() for count in of_hub.values())
    convolutions = sum(
        2 * sum(f"{kind}1d" not in public_layers(a) for kind in ("Conv", "ConvTranspose"))
        for a, b in of_hub
        if b == "brainstate"
    )
    rows += convolutions + sum(_FUNCTIONS.get(a, 0) for a, b in of_hub if b == "brainstate")
    no = sum(count["refused"] for count in of_hub.values())
    return f"""\
With a row for each number of axes of Flax's convolutions, and for functions in its stacks,
{rows - no} of {rows} pairs to and from BrainState convert. Of the {no} others, those of
`RReLU`, `List` and `Dict` have no exact counterpart; those of events and float8 depend on
backends: wrap such layers live. `EventLinear` converts where it is a plain product.
"""


def _summary(counts: dict[tuple[str, str], Counter[str]]) -> Grid:
    hub = sum((count for pair, count in counts.items() if "brainstate" in pair), Counter())
    rows = [(f"{a} → {b}", count) for (a, b), count in counts.items()]
    rows.append(("to and from brainstate", hub))
    return Grid(
        ("from → to", "layers", *HOW),
        tuple(
            (label, str(count.total()), *(str(count[how]) for how in HOW))
            for label, count in rows
        ),
    )


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(SUPPORT.read_text() != support())
    SUPPORT.write_text(support())
