"""Inside of what people put around a model: compilers, autocast, memory formats, inference mode, threads."""

import importlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional

import tokenexit_torch as tet
from tests.torch import models
from tokenexit import TokenExitError, schedule
from tokenexit_torch.hosts.registry import AROUND

PLAN = schedule.dtop(after=(2, 4), threshold=0.5, per_class=2)
MAKES = {"timm": models.timm_vit, "plain": models.plain_host}
each = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())

WRAPS = (
    lambda model: tet.wrap(model, PLAN, num_classes=5),
    lambda model: tet.wrap_gates(model, schedule.svit(after=(2, 4))),
    lambda model: tet.wrap_semantic(model, after=1, until=None, heads=3),
)


def refused(model, message):
    for wrap in WRAPS:
        with pytest.raises(TokenExitError, match=f"`model` must have nothing around it or its parts, got {message}"):
            wrap(model)


def compiled_block():
    vit = models.timm_vit()
    vit.blocks[3] = torch.compile(vit.blocks[3], backend="eager")
    return vit


def compiled_in_place(part):
    def make():
        vit = models.timm_vit()
        vit.get_submodule(part).compile(backend="eager")
        return vit

    return make


def host_of_compiled_blocks():
    host = models.plain_host()
    host.blocks = [torch.compile(block, backend="eager") for block in host.blocks]
    return host


ADVICE = "its parts are called one by one: wrap it first, then compile what `wrap` returns"
OPTIMIZED = "torch._dynamo.eval_frame.OptimizedModule"


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: torch.compile(models.timm_vit(), backend="eager"), f"{OPTIMIZED}: "),
        (compiled_block, f"{OPTIMIZED} at `blocks.3`: "),
        (compiled_in_place(""), "timm.models.vision_transformer.VisionTransformer, compiled: "),
        (compiled_in_place("blocks.1"), "timm.models.vision_transformer.Block, compiled at `blocks.1`: "),
        (lambda: tet.hosts.TimmViT(compiled_in_place("blocks.1")()), "timm.*Block, compiled at `blocks.1`: "),
        (host_of_compiled_blocks, rf"{OPTIMIZED} at `blocks\[0\]`: "),
    ],
)
def test_what_is_compiled_already_is_refused_with_advice(make, got):
    refused(make(), f"{got}{ADVICE}")


@pytest.mark.parametrize("name", [name for name in AROUND if name != OPTIMIZED])
def test_what_goes_around_models_is_refused_by_name_and_with_the_reason(name):
    module, _, kind = name.rpartition(".")
    kind = getattr(importlib.import_module(module), kind)
    around = kind.__new__(kind)  # one of them can be made in a group of processes alone
    nn.Module.__init__(around)
    around.module = models.timm_vit()
    refused(around, f"{name}: {AROUND[name]}")


@torch.no_grad()
def test_a_wrapped_model_refuses_to_be_copied_by_data_parallel():
    for wrapped in [wrap(models.timm_vit()) for wrap in WRAPS]:
        with pytest.raises(TokenExitError, match="`model` must not be in nn.DataParallel: .* got a copy of it"):
            wrapped._replicate_for_data_parallel()  # what nn.DataParallel calls on several devices
        assert nn.DataParallel(wrapped)(models.images(1)) is not None  # with one or none it calls the model itself


@torch.no_grad()
@each
def test_autocast_to_bfloat16(make):
    model, images = models.wrapped(make(), PLAN), models.images(3)
    with torch.autocast("cpu", torch.bfloat16):
        dense, out = model(images, schedule=schedule.dense()), model(images)
    exact = model(images, schedule=schedule.dense())
    gap = (dense.logits.float() - exact.logits).abs().mean() / exact.logits.abs().mean()
    assert 0 < gap < 0.05
    assert out.logits.dtype == torch.bfloat16
    assert out.exit_depth.unique().tolist() == [2, 4, 6]
    for block in range(1, 6):  # counts are of tokens that run, whatever they are computed in
        assert torch.equal(out.tokens_per_block[:, block] > 0, (out.exit_depth > block).any(dim=(1, 2)))
    alone = [model(image[None]).exit_depth for image in images]
    close = (out.exit_depth == torch.cat(alone)).float().mean()
    assert close > 0.8


@torch.no_grad()
@each
def test_channels_last_images_and_weights(make):
    host = make()
    model, images = models.wrapped(host, PLAN), models.images(3)
    wanted = model(images)
    last = images.to(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    for _ in range(2):
        out = model(last)
        torch.testing.assert_close(out.logits, wanted.logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(out.exit_depth, wanted.exit_depth)
        model.to(memory_format=torch.channels_last)
    again = models.wrapped(host, PLAN)  # wrapping what is in that format
    torch.testing.assert_close(again(last).logits, wanted.logits, atol=1e-4, rtol=1e-4)


@each
def test_inference_mode(make):
    images = models.images(3)
    with torch.inference_mode():
        model = models.wrapped(make(), PLAN)
        out = model(images)
        wide = tet.sliding(model, models.images(1, (40, 60)), tet.Windows((32, 48), (8, 8)))
    assert out.logits.is_inference()
    assert wide.logits.is_inference()
    built_outside = models.wrapped(make(), PLAN)
    with torch.no_grad():
        wanted = built_outside(images)
    with torch.inference_mode():
        torch.testing.assert_close(built_outside(images).logits, wanted.logits)
    torch.testing.assert_close(out.logits.clone(), wanted.logits)
    assert built_outside(images).logits.requires_grad  # and it can still be trained


def heads():
    torch.manual_seed(3)
    return {"head": nn.Linear(48, 5), "exit_heads": {2: nn.Linear(48, 5), 4: nn.Linear(48, 5)}}


def test_two_threads_wrap_and_run_models_of_their_own():
    plans = [PLAN, schedule.neighbours(radius={2: 1, 4: 0}, threshold=0.4)]
    hosts = [models.timm_vit(), models.timm_vit(heads=12, prefix=6)]
    given = [heads(), heads()]
    images = models.images(4)

    def work(number, ready=None):
        found = []
        for _ in range(5):
            if ready is not None:
                ready.wait(60)
            model = tet.wrap(hosts[number], plans[number], **given[number]).eval()
            with torch.inference_mode():
                found.append(model(images))
        return found

    alone = [work(number) for number in range(2)]
    ready = threading.Barrier(2)
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(work, range(2), [ready] * 2))
    for mine, wanted in zip(together, alone, strict=True):
        for one, other in zip(mine, wanted, strict=True):
            torch.testing.assert_close(one.logits, other.logits, atol=1e-5, rtol=1e-5)
            assert torch.equal(one.exit_depth, other.exit_depth)
            assert torch.equal(one.tokens_per_block, other.tokens_per_block)


def test_attention_is_taken_over_in_one_thread_alone():
    rows = [torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    plain = functional.scaled_dot_product_attention(*rows)
    inside, done = threading.Event(), threading.Event()

    def hold():
        with tet.attention.attending_per_image([2, 3]) as attention:
            inside.set()
            assert done.wait(60)
            return functional.scaled_dot_product_attention(*rows), attention.calls

    with ThreadPoolExecutor(1) as threads:
        held = threads.submit(hold)
        try:
            assert inside.wait(60)
            here = functional.scaled_dot_product_attention(*rows)
        finally:
            done.set()
        there, calls = held.result()
    assert torch.equal(here, plain)
    assert calls == 1
    parts = [
        functional.scaled_dot_product_attention(*(row[:, :, cut] for row in rows)) for cut in (slice(2), slice(2, 5))
    ]
    torch.testing.assert_close(there, torch.cat(parts, dim=2))
    assert not torch.allclose(there, plain)
