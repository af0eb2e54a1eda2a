"""Gates on CamVid (SViT, WACV 2024): how they are trained, and how a budget of multiply-adds becomes thresholds."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

import tokenexit_torch as tet
from examples import runs, shell
from examples.camvid import data
from tokenexit import gates, policies, schedule
from tokenexit.carries import Preserved
from tokenexit.cost import of_head, plain_vit
from tokenexit.gates import published_gate
from tokenexit.heads import HeadPlan, Linear
from tokenexit.schedule import Exit, Schedule

BUDGETS = (0.9, 0.8, 0.7, 0.65, 0.6, 0.5)
"""Shares of the dense multiply-adds for which a trained network is calibrated."""
TRAINED = 0.65
"""The budget that the variants are trained for."""
PLANS = "plans"
"""Folder of a run that holds the plan of every budget, as JSON."""
_RATIO_WEIGHT = 4.0
_CALIBRATION_IMAGES = 64


@dataclass(frozen=True)
class Gated:
    """A way to train with gates.

    Attributes:
        after: Blocks that have run before a gate.
        rates: Shares that the gates of each stage keep; they leave 0.65 of the multiply-adds.
        carry: What becomes of skipped patches.
        outcome: What the head reads of skipped patches: their features, preserved, or nothing.
        of_each: Whether the share is that of a batch, so that images differ, or that of every image.
        gate: The plan of a gate; the published one if None.
        random: Share of the decisions that are drawn by a coin.
    """

    after: tuple[int, ...] = tuple(range(3, 12))
    rates: tuple[float, ...] = (0.78, 0.59, 0.44)
    carry: Preserved = Preserved()
    outcome: Literal["preserved", "discarded"] = "preserved"
    of_each: Literal["batch", "image"] = "batch"
    gate: HeadPlan | None = None
    random: float = 0.0

    @property
    def rate(self) -> dict[int, float]:
        """Share of each gate."""
        return gates.staged_rates(self.after, rates=self.rates)


_NEVER = Preserved(returning="never")
VARIANTS = {
    "svit": Gated(),
    "svit-inherited": Gated(carry=_NEVER),
    "svit-discarded": Gated(carry=_NEVER, outcome="discarded"),
    "svit-fixed": Gated(of_each="image"),
    "svit-linear": Gated(gate=Linear()),
    "svit-random": Gated(random=0.1),
    "svit-last": Gated(after=tuple(range(3, 11)), rates=(0.72, 0.54, 0.4), carry=Preserved(before="last block")),
    "svit-few": Gated(after=(3, 6, 9)),
    "svit-keys": Gated(rates=(0.7, 0.49, 0.343), carry=Preserved(keys="all")),
}
"""By the name that `--method` takes."""


def new_model(vit: nn.Module, final: nn.Module, variant: Gated) -> tet.GatedModel:
    """A network with fresh gates and its final head."""
    plan = schedule.svit(after=variant.after, carry=variant.carry)
    return tet.wrap_gates(vit, plan, head=head_like(final), gates=variant.gate)


def head_like(final: nn.Module) -> nn.Module:
    """A copy of a final head, in the layout in which a run folder holds it."""
    head = runs.segmentation_head(width=final.get_parameter("1.weight").shape[1], classes=len(data.CLASSES))
    head.load_state_dict(final.state_dict())
    return head


def logits(
    model: tet.GatedModel, output: tet.GatedOutput, variant: Gated, keep: Float[Tensor, "images gates height width"]
) -> Float[Tensor, "images classes height width"]:
    """Class scores under a variant: of what is discarded the head reads zeros."""
    if variant.outcome == "preserved" or model.head is None:
        assert output.logits is not None
        return output.logits
    kept = keep[:, -1:] if keep.shape[1] else 1.0
    features = rearrange(output.maps[model.depth] * kept, "images width height across -> images height across width")
    return rearrange(model.head(features), "images height across classes -> images classes height across")


def loss(
    model: tet.GatedModel,
    images: Float[Tensor, "images 3 height width"],
    criterion: Callable[[Tensor], Tensor],
    variant: Gated,
    *,
    step: int,
    seed: int,
) -> Float[Tensor, ""]:
    """The loss of a step. What is drawn depends on seed and step alone: a resumed run draws the same."""
    generator = torch.Generator().manual_seed((seed << 32) + step)
    drawn = tet.Sampled(model, rates=variant.rate, random=variant.random)(images, generator=generator)
    found = logits(model, drawn.output, variant, drawn.keep)
    return criterion(found) + _RATIO_WEIGHT * drawn.ratio_loss(of_each=variant.of_each)


def budget_plans(
    model: tet.GatedModel, variant: Gated, frames: Sequence[data.Frame], device: torch.device
) -> dict[float, Schedule]:
    """The plan for every budget: its rates from the trained ones by the cost model, its thresholds from images.

    Args:
        model: The trained network.
        variant: How it was trained.
        frames: Frames to calibrate on.
        device: Where to.
    """
    step = max(1, len(frames) // _CALIBRATION_IMAGES)
    images = data.Images(data.Batches(frames[::step], 4), device)
    height, width = model.host.image_shape[1:]
    found = {}
    for budget in shell.progress(BUDGETS, desc="budgets"):
        rates = rates_for(model, variant, budget, patches=height * width // _patch(model) ** 2)
        if variant.of_each == "image":
            exits = tuple(Exit(after, policies.Budget(rate, by="gate")) for after, rate in rates.items())
            found[budget] = Schedule(exits, variant.carry)
        else:
            found[budget] = tet.gate_thresholds(model, images, rates=rates, progress=iter)
    return found


def rates_for(model: tet.GatedModel, variant: Gated, budget: float, *, patches: int) -> dict[int, float]:
    """Rates that leave a share of the dense multiply-adds: the trained ones, all to one power.

    Args:
        model: The network; its gates are counted.
        variant: How it was trained.
        budget: Multiply-adds, dense = 1; the head is not counted, which always reads everything.
        patches: Patches of an image.
    """
    width, carry = model.host.width, variant.carry
    gate = of_head(model.gate_plan or published_gate(width), width=width, classes=2)
    cost = plain_vit(width=width, depth=model.depth, patch=_patch(model), prefix=1)
    options: dict[str, Any] = {"patches": patches, "gate": gate, "keys": carry.keys, "before": carry.before}
    dense = cost.skipping({}, **options).total

    def share(power: float) -> float:
        rates = {after: value**power for after, value in variant.rate.items()}
        return cost.skipping(rates, **options).total / dense

    low, high = 0.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) > budget else (low, middle)
    return {after: value**high for after, value in variant.rate.items()}


def _patch(model: tet.GatedModel) -> int:
    return int(model.model.get_parameter("patch_embed.proj.weight").shape[-1])


def recipe_of(folder: Path) -> dict[str, Any]:
    """How a run was trained.

    Raises:
        UsageError: If the folder holds no run of examples.camvid.train.
    """
    try:
        return json.loads((folder / "history.json").read_text())["recipe"]
    except (OSError, ValueError, KeyError) as error:
        raise shell.UsageError(f"a run must be a folder of examples.camvid.train, got {str(folder)!r}") from error


def require_preserved(folder: Path) -> None:
    """Nothing, if the head of a run reads preserved features.

    Raises:
        UsageError: If it was trained to read nothing of skipped patches.
    """
    method = recipe_of(folder)["method"]
    if method in VARIANTS and VARIANTS[method].outcome != "preserved":
        raise shell.UsageError(f"`--run` must preserve features, got {method}: examples.camvid.insights measures it")


def write_plans(folder: Path, plans: Mapping[float, Schedule]) -> None:
    """Write the plan of every budget, as `evaluate --plans` reads them."""
    (folder / PLANS).mkdir(parents=True, exist_ok=True)
    for budget, plan in plans.items():
        (folder / PLANS / f"gates_{budget:.2f}.json").write_text(json.dumps(plan.to_dict()) + "\n")


def read_plans(folder: Path) -> dict[float, Schedule]:
    """The plans that `write_plans` wrote, by budget.

    Raises:
        UsageError: If there are none.
    """
    files = sorted((folder / PLANS).glob("gates_*.json"))
    if not files:
        raise shell.UsageError(f"`--run` must be a run with gates, got {str(folder)!r} without {PLANS}/gates_*.json")
    return {float(file.stem.removeprefix("gates_")): Schedule.from_dict(json.loads(file.read_text())) for file in files}
