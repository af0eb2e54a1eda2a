"""Where patches lie on an image whose sides are no whole patches: an edge is found where it is, by all ways to pixels."""

import functools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import tokenexit_torch as tet
from tests.torch import decoders, models
from tests.torch.hosts import FOREIGN
from tokenexit import TokenExitError, gates, policies, schedule
from tokenexit.area import Area
from tokenexit.carries import Feature, Preserved
from tokenexit.schedule import Exit, Schedule
from tokenexit_torch.calibration.adapted import _adapted
from tokenexit_torch.hosts.protocol import embedded_by
from tokenexit_torch.hosts.registry import host_of
from tokenexit_torch.training._teacher import Teacher, label_share

DENSE = schedule.dense(after=(1,))
GATED = Schedule((Exit(1, policies.Budget(0.5, by="gate")),), Preserved())


class Idle(nn.Module):
    """A block that attends, and changes nothing."""

    def forward(self, tokens):
        heads = tokens[:, None]
        return tokens + 0 * functional.scaled_dot_product_attention(heads, heads, heads)[:, 0]


class Means(nn.Module):
    """A network whose tokens are the means of their patches."""

    def __init__(self, patch):
        super().__init__()
        self.patches = nn.Conv2d(3, 4, patch, stride=patch, bias=False)
        nn.init.constant_(self.patches.weight, 1 / self.patches.weight[0].numel())
        self.blocks = nn.ModuleList([Idle(), Idle(), Idle()])


class Host:
    """Cuts off what is beyond the last whole patch, or pads; `says` whether it says so."""

    def __init__(self, patch, way, *, says=True):
        self.module = Means(patch)
        self.blocks, self.width, self.patch, self.way, self.says = self.module.blocks, 4, patch, way, says
        self.image_shape = (3, 3 * patch[0], 3 * patch[1])

    def embed(self, images):
        if self.way == "pads":
            below, beside = (-side % patch for side, patch in zip(images.shape[2:], self.patch, strict=True))
            images = functional.pad(images, (0, beside, 0, below))
        patches = self.module.patches(images)
        (rows, columns), (height, width) = patches.shape[2:], self.patch
        covers = (rows * height, columns * width) if self.says else None
        return tet.Embedded(patches.flatten(2).mT, 0, (rows, columns), covers=covers)

    def run(self, index, tokens, _positions):
        return self.blocks[index](tokens)

    def finish(self, tokens):
        return tokens

    def dense(self, images):
        return self.embed(images).tokens


class Bright(nn.Module):
    """Tells bright tokens from dark ones, as surely for all."""

    def forward(self, tokens):
        bright = tokens[..., 0].sign()
        return torch.stack([-bright, bright], dim=-1)


@functools.cache
def wrapped(patch, way, plan=DENSE):
    return tet.wrap(Host(patch, way), plan, head=Bright(), exit_heads={1: Bright()}).eval()


def half_bright(size, edge, axis, count=1):
    image = -torch.ones(count, 3, *size)
    image.narrow(axis, edge, image.shape[axis] - edge).fill_(1)
    return image


def packed(model, images):
    return model(images).upsample(images.shape[2:])


def static(model, images):
    return tet.StaticModel(model, capacities=1.0)(images).upsample(images.shape[2:])


def mixed(model, images):
    other = torch.zeros(3, *(2 * patch for patch in model.host.patch))
    return model.mixed([images[0], other])[0].upsample(images.shape[2:])


def replayed(model, images):
    return tet.trace(model, images, progress=iter).replay(DENSE).upsample(images.shape[2:])


def gated(model, images):
    bare = tet.wrap_gates(model.host, GATED, head=Bright()).eval()
    return bare(images).upsample(images.shape[2:])


def in_windows(model, images):
    height, width = images.shape[2:]
    tall = torch.cat([images, images], dim=2)
    whole = tet.sliding(model, tall, tet.Windows((height, width), (height, width))).logits
    assert torch.equal(whole[:, :, :height], whole[:, :, height:])
    return whole[:, :, :height]


def larger(model, images):
    """Shown at three times the size, and looked at in the middle of each pixel."""
    return model(images).upsample((3 * images.shape[2], 3 * images.shape[3]))[..., 1::3, 1::3]


WAYS = (packed, static, mixed, replayed, gated, in_windows, larger)


@st.composite
def edges(draw):
    patch = draw(st.tuples(st.integers(2, 6), st.integers(2, 6)))
    cells = draw(st.tuples(st.integers(2, 5), st.integers(2, 5)))
    rest = tuple(draw(st.integers(0, side - 1)) for side in patch)
    axis = draw(st.integers(0, 1))
    size = tuple(many * side + more for many, side, more in zip(cells, patch, rest, strict=True))
    return patch, size, axis + 2, patch[axis] * draw(st.integers(1, cells[axis] - 1))


@pytest.mark.parametrize("way", ["cuts", "pads"])
@settings(max_examples=5)
@given(edges())
@example(((8, 8), (32, 49), 3, 40))
@example(((4, 7), (33, 34), 3, 14))
@torch.no_grad()
def test_an_edge_between_patches_is_found_where_it_is(way, drawn):
    patch, size, axis, edge = drawn
    model, image = wrapped(patch, way), half_bright(size, edge, axis)
    wanted = image[:, 0] > 0
    for ask in WAYS:
        assert torch.equal(ask(model, image).argmax(dim=1) > 0, wanted), ask.__name__
    run = _adapted(model, None, "as drawn", []).run
    assert torch.equal(run(image, DENSE, size=size).label_maps > 0, wanted)
    grid = tuple(model(image).exit_depth.shape[1:])
    by_patch = run(image, DENSE, size=grid)
    assert torch.equal(by_patch.label_maps.long(), by_patch.scores.argmax(dim=1))
    # Every patch is of one class, and all of its pixels have a label.
    target = Teacher(model, model.patches_and_output, label_weight=1.0, ignore=255).rows((image, wanted.long()))[0]
    bright = model(image).logits.argmax(dim=1).flatten()
    assert torch.equal(target["target"], functional.one_hot(bright, 2).float())


def build(patch, way):
    return wrapped(patch, way)


@pytest.mark.parametrize("way", ["cuts", "pads"])
def test_a_predictor_finds_it_in_pictures_of_another_size(way):
    picture = np.zeros((50, 2 * 49, 3), np.uint8)
    picture[:, 80:] = 255
    known = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "outputs": ("label",)}
    for size, windows in (((25, 49), None), (None, tet.Windows((25, 49), (25, 49)))):
        predictor = tet.Predictor(functools.partial(build, (8, 8), way), **known, size=size, windows=windows)
        label = predictor({"image": [picture]})["label"][0]
        found = int(label[5].argmax())
        # In the second window the edge is within a patch, which is bright as a whole or not at all.
        assert found == 80 if windows is None else abs(found - 80) <= 8
    with pytest.raises(TokenExitError, match=re.escape("`image[0]` must have pixels, got shape (0, 8, 3)")):
        predictor({"image": [picture[:0, :8]]})


def interpolated(logits, size, area, place):
    """The scores of the pixel at a place, of an image shown at a size: from the patches around it, by hand."""
    found = logits
    for axis in (0, 1):
        patch = area.covered[axis] / logits.shape[2 + axis] * size[axis] / area.image[axis]
        at = min(max((place[axis] + 0.5) / patch - 0.5, 0), logits.shape[2 + axis] - 1)
        low = min(int(at), logits.shape[2 + axis] - 2)
        first, second = (found.select(2, low + step) for step in (0, 1))
        found = first * (1 - (at - low)) + second * (at - low)
    return found


@pytest.mark.parametrize("size", [(69, 49), (138, 98), (50, 61), (9, 7), (4, 5)])
@pytest.mark.parametrize("covered", [(56, 56), (70, 49), (69, 50), (28, 28)])
def test_upsampling_is_bilinear_between_the_middles_of_patches(size, covered):
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    area = Area(covered, (69, 49))
    out = tet.Output(logits, torch.zeros(2, 4, 5), torch.zeros(2, 1), (), "running", area)
    full = out.upsample(size)
    assert full.shape == (2, 3, *size)
    for place in ((0, 0), (size[0] - 1, size[1] - 1), (size[0] // 2, size[1] // 3), (size[0] - 1, 0)):
        torch.testing.assert_close(full[:, :, *place], interpolated(logits, size, area, place), rtol=1e-4, atol=1e-4)


def test_where_patches_cover_the_image_all_is_as_ever():
    model, images = wrapped((8, 8), "cuts"), models.images(2)
    out = model(images)
    wanted = functional.interpolate(out.logits, (32, 48), mode="bilinear", align_corners=False)
    assert out.area is None
    assert torch.equal(out.upsample((32, 48)), wanted)


@pytest.mark.parametrize("covered", [(6, 6), (10, 8)])
def test_pixels_that_no_patch_covers_do_not_count_in_labels(covered):
    label = torch.randint(-1, 3, (2, 9, 7), generator=torch.Generator().manual_seed(1))
    area, grid = Area(covered, (9, 7)), (2, 2)
    for shown in (label, label.repeat_interleave(2, 1).repeat_interleave(2, 2)):
        shares = label_share(shown, grid, area, classes=3, ignore=-1)
        for patch in range(4):
            row, column = divmod(patch, 2)
            high, wide = covered[0] // 2, covered[1] // 2
            inside = label[:, row * high : (row + 1) * high, column * wide : (column + 1) * wide].flatten(1)
            wanted = torch.stack([(inside == one).float().mean(dim=1) for one in range(3)], dim=1)
            torch.testing.assert_close(shares[:, patch], wanted)


@pytest.mark.parametrize("way", ["cuts", "pads"])
def test_losses_on_the_logits_of_patches_ask_for_whole_patches(way):
    model, images = wrapped((8, 8), way), torch.zeros(1, 3, 32, 49)
    gate = tet.wrap_gates(model.host, GATED, head=Bright())
    sampled, generator = tet.Sampled(gate, rates=gates.staged_rates((1,))), torch.Generator()
    covered = {"cuts": 48, "pads": 56}[way]
    message = f"got 32 x 49 pixels, of which patches cover 32 x {covered}"
    for ask in (tet.Staged(model), model.every_exit, lambda images: sampled(images, generator=generator)):
        with pytest.raises(TokenExitError, match=f"`images` must be covered exactly by their patches.*{message}"):
            ask(images)
        ask(images[..., :48])
    assert model(images).logits.shape[3] == covered // 8


@pytest.mark.parametrize("size", [(32, 49), (33, 48), (40, 56)])
def test_a_host_that_does_not_say_what_it_covers_is_refused(size):
    model = tet.wrap(Host((8, 8), "cuts", says=False), DENSE, head=Bright(), exit_heads={1: Bright()})
    assert model(torch.zeros(1, 3, 40, 64)).area is None
    model.host.module.patches.stride = (9, 9) if size == (40, 56) else (8, 8)
    message = (
        "`images` must have sides of patches that are of 8 x 8 pixels, as they are for `image_shape`, or `model.embed`"
    )
    with pytest.raises(TokenExitError, match=re.escape(message)):
        model(torch.zeros(1, 3, *size))
    with pytest.raises(TokenExitError, match=r"`images` must have sides of patches that are whole"):
        tet.wrap(_Odd((8, 8), "cuts", says=False), DENSE, num_classes=2)


class _Odd(Host):
    """Its own images are no whole patches."""

    def __init__(self, *given, **options):
        super().__init__(*given, **options)
        self.image_shape = (3, 25, 32)


SIZES = [(32, 32), (45, 39), (33, 47)]


@pytest.mark.parametrize("name", [name for name in FOREIGN if name.startswith("transformers")])
def test_transformers_cut_off_what_is_no_whole_patch(name):
    """What is beyond the area that a model says it covers changes nothing, and what is within does."""
    host = host_of(FOREIGN[name].make())
    for size in SIZES:
        images = models.images(1, size=size)
        embedded = embedded_by(host, images)
        height, width = embedded.covers
        assert (height, width) == (size[0] // 8 * 8, size[1] // 8 * 8)
        changed = images.clone()
        changed[..., height:, :] = 5
        changed[..., width:] = 5
        torch.testing.assert_close(host.embed(changed).tokens, embedded.tokens)
        for last in ((..., slice(height - 1, height), slice(None)), (..., slice(width - 1, width))):
            changed = images.clone()
            changed[last] = 5
            assert not torch.allclose(host.embed(changed).tokens, embedded.tokens, atol=1e-3)


def dark_or_bright(vit, *, patch_embed):
    """A ViT whose tokens are the means of their patches, by weights alone; blocks add nothing."""
    with torch.no_grad():
        for name, one in vit.named_parameters():
            if one.ndim == 3 or "ls1" in name or "ls2" in name or "lambda1" in name:
                one.zero_()
        patch_embed.weight.zero_()
        patch_embed.bias.zero_()
        patch_embed.weight[0] = 1 / patch_embed.weight[0].numel()
    return tet.wrap(vit.eval(), DENSE, head=Bright(), exit_heads={1: Bright()}).eval()


@torch.no_grad()
def test_timm_pads_and_transformers_cut():
    vit = models.timm_vit(depth=3, init_values=1.0, dynamic_img_size=True, dynamic_img_pad=True)
    padding = dark_or_bright(vit, patch_embed=vit.patch_embed.proj)
    dino = FOREIGN["transformers DINOv2"].make()
    cutting = dark_or_bright(dino, patch_embed=dino.embeddings.patch_embeddings.projection)
    fixed = models.timm_vit(depth=3, init_values=1.0, size=(35, 54))
    fixed = dark_or_bright(fixed, patch_embed=fixed.patch_embed.proj)
    for model, size in (
        (padding, (35, 49)),
        (padding, (32, 52)),
        (cutting, (35, 54)),
        (cutting, (32, 39)),
        (fixed, (35, 54)),
    ):
        for edge in (16, 24):
            image = half_bright(size, edge, 3)
            assert torch.equal(model(image).upsample(size).argmax(dim=1) > 0, image[:, 0] > 0)


def test_the_map_of_a_decoder_is_of_what_patches_cover():
    """What a function of the user's makes of it may be of anything."""
    model, images = models_with_decoder(), models.images(1, size=(45, 41))
    with torch.no_grad():
        output = model(images, schedule=schedule.dense())
    read = model.host.class_scores
    assert output.area == Area((40, 40), (45, 41))
    whole = functional.interpolate(read(output.decoded), (40, 40), mode="bilinear").argmax(dim=1)
    label = _adapted(model, None, "as drawn", []).run(images, schedule.dense(), size=(45, 41)).label_maps
    assert torch.equal(label[:, :40, :40].long(), whole)
    refused = "`images` must be covered exactly by their patches"
    with pytest.raises(TokenExitError, match=f"{refused} where `scores` is given.*45 x 41 pixels.* cover 40 x 40"):
        tet.drift_sample(model, output, scores=read)
    with pytest.raises(TokenExitError, match=f"{refused} where `targets` is given"):
        tet.fit_exits(model, images, targets=read, steps=1, progress=iter)
    with pytest.raises(TokenExitError, match=f"{refused} for losses"):
        model.every_exit(images)
    assert tet.fit_exits(model, images, steps=1, progress=iter).images == 1


def models_with_decoder():
    plan = replace(schedule.dense(after=(1,)), carry=Feature())
    return tet.wrap_decoder(decoders.DECODERS["DPT, segmentation"].make(), plan).eval()
