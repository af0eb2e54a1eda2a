"""What is around a token, by a walk over its neighbourhood."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core import oracles, strategies
from tests.core.backends import each_backend
from tokenexit import TokenExitError, surroundings, tokens

grids = st.tuples(st.integers(0, 5), st.integers(1, 6))


@each_backend
@strategies.fewer(3)
@given(grids, st.integers(0, 7), st.integers(0, 2), st.integers(0, 3), st.integers(0, 2**20), st.floats(0, 1))
def test_a_token_is_beside_the_mean_of_what_runs_around_it(backend, grid, radius, prefix, images, seed, share):
    """In both layouts."""
    random, places = np.random.default_rng(seed), grid[0] * grid[1]
    x = random.normal(1, 2, (images, prefix + places, 3)).astype(np.float32)
    running = random.random((images, prefix + places)) < share
    x = backend.numpy(backend.array(x))  # as half precision has it
    within = {"torch-bfloat16": 0.01, "torch-float16": 0.002}.get(backend.name, 2e-5)
    wanted = oracles.walked(x, running, grid, radius, prefix)
    mask = backend.array(running)
    packing = tokens.pack(mask)
    entries = tokens.gather(backend.array(x), packing)
    found = backend.numpy(surroundings.beside_running(entries, packing, grid=grid, radius=radius))
    np.testing.assert_allclose(found, wanted[running], atol=within)
    fullest = int(running.sum(1).max()) if images else 0
    selection, _ = tokens.select(mask, backend.array(x[..., 0]), capacity=min(fullest + 1, prefix + places))
    entries = tokens.gather(backend.array(x), selection)
    found = backend.numpy(surroundings.beside_running(entries, selection, grid=grid, radius=radius))
    slot, valid = backend.numpy(selection.slot), backend.numpy(selection.valid)
    slot = slot.reshape(valid.shape)
    for image in range(images):
        np.testing.assert_allclose(found[image][valid[image]], wanted[image, slot[image][valid[image]]], atol=within)
    if prefix == 0:
        found = backend.numpy(surroundings.beside_all(backend.array(x), grid=grid, radius=radius))
        np.testing.assert_allclose(found, oracles.walked(x, np.ones_like(running), grid, radius, 0), atol=within)


def test_a_wide_mean_in_half_precision_is_that_of_more():
    torch = pytest.importorskip("torch")
    x = torch.tensor([1.0, 5.0, -3.0]).expand(1, 1600, 3).to(torch.bfloat16)
    found = surroundings.beside_all(x, grid=(40, 40), radius=16)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[..., 3:], found[..., :3])  # what is the same everywhere is its own mean


def test_half_precision_stays_and_is_computed_in_more():
    x = np.full((1, 4, 3), 60000, np.float16) * np.asarray([1, 0.5, -1], np.float16)
    found = surroundings.beside_all(x, grid=(2, 2), radius=1)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found[0, 0, :3], oracles.standardised(x[0, 0]), atol=1e-3)
    np.testing.assert_allclose(found[..., 3:], found[..., :3], atol=1e-3)


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_named():
    x = np.ones((2, 6, 3), np.float32)
    packing = tokens.pack(np.ones((2, 6), bool))
    for call, message in (
        (lambda: surroundings.beside_all(x, grid=(2, 2), radius=1), "`grid` must have 6 places, got (2, 2)"),
        (lambda: surroundings.beside_all(x, grid=(2, 4), radius=1), "`grid` must have 6 places, got (2, 4)"),
        (
            lambda: surroundings.beside_all(x, grid=(2, 3), radius=-1),
            "`radius` must be a whole number from 0 up, got -1",
        ),
        (
            lambda: surroundings.beside_running(x.reshape(12, 3), packing, grid=(3, 3), radius=1),
            "`grid` must have at most 6 places, got (3, 3)",
        ),
        (
            lambda: surroundings.beside_running(x, packing, grid=(2, 3), radius=1),
            "`values` must start with the layout of the receipt",
        ),
    ):
        with pytest.raises(TokenExitError) as found:
            call()
        assert str(found.value).startswith(message)
