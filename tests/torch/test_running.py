"""What must always hold when tokens leave, on real blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tokenexit_torch as tet
from tests.torch import models
from tokenexit import TokenExitError, policies, schedule
from tokenexit.schedule import Exit, Schedule

HOSTS = {
    "plain": models.plain_host,
    "plain, one head": lambda: models.plain_host(heads=1),
    "timm": models.timm_vit,
    "timm, one head": lambda: models.timm_vit(heads=1),
    "timm, 12 heads": lambda: models.timm_vit(heads=12),
    "timm, no cls": lambda: models.timm_vit(prefix=0),
    "timm, cls and five registers": lambda: models.timm_vit(prefix=6),
}
PLANS = {
    "neighbours": schedule.neighbours(radius={2: 1, 3: 1, 4: 0}, threshold=0.4, per_class=1),
    "dtop": schedule.dtop(after=(2, 4), threshold=0.5, per_class=2),
    "entropy or margin": Schedule((Exit(2, policies.EntropyBelow(0.3) | policies.MarginAbove(0.8)),)),
}
each_host = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS.keys())
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


def clear_of_threshold(model, images, plan, within=1e-4):
    """Images none of whose scores at an exit comes close to a threshold, so that rounding flips nothing."""
    from tokenexit import scores

    clear = torch.ones(len(images), dtype=torch.bool)
    thresholds = (0.4, 0.5, 0.3, 0.8)
    for logits in model.every_exit(images).values():
        rows = logits.permute(0, 2, 3, 1)
        for score in (scores.confidence, scores.entropy, scores.margin):
            for threshold in thresholds:
                clear &= ((score(rows) - threshold).abs() > within).flatten(1).all(dim=1)
    return clear


@torch.no_grad()
@each_host
def test_nothing_leaves_is_the_dense_model(host):
    host = host()
    model, images = models.wrapped(host, schedule.dense()), models.images()
    prefix = model.host.embed(images).prefix
    dense = model.head(model.host.dense(images)[:, prefix:])
    out = model(images)
    torch.testing.assert_close(out.logits.flatten(2).transpose(1, 2), dense, rtol=0, atol=1e-5)
    assert out.exit_depth.eq(6).all()
    assert out.tokens_per_block.eq(24 + prefix).all()


@torch.no_grad()
@each_host
def test_a_policy_that_lets_nothing_go_runs_packed_and_is_the_dense_model(host):
    # Unlike never(), a threshold of 1 is evaluated: all tokens run on in one packed row.
    model, images = models.wrapped(host(), schedule.dtop(after=(2, 4), threshold=1.0)), models.images()
    dense = model(images, schedule=schedule.dense())
    torch.testing.assert_close(model(images).logits, dense.logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@each_host
def test_everything_leaves_is_the_first_head(host):
    model, images = models.wrapped(host(), schedule.truncated(after=3)), models.images()
    out = model(images)
    torch.testing.assert_close(out.logits, model.every_exit(images)[3], rtol=1e-5, atol=1e-5)
    assert out.exit_depth.eq(3).all()
    assert out.tokens_per_block[:, 3:].eq(0).all()


@torch.no_grad()
@each_host
@each_plan
def test_an_image_alone_is_the_image_in_a_batch(host, plan):
    model, images = models.wrapped(host(), plan), models.images(6)
    together = model(images)
    clear = clear_of_threshold(model, images, plan)
    assert clear.any()
    for index in clear.nonzero().flatten().tolist():
        alone = model(images[index : index + 1])
        torch.testing.assert_close(alone.logits[0], together.logits[index], rtol=1e-4, atol=1e-4)
        assert torch.equal(alone.exit_depth[0], together.exit_depth[index])
        assert torch.equal(alone.tokens_per_block[0], together.tokens_per_block[index])


@torch.no_grad()
@each_host
@each_plan
def test_what_ran_is_what_the_depths_say(host, plan):
    model, images = models.wrapped(host(), plan), models.images(4)
    out = model(images)
    prefix = model.host.embed(images).prefix
    depths = out.exit_depth.flatten(1)
    assert set(depths.unique().tolist()) <= {*plan.after, model.depth}
    assert len(depths.unique()) > 1
    for block in range(model.depth):
        patches = (depths > block).sum(dim=1)
        expected = torch.where(patches > 0, patches + prefix, 0)
        assert torch.equal(out.tokens_per_block[:, block], expected)


@torch.no_grad()
@each_plan
def test_running_packed_is_running_one_image_at_a_time_with_its_own_tokens(plan):
    """A slow reference: leave by the same decisions, but drop tokens from plain single-image batches."""
    model, images = models.wrapped(models.timm_vit(), plan), models.images(3)
    out = model(images)
    vit = model.model
    for index in range(len(images)):
        embedded = model.host.embed(images[index : index + 1])
        depth = torch.cat([torch.full((embedded.prefix,), 99), out.exit_depth[index].flatten()])
        row, slots = embedded.tokens, torch.arange(len(depth))
        logits = torch.zeros(len(depth), models.CLASSES)
        for block in range(model.depth):
            row = vit.blocks[block](row)
            leaving = depth[slots] == block + 1
            if leaving.any() and block + 1 < model.depth:
                logits[slots[leaving]] = model.exit_heads[str(block + 1)](row[0, leaving])
                row, slots = row[:, ~leaving], slots[~leaving]
        logits[slots] = model.head(vit.norm(row))[0]
        found = out.logits[index].flatten(1).T
        torch.testing.assert_close(found, logits[embedded.prefix :], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@given(
    grid=st.sampled_from([(1, 1), (7, 13), (1, 9), (33, 33)]),
    count=st.integers(0, 3),
    threshold=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
    seed=st.integers(0, 3),
)
@settings(max_examples=25)
def test_any_grid_and_any_batch(grid, count, threshold, seed):
    model = models.wrapped(models.plain_host(), PLANS["neighbours"].with_threshold(threshold))
    images = models.images(count, (8 * grid[0], 8 * grid[1]), seed)
    out = model(images)
    assert out.logits.shape == (count, models.CLASSES, *grid)
    assert out.exit_depth.shape == (count, *grid)
    assert out.logits.isfinite().all()
    assert torch.isin(out.exit_depth, torch.tensor([2, 3, 4, 6])).all()


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 48), (40, 24), (8, 8), (56, 104)])
def test_timm_with_a_dynamic_image_size(size):
    vit = models.timm_vit(dynamic_img_size=True)
    model = models.wrapped(vit, PLANS["dtop"])
    images = models.images(2, size)
    dense = model(images, schedule=schedule.dense())
    expected = model.head(vit.forward_features(images)[:, 1:])
    torch.testing.assert_close(dense.logits.flatten(2).transpose(1, 2), expected, rtol=0, atol=1e-5)
    assert model(images).logits.shape[-2:] == (size[0] // 8, size[1] // 8)


@torch.no_grad()
def test_a_nan_never_leaves_and_an_image_may_lose_all_its_patches():
    model, images = (
        models.wrapped(models.timm_vit(), schedule.dtop(after=(2,), threshold=0.0, per_class=0)),
        models.images(3),
    )
    images[1] = float("nan")
    out = model(images)
    assert out.exit_depth[[0, 2]].eq(2).all()
    assert out.exit_depth[1].eq(6).all()
    assert out.logits[[0, 2]].isfinite().all()
    assert out.tokens_per_block[:, 2:].tolist() == [[0] * 4, [25] * 4, [0] * 4]


def test_gradients_reach_the_embedding_through_every_exit():
    model, images = models.wrapped(models.timm_vit(), PLANS["neighbours"]), models.images(2)
    out = model(images)
    depths = out.exit_depth.unique().tolist()
    assert len(depths) > 1
    out.logits.square().sum().backward()
    heads = [model.exit_heads[str(depth)] if depth != model.depth else model.head for depth in depths]
    for part in (model.model.patch_embed, *heads):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


@torch.no_grad()
def test_a_tighter_threshold_runs_more_and_a_plan_for_one_call_is_not_remembered():
    model, images = models.wrapped(models.timm_vit(), PLANS["neighbours"]), models.images(4)
    before = model(images)
    counts = [
        int(model(images, schedule=PLANS["dtop"].with_threshold(t)).tokens_per_block.sum()) for t in (0.2, 0.5, 0.9)
    ]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]
    assert torch.equal(model(images).logits, before.logits)
    model.retune(threshold=1.0)
    assert model(images).exit_depth.eq(6).all()
    model.retune(PLANS["neighbours"])
    assert torch.equal(model(images).logits, before.logits)


@torch.no_grad()
def test_a_threshold_may_be_a_tensor_that_changes():
    threshold = torch.tensor(1.0)
    plan = Schedule((Exit(2, policies.ConfidenceAbove(threshold)),))
    model, images = models.wrapped(models.timm_vit(), plan), models.images(2)
    assert model(images).exit_depth.eq(6).all()
    threshold.fill_(0.0)
    assert model(images).exit_depth.eq(2).all()


@torch.no_grad()
def test_upsampling_interpolates_the_logits():
    out = models.wrapped(models.timm_vit(), PLANS["dtop"])(models.images(1))
    wanted = torch.nn.functional.interpolate(out.logits, (32, 48), mode="bilinear", align_corners=False)
    assert torch.equal(out.upsample((32, 48)), wanted)


@torch.no_grad()
def test_half_precision_and_autocast():
    model, images = models.wrapped(models.timm_vit(), PLANS["neighbours"]), models.images(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(images).logits.isfinite().all()
    half = tet.wrap(models.timm_vit().bfloat16(), PLANS["neighbours"], num_classes=models.CLASSES)
    assert half(images.bfloat16()).logits.dtype == torch.bfloat16


@torch.no_grad()
def test_multiply_adds_are_those_of_torchs_own_counter():
    model, images = models.wrapped(models.timm_vit(), schedule.dense()), models.images(2)
    for plan in (schedule.dense(), schedule.truncated(after=3), PLANS["neighbours"]):
        # Fused attention on CPU is invisible to the counter; its unfused form is two counted products.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            out = model(images, schedule=plan)
        counted = counter.get_total_flops() / 2
        ours = int(model.multiply_adds(out).sum())
        assert ours == pytest.approx(counted, rel=0.01)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m([1]), "`images` must be a torch.Tensor, got list"),
        (
            lambda m: m(torch.zeros(3, 32, 48)),
            r"`images` must have shape \(images, 3, height, width\), got shape \(3, 32",
        ),
        (lambda m: m(torch.zeros(1, 4, 32, 48)), r"`images` must have shape .* got shape \(1, 4, 32, 48\)"),
        (lambda m: m(torch.zeros(1, 3, 32, 48).double()), "`images` must have the dtype .*float32, got torch.float64"),
        (lambda m: m(torch.zeros(1, 3, 32, 48, device="meta")), "`images` must be on the device .*cpu, got meta"),
        (lambda m: m.retune(schedule.dtop(after=(5,))), r"exit head, \[2, 3, 4\], got \[5\]"),
        (lambda m: m.retune(schedule.dtop(after=(6, 8))), r"blocks 1 to 5 only, for 6 blocks, got \[6, 8\]"),
        (lambda m: m.retune(), "`schedule` must be given if `threshold` is not, got None"),
        (lambda m: m.retune(threshold=2.0), r"`threshold` must be in \[0, 1\], got 2.0"),
        (lambda m: m.retune(threshold={9: 0.5}), r"`threshold` must name blocks with an exit.*got \[9\]"),
        (lambda m: m(models.images(), schedule="dtop"), "`schedule` must be a tokenexit.schedule.Schedule, got 'dtop'"),
    ],
)
def test_bad_input_is_named(call, message):
    model = models.wrapped(models.timm_vit(), PLANS["neighbours"])
    with pytest.raises(TokenExitError, match=message):
        call(model)
