"""Replays of one dense pass: the real runner on what the heads have said."""

import pytest
import torch

import tokenexit_torch as tet
from tests.torch import models
from tests.torch.plans import FEATURES, PLANS
from tokenexit import TokenExitError, policies, schedule
from tokenexit.schedule import Exit, Schedule

ALL = {**PLANS, "dense": schedule.dense(), "cut short": schedule.truncated(after=3),
       "batch budget": Schedule((Exit(2, policies.BatchBudget(0.4)), Exit(4, policies.Patience(2))))}  # fmt: skip


@pytest.mark.parametrize("plan", ALL.values(), ids=ALL.keys())
@pytest.mark.parametrize("prefix", [0, 2])
def test_the_first_exit_is_exact(plan, prefix):
    """Until then nothing has left; and of what leaves there, the prediction is the real one."""
    model = models.wrapped(models.timm_vit, schedule.dense(), prefix=prefix)
    images = models.images(4)
    out, replayed = model(images, schedule=plan), tet.trace(model, images, progress=iter).replay(plan, batch=4)
    first = min(out.exits, default=model.depth)
    left = out.exit_depth == first
    assert torch.equal(replayed.exit_depth == first, left)
    where = left[:, None].expand_as(out.logits)
    torch.testing.assert_close(replayed.logits[where], out.logits[where], rtol=1e-4, atol=1e-5)
    assert torch.equal(replayed.tokens_per_block[:, :first], out.tokens_per_block[:, :first])
    assert replayed.exits == out.exits
    assert replayed.head_on == out.head_on


@pytest.mark.parametrize("plan", ALL.values(), ids=ALL.keys())
def test_without_attention_a_replay_is_the_run(plan, monkeypatch):
    """Then tokens that stay are what they are in a dense run."""
    model = models.wrapped(models.plain_host, schedule.dense())
    host = model.host

    def run(index, tokens, _):
        block = host.blocks[index]
        block.attention(tokens)  # called, as it must be, and left aside
        return tokens + block.mlp(block.norm2(tokens))

    monkeypatch.setattr(host, "run", run)
    images = models.images(5)
    out, replayed = model(images, schedule=plan), tet.trace(model, images, progress=iter).replay(plan, batch=5)
    assert torch.equal(replayed.exit_depth, out.exit_depth)
    assert torch.equal(replayed.tokens_per_block, out.tokens_per_block)
    torch.testing.assert_close(replayed.logits, out.logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.multiply_adds(replayed), model.multiply_adds(out))


def test_batches_and_how_they_are_replayed_change_nothing():
    model = models.wrapped(models.timm_vit, schedule.dense())
    images = models.images(5)
    once, again = (tet.trace(model, each, progress=iter) for each in (images, (part for part in images.split(2))))
    torch.testing.assert_close(once.logits, again.logits, rtol=1e-4, atol=1e-5)
    assert once.after == again.after == (2, 3, 4, model.depth)
    assert len(once) == 5
    for batch in (1, 2, 8):
        assert torch.equal(
            once.replay(PLANS["neighbours"], batch=batch).logits, once.replay(PLANS["neighbours"]).logits
        )


def test_a_model_is_left_in_its_mode():
    model = models.wrapped(models.timm_vit, schedule.dense()).train()
    tet.trace(model, models.images(1), progress=iter)
    assert all(part.training for part in model.modules())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, _: tet.trace(torch.nn.Linear(1, 1), models.images(1)), "`model` must be wrapped by `wrap`, got Linear"),
        (lambda model, _: tet.trace(model, [], progress=iter), "`images` must hold at least one image, got none"),
        (lambda _, trace: trace.replay(FEATURES["paumer"]), "`schedule` must carry predictions, got Feature("),
        (lambda _, trace: trace.replay(schedule.dtop(after=(1,))), "`schedule` must have exits only after blocks with an exit head, [2, 3, 4], got [1]"),
        (lambda _, trace: trace.replay(schedule.dense(), batch=0), "`batch` must be at least 1, got 0"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_refused(call, message):
    model = models.wrapped(models.timm_vit, schedule.dense())
    with pytest.raises(TokenExitError) as found:
        call(model, tet.trace(model, models.images(2), progress=iter))
    assert str(found.value).startswith(message)
