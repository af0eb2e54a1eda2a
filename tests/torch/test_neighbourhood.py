"""Exit heads that look around a token, on real blocks."""

import dataclasses

import numpy as np
import pytest
import torch

import tokenexit_torch as tet
from tests.core.oracles import walked
from tests.torch import models
from tests.torch.decoders import DECODERS
from tests.torch.oracle import run_one_by_one
from tokenexit import TokenExitError, schedule
from tokenexit.carries import Feature
from tokenexit.heads import MLP, Neighbourhood
from tokenexit.schedule import Schedule
from tokenexit_torch.heads import build

PLAN = schedule.neighbours(radius={2: 0, 3: 1, 4: 0}, threshold=0.5, per_class=1)
HEADS = Neighbourhood(hidden=16, radius=1)
HOSTS = {"timm": models.timm_vit, "plain": models.plain_host, "placed": models.placed}


def looking(host="timm", plan=PLAN, heads=HEADS):
    """A model all of whose heads look around, the final one as well, with confidences that spread."""
    model = looking_once(host, heads)
    model.retune(plan)
    return model


@models.once
def looking_once(host, heads):
    torch.manual_seed(2)
    model = tet.wrap(HOSTS[host](), schedule.dense(after=(2, 3, 4)), num_classes=models.CLASSES, exit_heads=heads)
    with torch.no_grad():
        for head in [*model.exit_heads.values(), model.head]:
            head[-1].weight.mul_(12)
    return model.eval()


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("radius", [1, 3])
@torch.no_grad()
def test_heads_are_shown_what_still_runs_around_a_token(host, radius):
    model, images = looking(host, heads=Neighbourhood(hidden=16, radius=radius)), models.images(3)
    out = model(images)
    assert len(out.exit_depth.unique()) > 2
    torch.testing.assert_close(out.logits, run_one_by_one(model, images, out.exit_depth), atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_without_exits_every_head_sees_the_whole_neighbourhood():
    model, images = looking(), models.images(2)
    every = model.every_exit(images)
    torch.testing.assert_close(model(images, schedule=schedule.dense()).logits, every[6])
    for after in (2, 3, 4):
        cut = model(images, schedule=schedule.truncated(after=after))
        torch.testing.assert_close(cut.logits, every[after])
    patches = model.patches_after(images)[3]
    beside = walked(patches.numpy(), np.ones(patches.shape[:2], bool), (4, 6), 1, 0)
    wanted = model.exit_heads["3"](torch.from_numpy(beside).float())
    torch.testing.assert_close(every[3].flatten(2).mT, wanted, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_images_of_a_batch_static_shapes_and_sizes_do_not_matter():
    model, images = looking(), models.images(3)
    out = model(images)
    static = tet.StaticModel(model, capacities=1.0)(images)
    assert torch.equal(static.exit_depth, out.exit_depth)
    torch.testing.assert_close(static.logits, out.logits, atol=1e-4, rtol=1e-4)
    for index in range(3):
        alone = model(images[index : index + 1])
        assert torch.equal(alone.exit_depth[0], out.exit_depth[index])
        torch.testing.assert_close(alone.logits[0], out.logits[index], atol=1e-4, rtol=1e-4)
    plain = looking("plain")
    sizes = [models.images(1, size)[0] for size in ((32, 48), (40, 24), (32, 48))]
    for mixed, image in zip(plain.mixed(sizes), sizes, strict=True):
        alone = plain(image[None])
        assert torch.equal(mixed.exit_depth, alone.exit_depth)
        torch.testing.assert_close(mixed.logits, alone.logits, atol=1e-4, rtol=1e-4)


def test_they_are_fitted_to_what_they_will_be_shown():
    model, images = looking(heads=Neighbourhood()), models.images(8)
    report = tet.fit_exits(model, images, steps=250, patches_per_step=128, progress=iter)
    with torch.no_grad():
        every = model.every_exit(images)
    for after, agreement in report.agreement.items():
        right = every[after].argmax(1) == every[6].argmax(1)
        assert agreement == pytest.approx(right.float().mean().item(), abs=1e-6)
        assert agreement > 0.75


def test_tokens_that_were_kept_for_other_heads_are_refused(tmp_path):
    images, few = models.images(2), {"steps": 2, "patches_per_step": 8, "progress": iter}

    def fit(heads, **options):
        torch.manual_seed(0)
        model = tet.wrap(models.timm_vit(), PLAN, head=torch.nn.Linear(48, 5), exit_heads=heads)
        tet.fit_exits(model, images, **few | options)

    fit(Neighbourhood(8, 1), cache=tmp_path / "tokens")
    fit(Neighbourhood(4, 1), cache=tmp_path / "tokens")  # they read the same
    for other in (Neighbourhood(8, 3), MLP(8)):
        with pytest.raises(TokenExitError, match="`cache` must be for the same exits"):
            fit(other, cache=tmp_path / "tokens")

    def stop(loop):
        for turn, item in enumerate(loop):
            if turn == 1:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        fit(Neighbourhood(8, 1), resume=tmp_path, progress=stop)
    with pytest.raises(TokenExitError, match="`resume` must be for the same exits"):
        fit(Neighbourhood(8, 3), resume=tmp_path)


@torch.no_grad()
def test_with_room_for_some_the_others_are_not_seen():
    model, images = looking(), models.images(3)
    static = tet.StaticModel(model, capacities={2: 0.7, 3: 0.4, 4: 0.3})
    out = static(images)
    assert out.overflow.sum() > 0
    torch.testing.assert_close(out.logits, run_one_by_one(model, images, out.exit_depth), atol=2e-4, rtol=2e-4)
    exported = tet.export_program(static, images).module()
    for found, wanted in zip(exported(images)[:2], out[:2], strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_gradients_reach_the_heads_and_the_tokens_around():
    model = looking().train()
    out = model(models.images(2).requires_grad_())
    out.logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_they_cost_what_their_layers_cost():
    model, images = looking(), models.images(1)
    with torch.no_grad():
        short = model.multiply_adds(model(images, schedule=schedule.truncated(after=2))).item()
    other = tet.wrap(models.timm_vit(), schedule.dense(after=(2,)), num_classes=models.CLASSES, exit_heads=MLP(16))
    with torch.no_grad():
        plain = other.multiply_adds(other(images, schedule=schedule.truncated(after=2))).item()
    assert short - plain == 24 * 48 * 16  # a second half of the first layer, for 24 patches


def test_they_are_saved_and_loaded(tmp_path):
    model, images = looking(), models.images(2)
    tet.save(model, tmp_path)
    again = tet.load(models.timm_vit(), tmp_path)
    assert again.head_plan == HEADS
    with torch.no_grad():
        torch.testing.assert_close(again(images).logits, model(images).logits)


@torch.no_grad()
def test_a_decoder_may_have_them():
    images = models.images(3, (32, 32))
    told = Schedule(schedule.neighbours(radius={1: 1, 2: 0}, threshold=0.36, per_class=0).exits, Feature())
    torch.manual_seed(0)
    model = tet.wrap_decoder(DECODERS["DPT, segmentation"].make(), told, exit_heads=HEADS).eval()
    out = model(images)
    assert len(out.exit_depth.unique()) > 1
    first = model.every_exit(images)[1].softmax(1)  # before anybody has left
    confident = first.amax(1) > 0.36
    label = torch.where(confident, first.argmax(1), -1).float()[:, None]
    lowest, highest = (sign * torch.nn.functional.max_pool2d(sign * label, 3, 1, 1) for sign in (-1, 1))
    assert torch.equal(out.exit_depth == 1, (confident[:, None] & (lowest == highest))[:, 0])
    report = tet.fit_exits(model, images, steps=20, patches_per_step=32, progress=iter)
    assert report.patches == 48


@pytest.mark.usefixtures("unchecked")
def test_what_treats_each_token_by_itself_takes_none_of_them():
    vit = models.timm_vit()
    head, gate = (build(HEADS, width=48, classes=classes) for classes in (5, 2))
    plan = schedule.svit(after=(2, 3))
    for options, message in (
        ({"gates": HEADS}, "`gates` must be a plan of tokenexit.heads that treats each token by itself"),
        ({"gates": {2: gate, 3: gate}}, "`gates` must treat each token by itself, got a head that looks around tokens"),
        ({"head": head}, "`head` must treat each token by itself, got NeighbourhoodHead"),
    ):
        with pytest.raises(TokenExitError, match=message):
            tet.wrap_gates(vit, plan, **options)
    for change, message in (
        ({"radius": 0}, "`radius` must be a whole number from 1 to 16, got 0"),
        ({"radius": 17}, "`radius` must be a whole number from 1 to 16, got 17"),
        ({"hidden": 0}, "`hidden` must be a whole number from 1 to 1,000,000, got 0"),
    ):
        with pytest.raises(TokenExitError, match=message):
            dataclasses.replace(HEADS, **change)
