import pytest
import torch

import tokenexit_torch as tet
from tests.torch import models
from tokenexit import TokenExitError, heads, schedule


def fitted(images, **options):
    model = models.wrapped(models.timm_vit(), schedule.dense())
    return model, tet.fit_exits(model, images, progress=iter, **{"steps": 150, "patches_per_step": 96} | options)


def test_heads_learn_what_the_final_head_says_and_nothing_else_changes():
    images = models.images(12)
    model = models.wrapped(models.timm_vit(), schedule.dense())
    wanted = model.every_exit(images)[6].argmax(dim=1)
    frozen = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("exit_heads")}
    before = {
        after: (logits.argmax(dim=1) == wanted).float().mean() for after, logits in model.every_exit(images).items()
    }
    report = tet.fit_exits(model, images, steps=300, patches_per_step=96, progress=iter)
    exits = model.every_exit(images)
    for after in (2, 3, 4):
        agreement = (exits[after].argmax(dim=1) == wanted).float().mean().item()
        assert agreement > before[after] + 0.2
        assert report.agreement[after] == pytest.approx(agreement, abs=1e-6)
    assert report.patches == 12 * 24
    assert all(torch.equal(model.state_dict()[name], value) for name, value in frozen.items())
    assert not model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_batches_give_what_one_tensor_gives_and_the_same_twice():
    images = models.images(10)
    one, _ = fitted(images)
    same, _ = fitted(part for part in (images[:8], images[8:]))
    for a, b in zip(one.exit_heads.parameters(), same.exit_heads.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_half_precision_a_bad_image_and_inference_mode_are_no_obstacle():
    images = models.images(6)
    images[2] = float("nan")
    for dtype in (torch.float16, torch.bfloat16):
        with torch.inference_mode():
            model = models.wrapped(models.timm_vit(), schedule.dense()).to(dtype)
            report = tet.fit_exits(model, images.to(dtype), steps=40, patches_per_step=64, progress=iter)
        assert report.patches == 5 * 24
        assert all(p.dtype == dtype and p.isfinite().all() for p in model.exit_heads.parameters())
        assert min(report.agreement.values()) > 0.5


def test_an_interrupt_leaves_the_heads_as_they_were():
    model = models.wrapped(models.timm_vit(), schedule.dense())
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def interrupted(loop):
        for turn, item in enumerate(loop):
            if turn == 3:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        tet.fit_exits(model, models.images(), steps=9, progress=interrupted)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batch_norm_heads_are_fitted_in_training_mode_and_put_back():
    model = tet.wrap(
        models.timm_vit(), schedule.dense(after=(2,)), num_classes=5, exit_heads=heads.FCN(hidden=8)
    ).eval()
    before = model.exit_heads["2"][1].running_mean.clone()
    tet.fit_exits(model, models.images(), steps=5, progress=iter)
    assert not torch.equal(model.exit_heads["2"][1].running_mean, before)
    assert not any(part.training for part in model.modules())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: tet.fit_exits(m, []), "`images` must hold at least one image, got none"),
        (lambda m: tet.fit_exits(m, models.images() * float("nan")), "`images` must give finite tokens, got NaN"),
        (
            lambda m: tet.fit_exits(m, models.images(), patches_per_step=1),
            "`patches_per_step` must be at least 2, got 1",
        ),
        (lambda m: tet.fit_exits(m, models.images(), steps=0), "`steps` must be at least 1, got 0"),
        (
            lambda m: tet.fit_exits(m.model, models.images()),
            "`model` must be wrapped by `wrap` or `wrap_decoder`, got VisionTransformer",
        ),
        (
            lambda m: tet.fit_exits(tet.wrap(models.timm_vit(), schedule.dense(), num_classes=3), models.images()),
            "`model` must have exit heads, got none",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(TokenExitError, match=message):
        call(models.wrapped(models.timm_vit(), schedule.dense()))
