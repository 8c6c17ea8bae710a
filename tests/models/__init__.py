"""Native models, built by each framework's own public API from given arrays: the ground truth.

Every file has the same functions; the tests find the files by themselves. A *model* is what
users of the framework hold: ``(module, variables)`` in Linen, ``(model, state)`` in Equinox.

===================================  =====================================================
``linear(weight, bias)`` …           build one layer from arrays in canonical layout
``sequential(*layers)``              a stack of such layers and plain callables
``activation(fn)``                   a weight-less function of one array, as a layer
``subclass(weight, bias)``           a subclass of the linear layer with another forward
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
``LACKS``                            what the framework lacks, with the reason to skip
===================================  =====================================================
"""
