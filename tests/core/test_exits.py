"""The exit point, on all backends and in both layouts, against passes token by token."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.core import oracles, strategies
from tests.core.backends import each_backend
from tokenexit import TokenExitError, cells, exits, ledger, merging, policies, replay, schedule, scores, tokens
from tokenexit.carries import Feature, MaskPrediction, Prediction, Preserved, Translated
from tokenexit.exits import HeadOutput
from tokenexit.policies import ConfidenceAbove, ErrorBelow, NeighboursAgree, Patience, always, never
from tokenexit.schedule import Exit, Schedule, Stage

DEPTH = 5
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # infinite logits, in NumPy
each_layout = pytest.mark.parametrize("layout", ["packed", "static"])


@st.composite
def passes(draw):
    """Recorded class scores of every head, and a plan with exits after some of the blocks."""
    grid = draw(st.sampled_from([(1, 1), (1, 5), (3, 4), (4, 3)]))
    images, classes = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    shape = (images, grid[0] * grid[1], classes)
    after = sorted(draw(st.sets(st.integers(1, DEPTH - 1), min_size=1, max_size=3)))
    odd = draw(st.booleans())
    prevailing = np.where(np.arange(classes) == rng.integers(classes), 3, 0)
    logits = {
        block: (strategies.numbers(rng, shape, odd, 3) + prevailing).astype(np.float32) for block in (*after, DEPTH)
    }
    drawn = strategies.policies(classes).filter(lambda policy: "gate" not in policy.needs)
    plan = Schedule(tuple(Exit(block, draw(drawn)) for block in after), cell=draw(st.sampled_from([None, None, 2, 3])))
    error = {block: strategies.errors(rng, shape[:2], odd) for block in after}
    return grid, logits, plan, error


def scores_by(backend):
    return lambda rows: {name: backend.numpy(one.of(backend.array(rows))) for name, one in scores.SCORES.items()}


def wanted(backend, grid, logits, plan, prefix, error=None):
    places = np.arange(grid[0] * grid[1])
    centres = set()
    if plan.cell is not None:
        centres = set(places[cells.is_cell_centre(places, grid=grid, side=plan.cell)].tolist())
    held = {after: backend.held(table) for after, table in logits.items()}
    told = None if error is None else {after: backend.held(table) for after, table in error.items()}
    with np.errstate(invalid="ignore"):
        options = {"grid": grid, "prefix": prefix, "centres": centres, "error": told}
        return oracles.exit_pass(held, plan, scores_by(backend), **options)


def run(backend, grid, logits, plan, prefix, layout, error=None):
    """A pass by `update`, `decide` and `freeze`, prefix tokens in the row, in either layout."""
    xp_array, images, places = backend.array, *logits[DEPTH].shape[:2]
    slots = prefix + places
    table = {after: np.pad(one, ((0, 0), (prefix, 0), (0, 0))) for after, one in logits.items()}
    everything = xp_array(np.ones((images, slots), dtype=bool))
    nothing = xp_array(np.zeros((images, slots), dtype=np.float32))

    def receipt_of(running):
        return tokens.pack(running) if layout == "packed" else tokens.select(running, nothing, capacity=slots)[0]

    receipt, book, labels = receipt_of(everything), None, []
    for stage in plan.stages(DEPTH):
        if stage.exit is None:
            continue
        told = None
        if error is not None:
            told = tokens.gather(xp_array(np.pad(error[stage.stop], ((0, 0), (prefix, 0)))), receipt)
        output = HeadOutput(tokens.gather(xp_array(table[stage.stop]), receipt), error=told)
        book = exits.begin(output, receipt) if book is None else book
        book = exits.update(book, receipt, output)
        options = {"grid": grid, "exit": stage.index, "cell": plan.cell}
        decision = exits.decide(stage.exit.policy, book, receipt.running, labels, **options)
        assert not backend.numpy(decision.stay)[~backend.numpy(receipt.running)].any()
        book = ledger.freeze(book, receipt.running & ~decision.stay, depth=stage.stop)
        receipt = receipt_of(decision.stay)
        labels.append(decision.label)
    return receipt, book


@each_backend
@strategies.fewer(6)
@given(drawn=passes(), prefix=st.integers(0, 2))
def test_a_replay_is_a_pass_token_by_token(backend, drawn, prefix):
    grid, logits, plan, error = drawn
    expected = wanted(backend, grid, logits, plan, prefix, error)
    given_, told = ({after: backend.array(table) for after, table in one.items()} for one in (logits, error))
    found = replay.replay(given_, plan, grid=grid, prefix=prefix, error=told)
    np.testing.assert_array_equal(backend.numpy(found.exit_depth), expected.depth)
    np.testing.assert_array_equal(backend.numpy(found.logits), expected.logits)
    np.testing.assert_array_equal(backend.numpy(found.tokens_per_block), expected.tokens_per_block)


@each_backend
def test_a_replay_has_the_classes_of_earlier_heads_and_not_of_the_last(backend):
    """Patience waits for two heads of one class: the first token has them, the second only by the final head."""
    sure = 9 * np.eye(2, dtype=np.float32)
    logits = {2: sure[[0, 0]], 3: sure[[0, 1]], DEPTH: sure[[1, 1]]}
    given_ = {after: backend.array(table[None]) for after, table in logits.items()}
    plan = Schedule((Exit(2, Patience(1)), Exit(3, Patience(1))))
    found = replay.replay(given_, plan, grid=(1, 2), prefix=0)
    np.testing.assert_array_equal(backend.numpy(found.exit_depth), [[3, DEPTH]])


@each_layout
@each_backend
@strategies.fewer(6)
@given(drawn=passes(), prefix=st.integers(0, 2))
def test_prefix_tokens_run_as_long_as_any_patch_of_their_image(backend, layout, drawn, prefix):
    grid, logits, plan, error = drawn
    error = error | {DEPTH: error[min(error)]}
    plan = Schedule((*plan.exits, Exit(DEPTH, never())), cell=plan.cell) if not plan.active else plan
    expected = wanted(backend, grid, logits, plan, prefix, error)
    receipt, book = run(backend, grid, logits, plan, prefix, layout, error)
    if book is None:
        return
    depth = backend.numpy(book.exit_depth(DEPTH))
    np.testing.assert_array_equal(depth[:, prefix:], expected.depth)
    ran_on = (expected.depth == DEPTH).any(axis=1)
    running = backend.numpy(receipt.running)
    np.testing.assert_array_equal(running[:, prefix:], expected.depth == DEPTH)
    assert (running[:, :prefix] == ran_on[:, None]).all()
    np.testing.assert_array_equal(depth[:, :prefix], np.repeat(expected.depth.max(axis=1)[:, None], prefix, axis=1))


@each_layout
@each_backend
def test_neighbours_are_those_of_the_grid_where_prefix_tokens_come_before_it(backend, layout):
    grid, classes, depths = (3, 4), 3, set()
    plan = Schedule(tuple(Exit(block, NeighboursAgree(0.5, radius=1)) for block in (1, 2, 3)))
    prevailing = np.where(np.arange(12)[:, None] % 4 < 2, [3, 0, 0], [0, 3, 0])  # the left half, and the right
    for seed in range(6):
        rng = np.random.default_rng(seed)
        logits = {
            block: (rng.normal(size=(2, 12, classes)) + prevailing).astype(np.float32) for block in (1, 2, 3, DEPTH)
        }
        expected = wanted(backend, grid, logits, plan, 2)
        _, book = run(backend, grid, logits, plan, 2, layout)
        np.testing.assert_array_equal(backend.numpy(book.exit_depth(DEPTH))[:, 2:], expected.depth)
        depths |= set(expected.depth.flatten().tolist())
    assert depths == {1, 2, 3, DEPTH}


def test_jax_replays_the_same_compiled():
    jax = pytest.importorskip("jax")
    rng = np.random.default_rng(0)
    logits = {after: rng.normal(scale=3, size=(3, 12, 4)).astype(np.float32) for after in (2, 3, 5)}
    plan = Schedule((Exit(2, ConfidenceAbove(0.8).retaining(per_class=1)), Exit(3, Patience(1))), cell=2)
    own = replay.replay(logits, plan, grid=(3, 4), prefix=1)
    arrays = {after: jax.numpy.asarray(table) for after, table in logits.items()}
    program = jax.jit(lambda given_: vars(replay.replay(given_, plan, grid=(3, 4), prefix=1)))
    found = program(arrays)
    np.testing.assert_array_equal(found["exit_depth"], own.exit_depth)
    np.testing.assert_array_equal(found["logits"], own.logits)
    np.testing.assert_array_equal(found["tokens_per_block"], own.tokens_per_block)


@each_backend
def test_what_may_not_leave_for_lack_of_room_is_the_least_certain(backend):
    running = backend.array(np.ones((1, 10), dtype=bool))
    receipt = tokens.pack(running)
    rng = np.random.default_rng(0)
    output = HeadOutput(backend.array(rng.normal(size=(10, 3)).astype(np.float32)))
    book = exits.update(exits.begin(output, receipt), receipt, output)
    decision = exits.decide(never(), book, running, grid=(3, 3), cell=3)
    pinned = np.zeros((1, 10), dtype=bool)
    pinned[0, [0, 5]] = True  # the prefix token, and the centre of the one cell
    own = backend.numpy(scores.confidence(output.logits))[None]
    np.testing.assert_array_equal(backend.numpy(decision.certain), np.where(pinned, -np.inf, own))
    np.testing.assert_array_equal(backend.numpy(decision.confidence), own[:, 1:])
    assert backend.numpy(decision.stay).all()
    half = exits.decide(ConfidenceAbove(0.5), book, running, grid=(3, 3), cell=3)
    np.testing.assert_array_equal(backend.numpy(half.stay), (own <= 0.5) | pinned)
    gone = exits.decide(always(), book, running, grid=(3, 3), cell=3)
    assert not backend.numpy(gone.stay).any()
    plain = exits.decide(never(), book, running, grid=(2, 5))
    np.testing.assert_array_equal(backend.numpy(plain.certain), own)


@each_layout
@each_backend
def test_presence_is_that_of_the_last_head_that_read_any_token_of_the_image(backend, layout):
    """Also of an image all of whose tokens leave there; and of one that has left before, that it left with."""
    array = backend.array
    running = np.array([[True, True], [True, True], [False, False]])
    nothing = array(np.zeros((3, 2), dtype=np.float32))
    receipt = (
        tokens.pack(array(running)) if layout == "packed" else tokens.select(array(running), nothing, capacity=2)[0]
    )
    rng = np.random.default_rng(1)
    shape = (*receipt.layout, 2)
    logits, masks = (array(rng.normal(size=shape).astype(np.float32)) for _ in range(2))
    before, now = (array(rng.normal(size=(3, 2)).astype(np.float32)) for _ in range(2))
    book = ledger.open_ledger(logits, receipt, presence_logits=before)
    output = HeadOutput(logits, mask_logits=masks, presence_logits=now)
    settled = exits.update(book, receipt, output)
    wanted_ = np.concatenate([backend.numpy(now)[:2], backend.numpy(before)[2:]])
    np.testing.assert_array_equal(backend.numpy(settled.presence_logits), wanted_)
    kept = backend.numpy(settled.mask_logits)
    np.testing.assert_array_equal(kept[:2].reshape(4, 2), backend.numpy(masks).reshape(-1, 2)[:4])
    assert not kept[2].any()


@each_layout
@each_backend
@strategies.fewer(4)
@given(mask=strategies.running(st.integers(1, 3), st.integers(1, 6)), seed=st.integers(0, 99))
def test_what_leaves_rejoins_as_it_was_or_with_what_its_last_head_has_made_of_it(backend, layout, mask, seed):
    rng, array = np.random.default_rng(seed), backend.array
    nothing = array(np.zeros(mask.shape, dtype=np.float32))

    def receipt_of(running):
        return (
            tokens.pack(running) if layout == "packed" else tokens.select(running, nothing, capacity=mask.shape[1])[0]
        )

    def drawn(*size):
        return rng.normal(size=(*mask.shape, *size)).astype(np.float32)

    steps = [(drawn(3), drawn(2), drawn(2), rng.random(mask.shape) < 0.4) for _ in range(2)]
    last = drawn(2)
    for carry, which in ((Feature(), 0), (Translated(), 1), (Prediction(), None), (MaskPrediction(), None)):
        receipt, book, wanted_ = receipt_of(array(mask)), None, np.where(mask[..., None], last, 0)
        running = mask
        for depth, (scored, own, translated, leave) in enumerate(steps, 1):
            logits, raw, made = (tokens.gather(array(one), receipt) for one in (scored, own, translated))
            output = HeadOutput(logits, features=made)
            kept = exits.carried(carry, output, raw)
            book = exits.begin(output, receipt, features=kept) if book is None else book
            book = exits.update(book, receipt, output, features=kept)
            book = ledger.freeze(book, receipt.running & array(leave), depth=depth)
            if which is not None:
                wanted_ = np.where((running & leave)[..., None], (own, translated)[which], wanted_)
            running = running & ~leave
            receipt = receipt_of(array(running))
        assert (book.features is None) == (which is None)
        if which is not None:
            present = tokens.gather(array(last), receipt)
            every = ledger.rejoin(book, receipt, present)
            np.testing.assert_array_equal(backend.numpy(every), backend.held(wanted_.astype(np.float32)))
            again = tokens.scatter(tokens.gather(every, receipt), receipt, into=every)
            np.testing.assert_array_equal(backend.numpy(again), backend.numpy(every))


@pytest.mark.usefixtures("unchecked")
def test_class_scores_are_no_translation():
    row = np.zeros((2, 3), np.float32)
    with pytest.raises(
        TokenExitError, match="`output` must be of a head that translates, for a carry that is, got class"
    ):
        exits.carried(Translated(), HeadOutput(row), row)


@each_backend
@given(mask=strategies.running(st.integers(1, 3), st.integers(1, 6)), seed=st.integers(0, 99))
def test_an_update_is_the_heads_own_where_tokens_run_and_the_ledgers_elsewhere(backend, mask, seed):
    rng = np.random.default_rng(seed)
    old, new = (rng.normal(size=(*mask.shape, 3)).astype(np.float32) for _ in range(2))
    receipt = tokens.pack(backend.array(mask))
    everything = tokens.pack(backend.array(np.ones_like(mask)))
    first = HeadOutput(tokens.gather(backend.array(old), everything))
    book = exits.update(exits.begin(first, everything), everything, first)
    found = exits.update(book, receipt, HeadOutput(tokens.gather(backend.array(new), receipt)))
    wanted_ = np.where(mask[..., None], backend.held(new), backend.held(old))
    np.testing.assert_array_equal(backend.numpy(found.logits), wanted_)


@each_layout
@each_backend
def test_without_classes_foretold_errors_decide_what_leaves_and_what_is_certain(backend, layout):
    array, running = backend.array, np.ones((2, 10), dtype=bool)
    rng, nothing = np.random.default_rng(0), array(np.zeros((2, 10), np.float32))
    receipt = (
        tokens.pack(array(running)) if layout == "packed" else tokens.select(array(running), nothing, capacity=10)[0]
    )
    first, second = (array((rng.integers(0, 8, receipt.layout) / 8).astype(np.float32)) for _ in range(2))
    blank = array(np.zeros((*receipt.layout, 0), np.float32))
    output = HeadOutput(blank, error=first)
    book = exits.update(exits.begin(output, receipt), receipt, output)
    told = backend.numpy(first).reshape(2, 10)
    decision = exits.decide(ErrorBelow(0.5, radius=0), book, receipt.running, grid=(3, 3), cell=3)
    stay = np.where(np.arange(10) == 5, True, told >= 0.5)
    stay[:, 0] = True
    np.testing.assert_array_equal(backend.numpy(decision.stay), stay)
    pinned = np.isin(np.arange(10), (0, 5))[None]
    np.testing.assert_array_equal(backend.numpy(decision.certain), np.where(pinned, -np.inf, -told))
    assert (backend.numpy(decision.label) == -1).all()
    marks, label = exits.agree(ErrorBelow(0.5, radius=0), book, receipt.running, grid=(2, 5))
    np.testing.assert_array_equal(backend.numpy(marks), told < 0.5)
    assert (backend.numpy(label) == -1).all()
    # A head that foretells none leaves what was foretold before; one that comes later begins.
    silent = exits.update(book, receipt, HeadOutput(blank))
    np.testing.assert_array_equal(backend.numpy(silent.error), told)
    late = exits.update(
        exits.update(exits.begin(HeadOutput(blank), receipt), receipt, HeadOutput(blank)), receipt, output
    )
    np.testing.assert_array_equal(backend.numpy(late.error), told)
    half = array(np.arange(20).reshape(2, 10) % 2 == 0)
    part = tokens.pack(half) if layout == "packed" else tokens.select(half, nothing, capacity=10)[0]
    told_now = tokens.gather(array(backend.numpy(second).reshape(2, 10)), part)
    again = exits.update(
        book, part, HeadOutput(tokens.gather(array(np.zeros((2, 10, 0), np.float32)), part), error=told_now)
    )
    wanted_ = np.where(backend.numpy(half), backend.numpy(second).reshape(2, 10), told)
    np.testing.assert_array_equal(backend.numpy(again.error), wanted_)


@each_backend
def test_merged_tokens_share_the_error_of_their_owner_and_hold_no_class_against_each_other(backend):
    array = backend.array
    running = array(np.ones((1, 4), dtype=bool))
    features = array(np.ones((1, 4, 2), np.float32))
    joined = merging.merge(features, merging.alone(running, grid=(2, 2)), side=2, alike=0.5).merged
    receipt = tokens.pack(joined.running)
    for error, left in ((0.25, True), (0.75, False)):
        output = HeadOutput(array(np.zeros((1, 0), np.float32)), error=array(np.array([error], np.float32)))
        book = exits.update(exits.begin(output, receipt), receipt, output)
        for policy in (ErrorBelow(0.5), ErrorBelow(0.5, radius=0)):
            decision = exits.decide(policy, book, receipt.running, grid=(2, 2), merged=joined)
            assert backend.numpy(decision.stay).any() != left
    # A cell that runs on with a great error holds back those beside any of its tokens.
    rng = np.random.default_rng(0)
    wide = array(np.ones((1, 8), dtype=bool))
    apart = rng.normal(size=(1, 2, 4, 2))
    apart[:, :, :2] = 1
    features = array(apart.reshape(1, 8, 2).astype(np.float32))
    joined = merging.merge(features, merging.alone(wide, grid=(2, 4)), side=2, alike=0.99).merged
    assert backend.numpy(joined.running).tolist() == [[True, False, True, True, False, False, True, True]]
    receipt = tokens.pack(joined.running)
    told = array(np.array([0.75, 0.25, 0.25, 0.25, 0.25], np.float32))
    output = HeadOutput(array(np.zeros((5, 0), np.float32)), error=told)
    book = exits.update(exits.begin(output, receipt), receipt, output)
    decision = exits.decide(ErrorBelow(0.5), book, receipt.running, grid=(2, 4), merged=joined)
    assert backend.numpy(decision.stay).tolist() == [[True, False, True, False, False, False, True, False]]
    logits = array(np.array([[[3, 0], [0, 3], [3, 0], [3, 0]]], np.float32))
    every = tokens.pack(running)
    output = HeadOutput(tokens.gather(logits, every), error=array(np.zeros(4, np.float32)))
    book = exits.update(exits.begin(output, every), every, output)
    for policy, classes in ((ErrorBelow(0.5), [-1] * 4), (ErrorBelow(0.5) & ConfidenceAbove(0.1), [0, 1, 0, 0])):
        assert backend.numpy(exits.agree(policy, book, running, grid=(2, 2))[1]).tolist() == [classes]


@each_layout
@each_backend
def test_features_for_fewer_taps_are_the_last_ones(backend, layout):
    array = backend.array
    mask, nothing = np.array([[True, False, True]]), array(np.zeros((1, 3), np.float32))
    everything = array(np.ones((1, 3), dtype=bool))

    def receipt_of(running):
        return tokens.pack(running) if layout == "packed" else tokens.select(running, nothing, capacity=3)[0]

    def output(receipt, channels, value):
        made = array(np.full((*receipt.layout, channels), value, np.float32))
        return HeadOutput(array(np.zeros((*receipt.layout, 0), np.float32)), features=made)

    first = output(receipt_of(everything), 4, 1.0)
    book = exits.begin(first, receipt_of(everything), features=first.features)
    book = exits.update(book, receipt_of(everything), first, features=first.features)
    later = output(receipt_of(array(mask)), 2, 5.0)
    book = exits.update(book, receipt_of(array(mask)), later, features=later.features)
    assert backend.numpy(book.features)[0].tolist() == [[0, 0, 5, 5], [1, 1, 1, 1], [0, 0, 5, 5]]


# The itinerary.

PLANS = st.sets(st.integers(1, 7)).flatmap(
    lambda after: st.builds(
        lambda kinds, carry: Schedule(tuple(map(Exit, sorted(after), kinds)), carry),
        st.tuples(*[st.sampled_from([never(), always(), ConfidenceAbove(0.5)])] * len(after)),
        st.sampled_from([Feature(), Feature("last block"), schedule.Schedule().carry]),
    )
)


@given(plan=PLANS, taps=st.sets(st.integers(1, 8)), heads=st.sampled_from(["active", "all"]))
def test_stages_run_every_block_once_and_stop_wherever_something_happens(plan, taps, heads):
    stages = plan.stages(8, taps=taps, heads=heads)
    assert [block for stage in stages for block in range(stage.start, stage.stop)] == list(range(8))
    asked = plan.active if heads == "active" else plan.exits
    assert [stage.exit for stage in stages if stage.exit is not None] == list(asked)
    assert [stage.index for stage in stages if stage.index is not None] == list(range(len(asked)))
    assert all(stage.exit.after == stage.stop for stage in stages if stage.exit is not None)
    assert {stage.stop for stage in stages if stage.tap} == taps
    rejoins = [stage.stop for stage in stages if stage.rejoin]
    carry = plan.carry
    assert rejoins == ([7 if carry.before == "last block" else 8] if isinstance(carry, Feature) else [])
    needed = {exit.after for exit in asked} | taps | set(rejoins) | {8}
    assert {stage.stop for stage in stages} == needed


def test_stages_of_a_plan():
    plan = Schedule((Exit(2, never()), Exit(4, always())), Feature("last block"))
    assert plan.stages(6, taps=(6,)) == (
        Stage(0, 4, plan.exits[1], 0),
        Stage(4, 5, rejoin=True),
        Stage(5, 6, tap=True),
    )
    with pytest.raises(TokenExitError, match="`schedule` must have exits, merges and taps within 3 blocks, got 4"):
        plan.stages(3)


# What policies say of themselves.


@example(policy=policies.BatchBudget(0.5, by="margin") & ~policies.EntropyBelow(0.2))
@given(policy=strategies.policies(3))
def test_a_policy_needs_what_it_reads_and_nothing_else(policy):
    """With what it needs it decides; without one of the scores that it needs it is refused."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(6, 3)).astype(np.float32)
    common = {"image": np.array([0, 0, 0, 1, 1, 1]), "images": 2, "grid": (1, 3), "position": np.arange(6) % 3}
    seen = {**common, "previous": np.zeros((3, 6), dtype=int)}
    gate = table[:, 0] > 0
    given_ = {"gate": gate.astype(np.float32), "error": np.abs(table[:, 1])}
    whole = policies.Evidence(table, **given_, **seen)
    policy(whole)
    for name, other in (("gate", "error"), ("error", "gate")):
        asked = name in policy.needs
        try:
            policy(policies.Evidence(table, **{other: given_[other]}, **seen))
            assert not asked
        except TokenExitError:
            assert asked
    told = policies.Evidence(**given_, **seen)
    try:
        policy(told)
        assert not policy.asks_classes
    except TokenExitError:
        assert policy.asks_classes
    spread = {"entropy", "margin"} & policy.needs
    try:
        policy(policies.Evidence(class_scores=table, **given_, **seen))
        assert not spread
    except TokenExitError:
        assert spread
    assert policy.mixes_images == ("BatchBudget" in repr(policy))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda table: replay.replay(table, Schedule(carry=Feature()), grid=(1, 2)), "`plan` must carry predictions"),
        (lambda table: replay.replay(table, Schedule(carry=Preserved()), grid=(1, 2)), "`plan` must carry predictions"),
        (
            lambda table: replay.replay(table, schedule.truncated(after=2), grid=(1, 2)),
            r"`plan` must have exits only after blocks with an exit head, \[1\], got \[2\]",
        ),
        (
            lambda table: replay.replay(table, schedule.dense(), grid=(2, 2)),
            r"`logits` must be of one shape, \(images, 4, classes\), got \[\(1, 2, 3\)\]",
        ),
    ],
)
def test_bad_replays_are_refused(call, message):
    table = {after: np.zeros((1, 2, 3), dtype=np.float32) for after in (1, 3)}
    with pytest.raises(TokenExitError, match=message):
        call(table)


@pytest.mark.usefixtures("unchecked")
def test_shapes_that_do_not_fit_the_ledger_are_refused():
    receipt = tokens.pack(np.ones((1, 4), dtype=bool))
    book = ledger.open_ledger(np.zeros((4, 2), dtype=np.float32), receipt)
    with pytest.raises(TokenExitError, match=r"`logits` must have the layout \(4,\) and one more axis"):
        exits.update(book, receipt, HeadOutput(np.zeros((3, 2), dtype=np.float32)))
    with pytest.raises(TokenExitError, match=r"`running` must have the images and slots of the ledger, \(1, 4\), got"):
        exits.decide(never(), book, receipt.running[:, :3], grid=(2, 2))
    with pytest.raises(TokenExitError, match=r"`grid` must have at most 4 places, got \(2, 3\)"):
        exits.decide(never(), book, receipt.running, grid=(2, 3))
    with pytest.raises(TokenExitError, match="`running` must be boolean, got dtype int64"):
        exits.decide(never(), book, receipt.running.astype(int), grid=(2, 2))


def test_a_ledger_with_masks_asks_for_masks():
    receipt = tokens.pack(np.ones((1, 4), dtype=bool))
    logits = np.zeros((4, 2), dtype=np.float32)
    book = ledger.open_ledger(logits, receipt, presence_logits=np.zeros((1, 2), dtype=np.float32))
    with pytest.raises(TokenExitError, match="`output` must have masks for a ledger that keeps them, got none"):
        exits.update(book, receipt, HeadOutput(logits))
