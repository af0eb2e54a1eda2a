"""Translators: leavers leave what the last block would have made of them."""

import dataclasses
import json

import onnxruntime
import pytest
import torch
from torch import nn

import tokenexit_torch as tet
from tests.torch import models
from tests.torch.fits import Again, same, stopping, weights_of
from tokenexit import TokenExitError, cost, schedule
from tokenexit.carries import Feature, Translated
from tokenexit.heads import ATM, MLP, Neighbourhood, Translator
from tokenexit.policies import Budget, ConfidenceAbove, ErrorBelow, NeighboursAgree
from tokenexit.schedule import Exit, Merge, Schedule
from tokenexit_torch.heads import TokenTranslator, build

EXITS = (Exit(2, ConfidenceAbove(0.5)), Exit(4, ConfidenceAbove(0.5)))
PLAN = Schedule(EXITS, Translated())
MERGING = Schedule(
    (Exit(4, ConfidenceAbove(0.5)),),
    Translated(),
    merges=(Merge(1, 2, 0.9), Merge(2, 4, 0.2, NeighboursAgree(0.3, radius=1))),
)
PLANS = {
    "translated": PLAN,
    "folded": Schedule(EXITS, Translated(fold_above=0.1)),
    "budgets": Schedule((Exit(2, Budget(0.6)), Exit(4, Budget(0.3))), Translated()),
    "merging": MERGING,
}
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))


def translating(plan=PLAN, host="timm", *, random=True):
    """A model with translators, random ones unless they are to give tokens back as they are."""
    model = translating_once(host, random)
    model.retune(plan)
    return model


@models.once
def translating_once(host, random):
    made = {"timm": models.timm_vit, "plain": models.plain_host}[host]()
    torch.manual_seed(3)
    model = tet.wrap(made, schedule.dense(after=(2, 4)), num_classes=models.CLASSES, exit_heads=Translator(24)).eval()
    with torch.no_grad():
        model.head[-1].weight.mul_(12)
        for head in model.exit_heads.values() if random else ():
            head.mlp[3].weight.normal_(std=0.3)
            head.skip.weight.add_(0.1 * torch.randn_like(head.skip.weight))
    return model


def test_a_new_translator_gives_tokens_back_and_is_built_from_its_plan():
    torch.manual_seed(0)
    head, tokens = build(Translator(), width=8, classes=3), torch.randn(2, 5, 8)
    assert isinstance(head, TokenTranslator)
    assert torch.equal(head(tokens), tokens)
    assert head.mlp[1].weight.shape == (16, 8)
    head.mlp[3].weight.data.normal_()
    wanted = head.skip(tokens) + head.mlp[3](nn.functional.gelu(head.mlp[1](head.mlp[0](tokens))))
    torch.testing.assert_close(head(tokens), wanted)


@pytest.mark.parametrize("fold", [None, 0.1])
@torch.inference_mode()
def test_identical_translators_leave_the_raw_features(fold):
    model, images = translating(random=False), models.images(3)
    translated = model(images, schedule=Schedule(PLAN.exits, Translated(fold)))
    raw = model(images, schedule=Schedule(PLAN.exits, Feature(fold_above=fold)))
    assert len(raw.exit_depth.unique()) == 3
    assert torch.equal(translated.exit_depth, raw.exit_depth)
    torch.testing.assert_close(translated.logits, raw.logits)


@torch.inference_mode()
def test_class_scores_are_the_final_heads_on_the_translation():
    """Where a token leaves, and whenever every head is read; so frozen predictions are what the final head says again."""
    model, images = translating(), models.images(3)
    out, every, patches = model(images), model.every_exit(images), model.patches_after(images)
    for after in (2, 4):
        translation = model.exit_heads[str(after)](patches[after])
        wanted = model.head(model.model.norm(translation)).mT.unflatten(2, (4, 6))
        torch.testing.assert_close(every[after], wanted, rtol=1e-4, atol=1e-4)
    first = out.exit_depth == 2
    assert first.any()
    torch.testing.assert_close(out.logits.movedim(1, -1)[first], every[2].movedim(1, -1)[first], rtol=1e-4, atol=1e-4)
    frozen = model(images, schedule=Schedule(PLAN.exits))
    assert (frozen.head_on, out.head_on) == ("running", "all")
    assert torch.equal(frozen.exit_depth, out.exit_depth)
    torch.testing.assert_close(frozen.logits, out.logits, rtol=1e-4, atol=1e-4)
    cut = model(images, schedule=Schedule(schedule.truncated(after=4).exits, Translated()))
    torch.testing.assert_close(cut.logits, every[4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(images, schedule=schedule.dense()).logits, every[6], rtol=1e-4, atol=1e-4)
    traced = tet.trace(model, images, progress=iter).replay(Schedule(schedule.truncated(after=4).exits))
    torch.testing.assert_close(traced.logits, every[4], rtol=1e-4, atol=1e-4)


@each_plan
@torch.inference_mode()
def test_a_batch_is_each_image_alone_and_static_and_mixed_are_packed(plan):
    model, images = translating(plan), models.pictures(3)
    out = model(images)
    assert len(out.exit_depth.unique()) > 1
    for index in range(3):
        alone = model(images[index : index + 1])
        assert torch.equal(alone.exit_depth[0], out.exit_depth[index])
        torch.testing.assert_close(alone.logits[0], out.logits[index], rtol=1e-4, atol=1e-4)
    static = tet.StaticModel(model, capacities=1.0)(images)
    assert torch.equal(static.exit_depth, out.exit_depth)
    torch.testing.assert_close(static.logits, out.logits, rtol=1e-4, atol=1e-4)
    if plan.carry == Translated():
        plain = translating(plan, "plain")
        sizes = [images[0], models.pictures(1, (40, 24))[0], images[1]]
        for mixed, image in zip(plain.mixed(sizes), sizes, strict=True):
            torch.testing.assert_close(mixed.logits, plain(image[None]).logits, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_what_has_merged_shares_the_translation_of_its_owner():
    model, images = translating(MERGING), torch.ones(1, 3, 32, 48)
    model.model.pos_embed.mul_(0.0)
    images[..., :16, :16] = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    plan = Schedule((Exit(4, ConfidenceAbove(0.0)),), Translated(), merges=(Merge(1, 2, 0.99),))
    out = model(images, schedule=plan)
    assert (out.exit_depth == 4).all()
    assert out.tokens_per_block[0, 1] == 1 + 4 + 5
    cells = out.logits[0].unflatten(2, (3, 2)).unflatten(1, (2, 2))
    assert (cells == cells[:, :, :1, :, :1])[:, 1].all()  # the lower row of cells has merged


@torch.inference_mode()
def test_for_lack_of_room_at_a_merge_tokens_leave_their_latest_translation():
    plan = Schedule((Exit(2, ConfidenceAbove(0.9)),), Translated(), merges=(Merge(3, 2, 1.0),))
    model, images = translating(plan), models.images(2)
    static = tet.StaticModel(model, capacities={2: 1.0, 3: 0.12, 4: 1.0})(images)
    assert (static.overflow > 0).all()
    late = (static.exit_depth == 3)[:, None].expand_as(static.logits)
    assert late.any()
    first = model.every_exit(images)[2]
    merged = static.exit_depth.flatten(1).eq(3).sum(1)
    assert (merged > 0).all()
    close = torch.isclose(static.logits, first, rtol=1e-3, atol=1e-3).all(dim=1)
    assert (close & (static.exit_depth == 3)).any()


@pytest.mark.usefixtures("unchecked")
@torch.no_grad()
def test_translations_rejoin_in_exported_programs():
    plan = Schedule(EXITS[:1], Translated(fold_above=0.1))
    made = tet.wrap(models.timm_vit(depth=3), plan, num_classes=models.CLASSES, exit_heads=Translator(8)).eval()
    made.head[-1].weight.mul_(12)
    made.exit_heads["2"].mlp[3].weight.normal_(std=0.3)
    images, static = models.images(2), tet.StaticModel(made, capacities=0.8)
    wanted = static(images)
    assert (wanted.exit_depth == 2).any()
    logits, *_ = tet.export_program(static, images).module()(images)
    torch.testing.assert_close(logits, wanted.logits, rtol=1e-5, atol=1e-5)


def test_what_an_exit_costs_is_the_translator_and_the_final_head():
    model, images = translating(), models.images(1)
    with torch.inference_mode():
        out = model(images)
    ran = out.tokens_per_block[0] - 1
    final = cost.of_head(MLP(), width=48, classes=5)
    exit_head = cost.of_head(Translator(24), width=48, classes=5, final=final)
    vit = cost.plain_vit(width=48, depth=6, patch=8, prefix=1, exit_heads={2: exit_head, 4: exit_head}, head=final)
    wanted = vit.multiply_adds(out.tokens_per_block, patches=24, exits=out.exits, head_on="all")
    assert model.multiply_adds(out).tolist() == wanted.tolist()
    assert ran[1] > ran[2]


def test_gradients_reach_translators_through_what_rejoins():
    model, images = translating().train(), models.images(2)
    stages = tet.Staged(model)(images)
    assert sorted(stages.logits) == [2, 4, 6]
    stages.logits[6].square().sum().backward()
    assert all(head.skip.weight.grad.abs().sum() > 0 for head in model.exit_heads.values())


def fitted(images, plan=None, **options):
    model = translating(schedule.dense(after=(2, 4)) if plan is None else plan, random=False)
    return model, tet.fit_exits(model, images, **{"steps": 150, "patches_per_step": 96, "progress": iter} | options)


def missed(model, images):
    """Squared errors behind the final norm, relative to each channel's variance, by exit; and the agreement."""
    with torch.no_grad():
        patches, every = model.patches_after(images), model.every_exit(images)
    last = patches[6].flatten(0, 1)
    variance = last.var(dim=0, correction=0)
    error, agreement = {}, {}
    for after in (2, 4):
        with torch.no_grad():
            found = model.model.norm(model.exit_heads[str(after)](patches[after].flatten(0, 1)))
        error[after] = ((found - last).square() / variance).mean().item()
        agreement[after] = (every[after].argmax(1) == every[6].argmax(1)).float().mean().item()
    return error, agreement


def test_translators_are_fitted_to_tokens_of_the_last_block_and_nothing_else_changes():
    images = models.images(12)
    model = translating(random=False)
    before, _ = missed(model, images)
    frozen = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("exit_heads")}
    report = tet.fit_exits(model, images, steps=250, patches_per_step=96, progress=iter)
    error, agreement = missed(model, images)
    for after in (2, 4):
        assert error[after] < 0.25 * before[after]
        assert report.missed[after][6].error == pytest.approx(error[after], rel=1e-3)
        assert 0.5 < report.missed[after][6].variance < 1.05
        assert report.agreement[after] == pytest.approx(agreement[after], abs=1e-6)
        assert agreement[after] > 0.8
    assert all(torch.equal(model.state_dict()[name], value) for name, value in frozen.items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(part.training for part in model.modules())


def test_a_fit_leaves_images_held_out_alone_and_reports_what_is_missed_of_them():
    images = models.images(12)
    model, report = fitted(images, held_out=0.25, check_every=50)
    error, _ = missed(model, images[:9])
    assert {after: taps[6].error for after, taps in report.missed.items()} == pytest.approx(error, rel=1e-3)
    assert all(report.held_out.missed[after][6].error > taps[6].error for after, taps in report.missed.items())
    assert "translators miss" in str(report)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_and_inference_mode_are_no_obstacle(dtype):
    with torch.inference_mode():
        vit = models.timm_vit()
        model = tet.wrap(vit.to(dtype), schedule.dense(after=(2,)), num_classes=5, exit_heads=Translator()).eval()
        report = tet.fit_exits(model, models.images(6).to(dtype), steps=60, patches_per_step=64, progress=iter)
    assert all(p.dtype == dtype and p.isfinite().all() for p in model.exit_heads.parameters())
    assert report.missed[2][6].error < 0.5


@pytest.mark.parametrize("cache", ["disk", None])
def test_an_interrupted_fit_ends_as_if_it_had_not_been(cache, tmp_path):
    images = Again(models.images(4), models.images(3, seed=1), models.images(3, seed=2))
    where = tmp_path / "tokens" if cache == "disk" else cache
    options = {"held_out": 0.2, "check_every": 10, "steps": 20, "cache": where}
    straight, report = fitted(images, **options)
    model = translating(schedule.dense(after=(2, 4)), random=False)
    options |= {"patches_per_step": 96, "resume": tmp_path / "fit"}
    with pytest.raises(KeyboardInterrupt):
        tet.fit_exits(model, images, progress=stopping(13), **options)
    assert tet.fit_exits(model, images, progress=iter, **options) == report
    assert same(weights_of(model), weights_of(straight))


def test_rows_that_were_kept_without_the_last_block_are_refused(tmp_path):
    def fit(plan):
        model = tet.wrap(models.timm_vit(), schedule.dense(after=(2,)), head=nn.Linear(48, 5), exit_heads=plan)
        tet.fit_exits(model, models.images(2), steps=2, patches_per_step=8, cache=tmp_path, progress=iter)

    torch.manual_seed(0)
    fit(MLP())
    torch.manual_seed(0)
    with pytest.raises(TokenExitError, match="`cache` must be for the same exits"):
        fit(Translator())


def test_translators_are_fitted_to_the_dense_pass_on_tokens_as_they_merge():
    images = models.pictures(12)
    model, report = fitted(images, MERGING, steps=60)
    assert list(report.missed) == list(report.agreement) == [2, 4]
    plain, _ = fitted(images, steps=60)
    assert not torch.equal(plain.exit_heads["4"].skip.weight, model.exit_heads["4"].skip.weight)
    with torch.inference_mode():
        wanted = model(images, schedule=schedule.dense()).logits.argmax(1)
        cut = Schedule(schedule.truncated(after=4).exits, merges=MERGING.merges)
        merged, apart = model(images, schedule=cut), model(images, schedule=schedule.truncated(after=4))
    assert merged.tokens_per_block[:, 3].sum() < apart.tokens_per_block[:, 3].sum()
    agreement = (merged.logits.argmax(1) == wanted).float().mean().item()
    assert report.agreement[4] == pytest.approx(agreement, abs=1e-6)
    assert agreement != pytest.approx((apart.logits.argmax(1) == wanted).float().mean().item(), abs=1e-4)


@torch.inference_mode()
def test_translators_and_their_carry_are_saved_and_loaded(tmp_path):
    model, images = translating(), models.images(2)
    tet.save(model, tmp_path / "built")
    plan = json.loads((tmp_path / "built" / "exits.json").read_text())
    assert plan["plan"] == {"kind": "translator", "hidden": 24}
    again = tet.load(models.timm_vit(), tmp_path / "built").eval()
    assert again.schedule == PLAN
    assert torch.equal(again(images).logits, model(images).logits)
    head, own = nn.Linear(48, 5), {after: TokenTranslator(48, 8) for after in (2, 4)}
    given = tet.wrap(models.timm_vit(), PLAN, head=head, exit_heads=own).eval()
    own[2].mlp[3].weight.fill_(0.1)
    tet.save(given, tmp_path / "given")
    again = tet.load(
        models.timm_vit(), tmp_path / "given", head=head, exit_heads={after: TokenTranslator(48, 8) for after in own}
    ).eval()
    assert torch.equal(again(images).logits, given(images).logits)


def test_some_heads_may_translate_and_others_not():
    own = {2: TokenTranslator(48, 8), 4: nn.Linear(48, 5)}
    model = tet.wrap(models.timm_vit(), Schedule(EXITS), head=nn.Linear(48, 5), exit_heads=own).eval()
    assert model.translated_after == (2,)
    report = tet.fit_exits(model, models.images(4), steps=20, patches_per_step=32, progress=iter)
    assert list(report.agreement) == [2, 4]
    assert list(report.missed) == [2]
    with pytest.raises(
        TokenExitError, match=r"carry Translated only with exit heads that .*others after the blocks \[4\]"
    ):
        model.retune(PLAN)
    model.retune(Schedule(EXITS[:1], Translated()))
    assert model(models.images(1)).head_on == "all"


class Decoder(nn.Module):
    def forward(self, maps):
        return maps


@pytest.mark.parametrize(("make", "message"), [
    (lambda v: tet.wrap(v, PLAN, num_classes=5), "`schedule` must carry Translated only with exit heads that translate"),
    (lambda v: tet.wrap(v, PLAN, head=nn.Linear(48, 5), exit_heads={2: TokenTranslator(32, 5), 4: nn.Linear(48, 5)}),
     r"`exit_heads\[2\]` must take tokens of shape \(tokens, 48\)"),
    (lambda v: tet.wrap(v, PLAN, head=tet.heads.AttentionToMask(48, 5), exit_heads=Translator()),
     r"`exit_heads\[2\]` must be a mask head exactly if"),
    (lambda v: tet.wrap(v, PLAN, head=tet.heads.NeighbourhoodHead(48, 8, 5, radius=1), exit_heads=Translator()),
     r"`exit_heads\[2\]` must translate for a final head that treats each token by itself, got TokenTranslator beside N"),
    (lambda v: tet.wrap(v, PLAN, head=TokenTranslator(48, 8), exit_heads=Translator()), "`head` must translate for a final"),
    (lambda v: tet.wrap(v, schedule.dense(after=(2,)), decoder=Decoder(), num_classes=3, exit_heads=Translator()),
     "`num_classes` must be left out for translators, which give no class scores under a decoder, got 3"),
    (lambda v: tet.wrap(v, schedule.dense(), decoder=Decoder(),
                        exit_heads={2: TokenTranslator(48, 8), 4: nn.Linear(48, 3)}),
     "`exit_heads` must all translate under a decoder, or none, got some of each"),
    (lambda v: tet.wrap(v, schedule.dense(), decoder=Decoder(), taps=(3, 6), exit_heads={2: TokenTranslator(48, 8)}),
     r"`exit_heads\[2\]` must give 96 channels, for the 2 taps behind it, got 48"),
    (lambda v: tet.wrap(v, PLAN, decoder=Decoder(), exit_heads=Translator()),
     r"`schedule` must ask for no classes, .*policies that do after the blocks \[2, 4\]"),
    (lambda v: tet.wrap(v, schedule.foretold(radius={2: 1}), num_classes=5),
     r"`schedule` must compare foretold errors only at exit heads that translate: .*got others after the blocks \[2\]"),
    (lambda v: tet.wrap(v, PLAN, decoder=Decoder(), num_classes=3), "`schedule` must carry Translated only with exit heads"),
    (lambda v: tet.wrap_gates(v, gates=Translator()), "`gates` must be a plan of tokenexit.heads that treats each token by"),
    (lambda v: tet.wrap_gates(v, schedule.svit(after=(2,)), gates={2: TokenTranslator(48, 8)}),
     "`gates` must treat each token by itself, got a head that looks around tokens, or translates"),
])  # fmt: skip
def test_where_a_translation_makes_no_sense_it_is_refused(make, message):
    with pytest.raises(TokenExitError, match=message):
        make(models.timm_vit())


@pytest.mark.parametrize("plan", [ATM(), Neighbourhood(), MLP()])
def test_other_plans_build_final_heads_of_their_own_kind(plan):
    assert plan.final is plan
    assert Translator(7).final == MLP()
    assert dataclasses.replace(Translator(7), hidden=None) == Translator()


# Foretold errors, and decoders.

TAPS = (3, 6)
FORETOLD = Schedule((Exit(2, ErrorBelow(0.5, radius=1)), Exit(4, ErrorBelow(0.45, radius=0))), Translated())
FORETOLD_MERGING = Schedule(
    (Exit(4, ErrorBelow(0.45, radius=1)),),
    Translated(),
    merges=(Merge(1, 2, 0.9), Merge(2, 4, 0.0, ErrorBelow(0.6, radius=0))),
)


class Maps(nn.Module):
    """A decoder that hands on what it is given."""

    def forward(self, maps, *prefix):
        return (maps, *prefix) if prefix else maps


@models.once
def under_decoder(plan=FORETOLD, taps=TAPS, **options):
    made = models.timm_vit()
    torch.manual_seed(3)
    model = tet.wrap(made, plan, decoder=Maps(), taps=taps, exit_heads=Translator(24), **options).eval()
    with torch.no_grad():
        for head in model.exit_heads.values():
            head.mlp[3].weight.normal_(std=0.3)
            head.log_error.weight.normal_(std=0.5)
            head.log_error.bias.fill_(-0.7)
    return model


def by_token(maps):
    return maps.flatten(2).mT


@torch.inference_mode()
def test_the_foretold_error_is_a_rule_and_is_read_where_it_stands():
    model, images = translating(), models.images(3)
    with torch.no_grad():
        for head in model.exit_heads.values():
            head.log_error.weight.normal_(std=0.5)
            head.log_error.bias.fill_(-0.7)
    tokens = model.patches_after(images)
    told = {after: model.exit_heads[str(after)].foretell(tokens[after])[1].exp() for after in (2, 4)}
    limit = told[2].median().item()
    out = model(images, schedule=Schedule((Exit(2, ErrorBelow(limit, radius=0)),), Translated()))
    assert torch.equal(out.exit_depth.flatten(1) == 2, told[2] < limit)
    both = Schedule((Exit(2, ErrorBelow(limit, radius=0) & ConfidenceAbove(0.5)),), Translated())
    sure = model(images, schedule=Schedule(EXITS[:1])).exit_depth == 2
    assert torch.equal(model(images, schedule=both).exit_depth == 2, sure & (out.exit_depth == 2))
    half = model(images, schedule=Schedule((Exit(2, Budget(0.5, by="error")),), Translated()))
    assert (half.exit_depth == 2).flatten(1).sum(1).tolist() == [12] * 3
    last = told[2].masked_fill(half.exit_depth.flatten(1) != 2, 0).amax(1)
    assert (last <= told[2].masked_fill(half.exit_depth.flatten(1) == 2, 9).amin(1)).all()
    replayed = tet.trace(model, images, progress=iter).replay(Schedule((Exit(2, ErrorBelow(limit)),)))
    assert torch.equal(replayed.exit_depth, model(images, schedule=Schedule((Exit(2, ErrorBelow(limit)),))).exit_depth)


@pytest.mark.parametrize("features", ["normalised", "raw"])
@torch.inference_mode()
def test_a_decoder_is_given_a_translation_for_each_tap_behind_the_exit(features):
    model, images = under_decoder(features=features), models.images(2)
    vit, dim = model.host.module.vit, model.host.width
    assert [head.targets for head in model.exit_heads.values()] == [2, 1]
    dense = model(images, schedule=schedule.dense()).decoded
    cut = {after: Schedule(schedule.truncated(after=after).exits, Translated()) for after in (2, 4)}
    read = vit.norm if features == "normalised" else nn.Identity()
    early, late = (model(images, schedule=cut[after]).decoded for after in (2, 4))
    blocks = model.patches_at_taps(images)[0]
    for tap, found in enumerate(early):
        wanted = read(model.exit_heads["2"](blocks[2])[..., tap * dim : (tap + 1) * dim])
        torch.testing.assert_close(by_token(found), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(late[0], dense[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_token(late[1]), read(model.exit_heads["4"](blocks[4])), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", [FORETOLD, FORETOLD_MERGING], ids=["exits", "merging"])
@torch.inference_mode()
def test_under_a_decoder_a_batch_is_each_image_alone_and_static_is_packed(plan):
    model, images = under_decoder(), models.pictures(3)
    model.retune(plan)
    out = model(images)
    assert len(out.exit_depth.unique()) > 1
    if plan.merges:
        assert (out.merged_size > 1).any()
    alone = [model(images[index : index + 1]) for index in range(3)]
    assert torch.equal(torch.cat([one.exit_depth for one in alone]), out.exit_depth)
    static = tet.StaticModel(model, capacities=1.0)(images)
    assert torch.equal(static.exit_depth, out.exit_depth)
    for tap, found in enumerate(out.decoded):
        torch.testing.assert_close(torch.cat([one.decoded[tap] for one in alone]), found, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(static.decoded[tap], found, rtol=1e-4, atol=1e-4)
    assert (model.multiply_adds(out) < model.multiply_adds(model(images, schedule=schedule.dense()))).all()
    parts = {after: cost.of_head(Translator(24), width=48, targets=taps) for after, taps in ((2, 2), (4, 1))}
    vit = cost.plain_vit(width=48, depth=6, patch=8, prefix=1, exit_heads=parts, head=cost.HeadCost(0))
    wanted = vit.multiply_adds(out.tokens_per_block, patches=24, exits=out.exits, head_on="all")
    assert model.multiply_adds(out).tolist() == wanted.tolist()


@torch.inference_mode()
def test_a_tap_at_an_exit_has_the_tokens_themselves_and_the_decoder_the_first_prefix_token():
    model = under_decoder(FORETOLD, (4, 6), reads="patches and prefix")
    images, cut = models.images(2), Schedule(schedule.truncated(after=4).exits, Translated())
    (early, late), (first, last) = model(images, schedule=cut).decoded
    (dense, _), (cls, _) = model(images, schedule=schedule.dense()).decoded
    torch.testing.assert_close(early, dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first, cls, rtol=1e-4, atol=1e-4)
    assert late.shape == early.shape
    assert last.shape == cls.shape


def test_translators_under_a_decoder_are_fitted_to_every_tap_and_foretell_their_errors():
    images = models.pictures(12)
    model = under_decoder()
    with torch.no_grad():
        for head in model.exit_heads.values():
            head.mlp[3].weight.zero_()
            head.log_error.weight.zero_()
            head.log_error.bias.zero_()
    options = {"patches_per_step": 96, "progress": iter}
    report = tet.fit_exits(model, images, steps=150, held_out=0.25, check_every=150, **options)
    assert {after: list(taps) for after, taps in report.missed.items()} == {2: [3, 6], 4: [6]}
    assert report.agreement == report.held_out.agreement == {}
    assert report.missed[2][3].error < report.missed[2][6].error < 0.6
    assert "predict" not in str(report)
    with torch.inference_mode():
        patches = model.patches_at_taps(images[9:])[0]
        norm, dim = model.host.module.vit.norm, model.host.width
        fitted = norm(model.patches_at_taps(images[:9])[0][6].unflatten(-1, (2, dim))).flatten(0, 1)
        wish, variance = norm(patches[6].unflatten(-1, (2, dim))), fitted.var(dim=0, correction=0)
        translated, log_error = model.exit_heads["2"].foretell(patches[2])
        error = ((norm(translated.unflatten(-1, (2, dim))) - wish).square() / variance).mean(-1).amax(-1).log()
    assert log_error.mean().item() == pytest.approx(error.mean().item(), abs=1e-3)
    assert torch.corrcoef(torch.stack([log_error.flatten(), error.flatten()]))[0, 1] > 0.3
    with pytest.raises(TokenExitError, match="`targets` must be left out for translators, which give no class scores"):
        tet.fit_exits(model, images, targets=lambda found: found, **options)
    with pytest.raises(TokenExitError, match="`images` must come without labels for translators that give no class"):
        tet.fit_exits(model, [(images, torch.zeros(12, 32, 48, dtype=torch.int64))], steps=1, **options)


@torch.inference_mode()
def test_translators_under_a_decoder_are_saved_and_loaded_with_their_taps(tmp_path):
    model, images = under_decoder(), models.images(2)
    tet.save(model, tmp_path)
    again = tet.load(models.timm_vit(), tmp_path, kind="decoder", decoder=Maps(), taps=TAPS).eval()
    assert again.schedule == FORETOLD
    for found, wanted in zip(again(images).decoded, model(images).decoded, strict=True):
        assert torch.equal(found, wanted)
    with pytest.raises(
        TokenExitError, match=r"`taps` must be the taps of the saved translators, \(3, 6\), got \(2, 6\)"
    ):
        tet.load(models.timm_vit(), tmp_path, kind="decoder", decoder=Maps(), taps=(2, 6))
    assert isinstance(tet.load(models.timm_vit(), tmp_path, decoder=Maps(), taps=(3, 6)), tet.DecodingModel)


@torch.inference_mode()
def test_foretold_errors_are_float32_under_autocast():
    model, images = under_decoder(), models.images(2)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images)
    assert all(one.isfinite().all() for one in out.decoded)
    assert len(out.exit_depth.unique()) > 1
    assert (
        model.exit_heads["2"].to(torch.bfloat16).foretell(torch.ones(1, 48, dtype=torch.bfloat16))[1].dtype
        == torch.float32
    )


@torch.inference_mode()
def test_foretold_errors_have_a_default_ladder_for_a_certificate():
    plans, chains = tet.default_settings(under_decoder())
    ladder, cut = ([plans[place] for place in chain] for chain in chains)
    assert all(one.carry == Translated() for one in plans)
    assert FORETOLD in ladder
    assert [one.after for one in cut] == [(4,), (2,)]
    limits = [one.exits[0].policy.threshold for one in ladder]
    assert limits == sorted(limits)
    assert limits[0] < 0.1 < 0.9 < limits[-1]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # of PyTorch's own exporter
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
def test_translations_for_a_decoder_are_exported(tmp_path):
    made = tet.wrap(
        models.timm_vit(depth=3), schedule.foretold(radius={1: 1}, threshold=1.0), decoder=Maps(), taps=(2, 3),
        exit_heads=Translator(8),
    ).eval()  # fmt: skip
    made.exit_heads["1"].log_error.weight.normal_(std=0.5)
    made.exit_heads["1"].log_error.bias.fill_(-0.7)
    images, static = models.images(2), tet.StaticModel(made, capacities=0.8)
    wanted = static(images)
    assert (wanted.exit_depth == 1).any()
    tet.export_onnx(static, images, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    for one, other in zip(found, wanted.decoded, strict=False):
        torch.testing.assert_close(torch.from_numpy(one), other, rtol=1e-4, atol=1e-4)


class Blurred(nn.Module):
    """A decoder that minds a few directions of its features alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.read = nn.Conv2d(48, 2, 3, padding=1)

    def forward(self, maps):
        return {"scores": 9 * self.read(maps).tanh(), "size": maps.shape[-1]}


def blurred(loss=None, steps=0, **options):
    torch.manual_seed(3)
    plan = Schedule((Exit(2, Budget(0.4, by="error")),), Translated())
    model = tet.wrap(models.timm_vit(), plan, decoder=Blurred(), exit_heads=Translator(24)).eval()
    options = {"steps": 40, "patches_per_step": 96, "decoder_steps": steps, "decoder_loss": loss} | options
    return model, tet.fit_exits(model, models.pictures(8), progress=iter, **options)


def test_steps_through_the_decoder_change_its_output_less_and_the_network_not_at_all():
    model, report = blurred(steps=30)
    before, after = report.decoded
    assert after < 0.9 * before
    with torch.inference_mode():
        images = models.pictures(8)
        found, dense = (model(images, schedule=plan).decoded["scores"] for plan in (None, Schedule()))
        pairs = zip(found.split(2), dense.split(2), strict=True)
        wanted = [(one - other).square().mean() / other.var() for one, other in pairs]
    assert after == pytest.approx(torch.stack(wanted).mean().item(), rel=1e-3)
    plain, _ = blurred()
    own, other = (
        {name: value for name, value in one.state_dict().items() if not name.startswith("exit_heads")}
        for one in (model, plain)
    )
    assert all(torch.equal(value, other[name]) for name, value in own.items())
    assert all(one.grad is None and one.requires_grad for one in model.parameters())
    _, by_mine = blurred(lambda found, dense: (found["scores"] - dense["scores"]).abs().mean(), steps=2)
    assert by_mine.decoded[0] != pytest.approx(before)
    for message, options in (
        ("`decoder_loss` must give a tensor without axes", {"loss": lambda found, dense: 1.0, "steps": 1}),
        ("`decoder_loss` must be given with `decoder_steps`, got 0", {"loss": lambda found, dense: 1.0}),
    ):
        with pytest.raises(TokenExitError, match=message):
            blurred(**options)


def test_an_interrupted_fit_through_the_decoder_ends_as_if_it_had_not_been(tmp_path):
    def stopping_in_the_second(loop):
        for turn, item in enumerate(loop):
            if isinstance(loop, range) and len(loop) == 5 and turn == 3:
                raise KeyboardInterrupt
            yield item

    def fit(progress, **options):
        torch.manual_seed(3)
        plan = Schedule((Exit(2, Budget(0.4, by="error")),), Translated())
        model = tet.wrap(models.timm_vit(), plan, decoder=Blurred(), exit_heads=Translator(24)).eval()
        recipe = {"steps": 6, "check_every": 3, "patches_per_step": 32, "decoder_steps": 5, "held_out": 0.25}
        return model, tet.fit_exits(model, models.pictures(8), progress=progress, **recipe, **options)

    straight, report = fit(iter)
    with pytest.raises(KeyboardInterrupt):
        fit(stopping_in_the_second, resume=tmp_path)
    model, resumed = fit(iter, resume=tmp_path)
    assert resumed == report
    assert same(weights_of(model), weights_of(straight))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: translating(), "`decoder_steps` must be 0 without translators under a decoder, got ExitingModel"),
    (lambda: under_decoder(schedule.dense(after=(2,))), "`decoder_steps` must be 0 for a plan in which no token leaves"),
    (lambda: under_decoder().half(), "`decoder_steps` must be 0 for weights in half precision"),
])  # fmt: skip
def test_a_decoder_that_nothing_can_be_fitted_through_is_refused(make, message):
    with pytest.raises(TokenExitError, match=message):
        tet.fit_exits(make(), models.images(2), decoder_steps=2, progress=iter)
