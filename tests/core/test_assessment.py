"""Is it worth it: contenders run beside a dense network, the verdict, and plans chosen by a target."""

import itertools
import json
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.backends import each_backend
from tests.core.strategies import SCHEDULE
from tokenexit import TokenExitError, schedule
from tokenexit.adapting import require_fits
from tokenexit.assessment import (
    OURS,
    Assessment,
    Clock,
    Measured,
    Option,
    Ran,
    exit_blocks,
    options_from,
    plans_to_try,
    retuned,
    run_contenders,
    worth_timing,
)
from tokenexit.carries import Prediction, Translated

DENSE = Measured("dense", "dense", 0.0, cost=1.0, speedup=(1.0, 1.0, 1.0), milliseconds=100.0)
PLAN = schedule.merged()


def row(name, kind, loss, cost, times=None, **more):
    speedup = None if times is None else (0.9 * times, times, 1.1 * times)
    return Measured(name, kind, loss, cost=cost, plan=PLAN if kind in OURS else None, speedup=speedup, **more)


def assessment(*rows, **changes):
    options = {"loss": "pixels that get another class", "at_most": 0.01, "images": 30, "fitted": 30, "batch": 4}
    options |= {"size": (352, 480), "grid": (44, 60), "blocks": 12, "machine": "CPU, 2 threads", **changes}
    return Assessment((DENSE, *rows), **options)


FAST = row("merge and exit", "merging and exits", 0.009, 0.35, 2.31)
BOLD = row("exits at 0.7", "exits", 0.03, 0.3, 2.6)
CUT = row("cut short after block 8", "truncation", 0.017, 0.67, 1.5)
SMALL = row("smaller input, 0.87 of each side", "smaller input", 0.02, 0.75, 1.4)


def test_a_verdict_says_what_is_fastest_what_it_costs_and_what_else_there_is():
    found = assessment(FAST, BOLD, CUT, SMALL)
    assert found.worth
    assert (found.chosen, found.plan) == (FAST, PLAN)
    assert found.verdict() == (
        "Worth it: 2.31 times as fast as dense [2.08, 2.54] at 0.9 % of pixels that get another class (merge and exit). "
        "Cut short after block 8: 1.50 times as fast as dense [1.35, 1.65] at 1.7 % of pixels that get another class. "
        "Smaller input, 0.87 of each side: 1.40 times as fast as dense [1.26, 1.54] at 2 % of pixels that get another "
        "class."
    )
    assert "30 images of 352 x 480 pixels (44 x 60 patches), 30 others fitted; 12 blocks" in str(found)
    lines = found.table().splitlines()
    assert len(lines) == 2 + 5
    assert "| merge and exit | merging and exits | 0.90 | 0.350 |  | 2.31 [2.08, 2.54] |" in lines


def test_a_verdict_says_what_twice_the_change_would_bring_and_what_labels_say():
    bold = replace(BOLD, loss=0.02)
    assert "Within 2 %: 2.60 times as fast as dense [2.34, 2.86] at 2 % of pixels" in assessment(FAST, bold).verdict()
    assert "Within 2 %" not in assessment(FAST, BOLD).verdict()
    assert "Within 2 %" not in assessment(FAST, replace(bold, speedup=(2.0, 2.1, 2.2))).verdict()
    rows = (replace(DENSE, quality=0.7384), replace(FAST, quality=0.737))
    labelled = replace(assessment(), rows=rows)
    assert "of pixels that get another class, with 73.70 mIoU where dense has 73.84 (merge" in labelled.verdict()


def test_a_loss_of_another_kind_is_named():
    found = assessment(FAST, loss="change of the map").verdict()
    assert found.startswith(
        "Worth it: 2.31 times as fast as dense [2.08, 2.54] at a loss of 0.9 % (change of the map) ("
    )


def test_a_verdict_is_no_where_little_is_saved_and_says_why():
    slow = assessment(replace(FAST, speedup=(1.0, 1.1, 1.15)), CUT, grid=(14, 14))
    assert not slow.worth
    assert slow.verdict().startswith("Not worth it: within 1 % the best is 1.10 times as fast")
    assert "below 1.2 times nothing is worth the change. Images have only 196 patches, and the finer" in slow.verdict()
    none = assessment(BOLD, CUT, blocks=4)
    assert none.chosen is None
    assert none.plan is None
    wanted = "Not worth it: no plan is faster than dense within 1 % of pixels that get another class. "
    assert none.verdict().startswith(wanted + "The most careful one changes 3 % (exits at 0.7). The network has only 4")
    slower = assessment(replace(FAST, speedup=(0.7, 0.8, 0.9)))
    assert slower.chosen is None
    assert "no plan is faster than dense" in slower.verdict()
    untimed = assessment(replace(FAST, speedup=None))
    untimed = replace(untimed, rows=(replace(DENSE, speedup=None), *untimed.rows[1:]))
    assert untimed.verdict().startswith("Nothing was timed")


@pytest.mark.parametrize(
    "rival", [replace(CUT, loss=0.004, speedup=(2.4, 2.5, 2.6)), replace(SMALL, loss=0.0, speedup=(3.0, 3.1, 3.2))]
)
def test_what_is_faster_without_this_library_is_said(rival):
    found = assessment(FAST, rival)
    assert not found.worth
    assert found.chosen == FAST
    assert found.verdict().startswith(f"Not with this library: {rival.name}, {rival.times:.2f} times as fast")
    assert "the best plan here is 2.31 times" in found.verdict()


def test_a_tie_goes_to_what_changes_less_whichever_median_is_ahead():
    """Two runs of one thing differ by a hundredth: the verdict is the same both times."""
    for times in (2.49, 2.52, 2.58):
        rival = replace(CUT, loss=FAST.loss, speedup=(times - 0.1, times, times + 0.1))
        ours = replace(FAST, speedup=(2.43, 2.53, 2.63))
        assert not assessment(ours, rival).worth
        assert assessment(ours, replace(rival, loss=FAST.loss + 0.001)).worth
    clear = replace(CUT, loss=0.0, speedup=(2.0, 2.1, 2.2))
    assert assessment(replace(FAST, speedup=(2.43, 2.53, 2.63)), clear).worth


def test_a_verdict_from_few_images_is_qualified():
    assert "Only 3 images were compared: take some dozens" in assessment(FAST, images=3).verdict()
    assert "Only" not in assessment(FAST).verdict()


def test_qualities_have_a_column_and_notes_are_said():
    found = assessment(replace(FAST, quality=0.7158), notes=("A note.",))
    assert found.table().splitlines()[0].endswith("| mIoU |")
    assert found.table().splitlines()[-1].endswith("| 71.58 |")
    assert str(found).endswith("A note.")


ROWS = st.builds(
    Measured,
    st.text(max_size=9),
    st.sampled_from(["merging", "exits", "truncation", "smaller input"]),
    st.floats(0, 1),
    cost=st.none() | st.floats(0, 2),
    plan=st.none() | SCHEDULE,
    quality=st.none() | st.floats(0, 1),
    speedup=st.none() | st.tuples(*[st.floats(0.1, 9)] * 3).map(lambda times: tuple(sorted(times))),
    milliseconds=st.none() | st.floats(0, 1e4),
)


@given(st.lists(ROWS, max_size=6), st.tuples(st.integers(1, 99), st.integers(1, 99)))
def test_an_assessment_survives_json_and_its_words_do_not_fail(rows, grid):
    found = assessment(*rows, grid=grid)
    assert Assessment.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.verdict()
    assert len(found.table().splitlines()) == 2 + 1 + len(rows)
    best = found.chosen
    assert best is None or (best.kind in OURS and best.loss <= 0.01 and best.times > 1)


@given(st.lists(ROWS, max_size=8))
def test_options_are_plans_that_nothing_beats(rows):
    found = assessment(*rows).options
    ours = [one for one in rows if one.kind in OURS and one.plan is not None and one.cost is not None and one.cost < 1]
    assert {(one.loss, one.saving) for one in found} <= {(one.loss, 1 - one.cost) for one in ours}
    for one, other in itertools.pairwise(found):
        assert one.saving <= other.saving
        assert one.loss <= other.loss
    for one in ours:
        assert any(other.loss <= one.loss and other.saving >= 1 - one.cost for other in found)


def test_an_option_that_another_beats_is_left_out():
    worse, bolder = replace(FAST, loss=0.02, cost=0.5), replace(FAST, loss=0.02, cost=0.2)
    dearer, unknown = replace(FAST, loss=0.0, cost=1.1), replace(FAST, cost=None)
    found = assessment(bolder, worse, FAST, dearer, unknown, CUT).options
    assert found == (Option(PLAN, 0.009, 1 - 0.35), Option(PLAN, 0.02, 1 - 0.2))
    assert assessment(FAST, FAST).options[0] == Option(PLAN, 0.009, 1 - 0.35)


OPTIONS = (Option(PLAN, 0.001, 0.2), Option(schedule.neighbours(), 0.01, 0.4), Option(schedule.dtop(), 0.05, 0.6))


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ({"saving": 0.0}, 0),
        ({"saving": 0.2}, 0),
        ({"saving": 0.21}, 1),
        ({"saving": 0.6}, 2),
        ({"changed": 0.01}, 1),
        ({"changed": 0.9}, 2),
        ({"changed": 0.001}, 0),
    ],
)
def test_a_target_finds_the_plan(target, wanted):
    assert retuned(OPTIONS, **target) == OPTIONS[wanted].plan
    assert retuned(OPTIONS[::-1], **target) == OPTIONS[wanted].plan


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "target", "message"),
    [
        (OPTIONS, {}, "`saving` must be given, or `changed`, and not both"),
        (OPTIONS, {"saving": 0.4, "changed": 0.1}, "`saving` must be given, or `changed`, and not both"),
        (OPTIONS, {"saving": 40}, "`saving` must be a share from 0 up and below 1, as 0.4, got 40"),
        (OPTIONS, {"changed": -0.1}, "`changed` must be a share from 0 up and below 1"),
        ((), {"saving": 0.4}, "`saving` must come after an assessment, .*`assess\\(model, images\\)`, got 0.4"),
        (
            OPTIONS,
            {"saving": 0.7},
            "`saving` must be what one .* saves, got 0.7: the boldest saves 0.6, and changes 0.05",
        ),
        (OPTIONS, {"changed": 0.0}, "`changed` must .*, got 0: the most careful changes 0.001, and saves 0.2"),
    ],
)
def test_a_target_out_of_reach_is_refused(options, target, message):
    with pytest.raises(TokenExitError, match=message):
        retuned(options, **target)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "`schema` must be 1, got 2"),
        ({"rows": []}, "`rows` must have the dense network first"),
        ({"rows": {}}, "`rows` must be a list"),
        ({"at_most": 1}, "`at_most` must lie between 0 and 1"),
        ({"images": 0}, "`images` must be a whole number from 1 up"),
        ({"more": 1}, "`assessment` must have exactly the keys"),
    ],
)
def test_a_damaged_assessment_is_refused(change, message):
    with pytest.raises(TokenExitError, match=message):
        Assessment.from_dict(json.loads(json.dumps(assessment().to_dict())) | change)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "magic"}, "`kind` must be one of dense, merging"),
        ({"loss": math.nan}, r"`loss` must lie in \[0, 1\]"),
        ({"cost": -1}, "`cost` must be None or from 0 up"),
        ({"speedup": [1.0, 2.0]}, "`speedup` must be None or three factors above 0"),
        ({"speedup": [2.0, 1.0, 3.0]}, "`speedup` must be None or three factors above 0 that ascend"),
        ({"speedup": 2.0}, "`speedup` must be None or a list"),
        ({"quality": 2}, "`quality` must be None or in"),
    ],
)
def test_a_damaged_row_is_refused(change, message):
    with pytest.raises(TokenExitError, match=message):
        Measured.from_dict(json.loads(json.dumps(FAST.to_dict())) | change)
    with pytest.raises(TokenExitError, match="`assessed` must be a list"):
        options_from({})


@pytest.mark.parametrize("depth", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("by", ["confidence", "error"])
def test_a_shallow_network_tries_no_plan_twice(depth, by):
    chains = plans_to_try(depth=depth, heads=exit_blocks(depth), by=by)
    names = [one.name for chain in chains for one in chain]
    assert sorted(names) == sorted(set(names))
    assert all(chains)


@given(st.integers(1, 48), st.data())
def test_plans_to_try_fit_the_network_and_grow_bolder(depth, data):
    heads = exit_blocks(depth)
    assert list(heads) == sorted(set(heads))
    assert all(0 < block < depth for block in heads)
    translates = data.draw(st.booleans())
    given_heads = data.draw(st.sampled_from([heads, heads[:2], ()]))
    carry = Translated() if translates else Prediction()
    merges = data.draw(st.booleans())
    by = "error" if translates else "confidence"
    chains = plans_to_try(depth=depth, heads=given_heads, by=by, carry=carry, merges=merges)
    for chain in chains:
        assert len({one.kind for one in chain}) == 1
        assert len({one.name for one in chain}) == len(chain)
        for one in chain:
            plan = schedule.measured(one.plan, lambda _: np.asarray([0.1, 0.5, 0.9], np.float32))
            require_fits(
                plan, depth=depth, after=given_heads, gives_masks=False, translates=given_heads if translates else ()
            )
            assert schedule.Schedule.from_dict(plan.to_dict()) == plan
            assert bool(plan.merges) == ("merging" in one.kind)
            assert bool(plan.exits) == (one.kind != "merging")
            assert one.kind == "merging" or plan.carry == carry
    names = [one.name for chain in chains for one in chain]
    assert len(names) == len(set(names))
    kinds = {one.kind for chain in chains for one in chain}
    assert ("merging" in kinds) == (merges and depth > 1)
    assert ("truncation" in kinds) == bool(given_heads)


def test_of_twelve_blocks_the_blocks_are_those_that_are_documented():
    assert exit_blocks(12) == (2, 3, 6, 8, 10)
    first, *_ = plans_to_try(depth=12, heads=exit_blocks(12))
    assert [one.name for one in first[:2]] == [
        "merge 15 % after block 1",
        "merge 15 % after block 1 and 10 % after block 3",
    ]
    names = [one.name for chain in plans_to_try(depth=12, heads=exit_blocks(12)) for one in chain]
    assert "exits after 3, 6, 8 above 0.9" in names
    assert "merge 50 % after block 1 and what is agreed upon after 2, 3; exits after 6, 8 above 0.9" in names
    assert names[-5:] == [f"cut short after block {block}" for block in (10, 8, 6, 3, 2)]


@dataclass(eq=False)
class Fake:
    """A contender whose label maps differ from the dense ones in a share of the pixels, and that takes some time."""

    name: str
    kind: str
    share: float
    times: float = 1.0
    array: object = np.asarray
    plan: object = None
    ran: list = field(default_factory=list)
    clocked: list = field(default_factory=list)

    def run(self, batch, /):
        self.ran.append(batch)
        maps = np.zeros((len(batch), 10, 10), np.int64)
        maps[:, : round(10 * self.share)] = 1
        work = np.full(len(batch), round(1000 / self.times), np.int64)
        return Ran(maps, self.array(work), self.array(maps))

    def seconds(self, batch, /):
        self.clocked.append(batch)
        return (1 + len(self.clocked)) * 1e-3 / self.times


def run(dense, chains, *, images=8, batch=2, minutes=5.0, **options):
    batches = [list(range(start, start + batch)) for start in range(0, images, batch)]
    return run_contenders(dense, chains, batches, at_most=0.1, clock=Clock.of(minutes), **options)


@each_backend
def test_contenders_are_run_beside_the_dense_network_and_timed(backend):
    options = {"array": backend.array}
    dense, fast = Fake("dense", "dense", 0.0, **options), Fake("fast", "exits", 0.1, 4.0, **options)
    bold = Fake("bold", "exits", 0.4, 5.0, **options)
    never = Fake("never", "exits", 0.5, 6.0, **options)
    found = run(dense, [[fast, bold, never]], rounds=4)
    assert [one.name for one in found.rows] == ["dense", "fast", "bold"]
    assert [one.loss for one in found.rows] == pytest.approx([0.0, 0.1, 0.4])
    assert [one.cost for one in found.rows] == pytest.approx([1.0, 0.25, 0.2])
    assert (found.images, found.untried, never.ran) == (8, (), [])
    times = {one.name: one.times for one in found.rows}
    assert times["dense"] == 1.0
    assert times["fast"] > 3
    assert len(fast.clocked) == 1 + 4
    assert [len(batch) for batch in fast.clocked] == [2] * 5


def test_without_time_one_of_each_chain_is_run_and_the_others_are_named():
    dense = Fake("dense", "dense", 0.0)
    chains = [[Fake(f"{kind} {step}", kind, 0.0, 2.0) for step in range(3)] for kind in ("exits", "truncation")]
    found = run(dense, chains, minutes=1e-9)
    assert [one.name for one in found.rows] == ["dense", "exits 0", "truncation 0"]
    assert found.untried == ("exits 1", "exits 2", "truncation 1", "truncation 2")
    assert found.images == 2
    assert all(one.times > 1 for one in found.rows[1:])


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    def chains():
        return [[Fake(f"exits {step}", "exits", 0.02 * step, 2.0 + step) for step in range(3)]]

    whole = run(Fake("dense", "dense", 0.0), chains())
    first = chains()
    first[0][2].run = lambda batch: (_ for _ in ()).throw(KeyboardInterrupt)
    options = {"file": tmp_path / "measured.json", "identity": {"of": "these"}}
    with pytest.raises(KeyboardInterrupt):
        run(Fake("dense", "dense", 0.0), first, **options)
    again = chains()
    found = run(Fake("dense", "dense", 0.0), again, **options)
    assert [one.ran for one in again[0][:2]] == [[], []]
    assert [(one.name, one.loss, one.cost) for one in found.rows] == [
        (one.name, one.loss, one.cost) for one in whole.rows
    ]
    with pytest.raises(TokenExitError, match="`out` must be a new folder, or of the same model, images and options"):
        run(Fake("dense", "dense", 0.0), chains(), **options | {"identity": {"of": "others"}})
    kept = json.loads(options["file"].read_text())
    options["file"].write_text(json.dumps(kept | {"images": 0}))
    with pytest.raises(TokenExitError, match="`out` must hold a run of 1 to 4 batches, got 0"):
        run(Fake("dense", "dense", 0.0), chains(), **options)
    options["file"].write_text("{}")
    with pytest.raises(TokenExitError, match="`out` must hold measured.json as it was written"):
        run(Fake("dense", "dense", 0.0), chains(), **options)


def test_a_loss_of_ones_own_and_a_quality_are_asked_of_what_was_returned():
    seen = []

    def quality(runs):
        seen.append([number for number, ran in runs if ran.label_maps is not None])
        return 0.5

    found = run(
        Fake("dense", "dense", 0.0),
        [[Fake("other", "exits", 0.3)]],
        loss=lambda out, dense: np.abs(out - dense).mean((1, 2)) / 2,
        quality=quality,
    )
    assert found.rows[1].loss == pytest.approx(0.15)
    assert [one.quality for one in found.rows] == [0.5, 0.5]
    assert seen == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("bad", [2.0, math.nan, -0.1])
def test_a_loss_out_of_range_is_refused(bad):
    with pytest.raises(TokenExitError, match=r"`risk` must give losses in \[0, 1\], and none that is NaN"):
        run(Fake("dense", "dense", 0.0), [], loss=lambda out, dense: np.full(len(out), bad))


@pytest.mark.usefixtures("unchecked")
def test_bad_options_are_refused():
    dense = Fake("dense", "dense", 0.0)
    with pytest.raises(TokenExitError, match="`minutes` must be a number above 0, got 0"):
        Clock.of(0)
    with pytest.raises(TokenExitError, match="`rounds` must be a whole number from 1 up, got 0"):
        run(dense, [], rounds=0)
    with pytest.raises(TokenExitError, match=r"`settings` must have names that no other .* has, got \['dense'\]"):
        run(dense, [[Fake("dense", "exits", 0.0)]])
    with pytest.raises(TokenExitError, match="`images` must be of at least one batch, got none"):
        run(dense, [], images=0)


def test_of_each_kind_those_are_timed_that_could_be_chosen():
    rows = [DENSE, *(row(f"exits {cost}", "exits", loss, cost) for loss, cost in
            [(0.001, 0.9), (0.002, 0.5), (0.005, 0.4), (0.009, 0.6), (0.02, 0.3), (0.03, 0.2)])]  # fmt: skip
    rows += [row(f"cut {cost}", "truncation", loss, cost) for loss, cost in [(0.005, 0.8), (0.008, 0.7), (0.02, 0.5)]]
    assert worth_timing(rows, at_most=0.01) == ("dense", "exits 0.4", "exits 0.5", "exits 0.3", "cut 0.7", "cut 0.5")
    assert worth_timing(rows, at_most=0.02)[1:4] == ("exits 0.3", "exits 0.4", "exits 0.2")
    assert worth_timing([DENSE, row("far", "exits", 0.5, 0.1)], at_most=0.02) == ("dense", "far")
