"""What a type checker knows of live shims: ``make types`` checks it, and nothing runs it."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from typing import Any, assert_type

import brainstate
import equinox as eqx
import flax.linen as nn
from flax import nnx

import shims


def is_a_module_of_the_host(
    layer: brainstate.nn.Module, module: nn.Module, network: eqx.Module, target: str
) -> None:
    """Each class is one of its host's modules, and ``wrap`` knows which."""
    of_nnx: nnx.Module = assert_type(shims.ToNNX(layer), shims.ToNNX)
    of_linen: nn.Module = assert_type(shims.ToLinen(layer), shims.ToLinen)
    of_equinox: eqx.Module = assert_type(shims.ToEquinox(layer), shims.ToEquinox)
    states: brainstate.nn.Module = assert_type(
        shims.FromEquinox(network, axis_name="batch"), shims.FromEquinox
    )
    others: list[brainstate.nn.Module] = [shims.FromNNX(of_nnx), shims.FromLinen(module, {})]
    assert_type(shims.wrap(layer, into="nnx"), nnx.Module)
    assert_type(shims.wrap(layer, into="linen"), nn.Module)
    assert_type(shims.wrap(layer, into="equinox", copy=True), eqx.Module)
    assert_type(shims.wrap(module, into="brainstate", params={}), brainstate.nn.Module)
    assert_type(shims.wrap(layer, into=target), Any)
    assert_type(shims.ToNNX(layer).materialize(), nnx.Module)
    assert_type(shims.FromNNX(of_nnx).materialize(), brainstate.nn.Module)
    assert_type(shims.load_traced("file", into="nnx"), nnx.Module)
    assert_type(shims.explain(of_nnx), shims.LinkReport)
    del of_linen, of_equinox, states, others


def wrong(layer: brainstate.nn.Module) -> None:
    """What is an error when it runs is one before."""
    shims.wrap(layer)  # pyright: ignore[reportCallIssue]
    shims.ToNNX(layer, rngs=0)  # pyright: ignore[reportArgumentType]
