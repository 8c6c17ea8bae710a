"""Pictures of reports, drawn with matplotlib (extra ``plot``)."""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any

from .errors import MissingDependencyError

if TYPE_CHECKING:
    from .comparison import Comparison
    from .report import Report

__all__ = ["plot_comparison", "plot_report"]

_GOOD, _MOVED, _BAD, _PLAIN = "#2b8a57", "#e09b2d", "#b3322c", "#8a8f98"


def plot_comparison(comparison: Comparison, axes: Any) -> Any:
    """Draw :meth:`interop.Comparison.plot`."""
    axes = axes or _new_axes(max(5.0, 0.5 * len(comparison.layers)), 3.4)
    found = [(x.path, x.outputs) for x in comparison.layers] or [("model", comparison.outputs)]
    shares = [difference.relative for _, difference in found]
    floor = 1e-9
    finite = [x for x in shares if math.isfinite(x)]
    top = max([10 * comparison.rtol, *finite]) * 10
    heights = [min(max(share, floor), top) for share in shares]
    right = [d.within(comparison.rtol, comparison.atol) for _, d in found]
    axes.plot(range(len(found)), heights, color=_PLAIN, zorder=1)
    colours = [_GOOD if ok else _BAD for ok in right]
    axes.scatter(range(len(found)), heights, c=colours, zorder=2)
    axes.axhline(comparison.rtol, color=_BAD, linestyle=":", label="tolerance")
    axes.set_yscale("log")
    axes.set_ylim(floor / 2, top * 2)
    axes.set_xticks(range(len(found)), [path for path, _ in found], rotation=45, ha="right")
    axes.set_ylabel("relative difference of outputs")
    axes.set_title(str(comparison).partition("\n")[0].replace("; ", "\n"), fontsize=10)
    axes.legend(loc="upper left")
    axes.figure.set_layout_engine("constrained")
    return axes


def plot_report(report: Report, axes: Any) -> Any:
    """Draw :meth:`interop.Report.plot`."""
    axes = axes or _new_axes(7.0, 1.2 + 0.32 * max(1, len(report.rows)))
    places = range(len(report.rows))
    shared = [row.shared for row in report.rows]
    copied = [row.copied for row in report.rows]
    longest = max([a + b for a, b in zip(shared, copied, strict=True)], default=0) or 1
    axes.barh(places, shared, color=_GOOD, label="shared")
    axes.barh(places, copied, left=shared, color=_MOVED, label="transposed or copied")
    refused = [longest if row.problem else 0 for row in report.rows]
    axes.barh(places, refused, color=_BAD, alpha=0.25, label="refused")
    for i, row in enumerate(report.rows):
        text = row.problem.problem if row.problem else "; ".join((row.how, *row.changes))
        text = text if len(text) <= 60 else f"{text[:57]}..."
        axes.text(longest * 0.01, i, f" {text}", va="center", fontsize=8)
    axes.set_yticks(places, [f"{row.path}  {row.source}" for row in report.rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.02)
    axes.set_xlabel("bytes")
    axes.set_title(report.summary.replace("; ", "\n"), fontsize=10)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=3, fontsize=8)
    axes.figure.set_layout_engine("constrained")
    return axes


def _new_axes(width: float, height: float) -> Any:
    try:
        pyplot: Any = importlib.import_module("matplotlib.pyplot")
    except ModuleNotFoundError as e:
        raise MissingDependencyError("plot", "matplotlib") from e
    return pyplot.subplots(figsize=(width, height))[1]
