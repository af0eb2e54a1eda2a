"""Sliding windows over images that are larger than a model takes: exits in every window, scores joined by pixel.

As the field's frameworks do it: windows a stride apart, the last one shifted back to end at the edge; logits, and not
probabilities, are upsampled to the pixels of a window and averaged over all windows that saw a pixel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from tokenexit import TokenExitError
from tokenexit.adapting import is_whole
from tokenexit.errors import require
from tokenexit.schedule import Schedule
from tokenexit_torch.exits.outputs import Output, upsampled

__all__ = ["WindowedOutput", "Windows", "sliding"]


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


class WindowedOutput(NamedTuple):
    """What `sliding` returns.

    Attributes:
        logits: Class scores of every pixel, float32, or float64 where the model's are.
        corners: Top and left of the windows, in pixels: the same ones over every image.
        windows: What the model returned for every window: all windows of the first image in the order of `corners`,
            then those of the next. `model.multiply_adds` takes it.
    """

    logits: Float[Tensor, "images classes height width"]
    corners: tuple[tuple[int, int], ...]
    windows: Output


def sliding(
    model: Callable[..., Output],
    images: Float[Tensor, "images channels height width"],
    windows: Windows,
    /,
    *,
    schedule: Schedule | None = None,
) -> WindowedOutput:
    """Segment images window by window.

    Windows of all images run together, `windows.batch` at a time. What is kept is the scores of their patches; those of
    pixels are added up window by window, in float32. An image smaller than a window is padded below and to the right
    with zeros, which is the mean colour of normalised images, and its scores are cut back. Call it under
    `torch.inference_mode()` unless you want gradients.

    Args:
        model: A model from `wrap`.
        images: Normalised images, of any one size.
        windows: How they are cut.
        schedule: A plan for this call only; the model's own if left out.

    Returns:
        Class scores of the pixels, and the output for each window.

    Raises:
        TokenExitError: If the images are no batch of images, or the model does not take the windows.
    """
    require(isinstance(windows, Windows), "windows", "be a Windows", repr(windows))
    pixels = isinstance(images, Tensor) and images.ndim == 4 and min(images.shape[1:]) > 0
    got = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
    require(pixels, "images", "be a tensor of shape (images, channels, height, width) with pixels", got)
    height, width = images.shape[2:]
    corners = windows.corners(height, width)
    below, beside = (max(0, side - own) for side, own in zip(windows.size, (height, width), strict=True))
    padded = functional.pad(images, (0, beside, 0, below))
    output = _run_model(model, padded, corners, windows, schedule)
    logits = _blended(output, corners, windows, padded)
    return WindowedOutput(logits[..., :height, :width], corners, output)


def _starts(side: int, window: int, stride: int) -> list[int]:
    last = max(0, side - window)
    return [*range(0, last, stride), last]


def _run_model(
    model: Callable[..., Output],
    images: Tensor,
    corners: Sequence[tuple[int, int]],
    windows: Windows,
    schedule: Schedule | None,
) -> Output:
    """Run the model on all windows; once on an empty batch if there are no images, to get shapes."""
    places = [(image, top, left) for image in range(len(images)) for top, left in corners]
    parts = []
    for start in range(0, max(1, len(places)), windows.batch):
        crops = [
            _under(images[image], top, left, windows) for image, top, left in places[start : start + windows.batch]
        ]
        shown = torch.stack(crops) if crops else _under(images, 0, 0, windows)
        parts.append(_call_model(model, shown, schedule))
    return _joined(parts)


def _call_model(model: Callable[..., Output], crops: Tensor, schedule: Schedule | None) -> Output:
    try:
        output = model(crops, schedule=schedule)
    except TokenExitError as error:
        error.add_note(f"The images were windows of {crops.shape[2]} x {crops.shape[3]} pixels.")
        raise
    require(isinstance(output, Output), "model", "return an Output, as one from `wrap` does", type(output).__name__)
    return output


def _joined(parts: Sequence[Output]) -> Output:
    names = ["logits", "exit_depth", "tokens_per_block"]
    names += [name for name in ("capacity_per_block", "overflow") if getattr(parts[0], name) is not None]
    together = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    exits = tuple(sorted({after for part in parts for after in part.exits}))
    return parts[0]._replace(**together, exits=exits)


def _blended(output: Output, corners: Sequence[tuple[int, int]], windows: Windows, images: Tensor) -> Tensor:
    """Scores of windows as scores of the pixels under them."""
    logits = output.logits
    count, _, height, width = images.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    total = logits.new_zeros((count, logits.shape[1], height, width), dtype=dtype)
    down, across = (_RAMPS[windows.blend](side, total) for side in windows.size)
    share = down[:, None] * across
    shares = total.new_zeros(height, width)
    for top, left in corners:
        _under(shares, top, left, windows).add_(share)
    # One window at a time, for scores of pixels are what needs the memory.
    for (image, (top, left)), patches in zip(product(range(count), corners), logits.to(total), strict=True):
        seen = upsampled(patches[None], windows.size, output.area)
        _under(total[image], top, left, windows).add_(share * seen[0])
    return total.div_(shares)


def _under(pixels: Tensor, top: int, left: int, windows: Windows) -> Tensor:
    """The part of an image that lies under a window."""
    height, width = windows.size
    return pixels[..., top : top + height, left : left + width]


def _flat(side: int, like: Tensor) -> Tensor:
    return like.new_ones(side)


def _tent(side: int, like: Tensor) -> Tensor:
    """1 in the middle, falling towards both ends, where half a step is left."""
    steps = torch.arange(side, device=like.device, dtype=like.dtype)
    return 1 - (2 * steps + 1 - side).abs() / side


_RAMPS: dict[str, Callable[[int, Tensor], Tensor]] = {"uniform": _flat, "linear": _tent}
