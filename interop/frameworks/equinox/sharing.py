"""Layers that stand at several places of a stack, which ``eqx.nn.Shared`` ties."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax

from ... import specs
from ...composites.equinox import Tied
from ...errors import UnsupportedStructureError
from ...walk import Reading
from .adapter import Node, Place, adapter, layers_of


@adapter.reads(eqx.nn.Shared, specs.Sequential)
def read_shared(node: Node, ctx: Reading) -> specs.Spec:
    stack = node.module()
    if not isinstance(stack, eqx.nn.Sequential):
        ctx.refuse(
            "pytree",
            type(stack).__qualname__,
            "only a Sequential of layers has a forward of its own",
        )
    layers, ties = layers_of(stack), _ties(node.module, ctx)
    layers = {place: layers[ties.get(place, place)] for place in layers}
    stack = _stack(stack, layers, ())  # with one object at all places of a layer
    ctx.shared |= {id(layers[place]) for place in ties}
    ctx.alive.append(stack)
    return ctx.read(dataclasses.replace(node, module=stack), ctx.path)


@adapter.reads(Tied, specs.Sequential)
def read_tied(node: Node, ctx: Reading) -> specs.Spec:
    return read_shared(Node(node.module.shared, node.state), ctx)


def _stack(stack: eqx.nn.Sequential, layers: dict[Place, Any], place: Place) -> Any:
    here = [(*place, i) for i in range(len(stack.layers))]
    return eqx.nn.Sequential(
        [
            layers[at] if at in layers else _stack(part, layers, at)  # pyright: ignore
            for at, part in zip(here, stack.layers, strict=True)
        ]
    )


def _ties(shared: eqx.nn.Shared, ctx: Reading) -> dict[Place, Place]:
    """The first place of each layer that stands at several, by all its places.

    ``where`` and ``get`` are called with a mark in the place of each leaf, which tells the same
    leaf from an equal one.
    """
    marks = jax.tree.map(lambda _: _Mark(), shared.pytree)
    try:
        stack = eqx.tree_at(shared.where, marks, shared.get(marks))
        layers = {place: jax.tree.flatten(part) for place, part in layers_of(stack).items()}
    except Exception:
        ctx.refuse("get", shared.get, "only whole layers of the stack convert as they are")
    owners: dict[int, Place] = {}
    found: dict[Place, Place] = {}
    for place, (leaves, structure) in layers.items():
        ids = [id(leaf) for leaf in leaves]
        first = next((owners[key] for key in ids if key in owners), place)
        others, same = layers[first]
        if first != place and (structure != same or ids != [id(leaf) for leaf in others]):
            raise _part_shared(ctx.path, first, place)
        if len({*ids}) < len(ids):
            raise _part_shared(ctx.path, place, place)
        owners |= dict.fromkeys(ids, first)
        if first != place:
            found |= {first: first, place: first}
    return found


class _Mark:
    """Stands for one leaf."""


def _part_shared(path: str, *at: Place) -> UnsupportedStructureError:
    first, second = (path + "".join(f"[{i}]" for i in place) for place in at)
    return UnsupportedStructureError(
        f"an array is shared by {first} and {second}, which are not one layer; the tie would "
        f"be lost",
        path=path,
        remedy="Wrap the model live with shims.wrap, which keeps it",
    )
