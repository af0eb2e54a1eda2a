"""Mask heads: what the head computes, how it runs packed, its own carry, its loss."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tokenexit_torch as tet
from tests.core import strategies
from tests.torch import models
from tests.torch.oracle import log_scores, run_one_by_one
from tokenexit import TokenExitError, cost, heads, policies, schedule, scores
from tokenexit.carries import MaskPrediction, Prediction
from tokenexit.policies import Policy
from tokenexit.schedule import Exit, Schedule
from tokenexit_torch.training.stages import Staged

HOSTS = {
    "plain": models.plain_host,
    "timm": models.timm_vit,
    "timm, cls and five registers": lambda: models.timm_vit(prefix=6),
}
DTOP = schedule.dtop(after=(2, 4), threshold=0.5, per_class=2)
PLANS = {
    "dtop": DTOP,
    "dtop, masks weighted anew": Schedule(DTOP.exits, MaskPrediction()),
    "neighbours": schedule.neighbours(radius={2: 1, 3: 1, 4: 0}, threshold=0.3, per_class=1),
    "dovit": schedule.dovit(after=(2, 4), threshold=0.5, fold_above=None),
    "a budget": Schedule((Exit(3, policies.Budget(0.4)),), MaskPrediction()),
}
CARRIES = {"prediction": Prediction(), "mask prediction": MaskPrediction()}
each_host = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS.keys())
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
each_carry = pytest.mark.parametrize("carry", CARRIES.values(), ids=CARRIES.keys())


def masked(host, plan, atm=heads.ATM(layers=2, attention_heads=2)):
    """A model with mask heads after blocks 2, 3 and 4 whose confidences spread over (0, 1).

    `host` is a model, or what makes one: then it is wrapped once for all tests, and this is a copy.
    """
    model = masked_once(host, atm) if models.makes(host) else with_masks(host, atm)
    model.retune(plan)
    return model


def with_masks(host, atm):
    torch.manual_seed(1)
    model = tet.wrap(host, schedule.dense(after=(2, 3, 4)), num_classes=models.CLASSES, exit_heads=atm).eval()
    for head in [*model.exit_heads.values(), model.head]:
        models.lively_masks(head)
    return model


@models.once
def masked_once(make, atm):
    return with_masks(make(), atm)


def a_head(width=12, classes=3, **options):
    torch.manual_seed(5)
    return models.lively_masks(tet.heads.AttentionToMask(width, classes, **options).double())


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The head by itself.


@torch.no_grad()
@pytest.mark.parametrize(("layers", "attention_heads"), [(1, 1), (2, 3), (3, 2)])
def test_masks_are_query_key_products_of_the_last_layer_and_presence_is_a_softmax_of_two(layers, attention_heads):
    head = a_head(layers=layers, attention_heads=attention_heads)
    row = drawn(7, 12)
    wide = 6 // attention_heads

    def attention(q, k, v):
        result, products = [], []
        for part in range(attention_heads):
            at = slice(part * wide, (part + 1) * wide)
            products.append(q[:, at] @ k[:, at].T / wide**0.5)
            result.append(products[-1].softmax(dim=-1) @ v[:, at])
        return torch.cat(result, dim=1), torch.stack(products).mean(dim=0)

    memory, queries, product = head.memory(row), head.queries, None
    for layer in head.layers:
        q, k, v = layer.among(queries).split(6, dim=1)
        queries = layer.norms[0](queries + layer.among_out(attention(q, k, v)[0]))
        k, v = layer.key_value(memory).split(6, dim=1)
        attended, product = attention(layer.query(queries), k, v)
        queries = layer.norms[1](queries + layer.out(attended))
        queries = layer.norms[2](queries + layer.mlp(queries))
    found = head(row, [7])
    torch.testing.assert_close(found.mask_logits, product.T)
    torch.testing.assert_close(found.presence_logits[0].sigmoid(), head.presence(queries).softmax(dim=1)[:, 1])


@torch.no_grad()
@given(lengths=st.lists(st.integers(0, 6), max_size=6), seed=st.integers(0, 99), bad=st.integers(0, 5))
def test_an_image_is_read_as_if_it_were_alone(lengths, seed, bad):
    head, row = a_head(), drawn(sum(lengths), 12, seed=seed)
    parts = list(row.split(lengths))
    if bad < len(parts):
        parts[bad].fill_(float("nan"))
    found = head(row, lengths)
    assert found.mask_logits.shape == (sum(lengths), 3)
    assert found.presence_logits.shape == (len(lengths), 3)
    for index, (part, masks) in enumerate(zip(parts, found.mask_logits.split(lengths), strict=True)):
        if len(part) == 0:
            assert found.presence_logits[index].isfinite().all()
            continue
        alone = head(part, [len(part)])
        torch.testing.assert_close(masks, alone.mask_logits, equal_nan=True)
        torch.testing.assert_close(found.presence_logits[index], alone.presence_logits[0], equal_nan=True)
        assert index == bad or masks.isfinite().all()


@torch.no_grad()
def test_its_cost_is_that_of_torchs_own_counter():
    for width, classes, layers, parts in ((12, 3, 3, None), (32, 5, 1, 4), (128, 7, 2, None)):
        head = tet.heads.AttentionToMask(width, classes, layers=layers, attention_heads=parts)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            head(torch.randn(3 * 10, width), [10, 0, 10, 10])
        counted = counter.get_total_flops() // 2
        assert int(head.cost.multiply_adds(torch.tensor([10, 0, 10, 10])).sum()) == counted
        plan = heads.ATM(layers, parts)
        assert cost.of_head(plan, width=width, classes=classes) == head.cost


def test_attention_heads_are_one_for_each_32_channels():
    assert [tet.heads.AttentionToMask(width, 2).layers[0].heads for width in (8, 48, 128, 384)] == [1, 1, 2, 6]


def test_a_plan_survives_json():
    for plan in (heads.ATM(), heads.ATM(layers=1, attention_heads=7)):
        assert heads.from_dict(json.loads(json.dumps(heads.to_dict(plan)))) == plan


# Running.


@torch.no_grad()
@each_host
def test_nothing_leaves_is_the_dense_model(host):
    model, images = masked(host, schedule.dense()), models.images()
    out, every = model(images), model.every_exit(images)
    torch.testing.assert_close(out.logits, every[6])
    for after, maps in model.every_mask(images).items():
        torch.testing.assert_close(
            every[after], log_scores(maps.mask_logits, maps.presence_logits[:, :, None, None]), rtol=1e-4, atol=1e-4
        )
    for carry in CARRIES.values():
        packed = model(images, schedule=Schedule(schedule.dtop(after=(2, 4), threshold=1.0).exits, carry))
        assert packed.exit_depth.eq(6).all()
        torch.testing.assert_close(packed.logits, out.logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@each_host
@each_carry
def test_everything_leaves_is_the_first_head(host, carry):
    model, images = masked(host, Schedule(schedule.truncated(after=3).exits, carry)), models.images()
    out = model(images)
    torch.testing.assert_close(out.logits, model.every_exit(images)[3], rtol=1e-4, atol=1e-4)
    assert out.exit_depth.eq(3).all()


@torch.no_grad()
@each_host
@each_plan
def test_an_image_alone_is_the_image_in_a_batch(host, plan):
    model, images = masked(host, plan).double(), models.images(4).double()
    together = model(images)
    assert len(together.exit_depth.unique()) > 1
    for index in range(len(images)):
        alone = model(images[index : index + 1])
        torch.testing.assert_close(alone.logits[0], together.logits[index], rtol=1e-9, atol=1e-9)
        assert torch.equal(alone.exit_depth[0], together.exit_depth[index])
        assert torch.equal(alone.tokens_per_block[0], together.tokens_per_block[index])


@torch.no_grad()
@each_host
@pytest.mark.parametrize("name", ["dtop", "dtop, masks weighted anew", "neighbours", "a budget"])
def test_running_packed_is_running_one_image_at_a_time_with_its_own_tokens(host, name):
    plan = PLANS[name]
    model, images = masked(host, plan).double(), models.images(4).double()
    out = model(images)
    assert len(out.exit_depth.unique()) > 1
    expected = run_one_by_one(model, images, out.exit_depth, carry=plan.carry)
    torch.testing.assert_close(out.logits, expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
@given(
    grid=st.sampled_from([(1, 1), (7, 5), (1, 9)]),
    count=st.integers(0, 3),
    threshold=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
    carry=st.sampled_from([*CARRIES.values()]),
)
@strategies.fewer(3)
def test_any_grid_and_any_batch(grid, count, threshold, carry):
    plan = Schedule(PLANS["neighbours"].with_threshold(threshold).exits, carry)
    model = masked(models.plain_host, plan).double()
    images = models.images(count, (8 * grid[0], 8 * grid[1])).double()
    out = model(images)
    assert out.logits.shape == (count, models.CLASSES, *grid)
    assert out.logits.isfinite().all()
    if count:
        expected = run_one_by_one(model, images, out.exit_depth, carry=carry)
        torch.testing.assert_close(out.logits, expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
@each_carry
def test_a_nan_never_leaves_and_an_image_may_lose_all_its_patches(carry):
    plan = schedule.dtop(after=(2, 4), threshold=0.0, per_class=0)
    model, images = masked(models.timm_vit, Schedule(plan.exits, carry)), models.images(3)
    images[1] = float("nan")
    out = model(images)
    assert out.exit_depth[[0, 2]].eq(2).all()
    assert out.exit_depth[1].eq(6).all()
    assert out.tokens_per_block[:, 2:].tolist() == [[0] * 4, [25] * 4, [0] * 4]
    expected = model(images[[0, 2]], schedule=schedule.truncated(after=2))
    torch.testing.assert_close(out.logits[[0, 2]], expected.logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@each_host
def test_the_confidence_is_the_greatest_of_presence_times_mask(host):
    seen = []

    class Watching(Policy):
        def leaves(self, evidence):
            seen.append(evidence)
            return evidence.confidence > threshold

    model, images = masked(host, schedule.dense(after=(2, 3))), models.images(2)
    maps = model.every_mask(images)[2]
    mask_logits = maps.mask_logits.flatten(2).transpose(1, 2)
    wanted = scores.mask_scores(mask_logits, maps.presence_logits.sigmoid()[:, None])
    threshold = wanted.amax(dim=-1).median().item()
    out = model(images, schedule=Schedule((Exit(2, Watching()), Exit(3, Watching()))))
    first, second = seen
    torch.testing.assert_close(first.class_scores, wanted.flatten(0, 1))
    best, label = wanted.max(dim=-1)
    left = (out.exit_depth == 2).flatten(1)
    assert torch.equal(best > threshold, left)
    assert left.any() and not left.all()  # noqa: PT018
    assert torch.equal(second.valid, ~left.flatten())
    torch.testing.assert_close(second.confidence.reshape(left.shape)[left], best[left])
    assert torch.equal(second.label.reshape(left.shape)[left], label[left])


@torch.no_grad()
def test_the_two_carries_agree_exactly_where_presence_does_not_change():
    model, images = masked(models.timm_vit, DTOP), models.images(4)
    anew = PLANS["dtop, masks weighted anew"]
    differ = (model(images).logits - model(images, schedule=anew).logits).abs().amax(dim=1)
    depth = model(images).exit_depth
    assert differ[depth == 6].max() < 1e-5
    assert (differ[depth == 2] > 1e-3).any()
    for head in [*model.exit_heads.values(), model.head]:
        head.presence.weight.zero_()
        head.presence.bias.copy_(torch.tensor([0.0, 1.0]))
    frozen = model(images)
    assert len(frozen.exit_depth.unique()) > 1
    torch.testing.assert_close(frozen.logits, model(images, schedule=anew).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_multiply_adds_are_those_of_torchs_own_counter():
    model, images = masked(models.timm_vit, schedule.dense()), models.images(2)
    for plan in (schedule.dense(), schedule.truncated(after=3), schedule.dtop(after=(2, 4), threshold=1.0)):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            out = model(images, schedule=plan)
        assert int(model.multiply_adds(out).sum()) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


@torch.no_grad()
def test_multiply_adds_of_heads_follow_the_tokens():
    model, images = masked(models.timm_vit, DTOP), models.images(3)
    out = model(images)
    head = cost.atm_head(width=48, classes=models.CLASSES, layers=2)
    patches = out.tokens_per_block.numpy() - 1
    heads_alone = sum(head.multiply_adds(np.maximum(patches[:, block], 0)) for block in (1, 3, 5))
    bare = tet.wrap(
        model.model, schedule.dense(after=(2, 4)), head=nn.Identity(), exit_heads={2: nn.Identity(), 4: nn.Identity()}
    )
    assert (model.multiply_adds(out) - bare.multiply_adds(out)).tolist() == heads_alone.tolist()


@torch.no_grad()
@pytest.mark.parametrize("plan", [schedule.dense(), schedule.truncated(after=3)])
def test_half_precision_and_autocast_are_near_to_single(plan):
    model, images = masked(models.timm_vit, plan), models.images(2)
    single = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(images)
    half = model.bfloat16()(images.bfloat16())
    for out in (cast, half):
        assert out.logits.dtype == torch.float32  # as all scores
        assert torch.equal(out.exit_depth, single.exit_depth)
        assert (out.logits - single.logits).square().mean().sqrt() < 0.2 * single.logits.square().mean().sqrt()


@torch.no_grad()
@each_carry
def test_what_was_saved_comes_back(tmp_path, carry):
    vit = models.timm_vit()
    model, images = masked(vit, Schedule(DTOP.exits, carry)), models.images()
    tet.save(model, tmp_path)
    loaded = tet.load(vit, tmp_path).eval()
    assert loaded.schedule == model.schedule
    assert loaded.head_plan == heads.ATM(layers=2, attention_heads=2)
    assert torch.equal(loaded(images).logits, model(images).logits)
    own = {after: tet.heads.AttentionToMask(48, 5) for after in (2, 4)}
    final = tet.heads.AttentionToMask(48, 5)
    model = tet.wrap(vit, Schedule(DTOP.exits, carry), head=final, exit_heads=own).eval()
    tet.save(model, tmp_path)
    again = tet.load(
        vit, tmp_path, head=final, exit_heads={after: tet.heads.AttentionToMask(48, 5) for after in (2, 4)}
    )
    assert torch.equal(again.eval()(images).logits, model(images).logits)


# Training.


@each_carry
def test_gradients_reach_the_queries_and_the_embedding(carry):
    plan = Schedule(DTOP.with_threshold({2: 0.6, 4: 0.2}).exits, carry)
    model, images = masked(models.timm_vit, plan), models.images(4)
    out = model(images)
    assert {2, 4, 6} == set(out.exit_depth.unique().tolist())
    out.logits.square().sum().backward()
    for parameter in (
        *model.model.patch_embed.parameters(),
        *(head.queries for head in (model.exit_heads["2"], model.exit_heads["4"], model.head)),
    ):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


@each_carry
def test_stages_have_the_masks_of_every_head_and_what_has_left_is_constant(carry):
    plan = Schedule(DTOP.exits, carry)
    model, images = masked(models.timm_vit, plan), models.images(3)
    stages, out = Staged(model)(images), model(images)
    assert [*stages.masks] == [*stages.logits] == [2, 4, 6]
    assert torch.equal(stages.output.exit_depth, out.exit_depth)
    torch.testing.assert_close(stages.logits[6], out.logits)
    torch.testing.assert_close(stages.output.logits, out.logits)
    first = model.every_mask(images)[2]
    torch.testing.assert_close(stages.masks[2].mask_logits, first.mask_logits, rtol=1e-4, atol=1e-4)
    left = (out.exit_depth == 2)[:, None].expand_as(first.mask_logits)
    for after in (4, 6):
        torch.testing.assert_close(stages.masks[after].mask_logits[left], first.mask_logits[left], rtol=1e-4, atol=1e-4)
    stages.masks[6].mask_logits.square().sum().backward()
    assert model.exit_heads["2"].queries.grad is None
    assert model.head.queries.grad.abs().sum() > 0


def test_stages_of_a_dense_plan_and_of_features_have_masks_too():
    model, images = masked(models.timm_vit, schedule.dense()), models.images(2)
    assert [*Staged(model)(images).masks] == [6]
    stages = Staged(model)(images, schedule=PLANS["dovit"])
    assert [*stages.masks] == [2, 4, 6]
    torch.testing.assert_close(
        stages.logits[6],
        log_scores(stages.masks[6].mask_logits, stages.masks[6].presence_logits[:, :, None, None]),
        rtol=1e-4,
        atol=1e-4,
    )
    labels = torch.zeros(2, 32, 48, dtype=torch.int64)
    loss = stages.loss_of_masks(lambda maps: tet.mask_loss(maps, labels), auxiliary={2: 0.0, 4: 2.0})
    wanted = 2 * tet.mask_loss(stages.masks[4], labels) + tet.mask_loss(stages.masks[6], labels)
    torch.testing.assert_close(loss, wanted)
    softmax = Staged(models.wrapped(models.timm_vit, schedule.dense()))(images)
    assert softmax.masks is None
    with pytest.raises(TokenExitError, match="`stages` must be of mask heads for a loss of masks, got none"):
        softmax.loss_of_masks(lambda maps: maps.mask_logits.sum())


def maps_of(images, classes, seed=0):
    return tet.heads.MaskMaps(
        3 * drawn(images, classes, 2, 3, seed=seed).float(), drawn(images, classes, seed=seed + 1).float()
    )


def slow_loss(maps, label, ignore):
    """As `mask_loss`, mask by mask."""
    images, classes = maps.presence_logits.shape
    wrong, weights, focal, dice = 0.0, 0.0, [], []
    for image in range(images):
        known = label[image] != ignore
        if not known.any():
            continue
        for one in range(classes):
            target = (label[image] == one)[known].double()
            p = maps.presence_logits[image, one].double().sigmoid()
            weight = 1.0 if target.any() else 0.1
            wrong, weights = wrong - weight * torch.log(p if target.any() else 1 - p), weights + weight
            if target.any():
                up = functional.interpolate(maps.mask_logits[image, one][None, None], label.shape[1:], mode="bilinear")
                p = up[0, 0][known].double().sigmoid()
                right = torch.where(target > 0, p, 1 - p)
                focal.append((torch.where(target > 0, 0.25, 0.75) * (1 - right) ** 2 * -right.log()).mean())
                dice.append(1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1))
    return wrong / weights + 20 * sum(focal) / len(focal) + sum(dice) / len(dice)


@given(images=st.integers(1, 3), classes=st.integers(1, 4), seed=st.integers(0, 99), unlabelled=st.booleans())
def test_the_loss_is_that_of_every_mask_by_itself(images, classes, seed, unlabelled):
    label = torch.randint(0, classes, (images, 4, 6), generator=torch.Generator().manual_seed(seed))
    label[:, :2, :2] = 255
    if unlabelled and images > 1:
        label[0] = 255
    maps = maps_of(images, classes, seed)
    found = tet.mask_loss(maps, label, ignore=255)
    torch.testing.assert_close(found.double(), slow_loss(maps, label, 255), rtol=1e-4, atol=1e-5)


def test_without_labels_the_loss_is_zero_and_pixels_without_one_do_not_count():
    maps = tet.heads.MaskMaps(*(part.requires_grad_() for part in maps_of(2, 3)))
    label = torch.full((2, 4, 6), 255)
    loss = tet.mask_loss(maps, label, ignore=255)
    assert loss == 0
    loss.backward()
    assert all(part.grad.eq(0).all() for part in maps)
    label[0, :2] = 1
    sharp = tet.mask_loss(maps, label, ignore=255)
    sharp.backward()
    assert maps.presence_logits.grad[0].ne(0).all()
    assert maps.presence_logits.grad[1].eq(0).all()
    assert maps.mask_logits.grad[0, 1, 0].ne(0).all()
    assert maps.mask_logits.grad[0, [0, 2]].eq(0).all()


def test_masks_can_be_learned():
    torch.manual_seed(0)
    model = tet.wrap(models.plain_host(), schedule.dense(after=(2,)), num_classes=4, exit_heads=heads.ATM()).train()
    colours, generator = torch.randn(4, 3), torch.Generator().manual_seed(3)

    def scene(count):
        label = torch.randint(0, 4, (count, 4, 6), generator=generator)
        label = label.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
        label[: count // 2] = label[: count // 2] % 2  # not every class is in every image
        noise = torch.randn(count, 3, 32, 48, generator=generator)
        return colours[label].movedim(-1, 1) + 0.3 * noise, label

    @torch.no_grad()
    def tested(images, label):
        model.eval()
        loss = sum(tet.mask_loss(maps, label).item() for maps in model.every_mask(images).values())
        right = [
            (logits.argmax(dim=1) == label[:, ::8, ::8]).float().mean().item()
            for logits in model.every_exit(images).values()
        ]
        model.train()
        return loss, right

    test = scene(8)
    before, _ = tested(*test)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    plan = Schedule((Exit(2, policies.ConfidenceAbove(0.98)),))
    for step in range(60):
        images, label = scene(8)
        stages = Staged(model)(
            images, schedule=plan if step >= 40 else Schedule((Exit(2, policies.ConfidenceAbove(1.0)),))
        )
        loss = stages.loss_of_masks(lambda maps, label=label: tet.mask_loss(maps, label))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after, right = tested(*test)
    assert after < 0.5 * before
    assert min(right) > 0.8  # by chance it is a quarter to a half


# What is refused.


class Pooled(tet.MaskHead):
    """A mask head of one's own, which may be wrong in one way at a time."""

    def __init__(self, wrong=None, classes=5):
        super().__init__()
        self.wrong, self.linear = wrong, nn.Linear(48, classes)

    @property
    def cost(self):
        return cost.HeadCost(48 * self.linear.out_features)

    def forward(self, row, lengths):
        masks = self.linear(row)
        means = [part.mean(dim=0) if len(part) else masks.new_zeros(masks.shape[1]) for part in masks.split(lengths)]
        presence = torch.stack(means)
        if self.wrong == "leak":
            return tet.heads.Masks(masks - masks.mean(dim=0), presence)
        if self.wrong == "leaking presence":
            return tet.heads.Masks(masks, presence + masks.mean(dim=0))
        if self.wrong == "bare":
            return masks
        if self.wrong == "shape":
            return tet.heads.Masks(masks, presence[:1])
        return tet.heads.Masks(masks, presence)


@torch.no_grad()
def test_a_mask_head_of_ones_own_will_do():
    model = tet.wrap(models.timm_vit(), DTOP, head=Pooled(), exit_heads={2: Pooled(), 4: Pooled()}).eval()
    out = model(models.images(2))
    assert out.logits.shape == (2, 5, 4, 6)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: tet.wrap(v, DTOP, head=nn.Linear(48, 5), exit_heads=heads.ATM()), r"`exit_heads\[2\]` must be a mask head exactly if .*got AttentionToMask beside Linear"),
        (lambda v: tet.wrap(v, schedule.dense(), head=Pooled("leak")), "`head` must treat each image by itself"),
        (lambda v: tet.wrap(v, schedule.dense(), head=Pooled("leaking presence")), "`head` must treat each image by itself"),
        (lambda v: tet.wrap(v, schedule.dense(), head=Pooled("bare")), "`head` must give Masks, got Tensor"),
        (lambda v: tet.wrap(v, schedule.dense(), head=Pooled("shape")), r"`head` must give masks and presence .*, got \(\(5, 5\), \(1, 5\)\)"),
        (lambda v: tet.wrap(v, schedule.dense(), head=tet.heads.AttentionToMask(32, 5)), r"`head` must take patches of shape \(patches, 48\)"),
        (lambda v: tet.wrap(v, DTOP, head=Pooled(), exit_heads={2: Pooled(), 4: Pooled(classes=4)}), r"`exit_heads\[4\]` must give 5 classes, as the final head, got 4"),
        (lambda v: masked(v, schedule.paumer(after=(2,), threshold=0.5)), r"`schedule` must compare confidences, for mask heads, .*got \['entropy'\]"),
        (lambda v: models.wrapped(v, Schedule(DTOP.exits, MaskPrediction())), "`schedule` must carry no MaskPrediction, for heads that give no masks"),
        (lambda v: tet.fit_exits(masked(v, DTOP), models.images()), "`model` must have heads that give no masks.*got mask heads"),
        (lambda v: models.wrapped(v, DTOP).every_mask(models.images()), "`model` must have mask heads, got Sequential"),
        (lambda v: tet.heads.AttentionToMask(7, 2), "`width` must be even, got 7"),
        (lambda v: tet.heads.AttentionToMask(12, 2, attention_heads=4), "`attention_heads` must divide half the width, 6, got 4"),
        (lambda v: tet.heads.AttentionToMask(12, 2, attention_heads=0), "`attention_heads` must divide half the width, 6, got 0"),
        (lambda v: heads.ATM(layers=0), "`layers` must be a whole number from 1 to 64, got 0"),
        (lambda v: heads.ATM(layers=65), "`layers` must be a whole number from 1 to 64, got 65"),
        (lambda v: heads.ATM(attention_heads=1.0), "`attention_heads` must be a whole number from 1 to 1,000,000, got 1.0"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(TokenExitError, match=message):
        call(models.timm_vit())
