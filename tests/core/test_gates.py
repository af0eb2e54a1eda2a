"""Gates: probabilities, draws, the loss that holds them to a rate, and the thresholds that do so in use."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core import strategies
from tests.core.backends import each_backend
from tokenexit import TokenExitError, gates

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


Z = np.zeros


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
        (lambda: gates.staged_rates((3, 3)), "`after` must be ascending blocks from 1 up, at least one, got (3, 3)"),
        (lambda: gates.staged_rates((3,), rates=()), "`rates` must be numbers in [0, 1], at least one, got ()"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(TokenExitError) as found:
        make()
    assert str(found.value) == message
