"""Sliding windows: how they share in a pixel, and that each is an image like any other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import tokenexit_torch as tet
from tests.core import strategies
from tests.torch import models
from tokenexit import TokenExitError, schedule

PLAN = schedule.dtop(after=(2, 4), threshold=0.5, per_class=2)


class Saying:
    """Not a model: of each patch it says its mean colour, plus `shift` times what is in the first pixel of the image."""

    def __init__(self, *, patch=1, shift=0.0):
        self.patch, self.shift, self.seen = patch, shift, []

    def __call__(self, images, *, schedule):
        self.seen.append(len(images))
        logits = functional.avg_pool2d(images, self.patch) + self.shift * images[:, :1, :1, :1]
        count, (height, width) = len(images), logits.shape[2:]
        depth = torch.ones(count, height, width, dtype=torch.int64)
        return tet.Output(logits, depth, torch.full((count, 2), height * width), (1,), "running")


def coordinates(height, width):
    """An image whose colours are its own pixels' places."""
    return torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).float()[None]


def share(windows, down, across):
    """How much a window counts at one of its pixels, in the words of `Windows`."""
    if windows.blend == "uniform":
        return 1.0
    found = 1.0
    for place, side in zip((down, across), windows.size, strict=True):
        found *= 1 - abs(place + 0.5 - side / 2) / (side / 2)
    return found


def slow(model, image, windows):
    """Pixel by pixel: every window that holds it, sought among all places where one could lie."""
    channels, height, width = image.shape
    (high, wide), (down, across) = windows.size, windows.stride
    padded = torch.zeros(channels, max(height, high), max(width, wide))
    padded[:, :height, :width] = image
    tops, lefts = (
        sorted({min(start, max(side - window, 0)) for start in range(0, side, step)})
        for side, window, step in ((height, high, down), (width, wide, across))
    )
    total, shares = torch.zeros(channels, height, width), torch.zeros(height, width)
    for top in tops:
        for left in lefts:
            out = model(padded[None, :, top : top + high, left : left + wide], schedule=None)
            scores = functional.interpolate(out.logits, windows.size, mode="bilinear")[0]
            for row in range(top, min(top + high, height)):
                for column in range(left, min(left + wide, width)):
                    own = share(windows, row - top, column - left)
                    total[:, row, column] += own * scores[:, row - top, column - left]
                    shares[row, column] += own
    return total / shares


@given(strategies.windows(), st.integers(1, 60), st.integers(1, 60), st.integers(0, 3))
def test_what_all_windows_agree_on_comes_out(windows, height, width, count):
    images = coordinates(height, width).repeat(count, 1, 1, 1) + 1000 * torch.arange(count)[:, None, None, None]
    out = tet.sliding(Saying(), images, windows)
    torch.testing.assert_close(out.logits, images, atol=1e-2, rtol=1e-5)
    assert out.windows.exit_depth.shape == (count * len(out.corners), *windows.size)
    assert out.windows.exits == (1,)


@given(strategies.windows(largest=8), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_where_windows_differ_each_pixel_has_its_mean(windows, height, width, seed):
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
    model = Saying(shift=3.0)
    out = tet.sliding(model, images, windows)
    for image, logits in zip(images, out.logits, strict=True):
        torch.testing.assert_close(logits, slow(model, image, windows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("blend", ["uniform", "linear"])
def test_scores_of_patches_are_upsampled_within_their_window(blend):
    windows = tet.Windows((8, 12), (5, 7), blend=blend)
    images, model = models.images(2, (19, 30)), Saying(patch=4, shift=1.0)
    out = tet.sliding(model, images, windows)
    for image, logits in zip(images, out.logits, strict=True):
        torch.testing.assert_close(logits, slow(model, image, windows), atol=1e-5, rtol=1e-5)


@given(st.integers(1, 20), st.integers(1, 3))
def test_windows_run_together_whichever_image_they_are_of(batch, count):
    model = Saying()
    out = tet.sliding(model, models.images(count, (20, 20)), tet.Windows((8, 8), (8, 8), batch=batch))
    full, rest = divmod(count * len(out.corners), batch)
    assert model.seen == [batch] * full + [rest] * (rest > 0)


def test_exits_are_those_of_all_batches():
    saying, ran = Saying(), iter([(2,), (1, 2), ()])
    out = tet.sliding(
        lambda images, schedule: saying(images, schedule=schedule)._replace(exits=next(ran)),
        models.images(3, (8, 8)),
        tet.Windows((8, 8), (8, 8), batch=1),
    )
    assert out.windows.exits == (1, 2)


@torch.inference_mode()
def test_the_size_of_a_batch_does_not_change_the_result():
    model, images = models.wrapped(models.timm_vit, PLAN), models.images(2, (50, 70))
    found = [tet.sliding(model, images, tet.Windows((32, 48), (18, 22), batch=batch)) for batch in (1, 5, 99)]
    for one in found[1:]:
        torch.testing.assert_close(one.logits, found[0].logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(one.windows.exit_depth, found[0].windows.exit_depth)
        assert torch.equal(one.windows.tokens_per_block, found[0].windows.tokens_per_block)
        assert one.windows.exits == found[0].windows.exits


@torch.inference_mode()
def test_a_static_model_counts_what_had_no_room_in_each_window():
    model = models.wrapped(models.timm_vit, PLAN)
    static, images = tet.StaticModel(model, capacities={2: 0.2, 3: 0.2, 4: 0.1}), models.images(2, (32, 70))
    windows = tet.Windows((32, 48), (32, 22), batch=3)
    out = tet.sliding(static, images, windows)
    crops = torch.stack([image[:, :32, left : left + 48] for image in images for _, left in out.corners])
    alone = [static(crop[None]) for crop in crops]
    assert torch.equal(out.windows.overflow, torch.cat([one.overflow for one in alone]))
    assert torch.equal(out.windows.capacity_per_block, torch.cat([one.capacity_per_block for one in alone]))
    assert out.windows.overflow.any()


@torch.inference_mode()
@pytest.mark.parametrize("blend", ["uniform", "linear"])
@pytest.mark.parametrize("plan", [PLAN, schedule.dense()], ids=["exits", "dense"])
def test_one_window_over_the_whole_image_is_the_plain_call_upsampled(plan, blend):
    model, images = models.wrapped(models.timm_vit, PLAN), models.images(3)
    plain = model(images, schedule=plan)
    out = tet.sliding(model, images, tet.Windows((32, 48), (32, 48), blend=blend), schedule=plan)
    torch.testing.assert_close(out.logits, plain.upsample((32, 48)), atol=1e-5, rtol=1e-5)
    assert out.corners == ((0, 0),)
    assert torch.equal(out.windows.exit_depth, plain.exit_depth)
    assert torch.equal(model.multiply_adds(out.windows), model.multiply_adds(plain))
    assert (out.windows.exits, out.windows.head_on) == (plain.exits, plain.head_on)


@torch.inference_mode()
def test_every_window_is_an_image_like_any_other_under_the_plan_of_the_call():
    model, images = models.wrapped(models.timm_vit, schedule.dense()), models.images(2, (40, 60))
    out = tet.sliding(model, images, tet.Windows((32, 48), (8, 12), batch=3), schedule=PLAN)
    assert out.corners == ((0, 0), (0, 12), (8, 0), (8, 12))
    crops = [image[:, top : top + 32, left : left + 48] for image in images for top, left in out.corners]
    plain = model(torch.stack(crops), schedule=PLAN)
    torch.testing.assert_close(out.windows.logits, plain.logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(out.windows.exit_depth, plain.exit_depth)
    assert torch.equal(model.multiply_adds(out.windows), model.multiply_adds(plain))


@torch.inference_mode()
def test_an_image_smaller_than_a_window_is_padded_with_zeros_and_cut_back():
    model, images = models.wrapped(models.timm_vit, PLAN), models.images(2, (20, 31))
    out = tet.sliding(model, images, tet.Windows((32, 48), (16, 16)))
    padded = functional.pad(images, (0, 17, 0, 12))
    torch.testing.assert_close(out.logits, model(padded).upsample((32, 48))[..., :20, :31], atol=1e-5, rtol=1e-5)


def test_no_images():
    out = tet.sliding(models.wrapped(models.timm_vit, PLAN), models.images(0, (60, 60)), tet.Windows((32, 48), (9, 9)))
    assert out.logits.shape == (0, models.CLASSES, 60, 60)
    assert out.windows.tokens_per_block.shape == (0, 6)


@pytest.mark.parametrize(
    ("given", "found"), [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64,) * 2]
)
def test_scores_are_added_up_in_float32_at_least(given, found):
    out = tet.sliding(Saying(), coordinates(9, 9).to(given), tet.Windows((5, 5), (1, 1)))
    assert out.logits.dtype == found
    torch.testing.assert_close(out.logits, coordinates(9, 9).to(found))


def test_gradients_reach_the_pixels_of_every_window():
    images = models.images(1, (9, 14)).requires_grad_()
    out = tet.sliding(Saying(), images, tet.Windows((4, 4), (3, 3), blend="linear"))
    out.logits.sum().backward()
    torch.testing.assert_close(images.grad, torch.ones_like(images))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tet.sliding(Saying(), torch.zeros(1, 3, 9, 9), (8, 8)), r"`windows` must be a Windows, got \(8, 8\)"),
        (lambda: tet.sliding(Saying(), torch.zeros(3, 9, 9), WINDOWS), r"`images` must be .*, got shape \(3, 9, 9\)"),
        (lambda: tet.sliding(Saying(), torch.zeros(1, 3, 0, 9), WINDOWS), "`images` must be .* with pixels, got"),
        (lambda: tet.sliding(Saying(), [1], WINDOWS), "`images` must be a tensor .*, got list"),
        (
            lambda: tet.sliding(lambda images, schedule: images, torch.zeros(1, 3, 9, 9), WINDOWS),
            "`model` must return an Output, as one from `wrap` does, got Tensor",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(TokenExitError, match=message):
        make()


WINDOWS = tet.Windows((8, 8), (8, 8))


def test_a_model_that_does_not_take_the_windows_says_so_and_of_what_size_they_were():
    model = models.wrapped(models.timm_vit, PLAN)
    with pytest.raises(TokenExitError, match="`images` must have a size that the model takes") as caught:
        tet.sliding(model, models.images(1, (60, 60)), tet.Windows((40, 40), (20, 20)))
    assert caught.value.__notes__ == ["The images were windows of 40 x 40 pixels."]


def test_windows_of_a_model_with_another_output_are_refused():
    gated = tet.wrap_gates(models.plain_host(), schedule.svit(after=(2, 4)), head=nn.Linear(32, 5))
    with pytest.raises(TokenExitError, match="`model` must return an Output, .* got GatedOutput"):
        tet.sliding(gated, models.images(1), WINDOWS)
