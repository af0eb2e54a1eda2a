import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core import oracles, strategies
from tests.core.backends import each_backend
from tokenexit import TokenExitError, policies, scores, tokens
from tokenexit.policies import (
    ConfidenceAbove,
    EntropyBelow,
    Evidence,
    MarginAbove,
    NeighboursAgree,
    Policy,
    always,
    never,
)

THRESHOLD = st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])
ALL = [
    ConfidenceAbove(0.5),
    EntropyBelow(0.5),
    MarginAbove(0.5),
    NeighboursAgree(0.5, radius=2),
    never(),
    always(),
    ConfidenceAbove(0.5) & EntropyBelow(0.4),
    MarginAbove(0.2) | NeighboursAgree(0.9),
    ConfidenceAbove(0.4).retaining(per_class=2),
]


def evidence(backend, mask, grid, rows, **more):
    packing = tokens.pack(backend.array(mask))
    return Evidence(
        backend.array(rows), image=packing.image, images=mask.shape[0], grid=grid, position=packing.slot, **more
    )


def decide(backend, policy, given_evidence):
    with np.errstate(all="ignore"):
        return backend.numpy(policy(given_evidence))


@each_backend
@pytest.mark.parametrize(
    ("policy", "name", "passes"),
    [
        (ConfidenceAbove, "confidence", np.greater),
        (EntropyBelow, "entropy", np.less),
        (MarginAbove, "margin", np.greater),
    ],
)
@given(batch=strategies.batches(), threshold=THRESHOLD)
def test_a_threshold_is_strict_and_nan_never_passes(backend, policy, name, passes, batch, threshold):
    got = decide(backend, policy(threshold), evidence(backend, *batch))
    with np.errstate(all="ignore"):
        score = getattr(scores, name)(batch[2])
    np.testing.assert_array_equal(got, passes(score, np.float32(threshold)))
    assert not got[np.isnan(score)].any()


@each_backend
@given(batch=strategies.batches(), threshold=THRESHOLD, radius=st.integers(0, 7), settled=st.data())
def test_neighbours_agree_as_the_oracle_says(backend, batch, threshold, radius, settled):
    mask, grid, rows = batch
    classes = rows.shape[1]
    # Of the places without a running token, some have settled, and about the others nothing is known.
    known = settled.draw(strategies.running(st.just(mask.shape[0]), st.just(mask.shape[1]))) & ~mask
    draw = np.random.default_rng(settled.draw(st.integers(0, 99)))
    settled_label = np.where(known, draw.integers(0, classes, mask.shape), -1)
    settled_score = draw.random(mask.shape).astype(np.float32)
    got = decide(
        backend,
        NeighboursAgree(threshold, radius=radius),
        evidence(
            backend, mask, grid, rows,
            settled_label=backend.array(settled_label), settled_score=backend.array(settled_score),
        ),
    )  # fmt: skip
    label_map, confident_map = settled_label.copy(), known & (settled_score > np.float32(threshold))
    with np.errstate(all="ignore"):
        label_map[mask] = rows.argmax(axis=-1)
        confident_map[mask] = scores.confidence(rows) > np.float32(threshold)
    wanted = [
        oracles.neighbours_agree(label_map, confident_map, image, position, grid, radius)
        for image, position in zip(*np.nonzero(mask), strict=True)
    ]
    if radius == 0:  # a plain threshold, for which the class does not matter
        wanted = confident_map[mask]
    np.testing.assert_array_equal(got, np.array(wanted, dtype=bool))


@each_backend
@given(batch=strategies.batches(), threshold=THRESHOLD, k=st.integers(0, 6))
def test_retention_takes_back_the_most_confident_of_each_predicted_class(backend, batch, threshold, k):
    mask, _, rows = batch
    leave = decide(backend, ConfidenceAbove(threshold), evidence(backend, *batch))
    kept = leave & ~decide(backend, ConfidenceAbove(threshold).retaining(per_class=k), evidence(backend, *batch))
    image, label = np.nonzero(mask)[0], rows.argmax(axis=-1)
    with np.errstate(all="ignore"):
        score = scores.confidence(rows)
    for group in {*zip(image.tolist(), label.tolist(), strict=True)}:
        members = [i for i in range(len(rows)) if (image[i], label[i]) == group and leave[i]]
        members.sort(key=lambda i: (-score[i], i))
        assert {i for i in members if kept[i]} == set(members[:k])
    assert not (kept & ~leave).any()


@each_backend
@pytest.mark.parametrize("kind", [ConfidenceAbove, MarginAbove, EntropyBelow, NeighboursAgree])
@given(batch=strategies.batches(), pair=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_stricter_threshold_lets_no_more_tokens_go(backend, kind, batch, pair):
    strict, lax = (min(pair), max(pair)) if kind is EntropyBelow else (max(pair), min(pair))
    few = decide(backend, kind(strict), evidence(backend, *batch))
    many = decide(backend, kind(lax), evidence(backend, *batch))
    assert not (few & ~many).any()


@each_backend
@given(batch=strategies.batches())
def test_never_always_and_or(backend, batch):
    def run(policy):
        return decide(backend, policy, evidence(backend, *batch))

    a, b = ConfidenceAbove(0.5), MarginAbove(0.5)
    assert not run(never()).any()
    assert run(always()).all()
    np.testing.assert_array_equal(run(a & b), run(a) & run(b))
    np.testing.assert_array_equal(run(a | b), run(a) | run(b))
    np.testing.assert_array_equal(run(a & never()), run(never()))
    np.testing.assert_array_equal(run(a | never()), run(a))


@each_backend
@pytest.mark.parametrize("policy", ALL, ids=str)
@given(batch=strategies.batches(), data=st.data())
def test_protected_tokens_never_leave(backend, policy, batch, data):
    mask, grid, rows = batch
    protected = data.draw(strategies.running(st.just(1), st.just(len(rows))))[0]
    got = decide(backend, policy, evidence(backend, mask, grid, rows, protected=backend.array(protected)))
    assert not got[protected].any()


@each_backend
@pytest.mark.parametrize("policy", ALL, ids=str)
@given(batch=strategies.batches())
def test_an_image_is_decided_alone_as_in_its_batch(backend, policy, batch):
    mask, grid, rows = batch
    together = decide(backend, policy, evidence(backend, *batch))
    image = np.nonzero(mask)[0]
    for one in range(mask.shape[0]):
        alone = decide(backend, policy, evidence(backend, mask[one : one + 1], grid, rows[image == one]))
        np.testing.assert_array_equal(alone, together[image == one])


@pytest.mark.parametrize("policy", ALL, ids=str)
def test_a_policy_survives_being_written_down(policy):
    assert policies.from_dict(policies.to_dict(policy)) == policy


def test_a_policy_of_ones_own_takes_part():
    @dataclass(frozen=True)
    class CertainSky(Policy):
        threshold: float

        def leaves(self, evidence):
            return (evidence.label == 0) & (evidence.confidence > self.threshold)

    rows = np.array([[9, 0], [0, 9], [1, 0]], np.float32)
    np.testing.assert_array_equal(CertainSky(0.9)(Evidence(rows)), [True, False, False])
    np.testing.assert_array_equal((CertainSky(0.9) | always())(Evidence(rows)), [True, True, True])
    assert CertainSky(0.9).retaining(per_class=1).with_threshold(0.5) == CertainSky(0.5).retaining(per_class=1)
    with pytest.raises(TokenExitError, match="`policy` must be one of ConfidenceAbove, .* to be written down"):
        policies.to_dict(CertainSky(0.9))


def test_thresholds_are_exchanged_everywhere_and_are_data():
    policy = (NeighboursAgree(0.9, radius=2) & ConfidenceAbove(0.8)).retaining(per_class=5)
    assert policy.with_threshold(0.5) == (NeighboursAgree(0.5, radius=2) & ConfidenceAbove(0.5)).retaining(per_class=5)
    rows = np.array([[2, 0], [9, 0]], np.float32)
    threshold = np.asarray(0.95, np.float32)
    np.testing.assert_array_equal(ConfidenceAbove(threshold)(Evidence(rows)), [False, True])
    with pytest.raises(TokenExitError, match=r"one kind of score, got \['confidence', 'margin'\]"):
        (ConfidenceAbove(0.5) & MarginAbove(0.5)).with_threshold(0.4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConfidenceAbove(1.5), r"`threshold` must be in \[0, 1\], got 1.5"),
        (lambda: EntropyBelow(float("nan")), r"`threshold` must be in \[0, 1\], got nan"),
        (lambda: MarginAbove(True), r"`threshold` must be a number in \[0, 1\] or an array without axes, got True"),
        (lambda: ConfidenceAbove(None), r"or an array without axes, got None"),
        (lambda: ConfidenceAbove(np.array([0.5])), r"or an array without axes, got array"),
        (lambda: NeighboursAgree(0.5, radius=True), "`radius` must be a whole number of at least 0, got True"),
        (
            lambda: Evidence(
                np.zeros((3, 2), np.float32), images=1, grid=(1, 3), settled_label=np.zeros((1, 3), np.int64)
            ),
            "`settled_score` must be given exactly if `settled_label` is",
        ),
        (lambda: NeighboursAgree(0.5, radius=-1), "`radius` must be a whole number of at least 0, got -1"),
        (lambda: NeighboursAgree(0.5, radius=1.5), "`radius` must be a whole number of at least 0, got 1.5"),
        (lambda: always().retaining(per_class=-2), "`per_class` must be a whole number of at least 0, got -2"),
        (lambda: NeighboursAgree(0.5)(Evidence(np.zeros((2, 3), np.float32))), "`evidence` must have images, grid"),
        (lambda: Evidence(np.zeros(3, np.float32)), r"`logits` must have shape \(tokens, classes\).*got shape \(3,\)"),
        (lambda: Evidence(np.zeros((3, 0), np.float32)), r"at least one class, got shape \(3, 0\)"),
        (
            lambda: Evidence(np.zeros((3, 2), np.float32), image=np.zeros(2, np.int64)),
            r"`image` must have one entry for each of the 3 tokens, got shape \(2,\)",
        ),
        (
            lambda: Evidence(
                np.zeros((3, 2), np.float32),
                images=1,
                grid=(1, 3),
                settled_label=np.zeros((1, 2), np.int64),
                settled_score=np.zeros((1, 2), np.float32),
            ),
            r"`settled_label` must have shape \(images, positions\) for images=1 and grid=\(1, 3\), got shape \(1, 2\)",
        ),
        (lambda: policies.from_dict({"kind": "os.system"}), "`kind` must be one of ConfidenceAbove, .*got 'os.system'"),
        (lambda: policies.from_dict({"kind": "never", "more": 1}), r"`policy` must have the fields \[\] .*\['more'\]"),
        (
            lambda: policies.from_dict({"kind": "ConfidenceAbove", "threshold": "0.5"}),
            "`threshold` must be a number, got '0.5'",
        ),
        (lambda: policies.from_dict([1]), r"`policy` must be a mapping, got \[1\]"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named(make, message):
    with pytest.raises(TokenExitError, match=message):
        make()


def test_policies_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ConfidenceAbove(0.5).threshold = 0.6  # pyright: ignore[reportAttributeAccessIssue]
