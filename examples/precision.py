"""Average precision of detections over a whole data set, as COCO has it, by pycocotools."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from examples import shell


class Found(Protocol):
    """Objects of one image."""

    @property
    def corners(self) -> Float[Tensor, "objects 4"]:
        """x0, y0, x1, y1 in pixels."""
        ...

    @property
    def kind(self) -> Int[Tensor, "objects"]:
        """Their classes."""
        ...

    @property
    def score(self) -> Float[Tensor, "objects"]:
        """How sure they are; of no account for what is true."""
        ...


class Precision(NamedTuple):
    """Average precision, as fractions; NaN where there is no object.

    Attributes:
        ap: Mean over classes and over overlaps of 0.50, 0.55, ..., 0.95.
        ap50: Mean over classes at an overlap of 0.50.
        ap50_of_class: At that overlap, each class.
    """

    ap: float
    ap50: float
    ap50_of_class: tuple[float, ...]


def require_coco() -> None:
    """Nothing, if there is pycocotools.

    Raises:
        UsageError: If it is not installed.
    """
    try:
        import pycocotools  # noqa: F401
    except ImportError as error:
        raise shell.UsageError("average precision needs pycocotools: `pip install --group detection`") from error


def average_precision(
    found: Sequence[Found], truth: Sequence[Found], *, classes: int, smallest: float = 0.0
) -> Precision:
    """Average precision of what was found in each image, at most 100 objects of an image counted.

    Args:
        found: Detections, image by image.
        truth: What is there.
        classes: How many classes there are.
        smallest: Boxes of a smaller area, in pixels, count neither as found nor as missed.

    Raises:
        UsageError: If pycocotools is not installed.
        ValueError: If the two are not of as many images.
    """
    if len(found) != len(truth):
        raise ValueError(f"`found` must be of as many images as `truth`, {len(truth)}, got {len(found)}")
    require_coco()
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints each step
        evaluation = COCOeval(_as_coco(truth, classes), _as_coco(found, classes), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[smallest, float("inf")]], ["all"]
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        evaluation.accumulate()
    # Overlaps, recalls, classes, areas, numbers of detections; -1 where a class has no object.
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, 0]
    by_class = np.where(precision < 0, np.nan, precision).mean(axis=1)
    return Precision(_mean(by_class), _mean(by_class[0]), tuple(map(float, by_class[0])))


def _mean(values: Float[np.ndarray, "..."]) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")


def _as_coco(images: Sequence[Found], classes: int) -> Any:
    from pycocotools.coco import COCO

    corners = [one.corners.double().numpy() for one in images]
    objects = [
        {
            "image_id": image,
            "category_id": int(kind),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0),
            "score": float(score),
            "iscrowd": 0,
        }
        for image, (of, one) in enumerate(zip(corners, images, strict=True))
        for (x0, y0, x1, y1), kind, score in zip(of.tolist(), one.kind, one.score, strict=True)
    ]
    coco: Any = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(len(images))],
        "categories": [{"id": kind} for kind in range(classes)],
        # From 1 up: the library takes the number 0 for none.
        "annotations": [{"id": number, **one} for number, one in enumerate(objects, start=1)],
    }
    coco.createIndex()
    return coco
