"""Pictures of what a call has done: blocks that patches ran through, over the photo, and what came out of it."""

from pathlib import Path
from typing import Any

from jaxtyping import Float, Int, Real

from tokenexit._array import Array
from tokenexit._plain import is_whole
from tokenexit.area import Area
from tokenexit.errors import TokenExitError, require

__all__ = ["draw", "place_in_batch"]

_SHADE = 0.55
_MOST_CLASSES = 20  # of the colours that are told apart


def draw(
    photo: Real[Array, "height width 3"],
    exit_depth: Int[Array, "grid_height grid_width"],
    /,
    *,
    blocks: int,
    merged_size: Int[Array, "grid_height grid_width"] | None = None,
    labels: Int[Array, "_ _"] | None = None,
    values: Float[Array, "_ _"] | None = None,
    area: Area | None = None,
    file: str | Path | None = None,
) -> Any:
    """Draw the photo, the blocks that its patches ran through, how they merged, and a map that came out of it.

    Args:
        photo: The image: bytes, or numbers, which are spread from the least to the greatest if any is not in [0, 1].
        exit_depth: After how many blocks every patch left.
        blocks: Blocks of the network.
        merged_size: How many patches ran on as one with every patch; no such map if left out.
        labels: Class of each pixel, of the same area and any size; no such map if left out.
        values: A map of numbers, as of depth, likewise.
        area: The area of the image that the grid covers; None if it is the whole of it.
        file: Where to write it; its ending gives the format, as .png or .svg. None: nothing is written.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        TokenExitError: If matplotlib is not installed, or `photo` has another shape, or sides that the grid does not
            divide.
    """
    try:
        import numpy as np
        from matplotlib import colormaps
        from matplotlib.colors import BoundaryNorm, ListedColormap
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TokenExitError(f"`file` must have matplotlib, `pip install tokenexit[viz]`, got {error}") from error
    shown = np.asarray(photo)
    fits = shown.ndim == 3 and shown.shape[2] == 3 and shown.size > 0
    require(fits, "photo", "be of shape (height, width, 3)", f"shape {tuple(shown.shape)}")
    rows, columns = exit_depth.shape
    whole = area is not None or (shown.shape[0] % rows == 0 and shown.shape[1] % columns == 0)
    rule = f"be the image that was run, of {rows} x {columns} patches"
    require(whole, "photo", rule, f"{shown.shape[0]} x {shown.shape[1]} pixels")
    if shown.dtype != np.uint8:
        shown = shown.astype(np.float32)
        low, high = float(np.nanmin(shown)), float(np.nanmax(shown))
        shown = shown if low >= 0 and high <= 1 else (shown - low) / max(high - low, 1e-12)
    height, width = shown.shape[:2]
    reach = (height, width)
    if area is not None:
        reach = tuple(side * own / whole for side, own, whole in zip(reach, area.covered, area.image, strict=True))
    grey = np.repeat(
        shown.astype(np.float32).mean(axis=2, keepdims=True) / (255 if shown.dtype == np.uint8 else 1), 3, 2
    )
    panels = 2 + sum(one is not None for one in (merged_size, labels, values))
    figure = Figure(figsize=(0.4 + 3.4 * panels, 1.3 + 3.4 * height / width), layout="constrained")
    axes, bars = figure.subplots(2, panels, squeeze=False, height_ratios=(24 * height / width, 1))
    for axis in (*axes, *bars):  # pictures at one height, with the legends below
        axis.set_axis_off()
    axes[0].imshow(shown)
    axes[0].set_title("image")

    def stepped(at: int, counts: Any, kinds: list[int], colours: Any, title: str) -> None:
        """A map of whole numbers over the photo, and what its colours are."""
        axis, bar = axes[at], bars[at]
        axis.imshow(grey, extent=(0, width, height, 0))
        norm = BoundaryNorm(np.arange(len(kinds) + 1) - 0.5, len(kinds))
        extent = (0, reach[1], reach[0], 0)
        map = ListedColormap([colours(place) for place in range(len(kinds))])
        found = np.searchsorted(kinds, counts)
        drawn = axis.imshow(found, cmap=map, norm=norm, alpha=_SHADE, interpolation="nearest", extent=extent)
        axis.set_xlim(0, width)
        axis.set_ylim(height, 0)
        bar.set_axis_on()
        figure.colorbar(drawn, cax=bar, orientation="horizontal").set_ticks(
            range(len(kinds)), labels=[str(kind) for kind in kinds]
        )
        axis.set_title(title)

    depth, viridis = np.asarray(exit_depth), colormaps["viridis"]
    kinds = sorted({*np.unique(depth).tolist(), blocks})
    stepped(1, depth, kinds, lambda place: viridis(kinds[place] / blocks), "blocks that patches ran through")
    at = 2
    if merged_size is not None:
        size, reds = np.asarray(merged_size), colormaps["PuRd"]
        sizes = np.unique(size).tolist()
        stepped(at, size, sizes, lambda place: reds(0.15 + 0.8 * place / max(len(sizes), 2)), "patches in a token")
        at += 1
    if labels is not None:
        classes = np.asarray(labels)
        axes[at].imshow(classes % _MOST_CLASSES, cmap="tab20", vmin=0, vmax=_MOST_CLASSES - 1, interpolation="nearest")
        axes[at].set_title("classes")
        at += 1
    if values is not None:
        axes[at].imshow(np.asarray(values), cmap="magma")
        axes[at].set_title("output")
    if file is not None:
        figure.savefig(file)
    return figure


def place_in_batch(index: int | None, /, *, images: int) -> int:
    """Place of an image in its batch; the first of a batch of one if it is not named.

    Args:
        index: The place; None if it was not named.
        images: Number of images of the batch.

    Returns:
        The place, from 0 up.

    Raises:
        TokenExitError: If there is no such image, or none is named of several.
    """
    place: Any = 0 if index is None and images == 1 else index
    fits = is_whole(place, least=0) and place < images
    require(fits, "index", f"be from 0 to {images - 1}, the place of the image in the batch", repr(index))
    return place
