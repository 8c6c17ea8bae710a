"""The command line: ``python -m interop``, and ``python -m interop explain``.

Without a command it prints the versions that it finds, what works with what, and what converts.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

from . import DISTRIBUTION
from .errors import (
    ArgumentError,
    BrokenDependencyError,
    InteropError,
    MissingDependencyError,
)
from .registry import registry
from .report import explain
from .support import Grid, layers, refused

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: by default those of the process.

    Returns:
        The exit status: 0, or 1 if the explained model does not convert. Wrong arguments exit
        with 2.

    Example:
        >>> from interop.__main__ import main
        >>> main(["explain", "interop.formulas:identity", "--to", "nowhere"])
        Traceback (most recent call last):
            ...
        SystemExit: 2
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.command is None:
        _overview()
        return 0
    try:
        model = _made(given.factory)
        report = explain(model, given.to, sample_input=given.sample_input)
    except InteropError as e:
        parser.exit(2, f"{e}\n")
    print(report.to_markdown() if given.markdown else report)
    return 0 if report.ok else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m interop",
        description="Convert models between JAX's module systems. Without a command: the "
        "versions found, what works with what, and what converts.",
    )
    command = parser.add_subparsers(dest="command", metavar="command").add_parser(
        "explain", help="tell what converting a model would do, and what stands in its way"
    )
    command.add_argument(
        "factory",
        metavar="package.module:factory",
        help="a model, or a function without arguments that returns one; or a pair, of a "
        "module and its variables, or of a model and its state",
    )
    command.add_argument(
        "--to", required=True, choices=registry.names(), help="the target framework"
    )
    command.add_argument(
        "--sample-input",
        type=_shape,
        metavar="8,8,3",
        help="shape of one example as the model takes it, without its batch axis",
    )
    command.add_argument("--markdown", action="store_true", help="print Markdown")
    return parser


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.strip("()").split(",") if size.strip())
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape, such as 8,8,3") from e


def _made(place: str) -> Any:
    """What stands at ``package.module:name``, or what it returns.

    Raises:
        ArgumentError: there is no such thing.
    """
    module, _, name = place.partition(":")
    if not name:
        raise ArgumentError(f"{place!r} names no model", remedy="Write package.module:factory")
    if "" not in sys.path:  # as an installed program has it
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as e:
        if e.name is None or not f"{module}.".startswith(f"{e.name}."):
            raise
        raise ArgumentError(
            f"there is no module {e.name!r}",
            remedy="Run this where its folder is, or install it",
        ) from e
    except AttributeError as e:
        raise ArgumentError(f"{module} has no {name!r}", remedy="Check its spelling") from e
    is_model = registry.framework_of(found) is not None
    return found() if callable(found) and not is_model else found


def _overview() -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    versions = [DISTRIBUTION, _version(DISTRIBUTION), "Python", platform.python_version()]
    console.print(" ".join([*versions, "jax", _version("jax")]), "\n", highlight=False)
    importable: list[str] = []
    rows: list[tuple[str, ...]] = []
    for name in registry.names():
        package, state = _found(name)
        rows.append((name, package, state))
        if state == "works":
            importable.append(name)
    _print(console, "Frameworks", Grid(("name", "package", "state"), tuple(rows)))
    if importlib.util.find_spec("shims") is not None:  # which stands on this package
        pairs = importlib.import_module("shims.support").pairs(importable)
        _print(console, "Live: shims.wrap(module, into=...)", pairs)
    _print(console, "Converts: interop.convert(model, to=...)", layers(importable))
    _print(console, "Refused, and taken live by shims.wrap", refused(importable))
    console.print(
        "A function is a plain callable, a composite a module of interop.composites.\n"
        "Of one model: python -m interop explain package.module:factory --to ...",
        highlight=False,
    )


def _found(name: str) -> tuple[str, str]:
    """A framework's package with its version, and whether it works."""
    try:
        package = registry.adapter(name).module_type.__module__.partition(".")[0]
    except MissingDependencyError as e:
        return e.package, f"not installed: pip install {e.package}"
    except BrokenDependencyError as e:
        return ", ".join(f"{k} {v}" for k, v in e.versions.items()), str(e)
    return f"{package} {_version(package)}", "works"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _print(console: Console, title: str, grid: Grid) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    for column in grid.columns:
        table.add_column(column, overflow="fold")
    for row in grid.rows:
        table.add_row(*(cell.replace("`", "") for cell in row))
    console.print(table)
    console.print()


if __name__ == "__main__":
    sys.exit(main())
