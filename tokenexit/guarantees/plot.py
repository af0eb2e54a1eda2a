"""Plot of a calibration: loss and upper bound of every setting by its cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenexit.errors import TokenExitError
from tokenexit.guarantees.calibration import Point, Report

__all__ = ["draw"]

_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "#8a8a8a"


def draw(report: Report, file: str | Path, /) -> None:
    """Draw loss and upper bound of every setting that was run, by its cost, and the level.

    Args:
        report: The report.
        file: Where to; its ending gives the format, as .png or .svg.

    Raises:
        TokenExitError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TokenExitError(f"`plot` must have matplotlib, `pip install tokenexit[viz]`, got {error}") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    exits = [point for point in report.curve if point.cut_after is None]
    cut = [point for point in report.curve if point.cut_after is not None]
    for points, name, colour, marker in ((exits, "exits", _BLUE, "o"), (cut, "network cut short", _ORANGE, "s")):
        if points:
            _series(axes, points, name, colour, marker)
    axes.axhline(100 * report.at_most, color=_GREY, linestyle="--", label="level")
    if report.chosen is not None:
        chosen = report.chosen
        axes.plot(100 * chosen.cost, 100 * chosen.loss, "o", markersize=15, markerfacecolor="none", color="black",
                  label="chosen")  # fmt: skip
    axes.set_xlabel("multiply-adds, % of the dense network")
    axes.set_ylabel(f"mean {report.risk}, %")
    axes.set_title(f"{report.images} images; filled: certified at {100 * report.confidence:g} %; bars: upper bounds")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(file)


def _series(axes: Any, points: Sequence[Point], name: str, colour: str, marker: str) -> None:
    x, y = [100 * point.cost for point in points], [100 * point.loss for point in points]
    above = [100 * max(point.bound - point.loss, 0) for point in points]
    axes.errorbar(x, y, yerr=([0] * len(points), above), color=colour, marker=marker, markerfacecolor="white",
                  capsize=3, linewidth=0.8, label=name)  # fmt: skip
    passed = [point for point in points if point.certified]
    axes.plot([100 * point.cost for point in passed], [100 * point.loss for point in passed], marker, color=colour)
