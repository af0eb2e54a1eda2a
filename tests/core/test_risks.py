"""Losses of images over label maps."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.core.backends import each_backend
from tokenexit import TokenExitError
from tokenexit.guarantees import risks

SHAPE = st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 4))
MAPS = SHAPE.flatmap(lambda shape: st.tuples(*[hnp.arrays(np.int64, shape, elements=st.integers(0, 3))] * 3))


def share(marks):
    marks = list(marks)
    return sum(marks) / len(marks) if marks else math.nan


@each_backend
@given(maps=MAPS, data=st.data())
def test_losses_are_those_of_a_walk_over_the_pixels(backend, maps, data):
    exiting, *_ = maps
    valid = data.draw(hnp.arrays(np.bool_, exiting.shape))
    here = [backend.array(x) for x in maps]
    apart = backend.numpy(risks.disagreement(*here[:2], valid=backend.array(valid)))
    everywhere = backend.numpy(risks.disagreement(*here[:2]))
    more = backend.numpy(risks.error_increase(*here, classes=3, ignore=3))
    strange = backend.numpy(risks.error_increase(*here, classes=3))
    iou = backend.numpy(risks.iou_loss(*here[:2], classes=4, at_least=0.7, valid=backend.array(valid)))
    some = backend.numpy(risks.iou_loss(*here[:2], classes=(2, 0), at_least=0.7, valid=backend.array(valid)))
    np.testing.assert_array_equal(some, iou[:, [2, 0]])
    assert apart.shape == more.shape == (len(exiting),)
    assert iou.shape == (len(exiting), 4)
    for image in range(len(exiting)):
        pixels = [(*x,) for x in zip(*(m[image].ravel().tolist() for m in (*maps, valid)), strict=True)]
        counted = [(e, d) for e, d, _, ok in pixels if ok]
        assert apart[image] == pytest.approx(share(e != d for e, d in counted), nan_ok=True)
        assert everywhere[image] == pytest.approx(share(e != d for e, d, *_ in pixels), nan_ok=True)
        labelled = [(e, d, t) for e, d, t, _ in pixels if t != 3]
        gain = share((e != t) - (d != t) for e, d, t in labelled)
        gain = 0.0 if gain < 0 else gain
        assert more[image] == pytest.approx(gain, abs=1e-6, nan_ok=True)
        assert strange[image] == pytest.approx(
            gain if len(labelled) == len(pixels) else math.nan, abs=1e-6, nan_ok=True
        )
        for one in range(4):
            both, either = share(e == d == one for e, d in counted), share(one in pair for pair in counted)
            assert iou[image, one] == pytest.approx(0.7 * either - both + 0.3, abs=1e-6, nan_ok=True)


@given(maps=MAPS, at_least=st.floats(0.05, 0.95))
def test_a_class_reaches_its_iou_exactly_if_its_mean_loss_is_small_enough(maps, at_least):
    exiting, dense, _ = maps
    mean = risks.iou_loss(exiting, dense, classes=4, at_least=at_least).astype(float)
    if exiting.size == 0:
        assert np.isnan(mean).all()
        return
    assert ((mean >= 0) & (mean <= 1)).all()
    for one in range(4):
        both, either = ((exiting == one) & (dense == one)).sum(), ((exiting == one) | (dense == one)).sum()
        if either and abs(both / either - at_least) > 1e-4:
            assert (mean[:, one].mean() <= 1 - at_least) == (both / either >= at_least)


def test_void_labels_do_not_count_and_gains_do_not_pay():
    truth = np.asarray([[1, 1, 1, 255], [2, 2, 2, 2]])
    dense = np.asarray([[1, 1, 0, 0], [0, 0, 2, 2]])
    exiting = np.asarray([[1, 0, 0, 7], [2, 2, 2, 2]])
    increase = risks.error_increase(exiting, dense, truth, classes=3, ignore=255)
    np.testing.assert_allclose(increase, [1 / 3, 0.0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.int64])
def test_labels_that_say_nothing_have_no_loss(dtype):
    """Ignored everywhere, `ignore` forgotten, ids out of range, negative: a loss of 0 would certify anything."""
    exiting, dense = np.zeros((4, 3), dtype), np.ones((4, 3), dtype)
    truth = np.asarray([[127, 127, 127], [0, 127, 1], [100, 0, 0], [1, 0, 0]]).astype(dtype)
    found = risks.error_increase(exiting, dense, truth, classes=5, ignore=127)
    assert np.isnan(found).tolist() == [True, False, True, False]
    assert np.isnan(risks.error_increase(exiting, dense, truth, classes=5)).tolist() == [True, True, True, False]
    # No type wraps a number that it cannot hold: all of these labels are classes, and none is to be ignored.
    assert not np.isnan(risks.error_increase(exiting, dense, truth, classes=300, ignore=-100)).any()
    if np.issubdtype(dtype, np.signedinteger):
        assert np.isnan(risks.error_increase(exiting, dense, -truth, classes=300)).all()
    nothing = risks.disagreement(exiting, dense, valid=np.zeros((4, 3), bool))
    assert np.isnan(nothing).all()


def test_jax_compiles_them():
    jax = pytest.importorskip("jax")
    one, other = jax.numpy.asarray([[0, 1], [1, 1]]), jax.numpy.asarray([[0, 0], [1, 1]])
    np.testing.assert_allclose(jax.jit(risks.disagreement)(one, other), [0.5, 0.0])
    loss = jax.jit(lambda a, b: risks.iou_loss(a, b, classes=2, at_least=0.5))(one, other)
    np.testing.assert_allclose(loss, risks.iou_loss(np.asarray(one), np.asarray(other), classes=2, at_least=0.5))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, b: risks.disagreement(a, b), "`dense` must be of one shape with `exiting`, got shape (2, 4)"),
        (lambda a, b: risks.disagreement(a, a, valid=b > 0), "`valid` must be of one shape with `exiting`, got"),
        (
            lambda a, b: risks.error_increase(a, a, b, classes=3),
            "`truth` must be of one shape with `exiting`, got shape (2, 4)",
        ),
        (lambda a, b: risks.error_increase(a, a, a, classes=0), "`classes` must be a whole number from 1 up, got 0"),
        (lambda a, b: risks.error_increase(a, a, a > 0, classes=3), "`truth` must be of whole numbers, got dtype bool"),
        (lambda a, b: risks.disagreement(a, a * 1.0), "`dense` must be of whole numbers, got dtype float64"),
        (lambda a, b: risks.disagreement(a, a, valid=a), "`valid` must be of true and false, got dtype int64"),
        (lambda a, b: risks.iou_loss(a, b, classes=2, at_least=0.5), "`reference` must be of one shape with"),
        (
            lambda a, b: risks.iou_loss(a, a, classes=(1, 1), at_least=0.5),
            "`classes` must be how many there are, or some",
        ),
        (
            lambda a, b: risks.iou_loss(a, a, classes=(0.5,), at_least=0.5),
            "`classes` must be how many there are, or some",
        ),
        (
            lambda a, b: risks.iou_loss(a, a, classes=(-1,), at_least=0.5),
            "`classes` must be how many there are, or some",
        ),
        (
            lambda a, b: risks.iou_loss(a, a, classes=(), at_least=0.5),
            "`classes` must be how many there are, or some of",
        ),
        (lambda a, b: risks.iou_loss(a, a, classes=2, at_least=1.0), "`at_least` must lie between 0 and 1, got 1.0"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(TokenExitError) as found:
        call(np.zeros((2, 3), int), np.zeros((2, 4), int))
    assert str(found.value).startswith(message)
