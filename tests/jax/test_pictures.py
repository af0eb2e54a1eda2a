"""What a call has done, in words and in pictures."""

import jax
import numpy as np
import pytest

import tokenexit_jax as tej
from tokenexit import TokenExitError


@pytest.mark.usefixtures("unchecked")
def test_an_output_reads_as_a_sentence_and_shows_its_classes(tmp_path):
    ran, depth = jax.numpy.full((2, 6), 25), np.where(np.arange(48).reshape(2, 4, 6) % 4 == 0, 2, 6)
    out = tej.Output(
        logits=jax.random.normal(jax.random.key(0), (2, 4, 6, 3)),
        exit_depth=jax.numpy.asarray(depth),
        tokens_per_block=ran,
        capacity_per_block=ran,
        overflow=jax.numpy.zeros(2, int),
        exits=(2,),
        head_on="running",
    )
    assert out.summary().startswith("2 images of 4 x 6 patches: of the patches left 25.0 % after block 2; 75.0 %")
    assert repr(out) == f"<Output: {out.summary()}>"
    figure = tej.show(np.zeros((32, 48, 3), np.uint8), out, tmp_path / "one.png", index=1)
    assert [axis.get_title() for axis in figure.axes if axis.get_title()] == [
        "image", "blocks that patches ran through", "classes"
    ]  # fmt: skip
    assert (tmp_path / "one.png").exists()
    for message, given in (
        (
            "`index` must be from 0 to 1, the place of the image in the batch, got None",
            (np.zeros((8, 12, 3)), out, None),
        ),
        ("`index` must be from 0 to 1, the place of the image in the batch, got -1", (np.zeros((8, 8, 3)), out, -1)),
        (r"`image` must be of shape \(height, width, 3\), or with one channel, got", (np.zeros((3, 8, 8)), out, 0)),
        ("`output` must be what a model from `wrap` returns, got ndarray", (np.zeros((8, 8, 3)), np.zeros(2), 0)),
    ):
        with pytest.raises(TokenExitError, match=message):
            tej.show(given[0], given[1], index=given[2])
