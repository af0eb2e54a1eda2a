"""Cells of the patch grid: of each, one token runs on and stands, in attention, for those that have left.

New in this library. Tokens that stay no longer see those that have left. So the token in the middle of every cell runs
to the end, and its attention weight counts as often as there are tokens that it stands for, as ToMe (ICLR 2023, section
3) counts a merged token. It costs one token of each cell, and no others.
"""

from jaxtyping import Bool, Float, Int

from tokenexit._array import Array, array_namespace, counting, take
from tokenexit._plain import is_whole
from tokenexit.errors import require
from tokenexit.tokens import Receipt

__all__ = ["is_cell_centre", "token_size"]


def is_cell_centre(position: Int[Array, "tokens"], /, *, grid: tuple[int, int], side: int) -> Bool[Array, "tokens"]:
    """Which tokens are in the middle of their cell, and run on.

    The grid is cut into as many rows and columns of cells as make them nearest to `side` patches; they differ by a
    patch at most.

    Args:
        position: Place of every token in the grid, row by row; what lies outside (a prefix token) is in no cell.
        grid: Height and width of the grid.
        side: Side of a cell, in patches; with 1, every token is the middle of its own.

    Returns:
        True for one token of each cell.

    Raises:
        TokenExitError: If `side` is no whole number from 1 up.
    """
    _require_side(side)
    height, width = grid
    row, column = position // max(width, 1), position % max(width, 1)
    inside = (position >= 0) & (position < height * width)
    return inside & (row == _middle(row, height, side)) & (column == _middle(column, width, side))


def token_size(receipt: Receipt, /, *, grid: tuple[int, int], side: int) -> Float[Array, "..."]:
    """How many tokens every token stands for: itself, and in the middle of a cell those of it that do not run.

    Args:
        receipt: The receipt of the tokens that run; the patches of the grid are the last slots of an image.
        grid: Height and width of the grid.
        side: Side of a cell, in patches.

    Returns:
        The counts, float32, in the layout of the receipt: what `log` makes a bias of attention, on keys.

    Raises:
        TokenExitError: If `side` is no whole number from 1 up, or the grid has more places than an image slots.
    """
    _require_side(side)
    height, width = grid
    prefix = receipt.slots - height * width
    require(prefix >= 0, "grid", f"have at most {receipt.slots} places", grid)
    xp = array_namespace(receipt.running)
    position = receipt.slot - prefix
    gone = xp.reshape(xp.astype(~receipt.running[:, prefix:], xp.float32), (receipt.images, height, width))
    rows, columns = (_cells(counting(size, position), size, side) for size in grid)
    # Which row of the grid belongs to which row of cells; columns likewise. Sums over cells are then two products.
    down = xp.astype(counting(_count(height, side), position)[:, None] == rows[None, :], xp.float32)
    across = xp.astype(columns[:, None] == counting(_count(width, side), position)[None, :], xp.float32)
    missing = xp.matmul(xp.matmul(down, gone), across)
    inside = xp.where(position >= 0, position, xp.zeros_like(position))
    row, column = inside // max(width, 1), inside % max(width, 1)
    cell = _cells(row, height, side) * _count(width, side) + _cells(column, width, side)
    cell = cell + receipt.image * (_count(height, side) * _count(width, side))
    middle = is_cell_centre(position, grid=grid, side=side)
    missing = xp.reshape(missing, (receipt.images * _count(height, side) * _count(width, side),))
    if receipt.slot.shape[0] == 0 or missing.shape[0] == 0:
        return xp.reshape(xp.ones_like(xp.astype(position, xp.float32)), receipt.layout)
    more = xp.where(middle, take(missing, cell), xp.zeros_like(take(missing, cell)))
    return xp.reshape(1 + more, receipt.layout)


def _count(size: int, side: int) -> int:
    """Cells along an axis."""
    return max(1, (size + side // 2) // side)


def _cells(place: Array, size: int, side: int) -> Array:
    """Cell of every place along an axis."""
    return place * _count(size, side) // max(size, 1)


def _middle(place: Array, size: int, side: int) -> Array:
    """Middle of the cell of every place along an axis."""
    count = _count(size, side)
    cell = _cells(place, size, side)
    first, last = -(-cell * size // count), -(-(cell + 1) * size // count) - 1
    return (first + last) // 2


def _require_side(side: int) -> None:
    require(is_whole(side, least=1), "side", "be a whole number from 1 up", repr(side))
