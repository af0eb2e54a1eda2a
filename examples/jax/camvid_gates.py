"""Evaluates in JAX what was trained with gates in PyTorch on CamVid, and counts what both sides decide differently.

    python -m examples.jax.camvid_gates --data CAMVID --run RUN

The weights are read as they lie in the files. The PyTorch side runs on the same images. Where a gate decides otherwise
about a patch, all later ones of that image may, for they no longer see the same tokens; so of such an image the first
gate with a difference is looked at, and each patch that differs there must be as probable as its threshold, within
1e-4.
"""

import argparse
import json
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch

import tokenexit_torch as tet
from examples import metrics, shell
from examples import runs as torch_runs
from examples.camvid import data, gated
from examples.jax import runs
from examples.jax.camvid_evaluate import channels_last
from tokenexit import cost, schedule
from tokenexit.policies import GateBelow, Policy
from tokenexit.schedule import Schedule

_NEAR = 1e-4
_SUMMARY = (__doc__ or "").partition("\n")[0]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.jax.camvid_gates", description=_SUMMARY)
    parser.add_argument("--data", type=Path, required=True, help="CamVid folder: train.txt, train/, trainannot/, ...")
    parser.add_argument("--run", type=Path, required=True, help="run folder of examples.camvid.train --method svit")
    parser.add_argument("--split", choices=data.SPLITS, default="val")
    parser.add_argument("--limit", type=int, help="use only this many images, spread evenly over the split")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.65, 0.8], help="of those calibrated for")
    parser.add_argument("--batch", type=int, default=4, help="batch size (default %(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    given = parser.parse_args()
    if given.batch < 1:
        raise shell.UsageError(f"`--batch` must be at least 1, got {given.batch}")
    return given


@torch.inference_mode()
def compared(
    ours: runs.LoadedGates, theirs: tet.GatedModel, plan: Schedule, batches: data.Batches, *, description: str
) -> dict[str, Any]:
    """Both sides on the same images.

    Args:
        ours: The network in JAX.
        theirs: The network in PyTorch.
        plan: Which tokens are skipped.
        batches: The images.
        description: What the progress bar says.

    Returns:
        mIoU of both sides, token-blocks, `decisions` in all and how many of them are `other`, those at the first gate
        with a difference that are `unexplained`, and the greatest difference of `logits` where all decisions are equal.
    """
    classes = len(data.CLASSES)
    confusion = torch.zeros(2, classes, classes, dtype=torch.int64)
    limits = {exit.after: exit.policy.threshold for exit in plan.active if _is_threshold(exit.policy)}
    decisions = other = unexplained = 0
    greatest, ran, room = 0.0, [], []
    for images, labels in shell.progress(batches, desc=description):
        here, there = ours(channels_last(images), plan), theirs(images, schedule=plan)
        assert here.logits is not None
        assert there.logits is not None
        logits = torch.from_numpy(np.moveaxis(np.asarray(here.logits), -1, 1).copy())
        for side, scores in enumerate((logits, there.logits)):
            full = torch.nn.functional.interpolate(scores, data.SIZE, mode="bilinear", align_corners=False)
            confusion[side] += metrics.confusion_matrix(full.argmax(1), labels, classes=classes, ignore=data.IGNORE)
        differ = torch.from_numpy(np.asarray(here.keep).copy()) != there.keep
        decisions, other = decisions + differ.numel(), other + int(differ.sum())
        for one in range(len(images)):
            gates = differ[one].flatten(1).any(1).nonzero().flatten().tolist()
            if gates:
                first = gates[0]
                near = (there.probability[one, first] - limits[there.gates[first]]).abs() <= _NEAR
                unexplained += int((differ[one, first] & ~near).sum())
            else:
                greatest = max(greatest, (logits[one] - there.logits[one]).abs().max().item())
        ran.append(np.asarray(here.tokens_per_block))
        room.append(np.asarray(here.capacity_per_block))
    counted = np.concatenate(ran)
    return {
        "miou": metrics.mean_iou(confusion[0]), "miou_pytorch": metrics.mean_iou(confusion[1]),
        "token_blocks": cost.token_blocks(counted, slots=int(counted.max())), "decisions": decisions, "other": other,
        "unexplained": unexplained, "logits": greatest,
        "valid_of_capacity": counted.sum().item() / np.concatenate(room).sum().item(),
    }  # fmt: skip


def _is_threshold(policy: Policy) -> TypeGuard[GateBelow]:
    return isinstance(policy, GateBelow) and isinstance(policy.threshold, float)


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Compare the budgets.

    Raises:
        UsageError: If the run is not calibrated for one.
    """
    ours, theirs = runs.load_gated(given.run)[0], torch_runs.load_gated(given.run)[0]
    plans = gated.read_plans(given.run)
    gated.require_preserved(given.run)
    unknown = [budget for budget in given.budgets if budget not in plans]
    if unknown:
        raise shell.UsageError(f"`--budgets` must be among those of the run, {sorted(plans)}, got {unknown}")
    batches = data.Batches(data.frames(given.data, given.split, given.limit), given.batch)
    other = [budget for budget in given.budgets if not all(_is_threshold(exit.policy) for exit in plans[budget].active)]
    if other:
        raise shell.UsageError(f"`--run` must have gates with one threshold each, got other policies for {other}")
    chosen = {"dense": schedule.dense()} | {f"gates {budget:.2f}": plans[budget] for budget in given.budgets}
    return {name: compared(ours, theirs, plan, batches, description=name) for name, plan in chosen.items()}


def table(results: dict[str, Any]) -> str:
    """The numbers, in Markdown."""
    rows = [
        "| setting | mIoU | in PyTorch | token-blocks | other decisions | unexplained | logits | held |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in results.items():
        cells = (
            name, f"{100 * one['miou']:.2f}", f"{100 * one['miou_pytorch']:.2f}", f"{one['token_blocks']:.3f}",
            f"{one['other']} of {one['decisions']}", str(one["unexplained"]), f"{one['logits']:.1e}",
            f"{100 * one['valid_of_capacity']:.0f} %",
        )  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    """Run from the command line."""
    given = arguments()
    results = run(given)
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    shell.exit_with(main)
