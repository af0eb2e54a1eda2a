"""What must always hold when tokens leave, on real blocks."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tokenexit_torch as tet
from tests.core import strategies
from tests.torch import models
from tests.torch.oracle import run_one_by_one
from tests.torch.plans import CELLS, FEATURES, PLANS
from tokenexit import TokenExitError, cells, policies, schedule
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
each_host = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS.keys())
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


@torch.no_grad()
@each_host
def test_nothing_leaves_is_the_dense_model(host):
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
    model, images = models.wrapped(host, schedule.dtop(after=(2, 4), threshold=1.0)), models.images()
    dense = model(images, schedule=schedule.dense())
    torch.testing.assert_close(model(images).logits, dense.logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@each_host
def test_everything_leaves_is_the_first_head(host):
    model, images = models.wrapped(host, schedule.truncated(after=3)), models.images()
    out = model(images)
    torch.testing.assert_close(out.logits, model.every_exit(images)[3], rtol=1e-5, atol=1e-5)
    assert out.exit_depth.eq(3).all()
    assert out.tokens_per_block[:, 3:].eq(0).all()


@torch.no_grad()
@each_host
@each_plan
def test_an_image_alone_is_the_image_in_a_batch(host, plan):
    # In double precision no rounding comes near enough to a threshold to flip a token.
    model, images = models.wrapped(host, plan).double(), models.images(5).double()
    together = model(images)
    for index in range(len(images)):
        alone = model(images[index : index + 1])
        torch.testing.assert_close(alone.logits[0], together.logits[index], rtol=1e-9, atol=1e-9)
        assert torch.equal(alone.exit_depth[0], together.exit_depth[index])
        assert torch.equal(alone.tokens_per_block[0], together.tokens_per_block[index])


@torch.no_grad()
@each_host
@each_plan
def test_what_ran_is_what_the_depths_say(host, plan):
    model, images = models.wrapped(host, plan), models.images(4)
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
@pytest.mark.parametrize("host", [models.timm_vit, models.placed], ids=["timm", "positions that travel"])
def test_running_packed_is_running_one_image_at_a_time_with_its_own_tokens(host, plan):
    model, images = models.wrapped(host, plan), models.images(3)
    out = model(images)
    assert len(out.exit_depth.unique()) > 1
    torch.testing.assert_close(out.logits, run_one_by_one(model, images, out.exit_depth), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("plan", FEATURES.values(), ids=FEATURES.keys())
@pytest.mark.parametrize("prefix", [1, 6])
def test_features_that_rejoin_are_those_of_one_image_at_a_time(plan, prefix):
    model, images = models.wrapped(models.timm_vit, plan, prefix=prefix), models.images(3)
    out = model(images)
    depths = out.exit_depth.flatten(1)
    assert depths.min() < 6
    expected = run_one_by_one(model, images, out.exit_depth, carry=plan.carry)
    torch.testing.assert_close(out.logits, expected, rtol=1e-4, atol=1e-4)
    for block in range(model.depth):
        patches = (depths > block).sum(dim=1)
        ran = torch.where(patches > 0, patches + prefix, 0)
        if plan.carry.before == "last block" and block == 5:
            ran = torch.full_like(ran, 24 + prefix)
        assert torch.equal(out.tokens_per_block[:, block], ran)
    if prefix == 1:  # heads are counted for patches alone
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(images)
        assert int(model.multiply_adds(out).sum()) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dovit", "paumer, a budget", "rejoining for the last block"])
def test_an_image_whose_features_rejoin_does_not_depend_on_its_batch(name):
    model, images = models.wrapped(models.timm_vit, FEATURES[name]).double(), models.images(4).double()
    together = model(images)
    for index in range(len(images)):
        alone = model(images[index : index + 1])
        torch.testing.assert_close(alone.logits[0], together.logits[index], rtol=1e-9, atol=1e-9)
        assert torch.equal(alone.exit_depth[0], together.exit_depth[index])


def test_gradients_reach_what_left_and_rejoined():
    model, images = models.wrapped(models.timm_vit, FEATURES["dovit"]), models.images(2)
    out = model(images)
    out.logits[:, :, out.exit_depth[0] == 2].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.model.patch_embed.parameters())
    assert all(p.grad is not None for p in model.head.parameters())


@torch.no_grad()
def test_a_budget_is_kept_by_every_image():
    plan = Schedule(tuple(Exit(after, policies.Budget(keep)) for after, keep in ((2, 0.75), (3, 0.5), (4, 3))))
    out = models.wrapped(models.timm_vit, plan)(models.images(4))
    for block, patches in ((1, 24), (2, 18), (3, 12), (4, 3), (5, 3)):
        assert out.tokens_per_block[:, block].eq(patches + 1).all()


@torch.no_grad()
def test_patience_waits_for_heads_that_agree():
    plan = Schedule(tuple(Exit(after, policies.Patience(1)) for after in (2, 3, 4)))
    model, images = models.wrapped(models.timm_vit, plan), models.images(4)
    out, every = model(images), model.every_exit(images)
    two, three = (every[after].argmax(dim=1) for after in (2, 3))
    assert (out.exit_depth >= 3).all()
    assert torch.equal(out.exit_depth == 3, two == three)
    assert {3, 4, 6} == set(out.exit_depth.unique().tolist())


@torch.no_grad()
def test_patience_remembers_the_tokens_that_still_run():
    # Others leave first, so that the row is another one when the exits are compared.
    first = policies.Patience(1) | policies.ConfidenceAbove(0.7)
    plan = Schedule((Exit(2, first), Exit(3, first), Exit(4, policies.Patience(1))))
    model, images = models.wrapped(models.timm_vit, plan).double(), models.images(3).double()
    together = model(images)
    assert {2, 3, 4, 6} == set(together.exit_depth.unique().tolist())
    for index in range(len(images)):
        assert torch.equal(model(images[index : index + 1]).exit_depth[0], together.exit_depth[index])


@pytest.mark.usefixtures("unchecked")
def test_a_carry_that_the_model_cannot_run_is_named():
    model = models.wrapped(models.timm_vit, schedule.dense())
    with pytest.raises(TokenExitError, match="`schedule` must carry predictions or features .*without gates"):
        model.retune(schedule.svit(after=(2, 3)))
    with pytest.raises(TokenExitError, match="look at no gate, for a model without gates"):
        model.retune(Schedule((Exit(2, policies.never() | policies.GateBelow(0.5)),)))
    bare = models.wrapped(models.timm_vit, schedule.dovit(after=(2,), threshold=0.5), prefix=0)
    with pytest.raises(TokenExitError, match="`schedule` must have fold_above=None for a model without prefix tokens"):
        bare(models.images(1))


@torch.no_grad()
@given(
    grid=st.sampled_from([(1, 1), (7, 13), (1, 9), (33, 33)]),
    count=st.integers(0, 3),
    threshold=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
    seed=st.integers(0, 3),
)
@strategies.fewer(3)
def test_any_grid_and_any_batch(grid, count, threshold, seed):
    model = models.wrapped(models.plain_host, PLANS["neighbours"].with_threshold(threshold))
    images = models.images(count, (8 * grid[0], 8 * grid[1]), seed)
    out = model(images)
    assert out.logits.shape == (count, models.CLASSES, *grid)
    assert out.exit_depth.shape == (count, *grid)
    assert out.logits.isfinite().all()
    assert out.tokens_per_block.dtype == torch.int64
    if count:
        assert threshold < 1.0 or out.exit_depth.eq(6).all()
        torch.testing.assert_close(out.logits, run_one_by_one(model, images, out.exit_depth), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 48), (40, 24), (8, 8), (56, 104), (264, 264)])
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
        models.wrapped(models.timm_vit, schedule.dtop(after=(2,), threshold=0.0, per_class=0)),
        models.images(3),
    )
    images[1] = float("nan")
    out = model(images)
    assert out.exit_depth[[0, 2]].eq(2).all()
    assert out.exit_depth[1].eq(6).all()
    assert out.logits[[0, 2]].isfinite().all()
    assert out.tokens_per_block[:, 2:].tolist() == [[0] * 4, [25] * 4, [0] * 4]


def test_gradients_reach_the_embedding_through_every_exit():
    model, images = models.wrapped(models.timm_vit, PLANS["neighbours"]), models.images(2)
    out = model(images)
    depths = out.exit_depth.unique().tolist()
    assert len(depths) > 1
    out.logits.square().sum().backward()
    heads = [model.exit_heads[str(depth)] if depth != model.depth else model.head for depth in depths]
    for part in (model.model.patch_embed, *heads):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


@torch.no_grad()
def test_a_tighter_threshold_runs_more_and_a_plan_for_one_call_is_not_remembered():
    model, images = models.wrapped(models.timm_vit, PLANS["neighbours"]), models.images(4)
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
    model, images = models.wrapped(models.timm_vit, plan), models.images(2)
    assert model(images).exit_depth.eq(6).all()
    threshold.fill_(0.0)
    assert model(images).exit_depth.eq(2).all()


@torch.no_grad()
def test_upsampling_interpolates_the_logits():
    out = models.wrapped(models.timm_vit, PLANS["dtop"])(models.images(1))
    wanted = torch.nn.functional.interpolate(out.logits, (32, 48), mode="bilinear", align_corners=False)
    assert torch.equal(out.upsample((32, 48)), wanted)


@torch.no_grad()
@pytest.mark.parametrize(
    "plan", [schedule.dense(), schedule.truncated(after=3), schedule.dtop(after=(2,), threshold=1.0)]
)
def test_half_precision_and_autocast_are_near_to_single(plan):
    model, images = models.wrapped(models.timm_vit, plan), models.images(2)
    single = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(images)
    half = model.bfloat16()(images.bfloat16())
    assert half.logits.dtype == torch.bfloat16
    for out in (cast, half):
        assert torch.equal(out.exit_depth, single.exit_depth)
        error = (out.logits.float() - single.logits).square().mean().sqrt()
        assert error < 0.1 * single.logits.square().mean().sqrt()


@torch.no_grad()
def test_half_precision_and_autocast_decide_in_single():
    model, images = models.wrapped(models.timm_vit, PLANS["neighbours"]), models.images(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images)
    assert 6 in out.exit_depth
    assert out.exit_depth.min() < 6
    assert out.logits.isfinite().all()


@torch.no_grad()
def test_multiply_adds_are_those_of_torchs_own_counter():
    model, images = models.wrapped(models.timm_vit, schedule.dense()), models.images(2)
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
        (
            lambda m: m(torch.zeros(1, 3, 32, 48, dtype=torch.uint8)),
            "`images` must be normalised as in training: pixels / 255, less the mean .*, got torch.uint8",
        ),
        (lambda m: m(torch.zeros(1, 3, 32, 48).double()), "`images` must have the dtype .*float32, got torch.float64"),
        (lambda m: m(torch.zeros(1, 3, 32, 48, device="meta")), "`images` must be on the device .*cpu, got meta"),
        (lambda m: m.retune(schedule.dtop(after=(5,))), r"exit head, \[2, 3, 4\], got \[5\]"),
        (lambda m: m.retune(schedule.dtop(after=(6, 8))), r"blocks 1 to 5 only, for 6 blocks, got \[6, 8\]"),
        (lambda m: m.retune(), "`schedule` must be given if neither `threshold` nor `alike` is, got None"),
        (lambda m: m.retune(threshold=2.0), r"`threshold` must be in \[0, 1\], got 2.0"),
        (
            lambda m: m(torch.zeros(1, 3, 40, 48)),
            r"`images` must have a size that the model takes, as 32 x 48: resize .*, got \(1, 3, 40, 48\)",
        ),
        (lambda m: m.retune(schedule.dense(), threshold=0.5), "`threshold` must be for exits that compare one kind"),
        (lambda m: m.retune(threshold={9: 0.5}), r"`threshold` must name blocks with an exit.*got \[9\]"),
        (lambda m: m(models.images(), schedule="dtop"), "`schedule` must be a tokenexit.schedule.Schedule, got 'dtop'"),
    ],
)
def test_bad_input_is_named(call, message):
    model = models.wrapped(models.timm_vit, PLANS["neighbours"])
    with pytest.raises(TokenExitError, match=message):
        call(model)


@torch.no_grad()
def test_pixels_that_were_not_normalised_are_warned_of_and_run_all_the_same():
    model, pixels = models.wrapped(models.timm_vit, PLANS["neighbours"]), 255 * torch.rand(2, 3, 32, 48)
    message = "`images` should be normalised as in training: pixels / 255, .*, got values beyond 20"
    gated = tet.wrap_gates(models.timm_vit(), schedule.svit(after=(2,)))
    for run in (model, gated, model.every_exit, lambda images: model.mixed([*images])):
        with pytest.warns(UserWarning, match=message):
            run(pixels)
        run(pixels / 255)
    run = tet.StaticModel(model, capacities=0.7)
    with pytest.warns(UserWarning, match=message):
        run(pixels)
    assert len(model(pixels[:0]).logits) == 0


def dropping():
    return models.timm_vit(drop_path_rate=0.2, proj_drop_rate=0.1)


def test_training_mode_without_gradients_is_warned_of_where_something_drops():
    images, plan = models.images(2), PLANS["neighbours"]
    model = models.wrapped(dropping, plan)
    message = r"`model` should be in evaluation mode where no gradients are taken: call `eval\(\)` .*, got training mode with `blocks.0"
    with torch.no_grad(), pytest.warns(UserWarning, match=message):
        model.train()(images)
    model(images)  # as in training
    with torch.no_grad():
        model.eval()(images)
        models.wrapped(models.timm_vit, plan).train()(images)  # nothing in it drops


def test_a_head_or_a_decoder_in_training_mode_is_warned_of_beside_a_network_that_is_not():
    images = models.images(2)
    head = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(48, models.CLASSES))
    around = torch.nn.Sequential(torch.nn.Conv2d(48, 4, 1), torch.nn.BatchNorm2d(4))
    for options, name in (({"head": head}, "head.0"), ({"decoder": around}, "1")):
        model = tet.wrap(models.timm_vit(), schedule.merged(alike={1: 0.9}), **options).eval()
        with torch.no_grad():
            model(images)
            (head if "head" in options else around).train()
            with pytest.warns(UserWarning, match=f"got training mode with `.*{name.rpartition('.')[2]}`"):
                model(images)
        model(images)


@torch.no_grad()
@pytest.mark.parametrize(
    "plan", [CELLS["neighbours"], CELLS["wide"], CELLS["dtop"]], ids=["neighbours", "wide", "dtop"]
)
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_a_middle_counts_as_often_as_its_size(plan, prefix):
    model = models.wrapped(models.timm_vit, plan, prefix=prefix, size=(40, 56))
    images = models.images(3, size=(40, 56))
    out = model(images)
    assert (out.exit_depth < model.depth).any()
    expected = run_one_by_one(model, images, out.exit_depth, cell=plan.cell)
    torch.testing.assert_close(out.logits, expected, rtol=1e-3, atol=1e-3)
    without = model(images, schedule=dataclasses.replace(plan, cell=None))
    assert not torch.allclose(without.logits, out.logits, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("plan", CELLS.values(), ids=CELLS.keys())
def test_the_middle_of_each_cell_runs_on_unless_all_leave(plan):
    model = models.wrapped(models.timm_vit, plan)
    out = model(models.images(4))
    middle = cells.is_cell_centre(torch.arange(24), grid=(4, 6), side=plan.cell).unflatten(0, (4, 6))
    finished = (out.exit_depth < model.depth).all(dim=2).all(dim=1)
    assert not finished.all()
    assert (out.exit_depth[~finished][:, middle] == model.depth).all()
    assert (out.exit_depth[~finished][:, ~middle] < model.depth).any()


@torch.no_grad()
@pytest.mark.parametrize("plan", CELLS.values(), ids=CELLS.keys())
def test_with_cells_an_image_does_not_depend_on_its_batch(plan):
    model = models.wrapped(models.timm_vit, plan)
    images = models.images(4)
    together = model(images)
    for index in range(4):
        alone = model(images[index : index + 1])
        assert torch.equal(alone.exit_depth[0], together.exit_depth[index])
        torch.testing.assert_close(alone.logits[0], together.logits[index], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_if_all_leave_so_do_the_middles():
    model = models.wrapped(models.timm_vit, dataclasses.replace(schedule.truncated(after=3), cell=2))
    out = model(models.images(2))
    assert (out.exit_depth == 3).all()
    assert (out.tokens_per_block[:, 3:] == 0).all()


@torch.no_grad()
def test_if_every_token_is_a_cell_none_leaves():
    model = models.wrapped(models.timm_vit, dataclasses.replace(PLANS["dtop"], cell=1))
    images = models.images(2)
    torch.testing.assert_close(model(images).logits, model(images, schedule=schedule.dense()).logits)
