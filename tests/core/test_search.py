"""The search for schedules on the frontier."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core import strategies
from tokenexit import TokenExitError, schedule
from tokenexit.carries import Prediction, Translated
from tokenexit.policies import ErrorBelow, NeighboursAgree, always
from tokenexit.schedule import Exit, Merge, Schedule
from tokenexit.search import Found, Merges, Space, cheapest, explore, frontier

SMALL = Space((2, 4, 6), thresholds=(0.5, 0.7, 0.9), radii=(0, 1))
MERGING = Space(
    (4, 6), thresholds=(0.7, 0.9), radii=(0, 1), merges=Merges((1, 2), sides=(2, 4), alike=(0.8, 0.9), agreed=(0.5,))
)

OTHERS = [
    schedule.neighbours(radius={2: 1}, threshold=0.8, per_class=5),
    schedule.neighbours(radius={3: 1}, threshold=0.7, per_class=5),
    schedule.neighbours(radius={2: 3}, threshold=0.7, per_class=5),
    schedule.neighbours(radius={2: 1}, threshold=0.7, per_class=4),
    schedule.neighbours(radius={2: 1}, threshold=0.7, per_class=5, cell=3),
    schedule.truncated(after=3),
    schedule.dense(),
    schedule.dtop(after=(2,), threshold=0.7),
    schedule.paumer(after=(2,)),
]


def toy(plan):
    """Early exits, low thresholds and narrow neighbourhoods are cheap, and bad."""
    quality, cost = 1.0, 1.0
    for exit in plan.exits:
        early = 1 - exit.after / 8
        if exit.policy == always():
            return quality - early**2, cost - early
        policy = exit.policy.policy
        gone = early * (1.4 - policy.threshold) * (1 - 0.2 * policy.radius) * cost
        quality -= 0.3 * gone * (1.05 - policy.threshold) * (1 - 0.6 * policy.radius) * early
        cost -= 0.5 * gone
    return quality, cost


def merging(plan):
    """The toy, in which what merges early, in large cells and by little is cheap, and agreement makes it good."""
    quality, cost = toy(plan)
    for merge in plan.merges:
        gone = 0.2 * (1 - merge.after / 8) * (1.2 - (merge.alike or 0)) * merge.side / 4
        careful = 0.2 if merge.agreed is None else 0.05 + 0.02 * (2 - merge.agreed.radius)
        quality, cost = quality - careful * gone, cost * (1 - gone)
    return quality, cost


def everything(space):
    choices = [None, *itertools.product(space.thresholds, space.radii)]
    for chosen in itertools.product(choices, repeat=len(space.after)):
        plan = {after: one for after, one in zip(space.after, chosen, strict=True) if one}
        if plan:
            yield schedule.neighbours(
                radius={after: one[1] for after, one in plan.items()},
                threshold={after: one[0] for after, one in plan.items()},
                per_class=space.per_class,
            )
    yield from (schedule.truncated(after=after) for after in space.after)


@pytest.mark.usefixtures("unchecked")
def test_it_finds_the_frontier_of_a_small_space():
    best = frontier(Found(plan, *toy(plan)) for plan in everything(SMALL))
    found = frontier(explore(toy, SMALL, evaluations=300))
    assert len(list(everything(SMALL))) > 340
    missed = [
        one for one in best if not any(o.quality >= one.quality - 1e-3 and o.cost <= one.cost + 1e-3 for o in found)
    ]
    assert len(missed) <= len(best) // 10


@pytest.mark.usefixtures("unchecked")
def test_it_beats_what_it_starts_from():
    wide = Space((2, 3, 4, 6, 7))
    starts = [Found(plan, *toy(plan)) for plan in wide.starts()]
    found = list(explore(toy, wide, evaluations=400))
    assert found[: len(starts)] == starts
    for one in starts:
        assert cheapest(found, quality=one.quality).cost <= one.cost
    good = 0.99 * max(one.quality for one in starts)
    assert cheapest(found, quality=good).cost < cheapest(starts, quality=good).cost - 0.02


@pytest.mark.usefixtures("unchecked")
@strategies.fewer(5)
@given(st.integers(0, 45), st.integers(0, 2**31 - 1))
def test_what_is_stopped_and_goes_on_ends_as_if_it_had_not_been(stop, seed):
    whole = list(explore(toy, SMALL, evaluations=45, seed=seed))
    before = list(explore(toy, SMALL, evaluations=stop, seed=seed))
    kept = [Found.from_dict(json.loads(json.dumps(one.to_dict()))) for one in before]
    assert kept == before == whole[:stop]
    assert kept + list(explore(toy, SMALL, evaluations=45, known=kept, seed=seed)) == whole


@pytest.mark.usefixtures("unchecked")
def test_nothing_is_tried_twice_and_all_of_it_is_in_the_space():
    found = list(explore(toy, SMALL, evaluations=10_000))
    plans = [one.schedule for one in found]
    assert len(set(plans)) == len(plans)
    assert set(plans) <= set(everything(SMALL))
    assert {schedule.truncated(after=after) for after in SMALL.after} <= set(plans)
    # It has ended because nothing was left to try next to the frontier.
    for one in frontier(found):
        assert set(SMALL.near(one.schedule)) <= set(plans)


def test_what_is_near_differs_in_one_respect():
    plan = schedule.neighbours(radius={2: 1, 6: 0}, threshold={2: 0.7, 6: 0.9})
    near = SMALL.near(plan)
    assert len(set(near)) == len(near)
    assert plan not in near
    expected = {
        schedule.neighbours(radius=radius, threshold=threshold)
        for radius, threshold in [
            ({6: 0}, {6: 0.9}), ({2: 1}, {2: 0.7}), ({2: 1, 4: 1, 6: 0}, {2: 0.7, 4: 0.7, 6: 0.9}),
            ({2: 1, 6: 0}, {2: 0.5, 6: 0.9}), ({2: 1, 6: 0}, {2: 0.9, 6: 0.9}), ({2: 1, 6: 0}, {2: 0.7, 6: 0.7}),
            ({2: 0, 6: 0}, {2: 0.7, 6: 0.9}), ({2: 1, 6: 1}, {2: 0.7, 6: 0.9}), ({2: 1, 6: 0}, {2: 0.5, 6: 0.7}),
        ]
    }  # fmt: skip
    assert set(near) == expected
    assert all(plan in SMALL.near(one) for one in near if len(one.exits) == 2)


@pytest.mark.usefixtures("unchecked")
def test_merges_are_found_where_they_are_worth_it():
    found = list(explore(merging, MERGING, evaluations=400))
    plans = [one.schedule for one in found]
    assert len(set(plans)) == len(plans)
    assert all(MERGING.holds(plan) for plan in plans)
    without = list(explore(merging, Space((4, 6), thresholds=(0.7, 0.9), radii=(0, 1)), evaluations=400))
    good = 0.99 * max(one.quality for one in without)
    assert cheapest(found, quality=good).cost < cheapest(without, quality=good).cost - 0.02
    assert any(plan.merges and not plan.exits for plan in plans)
    assert any(merge.alike is None for plan in plans for merge in plan.merges)
    kept = [Found.from_dict(json.loads(json.dumps(one.to_dict()))) for one in found[:50]]
    assert kept + list(explore(merging, MERGING, evaluations=120, known=kept)) == found[:120]


def test_what_is_near_a_merge_differs_in_one_respect():
    exits = schedule.neighbours(radius={4: 0, 6: 0}, threshold=0.9).exits
    agreed = NeighboursAgree(0.5, radius=1)
    plan = Schedule(exits, merges=(Merge(1, 2, 0.8),))
    near = MERGING.near(plan)
    assert {one.merges for one in near if one.exits == exits} == {
        (), (Merge(1, 4, 0.8),), (Merge(1, 2, 0.9),), (Merge(1, 2, 0.8, agreed),), (Merge(1, 2, 0.8), Merge(2, 2, 0.8)),
    }  # fmt: skip
    asked = Schedule(merges=(Merge(1, 2, None, agreed),))
    near = MERGING.near(asked)
    assert {one.merges for one in near if not one.exits} == {
        (Merge(1, 4, None, agreed),), (Merge(1, 2, 0.8, agreed),), (Merge(1, 2, None, NeighboursAgree(0.5, radius=2)),),
        (Merge(1, 2, None, agreed), Merge(2, 2, None, agreed)),
    }  # fmt: skip
    assert {one.after for one in near if one.exits} == {(4,), (6,)}
    for one in near:
        assert asked in MERGING.near(one)
    others = [
        Schedule(merges=(Merge(3, 2, 0.8),)), Schedule(merges=(Merge(1, 8, 0.8),)), Schedule(merges=(Merge(1, 2, 0.7),)),
        Schedule(merges=(Merge(1, 2, 0.8, NeighboursAgree(0.6, radius=1)),)), Schedule(exits, merges=plan.merges, keys="entries"),
    ]  # fmt: skip
    assert not any(MERGING.holds(one) for one in others)
    assert not SMALL.holds(Schedule(merges=(Merge(1, 2, 0.8),)))


TOLD = Space((3, 6), thresholds=(0.1, 0.2, 0.3), radii=(0, 1), by="error", carry=Translated(),
             merges=Merges((1, 2), (2,), (0.8, 0.9), (0.1, 0.2), (1,), by="error"))  # fmt: skip


def test_exits_and_merges_by_foretold_errors_are_searched_alike():
    careful = Schedule(tuple(Exit(block, ErrorBelow(0.1, radius=int(block == 3))) for block in (3, 6)), Translated())
    cut = [Schedule((Exit(block, always()),), Translated()) for block in (3, 6)]
    starts = TOLD.starts()
    assert [*starts[:2]] == cut
    assert starts[2] == careful
    assert all(one.carry == Translated() and TOLD.holds(one) for one in starts)
    assert Schedule(merges=(Merge(1, 2, 0.9), Merge(2, 2, 0.8, ErrorBelow(0.1))), carry=Translated()) in starts
    assert TOLD.near(cut[0]) == ()
    near = TOLD.near(careful)
    assert Schedule(careful.exits[:1], Translated()) in near
    assert (
        Schedule(tuple(Exit(one.after, one.policy.with_threshold(0.2)) for one in careful.exits), Translated()) in near
    )
    assert all(TOLD.holds(one) for one in near)
    assert not TOLD.holds(replace(careful, carry=Prediction()))
    assert not TOLD.holds(schedule.neighbours(radius={3: 1, 6: 0}, threshold=0.1))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5))))
def test_the_frontier_is_what_nothing_beats(figures):
    found = [Found(schedule.truncated(after=1 + at), float(q), float(c)) for at, (q, c) in enumerate(figures)]
    best = frontier(found)
    assert [one.cost for one in best] == sorted({one.cost for one in best})
    for one in found:
        beaten = any((o.quality >= one.quality and o.cost < one.cost) or (o.quality > one.quality and o.cost <= one.cost)
                     for o in found)  # fmt: skip
        alike = [o for o in best if (o.quality, o.cost) == (one.quality, one.cost)]
        assert len(alike) == (0 if beaten else 1)
    for quality in range(6):
        good = [one.cost for one in found if one.quality >= quality]
        if good:
            assert cheapest(found, quality=float(quality)).cost == min(good)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Space((3,), by="margin"), "`by` must be `confidence` or `error`, got 'margin'"),
        (lambda: Merges(by="margin"), "`by` must be `confidence` or `error`, got 'margin'"),
        (lambda: Space(()), "`after` must be an ascending tuple of at least one, got ()"),
        (lambda: Space((3, 2)), "`after` must be an ascending tuple of at least one, got (3, 2)"),
        (lambda: Space((2,), thresholds=(0.5, 1.5)), "`threshold` must"),
        (lambda: Space((2,), radii=(-1,)), "`radius` must"),
        (lambda: Space((0, 2)), "`after` must"),
        (lambda: Merges(()), "`after` must be an ascending tuple of at least one, got ()"),
        (lambda: Merges(alike=(0.9, 0.8)), "`alike` must be an ascending tuple of at least one, got (0.9, 0.8)"),
        (lambda: Merges(sides=(2, 3)), "`side` must be one of [2, 4, 8, 16], got 3"),
        (lambda: Merges(alike=(0.9, 1.5)), "`alike` must be None or a number in [-1, 1], got 1.5"),
        (lambda: Merges(agreed=(0.5, 1.5)), "`threshold` must"),
        (lambda: Space((2,), cell=3, merges=Merges()), "`cell` must be None in a plan that merges, got 3"),
        (lambda: Space((2,), per_class=-1), "`per_class` must be a whole number from 0 up, got -1"),
        (lambda: list(explore(toy, SMALL, evaluations=-1)), "`evaluations` must be a whole number from 0 up, got -1"),
        *(
            (lambda found=found: list(explore(lambda _: found, SMALL, evaluations=3)), "`evaluate` must return two numbers, quality and cost, got")
            for found in [(math.nan, 1.0), 1.0, None, (1.0, 2.0, 3.0), ("good", 1.0), (np.ones(3), 1.0)]
        ),
        *(
            (lambda plan=plan: list(explore(toy, SMALL, evaluations=9, known=[Found(plan, 1.0, 1.0)])), "`known` must be Found in this space, got [Found(")
            for plan in OTHERS
        ),
        (lambda: list(explore(toy, SMALL, evaluations=9, known=[{}])), "`known` must be Found in this space, got [{}]"),
        *((lambda plan=plan: SMALL.near(plan), "`schedule` must be one of this space, got Schedule(") for plan in OTHERS),
        (lambda: cheapest([], quality=0.5), "`quality` must be reached by what was found, got 0.5"),
        (lambda: Found.from_dict({"schedule": {}}), "`found` must have exactly the keys"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(TokenExitError) as found:
        make()
    assert str(found.value).startswith(message)


def test_what_is_found_can_be_written_down_whatever_numbers_came():
    found = next(explore(lambda _: (np.float32(0.5), np.float32(0.25)), SMALL, evaluations=1))
    assert json.loads(json.dumps(found.to_dict()))["quality"] == 0.5
    assert SMALL.holds(found.schedule)
