"""The functions users call. They check arguments and dispatch."""

from __future__ import annotations

from typing import Any

from interop.errors import ArgumentError, UnsupportedStructureError
from interop.registry import registry

from .core import check_guest, side_of
from .report import LinkReport

__all__ = ["explain", "wrap"]


def explain(shim: Any) -> LinkReport:
    """Tell what a shim shows: each array once, its owner and its view, and if the link is live.

    Args:
        shim: a live shim. Nothing is changed or computed.

    Returns:
        A :class:`LinkReport` to print.

    Raises:
        ArgumentError: ``shim`` is not one of this library's shims.

    Example:
        >>> import brainstate, shims
        >>> print(shims.explain(shims.ToNNX(brainstate.nn.Linear(3, 4))))
        Linear in ToNNX, live: one array, seen by both sides; 2 arrays
        path           kind       array          owner  shown as
        weight.bias    parameter  float32[4]     guest  ParamView
        weight.weight  parameter  float32[3, 4]  guest  ParamView
    """
    report: Any = getattr(shim.__class__, "_shim_report", None)
    if report is None:
        raise ArgumentError(
            f"{type(shim).__qualname__} is not a live shim",
            remedy="Make one with shims.wrap; interop.explain tells how a model converts",
        )
    return report(shim)


def wrap(
    module: Any,
    into: str,
    *,
    params: Any = None,
    state: Any = None,
    batch_axes: int | None = None,
    axis_name: str | None = None,
    carry: Any = None,
    copy: bool = False,
) -> Any:
    """Make ``module`` a live module of another framework.

    Args:
        module: a module instance of any framework that can be a guest.
        into: the host framework, such as ``"nnx"``.
        params: the variables of a Linen module.
        state: the ``eqx.nn.State`` of a stateful Equinox module.
        batch_axes: leading axes that an Equinox module is mapped over, 1 by default.
        axis_name: the name of the first of them.
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
    adapter = registry.adapter(into)
    if isinstance(module, adapter.module_type):
        return module
    options = {
        "params": params,
        "state": state,
        "batch_axes": batch_axes,
        "axis_name": axis_name,
        "carry": carry,
    }
    _, given = check_guest(module, options)  # refuses what cannot be wrapped at all
    host = side_of(into, "host")
    if host is None:
        raise UnsupportedStructureError(
            f"{into} has no live shim for modules of other frameworks",
            remedy=f"Convert it with interop.convert(..., to={into!r}), or choose another host",
        )
    if copy:
        given["copy"] = True
    return host(module, **given)
