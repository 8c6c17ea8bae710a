"""Fail unless all of both packages has complete types: ``make types`` runs it.

What the types of other packages leave open is not counted: those of JAX are incomplete.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def incomplete(package: str) -> list[str]:
    """The names of a package whose types are unknown or ambiguous, with the reason."""
    command = [sys.executable, "-m", "pyright", "--outputjson", "--ignoreexternal"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(  # it looks for the package in the Python that PATH finds first
        [*command, "--verifytypes", package],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    symbols = json.loads(done.stdout)["typeCompleteness"]["symbols"]
    if not symbols:
        return [f"{package}: not found, or without py.typed: {done.stdout}"]
    return [
        f"{symbol['name']}: {[d['message'].splitlines()[0] for d in symbol['diagnostics']]}"
        for symbol in symbols
        if symbol["isExported"] and (not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"])
    ]


if __name__ == "__main__":
    found = [line for package in ("interop", "shims") for line in incomplete(package)]
    print("\n".join(found) or "every name has a complete type")
    sys.exit(bool(found))
