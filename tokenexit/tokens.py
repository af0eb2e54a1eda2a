"""The bookkeeping of ragged batches: which tokens still run, and how they go back where they belong.

A batch starts as `(images, slots)`: every image has the same slots, prefix tokens among them. The tokens that still
run lie in one packed row, image after image, in the order of their slots. A `Packing` is the receipt for that row.
"""

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Bool, Int, Shaped

from tokenexit._array import Array, array_namespace, take_or
from tokenexit.errors import require

__all__ = ["Packing", "gather", "pack", "repack", "scatter"]


@dataclass(frozen=True)
class Packing:
    """Receipt for a packed row of tokens.

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

    @cached_property
    def image(self) -> Int[Array, "tokens"]:
        """Image of every token of the row."""
        return self.index // self.slots

    @cached_property
    def slot(self) -> Int[Array, "tokens"]:
        """Slot of every token of the row within its image."""
        return self.index % self.slots

    @cached_property
    def lengths(self) -> Int[Array, "images"]:
        """How many tokens of each image the row holds."""
        xp = array_namespace(self.running)
        return xp.sum(xp.astype(self.running, self.index.dtype), axis=1)

    @cached_property
    def rank(self) -> Int[Array, "places"]:
        """Row of every running slot of the flattened batch; meaningless for the slots that do not run."""
        xp = array_namespace(self.running)
        running = xp.reshape(self.running, (self.images * self.slots,))
        return xp.cumulative_sum(xp.astype(running, self.index.dtype)) - 1


def pack(running: Bool[Array, "images slots"], /) -> Packing:
    """Receipt for the row that holds the slots marked in `running`.

    Args:
        running: Which slots run.

    Returns:
        The receipt.

    Raises:
        TokenExitError: If `running` is not two-dimensional.
    """
    require(running.ndim == 2, "running", "have shape (images, slots)", f"shape {tuple(running.shape)}")
    xp = array_namespace(running)
    (index,) = xp.nonzero(xp.reshape(running, (running.shape[0] * running.shape[1],)))
    return Packing(running, index)


def gather(x: Shaped[Array, "images slots *rest"], packing: Packing, /) -> Shaped[Array, "tokens *rest"]:
    """The packed row of the running tokens' values.

    Args:
        x: A value for every slot of the batch.
        packing: The receipt.

    Returns:
        The values of the running tokens, in the order of the row.

    Raises:
        TokenExitError: If `x` does not start with the images and slots of `packing`.
    """
    _require_batch(x, "x", packing)
    xp = array_namespace(x)
    flat = xp.reshape(x, (packing.images * packing.slots, *x.shape[2:]))
    return xp.take(flat, packing.index, axis=0)


def scatter(
    row: Shaped[Array, "tokens *rest"], packing: Packing, /, *, into: Shaped[Array, "images slots *rest"]
) -> Shaped[Array, "images slots *rest"]:
    """A copy of `into` in which the running slots have the values of `row`: the inverse of `gather`.

    Args:
        row: A value for every running token, in the order of the row.
        packing: The receipt.
        into: What the other slots hold.

    Returns:
        The restored batch.

    Raises:
        TokenExitError: If `row` does not hold the tokens of `packing`, or `into` not its images and slots.
    """
    tokens = packing.index.shape[0]
    require(
        row.ndim >= 1 and row.shape[0] == tokens,
        "row",
        f"hold {tokens} tokens on its first axis",
        f"shape {tuple(row.shape)}",
    )
    _require_batch(into, "into", packing)
    require(
        tuple(into.shape[2:]) == tuple(row.shape[1:]),
        "into",
        f"end in the shape of one token, {tuple(row.shape[1:])}",
        f"shape {tuple(into.shape)}",
    )
    xp = array_namespace(row, into)
    slots = packing.images * packing.slots
    running = xp.reshape(packing.running, (slots,))
    flat = take_or(row, packing.rank, running, xp.reshape(into, (slots, *into.shape[2:])))
    return xp.reshape(flat, into.shape)


def repack(packing: Packing, stay: Bool[Array, "tokens"], /) -> tuple[Packing, Int[Array, "kept"]]:
    """Drop tokens from a packed row.

    Args:
        packing: The receipt of the present row.
        stay: Which of its tokens stay.

    Returns:
        The receipt of the shorter row, and which rows of the present one it takes: `new = old[rows]`, the one
        gather of an exit point. The new receipt still speaks of the slots of the original batch.

    Raises:
        TokenExitError: If `stay` does not hold the tokens of `packing`.
    """
    xp = array_namespace(stay)
    running = scatter(stay, packing, into=xp.zeros_like(packing.running))
    (rows,) = xp.nonzero(stay)
    return Packing(running, xp.take(packing.index, rows)), rows


def _require_batch(x: Array, argument: str, packing: Packing) -> None:
    require(
        tuple(x.shape[:2]) == (packing.images, packing.slots),
        argument,
        f"have {packing.images} images of {packing.slots} slots on its first axes",
        f"shape {tuple(x.shape)}",
    )
