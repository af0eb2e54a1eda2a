"""Who leaves now: exit policies, small and composable.

    policy = ConfidenceAbove(0.95).retaining(per_class=5)
    leave = policy(Evidence(logits, image=image))

A policy is a frozen dataclass; `&`, `|` and `.retaining` make policies of policies. Its thresholds are data, floats or
arrays without axes, and `with_threshold` exchanges them. A policy of your own is a dataclass with one method:

    @dataclass(frozen=True)
    class CertainSky(Policy):
        threshold: float

        def leaves(self, evidence):
            return (evidence.label == 0) & (evidence.confidence > self.threshold)
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any, ClassVar, cast

from jaxtyping import Bool, Float, Int

from tokenexit import scores
from tokenexit._array import Array, array_namespace, device, is_array_api_obj, take_or
from tokenexit._grid import extremes, lay_out
from tokenexit.errors import TokenExitError, require
from tokenexit.retention import top_k_per_group

__all__ = [
    "ConfidenceAbove",
    "EntropyBelow",
    "Evidence",
    "MarginAbove",
    "NeighboursAgree",
    "Policy",
    "always",
    "from_dict",
    "never",
    "to_dict",
]


@dataclass(frozen=True)
class Evidence:
    """What a policy may look at: the tokens that run at an exit point, in one row.

    Attributes:
        logits: Class scores of every token, from the head at this exit.
        image: Image of every token; left out, all tokens are of one image.
        images: How many images the batch has; needed by `NeighboursAgree`.
        grid: Height and width of the patch grid; needed by `NeighboursAgree`.
        position: Place of every token in the grid, row by row; needed by `NeighboursAgree`.
        protected: Tokens that no policy lets leave, and that are nobody's neighbours: cls, registers, queries.
        settled_label: Predicted class of the tokens that have left, at their place in the grid; -1 for the others.
        settled_score: The confidence that they left with.
    """

    logits: Float[Array, "tokens classes"]
    _: KW_ONLY
    image: Int[Array, "tokens"] | None = None
    images: int | None = None
    grid: tuple[int, int] | None = None
    position: Int[Array, "tokens"] | None = None
    protected: Bool[Array, "tokens"] | None = None
    settled_label: Int[Array, "images positions"] | None = None
    settled_score: Float[Array, "images positions"] | None = None

    def __post_init__(self) -> None:
        """Check the shapes.

        Raises:
            TokenExitError: If a field does not fit the logits, or the settled fields not the grid.
        """
        require(
            self.logits.ndim == 2 and self.logits.shape[1] >= 1,
            "logits",
            "have shape (tokens, classes) with at least one class",
            f"shape {tuple(self.logits.shape)}",
        )
        for name in ("image", "position", "protected"):
            row = getattr(self, name)
            require(
                row is None or tuple(row.shape) == (self.logits.shape[0],),
                name,
                f"have one entry for each of the {self.logits.shape[0]} tokens",
                f"shape {None if row is None else tuple(row.shape)}",
            )
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

    @cached_property
    def label(self) -> Int[Array, "tokens"]:
        """Predicted class of every token."""
        xp = array_namespace(self.logits)
        return xp.argmax(self.logits, axis=-1)

    @cached_property
    def confidence(self) -> Float[Array, "tokens"]:
        """Confidence of every token (`scores.confidence`)."""
        return scores.confidence(self.logits)


@dataclass(frozen=True)
class Policy(ABC):
    """Which tokens leave now. A subclass is a frozen dataclass with the method `leaves`."""

    score: ClassVar[str | None] = None
    """What a field `threshold` is compared with; policies that share it can be given one new threshold."""

    @abstractmethod
    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        """Which tokens this policy lets go, protected ones not yet excepted."""

    def __call__(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        """Which tokens leave now; protected tokens never do.

        Args:
            evidence: What is known at this exit point.

        Returns:
            True for every token that leaves.

        Raises:
            TokenExitError: If the evidence lacks something that the policy looks at.
        """
        leave = self.leaves(evidence)
        return leave if evidence.protected is None else leave & ~evidence.protected

    def __and__(self, other: "Policy") -> "Policy":
        """A token leaves if both policies let it go."""
        return _Both(self, other) if isinstance(other, Policy) else NotImplemented

    def __or__(self, other: "Policy") -> "Policy":
        """A token leaves if either policy lets it go."""
        return _Either(self, other) if isinstance(other, Policy) else NotImplemented

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

    def with_threshold(self, threshold: float | Array, /) -> "Policy":
        """This policy with another threshold everywhere it has one.

        Args:
            threshold: The new threshold: a float or an array without axes.

        Returns:
            A policy of the same kind.

        Raises:
            TokenExitError: If the policy compares several kinds of score, for which one number cannot serve, or none.
        """
        kinds = sorted(self.compared_scores)
        require(len(kinds) == 1, "threshold", "be for a policy that compares one kind of score", kinds)
        return _exchange(self, threshold)

    @property
    def compared_scores(self) -> frozenset[str]:
        """The kinds of score that this policy, and those inside it, compare with a threshold."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        own = {self.score or type(self).__name__} if "threshold" in fields else set[str]()
        return frozenset(own.union(*(value.compared_scores for value in fields.values() if isinstance(value, Policy))))


@dataclass(frozen=True)
class _Threshold(Policy, ABC):
    threshold: float | Float[Array, ""]

    def __post_init__(self) -> None:
        threshold: Any = self.threshold
        if isinstance(threshold, int | float) and not isinstance(threshold, bool):
            require(0 <= threshold <= 1, "threshold", "be in [0, 1]", threshold)
        else:  # an array may be traced, so its value is not looked at
            scalar = is_array_api_obj(threshold) and tuple(cast(Array, threshold).shape) == ()
            require(scalar, "threshold", "be a number in [0, 1] or an array without axes", repr(threshold))


@dataclass(frozen=True)
class ConfidenceAbove(_Threshold):
    """A token leaves if its confidence is strictly greater (DToP, ICCV 2023, section 3.2).

    Attributes:
        threshold: Softmax probability in [0, 1]. Published: 0.90 (ADE20K, ViT-B), 0.95 (ViT-L).
    """

    score: ClassVar[str | None] = "confidence"

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        """See `Policy.leaves`."""
        return evidence.confidence > self.threshold


@dataclass(frozen=True)
class EntropyBelow(_Threshold):
    """A token leaves if its normalised entropy is strictly lower (PAUMER, BMVC 2022, section 3).

    Attributes:
        threshold: Entropy divided by log(classes), in [0, 1].
    """

    score: ClassVar[str | None] = "entropy"

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        """See `Policy.leaves`."""
        return scores.entropy(evidence.logits) < self.threshold


@dataclass(frozen=True)
class MarginAbove(_Threshold):
    """A token leaves if its two best classes are strictly further apart.

    Attributes:
        threshold: Difference of softmax probabilities in [0, 1].
    """

    score: ClassVar[str | None] = "margin"

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        """See `Policy.leaves`."""
        return scores.margin(evidence.logits) > self.threshold


@dataclass(frozen=True)
class NeighboursAgree(_Threshold):
    """A token leaves if the grid around it predicts the same class, and is confident too.

    New in this library. Early exits hurt at the boundaries of things; this rule lets only their interior go. Tokens
    that have left count with the class and confidence they left with. A place of the grid about which nothing is
    known counts against its neighbours; what lies beyond the edge of the grid does not.

    Attributes:
        threshold: Softmax probability in [0, 1] that the token and all its neighbours must exceed.
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
        require(_is_whole(self.radius), "radius", "be a whole number of at least 0", repr(self.radius))

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        """See `Policy.leaves`."""
        confident = evidence.confidence > self.threshold
        if self.radius == 0:
            return confident
        if evidence.grid is None or evidence.images is None or evidence.position is None:
            raise TokenExitError(
                "`evidence` must have images, grid and position for NeighboursAgree, got "
                f"images={evidence.images}, grid={evidence.grid}, position={evidence.position}"
            )
        xp = array_namespace(evidence.logits)
        height, width = evidence.grid
        places = evidence.images * height * width
        inside = (evidence.position >= 0) & (evidence.position < height * width)
        if evidence.protected is not None:
            inside = inside & ~evidence.protected
        place = evidence.position if evidence.image is None else evidence.image * height * width + evidence.position
        place = xp.where(inside, place, xp.full_like(place, places))
        votes = self._votes(evidence.label, confident)
        absent = xp.full(places, -1, dtype=votes.dtype, device=device(votes))
        if evidence.settled_label is not None and evidence.settled_score is not None:
            absent = self._votes(evidence.settled_label, evidence.settled_score > self.threshold)
        grid = xp.reshape(lay_out(votes, place, xp.reshape(absent, (places,))), (evidence.images, height, width))
        lowest, highest = extremes(grid, radius=self.radius)
        agreed = xp.reshape(lowest == highest, (places,))
        return confident & take_or(agreed, place, inside, xp.zeros_like(confident))

    @staticmethod
    def _votes(label: Array, confident: Array) -> Array:
        """The class of what is confident, and -1 for the rest, which agrees with nobody."""
        xp = array_namespace(label)
        return xp.where(confident, label, xp.full_like(label, -1))


@dataclass(frozen=True)
class _Never(Policy):
    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        xp = array_namespace(evidence.logits)
        return xp.zeros_like(evidence.label, dtype=xp.bool)


@dataclass(frozen=True)
class _Always(Policy):
    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        xp = array_namespace(evidence.logits)
        return xp.ones_like(evidence.label, dtype=xp.bool)


@dataclass(frozen=True)
class _Both(Policy):
    left: Policy
    right: Policy

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        return self.left(evidence) & self.right(evidence)


@dataclass(frozen=True)
class _Either(Policy):
    left: Policy
    right: Policy

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        return self.left(evidence) | self.right(evidence)


@dataclass(frozen=True)
class _Retaining(Policy):
    policy: Policy
    per_class: int

    def __post_init__(self) -> None:
        require(_is_whole(self.per_class), "per_class", "be a whole number of at least 0", repr(self.per_class))

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        leave = self.policy(evidence)
        group = evidence.label
        if evidence.image is not None:
            group = evidence.image * evidence.logits.shape[1] + group
        return leave & ~top_k_per_group(leave, evidence.confidence, group, k=self.per_class)


def never() -> Policy:
    """Nothing leaves: with it, an exit point is not even evaluated."""
    return _Never()


def always() -> Policy:
    """Everything leaves: the network is cut short here."""
    return _Always()


_KINDS: dict[str, type[Policy]] = {
    "ConfidenceAbove": ConfidenceAbove,
    "EntropyBelow": EntropyBelow,
    "MarginAbove": MarginAbove,
    "NeighboursAgree": NeighboursAgree,
    "never": _Never,
    "always": _Always,
    "both": _Both,
    "either": _Either,
    "retaining": _Retaining,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def to_dict(policy: Policy, /) -> dict[str, Any]:
    """The policy as plain data, for JSON.

    Args:
        policy: A policy of this library, thresholds included.

    Returns:
        `{"kind": ..., field: value, ...}`, nested for policies of policies.

    Raises:
        TokenExitError: If the policy, or one inside it, is not of this library, or a threshold is out of range.
    """
    require(type(policy) in _NAMES, "policy", f"be one of {', '.join(_KINDS)} to be written down", repr(policy))
    fields = {field.name: _plain(getattr(policy, field.name)) for field in dataclasses.fields(policy)}
    data = {"kind": _NAMES[type(policy)]} | fields
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
    require(isinstance(data, Mapping), "policy", "be a mapping", repr(data))
    kind = data.get("kind")
    require(isinstance(kind, str) and kind in _KINDS, "kind", f"be one of {', '.join(_KINDS)}", repr(kind))
    cls = _KINDS[str(kind)]
    fields = {field.name: field for field in dataclasses.fields(cls)}
    require(
        set(data) - {"kind"} == set(fields),
        "policy",
        f"have the fields {sorted(fields)} for kind {kind}",
        sorted(set(data) - {"kind"}),
    )
    values = {}
    for name in fields:
        value = data[name]
        if name in ("left", "right", "policy"):
            value = from_dict(value)
        else:
            require(isinstance(value, int | float) and not isinstance(value, bool), name, "be a number", repr(value))
        values[name] = value
    return cls(**values)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _plain(value: Any) -> Any:
    if isinstance(value, Policy):
        return to_dict(value)
    return value if isinstance(value, int) else float(value)


def _exchange(policy: Any, threshold: float | Array) -> Any:
    changes = {}
    for field in dataclasses.fields(policy):
        value = getattr(policy, field.name)
        if field.name == "threshold":
            changes[field.name] = threshold
        elif isinstance(value, Policy):
            changes[field.name] = _exchange(value, threshold)
    return dataclasses.replace(policy, **changes)
