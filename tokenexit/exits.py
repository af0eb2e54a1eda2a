"""The exit point: which tokens leave after a block, and what they leave behind.

    decision = exits.decide(policy, output, receipt, ledger, previous, grid=(16, 16), prefix=1, exit=0)
    ledger = exits.settle(ledger, receipt, ~decision.stay, output, depth=3, score=decision.confidence)

Both layouts of `tokenexit.tokens` are taken; results are in the layout of the receipt. Blocks, heads and the gather of
those that stay are the adapter's.
"""

from dataclasses import dataclass, replace

from jaxtyping import Bool, Float, Int

from tokenexit import cells, ledger, scores, tokens
from tokenexit._array import Array, array_namespace, take
from tokenexit._lazy import lazy
from tokenexit.errors import require
from tokenexit.ledger import Ledger
from tokenexit.policies import Evidence, Policy
from tokenexit.tokens import Receipt, Selection

__all__ = ["Decision", "HeadOutput", "decide", "everywhere", "settle"]


@dataclass(frozen=True)
class HeadOutput:
    """Output of a head for the tokens that run, in the layout of their receipt; or for all slots of a batch.

    Attributes:
        logits: Class scores before softmax.
        class_scores: Scores of a mask head, which are not a softmax's (`scores.mask_scores`), for a policy.
        mask_logits: Masks of a mask head.
        presence_logits: Presence of every class in every image, by a mask head; of an image without tokens finite, and
            of no meaning.
    """

    logits: Float[Array, "*layout classes"]
    class_scores: Float[Array, "*layout classes"] | None = None
    mask_logits: Float[Array, "*layout classes"] | None = None
    presence_logits: Float[Array, "images classes"] | None = None

    @lazy
    def confidence(self) -> Float[Array, "*layout"]:
        """Confidence of every token: the greatest of its class scores, or `scores.confidence` of its logits."""
        if self.class_scores is None:
            return scores.confidence(self.logits)
        xp = array_namespace(self.class_scores)
        return xp.max(self.class_scores, axis=-1)


@dataclass(frozen=True)
class Decision:
    """Decision of an exit point, in the layout of the receipt.

    Attributes:
        stay: Which tokens run on.
        pinned: Which entries must not leave for lack of room: prefix tokens and cell centres.
        confidence: Confidence of every token.
        label: Predicted class of every token.
    """

    stay: Bool[Array, "*layout"]
    pinned: Bool[Array, "*layout"]
    confidence: Float[Array, "*layout"]
    label: Int[Array, "*layout"]


def decide(
    policy: Policy,
    output: HeadOutput,
    receipt: Receipt,
    book: Ledger,
    previous: Int[Array, "exits tokens"],
    /,
    *,
    grid: tuple[int, int],
    prefix: int = 0,
    exit: int = 0,
    cell: int | None = None,
) -> Decision:
    """Decide which tokens leave at an exit point.

    When all patches of an image leave, it is finished: prefix tokens, and centres of its cells, leave with them.

    Args:
        policy: The exit policy.
        output: Output of the exit head; gradients do not pass a decision, so it may be detached.
        receipt: The receipt of the tokens that run.
        book: What tokens have left behind so far.
        previous: Classes that the earlier exit heads have predicted for the tokens that run, in one row.
        grid: Height and width of the patch grid.
        prefix: Tokens of an image that come before its patches, and run as long as any of these does.
        exit: Which of the exit points this is, from 0.
        cell: Side of the cells of which the centres run on and represent the others (`tokenexit.cells`); None without
            cells.

    Returns:
        The decision.

    Raises:
        TokenExitError: If shapes do not fit the receipt, or the evidence lacks something that the policy reads.
    """
    evidence = _evidence(output, receipt, book, previous, grid=grid, prefix=prefix, exit=exit)
    xp = array_namespace(evidence.eligible)
    leave, patch = policy(evidence), evidence.eligible
    running = tokens.any_of_image(xp.reshape(patch & ~leave, receipt.layout), receipt)
    pinned = ~patch
    if cell is not None:
        centre = cells.is_cell_centre(receipt.slot - prefix, grid=grid, side=cell)
        leave, pinned = leave & ~centre, pinned | centre
    stay = ~leave & take(running, receipt.image)
    if evidence.valid is not None:
        stay = stay & evidence.valid
    return Decision(*(xp.reshape(x, receipt.layout) for x in (stay, pinned, evidence.confidence, evidence.label)))


def _evidence(
    output: HeadOutput,
    receipt: Receipt,
    book: Ledger,
    previous: Array,
    *,
    grid: tuple[int, int],
    prefix: int,
    exit: int,
) -> Evidence:
    given = output.logits if output.class_scores is None else output.class_scores
    fits = tuple(given.shape[:-1]) == receipt.layout
    rule = f"have the layout of the receipt, {receipt.layout}, and one more axis"
    require(fits, "output", rule, f"shape {tuple(given.shape)}")
    xp = array_namespace(given)
    row = xp.reshape(given, (receipt.index.shape[0], given.shape[-1]))
    valid = xp.reshape(receipt.valid, (row.shape[0],)) if isinstance(receipt, Selection) else None
    return Evidence(
        row if output.class_scores is None else None,
        class_scores=None if output.class_scores is None else row,
        image=receipt.image,
        images=receipt.images,
        grid=grid,
        position=receipt.slot - prefix if prefix else receipt.slot,
        valid=valid,
        protected=receipt.slot < prefix if prefix else None,
        exit=exit,
        previous=previous,
        settled_label=book.label[:, prefix:],
        settled_score=book.score[:, prefix:],
    )


def everywhere(output: HeadOutput, receipt: Receipt, book: Ledger, /) -> HeadOutput:
    """Output of a head for all slots: its own where tokens run, and elsewhere what the ledger holds.

    Args:
        output: Output of the head for the tokens that run.
        receipt: Their receipt.
        book: What the others have left behind; it keeps masks if they are wanted.

    Returns:
        Class scores by slot. Masks likewise if the ledger keeps them: presence is the head's own in images of which it
        read any token.

    Raises:
        TokenExitError: If `output` is not in the layout of `receipt`, or has no masks for a ledger that keeps them.
    """
    logits = tokens.scatter(output.logits, receipt, into=book.logits)
    masks, presence = _masks(output, receipt, book)
    return HeadOutput(logits, mask_logits=masks, presence_logits=presence)


def settle(
    book: Ledger,
    receipt: Receipt,
    leave: Bool[Array, "*layout"],
    output: HeadOutput,
    /,
    *,
    depth: int,
    score: Float[Array, "*layout"] | None = None,
    features: Float[Array, "*layout dim"] | None = None,
) -> Ledger:
    """Freeze the outputs of the tokens that leave.

    Args:
        book: The ledger so far.
        receipt: The receipt of the tokens that run.
        leave: Which of them leave.
        output: Output of the head that reads them here.
        depth: Blocks that they have run through.
        score: Their confidence; that of `output` if left out.
        features: Their features, if the ledger keeps them.

    Returns:
        The ledger with their outcome, and with the latest masks if it keeps these.

    Raises:
        TokenExitError: As `ledger.record`; or if `output` has no masks for a ledger that keeps them.
    """
    score = output.confidence if score is None else score
    settled = ledger.record(book, receipt, leave, output.logits, depth=depth, score=score, features=features)
    masks, presence = _masks(output, receipt, book)
    return replace(settled, mask_logits=masks, presence_logits=presence)


def _masks(output: HeadOutput, receipt: Receipt, book: Ledger) -> tuple[Array | None, Array | None]:
    """Masks by slot and presence by image: the latest of each."""
    if book.mask_logits is None:
        return None, None
    require(output.mask_logits is not None, "output", "have masks for a ledger that keeps them", "none")
    xp = array_namespace(output.mask_logits)
    ran = receipt.lengths > 0
    return (
        tokens.scatter(output.mask_logits, receipt, into=book.mask_logits),
        xp.where(ran[:, None], output.presence_logits, book.presence_logits),
    )
