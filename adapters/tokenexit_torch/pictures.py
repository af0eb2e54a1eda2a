"""Pictures of what a call has done (`tokenexit.pictures`)."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from tokenexit import pictures
from tokenexit.errors import require
from tokenexit_torch.exits.outputs import DecodedOutput, Output, upsampled

__all__ = ["show"]


@torch.no_grad()
def show(
    image: Shaped[Tensor, "channels height width"],
    output: Output | DecodedOutput,
    /,
    file: str | Path | None = None,
    *,
    index: int | None = None,
) -> Any:
    """Draw an image, the blocks that its patches ran through, how they merged, and what came out.

    What came out are the classes of pixels; or, under a decoder, a tensor of shape `(images, classes, height, width)`
    as classes, and one of shape `(images, height, width)` or of one channel as numbers. Other outputs are left out.

    Args:
        image: The image as the model was given it: three channels, or one.
        output: What the model returned for the batch.
        file: Where to write the picture; its ending gives the format, as .png or .svg. None: nothing is written.
        index: Which image of the batch it is; it may be left out for a batch of one.

    Returns:
        The `matplotlib.figure.Figure`, for a notebook.

    Raises:
        TokenExitError: If matplotlib is not installed, the image has another shape, or there is no such image.
    """
    known = isinstance(output, Output | DecodedOutput)
    require(known, "output", "be what a model from `wrap` or `wrap_decoder` returns", type(output).__name__)
    images = len(output.exit_depth)
    index = pictures.place_in_batch(index, images=images)
    fits = image.ndim == 3 and image.shape[0] in (1, 3)
    require(fits, "image", "be of shape (3, height, width), or with one channel", f"shape {tuple(image.shape)}")
    photo = image.expand(3, *image.shape[1:]).permute(1, 2, 0)
    labels = values = None
    one = slice(index, index + 1)
    if isinstance(output, Output):
        labels = upsampled(output.logits[one].float(), (image.shape[1], image.shape[2]), output.area)[0].argmax(dim=0)
    elif isinstance(output.decoded, Tensor) and len(output.decoded) == images:
        map = output.decoded[index]
        if map.ndim == 3 and map.shape[0] > 1:
            labels = map.argmax(dim=0)
        elif map.ndim == 2 or (map.ndim == 3 and map.shape[0] == 1):
            values = map.reshape(map.shape[-2:]).float()
    size = None if output.merged_size is None else output.merged_size[index].cpu().numpy()
    return pictures.draw(
        photo.cpu().numpy() if photo.dtype == torch.uint8 else photo.float().cpu().numpy(),
        output.exit_depth[index].cpu().numpy(),
        blocks=output.tokens_per_block.shape[1],
        merged_size=size,
        labels=None if labels is None else labels.cpu().numpy(),
        values=None if values is None else values.cpu().numpy(),
        area=output.area,
        file=file,
    )
