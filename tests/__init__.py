"""The tests. ``models/`` holds what they know about each framework, one file each."""

import os
from pathlib import Path

# Compiling is what the tests spend their time on: it optimises less, and nothing is compiled
# twice, whichever process asks. jax, which is imported later, and subprocesses read these.
for _name, _value in {
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".pytest_cache" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}.items():
    os.environ.setdefault(_name, _value)

# Options of a Python that takes warnings as errors, but for one: that a process reads what
# another is just writing into the cache, and compiles it itself.
STRICT = ("-W", "error", "-W", "ignore:Error reading persistent compilation cache:UserWarning")
