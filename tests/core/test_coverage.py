"""The guarantee, on thousands of calibrations: `tests.core.coverage` at a quick size."""

import numpy as np
import pytest

from tests.core import coverage
from tests.core.coverage import CASES, DELTA, LEVEL, TESTS, WRONG
from tokenexit import schedule
from tokenexit.guarantees import calibration

REPEATS = 150
LADDER = tuple(schedule.dtop(threshold=threshold) for threshold in (0.99, 0.95, 0.9, 0.8, 0.7))


@pytest.mark.parametrize("images", [50, 100, 500])
@pytest.mark.parametrize(("name", "draw", "curve"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_the_level_is_exceeded_no_more_often_than_was_said(name, draw, curve, images):
    found = coverage.study(draw, curve(5), images=images, repeats=500)
    for right in (*TESTS, "bound"):
        assert found.violated[right] <= coverage.allowed(500)
    if name == "all zero":
        assert found.certified == 1


def test_so_it_is_with_many_settings_and_images():
    found = coverage.study(coverage.bernoulli, coverage.rising(41), images=2000, repeats=200)
    for right in (*TESTS, "bound"):
        assert found.violated[right] <= coverage.allowed(200)
    assert found.violated["betting"] > 0


def test_wrong_ways_are_seen_to_be_wrong():
    found = coverage.study(coverage.bernoulli, coverage.rising(41), images=100, repeats=1000)
    for wrong in WRONG:
        assert found.violated[wrong] > coverage.allowed(1000)


@pytest.mark.parametrize(("test", "chains"), [("betting", None), ("hoeffding-bentkus", (range(3), range(3, 5)))])
def test_so_it_is_with_the_whole_of_certify(test, chains):
    draw, risks = np.random.default_rng(0), coverage.waves(5)
    outcomes = []
    for _ in range(REPEATS):
        losses = coverage.bernoulli(draw, risks, 100, 1)[:, :, 0]
        costs = np.linspace(0.9, 0.5, 5)
        report = calibration.certify(
            LADDER, losses, costs, at_most=LEVEL, confidence=1 - DELTA, test=test, chains=chains
        )
        above = [risk > point.bound for risk, point in zip(risks, report.curve, strict=True)]
        chosen = 0.0 if report.chosen is None else risks[LADDER.index(report.schedule)]
        outcomes.append((chosen > LEVEL, any(above), report.chosen is not None))
    violated, exceeded, certified = np.mean(outcomes, axis=0)
    assert violated <= coverage.allowed(REPEATS)
    assert exceeded <= coverage.allowed(REPEATS)
    assert certified > 0.9
