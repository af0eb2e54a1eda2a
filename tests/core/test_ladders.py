"""Ladders of settings, and thresholds that are picked."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.backends import each_backend
from tokenexit import TokenExitError, schedule
from tokenexit.carries import Translated
from tokenexit.guarantees import ladders
from tokenexit.policies import ConfidenceAbove, ErrorBelow, Evidence, PerClass, always, never
from tokenexit.schedule import Exit
from tokenexit.search import Found

THRESHOLDS = (0.95, 0.9, 0.7, 0.5)
TOKENS = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.sampled_from([0.0, 0.5, 0.7, 0.9, 0.95, 1.0, float("nan")]) | st.floats(0, 1, width=16),
        st.booleans(),
    ),
    max_size=40,
)


def test_a_ladder_starts_with_the_strictest():
    wanted = [schedule.dtop(threshold=one) for one in (0.99, 0.9, 0.5)]
    assert list(ladders.by_threshold(schedule.dtop(), thresholds=(0.5, 0.99, 0.9, 0.5))) == wanted
    wanted = [schedule.paumer(threshold=one) for one in (0.01, 0.05, 0.2)]
    assert list(ladders.by_threshold(schedule.paumer(), thresholds=(0.05, 0.01, 0.2))) == wanted
    wanted = [schedule.svit(threshold=one) for one in (0.1, 0.5)]
    assert list(ladders.by_threshold(schedule.svit(), thresholds=(0.5, 0.1))) == wanted


@given(
    alike=st.lists(st.floats(-1, 1), min_size=1, max_size=3),
    factors=st.lists(st.floats(0, 4, width=16), min_size=1, max_size=5),
)
def test_a_ladder_of_distances_merges_ever_more(alike, factors):
    merges = tuple(schedule.Merge(after, 2, least) for after, least in enumerate(alike, 1))
    agreeing = schedule.Merge(9, 4, agreed=ConfidenceAbove(0.5))
    plan = schedule.Schedule(merges=(*merges, agreeing))
    ladder = ladders.by_distance(plan, factors=factors)
    assert len(set(ladder)) == len(ladder)
    for one, other in pairwise(ladder):
        assert all(first.alike >= later.alike for first, later in zip(one.merges[:-1], other.merges[:-1], strict=True))
    for one in ladder:
        assert one.merges[-1] == agreeing
        assert [replace(merge, alike=None, agreed=agreeing.agreed) for merge in one.merges[:-1]] == [
            replace(merge, alike=None, agreed=agreeing.agreed) for merge in merges
        ]
    assert [merge.alike for merge in ladder[0].merges[:-1]] == pytest.approx(
        [max(-1, 1 - min(factors) * (1 - least)) for least in alike]
    )


@given(factors=st.lists(st.floats(0, 8, width=16), min_size=1, max_size=5))
def test_a_ladder_of_foretold_errors_lets_ever_more_go_and_keeps_proportions(factors):
    inside = Exit(8, (ErrorBelow(0.1, radius=0) & always()).with_minimum(per_image=2))
    plan = schedule.Schedule((Exit(3, ErrorBelow(0.3, radius=2)), Exit(6, never()), inside), Translated())
    ladder = ladders.by_error(plan, factors=factors)
    assert len(set(ladder)) == len(ladder) <= len(factors)
    least = min(factors)
    wanted = {3: min(1.0, least * 0.3), 8: min(1.0, least * 0.1)}
    assert ladder[0] == plan.with_threshold(wanted)
    for one, other in pairwise(ladder):
        limits = [plan.exits[0].policy.threshold for plan in (one, other)]
        assert limits[0] <= limits[1] <= 1
        assert other.exits[1] == plan.exits[1]


def test_errors_that_cannot_be_scaled_are_refused():
    for factors, exits, message in (
        ((), (Exit(2, ErrorBelow(0.1)),), "`factors` must be numbers from 0 up, at least one"),
        ((-1.0,), (Exit(2, ErrorBelow(0.1)),), "`factors` must be numbers from 0 up, at least one"),
        ((1.0,), (Exit(2, ConfidenceAbove(0.1)),), "`plan` must compare foretold errors, each exit with one number"),
        (
            (1.0,),
            (Exit(2, ErrorBelow(0.1) | ErrorBelow(0.2)),),
            "`plan` must compare foretold errors, each exit with one",
        ),
        (
            (1.0,),
            (Exit(2, ErrorBelow(PerClass((0.1, 0.1)))),),
            "`plan` must compare foretold errors, each exit with one",
        ),
        ((1.0,), (), "`plan` must compare foretold errors"),
    ):
        with pytest.raises(TokenExitError, match=message):
            ladders.by_error(schedule.Schedule(exits), factors=factors)


def test_distances_that_cannot_be_are_refused():
    for factors, plan, message in (
        ((), schedule.merged(), "`factors` must be numbers from 0 up, at least one"),
        ((-1.0,), schedule.merged(), "`factors` must be numbers from 0 up, at least one"),
        ((float("nan"),), schedule.merged(), "`factors` must be numbers from 0 up, at least one"),
        ((1.0,), schedule.dtop(), "`plan` must merge by similarity, `alike`, for an order"),
    ):
        with pytest.raises(TokenExitError, match=message):
            ladders.by_distance(plan, factors=factors)


def test_a_policy_that_is_turned_round_is_strict_on_the_other_side():
    plan = schedule.Schedule((schedule.Exit(2, ~ConfidenceAbove(0.5)),))
    thresholds = [
        one.exits[0].policy.policy.threshold for one in ladders.by_threshold(plan, thresholds=(0.5, 0.1, 0.9))
    ]
    assert thresholds == [0.1, 0.5, 0.9]
    both = schedule.Schedule((*plan.exits, schedule.Exit(3, ConfidenceAbove(0.5))))
    with pytest.raises(TokenExitError, match="`plan` must let tokens exit on one side of its thresholds alone"):
        ladders.by_threshold(both, thresholds=(0.5,))


def test_a_frontier_goes_from_the_best_to_the_cheapest():
    plans = [schedule.truncated(after=after) for after in range(1, 6)]
    points = [(0.9, 0.5), (0.99, 0.8), (0.8, 0.6), (0.95, 0.6), (0.5, 0.2)]
    found = [Found(plan, *point) for plan, point in zip(plans, points, strict=True)]
    assert ladders.by_frontier(found) == (plans[1], plans[3], plans[0], plans[4])


def test_the_largest_threshold_that_saves_enough():
    costs = (0.9, 0.62, 0.58, 0.4)
    assert ladders.largest_that_saves(THRESHOLDS, costs, saving=0.4) == 0.7
    assert ladders.largest_that_saves(THRESHOLDS[::-1], np.asarray(costs[::-1]), saving=0.4) == 0.7
    assert ladders.largest_that_saves(THRESHOLDS, costs, saving=0.6) == 0.5
    with pytest.raises(
        TokenExitError, match="`saving` must be at most 0.6000, the most that any threshold saves, got 0.7"
    ):
        ladders.largest_that_saves(THRESHOLDS, costs, saving=0.7)


@each_backend
@given(tokens=TOKENS, level=st.sampled_from([0.0, 0.2, 0.5, 1.0]), least=st.integers(1, 4))
def test_thresholds_per_class_are_the_lowest_that_do_not_fail(backend, tokens, level, least):
    label, confidence, wrong = (
        np.asarray([token[at] for token in tokens], dtype) for at, dtype in enumerate((np.int64, np.float32, bool))
    )
    found = ladders.per_class(
        backend.array(label), backend.array(confidence), backend.array(wrong),
        classes=5, level=level, thresholds=THRESHOLDS[::-1], least=least,
    )  # fmt: skip
    held = backend.held(confidence).astype(float)
    for one in range(5):
        expected = 1.0
        for threshold in THRESHOLDS:
            leaving = wrong[(label == one) & (held > threshold)]
            if len(leaving) >= least:
                if leaving.sum() > level * len(leaving):
                    break
                expected = threshold
        assert found.thresholds[one] == expected
    assert len(found.thresholds) == 5


def test_jax_arrays_give_the_same_thresholds_and_policies_take_them():
    jax = pytest.importorskip("jax")
    draw = np.random.default_rng(0)
    label, confidence = draw.integers(0, 3, 3000), draw.random(3000, np.float32)
    wrong = draw.random(3000) > confidence ** (1 + label)
    options = {"classes": 4, "level": 0.3, "thresholds": np.linspace(0, 1, 41).tolist()}
    found = ladders.per_class(label, confidence, wrong, **options)
    assert found == ladders.per_class(*map(jax.numpy.asarray, (label, confidence, wrong)), **options)
    low, *_, unseen = found.thresholds
    assert list(found.thresholds[:3]) == sorted(found.thresholds[:3])
    assert low < found.thresholds[2]
    assert unseen == 1.0
    scores = np.zeros((3000, 4), np.float32)
    scores[np.arange(3000), label] = confidence
    leave = ConfidenceAbove(found)(Evidence(class_scores=scores))
    for one in range(3):
        assert wrong[leave & (label == one)].mean() <= 0.3


ROW = (np.zeros(3, int), np.zeros(3, np.float32), np.zeros(3, bool))
FINE = {"classes": 2, "level": 0.1, "thresholds": (0.5,)}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ladders.by_threshold(schedule.dtop(), thresholds=()), "`thresholds` must be at least one, got []"),
        (lambda: ladders.by_threshold(schedule.dtop(), thresholds=(2.0,)), "`threshold` must"),
        (lambda: ladders.by_threshold(schedule.dense(), thresholds=(0.5,)), "`threshold` must be for exits that compare"),
        (lambda: ladders.largest_that_saves((), (), saving=0.1), "`costs` must be one for each of the 0 thresholds"),
        (lambda: ladders.largest_that_saves((0.5,), (1, 2), saving=0.1), "`costs` must be one for each of the 1 thresholds"),
        (lambda: ladders.per_class(ROW[0], ROW[1][:2], ROW[2], **FINE), "`confidence` must have one entry for each of the 3"),
        (lambda: ladders.per_class(*ROW[:2], ROW[2][:2], **FINE), "`wrong` must have one entry for each of the 3 tokens"),
        (lambda: ladders.per_class(*ROW, **(FINE | {"classes": 0})), "`classes` must be a whole number from 1 up, got 0"),
        (lambda: ladders.per_class(*ROW, **(FINE | {"level": 2})), "`level` must be a number in [0, 1], got 2"),
        (lambda: ladders.per_class(*ROW, **(FINE | {"least": 0})), "`least` must be a whole number from 1 up, got 0"),
        (lambda: ladders.per_class(*ROW, **(FINE | {"thresholds": (1.5,)})), "`thresholds` must be numbers in [0, 1], at"),
        (lambda: ladders.per_class(*ROW, **(FINE | {"thresholds": ()})), "`thresholds` must be numbers in [0, 1], at"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(TokenExitError) as found:
        call()
    assert str(found.value).startswith(message)
