"""Models of a host whose modules hold one another in attributes and plain containers."""

# Modules of any host have attributes of any type.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from .core import Path, Structure, at, attribute_path, path_text

__all__ = ["Graph"]

Held = tuple[Structure, Mapping[Path, Any]]
"""A shim's guest, and the host's containers of its arrays."""


class Graph:
    """The modules under a root, each once, a shim as one of them.

    Args:
        root: the model.
        is_module, is_shim, is_container, is_plain: tell what the host's modules hold:
            modules, shims among them, containers of arrays, those that are no views.
    """

    def __init__(
        self,
        root: Any,
        *,
        is_module: Callable[[Any], bool],
        is_shim: Callable[[Any], bool],
        is_container: Callable[[Any], bool],
        is_plain: Callable[[Any], bool],
    ):
        self._is_module, self._is_shim, self._is_container = is_module, is_shim, is_container
        self._is_plain = is_plain
        self.root = root
        self.shims: list[tuple[Path, Any]] = []
        self._modules: dict[int, Any] = {}
        self._owned: dict[int, Any] = {}
        self._visit(root, ())

    def _visit(self, part: Any, path: Path) -> None:
        if self._is_container(part):
            self._owned[id(part)] = part
        elif self._is_module(part):
            if id(part) in self._modules:
                return
            self._modules[id(part)] = part
            if self._is_shim(part):
                self.shims.append((path, part))
                return
            for name, value in list(vars(part).items()):
                self._visit(value, (*path, int(name) if name.isdecimal() else name))
        else:
            for key, value in _items(part):
                self._visit(value, (*path, key))

    def _twin(self, held: Mapping[int, Held], shim: Any) -> Any:
        """The first shim of the same guest, over the very same containers."""

        def same(one: Held, other: Held) -> bool:
            return (
                one[0] == other[0]
                and one[1].keys() == other[1].keys()
                and all(one[1][path] is other[1][path] for path in one[1])
            )

        mine = held[id(shim)]
        found = (s for _, s in self.shims if mine[1] and same(held[id(s)], mine))
        return next(found, shim)

    def _ties(self, held: Mapping[int, Held], shim: Any) -> str | None:
        """What a shim holds that other parts hold too, except its twins; None if nothing."""
        others = Counter[int](self._owned.keys())
        for _, other in self.shims:
            if self._twin(held, other) is other and self._twin(held, shim) is not other:
                others.update({id(c) for c in held[id(other)][1].values()})
        found = [path_text(p) for p, c in held[id(shim)][1].items() if others[id(c)]]
        return ", ".join(found) or None

    def remade(self, remake: Callable[..., Any], share: Callable[[Any], Any]) -> Any:
        """The root with another module in the place of each shim.

        Args:
            remake: ``remake(shim, path=..., ties=...)`` makes it; see :meth:`ties`. It is not
                asked for the twins of a shim.
            share: a made module's own containers in nested dicts, if it may hold those of
                others; else None. A container outside of shims is taken over as it is, and a
                view there becomes what is made of it.
        """
        held: dict[int, Held] = {id(shim): shim._shim_held() for _, shim in self.shims}
        made: dict[int, Any] = {}
        for path, shim in self.shims:
            twin = self._twin(held, shim)
            made[id(shim)] = (
                remake(shim, path=path, ties=self._ties(held, shim))
                if twin is shim
                else made[id(twin)]
            )
        known = {i: c for i, c in self._owned.items() if self._is_plain(c)}
        for _, shim in self.shims:
            tree = share(made[id(shim)])
            for path, container in held[id(shim)][1].items() if tree is not None else ():
                *above, last = attribute_path(path)
                branch = at(tree, tuple(above))
                branch[last] = known.setdefault(id(container), branch[last])
        # A view that another part holds as well becomes the traced module's own container.
        return self._replaced(made | {i: c for i, c in known.items() if i in self._owned})

    def _replaced(self, made: Mapping[int, Any]) -> Any:
        """The root with others in the place of shims and containers; by their ``id``."""
        if id(self.root) in made:
            return made[id(self.root)]
        for module in self._modules.values():
            if not self._is_shim(module):
                for name, value in list(vars(module).items()):
                    new = self._swapped(value, made)
                    if new is not value:
                        vars(module)[name] = new
        return self.root

    def _swapped(self, value: Any, made: Mapping[int, Any]) -> Any:
        if id(value) in made:
            return made[id(value)]
        parts = list(_items(value))
        new = [self._swapped(part, made) for _, part in parts]
        if all(a is b for a, (_, b) in zip(new, parts, strict=True)):
            return value
        if isinstance(value, dict):
            old = cast("dict[Any, Any]", value)
            return type(old)(zip(old, new, strict=True))
        return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)


def _items(part: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(part, dict):
        yield from cast("dict[Any, Any]", part).items()
    elif isinstance(part, list | tuple):
        yield from enumerate(cast("list[Any]", part))
