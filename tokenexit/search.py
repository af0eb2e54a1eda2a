"""Which exits, thresholds and radii are worth having: a search for the frontier of quality and cost.

The space is far too large to try everything: six heads, eight thresholds and four radii are 10⁹ schedules. So the
search starts from networks cut short and from a few plain schedules, and then changes what is best so far in one
respect at a time. How good and how dear a schedule is, a function of yours says: a replay of one dense pass, or the
real run.

    found = []
    for one in search.explore(evaluate, space, evaluations=400):     # in tqdm, if you like a bar
        found.append(one)                                            # written to a file, to go on from later
    best = search.frontier(found)
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenexit._plain import is_whole, require_keys
from tokenexit.errors import TokenExitError, require
from tokenexit.schedule import Schedule, neighbours, truncated

__all__ = ["Found", "Space", "cheapest", "explore", "frontier"]


@dataclass(frozen=True)
class Space:
    """What is searched: `NeighboursAgree` with retention after any of some blocks, and the network cut short there.

    Attributes:
        after: Blocks that may have an exit, ascending.
        thresholds: Confidences that an exit may ask for, ascending.
        radii: Radii that it may have, ascending; with 0 it reads no neighbour.
        per_class: Most confident leavers of each predicted class that stay.
        cell: Side of the cells in which the centre represents those that have left; None for none.
    """

    after: tuple[int, ...]
    thresholds: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
    radii: tuple[int, ...] = (0, 1, 2, 3)
    per_class: int = 5
    cell: int | None = None

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If a tuple is empty or does not ascend, or a number is out of range.
        """
        for name in ("after", "thresholds", "radii"):
            values = getattr(self, name)
            ascends = isinstance(values, tuple) and len(values) > 0 and list(values) == sorted(set(values))
            require(ascends, name, "be an ascending tuple of at least one", repr(values))
        require(is_whole(self.per_class), "per_class", "be a whole number from 0 up", repr(self.per_class))
        # The schedules themselves know what a block, a threshold and a radius may be.
        for threshold in (self.thresholds[0], self.thresholds[-1]):
            self._schedule(((self.after[0], threshold, self.radii[0]),))
        self._schedule(((self.after[-1], self.thresholds[0], self.radii[-1]),))

    def starts(self) -> tuple[Schedule, ...]:
        """What is tried first: every truncation, and every threshold at all exits, radius 1 but 0 at the last."""
        around = min(self.radii, key=lambda radius: abs(radius - 1))
        last = self.after[-1]
        plans = [
            tuple((after, threshold, self.radii[0] if after == last else around) for after in self.after)
            for threshold in reversed(self.thresholds)
        ]
        return (*(truncated(after=after) for after in self.after), *map(self._schedule, plans))

    def holds(self, schedule: Schedule, /) -> bool:
        """Whether a schedule is one of this space."""
        if schedule in (truncated(after=after) for after in self.after):
            return True
        exits = [(exit["after"], exit["policy"].get("policy") or {}) for exit in schedule.to_dict()["exits"]]
        plan: Any = tuple((after, policy.get("threshold"), policy.get("radius")) for after, policy in exits)
        inside = all(a in self.after and t in self.thresholds and r in self.radii for a, t, r in plan)
        return inside and len(plan) > 0 and schedule == self._schedule(plan)

    def near(self, schedule: Schedule, /) -> tuple[Schedule, ...]:
        """All schedules of the space that differ from one of it in one respect.

        An exit is added or dropped, one exit's threshold or radius moves by a step, or all thresholds do.

        Args:
            schedule: A schedule of this space; a truncation has none near.

        Returns:
            Those near it, in a fixed order.

        Raises:
            TokenExitError: If it is of another space.
        """
        require(self.holds(schedule), "schedule", "be one of this space", schedule)
        return tuple(map(self._schedule, self._near(_plan_of(schedule))))

    def _near(self, plan: "_Plan") -> list["_Plan"]:
        have = {after: (threshold, radius) for after, threshold, radius in plan}
        changed: list[dict[int, tuple[float, int]]] = []
        for after in self.after if have else ():
            if after not in have:
                nearest = have[min(have, key=lambda block: abs(block - after))]
                changed.append(have | {after: nearest})
                continue
            if len(have) > 1:
                changed.append({block: one for block, one in have.items() if block != after})
            threshold, radius = have[after]
            changed += [have | {after: (near, radius)} for near in _next(self.thresholds, threshold)]
            changed += [have | {after: (threshold, near)} for near in _next(self.radii, radius)]
        for step in (-1, 1):
            moved = {after: self.thresholds.index(threshold) + step for after, (threshold, _) in have.items()}
            if have and all(0 <= index < len(self.thresholds) for index in moved.values()):
                changed.append({after: (self.thresholds[index], have[after][1]) for after, index in moved.items()})
        return [tuple((after, *one[after]) for after in sorted(one)) for one in changed]

    def _schedule(self, plan: "_Plan") -> Schedule:
        return neighbours(
            radius={after: radius for after, _, radius in plan},
            threshold={after: threshold for after, threshold, _ in plan},
            per_class=self.per_class,
            cell=self.cell,
        )


_Plan = tuple[tuple[int, float, int], ...]
"""Block, threshold and radius of each exit; nothing for a truncation."""


def _plan_of(schedule: Schedule) -> _Plan:
    policies = [(exit["after"], exit["policy"].get("policy")) for exit in schedule.to_dict()["exits"]]
    return tuple((after, one["threshold"], one["radius"]) for after, one in policies if one is not None)


@dataclass(frozen=True)
class Found:
    """A schedule that was tried.

    Attributes:
        schedule: The schedule.
        quality: How good it is; more is better (mIoU, agreement with the dense network).
        cost: How dear it is; less is better (multiply-adds, token-blocks, milliseconds).
    """

    schedule: Schedule
    quality: float
    cost: float

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {"schedule": self.schedule.to_dict(), "quality": self.quality, "cost": self.cost}

    @staticmethod
    def from_dict(data: Mapping[str, Any], /) -> "Found":
        """What `to_dict` wrote down.

        Args:
            data: What `to_dict` returned, or its like read from a file.

        Returns:
            The same.

        Raises:
            TokenExitError: If a key is missing or unknown, or the schedule is none.
        """
        require_keys(data, "found", {"schedule", "quality", "cost"})
        return Found(Schedule.from_dict(data["schedule"]), float(data["quality"]), float(data["cost"]))


def explore(
    evaluate: Callable[[Schedule], tuple[float, float]],
    space: Space,
    /,
    *,
    evaluations: int,
    known: Iterable[Found] = (),
    seed: int = 0,
) -> Iterator[Found]:
    """Try schedules, one after the other, those near the frontier so far.

    What comes next depends on what is known and on the seed, and on nothing else. So a search that was stopped, and is
    given what it had found, ends as if it had not been stopped.

    Args:
        evaluate: Quality and cost of a schedule.
        space: What is searched.
        evaluations: After how many evaluations it ends, those in `known` included.
        known: What earlier calls have found in this space, in their order.
        seed: Of the choices.

    Yields:
        What is found, as it is found. It ends early if nothing is left to try next to the frontier.

    Raises:
        TokenExitError: If `evaluations` is no whole number, something in `known` is not of this space, or `evaluate`
            returns anything but two numbers.
    """
    require(is_whole(evaluations, least=0), "evaluations", "be a whole number from 0 up", repr(evaluations))
    found, starts = list(known), space.starts()
    strange = [one for one in found if not isinstance(one, Found) or not space.holds(one.schedule)]
    require(not strange, "known", "be Found in this space", repr(strange[:1]))
    tried = {one.schedule for one in found}
    plans = set(map(_plan_of, tried))
    while len(found) < evaluations:
        following = next((start for start in starts if start not in tried), None)
        if following is None:
            following = _one_near(space, found, plans, random.Random((seed << 32) + len(found)))
        if following is None:
            return
        found.append(Found(following, *_two_numbers(evaluate(following))))
        tried.add(following)
        plans.add(_plan_of(following))
        yield found[-1]


def frontier(found: Iterable[Found], /) -> tuple[Found, ...]:
    """Those that nothing beats: no other is as good and cheaper, or better at the cost.

    Args:
        found: What was found.

    Returns:
        The frontier, by rising cost; of equals the first.
    """
    best: list[Found] = []
    for one in sorted(found, key=lambda one: (one.cost, -one.quality)):
        if not best or one.quality > best[-1].quality:
            best.append(one)
    return tuple(best)


def cheapest(found: Iterable[Found], /, *, quality: float) -> Found:
    """The cheapest that is good enough.

    Args:
        found: What was found.
        quality: Quality to reach.

    Returns:
        It.

    Raises:
        TokenExitError: If none is good enough.
    """
    good = [one for one in frontier(found) if one.quality >= quality]
    require(len(good) > 0, "quality", "be reached by what was found", quality)
    return good[0]


def _one_near(space: Space, found: list[Found], tried: set[_Plan], draw: random.Random) -> Schedule | None:
    """A schedule not tried yet that is near one of the frontier."""
    best = list(frontier(found))
    draw.shuffle(best)
    for one in best:
        new = [plan for plan in space._near(_plan_of(one.schedule)) if plan not in tried]
        if new:
            return space._schedule(draw.choice(new))
    return None


def _two_numbers(measured: Any) -> tuple[float, float]:
    try:
        quality, cost = map(float, measured)
    except (TypeError, ValueError) as error:
        raise TokenExitError(f"`evaluate` must return two numbers, quality and cost, got {measured!r}") from error
    require(quality == quality and cost == cost, "evaluate", "return two numbers, quality and cost", repr(measured))
    return quality, cost


def _next(values: tuple[Any, ...], value: Any) -> list[Any]:
    """The one before a value and the one behind it."""
    index = values.index(value)
    return [values[near] for near in (index - 1, index + 1) if 0 <= near < len(values)]
