"""Drift: two samples of images."""

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.backends import each_backend
from tokenexit import TokenExitError
from tokenexit.guarantees import drift
from tokenexit.guarantees.drift import Sample, compare, sample

FEW = st.lists(st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1, width=16), min_size=1, max_size=5).map(tuple)
ROW = st.lists(st.floats(0, 1, width=16), min_size=1, max_size=30).map(tuple)


def distance(one, other):
    """The greatest difference of two distribution functions, as a fraction."""
    values = {*one, *other}
    shares = ([Fraction(sum(x <= value for x in row), len(row)) for value in values] for row in (one, other))
    return max(abs(a - b) for a, b in zip(*shares, strict=True))


@given(one=FEW, other=FEW)
def test_the_p_value_is_the_share_of_all_orders_that_are_as_far_apart(one, other):
    (found,) = compare(Sample({"x": one}), Sample({"x": other})).compared
    places = range(len(one) + len(other))
    orders = [(row, [at for at in places if at not in row]) for row in itertools.combinations(places, len(one))]
    apart = [distance(*order) >= distance(one, other) for order in orders]
    assert found.distance == pytest.approx(float(distance(one, other)))
    assert found.p_value == pytest.approx(sum(apart) / len(orders), abs=1e-12)
    assert (found.before, found.now) == (pytest.approx(np.mean(one)), pytest.approx(np.mean(other)))


@pytest.mark.parametrize(("one", "other"), [(3, 5), (40, 60), (100, 100), (300, 171)])
def test_larger_samples_are_compared_as_scipy_does(one, other):
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    rows = draw.normal(size=one), draw.normal(size=other) + 0.2
    (found,) = compare(*(Sample({"x": tuple(row.tolist())}) for row in rows)).compared
    expected = stats.ks_2samp(*rows, method="exact")
    assert found.distance == pytest.approx(expected.statistic)
    assert found.p_value == pytest.approx(expected.pvalue, abs=1e-10)


def test_false_alarms_are_no_more_frequent_than_was_said():
    draw = np.random.default_rng(0)

    def batch(images):
        rows = draw.normal(size=(3, images)).round(1)  # with ties
        rows[2] = rows[0]  # statistics that depend on each other
        return Sample({name: tuple(row.tolist()) for name, row in zip("abc", rows, strict=True)})

    alarms = [compare(batch(40), batch(25), false_alarms=0.1).drifted for _ in range(400)]
    assert np.mean(alarms) <= 0.1 + 3 * math.sqrt(0.09 / 400)
    assert any(alarms)


def test_a_drift_is_seen_and_said():
    draw = np.random.default_rng(0)
    rows = [tuple((draw.random(60) * 0.2 + shift).tolist()) for shift in (0.7, 0.75, 0.0, 0.0)]
    before, now = ({"confidence": rows[at], "share after 3": rows[at + 2]} for at in (0, 1))
    found = compare(Sample(before), Sample(now))
    assert found.drifted
    assert [one.statistic for one in found.alarms] == ["confidence"]
    assert str(found).startswith("The images have drifted; the certificate does not hold for them (60 images before,")
    assert "- confidence: mean 0.8" in str(found)
    with pytest.warns(UserWarning, match="The images have drifted"):
        found.warn()
    same = compare(Sample(before), Sample(before))
    same.warn()
    assert not same.drifted
    assert same.images == (60, 60)
    assert [one.p_value for one in same.compared] == [1.0, 1.0]
    assert str(same).startswith(
        "No drift is seen (60 images before, 60 now; at most 1 % false alarms). That is no proof"
    )


def test_more_statistics_ask_for_more():
    one, other = tuple(map(float, range(20))), tuple(map(float, range(9, 29)))
    p = compare(Sample({"a": one}), Sample({"a": other})).compared[0].p_value
    rate = 1.5 * p
    assert compare(Sample({"a": one}), Sample({"a": other}), false_alarms=rate).drifted
    two = Sample({"a": one, "b": one}), Sample({"a": other, "b": one})
    assert not compare(*two, false_alarms=rate).drifted
    assert compare(*two, false_alarms=2 * p).drifted


@each_backend
def test_a_sample_has_a_number_for_every_image(backend):
    logits = np.zeros((2, 3, 2, 2), np.float32)
    logits[0, 1] = 80.0
    depth = np.asarray([[[3, 3], [6, 12]], [[12, 12], [12, 12]]])
    found = sample(backend.array(logits), backend.array(depth), after=(3, 6))
    assert found.images == 2
    assert set(found.statistics) == {"confidence", "share after 3", "share after 6"}
    assert found.statistics["confidence"] == pytest.approx((1.0, 1 / 3))
    assert found.statistics["share after 3"] == (0.5, 0.0)
    assert found.statistics["share after 6"] == (0.25, 0.0)
    ran = backend.array(np.asarray([[4, 3, 2], [4, 4, 4]]))
    merging = sample(None, backend.array(depth), after=(3,), tokens_per_block=ran)
    assert merging.statistics == {"share after 3": (0.5, 0.0), "tokens per block": (3.0, 4.0)}


@given(
    batches=st.lists(st.tuples(ROW, ROW).map(lambda x: tuple(y[: min(map(len, x))] for y in x)), min_size=1, max_size=4)
)
def test_batches_join_and_samples_survive_json(batches):
    whole = Sample.join(Sample({"a": a, "b": b}) for a, b in batches)
    assert whole.statistics["a"] == tuple(x for a, _ in batches for x in a)
    assert whole.images == sum(len(b) for _, b in batches)
    assert Sample.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole


ONE = Sample({"a": (0.5,)})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Sample({}), "`statistics` must be a tuple of numbers for each of at least one name, got {}"),
        (
            lambda: Sample({"a": [1.0]}),
            "`statistics` must be a tuple of numbers for each of at least one name, got {'a'",
        ),
        (lambda: Sample({"a": (1.0,), "b": ()}), "`statistics` must be of equally many images, got [1, 0]"),
        (lambda: Sample({"a": (math.nan,)}), "`statistics` must be finite numbers"),
        (lambda: Sample({"a": ("1",)}), "`statistics` must be finite numbers"),
        (lambda: Sample.join([]), "`samples` must be at least one, got []"),
        (lambda: Sample.join([ONE, Sample({"b": (1.0,)})]), "`samples` must have the statistics ['a'], got [['b']]"),
        (lambda: Sample.from_dict({"schema": 2, "statistics": {}}), "`schema` must be 1, got 2"),
        (lambda: Sample.from_dict({"schema": 1, "statistics": {"a": 1}}), "`statistics` must be a mapping to lists"),
        (lambda: Sample.from_dict({}), "`sample` must have exactly the keys"),
        (lambda: compare(ONE, Sample({"b": (1.0,)})), "`now` must have the statistics ['a'], got ['b']"),
        (lambda: compare(ONE, Sample({"a": ()})), "`now` must have images, as must `before`, got 0 and 1"),
        (lambda: compare(ONE, ONE, false_alarms=1.0), "`false_alarms` must lie between 0 and 1, got 1.0"),
        (lambda: sample(np.zeros((2, 3, 4)), np.zeros((2, 5), int), after=()), "`logits` must have shape (images,"),
        (
            lambda: sample(None, np.zeros((2, 5), int), after=()),
            "`statistics` must be a tuple of numbers for each of at",
        ),
        (
            lambda: sample(None, np.zeros((2, 5), int), after=(), tokens_per_block=np.zeros((3, 4), int)),
            "`tokens_per_block` must have shape (images, blocks)",
        ),
        (lambda: sample(np.zeros((2, 3, 0)), np.zeros((2, 0), int), after=()), "`exit_depth` must have at least one"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(TokenExitError) as found:
        call()
    assert str(found.value).startswith(message)


def test_an_infinite_gap_is_impossible_and_none_is_certain():
    assert drift._p_value(0, 3, 4) == 1.0
    assert drift._p_value(12, 3, 4) == pytest.approx(2 / math.comb(7, 3))


def test_with_too_few_images_it_says_that_it_cannot_see():
    before, far = Sample({"a": tuple(map(float, range(40)))}), (1e6,)
    blind = compare(before, Sample({"a": far}), false_alarms=0.01)
    assert blind.blind
    assert not blind.drifted
    assert str(blind).startswith(
        "No drift can be seen with so few images, whatever is on them: compare more (40 images"
    )
    with pytest.warns(UserWarning, match="No drift can be seen"):
        blind.warn()
    seen = compare(before, Sample({"a": far * 4}), false_alarms=0.01)
    assert seen.drifted
    assert not seen.blind
