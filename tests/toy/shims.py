"""Toy as a guest and as a host. A toy module's attributes are its arrays, in place."""

import toy

from ..core import Call, Cell, Kind, LiveGuest, Structure, guest_of, materialize_structure


def _modules(module, path=()):
    yield path, module
    for i, layer in enumerate(getattr(module, "layers", ())):
        if isinstance(layer, toy.Module):
            yield from _modules(layer, (*path, "layers", i))


class _Attribute(Cell):
    def __init__(self, path, module, name):
        super().__init__(path, Kind.PARAMETER)
        object.__setattr__(self, "identity", (module, name))

    identity = None

    def get(self):
        module, name = self.identity
        return getattr(module, name)

    def _put(self, value):
        setattr(*self.identity, value)


class ToyGuest(LiveGuest):
    def __init__(self, module):
        self.native = module

    def cells(self):
        return [
            _Attribute((*path, name), module, name)
            for path, module in _modules(self.native)
            for name in ("weight", "bias")
            if getattr(module, name, None) is not None
        ]

    def structure(self):
        return ToyStructure(self.native, [cell.path for cell in self.cells()])

    def call(self, call):
        return getattr(self.native, call.method)(*call.args, **call.kwargs)


class ToyStructure(Structure):
    def __init__(self, module, paths):
        self._module, self.guest_type, self.forward = (
            module,
            type(module),
            type(module).__call__,
        )
        self.base_type = toy.Module
        self.kinds = dict.fromkeys(paths, Kind.PARAMETER)

    def build(self, values):
        def copy(module, path):
            new = object.__new__(type(module))
            vars(new).update(vars(module))
            for name in vars(module):
                if (*path, name) in values:
                    setattr(new, name, values[*path, name])
            if hasattr(module, "layers"):
                new.layers = [
                    copy(layer, (*path, "layers", i))
                    if isinstance(layer, toy.Module)
                    else layer
                    for i, layer in enumerate(module.layers)
                ]
            return new

        return copy(self._module, ())

    def run(self, values, call):
        module = self.build(values)
        out = getattr(module, call.method)(*call.args, **call.kwargs)
        return out, dict(values), self


class ToToy(toy.Module):
    """A module of another framework as a toy module, in evaluation mode."""

    def __init__(self, module, **options):
        self.guest = guest_of(module, **options)
        self.values = self.guest.values()

    def __call__(self, *args, **kwargs):
        call = Call("__call__", args, kwargs, training=False, key=lambda: None)
        return self.guest.structure().run(self.values, call)[0]

    def materialize(self):
        return materialize_structure(self.guest.structure(), self.values, "toy", {})


guest = ToyGuest
host = ToToy
