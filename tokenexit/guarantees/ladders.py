"""Settings to choose from, from the most careful to the boldest; and thresholds that are picked, and promise nothing.

A ladder is made before the losses of the calibration images are seen. What is picked here by the losses of some images
is to be certified (`calibration.certify`) on others.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

from jaxtyping import Bool, Float, Int

from tokenexit._array import Array, array_namespace, counting, device, plain, take, with_doubles
from tokenexit._plain import is_number, is_whole
from tokenexit.errors import require
from tokenexit.policies import PerClass, Policy
from tokenexit.schedule import Merge, Schedule
from tokenexit.search import Found, frontier

__all__ = ["by_distance", "by_error", "by_frontier", "by_threshold", "largest_that_saves", "per_class"]


def by_threshold(plan: Schedule, /, *, thresholds: Iterable[float]) -> tuple[Schedule, ...]:
    """One plan at several thresholds, the strictest first: descending, or ascending where a token leaves below it.

    Args:
        plan: The plan.
        thresholds: Thresholds, in any order; each is given to all exits that have one.

    Returns:
        The ladder, each threshold once.

    Raises:
        TokenExitError: If there is no threshold, one is out of range, the exits compare several kinds of score or none,
            or tokens exit above the threshold by one policy and below it by another.
    """
    once = sorted(set(thresholds), reverse=True)
    require(len(once) > 0, "thresholds", "be at least one", once)
    ladder = tuple(plan.with_threshold(threshold) for threshold in once)
    directions = frozenset[str]().union(*(exit.policy.directions for exit in plan.exits))
    require(len(directions) <= 1, "plan", "let tokens exit on one side of its thresholds alone, for an order", plan)
    return ladder[::-1] if "below" in directions else ladder


def by_error(plan: Schedule, /, *, factors: Iterable[float]) -> tuple[Schedule, ...]:
    """One plan at several multiples of the errors that its exits allow, the smallest first.

    One factor scales the thresholds of all exits, so that they keep their proportions.

    Args:
        plan: The plan; its exits compare foretold errors (`policies.ErrorBelow`), each with one number.
        factors: Factors from 0 up, in any order; what comes out above 1 is set to that.

    Returns:
        The ladder, each plan once.

    Raises:
        TokenExitError: If there is no factor, one is negative or no number, or an exit compares anything else, or
            errors with several thresholds.
    """
    once = _factors(factors)
    each = {exit.after: _thresholds(exit.policy) for exit in plan.active}
    compared = set[str]().union(*(exit.policy.compared_scores for exit in plan.active))
    single = compared == {"error"} and all(len(found) == 1 for found in each.values())
    require(single, "plan", "compare foretold errors, each exit with one number, for an order", plan)
    limits = {after: found.pop() for after, found in each.items()}
    plans = (
        plan.with_threshold({after: min(1.0, factor * limit) for after, limit in limits.items()}) for factor in once
    )
    return tuple(dict.fromkeys(plans))


def _thresholds(policy: Any) -> set[float]:
    """All thresholds of a policy, and of those inside it; of each class, and arrays, are no number."""
    found = set[float]()
    for field in fields(policy):
        value = getattr(policy, field.name)
        if field.name == "threshold":
            found.add(value if is_number(value) else math.nan)
        elif isinstance(value, Policy):
            found |= _thresholds(value)
    return found if not any(math.isnan(one) for one in found) else set()


def _factors(factors: Iterable[float]) -> list[float]:
    once = sorted(set(factors))
    inside = len(once) > 0 and all(is_number(one) and one >= 0 for one in once)
    require(inside, "factors", "be numbers from 0 up, at least one", once)
    return once


def by_distance(plan: Schedule, /, *, factors: Iterable[float]) -> tuple[Schedule, ...]:
    """One plan with its merges at several distances, the smallest first: so that more and more tokens are alike.

    The distance of a merge is 1 less the similarity that it asks for, `1 - alike`. One factor scales it at all merges,
    so that they keep their proportions.

    Args:
        plan: The plan; merges by agreement alone, and exits, stay as they are.
        factors: Factors from 0 up, in any order; what comes out below the least similarity, -1, is set to that.

    Returns:
        The ladder, each plan once.

    Raises:
        TokenExitError: If there is no factor, one is negative or no number, or no merge asks for a similarity.
    """
    once = _factors(factors)
    asked = any(merge.alike is not None for merge in plan.merges)
    require(asked, "plan", "merge by similarity, `alike`, for an order", plan)
    plans = (replace(plan, merges=tuple(_at_distance(merge, factor) for merge in plan.merges)) for factor in once)
    return tuple(dict.fromkeys(plans))


def _at_distance(merge: Merge, factor: float) -> Merge:
    if merge.alike is None:
        return merge
    return replace(merge, alike=max(-1.0, merge.alike + (1 - factor) * (1 - merge.alike)))


def by_frontier(found: Iterable[Found], /) -> tuple[Schedule, ...]:
    """What a search found on its frontier, the best first: the order for several knobs (Pareto Testing, ICLR 2023).

    Networks that are cut short are among what `search.explore` tries, and are on the ladder where they beat exits.

    Args:
        found: What was found on images that are not used for the calibration.

    Returns:
        The schedules, by falling quality and falling cost.
    """
    return tuple(one.schedule for one in reversed(frontier(found)))


def largest_that_saves(
    thresholds: Sequence[float], costs: Sequence[float] | Float[Array, "thresholds"], /, *, saving: float
) -> float:
    """The largest threshold that saves as much as is wanted.

    Args:
        thresholds: Thresholds that were tried, of a score above which tokens leave.
        costs: What each costs on average; the dense network costs 1.
        saving: Share of the dense network's cost to save.

    Returns:
        The threshold.

    Raises:
        TokenExitError: If there is not one cost for each threshold, or none saves that much; the message says how much
            the boldest does.
    """
    numbers = plain(costs)
    fits = len(numbers) == len(thresholds) > 0
    require(fits, "costs", f"be one for each of the {len(thresholds)} thresholds, at least one", len(numbers))
    enough = [threshold for threshold, cost in zip(thresholds, numbers, strict=True) if 1 - cost >= saving]
    require(len(enough) > 0, "saving", f"be at most {1 - min(numbers):.4f}, the most that any threshold saves", saving)
    return max(enough)


def per_class(
    label: Int[Array, "tokens"],
    confidence: Float[Array, "tokens"],
    wrong: Bool[Array, "tokens"],
    /,
    *,
    classes: int,
    level: float,
    thresholds: Sequence[float],
    least: int = 100,
) -> PerClass:
    """A threshold for each predicted class, below which more of its leavers would be wrong than is wanted.

    For each class thresholds are tried from the greatest down, until the share of wrong ones among the tokens that
    are more confident exceeds the level. It is a choice and no guarantee: certify the schedule on other images.

    Args:
        label: Class that an exit head predicts for each token.
        confidence: How confident it is.
        wrong: Whether the dense network says otherwise.
        classes: How many classes there are.
        level: Share of wrong ones, among those of a class that leave, that is accepted.
        thresholds: What is tried, numbers in [0, 1].
        least: Tokens of a class that must be more confident than a threshold for it to be taken; with fewer, nothing
            is known.

    Returns:
        The thresholds; 1 for a class of which no token is to leave.

    Raises:
        TokenExitError: If the arrays are not of one length, or a number is out of range.
    """
    for name, row in (("confidence", confidence), ("wrong", wrong)):
        require(row.shape == label.shape, name, f"have one entry for each of the {label.shape[0]} tokens", row)
    require(is_whole(classes, least=1), "classes", "be a whole number from 1 up", repr(classes))
    require(is_whole(least, least=1), "least", "be a whole number from 1 up", repr(least))
    require(0 <= level <= 1, "level", "be a number in [0, 1]", repr(level))
    once = sorted(set(thresholds), reverse=True)
    inside = len(once) > 0 and once[-1] >= 0 and once[0] <= 1
    require(inside, "thresholds", "be numbers in [0, 1], at least one", once)
    leaving, failing = _counts(label, confidence, wrong, classes, once)
    return PerClass(tuple(_lowest(once, *row, level, least) for row in zip(leaving, failing, strict=True)))


def _lowest(thresholds: list[float], leaving: list[int], failing: list[int], level: float, least: int) -> float:
    """The lowest threshold before the first that is seen to fail."""
    lowest = 1.0
    for threshold, tokens, wrong in zip(thresholds, leaving, failing, strict=True):
        if tokens < least:
            continue
        if wrong > level * tokens:
            break
        lowest = float(threshold)
    return lowest


def _counts(
    label: Array, confidence: Array, wrong: Array, classes: int, thresholds: list[float]
) -> tuple[list[list[int]], list[list[int]]]:
    """Of each class, how many tokens exceed each threshold, and how many of them are wrong.

    All tokens are sorted once, by class and confidence, as one number: twice the class, plus the confidence.
    """
    label, confidence, wrong = map(with_doubles, (label, confidence, wrong))
    xp = array_namespace(label, confidence)
    confidence = xp.astype(confidence, xp.float64)
    # NaN exceeds nothing, as in the policies.
    key = 2 * xp.astype(label, xp.float64) + xp.where(xp.isnan(confidence), 0.0, xp.clip(confidence, 0.0, 1.0))
    order = xp.argsort(key)
    key = take(key, order)
    before = xp.cumulative_sum(xp.astype(take(wrong, order), xp.int64), include_initial=True)
    limits = xp.asarray([*thresholds, 1.5], dtype=xp.float64, device=device(key))  # all of a class lie below 1.5
    first = 2 * xp.astype(counting(classes, key), xp.float64)[:, None]
    place = xp.searchsorted(key, xp.reshape(first + limits[None, :], (-1,)), side="right")
    failed = take(before, place)
    shape = (classes, len(thresholds) + 1)
    place, failed = xp.reshape(place, shape), xp.reshape(failed, shape)
    return _plain(place[:, -1:] - place[:, :-1]), _plain(failed[:, -1:] - failed[:, :-1])


def _plain(table: Array) -> list[list[int]]:
    return [[int(table[row, column]) for column in range(table.shape[1])] for row in range(table.shape[0])]
