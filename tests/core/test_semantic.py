"""Geometry of semantic tokens: windows, neighbourhoods and pooling, against loops that walk from place to place."""

import functools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core import oracles, strategies
from tests.core.backends import each_backend
from tokenexit import TokenExitError, semantic
from tokenexit.semantic import Partition, SemanticPlan

maps = st.builds(Partition, st.integers(1, 20), st.integers(1, 20), st.tuples(st.integers(1, 8), st.integers(1, 8)))
seeds = st.integers(0, 2**20)
edges = st.sampled_from(["inside", "beyond"])
some = strategies.fewer(2)


def drawn(windows, seed, marked):
    """A map of two images with three channels, and which of its places hold a token, if that is asked."""
    random = np.random.default_rng(seed)
    map = random.normal(size=(2, windows.height, windows.width, 3)).astype(np.float32)
    return map, random.random(map.shape[:3]) < random.choice([0.2, 0.7, 1.0]) if marked else None


def called(backend, function, map, windows, valid, **options):
    """Values and marks of all that was cut, as NumPy; None is all."""
    marks = None if valid is None else backend.array(valid)
    values, found = function(backend.array(map), windows, valid=marks, **options)
    values = backend.numpy(values)
    return values, np.ones(values.shape[:3], bool) if found is None else backend.numpy(found)


def around(map, windows, valid, *, size, edges):
    """Values, and which of them are valid, place by place."""
    reach = [min(a, b) for a, b in zip(size, map.shape[1:3], strict=True)] if edges == "inside" else size
    values, marks = [], []
    for top in oracles.starts(windows.height, windows.window[0], reach[0], edges):
        for left in oracles.starts(windows.width, windows.window[1], reach[1], edges):
            for row in range(top, top + reach[0]):
                for column in range(left, left + reach[1]):
                    there = 0 <= row < windows.height and 0 <= column < windows.width
                    values.append(map[:, row, column] if there else np.full_like(map[:, 0, 0], np.nan))
                    held = np.ones(len(map), bool) if valid is None or not there else valid[:, row, column]
                    marks.append(held & there)
    shape = (len(map), windows.count, reach[0] * reach[1])
    return np.stack(values, axis=1).reshape(*shape, 3), np.stack(marks, axis=1).reshape(shape)


def pooled(map, windows, valid, *, to, by):
    def bounds(size, side, cells):
        for first in range(0, size, side):
            yield [
                (first + math.floor(cell * side / cells), min(first + math.ceil((cell + 1) * side / cells), size))
                for cell in range(cells)
            ]

    valid = np.ones(map.shape[:3], bool) if valid is None else valid
    values, marks = [], []
    for rows in bounds(windows.height, windows.window[0], to[0]):
        for columns in bounds(windows.width, windows.window[1], to[1]):
            for top, bottom in rows:
                for left, right in columns:
                    for image in range(len(map)):
                        held = map[image, top:bottom, left:right][valid[image, top:bottom, left:right]]
                        value = np.zeros(3) if not len(held) else held.max(0) if by == "max" else held.mean(0)
                        values.append(value.astype(np.float32))
                        marks.append(len(held) > 0)
    shape = (windows.count, to[0] * to[1], len(map))
    return np.moveaxis(np.reshape(values, (*shape, 3)), 2, 0), np.moveaxis(np.reshape(marks, shape), 2, 0)


@each_backend
@some
@given(maps, seeds, st.booleans())
def test_windows_are_those_of_a_walk_and_go_back_where_they_were(backend, windows, seed, marked):
    map, valid = drawn(windows, seed, marked)
    map = backend.held(map)
    values, marks = called(backend, semantic.split, map, windows, valid)
    wanted, wanted_marks = around(map, windows, valid, size=windows.window, edges="beyond")
    np.testing.assert_array_equal(marks, wanted_marks)
    np.testing.assert_array_equal(values[marks], wanted[marks])
    assert np.isfinite(values.astype(np.float32)).all()
    again = backend.numpy(semantic.join(semantic.split(backend.array(map), windows)[0], windows))
    np.testing.assert_array_equal(again, map)


@each_backend
@some
@given(maps, seeds, st.booleans(), st.tuples(st.integers(1, 24), st.integers(1, 24)), edges)
def test_neighbourhoods_are_those_of_a_walk(backend, windows, seed, marked, size, edges):
    map, valid = drawn(windows, seed, marked)
    map = backend.held(map)
    values, marks = called(backend, semantic.neighbourhoods, map, windows, valid, size=size, edges=edges)
    wanted, wanted_marks = around(map, windows, valid, size=size, edges=edges)
    np.testing.assert_array_equal(marks, wanted_marks)
    np.testing.assert_array_equal(values[marks], wanted[marks])
    if edges == "inside" and valid is None:
        assert marks.all()


@each_backend
@some
@given(maps, seeds, st.booleans(), st.data(), st.sampled_from(["max", "mean"]))
def test_pooling_is_that_of_a_walk(backend, windows, seed, marked, data, by):
    to = tuple(data.draw(st.integers(1, side)) for side in windows.window)
    map, valid = drawn(windows, seed, marked)
    map = backend.held(map)
    values, marks = called(backend, semantic.pool, map, windows, valid, to=to, by=by)
    wanted, wanted_marks = pooled(map, windows, valid, to=to, by=by)
    np.testing.assert_array_equal(marks, wanted_marks)
    rounding = 1e-6 if "16" not in backend.name else 2e-2 if "bf" in backend.name else 2e-3
    np.testing.assert_allclose(values.astype(np.float32), wanted, atol=rounding, rtol=rounding)


@given(maps, seeds, st.data(), st.sampled_from(["max", "mean"]), edges)
def test_what_padding_holds_changes_nothing(windows, seed, data, by, edges):
    to = tuple(data.draw(st.integers(1, side)) for side in windows.window)
    map, valid = drawn(windows, seed, marked=True)
    for content in (1e9, -1e9, np.nan, np.inf):
        other = np.where(valid[..., None], map, np.float32(content))
        for function, options in (
            (semantic.pool, {"to": to, "by": by}),
            (semantic.neighbourhoods, {"size": (9, 5), "edges": edges}),
        ):
            (values, marks), (found, same) = (
                function(x, windows, valid=valid, **options) for x in (map, other)
            )  # fmt: skip
            np.testing.assert_array_equal(marks, same)
            np.testing.assert_array_equal(values[marks], found[marks])
            if function is semantic.pool:
                np.testing.assert_array_equal(values, found)


@given(maps, seeds, st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_semantic_tokens_are_a_map_of_their_own(windows, seed, to):
    """Local and global are two orders of the same tokens."""
    local, _ = semantic.pool(drawn(windows, seed, marked=False)[0], windows, to=to)
    grid = windows.pooled(to)
    assert (grid.count, grid.padding) == (windows.count, (0, 0))
    together = semantic.join(local, grid)
    assert together.shape == (2, windows.rows * to[0], windows.columns * to[1], 3)
    again, marks = semantic.split(together, grid)
    np.testing.assert_array_equal(again, local)
    assert marks is None
    for window in range(windows.count):
        row, column = window // windows.columns * to[0], window % windows.columns * to[1]
        np.testing.assert_array_equal(
            together[:, row : row + to[0], column : column + to[1]].reshape(2, -1, 3), local[:, window]
        )


@given(maps, st.tuples(st.integers(1, 24), st.integers(1, 24)), edges, st.data())
def test_marks_are_none_exactly_where_all_is_valid(windows, size, edges, data):
    to = tuple(data.draw(st.integers(1, side)) for side in windows.window)
    map, every = (
        np.zeros((1, windows.height, windows.width), np.float32),
        np.ones((1, windows.height, windows.width), bool),
    )
    for function, options in (
        (semantic.split, {}),
        (semantic.neighbourhoods, {"size": size, "edges": edges}),
        (semantic.pool, {"to": to}),
    ):
        (_, none), (_, marks) = function(map, windows, **options), function(map, windows, valid=every, **options)
        assert (none is None) == bool(marks.all())


def test_the_published_geometry_is_a_case_of_it():
    """14 x 14, windows of 7: 3 x 3 cells of 3 places, and neighbourhoods of 10 that are 4 apart."""
    windows = Partition(14, 14, (7, 7))
    map = np.arange(196, dtype=np.float32).reshape(1, 14, 14)
    around, marks = semantic.neighbourhoods(map, windows, size=(10, 10))
    assert marks is None
    assert around[0, :, 0].tolist() == [0, 4, 4 * 14, 4 * 14 + 4]
    cells, marks = semantic.pool(map, windows, to=(3, 3))
    assert marks is None
    assert cells[0, 0].tolist() == [row * 14 + column for row in (2, 4, 6) for column in (2, 4, 6)]
    assert semantic.stvit_r().windows(14, 14) == windows
    assert semantic.stvit_r().neighbourhood == (10, 10)
    dense = semantic.stvit_r_dense()
    assert (dense.neighbourhood, dense.second, dense.recovery) == ((14, 14), (21, 21), (27, 27))


def test_the_whole_map_is_a_window():
    windows = semantic.stvit().windows(11, 15)
    assert windows == Partition.whole(11, 15)
    assert (windows.count, windows.padding) == (1, (0, 0))
    map = np.random.default_rng(0).normal(size=(2, 11, 15, 3)).astype(np.float32)
    np.testing.assert_array_equal(semantic.pool(map, windows, to=(1, 1))[0][:, 0, 0], map.max((1, 2)))
    np.testing.assert_array_equal(semantic.split(map, windows)[0][:, 0], map.reshape(2, -1, 3))


@each_backend
def test_an_empty_batch_is_one(backend):
    windows = Partition(5, 4, (3, 3))
    empty = backend.array(np.zeros((0, 5, 4, 2), np.float32))
    assert tuple(semantic.pool(empty, windows, to=(2, 2))[0].shape) == (0, 4, 4, 2)
    values, marks = semantic.split(empty, windows)
    assert (tuple(values.shape), tuple(marks.shape)) == ((0, 4, 9, 2), (0, 4, 9))
    assert tuple(semantic.join(values, windows).shape) == (0, 5, 4, 2)


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_named():
    windows, map = Partition(4, 5, (2, 2)), np.zeros((1, 4, 5, 2), np.float32)
    marks = np.ones((1, 4, 5), bool)
    pair = "two whole numbers from 1 up, rows and columns"
    for call, message in (
        (lambda: Partition(0, 5, (2, 2)), "`height` must be a whole number from 1 up, got 0"),
        (lambda: Partition(4, 5.0, (2, 2)), "`width` must be a whole number from 1 up, got 5.0"),
        (lambda: Partition(4, 5, 2), f"`window` must be {pair}, got 2"),
        (lambda: Partition(4, 5, (2, 0)), f"`window` must be {pair}, got (2, 0)"),
        (lambda: windows.pooled((True, 1)), f"`to` must be {pair}, got (True, 1)"),
        (lambda: semantic.split(map[:, :3], windows), "`map` must have 4 rows and 5 columns on axes 1 and 2"),
        (lambda: semantic.split(map, windows, valid=marks[:, 1:]), "`valid` must have shape (1, 4, 5), got shape (1, 3, 5)"),
        (lambda: semantic.split(map, windows, valid=marks * 1), "`valid` must be boolean"),
        (lambda: semantic.neighbourhoods(map, windows, size=(3,)), f"`size` must be {pair}, got (3,)"),
        (lambda: semantic.neighbourhoods(map, windows, size=(3, 3), edges="none"), "`edges` must be 'inside' or 'beyond', got 'none'"),
        (lambda: semantic.pool(map, windows, to=(1, 1), by="sum"), "`by` must be 'max' or 'mean', got 'sum'"),
        (lambda: semantic.pool(map.astype(int), windows, to=(1, 1)), "`map` must be of a floating dtype, got int64"),
        (lambda: semantic.join(map, windows), "`values` must have 6 windows of 4 places on axes 1 and 2, got shape (1, 4, 5, 2)"),
        (lambda: SemanticPlan(tokens=(3, 0)), f"`tokens` must be {pair}, got (3, 0)"),
        (lambda: SemanticPlan(learned=3), f"`learned` must be {pair}, got 3"),
        (lambda: SemanticPlan(edges=None), "`edges` must be 'inside' or 'beyond', got None"),
        (lambda: SemanticPlan(pool="min"), "`pool` must be 'max' or 'mean', got 'min'"),
        (lambda: SemanticPlan(residual=1), "`residual` must be True or False, got 1"),
        (lambda: SemanticPlan(layer_scale=0), "`layer_scale` must be a positive number or None, got 0"),
        (lambda: SemanticPlan(layer_scale=10**400), "`layer_scale` must be a positive number or None, got 1000"),
        (lambda: SemanticPlan(layer_scale=1e39), "`layer_scale` must be a positive number or None, got 1e+39"),
        (lambda: SemanticPlan(layer_scale=np.nan), "`layer_scale` must be a positive number or None, got nan"),
        (lambda: SemanticPlan(layer_scale=True), "`layer_scale` must be a positive number or None, got True"),
        *[
            (functools.partial(SemanticPlan, **{name: (1_000_000, 4)}), f"`{name}` must have at most 1,000,000 places")
            for name in ("tokens", "window", "neighbourhood", "second", "recovery", "learned")
        ],
        (lambda: semantic.stvit_r(7), f"`window` must be {pair}, got 7"),
    ):  # fmt: skip
        with pytest.raises(TokenExitError) as caught:
            call()
        assert message in str(caught.value)


def test_a_grid_must_have_room_for_a_plan():
    for plan, grid in (
        (semantic.stvit(), (4, 4)),
        (semantic.stvit_r(), (14, 14)),
        (semantic.stvit_r(), (2, 2)),  # one window, over the edge
        (SemanticPlan(window=(3, 4), tokens=(2, 3)), (4, 5)),
        (semantic.stvit_r_dense(), (7, 7)),
        (semantic.stvit_r_dense(), (50, 68)),
        (semantic.stvit_r_dense(), (512, 512)),
        (SemanticPlan(window=None, neighbourhood=None, tokens=(1, 1)), (1, 1)),
    ):
        semantic.require_places(plan, grid)
    for plan, grid, message in (
        (semantic.stvit(), (3, 5), "`plan` must make no more semantic tokens than the 15 places of its windows on a grid of 3 x 5 (`tokens`, `window`), got 16"),
        (semantic.stvit((2000, 4)), (64, 64), "than the 4096 places of its windows on a grid of 64 x 64 (`tokens`, `window`), got 8000"),
        (SemanticPlan(window=(1, 1), tokens=(2, 2)), (2, 2), "than the 4 places of its windows on a grid of 2 x 2 (`tokens`, `window`), got 16"),
        (SemanticPlan(window=(1000, 1000), tokens=(1000, 1000)), (4, 4), "than the 64 places of its windows on a grid of 4 x 4 (`tokens`, `window`), got 1000000"),
        (SemanticPlan(neighbourhood=(1000, 1000)), (14, 14), "`neighbourhood` must hold at most 1,000,000 places in the 4 windows of a grid of 14 x 14, got (1000, 1000): 4,000,000"),
        (SemanticPlan(second=(600, 600)), (14, 14), "`second` must hold at most 1,000,000 places"),
        (SemanticPlan(recovery=(600, 600)), (14, 14), "`recovery` must hold at most 1,000,000 places"),
    ):  # fmt: skip
        with pytest.raises(TokenExitError) as caught:
            semantic.require_places(plan, grid)
        assert message in str(caught.value)
