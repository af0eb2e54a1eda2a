"""Cells: one token of each runs on, and stands for those that have left."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core import strategies
from tests.core.backends import each_backend
from tokenexit import TokenExitError, cells, tokens

grids = st.tuples(st.integers(1, 9), st.integers(1, 9))
sides = st.integers(1, 11)


def cut(size, side):
    """Cells along an axis, as lists of places, cut by walking along it."""
    count = max(1, int(size / side + 0.5))
    found = [[] for _ in range(count)]
    for place in range(size):
        found[place * count // size].append(place)
    return found


def oracle(grid, side):
    """For each place of the grid its cell, and the place in the middle of it."""
    cell, middle = {}, {}
    for i, rows in enumerate(cut(grid[0], side)):
        for j, columns in enumerate(cut(grid[1], side)):
            places = [row * grid[1] + column for row in rows for column in columns]
            at = rows[(len(rows) - 1) // 2] * grid[1] + columns[(len(columns) - 1) // 2]
            cell |= dict.fromkeys(places, (i, j))
            middle[i, j] = at
    return cell, middle


@given(grids, sides)
def test_cells_are_as_near_to_their_side_as_can_be(grid, side):
    for size in grid:
        lengths = [len(places) for places in cut(size, side)]
        assert max(lengths) - min(lengths) <= 1
        assert min(lengths) >= 1
        if size % side == 0:
            assert set(lengths) == {side}


@each_backend
@given(grids, sides, st.integers(0, 3))
def test_each_cell_has_one_middle(backend, grid, side, prefix):
    position = np.arange(-prefix, grid[0] * grid[1] + 2)
    found = backend.numpy(cells.is_cell_centre(backend.array(position), grid=grid, side=side))
    assert sorted(position[found]) == sorted(oracle(grid, side)[1].values())


@each_backend
@strategies.fewer(3)
@given(grids, sides, st.integers(0, 2), st.integers(0, 3), st.integers(0, 2**20), st.floats(0, 1))
def test_middles_stand_for_what_has_left(backend, grid, side, prefix, images, seed, share):
    """In both layouts."""
    random, places = np.random.default_rng(seed), grid[0] * grid[1]
    cell, middle = oracle(grid, side)
    running = random.random((images, prefix + places)) < share
    packing = tokens.pack(backend.array(running))
    row = backend.numpy(cells.token_size(packing, grid=grid, side=side))
    order = np.zeros((images, prefix + places), np.float32)
    capacity = min(int(running.sum(axis=1).max(initial=0)) + 1, prefix + places)
    selection, _ = tokens.select(backend.array(running), backend.array(order), capacity=capacity)
    entries = backend.numpy(cells.token_size(selection, grid=grid, side=side))
    assert row.dtype == entries.dtype == np.float32
    at = 0
    for image in range(images):
        for entry, slot in enumerate(np.flatnonzero(running[image])):
            place, wanted = slot - prefix, 1
            if place >= 0 and middle[cell[place]] == place:
                wanted += sum(
                    cell[other] == cell[place] and not running[image, prefix + other] for other in range(places)
                )
            assert row[at] == wanted
            assert entries[image, entry] == wanted
            at += 1
    assert at == len(row)


@given(grids, sides, st.integers(0, 2**20))
def test_while_the_middles_run_nobody_is_forgotten(grid, side, seed):
    random, places = np.random.default_rng(seed), grid[0] * grid[1]
    middle = cells.is_cell_centre(np.arange(places), grid=grid, side=side)
    running = (random.random((2, places)) < 0.4) | middle
    found = cells.token_size(tokens.pack(running), grid=grid, side=side)
    assert found.sum() == 2 * places


@pytest.mark.parametrize("side", [0, -1, True, 2.0])
@pytest.mark.usefixtures("unchecked")
def test_a_side_is_a_whole_number(side):
    packing = tokens.pack(np.ones((1, 4), bool))
    for call in (
        lambda: cells.is_cell_centre(np.arange(4), grid=(2, 2), side=side),
        lambda: cells.token_size(packing, grid=(2, 2), side=side),
    ):
        with pytest.raises(TokenExitError, match=rf"`side` must be a whole number from 1 up, got {side!r}"):
            call()


def test_a_grid_has_no_more_places_than_slots():
    with pytest.raises(TokenExitError, match=r"`grid` must have at most 4 places, got \(2, 3\)"):
        cells.token_size(tokens.pack(np.ones((1, 4), bool)), grid=(2, 3), side=2)
