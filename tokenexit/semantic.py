"""Geometry of semantic tokens (STViT, CVPR 2023): windows of a map, what lies around them, pooling, and the way back.

A few semantic tokens stand for the many of a window, or of the whole map. They start as pooled tokens; layers of an
adapter refine them, mix them, and recover the map from them. What is here has no weights. Any map and any window will
do: windows begin at the top left, and the last ones may hang over the edge. Which places hold a token goes the same way
as the tokens: `valid` comes in as a map, and goes out beside what was cut. None says that all of them do, so that
nothing is masked where nothing has to be.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from jaxtyping import Bool, Float, Shaped

from tokenexit._array import Array, array_namespace, counting, filled, require_marks, take
from tokenexit._plain import MOST, is_number, is_whole, require_keys
from tokenexit.errors import require

__all__ = [
    "Edges",
    "SemanticPlan",
    "Partition",
    "join",
    "neighbourhoods",
    "pool",
    "require_places",
    "require_room",
    "split",
    "stvit",
    "stvit_r",
    "stvit_r_dense",
]

Edges = Literal["inside", "beyond"]
"""Where a neighbourhood lies that would reach over the edge: pushed `inside` the map, or `beyond`, partly not valid."""

Pooling = Literal["max", "mean"]
Sides = tuple[int, int]


@dataclass(frozen=True)
class Partition:
    """A map cut into windows, row by row from the top left. Plain numbers: shapes are known before there is an array.

    Attributes:
        height: Rows of the map.
        width: Columns of the map.
        window: Rows and columns of a window; the last ones hang over the edge if it does not divide the map.

    Raises:
        TokenExitError: If one of them is no whole number from 1 up.
    """

    height: int
    width: int
    window: tuple[int, int]

    def __post_init__(self) -> None:
        for argument, value in (("height", self.height), ("width", self.width)):
            require(is_whole(value, least=1), argument, "be a whole number from 1 up", repr(value))
        _require_sides(self.window, "window")

    @classmethod
    def whole(cls, height: int, width: int, /) -> "Partition":
        """The map as one window.

        Args:
            height: Rows of the map.
            width: Columns of the map.

        Returns:
            The geometry with a single window, in which all that is local is global.

        Raises:
            TokenExitError: If one of them is no whole number from 1 up.
        """
        return cls(height, width, (height, width))

    @property
    def rows(self) -> int:
        """Rows of windows."""
        return -(-self.height // self.window[0])

    @property
    def columns(self) -> int:
        """Columns of windows."""
        return -(-self.width // self.window[1])

    @property
    def count(self) -> int:
        """How many windows there are."""
        return self.rows * self.columns

    @property
    def padding(self) -> tuple[int, int]:
        """Rows and columns by which the last windows hang over the edge."""
        return self.rows * self.window[0] - self.height, self.columns * self.window[1] - self.width

    def pooled(self, to: tuple[int, int], /) -> "Partition":
        """The map of semantic tokens, in windows of its own: `join` makes it of what `pool` gives, `split` undoes it.

        Args:
            to: Rows and columns of semantic tokens in a window.

        Returns:
            The geometry of that map, with as many windows as this one.

        Raises:
            TokenExitError: If one of them is no whole number from 1 up.
        """
        _require_sides(to, "to")
        return Partition(self.rows * to[0], self.columns * to[1], to)


def split(
    map: Shaped[Array, "images height width *rest"],
    windows: Partition,
    /,
    *,
    valid: Bool[Array, "images height width"] | None = None,
) -> tuple[Shaped[Array, "images windows places *rest"], Bool[Array, "images windows places"] | None]:
    """A map in windows.

    Args:
        map: A value for every place.
        windows: The geometry.
        valid: Which places hold a token; all, if left out.

    Returns:
        The values of each window, row by row; what hangs over the edge repeats the edge. And which are valid.

    Raises:
        TokenExitError: If `map` or `valid` is not of the size of `windows`.
    """
    return neighbourhoods(map, windows, size=windows.window, edges="beyond", valid=valid)


def join(
    values: Shaped[Array, "images windows places *rest"], windows: Partition, /
) -> Shaped[Array, "images height width *rest"]:
    """The map that has these values in its windows: the inverse of `split`.

    Args:
        values: A value for every place of every window; those that hang over the edge are dropped.
        windows: The geometry.

    Returns:
        The map.

    Raises:
        TokenExitError: If there are not so many windows, or a window has not so many places.
    """
    high, wide = windows.window
    require(
        tuple(values.shape[1:3]) == (windows.count, high * wide),
        "values",
        f"have {windows.count} windows of {high * wide} places on axes 1 and 2",
        f"shape {tuple(values.shape)}",
    )
    xp = array_namespace(values)
    images, rest = values.shape[0], tuple(values.shape[3:])
    apart = xp.reshape(values, (images, windows.rows, windows.columns, high, wide, *rest))
    laid = xp.reshape(_swapped(apart), (images, windows.rows * high, windows.columns * wide, *rest))
    return laid[:, : windows.height, : windows.width, ...]


def neighbourhoods(
    map: Shaped[Array, "images height width *rest"],
    windows: Partition,
    /,
    *,
    size: tuple[int, int],
    edges: Edges = "inside",
    valid: Bool[Array, "images height width"] | None = None,
) -> tuple[Shaped[Array, "images windows places *rest"], Bool[Array, "images windows places"] | None]:
    """What lies around each window.

    Args:
        map: A value for every place.
        windows: The geometry. One neighbourhood belongs to each window, so they are a window apart.
        size: Rows and columns of a neighbourhood. The window is in its middle; of an odd number around it, one more
            is behind.
        edges: What becomes of those that reach over the edge of the map. `inside`: they are pushed back until they do
            not, and one that is larger than the map is the map; so at 14 x 14, 10 x 10 around windows of 7 x 7 begin
            at 0 and 4. `beyond`: they stay, and places outside are not valid.
        valid: Which places hold a token; all, if left out.

    Returns:
        The values of each neighbourhood, row by row; places outside repeat the edge. And which are valid.

    Raises:
        TokenExitError: If `map` or `valid` is not of the size of `windows`, or `size` or `edges` is none.
    """
    _require_map(map, windows, valid)
    _require_sides(size, "size")
    require(edges in ("inside", "beyond"), "edges", "be 'inside' or 'beyond'", repr(edges))
    down = _around(windows.height, windows.window[0], size[0], edges, map)
    across = _around(windows.width, windows.window[1], size[1], edges, map)
    xp = array_namespace(map)
    shape = (map.shape[0], windows.count, down.reach * across.reach)
    cut = xp.reshape(_swapped(_cut(map, down, across)), (*shape, *map.shape[3:]))
    marks = _marks(valid, down, across, map)
    return cut, None if marks is None else xp.reshape(_swapped(marks), shape)


def pool(
    map: Float[Array, "images height width *rest"],
    windows: Partition,
    /,
    *,
    to: tuple[int, int],
    by: Pooling = "max",
    valid: Bool[Array, "images height width"] | None = None,
) -> tuple[Float[Array, "images windows pooled *rest"], Bool[Array, "images windows pooled"] | None]:
    """Adaptive pooling of each window: cell `i` of `n`, of `side` places, spans `floor(i side / n)` to the ceiling of
    `(i + 1) side / n`. Cells may overlap; 7 places in 3 cells are 3 each.

    Args:
        map: The features.
        windows: The geometry; `Partition.whole` to pool the whole map.
        to: Rows and columns of cells in a window.
        by: The largest value of a cell's valid places (published), or their mean.
        valid: Which places hold a token; all, if left out. The others never win, and do not count in a mean.

    Returns:
        The pooled features of each window, row by row; 0 for a cell without any valid place. And which have one.

    Raises:
        TokenExitError: If `map` or `valid` is not of the size of `windows`, or `to` or `by` is none.
    """
    _require_map(map, windows, valid)
    _require_sides(to, "to")
    require(by in ("max", "mean"), "by", "be 'max' or 'mean'", repr(by))
    xp = array_namespace(map)
    floating = xp.isdtype(map.dtype, "real floating")
    require(floating, "map", "be of a floating dtype", str(map.dtype))
    down = _cells(windows.height, windows.window[0], to[0], map)
    across = _cells(windows.width, windows.window[1], to[1], map)
    cut, marks = _cut(map, down, across), _marks(valid, down, across, map)
    held = None if marks is None else xp.any(marks, axis=(2, 4))
    spread = None if marks is None else xp.reshape(marks, (*marks.shape, *[1] * (map.ndim - 3)))
    pooled = (_largest if by == "max" else _mean)(cut, spread)
    apart = (windows.rows, to[0], windows.columns, to[1])
    shape = (map.shape[0], windows.count, to[0] * to[1])
    pooled = xp.reshape(_swapped(xp.reshape(pooled, (map.shape[0], *apart, *map.shape[3:]))), (*shape, *map.shape[3:]))
    if held is None or (valid is None and down.filled and across.filled):
        return pooled, None
    return pooled, xp.reshape(_swapped(xp.reshape(held, (map.shape[0], *apart))), shape)


@dataclass(frozen=True)
class SemanticPlan:
    """How semantic tokens come about, and how a map is recovered from them. Plain data; adapters build layers from it.

    Attributes:
        window: Rows and columns of a window; None for the whole map.
        tokens: Rows and columns of semantic tokens in a window.
        neighbourhood: What the first layer attends to around a window; None for the whole map.
        second: What the second layer attends to around a window; None for the whole map and all semantic tokens.
        recovery: From which semantic tokens around its window a place is recovered, in rows and columns of the map of
            semantic tokens; None for all.
        edges: Where neighbourhoods lie that would reach over the edge.
        pool: How semantic tokens start.
        residual: Whether the first layer adds to the pooled tokens, or replaces them.
        own_keys: Whether semantic tokens attend to themselves too while they attend to the map.
        learned: Rows and columns of learned queries that are added before the second layer, interpolated to the map of
            semantic tokens; None for none.
        layer_scale: What each layer's two contributions are multiplied with at first, channel by channel; None for
            layers without such a scale.

    Raises:
        TokenExitError: If a value is none that is described here.
    """

    window: tuple[int, int] | None = (7, 7)
    tokens: tuple[int, int] = (3, 3)
    neighbourhood: tuple[int, int] | None = (10, 10)
    second: tuple[int, int] | None = None
    recovery: tuple[int, int] | None = None
    edges: Edges = "inside"
    pool: Pooling = "max"
    residual: bool = False
    own_keys: bool = True
    learned: tuple[int, int] | None = None
    layer_scale: float | None = 1e-5

    def __post_init__(self) -> None:
        _require_area(self.tokens, "tokens")
        for argument in ("window", "neighbourhood", "second", "recovery", "learned"):
            sides = getattr(self, argument)
            if sides is not None:
                _require_area(sides, argument)
        require(self.edges in ("inside", "beyond"), "edges", "be 'inside' or 'beyond'", repr(self.edges))
        require(self.pool in ("max", "mean"), "pool", "be 'max' or 'mean'", repr(self.pool))
        for argument in ("residual", "own_keys"):
            value = getattr(self, argument)
            require(isinstance(value, bool), argument, "be True or False", repr(value))
        scale = self.layer_scale
        number = scale is None or (is_number(scale) and scale > 0)
        require(number, "layer_scale", "be a positive number or None", repr(scale))

    def windows(self, height: int, width: int, /) -> Partition:
        """The geometry of a map under this plan.

        Args:
            height: Rows of the map.
            width: Columns of the map.

        Returns:
            The geometry.

        Raises:
            TokenExitError: If one of them is no whole number from 1 up.
        """
        return Partition.whole(height, width) if self.window is None else Partition(height, width, self.window)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @staticmethod
    def from_dict(data: Mapping[str, Any], /) -> "SemanticPlan":
        """The plan that `to_dict` wrote down.

        Args:
            data: What `to_dict` returned, or its like read from a file.

        Returns:
            The plan.

        Raises:
            TokenExitError: If a key is missing or unknown, or a value is none that a plan takes.
        """
        require_keys(data, "plan", {field.name for field in fields(SemanticPlan)})
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }
        return SemanticPlan(**values)


def stvit(tokens: tuple[int, int] = (4, 4)) -> SemanticPlan:
    """Semantic tokens of the whole map, for plain ViTs: 16 of them published.

    All layers look at all of the map. The pooled tokens are kept, and there is no layer-scale, as in the blocks of a
    ViT: so layers can start from trained blocks.

    Args:
        tokens: Rows and columns of semantic tokens.

    Returns:
        The plan.

    Raises:
        TokenExitError: If `tokens` are not whole numbers from 1 up.
    """
    return SemanticPlan(window=None, tokens=tokens, neighbourhood=None, residual=True, layer_scale=None)


def stvit_r(window: tuple[int, int] = (7, 7)) -> SemanticPlan:
    """STViT-R as published for image classification: 3 x 3 semantic tokens in a window, 10 x 10 places around 7 x 7.

    Args:
        window: Rows and columns of a window; the neighbourhood grows with it.

    Returns:
        The plan.

    Raises:
        TokenExitError: If `window` are not whole numbers from 1 up.
    """
    _require_sides(window, "window")
    around = (round(window[0] * 10 / 7), round(window[1] * 10 / 7))
    return SemanticPlan(window=window, neighbourhood=around)


def stvit_r_dense(window: tuple[int, int] = (7, 7)) -> SemanticPlan:
    """STViT-R as published for detection: all attention but that among semantic tokens stays around a window.

    Args:
        window: Rows and columns of a window; the neighbourhoods of two and three windows grow with it.

    Returns:
        The plan: the pooled tokens are kept, and are not among the keys; 27 x 27 semantic tokens recover a window.

    Raises:
        TokenExitError: If `window` are not whole numbers from 1 up.
    """
    _require_sides(window, "window")
    high, wide = window
    return SemanticPlan(
        window=window, neighbourhood=(2 * high, 2 * wide), second=(3 * high, 3 * wide), recovery=(27, 27),
        edges="beyond", residual=True, own_keys=False,
    )  # fmt: skip


def require_room(after: Any, until: Any, /, *, depth: int) -> None:
    """Raise a `TokenExitError` unless blocks can give their place to layers of semantic tokens: what all adapters ask.

    Args:
        after: After how many blocks there are semantic tokens; the next two blocks are replaced.
        until: After how many blocks all tokens are recovered, and the block before is replaced; None if they are not.
        depth: How many blocks there are.

    Raises:
        TokenExitError: If one of the two is no such block.
    """
    fits = is_whole(after) and after <= depth - 2
    rule = f"be a block from 0 to {depth - 2}, for {depth} blocks of which two are replaced"
    require(fits, "after", rule, repr(after))
    fits = until is None or (is_whole(until) and after + 3 <= until <= depth)
    require(fits, "until", f"be a block from {after + 3} to {depth}, three of which are replaced, or None", repr(until))


def require_places(plan: SemanticPlan, grid: tuple[int, int], /) -> None:
    """Raise a `TokenExitError` unless a grid has room for a plan: what adapters ask before anything is computed.

    Args:
        plan: The plan, which may come from a file.
        grid: Height and width of the grid.

    Raises:
        TokenExitError: If the plan makes more semantic tokens than its windows have places on the grid, or its windows,
            with what lies around them, hold so many places that they are a damaged or a hostile file's.
    """
    windows, places = plan.windows(*grid), grid[0] * grid[1]
    tokens = windows.count * plan.tokens[0] * plan.tokens[1]
    # Windows that hang over the edge have places there as well, which are counted up to a grid more along each side.
    across = (windows.rows * windows.window[0], windows.columns * windows.window[1])
    room = min(across[0], 2 * grid[0]) * min(across[1], 2 * grid[1])
    rule = f"make no more semantic tokens than the {room} places of its windows on a grid of {grid[0]} x {grid[1]}"
    require(tokens <= room, "plan", f"{rule} (`tokens`, `window`)", f"{tokens}")
    most = max(MOST, 100 * places)
    for argument in ("window", "neighbourhood", "second", "recovery"):
        high, wide = getattr(plan, argument) or (0, 0)
        held = windows.count * high * wide
        rule = f"hold at most {most:,} places in the {windows.count} windows of a grid of {grid[0]} x {grid[1]}"
        require(held <= most, argument, rule, f"{high, wide}: {held:,}")


@dataclass(frozen=True)
class _Line:
    """Which places along one axis are taken, in pieces of `reach` each, and which of them are there.

    Attributes:
        place: The places, `(pieces * reach,)`; None if it is all of them, in order.
        inside: Which are to be looked at, `(pieces, reach)`; None if all are.
        pieces: How many pieces.
        reach: Places in a piece.
        filled: Whether every piece is known to have a place that is inside.
    """

    place: Array | None
    inside: Array | None
    pieces: int
    reach: int
    filled: bool = True


def _around(size: int, side: int, reach: int, edges: Edges, like: Array) -> _Line:
    """Pieces around the windows of an axis."""
    xp = array_namespace(like)
    count = -(-size // side)
    if edges == "inside":
        reach = min(reach, size)
    if reach == side and size == count * side:
        return _Line(None, None, count, reach)
    start = counting(count, like) * side - (reach - side) // 2
    last = (count - 1) * side - (reach - side) // 2
    if edges == "inside":
        place = xp.clip(start, 0, size - reach)[:, None] + counting(reach, like)[None, :]
        return _Line(_flat(place), None, count, reach)
    place = start[:, None] + counting(reach, like)[None, :]
    every = (reach - side) // 2 <= 0 and last + reach <= size
    there = None if every else (place >= 0) & (place < size)
    return _Line(_flat(xp.clip(place, 0, size - 1)), there, count, reach)


def _cells(size: int, side: int, to: int, like: Array) -> _Line:
    """Pieces that are cells of the windows of an axis."""
    xp = array_namespace(like)
    count = -(-size // side)
    spans = [_stop(cell, side, to) - cell * side // to for cell in range(to)]
    reach, whole = max(spans), size == count * side
    if side % to == 0 and whole:
        return _Line(None, None, count * to, reach)
    piece = counting(count * to, like)
    origin, cell = piece // to * side, piece % to
    start, stop = origin + cell * side // to, origin - (-(cell + 1) * side // to)
    place = start[:, None] + counting(reach, like)[None, :]
    there = None if whole and min(spans) == reach else (place < stop[:, None]) & (place < size)
    filled = (count - 1) * side + (to - 1) * side // to < size
    return _Line(_flat(xp.clip(place, 0, size - 1)), there, count * to, reach, filled)


def _stop(cell: int, side: int, to: int) -> int:
    return -(-(cell + 1) * side // to)


def _flat(place: Array) -> Array:
    return array_namespace(place).reshape(place, (place.shape[0] * place.shape[1],))


def _cut(map: Array, down: _Line, across: _Line) -> Array:
    """`(images, pieces down, reach down, pieces across, reach across, *rest)`."""
    xp = array_namespace(map)
    rows = map if down.place is None else take(map, down.place, axis=1)
    both = rows if across.place is None else take(rows, across.place, axis=2)
    return xp.reshape(both, (map.shape[0], down.pieces, down.reach, across.pieces, across.reach, *map.shape[3:]))


def _marks(valid: Array | None, down: _Line, across: _Line, like: Array) -> Array | None:
    """Which of the values that `_cut` gives are valid; None if all are."""
    if valid is None and down.inside is None and across.inside is None:
        return None
    xp = array_namespace(like)
    shape = (like.shape[0], down.pieces, down.reach, across.pieces, across.reach)
    marks = filled(shape, True, like, dtype=xp.bool) if valid is None else _cut(valid, down, across)
    if down.inside is not None:
        marks = marks & down.inside[None, :, :, None, None]
    return marks if across.inside is None else marks & across.inside[None, None, None, :, :]


def _swapped(cut: Array) -> Array:
    """Axes 2 and 3 exchanged: rows and columns of windows before, or after, those of places."""
    axes = (0, 1, 3, 2, *range(4, cut.ndim))
    return array_namespace(cut).permute_dims(cut, axes)


def _largest(cut: Array, marks: Array | None) -> Array:
    xp = array_namespace(cut)
    if marks is None:
        return xp.max(cut, axis=(2, 4))
    largest = xp.max(xp.where(marks, cut, -xp.inf), axis=(2, 4))
    return xp.where(xp.any(marks, axis=(2, 4)), largest, 0.0)


def _mean(cut: Array, marks: Array | None) -> Array:
    xp = array_namespace(cut)
    # In half precision a sum over a large map would lose its last places.
    wide = xp.astype(cut, xp.float32) if xp.finfo(cut.dtype).bits < 32 else cut
    if marks is None:
        return xp.astype(xp.mean(wide, axis=(2, 4)), cut.dtype)
    many = xp.sum(xp.astype(marks, wide.dtype), axis=(2, 4))
    return xp.astype(xp.sum(xp.where(marks, wide, 0.0), axis=(2, 4)) / xp.clip(many, 1.0), cut.dtype)


def _require_sides(sides: Sides, argument: str) -> None:
    pair = isinstance(sides, tuple) and len(sides) == 2 and all(is_whole(side, least=1) for side in sides)
    require(pair, argument, "be two whole numbers from 1 up, rows and columns", repr(sides))


def _require_area(sides: Sides, argument: str) -> None:
    _require_sides(sides, argument)
    require(sides[0] * sides[1] <= MOST, argument, f"have at most {MOST:,} places", repr(sides))


def _require_map(map: Array, windows: Partition, valid: Array | None) -> None:
    size = (windows.height, windows.width)
    rule = f"have {size[0]} rows and {size[1]} columns on axes 1 and 2"
    require(map.ndim >= 3 and tuple(map.shape[1:3]) == size, "map", rule, f"shape {tuple(map.shape)}")
    if valid is not None:
        require_marks(valid, "valid")
        wanted = tuple(map.shape[:3])
        require(tuple(valid.shape) == wanted, "valid", f"have shape {wanted}", f"shape {tuple(valid.shape)}")
