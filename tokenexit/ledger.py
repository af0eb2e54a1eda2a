"""Frozen outputs of exited tokens, predictions or features, and their exit depth.

DToP (ICCV 2023, section 3.2) finalises a token when it leaves: the class scores of its exit head are its result. In
PAUMER (BMVC 2022) and DoViT (2023) it leaves its feature, which rejoins the others later. A ledger holds either, for
either layout. It is a value: `record` returns a new one and changes nothing.
"""

from dataclasses import dataclass, replace

from jaxtyping import Bool, Float, Int, Shaped

from tokenexit import scores
from tokenexit._array import Array, array_namespace, filled, require_marks, take, take_or
from tokenexit._plain import is_number
from tokenexit.errors import TokenExitError, require
from tokenexit.tokens import Receipt, scatter

__all__ = ["Ledger", "fold_leavers", "open_ledger", "record", "rejoin"]


@dataclass(frozen=True)
class Ledger:
    """The outcome of every slot of a batch, as far as it is known.

    Attributes:
        logits: Frozen class scores; zero while the token runs.
        label: Frozen predicted class; -1 while the token runs.
        score: Confidence that the token left with; zero while it runs.
        depth: How many blocks the token has run through; zero while it runs.
        features: Frozen features, for a schedule that carries them; zero while the token runs.
        mask_logits: Latest mask logits by slot, if masks are kept: frozen where the token has left.
        presence_logits: Latest presence of classes by image, if masks are kept.
    """

    logits: Float[Array, "images slots classes"]
    label: Int[Array, "images slots"]
    score: Float[Array, "images slots"]
    depth: Int[Array, "images slots"]
    features: Float[Array, "images slots dim"] | None = None
    mask_logits: Float[Array, "images slots classes"] | None = None
    presence_logits: Float[Array, "images classes"] | None = None

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
    features: Float[Array, "..."] | None = None,
    presence_logits: Float[Array, "images classes"] | None = None,
) -> Ledger:
    """An empty ledger for the batch of `receipt`.

    Args:
        logits: Class scores, in the layout of the receipt; the ledger takes their class count and dtype.
        receipt: The receipt of any row, or selection, of the batch.
        features: Features, in the same layout, if the ledger is to keep them too.
        presence_logits: Presence of classes by a mask head, if the ledger is to keep masks too.

    Returns:
        A ledger in which nothing has settled.

    Raises:
        TokenExitError: If `logits` or `features` are not in the layout of `receipt`.
    """
    _require_layout(logits, receipt, "logits")
    xp = array_namespace(logits)
    shape = (receipt.images, receipt.slots)
    if features is not None:
        _require_layout(features, receipt, "features")
        features = filled((*shape, features.shape[-1]), 0, features, dtype=features.dtype)
    masks = None
    if presence_logits is not None:
        masks = filled((*shape, presence_logits.shape[-1]), 0, presence_logits, dtype=presence_logits.dtype)
    return Ledger(
        logits=filled((*shape, logits.shape[-1]), 0, logits, dtype=logits.dtype),
        label=filled(shape, -1, logits, dtype=receipt.index.dtype),
        score=filled(shape, 0, logits, dtype=xp.float32),
        depth=filled(shape, 0, logits, dtype=receipt.index.dtype),
        features=features,
        mask_logits=masks,
        presence_logits=presence_logits,
    )


def record(
    ledger: Ledger,
    receipt: Receipt,
    leave: Bool[Array, "..."],
    logits: Float[Array, "..."],
    /,
    *,
    depth: int,
    score: Float[Array, "..."] | None = None,
    features: Float[Array, "..."] | None = None,
) -> Ledger:
    """Settle the tokens that leave.

    Args:
        ledger: The ledger so far.
        receipt: The receipt of the tokens that run: `(tokens,)` or `(images, capacity)` is the layout of the others.
        leave: Which of them leave. Entries that are not valid hold no token, and leave nothing behind.
        logits: The class scores of all of them, with one more axis.
        depth: How many blocks they have run through.
        score: How confident they are; by the softmax of `logits` if left out, which does not suit an ATM head.
        features: Their features, if the ledger keeps them.

    Returns:
        The ledger with the leavers' outcome.

    Raises:
        TokenExitError: If an array is not in the layout of `receipt`, or `features` are given to a ledger that does
            not keep them, or left out for one that does.
    """
    _require_layout(logits, receipt, "logits")
    classes = ledger.logits.shape[-1]
    require(logits.shape[-1] == classes, "logits", f"have the {classes} classes of the ledger", logits.shape[-1])
    for name, array in (("leave", leave), ("score", score)):
        require(
            array is None or tuple(array.shape) == receipt.layout,
            name,
            f"have one entry for each of the layout {receipt.layout}",
            f"shape {None if array is None else tuple(array.shape)}",
        )
    require_marks(leave, "leave")
    kept = "features" if ledger.features is not None else "none"
    given = "features" if features is not None else "none"
    require(kept == given, "features", "be given exactly if the ledger keeps them", f"{given}, and it keeps {kept}")
    if features is not None:
        _require_layout(features, receipt, "features")
    xp = array_namespace(logits)
    batch = (receipt.images, receipt.slots)
    left = scatter(leave, receipt, into=filled(batch, False, leave, dtype=xp.bool))
    flat = xp.reshape(left, (receipt.images * receipt.slots,))

    def settle(values: Array, settled: Array) -> Array:
        rest = tuple(settled.shape[2:])
        rows = xp.reshape(xp.astype(values, settled.dtype), (receipt.index.shape[0], *rest))
        return xp.reshape(take_or(rows, receipt.rank, flat, xp.reshape(settled, (*flat.shape, *rest))), settled.shape)

    return replace(
        ledger,
        logits=settle(logits, ledger.logits),
        label=settle(xp.astype(xp.argmax(logits, axis=-1), ledger.label.dtype), ledger.label),
        score=settle(scores.confidence(logits) if score is None else score, ledger.score),
        depth=xp.where(left, filled(batch, depth, left, dtype=ledger.depth.dtype), ledger.depth),
        features=None if ledger.features is None else settle(features, ledger.features),
    )


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
