"""Models with a decoder of their own: their own output from restored grids, whoever has left.

References run each image by itself, with the model's own blocks on the tokens that are left, and then the model's own
forward, in which the tapped blocks are made to give what the reference has.
"""

import dataclasses
import functools
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tokenexit_torch as tet
from tests.torch import hosts, models, oracle
from tests.torch.decoders import (
    CLASSES,
    DECODERS,
    DEPTH,
    GRID,
    HEADS,
    PATCH,
    SIZE,
    WIDTH,
    Decoder,
    dinov2,
    made,
    on_backbone,
)
from tests.torch.hosts import AFTER, PATCHES, Told, depths_of, one_of
from tokenexit import TokenExitError, heads, policies, schedule
from tokenexit.carries import Feature, MaskPrediction, Translated
from tokenexit.schedule import Exit, Schedule
from tokenexit_torch.exits.decoder import pooled
from tokenexit_torch.hosts.registry import decoding_host_of

each = pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS.keys())


told = functools.partial(hosts.told, carry=Feature())


def exiting(model):
    """A model, or a `Decoder`, which is made and wrapped once: then this is a copy."""
    if isinstance(model, Decoder):
        return exiting_once(model)
    classes = None if decoding_host_of(model).classes else CLASSES
    return tet.wrap_decoder(model, schedule.dense(after=AFTER), num_classes=classes)


@models.once
def exiting_once(decoder):
    return exiting(decoder.make())


@torch.no_grad()
def slow(decoder, model, images, plan):
    """The model's own output, one image at a time, its leavers frozen as they left."""
    found, blocks = [], max(decoder.taps)
    for image, depth in zip(images.split(1), depths_of(plan, blocks), strict=True):
        steps = oracle.walk(decoder.alone(model, image), depth, blocks=blocks, carry=plan.carry)
        taken = {block: features[None] for block, (features, *_) in enumerate(steps, 1) if block in decoder.taps}
        found.append(decoder.decoded(model, image, taken))
    return {name: torch.cat([one[name] for one in found]) for name in found[0]}


def assert_same(found, wanted, *, near=1e-5):
    assert {name for name, value in found.items() if value is not None} == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, atol=near, rtol=near, msg=lambda text, name=name: f"{name} {text}"
        )
        assert value.std() > 0.05  # nothing that is dead


@torch.no_grad()
@each
def test_nothing_leaves_is_the_models_own_output(decoder):
    wrapped, images = exiting(decoder), models.images(3, SIZE)
    own = wrapped.model(images)
    stay = torch.zeros(3, PATCHES, dtype=torch.bool)
    packed = Schedule(tuple(Exit(after, Told(stay)) for after in AFTER), Feature())
    for plan in (schedule.dense(), packed):
        out = wrapped(images, schedule=plan)
        assert type(out.decoded) is type(own)
        assert_same(out.decoded, dict(own))
        assert out.tokens_per_block.eq(PATCHES + decoder.prefix).all()
        assert out.tokens_per_block.shape == (3, max(decoder.taps))
        assert out.exit_depth.eq(max(decoder.taps)).all()


@torch.no_grad()
@each
@pytest.mark.parametrize("carry", [Feature(), Feature("last block")], ids=["decoder", "last block"])
def test_the_decoder_meets_leavers_as_they_left_and_the_others_in_their_places(decoder, carry):
    wrapped, images = exiting(decoder), models.images(3, SIZE)
    plan = told(3, carry=carry, done=1)
    out, wanted = wrapped(images, schedule=plan), slow(decoder, wrapped.model, images, plan)
    assert_same(out.decoded, wanted, near=5e-5)
    assert torch.equal(out.exit_depth, depths_of(plan, max(decoder.taps)))
    assert out.exit_depth[1].eq(1).all()
    assert out.exit_depth.unique().tolist() == [1, 2, max(decoder.taps)]
    late = PATCHES + decoder.prefix if carry.before == "last block" else 0
    assert out.tokens_per_block[1].tolist() == [PATCHES + decoder.prefix] + [0] * (max(decoder.taps) - 2) + [late]
    assert out.exits == AFTER


@torch.no_grad()
@each
def test_translators_that_change_nothing_leave_the_features_and_others_are_fitted_to_every_tap(decoder):
    images, exits = (
        models.images(3, SIZE),
        (Exit(1, policies.Budget(0.6, by="error")), Exit(2, policies.Budget(0.3, by="error"))),
    )
    model = tet.wrap_decoder(decoder.make(), Schedule(exits, Translated()), exit_heads=heads.Translator(8)).eval()
    out, raw = model(images), model(images, schedule=Schedule(exits, Feature()))
    assert out.exit_depth.unique().tolist() == [1, 2, max(decoder.taps)]
    assert torch.equal(out.exit_depth, raw.exit_depth)
    assert_same(out.decoded, dict(raw.decoded))
    report = tet.fit_exits(model, images, steps=3, patches_per_step=16, progress=iter)
    assert [*report.missed[1]] == [tap for tap in decoder.taps if tap > 1]
    assert type(model(images).decoded) is type(raw.decoded)


@torch.no_grad()
@each
def test_an_image_does_not_depend_on_its_batch(decoder):
    wrapped, images, plan = exiting(decoder), models.images(3, SIZE), told(3)
    together = wrapped(images, schedule=plan)
    for number in range(3):
        alone = wrapped(images[number : number + 1], schedule=one_of(plan, number))
        assert_same({name: value[number] for name, value in together.decoded.items()},
                    {name: value[0] for name, value in alone.decoded.items()}, near=5e-5)  # fmt: skip
        assert torch.equal(together.tokens_per_block[number], alone.tokens_per_block[0])
        assert torch.equal(together.exit_depth[number], alone.exit_depth[0])


@each
def test_gradients_are_the_models_own_and_finite_when_tokens_leave(decoder):
    wrapped, images = exiting(decoder), models.images(2, SIZE)
    model, stay = wrapped.model, torch.zeros(2, PATCHES, dtype=torch.bool)
    calls = [
        lambda: model(images),
        lambda: (
            wrapped(images, schedule=Schedule(tuple(Exit(after, Told(stay)) for after in AFTER), Feature())).decoded
        ),
        lambda: wrapped(images, schedule=told(2)).decoded,
    ]
    found = []
    for call in calls:
        model.zero_grad()
        random = torch.Generator().manual_seed(3)
        sum((value * torch.randn(value.shape, generator=random)).sum() for value in call().values()).backward()
        found.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    own, packed, left = found
    # Blocks after the last tap have no part in the model's own output either.
    assert own.keys() == packed.keys() == left.keys()
    for name, gradient in own.items():
        near = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(packed[name], gradient, atol=max(near, 1e-4), rtol=1e-4, msg=name)
        assert left[name].isfinite().all()
    assert any(not torch.allclose(left[name], own[name]) for name in own)


@torch.no_grad()
@each
def test_multiply_adds_are_those_of_torchs_own_counter(decoder):
    wrapped, images = exiting(decoder), models.images(2, SIZE)
    for plan in (schedule.dense(), told(2)):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            out = wrapped(images, schedule=plan)
        total = int(wrapped.multiply_adds(out).sum()) + 2 * wrapped.decoder_multiply_adds()
        assert total == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


@torch.no_grad()
@pytest.mark.parametrize(("name", "size"), [("DPT, segmentation", (48, 48)), ("Depth Anything", (48, 40))])
def test_images_of_another_size(name, size):
    wrapped, images = exiting(DECODERS[name]), models.images(2, size)
    own = wrapped.model(images)
    out = wrapped(images, schedule=schedule.dense())
    assert_same(out.decoded, dict(own))
    assert out.exit_depth.shape == (2, size[0] // PATCH, size[1] // PATCH)
    assert wrapped.decoder_multiply_adds(size) > wrapped.decoder_multiply_adds()


@each
def test_training_draws_what_the_model_itself_draws(decoder):
    """Dropout once, rotary positions jittered once for all blocks, and queries drawn as in the model's own forward."""
    model, images = decoder.make(), models.images(2, SIZE)
    if "Eomt" in type(model).__name__:
        model.attn_mask_probs.fill_(0.5)
    wrapped = exiting(model).train()
    torch.manual_seed(5)
    own = model(images)
    torch.manual_seed(5)
    assert_same(wrapped(images, schedule=schedule.dense()).decoded, dict(own))
    assert all(value.isfinite().all() for value in wrapped(images, schedule=told(2)).decoded.values())


def test_a_decoder_that_draws_in_evaluation_is_taken_and_the_random_state_left_alone():
    model = DECODERS["EoMT"].make()
    model.attn_mask_probs.fill_(0.5)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    tet.wrap_decoder(model, schedule.dense())
    assert torch.equal(torch.get_rng_state(), before)


def test_labels_give_the_models_own_loss():
    model, images = DECODERS["DPT, segmentation"].make(), models.images(2, SIZE)
    labels = torch.randint(CLASSES, (2, *SIZE), generator=torch.Generator().manual_seed(0))
    wrapped = exiting(model)
    own = model(images, labels=labels).loss
    torch.testing.assert_close(wrapped(images, schedule=schedule.dense(), labels=labels).decoded.loss, own)
    loss = wrapped(images, schedule=told(2), labels=labels).decoded.loss
    loss.backward()
    assert loss != own
    assert model.dpt.embeddings.patch_embeddings.projection.weight.grad.abs().sum() > 0


@torch.no_grad()
@each
def test_threads_may_run_one_model_at_a_time_each_with_its_own_plan(decoder):
    wrapped, images = exiting(decoder), models.images(2, SIZE)
    model, plans = wrapped.model, [told(2, seed=seed) for seed in range(3)]
    wanted = [wrapped(images, schedule=plan).decoded for plan in plans]
    own, found = dict(model(images)), {}

    def work(number):
        with torch.no_grad():
            for _ in range(4):
                found.setdefault(number, []).append(wrapped(images, schedule=plans[number]).decoded)
                found.setdefault("own", []).append(model(images))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, expected in enumerate(wanted):
        assert len(found[number]) == 4
        for one in found[number]:
            assert_same(one, dict(expected))
    for one in found["own"]:
        assert_same(one, own)


@torch.no_grad()
@each
def test_the_model_is_left_as_it_is(decoder):
    model, images = decoder.make(), models.images(2, SIZE)
    model(images)  # the library puts hooks of its own on blocks when it first asks for their states

    def state():
        return [
            (name, part, len(part._forward_hooks), len(part._forward_pre_hooks)) for name, part in model.named_modules()
        ]

    before = state()
    exiting(model)(images, schedule=told(2))
    assert state() == before


@torch.no_grad()
@each
def test_a_forward_that_was_put_on_the_model_is_not_run_in_place_of_the_decoder(decoder):
    """As accelerate puts one there, and compilation a call: bound to the model, they would run all tokens again."""
    wrapped, images, plan = exiting(decoder), models.images(2, SIZE), told(2)
    model = wrapped.model
    wanted = dict(wrapped(images, schedule=plan).decoded)
    model.forward = functools.partial(type(model).forward, model)
    model._compiled_call_impl = model._call_impl
    assert_same(wrapped(images, schedule=plan).decoded, wanted)


def test_features_fold_into_the_first_prefix_token():
    decoder = DECODERS["DPT, segmentation"]
    model, images = decoder.make(), models.images(2, SIZE)
    with torch.no_grad():
        plain, folded = (
            exiting(model)(images, schedule=told(2, carry=Feature(fold_above=share))).decoded.logits
            for share in (None, 0.1)
        )
    assert not torch.allclose(plain, folded)


@pytest.mark.parametrize("name", ["EoMT", "DPT, segmentation"])
def test_exits_are_fitted_to_the_decoder_without_labels(name):
    model, images = DECODERS[name].make(), models.images(6, SIZE)
    plan = dataclasses.replace(schedule.neighbours(radius={1: 0, 2: 0}, threshold=0.4), carry=Feature())
    wrapped = tet.wrap_decoder(model, plan).eval()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    report = tet.fit_exits(wrapped, images, steps=400, patches_per_step=96, progress=iter)
    assert report.patches == 6 * PATCHES
    with torch.no_grad():
        scores = wrapped.host.class_scores(model(images)).softmax(dim=1)
        wanted, every = nn.functional.adaptive_avg_pool2d(scores, GRID), wrapped.every_exit(images)
    constant = (wanted - wanted.mean(dim=(0, 2, 3), keepdim=True)).abs().mean()
    for after, agreement in report.agreement.items():
        found = every[after]
        assert agreement == pytest.approx((found.argmax(dim=1) == wanted.argmax(dim=1)).float().mean().item())
        assert (found.softmax(dim=1) - wanted).abs().mean() < 0.8 * constant  # much better than saying always the same
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert wrapped(images[:2]).exit_depth.min() < wrapped.depth


def test_targets_are_averaged_as_probabilities():
    logits = torch.tensor([[0.0, 9.0], [4.0, 0.0]]).reshape(1, 2, 1, 2)  # of two classes, in two pixels of one patch
    probability = pooled(logits, (1, 1)).softmax(dim=1).flatten()
    torch.testing.assert_close(probability, logits.softmax(dim=1).mean(dim=(2, 3)).flatten())


def test_eomts_classes_are_those_of_its_semantic_segmentation():
    model, images = DECODERS["EoMT"].make(), models.images(1, SIZE)
    with torch.no_grad():
        output = model(images)
        scores = decoding_host_of(model).class_scores(output)[0].exp()
    classes, masks = output.class_queries_logits[0].softmax(dim=-1), output.masks_queries_logits[0].sigmoid()
    wanted = sum(one[:-1, None, None] * mask for one, mask in zip(classes, masks, strict=True))
    torch.testing.assert_close(scores, wanted)


def test_a_model_without_classes_is_fitted_to_what_it_is_told():
    model, images = DECODERS["Depth Anything"].make(), models.images(16, SIZE)
    wrapped = tet.wrap_decoder(model, schedule.paumer(keep={2: 0.5}), num_classes=4)
    with torch.no_grad():
        low, high = model(images).predicted_depth.quantile(torch.tensor([0.1, 0.9]))
    middle = torch.linspace(float(low), float(high), 4)

    def bins(output):
        return -(((output.predicted_depth[:, None] - middle[:, None, None]) / (middle[1] - middle[0])) ** 2)

    report = tet.fit_exits(wrapped, images, targets=bins, steps=80, patches_per_step=256, progress=iter)
    assert report.agreement[2] > 0.4
    with pytest.raises(TokenExitError, match="`targets` must be given where a decoder does not return one map"):
        tet.fit_exits(wrapped, images, steps=1, progress=iter)
    with pytest.raises(
        TokenExitError, match=r"`targets` must give class scores of shape \(8, 4, height, width\), got s"
    ):
        tet.fit_exits(wrapped, images, targets=lambda output: output.predicted_depth, steps=1, progress=iter)


@pytest.mark.parametrize("name", ["EoMT-DINOv3", "Depth Anything"])
def test_exits_are_saved_and_loaded(name, tmp_path):
    model, images = DECODERS[name].make(), models.images(2, SIZE)
    wrapped = tet.wrap_decoder(model, schedule.paumer(keep={1: 0.7, 2: 0.4}), num_classes=CLASSES)
    tet.save(wrapped, tmp_path / "planned")
    again = tet.load(model, tmp_path / "planned", kind="decoder")
    assert again.schedule == wrapped.schedule
    with torch.no_grad():
        assert torch.equal(again(images).exit_depth, wrapped(images).exit_depth)
        assert_same(again(images).decoded, dict(wrapped(images).decoded))

    def modules():
        return {after: nn.Linear(WIDTH, CLASSES) for after in AFTER}

    own = tet.wrap_decoder(model, wrapped.schedule, exit_heads=modules(), num_classes=CLASSES)
    tet.save(own, tmp_path / "own")
    again = tet.load(model, tmp_path / "own", kind="decoder", exit_heads=modules())
    assert torch.equal(again.exit_heads["2"].weight, own.exit_heads["2"].weight)
    with pytest.raises(TokenExitError, match="`exit_heads` must be given if they were saved as modules of your own"):
        tet.load(model, tmp_path / "own", kind="decoder")


def test_exits_with_a_final_head_are_no_exits_under_a_decoder(tmp_path):
    tet.save(tet.wrap(models.plain_host(), schedule.dense(after=(2,)), num_classes=3), tmp_path)
    with pytest.raises(
        TokenExitError, match="`folder` must hold exits of a model with a decoder of its own, got a fin"
    ):
        tet.load(DECODERS["EoMT"].make(), tmp_path, kind="decoder")


def test_another_plan_may_be_used_later():
    wrapped, images = exiting(DECODERS["EoMT"]), models.images(2, SIZE)
    wrapped.retune(schedule.paumer(keep={1: 0.5}))
    with torch.no_grad():
        assert wrapped(images).tokens_per_block[:, 1].eq(8 + 3).all()
    wrapped.retune(Schedule((Exit(2, policies.ConfidenceAbove(0.9)),), Feature()), threshold=0.0)
    with torch.no_grad():
        assert wrapped(images).exit_depth.eq(2).all()
    with pytest.raises(TokenExitError, match="`schedule` must be given if neither `threshold` nor `alike` is"):
        wrapped.retune()


class Own(nn.Module):
    """A network of somebody's, whose decoder looks at two depths."""

    def __init__(self):
        super().__init__()
        self.vit = models.plain_host()
        self.trunk, self.decode = self.vit.module, nn.Conv2d(64, 2, 3, padding=1)

    def forward(self, images):
        embedded, found = self.vit.embed(images), []
        row = embedded.tokens
        for index in range(4):
            row = self.vit.run(index, row, None)
            found.append(row)
        return self.decode(torch.cat([found[1], found[3]], dim=2).mT.unflatten(2, embedded.grid))


class OwnHost:
    """Its host."""

    def __init__(self, network, taps=(2, 4)):
        self.module, vit = network, network.vit
        self.blocks, self.embedding = vit.blocks[:4], nn.Identity()
        self.width, self.image_shape, self.taps, self.classes = vit.width, vit.image_shape, taps, 2
        self.embed, self.run = vit.embed, vit.run

    def finish(self, tokens):
        return tokens

    def dense(self, images):
        row = self.embed(images).tokens
        for index in range(4):
            row = self.run(index, row, None)
        return row

    def own(self, images, **inputs):
        return [self.module(images, **inputs), "no tensor"]

    def decode(self, taken, embedded, _images, **_inputs):
        return [self.module.decode(torch.cat([taken[2], taken[4]], dim=2).mT.unflatten(2, embedded.grid)), "no tensor"]

    def class_scores(self, decoded):
        return decoded[0]


class Forgetful(OwnHost):
    def decode(self, taken, embedded, images):
        return super().decode(dict.fromkeys((2, 4), taken[4]), embedded, images)


class Other(OwnHost):
    def decode(self, taken, embedded, images):
        return super().decode(taken, embedded, images)[0]


class Silent(OwnHost):
    def own(self, images):
        return super().own(images)[1:]


def test_a_network_of_ones_own():
    torch.manual_seed(0)
    host = OwnHost(Own().eval())
    images = torch.randn(2, *host.image_shape)
    wrapped = tet.wrap_decoder(host, schedule.paumer(keep={1: 0.5, 3: 0.25}))
    with torch.no_grad():
        dense, out = wrapped(images, schedule=schedule.dense()), wrapped(images)
        torch.testing.assert_close(dense.decoded[0], host.module(images))
    assert not torch.allclose(out.decoded[0], dense.decoded[0])
    assert tet.fit_exits(wrapped, images, steps=2, patches_per_step=8, progress=iter).patches == out.exit_depth.numel()


@pytest.mark.parametrize(
    ("host", "message"),
    [
        (
            lambda: Forgetful(Own().eval()),
            r"`model.decode` must give what the model itself gives if no token leaves, got a",
        ),
        (
            lambda: Other(Own().eval()),
            r"`model.decode` must give what the model itself gives, \{'output\[0\]': .*, got {'o",
        ),
        (lambda: Silent(Own().eval()), "`model.own` must give tensors, got list"),
        (
            lambda: OwnHost(Own().eval(), taps=(2, 3)),
            "`model.taps` must be ascending numbers of blocks, from 1 up, the l",
        ),
        (
            lambda: OwnHost(Own().eval(), taps=(0, 4)),
            "`model.taps` must be ascending numbers of blocks, from 1 up, the l",
        ),
        (
            lambda: OwnHost(Own().eval(), taps=()),
            "`model.taps` must be ascending numbers of blocks, from 1 up, the last 4",
        ),
    ],
)
def test_the_self_check_says_what_differs(host, message):
    torch.manual_seed(0)
    with pytest.raises(TokenExitError, match=message):
        tet.wrap_decoder(host(), schedule.dense())


PLAN = schedule.paumer(keep={1: 0.5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"plan": schedule.dtop(after=(1, 2))},
            r"`schedule` must carry features, .*: dataclasses.replace\(schedule, ca",
        ),
        ({"plan": Schedule(PLAN.exits, MaskPrediction())}, "`schedule` must carry no MaskPrediction"),
        ({"plan": schedule.svit(after=(1, 2))}, "`schedule` must carry predictions or features and look at no gate"),
        ({"plan": schedule.paumer(keep={3: 0.5})}, "`schedule` must have exits after blocks 1 to 2 only, for 3 blocks"),
        (
            {"exit_heads": heads.ATM()},
            "`exit_heads` must be a plan of tokenexit.heads that gives no masks",
        ),
        (
            {"exit_heads": {1: tet.heads.AttentionToMask(WIDTH, 3)}},
            "`exit_heads` must treat each token by itself, got a mask head",
        ),
        ({"exit_heads": {1: nn.Linear(WIDTH, 4)}}, r"`exit_heads\[1\]` must give 3 classes, got 4"),
        ({"exit_heads": {3: nn.Linear(WIDTH, 3)}}, "`exit_heads` must have blocks from 1 to 2 as keys, for 3 blocks"),
        ({"num_classes": 0}, "`num_classes` must be a whole number from 2 to 1000000, got 0"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    plan = options.pop("plan", PLAN)
    with pytest.raises(TokenExitError, match=message):
        tet.wrap_decoder(DECODERS["EoMT"].make(), plan, **options)


def test_a_plan_that_does_not_fit_is_refused_in_a_call():
    wrapped = exiting(DECODERS["EoMT"])
    with pytest.raises(TokenExitError, match="`schedule` must carry features"):
        wrapped(models.images(1, SIZE), schedule=schedule.dtop(after=(1, 2)))


def changed(name, change):
    model = DECODERS[name].make()
    change(model)
    return model


def hybrid():
    bit = {"model_type": "bit", "embedding_size": 8, "hidden_sizes": [8, 16, 32], "depths": [1, 1, 1], "num_groups": 4,
           "layer_type": "bottleneck", "out_features": ["stage1", "stage2", "stage3"]}  # fmt: skip
    return made(
        "DPTForDepthEstimation", is_hybrid=True, backbone_config=bit, backbone_featmap_shape=[1, 32, 2, 2],
        hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=HEADS, image_size=32, patch_size=16,
        neck_hidden_sizes=[8, 16, 8, 8], fusion_hidden_size=16, backbone_out_indices=[0, 1, 2, 3],
    )  # fmt: skip


def on_swin():
    swin = {
        "model_type": "swin",
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
    }
    return on_backbone("DPTForDepthEstimation", swin | {"out_features": ["stage1", "stage2"], "window_size": 4})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (hybrid, r"`model` must have blocks .*, got .*DPTForDepthEstimation on .*BitBackbone: it is a convolutional netw"),
        (on_swin, r"`model` must have blocks .*, got .*DPTForDepthEstimation on .*Swin\w+: its blocks need the dense grid"),
        (
            lambda: on_backbone("DepthAnythingForDepthEstimation", dinov2("Dinov2WithRegisters")),
            "`model.backbone` must be a Dinov2Backbone, got .*Dinov2WithRegistersBackbone",
        ),
        (
            lambda: changed("EoMT", lambda model: model.set_attn_implementation("eager")),
            r"`model` must attend by \"sdpa\": call model.set_attn_implementation\(\"sdpa\"\), got 'eager'",
        ),
        (
            lambda: changed("Depth Anything", lambda model: model.backbone.set_attn_implementation("eager")),
            r"`model` must attend by \"sdpa\"",
        ),
        (
            lambda: changed("EoMT", lambda model: setattr(model.layers[0], "gradient_checkpointing", True)),
            "`model` must not checkpoint its gradients",
        ),
        (
            lambda: changed("Depth Anything", lambda model: setattr(model.config, "output_hidden_states", True)),
            "`model.config` must ask for no hidden states, got output_hidden_states=True",
        ),
        (
            lambda: made("EomtForUniversalSegmentation", num_hidden_layers=2, num_blocks=2, hidden_size=8, image_size=32,
                         num_attention_heads=2),
            "`model` must have blocks before its queries, got 2 of 2 with",
        ),
        (lambda: nn.Linear(2, 2), "`model` must be an EoMT, DPT or Depth Anything of transformers, or a plain object that"),
        (object, "`model` must be an EoMT, DPT or Depth Anything of transformers, or a plain object that follows Decodin"),
    ],
)  # fmt: skip
def test_what_cannot_be_decoded_is_refused_with_the_reason(make, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an older release knows no newer name
        model = make()
    with pytest.raises(TokenExitError, match=message):
        tet.wrap_decoder(model, PLAN, num_classes=3)


@pytest.mark.parametrize("name", ["EoMT", "Depth Anything"])
def test_attention_that_is_changed_after_wrapping_is_refused_in_a_call(name):
    model = DECODERS[name].make()
    wrapped = exiting(model)
    model.set_attn_implementation("eager")
    with pytest.raises(TokenExitError, match=r"`model` must attend by \"sdpa\""):
        wrapped(models.images(1, SIZE))


def test_the_other_wraps_say_which_takes_it_and_nothing_is_wrapped_twice():
    model = DECODERS["EoMT"].make()
    for wrap in (functools.partial(tet.wrap, num_classes=2), tet.wrap_gates):
        with pytest.raises(
            TokenExitError,
            match="`model` must feed no decoder of its own, which `wrap_decoder` takes, and `load` with kind='decoder', go",
        ):
            wrap(model)
    with pytest.raises(TokenExitError, match="`model` must not be wrapped already"):
        tet.wrap_decoder(exiting(model), PLAN)


def test_a_model_without_classes_asks_for_them():
    with pytest.raises(
        TokenExitError, match="`num_classes` must be a whole .*, for the model has no classes, got None"
    ):
        tet.wrap_decoder(DECODERS["DPT, depth"].make(), PLAN)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("decoder", "options", "message"),
    [
        (
            nn.Conv2d(64, 5, 1),
            {},
            r"a feature map of shape \(images, 48, 4, 6\), as `taps=\(6,\)` says, got the error: .*64",
        ),
        (
            nn.Conv2d(48, 5, 1),
            {"taps": (3, 6)},
            r"a list of 2 feature maps \(images, 48, 4, 6\), as `taps=\(3, 6\)` says",
        ),
        (
            nn.Conv2d(48, 5, 1),
            {"reads": "patches and prefix"},
            "a feature map .*, and as many of prefix tokens, as `taps",
        ),
        (
            nn.Conv2d(48, 5, 1).double(),
            {},
            r"a feature map .* says, on cpu in torch.float32 \(`.to\('cpu', torch.float32",
        ),
    ],
)
def test_a_decoder_that_cannot_read_the_maps_is_named(decoder, options, message):
    with pytest.raises(TokenExitError, match=f"`decoder` must take {message}"):
        tet.wrap(models.timm_vit(), schedule.merged(depth=6), decoder=decoder, **options)


@pytest.mark.usefixtures("unchecked")
def test_one_tap_in_place_of_several_is_named():
    for wrap in (tet.wrap_gates, lambda model, **taps: tet.wrap(model, decoder=nn.Conv2d(48, 5, 1), **taps)):
        with pytest.raises(TokenExitError, match=r"`taps` must be several blocks, as \(6, 12\), got 6"):
            wrap(models.timm_vit(), taps=6)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("EoMT", (64, 64), "its masks are of images of 32 x 32"),
        ("EoMT-DINOv3", (32, 64), "its masks are of images of 32 x 32"),
        ("DPT, depth", (32, 48), "its maps are square, which 4 x 6 patches are not"),
    ],
)
def test_images_of_a_size_that_the_model_cannot_take_are_refused(name, size, message):
    wrapped = exiting(DECODERS[name])
    with pytest.raises(
        TokenExitError, match=f"`images` must have a size that the model takes, as .*, got .*: {message}"
    ):
        wrapped(models.images(1, size))


@torch.no_grad()
def test_blocks_behind_the_last_tap_are_not_run():
    wrapped, ran = exiting(DECODERS["DPT, depth"]), []
    model = wrapped.model
    assert wrapped.depth == DEPTH - 1
    for index, block in enumerate(model.dpt.encoder.layer):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    wrapped(models.images(1, SIZE), schedule=told(1))
    assert ran == [*range(DEPTH - 1)]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"return_dict": False}, "`return_dict` must be True or left out, got False"),
        ({"output_hidden_states": True}, "`output_hidden_states` must be False or left out, .*, got True"),
        ({"output_attentions": True}, "`output_attentions` must be False or left out, .*, got True"),
    ],
)
@pytest.mark.parametrize("name", ["EoMT", "DPT, segmentation"])
def test_what_a_model_cannot_be_asked_for(name, inputs, message):
    model = tet.wrap_decoder(DECODERS[name].make(), schedule.paumer(keep={1: 0.5}))
    with pytest.raises(TokenExitError, match=message):
        model(models.images(1, SIZE), **inputs)
    model(models.images(1, SIZE), return_dict=True)


def test_exit_heads_of_one_class_are_refused_also_if_the_model_has_one():
    one = r"`num_classes` must be a whole number from 2 to 1000000.* \(the softmax of one is always 1, .*\), got"
    with pytest.raises(TokenExitError, match=f"{one} 1"):
        tet.wrap_decoder(DECODERS["DPT, depth"].make(), schedule.paumer(keep={1: 0.5}), num_classes=1)
    binary = DECODERS["DPT, segmentation"].make()
    binary.config.num_labels = 1
    with pytest.raises(TokenExitError, match=f"{one} 1"):
        tet.wrap_decoder(binary, schedule.paumer(keep={1: 0.5}))


def test_a_decoding_model_without_a_plan_merges_as_under_a_decoder():
    model = tet.wrap_decoder(DECODERS["Depth Anything"].make())
    assert model.schedule == schedule.merged(depth=model.depth)


def test_a_plan_that_carries_translations_asks_for_translators():
    vit, decoder = models.timm_vit(), torch.nn.Conv2d(48, 4, 1)
    with pytest.raises(TokenExitError, match=r"`exit_heads` must translate for this schedule, .*heads.Translator\(\)"):
        tet.wrap(vit, schedule.foretold(depth=6), decoder=decoder)


def test_a_decoder_that_is_given_says_which_kind_is_loaded(tmp_path):
    decoder = torch.nn.Conv2d(48, 4, 1)
    model = tet.wrap(models.timm_vit(), schedule.merged(alike={2: 0.8}), decoder=decoder).eval()
    tet.save(model, tmp_path)
    again = tet.load(models.timm_vit(), tmp_path, decoder=decoder)
    assert isinstance(again, tet.DecodingModel)
    assert again.schedule == model.schedule
