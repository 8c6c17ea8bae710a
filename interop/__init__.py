"""Convert models between BrainState, Flax NNX, Flax Linen and Equinox, exactly.

``to_*`` and ``from_*`` have the names and parameters of ``brainstate.interop``; ``convert``
goes from any framework to any other. Importing this package imports no framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, overload

from . import api as _api
from . import specs
from .api import supported_layers
from .errors import (
    ArgumentError,
    BrokenDependencyError,
    ConversionError,
    InteropError,
    MissingDependencyError,
    MissingKeyError,
    MissingShapeError,
    NotEquivalentError,
    UnmappedLayerError,
    UnsupportedLayerError,
    UnsupportedStructureError,
)

if TYPE_CHECKING:
    import brainstate
    import equinox
    import flax.linen
    import flax.nnx

    from .comparison import (
        Comparison,
        Difference,
        LayerDifference,
        assert_equivalent,
        compare,
    )
    from .correspondence import WeightMapping, mapping
    from .exporting import export
    from .files import load, save
    from .named_weights import load_weights, weights
    from .onnx import to_onnx
    from .registration import (
        LayerContext,
        LayerMapping,
        register_builder,
        register_layer_mapping,
        register_reader,
        registered,
    )
    from .report import Report, Row, explain

DISTRIBUTION = "brainstate-shims"
"""The name that this package is installed by."""

__all__ = [
    "ArgumentError",
    "BrokenDependencyError",
    "Comparison",
    "ConversionError",
    "Difference",
    "InteropError",
    "LayerContext",
    "LayerDifference",
    "LayerMapping",
    "MissingDependencyError",
    "MissingKeyError",
    "MissingShapeError",
    "NotEquivalentError",
    "Report",
    "Row",
    "UnmappedLayerError",
    "UnsupportedLayerError",
    "UnsupportedStructureError",
    "WeightMapping",
    "assert_equivalent",
    "compare",
    "convert",
    "explain",
    "export",
    "from_equinox",
    "from_linen",
    "from_nnx",
    "load",
    "load_weights",
    "mapping",
    "register_builder",
    "register_layer_mapping",
    "register_reader",
    "registered",
    "save",
    "specs",
    "supported_layers",
    "to_equinox",
    "to_linen",
    "to_nnx",
    "to_onnx",
    "weights",
]


# What is beside the conversion itself is imported at first use.
_FILES = {
    "Comparison": "comparison",
    "Difference": "comparison",
    "LayerContext": "registration",
    "LayerDifference": "comparison",
    "LayerMapping": "registration",
    "Report": "report",
    "Row": "report",
    "WeightMapping": "correspondence",
    "assert_equivalent": "comparison",
    "compare": "comparison",
    "explain": "report",
    "export": "exporting",
    "load": "files",
    "load_weights": "named_weights",
    "mapping": "correspondence",
    "register_builder": "registration",
    "register_layer_mapping": "registration",
    "register_reader": "registration",
    "registered": "registration",
    "save": "files",
    "to_onnx": "onnx",
    "weights": "named_weights",
}


@overload
def convert(
    model: Any,
    *,
    to: Literal["brainstate"],
    params: Any = ...,
    state: Any = ...,
    sample_input: Any = ...,
) -> brainstate.nn.Module: ...


@overload
def convert(
    model: Any,
    *,
    to: Literal["nnx"],
    params: Any = ...,
    state: Any = ...,
    sample_input: Any = ...,
) -> flax.nnx.Module: ...


@overload
def convert(
    model: Any,
    *,
    to: Literal["linen"],
    params: Any = ...,
    state: Any = ...,
    sample_input: Any = ...,
) -> tuple[flax.linen.Module, dict[str, Any]]: ...


@overload
def convert(
    model: Any,
    *,
    to: Literal["equinox"],
    params: Any = ...,
    state: Any = ...,
    sample_input: Any = ...,
) -> equinox.Module: ...


@overload
def convert(
    model: Any, *, to: str, params: Any = ..., state: Any = ..., sample_input: Any = ...
) -> Any: ...


def convert(
    model: Any, *, to: str, params: Any = None, state: Any = None, sample_input: Any = None
) -> Any:
    """Convert a model to another framework, structurally and exactly.

    Args:
        model: a layer, or nested ``Sequential`` stacks of layers and plain functions. Not
            changed. A function must treat the examples of a batch independently.
        to: the target framework: ``"brainstate"``, ``"nnx"``, ``"linen"`` or ``"equinox"``.
        params: the variables of a Linen model, ``{"params": …, "batch_stats": …}``.
        state: the ``eqx.nn.State`` of a stateful Equinox model.
        sample_input: one example without its batch axis, or its shape; needed where the
            target fixes input shapes and the model does not tell them. One with a physical
            unit tells that inputs have it.

    Returns:
        A native, standalone model: what ``to_nnx``, ``to_linen``, … return for that target.
        Arrays whose layout agrees are the same objects as the source's; no random number is
        drawn. Dropout and batch normalisation start in evaluation mode and follow the
        target's own switch. Weights with physical units keep them: layers that have some, or
        get an input with one, are tried in the target, and refused where they fail.

    Raises:
        ArgumentError: an argument has the wrong type, or the framework is unknown.
        MissingDependencyError, BrokenDependencyError: a framework cannot be imported.
        UnmappedLayerError: a layer has no rule.
        UnsupportedLayerError: a layer, or one of its options, has no exact counterpart.
        UnsupportedStructureError: a module has forward logic of its own, or parts shared in
            a way that the target cannot express.
        MissingShapeError: ``sample_input`` is needed.
        ConversionError: the given weights do not fit the model.

    Example:
        >>> import jax.numpy as jnp, brainstate
        >>> from flax import nnx
        >>> import interop
        >>> layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        >>> converted = interop.convert(layer, to="brainstate")
        >>> bool(jnp.allclose(converted(jnp.ones((2, 3))), layer(jnp.ones((2, 3)))))
        True
    """
    return _api.convert_with(model, to, params=params, state=state, sample_input=sample_input)


def to_nnx(
    model: Any,
    *,
    rngs: flax.nnx.Rngs | None = None,
    params: Any = None,
    state: Any = None,
    sample_input: Any = None,
) -> flax.nnx.Module:
    """Convert a model to Flax NNX; see :func:`convert` for what is shared and raised.

    Args:
        model: a model of any other framework.
        rngs: streams for the dropout layers of the result, which fork them as native layers
            do. Nothing else draws from them. Without, pass ``rngs=`` when training.
        params, state, sample_input: as in :func:`convert`.

    Returns:
        An ``nnx.Module`` in evaluation mode; ``.train()`` and ``.eval()`` switch it.

    Raises:
        ArgumentError: ``rngs`` is no ``nnx.Rngs``.
        InteropError: a layer has no exact counterpart; as :func:`convert`.

    Example:
        >>> import brainstate, interop
        >>> from flax import nnx
        >>> interop.to_nnx(brainstate.nn.Linear(3, 4), rngs=nnx.Rngs(0)).kernel.shape
        (3, 4)
    """
    return _api.convert_with(
        model,
        "nnx",
        params=params,
        state=state,
        sample_input=sample_input,
        options={"rngs": rngs},
    )


def from_nnx(model: flax.nnx.Module, *, sample_input: Any = None) -> brainstate.nn.Module:
    """Convert a Flax NNX model to BrainState; see :func:`convert`.

    Args:
        model: an ``nnx.Module``: a known layer, or nested ``nnx.Sequential``.
        sample_input: one example without its batch axis, or its shape.

    Raises:
        ArgumentError: ``model`` is no NNX module.
        InteropError: a layer has no exact counterpart, or ``sample_input`` is needed; as
            :func:`convert`.

    Example:
        >>> import interop
        >>> from flax import nnx
        >>> interop.from_nnx(nnx.Linear(3, 4, rngs=nnx.Rngs(0))).out_size
        (4,)
    """
    return _api.convert_from("nnx", model, to="brainstate", sample_input=sample_input)


def to_linen(
    model: Any,
    *,
    train: bool = False,
    params: Any = None,
    state: Any = None,
    sample_input: Any = None,
) -> tuple[flax.linen.Module, dict[str, Any]]:
    """Convert a model to Flax Linen; see :func:`convert`.

    Args:
        model: a model of any other framework.
        train: Linen's ``Sequential`` forwards no switch, so that it is fixed here: build the
            module for training instead of evaluation. Both take the same variables.
        params, state, sample_input: as in :func:`convert`.

    Returns:
        ``(module, variables)``; call ``module.apply(variables, x)``.

    Raises:
        ArgumentError: ``train`` is no bool.
        InteropError: a layer has no exact counterpart; as :func:`convert`.

    Example:
        >>> import brainstate, interop
        >>> module, variables = interop.to_linen(brainstate.nn.Linear(3, 4))
        >>> variables["params"]["kernel"].shape
        (3, 4)
    """
    return _api.convert_with(
        model,
        "linen",
        params=params,
        state=state,
        sample_input=sample_input,
        options={"train": train},
    )


def from_linen(
    module: flax.linen.Module, params: Any, *, sample_input: Any = None
) -> brainstate.nn.Module:
    """Convert a Flax Linen module and its variables to BrainState; see :func:`convert`.

    Args:
        module: a known layer, or nested ``nn.Sequential``.
        params: what ``module.init`` returned: ``{"params": …, "batch_stats": …}``.
        sample_input: one example without its batch axis, or its shape.

    Raises:
        ConversionError: keys of ``params`` are missing or unexpected, or shapes differ.

    Example:
        >>> import flax.linen as nn, interop, jax, jax.numpy as jnp
        >>> module = nn.Dense(4)
        >>> params = module.init(jax.random.key(0), jnp.ones((1, 3)))
        >>> interop.from_linen(module, params).in_size
        (3,)
    """
    return _api.convert_from(
        "linen", module, to="brainstate", params=params, sample_input=sample_input
    )


def to_equinox(
    model: Any,
    *,
    key: Any = None,
    params: Any = None,
    state: Any = None,
    sample_input: Any = None,
) -> equinox.Module:
    """Convert a model to Equinox; see :func:`convert`.

    Args:
        model: a model of any other framework.
        key: accepted for the sake of ``brainstate.interop``'s users; nothing is drawn.
        params, state, sample_input: as in :func:`convert`.

    Returns:
        An ``eqx.Module`` that takes one example (``jax.vmap`` over the batch), in inference
        mode; ``eqx.nn.inference_mode`` switches it. With batch normalisation, call
        ``eqx.nn.make_with_state(interop.to_equinox)(model)`` for the model and its state, and
        name the batch axis ``"batch"``: ``jax.vmap(..., axis_name="batch")``.

        Two things are Equinox's own: its ``LayerNorm`` returns its input's dtype, where the
        others promote with the weights, and variances are taken about the mean, also where
        the source has ``use_fast_variance``, which loses digits at a large mean.

    Raises:
        ArgumentError: ``model`` is no module.
        InteropError: a layer has no exact counterpart; as :func:`convert`.

    Example:
        >>> import brainstate, interop
        >>> interop.to_equinox(brainstate.nn.Linear(3, 4)).weight.shape
        (4, 3)
    """
    return _api.convert_with(
        model,
        "equinox",
        params=params,
        state=state,
        sample_input=sample_input,
        options={"key": key},
    )


def from_equinox(
    model: equinox.Module, *, state: Any = None, sample_input: Any = None
) -> brainstate.nn.Module:
    """Convert an Equinox model to BrainState; see :func:`convert`.

    Args:
        model: a known layer, or nested ``eqx.nn.Sequential``.
        state: the ``eqx.nn.State`` of a model with batch normalisation.
        sample_input: one example as the model takes it, or its shape: ``(channels, *space)``,
            where ``brainstate.interop`` wants ``(*space, channels)``.

    Returns:
        A BrainState module that takes batches. Running statistics are the ones that inference
        uses. A ``LayerNorm`` returns the common dtype of input and weights, where Equinox's
        returns its input's.

    Raises:
        ArgumentError: ``model`` is no Equinox module.
        InteropError: a layer has no exact counterpart, or ``state`` or ``sample_input`` is
            needed; as :func:`convert`.

    Example:
        >>> import equinox as eqx, interop, jax
        >>> interop.from_equinox(eqx.nn.Linear(3, 4, key=jax.random.key(0))).out_size
        (4,)
    """
    return _api.convert_from(
        "equinox", model, to="brainstate", state=state, sample_input=sample_input
    )


if not TYPE_CHECKING:  # where names that are not in it would count as known

    def __getattr__(name: str) -> Any:
        if name not in _FILES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_FILES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
