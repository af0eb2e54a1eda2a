"""Merging in PyTorch: packed rows against each image by itself, entry by entry; and under decoders."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import tokenexit_torch as tet
from tests.core import oracles
from tests.torch import hosts, models
from tests.torch.models import pictures
from tokenexit import TokenExitError, schedule
from tokenexit.carries import Feature
from tokenexit.guarantees.calibrate import Risk
from tokenexit.policies import Budget, ConfidenceAbove, NeighboursAgree, Patience
from tokenexit.schedule import Exit, Merge, Schedule
from tokenexit_torch.attention import attending_per_image

GRID = (4, 6)


@torch.no_grad()
def alone(model, image, merges, *, counted):
    """One image by itself: cells one at a time, attention over its entries, in plain rows."""
    host, depth = model.host, model.depth
    embedded = host.embed(image)
    tokens, prefix = embedded.tokens[0], embedded.prefix
    slots = len(tokens)
    cells = oracles.Cells.alone(np.ones((1, slots), bool), embedded.grid)
    held, entries = tokens.clone(), torch.arange(slots)
    for block in range(depth):
        sizes = torch.as_tensor(cells.size[0])[entries].float()
        with attending_per_image([len(entries)], token_size=sizes if counted else None):
            held[entries] = host.run(block, held[entries][None], None)[0]
        for merge in merges:
            if merge.after == block + 1:
                assert cells.merge(held.numpy()[None], merge.side, merge.alike, None, None, near=1e-5)
                held = torch.as_tensor(cells.features[0]).float()
                entries = torch.as_tensor(np.flatnonzero(cells.running[0]))
    every = host.finish(held)[torch.as_tensor(cells.owner[0].copy())]
    return model.head(every[prefix:]), len(entries)


SIMILAR = (Merge(1, 2, 0.9), Merge(3, 4, 0.8))
HOSTS = {"timm": models.timm_vit, "no cls": lambda: models.timm_vit(prefix=0), "plain": models.plain_host}
each_host = pytest.mark.parametrize("host", HOSTS)


@each_host
def test_a_packed_pass_is_that_of_each_image_by_itself(host):
    model, images = models.wrapped(HOSTS[host](), schedule.dense(after=(2,))), pictures()
    with torch.inference_mode():
        out = model(images, schedule=Schedule(merges=SIMILAR))
    for image, logits, ran in zip(images, out.logits, out.tokens_per_block, strict=True):
        wanted, entries = alone(model, image[None], SIMILAR, counted=True)
        torch.testing.assert_close(logits.flatten(1).T, wanted, rtol=1e-4, atol=1e-4)
        assert ran[-1] == entries
    assert len(set(out.tokens_per_block[:, -1].tolist())) > 1  # each as it likes
    assert (out.exit_depth == model.depth).all()
    assert (out.tokens_per_block[:, 0] == out.tokens_per_block.max()).all()


@each_host
@torch.inference_mode()
def test_where_nothing_merges_nothing_changes(host):
    model, images = models.wrapped(HOSTS[host](), schedule.dense(after=(2,))), pictures()
    nothing = Schedule(merges=(Merge(1, 2, 1.0), Merge(2, 8, agreed=ConfidenceAbove(1.0))))
    torch.testing.assert_close(model(images, schedule=nothing).logits, model(images).logits, rtol=1e-5, atol=1e-5)


PLANS = {
    "similar": Schedule(merges=SIMILAR),
    "agreed, then exits": Schedule(
        (Exit(4, NeighboursAgree(0.5, radius=1).retaining(per_class=1)),),
        merges=(Merge(1, 2, 0.9), Merge(2, 4, 0.2, NeighboursAgree(0.3, radius=1))),
    ),
    "exits, then merges": Schedule((Exit(2, ConfidenceAbove(0.6)),), merges=(Merge(3, 4, 0.7),)),
    "both at once": Schedule((Exit(3, ConfidenceAbove(0.6)),), merges=(Merge(3, 4, agreed=ConfidenceAbove(0.4)),)),
    "features rejoin": Schedule((Exit(3, Budget(0.5)),), Feature("last block"), merges=(Merge(1, 2, 0.9),)),
}
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))


@each_plan
@torch.inference_mode()
def test_an_image_is_what_it_is_alone(plan):
    model, images = models.wrapped(models.timm_vit, schedule.dense(after=(2, 3, 4))), pictures(4)
    together = model(images, schedule=plan)
    assert together.tokens_per_block.min() < together.tokens_per_block.max()
    for at in range(len(images)):
        one = model(images[at : at + 1], schedule=plan)
        torch.testing.assert_close(together.logits[at : at + 1], one.logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(together.exit_depth[at : at + 1], one.exit_depth)
        assert torch.equal(together.tokens_per_block[at : at + 1], one.tokens_per_block)


@each_plan
@torch.inference_mode()
def test_images_of_several_sizes_merge_in_one_row(plan):
    model = models.wrapped(models.plain_host, schedule.dense(after=(2, 3, 4)))
    images = [pictures(1)[0], pictures(1, (40, 32))[0], pictures(2)[1]]
    found = model.mixed(images, schedule=plan)
    for image, own in zip(images, found, strict=True):
        one = model(image[None], schedule=plan)
        torch.testing.assert_close(own.logits, one.logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(own.tokens_per_block, one.tokens_per_block)


@torch.inference_mode()
def test_members_leave_with_their_owner_and_have_its_outcome():
    model, images = models.wrapped(models.timm_vit, schedule.dense(after=(2, 3, 4))), torch.ones(1, 3, 32, 48)
    images[..., :16, :16] = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        vit = model.model
        vit.pos_embed.mul_(0.0)
    plan = Schedule((Exit(4, ConfidenceAbove(0.1)),), merges=(Merge(1, 2, 0.99),))
    out = model(images, schedule=plan)
    cells = out.logits[0].unflatten(2, (3, 2)).unflatten(1, (2, 2))
    assert (cells == cells[:, :, :1, :, :1])[:, 1].all()  # the lower row of cells has merged
    assert out.tokens_per_block[0, 1] == 1 + 4 + 5
    dense = model(images)
    assert (dense.exit_depth == 6).all()
    assert (out.exit_depth == 4).all()


@torch.inference_mode()
def test_the_prediction_of_the_present_head_is_no_earlier_one():
    """Of one head alone no class can have lasted, whether or not there is an exit beside the merge."""
    model, images = models.wrapped(models.timm_vit, schedule.dense(after=(2, 3, 4))), pictures()
    lasting = (Merge(3, 2, agreed=Patience(1)),)
    beside = Schedule((Exit(3, ConfidenceAbove(1.0)),), merges=lasting)
    before = Schedule((Exit(2, ConfidenceAbove(1.0)),), merges=lasting)
    for plan, merges in ((Schedule(merges=lasting), False), (beside, False), (before, True)):
        assert (model(images, schedule=plan).tokens_per_block[:, -1] < 25).any() == merges


def test_gradients_reach_all_tokens_of_a_cell():
    model = models.wrapped(models.timm_vit, Schedule(merges=(Merge(1, 2, -1.0),)))
    images = pictures(1).requires_grad_()
    model(images).logits[0, 0, 0, 0].backward()
    assert (images.grad.abs().sum(dim=1).unfold(1, 8, 8).unfold(2, 8, 8).sum(dim=(-1, -2)) > 0).all()


@pytest.mark.parametrize("name", ["timm DINOv3", "timm rotary, by block", "transformers DINOv3"])
@torch.inference_mode()
def test_rotary_positions_are_those_of_the_centroid(name):
    foreign = hosts.FOREIGN[name]
    model = tet.wrap(foreign.make(), schedule.dense(after=(1,)), num_classes=3).eval()
    images = pictures(2, hosts.SIZE)
    every = Schedule(merges=(Merge(1, 2, -1.0),))
    nothing = Schedule(merges=(Merge(1, 2, 1.0),))
    torch.testing.assert_close(model(images, schedule=nothing).logits, model(images).logits, rtol=1e-4, atol=1e-4)
    out, one = model(images, schedule=every), model(images[:1], schedule=every)
    torch.testing.assert_close(out.logits[:1], one.logits, rtol=1e-4, atol=1e-4)
    assert (out.tokens_per_block[:, 1] == foreign.prefix + 4).all()


class Convolving(nn.Module):
    """A decoder of two convolutions, which also reads prefix tokens if it is given any."""

    def __init__(self, dim, maps=1):
        super().__init__()
        self.first = nn.ModuleList(nn.Conv2d(dim, 8, 3, padding=1) for _ in range(maps))
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, maps, prefix=None):
        maps = maps if isinstance(maps, list) else [maps]
        found = sum(first(one) for first, one in zip(self.first, maps, strict=True))
        if prefix is not None:
            found = found + sum(one.mean() for one in (prefix if isinstance(prefix, list) else [prefix]))
        return {"map": self.last(found.relu())}


def dense_map(vit, images, decoder):
    return decoder(vit.forward_features(images)[:, 1:].transpose(1, 2).unflatten(2, GRID))["map"]


@torch.inference_mode()
def test_a_decoder_reads_the_last_block_of_every_token():
    torch.manual_seed(0)
    vit, decoder, images = models.timm_vit(), Convolving(48).eval(), pictures()
    model = tet.wrap(vit, Schedule(merges=SIMILAR), decoder=decoder)
    out = model(images)
    wanted = dense_map(vit, images, decoder)
    torch.testing.assert_close(model(images, schedule=schedule.dense()).decoded["map"], wanted, rtol=1e-4, atol=1e-5)
    assert out.tokens_per_block[:, -1].min() < 25
    # The same features, by a head that hands them on.
    plain = tet.wrap(vit, Schedule(merges=SIMILAR), head=nn.Linear(48, 48)).eval()
    with torch.no_grad():
        plain.head.weight.copy_(torch.eye(48))
        plain.head.bias.zero_()
    torch.testing.assert_close(out.decoded["map"], decoder(plain(images).logits)["map"], rtol=1e-4, atol=1e-5)
    assert out.exits == ()
    assert (model.multiply_adds(out) < model.multiply_adds(model(images, schedule=schedule.dense()))).any()
    assert model.decoder_multiply_adds() > 0


@pytest.mark.parametrize("features", ["normalised", "raw"])
@torch.inference_mode()
def test_several_taps_and_prefix_tokens_reach_the_decoder(features):
    torch.manual_seed(0)
    vit, decoder, images = models.timm_vit(prefix=3), Convolving(48, maps=2).eval(), pictures(2)
    reads = {"features": features, "reads": "patches and prefix"}
    model = tet.wrap(vit, Schedule(merges=(Merge(1, 2, 1.0),)), decoder=decoder, taps=(3, 6), **reads)
    tokens, taken = model.host.embed(images).tokens, {}
    for block in range(6):
        tokens = vit.blocks[block](tokens)
        taken[block + 1] = vit.norm(tokens) if features == "normalised" else tokens
    maps = [taken[tap][:, 3:].transpose(1, 2).unflatten(2, GRID) for tap in (3, 6)]
    wanted = decoder(maps, [taken[tap][:, :3] for tap in (3, 6)])["map"]
    torch.testing.assert_close(model(images).decoded["map"], wanted, rtol=1e-4, atol=1e-5)
    merged = model(images, schedule=Schedule(merges=(Merge(1, 2, 0.9),)))
    assert merged.tokens_per_block[:, 1].min() < 27


def test_a_plan_with_merges_is_saved_and_loaded(tmp_path):
    plan = PLANS["agreed, then exits"]
    model = models.wrapped(models.timm_vit, schedule.dense(after=(2, 3, 4)))
    model.retune(plan)
    tet.save(model, tmp_path / "exits")
    again = tet.load(models.timm_vit(), tmp_path / "exits")
    assert again.schedule == plan
    images = pictures(2)
    with torch.inference_mode():
        torch.testing.assert_close(again(images).logits, model(images).logits)


REFUSED = [
    (lambda vit: tet.wrap(vit, Schedule(merges=(Merge(6, 2, 0.9),)), num_classes=3),
     r"`schedule` must have merges after blocks 1 to 5 only, for 6 blocks, got \[6\]"),
    (lambda vit: tet.wrap(vit, decoder=nn.Conv2d(48, 3, 1), head=nn.Linear(48, 3)),
     "`head` must be left out beside a decoder, got Linear"),
    (lambda vit: tet.wrap(vit, taps=(3, 6), num_classes=3), r"`taps` must be given with `decoder` alone, got \(3, 6\)"),
    (lambda vit: tet.wrap(vit, decoder=len), "`decoder` must be a torch.nn.Module, got <built-in function len>"),
    (lambda vit: tet.wrap(vit, decoder=nn.Conv2d(48, 3, 1), taps=(3,)), "`model.taps` must be ascending numbers"),
    (lambda vit: tet.wrap(vit, decoder=nn.Conv2d(48, 3, 1), features="cls"), "`features` must be `normalised` or `raw`"),
    (lambda vit: tet.wrap(vit, decoder=nn.Conv2d(48, 3, 1), reads="all"), "`reads` must be `patches` or `patches and"),
    (lambda vit: tet.wrap(vit, schedule.dtop(after=(2,)), decoder=nn.Conv2d(48, 3, 1), num_classes=3),
     "`schedule` must carry features, which rejoin for the decoder"),
    (lambda vit: tet.wrap(vit, schedule.paumer(after=(2,)), decoder=nn.Conv2d(48, 3, 1)),
     "`num_classes` must be a whole number from 2 to"),
    (lambda vit: models.wrapped(vit, schedule.dense(after=(2,))).retune(
        Schedule(merges=(Merge(5, 2, agreed=ConfidenceAbove(0.5)),))),
     r"`schedule` must ask for agreement only after blocks with an exit head, \[2, 3, 4\]" r""),
    (lambda _: Merge(1, 3, 0.9), r"`side` must be one of \[2, 4, 8, 16\], got 3"),
    (lambda _: Merge(1, 2), "`alike` must be given if neither `agreed` nor `share` is, got None"),
    (lambda _: Merge(1, 2, 1.5), r"`alike` must be None or a number in \[-1, 1\], got 1.5"),
    (lambda _: Merge(0, 2, 0.5), "`after` must be a whole number of blocks from 1 up, got 0"),
    (lambda _: Schedule(merges=(Merge(2, 2, 0.5), Merge(1, 2, 0.5))), "`merges` must come in strictly ascending order"),
    (lambda _: Schedule(merges=(Merge(2, 2, 0.5),), cell=3), "`cell` must be None in a plan that merges, got 3"),
    (lambda _: Schedule(schedule.svit(after=(2,)).exits, schedule.svit().carry, merges=(Merge(2, 2, 0.5),)),
     "`merges` must be left out where gates decide"),
]  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(TokenExitError, match=message):
        call(models.timm_vit())


@pytest.mark.usefixtures("unchecked")
def test_plans_that_merge_are_refused_where_nothing_merges():
    model = models.wrapped(models.timm_vit, schedule.dense(after=(2,)))
    model.retune(Schedule(merges=SIMILAR))
    images = pictures(1)
    with pytest.raises(TokenExitError, match="`schedule` must merge nothing in the static layout"):
        tet.StaticModel(model, capacities=1.0)(images)
    gated = tet.wrap_gates(models.timm_vit(), schedule.svit(after=(2,)))
    with pytest.raises(TokenExitError, match="`merges` must be left out where gates decide"):
        gated.retune(Schedule(merges=SIMILAR))


def test_heads_are_fitted_in_the_order_of_depth_to_tokens_as_they_merge():
    """A head behind a merge by agreement sees what the fitted head before it lets merge."""
    plan = Schedule(
        (Exit(4, ConfidenceAbove(0.9)),),
        merges=(Merge(1, 2, 0.9), Merge(2, 4, agreed=NeighboursAgree(0.5, radius=1)), Merge(3, 4, 0.9)),
    )
    model = models.wrapped(models.timm_vit, schedule.dense(after=(2, 3, 4)))
    model.retune(plan)
    images = pictures(4)
    report = tet.fit_exits(model, images, steps=60, patches_per_step=64, progress=iter)
    assert sorted(report.agreement) == [2, 3, 4]
    assert report.steps == 120
    # The first head reads tokens that have merged after block 1 alone; the targets are those of the dense network.
    probe = {"decoder": nn.Identity(), "taps": (2, 6), "features": "raw"}
    read = tet.wrap(model.model, Schedule(merges=plan.merges[:1]), **probe)(images).decoded[0]
    targets = model(images, schedule=schedule.dense()).logits.argmax(dim=1)
    found = model.exit_heads["2"](read.flatten(2).transpose(1, 2)).argmax(dim=-1)
    assert (found == targets.flatten(1)).float().mean() == pytest.approx(report.agreement[2], abs=1e-6)
    with pytest.raises(TokenExitError, match="`images` must be a tensor, or batches that can be gone through again"):
        tet.fit_exits(model, iter([images]), steps=2, progress=iter)


SHARES = Schedule(
    (Exit(3, ConfidenceAbove(0.5)),),
    merges=(Merge(1, 2, share=0.6), Merge(2, 4, share=0.5, agreed=ConfidenceAbove(0.2))),
)


def counted(model, images, plan):
    """Cells of 2 x 2 that merge at the last merge of a plan, and those that could."""
    *before, last = plan.merges
    everything = replace(last, side=2, alike=-1.0)
    with torch.no_grad():
        entries = [
            model(images, schedule=replace(plan, exits=(), merges=tuple(merges))).tokens_per_block[:, -1].sum()
            for merges in (before, (*before, replace(last, side=2)), (*before, everything))
        ]
    return [int(entries[0] - other) // 3 for other in entries[1:]]


@pytest.mark.parametrize("host", HOSTS)
def test_a_share_of_the_cells_that_could_merge_does(host):
    model, images = models.wrapped(HOSTS[host](), schedule.dense(after=(2, 3))), pictures(6)
    model.retune(SHARES)
    with pytest.raises(TokenExitError, match=r"`schedule` must have similarities in the place of shares, .*fit_merges"):
        model(images)
    plan = tet.fit_merges(model, images.split(2), progress=iter)
    assert plan == model.schedule
    assert plan.exits == SHARES.exits
    for count in (1, 2):
        merges, could = counted(model, images, replace(plan, merges=plan.merges[:count]))
        assert could > (30 if count == 1 else 1)
        assert abs(merges - SHARES.merges[count - 1].share * could) <= 1
    assert plan.merges == tet.fit_merges(model, [], progress=iter).merges  # nothing is left to be measured
    assert len(model.fitted) == 6


def test_exits_before_a_merge_are_at_work_when_it_is_measured():
    model, images = models.wrapped(models.timm_vit(), schedule.dense(after=(2,))), pictures(6)
    plan = Schedule((Exit(2, Budget(0.9)),), merges=(Merge(3, 2, share=0.5),))
    model.retune(plan)
    (merge,) = tet.fit_merges(model, images, progress=iter).merges
    with torch.no_grad():
        ran = [
            model(images, schedule=replace(plan, merges=merges)).tokens_per_block[:, -1].sum()
            for merges in ((), (merge,), (replace(merge, alike=-1.0),))
        ]
    merges, could = (int(ran[0] - other) // 3 for other in ran[1:])
    assert 1 < could < 6 * 6
    assert abs(merges - 0.5 * could) <= 1


def test_shares_are_measured_before_heads_are_fitted_to_what_merges():
    model, images = models.wrapped(models.timm_vit(), schedule.dense(after=(2, 3))), pictures(6)
    model.retune(SHARES)
    tet.fit_exits(model, images, steps=4, patches_per_step=64, progress=iter)
    assert all(merge.share is None for merge in model.schedule.merges)
    merges, could = counted(model, images, model.schedule)
    assert abs(merges - 0.5 * could) <= 1
    model.retune(SHARES)
    with pytest.raises(TokenExitError, match="`images` must be a tensor, or batches that can be gone through again"):
        tet.fit_merges(model, iter([images]), progress=iter)
    with pytest.raises(TokenExitError, match="`images` must have cells that could merge after block 1, where a share"):
        tet.fit_merges(model, [], progress=iter)
    assert model.schedule == SHARES


def test_images_that_merges_were_measured_on_are_not_calibrated_with():
    vit, images = models.timm_vit(), pictures(20)
    model = tet.wrap(vit, schedule.merged(share={1: 0.5}), decoder=nn.Conv2d(48, 1, 1)).eval()
    tet.fit_merges(model, images, progress=iter)
    risk = Risk("nothing", lambda out, _: torch.zeros(len(out.decoded)))
    options = {"at_most": 0.5, "preprocessing": "as drawn", "risk": risk, "progress": iter}
    with pytest.raises(TokenExitError, match="`images` must be others than those that .*fit_merges"):
        tet.calibrate(model, images, **options)


def test_training_reads_every_patch_of_merged_tokens():
    model = models.wrapped(models.timm_vit, schedule.dense(after=(2, 3, 4))).train()
    staged = tet.Staged(model)
    images = pictures(2)
    model.retune(Schedule((Exit(3, ConfidenceAbove(0.5)),), merges=(Merge(1, 2, 0.9),)))
    stages = staged(images)
    for after, logits in stages.logits.items():
        assert logits.isfinite().all(), after
    sum(logits.sum() for logits in stages.logits.values()).backward()
    assert all(head[-1].weight.grad.abs().sum() > 0 for head in (model.exit_heads["3"], model.head))
