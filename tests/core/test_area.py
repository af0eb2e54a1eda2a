"""The area of an image that a grid covers, and how large its patches are where the image is shown at another size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenexit import TokenExitError
from tokenexit.area import Area

pairs = st.tuples(st.integers(1, 500), st.integers(1, 500))


@given(covered=pairs, image=pairs, grid=pairs, factor=st.integers(1, 4))
def test_patches_grow_with_the_image(covered, image, grid, factor):
    area = Area(covered, image)
    own = area.per_patch(grid, image)
    assert own == pytest.approx([side / cells for side, cells in zip(covered, grid, strict=True)])
    shown = area.per_patch(grid, (factor * image[0], factor * image[1]))
    assert shown == pytest.approx([factor * side for side in own])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["covered", "image"])
@pytest.mark.parametrize("wrong", [(0, 4), (4, -1), (4.0, 4), (True, 4), [4, 4], (4,), 4, None])
def test_sides_are_whole_numbers_from_1_up(name, wrong):
    with pytest.raises(TokenExitError, match=f"`{name}` must be a height and a width from 1 up, in pixels, got"):
        Area(**{"covered": (8, 8), "image": (8, 8), name: wrong})
