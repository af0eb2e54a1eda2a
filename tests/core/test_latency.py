"""Seconds of a run, by the tokens of its blocks."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.backends import each_backend
from tokenexit import TokenExitError
from tokenexit.latency import Latency

TABLE = Latency(2, (4, 8, 16), (1.0, 3.0, 9.0), rest=0.5, exit=0.25, merge=0.125)


@each_backend
def test_times_of_blocks_are_interpolated_and_add_up(backend):
    counts = backend.array(np.asarray([[0, 2, 4, 6], [8, 12, 16, 20]]))
    found = backend.numpy(TABLE.seconds(counts, exits=2, merges=1))
    blocks = np.array([0 + 0.5 + 1 + 2, 3 + 6 + 9 + 12])
    np.testing.assert_allclose(found, (blocks + 0.5 + 2 * 0.25 + 0.125) / 2, rtol=1e-6)


@given(
    st.lists(st.tuples(st.integers(1, 3000), st.floats(0, 10)), min_size=1, max_size=6, unique_by=lambda one: one[0]),
    st.lists(st.integers(0, 4000), min_size=1, max_size=5),
)
def test_it_is_numpys_interpolation_within_what_was_measured(points, counts):
    tokens, block = zip(*sorted(points), strict=True)
    table = Latency(1, tokens, block, rest=0.0, exit=0.0, merge=0.0)
    inside = np.minimum(counts, tokens[-1])
    found = table.seconds(inside[None])
    wanted = np.interp(inside, [0, *tokens], [0.0, *block]).sum()
    np.testing.assert_allclose(found, [wanted], rtol=1e-4, atol=1e-5)
    assert Latency.from_dict(json.loads(json.dumps(table.to_dict()))) == table


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "`batch` must be a whole number from 1 up, got 0"),
        ({"tokens": ()}, "`tokens` must be an ascending tuple of whole numbers from 1 up, got ()"),
        ({"tokens": (4, 4, 8)}, "`tokens` must be an ascending tuple"),
        ({"tokens": (0, 4, 8)}, "`tokens` must be an ascending tuple"),
        ({"block": (1.0,)}, "`block` must be a tuple of 3 times, one for each of `tokens`, got (1.0,)"),
        ({"block": (1.0, -1.0, 2.0)}, "`block` must be seconds, from 0 up and finite, got (1.0, -1.0, 2.0)"),
        ({"rest": math.nan}, "`rest` must be seconds"),
        ({"exit": math.inf}, "`exit` must be seconds"),
        ({"merge": "fast"}, "`merge` must be seconds"),
    ],
)
def test_what_is_no_table_is_refused(change, message):
    fields = {name: getattr(TABLE, name) for name in ("batch", "tokens", "block", "rest", "exit", "merge")}
    with pytest.raises(TokenExitError) as found:
        Latency(**{**fields, **change})
    assert str(found.value).startswith(message)
    with pytest.raises(TokenExitError, match="`latency` must have exactly the keys"):
        Latency.from_dict(change)
    with pytest.raises(TokenExitError, match="`exits` must be a whole number from 0 up, got -1"):
        TABLE.seconds(np.ones((1, 2)), exits=-1)
