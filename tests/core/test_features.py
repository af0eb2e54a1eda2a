"""Rows for fitting exit heads: kept, on disk or computed anew, and cut where images are held out."""

from itertools import islice

import array_api_strict
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.backends import BACKENDS, each_backend
from tests.core.files import Files
from tests.core.tables import Table, tables
from tokenexit import TokenExitError
from tokenexit.area import Area
from tokenexit.features import FINAL, TARGET, Cached, Streamed, gathered, pixel_patches


def parts_of(backend, sizes):
    start, found = 0, []
    for size in sizes:
        numbers = np.arange(start, start + size)
        features = backend.array(np.stack([numbers, -numbers], axis=1).astype(np.float32))
        found.append({"1": features, TARGET: features, FINAL: backend.array(numbers)})
        start += size
    return found


@each_backend
@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(sum), data=st.data())
def test_rows_drawn_from_parts_are_those_of_all_parts_together(backend, sizes, data):
    places = data.draw(st.lists(st.integers(0, sum(sizes) - 1), min_size=1, max_size=9))
    cached = Cached(parts_of(backend, sizes))
    index = backend.array(np.asarray(places))
    asked = []
    draws = cached.draws(len(places), lambda rows, size: asked.append((rows, size)) or index, 0)
    for rows in islice(draws, 2):
        assert backend.numpy(rows[FINAL]).tolist() == places
        assert backend.numpy(rows["1"])[:, 0].tolist() == places
    assert asked == [(sum(sizes), min(len(places), max(sum(sizes), 2)))] * 2  # never more than there are
    every = [number for rows in cached.chunks() for number in backend.numpy(rows[FINAL]).tolist()]
    assert every == [*range(sum(sizes))]


def test_many_rows_are_gone_through_in_pieces_that_lose_none():
    numbers = np.arange(65536 * 2 + 3)
    pieces = [rows[FINAL] for rows in Cached([{TARGET: numbers[:, None], FINAL: numbers}]).chunks()]
    assert [len(piece) for piece in pieces] == [65536, 65536, 3]
    assert (np.concatenate(pieces) == numbers).all()


SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(sizes=SIZES, share=st.sampled_from([0.0, 0.01, 0.25, 0.5, 0.9]), data=st.data())
def test_images_are_fitted_to_or_held_out_however_they_are_kept(sizes, share, data, tmp_path_factory):
    images = sum(sizes)
    bad = data.draw(st.sets(st.integers(0, images - 1), max_size=2))
    batches = tables(sizes, bad=bad)
    held = max(round(share * images), 1) if share else 0
    if held == images:
        with pytest.raises(TokenExitError, match=f"`held_out` must leave some of {images} images to be fitted to"):
            gathered(batches, Table(), store=Files(), cache="memory", held_out=share, progress=iter)
        return
    every = np.concatenate(batches)
    fitted, others = (part[np.isfinite(part).all(axis=2)] for part in (every[: images - held], every[images - held :]))
    for cache in ("memory", tmp_path_factory.mktemp("rows"), None):
        given = (batches, Table())
        options = {"store": Files(), "cache": cache, "held_out": share, "progress": iter}
        if (cache is not None and len(fitted) == 0) or (held and len(others) == 0):
            with pytest.raises(TokenExitError, match="`images` must give finite tokens, got NaN or infinity for every"):
                gathered(*given, **options)
            continue
        kept = gathered(*given, **options)
        assert kept.images == (images - held, held)
        assert len(kept.digests) == images - max(len(bad) - 1, 0)  # images without a number are copies
        for source, wanted in ((kept.fitted, fitted), (kept.held_out, others)):
            if source is not None:
                np.testing.assert_array_equal(np.concatenate([rows["1"] for rows in source.chunks()]), wanted)
        assert (kept.held_out is None) == (held == 0)


@given(sizes=SIZES, data=st.data())
def test_a_stream_draws_from_one_batch_after_the_other_and_goes_on_where_it_was(sizes, data):
    since = data.draw(st.integers(0, 2 * len(sizes)))
    fitted = data.draw(st.integers(1, sum(sizes)))
    batches = tables(sizes)
    teacher = Table()
    stream = Streamed(batches, teacher, [*map(teacher.fingerprint, batches)], sizes, fitted)

    def first(rows, size):
        return np.arange(size) % rows

    def taken(since, steps):
        return [rows["1"] for rows in islice(stream.draws(4, first, since), steps)]

    firsts = np.cumsum([0, *sizes])[:-1]
    wanted = [batch[0] for batch, start in zip(batches, firsts, strict=True) if start < fitted]
    found = taken(since, 5)
    for step, rows in enumerate(found):
        np.testing.assert_array_equal(rows, wanted[(since + step) % len(wanted)])


def test_a_stream_draws_no_more_rows_than_a_batch_has_and_two_of_one_alone():
    batches, teacher, asked = tables((1, 4)), Table(), []

    def draw(rows, size):
        asked.append((rows, size))
        return np.zeros(size, int)

    per_image = len(teacher.rows(batches[0])[0][TARGET])
    stream = Streamed(batches, teacher, [*map(teacher.fingerprint, batches)], (1, 4), 5)
    assert [len(rows[TARGET]) for rows in islice(stream.draws(1000, draw, 0), 2)] == [size for _, size in asked]
    assert asked == [(per_image, per_image), (4 * per_image, 4 * per_image)]
    one = Cached([{TARGET: np.zeros((1, 3)), FINAL: np.zeros(1, int)}])
    assert len(next(one.draws(1000, draw, 0))[TARGET]) == 2


def test_a_stream_of_other_batches_is_refused():
    batches = tables((2, 2))
    options = {"store": Files(), "cache": None, "held_out": 0.0, "progress": iter}
    with pytest.raises(TokenExitError, match="`images` must be a tensor or what can be iterated again, if nothing is"):
        gathered(iter(batches), Table(), **options)
    kept = gathered(batches, Table(), **options)
    for others in ([batches[1], batches[0]], batches[:1]):
        batches[:] = others
        with pytest.raises(TokenExitError, match="`images` must give the same batches in the same order every time"):
            list(kept.fitted.chunks())


def test_rows_on_disk_are_read_again_and_bound_to_images_and_model(tmp_path):
    batches, teacher = tables((2, 3)), Table()
    options = {"store": Files(), "cache": tmp_path, "held_out": 0.0, "progress": iter}
    first = gathered(batches, teacher, **options)
    second = gathered(batches, teacher, **options)
    assert teacher.runs == 2
    for one, other in zip(first.fitted.chunks(), second.fitted.chunks(), strict=True):
        assert all((one[name] == other[name]).all() for name in one)
    assert first.fingerprint == second.fingerprint
    with pytest.raises(TokenExitError, match=r"`cache` must be for the same images as 000001\.safetensors in it"):
        gathered([batches[0], batches[0]], teacher, **options)
    teacher.marks = {"model": "another"}
    with pytest.raises(TokenExitError, match=r"`cache` must be for the same model as 000000\.safetensors in it"):
        gathered(batches, teacher, **options)


def test_rows_on_disk_are_those_of_every_patch(tmp_path):
    batches, teacher, store = tables((2,)), Table(), Files()
    rows, patches = teacher.rows(batches[0])
    marks = teacher.marks | {"images": teacher.fingerprint(batches[0])}
    file = tmp_path / "000000.safetensors"
    for wrong in (
        {name: value for name, value in rows.items() if name != FINAL},
        rows | {"1": rows["1"][1:]},
        rows | {"patches": np.asarray(patches) + 1},
    ):
        store.write(file, {"patches": np.asarray(patches)} | wrong, marks, argument="cache")
        with pytest.raises(TokenExitError, match="`cache` must hold rows in 000000.safetensors for every patch"):
            gathered(batches, teacher, store=store, cache=tmp_path, held_out=0.0, progress=iter)


@pytest.mark.usefixtures("unchecked")
def test_another_place_for_rows_is_named():
    with pytest.raises(TokenExitError, match='`cache` must be "memory", a pathlib.Path or None'):
        gathered(tables((2,)), Table(), store=Files(), cache="disk", held_out=0.0, progress=iter)


@pytest.mark.parametrize("array", [array_api_strict.asarray, BACKENDS[-1].array], ids=["strict", BACKENDS[-1].name])
def test_rows_of_another_library_are_kept_and_cut_alike(array):
    batches = tables((3, 2))
    kept = gathered(batches, Table(array), store=Files(array), cache="memory", held_out=0.4, progress=iter)
    assert sum(rows[TARGET].shape[0] for rows in kept.fitted.chunks()) == 12
    assert sum(rows[TARGET].shape[0] for rows in kept.held_out.chunks()) == 8


SIDE = st.integers(1, 9)


@given(size=st.tuples(SIDE, SIDE), grid=st.tuples(SIDE, SIDE), area=st.none() | st.tuples(SIDE, SIDE, SIDE, SIDE))
def test_a_pixel_is_of_the_patch_that_its_upper_left_corner_is_in(size, grid, area):
    covered, image = ((1, 1), (1, 1)) if area is None else (area[:2], area[2:])
    patch = pixel_patches(np.zeros((1, *size), int), grid, None if area is None else Area(covered, image))
    for row in range(size[0]):
        for column in range(size[1]):
            at = tuple(
                number * whole * patches // (side * reach)
                for number, side, whole, patches, reach in zip((row, column), size, image, grid, covered, strict=True)
            )
            inside = row < patch.shape[0] and column < patch.shape[1]
            assert inside == (at[0] < grid[0] and at[1] < grid[1])
            assert not inside or divmod(int(patch[row, column]), grid[1]) == at
