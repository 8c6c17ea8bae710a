"""Stacks."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from ... import specs
from ...errors import (
    UnsupportedStructureError,
)
from ...walk import Building, Reading
from .adapter import Node, adapter


@adapter.reads(nn.Sequential, specs.Sequential)
def read_sequential(node: Node, ctx: Reading) -> specs.Sequential:
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


def place(node: Node, ctx: Building) -> None:
    """Take it that a module's variables have a name now."""
    if node.placed:
        raise UnsupportedStructureError(
            "a layer is used in two different modules, which Linen names apart",
            path=ctx.path,
            remedy="Use it twice in one stack, or wrap the model live with shims.wrap",
        )
    node.placed = True


@adapter.builds(specs.Sequential)
def build_sequential(spec: specs.Sequential, ctx: Building) -> Node:
    built = [ctx.build(layer) for layer in spec.layers]
    variables: dict[str, dict[str, Any]] = {}
    placed: set[int] = set()
    for i, (layer, node) in enumerate(zip(spec.layers, built, strict=True)):
        if not isinstance(node, Node) or id(node) in placed:
            continue
        if layer.holds_state:
            place(node, ctx)
        placed.add(id(node))
        for collection, tree in node.variables.items():
            variables.setdefault(collection, {})[f"layers_{i}"] = tree
    modules = tuple(node.module if isinstance(node, Node) else node for node in built)
    return Node(nn.Sequential(modules), variables)
