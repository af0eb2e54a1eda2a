import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.core import strategies
from tests.core.backends import each_backend
from tokenexit import TokenExitError, tokens

SCORE = st.integers(-2, 2).map(float) | st.sampled_from([np.nan, np.inf, -np.inf]) | st.floats(0, 1, width=32)


def room(stay, score, capacity):
    """Which of one image's places have room and which are surplus, by sorting them: the obvious way."""
    worth = [-math.inf if math.isnan(one) else one for one in score.tolist()]
    ordered = sorted(np.flatnonzero(stay).tolist(), key=lambda place: (worth[place], place))
    return sorted(ordered[:capacity]), sorted(ordered[capacity:])


@st.composite
def selections(draw, images=st.integers(0, 3), slots=st.integers(0, 10)):
    """What `select` is given: (stay, score, capacity)."""
    stay = draw(strategies.running(images, slots))
    return stay, draw(hnp.arrays(np.float32, stay.shape, elements=SCORE)), draw(st.integers(0, stay.shape[1]))


def numbered(shape, *rest):
    """A different number everywhere, small enough for half precision."""
    return np.arange(math.prod((*shape, *rest))).reshape(*shape, *rest).astype(np.float32)


def select(backend, stay, score, capacity):
    return tokens.select(backend.array(stay), backend.array(score), capacity=capacity)


@each_backend
@given(mask=strategies.running())
def test_a_packing_lists_the_running_slots_in_order(backend, mask):
    packing = tokens.pack(backend.array(mask))
    image, slot = np.nonzero(mask)
    assert (packing.images, packing.slots) == mask.shape
    assert packing.layout == (len(image),)
    np.testing.assert_array_equal(backend.numpy(packing.image), image)
    np.testing.assert_array_equal(backend.numpy(packing.slot), slot)
    np.testing.assert_array_equal(backend.numpy(packing.index), np.flatnonzero(mask))
    lengths = [sum(row) for row in mask.tolist()]
    np.testing.assert_array_equal(backend.numpy(packing.lengths), lengths)
    np.testing.assert_array_equal(backend.numpy(packing.offsets), [sum(lengths[:n]) for n in range(len(lengths) + 1)])
    np.testing.assert_array_equal(backend.numpy(packing.rank)[mask.reshape(-1)], np.arange(len(image)))


@each_backend
@given(mask=strategies.running(), data=st.data())
def test_scatter_undoes_gather(backend, mask, data):
    x = backend.held(data.draw(hnp.arrays(np.float32, (*mask.shape, 3), elements=st.floats(-9, 9, width=32))))
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
        before, known = packing, int(stay.sum())
        packing, rows = tokens.repack(before, backend.array(stay))
        counted, same = tokens.repack(before, backend.array(stay), count=known)
        np.testing.assert_array_equal(backend.numpy(same), backend.numpy(rows))
        np.testing.assert_array_equal(backend.numpy(counted.index), backend.numpy(packing.index))
        for count in (None, known):
            narrow, taken = tokens.restrict(before, backend.array(mask), count=count)
            np.testing.assert_array_equal(backend.numpy(taken), backend.numpy(rows))
            np.testing.assert_array_equal(backend.numpy(narrow.index), backend.numpy(packing.index))
            assert narrow.is_full == mask.all()
        row = backend.array(backend.numpy(row)[backend.numpy(rows)])
        np.testing.assert_array_equal(backend.numpy(packing.running), mask)
        np.testing.assert_array_equal(backend.numpy(packing.index), np.flatnonzero(mask))
        np.testing.assert_array_equal(backend.numpy(row), np.flatnonzero(mask))


@each_backend
@given(drawn=selections())
def test_a_selection_holds_the_least_confident_and_counts_the_surplus(backend, drawn):
    stay, score, capacity = drawn
    selection, surplus = select(backend, *drawn)
    slot_of, valid = backend.numpy(selection.slot_of), backend.numpy(selection.valid)
    surplus, overflow = backend.numpy(surplus), backend.numpy(selection.overflow)
    assert slot_of.shape == valid.shape == (stay.shape[0], capacity) == selection.layout
    for image, own in enumerate(backend.held(score)):
        held, beyond = room(stay[image], own, capacity)
        assert slot_of[image][valid[image]].tolist() == held
        assert valid[image].tolist() == [entry < len(held) for entry in range(capacity)]
        assert np.flatnonzero(surplus[image]).tolist() == beyond
        assert overflow[image] == len(beyond)


@each_backend
@given(drawn=selections())
def test_what_a_selection_says_of_its_entries(backend, drawn):
    stay, score, capacity = drawn
    selection, _ = select(backend, *drawn)
    images, slots = stay.shape
    held = [room(stay[image], one, capacity)[0] for image, one in enumerate(backend.held(score))]
    running = np.zeros_like(stay)
    for image, places in enumerate(held):
        running[image, places] = True
    valid = backend.numpy(selection.valid).reshape(-1)
    assert (selection.images, selection.slots) == (images, slots)
    np.testing.assert_array_equal(backend.numpy(selection.running), running)
    np.testing.assert_array_equal(backend.numpy(selection.lengths), [len(places) for places in held])
    np.testing.assert_array_equal(backend.numpy(selection.image), np.repeat(np.arange(images), capacity))
    np.testing.assert_array_equal(backend.numpy(selection.slot)[valid], np.nonzero(running)[1])
    np.testing.assert_array_equal(backend.numpy(selection.index)[valid], np.flatnonzero(running))
    np.testing.assert_array_equal(backend.numpy(selection.rank)[running.reshape(-1)], np.flatnonzero(valid))
    # What is not valid names some slot all the same, so that nothing reads beyond the batch.
    assert ((backend.numpy(selection.slot) >= 0) & (backend.numpy(selection.slot) < max(slots, 1))).all()


@each_backend
@given(drawn=selections(), rest=st.sampled_from([(), (2,), (2, 3)]))
def test_scatter_undoes_gather_of_a_selection(backend, drawn, rest):
    stay, score, capacity = drawn
    selection, surplus = select(backend, stay, score, capacity)
    x = numbered(stay.shape, *rest)
    other = np.full_like(x, -100)
    held = tokens.gather(backend.array(x), selection)
    assert tuple(held.shape) == (*selection.layout, *rest)
    running = stay & ~backend.numpy(surplus)
    np.testing.assert_array_equal(backend.numpy(held)[backend.numpy(selection.valid)], backend.held(x)[running])
    restored = backend.numpy(tokens.scatter(held, selection, into=backend.array(other)))
    wanted = np.where(running.reshape(*stay.shape, *[1] * len(rest)), backend.held(x), backend.held(other))
    np.testing.assert_array_equal(restored, wanted)


@each_backend
@given(drawn=selections(), data=st.data())
def test_a_selection_of_a_selection_goes_back_to_the_first_grid(backend, drawn, data):
    stay, score, capacity = drawn
    selection, _ = select(backend, *drawn)
    held = [room(stay[image], one, capacity)[0] for image, one in enumerate(backend.held(score))]
    x = backend.held(numbered(stay.shape))
    values = backend.numpy(tokens.gather(backend.array(x), selection))
    for _ in range(3):
        on = data.draw(hnp.arrays(np.bool_, selection.layout))
        score = data.draw(hnp.arrays(np.float32, selection.layout, elements=SCORE))
        capacity = data.draw(st.integers(0, capacity))
        before = backend.numpy(selection.valid)
        selection, entry, surplus = tokens.reselect(
            selection, backend.array(on), backend.array(score), capacity=capacity
        )
        entry, surplus, valid = (backend.numpy(one) for one in (entry, surplus, selection.valid))
        overflow, slot_of = backend.numpy(selection.overflow), backend.numpy(selection.slot_of)
        assert entry.shape == valid.shape == selection.layout == (stay.shape[0], capacity)
        values = np.take_along_axis(values, entry, axis=1)
        for image, own in enumerate(backend.held(score)):
            kept, beyond = room(on[image] & before[image], own, capacity)
            held[image] = [held[image][place] for place in kept]
            assert entry[image][valid[image]].tolist() == kept
            assert np.flatnonzero(surplus[image]).tolist() == beyond
            assert overflow[image] == len(beyond)
            assert slot_of[image][valid[image]].tolist() == held[image]
            assert values[image][valid[image]].tolist() == x[image][held[image]].tolist()
    restored = backend.numpy(tokens.scatter(backend.array(values), selection, into=backend.array(np.full_like(x, -1))))
    running = np.zeros_like(stay)
    for image, places in enumerate(held):
        running[image, places] = True
    np.testing.assert_array_equal(restored, np.where(running, x, -1))


@each_backend
@given(mask=strategies.running(), data=st.data())
def test_both_receipts_of_the_same_tokens_agree(backend, mask, data):
    most = int(mask.sum(axis=1).max(initial=0))
    capacity = data.draw(st.integers(most, mask.shape[1]))
    packing = tokens.pack(backend.array(mask))
    selection, surplus = select(backend, mask, np.zeros(mask.shape, np.float32), capacity)
    assert not backend.numpy(surplus).any()
    x = numbered(mask.shape, 2)
    row, held = tokens.gather(backend.array(x), packing), tokens.gather(backend.array(x), selection)
    np.testing.assert_array_equal(backend.numpy(held)[backend.numpy(selection.valid)], backend.numpy(row))
    into = backend.array(np.full_like(x, -1))
    one, other = tokens.scatter(row, packing, into=into), tokens.scatter(held, selection, into=into)
    np.testing.assert_array_equal(backend.numpy(one), backend.numpy(other))
    for name in ("running", "lengths"):
        np.testing.assert_array_equal(backend.numpy(getattr(packing, name)), backend.numpy(getattr(selection, name)))


@each_backend
@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (2, 0), (2, 3)])
@pytest.mark.parametrize("everything", [False, True])
def test_everything_nothing_and_no_room(backend, shape, everything):
    stay = np.full(shape, everything)
    score = np.zeros(shape, np.float32)
    for capacity in {0, shape[1]}:
        selection, surplus = select(backend, stay, score, capacity)
        held = everything and capacity > 0
        assert backend.numpy(selection.valid).all() == (held or 0 in (shape[0], capacity))
        np.testing.assert_array_equal(backend.numpy(selection.running), np.full(shape, held))
        np.testing.assert_array_equal(backend.numpy(surplus), stay & (capacity == 0))
        np.testing.assert_array_equal(backend.numpy(selection.overflow), stay.sum(axis=1) * (capacity == 0))
        again, entry, none = tokens.reselect(
            selection,
            backend.array(np.ones(selection.layout, bool)),
            backend.array(np.zeros(selection.layout, np.float32)),
            capacity=capacity,
        )
        np.testing.assert_array_equal(backend.numpy(again.running), np.full(shape, held))
        assert tuple(entry.shape) == selection.layout
        assert not backend.numpy(none).any()
        x = backend.array(numbered(shape, 2))
        restored = tokens.scatter(tokens.gather(x, again), again, into=x)
        np.testing.assert_array_equal(backend.numpy(restored), backend.numpy(x))
    packing = tokens.pack(backend.array(stay))
    assert packing.layout == ((shape[0] * shape[1]) * everything,)


@pytest.mark.parametrize(
    ("score", "surplus"),
    [
        ([1.0, 1.0, 1.0, 1.0], [2, 3]),  # of equal ones, the later leave
        ([np.nan, 0.1, np.nan, -0.5], [1, 3]),  # about NaN nothing is known: it stays
        ([-np.inf, np.nan, 0.9, 0.8], [2, 3]),
        ([np.inf, np.inf, 0.9, 0.8], [0, 1]),
        ([np.inf, 2.0, np.inf, np.inf], [2, 3]),
        ([0.2, 0.9, 0.3, 0.8], [1, 3]),
    ],
)
def test_who_is_surplus(score, surplus):
    selection, found = tokens.select(np.ones((1, 4), bool), np.array([score], np.float32), capacity=2)
    assert np.flatnonzero(found).tolist() == surplus
    assert selection.slot_of.tolist() == [sorted({0, 1, 2, 3} - set(surplus))]
    assert selection.overflow.tolist() == [2]


def test_infinite_scores_of_what_does_not_stay_take_no_room():
    stay = np.array([[False, True, False, True]])
    selection, surplus = tokens.select(stay, np.array([[np.inf, np.inf, -np.inf, np.nan]], np.float32), capacity=2)
    assert selection.slot_of.tolist() == [[1, 3]]
    assert selection.valid.all()
    assert not surplus.any()


@pytest.mark.usefixtures("unchecked")
def test_shapes_are_checked():
    packing = tokens.pack(np.array([[True, False, True]]))
    with pytest.raises(TokenExitError, match=r"`running` must have shape \(images, slots\), got shape \(3,\)"):
        tokens.pack(np.array([True, False, True]))
    with pytest.raises(TokenExitError, match=r"`x` must have 1 images of 3 slots .*got shape \(1, 4\)"):
        tokens.gather(np.zeros((1, 4)), packing)
    layout = r"`values` must start with the layout of the receipt, \(2,\), got shape \(3,\)"
    with pytest.raises(TokenExitError, match=layout):
        tokens.scatter(np.zeros(3), packing, into=np.zeros((1, 3)))
    with pytest.raises(TokenExitError, match=layout):
        tokens.repack(packing, np.ones(3, bool))
    with pytest.raises(TokenExitError, match=r"`running` must have 1 images of 3 slots .*got shape \(1, 2\)"):
        tokens.restrict(packing, np.ones((1, 2), bool))
    with pytest.raises(TokenExitError, match=r"`into` must end in the shape of one token, \(4,\), got shape \(1, 3\)"):
        tokens.scatter(np.zeros((2, 4)), packing, into=np.zeros((1, 3)))
    with pytest.raises(TokenExitError, match=r"`into` must have 1 images of 3 slots .*got shape \(2, 3\)"):
        tokens.scatter(np.zeros(2), packing, into=np.zeros((2, 3)))


@pytest.mark.usefixtures("unchecked")
def test_what_a_selection_is_made_of_is_checked():
    stay, score = np.ones((2, 3), bool), np.zeros((2, 3), np.float32)
    with pytest.raises(TokenExitError, match=r"`stay` must have shape \(images, slots\), got shape \(3,\)"):
        tokens.select(stay[0], score, capacity=1)
    with pytest.raises(TokenExitError, match=r"`score` must have the shape of `stay`, \(2, 3\), got shape \(1, 3\)"):
        tokens.select(stay, score[:1], capacity=1)
    for capacity in (-1, 4):
        message = rf"`capacity` must be from 0 to the 3 slots of an image, got {capacity}"
        with pytest.raises(TokenExitError, match=message):
            tokens.select(stay, score, capacity=capacity)
    selection, _ = tokens.select(stay, score, capacity=2)
    with pytest.raises(TokenExitError, match=r"`stay` must have the layout of the selection, \(2, 2\), got .*\(2, 3\)"):
        tokens.reselect(selection, stay, score, capacity=1)
    with pytest.raises(
        TokenExitError, match=r"`score` must have the layout of the selection, \(2, 2\), got .*\(2, 3\)"
    ):
        tokens.reselect(selection, stay[:, :2], score, capacity=1)
    with pytest.raises(TokenExitError, match=r"`capacity` must be from 0 to the 2 entries of an image, got 3"):
        tokens.reselect(selection, stay[:, :2], score[:, :2], capacity=3)
    with pytest.raises(TokenExitError, match=r"`values` must start with the layout .*\(2, 2\), got shape \(2, 3\)"):
        tokens.scatter(score, selection, into=score)
