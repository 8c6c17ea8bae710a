"""Sharded weights: programs that run on eight CPU devices in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import STRICT

PROGRAMS = Path(__file__).parent / "devices"
FLAGS = {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(PROGRAMS.parents[1]),
}


@pytest.mark.parametrize("program", ["sharded_conversions", "sharded_shims"])
def test_shardings_and_names_are_kept_on_eight_devices(program):
    file = PROGRAMS / f"{program}.py"
    done = subprocess.run(
        [sys.executable, *STRICT, str(file)],
        env=os.environ | FLAGS,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed: ") == file.read_text().count("\ndef test_")
