"""Neighbourhoods in the patch grid: tokens laid out as maps, and what a map holds around each place."""

from collections.abc import Callable

from jaxtyping import Bool, Int, Shaped

from tokenexit._array import Array, array_namespace, counting, searchsorted, take, take_or, uniform_squares

__all__ = ["extremes", "lay_out", "uniform"]


def lay_out(
    row: Shaped[Array, "tokens"], place: Int[Array, "tokens"], absent: Shaped[Array, "places"], /
) -> Shaped[Array, "places"]:
    """A copy of `absent` in which every token's value lies at its place.

    Tokens may come in any order; no two share a place, and those with a place outside are left out.
    """
    xp = array_namespace(row, place)
    tokens, places = row.shape[0], absent.shape[0]
    if tokens == 0:
        return absent
    order = xp.argsort(place, stable=True)
    taken = take(place, order)
    wanted = counting(places, place)
    rank = searchsorted(taken, wanted)
    rank = xp.where(rank < tokens, rank, xp.zeros_like(rank))
    return take_or(row, take(order, rank), take(taken, rank) == wanted, absent)


def extremes(
    map: Int[Array, "images height width"], /, *, radius: int
) -> tuple[Int[Array, "images height width"], Int[Array, "images height width"]]:
    """Least and greatest value in the square of `2 * radius + 1` places around every place.

    Beyond the edge there is nothing that could be either.
    """
    xp = array_namespace(map)
    lowest = highest = map
    for axis in (1, 2):
        reach = min(radius, map.shape[axis] - 1)
        if reach > 0:
            lowest = _over_line(xp.minimum, lowest, reach, axis)
            highest = _over_line(xp.maximum, highest, reach, axis)
    return lowest, highest


def uniform(map: Int[Array, "images height width"], /, *, radius: int) -> Bool[Array, "images height width"]:
    """Whether the square of `2 * radius + 1` places around every place holds one value; beyond the edge is nothing."""
    if 0 in map.shape:
        return map == map
    height, width = (min(radius, size - 1) for size in map.shape[1:])
    found = uniform_squares(map, radius=(height, width))
    if found is None:
        lowest, highest = extremes(map, radius=radius)
        found = lowest == highest
    return found


def _over_line(combine: Callable[[Array, Array], Array], map: Array, reach: int, axis: int) -> Array:
    xp = array_namespace(map)
    size = map.shape[axis]
    # Beyond the edge stands the place at the edge, which is in the square already: it changes neither extreme.
    first, last = _part(map, axis, 0, 1), _part(map, axis, size - 1, size)
    wide = xp.concat([*[first] * reach, map, *[last] * reach], axis=axis)
    result = map
    for step in range(2 * reach + 1):
        if step != reach:
            result = combine(result, _part(wide, axis, step, step + size))
    return result


def _part(map: Array, axis: int, start: int, stop: int) -> Array:
    return map[:, start:stop, :] if axis == 1 else map[:, :, start:stop]
