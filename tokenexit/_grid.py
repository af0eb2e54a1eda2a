"""Neighbourhoods in the patch grid: tokens laid out as maps, and what a map holds around each place."""

from collections.abc import Callable

from jaxtyping import Int, Shaped

from tokenexit._array import Array, array_namespace, counting, searchsorted, take_or

__all__ = ["extremes", "lay_out"]


def lay_out(
    row: Shaped[Array, "tokens"], place: Int[Array, "tokens"], absent: Shaped[Array, "places"], /
) -> Shaped[Array, "places"]:
    """A copy of `absent` in which every token's value lies at its place.

    Tokens may come in any order; no two share a place, and those whose place lies outside are left out.
    """
    xp = array_namespace(row, place)
    tokens, places = row.shape[0], absent.shape[0]
    if tokens == 0:
        return absent
    order = xp.argsort(place, stable=True)
    taken = xp.take(place, order)
    wanted = counting(places, place)
    rank = searchsorted(taken, wanted)
    rank = xp.where(rank < tokens, rank, xp.zeros_like(rank))
    return take_or(row, xp.take(order, rank), xp.take(taken, rank) == wanted, absent)


def extremes(
    map: Int[Array, "images height width"], /, *, radius: int
) -> tuple[Int[Array, "images height width"], Int[Array, "images height width"]]:
    """Least and greatest value in the square of `2 * radius + 1` places around every place.

    Beyond the edge there is nothing that could be either.
    """
    xp = array_namespace(map)
    lowest = highest = map
    for axis in (1, 2):
        lowest = _over_line(xp.minimum, lowest, radius, axis)
        highest = _over_line(xp.maximum, highest, radius, axis)
    return lowest, highest


def _over_line(combine: Callable[[Array, Array], Array], map: Array, radius: int, axis: int) -> Array:
    xp = array_namespace(map)
    size = map.shape[axis]
    result = map
    for step in range(1, min(radius, size - 1) + 1):
        # A place without a neighbour at this distance stands in for it, which changes neither extreme.
        before = xp.concat([_part(map, axis, 0, step), _part(map, axis, 0, size - step)], axis=axis)
        after = xp.concat([_part(map, axis, step, size), _part(map, axis, size - step, size)], axis=axis)
        result = combine(result, combine(before, after))
    return result


def _part(map: Array, axis: int, start: int, stop: int) -> Array:
    return map[:, start:stop, :] if axis == 1 else map[:, :, start:stop]
