"""Native models, built by each framework's own public API from given arrays: the ground truth.

Every file has the same functions; the tests find the files by themselves. A *model* is what
users of the framework hold: ``(module, variables)`` in Linen, ``(model, state)`` in Equinox.

===================================  =====================================================
``linear(weight, bias)`` …           build one layer from arrays in canonical layout
``sequential(*layers)``              a stack of such layers and plain callables
``activation(fn)``                   a weight-less function of one array, as a layer
``subclass(weight, bias)``           a subclass of the linear layer with another forward
``custom(weight, bias)``             a model with forward logic of its own
``arguments(model)``                 what ``interop.convert`` takes for it: ``(model, keywords)``
``receive(convert)``                 call ``convert()`` and return a model as above
``run(model, x, train, key)``        ``(output, model afterwards)`` on a batch
``jit(model, x)``                    the output in evaluation mode, compiled
``read(model)``                      each leaf layer's arrays in canonical layout, in order
``gradient(model, x)``               of ``sum(output ** 2)``, in the form of ``read``
``step(model, x)``                   the model after one step of gradient descent on it
``containers(model)``                what must be unchanged in a source: each array by identity
``LACKS``                            what the framework lacks, with the reason to skip
===================================  =====================================================
"""
