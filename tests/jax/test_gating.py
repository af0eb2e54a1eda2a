"""Gates: by buckets, in one program, by masks and in PyTorch, tokens wait alike; and what must always hold."""

import dataclasses
import functools
import itertools
import re

import jax
import numpy as np
import pytest
import torch
from jax import numpy as jnp

import tokenexit_jax as tej
from tests.jax import gated as pairs
from tests.jax import networks
from tests.jax.counting import Compilations
from tests.jax.gated import gated
from tests.jax.parity import same
from tests.torch import models
from tokenexit import TokenExitError, policies, schedule
from tokenexit.carries import Feature, Preserved
from tokenexit.heads import ATM, FCN, MLP, Linear, Neighbourhood
from tokenexit.schedule import Exit, Schedule
from tokenexit_jax.heads import build

SVIT = schedule.svit(after=pairs.AFTER)
HALF = Schedule(tuple(Exit(after, policies.Budget(0.5, by="gate")) for after in pairs.AFTER), Preserved())
CARRIES = [
    Preserved(*fields)
    for fields in itertools.product(("every gate", "never"), ("running", "all"), ("decoder", "last block"))
]


def plan_with(carry):
    after = (1, 2) if carry.before == "last block" else pairs.AFTER
    return schedule.svit(after=after, threshold={block: 0.4 + 0.05 * block for block in after}, carry=carry)


def shown(count=3):
    """In both layouts; the last image is nearly grey, and its tokens wait at other gates."""
    images = models.images(count, networks.SIZE)
    images[-1:] *= 0.05
    return images, networks.images_of(images)


def agree(found, wanted, within=1e-5):
    np.testing.assert_array_equal(found.keep, wanted.keep)
    np.testing.assert_array_equal(found.tokens_per_block, wanted.tokens_per_block)
    same(found.probability, wanted.probability, within)
    assert (found.gates, found.keys) == (wanted.gates, wanted.keys)
    assert [*found.maps] == [*wanted.maps]
    theirs = isinstance(wanted.logits, torch.Tensor)
    last = (lambda one: one.movedim(1, -1)) if theirs else (lambda one: one)
    same(found.logits, last(wanted.logits), within)
    for after, here in wanted.maps.items():
        same(found.maps[after], last(here), within)


@pytest.mark.parametrize("carry", CARRIES, ids=str)
def test_all_ways_to_run_are_one_and_that_of_pytorch(carry):
    both, plan, (theirs, ours) = gated(), plan_with(carry), shown()
    wanted = both.wanted(plan, theirs)
    kept = wanted.keep.flatten(2)
    assert 0 < kept.float().mean() < 1
    called_back = (kept[:, 1:] & ~kept[:, :-1]).any()
    assert called_back == (carry.returning == "every gate")
    # Of how many carries one program is compiled as well is a question of time.
    for way in ("call", "masked", "compiled")[: 3 if carry in (CARRIES[0], CARRIES[5]) else 2]:
        found = both.call(way, plan, ours)
        agree(found, wanted)
        assert (np.asarray(found.overflow) == 0).all()
        room = np.asarray(found.capacity_per_block)
        assert (room >= np.asarray(found.tokens_per_block)).all()
        assert (room == 21).all() == (way == "masked" or carry.keys == "all")
    price = both.model.cost(both.params, ours)
    np.testing.assert_array_equal(found.multiply_adds(price), both.theirs.multiply_adds(wanted))


@pytest.mark.parametrize(
    ("kind", "plan", "ways"),
    [("plain", SVIT, ("call", "compiled", "masked")), ("placed", HALF, ("call", "masked")),
     ("timm, registers", HALF, ("call", "masked"))],
)  # fmt: skip
def test_networks_with_other_prefixes_and_positions(kind, plan, ways):
    both, (theirs, ours) = gated(kind), shown()
    wanted = both.wanted(plan, theirs)
    for way in ways:
        agree(both.call(way, plan, ours), wanted)
    if plan is HALF:
        assert (wanted.keep.sum(dim=(2, 3)) == 10).all()


@functools.cache
def slopes(model, way):
    def loss(params, images, gates, plan):
        out = getattr(model, way)(params, gates, images, plan)
        return jnp.square(out.logits).sum() + jnp.square(out.maps[2]).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


def slopes_of(both, way, plan, images):
    return slopes(both.model, way)(both.params, images, both.gates, plan)


@pytest.mark.parametrize("carry", [CARRIES[0], CARRIES[7]], ids=str)
def test_gradients_by_masks_are_those_by_buckets_and_pytorchs(carry):
    both, plan, (theirs, ours) = gated(), plan_with(carry), shown()
    slopes = masked, _ = slopes_of(both, "masked", plan, ours)
    if carry.keys == "running":
        buckets = slopes_of(both, "compiled", plan, ours)
        for found, wanted in zip(jax.tree.leaves(buckets), jax.tree.leaves(slopes), strict=True):
            scale = np.abs(wanted).max()
            same(found / scale, wanted / scale)
    both.theirs.zero_grad()
    out = both.theirs(theirs, schedule=plan)
    (out.logits.square().sum() + out.maps[2].square().sum()).backward()
    for name, parameter in both.theirs.model.named_parameters():
        scale = max(parameter.grad.abs().max().item(), 1e-3)
        same(masked[name] / scale, parameter.grad / scale, 1e-4)


@pytest.mark.parametrize(
    ("kind", "carry"), [("plain", CARRIES[0]), ("plain", CARRIES[2]), ("timm", CARRIES[0])], ids=str
)
def test_where_nothing_is_kept_tokens_stay_as_they_are(kind, carry):
    """All wait from the first gate on; prefix tokens run."""
    both, (theirs, ours) = gated(kind), shown()
    nobody = Schedule(SVIT.with_threshold(1.0).exits, carry)
    wanted = both.wanted(nobody, theirs)
    prefix = 0 if kind == "plain" else 1
    for way in ("call", "compiled", "masked"):
        found = both.call(way, nobody, ours)
        agree(found, wanted)
        assert not np.any(found.keep)
        np.testing.assert_array_equal(found.tokens_per_block, [[20 + prefix] + 3 * [prefix]] * 3)
    assert all(np.isfinite(one).all() for one in jax.tree.leaves(slopes_of(both, "masked", nobody, ours)))
    if kind == "plain" and carry.keys == "running":
        for way in ("call", "compiled"):
            found = both.call(way, nobody, ours)
            assert (np.asarray(found.capacity_per_block)[:, 1:] == 0).all()
        embedded = both.model.network.embed(both.params, ours)
        first = both.model.network.blocks[0](both.params, embedded.tokens, jnp.ones((3, 20)), None)
        same(found.maps[2].reshape(3, 20, -1), first)


def test_one_image_with_nothing_kept_beside_others():
    both, (theirs, ours) = gated("plain"), shown()
    probability = both.wanted(SVIT.with_threshold(0.0), theirs).probability.flatten(2)
    most = probability[:, 0].amax(dim=1)
    empty = int(most.argmin())
    plan = SVIT.with_threshold({1: float(most[empty]) + 1e-4, 2: 0.0, 3: 1.0})
    wanted = both.wanted(plan, theirs)
    assert wanted.tokens_per_block[empty].tolist() == [20, 0, 20, 0]
    assert (wanted.tokens_per_block[:, 1] > 0).any()
    for way in ("call", "compiled", "masked"):
        agree(both.call(way, plan, ours), wanted)
    for way in ("compiled", "masked"):
        assert all(np.isfinite(one).all() for one in jax.tree.leaves(slopes_of(both, way, plan, ours)))


def test_nothing_is_nan_in_ten_thousand_random_selections():
    """Of which some keep nothing or all, by masks and by buckets, on the network without prefix tokens; of 6 patches each."""

    @functools.partial(tej.register, leaves=("marks",))
    @dataclasses.dataclass(frozen=True)
    class Drawn(policies.Policy):
        marks: object

        def leaves(self, evidence):
            return self.marks

    both = gated("plain")
    rng, (_, shown_once) = np.random.default_rng(0), shown()
    ours = jnp.tile(shown_once[:, :16, :24], (334, 1, 1, 1))[:1000]
    for _ in range(10):
        marks = rng.random((3, 1000, 6)) < rng.choice([0, 0.05, 0.5, 0.95, 1], size=(3, 1000, 1))
        exits = tuple(
            Exit(after, Drawn(jnp.asarray(one.reshape(-1)))) for after, one in zip(pairs.AFTER, marks, strict=True)
        )
        one, other = (both.call(way, Schedule(exits, Preserved()), ours) for way in ("compiled", "masked"))
        np.testing.assert_array_equal(np.asarray(one.keep).reshape(1000, 3, 6), ~marks.swapaxes(0, 1))
        assert np.isfinite(one.logits).all()
        agree(one, other)


def test_a_nan_is_kept_and_harms_no_other_image():
    both, (_, ours) = gated(), shown()
    wanted = both.call("call", SVIT, ours)
    broken = ours.at[1].set(jnp.nan)
    for way in ("call", "compiled", "masked"):
        found = both.call(way, SVIT, broken)
        assert np.all(found.keep[1])
        assert np.isnan(found.logits[1]).all()
        for other in (0, 2):
            np.testing.assert_array_equal(found.keep[other], wanted.keep[other])
            same(found.logits[other], wanted.logits[other])


def test_two_evaluations_are_identical_to_the_bit():
    both, (_, ours) = gated(), shown()
    for way in ("call", "compiled", "masked"):
        one, other = both.call(way, SVIT, ours), both.call(way, SVIT, ours)
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_an_image_alone_is_the_image_in_a_batch():
    both, (_, ours) = gated(), shown()
    together = both.call("call", SVIT, ours)
    for index in (0, 2):
        alone = both.call("call", SVIT, ours[index : index + 1])
        np.testing.assert_array_equal(alone.keep[0], together.keep[index])
        same(alone.logits[0], together.logits[index])


def test_without_gates_it_is_the_dense_network():
    both, (theirs, ours) = gated(), shown()
    dense = both.call("call", schedule.dense(), ours)
    agree(dense, both.wanted(schedule.dense(), theirs))
    assert dense.keep.shape == (3, 0, 4, 5)
    assert (np.asarray(dense.tokens_per_block) == 21).all()
    everyone = both.call("call", SVIT.with_threshold(0.0), ours)
    assert np.all(everyone.keep)
    same(everyone.logits, dense.logits)


def test_what_a_fixed_budget_has_no_room_for_waits_the_least_sure_first_and_is_counted():
    both, (_, ours) = gated(), shown()
    tight = dataclasses.replace(both, model=dataclasses.replace(both.model, capacities=((0.5,),) * 3))
    free = both.call("call", SVIT, ours)
    found = tight.call("call", SVIT, ours)
    np.testing.assert_array_equal(found.capacity_per_block, [[21, 10, 10, 10]] * 3)
    kept, wished = (np.asarray(one.keep).reshape(3, 3, 20) for one in (found, free))
    assert (kept.sum(axis=2) <= 9).all()
    sure = np.asarray(free.probability).reshape(3, 3, 20)[:, 0]
    for image in range(3):
        order = np.argsort(-sure[image], kind="stable")
        most = min(9, wished[image, 0].sum())
        np.testing.assert_array_equal(np.sort(order[:most]), np.flatnonzero(kept[image, 0]))
    assert (np.asarray(found.overflow) >= np.maximum(wished[:, 0].sum(axis=1) - 9, 0)).all()
    assert found.overflow.sum() > 0
    for way in ("compiled", "masked"):
        other = tight.call(way, SVIT, ours)
        agree(other, found)
        np.testing.assert_array_equal(other.overflow, found.overflow)


def test_half_precision_is_finite_and_near():
    both, (_, ours) = gated(), shown()
    single = both.call("call", SVIT, ours)
    half = functools.partial(jax.tree.map, lambda one: one.astype(jnp.bfloat16))
    params, images = half(both.params), half(ours)  # the gates are left in float32
    out = both.model(params, both.gates, images, SVIT)
    assert (out.logits.dtype, out.probability.dtype) == (jnp.bfloat16, jnp.float32)
    assert np.isfinite(np.asarray(out.logits, np.float32)).all()
    assert np.mean(np.asarray(out.keep) == np.asarray(single.keep)) > 0.85
    halved = dataclasses.replace(both, params=params, gates=half(both.gates))
    masked = halved.call("masked", SVIT, images)
    assert np.isfinite(np.asarray(masked.logits, np.float32)).all()
    assert np.mean(np.asarray(masked.keep) == np.asarray(single.keep)) > 0.85


def test_upsampling_needs_a_head():
    both, (theirs, ours) = gated(), shown()
    found, wanted = both.call("call", SVIT, ours), both.wanted(SVIT, theirs)
    same(found.upsample((32, 40)), wanted.upsample((32, 40)).movedim(1, -1), 1e-4)
    bare = dataclasses.replace(both.model, head=None)
    out = bare(both.params, both.gates, ours, SVIT)
    assert out.logits is None
    same(out.maps[4], found.maps[4])
    assert (
        out.multiply_adds(bare.cost(both.params, ours)) < found.multiply_adds(both.model.cost(both.params, ours))
    ).all()
    with pytest.raises(TokenExitError, match="`head` must be given to `wrap_gates` for logits, got None"):
        out.upsample((32, 40))


@pytest.mark.parametrize(("count", "grid"), [(0, (4, 5)), (2, (1, 1))])
def test_any_grid_and_any_batch(count, grid):
    both = gated("plain")
    images = networks.images_of(models.images(count, (8 * grid[0], 8 * grid[1])))
    out = both.call("call", SVIT, images)
    assert out.logits.shape == (count, *grid, 5)
    assert out.keep.shape == (count, 3, *grid)
    assert np.isfinite(out.logits).all()


@pytest.fixture
def compilations():
    counter = Compilations()
    jax.monitoring.register_event_duration_secs_listener(counter)
    yield counter
    jax.monitoring.unregister_event_duration_listener(counter)


def test_retuning_compiles_nothing_anew(compilations):
    both, (_, ours) = gated("plain", (1.0,)), shown()
    program = jax.jit(both.model.compiled)
    both.call("call", SVIT, ours)
    program(both.params, both.gates, ours, SVIT)
    both.model(both.params, both.gates, ours)
    before, ran = compilations.count, []
    for threshold in (0.1, 0.5, {1: 0.3, 2: 0.6, 3: 0.9}, 0.9):
        model = both.model.retuned(threshold=threshold)
        ran.append(int(model(both.params, both.gates, ours).tokens_per_block.sum()))
        out = program(both.params, both.gates, ours, model.schedule)
        assert int(out.tokens_per_block.sum()) == ran[-1]
    assert len(set(ran)) == 4
    spent = compilations.count - before
    both.model(both.params, both.gates, ours, HALF)
    assert compilations.count > before + spent, "so this test can fail"
    assert spent <= 1  # the sum above, once


def test_a_call_compiles_a_part_in_every_bucket_at_most(compilations):
    both = gated("plain", (0.5, 1.0))
    batches = [networks.images_of(models.images(3, networks.SIZE, seed)) for seed in range(3)]
    before = compilations.count
    for threshold in (0.1, 0.3, 0.5, 0.7, 0.9):
        for images in batches:
            jax.block_until_ready(both.call("call", SVIT.with_threshold(threshold), images))
    # Opened and closed; three gates; the blocks after each in two buckets. Small sums beside it.
    assert compilations.count - before <= 2 + 3 + 3 * 2 + 6


def test_new_gates_let_most_tokens_run():
    for plan in (Linear(), MLP(6), FCN(6)):
        model = tej.wrap_gates(networks.timm_network(), SVIT, gates=plan)
        gates = model.init(jax.random.key(0))
        assert [*gates] == ["1", "2", "3"]
        patches = jax.random.normal(jax.random.key(1), (200, 48))
        probability = jax.nn.softmax(build.read(plan, gates["2"], patches))[:, 0]
        assert 0.8 < probability.mean() < 0.95
        first, second = (jax.tree.leaves(gates[after]) for after in ("1", "2"))
        assert any(not jnp.array_equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_check_of_the_network_takes_gates():
    both, (_, ours) = gated("plain"), shown(2)
    small = tej.wrap_gates(networks.plain_network(depth=1), schedule.dense(), head=pairs.head)
    tej.check(small, both.params, ours)
    mixing = dataclasses.replace(small, head=lambda params, x: pairs.head(params, x - x.mean(axis=1, keepdims=True)))
    with pytest.raises(TokenExitError, match="`head` must treat each token by itself"):
        tej.check(mixing, both.params, ours)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("plan", "options", "message"), [
    ("svit", {}, "`schedule` must be a tokenexit.schedule.Schedule, got 'svit'"),
    (schedule.dtop(after=(2,)), {}, "`schedule` must carry Preserved, for a model with gates, got Prediction()"),
    (Schedule(SVIT.exits, Feature()), {}, "`schedule` must carry Preserved"),
    (Schedule((Exit(2, policies.ConfidenceAbove(0.5)),), Preserved()), {}, "`schedule` must compare the probabilities of gates alone"),
    (dataclasses.replace(SVIT, cell=2), {}, "`schedule` must have no cells where tokens are preserved, got 2"),
    (schedule.svit(after=(2, 5)), {}, "`schedule` must have gates after blocks 1 to 4 only, for 5 blocks and before='decoder', got [5]"),
    (schedule.svit(after=(4,), carry=Preserved(before="last block")), {}, "`schedule` must have gates after blocks 1 to 3 only"),
    (SVIT, {"head": 3}, "`head` must be None or a function, got 3"),
    (SVIT, {"gates": ATM()}, "`gates` must be a plan of tokenexit.heads that treats each token by itself"),
    (SVIT, {"gates": Neighbourhood()}, "`gates` must be a plan of tokenexit.heads that treats each token by itself"),
    (SVIT, {"gates": {}}, "`gates` must be a plan of tokenexit.heads"),
    (SVIT, {"taps": (6,)}, "`taps` must be ascending blocks from 1 to 5, got (6,)"),
    (SVIT, {"taps": (3, 2)}, "`taps` must be ascending blocks"),
    (SVIT, {"capacities": {1: (1.0,)}}, "`capacities` must be fractions for all gates, or for each of those after the blocks (1, 2, 3)"),
    (SVIT, {"capacities": (0.0,)}, "`capacities` must be one or more fractions, greater than 0"),
])  # fmt: skip
def test_what_cannot_be_wrapped_is_named(plan, options, message):
    with pytest.raises(TokenExitError, match=re.escape(message)):
        tej.wrap_gates(networks.timm_network(), plan, **options)


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_the_model_is_named(tmp_path):
    both, (_, ours) = gated(), shown()
    model, params, gates = both.model, both.params, both.gates
    with pytest.raises(
        TokenExitError, match=r"`schedule` must decide only after blocks with a gate, \[1, 2, 3\], got \[4\]"
    ):
        dataclasses.replace(model, network=networks.timm_network()).retuned(schedule.svit(after=(4,)))
    with pytest.raises(TokenExitError, match="`schedule` must be given if `threshold` is not, got None"):
        model.retuned()
    with pytest.raises(TokenExitError, match=r"`model` must be transformed as `model.compiled`, got the model itself"):
        jax.jit(model)(params, gates, ours)
    others = tej.wrap_gates(model.network, SVIT, gates=MLP(7)).init(jax.random.key(0))
    message = r"`gates` must be of the model, as `init` makes them, got \['1'\]\['1.bias'\]: \(7,\) instead of \(12,\)"
    for call in (
        lambda: model(params, others, ours),
        lambda: model.compiled(params, others, ours),
        lambda: model.masked(params, others, ours),
        lambda: tej.sampled(model, params, others, ours, key=jax.random.key(0), rates=0.5),
        lambda: tej.gate_thresholds(model, params, others, ours, rates=0.5),
        lambda: tej.save(model, others, tmp_path),
    ):
        with pytest.raises(TokenExitError, match=message):
            call()
    assert not [*tmp_path.iterdir()]
