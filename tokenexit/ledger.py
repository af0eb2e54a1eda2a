"""What the tokens that left have left behind: their frozen predictions, and how deep they went.

DToP (ICCV 2023, section 3.2) finalises a token when it leaves: the class scores of its exit head are its result.
A ledger is a value: `record` returns a new one and changes nothing.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int

from tokenexit import scores
from tokenexit._array import Array, array_namespace, device, take_or
from tokenexit.errors import require
from tokenexit.tokens import Packing

__all__ = ["Ledger", "open_ledger", "record"]


@dataclass(frozen=True)
class Ledger:
    """The outcome of every slot of a batch, as far as it is known.

    Attributes:
        logits: Frozen class scores; zero while the token runs.
        label: Frozen predicted class; -1 while the token runs.
        score: Confidence that the token left with; zero while it runs.
        depth: How many blocks the token has run through; zero while it runs.
    """

    logits: Float[Array, "images slots classes"]
    label: Int[Array, "images slots"]
    score: Float[Array, "images slots"]
    depth: Int[Array, "images slots"]


def open_ledger(logits: Float[Array, "tokens classes"], packing: Packing, /) -> Ledger:
    """An empty ledger for the batch of `packing`.

    Args:
        logits: Class scores whose class count, dtype and device the ledger takes.
        packing: The receipt of any row of the batch.

    Returns:
        A ledger in which nothing has settled.

    Raises:
        TokenExitError: If `logits` is not two-dimensional.
    """
    _require_logits(logits, packing)
    xp = array_namespace(logits)
    shape = (packing.images, packing.slots)
    there = device(logits)
    return Ledger(
        logits=xp.zeros((*shape, logits.shape[1]), dtype=logits.dtype, device=there),
        label=xp.full(shape, -1, dtype=packing.index.dtype, device=there),
        score=xp.zeros(shape, dtype=xp.float32, device=there),
        depth=xp.zeros(shape, dtype=packing.index.dtype, device=there),
    )


def record(
    ledger: Ledger,
    packing: Packing,
    leave: Bool[Array, "tokens"],
    logits: Float[Array, "tokens classes"],
    /,
    *,
    depth: int,
) -> Ledger:
    """Settle the tokens that leave.

    Args:
        ledger: The ledger so far.
        packing: The receipt of the present row.
        leave: Which of its tokens leave.
        logits: The class scores of all its tokens.
        depth: How many blocks they have run through.

    Returns:
        The ledger with the leavers' predictions and depth.

    Raises:
        TokenExitError: If `leave` or `logits` do not hold the tokens of `packing`.
    """
    _require_logits(logits, packing)
    require(
        tuple(leave.shape) == tuple(packing.index.shape),
        "leave",
        f"have one entry for each of the {packing.index.shape[0]} tokens",
        f"shape {tuple(leave.shape)}",
    )
    xp = array_namespace(logits)
    slots = packing.images * packing.slots
    running = xp.reshape(packing.running, (slots,))
    left = take_or(leave, packing.rank, running, xp.zeros_like(running))

    def settle(row: Array, settled: Array) -> Array:
        flat = xp.reshape(settled, (slots, *settled.shape[2:]))
        return xp.reshape(take_or(row, packing.rank, left, flat), settled.shape)

    return Ledger(
        logits=settle(logits, ledger.logits),
        label=settle(xp.argmax(logits, axis=-1), ledger.label),
        score=settle(scores.confidence(logits), ledger.score),
        depth=settle(xp.full_like(packing.index, depth), ledger.depth),
    )


def _require_logits(logits: Array, packing: Packing) -> None:
    require(
        logits.ndim == 2 and logits.shape[0] == packing.index.shape[0],
        "logits",
        f"have shape (tokens, classes) with {packing.index.shape[0]} tokens",
        f"shape {tuple(logits.shape)}",
    )
