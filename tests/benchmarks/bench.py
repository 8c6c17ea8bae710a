"""Measure the library beside what users would take instead: ``make bench``.

Every figure is a ratio of two medians of CPU time, of 7 runs or more (3 of 10 000 layers, and
where the alternative takes seconds), taken in turns in one process after a warm-up and with the
garbage collector held back, so that whatever else the machine does counts as little as can be.

``python tests/benchmarks/bench.py --write`` writes the table to ``RESULTS.md`` beside this
file; names of groups as arguments run only those.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib.metadata
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial, partialmethod
from inspect import signature
from pathlib import Path
from typing import Any
from unittest import mock

import brainstate
import brainstate.interop as peer
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import interop
import shims
from interop.api import open_model
from interop.registry import registry
from interop.walk import Reading
from shims.core import guest_of

RESULTS = Path(__file__).with_name("RESULTS.md")
PACKAGES = ("jax", "brainstate", "flax", "equinox")
Job = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: what is done.
        ours, other: what was measured of both; None where there is nothing to compare with.
        against: what the other is.
        target: the ratio to reach, or the difference.
        kind: how they compare: ``"most"``, our part of the other may be at most ``target``;
            ``"faster"``, the other takes at least ``target`` times ours; ``"same"``, they
            differ by at most ``target`` of the other; ``"above"``, ours is above the other by
            at most ``target``.
        why: the reason, where the target is not met.
        unit: ``"s"``, ``"B"``, or nothing for numbers.
    """

    what: str
    ours: float
    other: float | None
    against: str
    target: float
    kind: str = "most"
    why: str = ""
    unit: str = "s"

    @property
    def figure(self) -> float:
        assert self.other is not None
        if self.kind == "faster":
            return self.other / self.ours
        return self.ours - self.other if self.kind == "above" else self.ours / self.other

    @property
    def met(self) -> bool:
        if self.other is None:
            return True
        if self.kind == "faster":
            return self.figure >= self.target
        if self.kind == "same":
            return abs(self.figure - 1) <= self.target
        return self.figure <= self.target

    def cells(self) -> list[str]:
        if self.other is None:
            return [self.what, self._shown(self.ours), "—", "—", "—", self.against]
        target, figure = f"{self.target:g}", f"{self.figure:.3g}"
        shown = {
            "most": (f"{figure} ×", f"≤ {target} ×"),
            "faster": (f"{figure} × faster", f"≥ {target} × faster"),
            "same": (f"{self.figure:.3f} ×", f"1 ± {target}"),
            "above": (self._shown(self.figure), f"≤ {self._shown(self.target)} above"),
        }[self.kind]
        ours, other = self._shown(self.ours), f"{self._shown(self.other)} ({self.against})"
        verdict = "met" if self.met else f"not met: {self.why or 'no reason is known'}"
        return [self.what, ours, other, *shown, verdict]

    def _shown(self, value: float) -> str:
        if self.unit == "s":
            scale = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
        else:
            scale = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if self.unit else ()
        for factor, name in scale:
            if abs(value) >= factor:
                return f"{value / factor:.3g} {name}"
        return f"{value:.4g}"


def arrays_of(model: Any) -> list[jax.Array]:
    if isinstance(model, list):
        return [array for part in model for array in arrays_of(part)]
    if isinstance(model, brainstate.nn.Module):
        model = [state.value for state in model.states().values()]
    elif isinstance(model, nnx.Module):
        model = nnx.state(model)
    return [x for x in jax.tree.leaves(model) if isinstance(x, jax.Array)]


def settle() -> None:
    """Wait for what a job has left to other threads, such as weights that it throws away."""
    before = -1.0
    while time.process_time() - before > 1e-3:
        before = time.process_time()
        time.sleep(0.005)


def cpu_times(*jobs: Job, runs: int = 7, repeat: int = 1) -> list[float]:
    """The median CPU time of each job, all threads of this process, taken in turns."""
    for job in jobs:
        jax.block_until_ready(arrays_of(job()))
    taken: list[list[float]] = [[] for _ in jobs]
    gc.collect()
    gc.freeze()  # so that collecting looks at what a run has made, and takes no time
    turns = list(zip(jobs, taken, strict=True))
    for _ in range(runs):
        gc.collect()
        gc.disable()
        turns.append(turns.pop(0))  # so that each comes after each other
        for job, found in turns:
            ctypes.CDLL(None).malloc_trim(0)  # so that none finds the memory of another
            start = time.process_time()
            for _ in range(repeat):
                out = job()
            looking = time.thread_time()
            jax.block_until_ready(arrays_of(out))
            settle()
            start += time.thread_time() - looking
            found.append((time.process_time() - start) / repeat)
            out = None
        gc.enable()
    gc.unfreeze()
    return [statistics.median(found) for found in taken]


# -- conversion --------------------------------------------------------------------------


def stack_of_linear(n: int, size: int) -> Any:
    weights = [jnp.full((size, size), float(i)) for i in range(n)]
    return brainstate.nn.Sequential(
        *[
            brainstate.nn.Linear(size, size, w_init=weight, b_init=jnp.zeros(size))
            for weight in weights
        ]
    )


def convolutions() -> Any:
    """Convolutions and normalisations as those of ResNet-18."""
    rngs, channels = nnx.Rngs(0), [64] * 5 + [128] * 4 + [256] * 4 + [512] * 4
    layers: list[Any] = []
    for n, m in zip(channels, channels[1:], strict=False):
        strides = 1 if n == m else 2
        layers += [
            nnx.Conv(n, m, (3, 3), strides=strides, use_bias=False, rngs=rngs),
            nnx.BatchNorm(m, rngs=rngs),
        ]
    return interop.from_nnx(nnx.Sequential(*layers), sample_input=(32, 32, 64))


def encoder() -> Any:
    """The layers of a transformer encoder, without what bypasses them."""
    rngs, size = nnx.Rngs(0), 256
    return nnx.Sequential(
        *[
            layer
            for _ in range(12)
            for layer in (
                nnx.LayerNorm(size, rngs=rngs),
                nnx.MultiHeadAttention(8, size, decode=False, rngs=rngs),
                nnx.LayerNorm(size, rngs=rngs),
                nnx.Linear(size, 4 * size, rngs=rngs),
                nnx.gelu,
                nnx.Linear(4 * size, size, rngs=rngs),
            )
        ]
    )


def moves(models: dict[str, list[Any]], start: str, end: str) -> Job:
    """Only what has to be done to the arrays, as one would write it by hand."""
    source, target = models[start], models[end]
    if any(isinstance(layer, brainstate.nn.LSTMCell) for layer in models["brainstate"]):
        return lambda: [GATES[start, end](cell) for cell in source]
    jobs: list[Job] = []
    if "equinox" in (start, end):
        back, forth = ((2, 3, 1, 0), (3, 2, 0, 1))
        if start == "equinox":
            back, forth = forth, back
        shared = set(map(id, arrays_of(source)))
        for x in arrays_of(target):
            if x.ndim in (2, 4) and id(x) not in shared:  # a matrix, a kernel
                there, here = (back, forth) if x.ndim == 4 else ((1, 0), (1, 0))
                jobs.append(partial(jnp.transpose, jnp.transpose(x, there), here))
    for x in arrays_of(models["brainstate"]):
        if x.shape[:-1] == (1, 1):  # of a normalisation, with a 1 for each axis of space
            flat = x.reshape(-1)
            jobs.append(
                partial(jnp.reshape, *((x, -1) if end != "brainstate" else (flat, x.shape)))
            )
    return lambda: [job() for job in jobs]


def from_gates(x: Any, h: Any, bias: Any) -> Any:
    """BrainState's matrix and bias of the gates i, f, g, o."""
    order = (0, 2, 1, 3)
    weight = jnp.concatenate([jnp.concatenate([x[k], h[k]]) for k in order], axis=-1)
    i, f, g, o = bias
    return weight, jnp.concatenate([i, g, f - 1, o])


def to_gates(cell: brainstate.nn.LSTMCell) -> Any:
    """The gates i, f, g, o of BrainState's matrix and bias."""
    weight, bias = cell.W.weight.value["weight"], cell.W.weight.value["bias"]
    (i, g, f, o), parts = jnp.split(bias, 4), jnp.split(weight, [cell.num_in])
    apart = [jnp.split(part, 4, axis=-1) for part in parts]
    return *[[part[k] for k in (0, 2, 1, 3)] for part in apart], (i, f + 1, g, o)


def gates_to_equinox(cell: brainstate.nn.LSTMCell) -> Any:
    x, h, bias = to_gates(cell)
    return *(jnp.concatenate(part, axis=-1).T for part in (x, h)), jnp.concatenate(bias)


def gates_of_nnx(cell: nnx.LSTMCell) -> Any:
    inputs, hidden = (cell.ii, cell.if_, cell.ig, cell.io), (cell.hi, cell.hf, cell.hg, cell.ho)
    kernels = ([layer.kernel[...] for layer in layers] for layers in (inputs, hidden))
    return from_gates(*kernels, [layer.bias[...] for layer in hidden])


def gates_of_linen(pair: Any) -> Any:
    params = pair[1]["params"]
    kernels = ([params[f"{part}{gate}"]["kernel"] for gate in "ifgo"] for part in "ih")
    return from_gates(*kernels, [params[f"h{gate}"]["bias"] for gate in "ifgo"])


def gates_of_equinox(cell: eqx.nn.LSTMCell) -> Any:
    arrays = cell.weight_ih.T, cell.weight_hh.T, cell.bias
    return from_gates(*(jnp.split(array, 4, axis=-1) for array in arrays))


GATES: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("brainstate", "nnx"): to_gates,
    ("brainstate", "linen"): to_gates,
    ("brainstate", "equinox"): gates_to_equinox,
    ("nnx", "brainstate"): gates_of_nnx,
    ("linen", "brainstate"): gates_of_linen,
    ("equinox", "brainstate"): gates_of_equinox,
}


def again(part: Any) -> Any:
    """Linen modules and dicts built anew by their constructors, with the same arrays."""
    if isinstance(part, nn.Module):
        names = {field.name for field in fields(part) if field.init} - {"parent", "name"}
        return type(part)(**{name: again(getattr(part, name)) for name in names})
    if isinstance(part, Mapping):
        return {key: again(value) for key, value in part.items()}
    return type(part)(map(again, part)) if isinstance(part, tuple | list) else part


def in_constructors(job: Job, model: Any) -> float:
    """The CPU time that a conversion to ``model`` spends in its layers' own constructors."""
    taken, depth = 0.0, 0

    def timed(init: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal taken, depth
        depth, start = depth + 1, time.process_time()
        init(*args, **kwargs)
        depth -= 1
        taken += 0.0 if depth else time.process_time() - start

    with ExitStack() as patched:
        for cls in set(map(type, layers_of(model))):
            init = partialmethod(partial(timed, cls.__init__))
            patched.enter_context(mock.patch.object(cls, "__init__", init))
        job()
    return taken


def layers_of(models: list[Any]) -> list[Any]:
    layers = [layer for model in models for layer in getattr(model, "layers", [model])]
    return [x for x in layers if isinstance(x, brainstate.nn.Module | nnx.Module)]


def conversions() -> Iterator[Row]:
    cells = [brainstate.nn.LSTMCell(512, 512) for _ in range(4)]
    yield from directions("50 Linear(1024, 1024)", [stack_of_linear(50, 1024)])
    yield from directions("16 Conv, BatchNorm of ResNet-18", [convolutions()], (32, 32, 64))
    yield from directions("4 LSTMCell(512, 512)", cells)
    yield from directions("12-layer attention encoder", [encoder()], (16, 256))


def converted(models: list[Any], framework: str, sample: Any = None) -> list[Any]:
    """Each model, in a pair with its variables if it is Linen's, in another framework.

    ``sample`` is the shape of an example with its channels last.
    """
    made: list[Any] = []
    for pair in models:
        model, params = pair if isinstance(pair, tuple) else (pair, None)
        example = sample
        if isinstance(model, eqx.Module) and sample is not None and len(sample) == 3:
            example = (sample[-1], *sample[:-1])
        made.append(interop.convert(model, to=framework, params=params, sample_input=example))
    return made


def directions(name: str, source: list[Any], sample: Any = None) -> Iterator[Row]:
    """The six directions of one model, or of several."""
    options: dict[str, Any] = {} if sample is None else {"sample_input": sample}
    models = {framework: converted(source, framework, sample) for framework in FRAMEWORKS}

    def ours(start: str, end: str) -> Job:
        return lambda: converted(models[start], end, sample)

    def row(start: str, end: str, other: Job | None, against: str, target: float) -> Row:
        taken, beside, why = limits(models, start, end, ours(start, end), other)
        kind = "most" if "hand" in against else "faster"
        return Row(f"{start} → {end}: {name}", taken, beside, against, target, kind, why)

    peers: list[tuple[str, str, Callable[[Any], Any], float]] = [
        ("brainstate", "nnx", peer.to_nnx, 20),
        ("nnx", "brainstate", lambda m: peer.from_nnx(m, **options), 150),
        ("linen", "brainstate", lambda m: peer.from_linen(*m, **options), 150),
    ]
    for start, end, theirs, target in peers:
        other = unless_refused(partial(lambda f, m: list(map(f, m)), theirs, models[start]))
        name_of_it = "`brainstate.interop`"
        against = name_of_it if other else f"met: {name_of_it} refuses it"
        yield row(start, end, other, against, target)
    for start, end in (("brainstate", "equinox"), ("equinox", "brainstate")):
        move = moves(models, start, end)
        against = "its arrays moved by hand" if move() else "met: no array is copied"
        yield row(start, end, move if move() else None, against, 1.3)
    move = moves(models, "brainstate", "linen")

    def by_hand() -> Any:
        return again(models["linen"]), move()

    yield row("brainstate", "linen", by_hand, "built by hand", 1.1)


def specs_of(model: Any) -> Any:
    """A model as specs, with all checks."""
    adapter, node = open_model(model)
    return Reading(adapter, registry).read(node, "model")


def limits(
    models: dict[str, list[Any]], start: str, end: str, ours: Job, other: Job | None
) -> tuple[float, float | None, str]:
    """Our time, the other's, and in the same turns what no converter can save, in words."""
    read, move = lambda: list(map(specs_of, models[start])), moves(models, start, end)
    jobs = [ours, read, move, *([] if other is None else [other])]
    taken, reading, moving, *others = cpu_times(*jobs, runs=3 if is_slow(other) else 7)
    building = statistics.median(in_constructors(ours, models[end]) for _ in range(7))
    parts = {
        "the arrays moved by hand": moving,
        f"the constructors of {end}": building,
        "reading into specs (each exact class, every option, ties, shapes)": reading,
    }
    why = "of it, " + ", ".join(f"{k} {ms(t)}" for k, t in parts.items() if t > 1e-5)
    return taken, others[0] if others else None, why


def unless_refused(job: Job) -> Job | None:
    try:
        job()
    except Exception as e:
        print(f"  the alternative cannot: {type(e).__name__}: {e}"[:160])
        return None
    return job


def is_slow(job: Job | None) -> bool:
    start = time.process_time()
    if job is not None:
        job()
    return time.process_time() - start > 3


PEAK = """
import brainstate, jax, jax.numpy as jnp, interop

def peak():
    with open("/proc/self/status") as f:
        return 1024 * int(next(line for line in f if line.startswith("VmHWM")).split()[1])

def stack(n, size):
    return brainstate.nn.Sequential(*[
        brainstate.nn.Linear(
            size, size, w_init=jnp.full((size, size), 1.0), b_init=jnp.zeros(size)
        )
        for _ in range(n)
    ])

interop.convert(stack(2, 8), to=NAME)
model = stack(32, 4096)
jax.block_until_ready([state.value for state in model.states().values()])
before = peak()
built = interop.convert(model, to=NAME)
jax.effects_barrier()
print(peak() - before)
"""


def memory() -> Iterator[Row]:
    weights = 32 * 4096 * 4096 * 4
    for framework, target in (("nnx", 0.02), ("linen", 0.02), ("equinox", 1.02)):
        code = PEAK.replace("NAME", repr(framework))
        out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        what = f"brainstate → {framework}: 2 GB of weights, peak of memory above the source"
        yield Row(what, float(out.stdout), weights, "the weights", target, unit="B")


def growth() -> Iterator[Row]:
    x = jnp.ones((1, 8))
    jobs: dict[str, Callable[[Any], Job]] = {
        "brainstate → linen": lambda m: lambda: interop.to_linen(m),
        "brainstate → nnx": lambda m: lambda: interop.to_nnx(m),
        "building ToNNX": lambda m: lambda: shims.ToNNX(m),
        "building ToEquinox": lambda m: lambda: shims.ToEquinox(m),
        "eager call of ToNNX": lambda m: partial(shims.ToNNX(m), x),
    }
    sizes = (10, 100, 1000, 10_000)
    stacks = {n: stack_of_linear(n, 8) for n in sizes}
    for name, job in jobs.items():
        each: dict[int, float] = {}
        for n in sizes:
            runs, repeat = (3 if n == 10_000 else 7), max(1, 200 // n)
            each[n] = cpu_times(job(stacks[n]), runs=runs, repeat=repeat)[0] / n
        curve = ", ".join(f"{each[n] * 1e6:.3g}" for n in sizes)
        what = f"{name}: µs a layer of {', '.join(map(str, sizes))}: {curve}"
        yield Row(what, each[10_000], each[100], "of 100", 1.3)


# -- calls -------------------------------------------------------------------------------

FRAMEWORKS = ("brainstate", "nnx", "linen", "equinox")
HOSTS = {
    "ToNNX": "nnx",
    "ToLinen": "linen",
    "ToEquinox": "equinox",
    "FromNNX": "brainstate",
    "FromLinen": "brainstate",
    "FromEquinox": "brainstate",
}
X = jnp.ones((4, 16))


@dataclass(frozen=True)
class Pair:
    """A shim, the same model native to its host, and the guest; Linen's with variables."""

    name: str
    host: str
    shim: Any
    native: Any
    guest: Any
    guest_host: str


def pairs(layer: Any, size: int = 16, names: Iterable[str] = HOSTS) -> list[Pair]:
    """Each of the six shims around a BrainState model, or around what it converts to."""
    native = {name: converted([layer], name)[0] for name in FRAMEWORKS}
    linen = shims.ToLinen(layer, deterministic=True)
    args = (jnp.zeros((4, size)),)
    if hasattr(linen, "initialize_carry"):
        args = (linen.initialize_carry(jax.random.key(0), (4, 16)), *args)
    made: dict[str, tuple[Job, str]] = {
        "ToNNX": (lambda: shims.ToNNX(layer), "brainstate"),
        "ToLinen": (lambda: (linen, linen.init(jax.random.key(0), *args)), "brainstate"),
        "ToEquinox": (lambda: shims.ToEquinox(layer), "brainstate"),
        "FromNNX": (lambda: shims.FromNNX(native["nnx"]), "nnx"),
        "FromLinen": (lambda: shims.FromLinen(*native["linen"]), "linen"),
        "FromEquinox": (lambda: shims.FromEquinox(native["equinox"]), "equinox"),
    }
    return [
        Pair(name, HOSTS[name], made[name][0](), native[HOSTS[name]], native[guest], guest)
        for name in names
        for guest in [made[name][1]]
    ]


def perceptron(n: int, size: int = 16) -> Any:
    layers: list[Any] = []
    for _ in range(n):
        layers += [brainstate.nn.Linear(size, size), brainstate.nn.Tanh()]
    return brainstate.nn.Sequential(*layers)


def normalised() -> Any:
    """A model with statistics and dropout, in evaluation."""
    bnn = brainstate.nn
    return bnn.Sequential(
        bnn.Linear(16, 8), bnn.BatchNorm0d(8), bnn.Tanh(), bnn.Dropout(0.3), bnn.Linear(8, 16)
    )


def evaluating(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with brainstate.environ.context(fit=False):
            return function(*args)

    return run


def functional(host: str, model: Any) -> tuple[Any, Callable[[Any, Any], Any]]:
    """A model's values, and a function of them and a batch, in its host's own way."""
    if host == "nnx":
        graph, state = nnx.split(model)
        return state, lambda state, x: nnx.merge(graph, state)(x)
    if host == "linen":
        module, variables = model
        return variables, module.apply
    if host == "equinox":
        arrays, static = eqx.partition(model, eqx.is_array)
        return arrays, lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x)
    graph, values = brainstate.graph.treefy_split(model)
    return values, evaluating(lambda v, x: brainstate.graph.treefy_merge(graph, v)(x))


def training(host: str, model: Any) -> tuple[Any, Callable[[Any, Any], Any]]:
    """A model's values, and a step of gradient descent on them."""
    values, apply = functional(host, model)

    def step(values: Any, x: Any) -> Any:
        gradients = jax.grad(lambda v: jnp.mean(apply(v, x) ** 2))(values)
        return jax.tree.map(lambda value, g: value - 0.1 * g, values, gradients)

    return values, step


def instructions(function: Callable[..., Any], *args: Any) -> int:
    """How many there are in the optimised program of a function."""
    program = jax.jit(function).lower(*args).compile().as_text() or ""
    return len(re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = ", program, re.MULTILINE))


def programs(pair: Pair, host: str, other: Any, against: str) -> Iterator[Row]:
    """The shim's programs beside those of another model."""
    for what, of in (("forward", functional), ("train step", training)):
        counts = [
            instructions(function, values, X)
            for values, function in (of(pair.host, pair.shim), of(host, other))
        ]
        row = f"{pair.name}: instructions of the compiled {what}"
        yield Row(row, *counts, against, 0, "same", unit="")


def compiled() -> Iterator[Row]:
    for pair in pairs(perceptron(4)):
        yield from programs(pair, pair.host, pair.native, "native")
    # BatchNorm is not written alike in any two frameworks, so that the guest is what to equal.
    for pair in pairs(normalised(), names=("ToNNX", "ToLinen", "FromNNX", "FromLinen")):
        if pair.host == "nnx":
            pair.shim.eval()
        yield from programs(pair, pair.guest_host, pair.guest, "the guest alone, BatchNorm")
    layer = interop.to_equinox(perceptron(4))
    inner = brainstate.nn.Sequential(shims.FromEquinox(layer))
    through = [shims.ToNNX(inner), shims.ToNNX(layer)]
    counts = [
        instructions(function, values, X)
        for values, function in (functional("nnx", shim) for shim in through)
    ]
    what = "Equinox → BrainState → NNX: instructions of the compiled forward"
    yield Row(what, *counts, "one shim", 0, "same", unit="")
    big = jnp.ones((256, 512))
    for pair in pairs(perceptron(4, 512), 512):
        jobs: list[Job] = []
        for model in (pair.shim, pair.native):
            values, step = training(pair.host, model)
            jobs.append(partial(jax.jit(step).lower(values, big).compile(), values, big))
        found = cpu_times(*jobs, runs=31)
        yield Row(f"{pair.name}: a compiled train step", *found, "native", 0.03, "same", NOISE)


NOISE = "the two programs are equal, see above: what is left is the machine's noise"


def jitted(host: str, model: Any) -> Job:
    """A compiled call in the host's own way, with all that it does to the arguments."""
    if host == "nnx":
        return partial(nnx.jit(lambda m, x: m(x)), model, X)
    if host == "linen":
        return partial(jax.jit(model[0].apply), model[1], X)
    if host == "equinox":
        return partial(eqx.filter_jit(lambda m, x: jax.vmap(m)(x)), model, X)
    return partial(brainstate.transform.jit(evaluating(lambda x: model(x))), X)


class InDict(nnx.Module):
    """NNX's own module with the containers that a shim of BrainState's Linear has."""

    def __init__(self) -> None:
        kernel, bias = nnx.Param(jnp.ones((16, 16))), nnx.Param(jnp.ones(16))
        self.weight, self.settings = nnx.data({"weight": kernel, "bias": bias}), nnx.data({})

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.weight["weight"][...] + self.weight["bias"][...]


class Apart(brainstate.nn.Module):
    """BrainState's own module with as many States as a foreign Linear has arrays."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = brainstate.ParamState(jnp.ones((16, 16)))
        self.bias = brainstate.ParamState(jnp.ones(16))

    def update(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel.value + self.bias.value


TWINS = {"nnx": InDict, "brainstate": Apart}


def dispatch() -> Iterator[Row]:
    for pair in pairs(brainstate.nn.Linear(16, 16)):
        twin = TWINS[pair.host]() if pair.host in TWINS else pair.native
        jobs = [jitted(pair.host, model) for model in (pair.shim, pair.native, twin)]
        *found, alike = cpu_times(*jobs, runs=31, repeat=500)
        row = Row(f"{pair.name}: a jitted call of a Linear", *found, "native", 1.1)
        why = (
            f"the host's jit looks at each container and array of a module: one of its own "
            f"with those of the guest takes {us(alike)}{of_guest(pair, twin)}"
        )
        yield row if row.met else replace(row, why=why)


def of_guest(pair: Pair, twin: Any) -> str:
    """What a shim does at each call because its guest may change, and has the arrays."""
    if pair.name == "FromNNX":
        shown, own = cpu_times(
            *[partial(restored, [*model.states().values()]) for model in (pair.shim, twin)],
            repeat=5000,
        )
        return (
            f"; in a loop of its own, reading and restoring its States takes {us(shown)}, "
            f"{us(own)} of it in any States"
        )
    if pair.name != "ToNNX":
        return ""
    guest: Any = guest_of(pair.guest)
    cells = guest.cells()
    look, own, moved = cpu_times(
        lambda: (guest.looks(), guest.settings()),
        partial(touched, pair.guest),
        lambda: [cell.set(cell.get()) for cell in cells],
        repeat=5000,
    )
    return (
        f"; in a loop of its own, looking whether the guest has changed since takes {us(look)} "
        f"and reading and writing its arrays where they are {us(moved)}, {us(own)} of it in "
        "BrainState"
    )


def restored(states: list[Any]) -> None:
    """What a transformation does with each state that it reads."""
    for state in states:
        state.restore_value(state.value)


def touched(layer: brainstate.nn.Linear) -> None:
    """Read and write each array where it is: two of one State."""
    for state in (layer.weight, layer.weight):
        state.value.keys()
        state.value = dict(state.value)


def eager_call(host: str, model: Any) -> Job:
    if host == "linen":
        return lambda: model[0].apply(model[1], X)
    if host == "equinox":
        return lambda: jax.vmap(model)(X)
    return evaluating(lambda: model(X))


def eager_step(host: str, model: Any) -> Job:
    """One step of a recurrent cell."""
    if host == "nnx":
        carry = model.initialize_carry(X.shape, nnx.Rngs(0))
        return lambda: model(carry, X)
    if host == "linen":
        carry = model[0].initialize_carry(jax.random.key(0), X.shape)
        return lambda: model[0].apply(model[1], carry, X)
    if host == "equinox":
        is_shim, zeros = hasattr(model, "initialize_carry"), jnp.zeros(16)
        one = model.initialize_carry((16,)) if is_shim else (zeros, zeros)
        carry = jax.tree.map(lambda leaf: jnp.zeros((4, *leaf.shape)), one)
        return lambda: jax.vmap(model)(X, carry)
    model.init_state(4)
    return evaluating(lambda: model(X))


COPY = (
    "a host whose arrays are values, not places, runs a private copy of the guest, which is "
    "filled with them and looked at afterwards: what makes it safe with exceptions, threads "
    "and tracers"
)


def reason(pair: Pair, guest: float) -> str:
    """Why an eager call is slower than the native one and the guest together."""
    if pair.host == "equinox":
        asked = [partial(f, m) for m in (pair.shim, pair.native) for f in (repr, signature)]
        times = cpu_times(*asked, repeat=20)
        shim, native = ms(sum(times[:2])), ms(sum(times[2:]))
        return (
            f"jax.vmap takes the repr and the signature of what it maps, {shim} of the shim, "
            f"{native} of a native layer; and {COPY}, made anew, as no trace is twice the same"
        )
    return f"the guest's call alone takes {ms(guest)}; {COPY}"


def eager() -> Iterator[Row]:
    models = {
        "Linear": (brainstate.nn.Linear(16, 16), eager_call),
        "MLP of 8": (perceptron(8), eager_call),
        "LSTM step": (brainstate.nn.LSTMCell(16, 16), eager_step),
    }
    for name, (layer, call) in models.items():
        for pair in pairs(layer):
            shim = call(pair.host, pair.shim)
            native, guest = call(pair.host, pair.native), call(pair.guest_host, pair.guest)
            jobs = shim, lambda n=native, g=guest: (n(), g()), guest
            *found, alone = cpu_times(*jobs, repeat=20)
            row = Row(f"{pair.name}: eager {name}", *found, "native and guest", 1.0)
            yield row if row.met else replace(row, why=reason(pair, alone))
    yield from bridges()


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def us(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} µs"


def bridges() -> Iterator[Row]:
    """The same guests through Flax's own wrappers."""
    key = jax.random.key(0)
    dense, layer = nn.Dense(16), nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    ours: Any = shims.ToNNX(dense, params=dense.init(key, X))
    theirs: Any = nnx.bridge.ToNNX(dense, rngs=nnx.Rngs(0)).lazy_init(X)
    variables = dense.init(key, X)
    jobs = lambda: ours(X), lambda: theirs(X), lambda: dense.apply(variables, X)
    *found, alone = cpu_times(*jobs, repeat=20)
    why = f"both run nn.Dense.apply, which alone takes {ms(alone)}"
    yield Row("ToNNX: eager nn.Dense", *found, "`nnx.bridge.ToNNX`", 5, "faster", why)
    ours = shims.ToLinen(layer)
    theirs = nnx.bridge.to_linen(nnx.Linear, 16, 16)
    mine, other = ours.init(key, X), theirs.init(key, X)
    jobs = lambda: ours.apply(mine, X), lambda: theirs.apply(other, X), lambda: layer(X)
    empty = nn.Sequential((jnp.asarray,))
    *found, alone, apply = cpu_times(*jobs, lambda: empty.apply({}, X), repeat=20)
    why = (
        f"the call of the layer alone takes {ms(alone)}, and apply of a Linen module that does "
        f"nothing {ms(apply)}"
    )
    yield Row("ToLinen: eager nnx.Linear", *found, "`nnx.bridge.ToLinen`", 10, "faster", why)


def tracing() -> Iterator[Row]:
    for pair in pairs(perceptron(100)):

        def lowered(model: Any, host: str = pair.host) -> Job:
            values, step = training(host, model)
            return lambda: jax.jit(lambda v, x: step(v, x)).lower(values, X)

        jobs = lowered(pair.shim), lowered(pair.native), lowered(pair.guest, pair.guest_host)
        ours, native, guest = cpu_times(*jobs)
        what = f"{pair.name}: tracing and lowering a train step of 100 layers"
        why = f"the guest is what is traced, and alone in its own framework takes {ms(guest)}"
        yield Row(what, ours, native, "native", 1.2, why=why)


# -- import ------------------------------------------------------------------------------


def imports() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as cache:
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        environment = kept | {"PYTHONPYCACHEPREFIX": cache}

        def cpu(code: str) -> float:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", code], check=True, env=environment)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

        codes = ("import jax, interop, shims", "import jax")
        for code in codes:  # compiles it
            cpu(code)
        found = [[cpu(code) for code in codes] for _ in range(15)]
        ours, alone = (statistics.median(times) for times in zip(*found, strict=True))
    why = "half of it is some twenty dataclasses, whose methods Python compiles at import"
    yield Row("import interop, shims", ours, alone, "`import jax`", 0.05, "above", why)


GROUPS = {
    f.__name__: f
    for f in (conversions, memory, growth, compiled, dispatch, eager, tracing, imports)
}
HEAD = ["what", "ours", "beside", "figure", "target", "verdict"]


def table(rows: list[Row]) -> str:
    lines = [HEAD, ["---"] * len(HEAD), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def processor() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores"


def main() -> None:
    chosen = [name for name in sys.argv[1:] if not name.startswith("-")] or list(GROUPS)
    start, rows = time.monotonic(), list[Row]()
    for name in chosen:
        for row in GROUPS[name]():
            rows.append(row)
            print(" | ".join(row.cells()), flush=True)
    print(f"{sum(row.met for row in rows)} of {len(rows)} targets are met")
    print(f"{time.monotonic() - start:.0f} s")
    if "--write" in sys.argv:
        versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES)
        where = f"Python {platform.python_version()}, {versions}. {processor()}; "
        where += f"JAX on {jax.devices()[0].device_kind}. Load average, the bench included: "
        where += f"{os.getloadavg()[1]:.1f}."
        how = (__doc__ or "").split("\n\n")[1]
        head = f"# Benchmarks\n\nWritten by `make bench`. {where}\n\n{how}"
        RESULTS.write_text(f"{head}\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()
