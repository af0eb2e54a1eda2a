from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.core import oracles, strategies
from tests.core.backends import BACKENDS, each_backend
from tokenexit import TokenExitError, retention

SCORE = st.sampled_from([0.0, 0.25, 0.5, 1.0, np.nan, np.inf, -np.inf]) | st.floats(0, 1, width=32)


@st.composite
def ranked(draw):
    n = draw(st.integers(0, 30))
    score = draw(hnp.arrays(np.float32, n, elements=SCORE))
    group = draw(hnp.arrays(draw(st.sampled_from([np.int64, np.int32])), n, elements=st.integers(0, 4)))
    candidate = draw(hnp.arrays(np.bool_, n))
    return score, group, candidate


def marked(backend, candidate, score, group, **more):
    arrays = (backend.array(x) for x in (candidate, score, group))
    return backend.numpy(retention.top_k_per_group(*arrays, **more))


@each_backend
@given(drawn=ranked())
def test_rank_is_that_of_the_oracle(backend, drawn):
    score, group, _ = drawn
    got = backend.numpy(retention.rank_in_group(backend.array(score), backend.array(group)))
    np.testing.assert_array_equal(got, oracles.rank_in_group(backend.held(score), group))


@each_backend
@given(drawn=ranked(), k=st.integers(0, 40))
def test_the_most_confident_candidates_of_each_group_are_marked(backend, drawn, k):
    score, group, candidate = drawn
    got = marked(backend, candidate, score, group, k=k, groups=5)
    score = backend.held(score)
    for one in set(group.tolist()):
        rows = [i for i in range(len(score)) if group[i] == one and candidate[i]]
        rows.sort(key=lambda i: (np.inf if np.isnan(score[i]) else -score[i], i))
        assert {i for i in range(len(score)) if group[i] == one and got[i]} == set(rows[:k])
    np.testing.assert_array_equal(got, oracles.top_k_per_group(candidate, score, group, k))


def spread(tokens, groups, kind, seed):
    """Scores as they come: random, nearly all of them certain, all equal, with NaN, rising and falling."""
    rng = np.random.default_rng(seed)
    score = rng.random(tokens)
    score = {
        "random": score,
        "certain": 1 - score**9,
        "saturated": np.where(score < 0.95, 1.0, score),
        "equal": np.zeros(tokens),
        "odd": np.where(score < 0.4, rng.choice([np.nan, np.inf, -np.inf], tokens), score * 9 - 4),
        "unknown": np.full(tokens, np.nan),
        "rising": np.arange(tokens) / max(1, tokens),
        "falling": -np.arange(tokens) / max(1, tokens),
    }[kind]
    group = rng.integers(0, groups, tokens)
    group = np.where(rng.random(tokens) < 0.5, group, group % 2)  # some groups are far larger
    return rng.random(tokens) < rng.choice([0.05, 0.6, 1.0]), score.astype(np.float32), group


KINDS = ("random", "certain", "saturated", "equal", "odd", "unknown", "rising", "falling")


@each_backend
@strategies.fewer(2)
@given(
    tokens=st.integers(0, 200),
    groups=st.sampled_from([1, 2, 7, 300]),
    kind=st.sampled_from(KINDS),
    k=st.integers(0, 9),
    seed=st.integers(0, 2**20),
    limits=st.sampled_from([(0, 0), (10, 20), (10, 150), (100, 100)]),
)
def test_the_size_limits_change_nothing_but_the_speed(backend, tokens, groups, kind, k, seed, limits):
    candidate, score, group = spread(tokens, groups, kind, seed)
    with mock.patch.multiple(retention, FEW_TO_SORT=limits[0], MANY_TO_SORT=limits[1]):
        got = marked(backend, candidate, score, group, k=k, groups=groups)
    np.testing.assert_array_equal(got, oracles.top_k_per_group(candidate, backend.held(score), group, k))


@each_backend
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tokens", "groups", "k"),
    [(5000, 1, 5), (5000, 40, 5), (5000, 4000, 2), (2500, 200, 3), (3000, 8, 2999), (40_000, 3, 4), (40_000, 900, 12)],
)
def test_rows_as_long_as_a_batch_are_marked_as_by_sorting_it_all(backend, kind, tokens, groups, k):
    candidate, score, group = spread(tokens, groups, kind, seed=tokens + k)
    wanted = oracles.top_k_per_group(candidate, backend.held(score), group, k)
    np.testing.assert_array_equal(marked(backend, candidate, score, group, k=k, groups=groups), wanted)


@each_backend
def test_groups_of_fewer_bits_do_not_overflow(backend):
    for tokens, groups in ((5000, 4000), (12_000, 2500), (40_000, 150_000)):
        candidate, score, group = spread(tokens, groups, "random", seed=3)
        got = marked(backend, candidate, score, group.astype(np.int32), k=1, groups=groups)
        np.testing.assert_array_equal(got, oracles.top_k_per_group(candidate, backend.held(score), group, 1))


@each_backend
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(0, 30)),
    groups=st.sampled_from([1, 3, 40]),
    kind=st.sampled_from(KINDS),
    k=st.integers(0, 40),
    seed=st.integers(0, 2**20),
)
def test_rows_of_fixed_length_are_never_compared_with_each_other(backend, shape, groups, kind, k, seed):
    candidate, score, group = (x.reshape(shape) for x in spread(shape[0] * shape[1], groups, kind, seed))
    got = marked(backend, candidate, score, group, k=k, groups=groups)
    assert got.shape == shape
    wanted = [oracles.top_k_per_group(candidate[i], backend.held(score[i]), group[i], k) for i in range(shape[0])]
    np.testing.assert_array_equal(got, np.array(wanted, dtype=bool).reshape(shape))


@each_backend
def test_long_rows_of_fixed_length_are_marked_too(backend):
    for groups in (3, 3000):
        parts = [spread(3000, groups, kind, seed) for seed, kind in enumerate(KINDS)]
        candidate, score, group = (np.stack(x) for x in zip(*parts, strict=True))
        got = marked(backend, candidate, score, group, k=5, groups=groups)
        for i in range(len(KINDS)):
            wanted = oracles.top_k_per_group(candidate[i], backend.held(score[i]), group[i], 5)
            np.testing.assert_array_equal(got[i], wanted)


def row(array, tokens=3):
    return array(np.ones(tokens, bool)), array(np.ones(tokens, np.float32)), array(np.zeros(tokens, np.int64))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (
            lambda array: retention.rank_in_group(row(array)[1], row(array, 2)[2]),
            "`group` must have one entry for each of the scores, of shape (3,), got shape (2,)",
        ),
        (
            lambda array: retention.rank_in_group(array(np.ones((1, 3), np.float32)), array(np.ones((1, 3), np.int64))),
            "`group` must have one entry for each of the scores, of shape (1, 3), got shape (1, 3)",
        ),
        (lambda array: retention.top_k_per_group(*row(array), k=-1, groups=1), "`k` must be at least 0, got -1"),
        (lambda array: retention.top_k_per_group(*row(array), k=1, groups=0), "`groups` must be at least 1, got 0"),
        (
            lambda array: retention.top_k_per_group(row(array)[0], *row(array, 2)[1:], k=1, groups=1),
            "`score` must have one entry for each of the candidates, of shape (3,), got shape (2,)",
        ),
        (
            lambda array: retention.top_k_per_group(*row(array)[:2], row(array, 4)[2], k=1, groups=1),
            "`group` must have one entry for each of the candidates, of shape (3,), got shape (4,)",
        ),
        (
            lambda array: retention.top_k_per_group(
                array(np.asarray(True)), array(np.asarray(1, np.float32)), array(np.asarray(0)), k=1, groups=1
            ),
            "`score` must have one entry for each of the candidates, of shape (), got shape ()",
        ),
    ],
)
def test_every_library_fails_with_the_same_words(fail, message):
    for backend in BACKENDS:
        with pytest.raises(TokenExitError) as caught:
            fail(backend.array)
        assert str(caught.value) == message


@each_backend
def test_groups_may_be_more_than_the_dtype_of_their_ids_holds(backend):
    candidate, score = np.array([False, True, False, True]), np.array([0.9, 0.1, 0.8, 0.2], np.float32)
    group = np.zeros(4, np.int8)
    got = retention.top_k_per_group(*map(backend.array, (candidate, score, group)), k=1, groups=128)
    np.testing.assert_array_equal(backend.numpy(got), [False, False, False, True])
