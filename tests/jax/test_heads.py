"""Heads in JAX: the same names, the same scores as in PyTorch; what holds no patch changes nothing."""

import functools

import jax
import numpy as np
import pytest
import torch
from jax import numpy as jnp

from tests.jax.parity import from_torch, same
from tokenexit import TokenExitError, cost
from tokenexit.heads import ATM, FCN, MLP, Linear, Neighbourhood
from tokenexit_jax import heads
from tokenexit_jax._layers import STATISTICS
from tokenexit_torch.heads import build

WIDTH, CLASSES = 24, 5
PLANS = {"linear": Linear(), "mlp": MLP(), "narrow mlp": MLP(8), "fcn": FCN(16), "neighbourhood": Neighbourhood(9, 2)}
PLANS |= {"atm": ATM(2), "split atm": ATM(1, 3)}
TOKENWISE = {name: plan for name, plan in PLANS.items() if not isinstance(plan, ATM)}
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
each_tokenwise = pytest.mark.parametrize("plan", TOKENWISE.values(), ids=TOKENWISE.keys())
each_atm = pytest.mark.parametrize("plan", [ATM(1), ATM(2, 3), ATM(3, 1)])


def read_by(plan):
    """Channels that a head reads: those of a token, and of what is around it."""
    return 2 * WIDTH if isinstance(plan, Neighbourhood) else WIDTH


def a_torch_head(plan):
    """A head whose every weight differs from what it is initialised with."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        head = build(plan, width=WIDTH, classes=CLASSES).eval()
        for value in head.state_dict().values():
            if value.is_floating_point():
                value.add_(0.3 * torch.randn(value.shape).abs())
    return head


@functools.cache
def drawn_head(plan):
    return jax.jit(lambda key: heads.init(plan, key, width=WIDTH, classes=CLASSES))(jax.random.key(1))


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@each_plan
def test_a_new_head_has_the_names_shapes_and_spread_of_pytorchs(plan):
    torch.manual_seed(0)
    wanted = build(plan, width=WIDTH, classes=CLASSES).state_dict()
    found = drawn_head(plan)
    assert {name: value.shape for name, value in found.items()} == {name: tuple(v.shape) for name, v in wanted.items()}
    for name, value in wanted.items():
        spread = value.float().abs().max().item()
        assert np.abs(found[name]).max() == pytest.approx(spread, rel=0.6), name


@each_plan
def test_a_head_is_priced_as_by_the_core(plan):
    found = heads.cost(plan, width=WIDTH, classes=CLASSES)
    assert found == cost.of_head(plan, width=WIDTH, classes=CLASSES)


@torch.no_grad()
@each_tokenwise
def test_class_scores_are_those_of_pytorch(plan):
    head, tokens = a_torch_head(plan), 3 * drawn(2, 7, read_by(plan))
    wanted = head(torch.from_numpy(tokens))
    same(heads.read(plan, from_torch(head), jnp.asarray(tokens)), wanted)


@torch.no_grad()
@each_tokenwise
def test_class_scores_do_not_depend_on_the_layout(plan):
    params, tokens = from_torch(a_torch_head(plan)), jnp.asarray(drawn(2, 7, read_by(plan)))
    same(heads.read(plan, params, tokens).reshape(14, -1), heads.read(plan, params, tokens.reshape(14, -1)), 1e-6)


read_in_training = jax.jit(heads.read_in_training, static_argnums=0)


@torch.no_grad()
@pytest.mark.parametrize("kept", [14, 5, 2, 1, 0])
def test_batch_norm_in_training_is_that_of_pytorch_over_the_tokens_there_are(kept):
    plan = FCN(16)
    head, tokens = a_torch_head(plan), 2 * drawn(2, 7, WIDTH) + 1
    valid = np.zeros(14, bool)
    valid[np.random.default_rng(1).permutation(14)[:kept]] = True
    valid = valid.reshape(2, 7)
    params = from_torch(head)
    junk = jnp.where(valid[..., None], tokens, 1e4)
    logits, statistics = read_in_training(plan, params, junk, jnp.asarray(valid))
    wanted = head.train()(torch.from_numpy(tokens[valid]))
    same(logits[valid], wanted)
    assert np.isfinite(logits).all()
    after = from_torch(head)
    assert sorted(statistics) == [f"1.{name}" for name in sorted(STATISTICS)]
    for name, value in statistics.items():
        same(value, after[name])
        assert value.dtype == params[name].dtype


def test_gradients_of_batch_norm_are_those_of_pytorch():
    plan = FCN(16)
    head, tokens = a_torch_head(plan).train(), drawn(9, WIDTH)
    params = from_torch(head)
    inputs = torch.from_numpy(tokens).requires_grad_()
    weight = drawn(9, CLASSES, seed=1)
    (head(inputs) * torch.from_numpy(weight)).sum().backward()

    def loss(tokens, learned):
        logits, _ = heads.read_in_training(plan, params | learned, tokens, jnp.ones(9, bool))
        return (logits * weight).sum()

    learned = {name: params[name] for name, _ in head.named_parameters()}
    for_tokens, for_weights = jax.jit(jax.grad(loss, (0, 1)))(jnp.asarray(tokens), learned)
    same(for_tokens, inputs.grad, 1e-4)
    for name, parameter in head.named_parameters():
        same(for_weights[name], parameter.grad, 1e-4)


@pytest.mark.parametrize("plan", [Linear(), MLP()])
def test_other_heads_have_no_statistics(plan):
    params, tokens = drawn_head(plan), jnp.asarray(drawn(6, WIDTH))
    logits, statistics = heads.read_in_training(plan, params, tokens, jnp.ones(6, bool))
    same(logits, heads.read(plan, params, tokens), 0)
    assert statistics == {}


# Attention to mask.


masks_of = jax.jit(heads.read_masks, static_argnums=0)


@torch.no_grad()
@each_atm
def test_masks_are_those_of_pytorch_image_by_image(plan):
    head, patches = a_torch_head(plan), drawn(4, 6, WIDTH)
    valid = np.array([[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]], bool)
    wanted = head(torch.from_numpy(patches[valid]), valid.sum(axis=1).tolist())
    found = masks_of(plan, from_torch(head), patches, valid)
    same(found.mask_logits[valid], wanted.mask_logits)
    same(found.presence_logits, wanted.presence_logits)
    assert np.isfinite(found.mask_logits).all()


@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e30])
def test_what_is_no_patch_is_never_seen(junk):
    plan, patches = ATM(2), drawn(3, 6, WIDTH)
    params = drawn_head(plan)
    valid = np.random.default_rng(2).random((3, 6)) < 0.5
    spoiled = np.where(valid[..., None], patches, junk).astype(np.float32)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(patches):
        found = masks_of(plan, params, patches, valid)
        return found.mask_logits.sum() + found.presence_logits.sum(), found

    (_, found), slopes = loss(jnp.asarray(spoiled))
    (_, wanted), wanted_slopes = loss(jnp.asarray(patches))
    same(found.mask_logits, wanted.mask_logits, 1e-6)
    same(found.presence_logits, wanted.presence_logits, 1e-6)
    same(slopes, wanted_slopes, 1e-6)


def test_gradients_of_masks_are_those_of_pytorch():
    plan = ATM(2, 2)
    head, patches = a_torch_head(plan), drawn(2, 4, WIDTH)
    valid = np.array([[1, 1, 1, 1], [1, 0, 1, 0]], bool)
    said = head(torch.from_numpy(patches[valid]), [4, 2])
    (said.mask_logits.sum() + 2 * said.presence_logits.square().sum()).backward()

    def loss(params):
        found = masks_of(plan, params, patches, valid)
        return jnp.where(valid[..., None], found.mask_logits, 0).sum() + 2 * jnp.square(found.presence_logits).sum()

    slopes = jax.jit(jax.grad(loss))(from_torch(head))
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None
        same(slopes[name], parameter.grad, 2e-4)


def test_log_scores_are_logarithms_of_mask_scores():
    from tokenexit import scores
    from tokenexit_jax.heads.masks import log_scores

    masks, presence = jnp.asarray(drawn(4, CLASSES)), jnp.asarray(drawn(4, CLASSES, seed=1))
    same(jnp.exp(log_scores(masks, presence)), scores.mask_scores(masks, jax.nn.sigmoid(presence)))


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_plan_is_named():
    with pytest.raises(TokenExitError, match="`plan` must be a plan of tokenexit.heads, got 'mlp'"):
        heads.init("mlp", jax.random.key(0), width=4, classes=2)
    with pytest.raises(
        TokenExitError, match="`plan` must be a plan of tokenexit.heads that gives class scores, .* got A"
    ):
        heads.read(ATM(), {}, jnp.zeros((2, 4)))


@pytest.mark.parametrize(("plan", "width", "message"), [
    (ATM(), 5, "`width` must be even, got 5"),
    (ATM(1, 3), 8, "`attention_heads` must divide half the width, 4, got 3"),
])  # fmt: skip
def test_an_atm_that_does_not_fit_the_width_is_refused(plan, width, message):
    with pytest.raises(TokenExitError, match=message):
        heads.init(plan, jax.random.key(0), width=width, classes=2)
