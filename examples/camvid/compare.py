"""Puts trained networks side by side on CamVid: semantic tokens, gates, exits, the same networks dense and cut short.

    python -m examples.camvid.compare --data CAMVID --init camvid_vit_tiny_p16.npz --runs RUN ... --json compare.json

The checkpoint that they start from runs dense, and is what the others are compared with. A run with exits is measured
dense, cut short after each of its heads, and under its own plan; a run with gates dense and under the plan of every
budget; a run on semantic tokens as it is. Wall clocks are taken in turn. Results are written as they come; the same
command goes on.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import tokenexit_torch as tet
from examples import metrics, runs, shell, timing
from examples.camvid import common, data, gated
from examples.camvid.evaluate import environment
from tokenexit import schedule
from tokenexit.schedule import Schedule

BASELINE = "checkpoint, dense"
_SUMMARY = (__doc__ or "").partition("\n")[0]
_SCHEMA = 1


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.camvid.compare", description=_SUMMARY)
    parser.add_argument("--data", type=Path, required=True, help="CamVid folder: val.txt, val/, valannot/, ...")
    parser.add_argument("--init", type=Path, required=True, help="dense checkpoint, a .npz file with timm key names")
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of examples.camvid.train")
    parser.add_argument("--json", type=Path, required=True, help="results; what it holds is not measured again")
    parser.add_argument("--only", nargs="+", metavar="PART", help="only settings with one of these in their name")
    parser.add_argument("--split", choices=data.SPLITS, default="val")
    parser.add_argument("--limit", type=int, help="use only this many images, spread evenly over the split")
    parser.add_argument("--batches", type=int, nargs="+", default=[8], help="batch sizes to time")
    parser.add_argument("--rounds", type=int, default=5, help="timing rounds; 0 skips timing")
    parser.add_argument("--timing-images", type=int, default=16, help="images of the split that are timed")
    parser.add_argument("--accuracy-batch", type=int, default=4, help="batch size of the accuracy passes")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    for name, value, least in (("--accuracy-batch", given.accuracy_batch, 1), ("--batches", min(given.batches), 1),
                               ("--threads", given.threads or 1, 1), ("--rounds", given.rounds, 0)):  # fmt: skip
        if value < least:
            raise shell.UsageError(f"`{name}` must be at least {least}, got {value}")
    if max(given.batches) > given.timing_images:
        rule = f"be at most --timing-images, {given.timing_images}"
        raise shell.UsageError(f"`--batches` must {rule}, got {max(given.batches)}")
    return given


@dataclass(frozen=True)
class Candidate:
    """One way to run a network.

    Attributes:
        name: Its row.
        weights: Digest of the weights.
        run: What is timed: from images to whatever the network gives.
        read: From images to class scores of patches, and multiply-adds of each image, the head included.
    """

    name: str
    weights: str
    run: Callable[[Tensor], object]
    read: Callable[[Tensor], tuple[Tensor, Tensor]]


def candidates(given: argparse.Namespace) -> Iterator[Candidate]:
    """Everything that is measured, the baseline first.

    Raises:
        UsageError: If a file or folder is not what it should be.
    """
    device = torch.device(given.device)
    vit, final, _ = common.ready_model(given.init, data.SIZE)
    dense = tet.wrap(vit, schedule.dense(), head=final).eval().to(device)
    bare = runs.bare_dense(dense, torch.zeros(1, 3, *data.SIZE, device=device))
    yield Candidate(BASELINE, common.digest(given.init), bare, partial(_scores, dense, schedule.dense()))
    for folder in given.runs:
        name, weights = f"{folder.name}: {gated.recipe_of(folder)['method']}", common.digest(folder)
        if runs.is_semantic(folder):
            segmenter = runs.load_semantic(folder)[0].to(device)
            yield Candidate(name, weights, segmenter, partial(_recovered, segmenter))
            continue
        if runs.is_gated(folder):
            gated.require_preserved(folder)
            model: tet.ExitingModel | tet.GatedModel = runs.load_gated(folder)[0].to(device)
            plans = {f"gates {budget:.2f}": plan for budget, plan in gated.read_plans(folder).items()}
        else:
            model = exiting = runs.load(folder)[0].to(device)
            plans = {f"cut short after {after}": schedule.truncated(after=int(after)) for after in exiting.exit_heads}
            plans["exits"] = exiting.schedule
        for way, plan in {"dense": schedule.dense(), **plans}.items():
            run = partial(model, schedule=plan)
            yield Candidate(f"{name}, {way}", weights, run, partial(_scores, model, plan))


def _scores(model: tet.ExitingModel | tet.GatedModel, plan: Schedule, images: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(model, tet.ExitingModel):
        out = model(images, schedule=plan)
        return out.logits, model.multiply_adds(out)
    gates = model(images, schedule=plan)
    assert gates.logits is not None  # a run folder has a head
    return gates.logits, model.multiply_adds(gates)


def _recovered(model: runs.Segmenter, images: Tensor) -> tuple[Tensor, Tensor]:
    embedded = model.host.embed(images)
    return model(images), torch.full((len(images),), model.multiply_adds(embedded.grid, prefix=embedded.prefix))


@torch.inference_mode()
def accuracy(one: Candidate, batches: data.Batches, device: torch.device) -> dict[str, float]:
    """MIoU as a fraction, class scores upsampled to the labels, and mean multiply-adds of an image."""
    classes = len(data.CLASSES)
    confusion, work = torch.zeros(classes, classes, dtype=torch.int64), []
    for images, labels in shell.progress(batches, desc=one.name):
        scores, executed = one.read(images.to(device))
        predicted = functional.interpolate(scores, data.SIZE, mode="bilinear", align_corners=False).argmax(1).cpu()
        confusion += metrics.confusion_matrix(predicted, labels, classes=classes, ignore=data.IGNORE)
        work.append(executed.cpu())
    return {"miou": metrics.mean_iou(confusion), "multiply_adds": torch.cat(work).double().mean().item()}


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Measure what the results file lacks, writing it after each setting and each batch size.

    Raises:
        UsageError: If a run is not what it should be, or the results are of other images.
    """
    device, about = torch.device(given.device), {"schema": _SCHEMA, "split": given.split, "limit": given.limit}
    results: dict[str, Any] = {"about": about, "settings": {}, "timing": {}}
    if given.json.is_file():
        results = json.loads(given.json.read_text())
        if results.get("about") != about:
            raise shell.UsageError(f"`--json` must hold results of {about}, got {results.get('about')}")
    given.json.parent.mkdir(parents=True, exist_ok=True)
    frames = data.frames(given.data, given.split, given.limit)
    batches = data.Batches(frames, given.accuracy_batch)
    chosen = [one for one in candidates(given) if given.only is None or one.name == BASELINE or _named(one, given.only)]
    for one in shell.progress(chosen, desc="settings"):
        if results["settings"].get(one.name, {}).get("weights") != one.weights:
            results["settings"][one.name] = {"weights": one.weights, **accuracy(one, batches, device)}
            _write(given.json, results)
    if given.rounds > 0:
        measure_time(chosen, results, given)
    return results


def _named(one: Candidate, parts: Sequence[str]) -> bool:
    return any(part in one.name for part in parts)


def measure_time(chosen: Sequence[Candidate], results: dict[str, Any], given: argparse.Namespace) -> None:
    """Add every batch size that is not there yet for the same settings."""
    frames = data.frames(given.data, given.split, given.timing_images)
    images = torch.cat(list(data.Images(data.Batches(frames, 1), torch.device(given.device))))
    conditions = environment(torch.device(given.device)) | {
        "rounds": given.rounds, "images": len(frames), "weights": {one.name: one.weights for one in chosen},
    }  # fmt: skip
    del conditions["arguments"]
    for batch in given.batches:
        if results["timing"].get(str(batch), {}).get("conditions") == conditions:
            continue
        parts = [part for part in images.split(batch) if len(part) == batch]
        with torch.inference_mode():
            seconds = timing.interleaved(
                {one.name: one.run for one in chosen}, parts, rounds=given.rounds, wait=runs.waiting_for(images.device)
            )
        measured = timing.summary(seconds, images=batch * len(parts), baseline=BASELINE)
        results["timing"][str(batch)] = {"conditions": conditions, "settings": measured}
        _write(given.json, results)


def table(results: Mapping[str, Any]) -> str:
    """The settings in Markdown, by their multiply-adds."""
    settings, timed = results["settings"], results["timing"]
    base = settings[BASELINE]
    rows = [["setting", "mIoU", "against the checkpoint", "multiply-adds, dense = 1"]]
    for batch in timed:
        rows[0] += [f"images/s, batch {batch}", "speed-up"]
    rows.append(["---"] * len(rows[0]))
    for name, one in sorted(settings.items(), key=lambda item: -item[1]["multiply_adds"]):
        row = [name, f"{100 * one['miou']:.2f}", f"{100 * (one['miou'] - base['miou']):+.2f}"]
        row.append(f"{one['multiply_adds'] / base['multiply_adds']:.3f}")
        for of_batch in timed.values():
            found = of_batch["settings"].get(name)
            if found is None:
                row += ["", ""]
                continue
            low, middle, high = found["speedup"]
            row += [f"{found['images_per_second'][1]:.1f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"]
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _write(path: Path, results: Mapping[str, Any]) -> None:
    with shell.replacing(path) as file:
        file.write((json.dumps(results, indent=1) + "\n").encode())


def main() -> None:
    """Run from the command line."""
    given = arguments()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    print(table(compare(given)))


if __name__ == "__main__":
    shell.exit_with(main)
