"""Time a train step of a large mixed model beside its native twin: ``make bench-step``.

For each framework as the host: a transformer encoder of 100 M parameters, whose embedding and
residuals are the host's own and whose branches (norm and attention, norm and perceptron) belong
to the other three frameworks in turn, worn by live shims. The twin has the same branches as
native layers of the host, with the same weights. Both are trained in the host's own way, with
``optax.adamw``, on the device that JAX finds, in turns in one process.

``--write`` writes the table to ``TRAIN_STEP.md`` beside this file; ``--small`` tries the script
with a model of a few thousand parameters; names of hosts as arguments run only those.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import brainstate
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import interop
import shims

RESULTS = Path(__file__).with_name("TRAIN_STEP.md")
PACKAGES = ("jax", "brainstate", "flax", "equinox", "optax")
RUNS = 15
OPTIMIZER = optax.adamw(1e-4)
Step = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class Size:
    """How large the model and its batch are.

    Attributes:
        vocabulary, width, heads, layers: of the encoder.
        batch, length: of the tokens.
        steps: how many are timed together.
    """

    vocabulary: int
    width: int
    heads: int
    layers: int
    batch: int
    length: int
    steps: int


LARGE = Size(vocabulary=20_000, width=768, heads=12, layers=12, batch=32, length=256, steps=20)
SMALL = Size(vocabulary=50, width=8, heads=2, layers=2, batch=3, length=5, steps=2)


# -- the models --------------------------------------------------------------------------


def branches(size: Size) -> list[nnx.Module]:
    """What the residual connections of an encoder bypass, as modules of NNX."""
    rngs, width = nnx.Rngs(0), size.width
    made: list[nnx.Module] = []
    for _ in range(size.layers):
        made += [
            nnx.Sequential(
                nnx.LayerNorm(width, rngs=rngs),
                nnx.MultiHeadAttention(size.heads, width, decode=False, rngs=rngs),
            ),
            nnx.Sequential(
                nnx.LayerNorm(width, rngs=rngs),
                nnx.Linear(width, 4 * width, rngs=rngs),
                nnx.gelu,
                nnx.Linear(4 * width, width, rngs=rngs),
            ),
        ]
    return made


def residual(x: jax.Array, parts: Any) -> jax.Array:
    for part in parts:
        x = x + part(x)
    return x


def loss_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """The mean surprise of each next token; what the model reads is not masked."""
    found = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.roll(tokens, -1, -1))
    return found.mean()


class OfNNX(nnx.Module):
    def __init__(self, table: jax.Array, parts: list[Any]):
        self.embed, self.parts = nnx.Embed(*table.shape, rngs=nnx.Rngs(0)), nnx.List(parts)
        self.embed.embedding.set_value(table)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embed.attend(residual(self.embed(tokens), self.parts))


class OfLinen(nn.Module):
    vocabulary: int
    width: int
    parts: tuple[Any, ...]

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(self.vocabulary, self.width, name="embed")
        return embed.attend(residual(embed(tokens), self.parts))


class OfEquinox(eqx.Module):
    table: jax.Array
    parts: list[Any]

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return residual(self.table[tokens], self.parts) @ self.table.T


class OfBrainState(brainstate.nn.Module):
    def __init__(self, table: jax.Array, parts: list[Any]):
        super().__init__()
        self.table, self.parts = brainstate.ParamState(table), parts

    def update(self, tokens: jax.Array) -> jax.Array:
        return residual(self.table.value[tokens], self.parts) @ self.table.value.T


# -- how each framework trains -----------------------------------------------------------


def train_nnx(table: jax.Array, parts: list[Any]) -> Step:
    model = OfNNX(table, parts)
    optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.Param)

    @nnx.jit(donate_argnums=(0, 1))
    def step(model: Any, optimizer: Any, tokens: jax.Array) -> jax.Array:
        loss, grads = nnx.value_and_grad(lambda m: loss_of(m(tokens), tokens))(model)
        optimizer.update(model, grads)
        return loss

    return lambda tokens: step(model, optimizer, tokens)


def train_linen(table: jax.Array, parts: list[Any]) -> Step:
    modules, params = [], {"embed": {"embedding": table}}
    for i, part in enumerate(parts):
        module, variables = part
        modules.append(module)
        params[f"parts_{i}"] = variables["params"]
    model = OfLinen(*table.shape, tuple(modules))
    state = [params, OPTIMIZER.init(params)]

    @jax.jit(donate_argnums=(0, 1))
    def step(params: Any, moments: Any, tokens: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            return loss_of(model.apply({"params": params}, tokens), tokens)

        found, grads = jax.value_and_grad(loss)(params)
        updates, moments = OPTIMIZER.update(grads, moments, params)
        return found, optax.apply_updates(params, updates), moments

    def run(tokens: jax.Array) -> jax.Array:
        loss, *state[:] = step(*state, tokens)
        return loss

    return run


def train_equinox(table: jax.Array, parts: list[Any]) -> Step:
    model = OfEquinox(table, parts)
    state = [model, OPTIMIZER.init(eqx.filter(model, eqx.is_inexact_array))]

    @eqx.filter_jit(donate="all-except-first")
    def step(tokens: jax.Array, model: Any, moments: Any) -> Any:
        def loss(model: Any) -> jax.Array:
            return loss_of(jax.vmap(model)(tokens), tokens)

        found, grads = eqx.filter_value_and_grad(loss)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, moments = OPTIMIZER.update(grads, moments, params)
        return found, eqx.apply_updates(model, updates), moments

    def run(tokens: jax.Array) -> jax.Array:
        loss, *state[:] = step(tokens, *state)
        return loss

    return run


def train_brainstate(table: jax.Array, parts: list[Any]) -> Step:
    model = OfBrainState(table, parts)
    params = model.states(brainstate.ParamState)
    moments = brainstate.LongTermState(OPTIMIZER.init(params.to_dict_values()))

    @brainstate.transform.jit
    def step(tokens: jax.Array) -> jax.Array:
        def loss() -> jax.Array:
            return loss_of(model(tokens), tokens)

        grads, found = brainstate.transform.grad(loss, params, return_value=True)()
        values = params.to_dict_values()
        updates, moments.value = OPTIMIZER.update(dict(grads), moments.value, values)
        for path, value in optax.apply_updates(values, updates).items():
            params[path].value = value
        return found

    return step


TRAIN = {
    "brainstate": train_brainstate,
    "nnx": train_nnx,
    "linen": train_linen,
    "equinox": train_equinox,
}


# -- measuring ---------------------------------------------------------------------------


def converted(branch: nnx.Module, framework: str, size: Size) -> Any:
    example = (size.length, size.width)
    is_there = framework == "nnx"
    return branch if is_there else interop.convert(branch, to=framework, sample_input=example)


def guests(host: str, size: Size) -> list[Any]:
    """The branches as modules of the other frameworks in turn, worn by the host's shims."""
    others = [name for name in TRAIN if name != host]
    is_value = host in ("linen", "equinox")  # donating its weights would delete the guest's
    found: list[Any] = []
    for i, branch in enumerate(branches(size)):
        framework = others[i % 3]
        guest = converted(branch, framework, size)
        module, variables = guest if framework == "linen" else (guest, None)
        given = {} if variables is None else {"params": variables}
        shim = shims.wrap(module, into=host, copy=is_value, **given)
        x = jnp.zeros((1, size.length, size.width))
        found.append((shim, shim.init(jax.random.key(0), x)) if host == "linen" else shim)
    return found


def twins(host: str, size: Size) -> list[Any]:
    """The branches as native layers of the host."""
    return [converted(branch, host, size) for branch in branches(size)]


@dataclass
class Trained:
    """A model in training, and what was measured of it."""

    step: Step
    losses: list[float]
    seconds: list[float]
    calls: list[float]

    def run(self, batches: list[jax.Array]) -> None:
        """Time steps on all ``batches``, and how long the calls alone keep the program."""
        gc.collect()
        gc.disable()
        start = time.perf_counter()
        losses = [self.step(tokens) for tokens in batches]
        called = time.perf_counter()
        jax.block_until_ready(losses[-1])
        self.seconds.append((time.perf_counter() - start) / len(batches))
        self.calls.append((called - start) / len(batches))
        gc.enable()
        self.losses += map(float, losses)


def measured(host: str, size: Size) -> tuple[Trained, Trained]:
    """The mixed model and its twin, trained in turns."""
    table = 0.02 * jax.random.normal(jax.random.key(1), (size.vocabulary, size.width))
    draw = np.random.default_rng(0)
    shape = (size.batch, size.length)
    batches = [jnp.asarray(draw.integers(0, size.vocabulary, shape)) for _ in range(size.steps)]
    models = []
    for parts in (guests(host, size), twins(host, size)):
        with brainstate.environ.context(fit=True):
            models.append(Trained(TRAIN[host](table.copy(), parts), [], [], []))
    for run in range(RUNS + 1):
        for model in models[:: 1 if run % 2 else -1]:
            with brainstate.environ.context(fit=True):
                model.run(batches)
    for model in models:
        del model.seconds[0], model.calls[0]  # in which it was compiled
    return models[0], models[1]


def row(host: str, size: Size) -> str:
    mixed, native = measured(host, size)
    first = [(m.losses[0], m.losses[-1]) for m in (mixed, native)]
    np.testing.assert_allclose(*first, rtol=1e-2)  # they train alike
    step, twin = (statistics.median(m.seconds) for m in (mixed, native))
    call, twin_call = (statistics.median(m.calls) for m in (mixed, native))
    ratios = sorted(a / b for a, b in zip(mixed.seconds, native.seconds, strict=True))
    cells = [
        host,
        f"{step * 1e3:.2f} ms",
        f"{twin * 1e3:.2f} ms",
        f"{step / twin:.3f} × ({ratios[0]:.3f} to {ratios[-1]:.3f})",
        f"{size.batch * size.length / step:,.0f}",
        f"{call * 1e3:.2f} ms, {twin_call * 1e3:.2f} ms",
        f"{first[0][0]:.4f} → {first[0][1]:.4f}, {first[1][0]:.4f} → {first[1][1]:.4f}",
    ]
    return f"| {' | '.join(cells)} |"


TEXT = """# A train step of a mixed model

Written by `make bench-step`. {versions}. {device}.

A transformer encoder of {weights:.3g} M parameters in float32 ({size.layers} layers of width
{size.width}, {size.vocabulary} tokens), trained with adamw on batches of {size.batch} ×
{size.length} tokens. The embedding and the residuals are the host's own; the {branches}
branches belong to the other three frameworks in turn, worn by live shims. The twin has them as
native layers of the host, with the same weights.

Wall-clock time, medians of {runs} times {size.steps} steps, in turns in one process. The call
is what a step takes until the program goes on and leaves the device to work.

| {columns} |
| {dashes} |
{rows}
"""
COLUMNS = (
    "host",
    "a step",
    "of the twin",
    "ratio (least to most)",
    "tokens/s",
    "the call, of the twin",
    "loss from first to last, of the twin",
)


def report(rows: list[str], size: Size) -> str:
    arrays = [x for branch in branches(size) for x in jax.tree.leaves(nnx.state(branch))]
    return TEXT.format(
        versions=", ".join(f"{name} {version(name)}" for name in PACKAGES),
        device=jax.devices()[0].device_kind,
        weights=(sum(x.size for x in arrays) + size.vocabulary * size.width) / 1e6,
        size=size,
        branches=2 * size.layers,
        columns=" | ".join(COLUMNS),
        dashes=" | ".join("---" for _ in COLUMNS),
        runs=RUNS,
        rows="\n".join(rows),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hosts", nargs="*", default=list(TRAIN))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    size, rows = SMALL if args.small else LARGE, []
    for host in args.hosts:
        rows.append(row(host, size))
        print(rows[-1], flush=True)
    text = report(rows, size)
    print(text)
    if args.write:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
