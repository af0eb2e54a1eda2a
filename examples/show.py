"""Draws what a segmentation with exits did: picture, dense result, result with exits, and where the tokens left."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib import colormaps
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from examples.about import About


@dataclass(frozen=True)
class Maps:
    """What there is to show of each picture.

    Attributes:
        dense: Class of each pixel, all tokens run through all blocks.
        exiting: Class of each pixel, with exits.
        depth: Blocks that each patch ran through.
    """

    dense: Int[np.ndarray, "images height width"]
    exiting: Int[np.ndarray, "images height width"]
    depth: Int[np.ndarray, "images grid_height grid_width"]


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
    figure = Figure(figsize=(14, 0.9 + 3.5 * count * height / width), layout="constrained")
    figure.suptitle(headline)
    axes = figure.subplots(count, 4, squeeze=False)
    depths = sorted({*np.unique(maps.depth).tolist(), blocks})
    colours = ListedColormap([colormaps["viridis"](after / blocks) for after in depths])
    norm = BoundaryNorm([after - 0.5 for after in (*depths, blocks + 1)], len(depths))
    shown = None
    for row, picture, dense, exiting, depth in zip(axes, pixels, maps.dense, maps.exiting, maps.depth, strict=True):
        row[0].imshow(picture)
        row[1].imshow(_coloured(dense, about))
        row[2].imshow(_coloured(exiting, about))
        shown = row[3].imshow(depth, cmap=colours, norm=norm, interpolation="nearest",
                              extent=(0, width, height, 0))  # fmt: skip
    for axis, title in zip(axes[0], ("picture", "dense", "with exits", "blocks run"), strict=True):
        axis.set_title(title)
    for axis in axes.flat:
        axis.set_axis_off()
    assert shown is not None
    middles = [(first + after - 1) / 2 for first, after in zip(depths, [*depths[1:], blocks + 1], strict=True)]
    bar = figure.colorbar(shown, ax=axes[:, 3].tolist(), shrink=0.8, ticks=middles)
    bar.ax.set_yticklabels([str(after) for after in depths])
    patches = [
        Patch(color=(r / 255, g / 255, b / 255), label=name)
        for name, (r, g, b) in zip(about.classes, about.palette, strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 11), frameon=False)
    return figure


def _coloured(classes: Int[np.ndarray, "height width"], about: About) -> Float[np.ndarray, "height width 3"]:
    return np.array(about.palette, dtype=np.float64)[classes] / 255
