"""Merging on all backends, against cells one at a time; and what holds for it whatever the features."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core import oracles, strategies
from tests.core.backends import each_backend
from tokenexit import TokenExitError, exits, ledger, merging, tokens
from tokenexit.exits import HeadOutput
from tokenexit.policies import Budget, ConfidenceAbove, NeighboursAgree, always

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # infinite logits, in NumPy
GRIDS = [(1, 1), (2, 2), (3, 5), (4, 4), (5, 8), (9, 6)]


@st.composite
def scenes(draw, grids=GRIDS):
    """Features of a batch with patches alike, some that have left, prefix tokens before them."""
    grid, prefix, images = draw(st.sampled_from(grids)), draw(st.integers(0, 2)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    slots = prefix + grid[0] * grid[1]
    features = rng.normal(size=(images, slots, 3)) * draw(st.sampled_from([0.05, 0.5])) + rng.normal(size=3)
    odd = draw(st.booleans())
    features = np.where(rng.random(features.shape) < 0.02 * odd, np.nan, features).astype(np.float32)
    running = rng.random((images, slots)) < draw(st.sampled_from([0.0, 0.9, 1.0]))
    return grid, prefix, features, running, rng


def held(backend, merged):
    return {name: backend.numpy(getattr(merged, name)) for name in ("running", "owner", "size")}


def features_of(backend, joined):
    return backend.numpy(joined.features())


@each_backend
@strategies.fewer(3)
@given(scene=scenes(), side=st.sampled_from([2, 4, 8]), later=st.sampled_from([2, 4, 8]), data=st.data())
def test_merges_are_those_of_cells_one_at_a_time_and_again(backend, scene, side, later, data):
    grid, _, features, running, rng = scene
    alike = data.draw(st.sampled_from([None, 0.5, 0.9]))
    agreed = rng.random(running.shape) < 0.9 if alike is None or data.draw(st.booleans()) else None
    label = (rng.random(running.shape) < 0.05).astype(np.int64) if data.draw(st.booleans()) else None
    array, half = backend.array, "16" in backend.name
    near, rounding = (0.05, {"rtol": 0.02, "atol": 0.02}) if half else (1e-5, {"rtol": 1e-5, "atol": 1e-5})

    def optional(x):
        return None if x is None else array(x)

    state = merging.alone(array(running), grid=grid)
    expected = oracles.Cells.alone(running, grid)
    values = backend.held(features)
    for largest, least in ((side, alike), (later, 0.7)):
        with np.errstate(all="ignore"):
            joined = merging.merge(
                array(values), state, side=largest, alike=least, agreed=optional(agreed), label=optional(label)
            )
        sure = expected.merge(values, largest, least, agreed, label, near=near)
        if not sure:  # a similarity at the threshold, to rounding
            return
        state, found = joined.merged, held(backend, joined.merged)
        np.testing.assert_array_equal(found["running"], expected.running)
        np.testing.assert_array_equal(found["owner"], expected.owner)
        np.testing.assert_array_equal(found["size"][expected.running], expected.size[expected.running])
        got = features_of(backend, joined)
        np.testing.assert_allclose(got[expected.running], expected.features[expected.running], **rounding)
        # Each token is of one entry that runs, or was of none before.
        of = np.take_along_axis(found["running"], found["owner"], axis=1)
        np.testing.assert_array_equal(of, running)
        counts = [np.bincount(own[ran], minlength=len(own)) for own, ran in zip(found["owner"], running, strict=True)]
        np.testing.assert_array_equal(np.stack(counts)[found["running"]], found["size"][found["running"]])
        values = got


@each_backend
@strategies.fewer(3)
@given(scene=scenes(), share=st.sampled_from([0.01, 0.3, 0.5, 0.6, 1.0]), earlier=st.sampled_from([None, 0.9]))
def test_a_share_of_the_cells_that_could_merge_does(backend, scene, share, earlier):
    grid, _, features, running, rng = scene
    agreed = rng.random(running.shape) < 0.9
    label = (rng.random(running.shape) < 0.05).astype(np.int64)
    state, values = merging.alone(backend.array(running), grid=grid), backend.array(features)
    with np.errstate(all="ignore"):
        if earlier is not None:  # what has merged by then is no cell that could
            joined = merging.merge(values, state, side=2, alike=earlier)
            state, values = joined.merged, joined.features()
        marks = {"agreed": backend.array(agreed), "label": backend.array(label)}
        found = merging.similarities(values, state, **marks)
        known = backend.numpy(found)[~np.isnan(backend.numpy(found))]
        if len(known) == 0:
            with pytest.raises(TokenExitError, match="`similarity` must be of cells of which some can merge"):
                merging.alike_for(found, share=share)
            return
        alike = merging.alike_for(found, share=share)
        every = merging.merge(values, state, side=2, alike=-1.0, **marks).merged
        after = merging.merge(values, state, side=2, alike=alike, **marks).merged
    before, largest, now = (int(held(backend, one)["running"].sum()) for one in (state, every, after))
    assert -1 <= alike <= 1
    assert (before - largest) // 3 == len(known)  # those that could, and no others
    wanted = int(np.floor(share * len(known) + 0.5))
    ranked = np.sort(known)[::-1]
    tied = 0 < wanted < len(known) and ranked[wanted - 1] == ranked[wanted]
    merges = (known > ranked[wanted]).sum() if tied else wanted  # of equals none, rather than too many
    rounding = wanted > 0 and ranked[0] >= 1  # of tokens that are the same
    assert (before - now) // 3 == merges or rounding


@each_backend
def test_the_threshold_lies_halfway_and_none_among_equals_is_taken(backend):
    row = np.asarray([[0.5, np.nan, 0.9], [0.7, 0.7, np.nan]], np.float32)
    for share, wanted in ((0.05, 0.95), (0.25, 0.8), (0.5, 0.7), (0.75, 0.6), (1.0, -0.25)):
        assert merging.alike_for(backend.array(row), share=share) == pytest.approx(wanted, abs=1e-2)
    close = np.nextafter(np.float32(0.7), np.float32(1))
    between = merging.alike_for(np.asarray([close, 0.7], np.float32), share=0.5)
    assert (np.asarray([close, 0.7], np.float32) > between).tolist() == [True, False]


@each_backend
@strategies.fewer(3)
@given(scene=scenes())
def test_nothing_merges_and_nothing_changes(backend, scene):
    grid, _, features, running, _ = scene
    state = merging.alone(backend.array(running), grid=grid)
    nothing = backend.array(np.zeros_like(running))
    with np.errstate(all="ignore"):
        joined = merging.merge(backend.array(features), state, side=8, alike=0.0, agreed=nothing)
    for name, value in held(backend, state).items():
        np.testing.assert_array_equal(held(backend, joined.merged)[name], value)
    np.testing.assert_array_equal(features_of(backend, joined), backend.held(features))


@each_backend
@strategies.fewer(2)
@given(
    scene=scenes(),
    before=st.sampled_from([2, 4, 8]),
    side=st.sampled_from([2, 4, 8]),
    alike=st.sampled_from([0.5, 0.9, 1.0]),
    share=st.floats(0, 1),
)
def test_without_room_the_most_alike_cells_merge_one_at_a_time(backend, scene, before, side, alike, share):
    grid, _, features, running, _ = scene
    capacity = round(share * running.shape[1])
    near, rounding = (0.05, {"rtol": 0.02, "atol": 0.02}) if "16" in backend.name else (1e-5, {"atol": 1e-5})
    with np.errstate(all="ignore"):
        state = merging.alone(backend.array(running), grid=grid)
        joined = merging.merge(backend.array(features), state, side=before, alike=alike)
        fitted, forced = merging.merge_to_fit(joined, side=side, capacity=capacity)
    was, found, forced = held(backend, joined.merged), held(backend, fitted.merged), backend.numpy(forced)
    expected = oracles.Cells(was["running"].copy(), was["owner"].copy(), was["size"].copy(), grid, np.zeros(0))
    values, got = features_of(backend, joined), features_of(backend, fitted)
    sure = expected.fit(values, side, capacity, near=near)
    # However alike they are: as many as it takes.
    entries = found["running"].sum(axis=1)
    np.testing.assert_array_equal(entries, expected.running.sum(axis=1))
    np.testing.assert_array_equal(forced, was["running"].sum(axis=1) - entries)
    for image, count in enumerate(entries):
        fits = was["running"][image].sum() <= capacity
        if fits:  # nothing changes
            for name in was:
                np.testing.assert_array_equal(found[name][image], was[name][image])
            np.testing.assert_array_equal(got[image], values[image])
        elif count > capacity:
            assert not any(expected.whole(image, level) for level in (2, 4, 8) if level <= side)
    if sure:
        np.testing.assert_array_equal(found["running"], expected.running)
        np.testing.assert_array_equal(found["owner"], expected.owner)
        np.testing.assert_array_equal(found["size"][expected.running], expected.size[expected.running])
        np.testing.assert_allclose(got[expected.running], expected.features[expected.running], **rounding)


@each_backend
def test_of_cells_as_alike_the_first_merge_and_those_without_a_direction_last(backend):
    """Three cells of one similarity, and one, the first, of NaN."""
    features = np.ones((1, 16, 2), np.float32)
    features[0, 0] = 0
    joined = merging.merge(
        backend.array(features), merging.alone(backend.array(np.ones((1, 16), bool)), grid=(4, 4)), side=2, alike=1.0
    )
    for capacity, wanted in ((15, [2]), (11, [2, 8]), (7, [2, 8, 10]), (4, [0, 2, 8, 10]), (3, [0, 2, 8, 10])):
        with np.errstate(all="ignore"):
            fitted, forced = merging.merge_to_fit(joined, side=2, capacity=capacity)
        owners = np.flatnonzero(np.bincount(backend.numpy(fitted.merged.owner)[0]) > 1)
        assert owners.tolist() == wanted
        assert backend.numpy(forced).tolist() == [3 * len(wanted)]


@each_backend
@strategies.fewer(3)
@given(scene=scenes(), side=st.sampled_from([2, 4, 8]))
def test_of_a_whole_grid_all_cells_merge_where_there_is_room_for_none(backend, scene, side):
    grid, prefix, features, running, _ = scene
    everything = backend.array(np.ones_like(running))
    joined = merging.merge(
        backend.array(features), merging.alone(everything, grid=grid), side=2, agreed=backend.array(running)
    )
    with np.errstate(all="ignore"):
        fitted, _ = merging.merge_to_fit(joined, side=side, capacity=0)
    assert (held(backend, fitted.merged)["running"].sum(axis=1) == prefix + merging.fewest(grid, side=side)).all()


@each_backend
@strategies.fewer(3)
@given(scene=scenes(), share=st.sampled_from([0.4, 0.7, 1.0]))
def test_an_image_merges_alone_as_in_its_batch(backend, scene, share):
    grid, _, features, running, _ = scene

    def merge(features, running):
        state = merging.alone(backend.array(running), grid=grid)
        joined = merging.merge(backend.array(features), state, side=4, alike=0.6)
        return merging.merge_to_fit(joined, side=4, capacity=round(share * running.shape[1]))[0]

    with np.errstate(all="ignore"):
        whole = merge(features, running)
        for image in range(len(running)):
            part = slice(image, image + 1)
            one = merge(features[part], running[part])
            for name, value in held(backend, one.merged).items():
                np.testing.assert_array_equal(held(backend, whole.merged)[name][part], value)
            ran = held(backend, one.merged)["running"]
            np.testing.assert_array_equal(features_of(backend, whole)[part][ran], features_of(backend, one)[ran])


@each_backend
@strategies.fewer(3)
@given(scene=scenes())
def test_what_is_spread_is_gathered_again(backend, scene):
    """gather(scatter(y)) == y, with members in between; and sums by size are conserved."""
    grid, _, features, running, _ = scene
    state = merging.alone(backend.array(running), grid=grid)
    with np.errstate(all="ignore"):
        merged = merging.merge(backend.array(features), state, side=4, alike=0.5).merged
    receipt = tokens.pack(merged.running)
    row = backend.array(np.arange(receipt.index.shape[0] * 2, dtype=np.float32).reshape(-1, 2))
    blank = backend.array(np.zeros((*running.shape, 2), np.float32))
    everywhere = merging.spread(tokens.scatter(row, receipt, into=blank), merged.owner)
    np.testing.assert_array_equal(backend.numpy(tokens.gather(everywhere, receipt)), backend.numpy(row))
    sizes = backend.numpy(tokens.gather(merged.size, receipt))
    by_size = (backend.numpy(row).astype(np.float64) * sizes[:, None]).sum()
    assert by_size == pytest.approx(backend.numpy(everywhere)[running].sum(dtype=np.float64))
    again = merging.spread(everywhere, merged.owner)
    np.testing.assert_array_equal(backend.numpy(again), backend.numpy(everywhere))


@each_backend
@strategies.fewer(3)
@given(scene=scenes(), radius=st.integers(0, 2), seed=st.integers(0, 99))
def test_an_entry_leaves_only_if_all_its_tokens_would(backend, scene, radius, seed):
    """And then with the outcome of its owner, whatever lies at the slots of the others."""
    grid, prefix, features, running, _ = scene
    running = np.ones_like(running)
    rng = np.random.default_rng(seed)
    array = backend.array
    with np.errstate(all="ignore"):
        joined = merging.merge(array(features), merging.alone(array(running), grid=grid), side=4, alike=0.5)
    merged = joined.merged
    logits = strategies.numbers(rng, (*running.shape, 2), True, 2) + np.array([2, 0], np.float32)
    receipt = tokens.pack(merged.running)
    output = HeadOutput(tokens.gather(array(logits.astype(np.float32)), receipt))
    book = exits.update(exits.begin(output, receipt), receipt, output)
    policy = NeighboursAgree(0.6, radius=radius)
    with np.errstate(all="ignore"):
        found = exits.decide(policy, book, merged.running, grid=grid, merged=merged)
        # The same on all tokens by themselves, each with the class scores of its owner.
        spread = merging.spread(book.logits, merged.owner)
        whole = ledger.Ledger(spread, book.depth)
        single = exits.decide(policy, whole, array(running), grid=grid)
    owner, stays = backend.numpy(merged.owner), backend.numpy(single.stay)
    wanted = np.zeros_like(running)
    for image, slot in np.argwhere(backend.numpy(merged.running)).tolist():
        wanted[image, slot] = stays[image][owner[image] == slot].any()
    np.testing.assert_array_equal(backend.numpy(found.stay), wanted)
    with np.errstate(all="ignore"):
        marks, label = exits.agree(policy, book, merged.running, grid=grid, merged=merged)
    everyone = np.take_along_axis(wanted, owner, axis=1)
    everyone[:, :prefix] = True
    np.testing.assert_array_equal(backend.numpy(marks), ~everyone)
    assert (backend.numpy(label)[:, :prefix] == -1).all()


@each_backend
def test_retention_and_budgets_count_entries(backend):
    """A merged token is one that stays, whatever it holds."""
    grid, running = (4, 4), np.ones((1, 16), bool)
    features = np.ones((1, 16, 2), np.float32)
    agreed = np.zeros((1, 16), bool)
    agreed[0, [0, 1, 4, 5, 2, 3, 6, 7]] = True  # the upper cells
    state = merging.alone(backend.array(running), grid=grid)
    merged = merging.merge(backend.array(features), state, side=2, agreed=backend.array(agreed)).merged
    receipt = tokens.pack(merged.running)
    assert receipt.index.shape[0] == 10
    logits = np.zeros((10, 2), np.float32)
    logits[:, 0] = np.arange(10, 0, -1)  # the first is the most certain
    output = HeadOutput(backend.array(logits))
    book = exits.update(exits.begin(output, receipt), receipt, output)
    kept = exits.decide(always().retaining(per_class=3), book, merged.running, grid=grid, merged=merged)
    assert np.flatnonzero(backend.numpy(kept.stay)).tolist() == [0, 2, 8]
    few = exits.decide(Budget(4), book, merged.running, grid=grid, merged=merged)
    assert np.flatnonzero(backend.numpy(few.stay)).tolist() == [12, 13, 14, 15]


@each_backend
@given(seed=st.integers(0, 99), after=st.booleans())
def test_a_merged_token_is_turned_by_the_angle_of_its_centroid(backend, seed, after):
    rng = np.random.default_rng(seed)
    grid, prefix = (5, 6), 1
    start, step = rng.uniform(0, 6, 3), rng.uniform(-0.3, 0.3, (2, 3))
    row, column = np.divmod(np.arange(30), 6)
    angle = start + row[:, None] * step[0] + column[:, None] * step[1]
    angle = np.concatenate([np.zeros((prefix, 3)), angle]).astype(np.float32)
    table = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    table = table if after else np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    slot, size = np.array([0, 1, 1 + 2 * 6 + 4, 1, 1 + 4 * 6]), np.array([1, 1, 4, 16, 1])
    found = merging.turned(
        backend.array(table), backend.array(slot), backend.array(size), grid=grid, pairs=1 if after else -1
    )
    middle = [
        angle[0],
        angle[1],
        angle[1] + 2.5 * step[0] + 4.5 * step[1],
        angle[1] + 1.5 * step.sum(axis=0),
        angle[25],
    ]
    parts = (np.cos, np.sin) if after else (np.sin, np.cos)
    wanted = np.stack([np.concatenate([f(one) for f in parts]) for one in middle]).reshape(5, *table.shape[1:])
    np.testing.assert_allclose(backend.numpy(found), wanted, atol=0.01 if "16" in backend.name else 1e-5)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, m: merging.merge(x, m, side=3, alike=0.5), r"`side` must be one of \[2, 4, 8, 16\], got 3"),
        (lambda x, m: merging.alike_for(x, share=0.0), "`share` must be a number above 0 and at most 1, got 0.0"),
        (lambda x, m: merging.alike_for(x, share=1.5), "`share` must be a number above 0 and at most 1, got 1.5"),
        (lambda x, m: merging.merge(x, m, side=2), "`alike` must be given if `agreed` is not, got None"),
        (
            lambda x, m: merging.merge(x[:, :3], m, side=2, alike=0.5),
            r"`features` must have the images and slots \(1, 4\)",
        ),
        (
            lambda x, m: merging.merge(x, m, side=2, agreed=np.ones((1, 3), bool)),
            r"`agreed` must have the images and slots \(1, 4\), got shape \(1, 3\)",
        ),
        (
            lambda x, m: merging.merge_to_fit(merging.merge(x, m, side=2, alike=0.5), side=1, capacity=1),
            r"`side` must be one of \[2, 4, 8, 16\], got 1",
        ),
        (
            lambda x, m: merging.merge_to_fit(merging.merge(x, m, side=2, alike=0.5), side=2, capacity=-1),
            "`capacity` must be a number of entries from 0 up, got -1",
        ),
        (lambda *_: merging.fewest((2, 2), side=5), r"`side` must be one of \[2, 4, 8, 16\], got 5"),
        (lambda _, m: merging.alone(m.running, grid=(2, 3)), r"`grid` must have at most 4 places, got \(2, 3\)"),
        (
            lambda x, m: merging.spread(x[:, :3], m.owner),
            r"`values` must have the images and slots of `owner`, \(1, 4\)",
        ),
        (
            lambda x, m: merging.turned(x[0], m.owner[0], m.size[0], grid=(2, 2), pairs=1),
            r"`pairs` must be an axis, but the first, of even size of a table of shape \(4, 3\), got 1",
        ),
        (
            lambda x, m: exits.decide(
                ConfidenceAbove(0.5), ledger.Ledger(x, m.owner), m.running, grid=(2, 2), merged=m, cell=3
            ),
            "`cell` must be None where tokens have merged, got 3",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(TokenExitError, match=message):
        call(np.zeros((1, 4, 3), np.float32), merging.alone(np.ones((1, 4), bool), grid=(2, 2)))
