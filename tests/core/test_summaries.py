"""What a call has done, in words and in pictures."""

import numpy as np
import pytest

from tests.core.backends import each_backend
from tokenexit import TokenExitError, pictures
from tokenexit.area import Area
from tokenexit.summaries import summary

DEPTH = np.array([[[3, 3, 12], [12, 6, 12]]])
RAN = np.array([[7, 7, 7, 5, 5, 5, 4, 4, 4, 4, 4, 4]])


@each_backend
def test_a_summary_says_where_patches_left_and_what_was_saved(backend):
    depth, ran = backend.array(DEPTH), backend.array(RAN)
    assert summary(depth, ran) == (
        "1 image of 2 x 3 patches: of the patches left 33.3 % after block 3, 16.7 % after block 6; "
        "50.0 % ran through all 12 blocks. Blocks ran on 71.4 % of the tokens that the dense network has in them."
    )
    size, lacked = backend.array(np.array([[[1, 4, 4], [1, 4, 4]]])), backend.array(np.array([2]))
    whole = summary(depth, ran, merged_size=size, overflow=lacked)
    assert "66.7 % of them ran merged, up to 4 as one." in whole
    assert whole.endswith("2 left or merged only because there was no room for them.")
    every = backend.array(np.full((2, 2, 3), 12))
    all_ran = summary(every, backend.array(np.full((2, 12), 7)), overflow=backend.array(np.array([0, 0])))
    assert all_ran == (
        "2 images of 2 x 3 patches: none of the patches left before the last of 12 blocks. "
        "Blocks ran on 100.0 % of the tokens that the dense network has in them."
    )
    nothing = backend.array(np.zeros((0, 2, 3), np.int64))
    assert summary(nothing, backend.array(np.zeros((0, 12), np.int64))) == "0 images of 2 x 3 patches."


@pytest.mark.usefixtures("unchecked")
def test_a_summary_of_two_batches_is_refused():
    with pytest.raises(TokenExitError, match="`tokens_per_block` must be of 1 images, as `exit_depth`, got 2"):
        summary(DEPTH, np.concatenate([RAN, RAN]))


@pytest.mark.parametrize("ending", [".png", ".svg"])
@pytest.mark.parametrize("photo", ["bytes", "normalised", "unit"])
def test_a_picture_has_a_panel_for_each_map(photo, ending, tmp_path):
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    shown = {
        "bytes": rng.integers(0, 256, (20, 30, 3)).astype(np.uint8),
        "normalised": rng.normal(size=(20, 30, 3)).astype(np.float32),
        "unit": rng.random((20, 30, 3)).astype(np.float32),
    }[photo]
    figure = pictures.draw(shown, DEPTH[0], blocks=12, file=tmp_path / f"one{ending}")
    assert [axis.get_title() for axis in figure.axes][:2] == ["image", "blocks that patches ran through"]
    assert (tmp_path / f"one{ending}").stat().st_size > 1000
    maps = {"merged_size": np.array([[1, 4, 4], [1, 4, 4]]), "labels": DEPTH[0], "values": rng.random((4, 6))}
    whole = pictures.draw(shown, DEPTH[0], blocks=12, area=Area((16, 24), (20, 30)), **maps)
    titles = [axis.get_title() for axis in whole.axes if axis.get_title()]
    assert titles == ["image", "blocks that patches ran through", "patches in a token", "classes", "output"]
    steps = whole.axes[1].images[-1]
    assert tuple(steps.get_extent()) == (0, 24, 16, 0)
    assert steps.get_array().tolist() == [[0, 0, 2], [2, 1, 2]]
    assert whole.axes[1].get_xlim() == (0, 30)


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_photo_is_refused():
    pytest.importorskip("matplotlib")
    with pytest.raises(TokenExitError, match=r"`photo` must be of shape \(height, width, 3\), got shape \(3, 4, 5\)"):
        pictures.draw(np.zeros((3, 4, 5)), DEPTH[0], blocks=12)
