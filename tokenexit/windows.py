"""Sliding windows over images that are larger than a model takes: where they lie, and how they share in a pixel.

As the field's frameworks do it: windows a stride apart, the last one shifted back to end at the edge; logits, and not
probabilities, are upsampled to the pixels of a window and averaged over all windows that saw a pixel.

    scores = concat([model(some) for some in crops(images, windows)])        # an adapter runs the model
    blended(scores, windows, size=(height, width), upsample=...)             # and upsamples
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from jaxtyping import Float

from tokenexit._array import Array, add_at, aligned, array_namespace, counting, filled
from tokenexit._plain import is_whole
from tokenexit.errors import require

__all__ = ["Windows", "blended", "crops", "shares"]


@dataclass(frozen=True)
class Windows:
    """How an image is cut into windows.

    Attributes:
        size: Height and width of a window, in pixels: a size that the model takes.
        stride: How far the next window lies below and to the right, in pixels; no farther than windows reach.
        batch: How many windows the model runs at once, whichever images they are of.
        blend: How the windows that saw a pixel share in its scores. `uniform`: all alike, the field's convention.
            `linear`: a window counts for less towards its edges, where it saw least of what is around a pixel; from its
            middle to its edges, down and across, its share falls along a line, and never to nothing.

    Raises:
        TokenExitError: If a window or stride is no pair of whole numbers from 1 up, a stride would leave gaps, or the
            batch or blend is not one.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    batch: int = 8
    blend: Literal["uniform", "linear"] = "uniform"

    def __post_init__(self) -> None:
        for name, pair in (("size", self.size), ("stride", self.stride)):
            fits = isinstance(pair, tuple) and len(pair) == 2 and all(is_whole(side, least=1) for side in pair)
            require(fits, name, "be a height and a width from 1 up, in pixels", repr(pair))
        reach = all(step <= side for step, side in zip(self.stride, self.size, strict=True))
        require(reach, "stride", f"be no larger than the windows, {self.size}", repr(self.stride))
        require(is_whole(self.batch, least=1), "batch", "be a whole number from 1 up", repr(self.batch))
        require(self.blend in _RAMPS, "blend", f"be one of {', '.join(_RAMPS)}", repr(self.blend))

    def corners(self, height: int, width: int, /) -> tuple[tuple[int, int], ...]:
        """Where the windows over an image lie.

        Args:
            height: Height of the image, in pixels.
            width: Width of the image.

        Returns:
            Top and left of every window, row by row. The last of a row or column ends at the edge of the image; where
            a window is larger than the image there is one alone, at 0.
        """
        down, across = map(_starts, (height, width), self.size, self.stride)
        return tuple(product(down, across))

    def padding(self, height: int, width: int, /) -> tuple[int, int]:
        """Pixels that an image lacks below and to the right for one window.

        Args:
            height: Height of the image, in pixels.
            width: Width of the image.

        Returns:
            Rows and columns; 0 where the image is as large as a window.
        """
        below, beside = (max(0, side - own) for side, own in zip(self.size, (height, width), strict=True))
        return below, beside


def crops(
    images: Float[Array, "images ..."], windows: Windows, /, *, axis: int = 2
) -> Iterator[Float[Array, "batch ..."]]:
    """Cut images into windows.

    An image smaller than a window is padded below and to the right with zeros, which is the mean colour of normalised
    images.

    Args:
        images: Images of any one size, in pixels.
        windows: How they are cut.
        axis: The axis of heights; that of widths comes after it. 2 if channels come first, 1 if they come last.

    Yields:
        Batches for the model, of `windows.batch` windows, the last of what is left: all windows of the first image in
        the order of `corners`, then those of the next. If there are no images, one batch of no windows, for its shape.
    """
    height, width = images.shape[axis], images.shape[axis + 1]
    padded = _padded(images, windows.padding(height, width), axis)
    places = [
        (image, *_under(windows, corner, axis - 1))
        for image, corner in product(range(images.shape[0]), windows.corners(height, width))
    ]
    if not places:
        yield padded[_under(windows, (0, 0), axis)]
    for start in range(0, len(places), windows.batch):
        some = [padded[place] for place in places[start : start + windows.batch]]
        yield array_namespace(padded).stack(some)


def shares(windows: Windows, like: Float[Array, "..."], /) -> Float[Array, "height width"]:
    """What a window counts for at each of its pixels.

    Args:
        windows: The windows.
        like: An array of the library, dtype and device of the result.

    Returns:
        Positive numbers, 1 at most.
    """
    down, across = (_RAMPS[windows.blend](side, like) for side in windows.size)
    return array_namespace(like).reshape(down, (-1, 1)) * aligned(across, 2)


def blended(
    scores: Float[Array, "windows ..."],
    windows: Windows,
    /,
    *,
    size: tuple[int, int],
    upsample: Callable[[Array], Array],
    axis: int = 2,
) -> Float[Array, "images ..."]:
    """Join class scores of windows into those of the pixels under them.

    Beside the result there are scores of the pixels of one window at a time; JAX outside of a compiled program copies
    the result for each.

    Args:
        scores: Class scores of the patches of every window, in the order of `crops`.
        windows: The windows.
        size: Height and width of the images, in pixels.
        upsample: From scores of the patches of one window, float32 at least, to those of its pixels; both have an axis
            of length 1 for the window.
        axis: The axis of rows of patches; that of columns comes after it. 2 if classes come first, 1 if they come last.

    Returns:
        For each pixel the mean over the windows that saw it, each with its share; float32, or float64 where the
        scores are.

    Raises:
        TokenExitError: If the scores are not those of all windows of some images.
    """
    xp = array_namespace(scores)
    scores = xp.astype(scores, xp.result_type(scores.dtype, xp.float32), copy=False)
    corners, share = windows.corners(*size), shares(windows, scores)
    whole = scores.shape[0] % len(corners) == 0
    require(whole, "scores", f"be those of {len(corners)} windows for each image, as `crops` cuts them", scores)
    height, width = (side + more for side, more in zip(size, windows.padding(*size), strict=True))
    beyond = [1] * (scores.ndim - axis - 2)
    total = filled((height, width), 0, scores, dtype=scores.dtype)
    for corner in corners:
        total = add_at(total, _under(windows, corner, 0), share)
    images = scores.shape[0] // len(corners)
    shape = (images, *scores.shape[1:axis], height, width, *scores.shape[axis + 2 :])
    joined = filled(shape, 0, scores, dtype=scores.dtype)
    share = aligned(xp.reshape(share, (*share.shape, *beyond)), scores.ndim - 1)
    # One window at a time, for scores of pixels are what needs the memory.
    for at, (image, corner) in enumerate(product(range(images), corners)):
        pixels = upsample(scores[at : at + 1, ...])[0, ...]
        joined = add_at(joined, (image, *_under(windows, corner, axis - 1)), share * pixels)
    joined /= aligned(xp.reshape(total, (height, width, *beyond)), scores.ndim)
    return joined[(*[slice(None)] * axis, slice(size[0]), slice(size[1]), ...)]


def _starts(side: int, window: int, stride: int) -> list[int]:
    last = max(0, side - window)
    return [*range(0, last, stride), last]


def _under(windows: Windows, corner: tuple[int, int], axis: int) -> tuple[Any, ...]:
    """The index of what lies under a window, after so many axes."""
    (top, left), (height, width) = corner, windows.size
    return (*[slice(None)] * axis, slice(top, top + height), slice(left, left + width), ...)


def _padded(images: Array, more: tuple[int, int], axis: int) -> Array:
    for along, count in enumerate(more, start=axis):
        if count > 0:
            shape = (*images.shape[:along], count, *images.shape[along + 1 :])
            zeros = filled(shape, 0, images, dtype=images.dtype)
            images = array_namespace(images).concat([images, zeros], axis=along)
    return images


def _flat(side: int, like: Array) -> Array:
    return filled((side,), 1, like, dtype=like.dtype)


def _tent(side: int, like: Array) -> Array:
    """1 in the middle, falling towards both ends, where half a step is left."""
    xp = array_namespace(like)
    steps = xp.astype(counting(side, like), like.dtype)
    return 1 - xp.abs(2 * steps + 1 - side) / side


_RAMPS: dict[str, Callable[[int, Array], Array]] = {"uniform": _flat, "linear": _tent}
