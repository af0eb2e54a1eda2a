"""The base of exit policies, their composition, and thresholds by class."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

from jaxtyping import Bool, Float, Int

from tokenexit._array import Array, array_namespace, comparable, is_array, like_numbers, take
from tokenexit._plain import is_whole
from tokenexit.errors import TokenExitError, require
from tokenexit.policies.evidence import Evidence
from tokenexit.retention import rank_in_group, top_k_per_group
from tokenexit.scores import SCORES

__all__ = ["COMPOSED", "PerClass", "Policy", "Threshold", "ThresholdPolicy", "always", "contest", "is_numeric", "never"]


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
            ok = is_array(given) and given.ndim == 1 and given.shape[0] > 0 and is_numeric(given)
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


_READABLE = frozenset({*SCORES, *(field.name for field in dataclasses.fields(Evidence))})

Threshold = float | Float[Array, ""] | PerClass
"""What a policy compares a score with: a number in [0, 1], an array without axes, or one for every class."""


@dataclass(frozen=True)
class Policy(ABC):
    """Exit policy: which tokens exit. A subclass is a frozen dataclass with the method `leaves`."""

    score: ClassVar[str | None] = None
    """What a field `threshold` is compared with; policies that share it can be given one new threshold."""

    direction: ClassVar[Literal["above", "below"] | None] = None
    """On which side of its threshold a token exits; None without a threshold."""

    reads: ClassVar[frozenset[str] | None] = None
    """Scores, and other fields of `Evidence`, that `leaves` reads. If left out, `score` where that is one of the
    library's, and else class scores: a plan is refused where there are none."""

    ranks: ClassVar[bool] = False
    """Whether a decision depends on other tokens by count: a top-k, or a budget."""

    mixes: ClassVar[bool] = False
    """Whether a decision depends on the other images of a batch."""

    _spares: ClassVar[bool] = False
    """Whether `leaves` itself spares tokens that are not eligible to exit, as what asks other policies does."""

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
            TokenExitError: If it is no `Evidence`, or lacks something that the policy looks at.
        """
        given = isinstance(evidence, Evidence)
        require(given, "evidence", "be policies.Evidence, as `policies.Evidence(logits)`", evidence)
        try:
            leave = self.leaves(evidence)
        except (TypeError, AttributeError) as error:
            # A policy of one's own that looks at a field which is None: `exit`, say, which a model alone fills in.
            if "NoneType" not in str(error):
                raise
            lacking = [
                field.name
                for field in dataclasses.fields(evidence)
                if getattr(evidence, field.name) is None and _mentions(self.leaves, field.name)
            ]
            rule = (
                f"have all that {type(self).__name__} looks at: give it by name, as `policies.Evidence(logits, exit=0)`"
            )
            raise TokenExitError(f"`evidence` must {rule}, got none of {', '.join(lacking)}: {error}") from error
        _require_mask(self, leave)
        spared = self._spares or (evidence.valid is None and evidence.protected is None)
        return leave if spared else leave & evidence.eligible

    def __repr__(self) -> str:
        """The policy as it is written in code; options that have their defaults are left out."""
        return _call(self)

    def __and__(self, other: "Policy") -> "Policy":
        """A token leaves if both policies let it go."""
        return _Both(self, other) if isinstance(other, Policy) else NotImplemented

    def __or__(self, other: "Policy") -> "Policy":
        """A token leaves if either policy lets it go."""
        return _Either(self, other) if isinstance(other, Policy) else NotImplemented

    def __bool__(self) -> bool:
        """Refuse `and`, `or` and `not`, of which Python would keep one policy and drop the other.

        Raises:
            TokenExitError: Always.
        """
        raise TokenExitError(f"`policy` must be composed by `&`, `|` and `~`, not by `and`, `or` and `not`, got {self}")

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
        return _exchanged(self, threshold)

    @property
    def takes_back(self) -> bool:
        """Whether the decision depends on other tokens by count, here or in a policy inside: a top-k or a budget."""
        return self.ranks or any(one.takes_back for one in self._inside)

    @property
    def mixes_images(self) -> bool:
        """Whether the decision depends on the other images of a batch, here or in a policy inside."""
        return self.mixes or any(one.mixes_images for one in self._inside)

    @property
    def compared_scores(self) -> frozenset[str]:
        """The kinds of score that this policy, and those inside it, compare with a threshold."""
        fields = {field.name for field in dataclasses.fields(self)}
        own = {self.score or type(self).__name__} if "threshold" in fields else set[str]()
        return frozenset(own.union(*(one.compared_scores for one in self._inside)))

    @property
    def directions(self) -> frozenset[str]:
        """On which sides of their thresholds tokens exit, by this policy and those inside it."""
        own = set[str]() if self.direction is None else {self.direction}
        return frozenset(own.union(*(one.directions for one in self._inside)))

    @property
    def asks_classes(self) -> bool:
        """Whether this policy, or one inside it, reads class scores, or does not say what it reads."""
        read = self._reads()
        silent = self.reads is None and not self._inside and read.isdisjoint(_READABLE)
        return silent or not read.isdisjoint(SCORES) or any(one.asks_classes for one in self._inside)

    @property
    def needs(self) -> frozenset[str]:
        """The scores, and other fields of `Evidence`, that this policy and those inside it read."""
        return frozenset(self._reads().union(*(one.needs for one in self._inside)))

    def _reads(self) -> frozenset[str]:
        if self.reads is not None:
            return self.reads
        return frozenset() if self.score is None else frozenset({self.score})

    @property
    def _inside(self) -> tuple["Policy", ...]:
        held = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple(one for one in held if isinstance(one, Policy))


@dataclass(frozen=True, repr=False)
class ThresholdPolicy(Policy, ABC):
    """A policy that compares one score of every token with a threshold: what `ConfidenceAbove` and its like are.

    A subclass is a frozen dataclass with `score`, `direction` and the method `value`. It is then given thresholds by
    class, has them exchanged by `with_threshold`, and lets no token with a NaN score exit.

    Attributes:
        threshold: A number in [0, 1], an array without axes, or `PerClass`.
    """

    threshold: Threshold

    def __post_init__(self) -> None:
        """Check the threshold.

        Raises:
            TokenExitError: If it is neither a number in [0, 1], an array without axes nor `PerClass`.
        """
        threshold: Any = self.threshold
        if isinstance(threshold, int | float) and not isinstance(threshold, bool):
            require(bool(0 <= threshold <= 1), "threshold", "be in [0, 1]", threshold)
        else:  # an array may be traced, so its value is not looked at
            scalar = is_array(threshold) and tuple(cast(Array, threshold).shape) == () and is_numeric(threshold)
            ok = scalar or isinstance(threshold, PerClass)
            require(ok, "threshold", "be a number in [0, 1], an array without axes or PerClass", threshold)

    def _reads(self) -> frozenset[str]:
        # The predicted class says which threshold is a token's.
        return super()._reads() | (frozenset({"confidence"}) if isinstance(self.threshold, PerClass) else frozenset())

    @abstractmethod
    def value(self, evidence: Evidence, /) -> Float[Array, "tokens"]:
        """The score of every token."""

    def limit(
        self, evidence: Evidence, /, *, label: Int[Array, "*tokens"] | None = None
    ) -> float | Float[Array, "..."]:
        """The threshold, or that of every token.

        Args:
            evidence: The evidence.
            label: Classes whose thresholds are wanted; the predicted ones if left out.

        Returns:
            What the scores are compared with.

        Raises:
            TokenExitError: If there is one threshold for each class, and not as many classes.
        """
        if isinstance(self.threshold, PerClass):
            return self.threshold.of(evidence.label if label is None else label, classes=evidence.classes)
        return comparable(self.threshold, cast(Array, evidence.any_scores))

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        """See `Policy.leaves`."""
        value, limit = self.value(evidence), self.limit(evidence)
        return value > limit if self.direction == "above" else value < limit


@dataclass(frozen=True, repr=False)
class _Never(Policy):
    reads: ClassVar[frozenset[str] | None] = frozenset()
    _spares: ClassVar[bool] = True

    def __repr__(self) -> str:
        return "never()"

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        return evidence.eligible & False


@dataclass(frozen=True, repr=False)
class _Always(Policy):
    reads: ClassVar[frozenset[str] | None] = frozenset()
    _spares: ClassVar[bool] = True

    def __repr__(self) -> str:
        return "always()"

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        return evidence.eligible


@dataclass(frozen=True, repr=False)
class _Both(Policy):
    _spares: ClassVar[bool] = True
    _binding: ClassVar[int] = 2
    left: Policy
    right: Policy

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        return self.left(evidence) & self.right(evidence)

    def __repr__(self) -> str:
        return f"{_part(self.left, 2)} & {_part(self.right, 3)}"


@dataclass(frozen=True, repr=False)
class _Either(Policy):
    _spares: ClassVar[bool] = True
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

    @property
    def directions(self) -> frozenset[str]:
        turned = {"above": "below", "below": "above"}
        return frozenset(turned[one] for one in self.policy.directions)

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        return ~self.policy(evidence) & evidence.known

    def __repr__(self) -> str:
        return f"~{_part(self.policy, 3)}"


@dataclass(frozen=True, repr=False)
class _Retaining(Policy):
    _spares: ClassVar[bool] = True
    ranks: ClassVar[bool] = True
    policy: Policy
    per_class: int

    def _reads(self) -> frozenset[str]:
        return frozenset({"confidence"})

    def __post_init__(self) -> None:
        require(is_whole(self.per_class), "per_class", "be a whole number from 0 to 2147483647", repr(self.per_class))

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        leave, label, classes = self.policy(evidence), evidence.label, evidence.classes
        images = evidence.images or 1
        if evidence.valid is not None:  # the static layout: row by row, and with static shapes
            xp = array_namespace(leave)
            rows = (xp.reshape(x, (images, evidence.tokens // images)) for x in (leave, evidence.confidence, label))
            kept = xp.reshape(top_k_per_group(*rows, k=self.per_class, groups=classes), (evidence.tokens,))
            return leave ^ kept  # of those that leave alone
        group = label if evidence.image is None else evidence.image * classes + label
        groups = images * classes
        return leave ^ top_k_per_group(leave, evidence.confidence, group, k=self.per_class, groups=groups)

    def __repr__(self) -> str:
        return f"{_part(self.policy, 4)}.retaining(per_class={self.per_class})"


@dataclass(frozen=True, repr=False)
class _Minimum(Policy):
    _spares: ClassVar[bool] = True
    ranks: ClassVar[bool] = True
    policy: Policy
    per_image: int

    def __post_init__(self) -> None:
        require(is_whole(self.per_image), "per_image", "be a whole number from 0 to 2147483647", repr(self.per_image))

    def leaves(self, evidence: Evidence, /) -> Bool[Array, "tokens"]:
        leave = self.policy(evidence)
        xp = array_namespace(leave)
        others = [name for name in ("gate", "error") if getattr(evidence, name) is not None]
        hardness = evidence.hardness("confidence" if evidence.has_classes else others[0])
        # First those that stay anyhow, then the hardest of the others: of these, none is as hard.
        most = xp.finfo(hardness.dtype).max
        order = xp.where(leave, xp.where(hardness > most, most, hardness), xp.inf)
        return leave & (rank_in_group(order, contest(evidence, evidence.image)) >= self.per_image)

    def __repr__(self) -> str:
        return f"{_part(self.policy, 4)}.with_minimum(per_image={self.per_image})"


def contest(evidence: Evidence, image: Array | None) -> Array:
    """Image of every token that may leave, 0 if there is but one; and -1 for the others, which compete with none."""
    xp = array_namespace(evidence.eligible)
    if image is None:
        return xp.astype(evidence.eligible, xp.int32) - 1
    return xp.where(evidence.eligible, image, -1)


def is_numeric(value: Array) -> bool:
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


def _exchanged(policy: Any, threshold: Threshold) -> Any:
    changes = {}
    for field in dataclasses.fields(policy):
        value = getattr(policy, field.name)
        if field.name == "threshold":
            changes[field.name] = threshold
        elif isinstance(value, Policy):
            changes[field.name] = _exchanged(value, threshold)
    return dataclasses.replace(policy, **changes)


COMPOSED: Mapping[str, type[Policy] | type[PerClass]] = {
    "never": _Never,
    "always": _Always,
    "both": _Both,
    "either": _Either,
    "not": _Not,
    "retaining": _Retaining,
    "minimum": _Minimum,
    "PerClass": PerClass,
}
"""What policies are composed of, by the names in files."""


def _mentions(method: Callable[..., Any], name: str) -> bool:
    """Whether a method reads an attribute of that name; true where that cannot be told."""
    code = getattr(method, "__code__", None)
    return code is None or name in code.co_names or "getattr" in code.co_names


def _require_mask(policy: Policy, leave: Any) -> None:
    """Raise for a policy of one's own that gives scores where it must give a mask."""
    if is_array(leave) and leave.dtype == array_namespace(leave).bool:
        return
    kind = getattr(leave, "dtype", type(leave).__name__)
    rule = "give booleans, True for each token that exits"
    raise TokenExitError(f"`{type(policy).__name__}.leaves` must {rule}, got {kind}")
