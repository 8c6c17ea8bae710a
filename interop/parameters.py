"""Containers of parameters: their leaves, by paths that read as people write them."""

# jax.tree_util declares some of its types only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from typing import Any

import jax

__all__ = [
    "Path",
    "arrays",
    "is_empty",
    "is_leaf",
    "is_quantity",
    "leaves",
    "leaves_by_name",
    "magnitude",
    "name",
    "path_of",
]

Path = tuple[str | int, ...]


def is_leaf(x: Any) -> bool:
    """Whether ``x`` stands in the place of an array, or of nothing.

    So do None, optax's ``MaskedNode``, a ``PartitionSpec``, which is a tuple, and an array with
    a unit, which is a pytree.
    """
    return isinstance(x, jax.sharding.PartitionSpec) or is_quantity(x) or is_empty(x)


def is_quantity(x: Any) -> bool:
    """Whether ``x`` is an array with a physical unit."""
    cls = type(x)  # some containers have any attribute, or an error that is no AttributeError
    return hasattr(cls, "mantissa") and hasattr(cls, "unit")


def magnitude(x: Any) -> Any:
    """An array without its unit."""
    return x.mantissa if is_quantity(x) else x


def leaves(container: Any) -> dict[Path, Any]:
    """Every leaf of a container of parameters by its path, in the order of the pytree.

    A box that holds one value, such as an NNX ``Variable``, is its value.
    """
    found: dict[Path, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(container, is_leaf=is_leaf):
        boxed = len(keys) > 1 and getattr(keys[-1], "name", None) == "value"
        found[path_of(keys[:-1] if boxed else keys)] = leaf
    return found


def path_of(keys: Any) -> Path:
    """A path of JAX's tree functions as one of ours."""
    return tuple(step for key in keys for step in _step(key))


def arrays(container: Any) -> dict[Path, Any]:
    """The leaves that are there, in the order of ``jax.tree.leaves``."""
    return {path: leaf for path, leaf in leaves(container).items() if not is_empty(leaf)}


def is_empty(leaf: Any) -> bool:
    """Whether ``leaf`` stands for nothing: None, or a container without leaves."""
    is_spec = isinstance(leaf, jax.sharding.PartitionSpec)
    return not is_spec and jax.tree.structure(leaf).num_leaves == 0


def _step(key: Any) -> Path:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            step = getattr(key, attribute)
            return tuple(step) if isinstance(step, tuple) else (step,)
    return (str(key),)


def name(path: Path) -> str:
    """``layers[0].weight`` for ``("layers", 0, "weight")``."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


def leaves_by_name(container: Any) -> dict[str, Any]:
    """:func:`arrays` by their names."""
    return {name(path): leaf for path, leaf in arrays(container).items()}
