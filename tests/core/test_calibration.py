"""The choice of a setting, and its report."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.backends import each_backend
from tokenexit import TokenExitError, schedule
from tokenexit.guarantees import calibration, ladders
from tokenexit.guarantees.bounds import p_values, upper_bounds
from tokenexit.guarantees.calibration import certify, certify_in_turn, conformal, fixed_sequence
from tokenexit.guarantees.certificate import ASSUMPTIONS, Fingerprints
from tokenexit.policies import ConfidenceAbove

LADDER = (
    *ladders.by_threshold(schedule.dtop(after=(4, 8)), thresholds=(0.99, 0.95, 0.9, 0.8, 0.7)),
    schedule.truncated(after=9),
    schedule.truncated(after=6),
)
COSTS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.75, 0.55)
MEANS = (0.0, 0.001, 0.004, 0.01, 0.05, 0.004, 0.06)
PRINTS = Fingerprints({"head.weight": "0" * 64}, "float32", (352, 480), "mean and std of ImageNet", "torch")
CHAINS = (range(5), (5, 6))


def drawn(means=MEANS, images=400, seed=0):
    draw = np.random.default_rng(seed)
    losses = [draw.beta(20 * mean, 20 * (1 - mean), images) if mean else np.zeros(images) for mean in means]
    return np.stack(losses, axis=1)


@given(p=st.lists(st.sampled_from([0.0, 0.05, 0.05001, 1.0, math.nan]), max_size=6))
def test_a_sequence_is_followed_to_its_first_failure(p):
    count = fixed_sequence(p, delta=0.05)
    assert all(one <= 0.05 for one in p[:count])
    assert count == len(p) or not p[count] <= 0.05


def test_the_last_certified_is_chosen_and_not_the_one_behind_it():
    report = certify(LADDER[:5], drawn()[:, :5], COSTS[:5], at_most=0.02)
    assert [point.certified for point in report.curve] == [True, True, True, True, False]
    assert report.schedule == LADDER[3]
    assert report.chosen is report.curve[3]
    assert report.saving == pytest.approx(0.4)


@each_backend
def test_any_array_library_will_do(backend):
    losses = drawn().astype(np.float32)
    for table in (losses, np.stack([losses, losses[::-1]], axis=2)):
        report = certify(LADDER, backend.array(table), backend.array(np.float32(COSTS)), at_most=0.03, chains=CHAINS)
        plain = certify(LADDER, backend.held(table), backend.held(np.float32(COSTS)), at_most=0.03, chains=CHAINS)
        assert report.schedule == plain.schedule
        for one, other in zip(report.curve, plain.curve, strict=True):
            assert one.certified == other.certified
            for name in ("loss", "bound", "p_value", "cost"):
                assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-6)


def test_jax_will_do():
    jax = pytest.importorskip("jax")
    losses = drawn().astype(np.float32)
    assert certify(LADDER, jax.numpy.asarray(losses), COSTS, at_most=0.03) == certify(
        LADDER, losses, COSTS, at_most=0.03
    )
    assert conformal(jax.numpy.zeros((40, 3)), at_most=0.1) == 3


@pytest.mark.parametrize("test", ["betting", "hoeffding-bentkus"])
def test_the_curve_holds_what_the_tests_say(test):
    losses = drawn()
    report = certify(LADDER, losses, COSTS, at_most=0.02, confidence=0.9, test=test, chains=CHAINS, seed=5)
    order = calibration._shuffled(np.arange(400.0)[:, None], 5)[:, 0].astype(int)
    assert sorted(order) == list(range(400))
    assert (order != np.arange(400)).any()
    np.testing.assert_allclose(
        [point.p_value for point in report.curve],
        p_values(losses[order], at_most=0.02, delta=(1 - 0.9) / 2, test=test),
    )
    bound = upper_bounds(losses[order], delta=(1 - 0.9) / 7, test=test)
    np.testing.assert_allclose([point.bound for point in report.curve], bound)
    np.testing.assert_allclose([point.loss for point in report.curve], losses.mean(axis=0))
    assert [point.cost for point in report.curve] == list(COSTS)


def test_the_order_is_the_same_everywhere_and_says_its_seed():
    assert calibration._shuffled(np.arange(8.0), 0).tolist() == [3.0, 7.0, 5.0, 2.0, 4.0, 1.0, 6.0, 0.0]
    losses = np.sort(drawn(), axis=0)[::-1]  # sorted, the worst images first, betting would lose what it has
    one, other = (certify(LADDER, losses, COSTS, at_most=0.02, seed=seed) for seed in (1, 2))
    assert (one.seed, other.seed) == (1, 2)
    assert one.curve[3].certified
    assert one.curve[3].p_value != other.curve[3].p_value


def test_every_class_must_pass():
    good, bad = drawn(), drawn(means=(0.0, 0.001, 0.05, 0.01, 0.01, 0.0, 0.0), seed=1)
    report = certify(LADDER, np.stack([good, bad], axis=2), COSTS, at_most=0.02)
    assert [point.certified for point in report.curve] == [True, True, False, False, False, False, False]
    apart = [certify(LADDER, losses, COSTS, at_most=0.02) for losses in (good, bad)]
    for at, point in enumerate(report.curve):
        assert point.p_value == max(one.curve[at].p_value for one in apart)
        assert point.loss == pytest.approx(max(one.curve[at].loss for one in apart))
        assert point.bound == max(one.curve[at].bound for one in apart)


def test_chains_stop_by_themselves_and_share_the_level():
    losses = drawn(means=(0.0, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0))
    report = certify(LADDER, losses, COSTS, at_most=0.02, chains=CHAINS)
    assert [point.certified for point in report.curve] == [True, False, False, False, False, True, True]
    few = certify(LADDER[:1], np.zeros((160, 1)), COSTS[:1], at_most=0.02)
    assert few.chosen is not None
    with pytest.raises(TokenExitError, match="`losses` must be of at least 189 images, that 0.02 can be certified"):
        certify(LADDER[:2], np.zeros((160, 2)), COSTS[:2], at_most=0.02, chains=((0,), (1,)))


def test_cutting_is_said_to_be_the_better_deal_where_it_is():
    cheap = certify(LADDER, drawn(), (0.9, 0.8, 0.7, 0.68, 0.5, 0.6, 0.4), at_most=0.02, chains=CHAINS)
    assert cheap.schedule == schedule.truncated(after=9)
    assert cheap.chosen is not None
    assert cheap.chosen.cut_after == 9
    assert "Cutting is the better deal: this is the network cut short after block 9" in str(cheap)
    dear = certify(LADDER, drawn(), COSTS, at_most=0.02, chains=CHAINS)
    assert dear.chosen is not None
    assert dear.chosen.cut_after is None
    assert "Cutting" not in str(dear)


def test_the_report_says_what_holds_and_what_it_rests_on():
    report = certify(LADDER, drawn(), COSTS, at_most=0.02, chains=CHAINS)
    words = str(report)
    assert words.startswith("Chosen: setting 4 of 7, which saves 40 % of the dense network's cost:\n  after block ")
    for one in LADDER[3].exits:
        assert f"\n  after block {one.after}, exit: {one.policy!r}\n" in words
    assert report.chosen is not None
    bound = f"By a bound that holds for all 7 settings at once: at most {100 * report.chosen.bound:.3g} %."
    assert bound in words
    assert "shares the 5 % chance of error among all settings, which the certificate need not" in words
    assert "mean disagreement over images at most 2 %, with 95 % confidence (betting test, 400 images)" in words
    assert all(one in words for one in ASSUMPTIONS)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["chosen"] == 3
    assert data["assumptions"] == list(ASSUMPTIONS)
    assert [schedule.Schedule.from_dict(point["schedule"]) for point in data["curve"]] == list(LADDER)
    assert {"loss", "bound", "p_value", "cost", "certified"} < set(data["curve"][0])


def test_the_report_names_the_merges_of_what_it_chose():
    plans = [schedule.merged(alike={1: alike, 3: 0.8}) for alike in (0.95, 0.875)]
    plans.append(dataclasses.replace(plans[0], merges=(schedule.Merge(2, agreed=ConfidenceAbove(0.9)),)))
    report = certify(plans, np.zeros((400, 3)), (0.9, 0.8, 0.7), at_most=0.02)
    assert "\n  after block 2, merge: cells of up to 2 x 2, agreed by ConfidenceAbove(0.9)\n" in str(report)
    report = certify(plans[:2], np.zeros((400, 2)), (0.9, 0.8), at_most=0.02)
    assert "\n  after block 1, merge: cells of up to 2 x 2, more alike than 0.875\n  after block 3, merge: " in str(
        report
    )


def in_turn(losses, costs=COSTS, **options):
    """The report, and which settings were measured for it."""
    ran = []

    def measure(setting):
        ran.append(LADDER.index(setting))
        return losses[:, ran[-1]], costs[ran[-1]]

    return certify_in_turn(LADDER, measure, images=400, at_most=0.02, **options), ran


@given(
    means=st.lists(st.sampled_from([0.0, 0.002, 0.01, 0.05, 0.3]), min_size=7, max_size=7),
    chains=st.sampled_from([None, CHAINS, ((6, 2, 0), (1, 3), (5, 4)), ((3, 2, 1, 0, 4, 5, 6), ())]),
    classes=st.booleans(),
    seed=st.integers(0, 3),
)
def test_measuring_in_turn_says_what_the_whole_table_says(means, chains, classes, seed):
    losses = drawn(means, seed=seed)
    losses = np.stack([losses, losses[::-1] / 2], axis=2) if classes else losses
    report, ran = in_turn(losses, chains=chains, confidence=0.9, seed=seed)
    whole = certify(LADDER, losses, COSTS, at_most=0.02, chains=chains, confidence=0.9, seed=seed)
    wanted = set()
    for chain in [range(7)] if chains is None else chains:
        for place in chain:
            wanted.add(place)
            if not whole.curve[place].certified:
                break
    assert len(ran) == len(wanted)
    assert set(ran) == wanted
    assert report.schedule == whole.schedule
    for point, place in zip(report.curve, sorted(wanted), strict=True):
        assert (point.schedule, point.certified) == (LADDER[place], whole.curve[place].certified)
        for name in ("loss", "bound", "p_value", "cost"):  # sums of one column and of all round apart
            assert getattr(point, name) == pytest.approx(getattr(whole.curve[place], name), rel=1e-9)
    assert report.unmeasured == tuple(LADDER[place] for place in range(7) if place not in wanted)


def test_the_report_says_what_was_not_run():
    report, _ = in_turn(drawn(means=(0.0, 0.001, 0.3, 0.0, 0.0, 0.4, 0.0)), chains=CHAINS)
    assert "Chosen: setting 2 of 4 measured, which saves" in str(report)
    assert "Not measured, because one before them failed: 3 of 7 settings." in str(report)
    data = json.loads(json.dumps(report.to_dict()))
    assert [schedule.Schedule.from_dict(one) for one in data["unmeasured"]] == [LADDER[3], LADDER[4], LADDER[6]]
    assert "Not measured" not in str(in_turn(drawn(means=[0.0] * 7))[0])


def test_the_certificate_is_of_what_was_chosen():
    report = certify(LADDER, drawn(), COSTS, at_most=0.02, confidence=0.9, risk="error", seed=3)
    found = report.certificate(PRINTS)
    assert (found.schedule, found.risk, found.at_most, found.confidence) == (LADDER[3], "error", 0.02, 0.9)
    assert (found.images, found.test, found.seed, found.fingerprints) == (400, "betting", 3, PRINTS)
    assert (found.loss, found.saving) == (report.curve[3].loss, report.saving)


@pytest.mark.parametrize(
    ("losses", "costs", "words"),
    [
        (np.full((400, 7), 0.5), COSTS, "Never exit: nothing is certified; the first setting measured 50 %, p = 1."),
        (np.zeros((400, 7)), [1.0, 1.2] * 3 + [1.0], "Never exit: what is certified saves nothing."),
    ],
)
def test_nothing_certified_or_nothing_saved_means_never_exit(losses, costs, words):
    report = certify(LADDER, losses, costs, at_most=0.02)
    assert report.chosen is None
    assert report.schedule == schedule.dense()
    assert report.saving == 0
    assert str(report).startswith(words)
    assert report.to_dict()["chosen"] is None
    with pytest.raises(TokenExitError, match="`report` must have chosen a setting to be certified, got none"):
        report.certificate(PRINTS)


def test_of_equally_cheap_settings_the_more_careful_one_is_chosen():
    assert certify(LADDER, np.zeros((400, 7)), [0.5] * 7, at_most=0.02).schedule == LADDER[0]


def test_conformal_keeps_the_mean_with_one_image_more_at_its_worst():
    losses = np.asarray([[0.0, 0.0, 0.2, 0.3], [0.0, 0.1, 0.1, 0.3], [0.0, 0.0, 0.0, 0.2]])
    assert [conformal(losses, at_most=level) for level in (0.24, 0.25, 0.274, 0.276, 0.326, 0.46)] == [0, 1, 1, 2, 3, 4]


def test_conformal_warns_where_a_loss_falls():
    losses = np.zeros((99, 3))
    losses[0, 1] = 0.5
    with pytest.warns(
        UserWarning, match="the loss falls along the ladder in 1 of 99 images: conformal promises nothing"
    ):
        assert conformal(losses, at_most=0.1) == 3


OK = np.zeros((400, 7))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: certify((), OK[:, :0], (), at_most=0.02), "`settings` must be at least one, got 0"),
        (lambda: certify((1,), OK[:, :1], (1,), at_most=0.02), "`settings` must be schedules, got [1]"),
        (lambda: certify(LADDER, OK[:, :6], COSTS, at_most=0.02), "`losses` must have shape (images, 7), or (images, 7, classes), for the settings, got an array of shape (400, 6)"),
        (lambda: certify(LADDER, OK[:, :, None][:, :, :0], COSTS, at_most=0.02), "`losses` must have shape"),
        (lambda: certify(LADDER, OK[:, 0], COSTS, at_most=0.02), "`losses` must have shape"),
        (lambda: certify(LADDER, OK[:153], COSTS, at_most=0.02), "`losses` must be of at least 154 images, that 0.02 can be certified at all by this test, got 153 images"),
        (lambda: certify(LADDER, OK[:148], COSTS, at_most=0.02, test="hoeffding-bentkus"), "`losses` must be of at least 149 images"),
        (lambda: certify(LADDER, OK + math.nan, COSTS, at_most=0.02), "`losses` must be numbers: an image about which nothing is known"),
        (lambda: certify(LADDER, OK, COSTS[:3], at_most=0.02), "`costs` must be one for each of the 7 settings, got 3"),
        (lambda: certify(LADDER, OK, (*COSTS[:6], math.nan), at_most=0.02), "`costs` must be numbers from 0 up, got"),
        (lambda: certify(LADDER, OK, COSTS, at_most=0.02, confidence=1.0), "`confidence` must lie between 0 and 1, got 1.0"),
        (lambda: certify(LADDER, OK, COSTS, at_most=1.5), "`at_most` must lie between 0 and 1, got 1.5"),
        (lambda: certify(LADDER, OK, COSTS, at_most=0.02, test="luck"), "`test` must be"),
        (lambda: certify(LADDER, OK, COSTS, at_most=0.02, chains=((0, 1), (1, 2))), "`chains` must hold every place from 0 to 6 once, got [[0, 1], [1, 2]]"),
        (lambda: certify(LADDER, OK, COSTS, at_most=0.02, chains=()), "`chains` must hold every place from 0 to 6 once, got []"),
        (lambda: certify_in_turn((), lambda one: 1 / 0, images=400, at_most=0.02), "`settings` must be at least one, got 0"),
        (lambda: certify_in_turn(LADDER, lambda one: 1 / 0, images=153, at_most=0.02), "`images` must be at least 154, that 0.02 can be certified at all by this test, got 153"),
        (lambda: certify_in_turn(LADDER, lambda one: (OK[:9, 0], 1), images=400, at_most=0.02), "`losses` must be of 400 images, got an array of shape (9,)"),
        (lambda: certify_in_turn(LADDER, lambda one: (OK[:, 0], -1), images=400, at_most=0.02), "`costs` must be numbers from 0 up, got"),
        (lambda: certify_in_turn(LADDER, lambda one: 1 / 0, images=400, at_most=0.02, chains=((0, 0),)), "`chains` must hold every place from 0 to 6 once"),
        (lambda: conformal(OK[:0], at_most=0.1), "`losses` must have shape (images, settings), with at least one image"),
        (lambda: conformal(OK[:, 0], at_most=0.1), "`losses` must have shape (images, settings), with at least one image"),
        (lambda: conformal(OK + 2, at_most=0.1), "`losses` must be numbers in [0, 1]"),
        (lambda: conformal(OK, at_most=0.0), "`at_most` must lie between 0 and 1, got 0.0"),
    ],
)  # fmt: skip
def test_what_cannot_be_certified_is_refused(call, message):
    with pytest.raises(TokenExitError) as found:
        call()
    assert str(found.value).startswith(message)
