"""Run a script cell by cell, as a notebook does: python tests/notebook.py SCRIPT [ARGUMENTS].

There is no ``__file__``, the arguments of the kernel come before the script's own, and a cell
shows the value that it ends with.
"""

from __future__ import annotations

import ast
import linecache
import re
import sys
import types
from pathlib import Path

CELL = re.compile(r"^# %% .+$", re.MULTILINE)


def run(script: str, *arguments: str) -> None:
    """Run the cells of a script one after the other."""
    sys.argv = ["kernel", "-f", "connection.json", *arguments]
    main = sys.modules["__main__"] = types.ModuleType("__main__", "Made by a notebook.")
    for number, cell in enumerate(CELL.split(Path(script).read_text())):
        name, body = f"<cell {number} of {script}>", ast.parse(cell).body
        lines = cell.splitlines(keepends=True)
        linecache.cache[name] = (len(cell), None, lines, name)  # inspect.getsource finds it
        shown = [body.pop().value] if body and isinstance(body[-1], ast.Expr) else []
        exec(compile(ast.Module(body, []), name, "exec", dont_inherit=True), vars(main))
        for value in shown:
            code = compile(ast.Expression(value), name, "eval", dont_inherit=True)
            if (found := eval(code, vars(main))) is not None:
                print(repr(found))


if __name__ == "__main__":
    run(*sys.argv[1:])
