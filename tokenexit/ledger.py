"""Frozen outputs of exited tokens, predictions or features, and their exit depth.

DToP (ICCV 2023, section 3.2) finalises a token when it leaves: the class scores of its exit head are its result. In
PAUMER (BMVC 2022) and DoViT (2023) it leaves its feature, which rejoins the others later. A ledger holds either, for
either layout. It is a value: `record` returns a new one and changes nothing.

At an exit point the head reads all tokens that run, so the ledger knows the latest class scores of every slot: those of
tokens that run, which come to be overwritten, and those of the others, which are frozen.
"""

import math
from dataclasses import dataclass, replace

from jaxtyping import Bool, Float, Int, Shaped

from tokenexit._array import Array, array_namespace, filled, require_marks, take
from tokenexit._plain import is_number
from tokenexit.errors import TokenExitError, require
from tokenexit.tokens import Receipt, scatter

__all__ = ["Ledger", "fold_leavers", "freeze", "open_ledger", "record", "rejoin", "update"]


@dataclass(frozen=True)
class Ledger:
    """The latest outcome of every slot of a batch: frozen where the token has left.

    Attributes:
        logits: Class scores before softmax; NaN where no head has read the token yet. Of no classes, where heads give
            none.
        depth: How many blocks the token has run through; zero while it runs.
        class_scores: Class scores that are not a softmax's, for heads that give such; NaN likewise.
        features: Features at the latest exit point, for a schedule that carries them; zero before the first.
        mask_logits: Mask logits, if masks are kept.
        presence_logits: Presence of classes by image, if masks are kept.
        error: Error that a translator foretells for its token, if such are kept; NaN where none has read it yet.
    """

    logits: Float[Array, "images slots classes"]
    depth: Int[Array, "images slots"]
    class_scores: Float[Array, "images slots classes"] | None = None
    features: Float[Array, "images slots dim"] | None = None
    mask_logits: Float[Array, "images slots classes"] | None = None
    presence_logits: Float[Array, "images classes"] | None = None
    error: Float[Array, "images slots"] | None = None

    def exit_depth(self, depth: int, /) -> Int[Array, "images slots"]:
        """Blocks that every token has run through.

        Args:
            depth: Blocks of the network, for tokens that have not left.
        """
        xp = array_namespace(self.depth)
        return xp.where(self.depth > 0, self.depth, depth)


def open_ledger(
    logits: Float[Array, "..."],
    receipt: Receipt,
    /,
    *,
    class_scores: Float[Array, "..."] | None = None,
    features: Float[Array, "..."] | None = None,
    presence_logits: Float[Array, "images classes"] | None = None,
) -> Ledger:
    """An empty ledger for the batch of `receipt`.

    Args:
        logits: Class scores, in the layout of the receipt; the ledger takes their class count and dtype.
        receipt: The receipt of any row, or selection, of the batch.
        class_scores: Scores that are not a softmax's, in the same layout, if the ledger is to keep such too.
        features: Features, in the same layout, if the ledger is to keep them too.
        presence_logits: Presence of classes by a mask head, if the ledger is to keep masks too.

    Returns:
        A ledger in which nothing has an outcome.

    Raises:
        TokenExitError: If an array is not in the layout of `receipt`.
    """
    shape = (receipt.images, receipt.slots)

    def blank(like: Array | None, name: str, value: float) -> Array | None:
        if like is None:
            return None
        _require_layout(like, receipt, name)
        return filled((*shape, like.shape[-1]), value, like, dtype=like.dtype)

    masks = None
    if presence_logits is not None:
        masks = filled((*shape, presence_logits.shape[-1]), 0, presence_logits, dtype=presence_logits.dtype)
    return Ledger(
        logits=blank(logits, "logits", math.nan),
        depth=filled(shape, 0, logits, dtype=receipt.index.dtype),
        class_scores=blank(class_scores, "class_scores", math.nan),
        features=blank(features, "features", 0),
        mask_logits=masks,
        presence_logits=presence_logits,
    )


def update(
    ledger: Ledger,
    receipt: Receipt,
    logits: Float[Array, "..."],
    /,
    *,
    class_scores: Float[Array, "..."] | None = None,
    features: Float[Array, "..."] | None = None,
) -> Ledger:
    """Outcome of the tokens that run, over their earlier ones.

    Args:
        ledger: The ledger so far.
        receipt: The receipt of the tokens that run: `(tokens,)` or `(images, capacity)` is the layout of the others.
        logits: Their class scores, with one more axis.
        class_scores: Their scores that are not a softmax's, if the ledger keeps such.
        features: Their features, if the ledger keeps these. Of fewer channels than these, they are the last.

    Returns:
        The ledger with their latest outcome.

    Raises:
        TokenExitError: If an array is not in the layout of `receipt`, or is given to a ledger that does not keep its
            kind, or left out for one that does.
    """
    _require_layout(logits, receipt, "logits")
    classes = ledger.logits.shape[-1]
    require(logits.shape[-1] == classes, "logits", f"have the {classes} classes of the ledger", logits.shape[-1])

    def latest(values: Array | None, held: Array | None, name: str) -> Array | None:
        kept, given = (name if one is not None else "none" for one in (held, values))
        require(kept == given, name, "be given exactly if the ledger keeps them", f"{given}, and it keeps {kept}")
        if values is None or held is None:
            return None
        _require_layout(values, receipt, name)
        xp, found = array_namespace(values), values
        if found.dtype != held.dtype:
            found = xp.astype(found, held.dtype)
        behind = held.shape[-1] - found.shape[-1]
        if name == "features" and behind > 0:  # the first are read no more
            read = filled((*receipt.layout, behind), 0, found, dtype=held.dtype)
            found = xp.concat([read, found], axis=-1)
        return scatter(found, receipt, into=held)

    return replace(
        ledger,
        logits=latest(logits, ledger.logits, "logits"),
        class_scores=latest(class_scores, ledger.class_scores, "class_scores"),
        features=latest(features, ledger.features, "features"),
    )


def freeze(ledger: Ledger, left: Bool[Array, "images slots"], /, *, depth: int) -> Ledger:
    """Freeze the outcome of tokens that leave, which run no more and have none after it.

    Args:
        ledger: The ledger, with their outcome (`update`).
        left: Which slots they are; none that has left before.
        depth: How many blocks they have run through.

    Returns:
        The ledger with their depth.

    Raises:
        TokenExitError: If `left` is not boolean or not of the shape of the ledger.
    """
    require_marks(left, "left")
    shape = tuple(ledger.depth.shape)
    require(tuple(left.shape) == shape, "left", f"have the shape of the ledger, {shape}", f"shape {tuple(left.shape)}")
    xp = array_namespace(left)
    return replace(ledger, depth=xp.where(left, depth, ledger.depth))


def record(
    ledger: Ledger,
    receipt: Receipt,
    leave: Bool[Array, "..."],
    logits: Float[Array, "..."],
    /,
    *,
    depth: int,
    class_scores: Float[Array, "..."] | None = None,
    features: Float[Array, "..."] | None = None,
) -> Ledger:
    """Record an exit point: the outcome of all tokens that run, and that some of them leave with it.

    Args:
        ledger: The ledger so far.
        receipt: The receipt of the tokens that run: `(tokens,)` or `(images, capacity)` is the layout of the others.
        leave: Which of them leave. Entries that are not valid hold no token, and leave nothing behind.
        logits: The class scores of all of them, with one more axis.
        depth: How many blocks they have run through.
        class_scores: Their scores that are not a softmax's, if the ledger keeps such.
        features: Their features, if the ledger keeps these.

    Returns:
        `update` and `freeze` in one.

    Raises:
        TokenExitError: As `update`; or if `leave` is not boolean or not in the layout of `receipt`.
    """
    require(
        tuple(leave.shape) == receipt.layout,
        "leave",
        f"have one entry for each of the layout {receipt.layout}",
        f"shape {tuple(leave.shape)}",
    )
    require_marks(leave, "leave")
    ledger = update(ledger, receipt, logits, class_scores=class_scores, features=features)
    nothing = array_namespace(receipt.running).zeros_like(receipt.running)
    return freeze(ledger, scatter(leave, receipt, into=nothing), depth=depth)


def rejoin(ledger: Ledger, receipt: Receipt, features: Float[Array, "..."], /) -> Float[Array, "images slots width"]:
    """All tokens again: those that run with their present features, those that left with what they left behind.

    Args:
        ledger: The ledger, which must keep features.
        receipt: The receipt of the tokens that run.
        features: Their features, in its layout.

    Returns:
        A feature for every slot: what the decoder, or the last block, is given.

    Raises:
        TokenExitError: If the ledger keeps no features, or `features` are not in the layout of `receipt`.
    """
    if ledger.features is None:
        raise TokenExitError("`ledger` must keep features to rejoin, got one without")
    _require_layout(features, receipt, "features")
    return scatter(features, receipt, into=ledger.features)


def fold_leavers(
    features: Float[Array, "..."], receipt: Receipt, leave: Bool[Array, "..."], /, *, into: int = 0, above: float = 0.1
) -> Float[Array, "..."]:
    """Average the mean of the leavers into one token of their image, which stays (DoViT, 2023, section 3.2).

    So attention still includes those that left, by one token that represents all of them.

    Args:
        features: Features of the tokens that run, in the layout of the receipt.
        receipt: Their receipt.
        leave: Which of them leave.
        into: Slot of the token that takes the mean in: the cls token, as a rule. It is none of the leavers.
        above: Share of the image's other tokens that must leave, strictly, for it to happen; compared in float32.
            Published: 0.1.

    Returns:
        The features, those of the token `into` of an image replaced by the average of themselves and the leavers' mean.

    Raises:
        TokenExitError: If an array is not in the layout of `receipt`, there is no slot `into`, or `above` is not in
            [0, 1].
    """
    _require_layout(features, receipt, "features")
    require(
        tuple(leave.shape) == receipt.layout,
        "leave",
        f"have the layout {receipt.layout}",
        f"shape {tuple(leave.shape)}",
    )
    require(0 <= into < receipt.slots, "into", f"be one of the {receipt.slots} slots", into)
    require(is_number(above) and 0 <= above <= 1, "above", "be a number in [0, 1]", repr(above))
    xp = array_namespace(features)
    batch = (receipt.images, receipt.slots)
    own = xp.reshape(receipt.slot == into, receipt.layout)
    left = scatter(leave & ~own, receipt, into=filled(batch, False, leave, dtype=xp.bool))
    wide = xp.result_type(features.dtype, xp.float32)
    # A sum over an image is one over its slots, where all others are zero.
    at_slot = scatter(
        xp.astype(features, wide), receipt, into=filled((*batch, features.shape[-1]), 0, features, dtype=wide)
    )
    leaving = xp.sum(xp.astype(left, xp.float32), axis=1, keepdims=True)
    others = xp.sum(xp.astype(receipt.running, xp.float32), axis=1, keepdims=True) - 1
    total = xp.sum(xp.where(left[..., None], at_slot, 0.0), axis=1)
    mean = total / xp.astype(xp.where(leaving > 0, leaving, 1.0), wide)
    folded = (at_slot[:, into, :] + mean) / 2
    folds = xp.reshape(take(xp.reshape(leaving > above * others, (receipt.images,)), receipt.image), receipt.layout)
    # Only that token changes: what the others hold is theirs, to the last bit.
    taken = xp.reshape(take(folded, receipt.image, axis=0), features.shape)
    return xp.where((own & folds)[..., None], xp.astype(taken, features.dtype), features)


def _require_layout(values: Shaped[Array, "..."], receipt: Receipt, argument: str) -> None:
    require(
        values.ndim == len(receipt.layout) + 1 and tuple(values.shape[:-1]) == receipt.layout,
        argument,
        f"have the layout {receipt.layout} and one more axis",
        f"shape {tuple(values.shape)}",
    )
