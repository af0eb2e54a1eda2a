"""Merges in the static layout: what packed rows give where there is room, and what happens where there is not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tokenexit_torch as tet
from tests.core import strategies
from tests.torch import decoders, models
from tests.torch.models import Convolving, pictures
from tests.torch.operators import WAITING, Operators
from tests.torch.plans import MERGING, SIMILAR
from tokenexit import TokenExitError, merging, schedule
from tokenexit.carries import Feature, Prediction
from tokenexit.policies import Budget, ConfidenceAbove, NeighboursAgree
from tokenexit.schedule import Exit, Merge, Schedule

AFTER = (1, 2, 3, 4)
SIZES = {"plain": models.plain_host, "timm": lambda: models.timm_vit(prefix=3, dynamic_img_size=True)}


def exiting(host=models.timm_vit):
    """A model with exit heads after the first four blocks, in double precision, in which no rounding flips a token."""
    return models.wrapped(host(), schedule.dense(after=AFTER), after=AFTER).double()


HOSTS = {name: exiting(host) for name, host in SIZES.items()}


def static(model, plan, capacities=1.0):
    model.retune(plan)
    if isinstance(capacities, dict):
        capacities = dict.fromkeys({*map(int, model.exit_heads), *plan.merged_after}, 1.0) | capacities
    return tet.StaticModel(model, capacities=capacities)


@st.composite
def plans(draw):
    """Plans that merge, with exits before, after and at the same blocks."""
    policy = st.builds(ConfidenceAbove, st.sampled_from([0.3, 0.5, 0.7])) | st.just(NeighboursAgree(0.4, radius=1))
    rules = st.builds(dict, alike=st.sampled_from([-1.0, 0.7, 0.9])) | st.builds(
        dict, alike=st.sampled_from([None, 0.5]), agreed=policy
    )
    merges = draw(st.dictionaries(st.sampled_from(AFTER), rules, min_size=1, max_size=3))
    exits = draw(st.dictionaries(st.sampled_from(AFTER), policy | st.just(Budget(0.6)), max_size=3))
    return Schedule(
        tuple(Exit(after, exits[after]) for after in sorted(exits)),
        draw(st.sampled_from([Prediction(), Feature("decoder"), Feature("last block")])),
        merges=tuple(Merge(after, draw(st.sampled_from([2, 4, 8])), **merges[after]) for after in sorted(merges)),
        keys=draw(st.sampled_from(["tokens", "entries"])),
    )


@torch.no_grad()
@given(
    name=st.sampled_from(sorted(HOSTS)),
    plan=plans(),
    grid=st.sampled_from([(4, 4), (3, 5), (5, 8), (1, 3)]),
    share=st.floats(0.1, 1),
    seed=st.integers(0, 9),
)
@strategies.fewer(4)
def test_any_plan_any_grid_any_room(name, plan, grid, share, seed):
    model, images = HOSTS[name], pictures(3, (8 * grid[0], 8 * grid[1]), seed).double()
    model.retune(plan)
    packed = model(images)
    needed = tet.needed_capacity(packed)
    assert needed.keys() == {*packed.exits, *plan.merged_after}
    for capacities in (1.0, needed):
        out = static(model, plan, capacities)(images)
        torch.testing.assert_close(out.logits, packed.logits, rtol=1e-9, atol=1e-9)
        assert torch.equal(out.exit_depth, packed.exit_depth)
        assert torch.equal(out.tokens_per_block, packed.tokens_per_block)
        assert out.overflow.eq(0).all()
    # With less: as much as there is room for, and each image by itself.
    slots, prefix = int(packed.tokens_per_block[0, 0]), 0 if name == "plain" else 3
    least = {merge.after: (prefix + merging.fewest(grid, side=merge.side)) / slots for merge in plan.merges}
    tight = static(model, plan, {after: max(share, least.get(after, 0)) for after in (*AFTER, *least)})
    out = tight(images)
    assert out.logits.isfinite().all()
    assert (out.tokens_per_block <= out.capacity_per_block).all()
    assert ((out.tokens_per_block - packed.tokens_per_block)[out.overflow == 0] == 0).all()
    alone = tight(images[1:2])
    torch.testing.assert_close(alone.logits[0], out.logits[1], rtol=1e-9, atol=1e-9)
    assert torch.equal(alone.exit_depth[0], out.exit_depth[1])
    assert torch.equal(alone.overflow[0], out.overflow[1])


@torch.no_grad()
def test_without_room_the_most_alike_cells_merge_and_are_counted():
    model, images = exiting(), pictures(4).double()
    nothing = Schedule(merges=(Merge(2, 4, 1.0),))
    out = static(model, nothing, 0.6)(images)  # 15 of 25: four cells have to merge
    assert out.tokens_per_block.tolist() == [[25, 25, 13, 13, 13, 13]] * 4
    assert out.overflow.tolist() == [12] * 4
    assert out.capacity_per_block[0].tolist() == [25, 25, 15, 15, 15, 15]
    assert (out.exit_depth == model.depth).all()
    # As if those four alone had passed.
    taken = tet.wrap(model.model, schedule.dense(), decoder=nn.Identity(), taps=(2, 6), features="raw")(images)
    cells = nn.functional.normalize(taken.decoded[0], dim=1).unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).sum(-1)
    alike = cells.square().sum(dim=1).flatten(1).sub(4).div(12).sort(dim=1, descending=True).values
    for at, one in enumerate(images):
        wanted = model(one[None], schedule=Schedule(merges=(Merge(2, 2, float(alike[at, 3:5].mean())),)))
        assert wanted.tokens_per_block[0].tolist() == [25, 25, 13, 13, 13, 13]
        torch.testing.assert_close(out.logits[at], wanted.logits[0], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_what_has_no_room_even_then_leaves_with_its_latest_outcome():
    model, images = exiting(), pictures(4).double()
    plan = Schedule((Exit(2, ConfidenceAbove(0.7)),), merges=(Merge(3, 2, 1.0),))
    model.retune(plan)
    packed, first = model(images), model.every_exit(images)[2]
    out = static(model, plan, {3: 0.16})(images)  # a cls token, and three others
    late = out.exit_depth == 3
    assert 0 < late.sum() < late.numel()
    assert torch.equal(out.exit_depth == 2, packed.exit_depth == 2)
    # Each has its own prediction, or that of the first of the cell into which it has merged.
    owner = first[:, :, ::2, ::2].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    same = [(out.logits - one).abs().amax(dim=1) < 1e-9 for one in (first, owner)]
    assert (same[0] | same[1])[late].all()
    assert same[0][out.exit_depth == 2].all()
    # The most confident leave.
    assert (out.tokens_per_block[:, 3] == packed.tokens_per_block[:, 3].clamp(max=4)).all()
    assert out.overflow.tolist() == (packed.tokens_per_block[:, 3] - 4).clamp(min=0).tolist()
    entries = first.softmax(dim=1).amax(dim=1)
    for at in range(4):
        stays = entries[at][out.exit_depth[at] == model.depth]
        own = entries[at][late[at] & same[0][at]]
        assert own.numel() == 0 or stays.min() <= own.min()


@torch.no_grad()
def test_where_features_are_carried_it_leaves_the_present_one():
    torch.manual_seed(0)
    vit = models.timm_vit(size=(8, 96))  # a single row of patches: nothing can merge
    plan = Schedule((Exit(2, ConfidenceAbove(0.4)),), Feature(), merges=(Merge(3, 2, 1.0),))
    options = {"decoder": nn.Identity(), "taps": (3, 6), "features": "raw", "num_classes": 3}
    model = tet.wrap(vit, plan, **options).eval()
    out = tet.StaticModel(model, capacities={2: 1.0, 3: 0.3})(pictures(3, (8, 96)))
    late = (out.exit_depth == 3)[:, None].expand_as(out.decoded[0])
    assert late.any()
    assert torch.equal(out.decoded[1][late], out.decoded[0][late])
    assert not torch.equal(out.decoded[1], out.decoded[0])


@torch.no_grad()
def test_a_nan_image_and_one_that_is_done_harm_nobody():
    model, images = exiting(lambda: models.timm_vit(prefix=0)), pictures(4).double()
    plan = Schedule((Exit(2, ConfidenceAbove(0.0)),), merges=(Merge(1, 2, 0.9), Merge(3, 4, 0.7)))
    images[1] = float("nan")
    out = static(model, plan, {1: 0.6, 3: 0.3})(images)
    assert out.exit_depth[[0, 2, 3]].eq(2).all()
    assert out.logits[[0, 2, 3]].isfinite().all()
    assert (out.tokens_per_block <= out.capacity_per_block).all()
    one = static(model, plan, {1: 0.6, 3: 0.3})(images[:1])
    torch.testing.assert_close(one.logits[0], out.logits[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("plan", MERGING.values(), ids=list(MERGING))
def test_gradients_are_those_of_the_packed_run(plan):
    model, images, found = exiting(), pictures(2).double(), []
    for run in (model, static(model, plan)):
        model.zero_grad()
        run(images).logits.square().sum().backward()
        found.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    packed, padded = found
    for name, gradient in packed.items():
        torch.testing.assert_close(padded[name], gradient, rtol=1e-7, atol=1e-9, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("features", ["normalised", "raw"])
def test_a_given_decoder_reads_what_it_does_after_a_packed_pass(features):
    torch.manual_seed(0)
    vit, decoder, images = models.timm_vit(prefix=3), Convolving(48, maps=2).eval(), pictures(3)
    reads = {"features": features, "reads": "patches and prefix"}
    model = tet.wrap(vit, Schedule(merges=SIMILAR), decoder=decoder, taps=(3, 6), **reads)
    packed = model(images)
    needed = tet.needed_capacity(packed)
    assert needed.keys() == {1, 3}
    for capacities in (1.0, needed):
        out = tet.StaticModel(model, capacities=capacities)(images)
        torch.testing.assert_close(out.decoded["map"], packed.decoded["map"], rtol=1e-4, atol=1e-5)
        assert torch.equal(out.tokens_per_block, packed.tokens_per_block)
    few = tet.StaticModel(model, capacities={1: 0.5, 3: 0.3})
    out = few(images)
    assert out.overflow.sum() > 0
    assert (few.multiply_adds(out) < tet.StaticModel(model, capacities=1.0).multiply_adds(packed)).all()


@torch.no_grad()
def test_a_decoder_of_the_models_own_reads_what_it_does_after_a_packed_pass():
    torch.manual_seed(1)
    plan = Schedule((Exit(2, ConfidenceAbove(0.5)),), Feature(), merges=(Merge(1, 2, 0.2), Merge(2, 4, 0.1)))
    host = decoders.DECODERS["DPT, segmentation"].make()
    model, images = tet.wrap_decoder(host, plan, num_classes=decoders.CLASSES).eval(), pictures(3, (32, 32))
    packed = model(images)
    assert packed.tokens_per_block[:, -1].min() < 17
    out = tet.StaticModel(model, capacities=tet.needed_capacity(packed))(images)
    torch.testing.assert_close(out.decoded.logits, packed.decoded.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(out.tokens_per_block, packed.tokens_per_block)


@torch.no_grad()
@pytest.mark.parametrize("name", ["agreed, then exits", "exits, then merges"])
def test_no_operator_waits_for_a_device_or_copies_from_the_host(name):
    run, images = static(exiting(), MERGING[name], {1: 0.6, 2: 0.4, 3: 0.3, 4: 0.3}), pictures(2).double()
    run(images)
    with Operators() as operators:
        run(images)
    assert operators.seen & (WAITING - {"_to_copy"}) == set()


def test_training_in_the_static_layout_has_the_outputs_of_packed_rows():
    model, images = exiting(), pictures(2).double()
    run = tet.Staged(static(model, MERGING["agreed, then exits"]))(images)
    for after, logits in tet.Staged(model)(images).logits.items():
        torch.testing.assert_close(run.logits[after], logits, rtol=1e-9, atol=1e-9)


REFUSED = [
    (lambda m: static(m, Schedule(merges=SIMILAR), {1: 0.25}),
     r"`capacities\[1\]` must have room for a grid of which all cells of 2 x 2 have merged, at least 0.28, got 0.25"),
    (lambda m: tet.StaticModel(m, capacities={1: 0.5, 2: 0.5, 4: 0.5}),
     r"`capacities` must be a fraction for all exits and merges, or for each of the blocks \[1, 2, 3, 4\], got"),
    (lambda m: tet.StaticModel(m, capacities=dict.fromkeys(range(1, 7), 1.0)),
     r"`capacities` must be a fraction for all exits and merges, or for each of the blocks \[1, 2, 3, 4\], got"),
    (lambda m: lambda x: static(m, Schedule(merges=SIMILAR))(x, schedule=Schedule(merges=(Merge(5, 2, 0.5),))),
     r"`capacities` must have one for each exit and each merge .*, got none for the blocks \[5\]"),
]  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("make", "message"), REFUSED, ids=["too small", "lacking", "no block", "of a call"])
def test_bad_input_is_named(make, message):
    model = exiting()
    model.retune(Schedule(merges=SIMILAR))
    with pytest.raises(TokenExitError, match=message):
        make(model)(pictures(1).double())


@torch.no_grad()
def test_capacities_may_name_blocks_that_plans_of_single_calls_need():
    model, images = models.wrapped(models.timm_vit, schedule.dense(after=(2,)), after=(2,)), pictures(2)
    run = tet.StaticModel(model, capacities={1: 0.5, 2: 1.0, 3: 0.5})
    assert run(images, schedule=Schedule(merges=SIMILAR)).tokens_per_block[:, 1].max() <= 12
    # Where there is no room for more than before, what has merged before is enough.
    few = tet.StaticModel(model, capacities={1: 0.2, 2: 1.0, 3: 0.2})
    plan = Schedule(merges=(Merge(1, 4, 0.9), Merge(3, 2, 0.9)))
    assert few(images, schedule=plan).tokens_per_block[:, -1].max() <= 5
