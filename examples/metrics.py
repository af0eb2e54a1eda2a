"""Segmentation metrics of a whole data set, from one confusion matrix."""

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor


def confusion_matrix(
    predicted: Int[Tensor, "*shape"], label: Int[Tensor, "*shape"], *, classes: int, ignore: int | None = None
) -> Int64[Tensor, "classes classes"]:
    """Count pixels by label (row) and prediction (column); matrices of batches add up to that of the data set.

    Args:
        predicted: Class of each pixel, 0 to classes - 1.
        label: True class of each pixel, or `ignore`.
        classes: Number of classes.
        ignore: Label of the pixels that do not count.

    Raises:
        ValueError: If the shapes differ, or a counted value is no class.
    """
    if predicted.shape != label.shape:
        raise ValueError(f"`predicted` and `label` must have one shape, got {predicted.shape} and {label.shape}")
    counted = torch.ones_like(label, dtype=torch.bool) if ignore is None else label != ignore
    rows, columns = label[counted].long(), predicted[counted].long()
    for name, values in (("label", rows), ("predicted", columns)):
        if values.numel() and (values.min() < 0 or values.max() >= classes):
            raise ValueError(f"`{name}` must be in [0, {classes}), got {int(values.min())} to {int(values.max())}")
    return torch.bincount(rows * classes + columns, minlength=classes**2).reshape(classes, classes)


def iou_per_class(confusion: Int[Tensor, "classes classes"]) -> Float[Tensor, " classes"]:
    """Intersection over union of each class, as a fraction; NaN for a class neither present nor predicted."""
    hit = confusion.diagonal().double()
    return hit / (confusion.sum(0) + confusion.sum(1) - hit)


def mean_iou(confusion: Int[Tensor, "classes classes"]) -> float:
    """Mean over the classes that are present or predicted, as a fraction; NaN where there are none."""
    return iou_per_class(confusion).nanmean().item()
