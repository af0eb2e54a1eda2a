"""The bookkeeping: which tokens still run, and how they go back where they belong.

A batch starts as `(images, slots)`: every image has the same slots, prefix tokens among them. The tokens that run lie

- in one packed row, image after image, in the order of their slots: a `Packing` is the receipt for it; or
- in the static layout, `(images, capacity)`, so many entries for every image, some of them not valid: a `Selection`.

`gather` and `scatter` are inverse to each other by either receipt. Inside, scatter is a gather by rank, so that both
are made of standard operations, differentiate, and compile.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int, Shaped

from tokenexit._array import (
    Array,
    array_namespace,
    counting,
    require_marks,
    searchsorted,
    take,
    take_along_axis,
    take_or,
    written,
)
from tokenexit._lazy import lazy
from tokenexit.errors import require

__all__ = [
    "Packing",
    "Receipt",
    "Selection",
    "gather",
    "pack",
    "repack",
    "reselect",
    "restrict",
    "room",
    "scatter",
    "select",
]


@dataclass(frozen=True)
class Packing:
    """Receipt for a packed row of tokens. Its shapes depend on the data.

    Attributes:
        running: Which slot of which image the row holds.
        index: Slot of every token of the row in the flattened batch, `image * slots + slot`, ascending.
    """

    running: Bool[Array, "images slots"]
    index: Int[Array, "tokens"]

    @property
    def images(self) -> int:
        """How many images the batch has, those without any running token included."""
        return self.running.shape[0]

    @property
    def slots(self) -> int:
        """How many slots an image has."""
        return self.running.shape[1]

    @property
    def layout(self) -> tuple[int, ...]:
        """Shape of a value for every entry: `(tokens,)`."""
        return tuple(self.index.shape)

    @property
    def is_full(self) -> bool:
        """Whether the row holds every slot of every image."""
        return self.index.shape[0] == self.images * self.slots

    @lazy
    def image(self) -> Int[Array, "tokens"]:
        """Image of every token of the row."""
        return self.index // self.slots

    @lazy
    def slot(self) -> Int[Array, "tokens"]:
        """Slot of every token of the row within its image."""
        return self.index % self.slots

    @lazy
    def lengths(self) -> Int[Array, "images"]:
        """How many tokens of each image the row holds."""
        xp = array_namespace(self.running)
        return xp.sum(xp.astype(self.running, self.index.dtype), axis=1)

    @lazy
    def offsets(self) -> Int[Array, "images_and_one"]:
        """Where each image begins in the row, and where the last one ends: what attention calls cu_seqlens."""
        xp = array_namespace(self.lengths)
        return xp.cumulative_sum(self.lengths, include_initial=True)

    @lazy
    def rank(self) -> Int[Array, "places"]:
        """Row of every running slot of the flattened batch; meaningless for the slots that do not run."""
        xp = array_namespace(self.running)
        running = xp.reshape(self.running, (self.images * self.slots,))
        return xp.cumulative_sum(xp.astype(running, self.index.dtype)) - 1


@dataclass(frozen=True)
class Selection:
    """Receipt for the static layout: the same number of entries for every image, so that shapes are known beforehand.

    Attributes:
        slot_of: Slot of every entry within its image, ascending where valid; a slot of no meaning elsewhere.
        valid: Which entries hold a token; in every image they come first.
        slots: How many slots an image has.
        overflow: How many tokens of each image had to leave because there was no room, at this selection.
    """

    slot_of: Int[Array, "images capacity"]
    valid: Bool[Array, "images capacity"]
    slots: int
    overflow: Int[Array, "images"]

    @property
    def images(self) -> int:
        """How many images the batch has."""
        return self.valid.shape[0]

    @property
    def layout(self) -> tuple[int, ...]:
        """Shape of a value for every entry: `(images, capacity)`."""
        return tuple(self.valid.shape)

    @lazy
    def image(self) -> Int[Array, "entries"]:
        """Image of every entry, in one row."""
        xp = array_namespace(self.slot_of)
        images, capacity = self.layout
        of_image = xp.reshape(counting(images, self.slot_of), (images, 1))
        return xp.reshape(xp.broadcast_to(of_image, (images, capacity)), (images * capacity,))

    @lazy
    def slot(self) -> Int[Array, "entries"]:
        """Slot of every entry within its image, in one row."""
        xp = array_namespace(self.slot_of)
        return xp.reshape(self.slot_of, (self.slot_of.shape[0] * self.slot_of.shape[1],))

    @lazy
    def index(self) -> Int[Array, "entries"]:
        """Slot of every entry in the flattened batch, `image * slots + slot`."""
        return self.image * self.slots + self.slot

    @lazy
    def lengths(self) -> Int[Array, "images"]:
        """How many tokens of each image are held."""
        xp = array_namespace(self.valid)
        return xp.sum(xp.astype(self.valid, self.slot_of.dtype), axis=1)

    @lazy
    def rank(self) -> Int[Array, "places"]:
        """Entry of every running slot of the flattened batch; meaningless for the slots that do not run."""
        return self._found[0]

    @lazy
    def running(self) -> Bool[Array, "images slots"]:
        """Which slot of which image the entries hold."""
        xp = array_namespace(self.valid)
        return xp.reshape(self._found[1], (self.images, self.slots))

    @lazy
    def _found(self) -> tuple[Array, Array]:
        xp = array_namespace(self.slot_of)
        places, entries = self.images * self.slots, self.index.shape[0]
        wanted = counting(places, self.slot_of)
        if entries == 0:
            return wanted, wanted < 0
        # One slot more than there are, for what is not valid: so all entries together ascend.
        valid = xp.reshape(self.valid, (entries,))
        key = self.image * (self.slots + 1) + xp.where(valid, self.slot, self.slots)
        wanted = wanted + wanted // self.slots
        rank = searchsorted(key, wanted)
        rank = xp.where(rank < entries, rank, 0)
        return rank, take(key, rank) == wanted


Receipt = Packing | Selection
"""Either of the receipts."""


def pack(running: Bool[Array, "images slots"], /) -> Packing:
    """Receipt for the row that holds the slots marked in `running`.

    Args:
        running: Which slots run.

    Returns:
        The receipt.

    Raises:
        TokenExitError: If `running` is not two-dimensional.
    """
    _require_two(running, "running")
    xp = array_namespace(running)
    (index,) = xp.nonzero(xp.reshape(running, (running.shape[0] * running.shape[1],)))
    return Packing(running, index)


def repack(
    packing: Packing, stay: Bool[Array, "tokens"], /, *, count: int | None = None
) -> tuple[Packing, Int[Array, "kept"]]:
    """Drop tokens from a packed row.

    Args:
        packing: The receipt of the present row.
        stay: Which of its tokens stay.
        count: How many they are, if that is known: then an accelerator is not waited for to learn it.

    Returns:
        The receipt of the shorter row, and which rows of the present one it takes: `new = old[rows]`, the one
        gather of an exit point. The new receipt still refers to the slots of the original batch.

    Raises:
        TokenExitError: If `stay` does not hold the tokens of `packing`.
    """
    xp = array_namespace(stay)
    require_marks(stay, "stay")
    return restrict(packing, scatter(stay, packing, into=xp.zeros_like(packing.running)), count=count)


def restrict(
    packing: Packing, running: Bool[Array, "images slots"], /, *, count: int | None = None
) -> tuple[Packing, Int[Array, "kept"]]:
    """Drop tokens from a packed row, by the slots that run on.

    Args:
        packing: The receipt of the present row.
        running: Which slots run on, all of them in the row.
        count: How many they are, if that is known: then an accelerator is not waited for to learn it.

    Returns:
        What `repack` returns.

    Raises:
        TokenExitError: If `running` is not boolean, or not of the shape of `packing.running`.
    """
    _require_two(running, "running")
    _require_batch(running, "running", packing)
    xp = array_namespace(running)
    stay = xp.reshape(running, (packing.images * packing.slots,))
    rows = _marked(stay if packing.is_full else take(stay, packing.index), count)
    return Packing(running, rows if packing.is_full else take(packing.index, rows)), rows


def select(
    stay: Bool[Array, "images slots"], score: Float[Array, "images slots"], /, *, capacity: int
) -> tuple[Selection, Bool[Array, "images slots"]]:
    """Receipt for the static layout that holds the slots marked in `stay`, as far as there is room.

    If an image has more of them than the capacity, those with the highest score are the surplus: they must leave too,
    with their present prediction, and are counted. Of equal scores the later slot leaves.

    Args:
        stay: Which slots are to run.
        score: How confident each is; NaN, as minus infinity, is the last to be surplus. Prefix tokens, which must
            stay, are given minus infinity.
        capacity: Entries for every image.

    Returns:
        The receipt, and which slots are surplus.

    Raises:
        TokenExitError: If the arrays are not two-dimensional and of one shape, or there are not so many slots.
    """
    picked, valid, surplus, overflow = _fit(stay, score, capacity, "slots")
    return Selection(picked, valid, stay.shape[1], overflow), surplus


def reselect(
    selection: Selection, stay: Bool[Array, "images held"], score: Float[Array, "images held"], /, *, capacity: int
) -> tuple[Selection, Int[Array, "images capacity"], Bool[Array, "images held"]]:
    """Select from what is selected already.

    Args:
        selection: The receipt of the present layout.
        stay: Which of its entries are to run on; those that are not valid never do.
        score: How confident each is, as in `select`.
        capacity: Entries for every image, from now on.

    Returns:
        The receipt of the smaller layout, which still refers to the slots of the original batch; which entry of the
        present layout each of its entries takes; and which present entries are surplus.

    Raises:
        TokenExitError: If the arrays do not have the layout of `selection`, or it has fewer entries than `capacity`.
    """
    for name, array in (("stay", stay), ("score", score)):
        require(
            tuple(array.shape) == selection.layout,
            name,
            f"have the layout of the selection, {selection.layout}",
            f"shape {tuple(array.shape)}",
        )
    entry, valid, surplus, overflow = _fit(stay & selection.valid, score, capacity, "entries")
    slot_of = take_along_axis(selection.slot_of, entry, axis=1)
    return Selection(slot_of, valid, selection.slots, overflow), entry, surplus


def room(fraction: float, /, *, slots: int, prefix: int) -> int:
    """Entries for a fraction of the slots of an image: at least the prefix tokens and one patch.

    Args:
        fraction: The fraction.
        slots: Slots of an image.
        prefix: Prefix tokens among them.
    """
    return max(min(prefix + 1, slots), round(fraction * slots))


def gather(x: Shaped[Array, "images slots *rest"], receipt: Receipt, /) -> Shaped[Array, "..."]:
    """The running tokens' values, in the layout of the receipt.

    Args:
        x: A value for every slot of the batch.
        receipt: The receipt.

    Returns:
        `(tokens, *rest)` for a `Packing`; `(images, capacity, *rest)` for a `Selection`, in which entries that are
        not valid hold the value of some slot.

    Raises:
        TokenExitError: If `x` does not start with the images and slots of `receipt`.
    """
    _require_batch(x, "x", receipt)
    xp = array_namespace(x)
    flat = xp.reshape(x, (receipt.images * receipt.slots, *x.shape[2:]))
    return xp.reshape(take(flat, receipt.index, axis=0), (*receipt.layout, *x.shape[2:]))


def scatter(
    values: Shaped[Array, "..."], receipt: Receipt, /, *, into: Shaped[Array, "images slots *rest"]
) -> Shaped[Array, "images slots *rest"]:
    """A copy of `into` in which the running slots have the gathered values: the inverse of `gather`.

    With the batch itself as `into`, the slots that do not run keep what they have: the carry of SViT (WACV 2024).

    Args:
        values: A value for every entry, in the layout of the receipt.
        receipt: The receipt.
        into: What the other slots hold.

    Returns:
        The restored batch.

    Raises:
        TokenExitError: If `values` does not have the layout of `receipt`, or `into` not its images and slots.
    """
    entries = len(receipt.layout)
    require(
        tuple(values.shape[:entries]) == receipt.layout,
        "values",
        f"start with the layout of the receipt, {receipt.layout}",
        f"shape {tuple(values.shape)}",
    )
    rest = tuple(values.shape[entries:])
    _require_batch(into, "into", receipt)
    require(
        tuple(into.shape[2:]) == rest, "into", f"end in the shape of one token, {rest}", f"shape {tuple(into.shape)}"
    )
    xp = array_namespace(values, into)
    slots = receipt.images * receipt.slots
    flat, other = xp.reshape(values, (receipt.index.shape[0], *rest)), xp.reshape(into, (slots, *rest))
    if isinstance(receipt, Packing):
        if receipt.is_full:
            kind = xp.result_type(values, into)
            return xp.reshape(flat if flat.dtype == kind else xp.astype(flat, kind), into.shape)
        found = written(flat, receipt.index, other)
        if found is not None:
            return xp.reshape(found, into.shape)
    running = xp.reshape(receipt.running, (slots,))
    return xp.reshape(take_or(flat, receipt.rank, running, other), into.shape)


def _marked(marks: Array, count: int | None) -> Array:
    """Places of the marks of a row."""
    xp = array_namespace(marks)
    if count is None:
        (places,) = xp.nonzero(marks)
        return places
    counted = xp.cumulative_sum(xp.astype(marks, counting(0, marks).dtype))
    return searchsorted(counted, counting(count, counted) + 1)


def _fit(stay: Array, score: Array, capacity: int, of: str) -> tuple[Array, Array, Array, Array]:
    """Which places fill the entries of every image, which entries are filled, which places had no room, how many."""
    _require_two(stay, "stay")
    require(
        tuple(score.shape) == tuple(stay.shape),
        "score",
        f"have the shape of `stay`, {tuple(stay.shape)}",
        f"shape {tuple(score.shape)}",
    )
    floating = array_namespace(score).isdtype(score.dtype, "real floating")
    require(floating, "score", "be of a floating dtype", str(score.dtype))
    images, places = stay.shape
    require(0 <= capacity <= places, "capacity", f"be from 0 to the {places} {of} of an image", capacity)
    xp = array_namespace(stay, score)
    many = counting(0, stay).dtype
    if images * places == 0:
        nothing = xp.astype(xp.zeros_like(stay), many)[:, :capacity]
        return nothing, nothing > 0, stay, xp.sum(xp.astype(stay, many), axis=1)
    # Of those that stay, the `capacity` least confident have room: by score, and of equal ones by place.
    score = xp.where(xp.isnan(score), -xp.inf, score)
    order = xp.argsort(xp.where(stay, score, xp.inf), axis=1, stable=True)
    # Counted are those that stay alone: others may lie between those that are certain without bound.
    before = xp.cumulative_sum(xp.astype(take_along_axis(stay, order, axis=1), many), axis=1)
    rank = take_along_axis(before, xp.argsort(order, axis=1), axis=1)
    room = stay & (rank <= capacity)
    number = xp.cumulative_sum(xp.astype(room, many), axis=1)
    # The j-th entry takes the first place at which j + 1 have been counted; over all images, the counts ascend.
    image = xp.reshape(counting(images, stay), (images, 1))
    entry = xp.reshape(counting(capacity, stay), (1, capacity))
    counted = xp.reshape(number + image * (places + 1), (images * places,))
    wanted = xp.reshape(image * (places + 1) + entry + 1, (images * capacity,))
    picked = xp.reshape(searchsorted(counted, wanted), (images, capacity)) - image * places
    filled = entry < number[:, -1:]
    surplus = stay & ~room
    overflow = xp.sum(xp.astype(surplus, many), axis=1)
    return xp.where(filled, xp.astype(picked, many), 0), filled, surplus, overflow


def _require_two(marks: Array, argument: str) -> None:
    require_marks(marks, argument)
    require(marks.ndim == 2, argument, "have shape (images, slots)", f"shape {tuple(marks.shape)}")


def _require_batch(x: Array, argument: str, receipt: Receipt) -> None:
    require(
        tuple(x.shape[:2]) == (receipt.images, receipt.slots),
        argument,
        f"have {receipt.images} images of {receipt.slots} slots on its first axes",
        f"shape {tuple(x.shape)}",
    )
