"""What a type checker knows of the results: ``make types`` checks it, and nothing runs it."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from typing import Any, assert_type

import brainstate
import equinox as eqx
import flax.linen as nn
from flax import nnx

import interop


def converted(model: nnx.Module, target: str) -> None:
    """``convert`` returns what the target's ``to_*`` returns."""
    assert_type(interop.convert(model, to="brainstate"), brainstate.nn.Module)
    assert_type(interop.convert(model, to="nnx", sample_input=(3,)), nnx.Module)
    assert_type(interop.convert(model, to="linen"), tuple[nn.Module, dict[str, Any]])
    assert_type(interop.convert(model, to="equinox"), eqx.Module)
    assert_type(interop.convert(model, to=target), Any)
    assert_type(interop.from_nnx(model), brainstate.nn.Module)


def proved(a: nnx.Module, b: eqx.Module) -> None:
    """Reports, mappings and comparisons are public types."""
    assert_type(interop.explain(a, "equinox"), interop.Report)
    assert_type(interop.mapping(a, b), interop.WeightMapping)
    assert_type(interop.mapping(a, b).invert().to_json(), str)
    assert_type(interop.compare(a, b).departs, interop.LayerDifference | None)
    assert_type(interop.weights(a), dict[str, Any])
    assert_type(interop.supported_layers("nnx"), dict[str, list[str]])


def wrong(model: nnx.Module) -> None:
    """What is an error when it runs is one before."""
    interop.convert(model)  # pyright: ignore[reportCallIssue]
    interop.convert(model, "nnx")  # pyright: ignore[reportCallIssue]
    interop.to_linen(model, train="yes")  # pyright: ignore[reportArgumentType]
