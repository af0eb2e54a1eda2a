"""Sliding windows: where they lie, what is cut out, how windows share in a pixel, and how their scores are joined."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core import strategies
from tests.core.backends import each_backend
from tokenexit import TokenExitError
from tokenexit.windows import Windows, blended, crops, shares

sides = st.integers(1, 30)
small = strategies.windows(largest=8)
each_blend = pytest.mark.parametrize("blend", ["uniform", "linear"])


def pictures(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def in_words(windows):
    """What a window counts for at each of its pixels, in the words of `Windows`."""
    if windows.blend == "uniform":
        return np.ones(windows.size)
    down, across = (1 - np.abs(np.arange(side) + 0.5 - side / 2) / (side / 2) for side in windows.size)
    return down[:, None] * across


def slow(scores, windows, images, height, width):
    """Window by window, sought among all places where one could lie; in double precision."""
    high, wide = windows.size
    tops, lefts = (
        sorted({min(start, max(side - window, 0)) for start in range(0, side, stride)})
        for side, window, stride in zip((height, width), windows.size, windows.stride, strict=True)
    )
    shape = (max(height, high), max(width, wide))
    total, share = np.zeros((images, scores.shape[1], *shape)), np.zeros(shape)
    places = itertools.product(range(images), tops, lefts)
    for (image, top, left), pixels in zip(places, scores.astype(np.float64), strict=True):
        total[image, :, top : top + high, left : left + wide] += in_words(windows) * pixels
    for top, left in itertools.product(tops, lefts):
        share[top : top + high, left : left + wide] += in_words(windows)
    return (total / share)[:, :, :height, :width]


@given(strategies.windows(), st.integers(1, 100), st.integers(1, 100))
def test_windows_lie_inside_cover_every_pixel_and_end_at_the_edge(windows, height, width):
    corners = windows.corners(height, width)
    assert len(set(corners)) == len(corners)
    assert list(corners) == sorted(corners)
    for axis, (side, window, stride) in enumerate(zip((height, width), windows.size, windows.stride, strict=True)):
        starts = sorted({corner[axis] for corner in corners})
        assert starts[0] == 0
        assert starts[-1] == max(0, side - window)
        assert all(0 < after - before <= stride for before, after in itertools.pairwise(starts))
        assert all(start % stride == 0 for start in starts[:-1])
        covered = {pixel for start in starts for pixel in range(start, start + window)}
        assert covered >= set(range(side))
        assert len(starts) == 1 + -(-max(0, side - window) // stride)


@given(strategies.windows(), sides, sides)
def test_with_its_padding_an_image_holds_a_window_and_no_more_than_it_needs(windows, height, width):
    for side, window, more in zip((height, width), windows.size, windows.padding(height, width), strict=True):
        assert side + more == max(side, window)


@each_backend
@given(windows=strategies.windows())
def test_shares_are_positive_alike_from_both_sides_and_fall_towards_the_edges(backend, windows):
    like = backend.array(np.zeros(3, np.float32))
    found = shares(windows, like)
    assert found.dtype == like.dtype
    found = backend.numpy(found).astype(np.float64)
    assert found.shape == windows.size
    assert (found > 0).all()
    assert found.max() <= 1
    for axis in (0, 1):
        np.testing.assert_array_equal(found, np.flip(found, axis))
        half = np.take(found, range((found.shape[axis] + 1) // 2), axis)
        falls = np.diff(half, axis=axis)
        assert (falls > 0).all() if windows.blend == "linear" else (falls == 0).all()
    rounding = 8e-3 if backend.name.endswith("float16") else 1e-6  # bfloat16 is the coarsest
    np.testing.assert_allclose(found, in_words(windows), atol=rounding)


@each_backend
@given(windows=small, images=st.integers(1, 3), height=st.integers(1, 12), width=st.integers(1, 12))
def test_crops_are_what_lies_under_the_windows_image_after_image(backend, windows, images, height, width):
    given_ = pictures(0, images, 2, height, width)
    padded = np.pad(backend.held(given_), ((0, 0), (0, 0), *((0, more) for more in windows.padding(height, width))))
    found = list(crops(backend.array(given_), windows))
    assert {some.dtype for some in found} == {backend.array(given_).dtype}
    (high, wide), corners = windows.size, windows.corners(height, width)
    wanted = [image[:, top : top + high, left : left + wide] for image in padded for top, left in corners]
    np.testing.assert_array_equal(np.concatenate([backend.numpy(some) for some in found]), np.stack(wanted))
    full, rest = divmod(images * len(corners), windows.batch)
    assert [some.shape[0] for some in found] == [windows.batch] * full + [rest] * (rest > 0)


@each_backend
@given(windows=small, images=st.integers(1, 2), height=st.integers(1, 12), width=st.integers(1, 12))
def test_each_pixel_has_the_mean_of_the_windows_that_saw_it(backend, windows, images, height, width):
    count = images * len(windows.corners(height, width))
    scores = pictures(1, count, 3, *windows.size)
    taken = []

    def upsample(some):
        taken.append(some)
        return 2 * some

    found = blended(backend.array(scores), windows, size=(height, width), upsample=upsample)
    wanted = slow(2 * backend.held(scores), windows, images, height, width)
    assert backend.numpy(found).dtype == np.float32
    np.testing.assert_allclose(backend.numpy(found), wanted, rtol=1e-5, atol=1e-5)
    assert [tuple(some.shape) for some in taken] == [(1, 3, *windows.size)] * count  # no more than one in memory
    assert {some.dtype for some in taken} == {found.dtype}


@each_backend
@given(windows=small, images=st.integers(0, 2), height=st.integers(1, 12), width=st.integers(1, 12))
def test_what_all_windows_agree_on_comes_out(backend, windows, images, height, width):
    given_ = backend.array(pictures(2, images, 3, height, width))
    parts = [backend.numpy(some) for some in crops(given_, windows)]
    scores = backend.array(np.concatenate(parts).astype(np.float32))
    found = blended(scores, windows, size=(height, width), upsample=lambda some: some)
    assert found.shape == given_.shape
    np.testing.assert_allclose(backend.numpy(found), backend.numpy(given_), rtol=1e-5, atol=1e-5)


@each_backend
@each_blend
def test_channels_may_come_last(backend, blend):
    windows, size = Windows((5, 4), (2, 3), batch=3, blend=blend), (9, 3)
    given_, scores = pictures(3, 2, 3, *size), pictures(4, 2 * 3, 2, 5, 4)
    last = [np.moveaxis(values, 1, -1).copy() for values in (given_, scores)]
    first_cut, last_cut = (
        list(crops(backend.array(given_), windows)),
        list(crops(backend.array(last[0]), windows, axis=1)),
    )
    for one, other in zip(first_cut, last_cut, strict=True):
        np.testing.assert_array_equal(backend.numpy(one), np.moveaxis(backend.numpy(other), -1, 1))
    options = {"size": size, "upsample": lambda some: some}
    first = blended(backend.array(scores), windows, **options)
    found = blended(backend.array(last[1]), windows, **options, axis=1)
    np.testing.assert_array_equal(backend.numpy(first), np.moveaxis(backend.numpy(found), -1, 1))


@each_backend
@pytest.mark.parametrize(("size", "shape"), [((30, 5), (0, 3, 4, 6)), ((2, 3), (0, 3, 4, 6))])
def test_no_images_give_one_batch_of_no_windows(backend, size, shape):
    windows = Windows((4, 6), (3, 3))
    (found,) = crops(backend.array(np.zeros((0, 3, *size), np.float32)), windows)
    assert found.shape == shape
    joined = blended(found, windows, size=size, upsample=lambda some: some)
    assert joined.shape == (0, 3, *size)


@pytest.mark.parametrize(("given_", "found"), [("float16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_scores_are_added_up_in_float32_at_least(given_, found):
    windows = Windows((3, 3), (1, 1))
    scores = pictures(5, 9, 2, 3, 3).astype(given_)
    assert blended(scores, windows, size=(5, 5), upsample=lambda some: some).dtype == found


@each_blend
def test_jax_gives_the_same_compiled_and_promotes_no_ranks(blend):
    jax = pytest.importorskip("jax")
    windows = Windows((5, 7), (3, 4), batch=4, blend=blend)
    given_ = pictures(6, 2, 3, 11, 6)

    def run(images):
        scores = jax.numpy.concatenate([3 * some for some in crops(images, windows)])
        return blended(scores, windows, size=(11, 6), upsample=lambda some: some + 1)

    wanted = slow(3 * np.concatenate(list(crops(given_, windows))) + 1, windows, 2, 11, 6)
    with jax.numpy_rank_promotion("raise"):
        for found in (run(jax.numpy.asarray(given_)), jax.jit(run)(given_)):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Windows(8, (8, 8)), "`size` must be a height and a width from 1 up, in pixels, got 8"),
        (lambda: Windows((8, 0), (8, 8)), r"`size` must be .*, got \(8, 0\)"),
        (lambda: Windows((8, 8), (8,)), r"`stride` must be a height and a width .*, got \(8,\)"),
        (lambda: Windows((8, 8), (8, 9)), r"`stride` must be no larger than the windows, \(8, 8\), got \(8, 9\)"),
        (lambda: Windows((8, 8), (8, 8), batch=0), "`batch` must be a whole number from 1 up, got 0"),
        (lambda: Windows((8, 8), (8, 8), blend="hann"), "`blend` must be one of uniform, linear, got 'hann'"),
        (
            lambda: blended(np.zeros((5, 2, 8, 8)), Windows((8, 8), (8, 8)), size=(8, 16), upsample=lambda some: some),
            r"`scores` must be those of 2 windows for each image, as `crops` cuts them, got an array of shape \(5, 2, 8",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(TokenExitError, match=message):
        make()
