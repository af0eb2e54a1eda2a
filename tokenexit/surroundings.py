"""What is around a token: the mean of its neighbourhood, which exit heads may read beside the token itself.

New in this library. After few blocks a token knows little of what it is part of; a head may look there itself.
"""

from jaxtyping import Bool, Float

from tokenexit import tokens
from tokenexit._array import Array, array_namespace, filled
from tokenexit._plain import is_whole
from tokenexit.errors import require
from tokenexit.tokens import Receipt

__all__ = ["beside_all", "beside_running"]

_EPSILON = 1e-5


def beside_running(
    entries: Float[Array, "*layout width"], receipt: Receipt, /, *, grid: tuple[int, int], radius: int
) -> Float[Array, "*layout twice_width"]:
    """Every token, standardised, beside the mean of the patches in its neighbourhood that still run, itself included.

    Args:
        entries: The tokens that run, in the layout of the receipt.
        receipt: The receipt; the patches of the grid are the last slots of an image.
        grid: Height and width of the grid.
        radius: The neighbourhood is the square of 2 radius + 1 places around the token, as far as it is on the grid.

    Returns:
        Twice the channels: the token less its mean and divided by its deviation, and the mean of such. A prefix token
        has no neighbourhood: zeros.

    Raises:
        TokenExitError: If the radius is no whole number from 0 up, the grid has more places than an image slots, or the
            tokens do not have the layout of the receipt.
    """
    _require_radius(radius)
    prefix = receipt.slots - grid[0] * grid[1]
    require(prefix >= 0, "grid", f"have at most {receipt.slots} places", grid)
    own = _standardised(entries)
    nothing = filled((receipt.images, receipt.slots, own.shape[-1]), 0.0, own, dtype=own.dtype)
    by_slot = tokens.scatter(own, receipt, into=nothing)
    around = _means(by_slot[:, prefix:, :], receipt.running[:, prefix:], grid, radius)
    xp = array_namespace(own)
    around = xp.concat([nothing[:, :prefix, :], around], axis=1)
    return xp.astype(xp.concat([own, tokens.gather(around, receipt)], axis=-1), entries.dtype)


def beside_all(
    patches: Float[Array, "images patches width"], /, *, grid: tuple[int, int], radius: int
) -> Float[Array, "images patches twice_width"]:
    """The same for all patches of some images, of which none has left.

    Args:
        patches: The patches, row by row.
        grid: Height and width of the grid.
        radius: As for `beside_running`.

    Returns:
        Twice the channels.

    Raises:
        TokenExitError: If the radius is no whole number from 0 up, or the grid has not as many places.
    """
    _require_radius(radius)
    require(grid[0] * grid[1] == patches.shape[1], "grid", f"have {patches.shape[1]} places", grid)
    own = _standardised(patches)
    xp = array_namespace(own)
    running = filled((own.shape[0], own.shape[1]), True, own, dtype=xp.bool)
    return xp.astype(xp.concat([own, _means(own, running, grid, radius)], axis=-1), patches.dtype)


def _require_radius(radius: int) -> None:
    require(is_whole(radius, least=0), "radius", "be a whole number from 0 up", repr(radius))


def _standardised(x: Array) -> Array:
    """Layer norm without weights, which the layer that reads it has; half precision becomes float32."""
    xp = array_namespace(x)
    x = x if x.dtype == xp.float64 else xp.astype(x, xp.float32)
    x = x - xp.mean(x, axis=-1, keepdims=True)
    return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + _EPSILON)


def _means(
    values: Float[Array, "images places width"],
    running: Bool[Array, "images places"],
    grid: tuple[int, int],
    radius: int,
) -> Float[Array, "images places width"]:
    """Of every place, the mean of the running ones around it; where none runs, 0."""
    xp = array_namespace(values)
    images, places, width = values.shape
    total = _windowed(xp.reshape(values, (images, *grid, width)), radius)
    count = _windowed(xp.reshape(xp.astype(running, values.dtype), (images, *grid, 1)), radius)
    # What does not run is 0 among the values, so that it counts in neither.
    return xp.reshape(total / xp.where(count > 0, count, xp.ones_like(count)), (images, places, width))


def _windowed(maps: Float[Array, "images height width channels"], radius: int) -> Array:
    """The sum over the window around every place: rows first, then columns."""
    xp = array_namespace(maps)
    for axis in (1, 2):
        size = maps.shape[axis]
        reach = max(0, min(radius, size - 1))
        shape = (*maps.shape[:axis], reach, *maps.shape[axis + 1 :])
        beyond = filled(shape, 0.0, maps, dtype=maps.dtype)
        padded = xp.concat([beyond, maps, beyond], axis=axis)
        for first in range(2 * reach + 1):
            part = (*[slice(None)] * axis, slice(first, first + size), ...)
            maps = padded[part] if first == 0 else maps + padded[part]
    return maps
