"""Gates: the itinerary, probabilities, decisions, draws, the loss of a rate, and the thresholds that keep it in use."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core import oracles, strategies
from tests.core.backends import each_backend
from tokenexit import TokenExitError, gates, policies, schedule
from tokenexit.carries import Preserved
from tokenexit.policies import BatchBudget, Budget, GateBelow, never
from tokenexit.schedule import Exit, Schedule

shares = st.floats(0, 1)


def softmax_keep(logits):
    wide = logits.astype(np.float64)
    raised = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return raised[..., 0] / raised.sum(axis=-1)


@each_backend
@given(st.integers(0, 2**20), st.integers(0, 7), st.floats(0.1, 300))
def test_the_probability_is_a_softmax(backend, seed, count, size):
    logits = backend.held(np.random.default_rng(seed).normal(0, size, (2, count, 2)).astype(np.float32))
    found = backend.numpy(gates.keep_probability(backend.array(logits)))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, softmax_keep(logits), atol=1e-6)


@each_backend
def test_what_is_no_number_stays_so_and_infinities_decide(backend):
    logits = np.array([[np.nan, 0], [0, np.nan], [np.inf, 0], [0, np.inf], [-np.inf, 0]], np.float32)
    found = backend.numpy(gates.keep_probability(backend.array(logits)))
    np.testing.assert_array_equal(found, [np.nan, np.nan, 1, 0, 0])


@each_backend
@strategies.fewer(3)
@given(st.integers(0, 2**20), st.floats(0.2, 5))
def test_draws_keep_as_often_as_the_probability_says(backend, seed, temperature):
    random = np.random.default_rng(seed)
    preference = random.normal(0, 1.5)
    logits = np.tile(np.array([preference, 0.0], np.float32), (4000, 1))
    uniform = random.random(4000, dtype=np.float32)
    soft = backend.numpy(
        gates.soft_draw(backend.array(logits), backend.array(uniform), temperature=temperature)
    ).astype(np.float64)
    assert ((soft >= 0) & (soft <= 1)).all()
    probability = softmax_keep(backend.held(logits[:1])).item()
    assert abs((soft > 0.5).mean() - probability) < 5 * np.sqrt(probability * (1 - probability) / 4000) + 5e-3
    # The noise of Gumbel-softmax is the difference of two Gumbel variables: lower numbers never keep what higher skip.
    order = np.argsort(backend.held(uniform), kind="stable")
    assert (np.diff(soft[order]) >= -1e-6).all()


@each_backend
def test_draws_are_finite_at_the_ends(backend):
    logits = backend.array(np.zeros((3, 2), np.float32))
    soft = backend.numpy(
        gates.soft_draw(logits, backend.array(np.array([0.0, 0.5, 1.0], np.float32)), temperature=0.01)
    )
    np.testing.assert_allclose(soft, [0, 0.5, 1], atol=1e-6)


def slow_ratio_loss(keep, rates, of_each, valid):
    images, count, _ = keep.shape
    parts = []
    for gate in range(count):
        kept = [keep[image, gate][valid[image]] for image in range(images)]
        rows = [np.concatenate(kept)] if of_each == "batch" else kept
        parts += [(row.sum() / max(len(row), 1) - rates[gate]) ** 2 for row in rows]
    return np.mean(parts)


@each_backend
@given(
    st.integers(0, 2**20), st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.sampled_from(["batch", "image"])
)
def test_the_ratio_loss_leaves_out_padding(backend, seed, images, count, patches, of_each):
    random = np.random.default_rng(seed)
    keep = (random.random((images, count, patches)) < 0.6).astype(np.float32)
    rates = backend.held(random.random(count).astype(np.float32))
    valid = random.random((images, patches)) < 0.7
    call = {"of_each": of_each}
    held, wanted = (backend.array(x) for x in (keep, rates))
    found = backend.numpy(gates.ratio_loss(held, wanted, valid=backend.array(valid), **call))
    np.testing.assert_allclose(found, slow_ratio_loss(keep, rates, of_each, valid), atol=1e-5)
    everywhere = backend.numpy(gates.ratio_loss(held, wanted, **call))
    np.testing.assert_allclose(everywhere, slow_ratio_loss(keep, rates, of_each, valid | True), atol=1e-5)


@each_backend
@given(st.integers(0, 2**20), st.integers(1, 40), shares)
def test_a_calibrated_threshold_keeps_the_share(backend, seed, count, rate):
    random = np.random.default_rng(seed)
    probability = backend.held(random.permutation(np.linspace(0.01, 0.99, count)).astype(np.float32))
    threshold = gates.threshold_for(backend.array(probability), rate)
    assert 0 <= threshold <= 1
    kept = (probability >= threshold).sum()
    ties = count - len(np.unique(probability))
    assert round(rate * count) <= kept <= round(rate * count) + ties


@each_backend
def test_equal_probabilities_are_kept_together_and_no_number_counts_as_kept(backend):
    probability = backend.array(np.array([0.5, 0.5, 0.5, 0.25], np.float32))
    assert gates.threshold_for(probability, 0.5) == 0.5
    assert gates.threshold_for(probability, 1.0) == 0
    unknown = backend.array(np.array([np.nan, 0.5, 0.25, 0.25], np.float32))
    assert gates.threshold_for(unknown, 0.25) == 0.75


@given(st.lists(shares, min_size=1, max_size=4), st.integers(1, 12))
def test_stages_share_the_gates_evenly(rates, count):
    found = gates.staged_rates(range(3, 3 + count), rates=rates)
    assert list(found) == list(range(3, 3 + count))
    order = [rates.index(rate) for rate in found.values()] if len(set(rates)) == len(rates) else []
    assert order == sorted(order)
    if order and count >= len(rates):
        sizes = [order.count(stage) for stage in range(len(rates))]
        assert max(sizes) - min(sizes) <= 1


def test_the_published_rates():
    assert gates.staged_rates(range(3, 12)) == dict(
        zip(range(3, 12), [0.7] * 3 + [0.49] * 3 + [0.343] * 3, strict=True)
    )


GRIDS = [(1, 1), (1, 5), (4, 1), (3, 4)]


def probabilities_of(random, images, grid):
    """With ties, ends and NaN among them."""
    shape = (images, grid[0] * grid[1])
    some = np.where(random.random(shape) < 0.5, random.integers(0, 5, shape) / 4, random.random(shape))
    return np.where(random.random(shape) < 0.1, np.nan, some).astype(np.float32)


@each_backend
@given(st.integers(0, 2**20), st.sampled_from(GRIDS), strategies.gate_policies(), st.booleans())
def test_a_decision_is_that_of_the_oracle(backend, seed, grid, policy, returning):
    random = np.random.default_rng(seed)
    probability = backend.held(probabilities_of(random, random.integers(1, 4), grid))
    before = np.ones(probability.shape, bool) if returning else random.random(probability.shape) < 0.6
    mask = None if returning else backend.array(before)
    found = backend.numpy(gates.decide(policy, backend.array(probability), grid=grid, before=mask))
    assert found.dtype == bool
    np.testing.assert_array_equal(found, oracles.gate_keeps(policies.to_dict(policy), probability, before, grid))


@each_backend
def test_a_decision_about_nothing_is_empty(backend):
    for images, grid in ((0, (2, 3)), (2, (0, 3)), (0, (0, 0))):
        probability = backend.array(np.zeros((images, grid[0] * grid[1]), np.float32))
        for policy in (GateBelow(0.5), Budget(0.5, by="gate")):
            assert tuple(gates.decide(policy, probability, grid=grid).shape) == tuple(probability.shape)


def test_in_a_compiled_program_of_jax_a_decision_is_the_same():
    jax = pytest.importorskip("jax")
    random = np.random.default_rng(0)
    probability = probabilities_of(random, 3, (3, 4))
    before = random.random(probability.shape) < 0.6
    for policy in (GateBelow(0.5), ~GateBelow(0.25), Budget(0.5, by="gate"), BatchBudget(9, by="gate")):
        for mask in (None, before):
            decide = jax.jit(
                lambda *arrays, policy=policy: gates.decide(policy, arrays[0], grid=(3, 4), before=arrays[1])
            )
            wanted = gates.decide(policy, probability, grid=(3, 4), before=mask)
            arrays = (jax.numpy.asarray(probability), None if mask is None else jax.numpy.asarray(mask))
            np.testing.assert_array_equal(decide(*arrays), wanted)


@st.composite
def gated_plans(draw):
    """A plan, the depth of its network, and taps."""
    depth = draw(st.integers(3, 9))
    carry = Preserved(before=draw(st.sampled_from(["decoder", "last block"])))
    last = depth - (2 if carry.before == "last block" else 1)
    after = sorted(draw(st.sets(st.integers(1, last), max_size=4)))
    exits = tuple(Exit(block, draw(st.sampled_from([GateBelow(0.5), never()]))) for block in after)
    return Schedule(exits, carry), depth, tuple(sorted(draw(st.sets(st.integers(1, depth), max_size=3))))


def walked(plan, depth, taps):
    """What happens, block by block."""
    gates = {exit.after: exit for exit in plan.exits if exit.policy != never()}
    events = []
    for block in range(depth):
        if block in gates:
            events.append(("gate", gates[block]))
        if gates and block == depth - 1 and plan.carry.before == "last block":
            events.append(("rejoin", block))
        events.append(("block", block))
        if block + 1 in taps:
            events.append(("tap", block + 1))
    return events


@given(gated_plans())
def test_stages_are_all_blocks_and_what_follows_them(drawn):
    plan, depth, taps = drawn
    found = plan.stages(depth, taps=taps)
    events = []
    for stage in found:
        events += [("block", block) for block in range(stage.start, stage.stop)]
        events += [("tap", stage.stop)] if stage.tap else []
        events += [] if stage.exit is None else [("gate", stage.exit)]
        events += [("rejoin", stage.stop)] if stage.rejoin else []
    assert events == walked(plan, depth, taps)
    assert all(stage.start < stage.stop for stage in found)
    # Nothing is interrupted for nothing.
    assert all(stage.tap or stage.exit or stage.rejoin for stage in found[:-1])


@each_backend
@given(st.integers(0, 2**20), st.integers(1, 3), st.booleans(), st.lists(shares, min_size=3, max_size=3))
def test_gates_are_calibrated_each_behind_those_before_it(backend, seed, images, returning, rates):
    """Tables of distinct probabilities stand for gates; that of a gate depends on what the gate before has kept."""
    random, after, grid = np.random.default_rng(seed), (2, 3, 7), (3, 4)
    carry = Preserved("every gate" if returning else "never")
    rates = dict(zip(after, rates, strict=True))
    count, shape = images * 12, (images, 12)
    tables = {
        (block, last): backend.held(random.permutation(np.linspace(0.01, 0.99, count)).astype(np.float32)).reshape(
            shape
        )
        for block in after
        for last in range(count + 1)
    }

    def kept_by(plan):
        """What the gates of a plan keep, one after the other; all before the first."""
        keep = None
        for exit in plan.exits:
            table = tables[exit.after, count if keep is None else int(keep.sum())]
            before = None if returning or keep is None else backend.array(keep)
            keep = backend.numpy(gates.decide(exit.policy, backend.array(table), grid=grid, before=before))
        return keep

    earlier_plans = []

    def probabilities(earlier, block):
        earlier_plans.append(earlier)
        keep = kept_by(earlier)
        table = tables[block, count if keep is None else int(keep.sum())]
        shown = table if returning or keep is None else np.where(keep, table, np.float32(0))
        return backend.array(shown.reshape(-1))

    plan = schedule.svit(after=after, carry=carry)
    found = gates.calibrated(plan, rates, probabilities)
    assert (found.after, found.carry) == (plan.after, carry)
    assert earlier_plans == [dataclasses.replace(found, exits=found.exits[:index]) for index in range(3)]
    most = count
    for index, block in enumerate(after):
        exits = found.exits[: index + 1]
        shown = backend.numpy(probabilities(dataclasses.replace(found, exits=exits[:-1]), block))
        wanted = round(rates[block] * count)
        assert exits[-1].policy == GateBelow(oracles.threshold_that_keeps(shown, wanted))
        most = count if returning else most
        most = min(wanted, most)
        assert kept_by(dataclasses.replace(found, exits=exits)).sum() == most


def test_one_rate_may_stand_for_all_gates_and_progress_is_shown():
    seen = []

    def progress(one):
        seen.extend(one)
        return seen

    plan = gates.calibrated(
        schedule.svit(after=(1, 2)), 0.5, lambda *_: np.array([0.2, 0.8], np.float32), progress=progress
    )
    assert seen == [(1, 0.5), (2, 0.5)]
    assert [exit.policy.threshold for exit in plan.exits] == pytest.approx([0.5, 0.5])
    assert gates.calibrated(schedule.svit(after=(1,)), {1: 1.0}, lambda *_: np.array([0.2], np.float32)).exits == (
        Exit(1, GateBelow(0.0)),
    )


Z = np.zeros
SVIT = schedule.svit(after=(1, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gates.keep_probability(Z((4, 3))), "`logits` must have two entries, keep and skip, on the last axis, got shape (4, 3)"),
        (lambda: gates.soft_draw(Z((4, 2)), Z(3)), "`uniform` must have one number for each token, shape (4,), got shape (3,)"),
        (lambda: gates.soft_draw(Z((4, 2)), Z(4), temperature=0), "`temperature` must be positive, got 0"),
        (lambda: gates.ratio_loss(Z((4, 2)), Z(2)), "`keep` must have shape (images, gates, patches), got shape (4, 2)"),
        (lambda: gates.ratio_loss(Z((4, 2, 3)), Z(3)), "`rates` must have shape (2,), got shape (3,)"),
        (lambda: gates.ratio_loss(Z((4, 2, 3)), Z(2), of_each="gate"), "`of_each` must be 'batch' or 'image', got 'gate'"),
        (lambda: gates.ratio_loss(Z((4, 2, 3)), Z(2), valid=Z((4, 2), bool)), "`valid` must have shape (4, 3), got shape (4, 2)"),
        (lambda: gates.threshold_for(Z(0), 0.5), "`probability` must hold at least one token, got (0,)"),
        (lambda: gates.threshold_for(Z(3), 1.5), "`rate` must be a number in [0, 1], got 1.5"),
        (lambda: gates.decide(never(), Z((2, 5)), grid=(2, 3)), "`probability` must have shape (images, 6), for a grid of 2 x 3, got shape (2, 5)"),
        (lambda: gates.decide(never(), Z(6), grid=(2, 3)), "`probability` must have shape (images, 6), for a grid of 2 x 3, got shape (6,)"),
        (lambda: gates.decide(never(), Z((2, 6)), grid=(2, 3), before=Z((1, 6), bool)), "`before` must have shape (2, 6), got shape (1, 6)"),
        (lambda: gates.calibrated(SVIT, {1: 0.5}, lambda *_: Z(3)), "`rates` must be one number, or one for each gate, after blocks (1, 2), got {1: 0.5}"),
        (lambda: gates.calibrated(SVIT, 0.5, lambda *_: Z(0)), "`probability` must hold at least one token, got (0,)"),
        (lambda: gates.staged_rates((3, 3)), "`after` must be ascending blocks from 1 up, at least one, got (3, 3)"),
        (lambda: gates.staged_rates((3,), rates=()), "`rates` must be numbers in [0, 1], at least one, got ()"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(TokenExitError) as found:
        make()
    assert str(found.value) == message


def test_published_gates_of_twelve_blocks_are_those_of_the_preset():
    assert gates.published_gates(12) == schedule.svit()
    assert gates.published_gates(24) == schedule.svit(after=range(6, 24))
    with pytest.raises(TokenExitError, match="`depth` must be a whole number of blocks from 2 up, got 1"):
        gates.published_gates(1)
