"""Pictures of what a call has done (`tokenexit.pictures`)."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from tokenexit import pictures
from tokenexit.errors import require
from tokenexit_jax.exits.outputs import Output, upsampled

__all__ = ["show"]


def show(
    image: Shaped[Any, "height width channels"],
    output: Output,
    /,
    file: str | Path | None = None,
    *,
    index: int | None = None,
) -> Any:
    """Draw an image, the blocks that its patches ran through, how they merged, and the classes of its pixels.

    Args:
        image: The image as the model was given it: three channels, or one, last.
        output: What the model returned for the batch.
        file: Where to write the picture; its ending gives the format, as .png or .svg. None: nothing is written.
        index: Which image of the batch it is; it may be left out for a batch of one.

    Returns:
        The `matplotlib.figure.Figure`, for a notebook.

    Raises:
        TokenExitError: If matplotlib is not installed, the image has another shape, or there is no such image.
    """
    require(isinstance(output, Output), "output", "be what a model from `wrap` returns", type(output).__name__)
    images = len(output.exit_depth)
    index = pictures.place_in_batch(index, images=images)
    photo = np.asarray(image)
    fits = photo.ndim == 3 and photo.shape[2] in (1, 3)
    require(fits, "image", "be of shape (height, width, 3), or with one channel", f"shape {photo.shape}")
    logits = output.logits[index : index + 1].astype(np.float32)
    labels = np.asarray(upsampled(logits, photo.shape[:2], output.area)[0].argmax(axis=-1))
    return pictures.draw(
        np.broadcast_to(photo, (*photo.shape[:2], 3)),
        np.asarray(output.exit_depth[index]),
        blocks=output.tokens_per_block.shape[1],
        merged_size=None if output.merged_size is None else np.asarray(output.merged_size[index]),
        labels=labels,
        area=output.area,
        file=file,
    )
