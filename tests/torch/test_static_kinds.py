"""The static layout with mask heads, under decoders, and in training: what packed rows give."""

import pytest
import torch

import tokenexit_torch as tet
from tests.torch import decoders, models
from tokenexit import TokenExitError, schedule
from tokenexit.carries import Feature, MaskPrediction, Prediction
from tokenexit.cost import HeadCost
from tokenexit.heads import ATM
from tokenexit.policies import ConfidenceAbove, always
from tokenexit.schedule import Exit, Schedule

PLANS = {
    "neighbours": schedule.neighbours(radius={2: 1, 3: 1, 4: 0}, threshold=0.4, per_class=1, cell=2),
    "dtop": schedule.dtop(after=(2, 3, 4), threshold=0.5, per_class=2),
}


def masked(host):
    """A model with mask heads after blocks 2, 3 and 4 whose confidences spread over (0, 1)."""
    torch.manual_seed(1)
    heads = ATM(layers=1, attention_heads=2)
    model = tet.wrap(host, schedule.dense(after=(2, 3, 4)), num_classes=models.CLASSES, exit_heads=heads).eval()
    with torch.no_grad():
        for head in [*model.exit_heads.values(), model.head]:
            for parameter in head.parameters():
                parameter.normal_(std=0.5)
    return model


def decoding():
    """A segmenting DPT with exits after blocks 1 and 2 whose confidences spread over (0, 1)."""
    torch.manual_seed(1)
    host = decoders.DECODERS["DPT, segmentation"].make()
    model = tet.wrap_decoder(host, schedule.dense(after=(1, 2)), num_classes=decoders.CLASSES).eval()
    with torch.no_grad():
        for head in model.exit_heads.values():
            head[-1].weight.mul_(6)
    return model


@torch.no_grad()
@pytest.mark.parametrize("carry", [Prediction(), MaskPrediction()], ids=["frozen", "reweighed"])
@pytest.mark.parametrize("cell", [None, 2])
def test_mask_heads_read_the_patches_that_there_are(carry, cell):
    model = masked(models.timm_vit(prefix=2))
    exits = tuple(Exit(after, ConfidenceAbove(0.5).retaining(per_class=1)) for after in (2, 3, 4))
    plan = Schedule(exits, carry, cell)
    images = models.images(4)
    wanted = model(images, schedule=plan)
    out = tet.StaticModel(model, capacities=1.0)(images, schedule=plan)
    assert 0 < int((wanted.exit_depth < model.depth).sum()) < wanted.exit_depth.numel()
    assert torch.equal(out.exit_depth, wanted.exit_depth)
    assert torch.equal(out.tokens_per_block, wanted.tokens_per_block)
    torch.testing.assert_close(out.logits, wanted.logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_presence_of_an_image_that_is_done_is_that_of_the_head_that_read_it_last():
    model = masked(models.timm_vit())
    plan = Schedule((Exit(2, ConfidenceAbove(0.9)), Exit(3, always())), MaskPrediction())
    images = models.images(2)
    stages = tet.Staged(model)(images, schedule=plan)
    for out in (model(images, schedule=plan), tet.StaticModel(model, capacities=1.0)(images, schedule=plan)):
        torch.testing.assert_close(out.logits, stages.logits[3], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(stages.masks[2].presence_logits, stages.masks[3].presence_logits)


class OwnMasks(tet.MaskHead):
    """A mask head for packed rows alone."""

    cost = HeadCost(1)

    def forward(self, row, lengths):
        return tet.heads.Masks(row[:, :3], row.new_zeros(len(lengths), 3))


@torch.no_grad()
def test_a_mask_head_for_packed_rows_alone_is_named():
    heads = {2: OwnMasks()}
    model = tet.wrap(models.timm_vit(), schedule.truncated(after=2), head=OwnMasks(), exit_heads=heads)
    model(models.images(1))
    with pytest.raises(TokenExitError, match="`model` must have mask heads that implement `padded`.*got OwnMasks"):
        tet.StaticModel(model, capacities=0.5)(models.images(1))


@torch.no_grad()
@pytest.mark.parametrize("before", ["decoder", "last block"])
def test_a_decoder_of_the_models_own_reads_what_it_does_after_a_packed_pass(before):
    model = decoding()
    exits = tuple(Exit(after, ConfidenceAbove(0.5)) for after in (1, 2))
    plan = Schedule(exits, Feature(before, fold_above=0.1))
    images = models.images(3, size=(32, 32))
    wanted = model(images, schedule=plan)
    static = tet.StaticModel(model, capacities=1.0)
    out = static(images, schedule=plan)
    assert 0 < int((wanted.exit_depth < model.depth).sum()) < wanted.exit_depth.numel()
    assert torch.equal(out.exit_depth, wanted.exit_depth)
    torch.testing.assert_close(out.decoded.logits, wanted.decoded.logits, rtol=1e-4, atol=1e-4)
    small = tet.StaticModel(model, capacities={1: 0.5, 2: 0.3})
    out = small(images, schedule=plan)
    assert out.capacity_per_block[0].tolist()[:3] == [17, 8, 5]
    assert int(small.multiply_adds(out)[0]) < int(static.multiply_adds(static(images, schedule=plan))[0])
    assert tet.needed_capacity(wanted).keys() == {1, 2}


@pytest.mark.parametrize("name", ["neighbours", "dtop"])
def test_training_in_the_static_layout_has_the_losses_and_gradients_of_packed_rows(name):
    model, images, found = models.wrapped(models.timm_vit, PLANS[name]), models.images(2), []
    label = torch.randint(0, models.CLASSES, (2, 32, 48), generator=torch.Generator().manual_seed(0))
    for run in (tet.Staged(model), tet.Staged(tet.StaticModel(model, capacities=1.0))):
        model.zero_grad()
        stages = run(images, schedule=PLANS[name])
        stages.loss(lambda logits: tet.pixel_cross_entropy(logits, label)).backward()
        gradients = {one: p.grad.clone() for one, p in model.named_parameters() if p.grad is not None}
        found.append((stages, gradients))
    (own, wanted), (static, gradients) = found
    assert own.logits.keys() == static.logits.keys()
    for after, logits in own.logits.items():
        torch.testing.assert_close(static.logits[after], logits, rtol=1e-4, atol=1e-4)
    assert wanted.keys() == gradients.keys()
    for one, gradient in wanted.items():
        near = 1e-4 * float(gradient.abs().max())
        torch.testing.assert_close(gradients[one], gradient, rtol=1e-3, atol=max(near, 1e-6), msg=one)
