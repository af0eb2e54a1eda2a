"""Who leaves now: exit policies, small and composable.

    policy = ConfidenceAbove(0.95).retaining(per_class=5)
    leave = policy(Evidence(logits, image=image, images=8))

A policy is a frozen dataclass; `&`, `|`, `~`, `.retaining` and `.with_minimum` make policies of policies. Its
thresholds are data, floats or arrays without axes or `PerClass`, and `with_threshold` exchanges them. A policy of your
own is a dataclass with one method:

    @dataclass(frozen=True)
    class CertainSky(Policy):
        threshold: float

        def leaves(self, evidence):
            return (evidence.label == 0) & (evidence.confidence > self.threshold)
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal, cast

from jaxtyping import Bool, Float, Int

from tokenexit import scores
from tokenexit._array import Array, array_namespace, comparable, filled, is_array, like_numbers, take, take_or
from tokenexit._grid import extremes, lay_out
from tokenexit._lazy import lazy
from tokenexit._plain import from_plain, is_whole, to_plain
from tokenexit.errors import TokenExitError, require
from tokenexit.retention import rank_in_group, top_k_per_group

__all__ = [
    "BatchBudget",
    "Budget",
    "ConfidenceAbove",
    "EntropyBelow",
    "Evidence",
    "GateBelow",
    "MarginAbove",
    "NeighboursAgree",
    "Patience",
    "PerClass",
    "Policy",
    "Threshold",
    "always",
    "from_dict",
    "never",
    "to_dict",
]

Score = Literal["confidence", "entropy", "margin", "gate"]


@dataclass(frozen=True)
class Evidence:
    """What a policy may look at: the tokens that run at an exit point, in one row.

    In the static layout the row is that of all entries, image after image, and `valid` says which hold a token. What a
    policy does then has shapes that do not depend on the data: it compiles.

    Attributes:
        logits: Class scores before softmax, from the head at this exit; of at least two classes.
        class_scores: Instead of logits, scores of every class that are not a softmax's, the greatest of which is the
            confidence: those of an ATM head (`scores.mask_scores`).
        gate: Learned probability that the token is kept; with it alone, there need be no class scores.
        image: Image of every token; left out, all tokens are of one image.
        images: How many images the batch has; needed with `image`, and 1 without it.
        grid: Height and width of the patch grid; needed by `NeighboursAgree` and `Budget`.
        position: Place of every token in the grid, row by row; needed by `NeighboursAgree`.
        valid: Which entries hold a token, in the static layout; every image has the same number of entries.
        protected: Tokens that no policy lets leave, and that are nobody's neighbours: cls, registers, queries.
        exit: Which of the exit points this is, from 0.
        previous: Class that the earlier exit heads predicted for these tokens, first exit first.
        settled_label: Predicted class of the tokens that have left, at their place in the grid; -1 for the others.
        settled_score: The confidence that they left with.
    """

    logits: Float[Array, "tokens classes"] | None = None
    _: KW_ONLY
    class_scores: Float[Array, "tokens classes"] | None = None
    gate: Float[Array, "tokens"] | None = None
    image: Int[Array, "tokens"] | None = None
    images: int | None = None
    grid: tuple[int, int] | None = None
    position: Int[Array, "tokens"] | None = None
    valid: Bool[Array, "tokens"] | None = None
    protected: Bool[Array, "tokens"] | None = None
    exit: int | None = None
    previous: Int[Array, "exits tokens"] | None = None
    settled_label: Int[Array, "images positions"] | None = None
    settled_score: Float[Array, "images positions"] | None = None

    def __post_init__(self) -> None:
        """Check the shapes.

        Raises:
            TokenExitError: If there is nothing to look at, both kinds of class scores are given, a field does not fit
                the tokens, or the settled fields do not fit the grid.
        """
        require(
            self.logits is None or self.class_scores is None, "class_scores", "be given instead of `logits`", "both"
        )
        require(self._given is not None, "logits", "be given, or `class_scores` or `gate` instead", "nothing")
        for name, least, many in (
            ("logits", 2, f"two classes ({scores.ONE})"),
            ("class_scores", 1, "one class"),
        ):
            table = getattr(self, name)
            require(
                table is None or (table.ndim == 2 and table.shape[1] >= least),
                name,
                f"have shape (tokens, classes) with at least {many}",
                f"shape {None if table is None else tuple(table.shape)}",
            )
        tokens = self.tokens
        for name in ("gate", "image", "position", "valid", "protected"):
            row = getattr(self, name)
            require(
                row is None or tuple(row.shape) == (tokens,),
                name,
                f"have one entry for each of the {tokens} tokens",
                f"shape {None if row is None else tuple(row.shape)}",
            )
        require(self.image is None or self.images is not None, "images", "be given with `image`", self.images)
        require(
            self.previous is None or (self.previous.ndim == 2 and self.previous.shape[1] == tokens),
            "previous",
            f"have shape (exits, tokens) for {tokens} tokens",
            f"shape {None if self.previous is None else tuple(self.previous.shape)}",
        )
        require(
            self.valid is None or tokens % (self.images or 1) == 0,
            "valid",
            f"have as many entries for each of {self.images} images",
            f"{tokens} entries",
        )
        require(self.image is not None or (self.images or 1) == 1, "image", "be given for several images", "none")
        both = (self.settled_label is None) == (self.settled_score is None)
        require(both, "settled_score", "be given exactly if `settled_label` is", "one without the other")
        for name in ("settled_label", "settled_score"):
            settled = getattr(self, name)
            if settled is not None:
                require(
                    self.grid is not None and tuple(settled.shape) == (self.images, self.grid[0] * self.grid[1]),
                    name,
                    f"have shape (images, positions) for images={self.images} and grid={self.grid}",
                    f"shape {tuple(settled.shape)}",
                )

    @property
    def _given(self) -> Array | None:
        return next((one for one in (self.logits, self.class_scores, self.gate) if one is not None), None)

    @property
    def tokens(self) -> int:
        """How many tokens, or entries, the row has."""
        return cast(Array, self._given).shape[0]

    @property
    def classes(self) -> int:
        """How many classes there are.

        Raises:
            TokenExitError: If there are no class scores.
        """
        return self._table.shape[1]

    @property
    def _table(self) -> Array:
        table = self.logits if self.class_scores is None else self.class_scores
        if table is None:
            raise TokenExitError("`evidence` must have logits or class_scores for this policy, got a gate alone")
        return table

    @lazy
    def label(self) -> Int[Array, "tokens"]:
        """Predicted class of every token.

        Raises:
            TokenExitError: If there are no class scores.
        """
        xp = array_namespace(self._table)
        return xp.argmax(self._table, axis=-1)

    @lazy
    def confidence(self) -> Float[Array, "tokens"]:
        """Confidence of every token: `scores.confidence` of the logits, or the greatest of its class scores.

        Raises:
            TokenExitError: If there are no class scores.
        """
        if self.class_scores is None:
            return scores.confidence(self._table)
        xp = array_namespace(self.class_scores)
        return xp.max(xp.astype(self.class_scores, xp.float32), axis=-1)

    @lazy
    def entropy(self) -> Float[Array, "tokens"]:
        """Normalised entropy of every token (`scores.entropy`).

        Raises:
            TokenExitError: If there are no logits: scores that are not normalised have no entropy.
        """
        return scores.entropy(self._logits("entropy"))

    @lazy
    def margin(self) -> Float[Array, "tokens"]:
        """Margin of every token (`scores.margin`).

        Raises:
            TokenExitError: If there are no logits.
        """
        return scores.margin(self._logits("margin"))

    def _logits(self, score: str) -> Array:
        if self.logits is None:
            raise TokenExitError(f"`evidence` must have logits for the {score}, got none")
        return self.logits

    @lazy
    def eligible(self) -> Bool[Array, "tokens"]:
        """Which tokens a policy may let go: those that are valid and not protected."""
        xp = array_namespace(self._given)
        able = xp.ones_like(cast(Array, self._given), dtype=xp.bool)
        able = able if able.ndim == 1 else able[:, 0]
        if self.valid is not None:
            able = able & self.valid
        return able if self.protected is None else able & ~self.protected

    @lazy
    def known(self) -> Bool[Array, "tokens"]:
        """Of which tokens the confidence, and the gate if there is one, is a number."""
        xp = array_namespace(self._given)
        known = [self.confidence] if self.logits is not None or self.class_scores is not None else []
        known += [] if self.gate is None else [self.gate]
        able = ~xp.isnan(known[0])
        return able if len(known) == 1 else able & ~xp.isnan(known[1])

    def hardness(self, score: Score, /) -> Float[Array, "tokens"]:
        """How hard every token is by one of the scores: the harder, the greater; NaN is the hardest of all.

        Args:
            score: `confidence`, `entropy`, `margin` or `gate`.

        Raises:
            TokenExitError: If the evidence does not have what the score is computed from.
        """
        if score == "gate":
            value = self._gate
        else:
            value = self.entropy if score == "entropy" else -(self.margin if score == "margin" else self.confidence)
        xp = array_namespace(value)
        return xp.where(xp.isnan(value), xp.inf, value)

    @property
    def _gate(self) -> Array:
        if self.gate is None:
            raise TokenExitError("`evidence` must have gate for a policy that looks at it, got none")
        xp = array_namespace(self.gate)
        return xp.astype(self.gate, xp.float32)


@dataclass(frozen=True, repr=False)
class PerClass:
    """One threshold for every predicted class, wherever a policy takes a threshold.

    Attributes:
        thresholds: As many as there are classes: numbers in [0, 1], or one array.
    """

    thresholds: tuple[float, ...] | Float[Array, "classes"]

    def __post_init__(self) -> None:
        """Check the field.

        Raises:
            TokenExitError: If a threshold is not in [0, 1], or there are none.
        """
        given: Any = self.thresholds
        if isinstance(given, tuple):
            numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in given)
            ok = numbers and len(given) > 0 and all(0 <= one <= 1 for one in given)
        else:
            ok = is_array(given) and given.ndim == 1 and given.shape[0] > 0 and _is_numeric(given)
        require(ok, "thresholds", "be a tuple of numbers in [0, 1], or an array with one axis", given)

    def __repr__(self) -> str:
        """As it is written in code."""
        return _call(self)

    def of(self, label: Int[Array, "*tokens"], /, *, classes: int) -> Float[Array, "*tokens"]:
        """The threshold of every predicted class.

        Args:
            label: The classes; what is below 0 is given that of class 0.
            classes: How many classes there are.

        Raises:
            TokenExitError: If there are not as many thresholds.
        """
        xp = array_namespace(label)
        given: Any = self.thresholds
        given = like_numbers(given, label) if isinstance(given, tuple) else comparable(given, label)
        require(given.shape[0] == classes, "thresholds", f"be one for each of the {classes} classes", given.shape[0])
        flat = xp.reshape(xp.where(label < 0, 0, label), (math.prod(label.shape),))
        return xp.reshape(take(given, flat), label.shape)


Threshold = float | Float[Array, ""] | PerClass
"""What a policy compares a score with: a number in [0, 1], an array without axes, or one for every class."""


@dataclass(frozen=True)
class Policy(ABC):
    """Which tokens leave now. A subclass is a frozen dataclass with the method `leaves`."""

    score: ClassVar[str | None] = None
    """What a field `threshold` is compared with; policies that share it can be given one new threshold."""

    _direction: ClassVar[Literal["above", "below"] | None] = None
    """On which side of a threshold of its own a token leaves."""

    _binding: ClassVar[int] = 4
    """How tightly its expression holds together: 1 for `|`, 2 for `&`, 3 for `~`, 4 for a call."""

    @abstractmethod
    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        """Which tokens this policy lets go, protected ones not yet excepted."""

    def __call__(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        """Which tokens leave now; protected ones, and entries without a token, never do.

        Args:
            evidence: What is known at this exit point.

        Returns:
            True for every token that leaves.

        Raises:
            TokenExitError: If the evidence lacks something that the policy looks at.
        """
        leave = self.leaves(evidence)
        return leave if evidence.valid is None and evidence.protected is None else leave & evidence.eligible

    def __repr__(self) -> str:
        """The policy as it is written in code; options that have their defaults are left out."""
        return _call(self)

    def __and__(self, other: "Policy") -> "Policy":
        """A token leaves if both policies let it go."""
        return _Both(self, other) if isinstance(other, Policy) else NotImplemented

    def __or__(self, other: "Policy") -> "Policy":
        """A token leaves if either policy lets it go."""
        return _Either(self, other) if isinstance(other, Policy) else NotImplemented

    def __invert__(self) -> "Policy":
        """A token leaves if the policy does not let it go; one about which nothing is known, a NaN, stays all the same.

        A policy that lets nothing go for lack of earlier exits, or of neighbours, lets all go when turned round.

        Raises:
            TokenExitError: If the policy takes tokens back, or keeps to a budget: without these, it has no sense.
        """
        return _Not(self)

    def retaining(self, *, per_class: int) -> "Policy":
        """Keep the most confident leavers of every predicted class (DToP, ICCV 2023, section 3.3).

        Args:
            per_class: How many tokens of each predicted class stay, per image, of those that could leave.

        Returns:
            This policy with that retention.

        Raises:
            TokenExitError: If `per_class` is negative.
        """
        return _Retaining(self, per_class)

    def with_minimum(self, *, per_image: int) -> "Policy":
        """Keep the least confident leavers of an image of which too few tokens would stay.

        Args:
            per_image: How many tokens of each image stay at least, of those that are not protected.

        Returns:
            This policy with that minimum.

        Raises:
            TokenExitError: If `per_image` is negative.
        """
        return _Minimum(self, per_image)

    def with_threshold(self, threshold: Threshold, /) -> "Policy":
        """This policy with another threshold everywhere it has one.

        Args:
            threshold: The new threshold: a number, an array without axes, or `PerClass`.

        Returns:
            A policy of the same kind.

        Raises:
            TokenExitError: If the policy compares several kinds of score, for which one number cannot serve, or none.
        """
        kinds = sorted(self.compared_scores)
        require(len(kinds) == 1, "threshold", "be for a policy that compares one kind of score", kinds)
        return _exchange(self, threshold)

    @property
    def takes_back(self) -> bool:
        """Whether this policy, or one inside it, keeps to a number of tokens: so what leaves is not one by one."""
        inside = (getattr(self, field.name) for field in dataclasses.fields(self))
        counts = isinstance(self, Budget | _Retaining | _Minimum)
        return counts or any(one.takes_back for one in inside if isinstance(one, Policy))

    @property
    def direction(self) -> Literal["above", "below"] | None:
        """On which side of its threshold, or of the first threshold inside it, tokens leave; None without one."""
        inside = (getattr(self, field.name) for field in dataclasses.fields(self))
        found = (one.direction for one in inside if isinstance(one, Policy))
        return self._direction or next((one for one in found if one is not None), None)

    @property
    def mixes_images(self) -> bool:
        """Whether the result of an image depends on its batch mates, by this policy or by one inside it."""
        inside = (getattr(self, field.name) for field in dataclasses.fields(self))
        return any(one.mixes_images for one in inside if isinstance(one, Policy))

    @property
    def compared_scores(self) -> frozenset[str]:
        """The kinds of score that this policy, and those inside it, compare with a threshold."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        own = {self.score or type(self).__name__} if "threshold" in fields else set[str]()
        return frozenset(own.union(*(value.compared_scores for value in fields.values() if isinstance(value, Policy))))


@dataclass(frozen=True, repr=False)
class _Threshold(Policy, ABC):
    _direction: ClassVar[Literal["above", "below"] | None] = "above"
    threshold: Threshold

    def __post_init__(self) -> None:
        threshold: Any = self.threshold
        if isinstance(threshold, int | float) and not isinstance(threshold, bool):
            require(bool(0 <= threshold <= 1), "threshold", "be in [0, 1]", threshold)
        else:  # an array may be traced, so its value is not looked at
            scalar = is_array(threshold) and tuple(cast(Array, threshold).shape) == () and _is_numeric(threshold)
            ok = scalar or isinstance(threshold, PerClass)
            require(ok, "threshold", "be a number in [0, 1], an array without axes or PerClass", threshold)

    def _limit(self, label: Any, evidence: Evidence) -> Any:
        """The threshold, or that of each of some labels."""
        if isinstance(self.threshold, PerClass):
            return self.threshold.of(label(), classes=evidence.classes)
        return comparable(self.threshold, cast(Array, evidence._given))


@dataclass(frozen=True, repr=False)
class ConfidenceAbove(_Threshold):
    """A token leaves if its confidence is strictly greater (DToP, ICCV 2023, section 3.2).

    Attributes:
        threshold: Softmax probability in [0, 1]. Published: 0.90 (ADE20K, ViT-B), 0.95 (ViT-L).
    """

    score: ClassVar[str | None] = "confidence"

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        """See `Policy.leaves`."""
        return evidence.confidence > self._limit(lambda: evidence.label, evidence)


@dataclass(frozen=True, repr=False)
class EntropyBelow(_Threshold):
    """A token leaves if its normalised entropy is strictly lower (PAUMER, BMVC 2022, section 3).

    Attributes:
        threshold: Entropy divided by log(classes), in [0, 1].
    """

    score: ClassVar[str | None] = "entropy"
    _direction: ClassVar[Literal["above", "below"] | None] = "below"

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        """See `Policy.leaves`."""
        return evidence.entropy < self._limit(lambda: evidence.label, evidence)


@dataclass(frozen=True, repr=False)
class MarginAbove(_Threshold):
    """A token leaves if its two best classes are strictly further apart.

    Attributes:
        threshold: Difference of softmax probabilities in [0, 1].
    """

    score: ClassVar[str | None] = "margin"

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        """See `Policy.leaves`."""
        return evidence.margin > self._limit(lambda: evidence.label, evidence)


@dataclass(frozen=True, repr=False)
class GateBelow(_Threshold):
    """A token leaves if the learned probability that it is kept is strictly lower (SViT, WACV 2024, section 3.2).

    Attributes:
        threshold: Probability in [0, 1]; one per class needs class scores beside the gate.
    """

    score: ClassVar[str | None] = "gate"
    _direction: ClassVar[Literal["above", "below"] | None] = "below"

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        """See `Policy.leaves`."""
        return evidence._gate < self._limit(lambda: evidence.label, evidence)


@dataclass(frozen=True, repr=False)
class Budget(Policy):
    """The easiest tokens leave, so that of every image only so many stay (PAUMER, BMVC 2022, section 3: a fraction).

    Of equal tokens the earlier stays. Protected tokens are beside the budget.

    Attributes:
        keep: What may stay of the patches that an image had at first: a float, or an array without axes of that kind,
            is a fraction in [0, 1], rounded to the nearest number of tokens; an int is that number.
        by: By what the easiest are known: `confidence`, `entropy`, `margin` or `gate`.
    """

    keep: float | int | Float[Array, ""] | Int[Array, ""]
    by: Score = "confidence"

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If `keep` is neither a fraction in [0, 1] nor a whole number, or `by` no score.
        """
        keep: Any = self.keep
        if is_array(keep):
            ok = tuple(keep.shape) == () and _is_numeric(keep)
            require(ok, "keep", "be a number or an array without axes", keep)
        else:
            fraction = isinstance(keep, float) and 0 <= keep <= 1
            require(fraction or is_whole(keep), "keep", "be a float in [0, 1] or a whole number", keep)
        known = ("confidence", "entropy", "margin", "gate")
        require(self.by in known, "by", f"be one of {', '.join(known)}", repr(self.by))

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        """See `Policy.leaves`."""
        return self._beyond(evidence, evidence.image, per=1)

    def _beyond(self, evidence: Evidence, image: Array | None, *, per: int) -> Array:
        if evidence.grid is None:
            raise TokenExitError(f"`evidence` must have grid for {type(self).__name__}, got none")
        hardness = evidence.hardness(self.by)
        xp = array_namespace(hardness)
        rank = rank_in_group(hardness, _contest(evidence, image))
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

    @property
    def mixes_images(self) -> bool:
        """See `Policy.mixes_images`."""
        return True

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
class NeighboursAgree(_Threshold):
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
    radius: int = 1

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If the threshold is not in [0, 1] or the radius is not a whole number from 0 up.
        """
        super().__post_init__()
        require(is_whole(self.radius), "radius", "be a whole number from 0 to 2147483647", repr(self.radius))

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        """See `Policy.leaves`."""
        confident = evidence.confidence > self._limit(lambda: evidence.label, evidence)
        if self.radius == 0:
            return confident
        if evidence.grid is None or evidence.images is None or evidence.position is None:
            lacking = [name for name in ("images", "grid", "position") if getattr(evidence, name) is None]
            raise TokenExitError(
                f"`evidence` must have images, grid and position for NeighboursAgree, got none of {', '.join(lacking)}"
            )
        xp = array_namespace(confident)
        height, width = evidence.grid
        places = evidence.images * height * width
        inside = (evidence.position >= 0) & (evidence.position < height * width)
        inside = inside & evidence.eligible
        place = evidence.position if evidence.image is None else evidence.image * height * width + evidence.position
        place = xp.where(inside, place, places)
        votes = self._votes(evidence.label, confident)
        absent = filled((places,), -1, votes, dtype=votes.dtype)
        if evidence.settled_label is not None and evidence.settled_score is not None:
            settled = evidence.settled_label
            limit = self._limit(lambda: settled, evidence)
            absent = xp.astype(self._votes(settled, evidence.settled_score > limit), votes.dtype)
        grid = xp.reshape(lay_out(votes, place, xp.reshape(absent, (places,))), (evidence.images, height, width))
        lowest, highest = extremes(grid, radius=self.radius)
        agreed = xp.reshape(lowest == highest, (places,))
        return confident & take_or(agreed, place, inside, xp.zeros_like(confident))

    @staticmethod
    def _votes(label: Array, confident: Array) -> Array:
        """The class of what is confident, and -1 for the rest, which agrees with nobody."""
        xp = array_namespace(label)
        return xp.where(confident, label, -1)


@dataclass(frozen=True, repr=False)
class _Never(Policy):
    def __repr__(self) -> str:
        return "never()"

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        return evidence.eligible & False


@dataclass(frozen=True, repr=False)
class _Always(Policy):
    def __repr__(self) -> str:
        return "always()"

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        return evidence.eligible


@dataclass(frozen=True, repr=False)
class _Both(Policy):
    _binding: ClassVar[int] = 2
    left: Policy
    right: Policy

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        return self.left(evidence) & self.right(evidence)

    def __repr__(self) -> str:
        return f"{_part(self.left, 2)} & {_part(self.right, 3)}"


@dataclass(frozen=True, repr=False)
class _Either(Policy):
    _binding: ClassVar[int] = 1
    left: Policy
    right: Policy

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        return self.left(evidence) | self.right(evidence)

    def __repr__(self) -> str:
        return f"{_part(self.left, 1)} | {_part(self.right, 2)}"


@dataclass(frozen=True, repr=False)
class _Not(Policy):
    _binding: ClassVar[int] = 3
    policy: Policy

    def __post_init__(self) -> None:
        simple = not self.policy.takes_back
        require(simple, "policy", "neither take tokens back nor keep to a budget for `~`", self.policy)

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        return ~self.policy(evidence) & evidence.known

    def __repr__(self) -> str:
        return f"~{_part(self.policy, 3)}"


@dataclass(frozen=True, repr=False)
class _Retaining(Policy):
    policy: Policy
    per_class: int

    def __post_init__(self) -> None:
        require(is_whole(self.per_class), "per_class", "be a whole number from 0 to 2147483647", repr(self.per_class))

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        leave, label, classes = self.policy(evidence), evidence.label, evidence.classes
        images = evidence.images or 1
        if evidence.valid is not None:  # the static layout: row by row, and with static shapes
            xp = array_namespace(leave)
            rows = (xp.reshape(x, (images, evidence.tokens // images)) for x in (leave, evidence.confidence, label))
            kept = xp.reshape(top_k_per_group(*rows, k=self.per_class, groups=classes), (evidence.tokens,))
            return leave & ~kept
        group = label if evidence.image is None else evidence.image * classes + label
        groups = images * classes
        return leave & ~top_k_per_group(leave, evidence.confidence, group, k=self.per_class, groups=groups)

    def __repr__(self) -> str:
        return f"{_part(self.policy, 4)}.retaining(per_class={self.per_class})"


@dataclass(frozen=True, repr=False)
class _Minimum(Policy):
    policy: Policy
    per_image: int

    def __post_init__(self) -> None:
        require(is_whole(self.per_image), "per_image", "be a whole number from 0 to 2147483647", repr(self.per_image))

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        leave = self.policy(evidence)
        xp = array_namespace(leave)
        by = "gate" if evidence.logits is None and evidence.class_scores is None else "confidence"
        hardness = evidence.hardness(by)
        # First those that stay anyhow, then the hardest of the others: of these, none is as hard.
        most = xp.finfo(hardness.dtype).max
        order = xp.where(leave, xp.where(hardness > most, most, hardness), xp.inf)
        return leave & (rank_in_group(order, _contest(evidence, evidence.image)) >= self.per_image)

    def __repr__(self) -> str:
        return f"{_part(self.policy, 4)}.with_minimum(per_image={self.per_image})"


def _contest(evidence: Evidence, image: Array | None) -> Array:
    """Image of every token that may leave, 0 if there is but one; and -1 for the others, which compete with none."""
    xp = array_namespace(evidence.eligible)
    if image is None:
        return xp.astype(evidence.eligible, xp.int32) - 1
    return xp.where(evidence.eligible, image, -1)


def _is_numeric(value: Array) -> bool:
    """Whether an array holds real numbers: its values are not looked at, for they may be traced."""
    return array_namespace(value).isdtype(value.dtype, ("integral", "real floating"))


def _part(policy: Policy, least: int) -> str:
    """A policy inside an expression: in parentheses if it holds together less tightly than what is around it."""
    return repr(policy) if policy._binding >= least else f"({policy!r})"


def _call(value: Any) -> str:
    """The call that makes a dataclass: its first field, and those of the others that have not their default."""
    held = [(field.name, getattr(value, field.name), field.default) for field in dataclasses.fields(value)]
    first = [_literal(one) for _, one, _ in held[:1]]
    options = [f"{name}={_literal(one)}" for name, one, default in held[1:] if is_array(one) or one != default]
    return f"{type(value).__name__}({', '.join(first + options)})"


def _literal(value: Any) -> str:
    return repr(float(value)) if isinstance(value, float) else repr(value)  # NumPy's doubles are floats


def never() -> Policy:
    """Nothing leaves: with it, an exit point is not even evaluated."""
    return _Never()


def always() -> Policy:
    """Everything leaves: the network is cut short here."""
    return _Always()


_KINDS: dict[str, type[Policy] | type[PerClass]] = {
    "ConfidenceAbove": ConfidenceAbove,
    "EntropyBelow": EntropyBelow,
    "MarginAbove": MarginAbove,
    "GateBelow": GateBelow,
    "NeighboursAgree": NeighboursAgree,
    "Budget": Budget,
    "BatchBudget": BatchBudget,
    "Patience": Patience,
    "never": _Never,
    "always": _Always,
    "both": _Both,
    "either": _Either,
    "not": _Not,
    "retaining": _Retaining,
    "minimum": _Minimum,
    "PerClass": PerClass,
}


def to_dict(policy: Policy, /) -> dict[str, Any]:
    """The policy as plain data, for JSON.

    Args:
        policy: A policy of this library, thresholds included.

    Returns:
        `{"kind": ..., field: value, ...}`, nested for policies of policies.

    Raises:
        TokenExitError: If the policy, or one inside it, is not of this library, or a threshold is out of range.
    """
    data = to_plain(policy, _KINDS, argument="policy", write=_plain)
    from_dict(data)  # an array's value, which may be out of range, has not been looked at before
    return data


def from_dict(data: Mapping[str, Any], /) -> Policy:
    """The policy that `to_dict` wrote down.

    Args:
        data: What `to_dict` returned, or its like read from a file.

    Returns:
        The policy.

    Raises:
        TokenExitError: If the kind is unknown, a field is missing or unknown, or a value is out of its range.
    """
    policy = from_plain(data, _KINDS, argument="policy", read=_read)
    require(isinstance(policy, Policy), "policy", "be a policy", policy)
    return policy


def _plain(value: Any) -> Any:
    if isinstance(value, Policy | PerClass):
        return to_plain(value, _KINDS, argument="policy", write=_plain)
    if isinstance(value, tuple) or (is_array(value) and value.ndim == 1):
        return [float(one) for one in value]
    if is_array(value):
        return int(value) if array_namespace(value).isdtype(value.dtype, "integral") else float(value)
    return value


def _read(name: str, value: Any) -> Any:
    if name in ("left", "right", "policy"):
        return from_dict(value)
    if name == "threshold" and isinstance(value, Mapping):
        found = from_plain(value, _KINDS, argument="threshold", read=_read)
        require(isinstance(found, PerClass), "threshold", "be a number or PerClass", repr(found))
        return found
    if name == "thresholds":
        require(isinstance(value, list), name, "be a list of numbers", repr(value))
        return tuple(value)
    if name != "by":
        require(isinstance(value, int | float) and not isinstance(value, bool), name, "be a number", repr(value))
    return value


def _exchange(policy: Any, threshold: Threshold) -> Any:
    changes = {}
    for field in dataclasses.fields(policy):
        value = getattr(policy, field.name)
        if field.name == "threshold":
            changes[field.name] = threshold
        elif isinstance(value, Policy):
            changes[field.name] = _exchange(value, threshold)
    return dataclasses.replace(policy, **changes)
