"""Sliding windows over images that are larger than a model takes: exits in every window, scores joined by pixel.

Where windows lie and how they share in a pixel is in `tokenexit.windows`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tokenexit import TokenExitError
from tokenexit.errors import require
from tokenexit.schedule import Schedule
from tokenexit.windows import Windows, blended, crops
from tokenexit_torch.exits.outputs import Output, upsampled

__all__ = ["WindowedOutput", "sliding"]


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
    output = _joined([_call_model(model, some, schedule) for some in crops(images, windows)])
    size = (images.shape[2], images.shape[3])

    def upsample(scores: Tensor) -> Tensor:
        return upsampled(scores, windows.size, output.area)

    logits = blended(output.logits, windows, size=size, upsample=upsample)
    return WindowedOutput(logits, windows.corners(*size), output)


def _call_model(model: Callable[..., Output], images: Tensor, schedule: Schedule | None) -> Output:
    try:
        output = model(images, schedule=schedule)
    except TokenExitError as error:
        error.add_note(f"The images were windows of {images.shape[2]} x {images.shape[3]} pixels.")
        raise
    require(isinstance(output, Output), "model", "return an Output, as one from `wrap` does", type(output).__name__)
    return output


def _joined(parts: Sequence[Output]) -> Output:
    names = ["logits", "exit_depth", "tokens_per_block"]
    some = ("capacity_per_block", "overflow", "merged_size")
    names += [name for name in some if getattr(parts[0], name) is not None]
    together = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    exits = tuple(sorted({after for part in parts for after in part.exits}))
    return parts[0]._replace(**together, exits=exits)
