import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.core import strategies
from tests.core.backends import each_backend
from tokenexit import TokenExitError, ledger, scores, tokens


@each_backend
@given(mask=strategies.running(st.integers(0, 3), st.integers(1, 9)), data=st.data())
def test_every_token_is_settled_exactly_once_with_what_it_left_with(backend, mask, data):
    """Leave in three rounds, the rest at the end, and compare with a dictionary."""
    packing = tokens.pack(backend.array(mask))
    book, wanted = None, {}
    for depth in (2, 3, 5):
        count = packing.index.shape[0]
        logits = data.draw(strategies.logits(st.just(count), st.just(3), odd=False))
        leave = data.draw(hnp.arrays(np.bool_, count)) if depth < 5 else np.ones(count, bool)
        row = backend.array(logits)
        book = ledger.open_ledger(row, packing) if book is None else book
        book = ledger.record(book, packing, backend.array(leave), row, depth=depth)
        for slot, left, own in zip(backend.numpy(packing.index).tolist(), leave, logits, strict=True):
            if left:
                assert slot not in wanted
                wanted[slot] = (depth, own)
        packing, _ = tokens.repack(packing, backend.array(~leave))
    assert sorted(wanted) == np.flatnonzero(mask).tolist()
    found = {name: backend.numpy(getattr(book, name)) for name in ("logits", "label", "score", "depth")}
    found = {name: value.reshape(-1, *value.shape[2:]) for name, value in found.items()}
    for slot in range(mask.size):
        depth, own = wanted.get(slot, (0, np.zeros(3, np.float32)))
        assert found["depth"][slot] == depth
        np.testing.assert_array_equal(found["logits"][slot], own)
        assert found["label"][slot] == (own.argmax() if depth else -1)
        assert found["score"][slot] == pytest.approx(scores.confidence(own) if depth else 0, abs=1e-6)


def test_recording_changes_nothing_in_the_ledger_before():
    packing = tokens.pack(np.ones((1, 2), bool))
    logits = np.ones((2, 3), np.float32)
    before = ledger.open_ledger(logits, packing)
    ledger.record(before, packing, np.array([True, False]), logits, depth=4)
    assert before.depth.tolist() == [[0, 0]]
    assert before.label.tolist() == [[-1, -1]]


@pytest.mark.usefixtures("unchecked")
def test_shapes_are_checked():
    packing = tokens.pack(np.ones((1, 2), bool))
    book = ledger.open_ledger(np.ones((2, 3), np.float32), packing)
    with pytest.raises(
        TokenExitError, match=r"`logits` must have shape \(tokens, classes\) with 2 tokens, got shape \(3, 3\)"
    ):
        ledger.open_ledger(np.ones((3, 3), np.float32), packing)
    with pytest.raises(TokenExitError, match=r"`leave` must have one entry for each of the 2 tokens, got shape \(1,\)"):
        ledger.record(book, packing, np.ones(1, bool), np.ones((2, 3), np.float32), depth=1)
