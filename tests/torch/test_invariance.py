"""An image's result is its own: alone, permuted, static, among other sizes and beside NaN it is what it is in the batch.

Hosts, classes, policies and their compositions, carries, cells, batches and sizes are drawn. In double precision, so that
rounding does not move a token; scores are float32 all the same. `policies.BatchBudget` alone mixes images, and is left out.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tokenexit_torch as tet
from tests.torch import models
from tests.torch.hosts import FOREIGN, lively
from tokenexit import schedule
from tokenexit.carries import Carry, Feature, MaskPrediction, Prediction, Preserved
from tokenexit.heads import ATM
from tokenexit.policies import (
    BatchBudget,
    Budget,
    ConfidenceAbove,
    EntropyBelow,
    GateBelow,
    MarginAbove,
    NeighboursAgree,
    Patience,
    PerClass,
    Policy,
    always,
    never,
)
from tokenexit.schedule import Exit, Schedule

PATCH, AFTER = 8, (1, 2, 3)


def timm_vit(**options: Any) -> Any:
    sizes = {"img_size": 32, "patch_size": PATCH, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 0}
    return lively(models.import_timm().models.vision_transformer.VisionTransformer(**sizes, **options))


@dataclass(frozen=True)
class Kind:
    """A model: how it is made, how many prefix tokens it has, and whether it takes images of several sizes."""

    make: Callable[[], Any]
    prefix: int
    sizes: bool
    classes: tuple[int, ...]


BARE = {"class_token": False, "global_pool": "avg", "fc_norm": False}
KINDS = {
    "timm": Kind(functools.partial(timm_vit, dynamic_img_size=True), 1, True, (2, 7)),
    "timm, registers, layer scale": Kind(functools.partial(timm_vit, reg_tokens=2, init_values=0.5), 3, False, (3,)),
    "timm, no prefix": Kind(functools.partial(timm_vit, dynamic_img_size=True, **BARE), 0, True, (11,)),
    "timm EVA-02": Kind(FOREIGN["timm EVA-02"].make, 1, False, (20,)),
    "timm DINOv3": Kind(FOREIGN["timm DINOv3"].make, 5, True, (5,)),
    "transformers ViT": Kind(FOREIGN["transformers ViT"].make, 1, False, (2,)),
    "transformers DINOv2": Kind(FOREIGN["transformers DINOv2"].make, 1, True, (4,)),
}
SIZES = [(32, 32), (16, 16), (16, 40), (48, 24)]


@functools.cache
def host(name: str) -> Any:
    return KINDS[name].make().double()


@functools.cache
def exiting(name: str, classes: int) -> tet.ExitingModel:
    torch.manual_seed(classes)
    model = tet.wrap(host(name), schedule.dense(after=AFTER), num_classes=classes).double().eval()
    with torch.no_grad():
        for head in [*model.exit_heads.values(), model.head]:
            head[-1].weight.mul_(12)
    return model


@functools.cache
def masked(name: str, classes: int) -> tet.ExitingModel:
    torch.manual_seed(classes)
    heads = ATM(layers=1, attention_heads=2)
    model = tet.wrap(host(name), schedule.dense(after=AFTER), num_classes=classes, exit_heads=heads).double().eval()
    for head in [*model.exit_heads.values(), model.head]:
        models.lively_masks(head)
    return model


@functools.cache
def gated(name: str, before: str) -> tet.GatedModel:
    torch.manual_seed(3)
    head = torch.nn.Linear(host(name).embed_dim, 4).double()
    plan = schedule.svit(after=AFTER[:2], carry=Preserved(before="last block" if before == "last block" else "decoder"))
    model = tet.wrap_gates(host(name), plan, head=head, taps=(2, 4)).double().eval()
    with torch.no_grad():
        for gate in model.gates.values():
            gate[-1].weight.mul_(8)
            gate[-1].bias.zero_()
    return model


UNIT = st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0])


@st.composite
def decisions(draw: Any, classes: int, kinds: tuple[str, ...]) -> Policy:
    """A policy on scores of these kinds, or several of them composed."""
    per_class = st.builds(PerClass, st.tuples(*[UNIT] * classes))
    threshold = UNIT | per_class if "gate" not in kinds else UNIT
    of_kind = {
        "confidence": [ConfidenceAbove, functools.partial(NeighboursAgree, radius=draw(st.integers(0, 3)))],
        "entropy": [EntropyBelow],
        "margin": [MarginAbove],
        "gate": [GateBelow],
    }
    simple = [st.builds(policy, threshold) for kind in kinds for policy in of_kind[kind]]
    counted = st.builds(Budget, UNIT.map(float) | st.integers(0, 12), by=st.sampled_from(kinds))
    others = [st.sampled_from([never(), always()])]
    others += [] if "gate" in kinds else [st.builds(Patience, st.integers(1, 2))]
    single = st.one_of(*simple, *simple, *others)
    plain = st.recursive(
        single,
        lambda inner: st.one_of(
            st.builds(lambda a, b: a & b, inner, inner),
            st.builds(lambda a, b: a | b, inner, inner),
            st.builds(lambda a: ~a, inner),
        ),
        max_leaves=3,
    )
    few = st.integers(0, 4)
    back = [st.builds(lambda a, n: a.with_minimum(per_image=n), plain, few)]
    back += [] if "gate" in kinds else [st.builds(lambda a, k: a.retaining(per_class=k), plain, few)]
    return draw(st.one_of(plain, counted, *back, st.builds(lambda a, b: a & b, plain, counted | back[-1])))


@dataclass(frozen=True)
class Trial:
    """A model, a plan and images."""

    name: str
    family: str
    classes: int
    plan: Schedule
    batch: int
    size: tuple[int, int]
    seed: int

    def model(self) -> Any:
        if self.family == "gates":
            return gated(self.name, self.plan.carry.before)
        return (masked if self.family == "masks" else exiting)(self.name, self.classes)

    def images(self) -> Tensor:
        """Plain areas with some noise, so that neighbours agree, of very different strength."""
        random = torch.Generator().manual_seed(self.seed)
        return drawn(self.batch, self.size, random)


def drawn(batch: int, size: tuple[int, int], random: torch.Generator) -> Tensor:
    areas = torch.randn(batch, 3, -(-size[0] // 16), -(-size[1] // 16), generator=random)
    areas = areas.repeat_interleave(16, 2).repeat_interleave(16, 3)[..., : size[0], : size[1]]
    noise = torch.randn(batch, 3, *size, generator=random) * torch.rand(batch, 1, 1, 1, generator=random)
    return (areas + noise).double()


@st.composite
def trials(draw: Any) -> Trial:
    family = draw(st.sampled_from(["exits", "exits", "exits", "masks", "gates"]))
    name = draw(st.sampled_from(["timm"] if family != "exits" else sorted(KINDS)))
    kind = KINDS[name]
    classes = draw(st.sampled_from(kind.classes))
    scores: tuple[str, ...] = {"masks": ("confidence",), "gates": ("gate",)}.get(
        family, ("confidence", "entropy", "margin")
    )
    after = [block for block in AFTER if draw(st.booleans())] or [1]
    carry: Carry
    if family == "gates":
        after = [block for block in after if block < 3] or [2]
        before = draw(st.sampled_from(["decoder", "last block"]))
        returning = draw(st.sampled_from(["every gate", "never"]))
        carry = Preserved(returning=returning, keys=draw(st.sampled_from(["running", "all"])), before=before)
    else:
        fold = None if kind.prefix == 0 else draw(st.sampled_from([None, 0.0, 0.3]))
        features = [Feature("decoder", fold), Feature("last block", fold)]
        frozen = [Prediction(), Prediction(), MaskPrediction()] if family == "masks" else [Prediction(), Prediction()]
        carry = draw(st.sampled_from(frozen + features))
    cell = None if family == "gates" else draw(st.sampled_from([None, None, 2, 3]))
    exits = tuple(Exit(block, draw(decisions(classes, scores))) for block in after)
    size = draw(st.sampled_from(SIZES)) if kind.sizes else SIZES[0]
    return Trial(
        name, family, classes, Schedule(exits, carry, cell), draw(st.integers(1, 8)), size, draw(st.integers(0, 2**20))
    )  # fmt: skip


def require_same(found: Any, rows: list[int] | slice, wanted: Any, of: list[int] | slice, where: str) -> None:
    """Some rows of one output are some rows of another."""
    exact = ("keep",) if hasattr(wanted, "keep") else ("exit_depth",)
    for name in (*exact, "tokens_per_block"):
        assert torch.equal(getattr(found, name)[rows], getattr(wanted, name)[of]), (where, name)
    torch.testing.assert_close(
        found.logits[rows], wanted.logits[of], rtol=1e-9, atol=1e-9, msg=lambda m: f"{where}: {m}"
    )
    for after, features in (wanted.maps if exact == ("keep",) else {}).items():
        torch.testing.assert_close(found.maps[after][rows], features[of], rtol=1e-9, atol=1e-9)


def with_nan(images: Tensor, at: int) -> Tensor:
    mate = torch.full_like(images[:1], torch.nan)
    return torch.cat([images[:at], mate, images[at:]])


@torch.no_grad()
def check(trial: Trial) -> int:
    """Every way to run an image; how many comparisons that were."""
    model, images, plan = trial.model(), trial.images(), trial.plan
    random = torch.Generator().manual_seed(trial.seed + 1)
    wanted, every = model(images, schedule=plan), slice(None)
    one = int(torch.randint(trial.batch, (), generator=random))
    require_same(model(images[one : one + 1], schedule=plan), every, wanted, [one], "alone")
    order = torch.randperm(trial.batch, generator=random)
    require_same(model(images[order], schedule=plan), every, wanted, order.tolist(), "permuted")
    at = int(torch.randint(trial.batch + 1, (), generator=random))
    beside, others = with_nan(images, at), [row for row in range(trial.batch + 1) if row != at]
    require_same(model(beside, schedule=plan), others, wanted, every, "beside NaN")
    if trial.family == "gates":
        require_same(model.masked(beside, schedule=plan), others, wanted, every, "masked, beside NaN")
        return 4
    if trial.family == "masks":
        return 3
    static = tet.StaticModel(model, capacities=1.0)
    require_same(static(beside, schedule=plan), others, wanted, every, "static, beside NaN")
    strangers = [drawn(1, size, random)[0] for size in SIZES[1:]] if KINDS[trial.name].sizes else []
    several = [*images, *strangers]
    mixed = torch.randperm(len(several), generator=random).tolist()
    found = model.mixed([several[index] for index in mixed], schedule=plan)
    for out, index in zip(found, mixed, strict=True):
        if index < trial.batch:
            require_same(out, every, wanted, [index], "mixed")
    return 5


@given(trial=trials())
def test_an_image_is_what_it_is_alone(trial):
    check(trial)


def some_trial(policy: Policy) -> Trial:
    return Trial("timm", "exits", 7, Schedule((Exit(2, policy),)), 5, (32, 32), 0)


def test_the_property_finds_a_policy_that_mixes_images():
    check(some_trial(Budget(0.4)))
    with pytest.raises(AssertionError, match="alone"):
        check(some_trial(BatchBudget(0.4)))


@torch.no_grad()
def test_the_property_finds_attention_that_leaks(monkeypatch):
    def leaking(self: Any, x: Tensor, *given: Any, **options: Any) -> Tensor:
        found = own(self, x, *given, **options)
        return found + 1e-6 * found.roll(1, dims=1)  # from one token, or image, to the next

    block = type(host("timm").blocks[0])
    own = block.forward
    monkeypatch.setattr(block, "forward", leaking)
    with pytest.raises(AssertionError, match="alone|permuted"):
        check(some_trial(ConfidenceAbove(0.3)))
