"""Merging: tokens of a cell of the grid that are alike run on as one, and share one outcome.

    joined = merging.merge(features, merging.alone(running, grid=(44, 60)), side=4, alike=0.9, agreed=marks)
    decision = exits.decide(policy, book, joined.merged, grid=(44, 60))
    logits = merging.spread(book.logits, joined.merged.owner)

Cells of 2 x 2 patches merge where all four run; then cells of 4 x 4 where all four of 2 x 2 have merged, and so on. A
merge is a compaction like an exit, but its members keep a pointer to the place of their owner, the first patch of the
cell: what the owner leaves behind, early or at the end, is the outcome of all. So a place is in one of three states: it
runs; it is merged into another, whatever becomes of that; or it has left.

All functions work on all slots of all images, so that shapes do not depend on the data; each image merges as it likes.
Where images have room for so many entries alone, `merge_to_fit` merges more.

Related: ToMe (ICLR 2023) merges pairs of tokens by matching, ALGM (CVPR 2024) cells of 2 x 2 by similarity, CTS (CVPR
2023) by a policy network, one count for a whole batch. Merging by the agreement of classes is new in this library.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from jaxtyping import Bool, Float, Int, Shaped

from tokenexit._array import Array, array_namespace, counting, filled, take
from tokenexit._plain import is_number
from tokenexit.errors import require

__all__ = [
    "SIDES",
    "Joined",
    "Merged",
    "alike_for",
    "alone",
    "fewest",
    "merge",
    "merge_to_fit",
    "similarities",
    "spread",
    "turned",
    "whole_entries",
]

SIDES: Mapping[int, int] = MappingProxyType({2: 1, 4: 2, 8: 3, 16: 4})
"""Sides of the cells that can merge, in patches, and how often tokens then merge four to one."""


@dataclass(frozen=True)
class Merged:
    """Which slots run, and in which of them each slot runs.

    Attributes:
        running: Which slots hold an entry of their own: a token by itself, or the owner of merged ones.
        owner: Slot, within its image, of the entry that each slot belongs to: itself if it is not merged.
        size: How many tokens each entry holds; of a slot without an entry, of no meaning.
        grid: Height and width of the patch grid, whose places are the last slots of an image.
    """

    running: Bool[Array, "images slots"]
    owner: Int[Array, "images slots"]
    size: Int[Array, "images slots"]
    grid: tuple[int, int]

    @property
    def prefix(self) -> int:
        """Prefix tokens of an image."""
        return self.running.shape[1] - self.grid[0] * self.grid[1]

    def of_patches(self) -> "Merged":
        """The same of the places of the grid alone, without prefix tokens."""
        prefix = self.prefix
        if prefix == 0:
            return self
        return Merged(self.running[:, prefix:], self.owner[:, prefix:] - prefix, self.size[:, prefix:], self.grid)


def alone(running: Bool[Array, "images slots"], /, *, grid: tuple[int, int]) -> Merged:
    """Every slot by itself.

    Args:
        running: Which slots run.
        grid: Height and width of the patch grid.

    Returns:
        The state before any merge.

    Raises:
        TokenExitError: If the grid has more places than an image slots.
    """
    images, slots = running.shape
    require(grid[0] * grid[1] <= slots, "grid", f"have at most {slots} places", grid)
    xp = array_namespace(running)
    owner = xp.broadcast_to(counting(slots, running)[None, :], (images, slots))
    return Merged(running, owner, xp.ones_like(owner), grid)


def spread(
    values: Shaped[Array, "images slots *rest"], owner: Int[Array, "images slots"], /
) -> Shaped[Array, "images slots *rest"]:
    """Values of entries, at every slot that belongs to them.

    Args:
        values: A value for every slot, of which those of owners count.
        owner: Slot of the entry that each slot belongs to.

    Returns:
        For each slot the value of its owner.

    Raises:
        TokenExitError: If the two do not have the same images and slots.
    """
    shape = tuple(owner.shape)
    got = f"shape {tuple(values.shape)}"
    require(tuple(values.shape[:2]) == shape, "values", f"have the images and slots of `owner`, {shape}", got)
    xp, (images, slots) = array_namespace(values), shape
    rest = tuple(values.shape[2:])
    flat = xp.reshape(values, (images * slots, *rest))
    row = xp.reshape(owner + counting(images, owner)[:, None] * slots, (images * slots,))
    return xp.reshape(take(flat, row, axis=0), tuple(values.shape))


def whole_entries(marks: Bool[Array, "images slots"], merged: Merged, /) -> Bool[Array, "images slots"]:
    """Whether all tokens of the entry that each slot belongs to are marked.

    Args:
        marks: Marks of tokens.
        merged: Which belong together: cells.

    Returns:
        A mask by slot, alike for all of one entry.
    """
    found, own = marks, spread(merged.size, merged.owner)
    xp = array_namespace(marks)
    for side in SIDES:
        if side > min(merged.grid):
            break
        every = xp.all(_by_cell(found, side, merged), axis=(2, 4))
        found = xp.where(own == side * side, _everywhere(every, side, merged), found)
    return found


def _by_cell(
    values: Shaped[Array, "images slots *rest"], side: int, merged: Merged, /
) -> Shaped[Array, "images rows side columns side *rest"]:
    """Values of the patches in whole cells, by row and column of the cell, and within it.

    Args:
        values: A value for every slot.
        side: Side of a cell.
        merged: What knows the grid.
    """
    (height, width), rest = merged.grid, tuple(values.shape[2:])
    xp, images = array_namespace(values), values.shape[0]
    rows, columns = height // side, width // side
    map = xp.reshape(values[:, merged.prefix :, ...], (images, height, width, *rest))
    map = map[:, : rows * side, : columns * side, ...]
    return xp.reshape(map, (images, rows, side, columns, side, *rest))


@dataclass(frozen=True)
class Joined:
    """Outcome of a merge.

    Attributes:
        merged: Which tokens have merged now.
        bank: Features that entries can have: those of all slots, then the means of cells.
        source: Row of `bank` that is the feature of the entry at each slot; of slots without one, of no meaning.
    """

    merged: Merged
    bank: Float[Array, "rows dim"]
    source: Int[Array, "images slots"]

    def features(self) -> Float[Array, "images slots dim"]:
        """Features by slot; of slots without an entry, of no meaning."""
        xp, (images, slots) = array_namespace(self.bank), self.source.shape
        found = take(self.bank, xp.reshape(self.source, (images * slots,)), axis=0)
        return xp.reshape(found, (images, slots, self.bank.shape[1]))


def merge(
    features: Float[Array, "images slots dim"],
    merged: Merged,
    /,
    *,
    side: int,
    alike: float | None = None,
    agreed: Bool[Array, "images slots"] | None = None,
    label: Int[Array, "images slots"] | None = None,
) -> Joined:
    """Merge the tokens of cells that are alike, and agreed upon.

    Args:
        features: Features of every slot; those of slots without an entry are not looked at.
        merged: Which tokens have merged so far.
        side: Side of the largest cells that merge, in patches: 2, 4, 8 or 16.
        alike: What the mean cosine similarity of the pairs of a cell's four tokens must exceed, in float32: each a
            patch, or a merged quarter. None: it is not asked for.
        agreed: Marks of tokens; all those of a cell must be marked. None: no marks are asked for.
        label: Classes of tokens; those of a cell must have one. None: it is not asked for.

    Returns:
        The outcome: the owner of a merged cell has the mean of its tokens.

    Raises:
        TokenExitError: If `side` is none of these, neither criterion is given, or the shapes differ.
    """
    require(side in SIDES, "side", f"be one of {list(SIDES)}", side)
    require(alike is not None or agreed is not None, "alike", "be given if `agreed` is not", alike)
    shape = tuple(merged.running.shape)
    for name, array in (("features", features), ("agreed", agreed), ("label", label)):
        if array is not None:
            got = f"shape {tuple(array.shape)}"
            require(tuple(array.shape[:2]) == shape, name, f"have the images and slots {shape}", got)

    def passing(level: int, quarters: Quarters, merged: Merged) -> Array:
        ready = _ready(merged, level, agreed, label)
        return ready if alike is None else ready & (_similarity(quarters) > alike)

    return _merge_cells(features, merged, side, passing)


def merge_to_fit(joined: Joined, /, *, side: int, capacity: int) -> tuple[Joined, Int[Array, "images"]]:
    """Merge the most alike of the cells that have not merged, until there is room for all entries of an image.

    Cells of 2 x 2 merge first, then those of 4 x 4, and so on. An image merges no more of them than it has to. One with
    tokens that have left may lack whole cells: then it may still have more entries than there is room for.

    Args:
        joined: The outcome of a merge (`merge`).
        side: Side of the largest cells that merge, in patches: 2, 4, 8 or 16.
        capacity: Entries that there is room for in an image, prefix tokens among them.

    Returns:
        The outcome, and how many entries of each image have become part of others for lack of room. Of cells as alike
        the first merge; those of which a token has no direction, NaN, come last.

    Raises:
        TokenExitError: If `side` is none of these, or `capacity` negative.
    """
    require(side in SIDES, "side", f"be one of {list(SIDES)}", side)
    require(capacity >= 0, "capacity", "be a number of entries from 0 up", capacity)
    xp = array_namespace(joined.bank)

    def most_alike(level: int, quarters: Quarters, merged: Merged) -> Array:
        ready = _ready(merged, level)
        images, rows, columns = ready.shape
        alike = _similarity(quarters)  # from -1/3 to 1
        distance = xp.where(ready, xp.where(xp.isnan(alike), 2.0, -alike), 3.0)
        order = xp.argsort(xp.reshape(distance, (images, rows * columns)), axis=1, stable=True)
        rank = xp.reshape(xp.argsort(order, axis=1), ready.shape)
        # Each cell that merges is three entries less.
        cells = (_entries(merged) - capacity + 2) // 3
        return ready & (rank < cells[:, None, None])

    fitted = _merge_cells(joined.features(), joined.merged, side, most_alike)
    return fitted, _entries(joined.merged) - _entries(fitted.merged)


def fewest(grid: tuple[int, int], /, *, side: int) -> int:
    """Entries of a grid of which all cells have merged.

    Args:
        grid: Height and width of the patch grid.
        side: Side of the largest cells that merge, in patches: 2, 4, 8 or 16.

    Returns:
        How many there are, the rim among them.

    Raises:
        TokenExitError: If `side` is none of these.
    """
    require(side in SIDES, "side", f"be one of {list(SIDES)}", side)
    height, width = grid
    return height * width - 3 * sum((height // level) * (width // level) for level in SIDES if level <= side)


def _entries(merged: Merged) -> Int[Array, "images"]:
    """How many entries each image has."""
    xp = array_namespace(merged.running)
    return xp.sum(xp.astype(merged.running, merged.owner.dtype), axis=1)


Quarters = tuple[Float[Array, "images down across dim"], ...]
"""The four entries of each cell."""

Choice = Callable[[int, Quarters, Merged], Bool[Array, "images down across"]]
"""From the side of cells, their quarters, and what has merged, to those that merge."""


def _merge_cells(features: Array, merged: Merged, side: int, choice: Choice) -> Joined:
    """Merge the cells that are chosen, the smallest first."""
    xp, (images, slots) = array_namespace(features), tuple(merged.running.shape)
    bank = [xp.reshape(features, (images * slots, features.shape[2]))]
    source = xp.reshape(counting(images * slots, merged.owner), (images, slots))
    (height, width), prefix = merged.grid, merged.prefix
    entries = xp.reshape(features[:, prefix:, :], (images, height, width, features.shape[2]))
    for level in SIDES:
        if level > min(side, height, width):
            break
        quarters = _by_four(entries)
        mean = _mean(quarters)
        ready = choice(level, quarters, merged)
        entries = xp.where(ready[..., None], mean, quarters[0])
        merged, leads = _with_cells(merged, ready, level)
        count = math.prod(ready.shape)
        number = xp.reshape(counting(count, source), ready.shape) + sum(part.shape[0] for part in bank)
        source = xp.where(leads, _everywhere(number, level, merged), source)
        bank.append(xp.reshape(entries, (count, features.shape[2])))
    return Joined(merged, bank[0] if len(bank) == 1 else xp.concat(bank, axis=0), source)


def similarities(
    features: Float[Array, "images slots dim"],
    merged: Merged,
    /,
    *,
    agreed: Bool[Array, "images slots"] | None = None,
    label: Int[Array, "images slots"] | None = None,
) -> Float[Array, "images rows columns"]:
    """How alike the tokens of each cell of 2 x 2 are: what `merge` compares with `alike`.

    Args:
        features: See `merge`.
        merged: Which tokens have merged so far.
        agreed: See `merge`.
        label: See `merge`.

    Returns:
        The mean cosine similarity of every whole cell, in float32; NaN of a cell that could not merge, because a token
        of it does not run by itself, is not marked, or has another class; or because one has no direction.
    """
    xp, (height, width) = array_namespace(features), merged.grid
    entries = xp.reshape(features[:, merged.prefix :, :], (features.shape[0], height, width, features.shape[2]))
    return xp.where(_ready(merged, 2, agreed, label), _similarity(_by_four(entries)), xp.nan)


def alike_for(similarity: Float[Array, "*any"], /, *, share: float) -> float:
    """The similarity that a share of cells exceeds: a threshold for `merge`, measured on images.

    It lies between the last cell that is to merge and the next, halfway, so that rounding moves neither over it. Of
    cells that are equally alike all merge or none: none, where all would be more than the share.

    Args:
        similarity: Similarities of cells (`similarities`), of all images; NaN of cells that cannot merge.
        share: Share of the cells that can merge which is to merge, above 0 and at most 1; to the nearest cell.

    Returns:
        The threshold, a number in [-1, 1].

    Raises:
        TokenExitError: If the share is out of range, or no cell can merge.
    """
    require(is_number(share) and 0 < share <= 1, "share", "be a number above 0 and at most 1", repr(share))
    xp = array_namespace(similarity)
    flat = xp.astype(xp.reshape(similarity, (-1,)), xp.float32)
    known = ~xp.isnan(flat)
    count, total = int(xp.sum(xp.astype(known, xp.int32))), flat.shape[0]
    require(count > 0, "similarity", "be of cells of which some can merge", f"none among {total}")
    wanted = math.floor(share * count + 0.5)
    ranked = xp.sort(xp.where(known, flat, -2.0))  # ascending; what cannot merge comes first
    last = float(ranked[total - wanted]) if wanted > 0 else 1.0
    following = float(ranked[total - wanted - 1]) if wanted < count else -1.0
    between = float(xp.asarray((last + following) / 2, dtype=xp.float32))
    return min(1.0, between if between < last else following)


def _ready(
    merged: Merged, side: int, agreed: Array | None = None, label: Array | None = None
) -> Bool[Array, "images rows columns"]:
    """Which cells can merge, alike or not: their quarters run, each whole, and all tokens are agreed upon."""
    xp = array_namespace(merged.running)
    whole = merged.running & (merged.size == (side // 2) ** 2)
    ready = xp.all(_first_of_quarters(whole, side, merged), axis=(2, 4))
    if agreed is not None:
        ready = ready & xp.all(_by_cell(agreed, side, merged), axis=(2, 4))
    if label is not None:
        labels = _by_cell(label, side, merged)
        ready = ready & (xp.min(labels, axis=(2, 4)) == xp.max(labels, axis=(2, 4)))
    return ready


def _by_four(entries: Float[Array, "images rows columns dim"]) -> Quarters:
    """The four entries of each cell: slices, for reductions over axes in between are several times slower."""
    rows, columns = entries.shape[1] // 2 * 2, entries.shape[2] // 2 * 2
    return tuple(entries[:, down:rows:2, right:columns:2, :] for down in (0, 1) for right in (0, 1))


def _mean(quarters: Quarters) -> Float[Array, "images down across dim"]:
    xp, dtype = array_namespace(*quarters), quarters[0].dtype
    wide = xp.result_type(dtype, xp.float32)
    first, second, third, last = (one if dtype == wide else xp.astype(one, wide) for one in quarters)
    found = ((first + second) + (third + last)) / 4
    return found if dtype == wide else xp.astype(found, dtype)


def _similarity(quarters: Quarters) -> Float[Array, "images down across"]:
    """Mean cosine similarity of the pairs of four tokens, in float32; NaN if one has no direction."""
    xp = array_namespace(*quarters)
    units = []
    for one in quarters:
        held = one if one.dtype == xp.float32 else xp.astype(one, xp.float32)
        units.append(held / xp.sqrt(xp.sum(held * held, axis=-1, keepdims=True)))
    first, second, third, last = units
    total = (first + second) + (third + last)
    return (xp.sum(total * total, axis=-1) - 4) / 12


def _first_of_quarters(values: Array, side: int, merged: Merged) -> Array:
    """Values of the first places of a cell's quarters, `(images, rows, 2, columns, 2)`."""
    return _by_cell(values, side, merged)[:, :, :: side // 2, :, :: side // 2]


def _with_cells(merged: Merged, ready: Array, side: int) -> tuple[Merged, Array]:
    """The same with the ready cells merged, and which slots are their owners."""
    xp = array_namespace(ready)
    joins, first = _everywhere(ready, side, merged), _first_of_cells(side, merged)
    leads = joins & (first == counting(first.shape[1], first)[None, :])
    found = replace(
        merged,
        running=merged.running & (leads | ~joins),
        owner=xp.where(joins, first, merged.owner),
        size=xp.where(leads, side * side, merged.size),
    )
    return found, leads


def _first_of_cells(side: int, merged: Merged) -> Int[Array, "1 slots"]:
    """First slot of the cell of every slot; of what is in no whole cell, itself."""
    (height, width), prefix = merged.grid, merged.prefix
    xp, slot = array_namespace(merged.owner), counting(merged.owner.shape[1], merged.owner)
    place = slot - prefix
    row, column = place // max(width, 1), place % max(width, 1)
    first = prefix + (row - row % side) * width + column - column % side
    inside = (place >= 0) & (row < height - height % side) & (column < width - width % side)
    return xp.where(inside, first, slot)[None, :]


def _everywhere(
    values: Shaped[Array, "images rows columns"], side: int, merged: Merged
) -> Shaped[Array, "images slots"]:
    """Values of cells at all their slots; zero, or False, in no whole cell."""
    (height, width), (images, rows, columns) = merged.grid, values.shape
    xp = array_namespace(values)
    wide = xp.broadcast_to(values[:, :, None, :, None], (images, rows, side, columns, side))
    map = xp.reshape(wide, (images, rows * side, columns * side))
    if width > columns * side:
        map = xp.concat([map, _blank(map, (images, rows * side, width - columns * side))], axis=2)
    if height > rows * side:
        map = xp.concat([map, _blank(map, (images, height - rows * side, width))], axis=1)
    flat = xp.reshape(map, (images, height * width))
    return xp.concat([_blank(flat, (images, merged.prefix)), flat], axis=1) if merged.prefix else flat


def _blank(like: Array, shape: tuple[int, ...]) -> Array:
    return filled(shape, 0, like, dtype=like.dtype)


def turned(
    table: Float[Array, "slots *table"],
    slot: Int[Array, "entries"],
    size: Int[Array, "entries"],
    /,
    *,
    grid: tuple[int, int],
    pairs: int,
) -> Float[Array, "entries *table"]:
    """Rotary positions of entries: the angle of a merged token is that of the sum of its tokens' sines and cosines.

    Args:
        table: Sines and cosines of every slot.
        slot: Slot of each entry.
        size: How many tokens each entry holds.
        grid: Height and width of the patch grid.
        pairs: Axis of the table of which one half has the sines, and the other the cosines, in either order.

    Returns:
        The positions of the entries, scaled to length one.

    Raises:
        TokenExitError: If `pairs` is no axis with an even number of entries.
    """
    even = -table.ndim < pairs < table.ndim and pairs != 0 and table.shape[pairs] % 2 == 0
    require(even, "pairs", f"be an axis, but the first, of even size of a table of shape {tuple(table.shape)}", pairs)
    xp, places = array_namespace(table), grid[0] * grid[1]
    prefix, width = table.shape[0] - places, grid[1]
    bank, row, offset = [table], slot, table.shape[0]
    place = slot - prefix
    for side in SIDES:
        if side > min(grid):
            break
        rows, columns = grid[0] // side, grid[1] // side
        map = xp.reshape(table[prefix:, ...], (*grid, *table.shape[1:]))[: rows * side, : columns * side, ...]
        map = xp.reshape(map, (rows, side, columns, side, *table.shape[1:]))
        bank.append(_of_unit_length(xp.reshape(xp.mean(map, axis=(1, 3)), (rows * columns, *table.shape[1:])), pairs))
        cell = offset + place // width // side * columns + place % width // side
        row = xp.where(size == side * side, cell, row)
        offset += rows * columns
    return take(xp.concat(bank, axis=0), row, axis=0)


def _of_unit_length(table: Float[Array, "cells *table"], pairs: int) -> Float[Array, "cells *table"]:
    xp = array_namespace(table)
    axis = pairs % table.ndim
    half = table.shape[axis] // 2
    before = (slice(None),) * axis
    first, second = table[(*before, slice(None, half), ...)], table[(*before, slice(half, None), ...)]
    length = xp.sqrt(first * first + second * second)
    length = xp.where(length > 0, length, 1.0)  # opposite angles: no angle is right
    return xp.concat([first / length, second / length], axis=axis)
