"""Batches of images as they come: a tensor, batches, or pairs of images and labels."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenexit.errors import require

__all__ = ["Batch", "in_batches", "parted", "require_plain"]

Batch = Tensor | Sequence[Tensor]
"""Images, or a pair of images and labels."""


def in_batches(images: Any) -> Iterable[Any]:
    """Images as batches: those that there are, or the parts of one tensor."""
    if isinstance(images, Tensor):
        return require_plain(images).split(8)
    iterable = isinstance(images, Iterable)
    require(iterable, "images", "be a tensor of images, or batches of them", type(images).__name__)
    return images


def require_plain(images: Tensor) -> Tensor:
    """Images, after a check that they hold numbers, one for each pixel and channel."""
    plain = images.layout == torch.strided and not images.is_meta
    require(plain, "images", "be dense tensors with numbers in them", f"{images.layout} on {images.device}")
    require(images.ndim == 4, "images", "be of shape (images, channels, height, width)", images)
    return images


def parted(batch: Batch, /) -> tuple[Tensor, Tensor | None]:
    """Images and labels of a batch."""
    if isinstance(batch, Tensor):
        return require_plain(batch), None
    pair = isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
    require(pair, "images", "come in batches that are a tensor, or a pair of images and labels", type(batch).__name__)
    images, label = batch
    whole = not (label.is_floating_point() or label.dtype == torch.bool)
    fits = whole and label.ndim == 3 and len(label) == len(images)
    rule = f"come with labels that are whole numbers of shape ({len(images)}, height, width)"
    require(fits, "images", rule, f"{label.dtype} of shape {tuple(label.shape)}")
    return require_plain(images), label.long()
