"""Swin on semantic tokens: the published sizes, any image, and padding that nobody sees."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tokenexit_torch as tet
from tests.torch import models
from tests.torch.semantic import PUBLISHED, SWINS
from tokenexit import TokenExitError, semantic


def tiny(plan=semantic.stvit_r(), window=(7, 7), **options) -> tet.models.Swin:
    torch.manual_seed(3)
    swin = tet.models.Swin(width=8, depths=(2, 2, 6, 2), heads=(1, 1, 2, 2), window=window, plan=plan, **options)
    with torch.no_grad():
        for name, parameter in swin.named_parameters():
            if "scale" in name:
                parameter.fill_(0.5)
            elif parameter.ndim == 2:
                parameter.mul_(6)
    return swin.eval()


def of_norms(model: nn.Module, images: torch.Tensor) -> int:
    """Numbers that go through a norm, five operations each as their count has it."""
    seen = []
    hooks = [
        layer.register_forward_hook(lambda _layer, inputs, _output: seen.append(5 * inputs[0].numel()))
        for layer in model.modules()
        if isinstance(layer, nn.LayerNorm | nn.BatchNorm2d)
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return sum(seen)


@pytest.mark.parametrize("build", PUBLISHED, ids=lambda build: build.__name__)
def test_parameters_and_multiply_adds_are_the_published_ones(build):
    parameters, multiply_adds = PUBLISHED[build]
    with torch.device("meta"):
        model, images = tet.models.SwinClassifier(build(), classes=1000).eval(), torch.empty(1, 3, 224, 224)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters * 1e6, rel=1e-4)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    found = counter.get_total_flops() / 2
    assert found == pytest.approx(multiply_adds * 1e9, rel=5e-3)
    # The published logs count norms as well: so it is the same to the last digit.
    assert round((found + of_norms(model, images)) / 1e9, 3) == multiply_adds


@pytest.mark.parametrize("plan", SWINS.values(), ids=SWINS)
@pytest.mark.parametrize("window", [(7, 7), (8, 8), (3, 5)], ids=str)
@pytest.mark.parametrize("size", [(112, 112), (96, 64), (90, 133), (17, 100), (4, 3)], ids=str)
def test_images_of_any_size_have_finite_maps_of_all_stages(plan, window, size):
    swin = tiny(None if plan is None else replace(plan, window=window), window)
    with torch.no_grad():
        maps = tet.models.SwinBackbone(swin)(models.images(2, size))
    side = [tuple(-(-one // 2**shrunk) for one in size) for shrunk in (2, 3, 4, 5)]
    assert [tuple(map.shape) for map in maps] == [(2, 8 * 2**i, *side[i]) for i in range(4)]
    assert all(map.isfinite().all() for map in maps)


@pytest.mark.parametrize("plan", SWINS.values(), ids=SWINS)
@pytest.mark.parametrize("size", [(112, 112), (96, 64), (90, 133)], ids=str)
def test_what_padding_holds_changes_nothing(plan, size):
    """Neither maps nor scores nor gradients, and be it no number."""
    swin, images = tiny(plan), models.images(2, size)
    valid = torch.ones(2, *size, dtype=torch.bool)
    valid[0, size[0] * 2 // 3 :] = False
    valid[0, :, size[1] // 2 :] = False
    classifier, backbone = tet.models.SwinClassifier(swin, classes=4).eval(), tet.models.SwinBackbone(swin).eval()
    wanted = classifier(images, valid=valid)
    with torch.no_grad():
        maps = backbone(images, valid=valid)
    wanted.sum().backward()
    gradients = {name: one.grad for name, one in classifier.named_parameters()}
    assert any(gradient.abs().max() > 0 for gradient in gradients.values() if gradient is not None)
    for content in (1e4, torch.nan, torch.inf):
        other = torch.where(valid[:, None], images, content)
        classifier.zero_grad()
        found = classifier(other, valid=valid)
        found.sum().backward()
        torch.testing.assert_close(found, wanted, atol=0, rtol=0)
        for name, one in classifier.named_parameters():
            torch.testing.assert_close(one.grad, gradients[name], atol=0, rtol=0)
        with torch.no_grad():
            for map, same in zip(backbone(other, valid=valid), maps, strict=True):
                torch.testing.assert_close(map, same, atol=0, rtol=0)


@pytest.mark.parametrize("side", [7, 8])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    "size",
    [(192, 192), (224, 224), (256, 256), (288, 288), (384, 384), (448, 448), (512, 512), (480, 352)],
    ids=str,
)
def test_usual_sizes_are_finite_and_see_no_padding(side, dense, size):
    plan = (semantic.stvit_r_dense if dense else semantic.stvit_r)((side, side))
    swin, images = tiny(plan, (side, side)), models.images(1, size)
    valid = torch.ones(1, *size, dtype=torch.bool)
    valid[:, :, 150:] = False
    with torch.no_grad():
        whole, marked = swin(images), swin(images, valid=valid)
        other = swin(torch.where(valid[:, None], images, torch.nan), valid=valid)
    assert all(stage.features.isfinite().all() for stage in (*whole, *marked))
    assert all(torch.equal(*(stage.features for stage in both)) for both in zip(marked, other, strict=True))


@pytest.mark.parametrize("plan", SWINS.values(), ids=SWINS)
def test_half_precision_is_near(plan):
    swin, images = tiny(plan), models.images(1, (90, 133))
    valid = torch.ones(1, 90, 133, dtype=torch.bool)
    valid[:, 60:] = False
    with torch.no_grad():
        wanted = swin(images, valid=valid)[-1]
        with torch.autocast("cpu", torch.bfloat16):
            mixed = swin(images, valid=valid)[-1].features
        half = swin.bfloat16()(images.bfloat16(), valid=valid)[-1].features
    for found in (mixed, half):
        gap = (found.float() - wanted.features)[wanted.valid]
        assert gap.norm() < 0.1 * wanted.features[wanted.valid].norm()


@pytest.mark.parametrize("plan", SWINS.values(), ids=SWINS)
def test_marks_that_mark_all_change_nothing(plan):
    swin, images = tiny(plan), models.images(2, (90, 133))
    with torch.no_grad():
        wanted, found = swin(images), swin(images, valid=torch.ones(2, 90, 133, dtype=torch.bool))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.features, other.features, atol=1e-5, rtol=1e-5)


ONE_WINDOW = semantic.SemanticPlan((16, 16), (6, 6), (18, 18), edges="beyond")


@pytest.mark.parametrize("plan", [ONE_WINDOW, None], ids=["semantic tokens", "Swin"])
def test_an_image_is_the_same_alone_and_among_padding(plan):
    """Where one window holds all of either, so that no window lies elsewhere."""
    swin, image = tiny(plan, (16, 16)), models.images(1, (60, 42))
    padded = functional.pad(image, (0, 22, 0, 4), value=3.0)
    valid = functional.pad(torch.ones(1, 60, 42, dtype=torch.bool), (0, 22, 0, 4))
    with torch.no_grad():
        alone, among = swin(image), swin(padded, valid=valid)
    for one, other in zip(alone, among, strict=True):
        _, height, width, _ = one.features.shape
        torch.testing.assert_close(other.features[:, :height, :width], one.features, atol=1e-5, rtol=1e-5)
        assert other.valid is not None
        assert other.valid[:, :height, :width].all()
        assert other.valid.sum() == height * width


def slow_attention(block, map, valid, shift):
    """Place by place: whom it attends to is found by where both lie after the shift."""
    images, height, width, _ = map.shape
    high, wide = block.window
    down, across = -(-height // high) * high, -(-width // wide) * wide
    shift = (shift[0] if height > high else 0, shift[1] if width > wide else 0)
    normed = block.norm1(map)
    q, k, v = block.qkv(normed).reshape(images, height, width, 3, block.heads, -1).unbind(3)
    result = torch.zeros_like(map)

    def where(row, column):
        """The window, the place in it, and the side of the seams."""
        row, column = (row - shift[0]) % down, (column - shift[1]) % across
        return (
            (row // high, column // wide),
            (row % high, column % wide),
            (row >= down - shift[0], column >= across - shift[1]),
        )

    for image in range(images):
        for row in range(height):
            for column in range(width):
                window, at, side = where(row, column)
                keys, values, biases = [], [], []
                for r in range(height):
                    for c in range(width):
                        other, there, beside = where(r, c)
                        if (other, beside) == (window, side) and (valid is None or valid[image, r, c]):
                            distance = (at[0] - there[0] + high - 1) * (2 * wide - 1) + at[1] - there[1] + wide - 1
                            keys.append(k[image, r, c])
                            values.append(v[image, r, c])
                            biases.append(block.bias[distance])
                if not keys:
                    continue
                keys, values, biases = torch.stack(keys), torch.stack(values), torch.stack(biases)
                logits = (q[image, row, column] * keys).sum(-1) / keys.shape[-1] ** 0.5 + biases
                mixed = (logits.softmax(0)[..., None] * values).sum(0).flatten()
                result[image, row, column] = block.proj(mixed)
    tokens = map + result
    return tokens + block.mlp(block.norm2(tokens))


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (5, 7), (2, 7), (2, 2)], ids=str)
@pytest.mark.parametrize("shift", [(0, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("marked", [False, True])
def test_a_block_is_that_of_a_walk(size, shift, marked):
    """Windows of 2 x 3, on maps which they divide on both sides, on one, on none."""
    torch.manual_seed(0)
    block = tet.models.SwinBlock(8, 2, window=(2, 3), shift=shift)
    with torch.no_grad():
        block.bias.mul_(50)
        block.qkv.weight.mul_(20)
    map, valid = torch.randn(2, *size, 8), torch.rand(2, *size) < 0.7 if marked else None
    with torch.no_grad():
        found, wanted = block(map, valid=valid), slow_attention(block, map, valid, shift)
    seen = slice(None) if valid is None else valid
    torch.testing.assert_close(found[seen], wanted[seen], atol=1e-5, rtol=1e-5)
    assert found.isfinite().all()


def test_a_batch_is_its_images():
    swin, images = tiny(), models.images(3, (96, 72))
    with torch.no_grad():
        together, alone = swin(images)[-1].features, torch.cat([swin(image[None])[-1].features for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_layers_are_dropped_in_training_alone():
    swin, images = tiny(drop_path=0.5), models.images(4, (64, 64))
    rates = [
        layer.drop.rate for layer in swin.modules() if isinstance(layer, tet.models.SwinBlock | tet.semantic.CrossBlock)
    ]
    assert rates == pytest.approx([0.5 * number / 11 for number in range(12)])
    with torch.no_grad():
        assert torch.equal(swin(images)[-1].features, swin(images)[-1].features)
        swin.train()
        assert not torch.equal(swin(images)[-1].features, swin(images)[-1].features)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_named():
    pair = "two whole numbers from 1 up, rows and columns"
    swin = tet.models.Swin(width=8, depths=(1, 1, 6, 1), heads=(1, 1, 1, 1), window=(3, 3))
    images, marks = torch.zeros(2, 3, 33, 40), torch.ones(2, 40, 33, dtype=torch.bool)
    for call, message in (
        (lambda: tet.models.Swin(depths=(2, 2, 8, 2)), "`depths` must have a multiple of 6 blocks in the third stage"),
        (lambda: tet.models.Swin(drop_path=1.0), r"`drop_path` must be a share in \[0, 1\), got 1.0"),
        (lambda: tet.models.SwinBlock(8, 3), "`heads` must divide the width, 8, got 3"),
        (lambda: tet.models.SwinBlock(8, 2, window=7), f"`window` must be {pair}, got 7"),
        (lambda: tet.models.Swin(window=7, plan=None), f"`window` must be {pair}, got 7"),
        (lambda: tet.models.Swin(window=(0, 7)), rf"`window` must be {pair}, got \(0, 7\)"),
        (lambda: swin(images, valid=marks), r"`valid` must have shape \(2, 33, 40\), got shape \(2, 40, 33\)"),
        (lambda: swin(images, valid=images[:, 0]), "`valid` must be boolean, got dtype torch.float32"),
    ):
        with pytest.raises(TokenExitError, match=message):
            call()
