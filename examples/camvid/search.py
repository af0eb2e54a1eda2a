"""Searches exits, thresholds and radii for a trained network, on replays of one dense pass over a split.

    python -m examples.camvid.search --data CAMVID --run RUN --json search.json --minutes 5 --drop 0.3

With `--merge-after`, plans may merge tokens as well, and are run, for a replay knows nothing of merges; with `--cost
seconds`, what a plan costs is read off a table of times that is measured first, on this machine.

Every schedule that is tried is written down as it is found. Stop it at any time: the same command goes on. In the
end, the best of some bands of cost are run for real, to tell how far replays are off, and the cheapest that loses at
most `--drop` mIoU, in its real run, is written beside the results, for `examples.camvid.evaluate --plans`.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import tokenexit_torch as tet
from examples import metrics, shell
from examples.camvid import common, data, evaluate
from tokenexit import schedule, search
from tokenexit.latency import Latency
from tokenexit.schedule import Schedule

_SUMMARY = (__doc__ or "").partition("\n")[0]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.camvid.search", description=_SUMMARY)
    parser.add_argument("--data", type=Path, required=True, help="CamVid folder: train.txt, train/, trainannot/, ...")
    parser.add_argument("--run", type=Path, required=True, help="run folder written by examples.camvid.train")
    parser.add_argument("--fitted", type=Path, help="exits that examples.frozen has fitted; its own by default")
    parser.add_argument("--json", type=Path, required=True, help="what was tried; a search goes on from it")
    parser.add_argument("--split", choices=data.SPLITS, default="val")
    parser.add_argument("--limit", type=int, help="use only this many images, spread evenly over the split")
    parser.add_argument("--minutes", type=float, default=5.0, help="time for trying plans")
    parser.add_argument("--evaluations", type=int, default=2000, help="plans at most")
    parser.add_argument("--cell", type=int, help="side of the cells; 0 for none. 3 by default, and none with merges")
    parser.add_argument("--per-class", type=int, default=0, help="leavers of each class that stay")
    parser.add_argument("--exits", type=int, nargs="+", help="blocks that may have an exit; all with a head by default")
    parser.add_argument("--merge-after", type=int, nargs="+", help="blocks that may have a merge: plans are run then")
    parser.add_argument("--cost", choices=("multiply-adds", "seconds"), default="multiply-adds")
    parser.add_argument("--exact", type=int, default=6, help="bands of cost, the best of which is run for real")
    parser.add_argument("--drop", type=float, default=0.3, help="mIoU, in points, that the best may lose")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    return parser.parse_args()


@dataclass(frozen=True)
class Measure:
    """Quality and cost of schedules on a split.

    Attributes:
        model: The network.
        outputs: The outputs of a schedule for all images: a replay of one dense pass, or the run itself.
        labels: Labels at half the resolution: every second row and column.
        latency: Times of the network on this machine; None if multiply-adds are the cost.
    """

    model: tet.ExitingModel
    outputs: Callable[[Schedule], tet.Output]
    labels: Tensor
    latency: Latency | None

    @cached_property
    def dense(self) -> float:
        """Cost of an image if nothing leaves or merges."""
        return self._absolute(schedule.dense(), self.outputs(schedule.dense()))

    def __call__(self, plan: Schedule) -> tuple[float, float]:
        """MIoU as a fraction, and cost relative to dense."""
        out = self.outputs(plan)
        return mean_iou(out.logits, self.labels), self.cost(plan, out)

    def cost(self, plan: Schedule, out: tet.Output) -> float:
        """Cost of a schedule with some outputs, relative to dense."""
        return self._absolute(plan, out) / self.dense

    def _absolute(self, plan: Schedule, out: tet.Output) -> float:
        if self.latency is None:
            return self.model.multiply_adds(out).double().mean().item()
        found = self.latency.seconds(out.tokens_per_block, exits=len(out.exits), merges=len(plan.merges))
        return found.double().mean().item()


def mean_iou(logits: Tensor, labels: Tensor) -> float:
    """MIoU of upsampled logits, in parts, as all of them would need much memory."""
    confusion = torch.zeros(len(data.CLASSES), len(data.CLASSES), dtype=torch.int64)
    for some, label in zip(logits.split(8), labels.split(8), strict=True):
        full = functional.interpolate(some, (label.shape[1], label.shape[2]), mode="bilinear")
        confusion += metrics.confusion_matrix(full.argmax(1), label, classes=len(data.CLASSES), ignore=data.IGNORE)
    return metrics.mean_iou(confusion)


@torch.inference_mode()
def run_for_real(model: tet.ExitingModel, plan: Schedule, batches: data.Batches) -> tet.Output:
    """The outputs of a schedule for all images, as one."""
    parts = [model(images, schedule=plan) for images, _ in shell.progress(batches, desc="exact")]
    return tet.Output(
        torch.cat([part.logits for part in parts]), torch.cat([part.exit_depth for part in parts]),
        torch.cat([part.tokens_per_block for part in parts]), parts[0].exits, "running",
    )  # fmt: skip


def search_space(given: argparse.Namespace, heads: Sequence[int]) -> search.Space:
    """What is searched.

    Raises:
        UsageError: If a block has no exit head, or there are to be cells beside merges.
    """
    after = heads if given.exits is None else sorted(set(given.exits))
    if not set(after) <= set(heads):
        raise shell.UsageError(f"`--exits` must be among the blocks with an exit head, {heads}, got {after}")
    cell, merges = 3 if given.cell is None else given.cell, None
    if given.merge_after is not None:
        cell = 0
        if given.cell:
            raise shell.UsageError(f"`--cell` must be 0 with --merge-after, got {given.cell}")
        blocks = sorted(set(given.merge_after))
        # A merge by agreement reads the exit head of its block.
        merges = search.Merges(tuple(blocks), agreed=search.Merges().agreed if set(blocks) <= set(heads) else ())
    return search.Space(tuple(after), per_class=given.per_class, cell=cell or None, merges=merges)


def open_results(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The results so far, or empty ones.

    Raises:
        UsageError: If the file holds something else, or the results of another search.
    """
    if not path.is_file():
        return {"inputs": identity, "latency": None, "found": [], "exact": []}
    try:
        results = json.loads(path.read_text())
        same = results["inputs"] == identity
    except (ValueError, KeyError, TypeError) as error:
        raise shell.UsageError(f"`--json` must be a new file or results of this script, got {str(path)!r}") from error
    if not same:
        found = f"{str(path)!r} with {results['inputs']}"
        raise shell.UsageError(f"`--json` must be a new file or have results of the same search, got {found}")
    return results


def until(found: Iterator[search.Found], *, minutes: float) -> Iterator[search.Found]:
    """What is found within some time."""
    end = time.monotonic() + 60 * minutes
    for one in found:
        yield one
        if time.monotonic() > end:
            return


def find(given: argparse.Namespace) -> dict[str, Any]:
    """Search, run the best of all bands of cost, and write both down.

    Raises:
        UsageError: If data, run or results do not fit the arguments.
    """
    frames = data.frames(given.data, given.split, given.limit)
    model = common.saved_model(given.run, data.SIZE, fitted=given.fitted)
    heads = sorted(int(block) for block in model.exit_heads)
    space = search_space(given, heads)
    identity = {
        "split": given.split, "images": len(frames), "model": common.digest(given.run),
        "fitted": common.digest_of_exits(given.fitted), "seed": given.seed, "cost": given.cost,
        "space": json.loads(json.dumps(asdict(space))),
    }  # fmt: skip
    results = open_results(given.json, identity)
    batches = data.Batches(frames, 4)
    if given.cost == "seconds" and results["latency"] is None:
        first, _ = next(iter(batches))
        results["latency"] = tet.measure_latency(model, first, progress=shell.progress).to_dict()
    latency = None if results["latency"] is None else Latency.from_dict(results["latency"])
    run = partial(run_for_real, model, batches=batches)
    tried = run
    if space.merges is None:
        tried = tet.trace(model, data.Images(batches, torch.device("cpu")), progress=shell.progress).replay
    labels = torch.cat([labels for _, labels in batches])[:, 1::2, 1::2]
    measure = Measure(model, tried, labels, latency)
    known = [search.Found.from_dict(one) for one in results["found"]]
    tries = search.explore(measure, space, evaluations=given.evaluations, known=known, seed=given.seed)
    bar = shell.progress(until(tries, minutes=given.minutes), desc="plans", initial=len(known))
    try:
        for one in bar:
            results["found"].append(one.to_dict())
    finally:  # interrupted or not
        evaluate.write_results(given.json, results)
    done = {json.dumps(one["schedule"]) for one in results["exact"]}
    for one in best_of_bands([search.Found.from_dict(one) for one in results["found"]], given.exact):
        if json.dumps(one.schedule.to_dict()) not in done:
            exact = one
            if space.merges is None:
                out = run(one.schedule)
                exact = search.Found(one.schedule, mean_iou(out.logits, labels), measure.cost(one.schedule, out))
            results["exact"].append(exact.to_dict() | {"replayed": [one.quality, one.cost]})
            evaluate.write_results(given.json, results)
    results["dense"] = mean_iou(run(schedule.dense()).logits, labels)
    evaluate.write_results(given.json, results)
    return results


def best_of_bands(found: Sequence[search.Found], count: int) -> list[search.Found]:
    """The best of each band of cost, from the cheapest schedule to dense.

    Replays lose less than real runs, so their frontier ends where they lose nothing: what a real run needs to lose
    little is beyond it.
    """
    saving = [one for one in found if one.cost < 1]
    least = min((one.cost for one in saving), default=1.0)
    best: dict[int, search.Found] = {}
    for one in saving:
        band = int(count * (one.cost - least) / (1 - least))
        if band not in best or one.quality > best[band].quality:
            best[band] = one
    return [best[band] for band in sorted(best)]


def main() -> None:
    """Run from the command line."""
    given = arguments()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    results = find(given)
    print(f"{len(results['found'])} schedules tried; dense {100 * results['dense']:.2f} mIoU at half resolution")
    exact = [search.Found(Schedule.from_dict(one["schedule"]), one["quality"], one["cost"]) for one in results["exact"]]
    for one, entry in zip(exact, results["exact"], strict=True):
        quality, cost = entry["replayed"]
        replayed = ("", "")
        if given.merge_after is None:
            replayed = (f" (replayed {100 * quality:.2f})", f" (replayed {cost:.3f})")
        print(
            f"mIoU {100 * one.quality:.2f}{replayed[0]}  "
            f"{given.cost} {one.cost:.3f}{replayed[1]}  {described(one.schedule)}"
        )
    if not exact:
        print("None of them is cheaper than dense.")
        return
    wanted = results["dense"] - given.drop / 100
    if all(one.quality < wanted for one in exact):
        lost = min(100 * (results["dense"] - one.quality) for one in exact)
        raise shell.UsageError(f"`--drop` must be at least {lost:.2f}, which the best loses, got {given.drop}")
    best = search.cheapest(exact, quality=wanted)
    path = given.json.with_name(f"{given.json.stem}_best.json")
    path.write_text(json.dumps(best.schedule.to_dict(), indent=1) + "\n")
    print(f"cheapest within {given.drop} of dense: {described(best.schedule)}, in {path}")


def described(plan: Schedule) -> str:
    """A schedule in a line: block, radius and threshold of each exit; block, side and criteria of each merge."""
    data = plan.to_dict()
    parts = [(exit["after"], exit["policy"].get("policy")) for exit in data["exits"]]
    exits = [
        f"after {after}: all" if policy is None else f"after {after}: r {policy['radius']} > {policy['threshold']}"
        for after, policy in parts
    ]
    merges = []
    for merge in data.get("merges", ()):
        alike = [] if merge["alike"] is None else [f"alike > {merge['alike']}"]
        agreed = merge["agreed"] and f"agreed r {merge['agreed']['radius']} > {merge['agreed']['threshold']}"
        criteria = " and ".join([*alike, *([agreed] if agreed else [])])
        merges.append(f"merge after {merge['after']} up to {merge['side']}: {criteria}")
    return ", ".join([*merges, *exits])


if __name__ == "__main__":
    shell.exit_with(main)
