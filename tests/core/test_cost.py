import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.core.backends import each_backend
from tokenexit import TokenExitError, cost

PARTS = cost.Cost(embed=7, blocks=(100, 200, 300), width=8, prefix=1, exit_heads={1: 11, 2: 13}, head=17)


@each_backend
@given(
    ran=hnp.arrays(np.int64, st.tuples(st.integers(0, 3), st.just(3)), elements=st.integers(0, 20)),
    exits=st.sets(st.sampled_from([1, 2])),
)
def test_multiply_adds_are_the_sum_over_what_ran(backend, ran, exits):
    got = backend.numpy(PARTS.multiply_adds(backend.array(ran), patches=5, exits=exits))
    for row, total in zip(ran.tolist(), got.tolist(), strict=True):
        wanted = 5 * 7
        for block, count in enumerate(row):
            wanted += count * PARTS.blocks[block] + 2 * count * count * 8
        for after, head in ((1, 11), (2, 13), (3, 17)):
            if after in exits or after == 3:
                wanted += max(row[after - 1] - 1, 0) * head
        assert total == wanted


def test_a_dense_vit_base_costs_what_is_published():
    """ViT-B/16 at 224 pixels: 17.6 G multiply-adds with its attention products, classifier aside."""
    width, patches = 768, 196
    vit = cost.Cost(
        embed=3 * 16 * 16 * width, blocks=(12 * width * width,) * 12, width=width, prefix=1, exit_heads={}, head=0
    )
    total = int(vit.multiply_adds(np.full((1, 12), patches + 1), patches=patches)[0])
    assert total / 1e9 == pytest.approx(17.56, abs=0.05)


def test_token_blocks_are_a_share_of_all():
    assert cost.token_blocks(np.array([[10, 10], [10, 0]]), slots=10) == 0.75


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named():
    with pytest.raises(TokenExitError, match=r"`tokens_per_block` must have shape \(images, 3\), got shape \(1, 2\)"):
        PARTS.multiply_adds(np.zeros((1, 2), np.int64), patches=5)
    with pytest.raises(
        TokenExitError, match=r"`exits` must be among the blocks with an exit head, \[1, 2\], got \[3\]"
    ):
        PARTS.multiply_adds(np.zeros((1, 3), np.int64), patches=5, exits=[3])
    with pytest.raises(TokenExitError, match="at least one image, block and slot"):
        cost.token_blocks(np.zeros((0, 3), np.int64), slots=5)
