"""Schedules of thresholds over training steps, and the loss weights of exit heads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenexit import TokenExitError
from tokenexit.training import Annealed, Drawn, loss_weights

steps = st.integers(0, 10_000)
numbers = st.floats(-10, 10)


@given(numbers, numbers, st.integers(1, 1000), st.integers(0, 1000), steps)
def test_an_annealed_number_goes_from_start_to_end_in_a_straight_line(start, end, count, wait, step):
    annealed = Annealed(start, end, steps=count, wait=wait)
    assert annealed.at(0) == start
    assert annealed.at(wait) == start
    assert annealed.at(wait + count) == end
    assert annealed.at(wait + count + step) == end
    assert min(start, end) - 1e-9 <= annealed.at(step) <= max(start, end) + 1e-9
    inside = wait + min(step, count)
    assert annealed.at(inside) == pytest.approx(start + (end - start) * min(step, count) / count)


@given(numbers, numbers, st.integers(0, 2**31 - 1), steps)
def test_a_drawn_number_is_in_its_range_and_the_same_when_asked_again(one, other, seed, step):
    drawn = Drawn(min(one, other), max(one, other), seed=seed)
    assert drawn.low <= drawn.at(step) <= drawn.high
    assert drawn.at(step) == Drawn(drawn.low, drawn.high, seed=seed).at(step)


def test_draws_are_even_and_differ_by_step_and_by_seed():
    drawn = [Drawn(0.0, 1.0, seed=3).at(step) for step in range(4000)]
    assert len(set(drawn)) == len(drawn)
    for tenth in range(10):
        assert 320 <= sum(tenth <= 10 * value < tenth + 1 for value in drawn) <= 480
    other = [Drawn(0.0, 1.0, seed=4).at(step) for step in range(4000)]
    mean, square = sum(drawn) / 4000, sum(value**2 for value in drawn) / 4000
    product = sum(a * b for a, b in zip(drawn, other, strict=True)) / 4000
    assert abs(product - mean * sum(other) / 4000) < 0.1 * (square - mean**2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Annealed(1.0, 0.9, steps=0), "`steps` must be a whole number from 1 up, got 0"),
        (lambda: Annealed(1.0, 0.9, steps=2, wait=-1), "`wait` must be a whole number from 0 up, got -1"),
        (lambda: Annealed(1.0, 0.9, steps=2).at(-1), "`step` must be a whole number from 0 up, got -1"),
        (lambda: Drawn(0.5, 0.4), "`low` must be at most `high`, 0.4, got 0.5"),
        (lambda: Drawn(float("nan"), 0.4), "`low` must be a number, got nan"),
        (lambda: Drawn(0.1, 0.4, seed=-1), "`seed` must be a whole number from 0 up, got -1"),
        (lambda: Drawn(0.1, 0.4).at(True), "`step` must be a whole number from 0 up, got True"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(TokenExitError) as found:
        make()
    assert str(found.value) == message


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (0.4, {2: 0.4, 4: 0.4, 6: 1.0}),
        (0.0, {2: 0.0, 4: 0.0, 6: 1.0}),
        ({2: 0.5, 4: 1.0}, {2: 0.5, 4: 1.0, 6: 1.0}),
        ({2: 0.5, 3: 9.0, 4: 1.0}, {2: 0.5, 3: 9.0, 4: 1.0, 6: 1.0}),
    ],
)
def test_one_weight_is_for_all_exits_and_the_final_head_counts_whole(given, wanted):
    assert loss_weights(given, exits=(2, 4), depth=6) == wanted


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "wrong", [-1.0, float("nan"), None, True, {2: -1.0, 4: 1.0}, {2: 1.0, 4: 1.0, 6: 7.0}, {"2": 1.0}]
)
def test_what_is_no_weight_is_named(wrong):
    with pytest.raises(TokenExitError) as found:
        loss_weights(wrong, exits=(2, 4), depth=6)
    rule = "`auxiliary` must be a weight from 0 up, or one for each block with an exit"
    assert str(found.value) == f"{rule}, got {wrong!r}"


def test_an_exit_without_a_weight_is_named():
    message = r"`auxiliary` must have a weight for every exit that runs, got none for \[4\]"
    with pytest.raises(TokenExitError, match=message):
        loss_weights({2: 1.0}, exits=(2, 4), depth=6)
