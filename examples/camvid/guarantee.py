"""Whether what `calibrate` certifies holds on CamVid: certify on half of a video, and look at all of it.

    python -m examples.frozen --init camvid_vit_tiny_p16.npz --data CAMVID --alpha 0.06 --out OUT
    python -m examples.camvid.guarantee --init camvid_vit_tiny_p16.npz --fitted OUT/exits --data CAMVID --json held.json

Every default setting is run on all frames of a sequence once. Then a setting is certified on half of them, again and
again, and its mean loss over all frames, and over the others, is compared with the level. Three kinds of halves:

- "with repeats": every frame drawn from all of them, as images are from what a model will see.
- "drawn": no frame twice, which is a little easier, for half of what is looked at was certified on.
- "one stretch": of the video, which is what happens to whoever calibrates on one drive and uses the model on the next.

The settings that have been run are written as they come; the same command goes on.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import tokenexit_torch as tet
from examples import metrics, shell
from examples.camvid import common, data, evaluate
from tokenexit import schedule
from tokenexit.guarantees import risks
from tokenexit.guarantees.bounds import images_needed
from tokenexit.guarantees.calibration import certify
from tokenexit.policies import always
from tokenexit.schedule import Schedule

_BATCH = 8
_SUMMARY = (__doc__ or "").partition("\n")[0]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.camvid.guarantee", description=_SUMMARY)
    parser.add_argument("--data", type=Path, required=True, help="CamVid folder: test.txt, test/, testannot/, ...")
    common.add_network(parser)
    parser.add_argument("--json", type=Path, required=True, help="results; what it already holds is not run again")
    parser.add_argument("--split", choices=data.SPLITS, default="test")
    parser.add_argument("--sequence", default="Seq05VD", help="the video (default %(default)s, not in train)")
    parser.add_argument("--limit", type=int, help="use only this many frames of it, spread evenly")
    parser.add_argument(
        "--alpha", type=float, nargs="+", default=[0.04, 0.06, 0.1], help="levels (default 0.04 0.06 0.1)"
    )
    parser.add_argument("--confidence", type=float, default=0.9, help="(default %(default)s)")
    parser.add_argument(
        "--choose-from", choices=("all", "exits"), default="all", help="networks cut short as well, or not"
    )
    parser.add_argument("--draws", type=int, default=200, help="halves that are drawn (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    given = parser.parse_args()
    shell.require_counts(draws=given.draws, limit=given.limit, threads=given.threads)
    return given


@dataclass(frozen=True)
class Table:
    """Every setting on every frame.

    Attributes:
        settings: The settings.
        chains: Those that are tested one after another.
        losses: Share of the pixels that get another class than in the dense run.
        costs: Multiply-adds, relative to the dense run.
        lost: By how much the mIoU over all frames is less than that of the dense run.
    """

    settings: tuple[Schedule, ...]
    chains: tuple[tuple[int, ...], ...]
    losses: Float[np.ndarray, "frames settings"]
    costs: Float[np.ndarray, "frames settings"]
    lost: Float[np.ndarray, "settings"]


@dataclass(frozen=True)
class Held:
    """What became of calibrations on some halves.

    Attributes:
        halves: How many.
        wrong: In how many the mean loss of the chosen setting, over all frames, is above the level.
        wrong_on_others: The same over the frames that it was not certified on.
        never: In how many nothing is certified that saves anything.
        cut: In how many the choice is a network cut short.
        saving: Mean over the halves of what is saved on all frames.
        loss: The same for the loss.
        lost: The same for the mIoU that is lost.
        most: The greatest loss of any choice, over all frames.
    """

    halves: int
    wrong: int
    wrong_on_others: int
    never: int
    cut: int
    saving: float
    loss: float
    lost: float
    most: float


def with_repeats(frames: int, draws: int, seed: int) -> list[np.ndarray]:
    """As many draws from all frames as are half of them."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, frames, frames // 2) for _ in range(draws)]


def random_halves(frames: int, draws: int, seed: int) -> list[np.ndarray]:
    """Halves of the frames that are drawn."""
    generator = np.random.default_rng(seed)
    return [generator.permutation(frames)[: frames // 2] for _ in range(draws)]


def stretches(frames: int) -> list[np.ndarray]:
    """All halves of the frames that are one stretch of the video."""
    return [np.arange(first, first + frames // 2) for first in range(frames - frames // 2 + 1)]


def held(table: Table, halves: Sequence[np.ndarray], *, at_most: float, confidence: float) -> Held:
    """Certify on each half, and look at all frames."""
    chosen, cut, wrong_on_others = [], 0, 0
    mean, cost = table.losses.mean(axis=0), table.costs.mean(axis=0)
    for seed, half in enumerate(halves):
        report = certify(
            table.settings, table.losses[half], table.costs[half].mean(axis=0), at_most=at_most,
            confidence=confidence, chains=table.chains, seed=seed,
        )  # fmt: skip
        if report.chosen is None:
            continue
        place = table.settings.index(report.schedule)
        chosen.append(place)
        cut += report.chosen.cut_after is not None
        wrong_on_others += bool(np.delete(table.losses[:, place], half).mean() > at_most)
    return Held(
        halves=len(halves),
        wrong=sum(bool(mean[place] > at_most) for place in chosen),
        wrong_on_others=wrong_on_others,
        never=len(halves) - len(chosen),
        cut=cut,
        saving=sum(1 - float(cost[place]) for place in chosen) / len(halves),
        loss=sum(float(mean[place]) for place in chosen) / len(halves),
        lost=sum(float(table.lost[place]) for place in chosen) / len(halves),
        most=max((float(mean[place]) for place in chosen), default=0.0),
    )


@torch.inference_mode()
def run(
    model: tet.ExitingModel, plan: Schedule, batches: data.Batches, keep: Callable[[Tensor], Any]
) -> dict[str, Any]:
    """Of a setting: what is kept of the label maps, multiply-adds of every frame, and confusion over all of them."""
    kept, work, device = [], [], next(model.parameters()).device
    confusion = torch.zeros(len(data.CLASSES), len(data.CLASSES), dtype=torch.int64)
    for images, labels in shell.progress(batches):
        out = model(images.to(device), schedule=plan)
        maps = out.upsample(data.SIZE).argmax(dim=1).cpu()
        kept.append(keep(maps))
        work += model.multiply_adds(out).tolist()
        confusion += metrics.confusion_matrix(maps, labels, classes=len(data.CLASSES), ignore=data.IGNORE)
    return {"kept": kept, "multiply_adds": work, "miou": metrics.mean_iou(confusion)}


def compared_with(reference: Iterable[Tensor]) -> Callable[[Tensor], list[float]]:
    """From the label maps of a batch to the losses, batches in their order."""
    batches = iter(reference)
    return lambda maps: risks.disagreement(maps, next(batches).long()).tolist()


def measured(given: argparse.Namespace, model: tet.ExitingModel, frames: Sequence[data.Frame]) -> Table:
    """Run what the results file lacks, writing it after each setting.

    Raises:
        UsageError: If the file has results of something else.
    """
    settings, chains = tet.default_settings(model)
    identity = {
        "model": common.digest(given.run or given.init),
        "fitted": common.digest_of_exits(given.fitted),
        "frames": [frame.image.stem for frame in frames], "settings": [plan.to_dict() for plan in settings],
    }  # fmt: skip
    results = opened(given.json, identity)
    batches = data.Batches(tuple(frames), _BATCH)
    if len(results["settings"]) < len(settings):
        dense = run(model, schedule.dense(), batches, lambda maps: maps.to(torch.int16))
        results["dense"] = {name: dense[name] for name in ("multiply_adds", "miou")}
        for plan in settings[len(results["settings"]) :]:
            found = run(model, plan, batches, compared_with(dense["kept"]))
            losses = [loss for part in found.pop("kept") for loss in part]
            results["settings"].append(found | {"losses": losses})
            evaluate.write_results(given.json, results)
    rows, dense = results["settings"], results["dense"]
    return Table(
        settings, chains,
        losses=np.array([row["losses"] for row in rows]).T,
        costs=np.array([row["multiply_adds"] for row in rows]).T / np.mean(dense["multiply_adds"]),
        lost=dense["miou"] - np.array([row["miou"] for row in rows]),
    )  # fmt: skip


def opened(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The results so far, or empty ones.

    Raises:
        UsageError: If the file holds something else, or the results of another network, other exits or frames.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        return {"inputs": identity, "dense": None, "settings": []}
    try:
        results = json.loads(path.read_text())
        other = [name for name, value in identity.items() if results["inputs"][name] != value]
    except (ValueError, KeyError, TypeError) as error:
        raise shell.UsageError(f"`--json` must be a new file or results of this script, got {str(path)!r}") from error
    if other:
        raise shell.UsageError(f"`--json` must be a new file or of the same {', '.join(other)}, got {str(path)!r}")
    return results


def exits_alone(table: Table) -> Table:
    """Without the networks cut short, with which the exits would share the confidence."""
    (first, *_), kept = table.chains, slice(len(table.chains[0]))
    return Table(table.settings[kept], (first,), table.losses[:, kept], table.costs[:, kept], table.lost[kept])


def described(table: Table, given: argparse.Namespace) -> list[str]:
    """The settings, as a table, and how much the mean of half of the frames depends on which half it is."""
    frames = len(table.losses)
    drawn, whole = random_halves(frames, given.draws, given.seed), stretches(frames)
    lines = [
        "| setting | disagreement | of halves drawn | of stretches | multiply-adds | mIoU lost |",
        "|---|---|---|---|---|---|",
    ]
    for place, plan in enumerate(table.settings):
        first = plan.active[0]
        cut = first.policy == always()
        name = f"cut after {first.after}" if cut else f"exits, confidence {_threshold(plan.to_dict())}"
        loss, cost = table.losses[:, place], table.costs[:, place].mean()
        ranges = [_range([loss[half].mean() for half in halves]) for halves in (drawn, whole)]
        lost = f"{100 * table.lost[place]:+.2f}"
        lines.append(f"| {name} | {100 * loss.mean():.2f} % | {' | '.join(ranges)} | {cost:.3f} | {lost} |")
    return lines


def _range(means: list[float]) -> str:
    return f"{100 * min(means):.2f} to {100 * max(means):.2f} %"


def _threshold(data: Any) -> float | None:
    """The first threshold in a plan as plain data, however its policies are composed."""
    if not isinstance(data, dict | list):
        return None
    if isinstance(data, dict) and isinstance(data.get("threshold"), float):
        return data["threshold"]
    inside = map(_threshold, data.values() if isinstance(data, dict) else data)
    return next((one for one in inside if one is not None), None)


def rows(table: Table, given: argparse.Namespace) -> list[str]:
    """What became of the calibrations, as a table."""
    frames = len(table.losses)
    halves = {
        "with repeats": with_repeats(frames, given.draws, given.seed),
        "drawn": random_halves(frames, given.draws, given.seed), "one stretch": stretches(frames),
    }  # fmt: skip
    lines = [
        "| at most | halves | above: all, others | never exit | cut short | saved | disagreement, most | mIoU lost |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for level in given.alpha:
        for name, parts in halves.items():
            one = held(table, parts, at_most=level, confidence=given.confidence)
            lines.append(
                f"| {100 * level:g} % | {one.halves} {name} | {100 * one.wrong / one.halves:.1f} %, "
                f"{100 * one.wrong_on_others / one.halves:.1f} % | {one.never} "
                f"| {one.cut} | {100 * one.saving:.1f} % | {100 * one.loss:.2f} %, {100 * one.most:.2f} % "
                f"| {100 * one.lost:+.2f} |"
            )
    return lines


def main() -> None:
    """Run from the command line."""
    given = arguments()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    split = data.frames(given.data, given.split)
    frames = [frame for frame in split if frame.sequence == given.sequence]
    if not frames:
        names = sorted({frame.sequence for frame in split})
        raise shell.UsageError(f"`--sequence` must be one of {names}, got {given.sequence!r}")
    if given.limit is not None:
        kept = np.linspace(0, len(frames) - 1, min(given.limit, len(frames)), dtype=int)
        frames = [frames[place] for place in kept]
    model = common.saved_model(given.run or given.init, data.SIZE, fitted=given.fitted).eval().to(given.device)
    if not model.schedule.active:
        model.retune(common.wide_then_narrow(map(int, model.exit_heads)))
    chains = 1 if given.choose_from == "exits" else len(tet.default_settings(model)[1])
    needed = images_needed(at_most=min(given.alpha), delta=(1 - given.confidence) / chains, test="betting")
    if len(frames) // 2 < needed:
        rule = f"be such that half of the frames, {len(frames) // 2}, are at least {needed}"
        raise shell.UsageError(
            f"`--alpha` and `--confidence` must {rule}, got {min(given.alpha)} and {given.confidence}"
        )
    table = measured(given, model, frames)
    chosen_from = exits_alone(table) if given.choose_from == "exits" else table
    print("\n".join([*described(table, given), "", *rows(chosen_from, given)]))


if __name__ == "__main__":
    shell.exit_with(main)
