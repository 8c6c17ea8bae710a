"""Native models, built by each framework's own public API from given arrays: the ground truth.

Every file has the same functions; the tests find the files by themselves. A *model* is what
users of the framework hold: ``(module, variables)`` in Linen, ``(model, state)`` in Equinox.

===================================  =====================================================
``linear(weight, bias)`` …           build one layer from arrays in canonical layout
``lstm(weight_x, weight_h, bias)``   a cell with its gates in the order i, f, g, o
``steps(model, xs, h, ...)``         run a cell: outputs over time, the rest of the last state
``start(model, shape)``              a cell's state before an input of that shape, output first
``sequential(*layers)``              a stack of such layers and plain callables
``activation(fn)``                   a weight-less function of one array, as a layer
``subclass(weight, bias)``           a subclass of the linear layer with another forward
``renamed(weight, bias)``            a subclass that changes nothing
``custom(weight, bias)``             a model with forward logic of its own
``arguments(model)``                 the model and keywords that ``interop.convert`` takes
``receive(convert)``                 call ``convert()`` and return a model as above
``run(model, x, train, key)``        ``(output, model afterwards)`` on a batch
``jit(model, x)``                    the output in evaluation mode, compiled
``read(model)``                      the arrays of each layer that has some, in order
``options(model)``                   the class and options of each layer, in order
``gradient(model, x)``               of ``sum(output ** 2)``, in the form of ``read``
``step(model, x)``                   the model after one step of gradient descent on it
``count(model)``                     the number of arrays that an optimiser sees
``OWN_LAYOUT``                       arrays that ``read`` has to compute, by name
``construct(cls, x, **options)``     a model of one layer for inputs of shape ``x``
``CONSTRUCTORS``                     every option of every layer that converts: `Constructor`
``NAMESPACE``, ``MODULE``            where the public layers are, and their base class
``NO_LAYERS``, ``BASES``             public classes there that are no layers
``LACKS``                            what the framework lacks, with the reason to skip
===================================  =====================================================
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Option:
    """A value off an option's default, and what must become of it.

    Attributes:
        value: the value, or a dict of options that only make sense together.
        refused: the targets that refuse it; ``ALL`` if the source's rule already does.
        named: the name in the error, if it is another than the option's.
        x: shape of the input, if it is another than the constructor's.
        attribute: outputs on one device cannot show it: compare the attributes instead.
        training: whether the source can train with it.
        found: the class in the error, where that is of a part of the layer.
        everywhere: whether it has images in the same layout in every framework.
    """

    value: Any
    refused: tuple[str, ...] | str = ()
    named: str | None = None
    x: tuple[int, ...] | None = None
    attribute: bool = False
    training: bool = True
    found: str | None = None
    everywhere: bool = False


ALL = "all"
INITIAL = "only the initial value depends on it"
MODE = "the mode, which converted models switch by their own means"
SHAPE = "the shape of the arrays, which the conversion takes over"
NAME = "a name, without effect on the result"


@dataclass(frozen=True)
class Constructor:
    """How to build a layer, and every option of its constructor.

    Attributes:
        x: shape of an input, with its batch axis; or the input, where it must be integers.
        base: options that every instance needs.
        options: an `Option`, or the reason why the option is irrelevant.
        images: whether inputs and outputs are images, whose channels each framework has
            where it wants them; ``x`` is in the layout of the layer's own.
        refused: by target that refuses every instance, the option in the error.
    """

    x: tuple[int, ...] | Any
    base: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Option | str] = field(default_factory=dict)
    images: bool = False
    refused: dict[str, str] = field(default_factory=dict)
