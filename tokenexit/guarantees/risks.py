"""What an exit costs, image by image: losses in [0, 1] over label maps.

The image is the unit of sampling, never the pixel: the pixels of an image depend on each other, and a test that takes
them for so many observations promises what it cannot hold. So every function returns one number for each image (and
class), to be put side by side, setting by setting, and given to `calibration.certify`.

An image about which nothing is known has no loss: where no pixel counts, or a label is none of the classes, it is NaN,
which `calibration.certify` refuses. Leave such images out.
"""

import math
from collections.abc import Iterable, Sequence

from jaxtyping import Bool, Float, Integer

from tokenexit._array import Array, array_namespace, counting, like_numbers
from tokenexit._plain import is_whole
from tokenexit.errors import require

__all__ = ["disagreement", "error_increase", "iou_loss"]

_KINDS = {"bool": "true and false", "integral": "whole numbers"}


def disagreement(
    exiting: Integer[Array, "images *place"],
    dense: Integer[Array, "images *place"],
    /,
    *,
    valid: Bool[Array, "images *place"] | None = None,
) -> Float[Array, "images"]:
    """Share of an image's pixels that get another class than in the dense run. It needs no labels.

    Args:
        exiting: Predicted class of every pixel, or patch, with exits.
        dense: The same without exits.
        valid: Which pixels count; all, if left out.

    Returns:
        For each image, from 0 to 1, as float32; NaN for an image of which no pixel counts.

    Raises:
        TokenExitError: If the maps are not of one shape, or not of whole numbers.
    """
    xp = array_namespace(exiting)
    valid = xp.ones_like(exiting, dtype=xp.bool) if valid is None else valid
    exiting, dense, counts = _rows(exiting=exiting, dense=dense, valid=valid)
    return _share((exiting != dense) & counts, counts)


def error_increase(
    exiting: Integer[Array, "images *place"],
    dense: Integer[Array, "images *place"],
    truth: Integer[Array, "images *place"],
    /,
    *,
    classes: int,
    ignore: int | None = None,
) -> Float[Array, "images"]:
    """By how much more of an image's pixels are wrong with exits than without, by labels; 0 if no more are.

    What one image gains does not make up for what another loses, so that a bound on the mean of this is one on the
    difference of the two error rates as well.

    Args:
        exiting: Predicted class of every pixel with exits.
        dense: The same without exits.
        truth: The labels.
        classes: How many classes there are. A label that is none of them would be wrong in both runs, and hide a loss.
        ignore: Label of pixels that do not count.

    Returns:
        For each image, from 0 to 1, as float32; NaN for an image of which no pixel counts, or with a label that is
        neither one of the classes nor `ignore`.

    Raises:
        TokenExitError: If the maps are not of one shape, or not of whole numbers, or `classes` is no whole number from
            1 up.
    """
    require(is_whole(classes, least=1), "classes", "be a whole number from 1 up", repr(classes))
    exiting, dense, truth = _rows(exiting=exiting, dense=dense, truth=truth)
    xp = array_namespace(exiting)
    counts = xp.ones_like(truth, dtype=xp.bool) if ignore is None else truth != ignore
    strange = xp.any(counts & ((truth < 0) | (truth >= classes)), axis=1)
    more = _share((exiting != truth) & counts, counts) - _share((dense != truth) & counts, counts)
    return xp.where(strange, xp.nan, xp.where(more < 0, 0.0, more))  # NaN is not less than 0


def iou_loss(
    exiting: Integer[Array, "images *place"],
    reference: Integer[Array, "images *place"],
    /,
    *,
    classes: int | Sequence[int],
    at_least: float,
    valid: Bool[Array, "images *place"] | None = None,
) -> Float[Array, "images classes"]:
    """A loss for each class whose mean is at most `1 - at_least` exactly if the class's IoU is `at_least` or more.

    IoU is a ratio of sums over all images, E[I] / E[U] (intersection and union, as shares of the image's pixels), and
    no mean over images. But it is `at_least` or more exactly if `E[at_least * U - I] <= 0`, which is a mean; it is
    shifted by `1 - at_least` into [0, 1]. This is conservative, and the rarer the class the more so: where a class
    covers little of the images, all losses lie close to `1 - at_least`, and many images are needed.

    Certify with `at_most=1 - at_least`; every class must pass. A class that no image has can never pass: leave such
    columns out, and decide that before you look at the calibration images.

    Args:
        exiting: Predicted class of every pixel with exits.
        reference: The classes to compare with: those of the dense run, or labels.
        classes: How many classes there are; or which of them have a loss, in this order.
        at_least: IoU to reach, between 0 and 1.
        valid: Which pixels count; all, if left out. Those with a void label do not.

    Returns:
        For each image and class, from 0 to 1, as float32; NaN for an image of which no pixel counts.

    Raises:
        TokenExitError: If the maps are not of one shape, `at_least` is not between 0 and 1, or `classes` are none, not
            whole numbers, or some of them twice.
    """
    require(0 < at_least < 1, "at_least", "lie between 0 and 1", at_least)
    xp = array_namespace(exiting)
    valid = xp.ones_like(exiting, dtype=xp.bool) if valid is None else valid
    exiting, reference, counts = _rows(exiting=exiting, reference=reference, valid=valid)
    if isinstance(classes, Iterable):
        which = tuple(classes)
        once = all(is_whole(one) for one in which) and len(which) == len(set(which)) > 0
        require(once, "classes", "be how many there are, or some of them, each once", which)
        label = xp.astype(like_numbers(which, exiting), exiting.dtype)
    else:
        label = counting(classes, exiting)
    label = label[None, :, None]
    one, other = exiting[:, None, :] == label, reference[:, None, :] == label
    counts = counts[:, None, :]
    loss = at_least * _share((one | other) & counts, counts) - _share(one & other & counts, counts) + (1 - at_least)
    return xp.clip(loss, 0.0, 1.0)  # rounding alone leads beyond


def _rows(**maps: Array) -> list[Array]:
    """Maps of one shape, each as one row of pixels for each image."""
    first = tuple(next(iter(maps.values())).shape)
    for name, map in maps.items():
        fits = map.ndim >= 1 and tuple(map.shape) == first
        require(fits, name, "be of one shape with `exiting`", f"shape {tuple(map.shape)}")
        xp = array_namespace(map)
        kind = "bool" if name == "valid" else "integral"
        require(xp.isdtype(map.dtype, kind), name, f"be of {_KINDS[kind]}", f"dtype {map.dtype}")
    return [_row(map, (first[0], math.prod(first[1:]))) for map in maps.values()]


def _row(map: Array, shape: tuple[int, int]) -> Array:
    """One row for each image; of a type that holds every number that labels are compared with."""
    xp = array_namespace(map)
    narrow = xp.isdtype(map.dtype, "integral") and xp.iinfo(map.dtype).bits < 32
    return xp.reshape(xp.astype(map, xp.int32) if narrow else map, shape)


def _share(marked: Array, counts: Array, /) -> Array:
    """Marked pixels as a share of those that count, on the last axis; NaN if none counts."""
    xp = array_namespace(marked)
    found = xp.astype(xp.sum(xp.astype(marked, xp.int32), axis=-1), xp.float32)
    of = xp.astype(xp.sum(xp.astype(counts, xp.int32), axis=-1), xp.float32)
    return found / xp.where(of > 0, of, xp.nan)
