"""Street scenes drawn from scratch: never the same twice, labelled to the pixel, a few milliseconds each."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8

from examples.scenes.canvas import CAR, CLASSES, PERSON, Canvas
from examples.scenes.shade import shade
from examples.scenes.street import any_camera, any_layout, any_light, paint

PALETTE = (
    (130, 180, 220),
    (110, 100, 120),
    (170, 125, 95),
    (90, 145, 60),
    (40, 60, 190),
    (220, 40, 70),
    (240, 200, 50),
)

__all__ = ["CLASSES", "PALETTE", "Scene", "draw"]


@dataclass(frozen=True)
class Scene:
    """One street scene.

    Attributes:
        image: RGB.
        label: The class of each pixel, an index into `CLASSES`; "road" is all paved ground, pavements included.
        boxes: Cars and people, one row each: class, x0, y0, x1, y1 of what can be seen of it, in pixels; x1 and y1
            are one past the last column and row.
    """

    image: UInt8[np.ndarray, "height width 3"]
    label: UInt8[np.ndarray, "height width"]
    boxes: Int[np.ndarray, "things 5"]


def draw(generator: np.random.Generator, *, size: tuple[int, int] = (256, 384)) -> Scene:
    """Draws a scene; the same generator state gives the same scene.

    Args:
        generator: Where all randomness comes from.
        size: Height and width in pixels, each at least 32.

    Raises:
        ValueError: If `size` is too small to hold a street.
    """
    if min(size) < 32:
        raise ValueError(f"`size` must be at least 32 in both directions, got {size}")
    canvas = Canvas(any_camera(generator, size), any_light(generator))
    layout = any_layout(generator)
    paint(canvas, layout, generator)
    return Scene(shade(canvas, layout, generator), _label(canvas), _boxes(canvas))


def _label(canvas: Canvas) -> UInt8[np.ndarray, "height width"]:
    return np.take(canvas.table()[:, 0].astype(np.uint8), canvas.seen())


def _boxes(canvas: Canvas) -> Int[np.ndarray, "things 5"]:
    """The visible extent of every car and person of which at least one pixel is seen, in the order of painting."""
    table, seen = canvas.table(), canvas.seen()
    of_surface = table[:, 6].astype(np.int16)
    thing = np.take(of_surface, seen)
    rows, columns = np.nonzero(thing)
    which = thing[rows, columns]
    low = np.full((canvas.things + 1, 2), max(seen.shape))
    high = np.zeros((canvas.things + 1, 2), np.int64)
    for axis, place in enumerate((columns, rows)):
        np.minimum.at(low[:, axis], which, place)
        np.maximum.at(high[:, axis], which, place + 1)
    kind = np.zeros(canvas.things + 1, np.int64)
    kind[of_surface] = table[:, 0]
    boxes = np.concatenate((kind[:, None], low, high), axis=1)
    return boxes[np.isin(kind, (CAR, PERSON)) & (high[:, 0] > 0)]
