"""Every deliberate error. The facts are attributes; the text is built here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = [
    "ArgumentError",
    "BrokenDependencyError",
    "ConversionError",
    "InteropError",
    "MissingDependencyError",
    "MissingKeyError",
    "MissingShapeError",
    "NotEquivalentError",
    "UnmappedLayerError",
    "UnsupportedLayerError",
    "UnsupportedStructureError",
]


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else text + "."


class InteropError(Exception):
    """Root of every error that this library raises on purpose.

    Attributes:
        problem: what was found, and what was wanted instead.
        path: where in the model (``model[2].weight``), or None.
        remedy: what to do, or None.

    Example:
        >>> import interop
        >>> try:
        ...     interop.convert(3, to="nnx")
        ... except interop.InteropError as error:
        ...     print(error.path, "|", error.remedy)
        model | Pass an instance of one of their modules
    """

    problem: str
    path: str | None
    remedy: str | None

    reporter: Callable[[], Any] | None = None
    """Makes ``report``; set by the conversion that failed."""

    @property
    def report(self) -> Any:
        """What :func:`interop.explain` says of the model: every layer and every problem.

        Worked out when it is asked for; None if the error came from no conversion.
        """
        return None if self.reporter is None else self.reporter()

    def __init__(self, problem: str, *, path: str | None = None, remedy: str | None = None):
        self.problem, self.path, self.remedy = problem, path, remedy
        where = f"{path}: " if path else ""
        todo = f" {_sentence(remedy)}" if remedy else ""
        super().__init__(f"{where}{_sentence(problem)}{todo}")


class ArgumentError(InteropError, TypeError, ValueError):
    """An argument has the wrong type or value: a class for an instance, an unknown name, …

    Example:
        >>> import interop
        >>> try:
        ...     interop.supported_layers("eqx")
        ... except interop.ArgumentError as error:
        ...     print(error.problem, "|", error.remedy.partition("?")[0])
        unknown framework 'eqx' | Did you mean 'equinox'
    """


class MissingDependencyError(InteropError, ImportError):
    """A framework's package is not installed.

    Attributes:
        framework: the framework asked for.
        package: the package that is missing.

    Example:
        >>> import interop
        >>> interop.MissingDependencyError("nnx", "flax").remedy
        'Install it: pip install flax'
    """

    framework: str
    package: str

    def __init__(self, framework: str, package: str):
        self.framework, self.package = framework, package
        super().__init__(
            f"{framework!r} needs the package {package!r}, which is not installed",
            remedy=f"Install it: pip install {package}",
        )


class BrokenDependencyError(InteropError, ImportError):
    """A framework's package is installed, but importing it fails.

    Attributes:
        framework: the framework asked for.
        versions: the installed versions that were found, by package.

    Example:
        >>> import interop
        >>> cause = AttributeError("core")
        >>> interop.BrokenDependencyError("nnx", cause, {"jax": "0.12"}).versions
        {'jax': '0.12'}
    """

    framework: str
    versions: dict[str, str]

    def __init__(self, framework: str, cause: BaseException, versions: dict[str, str]):
        self.framework, self.versions = framework, versions
        found = ", ".join(f"{name} {version}" for name, version in versions.items())
        super().__init__(
            f"{framework!r} is installed but cannot be imported "
            f"({type(cause).__name__}: {cause}); installed: {found}",
            remedy="These versions do not work together: upgrade the one that is behind",
        )


class UnmappedLayerError(InteropError, LookupError):
    """No rule is registered for a layer.

    Attributes:
        found: the layer's class.
        framework: the framework that has no rule for it.

    Example:
        >>> import brainstate, interop
        >>> class Twice(brainstate.nn.Module):
        ...     def update(self, x):
        ...         return 2 * x
        >>> try:
        ...     interop.to_nnx(brainstate.nn.Sequential(Twice()))
        ... except interop.UnmappedLayerError as error:
        ...     print(error.path, error.found.__name__, error.framework)
        model[0] Twice brainstate
    """

    found: type
    framework: str

    def __init__(self, found: type, framework: str, *, path: str, verb: str, remedy: str):
        self.found, self.framework = found, framework
        super().__init__(
            f"no rule to {verb} {found.__qualname__} ({framework})", path=path, remedy=remedy
        )


class UnsupportedLayerError(InteropError, NotImplementedError):
    """A layer is known, but this instance of it cannot be converted exactly.

    Attributes:
        found: the layer's class.
        target: the framework converted to, or None where the source already decides.
        option: the constructor option or method that stands in the way, or None.
        value: its value, or None.

    Example:
        >>> import brainstate, interop
        >>> class Doubled(brainstate.nn.Linear):
        ...     def update(self, x):
        ...         return 2 * super().update(x)
        >>> try:
        ...     interop.to_nnx(Doubled(3, 4))
        ... except interop.UnsupportedLayerError as error:
        ...     print(error.found.__name__, error.option)
        Doubled update
    """

    found: type
    target: str | None
    option: str | None
    value: Any

    def __init__(
        self,
        found: type,
        reason: str,
        *,
        path: str,
        target: str | None = None,
        option: str | None = None,
        value: Any = None,
        remedy: str | None = None,
    ):
        self.found, self.target, self.option, self.value = found, target, option, value
        to = f" to {target}" if target else ""
        super().__init__(
            f"cannot convert {found.__qualname__}{to}: {reason}", path=path, remedy=remedy
        )


class UnsupportedStructureError(InteropError, NotImplementedError):
    """A model's own forward logic, or the way its parts are shared, cannot be rebuilt.

    Example:
        >>> import interop
        >>> from flax import nnx
        >>> class Residual(nnx.Module):
        ...     def __init__(self):
        ...         self.inner = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        ...     def __call__(self, x):
        ...         return x + self.inner(x)
        >>> interop.explain(Residual(), to="equinox").problems[0].remedy.partition(";")[0]
        'Wrap it live: shims.wrap(model, into=...)'
    """


class MissingShapeError(InteropError, ValueError):
    """The target needs to know the shape of one example, and nothing tells it.

    Attributes:
        found: the class of the layer that needs the shape.

    Example:
        >>> import interop
        >>> from flax import nnx
        >>> conv = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
        >>> try:
        ...     interop.from_nnx(conv)
        ... except interop.MissingShapeError as error:
        ...     print(error.found)
        Conv
        >>> interop.from_nnx(conv, sample_input=(8, 8, 3)).out_size
        (8, 8, 4)
    """

    found: str

    def __init__(self, found: str, *, path: str, target: str, reason: str | None = None):
        self.found = found
        reason = reason or f"{target} fixes the input shape of {found} when it is built"
        super().__init__(
            f"{reason}, and the model does not tell it",
            path=path,
            remedy="Pass sample_input=, one example as the model takes it, without its batch "
            "axis, or its shape, such as sample_input=(28, 28, 1)",
        )


class ConversionError(InteropError, ValueError):
    """Weights do not fit: keys are missing or unexpected, or shapes or dtypes differ.

    Attributes:
        missing: keys that were wanted and not given.
        unexpected: keys that were given and not wanted.
        mismatched: one line for each array of the wrong shape or dtype.

    Example:
        >>> import flax.linen as nn, interop, jax.numpy as jnp
        >>> try:
        ...     interop.from_linen(nn.Dense(4), {"params": {"kernel": jnp.ones((3, 5))}})
        ... except interop.ConversionError as error:
        ...     print(error.missing, error.mismatched)
        ('params/bias',) ('params/kernel has shape (3, 5), wanted (in, 4)',)
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]

    def __init__(
        self,
        problem: str,
        *,
        path: str | None = None,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        mismatched: Sequence[str] = (),
        remedy: str | None = None,
    ):
        self.missing, self.unexpected = tuple(missing), tuple(unexpected)
        self.mismatched = tuple(mismatched)
        facts = [
            f"{label} {', '.join(items)}"
            for label, items in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("mismatched", self.mismatched),
            )
            if items
        ]
        text = f"{problem}: {'; '.join(facts)}" if facts else problem
        super().__init__(text, path=path, remedy=remedy)


class NotEquivalentError(InteropError, AssertionError):
    """Two models that should compute the same do not.

    Attributes:
        comparison: what :func:`interop.compare` found.
        beyond: one line for each output or gradient beyond the tolerances.

    Example:
        >>> import brainstate, interop, jax.numpy as jnp
        >>> model = brainstate.nn.Linear(3, 4)
        >>> other = interop.to_nnx(model)
        >>> other.bias.set_value(other.bias.get_value() + 1)
        >>> try:
        ...     interop.assert_equivalent(model, other, jnp.ones((2, 3)))
        ... except interop.NotEquivalentError as error:
        ...     print(error.comparison.departs.path)
        model
    """

    comparison: Any
    beyond: tuple[str, ...]

    def __init__(
        self,
        comparison: Any,
        beyond: Sequence[str],
        first: str | None,
        rtol: float,
        atol: float,
    ):
        self.comparison, self.beyond = comparison, tuple(beyond)
        where = "" if first is None else f"; the first layer that departs is {first}"
        super().__init__(
            f"the models differ by more than rtol={rtol:g}, atol={atol:g}{where}:\n  "
            + "\n  ".join(beyond)
        )


class MissingKeyError(InteropError, ValueError):
    """A layer draws random numbers and the host gave no key for it.

    Example:
        >>> import brainstate, interop, jax.numpy as jnp, shims
        >>> try:
        ...     shims.ToNNX(brainstate.nn.Dropout(0.5))(jnp.ones(3))
        ... except interop.MissingKeyError as error:
        ...     print(error.remedy.partition(",")[0])
        Pass rngs=nnx.Rngs(seed) to ToNNX or to the call
    """
