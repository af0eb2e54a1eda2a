"""The plan: after which blocks tokens may leave, and by which policy.

A schedule is plain frozen data. It holds no weight, prints as it reads, and is written to JSON and back.
"Nothing leaves" (`dense`) and "everything leaves here" (`truncated`) are schedules like any other.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenexit import policies
from tokenexit._array import Array
from tokenexit.errors import require
from tokenexit.policies import ConfidenceAbove, NeighboursAgree, Policy, always, never

__all__ = ["Exit", "Schedule", "dense", "dtop", "neighbours", "truncated"]

SCHEMA = 1


@dataclass(frozen=True)
class Exit:
    """One exit point.

    Attributes:
        after: How many blocks have run when tokens may leave.
        policy: Which of them do.
    """

    after: int
    policy: Policy

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If `after` is not a whole number from 1 up, or `policy` no policy.
        """
        _require_block(self.after)
        require(isinstance(self.policy, Policy), "policy", "be a tokenexit.policies.Policy", repr(self.policy))


@dataclass(frozen=True)
class Schedule:
    """The exit points of a network, in the order of its blocks.

    Attributes:
        exits: The exit points; their `after` ascends.
    """

    exits: tuple[Exit, ...] = ()

    def __post_init__(self) -> None:
        """Check the order.

        Raises:
            TokenExitError: If two exits share a block, or the exits are out of order.
        """
        tuple_of_exits = isinstance(self.exits, tuple) and all(isinstance(exit, Exit) for exit in self.exits)
        require(tuple_of_exits, "exits", "be a tuple of Exit", repr(self.exits))
        require(
            list(self.after) == sorted(set(self.after)),
            "exits",
            "come in strictly ascending order of `after`",
            self.after,
        )

    @property
    def after(self) -> tuple[int, ...]:
        """The blocks after which there is an exit point."""
        return tuple(exit.after for exit in self.exits)

    @property
    def active(self) -> tuple[Exit, ...]:
        """The exit points at which a token can leave: those whose policy is not `never()`."""
        return tuple(exit for exit in self.exits if exit.policy != never())

    def with_threshold(self, threshold: float | Array | Mapping[int, float | Array], /) -> "Schedule":
        """The same plan with other thresholds.

        Args:
            threshold: One threshold for every exit, or one for each of some blocks.

        Returns:
            A new schedule.

        Raises:
            TokenExitError: If a block has no exit, a threshold is out of range, or the exits compare several kinds of
                score, for which one number cannot serve, or none at all.
        """
        if not isinstance(threshold, Mapping):
            threshold = dict.fromkeys(self.after, threshold)
        unknown = sorted(set(threshold) - set(self.after))
        require(not unknown, "threshold", f"name blocks with an exit, {self.after}", unknown)
        kinds = sorted(
            set[str]().union(*(exit.policy.compared_scores for exit in self.exits if exit.after in threshold))
        )
        require(len(kinds) == 1, "threshold", "be for exits that compare one kind of score", kinds)
        return Schedule(
            tuple(
                dataclasses.replace(exit, policy=exit.policy.with_threshold(threshold[exit.after]))
                if exit.after in threshold
                else exit
                for exit in self.exits
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """The schedule as plain data, for JSON.

        Raises:
            TokenExitError: If a policy is not of this library.
        """
        exits = [{"after": exit.after, "policy": policies.to_dict(exit.policy)} for exit in self.exits]
        return {"schema": SCHEMA, "exits": exits}

    @staticmethod
    def from_dict(data: Mapping[str, Any], /) -> "Schedule":
        """The schedule that `to_dict` wrote down.

        Args:
            data: What `to_dict` returned, or its like read from a file.

        Returns:
            The schedule.

        Raises:
            TokenExitError: If the schema is another one, a key is missing or unknown, or a value is out of range.
        """
        _require_keys(data, "schedule", {"schema", "exits"})
        require(data["schema"] == SCHEMA, "schema", f"be {SCHEMA}", repr(data["schema"]))
        require(isinstance(data["exits"], list), "exits", "be a list", repr(data["exits"]))
        for exit in data["exits"]:
            _require_keys(exit, "exits", {"after", "policy"})
        return Schedule(tuple(Exit(exit["after"], policies.from_dict(exit["policy"])) for exit in data["exits"]))


def neighbours(
    *,
    radius: Mapping[int, int] | None = None,
    threshold: float | Array | Mapping[int, float | Array] = 0.9,
    per_class: int = 5,
) -> Schedule:
    """A token leaves when its neighbourhood agrees: wide early, narrow late. The library's own default.

    Args:
        radius: Radius of the neighbourhood for each block with an exit; `{3: 2, 6: 1, 8: 0}` if left out, which suits
            twelve blocks and thousands of tokens.
        threshold: Confidence that the token and its neighbours must exceed; one for all exits or one for each.
        per_class: Most confident leavers of each predicted class that stay, per image and exit.

    Returns:
        The schedule.

    Raises:
        TokenExitError: If a radius, a threshold or `per_class` is out of range.
    """
    radius = {3: 2, 6: 1, 8: 0} if radius is None else radius
    require(len(radius) > 0, "radius", "name at least one block", radius)
    policy = {after: NeighboursAgree(1.0, radius=radius[after]) for after in radius}
    plan = Schedule(tuple(Exit(after, policy[after].retaining(per_class=per_class)) for after in sorted(policy)))
    return plan.with_threshold(threshold)


def dtop(
    *,
    after: Iterable[int] = (6, 8),
    threshold: float | Array | Mapping[int, float | Array] = 0.9,
    per_class: int = 5,
) -> Schedule:
    """Dynamic Token Pruning (DToP, ICCV 2023): confident tokens leave, k of each predicted class stay.

    Args:
        after: Blocks with an exit. Published: 6 and 8 of ViT-B's 12; 8 and 16 of ViT-L's 24.
        threshold: Confidence to exceed; one for all exits or one for each. Published: 0.90 (ADE20K, ViT-B), 0.95
            (ViT-L; Pascal Context and COCO-Stuff-10K).
        per_class: Most confident leavers of each predicted class that stay, per image and exit. Published: 5.

    Returns:
        The schedule.

    Raises:
        TokenExitError: If a block, a threshold or `per_class` is out of range, or no block is named.
    """
    policy = ConfidenceAbove(1.0).retaining(per_class=per_class)
    return Schedule(tuple(Exit(block, policy) for block in _blocks(after))).with_threshold(threshold)


def dense(*, after: Iterable[int] = ()) -> Schedule:
    """Nothing ever leaves.

    Args:
        after: Blocks that have an exit head all the same, to be trained or used by another schedule.

    Returns:
        The schedule.

    Raises:
        TokenExitError: If a block is not a whole number from 1 up, or they do not ascend.
    """
    return Schedule(tuple(Exit(block, never()) for block in _blocks(after)))


def truncated(*, after: int) -> Schedule:
    """Everything leaves after one block: the network cut short, the baseline beside which every exit must stand.

    Args:
        after: The last block that runs.

    Returns:
        The schedule.

    Raises:
        TokenExitError: If `after` is not a whole number from 1 up.
    """
    return Schedule((Exit(after, always()),))


def _blocks(after: Iterable[int]) -> tuple[int, ...]:
    require(isinstance(after, Iterable), "after", "be several blocks, as (6, 8)", repr(after))
    return tuple(after)


def _require_block(after: Any) -> None:
    require(
        isinstance(after, int) and not isinstance(after, bool) and after >= 1,
        "after",
        "be a whole number of blocks from 1 up",
        repr(after),
    )


def _require_keys(data: Any, argument: str, keys: set[str]) -> None:
    require(isinstance(data, Mapping), argument, f"be a mapping with the keys {sorted(keys)}", repr(data))
    require(set(data) == keys, argument, f"have exactly the keys {sorted(keys)}", sorted(map(str, data)))
