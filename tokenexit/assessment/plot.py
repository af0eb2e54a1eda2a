"""Plot of an assessment: loss by speed-up and by multiply-adds saved, and mean IoU where there are labels."""

import os
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenexit.assessment.results import KINDS, OURS, Assessment, Kind, Measured
from tokenexit.errors import TokenExitError, require
from tokenexit.folders import replacing

__all__ = ["draw"]

STYLES: dict[Kind, tuple[str, str]] = {
    "dense": ("#1a1a1a", "*"),
    "merging": ("#0072b2", "o"),
    "exits": ("#d55e00", "s"),
    "merging and exits": ("#008060", "D"),
    "truncation": ("#6f6f6f", "v"),
    "smaller input": ("#b5528b", "^"),
    "compiled dense": ("#1a1a1a", "p"),
}
"""Colour and marker of each kind: told apart also without colour."""

_GREY, _PALE = "#6f6f6f", "#d9d9d9"
_WIDTH, _HEIGHT, _LEGEND = 4.5, 3.1, 0.35  # inches: as wide as a phone, so that text is not scaled down to nothing
_LEAST_SIZE, _SIZE = 10, 11  # points

Range = tuple[float, float, float]


@dataclass(frozen=True)
class _Panel:
    """What is drawn over what: functions give None for a row that has no such number."""

    x_label: str
    y_label: str
    x: Callable[[Measured], Range | None]
    y: Callable[[Measured], float | None]

    def points(self, rows: Iterable[Measured]) -> list[tuple[Range, float]]:
        """Lower quartile, median and upper quartile of x, and y."""
        found = [(self.x(row), self.y(row)) for row in rows]
        return [(x, y) for x, y in found if x is not None and y is not None]


def draw(assessment: Assessment, /, file: str | Path | None = None) -> Any:
    """Draw loss by speed-up, loss by multiply-adds saved, and mean IoU by speed-up, one panel below the other.

    A panel is left out if no row has its numbers. A dashed line is at `at_most`: losses are on a linear scale below it,
    and on a logarithmic one above. Lines of mIoU far below all plans of this library run out of their panel. A ring is
    around what was chosen.

    Args:
        assessment: The assessment.
        file: Where to write it; its ending gives the format, as .png or .svg. None: nothing is written.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        TokenExitError: If matplotlib is not installed, an argument is of another type, nothing was timed or counted,
            or the file has an unknown ending or cannot be written.
    """
    require(isinstance(assessment, Assessment), "assessment", "be an Assessment", type(assessment).__name__)
    require(file is None or isinstance(file, str | os.PathLike), "file", "be a path or None", type(file).__name__)
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise TokenExitError(f"`plot` must have matplotlib, `pip install tokenexit[viz]`, got {error}") from error
    loss = f"{assessment.loss}, %"
    known = (
        _Panel("times as fast as dense", loss, _times, _loss),
        _Panel("multiply-adds saved, % of dense", loss, _saved, _loss),
        _Panel("times as fast as dense", "mIoU, %", _times, _quality),
    )
    panels = [panel for panel in known if panel.points(assessment.rows)]
    require(len(panels) > 0, "assessment", "have a row that was timed, or whose multiply-adds were counted", "none")
    with mpl.rc_context({"font.size": _LEAST_SIZE, "axes.labelsize": _SIZE, "axes.spines.top": False,
                         "axes.spines.right": False, "axes.axisbelow": True}):  # fmt: skip
        figure = Figure(
            figsize=(_WIDTH, _HEIGHT * len(panels) + 2 * _LEGEND), layout=ConstrainedLayoutEngine(h_pad=0.12)
        )
        axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axis, panel in zip(axes, panels, strict=True):
            _draw_panel(axis, panel, assessment)
        legend = _legend(axes)
        figure.legend(legend.values(), legend.keys(), loc="outside upper left", ncols=3, frameon=False,
                      fontsize=_LEAST_SIZE, handlelength=1.6, handletextpad=0.4, columnspacing=1.0)  # fmt: skip
        if file is not None:
            _write(figure, Path(file))
    return figure


def _times(row: Measured) -> Range | None:
    return row.speedup


def _loss(row: Measured) -> float:
    return 100 * row.loss


def _saved(row: Measured) -> Range | None:
    if row.cost is None:
        return None
    saved = 100 * (1 - row.cost)
    return saved, saved, saved


def _quality(row: Measured) -> float | None:
    return None if row.quality is None else 100 * row.quality


def _draw_panel(axis: Any, panel: _Panel, assessment: Assessment) -> None:
    axis.grid(color=_PALE, linewidth=0.6)
    axis.set_xlabel(panel.x_label)
    axis.set_ylabel(textwrap.fill(panel.y_label.replace("$", r"\$"), 32))  # or matplotlib reads a formula
    if panel.y is _loss:
        _scale_losses(axis, assessment)
    for kind in KINDS:
        found = panel.points(row for row in assessment.ordered if row.kind == kind)
        if found:
            _draw_kind(axis, kind, found)
    chosen = assessment.chosen
    for (_, x, _), y in panel.points([] if chosen is None else [chosen]):
        axis.plot([x], [y], "o", markersize=14, markerfacecolor="none", markeredgecolor="black", markeredgewidth=1.4,
                  zorder=4, label="chosen")  # fmt: skip
    axis.margins(x=0.08)
    if panel.y is _quality:
        _scale_quality(axis, assessment)


def _draw_kind(axis: Any, kind: Kind, points: list[tuple[Range, float]]) -> None:
    """What the library does is filled; what it is compared with is hollow."""
    colour, marker = STYLES[kind]
    ranges, y = zip(*points, strict=True)
    x = [middle for _, middle, _ in ranges]
    bars = [[max(one[1] - one[0], 0) for one in ranges], [max(one[2] - one[1], 0) for one in ranges]]
    ours = kind in OURS or kind == "dense"
    axis.errorbar(x, y, xerr=bars if any(map(any, bars)) else None, color=colour, marker=marker, label=kind,
                  linestyle="-" if ours else ":", linewidth=1.2, elinewidth=0.9, capsize=2, zorder=3,
                  markersize=11 if kind == "dense" else 5.5, markerfacecolor=colour if ours else "white",
                  markeredgewidth=0 if kind == "dense" else 1.2)  # fmt: skip


def _scale_quality(axis: Any, assessment: Assessment) -> None:
    """Lines of what loses far more than this library may run out below, or all else would be one flat line."""
    dense, known = assessment.dense.quality, [row for row in assessment.rows if row.quality is not None]
    ours = [100 * (row.quality or 0) for row in known if row.kind in OURS]
    if dense is None or not ours:
        return
    floor = 100 * dense - 2.5 * max(100 * dense - min(ours), 1)
    if any(100 * (row.quality or 0) < floor for row in known):
        axis.set_ylim(bottom=floor)


def _scale_losses(axis: Any, assessment: Assessment) -> None:
    """Losses within `at_most` and ten times as great are both told apart: linear up to it, and logarithmic above."""
    limit = 100 * assessment.at_most
    top = 1.3 * max(limit, *(100 * row.loss for row in assessment.rows))
    bottom = -0.12 * limit  # what is at 0 is seen whole
    above = [step * 10.0**power for power in range(-6, 3) for step in (1, 2, 5)]
    axis.set_yscale("symlog", linthresh=limit, linscale=0.8)
    axis.set_yticks([0, limit / 2, limit, *(one for one in above if 1.4 * limit < one < top)])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axis.minorticks_off()
    axis.set_ylim(bottom, top)
    axis.axhspan(bottom, limit, color=STYLES["merging"][0], alpha=0.05, linewidth=0)
    axis.axhline(limit, color=_GREY, linestyle="--", linewidth=1, label=f"at most {limit:.3g} %")


def _legend(axes: Iterable[Any]) -> dict[str, Any]:
    """Lines by what they are called, kinds first; without the bars, which would hide the markers."""
    found = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found[label] = handle[0] if isinstance(handle, tuple) else handle
    return {label: found[label] for label in sorted(found, key=lambda one: one not in KINDS)}


def _write(figure: Any, file: Path) -> None:
    known, ending = figure.canvas.get_supported_filetypes(), file.suffix[1:].lower()
    require(ending in known, "file", f"end in one of .{', .'.join(sorted(known))}", str(file))
    with replacing(file, argument="file") as part:
        figure.savefig(part, format=ending)
