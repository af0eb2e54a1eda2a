"""Which exits, merges, thresholds and radii are worth having: a search for the frontier of quality and cost.

The space is far too large to try everything: six heads, eight thresholds and four radii are 10⁹ schedules. So the
search starts from networks cut short and from a few plain schedules, and then changes what is best so far in one
respect at a time. How good and how dear a schedule is, a function of yours says: a replay of one dense pass, or the
real run, which a plan that merges needs.

    found = []
    for one in search.explore(evaluate, space, evaluations=400):     # in tqdm, if you like a bar
        found.append(one)                                            # written to a file, to go on from later
    best = search.frontier(found)
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from tokenexit._plain import is_whole, require_keys
from tokenexit.carries import Carry, Prediction
from tokenexit.errors import TokenExitError, require
from tokenexit.policies import ErrorBelow, NeighboursAgree
from tokenexit.schedule import Exit, Merge, Schedule, neighbours, truncated

__all__ = ["Found", "Merges", "Space", "cheapest", "explore", "frontier"]

By = Literal["confidence", "error"]

_RULES: Mapping[By, type[NeighboursAgree | ErrorBelow]] = {"confidence": NeighboursAgree, "error": ErrorBelow}
_CAREFUL: Mapping[By, int] = {"confidence": -1, "error": 0}  # at which end of ascending thresholds nothing is risked


@dataclass(frozen=True)
class Merges:
    """Merges that a search may try before and beside exits: of cells that are alike, or agreed upon, or both.

    Attributes:
        after: Blocks that may have a merge, ascending.
        sides: Sides of the largest cells that it may merge, ascending.
        alike: Similarities that it may ask for, ascending; not to ask for any is bolder, where agreement is asked for.
        agreed: Confidences at which its exit head may have to agree, ascending, or foretold errors; without them no
            merge reads a head.
        radii: Radii of that agreement, ascending.
        by: What decides it: the `confidence` of classes, or the `error` that translators foretell.
    """

    after: tuple[int, ...] = (1, 2, 3)
    sides: tuple[int, ...] = (2, 4, 8)
    alike: tuple[float, ...] = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93)
    agreed: tuple[float, ...] = (0.5, 0.8, 0.9)
    radii: tuple[int, ...] = (1, 2)
    by: By = "confidence"

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If a tuple does not ascend, one but `agreed` is empty, or a number is out of range.
        """
        _require_ascending(self, "after", "sides", "alike", "radii")
        _require_by(self.by)
        if self.agreed:
            _require_ascending(self, "agreed")
        # Merges themselves know what a block, a side, a similarity, a confidence and a radius may be.
        for end in (0, -1):
            agreed = self.agreed[end] if self.agreed else None
            self.merge(self.after[end], (self.sides[end], self.alike[end], agreed, self.radii[end]))

    def merge(self, after: int, rule: "_MergeRule", /) -> Merge:
        """The merge point of a rule."""
        side, alike, confidence, radius = rule
        return Merge(after, side, alike, None if confidence is None else _RULES[self.by](confidence, radius=radius))

    def starts(self) -> "tuple[_MergePlan, ...]":
        """What is tried first: each similarity at the first block; with the highest, agreement at the others."""
        side, around = self.sides[0], self.radii[0]
        alone = [((self.after[0], (side, alike, None, around)),) for alike in reversed(self.alike)]
        if not self.agreed:
            return tuple(alone)
        rule = (side, self.alike[0], self.agreed[_CAREFUL[self.by]], around)
        return *alone, (*alone[0], *((after, rule) for after in self.after[1:]))

    def holds(self, plan: "_MergePlan", /) -> bool:
        """Whether all rules of a plan are of this space."""
        return all(
            after in self.after
            and side in self.sides
            and (alike in self.alike or (alike is None and confidence is not None))
            and confidence in (None, *self.agreed)
            and (radius in self.radii if confidence is not None else radius == self.radii[0])
            for after, (side, alike, confidence, radius) in plan
        )

    def near(self, plan: "_MergePlan", /) -> "list[_MergePlan]":
        """All plans that differ in one merge, by one step; one without any merge among them."""
        have = dict(plan)
        careful = (self.sides[0], self.alike[-1], None, self.radii[0])
        changed: list[dict[int, _MergeRule]] = []
        for after in self.after:
            if after not in have:
                nearest = min(have, key=lambda block: abs(block - after), default=None)
                changed.append(have | {after: careful if nearest is None else have[nearest]})
                continue
            changed.append({block: rule for block, rule in have.items() if block != after})
            side, alike, confidence, radius = have[after]
            rules = [(near, alike, confidence, radius) for near in _next(self.sides, side)]
            rules += [(side, near, confidence, radius) for near in _next((None, *self.alike), alike)]
            rules += [(side, alike, near, radius) for near in _next((None, *self.agreed), confidence)]
            if confidence is not None:
                rules += [(side, alike, confidence, near) for near in _next(self.radii, radius)]
            # Without agreement there is no radius; and something is asked for.
            rules = [rule if rule[2] is not None else (*rule[:3], self.radii[0]) for rule in rules]
            changed += [have | {after: rule} for rule in rules if rule[1:3] != (None, None)]
        return [tuple(sorted(one.items())) for one in changed]


@dataclass(frozen=True)
class Space:
    """What is searched: `NeighboursAgree` with retention after any of some blocks, and the network cut short there.

    Or `ErrorBelow`, which asks for no class, and has no retention.

    Attributes:
        after: Blocks that may have an exit, ascending.
        thresholds: Confidences that an exit may ask for, ascending; or foretold errors.
        radii: Radii that it may have, ascending; with 0 it reads no neighbour.
        per_class: Most confident leavers of each predicted class that stay; of no meaning by foretold errors.
        cell: Side of the cells in which the centre represents those that have left; None for none.
        merges: Merges that there may be, too; None for none. A replay knows nothing of merges: run the plans.
        by: What an exit decides by: the `confidence` of classes, or the `error` that translators foretell.
        carry: What leavers leave behind, those of a network cut short as well. A replay takes predictions alone.
    """

    after: tuple[int, ...]
    thresholds: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
    radii: tuple[int, ...] = (0, 1, 2, 3)
    per_class: int = 5
    cell: int | None = None
    merges: Merges | None = None
    by: By = "confidence"
    carry: Carry = Prediction()

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If a tuple is empty or does not ascend, a number is out of range, or there are merges beside
                cells.
        """
        _require_ascending(self, "after", "thresholds", "radii")
        _require_by(self.by)
        require(is_whole(self.per_class), "per_class", "be a whole number from 0 up", repr(self.per_class))
        merges = () if self.merges is None else self.merges.starts()[0]
        # The schedules themselves know what a block, a threshold and a radius may be.
        for threshold in (self.thresholds[0], self.thresholds[-1]):
            self._schedule(_Plan(((self.after[0], threshold, self.radii[0]),), merges))
        self._schedule(_Plan(((self.after[-1], self.thresholds[0], self.radii[-1]),)))

    def starts(self) -> tuple[Schedule, ...]:
        """What is tried first: every truncation, and every threshold at all exits, radius 1 but 0 at the last.

        With merges also some plain ones, by themselves and with the most careful of these exits.
        """
        around = min(self.radii, key=lambda radius: abs(radius - 1))
        last = self.after[-1]
        exits = [
            tuple((after, threshold, self.radii[0] if after == last else around) for after in self.after)
            for threshold in (self.thresholds if self.by == "error" else reversed(self.thresholds))  # the careful first
        ]
        merges = () if self.merges is None else self.merges.starts()
        plans = [*map(_Plan, exits), *(_Plan(some, one) for one in merges for some in ((), exits[0]))]
        return (*map(self._cut, self.after), *map(self._schedule, plans))

    def holds(self, schedule: Schedule, /) -> bool:
        """Whether a schedule is one of this space."""
        if schedule in map(self._cut, self.after):
            return True
        plan: Any = _plan_of(schedule, self.merges)
        inside = all(a in self.after and t in self.thresholds and r in self.radii for a, t, r in plan.exits)
        merges = not plan.merges or (self.merges is not None and self.merges.holds(plan.merges))
        return inside and merges and not plan.empty and schedule == self._schedule(plan)

    def near(self, schedule: Schedule, /) -> tuple[Schedule, ...]:
        """All schedules of the space that differ from one of it in one respect.

        An exit is added or dropped, one exit's threshold or radius moves by a step, or all thresholds do; or a merge is
        added or dropped, or its side, similarity, agreement or radius moves by a step.

        Args:
            schedule: A schedule of this space; a truncation has none near.

        Returns:
            Those near it, in a fixed order.

        Raises:
            TokenExitError: If it is of another space.
        """
        require(self.holds(schedule), "schedule", "be one of this space", schedule)
        return tuple(map(self._schedule, self._near(_plan_of(schedule, self.merges))))

    def _near(self, plan: "_Plan") -> "list[_Plan]":
        if plan.empty:
            return []
        changed = [replace(plan, exits=exits) for exits in self._exits_near(plan.exits)]
        if self.merges is not None:
            changed += [replace(plan, merges=merges) for merges in self.merges.near(plan.merges)]
        return [one for one in changed if not one.empty]

    def _exits_near(self, exits: "_ExitPlan") -> "list[_ExitPlan]":
        have = {after: (threshold, radius) for after, threshold, radius in exits}
        changed: list[dict[int, tuple[float, int]]] = []
        for after in self.after:
            if after not in have:
                nearest = min(have, key=lambda block: abs(block - after), default=None)
                careful = (self.thresholds[_CAREFUL[self.by]], self.radii[0])
                changed.append(have | {after: careful if nearest is None else have[nearest]})
                continue
            changed.append({block: one for block, one in have.items() if block != after})
            threshold, radius = have[after]
            changed += [have | {after: (near, radius)} for near in _next(self.thresholds, threshold)]
            changed += [have | {after: (threshold, near)} for near in _next(self.radii, radius)]
        for step in (-1, 1):
            moved = {after: self.thresholds.index(threshold) + step for after, (threshold, _) in have.items()}
            if have and all(0 <= index < len(self.thresholds) for index in moved.values()):
                changed.append({after: (self.thresholds[index], have[after][1]) for after, index in moved.items()})
        return [tuple((after, *one[after]) for after in sorted(one)) for one in changed]

    def _cut(self, after: int) -> Schedule:
        return replace(truncated(after=after), carry=self.carry)

    def _schedule(self, plan: "_Plan") -> Schedule:
        merges = () if self.merges is None else tuple(self.merges.merge(*one) for one in plan.merges)
        if not plan.exits:
            return Schedule(carry=self.carry, merges=merges)
        if self.by == "error":
            told = tuple(Exit(after, ErrorBelow(threshold, radius=radius)) for after, threshold, radius in plan.exits)
            return Schedule(told, self.carry, self.cell, merges)
        exits = neighbours(
            radius={after: radius for after, _, radius in plan.exits},
            threshold={after: threshold for after, threshold, _ in plan.exits},
            per_class=self.per_class,
            cell=self.cell,
        )
        return replace(exits, carry=self.carry, merges=merges)


_ExitPlan = tuple[tuple[int, float, int], ...]
"""Block, threshold and radius of each exit."""

_MergeRule = tuple[int, float | None, float | None, int]
"""Side, similarity, confidence of agreement and its radius."""

_MergePlan = tuple[tuple[int, _MergeRule], ...]
"""Block and rule of each merge."""


@dataclass(frozen=True)
class _Plan:
    """A schedule of a space; nothing for a truncation."""

    exits: _ExitPlan = ()
    merges: _MergePlan = ()

    @property
    def empty(self) -> bool:
        return not self.exits and not self.merges


def _plan_of(schedule: Schedule, merges: Merges | None) -> _Plan:
    data = schedule.to_dict()
    # Retention holds another policy.
    exits = [(exit["after"], exit["policy"].get("policy", exit["policy"])) for exit in data["exits"]]
    found = tuple((after, one.get("threshold"), one.get("radius")) for after, one in exits if "threshold" in one)
    around = 0 if merges is None else merges.radii[0]
    rules = []
    for merge in data.get("merges", ()):
        agreed = merge["agreed"] or {"threshold": None, "radius": around}
        rule = (merge["side"], merge["alike"], agreed.get("threshold"), agreed.get("radius"))
        rules.append((merge["after"], rule))
    return _Plan(found, tuple(rules))


def _require_by(by: str) -> None:
    require(by in _RULES, "by", "be `confidence` or `error`", repr(by))


def _require_ascending(space: Merges | Space, *names: str) -> None:
    for name in names:
        values = getattr(space, name)
        ascends = isinstance(values, tuple) and len(values) > 0 and list(values) == sorted(set(values))
        require(ascends, name, "be an ascending tuple of at least one", repr(values))


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
    plans = {_plan_of(plan, space.merges) for plan in tried}
    while len(found) < evaluations:
        following = next((start for start in starts if start not in tried), None)
        if following is None:
            following = _one_near(space, found, plans, random.Random((seed << 32) + len(found)))
        if following is None:
            return
        found.append(Found(following, *_two_numbers(evaluate(following))))
        tried.add(following)
        plans.add(_plan_of(following, space.merges))
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
        new = [plan for plan in space._near(_plan_of(one.schedule, space.merges)) if plan not in tried]
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
