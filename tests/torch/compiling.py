"""`torch.compile`: what it makes of packed and static passes is the same, and how many programs that takes.

`test_compiling` runs these tests in a process without the runtime type checker, whose wrappers no compiler can trace.
"""

import dataclasses

import pytest
import torch
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend

import tokenexit_torch as tet
from tests.benchmarks import contenders
from tests.torch import models
from tests.torch.hosts import FOREIGN, SIZE
from tokenexit import TokenExitError, policies, schedule
from tokenexit.carries import Feature, Translated
from tokenexit.heads import Translator
from tokenexit.schedule import Exit, Merge, Schedule

pytestmark = [
    # array-api-compat caches what it knows of libraries; that dynamo traces its caches does no harm.
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # of inductor's own parts
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # dynamo's own
]
# What a compiler traces takes long, so that networks are no deeper than the plans need.
AFTER = (1, 2)
SMALL = {"after": AFTER, "depth": 4}
SOME = {
    "neighbours": schedule.neighbours(radius={1: 1, 2: 0}, threshold=0.4, per_class=1),
    "dovit": schedule.dovit(after=AFTER, threshold=0.5),
    "rejoining": Schedule(schedule.paumer(after=AFTER, threshold=0.4).exits, Feature("last block", fold_above=0.05)),
    "cells": schedule.neighbours(radius={1: 1, 2: 0}, threshold=0.55, per_class=0, cell=2),
}
MERGES = (Merge(1, 4, 0.7), Merge(2, 2, 0.5, agreed=policies.ConfidenceAbove(0.3)))
each = pytest.mark.parametrize("plan", SOME.values(), ids=SOME.keys())


@pytest.fixture(autouse=True)
def afresh():
    """Programs of other tests do not count."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
@each
def test_a_packed_pass_is_a_program_for_the_blocks_between_two_exits_whoever_leaves(plan):
    model, programs = models.wrapped(models.timm_vit, plan, **SMALL), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, dynamic=True, backend=programs)
    stops = sorted({0, *plan.after, model.depth, *([model.depth - 1] if "last" in repr(plan.carry) else [])})
    ran, kinds = set(), set()
    for seed in range(4):
        images = models.images(3, seed=seed)
        out, wanted = compiled(images), model(images)
        assert torch.equal(out.logits, wanted.logits)
        assert torch.equal(out.exit_depth, wanted.exit_depth)
        ran.add(tuple(wanted.tokens_per_block.sum(dim=0).tolist()))
        # Where one image alone runs on, nothing need keep images apart, and that is a program of its own.
        running = wanted.tokens_per_block.count_nonzero(dim=0).tolist()
        kinds |= {(start, running[start] == 1 and plan.cell is None) for start in stops[:-1] if running[start]}
        assert programs.frame_count == len(kinds)
    assert len(ran) > 1


@torch.no_grad()
def test_another_batch_and_another_size_need_no_other_program():
    model, programs = models.wrapped(models.plain_host, SOME["neighbours"], **SMALL), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, dynamic=True, backend=programs)
    for images in (models.images(3), models.images(2), models.images(5, size=(64, 40))):
        torch.testing.assert_close(compiled(images).logits, model(images).logits)
    assert programs.frame_count == 3


@torch.no_grad()
def test_images_of_several_sizes_compile_too():
    model = models.wrapped(models.timm_vit, SOME["neighbours"], dynamic_img_size=True, **SMALL)
    programs = CompileCounterWithBackend("eager")
    images = [models.images(1, size=size)[0] for size in ((32, 48), (16, 64), (32, 48))]
    wanted = model.mixed(images)
    found = torch.compile(model.mixed, dynamic=True, backend=programs)(images)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.logits, other.logits)
    assert programs.frame_count > 0


def test_gradients_through_a_compiled_packed_pass():
    plan = dataclasses.replace(SOME["dovit"], cell=2)
    model, images, found = models.wrapped(models.timm_vit, plan, after=AFTER, depth=3), models.images(2), []
    for run in (model, torch.compile(model, dynamic=True, backend="aot_eager")):
        model.zero_grad()
        run(images).logits.square().sum().backward()
        found.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    own, compiled = found
    assert own.keys() == compiled.keys()
    for name, gradient in own.items():
        near = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=max(near, 1e-5), msg=name)


@torch.no_grad()
def test_a_static_pass_is_one_program_without_a_break():
    plan = dataclasses.replace(SOME["neighbours"], carry=Feature("last block", fold_above=0.1), cell=2)
    static = tet.StaticModel(models.wrapped(models.timm_vit, plan, **SMALL), capacities={1: 0.7, 2: 0.5})
    programs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(static, fullgraph=True, backend=programs)
    for seed in range(3):
        images = models.images(3, seed=seed)
        out, wanted = compiled(images), static(images)
        torch.testing.assert_close(out.logits, wanted.logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(out.exit_depth, wanted.exit_depth)
        assert torch.equal(out.overflow, wanted.overflow)
    assert programs.frame_count == 1


@torch.no_grad()
def test_a_static_pass_that_merges_is_one_program_with_its_decoder():
    plan = Schedule((Exit(1, policies.ConfidenceAbove(0.4)),), Feature(), merges=MERGES)
    decoder = torch.nn.Sequential(torch.nn.Conv2d(48, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 1, 1))
    model = tet.wrap(models.timm_vit(depth=3), plan, decoder=decoder, num_classes=3).eval()
    static = tet.StaticModel(model, capacities={1: 0.4, 2: 0.2})
    programs, ran = CompileCounterWithBackend("eager"), set()
    compiled = torch.compile(static, fullgraph=True, backend=programs)
    for seed in range(3):
        images = models.pictures(3, seed=seed)
        out, wanted = compiled(images), static(images)
        torch.testing.assert_close(out.decoded, wanted.decoded, rtol=1e-5, atol=1e-5)
        assert torch.equal(out.exit_depth, wanted.exit_depth)
        assert torch.equal(out.overflow, wanted.overflow)
        ran.add(tuple(wanted.tokens_per_block.flatten().tolist()))
    assert len(ran) == 3
    assert programs.frame_count == 1


@torch.no_grad()
def test_passes_in_which_translations_rejoin_compile():
    plan = Schedule((Exit(1, policies.ConfidenceAbove(0.5)),), Translated(fold_above=0.1))
    model = tet.wrap(models.timm_vit(depth=2), plan, num_classes=5, exit_heads=Translator(8)).eval()
    model.head[-1].weight.mul_(12)
    model.exit_heads["1"].mlp[3].weight.normal_(std=0.3)
    images, static = models.images(2), tet.StaticModel(model, capacities=0.8)
    one = torch.compile(static, fullgraph=True, backend="eager")(images)
    torch.testing.assert_close(one.logits, static(images).logits, rtol=1e-5, atol=1e-5)
    packed = torch.compile(model, dynamic=True, backend="eager")(images)
    torch.testing.assert_close(packed.logits, model(images).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_translations_for_several_taps_compile_with_their_decoder():
    plan = Schedule((Exit(1, policies.Budget(0.5, by="error")),), Translated(), merges=(Merge(1, 2, 0.7),))
    model = tet.wrap(models.timm_vit(depth=3), plan, decoder=Largest(), taps=(2, 3), exit_heads=Translator(8)).eval()
    model.exit_heads["1"].log_error.weight.normal_()
    images, static = models.images(2), tet.StaticModel(model, capacities=0.8)
    wanted = static(images)
    one = torch.compile(static, fullgraph=True, backend="eager")(images)
    torch.testing.assert_close(one.decoded, wanted.decoded, rtol=1e-5, atol=1e-5)
    packed = torch.compile(model, dynamic=True, backend="eager")(images)
    torch.testing.assert_close(packed.decoded, model(images).decoded, rtol=1e-5, atol=1e-5)


class Largest(torch.nn.Module):
    """A decoder of several taps."""

    def forward(self, maps):
        return torch.maximum(*maps)


@torch.no_grad()
@pytest.mark.parametrize("name", ["transformers DINOv3", "torchvision"])
def test_other_hosts_compile(name):
    heads = {1: torch.nn.Linear(32, 5)}
    plan = Schedule((Exit(1, policies.ConfidenceAbove(0.3)),))
    model = tet.wrap(FOREIGN[name].make(), plan, head=torch.nn.Linear(32, 5), exit_heads=heads).eval()
    images = models.images(2, SIZE)
    wanted = model(images)
    found = torch.compile(model, dynamic=True, backend="eager")(images)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-5, atol=1e-5)
    static = tet.StaticModel(model, capacities=1.0)
    one = torch.compile(static, fullgraph=True, backend="eager")(images)
    torch.testing.assert_close(one.logits, wanted.logits, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_the_default_compiler_makes_the_same_of_a_packed_pass():
    plan = schedule.dtop(after=(1,), threshold=0.5, per_class=2)
    model = models.wrapped(models.timm_vit, plan, after=(1,), depth=2)
    compiled = torch.compile(model, dynamic=True)
    for seed in range(2):
        images = models.images(3, seed=seed)
        torch.testing.assert_close(compiled(images).logits, model(images).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_attention_that_is_switched_later_is_refused_in_programs_too():
    plan = schedule.paumer(keep={1: 0.5})
    model, images = models.wrapped(models.timm_vit, plan, after=(1,), depth=2), models.images(2)
    packed = torch.compile(model, dynamic=True, backend="eager")
    static = torch.compile(tet.StaticModel(model, capacities=0.5), fullgraph=True, backend="eager")
    for run in (packed, static):
        run(images)
    model.model.blocks[1].attn.fused_attn = False
    wanted = r"`model.blocks\[1\]` must call PyTorch.* own .*got no call"
    with pytest.raises(TokenExitError, match=wanted):
        packed(images)
    with pytest.raises(Unsupported, match=wanted):
        static(images)


@torch.no_grad()
def test_a_drawn_rule_of_the_benchmarks_is_part_of_the_program():
    images = models.images(2, size=(64, 64))
    vit = models.import_timm().create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=0)
    of = contenders.network(vit, images, classes=5)
    one = contenders.setting(0.5, patches=of.patches, batch=2, spread=0.3, device=images.device)
    static = tet.StaticModel(contenders.following(of.model, one.schedule(of)), capacities=one.capacities(of))
    wanted, found = static(images), torch.compile(static, fullgraph=True, dynamic=False, backend="eager")(images)
    assert torch.equal(found.logits, wanted.logits)
    assert torch.equal(found.exit_depth, wanted.exit_depth)


@torch.no_grad()
def test_a_static_pass_is_not_compiled_by_a_compiler_that_gives_up_in_the_midst(monkeypatch):
    monkeypatch.setattr("tokenexit_torch.exits.static.NEW", False)  # as before PyTorch 2.11
    static = tet.StaticModel(models.wrapped(models.timm_vit, SOME["cells"], **SMALL), capacities=0.7)
    with pytest.raises(Unsupported, match="_require_compiler"):
        torch.compile(static, fullgraph=True, backend="eager")(models.images(1))
    static(models.images(1))
