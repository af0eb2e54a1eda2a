"""Draws what a segmentation did: picture, dense result, the planned one, how tokens merged, and where they left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch

from examples.about import About

Side = Literal["right", "bottom"]
Colour = tuple[float, float, float, float]

_SIZES = (1, 4, 16, 64, 256)
_DIFFERENT = (0.84, 0.37, 0.0)  # vermilion, told from grey by everyone


@dataclass(frozen=True)
class Maps:
    """What there is to show of each picture.

    Attributes:
        dense: Class of each pixel, all tokens run through all blocks.
        exiting: Class of each pixel, as planned.
        depth: Blocks that each patch ran through.
        size: Patches that ran on as one with each patch; None under a plan that merges nothing.
    """

    dense: Int[np.ndarray, "images height width"]
    exiting: Int[np.ndarray, "images height width"]
    depth: Int[np.ndarray, "images grid_height grid_width"]
    size: Int[np.ndarray, "images grid_height grid_width"] | None = None


def draw(
    pixels: UInt8[np.ndarray, "images height width 3"], maps: Maps, about: About, blocks: int, headline: str
) -> Figure:
    """A row for each picture.

    Args:
        pixels: The pictures.
        maps: What was found in them.
        about: Classes and their colours.
        blocks: How many blocks the network has.
        headline: One line above.

    Returns:
        The figure.
    """
    count, height, width = pixels.shape[:3]
    titles = ["picture", "dense", "tokenexit", "blocks run"]
    if maps.size is not None:
        titles.insert(3, "patches in a token")
    figure = Figure(figsize=(14, 0.9 + 14 / len(titles) * count * height / width), layout="constrained")
    figure.suptitle(headline)
    axes = figure.subplots(count, len(titles), squeeze=False)
    for row, picture, dense, exiting in zip(axes, pixels, maps.dense, maps.exiting, strict=True):
        row[0].imshow(picture)
        row[1].imshow(_coloured(dense, about))
        row[2].imshow(_coloured(exiting, about))
    if maps.size is not None:
        _show_sizes(figure, axes[:, 3].tolist(), maps.size, (height, width))
    _show_depths(figure, axes[:, -1].tolist(), maps.depth, blocks, (height, width))
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    for axis in axes.flat:
        axis.set_axis_off()
    _name_classes(figure, about)
    return figure


def draw_merging(
    picture: UInt8[np.ndarray, "height width 3"], maps: Maps, about: About, blocks: int, headline: str
) -> Figure:
    """One picture at large: its tokens, how they merged and left, and what that changed.

    Args:
        picture: The picture.
        maps: What was found in it, `size` with it.
        about: Classes and their colours.
        blocks: How many blocks the network has.
        headline: One line above.

    Returns:
        The figure.
    """
    assert maps.size is not None
    shape = height, width = picture.shape[:2]
    figure = Figure(figsize=(12, 1.7 + 8 * height / width), layout=ConstrainedLayoutEngine(h_pad=0.1))
    figure.suptitle(headline)
    axes = figure.subplots(2, 3)
    axes[0, 0].imshow(picture)
    _outline(axes[0, 0], maps.size[0], shape)
    _show_sizes(figure, [axes[0, 1]], maps.size, shape, location="bottom")
    _show_depths(figure, [axes[0, 2]], maps.depth, blocks, shape, location="bottom")
    axes[1, 0].imshow(_coloured(maps.dense[0], about))
    axes[1, 1].imshow(_coloured(maps.exiting[0], about))
    differs = maps.dense[0] != maps.exiting[0]
    axes[1, 2].imshow(_marked(picture, differs))
    titles = (
        "each frame is one token", "patches in a token", "blocks run", "dense: class of each pixel",
        "merging, then exits", f"where the two differ: {100 * differs.mean():.1f} % of the pixels",
    )  # fmt: skip
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set_title(title)
        axis.set_axis_off()
    _name_classes(figure, about)
    return figure


def _show_sizes(
    figure: Figure,
    axes: Sequence[Axes],
    sizes: Int[np.ndarray, "images rows columns"],
    shape: tuple[int, int],
    *,
    location: Side = "right",
) -> None:
    found = np.unique(sizes).tolist()
    colours = {size: colormaps["PuRd"](0.1 + 0.2 * _SIZES.index(size)) for size in found}
    _show_kinds(figure, axes, sizes, shape, colours, location)


def _show_depths(
    figure: Figure,
    axes: Sequence[Axes],
    depths: Int[np.ndarray, "images rows columns"],
    blocks: int,
    shape: tuple[int, int],
    *,
    location: Side = "right",
) -> None:
    found = sorted({*np.unique(depths).tolist(), blocks})
    colours = {after: colormaps["viridis"](after / blocks) for after in found}
    _show_kinds(figure, axes, depths, shape, colours, location)


def _show_kinds(
    figure: Figure,
    axes: Sequence[Axes],
    maps: Int[np.ndarray, "images rows columns"],
    shape: tuple[int, int],
    colours: Mapping[int, Colour],
    location: Side,
) -> None:
    """Maps of a few numbers, at the size of the pictures, and a bar that names them."""
    kinds, (height, width) = sorted(colours), shape
    colour = ListedColormap([colours[kind] for kind in kinds])
    norm = BoundaryNorm(np.arange(len(kinds) + 1) - 0.5, len(kinds))
    shown = None
    for axis, values in zip(axes, np.searchsorted(kinds, maps), strict=True):
        shown = axis.imshow(values, cmap=colour, norm=norm, interpolation="nearest", extent=(0, width, height, 0))
    assert shown is not None
    bar = figure.colorbar(shown, ax=axes, location=location, shrink=0.8, drawedges=True)
    bar.set_ticks(range(len(kinds)), labels=[str(kind) for kind in kinds])
    bar.ax.tick_params(length=0)


def _outline(axis: Axes, size: Int[np.ndarray, "rows columns"], shape: tuple[int, int]) -> None:
    """Lines around every token: cells lie where multiples of their side are."""
    (rows, columns), (height, width) = size.shape, shape
    side = np.sqrt(size).astype(int)
    above = np.arange(rows)[:, None] % side == 0
    before = np.arange(columns) % side == 0
    high, wide = height / rows, width / columns
    lines = [((c * wide, r * high), ((c + 1) * wide, r * high)) for r, c in np.argwhere(above)]
    lines += [((c * wide, r * high), (c * wide, (r + 1) * high)) for r, c in np.argwhere(before)]
    axis.add_collection(LineCollection(lines, colors="white", linewidths=0.5), autolim=False)


def _marked(picture: UInt8[np.ndarray, "h w 3"], marks: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "h w 3"]:
    """A pale grey picture, some pixels in a colour."""
    grey = 0.55 + 0.4 * picture.mean(axis=-1, keepdims=True) / 255
    return np.where(marks[..., None], _DIFFERENT, grey)


def _name_classes(figure: Figure, about: About) -> None:
    patches = [
        Patch(color=(r / 255, g / 255, b / 255), label=name)
        for name, (r, g, b) in zip(about.classes, about.palette, strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 11), frameon=False)


def _coloured(classes: Int[np.ndarray, "height width"], about: About) -> Float[np.ndarray, "height width 3"]:
    return np.array(about.palette, dtype=np.float64)[classes] / 255
