"""A predictor of NumPy alone: what an adapter writes, in little, and what other processes import of it."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from tokenexit import schedule
from tokenexit.area import Area
from tokenexit.errors import require
from tokenexit.guarantees.certificate import Fingerprints
from tokenexit.prediction import Predictor, Segmented
from tokenexit.schedule import Schedule
from tokenexit.windows import blended, crops

PATCH = 2
OWN_SIZE = (8, 12)
PLAN = schedule.truncated(after=2)
built: list[int] = []


@dataclass(frozen=True)
class Shades:
    """A model whose class scores are multiples of the mean colour of a patch's first pixel; it notes what it is shown."""

    classes: int = 3
    schedule: Schedule = PLAN
    seen: list[tuple[int, ...]] = field(default_factory=list)

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Class scores and exit depths of patches, and tokens by block."""
        self.seen.append(images.shape)
        shades = images[:, :, ::PATCH, ::PATCH].mean(axis=1)
        scores = np.stack([shades * (label - 1) - label**2 / 8 for label in range(self.classes)], axis=1)
        depth = np.where(shades > 0, 2, 1)
        return scores, depth, np.stack([(depth >= block).sum(axis=(1, 2)) for block in (1, 2)], axis=1)


def build(classes: int = 3, *, pause: float = 0.0) -> Shades:
    """The model; it is noted that it was built, after a pause in seconds."""
    time.sleep(pause)
    built.append(threading.get_ident())
    return Shades(classes)


def build_after_one_failure() -> Shades:
    built.append(threading.get_ident())
    if len(built) == 1:
        raise OSError("the file is not there yet")
    return Shades()


def build_text() -> str:
    return "a model"


def build_with(_: Any = None, **__: Any) -> None:
    return None


def nearest(scores: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map at another size: of each pixel what lies under its middle."""
    down, across = (
        ((np.arange(side) + 0.5) * cells / side).astype(int) for side, cells in zip(size, scores.shape[2:], strict=True)
    )
    return scores[:, :, down][:, :, :, across]


@dataclass(frozen=True, eq=False, kw_only=True)
class Toy(Predictor[Shades]):
    """Arrays are its weights."""

    weights: ClassVar[Mapping[type, str]] = {np.ndarray: "an array"}

    precision: str = "float32"

    def placed(self, built: Any, /) -> Shades:
        require(isinstance(built, Shades), "build", "return Shades", type(built).__name__)
        return built

    def fingerprints(self, model: Shades, /, *, resolution: tuple[int, int], preprocessing: str) -> Fingerprints:
        return Fingerprints({"shades": f"{model.classes:064x}"}, self.precision, resolution, preprocessing, "numpy")

    def image_shape(self, model: Shades, /) -> tuple[int, int, int]:
        return (3, *OWN_SIZE)

    def segment(self, model: Shades, pictures: np.ndarray, /) -> Segmented:
        images = self.prepared(pictures)
        if self.windows is None:
            return Segmented(*model(images), None)
        parts = [model(some) for some in crops(images, self.windows)]
        scores, depth, tokens = (np.concatenate(part) for part in zip(*parts, strict=True))
        size = self.windows.size
        joined = blended(scores, self.windows, size=images.shape[2:], upsample=lambda some: nearest(some, size))
        by_image = (len(images), len(depth) // len(images))
        depth, tokens = (values.reshape(by_image + values.shape[1:]) for values in (depth, tokens))
        return Segmented(joined, depth, tokens.sum(axis=1), None)

    def upsample(self, scores: np.ndarray, size: tuple[int, int], area: Area | None, /) -> np.ndarray:
        assert area is None
        assert (scores.dtype, len(scores)) == (np.float32, 1)
        return nearest(scores, size)

    def prepared(self, pictures: np.ndarray) -> np.ndarray:
        if pictures.dtype != np.uint8:
            return pictures
        images = ((pictures / 255 - self.mean) / self.std).transpose(0, 3, 1, 2).astype(np.float32)
        return images if self.size is None else nearest(images, self.size)
