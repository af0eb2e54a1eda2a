"""Evaluates in JAX what was trained in PyTorch on CamVid: accuracy, work, and the decisions of both side by side.

    python -m examples.jax.camvid_evaluate --data CAMVID --run RUN --compare
    python -m examples.jax.camvid_evaluate --data CAMVID --init camvid_vit_tiny_p16.npz --compare --rounds 5

The weights are read as they lie in the files. With `--compare` the PyTorch side runs on the same images, and every
difference is counted; with `--rounds` wall clock is measured, dense JAX being 1, and how many of the entries that
blocks worked on held a token.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from jax import numpy as jnp
from jaxtyping import Bool, Float, Int

import tokenexit_jax as tej
import tokenexit_torch as tet
from examples import metrics, shell, timing
from examples.camvid import common, data, evaluate
from examples.jax import runs
from tokenexit import cost
from tokenexit.schedule import Schedule

_ONLY = ("DToP 0.95, k = 5", "neighbours 0.9, k", "PAUMER 0.05", "DoViT 0.95", "the run's own")
_NEAR = 1e-4  # scores that differ by less than this from a threshold may fall on either side
_SUMMARY = (__doc__ or "").partition("\n")[0]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.jax.camvid_evaluate", description=_SUMMARY)
    parser.add_argument("--data", type=Path, required=True, help="CamVid folder: train.txt, train/, trainannot/, ...")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", type=Path, help="run folder written by examples.camvid.train")
    model.add_argument("--init", type=Path, help="ready model, a .npz file with timm key names and heads.B.*")
    parser.add_argument("--split", choices=data.SPLITS, default="val")
    parser.add_argument("--limit", type=int, help="use only this many images, spread evenly over the split")
    parser.add_argument("--exits", type=evaluate.block_radius, nargs="+", metavar="BLOCK:RADIUS")
    parser.add_argument(
        "--only", nargs="+", default=_ONLY, metavar="START", help="settings whose name starts like this"
    )
    parser.add_argument("--plans", type=Path, nargs="*", default=[], metavar="FILE", help="schedules as JSON as well")
    parser.add_argument("--compare", action="store_true", help="run the PyTorch side on the same images")
    parser.add_argument("--accuracy-batch", type=int, default=4, help="batch size of the accuracy passes")
    parser.add_argument("--rounds", type=int, default=0, help="timing rounds; 0 skips timing (the default)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="batch sizes to time")
    parser.add_argument("--timing-images", type=int, default=16, help="images of the split that are timed")
    parser.add_argument("--json", type=Path, help="where to write all the numbers")
    given = parser.parse_args()
    least = {"accuracy-batch": 1, "rounds": 0, "timing-images": max(given.batches)}
    for name, number in least.items():
        value = getattr(given, name.replace("-", "_"))
        if value < number:
            raise shell.UsageError(f"`--{name}` must be at least {number}, got {value}")
    return given


def settings(loaded: runs.Loaded, given: argparse.Namespace) -> tuple[evaluate.Setting, ...]:
    """Dense, and what else is to be run."""
    model = loaded.model
    patches = (data.SIZE[0] * data.SIZE[1]) // _patch(loaded) ** 2
    radius = dict(given.exits) if given.exits else evaluate.default_radius(model.after, patches)
    every = evaluate.settings(model.after, radius, [3])
    if model.schedule.active:
        every = (*every, evaluate.Setting("the run's own", "found", model.schedule))
    chosen = [one for one in every[1:] if one.name.startswith(tuple(given.only))]
    return (every[0], *chosen, *map(evaluate.read_plan, given.plans))


def _patch(loaded: runs.Loaded) -> int:
    """Side of a patch, in pixels."""
    image = jax.ShapeDtypeStruct((1, *data.SIZE, 3), jnp.float32)
    grid = jax.eval_shape(loaded.model.network.embed, loaded.params, image).grid
    return data.SIZE[0] // grid[0]


@dataclass(frozen=True)
class Result:
    """What a setting gave on the whole split.

    Attributes:
        confusion: Pixels by label and prediction.
        classes: Class of each pixel.
        logits: Class scores of the patches.
        depth: Blocks that each patch ran through.
        ran: Tokens that ran through each block.
        room: Entries that each block worked on.
    """

    confusion: Int[torch.Tensor, "classes classes"]
    classes: Int[np.ndarray, "images height width"]
    logits: Float[np.ndarray, "images grid_height grid_width classes"]
    depth: Int[np.ndarray, "images grid_height grid_width"]
    ran: Int[np.ndarray, "images blocks"]
    room: Int[np.ndarray, "images blocks"]


def run(loaded: runs.Loaded, plan: Schedule, batches: data.Batches, *, description: str) -> Result:
    """Run a plan over the split."""
    confusion, found = torch.zeros(len(data.CLASSES), len(data.CLASSES), dtype=torch.int64), []
    for images, labels in shell.progress(batches, desc=description):
        out = loaded(channels_last(images), plan)
        classes = np.asarray(out.upsample(data.SIZE).argmax(axis=-1))
        predicted = torch.from_numpy(classes.astype(np.int64))
        count = {"classes": len(data.CLASSES), "ignore": data.IGNORE}
        confusion = confusion + metrics.confusion_matrix(predicted, labels, **count)
        parts = classes.astype(np.uint8), out.logits, out.exit_depth, out.tokens_per_block, out.capacity_per_block
        found.append(tuple(map(np.asarray, parts)))
    return Result(confusion, *(np.concatenate(parts) for parts in zip(*found, strict=True)))


def channels_last(images: Float[torch.Tensor, "images 3 height width"]) -> jax.Array:
    """The same images as JAX has them."""
    return jnp.asarray(np.ascontiguousarray(np.moveaxis(images.numpy(), 1, -1)))


def figures(result: Result, dense: Result) -> dict[str, Any]:
    """Accuracy and work."""
    return {
        "miou": metrics.mean_iou(result.confusion),
        "token_blocks": cost.token_blocks(result.ran, slots=int(dense.ran[0, 0])),
        "agreement": (result.classes == dense.classes).mean().item(),
        "valid_of_capacity": result.ran.sum().item() / result.room.sum().item(),
    }


@torch.inference_mode()
def compared(theirs: tet.ExitingModel, plan: Schedule, batches: data.Batches, ours: Result) -> dict[str, Any]:
    """The PyTorch side on the same images, and where it differs.

    Where a patch of an image differs, all later ones may, for they no longer see the same tokens. So of such an image
    the first exit with a difference is looked at. Each patch that differs there must be one with a decision that also
    changes when the threshold of that exit moves by 1e-4, or it must have changed places with another that is as
    confident within 1e-4: retention and budgets go by rank.

    Args:
        theirs: The network in PyTorch.
        plan: When tokens leave.
        batches: The images.
        ours: What JAX made of them.

    Returns:
        `patches`, and how many of them left elsewhere (`exits`); at first exits with a difference, how many were
        neither (`unexplained`); the greatest difference of logits in images with equal exits (`logits`);
        the mIoU of the PyTorch side (`miou`).
    """
    confusion = torch.zeros(len(data.CLASSES), len(data.CLASSES), dtype=torch.int64)
    other = unexplained = start = 0
    greatest = 0.0
    for images, labels in shell.progress(batches, desc="PyTorch"):
        out = theirs(images, schedule=plan)
        count = {"classes": len(data.CLASSES), "ignore": data.IGNORE}
        confusion = confusion + metrics.confusion_matrix(out.upsample(data.SIZE).argmax(1), labels, **count)
        for index in range(len(images)):
            depth, here = out.exit_depth[index].numpy(), ours.depth[start + index]
            if (depth == here).all():
                gap = np.abs(out.logits[index].movedim(0, -1).numpy() - ours.logits[start + index]).max()
                greatest = max(greatest, gap.item())
                continue
            other += int((depth != here).sum())
            first = int(np.minimum(depth, here)[depth != here].min())
            unexplained += _unexplained(theirs, plan, images[index : index + 1], first, depth == first, here == first)
        start += len(images)
    return {
        "patches": ours.depth.size, "exits": other, "unexplained": unexplained, "logits": greatest,
        "miou": metrics.mean_iou(confusion),
    }  # fmt: skip


def _unexplained(
    theirs: tet.ExitingModel,
    plan: Schedule,
    image: Float[torch.Tensor, "1 3 height width"],
    after: int,
    left: Bool[np.ndarray, "grid_height grid_width"],
    left_here: Bool[np.ndarray, "grid_height grid_width"],
) -> int:
    """How many patches that leave at an exit on one side alone are near neither its threshold nor another of them."""
    low, high = (
        theirs(image, schedule=shifted(plan, after, by)).exit_depth[0].numpy() == after for by in (-_NEAR, _NEAR)
    )
    confidence = tet.Staged(theirs)(image, schedule=plan).logits[after][0].softmax(dim=0).amax(dim=0).numpy()
    alone = confidence[left & ~left_here], confidence[left_here & ~left]
    found = 0
    for side, other, marks in zip(alone, alone[::-1], (left & ~left_here, left_here & ~left), strict=True):
        swapped = (np.abs(side[:, None] - other) <= _NEAR).any(axis=1)
        found += int((~swapped & (low == high)[marks]).sum())
    return found


def shifted(plan: Schedule, after: int, by: float) -> Schedule:
    """The plan with the thresholds of one exit moved: they are the leaves of a plan."""
    exits = tuple(
        jax.tree.map(lambda leaf: leaf + by if isinstance(leaf, float) else leaf, exit) if exit.after == after else exit
        for exit in plan.exits
    )
    return replace(plan, exits=exits)


def timed(
    loaded: runs.Loaded, chosen: Sequence[evaluate.Setting], images: jax.Array, *, batch: int, rounds: int
) -> dict[str, Any]:
    """Time every setting at one batch size, dense JAX being 1; what does not fill a batch is left out."""
    batches = [images[start : start + batch] for start in range(0, len(images) - batch + 1, batch)]
    bare = runs.bare_dense(loaded)
    candidates: dict[str, Callable[[jax.Array], object]] = {"dense": lambda some: bare(some).block_until_ready()}
    share = {}
    for setting in chosen[1:]:
        candidates[setting.name] = lambda some, plan=setting.plan: loaded(some, plan).logits.block_until_ready()
        # Every batch once before the clock runs: another bucket is another program.
        outs = [loaded(some, setting.plan) for some in batches]
        ran, room = (sum(float(part.sum()) for part in parts) for parts in zip(*map(_work, outs), strict=True))
        share[setting.name] = ran / room
    seconds = timing.interleaved(candidates, batches, rounds=rounds)
    found = timing.summary(seconds, images=batch * len(batches), baseline="dense")
    return {name: entry | {"valid_of_capacity": share.get(name, 1.0)} for name, entry in found.items()}


def _work(out: tej.Output) -> tuple[jax.Array, jax.Array]:
    return out.tokens_per_block, out.capacity_per_block


def table(results: dict[str, Any]) -> str:
    """The numbers, for a person."""
    wide = max(map(len, results["settings"])) + 2
    lines = [f"{'':<{wide}}{'mIoU':>8}{'token-blocks':>14}{'as dense':>10}{'valid / capacity':>18}"]
    for name, found in results["settings"].items():
        numbers = f"{100 * found['miou']:>8.2f}{found['token_blocks']:>14.3f}{100 * found['agreement']:>8.2f} %"
        lines.append(f"{name:<{wide}}{numbers}{found['valid_of_capacity']:>18.3f}")
    if results["compared"]:
        lines += ["", f"{'beside PyTorch':<{wide}}{'mIoU':>8}{'other exits':>14}{'unexplained':>13}{'logits':>10}"]
        for name, found in results["compared"].items():
            counts = f"{found['exits']:>6} of {found['patches']}"
            numbers = f"{100 * found['miou']:>8.2f}{counts:>14}{found['unexplained']:>13}{found['logits']:>10.1e}"
            lines.append(f"{name:<{wide}}{numbers}")
    for batch, entries in results["time"].items():
        lines += ["", f"{f'batch {batch}':<{wide}}{'speed-up over dense':>22}{'valid / capacity':>18}"]
        for name, entry in entries.items():
            low, middle, high = entry["speedup"]
            speed = f"x {middle:.2f} [{low:.2f}, {high:.2f}]"
            lines.append(f"{name:<{wide}}{speed:>22}{entry['valid_of_capacity']:>18.3f}")
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    given = arguments()
    frames = data.frames(given.data, given.split, given.limit)
    loaded = runs.load(given.run)[0] if given.run else runs.ready(given.init, data.SIZE)
    chosen, batches = settings(loaded, given), data.Batches(frames, given.accuracy_batch)
    theirs = common.saved_model(given.run or given.init, data.SIZE).eval() if given.compare else None
    results: dict[str, Any] = {"images": len(frames), "split": given.split, "settings": {}, "compared": {}, "time": {}}
    dense = None
    for setting in chosen:
        found = run(loaded, setting.plan, batches, description=setting.name)
        dense = found if dense is None else dense
        results["settings"][setting.name] = figures(found, dense)
        if theirs is not None:
            results["compared"][setting.name] = compared(theirs, setting.plan, batches, found)
    if given.rounds:
        some = data.Batches(data.frames(given.data, given.split, given.timing_images), 1)
        images = jnp.concatenate([channels_last(images) for images, _ in some])
        results["time"] = {
            str(batch): timed(loaded, chosen, images, batch=batch, rounds=given.rounds) for batch in given.batches
        }
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    shell.exit_with(main)
