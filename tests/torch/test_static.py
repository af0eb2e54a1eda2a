"""Exits with shapes that are known beforehand: the same answers as packed, and nothing that waits for a device."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tokenexit_torch as tet
from tests.core import strategies
from tests.torch import models
from tests.torch.hosts import FOREIGN, SIZE, exiting, told
from tests.torch.operators import WAITING, Operators
from tests.torch.plans import ALL, BARE, ONE_BY_ONE, PLANS, on
from tokenexit import TokenExitError, schedule
from tokenexit_torch.exits import layouts

each_plan = pytest.mark.parametrize("plan", ALL.values(), ids=ALL.keys())


def pair(host, plan, capacities=1.0):
    """A wrapped model in double precision, in which no rounding flips a token, and its static form."""
    model = models.wrapped(host, plan).double()
    return model, tet.StaticModel(model, capacities=capacities)


def assert_alike(static, packed):
    torch.testing.assert_close(static.logits, packed.logits, rtol=1e-9, atol=1e-9)
    assert torch.equal(static.exit_depth, packed.exit_depth)
    assert torch.equal(static.tokens_per_block, packed.tokens_per_block)
    assert static.head_on == packed.head_on
    assert static.overflow.eq(0).all()


@torch.no_grad()
@on([(models.timm_vit, ALL), (models.placed, BARE)])
def test_with_room_for_all_it_is_what_runs_packed(host, plan):
    model, static = pair(host, plan)
    images = models.images(3).double()
    assert_alike(static(images), model(images))


@torch.no_grad()
@each_plan
def test_with_as_much_room_as_is_needed_it_is_what_runs_packed(plan):
    model = models.wrapped(models.timm_vit, plan).double()
    images = models.images(4).double()
    packed = model(images)
    needed = tet.needed_capacity(packed)
    static = tet.StaticModel(model, capacities={int(after): needed.get(int(after), 1.0) for after in model.exit_heads})
    out = static(images)
    assert_alike(out, packed)
    if plan.active and plan.carry == schedule.dense().carry:
        # What the fullest image needs is there, and no more.
        assert torch.equal(out.capacity_per_block.amax(0), packed.tokens_per_block.amax(0).clamp(min=2))


@torch.no_grad()
@pytest.mark.parametrize("plan", ONE_BY_ONE.values(), ids=ONE_BY_ONE.keys())
def test_an_image_does_not_depend_on_its_batch_nor_on_room(plan):
    _, static = pair(models.timm_vit, plan, capacities={2: 0.6, 3: 0.5, 4: 0.3})
    images = models.images(4).double()
    together = static(images)
    for index in range(4):
        alone = static(images[index : index + 1])
        torch.testing.assert_close(alone.logits[0], together.logits[index], rtol=1e-9, atol=1e-9)
        assert torch.equal(alone.exit_depth[0], together.exit_depth[index])
        assert torch.equal(alone.overflow[0], together.overflow[index])


@torch.no_grad()
def test_a_surplus_leaves_with_its_prediction_the_most_confident_first_and_is_counted():
    plan = schedule.dtop(after=(2,), threshold=0.6, per_class=0)
    model, static = pair(models.timm_vit, plan, capacities=0.25)
    images = models.images(5).double()
    out, first = static(images), model.every_exit(images)[2]
    confidence, room = first.softmax(dim=1).amax(dim=1).flatten(1), round(0.25 * 25) - 1
    for index in range(5):
        own = confidence[index]
        staying = (own <= 0.6).nonzero()[:, 0]
        runs = staying[own[staying].argsort()][:room]
        wanted = torch.full((24,), 2).index_fill(0, runs, model.depth)
        assert torch.equal(out.exit_depth[index].flatten(), wanted)
        assert out.overflow[index] == len(staying) - len(runs)
    assert out.overflow.max() > 0
    left = (out.exit_depth == 2)[:, None].expand_as(first)
    torch.testing.assert_close(out.logits[left], first[left])
    assert (out.tokens_per_block <= out.capacity_per_block).all()
    assert out.capacity_per_block.tolist() == [[25, 25, room + 1, room + 1, room + 1, room + 1]] * 5


@torch.no_grad()
@given(
    grid=st.sampled_from([(1, 1), (7, 13), (1, 9), (20, 20)]),
    count=st.integers(0, 3),
    threshold=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
    capacity=st.sampled_from([0.01, 0.3, 1.0]),
    seed=st.integers(0, 3),
)
@strategies.fewer(3)
def test_any_grid_any_batch_any_room(grid, count, threshold, capacity, seed):
    model = models.wrapped(models.plain_host, PLANS["neighbours"].with_threshold(threshold)).double()
    images = models.images(count, (8 * grid[0], 8 * grid[1]), seed).double()
    out = tet.StaticModel(model, capacities=capacity)(images)
    assert out.logits.shape == (count, models.CLASSES, *grid)
    assert out.logits.isfinite().all()
    assert (out.tokens_per_block <= out.capacity_per_block).all()
    packed = model(images)
    if out.overflow.eq(0).all():
        torch.testing.assert_close(out.logits, packed.logits, rtol=1e-9, atol=1e-9)
    patches = grid[0] * grid[1]
    for block in range(model.depth):
        assert torch.equal(out.tokens_per_block[:, block], (out.exit_depth.reshape(count, patches) > block).sum(dim=1))


@torch.no_grad()
def test_a_nan_image_and_one_that_is_done_harm_nobody():
    _, static = pair(models.timm_vit, schedule.dtop(after=(2,), threshold=0.0, per_class=0), capacities=0.5)
    images = models.images(3).double()
    images[1] = float("nan")
    out = static(images)
    assert out.exit_depth[[0, 2]].eq(2).all()
    assert out.logits[[0, 2]].isfinite().all()
    assert out.overflow.tolist() == [0, 24 + 1 - round(0.5 * 25), 0]


@each_plan
def test_gradients_are_those_of_the_packed_run(plan):
    model, static = pair(models.timm_vit, plan)
    images, found = models.images(2).double(), []
    for run in (model, static):
        model.zero_grad()
        run(images).logits.square().sum().backward()
        found.append({name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None})
    packed, padded = found
    for name, gradient in packed.items():
        torch.testing.assert_close(padded[name], gradient, rtol=1e-7, atol=1e-9, msg=name)
    assert all(padded[name].eq(0).all() for name in set(padded) - set(packed))


@torch.no_grad()
@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN.keys())
def test_every_host_runs_static(foreign):
    model = exiting(foreign)
    images, plan = models.images(3, SIZE), told(3)
    packed, out = model(images, schedule=plan), tet.StaticModel(model, capacities=1.0)(images, schedule=plan)
    torch.testing.assert_close(out.logits, packed.logits, atol=2e-5, rtol=1e-5)
    assert torch.equal(out.exit_depth, packed.exit_depth)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in ALL if name != "per class"])
def test_no_operator_waits_for_a_device_or_copies_from_the_host(name):
    model, static = pair(models.timm_vit, ALL[name], capacities=0.5)
    images = models.images(2).double()
    static(images)
    with Operators() as static_operators:
        static(images)
    with Operators() as packed_operators:
        model(images)
    # A conversion of dtypes is no copy between devices; of constants, `lift_fresh` would tell.
    assert static_operators.seen & (WAITING - {"_to_copy"}) == set()
    if ALL[name].active:
        assert packed_operators.seen & WAITING != set()


@torch.no_grad()
def test_where_it_has_to_wait_a_packed_pass_does_so_once_at_each_exit(monkeypatch):
    model, images = models.wrapped(models.timm_vit, PLANS["neighbours"]).double(), models.images(3).double()
    wanted = model(images)
    monkeypatch.setattr(layouts, "has_to_wait", lambda _: True)
    waits = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (waits.append(tensor.shape), tolist(tensor))[1])
    with Operators() as operators:
        out = model(images)
    assert operators.seen & (WAITING - {"_to_copy", "lift_fresh"}) == set()
    assert waits == [(3,)] * 3  # how many tokens of each image run on, after each of three exits
    assert torch.equal(out.logits, wanted.logits)
    assert torch.equal(out.exit_depth, wanted.exit_depth)


@torch.no_grad()
def test_multiply_adds_count_entries_with_or_without_a_token():
    model = models.wrapped(models.timm_vit, PLANS["neighbours"])
    static = tet.StaticModel(model, capacities=0.6)
    images = models.images(2)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = static(images)
    assert int(static.multiply_adds(out).sum()) == pytest.approx(counter.get_total_flops() / 2, rel=0.02)
    more = tet.StaticModel(model, capacities=0.9)
    assert more.multiply_adds(more(images)).gt(static.multiply_adds(out)).all()


@torch.no_grad()
def test_it_follows_the_plan_of_its_model():
    model, static = pair(models.timm_vit, PLANS["dtop"])
    images = models.images(2).double()
    model.retune(threshold=1.0)
    assert static(images).exit_depth.eq(6).all()
    assert static(images, schedule=schedule.truncated(after=2)).exit_depth.eq(2).all()
    assert static(images).upsample((32, 48)).shape == (2, models.CLASSES, 32, 48)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: tet.StaticModel(m.model, capacities=0.5),
            "`model` must be wrapped by `wrap` or `wrap_decoder`, got VisionTransformer",
        ),
        (
            lambda m: tet.StaticModel(m, capacities=0.0),
            r"`capacities\[2\]` must be greater than 0 and at most 1, got 0.0",
        ),
        (lambda m: tet.StaticModel(m, capacities={2: 0.5}), r"`capacities` must be a fraction .* blocks \[2, 3, 4\]"),
        (lambda m: tet.StaticModel(m, capacities={2: 0.5, 3: True, 4: 1.0}), r"`capacities\[3\]` must be .* got True"),
        (lambda m: tet.StaticModel(m, capacities=0.5)([1]), "`images` must be a torch.Tensor, got list"),
        (
            lambda m: tet.StaticModel(m, capacities=0.5)(models.images(1), schedule=schedule.dtop(after=(5,))),
            r"exit head, \[2, 3, 4\], got \[5\]",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    model = models.wrapped(models.timm_vit, PLANS["neighbours"])
    with pytest.raises(TokenExitError, match=message):
        make(model)


@torch.no_grad()
def test_cells_stand_for_their_own_under_half_precision_too():
    plan = dataclasses.replace(PLANS["dtop"], cell=2)
    model = models.wrapped(models.timm_vit, plan)
    images = models.images(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        packed, out = model(images), tet.StaticModel(model, capacities=1.0)(images)
    assert (packed.exit_depth == out.exit_depth).float().mean() > 0.9
    assert out.logits.isfinite().all()


@torch.no_grad()
def test_another_model_in_its_place_needs_capacities_for_its_exits():
    plan = schedule.paumer(keep={2: 0.5})
    static = tet.StaticModel(models.wrapped(models.timm_vit, plan, after=(2,)), capacities=0.7)
    static.model = models.wrapped(models.timm_vit, schedule.paumer(keep={3: 0.5}), after=(3,))
    with pytest.raises(
        TokenExitError, match=r"`capacities` must have one for each exit .*, got none for the blocks \[3\]"
    ):
        static(models.images())
