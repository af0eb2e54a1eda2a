"""Kinds of exit policies: thresholds of scores, budgets, patience, and neighbourhoods that agree."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Bool, Float, Int

from tokenexit._array import Array, array_namespace, comparable, filled, is_array, take_or
from tokenexit._grid import lay_out, uniform
from tokenexit._plain import is_whole
from tokenexit.errors import TokenExitError, require
from tokenexit.merging import spread, whole_entries
from tokenexit.policies.evidence import DIRECTIONS, Evidence
from tokenexit.policies.policy import COMPOSED, PerClass, Policy, ThresholdPolicy, contest, is_numeric
from tokenexit.retention import rank_in_group

__all__ = [
    "KINDS",
    "BatchBudget",
    "Budget",
    "ConfidenceAbove",
    "EntropyBelow",
    "ErrorBelow",
    "GateBelow",
    "MarginAbove",
    "NeighboursAgree",
    "Patience",
]


@dataclass(frozen=True, repr=False)
class _OfScore(ThresholdPolicy):
    """A threshold of one of the scores of `Evidence`."""

    def value(self, evidence: Evidence, /) -> Float[Array, "tokens"]:
        """See `ThresholdPolicy.value`."""
        return evidence.score(str(self.score))


@dataclass(frozen=True, repr=False)
class ConfidenceAbove(_OfScore):
    """A token leaves if its confidence is strictly greater (DToP, ICCV 2023, section 3.2).

    Attributes:
        threshold: Softmax probability in [0, 1]. Published: 0.90 (ADE20K, ViT-B), 0.95 (ViT-L).
    """

    score: ClassVar[str | None] = "confidence"
    direction: ClassVar[Literal["above", "below"] | None] = "above"


@dataclass(frozen=True, repr=False)
class EntropyBelow(_OfScore):
    """A token leaves if its normalised entropy is strictly lower (PAUMER, BMVC 2022, section 3).

    Attributes:
        threshold: Entropy divided by log(classes), in [0, 1].
    """

    score: ClassVar[str | None] = "entropy"
    direction: ClassVar[Literal["above", "below"] | None] = "below"


@dataclass(frozen=True, repr=False)
class MarginAbove(_OfScore):
    """A token leaves if its two best classes are strictly further apart.

    Attributes:
        threshold: Difference of softmax probabilities in [0, 1].
    """

    score: ClassVar[str | None] = "margin"
    direction: ClassVar[Literal["above", "below"] | None] = "above"


@dataclass(frozen=True, repr=False)
class GateBelow(_OfScore):
    """A token leaves if the learned probability that it is kept is strictly lower (SViT, WACV 2024, section 3.2).

    Attributes:
        threshold: Probability in [0, 1]; one per class needs class scores beside the gate.
    """

    score: ClassVar[str | None] = "gate"
    direction: ClassVar[Literal["above", "below"] | None] = "below"


@dataclass(frozen=True, repr=False)
class Budget(Policy):
    """The easiest tokens leave, so that of every image only so many stay (PAUMER, BMVC 2022, section 3: a fraction).

    Of equal tokens the earlier stays. Protected tokens do not count towards the budget.

    Attributes:
        keep: What may stay of the patches that an image had at first: a float, or an array without axes of that kind,
            is a fraction in [0, 1], rounded to the nearest number of tokens; an int is that number.
        by: By what the easiest are known: `confidence`, `entropy`, `margin`, `gate` or `error`.
    """

    ranks: ClassVar[bool] = True
    keep: float | int | Float[Array, ""] | Int[Array, ""]
    by: str = "confidence"

    def _reads(self) -> frozenset[str]:
        return frozenset({self.by, "grid"})

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If `keep` is neither a fraction in [0, 1] nor a whole number, or `by` no score.
        """
        keep: Any = self.keep
        if is_array(keep):
            ok = tuple(keep.shape) == () and is_numeric(keep)
            require(ok, "keep", "be a number or an array without axes", keep)
        else:
            fraction = isinstance(keep, float) and 0 <= keep <= 1
            require(fraction or is_whole(keep), "keep", "be a float in [0, 1] or a whole number", keep)
        known = isinstance(self.by, str) and self.by in DIRECTIONS
        require(known, "by", f"be one of {', '.join(DIRECTIONS)}", repr(self.by))

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        """See `Policy.leaves`."""
        return self._beyond(evidence, evidence.image, per=1)

    def _beyond(self, evidence: Evidence, image: Array | None, *, per: int) -> Array:
        if evidence.grid is None:
            raise TokenExitError(f"`evidence` must have grid for {type(self).__name__}, got none")
        hardness = evidence.hardness(self.by)
        xp = array_namespace(hardness)
        rank = rank_in_group(hardness, contest(evidence, image))
        keep: Any = comparable(self.keep, hardness)
        whole = xp.isdtype(keep.dtype, "integral") if is_array(keep) else isinstance(keep, int)
        if whole:
            return rank >= keep
        # Rounded to the nearest, up at a half; an array's value may not be known yet.
        return xp.astype(rank, xp.float32) + 0.5 > keep * float(per * evidence.grid[0] * evidence.grid[1])


@dataclass(frozen=True, repr=False)
class BatchBudget(Budget):
    """The easiest tokens leave, so that of a whole batch only so many stay: its images trade with each other.

    The one policy by which an image's result depends on its batch mates. A fraction is one of the patches that all
    images had at first.
    """

    mixes: ClassVar[bool] = True

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        """See `Policy.leaves`."""
        if evidence.images is None:
            raise TokenExitError("`evidence` must have images for BatchBudget, got none")
        return self._beyond(evidence, None, per=evidence.images)


@dataclass(frozen=True, repr=False)
class Patience(Policy):
    """A token leaves if its predicted class has not changed over the exits before this one.

    Attributes:
        exits: How many earlier exits must have predicted the class that this one does; with fewer, nothing leaves.
    """

    exits: int = 1

    def _reads(self) -> frozenset[str]:
        return frozenset({"confidence", "previous"})

    def __post_init__(self) -> None:
        """Check the field.

        Raises:
            TokenExitError: If `exits` is not a whole number from 1 up.
        """
        require(is_whole(self.exits, least=1), "exits", "be a whole number from 1 to 2147483647", repr(self.exits))

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        """See `Policy.leaves`."""
        if evidence.previous is None:
            raise TokenExitError("`evidence` must have previous for Patience, got none")
        xp = array_namespace(evidence.previous)
        seen = evidence.previous.shape[0]
        if seen < self.exits:
            return evidence.eligible & False
        latest = evidence.previous[seen - self.exits :, :]
        return xp.all(latest == evidence.label[None, :], axis=0) & evidence.known


@dataclass(frozen=True, repr=False)
class _OfSquares(_OfScore):
    """A threshold that the square of places around a token must pass with it: a vote for each place, one for all."""

    radius: int = 1

    def _reads(self) -> frozenset[str]:
        return super()._reads() | {"images", "grid", "position"}

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If the threshold is not in [0, 1] or the radius is not a whole number from 0 up.
        """
        super().__post_init__()
        require(is_whole(self.radius), "radius", "be a whole number from 0 to 2147483647", repr(self.radius))

    @abstractmethod
    def votes(self, evidence: Evidence, passing: Bool[Array, "tokens"], /) -> Int[Array, "tokens"]:
        """What every token votes for, and, in the layout `grid`, those that have left; -1 is no vote."""

    @abstractmethod
    def settled_votes(self, evidence: Evidence, /) -> Int[Array, "images positions"] | None:
        """In the layout `row`, what the tokens that have left vote for; -1 elsewhere; None if none is known."""

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        """See `Policy.leaves`."""
        passing = super().leaves(evidence)
        if self.radius == 0:
            return passing
        if evidence.grid is None or evidence.images is None or evidence.position is None:
            lacking = [name for name in ("images", "grid", "position") if getattr(evidence, name) is None]
            kind, lacking = type(self).__name__, ", ".join(lacking)
            raise TokenExitError(f"`evidence` must have images, grid and position for {kind}, got none of {lacking}")
        votes = self.votes(evidence, passing)
        xp = array_namespace(passing)
        if evidence.layout == "grid":
            votes = votes if evidence.protected is None else xp.where(evidence.protected, -1, votes)
            return passing & self._agreed(votes, evidence)
        height, width = evidence.grid
        places = evidence.images * height * width
        inside = (evidence.position >= 0) & (evidence.position < height * width)
        inside = inside & evidence.eligible
        place = evidence.position if evidence.image is None else evidence.image * height * width + evidence.position
        place = xp.where(inside, place, places)
        settled = self.settled_votes(evidence)
        if settled is None:
            settled = filled((places,), -1, votes, dtype=votes.dtype)
        settled = xp.reshape(xp.astype(settled, votes.dtype), (places,))
        agreed = self._agreed(lay_out(votes, place, settled), evidence)
        return passing & take_or(agreed, place, inside, xp.zeros_like(passing))

    def _agreed(self, votes: Array, evidence: Evidence) -> Array:
        """Whether the square around every place of the grid votes for one thing."""
        xp = array_namespace(votes)
        maps = xp.reshape(votes, (evidence.images, *(evidence.grid or ())))
        agreed = uniform(maps, radius=self.radius)
        if evidence.merged is not None:  # an entry leaves only if all its tokens would
            agreed = whole_entries(xp.reshape(agreed, evidence.merged.running.shape), evidence.merged)
        return xp.reshape(agreed, votes.shape)


@dataclass(frozen=True, repr=False)
class NeighboursAgree(_OfSquares):
    """A token leaves if the grid around it predicts the same class, and is confident too.

    New in this library. Early exits hurt at the boundaries of things; this rule lets only their interior go. Tokens
    that have left count with the class and confidence they left with. A place of the grid about which nothing is
    known counts against its neighbours; what lies beyond the edge of the grid does not.

    Attributes:
        threshold: Softmax probability in [0, 1] that the token and all its neighbours must exceed; of a neighbour,
            the threshold of the class that it predicts.
        radius: The neighbourhood is the square of 2 radius + 1 places around the token; 0 is `ConfidenceAbove`.
    """

    score: ClassVar[str | None] = "confidence"
    direction: ClassVar[Literal["above", "below"] | None] = "above"

    def votes(self, evidence: Evidence, passing: Bool[Array, "tokens"], /) -> Int[Array, "tokens"]:
        """The predicted class of what is confident."""
        return _voting(evidence.label, passing)

    def settled_votes(self, evidence: Evidence, /) -> Int[Array, "images positions"] | None:
        """The predicted class of what has left confident."""
        if evidence.settled_label is None or evidence.settled_score is None:
            return None
        limit = self.limit(evidence, label=evidence.settled_label)
        return _voting(evidence.settled_label, evidence.settled_score > limit)


@dataclass(frozen=True, repr=False)
class ErrorBelow(_OfSquares):
    """A token leaves if its translator foretells a small error, and for the grid around it too.

    New in this library: it asks for no class, so that it serves any task. Exit heads are to translate
    (`heads.Translator`). Tokens that have left hold no neighbour back: their error was small enough for their own exit,
    and thresholds commonly fall from exit to exit. A place of the grid about which nothing is known does; what lies
    beyond the edge of the grid does not.

    Related: Co-Me (CVPR 2026) distils a confidence for merging in networks of geometry.

    Attributes:
        threshold: Squared error relative to the variance of each channel, in [0, 1], below which the token and all its
            neighbours must be: 0 for what later blocks make of a token, 1 for the mean of all tokens.
        radius: The neighbourhood is the square of 2 radius + 1 places around the token; 0 is the token alone.
    """

    score: ClassVar[str | None] = "error"
    direction: ClassVar[Literal["above", "below"] | None] = "below"

    def votes(self, evidence: Evidence, passing: Bool[Array, "tokens"], /) -> Int[Array, "tokens"]:
        """Zero for what passes, and for what has left."""
        xp = array_namespace(passing)
        if evidence.layout == "grid" and evidence.valid is not None:
            runs, merged = evidence.valid, evidence.merged
            if merged is not None:  # a token that belongs to an entry runs as long as that does
                shape = merged.running.shape
                runs = xp.reshape(spread(xp.reshape(runs, shape), merged.owner), (runs.shape[0],))
            passing = passing | (~runs & ~xp.isnan(evidence.score("error")))
        return xp.astype(passing, xp.int32) - 1

    def settled_votes(self, evidence: Evidence, /) -> Int[Array, "images positions"] | None:
        """Zero for what has left."""
        settled = evidence.settled_error
        if settled is None:
            return None
        xp = array_namespace(settled)
        return xp.astype(~xp.isnan(settled), xp.int32) - 1


def _voting(label: Array, confident: Array) -> Array:
    """The class of what is confident, and -1 for the rest, which matches no class."""
    xp = array_namespace(label)
    return xp.where(confident, label, -1)


KINDS: Mapping[str, type[Policy] | type[PerClass]] = {
    "ConfidenceAbove": ConfidenceAbove,
    "EntropyBelow": EntropyBelow,
    "ErrorBelow": ErrorBelow,
    "MarginAbove": MarginAbove,
    "GateBelow": GateBelow,
    "NeighboursAgree": NeighboursAgree,
    "Budget": Budget,
    "BatchBudget": BatchBudget,
    "Patience": Patience,
    **COMPOSED,
}
"""All policies of the library, and what they are composed of, by the names in files."""
