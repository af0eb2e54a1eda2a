"""Tests of a mean, and the bounds that they give."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.core import oracles
from tests.core.backends import each_backend
from tests.core.strategies import fewer
from tokenexit import TokenExitError
from tokenexit.guarantees import bounds
from tokenexit.guarantees.bounds import images_needed, p_values, upper_bounds

TESTS = ("betting", "hoeffding-bentkus")
LOSS = st.sampled_from([0.0, 1.0, 0.5, 0.25]) | st.floats(0, 1, width=16)
LOSSES = st.tuples(st.integers(1, 60), st.integers(1, 4)).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=LOSS)
)
SHARE = st.floats(0.001, 0.999)


@each_backend
@given(losses=LOSSES, at_most=SHARE, delta=SHARE)
def test_p_values_are_those_of_the_oracle(backend, losses, at_most, delta):
    here = backend.array(losses)
    bet = backend.numpy(p_values(here, at_most=at_most, delta=delta))
    other = backend.numpy(p_values(here, at_most=at_most, delta=delta, test="hoeffding-bentkus"))
    for column, row in enumerate(backend.held(losses).astype(float).T.tolist()):
        assert bet[column] == pytest.approx(oracles.betting(row, at_most, delta), rel=1e-5)  # bets up to 1 - 1e-9
        assert other[column] == pytest.approx(oracles.hoeffding_bentkus(row, at_most), rel=1e-9)


@fewer(2)
@given(losses=LOSSES, delta=SHARE, test=st.sampled_from(TESTS))
def test_an_upper_bound_is_where_the_test_begins_to_pass(losses, delta, test):
    bound = upper_bounds(losses, delta=delta, test=test)
    assert ((bound > 0) & (bound <= 1)).all()
    inside = bound < 1
    above = np.where(inside, bound, 0.5)
    p = p_values(losses, at_most=above, delta=delta, test=test)
    assert (p <= delta)[inside].all()
    below = bound - 2e-9
    p = p_values(losses, at_most=np.where(below > 0, below, 0.5), delta=delta, test=test)
    assert (p > delta)[below > 0].all()


@pytest.mark.parametrize("test", TESTS)
@given(losses=LOSSES, levels=st.tuples(SHARE, SHARE))
def test_a_higher_level_is_never_harder(test, losses, levels):
    low, high = sorted(levels)
    p = [p_values(losses, at_most=level, test=test) for level in (low, high)]
    assert (p[1] <= p[0] * (1 + 1e-9)).all()


@given(losses=LOSSES, seed=st.integers(0, 9))
def test_only_betting_looks_at_the_order(losses, seed):
    order = np.random.default_rng(seed).permutation(len(losses))
    one, other = (p_values(x, at_most=0.3, test="hoeffding-bentkus") for x in (losses, losses[order]))
    np.testing.assert_allclose(one, other)


def test_columns_have_any_shape_and_levels_of_their_own():
    losses = np.random.default_rng(0).beta(0.2, 5, (80, 3, 2))
    levels = np.linspace(0.02, 0.2, 6).reshape(3, 2)
    for test in TESTS:
        together = p_values(losses, at_most=levels, test=test)
        apart = [p_values(losses[:, i, j], at_most=float(levels[i, j]), test=test) for i in range(3) for j in range(2)]
        np.testing.assert_allclose(together, np.reshape(apart, (3, 2)), rtol=1e-12)
        assert upper_bounds(losses, test=test).shape == (3, 2)
        assert p_values(losses[:, :, :0], at_most=0.1, test=test).shape == (3, 0)


def test_jax_arrays_are_tested_in_double_precision():
    jax = pytest.importorskip("jax")
    losses = np.random.default_rng(0).random((50, 3), np.float32) * 0.1
    for test in TESTS:
        found = p_values(jax.numpy.asarray(losses), at_most=0.09, test=test)
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found, p_values(losses, at_most=0.09, test=test))


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("images", [1, 2, 50, 20_000])
def test_extremes_are_finite_and_on_the_safe_side(test, images):
    losses = np.stack([np.zeros(images), np.ones(images), np.arange(images) % 2.0], axis=1)
    for at_most in (1e-9, 1e-3, 0.5, 1 - 1e-9):
        p = p_values(losses, at_most=at_most, test=test)
        assert ((p >= 0) & (p <= 1)).all()
        assert p[1] == 1.0
        assert p[0] >= (1 - at_most) ** images * (1 - 1e-9), "no test rejects more than the likelihood allows"
    bound = upper_bounds(losses, test=test)
    assert bound[1] == 1
    if images >= 50:
        assert 0 < bound[0] < 0.07 < 0.5 < bound[2] < 1


@given(images=st.integers(1, 3000), chance=SHARE, data=st.data())
def test_the_binomial_tail_is_that_of_scipy(images, chance, data):
    stats = pytest.importorskip("scipy.stats")
    most = math.ceil(images * chance) - 1
    successes = float(data.draw(st.integers(0, max(0, most))))
    found = float(bounds._log_lower_tail(np.asarray([successes]), images, np.asarray([chance]))[0])
    expected = stats.binom.logcdf(successes, images, chance)
    # Near the end of doubles scipy is off by up to 1e-3, where ours is that of exact sums.
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9) or max(expected, found) < -600
    assert bounds._log_lower_tail(np.asarray([most + 1.0]), images, np.asarray([chance]))[0] == 0.0


def test_the_binomial_tail_is_exact_where_doubles_end():
    images, chance, successes = 122, 0.9987437376890426, 13
    share = Fraction(chance)
    terms = (math.comb(images, k) * share**k * (1 - share) ** (images - k) for k in range(successes + 1))
    exact = sum(terms)
    found = float(bounds._log_lower_tail(np.asarray([float(successes)]), images, np.asarray([chance]))[0])
    assert found == pytest.approx(math.log(exact.numerator) - math.log(exact.denominator), rel=1e-12)


@fewer(2)
@given(losses=LOSSES, at_most=SHARE)
def test_hoeffding_bentkus_and_fixed_sequences_are_those_of_mapie(losses, at_most):
    pytest.importorskip("mapie")
    from mapie.risk_control.fwer_control import FWERFixedSequenceTesting, control_fwer
    from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value

    from tokenexit.guarantees.calibration import fixed_sequence

    losses = losses.astype(float)
    found = p_values(losses, at_most=at_most, test="hoeffding-bentkus")
    total = losses.sum(axis=0)
    kept = np.ceil(total / len(losses) * len(losses)) == np.ceil(total)  # MAPIE rounds the sum twice
    expected = compute_hoeffding_bentkus_p_value(losses.mean(axis=0), len(losses), at_most)[:, 0]
    np.testing.assert_allclose(found[kept], np.minimum(expected, 1)[kept], rtol=1e-7)
    for method in ("fixed_sequence", FWERFixedSequenceTesting(n_starts=1)):
        certified = control_fwer(found, delta=0.3, fwer_method=method)
        assert list(certified) == list(range(fixed_sequence(found, delta=0.3)))


@pytest.mark.parametrize(("at_most", "delta"), [(0.02, 0.05), (0.1, 0.1), (0.5, 0.25), (0.9, 0.5), (0.003, 0.01)])
def test_so_many_images_and_no_fewer(at_most, delta):
    any_test = images_needed(at_most=at_most, delta=delta)
    assert (1 - at_most) ** any_test <= delta * (1 + 1e-9)
    assert any_test == 1 or (1 - at_most) ** (any_test - 1) > delta
    for test in TESTS:
        needed = images_needed(at_most=at_most, delta=delta, test=test)
        assert any_test <= needed <= (1.15 if at_most <= 0.1 else 4) * any_test
        p = [
            float(p_values(np.zeros(n), at_most=at_most, delta=delta, test=test)) for n in (needed, max(1, needed - 1))
        ]
        assert p[0] <= delta * (1 + 1e-9)
        assert needed == 1 or p[1] > delta
    assert images_needed(at_most=0.02) == images_needed(at_most=0.02, test="hoeffding-bentkus") == 149
    assert images_needed(at_most=0.02, test="betting") == 154


@pytest.mark.parametrize(
    ("images", "at_most", "delta"), [(9000, 0.0007, 0.05), (60_000, 1e-4, 0.01), (20_000, 2e-4, 0.9)]
)
def test_many_images_cost_no_more_and_are_as_exact(images, at_most, delta):
    exact = oracles.betting([0.0] * images, at_most, delta)
    assert bounds._betting_on_zeros(images, at_most, delta) == pytest.approx(exact, rel=1e-7)
    assert images_needed(at_most=1e-12, test="betting") == pytest.approx(3.0659e12, rel=1e-4)


def test_betting_knows_that_the_losses_are_alike():
    """The sharper test where losses are small shares; about equal where they are 0 or 1."""
    draw = np.random.default_rng(0)
    shares, flags = draw.beta(0.2, 19.8, (500, 50)), (draw.random((500, 50)) < 0.01).astype(float)
    bound = {test: upper_bounds(shares, test=test).mean() for test in TESTS}
    assert bound["betting"] < 0.018 < 0.023 < bound["hoeffding-bentkus"] < 0.027
    bound = {test: upper_bounds(flags, test=test).mean() for test in TESTS}
    assert abs(bound["betting"] - bound["hoeffding-bentkus"]) < 0.004


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "call", [lambda x, **k: p_values(x, **({"at_most": 0.1} | k)), lambda x, **k: upper_bounds(x, **k)]
)
@pytest.mark.parametrize(
    ("losses", "options", "message"),
    [
        (np.ones((0, 2)), {}, "`losses` must be an array with at least one image on its first axis, got an array of"),
        ([0.5], {}, "`losses` must be an array with at least one image on its first axis, got [0.5]"),
        (np.asarray([0.1, np.nan]), {}, "`losses` must be numbers: an image about which nothing is known, as one without"),
        (np.asarray([0.1, 1.1]), {}, "`losses` must be numbers in [0, 1], every one of them, got others among them"),
        (np.asarray([0.1 + 0j]), {}, "`losses` must be real numbers, got dtype complex128"),
        (np.zeros(3), {"delta": None}, "`delta` must lie between 0 and 1, got None"),
        (np.zeros(3), {"delta": "0.1"}, "`delta` must lie between 0 and 1, got '0.1'"),
        (np.asarray([0.1, -1e-9]), {}, "`losses` must be numbers in [0, 1]"),
        (np.asarray([0.1, 1.01]), {}, "`losses` must be numbers in [0, 1]"),
        (np.ones(3), {"delta": 0.0}, "`delta` must lie between 0 and 1, got 0.0"),
        (np.ones(3), {"test": "luck"}, "`test` must be one of betting, hoeffding-bentkus, got 'luck'"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, losses, options, message):
    with pytest.raises(TokenExitError) as found:
        call(losses, **options)
    assert str(found.value).startswith(message)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: p_values(np.ones(3), at_most=1.0), "`at_most` must lie between 0 and 1, got 1.0"),
        (
            lambda: p_values(np.ones((3, 2)), at_most=np.asarray([0.1, 0.0])),
            "`at_most` must lie between 0 and 1, got an",
        ),
        (lambda: images_needed(at_most=0), "`at_most` must lie between 0 and 1, got 0"),
        (lambda: images_needed(at_most=0.1, delta=math.nan), "`delta` must lie between 0 and 1, got nan"),
        (lambda: images_needed(at_most=0.1, test="luck"), "`test` must be None or one of betting, hoeffding-bentkus"),
    ],
)
def test_bad_levels_are_named(call, message):
    with pytest.raises(TokenExitError) as found:
        call()
    assert str(found.value).startswith(message)
