"""Run tests/test_fuzz.py with one seed after another: python tests/fuzz.py MINUTES [SEED].

It stops at the first failure, which is printed with its seed and as small as it gets. Every
round is a process of its own, whose compiled programs go with it.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLES = 200  # of each test in a round


def main(minutes: float, seed: int) -> int:
    end = time.monotonic() + 60 * minutes
    for number in itertools.count(seed):
        options = ["-x", "-s", f"--hypothesis-seed={number}", "tests/test_fuzz.py"]
        failed = subprocess.run(
            [sys.executable, "-m", "pytest", *options],
            cwd=ROOT,
            env=os.environ | {"FUZZ_EXAMPLES": str(EXAMPLES)},
        ).returncode
        if failed:
            return failed
        print(f"seed {number}: nothing found", flush=True)
        if time.monotonic() > end:
            return 0
    return 1


if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(main(float(arguments[0]), int(arguments[1]) if arguments[1:] else 0))
