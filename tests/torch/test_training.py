"""Training with exits: real exits in the forward pass, a loss for every head, and losses themselves."""

import copy
import os
import socket

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import multiprocessing, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tokenexit_torch as tet
from tests.torch import models
from tests.torch.plans import FEATURES, PLANS
from tokenexit import TokenExitError, policies, schedule, training
from tokenexit.heads import FCN
from tokenexit.schedule import Exit, Schedule

ALL = {**PLANS, **FEATURES, "dense": schedule.dense(), "all leave at once": schedule.truncated(after=3)}
each_plan = pytest.mark.parametrize("plan", ALL.values(), ids=ALL.keys())
FREEZING = {name: plan for name, plan in ALL.items() if name not in FEATURES}
each_freezing = pytest.mark.parametrize("plan", FREEZING.values(), ids=FREEZING.keys())


def labels(count=3, size=(32, 48), seed=0):
    return torch.randint(0, models.CLASSES, (count, *size), generator=torch.Generator().manual_seed(seed))


def gradients(module):
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@each_plan
def test_the_output_is_that_of_the_model(plan):
    model = models.wrapped(models.timm_vit, plan)
    expected, found = model(models.images()), tet.Staged(model)(models.images())
    for one, other in zip(expected, found.output, strict=True):
        assert one is other or torch.equal(torch.as_tensor(one), torch.as_tensor(other)) or one == other
    assert set(found.logits) - {model.depth} == set(expected.exits)


@each_freezing
def test_a_stage_holds_what_has_left_and_what_its_head_says_of_the_others(plan):
    model = models.wrapped(models.timm_vit, plan)
    stages = tet.Staged(model)(models.images())
    depth, final = stages.output.exit_depth, stages.output.logits
    every = model.every_exit(models.images())
    for after, logits in stages.logits.items():
        gone = (depth < after)[:, None].expand_as(logits)
        same(logits[gone], final[gone])
        leaving = (depth == after)[:, None].expand_as(logits)
        same(logits[leaving], final[leaving])
        if after == min(stages.logits):  # so far all tokens of all images have run
            same(logits, every[after])


def test_a_token_that_runs_on_has_its_present_prediction_in_each_stage():
    plan = Schedule((Exit(2, policies.Budget(0.5)), Exit(4, policies.Budget(0.2))))
    model = models.wrapped(models.timm_vit, plan)
    stages = tet.Staged(model)(models.images())
    running = (stages.output.exit_depth == model.depth)[:, None].expand_as(stages.logits[2])
    assert running.any()
    assert not torch.allclose(stages.logits[2][running], stages.logits[4][running])
    assert not torch.allclose(stages.logits[4][running], stages.logits[model.depth][running])


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_frozen_predictions_are_constants_to_later_losses(plan):
    model = models.wrapped(models.timm_vit, plan)
    stages = tet.Staged(model)(models.images())
    assert (stages.output.exit_depth < model.depth).any()
    stages.logits[model.depth].square().sum().backward()
    found = gradients(model)
    assert all(value is None for name, value in found.items() if name.startswith("exit_heads"))
    assert found["head.1.weight"].abs().max() > 0


def test_features_that_rejoin_are_no_constants():
    model = models.wrapped(models.timm_vit, FEATURES["all leave"])
    stages = tet.Staged(model)(models.images())
    stages.logits[model.depth].square().sum().backward()
    found = {name: value for name, value in gradients(model.model).items() if name.startswith("blocks")}
    assert all((value is not None) == (int(name.split(".")[1]) < 3) for name, value in found.items())


@each_plan
def test_a_batch_has_the_gradients_of_its_images(plan):
    """So gradients can be accumulated, and no image trains another's tokens."""
    model = models.wrapped(models.timm_vit, plan)
    staged, images, label = tet.Staged(model), models.images(), labels()

    def total(index):
        return staged(images[index]).loss(
            lambda logits: tet.pixel_cross_entropy(logits, label[index]) * len(logits), auxiliary=0.7
        )

    total(slice(None)).backward()
    together = gradients(model)
    model.zero_grad()
    for index in range(len(images)):
        total(slice(index, index + 1)).backward()
    apart = gradients(model)
    assert together.keys() == apart.keys()
    for name, value in together.items():
        assert (value is None) == (apart[name] is None), name
        if value is not None:
            torch.testing.assert_close(value, apart[name], rtol=2e-3, atol=2e-4, msg=name)


def test_gradients_are_those_of_finite_differences():
    model = models.wrapped(models.timm_vit, Schedule((Exit(2, policies.ConfidenceAbove(0.5)),))).double()
    staged, images, label = tet.Staged(model), models.images(2).double(), labels(2)
    weight = model.model.get_parameter("blocks.4.mlp.fc1.weight")
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()

    def final():
        stages = staged(images)
        assert (stages.output.exit_depth == 2).any()
        return tet.pixel_cross_entropy(stages.logits[model.depth], label)

    final().backward()
    slope = (weight.grad * direction).sum().item()
    with torch.no_grad():
        ends = []
        for shift in (1e-3, -1e-3):
            weight += shift * direction
            ends.append(final().item())
            weight -= shift * direction
    assert abs(slope) > 1e-3
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-2)


def test_if_all_leave_the_final_head_has_no_stage_and_the_loss_is_the_exits():
    model = models.wrapped(models.timm_vit, schedule.truncated(after=3))
    stages = tet.Staged(model)(models.images())
    assert set(stages.logits) == {3}
    loss = stages.loss(lambda logits: tet.pixel_cross_entropy(logits, labels()), auxiliary={3: 0.5})
    same(loss, 0.5 * tet.pixel_cross_entropy(model.every_exit(models.images())[3], labels()))


def test_weights_are_those_that_were_given():
    model = models.wrapped(models.timm_vit, PLANS["dtop"])
    stages = tet.Staged(model)(models.images())
    parts = {after: tet.pixel_cross_entropy(logits, labels()) for after, logits in stages.logits.items()}
    found = stages.loss(lambda logits: tet.pixel_cross_entropy(logits, labels()), auxiliary={2: 0.5, 4: 0.25, 3: 9.0})
    same(found, 0.5 * parts[2] + 0.25 * parts[4] + parts[model.depth])


@pytest.mark.parametrize("plan", [PLANS["neighbours"], FEATURES["dovit"]], ids=["neighbours", "dovit"])
def test_autocast_trains_in_half_precision(plan):
    model = models.wrapped(models.timm_vit, plan).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stages = tet.Staged(model)(models.images())
        loss = stages.loss(lambda logits: tet.pixel_cross_entropy(logits, labels()))
    assert stages.logits[2].dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    found = gradients(model)
    assert all(value is None or (value.dtype == torch.float32 and value.isfinite().all()) for value in found.values())


def _rank(rank, port, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    parallel = DistributedDataParallel(tet.Staged(_for_ddp()), find_unused_parameters=True)
    for step in range(2):  # twice: the second pass fails if the first left anything waiting
        _ddp_loss(parallel, slice(2 * rank, 2 * rank + 2), threshold=0.5 if step else _everything_of(rank)).backward()
    results[rank] = {name: value for name, value in gradients(parallel.module.model).items() if value is not None}
    torch.distributed.destroy_process_group()


def _for_ddp():
    return models.wrapped(models.timm_vit, PLANS["dtop"])


def _everything_of(rank):
    """In one process all tokens leave at the first exit, in the other some."""
    return 0.0 if rank else 0.5


def _ddp_loss(staged, index, *, threshold):
    plan = schedule.dtop(after=(2, 4), threshold=threshold, per_class=0)
    stages = staged(models.images(4)[index], schedule=plan)
    return stages.loss(lambda logits: tet.pixel_cross_entropy(logits, labels(4)[index]))


def test_two_processes_train_as_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(_rank, args=(port, results), nprocs=2)
        found = [dict(results[rank]) for rank in range(2)]
    model = _for_ddp()
    for rank in range(2):
        for threshold in (_everything_of(rank), 0.5):
            loss = _ddp_loss(tet.Staged(model), slice(2 * rank, 2 * rank + 2), threshold=threshold)
            (loss / 2).backward()
    expected = {name: value for name, value in gradients(model).items() if value is not None}
    assert found[0].keys() == found[1].keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[0][name], value, rtol=2e-3, atol=2e-4, msg=name)
        assert torch.equal(found[0][name], found[1][name]), name


def test_weights_can_be_averaged_by_torch():
    model = models.wrapped(models.timm_vit, PLANS["dtop"])
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(model)
    before = averaged(models.images()).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    assert torch.equal(averaged(models.images()).logits, before)
    averaged.update_parameters(model)
    assert not torch.equal(averaged(models.images()).logits, before)
    name = "blocks.3.mlp.fc1.weight"
    middle = averaged.module.model.get_parameter(name)
    same(
        2 * middle - model.model.get_parameter(name),
        models.wrapped(models.timm_vit, PLANS["dtop"]).model.get_parameter(name),
    )


def test_a_norm_over_tokens_takes_what_it_knows_if_a_single_one_is_left():
    """All but one patch of the batch leave at the first exit, and there is no cls token."""
    torch.manual_seed(0)
    model = tet.wrap(models.plain_host(), schedule.dense(after=(2, 3)), num_classes=3, exit_heads=FCN(hidden=8)).train()
    plan = Schedule((Exit(2, policies.BatchBudget(1)), Exit(3, policies.BatchBudget(1))))
    stages = tet.Staged(model)(models.images(1), schedule=plan)
    assert stages.output.tokens_per_block[0, -1] == 1
    stages.loss(lambda logits: tet.pixel_cross_entropy(logits, labels(1) % 3)).backward()
    assert all(value is None or value.isfinite().all() for value in gradients(model).values())


METHODS = {
    "dtop": lambda step: schedule.dtop(after=(1, 2), threshold=0.8, per_class=1),
    "dovit": lambda step: schedule.dovit(after=(1, 2), threshold=training.Annealed(1.0, 0.8, steps=30).at(step)),
    "paumer": lambda step: schedule.paumer(keep={1: training.Drawn(0.2, 1.0).at(step)}),
    "neighbours": lambda step: schedule.neighbours(radius={1: 1, 2: 0}, threshold=0.7, per_class=1),
}  # fmt: skip


@pytest.mark.parametrize("plan", METHODS.values(), ids=METHODS.keys())
def test_training_with_exits_learns(plan):
    """Two bright classes on a dark ground, by patch."""
    torch.manual_seed(0)
    host = models.timm_vit(depth=3)
    model = tet.wrap(host, schedule.dense(after=(1, 2)), num_classes=3).train()
    generator = torch.Generator().manual_seed(5)
    label = functional.interpolate(
        torch.randint(0, 3, (16, 1, 4, 6), generator=generator).float(), scale_factor=8, mode="nearest"
    )[:, 0].long()
    pictures = torch.stack([(label == one).float() for one in range(3)], dim=1)
    pictures = pictures + 0.3 * torch.randn(pictures.shape, generator=generator)
    staged, optimizer = tet.Staged(model), torch.optim.AdamW(model.parameters(), lr=2e-3)
    before = copy.deepcopy(model)
    for step in range(40):
        stages = staged(pictures, schedule=plan(step))
        optimizer.zero_grad()
        stages.loss(lambda logits: tet.pixel_cross_entropy(logits, label)).backward()
        optimizer.step()

    def right(network):
        with torch.no_grad():
            out = network.eval()(pictures, schedule=plan(39))
        assert (out.exit_depth < 3).any() or network is before
        return (out.upsample((32, 48)).argmax(1) == label).float().mean().item()

    assert right(before) < 0.6
    assert right(model) > 0.85


@given(st.tuples(*[st.integers(1, 3)] * 3), st.integers(0, 2**31 - 1), st.booleans())
def test_pixel_cross_entropy_is_the_mean_over_labelled_pixels(shape, seed, labelled):
    images, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((images, 4, height, width), generator=generator)
    label = torch.randint(-1, 4 if labelled else 0, (images, 2 * height, 3 * width), generator=generator)
    found = tet.pixel_cross_entropy(logits, label, ignore=-1)
    full = functional.interpolate(logits, (2 * height, 3 * width), mode="bilinear").movedim(1, -1)
    chosen = label != -1
    if chosen.any():
        same(found, functional.cross_entropy(full[chosen], label[chosen]))
    else:
        assert found == 0


def test_without_labels_the_loss_is_zero_and_so_is_its_gradient():
    logits = torch.randn(2, 4, 3, 3, requires_grad=True)
    tet.pixel_cross_entropy(logits, torch.full((2, 6, 6), 255), ignore=255).backward()
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_distillation_is_the_divergence_of_the_upsampled_predictions(temperature):
    student, teacher = (torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    full = functional.interpolate(teacher, (6, 8), mode="bilinear")
    found = tet.distillation(student, full, temperature=temperature)
    p = (full / temperature).softmax(1)
    q = (functional.interpolate(student, (6, 8), mode="bilinear") / temperature).softmax(1)
    same(found, temperature**2 * (p * (p / q).log()).sum(1).mean())
    assert tet.distillation(teacher, full, temperature=temperature).abs() < 1e-6


def test_a_teacher_is_not_taught():
    student, teacher = (torch.randn(1, 3, 2, 2, requires_grad=True) for _ in range(2))
    tet.distillation(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0


def staged_stages():
    return tet.Staged(models.wrapped(models.timm_vit, PLANS["dtop"]))(models.images())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_may_be_any_whole_numbers(dtype):
    logits = torch.randn(3, models.CLASSES, 4, 6)
    same(tet.pixel_cross_entropy(logits, labels().to(dtype)), tet.pixel_cross_entropy(logits, labels()))


def test_where_nobody_may_leave_all_heads_are_read():
    """What `every_exit` says, through a module that DistributedDataParallel can wrap."""
    model = models.wrapped(models.timm_vit, schedule.dense(after=(2, 3, 4)))
    stages, every = tet.Staged(model)(models.images()), model.every_exit(models.images())
    assert stages.logits.keys() == every.keys()
    for after, logits in every.items():
        same(stages.logits[after], logits)


def test_gradient_checkpointing_is_refused():
    vit = models.timm_vit()
    model = models.wrapped(vit, PLANS["dtop"])
    vit.set_grad_checkpointing()
    with pytest.raises(TokenExitError, match="`model` must not checkpoint its gradients"):
        tet.Staged(model)(models.images())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: tet.Staged(nn.Linear(2, 2)),
            "`model` must be wrapped by `wrap` with a head, not with a decoder, got Linear",
        ),
        (
            lambda: tet.distillation(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2), temperature=0.0),
            "`temperature` must be positive, got 0.0",
        ),
        (
            lambda: tet.Staged(models.wrapped(models.timm_vit, PLANS["dtop"]))(models.images()).loss(
                lambda logits: logits.sum(), auxiliary={2: 1.0}
            ),
            "`auxiliary` must have a weight for every exit that runs, got none for [4]",
        ),
        *(
            (
                lambda wrong=wrong: staged_stages().loss(lambda logits: logits.sum(), auxiliary=wrong),
                f"`auxiliary` must be a weight from 0 up, or one for each block with an exit, got {wrong!r}",
            )
            for wrong in [-1.0, float("nan"), None, [1.0], {2: -1.0, 4: 1.0}, {2: 1.0, 4: 1.0, 6: 7.0}, {"2": 1.0}]
        ),
        *(
            (
                lambda wrong=wrong: staged_stages().loss(lambda _: wrong),
                f"`criterion` must return a single number as a tensor, got {got}",
            )
            for wrong, got in [(1.0, "1.0 for block 2"), (torch.ones(3), "shape (3,) for block 2")]
        ),
        *(
            (
                lambda wrong=wrong: tet.pixel_cross_entropy(torch.zeros(2, 3, 4, 4), wrong),
                f"`label` must be whole numbers of shape (2, height, width), got {got}",
            )
            for wrong, got in [
                (torch.zeros(2, 8, 8), "torch.float32 of shape (2, 8, 8)"),
                (torch.zeros(2, 1, 8, 8).long(), "torch.int64 of shape (2, 1, 8, 8)"),
                (torch.zeros(3, 8, 8).long(), "torch.int64 of shape (3, 8, 8)"),
                (None, "NoneType"),
            ]
        ),
        (
            lambda: tet.pixel_cross_entropy(torch.zeros(1, 3, 4, 4), torch.full((1, 8, 8), 255)),
            "`label` must be classes from 0 to 2, or -100 to be ignored, got 255 to 255",
        ),
        *(
            (
                lambda wrong=wrong: tet.distillation(torch.zeros(2, 3, 4, 4), wrong),
                f"`teacher` must be class scores of shape (2, 3, height, width), got {got}",
            )
            for wrong, got in [
                (torch.zeros(1, 3, 8, 8), "shape (1, 3, 8, 8)"),
                (torch.zeros(2, 4, 8, 8), "shape (2, 4, 8, 8)"),
                (None, "NoneType"),
            ]
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(TokenExitError) as found:
        call()
    assert str(found.value) == message


NORMED = FCN(hidden=8)


def with_batch_norm(vit, plan):
    """Its registers are outliers in norm, as they are in trained networks."""
    with torch.no_grad():
        vit.reg_token.normal_(std=15, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    return tet.wrap(vit, plan, num_classes=models.CLASSES, exit_heads=NORMED).train()


def statistics(model):
    return {name: one for name, one in model.state_dict().items() if "running" in name and "model." not in name}


@pytest.mark.parametrize("way", ["staged", "forward", "mixed"])
def test_batch_norm_counts_patches_alone_in_every_way_of_training(way):
    plan = schedule.Schedule(tuple(Exit(after, policies.ConfidenceAbove(1.0)) for after in (1, 2)))  # nothing leaves
    model = with_batch_norm(models.timm_vit(prefix=5), plan)
    other, images = copy.deepcopy(model), models.images(4)
    {
        "staged": lambda: tet.Staged(model)(images, schedule=plan),
        "forward": lambda: model(images),
        "mixed": lambda: model.mixed([*images]),
    }[way]()
    other.every_exit(images)
    found, wanted = statistics(model), statistics(other)
    assert len(found) == 6
    assert all(torch.allclose(found[name], one, rtol=1e-4) for name, one in wanted.items())
    assert not all(torch.equal(one, torch.ones_like(one)) for one in found.values())


def test_batch_norm_counts_the_patches_that_are_left():
    model = with_batch_norm(models.timm_vit(prefix=5), schedule.paumer(keep={1: 0.5, 2: 0.25}))
    seen = []
    for head in model.exit_heads.values():
        head.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    out = model(models.images(3))
    assert seen == [3 * 24, 3 * 12]
    assert out.logits.isfinite().all()
    seen.clear()
    model.eval()(models.images(3))
    assert seen == [3 * 29, 3 * 17]  # without a copy of the row


def test_a_static_model_does_not_train_batch_norm():
    model = with_batch_norm(models.timm_vit(prefix=5), schedule.paumer(keep={1: 0.5}))
    static = tet.StaticModel(model, capacities=0.7)
    with pytest.raises(TokenExitError, match="`model` must have no batch norm in training, .*: train by `Staged`"):
        static(models.images())
    static.eval()(models.images())
    for head in (model.head, *model.exit_heads.values()):
        head.train()
        head[1].eval()
    static(models.images())
