"""Measures what exits cost and save on CamVid: accuracy, work and wall clock, beside dense and truncated networks.

    python -m examples.camvid.evaluate --data CAMVID --run RUN --json results.json --plot frontier.png
    python -m examples.camvid.evaluate --data CAMVID --init camvid_vit_tiny_p8.npz --fit-after 3 6 8 --json results.json
    python -m examples.camvid.evaluate --data CAMVID --init camvid_vit_tiny_p8.npz --baselines --json results.json

Results are written as they come. Stop it at any time: the same command measures only what is not in the file yet.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

import tokenexit_torch as tet
from examples import metrics, runs, shell, timing
from examples.camvid import common, data, gated, leaving, report
from examples.camvid.baselines import baselines
from examples.camvid.contenders import Contender, Measured, Runner, Setting, Way
from examples.camvid.merges import KINDS, merging
from tokenexit import TokenExitError, schedule
from tokenexit.heads import MLP

_DTOP_THRESHOLDS = (0.8, 0.9, 0.95, 0.98)
_NEIGHBOUR_THRESHOLDS = (0.7, 0.8, 0.9, 0.95)
_CELL_THRESHOLDS = (0.4, 0.6, 0.8, 0.9)
_PAUMER_THRESHOLDS = (0.02, 0.05, 0.1, 0.2)
_PAUMER_KEEP = (0.8, 0.6, 0.4, 0.3, 0.2, 0.1)  # fraction that stays at the last exit
_DOVIT_THRESHOLDS = (0.8, 0.9, 0.95, 0.985)
_COARSE, _FINE = {4: 1, 6: 1, 8: 0}, {3: 2, 6: 1, 8: 0}  # radius by exit, for hundreds and for thousands of tokens
_FIT_HIDDEN = 384
_SCHEMA = 1
_SUMMARY = (__doc__ or "").partition("\n")[0]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.camvid.evaluate", description=_SUMMARY)
    parser.add_argument("--data", type=Path, required=True, help="CamVid folder: train.txt, train/, trainannot/, ...")
    common.add_network(parser)
    parser.add_argument("--json", type=Path, required=True, help="results; what it already holds is not measured again")
    parser.add_argument("--plot", type=Path, help="frontier plot, .png or .svg")
    parser.add_argument("--split", choices=data.SPLITS, default="val")
    parser.add_argument("--limit", type=int, help="use only this many images, spread evenly over the split")
    parser.add_argument(
        "--exits",
        type=block_radius,
        nargs="+",
        metavar="BLOCK:RADIUS",
        help="exits of all methods, with the radius of the neighbourhood rule",
    )
    parser.add_argument(
        "--cells", type=int, nargs="*", default=[3], metavar="SIDE", help="sides of cells for the neighbourhood rule"
    )
    parser.add_argument(
        "--plans", type=Path, nargs="*", default=[], metavar="FILE", help="schedules as JSON, to be measured as well"
    )
    parser.add_argument(
        "--baselines", action="store_true", help="measure merged tokens, smaller images and a compiled network as well"
    )
    parser.add_argument("--merging", choices=KINDS, help="measure plans that merge before tokens leave as well")
    parser.add_argument(
        "--leaving",
        action="store_true",
        help="with --fitted translators: measure plans that leave translations as well",
    )
    parser.add_argument(
        "--fit-after",
        type=int,
        nargs="+",
        metavar="BLOCK",
        help="with --init: fit new exit heads after these blocks to the final head, without labels",
    )
    parser.add_argument("--fit-images", type=int, help="train images to fit them on; all by default")
    parser.add_argument("--fit-steps", type=int, default=1200)
    parser.add_argument("--fit-plan", type=Path, metavar="FILE", help="fit them to tokens as this schedule merges them")
    parser.add_argument(
        "--only", nargs="+", metavar="START", help="only dense, and settings whose name starts like this"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="batch sizes to time")
    parser.add_argument("--rounds", type=int, default=5, help="timing rounds; 0 skips timing")
    parser.add_argument("--timing-images", type=int, default=16, help="images of the split that are timed")
    parser.add_argument("--accuracy-batch", type=int, default=4, help="batch size of the accuracy passes")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    _check(given)
    return given


def block_radius(text: str) -> tuple[int, int]:
    """Read "6:1" as an exit after block 6 with radius 1."""
    block, _, radius = text.partition(":")
    if not (block.isdigit() and radius.isdigit()):
        raise argparse.ArgumentTypeError(f"must be BLOCK:RADIUS, two whole numbers, got {text!r}")
    return int(block), int(radius)


def _check(given: argparse.Namespace) -> None:
    if given.fit_after is not None and given.fitted is not None:
        raise shell.UsageError(f"`--fitted` must be left out with --fit-after, got {str(given.fitted)!r}")
    if given.fit_after is not None and given.run is not None:
        raise shell.UsageError("`--fit-after` must come with --init; a run has fitted heads already, got --run")
    shell.require_counts(
        accuracy_batch=given.accuracy_batch,
        batches=min(given.batches),
        fit_steps=given.fit_steps,
        threads=given.threads,
    )
    if max(given.batches) > given.timing_images:
        raise shell.UsageError(
            f"`--batches` must be at most --timing-images, {given.timing_images}, got {max(given.batches)}"
        )
    headless = sorted({block for block, _ in given.exits or ()} - set(given.fit_after or ()))
    if given.fit_after is not None and headless:
        raise shell.UsageError(f"`--exits` must be among --fit-after, {sorted(given.fit_after)}, got {headless}")
    if given.rounds < 0:
        raise shell.UsageError(f"`--rounds` must be at least 0, got {given.rounds}")


def settings(heads: Collection[int], radius: Mapping[int, int], cells: Sequence[int]) -> tuple[Setting, ...]:
    """Everything that is measured.

    Args:
        heads: Blocks with an exit head; the network is cut short after each.
        radius: Exits of all methods, with the radius of the neighbourhood rule.
        cells: Sides of the cells of that rule.

    Raises:
        UsageError: If an exit has no head.
    """
    unknown = sorted(set(radius) - set(heads))
    if unknown:
        raise shell.UsageError(f"`--exits` must be among the blocks with a head, {sorted(heads)}, got {unknown}")
    exits, radii = ",".join(map(str, radius)), ",".join(f"{block}:{around}" for block, around in radius.items())
    return (
        Setting("dense", "dense", schedule.dense()),
        *(Setting(f"truncated after {block}", "truncated", schedule.truncated(after=block)) for block in sorted(heads)),
        *(
            Setting(
                f"DToP {threshold}, k = {kept}, exits {exits}", f"DToP, k = {kept}, exits {exits}",
                schedule.dtop(after=radius, threshold=threshold, per_class=kept),
            )
            for kept in (0, 5)
            for threshold in _DTOP_THRESHOLDS
        ),
        *(
            Setting(
                f"neighbours {threshold}, k = 5, exits {radii}", f"neighbours, k = 5, exits {radii}",
                schedule.neighbours(radius=radius, threshold=threshold, per_class=5),
            )
            for threshold in _NEIGHBOUR_THRESHOLDS
        ),
        *(
            Setting(
                f"neighbours {threshold}, cells of {cell}, exits {radii}",
                f"neighbours, cells of {cell}, exits {radii}",
                schedule.neighbours(radius=radius, threshold=threshold, per_class=0, cell=cell),
            )
            for cell in cells
            for threshold in _CELL_THRESHOLDS
        ),
        *(
            Setting(
                f"PAUMER keeps {keep}, exits {exits}", f"PAUMER, exits {exits}",
                schedule.paumer(keep={after: keep ** (at / len(radius)) for at, after in enumerate(sorted(radius), 1)}),
            )
            for keep in _PAUMER_KEEP
        ),
        *(
            Setting(
                f"PAUMER {threshold}, exits {exits}", f"PAUMER, exits {exits}",
                schedule.paumer(after=radius, threshold=threshold),
            )
            for threshold in _PAUMER_THRESHOLDS
        ),
        *(
            Setting(
                f"DoViT {threshold}, exits {exits}", f"DoViT, exits {exits}",
                schedule.dovit(after=radius, threshold=threshold),
            )
            for threshold in _DOVIT_THRESHOLDS
        ),
    )  # fmt: skip


def gate_settings(run: Path) -> tuple[Setting, ...]:
    """What is measured of a network with gates: dense, and every budget that it is calibrated for.

    Args:
        run: Its run folder.

    Raises:
        UsageError: If the folder holds no plans.
    """
    calibrated = (Setting(f"gates {budget:.2f}", "gates", plan) for budget, plan in gated.read_plans(run).items())
    return Setting("dense", "dense", schedule.dense()), *calibrated


def read_plan(path: Path) -> Setting:
    """A schedule from a JSON file, named after it.

    Raises:
        UsageError: If it holds none.
    """
    try:
        return Setting(path.stem, "found", schedule.Schedule.from_dict(json.loads(path.read_text())))
    except (OSError, ValueError, TokenExitError) as error:
        raise shell.UsageError(f"`--plans` must be schedules as JSON, got {str(path)!r}: {error}") from error


def default_radius(heads: Collection[int], tokens: int) -> dict[int, int]:
    """Wide and early where tokens are many; where there is no head for that, what is left of the plan."""
    plan = _FINE if tokens >= 1500 and set(_FINE) <= set(heads) else _COARSE
    return {block: around for block, around in plan.items() if block in heads} or dict.fromkeys(sorted(heads), 0)


@torch.inference_mode()
def accuracy(
    runner: Runner,
    batches: data.Batches,
    dense: UInt8[Tensor, "images 352 480"] | None,
    device: torch.device,
    *,
    slots: int,
    description: str,
) -> tuple[dict[str, Any], UInt8[Tensor, "images 352 480"]]:
    """Run a network over a split.

    Args:
        runner: The network, and how it runs.
        batches: The split.
        dense: Classes that the dense network predicts; the runner's own if None.
        device: Where the model is.
        slots: Tokens of an image in the dense network.
        description: What the progress bar says.

    Returns:
        The figures for the JSON file (fractions, and multiply-adds per image), and the predicted classes.
    """
    classes = len(data.CLASSES)
    confusion: dict[str, Tensor] = {}
    predictions, tokens, multiply_adds = [], [], []
    ordered = iter(batches.frames)
    for images, labels in shell.progress(batches, desc=description):
        scored = runner.read(runner.run(images.to(device)))
        predicted = scored.logits.argmax(1).cpu()
        for one, label, frame in zip(predicted, labels, islice(ordered, len(images)), strict=True):
            counts = metrics.confusion_matrix(one, label, classes=classes, ignore=data.IGNORE)
            confusion[frame.sequence] = confusion.get(frame.sequence, 0) + counts
        predictions.append(predicted.to(torch.uint8))
        tokens.append(scored.tokens_per_block.cpu())
        multiply_adds.append(scored.multiply_adds.cpu())
    labelled, counted, work = torch.cat(predictions), torch.cat(tokens), torch.cat(multiply_adds)
    total = torch.stack(list(confusion.values())).sum(0)
    figures = {
        "miou": metrics.mean_iou(total),
        "iou": dict(zip(data.CLASSES, _numbers(metrics.iou_per_class(total)), strict=True)),
        "miou_by_sequence": {name: metrics.mean_iou(counts) for name, counts in sorted(confusion.items())},
        "token_blocks": counted.sum().item() / (counted.numel() * slots),
        "tokens_per_block": counted.double().mean(0).tolist(),
        "multiply_adds": work.double().mean().item(),
        "agreement": 1.0 if dense is None else (labelled == dense).double().mean().item(),
    }
    return figures, labelled


def _numbers(values: Float[Tensor, " count"]) -> list[float | None]:
    """JSON has no NaN."""
    return [None if value != value else value for value in values.tolist()]


@torch.inference_mode()
def timed(
    candidates: Mapping[str, Callable[[Tensor], object]],
    images: Float[Tensor, "images 3 height width"],
    *,
    batch: int,
    rounds: int,
) -> dict[str, Any]:
    """Time every candidate at one batch size; what does not fill a batch is left out."""
    batches = [part for part in images.split(batch) if len(part) == batch]
    seconds = timing.interleaved(candidates, batches, rounds=rounds, wait=runs.waiting_for(images.device))
    return timing.summary(seconds, images=batch * len(batches), baseline="dense")


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on, besides its inputs."""
    names = ("tokenexit", "torch", "timm", "numpy")
    return {
        "arguments": sys.argv[1:],
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in names},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def inputs(given: argparse.Namespace, frames: Collection[data.Frame]) -> dict[str, Any]:
    """What accuracy depends on: results of other inputs do not belong into the same file."""
    source = given.run or given.init
    if not source.exists():
        raise shell.UsageError(f"`--{'run' if given.run else 'init'}` must exist, got {str(source)!r}")
    return {
        "model": source.name,
        "sha256": common.digest(source),
        "split": given.split,
        "images": len(frames),
        "fitted": common.digest_of_exits(given.fitted),
        "fit_after": None if given.fit_after is None else sorted(set(given.fit_after)),
        "fit_images": given.fit_images,
        "fit_plan": None if given.fit_plan is None else read_plan(given.fit_plan).plan.to_dict(),
        "fit_steps": None if given.fit_after is None else given.fit_steps,
        "device": torch.device(given.device).type,
    }


def open_results(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The results so far, or empty ones.

    Raises:
        UsageError: If the file holds something else, or results of other inputs.
    """
    if not path.is_file():
        return {"schema": _SCHEMA, "inputs": dict(identity), "fit": None, "settings": {}, "timing": {}}
    try:
        results = json.loads(path.read_text())
        found = results["inputs"]
    except (ValueError, KeyError, TypeError) as error:
        raise shell.UsageError(f"`--json` must be a new file or results of this script, got {str(path)!r}") from error
    different = [f"{name} {found.get(name)!r}, not {now!r}" for name, now in identity.items() if found.get(name) != now]
    if different:
        raise shell.UsageError(
            f"`--json` must be a new file or have results of the same inputs, got {str(path)!r} with "
            + "; ".join(different)
        )
    return results


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write the file whole or not at all."""
    with shell.replacing(path) as file:
        file.write((json.dumps(results, indent=1) + "\n").encode())


def model_of(given: argparse.Namespace, results: dict[str, Any]) -> tet.ExitingModel:
    """The model to measure: a run, or a ready model with the file's exit heads or with fitted ones.

    Raises:
        UsageError: If a file is missing or does not fit.
    """
    fitted = given.fitted if given.fit_after is None else common.fitted_exits(given.json)
    if given.fit_after is None or (results["fit"] is not None and fitted.is_dir()):
        return common.saved_model(given.run or given.init, data.SIZE, fitted=fitted)
    return fitted_model(given, results, fitted)


def fitted_model(given: argparse.Namespace, results: dict[str, Any], kept: Path) -> tet.ExitingModel:
    """Fit new exit heads on train images without labels; they are kept beside the results, for when these go on."""
    vit, final, _ = common.ready_model(given.init, data.SIZE)
    torch.manual_seed(0)
    after = sorted(set(given.fit_after))
    plan = schedule.dense(after=after)
    if given.fit_plan is not None:
        merges = read_plan(given.fit_plan).plan
        plan = replace(plan, merges=merges.merges, keys=merges.keys)
    model = tet.wrap(vit, plan, head=final, exit_heads=MLP(hidden=_FIT_HIDDEN))
    model.eval().to(given.device)
    frames = data.frames(given.data, "train", given.fit_images)
    images = data.Images(data.Batches(frames, given.accuracy_batch), torch.device(given.device))
    fit = tet.fit_exits(model, images, steps=given.fit_steps, progress=shell.progress)
    tet.save(model, kept)
    agreement = {str(block): value for block, value in fit.agreement.items()}
    results["fit"] = {"images": len(frames), "hidden": _FIT_HIDDEN, "agreement_on_train": agreement}
    write_results(given.json, results)
    return model


def evaluate(given: argparse.Namespace) -> dict[str, Any]:
    """Measure what the results file lacks, writing it after each setting and each batch size.

    Raises:
        UsageError: If data, model or results do not fit the arguments.
    """
    frames = data.frames(given.data, given.split, given.limit)
    results = open_results(given.json, inputs(given, frames))
    given.json.parent.mkdir(parents=True, exist_ok=True)
    if given.run is not None and runs.is_gated(given.run):
        if given.exits:
            raise shell.UsageError(f"`--exits` must be left out for a run with gates, got {dict(given.exits)}")
        if given.fitted is not None:
            raise shell.UsageError(f"`--fitted` must be left out for a run with gates, got {str(given.fitted)!r}")
        if given.merging:
            raise shell.UsageError("`--merging` must be left out for a run with gates")
        gated.require_preserved(given.run)
        model = runs.load_gated(given.run)[0].eval().to(given.device)
        patches = patch_tokens(model)
        every: tuple[Contender, ...] = gate_settings(given.run)
    else:
        model = model_of(given, results).eval().to(given.device)
        patches = patch_tokens(model)
        heads = [int(block) for block in model.exit_heads]
        every = settings(heads, dict(given.exits) if given.exits else default_radius(heads, patches), given.cells)
        every = (*every, *(merging(heads, given.merging) if given.merging else ()))
        if given.leaving:
            leaving.require_translators(model.translated_after)
            plans = {**leaving.by_classes(), **leaving.by_error()}
            every = (*every, *(Setting(name, "translated", plan) for name, plan in plans.items()))
    every = (*every, *(baselines(patches) if given.baselines else ()), *map(read_plan, given.plans))
    dense, *others = every
    chosen = [dense, *(one for one in others if given.only is None or one.name.startswith(tuple(given.only)))]
    results["about"] = environment(torch.device(given.device)) | {"patch_tokens": patches, "blocks": model.depth}
    measure_accuracy(model, chosen, frames, results, given)
    if given.rounds > 0:
        blank = next(model.parameters()).new_zeros(1, 3, *data.SIZE)
        measure_time(model, chosen, results, given, bare=runs.bare_dense(model, blank))
    return results


def patch_tokens(model: tet.ExitingModel | tet.GatedModel | tet.DecodingModel) -> int:
    """Patches of a CamVid image."""
    embedded = _embedded(model)
    return embedded.grid[0] * embedded.grid[1]


@torch.inference_mode()
def _embedded(model: tet.ExitingModel | tet.GatedModel | tet.DecodingModel) -> tet.Embedded:
    return model.host.embed(next(model.parameters()).new_zeros(1, 3, *data.SIZE))


def measure_accuracy(
    model: Measured,
    chosen: Sequence[Way[Measured]],
    frames: Sequence[data.Frame],
    results: dict[str, Any],
    given: argparse.Namespace,
) -> None:
    """Add to `results["settings"]`, and to the file, every contender that is not there yet run in the same way."""
    done = results["settings"]
    pending = [one for one in chosen if done.get(one.name, {}).get("schedule") != one.how]
    if not pending:
        return
    batches, device = data.Batches(frames, given.accuracy_batch), torch.device(given.device)
    # Dense runs again even if its figures are known: the others are compared with its predictions.
    dense, others = chosen[0], [one for one in pending if one.kind != "dense"]
    slots = _embedded(model).tokens.shape[1]
    figures, reference = accuracy(dense.on(model), batches, None, device, slots=slots, description=dense.name)
    _keep(results, dense, figures, given.json)
    for one in shell.progress(others, desc="settings"):
        figures, _ = accuracy(one.on(model), batches, reference, device, slots=slots, description=one.name)
        _keep(results, one, figures, given.json)


def _keep(results: dict[str, Any], one: Way[Any], figures: Mapping[str, Any], path: Path) -> None:
    results["settings"][one.name] = {"kind": one.kind, "schedule": one.how, **figures}
    write_results(path, results)


def measure_time(
    model: Measured,
    chosen: Sequence[Way[Measured]],
    results: dict[str, Any],
    given: argparse.Namespace,
    *,
    bare: Callable[[Tensor], object],
) -> None:
    """Add to `results["timing"]`, and to the file, every batch size that is not there yet for the same settings.

    The dense network is timed as `bare`, without the library.
    """
    frames = data.frames(given.data, given.split, given.timing_images)
    device = torch.device(given.device)
    images = torch.cat(list(data.Images(data.Batches(frames, 1), device)))
    conditions = {
        "rounds": given.rounds, "images": len(frames), "threads": torch.get_num_threads(),
        "device": results["about"]["device"], "plans": {one.name: one.how for one in chosen},
    }  # fmt: skip
    for batch in given.batches:
        if results["timing"].get(str(batch), {}).get("conditions") == conditions:
            continue
        candidates = {one.name: one.on(model).run for one in chosen} | {"dense": bare}
        measured = timed(candidates, images, batch=batch, rounds=given.rounds)
        results["timing"][str(batch)] = {"conditions": conditions, "settings": measured}
        write_results(given.json, results)


def main() -> None:
    """Run from the command line."""
    given = arguments()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    results = evaluate(given)
    print(report.table(results))
    if given.plot is not None:
        report.plot(results, given.plot)
        print(f"plot written to {given.plot}")


if __name__ == "__main__":
    shell.exit_with(main)
