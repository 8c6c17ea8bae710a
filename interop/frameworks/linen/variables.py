"""What variables a module needs, compared with those given before anything is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import flax.linen as nn
import jax
import numpy as np

from ... import formulas
from ...chains import Chain, Step, steps_of
from ...composites.linen import COMPOSITES
from ...errors import (
    ConversionError,
    UnsupportedLayerError,
    UnsupportedStructureError,
)
from ...registry import Adapter

Key = tuple[str, ...]


# The shape of each array: a number is fixed, a name is any size, the same wherever it stands.
_VARIABLES: dict[type, Any] = {
    nn.Dense: lambda m: {
        ("params", "kernel"): ("in", m.features),
        ("params", "bias"): (m.features,) if m.use_bias else None,
    },
    nn.Conv: lambda m: {
        ("params", "kernel"): (*kernel_size(m), "in", m.features),
        ("params", "bias"): (m.features,) if m.use_bias else None,
    },
    nn.DenseGeneral: lambda m: _general_variables(m),
    nn.Einsum: lambda m: {
        ("params", "kernel"): tuple(m.shape),
        ("params", "bias"): _einsum_bias(m) if m.use_bias else None,
    },
    nn.MultiHeadDotProductAttention: lambda m: _attention_variables(m),
    nn.MultiHeadAttention: lambda m: _attention_variables(m),
    nn.SelfAttention: lambda m: _attention_variables(m),
    nn.SimpleCell: lambda m: _cell_variables(m),
    nn.LSTMCell: lambda m: _cell_variables(m),
    nn.OptimizedLSTMCell: lambda m: _cell_variables(m),
    nn.GRUCell: lambda m: _cell_variables(m) | {("params", "hn", "bias"): (m.features,)},
    nn.MGUCell: lambda m: {
        **_cell_variables(m),
        ("params", "hn", "bias"): (m.features,) if m.reset_gate else None,
    },
    nn.ConvLSTMCell: lambda m: {
        ("params", "ih", "kernel"): (*axes_of(m.kernel_size), "in", 4 * m.features),
        ("params", "hh", "kernel"): (*axes_of(m.kernel_size), m.features, 4 * m.features),
        ("params", "ih", "bias"): (4 * m.features,) if m.use_bias else None,
        ("params", "hh", "bias"): (4 * m.features,) if m.use_bias else None,
    },
    nn.ConvLocal: lambda m: {
        ("params", "kernel"): (*_places(m), "rows", m.features),
        ("params", "bias"): (*_places(m), m.features) if m.use_bias else None,
    },
    nn.ConvTranspose: lambda m: {
        ("params", "kernel"): (
            *kernel_size(m),
            *((m.features, "in") if m.transpose_kernel else ("in", m.features)),
        ),
        ("params", "bias"): (m.features,) if m.use_bias else None,
    },
    nn.Embed: lambda m: {("params", "embedding"): (m.num_embeddings, m.features)},
    nn.LayerNorm: lambda m: {
        ("params", "scale"): _feature_names(m) if m.use_scale else None,
        ("params", "bias"): _feature_names(m) if m.use_bias else None,
    },
    nn.RMSNorm: lambda m: {("params", "scale"): _feature_names(m) if m.use_scale else None},
    nn.GroupNorm: lambda m: {
        ("params", "scale"): ("features",) if m.use_scale else None,
        ("params", "bias"): ("features",) if m.use_bias else None,
    },
    nn.InstanceNorm: lambda m: {
        ("params", "scale"): _feature_names(m) if m.use_scale else None,
        ("params", "bias"): _feature_names(m) if m.use_bias else None,
    },
    nn.BatchNorm: lambda m: {
        ("params", "scale"): ("features",) if m.use_scale else None,
        ("params", "bias"): ("features",) if m.use_bias else None,
        ("batch_stats", "mean"): ("features",),
        ("batch_stats", "var"): ("features",),
    },
    nn.Dropout: lambda m: {},
}


def _composite_variables(m: Any) -> dict[Key, Any]:
    empty = m.skeleton.empty
    parts = {"params": m.skeleton.trained(empty), "batch_stats": m.skeleton.buffers(empty)}
    return {key: leaf.shape for key, leaf in flatten(parts, ())}


def _general_variables(m: nn.DenseGeneral) -> dict[Key, Any]:
    batch = tuple(f"batch axis {axis}" for axis in axes_of(m.batch_dims))
    inputs, outputs = tuple(f"axis {axis}" for axis in axes_of(m.axis)), axes_of(m.features)
    return {
        ("params", "kernel"): (*batch, *inputs, *outputs),
        ("params", "bias"): (*batch, *outputs) if m.use_bias else None,
    }


def _einsum_bias(m: nn.Einsum) -> tuple[int, ...]:
    return formulas.einsum_bias_shape(equation_of(m), tuple(m.shape))


def equation_of(m: nn.Einsum) -> str:
    if m.einsum_str is None:
        _refuse(m, "einsum_str", "the equation is then an argument of each call")
    return m.einsum_str


def _refuse(m: nn.Module, option: str, reason: str) -> NoReturn:
    raise UnsupportedLayerError(
        type(m),
        f"{option}={getattr(m, option)!r}: {reason}",
        path="model",
        option=option,
        value=getattr(m, option),
    )


def _attention_variables(m: nn.MultiHeadDotProductAttention) -> dict[Key, Any]:
    heads = m.num_heads
    depth = "depth" if m.qkv_features is None else m.qkv_features // heads
    found: dict[Key, Any] = {
        ("params", "out", "kernel"): (heads, depth, m.out_features or "out"),
        ("params", "out", "bias"): (m.out_features or "out",),
    }
    for part in ("query", "key", "value"):
        found["params", part, "kernel"] = (f"in of {part}", heads, depth)
        found["params", part, "bias"] = (heads, depth)
        found["params", f"{part}_ln", "scale"] = (depth,)
    return {
        key: shape
        for key, shape in found.items()
        if (m.use_bias or key[-1] != "bias")
        and (key[-1] != "scale" or (m.normalize_qk and key[1] != "value_ln"))
    }


# A cell's gates by name, and which parts have the biases: that of the input, or the state.
_GATES: dict[type, tuple[Sequence[str], str]] = {
    nn.SimpleCell: (("",), "i"),
    nn.LSTMCell: ("ifgo", "h"),
    nn.OptimizedLSTMCell: ("ifgo", "h"),
    nn.GRUCell: ("rzn", "i"),
    nn.MGUCell: ("fn", "i"),
}


def gates_of(m: Any) -> tuple[Sequence[str], str]:
    return next(_GATES[cls] for cls in type(m).__mro__ if cls in _GATES)


def _cell_variables(m: Any) -> dict[Key, Any]:
    gates, biased = gates_of(m)
    found: dict[Key, Any] = {}
    for gate in gates:
        found["params", f"i{gate}", "kernel"] = ("in", m.features)
        found["params", f"h{gate}", "kernel"] = (m.features, m.features)
        found["params", f"{biased}{gate}", "bias"] = (m.features,)
    return found


_SUBMODULES = {
    nn.RNN: ("cell",),
    nn.Bidirectional: ("forward_rnn", "backward_rnn"),
    nn.SpectralNorm: ("layer_instance",),
    nn.WeightNorm: ("layer_instance",),
}


def normalized_by(m: nn.WeightNorm, names: Iterable[str]) -> list[str]:
    """Those arrays of the layer within, by name, that a ``WeightNorm`` normalises."""
    parts = m.variable_filter
    return [n for n in names if not parts or any(p in f"layer_instance/{n}" for p in parts)]


def _normalized_variables(m: Any, found: Mapping[Key, Any]) -> dict[Key, Any]:
    """What is beside the variables of the layer within, given those."""
    within = ("params", "layer_instance")
    params = {key[2]: shape for key, shape in found.items() if key[:2] == within and shape}
    if isinstance(m, nn.WeightNorm):
        names = normalized_by(m, params) if m.use_scale else []
        axes = None if m.feature_axes is None else axes_of(m.feature_axes)
        return {
            ("params", f"layer_instance/{name}/scale"): [
                size
                for i, size in enumerate(params[name])
                if i in {axis % len(params[name]) for axis in axes or ()}
            ]
            for name in names
        }
    if m.n_steps < 1 or "kernel" not in params:
        return {}
    place = m.collection_name, "layer_instance/kernel"
    return {
        (place[0], f"{place[1]}/u"): (1, params["kernel"][-1]),
        (place[0], f"{place[1]}/sigma"): (),
    }


_WRAPPERS = (nn.SpectralNorm, nn.WeightNorm)


def _is_opaque(module: Any, layer_type: type) -> bool:
    """Whether the module holds variables of a part that does not convert."""
    if layer_type in _WRAPPERS:
        return type(module.layer_instance) not in _VARIABLES
    return getattr(module, "dot_general_cls", None) is not None


def _declared(
    adapter: Adapter, module: Any, path: str, seen: set[int]
) -> dict[Key, Any] | None:
    """The shapes of a module's arrays; None where only its reader can tell.

    A module that stands at two places has its arrays at the first.
    """
    if id(module) in seen:
        return {}
    seen.add(id(module))
    layer_type = adapter.reader(module, path).layer_type
    if _is_opaque(module, layer_type):
        return None
    if layer_type in COMPOSITES:
        return _composite_variables(module)
    if layer_type not in _SUBMODULES:
        return _VARIABLES[layer_type](module) if layer_type in _VARIABLES else None
    found: dict[Key, Any] = {}
    for name in _SUBMODULES[layer_type]:
        below = _declared(adapter, getattr(module, name), f"{path}.{name}", seen) or {}
        for (collection, *rest), shape in below.items():
            own = shape and tuple(f"{n} of {name}" if isinstance(n, str) else n for n in shape)
            found[(collection, name, *rest)] = own
        if layer_type in _WRAPPERS:
            found |= _normalized_variables(module, found)
    return found


def kernel_size(m: nn.Conv | nn.ConvLocal | nn.ConvTranspose) -> tuple[int, ...]:
    return axes_of(m.kernel_size)


def _places(m: nn.ConvLocal) -> tuple[str, ...]:
    return tuple(f"place {i}" for i in range(len(kernel_size(m))))


def _feature_names(m: nn.LayerNorm | nn.RMSNorm | nn.InstanceNorm) -> tuple[str, ...]:
    return tuple(f"axis {axis}" for axis in axes_of(m.feature_axes))


def axes_of(axes: Any) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(axes)


def check_variables(adapter: Adapter, model: nn.Module, variables: Mapping[str, Any]) -> None:
    """Compare keys and shapes of the whole model, and report all that is wrong together.

    Raises:
        ConversionError: keys are missing or unexpected, or shapes differ.
        UnsupportedStructureError: one module is used in two different stacks.
        UnmappedLayerError, UnsupportedLayerError: a layer does not convert anyway.
    """
    wanted: dict[Key, tuple[int | str, ...]] = {}
    parents: dict[int, tuple[Any, Any]] = {}  # with the module, which so keeps its id
    given = {key: v for key, v in flatten(variables, ()) if key[0] != "cache"}  # of a run
    for module, scope, parent in leaves_of(adapter, model, (), None):
        places = "".join(map(_place, scope))
        declared = _declared(adapter, module, f"model{places}", set())
        if declared is None:  # it checks them by itself
            given = {k: v for k, v in given.items() if k[1 : 1 + len(scope)] != scope}
            continue
        shapes = {key: shape for key, shape in declared.items() if shape is not None}
        if shapes and parents.setdefault(id(module), (module, parent))[1] is not parent:
            raise UnsupportedStructureError(
                f"one {type(module).__qualname__} is used in two different stacks",
                path="model",
                remedy="Use it twice in one stack, or wrap the model live with shims.wrap",
            )
        for (collection, *names), shape in shapes.items():
            key = (collection, *scope, *names)
            wanted[key] = tuple(
                n if isinstance(n, int) else f"{n} of {'/'.join(scope)}" for n in shape
            )
    mismatched = _mismatches(wanted, given)
    if wanted.keys() == given.keys() and not mismatched:
        return
    has_collections = "params" in variables or not wanted
    raise ConversionError(
        "the variables do not fit the module",
        path="model",
        missing=["/".join(k) for k in sorted(wanted.keys() - given.keys())],
        unexpected=["/".join(k) for k in sorted(given.keys() - wanted.keys())],
        mismatched=mismatched,
        remedy=None if has_collections else 'Pass the collections: {"params": ...}',
    )


def leaves_of(
    adapter: Adapter, module: Any, scope: Key, parent: Any
) -> Iterator[tuple[nn.Module, Key, Any]]:
    """Every layer below ``module`` once a stack, with the scope of its variables."""
    if isinstance(module, nn.Sequential):
        parts = [(layer, (f"layers_{i}",)) for i, layer in enumerate(module.layers)]
    elif isinstance(module, nn.Module) and adapter.steps(module):
        chain, places = chain_of(module)
        parts = [(step.part, names) for step, names in zip(chain.steps, places, strict=True)]
    else:
        if isinstance(module, nn.Module):
            yield module, scope, parent
        return
    seen: set[int] = set()
    for layer, names in parts:
        if id(layer) not in seen:
            seen.add(id(layer))
            yield from leaves_of(adapter, layer, (*scope, *names), module)


def chain_of(module: nn.Module) -> tuple[Chain, list[Key]]:
    """What a module with ``setup`` comes to, if it applies layers and functions in order.

    Returns:
        Its steps, each layer by itself, and the names of the place of each one's variables.
        No steps if it does anything else.
    """
    method = getattr(type(module).__call__, "__wrapped__", None)  # by Flax's own wrapper
    if hasattr(method, "__wrapped__") or getattr(method, "compact", False):
        return Chain(other="it is decorated, as by nn.compact"), []
    try:
        bound = module.bind({})
    except Exception:
        return Chain(other="it has parts that cannot be set up alone"), []
    chain = steps_of(method, bound, lambda value: isinstance(value, nn.Module))
    alone: dict[int, Any] = {}
    steps: list[Step] = []
    places: list[Key] = []
    for step in chain.steps:
        part = step.part
        is_module = isinstance(part, nn.Module)
        if is_module and id(part) not in alone:
            alone[id(part)] = part.unbind()[0]
        places.append(tuple(part.scope.path) if is_module else ())  # pyright: ignore
        steps.append(dataclasses.replace(step, part=alone.get(id(part), part)))
    return dataclasses.replace(chain, steps=tuple(steps)), places


def within(variables: Mapping[str, Any], names: Key) -> dict[str, Any]:
    """The part of a module's variables that is at a place."""
    for name in names:
        variables = {c: tree[name] for c, tree in variables.items() if name in tree}
    return dict(variables)


def flatten(tree: Any, path: Key) -> Iterator[tuple[Key, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from flatten(value, (*path, str(key)))
    else:
        yield path, tree


def _place(name: str) -> str:
    """A name of a scope as part of a path: the layers of a stack have theirs by number."""
    number = name.removeprefix("layers_")
    return f"[{number}]" if number.isdigit() and number != name else f".{name}"


def _mismatches(
    wanted: Mapping[Key, tuple[int | str, ...]], given: Mapping[Key, Any]
) -> list[str]:
    sizes: dict[int | str, int] = {}
    lines: list[str] = []
    for key in sorted(wanted.keys() & given.keys()):
        array, where = given[key], "/".join(key)
        known = [sizes.get(n, n) for n in wanted[key]]
        if isinstance(array, nn.meta.AxisMetadata):
            lines.append(f"{where} is boxed in {type(array).__name__} (use nn.unbox)")
        elif not isinstance(array, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            lines.append(f"{where} is a {type(array).__qualname__}, not an array")
        elif _fits(array.shape, known):
            sizes |= zip(wanted[key], array.shape, strict=True)
        else:
            shown = ", ".join(str(n).partition(" of ")[0] for n in known)
            comma = "," if len(known) == 1 else ""
            lines.append(f"{where} has shape {array.shape}, wanted ({shown}{comma})")
    return lines


def _fits(shape: tuple[int, ...], known: list[int | str]) -> bool:
    return len(shape) == len(known) and all(
        size == n or isinstance(n, str) for size, n in zip(shape, known, strict=True)
    )
