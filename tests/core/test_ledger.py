import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.core import strategies
from tests.core.backends import each_backend
from tokenexit import TokenExitError, ledger, tokens

CLASSES, WIDTH = 3, 2
FIELDS = ("logits", "depth", "class_scores", "features")
fewer = strategies.fewer(2)  # whole runs: each example is several


def draw_run(data):
    """A batch, and for every exit the depth, who leaves, and what every slot then has: logits, score, features."""
    mask = data.draw(strategies.running(st.integers(0, 3), st.integers(1, 8)))
    random = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    exits = []
    for depth in (2, 3, 5, 7):
        leave = random.random(mask.shape) < data.draw(st.sampled_from([0.0, 0.3, 0.7])) if depth < 7 else mask
        logits, features = (random.normal(size=(*mask.shape, n)).astype(np.float32) for n in (CLASSES, WIDTH))
        exits.append((depth, leave, logits, random.random(mask.shape).astype(np.float32), features))
    return mask, exits


def written(backend, book):
    """What a ledger says, as NumPy arrays."""
    found = {name: getattr(book, name) for name in FIELDS}
    return {name: None if value is None else backend.numpy(value) for name, value in found.items()}


def agree(one, other):
    for name in FIELDS:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def check_book(backend, found, left, latest):
    """Compare a ledger with dictionaries of the exits at which a place left, and last ran: `{(image, slot): exit}`."""
    for place in np.ndindex(found["depth"].shape):
        assert found["depth"][place] == (left[place][0] if place in left else 0)
        if place not in latest:
            assert np.isnan(found["logits"][place]).all()
            assert not found["features"][place].any()
            continue
        _, _, logits, _, features = latest[place]
        np.testing.assert_array_equal(found["logits"][place], backend.held(logits)[place])
        np.testing.assert_array_equal(found["features"][place], backend.held(features)[place])
        if found["class_scores"] is not None:
            np.testing.assert_array_equal(found["class_scores"][place], backend.held(logits * 2)[place])


def at_exit(backend, book, receipt, leave, step, scored, batch):
    """The ledger once the marked entries of a receipt have left at an exit."""
    depth, _, logits, _, features = step

    def gather(x):
        return tokens.gather(backend.array(x), receipt)

    given_ = {"class_scores": gather(logits * 2) if scored else None, "features": gather(features)}
    if book is None:
        book = ledger.open_ledger(gather(logits), receipt, **given_)
        agree(written(backend, book), nothing_settled(scored, batch))
    return ledger.record(book, receipt, leave, gather(logits), depth=depth, **given_)


def nothing_settled(scored, batch):
    unknown = np.full((*batch, CLASSES), np.nan)
    return {
        "logits": unknown,
        "depth": np.zeros(batch),
        "class_scores": unknown if scored else None,
        "features": np.zeros((*batch, WIDTH)),
    }


@each_backend
@fewer
@given(data=st.data(), scored=st.booleans())
def test_every_token_of_a_row_has_its_latest_outcome_and_then_that_which_it_left_with(backend, data, scored):
    mask, exits = draw_run(data)
    packing, book, wanted, latest = tokens.pack(backend.array(mask)), None, {}, {}
    for step in exits:
        leave = step[1][backend.numpy(packing.running)]
        book = at_exit(backend, book, packing, backend.array(leave), step, scored, mask.shape)
        latest |= dict.fromkeys(map(tuple, np.argwhere(backend.numpy(packing.running)).tolist()), step)
        for image, slot in np.argwhere(backend.numpy(packing.running) & step[1]).tolist():
            assert (image, slot) not in wanted
            wanted[image, slot] = step
        check_book(backend, written(backend, book), wanted, latest)
        packing, _ = tokens.repack(packing, backend.array(~leave))
    assert sorted(wanted) == list(map(tuple, np.argwhere(mask).tolist()))


@each_backend
@fewer
@given(data=st.data(), scored=st.booleans())
def test_every_token_of_a_selection_has_its_latest_outcome_also_when_there_is_no_room(backend, data, scored):
    """The surplus leaves as those do that the policy lets go; a packed row from which the same leave agrees."""
    mask, exits = draw_run(data)
    slots = mask.shape[1]
    capacity = data.draw(st.integers(0, slots))
    # Who has no room from the start is settled by a selection of all.
    everything, _ = tokens.select(backend.array(mask), backend.array(np.zeros(mask.shape, np.float32)), capacity=slots)
    selection, packing, book, same = everything, tokens.pack(backend.array(mask)), None, None
    wanted, latest = {}, {}
    for step in exits:
        leave = tokens.gather(backend.array(step[1]), selection)
        score = tokens.gather(backend.array(step[3]), selection)
        smaller, _, surplus = tokens.reselect(selection, selection.valid & ~leave, score, capacity=capacity)
        gone = backend.numpy(leave | surplus)
        book = at_exit(backend, book, selection, backend.array(gone), step, scored, mask.shape)
        latest |= dict.fromkeys(map(tuple, np.argwhere(backend.numpy(selection.running)).tolist()), step)
        gone &= backend.numpy(selection.valid)
        for image, entry in np.argwhere(gone).tolist():
            place = image, int(backend.numpy(selection.slot_of)[image, entry])
            assert place not in wanted
            wanted[place] = step
        check_book(backend, written(backend, book), wanted, latest)
        rows = np.array([place in wanted for place in map(tuple, np.argwhere(backend.numpy(packing.running)).tolist())])
        rows = rows.astype(bool)
        same = at_exit(backend, same, packing, backend.array(rows), step, scored, mask.shape)
        packing, _ = tokens.repack(packing, backend.array(~rows))
        agree(written(backend, book), written(backend, same))
        np.testing.assert_array_equal(backend.numpy(smaller.running), backend.numpy(packing.running))
        selection, capacity = smaller, data.draw(st.integers(0, capacity))
    assert sorted(wanted) == list(map(tuple, np.argwhere(mask).tolist()))


@each_backend
def test_entries_that_are_not_valid_leave_nothing_behind(backend):
    selection, _ = tokens.select(
        backend.array(np.array([[False, True, False]])), backend.array(np.zeros((1, 3), np.float32)), capacity=3
    )
    logits = backend.array(np.ones((1, 3, CLASSES), np.float32))
    book = ledger.open_ledger(logits, selection)
    book = ledger.record(book, selection, backend.array(np.ones((1, 3), bool)), logits, depth=4)
    assert backend.numpy(book.depth).tolist() == [[0, 4, 0]]
    np.testing.assert_array_equal(backend.numpy(book.logits)[0, :, 0], [np.nan, 1, np.nan])
    assert book.features is None


@each_backend
@fewer
@given(data=st.data())
def test_rejoining_gives_every_slot_its_present_or_its_frozen_feature(backend, data):
    mask, exits = draw_run(data)
    _, leave, logits, _, features = exits[0]
    now = exits[1][4]
    capacity = data.draw(st.integers(int((mask & ~leave).sum(axis=1).max(initial=0)), mask.shape[1]))
    packing = tokens.pack(backend.array(mask))
    book = ledger.open_ledger(
        tokens.gather(backend.array(logits), packing),
        packing,
        features=tokens.gather(backend.array(features), packing),
    )
    book = ledger.record(
        book,
        packing,
        backend.array(leave[mask]),
        tokens.gather(backend.array(logits), packing),
        depth=1,
        features=tokens.gather(backend.array(features), packing),
    )
    stay = mask & ~leave
    selection, _ = tokens.select(
        backend.array(stay), backend.array(np.zeros(stay.shape, np.float32)), capacity=capacity
    )
    wanted = np.where(stay[..., None], now, np.where(mask[..., None], features, 0))
    for receipt in (tokens.pack(backend.array(stay)), selection):
        rejoined = ledger.rejoin(book, receipt, tokens.gather(backend.array(now), receipt))
        np.testing.assert_array_equal(backend.numpy(rejoined), backend.held(wanted))


def folded(features, mask, leave, into, above):
    """Every image by itself, token by token, in double precision."""
    result = features.astype(np.float64)
    for image in range(len(mask)):
        leavers = [slot for slot in np.flatnonzero(mask[image]).tolist() if leave[image, slot]]
        others = int(mask[image].sum()) - 1
        if mask[image, into] and len(leavers) > above * others:
            mean = sum(features[image, slot].astype(np.float64) for slot in leavers) / len(leavers)
            result[image, into] = (result[image, into] + mean) / 2
    return result


@each_backend
@given(
    mask=strategies.running(st.integers(0, 3), st.integers(1, 9)),
    above=st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]),
    data=st.data(),
)
def test_leavers_fold_into_one_token_and_nothing_else_changes(backend, mask, above, data):
    into = data.draw(st.integers(0, mask.shape[1] - 1))
    leave = data.draw(hnp.arrays(np.bool_, mask.shape))
    leave[:, into] = False
    number = st.floats(-9, 9, width=32) | st.sampled_from([1e-3, 3e4])
    features = backend.held(data.draw(hnp.arrays(np.float32, (*mask.shape, WIDTH), elements=number)))
    wanted = folded(features, mask, leave, into, above)
    # In half precision, the result is rounded once, from float32.
    rounding = {"torch-float16": 2**-11, "torch-bfloat16": 2**-8}.get(backend.name, 2**-21)
    selection, _ = tokens.select(
        backend.array(mask), backend.array(np.zeros(mask.shape, np.float32)), capacity=mask.shape[1]
    )
    others = mask.copy()
    others[:, into] = False
    for receipt in (tokens.pack(backend.array(mask)), selection):
        row = tokens.gather(backend.array(features), receipt)
        gone = tokens.gather(backend.array(leave), receipt)
        found = ledger.fold_leavers(row, receipt, gone, into=into, above=above)
        assert found.dtype == row.dtype
        found = backend.numpy(tokens.scatter(found, receipt, into=backend.array(features)))
        np.testing.assert_array_equal(found[others], features[others])
        np.testing.assert_array_equal(found[~mask], features[~mask])
        np.testing.assert_allclose(found, wanted, rtol=2 * rounding, atol=3e4 * 2**-20)


@pytest.mark.parametrize(("leavers", "folds"), [(0, False), (1, False), (2, True), (10, True)])
def test_the_share_of_leavers_must_be_exceeded(leavers, folds):
    features = np.arange(11, dtype=np.float32)[:, None]
    leave = np.arange(11) > 10 - leavers
    found = ledger.fold_leavers(features, tokens.pack(np.ones((1, 11), bool)), leave, above=0.1)
    assert (found[0] != features[0]) == folds


def test_what_is_not_a_number_stays_where_it_is():
    """A NaN among those that stay, or in another image, does not reach the token that takes the mean in."""
    features = np.array([1.0, np.nan, 4.0, np.nan, np.nan], np.float32)[:, None]
    packing = tokens.pack(np.array([[True, True, True], [True, False, True]]))
    found = ledger.fold_leavers(features, packing, np.array([False, False, True, False, True]), above=0.1)
    np.testing.assert_array_equal(found, np.array([2.5, np.nan, 4.0, np.nan, np.nan])[:, None])


def test_recording_changes_nothing_in_the_ledger_before():
    packing = tokens.pack(np.ones((1, 2), bool))
    logits = np.ones((2, 3), np.float32)
    before = ledger.open_ledger(logits, packing, features=logits)
    ledger.record(before, packing, np.array([True, False]), logits, depth=4, features=logits)
    ledger.rejoin(before, packing, logits)
    assert before.depth.tolist() == [[0, 0]]
    assert np.isnan(before.logits).all()
    assert not before.features.any()


@pytest.mark.usefixtures("unchecked")
def test_shapes_are_checked():
    packing = tokens.pack(np.ones((1, 2), bool))
    selection, _ = tokens.select(np.ones((1, 3), bool), np.zeros((1, 3), np.float32), capacity=2)
    good, bad = np.ones((2, 3), np.float32), np.ones((3, 3), np.float32)
    leave = np.ones(2, bool)
    book = ledger.open_ledger(good, packing)
    layout = r"must have the layout \(2,\) and one more axis, got shape \(3, 3\)"
    with pytest.raises(TokenExitError, match=rf"`logits` {layout}"):
        ledger.open_ledger(bad, packing)
    with pytest.raises(TokenExitError, match=rf"`features` {layout}"):
        ledger.open_ledger(good, packing, features=bad)
    with pytest.raises(TokenExitError, match=rf"`logits` {layout}"):
        ledger.record(book, packing, leave, bad, depth=1)
    with pytest.raises(
        TokenExitError, match=r"`logits` must have the layout \(1, 2\) and one more axis, got .*\(2, 3\)"
    ):
        ledger.open_ledger(good, selection)
    entry = r"must have one entry for each of the layout \(2,\), got shape \(1,\)"
    with pytest.raises(TokenExitError, match=rf"`leave` {entry}"):
        ledger.record(book, packing, leave[:1], good, depth=1)
    with pytest.raises(TokenExitError, match=r"`left` must have the shape of the ledger, \(1, 2\), got shape \(2,\)"):
        ledger.freeze(book, leave, depth=1)


@pytest.mark.usefixtures("unchecked")
def test_features_and_class_scores_are_given_exactly_if_they_are_kept():
    packing, leave, row = tokens.pack(np.ones((1, 2), bool)), np.ones(2, bool), np.ones((2, 3), np.float32)
    without, keeping = ledger.open_ledger(row, packing), ledger.open_ledger(row, packing, features=row)
    rule = "`features` must be given exactly if the ledger keeps them"
    with pytest.raises(TokenExitError, match=rf"{rule}, got features, and it keeps none"):
        ledger.record(without, packing, leave, row, depth=1, features=row)
    with pytest.raises(TokenExitError, match=rf"{rule}, got none, and it keeps features"):
        ledger.record(keeping, packing, leave, row, depth=1)
    with pytest.raises(TokenExitError, match=r"`class_scores` must .*, got class_scores, and it keeps none"):
        ledger.record(without, packing, leave, row, depth=1, class_scores=row)
    with pytest.raises(TokenExitError, match=r"`ledger` must keep features to rejoin, got one without"):
        ledger.rejoin(without, packing, row)
    with pytest.raises(TokenExitError, match=r"`features` must have the layout \(2,\) and one more axis, got .*\(3,\)"):
        ledger.rejoin(keeping, packing, row[0])
    with pytest.raises(
        TokenExitError, match=r"`features` must have the layout \(2,\) and one more axis, got .*\(1, 3\)"
    ):
        ledger.record(keeping, packing, leave, row, depth=1, features=row[:1])
    with pytest.raises(TokenExitError, match=r"`logits` must have the 3 classes of the ledger, got 2"):
        ledger.record(without, packing, leave, row[:, :2], depth=1)


@pytest.mark.usefixtures("unchecked")
def test_what_folding_is_given_is_checked():
    packing, leave, row = tokens.pack(np.ones((1, 2), bool)), np.ones(2, bool), np.ones((2, 3), np.float32)
    with pytest.raises(
        TokenExitError, match=r"`features` must have the layout \(2,\) and one more axis, got .*\(1, 3\)"
    ):
        ledger.fold_leavers(row[:1], packing, leave)
    with pytest.raises(TokenExitError, match=r"`leave` must have the layout \(2,\), got shape \(1,\)"):
        ledger.fold_leavers(row, packing, leave[:1])
    for into in (-1, 2):
        with pytest.raises(TokenExitError, match=rf"`into` must be one of the 2 slots, got {into}"):
            ledger.fold_leavers(row, packing, leave, into=into)
    for above in (-0.1, 1.5):
        with pytest.raises(TokenExitError, match=rf"`above` must be a number in \[0, 1\], got {above}"):
            ledger.fold_leavers(row, packing, leave, above=above)


def test_where_nothing_is_folded_nothing_changes_in_double_precision_either():
    packing = tokens.pack(np.ones((2, 4), bool))
    features = np.random.default_rng(0).normal(size=(8, 3))
    leave = np.zeros(8, bool)
    np.testing.assert_array_equal(ledger.fold_leavers(features, packing, leave), features)
    leave[[1, 2]] = True
    folded = ledger.fold_leavers(features, packing, leave)
    np.testing.assert_allclose(folded[0], (features[0] + features[[1, 2]].mean(axis=0)) / 2, rtol=1e-12)
    np.testing.assert_array_equal(folded[1:], features[1:])


def test_the_taker_is_none_of_the_leavers():
    packing, features = tokens.pack(np.ones((1, 4), bool)), np.eye(4, 3, dtype=np.float32)
    both = ledger.fold_leavers(features, packing, np.array([True, True, False, False]))
    np.testing.assert_array_equal(both, ledger.fold_leavers(features, packing, np.array([False, True, False, False])))


@pytest.mark.usefixtures("unchecked")
def test_a_ledger_keeps_its_dtype_and_marks_are_boolean():
    packing = tokens.pack(np.ones((1, 2), bool))
    book = ledger.open_ledger(np.zeros((2, 3), np.float32), packing)
    book = ledger.record(book, packing, np.array([True, False]), np.ones((2, 3)), depth=1)
    assert book.logits.dtype == np.float32
    with pytest.raises(TokenExitError, match="`stay` must be boolean, got dtype int64"):
        tokens.repack(packing, np.array([0, 1]))
    with pytest.raises(TokenExitError, match="`left` must be boolean, got dtype int64"):
        ledger.freeze(book, np.array([[0, 1]]), depth=1)
