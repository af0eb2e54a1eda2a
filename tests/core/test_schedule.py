import contextlib
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.core.backends import each_backend
from tests.core.strategies import PLAIN, SCHEDULE
from tokenexit import TokenExitError, policies, schedule
from tokenexit.carries import Feature, MaskPrediction, Prediction, Preserved, Translated
from tokenexit.policies import (
    Budget,
    ConfidenceAbove,
    EntropyBelow,
    Evidence,
    GateBelow,
    MarginAbove,
    NeighboursAgree,
    Patience,
    PerClass,
    always,
    never,
)
from tokenexit.schedule import Exit, Merge, Schedule


@given(plan=SCHEDULE)
def test_a_schedule_survives_json(plan):
    again = Schedule.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert json.dumps(again.to_dict()) == json.dumps(plan.to_dict())


PRESETS = {
    "neighbours": schedule.neighbours(),
    "dtop": schedule.dtop(),
    "dovit": schedule.dovit(),
    "paumer": schedule.paumer(),
    "paumer, by rank": schedule.paumer(keep={3: 0.8, 6: 0.5}),
    "svit": schedule.svit(),
    "dense": schedule.dense(after=(2, 5)),
    "truncated": schedule.truncated(after=8),
}


@pytest.mark.parametrize("plan", PRESETS.values(), ids=PRESETS)
def test_a_preset_survives_json(plan):
    assert Schedule.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.to_dict()["schema"] == 3


def test_the_presets_are_what_was_published_and_what_we_measured():
    def at(blocks, policy, *carry):
        return Schedule(tuple(Exit(block, policy) for block in blocks), *carry)

    assert schedule.dtop() == at((6, 8), ConfidenceAbove(0.9).retaining(per_class=5), Prediction())
    assert schedule.dovit() == at((2, 5, 8), ConfidenceAbove(0.985), Feature("decoder", fold_above=0.1))
    assert schedule.paumer() == at((8, 10), EntropyBelow(0.05), Feature("decoder", fold_above=None))
    assert schedule.svit() == at(range(3, 12), GateBelow(0.5), Preserved())
    assert schedule.neighbours() == Schedule(
        tuple(
            Exit(after, NeighboursAgree(0.9, radius=radius).retaining(per_class=5))
            for after, radius in ((3, 2), (6, 1), (8, 0))
        )
    )
    assert schedule.dense(after=(2, 5)) == at((2, 5), never(), Prediction())
    assert schedule.truncated(after=8) == at((8,), always(), Prediction())


def test_presets_for_another_depth_have_the_same_fractions():
    for depth, blocks in ((12, (3, 6, 8)), (24, (6, 12, 16)), (40, (10, 20, 27)), (6, (2, 3, 4)), (4, (1, 2, 3))):
        plan, told, alike = (
            schedule.neighbours(depth=depth), schedule.foretold(depth=depth), schedule.merged(depth=depth)
        )  # fmt: skip
        assert plan.after == told.after == blocks
        assert [exit.policy.policy.radius for exit in plan.exits] == [2, 1, 0]
        assert [exit.policy.radius for exit in told.exits] == [1, 1, 0]
        assert told.carry == Translated()
        first = {12: 1, 24: 2, 40: 3, 6: 1, 4: 1}[depth]
        assert {merge.after: merge.alike for merge in alike.merges} == {first: 0.9, blocks[0]: 0.8}
    assert schedule.neighbours(depth=3).after == (1, 2)
    assert schedule.neighbours(depth=2).after == schedule.foretold(depth=2).after == (1,)
    assert schedule.merged(depth=2).merged_after == (1,)
    for depth in (1, True):
        with pytest.raises(TokenExitError, match="`depth` must be a whole number of blocks from 2 up"):
            schedule.neighbours(depth=depth)


def test_the_presets_take_other_numbers():
    assert schedule.neighbours(radius={8: 0, 3: 1}).after == (3, 8)
    assert schedule.dovit(after=(6, 12, 18), threshold=0.95, fold_above=None) == Schedule(
        tuple(Exit(block, ConfidenceAbove(0.95)) for block in (6, 12, 18)), Feature()
    )
    assert schedule.dtop(after=iter((8, 16)), threshold={8: 0.9, 16: 0.95}, per_class=3) == Schedule(
        tuple(Exit(block, ConfidenceAbove(t).retaining(per_class=3)) for block, t in ((8, 0.9), (16, 0.95)))
    )
    assert schedule.paumer(after=(4,), threshold=0.3) == Schedule((Exit(4, EntropyBelow(0.3)),), Feature())
    assert schedule.paumer(keep={6: 0.5, 3: 0.8}) == Schedule(
        (Exit(3, Budget(0.8, by="entropy")), Exit(6, Budget(0.5, by="entropy"))), Feature()
    )
    assert schedule.svit(after=(1, 2), threshold={1: 0.3, 2: 0.6}) == Schedule(
        (Exit(1, GateBelow(0.3)), Exit(2, GateBelow(0.6))), Preserved()
    )
    own = PerClass((0.5, 0.9))
    assert schedule.dtop(threshold=own).exits[0].policy == ConfidenceAbove(own).retaining(per_class=5)


def test_only_exits_at_which_a_token_can_leave_are_active():
    plan = Schedule((Exit(1, never()), Exit(2, always()), Exit(3, ConfidenceAbove(1.0))))
    assert [exit.after for exit in plan.active] == [2, 3]
    assert schedule.dense(after=(1, 2)).active == ()
    array = Schedule((Exit(1, never()), Exit(2, ConfidenceAbove(np.asarray(0.5))), Exit(3, EntropyBelow(0.0))))
    assert [exit.after for exit in array.active] == [2, 3]


def test_thresholds_are_exchanged_for_all_exits_or_for_some():
    plan = schedule.neighbours()
    assert plan.with_threshold(0.5) == schedule.neighbours(threshold=0.5)
    mixed = plan.with_threshold({3: 0.99})
    assert mixed == schedule.neighbours(threshold={3: 0.99, 6: 0.9, 8: 0.9})
    assert plan == schedule.neighbours()
    own = PerClass((0.5, 0.7))
    assert plan.with_threshold(own) == schedule.neighbours(threshold=own)
    assert plan.with_threshold({6: own, 8: 0.2}) == schedule.neighbours(threshold={3: 0.9, 6: own, 8: 0.2})


@pytest.mark.parametrize("name", ["neighbours", "dtop", "dovit", "paumer", "svit"])
def test_retuning_keeps_everything_else(name):
    plan = PRESETS[name]
    other = plan.with_threshold(0.25)
    assert other != plan
    assert other.carry == plan.carry
    assert other == getattr(schedule, name)(threshold=0.25)
    one = plan.with_threshold({plan.after[-1]: 0.25})
    assert one.exits[:-1] == plan.exits[:-1]
    assert one.exits[-1] == other.exits[-1]


def test_merges_are_given_other_similarities():
    agreed = Merge(3, 4, agreed=ConfidenceAbove(0.5))
    plan = Schedule(merges=(Merge(1, 2, 0.9), Merge(2, 2, 0.8), agreed))
    assert plan.with_alike(0.7).merges == (Merge(1, 2, 0.7), Merge(2, 2, 0.7), agreed)
    asking = replace(agreed, alike=0.3)
    assert plan.with_alike({1: 0.5, 3: 0.3}).merges == (Merge(1, 2, 0.5), Merge(2, 2, 0.8), asking)
    assert Schedule(merges=(Merge(1, 2, share=0.5),)).with_alike({1: 0.7}).merges == (Merge(1, 2, 0.7),)
    assert plan.retuned(alike=0.7) == schedule.dense().retuned(plan, alike=0.7) == plan.with_alike(0.7)
    with pytest.raises(TokenExitError, match=r"`alike` must name blocks with a merge, \[1, 2, 3\], got \[4\]"):
        plan.with_alike({4: 0.5})
    with pytest.raises(TokenExitError, match=r"`alike` must be None or a number in \[-1, 1\], got 1.5"):
        plan.with_alike(1.5)
    with pytest.raises(TokenExitError, match="`alike` must be for a plan with merges that ask for a similarity"):
        Schedule(merges=(agreed,)).with_alike(0.5)


def test_exits_that_are_not_retuned_may_compare_another_score():
    plan = Schedule((Exit(2, EntropyBelow(0.1)), Exit(4, ConfidenceAbove(0.9)), Exit(6, Budget(2))), Feature())
    assert plan.with_threshold({4: 0.5}).exits[1] == Exit(4, ConfidenceAbove(0.5))
    assert plan.with_threshold({2: 0.5}).exits[0] == Exit(2, EntropyBelow(0.5))


@each_backend
def test_a_new_threshold_decides_at_once(backend):
    """The evidence, which remembers scores, remembers no decision; and an array is read when a policy is asked."""
    given_evidence = Evidence(backend.array(np.array([[1, 0], [4, 0]], np.float32)))

    def leaving(plan):
        return [backend.numpy(exit.policy(given_evidence)).tolist() for exit in plan.exits]

    plan = schedule.dtop(threshold=0.9, per_class=0)
    assert leaving(plan) == [[False, True]] * 2
    assert leaving(plan.with_threshold(0.5)) == [[True, True]] * 2
    assert leaving(plan.with_threshold({8: 0.5})) == [[False, True], [True, True]]
    assert leaving(plan.with_threshold(PerClass((1.0, 0.0)))) == [[False, False]] * 2
    array = backend.array(np.asarray(0.9, np.float32))
    live = plan.with_threshold(array)
    assert leaving(live) == [[False, True]] * 2
    if backend.name != "numpy-readonly":
        array[...] = 0.5
        assert leaving(live) == [[True, True]] * 2
        assert live.to_dict() == plan.with_threshold(0.5).to_dict()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Exit(0, always()), "`after` must be a whole number of blocks from 1 up, got 0"),
        (lambda: Exit(True, always()), "`after` must be a whole number .* got True"),
        (lambda: Exit(1.0, always()), "`after` must be a whole number .* got 1.0"),
        (lambda: Exit(2, "always"), "`policy` must be a tokenexit.policies.Policy, got 'always'"),
        (lambda: Exit(2, PerClass((0.5,))), "`policy` must be a tokenexit.policies.Policy, got PerClass"),
        (
            lambda: Schedule((Exit(4, always()), Exit(2, always()))),
            r"strictly ascending order of `after`, got \(4, 2\)",
        ),
        (lambda: Schedule((Exit(4, always()), Exit(4, never()))), r"strictly ascending order of `after`, got \(4, 4\)"),
        (
            lambda: Schedule(Exit(after, always()) for after in (2, 4)),
            "`exits` must be a tuple of Exit, got <generator",
        ),
        (lambda: Schedule((always(),)), "`exits` must be a tuple of Exit, got "),
        (lambda: Schedule((), None), "`carry` must be a carry of tokenexit.carries, got None"),
        (lambda: Schedule((), "prediction"), "`carry` must be a carry of tokenexit.carries, got 'prediction'"),
        (lambda: Schedule((), Feature), "`carry` must be a carry of tokenexit.carries, got <class"),
        (lambda: schedule.neighbours(radius={}), "`radius` must name at least one block, got {}"),
        (lambda: schedule.dtop(after=6), r"`after` must be several blocks, as \(6, 8\), got 6"),
        (lambda: schedule.dovit(after=6), r"`after` must be several blocks, as \(6, 8\), got 6"),
        (lambda: schedule.paumer(after=()), r"compare one kind of score, got \[\]"),
        (lambda: schedule.svit(after=(2, 1)), r"strictly ascending order of `after`, got \(2, 1\)"),
        (
            lambda: schedule.paumer(threshold=0.1, keep={6: 0.5}),
            "`keep` must be given instead of `threshold`, got both",
        ),
        (lambda: schedule.paumer(keep={}), "`keep` must name at least one block, got {}"),
        (lambda: schedule.paumer(keep={6: 1.5}), r"`keep` must be a float in \[0, 1\] or a whole number, got 1.5"),
        (lambda: schedule.dovit(fold_above=1.5), r"`fold_above` must be None or in \[0, 1\], got 1.5"),
        (lambda: schedule.svit(threshold=2), r"`threshold` must be in \[0, 1\], got 2"),
        (lambda: schedule.truncated(after=0), "`after` must be a whole number of blocks from 1 up, got 0"),
        (lambda: schedule.dense(after=(2,)).with_threshold(0.5), r"compare one kind of score, got \[\]"),
        (lambda: schedule.dtop().with_threshold({}), r"compare one kind of score, got \[\]"),
        (lambda: schedule.paumer(keep={6: 0.5}).with_threshold(0.5), r"compare one kind of score, got \[\]"),
        (
            lambda: Schedule((Exit(2, EntropyBelow(0.1)), Exit(4, ConfidenceAbove(0.9)))).with_threshold(0.9),
            r"got \['confidence', 'entropy'\]: name some of the exits by a mapping .*, as {2: 0.9, 4: 0.9}",
        ),
        (
            lambda: schedule.neighbours().with_threshold((0.9, 0.8)),
            r"`threshold` must be one threshold for all exits, or a mapping from blocks to thresholds, "
            r"as {3: 0.9, 6: 0.9, 8: 0.9}, got \(0.9, 0.8\)",
        ),
        (lambda: schedule.dtop(threshold=-0.1), r"`threshold` must be in \[0, 1\], got -0.1"),
        (lambda: schedule.dtop().with_threshold({6: 1.5}), r"`threshold` must be in \[0, 1\], got 1.5"),
        (lambda: schedule.dtop(threshold={7: 0.5}), r"`threshold` must name blocks with an exit, \(6, 8\), got \[7\]"),
        (lambda: schedule.neighbours(radius={3: -1}), "`radius` must be a whole number from 0 to 2147483647, got -1"),
        (lambda: schedule.neighbours(per_class=-1), "`per_class` must be a whole number from 0 to 2147483647, got -1"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(TokenExitError, match=message):
        make()


PLANS_THAT_DO_NOT_FIT = [
    ("dtop", "`schedule` must be a tokenexit.schedule.Schedule, got 'dtop'"),
    (
        schedule.svit(after=(2, 3)),
        r"carry predictions or features and look at no gate, for a model without gates \(`wrap_gates` makes one\), got Sch",
    ),
    (Schedule((), Preserved()), "carry predictions or features and look at no gate"),
    (Schedule((), MaskPrediction()), "`schedule` must carry no MaskPrediction, for heads that give no masks to freeze"),
    (
        schedule.neighbours(),
        r"`schedule` must have exits after blocks 1 to 4 only, for 5 blocks, got \[6, 8\]: "
        r"`schedule.neighbours\(depth=5\)` has such, or name others by `radius`, or by `after` of other presets",
    ),
    (
        schedule.dtop(after=(2, 4)),
        r"`schedule` must have exits only after blocks with an exit head, \[2, 3\], got \[4\]",
    ),
]


def test_a_plan_that_fits_is_not_written_out():
    class Long(ConfidenceAbove):
        def __repr__(self):
            raise AssertionError

    plan = Schedule((Exit(2, Long(0.9)),))
    schedule.require_fits(plan, depth=5, after=(2, 3), gives_masks=False)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("plan", "message"), PLANS_THAT_DO_NOT_FIT)
def test_a_plan_that_a_model_cannot_follow_is_named(plan, message):
    with pytest.raises(TokenExitError, match=message):
        schedule.require_fits(plan, depth=5, after=(2, 3), gives_masks=False)


def test_translations_are_carried_where_every_head_translates():
    plan = Schedule((Exit(2, never()), Exit(3, ConfidenceAbove(0.5))), Translated())
    schedule.require_fits(plan, depth=5, after=(2, 3), gives_masks=False, translates=(2, 3))
    schedule.require_fits(Schedule(plan.exits), depth=5, after=(2, 3), gives_masks=False, translates=(2, 3))
    schedule.require_fits(Schedule((), Translated()), depth=5, after=(2, 3), gives_masks=False)
    rule = r"`schedule` must carry Translated only with exit heads that translate: wrap\(..., exit_heads=heads.Translator\(\)\)"
    for translates, scored in ((), [2, 3]), ((2,), [3]):
        with pytest.raises(TokenExitError, match=rf"{rule}, got others after the blocks \{scored}"):
            schedule.require_fits(plan, depth=5, after=(2, 3), gives_masks=False, translates=translates)
    agreed = Schedule((), Translated(), merges=(Merge(2, agreed=ConfidenceAbove(0.5)),))
    with pytest.raises(TokenExitError, match=r"got others after the blocks \[2\]"):
        schedule.require_fits(agreed, depth=5, after=(2, 3), gives_masks=False, translates=(3,))
    assert [stage.rejoin for stage in plan.stages(5)] == [False, True]
    assert not any(stage.rejoin for stage in Schedule(plan.exits).stages(5))


@pytest.mark.parametrize("policy", [EntropyBelow(0.5), MarginAbove(0.5)])
def test_scores_that_mask_heads_lack_are_named(policy):
    plan = Schedule((Exit(2, policy),))
    schedule.require_fits(plan, depth=5, after=(2, 3), gives_masks=False)
    with pytest.raises(TokenExitError, match="compare confidences, for mask heads, whose scores are not normalised"):
        schedule.require_fits(plan, depth=5, after=(2, 3), gives_masks=True)
    schedule.require_fits(Schedule(carry=MaskPrediction()), depth=1, after=(), gives_masks=True)


def written(**changes):
    return {"schema": 3, "exits": [], "carry": {"kind": "prediction"}, "cell": None} | changes


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"schema": 1, "exits": []}, "`schema` must be 3, got 1"),
        (written(schema=1), "`schema` must be 3, got 1"),
        (written(schema=2), "`schema` must be 3, got 2"),
        (written(schema="2"), "`schema` must be 3, got '2'"),
        (written(schema=None), "`schema` must be 3, got None"),
        ({"exits": []}, r"`schedule` must have a schema, got \['exits'\]"),
        ({}, r"`schedule` must have a schema, got \[\]"),
        (None, "`schedule` must be a mapping, got None"),
        ([], r"`schedule` must be a mapping, got \[\]"),
        ({"schema": 3, "exits": []}, r"`schedule` must have exactly the keys \['carry', 'cell', 'exits', 'schema'\]"),
        (
            written(more=1),
            r"`schedule` must have exactly the keys .*got \['carry', 'cell', 'exits', 'more', 'schema'\]",
        ),
        (written(exits={}), "`exits` must be a list, got {}"),
        (written(exits=[7]), "`exits` must be a mapping .* got 7"),
        (written(exits=[{"after": 1}]), r"`exits` must have exactly the keys \['after', 'policy'\], got \['after'\]"),
        (written(exits=[{"after": True, "policy": {"kind": "never"}}]), "`after` must be a whole number .*got True"),
        (written(exits=[{"after": "1", "policy": {"kind": "never"}}]), "`after` must be a whole number .*got '1'"),
        (written(exits=[{"after": 1, "policy": "never"}]), "`policy` must be a mapping, got 'never'"),
        (written(exits=[{"after": 2, "policy": {"kind": "never"}}] * 2), "strictly ascending order of `after`"),
        (
            written(exits=[{"after": 1, "policy": {"kind": "PerClass", "thresholds": [0.5]}}]),
            "`policy` must be a policy, got PerClass",
        ),
        (
            written(exits=[{"after": 1, "policy": {"kind": "retaining", "policy": {"kind": "x"}, "per_class": 1}}]),
            "`kind` must be one of ConfidenceAbove, .*got 'x'",
        ),
        (written(carry=None), "`carry` must be a mapping, got None"),
        (written(carry="prediction"), "`carry` must be a mapping, got 'prediction'"),
        (
            written(carry={"kind": "never"}),
            "`kind` must be one of prediction, feature, preserved, mask_prediction, translated, got 'never'",
        ),
        (written(carry={"kind": "feature", "before": "head", "fold_above": None}), "`before` must be 'decoder' or"),
    ],
)
def test_hostile_data_is_refused(data, message):
    with pytest.raises(TokenExitError, match=message):
        Schedule.from_dict(data)


@pytest.mark.usefixtures("unchecked")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=SCHEDULE, data=st.data())
def test_damaged_data_is_refused_by_the_librarys_own_error_or_read_as_a_schedule(plan, data):
    damaged = plan.to_dict()
    where = data.draw(st.sampled_from([damaged, damaged["carry"], *damaged["exits"]]))
    where[data.draw(st.sampled_from([*where, "more"]))] = data.draw(PLAIN)
    with contextlib.suppress(TokenExitError):
        assert isinstance(Schedule.from_dict(damaged), Schedule)


def test_a_schedule_is_plain_frozen_data():
    plan = Schedule((Exit(3, Patience(2) & GateBelow(0.5)),), Preserved())
    assert eval(repr(Exit(3, Patience(2)))) == Exit(3, Patience(2))
    assert hash(plan) == hash(Schedule(plan.exits, Preserved()))
    assert plan != Schedule(plan.exits)
    assert policies.from_dict(plan.to_dict()["exits"][0]["policy"]) == plan.exits[0].policy


def test_one_threshold_is_for_the_exits_that_have_any():
    plan = Schedule((Exit(3, policies.never()), Exit(6, policies.ConfidenceAbove(0.9)), Exit(8, policies.Patience(1))))
    assert plan.with_threshold(0.8).exits[1].policy == policies.ConfidenceAbove(0.8)
    assert plan.with_threshold(0.8).exits[::2] == plan.exits[::2]


SHARES = Schedule(
    (Exit(2, ConfidenceAbove(0.9)),), merges=(Merge(1, 2, share=0.6), Merge(3, 4, 0.8), Merge(5, 2, share=0.5))
)


def test_a_plan_with_shares_survives_json_and_other_plans_know_nothing_of_it():
    assert Schedule.from_dict(json.loads(json.dumps(SHARES.to_dict()))) == SHARES
    assert [sorted(one) for one in SHARES.to_dict()["merges"]] == [
        ["after", "agreed", "alike", "share", "side"],
        ["after", "agreed", "alike", "side"],
        ["after", "agreed", "alike", "share", "side"],
    ]
    assert schedule.merged(share={1: 0.6, 3: 0.5}).merges == (Merge(1, 2, share=0.6), Merge(3, 4, share=0.5))


def test_shares_are_measured_in_order_of_depth_each_under_the_plan_so_far():
    asked = []

    def similarities(part):
        asked.append(part)
        return np.asarray([0.9, 0.5, 0.7, 0.1], np.float32)

    found = schedule.measured(SHARES, similarities)
    first, last = 0.6, 0.6  # between 0.7 and 0.5, of two of four
    assert [merge.alike for merge in found.merges] == pytest.approx([first, 0.8, last])
    assert [merge.share for merge in found.merges] == [None] * 3
    assert [part.merges for part in asked] == [(Merge(1, 2, 1.0),), (*found.merges[:2], Merge(5, 2, 1.0))]
    assert all(part.exits == SHARES.exits for part in asked)
    part = schedule.measured(SHARES, similarities, until=5)
    assert part.merges == (*found.merges[:2], SHARES.merges[2])
    assert schedule.measured(part, similarities) == found
    assert schedule.measured(found, similarities) == found
    assert len(asked) == 4


def test_no_pass_follows_shares_that_were_not_measured():
    with pytest.raises(TokenExitError) as found:
        SHARES.stages(8)
    assert str(found.value) == (
        "`schedule` must have similarities in the place of shares, which `tokenexit_torch.fit_merges(model, images)` "
        "measures, got shares after blocks [1, 5]"
    )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Merge(1, share=0.0), "`share` must be None or a number above 0 and at most 1, got 0.0"),
        (lambda: Merge(1, share=1.1), "`share` must be None or a number above 0 and at most 1, got 1.1"),
        (lambda: Merge(1, share=True), "`share` must be None or a number above 0 and at most 1, got True"),
        (lambda: Merge(1, alike=0.9, share=0.5), "`share` must be left out beside `alike`, got 0.5"),
        (lambda: Merge(1), "`alike` must be given if neither `agreed` nor `share` is, got None"),
        (lambda: schedule.merged(alike={1: 0.9}, share={1: 0.9}), "`share` must be left out beside `alike`, got {1: 0.9}"),
        (lambda: schedule.merged(share={}), "`share` must name at least one block, got {}"),
    ],
)  # fmt: skip
def test_shares_that_cannot_be_are_named(make, message):
    with pytest.raises(TokenExitError) as found:
        make()
    assert str(found.value) == message


@pytest.mark.parametrize(
    "preset", [schedule.neighbours, schedule.merged, schedule.foretold, schedule.dtop, schedule.dovit, schedule.paumer]
)
def test_blocks_that_a_preset_chooses_are_of_the_depth_they_are_chosen_for(preset):
    plan = preset()
    assert plan.depth == 12
    given = {"after": range(1, 24), "gives_masks": False, "translates": range(1, 24), "classes": 3}
    with pytest.raises(TokenExitError, match=r"`schedule` must have blocks for a model of 24: .* chooses for 12, \["):
        schedule.require_fits(plan, depth=24, **given)
    schedule.require_fits(Schedule.from_dict(plan.to_dict()), depth=24, **given)  # named, in a file
    assert Schedule.from_dict(plan.to_dict()) == plan
    gates = range(1, 24)
    with pytest.raises(TokenExitError, match=r"`schedule` must have blocks for a model of 24: .* chooses for 12, \["):
        schedule.require_gates_fit(schedule.svit(), depth=24, after=gates)
    schedule.require_gates_fit(schedule.svit(after=range(3, 24)), depth=24, after=gates)
    named = schedule.dtop(after=(8, 16))
    assert named.depth is None
    schedule.require_fits(named, depth=24, **given)
