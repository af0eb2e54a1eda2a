"""What SViT (WACV 2024) found of pruning for dense tasks, tested on networks trained on CamVid, at one budget.

    python -m examples.camvid.insights --data CAMVID --runs RUN RUN_1 OTHER --json insights.json --plot rates.png

A run is a folder of examples.camvid.train, with gates or with exits; runs of one method and several seeds share a row.
Gates are run at every budget near by that they are calibrated for, and mIoU is interpolated between the two whose
multiply-adds, as executed, lie around the one that is asked for; exits are run at the threshold that takes it. For the
first run with gates it also reports how well thresholds keep their rates on images that they were not calibrated on,
and how the rate follows the difficulty of an image. Runs that the results file holds are not measured again.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

import tokenexit_torch as tet
from examples import metrics, runs, shell
from examples.camvid import common, data, gated
from tokenexit import schedule
from tokenexit.schedule import Schedule

_SUMMARY = (__doc__ or "").partition("\n")[0]
_TUNING_IMAGES = 26
_AROUND = 0.16  # calibrated budgets further away are not run


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.camvid.insights", description=_SUMMARY)
    parser.add_argument("--data", type=Path, required=True, help="CamVid folder: train.txt, train/, trainannot/, ...")
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="run folders")
    parser.add_argument("--json", type=Path, required=True, help="results; runs that it holds are not measured again")
    parser.add_argument("--plot", type=Path, help="rate and difficulty of every image, .png or .svg")
    parser.add_argument("--split", choices=data.SPLITS, default="val")
    parser.add_argument("--budget", type=float, default=gated.TRAINED, help="multiply-adds, dense = 1")
    parser.add_argument("--limit", type=int, help="use only this many images, spread evenly over the split")
    parser.add_argument("--batch", type=int, default=4, help="batch size (default %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    if given.batch < 1:
        raise shell.UsageError(f"`--batch` must be at least 1, got {given.batch}")
    if not 0 < given.budget <= 1:
        raise shell.UsageError(f"`--budget` must be above 0 and at most 1, got {given.budget}")
    return given


@torch.inference_mode()
def measure(
    folder: Path, given: argparse.Namespace, batches: data.Batches, tuning: Sequence[Tensor], device: torch.device
) -> dict[str, Any]:
    """One run, dense and at the budget.

    Args:
        folder: The run.
        given: The arguments.
        batches: The split.
        tuning: Images on which the threshold of exits is found; no labels.
        device: Where to.

    Raises:
        UsageError: If the folder holds no run of examples.camvid.train.
    """
    recipe = gated.recipe_of(folder)
    variant = gated.VARIANTS.get(recipe["method"], gated.Gated())
    if runs.is_gated(folder):
        model: tet.GatedModel | tet.ExitingModel = runs.load_gated(folder)[0].to(device)
        every = gated.read_plans(folder)
        plans = [plan for budget, plan in every.items() if abs(budget - given.budget) <= _AROUND]
        if not plans:
            raise shell.UsageError(f"`--budget` must be near one of {sorted(every)}, got {given.budget}")
    else:
        model = runs.load(folder)[0].to(device)
        plans = [plan_for(model, tuning, given.budget)]
    dense, _ = evaluate(model, schedule.dense(), variant, batches, device, description=f"{folder.name}, dense")
    points = []
    for plan in plans:
        sparse, images = evaluate(model, plan, variant, batches, device, description=folder.name)
        work = sparse["multiply_adds"] / dense["multiply_adds"]
        points.append({"multiply_adds": work, "miou": sparse["miou"], "plan": plan.to_dict(), **images})
    points.sort(key=lambda one: one["multiply_adds"])
    return {
        "method": recipe["method"], "seed": recipe["seed"], "epochs": recipe["epochs"], "dense_miou": dense["miou"],
        "miou": between(points, given.budget), "points": points,
    }  # fmt: skip


def between(points: Sequence[Mapping[str, Any]], budget: float) -> float:
    """MIoU at a budget, interpolated in multiply-adds; that of the nearest point beyond the ends."""
    work, miou = ([one[name] for one in points] for name in ("multiply_adds", "miou"))
    return float(np.interp(budget, work, miou))


def evaluate(
    model: tet.GatedModel | tet.ExitingModel,
    plan: Schedule,
    variant: gated.Gated,
    batches: data.Batches,
    device: torch.device,
    *,
    description: str,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """MIoU and multiply-adds of a plan, and for every image the share that runs and the share of wrong pixels.

    Args:
        model: The network.
        plan: When tokens leave or are skipped.
        variant: What the head reads of skipped tokens.
        batches: The split.
        device: Where the network is.
        description: What the progress bar says.
    """
    classes = len(data.CLASSES)
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    work, rates, wrong = [], [], []
    for images, labels in shell.progress(batches, desc=description):
        if isinstance(model, tet.GatedModel):
            gates = model(images.to(device), schedule=plan)
            logits = gated.logits(model, gates, variant, gates.keep.float())
            ran, executed = gates.tokens_per_block, model.multiply_adds(gates)
        else:
            exits = model(images.to(device), schedule=plan)
            logits, ran, executed = exits.logits, exits.tokens_per_block, model.multiply_adds(exits)
        predicted = functional.interpolate(logits, data.SIZE, mode="bilinear", align_corners=False).argmax(1).cpu()
        confusion += metrics.confusion_matrix(predicted, labels, classes=classes, ignore=data.IGNORE)
        known = labels != data.IGNORE
        wrong += (((predicted != labels) & known).sum((1, 2)) / known.sum((1, 2))).tolist()
        rates += (ran.float().mean(1) / ran.amax(1)).tolist()
        work.append(executed.double().cpu())
    figures = {"miou": metrics.mean_iou(confusion), "multiply_adds": torch.cat(work).mean().item()}
    return figures, {"rates": rates, "wrong": wrong}


def plan_for(model: tet.ExitingModel, images: Sequence[Tensor], budget: float) -> Schedule:
    """The network's own exits at the threshold under which these images take a share of the dense multiply-adds."""

    def share(threshold: float) -> float:
        plan = model.schedule.with_threshold(threshold)
        sparse = sum(model.multiply_adds(model(batch, schedule=plan)).sum().item() for batch in images)
        return sparse / dense

    dense = sum(model.multiply_adds(model(batch, schedule=schedule.dense())).sum().item() for batch in images)
    low, high = 0.0, 1.0
    rising = share(0.9) > share(0.3)
    for _ in shell.progress(range(9), desc="threshold"):
        middle = (low + high) / 2
        low, high = (middle, high) if (share(middle) < budget) == rising else (low, middle)
    return model.schedule.with_threshold((low + high) / 2)


@torch.inference_mode()
def kept(model: tet.GatedModel, plan: Schedule, batches: Iterable[Tensor]) -> Float[Tensor, "images gates"]:
    """Share of the patches that every gate keeps."""
    return torch.cat([model(images, schedule=plan).keep.flatten(2).float().mean(2) for images in batches])


def calibration(folder: Path, given: argparse.Namespace, device: torch.device) -> list[dict[str, float]]:
    """Calibrate on every second train image, at the trained rates, and look at the others.

    Returns:
        For each gate the rate asked for, those of both halves, and how many standard errors lie between the latter;
        images are the units.
    """
    model = runs.load_gated(folder)[0].to(device)
    frames = data.frames(given.data, "train", given.limit)
    halves = [data.Images(data.Batches(frames[start::2], given.batch), device) for start in (0, 1)]
    rates = gated.VARIANTS[gated.recipe_of(folder)["method"]].rate
    plan = tet.gate_thresholds(model, shell.progress(halves[0], desc="calibration"), rates=rates, progress=iter)
    inside, outside = (kept(model, plan, shell.progress(half, desc="rates")) for half in halves)
    error = (inside.var(0) / len(inside) + outside.var(0) / len(outside)).sqrt()
    distance = (outside.mean(0) - inside.mean(0)).abs() / error.clamp(min=1e-9)
    rows = zip(rates.items(), inside.mean(0).tolist(), outside.mean(0).tolist(), distance.tolist(), strict=True)
    return [
        {"after": after, "rate": rate, "calibrated": one, "others": other, "standard_errors": errors}
        for (after, rate), one, other, errors in rows
    ]


def correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation (Spearman's): 1 if the one always rises with the other."""
    ranks = np.stack([np.argsort(np.argsort(np.asarray(values))) for values in (one, other)])
    return np.corrcoef(ranks).reshape(2, 2)[0, 1].item()


def table(results: Mapping[str, Any]) -> str:
    """The runs in Markdown, one row for each method, its seeds together."""
    rows = ["| method | seeds | mIoU | against its own dense run | multiply-adds run |", "|---|---|---|---|---|"]
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for one in results["runs"].values():
        by_method.setdefault(one["method"], []).append(one)
    for method, found in by_method.items():
        found = sorted(found, key=lambda one: one["seed"])
        miou = [100 * one["miou"] for one in found]
        drop = [100 * (one["miou"] - one["dense_miou"]) for one in found]
        work = sorted(point["multiply_adds"] for one in found for point in one["points"])
        ran = f"{work[0]:.3f}" + (f" to {work[-1]:.3f}" if len(work) > 1 else "")
        cells = method, ", ".join(str(one["seed"]) for one in found), _spread(miou), _spread(drop, sign="+"), ran
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _spread(values: Sequence[float], *, sign: str = "") -> str:
    mean = f"{np.mean(values):{sign}.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{sign}.2f} to {max(values):{sign}.2f})"


def plot(results: Mapping[str, Any], path: Path) -> None:
    """How the share that runs follows the errors of the dense checkpoint, image by image."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 4), constrained_layout=True)
    difficulty = results["difficulty"]
    axes.scatter(100 * np.asarray(difficulty["dense_wrong"]), 100 * np.asarray(difficulty["rates"]), s=10)
    axes.set(xlabel="wrong pixels, the same network dense, %", ylabel="token-blocks that run, %")
    axes.set_title(f"rank correlation {difficulty['correlation']:.2f}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Measure what the results file lacks.

    Raises:
        UsageError: If a folder holds no run, or the results are of other images.
    """
    device = torch.device(given.device)
    about = {"split": given.split, "limit": given.limit, "budget": given.budget}
    results: dict[str, Any] = {"about": about, "runs": {}}
    if given.json.is_file():
        results = json.loads(given.json.read_text())
        same = results.get("about") == about
        if not same:
            raise shell.UsageError(f"`--json` must hold results of {about}, got {results.get('about')}")
    batches = data.Batches(data.frames(given.data, given.split, given.limit), given.batch)
    tuning = list(data.Images(data.Batches(data.frames(given.data, given.split, _TUNING_IMAGES), given.batch), device))
    for folder in given.runs:
        mark = common.digest(folder)
        if results["runs"].get(str(folder), {}).get("digest") != mark:
            found = measure(folder, given, batches, tuning, device)
            results["runs"][str(folder)] = {"digest": mark, **found}
            _write(given.json, results)
    first = next((folder for folder in given.runs if runs.is_gated(folder)), None)
    if first is not None and results.get("calibration_of") != common.digest(first):
        results |= {"calibration_of": common.digest(first), "calibration": calibration(first, given, device)}
        model, plan = runs.load_gated(first)[0].to(device), schedule.dense()
        with torch.inference_mode():
            _, images = evaluate(model, plan, gated.Gated(), batches, device, description="difficulty")
        points = results["runs"][str(first)]["points"]
        rates = min(points, key=lambda one: abs(one["multiply_adds"] - given.budget))["rates"]
        together = correlation(rates, images["wrong"])
        results["difficulty"] = {"rates": rates, "dense_wrong": images["wrong"], "correlation": together}
        _write(given.json, results)
    return results


def _write(path: Path, results: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with shell.replacing(path) as file:
        file.write((json.dumps(results, indent=1) + "\n").encode())


def main() -> None:
    """Run from the command line."""
    given = arguments()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    results = run(given)
    print(table(results))
    for row in results.get("calibration", ()):
        print(
            f"gate after {row['after']}: asked for {row['rate']:.3f}, calibrated {row['calibrated']:.4f}, other images "
            f"{row['others']:.4f}, {row['standard_errors']:.1f} standard errors apart"
        )
    if "difficulty" in results:
        print(f"rate and error of the dense network, rank correlation {results['difficulty']['correlation']:.2f}")
        if given.plot is not None:
            plot(results, given.plot)
            print(f"plot written to {given.plot}")


if __name__ == "__main__":
    shell.exit_with(main)
