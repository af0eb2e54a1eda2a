import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.core import oracles, strategies
from tests.core.backends import BACKENDS, each_backend
from tokenexit import TokenExitError, scores

NAMES = ("confidence", "entropy", "margin")


def scored(backend, name, *arrays):
    """The score, in NumPy; it is float32 whatever came in."""
    with np.errstate(all="ignore"):
        got = getattr(scores, name)(*(backend.array(x) for x in arrays))
    assert str(got.dtype).endswith("float32")
    return backend.numpy(got)


@each_backend
@pytest.mark.parametrize("name", NAMES)
@given(logits=strategies.logits())
def test_score_is_that_of_the_oracle(backend, name, logits):
    with np.errstate(all="ignore"):
        wanted = getattr(oracles, name)(backend.held(logits))
    got = scored(backend, name, logits)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert ((got >= 0) & (got <= 1 + 1e-6) | np.isnan(got)).all()


@each_backend
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_are_scored_in_float32(backend, name, dtype):
    if dtype is np.float16 and backend.name == "array-api-strict":
        pytest.skip("the standard has no float16")
    logits = np.array([[6e4, -6e4, 0.0], [1.0, 2.0, 3.0]], dtype=dtype)
    np.testing.assert_allclose(scored(backend, name, logits), getattr(oracles, name)(logits), atol=1e-5)


@pytest.mark.parametrize("classes", [2, 11, 150])
def test_entropy_is_one_where_nothing_is_known_whatever_the_class_count(classes):
    assert scores.entropy(np.zeros((1, classes), np.float32))[0] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_leading_axes_are_kept(name):
    assert getattr(scores, name)(np.zeros((2, 3, 4), np.float32)).shape == (2, 3)


LOGIT = st.floats(-200, 200, width=32) | st.sampled_from([*strategies.ODD, 3e38, -3e38])
PRESENCE = st.floats(0, 1, width=32) | st.sampled_from([0.0, 1.0, np.nan])


@st.composite
def masks(draw):
    """Mask logits of images, their tokens and classes, and presence in each shape that fits."""
    shape = draw(st.tuples(st.integers(1, 2), st.integers(0, 7), st.integers(1, 4)))
    logits = draw(hnp.arrays(np.float32, shape, elements=LOGIT))
    images, tokens, classes = shape
    of = draw(st.sampled_from([(classes,), (1, 1, classes), (images, 1, classes), (1, tokens, classes), shape]))
    return logits, draw(hnp.arrays(np.float32, of, elements=PRESENCE))


@each_backend
@given(drawn=masks())
def test_mask_scores_are_presence_times_sigmoid(backend, drawn):
    logits, presence = drawn
    got = scored(backend, "mask_scores", logits, presence)
    with np.errstate(all="ignore"):
        held, there = backend.held(logits), backend.held(presence)
    assert got.shape == logits.shape
    np.testing.assert_allclose(got, oracles.mask_scores(held, there), rtol=1e-5, atol=1e-30)
    unknown = np.isnan(held) | np.isnan(there)
    np.testing.assert_array_equal(np.isnan(got), unknown)
    assert ((got >= 0) & (got <= there) | unknown).all()


@each_backend
def test_mask_scores_of_extreme_logits(backend):
    logits = np.array([[np.inf, 6e4, 0, -6e4, -np.inf, np.nan]], np.float32)
    got = scored(backend, "mask_scores", logits, np.full(6, 0.5, np.float32))
    np.testing.assert_array_equal(got, [[0.5, 0.5, 0.25, 0, 0, np.nan]])


FAILURES = [
    *((lambda array, name=name: getattr(scores, name)(array(np.zeros((3, 1), np.float32)))) for name in NAMES),
    *((lambda array, name=name: getattr(scores, name)(array(np.zeros((3, 0), np.float32)))) for name in NAMES),
    *((lambda array, name=name: getattr(scores, name)(array(np.float32(0)))) for name in NAMES),
    lambda array: scores.mask_scores(array(np.zeros((3, 0), np.float32)), array(np.zeros(0, np.float32))),
    lambda array: scores.mask_scores(array(np.zeros((3, 2), np.float32)), array(np.zeros(3, np.float32))),
    lambda array: scores.mask_scores(array(np.zeros((3, 2), np.float32)), array(np.zeros((3, 1), np.float32))),
    lambda array: scores.mask_scores(array(np.zeros((3, 2), np.float32)), array(np.float32(0))),
]
MESSAGES = [
    *[f"`logits` must have at least two classes on its last axis ({scores.ONE}), got shape (3, 1)"] * 3,
    *[f"`logits` must have at least two classes on its last axis ({scores.ONE}), got shape (3, 0)"] * 3,
    *[f"`logits` must have at least two classes on its last axis ({scores.ONE}), got shape ()"] * 3,
    "`mask_logits` must have at least one class on its last axis, got shape (3, 0)",
    "`presence` must have 2 classes on its last axis, got shape (3,)",
    "`presence` must have 2 classes on its last axis, got shape (3, 1)",
    "`presence` must have 2 classes on its last axis, got shape ()",
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("fail", "message"), list(zip(FAILURES, MESSAGES, strict=True)))
def test_every_library_fails_with_the_same_words(fail, message):
    for backend in BACKENDS:
        with pytest.raises(TokenExitError) as caught:
            fail(lambda x, backend=backend: backend.array(np.asarray(x)))
        assert str(caught.value) == message
