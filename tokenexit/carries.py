"""What a token leaves behind when it leaves, and whether it may come back: the carry of a schedule.

A carry is plain frozen data. The arrays that it refers to are kept by `tokenexit.ledger`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenexit._plain import from_plain, to_plain
from tokenexit.errors import require

__all__ = ["Carry", "Feature", "MaskPrediction", "Prediction", "Preserved", "Translated", "from_dict", "to_dict"]


@dataclass(frozen=True)
class Prediction:
    """The class scores of its exit head are a token's result (DToP, ICCV 2023, section 3.2)."""


@dataclass(frozen=True)
class MaskPrediction:
    """The mask logits of its exit head are frozen; class presence is taken from the latest head.

    What the code of DToP (ICCV 2023) does, where its paper's wording is `Prediction`: a token's class scores are its
    frozen masks, weighted with the presence of each class by the last head that read any token of the image. For heads
    that give masks and presence (`heads.ATM`).
    """


@dataclass(frozen=True)
class Feature:
    """A token keeps the feature it left with, and rejoins the others later (PAUMER, BMVC 2022; DoViT, 2023).

    The network must have been trained for it: a decoder, or a last block, meets features of all depths.

    Attributes:
        before: What it rejoins the others for: the `decoder`, whatever reads the last block's tokens, or the
            `last block`, as Token Cropr (CVPR 2025) does.
        fold_above: If more than this share of an image's tokens leave at an exit, their mean is averaged into the
            first prefix token, so that attention still knows of them (DoViT, 2023, section 3.2; published: 0.1). None:
            never.
    """

    before: Literal["decoder", "last block"] = "decoder"
    fold_above: float | None = None

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If `before` is unknown, or `fold_above` neither None nor a number in [0, 1].
        """
        require(self.before in ("decoder", "last block"), "before", "be 'decoder' or 'last block'", repr(self.before))
        _require_fold_above(self.fold_above)


@dataclass(frozen=True)
class Translated:
    """A token leaves what the last block would have made of it, foretold by the translator at its exit.

    It rejoins the others for whatever reads the last block's tokens, which then meets tokens of one depth: a network
    that was not trained for exits stays as it is. For exit heads that translate (`heads.Translator`).

    Attributes:
        fold_above: As for `Feature`: the mean of the leavers' own features, untranslated, is averaged into the first
            prefix token, which runs on.
    """

    fold_above: float | None = None

    def __post_init__(self) -> None:
        """Check the field.

        Raises:
            TokenExitError: If `fold_above` is neither None nor a number in [0, 1].
        """
        _require_fold_above(self.fold_above)


@dataclass(frozen=True)
class Preserved:
    """Skipped tokens keep their feature, and a later gate may reactivate them (SViT, WACV 2024, section 3.2).

    Each gate decides which tokens run until the next one. Skipped tokens are among the others again for whatever reads
    the map.

    Attributes:
        returning: Whether a skipped token may be reactivated: at `every gate`, or `never`, which skips it for good (as
            pruning does; SViT, section 4, compares them).
        keys: Key set of active tokens: the `running` ones alone, published; or `all`, skipped tokens as well, with the
            features they have, which saves less.
        before: What all tokens run again for: the `decoder`, whatever reads the last block's tokens, or the
            `last block`, as Token Cropr (CVPR 2025) does.
    """

    returning: Literal["every gate", "never"] = "every gate"
    keys: Literal["running", "all"] = "running"
    before: Literal["decoder", "last block"] = "decoder"

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If a field has another value.
        """
        known = {"returning": ("every gate", "never"), "keys": ("running", "all"), "before": ("decoder", "last block")}
        for name, (one, other) in known.items():
            value = getattr(self, name)
            require(value in (one, other), name, f"be {one!r} or {other!r}", repr(value))


Carry = Prediction | Feature | Translated | Preserved | MaskPrediction
"""Any of the carries."""

_KINDS: dict[str, type[Carry]] = {
    "prediction": Prediction,
    "feature": Feature,
    "preserved": Preserved,
    "mask_prediction": MaskPrediction,
    "translated": Translated,
}


def to_dict(carry: Carry, /) -> dict[str, Any]:
    """The carry as plain data, for JSON.

    Args:
        carry: One of the carries of this module.

    Returns:
        `{"kind": ..., field: value, ...}`.

    Raises:
        TokenExitError: If it is anything else.
    """
    return to_plain(carry, _KINDS, argument="carry")


def from_dict(data: Mapping[str, Any], /) -> Carry:
    """The carry that `to_dict` wrote down.

    Args:
        data: What `to_dict` returned, or its like read from a file.

    Returns:
        The carry.

    Raises:
        TokenExitError: If the kind is unknown, a field is missing or unknown, or a value is out of its range.
    """
    return from_plain(data, _KINDS, argument="carry")


def _require_fold_above(share: Any) -> None:
    number = isinstance(share, int | float) and not isinstance(share, bool)
    require(share is None or (number and 0 <= share <= 1), "fold_above", "be None or in [0, 1]", repr(share))
