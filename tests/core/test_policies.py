import contextlib
import dataclasses
import json
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.core import oracles, strategies
from tests.core.backends import BACKENDS, each_backend
from tokenexit import TokenExitError, carries, policies, schedule, scores
from tokenexit.carries import Feature, Translated
from tokenexit.policies import (
    BatchBudget,
    Budget,
    ConfidenceAbove,
    EntropyBelow,
    ErrorBelow,
    Evidence,
    GateBelow,
    MarginAbove,
    NeighboursAgree,
    Patience,
    PerClass,
    Policy,
    always,
    never,
)
from tokenexit.schedule import Exit, Schedule

BY_SCORE = ("confidence", "entropy", "margin", "gate", "error")
COMPARED = {
    "confidence": ConfidenceAbove,
    "entropy": EntropyBelow,
    "margin": MarginAbove,
    "gate": GateBelow,
    "error": partial(ErrorBelow, radius=0),
}


def every(classes):
    """One policy of every kind, and some of several; thresholds per class are for so many classes."""
    own = PerClass((0.9, 0.3, 0.5, 0.0)[:classes])
    return [
        ConfidenceAbove(0.5),
        ConfidenceAbove(own),
        EntropyBelow(0.5),
        EntropyBelow(own),
        MarginAbove(own),
        GateBelow(0.5),
        GateBelow(own),
        NeighboursAgree(own),
        NeighboursAgree(0.3, radius=2).retaining(per_class=1),
        NeighboursAgree(0.5, radius=0),
        ErrorBelow(0.5),
        ErrorBelow(own, radius=2) & NeighboursAgree(0.2),
        ~ErrorBelow(0.3, radius=0),
        Patience(),
        Patience(2) | GateBelow(0.2),
        never(),
        always(),
        ~(ConfidenceAbove(0.6) & EntropyBelow(0.4)),
        ConfidenceAbove(0.4).retaining(per_class=2),
        always().retaining(per_class=1) & ~Patience(),
        ConfidenceAbove(0.3).with_minimum(per_image=2),
        Budget(0.5),
        Budget(3, by="entropy"),
        Budget(0.25, by="margin").retaining(per_class=1),
        (Budget(1, by="gate") | MarginAbove(0.7)).with_minimum(per_image=3),
    ]


def evidence(backend, scene, **changes):
    """What a policy sees of a scene, in the ragged layout."""
    names = ("logits", "gate", "error", "image", "position", "protected", "previous")
    names += ("settled_label", "settled_score", "settled_error")
    given_ = {name: getattr(scene, name) for name in names} | changes
    logits = given_.pop("logits")
    arrays = {name: None if x is None else backend.array(x) for name, x in given_.items()}
    return Evidence(None if logits is None else backend.array(logits), **arrays, images=scene.images, grid=scene.grid)


def static(backend, scene, seed):
    """The same in the static layout: tokens lie anywhere in their image's entries, and the others hold anything.

    Also which entry each token has.
    """
    rng = np.random.default_rng(seed)
    counts = np.bincount(scene.image, minlength=scene.images)
    capacity = int(counts.max(initial=0) + rng.integers(0, 4))
    places = [np.sort(rng.choice(capacity, count, replace=False)) + i * capacity for i, count in enumerate(counts)]
    entry = np.concatenate([*places, np.zeros(0, np.int64)]).astype(np.int64)
    size = scene.images * capacity

    def spread(x, junk):
        junk = np.asarray(junk).astype(x.dtype)
        junk[..., entry] = x
        return junk

    odd = np.array([np.nan, np.inf, -np.inf, 9, 0, 1], np.float32)
    logits = rng.choice(odd, (size, scene.classes))
    logits[entry] = scene.logits
    arrays = {
        "gate": spread(scene.gate, rng.choice(odd, size)),
        "error": spread(scene.error, rng.choice(odd, size)),
        "position": spread(scene.position, rng.integers(-2, 15, size)),
        "protected": spread(scene.protected, rng.random(size) < 0.5),
        "previous": spread(scene.previous, rng.integers(-1, 5, (len(scene.previous), size))),
        "valid": spread(np.ones(len(entry), bool), np.zeros(size)),
        "image": np.repeat(np.arange(scene.images), capacity),
        "settled_label": scene.settled_label,
        "settled_score": scene.settled_score,
        "settled_error": scene.settled_error,
    }
    arrays = {name: backend.array(x) for name, x in arrays.items()}
    return Evidence(backend.array(logits), **arrays, images=scene.images, grid=scene.grid), entry


def on_grid(backend, scene, seed):
    """The same on all places of the grid, and in a row, where what has left has class scores of its own.

    Also which place each token of the row has.
    """
    rng = np.random.default_rng(seed)
    shape = (scene.images, scene.grid[0] * scene.grid[1])
    place = scene.image * shape[1] + scene.position
    size = shape[0] * shape[1]
    settled = scene.settled_label.reshape(size) >= 0
    logits = np.where(settled[:, None], strategies.numbers(rng, (size, scene.classes), True, 3), np.nan)
    logits = logits.astype(np.float32)
    held = backend.array(logits)
    with np.errstate(all="ignore"):
        score = backend.numpy(scores.confidence(held)).reshape(shape)
        label = np.where(settled, backend.held(logits).argmax(axis=-1), -1).reshape(shape)
    row = evidence(backend, scene, settled_label=label, settled_score=np.where(settled.reshape(shape), score, 0))

    def spread(x, junk):
        junk = np.array(np.broadcast_to(junk, (*x.shape[:-1], size)), dtype=x.dtype)
        junk[..., place] = x
        return junk

    logits[place] = scene.logits
    arrays = {
        "gate": spread(scene.gate, rng.random(size)),
        "error": spread(scene.error, scene.settled_error.reshape(size)),
        "protected": spread(scene.protected, False),
        "previous": spread(scene.previous, rng.integers(0, scene.classes, size)),
        "valid": spread(np.ones(len(place), bool), False),
        "image": np.arange(size) // shape[1],
        "position": np.arange(size) % shape[1],
    }
    arrays = {name: backend.array(x) for name, x in arrays.items()}
    options = {"images": scene.images, "grid": scene.grid, "layout": "grid"}
    return Evidence(backend.array(logits), **arrays, **options), row, place


def facts(backend, scene, given_evidence):
    with np.errstate(all="ignore"):
        found = {name: backend.numpy(getattr(given_evidence, name)) for name in ("confidence", "entropy", "margin")}
        label = backend.held(scene.logits).argmax(axis=-1)
    return oracles.Facts(
        images=scene.images,
        grid=scene.grid,
        image=scene.image,
        position=scene.position,
        able=~scene.protected,
        label=label,
        gate=backend.held(scene.gate),
        previous=scene.previous,
        settled_label=scene.settled_label,
        settled_score=backend.held(scene.settled_score),
        error=backend.held(scene.error),
        settled_error=backend.held(scene.settled_error),
        **found,
    )


def decide(backend, policy, given_evidence):
    with np.errstate(all="ignore"):
        return backend.numpy(policy(given_evidence))


def assert_same(got, wanted, policy):
    np.testing.assert_array_equal(got, wanted, err_msg=str(policy))


# What each policy decides.


@each_backend
@strategies.fewer(4)
@given(scene=strategies.scenes())
def test_every_kind_of_policy_decides_as_the_oracle_says(backend, scene):
    given_evidence = evidence(backend, scene)
    known = facts(backend, scene, given_evidence)
    for policy in [*every(scene.classes), BatchBudget(0.5), BatchBudget(4, by="gate")]:
        wanted = oracles.leaves(policies.to_dict(policy), known)
        assert_same(decide(backend, policy, given_evidence), wanted, policy)


@each_backend
@given(scene=strategies.scenes(), data=st.data())
def test_any_policy_of_policies_decides_as_the_oracle_says(backend, scene, data):
    policy = data.draw(strategies.policies(scene.classes))
    given_evidence = evidence(backend, scene)
    wanted = oracles.leaves(policies.to_dict(policy), facts(backend, scene, given_evidence))
    assert_same(decide(backend, policy, given_evidence), wanted, policy)


@each_backend
@pytest.mark.parametrize("name", BY_SCORE)
@strategies.fewer(2)
@given(scene=strategies.scenes(), threshold=strategies.UNIT)
def test_a_threshold_is_strict_and_nan_never_passes(backend, name, scene, threshold):
    given_evidence = evidence(backend, scene, protected=None)
    got = decide(backend, COMPARED[name](threshold), given_evidence)
    with np.errstate(all="ignore"):
        score = (
            backend.held(getattr(scene, name))
            if name in ("gate", "error")
            else backend.numpy(getattr(scores, name)(backend.array(scene.logits)))
        )
    passes = np.less if name in ("entropy", "gate", "error") else np.greater
    np.testing.assert_array_equal(got, passes(score, np.float32(threshold)))
    assert not got[np.isnan(score)].any()


@each_backend
@strategies.fewer(3)
@given(scene=strategies.scenes(), threshold=strategies.UNIT, k=st.integers(0, 4))
def test_class_scores_are_their_own_confidence(backend, scene, threshold, k):
    with np.errstate(all="ignore"):
        table = backend.array(1 / (1 + np.exp(-scene.logits)))
        held = backend.held(1 / (1 + np.exp(-scene.logits)))
        given_evidence = evidence(backend, scene, logits=None, class_scores=None)
        given_evidence = dataclasses.replace(given_evidence, class_scores=table)
        label, confidence = held.argmax(axis=-1), held.max(axis=-1)
        np.testing.assert_array_equal(backend.numpy(given_evidence.label), label)
        np.testing.assert_array_equal(backend.numpy(given_evidence.confidence), confidence)
    known = facts(backend, scene, evidence(backend, scene))
    known = dataclasses.replace(known, label=label, confidence=confidence)
    for policy in (
        ConfidenceAbove(threshold),
        NeighboursAgree(threshold),
        ConfidenceAbove(threshold).retaining(per_class=k),
        always().retaining(per_class=k),
        Budget(k),
    ):
        assert_same(decide(backend, policy, given_evidence), oracles.leaves(policies.to_dict(policy), known), policy)


@each_backend
def test_a_neighbour_is_held_to_the_threshold_of_its_own_class(backend):
    """Three in a line: the first two run, the last has settled with 0.6."""
    rows = np.array([[5, 0], [3, 0]], np.float32)  # confidences 0.993 and 0.953

    def run(policy, label):
        return decide(
            backend,
            policy,
            Evidence(
                backend.array(rows),
                image=backend.array(np.zeros(2, np.int64)),
                images=1,
                grid=(1, 3),
                position=backend.array(np.arange(2)),
                settled_label=backend.array(np.array([[-1, -1, label]])),
                settled_score=backend.array(np.array([[0, 0, 0.6]], np.float32)),
            ),
        ).tolist()

    assert run(NeighboursAgree(PerClass((0.5, 0.9))), 0) == [True, True]
    assert run(NeighboursAgree(PerClass((0.9, 0.5))), 0) == [True, False]
    assert run(NeighboursAgree(PerClass((0.5, 0.5))), 1) == [True, False]
    assert run(NeighboursAgree(PerClass((0.97, 0.0))), 0) == [False, False]
    assert run(NeighboursAgree(PerClass((0.97, 0.0)), radius=0), 0) == [True, False]


@each_backend
def test_what_has_left_holds_no_neighbour_back_and_what_is_unknown_does(backend):
    """Five in a line: the first three run, then one that has left, or not, and one beside it that runs."""

    def run(settled, error, policy=ErrorBelow(0.3)):
        nothing = [math.nan] * 3
        row = Evidence(
            error=backend.array(np.array([0.125, 0.125, 0.25, error], np.float32)),
            images=1,
            grid=(1, 5),
            position=backend.array(np.array([0, 1, 2, 4])),
            settled_error=backend.array(np.array([[*nothing, settled, math.nan]], np.float32)),
        )
        on_grid = Evidence(
            error=backend.array(np.array([0.125, 0.125, 0.25, settled, error], np.float32)),
            valid=backend.array(np.array([True, True, True, False, True])),
            images=1,
            grid=(1, 5),
            position=backend.array(np.arange(5)),
            layout="grid",
        )
        found = decide(backend, policy, row).tolist()
        assert found == decide(backend, policy, on_grid)[[0, 1, 2, 4]].tolist()
        return found

    assert run(0.9, 0.25) == [True] * 4
    assert run(0.9, 0.35) == [True, True, True, False]
    assert run(math.nan, 0.25) == [True, True, False, False]
    assert run(0.9, math.nan) == [True, True, True, False]
    assert run(0.9, 0.25, ErrorBelow(0.25, radius=0)) == [True, True, False, False]
    assert run(0.9, 0.25, always().with_minimum(per_image=2)) == [True, True, False, False]


@each_backend
@pytest.mark.parametrize("by", BY_SCORE)
@strategies.fewer(3)
@given(scene=strategies.scenes(odd=st.just(False)), eighths=st.integers(0, 8))
def test_a_budget_is_kept_and_the_hardest_stay(backend, by, scene, eighths):
    given_evidence = evidence(backend, scene)
    free = ~scene.protected
    patches = scene.grid[0] * scene.grid[1]
    number = (2 * eighths * patches + 8) // 16  # rounded to the nearest, up at a half, of the patches of the grid
    stay = ~decide(backend, Budget(eighths / 8, by=by), given_evidence) & free
    assert_same(stay, ~decide(backend, Budget(number, by=by), given_evidence) & free, by)
    hardness = facts(backend, scene, given_evidence).hardness(by)
    for image in range(scene.images):
        mine = np.flatnonzero(free & (scene.image == image))
        assert stay[mine].sum() == min(number, len(mine))
        for i in mine[stay[mine]]:
            for j in mine[~stay[mine]]:
                assert hardness[i] > hardness[j] or (hardness[i] == hardness[j] and i < j)


@each_backend
def test_a_budget_by_hand(backend):
    rows = np.array([[1, 0], [9, 0], [np.nan, 0], [1, 0], [0.5, 0]], np.float32)

    def stay(policy, grid=(1, 5), **more):
        given_evidence = Evidence(backend.array(rows), grid=grid, **more)
        return np.flatnonzero(~decide(backend, policy, given_evidence)).tolist()

    assert stay(Budget(1)) == [2]  # NaN is the hardest
    assert stay(Budget(2)) == [2, 4]
    assert stay(Budget(3)) == [0, 2, 4]  # of the equal first and fourth, the earlier
    assert stay(Budget(0)) == []
    assert stay(Budget(9)) == [0, 1, 2, 3, 4]
    assert stay(Budget(0.3)) == [2, 4]  # 1.5 of 5
    assert stay(Budget(0.29)) == [2]
    assert stay(Budget(0.3), grid=(2, 5)) == [0, 2, 4]  # of the grid's patches, not of those that still run
    assert stay(Budget(1.0)) == [0, 1, 2, 3, 4]
    assert stay(Budget(1)) != stay(Budget(1.0))  # a number and a fraction
    marks = backend.array(np.array([False, False, True, False, True]))
    assert stay(Budget(1), protected=marks) == [0, 2, 4]  # protected tokens are beside the budget
    invalid = Evidence(backend.array(rows), grid=(1, 5), valid=backend.array(np.array([True, True, False, True, True])))
    assert decide(backend, Budget(1), invalid).tolist() == [True, True, False, True, False]
    for keep in (2, 0.3):
        kind = np.int64 if isinstance(keep, int) else np.float64
        assert stay(Budget(backend.array(np.asarray(keep, kind)))) == stay(Budget(keep))


@each_backend
def test_a_batch_budget_lets_images_trade_so_that_it_alone_depends_on_batch_mates(backend):
    rows = np.array([[9, 0], [8, 0], [0, 0], [1, 0]], np.float32)
    image = np.array([0, 0, 1, 1])

    def run(policy, own):
        count = len(set(image[own].tolist()))
        return decide(
            backend,
            policy,
            Evidence(
                backend.array(rows[own]), image=backend.array(image[own] - image[own][0]), images=count, grid=(1, 2)
            ),
        ).tolist()

    both, first, second = slice(0, 4), slice(0, 2), slice(2, 4)
    assert run(Budget(1), both) == [True, False, False, True]
    assert run(BatchBudget(2), both) == [True, True, False, False]
    assert run(BatchBudget(0.5), both) == [True, True, False, False]
    assert run(BatchBudget(0.5), first) + run(BatchBudget(0.5), second) == [True, False, False, True]


@each_backend
def test_patience_looks_at_the_latest_exits(backend):
    rows = backend.array(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [np.nan, 1, 0]], np.float32))

    def run(exits, previous):
        previous = backend.array(np.array(previous, np.int64).reshape(-1, 4))
        return decide(backend, Patience(exits), Evidence(rows, previous=previous)).tolist()

    assert run(1, []) == [False] * 4
    assert run(1, [[0, 1, 0, 0]]) == [True, True, False, False]  # the last is NaN: nothing is known of it
    assert run(1, [[1, 1, 1, 1], [0, 0, 2, 0]]) == [True, False, True, False]
    assert run(2, [[1, 1, 2, 0], [0, 1, 2, 0]]) == [False, True, True, False]
    assert run(2, [[0, 1, 2, 0]]) == [False] * 4


@each_backend
def test_what_is_unknown_never_leaves_by_negation(backend):
    rows = backend.array(np.array([[9, 0], [0, 0], [np.nan, 0], [1, 1]], np.float32))
    gate = backend.array(np.array([0, 0, 0, np.nan], np.float32))
    assert decide(backend, ~ConfidenceAbove(0.9), Evidence(rows)).tolist() == [False, True, False, True]
    assert decide(backend, ~ConfidenceAbove(0.9), Evidence(rows, gate=gate)).tolist() == [False, True, False, False]
    assert decide(backend, ~GateBelow(0.9), Evidence(gate=gate)).tolist() == [False] * 4
    assert decide(backend, ~never(), Evidence(rows)).tolist() == [True, True, False, True]


@each_backend
def test_a_minimum_keeps_the_least_confident_leavers_and_only_as_many_as_are_short(backend):
    rows = backend.array(np.array([[9, 0], [8, 0], [7, 0], [0, 0]], np.float32))
    for minimum, wanted in ((0, [0, 1, 2]), (1, [0, 1, 2]), (2, [0, 1]), (3, [0]), (4, []), (9, [])):
        policy = ConfidenceAbove(0.9).with_minimum(per_image=minimum)
        assert np.flatnonzero(decide(backend, policy, Evidence(rows))).tolist() == wanted
    protected = backend.array(np.array([False, False, False, True]))
    policy = ConfidenceAbove(0.9).with_minimum(per_image=1)  # protected tokens do not count
    assert decide(backend, policy, Evidence(rows, protected=protected)).tolist() == [True, True, False, False]
    gate = backend.array(np.array([0.2, 0.1, 0.3, 0.9], np.float32))
    policy = GateBelow(0.5).with_minimum(per_image=2)  # without class scores, by the gate
    assert decide(backend, policy, Evidence(gate=gate)).tolist() == [True, True, False, False]


@each_backend
def test_a_minimum_that_is_met_keeps_no_more_even_where_nothing_is_known(backend):
    rows = backend.array(np.array([[np.nan, 0], [0, 0]], np.float32))
    gate = backend.array(np.array([0.1, 0.9], np.float32))
    given_evidence = Evidence(rows, gate=gate, grid=(1, 2))
    for minimum, wanted in ((0, [True, False]), (1, [True, False]), (2, [False, False])):
        policy = Budget(1, by="gate").with_minimum(per_image=minimum)
        assert decide(backend, policy, given_evidence).tolist() == wanted


@each_backend
def test_a_gate_in_half_precision_is_compared_as_the_number_that_it_is(backend):
    """The threshold is not rounded to the gate's precision: 0.2314 in bfloat16 is less than 0.2316, which rounds to it."""
    gate = np.array([0.2319, 0.3], np.float32)
    for threshold in (0.23158, 0.3, 0.30003):
        got = decide(backend, GateBelow(threshold), Evidence(gate=backend.array(gate)))
        np.testing.assert_array_equal(got, backend.held(gate) < np.float32(threshold))


# What holds for all of them.


@each_backend
@strategies.fewer(6)
@given(scene=strategies.scenes(), seed=st.integers(0, 2**20))
def test_the_static_layout_decides_the_same_whatever_the_entries_without_a_token_hold(backend, scene, seed):
    ragged = evidence(backend, scene)
    padded, entry = static(backend, scene, seed)
    for policy in [*every(scene.classes), BatchBudget(0.5)]:
        got = decide(backend, policy, padded)
        assert_same(got[entry], decide(backend, policy, ragged), policy)
        assert not np.delete(got, entry).any(), policy


@each_backend
@strategies.fewer(6)
@given(scene=strategies.scenes(), seed=st.integers(0, 2**20))
def test_all_places_of_the_grid_decide_the_same_as_a_row_of_those_that_run(backend, scene, seed):
    grid, row, place = on_grid(backend, scene, seed)
    for policy in [*every(scene.classes), BatchBudget(0.5)]:
        got = decide(backend, policy, grid)
        assert_same(got[place], decide(backend, policy, row), policy)
        assert not np.delete(got, place).any(), policy


@each_backend
@strategies.fewer(6)
@given(scene=strategies.scenes())
def test_an_image_is_decided_alone_as_in_its_batch(backend, scene):
    together = evidence(backend, scene)
    alone = [evidence(backend, scene.alone(image)) for image in range(scene.images)]
    for policy in every(scene.classes):
        one_by_one = np.concatenate([decide(backend, policy, one) for one in alone])
        assert_same(one_by_one, decide(backend, policy, together), policy)


@each_backend
@pytest.mark.parametrize("kind", [*COMPARED.values(), ErrorBelow, NeighboursAgree])
@strategies.fewer(3)
@given(scene=strategies.scenes(), data=st.data())
def test_a_stricter_threshold_lets_no_more_tokens_go(backend, kind, scene, data):
    pairs = [sorted(data.draw(st.tuples(strategies.UNIT, strategies.UNIT))) for _ in range(scene.classes)]
    low, high = (PerClass(tuple(pair[end] for pair in pairs)) for end in (0, 1))
    given_evidence = evidence(backend, scene)
    for less, more in ((low, high), (pairs[0][0], pairs[0][1])):
        strict, lax = (less, more) if kind(0.5).direction == "below" else (more, less)
        few = decide(backend, kind(strict), given_evidence)
        assert not (few & ~decide(backend, kind(lax), given_evidence)).any()


@each_backend
@strategies.fewer(4)
@given(scene=strategies.scenes(odd=st.just(False)), data=st.data())
def test_policies_compose_as_sets_do(backend, scene, data):
    given_evidence = evidence(backend, scene)
    per_class = st.builds(PerClass, st.tuples(*[strategies.UNIT] * scene.classes))
    a, b, c = (data.draw(strategies.one_by_one(strategies.UNIT | per_class)) for _ in range(3))

    def same(one, other):
        assert_same(decide(backend, one, given_evidence), decide(backend, other, given_evidence), (one, other))

    same(a & b, b & a)
    same(a | b, b | a)
    same(a & (b & c), (a & b) & c)
    same(a | (b | c), (a | b) | c)
    same(a & (b | c), (a & b) | (a & c))
    same(a & a, a)
    same(a | a, a)
    same(a & (a | b), a)
    same(a & never(), never())
    same(a | never(), a)
    same(a & always(), a)
    same(a | always(), always())
    same(~~a, a)
    same(~(a & b), ~a | ~b)
    same(~(a | b), ~a & ~b)
    same(a & ~a, never())
    same(a | ~a, always())


@each_backend
@strategies.fewer(3)
@given(scene=strategies.scenes(), k=st.integers(0, 6))
def test_retention_and_minimum_only_take_back(backend, scene, k):
    given_evidence = evidence(backend, scene)
    for policy in (ConfidenceAbove(0.3), always(), Budget(2)):
        before = decide(backend, policy, given_evidence)
        for after in (policy.retaining(per_class=k), policy.with_minimum(per_image=k)):
            left = decide(backend, after, given_evidence)
            assert not (left & ~before).any()
        free = ~scene.protected
        for image in range(scene.images):
            mine = free & (scene.image == image)
            assert (mine & ~left).sum() >= min(k, mine.sum())
    assert_same(decide(backend, always().retaining(per_class=0), given_evidence), ~scene.protected, "always")


@each_backend
def test_no_tokens_and_no_images_are_decided_too(backend):
    empty = np.zeros(0, np.int64)
    for images in (0, 2):
        given_evidence = Evidence(
            backend.array(np.zeros((0, 3), np.float32)),
            gate=backend.array(np.zeros(0, np.float32)),
            error=backend.array(np.zeros(0, np.float32)),
            image=backend.array(empty),
            images=images,
            grid=(2, 3),
            position=backend.array(empty),
            previous=backend.array(np.zeros((1, 0), np.int64)),
        )
        for policy in [*every(3), BatchBudget(0.5)]:
            assert decide(backend, policy, given_evidence).shape == (0,)


# Thresholds are data.


@each_backend
@strategies.fewer(5)
@given(scene=strategies.scenes(), threshold=strategies.UNIT)
def test_an_array_as_a_threshold_is_as_good_as_a_number(backend, scene, threshold):
    given_evidence = evidence(backend, scene)
    value = np.asarray(threshold, np.float32)
    table = np.linspace(threshold, 1, scene.classes, dtype=np.float32)
    for kind in [*COMPARED.values(), ErrorBelow, NeighboursAgree]:
        for number, array in (
            (float(backend.held(value)), backend.array(value)),
            (PerClass(tuple(backend.held(table).tolist())), PerClass(backend.array(table))),
        ):
            plain, other = kind(number), kind(array)
            assert_same(decide(backend, other, given_evidence), decide(backend, plain, given_evidence), plain)
            assert policies.from_dict(json.loads(json.dumps(policies.to_dict(other)))) == plain


def test_thresholds_are_exchanged_everywhere():
    policy = (NeighboursAgree(0.9, radius=2) & ~ConfidenceAbove(0.8)).retaining(per_class=5).with_minimum(per_image=2)
    other = (NeighboursAgree(0.5, radius=2) & ~ConfidenceAbove(0.5)).retaining(per_class=5).with_minimum(per_image=2)
    assert policy.with_threshold(0.5) == other
    own = PerClass((0.5, 0.7))
    assert ConfidenceAbove(0.5).with_threshold(own) == ConfidenceAbove(own)
    assert ConfidenceAbove(own).with_threshold(0.5) == ConfidenceAbove(0.5)
    assert (ConfidenceAbove(0.5) & Budget(3)).with_threshold(0.7) == ConfidenceAbove(0.7) & Budget(3)
    for bad in (ConfidenceAbove(0.5) & MarginAbove(0.5), ConfidenceAbove(0.5) | GateBelow(0.5)):
        with pytest.raises(TokenExitError, match=r"one kind of score, got \['confidence', '(margin|gate)'\]"):
            bad.with_threshold(0.4)
    for bad in (never(), Patience(), Budget(2), always().retaining(per_class=1)):
        with pytest.raises(TokenExitError, match=r"one kind of score, got \[\]"):
            bad.with_threshold(0.4)


def test_nothing_of_an_earlier_threshold_is_remembered():
    given_evidence = Evidence(np.array([[2, 0], [9, 0]], np.float32))
    policy = ConfidenceAbove(0.95)
    assert policy(given_evidence).tolist() == [False, True]
    assert policy.with_threshold(0.5)(given_evidence).tolist() == [True, True]
    assert policy.with_threshold(PerClass((1.0, 0.0)))(given_evidence).tolist() == [False, False]
    live = np.asarray(0.95, np.float32)
    policy = ConfidenceAbove(live).retaining(per_class=0)
    assert policy(given_evidence).tolist() == [False, True]
    live[...] = 0.5
    assert policy(given_evidence).tolist() == [True, True]
    table = np.full(2, 0.95, np.float32)
    policy = ~ConfidenceAbove(PerClass(table))
    assert policy(given_evidence).tolist() == [True, False]
    table[0] = 1
    assert policy(given_evidence).tolist() == [True, True]


@each_backend
@given(drawn=st.data())
def test_per_class_gives_every_label_its_threshold(backend, drawn):
    table = np.array(drawn.draw(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=5)), np.float32)
    shape = drawn.draw(st.sampled_from([(0,), (7,), (2, 3), (0, 4)]))
    label = np.random.default_rng(drawn.draw(st.integers(0, 99))).integers(-1, len(table), shape)
    for given_ in (tuple(table.tolist()), backend.array(table)):
        got = backend.numpy(PerClass(given_).of(backend.array(label), classes=len(table)))
        wanted = table if isinstance(given_, tuple) else backend.held(table)
        np.testing.assert_array_equal(got, wanted[np.maximum(label, 0)])
        with pytest.raises(TokenExitError, match=r"`thresholds` must be one for each of the 9 classes, got \d"):
            PerClass(given_).of(backend.array(label), classes=9)


# Written down, and read again.


@given(policy=strategies.policies())
def test_a_policy_survives_json(policy):
    again = policies.from_dict(json.loads(json.dumps(policies.to_dict(policy))))
    assert again == policy
    assert json.dumps(policies.to_dict(again)) == json.dumps(policies.to_dict(policy))


def test_a_number_of_tokens_does_not_become_a_fraction():
    for keep in (1, 1.0, 0, 0.0):
        again = policies.from_dict(json.loads(json.dumps(policies.to_dict(Budget(keep)))))
        assert isinstance(again, Budget)
        assert type(again.keep) is type(keep)
    for backend in BACKENDS:
        whole, part = (backend.array(np.asarray(keep)) for keep in (np.int64(1), np.float64(1)))
        assert policies.to_dict(Budget(whole)) == {"kind": "Budget", "keep": 1, "by": "confidence"}
        assert type(policies.to_dict(Budget(whole))["keep"]) is int
        assert type(policies.to_dict(BatchBudget(part, by="gate"))["keep"]) is float


@given(policy=strategies.policies())
def test_a_policy_prints_as_it_is_written_and_plans_around_it_too(policy):
    assert eval(repr(policy), vars(policies)) == policy
    plan = Schedule((Exit(2, policy),), Feature("last block", 0.1), cell=3)
    assert eval(repr(plan), vars(policies) | vars(schedule) | vars(carries)) == plan


@pytest.mark.parametrize(("policy", "text"), [
    (ConfidenceAbove(0.95).retaining(per_class=5), "ConfidenceAbove(0.95).retaining(per_class=5)"),
    (ConfidenceAbove(np.float64(0.5)) & MarginAbove(1.0), "ConfidenceAbove(0.5) & MarginAbove(1.0)"),
    (never() | always() & Patience(), "never() | always() & Patience(1)"),
    ((never() | always()) & Patience(2), "(never() | always()) & Patience(2)"),
    (never() & (always() & never()), "never() & (always() & never())"),
    (~(never() | always()), "~(never() | always())"),
    (~~never(), "~~never()"),
    ((~never()).with_minimum(per_image=2), "(~never()).with_minimum(per_image=2)"),
    (NeighboursAgree(PerClass((0.5, 1.0)), radius=2), "NeighboursAgree(PerClass((0.5, 1.0)), radius=2)"),
    (NeighboursAgree(0.9, radius=1), "NeighboursAgree(0.9)"),
    (BatchBudget(0.5, by="entropy") | Budget(3), "BatchBudget(0.5, by='entropy') | Budget(3)"),
    (GateBelow(np.array(0.5)), "GateBelow(array(0.5))"),
])  # fmt: skip
def test_a_policy_is_printed_without_what_goes_without_saying(policy, text):
    assert repr(policy) == str(policy) == text


def test_an_array_out_of_range_is_not_written_down():
    for threshold in (np.asarray(1.5), PerClass(np.array([0.5, -0.1])), np.asarray(np.nan)):
        with pytest.raises(TokenExitError, match=r"`thresholds?` must be .*in \[0, 1\]"):
            policies.to_dict(always() & ConfidenceAbove(threshold))
    with pytest.raises(TokenExitError, match=r"`keep` must be a float in \[0, 1\] or a whole number, got -1"):
        policies.to_dict(Budget(np.asarray(-1)))


def above(threshold):
    return {"kind": "ConfidenceAbove", "threshold": threshold}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "os.system"}, "`kind` must be one of ConfidenceAbove, .*got 'os.system'"),
        ({"kind": "_Never"}, "`kind` must be one of .*got '_Never'"),
        ({"kind": ["never"]}, r"`kind` must be one of .*got \['never'\]"),
        ({"kind": None}, "`kind` must be one of .*got None"),
        ({}, "`kind` must be one of .*got None"),
        ([1], r"`policy` must be a mapping, got \[1\]"),
        (None, "`policy` must be a mapping, got None"),
        ("never", "`policy` must be a mapping, got 'never'"),
        ({"kind": "never", "more": 1}, r"`policy` must have the fields \[\] .*\['more'\]"),
        ({"kind": "never", 1: 1}, r"`policy` must have the fields \[\] .*\['1'\]"),
        ({"kind": "ConfidenceAbove"}, r"`policy` must have the fields \['threshold'\] .*got \[\]"),
        (above("0.5"), "`threshold` must be a number, got '0.5'"),
        (above(True), "`threshold` must be a number, got True"),
        (above(None), "`threshold` must be a number, got None"),
        (above([0.5]), r"`threshold` must be a number, got \[0.5\]"),
        (above(float("nan")), r"`threshold` must be in \[0, 1\], got nan"),
        (above(float("inf")), r"`threshold` must be in \[0, 1\], got inf"),
        (above(10**400), r"`threshold` must be in \[0, 1\], got 1000"),
        (above({"kind": "always"}), "`threshold` must be a number or PerClass, got always()"),
        (above(above(0.5)), "`threshold` must be a number or PerClass, got ConfidenceAbove"),
        (above({"kind": "no"}), "`kind` must be one of .*got 'no'"),
        (above({"kind": "PerClass", "thresholds": 0.5}), "`thresholds` must be a list of numbers, got 0.5"),
        (above({"kind": "PerClass", "thresholds": []}), r"`thresholds` must be a tuple of numbers .*got \(\)"),
        (above({"kind": "PerClass", "thresholds": [True]}), r"`thresholds` must be .*got \(True,\)"),
        (above({"kind": "PerClass", "thresholds": ["1"]}), r"`thresholds` must be .*got \('1',\)"),
        (above({"kind": "PerClass", "thresholds": [[0.5]]}), r"`thresholds` must be .*got \(\[0.5\],\)"),
        (above({"kind": "PerClass", "thresholds": [2]}), r"`thresholds` must be .*got \(2,\)"),
        ({"kind": "PerClass", "thresholds": [0.5]}, "`policy` must be a policy, got PerClass"),
        (
            {"kind": "both", "left": {"kind": "PerClass", "thresholds": [0.5]}, "right": {"kind": "never"}},
            "`policy` must be a policy, got PerClass",
        ),
        ({"kind": "not", "policy": 0.5}, "`policy` must be a mapping, got 0.5"),
        ({"kind": "not", "policy": {"kind": "Budget", "keep": 1, "by": "gate"}}, "`policy` must neither take tokens"),
        ({"kind": "Budget", "keep": 1.5, "by": "gate"}, r"`keep` must be a float in \[0, 1\] or a whole .*got 1.5"),
        ({"kind": "Budget", "keep": -1, "by": "gate"}, r"`keep` must be a float in \[0, 1\] or a whole .*got -1"),
        ({"kind": "Budget", "keep": True, "by": "gate"}, "`keep` must be a number, got True"),
        ({"kind": "Budget", "keep": 1, "by": "luck"}, "`by` must be one of confidence, .*got 'luck'"),
        ({"kind": "BatchBudget", "keep": 1, "by": ["gate"]}, r"`by` must be one of confidence, .*got \['gate'\]"),
        ({"kind": "Patience", "exits": 0}, "`exits` must be a whole number from 1 to 2147483647, got 0"),
        ({"kind": "Patience", "exits": 1.0}, "`exits` must be a whole number from 1 to 2147483647, got 1.0"),
        ({"kind": "Patience", "exits": True}, "`exits` must be a number, got True"),
        ({"kind": "NeighboursAgree", "threshold": 0.5, "radius": 1.5}, "`radius` must be a whole number"),
        ({"kind": "retaining", "policy": {"kind": "never"}, "per_class": -1}, "`per_class` must be a whole number"),
        ({"kind": "minimum", "policy": {"kind": "never"}, "per_image": "1"}, "`per_image` must be a number, got '1'"),
        ({"kind": "minimum", "policy": {"kind": "never"}, "per_image": 0.5}, "`per_image` must be a whole number"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_hostile_data_is_refused(data, message):
    with pytest.raises(TokenExitError, match=message):
        policies.from_dict(data)


@pytest.mark.usefixtures("unchecked")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(policy=strategies.policies(), data=st.data())
def test_damaged_data_is_refused_by_the_librarys_own_error_or_read_as_a_policy(policy, data):
    damaged = policies.to_dict(policy)
    inside = damaged
    while data.draw(st.booleans()) and any(isinstance(value, dict) for value in inside.values()):
        inside = inside[data.draw(st.sampled_from([key for key, value in inside.items() if isinstance(value, dict)]))]
    inside[data.draw(st.sampled_from(sorted(inside)))] = data.draw(strategies.PLAIN)
    with contextlib.suppress(TokenExitError):
        assert isinstance(policies.from_dict(damaged), Policy)


def test_a_policy_of_ones_own_is_taken_to_read_classes_unless_it_says_what_it_reads():
    @dataclass(frozen=True)
    class Own(Policy):
        def leaves(self, evidence):
            return evidence.label == 0

    @dataclass(frozen=True)
    class Errors(Policy):
        reads = frozenset({"error"})

        def leaves(self, evidence):
            return evidence.error < 0.1

    class Quiet(policies.ThresholdPolicy):
        score = "quiet"

        def value(self, evidence):
            return evidence.confidence

    for policy in (Own(), Quiet(0.5), ConfidenceAbove(0.5), policies.Patience(exits=2), policies.Budget(4)):
        assert policy.asks_classes
    for policy in (
        GateBelow(0.5),
        policies.ErrorBelow(0.5),
        policies.Budget(4, by="gate"),
        policies.Budget(4, by="error"),
    ):
        assert not policy.asks_classes
    assert not Own().needs
    assert (Own() | never()).asks_classes
    assert not Errors().asks_classes
    assert Errors().needs == {"error"}
    assert not (never() | always()).needs
    plan = Schedule((Exit(2, Own()),), Translated())
    given = {"depth": 6, "after": (2,), "gives_masks": False, "translates": (2,), "classes": 0}
    with pytest.raises(TokenExitError, match="`schedule` must"):
        schedule.require_fits(plan, **given)
    schedule.require_fits(Schedule((Exit(2, Errors()),), Translated()), **given)


def test_a_policy_of_ones_own_must_give_a_mask_and_is_told_what_it_lacks():
    class Scores(Policy):
        def leaves(self, evidence):
            return evidence.confidence

    class Late(Policy):
        def leaves(self, evidence):
            return (evidence.confidence > 0.5) & (evidence.exit > 0)

    rows = np.array([[9, 0], [0, 9]], np.float32)
    with pytest.raises(TokenExitError, match=r"`Scores.leaves` must give booleans, .*, got .*float32"):
        Scores()(Evidence(rows))
    with pytest.raises(TokenExitError, match=r"as `policies.Evidence\(logits, exit=0\)`, got none of exit: "):
        Late()(Evidence(rows))


def test_a_policy_of_ones_own_takes_part():
    @dataclass(frozen=True)
    class CertainSky(Policy):
        threshold: float

        def leaves(self, evidence):
            return (evidence.label == 0) & (evidence.confidence > self.threshold)

    rows = np.array([[9, 0], [0, 9], [1, 0]], np.float32)
    np.testing.assert_array_equal(CertainSky(0.9)(Evidence(rows)), [True, False, False])
    np.testing.assert_array_equal((CertainSky(0.9) | always())(Evidence(rows)), [True, True, True])
    np.testing.assert_array_equal((~CertainSky(0.9))(Evidence(rows)), [False, True, True])
    protected = np.array([True, False, False])
    np.testing.assert_array_equal(CertainSky(0.9)(Evidence(rows, protected=protected)), [False, False, False])
    assert CertainSky(0.9).retaining(per_class=1).with_threshold(0.5) == CertainSky(0.5).retaining(per_class=1)
    with pytest.raises(TokenExitError, match="`policy` must be one of ConfidenceAbove, .* to be written down"):
        policies.to_dict(CertainSky(0.9))
    for mistaken in (lambda: CertainSky(0.9) and always(), lambda: CertainSky(0.9) or always(), lambda: not never()):
        with pytest.raises(TokenExitError, match="must be composed by `&`, `|` and `~`, not by `and`, `or` and `not`"):
            mistaken()
    with pytest.raises(TypeError):
        CertainSky(0.9) & 0.5
    with pytest.raises(TypeError):
        CertainSky(0.9) | None


# Bad input.


def zeros(*shape, kind=np.float32):
    return np.zeros(shape, kind)


SETTLED = {"settled_label": zeros(1, 3, kind=np.int64), "settled_score": zeros(1, 3)}
ROW = Evidence(zeros(2, 3))
GATE = Evidence(gate=zeros(2))
TOLD = Evidence(error=zeros(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConfidenceAbove(1.5), r"`threshold` must be in \[0, 1\], got 1.5"),
        (lambda: EntropyBelow(float("nan")), r"`threshold` must be in \[0, 1\], got nan"),
        (lambda: MarginAbove(True), r"`threshold` must be a number in \[0, 1\], an array .* or PerClass, got True"),
        (lambda: ConfidenceAbove(None), r"an array without axes or PerClass, got None"),
        (lambda: ConfidenceAbove(always()), r"an array without axes or PerClass, got always\(\)"),
        (lambda: ConfidenceAbove(np.array([0.5])), r"an array without axes or PerClass, got an array of shape \(1,\)"),
        (lambda: PerClass(()), r"`thresholds` must be a tuple of numbers in \[0, 1\], or an array .*got \(\)"),
        (lambda: PerClass([0.5]), r"`thresholds` must be a tuple of numbers .*got \[0.5\]"),
        (lambda: PerClass((0.5, 1.5)), r"`thresholds` must be a tuple .*got \(0.5, 1.5\)"),
        (lambda: PerClass((0.5, True)), r"`thresholds` must be a tuple .*got \(0.5, True\)"),
        (lambda: PerClass((0.5, float("nan"))), r"`thresholds` must be a tuple .*got \(0.5, nan\)"),
        (lambda: PerClass(np.zeros((1, 1))), r"`thresholds` must be .* with one axis, got an array of shape \(1, 1\)"),
        (lambda: PerClass(np.zeros(0)), r"`thresholds` must be .* with one axis, got an array of shape \(0,\)"),
        (lambda: ConfidenceAbove(PerClass((0.5,)))(ROW), "`thresholds` must be one for each of the 3 classes, got 1"),
        (lambda: GateBelow(PerClass((0.5,)))(GATE), "`evidence` must have logits or class_scores for this policy"),
        (lambda: NeighboursAgree(0.5, radius=True), "`radius` must be a whole number from 0 to 2147483647, got True"),
        (lambda: NeighboursAgree(0.5, radius=-1), "`radius` must be a whole number from 0 to 2147483647, got -1"),
        (lambda: NeighboursAgree(0.5, radius=1.5), "`radius` must be a whole number from 0 to 2147483647, got 1.5"),
        (lambda: always().retaining(per_class=-2), "`per_class` must be a whole number from 0 to 2147483647, got -2"),
        (
            lambda: always().with_minimum(per_image=-2),
            "`per_image` must be a whole number from 0 to 2147483647, got -2",
        ),
        (
            lambda: always().with_minimum(per_image=0.5),
            "`per_image` must be a whole number from 0 to 2147483647, got 0.5",
        ),
        (lambda: Patience(0), "`exits` must be a whole number from 1 to 2147483647, got 0"),
        (lambda: Patience(True), "`exits` must be a whole number from 1 to 2147483647, got True"),
        (lambda: Budget(True), r"`keep` must be a float in \[0, 1\] or a whole number, got True"),
        (lambda: Budget(-1), r"`keep` must be a float in \[0, 1\] or a whole number, got -1"),
        (lambda: Budget(1.5), r"`keep` must be a float in \[0, 1\] or a whole number, got 1.5"),
        (lambda: Budget(float("nan")), r"`keep` must be a float in \[0, 1\] or a whole number, got nan"),
        (lambda: Budget(PerClass((0.5,))), r"`keep` must be a float in \[0, 1\] or a whole number, got PerClass"),
        (
            lambda: Budget(np.array([2])),
            r"`keep` must be a number or an array without axes, got an array of shape \(1,\)",
        ),
        (
            lambda: BatchBudget(2, by="label"),
            "`by` must be one of confidence, entropy, margin, gate, error, got 'label'",
        ),
        (lambda: ~Budget(2), "`policy` must neither take tokens back nor keep to a budget for `~`, got Budget"),
        (lambda: ~BatchBudget(2), "`policy` must neither take tokens back nor keep to a budget for `~`, got Batch"),
        (
            lambda: ~always().retaining(per_class=1),
            r"`policy` must neither take tokens back .*got always\(\).retaining",
        ),
        (lambda: ~(never() | always().with_minimum(per_image=1)), "`policy` must neither take tokens back"),
        (
            lambda: ConfidenceAbove(0.5)(GATE),
            "`evidence` must have logits or class_scores for this policy, got gate alone",
        ),
        (lambda: MarginAbove(0.5)(GATE), "`evidence` must have logits for the margin, got none"),
        (lambda: EntropyBelow(0.5)(Evidence(class_scores=zeros(2, 3))), "must have logits for the entropy, got none"),
        (lambda: GateBelow(0.5)(ROW), "`evidence` must have gate for a policy that looks at it, got none"),
        (lambda: Budget(1, by="gate")(Evidence(zeros(2, 3), grid=(1, 2))), "`evidence` must have gate"),
        (lambda: Budget(1)(ROW), "`evidence` must have grid for Budget, got none"),
        (lambda: BatchBudget(1)(ROW), "`evidence` must have images for BatchBudget, got none"),
        (lambda: Patience()(ROW), "`evidence` must have previous for Patience, got none"),
        (lambda: NeighboursAgree(0.5)(ROW), "`evidence` must have images, grid and position for NeighboursAgree"),
        (lambda: ErrorBelow(0.5)(ROW), "`evidence` must have error for a policy that looks at it, got none"),
        (lambda: ErrorBelow(0.5)(TOLD), "`evidence` must have images, grid and position for ErrorBelow"),
        (
            lambda: ConfidenceAbove(0.5)(TOLD),
            "`evidence` must have logits or class_scores for this policy, got error alone",
        ),
        (lambda: ErrorBelow(1.5), r"`threshold` must be in \[0, 1\], got 1.5"),
        (lambda: Evidence(), "`logits` must be given, or `class_scores`, `gate` or `error`, got nothing"),
        (lambda: Evidence(zeros(2, 3), class_scores=zeros(2, 3)), "`class_scores` must be given instead of `logits`"),
        (lambda: Evidence(zeros(3)), r"`logits` must have shape \(tokens, classes\).*got shape \(3,\)"),
        (lambda: Evidence(zeros(3, 0)), r"`logits` must .*at least two classes .*, got shape \(3, 0\)"),
        (lambda: Evidence(zeros(3, 1)), r"`logits` must .*two classes \(the softmax of one .*, got shape \(3, 1\)"),
        (lambda: Evidence(class_scores=zeros(3, 0)), r"`class_scores` must .*at least one class, got shape \(3, 0\)"),
        (lambda: Evidence(class_scores=zeros(3)), r"`class_scores` must have shape .*got shape \(3,\)"),
        (
            lambda: Evidence(zeros(3, 2), gate=zeros(2)),
            r"`gate` must have one entry for each of the 3 tokens, got shape \(2,\)",
        ),
        (
            lambda: Evidence(zeros(3, 2), image=zeros(2, kind=np.int64), images=1),
            r"`image` must have one entry for each of the 3 tokens, got shape \(2,\)",
        ),
        (
            lambda: Evidence(zeros(3, 2), valid=zeros(3, 1, kind=bool)),
            r"`valid` must have one entry for each of the 3 tokens, got shape \(3, 1\)",
        ),
        (
            lambda: Evidence(zeros(3, 2), valid=zeros(3, kind=bool), images=2),
            "`valid` must have as many entries for each of 2 images, got 3 entries",
        ),
        (lambda: Evidence(zeros(3, 2), image=zeros(3, kind=np.int64)), "`images` must be given with `image`, got None"),
        (
            lambda: Evidence(zeros(3, 2), previous=zeros(3, kind=np.int64)),
            r"`previous` must have shape \(exits, tokens\) for 3 tokens, got shape \(3,\)",
        ),
        (
            lambda: Evidence(zeros(3, 2), images=1, grid=(1, 3), settled_label=SETTLED["settled_label"]),
            "`settled_score` must be given exactly if `settled_label` is",
        ),
        (
            lambda: Evidence(zeros(3, 2), images=1, grid=(1, 2), **SETTLED),
            r"`settled_label` must have shape \(images, positions\) for images=1 and grid=\(1, 2\), got shape \(1, 3\)",
        ),
        (lambda: Evidence(zeros(3, 2), images=1, **SETTLED), "`settled_label` must have shape .* and grid=None"),
        (lambda: Evidence(zeros(3, 2), layout="rows"), "`layout` must be `row` or `grid`, got 'rows'"),
        (
            lambda: Evidence(zeros(3, 2), images=1, grid=(1, 2), layout="grid"),
            r"`layout` must be `row` for 3 entries, images=1 and grid=\(1, 2\), got `grid`",
        ),
        (
            lambda: Evidence(zeros(3, 2), images=1, grid=(1, 3), layout="grid", **SETTLED),
            "`settled_label` must be left out in the layout `grid`, got some",
        ),
        (lambda: ROW.hardness("gate"), "`evidence` must have gate"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named(make, message):
    with pytest.raises(TokenExitError, match=message):
        make()


@pytest.mark.parametrize(
    "fail",
    [
        lambda array: Evidence(array(zeros(3))),
        lambda array: Evidence(array(zeros(3, 0))),
        lambda array: Evidence(array(zeros(3, 2)), class_scores=array(zeros(3, 2))),
        lambda array: Evidence(array(zeros(3, 2)), gate=array(zeros(2))),
        lambda array: Evidence(array(zeros(3, 2)), protected=array(zeros(3, 1, kind=bool))),
        lambda array: Evidence(array(zeros(3, 2)), image=array(zeros(3, kind=np.int64))),
        lambda array: Evidence(array(zeros(3, 2)), valid=array(zeros(3, kind=bool)), images=2),
        lambda array: Evidence(array(zeros(3, 2)), previous=array(zeros(2, 2, kind=np.int64))),
        lambda array: Evidence(array(zeros(3, 2)), images=1, grid=(1, 2), **{k: array(x) for k, x in SETTLED.items()}),
        lambda array: ConfidenceAbove(0.5)(Evidence(gate=array(zeros(3)))),
        lambda array: EntropyBelow(0.5)(Evidence(class_scores=array(zeros(3, 2)))),
        lambda array: ConfidenceAbove(PerClass((0.5,)))(Evidence(array(zeros(3, 2)))),
        lambda array: ConfidenceAbove(PerClass(array(zeros(1))))(Evidence(array(zeros(3, 2)))),
        lambda array: Budget(1)(Evidence(array(zeros(3, 2)))),
        lambda array: Patience()(Evidence(array(zeros(3, 2)))),
        lambda array: NeighboursAgree(0.5)(Evidence(array(zeros(3, 2)))),
        lambda array: policies.to_dict(ConfidenceAbove(array(np.asarray(1.5, np.float32)))),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_every_library_fails_with_the_same_words(fail):
    said = set()
    for backend in BACKENDS:
        with pytest.raises(TokenExitError) as caught:
            fail(backend.array)
        said.add(str(caught.value))
    assert len(said) == 1


@pytest.mark.usefixtures("unchecked")
def test_scores_in_place_of_evidence_are_named_by_every_policy():
    message = r"`evidence` must be policies.Evidence, as `policies.Evidence\(logits\)`, got an array of shape \(4, 3\)"
    for policy in every(3):
        with pytest.raises(TokenExitError, match=message):
            policy(np.zeros((4, 3), np.float32))


@dataclass(frozen=True)
class Asking(Policy):
    """Looks at a field that evidence outside of a model does not have."""

    field: str

    def leaves(self, evidence):
        if self.field == "previous":
            return evidence.previous[0] == evidence.label
        return (evidence.label >= 0) & (getattr(evidence, self.field) >= 2)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("field", ["exit", "previous"])
def test_a_policy_of_ones_own_is_told_what_the_evidence_lacks(field):
    message = (
        (
            "`evidence` must have all that Asking looks at: give it by name, as `policies.Evidence(logits, exit=0)`, got "
            f"none of .*{field}.*: .*NoneType"
        )
        .replace("(", r"\(")
        .replace(")", r"\)")
    )
    for policy in (Asking(field), Asking(field).retaining(per_class=1)):
        with pytest.raises(TokenExitError, match=message) as caught:
            policy(Evidence(np.zeros((4, 3), np.float32)))
        assert isinstance(caught.value.__cause__, TypeError)
    logits = np.zeros((4, 3), np.float32)
    assert Asking("exit")(Evidence(logits, exit=2)).all()
    with pytest.raises(TypeError, match="'>=' not supported between instances of 'str' and 'int'"):
        Asking("layout")(Evidence(logits))  # an error of its own stays one


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"logits": [[0.0, 1.0]]}, r"`logits` must be an array, as `numpy.asarray` makes one, got \[\[0.0, 1.0\]\]"),
        ({"gate": 0.5}, "`gate` must be an array, as `numpy.asarray` makes one, got 0.5"),
        ({"logits": np.zeros((1, 2)), "position": [0]}, r"`position` must be an array, .*got \[0\]"),
    ],
)
def test_evidence_that_is_no_array_is_named(given, message):
    with pytest.raises(TokenExitError, match=message):
        Evidence(**given)


def test_policies_are_frozen():
    for policy in every(2):
        with pytest.raises(dataclasses.FrozenInstanceError):
            policy.threshold = 0.6
        assert hash(policy) == hash(dataclasses.replace(policy))


@pytest.mark.usefixtures("unchecked")
def test_several_images_need_the_image_of_every_token():
    with pytest.raises(TokenExitError, match="`image` must be given for several images, got none"):
        Evidence(np.eye(4, 2, dtype=np.float32), images=2)


@each_backend
def test_thresholds_of_numpy_are_taken_by_every_library(backend):
    if backend.name == "array-api-strict":
        pytest.skip("it takes no arrays of other libraries")
    rows = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    evidence = Evidence(backend.array(rows), grid=(3, 4))
    for taken, number in (
        (ConfidenceAbove(np.array(0.5)), ConfidenceAbove(0.5)),
        (ConfidenceAbove(np.float32(0.5)), ConfidenceAbove(0.5)),
        (ConfidenceAbove(PerClass(np.array([0.4, 0.5, 0.6]))), ConfidenceAbove(PerClass((0.4, 0.5, 0.6)))),
        (Budget(np.array(0.5)), Budget(0.5)),
        (Budget(np.array(5)), Budget(5)),
    ):
        np.testing.assert_array_equal(backend.numpy(taken(evidence)), backend.numpy(number(evidence)))


def test_class_scores_may_be_of_one_class():
    scores = np.array([[0.3], [0.8]], np.float32)
    assert ConfidenceAbove(0.5)(Evidence(class_scores=scores)).tolist() == [False, True]
