import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenexit import TokenExitError, policies, schedule
from tokenexit.policies import ConfidenceAbove, EntropyBelow, MarginAbove, NeighboursAgree, always, never
from tokenexit.schedule import Exit, Schedule

LEAF = st.one_of(
    st.builds(ConfidenceAbove, st.floats(0, 1)),
    st.builds(EntropyBelow, st.floats(0, 1)),
    st.builds(MarginAbove, st.floats(0, 1)),
    st.builds(NeighboursAgree, st.floats(0, 1), radius=st.integers(0, 5)),
    st.just(never()),
    st.just(always()),
)
POLICY = st.recursive(
    LEAF,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a, k: a.retaining(per_class=k), inner, st.integers(0, 9)),
    ),
    max_leaves=5,
)
SCHEDULE = st.dictionaries(st.integers(1, 40), POLICY, max_size=5).map(
    lambda exits: Schedule(tuple(Exit(after, exits[after]) for after in sorted(exits)))
)


@given(plan=SCHEDULE)
def test_a_schedule_survives_json(plan):
    assert Schedule.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_the_presets_are_what_was_published_and_what_we_measured():
    assert schedule.dtop() == Schedule(
        (Exit(6, ConfidenceAbove(0.9).retaining(per_class=5)), Exit(8, ConfidenceAbove(0.9).retaining(per_class=5)))
    )
    assert schedule.neighbours() == Schedule(
        tuple(
            Exit(after, NeighboursAgree(0.9, radius=radius).retaining(per_class=5))
            for after, radius in ((3, 2), (6, 1), (8, 0))
        )
    )
    assert schedule.dense(after=(2, 5)) == Schedule((Exit(2, never()), Exit(5, never())))
    assert schedule.truncated(after=8) == Schedule((Exit(8, always()),))
    assert schedule.neighbours(radius={8: 0, 3: 1}).after == (3, 8)


def test_only_exits_at_which_a_token_can_leave_are_active():
    plan = Schedule((Exit(1, never()), Exit(2, always()), Exit(3, ConfidenceAbove(1.0))))
    assert [exit.after for exit in plan.active] == [2, 3]
    assert schedule.dense(after=(1, 2)).active == ()


def test_thresholds_are_exchanged_for_all_exits_or_for_some():
    plan = schedule.neighbours()
    assert plan.with_threshold(0.5) == schedule.neighbours(threshold=0.5)
    mixed = plan.with_threshold({3: 0.99})
    assert mixed == schedule.neighbours(threshold={3: 0.99, 6: 0.9, 8: 0.9})
    assert plan == schedule.neighbours()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Exit(0, always()), "`after` must be a whole number of blocks from 1 up, got 0"),
        (lambda: Exit(True, always()), "`after` must be a whole number .* got True"),
        (lambda: Exit(2, "always"), "`policy` must be a tokenexit.policies.Policy, got 'always'"),
        (
            lambda: Schedule((Exit(4, always()), Exit(2, always()))),
            r"strictly ascending order of `after`, got \(4, 2\)",
        ),
        (lambda: Schedule((Exit(4, always()), Exit(4, never()))), r"strictly ascending order of `after`, got \(4, 4\)"),
        (
            lambda: Schedule(Exit(after, always()) for after in (2, 4)),
            "`exits` must be a tuple of Exit, got <generator",
        ),
        (lambda: schedule.neighbours(radius={}), "`radius` must name at least one block, got {}"),
        (lambda: schedule.dtop(after=6), r"`after` must be several blocks, as \(6, 8\), got 6"),
        (lambda: schedule.dense(after=(2,)).with_threshold(0.5), r"compare one kind of score, got \[\]"),
        (
            lambda: Schedule((Exit(2, EntropyBelow(0.1)), Exit(4, ConfidenceAbove(0.9)))).with_threshold(0.9),
            r"compare one kind of score, got \['confidence', 'entropy'\]",
        ),
        (lambda: schedule.dtop(threshold=-0.1), r"`threshold` must be in \[0, 1\], got -0.1"),
        (lambda: schedule.dtop(threshold={7: 0.5}), r"`threshold` must name blocks with an exit, \(6, 8\), got \[7\]"),
        (lambda: schedule.neighbours(radius={3: -1}), "`radius` must be a whole number of at least 0, got -1"),
        (lambda: schedule.neighbours(per_class=-1), "`per_class` must be a whole number of at least 0, got -1"),
        (lambda: Schedule.from_dict({"schema": 2, "exits": []}), "`schema` must be 1, got 2"),
        (lambda: Schedule.from_dict({"exits": []}), r"`schedule` must have exactly the keys \['exits', 'schema'\]"),
        (lambda: Schedule.from_dict({"schema": 1, "exits": {}}), "`exits` must be a list, got {}"),
        (lambda: Schedule.from_dict({"schema": 1, "exits": [7]}), "`exits` must be a mapping .* got 7"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(TokenExitError, match=message):
        make()


def test_a_policy_inside_a_schedule_is_of_the_closed_registry():
    data = {
        "schema": 1,
        "exits": [{"after": 1, "policy": {"kind": "retaining", "policy": {"kind": "x"}, "per_class": 1}}],
    }
    with pytest.raises(TokenExitError, match="`kind` must be one of ConfidenceAbove"):
        Schedule.from_dict(data)
    assert policies.from_dict({"kind": "always"}) == always()
