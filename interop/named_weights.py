"""The weights of a model by name, and a model that takes them over."""

# jax.tree_util declares some of its types only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .api import adapter_of, convert_with, keywords_of
from .errors import ArgumentError, ConversionError
from .parameters import is_quantity, path_of
from .registry import Adapter

__all__ = ["described", "load_weights", "named", "open_any", "replaced", "weights"]


def weights(model: Any, *, params: Any = None, state: Any = None) -> dict[str, Any]:
    """Name every array of a model that lasts.

    Args:
        model: a module of any framework, also a live shim or one with forward logic of its
            own; or the pair ``(module, variables)``, ``(model, state)``.
        params: the variables of a Linen model.
        state: the ``eqx.nn.State`` of a stateful Equinox model.

    Returns:
        The model's own array objects by their paths, ``"layers/0/kernel"``, in the model's
        order: parameters, running statistics and other buffers. Steps of a path are always
        text. A tied weight stands there once; an array with a unit is a ``Quantity``. Random
        keys are left out, and so is what belongs to one run: hidden states, caches.

    Raises:
        ArgumentError: ``model`` is no module, or ``params`` or ``state`` is missing.
        ConversionError: a state holds something else than arrays, or two paths read alike.

    Example:
        >>> import interop
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
        >>> {name: array.shape for name, array in interop.weights(model).items()}
        {'layers/0/bias': (4,), 'layers/0/kernel': (3, 4)}
    """
    return named(*open_any(model, params, state))


def load_weights(
    model: Any,
    weights: Mapping[str, Any],
    *,
    strict: bool = True,
    params: Any = None,
    state: Any = None,
    source: Any = None,
    sample_input: Any = None,
) -> Any:
    """Give a model other weights, all of them or none.

    Args:
        model, params, state: as in :func:`interop.weights`. Its own weights may be abstract,
            ``jax.ShapeDtypeStruct``.
        weights: arrays by name, as :func:`interop.weights` returns them. Not changed. JAX
            arrays become the model's as they are; others are copied to where its own were.
        strict: whether names that are missing or not the model's are an error; with
            ``source`` they always are.
        source: a model of another framework that ``weights`` belong to, if not to ``model``,
            which must be what :func:`interop.convert` makes of it; its own values do not
            matter, and it is not changed.
        sample_input: with ``source``, as in :func:`interop.convert`.

    Returns:
        The loaded model, always; use it. Modules that can change (NNX, BrainState) are the
        same object, changed. Others are new ones, and ``model`` is as before: ``(module,
        variables)`` for Linen, and for Equinox the module, or ``(module, state)`` if it was
        given with a state. Random keys and the state of a run stay as they are.

    Raises:
        ConversionError: names are missing or unexpected, or shapes, dtypes or units differ;
            all are reported together, and nothing was changed.
        ArgumentError: as :func:`interop.weights`; or ``weights`` is no mapping.
        InteropError: ``source`` does not convert.

    Example:
        >>> import brainstate, interop
        >>> a, b = brainstate.nn.Linear(3, 4), brainstate.nn.Linear(3, 4)
        >>> interop.load_weights(a, interop.weights(b)) is a
        True
        >>> a.weight.value["weight"] is b.weight.value["weight"]
        True
    """
    adapter, node = open_any(model, params, state)
    given: Any = weights
    if not isinstance(given, Mapping):
        raise ArgumentError(
            f"weights must be a mapping from names to arrays, got {type(given).__qualname__}",
            remedy="Pass what interop.weights returned; interop.load reads files",
        )
    if source is not None:
        weights = _converted(weights, source, adapter.name, sample_input)
    _check(named(adapter, node), weights, strict)
    return adapter.native(replaced(adapter, node, weights))


def open_any(model: Any, params: Any = None, state: Any = None) -> tuple[Adapter, Any]:
    """The adapter and the root node of any model, of convertible layers or not."""
    module, keywords = keywords_of(model)
    adapter = adapter_of(module)
    given = {"params": params, "state": state}
    keywords |= {key: value for key, value in given.items() if value is not None}
    return adapter, adapter.open(module, keywords.get("params"), keywords.get("state"))


def named(adapter: Adapter, node: Any) -> dict[str, Any]:
    """:func:`weights` of a node."""
    found: dict[str, Any] = {}

    def note(name: str, leaf: Any) -> Any:
        if name in found:
            raise ConversionError(
                f"two of its arrays are both called {name!r}",
                path="model",
                remedy="Rename the attribute or key that holds one of them",
            )
        found[name] = leaf
        return leaf

    _each(adapter, node, note)
    return found


def replaced(adapter: Adapter, node: Any, weights: Mapping[str, Any]) -> Any:
    """``node`` with the arrays that ``weights`` has, which fit; in place where it can."""

    def place(name: str, leaf: Any) -> Any:
        return _placed(leaf, weights[name]) if name in weights else leaf

    return adapter.hold(node, _each(adapter, node, place))


def _each(adapter: Adapter, node: Any, fn: Callable[[str, Any], Any]) -> dict[Any, Any]:
    """What a node holds, with ``fn(name, leaf)`` in place of each array."""

    def visit(path: tuple[Any, ...], keys: Any, leaf: Any) -> Any:
        # a box that holds one value, such as one with the names of its axes, is its value
        boxed = bool(keys) and getattr(keys[-1], "name", None) == "value"
        steps = (*path, *path_of(keys[:-1] if boxed else keys))
        name = "/".join(map(str, steps))
        if _is_key(leaf):
            return leaf
        if isinstance(leaf, bool | int | float | complex):
            leaf = jnp.asarray(leaf)
        if not (is_quantity(leaf) or hasattr(leaf, "dtype")):
            raise ConversionError(
                f"it holds a {type(leaf).__qualname__}, which is no array",
                path=name,
                remedy="Keep it in an attribute that is no state of the model",
            )
        return fn(name, leaf)

    return {
        path: jax.tree_util.tree_map_with_path(partial(visit, path), tree, is_leaf=is_quantity)
        for path, tree in adapter.held(node).items()
    }


def _is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _check(wanted: Mapping[str, Any], given: Mapping[str, Any], strict: bool) -> None:
    facts = {
        name: (described(wanted[name]), described(given[name]))
        for name in wanted
        if name in given
    }
    mismatched = [f"{n} (wanted {a}, got {b})" for n, (a, b) in facts.items() if a != b]
    missing = [name for name in wanted if name not in given] if strict else []
    unexpected = [str(name) for name in given if name not in wanted] if strict else []
    if missing or unexpected or mismatched:
        raise ConversionError(
            "the weights do not fit the model",
            path="model",
            missing=missing,
            unexpected=unexpected,
            mismatched=mismatched,
            remedy="Nothing was changed. Weights of another framework's model need source=; "
            "strict=False leaves missing and unexpected ones alone",
        )


def described(leaf: Any) -> str:
    """Shape, dtype and unit, as in ``float32[3, 4] mV``."""
    if is_quantity(leaf):
        return f"{described(leaf.mantissa)} {leaf.unit}"
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return type(leaf).__qualname__
    return f"{leaf.dtype}{list(leaf.shape)}"


def _placed(old: Any, new: Any) -> Any:
    if is_quantity(old):
        return type(old)(_placed(old.mantissa, new.mantissa), unit=old.unit)
    if isinstance(new, jax.Array):
        return new
    if isinstance(old, np.ndarray):
        return np.array(new)
    committed = isinstance(old, jax.Array) and getattr(old, "committed", False)
    return jax.device_put(jnp.array(new), old.sharding if committed else None)


def _converted(
    weights: Mapping[str, Any], source: Any, to: str, sample_input: Any
) -> dict[str, Any]:
    """Weights of ``source`` as those of the model that it converts to."""
    adapter, node = open_any(source)
    _check(named(adapter, node), weights, strict=True)
    copy = adapter.with_parameters(node, adapter.parameters(node))
    module, keywords = keywords_of(adapter.native(replaced(adapter, copy, weights)))
    converted = convert_with(module, to, sample_input=sample_input, options={}, **keywords)
    return named(*open_any(converted))
