"""Use a layer of one framework live inside another.

The shim is a native module of its host framework. The guest, the wrapped layer, owns its
arrays; the shim's containers are views of them. Importing this package imports no framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, overload

from . import api as _api
from .api import explain
from .report import ArrayRow, LinkReport

if TYPE_CHECKING:
    import os

    import brainstate
    import equinox
    import flax.linen
    import flax.nnx

    from .frameworks.brainstate import FromEquinox, FromLinen, FromNNX
    from .frameworks.equinox import ToEquinox
    from .frameworks.linen import ToLinen
    from .frameworks.nnx import ToNNX
    from .materialization import materialize
    from .saving import save_traced

__all__ = [
    "ArrayRow",
    "FromEquinox",
    "FromLinen",
    "FromNNX",
    "LinkReport",
    "ToEquinox",
    "ToLinen",
    "ToNNX",
    "explain",
    "load_traced",
    "materialize",
    "save_traced",
    "wrap",
]

_HOSTS = {
    "FromEquinox": "brainstate",
    "FromLinen": "brainstate",
    "FromNNX": "brainstate",
    "ToEquinox": "equinox",
    "ToLinen": "linen",
    "ToNNX": "nnx",
}
_FILES = {name: f"frameworks.{host}" for name, host in _HOSTS.items()} | {
    "materialize": "materialization",
    "save_traced": "saving",
}


@overload
def wrap(
    module: Any,
    into: Literal["brainstate"],
    *,
    params: Any = ...,
    state: Any = ...,
    batch_axes: int | None = ...,
    axis_name: str | tuple[str, ...] | None = ...,
    carry: Any = ...,
    copy: bool = ...,
) -> brainstate.nn.Module: ...


@overload
def wrap(
    module: Any,
    into: Literal["nnx"],
    *,
    params: Any = ...,
    state: Any = ...,
    batch_axes: int | None = ...,
    axis_name: str | tuple[str, ...] | None = ...,
    carry: Any = ...,
    copy: bool = ...,
) -> flax.nnx.Module: ...


@overload
def wrap(
    module: Any,
    into: Literal["linen"],
    *,
    params: Any = ...,
    state: Any = ...,
    batch_axes: int | None = ...,
    axis_name: str | tuple[str, ...] | None = ...,
    carry: Any = ...,
    copy: bool = ...,
) -> flax.linen.Module: ...


@overload
def wrap(
    module: Any,
    into: Literal["equinox"],
    *,
    params: Any = ...,
    state: Any = ...,
    batch_axes: int | None = ...,
    axis_name: str | tuple[str, ...] | None = ...,
    carry: Any = ...,
    copy: bool = ...,
) -> equinox.Module: ...


@overload
def wrap(
    module: Any,
    into: str,
    *,
    params: Any = ...,
    state: Any = ...,
    batch_axes: int | None = ...,
    axis_name: str | tuple[str, ...] | None = ...,
    carry: Any = ...,
    copy: bool = ...,
) -> Any: ...


def wrap(
    module: Any,
    into: str,
    *,
    params: Any = None,
    state: Any = None,
    batch_axes: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    carry: Any = None,
    copy: bool = False,
) -> Any:
    """Make ``module`` a live module of another framework.

    Args:
        module: a module instance of any framework that can be a guest.
        into: the host framework, such as ``"nnx"``.
        params: the variables of a Linen module.
        state: the ``eqx.nn.State`` of a stateful Equinox module.
        batch_axes: leading axes of all array arguments, also those given by name, that an
            Equinox module is mapped over, 1 by default.
        axis_name: the name of these axes together, or a tuple with one for each.
        carry: what one example starts from, for an Equinox module that is a recurrent cell of
            your own: it is called ``module(x, carry)`` and returns ``(carry, output)``.
            Its input has one feature axis, or ``module.num_feature_axes``.
        copy: give the host copies of the arrays, so that donating them keeps the module's;
            not where both sides change in place, and the module has the new values at once.

    Returns:
        The host's shim class around ``module``, sharing its arrays; ``module`` itself if it
        is one of the host's already.

    Raises:
        ArgumentError: ``module`` is a class or no module, the framework is unknown, or an
            argument does not belong to the pair.
        UnsupportedStructureError: the pair has no live shim.
        MissingDependencyError, BrokenDependencyError: the host cannot be imported.

    Example:
        >>> import brainstate, shims
        >>> shims.wrap(brainstate.nn.Linear(3, 4), into="nnx").weight["weight"].shape
        (3, 4)
    """
    return _api.wrap_into(
        module,
        into,
        copy=copy,
        params=params,
        state=state,
        batch_axes=batch_axes,
        axis_name=axis_name,
        carry=carry,
    )


@overload
def load_traced(
    path: str | os.PathLike[str], into: Literal["brainstate"]
) -> brainstate.nn.Module: ...


@overload
def load_traced(path: str | os.PathLike[str], into: Literal["nnx"]) -> flax.nnx.Module: ...


@overload
def load_traced(
    path: str | os.PathLike[str], into: Literal["linen"]
) -> tuple[flax.linen.Module, dict[str, Any]]: ...


@overload
def load_traced(path: str | os.PathLike[str], into: str) -> Any: ...


def load_traced(path: str | os.PathLike[str], into: str) -> Any:
    """Read a traced module into a framework: the one it was saved from, or any other.

    Only that framework is imported.

    Args:
        path: a file that :func:`save_traced` wrote.
        into: the framework, such as ``"nnx"``.

    Returns:
        The native module, in the mode in which it was saved: ``(module, variables)`` for Linen,
        ``(module, state)`` for an Equinox module with state.

    Raises:
        ConversionError: the file is damaged, or is no traced module.
        FileNotFoundError: there is no such file.
        ArgumentError: the framework is unknown.
        MissingDependencyError, BrokenDependencyError: it cannot be imported, or
            ``flatbuffers`` is missing.

    Example:
        >>> import brainstate, jax, jax.numpy as jnp, shims, tempfile
        >>> from pathlib import Path
        >>> x, shim = jnp.ones((5, 3)), shims.ToNNX(brainstate.nn.Linear(3, 4))
        >>> traced = shim.materialize(method="trace", sample_input=x)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     shims.save_traced(Path(folder) / "block.traced", traced)
        ...     module = shims.load_traced(Path(folder) / "block.traced", into="equinox")
        >>> bool(jnp.allclose(module(x), traced(x)))
        True
    """
    from .saving import load_into

    return load_into(path, into)


if not TYPE_CHECKING:  # where names that are not in it would count as known

    def __getattr__(name: str) -> Any:
        if name not in _FILES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name in _HOSTS:
            from interop.registry import registry

            registry.adapter(_HOSTS[name])  # says which package is missing or broken
        return getattr(import_module(f".{_FILES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
