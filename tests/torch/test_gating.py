"""Gates on real blocks: those that wait keep their place, however the others are run."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tokenexit_torch as tet
from tests.saved import edit
from tests.torch import models
from tokenexit import TokenExitError, gates, policies, schedule
from tokenexit.carries import Preserved
from tokenexit.cost import of_head, plain_vit
from tokenexit.heads import ATM, FCN, MLP, Linear
from tokenexit.schedule import Exit, Schedule

HOSTS = {
    "plain": models.plain_host,
    "timm, three heads": models.timm_vit,
    "timm, no cls": lambda: models.timm_vit(prefix=0),
    "timm, cls and five registers": lambda: models.timm_vit(prefix=6, heads=1),
    "placed": models.placed,
}
CARRIES = [
    Preserved(returning, keys, before)
    for returning, keys, before in itertools.product(
        ("every gate", "never"), ("running", "all"), ("decoder", "last block")
    )
]
AFTER = (1, 2, 4)
each_host = pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS.keys())
each_carry = pytest.mark.parametrize("carry", CARRIES, ids=str)


def gated(host, *, after=AFTER, carry=Preserved(), rate=0.6, head=True, size=(32, 48), **options) -> tet.GatedModel:
    """A model whose gates differ between tokens and keep about such a share."""
    torch.manual_seed(2)
    width = host.embed_dim if isinstance(host, nn.Module) else host.width
    final = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, models.CLASSES)) if head else None
    plan = schedule.svit(after=after, carry=carry)
    model = tet.wrap_gates(host, plan, head=final, **options).eval()
    with torch.no_grad():
        for gate in model.gates.values():
            gate[-1].weight.mul_(12)
    model.retune(tet.gate_thresholds(model, models.images(4, size, seed=9), rates=rate, progress=iter))
    return model


class Fixed(policies.Policy):
    """Skips what it is told to, in the order of the batch."""

    def __init__(self, skip):
        self.skip = skip

    def leaves(self, evidence):
        return self.skip.reshape(-1)


def fixed(skips, carry=Preserved()):
    return Schedule(tuple(Exit(after, Fixed(skip)) for after, skip in zip(AFTER, skips, strict=True)), carry)


def skips(shape, seed, share=0.5):
    return torch.rand(len(AFTER), *shape, generator=torch.Generator().manual_seed(seed)) < share


def slow(model, images, plan):
    """Token by token lists, one image after the other, each in a plain batch of one."""
    host, carry = model.host, plan.carry
    decisions = {one.after: one.policy.skip for one in plan.exits}
    results = []
    for number in range(len(images)):
        embedded = host.embed(images[number : number + 1])
        every, prefix = embedded.tokens[0].clone(), embedded.prefix
        run = gone = torch.zeros(len(every), dtype=torch.bool)
        run = ~run
        for block in range(model.depth):
            if block in decisions:
                skip = torch.cat([torch.zeros(prefix, dtype=torch.bool), decisions[block][number].reshape(-1)])
                skip = skip | gone if carry.returning == "never" else skip
                gone, run = skip, ~skip
            if carry.before == "last block" and block == model.depth - 1:
                run = torch.ones_like(run)
            rows = run if carry.keys == "running" else torch.ones_like(run)
            if not run.any():
                continue
            positions = None if embedded.positions is None else embedded.positions[rows]
            after = host.run(block, every[rows][None], positions)[0]
            moved = every.clone()
            moved[rows] = after
            every = torch.where(run[:, None], moved, every)
        results.append(host.finish(every)[prefix:])
    return torch.stack(results)


@each_host
@each_carry
def test_packed_and_masked_are_the_slow_reference(host, carry):
    model, images = gated(host(), carry=carry), models.images(3)
    grid = (4, 6)
    for seed, share in ((0, 0.5), (1, 0.95), (2, 0.1)):
        plan = fixed(skips((3, *grid), seed, share), carry)
        with torch.no_grad():
            wanted = slow(model, images, plan)
            packed, masked = model(images, schedule=plan), model.masked(images, schedule=plan)
        for found in (packed, masked):
            torch.testing.assert_close(found.maps[6].flatten(2).mT, wanted, atol=1e-5, rtol=1e-5)
            assert torch.equal(found.tokens_per_block, packed.tokens_per_block)
            assert torch.equal(found.keep, packed.keep)


class Masked(nn.Module):
    """What `torch.export` takes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        found = self.model.masked(images)
        return found.logits, found.keep


@pytest.mark.parametrize("carry", [CARRIES[0], CARRIES[7]], ids=str)
def test_by_masks_it_is_exported(carry):
    model, images = gated(models.timm_vit(), carry=carry), models.images(2)
    with torch.no_grad():
        program = torch.export.export(Masked(model), (images,)).module()
        for seed in (0, 1):
            images = models.images(2, seed=seed)
            logits, keep = program(images)
            wanted = model.masked(images)
            torch.testing.assert_close(logits, wanted.logits, atol=1e-5, rtol=1e-5)
            assert torch.equal(keep, wanted.keep)


@each_carry
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_gradients_of_packed_and_masked_agree(carry, share):
    model, images = gated(models.timm_vit(), carry=carry), models.images(2)
    plan = fixed(skips((2, 4, 6), 3, share), carry)
    found = []
    for call in (model, model.masked):
        model.zero_grad()
        source = images.clone().requires_grad_()
        call(source, schedule=plan).logits.square().sum().backward()
        weights = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
        found.append((source.grad, weights))
    (one, weights), (other, others) = found
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    for name in weights.keys() | others.keys():
        torch.testing.assert_close(weights[name], others[name], atol=1e-4, rtol=1e-4, msg=name)


def test_nothing_is_nan_in_ten_thousand_random_selections():
    """ViT-Ti's three heads; the shares run from nobody to everybody, in images of one batch."""
    torch.manual_seed(0)
    model = gated(models.timm_vit(prefix=0, depth=3, size=(16, 24)), after=(1, 2), head=False, size=(16, 24))
    images = models.images(1000, size=(16, 24))
    generator = torch.Generator().manual_seed(5)
    for _ in range(10):
        share = torch.rand(1000, 1, generator=generator) * 1.4 - 0.2
        drawn = torch.rand(2, 1000, 6, generator=generator) < share
        plan = Schedule((Exit(1, Fixed(drawn[0])), Exit(2, Fixed(drawn[1]))), Preserved())
        with torch.inference_mode():
            packed, masked = model(images, schedule=plan), model.masked(images, schedule=plan)
        assert packed.maps[3].isfinite().all()
        torch.testing.assert_close(packed.maps[3], masked.maps[3], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", [0, 1])
def test_an_image_of_which_nothing_is_kept_is_what_it_was(prefix):
    model, images = gated(models.timm_vit(prefix=prefix), taps=(1, 6)), models.images(2)
    nobody = torch.stack([torch.zeros(4, 6), torch.ones(4, 6)]) > 0
    plan = fixed([nobody] * 3)
    with torch.no_grad():
        for found in (model(images, schedule=plan), model.masked(images, schedule=plan)):
            before = found.maps[1][1].flatten(1).T
            torch.testing.assert_close(found.maps[6][1].flatten(1).T, model.host.finish(before), atol=1e-6, rtol=1e-6)
            assert found.tokens_per_block[1].tolist() == [24 + prefix] + [prefix] * 5
            torch.testing.assert_close(found.maps[6][:1], model(images[:1], schedule=schedule.dense()).maps[6])
    drawn = model.masked(images.requires_grad_(), schedule=plan)
    drawn.logits.sum().backward()
    assert images.grad.isfinite().all()


@each_host
def test_if_nobody_waits_it_is_the_dense_network(host):
    model, images = gated(host()), models.images(2)
    with torch.no_grad():
        dense = model.host.dense(images)
        prefix = dense.shape[1] - 24
        for plan in (schedule.dense(), model.schedule.with_threshold(0.0)):
            found = model(images, schedule=plan)
            torch.testing.assert_close(found.maps[6].flatten(2).mT, dense[:, prefix:], atol=1e-5, rtol=1e-5)
            assert (found.tokens_per_block == dense.shape[1]).all()


@each_host
def test_an_image_does_not_depend_on_its_batch_mates_and_nothing_is_drawn(host):
    model, images = gated(host()), models.images(4)
    with torch.no_grad():
        together, again = model(images), model(images)
        assert torch.equal(together.logits, again.logits)
        assert 0.2 < together.keep.float().mean() < 0.9
        assert together.keep.flatten(2).float().mean(2).std(0).max() > 0
        for number in range(4):
            alone = model(images[number : number + 1])
            assert torch.equal(alone.keep[0], together.keep[number])
            torch.testing.assert_close(alone.logits[0], together.logits[number], atol=1e-5, rtol=1e-5)


@given(st.floats(0, 1), st.sampled_from(CARRIES))
def test_calibrated_gates_keep_their_share(rate, carry):
    model = gated(models.timm_vit(depth=6), carry=carry)
    images = models.images(5, seed=4)
    plan = tet.gate_thresholds(model, images.split(2), rates=rate, progress=iter)
    assert plan.carry == carry
    kept = model(images, schedule=plan).keep.flatten(2).float().mean((0, 2))
    # 120 patches; where nobody returns, a gate keeps what is left at most, and these are all it is asked about.
    assert (kept - rate).abs().max() <= 1.01 / 120


def test_thresholds_follow_each_other_gate_by_gate():
    model, images = gated(models.timm_vit()), models.images(6, seed=4)
    rates = {1: 0.8, 2: 0.5, 4: 0.3}
    plan = tet.gate_thresholds(model, images, rates=rates, progress=iter)
    kept = model(images, schedule=plan).keep.flatten(2).float().mean((0, 2))
    torch.testing.assert_close(kept, torch.tensor([0.8, 0.5, 0.3]), atol=1 / 144, rtol=0)
    halves = model(images, schedule=plan.with_threshold(0.5)).keep.flatten(2).float().mean((0, 2))
    assert (halves - torch.tensor([0.8, 0.5, 0.3])).abs().max() > 0.05


def test_a_budget_keeps_the_most_probable_of_each_image():
    model, images = gated(models.timm_vit()), models.images(3)
    plan = Schedule(tuple(Exit(after, policies.Budget(0.25, by="gate")) for after in AFTER), Preserved())
    found = model(images, schedule=plan)
    assert (found.keep.flatten(2).sum(2) == 6).all()
    ranked = found.probability.flatten(2).argsort(dim=2, descending=True)[..., :6]
    assert found.keep.flatten(2).gather(2, ranked).all()
    torch.testing.assert_close(model.masked(images, schedule=plan).logits, found.logits, atol=1e-5, rtol=1e-5)


def test_maps_are_tapped_between_gates():
    model, images = gated(models.timm_vit(), taps=(2, 3, 5, 6)), models.images(2)
    plan = fixed(skips((2, 4, 6), 0))
    found, whole = model(images, schedule=plan), model.masked(images, schedule=plan)
    assert list(found.maps) == [2, 3, 5, 6]
    for after, one in found.maps.items():
        torch.testing.assert_close(one, whole.maps[after], atol=1e-5, rtol=1e-5)
    waited = plan.exits[1].policy.skip.reshape(2, 1, 4, 6)
    assert torch.equal(found.maps[3].where(waited, 0), found.maps[2].where(waited, 0))
    assert not torch.equal(found.maps[3], found.maps[2])
    assert gated(models.timm_vit(), head=False)(images).logits is None


@each_carry
def test_multiply_adds_are_those_that_are_executed(carry):
    model, images = gated(models.timm_vit(), carry=carry), models.images(2)
    # The plain kernel, of which the counter knows.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        found = model(images)
    assert model.multiply_adds(found).sum().item() == counter.get_total_flops() / 2


@pytest.mark.parametrize("prefix", [0, 1])
def test_draws_come_from_the_generator_alone(prefix):
    model, images = gated(models.timm_vit(prefix=prefix)), models.images(3)
    sampled = tet.Sampled(model, rates=0.5)
    before = torch.get_rng_state()
    one, again, other = (sampled(images, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.keep, again.keep)
    assert torch.equal(one.output.logits, again.output.logits)
    assert not torch.equal(one.keep, other.keep)
    assert set(one.keep.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(one.keep > 0, one.output.keep)
    # What was drawn is what ran.
    plan = fixed([one.keep[:, gate] == 0 for gate in range(3)])
    torch.testing.assert_close(model(images, schedule=plan).logits, one.output.logits, atol=1e-5, rtol=1e-5)


def test_draws_keep_as_often_as_the_probability_says():
    model = gated(models.timm_vit())
    with torch.no_grad():
        for gate in model.gates.values():
            gate[-1].weight.zero_()
            gate[-1].bias.copy_(torch.tensor([0.4, 0.0]))
        drawn = tet.Sampled(model, rates=0.5)(models.images(40), generator=torch.Generator().manual_seed(0))
        coins = tet.Sampled(model, rates=0.1, random=1.0)(models.images(40), generator=torch.Generator().manual_seed(0))
    assert abs(drawn.keep.mean().item() - torch.tensor(0.4).sigmoid().item()) < 0.03
    assert abs(coins.keep.mean().item() - 0.1) < 0.03


@each_carry
def test_a_decision_learns_what_running_changes(carry):
    """Straight-through: the gradient of a decision is that of its relaxation, times what running would change."""
    model, images = gated(models.timm_vit(), carry=carry), models.images(1)
    sampled = tet.Sampled(model, rates=0.5)
    last = model.schedule.after[-1]
    drawn = sampled(images, generator=torch.Generator().manual_seed(3))
    drawn.output.logits.square().sum().backward()
    gradient = [one.grad.abs().sum().item() for one in model.gates[str(last)].parameters()]
    assert all(value > 0 for value in gradient)
    assert all(one.grad.isfinite().all() for one in model.parameters() if one.grad is not None)
    rates = sampled(images, generator=torch.Generator().manual_seed(3)).ratio_loss()
    (grad,) = torch.autograd.grad(rates, [model.gates[str(last)][-1].bias])
    assert grad[0] == -grad[1] != 0


def test_detached_gates_do_not_move_the_tokens():
    model, images = gated(models.timm_vit()), models.images(2)
    for gate_input, moves in (("live", True), ("detached", False)):
        model.zero_grad()
        sampled = tet.Sampled(model, rates=0.3, gate_input=gate_input)
        sampled(images, generator=torch.Generator().manual_seed(0)).ratio_loss().backward()
        body = [one.grad for name, one in model.model.named_parameters() if one.grad is not None]
        assert any(one.any() for one in body) == moves
        assert model.gates["1"][-1].weight.grad.any()


def test_training_brings_the_gates_to_their_rates():
    torch.manual_seed(0)
    model, images = gated(models.timm_vit()).train(), models.images(8)
    sampled = tet.Sampled(model, rates={1: 0.8, 2: 0.4, 4: 0.2})
    optimizer = torch.optim.Adam(model.gates.parameters(), lr=2e-2)
    for step in range(60):
        drawn = sampled(images, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (4 * drawn.ratio_loss()).backward()
        optimizer.step()
    shares = torch.stack([
        sampled(images, generator=torch.Generator().manual_seed(1000 + step)).keep.mean((0, 2, 3)) for step in range(8)
    ]).mean(0)  # fmt: skip
    torch.testing.assert_close(shares, torch.tensor([0.8, 0.4, 0.2]), atol=0.06, rtol=0)


def test_padding_does_not_count_in_the_ratio():
    keep = torch.zeros(2, 1, 2, 2)
    keep[:, :, 0] = 1
    valid = torch.tensor([[True, True], [False, False]]).expand(2, 2, 2)
    found = tet.gates.Drawing(None, keep, torch.tensor([1.0]))
    assert found.ratio_loss(valid=valid) == 0
    assert found.ratio_loss() == 0.25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_runs_in_autocast_and_in_half_precision(dtype):
    model, images = gated(models.timm_vit()), models.images(3)
    with torch.autocast("cpu", dtype=dtype):
        packed = model(images)
        drawn = tet.Sampled(model, rates=0.5)(images, generator=torch.Generator().manual_seed(0))
        loss = drawn.output.logits.float().square().mean() + drawn.ratio_loss()
    loss.backward()
    assert packed.logits.isfinite().all()
    assert drawn.keep.dtype == torch.float32
    assert all(one.grad.isfinite().all() for one in model.parameters() if one.grad is not None)
    halved = model.to(torch.bfloat16)
    with torch.no_grad():
        assert halved(images.bfloat16()).logits.dtype == torch.bfloat16


def test_what_is_no_number_runs_and_stays_in_its_image():
    model, images = gated(models.timm_vit()), models.images(3)
    with torch.no_grad():
        clean = model(images)
        images[1] = float("nan")
        found = model(images)
    assert found.keep[1].all()
    torch.testing.assert_close(found.logits[0::2], clean.logits[0::2], atol=1e-5, rtol=1e-5)


def test_no_images_at_all():
    model = gated(models.timm_vit())
    found = model(models.images(0))
    assert found.logits.shape == (0, models.CLASSES, 4, 6)
    assert found.keep.shape == (0, 3, 4, 6)
    assert found.tokens_per_block.shape == (0, 6)


@each_carry
def test_saved_and_loaded_it_is_the_same(tmp_path, carry):
    host = models.timm_vit()
    model, images = gated(host, carry=carry), models.images(2)
    tet.save(model, tmp_path)
    loaded = tet.load(host, tmp_path, head=model.head, taps=(6,))
    assert loaded.schedule == model.schedule
    assert torch.equal(loaded(images).logits, model(images).logits)


def test_saved_gates_are_not_taken_for_what_they_are_not(tmp_path):
    host = models.timm_vit()
    model = gated(host)
    tet.save(model, tmp_path)
    with pytest.raises(TokenExitError, match=r"`model` must have width 48, as the saved gates, got 32"):
        tet.load(models.plain_host(), tmp_path)
    edit(tmp_path, "gates", classes=3)
    with pytest.raises(TokenExitError, match=r"`folder` must hold gates, got heads of 3 classes"):
        tet.load(host, tmp_path)
    edit(tmp_path, "gates", classes=2, plan={"kind": "mlp", "hidden": 500_000})
    with pytest.raises(
        TokenExitError, match=r"`folder` must hold the weights that gates.json describes, got gates\.1\.1"
    ):
        tet.load(host, tmp_path)
    with pytest.raises(
        TokenExitError, match=r"`folder` must hold the file exits.json or gates.json or semantic.json, got "
    ):
        tet.load(host, tmp_path / "none")


def own_gates(width=48, logits=2):
    return {after: nn.Linear(width, logits) for after in AFTER}


def test_gates_of_ones_own(tmp_path):
    host, images = models.timm_vit(), models.images(2)
    model = tet.wrap_gates(host, schedule.svit(after=AFTER), gates=own_gates())
    tet.save(model, tmp_path)
    loaded = tet.load(host, tmp_path, gates=own_gates())
    assert torch.equal(loaded(images).maps[6], model(images).maps[6])
    with pytest.raises(TokenExitError, match=r"`gates` must be given if they were saved as modules of your own"):
        tet.load(host, tmp_path)
    assert gated(host, gates=Linear())(images).keep.shape == (2, 3, 4, 6)


def wrap(**options):
    return tet.wrap_gates(models.timm_vit(), schedule.svit(after=AFTER), **options)


REFUSED = {
    "a carry": (lambda: tet.wrap_gates(models.timm_vit(), schedule.dtop(after=(2,))), r"`schedule` must carry Preserved, for a model with gates, got Prediction"),
    "class scores": (
        lambda: tet.wrap_gates(models.timm_vit(), Schedule((Exit(2, policies.ConfidenceAbove(0.5)),), Preserved())),
        r"`schedule` must compare the probabilities of gates alone, which give no class scores, got \['confidence'\]",
    ),
    "a late gate": (lambda: tet.wrap_gates(models.timm_vit(), schedule.svit(after=(6,))), r"`schedule` must have gates after blocks 1 to 5 only"),
    "a gate before the last block": (
        lambda: tet.wrap_gates(models.timm_vit(), schedule.svit(after=(5,), carry=Preserved(before="last block"))),
        r"`schedule` must have gates after blocks 1 to 4 only, for 6 blocks and before='last block', got \[5\]",
    ),
    "no gate": (lambda: wrap().retune(schedule.svit(after=(3,))), r"`schedule` must decide only after blocks with a gate, \[1, 2, 4\], got \[3\]"),
    "cells": (lambda: wrap().retune(Schedule(schedule.svit(after=(2,)).exits, Preserved(), cell=2)), r"`schedule` must have no cells"),
    "taps": (lambda: wrap(taps=(0, 6)), r"`taps` must be ascending blocks from 1 to 6, got \(0, 6\)"),
    "a plan for images": (lambda: wrap(gates=ATM()), r"`gates` must be a plan of tokenexit.heads that treats each token by itself"),
    "three logits": (lambda: wrap(gates=own_gates(logits=3)), r"`gates\[1\]` must give 2 logits, keep and skip, got 3"),
    "a shared head": (lambda: (lambda one: wrap(gates=dict.fromkeys(AFTER, one)))(nn.Linear(48, 2)), r"`gates\[2\]` must have parameters of its own"),
    "wrapped": (lambda: tet.wrap_gates(wrap()), r"`model` must not be wrapped already"),
    "no head": (lambda: wrap()(models.images(1)).upsample((8, 8)), r"`head` must be given to `wrap_gates` for logits, got None"),
    "neither": (lambda: wrap().retune(), r"`schedule` must be given if neither `threshold` nor `alike` is"),
    "rates": (lambda: tet.Sampled(wrap(), rates={1: 0.5}), r"`rates` must be one number, or one for each gate, after blocks \(1, 2, 4\)"),
    "random": (lambda: tet.Sampled(wrap(), rates=0.5, random=2), r"`random` must be a share in \[0, 1\], got 2"),
    "no generator": (lambda: tet.Sampled(wrap(), rates=0.5)(models.images(1), generator=3), r"`generator` must be a torch.Generator, got 3"),
    "no images": (lambda: tet.gate_thresholds(wrap(), [], rates=0.5, progress=iter), r"`images` must hold at least one image, got none"),
    "an exiting model": (lambda: tet.gate_thresholds(nn.Linear(2, 2), [], rates=0.5), r"`model` must have gates, as `wrap_gates` gives, got Linear"),
    "channels": (lambda: wrap()(torch.zeros(1, 4, 32, 48)), r"`images` must have shape \(images, 3, height, width\)"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(TokenExitError, match=message):
        make()


@pytest.mark.parametrize(("depth", "first"), [(2, 1), (6, 2), (12, 3), (24, 6)])
def test_gates_are_where_they_were_published_at_any_depth(depth, first):
    model = tet.wrap_gates(models.timm_vit(depth=depth))
    assert model.schedule == schedule.svit(after=range(first, depth))


def test_a_published_gate_has_a_quarter_of_the_channels_and_lets_most_run():
    model = tet.wrap_gates(models.timm_vit(), schedule.svit(after=AFTER))
    shapes = [tuple(one.shape) for one in model.gates["1"].parameters()]
    assert shapes == [(48,), (48,), (12, 48), (12,), (2, 12), (2,)]
    assert 0.7 < model(models.images(2)).probability.mean() < 0.95
    assert gates.keep_probability(torch.tensor([2.0, 0.0])) == pytest.approx(0.8808, abs=1e-4)


@each_carry
@pytest.mark.parametrize("prefix", [0, 1])
def test_the_cost_model_foretells_what_equal_images_take(carry, prefix):
    """Without a head: what the library counts is `multiply_adds` of the same rates."""
    model, images = gated(models.timm_vit(prefix=prefix), carry=carry, head=False), models.images(2)
    rates = {1: 0.75, 2: 0.5, 4: 0.25}
    plan = Schedule(tuple(Exit(after, policies.Budget(rate, by="gate")) for after, rate in rates.items()), carry)
    found = model(images, schedule=plan)
    cost = plain_vit(width=48, depth=6, patch=8, prefix=prefix)
    gate = of_head(MLP(12), width=48, classes=2)
    options = {"patches": 24, "gate": gate, "keys": carry.keys, "before": carry.before}
    predicted = cost.skipping(rates, **options)
    assert model.multiply_adds(found).tolist() == [predicted.total] * len(images)
    slots = 24 + prefix
    moved = cost.skipping(rates, per_moved_element=2.5, **options)
    assert moved.moving == round(2.5 * 48 * sum(2 * (prefix + 24 * rate) + slots for rate in rates.values()))
    assert moved.total - moved.moving == predicted.total == predicted.network + predicted.gates


@pytest.mark.parametrize("returning", ["every gate", "never"])
def test_budgets_and_coins_keep_their_share_whoever_may_return(returning):
    """Those that are gone for good are in nobody's way."""
    model, images = gated(models.timm_vit(), carry=Preserved(returning=returning)), models.images(40)
    plan = Schedule(
        tuple(Exit(after, policies.Budget(0.5, by="gate")) for after in AFTER), Preserved(returning=returning)
    )
    assert (model(images, schedule=plan).keep.flatten(2).sum(2) == 12).all()
    coins = tet.Sampled(model, rates={1: 0.8, 2: 0.4, 4: 0.2}, random=1.0)
    drawn = coins(images, generator=torch.Generator().manual_seed(0)).keep.mean((0, 2, 3))
    torch.testing.assert_close(drawn, torch.tensor([0.8, 0.4, 0.2]), atol=0.05, rtol=0)


class Doubled:
    """A host whose blocks are two of another's."""

    def __init__(self):
        host = models.plain_host()
        self.module, self.width, self.image_shape = host.module, host.width, host.image_shape
        self.blocks = [nn.Sequential(*host.blocks[start : start + 2]) for start in (0, 2, 4)]
        self.embed, self.finish, self.dense = host.embed, host.finish, host.dense

    def run(self, index, tokens, _positions):
        return self.blocks[index](tokens)


def test_a_block_that_attends_twice_is_refused_where_all_are_keys():
    model, images = gated(Doubled(), after=(1, 2)), models.images(2)
    torch.testing.assert_close(model(images).maps[3], model.masked(images).maps[3], atol=1e-5, rtol=1e-5)
    model.retune(Schedule(model.schedule.exits, Preserved(keys="all")))
    with pytest.raises(TokenExitError, match="`block` must call attention once where all tokens are keys"):
        model(images)


def test_without_a_gate_that_decides_there_is_no_loss():
    model, images = gated(models.timm_vit()), models.images(2)
    sampled = tet.Sampled(model, rates=0.5)
    drawn = sampled(images, generator=torch.Generator().manual_seed(0), schedule=schedule.dense())
    assert drawn.ratio_loss() == 0
    assert drawn.keep.shape == (2, 0, 4, 6)


def test_a_plan_under_which_nobody_waits_leaves_the_carry():
    model = gated(models.timm_vit(), carry=Preserved(keys="all"))
    model.retune(schedule.dense(after=AFTER))
    plan = tet.gate_thresholds(model, models.images(2), rates=0.5, progress=iter)
    assert plan.carry == Preserved(keys="all")
    model.retune(schedule.dense())
    with pytest.raises(
        TokenExitError, match="`model` must have a schedule that decides at one gate at least, got none"
    ):
        tet.gate_thresholds(model, models.images(2), rates=0.5, progress=iter)


def test_a_gate_and_a_head_see_rows_of_tokens():
    """As `wrap` asks of a head, whatever its layers make of further axes."""
    host = models.timm_vit()
    one = {after: nn.Sequential(nn.BatchNorm1d(48), nn.Linear(48, 2)) for after in AFTER}
    head = nn.Sequential(nn.BatchNorm1d(48), nn.Linear(48, 5))
    model = tet.wrap_gates(host, schedule.svit(after=AFTER), head=head, gates=one).eval()
    assert model(models.images(2)).logits.shape == (2, 5, 4, 6)
    assert tet.Sampled(model.train(), rates=0.5)(models.images(2), generator=torch.Generator()).keep.isfinite().all()


def test_what_is_no_number_is_drawn_to_run():
    model, images = gated(models.timm_vit()), models.images(2)
    images[1] = float("nan")
    drawn = tet.Sampled(model, rates=0.5)(images, generator=torch.Generator().manual_seed(0))
    assert drawn.output.keep[1].all()
    assert drawn.output.tokens_per_block[1].tolist() == [25] * 6
    assert drawn.keep.isfinite().all()


def test_a_model_without_gates_is_saved_and_loaded(tmp_path):
    host = models.timm_vit()
    tet.save(tet.wrap_gates(host, schedule.dense()), tmp_path)
    assert len(tet.load(host, tmp_path).gates) == 0


@torch.no_grad()
def test_gates_learn_from_patches_alone():
    vit = models.timm_vit(prefix=5)
    vit.reg_token.normal_(std=15, generator=torch.Generator().manual_seed(0))
    plan, images = schedule.svit(after=(1,), threshold=0.0), models.images(4)
    model = tet.wrap_gates(vit, plan, gates=FCN(hidden=8)).train()
    runs = [model, model.masked, lambda x: tet.Sampled(model, rates=0.5)(x, generator=torch.Generator())]
    norm, seen = model.gates["1"][1], []
    model.gates["1"].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for run in runs:
        norm.reset_running_stats()
        run(images)
        assert norm.running_var.max() < 10
    assert [len(given) for given in seen] == [4 * 24] * 3
    seen.clear()
    model.eval()(images)
    assert len(seen[0]) == 4 * 29  # without a copy
