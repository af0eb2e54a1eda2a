"""Training with exits: the stages, the loss and the slopes of PyTorch's; a network learns with optax."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
import torch
from jax import numpy as jnp

import tokenexit_jax as tej
import tokenexit_torch as tet
from tests.jax import networks
from tests.jax.parity import from_torch, same
from tests.torch import models
from tokenexit import TokenExitError, policies, schedule, training
from tokenexit.carries import Feature, MaskPrediction
from tokenexit.heads import ATM, FCN, MLP, Neighbourhood
from tokenexit.schedule import Exit, Schedule

DEPTH = 4
PLANS = {
    "dtop": schedule.dtop(after=(2, 3), threshold=0.5, per_class=2),
    "paumer": schedule.paumer(after=(2, 3), threshold=0.4),
    "dovit": schedule.dovit(after=(2,), threshold=0.5),
    "neighbours, cells": schedule.neighbours(radius={2: 1}, threshold=0.4, per_class=0, cell=2),
    "rejoining for the last block": Schedule((Exit(3, policies.always()),), Feature("last block")),
    "nobody may leave": schedule.dense(after=(2, 3)),
    "no exits": schedule.dense(),
    "all leave at once": schedule.truncated(after=2),
}
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


@functools.cache
def pair(prefix=1, exit_heads=MLP()):
    """One network on both sides, with exits after blocks 2 and 3."""
    size = networks.SIZE
    host = models.timm_vit(depth=DEPTH, size=size) if prefix else models.plain_host(depth=DEPTH)
    torch.manual_seed(1)
    options = {"num_classes": networks.CLASSES, "exit_heads": exit_heads}
    theirs = tet.wrap(host, schedule.dense(after=(2, 3)), **options).eval()
    with torch.no_grad():
        for head in [*theirs.exit_heads.values(), theirs.head]:
            if isinstance(head, torch.nn.Sequential):
                head[-1].weight.mul_(12)
    network = networks.timm_network(depth=DEPTH) if prefix else networks.plain_network(depth=DEPTH)
    ours = tej.wrap(network, theirs.schedule, classes=networks.CLASSES, exit_heads=exit_heads, capacities=(1.0,))
    return theirs, ours, from_torch(theirs.model), networks.heads_of(theirs)


def labels(images=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, networks.CLASSES, (images, *networks.SIZE), generator=generator)


def criterion(logits):
    return tej.pixel_cross_entropy(logits, jnp.asarray(labels().numpy()))


def their_criterion(logits):
    return tet.pixel_cross_entropy(logits, labels())


def our_step(ours, plan, ours_loss):
    """Loss, stages, and slopes of parameters and heads, compiled."""

    def loss(trained, statistics, images):
        params, learned = trained
        stages = tej.staged(ours, params, tej.merge(learned, statistics), images, plan)
        return ours_loss(stages), stages

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def require_same_slopes(theirs, slopes, within=2e-3):
    for_params, for_heads = slopes
    found = {f"model.{name}": value for name, value in for_params.items()}
    found |= {f"head.{name}": value for name, value in for_heads["head"].items()}
    for after, head in for_heads["exit_heads"].items():
        found |= {f"exit_heads.{after}.{name}": value for name, value in head.items()}
    checked, least = 0, 1e-4 * max(np.abs(value).max() for value in found.values())
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None:
            assert not np.any(found[name]), name
            continue
        scale = max(parameter.grad.abs().max().item(), least)  # some slopes are zero, but for rounding
        same(found[name] / scale, parameter.grad / scale, within)
        checked += 1
    return checked


@each_plan
def test_stages_loss_and_slopes_are_those_of_pytorch(plan):
    theirs, ours, params, heads = pair()
    images = models.images(2, networks.SIZE)
    theirs.zero_grad()
    wanted = tet.Staged(theirs)(images, schedule=plan)
    wanted_loss = wanted.loss(their_criterion, auxiliary=0.7)
    wanted_loss.backward()
    learned, statistics = tej.split(heads)
    step = our_step(ours, plan, lambda stages: stages.loss(criterion, auxiliary=0.7))
    (loss, stages), slopes = step((params, learned), statistics, networks.images_of(images))
    np.testing.assert_array_equal(stages.output.exit_depth, wanted.output.exit_depth)
    assert {after for after, read in stages.read.items() if read.any()} == set(wanted.logits)
    for after, logits in wanted.logits.items():
        same(stages.logits[after], logits.movedim(1, -1), 1e-4)
        ran = stages.output.exit_depth >= after
        np.testing.assert_array_equal(stages.read[after], ran | (after == DEPTH) & (stages.output.head_on == "all"))
    same(loss, wanted_loss)
    assert require_same_slopes(theirs, slopes) > 20
    same(stages.output.logits, wanted.output.logits.movedim(1, -1), 1e-4)
    np.testing.assert_array_equal(stages.output.tokens_per_block, wanted.output.tokens_per_block)
    assert (stages.output.exits, stages.output.head_on) == (wanted.output.exits, wanted.output.head_on)


def test_masks_their_loss_and_slopes_are_those_of_pytorch():
    plan = ATM(1, 2)
    theirs, ours, params, heads = pair(exit_heads=plan)
    plan_of_masks = Schedule((Exit(2, policies.Budget(0.5)),), MaskPrediction())
    images = models.images(2, networks.SIZE)
    theirs.zero_grad()
    wanted = tet.Staged(theirs)(images, schedule=plan_of_masks)
    left = wanted.output.exit_depth
    assert len(left.unique()) > 1
    theirs_loss = wanted.loss_of_masks(lambda maps: tet.mask_loss(maps, labels())) + wanted.loss(their_criterion)
    theirs_loss.backward()
    label = jnp.asarray(labels().numpy())

    def both(stages):
        return stages.loss_of_masks(lambda maps: tej.mask_loss(maps, label)) + stages.loss(criterion)

    (loss, stages), slopes = our_step(ours, plan_of_masks, both)(
        (params, heads), tej.split(heads)[1], networks.images_of(images)
    )
    np.testing.assert_array_equal(stages.output.exit_depth, left)
    for after, maps in wanted.masks.items():
        same(stages.masks[after].mask_logits, maps.mask_logits.movedim(1, -1), 1e-4)
        same(stages.masks[after].presence_logits, maps.presence_logits, 1e-4)
        same(stages.logits[after], wanted.logits[after].movedim(1, -1), 1e-4)
    same(loss, theirs_loss, 1e-4)
    assert require_same_slopes(theirs, slopes) > 20


@pytest.mark.parametrize("name", ["dtop", "no exits"])
def test_batch_norms_learn_what_pytorchs_learn(name):
    """On a network without prefix tokens, which PyTorch's heads are shown as well."""
    theirs, ours, params, heads = pair(prefix=0, exit_heads=FCN(16))
    images, plan = models.images(2, networks.SIZE), PLANS[name]
    before = {key: value.clone() for key, value in theirs.state_dict().items()}
    theirs.train().zero_grad()
    wanted = tet.Staged(theirs)(images, schedule=plan)
    wanted_loss = wanted.loss(their_criterion)
    wanted_loss.backward()
    learned, statistics = tej.split(heads)
    step = our_step(ours, plan, lambda stages: stages.loss(criterion))
    (loss, stages), slopes = step((params, learned), statistics, networks.images_of(images))
    same(loss, wanted_loss, 1e-4)
    after = networks.heads_of(theirs)
    theirs.load_state_dict(before)
    theirs.eval()
    found = tej.merge(learned, stages.statistics)
    assert jax.tree.structure(found) == jax.tree.structure(after)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(after), strict=True):
        same(one, other, 1e-4)
    require_same_slopes(theirs, slopes, 5e-3)


def test_frozen_predictions_are_constants_to_later_losses():
    _, ours, params, heads = pair()
    images = networks.images_of(models.images(2, networks.SIZE))
    step = our_step(ours, PLANS["dtop"], lambda stages: jnp.square(stages.logits[DEPTH]).sum())
    (_, stages), (_, for_heads) = step((params, heads), tej.split(heads)[1], images)
    assert (stages.output.exit_depth < DEPTH).any()
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(for_heads["exit_heads"]))
    assert np.any(for_heads["head"]["3.weight"])


def test_buckets_make_no_difference_to_slopes():
    _, ours, params, heads = pair()
    small = dataclasses.replace(ours, capacities=((0.5, 1.0),) * 2)
    images, plan = networks.images_of(models.images(2, networks.SIZE)), schedule.paumer(keep={2: 0.3})
    _, one = our_step(ours, plan, lambda stages: stages.loss(criterion))((params, heads), {}, images)
    (_, stages), other = our_step(small, plan, lambda stages: stages.loss(criterion))((params, heads), {}, images)
    assert np.any(np.diff(stages.output.capacity_per_block, axis=1))
    for found, wanted in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        same(found, wanted, 1e-4)


def test_heads_that_look_around_learn_as_in_pytorch():
    theirs, ours, params, heads = pair(exit_heads=Neighbourhood(16))
    plan, images = schedule.neighbours(radius={2: 0, 3: 0}, threshold=0.6, per_class=0), models.images(2, networks.SIZE)
    stages = tet.Staged(theirs)(images, schedule=plan)
    wanted = stages.loss(their_criterion)
    wanted.backward()
    assert len(stages.output.exit_depth.unique()) == 3
    learned, statistics = tej.split(heads)
    step = our_step(ours, plan, lambda stages: stages.loss(criterion))
    (loss, _), slopes = step((params, learned), statistics, networks.images_of(images))
    assert float(loss) == pytest.approx(wanted.item(), rel=1e-4)
    assert require_same_slopes(theirs, slopes) > 30


@pytest.mark.parametrize("plan", [MLP(), FCN(8), ATM(1)])
def test_what_is_told_apart_comes_together(plan):
    network = networks.plain_network()
    model = tej.wrap(network, schedule.dense(after=(2, 3)), classes=3, exit_heads=plan)
    heads = model.init(jax.random.key(0))
    learned, statistics = tej.split(heads)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(learned))
    assert len(jax.tree.leaves(statistics)) == (9 if isinstance(plan, FCN) else 0)
    together = tej.merge(learned, statistics)
    assert jax.tree.structure(together) == jax.tree.structure(heads)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, together, heads)))


def test_training_with_exits_learns():
    """Two bright classes on a dark ground, by patch; the threshold changes, and nothing is compiled anew."""
    threshold = training.Annealed(1.0, 0.8, steps=20)
    network, params = networks.timm_network(depth=3), from_torch(models.timm_vit(depth=3, size=networks.SIZE))
    model = tej.wrap(network, schedule.dense(after=(1, 2)), classes=3, exit_heads=FCN(24), capacities=(1.0,))
    rng = np.random.default_rng(5)
    label = np.kron(rng.integers(0, 3, (8, 4, 5)), np.ones((8, 8), int))
    pictures = (label[..., None] == np.arange(3)) + 0.3 * rng.normal(size=(*label.shape, 3))
    pictures, label = jnp.asarray(pictures, dtype=jnp.float32), jnp.asarray(label)
    learned, statistics = tej.split(model.init(jax.random.key(0)))
    optimiser = optax.adamw(2e-3)
    compiled = 0

    @jax.jit
    def step(trained, statistics, state, plan):
        nonlocal compiled
        compiled += 1

        def loss(trained):
            params, learned = trained
            stages = tej.staged(model, params, tej.merge(learned, statistics), pictures, plan)
            value = stages.loss(lambda logits: tej.pixel_cross_entropy(logits, label[:, ::2, ::2]))
            return value, (stages.statistics, stages.output.exit_depth)

        (value, (statistics, depth)), slopes = jax.value_and_grad(loss, has_aux=True)(trained)
        updates, state = optimiser.update(slopes, state, trained)
        return optax.apply_updates(trained, updates), statistics, state, value, depth

    trained = params, learned
    state, losses = optimiser.init(trained), []
    for index in range(30):
        plan = schedule.dtop(after=(1, 2), threshold=threshold.at(index), per_class=1)
        trained, statistics, state, value, depth = step(trained, statistics, state, plan)
        losses.append(float(value))
    assert compiled == 1
    assert losses[-1] < 0.5 * losses[0]
    assert (depth < 3).any()
    params, learned = trained
    out = model(params, tej.merge(learned, statistics), pictures, plan)
    right = (out.upsample(label.shape[1:]).argmax(axis=-1) == label).mean()
    assert right > 0.8


def some_stages():
    _, ours, params, heads = pair()
    images = networks.images_of(models.images(2, networks.SIZE))
    return jax.jit(lambda images: tej.staged(ours, params, heads, images, PLANS["dtop"]))(images)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_refused():
    stages = some_stages()
    with pytest.raises(TokenExitError, match="`model` must be wrapped by `wrap`, got int"):
        tej.staged(3, {}, {}, None)
    with pytest.raises(TokenExitError, match=r"`auxiliary` must have a weight for every exit .* got none for \[3\]"):
        stages.loss(lambda logits: logits.sum(), auxiliary={2: 1.0})
    for wrong in (-1.0, float("nan"), None, {2: -1.0, 3: 1.0}, {2: 1.0, 3: 1.0, 6: 7.0}, {"2": 1.0}):
        with pytest.raises(TokenExitError, match="`auxiliary` must be a weight from 0 up, or one for each block"):
            stages.loss(lambda logits: logits.sum(), auxiliary=wrong)
    with pytest.raises(TokenExitError, match=r"`criterion` must return a single number, got shape \(3,\) for block 2"):
        stages.loss(lambda _: jnp.ones(3))
    with pytest.raises(TokenExitError, match="`stages` must be of mask heads for a loss of masks, got none"):
        stages.loss_of_masks(lambda maps: maps.mask_logits.sum())
