"""Measure the library beside what users would take instead: ``make bench``.

Every figure is a ratio of two medians, taken in turns in one process after a warm-up, so that
the machine's noise hits both alike. ``python tests/benchmarks/bench.py --write`` writes the
table to ``RESULTS.md`` beside this file; names of groups as arguments run only those.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import brainstate
import brainstate.interop as peer
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import interop
import shims

RESULTS = Path(__file__).with_name("RESULTS.md")
PACKAGES = ("jax", "brainstate", "flax", "equinox")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: what is done.
        ours, other: the two times in seconds, or two counts.
        against: what the other is.
        target: the ratio to reach.
        faster: whether the ratio is of the other to ours, and has to be at least the target.
    """

    what: str
    ours: float
    other: float
    against: str
    target: float
    faster: bool = False

    @property
    def ratio(self) -> float:
        return self.other / self.ours if self.faster else self.ours / self.other

    @property
    def met(self) -> bool:
        return self.ratio >= self.target if self.faster else self.ratio <= self.target

    def cells(self) -> list[str]:
        sign, unit = ("≥", "× faster") if self.faster else ("≤", "×")
        return [
            self.what,
            _shown(self.ours),
            f"{_shown(self.other)} ({self.against})",
            f"{self.ratio:.3g} {unit}",
            f"{sign} {self.target:g}",
            "yes" if self.met else "no",
        ]


def _shown(value: float) -> str:
    if value >= 1 and value == int(value):
        return f"{int(value)}"
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def times(*jobs: Callable[[], Any], runs: int = 7, repeat: int = 1) -> list[float]:
    """The median time of each job, all taken in turns."""
    for job in jobs:
        jax.block_until_ready(job())
    taken: list[list[float]] = [[] for _ in jobs]
    for _ in range(runs):
        for job, found in zip(jobs, taken, strict=True):
            start = time.perf_counter()
            for _ in range(repeat):
                out = job()
            jax.block_until_ready(out)
            found.append((time.perf_counter() - start) / repeat)
    return [statistics.median(found) for found in taken]


# -- conversion --------------------------------------------------------------------------

LAYERS, SIZE = 50, 1024


def arrays_of(model: Any) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(model) if isinstance(x, jax.Array)]


def done(built: Any) -> list[jax.Array]:
    """The arrays of a converted model, so that their computation is waited for."""
    if isinstance(built, brainstate.nn.Module):
        return jax.tree.leaves([state.value for state in built.states().values()])
    return arrays_of(nnx.state(built) if isinstance(built, nnx.Module) else built)


def conversions() -> Iterator[Row]:
    weights = [jnp.full((SIZE, SIZE), float(i)) for i in range(LAYERS)]
    biases = [jnp.zeros(SIZE) for _ in range(LAYERS)]
    source = brainstate.nn.Sequential(
        *[
            brainstate.nn.Linear(SIZE, SIZE, w_init=w, b_init=b)
            for w, b in zip(weights, biases, strict=True)
        ]
    )
    as_nnx, (module, params) = interop.to_nnx(source), interop.to_linen(source)
    as_eqx = interop.to_equinox(source)

    def transposes() -> list[jax.Array]:
        return [w.T for w in weights]

    def by_hand() -> Any:
        layers = [nn.Dense(SIZE) for _ in range(LAYERS)]
        tree = {
            f"layers_{i}": {"kernel": w, "bias": b}
            for i, (w, b) in enumerate(zip(weights, biases, strict=True))
        }
        return nn.Sequential(layers), {"params": tree}

    stack = f"{LAYERS} Linear({SIZE}, {SIZE})"
    against_peer: list[tuple[str, Callable[[Any], Any], float]] = [
        ("to_nnx", lambda lib: lib.to_nnx(source), 20),
        ("from_nnx", lambda lib: lib.from_nnx(as_nnx), 150),
        ("from_linen", lambda lib: lib.from_linen(module, params), 150),
    ]
    for name, job, target in against_peer:
        ours, other = times(lambda j=job: done(j(interop)), lambda j=job: done(j(peer)))
        yield Row(f"`{name}`, {stack}", ours, other, "`brainstate.interop`", target, True)
    limits: list[tuple[str, Callable[[], Any], Callable[[], Any], str, float]] = [
        ("to_equinox", lambda: interop.to_equinox(source), transposes, "transposes alone", 1.3),
        (
            "from_equinox",
            lambda: interop.from_equinox(as_eqx),
            lambda: [layer.weight.T for layer in as_eqx.layers],
            "transposes alone",
            1.3,
        ),
        ("to_linen", lambda: interop.to_linen(source), by_hand, "built by hand", 1.1),
    ]
    for name, job, limit, against, target in limits:
        ours, other = times(lambda j=job: done(j()), limit)
        yield Row(f"`{name}`, {stack}", ours, other, against, target)


def growth() -> Iterator[Row]:
    found: dict[int, float] = {}
    for n in (100, 1000):
        stack = brainstate.nn.Sequential(
            *[
                brainstate.nn.Linear(8, 8, w_init=jnp.ones((8, 8)), b_init=jnp.ones(8))
                for _ in range(n)
            ]
        )
        (found[n],) = times(lambda s=stack: done(interop.to_nnx(s)), runs=7)
    yield Row(
        "`to_nnx`, each of 1000 layers", found[1000] / 1000, found[100] / 100, "of 100", 1.3
    )


# -- calls -------------------------------------------------------------------------------


def pairs() -> dict[str, tuple[Any, Any]]:
    """For each class, a shim of a small layer, and the native layer of its host."""
    layer = brainstate.nn.Linear(16, 16)
    as_nnx, (module, params) = interop.to_nnx(layer), interop.to_linen(layer)
    linen = shims.ToLinen(layer)
    variables = linen.init(jax.random.key(0), jnp.ones((4, 16)))
    return {
        "ToNNX": (shims.ToNNX(layer), as_nnx),
        "ToLinen": ((linen, variables), (module, params)),
        "ToEquinox": (shims.ToEquinox(layer), interop.to_equinox(layer)),
        "FromNNX": (shims.FromNNX(as_nnx), layer),
        "FromLinen": (shims.FromLinen(module, params), layer),
        "FromEquinox": (shims.FromEquinox(interop.to_equinox(layer)), layer),
    }


def compiled(name: str, model: Any) -> tuple[Callable[[], Any], str]:
    """A jitted call of a model in its host's own way, and the program that it runs."""
    x = jnp.ones((4, 16))
    if name == "ToNNX":
        call = nnx.jit(lambda m, x: m(x))
        graph, state = nnx.split(model)
        raw = jax.jit(lambda s, x: nnx.merge(graph, s)(x))
        return lambda: call(model, x), raw.lower(state, x).compile().as_text() or ""
    if name == "ToLinen":
        module, variables = model
        apply = jax.jit(module.apply)
        return lambda: apply(variables, x), apply.lower(variables, x).compile().as_text() or ""
    if name == "ToEquinox":
        call = eqx.filter_jit(lambda m, x: jax.vmap(m)(x))
        arrays, static = eqx.partition(model, eqx.is_array)
        raw = jax.jit(lambda a, x: jax.vmap(eqx.combine(a, static))(x))
        return lambda: call(model, x), raw.lower(arrays, x).compile().as_text() or ""
    graph, values = brainstate.graph.treefy_split(model)

    def evaluate(x: Any) -> Any:
        with brainstate.environ.context(fit=False):
            return model(x)

    def run(values: Any, x: Any) -> Any:
        with brainstate.environ.context(fit=False):
            return brainstate.graph.treefy_merge(graph, values)(x)

    call = brainstate.transform.jit(evaluate)
    return lambda: call(x), jax.jit(run).lower(values, x).compile().as_text() or ""


def instructions(program: str) -> int:
    return len(re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = ", program, re.MULTILINE))


def calls() -> Iterator[Row]:
    for name, (shim, native) in pairs().items():
        ours, other = compiled(name, shim), compiled(name, native)
        counts = instructions(ours[1]), instructions(other[1])
        yield Row(f"`{name}`: instructions of the compiled call", *counts, "native layer", 1.0)
        taken = times(ours[0], other[0], runs=15, repeat=200)
        yield Row(f"`{name}`: a jitted call", *taken, "native layer", 1.1)


def eager() -> Iterator[Row]:
    layer, x = brainstate.nn.Linear(16, 16), jnp.ones((4, 16))
    native, shim = interop.to_nnx(layer), shims.ToNNX(layer)
    theirs = nnx.bridge.ToNNX(nn.Dense(16), rngs=nnx.Rngs(0)).lazy_init(x)
    ours = shims.ToNNX(nn.Dense(16), params=nn.Dense(16).init(jax.random.key(0), x))
    found = times(
        lambda: shim(x),
        lambda: (native(x), layer(x)),
        lambda: ours(x),
        lambda: theirs(x),
        runs=11,
        repeat=30,
    )
    yield Row("`ToNNX(Linear)`, eager", found[0], found[1], "host's and guest's layer", 1.0)
    yield Row("`ToNNX(nn.Dense)`, eager", found[2], found[3], "`nnx.bridge.ToNNX`", 5, True)


def imports() -> Iterator[Row]:
    def run(code: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    ours, other = times(run("import jax, interop, shims"), run("import jax"), runs=7)
    yield Row("`import interop, shims` beside `import jax`", ours, other, "`import jax`", 1.05)


GROUPS = {f.__name__: f for f in (conversions, growth, calls, eager, imports)}


def table(rows: list[Row]) -> str:
    head = ["what", "ours", "the other", "ratio", "target", "met"]
    lines = [head, ["---"] * len(head), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    chosen = [name for name in sys.argv[1:] if not name.startswith("-")] or list(GROUPS)
    rows: list[Row] = []
    for name in chosen:
        for row in GROUPS[name]():
            rows.append(row)
            print(" | ".join(row.cells()), flush=True)
    if "--write" in sys.argv:
        versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES)
        machine = f"{platform.machine()}, {jax.devices()[0].device_kind}"
        where = f"Python {platform.python_version()}, {versions}; {machine}."
        RESULTS.write_text(
            f"# Benchmarks\n\nWritten by `make bench`. {where}\nMedians, taken in turns in one "
            f"process.\n\n{table(rows)}\n"
        )


if __name__ == "__main__":
    main()
