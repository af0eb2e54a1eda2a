"""Models of other libraries as hosts: what their own code computes, on the tokens that are left.

References call the blocks as their own library does, one image at a time, on a plain batch of the tokens that run.
"""

import functools
import importlib
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tokenexit_torch as tet
from tests.torch import models
from tests.torch.hosts import (
    AFTER,
    DEPTH,
    FOREIGN,
    GRID,
    HEADS,
    PATCH,
    PATCHES,
    SIZE,
    WIDTH,
    Told,
    depths_of,
    eva,
    exiting,
    one_of,
    told,
    torchvision_vit,
    transformers_model,
)
from tests.torch.oracle import run_one_by_one
from tokenexit import TokenExitError, schedule
from tokenexit.carries import Preserved
from tokenexit.schedule import Exit, Schedule
from tokenexit.semantic import SemanticPlan
from tokenexit_torch.hosts.protocol import full_name
from tokenexit_torch.hosts.registry import REFUSED

each = pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN.keys())


def gated(model, carry):
    return tet.wrap_gates(model, schedule.svit(after=AFTER, carry=carry))


def as_map(tokens):
    return tokens.mT.unflatten(2, GRID)


def outcome(foreign, wrapped, images, plan):
    """Each token as it was when it left, or finished; the blocks are called as their own library calls them."""
    alone = functools.partial(foreign.alone, wrapped.model)
    return run_one_by_one(wrapped, images, depths_of(plan, DEPTH), alone=alone)


def slow_gates(foreign, model, images, plan):
    """Those that wait keep their feature; if they are keys, the block runs on all, and they are put back."""
    found, prefix = [], foreign.prefix
    for number in range(len(images)):
        image = images[number : number + 1]
        every, run = foreign.embedded(model, image), torch.ones(PATCHES, dtype=torch.bool)
        for block in range(DEPTH):
            if block in AFTER:
                skip = plan.exits[AFTER.index(block)].policy.leave[number]
                run = run & ~skip if plan.carry.returning == "never" and block > AFTER[0] else ~skip
            rows = torch.cat([torch.ones(prefix, dtype=torch.bool), run])
            if not rows.any():
                continue
            if plan.carry.keys == "all":
                after = foreign.run(model, block, every, image, torch.arange(PATCHES))[:, rows]
            else:
                after = foreign.run(model, block, every[:, rows], image, run.nonzero()[:, 0])
            every = every.clone()
            every[:, rows] = after
        found.append(foreign.alone(model, image).finish(every)[0, prefix:])
    return as_map(torch.stack(found))


@torch.no_grad()
@each
def test_nothing_leaves_is_the_models_own_output(foreign):
    wrapped, images = exiting(foreign), models.images(3, SIZE)
    model = wrapped.model
    own = as_map(foreign.dense(model, images)[:, foreign.prefix :])
    stay = torch.zeros(3, PATCHES, dtype=torch.bool)
    packed = Schedule(tuple(Exit(after, Told(stay)) for after in AFTER))
    for plan in (schedule.dense(), packed):
        out = wrapped(images, schedule=plan)
        torch.testing.assert_close(out.logits, own, atol=1e-5, rtol=1e-5)
        assert out.tokens_per_block.eq(PATCHES + foreign.prefix).all()
    for carry in (Preserved(), Preserved(keys="all")):
        out = gated(model, carry)(images, schedule=Schedule(packed.exits, carry))
        torch.testing.assert_close(out.maps[DEPTH], own, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@each
def test_tokens_keep_their_places_when_others_leave(foreign):
    wrapped, images, plan = exiting(foreign), models.images(3, SIZE), told(3)
    out = wrapped(images, schedule=plan)
    assert torch.equal(out.exit_depth, depths_of(plan, DEPTH))
    assert out.exit_depth.unique().tolist() == [1, 2, DEPTH]
    torch.testing.assert_close(out.logits, outcome(foreign, wrapped, images, plan), atol=2e-5, rtol=1e-5)


@torch.no_grad()
@each
def test_an_image_does_not_depend_on_its_batch(foreign):
    wrapped, images, plan = exiting(foreign), models.images(3, SIZE), told(3)
    together = wrapped(images, schedule=plan)
    for number in range(3):
        alone = wrapped(images[number : number + 1], schedule=one_of(plan, number))
        torch.testing.assert_close(together.logits[number], alone.logits[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(together.tokens_per_block[number], alone.tokens_per_block[0])


@torch.no_grad()
@each
def test_tokens_keep_their_places_when_others_wait(foreign):
    model, images = foreign.make(), models.images(3, SIZE)
    for returning, keys in itertools.product(("every gate", "never"), ("running", "all")):
        plan = told(3, carry=Preserved(returning, keys))
        wrapped = gated(model, plan.carry)
        wanted = slow_gates(foreign, model, images, plan)
        for call in (wrapped, wrapped.masked):
            torch.testing.assert_close(call(images, schedule=plan).maps[DEPTH], wanted, atol=2e-5, rtol=1e-5)


@each
def test_gradients_are_the_models_own_and_finite_when_tokens_leave(foreign):
    wrapped, images = exiting(foreign), models.images(2, SIZE)
    model, weights = wrapped.model, torch.randn(2, WIDTH, *GRID, generator=torch.Generator().manual_seed(3))
    stay = torch.zeros(2, PATCHES, dtype=torch.bool)
    calls = [
        lambda: as_map(foreign.dense(model, images)[:, foreign.prefix :]),
        lambda: wrapped(images, schedule=Schedule(tuple(Exit(after, Told(stay)) for after in AFTER))).logits,
        lambda: wrapped(images, schedule=told(2)).logits,
    ]
    found = []
    for call in calls:
        model.zero_grad()
        (call() * weights).sum().backward()
        found.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    own, packed, left = found
    assert own.keys() == packed.keys() == left.keys()
    for name, gradient in own.items():
        near = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(packed[name], gradient, atol=max(near, 1e-5), rtol=1e-4, msg=name)
        assert left[name].isfinite().all()
    assert any(not torch.allclose(left[name], own[name]) for name in own)


@torch.no_grad()
@each
def test_multiply_adds_are_those_of_torchs_own_counter(foreign):
    wrapped, images = exiting(foreign), models.images(2, SIZE)
    for plan in (schedule.dense(), told(2)):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            out = wrapped(images, schedule=plan)
        assert int(wrapped.multiply_adds(out).sum()) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm DINOv3", *(name for name in FOREIGN if name.startswith("transformers"))])
def test_images_of_another_size(name):
    foreign, images = FOREIGN[name], models.images(2, (48, 40))
    wrapped = exiting(foreign)
    model = wrapped.model
    own = foreign.dense(model, images)[:, foreign.prefix :]
    torch.testing.assert_close(wrapped(images).logits, own.mT.unflatten(2, (6, 5)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm EVA-02", "timm DINOv3", "transformers DINOv3"])
def test_rotary_positions_in_half_precision(name):
    foreign = FOREIGN[name]
    model, images, plan = foreign.make().bfloat16(), models.images(2, SIZE).bfloat16(), told(2)
    own = as_map(foreign.dense(model, images)[:, foreign.prefix :])
    out = exiting(model)(images, schedule=schedule.dense())
    torch.testing.assert_close(out.logits, own, atol=0.05, rtol=0.05)
    assert exiting(model)(images, schedule=plan).logits.isfinite().all()


def stem():
    models.import_timm()
    return importlib.import_module("torchvision.models.vision_transformer").ConvStemConfig(8, 3, PATCH)


def unfused():
    model = eva(use_rot_pos_emb=True)
    model.blocks[2].attn.fused_attn = False
    return model


def checkpointed():
    model = eva()
    model.set_grad_checkpointing()
    return model


def of_transformers(change):
    model = FOREIGN["transformers DINOv2"].make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # an older release knows no newer name
        change(model)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: of_transformers(lambda model: model.set_attn_implementation("eager")),
            r"`model` must attend by \"sdpa\": call model.set_attn_implementation\(\"sdpa\"\), got 'eager'",
        ),
        (
            lambda: of_transformers(lambda model: model.gradient_checkpointing_enable()),
            r"`model` must not checkpoint its gradients, got activation checkpointing switched on",
        ),
        (
            lambda: torchvision_vit(conv_stem_configs=[stem()]),
            "`model` must embed its patches by one convolution, got one with conv_stem_configs",
        ),
        (unfused, r"`model.blocks\[2\]` must call .*scaled_dot_product_attention once, got 0 calls"),
        (checkpointed, r"`model` must not checkpoint its gradients, got set_grad_checkpointing\(\)"),
        (lambda: eva(patch_drop_rate=0.5), "`model` must keep all its patches, got one with patch_drop_rate > 0"),
    ],
)
def test_what_would_go_wrong_is_named(make, message):
    with pytest.raises(TokenExitError, match=message):
        exiting(make())


@pytest.mark.parametrize(
    ("kind", "name", "part"),
    [("vit", "ViTForImageClassification", "vit"), ("dinov2", "Dinov2ForImageClassification", "dinov2")],
)
def test_a_model_with_a_head_is_told_which_part_to_give(kind, name, part):
    model = transformers_model(kind, name)
    with pytest.raises(TokenExitError, match=f"`model` must be .*, got .*{name}, whose part `{part}` is one"):
        exiting(model)
    assert exiting(getattr(model, part)).depth == DEPTH


def upernet():
    """A UperNet on a backbone that gives maps of all four blocks of a DINOv2, and that DINOv2."""
    vit = transformers_model("dinov2", "Dinov2Model")
    from transformers import Dinov2Backbone, Dinov2Config, UperNetConfig, UperNetForSemanticSegmentation

    sizes = {"image_size": SIZE[0], "patch_size": PATCH, "hidden_size": WIDTH, "num_hidden_layers": DEPTH}
    backbone = Dinov2Config(**sizes, num_attention_heads=HEADS, out_indices=[1, 2, 3, 4])
    config = UperNetConfig(backbone_config=backbone, hidden_size=16, auxiliary_in_channels=WIDTH, num_labels=5)
    whole = UperNetForSemanticSegmentation(config).eval()
    assert isinstance(whole.backbone, Dinov2Backbone)
    return whole, type(vit)(backbone).eval()


@torch.no_grad()
def test_a_backbone_of_transformers_is_told_how_its_weights_and_its_decoder_are_taken():
    whole, vit = upernet()
    words = "gives feature maps of a Dinov2Model: load its weights into one, .*`wrap\\(vit, decoder=..., taps=...\\)`"
    for model, which in ((whole, "whose `backbone`"), (whole.backbone, "which")):
        for wrap in (exiting, lambda one: tet.wrap_decoder(one, schedule.dovit())):
            with pytest.raises(TokenExitError, match=f"got {full_name(model)}, {which} {words}"):
                wrap(model)
    backbone, images = whole.backbone, models.images(2, SIZE)
    vit.load_state_dict(backbone.state_dict())
    wrapped = tet.wrap(vit, schedule.dense(), decoder=whole.decode_head, taps=(1, 2, 3, 4)).eval()
    own = whole.decode_head(backbone(images).feature_maps)
    torch.testing.assert_close(wrapped(images).decoded, own, atol=1e-4, rtol=1e-4)


def test_a_vision_transformer_in_place_of_one_with_a_decoder_is_told_what_puts_one_behind_it():
    behind = "`wrap\\(vit, decoder=...\\)` puts a decoder behind a vision transformer that `wrap` takes"
    for model in (models.timm_vit(), models.plain_host(), nn.Linear(2, 2)):
        with pytest.raises(TokenExitError, match=f"DecodingHost \\(docs/howto/decoder.md\\), got .*; {behind}"):
            tet.wrap_decoder(model, schedule.dovit())


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm distilled", "torchvision", "transformers ViT", "transformers SigLIP"])
def test_semantic_tokens(name):
    foreign, images = FOREIGN[name], models.images(2, SIZE)
    model = foreign.make()
    wrapped = tet.wrap_semantic(model, SemanticPlan((2, 2), (2, 2), (2, 2)), after=0, until=3, heads=HEADS)
    assert wrapped(images).map.shape == (2, WIDTH, *GRID)


def test_rotary_positions_are_asked_for_in_place_of_semantic_tokens():
    with pytest.raises(TokenExitError, match="`model.embed` must give no positions"):
        tet.wrap_semantic(eva(use_rot_pos_emb=True), after=0, until=None, heads=2)


def hollow(name):
    """A model of a class, and of one that derives from it if there is one, that holds nothing."""
    models.import_timm()
    module, _, kind = name.rpartition(".")
    pytest.importorskip(module.partition(".")[0], reason="its library is not installed")
    source = importlib.import_module(module)
    kind = getattr(source, kind)
    kinds = [one for one in vars(source).values() if isinstance(one, type) and issubclass(one, kind)]
    for one in {kind, kinds[-1]}:
        model = one.__new__(one)
        nn.Module.__init__(model)
        yield model


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_need_the_dense_grid_are_refused_by_name_and_with_the_reason(name):
    wraps = (
        lambda model: tet.wrap(model, num_classes=2),
        tet.wrap_gates,
        lambda model: tet.wrap_semantic(model, after=1, until=None),
    )
    for model, wrap in itertools.product(hollow(name), wraps):
        with pytest.raises(TokenExitError) as caught:
            wrap(model)
        rule = "`model` must have blocks that run on any tokens, got "
        assert str(caught.value) == f"{rule}{type(model).__module__}.{type(model).__name__}: {REFUSED[name]}"


HOOKED = {"timm distilled": 4, "timm DINOv3": 4, "torchvision": 4, "transformers DINOv2": 4}


@torch.no_grad()
@pytest.mark.parametrize("name", HOOKED)
def test_hooks_on_blocks_see_a_batch_then_one_row_of_all_images(name):
    foreign, images = FOREIGN[name], models.images(3, SIZE)
    wrapped, seen = exiting(foreign), []
    model = wrapped.model
    for block in foreign.blocks(model):
        block.register_forward_hook(lambda _, given, out: seen.append((tuple(given[0].shape), tuple(out.shape))))
    slots, out = PATCHES + foreign.prefix, wrapped(images, schedule=told(3))
    left = [int(count) for count in out.tokens_per_block.sum(dim=0)]
    shapes = [(3, slots, WIDTH), *((1, count, WIDTH) for count in left[1:])]
    assert seen == [(shape, shape) for shape in shapes]
    gates = gated(model, Preserved(keys="all"))
    seen.clear()
    gates(images, schedule=told(3, carry=Preserved(keys="all")))
    assert len(seen) == DEPTH  # that which waits only offers its keys: no call that ends


@torch.no_grad()
def test_torchvisions_blocks_and_their_attention_are_called():
    model, images = torchvision_vit(), models.images(2, SIZE)
    wrapped, blocks = exiting(model), model.encoder.layers
    blocks[1].self_attention.register_forward_hook(lambda _, given, out: (2 * out[0], out[1]))
    blocks[2].register_forward_pre_hook(lambda _, given: (given[0] + 0.1,))
    blocks[3] = nn.Sequential(blocks[3])
    own = FOREIGN["torchvision"].dense(model, images)[:, 1:]
    torch.testing.assert_close(wrapped(images, schedule=schedule.dense()).logits, as_map(own), atol=1e-5, rtol=1e-5)
    plan = told(2)
    torch.testing.assert_close(
        wrapped(images, schedule=plan).logits,
        outcome(FOREIGN["torchvision"], wrapped, images, plan),
        atol=2e-5,
        rtol=1e-5,
    )


def test_attention_of_torchvision_that_is_asked_for_more_is_refused():
    class Masked(nn.MultiheadAttention):
        def forward(self, query, key, value, **options):
            mask = torch.zeros(query.shape[1], query.shape[1], dtype=torch.bool)
            return super().forward(query, key, value, attn_mask=mask, need_weights=False)

    model = torchvision_vit()
    model.encoder.layers[1].self_attention.__class__ = Masked
    with pytest.raises(TokenExitError, match=r"`model.blocks` must attend .*without a mask, .*, got \['attn_mask'\]"):
        exiting(model)


@pytest.fixture
def alone():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone", "unchecked")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_sharded_models_run_by_forward_and_say_what_else_to_do():
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    images, plan = models.images(2), schedule.paumer(keep={2: 0.5})
    model = models.wrapped(models.timm_vit, plan, after=(2,))
    wanted = model(images).logits
    for block in model.model.blocks:
        fully_shard(block)
    fully_shard(model)
    sharded = "`model` must have its weights whole: .*register_fsdp_forward_method, got sharded weights"
    for run in (model.every_exit, lambda images: model.mixed([*images])):
        with pytest.raises(TokenExitError, match=sharded):
            run(images)
    torch.testing.assert_close(model(images).logits, wanted)
    register_fsdp_forward_method(model, "every_exit")
    assert len(model.every_exit(images)) == 2
    inner = models.wrapped(models.timm_vit, plan, after=(2,))
    fully_shard(inner.model)
    with pytest.raises(TokenExitError, match=sharded):
        inner(images)
    with pytest.raises(TokenExitError, match="`model` must have nothing around it .*put it around what `wrap` returns"):
        tet.wrap(fully_shard(models.timm_vit()), plan, num_classes=5)
