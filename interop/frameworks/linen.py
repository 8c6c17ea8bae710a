"""Flax Linen. Channels last and batched; modules are frozen dataclasses without arrays.

A node is the module and its part of the variables, ``{collection: {name: array}}``. The
layers of a ``Sequential`` find theirs under ``layers_0``, ``layers_1``, …; a module used twice
under the name of its first place. Train or evaluation mode is a field of each layer, which
``Sequential`` cannot forward. A layer's ``dtype`` is what its operands are cast to in
``Dense``, and only the dtype of the result in the normalisations.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import flax.linen as nn
import jax
import numpy as np
from flax.linen import dtypes

from .. import formulas, specs
from ..composites.core import combine, split
from ..composites.linen import COMPOSITES
from ..errors import (
    ArgumentError,
    ConversionError,
    UnsupportedLayerError,
    UnsupportedStructureError,
)
from ..partitioning import Partitioning
from ..registry import Adapter
from .nnx import (
    ATTENTION,
    RNNS,
    attention_options,
    bidirectional_fields,
    bidirectional_options,
    build_pool,
    cell_fields,
    cell_options,
    check_attention,
    check_bias,
    conv_fields,
    conv_options,
    conv_transpose_fields,
    conv_transpose_options,
    gates,
    group_axes,
    joined,
    read_cell,
    read_pool,
    read_rnns,
)

Key = tuple[str, ...]

# Collections that a call leaves behind; "carry" is what live wrappers call hidden state.
_OF_A_RUN = ("intermediates", "perturbations", "cache", "carry")


@dataclasses.dataclass(eq=False)
class Node:
    """A module and its part of the variables; ``placed`` once a stack has taken it in.

    The variables are without boxes; a root keeps in ``given`` those that the user gave.
    """

    module: Any
    variables: Mapping[str, Any]
    placed: bool = False
    given: Mapping[str, Any] | None = None

    def array(self, name: str, collection: str = "params") -> Any:
        """The array of that name, or None."""
        return self.variables.get(collection, {}).get(name)


class Linen(Adapter):
    name = "linen"
    module_type = nn.Module
    fixed = {"promote_dtype": dtypes.promote_dtype}
    companion = "params"
    has_partitionings = True

    def open(self, model, params, state):
        super().open(model, None, state)
        if not isinstance(params, Mapping):
            raise ArgumentError(
                f"linen models keep their weights outside: expected a mapping of variables, "
                f"got {type(params).__qualname__}",
                path="model",
                remedy='Pass what model.init(...) returned, {"params": ...}',
            )
        return Node(model, _unboxed(params), given=params)

    def check(self, root):
        _check_variables(root.module, root.variables)

    def read_function(self, fn):
        return read_pool(fn)

    def read_composite(self, node, ctx):
        trained, buffers = (node.variables.get(c, {}) for c in ("params", "batch_stats"))
        return node.module.skeleton.merge(combine(trained, buffers))

    def build_composite(self, cls, spec, ctx):
        skeleton, arrays = split(spec)
        trained, buffers = skeleton.trained(arrays), skeleton.buffers(arrays)
        module = cls(skeleton=skeleton, deterministic=not ctx.options.get("train", False))
        return _node(module, trained, **({"batch_stats": buffers} if buffers else {}))

    def close(self, built, options):
        train = options.get("train", False)
        if not isinstance(train, bool):
            raise ArgumentError(
                f"train must be True or False, got {train!r}",
                remedy="Pass train=True for the training twin",
            )
        if not isinstance(built, Node):
            built = Node(nn.Sequential((built,)), {})
        return built.module, built.variables

    def module(self, node):
        return node.module if isinstance(node, Node) else node

    def arrays(self, node):
        masks = (getattr(m, "mask", None) for m, _, _ in _leaves(node.module, (), None))
        held = jax.tree.leaves(node.variables)
        return [*held, *(mask for mask in masks if mask is not None)]

    def partitionings(self, node):
        flat: Any = jax.tree_util.tree_leaves_with_path(node.given, is_leaf=is_box)
        return [
            ("/".join(str(key.key) for key in keys), leaf.value, found)
            for keys, leaf in flat
            if is_box(leaf) and (found := partitioning_of(leaf)) is not None
        ]

    def partition(self, built, partitionings):
        if not isinstance(built, Node):
            return built, set()
        placed = {id(array) for array in jax.tree.leaves(built.variables)}
        variables = jax.tree.map(
            lambda array: boxed(array, partitionings.get(id(array))), built.variables
        )
        return Node(built.module, variables), placed & partitionings.keys()

    def parameters(self, node):
        return (node.variables if node.given is None else node.given).get("params", {})

    def with_parameters(self, node, parameters):
        return Node(node.module, {**node.variables, "params": _unboxed(parameters)})

    def container(self, leaves):
        tree: dict[str, Any] = {}
        for path, leaf in leaves.items():
            part = tree
            for step in path[:-1]:
                part = part.setdefault(step, {})
            part[path[-1]] = leaf
        return tree

    def held(self, node):
        return {(k,): tree for k, tree in node.variables.items() if k not in _OF_A_RUN}

    def hold(self, node, values):
        changed = {name: tree for (name,), tree in values.items()}
        variables = {**node.variables, **changed}
        given = None if node.given is None else _boxed_as(node.given, variables)
        return Node(node.module, variables, given=given)

    def native(self, node):
        return node.module, node.variables if node.given is None else node.given

    def run(self, node, inputs, train):
        mutable = [name for name in node.variables if name != "params"]
        module = _in_mode(node.module, train, {})
        taken = inspect.signature(type(module).__call__).parameters.keys()
        taken -= _fields(type(module))  # which are set already
        modes = {name: train is value for name, value in _MODES.items() if name in taken}
        return module.apply(node.variables, *inputs, mutable=mutable, **modes)[0]

    def for_callback(self, node):
        return node

    def from_callback(self, built):
        return Node(*built) if isinstance(built, tuple) else built

    def added_state(self, module, rule):
        return _fields(type(module)) - _fields(rule.layer_type)

    def has_children(self, module):
        return True  # they may appear in setup, or in a compact call


adapter = Linen()
adapter.ships(COMPOSITES)


def is_box(value: Any) -> bool:
    """Whether ``value`` is an array in one of Linen's own boxes of names."""
    return type(value) in (nn.Partitioned, nn.LogicallyPartitioned)


def _boxed_as(given: Any, tree: Any) -> Any:
    """``tree`` in the boxes that the user's own variables have."""

    def box(old: Any, new: Any) -> Any:
        return old.replace_boxed(new) if is_box(old) and not is_box(new) else new

    return jax.tree.map(box, given, tree, is_leaf=is_box)


def _unboxed(tree: Any) -> Any:
    """``tree`` without the boxes that :func:`partitioning_of` understands."""

    def unbox(value: Any) -> Any:
        return value.value if is_box(value) and partitioning_of(value) is not None else value

    return jax.tree.map(unbox, tree, is_leaf=is_box)


def partitioning_of(box: Any) -> Partitioning | None:
    """What a box says of how to split its array; None where it has too many names."""
    logical = isinstance(box, nn.LogicallyPartitioned)
    rules = box.rules if logical else None
    return Partitioning.of(box.value, box.names, box.mesh, logical, rules)


def boxed(value: Any, partitioning: Partitioning | None) -> Any:
    """``value`` in a box that says the same, or as it is."""
    if partitioning is None:
        return value
    if not partitioning.logical:
        return nn.Partitioned(value, partitioning.names, partitioning.mesh)
    return nn.LogicallyPartitioned(
        value, partitioning.names, partitioning.mesh, partitioning.rules
    )


# Fields of layers, and arguments of calls, that switch the mode; the value for training.
_MODES = {
    "use_running_average": False,
    "deterministic": False,
    "train": True,
    "training": True,
    "is_training": True,
}


def _in_mode(layer: Any, train: bool, memo: dict[int, Any]) -> Any:
    """The layers of a stack with their modes set; one used twice stays one."""
    if not isinstance(layer, nn.Module):
        return layer
    if id(layer) not in memo:
        if isinstance(layer, nn.Sequential):
            layers = tuple(_in_mode(x, train, memo) for x in layer.layers)
            changes: dict[str, Any] = {"layers": layers}
        else:
            modes = _MODES.keys() & _fields(type(layer))
            changes = {name: train is _MODES[name] for name in modes}
        memo[id(layer)] = layer.clone(**changes)
    return memo[id(layer)]


@functools.lru_cache(1024)
def _fields(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


# -- variables: what a module needs, compared with what is given before anything is read --

# The shape of each array: a number is fixed, a name is any size, the same wherever it stands.
_VARIABLES: dict[type, Any] = {
    nn.Dense: lambda m: {
        ("params", "kernel"): ("in", m.features),
        ("params", "bias"): (m.features,) if m.use_bias else None,
    },
    nn.Conv: lambda m: {
        ("params", "kernel"): (*_kernel_size(m), "in", m.features),
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
        ("params", "ih", "kernel"): (*_axes(m.kernel_size), "in", 4 * m.features),
        ("params", "hh", "kernel"): (*_axes(m.kernel_size), m.features, 4 * m.features),
        ("params", "ih", "bias"): (4 * m.features,) if m.use_bias else None,
        ("params", "hh", "bias"): (4 * m.features,) if m.use_bias else None,
    },
    nn.ConvLocal: lambda m: {
        ("params", "kernel"): (*_places(m), "rows", m.features),
        ("params", "bias"): (*_places(m), m.features) if m.use_bias else None,
    },
    nn.ConvTranspose: lambda m: {
        ("params", "kernel"): (
            *_kernel_size(m),
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
    return {key: leaf.shape for key, leaf in _flatten(parts, ())}


def _general_variables(m: nn.DenseGeneral) -> dict[Key, Any]:
    batch = tuple(f"batch axis {axis}" for axis in _axes(m.batch_dims))
    inputs, outputs = tuple(f"axis {axis}" for axis in _axes(m.axis)), _axes(m.features)
    return {
        ("params", "kernel"): (*batch, *inputs, *outputs),
        ("params", "bias"): (*batch, *outputs) if m.use_bias else None,
    }


def _einsum_bias(m: nn.Einsum) -> tuple[int, ...]:
    return formulas.einsum_bias_shape(_equation(m), tuple(m.shape))


def _equation(m: nn.Einsum) -> str:
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
    if m.decode:
        _refuse(m, "decode", "other frameworks have no place for a cache of keys")
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


def _gates(m: Any) -> tuple[Sequence[str], str]:
    return next(_GATES[cls] for cls in type(m).__mro__ if cls in _GATES)


def _cell_variables(m: Any) -> dict[Key, Any]:
    gates, biased = _gates(m)
    found: dict[Key, Any] = {}
    for gate in gates:
        found["params", f"i{gate}", "kernel"] = ("in", m.features)
        found["params", f"h{gate}", "kernel"] = (m.features, m.features)
        found["params", f"{biased}{gate}", "bias"] = (m.features,)
    return found


_SUBMODULES = {nn.RNN: ("cell",), nn.Bidirectional: ("forward_rnn", "backward_rnn")}


def _declared(module: Any, path: str, seen: set[int]) -> dict[Key, Any] | None:
    """The shapes of a module's arrays; None where its reader was registered by a user.

    A module that stands at two places has its arrays at the first.
    """
    if id(module) in seen:
        return {}
    seen.add(id(module))
    layer_type = adapter.reader(module, path).layer_type
    if layer_type in COMPOSITES:
        return _composite_variables(module)
    if layer_type not in _SUBMODULES:
        return _VARIABLES[layer_type](module) if layer_type in _VARIABLES else None
    found: dict[Key, Any] = {}
    for name in _SUBMODULES[layer_type]:
        below = _declared(getattr(module, name), f"{path}.{name}", seen) or {}
        for (collection, *rest), shape in below.items():
            own = shape and tuple(f"{n} of {name}" if isinstance(n, str) else n for n in shape)
            found[(collection, name, *rest)] = own
    return found


def _kernel_size(m: nn.Conv | nn.ConvLocal | nn.ConvTranspose) -> tuple[int, ...]:
    return _axes(m.kernel_size)


def _places(m: nn.ConvLocal) -> tuple[str, ...]:
    return tuple(f"place {i}" for i in range(len(_kernel_size(m))))


def _feature_names(m: nn.LayerNorm | nn.RMSNorm | nn.InstanceNorm) -> tuple[str, ...]:
    return tuple(f"axis {axis}" for axis in _axes(m.feature_axes))


def _axes(axes: Any) -> tuple[int, ...]:
    return (axes,) if isinstance(axes, int) else tuple(axes)


def _check_variables(model: nn.Module, variables: Mapping[str, Any]) -> None:
    """Compare keys and shapes of the whole model, and report all that is wrong together.

    Raises:
        ConversionError: keys are missing or unexpected, or shapes differ.
        UnsupportedStructureError: one module is used in two different stacks.
        UnmappedLayerError, UnsupportedLayerError: a layer does not convert anyway.
    """
    wanted: dict[Key, tuple[int | str, ...]] = {}
    parents: dict[int, Any] = {}
    given = dict(_flatten(variables, ()))
    for module, scope, parent in _leaves(model, (), None):
        places = "".join(f"[{name.removeprefix('layers_')}]" for name in scope)
        declared = _declared(module, f"model{places}", set())
        if declared is None:  # it checks them by itself
            given = {k: v for k, v in given.items() if k[1 : 1 + len(scope)] != scope}
            continue
        shapes = {key: shape for key, shape in declared.items() if shape is not None}
        if shapes and parents.setdefault(id(module), parent) is not parent:
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


def _leaves(module: Any, scope: Key, parent: Any) -> Iterator[tuple[nn.Module, Key, Any]]:
    """Every layer below ``module`` once a stack, with the scope of its variables."""
    if not isinstance(module, nn.Sequential):
        if isinstance(module, nn.Module):
            yield module, scope, parent
        return
    seen: set[int] = set()
    for i, layer in enumerate(module.layers):
        if id(layer) not in seen:
            seen.add(id(layer))
            yield from _leaves(layer, (*scope, f"layers_{i}"), module)


def _flatten(tree: Any, path: Key) -> Iterator[tuple[Key, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _flatten(value, (*path, str(key)))
    else:
        yield path, tree


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


# -- layers --


def _node(module: nn.Module, params: Mapping[str, Any], **collections: Any) -> Node:
    params = {name: array for name, array in params.items() if array is not None}
    return Node(module, ({"params": params} if params else {}) | collections)


@adapter.reads(nn.Sequential, specs.Sequential)
def read_sequential(node, ctx):
    first = {id(layer): i for i, layer in reversed(list(enumerate(node.module.layers)))}
    return specs.Sequential(
        layers=ctx.read_all(
            Node(
                layer,
                {
                    collection: tree[f"layers_{first[id(layer)]}"]
                    for collection, tree in node.variables.items()
                    if f"layers_{first[id(layer)]}" in tree
                },
            )
            for layer in node.module.layers
        )
    )


def _place(node: Node, ctx) -> None:
    """Take it that a module's variables have a name now."""
    if node.placed:
        raise UnsupportedStructureError(
            "a layer is used in two different modules, which Linen names apart",
            path=ctx.path,
            remedy="Use it twice in one stack, or wrap the model live with shims.wrap",
        )
    node.placed = True


@adapter.builds(specs.Sequential)
def build_sequential(spec, ctx):
    built = [ctx.build(layer) for layer in spec.layers]
    variables: dict[str, dict[str, Any]] = {}
    placed: set[int] = set()
    for i, (layer, node) in enumerate(zip(spec.layers, built, strict=True)):
        if not isinstance(node, Node) or id(node) in placed:
            continue
        if layer.holds_state:
            _place(node, ctx)
        placed.add(id(node))
        for collection, tree in node.variables.items():
            variables.setdefault(collection, {})[f"layers_{i}"] = tree
    modules = tuple(node.module if isinstance(node, Node) else node for node in built)
    return Node(nn.Sequential(modules), variables)


@adapter.reads(
    nn.Dense,
    specs.Linear,
    fixed={
        "dot_general": None,
        "dot_general_cls": None,
    },
)
def read_dense(node, ctx):
    return specs.Linear(
        weight=node.array("kernel"),
        bias=node.array("bias"),
        dtype=specs.dtype(node.module.dtype),
        precision=node.module.precision,
    )


@adapter.builds(specs.Linear, carries=("leading_shape", "dtype", "precision"))
def build_dense(spec, ctx):
    module = nn.Dense(
        spec.weight.shape[1],
        use_bias=spec.bias is not None,
        dtype=spec.dtype,
        param_dtype=spec.weight.dtype,
        precision=spec.precision,
    )
    return _node(module, {"kernel": spec.weight, "bias": spec.bias})


@adapter.reads(
    nn.DenseGeneral,
    specs.LinearGeneral,
    fixed={
        "dot_general": None,
        "dot_general_cls": None,
    },
)
def read_dense_general(node, ctx):
    m = node.module
    return specs.LinearGeneral(
        weight=node.array("kernel"),
        bias=node.array("bias"),
        axes=_axes(m.axis),
        batch_axes=len(_axes(m.batch_dims)),
        dtype=specs.dtype(m.dtype),
        precision=m.precision,
    )


@adapter.builds(specs.LinearGeneral, carries=("axes", "batch_axes", "dtype", "precision"))
def build_dense_general(spec, ctx):
    module = nn.DenseGeneral(
        _unpack(spec.out_shape),
        axis=_unpack(spec.axes),
        batch_dims=tuple(range(spec.batch_axes)),
        use_bias=spec.bias is not None,
        dtype=spec.dtype,
        param_dtype=spec.weight.dtype,
        precision=spec.precision,
    )
    return _node(module, {"kernel": spec.weight, "bias": spec.bias})


@adapter.reads(nn.Einsum, specs.Einsum)
def read_einsum(node, ctx):
    m = node.module
    return specs.Einsum(
        equation=_equation(m),
        weight=node.array("kernel"),
        bias=node.array("bias"),
        dtype=specs.dtype(m.dtype),
        precision=m.precision,
        preferred_element_type=specs.dtype(m.preferred_element_type),
    )


@adapter.builds(specs.Einsum, carries=("dtype", "precision", "preferred_element_type"))
def build_einsum(spec, ctx):
    module = nn.Einsum(
        spec.weight.shape,
        spec.equation,
        use_bias=spec.bias is not None,
        dtype=spec.dtype,
        param_dtype=spec.weight.dtype,
        precision=spec.precision,
        preferred_element_type=spec.preferred_element_type,
    )
    return _node(module, {"kernel": spec.weight, "bias": spec.bias})


_ATTENTION_FIXED = {
    "attention_fn": nn.dot_product_attention,
    "qkv_dot_general": None,
    "out_dot_general": None,
    "qkv_dot_general_cls": None,
    "out_dot_general_cls": None,
    "qk_attn_weights_einsum_cls": None,
    "attn_weights_value_einsum_cls": None,
}


@adapter.reads(
    nn.MultiHeadDotProductAttention, specs.MultiHeadAttention, fixed=_ATTENTION_FIXED
)
@adapter.reads(nn.MultiHeadAttention, specs.MultiHeadAttention, fixed=_ATTENTION_FIXED)
@adapter.reads(nn.SelfAttention, specs.MultiHeadAttention, fixed=_ATTENTION_FIXED)
def read_attention(node, ctx):
    m = node.module
    shared = {"dtype": specs.dtype(m.dtype), "precision": m.precision}
    parts = {
        name: specs.LinearGeneral(
            weight=node.array(name)["kernel"],
            bias=node.array(name).get("bias"),
            axes=(-2, -1) if name == "out" else (-1,),
            **shared,
        )
        for name in ("query", "key", "value", "out")
    }
    scales = {
        f"{name}_scale": node.array(f"{name}_ln")["scale"] if m.normalize_qk else None
        for name in ("query", "key")
    }
    return specs.MultiHeadAttention(
        **parts,
        **scales,
        **shared,
        rate=m.dropout_rate,
        broadcast_dropout=m.broadcast_dropout,
        core="widened" if m.force_fp32_for_softmax else "plain",
    )


@adapter.builds(specs.MultiHeadAttention, carries=ATTENTION)
def build_attention(spec, ctx):
    core = "widened" if spec.core == "widened" else "plain"
    check_attention(spec, ctx, core)
    if spec.key.weight.shape[1] != spec.heads:
        ctx.refuse("num_kv_heads", spec.key.weight.shape[1], "Linen has as many as of queries")
    module = nn.MultiHeadDotProductAttention(
        spec.heads,
        qkv_features=spec.heads * spec.depth,
        out_features=spec.out.weight.shape[-1],
        deterministic=not ctx.options.get("train", False),
        force_fp32_for_softmax=core == "widened",
        **attention_options(spec),
    )
    params: dict[str, Any] = {
        name: _node(module, {"kernel": part.weight, "bias": part.bias}).variables["params"]
        for name, part in zip(("query", "key", "value", "out"), spec.parts, strict=True)
    }
    if spec.query_scale is not None:
        params["query_ln"] = {"scale": spec.query_scale}
        params["key_ln"] = {"scale": spec.key_scale}
    return _node(module, params)


@adapter.reads(
    nn.Conv,
    specs.Conv,
    fixed={
        "conv_general_dilated": None,
        "conv_general_dilated_cls": None,
    },
)
def read_conv(node, ctx):
    m = node.module
    return specs.Conv(
        weight=node.array("kernel"),
        bias=node.array("bias"),
        **conv_fields(m, ctx),
    )


_CONV = ("input_dilation", "mask", "dtype", "precision", "padding_mode")


@adapter.builds(specs.Conv, carries=_CONV)
def build_conv(spec, ctx):
    module = nn.Conv(spec.weight.shape[-1], **conv_options(spec, ctx))
    return _node(module, {"kernel": spec.weight, "bias": spec.bias})


@adapter.reads(
    nn.ConvLocal,
    specs.ConvLocal,
    fixed={
        "conv_general_dilated": None,
        "conv_general_dilated_cls": None,
        "feature_group_count": 1,
    },
)
def read_conv_local(node, ctx):
    return specs.ConvLocal(
        weight=node.array("kernel"),
        bias=node.array("bias"),
        kernel_size=_kernel_size(node.module),
        **conv_fields(node.module, ctx),
    )


@adapter.builds(specs.ConvLocal, carries=_CONV)
def build_conv_local(spec, ctx):
    module = nn.ConvLocal(spec.weight.shape[-1], **conv_options(spec, ctx))
    return _node(module, {"kernel": spec.weight, "bias": spec.bias})


@adapter.reads(nn.ConvTranspose, specs.ConvTranspose)
def read_conv_transpose(node, ctx):
    arrays = node.array("kernel"), node.array("bias")
    return specs.ConvTranspose(**conv_transpose_fields(node.module, *arrays, ctx))


@adapter.builds(specs.ConvTranspose, carries=(*_CONV[1:], "preferred_element_type"))
def build_conv_transpose(spec, ctx):
    options = conv_transpose_options(spec, ctx)
    kernel = options.pop("kernel_init")()
    del options["bias_init"]
    module = nn.ConvTranspose(spec.weight.shape[-1], **options)
    return _node(module, {"kernel": kernel, "bias": spec.bias})


@adapter.reads(nn.Embed, specs.Embedding, fixed={"promote_dtype": nn.Embed.promote_dtype})
def read_embed(node, ctx):
    weight, dtype = node.array("embedding"), specs.dtype(node.module.dtype)
    return specs.Embedding(weight=weight, dtype=None if dtype == weight.dtype else dtype)


@adapter.builds(specs.Embedding, carries=("dtype",))
def build_embed(spec, ctx):
    module = nn.Embed(*spec.weight.shape, dtype=spec.dtype, param_dtype=spec.weight.dtype)
    return _node(module, {"embedding": spec.weight})


def _norm_fields(node) -> dict[str, Any]:
    """What every normalisation layer holds."""
    m = node.module
    return {
        "scale": node.array("scale"),
        "bias": node.array("bias"),
        "epsilon": m.epsilon,
        "use_fast_variance": m.use_fast_variance,
        "axis_name": m.axis_name,
        "axis_index_groups": m.axis_index_groups,
        "output_dtype": specs.dtype(m.dtype),
        "force_float32": m.force_float32_reductions,
    }


def _norm_options(spec) -> dict[str, Any]:
    options = {
        "epsilon": spec.epsilon,
        "dtype": spec.output_dtype,
        "param_dtype": specs.common_dtype(spec.scale, spec.bias),
        "use_scale": spec.scale is not None,
        "axis_name": spec.axis_name,
        "axis_index_groups": spec.axis_index_groups,
        "use_fast_variance": spec.use_fast_variance,
        "force_float32_reductions": spec.force_float32,
    }
    has_bias = {} if isinstance(spec, specs.RMSNorm) else {"use_bias": spec.bias is not None}
    return options | has_bias


def _from_the_end(axes: Any, option: str, ctx) -> tuple[int, ...]:
    if any(axis >= 0 for axis in _axes(axes)):
        ctx.refuse(
            option,
            axes,
            "non-negative axes count batch axes, which are not known here",
            "Count the axes from the end",
        )
    return _axes(axes)


@adapter.reads(nn.LayerNorm, specs.LayerNorm)
@adapter.reads(nn.RMSNorm, specs.RMSNorm)
def read_layer_norm(node, ctx):
    m = node.module
    return (specs.RMSNorm if isinstance(m, nn.RMSNorm) else specs.LayerNorm)(
        **_norm_fields(node),
        feature_shape=_shape(node),
        reduction_axes=tuple(sorted(_from_the_end(m.reduction_axes, "reduction_axes", ctx))),
        feature_axes=tuple(sorted(_from_the_end(m.feature_axes, "feature_axes", ctx))),
    )


def _shape(node) -> tuple[int, ...] | None:
    """The shape of scale and bias, or None where there is neither."""
    arrays = (node.array("scale"), node.array("bias"))
    return next((array.shape for array in arrays if array is not None), None)


def _unpack(axes: tuple[int, ...]) -> int | tuple[int, ...]:
    """A single axis as users write it: Linen modules compare by their options."""
    return axes[0] if len(axes) == 1 else axes


_AXES = ("leading_shape", "reduction_axes", "feature_axes")
_NORM = ("axis_name", "axis_index_groups", "output_dtype", "force_float32")


@adapter.builds(specs.LayerNorm, carries=(*_AXES, *_NORM))
@adapter.builds(specs.RMSNorm, carries=(*_AXES, *_NORM))
def build_layer_norm(spec, ctx):
    if spec.feature_shape is None and len(spec.feature_axes) > 1 and spec.holds_state:
        spec = spec.sized(ctx.require_shape(-spec.feature_axes[0]))
    module = (nn.RMSNorm if isinstance(spec, specs.RMSNorm) else nn.LayerNorm)(
        reduction_axes=_unpack(spec.reduction_axes),
        feature_axes=_unpack(spec.feature_axes),
        **_norm_options(spec),
    )
    return _node(module, {"scale": spec.scale, "bias": spec.bias})


@adapter.reads(nn.GroupNorm, specs.GroupNorm)
def read_group_norm(node, ctx):
    m, (features,) = node.module, _shape(node) or (None,)
    num_groups = m.num_groups
    if num_groups is None:
        if features is None:
            ctx.refuse(
                "group_size",
                m.group_size,
                "without arrays the number of features is not known",
                "Give num_groups instead",
            )
        num_groups = features // m.group_size
    axes = group_axes(m.reduction_axes, ctx)
    fields = _norm_fields(node)
    return specs.GroupNorm(
        **fields, num_groups=num_groups, features=features, reduction_axes=axes
    )


@adapter.reads(nn.InstanceNorm, specs.GroupNorm, fixed={"feature_axes": -1})
def read_instance_norm(node, ctx):
    (features,) = _shape(node) or (0,)
    if not features:
        ctx.refuse("use_scale, use_bias", False, "without them the features are not known")
    return specs.GroupNorm(**_norm_fields(node), num_groups=features, features=features)


@adapter.builds(specs.GroupNorm, carries=(*_NORM, "reduction_axes", "repeat_axis"))
def build_group_norm(spec, ctx):
    axes = spec.reduction_axes
    if spec.repeat_axis != -1:
        ctx.refuse("reduction_axes", axes, "linen repeats the statistics along the groups")
    axes = None if axes is None else (*axes, -1)
    module = nn.GroupNorm(spec.num_groups, reduction_axes=axes, **_norm_options(spec))
    return _node(module, {"scale": spec.scale, "bias": spec.bias})


@adapter.reads(nn.BatchNorm, specs.BatchNorm)
def read_batch_norm(node, ctx):
    m = node.module
    (axis,) = _from_the_end(m.axis, "axis", ctx)
    return specs.BatchNorm(
        **_norm_fields(node),
        mean=node.array("mean", "batch_stats"),
        var=node.array("var", "batch_stats"),
        momentum=m.momentum,
        spatial_dims=None,
        axis=axis,
    )


@adapter.builds(specs.BatchNorm, carries=("axis", *_NORM))
def build_batch_norm(spec, ctx):
    module = nn.BatchNorm(
        use_running_average=not ctx.options.get("train", False),
        axis=spec.axis,
        momentum=spec.momentum,
        **_norm_options(spec),
    )
    return _node(
        module,
        {"scale": spec.scale, "bias": spec.bias},
        batch_stats={"mean": spec.mean, "var": spec.var},
    )


@adapter.reads(nn.Dropout, specs.Dropout)
def read_dropout(node, ctx):
    m = node.module
    return specs.Dropout(
        rate=m.rate, broadcast_dims=tuple(m.broadcast_dims), rng_collection=m.rng_collection
    )


@adapter.builds(specs.Dropout, carries=("broadcast_dims",))
def build_dropout(spec, ctx):
    return Node(
        nn.Dropout(
            spec.rate,
            broadcast_dims=spec.broadcast_dims,
            deterministic=not ctx.options.get("train", False),
            rng_collection=spec.rng_collection,
        ),
        {},
    )


def _gate_arrays(node, ctx) -> dict[str, Any]:
    gates, biased = _gates(node.module)

    def side_by_side(part: str, name: str) -> Any:
        return joined([node.array(f"{part}{gate}")[name] for gate in gates], ctx)

    kernels = {"weight_x": side_by_side("i", "kernel"), "weight_h": side_by_side("h", "kernel")}
    return kernels | {"bias": side_by_side(biased, "bias")}


def _gate_params(module, spec) -> dict[str, Any]:
    names, biased = _gates(module)
    arrays = gates(spec.weight_x, spec.weight_h, spec.bias, number=len(names))
    params: dict[str, Any] = {}
    for gate, (x, h, bias) in zip(names, arrays, strict=True):
        params[f"i{gate}"], params[f"h{gate}"] = {"kernel": x}, {"kernel": h}
        params[f"{biased}{gate}"]["bias"] = bias
    return params


def _cell_options(spec) -> dict[str, Any]:
    options = cell_options(spec)
    if spec.carry_init is not None:
        options["carry_init"] = spec.carry_init
    if not specs.is_wide(spec.weight_h.dtype):
        # Linen traces the initialiser at each call, and the usual one takes no such dtype
        options["recurrent_kernel_init"] = nn.linear.default_kernel_init
    return options


_CARRIED = ("activation", "dtype", "carry_init")


@adapter.reads(nn.SimpleCell, specs.SimpleCell)
def read_simple_cell(node, ctx):
    arrays = _gate_arrays(node, ctx)
    fields = cell_fields(node.module, *arrays.values())
    return specs.SimpleCell(**arrays, **fields, residual=node.module.residual)


@adapter.builds(specs.SimpleCell, carries=(*_CARRIED, "residual"))
def build_simple_cell(spec, ctx):
    check_bias(spec.bias, ctx)
    module = nn.SimpleCell(spec.hidden, **_cell_options(spec), residual=spec.residual)
    return _node(module, _gate_params(module, spec))


@adapter.reads(nn.LSTMCell, specs.LSTMCell)
@adapter.reads(nn.OptimizedLSTMCell, specs.LSTMCell)
def read_lstm_cell(node, ctx):
    arrays = _gate_arrays(node, ctx)
    return specs.LSTMCell(**arrays, **cell_fields(node.module, *arrays.values()))


@adapter.builds(specs.LSTMCell, carries=(*_CARRIED, "gate"))
def build_lstm_cell(spec, ctx):
    check_bias(spec.bias, ctx)
    module = nn.LSTMCell(spec.hidden, **_cell_options(spec))
    return _node(module, _gate_params(module, spec))


@adapter.reads(nn.GRUCell, specs.GRUCell)
@adapter.reads(nn.MGUCell, specs.MGUCell)
def read_gru_cell(node, ctx):
    arrays = _gate_arrays(node, ctx) | {"bias_n": node.array("hn").get("bias")}
    fields = cell_fields(node.module, *arrays.values())
    if isinstance(node.module, nn.GRUCell):
        return specs.GRUCell(**arrays, **fields)
    return specs.MGUCell(**arrays, **fields, reset_gate=node.module.reset_gate)


@adapter.builds(specs.GRUCell, carries=(*_CARRIED, "gate"))
@adapter.builds(specs.MGUCell, carries=(*_CARRIED, "gate", "reset_gate"))
def build_gru_cell(spec, ctx):
    check_bias(spec.bias, ctx)
    is_gru, wants = isinstance(spec, specs.GRUCell), getattr(spec, "reset_gate", True)
    if (spec.bias_n is not None) != wants:
        has = "has" if wants else "has no"
        ctx.refuse("bias_n", spec.bias_n, f"this cell {has} such a bias in Linen")
    options = {} if is_gru else {"reset_gate": spec.reset_gate}
    module = (nn.GRUCell if is_gru else nn.MGUCell)(
        spec.hidden, **_cell_options(spec), **options
    )
    params = _gate_params(module, spec)
    if spec.bias_n is not None:
        params["hn"]["bias"] = spec.bias_n
    return _node(module, params)


@adapter.reads(nn.ConvLSTMCell, specs.ConvLSTMCell)
def read_conv_lstm_cell(node, ctx):
    m, parts = node.module, (node.array("ih"), node.array("hh"))
    arrays = {
        "weight_x": parts[0]["kernel"],
        "weight_h": parts[1]["kernel"],
        "bias_x": parts[0].get("bias"),
        "bias_h": parts[1].get("bias"),
    }
    usual = specs.common_dtype(*arrays.values())
    return specs.ConvLSTMCell(
        **arrays,
        strides=tuple(m.strides or (1,) * len(m.kernel_size)),
        padding=_cell_padding(m.padding, ctx),
        dtype=specs.plain_dtype(m.dtype, *arrays.values()),
        carry_init=formulas.carry_init(m.carry_init, m.param_dtype, usual),
    )


def _cell_padding(padding: Any, ctx) -> Any:
    if not isinstance(padding, str):
        return tuple(map(tuple, padding))
    if padding.upper() not in ("SAME", "VALID"):
        ctx.refuse("padding", padding, "a recurrent cell converts with zeros around its input")
    return padding.upper()


@adapter.builds(specs.ConvLSTMCell, carries=("dtype", "carry_init"))
def build_conv_lstm_cell(spec, ctx):
    if (spec.bias_x is None) != (spec.bias_h is None):
        ctx.refuse("bias_x, bias_h", "one of two", "Linen has both or neither")
    carry_init = {} if spec.carry_init is None else {"carry_init": spec.carry_init}
    module = nn.ConvLSTMCell(
        spec.hidden,
        tuple(spec.weight_x.shape[: spec.space]),
        strides=spec.strides,
        padding=spec.padding,
        use_bias=spec.bias_x is not None,
        dtype=spec.dtype,
        param_dtype=spec.weight_x.dtype,
        **carry_init,
    )
    arrays = {"ih": (spec.weight_x, spec.bias_x), "hh": (spec.weight_h, spec.bias_h)}
    return _node(module, {k: _part(kernel=w, bias=b) for k, (w, b) in arrays.items()})


def _part(**arrays: Any) -> dict[str, Any]:
    return {name: array for name, array in arrays.items() if array is not None}


_RNN = ("time_major", "return_carry", "reverse", "keep_order", "unroll")


def _below(node, name: str) -> Node:
    """The submodule of that name, and its variables."""
    variables = {k: tree[name] for k, tree in node.variables.items() if name in tree}
    return Node(getattr(node.module, name), variables)


def _above(module: Any, parts: dict[str, Any], ctx) -> Node:
    """A module with submodules by their names; one that has two names is under the first."""
    variables: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for name, node in parts.items():
        if id(node) in seen:
            continue
        seen.add(id(node))
        _place(node, ctx)
        for collection, tree in node.variables.items():
            variables.setdefault(collection, {})[name] = tree
    return Node(module, variables)


@adapter.reads(
    nn.RNN,
    specs.RNN,
    fixed={
        name: nn.RNN.__dataclass_fields__[name].default
        for name in ("variable_axes", "variable_broadcast", "variable_carry", "split_rngs")
    },
)
def read_rnn(node, ctx):
    cell = read_cell(_below(node, "cell"), node.module.cell, ctx)
    return specs.RNN(cell=cell, **{name: getattr(node.module, name) for name in _RNN})


@adapter.builds(specs.RNN, carries=_RNN)
def build_rnn(spec, ctx):
    cell = ctx.build(spec.cell)
    module = nn.RNN(cell.module, **{name: getattr(spec, name) for name in _RNN})
    return _above(module, {"cell": cell}, ctx)


@adapter.reads(nn.Bidirectional, specs.Bidirectional)
def read_bidirectional(node, ctx):
    parts = {name: (_below(node, name), getattr(node.module, name)) for name in RNNS}
    return specs.Bidirectional(**read_rnns(parts, ctx), **bidirectional_fields(node.module))


@adapter.builds(specs.Bidirectional, carries=("merge", "time_major", "return_carry"))
def build_bidirectional(spec, ctx):
    parts = {name: ctx.build(getattr(spec, name)) for name in RNNS}
    modules = {name: node.module for name, node in parts.items()}
    return _above(nn.Bidirectional(**modules, **bidirectional_options(spec)), parts, ctx)


adapter.builds(specs.Pool, carries=("counts_padding",))(build_pool)  # the same functions


@adapter.builds(specs.Activation)
def build_activation(spec, ctx):
    fn = formulas.ACTIVATIONS[spec.name]
    return functools.partial(fn, **spec.options) if spec.options else fn


@adapter.builds(specs.Flatten)
def build_flatten(spec, ctx):
    return functools.partial(
        formulas.flatten,
        start_axis=spec.start_axis,
        end_axis=spec.end_axis,
        in_size=spec.in_size,
    )


@adapter.builds(specs.Function)
def build_function(spec, ctx):
    return formulas.Batched(spec.fn) if spec.per_example else spec.fn
