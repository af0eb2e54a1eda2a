import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.core import strategies
from tests.core.backends import each_backend
from tokenexit import TokenExitError, tokens


@each_backend
@given(mask=strategies.running())
def test_a_packing_lists_the_running_slots_in_order(backend, mask):
    packing = tokens.pack(backend.array(mask))
    image, slot = np.nonzero(mask)
    np.testing.assert_array_equal(backend.numpy(packing.image), image)
    np.testing.assert_array_equal(backend.numpy(packing.slot), slot)
    np.testing.assert_array_equal(backend.numpy(packing.lengths), mask.sum(axis=1))


@each_backend
@given(mask=strategies.running(), data=st.data())
def test_scatter_undoes_gather(backend, mask, data):
    x = data.draw(hnp.arrays(np.float32, (*mask.shape, 3), elements=st.floats(-9, 9, width=32)))
    other = np.full_like(x, -100)
    packing = tokens.pack(backend.array(mask))
    row = tokens.gather(backend.array(x), packing)
    np.testing.assert_array_equal(backend.numpy(row), x[mask])
    restored = backend.numpy(tokens.scatter(row, packing, into=backend.array(other)))
    np.testing.assert_array_equal(restored, np.where(mask[..., None], x, other))


@each_backend
@given(mask=strategies.running(), data=st.data())
def test_repacking_twice_is_packing_what_is_left(backend, mask, data):
    packing = tokens.pack(backend.array(mask))
    row = tokens.gather(backend.array(np.arange(mask.size).reshape(mask.shape)), packing)
    for _ in range(2):
        stay = data.draw(hnp.arrays(np.bool_, packing.index.shape[0]))
        mask = mask.copy()
        mask[mask] = stay
        packing, rows = tokens.repack(packing, backend.array(stay))
        row = backend.array(backend.numpy(row)[backend.numpy(rows)])
        np.testing.assert_array_equal(backend.numpy(packing.running), mask)
        np.testing.assert_array_equal(backend.numpy(packing.index), np.flatnonzero(mask))
        np.testing.assert_array_equal(backend.numpy(row), np.flatnonzero(mask))


@pytest.mark.usefixtures("unchecked")
def test_shapes_are_checked():
    packing = tokens.pack(np.array([[True, False, True]]))
    with pytest.raises(TokenExitError, match=r"`running` must have shape \(images, slots\), got shape \(3,\)"):
        tokens.pack(np.array([True, False, True]))
    with pytest.raises(TokenExitError, match=r"`x` must have 1 images of 3 slots .*got shape \(1, 4\)"):
        tokens.gather(np.zeros((1, 4)), packing)
    with pytest.raises(TokenExitError, match=r"`row` must hold 2 tokens .*got shape \(3,\)"):
        tokens.scatter(np.zeros(3), packing, into=np.zeros((1, 3)))
    with pytest.raises(TokenExitError, match=r"`into` must end in the shape of one token, \(4,\), got shape \(1, 3\)"):
        tokens.scatter(np.zeros((2, 4)), packing, into=np.zeros((1, 3)))
