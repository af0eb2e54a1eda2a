"""Same weights, same images: JAX decides as PyTorch does; and what must always hold when tokens leave."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jax import numpy as jnp

import tokenexit_jax as tej
from tests.core import strategies
from tests.jax import networks
from tests.jax.counting import Compilations
from tests.jax.networks import pair
from tests.jax.parity import same
from tests.torch import models
from tokenexit import TokenExitError, cells, policies, schedule
from tokenexit.carries import Feature, MaskPrediction
from tokenexit.heads import ATM
from tokenexit.schedule import Exit, Schedule

NEIGHBOURS = schedule.neighbours(radius={2: 1, 4: 0}, threshold=0.4, per_class=1)
NEIGHBOURS_LATE = NEIGHBOURS.with_threshold(0.9)
DTOP = schedule.dtop(after=(2, 4), threshold=0.5, per_class=2)
DOVIT = schedule.dovit(after=(2, 4), threshold=0.5)
PAUMER = schedule.paumer(after=(2, 4), threshold=0.4)
ANEW = Schedule(DTOP.exits, MaskPrediction())
CELLS = schedule.neighbours(radius={2: 1, 4: 0}, threshold=0.55, per_class=0, cell=2)
REJOINING = Schedule(schedule.paumer(after=(2, 4), threshold=0.5).exits, Feature("last block", 0.05), cell=3)
PATIENT = policies.Patience(1) | policies.ConfidenceAbove(0.7)
PLANS = {
    "neighbours": ("timm", NEIGHBOURS),
    "dtop": ("plain", DTOP),
    "dovit": ("timm, registers", DOVIT),
    "paumer": ("timm", PAUMER),
    "neighbours with cells": ("timm", CELLS),
    "with cells, rejoining for the last block": ("timm, registers", REJOINING),
    "masks weighted anew": ("masks", ANEW),
    "heads that look around": ("around", NEIGHBOURS),
    "heads that look around, rejoining": ("around", REJOINING),
    "patience": ("placed", Schedule(tuple(Exit(after, PATIENT) for after in (2, 3)))),
}


def images_with_one_that_differs(count=3):
    """The last image is nearly grey, and its tokens leave at other exits."""
    images = models.images(count, networks.SIZE)
    images[-1:] *= 0.05
    return images


def agree(found, wanted, within=1e-4):
    np.testing.assert_array_equal(found.exit_depth, wanted.exit_depth)
    np.testing.assert_array_equal(found.tokens_per_block, wanted.tokens_per_block)
    logits = wanted.logits.movedim(1, -1) if isinstance(wanted.logits, torch.Tensor) else wanted.logits
    same(found.logits, logits, within)


@pytest.mark.parametrize(("kind", "plan"), PLANS.values(), ids=PLANS.keys())
def test_jax_decides_as_pytorch_does_at_the_same_price(kind, plan):
    both, images = pair(kind), images_with_one_that_differs()
    found, wanted = both.found(plan, images), both.wanted(plan, images)
    assert len(np.unique(found.exit_depth)) > 1
    agree(found, wanted)
    assert found.head_on == wanted.head_on
    assert (np.asarray(found.overflow) == 0).all()
    price = both.model.cost(both.params, networks.images_of(images))
    np.testing.assert_array_equal(found.multiply_adds(price), both.theirs.multiply_adds(wanted))


@pytest.mark.parametrize("name", ["masks weighted anew", "with cells, rejoining for the last block"])
def test_one_program_gives_what_buckets_chosen_on_the_host_give(name):
    kind, plan = PLANS[name]
    both, images = pair(kind), images_with_one_that_differs()
    found, wanted = both.compiled(plan, images), both.found(plan, images)
    agree(found, wanted, 1e-6)
    np.testing.assert_array_equal(found.capacity_per_block, wanted.capacity_per_block)
    assert (found.exits, found.head_on) == (wanted.exits, wanted.head_on)


@given(sizes=st.sets(st.sampled_from([0.25, 0.5, 0.75]), min_size=0))
@strategies.fewer(8)
def test_any_buckets_give_the_result_of_full_capacity(sizes):
    both, images = pair("timm"), images_with_one_that_differs()
    fractions = (*sorted(sizes), 1.0)
    found = both.found(NEIGHBOURS, images, capacities=(fractions,) * 3)
    full = both.found(NEIGHBOURS, images, capacities=((1.0,),) * 3)
    agree(found, full, 1e-6)
    needed = np.asarray(found.tokens_per_block).max(axis=0)
    held = np.asarray(found.capacity_per_block)[0]
    entries = np.array([round(21 * fraction) for fraction in fractions])
    assert (held[:2] == 21).all()
    assert all(held[block] == entries[entries >= needed[block]].min() for block in (2, 3, 4))


def test_an_image_alone_is_the_image_in_a_batch():
    both, images = pair("timm"), images_with_one_that_differs()
    together = both.found(NEIGHBOURS, images)
    for index in (0, 2):
        alone = both.found(NEIGHBOURS, images[index : index + 1])
        np.testing.assert_array_equal(alone.exit_depth[0], together.exit_depth[index])
        np.testing.assert_array_equal(alone.tokens_per_block[0], together.tokens_per_block[index])
        same(alone.logits[0], together.logits[index])


def test_nothing_leaves_is_the_dense_network_and_everything_leaves_is_the_first_head():
    both, images = pair("timm"), models.images(3, networks.SIZE)
    every = both.every(images)
    assert [*every] == [2, 3, 4, 5]
    with torch.no_grad():
        for after, wanted in both.theirs.every_exit(images).items():
            same(every[after], wanted.movedim(1, -1))
    dense = both.found(schedule.dense(), images)
    same(dense.logits, every[5])
    assert (np.asarray(dense.exit_depth) == 5).all()
    for plan in (schedule.truncated(after=3), dataclasses.replace(schedule.truncated(after=3), cell=2)):
        truncated = both.found(plan, images)
        same(truncated.logits, every[3])
        assert (np.asarray(truncated.exit_depth) == 3).all()
        for counted in (truncated.tokens_per_block, truncated.capacity_per_block):
            np.testing.assert_array_equal(counted, [[21, 21, 21, 0, 0]] * 3)
    fixed = both.found(schedule.truncated(after=3), images, capacities=((0.5,),) * 3)
    same(fixed.logits, every[3])  # a fixed budget runs whatever has left
    np.testing.assert_array_equal(fixed.capacity_per_block, [[21, 21, 21, 10, 10]] * 3)
    assert fixed.tokens_per_block[:, 3:].sum() == 0


def test_a_threshold_that_nothing_passes_runs_gathered_and_is_dense():
    both, images = pair("timm"), models.images(3, networks.SIZE)
    found = both.found(DTOP.with_threshold(1.0), images)
    same(found.logits, both.found(schedule.dense(), images).logits)


@pytest.mark.parametrize("plan", [NEIGHBOURS_LATE, CELLS.with_threshold(0.9)], ids=["neighbours", "cells"])
def test_what_a_fixed_budget_has_no_room_for_leaves_the_most_confident_first_and_is_counted(plan):
    both, images = pair("timm"), images_with_one_that_differs()
    model = dataclasses.replace(both.model, capacities=((0.5,),) * 3)
    arguments = both.params, both.heads, networks.images_of(images), plan
    free = both.found(plan, images)
    out = model(*arguments)
    np.testing.assert_array_equal(out.capacity_per_block, [[21, 21, 10, 10, 10]] * 3)
    assert (np.asarray(out.tokens_per_block)[:, 2] == 10).all()
    gone, anyhow = np.asarray(out.exit_depth) == 2, np.asarray(free.exit_depth) == 2
    assert (gone | ~anyhow).all()
    np.testing.assert_array_equal(out.overflow, (gone & ~anyhow).sum(axis=(1, 2)))
    assert (np.asarray(out.overflow) > 0).all()
    every = both.every(images)
    certain = np.asarray(jax.nn.softmax(every[2]).max(axis=-1))
    if plan.cell is None:
        least = [certain[i][gone[i] & ~anyhow[i]].min() for i in range(3)]
        assert all(certain[i][~gone[i]].max() <= least[i] for i in range(3) if not anyhow[i].any())
    else:
        middle = np.asarray(cells.is_cell_centre(np.arange(20), grid=(4, 5), side=plan.cell)).reshape(4, 5)
        assert not gone[:, middle].any()
    same(out.logits[gone], every[2][gone])
    if plan is NEIGHBOURS_LATE:
        compiled = jax.jit(model.compiled)(*arguments)
        agree(compiled, out, 1e-6)
        np.testing.assert_array_equal(compiled.overflow, out.overflow)


def test_buckets_may_differ_from_exit_to_exit():
    network = networks.timm_network()
    model = tej.wrap(network, NEIGHBOURS, classes=5, capacities={2: (1.0, 0.6), 4: (0.5,)})
    assert model.capacities == ((0.6, 1.0), (0.5,))


# Odd input, on two blocks with an exit between them.


def small(classes=4, threshold=0.5, per_class=0):
    params = pair("plain").params
    plan = schedule.dtop(after=(1,), threshold=threshold, per_class=per_class)
    model = tej.wrap(networks.plain_network(depth=2), plan, classes=classes, capacities=(0.5, 1.0))
    heads = model.init(jax.random.key(0))
    for head in (heads["exit_heads"]["1"], heads["head"]):
        head["3.weight"] = head["3.weight"] * 40
    return model, params, heads


def shown(count=3, grid=(4, 5), seed=0):
    return networks.images_of(models.images(count, (8 * grid[0], 8 * grid[1]), seed))


@pytest.mark.parametrize(("count", "grid"), [(0, (4, 5)), (2, (1, 1)), (1, (7, 3))])
def test_any_grid_and_any_batch(count, grid):
    model, params, heads = small()
    out = model(params, heads, shown(count, grid))
    assert out.logits.shape == (count, *grid, 4)
    assert out.exit_depth.shape == (count, *grid)
    assert np.isfinite(out.logits).all()


def test_a_nan_never_leaves_and_harms_no_other_image():
    model, params, heads = small(threshold=0.0)
    images = shown().at[1].set(jnp.nan)
    out = model(params, heads, images)
    assert (np.asarray(out.exit_depth)[[0, 2]] == 1).all()
    assert (np.asarray(out.exit_depth)[1] == 2).all()
    assert np.isfinite(np.asarray(out.logits)[[0, 2]]).all()
    np.testing.assert_array_equal(out.tokens_per_block, [[20, 0], [20, 20], [20, 0]])


def test_infinite_logits_do_not_leave():
    model, params, heads = small()
    head = heads["exit_heads"]["1"]
    heads["exit_heads"]["1"] = head | {"3.bias": head["3.bias"].at[0].set(jnp.inf)}
    out = model(params, heads, shown())
    assert (np.asarray(out.exit_depth) == 2).all()
    assert np.isfinite(out.logits).all()


def test_half_precision_is_near():
    dtype = jnp.bfloat16  # of float16 XLA makes no attention on a CPU
    model, params, heads = small()
    single = model(params, heads, shown())
    params, heads = jax.tree.map(lambda one: one.astype(dtype), (params, heads))
    out = model(params, heads, shown().astype(dtype))
    assert out.logits.dtype == dtype
    alike = np.asarray(out.exit_depth) == np.asarray(single.exit_depth)
    assert alike.mean() > 0.9
    error = np.abs(np.asarray(out.logits, np.float32) - np.asarray(single.logits))[alike].mean()
    assert error < 0.1 * np.abs(np.asarray(single.logits)).mean()


def test_gradients_flow_through_one_program_also_if_an_image_is_finished():
    model, params, heads = small()
    images = shown()

    def loss(params, heads, images, plan):
        out = model.compiled(params, heads, images, plan)
        return jnp.square(out.logits).sum(), out

    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    certain = np.asarray(jax.nn.softmax(jax.jit(model.every_exit)(params, heads, images)[1]).max(axis=-1))
    least = certain.min(axis=(1, 2))
    # All tokens of one image leave, and some of the others.
    slopes, out = program(params, heads, images, model.schedule.with_threshold(float(least.max()) - 1e-3))
    np.testing.assert_array_equal(np.asarray(out.tokens_per_block)[:, 1] == 0, least == least.max())
    assert (np.asarray(out.exit_depth)[least < least.max()] == 1).any()
    assert all(np.isfinite(one).all() for one in jax.tree.leaves(slopes))
    of_params, of_heads, of_images = slopes
    head = of_heads["exit_heads"]["1"], of_heads["head"]
    reached = of_params["patches.weight"], of_params["blocks.1.mlp.0.weight"], *(one["3.weight"] for one in head)
    assert all(np.abs(one).max() > 0 for one in (*reached, *of_images))


def test_upsampling_is_that_of_pytorch():
    both, images = pair("timm"), models.images(3, networks.SIZE)
    found, wanted = both.found(NEIGHBOURS, images), both.wanted(NEIGHBOURS, images)
    same(found.upsample((32, 40)), wanted.upsample((32, 40)).movedim(1, -1), 1e-4)


def test_masks_of_every_head_are_those_of_pytorch():
    both, images = pair("masks"), models.images(3, networks.SIZE)
    found = jax.jit(both.model.every_mask)(both.params, both.heads, networks.images_of(images))
    with torch.no_grad():
        wanted = both.theirs.every_mask(images)
    assert [*found] == [*wanted]
    for after, maps in wanted.items():
        same(found[after].mask_logits, maps.mask_logits.movedim(1, -1), 1e-4)
        same(found[after].presence_logits, maps.presence_logits, 1e-4)


# How often something is compiled.


@pytest.fixture
def compilations():
    counter = Compilations()
    jax.monitoring.register_event_duration_secs_listener(counter)
    yield counter
    jax.monitoring.unregister_event_duration_listener(counter)


def test_a_whole_evaluation_compiles_no_more_than_its_stages_in_every_bucket(compilations):
    params = pair("plain").params
    network = networks.plain_network(depth=3)
    plan = schedule.neighbours(radius={1: 1, 2: 0}, threshold=0.5, per_class=1)
    model = tej.wrap(network, plan, classes=4, capacities=(0.4, 1.0))
    heads = model.init(jax.random.key(0))
    batches = [shown(seed=seed) for seed in range(3)]
    before = compilations.count
    for threshold in (0.26, 0.3, 0.35, 0.5, 0.99):
        for images in batches:
            jax.block_until_ready(model.retuned(threshold=threshold)(params, heads, images))
    spent = compilations.count - before
    assert 3 <= spent <= 2 * 2 + 2
    with_arrays = plan.with_threshold({1: jnp.float32(0.3), 2: jnp.float32(0.7)})
    before = compilations.count
    model(params, heads, batches[0], with_arrays)
    model.retuned(threshold={1: 0.9})(params, heads, batches[0])
    assert compilations.count == before


def test_retuning_one_program_compiles_nothing_again(compilations):
    model, params, heads = small()
    program, images = jax.jit(model.compiled), shown()
    depths = []
    assert jax.tree.leaves(model.schedule) == [0.5]
    program(params, heads, images, model.schedule)
    before = compilations.count
    for threshold in (0.0, 0.6, 1.0):
        out = program(params, heads, images, model.schedule.with_threshold(threshold))
        depths.append(np.asarray(out.exit_depth).sum())
    assert compilations.count == before
    assert depths[0] < depths[2]


NUMBERS = (0.6, 1, np.float32(0.7), np.float64(0.8), np.asarray(0.9), np.asarray(1))


@pytest.mark.usefixtures("unchecked")
def test_any_kind_of_number_is_the_same_program(compilations):
    model, params, heads = small()
    program, images = jax.jit(model.compiled), shown()
    program(params, heads, images, model.schedule)
    for threshold in (0.0, 0.6, 1.0):  # all buckets
        model.retuned(threshold=threshold)(params, heads, images)
    known = [model.retuned(threshold=jnp.float32(0.6)).schedule]
    plans = [*(model.schedule.with_threshold(number) for number in NUMBERS), *known]
    before = compilations.count
    for plan in plans:
        program(params, heads, images, plan)
        model.retuned(plan)(params, heads, images)
    assert compilations.count == before


@pytest.mark.usefixtures("unchecked")
def test_a_model_is_hashable_whatever_its_thresholds_are():
    model = small()[0]
    for number in (*NUMBERS, jnp.float32(0.6), jnp.asarray(1)):
        retuned = model.retuned(threshold=number)
        assert hash(retuned) == hash(model.retuned(threshold=float(number)))
        assert type(retuned.schedule.exits[0].policy.policy.threshold) in (int, float)


def test_a_threshold_that_is_traced_stays_so():
    model, params, heads = small()
    every, images = model.every_exit(params, heads, shown()), shown()
    least = float(jax.nn.softmax(every[1]).max(axis=-1).min())

    @jax.jit
    def depths(threshold):
        return model.retuned(threshold=threshold).compiled(params, heads, images).exit_depth

    assert (depths(1.0) == 2).all()
    assert (depths(least / 2) == 1).all()


def test_a_plan_of_another_kind_is_compiled_anew(compilations):
    """So the tests above can fail."""
    model, params, heads = small()
    model(params, heads, shown())
    before = compilations.count
    model(params, heads, shown(), schedule.dtop(after=(1,), threshold=0.5, per_class=3))
    assert compilations.count > before


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.retuned(), "`schedule` must be given if neither `threshold` nor `alike` is, got None"),
        (lambda m: m.retuned(DTOP, threshold=2.0), r"`threshold` must be in \[0, 1\], got 2.0"),
        (lambda m: m.retuned(schedule.dtop(after=(1,))), r"exit head, \[2, 3, 4\], got \[1\]"),
        (lambda m: m.retuned(schedule.dtop(after=(6, 8))), r"blocks 1 to 4 only, for 5 blocks, got \[6, 8\]"),
        (
            lambda m: m.retuned(DTOP, threshold=(0.5, 0.6)),
            r"`threshold` must be one threshold for all exits, or a mapping .*, as {2: 0.9, 4: 0.9}, got \(0.5, 0.6\)",
        ),
        (lambda m: m.retuned("dtop"), "`schedule` must be a tokenexit.schedule.Schedule, got 'dtop'"),
        (lambda m: m.retuned(schedule.svit(after=(2, 3))), "carry predictions or features .*without gates"),
        (lambda m: m.retuned(ANEW), "carry no MaskPrediction, for heads that give no masks"),
        (lambda m: m.every_mask({}, {}, None), r"`model` must have mask heads, got MLP\(hidden=None\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(TokenExitError, match=message):
        call(pair("timm").model)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("heads", [
    lambda m: dataclasses.replace(m, classes=7).init(jax.random.key(0)),
    lambda m: {**m.init(jax.random.key(0)), "more": jnp.zeros(2)},
    lambda m: {"exit_heads": {}},
    lambda m: {**m.init(jax.random.key(0)), "exit_heads": {1: m.init(jax.random.key(0))["exit_heads"]["1"]}},
    lambda m: None,
])  # fmt: skip
def test_heads_of_another_model_are_named(heads, tmp_path):
    model, params, _ = small()
    others = heads(model)
    calls = (
        lambda: model(params, others, shown()), lambda: model.compiled(params, others, shown()),
        lambda: model.every_exit(params, others, shown()), lambda: tej.save(model, others, tmp_path),
        lambda: tej.staged(model, params, others, shown()),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(TokenExitError, match=r"`heads` must be of the model, as `init` makes them, got \["):
            call()


def test_a_model_in_a_transformation_is_told_what_to_use():
    model, params, heads = small()
    with pytest.raises(TokenExitError, match=r"`model` must be transformed as `model.compiled`, got the model itself"):
        jax.jit(model)(params, heads, shown())


@pytest.mark.usefixtures("unchecked")
def test_plans_that_do_not_fit_the_network_are_named():
    both = pair("plain")
    with pytest.raises(TokenExitError, match="`schedule` must have fold_above=None for a network without prefix"):
        both.found(DOVIT, models.images(1, networks.SIZE))
    model = tej.wrap(networks.timm_network(), schedule.dense(after=(2,)), classes=5, exit_heads=ATM(1, 2))
    with pytest.raises(TokenExitError, match="compare confidences, for mask heads"):
        model.retuned(schedule.paumer(after=(2,)))
