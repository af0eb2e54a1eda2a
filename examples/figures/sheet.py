"""Shared look of all figures: two colour schemes, and a sheet on which tokens, boxes and arrows are drawn in points.

A token that runs is a filled square, one that exited an outline: they differ in more than colour.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.style
import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline

WIDTH = 460  # points; 400 pixels of a phone show 14 pt as 12 px
SIZE = 14

Point = tuple[float, float]
Across = Literal["left", "center", "right"]

_STYLE = {
    "svg.hashsalt": "tokenexit",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",  # it comes with matplotlib, so that every machine draws the same
    "font.size": SIZE,
}
_POINTS = 72


@dataclass(frozen=True)
class Theme:
    """A colour scheme.

    Attributes:
        name: Its name, which is part of the names of files.
        paper: Colour of the page behind the transparent figure.
        ink: Text and frames.
        muted: Secondary text and lines.
        faint: Places without a token, and backgrounds of boxes.
        blue: Hue of the first class, image or series.
        orange: Hue of the second, and of exits.
        green: Hue of the third.
        purple: Hue of the fourth, and of translators.
    """

    name: str
    paper: str
    ink: str
    muted: str
    faint: str
    blue: str
    orange: str
    green: str
    purple: str

    @property
    def hues(self) -> tuple[str, str, str, str]:
        """Hues of classes, in order."""
        return self.blue, self.orange, self.green, self.purple

    def tint(self, colour: str, share: float) -> str:
        """A colour mixed with that of the page.

        Args:
            colour: The colour.
            share: Its share, from 0 to 1.
        """
        return mixed([self.paper, colour], [1 - share, share])


# Okabe and Ito's hues, darker on white and lighter on slate.
LIGHT = Theme("light", "#ffffff", "#1b1f24", "#57606a", "#dde2e8", "#0072b2", "#d55e00", "#008a64", "#a3478b")
DARK = Theme("dark", "#1e2129", "#e8ebf0", "#a6aebb", "#3d4352", "#56b4e9", "#f0a030", "#33c39a", "#dd94c6")
THEMES = (LIGHT, DARK)


def mixed(colours: Sequence[str], weights: Sequence[float]) -> str:
    """Weighted mean of colours."""
    parts = [[weight * part for part in to_rgb(colour)] for colour, weight in zip(colours, weights, strict=True)]
    red, green, blue = (min(1.0, sum(channel) / sum(weights)) for channel in zip(*parts, strict=True))
    return to_hex((red, green, blue))


class Sheet:
    """An empty figure with points as coordinates, from the top left corner.

    Args:
        theme: The colour scheme.
        height: Its height.
        width: Its width.
    """

    def __init__(self, theme: Theme, height: float, width: float = WIDTH) -> None:
        self.theme = theme
        self.height, self.width = height, width
        self.figure = Figure(figsize=(width / _POINTS, height / _POINTS), dpi=_POINTS)
        self._axes = self.figure.add_axes((0, 0, 1, 1))
        self._axes.set_axis_off()
        self._axes.set(xlim=(0, width), ylim=(height, 0))

    def chart(self, left: float, top: float, right: float, bottom: float) -> Axes:
        """Axes between these margins, in the style of the family."""
        wide, high = self.width, self.height
        place = (left / wide, bottom / high, (wide - left - right) / wide, (high - top - bottom) / high)
        axes = self.figure.add_axes(place, facecolor="none")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(self.theme.muted)
        axes.tick_params(colors=self.theme.muted, labelcolor=self.theme.ink, labelsize=SIZE, length=3)
        axes.xaxis.label.set(color=self.theme.ink, fontsize=SIZE)
        axes.yaxis.label.set(color=self.theme.ink, fontsize=SIZE)
        return axes

    def text(
        self, x: float, y: float, words: str, *, colour: str = "", size: float = SIZE, across: Across = "center",
        bold: bool = False,
    ) -> None:  # fmt: skip
        """Text, with the middle of its letters, or of its lines, at a height."""
        lines = "\n" in words
        self._axes.text(x, y if lines else y + 0.36 * size, words, color=colour or self.theme.ink, fontsize=size,
                        ha=across, va="center" if lines else "baseline", linespacing=1.15,
                        fontweight="bold" if bold else "normal")  # fmt: skip

    def tokens(
        self, places: Iterable[Point], side: float, colour: str, *, hollow: bool = False, dashed: bool = False
    ) -> None:
        """Squares, filled or as outlines, of one colour.

        Args:
            places: Their top left corners.
            side: Their side.
            colour: The colour.
            hollow: As outlines.
            dashed: As dashed outlines.
        """
        line = min(2.0, 0.5 + side / 12)
        if hollow or dashed:
            fill, width, inset = "none", line, line / 2
        else:
            width = min(6.0, side / 4)
            fill, inset = colour, width / 2
        corners = [self._rectangle(x + inset, y + inset, side - 2 * inset, side - 2 * inset) for x, y in places]
        dashes: Any = (0, (1.6, 1.2)) if dashed else "solid"
        self._add(corners, facecolor=fill, edgecolor=colour, linewidth=width, linestyle=dashes)

    def box(
        self, x: float, y: float, wide: float, high: float, *, colour: str = "", line: str = "none",
        dashed: bool = False, radius: float = 6,
    ) -> None:  # fmt: skip
        """A rounded box.

        Args:
            x: Its left edge.
            y: Its top edge.
            wide: Its width.
            high: Its height.
            colour: Colour inside; that of boxes by default.
            line: Colour of the outline; none by default.
            dashed: A dashed outline.
            radius: That of its corners.
        """
        self._add([self._rounded(x, y, wide, high, radius)], facecolor=colour or self.theme.faint, edgecolor=line,
                  linewidth=1.6, linestyle=(0, (3, 2)) if dashed else "solid")  # fmt: skip

    def frame(self, x: float, y: float, wide: float, high: float, colour: str, width: float = 2.5) -> None:
        """A rectangle of lines."""
        self._add([self._rectangle(x, y, wide, high)], facecolor="none", edgecolor=colour, linewidth=width)

    def line(self, *points: Point, colour: str = "", width: float = 1.6, dashed: bool = False) -> None:
        """A line through points."""
        self._add([self._through(points)], facecolor="none", edgecolor=colour or self.theme.muted, linewidth=width,
                  linestyle=(0, (3, 2.4)) if dashed else "solid")  # fmt: skip

    def arrow(self, *points: Point, colour: str = "", width: float = 1.6, head: float = 7) -> None:
        """A line through points with a head at the last, reached along an axis."""
        (x0, y0), (x, y) = points[-2:]
        away = max(abs(x - x0), abs(y - y0))
        dx, dy = (x - x0) / away * head, (y - y0) / away * head
        colour = colour or self.theme.muted
        self.line(*points[:-1], (x - dx / 2, y - dy / 2), colour=colour, width=width)
        sides = [(x - dx - dy * 0.6, y - dy + dx * 0.6), (x, y), (x - dx + dy * 0.6, y - dy - dx * 0.6)]
        self._add([self._through(sides, closed=True)], facecolor=colour, edgecolor=colour, linewidth=0.8)

    def dot(self, x: float, y: float, radius: float, colour: str) -> None:
        """A filled circle."""
        circle = Outline.circle((x, y), radius)
        self._add([circle], facecolor=colour, edgecolor="none", linewidth=0)

    def bracket(self, left: float, right: float, y: float, *, depth: float, colour: str = "") -> None:
        """A bracket under a span, or above it if the depth is negative."""
        self.line((left, y), (left, y + depth), (right, y + depth), (right, y), colour=colour)

    def key(self, x: float, y: float, words: str, colour: str, *, hollow: bool = False, dashed: bool = False) -> None:
        """An entry of a legend: a token and what it is."""
        self.tokens([(x, y - 8)], 16, colour, hollow=hollow, dashed=dashed)
        self.text(x + 23, y, words, across="left")

    def picture(self, x: float, y: float, wide: float, high: float, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
        """A small picture, embedded as it is."""
        self._axes.imshow(pixels, extent=(x, x + wide, y + high, y), interpolation="none", aspect="auto")
        self._axes.set(xlim=(0, self.width), ylim=(self.height, 0))

    def _add(self, outlines: Sequence[Outline], **look: Any) -> None:
        if outlines:
            drawn = PathPatch(Outline.make_compound_path(*outlines), joinstyle="round", capstyle="round", **look)
            drawn.set_clip_on(False)
            self._axes.add_patch(drawn)

    @staticmethod
    def _through(points: Sequence[Point], *, closed: bool = False) -> Outline:
        given = [*points, points[0]] if closed else list(points)
        codes = [Outline.MOVETO, *[Outline.LINETO] * (len(given) - 1)]
        if closed:
            codes[-1] = Outline.CLOSEPOLY
        return Outline([(round(x, 2), round(y, 2)) for x, y in given], codes)

    @classmethod
    def _rectangle(cls, x: float, y: float, wide: float, high: float) -> Outline:
        return cls._through([(x, y), (x + wide, y), (x + wide, y + high), (x, y + high)], closed=True)

    @staticmethod
    def _rounded(x: float, y: float, wide: float, high: float, radius: float) -> Outline:
        right, low, r = x + wide, y + high, radius
        points = [
            (x + r, y), (right - r, y), (right, y), (right, y + r), (right, low - r), (right, low), (right - r, low),
            (x + r, low), (x, low), (x, low - r), (x, y + r), (x, y), (x + r, y), (x + r, y),
        ]  # fmt: skip
        turn = [Outline.LINETO, Outline.CURVE3, Outline.CURVE3]
        return Outline(points, [Outline.MOVETO, *turn * 4, Outline.CLOSEPOLY])


def write(figure: Figure, file: Path, title: str) -> None:
    """Write a figure as SVG, of the same bytes each time.

    Args:
        figure: The figure.
        file: Where to.
        title: What it shows, for readers that do not see it.
    """
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Title": title})


def plain_style() -> Any:
    """A context in which the style is that of the figures, whatever the user's settings of matplotlib are."""
    return matplotlib.style.context(["default", _STYLE])
