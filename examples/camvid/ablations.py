"""Changes one thing at a time: retention, blocks, number of exits, score, radius, thresholds by class.

    python -m examples.camvid.ablations --data CAMVID --run RUN --json ablations.json

Nothing is trained again. Where rules of different kinds are compared, their thresholds are set so that replays of one
dense pass cost the same (`--work`); every row is then a real run. Results are written as they come, in a file of the
form that `examples.camvid.evaluate` writes. Stop it at any time: the same command measures only what is not there yet.
"""

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

import tokenexit_torch as tet
from examples import shell
from examples.camvid import common, data, evaluate, report
from examples.camvid.evaluate import Setting
from tokenexit import cost, schedule
from tokenexit.policies import (
    ConfidenceAbove,
    EntropyBelow,
    MarginAbove,
    PerClass,
    Policy,
)
from tokenexit.schedule import Exit, Schedule

_SUMMARY = (__doc__ or "").partition("\n")[0]
_PUBLISHED = (4, 6, 8)
_NUMBERS = ((8,), (6, 8), (4, 6, 8), (3, 4, 6, 8), (3, 4, 6, 8, 10))
_RADII: Mapping[str, tuple[int, ...]] = {
    "radius 0": (0, 0, 0), "radius 1": (1, 1, 1), "radius 2": (2, 2, 2), "radius 3": (3, 3, 3),
    "wide early, 2 1 0": (2, 1, 0), "wide early, 1 1 0": (1, 1, 0), "wide late, 0 1 2": (0, 1, 2),
}  # fmt: skip


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.camvid.ablations", description=_SUMMARY)
    parser.add_argument("--data", type=Path, required=True, help="CamVid folder: train.txt, train/, trainannot/, ...")
    common.add_network(parser)
    parser.add_argument("--json", type=Path, required=True, help="results; what it already holds is not measured again")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=[*GROUPS], help="what to change; all by default")
    parser.add_argument("--work", type=float, default=0.6, help="token-blocks at which rules are compared")
    parser.add_argument("--split", choices=data.SPLITS, default="val")
    parser.add_argument("--limit", type=int, help="use only this many images, spread evenly over the split")
    parser.add_argument("--train-limit", type=int, help="train images for thresholds by class; all by default")
    parser.add_argument("--accuracy-batch", type=int, default=4, help="batch size of the accuracy passes")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    # Heads as they are: none is fitted here.
    parser.set_defaults(fit_after=None, fit_images=None, fit_steps=None, fit_plan=None)
    given = parser.parse_args()
    if not 0 < given.work < 1:
        raise shell.UsageError(f"`--work` must be in (0, 1), got {given.work}")
    if given.accuracy_batch < 1:
        raise shell.UsageError(f"`--accuracy-batch` must be at least 1, got {given.accuracy_batch}")
    return given


@dataclass(frozen=True)
class Material:
    """What rows are made from.

    Attributes:
        heads: Blocks with an exit head.
        trace: What all heads say of the split, if nothing leaves.
        train: What they say of train images.
        work: Token-blocks at which rules are compared.
    """

    heads: tuple[int, ...]
    trace: Callable[[], tet.Trace]
    train: Callable[[], tet.Trace]
    work: float

    def among(self, *after: int) -> tuple[int, ...]:
        """Those of some blocks that have a head."""
        return tuple(block for block in after if block in self.heads)


def token_blocks(trace: tet.Trace, plan: Schedule) -> float:
    """Executed token-blocks of a replay, relative to dense."""
    tokens = trace.replay(plan).tokens_per_block
    return cost.token_blocks(tokens, slots=int(tokens[0, 0]))


def matched(plan: Callable[[float], Schedule], work: float, trace: tet.Trace) -> Schedule:
    """The plan whose replay costs what it should, by halving the range of its threshold; the nearest if none does.

    Args:
        plan: Of a threshold in [0, 1]; the higher it is, the more work.
        work: Token-blocks to come to, relative to dense.
        trace: What is replayed.
    """
    low, high = 0.0, 1.0
    for _ in range(16):
        middle = (low + high) / 2
        if token_blocks(trace, plan(middle)) < work:
            low = middle
        else:
            high = middle
    return plan(round((low + high) / 2, 6))


def same_policy(policy: Policy, after: Sequence[int]) -> Schedule:
    """One policy at several exits."""
    return Schedule(tuple(Exit(block, policy) for block in after))


def per_class(material: Material) -> list[Setting]:
    """How many leavers of each predicted class stay."""
    after = material.among(*_PUBLISHED)
    return [
        Setting(f"k = {kept}, confidence 0.9, exits {_list(after)}", "k", schedule.dtop(after=after, per_class=kept))
        for kept in (0, 1, 5, 20)
    ]


def blocks(material: Material) -> list[Setting]:
    """Where the only exit is."""
    return [
        Setting(
            f"one exit after {block}, confidence, k = 5", "blocks",
            matched(lambda x, block=block: schedule.dtop(after=(block,), threshold=x), material.work, material.trace()),
        )
        for block in material.heads
    ]  # fmt: skip


def exits(material: Material) -> list[Setting]:
    """How many exits there are."""
    chosen = dict.fromkeys(material.among(*after) for after in _NUMBERS)
    return [
        Setting(
            f"{len(after)} exits, {_list(after)}, confidence, k = 5", "exits",
            matched(lambda x, after=after: schedule.dtop(after=after, threshold=x), material.work, material.trace()),
        )
        for after in chosen
    ]  # fmt: skip


def score(material: Material) -> list[Setting]:
    """By what a token is known to be done."""
    after = material.among(*_PUBLISHED)
    rules: dict[str, Callable[[float], Policy]] = {
        "confidence": ConfidenceAbove, "margin": MarginAbove, "entropy": lambda x: EntropyBelow(1 - x),
    }  # fmt: skip
    return [
        Setting(
            f"{name}, k = 5, exits {_list(after)}", "score",
            matched(
                lambda x, rule=rule: same_policy(rule(x).retaining(per_class=5), after), material.work, material.trace()
            ),
        )
        for name, rule in rules.items()
    ]  # fmt: skip


def radius(material: Material) -> list[Setting]:
    """How wide the neighbourhood is that must agree."""
    after = material.among(*_PUBLISHED)
    return [
        Setting(
            f"neighbours, {name}, exits {_list(after)}", "radius",
            matched(
                lambda x, radii=radii: schedule.neighbours(radius=dict(zip(after, radii, strict=False)), threshold=x),
                material.work, material.trace(),
            ),
        )
        for name, radii in _RADII.items()
    ]  # fmt: skip


def thresholds(material: Material) -> list[Setting]:
    """One threshold for all classes, or one for each, under which equally many of its leavers have the final label."""
    after, settings = material.among(*_PUBLISHED), []
    radii = dict(zip(after, (1, 1, 0), strict=False))
    for name, plan in (
        ("confidence", lambda x: schedule.dtop(after=after, threshold=x)),
        ("neighbours 1 1 0", lambda x: schedule.neighbours(radius=radii, threshold=x)),
    ):
        one = matched(plan, material.work, material.trace())
        settings.append(Setting(f"{name}, one threshold", "thresholds", one))

        def by_class(precision: float, plan: Callable = plan) -> Schedule:
            return plan(class_thresholds(material.train(), after, precision))

        settings.append(Setting(f"{name}, by class", "thresholds", matched(by_class, material.work, material.trace())))
    return settings


def class_thresholds(trace: tet.Trace, after: Sequence[int], precision: float) -> dict[int, PerClass]:
    """For every exit and predicted class, the least threshold above which enough tokens have the final head's label.

    Args:
        trace: What the heads say of some images.
        after: The exits.
        precision: Share, in [0, 1], of the tokens above the threshold that must agree.
    """
    final, found = trace.logits[:, -1].argmax(1).flatten(), {}
    for block in after:
        probabilities = trace.logits[:, trace.after.index(block)].softmax(1)
        top, label = (part.flatten() for part in probabilities.max(1))
        found[block] = PerClass(
            tuple(
                _least(top[label == one], (final == label)[label == one], precision)
                for one in range(trace.logits.shape[2])
            )
        )
    return found


def _least(confidence: Float[Tensor, "tokens"], agrees: Bool[Tensor, "tokens"], precision: float) -> float:
    ranked, order = confidence.sort(descending=True)
    share = agrees[order].double().cumsum(0) / torch.arange(1, len(order) + 1)
    enough = (share >= precision).nonzero()
    return 1.0 if len(enough) == 0 else round(max(0.0, ranked[enough[-1, 0]].item() - 1e-6), 6)


GROUPS: Mapping[str, Callable[[Material], list[Setting]]] = {
    "k": per_class, "blocks": blocks, "exits": exits, "score": score, "radius": radius, "thresholds": thresholds,
}  # fmt: skip
"""What can be changed."""


def _list(after: Sequence[int]) -> str:
    return ",".join(map(str, after))


def ablate(given: argparse.Namespace) -> dict[str, Any]:
    """Measure what the results file lacks, writing it after each row.

    Raises:
        UsageError: If data, model or results do not fit the arguments.
    """
    frames = data.frames(given.data, given.split, given.limit)
    results = evaluate.open_results(given.json, evaluate.inputs(given, frames))
    given.json.parent.mkdir(parents=True, exist_ok=True)
    model, device = evaluate.model_of(given, results).eval().to(given.device), torch.device(given.device)
    results["about"] = evaluate.environment(device) | {
        "patch_tokens": evaluate.patch_tokens(model), "blocks": model.depth, "compared_at": given.work,
    }  # fmt: skip

    @functools.cache
    def traced(split: str, limit: int | None) -> tet.Trace:
        batches = data.Batches(data.frames(given.data, split, limit), given.accuracy_batch)
        return tet.trace(model, data.Images(batches, device), progress=shell.progress)

    material = Material(
        heads=tuple(int(block) for block in model.exit_heads),
        trace=lambda: traced(given.split, given.limit),
        train=lambda: traced("train", given.train_limit),
        work=given.work,
    )
    rows = [Setting("dense", "dense", schedule.dense())]
    rows += [
        Setting(f"truncated after {block}", "truncated", schedule.truncated(after=block)) for block in material.heads
    ]
    for group in given.only:
        rows += GROUPS[group](material)
    evaluate.measure_accuracy(model, rows, frames, results, given)
    return results


def main() -> None:
    """Run from the command line."""
    given = arguments()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    print(report.table(ablate(given)))


if __name__ == "__main__":
    shell.exit_with(main)
