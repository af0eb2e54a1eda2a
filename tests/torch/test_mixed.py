"""Images of several sizes in one packed row: each as if it were alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core import strategies
from tests.torch import models
from tests.torch.hosts import FOREIGN, exiting
from tests.torch.plans import ALL, BARE, ONE_BY_ONE, on
from tokenexit import TokenExitError, policies, schedule
from tokenexit.carries import Feature
from tokenexit.schedule import Exit, Schedule

SIZES = [(32, 48), (64, 32), (32, 48), (16, 16), (64, 32)]


def drawn(sizes, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *size, generator=random).double() for size in sizes]


def dynamic():
    return models.timm_vit(dynamic_img_size=True)


def assert_each_alone(model, images):
    found = model.mixed(images)
    assert len(found) == len(images)
    for image, out in zip(images, found, strict=True):
        alone = model(image[None])
        torch.testing.assert_close(out.logits, alone.logits, rtol=1e-9, atol=1e-9)
        assert torch.equal(out.exit_depth, alone.exit_depth)
        assert torch.equal(out.tokens_per_block, alone.tokens_per_block)
        assert out.head_on == alone.head_on
        assert set(out.exits) >= set(alone.exits)


@torch.no_grad()
@on([(dynamic, ONE_BY_ONE), (models.placed, {name: plan for name, plan in BARE.items() if name in ONE_BY_ONE})])
def test_an_image_among_others_of_other_sizes_is_the_image_alone(host, plan):
    assert_each_alone(models.wrapped(host, plan).double(), drawn(SIZES))


@torch.no_grad()
@given(sizes=st.lists(st.sampled_from(SIZES), max_size=6), threshold=st.sampled_from([0.0, 0.4, 1.0]))
@strategies.fewer(3)
def test_any_sizes_in_any_order(sizes, threshold):
    model = models.wrapped(models.plain_host, ALL["neighbours"].with_threshold(threshold)).double()
    assert_each_alone(model, drawn(sizes))


@torch.no_grad()
def test_the_blocks_run_once_on_all_of_them():
    model, rows = models.wrapped(dynamic, ALL["dtop"]).double(), []
    hook = model.model.blocks[0].register_forward_pre_hook(lambda _, given: rows.append(tuple(given[0].shape)))
    model.mixed(drawn(SIZES))
    hook.remove()
    assert rows == [(1, sum(1 + h * w // 64 for h, w in SIZES), 48)]


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm DINOv3", "transformers DINOv3", "transformers DINOv2", "timm EVA-02"])
def test_rotary_and_interpolated_positions_are_those_of_each_size(name):
    model = exiting(FOREIGN[name]).double()
    sizes = [(32, 32), (32, 48), (64, 32)] if "EVA" not in name else [(32, 32)] * 2
    plan = Schedule(tuple(Exit(after, policies.Budget(0.6)) for after in (1, 2)))
    images = drawn(sizes)
    for image, out in zip(images, model.mixed(images, schedule=plan), strict=True):
        torch.testing.assert_close(out.logits, model(image[None], schedule=plan).logits, rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_one_by_one():
    model, images = models.wrapped(dynamic, ALL["neighbours"]).double(), drawn(SIZES[:3])
    found = []
    for run in (model.mixed, lambda images: [model(image[None]) for image in images]):
        model.zero_grad()
        sum(out.logits.square().sum() for out in run(images)).backward()
        found.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            [torch.zeros(3, 32, 48), torch.zeros(1, 3, 32, 48)],
            r"`images\[1\]` must be a tensor of shape .* got shape \(1",
        ),
        ([1], r"`images\[0\]` must be a tensor of shape \(channels, height, width\), got int"),
        ([torch.zeros(3, 32, 41)], "`images` must have a size that the model takes"),
        ([torch.zeros(3, 32, 48), torch.zeros(4, 32, 48)], r"`images` must have shape \(images, 3"),
    ],
)
def test_bad_input_is_named(images, message):
    model = models.wrapped(dynamic, schedule.dense())
    with pytest.raises(TokenExitError, match=message):
        model.mixed(images)


@torch.no_grad()
@pytest.mark.parametrize("exits", [(), (Exit(2, policies.never()),)])
def test_features_that_rejoin_though_nothing_could_leave(exits):
    model, plan = models.wrapped(models.timm_vit, schedule.dense()), Schedule(exits, Feature("last block"))
    images = models.images(2)
    for found, image in zip(model.mixed([*images], schedule=plan), images, strict=True):
        wanted = model(image[None], schedule=plan)
        torch.testing.assert_close(found.logits, wanted.logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(found.tokens_per_block, wanted.tokens_per_block)
        assert found.head_on == wanted.head_on == "all"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "`images` must be a list of tensors of shape .*, got NoneType"),
        (iter([]), "`images` must be a list of tensors of shape .*, got list_iterator"),
        ([torch.zeros(3, 32, 48).to_sparse()], r"`images\[0\]` must be dense, got torch.sparse_coo"),
        ([torch.zeros(3, 32, 48, device="meta")], "`images` must be on the device of the model, cpu, got meta"),
        (
            [torch.zeros(3, 32, 48), torch.zeros(3, 32, 48, device="meta")],
            r"`images\[1\]` must be on the device of the first, cpu, got meta",
        ),
    ],
)
def test_what_is_no_list_of_images_is_named(images, message):
    with pytest.raises(TokenExitError, match=message):
        models.wrapped(models.timm_vit, schedule.dense()).mixed(images)
