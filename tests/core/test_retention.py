import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.core import oracles
from tests.core.backends import each_backend
from tokenexit import TokenExitError, retention

SCORE = st.sampled_from([0.0, 0.25, 0.5, 1.0, np.nan, np.inf, -np.inf]) | st.floats(0, 1, width=32)


@st.composite
def ranked(draw):
    n = draw(st.integers(0, 30))
    score = draw(hnp.arrays(np.float32, n, elements=SCORE))
    group = draw(hnp.arrays(np.int64, n, elements=st.integers(0, 4)))
    candidate = draw(hnp.arrays(np.bool_, n))
    return score, group, candidate


@each_backend
@given(drawn=ranked())
def test_rank_is_that_of_the_oracle(backend, drawn):
    score, group, _ = drawn
    got = backend.numpy(retention.rank_in_group(backend.array(score), backend.array(group)))
    np.testing.assert_array_equal(got, oracles.rank_in_group(score, group))


@each_backend
@given(drawn=ranked(), k=st.integers(0, 40))
def test_the_most_confident_candidates_of_each_group_are_marked(backend, drawn, k):
    score, group, candidate = drawn
    arrays = (backend.array(x) for x in (candidate, score, group))
    got = backend.numpy(retention.top_k_per_group(*arrays, k=k))
    for one in set(group.tolist()):
        rows = [i for i in range(len(score)) if group[i] == one and candidate[i]]
        rows.sort(key=lambda i: (np.inf if np.isnan(score[i]) else -score[i], i))
        assert {i for i in range(len(score)) if group[i] == one and got[i]} == set(rows[:k])


@pytest.mark.usefixtures("unchecked")
def test_shapes_and_k_are_checked():
    with pytest.raises(TokenExitError, match=r"`group` must .*\(3,\), got shape \(2,\)"):
        retention.rank_in_group(np.zeros(3, np.float32), np.zeros(2, np.int64))
    with pytest.raises(TokenExitError, match="`k` must be at least 0, got -1"):
        retention.top_k_per_group(np.ones(1, bool), np.ones(1, np.float32), np.zeros(1, np.int64), k=-1)
