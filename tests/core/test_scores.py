import numpy as np
import pytest
from hypothesis import given

from tests.core import oracles, strategies
from tests.core.backends import each_backend
from tokenexit import TokenExitError, scores

NAMES = ("confidence", "entropy", "margin")


@each_backend
@pytest.mark.parametrize("name", NAMES)
@given(logits=strategies.logits())
def test_score_is_that_of_the_oracle(backend, name, logits):
    with np.errstate(all="ignore"):
        got = backend.numpy(getattr(scores, name)(backend.array(logits)))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, getattr(oracles, name)(logits), rtol=1e-5, atol=1e-5)


@each_backend
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_are_scored_in_float32(backend, name, dtype):
    if dtype is np.float16 and backend.name == "array-api-strict":
        pytest.skip("the standard has no float16")
    logits = np.array([[6e4, -6e4, 0.0], [1.0, 2.0, 3.0]], dtype=dtype)
    got = backend.numpy(getattr(scores, name)(backend.array(logits)))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, getattr(oracles, name)(logits), atol=1e-5)


@pytest.mark.parametrize("classes", [2, 11, 150])
def test_entropy_is_one_where_nothing_is_known_whatever_the_class_count(classes):
    assert scores.entropy(np.zeros((1, classes), np.float32))[0] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_leading_axes_are_kept(name):
    assert getattr(scores, name)(np.zeros((2, 3, 4), np.float32)).shape == (2, 3)


@each_backend
@pytest.mark.parametrize("name", NAMES)
def test_no_classes_is_an_error_that_says_so(backend, name):
    with pytest.raises(TokenExitError, match=r"`logits` must have at least one class .*got shape \(3, 0\)"):
        getattr(scores, name)(backend.array(np.zeros((3, 0), np.float32)))
