"""Charts: tokens per block, the settings of a calibration, and accuracy against speed as the results page has them."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from examples.figures.sheet import Sheet, Theme
from tokenexit import cost, schedule
from tokenexit.guarantees import calibration, ladders

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "camvid-2640.md"
_HEADER = "| setting | against dense, from above |"
_FIRST = "| setting | mIoU | against dense |"


def token_blocks(theme: Theme) -> Figure:
    """Tokens that run through each block as bars, and token-blocks as their area, for a made-up image."""
    ran = np.array([[100] * 3 + [66] * 3 + [42] * 2 + [30] * 4])
    area = cost.token_blocks(ran, slots=100)
    sheet = Sheet(theme, 216)
    pitch, left, floor, unit = 35, 38, 188, 1.5
    sheet.box(left, floor - 100 * unit, 12 * pitch - 4, 100 * unit, colour="none", line=theme.muted, dashed=True)
    for block, count in enumerate(ran[0].tolist()):
        x, high = left + block * pitch, unit * count
        sheet.box(x, floor - high, pitch - 4, high, colour=theme.blue, radius=3)
        sheet.text(x + pitch / 2 - 2, floor + 14, str(block + 1), colour=theme.muted)
        if block and count < ran[0, block - 1]:
            sheet.arrow((x - 2, floor - high - 42), (x - 2, floor - high - 6), colour=theme.orange, width=2.5, head=9)
            sheet.text(x + 4, floor - high - 34, "exit", colour=theme.orange, across="left")
    sheet.text(38, 14, "tokens that run in each block, an example", across="left")
    sheet.text(446, 64, f"token-blocks: {area:.2f}", across="right")
    sheet.text(446, 86, "= bars / frame", colour=theme.muted, across="right")
    sheet.text(30, floor - 100 * unit + 6, "all", colour=theme.muted, across="right")
    sheet.text(30, floor - 4, "0", colour=theme.muted, across="right")
    return sheet.figure


def calibrated(theme: Theme) -> Figure:
    """Made-up losses of seven settings in order of cost, their upper bounds, and the one that is chosen."""
    thresholds, images = (0.99, 0.97, 0.95, 0.92, 0.88, 0.8, 0.7), 600
    settings = ladders.by_threshold(schedule.neighbours(), thresholds=thresholds)
    costs = (0.9, 0.84, 0.77, 0.7, 0.63, 0.55, 0.48)
    means = np.array([0.0025, 0.004, 0.0055, 0.0075, 0.0105, 0.0215, 0.031])
    # Spread evenly, so that no generator decides what is drawn.
    losses = 2 * means * ((np.arange(1, images + 1)[:, None] * 0.6180339887) % 1)
    report = calibration.certify(settings, losses, costs, at_most=0.02, confidence=0.95)
    assert report.chosen is not None
    sheet = Sheet(theme, 256)
    axes = sheet.chart(54, 34, 14, 50)
    sheet.text(54, 14, "settings, an example", across="left")
    for point in report.curve:
        colour = theme.blue if point.certified else theme.orange
        x, low, high = point.cost, 100 * point.loss, 100 * point.bound
        axes.plot([x, x], [low, high], color=colour, linewidth=2.5)
        axes.plot([x], [high], marker="_", color=colour, markersize=12, markeredgewidth=2.5)
        fill = colour if point.certified else theme.paper
        axes.plot([x], [low], marker="o", color=colour, markerfacecolor=fill, markersize=9, markeredgewidth=2)
    axes.axhline(100 * report.at_most, color=theme.ink, linewidth=1.6, linestyle=(0, (4, 3)))
    axes.text(0.925, 100 * report.at_most + 0.14, "allowed", color=theme.ink, va="bottom")
    x, y = report.chosen.cost, 100 * report.chosen.loss
    axes.plot([x], [y], marker="o", markersize=19, markerfacecolor="none", markeredgecolor=theme.ink,
              markeredgewidth=2)  # fmt: skip
    axes.text(x, y - 0.42, "chosen", color=theme.ink, ha="center", va="top")
    failed = next(point for point in report.curve if not point.certified)
    axes.text(failed.cost + 0.015, 100 * failed.bound + 0.2, "not certified", color=theme.orange, ha="right")
    axes.set(xlim=(0.94, 0.42), ylim=(0, 4.2), xlabel="cost, dense = 1", ylabel="loss, %")
    axes.yaxis.set_major_locator(MultipleLocator(1))
    return sheet.figure


def frontier(theme: Theme) -> Figure:
    """Differences in mIoU against measured speed-up at batch 4, read from the results page."""
    series = {
        "merging, then exits": (theme.blue, "o"),
        "exits": (theme.orange, "s"),
        "merging": (theme.green, "D"),
        "ToMe": (theme.purple, "^"),
        "smaller input": (theme.ink, "v"),
        "truncated": (theme.muted, "X"),
    }
    sheet = Sheet(theme, 330)
    axes = sheet.chart(68, 40, 16, 52)
    found = list(measured(RESULTS.read_text(encoding="utf-8")))
    for name, (colour, marker) in series.items():
        points = sorted((speed, change) for kind, speed, change in found if kind == name)
        assert points, name
        x, y = zip(*points, strict=True)
        empty = {"markerfacecolor": "none", "markeredgewidth": 2} if name == "truncated" else {}
        axes.plot(x, y, marker=marker, color=colour, markersize=10, linewidth=1.4, linestyle=":", **empty)
        dx, dy, across = _AT[name]
        words = "truncated,\nother run" if name == "truncated" else name
        axes.text(x[-1] + dx, y[-1] + dy, words, color=colour, ha=across, va="center")
    axes.axhline(0, color=theme.faint, linewidth=1.6, zorder=0)
    axes.plot([1], [0], marker="*", color=theme.ink, markersize=15)
    axes.text(0.98, 0.17, "dense", color=theme.ink, ha="left", va="center")
    axes.set(
        xlim=(0.94, 3.0), ylim=(-1.85, 0.38), xlabel="times as fast as dense, batch 4", ylabel="change of mIoU, points"
    )
    axes.xaxis.set_major_locator(MultipleLocator(0.5))
    axes.yaxis.set_major_locator(MultipleLocator(0.5))
    sheet.text(2, 14, "CamVid, 2,640 tokens, CPU", across="left")
    return sheet.figure


_AT = {
    "merging, then exits": (0.19, 0.71, "right"),
    "exits": (-0.11, 0.36, "center"),
    "merging": (0.05, -0.19, "left"),
    "ToMe": (-0.05, -0.14, "right"),
    "smaller input": (0.0, -0.17, "center"),
    "truncated": (-0.09, 0.0, "right"),
}  # where names stand beside the fastest point of their series


def measured(page: str) -> Iterator[tuple[str, float, float]]:
    """Settings of a results page: kind, speed-up at batch 4, and difference in mIoU.

    All are of the run in one process with nothing else running; networks cut short are of the run before it, the first
    on the page.

    Args:
        page: Its text.
    """
    for setting, _, change, _, _, _, _, _, fast in _rows(page, _FIRST):
        if re.fullmatch(r"truncated after [68]", setting):
            yield "truncated", _number(fast), _number(change)
    for setting, change, _, fast in _rows(page, _HEADER):
        yield _kind(setting), _number(fast), _number(change)


def _kind(setting: str) -> str:
    kinds = {"neighbours": "exits", "ToMe": "ToMe", "smaller input": "smaller input"}
    for start, kind in kinds.items():
        if setting.startswith(start):
            return kind
    assert setting.startswith("merge ")
    return "merging, then exits" if "exits" in setting else "merging"


def _rows(page: str, header: str) -> Iterator[list[str]]:
    """Cells of the first table with a header that starts so."""
    _, _, after = page.partition(header)
    assert after, f"the page has no table that starts with {header!r}"
    for line in after.splitlines()[2:]:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]


def _number(cell: str) -> float:
    """Number that a cell starts with."""
    found = re.match(r"[+-]?\d+(\.\d+)?", cell)
    assert found, cell
    return float(found[0])
