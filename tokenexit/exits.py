"""The exit point: which tokens leave after a block, and what they leave behind.

    book = exits.update(book, receipt, head_output)
    decision = exits.decide(policy, book, receipt.running, labels, grid=(16, 16), exit=0)
    book = ledger.freeze(book, receipt.running & ~decision.stay, depth=3)

Both layouts of `tokenexit.tokens` are taken; a decision is made on all slots of all images: of a fixed shape, so that
it is one program. Blocks, heads and the gather of those that stay are the adapter's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxtyping import Bool, Float, Int

from tokenexit import cells, ledger, tokens
from tokenexit._array import Array, array_namespace, counting, filled, require_marks
from tokenexit._lazy import lazy
from tokenexit.carries import Carry, Feature, Translated
from tokenexit.errors import require
from tokenexit.ledger import Ledger
from tokenexit.merging import Merged, spread
from tokenexit.policies import Evidence, Policy
from tokenexit.tokens import Receipt

__all__ = ["Decision", "HeadOutput", "agree", "begin", "carried", "decide", "update"]


@dataclass(frozen=True)
class HeadOutput:
    """Output of a head for the tokens that run, in the layout of their receipt; or for all slots of a batch.

    Attributes:
        logits: Class scores before softmax; of no classes, by a head that gives none.
        class_scores: Scores of a mask head, which are not a softmax's (`scores.mask_scores`), for a policy.
        mask_logits: Masks of a mask head.
        presence_logits: Presence of every class in every image, by a mask head; of an image without tokens finite, and
            of no meaning.
        features: The tokens as later blocks would leave them, by a head that translates: one after the other along the
            channels, for each block at which the tokens are read.
        error: Error that a head which translates foretells for them, relative to each channel's variance; of several
            blocks the greatest.
    """

    logits: Float[Array, "*layout classes"]
    class_scores: Float[Array, "*layout classes"] | None = None
    mask_logits: Float[Array, "*layout classes"] | None = None
    presence_logits: Float[Array, "images classes"] | None = None
    features: Float[Array, "*layout channels"] | None = None
    error: Float[Array, "*layout"] | None = None


@dataclass(frozen=True)
class Decision:
    """Decision of an exit point, by slot and by patch.

    Attributes:
        stay: Which slots run on; none that does not run.
        confidence: Confidence of every patch, as it was last read; without classes, the foretold error times minus one.
        label: Predicted class of every patch, likewise; without classes, -1.
        centre: Which places of the grid are cell centres; None without cells.
    """

    stay: Bool[Array, "images slots"]
    confidence: Float[Array, "images patches"]
    label: Int[Array, "images patches"]
    centre: Bool[Array, "patches"] | None = None

    @lazy
    def certain(self) -> Float[Array, "images slots"]:
        """Score by which tokens leave for lack of room, the highest first: the confidence.

        Minus infinity for those that must not: prefix tokens and cell centres.
        """
        xp, found = array_namespace(self.confidence), self.confidence
        if self.centre is not None:
            found = xp.where(self.centre[None, :], -xp.inf, found)
        prefix = self.stay.shape[1] - found.shape[1]
        if prefix == 0:
            return found
        least = filled((found.shape[0], prefix), -xp.inf, found, dtype=found.dtype)
        return xp.concat([least, found], axis=1)


def decide(
    policy: Policy,
    book: Ledger,
    running: Bool[Array, "images slots"],
    previous: Sequence[Int[Array, "images patches"]] = (),
    /,
    *,
    grid: tuple[int, int],
    exit: int = 0,
    cell: int | None = None,
    merged: Merged | None = None,
) -> Decision:
    """Decide which tokens leave at an exit point.

    It works on all slots of all images, so that shapes do not depend on the data. When all patches of an image leave,
    it is finished: prefix tokens, and centres of its cells, leave with them.

    Args:
        policy: The exit policy.
        book: The outcome of every slot, that of this exit head included (`update`). A decision has no gradient.
        running: Which slots run. Those that come before the patches of the grid are prefix tokens, and run as long as
            any of these does.
        previous: Classes that the earlier exit heads have predicted (`Decision.label`), first exit first.
        grid: Height and width of the patch grid.
        exit: Which of the exit points this is, from 0.
        cell: Side of the cells of which the centres run on and represent the others (`tokenexit.cells`); None without
            cells.
        merged: Which tokens have merged (`tokenexit.merging`), if any have. The outcome of an owner is that of all its
            tokens, and it leaves only if all would; `running` are the owners alone.

    Returns:
        The decision.

    Raises:
        TokenExitError: If the shapes do not fit one another, or the evidence lacks something that the policy reads.
    """
    require(merged is None or cell is None, "cell", "be None where tokens have merged", cell)
    evidence, prefix = _evidence(book, running, previous, grid=grid, exit=exit, merged=merged)
    xp, shape = array_namespace(running), (running.shape[0], grid[0] * grid[1])
    leave = policy(evidence)
    # Those that leave are among those that run: the rest is what the two differ by.
    remain = xp.reshape(evidence.eligible ^ leave, shape)
    stay, centre = remain, None
    if prefix or cell is not None:
        runs = xp.any(remain, axis=1, keepdims=True)
        if cell is not None:
            centre = cells.is_cell_centre(counting(shape[1], remain), grid=grid, side=cell)
            stay = stay | (centre[None, :] & runs & running[:, prefix:])
        if prefix:
            stay = xp.concat([xp.broadcast_to(runs, (shape[0], prefix)), stay], axis=1)
    certain, label = _outcome(evidence)
    return Decision(stay, xp.reshape(certain, shape), xp.reshape(label, shape), centre)


def agree(
    policy: Policy,
    book: Ledger,
    running: Bool[Array, "images slots"],
    previous: Sequence[Int[Array, "images patches"]] = (),
    /,
    *,
    grid: tuple[int, int],
    exit: int = 0,
    merged: Merged | None = None,
) -> tuple[Bool[Array, "images slots"], Int[Array, "images slots"]]:
    """Mark the tokens that a policy would let leave: for a merge by agreement, at which none does.

    Args:
        policy: The policy.
        book: As for `decide`, as are the others.
        running: Which slots run.
        previous: Classes that the earlier exit heads have predicted.
        grid: Height and width of the patch grid.
        exit: How many exit points were before.
        merged: Which tokens have merged, if any have.

    Returns:
        The marks, at all tokens of an entry, and the predicted classes, -1 for prefix tokens; -1 for all, if the policy
        asks for no classes.

    Raises:
        TokenExitError: As `decide`.
    """
    evidence, prefix = _evidence(book, running, previous, grid=grid, exit=exit, merged=merged)
    xp, shape = array_namespace(running), (running.shape[0], grid[0] * grid[1])
    marks, label = policy(evidence), _outcome(evidence)[1]
    label = label if policy.asks_classes else xp.zeros_like(label) - 1
    marks, label = xp.reshape(marks, shape), xp.reshape(label, shape)
    if prefix:
        unmarked = xp.zeros_like(running[:, :prefix])
        marks = xp.concat([unmarked, marks], axis=1)
        label = xp.concat([xp.astype(unmarked, label.dtype) - 1, label], axis=1)
    return (marks if merged is None else spread(marks, merged.owner)), label


def _outcome(evidence: Evidence) -> tuple[Array, Array]:
    """How certain the outcome of every patch is, and its class; -1 without classes."""
    if evidence.has_classes:
        return evidence.confidence, evidence.label
    error = evidence.score("error")
    xp = array_namespace(error)
    return -error, xp.zeros_like(error, dtype=xp.int32) - 1


def _evidence(
    book: Ledger,
    running: Array,
    previous: Sequence[Array],
    *,
    grid: tuple[int, int],
    exit: int,
    merged: Merged | None,
) -> tuple[Evidence, int]:
    """Evidence of all patches of all images, and how many prefix tokens an image has."""
    given = book.logits if book.class_scores is None else book.class_scores
    (images, slots, classes), places = given.shape, grid[0] * grid[1]
    rule = f"have the images and slots of the ledger, ({images}, {slots})"
    require(tuple(running.shape) == (images, slots), "running", rule, f"shape {tuple(running.shape)}")
    require_marks(running, "running")
    prefix = slots - places
    require(prefix >= 0, "grid", f"have at most {slots} places", grid)
    error = book.error
    if merged is not None:
        given = spread(given, merged.owner)
        error = None if error is None else spread(error, merged.owner)
    xp, entries = array_namespace(running), images * places
    table = xp.reshape(given[:, prefix:, :], (entries, classes))
    place = counting(entries, running)
    if previous:
        labels = xp.stack([xp.reshape(one, (entries,)) for one in previous], axis=0)
    else:  # no rows, of integers
        labels = xp.reshape(book.depth, (1, images * slots))[:0, :entries]
    evidence = Evidence(
        table if book.class_scores is None and classes > 0 else None,
        class_scores=None if book.class_scores is None else table,
        error=None if error is None else xp.reshape(error[:, prefix:], (entries,)),
        image=place // max(places, 1),
        images=images,
        grid=grid,
        position=place % max(places, 1),
        valid=xp.reshape(running[:, prefix:], (entries,)),
        layout="grid",
        merged=None if merged is None else merged.of_patches(),
        exit=exit,
        previous=labels,
    )
    return evidence, prefix


def carried(
    carry: Carry, output: HeadOutput, tokens: Float[Array, "*layout dim"], /
) -> Float[Array, "*layout channels"] | None:
    """Features that tokens which leave at an exit leave behind, by a carry: for `begin` and `update`.

    Args:
        carry: What leavers leave behind.
        output: Output of the exit head.
        tokens: The tokens as their block has left them, in the layout of the output.

    Returns:
        The tokens for `Feature`, what the head has made of them for `Translated`; None if no features are kept.

    Raises:
        TokenExitError: If the carry is `Translated`, and the head does not translate.
    """
    if isinstance(carry, Feature):
        return tokens
    if not isinstance(carry, Translated):
        return None
    require(output.features is not None, "output", "be of a head that translates, for a carry that is", "class scores")
    return output.features


def update(
    book: Ledger, receipt: Receipt, output: HeadOutput, /, *, features: Float[Array, "*layout channels"] | None = None
) -> Ledger:
    """Outcome of the tokens that run, by a head that reads them, over their earlier ones.

    Args:
        book: The ledger so far.
        receipt: The receipt of the tokens that run.
        output: Output of the head.
        features: Their features, if the ledger keeps them.

    Returns:
        The ledger with their latest outcome; presence is the head's own in images of which it read any token.

    Raises:
        TokenExitError: As `ledger.update`; or if `output` has no masks for a ledger that keeps them.
    """
    scored = None if book.class_scores is None else output.class_scores
    found = ledger.update(book, receipt, output.logits, class_scores=scored, features=features)
    if output.error is not None:
        before, shape = book.error, (receipt.images, receipt.slots)
        if before is None:
            before = filled(shape, math.nan, output.error, dtype=output.error.dtype)
        found = replace(found, error=tokens.scatter(output.error, receipt, into=before))
    if book.mask_logits is None:
        return found
    require(output.mask_logits is not None, "output", "have masks for a ledger that keeps them", "none")
    xp = array_namespace(output.mask_logits)
    ran = receipt.lengths > 0
    return replace(
        found,
        mask_logits=tokens.scatter(output.mask_logits, receipt, into=book.mask_logits),
        presence_logits=xp.where(ran[:, None], output.presence_logits, book.presence_logits),
    )


def begin(
    output: HeadOutput,
    receipt: Receipt,
    /,
    *,
    features: Float[Array, "*layout channels"] | None = None,
    presence_logits: Float[Array, "images classes"] | None = None,
) -> Ledger:
    """An empty ledger for outputs like this one.

    Args:
        output: Output of the first exit head.
        receipt: The receipt of the tokens that run.
        features: Their features, if the ledger is to keep them.
        presence_logits: Presence of classes by a mask head, if the ledger is to keep masks.

    Returns:
        A ledger in which nothing has an outcome.

    Raises:
        TokenExitError: As `ledger.open_ledger`.
    """
    return ledger.open_ledger(
        output.logits,
        receipt,
        class_scores=output.class_scores,
        features=features,
        presence_logits=presence_logits,
    )
